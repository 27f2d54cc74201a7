"""When a pruner removes how much."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Real
from typing import Literal

from ..checks import describe, is_int

Schedule = Callable[[int, float], float]
"""``schedule(step, final)``: sparsity that holds after ``step`` optimiser steps, in [0, 1]."""


@dataclass(frozen=True)
class OneShot:
    """Everything at once, before the first step.

    Example:
        >>> OneShot()(0, 0.9)
        0.9
    """

    def __call__(self, step: int, final: float) -> float:
        """Return the final sparsity."""
        return final


@dataclass(frozen=True)
class Cubic:
    """Fast at first, slow towards the end: automated gradual pruning.

    ``s_t = s_f + (s_i - s_f) * (1 - t / T)^3`` with ``t = step - begin`` and ``T = end - begin``
    (Zhu and Gupta, "To prune, or not to prune", 2017, equation 1).

    Attributes:
        begin: Step at which pruning starts.
        end: Step from which the final sparsity holds.
        every: Masks change at every so many steps after ``begin``, and at ``end``.
        initial: Sparsity s_i at ``begin``; none before.

    Raises:
        ValueError: a number out of its range, or ``end`` not behind ``begin``.

    Example:
        >>> round(Cubic(begin=0, end=100)(50, 0.8), 3)
        0.7
    """

    begin: int
    end: int
    every: int = 1
    initial: float = 0.0

    def __post_init__(self) -> None:
        own = (self.begin, self.end, self.every, self.initial)
        if (
            not all(is_int(value) for value in own[:3])
            or not isinstance(self.initial, Real)
            or not 0 <= self.begin < self.end
            or self.every < 1
            or not 0.0 <= self.initial <= 1.0
        ):
            raise ValueError(
                "Cubic: needs whole numbers of steps, 0 <= begin < end, every >= 1 and initial in "
                f"[0, 1] (got begin {self.begin}, end {self.end}, every {self.every}, "
                f"initial {self.initial})"
            )

    def __call__(self, step: int, final: float) -> float:
        """Return the sparsity after ``step`` steps."""
        if step < self.begin:
            return 0.0
        if step >= self.end:
            return final
        t = (step - self.begin) // self.every * self.every / (self.end - self.begin)
        return final + (min(self.initial, final) - final) * (1.0 - t) ** 3


def as_schedule(where: str, schedule: Literal["one_shot"] | Schedule) -> Schedule:
    """The schedule that a ``schedule`` argument stands for.

    Raises:
        ValueError: it is none.
        TypeError: it is a function that does not take two arguments.
    """
    if isinstance(schedule, str):
        if schedule == "one_shot":
            return OneShot()
    elif callable(schedule) and not isinstance(schedule, type):
        _check_arguments(where, schedule)
        return schedule
    raise ValueError(
        f"{where}: schedule must be 'one_shot', tetris.prune.Cubic(begin, end, every) or a "
        f"function (step, final sparsity) -> sparsity (got {describe(schedule)})"
    )


def _check_arguments(where: str, schedule: Schedule) -> None:
    try:
        signature = inspect.signature(schedule)
    except (TypeError, ValueError):  # some that are written in C tell nothing
        return
    try:
        signature.bind(0, 0.5)
    except TypeError as error:
        raise TypeError(
            f"{where}: schedule must take two arguments, (step, final sparsity), and return the "
            f"sparsity (got {describe(schedule)} of {signature})"
        ) from error
