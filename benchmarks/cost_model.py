"""How well the cost model predicts the time of layers that it was not fitted to.

    python -m benchmarks.cost_model --quick          75 layers on one thread, some seconds
    python -m benchmarks.cost_model                  300 layers, one thread and all, minutes
    python -m benchmarks.cost_model --calibrate      fit the model to this machine first

Layers are drawn at random, with another seed than that of `tetris calibrate`: no layer of one is
among those of the other. Each is measured twice, some time apart; how far the two differ is what no
model can better. Write-up: docs/analyze.md.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

import tetris
from tetris.bench import machine
from tetris.cost.calibration import measure_all
from tetris.cost.features import FAMILIES, Point
from tetris.cost.measure import Draw
from tetris.cost.model import CostModel, relative_error
from tetris.machine import cores
from tetris.progress import steps

from . import provenance

SEED = 1000  # of the held-out layers; `tetris calibrate` draws its own with seed 0


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.cost_model",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="few layers, one thread")
    made.add_argument("--calibrate", action="store_true", help="fit the model here first")
    made.add_argument("--threads", type=int, nargs="+", metavar="N", help="default: 1 and all")
    made.add_argument(
        "--out", type=Path, help="default build/benchmarks; benchmarks/results is the published one"
    )
    return made


def rows_of(
    model: CostModel, points: list[Point], first: np.ndarray, second: np.ndarray, threads: int
) -> list[dict]:
    """One row for each family: errors of the model, and of one measurement against the other."""
    predicted = np.array([model.seconds(point, threads) for point in points])
    measured = np.minimum(first, second)
    families = np.array([point.family for point in points])
    rows = []
    for family in (*FAMILIES, "all"):
        own = np.ones(len(points), bool) if family == "all" else families == family
        if not own.any():
            continue
        error = relative_error(predicted[own], measured[own])
        rows.append(
            {
                "threads": threads,
                "family": family,
                "layers": int(own.sum()),
                "median": float(np.median(error)),
                "p75": float(np.percentile(error, 75)),
                "p90": float(np.percentile(error, 90)),
                "worst": float(error.max()),
                "bias": float(np.exp(np.median(np.log(predicted[own] / measured[own])))),
                "repeat": float(np.median(relative_error(first[own], second[own]))),
            }
        )
    return rows


def markdown(result: dict) -> str:
    """The table, with machine and command."""
    lines = [
        "| threads | kernels | layers | median error | three in four below | nine in ten below | "
        "worst | bias | two measurements differ by |",
        "| --- | --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in result["rows"]:
        lines.append(
            f"| {r['threads']} | {r['family']} | {r['layers']} | {r['median']:.1%} | "
            f"{r['p75']:.0%} | {r['p90']:.0%} | {r['worst']:.0%} | {r['bias']:.2f} | "
            f"{r['repeat']:.1%} |"
        )
    lines += [
        "",
        f"Model: {result['model']}.",
        "",
        f"Measured on: {machine.sentence(result['machine'])}. Command: `{result['command']}`.",
    ]
    return "\n".join(lines) + "\n"


def run(model: CostModel, counts: list[int], samples: int, advance: Callable[[], None]):
    """Measure the held-out layers twice on each number of threads; the rows."""
    drawn = list(Draw(SEED).samples(samples))
    points = [sample.point for sample in drawn]
    rows = []
    for count in counts:
        first, second = (measure_all(drawn, count, 1, advance) for _ in range(2))
        rows += rows_of(model, points, first, second, count)
    return rows


def main(argv: list[str] | None = None) -> int:
    """Measures, writes JSON and markdown, prints the table."""
    args = parser().parse_args(argv)
    counts = args.threads or ([1] if args.quick else sorted({1, cores()}))
    samples = 10 if args.quick else 40
    started = time.perf_counter()
    if args.calibrate:
        model = tetris.calibrate(threads=counts, quick=args.quick, save=False, progress=True)
    else:
        model = tetris.cost.load()
    total = 2 * len(counts) * len(list(Draw(SEED).samples(samples)))
    with steps(True, "held-out layers", total) as advance:
        rows = run(model, counts, samples, advance)
    words = sys.argv[1:] if argv is None else argv
    result = {
        "rows": rows,
        "model": str(model),
        **provenance.about(),
        "command": " ".join(["python -m benchmarks.cost_model", *words]),
        "seconds": round(time.perf_counter() - started, 1),
    }
    out = args.out or Path("build/benchmarks")
    out.mkdir(parents=True, exist_ok=True)
    (out / "cost_model.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "cost_model.md").write_text(markdown(result))
    print(markdown(result))
    print("written:", out / "cost_model.json", out / "cost_model.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
