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

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ...checks import check_model, check_tensor
from ...folding import TRANSPOSED
from ...graph import NORM, trace, trace_for
from ...modules import copy_or_same, replace_modules
from .flow import LAYERS, Flow, Value, channels_of, sizes_of


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
    leave channels to other consumers becomes ``nn.Sequential(SelectChannels, layer)``. Inputs of
    convolutions are taken to have a batch axis.

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
            or less than once, has hooks, or shares its weight; a mask has another length or keeps
            nothing; forward computes with sizes of layers that become smaller.

    Example:
        >>> keep = {"conv2": conv2.weight.abs().sum((0, 2, 3)) > 0}
        >>> small, report = tetris.prune.shrink_channels(model, keep)
        >>> print(report)

    Which channels may go is the question of Li et al., "Pruning Filters for Efficient ConvNets",
    ICLR 2017, asked from the consumers' side: there a filter goes with all columns that read it.
    """
    where = "tetris.prune.shrink_channels"
    check_model(where, model)
    if inplace:
        shrink_channels(model, keep)  # a failure leaves the model as it was
    target = copy_or_same(where, model, inplace)
    graph = trace_for(
        where,
        target,
        "so nothing tells which layer reads which channels; trace a part of it, or keep the "
        "channels as they are and use blocks",
    )
    return _Shrinker(where, target, graph, keep).run()


class _Shrinker:
    def __init__(
        self, where: str, model: nn.Module, graph: fx.Graph, keep: Mapping[str, Tensor]
    ) -> None:
        self.where = where
        self.model = model
        self.graph = graph
        self.flow = Flow(model, graph)
        self.modules = self.flow.modules
        self.keep = self._checked(keep)

    def _checked(self, keep: Mapping[str, Tensor]) -> dict[str, Tensor]:
        result = {}
        for name, mask in keep.items():
            layer = self.modules.get(name)
            if type(layer) not in LAYERS:
                known = [n for n, m in self.modules.items() if type(m) in LAYERS]
                what = "no module" if layer is None else f"a {type(layer).__name__}"
                raise ValueError(
                    f"{self.where}: {name!r} is {what}; keep names linear layers and convolutions: "
                    f"{', '.join(map(repr, known)) or 'the model has none'}"
                )
            reason = self.flow.fixed.get(name)
            if self.flow.calls[id(layer)] == 0:
                reason = "the model's forward does not call it"
            elif getattr(layer, "groups", 1) > 1:
                reason = (
                    f"a convolution in {layer.groups} groups cannot lose single input channels; "  # type: ignore[union-attr]
                    "use blocks"
                )
            if reason:
                raise ValueError(f"{self.where}: layer {name!r} cannot be narrowed: {reason}")
            mask = check_tensor(self.where, f"keep[{name!r}]", mask).cpu()
            inputs = sizes_of(layer)[1]  # type: ignore[arg-type]
            if mask.dtype != torch.bool or tuple(mask.shape) != (inputs,) or not bool(mask.any()):
                raise ValueError(
                    f"{self.where}: keep[{name!r}] must be bool[{inputs}] with at least one True "
                    f"(got {mask.dtype}{list(mask.shape)}, {int(mask.sum())} of them not 0)"
                )
            called = self.flow.names[id(layer)]  # keep may know it under another name
            if not torch.equal(result.setdefault(called, mask), mask):
                raise ValueError(
                    f"{self.where}: keep names one layer twice, {name!r} and before under another "
                    "name, with masks that differ; leave one out"
                )
        return result

    def run(self) -> tuple[nn.Module, ChannelReport]:
        for name, value in self.flow.inputs.items():
            self._need(name, value)
        for space in {id(s.root()): s.root() for s in self.flow.outputs.values()}.values():
            if space.needed is not None and not bool(space.needed.any()):
                space.freeze("no layer reads it")  # an output that is not used at all
        plans = {name: self._plan(name) for name in self.flow.inputs}
        report, new = [], {}
        for name, (rows, columns, index, why) in plans.items():
            layer = self.modules[name]
            before = sizes_of(layer)
            _narrow(layer, rows, columns)
            after = sizes_of(layer)
            if index is not None:
                dim = -1 if isinstance(layer, nn.Linear) else 1
                gather = SelectChannels(index.to(layer.weight.device), dim)  # type: ignore[union-attr]
                new[name] = nn.Sequential(gather, layer).train(layer.training)
            if after != before:
                sizes = ((after[1], before[1]), (after[0], before[0]))
                report.append(NarrowedLayer(name, *sizes, why))
        for name, value in self.flow.carriers.items():
            module = self.modules[name]
            kept = value.kept(channels_of(module))
            if kept is not None:
                _narrow_carrier(module, kept)
        model = replace_modules(self.model, new)
        self._compare(model, new)
        return model, ChannelReport(tuple(report))

    def _compare(self, model: nn.Module, new: Mapping[str, nn.Module]) -> None:
        """Raise if forward computes with numbers that changed, such as ``conv.out_channels``."""
        attributes = set(vars(model))
        try:
            graph = trace(model, [*new.values()])
        except Exception as error:  # the model's own code
            text = " ".join(str(error).split())
            raise ValueError(
                f"{self.where}: forward reads something of a layer that the smaller model has not, "
                f"and fails ({type(error).__name__}: {text}); compute it in __init__ instead, or "
                f"leave the layer out of keep (layers that gather their inputs: "
                f"{', '.join(map(repr, new)) or 'none'})"
            ) from error
        nodes = zip(_signatures(self.graph, model), _signatures(graph, model), strict=False)
        changed = next((a[0] for a, b in nodes if a[1:] != b[1:]), None)
        if changed is None and len(graph.nodes) != len(self.graph.nodes):
            changed = "the number of operations"
        for name in set(vars(model)) - attributes:  # constant tensors of the second graph
            delattr(model, name)
        if changed is not None:
            raise ValueError(
                f"{self.where}: forward computes with sizes of layers that become smaller, which "
                f"changes {changed}; compute them in __init__ instead, or leave the layers out of "
                "keep"
            )

    # -- who reads what -------------------------------------------------------------------------

    def _need(self, name: str, value: Value) -> None:
        """Note which channels a layer reads."""
        inputs = sizes_of(self.modules[name])[1]
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
        out, inputs = sizes_of(layer)
        rows = self.flow.outputs[name].kept() if name in self.flow.outputs else None
        if name in self.flow.fixed or getattr(layer, "groups", 1) > 1:
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

    def _why(self, name: str, value: Value, mask: Tensor) -> str:
        for space in value.spaces:
            root = space.root()
            if root.frozen:
                return root.frozen
            if others := sorted({r for r in root.readers if r != name}):
                return f"{', '.join(map(repr, others))} also read from it, other channels"
        return "it reads only some of the flattened features of a channel"


def _signatures(graph: fx.Graph, model: nn.Module) -> list[tuple[str, object, str]]:
    """Name, target, and arguments of each node; of constant tensors the values."""
    order = {node: f"%{i}" for i, node in enumerate(graph.nodes)}
    result = []
    for node in graph.nodes:
        target = node.target
        if node.op == "get_attr" and str(target).startswith("_tensor_constant"):
            target = str(getattr(model, str(target)).tolist())
        # As text, in which NaN equals NaN.
        arguments = repr(fx.map_arg((node.args, node.kwargs), order.__getitem__))
        result.append((node.name, target, arguments))
    return result


def _narrow(layer: nn.Module, rows: Tensor | None, columns: Tensor | None) -> None:
    """Leave some outputs and inputs of a linear layer or ungrouped convolution."""
    axis = 1 if isinstance(layer, TRANSPOSED) else 0
    if rows is not None and not bool(rows.all()):
        _take(layer, {"weight": axis, "bias": 0}, rows)
    if columns is not None and not bool(columns.all()):
        _take(layer, {"weight": 1 - axis}, columns)
    weight: Any = layer.weight
    unit = "features" if isinstance(layer, nn.Linear) else "channels"
    setattr(layer, f"out_{unit}", weight.shape[axis])
    setattr(layer, f"in_{unit}", weight.shape[1 - axis])


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
