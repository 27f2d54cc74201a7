"""What an experiment showed: tables, verdicts, plots."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table

from tetris.bench import machine
from tetris.plotting import matplotlib_figure

from . import latency
from .experiment import Check, Row, Setting
from .stats import Comparison, mean_sd

_COLUMNS = ("epochs", "before", "accuracy", "stored", "latency_ms", "x_dense")
_HEADS = {
    "before": "before, %",
    "accuracy": "accuracy, %",
    "latency_ms": "ms",
    "x_dense": "x dense",
}
_COUNTS = ("epochs", "stored")
BUSY = 0.15
"""Where dense times move by more, the page says that the machine was busy."""

_HELD_OUT = (
    "Defaults and settings were looked for by test accuracy on seeds 0 to 2 of the same data sets, "
    "so on the same images; published tables use seeds from 10 on, which draw other splits and "
    "other starts, not other images. Rivals were given the methods' settings, not settings of "
    "their own. What a run itself chooses by accuracy it chooses on validation images, a tenth of "
    "the training images and at most 1000, on which nothing is trained."
)


@dataclass(frozen=True)
class Outcome:
    """A whole run.

    Attributes:
        name: Of the experiment.
        title: Heading.
        setting: What was asked for.
        rows: All of them.
        comparisons: Claims and what became of them.
        checks: Other points.
        seconds: Wall-clock time of the rows.
        command: That made it.
    """

    name: str
    title: str
    setting: Setting
    rows: Sequence[Row]
    comparisons: Sequence[Comparison]
    checks: Sequence[Check]
    seconds: float
    command: str


def groups(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label -> its rows, in order of appearance."""
    result: dict[str, list[Row]] = {}
    for row in rows:
        result.setdefault(row.label, []).append(row)
    return result


def cells(rows: Sequence[Row]) -> tuple[list[str], list[list[str]]]:
    """Head and body of the table: mean ± standard deviation over seeds, a line per label."""
    extra = dict.fromkeys(name for row in rows for name in row.extra)
    columns = [c for c in (*_COLUMNS, *extra) if any(row.value(c) is not None for row in rows)]
    head = ["variant", "block", "sparsity", *(_HEADS.get(c, c) for c in columns)]
    place = len(head) - len(columns) + columns.index("accuracy")
    body = []
    for members in groups(rows).values():
        first = members[0]
        line = [
            first.variant,
            "" if first.block is None else f"{first.block[0]}x{first.block[1]}",
            "" if first.sparsity is None else f"{100 * first.sparsity:g}%",
        ]
        ended = [row for row in members if not math.isnan(row.accuracy)]
        for column in columns:
            values = [v for row in ended if (v := row.value(column)) is not None]
            line.append(_cell(column, values))
        if lost := len(members) - len(ended):
            some = f"{line[place]} ({lost} of {len(members)} diverged)"
            line[place] = some if ended else "diverged"
        body.append(line)
    return head, body


def _cell(column: str, values: list[float]) -> str:
    if not values:
        return ""
    mean, deviation = mean_sd(values)
    deviation = 0.0 if deviation < 1e-12 * abs(mean) else deviation  # rounding of equal values
    if column in _COUNTS:
        return f"{mean:.0f}"
    if column in ("accuracy", "before"):
        text, spread = f"{100 * mean:.1f}", f" ± {100 * deviation:.1f}"
    else:
        text, spread = f"{mean:.3g}", f" ± {deviation:.2g}"
    return text if math.isnan(deviation) else text + spread


def verdicts(outcome: Outcome) -> list[tuple[str, str, str]]:
    """(point, verdict, measured) of every claim and check."""
    words = {True: "holds", False: "FAILS", None: "not judged"}
    result = []
    for comparison in outcome.comparisons:
        claim = comparison.claim
        point = f"{claim.better} beats {claim.worse}"
        point += "" if claim.field == "accuracy" else f" ({claim.field})"
        point += f": {claim.note}" if claim.note else ""
        result.append((point, words[comparison.holds], str(comparison)))
    return result + [
        (what, words[None if holds is None else bool(holds)], measured)
        for what, holds, measured in outcome.checks
    ]


