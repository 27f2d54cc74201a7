"""Which batch norm scales the inputs of a layer, and whether the layer can take the scale over.

For a scale gamma > 0, ``f(gamma * x) = gamma * f(x)`` if f is *positively homogeneous*: ReLU, max
and average pooling, dropout, flattening. What batch norm multiplies by gamma, the layers behind
such steps may multiply their weights by instead.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import fx, nn
from torch.nn import functional as F

from ..graph import NORM, trace
from ..modules import hooks_of
from ..nn.kinds import DenseLayer

_POOL = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.MaxPool3d, nn.AvgPool1d, nn.AvgPool2d, nn.AvgPool3d),
    *(nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d, nn.AdaptiveAvgPool3d),
    *(nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d, nn.AdaptiveMaxPool3d),
)
_MODULES = (
    *(nn.ReLU, nn.LeakyReLU, nn.PReLU, nn.RReLU, nn.Identity),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d, nn.ZeroPad1d, nn.ZeroPad2d),
    *_POOL,
)  # AlphaDropout adds, ReLU6 and Hardtanh saturate, GELU and SiLU bend
_FUNCTIONS = (
    *(F.relu, F.relu_, torch.relu, torch.relu_, F.leaky_relu, F.leaky_relu_, F.prelu),
    *(F.dropout, F.dropout1d, F.dropout2d, F.dropout3d),
    *(F.max_pool1d, F.max_pool2d, F.max_pool3d, F.avg_pool1d, F.avg_pool2d, F.avg_pool3d),
    *(F.adaptive_avg_pool1d, F.adaptive_avg_pool2d, F.adaptive_avg_pool3d),
    *(F.adaptive_max_pool1d, F.adaptive_max_pool2d, F.adaptive_max_pool3d),
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


def input_scales(model: nn.Module, layers: Mapping[str, DenseLayer]) -> dict[str, InputScale]:
    """Where the scale of each layer's inputs comes from, by tracing the model with ``torch.fx``.

    A ``BatchNorm1d`` in front of a linear layer is taken to see ``[N, features]``: a graph has no
    sizes that would tell it from ``[N, L, features]`` with as many L.

    Args:
        model: The model; only read.
        layers: name -> layer that may take scales over.
    """
    try:
        graph = trace(model)
    except Exception as error:  # whatever the model's code raises without numbers
        reason = f"{type(model).__name__} cannot be traced: {_first_line(error)}"
        return {name: InputScale(reason=reason) for name in layers}
    return _Walk(model, graph, layers).scales()


class _Walk:
    """Walks a graph from layers back to batch norms, and from these to all layers behind them."""

    def __init__(self, model: nn.Module, graph: fx.Graph, layers: Mapping[str, DenseLayer]) -> None:
        self.graph = graph
        self.layers = layers
        self.names = {id(layer): name for name, layer in layers.items()}
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.calls = Counter(
            id(self.module(node)) for node in graph.nodes if node.op == "call_module"
        )
        self.owners = Counter(
            id(p) for m in model.modules() for p in m._parameters.values() if p is not None
        )
        self.read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}

    def scales(self) -> dict[str, InputScale]:
        found = dict.fromkeys(self.layers, InputScale(reason="forward does not call it"))
        for node in self.graph.nodes:
            if node.op == "call_module" and (name := self.names.get(id(self.module(node)))):
                found[name] = self.scale(node)
        return found

    def scale(self, node: fx.Node) -> InputScale:
        """Of the inputs of the layer that a node calls."""
        layer = self.module(node)
        if self.calls[id(layer)] > 1:
            return InputScale(reason=f"it is called {self.calls[id(layer)]} times")
        source, flat = node.args[0] if node.args else node.kwargs.get("input"), False
        while isinstance(source, fx.Node) and (step := self.step(source)):
            source, flat = source.args[0], flat or step == "flatten"
        if not isinstance(source, fx.Node) or not self.is_norm(source):
            return InputScale(reason=f"its input comes from {self.describe(source)}")
        norm = self.module(source)
        assert isinstance(norm, NORM)
        name, channels = str(source.target), norm.num_features
        if self.calls[id(norm)] > 1:
            return InputScale(reason=f"{name} before it is called {self.calls[id(norm)]} times")
        inputs = layer.in_features if isinstance(layer, nn.Linear) else layer.in_channels
        assert isinstance(inputs, int)
        dims = NORM.index(type(norm)) + 1
        fits = dims == 1 if isinstance(layer, nn.Linear) else dims == _dims(layer)
        if inputs % channels or (inputs != channels and not flat) or not (fits or flat):
            return InputScale(reason=f"{name} before it has its channels along another axis")
        reason = self.conflict(source)
        return InputScale(name, inputs // channels, reason is None, reason or "")

    def conflict(self, node: fx.Node) -> str | None:
        """Why the scale of a batch norm cannot go into the layers behind it, if it cannot."""
        norm, name = self.module(node), str(node.target)
        if norm.weight is None or norm.bias is None:
            return f"{name} has no scale"
        if hooks := hooks_of(norm):
            return f"{name} has {hooks}"
        if self.owners[id(norm.weight)] > 1 or self.owners[id(norm.bias)] > 1 or name in self.read:
            return f"the parameters of {name} are used elsewhere"
        pending = [node]
        while pending:
            value = pending.pop()
            for user in value.users:
                if _is_size(user):
                    continue
                first = user.args[0] if user.args else None
                if first is value and self.step(user):
                    pending.append(user)
                elif not self.takes(user, value):
                    return f"the output of {name} also goes to {self.describe(user)}"
        return None

    def takes(self, node: fx.Node, value: fx.Node) -> bool:
        """Whether a node is a call of a layer that can take the scale of its input over."""
        if node.op != "call_module" or node.all_input_nodes != [value]:
            return False
        layer = self.module(node)
        once = id(layer) in self.names and self.calls[id(layer)] == 1
        return once and str(node.target) not in self.read

    def step(self, node: fx.Node) -> str | None:
        """``"same"`` or ``"flatten"`` of a positively homogeneous step, else None."""
        if node.op == "call_module":
            module = self.module(node)
            if hooks_of(module):
                return None
            if type(module) is nn.Flatten:
                return "flatten" if (module.start_dim, module.end_dim) == (1, -1) else None
            return "same" if type(module) in _MODULES else None
        if not node.args or not isinstance(node.args[0], fx.Node) or node.kwargs.get("out"):
            return None
        if node.op == "call_function" and node.target in _FUNCTIONS:
            return "same"
        if node.op == "call_method" and node.target in _METHODS:
            return "same"
        return "flatten" if _flattens(node) else None

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


def _flattens(node: fx.Node) -> bool:
    """Whether a node makes [N, features] of maps, channel by channel."""
    name = getattr(node.target, "__name__", node.target)
    known = node.op == "call_method" or node.target in (torch.flatten, torch.mean)
    rest = (*node.args[1:], *node.kwargs.values())
    if not known:
        return False
    if name == "flatten":
        return rest in ((1,), (1, -1))
    if name in ("view", "reshape"):  # x.view(x.size(0), -1)
        return len(rest) == 2 and isinstance(rest[0], fx.Node) and str(rest[1]) == "-1"
    if name == "mean":  # over the pixels
        return len(rest) == 1 and list(_several(rest[0])) in ([2], [2, 3], [-2, -1], [-1, -2])
    return False


def _several(value: object) -> Iterator[object]:
    yield from value if isinstance(value, (tuple, list)) else (value,)


def _is_size(node: fx.Node) -> bool:
    """Whether a node asks for sizes, not for numbers."""
    if node.op == "call_method":
        return node.target in ("size", "dim")
    return node.op == "call_function" and node.target is getattr and node.args[1] == "shape"


def _dims(layer: nn.Module) -> int:
    """Spatial dimensions of a convolution."""
    assert isinstance(layer.kernel_size, tuple)
    return len(layer.kernel_size)


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
