"""Turns measured rows into markdown tables and figures."""

from collections.abc import Callable, Sequence
from pathlib import Path

from tetris.bench.machine import sentence

from .targets import BANDS, MANY_TOKENS, TARGETS, Verdict, geometric_mean, judge

# Okabe-Ito, told apart with every common colour vision; markers repeat the distinction
STYLES = {
    "32x32": ("#0072B2", "s"),
    "16x16": ("#56B4E9", "D"),
    "16x1": ("#009E73", "^"),
    "8x1": ("#332288", ">"),
    "8x8": ("#000000", "P"),
    "4x4": ("#F0E442", "X"),
    "4x1": ("#E69F00", "v"),
    "2x1": ("#CC79A7", "<"),
    "1x1": ("#D55E00", "o"),
}
DRAWN = ("32x32", "16x1", "4x4", "4x1", "2x1", "1x1")


NOISY = 0.1  # of the median: quartiles further apart are marked


def spread(row: dict) -> str:
    """The quartiles of the speed-up, marked where they are far apart."""
    low, high = row["speedup_iqr"]
    return f"{low:.2f}-{high:.2f}{' ~' * _noisy(row)}"


def _noisy(row: dict) -> bool:
    low, high = row["speedup_iqr"]
    return high - low > NOISY * row["speedup"]


def mark(rows: list[dict]) -> str:
    """What follows a mean over the rows: a mark where one of them was disturbed."""
    return " ~" * any(map(_noisy, rows))


def noise(rows: list[dict]) -> str:
    """How many points were disturbed, in a sentence."""
    return (
        f"Marked with ~: {sum(map(_noisy, rows))} of {len(rows)} points, whose quartiles are more "
        f"than {NOISY:.0%} apart, as other programs or fresh pages of memory make them, and the "
        "means that they are part of."
    )


