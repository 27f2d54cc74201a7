"""Speed-up curves of the block-sparse product against the fastest dense library.

    python -m benchmarks.gemm --quick                        under two minutes
    python -m benchmarks.gemm                                everything, about 25 minutes
    python -m benchmarks.gemm --shapes 512x1024x4096 --blocks 4x1 16x16 --sparsity 90

Every point is timed in turns with the dense baselines: F.linear, oneDNN with prepacked weights
and (full run) torch.compile; the fastest of them is what counts.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

import tetris
from tetris.bench.layers import Shape
from tetris.commands.arguments import block_shape, checked, sparsity_share, thread_counts
from tetris.machine import cores
from tetris.timing import Plan

from . import provenance, report, sweep, targets

SHAPES = [
    "512x1024x4096",
    "2048x4096x4096",
    "512x384x1536",
    "128x4096x4096",
    "16x4096x4096",
    "1x4096x4096",
]
BLOCKS = ["1x1", "2x1", "4x1", "8x1", "16x1", "32x1", "4x4", "8x8", "16x16", "32x32", "64x64"]
SPARSITIES = ["50", "75", "90", "95"]
QUICK_SHAPES = ["512x1024x4096", "16x4096x4096", "1x4096x4096"]
QUICK_BLOCKS = ["1x1", "4x1", "16x1", "16x16"]
QUICK_SPARSITIES = ["75", "90"]
TRAINING_SHAPES = ["512x1024x4096", "512x384x1536"]
TRAINING_BLOCKS = ["4x1", "16x1", "8x8", "16x16", "32x32"]
RIVAL_POINTS = [((1, 1), 0.9), ((4, 4), 0.9), ((16, 16), 0.75), ((16, 16), 0.9), ((32, 32), 0.9)]
# holds the dense libraries to the instruction set that tetris is held to
LIBRARY_LIMITS = {
    "avx2": {
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_ENABLE_INSTRUCTIONS": "AVX2",
        "ATEN_CPU_CAPABILITY": "avx2",
    },
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.gemm",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Read the result in OUT/gemm.md (tables, targets) and OUT/speedup-*.png; the raw "
        "medians are in OUT/gemm.json.",
    )
    add = made.add_argument
    add("--quick", action="store_true", help="few shapes and blocks, one thread count")
    add(
        "--shapes",
        nargs="+",
        type=checked(Shape.parse),
        metavar="TxIxO",
        help=f"tokens x in x out; default {' '.join(SHAPES)}",
    )
    add(
        "--blocks",
        nargs="+",
        type=checked(block_shape),
        metavar="HxW",
        help=f"height along outputs x width along inputs; default {' '.join(BLOCKS)}",
    )
    add(
        "--sparsity",
        nargs="+",
        type=checked(sparsity_share),
        metavar="PERCENT",
        help=f"share removed; default {' '.join(SPARSITIES)}",
    )
    add(
        "--threads",
        type=checked(thread_counts),
        metavar="N[,N]",
        help="default 1 and all cores (--quick: 1)",
    )
    add(
        "--isa",
        nargs="+",
        choices=tetris._C.isas_built(),
        help="default: the best one, and in the full run also avx2 on part of the grid, with the "
        "dense libraries held to AVX2 too",
    )
    add(
        "--training",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="also time forward + backward (full run: on)",
    )
    add(
        "--rivals",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="also time torch and scipy BSR at a few points (full run: on)",
    )
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="torch.compile as one more dense baseline (full run: on)",
    )
    add(
        "--out",
        type=Path,
        help="default benchmarks/results; build/benchmarks for a part of the grid",
    )
    add("--raw", type=Path, help=argparse.SUPPRESS)  # child process: rows only, into this file
    return made


def grid(args: argparse.Namespace) -> sweep.Grid:
    """The grid that the arguments ask for."""
    quick = args.quick
    plan = Plan(budget_s=2.0, min_rounds=3, max_rounds=7) if quick else Plan(budget_s=3.0)
    threads = args.threads or ([1] if quick else sorted({1, cores()}))
    return sweep.Grid(
        shapes=args.shapes or [Shape.parse(s) for s in (QUICK_SHAPES if quick else SHAPES)],
        blocks=args.blocks or [block_shape(b) for b in (QUICK_BLOCKS if quick else BLOCKS)],
        sparsities=args.sparsity
        or [sparsity_share(s) for s in (QUICK_SPARSITIES if quick else SPARSITIES)],
        threads=threads,
        compiled=_default(args.compile, not quick),
        plan=plan,
    )


def _default(choice: bool | None, otherwise: bool) -> bool:
    return otherwise if choice is None else choice


def measure(args: argparse.Namespace, console: Console) -> dict:
    """Runs what was asked for in this process; the rows of the result."""
    wanted = grid(args)
    training = rivals = False
    if not args.raw:
        training = _default(args.training, not args.quick)
        rivals = _default(args.rivals, not args.quick)
    training_grid = sweep.Grid(
        shapes=args.shapes or [Shape.parse(s) for s in TRAINING_SHAPES],
        blocks=args.blocks or [block_shape(b) for b in TRAINING_BLOCKS],
        sparsities=args.sparsity or [0.75, 0.9],
        threads=wanted.threads,
        compiled=False,
        plan=wanted.plan,
    )
    steps = len(wanted.groups())
    if training:
        per_thread = len(training_grid.shapes) * len(training_grid.sparsities)
        steps += per_thread * len(training_grid.threads)
    steps += len(RIVAL_POINTS) * rivals
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    with bar:
        isa = tetris._C.isa_in_use()
        task = bar.add_task(f"[{isa}] preparing", total=steps)

        def step(name: str) -> None:
            bar.update(task, advance=1, description=f"\\[{isa}] {name}")

        result = {"rows": list(sweep.run(wanted, step)), "training": [], "rivals": []}
        if training:
            result["training"] = list(sweep.run_training(training_grid, step))
        if rivals:
            result["rivals"] = list(sweep.run_rivals(Shape.parse(SHAPES[0]), RIVAL_POINTS, step))
        result["peaks"] = {isa: sweep.fma_peak()}
        bar.update(task, description=f"\\[{isa}] done")
    return result


def measure_held_back(isa: str, args: argparse.Namespace) -> dict:
    """Runs part of the grid in a process that is held to a lesser instruction set.

    A process of its own, because the dense libraries read their limits once, when they load.
    """
    shapes = args.shapes or [s for s in map(Shape.parse, SHAPES) if 128 <= s.tokens <= 512]
    wanted = grid(args)
    with tempfile.TemporaryDirectory() as folder:
        raw = Path(folder) / "rows.json"
        command = [sys.executable, "-m", "benchmarks.gemm", "--raw", str(raw), "--no-compile"]
        command += ["--threads", str(min(wanted.threads)), "--shapes", *map(str, shapes)]
        command += ["--blocks", *(f"{h}x{w}" for h, w in wanted.blocks)]
        command += ["--sparsity", *(f"{100 * s:g}" for s in wanted.sparsities)]
        command += ["--quick"] * args.quick
        limits = {"TETRIS_CPU_ISA": isa, **LIBRARY_LIMITS.get(isa, {})}
        subprocess.run(command, env={**os.environ, **limits}, check=True)
        return json.loads(raw.read_text())


def main(argv: list[str] | None = None) -> int:
    """Measures, writes JSON, markdown and figures, prints the summary."""
    args = parser().parse_args(argv)
    console = Console()
    started = time.perf_counter()
    native = tetris._C.isa_in_use()
    if args.raw:
        args.raw.write_text(json.dumps(measure(args, console)))
        return 0
    isas = args.isa or [native, *(["avx2"] if not args.quick else [])]
    available = tetris._C.isas_supported()
    result: dict = {"rows": [], "training": [], "rivals": [], "peaks": {}}
    for isa in dict.fromkeys(isas):
        if isa not in available:
            console.print(f"{isa}: this CPU does not have it; skipped")
            continue
        part = measure(args, console) if isa == native else measure_held_back(isa, args)
        for key in ("rows", "training", "rivals"):
            result[key] += part[key]
        result["peaks"] |= part["peaks"]
    words = sys.argv[1:] if argv is None else argv
    result |= {
        **provenance.about(convolutions=False),
        "native_isa": native,
        "command": " ".join(["python -m benchmarks.gemm", *words]),
        "seconds": round(time.perf_counter() - started, 1),
    }
    # Only the whole grid replaces the published figures.
    part = args.quick or args.shapes or args.blocks or args.sparsity or args.threads or args.isa
    out = args.out or Path("build/benchmarks" if part else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    (out / "gemm.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "gemm.md").write_text(report.markdown(result))
    pictures = report.figures(result, out)
    for isa, threads in dict.fromkeys((r["isa"], r["threads"]) for r in result["rows"]):
        console.print(f"\n{isa}, {threads} thread(s): speed-up (efficiency), geometric means")
        console.print(Markdown(report.summary_table(result["rows"], isa, threads)))
    verdicts = targets.judge(result["rows"], result["training"])
    passed = sum(v.passed for v in verdicts)
    console.print(f"targets met: {passed} of {len(verdicts)}; {result['seconds']:.0f} s in all")
    console.print("written:", *(str(p) for p in (out / "gemm.json", out / "gemm.md", *pictures)))
    return 0


if __name__ == "__main__":
    sys.exit(main())
