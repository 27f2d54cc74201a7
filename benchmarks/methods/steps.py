"""A whole training step of VR-PGE against the dense one.

    python -m benchmarks.methods.steps                  every network, about three minutes
    python -m benchmarks.methods.steps --quick          the middle one

Run it on a machine that does nothing else: the two steps are bound by different things, so another
program slows them unequally. The quartiles of the rounds' ratios, and how far the dense median
moves from the first half of the rounds to the second, tell whether it did; more than 10 % is warned
of.

Dense is the faster of torch's linear layers and oneDNN's, as in benchmarks/training.py. A step is
zero_grad, forward and backward (twice for VR-PGE, with two masks), clipping the norm (VR-PGE only),
optimizer.step and pruner.step; SGD with momentum and weight decay, timed in turns. Gates are
measured as they start, all at the kept share, which is when two masks have the least in common,
and settled, as after training: 90 % of the budget on as many blocks, the rest on all others.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.markdown import Markdown
from torch import nn

from tetris.bench import machine
from tetris.prune import VRPGEPruner
from tetris.timing import Candidate, Durations, Plan, interleave, quartiles, unpacked_product

from ..training import run_linear_by, step_of
from .networks import mlp

BATCH = 256
BLOCKS = ((16, 16), (32, 32))
NETWORKS = (
    (1024, 1024, 1024, 1024),
    (1024, 2048, 2048, 1024),
    (1024, 4096, 4096, 1024),
)
TARGETS = {0.1: 0.35, 0.2: 0.5}
"""Kept share -> of the dense step's time at most."""

DRIFT = 0.1
"""Of the dense median between halves of the rounds; beyond it the machine was not quiet."""


@dataclass(frozen=True)
class Step:
    """One comparison.

    Attributes:
        network: Widths, joined by dashes.
        kept: Share of the blocks in the budget.
        gates: ``start`` or ``settled``.
        dense_ms: Median of the faster dense step.
        dense_by: What ran it.
        ms: Median of VR-PGE's.
        ratio: Median of ms / dense_ms, round by round.
        low: Lower quartile of that.
        high: Upper quartile.
        drift: The dense median of the second half of the rounds over that of the first, minus one.
    """

    network: str
    kept: float
    gates: str
    dense_ms: float
    dense_by: str
    ms: float
    ratio: float
    low: float
    high: float
    drift: float

    @property
    def steady(self) -> bool:
        """Whether the machine was as fast in the end as in the beginning."""
        return abs(self.drift) <= DRIFT


def measure(
    sizes: Sequence[int], kept: float, block: tuple[int, int], plan: Plan | None = None
) -> list[Step]:
    """Time the steps of one network at one budget."""
    torch.manual_seed(0)
    fresh, x = mlp(sizes), torch.randn(BATCH, sizes[0])
    model = copy.deepcopy(fresh)
    found: dict[str, Candidate] = {"torch": step_of(model, x, _sgd(model))}
    if (product := unpacked_product()) is not None:
        model = copy.deepcopy(fresh)
        run_linear_by(model, product)
        found["oneDNN"] = step_of(model, x, _sgd(model))
    dense = list(found)
    for gates in ("start", "settled"):
        found[gates] = _sampling(copy.deepcopy(fresh), x, kept, block, gates == "settled")
    times = interleave(found, plan or Plan(sample_s=0.0, budget_s=10.0, min_rounds=8))
    name = f"{'-'.join(map(str, sizes))}, {block[0]}x{block[1]}"
    return judge(name, kept, dense, times)


def judge(network: str, kept: float, dense: Sequence[str], times: Durations) -> list[Step]:
    """What times by turns say.

    Args:
        network: Its name.
        kept: Share of the blocks in the budget.
        dense: Names of the dense candidates.
        times: name -> seconds, round by round; the rest are VR-PGE's.
    """
    median = {name: 1e3 * float(np.median(values)) for name, values in times.items()}
    best = min(dense, key=median.__getitem__)
    first, second = np.array_split(times[best], 2)
    drift = float(np.median(second) / np.median(first)) - 1.0
    found = []
    for gates in times:
        if gates in dense:
            continue
        low, ratio, high = quartiles(times[gates] / times[best])
        found.append(
            Step(network, kept, gates, median[best], best, median[gates], ratio, low, high, drift)
        )
    return found


