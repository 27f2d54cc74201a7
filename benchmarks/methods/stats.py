"""Means, and differences between rows of equal seed."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from .experiment import Claim, Row

DIVERGED = "a run diverged"
"""In place of figures that there are not."""

LESS_IS_BETTER = ("latency_ms", "stored", "nll", "rmse", "ece")


def mean_sd(values: Iterable[float]) -> tuple[float, float]:
    """Mean and sample standard deviation; of one value the deviation is NaN."""
    array = np.asarray(list(values), dtype=float)
    if array.size == 0:
        raise ValueError("mean_sd: needs at least one value (got none)")
    return float(array.mean()), float(array.std(ddof=1)) if array.size > 1 else math.nan


@dataclass(frozen=True)
class Comparison:
    """A claim held against the rows.

    Attributes:
        claim: The claim.
        difference: Mean over seeds of better minus worse, positive if better is better.
        error: Its standard error, NaN for one seed.
        seeds: Number of seeds.
    """

    claim: Claim
    difference: float
    error: float
    seeds: int

    @property
    def holds(self) -> bool | None:
        """Whether the difference exceeds two standard errors; None if one seed cannot tell.

        None, too, if a run diverged.
        """
        return None if math.isnan(self.error) else self.difference > 2 * self.error

    def __str__(self) -> str:
        if math.isnan(self.difference):
            return DIVERGED
        error = "" if math.isnan(self.error) else f" ± {self.error:.4f}"
        return f"{self.difference:+.4f}{error}"


def compare(rows: Sequence[Row], claim: Claim) -> Comparison:
    """Hold a claim against rows, paired by seed.

    Raises:
        ValueError: no row, or more than one of a seed, has a name of the claim; the two sides have
            different seeds; a row lacks the figure.
    """
    better, worse = (by_seed(rows, name) for name in (claim.better, claim.worse))
    if better.keys() != worse.keys():
        raise ValueError(
            f"compare: {claim.better!r} and {claim.worse!r} must have the same seeds "
            f"(got {sorted(better)} and {sorted(worse)})"
        )
    sign = -1 if claim.field in LESS_IS_BETTER else 1
    differences = [
        sign * (figure(better[seed], claim.field) - figure(worse[seed], claim.field))
        for seed in sorted(better)
    ]
    difference, deviation = mean_sd(differences)
    return Comparison(claim, difference, deviation / math.sqrt(len(differences)), len(differences))


def by_seed(rows: Sequence[Row], name: str) -> dict[int, Row]:
    """Seed -> row, of the rows whose label, or failing that variant, has this name."""
    found = [row for row in rows if row.label == name]
    found = found or [row for row in rows if row.variant == name]
    if not found:
        known = ", ".join(dict.fromkeys(row.label for row in rows))
        raise ValueError(f"by_seed: no row is named {name!r} (there are {known or 'no rows'})")
    result = {row.seed: row for row in found}
    if len(result) < len(found):
        labels = ", ".join(dict.fromkeys(row.label for row in found))
        raise ValueError(f"by_seed: {name!r} names several rows of a seed (say which of {labels})")
    return result


def figure(row: Row, name: str) -> float:
    """A figure of a row, which must have it."""
    value = row.value(name)
    if value is None:
        raise ValueError(f"figure: row {row.label!r}, seed {row.seed}, has no {name!r}")
    return value
