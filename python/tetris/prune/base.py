"""The life of a pruner: select, search, mask, follow the schedule, finalize."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import check_sparsity, check_weight, describe
from ..layout import BlockLayout
from ..layout_search import select_blocks
from ..nn.base import make_sparse
from ..nn.kinds import DENSE_TYPES, DenseLayer, groups_of, oriented, sparse_type
from .allocate import allocate, scored
from .masks import BlockMask
from .options import LayerOptions, LayerOverride, shows_settings
from .plan import Plan, Scope, plan_layers
from .report import LayerReport, SparsifyReport
from .saliency import check_importance
from .schedule import Schedule, as_schedule
from .tree import (
    Selector,
    check_hooks,
    copy_or_same,
    layer_options,
    replace_modules,
    select_layers,
)

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BlockPruner:
    """Masks blocks of weights while a model trains, and makes it sparse in the end.

    A method overrides :meth:`saliency`, and :meth:`update` if masks follow something else than the
    schedule. Permutations are searched once, when the pruner is made, at the final sparsity;
    masks are chosen under them from then on. Masks act through a parametrization of ``weight``, so
    forward and gradients see the masked weight, and :meth:`step` also zeroes the Parameter, which
    momentum and weight decay have moved. Parameters stay the objects they were: optimizers made
    before or after work alike.

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
            bring removed blocks back, with zero weights.
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
        self.progress = progress
        self.steps = 0
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
        self._skipped = selection.skipped
        self._layers = selection.layers
        self._plans = self._search(
            {n: o.sparsity for n, o in self._layer_options.items()}, options.sparsity
        )
        self._targets = {n: p.options.sparsity for n, p in self._plans.items()}
        self._reached: dict[str, float] | None = None
        self._masks: dict[str, BlockMask] = {}
        try:
            for name, layer in self._layers.items():
                mask = BlockMask(
                    self._plans[name].layout.to(layer.weight.device),
                    transposed=isinstance(layer, nn.ConvTranspose2d),
                )
                mask.block_mask.fill_(True)
                parametrize.register_parametrization(layer, "weight", mask)
                self._masks[name] = mask
            self.update()
        except BaseException:
            for name in self._masks:  # nothing has been zeroed yet
                _unmask(self._layers[name], masked=False)
            raise
        self._apply()

    # -- what a method overrides --------------------------------------------------------------

    def saliency(self, name: str, layer: DenseLayer) -> Tensor:
        """Worth of each weight of a layer: shaped like it, float32, non-negative, on the CPU.

        ``layer.weight`` is the masked weight.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement saliency(name, layer)")

    def update(self) -> None:
        """Choose the masks that hold after ``self.steps`` steps, if they differ from now."""
        sparsity = {n: self._scheduled(t) for n, t in self._targets.items()}
        if sparsity == self._reached:
            return
        if self._reached is None and sparsity == self._targets:
            layouts = {n: p.layout for n, p in self._plans.items()}
        else:
            layouts = self._choose(sparsity)
        for name, layout in layouts.items():
            self._masks[name].set(layout)
        self._reached = sparsity

    # -- the training loop --------------------------------------------------------------------

    def step(self) -> None:
        """Call after each ``optimizer.step()``: follow the schedule, zero what is masked."""
        self._check_attached("step")
        self.steps += 1
        self.update()
        self._apply()

    @property
    def sparsity(self) -> float:
        """Removed share of the blocks of all layers, now."""
        masks = [m.block_mask for m in self._masks.values()]
        return 1.0 - sum(int(m.sum()) for m in masks) / sum(m.numel() for m in masks)

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
        for name, layer in self._layers.items():
            check_hooks(self._name, name, layer)
            check_weight(f"{self._name}.finalize: layer {name!r}", _original(layer))
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
        target = copy_or_same(self.model, inplace)
        new: dict[str, nn.Module] = {}
        for name, mask in self._masks.items():
            layer = target.get_submodule(name)
            assert isinstance(layer, DenseLayer)
            layout = mask.layout()
            values = nn.Parameter(
                layout.pack(oriented(layer, layer.weight)),
                requires_grad=_original(layer).requires_grad,
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
            self._masks = {}
        return target

    def remove(self) -> nn.Module:
        """Make the model an ordinary dense one again, with the masked weights; end the pruner."""
        self._check_attached("remove")
        for name in self._masks:
            _unmask(self._layers[name], masked=True)
        self._masks = {}
        return self.model

    # -- checkpoints --------------------------------------------------------------------------

    def state_dict(self) -> dict[str, Any]:
        """Steps, sparsities, masks and permutations: with the model's state, all to resume from."""
        return {
            "steps": self.steps,
            "targets": dict(self._targets),
            "reached": None if self._reached is None else dict(self._reached),
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
        pruner in both programs, or before it in both.

        Raises:
            ValueError: the state is of other layers, blocks or shapes; nothing is changed then.
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
        layouts = {}
        for name, mask in self._masks.items():
            saved = layers[name]
            if tuple(saved["block"]) != mask.block:
                raise ValueError(
                    f"{self._name}.load_state_dict: layer {name!r} has blocks of {mask.block} here "
                    f"and {tuple(saved['block'])} in the state; make the pruner with the same block"
                )
            layouts[name] = mask.layout_of(
                saved["block_mask"], saved["row_perm"], saved["col_perm"]
            )
        for name, layout in layouts.items():
            self._masks[name].set(layout)
        self.steps = int(state["steps"])
        self._targets = dict(state["targets"])
        self._reached = None if state["reached"] is None else dict(state["reached"])
        self._apply()

    # -- inside -------------------------------------------------------------------------------

    @property
    def _name(self) -> str:
        return type(self).__name__

    def _check_attached(self, method: str) -> None:
        if not self._masks:
            raise RuntimeError(
                f"{self._name}.{method}: the pruner has ended (remove() or "
                "finalize(inplace=True)); make a new one to prune further"
            )

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
            blocks = blocks.to(mask.block_mask.device)
            result[name] = mask.layout_of(blocks, mask.row_perm, mask.col_perm)
        return result

    @torch.no_grad()
    def _apply(self) -> None:
        for name, mask in self._masks.items():
            _original(self._layers[name]).masked_fill_(~mask.element_mask(), 0.0)


def _original(layer: nn.Module) -> nn.Parameter:
    return layer.parametrizations.weight.original  # type: ignore[union-attr,return-value]


def _unmask(layer: nn.Module, masked: bool) -> None:
    """End a parametrization, with the masked or the original weight."""
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=masked)
    bias = layer._parameters.pop("bias")  # the weight comes first again, as optimizers count
    layer._parameters["bias"] = bias


def _mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)
