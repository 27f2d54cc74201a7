"""Turns measured convolutions and networks into markdown and figures."""

from pathlib import Path

from tetris.bench.machine import sentence

from .report import mark, noise, ordered, speedup_figure, spread, table, verdict_table
from .targets import (
    CONV_CLASSES,
    NETWORK_TARGETS,
    against_conv2d,
    conv_class,
    geometric_mean,
    judge_convolutions,
)

_INTRODUCTION = (
    "Layers are the distinct 3x3 and 1x1 convolutions of the networks named, without groups and "
    "without the one that reads the image; a layer is written batch x inputs x height x width - "
    "outputs, k(ernel), s(tride). Speed-up is against the fastest dense route: `F.conv2d` or "
    "oneDNN with the weight packed ahead of time (what a compiled and frozen model calls), each in "
    "NCHW and channels_last, for 1x1 also oneDNN's product of pixels and weight, none of them by "
    "Winograd's algorithm; sparse layers take and return NCHW. All are timed in turns. Times are "
    "medians; speed-up and spread are the median and the quartiles of the ratios of samples taken "
    "in the same turn. **Efficiency** is speed-up times stored share: 1 means time proportional to "
    "what is left. Layers are random, the number of their blocks is exact (a small layer may store "
    "more than asked for), inputs and outputs are both permuted at random, nothing is prepared per "
    "call; each was checked against float64 before it was timed. Everything is warm."
)


def markdown(result: dict) -> str:
    """The whole report."""
    parts = [
        "# Block-sparse convolutions against the fastest dense library",
        f"{sentence(result['machine'])}.",
        f"Printed by `{result['command']}`.",
    ]
    if result["rows"]:
        parts += _layers(result["rows"])
    if result["networks"]:
        parts += _networks(result["networks"])
    return "\n\n".join(parts) + "\n"


def _layers(rows: list[dict]) -> list[str]:
    parts = [_INTRODUCTION, noise(rows)]
    for threads, batch in dict.fromkeys((r["threads"], r["batch"]) for r in rows):
        parts.append(
            f"## Batch {batch}, {threads} thread{'s' * (threads > 1)}: speed-up (efficiency)"
        )
        parts.append("Geometric means over the layers of a class; stride 2 is a class of its own.")
        parts.append(summary_table(rows, threads, batch))
    for against, some in (("", rows), (" against F.conv2d alone", against_conv2d(rows))):
        verdicts = judge_convolutions(some)
        passed = sum(v.passed for v in verdicts)
        parts += [f"## Targets{against}: {passed} of {len(verdicts)} met"]
        parts += [verdict_table(verdicts, "layers")]
    return [*parts, "## Every point", row_table(rows)]


def summary_table(rows: list[dict], threads: int, batch: int) -> str:
    """Speed-up (efficiency) per class of layer, block and sparsity, geometric means."""
    some = [r for r in rows if (r["threads"], r["batch"]) == (threads, batch)]
    sparsities = sorted({r["sparsity"] for r in some})
    lines = []
    for kind in CONV_CLASSES:
        for block in ordered(some, "block"):
            points = [r for r in some if (conv_class(r), r["block"]) == (kind, block)]
            if points:
                cells = (_mean([p for p in points if p["sparsity"] == s]) for s in sparsities)
                lines.append([kind, str(len({p["shape"] for p in points})), block, *cells])
    return table(["class", "layers", "block", *(f"{s:.0%}" for s in sparsities)], lines)


def _mean(points: list[dict]) -> str:
    if not points:
        return ""
    speed = geometric_mean([p["speedup"] for p in points])
    share = geometric_mean([p["efficiency"] for p in points])
    return f"{speed:.2f}x ({share:.2f}){mark(points)}"


