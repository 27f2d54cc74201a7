"""VR-PGE: does sampling blocks from the first step find the inputs that matter?

An MLP on images beside as many or more inputs of pure noise. Its hidden layers store a fifth of
their 16x16 blocks, in the order in which inputs stand, so a block of the first layer is on pixels
or on noise. VR-PGE learns which blocks to keep while it trains sparsely. The rivals draw them once,
or train densely and keep the heaviest, by weight alone or times the norm of the input; each keeps a
fifth per layer and a block in every block row. All take the same steps in the same batches, clip
gradients alike, and are fine-tuned alike. A step of VR-PGE runs the model once per mask, so random
blocks are also trained for as many passes, in twice the steps.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import tetris
from tetris.data import Dataset
from tetris.nn.base import SparseLayer
from tetris.prune import ActivationNorm, VRPGEPruner
from tetris.prune.options import LayerImportance

from . import latency
from .data import split
from .experiment import Check, Claim, Row, Setting
from .networks import mlp
from .progress import Progress
from .training import Recipe, accuracy, fit

SPARSITY = 0.8
BLOCK = (16, 16)
LAYERS = ("linear1", "linear2")
CLIP = 3.0
"""Largest norm of the gradients, in all training; VR-PGE's counts those of its gates."""

_NOISE = {"digits": 192, "fashion": 784}  # inputs; as inputs have unit variance, sd 0.75
_WIDTH = {"digits": 128, "fashion": 128}
_IMAGES = {"digits": None, "fashion": 10_000}
_TRAIN = {
    "digits": Recipe(epochs=60, batch=64, learning_rate=1e-3, schedule="constant"),
    "fashion": Recipe(epochs=24, batch=64, learning_rate=1e-3, schedule="constant"),
}
_TUNE = {
    "digits": Recipe(epochs=10, batch=64, learning_rate=1e-3),
    "fashion": Recipe(epochs=4, batch=64, learning_rate=1e-3),
}
_SAMPLES = {"digits": (2, 4), "fashion": (2,)}  # four samples of Fashion-MNIST take too long
# Of the gates' Adam. Fashion-MNIST's network has four times as many gates, so a difference of
# losses says less about each: at the authors' 12e-3 noise alone drove them to 0 and 1 (one seed:
# half of the blocks on pixels, as if random; .72 at 1e-3). That seed was 0, and its test images
# were looked at: judge by other seeds, --first-seed 10.
_GATE_LR = {"digits": 12e-3, "fashion": 1e-3}
_BEST = "VR-PGE Ks=2"
_RIVALS = ("input norm", "random static", "random static, equal passes")


