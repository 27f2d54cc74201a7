"""DCP: do heads in the middle of a network choose better channels, or blocks?

Three convolutions lose 75 % of their input channels, or of their 8x8 blocks (no floor), with one
head behind the first of them. The rivals use the same solver, heads, steps and batches, and differ
in what chooses: either half of the loss alone, chance, or the norm of the weights. Channels end in
a smaller dense network, whose time should follow its operations; blocks in sparse layers.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from tetris.prune import DCPPruner, shrink_channels
from tetris.prune.dcp.atoms import Atom
from tetris.prune.target import uses_of

from . import latency
from .data import split
from .experiment import Check, Claim, Row, Setting
from .networks import PRUNED, cnn
from .progress import Progress
from .stats import figure
from .training import Recipe, baseline, before, fit

SPARSITY = 0.75
BLOCK = (8, 8)
HEADS = ("conv2",)
CHOICES: dict[str, dict[str, Any]] = {
    "DCP": {},
    "L_M only": {"lam": 0.0},
    "L_S only": {"reconstruction": 0.0},
    "random": {"score": "random"},
    "norm": {"score": "norm"},
}
ATOMS: dict[Atom, str] = {"channel": " channels", "block": ""}
"""And what their variants' names end in."""
QUICK = ("DCP", "L_M only", "random")
FASHION = (*QUICK, "norm")  # a wider network: five seeds of all choices would take an hour
LEAST_RATIO = 0.8


@dataclass(frozen=True)
class Plan:
    """How long things take on one data set.

    Attributes:
        images: Training images, None for all.
        tests: Test images, None for all.
        samples: Of them, in the set that the selection looks at.
        dense: Training of the dense network.
        tune: Fine-tuning of the pruned ones.
        epochs: Of heads, each.
    """

    images: int | None
    tests: int | None
    samples: int
    dense: Recipe
    tune: Recipe
    epochs: int


_PLANS = {
    ("digits", False): Plan(None, None, 640, Recipe(epochs=12), Recipe(epochs=5), 4),
    ("digits", True): Plan(None, None, 512, Recipe(epochs=6), Recipe(epochs=2), 2),
    ("fashion", False): Plan(2000, 4000, 256, Recipe(epochs=4), Recipe(epochs=1), 1),
    ("fashion", True): Plan(1000, None, 128, Recipe(epochs=2), Recipe(epochs=1), 1),
}


