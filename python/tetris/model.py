"""Whole models: make linear layers and convolutions sparse, and dense again."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal, cast, overload

from torch import Tensor, nn

from .checks import check_flags, check_model, check_weight
from .importance import saliency_or_weight
from .layout import BlockLayout
from .modules import copy_or_same, replace_modules
from .nn.base import SparseLayer, make_dense, make_sparse
from .nn.kinds import DENSE_TYPES, DenseLayer, groups_of, oriented, sparse_type
from .prune.latency import BLOCKS, Latency
from .prune.options import LayerOptions, LayerOverride, shows_settings
from .prune.orders import Share
from .prune.plan import Scope, plan_layers
from .prune.report import LayerReport, SparsifyReport, warn_of_shortfall
from .prune.saliency import check_importance, layer_saliency, prepare_importance
from .prune.target import Target, budgeted
from .prune.tree import Selection, Selector, check_hooks, layer_options, select_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack


class PruneArguments(LayerOverride, total=False):
    """What to prune and how, of :func:`sparsify`'s arguments; the function explains them."""

    include: Selector | Iterable[Selector] | None
    exclude: Selector | Iterable[Selector] | None
    overrides: Mapping[str, LayerOverride] | None
    scope: Scope
    target: Target | None
    latency: float | str | None
    types: tuple[type[nn.Module], ...]


class SparsifyArguments(PruneArguments, total=False):
    """Arguments of :func:`sparsify`, for type checkers; the function explains them."""

    share: Share
    inplace: bool
    example_inputs: Any
    progress: bool


@overload
def sparsify(
    model: nn.Module,
    *,
    return_report: Literal[False] = ...,
    **arguments: Unpack[SparsifyArguments],
) -> nn.Module: ...


@overload
def sparsify(
    model: nn.Module, *, return_report: Literal[True], **arguments: Unpack[SparsifyArguments]
) -> tuple[nn.Module, SparsifyReport]: ...