def moved(rows: Sequence[Row]) -> float | None:
    """By which share dense times moved: from the least lower quartile to the largest upper one.

    Within the rounds of a measurement, and between the measurements of the seeds. None if no
    dense network was measured.
    """
    dense = [
        r.quartiles_ms for r in rows if r.label == latency.DENSE and r.quartiles_ms is not None
    ]
    return max(q[2] for q in dense) / min(q[0] for q in dense) - 1.0 if dense else None


def notes(outcome: Outcome) -> list[str]:
    """What a reader of the tables has to know of how they came about."""
    result = [_HELD_OUT]
    if any(row.x_dense is not None for row in outcome.rows):
        result.append(
            "ms is the fastest round; x dense is the dense network's time over a variant's, the "
            "median of the ratios of times in the same round."
        )
    share = moved(outcome.rows)
    if share is not None and share > BUSY:
        result.append(f"The machine was busy: dense times moved by {100 * share:.0f} %.")
    return result


def show(outcome: Outcome, console: Console) -> None:
    """Print tables and verdicts."""
    head, body = cells(outcome.rows)
    for title, top, lines in (
        (outcome.title, head, body),
        ("What must be seen", ["point", "verdict", "measured"], verdicts(outcome)),
    ):
        table = Table(title=title)
        for name in top:
            table.add_column(name, no_wrap=name == "variant")
        for line in lines:
            table.add_row(*line)
        console.print(table)
    for note in notes(outcome):
        console.print(note, highlight=False)


def write(outcome: Outcome) -> list[Path]:
    """Write ``<name>-<data>.md``, ``.json`` and, where there is something to draw, ``.png``."""
    setting = outcome.setting
    setting.out.mkdir(parents=True, exist_ok=True)
    stem = setting.out / f"{outcome.name}-{setting.data}"
    paths = [stem.with_suffix(suffix) for suffix in (".json", ".md")]
    paths[0].write_text(json.dumps(plain(outcome), indent=1) + "\n")
    picture = plot(outcome, stem.with_suffix(".png"))
    # An experiment may have drawn more, as <name>-<data>-<what>.png.
    pictures = ([] if picture is None else [picture]) + sorted(
        setting.out.glob(f"{stem.name}-*.png")
    )
    paths[1].write_text(markdown(outcome, pictures))
    return paths + pictures


def plain(outcome: Outcome) -> dict[str, Any]:
    """Everything as JSON takes it."""
    return {
        "name": outcome.name,
        "title": outcome.title,
        "data": outcome.setting.data,
        "seeds": list(outcome.setting.seeds),
        "quick": outcome.setting.quick,
        "command": outcome.command,
        "seconds": round(outcome.seconds, 1),
        "threads": torch.get_num_threads(),
        "machine": machine.describe(),
        "dense_times_moved": moved(outcome.rows),
        "rows": [_without_nan(asdict(row)) for row in outcome.rows],
        "claims": [
            {
                **asdict(c.claim),
                **_without_nan({"difference": c.difference, "error": c.error}),
                "holds": c.holds,
            }
            for c in outcome.comparisons
        ],
        "checks": [
            {"what": what, "holds": None if holds is None else bool(holds), "measured": measured}
            for what, holds, measured in outcome.checks
        ],
    }


def _without_nan(value: Any) -> Any:
    """None in place of NaN, which JSON does not have."""
    if isinstance(value, dict):
        return {key: _without_nan(own) for key, own in value.items()}
    return None if isinstance(value, float) and math.isnan(value) else value


