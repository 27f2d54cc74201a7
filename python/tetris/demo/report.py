"""The demo's table and pictures."""

from __future__ import annotations

from pathlib import Path
from statistics import mean, stdev
from typing import TYPE_CHECKING

import torch
from rich.table import Table

from ..nn import SparseLayer
from .config import DemoConfig

if TYPE_CHECKING:
    from .run import Outcome, Result

# Okabe-Ito colours; markers repeat the distinction
_STYLES = {
    "narrow": ("#000000", "P"),
    "element-wise": ("#D55E00", "o"),
    "unordered": ("#56B4E9", "v"),
    "L1-sorted": ("#E69F00", "s"),
    "TETRIS": ("#009E73", "*"),
}


def table(outcome: Outcome, config: DemoConfig) -> Table:
    """One line per variant, grouped by sparsity."""
    made = Table(title=f"{outcome.data_name}: accuracy and time of pruned networks")
    for name in ("method", "block", "removed"):
        made.add_column(name)
    for name in ("accuracy %", "dense ms", "pruned ms", "speed-up"):
        made.add_column(name, justify="right")
    dense = outcome.dense_milliseconds
    spread = _percent(outcome.dense_accuracies)
    made.add_row("dense", "", "0%", spread, f"{dense:.3f}", "", "1.00x", end_section=True)
    for index, result in enumerate(outcome.results):
        variant = result.variant
        following = outcome.results[index + 1 : index + 2]
        made.add_row(
            variant.method,
            "" if variant.method == "narrow" else f"{variant.block[0]}x{variant.block[1]}",
            f"{variant.sparsity:.0%}",
            _percent(result.accuracies),
            f"{dense:.3f}",
            f"{result.milliseconds:.3f}",
            f"{dense / result.milliseconds:.2f}x",
            style="bold" if variant.method == "TETRIS" else None,
            end_section=any(n.variant.sparsity != variant.sparsity for n in following),
        )
    return made


def markdown(outcome: Outcome, config: DemoConfig) -> str:
    """The table and its legend for a document."""
    lines = ["| method | block | removed | accuracy % | ms | speed-up |"]
    lines += ["| --- | --- | --- | --- | --- | --- |"]
    dense = outcome.dense_milliseconds
    lines.append(f"| dense | | 0% | {_percent(outcome.dense_accuracies)} | {dense:.3f} | 1.00x |")
    for result in outcome.results:
        variant, ms = result.variant, result.milliseconds
        block = "" if variant.method == "narrow" else f"{variant.block[0]}x{variant.block[1]}"
        lines.append(
            f"| {variant.method} | {block} | {variant.sparsity:.0%} | "
            f"{_percent(result.accuracies)} | {ms:.3f} | {dense / ms:.2f}x |"
        )
    return f"{outcome.data_name}.\n\n" + "\n".join(lines) + f"\n\n{legend(outcome, config)}\n"


def legend(outcome: Outcome, config: DemoConfig) -> str:
    """How the table was made, in words."""
    seeds = len(config.seeds)
    seed_word = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed"
    epochs = config.dense_epochs + config.tune_epochs
    return (
        f"Accuracy: {seed_word}; every pruned network is fine-tuned for the same "
        f"{_epochs(config.tune_epochs)} on the same batches, as sparse layers{_norm(config)}. "
        f"Time: the whole network, {config.latency_batch} images per call, "
        f"{torch.get_num_threads()} thread(s), candidates in turns, medians; dense is the fastest "
        f"library found ({outcome.dense_library}). narrow: a dense network with as many hidden "
        f"weights as are left, trained for {_epochs(epochs)} from scratch and run by the same "
        f"library. {_dense(config)} dense."
    )


def _norm(config: DemoConfig) -> str:
    """What else happens to a network with batch norm, and what is left out."""
    if config.model == "mlp":
        return ""
    text = ", and batch norm recalibrated; for timing it is folded on all sides"
    if config.train_images is not None:
        text += f" (trained on {config.train_images} images only, to be quick)"
    return text


def _epochs(count: int) -> str:
    return f"{count} epoch{'s' * (count != 1)}"


def _dense(config: DemoConfig) -> str:
    if config.model == "mlp":
        return "The classifier stays"
    return "The first convolution and the classifier stay"


def pictures(outcome: Outcome, config: DemoConfig) -> list[Path]:
    """Draws a layout before and after reordering, and accuracy against measured time."""
    try:
        import matplotlib
    except ImportError:
        return []
    matplotlib.use("Agg")
    layout_path = config.out / "layout.png"
    layers = (m for m in outcome.example.modules() if isinstance(m, SparseLayer))
    layer = max(layers, key=lambda m: m.layout.stored_values)
    layout = layer.layout
    layout.plot(layout_path, layout.unpack(layer.values.detach()))
    curve_path = config.out / "accuracy-latency.png"
    _curve(outcome, config, curve_path)
    return [layout_path, curve_path]


def _curve(outcome: Outcome, config: DemoConfig, path: Path) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    figure, axes = plt.subplots(
        1, len(config.blocks), figsize=(5.6 * len(config.blocks), 4.8), squeeze=False, sharey=True
    )
    dense_accuracy = 100 * mean(outcome.dense_accuracies)
    for axis, block in zip(axes.flat, config.blocks, strict=True):
        axis.axhline(dense_accuracy, color="0.5", linestyle=":")
        axis.plot(
            outcome.dense_milliseconds,
            dense_accuracy,
            "D",
            color="0.35",
            markersize=9,
            label=f"dense ({outcome.dense_library})",
        )
        for method, (colour, marker) in _STYLES.items():
            points = [
                r
                for r in outcome.results
                if r.variant.method == method and r.variant.block in (block, (1, 1))
            ]
            if points:
                _line(axis, points, method, colour, marker)
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda v, _: f"{v:g}"))
        axis.xaxis.set_minor_formatter(NullFormatter())
        axis.set_title(f"blocks of {block[0]}x{block[1]}")
        axis.set_xlabel(f"ms per {config.latency_batch} images, measured (log scale)")
        axis.grid(alpha=0.3)
    axes[0, 0].set_ylabel("test accuracy, %")
    handles, labels = axes[0, 0].get_legend_handles_labels()
    levels = ", ".join(f"{s:.0%}" for s in sorted(config.sparsities, reverse=True))
    order = ", left to right" if len(config.sparsities) > 1 else ""
    figure.suptitle(f"{outcome.data_name}: {levels} of the hidden weights removed{order}")
    figure.legend(handles, labels, loc="lower center", ncols=len(labels), frameon=False)
    figure.tight_layout(rect=(0, 0.06, 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def _line(axis, points: list[Result], method: str, colour: str, marker: str) -> None:
    points = sorted(points, key=lambda r: r.variant.sparsity)
    label = {"element-wise": "element-wise (1x1)", "narrow": "narrow dense"}.get(method, method)
    axis.errorbar(
        [r.milliseconds for r in points],
        [100 * mean(r.accuracies) for r in points],
        yerr=[100 * _spread(r.accuracies) for r in points],
        color=colour,
        marker=marker,
        markersize=12 if marker == "*" else 7,
        markeredgecolor="black",
        markeredgewidth=0.5,
        capsize=3,
        label=label,
    )


def _percent(shares: list[float]) -> str:
    text = f"{100 * mean(shares):.1f}"
    return text + (f" ± {100 * _spread(shares):.1f}" if len(shares) > 1 else "")


def _spread(shares: list[float]) -> float:
    return stdev(shares) if len(shares) > 1 else 0.0
