"""fuse: fold batch norm, activations and residual adds into the layers before them."""

from __future__ import annotations

import copy
import inspect
import operator
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, cast, get_args, overload

import torch
from torch import fx, nn
from torch.nn import functional as F
from torch.nn.parameter import is_lazy
from torch.nn.utils import parametrize

from .checks import check_python, listed
from .folding import DENSE, fold_batch_norm, weight_name
from .graph import (
    ANY_NORM,
    NORM,
    NOTHING,
    TAKES_RESIDUAL,
    Memory,
    Tracer,
    activation_of,
    addends_of,
    adds,
    does_nothing,
    extras_of,
    input_of,
    other_activation,
    shapes,
    trace,
    writes_to,
)
from .modules import copy_or_same, hooks_of, replace_modules
from .nn import SparseLinear
from .nn.kinds import SPARSE_TYPES as SPARSE
from .ops import Activation
from .warn import warn

_WHERE = "tetris.fuse"
_REQUIRED = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.empty)
_AXES = ("[N, features]", "[N, channels, L]", "[N, channels, H, W]", "[N, channels, D, H, W]")
_FINALIZE = "masked by a pruner: call its finalize() first"


@dataclass
class FusedLayer:
    """What one layer computes in addition now.

    Attributes:
        name: Layer in the model.
        batch_norm: Batch norms folded into it, by name.
        residual: Graph value that it adds, or None.
        activation: Function fused behind it.
    """

    name: str
    batch_norm: list[str] = field(default_factory=list)
    residual: str | None = None
    activation: Activation = "none"

    def __str__(self) -> str:
        parts = [f"batch norm {name}" for name in self.batch_norm]
        if self.residual is not None:
            parts.append(f"residual {self.residual}")
        if self.activation != "none":
            parts.append(self.activation)
        return f"{self.name}: {', '.join(parts)}"


@dataclass
class FuseReport:
    """What was fused and what was not: ``print`` it, or read the fields.

    Attributes:
        fused: Layers that compute more than before, in the order of the graph.
        kept: Batch norms, and activations and adds behind sparse layers, that are left, with the
            reason. An add behind a linear layer counts if the layer's output goes nowhere else.
        untraced: Why the model as a whole could not be traced; only ``nn.Sequential`` chains and
            modules of one argument were fused then. None otherwise.

    Example:
        >>> sparse = tetris.sparsify(model.eval(), sparsity=0.5, block=(8, 1), exclude="fc")
        >>> fast, report = tetris.fuse(sparse, return_report=True)
        >>> len(report.fused), report.kept
        (1, {})
    """

    fused: list[FusedLayer] = field(default_factory=list)
    kept: dict[str, str] = field(default_factory=dict)
    untraced: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain strings, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        lines = [f"fused into {layer}" for layer in self.fused] or ["nothing was fused"]
        lines += [f"left: {name}: {reason}" for name, reason in self.kept.items()]
        if self.untraced is not None:
            lines.append(
                f"only nn.Sequential chains and modules of one argument were fused: {self.untraced}"
            )
        return "\n".join(lines)


@overload
def fuse(
    model: nn.Module, *, inplace: bool = ..., return_report: Literal[False] = ...
) -> nn.Module: ...


@overload
def fuse(
    model: nn.Module, *, inplace: bool = ..., return_report: Literal[True]
) -> tuple[nn.Module, FuseReport]: ...


