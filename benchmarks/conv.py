"""Block-sparse convolutions against the fastest dense library, layer by layer or whole networks.

    python -m benchmarks.conv --quick                        under a minute and a half
    python -m benchmarks.conv                                every layer, under ten minutes
    python -m benchmarks.conv --models                       whole networks as well
    python -m benchmarks.conv --layers 8x256x14x14-256k3s1 --blocks 8x1 --sparsity 75

Layers are the distinct 3x3 and 1x1 convolutions of ResNet-50, ResNet-18 and VGG-16 and the
pointwise ones of MobileNetV2. Every point is timed in turns with F.conv2d and oneDNN with
prepacked weights, both in NCHW and channels_last, and what else torch has for the layer; the
fastest is what counts.
"""

import argparse
import json
import sys
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

from tetris.commands.arguments import block_shape, checked, sparsity_share, thread_counts
from tetris.machine import cores
from tetris.timing import Plan

from . import conv_report, conv_sweep, networks, provenance, targets
from .convolutions import ConvShape, known_layers
from .models import MODELS

BLOCKS = ["4x1", "8x1", "16x1", "8x8", "16x16"]
SPARSITIES = ["50", "75", "90"]
BATCHES = [1, 8]
QUICK_LAYERS = [
    "1x64x56x56-64k3s1",
    "1x256x14x14-256k3s1",
    "8x512x7x7-512k3s1",
    "1x128x56x56-128k3s2",
    "1x256x14x14-1024k1s1",
    "1x576x14x14-96k1s1",
]
QUICK_BLOCKS = ["4x1", "8x1", "16x1"]
QUICK_SPARSITIES = ["75", "90"]
PLAN = Plan(sample_s=0.004, budget_s=0.25, min_rounds=5, max_rounds=11)  # 660 groups, ten minutes
QUICK_PLAN = Plan(budget_s=2.0, min_rounds=5, max_rounds=15)  # few layers have time
NETWORKS = [("ResNet-18", 1), ("ResNet-18", 8), ("ResNet-50", 1), ("VGG-16", 1)]
NETWORK_SPARSITIES = ["80", "90"]
NETWORK_BLOCKS = ["4x1", "8x1", "16x16"]


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.conv",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Read the result in OUT/conv.md (tables, targets) and OUT/conv-speedup-*.png; the "
        "raw medians are in OUT/conv.json.",
    )
    add = made.add_argument
    add("--quick", action="store_true", help="few layers and blocks, one thread")
    add(
        "--layers",
        nargs="+",
        type=checked(ConvShape.parse),
        metavar="NxCxHxH-OkKsS",
        help="batch x in x height x width - out, k(ernel), s(tride); dN behind it is a dilation; "
        "default all of the networks",
    )
    add("--of", nargs="+", choices=list(MODELS), metavar="NETWORK", help=f"of {', '.join(MODELS)}")
    add("--batch", nargs="+", type=int, metavar="N", help="default 1 and 8")
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
        help=f"share removed; default {' '.join(SPARSITIES)}; networks: 80 and 90",
    )
    add(
        "--threads",
        type=checked(thread_counts),
        metavar="N[,N]",
        help="default 1 and all cores (--quick: 1)",
    )
    add("--models", action="store_true", help="time whole networks too")
    add("--only-models", action="store_true", help="time whole networks and no layers")
    add(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="run networks through torch.compile too (minutes of compiling)",
    )
    add("--image", type=int, default=224, metavar="N", help="height and width of the image")
    add(
        "--out",
        type=Path,
        help="default benchmarks/results; build/benchmarks for a part of the grid",
    )
    return made


def layer_grid(args: argparse.Namespace) -> conv_sweep.ConvGrid:
    """The grid of layers that the arguments ask for."""
    quick = args.quick
    if args.layers or (quick and not args.of):
        named = args.layers or [ConvShape.parse(text) for text in QUICK_LAYERS]
        layers = {shape: [] for shape in named}
    else:
        known = known_layers(args.of or list(MODELS))
        batches = args.batch or BATCHES
        layers = {shape.at(batch): names for shape, names in known.items() for batch in batches}
    return conv_sweep.ConvGrid(
        layers=layers,
        blocks=args.blocks or [block_shape(b) for b in (QUICK_BLOCKS if quick else BLOCKS)],
        sparsities=args.sparsity
        or [sparsity_share(s) for s in (QUICK_SPARSITIES if quick else SPARSITIES)],
        threads=_threads(args),
        plan=QUICK_PLAN if quick or args.layers else PLAN,
    )


