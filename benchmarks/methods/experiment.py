"""What an experiment is: settings go in, rows come out, claims are held against them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Protocol

from .progress import Progress


@dataclass(frozen=True)
class Setting:
    """One run.

    Attributes:
        data: ``digits``, ``fashion``, or others that an experiment takes.
        seeds: One split, one dense network and one of each variant per seed.
        quick: A first look in a minute or so, with less training and fewer variants.
        out: Folder for results.
        root: Folder of the data, where they need one.
    """

    data: str = "digits"
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    quick: bool = False
    out: Path = Path("build/benchmarks/methods")
    root: Path | None = None


@dataclass(frozen=True)
class Row:
    """What one variant reached with one seed.

    Attributes:
        variant: Name in tables and plots; one line of a plot.
        seed: Rows of equal seed are paired: same split, same dense network, same batches.
        accuracy: On test data in the end, in [0, 1]; NaN if the training diverged.
        before: The same before fine-tuning, after a pass for batch norm.
        valid: On validation data in the end: what to choose by.
        epochs: Of training altogether, fine-tuning too.
        block: (bo, bi), if the variant has one.
        sparsity: Removed share of blocks that was asked for.
        stored: Weights stored in the pruned layers.
        latency_ms: Measured, of the fastest way to run the whole network.
        x_dense: How many times as fast as the dense network, of times in the same round.
        quartiles_ms: Of the times that ``latency_ms`` is the least of.
        extra: Other figures by name; tables show them.
    """

    variant: str
    seed: int
    accuracy: float
    before: float | None = None
    block: tuple[int, int] | None = None
    sparsity: float | None = None
    stored: int | None = None
    latency_ms: float | None = None
    x_dense: float | None = None
    quartiles_ms: tuple[float, float, float] | None = None
    valid: float | None = None
    epochs: int | None = None
    extra: Mapping[str, float] = field(default_factory=dict)

    @property
    def label(self) -> str:
        """Variant, block and sparsity: one line of a table, such as ``random 8x8 90%``."""
        parts = [self.variant]
        if self.block is not None:
            parts.append(f"{self.block[0]}x{self.block[1]}")
        if self.sparsity is not None:
            parts.append(f"{100 * self.sparsity:g}%")
        return " ".join(parts)

    def value(self, name: str) -> float | None:
        """A figure by the name of its attribute, or of its entry in ``extra``."""
        found = self.extra.get(name) if name not in _FIGURES else getattr(self, name)
        return None if found is None else float(found)


_FIGURES = (
    "accuracy",
    "before",
    "valid",
    "epochs",
    "sparsity",
    "stored",
    "latency_ms",
    "x_dense",
)


@dataclass(frozen=True)
class Claim:
    """``better`` beats ``worse``: the mean paired difference exceeds two standard errors.

    Attributes:
        better: The :attr:`Row.label` of its rows, or their variant where only one label has it.
        worse: The same of the rival.
        field: Figure compared: ``accuracy``, ``before``, an entry of ``extra``; of ``latency_ms``,
            ``stored``, ``nll``, ``rmse`` and ``ece``, less is better.
        note: Why it is claimed.
    """

    better: str
    worse: str
    field: str = "accuracy"
    note: str = ""


Check = tuple[str, bool | None, str]
"""What must hold, whether it does (None: this run cannot tell), and what was measured."""


class Experiment(Protocol):
    """A module of this package has one, named ``EXPERIMENT``.

    One that takes other data than digits and Fashion-MNIST has a tuple ``data`` of their names.
    """

    name: str
    """Of its files."""

    title: str
    """Heading, one line."""

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Run everything, seed by seed. Call ``progress.plan`` first, ``advance`` per row."""
        ...

    def claims(self, setting: Setting) -> list[Claim]:
        """What the rows are expected to show; claims that fail are printed as failing."""
        ...

    def check(self, rows: Sequence[Row]) -> list[Check]:
        """Other points that must hold, with what was measured."""
        ...