@shows_settings
def sparsify(
    model: nn.Module,
    *,
    include: Selector | Iterable[Selector] | None = None,
    exclude: Selector | Iterable[Selector] | None = None,
    overrides: Mapping[str, LayerOverride] | None = None,
    scope: Scope = "layer",
    share: Share = (),
    target: Target | None = None,
    latency: float | str | None = None,
    example_inputs: Any = None,
    types: tuple[type[nn.Module], ...] = DENSE_TYPES,
    inplace: bool = False,
    progress: bool = False,
    return_report: bool = False,
    **settings: Unpack[LayerOverride],
) -> nn.Module | tuple[nn.Module, SparsifyReport]:
    """Prune linear layers and convolutions to blocks and let them compute with what is left.

    Every ``nn.Linear``, ``nn.Conv1d``, ``nn.Conv2d``, ``nn.ConvTranspose2d`` and ``Conv1D`` of
    transformers that include and exclude select is replaced by its sparse counterpart, such as
    :class:`tetris.SparseConv2d`.
    Convolutions with fewer than 16 input channels per group (one that reads an image, depthwise
    ones) have nothing to win and stay dense unless include names them; other layers that would be
    slower than dense ones, such as those of few outputs, :func:`tetris.analyze` finds (pass its
    ``overrides()``), and a ``latency`` target leaves dense. The layer that produces the logits
    loses accuracy out of proportion to the time it takes: exclude it. To fine-tune afterwards,
    train the result as it is (only stored values learn), or use :class:`tetris.prune.TetrisPruner`.

    Args:
        model: Any module. If it is itself such a layer, the sparse one is returned.
        include: Layers to prune, all if None: names, fnmatch patterns (``"encoder.*"``), module
            types, or modules; each stands for every layer at or below what it matches. A layer's
            own name, or the layer itself, includes it even if it has few input channels.
        exclude: Layers to leave dense, in the same terms; wins over include.
        overrides: Settings for some layers, ``{"decoder.*": {"sparsity": 0.8, "block": (8, 1)}}``:
            any of :class:`tetris.prune.LayerOverride`. Later entries win.
        scope: ``"layer"``: each layer has this sparsity. ``"global"``: all layers together have it;
            blocks compete by saliency per number, so that layers with larger weights keep more.
            Layers whose sparsity an override sets stay out of the competition.
        share: Channels that several layers write or read in one order, one or several
            :class:`tetris.prune.SharedOrder`, or all of a model, as :func:`tetris.shared_orders`
            finds them. These layers are searched together, and their permutations along the shared
            axes are equal, so that :func:`tetris.fold` can remove them.
        target: What is to be left, in place of ``sparsity``: :class:`tetris.prune.Parameters` or
            :class:`tetris.prune.Flops`, of all layers whose sparsity no override sets.
        latency: Time that the whole model may take for ``example_inputs``, in place of
            ``sparsity``: a share of the dense model's, such as 0.5, or a time, ``"3 ms"``. Block
            sparsity is chosen for each layer, and with ``block="auto"`` the block's shape, too;
            layers stay dense where sparse ones would lose. Short for
            ``target=tetris.prune.Latency(...)``, which explains it. Uses the calibration of this
            machine (:func:`tetris.calibrate`) if there is one; nothing else here does. What is
            chosen is measured, and predictions are corrected: that takes some seconds.
        example_inputs: With ``latency``: what the model is called with, a tensor, a tuple of
            arguments, or a dict of them by name.
        types: Exact types to replace. Subclasses must be named here: their ``forward`` is lost.
        inplace: Change the model itself, whose dense weights are freed one by one; otherwise a deep
            copy, without these weights. Either way what the search takes on top is less than the
            largest layer, with most blocks (``docs/models.md``), except where layers compete or
            importance needs data.
        progress: Show a progress bar per layer.
        return_report: Return ``(model, report)``; ``print(report)`` shows the layers, what they
            retain, and which layers stay dense and why.
        sparsity: Share of blocks to remove, in [0, 1]; 0.9 by default.
        block: (bo, bi), block height along outputs and width along inputs, each from 1 to 128;
            (4, 1) by default; ``"auto"`` with ``latency``. A layer that one block would cover gets
            blocks of half its size.
        importance: What a weight is worth: ``"magnitude"`` (absolute value, as TETRIS does),
            ``"squared"``, a function ``f(layer name, layer) -> tensor`` shaped like the layer's
            weight, or a dict from layer name to such a tensor; non-negative. With data:
            :class:`tetris.prune.Taylor`, :class:`tetris.prune.Fisher`,
            :class:`tetris.prune.ActivationNorm`.
        reorder: The search for row and column orders, see :meth:`tetris.BlockLayout.from_dense`;
            False keeps the order.
        balanced: Store equally many blocks in every block row (up to one).
        allow_empty_rows: Let block rows lose all their blocks; otherwise each keeps its best one.
        tie_kernel: Keep or remove all kernel positions of a block of channels together, as TETRIS
            does; otherwise each position of a convolution has blocks of its own.
        seed: Seed of the search.
        budget: Seconds the search may take per layer.
        sweeps: Sweeps of the search instead of a time budget: the result then depends on the
            arguments alone, not on the speed of the machine.
        min_sparsity: With scope ``"global"``: share of its blocks that a layer loses at least.
        max_sparsity: With scope ``"global"``: share that it loses at most.

    Returns:
        The model with sparse layers, or with ``return_report`` the model and a
        :class:`tetris.prune.SparsifyReport`. Layers that shared one weight share one ``values``
        Parameter and one layout.

    Raises:
        ValueError: an argument breaks a rule; a pattern matches nothing; nothing is left to prune;
            a weight is shared with a module that stays dense, has no kernel (half precision on the
            CPU, a device that this build has no kernels for) or no numbers; a layer has hooks that
            would be lost. The model is unchanged then.
        TypeError: an argument is of the wrong kind, such as a state_dict for the model.

    Example:
        >>> sparse, report = tetris.sparsify(
        ...     model, sparsity=0.9, block=(4, 1), exclude="classifier", return_report=True
        ... )
        >>> print(report)

    Method: Ji et al., "TETRIS: TilE-matching the TRemendous Irregular Sparsity", NeurIPS 2018; the
    search differs, see :mod:`tetris.reorder`.
    """
    where = "tetris.sparsify"
    check_flags(where, inplace=inplace, progress=progress, return_report=return_report)
    target = _latency_target(where, latency, example_inputs, target, settings)
    default = LayerOptions.of(where, settings, sparsify)
    selection = select_layers(where, model, include, exclude, types)
    if inplace and "" in selection.layers:
        raise ValueError(
            f"{where}: a model that is one layer cannot be replaced in place; use inplace=False"
        )
    options, fixed = layer_options(where, model, selection, default, overrides)
    check_importance(where, default.importance, selection.layers)
    if not inplace:  # found out now, not after a search of minutes
        leaves = [t for t in (*model.parameters(), *model.buffers()) if t.is_leaf]
        weights = [layer.weight for layer in selection.layers.values()]
        copy_or_same(where, model, False, keep=leaves + weights)
    budget, default, options = budgeted(
        where,
        target,
        model,
        selection,
        default,
        options,
        fixed,
        "sparsity" in settings,
        progress=progress,
    )
    for name, layer in selection.layers.items():
        # Of a copy torch drops the hooks of Parameters anyway.
        check_hooks(where, name, layer, layer.weight if inplace else None)
        check_weight(f"{where}: layer {name!r}", layer.weight)
    prepare_importance(model, selection.layers, options)

    layouts, reports = _search(
        where,
        selection,
        options,
        fixed,
        scope,
        default.sparsity,
        progress,
        {} if budget is None else budget.costs,
        share,
    )

    # A copy has no use for the weights that are pruned; in place, each goes with its layer.
    dense = selection.layers
    result = copy_or_same(where, model, inplace, keep=[layer.weight for layer in dense.values()])
    order = [*dense]
    dense.clear()
    for first, group in selection.tied.items():
        values = None
        for name in group:
            layer = result.get_submodule(name)
            assert isinstance(layer, DenseLayer)
            sparse = make_sparse(
                sparse_type(layer),
                layer,
                layouts[first],
                bias=cast("nn.Parameter | None", layer.bias),
                values=values,
            )
            values = sparse.values
            result = replace_modules(result, {name: sparse})
            del layer
    if scope == "layer":
        warn_of_shortfall(
            where,
            {n: r.block_sparsity for n, r in reports.items()},
            {n: options[n].sparsity for n in order},
        )
    if not return_report:
        return result
    plan = None if budget is None else budget.latency
    if plan is not None and isinstance(target, Latency):
        plan = target.measured(plan, result, None if inplace else model)
    return result, SparsifyReport(tuple(reports[n] for n in order), selection.skipped, plan)


