"""Choosing by predictions that are corrected by measuring what was chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

from ..cost.calls import ModelTimes
from .curves import Candidate, choose

TOLERANCE = 0.03
"""A choice is good that takes less than the budget by no more than this share of it."""
TRIALS = 5
"""As many choices are measured at most."""

_AIM = 1.0 - TOLERANCE / 2  # for the middle of what is good


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

    Each layer has a factor for each block it was measured with, measured over predicted time, and
    one of the dense layer. With these factors the same choice would be predicted exactly, so what
    is left is by how much errors change with sparsity from one choice to the next. Blocks that a
    layer was not measured with have the factor of those that it was, together; a layer that was
    not measured as a sparse one has that of its family.

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
        # What no choice is predicted to reach may be reached all the same.
        chosen = choose(own, _AIM * budget - others) or _fastest(own)
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


class _Factors:
    """Measured over predicted seconds of layers, see :func:`refine`."""

    def __init__(self, families: Mapping[str, str]) -> None:
        self.families = families
        # name, block -> seconds, predicted before any correction and measured last
        self.seen: dict[tuple[str, tuple[int, int] | None], tuple[float, float]] = {}

    def applied(self, candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, list[Candidate]]:
        """The candidates with corrected seconds."""
        result = {}
        for name, own in candidates.items():
            factors = {block: self._of(name, block) for block in {c.block for c in own}}
            result[name] = [replace(c, seconds=c.seconds * factors[c.block]) for c in own]
        return result

    def note(self, chosen: Mapping[str, Candidate], seconds: Mapping[str, float]) -> None:
        """Learn from the seconds of layers; the candidates are corrected ones."""
        found = {}
        for name, candidate in chosen.items():
            if min(seconds[name], candidate.seconds) > 0.0:  # else nothing went through it
                predicted = candidate.seconds / self._of(name, candidate.block)
                found[name, candidate.block] = (predicted, seconds[name])
        self.seen.update(found)

    def _of(self, name: str, block: tuple[int, int] | None) -> float:
        if (name, block) in self.seen:
            return _factor([self.seen[name, block]])
        if block is None:  # dense layers have been measured before
            return 1.0
        sparse = [(n, both) for (n, b), both in self.seen.items() if b is not None]
        own = [both for n, both in sparse if n == name]
        like = [both for n, both in sparse if self.families[n] == self.families[name]]
        return _factor(own or like)


def _factor(seen: Sequence[tuple[float, float]]) -> float:
    """Measured over predicted seconds, of several together."""
    return sum(m for _, m in seen) / sum(p for p, _ in seen) if seen else 1.0


def _fastest(candidates: Mapping[str, Sequence[Candidate]]) -> dict[str, Candidate]:
    return {name: min(own, key=lambda c: c.seconds) for name, own in candidates.items()}


def _same(a: Mapping[str, Candidate], b: Mapping[str, Candidate]) -> bool:
    """The same blocks and sparsities, whatever was predicted."""
    return all((c.block, c.sparsity) == (b[n].block, b[n].sparsity) for n, c in a.items())
