"""``tetris bench``: sparse against the fastest dense library, on this machine."""

import argparse
import json
import math
import shlex
import sys
import time
from typing import Any

from .arguments import (
    add_json,
    block_shape,
    check_output,
    checked,
    number,
    sparsity_share,
    text_stream,
    thread_counts,
    write_output,
)

DESCRIPTION = """\
Times random block-sparse linear layers against the fastest dense library on
this machine's CPU, so that you know before pruning what it would gain.

  tetris bench                                     about a minute
  tetris bench --shapes 128x768x3072 --blocks 4x1 8x8 --sparsity 80 90
  tetris bench --threads 1,4 --compile --json new.json

A shape is TOKENSxINxOUT: tokens are the rows of x, so batch times sequence
length. Float32; both channel permutations are included in the sparse time.

What the columns mean:
  sparse ms, dense ms  medians of calls that took turns; dense is the fastest of
                       F.linear, oneDNN with prepacked weights and, with
                       --compile, torch.compile with frozen weights ("by")
  speed-up             median over rounds of dense time / sparse time
  spread               the quartiles of that ratio: wide means a busy machine
  efficiency           speed-up x stored share; 1 is time proportional to what
                       is left, and below the stored share dense is faster
  GFLOP/s stored       arithmetic really done, a second
  dense-equiv.         arithmetic of the dense layer over the sparse time, GFLOP/s

Up to 16 tokens weights come from memory on both sides, as in a network that
streams them; above, everything is warm. Close other programs first: one busy
core can make all figures of several threads wrong.
"""

SHAPES = "512x1024x4096 1x4096x4096"
BLOCKS = "4x1 16x16"
SPARSITY = "75 90"
WIDE = 1.2  # upper over lower quartile of a speed-up; of 660 published rows 9 in 10 are below 1.09


def add_parser(commands: Any) -> None:
    """Adds ``bench`` to the subcommands of argparse."""
    made = commands.add_parser(
        "bench",
        help="time sparse layers against the fastest dense library here",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="`tetris compare old.json new.json` tells two results apart.",
    )
    add = made.add_argument
    add(
        "--shapes",
        nargs="+",
        type=checked(_shape),
        default=[_shape(text) for text in SHAPES.split()],
        metavar="TxIxO",
        help=f"tokens x inputs x outputs (default: {SHAPES})",
    )
    add(
        "--blocks",
        nargs="+",
        type=checked(block_shape),
        default=[block_shape(text) for text in BLOCKS.split()],
        metavar="HxW",
        help=f"height along outputs x width along inputs (default: {BLOCKS})",
    )
    add(
        "--sparsity",
        nargs="+",
        type=checked(sparsity_share),
        default=[sparsity_share(text) for text in SPARSITY.split()],
        metavar="PERCENT",
        help=f"share of the blocks that is removed (default: {SPARSITY})",
    )
    add(
        "--threads",
        type=checked(thread_counts),
        default=[1],
        metavar="N[,N]",
        help="CPU threads, one or more counts (default: 1)",
    )
    add("--compile", action="store_true", help="torch.compile as one more dense rival")
    add(
        "--seconds",
        type=checked(number),
        default=3.0,
        metavar="S",
        help="time for each shape, thread count and sparsity, once per four blocks (default: 3)",
    )
    add_json(add, "rows, machine and command")
    made.set_defaults(run=run)


def _shape(text: str):
    from ..bench.layers import Shape

    return Shape.parse(text)


def run(args: argparse.Namespace) -> None:
    """Measures, prints a table for each shape and thread count, writes the JSON file."""
    import torch
    from rich.console import Console

    from ..bench import machine, sweep
    from ..timing import Plan

    check_output("--json", args.json)
    plan = Plan(budget_s=args.seconds)
    grid = sweep.Grid(args.shapes, args.blocks, args.sparsity, args.threads, args.compile, plan)
    console = Console(file=text_stream(args.json))
    started = time.perf_counter()
    before = torch.get_num_threads()
    try:
        rows = _measure(grid, console)
    finally:
        torch.set_num_threads(before)
    described = machine.describe()
    for table in _tables(rows):
        console.print(table)
    if noisy := _noisy(rows):
        console.print(noisy, style="yellow", soft_wrap=True, highlight=False)
    console.print(machine.sentence(described), soft_wrap=True, highlight=False)
    if args.json:
        result = {
            "rows": rows,
            "machine": described,
            "command": shlex.join(["tetris", *sys.argv[1:]]),
            "seconds": round(time.perf_counter() - started, 1),
        }
        write_output(args.json, json.dumps(result, indent=1))


def _measure(grid: Any, console: Any) -> list[dict]:
    from rich.progress import (
        BarColumn,
        MofNCompleteColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
    )

    from ..bench import sweep

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True) as bar:
        task = bar.add_task("preparing", total=len(grid.groups()))
        return list(
            sweep.run(grid, lambda name: bar.update(task, advance=1, description=f"after {name}"))
        )


def _tables(rows: list[dict]) -> list[Any]:
    """One table for each shape and number of threads, in the order of the rows."""
    from rich import box
    from rich.table import Table

    left, right = "block sparsity", "sparse_ms dense_ms by speed-_up spread effi-_ciency"
    right += " GFLOP/s_stored dense-_equiv."
    tables: dict[tuple[str, int], Table] = {}
    for row in rows:
        shape, threads = row["shape"], row["threads"]
        if (shape, threads) not in tables:
            title = f"{shape}, {threads} thread{'s' * (threads > 1)}, {row['isa']}"
            made = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=0)
            for name in left.split():
                made.add_column(name)
            for name in right.split():  # headings on two lines: the table fits 80 columns
                made.add_column(name.replace("_", "\n"), justify="right")
            tables[shape, threads] = made
        low, high = row["speedup_iqr"]
        tables[shape, threads].add_row(
            row["block"],
            f"{100 * row['sparsity']:g}%",
            _digits(row["sparse_ms"]),
            _digits(row["dense_ms"]),
            row["dense"],
            f"{_digits(row['speedup'])}x",
            f"{_digits(low)}-{_digits(high)}",
            f"{row['efficiency']:.2f}",
            _digits(row["stored_gflops"]),
            _digits(row["equivalent_gflops"]),
        )
    return list(tables.values())


def _noisy(rows: list[dict]) -> str:
    """A warning about rows whose quartiles lie too far apart to be believed, or nothing."""
    wide = [row for row in rows if row["speedup_iqr"][1] > WIDE * row["speedup_iqr"][0]]
    if not wide:
        return ""
    return (
        f"{len(wide)} of {len(rows)} rows spread by more than {100 * (WIDE - 1):.0f} %: something "
        "else is running, and these speed-ups are not to be believed; measure again"
    )


def _digits(value: float) -> str:
    """Three digits, and more only in front of the point."""
    return f"{value:.{max(0, 2 - math.floor(math.log10(value)))}f}"
