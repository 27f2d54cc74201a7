"""Transformer layers: dense, compiled and sparse, attention and MLP by themselves and whole.

    python -m benchmarks.transformer [--quick]

Every linear layer is sparse: random blocks under random orders of rows and columns, as many as the
sparsity leaves, activations fused into them. Attention itself (softmax, products of activations) is
dense everywhere. All candidates of a case take turns. Writes ``transformer.json`` and ``.md``.
"""

import argparse
import copy
import gc
import itertools
import json
import sys
import time
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from rich.progress import Progress
from torch import Tensor, nn

import tetris
from tetris.bench import machine
from tetris.bench.layers import frozen
from tetris.modules import replace_modules
from tetris.timing import Candidate, Plan, interleave, prepacked_linear, quartiles

from . import provenance
from .networks import random_layout
from .report import table
from .transformer_blocks import MODELS, PARTS, Attention, Model, part_of

BLOCKS = ((4, 1), (16, 16))
DENSE = ("eager", "oneDNN", "compile")
SPARSITIES = (0.5, 0.8, 0.9, 0.95)


def pruned(model: nn.Sequential, block: tuple[int, int], sparsity: float) -> nn.Sequential:
    """A copy of a model whose linear layers are sparse, with activations fused."""
    generator = torch.Generator().manual_seed(0)
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    new: dict[str, nn.Module] = {}
    for name, layer in linear.items():
        layout = random_layout(layer.weight.shape, block, sparsity, generator)
        new[name] = tetris.SparseLinear.from_dense(layer, layout=layout)
    result = copy.deepcopy(model, {id(m): m for m in linear.values()})  # not the dense weights
    replace_modules(result, new)
    for layer in result:
        layer.mlp = tetris.fuse(layer.mlp)  # type: ignore[arg-type]
    return result.requires_grad_(False)


class Prepacked(nn.Module):
    """A linear layer by oneDNN with its weight packed ahead of time.

    Args:
        layer: The layer.
        tokens: That the weight is packed for.
    """

    def __init__(self, layer: nn.Linear, tokens: int) -> None:
        super().__init__()
        self.call = prepacked_linear(layer.weight.detach(), layer.bias, tokens)

    def forward(self, x: Tensor) -> Tensor:
        """[..., in] to [..., out]."""
        assert self.call is not None
        return self.call(x)


def prepacked(model: nn.Module, tokens: int) -> nn.Module | None:
    """A copy of a model with such layers; None where this torch has no oneDNN."""
    linear = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    new: dict[str, nn.Module] = {n: Prepacked(m, tokens) for n, m in linear.items()}
    if any(m.call is None for m in new.values()):
        return None
    return replace_modules(copy.deepcopy(model, {id(m): m for m in linear.values()}), new)


def measure(
    name: str, model: Model, grid: list[tuple[tuple[int, int], float]], plan: Plan, compiled: bool
):
    """Rows of one model: each case, part, block and sparsity."""
    dense = model.build()
    sparse = {point: pruned(dense, *point) for point in grid}
    for (batch, tokens, before), part in itertools.product(model.cases, PARTS):
        torch.manual_seed(0)
        x = torch.randn(batch, tokens, model.hidden)
        for module in (dense, *sparse.values()):
            for layer in module.modules():
                if isinstance(layer, Attention):
                    layer.remember(batch, before)
        own = part_of(dense, part)
        candidates: dict[str, Candidate] = {"eager": lambda own=own, x=x: own(x)}
        if (packed := prepacked(own, batch * tokens)) is not None:
            candidates["oneDNN"] = lambda packed=packed, x=x: packed(x)
        if compiled:
            torch._dynamo.reset()
            candidates["compile"] = frozen(own, x)
        for (block, sparsity), module in sparse.items():
            sub = part_of(module, part)
            candidates[f"{block[0]}x{block[1]} {sparsity}"] = lambda sub=sub, x=x: sub(x)
        times = {n: 1e3 * t / model.depth for n, t in interleave(candidates, plan).items()}
        best = min((n for n in DENSE if n in times), key=lambda n: np.median(times[n]))
        for block, sparsity in sparse:
            key = f"{block[0]}x{block[1]}"
            own_times = times[f"{key} {sparsity}"]
            low, middle, high = quartiles(times[best] / own_times)
            yield {
                "model": name,
                "batch": batch,
                "tokens": tokens,
                "past": before,
                "part": part,
                "block": key,
                "sparsity": sparsity,
                "rounds": len(own_times),
                "dense_ms": {n: float(np.median(times[n])) for n in DENSE if n in times},
                "sparse_ms": float(np.median(own_times)),
                "dense": best,
                "speedup": middle,
                "speedup_iqr": [low, high],
            }
        del candidates, packed
        gc.collect()


def case_name(row: dict) -> str:
    """What a row is measured with, in words."""
    tokens = f"{row['batch']} x {row['tokens']} token{'s' * (row['tokens'] > 1)}"
    return f"{row['model']}, {tokens}" + f" after {row['past']}" * (row["past"] > 0)


