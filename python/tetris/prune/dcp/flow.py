"""Who produces, carries and reads which channels, as the graph of a model tells.

Channels that must live or die together are a :class:`Space`; a value of the graph is made of
spaces. An operation that is not known to treat channels one by one keeps all of them.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...folding import TRANSPOSED
from ...graph import NORM, NOTHING, activation_of
from ...modules import hooks_of

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
LAYERS = (nn.Linear, *_CONVOLUTIONS)
_SPATIAL = {
    getattr(nn, f"{kind}{d}d"): d
    for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool", "ZeroPad")
    for d in (1, 2, 3)
}
"""Modules that change spatial axes -> how many: of a map with fewer they take channels, too."""
_ELEMENTWISE = (nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU)
_ELEMENTWISE += (nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Mish, *NOTHING)
_SPATIAL_FUNCTIONS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
_SPATIAL_NAMES = {f"{f}{d}d": d for f in _SPATIAL_FUNCTIONS for d in (1, 2, 3)}
_ELEMENTWISE_NAMES = {
    *("relu", "relu_", "relu6", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu"),
    *("sigmoid", "tanh", "softplus", "mish", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("clone", "contiguous", "detach", "clamp", "clamp_", "abs", "sqrt", "exp"),
}
_BINARY_NAMES = {"add", "add_", "sub", "sub_", "mul", "mul_", "truediv", "div", "div_"}
_BINARY_NAMES |= {"iadd", "isub", "imul", "itruediv"}


class Space:
    """Channels that live or die together wherever they appear; joined with others by adds.

    Attributes:
        size: Number of channels, None if unknown.
        frozen: Why all of them stay, or None.
        readers: Layers that consume them.
        needed: bool[size], what these read together.
    """

    def __init__(self, size: int | None, frozen: str | None = None) -> None:
        self.parent: Space | None = None
        self.size = size
        self.frozen = frozen
        self.readers: list[str] = []
        self.needed: Tensor | None = None if size is None else torch.zeros(size, dtype=torch.bool)

    def root(self) -> Space:
        """The space that stands for all it was joined with."""
        return self if self.parent is None else self.parent.root()

    def freeze(self, reason: str) -> None:
        """Keep all channels."""
        root = self.root()
        root.frozen = root.frozen or reason

    def join(self, other: Space) -> None:
        """Let two spaces be one."""
        a, b = self.root(), other.root()
        if a is not b:
            b.parent = a
            a.frozen = a.frozen or b.frozen
            a.readers += b.readers

    def kept(self) -> Tensor | None:
        """bool[size], the channels that stay; None if all of them do."""
        root = self.root()
        if root.frozen or root.needed is None or bool(root.needed.all()):
            return None
        return root.needed


@dataclass(frozen=True)
class Value:
    """Channels of a value: spaces behind each other, each channel ``repeat`` features wide.

    ``last`` says that they are the last axis and not axis 1; ``flat`` that axes were flattened, so
    that ``repeat`` is known to the consumer only. ``rank`` counts all axes, None if unknown: linear
    layers take any. Maps of convolutions have a batch axis, as a graph cannot tell otherwise.
    """

    spaces: tuple[Space, ...]
    last: bool = False
    flat: bool = False
    rank: int | None = None

    def size(self) -> int | None:
        """Channels of all spaces."""
        sizes = [s.root().size for s in self.spaces]
        return None if None in sizes else sum(s for s in sizes if s is not None)

    def freeze(self, reason: str) -> None:
        """Keep all channels."""
        for space in self.spaces:
            space.freeze(reason)

    def repeat(self, features: int) -> int | None:
        """Features per channel when there are so many in all; None if that cannot be."""
        size = self.size()
        if not size or features % size or (not self.flat and features != size):
            return None
        return features // size

    def kept(self, features: int) -> Tensor | None:
        """bool[features], what stays; None if all does."""
        repeat = self.repeat(features)
        if repeat is None or all(space.kept() is None for space in self.spaces):
            return None
        parts = []
        for space in self.spaces:
            kept, size = space.kept(), space.root().size
            assert size is not None
            kept = torch.ones(size, dtype=torch.bool) if kept is None else kept
            parts.append(kept.repeat_interleave(repeat))
        return torch.cat(parts)


_NUMBER = Value(())  # a size: the same for every channel


class Flow:
    """The channels of a traced model.

    Args:
        model: The model.
        graph: Its graph.

    Attributes:
        modules: name -> module, under every name.
        calls: id of a module -> how often it is called.
        names: id of a module that is called -> the name under which it is.
        fixed: name -> why its weight must stay as it is.
        outputs: Linear layer or convolution -> space of its outputs.
        inputs: The same -> the value it reads.
        carriers: Batch norm or depthwise convolution -> the value that passes through it.
    """

    def __init__(self, model: nn.Module, graph: fx.Graph) -> None:
        self.modules = dict(model.named_modules(remove_duplicate=False))
        self.calls = Counter(
            id(self.modules[str(n.target)]) for n in graph.nodes if n.op == "call_module"
        )
        self.names = {
            id(self.modules[str(n.target)]): str(n.target)
            for n in graph.nodes
            if n.op == "call_module"
        }
        users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
        self.fixed: dict[str, str] = {}
        for name, module in self.modules.items():
            if self.calls[id(module)] > 1:
                self.fixed[name] = f"it is called {self.calls[id(module)]} times"
            elif any(users[id(p)] > 1 for p in module._parameters.values() if p is not None):
                self.fixed[name] = "it shares a parameter with another module"
            elif name in read:
                self.fixed[name] = "its parameters are read elsewhere in forward"
            elif hooks := hooks_of(module):  # weight_norm and torch.nn.utils.prune are hooks, too
                self.fixed[name] = f"it has {hooks}, which may read or change all channels"
        self.outputs: dict[str, Space] = {}
        self.inputs: dict[str, Value] = {}
        self.carriers: dict[str, Value] = {}
        self._values: dict[fx.Node, Value] = {}
        for node in graph.nodes:
            self._values[node] = self._value(node)

    def _unknown(self, node: fx.Node, reason: str | None = None) -> Value:
        """A value of which nothing is known; what it is made of keeps all its channels."""
        reason = reason or f"{_describe(node, self.modules)} may read all channels"
        for source in node.all_input_nodes:
            self._values[source].freeze(reason)
        return Value((Space(None, reason),))

    def _value(self, node: fx.Node) -> Value:
        if node.op == "placeholder":
            return Value((Space(None, f"it is the input {node} of the model"),))
        if node.op == "output":
            return self._unknown(node, "it is an output of the model")
        if node.op == "call_module":
            return self._module_value(node)
        if node.op not in ("call_function", "call_method"):
            return self._unknown(node)
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        first = node.args[0] if node.args else None
        tensor = self._values[first] if isinstance(first, fx.Node) else None
        others = [n for n in node.all_input_nodes if n is not first]
        if name == "cat":
            return self._concatenated(node)
        if name in _BINARY_NAMES:
            return self._combined(node)
        if tensor is None:
            return self._unknown(node)
        if name in ("size", "getattr", "dim") and self._reads_sizes(node, tensor):
            return _NUMBER
        if name == "getitem" and not tensor.spaces:
            return _NUMBER
        if not others:
            if activation_of(node, self.modules) or name in _ELEMENTWISE_NAMES:
                return tensor
            if name == "interpolate" or tensor.rank == 2 + _SPATIAL_NAMES.get(str(name), 9):
                return self._unknown(node) if tensor.last else tensor
            if name == "flatten" and _argument(node, 1, "start_dim", 0) == 1:
                if _argument(node, 2, "end_dim", -1) == -1 and not tensor.last:
                    return Value(tensor.spaces, last=True, flat=True, rank=2)
            if name == "mean" and (axes := _argument(node, 1, "dim", None)) is not None:
                return self._averaged(node, tensor, axes)
        if name in ("view", "reshape") and self._flattens(node) and not tensor.last:
            return Value(tensor.spaces, last=True, flat=True, rank=2)
        return self._unknown(node)

    def _module_value(self, node: fx.Node) -> Value:
        name = str(node.target)
        module = self.modules[name]
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or len(node.args) + len(node.kwargs) > 1:
            return self._unknown(node)
        value = self._values[first]
        if type(module) not in LAYERS and (hooks := hooks_of(module)):
            return self._unknown(node, f"{_describe(node, self.modules)} has {hooks}")
        if type(module) in LAYERS:
            return self._layer_value(node, name, module, value)
        if type(module) in NORM:
            if value.last and value.rank != 2:
                what = _describe(node, self.modules)
                return self._unknown(
                    node,
                    f"{what} may get more than [N, features]; nn.Flatten at the start of the model "
                    "would tell",
                )
            if name in self.fixed or value.repeat(channels_of(module)) is None:
                return self._unknown(node)
            self.carriers[name] = value
            return value
        if activation_of(node, self.modules) or type(module) in _ELEMENTWISE:
            return value
        if type(module) is nn.Upsample or value.rank == 2 + _SPATIAL.get(type(module), 9):
            return self._unknown(node) if value.last else value
        if type(module) is nn.PReLU and module.num_parameters == 1:
            return value
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            if not value.last:
                return Value(value.spaces, last=True, flat=True, rank=2)
        return self._unknown(node)

    def _layer_value(self, node: fx.Node, name: str, layer: nn.Module, value: Value) -> Value:
        linear = isinstance(layer, nn.Linear)
        outputs, inputs = sizes_of(layer)
        groups = getattr(layer, "groups", 1)
        if groups > 1:
            depthwise = groups == inputs == outputs and value.repeat(inputs) is not None
            if depthwise and name not in self.fixed and not value.last:
                self.carriers[name] = value
                return value
            reason = f"{name!r} is a convolution in {groups} groups"
            return self._unknown(node, reason)
        rank = value.rank if linear else layer.weight.dim()  # type: ignore[operator,union-attr]
        if linear != value.last and not (linear and value.spaces[0].size is None):
            value.freeze(f"{name!r} reads another axis")
        if not linear and value.rank not in (None, rank):
            value.freeze(f"{name!r} reads a value of {value.rank} axes as one without a batch axis")
        self.inputs[name] = value
        if name in self.fixed:
            value.freeze(f"{name!r} must stay as it is: {self.fixed[name]}")
            frozen = Space(outputs, f"{name!r}: {self.fixed[name]}")
            return Value((frozen,), last=linear, rank=rank)
        space = Space(outputs)
        self.outputs[name] = space
        return Value((space,), last=linear, rank=rank)

    def _combined(self, node: fx.Node) -> Value:
        """What an elementwise operation on two values returns."""
        sources = node.all_input_nodes
        operands = node.args[:2]
        known = all(isinstance(a, (fx.Node, int, float)) for a in operands)
        if len(operands) < 2 or not known or not set(node.kwargs) <= {"alpha"}:
            return self._unknown(node)
        values = [v for n in sources if (v := self._values[n]).spaces]
        if len(values) < 2:
            return values[0] if values else _NUMBER
        a, b = values
        sizes = [[s.root().size for s in v.spaces] for v in values]
        if (a.last, a.flat) != (b.last, b.flat) or sizes[0] != sizes[1] or None in sizes[0]:
            return self._unknown(node)
        # Axes meet from the last one on: at axis 1 channels meet batches when ranks differ.
        if not a.last and a.rank != b.rank:
            return self._unknown(node)
        for one, other in zip(a.spaces, b.spaces, strict=True):
            one.join(other)
        return a if a.rank == b.rank else replace(a, rank=None)

    def _concatenated(self, node: fx.Node) -> Value:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        axis = _argument(node, 1, "dim", 0)
        if not isinstance(tensors, (tuple, list)):
            return self._unknown(node)
        values = [self._values[n] for n in tensors if isinstance(n, fx.Node)]
        kinds = {(v.last, v.flat, v.rank) for v in values}
        if len(values) != len(tensors) or len(kinds) != 1 or any(v.size() is None for v in values):
            return self._unknown(node)
        last, flat, rank = kinds.pop()
        # Flattened values may have different numbers of features per channel.
        if flat or axis not in ((1 if rank == 2 else -1, -1) if last else (1,)):
            return self._unknown(node)
        return Value(tuple(s for v in values for s in v.spaces), last=last, rank=rank)

    def _averaged(self, node: fx.Node, value: Value, axes: object) -> Value:
        """Global average pooling, written as a mean."""
        given = axes if isinstance(axes, (tuple, list)) else [axes]
        ints = [a for a in given if isinstance(a, int)]
        if value.last or value.rank is None or len(ints) != len(given):
            return self._unknown(node)
        if sorted(a % value.rank for a in ints) != list(range(2, value.rank)):
            return self._unknown(node)
        if _argument(node, 2, "keepdim", False):
            return value
        return Value(value.spaces, last=True, rank=2)

    def _flattens(self, node: fx.Node) -> bool:
        """Whether a view is [batch, -1]."""
        shape = node.args[1:]
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        if len(shape) != 2 or shape[1] != -1 or not isinstance(shape[0], fx.Node):
            return False
        return shape[0].target in ("size", operator.getitem) and shape[0].args[1:] == (0,)

    def _reads_sizes(self, node: fx.Node, value: Value) -> bool:
        """Whether a node reads other sizes than that of the channels."""
        fixed = (0,) if value.last else (0, 2, 3, 4)  # negative ones may be the channels
        if node.target == "size" and len(node.args) == 2:
            return node.args[1] in fixed
        if node.target == "size" or (node.target is getattr and node.args[1] == "shape"):
            return all(u.target is operator.getitem and u.args[1] in fixed for u in node.users)
        return node.target == "dim"


def _argument(node: fx.Node, position: int, name: str, default: object) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def _describe(node: fx.Node, modules: Mapping[str, nn.Module]) -> str:
    if node.op == "call_module":
        return f"{node.target}, a {type(modules[str(node.target)]).__name__},"
    return f"{node.name}"


def sizes_of(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs)."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels  # type: ignore[return-value]


def channels_of(module: nn.Module) -> int:
    """Channels that a batch norm or a depthwise convolution takes."""
    return module.num_features if isinstance(module, NORM) else sizes_of(module)[1]