class VrpgeExperiment:
    """See the module."""

    name = "vrpge"
    title = "VR-PGE: a fifth of the blocks of an MLP, whose inputs are pixels and noise"

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Dense, the heaviest blocks of it, random ones, and learnt ones."""
        numbers = _SAMPLES[setting.data]
        progress.plan(len(setting.seeds) * (5 + len(numbers)))
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
                reached = trained(model, data, tune, seed + 1000)  # noqa: B023
                extra["on pixels"] = share_on(model, pixels)  # noqa: B023
                row = Row(variant, seed, reached, stored=stored_weights(model), extra=extra)  # noqa: B023
                if variant != "dense":
                    extra["fewest blocks"] = min(blocks_of(model).values())
                    row = replace(row, block=BLOCK, sparsity=SPARSITY)
                models[row.label] = model  # noqa: B023
                found.append(row)  # noqa: B023
                progress.advance()

            progress.describe(f"seed {seed}: dense")
            dense = copy.deepcopy(fresh)
            trained(dense, data, recipe, seed)
            add("magnitude", keep(dense))
            add("input norm", keep(dense, ActivationNorm([data.train_x])))
            add("dense", dense)
            progress.describe(f"seed {seed}: random")
            for variant, times in (("random static", 1), ("random static, equal passes", 2)):
                static = keep(fresh, random(fresh, seed))
                trained(static, data, replace(recipe, epochs=times * recipe.epochs), seed)
                add(variant, static)
            for samples in numbers:
                progress.describe(f"seed {seed}: VR-PGE, {samples} samples")
                model, extra = sampled(fresh, data, recipe, seed, samples, _GATE_LR[setting.data])
                add(f"VR-PGE Ks={samples}", model, **extra)
            measured = latency.measure(models, data.test_x[:256].contiguous())
            for row in found:
                yield latency.timed(row, measured)

    def claims(self, setting: Setting) -> list[Claim]:
        """It beats what does not look at the data, and what looks at all inputs."""
        return [
            Claim(_BEST, "random static", note="same steps, blocks drawn once"),
            Claim(_BEST, "random static, equal passes", note="twice the steps, blocks drawn once"),
            Claim(_BEST, "input norm", note="dense training, weights times their inputs' norm"),
            Claim(_BEST, "dense", note="noise inputs are left out"),
            Claim(_BEST, "random static", field="on pixels"),
        ]

    def check(self, rows: Sequence[Row]) -> list[Check]:
        """Where the blocks are, that no layer is cut off, storage, and medians."""
        learnt = [r for r in rows if r.variant == _BEST]
        share = sum(r.extra["on pixels"] for r in learnt) / len(learnt)
        sparse = [r for r in rows if r.variant != "dense"]
        fewest = min(sparse, key=lambda r: r.extra["fewest blocks"])
        own, others = learnt[0].stored or 0, sorted({r.stored or 0 for r in sparse})
        most = own + len(LAYERS) * BLOCK[0] * BLOCK[1]
        medians = {
            name: float(np.median([r.accuracy for r in rows if r.variant == name]))
            for name in dict.fromkeys(r.variant for r in rows)
        }
        return [
            (
                "at least half of the first layer's blocks are on pixels",
                share >= 0.5,
                f"{share:.2f}",
            ),
            (
                "every pruned layer keeps blocks, in all rows",
                fewest.extra["fewest blocks"] >= 1,
                f"at least {fewest.extra['fewest blocks']:.0f} ({fewest.variant})",
            ),
            (
                "rivals store no fewer weights; a block per layer more, as they round per layer",
                others[0] >= own and others[-1] <= most,
                f"{own} of {others}",
            ),
            (
                f"median accuracy of {_BEST} is above that of {', '.join(_RIVALS)}",
                all(medians[_BEST] > medians[name] for name in _RIVALS),
                ", ".join(f"{name} {100 * value:.1f}" for name, value in medians.items()),
            ),
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
        clip=CLIP,
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


def trained(model: nn.Module, data: Dataset, recipe: Recipe, seed: int) -> float:
    """Train with clipped gradients; accuracy in the end."""
    optimizer = recipe.optimizer_of(model)

    def clip(*_: object) -> None:
        nn.utils.clip_grad_norm_(model.parameters(), CLIP)

    optimizer.register_step_pre_hook(clip)
    return fit(model, data, recipe, seed, optimizer=optimizer)


def keep(model: nn.Module, importance: LayerImportance = "magnitude") -> nn.Module:
    """A copy of a network that stores the blocks worth most, per layer, one per row at least.

    Ranked in both layers together, in units of each one's mean weight, magnitude left
    Fashion-MNIST's second layer no block at all, and the network at 10 %.
    """
    return tetris.sparsify(
        model,
        include=LAYERS,
        sparsity=SPARSITY,
        block=BLOCK,
        importance=importance,
        reorder="identity",
    )


def random(model: nn.Module, seed: int) -> Mapping[str, Tensor]:
    """Worth drawn for every block."""
    generator = torch.Generator().manual_seed(seed)
    result = {}
    for name in LAYERS:
        layer = model.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        grid = layer.out_features // BLOCK[0], layer.in_features // BLOCK[1]
        blocks = torch.rand(grid, generator=generator)
        result[name] = blocks.repeat_interleave(BLOCK[0], 0).repeat_interleave(BLOCK[1], 1)
    return result


def share_on(model: nn.Module, inputs: int) -> float:
    """Share of the first layer's stored blocks that are on the first inputs."""
    layer = model.get_submodule(LAYERS[0])
    if isinstance(layer, nn.Linear):
        return inputs / layer.in_features
    mask = layer.layout.block_mask()  # type: ignore[union-attr,operator]
    return float(mask[:, : inputs // BLOCK[1]].sum() / mask.sum())


def blocks_of(model: nn.Module) -> dict[str, int]:
    """Name -> stored blocks of a sparse layer."""
    layers = {name: model.get_submodule(name) for name in LAYERS}
    return {n: x.layout.nnz_blocks for n, x in layers.items() if isinstance(x, SparseLayer)}


def stored_weights(model: nn.Module) -> int:
    """Numbers that the pruned layers store."""
    layers = [model.get_submodule(name) for name in LAYERS]
    return sum((x.weight if isinstance(x, nn.Linear) else x.values).numel() for x in layers)  # type: ignore[union-attr]


EXPERIMENT = VrpgeExperiment()