def _search(
    where: str,
    selection: Selection,
    options: Mapping[str, LayerOptions],
    fixed: set[str],
    scope: Scope,
    sparsity: float,
    progress: bool,
    costs: Mapping[str, float],
    share: Share,
) -> tuple[dict[str, BlockLayout], dict[str, LayerReport]]:
    """A layout for each weight, by its first layer, and a report for each layer."""
    # One layer's saliency at a time, where layers do not compete and nothing but the weight is
    # asked: it may take as much memory. All are computed once before, for the checks.
    alone = (
        scope == "layer"
        and not share
        and all(isinstance(o.importance, str) for o in options.values())
    )

    def worth_of(first: str) -> tuple[Tensor, bool]:
        """Of the weights of a layer and of those that share its weight, oriented.

        Or the weight itself and True, if its magnitudes are the worth.
        """
        names, layer = selection.tied[first], selection.layers[first]
        if alone and all(options[n].importance == "magnitude" for n in names):
            weight, absolute = saliency_or_weight(
                f"{where}: layer {first!r}", layer.weight, "magnitude"
            )
            return oriented(layer, weight), absolute
        parts = [
            layer_saliency(where, n, selection.layers[n], options[n].importance) for n in names
        ]
        return oriented(layer, sum(parts[1:], start=parts[0])), False

    saliency: dict[str, Tensor] = {}
    for first in selection.tied:
        own, _ = worth_of(first)
        if not alone:
            saliency[first] = own
        del own
    layouts: dict[str, BlockLayout] = {}
    reports: dict[str, LayerReport] = {}

    def search(part: list[str]) -> None:  # whose variables, as large as weights, end with it
        worth, absolute = saliency, False
        if alone:
            [first] = part
            own, absolute = worth_of(first)
            worth = {first: own}
        plans = plan_layers(
            where,
            worth,
            {n: options[n] for n in part},
            fixed,
            scope,
            sparsity,
            progress,
            {n: groups_of(selection.layers[n]) for n in part},
            costs,
            share,
            absolute,
        )
        for first, plan in plans.items():
            layouts[first] = plan.layout
            report = LayerReport.of(first, plan.layout, worth[first], plan.search)
            reports.update({n: replace(report, name=n) for n in selection.tied[first]})

    for part in [[first] for first in selection.tied] if alone else [[*selection.tied]]:
        search(part)
    return layouts, reports


