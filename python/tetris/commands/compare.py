"""``tetris compare``: what changed between two benchmark results."""

import argparse
import json
from pathlib import Path
from typing import Any

from .arguments import add_json, check_output, checked, number, text_stream, write_output

DESCRIPTION = """\
Compares two results of `tetris bench --json FILE`, row by row: before and after
a change, an update, or on two machines. Results of the repository's benchmarks
(benchmarks/results/gemm.json, conv.json) work as well.

  tetris compare old.json new.json
  tetris compare old.json new.json --fail-above 5     exit status 3 if slower
  tetris compare here.json there.json --by speedup    on different machines

What the verdicts mean:
  slower, faster  even the quartiles agree: the better half of one result is
                  worse than the worse half of the other
  same            the quartiles overlap, so a second run might turn it around

"time" is new time / old time: 1.10 is ten percent slower. "at best" and "at
worst" are the same ratio from the quartiles of both, which are moved outwards
where there were fewer than 15 rounds. A difference between
machines or library versions is a warning, since it may be the whole reason.

The exit status is 0, or 3 if --fail-above was given and a row is slower by
more than that beyond its spread, or 1 if the files cannot be compared.
"""

FAILED = 3  # told apart from a user's error (1) and a wrong command line (2)


def add_parser(commands: Any) -> None:
    """Adds ``compare`` to the subcommands of argparse."""
    made = commands.add_parser(
        "compare",
        help="tell two results of `tetris bench` apart",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("old", type=Path, help="JSON file, before")
    add("new", type=Path, help="JSON file, now")
    add(
        "--by",
        choices=["time", "speedup"],
        default="time",
        help="time: of the sparse layers (default); speedup: over the dense library, which also "
        "holds where the machine as a whole was slower",
    )
    add(
        "--fail-above",
        type=checked(number),
        metavar="PERCENT",
        help="exit with status 3 if a row is slower by more than this, beyond its spread",
    )
    add_json(add, "the comparison")
    made.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Prints the comparison; the exit status."""
    from rich.console import Console

    from ..bench.compare import compare

    check_output("--json", args.json)
    found = compare(args.old, args.new, args.by)
    console = Console(file=text_stream(args.json), soft_wrap=True, highlight=False)
    if not console.is_terminal:
        console.width = 160  # a file or a pipe has room for whole columns
    warn = Console(stderr=True, soft_wrap=True, highlight=False)
    for text in found.warnings:
        warn.print(f"warning: {text}", markup=False)
    if found.warnings and args.by == "time":
        warn.print("warning: --by speedup compares each result with its own dense library")
    console.print(_table(found))
    count = {v: sum(c.verdict == v for c in found.changes) for v in ("faster", "same", "slower")}
    console.print(
        f"{len(found.changes)} rows: {count['faster']} faster, {count['same']} the same, "
        f"{count['slower']} slower; time x {found.mean:.3f} in the geometric mean"
    )
    for rows, path in ((found.only_old, args.old), (found.only_new, args.new)):
        if rows:
            console.print(f"{len(rows)} rows are in {path} only", markup=False)
    if args.json:
        result = {"old": str(args.old), "new": str(args.new), **found.as_dict()}
        write_output(args.json, json.dumps(result, indent=1))
    if args.fail_above is None or not (failed := found.slower_by(args.fail_above)):
        return 0
    warn.print(f"{len(failed)} rows are slower by more than {args.fail_above:g} %")
    return FAILED


def _table(found: Any) -> Any:
    from rich import box
    from rich.table import Table

    told = [
        {k: f"{100 * v:g}%" if k == "sparsity" else str(v) for k, v in change.key.items()}
        for change in found.changes
    ]
    names = list(dict.fromkeys(name for what in told for name in what))
    # What is the same everywhere goes above the table, once.
    shared = [n for n in names if len({what.get(n) for what in told}) == 1]
    columns = [n for n in names if n not in shared]
    unit, form = ("ms", "{:.4g}") if found.by == "time" else ("speed-up", "{:.2f}x")
    title = ", ".join(f"{n} {told[0][n]}" for n in shared)
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in columns:
        table.add_column(name)
    for name in (f"old {unit}", f"new {unit}", "time", "at best", "at worst"):
        table.add_column(name, justify="right")
    table.add_column("verdict")
    colours = {"slower": "red", "faster": "green", "same": "dim"}
    for change, what in zip(found.changes, told, strict=True):
        table.add_row(
            *(what.get(name, "") for name in columns),
            form.format(change.old),
            form.format(change.new),
            f"{change.ratio:.3f}",
            *(f"{bound:.3f}" for bound in change.spread),
            f"[{colours[change.verdict]}]{change.verdict}[/]",
        )
    return table
