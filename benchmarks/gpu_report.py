"""Tables and figures of what benchmarks.gpu measured.

    python -m benchmarks.gpu_report build/gpu-check/out benchmarks/results

Writes GPU.json, GPU.md and GPU-speedup.png into the second folder, from as many sections as there
are in the first.
"""

import argparse
import json
import re
import sys
from pathlib import Path

from .report import table

MARKERS = {"128x128": "s", "128x16": "D", "64x64": "^", "64x16": "v", "32x32": "o", "16x16": "P",
           "8x8": "X", "4x1": "<", "1x1": ">"}  # fmt: skip


def load(folder: Path) -> tuple[dict, list[dict], list[str]]:
    """Machine, rows of all sections, names of those that did not measure all their points."""
    machine, rows, short = {}, [], []
    for path in sorted(folder.glob("*.json")):
        try:
            content = json.loads(path.read_text())
        except ValueError:
            short.append(path.stem)
            continue
        if not isinstance(content, dict) or "rows" not in content:
            continue  # gpu-check's own summary
        machine = content["machine"]
        rows += content["rows"]
        if not content["complete"]:
            short.append(content["section"])
    return machine, rows, short


def row_table(rows: list[dict]) -> str:
    """Every point of a section."""
    head = ["shape", "block", "type", "sparsity", "order", "tetris ms", "dense ms", "speed-up",
            "efficiency", "TFLOP/s stored", "dense-equivalent", "dense TFLOP/s", "of roofline",
            "kernel"]  # fmt: skip
    rivals = sorted({n for r in rows for n in r["times"]} - {"tetris", "dense"})
    lines = []
    for r in rows:
        times = r["times"]
        cells = [r["shape"], r["block"], r["dtype"], f"{r['sparsity']:.0%}", r.get("perm", "none")]
        if "speedup" in r:
            cells += [
                f"{1e3 * times['tetris']['seconds']:.4f}",
                f"{1e3 * times['dense']['seconds']:.4f}",
                f"{r['speedup']:.2f}",
                f"{r['efficiency']:.3f}",
                f"{r['stored_tflops']:.1f}",
                f"{r['equivalent_tflops']:.0f}",
                f"{r['dense_tflops']:.0f}",
                f"{r['roofline_share']:.2f}",
                times["tetris"].get("kernel", ""),
            ]
        else:
            cells += [times.get("tetris", {}).get("error", "")[:80]] + [""] * 8
        for name in rivals:
            t = times.get(name, {})
            cells.append(f"{1e3 * t['seconds']:.4f}" if "seconds" in t else t.get("error", "")[:80])
        lines.append(cells)
    return table([*head, *(f"{name} ms" for name in rivals)], lines)


def tuned_table(rows: list[dict]) -> str:
    """What tuning found."""
    return table(
        ["problem", "fastest", "us", "the library's choice", "us"],
        [
            [r["problem"], r["best"], f"{1e6 * r['seconds']:.1f}", r["guess"],
             f"{1e6 * r['guess_seconds']:.1f}"]
            for r in rows
        ],
    )  # fmt: skip


TITLES = {
    "matmul": "Forward products",
    "decode": "Few tokens",
    "dx": "Gradient of the input",
    "dvalues": "Gradient of the values",
    "conv": "3x3 convolutions, channels last, against cuDNN",
    "bsr": "torch's block-sparse product (BSR, Triton), as it comes",
    "bsr-tuned": "torch's block-sparse product, tuned for each point",
    "tuned": "What `tetris tune` finds",
}


def markdown(machine: dict, rows: list[dict], short: list[str]) -> str:
    """The whole report."""
    parts = [
        f"# {machine['gpu']}",
        f"{machine['gpu']} (compute capability {machine['capability']}, "
        f"{machine['multiprocessors']} multiprocessors), torch {machine['torch']}, CUDA "
        f"{machine['cuda']}, tetris {machine['tetris']} for {', '.join(machine['targets'])}; a "
        f"copy moves {machine['copy_bytes_per_second'] / 1e12:.2f} TB/s. Medians of calls timed in "
        "turns, L2 full of other data before each; `python -m benchmarks.gpu --help` says how, and "
        "what the roofline is. Efficiency 1 is time proportional to what is stored, at the dense "
        "library's own rate. Regenerate with `make gpu-check`.",
    ]
    if short:
        parts.append(f"Not all points were measured in the time given: {', '.join(sorted(short))}.")
    for what, title in TITLES.items():
        some = [r for r in rows if r["what"] == what]
        if some:
            parts += [f"## {title}", tuned_table(some) if what == "tuned" else row_table(some)]
    return "\n\n".join(parts) + "\n"


def plot(machine: dict, rows: list[dict], path: Path) -> None:
    """Speed-up over the dense library by sparsity, one line per block."""
    from matplotlib.figure import Figure

    shapes = sorted({r["shape"] for r in rows if r["what"] == "matmul" and "speedup" in r})
    if not shapes:
        return
    figure = Figure(figsize=(6 * len(shapes), 4.5), layout="constrained")
    for axes, shape in zip(figure.subplots(1, len(shapes), squeeze=False)[0], shapes, strict=True):
        for block, marker in MARKERS.items():
            points = sorted(
                (r["sparsity"], r["speedup"])
                for r in rows
                if r["what"] == "matmul" and r["shape"] == shape and r["block"] == block
                and r["dtype"] == "bfloat16" and r.get("perm") == "none" and "speedup" in r
            )  # fmt: skip
            if points:
                axes.plot(*zip(*points, strict=True), marker=marker, label=block)
        grid = [0.5, 0.75, 0.9, 0.95]
        axes.plot(grid, [1 / (1 - s) for s in grid], "--", color="gray", label="proportional")
        axes.axhline(1, color="gray", linewidth=0.8)
        axes.set(title=f"{shape}, bfloat16", xlabel="sparsity", ylabel="speed-up over cuBLAS",
                 yscale="log")  # fmt: skip
        axes.legend(fontsize="small")
    figure.suptitle(machine["gpu"])
    figure.savefig(path, dpi=120)


def main(argv: list[str] | None = None) -> int:
    """Reads, writes, prints the summary."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("measured", type=Path)
    parser.add_argument("results", type=Path)
    args = parser.parse_args(argv)
    machine, rows, short = load(args.measured)
    if not rows:
        print(f"gpu_report: nothing was measured in {args.measured}", file=sys.stderr)
        return 1
    args.results.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^A-Za-z0-9]+", "-", machine["gpu"]).strip("-").lower()
    written = {"machine": machine, "rows": rows, "incomplete": short}
    (args.results / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
    text = markdown(machine, rows, short)
    (args.results / f"{name}.md").write_text(text)
    try:
        plot(machine, rows, args.results / f"{name}-speedup.png")
    except ImportError:
        print("gpu_report: no matplotlib, no figure")
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
