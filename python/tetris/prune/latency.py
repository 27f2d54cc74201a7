"""Time as a target: which layers become sparse, in which blocks, and how sparse."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from numbers import Real
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from ..checks import check_block, check_weight, describe
from ..cost import store
from ..cost.calls import Call, ModelTimes, calls_of, check_on_cpu, measured_times
from ..cost.features import Point
from ..cost.model import CostModel, come_from_memory
from ..cost.problem import Problem, Stored
from ..cost.trials import relative_time, times_with
from ..nn.kinds import DenseLayer, groups_of, oriented
from ..progress import steps
from ..timing import ms_text
from ..warn import warn
from . import ranks
from .curves import Candidate, retained_at
from .options import LayerOptions
from .refine import TRIALS, OutOfReachError, refine
from .saliency import layer_saliency, prepare_importance
from .stand_ins import stand_ins, tied_positions
from .target import Budget, Target
from .tree import Selection, fitting_block

BLOCKS = ((4, 1), (8, 1), (16, 1), (8, 8), (16, 16), (32, 32))
"""Block shapes that ``block="auto"`` chooses from."""
DENSITIES = tuple(0.97**i for i in range(4, 129))
"""Shares of the blocks that are tried, from 0.89 to 0.02: each step is as much as a budget may be
missed by, for models that are one large layer."""
_NO_TIMES = "give a sparsity= or another target, which need no times"


@dataclass(frozen=True)
class LatencyPlan:
    """What a latency target chose, in milliseconds of the whole model for the example.

    Where a share of the dense model's time was asked for, times are relative to it: it takes turns
    with what is measured, so that a machine that has become slower or faster in between does not
    count. Milliseconds that were asked for are compared with what the clock says.

    Attributes:
        dense_ms: Of the dense model, measured.
        budget_ms: That were asked for.
        other_ms: Of everything but the layers that could be pruned, measured: it stays.
        predicted_ms: Of the choice, before it was measured.
        measured_ms: Of the sparse model (one that is pruned in place: as the clock says, there is
            no dense one left). Of a pruner's, which is not sparse yet, what ``trials`` say.
        threads: That all this is for.
        source: Where the figures of the cost model come from.
        trials: Predicted and measured milliseconds of each choice that was measured, in turn, with
            blocks at random places. The first one is predicted by the cost model alone.
    """

    dense_ms: float
    budget_ms: float
    other_ms: float
    predicted_ms: float
    measured_ms: float
    threads: int
    source: str
    trials: tuple[tuple[float, float], ...]

    def __str__(self) -> str:
        tried = ", then ".join(
            f"{ms_text(p)} predicted, {ms_text(m)} measured" for p, m in self.trials
        )
        return (
            f"latency: asked for {ms_text(self.budget_ms)}, "
            f"predicted {ms_text(self.predicted_ms)}, measured {ms_text(self.measured_ms)} "
            f"({self.measured_ms / self.budget_ms:.1%} of what was asked for); dense "
            f"{ms_text(self.dense_ms)}, of which {ms_text(self.other_ms)} stay as they are "
            f"({self.threads} thread{'s' * (self.threads > 1)}; cost model {self.source}; "
            f"tried: {tried})"
        )


class _Decision(NamedTuple):
    """What was chosen for the first layer of each weight, and what from."""

    plan: LatencyPlan
    chosen: dict[str, Candidate]
    candidates: Mapping[str, Sequence[Candidate]]


@dataclass(frozen=True)
class Latency(Target):
    """Time of the *whole* model for given inputs: ``Latency(0.5, x)`` or ``Latency(ms=3, ...)``.

    The dense model is measured on the example, with torch's current number of threads, and so are
    the layers within it; what the others take stays. For each layer that may be pruned a curve of
    predicted time against retained saliency is made (:mod:`tetris.cost`), over sparsities and, if
    ``blocks`` names several, over block shapes. Predictions are scaled by one factor, such that
    those of the dense layers add up to what was measured. Then each layer gets the block and
    sparsity with which all together retain the most saliency in the time that there is. A layer
    stays dense where no sparse one would be faster, or where the time suffices. Saliency of
    different layers is compared number by number, as with ``scope="global"``, which has no other
    effect here.

    What was chosen is measured, with blocks at random places, for a share in turns with the dense
    model. The predictions are corrected layer by layer, and the choice is made again, until it
    takes between 97 and 100 % of the time that there is, or five were measured. That takes some
    seconds, and as much memory as the chosen layers.

    What overrides fix is kept: a layer with a ``sparsity`` of its own counts by its predicted time,
    one with a ``block`` is tried with this block only.
    Retained saliency is estimated in the order that sorting by norm gives: a search for each
    candidate would take minutes.

    Attributes:
        kept: Share of the dense model's time, a float in (0, 1); or None.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of
            them by name. The whole batch counts.
        ms: Milliseconds, in place of a share.
        blocks: Block shapes to choose from for each layer, :data:`BLOCKS` for example; None: each
            has that of its settings.
        cost: Cost model; by default that of this machine (see :func:`tetris.calibrate`), or the
            library's own if nothing was calibrated.

    Times are measured anew whenever the target is used, so two uses may choose differently: a
    program that resumes its training makes its pruner from what was chosen at first,
    ``report.overrides()`` (see ``docs/training.md``). Processes that train together choose alike.

    Raises:
        ValueError: neither or both of ``kept`` and ``ms``; when the target is used: the dense
            model is fast enough, or no choice is, measured (the message says what can be
            reached); a layer has no kernels, such as half precision on the CPU; one is not on the
            CPU, for which times are predicted and measured.

    Warns:
        UserWarning: the last choice takes longer than asked for, as on a machine whose other work
            disturbs the measurements.

    Example:
        >>> target = tetris.prune.Latency(0.5, torch.randn(32, 512))
        >>> pruner = tetris.prune.TetrisPruner(model, target=target, exclude="classifier")
    """

    kept: float | None = None  # type: ignore[assignment]
    example_inputs: Any = field(default=None, repr=False)
    ms: float | None = None
    blocks: Sequence[tuple[int, int]] | None = None
    cost: CostModel | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        where = "tetris.prune.Latency"
        if (self.kept is None) == (self.ms is None):
            raise ValueError(
                f"{where}: pass either a share of the dense model's time, such as 0.5, or ms= "
                f"(got {'neither' if self.ms is None else 'both'})"
            )
        if self.kept is not None and not (_is_number(self.kept) and 0.0 < self.kept < 1.0):
            raise ValueError(
                f"{where}: kept must be a share of the dense model's time between 0 and 1; for "
                f"milliseconds pass ms= (got {describe(self.kept)})"
            )
        if self.ms is not None and not (_is_number(self.ms) and 0.0 < self.ms < math.inf):
            raise ValueError(
                f"{where}: ms must be a positive number of milliseconds (got {describe(self.ms)})"
            )
        if self.example_inputs is None:
            raise ValueError(
                f"{where}: example_inputs must be what the model is called with, a tensor, a tuple "
                "or a dict: time depends on their size (got None)"
            )
        if self.cost is not None and not isinstance(self.cost, CostModel):
            raise TypeError(
                f"{where}: cost must be a tetris.cost.CostModel (got {describe(self.cost)})"
            )
        if self.blocks is not None:
            if not self.blocks:
                raise ValueError(f"{where}: blocks must name a block shape (got none)")
            blocks = tuple(check_block(f"{where}: blocks", block) for block in self.blocks)
            object.__setattr__(self, "blocks", blocks)

    @classmethod
    def asked(
        cls,
        where: str,
        latency: float | str,
        example_inputs: Any,
        blocks: Sequence[tuple[int, int]] | None,
    ) -> Latency:
        """The target that ``latency=0.5`` or ``latency="3 ms"`` stands for."""
        if example_inputs is None:
            raise ValueError(
                f"{where}: latency= needs example_inputs=, what the model is called with: time "
                "depends on their size (got None)"
            )
        if isinstance(latency, str):
            found = re.fullmatch(r"\s*([0-9.]+(?:e-?\d+)?)\s*(s|ms|us)\s*", latency)
            if found is None or not _is_float(found[1]):
                raise ValueError(
                    f"{where}: latency must be a share of the dense model's time, such as 0.5, or "
                    f"a time such as '3 ms', in s, ms or us (got {latency!r})"
                )
            ms = float(found[1]) * {"s": 1e3, "ms": 1.0, "us": 1e-3}[found[2]]
            return cls(None, example_inputs, ms, blocks)
        if not (_is_number(latency) and 0.0 < latency < 1.0):
            raise ValueError(
                f"{where}: latency must be a share of the dense model's time between 0 and 1, or a "
                f"time such as '3 ms' (got {describe(latency)})"
            )
        return cls(latency, example_inputs, None, blocks)

    def costs(self, model: nn.Module, layers: Mapping[str, DenseLayer]) -> dict[str, float]:
        """Predicted seconds of each dense layer for one of its weights."""
        where = "tetris.prune.Latency"
        check_on_cpu(where, layers, _NO_TIMES)
        calls = calls_of(where, model, layers, self.example_inputs)
        cost, cold = self.cost or store.load(), _weights_come_from_memory(model)
        return {
            n: _seconds(cost, own, [None], cold).item() / own[0].problem.weights
            for n, own in calls.items()
        }

    def resolve(
        self,
        where: str,
        model: nn.Module,
        selection: Selection,
        asked: LayerOptions,
        options: Mapping[str, LayerOptions],
        fixed: set[str],
        together: bool,
        progress: bool,
    ) -> tuple[Budget, LayerOptions, dict[str, LayerOptions]]:
        """Choose for every layer; those that stay dense leave the selection."""

        def decide() -> _Decision:
            with steps(progress, "measuring", 1 + TRIALS) as advance:
                return self._decide(where, model, selection, options, fixed, advance)

        # Each process would measure other times, and then train other layers.
        plan, chosen, candidates = ranks.first(decide) if together else decide()
        result = dict(options)
        for first, candidate in chosen.items():
            for name in selection.tied[first]:
                if candidate.block is None:
                    result.pop(name)
                else:
                    result[name] = replace(
                        options[name], block=candidate.block, sparsity=candidate.sparsity
                    )
        _leave_dense(selection, candidates, chosen)
        over = plan.measured_ms / plan.budget_ms
        if over > 1.0:
            warn(
                f"{where}: the choice takes {ms_text(plan.measured_ms)}, measured, "
                f"{over - 1.0:.1%} more than the latency target of {ms_text(plan.budget_ms)}; "
                "measure again where other programs disturb less, or ask for less time"
            )
        if not selection.layers:
            raise ValueError(
                f"{where}: no sparse layer would be faster than the dense one here: "
                + "; ".join(f"{n!r}: {selection.skipped[n]}" for n in chosen)
            )
        fixed.update(selection.layers)  # their sparsity is decided
        return Budget(plan.budget_ms / plan.dense_ms, {}, plan), asked, result

    def _decide(
        self,
        where: str,
        model: nn.Module,
        selection: Selection,
        options: Mapping[str, LayerOptions],
        fixed: set[str],
        advance: Callable[[], None],
    ) -> _Decision:
        """What to choose, and for the first layer of each weight what was chosen from what."""
        layers = selection.layers
        check_on_cpu(where, layers, _NO_TIMES)
        for name, layer in layers.items():
            check_weight(f"{where}: layer {name!r}", layer.weight)
        calls = calls_of(where, model, layers, self.example_inputs)
        times = measured_times(model, layers, self.example_inputs)
        advance()
        dense = times.total
        budget = self.kept * dense if self.kept is not None else 1e-3 * (self.ms or 0.0)
        if budget >= dense:
            raise ValueError(
                f"{where}: the dense model takes {ms_text(1e3 * dense)}, within the latency target "
                f"of {ms_text(1e3 * budget)}: there is nothing to prune"
            )
        cost = self.cost or store.load()
        candidates = self._all_candidates(
            where, model, selection, options, fixed, calls, times, cost
        )

        # A share is one of what the dense model takes at the same time.
        reference = None if self.kept is None else dense

        def measure(chosen: Mapping[str, Candidate]) -> ModelTimes:
            sparse = stand_ins(where, selection, options, calls, chosen)
            found = times_with(model, layers, sparse, self.example_inputs, reference)
            advance()
            own = {f: sum(found.layers[n] for n in selection.tied[f]) for f in chosen}
            return replace(found, layers=own)

        something = Stored((1, 1), 1, 1)
        families = {f: Point(calls[f][0].problem, something).family for f in candidates}
        try:
            result = refine(candidates, families, times.others, budget, measure)
        except OutOfReachError as error:
            raise ValueError(
                f"{where}: the latency target of {ms_text(1e3 * budget)} is out of reach: the "
                f"least that can be reached is {ms_text(1e3 * error.least)}, measured "
                f"({error.least / dense:.0%} of the dense model's {ms_text(1e3 * dense)}; "
                f"{ms_text(1e3 * times.others)} are not of the layers to prune); ask for more "
                "time, allow other blocks, or exclude fewer layers"
            ) from None
        plan = LatencyPlan(
            dense_ms=1e3 * dense,
            budget_ms=1e3 * budget,
            other_ms=1e3 * times.others,
            predicted_ms=1e3 * result.best.predicted,
            measured_ms=1e3 * result.best.measured,
            threads=torch.get_num_threads(),
            source=cost.source_for(torch.get_num_threads()),
            trials=tuple((1e3 * t.predicted, 1e3 * t.measured) for t in result.trials),
        )
        return _Decision(plan, dict(result.best.chosen), result.candidates)

    def measured(
        self, plan: LatencyPlan, result: nn.Module, dense: nn.Module | None
    ) -> LatencyPlan:
        """The plan with the time of the sparse model in it.

        Args:
            plan: What was chosen.
            result: The sparse model.
            dense: The dense one, for a share of its time to take turns with; None if there is none
                left.
        """
        if dense is None or self.kept is None:
            taken = 1e3 * measured_times(result, {}, self.example_inputs).total
        else:
            taken = plan.dense_ms * relative_time(result, dense, self.example_inputs)
        return replace(plan, measured_ms=taken)

    def _all_candidates(
        self,
        where: str,
        model: nn.Module,
        selection: Selection,
        options: Mapping[str, LayerOptions],
        fixed: set[str],
        calls: Mapping[str, list[Call]],
        times: ModelTimes,
        cost: CostModel,
    ) -> dict[str, list[Candidate]]:
        """Name of the first of each group of tied layers -> what they could be."""
        cold = _weights_come_from_memory(model)
        scale = _scale(cost, calls, times, cold)
        saliency = _saliency(where, model, selection, options)
        result: dict[str, list[Candidate]] = {}
        for first, group in selection.tied.items():
            own = [call for name in group for call in calls[name]]
            result[first] = self._candidates(
                where, selection.layers[first], own[0].problem, options[first], first in fixed,
                first in selection.own_block, saliency[first],
                sum(times.layers[name] for name in group),
                lambda stored, own=own: scale * _seconds(cost, own, stored, cold),
            )  # fmt: skip
        return result

    def _candidates(
        self,
        where: str,
        layer: DenseLayer,
        problem: Problem,
        options: LayerOptions,
        fixed: bool,
        own_block: bool,
        saliency: Tensor,
        dense: float,
        seconds: Callable[[Sequence[Stored]], np.ndarray],
    ) -> list[Candidate]:
        """The dense layer, and sparse ones of all blocks; or the one that is fixed."""
        result = [] if fixed else [Candidate(dense, float(saliency.double().sum()))]
        given = fixed or own_block or self.blocks is None
        shapes = [options.block] if given else self.blocks or ()
        groups = groups_of(layer)
        for block in dict.fromkeys(fitting_block(layer, b) for b in shapes):
            blocked = replace(options, block=block)
            sparsities = [options.sparsity] if fixed else [1.0 - d for d in DENSITIES]
            tied = tied_positions(problem, options)
            stored = [*dict.fromkeys(Stored.of(problem, block, s, tied) for s in sparsities)]
            total = math.prod(problem.blocking(block).grid)
            kept = retained_at(where, saliency, blocked, groups, [s.blocks for s in stored])
            for what, retained, taken in zip(stored, kept, seconds(stored).tolist(), strict=True):
                sparsity = options.sparsity if fixed else (total - what.blocks) / total
                result.append(Candidate(taken, retained, block, sparsity))
        return result


def _is_float(text: str) -> bool:
    try:
        return float(text) > 0.0
    except ValueError:
        return False


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def _weights_come_from_memory(model: nn.Module) -> bool:
    return come_from_memory(sum(p.numel() * p.element_size() for p in model.parameters()))


def _seconds(
    cost: CostModel, own: Sequence[Call], stored: Sequence[Stored | None], cold: bool
) -> np.ndarray:
    """All calls of a layer, storing one or the other; a weight used again at once is in cache."""
    seconds = np.zeros(len(stored))
    for i, call in enumerate(own):
        points = [Point(call.problem, what, cold and i == 0) for what in stored]
        seconds += cost.seconds_of(points)
    return seconds


def _scale(
    cost: CostModel, calls: Mapping[str, list[Call]], times: ModelTimes, cold: bool
) -> float:
    predicted = sum(_seconds(cost, own, [None], cold).item() for own in calls.values())
    return sum(times.layers.values()) / predicted


def _saliency(
    where: str, model: nn.Module, selection: Selection, options: Mapping[str, LayerOptions]
) -> dict[str, Tensor]:
    """Name of the first of each group of tied layers -> [out, in / groups, ...]."""
    prepare_importance(model, selection.layers, options)
    result = {}
    for first, group in selection.tied.items():
        parts = [
            layer_saliency(where, n, selection.layers[n], options[n].importance) for n in group
        ]
        result[first] = oriented(selection.layers[first], sum(parts[1:], start=parts[0]))
    return result


def _leave_dense(
    selection: Selection,
    candidates: Mapping[str, Sequence[Candidate]],
    chosen: Mapping[str, Candidate],
) -> None:
    """Take layers out of a selection whose dense candidate was chosen, and say why."""
    for first, candidate in chosen.items():
        if candidate.block is not None:
            continue
        fastest = min((c.seconds for c in candidates[first] if c.block is not None), default=0.0)
        reason = (
            f"the time suffices: dense {ms_text(1e3 * candidate.seconds)}, sparse from "
            f"{ms_text(1e3 * fastest)} (predicted)"
            if fastest < candidate.seconds
            else f"no sparse one is predicted to be faster than the dense layer's "
            f"{ms_text(1e3 * candidate.seconds)}"
        )
        for name in selection.tied.pop(first):
            del selection.layers[name]
            selection.skipped[name] = reason
