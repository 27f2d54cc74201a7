"""VR-PGE: does sampling blocks from the first step find the inputs that matter?

An MLP on images beside as many or more inputs of pure noise. Its hidden layers store a fifth of
their 16x16 blocks, in the order in which inputs stand, so a block of the first layer is on pixels
or on noise. VR-PGE learns which blocks to keep while it trains sparsely; the rivals draw them once,
or train densely and keep the heaviest. All take the same steps in the same batches.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tetris
from tetris.data import Dataset
from tetris.modules import replace_modules
from tetris.prune import VRPGEPruner

from . import latency, steps
from .data import split
from .experiment import Check, Claim, Row, Setting
from .networks import mlp
from .progress import Progress
from .training import Recipe, accuracy, fit

SPARSITY = 0.8
BLOCK = (16, 16)
LAYERS = ("linear1", "linear2")

_NOISE = {"digits": 192, "fashion": 784}  # inputs; as inputs have unit variance, sd 0.75
_WIDTH = {"digits": 128, "fashion": 128}
_IMAGES = {"digits": None, "fashion": 10_000}
_TRAIN = {
    "digits": Recipe(epochs=60, batch=64, learning_rate=1e-3, schedule="constant"),
    "fashion": Recipe(epochs=30, batch=64, learning_rate=1e-3, schedule="constant"),
}
_TUNE = {
    "digits": Recipe(epochs=10, batch=64, learning_rate=1e-3),
    "fashion": Recipe(epochs=4, batch=64, learning_rate=1e-3),
}
_SAMPLES = (2, 4)
# Of the gates' Adam. Fashion-MNIST's network has four times as many gates, so a difference of
# losses says less about each: at the authors' 12e-3 noise alone drove them to 0 and 1 (one seed:
# half of the blocks on pixels, as if random; .72 at 1e-3).
_GATE_LR = {"digits": 12e-3, "fashion": 1e-3}


class VrpgeExperiment:
    """See the module."""

    name = "vrpge"
    title = "VR-PGE: a fifth of the blocks of an MLP, whose inputs are pixels and noise"

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Dense, the heaviest blocks of it, random ones, and learnt ones."""
        progress.plan(len(setting.seeds) * (3 + len(_SAMPLES)))
        recipe, tune = _TRAIN[setting.data], _TUNE[setting.data]
        if setting.quick:
            recipe = replace(recipe, epochs=max(1, recipe.epochs // 4))
        for seed in setting.seeds:
            data = noisy(setting.data, seed)
            torch.manual_seed(seed)
            width = _WIDTH[setting.data]
            fresh = mlp((data.train_x.shape[1], width, width, 10))
            pixels = data.train_x.shape[1] - _NOISE[setting.data]
            models: dict[str, nn.Module] = {}
            found: list[Row] = []

            def add(variant: str, model: nn.Module, **extra: float) -> None:
                reached = fit(model, data, tune, seed + 1000)  # noqa: B023
                extra["on pixels"] = share_on(model, pixels)  # noqa: B023
                row = Row(variant, seed, reached, stored=stored_weights(model), extra=extra)  # noqa: B023
                if variant != "dense":
                    row = replace(row, block=BLOCK, sparsity=SPARSITY)
                models[row.label] = model  # noqa: B023
                found.append(row)  # noqa: B023
                progress.advance()

            progress.describe(f"seed {seed}: dense")
            dense = copy.deepcopy(fresh)
            fit(dense, data, recipe, seed)
            add("magnitude", keep(dense, magnitude(dense)))
            add("dense", dense)
            progress.describe(f"seed {seed}: random")
            static = keep(fresh, random(fresh, seed))
            fit(static, data, recipe, seed)
            add("random static", static)
            for samples in _SAMPLES:
                progress.describe(f"seed {seed}: VR-PGE, {samples} samples")
                model, extra = sampled(fresh, data, recipe, seed, samples, _GATE_LR[setting.data])
                add(f"VR-PGE Ks={samples}", model, **extra)
            times = latency.measure(models, data.test_x[:256].contiguous())
            for row in found:
                yield replace(row, latency_ms=times[row.label].ms)

    def claims(self, setting: Setting) -> list[Claim]:
        """It beats what does not look at the data, and what looks at all inputs."""
        best = f"VR-PGE Ks={_SAMPLES[0]}"
        return [
            Claim(best, "random static", note="same budget, blocks drawn once"),
            Claim(best, "dense", note="noise inputs are left out"),
            Claim(best, "random static", field="on pixels"),
        ]

    def check(self, rows: Sequence[Row]) -> list[Check]:
        """Where the blocks are, equal storage, and what a step costs."""
        learnt = [r for r in rows if r.variant == f"VR-PGE Ks={_SAMPLES[0]}"]
        share = sum(r.extra["on pixels"] for r in learnt) / len(learnt)
        sizes = sorted({r.stored or 0 for r in rows if r.variant != "dense"})
        spread = (sizes[-1] - sizes[0]) / sizes[-1]
        return [
            (
                "at least half of the first layer's blocks are on pixels",
                share >= 0.5,
                f"{share:.2f}",
            ),
            ("equal numbers of stored weights", spread == 0.0, f"{sizes}"),
            *steps.check(),
        ]


def noisy(name: str, seed: int) -> Dataset:
    """The data of a seed with inputs of noise behind the pixels."""
    data = split(name, seed, images=_IMAGES[name], flat=True)
    generator = torch.Generator().manual_seed(seed)

    def widened(x: Tensor) -> Tensor:
        noise = torch.randn((len(x), _NOISE[name]), generator=generator)
        return torch.cat([x, 0.75 * noise], dim=1)

    return replace(data, train_x=widened(data.train_x), test_x=widened(data.test_x))


def sampled(
    fresh: nn.Module, data: Dataset, recipe: Recipe, seed: int, samples: int, gate_lr: float
) -> tuple[nn.Module, dict[str, float]]:
    """Train by VR-PGE, keep the top blocks; and how far the gates have settled."""
    model = copy.deepcopy(fresh)
    optimizer = recipe.optimizer_of(model)
    pruner = VRPGEPruner(
        model,
        sparsity=SPARSITY,
        block=BLOCK,
        include=LAYERS,
        reorder="identity",
        allow_empty_rows=True,
        samples=samples,
        gate_lr=gate_lr,
        seed=seed,
        optimizers=optimizer,
    )
    model.train()
    order = torch.Generator().manual_seed(seed)  # that of fit()
    for _ in range(recipe.epochs):
        for chosen in torch.randperm(len(data.train_y), generator=order).split(recipe.batch):
            x, y = data.train_x[chosen], data.train_y[chosen]
            optimizer.zero_grad()
            pruner.backward(lambda x=x, y=y: F.cross_entropy(model(x), y))
            optimizer.step()
            pruner.step()
    s = pruner.gates.s
    drawn = float((1 - (1 - s) ** samples).sum() / s.sum())  # blocks of a step, all its masks
    before = accuracy(model.eval(), data)
    pruner.prune()
    return pruner.finalize(), {"drawn per kept": drawn, "accuracy before tuning": before}


def keep(model: nn.Module, masks: dict[str, Tensor]) -> nn.Module:
    """A copy of a network that stores the blocks that are True."""
    new: dict[str, nn.Module] = {}
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        layout = tetris.BlockLayout.from_block_mask(
            mask, BLOCK, layer.out_features, layer.in_features
        )
        new[name] = tetris.SparseLinear.from_dense(layer, layout=layout)
    return replace_modules(copy.deepcopy(model), new)


def magnitude(model: nn.Module) -> dict[str, Tensor]:
    """The heaviest blocks of all layers, weights in units of their layer's mean.

    Without the unit, wide layers, whose weights are small, lost all blocks that mattered.
    """
    means = {name: _blocks(model, name) for name in LAYERS}
    return _top({name: mean / mean.mean() for name, mean in means.items()})


def random(model: nn.Module, seed: int) -> dict[str, Tensor]:
    """Blocks drawn from those of all layers."""
    generator = torch.Generator().manual_seed(seed)
    return _top({n: torch.rand(_blocks(model, n).shape, generator=generator) for n in LAYERS})


def _top(scores: dict[str, Tensor]) -> dict[str, Tensor]:
    every = torch.cat([s.flatten() for s in scores.values()])
    chosen = torch.zeros(len(every), dtype=torch.bool)
    chosen[every.topk(int((1 - SPARSITY) * len(every) * (1 + 1e-12))).indices] = True
    parts = chosen.split([s.numel() for s in scores.values()])
    return {n: p.view(s.shape) for (n, s), p in zip(scores.items(), parts, strict=True)}


def _blocks(model: nn.Module, name: str) -> Tensor:
    weight = model.get_submodule(name).weight.detach()  # type: ignore[union-attr]
    rows, columns = (size // b for size, b in zip(weight.shape, BLOCK, strict=True))
    return weight.abs().view(rows, BLOCK[0], columns, BLOCK[1]).mean((1, 3))


def share_on(model: nn.Module, inputs: int) -> float:
    """Share of the first layer's stored blocks that are on the first inputs."""
    layer = model.get_submodule(LAYERS[0])
    if isinstance(layer, nn.Linear):
        return inputs / layer.in_features
    mask = layer.layout.block_mask()  # type: ignore[union-attr,operator]
    return float(mask[:, : inputs // BLOCK[1]].sum() / mask.sum())


def stored_weights(model: nn.Module) -> int:
    """Numbers that the pruned layers store."""
    layers = [model.get_submodule(name) for name in LAYERS]
    return sum((x.weight if isinstance(x, nn.Linear) else x.values).numel() for x in layers)  # type: ignore[union-attr]


EXPERIMENT = VrpgeExperiment()
