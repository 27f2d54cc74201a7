"""Which batch norm scales the inputs of a layer, and whether the layer can take the scale over.

For a scale gamma > 0, ``f(gamma * x) = gamma * f(x)`` if f is *positively homogeneous*: ReLU, max
and average pooling, dropout, flattening. What batch norm multiplies by gamma, the layers behind
such steps may multiply their weights by instead.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import fx, nn
from torch.nn import functional as F

from ...graph import NORM, activation_of, addends_of, other_activation, trace
from ...modules import hooks_of
from ...nn.kinds import DenseLayer, LinearLayer, features_of

_POOL = {
    **dict.fromkeys((nn.MaxPool1d, nn.AvgPool1d, nn.AdaptiveAvgPool1d, nn.AdaptiveMaxPool1d), 1),
    **dict.fromkeys((nn.MaxPool2d, nn.AvgPool2d, nn.AdaptiveAvgPool2d, nn.AdaptiveMaxPool2d), 2),
    **dict.fromkeys((nn.MaxPool3d, nn.AvgPool3d, nn.AdaptiveAvgPool3d, nn.AdaptiveMaxPool3d), 3),
    **dict.fromkeys((F.max_pool1d, F.avg_pool1d, F.adaptive_avg_pool1d, F.adaptive_max_pool1d), 1),
    **dict.fromkeys((F.max_pool2d, F.avg_pool2d, F.adaptive_avg_pool2d, F.adaptive_max_pool2d), 2),
    **dict.fromkeys((F.max_pool3d, F.avg_pool3d, F.adaptive_avg_pool3d, F.adaptive_max_pool3d), 3),
}
_PAD = {nn.ZeroPad1d: 1, nn.ZeroPad2d: 2}
_CONV = {nn.Conv1d: 1, nn.Conv2d: 2, nn.Conv3d: 3}
_CONV |= {nn.ConvTranspose1d: 1, nn.ConvTranspose2d: 2, nn.ConvTranspose3d: 3}
_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d),
)  # AlphaDropout adds, ReLU6 and Hardtanh saturate, GELU and SiLU bend
_FUNCTIONS = (
    *(F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, F.leaky_relu_, F.prelu),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
)
_METHODS = ("relu", "relu_", "contiguous", "clone")


@dataclass(frozen=True)
class InputScale:
    """Where the scale of a layer's inputs comes from.

    Attributes:
        norm: Batch norm whose scale the inputs carry, by name; None if none is known.
        repeat: Inputs in a row that share one channel of it: pixels, where maps were flattened.
        pushable: The layers behind the batch norm can take its scale over, all of them.
        reason: Why ``norm`` is None, or why it is not pushable.
    """

    norm: str | None = None
    repeat: int = 1
    pushable: bool = False
    reason: str = ""


class _Shape(NamedTuple):
    """What the graph tells of the shape of a map.

    Attributes:
        dims: Spatial dimensions behind the channels: 2 of [N, C, H, W], 0 of [N, features]. None
            if that does not show.
        flat: Whether spatial dimensions have become features, channel by channel.
    """

    dims: int | None
    flat: bool = False


class _Step(NamedTuple):
    """A positively homogeneous operation on one map.

    Attributes:
        kind: ``"same"`` shape, ``"pool"``, ``"pad"``, ``"flatten"`` or ``"mean"``.
        dims: Spatial dimensions that pooling and padding see; those that a mean is over.
    """

    kind: str
    dims: tuple[int, ...] = ()

    def after(self, shape: _Shape) -> _Shape | None:
        """Shape of the result; None where channels may no longer be along dimension 1.

        Of [N, C], one-dimensional pooling takes C for positions; so of others' spatial dimensions.
        """
        if self.kind == "same":
            return shape
        if self.kind == "flatten":  # [N, C] stays as it is
            return _Shape(0, shape.flat or shape.dims != 0)
        dims = shape.dims
        if dims is None:
            return None
        if self.kind == "pool":
            return shape if self.dims == (dims,) else None
        if self.kind == "pad":
            return shape if self.dims[0] <= dims else None
        over = sorted(d % (dims + 2) for d in self.dims)  # a mean
        return _Shape(0, shape.flat) if dims and over == list(range(2, dims + 2)) else None


def input_scales(
    model: nn.Module, layers: Mapping[str, DenseLayer], dims: Mapping[str, int] | None = None
) -> dict[str, InputScale]:
    """Where the scale of each layer's inputs comes from, by tracing the model with ``torch.fx``.

    A graph has no sizes. A ``BatchNorm1d`` counts only if what is in front of it shows whether it
    sees ``[N, C]`` or ``[N, C, L]``, for behind a linear layer on ``[N, L, features]`` its channels
    are L, and a linear layer behind it scales another axis. Convolutions are taken to see batches.

    Args:
        model: The model; only read.
        layers: name -> layer that may take scales over.
        dims: Batch norm -> spatial dimensions of its input, where somebody has looked.
    """
    try:
        graph = trace(model)
    except Exception as error:  # whatever the model's code raises without numbers
        reason = f"{type(model).__name__} cannot be traced: {_first_line(error)}"
        return {name: InputScale(reason=reason) for name in layers}
    return _Walk(model, graph, layers, dims or {}).scales()


class _Walk:
    """Walks a graph from layers back to batch norms, and from these to all layers behind them."""

    def __init__(
        self,
        model: nn.Module,
        graph: fx.Graph,
        layers: Mapping[str, DenseLayer],
        dims: Mapping[str, int],
    ) -> None:
        self.graph = graph
        self.layers = layers
        self.dims = dims
        self.names = {id(layer): name for name, layer in layers.items()}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.calls = Counter(
            id(self.module(node)) for node in graph.nodes if node.op == "call_module"
        )
        self.owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        self.read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
        self.spatial: dict[fx.Node, int | None] = {}
        for node in graph.nodes:  # inputs come first
            self.spatial[node] = self.spatial_of(node)

    def scales(self) -> dict[str, InputScale]:
        found = dict.fromkeys(self.layers, InputScale(reason="torch.fx sees no call of it"))
        for node in self.graph.nodes:
            if node.op == "call_module" and (name := self.names.get(id(self.module(node)))):
                found[name] = self.scale(node)
        return found

    def scale(self, node: fx.Node) -> InputScale:
        """Of the inputs of the layer that a node calls."""
        layer = self.module(node)
        assert isinstance(layer, DenseLayer)
        if self.calls[id(layer)] > 1:
            return InputScale(reason=f"it is called {self.calls[id(layer)]} times")
        source = node.args[0] if node.args else node.kwargs.get("input")
        path: list[fx.Node] = []
        while isinstance(source, fx.Node) and self.step(source):
            path.insert(0, source)
            source = source.args[0]
        if not isinstance(source, fx.Node) or not self.is_norm(source):
            return InputScale(reason=f"its input comes from {self.describe(source)}")
        norm = self.module(source)
        assert isinstance(norm, NORM)
        name = str(source.target)
        if self.calls[id(norm)] > 1:
            return InputScale(reason=f"{name} before it is called {self.calls[id(norm)]} times")
        shape: _Shape | None = _Shape(self.spatial[source])
        for passed in path:
            step = self.step(passed)
            shape = step.after(shape) if step and shape else None
        if shape is None or not _fits(layer, norm.num_features, shape):
            if self.spatial[source] is None:
                return InputScale(reason=f"{name} before it may see [N, C] or [N, C, L]")
            return InputScale(reason=f"{name} before it has its channels along another axis")
        reason = self.conflict(source)
        count = features_of(layer)[1] // norm.num_features
        return InputScale(name, count, reason is None, reason or "")

    def conflict(self, node: fx.Node) -> str | None:
        """Why the scale of a batch norm cannot go into the layers behind it, if it cannot."""
        norm, name = self.module(node), str(node.target)
        assert isinstance(norm, NORM)
        if norm.weight is None or norm.bias is None:
            return f"{name} has no scale"
        if hooks := hooks_of(norm):
            return f"{name} has {hooks}"
        if self.owners[id(norm.weight)] > 1 or self.owners[id(norm.bias)] > 1 or name in self.read:
            return f"the parameters of {name} are used elsewhere"
        pending = [(node, _Shape(self.spatial[node]))]
        while pending:
            value, shape = pending.pop()
            for user in value.users:
                if _is_size(user):
                    continue
                first = user.args[0] if user.args else None
                step = self.step(user) if first is value else None
                if step and (after := step.after(shape)):
                    pending.append((user, after))
                elif not self.takes(user, value, norm.num_features, shape):
                    return f"the output of {name} also goes to {self.describe(user)}"
        return None

    def spatial_of(self, node: fx.Node) -> int | None:
        """Spatial dimensions of a value, [N, C] having none; None if they do not show."""
        first = next((a for a in node.args if isinstance(a, fx.Node)), None)
        before = None if first is None else self.spatial[first]
        if step := self.step(node):
            after = step.after(_Shape(before))
            return None if after is None else after.dims
        if addends := addends_of(node):
            dims = {self.spatial[value] for value in addends}
            return dims.pop() if len(dims) == 1 else None
        if node.op == "call_module":
            module = self.module(node)
            if type(module) in _CONV:
                return _CONV[type(module)]
            if type(module) is nn.BatchNorm1d:
                return self.dims.get(str(node.target), before)
            if type(module) in NORM:
                return NORM.index(type(module)) + 1
            if type(module) is nn.Linear:
                return before
        known = activation_of(node, self.modules) or other_activation(node, self.modules)
        return before if known else None

    def takes(self, node: fx.Node, value: fx.Node, channels: int, shape: _Shape) -> bool:
        """Whether a node is a call of a layer that can take the scale of its input over."""
        if node.op != "call_module" or node.all_input_nodes != [value]:
            return False
        layer = self.module(node)
        if id(layer) not in self.names or self.calls[id(layer)] > 1:
            return False
        assert isinstance(layer, DenseLayer)
        return str(node.target) not in self.read and _fits(layer, channels, shape)

    def step(self, node: fx.Node) -> _Step | None:
        """The positively homogeneous step that a node is, if it is one."""
        if not node.args or not isinstance(node.args[0], fx.Node) or node.kwargs.get("out"):
            return None
        if node.op == "call_module":
            module = self.module(node)
            kind = type(module)
            if hooks_of(module):
                return None
            if isinstance(module, nn.Flatten):
                ends = (module.start_dim, module.end_dim)
                return _Step("flatten") if kind is nn.Flatten and ends == (1, -1) else None
            if kind in _POOL:
                return _Step("pool", (_POOL[kind],))
            if kind in _PAD:
                return _Step("pad", (_PAD[kind],))
            return _Step("same") if kind in _MODULES else None
        if node.op == "call_function" and node.target in _POOL:
            return _Step("pool", (_POOL[node.target],))
        if node.op == "call_function" and node.target in _FUNCTIONS:
            return _Step("same")
        if node.op == "call_method" and node.target in _METHODS:
            return _Step("same")
        if node.op == "call_method" or node.target in (torch.flatten, torch.mean):
            name = getattr(node.target, "__name__", node.target)
            if name == "mean":
                return _mean(node)
            if name == "flatten":
                return _Step("flatten") if _flattens(node) else None
            if name in ("view", "reshape"):  # x.view(x.size(0), -1)
                rest = node.args[1:]
                keeps = len(rest) == 2 and rest[1] == -1 and self.is_batch(rest[0], node.args[0])
                return _Step("flatten") if keeps and not node.kwargs else None
        return None

    def is_batch(self, size: object, value: fx.Node) -> bool:
        """Whether a number is that of samples in a value, as the value or one before it tells."""
        of = _first_size(size)
        while of is not value:
            if of is None or not self.step(value) or not isinstance(value.args[0], fx.Node):
                return False
            value = value.args[0]
        return True

    def is_norm(self, node: fx.Node) -> bool:
        return node.op == "call_module" and type(self.module(node)) in NORM

    def module(self, node: fx.Node) -> nn.Module:
        return self.modules[str(node.target)]

    def describe(self, value: object) -> str:
        if not isinstance(value, fx.Node):
            return "a constant"
        if value.op == "placeholder":
            return f"the model's input {value}"
        if value.op == "output":
            return "the model's output"
        if value.op == "call_module":
            return f"{value.target}, a {type(self.module(value)).__name__}"
        return f"{value} (an operation)"


def _fits(layer: DenseLayer, channels: int, shape: _Shape) -> bool:
    """Whether the inputs of a layer are these channels, in order, each as often as another."""
    inputs = features_of(layer)[1]
    if isinstance(layer, LinearLayer):
        whole = inputs % channels == 0 if shape.flat else inputs == channels
        return shape.dims == 0 and whole
    assert isinstance(layer.kernel_size, tuple)
    return shape.dims == len(layer.kernel_size) and inputs == channels


def _flattens(node: fx.Node) -> bool:
    """Whether ``flatten`` makes [N, features]."""
    named = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | node.kwargs
    return named in ({"start_dim": 1}, {"start_dim": 1, "end_dim": -1})


def _mean(node: fx.Node) -> _Step | None:
    named = dict(zip(("dim",), node.args[1:], strict=False)) | node.kwargs
    if len(node.args) > 2 or set(named) != {"dim"}:
        return None
    dim = named["dim"]
    dims = tuple(dim) if isinstance(dim, (tuple, list)) else (dim,)
    numbers = tuple(d for d in dims if isinstance(d, int))
    return _Step("mean", numbers) if len(numbers) == len(dims) else None


def _first_size(node: object) -> fx.Node | None:
    """The x of ``x.size(0)`` or ``x.shape[0]``, or None."""
    if not isinstance(node, fx.Node) or not node.args:
        return None
    sizes = node
    if node.op == "call_function" and node.target is operator.getitem and node.args[1] == 0:
        sizes = node.args[0]
        if not (isinstance(sizes, fx.Node) and _is_size(sizes) and len(sizes.all_input_nodes) == 1):
            return None
        if sizes.op == "call_method" and (sizes.target != "size" or len(sizes.args) > 1):
            return None
    elif not (node.op == "call_method" and node.target == "size" and node.args[1:] == (0,)):
        return None
    value = sizes.all_input_nodes[0]
    return value if sizes.args[:1] == (value,) else None


def _is_size(node: fx.Node) -> bool:
    """Whether a node asks for sizes, not for numbers."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.op == "call_function" and node.target is getattr and node.args[1] == "shape"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