def fuse(
    model: nn.Module, *, inplace: bool = False, return_report: bool = False
) -> nn.Module | tuple[nn.Module, FuseReport]:
    """Make a trained model faster at inference, computing the same.

    Batch norm, ``nn.SyncBatchNorm`` included, becomes part of the weight and bias of the linear
    layer or convolution before it, dense or sparse. Sparse layers also take the activation that
    follows (ReLU, GELU, SiLU), and sparse convolutions, transposed ones too, the residual that is
    added in between: ``relu(bn(conv(x)) + y)`` is one call.

    The model is traced with ``torch.fx``. A step stays as it is wherever the graph does not show
    that fusing it is safe: a layer is used twice, its output is used elsewhere, a residual may
    be broadcast, hooks would see other values, batch norm has no running statistics; the report
    says which and why. Of a model that cannot be traced (control flow that depends on data, hooks
    on containers; most models of transformers) the largest parts that can are fused: those whose
    ``forward`` takes one argument, such as ``nn.Sequential`` and the MLP of a transformer, on the
    premise that the model calls them as a whole.

    Arguments of forward that are None or a bool by default choose between branches, of which the
    result has that of the default: it raises AssertionError when called with another value.

    Args:
        model: A model in eval mode. Not changed, unless ``inplace``.
        inplace: Fold into the layers of the model itself instead of a deep copy; it computes the
            same as before, with ``nn.Identity`` in place of batch norm, and the result shares
            its parameters.
        return_report: Return ``(model, report)``; ``print(report)`` shows what was fused into which
            layer, and what was left and why.

    Returns:
        A ``torch.fx.GraphModule`` with the names of the model's layers and the code of its forward,
        without other methods; for a model that could not be traced, the model with these parts
        replaced. With ``return_report``, the result and a :class:`tetris.FuseReport`.

    Raises:
        ValueError: the model is in training mode, has layers whose size is not known yet, or could
            neither be traced nor has a part to fuse; the message says what could not be traced.
        TypeError: not a module.

    Example:
        >>> sparse = tetris.sparsify(model, sparsity=0.9, exclude="fc")
        >>> fast, report = tetris.fuse(sparse.eval(), return_report=True)
        >>> print(report)

    Folding: Jacob et al., "Quantization and Training of Neural Networks for Efficient
    Integer-Arithmetic-Only Inference", CVPR 2018, section 3.2.
    """
    check_python(_WHERE, model)
    training = [name or "(root)" for name, module in model.named_modules() if module.training]
    if training:
        raise ValueError(
            f"{_WHERE}: the model must be in eval mode, where batch norm only scales and shifts "
            f"(got {len(training)} modules in training mode, first {training[0]!r}); call "
            "model.eval() first"
        )
    for name, module in model.named_modules():
        tensors = (*module.parameters(recurse=False), *module.buffers(recurse=False))
        if any(map(is_lazy, tensors)):
            raise ValueError(
                f"{_WHERE}: the size of {name or 'the model'}, a {type(module).__name__}, is not "
                "known yet: call the model once"
            )
    target = copy_or_same(_WHERE, model, inplace)
    report = FuseReport()
    if not Tracer().is_leaf_module(target, ""):
        try:
            graph = trace(target)
        except Exception as error:  # a model's own code runs here: anything can come out of it
            report.untraced = f"{type(target).__name__} cannot be traced: {_one_line(error)}"
            target = _fuse_parts(target, report)
        else:
            target = _Fuser(target, graph, "", report, {}).run()
    if not report.fused:
        reasons = "; ".join(f"{name}: {reason}" for name, reason in report.kept.items())
        masked = next((name for name, module in model.named_modules() if _masked(module)), None)
        if masked is not None and _FINALIZE not in reasons:
            reasons = f"{masked or 'the model'} is {_FINALIZE}" + (reasons and f"; {reasons}")
        reasons = reasons or "no batch norm, and no activation behind a sparse layer"
        if report.untraced is not None:
            raise ValueError(
                f"{_WHERE}: {report.untraced}; and the parts that can have nothing to fuse "
                f"({reasons})"
            )
        warn(f"{_WHERE}: nothing was fused in {type(model).__name__} ({reasons})")
    return (target, report) if return_report else target


def _masked(module: nn.Module) -> bool:
    """Whether a pruner still holds a layer, with a parametrization or a class of its own."""
    if parametrize.is_parametrized(module):
        lists = cast(Any, module.parametrizations).values()
        return any(type(p).__module__.startswith("tetris.") for each in lists for p in each)
    return type(module).__module__.startswith("tetris.prune.vrpge.")


