"""Training steps on stored blocks against dense and masked ones.

    python -m benchmarks.training --quick                    about a minute
    python -m benchmarks.training                            everything, about ten minutes
    python -m benchmarks.training --models mlp --blocks 8x8 --sparsity 90

A step is forward, loss, backward, optimizer.step and pruner.step, timed in turns:

dense        nn.Module as it is, eager and (full run) torch.compile, and with linear layers by
             oneDNN in place of MKL; the fastest one counts
masked       execution="masked": dense products with masked weights
sparse       execution="sparse": forward, backward and optimizer on stored blocks
random       the same, and 30 % of the blocks are exchanged for random ones after *every* step
gradient     the same, for those with the largest gradients, which takes one dense product
"""

import argparse
import copy
import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import Tensor, nn

import tetris
from tetris.bench import machine
from tetris.commands.arguments import block_shape, checked, sparsity_share
from tetris.prune import Regrow, TetrisPruner
from tetris.timing import Candidate, Durations, Plan, interleave, quartiles, unpacked_product

from . import provenance
from .targets import judge_steps

BLOCKS = ["4x1", "8x8", "16x16"]
SPARSITIES = ["75", "90", "95"]
QUICK_BLOCKS = ["8x8"]
QUICK_SPARSITIES = ["90"]
DENSE = ("dense", "onednn", "compile")


def mlp() -> tuple[nn.Module, Tensor]:
    """The feed-forward part of a transformer, 512 tokens."""
    model = nn.Sequential(nn.Linear(1024, 4096), nn.ReLU(), nn.Linear(4096, 1024))
    return model, torch.randn(512, 1024)


def vgg() -> tuple[nn.Module, Tensor]:
    """Two convolutions of VGG's third stage at half size, eight images, channels last."""
    layers = [nn.Conv2d(256, 256, 3, padding=1) for _ in range(2)]
    model = nn.Sequential(layers[0], nn.ReLU(), layers[1], nn.ReLU())
    model.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return model, torch.randn(8, 256, 28, 28).contiguous(memory_format=torch.channels_last)


MODELS: dict[str, Callable[[], tuple[nn.Module, Tensor]]] = {"mlp": mlp, "vgg": vgg}
OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "sgd": lambda model: torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9),
    "adam": lambda model: torch.optim.Adam(model.parameters(), 1e-5),
}


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.training",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="Read the result in OUT/training.md; the raw medians are in OUT/training.json.",
    )
    add = made.add_argument
    add("--quick", action="store_true", help="8x8 at 90 %% only, without torch.compile")
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
        nargs="+",
        type=checked(sparsity_share),
        metavar="PERCENT",
        help=f"share removed; default {' '.join(SPARSITIES)}",
    )
    add("--optimizer", choices=list(OPTIMIZERS), default="sgd", help="sgd has a momentum")
    add("--threads", type=int, default=1, metavar="N")
    add("--compile", action=argparse.BooleanOptionalAction, default=None, help="full run: on")
    add(
        "--out",
        type=Path,
        help="default benchmarks/results; build/benchmarks for a part of the grid",
    )
    return made


def step_of(
    model: nn.Module,
    x: Tensor,
    optimizer: torch.optim.Optimizer,
    pruner: TetrisPruner | None = None,
    call: Callable[[Tensor], Tensor] | None = None,
) -> Candidate:
    """One whole training step of a model, run by ``call`` if not by the model itself."""
    call = model if call is None else call

    def step() -> None:
        optimizer.zero_grad()
        call(x).square().mean().backward()
        optimizer.step()
        if pruner is not None:
            pruner.step()

    return step


class OneDnnLinear(torch.autograd.Function):
    """A linear layer whose three products are given by ``(a, b) -> a @ b.T``."""

    @staticmethod
    def forward(ctx, x, weight, bias, product):
        """Return x @ weight.T + bias."""
        ctx.save_for_backward(x, weight)
        ctx.product = product
        return product(x, weight).add_(bias)

    @staticmethod
    def backward(ctx, *grads):
        """Return the gradients of x, weight and bias."""
        (grad,), (x, weight), product = grads, ctx.saved_tensors, ctx.product
        dx = product(grad, weight.t()) if ctx.needs_input_grad[0] else None
        return dx, product(grad.t(), x.t()), grad.sum(0), None


def _run(layer: nn.Linear, product: Callable, x: Tensor) -> Tensor:
    return OneDnnLinear.apply(x, layer.weight, layer.bias, product)  # type: ignore[return-value]


def run_linear_by(model: nn.Module, product: Callable[[Tensor, Tensor], Tensor]) -> None:
    """Let linear layers compute by a product."""
    for layer in model.modules():
        if isinstance(layer, nn.Linear):
            run = partial(_run, layer, product)
            layer.forward = run  # type: ignore[method-assign]


