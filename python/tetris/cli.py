"""The ``tetris`` command; its subcommands are here and in :mod:`tetris.commands`."""

import argparse
import os
import sys
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from . import _C
from .commands import analyze, bench, calibrate, compare
from .commands.arguments import block_shape, checked, sizes, sparsity_share, threads

DEMO = """\
Trains a small network, prunes it at 90, 95 and 98 % (the convolutional one: at
75 and 90 %) in several ways, fine-tunes all of them equally as sparse layers,
and prints accuracy beside MEASURED time. Nothing is downloaded.

  tetris demo               a few minutes on two cores; Fashion-MNIST if installed
  tetris demo --model cnn   a residual network instead, on part of the images
  tetris demo --quick       a smoke test on scikit-learn's digits, under a minute
  tetris demo --full        more seeds and longer training

What the rows mean:
  dense         the network before pruning, run by the fastest dense library
  narrow        a dense network with as many hidden weights as are left
  element-wise  the largest single weights kept (1x1 blocks): most accurate, and
                slower than blocks
  unordered     blocks kept where they stand
  L1-sorted     rows and columns sorted by their L1 norm first
  TETRIS        rows and columns reordered by search first
"""

INFO = """\
Prints what this build can do on this machine: instruction sets, kernels,
versions. Put it into bug reports.
"""

TUNE = """\
Measures on this machine's GPU which CUDA kernel, with which tiles, is fastest
for the layers of a model, and keeps the answer for this kind of GPU in the
user's cache folder (TETRIS_CACHE_DIR, else XDG_CACHE_HOME/tetris, else
~/.cache/tetris), where every later run finds it. Needs a GPU and takes seconds
for each combination.

  tetris tune --shapes 4096x4096x11008 --blocks 128x16 --sparsity 90
  tetris tune --shapes 1x4096x4096 16x4096x4096 --dtypes float16 --training
"""


def parser() -> argparse.ArgumentParser:
    """The command line."""
    raw = argparse.RawDescriptionHelpFormatter
    made = argparse.ArgumentParser(
        prog="tetris",
        description="Reordered block-sparse layers for torch: pruned networks that are faster.",
        epilog="Start with `tetris demo --quick`. TETRIS_CPU_ISA=avx512|avx2|scalar forces an "
        "instruction set.",
    )
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")
    demo = commands.add_parser(
        "demo",
        help="prune a network here and see what it gains",
        description=DEMO,
        formatter_class=raw,
    )
    demo.add_argument(
        "--model",
        choices=["mlp", "cnn"],
        default="mlp",
        help="mlp: two hidden layers (default); cnn: a small residual network with batch norm",
    )
    size = demo.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="small and short, on digits")
    size.add_argument("--full", action="store_true", help="five seeds (cnn: three), trains longer")
    demo.add_argument(
        "--data",
        type=Path,
        metavar="DIR",
        help="folder with the four IDX files of Fashion-MNIST, plain or .gz (default: TETRIS_DATA, "
        "then Debian's dataset-fashion-mnist, then digits)",
    )
    demo.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="where table and pictures go (default: tetris-demo; with --quick tetris-demo/quick)",
    )
    demo.add_argument("--seed", type=int, default=0, metavar="N", help="first seed (default: 0)")
    demo.add_argument(
        "--threads",
        type=checked(threads),
        metavar="N",
        help="CPU threads (default: torch's choice)",
    )
    demo.set_defaults(run=_demo)
    info = commands.add_parser(
        "info",
        help="what this build can do on this machine",
        description=INFO,
        formatter_class=raw,
    )
    info.set_defaults(run=_info)
    tune = commands.add_parser(
        "tune",
        help="measure which CUDA kernel is fastest for given shapes",
        description=TUNE,
        formatter_class=raw,
    )
    tune.add_argument(
        "--shapes",
        nargs="+",
        type=checked(sizes("TOKENSxINxOUT")),
        default=[(4096, 4096, 4096)],
        metavar="TxIxO",
        help="tokens x inputs x outputs (default: 4096x4096x4096)",
    )
    tune.add_argument(
        "--blocks",
        nargs="+",
        type=checked(block_shape),
        default=[(128, 16), (64, 16), (32, 32)],
        metavar="HxW",
        help="height along outputs x width along inputs (default: 128x16 64x16 32x32)",
    )
    tune.add_argument(
        "--sparsity",
        nargs="+",
        type=checked(sparsity_share),
        default=[0.9],
        metavar="PERCENT",
        help="default: 90",
    )
    tune.add_argument(
        "--dtypes",
        nargs="+",
        choices=["float16", "bfloat16", "float32"],
        default=["bfloat16"],
        help="default: bfloat16",
    )
    tune.add_argument("--training", action="store_true", help="the gradients, too")
    tune.set_defaults(run=_tune)
    for command in (analyze, bench, calibrate, compare):
        command.add_parser(commands)
    made.add_argument("--version", action="version", version=f"tetris {_C.version}")
    return made


def _demo(args: argparse.Namespace) -> None:
    from .demo.config import DemoConfig
    from .demo.run import run

    size = "quick" if args.quick else "full" if args.full else "default"
    folder = Path("tetris-demo", *(["cnn"] if args.model == "cnn" else []))
    config = DemoConfig.preset(
        args.model,
        size,
        args.seed,
        data=args.data,
        out=args.out or (folder / "quick" if args.quick else folder),
        threads=args.threads,
        digits=args.quick and args.data is None,
    )
    run(config)


def _info(args: argparse.Namespace) -> None:
    import tetris

    print(tetris.info())


def _tune(args: argparse.Namespace) -> None:
    from itertools import product

    from .tune import Problem, run

    problems = [
        Problem(tokens, inputs, outputs, block, sparsity, dtype)
        for (tokens, inputs, outputs), block, sparsity, dtype in product(
            args.shapes, args.blocks, args.sparsity, args.dtypes
        )
    ]
    for path in run(problems, args.training):
        print(f"written: {path}")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command; user errors become one line on stderr and exit status 1."""
    args = parser().parse_args(argv)
    with warnings.catch_warnings():
        warnings.showwarning = _one_line(args.command, warnings.showwarning)
        return _status(args)


def _one_line(command: str, otherwise: Callable[..., None]) -> Callable[..., None]:
    """Shows the library's own warnings as errors are shown: one line, no place in its code."""

    def show(message: Warning | str, *where: Any, **more: Any) -> None:
        ours, _, text = str(message).partition("tetris: ")
        if ours or not text:
            otherwise(message, *where, **more)
        else:
            print(f"tetris {command}: {text}", file=sys.stderr)

    return show


def _status(args: argparse.Namespace) -> int:
    try:
        _C.isa_in_use()  # an instruction set forced by TETRIS_CPU_ISA may be unknown or unsupported
    except RuntimeError as error:
        print(f"tetris {args.command}: {error}", file=sys.stderr)
        return 1
    try:
        status = args.run(args) or 0
        sys.stdout.flush()
        return status
    except (
        BrokenPipeError
    ):  # who reads, as in `| head`, has enough; nor is the rest flushed at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except (OSError, ValueError, ImportError) as error:
        text = str(error).removeprefix("tetris: ")
        print(f"tetris {args.command}: {text}", file=sys.stderr)
        return 1
    except RuntimeError as error:  # torch has no type of its own for it on the CPU
        if "not enough memory" not in str(error) and "can't allocate memory" not in str(error):
            raise
        print(f"tetris {args.command}: out of memory: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
