"""Runs an experiment with a pruning method and says what holds.

    python -m benchmarks.methods --method tetris --quick
    python -m benchmarks.methods --method compare --data fashion
    python -m benchmarks.methods --method compare --data cifar10 --root ~/data

Full runs (no --quick, five seeds or more) go to benchmarks/results/methods, others to
build/benchmarks/methods, unless --out says where.
"""

from __future__ import annotations

import argparse
import importlib
import shlex
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from tetris.commands.arguments import checked, count

from . import report, stats
from .data import DATA
from .experiment import Experiment, Setting
from .progress import Progress

METHODS = {
    "tetris": "blocks of reordered weights, by magnitude",
    "dcp": "blocks that a classifier in the middle of the network asks for",
    "synaptic": "blocks by learned strengths",
    "vrpge": "blocks sampled from learned probabilities, sparse from the first step",
    "gan": "blocks of a generator, with its own discriminator as the judge",
    "dsm": "blocks by the posterior of a Bayesian network with shrinkage priors",
    "compare": "the methods against each other, at equal storage and equal measured time",
}
"""Each is a module of this package, imported when it is asked for."""


def load(name: str) -> Experiment:
    """The experiment of a method."""
    return importlib.import_module(f".{name}", __package__).EXPERIMENT


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.methods",
        description=__doc__,
        epilog="methods: " + "; ".join(f"{name}: {what}" for name, what in METHODS.items()),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--method", required=True, choices=METHODS, help="which one")
    made.add_argument("--data", default="digits", choices=DATA)
    made.add_argument("--root", type=Path, metavar="DIR", help="folder of the data")
    made.add_argument("--seeds", type=checked(count), metavar="N", help="5; 1 with --quick")
    made.add_argument(
        "--first-seed",
        type=checked(partial(count, least=0)),
        default=0,
        metavar="N",
        help="settings were chosen on seeds from 0 on: judge them on others (10 in the documents)",
    )
    made.add_argument("--quick", action="store_true", help="a first look, about a minute")
    made.add_argument("--out", type=Path, metavar="DIR", help="folder for results")
    made.add_argument(
        "--threads", type=checked(count), default=1, metavar="N", help="of torch, 1 by default"
    )
    return made


def setting_of(args: argparse.Namespace) -> Setting:
    """The setting that a command line stands for."""
    count = args.seeds or (1 if args.quick else 5)
    full = not args.quick and count >= 5
    out = Path("benchmarks/results/methods" if full else "build/benchmarks/methods")
    seeds = tuple(range(args.first_seed, args.first_seed + count))
    return Setting(args.data, seeds, args.quick, args.out or out, args.root)


def run(experiment: Experiment, setting: Setting, command: str, console: Console) -> report.Outcome:
    """Run an experiment and hold its claims against what came out."""
    started = time.perf_counter()
    with Progress(console) as progress:
        rows = list(experiment.rows(setting, progress))
    seconds = time.perf_counter() - started
    return report.Outcome(
        experiment.name,
        experiment.title,
        setting,
        rows,
        [stats.compare(rows, claim) for claim in experiment.claims(setting)],
        experiment.check(rows),
        seconds,
        command,
    )


def main(words: Sequence[str] | None = None) -> int:
    words = sys.argv[1:] if words is None else list(words)
    args = parser().parse_args(words)
    torch.set_num_threads(args.threads)
    console = Console()
    if not console.is_terminal:  # tables in a log need not fit a narrow window
        console = Console(width=160)
    command = shlex.join(["python", "-m", "benchmarks.methods", *words])
    experiment = load(args.method)
    known = getattr(experiment, "data", ("digits", "fashion"))
    if args.data not in known:
        parser().error(f"--method {args.method} takes --data {', '.join(known)} (got {args.data})")
    outcome = run(experiment, setting_of(args), command, console)
    report.show(outcome, console)
    for path in report.write(outcome):
        console.print(f"written: {path}", highlight=False)
    return 0


if __name__ == "__main__":
    sys.exit(main())
