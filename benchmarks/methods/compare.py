"""The methods against each other: one CNN, equal storage, and equal measured time.

Every method starts from the same dense network and takes the same number of training steps: a
second phase, which Synaptic Strength uses to shrink strengths, and fine-tuning on stored blocks.
So does the dense network that they are held against. Every layer loses the same share, and may lose
whole block rows: with a guaranteed block in each, blocks of whole kernels would store twice as much
where little is left. DCP's selection, which trains heads and refits weights, comes on top; its
seconds are in the table. Blocks are 8x8, of single kernel positions or, as Synaptic Strength needs
and TETRIS does in its paper, of whole kernels. Time is what a batch takes, each network in the
fastest way there is to run it; accuracy at equal time lies on the line between neighbouring
sparsities, of networks that are worth their time on validation images.
"""

from __future__ import annotations

import copy
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from tetris.nn.base import SparseLayer
from tetris.prune import DCPPruner, SynapticPruner, TetrisPruner

from . import latency
from .data import Split, split
from .experiment import Check, Claim, Row, Setting
from .networks import PRUNED, cnn
from .progress import Progress
from .stats import Comparison, figure, mean_sd
from .training import Recipe, accuracy, baseline, before, fit, steps_of

# What is left halves, so that every layer of these networks stores it exactly, in single weights
# and in blocks of whole kernels alike. At .95, whole kernels of the digits' layers, which have 16
# to 64 blocks of them, came to 25 % more weights than single ones.
SPARSITIES = (0.5, 0.75, 0.875, 0.9375)
QUICK = (0.75, 0.875)
TOLERANCE = 0.02
BLOCK = (8, 8)
HEADS = ("conv2",)
SETTINGS: dict[str, Any] = {
    "include": PRUNED,
    "scope": "layer",
    "allow_empty_rows": True,
    "sweeps": 4,
}


@dataclass(frozen=True)
class Plan:
    """How much one kind of data is trained on.

    Attributes:
        images: Training images, all if None.
        tests: Test images, all if None. Ten thousand, after and before fine-tuning, took as long
            as training.
        dense: Of the dense network.
        second: Of the second phase, from the dense network on.
        tune: Of the pruned networks.
        samples: Images that DCP's selection looks at.
        batch: Images per call where time is measured.
    """

    images: int | None
    tests: int | None
    dense: Recipe
    second: Recipe
    tune: Recipe
    samples: int = 512
    batch: int = 32

    @property
    def epochs(self) -> int:
        """That every network is trained for."""
        return self.dense.epochs + self.second.epochs + self.tune.epochs


_PLANS = {
    "digits": Plan(
        None, None, Recipe(12), Recipe(6, learning_rate=1e-3), Recipe(5, learning_rate=2e-3)
    ),
    "fashion": Plan(
        2500, 4000, Recipe(4), Recipe(2, learning_rate=1e-3), Recipe(2, learning_rate=2e-3), 256
    ),
}


@dataclass(frozen=True)
class Start:
    """What the methods start from, of one seed.

    Attributes:
        dense: Trained network, the same for all.
        continued: The dense network after the second phase.
        strengths: State of the dense network with strengths after the second phase.
        data: Of the seed.
        plan: How much is trained.
        seed: The seed.
    """

    dense: nn.Module
    continued: nn.Module
    strengths: Mapping[str, Tensor]
    data: Split
    plan: Plan
    seed: int


def magnitude(start: Start, sparsity: float, **settings: Any) -> nn.Module:
    """The heaviest blocks of reordered weights; of 1x1, element-wise pruning."""
    model = copy.deepcopy(start.continued)
    pruner = TetrisPruner(model, sparsity=sparsity, seed=start.seed, **SETTINGS, **settings)
    return pruner.finalize()


def discrimination(start: Start, sparsity: float, **settings: Any) -> nn.Module:
    """The blocks that a head behind the second convolution, and the outputs, ask for."""
    model, data = copy.deepcopy(start.continued), start.data
    pruner = DCPPruner(
        model, heads=HEADS, sparsity=sparsity, seed=start.seed, **SETTINGS, **settings
    )
    order = torch.randperm(len(data.train_y), generator=torch.Generator().manual_seed(start.seed))
    batches = [(data.train_x[i], data.train_y[i]) for i in order.split(start.plan.tune.batch)]
    pruner.select(batches, samples=start.plan.samples)
    return pruner.finalize()


