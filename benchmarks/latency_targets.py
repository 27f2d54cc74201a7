"""How close latency targets come: asked for, predicted and measured times of small models.

    python -m benchmarks.latency_targets                     the models below at 60, 40 and 20 %
    python -m benchmarks.latency_targets --models mlp        the worked example of docs/analyze.md

Each model is pruned by `tetris.sparsify(model, latency=..., block="auto")`. The first choice is
that of the cost model alone; what it was predicted to take and what it took say how good that is.
The last columns are the choice after it was measured and corrected. Times are relative to the dense
model, which takes turns with the others. Write-up: docs/analyze.md.
"""

from __future__ import annotations

import argparse
import collections
import json
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

import tetris
from tetris.bench import machine
from tetris.progress import steps

from . import provenance
from .models import basic_block, conv_norm
from .report import table
from .transformer_blocks import BertLayer

SHARES = (0.6, 0.4, 0.2)


def mlp() -> tuple[nn.Module, Tensor]:
    """Four linear layers, 128 rows."""
    sizes, layers = (256, 1024, 1024, 512), collections.OrderedDict[str, nn.Module]()
    for i, (inputs, outputs) in enumerate(zip(sizes[:-1], sizes[1:], strict=True)):
        layers[f"{2 * i}"], layers[f"{2 * i + 1}"] = nn.Linear(inputs, outputs), nn.ReLU()
    layers["classifier"] = nn.Linear(512, 10)
    return nn.Sequential(layers), torch.randn(128, 256)


def cnn() -> tuple[nn.Module, Tensor]:
    """A residual network of seven 3x3 and two 1x1 convolutions, eight images of 32x32."""
    layers = collections.OrderedDict[str, nn.Module]()
    layers["stem"] = nn.Sequential(*conv_norm(3, 64), nn.ReLU())
    for i, (inputs, width, stride) in enumerate([(64, 64, 1), (64, 128, 2), (128, 256, 2)]):
        layers[f"stage{i}"] = basic_block(inputs, width, stride)
    layers["pool"] = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten())
    layers["classifier"] = nn.Linear(256, 10)
    return nn.Sequential(layers), torch.randn(8, 3, 32, 32)


def transformer() -> tuple[nn.Module, Tensor]:
    """A layer of BERT-base, a sequence of 128 tokens."""
    return BertLayer(), torch.randn(1, 128, 768)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {
    "mlp": mlp,
    "cnn": cnn,
    "transformer": transformer,
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.latency_targets",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--models", nargs="+", choices=MODELS, default=[*MODELS])
    made.add_argument("--shares", nargs="+", type=float, default=[*SHARES], metavar="SHARE")
    made.add_argument("--threads", type=int, default=1)
    made.add_argument("--out", type=Path, default=Path("build/benchmarks"))
    return made


def measure(name: str, share: float) -> dict:
    """One target: a row of the table, with ``why`` where it is out of reach."""
    torch.manual_seed(0)
    model, x = MODELS[name]()
    exclude = [n for n, _ in model.named_children() if n == "classifier"]
    row: dict = {"model": name, "share": share}
    started = time.perf_counter()
    try:
        _, report = tetris.sparsify(
            model.eval(),
            latency=share,
            example_inputs=x,
            block="auto",
            exclude=exclude,
            reorder="l1_sort",  # a search would find better orders in more time, of equal speed
            return_report=True,
        )
    except ValueError as error:
        return {**row, "why": str(error).removeprefix("tetris.sparsify: ")}
    assert report.latency is not None
    layers = {r.name: (r.block, round(r.block_sparsity, 4)) for r in report.layers}
    taken = round(time.perf_counter() - started, 1)
    return {**row, **asdict(report.latency), "layers": layers, "seconds": taken}


def markdown(result: dict) -> str:
    """The table, with machine and command."""
    head = [
        "model",
        "asked for",
        "dense",
        "budget",
        "cost model alone: predicted",
        "measured",
        "off",
    ]
    head += ["choices tried", "last one: predicted", "measured", "of the budget", "sparse model"]
    lines, why = [], []
    for r in result["rows"]:
        cells = [r["model"], f"{r['share']:g}"]
        if "why" in r:
            lines.append(cells + ["out of reach"] + [""] * (len(head) - 3))
            why.append(f"{r['model']} at {r['share']:g}: {r['why']}.")
            continue
        first = r["trials"][0]
        last = dict(r["trials"])[r["predicted_ms"]]
        cells += [f"{r[key]:.2f} ms" for key in ("dense_ms", "budget_ms")]
        cells += [f"{ms:.2f} ms" for ms in first] + [f"{first[1] / first[0] - 1:+.1%}"]
        cells += [f"{len(r['trials'])}", f"{r['predicted_ms']:.2f} ms", f"{last:.2f} ms"]
        cells += [f"{last / r['budget_ms']:.1%}", f"{r['measured_ms'] / r['budget_ms']:.1%}"]
        lines.append(cells)
    about = (
        f"{result['threads']} thread{'s' * (result['threads'] > 1)}; model: {result['model']}. "
        f"Measured on: {machine.sentence(result['machine'])}. Command: `{result['command']}`."
    )
    return "\n\n".join([table(head, lines), *why, about]) + "\n"


def main(argv: list[str] | None = None) -> int:
    """Measures, writes JSON and markdown, prints the table."""
    args = parser().parse_args(argv)
    torch.set_num_threads(args.threads)
    rows = []
    with steps(True, "latency targets", len(args.models) * len(args.shares)) as advance:
        for name in args.models:
            for share in args.shares:
                rows.append(measure(name, share))
                advance()
    words = sys.argv[1:] if argv is None else argv
    result = {
        "rows": rows,
        "threads": args.threads,
        "model": tetris.cost.load().source,
        **provenance.about(),
        "command": " ".join(["python -m benchmarks.latency_targets", *words]),
    }
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "latency_targets.json").write_text(json.dumps(result, indent=1) + "\n")
    (args.out / "latency_targets.md").write_text(markdown(result))
    Console(width=200).print(Markdown(markdown(result)))
    print("written:", args.out / "latency_targets.json", args.out / "latency_targets.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
