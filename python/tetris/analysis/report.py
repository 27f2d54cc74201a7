"""What an analysis found: for people as a table or a picture, for programs as numbers."""

from __future__ import annotations

import io
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from os import PathLike
from typing import Any

from ..timing import ms_text

LEAST_GAIN = 1.1
"""A sparse layer is recommended from this predicted speed-up on: below it, the prediction's own
error decides."""


@dataclass(frozen=True)
class Choice:
    """One way to make a layer sparse. Saliency shares are of the layer's total, from 0 to 1.

    Attributes:
        block: (bo, bi).
        sparsity: Removed share of the blocks, after rounding to whole blocks and one per block row.
        retained: Saliency in stored blocks, in the order that the search found.
        l1_sort_retained: The same in the order of sorting by L1 norm.
        identity_retained: The same without reordering.
        unstructured_retained: What as many of the best single weights would hold.
        predicted_ms: Predicted time, all calls together; NaN without an example.
        speedup: Predicted time of the dense layer over this; NaN without an example.
        measured_ms: Measured time; None if it was not asked for.
    """

    block: tuple[int, int]
    sparsity: float
    retained: float
    l1_sort_retained: float
    identity_retained: float
    unstructured_retained: float
    predicted_ms: float = math.nan
    speedup: float = math.nan
    measured_ms: float | None = None