def strength(start: Start, sparsity: float, **settings: Any) -> nn.Module:
    """The blocks of the strongest connections."""
    model = copy.deepcopy(start.dense)
    pruner = SynapticPruner(
        model, penalty=0.0, sparsity=sparsity, seed=start.seed, **SETTINGS, **settings
    )
    model.load_state_dict(start.strengths)
    pruner.prune()
    return pruner.finalize()


@dataclass(frozen=True)
class Method:
    """One line of the plots.

    Attributes:
        prune: From a start and a sparsity to a network with sparse layers, not yet fine-tuned.
        sparsities: Single weights take more time than blocks, so more of them have to go.
        settings: Of the pruner.
    """

    prune: Callable[..., nn.Module]
    settings: Mapping[str, Any]
    sparsities: tuple[float, ...] = SPARSITIES


_KERNELS = {"block": BLOCK, "tie_kernel": True}
METHODS: dict[str, Method] = {
    "element-wise": Method(magnitude, {"block": (1, 1)}, (0.75, 0.875, 0.9375, 0.984375)),
    "TETRIS": Method(magnitude, {"block": BLOCK}),
    "TETRIS, whole kernels": Method(magnitude, _KERNELS),
    "Synaptic Strength": Method(strength, _KERNELS),
    "DCP": Method(discrimination, {"block": BLOCK}),
}


