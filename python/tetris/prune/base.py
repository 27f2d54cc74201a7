"""The life of a pruner: select, search, mask, follow the schedule, finalize."""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ..checks import check_sparsity, check_weight, describe
from ..layout import BlockLayout
from ..layout_search import select_blocks, shares
from ..modules import copy_or_same, replace_modules
from ..nn.base import SparseLayer, make_sparse
from ..nn.kinds import DENSE_TYPES, DenseLayer, groups_of, oriented, sparse_type
from ..parameters import check_optimizers
from ..relayout import layout_of_keys
from .allocate import Scored, allocate, scored
from .masks import BlockMask
from .options import LayerOptions, LayerOverride, shows_settings
from .plan import Plan, Scope, plan_layers
from .regrow import Regrow, Regrowth
from .report import LayerReport, SparsifyReport
from .saliency import check_importance
from .schedule import Schedule, as_schedule
from .select import Units, keep_heaviest
from .stored import StoredBlocks
from .tree import Selector, check_hooks, layer_options, select_layers

if TYPE_CHECKING:
    from typing_extensions import Unpack

Execution = Literal["masked", "sparse"]
"""How the layers of a pruner compute while they train; see :class:`BlockPruner`."""


class BlockPruner:
    """Removes blocks of weights while a model trains, and makes it sparse in the end.

    A method overrides :meth:`saliency`, and :meth:`update` if masks follow something else than the
    schedule. Permutations are searched once, when the pruner is made, at the final sparsity;
    masks are chosen under them from then on. Parameters stay the objects they were: optimizers made
    before or after work alike.

    With ``execution="masked"`` masks act through a parametrization of ``weight``, so forward and
    gradients see the masked weight, and :meth:`step` also zeroes the Parameter, which momentum and
    weight decay have moved. A step costs what a dense one does, and a bit.

    With ``execution="sparse"`` a layer becomes a sparse one in the model as soon
    as a block of it is removed, and stays one: forward, backward and the optimizer work on stored
    blocks, and changing them costs as much. The trajectory is the masked one up to rounding. Pass
    ``optimizers``, or :meth:`attach` them, for what they keep of removed blocks goes with these.

    Args:
        model: The model; changed in place until :meth:`remove` or :meth:`finalize`.
        options: Settings of the layers, in place of ``settings``.
        schedule: ``"one_shot"``, :class:`Cubic`, or ``f(step, final sparsity) -> sparsity``.
        include: Layers to prune, as for :func:`tetris.sparsify`.
        exclude: Layers to leave alone.
        types: Exact types to prune.
        overrides: Settings for some layers.
        scope: ``"layer"`` or ``"global"``.
        search_every_update: Search the permutations anew whenever masks change. A refresh may
            bring removed blocks back, with zero weights. Not on stored blocks, which do not tell.
        execution: ``"masked"``, or ``"sparse"`` to train on stored blocks.
        optimizers: Whose states follow the stored blocks, one or several.
        regrow: Exchange stored blocks for others while training, see :class:`Regrow`; with
            ``execution="sparse"``.
        progress: Show progress bars during searches.
        **settings: ``sparsity``, ``block`` and the other fields of :class:`LayerOptions`, as for
            :func:`tetris.sparsify`.
    """

    @shows_settings
    def __init__(
        self,
        model: nn.Module,
        options: LayerOptions | None = None,
        *,
        schedule: Literal["one_shot"] | Schedule = "one_shot",
        include: Selector | Iterable[Selector] | None = None,
        exclude: Selector | Iterable[Selector] | None = None,
        types: tuple[type[nn.Module], ...] = DENSE_TYPES,
        overrides: Mapping[str, LayerOverride] | None = None,
        scope: Scope = "layer",
        search_every_update: bool = False,
        execution: Execution = "masked",
        optimizers: Optimizer | Iterable[Optimizer] = (),
        regrow: Regrow | None = None,
        progress: bool = False,
        **settings: Unpack[LayerOverride],
    ) -> None:
        where = self._name
        if options is None:
            options = LayerOptions.of(where, settings)
        elif not isinstance(options, LayerOptions) or settings:
            raise TypeError(
                f"{where}: settings go by keyword, such as sparsity=0.9, or all in one "
                f"LayerOptions (got {' and '.join([describe(options), *settings])})"
            )
        self.model = model
        self.options = options
        self.schedule = as_schedule(where, schedule)
        self.scope: Scope = scope
        self.search_every_update = search_every_update
        self.execution: Execution = execution
        self.regrow = regrow
        self.progress = progress
        self.steps = 0
        self._optimizers = check_optimizers(where, optimizers)
        self._regrowth = Regrowth(where, regrow)
        selection = select_layers(where, model, include, exclude, types)
        for group in selection.tied.values():
            if len(group) > 1:
                raise ValueError(
                    f"{where}: {group[0]!r} and {group[1]!r} share one weight, which cannot be "
                    "masked twice; exclude them, or use tetris.sparsify, which keeps the tie"
                )
        self._layer_options, self._fixed = layer_options(
            where, model, selection, options, overrides
        )
        check_importance(where, options.importance, selection.layers)
        self._check_execution(selection.layers)
        self._skipped = selection.skipped
        self._layers = selection.layers
        self._plans = self._search(
            {n: o.sparsity for n, o in self._layer_options.items()}, options.sparsity
        )
        self._targets = {n: p.options.sparsity for n, p in self._plans.items()}
        self._reached: dict[str, float] | None = None
        self._masks: dict[str, BlockMask | StoredBlocks] = {}
        try:
            for name, layer in selection.layers.items():
                layout = self._plans[name].layout.to(layer.weight.device)
                if execution == "sparse":
                    whole = layout_of_keys(layout, torch.arange(math.prod(layout.block_grid)))
                    self._masks[name] = StoredBlocks(model, name, layer, whole)
                    continue
                mask = BlockMask(layout, transposed=isinstance(layer, nn.ConvTranspose2d))
                mask.block_mask.fill_(True)
                parametrize.register_parametrization(layer, "weight", mask)
                self._masks[name] = mask
            self.update()
        except BaseException:
            if execution == "masked":
                for name in self._masks:  # nothing has been zeroed yet
                    _unmask(self._layers[name], masked=False)
            raise
        self._apply()
        self._regrowth.watch(self.steps + 1, self._modules())

    # -- what a method overrides --------------------------------------------------------------

    def saliency(self, name: str, layer: DenseLayer | SparseLayer) -> Tensor:
        """Worth of each weight of a layer: shaped like it, float32, non-negative, on the CPU.

        ``layer.weight`` is the masked weight. A layer that trains on stored blocks is a sparse
        one: the result is shaped like ``layer.values`` then, [nnzb, bi, bo].
        """
        raise NotImplementedError(f"{type(self).__name__} must implement saliency(name, layer)")

    def update(self) -> None:
        """Choose the masks that hold after ``self.steps`` steps, if they differ from now."""
        sparsity = {n: self._scheduled(t) for n, t in self._targets.items()}
        if sparsity == self._reached and not self._regrowth.share(self.steps):
            return
        if self._reached is None and sparsity == self._targets:
            layouts = {n: p.layout for n, p in self._plans.items()}
        elif self.execution == "sparse":
            layouts = self._choose_stored(sparsity)
        else:
            layouts = self._choose(sparsity)
        self._set(layouts)
        self._reached = sparsity

    # -- the training loop --------------------------------------------------------------------

    def step(self) -> None:
        """Call after each ``optimizer.step()``: follow the schedule, drop or zero what goes.

        Raises:
            RuntimeError: blocks change, and no optimizer that was passed or attached holds them;
                blocks are to be regrown by gradient, and no backward pass has gone through a layer.
        """
        self._check_attached("step")
        self.steps += 1
        try:
            self.update()
        except BaseException:
            self.steps -= 1
            raise
        self._apply()
        self._regrowth.watch(self.steps + 1, self._modules())

    def attach(self, *optimizers: Optimizer) -> None:
        """Let optimizers' states follow the stored blocks, from the next change on."""
        new = check_optimizers(f"{self._name}.attach", optimizers)
        self._optimizers += tuple(o for o in new if all(o is not old for old in self._optimizers))

    @property
    def sparsity(self) -> float:
        """Removed share of the blocks of all layers, now."""
        layouts = self.layouts().values()
        stored = sum(layout.nnz_blocks for layout in layouts)
        return 1.0 - stored / sum(math.prod(layout.block_grid) for layout in layouts)

    def layouts(self) -> dict[str, BlockLayout]:
        """Name -> layout that stores what the masks keep now."""
        return {name: mask.layout() for name, mask in self._masks.items()}

    @torch.no_grad()
    def report(self) -> SparsifyReport:
        """What the masks keep now, in terms of the saliency the layout search saw."""
        layers = [
            LayerReport.of(
                name, mask.layout().to("cpu"), self._plans[name].saliency, self._plans[name].search
            )
            for name, mask in self._masks.items()
        ]
        return SparsifyReport(tuple(layers), self._skipped)

    # -- the end ------------------------------------------------------------------------------

    @torch.no_grad()
    def finalize(self, *, inplace: bool = False) -> nn.Module:
        """Return the model with sparse layers in place of the masked ones.

        It computes what the masked model computes, up to rounding.

        Args:
            inplace: Change the model itself; the pruner is done then. Otherwise the result is a
                deep copy and training may go on.

        Raises:
            ValueError: a layer has hooks that would be lost, or is of a type or on a device that
                sparse layers cannot compute with: masks train anywhere, ``model.float().cpu()``
                brings them home.
        """
        self._check_attached("finalize")
        modules = self._modules()
        unfinished = {n: m for n, m in modules.items() if not isinstance(m, SparseLayer)}
        for name, layer in unfinished.items():
            check_hooks(self._name, name, layer)
            check_weight(f"{self._name}.finalize: layer {name!r}", _weight(layer))
        if inplace and "" in self._layers:
            raise ValueError(
                f"{self._name}: a model that is one layer cannot be replaced in place; "
                "use inplace=False"
            )
        if self._reached != self._targets:
            now, end = self.sparsity, _mean(self._targets)
            warnings.warn(
                f"{self._name}.finalize: the schedule has not ended ({self.steps} steps, {now:.1%} "
                f"of blocks removed, {end:.1%} planned)",
                stacklevel=3,
            )
        with self._regrowth.paused():
            target = copy_or_same(self.model, inplace)
        new: dict[str, nn.Module] = {}
        for name in unfinished:
            layer = target.get_submodule(name)
            assert isinstance(layer, DenseLayer)
            layout = self._masks[name].layout()
            values = nn.Parameter(
                layout.pack(oriented(layer, layer.weight)),
                requires_grad=_weight(layer).requires_grad,
            )
            new[name] = make_sparse(
                sparse_type(layer),
                layer,
                layout,
                bias=layer.bias,  # type: ignore[arg-type]
                values=values,
            )
        target = replace_modules(target, new)
        if inplace:
            self._end()
        return target

    def remove(self) -> nn.Module:
        """Make the model an ordinary dense one again, with the masked weights; end the pruner.

        Raises:
            ValueError: an optimizer's states cannot follow the stored blocks; nothing is changed
                then.
        """
        self._check_attached("remove")
        for mask in self._masks.values():
            if isinstance(mask, StoredBlocks) and isinstance(mask.module, SparseLayer):
                mask.check(f"{self._name}.remove", self._optimizers, trained=False)
        for name, mask in self._masks.items():
            if isinstance(mask, StoredBlocks):
                mask.unset(self._optimizers)
            else:
                _unmask(self._layers[name], masked=True)
        self._end()
        return self.model

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, sparsities, masks and permutations: with the model's state, all to resume from."""
        return {
            "steps": self.steps,
            "execution": self.execution,
            "targets": dict(self._targets),
            "reached": None if self._reached is None else dict(self._reached),
            "generator": self._regrowth.generator.get_state(),
            "layers": {
                name: {"block": mask.block, **{k: v.clone() for k, v in mask.state_dict().items()}}
                for name, mask in self._masks.items()
            },
        }

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a pruner of the same layers and blocks stopped.

        Load the model's and the optimizer's state too: this one holds no weights. Optimizers number
        Parameters in the model's order, which masking changes: make the optimizer after the
        pruner in both programs, or before it in both. With ``execution="sparse"`` this comes first:
        it makes those layers sparse that were, and those dense that were, and the model's and the
        optimizer's state then find the shapes they know.

        Raises:
            ValueError: the state is of other layers, blocks, shapes or execution; nothing is
                changed then.
        """
        self._check_attached("load_state_dict")
        missing = [key for key in ("steps", "targets", "reached", "layers") if key not in state]
        if missing:
            raise ValueError(f"{self._name}.load_state_dict: the state lacks {', '.join(missing)}")
        layers = state["layers"]
        if set(layers) != set(self._masks):
            raise ValueError(
                f"{self._name}.load_state_dict: the state is of layers {sorted(layers)}, "
                f"this pruner of {sorted(self._masks)}; make the pruner with the same include "
                "and exclude"
            )
        execution = state.get("execution", "masked")
        if execution != self.execution:
            raise ValueError(
                f"{self._name}.load_state_dict: the state is of a pruner with "
                f"execution={execution!r}, this one has {self.execution!r}; make the pruner with "
                "the same execution"
            )
        layouts = {}
        for name, mask in self._masks.items():
            saved = layers[name]
            if tuple(saved["block"]) != mask.block:
                raise ValueError(
                    f"{self._name}.load_state_dict: layer {name!r} has blocks of {mask.block} here "
                    f"and {tuple(saved['block'])} in the state; make the pruner with the same block"
                )
            layouts[name] = mask.saved_layout(saved)
        self._set(layouts, saved=layers)
        self.steps = int(state["steps"])
        self._targets = dict(state["targets"])
        self._reached = None if state["reached"] is None else dict(state["reached"])
        if "generator" in state:
            self._regrowth.generator.set_state(state["generator"])
        self._apply()
        self._regrowth.watch(self.steps + 1, self._modules())

    # -- inside -------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_execution(self, layers: Mapping[str, DenseLayer]) -> None:
        """Raise unless the arguments go with ``execution``, and the layers with "sparse"."""
        where = self._name
        if self.execution not in get_args(Execution):
            raise ValueError(
                f"{where}: execution must be 'masked' or 'sparse' (got {describe(self.execution)})"
            )
        if self.execution == "masked":
            if self.regrow is not None:
                raise ValueError(f"{where}: regrow needs execution='sparse' (got 'masked')")
            return
        if self.search_every_update:
            raise ValueError(
                f"{where}: search_every_update needs the whole weights, which execution='sparse' "
                "does not have; use execution='masked'"
            )
        if self.regrow is not None and (name := _first_balanced(self._layer_options)) is not None:
            raise ValueError(
                f"{where}: regrow chooses blocks wherever they are, which balanced=True forbids "
                f"(layer {name!r}); leave one of them out"
            )
        if "" in layers:
            raise ValueError(
                f"{where}: a model that is one layer cannot be replaced in place, as "
                "execution='sparse' does; put it into an nn.Sequential"
            )
        for name, layer in layers.items():
            check_hooks(where, name, layer)
            check_weight(f"{where}: layer {name!r}", layer.weight)

    def _check_attached(self, method: str) -> None:
        if not self._masks:
            raise RuntimeError(
                f"{self._name}.{method}: the pruner has ended (remove() or "
                "finalize(inplace=True)); make a new one to prune further"
            )

    def _modules(self) -> dict[str, DenseLayer | SparseLayer]:
        """The layers as they are in the model now."""
        masks = self._masks
        return {
            name: mask.module if isinstance(mask := masks[name], StoredBlocks) else layer
            for name, layer in self._layers.items()
        }

    def _scheduled(self, final: float) -> float:
        return min(
            final, check_sparsity(f"{self._name}: schedule", self.schedule(self.steps, final))
        )

    def _saliencies(self) -> dict[str, Tensor]:
        """Worth of each weight, outputs first."""
        return {n: oriented(layer, self.saliency(n, layer)) for n, layer in self._layers.items()}

    def _search(self, sparsity: Mapping[str, float], together: float) -> dict[str, Plan]:
        options = {
            n: LayerOptions(**{**vars(o), "sparsity": sparsity[n]})
            for n, o in self._layer_options.items()
        }
        return plan_layers(
            self._name,
            self._saliencies(),
            options,
            self._fixed,
            self.scope,
            together,
            self.progress,
            {name: groups_of(layer) for name, layer in self._layers.items()},
        )

    def _choose(self, sparsity: dict[str, float]) -> dict[str, BlockLayout]:
        """Layouts of given sparsities, under the present permutations or newly searched ones."""
        together = self._scheduled(self.options.sparsity)
        if self.search_every_update:
            self._plans = self._search(sparsity, together)
            return {name: plan.layout for name, plan in self._plans.items()}
        saliency = self._saliencies()
        old = self.layouts()
        if self.scope == "global":
            scores = {
                n: scored(
                    saliency[n],
                    old[n].blocking,
                    old[n].row_perm,
                    old[n].col_perm,
                    tie_kernel=o.tie_kernel,
                    keep_rows=not o.allow_empty_rows,
                )
                for n, o in self._layer_options.items()
                if n not in self._fixed
            }
            sparsity = {**sparsity, **(allocate(scores, together) if scores else {})}
        result = {}
        for name, layout in old.items():
            o = self._layer_options[name]
            blocks = select_blocks(
                saliency[name],
                layout.blocking,
                sparsity[name],
                layout.row_perm,
                layout.col_perm,
                balanced=o.balanced,
                allow_empty_rows=o.allow_empty_rows,
                tie_kernel=o.tie_kernel,
            )
            mask = self._masks[name]
            assert isinstance(mask, BlockMask)
            blocks = blocks.to(mask.block_mask.device)
            result[name] = mask.layout_of(blocks, mask.row_perm, mask.col_perm)
        return result

    @torch.no_grad()
    def _choose_stored(self, sparsity: dict[str, float]) -> dict[str, BlockLayout]:
        """Layouts of given sparsities, chosen from stored blocks, and from others to exchange."""
        layouts, modules = self.layouts(), self._modules()
        tied = {
            n: layout.blocking.positions if self._layer_options[n].tie_kernel else 1
            for n, layout in layouts.items()
        }
        units = {name: Units.of(layout, tied[name]) for name, layout in layouts.items()}
        scores = {
            n: u.sums(self._stored_scores(n, layouts[n]), layouts[n]) for n, u in units.items()
        }
        if self.scope == "global":
            rated = {
                n: Scored(
                    scores[n], o.block[0] * o.block[1] * tied[n], not o.allow_empty_rows, units[n]
                )
                for n, o in self._layer_options.items()
                if n not in self._fixed
            }
            together = self._scheduled(self.options.sparsity)
            sparsity = {**sparsity, **(allocate(rated, together) if rated else {})}
        result = {}
        for name, layout in layouts.items():
            parts = units[name].split(layout.groups)
            rates = scores[name].split([len(part.keys) for part in parts])
            removed = math.floor(sparsity[name] * units[name].total)
            may_grow = isinstance(modules[name], SparseLayer)
            keys = []
            for part, rate, own in zip(parts, rates, shares(removed, layout.groups), strict=True):
                kept = min(part.total - own, len(part.keys))
                keys.append(part.blocks(self._exchanged(name, part, rate, kept, may_grow)))
            result[name] = layout_of_keys(layout, torch.cat(keys))
        return result

    def _exchanged(
        self, name: str, units: Units, scores: Tensor, kept: int, may_grow: bool
    ) -> Tensor:
        """Keys of as many units as are kept: of what stays, and of what comes back."""
        share = self._regrowth.share(self.steps) if may_grow else 0.0
        exchanged = min(round(share * kept), units.total - len(units.keys))
        options = self._layer_options[name]
        keep = keep_heaviest(
            scores,
            units,
            kept - exchanged,
            balanced=options.balanced,
            allow_empty_rows=options.allow_empty_rows,
        )
        keys = units.keys[keep]
        if not exchanged or len(keys) >= kept:
            return keys
        grown = self._regrowth.grow(name, units, kept - len(keys))
        return torch.cat([keys, grown]).sort().values

    def _stored_scores(self, name: str, layout: BlockLayout) -> Tensor:
        """[nnzb], saliency of each stored block, as the masked pruner sums it."""
        layer = self._modules()[name]
        saliency = self.saliency(name, layer)
        if isinstance(layer, SparseLayer):
            sums = saliency.sum((1, 2), dtype=torch.float64).float()
        else:
            weights, rows, cols = oriented(layer, saliency), layout.row_perm, layout.col_perm
            sums = layout.blocking.sums(weights.double(), rows, cols).float().flatten()
        return sums.to(layout.device)

    def _set(
        self, layouts: Mapping[str, BlockLayout], *, saved: Mapping[str, Any] | None = None
    ) -> None:
        """Let the layers keep what layouts say, and be dense or sparse as they were saved."""
        dense = {n: bool(layer["dense"]) for n, layer in (saved or {}).items() if "dense" in layer}
        trained = self.steps > 0 and saved is None
        for name, layout in layouts.items():
            mask = self._masks[name]
            if isinstance(mask, StoredBlocks) and mask.changes(layout, dense.get(name)):
                mask.check(self._name, self._optimizers, trained)
        for name, layout in layouts.items():
            mask = self._masks[name]
            if isinstance(mask, StoredBlocks):
                mask.set(layout, self._optimizers, dense.get(name))
            else:
                mask.set(layout)

    def _end(self) -> None:
        self._regrowth.stop()
        self._masks = {}

    @torch.no_grad()
    def _apply(self) -> None:
        for name, mask in self._masks.items():
            if isinstance(mask, BlockMask):
                _original(self._layers[name]).masked_fill_(~mask.element_mask(), 0.0)


def _first_balanced(options: Mapping[str, LayerOptions]) -> str | None:
    return next((name for name, o in options.items() if o.balanced), None)


def _weight(layer: nn.Module) -> nn.Parameter:
    """The Parameter behind a dense weight, masked or not."""
    masked = parametrize.is_parametrized(layer, "weight")
    return _original(layer) if masked else layer.weight  # type: ignore[return-value]


def _original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]


def _unmask(layer: nn.Module, masked: bool) -> None:
    """End a parametrization, with the masked or the original weight."""
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=masked)
    bias = layer._parameters.pop("bias")  # the weight comes first again, as optimizers count
    layer._parameters["bias"] = bias


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
