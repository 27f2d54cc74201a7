"""CostModel: the coefficients of one machine, and the time they predict."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from ..checks import describe
from ..machine import last_level_bytes
from .features import COEFFICIENTS, FAMILIES, TILES, Point, features, parts, seconds
from .fit import fit

FORMAT = 2

Coefficients = Mapping[str, tuple[float, ...]]
"""Family -> ten positive numbers, nanoseconds; see :mod:`tetris.cost.features`."""


@dataclass(frozen=True)
class CostModel:
    """Predicts how long a layer takes, dense (as torch computes it) or sparse.

    Attributes:
        cpu: Processor it was calibrated on.
        isa: Instruction set of the kernels.
        version: Of this library.
        threads: Number of threads -> coefficients.
        errors: Number of threads -> family -> median relative error on the points it was fitted to.
        source: Where it comes from, for reports.

    Example:
        >>> model = tetris.cost.load()
        >>> problem = tetris.cost.Problem.linear(tokens=512, inputs=1024, outputs=4096)
        >>> dense = model.seconds(tetris.cost.Point(problem))
        >>> stored = tetris.cost.Stored.of(problem, block=(16, 1), sparsity=0.9)
        >>> dense / model.seconds(tetris.cost.Point(problem, stored))  # predicted speed-up
    """

    cpu: str
    isa: str
    version: str
    threads: Mapping[int, Coefficients]
    errors: Mapping[int, Mapping[str, float]] = field(default_factory=dict)
    source: str = "calibrated"

    def seconds(self, point: Point, threads: int | None = None) -> float:
        """Predicted seconds of one call.

        Args:
            point: The layer and what it stores.
            threads: By default torch's. Of a count that was not calibrated, the next smaller one
                that was gives the coefficients.
        """
        return float(self.seconds_of([point], threads)[0])

    def seconds_of(self, points: Sequence[Point], threads: int | None = None) -> np.ndarray:
        """Predicted seconds of each of several points of one family, in a fraction of the time."""
        threads = threads or torch.get_num_threads()
        f = np.stack([features(point, threads, self.isa) for point in points])
        return seconds(f, self._coefficients(points[0].family, threads))

    def parts(self, point: Point, threads: int | None = None) -> dict[str, float]:
        """The same seconds by what they go into: ``call``, ``weights`` and ``activations``.

        A call's overhead and the copies of activations stay, however few weights are left.
        """
        threads = threads or torch.get_num_threads()
        f = features(point, threads, self.isa)
        return parts(f, self._coefficients(point.family, threads))

    def source_for(self, threads: int) -> str:
        """Where times come from, and for which numbers of threads if not for this one."""
        if threads in self.threads:
            return self.source
        counts = sorted(self.threads)
        plural = "s" * (counts != [1])
        return f"{self.source}, on {' and '.join(map(str, counts))} thread{plural} only"

    def _coefficients(self, family: str, threads: int) -> np.ndarray:
        known = max((t for t in self.threads if t <= threads), default=min(self.threads))
        return np.asarray(self.threads[known][family])

    def fitted(self, threads: int, points: Iterable[Point], measured: Iterable[float]) -> CostModel:
        """This model with the coefficients for a number of threads fitted to measurements.

        Args:
            threads: That the points were measured on.
            points: Layers, some of each family; families without any stay as they are.
            measured: Seconds of each.
        """
        groups: dict[str, tuple[list[Point], list[float]]] = {}
        for point, taken in zip(points, measured, strict=True):
            own = groups.setdefault(point.family, ([], []))
            own[0].append(point)
            own[1].append(taken)
        known = self.threads.get(threads) or self.threads[max(self.threads)]
        coefficients, errors = dict(known), dict(self.errors.get(threads, {}))
        for family, (own, taken) in groups.items():
            f, y = np.stack([features(p, threads, self.isa) for p in own]), np.asarray(taken)
            found = fit(f, y, np.asarray(known[family]))
            coefficients[family] = tuple(float(c) for c in found)
            errors[family] = float(np.median(relative_error(seconds(f, found), y)))
        return replace(
            self,
            threads={**self.threads, threads: coefficients},
            errors={**self.errors, threads: errors},
        )

    # -- files --------------------------------------------------------------------------------

    def to_json(self) -> str:
        """All of it but the source, as text."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": self.version,
                "cpu": self.cpu,
                "isa": self.isa,
                "coefficients": list(COEFFICIENTS),
                "threads": {
                    str(t): {f: [float(f"{c:.5g}") for c in own] for f, own in sets.items()}
                    for t, sets in self.threads.items()
                },
                "errors": {
                    str(t): {f: round(e, 4) for f, e in own.items()}
                    for t, own in self.errors.items()
                },
            },
            indent=1,
        )

    @classmethod
    def from_json(cls, text: str, source: str) -> CostModel:
        """What :meth:`to_json` wrote.

        Raises:
            ValueError: it is something else; the message says what is wrong.
        """
        try:
            content = json.loads(text)
            if content["format"] != FORMAT:
                raise ValueError(f"format {content['format']!r} is not {FORMAT}")
            if tuple(content["coefficients"]) != COEFFICIENTS:
                raise ValueError("the coefficients have other names")
            threads = {int(t): _coefficients(own) for t, own in content["threads"].items()}
            if not threads or min(threads) < 1:
                raise ValueError(f"numbers of threads are {sorted(threads)}")
            if content["isa"] not in TILES:
                raise ValueError(f"there is no instruction set {content['isa']!r}")
            errors = {
                int(t): {str(f): float(e) for f, e in own.items()}
                for t, own in content["errors"].items()
            }
            cpu, isa, version = (str(content[key]) for key in ("cpu", "isa", "version"))
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{type(error).__name__}: {error}") from error
        return cls(cpu, isa, version, threads, errors, source)

    def __str__(self) -> str:
        counts = ", ".join(map(str, sorted(self.threads)))
        return f"{self.source}: {self.cpu}, {self.isa}, tetris {self.version}, threads {counts}"


def _coefficients(own: dict[str, Any]) -> dict[str, tuple[float, ...]]:
    result = {}
    for family in FAMILIES:
        numbers = tuple(float(c) for c in own[family])
        if len(numbers) != len(COEFFICIENTS) or not all(0 < c < math.inf for c in numbers):
            raise ValueError(
                f"{family!r} needs {len(COEFFICIENTS)} positive numbers (got {describe(numbers)})"
            )
        result[family] = numbers
    return result


def relative_error(predicted: np.ndarray, measured: np.ndarray) -> np.ndarray:
    """By how much predictions are off, in either direction alike: 0.5 is half as long again."""
    return np.exp(np.abs(np.log(predicted) - np.log(measured))) - 1.0


def come_from_memory(weight_bytes: int) -> bool:
    """Weights of this size, used once in turn, come from memory each time: they exceed the cache.

    Half the last-level cache: activations and other programs want the rest.
    """
    return 2 * weight_bytes > last_level_bytes()
