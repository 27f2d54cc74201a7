"""``tetris calibrate``: learn how long layers take on this machine."""

import argparse
import sys
from typing import Any

from .arguments import checked, thread_counts

DESCRIPTION = """\
Measures random layers on this machine's CPU, dense and sparse, and fits the
model of their time to what it finds: about a minute on an idle machine. The
result goes into the user's cache folder (TETRIS_CACHE_DIR, else
~/.cache/tetris), where `tetris analyze`, tetris.analyze and latency targets
find it. Close other programs first: with several threads one busy core makes
figures useless.

  tetris calibrate                  1 thread and all cores
  tetris calibrate --threads 1,4    other numbers of threads
  tetris calibrate --quick          a fifth of the layers
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
    made.add_argument("--json", action="store_true", help="write the result to standard output")
    made.set_defaults(run=run)


def run(args: argparse.Namespace) -> None:
    """Calibrates and says how well the model fits."""
    from ..cost import calibrate, store
    from ..cost.features import FAMILIES

    model = calibrate(
        threads=args.threads, quick=args.quick, progress=sys.stderr.isatty() and not args.json
    )
    if args.json:
        print(model.to_json())
        return
    counts = sorted(model.threads)
    print(f"{model.cpu}, {model.isa}, tetris {model.version}")
    print("median error on the layers measured, by number of threads:")
    print(f"{'':<20}" + "".join(f"{count:>8}" for count in counts))
    for family in FAMILIES:
        errors = "".join(f"{model.errors[count][family]:8.1%}" for count in counts)
        print(f"{family:<20}{errors}")
    worst = max(max(own.values()) for own in model.errors.values())
    if worst > 0.5:
        print(f"errors up to {worst:.0%}: was the machine busy? calibrate again when it is not")
    print(f"written: {store.path()}")