def _latency_target(
    where: str,
    latency: float | str | None,
    example_inputs: Any,
    target: Target | None,
    settings: LayerOverride,
) -> Target | None:
    """The target that ``latency=`` and ``block="auto"`` stand for; auto is out of settings then."""
    if latency is None:
        if example_inputs is not None:
            raise ValueError(
                f"{where}: example_inputs= goes with latency=; other targets take their own, such "
                "as target=tetris.prune.Flops(0.25, x) (got no latency)"
            )
        return target
    if target is not None:
        raise ValueError(
            f"{where}: pass latency= or target=, not both (got {latency!r} and {target!r})"
        )
    block = settings.get("block")
    auto = isinstance(block, str) and block == "auto"
    if auto:
        del settings["block"]
    return Latency.asked(where, latency, example_inputs, BLOCKS if auto else None)


def densify(model: nn.Module, *, inplace: bool = False) -> nn.Module:
    """Replace every sparse layer by the dense one with the same weight.

    The inverse of :func:`sparsify` as far as there is one: removed weights are zero. Layers that
    share values share the dense weight.

    Args:
        model: Any module; if it is itself a sparse layer, the dense one is returned.
        inplace: Change the model itself; otherwise a deep copy.

    Returns:
        The model, of the same class and with the same names; a sparse model's results up to
        rounding.

    Raises:
        TypeError: no module.
        ValueError: a layer has a fused activation, or hooks that would be lost. The model is
            unchanged then.

    Example:
        >>> sparse = tetris.sparsify(model, sparsity=0.9, exclude="classifier")
        >>> dense = tetris.densify(sparse)              # to prune once more, or for other tools
        >>> torch.allclose(dense(x), sparse(x), atol=1e-4)
        True
    """
    where = "tetris.densify"
    check_model(where, model)
    names = [n for n, m in model.named_modules() if isinstance(m, SparseLayer)]
    if inplace and "" in names:
        raise ValueError(
            f"{where}: a model that is one layer cannot be replaced in place; use inplace=False"
        )
    for name in names:
        layer = model.get_submodule(name)
        assert isinstance(layer, SparseLayer)
        check_hooks(where, name, layer, layer.values if inplace else None)
        if layer.activation != "none":
            raise ValueError(
                f"{where}: layer {name!r} fuses {layer.activation!r}, which "
                f"{layer.dense_name()} cannot express; set its "
                "activation to 'none' and apply the function after the layer"
            )
    target = copy_or_same(where, model, inplace)
    new: dict[str, nn.Module] = {}
    weights: dict[tuple[object, ...], nn.Parameter] = {}
    for name in names:
        layer = target.get_submodule(name)
        assert isinstance(layer, SparseLayer)
        key = (id(layer.values), layer.layout, layer.dense_type)
        dense = make_dense(layer, bias=layer.bias, weight=weights.get(key))
        weights[key] = cast(nn.Parameter, dense.weight)
        new[name] = dense
    return replace_modules(target, new)
