"""Operations with weights, and attention: sums over channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..channels import Axis, Ids, Reason
from ..flow import Flow, rule
from ..values import Labelled, Plain, Shape, Stored, Value, coordinates
from .shapes import permuted, repeated


@rule("linear")
def linear(flow: Flow, given: dict[str, Any]) -> Any:
    """``x W^T + b``."""
    return _product(flow, given["input"], given["weight"], given.get("bias"))


@rule("addmm", "mm", "matmul", "bmm", "baddbmm")
def matmul(flow: Flow, given: dict[str, Any]) -> Any:
    """``a b``, perhaps plus something."""
    if flow.operation in ("addmm", "baddbmm"):
        a, b = (given[n] for n in (("mat1", "mat2") if "mat1" in given else ("batch1", "batch2")))
        if given.get("alpha", 1) != 1 or given.get("beta", 1) != 1:
            return NotImplemented
        added = given["self"]
    else:
        a, b = given["self"], given["other"] if "other" in given else given["mat2"]
        added = None
    if len(a.shape) < 2 or len(b.shape) < 2:
        return NotImplemented
    if isinstance(b, Stored) and len(b.shape) == 2:
        return _product(flow, a, permuted(b, [1, 0]), added)
    result = _of_two(flow, a, b, flow.shape)
    if added is None or result is NotImplemented:
        return result
    return flow.elementwise([result, added])


@rule("embedding")
def embedding(flow: Flow, given: dict[str, Any]) -> Any:
    """Rows of a table."""
    weight = given["weight"]
    if not isinstance(weight, Stored) or not isinstance(given["indices"], Plain):
        return NotImplemented
    flow.channels.freeze(flow.of(weight, 0), Reason("it is read by number"))
    return flow.labelled(-1, flow.of(weight, 1))


def _product(flow: Flow, x: Value, weight: Value, bias: Value | None) -> Any:
    """A linear layer with weight [out, in]."""
    if not isinstance(weight, Stored) or len(weight.shape) != 2:
        return NotImplemented
    rows, cols = flow.of(weight, 0), flow.of(weight, 1)
    return _linear(flow, x, rows, cols, bias)


def _linear(flow: Flow, x: Value, rows: Ids, cols: Ids, bias: Value | None) -> Any:
    if isinstance(x, Stored):
        return NotImplemented
    if isinstance(x, Labelled) and len(x.shape) - 1 not in x.dims:
        # One product for each channel, along another axis: rows would be channels beside them.
        reason = Reason(f"{flow.describe()} does not work along channels")
        for ids in (rows, cols):
            flow.channels.freeze(ids, reason)
        result: Value = Labelled(flow.shape, x.ids, x.places)
        return result if bias is None else flow.elementwise([result, bias])
    flow.contract(x, -1, cols)
    return _with_bias(flow, flow.labelled(-1, rows), bias)


def _with_bias(flow: Flow, result: Value, *added: Value | None) -> Value:
    return flow.elementwise([result, *(a for a in added if a is not None)])


# -- convolutions ---------------------------------------------------------------------------------


@rule("conv1d", "conv2d", "conv3d", "convolution")
def convolution(flow: Flow, given: dict[str, Any]) -> Any:
    """A convolution, also one that is transposed."""
    x, weight, bias = given["input"], given["weight"], given.get("bias")
    if not isinstance(weight, Stored):
        return NotImplemented
    if given.get("transposed", False):
        return transposed(flow, given)
    groups, kernel = given["groups"], len(weight.shape) - 2
    rows = flow.of(weight, 0)
    size = weight.shape[1] * groups
    if groups == 1:
        return _convolution(flow, x, kernel, rows, flow.of(weight, 1), 1, bias)
    entry = weight.dims[1]
    if entry is not None and len(entry[1]) != weight.whole[entry[0]]:
        return NotImplemented  # a part of a weight
    cols = None
    if weight.shape[1] > 1:
        assert entry is not None
        cols = flow.channels.of(Axis(weight.tensor, entry[0], size, groups))
    return _convolution(flow, x, kernel, rows, cols, groups, bias)


@rule("conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def transposed(flow: Flow, given: dict[str, Any]) -> Any:
    """A transposed convolution, with weight [in, out / groups, ..]."""
    x, weight = given["input"], given["weight"]
    if given["groups"] != 1 or not isinstance(weight, Stored):
        return NotImplemented
    rows, cols = flow.of(weight, 1), flow.of(weight, 0)
    return _convolution(flow, x, len(weight.shape) - 2, rows, cols, 1, given.get("bias"))


def _convolution(
    flow: Flow,
    x: Value,
    kernel: int,
    rows: Ids,
    cols: Ids | None,
    groups: int,
    bias: Value | None,
    residual: Value | None = None,
) -> Any:
    """A convolution by its channels.

    Args:
        flow: The flow.
        x: Its input.
        kernel: Axes of the kernel.
        rows: Channels of the outputs.
        cols: Channels of the inputs, None where each group has one.
        groups: How many.
        bias: Added to each channel.
        residual: Added to each element.
    """
    dim = len(x.shape) - kernel - 1  # 1, or 0 of a single image
    if isinstance(x, Stored) or (isinstance(x, Labelled) and x.dims != [dim]):
        return NotImplemented
    if isinstance(bias, Stored):
        more = (1,) * kernel
        bias = Stored(bias.shape + more, bias.tensor, bias.dims + (None,) * kernel, bias.whole)
    elif bias is not None:
        return NotImplemented
    if cols is None:
        _depthwise(flow, x, dim, rows, groups)
    elif groups == 1:
        flow.contract(x, dim, cols)
    else:
        number = np.arange(groups)
        flow.channels.meet([rows], [number.repeat(len(rows) // groups)])
        flow.channels.meet([cols], [number.repeat(len(cols) // groups)])
        flow.contract(x, dim, cols)
    return _with_bias(flow, flow.labelled(dim, rows), bias, residual)


def _depthwise(flow: Flow, x: Value, dim: int, rows: Ids, groups: int) -> None:
    """Each input channel has outputs of its own, which go where it goes."""
    if not isinstance(x, Labelled):
        flow.contract(x, dim, rows)
        return
    copies = len(rows) // groups
    number = np.arange(len(rows)) % copies
    places = x.places.ravel().repeat(copies)
    flow.channels.meet([x.ids.ravel().repeat(copies), rows], [number, places])


# -- sparse layers --------------------------------------------------------------------------------


@rule("tetris.bsmm")
def bsmm(flow: Flow, given: dict[str, Any]) -> Any:
    """A sparse linear layer."""
    x, values = given["x"], given["values"]
    if not isinstance(values, Stored):
        return NotImplemented
    rows, cols = _sparse_axes(flow, values, given["out_features"], x.shape[-1], 1)
    return _linear(flow, x, rows, cols, given["bias"])


@rule("tetris.bsconv2d", "tetris.bsconv_transpose2d")
def bsconv(flow: Flow, given: dict[str, Any]) -> Any:
    """A sparse convolution, also one that is transposed."""
    x, values, groups = given["x"], given["values"], given["groups"]
    is_transposed = flow.operation == "bsconv_transpose2d"
    if not isinstance(values, Stored) or (is_transposed and groups > 1):
        return NotImplemented
    size = x.shape[1]
    rows, cols = _sparse_axes(flow, values, given["out_channels"], size, groups)
    inputs = None if groups == size > 1 else cols
    residual = given.get("residual")
    return _convolution(flow, x, 2, rows, inputs, groups, given["bias"], residual)


def _sparse_axes(flow: Flow, values: Stored, out: int, in_: int, groups: int) -> tuple[Ids, Ids]:
    """Rows and columns of a sparse layer, by the name of its values."""
    rows = flow.channels.of(Axis(values.tensor, 0, out))
    if groups == in_ > 1:
        return rows, rows
    return rows, flow.channels.of(Axis(values.tensor, 1, in_, groups))


# -- attention ------------------------------------------------------------------------------------


@rule("scaled_dot_product_attention")
def attention(flow: Flow, given: dict[str, Any]) -> Any:
    """``softmax(q k^T) v``: q and k meet along their last axis, v goes on to the result."""
    q, k, v = given["query"], given["key"], given["value"]
    if isinstance(given.get("attn_mask"), (Labelled, Stored)):
        return NotImplemented
    if given.get("enable_gqa", False):
        copies = q.shape[-3] // k.shape[-3]
        k, v = (repeated(flow, each, copies, -3) for each in (k, v))
    rank = len(q.shape)
    scores = (*flow.shape[:-1], k.shape[-2])
    turned = permuted(k, [*range(rank - 2), rank - 1, rank - 2])
    weights = _of_two(flow, q, turned, scores)
    if not isinstance(weights, Plain):
        return NotImplemented
    return _of_two(flow, weights, v, flow.shape)


def _of_two(flow: Flow, a: Value, b: Value, shape: Shape) -> Any:
    """A product of two values, of at least two axes each; batches along the others."""
    rank = len(shape)
    # Scores of heads to which a bias of their own was added: which head is which is settled then.
    a, b = (flow.settled(v, d) for v, d in ((a, -1), (b, -2)))
    left, right = (v.padded(rank) if isinstance(v, Labelled) else v for v in (a, b))
    if isinstance(a, Stored) or isinstance(b, Stored):
        return NotImplemented
    if isinstance(a, Plain) and isinstance(b, Plain):
        return Plain(shape, a.origin)
    inner = (rank - 1, rank - 2)  # the axis that is summed over, of a and of b
    if isinstance(left, Labelled) and isinstance(right, Labelled):
        if inner[0] not in left.dims or inner[1] not in right.dims:
            return NotImplemented
        if rank - 2 in left.dims or rank - 1 in right.dims:
            return NotImplemented
        turned = permuted(right, [*range(rank - 2), rank - 1, rank - 2])
        assert isinstance(turned, Labelled)
        _meet_by_batch(flow, [left, turned])
        return Plain(shape, Reason(flow.describe()))
    own, other = (left, b) if isinstance(left, Labelled) else (right, a)
    assert isinstance(own, Labelled)
    assert isinstance(other, Plain)
    outer, summed = (rank - 2, rank - 1) if own is left else (rank - 1, rank - 2)
    if summed in own.dims or outer not in own.dims:
        if summed in own.dims:
            reason = Reason(f"{flow.describe()} combines it with {other.origin.text}")
            flow.channels.freeze(own.ids, reason)
            return Plain(shape, Reason(flow.describe()))
        return NotImplemented
    _meet_by_batch(flow, [own])
    return Labelled(shape, own.ids, own.places)


def _meet_by_batch(flow: Flow, values: Sequence[Labelled]) -> None:
    """Channels meet that may trade places within each batch only."""
    label = np.broadcast_shapes(*(v.ids.shape for v in values))
    batch = [d for d in range(len(label) - 2) if label[d] > 1]
    places = [v.places for v in values]
    flow.channels.meet([v.ids for v in values], [*places, *coordinates(label, batch)])