def candidates(
    name: str,
    blocks: list[tuple[int, int]],
    sparsity: float,
    optimizer: str,
    compiled: bool,
) -> tuple[dict[str, Candidate], dict[str, TetrisPruner]]:
    """Everything that takes turns for one model and sparsity; pruners by block."""
    torch.manual_seed(0)
    original, x = MODELS[name]()
    make = OPTIMIZERS[optimizer]
    found: dict[str, Candidate] = {}
    pruners: dict[str, TetrisPruner] = {}

    def dense() -> nn.Module:
        return copy.deepcopy(original)

    model = dense()
    found["dense"] = step_of(model, x, make(model))
    product = unpacked_product()
    if product is not None and any(isinstance(m, nn.Linear) for m in original.modules()):
        model = dense()
        run_linear_by(model, product)
        found["onednn"] = step_of(model, x, make(model))
    if compiled:
        model = dense()
        found["compile"] = step_of(model, x, make(model), call=torch.compile(model))
    for block in blocks:
        label = f"{block[0]}x{block[1]}"
        settings = {"sparsity": sparsity, "block": block, "budget": 0.3}
        for execution, regrow in {
            "masked": None,
            "sparse": None,
            "random": Regrow(every=1, by="random"),
            "gradient": Regrow(every=1),
        }.items():
            model = dense()
            made = make(model)
            pruner = TetrisPruner(
                model,
                execution="masked" if execution == "masked" else "sparse",
                optimizers=made,
                regrow=regrow,
                **settings,
            )
            found[f"{execution} {label}"] = step_of(model, x, made, pruner)
            pruners[label] = pruner
    return found, pruners


def measure(args: argparse.Namespace, console: Console) -> list[dict]:
    """Times what the arguments ask for; one row per model, sparsity and block."""
    blocks = args.blocks or [block_shape(b) for b in (QUICK_BLOCKS if args.quick else BLOCKS)]
    usual = QUICK_SPARSITIES if args.quick else SPARSITIES
    sparsities = args.sparsity or [sparsity_share(s) for s in usual]
    compiled = not args.quick if args.compile is None else args.compile
    plan = Plan(sample_s=0.0, budget_s=15.0 if args.quick else 40.0, min_rounds=3)
    torch.set_num_threads(args.threads)
    rows = []
    for name in args.models or MODELS:
        for sparsity in sparsities:
            console.print(f"{name}, {100 * sparsity:g} % removed ...")
            found, pruners = candidates(name, blocks, sparsity, args.optimizer, compiled)
            durations = interleave(found, plan)
            for label, pruner in pruners.items():
                rows.append(_row(name, sparsity, label, pruner, durations, args))
    return rows


def _row(
    name: str,
    sparsity: float,
    label: str,
    pruner: TetrisPruner,
    durations: Durations,
    args: argparse.Namespace,
) -> dict:
    medians = {key: float(np.median(values)) for key, values in durations.items()}
    best = min((key for key in DENSE if key in medians), key=medians.__getitem__)
    kinds = ("masked", "sparse", "random", "gradient")
    ratios = durations[best] / durations[f"sparse {label}"]  # of the same round: paired
    low, middle, high = quartiles(ratios)
    return {
        "model": name,
        "sparsity": sparsity,
        "stored": 1.0 - pruner.sparsity,
        "block": label,
        "optimizer": args.optimizer,
        "threads": args.threads,
        "best_dense": best,
        "ms": {
            **{k: 1e3 * medians[k] for k in DENSE if k in medians},
            **{k: 1e3 * medians[f"{k} {label}"] for k in kinds},
        },
        "speedup": middle,
        "speedup_iqr": [low, high],
        "rounds": len(ratios),
    }


def table(rows: list[dict]) -> str:
    """Milliseconds per step, and the speed-up over the fastest dense step."""
    kinds = (*DENSE, "masked", "sparse", "random", "gradient")
    lines = [
        "| model | removed | block | " + " | ".join(f"{k} ms" for k in kinds) + " | sparse is |",
        "|---|---|---|" + "---|" * (len(kinds) + 1),
    ]
    for row in rows:
        times = [f"{row['ms'][k]:.1f}" if k in row["ms"] else "" for k in kinds]
        low, high = row["speedup_iqr"]
        lines.append(
            f"| {row['model']} | {row['sparsity']:.0%} | {row['block']} | {' | '.join(times)} "
            f"| {row['speedup']:.2f}x ({low:.2f} to {high:.2f}) |"
        )
    return "\n".join(lines)


def markdown(result: dict) -> str:
    """The result as a page."""
    return (
        "\n\n".join(
            [
                "# Training steps",
                machine.sentence(result["machine"]),
                f"`{result['command']}`, float32, {result['rows'][0]['threads']} thread(s), "
                f"{result['rows'][0]['optimizer']}; medians of interleaved steps, quartiles of "
                "paired ratios. `random` and `gradient` exchange 30 % of the blocks after every "
                "step.",
                table(result["rows"]),
                "\n".join(f"- {line}" for line in judge_steps(result["rows"])),
            ]
        ).rstrip()
        + "\n"
    )


def output_folder(args: argparse.Namespace) -> Path:
    """Where the result goes: only the whole grid replaces the published figures."""
    usual = args.optimizer == "sgd" and args.threads == 1 and args.compile is not False
    part = args.quick or args.models or args.blocks or args.sparsity or not usual
    return args.out or Path("build/benchmarks" if part else "benchmarks/results")


def main(argv: list[str] | None = None) -> int:
    """Measures, writes JSON and markdown, prints the table."""
    args = parser().parse_args(argv)
    console = Console()
    started = time.perf_counter()
    rows = measure(args, console)
    words = sys.argv[1:] if argv is None else argv
    result = {
        "rows": rows,
        **provenance.about(),
        "isa": tetris._C.isa_in_use(),
        "command": " ".join(["python -m benchmarks.training", *words]),
        "seconds": round(time.perf_counter() - started, 1),
    }
    out = output_folder(args)
    out.mkdir(parents=True, exist_ok=True)
    (out / "training.json").write_text(json.dumps(result, indent=1) + "\n")
    (out / "training.md").write_text(markdown(result))
    console.print(Markdown(table(rows)))
    for line in judge_steps(rows):
        console.print(line)
    console.print("written:", str(out / "training.json"), str(out / "training.md"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