def markdown(outcome: Outcome, pictures: Sequence[Path] = ()) -> str:
    """The page: table, verdicts, pictures, how it was made."""
    seeds = outcome.setting.seeds
    spread = "mean ± standard deviation" if len(seeds) > 1 else "no spread"
    parts = [f"# {outcome.title}", _table(*cells(outcome.rows))]
    if lines := verdicts(outcome):
        parts.append(_table(["point", "verdict", "measured"], lines))
        parts.append(
            "A claim that one variant beats another holds if the mean difference over seeds, "
            "paired, exceeds twice its standard error; measured is that difference ± the error."
        )
    plain_name = f"{outcome.name}-{outcome.setting.data}"
    for picture in pictures:
        what = picture.stem.removeprefix(plain_name).strip("-") or "accuracy against what is left"
        parts.append(f"![{what}]({picture.name})")
    parts += notes(outcome)
    parts.append(
        f"{len(seeds)} seed{'s' * (len(seeds) != 1)} from {min(seeds)} on ({spread}), "
        f"{torch.get_num_threads()} thread(s), {outcome.seconds:.0f} s. "
        f"{machine.sentence(machine.describe())}. Command: `{outcome.command}`."
    )
    return "\n\n".join(parts) + "\n"


def _table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in (head, rule, *lines))


_AXES = {
    "sparsity": ("share of blocks removed", "linear"),
    "stored": ("stored weights", "log"),
    "latency_ms": ("ms per batch, measured", "log"),
}


def plot(outcome: Outcome, path: Path) -> Path | None:
    """Draw accuracy against each figure of which a variant has two or more; None if none has."""
    lines: dict[str, dict[str, list[Row]]] = {}
    for label, members in groups(outcome.rows).items():
        block = members[0].block
        name = members[0].variant + ("" if block is None else f" {block[0]}x{block[1]}")
        lines.setdefault(name, {})[label] = members
    curves = {axis: _curves(lines, axis) for axis in _AXES}
    axes = {a: found for a, found in curves.items() if any(len(v) > 1 for v in found.values())}
    if not axes:
        return None
    figure = matplotlib_figure("benchmarks.methods")(figsize=(4.8 * len(axes), 4.6), dpi=130)
    figure.set_layout_engine("constrained")
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    markers = "osD^v<>pPX*h"
    panels = figure.subplots(1, len(axes), squeeze=False, sharey=True)[0]
    for panel, (axis, found) in zip(panels, axes.items(), strict=True):
        text, scale = _AXES[axis]
        for index, name in enumerate(lines):
            if points := found.get(name):
                x, y, error = zip(*points, strict=True)
                panel.errorbar(
                    x,
                    y,
                    yerr=error,
                    marker=markers[index % len(markers)],
                    color=f"C{index % 10}",
                    capsize=3,
                    linewidth=1.2,
                    label=name,
                )
        panel.set_xscale(scale)
        if scale == "log":  # plain numbers, few enough not to overlap
            panel.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.xaxis.set_minor_formatter(NullFormatter())
        panel.set_xlabel(text)
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("accuracy, %")
    handles = dict(
        pair
        for panel in panels
        for pair in zip(*reversed(panel.get_legend_handles_labels()), strict=True)
    )
    figure.suptitle(outcome.title)
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False
    )
    figure.savefig(path)
    return path


def _curves(
    lines: dict[str, dict[str, list[Row]]], axis: str
) -> dict[str, list[tuple[float, float, float]]]:
    """Variant -> (figure, accuracy and its deviation in percent), by rising figure."""
    result = {}
    for name, labels in lines.items():
        points = []
        for members in labels.values():
            ended = [row for row in members if not math.isnan(row.accuracy)]
            values = [v for row in ended if (v := row.value(axis)) is not None]
            if values:
                accuracy, deviation = mean_sd(row.accuracy for row in ended)
                spread = 0.0 if math.isnan(deviation) else deviation
                points.append((mean_sd(values)[0], 100 * accuracy, 100 * spread))
        if points:
            result[name] = sorted(points)
    return result
