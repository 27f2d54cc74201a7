"""``tetris calibrate``: learn how long layers take on this machine."""

import argparse
import sys
from functools import partial
from typing import Any

from .arguments import (
    add_json,
    check_output,
    checked,
    count,
    text_stream,
    thread_counts,
    write_output,
)

DESCRIPTION = """\
Measures random layers on this machine's CPU, dense and sparse, and fits the
model of their time to what it finds: about a minute on an idle machine. The
result goes into the user's cache folder (TETRIS_CACHE_DIR, else
XDG_CACHE_HOME/tetris, else ~/.cache/tetris), where `tetris analyze`,
tetris.analyze and latency targets find it. Close other programs first: with
several threads one busy core makes figures useless.

  tetris calibrate                  1 thread and all cores
  tetris calibrate --threads 1,4    other numbers of threads
  tetris calibrate --quick          a fifth of the layers
  tetris calibrate --passes 5       where other programs cannot be closed
"""


def add_parser(commands: Any) -> None:
    """Adds ``calibrate`` to the subcommands of argparse."""
    made = commands.add_parser(
        "calibrate",
        help="learn how long layers take on this machine",
        description=DESCRIPTION,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="fewer layers, some seconds")
    made.add_argument(
        "--threads",
        type=checked(thread_counts),
        metavar="N[,N]",
        help="numbers of threads to measure on (default: 1 and all cores)",
    )
    made.add_argument(
        "--passes",
        type=checked(count),
        metavar="N",
        help="how often each layer is measured, the least counts (default: 1, with threads 2)",
    )
    add_json(made.add_argument, "the result")
    made.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Calibrates and says how well the model fits, writes the JSON file."""
    from ..cost import calibrate, store
    from ..cost.features import FAMILIES

    check_output("--json", args.json)
    model = calibrate(
        threads=args.threads,
        quick=args.quick,
        passes=args.passes,
        progress=sys.stderr.isatty(),
    )
    say = partial(print, file=text_stream(args.json))
    counts = sorted(model.threads)
    say(f"{model.cpu}, {model.isa}, tetris {model.version}")
    say("median error on the layers measured, by number of threads:")
    say(f"{'':<20}" + "".join(f"{threads:>8}" for threads in counts))
    for family in FAMILIES:
        errors = "".join(f"{model.errors[threads][family]:8.1%}" for threads in counts)
        say(f"{family:<20}{errors}")
    worst = max(max(own.values()) for own in model.errors.values())
    if worst > 0.5:
        say(f"errors up to {worst:.0%}: was the machine busy? calibrate again when it is not")
    say(f"written: {store.path()}")
    if args.json:
        write_output(args.json, model.to_json())