@dataclass(frozen=True)
class LayerAnalysis:
    """One layer.

    Attributes:
        name: Name in the model.
        shape: (out, in), or (out, in / groups, *kernel) of a convolution.
        tokens: Tokens, or output positions of a convolution, of all calls and the whole batch; 0
            without an example.
        calls: How often the example goes through the layer.
        dense_ms: Predicted time of the dense layer as torch computes it, all calls together.
        choices: What was looked at.
        best: The choice that is recommended; None: leave the layer dense.
        reason: Why.
        dense_measured_ms: Measured time of the dense layer; None if it was not asked for.
        tied: Names of other layers that share the weight; what is said is of all together.
    """

    name: str
    shape: tuple[int, ...]
    tokens: int
    calls: int
    dense_ms: float
    choices: tuple[Choice, ...]
    best: Choice | None
    reason: str
    dense_measured_ms: float | None = None
    tied: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The layer, and those that share its weight."""
        return self.name, *self.tied


@dataclass(frozen=True)
class AnalysisReport:
    """All layers of a model: ``print`` it, or read the fields.

    Attributes:
        layers: In the model's order; layers that share a weight once, under the first's name.
        skipped: Linear layers and convolutions that :func:`tetris.sparsify` leaves dense, and why;
            of a file also tensors that are no layers of a kind that is analyzed.
        threads: Threads that times are for.
        source: Where the cost model comes from.

    Example:
        >>> report = tetris.analyze(model, x)
        >>> report.layers[0].name
        'fc'
        >>> sparse = tetris.sparsify(model, exclude=report.dense, overrides=report.overrides())
    """

    layers: tuple[LayerAnalysis, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    threads: int = 1
    source: str = ""

    @property
    def dense(self) -> tuple[str, ...]:
        """Names of the analyzed layers that are to stay dense, for ``exclude=``.

        Raises:
            ValueError: there are no times, so that nothing is recommended.
        """
        self._check_timed("dense")
        return tuple(n for layer in self.layers if layer.best is None for n in layer.names)

    def overrides(self) -> dict[str, dict[str, Any]]:
        """What is recommended for each other layer, for ``overrides=``.

        Raises:
            ValueError: there are no times, so that nothing is recommended.

        Example:
            >>> report = tetris.analyze(model, x)
            >>> tetris.sparsify(model, overrides=report.overrides(), exclude=report.dense)
        """
        self._check_timed("overrides")
        return {
            name: {"block": layer.best.block, "sparsity": layer.best.sparsity}
            for layer in self.layers
            if layer.best is not None
            for name in layer.names
        }

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON; what is not known is None."""
        return {
            "layers": [_plain(asdict(layer)) for layer in self.layers],
            "skipped": dict(self.skipped),
            "threads": self.threads,
            "cost_model": self.source,
        }

    def to_markdown(self) -> str:
        """The table, and below it what is recommended."""
        head, rows = self._rows()
        lines = ["| " + " | ".join(head) + " |", "| " + " | ".join(["---"] * len(head)) + " |"]
        lines += ["| " + " | ".join(row) + " |" for _, row in rows]
        lines += ["", *(f"- `{n or '(root)'}`: {text}" for n, text in self._advice())]
        return "\n".join([*lines, "", self._foot(), ""])

    def plot(self, path: str | PathLike[str]) -> None:
        """Save a picture: predicted speed-up and retained saliency of every choice, by layer.

        Args:
            path: File to write; the ending chooses the format. Needs matplotlib,
                ``pip install 'tetris[plot]'``.
        """
        from ..plotting import plot_analysis

        plot_analysis(self, path)

    def __str__(self) -> str:
        # Here, not above: on a machine that only computes, the rest of the library does without.
        from rich import box
        from rich.console import Console
        from rich.table import Table

        head, rows = self._rows()
        table = Table(box=box.SIMPLE, pad_edge=False, padding=(0, 1))
        for i, name in enumerate(head):
            table.add_column(name, justify="left" if i == 0 else "right", no_wrap=True)
        for first, row in rows:
            if first and table.row_count:
                table.add_section()
            table.add_row(*row)
        out = io.StringIO()
        width = max(80, Console(width=10_000).measure(table).maximum)
        Console(file=out, width=width, color_system=None, emoji=False, markup=False).print(table)
        lines = [line.rstrip() for line in out.getvalue().splitlines()]
        lines += [f"{name or '(root)'}: {text}" for name, text in self._advice()]
        return "\n".join([*lines, self._foot()]).strip("\n")

    @property
    def _timed(self) -> bool:
        return any(not math.isnan(layer.dense_ms) for layer in self.layers)

    def _check_timed(self, name: str) -> None:
        if not self._timed:
            raise ValueError(
                f"AnalysisReport.{name}: nothing is recommended without times; pass "
                "example_inputs= to tetris.analyze (got none)"
            )

    def _rows(self) -> tuple[list[str], list[tuple[bool, list[str]]]]:
        """Head, and rows with whether they are the first of their layer."""
        timed = self._timed
        measured = any(layer.dense_measured_ms is not None for layer in self.layers)
        head = ["layer", "shape", "block", "sparsity", "TETRIS", "L1 sort", "no order", "elements"]
        if timed:
            head[2:2] = ["tokens"]
            head += ["dense ms", "sparse ms", "speed-up"]
        if measured:
            head += ["measured: dense", "sparse", "speed-up"]
        rows = []
        for layer in self.layers:
            for i, c in enumerate(layer.choices):
                row = ["", ""]
                if i == 0:
                    row = [layer.name or "(root)", "x".join(map(str, layer.shape))]
                if timed:
                    row.append(str(layer.tokens) if i == 0 else "")
                row += [
                    f"{c.block[0]}x{c.block[1]}" + "*" * (c is layer.best),
                    f"{c.sparsity:.1%}",
                    *(
                        f"{share:.1%}"
                        for share in (
                            c.retained,
                            c.l1_sort_retained,
                            c.identity_retained,
                            c.unstructured_retained,
                        )
                    ),
                ]
                if timed:
                    row += [_ms(layer.dense_ms), _ms(c.predicted_ms), f"{c.speedup:.2f}x"]
                if measured and layer.dense_measured_ms and c.measured_ms:
                    ratio = layer.dense_measured_ms / c.measured_ms
                    row += [_ms(layer.dense_measured_ms), _ms(c.measured_ms), f"{ratio:.2f}x"]
                rows.append((i == 0, row))
        return head, rows

    def _advice(self) -> list[tuple[str, str]]:
        advice = [(layer.name, layer.reason) for layer in self.layers if layer.reason]
        return advice + [(name, f"skipped: {why}") for name, why in self.skipped.items()]

    def _foot(self) -> str:
        if not self._timed:
            return "no times, and so no recommendations: pass example_inputs for them"
        dense = sum(layer.dense_ms for layer in self.layers)
        best = sum(
            layer.dense_ms if layer.best is None else layer.best.predicted_ms
            for layer in self.layers
        )
        return (
            f"predicted for these layers as recommended (*): {ms_text(best)} instead of "
            f"{ms_text(dense)}, {dense / best:.2f}x; {self.threads} "
            f"thread{'s' * (self.threads > 1)}; cost model {self.source}"
        )


def _ms(value: float) -> str:
    return ms_text(value).removesuffix(" ms")


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return None if isinstance(value, float) and math.isnan(value) else value