def row_table(rows: list[dict]) -> str:
    """Every measured point."""
    head = (
        "ISA, threads, layer, networks, block, sparsity, sparse ms, dense ms, dense by, speed-up, "
        "spread, efficiency, GFLOP/s stored, dense-equivalent, dense GFLOP/s, kernel"
    )
    lines = [
        [
            r["isa"],
            str(r["threads"]),
            r["shape"],
            ", ".join(r["networks"]),
            r["block"],
            f"{r['sparsity']:.0%}",
            f"{r['sparse_ms']:.3f}",
            f"{r['dense_ms']:.3f}",
            r["dense"],
            f"{r['speedup']:.2f}",
            spread(r),
            f"{r['efficiency']:.3f}",
            f"{r['stored_gflops']:.1f}",
            f"{r['equivalent_gflops']:.0f}",
            f"{r['dense_gflops']:.0f}",
            r["kernel"],
        ]
        for r in rows
    ]
    return table(head.split(", "), lines)


def _networks(networks: list[dict]) -> list[str]:
    return [
        "## Whole networks",
        "Random weights and random blocks, batch norm folded and activations and residuals fused "
        "by `tetris.fuse`; the first convolution and the classifier stay dense. Dense is the "
        "fastest of eager and eager with batch norm folded, in both memory formats, and of "
        "`torch.compile` with frozen weights, whichever were run; sparse the fastest of eager and "
        "fused.",
        network_table(networks),
        "Every way, ms; dense ways that were far behind at a first look were not timed again:",
        ways_table(networks),
    ]


def network_table(networks: list[dict]) -> str:
    """One line per network, batch, threads, block and sparsity."""
    head = "network, batch, threads, block, sparsity, sparse ms, by, dense ms, by, speed-up, target"
    lines = []
    for r in networks:
        target = NETWORK_TARGETS.get((r["network"], r["sparsity"])) if r["batch"] == 1 else None
        verdict = ""
        if target:
            verdict = f"{target:g}x: " + ("pass" if r["speedup"] >= target else "**fail**")
        lines.append(
            [
                r["network"],
                str(r["batch"]),
                str(r["threads"]),
                r["block"],
                f"{r['sparsity']:.0%}",
                f"{r['sparse_ms']:.2f}",
                r["sparse"],
                f"{r['dense_ms']:.2f}",
                r["dense"],
                f"{r['speedup']:.2f}x{mark([r])}",
                verdict,
            ]
        )
    return table(head.split(", "), lines)


def ways_table(networks: list[dict]) -> str:
    """Milliseconds of every way to run a network."""
    names = list(dict.fromkeys(way for r in networks for way in r["all_ms"]))
    lines = [
        [
            f"{r['network']}, batch {r['batch']}",
            f"{r['threads']}",
            f"{r['block']} {r['sparsity']:.0%}",
            *(f"{r['all_ms'][way]:.2f}" if way in r["all_ms"] else "" for way in names),
            r["not_run"],
        ]
        for r in networks
    ]
    return table(["network", "threads", "blocks", *names, "not run"], lines)


def figures(result: dict, out: Path) -> list[Path]:
    """Draws speed-up against sparsity, a panel per class of layer, a picture per thread count."""
    written = []
    for threads in sorted({r["threads"] for r in result["rows"]}):
        some = [r for r in result["rows"] if r["threads"] == threads]
        path = out / f"conv-speedup-{threads}t.png"
        title = (
            f"convolutions, {threads} thread{'s' * (threads > 1)}: geometric means and range over "
            f"layers - {result['machine']['cpu']}"
        )
        speedup_figure(_means(some), title, path, panel=str)
        written.append(path)
    return written


def _means(rows: list[dict]) -> list[dict]:
    """Rows of one point per class, batch, block and sparsity, with the range as spread."""
    groups: dict[tuple, list[float]] = {}
    for r in sorted(rows, key=lambda r: (CONV_CLASSES.index(conv_class(r)), r["batch"])):
        key = (f"{conv_class(r)}, batch {r['batch']}", r["block"], r["sparsity"])
        groups.setdefault(key, []).append(r["speedup"])
    return [
        {
            "shape": panel,
            "block": block,
            "sparsity": sparsity,
            "speedup": geometric_mean(speeds),
            "speedup_iqr": [min(speeds), max(speeds)],
        }
        for (panel, block, sparsity), speeds in groups.items()
    ]
