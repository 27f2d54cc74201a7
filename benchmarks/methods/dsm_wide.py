"""The scalable path: wide layers by MAP, pruned in blocks, measured."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

import torch
from torch import Tensor, nn

import tetris
from tetris import bayes
from tetris.bayes import MAP, BayesianMLP, Posterior, Predictive
from tetris.data import Dataset
from tetris.prune import DSMPruner

from . import latency
from .data import split
from .experiment import Row, Setting
from .networks import mlp
from .progress import Progress
from .training import Recipe, accuracy, fit

WIDTH = {"digits": 512, "fashion": 512}
EPOCHS = {"digits": 60, "fashion": 10}
IMAGES = {"digits": None, "fashion": 10_000}
BLOCK = (16, 16)
SHARES = (0.5, 0.75, 0.9, 0.95)
TUNE = Recipe(epochs=5, learning_rate=1e-3)
LAYERS = ("linear1", "linear2")
DENSE = "wide plain"
EPSILON = 0.1  # of FGSM, in deviations of inputs
PRIORS: dict[str, bayes.Prior] = {
    "RHS": bayes.RegularizedHorseshoe(block=BLOCK),
    "DHS": bayes.DirichletHorseshoe(block=BLOCK),
    "DST": bayes.DirichletStudentT(block=BLOCK),
}


def variants(setting: Setting) -> list[str]:
    """Those of a setting."""
    return ["plain", *(["DHS"] if setting.quick else PRIORS)]


def count(setting: Setting) -> int:
    """Steps of progress."""
    return len(setting.seeds) * len(variants(setting))


def rows(setting: Setting, progress: Progress) -> Iterator[Row]:
    """Whole and pruned networks of each variant, with fine-tuning and latency."""
    for seed in setting.seeds:
        data = split(setting.data, seed, images=IMAGES[setting.data], flat=True)
        models: dict[str, nn.Module] = {}
        found: list[Row] = []
        for variant in variants(setting):
            progress.describe(f"seed {seed}: wide network, {variant}")
            for row, model in _variant(variant, data, setting, seed):
                models[row.label] = model
                found.append(row)
            progress.advance()
        progress.describe(f"seed {seed}: measuring latency")
        timed = {
            label: model
            for label, model in models.items()
            if label.startswith(("wide plain", "wide DHS"))
        }
        timed[latency.DENSE] = timed.pop(DENSE)
        times = latency.measure(timed, data.test_x[:256].contiguous())
        times[DENSE] = times[latency.DENSE]
        for row in found:
            yield latency.timed(row, times)


def _variant(
    variant: str, data: Dataset, setting: Setting, seed: int
) -> Iterator[tuple[Row, nn.Module]]:
    name = f"wide {variant}"
    width, epochs = WIDTH[setting.data], EPOCHS[setting.data]
    inputs, samples = data.train_x.shape[1], len(data.train_y)
    if variant == "plain":  # no prior: trained as usual, blocks by magnitude in the same order
        torch.manual_seed(seed)
        model = mlp((inputs, width, width, 10))
        fit(model, data, Recipe(epochs=epochs), seed)
        yield _row(name, seed, model, None, data, {}), model
        for share in SHARES:
            sparse = tetris.sparsify(
                model,
                sparsity=share,
                block=BLOCK,
                include=LAYERS,
                reorder="identity",
                importance="squared",
                allow_empty_rows=True,
            )
            yield _tuned(name, seed, sparse, share, data, {})
        return
    prior = PRIORS[variant]
    network = BayesianMLP(
        (inputs, width, width, 10),
        (prior, prior, bayes.Gaussian(width**-0.5)),
        samples,
        "classification",
        "relu",
    )
    posterior, around = fitted(network, data, epochs, seed)
    model = network.module(posterior.weights().mean()).eval()
    extra = {
        "converged": float(posterior.convergence.converged),
        "nll of draws": around.predict(data.test_x).nll(data.test_y),
        "effective weights": float(bayes.effective_parameters(posterior).mean()),
    }
    yield _row(name, seed, model, None, data, extra), model
    for share in SHARES:
        pruner = DSMPruner(posterior, sparsity=share, block=BLOCK)
        pruner.prune()
        sparse = pruner.finalize()
        with torch.no_grad():
            masked = pruner.model(data.test_x)
            error = float((sparse(data.test_x) - masked).abs().max() / masked.abs().max())
        yield _tuned(name, seed, sparse, share, data, {"sparse error": error})


def fitted(
    network: BayesianMLP, data: Dataset, epochs: int, seed: int
) -> tuple[Posterior, Posterior]:
    """MAP, and draws around it."""
    run = MAP(network, seed=seed)
    end = run.fit(data.train_x, data.train_y, epochs, learning_rate=0.03)
    return end, run.around(data.train_x, data.train_y, 10, 10)


def _row(
    name: str, seed: int, model: nn.Module, share: float | None, data: Dataset, extra: dict
) -> Row:
    def predict(x: Tensor) -> Predictive:
        return Predictive(model(x)[None], None, "classification")

    with torch.no_grad():
        found = predict(data.test_x)
    attacked = predict(bayes.fgsm(predict, data.test_x, data.test_y, EPSILON))
    figures = {
        "nll": found.nll(data.test_y),
        "ece": found.ece(data.test_y),
        f"accuracy, FGSM {EPSILON:g}": attacked.accuracy(data.test_y),
    }
    return Row(
        name,
        seed,
        accuracy(model, data),
        block=None if share is None else BLOCK,
        sparsity=share,
        stored=_stored(model),
        extra={**figures, **extra},
    )


def _tuned(
    name: str, seed: int, model: nn.Module, share: float, data: Dataset, extra: dict
) -> tuple[Row, nn.Module]:
    """Row of a pruned network: figures as it was pruned, and accuracy after fine-tuning."""
    pruned = _row(name, seed, model, share, data, extra)
    reached = fit(model, data, TUNE, seed + 1000)
    return replace(pruned, before=pruned.accuracy, accuracy=reached), model


def _stored(model: nn.Module) -> int:
    layers = [model.get_submodule(name) for name in LAYERS]
    return sum((x.weight if isinstance(x, nn.Linear) else x.values).numel() for x in layers)  # type: ignore[union-attr]