def _one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _fuse_parts(model: nn.Module, report: FuseReport) -> nn.Module:
    """Fuse the parts of a model that cannot be traced as a whole."""
    names: dict[int, list[str]] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        names.setdefault(id(module), []).append(name)
    new: dict[str, nn.Module] = {}
    for name, part, graph in list(_parts(model, "")):
        inside = f"{name}."
        elsewhere = {
            id(module): next(n for n in names[id(module)] if not n.startswith(inside))
            for module in part.modules()
            if module is not part and not all(n.startswith(inside) for n in names[id(module)])
        }
        fused = len(report.fused)
        made = _Fuser(part, graph, inside, report, elsewhere).run()
        if len(report.fused) > fused:
            new[name] = made
    return replace_modules(model, new)


def _parts(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module, fx.Graph]]:
    """The largest parts of one argument that can be traced.

    What an argument with a default would be called with is not known, and a graph has one branch.
    """
    for name, child in module.named_children():
        if not Tracer().is_leaf_module(child, name) or isinstance(child, nn.Sequential):
            parameters = inspect.signature(child.forward).parameters.values()
            if [(p.kind, p.default) for p in parameters] == [_REQUIRED]:
                try:
                    yield prefix + name, child, trace(child)
                    continue
                except Exception:  # as above; the smaller parts inside are tried
                    pass
        yield from _parts(child, f"{prefix}{name}.")


def _how_added(node: fx.Node) -> str:
    """What a sum does that no layer does with a residual."""
    if node.kwargs.get("alpha", 1) != 1:
        return f"takes a residual as it is, and this sum has alpha={node.kwargs['alpha']}"
    if "out" in node.kwargs:
        return "writes no result into given memory, and this sum does"
    values = [*node.args, *node.kwargs.values()]
    if all(isinstance(value, fx.Node) for value in values):
        return "is added to itself"
    return "takes a residual of its own shape, and this sum adds a number"


def _spatial_dims(layer: nn.Module) -> int:
    """0 of a linear layer, 1 to 3 of a convolution."""
    if isinstance(layer, (nn.Linear, SparseLinear)):
        return 0
    assert isinstance(layer.kernel_size, tuple)
    return len(layer.kernel_size)


