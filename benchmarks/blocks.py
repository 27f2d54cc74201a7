"""Draws docs/blocks.png: what a block shape costs in accuracy, and what it brings in speed.

    python -m benchmarks.blocks [--out FILE]

Accuracy and the time of a whole network come from benchmarks/results/demo.md (``tetris demo
--full``), efficiency of single layers from benchmarks/results/gemm.json. Nothing is measured here.
"""

import argparse
import json
from pathlib import Path

from tetris.plotting import matplotlib_figure

from .report import STYLES
from .targets import MANY_TOKENS, geometric_mean

RESULTS = Path("benchmarks/results")
COLUMNS = ("1x1", "2x1", "4x1", "8x1", "16x1", "32x1")
SQUARES = ("4x4", "8x8", "16x16", "32x32", "64x64")
SHARES = {0.75: "#56B4E9", 0.9: "#0072B2", 0.95: "#000000"}  # sparsities drawn, and their colours


Point = tuple[float, float, float, str]  # ms, accuracy %, its standard deviation, removed


def demo_points(text: str) -> dict[str, list[Point]]:
    """Points per curve: dense, narrow, and each block, reordered by search."""
    found: dict[str, list[Point]] = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("| ").split("|")]
        if len(cells) != 6 or "±" not in cells[3]:
            continue
        method, block, removed, accuracy, ms, _ = cells
        if method in ("dense", "narrow", "element-wise", "TETRIS"):
            mean, deviation = map(float, accuracy.split("±"))
            point = (float(ms), mean, deviation, removed)
            found.setdefault(block or method, []).append(point)
    if not {"dense", "narrow", "1x1"} <= found.keys():
        raise ValueError(f"demo_points: no table of the demo (found rows of {sorted(found)})")
    return found


def efficiencies(result: dict) -> dict[float, dict[str, float]]:
    """Geometric means over large shapes, one thread: {sparsity: {block: efficiency}}."""
    rows = [
        r
        for r in result["rows"]
        if (r["isa"], r["threads"]) == (result["native_isa"], 1) and r["tokens"] >= MANY_TOKENS
    ]
    return {
        share: {
            block: geometric_mean(
                [r["efficiency"] for r in rows if (r["block"], r["sparsity"]) == (block, share)]
            )
            for block in COLUMNS + SQUARES
        }
        for share in SHARES
    }


def draw(points: dict, layers: dict, path: Path) -> None:
    """Both panels into one file."""
    figure = matplotlib_figure("benchmarks.blocks")(figsize=(9.6, 4.2), dpi=150)
    figure.set_layout_engine("constrained")
    left, right = figure.subplots(1, 2)
    for name, curve in points.items():
        times, accuracies = [p[0] for p in curve], [p[1] for p in curve]
        if name == "dense":
            left.axhline(accuracies[0], color="0.6", linestyle=":", zorder=0)
            at = (0.01, accuracies[0])
            place = {"xycoords": ("axes fraction", "data"), "va": "bottom", "color": "0.4"}
            left.annotate(f"dense: {times[0]:.2f} ms", at, fontsize=8, **place)
            continue
        colour, marker = STYLES.get(name, ("0.35", "+"))
        label = "narrow dense, as many weights" if name == "narrow" else f"{name} blocks"
        bars = {"yerr": [p[2] for p in curve], "capsize": 2}
        left.errorbar(times, accuracies, color=colour, marker=marker, label=label, **bars)
    for ms, accuracy, _, removed in points["1x1"]:
        place = {"xytext": (6, -11), "textcoords": "offset points"}
        left.annotate(removed, (ms, accuracy), fontsize=8, color=STYLES["1x1"][0], **place)
    left.set(
        title="Fashion-MNIST, a whole MLP",
        xlabel="ms per 256 images",
        ylabel="test accuracy, %",
        xscale="log",
        xticks=[0.1, 0.2, 0.3, 0.5, 0.7],
        xticklabels=["0.1", "0.2", "0.3", "0.5", "0.7"],
    )
    left.minorticks_off()
    left.legend(loc="lower right", fontsize=8, frameon=False)
    for share, colour in SHARES.items():
        for blocks, label in ((COLUMNS, f"{share:.0%} removed"), (SQUARES, None)):
            values = [layers[share][block] for block in blocks]
            right.plot(blocks, values, color=colour, marker="o", label=label)
    right.axhline(1, color="0.6", linestyle=":", zorder=0)
    right.set(
        title="Layers of 128 tokens and more, one thread",
        xlabel="block, height x width",
        ylabel="efficiency (1: time is what is left)",
        ylim=(0, 1.05),
    )
    right.tick_params(axis="x", rotation=45)
    right.legend(loc="lower right", fontsize=8, frameon=False)
    for axes in (left, right):
        axes.grid(alpha=0.3)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path)


def main(argv: list[str] | None = None) -> None:
    """Reads, draws, says where."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.blocks", description=__doc__)
    made.formatter_class = argparse.RawDescriptionHelpFormatter
    made.add_argument("--out", type=Path, default=Path("docs/blocks.png"))
    args = made.parse_args(argv)
    points = demo_points((RESULTS / "demo.md").read_text())
    layers = efficiencies(json.loads((RESULTS / "gemm.json").read_text()))
    draw(points, layers, args.out)
    print(f"written: {args.out}")


if __name__ == "__main__":
    main()
