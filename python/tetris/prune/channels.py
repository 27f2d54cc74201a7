"""Making a dense network smaller: input channels that layers ignore, and who computes them.

A layer whose weight is zero for an input channel does not read that channel. Its columns go; and
if no other consumer reads the channel either, the rows of the layer that produces it go as well,
with everything in between (batch norm, depthwise convolutions). Residual adds tie channels
together: they go from all addends or from none.

The graph of the model says who produces and who consumes what. Where it does not tell (an operation
that is not known to treat channels one by one, an input or output of the model), all channels stay,
and a layer that reads fewer gathers them first.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..checks import check_model, check_tensor
from ..folding import TRANSPOSED
from ..graph import NORM, NOTHING, activation_of, trace
from ..modules import copy_or_same, replace_modules

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)
_LAYERS = (nn.Linear, *_CONVOLUTIONS)
_POOLS = tuple(
    getattr(nn, f"{kind}{d}d")
    for kind in ("MaxPool", "AvgPool", "AdaptiveAvgPool", "AdaptiveMaxPool")
    for d in (1, 2, 3)
)
_ELEMENTWISE = (nn.ReLU6, nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.LeakyReLU, nn.ELU)
_ELEMENTWISE += (nn.Sigmoid, nn.Tanh, nn.Softplus, nn.Mish, *NOTHING)
_SPATIAL = (*_POOLS, nn.Upsample, nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d)
_SPATIAL_FUNCTIONS = ("max_pool", "avg_pool", "adaptive_avg_pool", "adaptive_max_pool")
_SPATIAL_NAMES = {f"{f}{d}d" for f in _SPATIAL_FUNCTIONS for d in (1, 2, 3)} | {"interpolate"}
_ELEMENTWISE_NAMES = {
    *("relu", "relu_", "relu6", "hardtanh", "hardswish", "hardsigmoid", "leaky_relu", "elu"),
    *("sigmoid", "tanh", "softplus", "mish", "dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("clone", "contiguous", "detach", "clamp", "clamp_", "abs", "sqrt", "exp"),
}
_BINARY_NAMES = {"add", "add_", "sub", "sub_", "mul", "mul_", "truediv", "div", "div_"}
_BINARY_NAMES |= {"iadd", "isub", "imul", "itruediv"}


@dataclass(frozen=True)
class NarrowedLayer:
    """What happened to one layer.

    Attributes:
        name: Layer in the model.
        inputs: (kept, before) input channels, or features of a linear layer.
        outputs: (kept, before) output channels.
        gathers: Why it selects its inputs from more channels than it reads, or None.
    """

    name: str
    inputs: tuple[int, int]
    outputs: tuple[int, int]
    gathers: str | None = None

    def __str__(self) -> str:
        text = f"{self.name}: inputs {self.inputs[0]} of {self.inputs[1]}, "
        text += f"outputs {self.outputs[0]} of {self.outputs[1]}"
        return text if self.gathers is None else f"{text}; gathers its inputs: {self.gathers}"


@dataclass(frozen=True)
class ChannelReport:
    """Which layers became smaller: ``print`` it, or read the fields.

    Attributes:
        layers: Layers with fewer inputs or outputs than before, in the order of the graph.
    """

    layers: tuple[NarrowedLayer, ...]

    def __str__(self) -> str:
        return "\n".join(map(str, self.layers)) or "no layer became smaller"


class SelectChannels(nn.Module):
    """Gathers some channels of its input.

    Args:
        index: int64[kept], the channels.
        dim: Axis of the channels.
    """

    index: Tensor

    def __init__(self, index: Tensor, dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.register_buffer("index", index.to(torch.int64))

    def forward(self, x: Tensor) -> Tensor:
        """Return the channels in the order of ``index``."""
        return x.index_select(self.dim, self.index)

    def extra_repr(self) -> str:
        """Describe it in one line."""
        return f"channels={len(self.index)}, dim={self.dim}"


@torch.no_grad()
def shrink_channels(
    model: nn.Module, keep: Mapping[str, Tensor], *, inplace: bool = False
) -> tuple[nn.Module, ChannelReport]:
    """Remove input channels from layers, and the outputs that no layer reads afterwards.

    The result computes what the model computes when the weights of the removed input channels are
    zero. It is an ordinary dense model of the same class, with smaller layers. A layer that has to
    leave channels to other consumers becomes ``nn.Sequential(SelectChannels, layer)``.

    Args:
        model: Any model that ``torch.fx`` can trace. Not changed, unless ``inplace``.
        keep: Name of a linear layer or convolution -> bool[in], the input channels (features) that
            stay. Other layers keep all of theirs.
        inplace: Change the model itself instead of a deep copy. Parameters that become smaller are
            new ones: make the optimizer afterwards.

    Returns:
        The model and a :class:`ChannelReport`.

    Raises:
        ValueError: the model cannot be traced; a layer of ``keep`` is unknown, grouped, called more
            or less than once, or shares its weight; a mask has another length or keeps nothing.

    Example:
        >>> keep = {"conv2": conv2.weight.abs().sum((0, 2, 3)) > 0}
        >>> small, report = tetris.prune.shrink_channels(model, keep)
        >>> print(report)

    Which channels may go is the question of Li et al., "Pruning Filters for Efficient ConvNets",
    ICLR 2017, asked from the consumers' side: there a filter goes with all columns that read it.
    """
    where = "tetris.prune.shrink_channels"
    check_model(where, model)
    target = copy_or_same(model, inplace)
    try:
        graph = trace(target)
    except Exception as error:  # a model's own code runs here: anything can come out of it
        text = " ".join(str(error).split())
        raise ValueError(
            f"{where}: {type(model).__name__} cannot be traced ({type(error).__name__}: {text}), "
            "so nothing tells which layer reads which channels; trace a part of it, or keep the "
            "channels as they are and use blocks"
        ) from error
    return _Shrinker(where, target, graph, keep).run()


# -- channels in the graph ----------------------------------------------------------------------


class _Space:
    """Channels that live or die together wherever they appear; joined with others by adds.

    Attributes:
        size: Number of channels, None if unknown.
        frozen: Why all of them stay, or None.
        readers: Layers that consume them.
        needed: bool[size], what these read together.
    """

    def __init__(self, size: int | None, frozen: str | None = None) -> None:
        self.parent: _Space | None = None
        self.size = size
        self.frozen = frozen
        self.readers: list[str] = []
        self.needed: Tensor | None = None if size is None else torch.zeros(size, dtype=torch.bool)

    def root(self) -> _Space:
        """The space that stands for all it was joined with."""
        return self if self.parent is None else self.parent.root()

    def freeze(self, reason: str) -> None:
        """Keep all channels."""
        root = self.root()
        root.frozen = root.frozen or reason

    def join(self, other: _Space) -> None:
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
class _Value:
    """Channels of a value: spaces behind each other, each channel ``repeat`` features wide.

    ``last`` says that they are the last axis and not axis 1; ``flat`` that axes were flattened, so
    that ``repeat`` is known to the consumer only.
    """

    spaces: tuple[_Space, ...]
    last: bool = False
    flat: bool = False

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


_NUMBER = _Value(())  # a size: the same for every channel


@dataclass
class _Flow:
    """Who produces, carries and consumes which channels."""

    outputs: dict[str, _Space] = field(default_factory=dict)
    inputs: dict[str, _Value] = field(default_factory=dict)
    carriers: dict[str, _Value] = field(default_factory=dict)


class _Shrinker:
    def __init__(
        self, where: str, model: nn.Module, graph: fx.Graph, keep: Mapping[str, Tensor]
    ) -> None:
        self.where = where
        self.model = model
        self.graph = graph
        self.modules = dict(model.named_modules(remove_duplicate=False))
        calls = Counter(
            id(self.modules[str(n.target)]) for n in graph.nodes if n.op == "call_module"
        )
        users = Counter(id(p) for m in model.modules() for p in m._parameters.values())
        read = {str(n.target).rpartition(".")[0] for n in graph.nodes if n.op == "get_attr"}
        self.fixed: dict[str, str] = {}  # name -> why its weight must stay as it is
        for name, module in self.modules.items():
            if calls[id(module)] > 1:
                self.fixed[name] = f"it is called {calls[id(module)]} times"
            elif any(users[id(p)] > 1 for p in module._parameters.values() if p is not None):
                self.fixed[name] = "it shares a parameter with another module"
            elif name in read:
                self.fixed[name] = "its parameters are read elsewhere in forward"
        self.values: dict[fx.Node, _Value] = {}
        self.flow = _Flow()
        self.keep = self._checked(keep, calls)

    def _checked(self, keep: Mapping[str, Tensor], calls: Counter[int]) -> dict[str, Tensor]:
        result = {}
        for name, mask in keep.items():
            layer = self.modules.get(name)
            if type(layer) not in _LAYERS:
                known = [n for n, m in self.modules.items() if type(m) in _LAYERS]
                what = "no module" if layer is None else f"a {type(layer).__name__}"
                raise ValueError(
                    f"{self.where}: {name!r} is {what}; keep names linear layers and convolutions: "
                    f"{', '.join(map(repr, known)) or 'the model has none'}"
                )
            reason = self.fixed.get(name)
            if calls[id(layer)] == 0:
                reason = "the model's forward does not call it"
            elif getattr(layer, "groups", 1) > 1:
                reason = (
                    f"a convolution in {layer.groups} groups cannot lose single input channels; "  # type: ignore[union-attr]
                    "use blocks"
                )
            if reason:
                raise ValueError(f"{self.where}: layer {name!r} cannot be narrowed: {reason}")
            mask = check_tensor(self.where, f"keep[{name!r}]", mask).cpu()
            inputs = _sizes(layer)[1]  # type: ignore[arg-type]
            if mask.dtype != torch.bool or tuple(mask.shape) != (inputs,) or not bool(mask.any()):
                raise ValueError(
                    f"{self.where}: keep[{name!r}] must be bool[{inputs}] with at least one True "
                    f"(got {mask.dtype}{list(mask.shape)}, {int(mask.sum())} of them not 0)"
                )
            result[name] = mask
        return result

    def run(self) -> tuple[nn.Module, ChannelReport]:
        for node in self.graph.nodes:
            self.values[node] = self._value(node)
        for name, value in self.flow.inputs.items():
            self._need(name, value)
        for space in {id(s.root()): s.root() for s in self.flow.outputs.values()}.values():
            if space.needed is not None and not bool(space.needed.any()):
                space.freeze("no layer reads it")  # an output that is not used at all
        plans = {name: self._plan(name) for name in self.flow.inputs}
        report, new = [], {}
        for name, (rows, columns, index, why) in plans.items():
            layer = self.modules[name]
            before = _sizes(layer)
            _narrow(layer, rows, columns)
            after = _sizes(layer)
            if index is not None:
                dim = -1 if isinstance(layer, nn.Linear) else 1
                gather = SelectChannels(index.to(layer.weight.device), dim)  # type: ignore[union-attr]
                new[name] = nn.Sequential(gather, layer).train(layer.training)
            if after != before:
                sizes = ((after[1], before[1]), (after[0], before[0]))
                report.append(NarrowedLayer(name, *sizes, why))
        for name, value in self.flow.carriers.items():
            module = self.modules[name]
            kept = value.kept(_channels(module))
            if kept is not None:
                _narrow_carrier(module, kept)
        return replace_modules(self.model, new), ChannelReport(tuple(report))

    # -- who reads what -------------------------------------------------------------------------

    def _need(self, name: str, value: _Value) -> None:
        """Note which channels a layer reads."""
        inputs = _sizes(self.modules[name])[1]
        mask = self.keep.get(name, torch.ones(inputs, dtype=torch.bool))
        repeat = value.repeat(inputs)
        if repeat is None:
            value.freeze(f"{name!r} has {inputs} inputs, which the graph does not explain")
            return
        sizes = [s.root().size or 0 for s in value.spaces]
        for space, own in zip(value.spaces, mask.split([s * repeat for s in sizes]), strict=True):
            root = space.root()
            assert root.needed is not None
            root.needed |= own.view(-1, repeat).any(1)
            root.readers.append(name)

    def _plan(self, name: str) -> tuple[Tensor | None, Tensor | None, Tensor | None, str | None]:
        """Rows and columns that stay, what to gather of the input, and why."""
        layer = self.modules[name]
        out, inputs = _sizes(layer)
        rows = self.flow.outputs[name].kept() if name in self.flow.outputs else None
        if name in self.fixed or getattr(layer, "groups", 1) > 1:
            return None, None, None, None
        value = self.flow.inputs[name]
        given = value.kept(inputs)
        mask = self.keep.get(name)
        if mask is None:
            return rows, given, None, None
        here = mask if given is None else mask[given]  # of the channels that still arrive
        if bool(here.all()):
            return rows, mask, None, None
        return rows, mask, here.nonzero()[:, 0], self._why(name, value, mask)

    def _why(self, name: str, value: _Value, mask: Tensor) -> str:
        for space in value.spaces:
            root = space.root()
            if root.frozen:
                return root.frozen
            if others := sorted({r for r in root.readers if r != name}):
                return f"{', '.join(map(repr, others))} also read from it, other channels"
        return "it reads only some of the flattened features of a channel"

    # -- what the graph says --------------------------------------------------------------------

    def _unknown(self, node: fx.Node, reason: str | None = None) -> _Value:
        """A value of which nothing is known; what it is made of keeps all its channels."""
        reason = reason or f"{_describe(node, self.modules)} may read all channels"
        for source in node.all_input_nodes:
            self.values[source].freeze(reason)
        return _Value((_Space(None, reason),))

    def _value(self, node: fx.Node) -> _Value:
        if node.op == "placeholder":
            return _Value((_Space(None, f"it is the input {node} of the model"),))
        if node.op == "output":
            return self._unknown(node, "it is an output of the model")
        if node.op == "call_module":
            return self._module_value(node)
        if node.op not in ("call_function", "call_method"):
            return self._unknown(node)
        name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
        first = node.args[0] if node.args else None
        tensor = self.values[first] if isinstance(first, fx.Node) else None
        others = [n for n in node.all_input_nodes if n is not first]
        if name == "cat":
            return self._concatenated(node)
        if name in _BINARY_NAMES:
            return self._combined(node)
        if tensor is None:
            return self._unknown(node)
        if name in ("size", "getattr", "dim") and self._reads_sizes(node):
            return _NUMBER
        if name == "getitem" and not tensor.spaces:
            return _NUMBER
        if not others:
            if activation_of(node, self.modules) or name in _ELEMENTWISE_NAMES:
                return tensor
            if name in _SPATIAL_NAMES and not tensor.last and not tensor.flat:
                return tensor
            if name == "flatten" and _argument(node, 1, "start_dim", 0) == 1:
                if _argument(node, 2, "end_dim", -1) == -1 and not tensor.last:
                    return _Value(tensor.spaces, last=True, flat=True)
            if name == "mean" and (axes := _argument(node, 1, "dim", None)) is not None:
                return self._averaged(node, tensor, axes)
        if name in ("view", "reshape") and self._flattens(node) and not tensor.last:
            return _Value(tensor.spaces, last=True, flat=True)
        return self._unknown(node)

    def _module_value(self, node: fx.Node) -> _Value:
        name = str(node.target)
        module = self.modules[name]
        first = node.args[0] if node.args else None
        if not isinstance(first, fx.Node) or len(node.args) + len(node.kwargs) > 1:
            return self._unknown(node)
        value = self.values[first]
        if type(module) in _LAYERS:
            return self._layer_value(node, name, module, value)
        if type(module) in NORM:
            if name in self.fixed or value.repeat(_channels(module)) is None:
                return self._unknown(node)
            self.flow.carriers[name] = value
            return value
        if activation_of(node, self.modules) or type(module) in _ELEMENTWISE:
            return value
        if type(module) in _SPATIAL and not value.last:
            return value
        if type(module) is nn.PReLU and module.num_parameters == 1:
            return value
        if type(module) is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
            if not value.last:
                return _Value(value.spaces, last=True, flat=True)
        return self._unknown(node)

    def _layer_value(self, node: fx.Node, name: str, layer: nn.Module, value: _Value) -> _Value:
        linear = isinstance(layer, nn.Linear)
        outputs, inputs = _sizes(layer)
        groups = getattr(layer, "groups", 1)
        if groups > 1:
            depthwise = groups == inputs == outputs and value.repeat(inputs) is not None
            if depthwise and name not in self.fixed and not value.last:
                self.flow.carriers[name] = value
                return value
            reason = f"{name!r} is a convolution in {groups} groups"
            return self._unknown(node, reason)
        if linear != value.last and not (linear and value.spaces[0].size is None):
            value.freeze(f"{name!r} reads another axis")
        self.flow.inputs[name] = value
        if name in self.fixed:
            value.freeze(f"{name!r} must stay as it is: {self.fixed[name]}")
            return _Value((_Space(outputs, f"{name!r}: {self.fixed[name]}"),), last=linear)
        space = _Space(outputs)
        self.flow.outputs[name] = space
        return _Value((space,), last=linear)

    def _combined(self, node: fx.Node) -> _Value:
        """What an elementwise operation on two values returns."""
        sources = node.all_input_nodes
        operands = node.args[:2]
        known = all(isinstance(a, (fx.Node, int, float)) for a in operands)
        if len(operands) < 2 or not known or not set(node.kwargs) <= {"alpha"}:
            return self._unknown(node)
        values = [v for n in sources if (v := self.values[n]).spaces]
        if len(values) < 2:
            return values[0] if values else _NUMBER
        a, b = values
        sizes = [[s.root().size for s in v.spaces] for v in values]
        if (a.last, a.flat) != (b.last, b.flat) or sizes[0] != sizes[1] or None in sizes[0]:
            return self._unknown(node)
        for one, other in zip(a.spaces, b.spaces, strict=True):
            one.join(other)
        return a

    def _concatenated(self, node: fx.Node) -> _Value:
        tensors = node.args[0] if node.args else node.kwargs.get("tensors")
        axis = _argument(node, 1, "dim", 0)
        if not isinstance(tensors, (tuple, list)):
            return self._unknown(node)
        values = [self.values[n] for n in tensors if isinstance(n, fx.Node)]
        kinds = {(v.last, v.flat) for v in values}
        if len(values) != len(tensors) or len(kinds) != 1 or any(v.size() is None for v in values):
            return self._unknown(node)
        last, flat = kinds.pop()
        # Flattened values may have different numbers of features per channel.
        if flat or axis not in ((1, -1) if last else (1,)):
            return self._unknown(node)
        return _Value(tuple(s for v in values for s in v.spaces), last=last)

    def _averaged(self, node: fx.Node, value: _Value, axes: object) -> _Value:
        """Global average pooling, written as a mean."""
        given = axes if isinstance(axes, (tuple, list)) else [axes]
        ints = [a for a in given if isinstance(a, int)]
        spatial = sorted(ints) in ([2], [2, 3], [-2, -1], [2, 3, 4], [-3, -2, -1])
        if not spatial or len(ints) != len(given) or value.last or value.flat:
            return self._unknown(node)
        return _Value(value.spaces, last=not node.kwargs.get("keepdim", False))

    def _flattens(self, node: fx.Node) -> bool:
        """Whether a view is [batch, -1]."""
        shape = node.args[1:]
        if len(shape) == 1 and isinstance(shape[0], (tuple, list)):
            shape = tuple(shape[0])
        if len(shape) != 2 or shape[1] != -1 or not isinstance(shape[0], fx.Node):
            return False
        return shape[0].target in ("size", operator.getitem)

    def _reads_sizes(self, node: fx.Node) -> bool:
        """Whether a node reads other sizes than that of the channels."""
        fixed = (0, 2, 3, 4)  # negative ones may be the channels
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


# -- the modules --------------------------------------------------------------------------------


def _sizes(layer: nn.Module) -> tuple[int, int]:
    """(outputs, inputs)."""
    if isinstance(layer, nn.Linear):
        return layer.out_features, layer.in_features
    return layer.out_channels, layer.in_channels  # type: ignore[return-value]


def _channels(module: nn.Module) -> int:
    """Channels that a batch norm or a depthwise convolution takes."""
    return module.num_features if isinstance(module, NORM) else _sizes(module)[1]


def _narrow(layer: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Leave some outputs and inputs of a linear layer or ungrouped convolution."""
    axis = 1 if isinstance(layer, TRANSPOSED) else 0
    if rows is not None and not bool(rows.all()):
        _take(layer, {"weight": axis, "bias": 0}, rows)
    if columns is not None and not bool(columns.all()):
        _take(layer, {"weight": 1 - axis}, columns)
    weight: Any = layer.weight
    names = ("features", "features") if isinstance(layer, nn.Linear) else ("channels", "channels")
    setattr(layer, f"out_{names[0]}", weight.shape[axis])
    setattr(layer, f"in_{names[1]}", weight.shape[1 - axis])


def _narrow_carrier(module: nn.Module, kept: Tensor) -> None:
    """Leave some channels of a batch norm or a depthwise convolution."""
    count = int(kept.sum())
    if isinstance(module, NORM):
        _take(module, dict.fromkeys(("weight", "bias", "running_mean", "running_var"), 0), kept)
        module.num_features = count
        return
    _take(module, {"weight": 0, "bias": 0}, kept)
    for name in ("in_channels", "out_channels", "groups"):
        setattr(module, name, count)


def _take(module: nn.Module, axes: Mapping[str, int], kept: Tensor) -> None:
    """Select from parameters and buffers along an axis of each."""
    for name, axis in axes.items():
        old = getattr(module, name, None)
        if old is None:
            continue
        new = old.detach().index_select(axis, kept.nonzero()[:, 0].to(old.device))
        if isinstance(old, nn.Parameter):
            new = nn.Parameter(new, requires_grad=old.requires_grad)
        setattr(module, name, new)