class CompareExperiment:
    """See the module."""

    name = "compare"
    title = "Pruning methods on one CNN: equal storage, equal measured time"
    data = tuple(_PLANS)

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Dense, and every method at every sparsity."""
        plan = _PLANS[setting.data]
        runs = [
            (variant, method, sparsity)
            for variant, method in METHODS.items()
            for sparsity in (QUICK if setting.quick else method.sparsities)
        ]
        progress.plan(len(setting.seeds) * (1 + len(runs)))
        for seed in setting.seeds:
            progress.describe(f"seed {seed}: dense training")
            start, untuned = _start(setting, plan, seed)
            longer, reached = baseline(start.continued, start.data, plan.tune, seed + 1000)
            models = {"dense": longer}
            rows = [
                Row(
                    "dense",
                    seed,
                    reached,
                    untuned,
                    stored=sum(longer.get_parameter(f"{name}.weight").numel() for name in PRUNED),
                    valid=accuracy(longer, start.data.validation),
                    epochs=plan.epochs,
                )
            ]
            progress.advance()
            for variant, method, sparsity in runs:
                progress.describe(f"seed {seed}: {variant} at {sparsity:.0%}")
                model, row = _pruned(start, variant, method, sparsity)
                models[row.label] = model
                rows.append(row)
                progress.advance()
            progress.describe(f"seed {seed}: measuring latency")
            times = latency.measure(models, start.data.test_x[: plan.batch].contiguous())
            for row in rows:
                yield latency.timed(row, times)

    def claims(self, setting: Setting) -> list[Claim]:
        """At equal storage nothing is claimed: single weights are the upper bound of blocks."""
        return []

    def check(self, rows: Sequence[Row]) -> list[Check]:
        """Equal storage, and who is better at equal time."""
        return [*_equal_storage(rows), *_equal_time(rows)]


def _start(setting: Setting, plan: Plan, seed: int) -> tuple[Start, float]:
    """And accuracy of the dense network after the second phase."""
    data = split(setting.data, seed, images=plan.images, tests=plan.tests, root=setting.root)
    torch.manual_seed(seed)
    classes, channels = int(data.train_y.max()) + 1, data.train_x.shape[1]
    dense = cnn(setting.data, classes=classes, channels=channels)
    fit(dense, data, plan.dense, seed)
    continued, strong = copy.deepcopy(dense), copy.deepcopy(dense)
    reached = fit(continued, data, plan.second, seed + 500)
    steps = steps_of(data, epochs=plan.second.epochs, batch=plan.second.batch)
    pruner = SynapticPruner(
        strong, lr_sum=steps * plan.second.learning_rate / 2, **SETTINGS, **_KERNELS
    )
    optimizer = plan.second.optimizer_of(strong)
    pruner.attach(optimizer)
    fit(strong, data, plan.second, seed + 500, optimizer=optimizer, step=pruner.step)
    return Start(dense, continued, strong.state_dict(), data, plan, seed), reached


def _pruned(start: Start, variant: str, method: Method, sparsity: float) -> tuple[nn.Module, Row]:
    """A fine-tuned network and its row."""
    began = time.perf_counter()
    with warnings.catch_warnings():  # the table says how much is stored
        warnings.filterwarnings("ignore", ".* keep more blocks than asked for")
        model = method.prune(start, sparsity, **method.settings)
    seconds = time.perf_counter() - began
    untuned = before(model, start.data)
    reached = fit(model, start.data, start.plan.tune, start.seed + 1000)
    layers = [m for m in model.modules() if isinstance(m, SparseLayer)]
    return model, Row(
        variant,
        start.seed,
        reached,
        untuned,
        method.settings["block"],
        sparsity,
        stored=sum(layer.layout.stored_values for layer in layers),
        valid=accuracy(model, start.data.validation),
        epochs=start.plan.epochs,
        extra={"seconds to prune": seconds},
    )


def _equal_storage(rows: Sequence[Row]) -> Iterator[Check]:
    """At sparsities that several variants have."""
    for sparsity in dict.fromkeys(r.sparsity for r in rows if r.sparsity is not None):
        members = [row for row in rows if row.sparsity == sparsity]
        if len({row.variant for row in members}) < 2:
            continue
        stored = [figure(row, "stored") for row in members]
        low, high = min(stored), max(stored)
        yield (
            f"equal numbers of stored weights at {100 * sparsity:g}%, to {TOLERANCE:.0%}",
            high - low <= TOLERANCE * low,
            f"{low:.0f} to {high:.0f}",
        )


def _equal_time(rows: Sequence[Row], levels: int = 3) -> Iterator[Check]:
    """Blocks against single weights, at times that all methods reach within every seed."""
    pruned = [row for row in rows if row.sparsity is not None]
    curves: dict[tuple[str, int], list[Row]] = {}
    for row in pruned:
        curves.setdefault((row.variant, row.seed), []).append(row)
    spans = [[figure(row, "latency_ms") for row in curve] for curve in curves.values()]
    low, high = max(map(min, spans)), min(map(max, spans))
    if low > high:
        short = len({row.sparsity for row in pruned}) < len(SPARSITIES)  # a quick run may miss it
        measured = f"{low:.3f} ms is above {high:.3f} ms"
        yield "all methods reach a common time", None if short else False, measured
        return
    seeds = sorted({row.seed for row in pruned})
    variants = list(dict.fromkeys(row.variant for row in pruned))
    for ms in np.geomspace(low, high, levels):
        reached = {v: [at_time(curves[v, s], float(ms)) for s in seeds] for v in variants}
        for variant in variants[1:]:
            pairs = zip(reached[variant], reached[variants[0]], strict=True)
            difference, deviation = mean_sd(a - b for a, b in pairs)
            found = Comparison(
                Claim(variant, variants[0]),
                difference,
                deviation / math.sqrt(len(seeds)),
                len(seeds),
            )
            means = [100 * mean_sd(reached[v])[0] for v in (variant, variants[0])]
            yield (
                f"at {ms:.3f} ms {variant} beats {variants[0]}",
                found.holds,
                f"{found} ({means[0]:.2f} % against {means[1]:.2f} %)",
            )


def at_time(curve: Sequence[Row], ms: float) -> float:
    """Accuracy of a method at a time: on the line between the measured points around it.

    Args:
        curve: One seed's rows of a method, at several sparsities.
        ms: Within the times of these. Slower networks that are no better than faster ones do not
            count, since nobody would run them; which are better is judged on validation images, or
            the choice would be of those that are lucky on test images.
    """
    best: list[Row] = []
    for row in sorted(curve, key=lambda r: figure(r, "latency_ms")):
        if not best or figure(row, "valid") > figure(best[-1], "valid"):
            best.append(row)
    times = [math.log(figure(row, "latency_ms")) for row in best]
    return float(np.interp(math.log(ms), times, [row.accuracy for row in best]))


EXPERIMENT = CompareExperiment()
