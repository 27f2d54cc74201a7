"""What folding leaves of the permutations at run time, and what one order for all costs.

    python -m benchmarks.folding --quick                     half a minute
    python -m benchmarks.folding                             everything, a few minutes

Four networks, trained for a moment, are pruned twice: each layer alone, in an order of its own, and
all layers that share channels together. Both are folded. Counted are the row and column
permutations that sparse layers apply at run time; retained is the saliency in stored blocks, the
mean over layers.
"""

import argparse
import importlib.util
import json
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.markdown import Markdown

import tetris
from tetris.commands.arguments import block_shape, checked, sparsity_share
from tetris.prune import SharedOrders, SparsifyReport

from . import provenance
from .folding_models import MODELS, NEEDS_TRANSFORMERS, Trained
from .readme import fill

BLOCKS = ["8x8", "16x16"]
PAGE = Path("docs/folding.md")


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.folding",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Read the result in OUT/folding.md; a full run also fills docs/folding.md.",
    )
    add = made.add_argument
    add("--quick", action="store_true", help="few steps and sweeps, 8x8 only")
    add("--models", nargs="+", choices=list(MODELS), help="default all")
    add(
        "--blocks",
        nargs="+",
        type=checked(block_shape),
        metavar="HxW",
        help=f"default {' '.join(BLOCKS)}",
    )
    add(
        "--sparsity",
        type=checked(sparsity_share),
        default=0.75,
        metavar="PERCENT",
        help="default 75",
    )
    add("--steps", type=int, help="of training; default 400, with --quick 30")
    add("--sweeps", type=int, help="of each search; default 60, with --quick 4")
    add("--out", type=Path, help="default benchmarks/results; build/benchmarks for a part")
    return made


def measure(args: argparse.Namespace, console: Console) -> list[dict]:
    """One row per model and block."""
    names = args.models or list(MODELS)
    if importlib.util.find_spec("transformers") is None:
        for name in [n for n in names if n in NEEDS_TRANSFORMERS]:
            console.print(f"{name} is left out: it needs transformers (pip install transformers)")
        names = [n for n in names if n not in NEEDS_TRANSFORMERS]
    rows = []
    for name in names:
        console.print(f"{name} ...")
        trained = MODELS[name](args.steps)
        orders = tetris.shared_orders(trained.model, trained.example)
        for block in args.blocks:
            rows.append({"model": name, **row(trained, orders, block, args)})
    return rows


def row(
    trained: Trained, orders: SharedOrders, block: tuple[int, int], args: argparse.Namespace
) -> dict:
    """One model, pruned to one block size: alone, together, and in the order it has."""
    settings = {
        "sparsity": args.sparsity,
        "block": block,
        "exclude": trained.exclude,
        "sweeps": args.sweeps,
        "return_report": True,
    }
    found = {"block": f"{block[0]}x{block[1]}", "loss": trained.loss, "orders": len(orders)}
    for way, share in {"alone": (), "together": orders}.items():
        started = time.perf_counter()
        sparse, pruning = tetris.sparsify(trained.model, share=share, **settings)
        seconds = time.perf_counter() - started
        _, report = tetris.fold(sparse, trained.example, return_report=True)
        found[way] = {
            "retained": mean(pruning, "retained"),
            "before": report.before,
            "after": report.after,
            "difference": report.difference,
            "kept": report.to_dict()["kept"],
            "seconds": seconds,
        }
        found["layers"] = len(pruning.layers)
        found["no order"] = mean(pruning, "identity_retained")
        found["elements"] = mean(pruning, "unstructured_retained")
    return found


def mean(report: SparsifyReport, name: str) -> float:
    """Mean over layers."""
    return sum(getattr(layer, name) for layer in report.layers) / len(report.layers)


def table(rows: list[dict]) -> str:
    """Permutations and retained saliency."""
    lines = [
        "| model | layers | block | permutations, alone | folded | together | folded "
        "| retained, no order | alone | together | single weights |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for r in rows:
        a, b = r["alone"], r["together"]
        lines.append(
            f"| {r['model']} | {r['layers']} | {r['block']} "
            f"| {a['before']} | {a['after']} | {b['before']} | **{b['after']}** "
            f"| {r['no order']:.1%} | {a['retained']:.1%} | **{b['retained']:.1%}** "
            f"| {r['elements']:.1%} |"
        )
    return "\n".join(lines)


def summary(result: dict) -> str:
    """How the figures came about, in a sentence or two."""
    rows = result["rows"]
    worst = max(r[way]["difference"] for r in rows for way in ("alone", "together"))
    return (
        f"{rows[0]['sparsity']:.0%} of the blocks removed; {result['steps']} steps of training, "
        f"{result['sweeps']} sweeps of each search: `{result['command']}`, torch "
        f"{result['machine']['versions']['torch']}. Results before and after folding differ by at "
        f"most {worst:.0e} of the largest."
    )


def main(argv: list[str] | None = None) -> int:
    """Measures, writes JSON and markdown, prints the table."""
    args = parser().parse_args(argv)
    part = args.quick or args.models or args.blocks or args.steps or args.sweeps
    part = part or args.sparsity != parser().get_default("sparsity")
    args.blocks = args.blocks or [block_shape(b) for b in (["8x8"] if args.quick else BLOCKS)]
    args.steps = args.steps or (30 if args.quick else 400)
    args.sweeps = args.sweeps or (4 if args.quick else 60)
    console = Console()
    rows = measure(args, console)
    words = sys.argv[1:] if argv is None else argv
    result = {
        "rows": [{**r, "sparsity": args.sparsity} for r in rows],
        **provenance.about(),
        "command": " ".join(["python -m benchmarks.folding", *words]),
        "steps": args.steps,
        "sweeps": args.sweeps,
    }
    out = args.out or Path("build/benchmarks" if part else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    (out / "folding.json").write_text(json.dumps(result, indent=1) + "\n")
    made = table(rows)
    page = f"# Permutations at run time\n\n{summary(result)}\n\n{made}\n"
    (out / "folding.md").write_text(page)
    if not part and PAGE.exists():
        pieces = {"folding": made, "folding-machine": summary(result)}
        PAGE.write_text(fill(PAGE.read_text(), pieces))
    console.print(Markdown(made))
    console.print("written:", str(out / "folding.json"), str(out / "folding.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