def table(head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    """A markdown table."""
    rows = [list(head), ["---"] * len(head), *lines]
    return "\n".join("| " + " | ".join(row) + " |" for row in rows)


def summary_table(rows: list[dict], isa: str, threads: int) -> str:
    """Speed-up (efficiency) per block and sparsity, geometric means over the large shapes."""
    some = [
        r for r in rows if (r["isa"], r["threads"]) == (isa, threads) and r["tokens"] >= MANY_TOKENS
    ]
    sparsities = sorted({r["sparsity"] for r in some})
    lines = []
    for block in ordered(some, "block"):
        cells = [block]
        for sparsity in sparsities:
            points = [r for r in some if r["block"] == block and r["sparsity"] == sparsity]
            if points:
                speed = geometric_mean([p["speedup"] for p in points])
                share = geometric_mean([p["efficiency"] for p in points])
                cells.append(f"{speed:.2f}x ({share:.2f}){mark(points)}")
            else:
                cells.append("")
        lines.append(cells)
    return table(["block", *(f"{s:.0%}" for s in sparsities)], lines)


def row_table(rows: list[dict]) -> str:
    """Every measured point."""
    head = "ISA, threads, shape, block, sparsity, cache, sparse ms, dense ms, dense by, speed-up, "
    head += "spread, efficiency, GFLOP/s stored, dense-equivalent, of peak, kernel"
    lines = []
    for r in rows:
        peak = f"{r['peak_share']:.0%}" if r["peak_share"] else ""
        lines.append(
            [
                r["isa"],
                str(r["threads"]),
                r["shape"],
                r["block"],
                f"{r['sparsity']:.0%}",
                r["cache"],
                f"{r['sparse_ms']:.3f}",
                f"{r['dense_ms']:.3f}",
                r["dense"],
                f"{r['speedup']:.2f}",
                spread(r),
                f"{r['efficiency']:.3f}",
                f"{r['stored_gflops']:.1f}",
                f"{r['equivalent_gflops']:.0f}",
                peak,
                r["kernel"],
            ]
        )
    return table(head.split(", "), lines)


def verdict_table(verdicts: list[Verdict], what: str = "tokens") -> str:
    """The pass/fail table; ``what`` heads the column that names the points."""
    head = f"ISA, threads, {what}, block, sparsity, target, geo. mean, worst, worst at, verdict"
    lines = [
        [
            v.isa,
            str(v.threads),
            v.what,
            v.block,
            v.band,
            f"{v.target:.2f}",
            f"{v.mean:.3f}",
            f"{v.worst:.3f}",
            v.worst_at,
            "pass" if v.passed else "**fail**",
        ]
        for v in verdicts
    ]
    return table(head.split(", "), lines)


def training_table(training: list[dict]) -> str:
    """Training steps."""
    head = (
        "ISA, threads, shape, block, sparsity, sparse ms, dense ms, dense by, speed-up, efficiency"
    )
    lines = [
        [
            r["isa"],
            str(r["threads"]),
            r["shape"],
            r["block"],
            f"{r['sparsity']:.0%}",
            f"{r['sparse_ms']:.2f}",
            f"{r['dense_ms']:.2f}",
            r["dense"],
            f"{r['speedup']:.2f}",
            f"{r['efficiency']:.2f}",
        ]
        for r in training
    ]
    return table(head.split(", "), lines)


def rival_table(rivals: list[dict]) -> str:
    """Peers at a few points, one thread."""
    points = list(dict.fromkeys((r["shape"], r["block"], r["sparsity"]) for r in rivals))
    names = list(dict.fromkeys(r["name"] for r in rivals))
    lines = []
    for shape, block, sparsity in points:
        here = {
            r["name"]: f"{r['speedup']:.2f}x"
            for r in rivals
            if (r["shape"], r["block"], r["sparsity"]) == (shape, block, sparsity)
        }
        lines.append([shape, block, f"{sparsity:.0%}", *(here.get(name, "") for name in names)])
    return table(["shape", "block", "sparsity", *names], lines)


def ordered(rows: list[dict], key: str) -> list:
    """Distinct values in order of appearance."""
    return list(dict.fromkeys(r[key] for r in rows))


def markdown(result: dict) -> str:
    """The whole report."""
    rows, training, rivals = result["rows"], result["training"], result["rivals"]
    machine = result["machine"]
    parts = [
        "# Block-sparse GEMM against the fastest dense library",
        f"{sentence(machine)}.",
        f"Printed by `{result['command']}`.",
        "Speed-up is against the fastest of the dense routes that torch offers (`F.linear`, "
        "oneDNN with prepacked weights, and in the full run `torch.compile` with freezing), timed "
        "in turns with the sparse candidates. Times are medians; speed-up and spread are the "
        "median and the quartiles of the ratios of samples taken in the same turn. **Efficiency** "
        "is speed-up times stored share: 1 means time proportional to what is left. Layers are "
        "random, their density is exact, rows and columns are both permuted at random, nothing is "
        "packed or sorted beforehand. Cache: x and y are warm. Up to 16 tokens weights come from "
        "memory, dense and sparse alike (copies of the layer take turns, together three times the "
        "last-level cache). Above, one layer is called again and again: what the last-level cache "
        "holds of its weights is warm, which may be all of a sparse layer and not all of the dense "
        "one: that of 4096 by 4096 takes 64 MiB.",
        noise(rows),
    ]
    for isa, peak in result["peaks"].items():
        if peak:
            parts.append(
                f"FMA peak of one core, {isa}, measured in the same run: {peak / 1e9:.0f} GFLOP/s."
            )
        else:
            parts.append(f"FMA peak, {isa}: this build has no probe for it.")
    if any(r["isa"] != result["native_isa"] for r in rows):
        parts.append(
            "Rows of a lesser instruction set were measured in a process where MKL and oneDNN "
            "were held to it too."
        )
    for isa, threads in dict.fromkeys((r["isa"], r["threads"]) for r in rows):
        if any(r["tokens"] >= MANY_TOKENS for r in rows if r["isa"] == isa):
            parts.append(f"## {isa}, {threads} thread{'s' * (threads > 1)}: speed-up (efficiency)")
            parts.append(f"Geometric means over the shapes with at least {MANY_TOKENS} tokens.")
            parts.append(summary_table(rows, isa, threads))
    if training:
        parts += [
            "## Training step: forward, dX and dValues",
            "Dense is the faster of autograd through `F.linear` and oneDNN's three products on the "
            "same operands, which torch does not use in training by itself.",
            training_table(training),
        ]
    if rivals:
        parts += ["## Sparse peers, one thread: speed-up over dense", rival_table(rivals)]
    verdicts = judge(rows, training)
    failed = sum(not v.passed for v in verdicts)
    parts += [f"## Targets: {len(verdicts) - failed} of {len(verdicts)} met"]
    parts += [verdict_table(verdicts), "## Every point", row_table(rows)]
    return "\n\n".join(parts) + "\n"


def figures(result: dict, out: Path) -> list[Path]:
    """Draws speed-up curves, one picture per instruction set and thread count."""
    written = []
    rows = result["rows"]
    for isa, threads in dict.fromkeys((r["isa"], r["threads"]) for r in rows):
        some = [r for r in rows if (r["isa"], r["threads"]) == (isa, threads)]
        path = out / f"speedup-{isa}-{threads}t.png"
        title = f"{isa}, {threads} thread{'s' * (threads > 1)} - {result['machine']['cpu']}"
        speedup_figure(some, title, path)
        written.append(path)
    return written


def _tokens_title(shape: str) -> str:
    tokens, inputs, outputs = shape.split("x")
    return f"{tokens} token{'s' * (tokens != '1')}, {inputs} to {outputs}"


def speedup_figure(
    rows: list[dict], title: str, path: Path, panel: Callable[[str], str] = _tokens_title
) -> None:
    """Draws speed-up against sparsity, a panel per shape; ``panel`` is the title of a shape's."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    shapes = ordered(rows, "shape")
    columns = min(3, len(shapes))
    lines = -(-len(shapes) // columns)
    figure, axes = plt.subplots(
        lines, columns, figsize=(4.2 * columns, 3.6 * lines + 0.8), squeeze=False, sharey=True
    )
    sparsities = sorted({r["sparsity"] for r in rows})
    ideal = [1 / (1 - s) for s in sparsities]
    drawn = [b for b in STYLES if any(r["block"] == b for r in rows)]
    drawn = drawn if len(drawn) <= len(DRAWN) else list(DRAWN)
    for axis, shape in zip(axes.flat, shapes, strict=False):
        axis.plot(ideal, ideal, "--", color="0.35", label="ideal: 1 / stored share")
        axis.axhline(1, color="0.35", linewidth=1.5, label="fastest dense library")
        for block in drawn:
            points = sorted(
                (r["sparsity"], r["speedup"], *r["speedup_iqr"])
                for r in rows
                if r["shape"] == shape and r["block"] == block
            )
            if points:
                colour, marker = STYLES[block]
                at = [1 / (1 - p[0]) for p in points]
                axis.plot(
                    at,
                    [p[1] for p in points],
                    color=colour,
                    marker=marker,
                    markeredgecolor="black",
                    markeredgewidth=0.5,
                    label=f"{block} blocks",
                )
                axis.fill_between(
                    at, [p[2] for p in points], [p[3] for p in points], color=colour, alpha=0.2
                )
        axis.set_title(panel(shape), fontsize=11)
        if len(sparsities) > 1:
            axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xticks(ideal, [f"{s:.0%}" for s in sparsities])
        axis.minorticks_off()
        ticks = [t for t in (0.5, 1, 2, 4, 10, 20) if t <= 1.3 * max(ideal)]
        axis.set_yticks(ticks, [f"{t:g}x" for t in ticks])
        axis.grid(alpha=0.3)
        axis.set_xlabel("sparsity (share removed)")
    for axis in axes.flat[len(shapes) :]:
        axis.remove()
    for axis in axes[:, 0]:
        axis.set_ylabel("speed-up over dense")
    handles, labels = axes.flat[0].get_legend_handles_labels()
    figure.suptitle(title, fontsize=12)
    figure.legend(handles, labels, loc="lower center", ncols=4, frameon=False, fontsize=10)
    figure.tight_layout(rect=(0, 0.5 / (3.6 * lines + 0.8), 1, 1))
    figure.savefig(path, dpi=130)
    plt.close(figure)


def headline(result: dict, threads: int = 1) -> str:
    """The table for README: blocks by sparsity, native instruction set."""
    return summary_table(result["rows"], result["native_isa"], threads)


__all__ = ["BANDS", "TARGETS", "figures", "headline", "markdown", "table"]
