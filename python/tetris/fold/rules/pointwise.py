"""Operations on single elements, and those that look along one axis: sums, softmax, pooling."""

from __future__ import annotations

from typing import Any

import numpy as np

from ..flow import Flow, rule
from ..values import Labelled, Plain, Stored, Value
from .shapes import taken

_UNCHANGED = ("alias", "clone", "contiguous", "detach", "lift_fresh_copy", "to", "_to_copy")
_UNCHANGED += ("type_as", "dropout", "feature_dropout", "alpha_dropout")  # there is none in eval
_ONE = (
    *("abs", "neg", "sign", "square", "sqrt", "rsqrt", "reciprocal", "exp", "exp2", "expm1", "log"),
    *("log2", "log10", "log1p", "sin", "cos", "tan", "sinh", "cosh", "tanh", "atan", "erf", "erfc"),
    *("relu", "relu6", "gelu", "silu", "elu", "selu", "celu", "mish", "softplus", "softsign"),
    *("sigmoid", "log_sigmoid", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "threshold"),
    *("hardshrink", "softshrink", "tanhshrink", "floor", "ceil", "round", "trunc", "frac"),
    *("isnan", "isinf", "isfinite", "nan_to_num", "logical_not", "bitwise_not"),
)
_SEVERAL = (
    *("add", "sub", "rsub", "mul", "div", "floor_divide", "fmod", "remainder", "pow", "atan2"),
    *("maximum", "minimum", "fmax", "fmin", "clamp", "clamp_min", "clamp_max", "where", "lerp"),
    *("addcmul", "addcdiv", "masked_fill", "eq", "ne", "lt", "le", "gt", "ge", "xlogy", "hypot"),
    *("logical_and", "logical_or", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_xor"),
    *("__and__", "__or__", "__xor__", "copysign"),
)


@rule(*_ONE, *_SEVERAL)
def elementwise(flow: Flow, given: dict[str, Any]) -> Value:
    """Each element by itself, or with those at the same place of others."""
    return flow.elementwise([v for v in given.values() if isinstance(v, (Plain, Stored, Labelled))])


@rule("glu")
def gated(flow: Flow, given: dict[str, Any]) -> Any:
    """One half times the sigmoid of the other."""
    x = given["self"]
    if not isinstance(x, Labelled):
        return NotImplemented
    dim = given["dim"] % len(x.shape)
    return flow.elementwise([taken(flow, x, dim, h) for h in np.split(np.arange(x.shape[dim]), 2)])


@rule(*_UNCHANGED)
def unchanged(flow: Flow, given: dict[str, Any]) -> Value:
    """Copies and casts; a parameter stays one."""
    return given["self" if "self" in given else "input"]


@rule("zeros_like", "ones_like", "full_like", "empty_like", "rand_like", "randn_like")
@rule("new_zeros", "new_ones", "new_full", "new_empty")
def like(flow: Flow, given: dict[str, Any]) -> Value:
    """Of another value's shape or type alone."""
    return flow.plain()


@rule("prelu", "_prelu_kernel")
def prelu(flow: Flow, given: dict[str, Any]) -> Any:
    """A slope per channel, which are along axis 1 as for batch norm."""
    x, weight = given["self"], given["weight"]
    if not isinstance(x, Labelled) or not isinstance(weight, Stored):
        return NotImplemented
    if len(weight.shape) == 1:
        weight = per_channel(weight, len(x.shape))
    return flow.elementwise([x, weight])


def per_channel(stored: Stored, rank: int) -> Stored:
    """``[C]`` as ``[C, 1, ..]``, to meet axis 1 of a value."""
    more = rank - 2
    return Stored(
        stored.shape + (1,) * more, stored.tensor, stored.dims + (None,) * more, stored.whole
    )


# -- along axes -----------------------------------------------------------------------------------


@rule(
    *("sum", "mean", "prod", "amax", "amin", "var", "std", "logsumexp", "any", "all"),
    *("linalg_vector_norm", "norm"),
)
def reduction(flow: Flow, given: dict[str, Any]) -> Any:
    """Sums and the like over some axes."""
    x = given.get("self")
    if not isinstance(x, Labelled) or (isinstance(flow.shape, list)):
        return NotImplemented
    dims = given.get("dim")
    rank = len(x.shape)
    listed = dims if isinstance(dims, (list, tuple)) else [dims]
    over = [d % rank for d in listed if d is not None] or list(range(rank))
    if set(over) & set(x.dims):
        flow.alike(x, over)
        return flow.plain()
    if given.get("keepdim", False):
        return Labelled(flow.shape, x.ids, x.places)
    left = tuple(n for d, n in enumerate(x.ids.shape) if d not in over)
    return Labelled(flow.shape, x.ids.reshape(left), x.places.reshape(left))


@rule("softmax", "_softmax", "log_softmax", "_log_softmax", "cumsum", "cumprod")
def along(flow: Flow, given: dict[str, Any]) -> Any:
    """All elements along one axis together."""
    x, dim = given["self"], given["dim"]
    if not isinstance(x, Labelled):
        return NotImplemented
    if dim % len(x.shape) in x.dims:
        if "softmax" not in flow.operation:
            return NotImplemented
        flow.alike(x, [dim % len(x.shape)])
    return x


_POOLS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool", "_adaptive_avg_pool")


@rule(*(f"{p}{d}d" for p in _POOLS for d in (1, 2, 3)))
@rule(*(f"upsample_{k}{d}d" for k in ("nearest", "linear") for d in (1, 2, 3)))
@rule(
    "upsample_bilinear2d", "upsample_bicubic2d", "upsample_trilinear3d", "_upsample_nearest_exact2d"
)
def spatial(flow: Flow, given: dict[str, Any]) -> Any:
    """Pooling and interpolation, along the last axes."""
    x = given["self" if "self" in given else "input"]
    count = int(flow.operation[-2])
    if not isinstance(x, Labelled) or any(d >= len(x.shape) - count for d in x.dims):
        return NotImplemented
    if isinstance(flow.shape, list):
        return NotImplemented  # with indices
    return Labelled(flow.shape, x.ids, x.places)


@rule("pad", "constant_pad_nd", "reflection_pad1d", "reflection_pad2d", "replication_pad2d")
def padded(flow: Flow, given: dict[str, Any]) -> Any:
    """Padding, along the last axes."""
    x, pad = given["self"], given["pad" if "pad" in given else "padding"]
    touched = {len(x.shape) - 1 - i // 2 for i, n in enumerate(pad) if n != 0}
    if not isinstance(x, Labelled) or touched & set(x.dims):
        return NotImplemented
    return Labelled(flow.shape, x.ids, x.places)


# -- norms ----------------------------------------------------------------------------------------


@rule("layer_norm", "native_layer_norm", "rms_norm", "_fused_rms_norm")
def layer_norm(flow: Flow, given: dict[str, Any]) -> Any:
    """Statistics over the last axes, then a scale and a shift for each of their elements."""
    x = given["input"]
    count = len(given["normalized_shape"])
    if isinstance(x, Labelled):
        flow.alike(x, range(len(x.shape) - count, len(x.shape)))
    return _scaled(flow, x, [given.get("weight"), given.get("bias")])


@rule("group_norm", "native_group_norm")
def group_norm(flow: Flow, given: dict[str, Any]) -> Any:
    """Statistics over the channels of a group."""
    x = given["input"]
    if not isinstance(x, Labelled) or x.dims != [1]:
        return NotImplemented
    groups = given["num_groups" if "num_groups" in given else "group"]
    number = np.arange(x.shape[1]) // (x.shape[1] // groups)
    flow.channels.meet([x.ids], [x.places, number.reshape(x.ids.shape)])
    return _scaled(flow, x, _channelwise(given, ("weight", "bias"), len(x.shape)))


@rule(
    *("batch_norm", "native_batch_norm", "_native_batch_norm_legit", "instance_norm"),
    *("_native_batch_norm_legit_no_training", "cudnn_batch_norm"),
)
def batch_norm(flow: Flow, given: dict[str, Any]) -> Any:
    """Statistics, scale and shift of each channel."""
    x = given["input"]
    if isinstance(x, Labelled) and x.dims != [1]:
        return NotImplemented
    names = ("weight", "bias", "running_mean", "running_var")
    return _scaled(flow, x, _channelwise(given, names, len(x.shape)))


def _channelwise(given: dict[str, Any], names: tuple[str, ...], rank: int) -> list[Any]:
    return [
        per_channel(v, rank) if isinstance(v, Stored) else v for v in (given.get(n) for n in names)
    ]


def _scaled(flow: Flow, x: Value, parameters: list[Any]) -> Any:
    """The result of a norm, the first of several if it returns its statistics as well."""
    if isinstance(flow.shape, list) and not flow.first_only:
        return NotImplemented
    result = flow.elementwise([x, *(p for p in parameters if p is not None)], x.shape)
    return [result] if isinstance(flow.shape, list) else result