class _Fuser:
    """Rewrites one graph.

    Args:
        root: Module that was traced; batch norms folded away become ``nn.Identity`` in it.
        graph: Its graph.
        prefix: Of the names in the report.
        report: Where to say what was done.
        elsewhere: id of a module -> name under which it is used outside of the graph.
    """

    def __init__(
        self,
        root: nn.Module,
        graph: fx.Graph,
        prefix: str,
        report: FuseReport,
        elsewhere: Mapping[int, str],
    ) -> None:
        self.root = root
        self.graph = graph
        self.prefix = prefix
        self.report = report
        self.elsewhere = elsewhere
        self.modules = dict(root.named_modules(remove_duplicate=False))
        self.calls = Counter(id(self._module(node)) for node in self._calls())
        self.layers: dict[fx.Node, FusedLayer] = {}
        self.read_directly = {
            str(node.target).rpartition(".")[0] for node in graph.nodes if node.op == "get_attr"
        }

    def run(self) -> nn.Module:
        """The graph as a module, with everything fused that can be."""
        for node in self._calls(*NOTHING):
            if not hooks_of(self._module(node)):
                self._replace(node, node.all_input_nodes[0])
        for node in list(self.graph.nodes):
            if does_nothing(node):
                self._replace(node, node.all_input_nodes[0])
            elif node.op == "call_function" and node.target in (F.batch_norm, torch.batch_norm):
                self.report.kept[f"{self.prefix}{node}"] = (
                    "it is a function, and only modules such as nn.BatchNorm2d are folded"
                )
        new: dict[str, nn.Module] = {}
        for node in self._calls(*ANY_NORM):
            reason = self._fold(node)
            if reason is None:
                new[str(node.target)] = nn.Identity().eval()
            else:
                self.report.kept[self.prefix + str(node.target)] = reason
        replace_modules(self.root, new)
        for node in list(self.graph.nodes):
            if adds(node):
                self._fuse_residual(node)
        twins = {}
        for node in self._calls(*SPARSE):
            if twin := self._fuse_activation(node):
                twins[str(node.target)] = twin
        self.graph.lint()
        made = fx.GraphModule(self.root, self.graph, type(self.root).__name__)
        for name, twin in twins.items():
            made.set_submodule(name, twin)
        order = {node: i for i, node in enumerate(self.graph.nodes)}
        self.report.fused += [self.layers[n] for n in sorted(self.layers, key=order.__getitem__)]
        return made

    # -- batch norm -----------------------------------------------------------------------------

    def _fold(self, node: fx.Node) -> str | None:
        """Fold a batch norm into the layer before it, or say why not."""
        norm, source = self._module(node), node.all_input_nodes[0]
        assert isinstance(norm, ANY_NORM)
        if norm.running_mean is None:
            return "it has no running statistics, so it normalizes by each batch"
        if reason := self._unique(norm):
            return f"it {reason}"
        if source.op == "call_module" and _masked(self._module(source)):
            return f"layer {self.prefix}{source.target} is {_FINALIZE}"
        if source.op != "call_module" or type(self._module(source)) not in (*DENSE, *SPARSE):
            return f"it follows {self._describe(source)}, not a linear layer or convolution"
        layer = self._module(source)
        name = f"layer {self.prefix}{source.target}"
        if reason := self._alone(source):
            return f"{name} {reason}"
        if getattr(layer, "activation", "none") != "none":
            return f"{name} fuses {layer.activation} already, which comes before batch norm"
        if set(extras_of(source, layer)) - {"output_size"}:
            return f"{name} takes more than its input (a residual, which batch norm would scale?)"
        key = weight_name(layer)
        if not isinstance(layer._parameters.get(key), nn.Parameter):
            return f"the {key} of {name} is not a Parameter of the layer (weight_norm, prune?)"
        if str(source.target) in self.read_directly:
            return f"the parameters of {name} are read elsewhere in forward"
        dims = _spatial_dims(layer)
        if type(norm) not in (NORM[max(dims - 1, 0)], nn.SyncBatchNorm):
            return f"{name} has its channels along another axis than a {type(norm).__name__}"
        if dims < 2 or type(norm) is nn.SyncBatchNorm:  # others take one number of dimensions only
            self._require_dims(source, dims + 2, _AXES[dims])
        fold_batch_norm(layer, cast(nn.BatchNorm2d, norm))  # in eval mode all compute the same
        self._layer(source).batch_norm.append(self.prefix + str(node.target))
        self._replace(node, source)
        return None

    def _require_dims(self, node: fx.Node, count: int, axes: str) -> None:
        """Let the graph refuse inputs of which batch norm would normalize another axis.

        nn.BatchNorm1d and nn.SyncBatchNorm normalize axis 1: L of [N, L, features], and L of what a
        convolution makes of [channels, L]. They could be applied before only with L equal to the
        features.
        """
        with self.graph.inserting_before(node):
            dims = self.graph.call_method("dim", (input_of(node),))
            right = self.graph.call_function(operator.eq, (dims, count))
            layer = self.prefix + str(node.target)
            message = f"{_WHERE}: batch norm was folded into {layer}, for inputs {axes}"
            self.graph.call_function(torch._assert, (right, message))

    # -- residual and activation ----------------------------------------------------------------

    def _fuse_residual(self, node: fx.Node) -> None:
        """Let a sparse convolution add what is added to its output."""
        reasons = []
        pairs: list[tuple[fx.Node, fx.Node | None]]
        if addends := addends_of(node):
            first, second = addends
            pairs = [(first, second), (second, first)]
        else:
            pairs = [(value, None) for value in node.all_input_nodes]
        for source, other in pairs:
            if source.op != "call_module" or type(self._module(source)) not in SPARSE:
                continue
            if type(self._module(source)) not in TAKES_RESIDUAL and len(source.users) > 1:
                continue  # such as in a GELU that is written out
            reason = self._residual_conflict(node, source, other)
            if reason is None:
                with self.graph.inserting_before(node):
                    extras = {"residual": other, **extras_of(source, self._module(source))}
                    made = self.graph.call_module(str(source.target), (input_of(source),), extras)
                layer = self._layer(source)
                layer.residual = str(other)
                self.layers[made] = layer
                del self.layers[source]
                self._replace(node, made)
                self.graph.erase_node(source)
                return
            reasons.append(f"layer {self.prefix}{source.target} {reason}")
        if reasons:
            self.report.kept[f"{self.prefix}{node}"] = "; ".join(reasons)

    def _residual_conflict(
        self, node: fx.Node, source: fx.Node, other: fx.Node | None
    ) -> str | None:
        layer = self._module(source)
        if type(layer) not in TAKES_RESIDUAL:
            return "takes no residual (only convolutions do)"
        if other is None:
            return _how_added(node)
        if reason := self._alone(source):
            return reason
        if layer.activation != "none":
            return f"fuses {layer.activation} already, which comes before the add"
        if "residual" in extras_of(source, layer):
            return "adds a residual already"
        if writes_to(node, self.modules) is other:
            return f"is added into the memory of {other}"
        known = shapes(self.graph, self.modules)
        if known[source] != known[other]:
            return f"may have another shape than {other}: nothing in the graph shows they are equal"
        value = input_of(source)
        if Memory(self.graph, self.modules).overwritten(value, source, node):
            return f"has an input, {value}, that is overwritten before the add"
        return None

    def _fuse_activation(self, node: fx.Node) -> nn.Module | None:
        """A twin of a sparse layer that applies the activation behind it; shares its tensors."""
        layer = self._module(node)
        behind = [user for user in node.users if activation_of(user, self.modules)]
        if not behind:
            for user in node.users:
                if other := other_activation(user, self.modules):
                    self.report.kept[f"{self.prefix}{user}"] = (
                        f"layer {self.prefix}{node.target} cannot fuse {other} "
                        f"(only {listed(get_args(Activation)[1:])})"
                    )
            return None
        user = behind[0]
        reason = self._alone(node)
        if layer.activation != "none":
            reason = f"fuses {layer.activation} already"
        elif user.op == "call_module" and hooks_of(self._module(user)):
            reason = f"is followed by {user.target}, which has {hooks_of(self._module(user))}"
        if reason:
            self.report.kept[f"{self.prefix}{user}"] = f"layer {self.prefix}{node.target} {reason}"
            return None
        activation = activation_of(user, self.modules)
        assert activation is not None
        twin = copy.copy(layer)
        twin._parameters, twin._buffers = dict(layer._parameters), dict(layer._buffers)
        vars(twin).pop("forward", None)  # bound to the layer, if a wrapper put the class's back
        twin.activation = activation  # type: ignore[assignment]
        self._layer(node).activation = activation
        self._replace(user, node)
        return twin

    # -- the graph ------------------------------------------------------------------------------

    def _calls(self, *types: type[nn.Module]) -> list[fx.Node]:
        """Calls of modules of exactly these types, all if none is given."""
        return [
            node
            for node in self.graph.nodes
            if node.op == "call_module" and (not types or type(self._module(node)) in types)
        ]

    def _module(self, node: fx.Node) -> nn.Module:
        return self.modules[str(node.target)]

    def _layer(self, node: fx.Node) -> FusedLayer:
        return self.layers.setdefault(node, FusedLayer(self.prefix + str(node.target)))

    def _replace(self, node: fx.Node, by: fx.Node) -> None:
        node.replace_all_uses_with(by)
        self.graph.erase_node(node)

    def _unique(self, module: nn.Module) -> str | None:
        """Why a module may not change, if it may not."""
        if hooks := hooks_of(module, state=True):
            return f"has {hooks}"
        if self.calls[id(module)] > 1:
            return f"is used {self.calls[id(module)]} times"
        if id(module) in self.elsewhere:
            return f"is also used as {self.elsewhere[id(module)]}"
        return None

    def _alone(self, node: fx.Node) -> str | None:
        """Why the module a node calls may not take over what follows it, if it may not."""
        if reason := self._unique(self._module(node)):
            return reason
        return (
            f"has an output that is used {len(node.users)} times" if len(node.users) > 1 else None
        )

    def _describe(self, node: fx.Node) -> str:
        if node.op == "placeholder":
            return f"the input {node}"
        if node.op == "call_module":
            return f"{self.prefix}{node.target}, a {type(self._module(node)).__name__}"
        return str(node)
