"""Choosing by predictions that are corrected by measuring what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from ..cost.calls import ModelTimes
from .curves import Candidate, choose

TOLERANCE = 0.03
"""A choice is good that takes less than the budget by no more than this share of it."""
TRIALS = 5
"""As many choices are measured at most."""

_MARGIN = TOLERANCE / 2  # aims for the middle of what is good
_NEAR = 1.1  # stored shares of the blocks that differ by less are near each other


class OutOfReachError(Exception):
    """No choice keeps the budget; ``least`` are the seconds of the fastest one."""

    def __init__(self, least: float) -> None:
        super().__init__(f"{least:.3g} s")
        self.least = least


@dataclass(frozen=True)
class Trial:
    """A choice, and how long the model takes with it.

    Attributes:
        chosen: name -> candidate, its seconds as they were predicted.
        predicted: Seconds of the model.
        measured: Seconds of the model.
    """

    chosen: Mapping[str, Candidate]
    predicted: float
    measured: float

    @property
    def retained(self) -> float:
        """Saliency that is left in all layers."""
        return sum(c.retained for c in self.chosen.values())


@dataclass(frozen=True)
class Refined:
    """What was chosen in the end.

    Attributes:
        best: Of the trials that keep the budget the one that retains the most; the fastest one, if
            none does.
        trials: All, in turn.
        candidates: name -> what there was to choose from, with corrected seconds.
    """

    best: Trial
    trials: tuple[Trial, ...]
    candidates: Mapping[str, Sequence[Candidate]]


def refine(
    candidates: Mapping[str, Sequence[Candidate]],
    families: Mapping[str, str],
    others: float,
    budget: float,
    measure: Callable[[Mapping[str, Candidate]], ModelTimes],
) -> Refined:
    """Choose, measure, correct the predictions, and choose again, until the budget is met.

    Each layer has a factor, measured over predicted time, for each block and sparsity it was
    measured with, and one of the dense layer. Sparsities in between have factors in between. With
    these the same choice would be predicted exactly, so what is left is by how much errors change
    from one choice to the next. Blocks that a layer was not measured with have the factor of those
    that it was, together; a layer that was not measured as a sparse one has that of its family.

    Once a choice was too slow and another one was not, what lies between them is chosen from, block
    by block: predictions are surest there.

    While all were too slow, the third trial and each after it aims lower than the one before: where
    times are longer than predicted after a correction, too, as on a machine that gets busier, they
    would use up all trials.

    Stops with a choice that takes between ``1 - TOLERANCE`` and 1 of the budget, when there is
    nothing better to try, and after :data:`TRIALS` choices.

    Args:
        candidates: name of a layer -> what it could be, with predicted seconds.
        families: name of a layer -> kernels that it runs on when it is sparse.
        others: Seconds of all else in the model.
        budget: Seconds of the model.
        measure: Takes name -> candidate; seconds of the model, of these layers, and of all else.

    Raises:
        OutOfReachError: the fastest choice takes longer than the budget: it was measured, or what
            was measured says so.
    """
    factors = _Factors(families)
    trials: list[Trial] = []
    for _ in range(TRIALS):
        own = factors.applied(candidates)
        kept = [t for t in trials if t.measured <= budget]
        if 0 < len(kept) < len(trials):
            own = _between(own, trials)
        aim = 1.0 - _MARGIN * (1 if kept else max(1, len(trials)))
        # What no choice is predicted to reach may be reached all the same.
        chosen = choose(own, aim * budget - others) or _fastest(own)
        if any(_same(chosen, t.chosen) for t in trials):
            break
        predicted = others + sum(c.seconds for c in chosen.values())
        times = measure(chosen)
        factors.note(chosen, times.layers)
        others = times.others
        trials.append(Trial(chosen, predicted, times.total))
        if (1.0 - TOLERANCE) * budget <= times.total <= budget:
            break
    own = factors.applied(candidates)
    if kept := [t for t in trials if t.measured <= budget]:
        return Refined(max(kept, key=lambda t: t.retained), tuple(trials), own)
    least = others + sum(c.seconds for c in _fastest(own).values())
    if least > budget:
        raise OutOfReachError(min(least, *(t.measured for t in trials)))
    return Refined(min(trials, key=lambda t: t.measured), tuple(trials), own)


class _Seen(NamedTuple):
    """A layer that was measured: the candidate's sparsity, seconds before any correction, taken."""

    sparsity: float
    predicted: float
    measured: float


class _Factors:
    """Measured over predicted seconds of layers, see :func:`refine`."""

    def __init__(self, families: Mapping[str, str]) -> None:
        self.families = families
        self.seen: dict[tuple[str, tuple[int, int] | None], list[_Seen]] = {}

    def applied(self, candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, list[Candidate]]:
        """The candidates with corrected seconds."""
        return {
            name: [replace(c, seconds=c.seconds * self._of(name, c)) for c in own]
            for name, own in candidates.items()
        }

    def note(self, chosen: Mapping[str, Candidate], seconds: Mapping[str, float]) -> None:
        """Learn from the seconds of layers; the candidates are corrected ones."""
        found = {}
        for name, c in chosen.items():
            if min(seconds[name], c.seconds) > 0.0:  # else nothing went through it
                found[name, c] = _Seen(c.sparsity, c.seconds / self._of(name, c), seconds[name])
        for (name, c), seen in found.items():
            # What was measured last counts, where the same was measured before.
            others = self.seen.get((name, c.block), [])
            self.seen[name, c.block] = [s for s in others if s.sparsity != c.sparsity] + [seen]

    def _of(self, name: str, candidate: Candidate) -> float:
        block = candidate.block
        if own := self.seen.get((name, block)):
            own = sorted(own)
            at = [s.sparsity for s in own]
            return float(np.interp(candidate.sparsity, at, [s.measured / s.predicted for s in own]))
        if block is None:  # dense layers have been measured before
            return 1.0
        sparse = [(n, seen) for (n, b), seen in self.seen.items() if b is not None]
        own = [s for n, seen in sparse if n == name for s in seen]
        like = [s for n, seen in sparse if self.families[n] == self.families[name] for s in seen]
        if not (own or like):
            return 1.0
        return sum(s.measured for s in own or like) / sum(s.predicted for s in own or like)


def _between(
    candidates: Mapping[str, Sequence[Candidate]], trials: Sequence[Trial]
) -> dict[str, list[Candidate]]:
    """Candidates of blocks that were tried, no further than a little from what was stored then."""
    result = {}
    for name, own in candidates.items():
        stored: dict[tuple[int, int] | None, list[float]] = {}
        for trial in trials:
            tried = trial.chosen[name]
            stored.setdefault(tried.block, []).append(1.0 - tried.sparsity)
        result[name] = [
            c
            for c in own
            if c.block in stored
            and min(stored[c.block]) / _NEAR <= 1.0 - c.sparsity <= max(stored[c.block]) * _NEAR
        ]
    return result


def _fastest(candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, Candidate]:
    return {name: min(own, key=lambda c: c.seconds) for name, own in candidates.items()}


def _same(a: Mapping[str, Candidate], b: Mapping[str, Candidate]) -> bool:
    """The same blocks and sparsities, whatever was predicted."""
    return all((c.block, c.sparsity) == (b[n].block, b[n].sparsity) for n, c in a.items())