def _sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), 1e-3, momentum=0.9, weight_decay=5e-4)


def _sampling(
    model: nn.Module, x: torch.Tensor, kept: float, block: tuple[int, int], settled: bool
) -> Candidate:
    optimizer = _sgd(model)
    pruner = VRPGEPruner(
        model, sparsity=1 - kept, block=block, reorder="identity", optimizers=optimizer
    )
    if settled:
        s = pruner.gates.s
        top = torch.zeros(len(s), dtype=torch.bool)
        top[torch.randperm(len(s))[: int(kept * len(s))]] = True
        s.copy_(torch.where(top, 0.9, 0.1 * kept / (1 - kept)))
        pruner.gate_optimizer.param_groups[0]["lr"] = 1e-9  # they stay as they are

    def step() -> None:
        optimizer.zero_grad()
        pruner.backward(lambda: model(x).square().mean())
        optimizer.step()
        pruner.step()

    return step


def table(steps: Sequence[Step]) -> str:
    """As markdown."""
    lines = [
        "| network, block | kept | gates | VR-PGE ms | dense ms | dense by | ratio (quartiles) | "
        "dense drift | target |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for s in steps:
        verdict = "met" if s.ratio <= TARGETS[s.kept] else "missed"
        lines.append(
            f"| {s.network} | {s.kept:.0%} | {s.gates} | {s.ms:.1f} | {s.dense_ms:.1f} | "
            f"{s.dense_by} | {s.ratio:.2f} ({s.low:.2f}-{s.high:.2f}) | {s.drift:+.0%} | "
            f"{TARGETS[s.kept]:g}, {verdict} |"
        )
    return "\n".join(lines)


def warning(steps: Sequence[Step]) -> str | None:
    """What to say if the machine was not quiet."""
    worst = max(steps, key=lambda s: abs(s.drift))
    if worst.steady:
        return None
    unsteady = len({(s.network, s.kept) for s in steps if not s.steady})
    return (
        f"Warning: the machine was not quiet in {unsteady} of "
        f"{len({(s.network, s.kept) for s in steps})} comparisons. The dense step's median moved "
        f"by {worst.drift:+.0%} between the halves of the rounds ({worst.network}, "
        f"{worst.kept:.0%} kept); beyond {DRIFT:.0%} do not rely on the ratios. Run it again on an "
        "idle machine."
    )


def main(words: Sequence[str] | None = None) -> int:
    """Measure, print, write steps.{md,json}."""
    made = argparse.ArgumentParser(
        prog="python -m benchmarks.methods.steps",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--quick", action="store_true", help="the middle network only")
    made.add_argument("--threads", type=int, default=1, metavar="N")
    made.add_argument("--out", type=Path, metavar="DIR")
    args = made.parse_args(words)
    torch.set_num_threads(args.threads)
    networks = NETWORKS[1:2] if args.quick else NETWORKS
    steps = [
        step
        for sizes in networks
        for block in BLOCKS
        for kept in TARGETS
        for step in measure(sizes, kept, block)
    ]
    usual = not args.quick and args.threads == 1
    out = args.out or Path("benchmarks/results/methods" if usual else "build/benchmarks/methods")
    out.mkdir(parents=True, exist_ok=True)
    given = " ".join(sys.argv[1:] if words is None else words)
    command = f"python -m benchmarks.methods.steps {given}".strip()
    about = machine.describe()
    text = "\n\n".join(
        [
            "# Training steps of VR-PGE",
            machine.sentence(about),
            f"`{command}`: batch {BATCH}, float32, "
            f"{args.threads} thread(s). Medians; the ratio is the median of the rounds' ratios. "
            "Drift: the dense median of the later half of the rounds against that of the earlier.",
            *([told] if (told := warning(steps)) else []),
            table(steps),
        ]
    )
    (out / "steps.md").write_text(text + "\n")
    (out / "steps.json").write_text(
        json.dumps(
            {"machine": about, "command": command, "steps": [asdict(s) for s in steps]}, indent=1
        )
        + "\n"
    )
    console = Console()
    console.print(Markdown(table(steps)))
    if told:
        console.print(told, style="bold red")
    return 0


if __name__ == "__main__":
    sys.exit(main())
