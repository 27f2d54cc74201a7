"""Tracing a model, and what the graph proves: equal shapes, and who writes into whose memory.

A graph has no sizes. Two values still have equal shapes for every input if both come from one value
through operations that change it alike, see :class:`Shape`.
"""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import fx, nn
from torch.nn import functional as F

from .folding import DENSE, TRANSPOSED
from .modules import hooks_of, own_forward
from .nn import SparseConv1d, SparseConv2d, SparseConvTranspose2d
from .nn.kinds import SPARSE_TYPES as SPARSE
from .nn.weight import ABSENT, AbsentWeight
from .ops import Activation

TAKES_RESIDUAL = (SparseConv1d, SparseConv2d, SparseConvTranspose2d)
_TRANSPOSED = (*TRANSPOSED, SparseConvTranspose2d)
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, SparseConv1d, SparseConv2d)
NORM = (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d)
ANY_NORM = (*NORM, nn.SyncBatchNorm)
NOTHING = (nn.Identity, nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.AlphaDropout)
"""Modules that return their input in eval mode."""
_DROPOUT = (F.dropout, F.dropout1d, F.dropout2d, F.dropout3d)
_DROPOUT += (F.alpha_dropout, F.feature_alpha_dropout)
_MAX_POOL = {nn.MaxPool1d: 1, nn.MaxPool2d: 2, nn.MaxPool3d: 3}
_FRESH = (*DENSE, *SPARSE, *ANY_NORM, *_MAX_POOL)  # their output shares no memory with their input
_SAME_SHAPE = (
    *(nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.PReLU, nn.RReLU),
    *(nn.ELU, nn.SELU, nn.CELU, nn.Softplus, nn.Mish, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
    *(nn.Softsign, nn.Tanhshrink, nn.Hardshrink, nn.Softshrink, nn.Threshold),
)
_SAME_SHAPE_NAMES = (
    *("relu6", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "prelu", "rrelu"),
    *("elu", "selu", "celu", "softplus", "mish", "sigmoid", "logsigmoid", "log_sigmoid", "tanh"),
    *("softsign", "tanhshrink", "hardshrink", "softshrink", "threshold"),
)  # of functions and methods that compute what these modules do


def _functions(*names: str) -> set[object]:
    """What torch has under these names, in place and not."""
    spaces = (F, torch, operator)
    return {getattr(s, name) for s in spaces for name in names if hasattr(s, name)}


_SAME_SHAPE_FUNCTIONS = {
    *_functions(*_SAME_SHAPE_NAMES, *(f"{name}_" for name in _SAME_SHAPE_NAMES)),
    F._threshold,  # type: ignore[attr-defined]  # what F.threshold is called
    *_DROPOUT,  # while training, too
}
_WITH_NUMBER = ("add", "sub", "mul", "div", "neg")
_WITH_NUMBER_FUNCTIONS = _functions(*_WITH_NUMBER, "truediv", "iadd", "isub", "imul", "itruediv")
_ADD = (operator.add, torch.add, operator.iadd)
_INPLACE = (
    operator.iadd,
    operator.isub,
    operator.imul,
    operator.itruediv,
    operator.ifloordiv,
    operator.imod,
    operator.ipow,
    operator.iand,
    operator.ior,
    operator.ixor,
    operator.ilshift,
    operator.irshift,
)  # all that tensors compute in place: x @= y makes a new tensor
_OTHER_ACTIVATIONS = (*_SAME_SHAPE_NAMES, "softmax", "log_softmax", "softmin", "glu")
_RELU = (F.relu, torch.relu, torch.relu_, F.relu_)


class _Proxy(fx.Proxy):
    """A value while tracing; plain proxies forget that ``x += y`` changes x itself."""


def _record_inplace(function: Callable[..., object]) -> Callable[[fx.Proxy, object], fx.Proxy]:
    def method(self: fx.Proxy, other: object) -> fx.Proxy:
        return self.tracer.create_proxy("call_function", function, (self, other), {})

    return method


for _function in _INPLACE:
    setattr(_Proxy, f"__{_function.__name__}__", _record_inplace(_function))


class Tracer(fx.Tracer):
    """Symbolic tracing that looks into everything but torch's modules and sparse layers.

    Args:
        whole: Other modules that stay one call.
    """

    def __init__(self, whole: Collection[nn.Module] = ()) -> None:
        super().__init__()
        self._whole = {id(module) for module in whole}

    def proxy(self, node: fx.Node) -> fx.Proxy:
        """The value of a node while tracing."""
        return _Proxy(node, self)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Whether a module stays one call in the graph.

        Subclasses of sparse layers too, whose checks of real tensors cannot be traced; nothing
        is assumed of what they compute.
        """
        if id(m) in self._whole or isinstance(m, SPARSE):
            return True
        return super().is_leaf_module(m, module_qualified_name)

    def create_arg(self, a: Any) -> Any:
        """What stands for an argument; the weight that a sparse layer has not, nothing can."""
        if isinstance(a, AbsentWeight):
            raise RuntimeError(ABSENT)
        return super().create_arg(a)


def trace(model: nn.Module, whole: Collection[nn.Module] = ()) -> fx.Graph:
    """Graph of a model's forward, whose arguments keep their names and defaults.

    Arguments that are None or a bool by default choose between branches, of which a graph has one:
    the default. (The result checks that it is called so.) Modules of ``whole`` stay one call.

    Raises:
        Exception: whatever the model's code raises when run without numbers.
        RuntimeError: it draws random numbers, which would become constants; a default is a tensor;
            modules have hooks, or the model a forward of its own, which a graph would not run;
            it computes with the dense weight of a sparse layer.
    """
    for name, module in model.named_modules():
        inside = not Tracer(whole).is_leaf_module(module, name)
        if inside and (hooks := hooks_of(module, forward=False)):  # a forward inside is traced
            raise RuntimeError(f"{name or 'the model'!r} has {hooks}, which a graph would not run")
    if own_forward(model):
        raise RuntimeError("its forward was replaced in the object, and a graph is of the class's")
    parameters = inspect.signature(model.forward).parameters
    defaults = {name: p.default for name, p in parameters.items()}
    for name, default in defaults.items():
        if isinstance(default, torch.Tensor):
            raise RuntimeError(f"{name!r} is a tensor by default, which a graph cannot hold")
    fixed = {n: d for n, d in defaults.items() if d is None or isinstance(d, bool)}
    before = torch.get_rng_state()
    graph = Tracer(whole).trace(model, concrete_args=fixed)
    if not torch.equal(before, torch.get_rng_state()):
        raise RuntimeError("it draws random numbers, which a graph would hold as constants")
    _restore_names(graph, parameters, fixed)
    return graph


def _restore_names(
    graph: fx.Graph, parameters: Mapping[str, inspect.Parameter], fixed: Collection[str]
) -> None:
    """Call fixed arguments as forward does: torch.fx calls them ``{name}_1``, in their order."""
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)  # come last there
    names = [name for name, p in parameters.items() if p.kind not in starred]
    placeholders = [node for node in graph.nodes if node.op == "placeholder"]
    for name, node in zip(names, placeholders, strict=False):
        if name in fixed:
            node.target = name
            node._rename(name)  # the old name may be that of another argument


def trace_for(where: str, model: nn.Module, advice: str) -> fx.Graph:
    """:func:`trace`, with a ValueError of function ``where`` that says what to do instead."""
    try:
        return trace(model)
    except Exception as error:  # a model's own code runs here: anything can come out of it
        text = " ".join(str(error).split())
        raise ValueError(
            f"{where}: {type(model).__name__} cannot be traced by torch.fx "
            f"({type(error).__name__}: {text}), {advice}"
        ) from error


def activation_of(node: fx.Node, modules: Mapping[str, nn.Module]) -> Activation | None:
    """The fusible activation that a node computes."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        if type(module) is nn.GELU:
            return _gelu(module.approximate)
        return {nn.ReLU: "relu", nn.SiLU: "silu"}.get(type(module))  # type: ignore[call-overload]
    if node.target in _RELU or (node.op == "call_method" and node.target in ("relu", "relu_")):
        return "relu"
    if node.target is F.gelu:
        return _gelu(node.kwargs.get("approximate", "none"))
    return "silu" if node.target is F.silu else None


def _gelu(approximate: object) -> Activation | None:
    return {"none": "gelu", "tanh": "gelu_tanh"}.get(str(approximate))  # type: ignore[return-value]


def other_activation(node: fx.Node, modules: Mapping[str, nn.Module]) -> str | None:
    """Name of the activation that a node computes, where no layer can fuse it."""
    if node.op == "call_module":
        kind = type(modules[str(node.target)])
        known = kind.__module__ == nn.ReLU.__module__ and kind is not nn.MultiheadAttention
        return kind.__name__ if known else None
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    return str(name) if str(name).strip("_") in _OTHER_ACTIVATIONS else None


def does_nothing(node: fx.Node) -> bool:
    """Whether a node is a function's call that returns its input: dropout that is off."""
    if node.op == "call_function" and node.target in _DROPOUT:
        return node.kwargs.get("training") is False and len(node.all_input_nodes) == 1
    return False


def adds(node: fx.Node) -> bool:
    """Whether a node is a sum, of whatever."""
    if node.op == "call_method":
        return node.target in ("add", "add_")
    return node.op == "call_function" and node.target in _ADD


def addends_of(node: fx.Node) -> tuple[fx.Node, fx.Node] | None:
    """The two values that a node adds, if it does nothing else."""
    if adds(node):
        rest = dict(node.kwargs)
        factor = rest.pop("alpha", 1)
        values = (*node.args, *rest.values())
        if set(rest) <= {"input", "other"} and len(values) == 2 and factor == 1:
            a, b = values
            if isinstance(a, fx.Node) and isinstance(b, fx.Node) and a is not b:
                return a, b
    return None


def input_of(node: fx.Node) -> fx.Node:
    """The input of a module's call, whose other arguments may be values, too."""
    value = node.args[0] if node.args else node.kwargs.get("input", node.all_input_nodes[0])
    assert isinstance(value, fx.Node)
    return value


def extras_of(node: fx.Node, module: nn.Module) -> dict[str, object]:
    """What a call of a convolution or linear layer passes besides its input, by name."""
    second = ("output_size", "residual") if type(module) in _TRANSPOSED else ("residual",)
    given = dict(zip(second, node.args[1:], strict=False)) | node.kwargs
    return {name: value for name, value in given.items() if name not in ("input", "x")}


def writes_to(node: fx.Node, modules: Mapping[str, nn.Module]) -> fx.Node | None:
    """The value whose memory a node overwrites."""
    if node.op == "call_module":
        module = modules[str(node.target)]
        derived = isinstance(module, SPARSE) and type(module) not in SPARSE
        unknown = derived or own_forward(module)  # may write, too
        inplace = unknown or getattr(module, "inplace", False)
    elif node.op == "call_method":
        inplace = str(node.target).endswith("_") and not str(node.target).endswith("__")
    elif node.op == "call_function":
        name = getattr(node.target, "__name__", "")
        in_operator = getattr(node.target, "__module__", "") == "_operator" and name.startswith("i")
        inplace = (
            name.endswith("_")
            or in_operator
            or name == "setitem"
            or (node.kwargs.get("inplace", False) or "out" in node.kwargs)
        )
    else:
        inplace = False
    first = node.args[0] if node.args else node.kwargs.get("input")
    return first if inplace and isinstance(first, fx.Node) else None


class Memory:
    """Which values may share memory, and whether a value is overwritten between two nodes."""

    def __init__(self, graph: fx.Graph, modules: Mapping[str, nn.Module]) -> None:
        self.modules = modules
        self.order = {node: i for i, node in enumerate(graph.nodes)}
        self.origins: dict[fx.Node, set[fx.Node]] = {}
        for node in graph.nodes:
            module = modules[str(node.target)] if node.op == "call_module" else None
            fresh = type(module) in _FRESH and not own_forward(cast(nn.Module, module))
            self.origins[node] = {node}
            if not fresh:
                self.origins[node].update(*(self.origins[n] for n in node.all_input_nodes))

    def overwritten(self, value: fx.Node, after: fx.Node, until: fx.Node) -> bool:
        """Whether a node between the two may change a value."""
        for node in self.order:
            if self.order[after] < self.order[node] < self.order[until]:
                target = writes_to(node, self.modules)
                if target is not None and self.origins[target] & self.origins[value]:
                    return True
        return False


@dataclass(frozen=True)
class Shape:
    """``[N, channels, *spatial]``, where N and spatial are those of a root value, then changed.

    A convolution maps a size H to ``floor((H - 1 + extra) / stride) + 1``, ``extra`` being its
    padding less its reach, ``2 padding - dilation (kernel - 1)``; one that keeps the size is left
    out. A transposed one maps it to ``(H - 1) stride + extra + 1``, ``extra`` being its reach less
    its padding, which is written with ``-stride``.

    Attributes:
        root: Value of unknown shape that this one comes from.
        channels: Known number, or the root itself.
        steps: ``(stride, extra)`` per dimension, of each convolution or pooling on the way.
    """

    root: fx.Node
    channels: int | fx.Node
    steps: tuple[tuple[tuple[int, int], ...], ...] = ()


def shapes(graph: fx.Graph, modules: Mapping[str, nn.Module]) -> dict[fx.Node, Shape]:
    """What is known of every value's shape.

    Values of equal shapes with a known number of channels are of one type as well: convolutions
    or batch norms take or return them, so that they are no integers, which a function or a factor
    would turn into floats.
    """
    found: dict[fx.Node, Shape] = {}
    for node in graph.nodes:
        shape = _shape(node, modules, found) or Shape(node, node)
        if isinstance(shape.channels, fx.Node):
            taken = _channels_taken(node, modules)
            shape = shape if taken is None else replace(shape, channels=taken)
        found[node] = shape
    return found


def _channels_taken(node: fx.Node, modules: Mapping[str, nn.Module]) -> int | None:
    """Channels of a value of unknown shape, as its consumers tell them."""
    taken = set()
    for user in node.users:
        module = modules[str(user.target)] if user.op == "call_module" else None
        if module is not None and user.args[:1] == (node,) and not hooks_of(module):
            if type(module) in (*_CONVOLUTIONS, *_TRANSPOSED):
                taken.add(cast(Any, module).in_channels)
            elif type(module) in ANY_NORM:
                taken.add(cast(Any, module).num_features)
    return taken.pop() if len(taken) == 1 else None


def _shape(
    node: fx.Node, modules: Mapping[str, nn.Module], found: Mapping[fx.Node, Shape]
) -> Shape | None:
    inputs = [a for a in node.args if isinstance(a, fx.Node)]
    if not inputs:
        return None
    first = found[inputs[0]]
    if node.op == "call_module" and hooks_of(modules[str(node.target)]):
        return None  # a hook may return what it likes
    if activation_of(node, modules):
        return first
    if addends := addends_of(node):
        return first if found[addends[0]] == found[addends[1]] else None
    if node.op != "call_module":
        return first if _keeps_shape(node) else None
    module = modules[str(node.target)]
    if type(module) in (*ANY_NORM, *_SAME_SHAPE):
        return first
    if type(module) in _TRANSPOSED:
        return _upsampled(node, module, found)
    window = _window(module)
    if window is None:
        return None
    steps = first.steps if all(w == (1, 0) for w in window) else (*first.steps, window)
    channels = getattr(module, "out_channels", first.channels)
    return replace(first, channels=channels, steps=steps)


def _keeps_shape(node: fx.Node) -> bool:
    """Whether a call that is no module's changes each element by itself."""
    name, function = str(node.target), node.op == "call_function"
    same = (
        node.target in _SAME_SHAPE_FUNCTIONS if function else name.rstrip("_") in _SAME_SHAPE_NAMES
    )
    if same:  # slopes of PReLU are one, or one per channel; nothing else may broadcast
        prelu = name == "prelu" or node.target in (F.prelu, torch.prelu)
        return len(node.all_input_nodes) == 1 or (prelu and len(node.args) == 2)
    number = node.target in _WITH_NUMBER_FUNCTIONS if function else name.rstrip("_") in _WITH_NUMBER
    others = [a for a in (*node.args, *node.kwargs.values()) if not isinstance(a, fx.Node)]
    known = set(node.kwargs) <= {"alpha", "other"} and all(type(a) in (int, float) for a in others)
    return number and known and len(node.args) + len(node.kwargs) == len(others) + 1


def _upsampled(node: fx.Node, module: nn.Module, found: Mapping[fx.Node, Shape]) -> Shape | None:
    """Shape of what a transposed convolution returns."""
    layer, extras = cast(Any, module), extras_of(node, module)
    shape = found[input_of(node)]
    like = extras.get("output_size")
    if like is not None:
        other = _whose_size(like)
        if other is None or found[other].root is not shape.root:
            return None  # the number of images may be another one
        return replace(found[other], channels=layer.out_channels)
    sizes = zip(
        *(layer.stride, layer.padding, layer.dilation, layer.kernel_size, layer.output_padding),
        strict=True,
    )
    window = tuple(
        (1, d * (k - 1) - 2 * p + spare) if s == 1 else (-s, d * (k - 1) - 2 * p + spare)
        for s, p, d, k, spare in sizes
    )
    steps = shape.steps if all(w == (1, 0) for w in window) else (*shape.steps, window)
    return replace(shape, channels=layer.out_channels, steps=steps)


def _whose_size(size: object) -> fx.Node | None:
    """The value of which ``x.shape``, ``x.size()`` or its end, ``x.shape[-2:]``, is the size."""
    if not isinstance(size, fx.Node):
        return None
    if size.op == "call_function" and size.target is operator.getitem:
        whole, part = size.args
        if part in (slice(2, None, None), slice(-2, None, None)) and isinstance(whole, fx.Node):
            return _whose_size(whole) if whole.target is not operator.getitem else None
    shape = size.op == "call_function" and size.target is getattr and size.args[1:] == ("shape",)
    if shape or (size.op == "call_method" and size.target == "size" and len(size.args) == 1):
        value = size.args[0]
        return value if isinstance(value, fx.Node) and not size.kwargs else None
    return None


def _window(module: nn.Module) -> tuple[tuple[int, int], ...] | None:
    """(stride, extra) per spatial dimension of a convolution or max pooling."""
    if type(module) in _MAX_POOL:
        dims = 0 if module.ceil_mode else _MAX_POOL[type(module)]
    elif type(module) in _CONVOLUTIONS:
        dims = len(cast(Any, module).kernel_size)
    else:
        dims = 0
    if dims == 0:
        return None
    module = cast(Any, module)  # one of several types that share these attributes
    if module.padding == "same":
        return ((1, 0),) * dims
    given = 0 if module.padding == "valid" else module.padding
    size, stride, padding, dilation = (
        _each(value, dims) for value in (module.kernel_size, module.stride, given, module.dilation)
    )
    return tuple(
        (s, 2 * p - d * (k - 1)) for k, s, p, d in zip(size, stride, padding, dilation, strict=True)
    )


def _each(value: Any, dims: int) -> tuple[int, ...]:
    return value if isinstance(value, tuple) else (value,) * dims