def speed_table(rows: list[dict]) -> str:
    """Speed-up over the fastest dense one, by case, part and block."""
    sparsities = sorted({r["sparsity"] for r in rows})
    keys = dict.fromkeys((case_name(r), r["part"], r["block"]) for r in rows)
    lines = []
    for key in keys:
        own = {r["sparsity"]: r for r in rows if (case_name(r), r["part"], r["block"]) == key}
        first = next(iter(own.values()))
        dense = [first["dense_ms"].get(n) for n in DENSE]
        lines.append(
            [
                *key,
                *("" if t is None else f"{t:.2f}" for t in dense),
                *(f"{own[s]['sparse_ms']:.2f} ({own[s]['speedup']:.2f}x)" for s in sparsities),
            ]
        )
    head = ["case", "part", "block", *(f"{n} ms" for n in DENSE)]
    return table([*head, *(f"{s:.0%} ms" for s in sparsities)], lines)


def losses(rows: list[dict]) -> str:
    """Where sparse is slower than the fastest dense one, in a sentence."""
    lost = [r for r in rows if r["speedup"] < 1]
    if not lost:
        least = min(rows, key=lambda r: r["speedup"])
        return (
            f"Sparse was faster everywhere, least so at {least['sparsity']:.0%} with "
            f"{least['block']} blocks ({case_name(least)}, {least['part']}: "
            f"{least['speedup']:.2f}x)."
        )
    found = [
        f"{case_name(r)}, {r['part']}, {r['block']} at {r['sparsity']:.0%} ({r['speedup']:.2f}x)"
        for r in lost
    ]
    return f"Slower than dense: {'; '.join(found)}."


def markdown(result: dict) -> str:
    """The result file for people."""
    return "\n".join(
        [
            "# Transformer layers",
            "",
            f"Measured on: {machine.sentence(result['machine'])}. Command: `{result['command']}`, "
            f"{result['threads']} thread(s), {result['seconds']:.0f} s.",
            "",
            "Milliseconds per layer, float32, medians of candidates that take turns; in brackets "
            "the median of the ratios to the fastest dense one in the same round: eager, oneDNN "
            "with weights packed ahead of time, torch.compile with frozen weights. Spread and "
            "rounds: transformer.json.",
            "",
            speed_table(result["rows"]),
            "",
            losses(result["rows"]),
            "",
        ]
    )


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.transformer", description=__doc__)
    made.add_argument("--quick", action="store_true", help="few points, two layers, a minute")
    made.add_argument("--threads", type=int, default=1, help="threads (default 1)")
    made.add_argument("--models", nargs="+", choices=list(MODELS), help="some models only")
    made.add_argument("--no-compile", dest="compile", action="store_false", help="no torch.compile")
    made.add_argument("--seconds", type=float, default=6.0, help="per case and part")
    made.add_argument("--out", type=Path, help="folder of the result files")
    return made


@torch.no_grad()
def main(argv: list[str] | None = None) -> int:
    """Measures, writes JSON and markdown, prints the table."""
    args = parser().parse_args(argv)
    console = Console()
    started = time.perf_counter()
    torch.set_num_threads(args.threads)
    grid = list(itertools.product(BLOCKS, SPARSITIES))
    plan = Plan(sample_s=0.0, budget_s=args.seconds, min_rounds=5, max_rounds=25)
    models = {n: m for n, m in MODELS.items() if args.models is None or n in args.models}
    if args.quick:
        grid = [((4, 1), 0.9), ((16, 16), 0.9)]
        plan = Plan(sample_s=0.0, budget_s=1.0, min_rounds=3, max_rounds=5)
        bert = MODELS["BERT-base"]
        models = {"BERT-base, two layers": Model(bert.layer, 2, bert.hidden, bert.cases[:1])}
    rows = []
    with Progress(console=console, transient=True) as progress:
        total = sum(len(m.cases) for m in models.values()) * len(PARTS) * len(grid)
        task = progress.add_task("transformers", total=total)
        for name, model in models.items():
            for row in measure(name, model, grid, plan, args.compile):
                rows.append(row)
                progress.update(task, advance=1, description=f"{case_name(row)}, {row['part']}")
    words = sys.argv[1:] if argv is None else argv
    result = {
        "rows": rows,
        "threads": args.threads,
        **provenance.about(convolutions=False),
        "command": " ".join(["python -m benchmarks.transformer", *words]),
        "seconds": round(time.perf_counter() - started, 1),
    }
    # Only the whole grid replaces the published figures.
    part = args.quick or args.models or not args.compile or args.threads != 1
    out = args.out or Path("build/benchmarks" if part else "benchmarks/results")
    out.mkdir(parents=True, exist_ok=True)
    (out / "transformer.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "transformer.md").write_text(markdown(result))
    console.print(Markdown(speed_table(rows)))
    console.print(losses(rows))
    console.print("written:", str(out / "transformer.json"), str(out / "transformer.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