def network_grid(args: argparse.Namespace) -> networks.NetworkGrid:
    """The grid of networks that the arguments ask for."""
    chosen = [(n, b) for n, b in NETWORKS if n in (args.of or MODELS)]
    if args.of:
        chosen += [(n, 1) for n in args.of if n not in dict(chosen)]
    if args.batch:
        chosen = [(n, b) for n in dict(chosen) for b in args.batch]
    elif args.quick:
        chosen = chosen[:1]
    return networks.NetworkGrid(
        networks=chosen,
        sparsities=args.sparsity or [sparsity_share(s) for s in NETWORK_SPARSITIES],
        blocks=args.blocks or [block_shape(b) for b in NETWORK_BLOCKS],
        threads=_threads(args),
        compiled=args.compile and not args.quick,
        plan=Plan(sample_s=0.02, budget_s=4.0, min_rounds=5, max_rounds=15),
        size=args.image,
    )


def _threads(args: argparse.Namespace) -> list[int]:
    return args.threads or ([1] if args.quick else sorted({1, cores()}))


def measure(args: argparse.Namespace, console: Console) -> dict:
    """The rows of layers and of networks."""
    layers = None if args.only_models else layer_grid(args)
    whole = network_grid(args) if args.models or args.only_models else None
    steps = (layers.steps() if layers else 0) + (whole.steps() if whole else 0)
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    bar = Progress(*columns, TimeElapsedColumn(), TimeRemainingColumn(), console=console)
    with bar:
        task = bar.add_task("preparing", total=steps)

        def step(name: str) -> None:
            bar.update(task, advance=1, description=name)

        return {
            "rows": list(conv_sweep.run(layers, step)) if layers else [],
            "networks": list(networks.run(whole, step)) if whole else [],
        }


def main(argv: list[str] | None = None) -> int:
    """Measures, writes JSON, markdown and figures, prints the summary."""
    args = parser().parse_args(argv)
    console = Console()
    started = time.perf_counter()
    result = measure(args, console)
    words = sys.argv[1:] if argv is None else argv
    result |= {
        **provenance.about(),
        "command": " ".join(["python -m benchmarks.conv", *words]),
        "seconds": round(time.perf_counter() - started, 1),
    }
    # Only the whole grid replaces the published figures.
    part = args.quick or args.layers or args.of or args.batch or args.blocks or args.sparsity
    part = part or args.threads or args.only_models or not args.compile or args.image != 224
    out = args.out or Path("build/benchmarks" if part else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    written = _write(result, out)
    for threads, batch in dict.fromkeys((r["threads"], r["batch"]) for r in result["rows"]):
        console.print(f"\nbatch {batch}, {threads} thread(s): speed-up (efficiency), means")
        console.print(Markdown(conv_report.summary_table(result["rows"], threads, batch)))
    if result["networks"]:
        console.print(Markdown(conv_report.network_table(result["networks"])))
    verdicts = targets.judge_convolutions(result["rows"])
    passed = sum(v.passed for v in verdicts)
    by_torch = targets.judge_convolutions(targets.against_conv2d(result["rows"]))
    console.print(
        f"targets met: {passed} of {len(verdicts)}, against F.conv2d alone "
        f"{sum(v.passed for v in by_torch)}; {result['seconds']:.0f} s in all"
    )
    console.print("written:", *map(str, written))
    return 0


def _write(result: dict, out: Path) -> list[Path]:
    (out / "conv.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "conv.md").write_text(conv_report.markdown(result))
    return [out / "conv.json", out / "conv.md", *conv_report.figures(result, out)]


if __name__ == "__main__":
    sys.exit(main())