class DCPExperiment:
    """See the module."""

    name = "dcp"
    title = "DCP: 75 % of the channels or 8x8 blocks of three convolutions removed, by choice"

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Dense, and every choice of channels and of blocks."""
        plan = _PLANS[setting.data, setting.quick]
        full = tuple(CHOICES) if setting.data == "digits" else FASHION
        choices = {name: CHOICES[name] for name in (QUICK if setting.quick else full)}
        progress.plan(len(setting.seeds) * (1 + 2 * len(choices)))
        for seed in setting.seeds:
            progress.describe(f"seed {seed}: dense training")
            data = split(setting.data, seed, images=plan.images, tests=plan.tests)
            torch.manual_seed(seed)
            dense = cnn(setting.data)
            untuned = fit(dense, data, plan.dense, seed)
            longer, reached = baseline(dense, data, plan.tune, seed + 1000)
            epochs = plan.dense.epochs + plan.tune.epochs
            progress.advance()
            x = data.test_x[:64].contiguous()
            uses = uses_of(dense, _layers(dense), x)
            models: dict[str, nn.Module] = {"dense": longer}
            rows = [Row("dense", seed, reached, untuned, stored=_stored(dense), epochs=epochs)]
            order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(seed))
            batches = [(data.train_x[i], data.train_y[i]) for i in order.split(64)]
            for atom, ending in ATOMS.items():
                for name, choice in choices.items():
                    progress.describe(f"seed {seed}: {name}{ending or ' blocks'}")
                    model = copy.deepcopy(dense)
                    pruner = DCPPruner(
                        model,
                        atom=atom,
                        heads=HEADS,
                        include=PRUNED,
                        sparsity=SPARSITY,
                        block=BLOCK if atom == "block" else (BLOCK[0], 1),
                        allow_empty_rows=True,
                        sweeps=5,
                        seed=seed,
                        **choice,
                    )
                    pruner.select(batches, epochs=plan.epochs, samples=plan.samples)
                    untuned = before(model, data)
                    reached = fit(model, data, plan.tune, seed + 1000, step=pruner.step)
                    final = pruner.finalize().eval()
                    row = Row(
                        name + ending,
                        seed,
                        reached,
                        untuned,
                        BLOCK if atom == "block" else None,
                        SPARSITY,
                        _stored(final),
                        epochs=epochs,
                        extra={"share of operations": _flops(final, uses) / _flops(dense, uses)},
                    )
                    models[row.label] = final
                    rows.append(row)
                    progress.advance()
            progress.describe(f"seed {seed}: measuring latency")
            times = latency.measure(models, x)
            for row in rows:
                yield latency.timed(row, times)

    def claims(self, setting: Setting) -> list[Claim]:
        """Before fine-tuning DCP beats the others; afterwards channels tie."""
        columns, blocks = f" channels {SPARSITY:.0%}", f" 8x8 {SPARSITY:.0%}"
        result = [
            Claim(f"DCP{columns}", f"random{columns}", "before"),
            Claim(f"DCP{columns}", f"L_M only{columns}", "before"),
            Claim(f"DCP{blocks}", f"L_M only{blocks}", "before"),
            Claim(f"DCP{blocks}", f"random{blocks}", "before", "not expected to hold"),
        ]
        if not setting.quick:
            result.append(Claim(f"DCP{columns}", f"norm{columns}", "before"))
        return result

    def check(self, rows: Sequence[Row]) -> list[Check]:
        """No seed collapses, storage is equal, and time follows operations."""
        return [_no_collapse(rows), *_equal_storage(rows), *_time_follows_operations()]


def _layers(model: nn.Module) -> dict[str, nn.Module]:
    return {n: m for n, m in model.named_modules() if isinstance(m, (nn.Conv2d, nn.Linear))}


def _weight(layer: nn.Module) -> Tensor:
    """Dense weight, or stored values."""
    return layer.values if hasattr(layer, "values") else layer.weight  # type: ignore[return-value]


def _stored(model: nn.Module) -> int:
    return sum(_weight(model.get_submodule(name)).numel() for name in PRUNED)


def _flops(model: nn.Module, uses: Mapping[str, int]) -> float:
    return sum(2.0 * _weight(model.get_submodule(n)).numel() * count for n, count in uses.items())


def _no_collapse(rows: Sequence[Row]) -> Check:
    own = [row for row in rows if row.variant == "DCP" and row.block is not None]
    least = min(row.accuracy for row in own)
    dense = max(row.accuracy for row in rows if row.variant == "dense")
    floor = 0.9 if dense > 0.95 else dense - 0.1
    return (
        f"DCP with 8x8 blocks stays above {floor:.2f} in every seed",
        least > floor,
        f"least {least:.3f} of {len(own)} seeds",
    )


def _equal_storage(rows: Sequence[Row]) -> Iterator[Check]:
    for what, chosen in (
        ("channels", [r for r in rows if r.variant.endswith("channels")]),
        ("8x8 blocks", [r for r in rows if r.block is not None]),
    ):
        stored = {figure(row, "stored") for row in chosen}
        text = ", ".join(f"{s:,.0f}" for s in sorted(stored))
        yield f"all choices of {what} store as many weights", len(stored) == 1, text


@torch.no_grad()
def _time_follows_operations() -> Iterator[Check]:
    """On a network that is wide enough: which channels go does not matter to time."""
    torch.manual_seed(0)
    dense = cnn("fashion", 256).eval()
    x = torch.randn(16, 1, 28, 28)
    uses = uses_of(dense, _layers(dense), x)
    models: dict[str, nn.Module] = {"dense": dense}
    for removed in (0.5, 0.75):
        keep = {}
        for name in PRUNED:
            inputs = _weight(dense.get_submodule(name)).shape[1]
            keep[name] = torch.randperm(inputs) >= int(removed * inputs)
        models[f"{removed:.0%}"] = shrink_channels(dense, keep)[0]
    times = latency.measure(models, x)
    for name, model in models.items():
        if name == "dense":
            continue
        faster = times["dense"].ms / times[name].ms
        fewer = _flops(dense, uses) / _flops(model, uses)
        yield (
            f"time follows operations: {name} of the channels of 256 and 512 removed gains at "
            f"least {LEAST_RATIO:.0%} of the ratio of operations",
            faster / fewer >= LEAST_RATIO,
            f"{faster:.2f}x faster ({times['dense'].ms:.1f} to {times[name].ms:.1f} ms, dense "
            f"{times['dense'].way}) with {fewer:.2f}x fewer operations: {faster / fewer:.2f}",
        )


EXPERIMENT = DCPExperiment()
