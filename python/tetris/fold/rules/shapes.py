"""Operations that move elements: views, transposes, slices, concatenations, repeats."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from ..channels import Reason
from ..flow import Flow, rule
from ..values import Labelled, Plain, Shape, Stored, Value, common_groups


@rule("view", "reshape", "_unsafe_view", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as")
def view(flow: Flow, given: dict[str, Any]) -> Any:
    """The same elements under another shape."""
    return reshaped(flow, given["self"], flow.shape)


def reshaped(flow: Flow, x: Value, shape: Shape) -> Any:
    """A value under another shape."""
    if 0 in shape:
        return NotImplemented
    groups = common_groups(x.shape, shape)
    if isinstance(x, Stored):
        dims: list[Any] = [None] * len(shape)
        for old, new in groups:
            filled = [d for d in old if x.shape[d] > 1]
            target = [d for d in new if shape[d] > 1]
            if len(filled) > 1 or len(target) != len(filled):
                return NotImplemented  # a parameter whose axes are split or joined
            if filled:
                dims[target[0]] = x.dims[filled[0]]
        return Stored(shape, x.tensor, tuple(dims), x.whole)
    if not isinstance(x, Labelled):
        return NotImplemented
    label = [1] * len(shape)
    for old, new in groups:
        if set(old) & set(x.dims):
            others = [d for d in old if d not in x.dims]
            x = x.expanded(others, [flow.fresh() for _ in others])
            for d in new:
                label[d] = shape[d]
    return Labelled(shape, x.ids.reshape(label), x.places.reshape(label)).compressed()


@rule("permute", "transpose", "t", "movedim", "swapaxes", "numpy_T", "mT")
def permute(flow: Flow, given: dict[str, Any]) -> Any:
    """Axes in another sequence."""
    x = given["self"]
    rank = len(x.shape)
    if flow.operation == "permute":
        order = [d % rank for d in given["dims"]]
    elif flow.operation == "transpose":
        order = _swapped(rank, given["dim0"], given["dim1"])
    elif flow.operation == "t":
        order = list(range(rank))[::-1]
    else:
        return NotImplemented
    return permuted(x, order)


def permuted(x: Value, order: Sequence[int]) -> Value:
    """A value whose axis d is axis ``order[d]`` of another one."""
    shape = tuple(x.shape[d] for d in order)
    if isinstance(x, Stored):
        return Stored(shape, x.tensor, tuple(x.dims[d] for d in order), x.whole)
    if isinstance(x, Labelled):
        return Labelled(shape, x.ids.transpose(order), x.places.transpose(order))
    return Plain(shape, x.origin)


def _swapped(rank: int, a: int, b: int) -> list[int]:
    order = list(range(rank))
    order[a], order[b] = order[b], order[a]
    return order


@rule("expand", "expand_as", "broadcast_to")
def expand(flow: Flow, given: dict[str, Any]) -> Value:
    """Repeated along axes of size one."""
    x = given["self"]
    more = len(flow.shape) - len(x.shape)
    if isinstance(x, Stored):
        return Stored(flow.shape, x.tensor, (None,) * more + x.dims, x.whole)
    if isinstance(x, Labelled):
        x = x.padded(len(flow.shape))
        return Labelled(flow.shape, x.ids, x.places)
    return flow.plain()


@rule("repeat")
def repeat(flow: Flow, given: dict[str, Any]) -> Any:
    """Copies behind each other, along axes without channels."""
    x = given["self"]
    if not isinstance(x, Labelled):
        return NotImplemented
    x = x.padded(len(flow.shape))
    if any(given["repeats"][d] != 1 for d in x.dims):
        return NotImplemented
    return Labelled(flow.shape, x.ids, x.places)


@rule("repeat_interleave")
def repeat_interleave(flow: Flow, given: dict[str, Any]) -> Any:
    """Each element several times, as heads that share keys and values."""
    x, count, dim = given["self"], given["repeats"], given.get("dim")
    if not isinstance(x, Labelled) or not isinstance(count, int) or dim is None:
        return NotImplemented
    return repeated(flow, x, count, dim)


def repeated(flow: Flow, x: Value, count: int, dim: int) -> Value:
    """Each element along an axis several times."""
    dim %= len(x.shape)
    shape = tuple(n * count if d == dim else n for d, n in enumerate(x.shape))
    if not isinstance(x, Labelled):
        return Plain(shape, Reason(flow.describe()))
    if dim not in x.dims:
        return Labelled(shape, x.ids, x.places)
    copy = np.arange(shape[dim]) % count * flow.fresh()
    along = [-1 if d == dim else 1 for d in range(len(shape))]
    places = x.places.repeat(count, dim) + copy.reshape(along)
    return Labelled(shape, x.ids.repeat(count, dim), places)


# -- parts ----------------------------------------------------------------------------------------


@rule("slice", "select", "narrow")
def part(flow: Flow, given: dict[str, Any]) -> Any:
    """A part along an axis."""
    x, dim = given["self"], given["dim"] % len(given["self"].shape)
    size = x.shape[dim]
    if flow.operation == "select":
        index = np.array([given["index"] % size])
    elif flow.operation == "narrow":
        index = np.arange(size)[given["start"] :][: given["length"]]
    else:
        index = np.arange(size)[slice(given["start"], given["end"], given["step"])]
    found = taken(flow, x, dim, index)
    return reshaped(flow, found, flow.shape) if flow.operation == "select" else found


@rule("split", "split_with_sizes", "chunk", "tensor_split", "unbind")
def split(flow: Flow, given: dict[str, Any]) -> Any:
    """All parts along an axis, one behind the other."""
    x = given["self"]
    dim = given.get("dim", 0) % len(x.shape)
    found, start = [], 0
    for shape in flow.shape:
        whole = len(shape) == len(x.shape)
        size = shape[dim] if whole else 1
        piece = taken(flow, x, dim, np.arange(start, start + size))
        found.append(piece if whole else reshaped(flow, piece, shape))
        start += size
    return found


def taken(flow: Flow, x: Value, dim: int, index: Any) -> Value:
    """The elements at some positions along an axis."""
    shape = tuple(len(index) if d == dim else n for d, n in enumerate(x.shape))
    if isinstance(x, Stored):
        entry = x.dims[dim]
        new = None if entry is None else (entry[0], entry[1][index])
        if new is not None and len(index) == 1:  # read by its number
            flow.channels.freeze(flow.of(x, dim), Reason(f"{flow.describe()} picks from it"))
            new = None
        dims = tuple(new if d == dim else e for d, e in enumerate(x.dims))
        return Stored(shape, x.tensor, dims, x.whole)
    if isinstance(x, Labelled):
        if dim not in x.dims:
            return Labelled(shape, x.ids, x.places)
        return flow.checked(Labelled(shape, x.ids.take(index, dim), x.places.take(index, dim)))
    return Plain(shape, x.origin)


@rule("flip", "roll")
def moved(flow: Flow, given: dict[str, Any]) -> Any:
    """Elements in another sequence along axes without channels."""
    x, dims = given["self"], given["dims"]
    if not isinstance(x, Labelled) or not dims or {d % len(x.shape) for d in dims} & set(x.dims):
        return NotImplemented
    return x


@rule("index", "index_select")
def index(flow: Flow, given: dict[str, Any]) -> Any:
    """Positions that tensors tell, along axes without channels."""
    x = given["self"]
    if not isinstance(x, Labelled):
        return NotImplemented
    if flow.operation == "index_select":
        if given["dim"] % len(x.shape) in x.dims or not isinstance(given["index"], Plain):
            return NotImplemented
        return Labelled(flow.shape, x.ids, x.places)
    numbers = given["indices"]
    used = [d for d, n in enumerate(numbers) if n is not None]
    if set(used) & set(x.dims) or not all(isinstance(numbers[d], Plain) for d in used):
        return NotImplemented
    if used != list(range(used[0], used[-1] + 1)):
        return NotImplemented  # their axes go in front
    rank = len(np.broadcast_shapes(*(numbers[d].shape for d in used)))
    label = (*x.ids.shape[: used[0]], *(1,) * rank, *x.ids.shape[used[-1] + 1 :])
    return Labelled(flow.shape, x.ids.reshape(label), x.places.reshape(label))


# -- together -------------------------------------------------------------------------------------


@rule("cat", "concatenate")
def cat(flow: Flow, given: dict[str, Any]) -> Any:
    """Values behind each other: along channels, or along an axis where channels meet."""
    values, dim = given["tensors"], given.get("dim", 0) % len(flow.shape)
    labelled = [v for v in values if isinstance(v, Labelled)]
    if not labelled or any(len(v.shape) != len(flow.shape) for v in values):
        return NotImplemented
    if all(dim not in v.dims for v in labelled):
        return _one_behind_the_other(flow, values, dim)
    base = labelled[0].ids.shape
    base = (*base[:dim], 1, *base[dim + 1 :])
    ids, places = [], []
    for number, value in enumerate(values):
        if isinstance(value, Labelled):
            own = value.expanded([dim], [flow.fresh()])
            if (*own.ids.shape[:dim], 1, *own.ids.shape[dim + 1 :]) != base:
                return NotImplemented
            ids.append(own.ids)
            places.append(own.places + np.int64(number) * flow.fresh())
        elif base == (1,) * len(base):
            flow.stop(value, Reason(f"{flow.describe()} reads it as it is"))
            origin = value.origin if isinstance(value, Plain) else Reason("a parameter")
            size = value.shape[dim]
            label = tuple(size if d == dim else 1 for d in range(len(base)))
            ids.append(flow.channels.constant(size, origin).reshape(label))
            places.append(np.zeros(label, np.int64))
        else:
            return NotImplemented
    return Labelled(flow.shape, np.concatenate(ids, dim), np.concatenate(places, dim))


@rule("stack")
def stack(flow: Flow, given: dict[str, Any]) -> Any:
    """Values along a new axis."""
    values, dim = given["tensors"], given.get("dim", 0) % len(flow.shape)
    shape = flow.shape[:dim] + (1,) + flow.shape[dim + 1 :]
    lifted = [reshaped(flow, v, shape) if not isinstance(v, Plain) else v for v in values]
    if any(v is NotImplemented for v in lifted):
        return NotImplemented
    lifted = [Plain(shape, v.origin) if isinstance(v, Plain) else v for v in lifted]
    return _one_behind_the_other(flow, lifted, dim)


def _one_behind_the_other(flow: Flow, values: Sequence[Value], dim: int) -> Value:
    """Values behind each other along an axis without channels: along the others these meet.

    As if they were added, each taken to be of size one along the axis.
    """

    def thin(value: Value) -> Value:
        shape = tuple(1 if d == dim else n for d, n in enumerate(value.shape))
        if isinstance(value, Labelled):
            return Labelled(shape, value.ids, value.places)
        if isinstance(value, Stored):
            if value.dims[dim] is not None:
                reason = Reason(f"{flow.describe()} reads it as it is")
                flow.channels.freeze(flow.of(value, dim), reason)
            dims = tuple(None if d == dim else e for d, e in enumerate(value.dims))
            return Stored(shape, value.tensor, dims, value.whole)
        return Plain(shape, value.origin)

    shape = tuple(1 if d == dim else n for d, n in enumerate(flow.shape))
    met = flow.elementwise([thin(v) for v in values], shape)
    if isinstance(met, Labelled):
        return Labelled(flow.shape, met.ids, met.places)
    return flow.plain()
