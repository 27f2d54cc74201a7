"""Pruning by a saliency and a schedule."""

from __future__ import annotations

import math
from abc import abstractmethod
from collections.abc import Container, Iterable, Mapping
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..blocking import removed_count
from ..checks import check_sparsity, describe, plain
from ..layout import BlockLayout
from ..layout_search import shares
from ..nn.base import SparseLayer
from ..nn.kinds import DENSE_TYPES, DenseLayer, oriented
from ..relayout import all_blocks, layout_of_keys
from ..sharding import gathered
from ..warn import warn
from . import ranks
from .allocate import Scored, allocate
from .choose import choose_blocks
from .masks import MaskedWeight
from .options import LayerOptions, LayerOverride, shows_settings
from .orders import Share
from .plan import Scope
from .pruner import Execution, Pruner
from .regrow import Regrow, Regrowth
from .report import warn_of_shortfall
from .saliency import prepare_importance
from .schedule import Schedule, as_schedule
from .select import Units, keep_heaviest
from .states import check_generator, check_shares
from .target import Target
from .tree import Selector

if TYPE_CHECKING:
    from typing_extensions import Unpack


class BlockPruner(Pruner):
    """Removes the blocks that are worth least, as a schedule says.

    A method overrides :meth:`saliency`. Permutations are searched when the pruner is made, at the
    final sparsity, and masks are chosen under them from then on; ``search_at`` and
    ``search_every_update`` say when they are searched anew, of the weights as they are then.
    Removed weights are zero, so a new search deals out what is left: blocks may come back, with
    zeros where nothing was kept.

    Args:
        model: The model; this and the rest as for :class:`Pruner`.
        options: Settings of the layers, in place of ``settings``.
        schedule: ``"one_shot"``, :class:`Cubic`, or ``f(step, final sparsity) -> sparsity``.
        include: Layers to prune.
        exclude: Layers to leave alone.
        types: Exact types to prune.
        overrides: Settings for some layers.
        scope: ``"layer"`` or ``"global"``.
        share: Channels that several layers keep in one order, see :class:`SharedOrder`.
        target: What is to be left, in place of ``sparsity``.
        search_every_update: Search the permutations anew whenever the schedule removes more.
        search_at: Steps after which permutations are searched anew, whatever the schedule does: a
            set, or ``range(100, 1001, 100)``. Nothing is exchanged (``regrow``) at such a step. On
            stored blocks a search takes the memory of one dense layer at a time.
        execution: ``"masked"``, or ``"sparse"`` to train on stored blocks.
        optimizers: Whose states follow the stored blocks, one or several.
        regrow: Exchange stored blocks for others while training, see :class:`Regrow`. With
            ``execution="masked"`` pass ``optimizers``, too: what they keep of weights that come
            back starts at zero then, as it does on stored blocks.
        progress: Show progress bars during searches.
        **settings: ``sparsity``, ``block`` and the other fields of :class:`LayerOptions`.

    Example:
        >>> class Energy(tetris.prune.BlockPruner):
        ...     def saliency(self, name, layer):
        ...         return layer.weight.detach().square()
        >>> pruner = Energy(model, sparsity=0.75, block=(8, 8), exclude="classifier")
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
        share: Share = (),
        target: Target | None = None,
        search_every_update: bool = False,
        search_at: Container[int] = (),
        execution: Execution = "masked",
        optimizers: Optimizer | Iterable[Optimizer] = (),
        regrow: Regrow | None = None,
        progress: bool = False,
        **settings: Unpack[LayerOverride],
    ) -> None:
        self.schedule = schedule
        self.search_every_update = search_every_update
        self.search_at = search_at
        if not isinstance(search_at, Container) or isinstance(search_at, str):
            raise TypeError(
                f"{self.name}: search_at must hold step numbers, such as {{500}} or "
                f"range(100, 1001, 100) (got {describe(search_at)})"
            )
        self.regrow = regrow
        self._regrowth = Regrowth(self.name, regrow)
        super().__init__(
            model,
            options,
            include=include,
            exclude=exclude,
            types=types,
            overrides=overrides,
            scope=scope,
            share=share,
            target=target,
            execution=execution,
            optimizers=optimizers,
            progress=progress,
            **settings,
        )
        plans = self.search(self._saliencies())
        self._targets = {n: p.options.sparsity for n, p in plans.items()}
        self._reached: dict[str, float] | None = None
        warn_of_shortfall(
            self.name,
            {n: p.layout.sparsity for n, p in plans.items()},
            self._targets if scope == "layer" else {},
        )
        try:
            self._set({n: all_blocks(p.layout) for n, p in plans.items()})
            self.update()
        except BaseException:
            for mask in self._masks.values():
                if isinstance(mask, MaskedWeight):  # nothing has been zeroed yet
                    mask.unset(masked=False)
            raise
        self._apply()
        self._regrowth.watch(self.steps + 1, self.modules())

    @property
    def schedule(self) -> Schedule:
        """When how much goes; another may be set, which holds from the next step on."""
        return self._schedule

    @schedule.setter
    def schedule(self, schedule: Literal["one_shot"] | Schedule) -> None:
        self._schedule = as_schedule(self.name, schedule)

    # -- what a method overrides --------------------------------------------------------------

    @abstractmethod
    def saliency(self, name: str, layer: DenseLayer | SparseLayer) -> Tensor:
        """Worth of each weight of a layer: shaped like it, float32, non-negative, on the CPU.

        ``layer.weight`` is the masked weight. A layer that trains on stored blocks is a sparse
        one: the result is shaped like ``layer.values`` then, [nnzb, bi, bo].
        """

    def update(self) -> None:
        """Choose the masks that hold after ``self.steps`` steps, if they differ from now."""
        sparsity = {n: self._scheduled(t) for n, t in self._targets.items()}
        changed = sparsity != self._reached
        search = (changed and self.search_every_update) or (
            self.steps > 0 and self.steps in self.search_at
        )
        if not (changed or search or self._regrowth.share(self.steps)):
            return
        stored = self.execution == "sparse" or self.regrow is not None
        if stored and self._reached is not None:
            self._check_rising(sparsity)
        if self._reached is None and sparsity == self._targets:
            layouts = {n: p.layout for n, p in self._plans.items()}
        elif search:
            plans = self.search(
                self._saliencies(), sparsity, self._scheduled(self.options.sparsity)
            )
            layouts = {n: p.layout for n, p in plans.items()}
        elif stored:
            layouts = self._choose_stored(sparsity)
        else:
            layouts = self._choose(sparsity)
        self._set(ranks.first_layouts(layouts))
        self._reached = sparsity

    # -- the loop, and the end ----------------------------------------------------------------

    def step(self, *, skipped: bool = False) -> None:
        """Call once after each ``optimizer.step()``: follow the schedule, drop or zero what goes.

        Regrowth by gradient goes by all backward passes since the last call.

        Args:
            skipped: The optimizer has made no step; see :meth:`Pruner.step`.

        Raises:
            RuntimeError: blocks change, and no optimizer that was passed or attached holds them;
                blocks are to be regrown by gradient, and no backward pass has gone through a layer.
        """
        super().step(skipped=skipped)
        self._regrowth.watch(self.steps + 1, self.modules())

    def finalize(self, *, inplace: bool = False) -> nn.Module:
        """Return the model with sparse layers; see :meth:`Pruner.finalize`."""
        self._check_attached("finalize")
        blocks = {n: math.prod(layout.block_grid) for n, layout in self.layouts().items()}
        reached, end = self.sparsity, sum(self._targets[n] * b for n, b in blocks.items())
        result = super().finalize(inplace=inplace)
        if self._reached != self._targets:
            warn(
                f"{self.name}.finalize: the schedule has not ended ({self.steps} steps, "
                f"{reached:.1%} of blocks removed, {end / sum(blocks.values()):.1%} planned)"
            )
        return result

    def arguments(self) -> dict[str, Any]:
        """Also the schedule, and what changes blocks beside it."""
        return {
            **super().arguments(),
            "schedule": plain(self.schedule),
            "search_every_update": self.search_every_update,
            "search_at": plain(self.search_at),
            "regrow": plain(self.regrow),
        }

    def extra_state(self) -> dict[str, Any]:
        """Sparsities, and where the random choices are."""
        return {
            "targets": dict(self._targets),
            "reached": None if self._reached is None else dict(self._reached),
            "generator": self._regrowth.generator.get_state(),
        }

    def check_extra_state(self, where: str, state: Mapping[str, Any]) -> None:
        """Raise ValueError unless sparsities are of these layers, and the generator's state is."""
        super().check_extra_state(where, state)
        check_shares(where, "targets", state["targets"], self.layers)
        if state["reached"] is not None:
            check_shares(where, "reached", state["reached"], self.layers)
        check_generator(where, "generator", state["generator"])

    def load_extra_state(self, state: Mapping[str, Any]) -> None:
        """Take sparsities and the generator back."""
        self._targets = dict(state["targets"])
        self._reached = None if state["reached"] is None else dict(state["reached"])
        self._regrowth.generator.set_state(state["generator"])

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue where a pruner stopped; see :meth:`Pruner.load_state_dict`."""
        super().load_state_dict(state)
        self._regrowth.watch(self.steps + 1, self.modules())

    # -- inside -------------------------------------------------------------------------------

    def _check_execution(self) -> None:
        super()._check_execution()
        where = self.name
        balanced = next((name for name, o in self.layer_options.items() if o.balanced), None)
        if self.regrow is not None and balanced is not None:
            raise ValueError(
                f"{where}: regrow chooses blocks wherever they are, which balanced=True forbids "
                f"(layer {balanced!r}); leave one of them out"
            )

    def _copying(self) -> AbstractContextManager[None]:
        return self._regrowth.paused()

    def _end(self) -> None:
        self._regrowth.stop()
        super()._end()

    def _check_rising(self, sparsity: Mapping[str, float]) -> None:
        assert self._reached is not None
        for name, share in sparsity.items():
            if share < self._reached[name]:
                raise ValueError(
                    f"{self.name}.step: the schedule falls from {self._reached[name]:.1%} to "
                    f"{share:.1%} after {self.steps} steps (layer {name!r}), but what is "
                    "stored, or exchanged by regrow=, does not grow; use execution='masked' "
                    "without regrow"
                )

    def _scheduled(self, final: float) -> float:
        return min(
            final, check_sparsity(f"{self.name}: schedule", self.schedule(self.steps, final))
        )

    def _prepare(self) -> None:
        """Let importances that need data look at the model as it is: before a round of saliencies.

        What they pass through it is no step of training, so regrowth does not look.
        """
        with self._regrowth.paused():
            prepare_importance(self.model, self.modules(), self.layer_options)

    def _saliencies(self) -> dict[str, Tensor]:
        """Worth of each weight, in the shape of the dense layers' weights."""
        self._prepare()
        found = {}
        with gathered(self.model):
            for name, layer in self.modules().items():
                found[name] = self.saliency(name, layer)
                if isinstance(layer, SparseLayer):
                    layout = layer.layout.to("cpu")  # where saliencies are
                    found[name] = oriented(self.layers[name], layout.unpack(found[name]))
        return found

    def _choose(self, sparsity: dict[str, float]) -> dict[str, BlockLayout]:
        """Layouts of given sparsities, under the present permutations."""
        together = self._scheduled(self.options.sparsity)
        saliency = {
            n: ranks.mean(oriented(self.layers[n], s), self._masks[n].parameter.device)
            for n, s in self._saliencies().items()
        }
        return choose_blocks(
            saliency,
            self.layouts(),
            self._underway(together),
            sparsity,
            together if self.scope == "global" else None,
            self._fixed,
            self._costs(),
        )

    @torch.no_grad()
    def _choose_stored(self, sparsity: dict[str, float]) -> dict[str, BlockLayout]:
        """Layouts of given sparsities, chosen from stored blocks, and from others to exchange."""
        layouts = self.layouts()
        self._prepare()
        tied = {
            n: layout.blocking.positions if self.layer_options[n].tie_kernel else 1
            for n, layout in layouts.items()
        }
        units = {name: Units.of(layout, tied[name]) for name, layout in layouts.items()}
        with gathered(self.model):
            scores = {
                n: u.sums(self._stored_scores(n, layouts[n]), layouts[n]) for n, u in units.items()
            }
        if self.scope == "global":
            together = self._scheduled(self.options.sparsity)
            rated = {
                n: Scored(
                    scores[n],
                    o.block[0] * o.block[1] * tied[n] * self._costs().get(n, 1.0),
                    not o.allow_empty_rows,
                    units[n],
                    o.min_sparsity,
                    o.max_sparsity,
                )
                for n, o in self._underway(together).items()
                if n not in self._fixed
            }
            sparsity = {**sparsity, **(allocate(rated, together) if rated else {})}
        result = {}
        for name, layout in layouts.items():
            parts = units[name].split(layout.groups)
            rates = scores[name].split([len(part.keys) for part in parts])
            removed = removed_count(sparsity[name], units[name].total)
            keys = []
            for part, rate, own in zip(parts, rates, shares(removed, layout.groups), strict=True):
                kept = min(part.total - own, len(part.keys))
                keys.append(part.blocks(self._exchanged(name, part, rate, kept)))
            result[name] = layout_of_keys(layout, torch.cat(keys))
        return result

    def _exchanged(self, name: str, units: Units, scores: Tensor, kept: int) -> Tensor:
        """Keys of as many units as are kept: of what stays, and of what comes back."""
        # What comes back starts at zero, and would stay so in a layer that does not learn.
        learns = self._masks[name].parameter.requires_grad
        share = self._regrowth.share(self.steps) if learns else 0.0
        exchanged = min(round(share * kept), units.total - len(units.keys))
        options = self.layer_options[name]
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
        layer = self.modules()[name]
        saliency = self.saliency(name, layer)
        if isinstance(layer, SparseLayer):
            sums = saliency.sum((1, 2), dtype=torch.float64).float()
        else:
            weights, rows, cols = oriented(layer, saliency), layout.row_perm, layout.col_perm
            sums = layout.blocking.sums(weights.double(), rows, cols).float()
            sums = sums[layout.block_mask().to(sums.device)]
        return ranks.mean(sums.to(layout.device))
