"""Small Bayesian networks, sampled: what their posteriors know, and lose when pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from tetris import bayes
from tetris.bayes import BayesianMLP, Posterior, Predictive, Weights
from tetris.bayes.weights import Task
from tetris.prune import DSMPruner

from .dsm_data import Points
from .experiment import Row
from .progress import Progress

HIDDEN = 16
BLOCK = (4, 2)
EPSILON = 0.1  # of the attack, in standard deviations of inputs
PRIORS: dict[str, bayes.Prior] = {
    "Gaussian": bayes.Gaussian(),
    "RHS": bayes.RegularizedHorseshoe(),
    "DHS": bayes.DirichletHorseshoe(),
    "DST": bayes.DirichletStudentT(),
}
BLOCK_PRIORS: dict[str, bayes.Prior] = {
    "DHS 4x2": bayes.DirichletHorseshoe(block=BLOCK),
    "DST 4x2": bayes.DirichletStudentT(block=BLOCK),
}


@dataclass(frozen=True)
class Sampling:
    """How long chains are.

    Attributes:
        warmup: Iterations thrown away.
        draws: Iterations kept.
        chains: Per data set.
        steps: Leapfrog steps of HMC.
    """

    warmup: int
    draws: int
    chains: int = 2
    steps: int = 20


def network_of(data: Points, prior: bayes.Prior, task: Task) -> BayesianMLP:
    """One hidden layer of tanh nodes, as the authors'."""
    samples, in_ = data.x.shape[1:]
    out = 1 if task == "regression" else int(data.y.max()) + 1
    return BayesianMLP((in_, HIDDEN, out), prior, samples, task)


def sample(
    name: str, data: Points, prior: bayes.Prior, task: Task, sampling: Sampling, progress: Progress
) -> list[Posterior]:
    """Posteriors of all seeds by batched HMC."""
    progress.describe(f"{name}: HMC")
    with warnings.catch_warnings():  # rows say what did not converge
        warnings.filterwarnings("ignore", "sample_hmc: ")
        found = bayes.sample_hmc(
            network_of(data, prior, task),
            data.x,
            data.y,
            chains=sampling.chains,
            warmup=sampling.warmup,
            draws=sampling.draws,
            steps=sampling.steps,
        )
    progress.advance()
    return found


def sample_nuts(
    data: Points, prior: bayes.Prior, task: Task, sampling: Sampling, index: int = 0
) -> Posterior:
    """Posterior of one seed by the reference sampler, trees up to depth 8."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sample_nuts: ")
        return bayes.sample_nuts(
            network_of(data, prior, task),
            data.x[index],
            data.y[index],
            chains=sampling.chains,
            warmup=sampling.warmup,
            draws=sampling.draws,
            max_tree_depth=8,
        )


def fit_map(
    data: Points, prior: bayes.Prior, task: Task, index: int, epochs: int
) -> dict[str, Posterior]:
    """The scalable path on one seed: MAP, and draws around it."""
    fit = bayes.MAP(network_of(data, prior, task), seed=index, dtype=torch.float64)
    x, y = data.x[index], data.y[index]
    return {
        "MAP": fit.fit(x, y, epochs, learning_rate=0.02),
        "SWAG": fit.around(x, y, 40, 40, learning_rate=0.01),
    }


def figures(weights: Weights, x: Tensor, y: Tensor) -> tuple[float, dict[str, float]]:
    """Accuracy (R^2 of regression), and figures of error, calibration and attack."""
    found = Predictive.of(weights, x)
    moved = bayes.fgsm(lambda v: Predictive.of(weights, v), x, y, EPSILON)
    attacked = Predictive.of(weights, moved)
    extra = {"nll": found.nll(y), "ece": found.ece(y), "nll fgsm": attacked.nll(y)}
    if found.task == "regression":
        extra["rmse"] = found.rmse(y)
        errors = (found.outputs[..., 0] - y).square().mean(1).sqrt()
        extra["rmse of single draws"] = float(errors.mean())
    else:
        extra["accuracy fgsm"] = attacked.accuracy(y)
    return found.accuracy(y), extra


def rows_of(
    name: str,
    seed: int,
    posterior: Posterior,
    x: Tensor,
    y: Tensor,
    *,
    per_draw: tuple[float, ...] = (),
    blocks: tuple[float, ...] = (),
    inputs: tuple[float, ...] = (),
) -> Iterator[Row]:
    """Rows of one posterior: whole, pruned draw by draw, and by one mask per chain."""
    weights = posterior.weights()
    accuracy, extra = figures(weights, x, y)
    run = posterior.convergence
    extra["R-hat"] = max(run.rhat.values()) if run.rhat else float("nan")
    extra["converged"] = float(run.converged)
    extra["effective weights"] = float(bayes.effective_parameters(posterior).mean())
    yield Row(name, seed, accuracy, extra={k: v for k, v in extra.items() if v == v})
    first = weights.layers[0][0]
    for share in per_draw:
        pruned = weights.with_weight(0, bayes.prune_draws(first, share))
        accuracy, extra = figures(pruned, x, y)
        yield Row(f"{name}, {share:.0%} per draw", seed, accuracy, extra=extra)
    for kind, shares in (("blocks", blocks), ("inputs", inputs)):
        for share in shares:
            pruned = weights.with_weight(0, first * masks(posterior, share, kind == "inputs"))
            accuracy, extra = figures(pruned, x, y)
            yield Row(f"{name}, {share:.0%} of {kind}", seed, accuracy, extra=extra)


def masks(posterior: Posterior, share: float, inputs: bool = False) -> Tensor:
    """[chains, 1, out, in], what one layout per chain keeps of the first weight."""
    kept = []
    for chain in range(len(posterior.theta)):
        pruner = pruner_of(posterior.chain(chain), share, inputs)
        kept.append(pruner.layouts()["linear1"].mask())
    return torch.stack(kept).unsqueeze(1)


def pruner_of(posterior: Posterior, share: float, inputs: bool = False) -> DSMPruner:
    """One chain, pruned."""
    block, granularity = ((HIDDEN, 1), "input") if inputs else (BLOCK, "block")
    pruner = DSMPruner(posterior, granularity=granularity, sparsity=share, block=block)
    pruner.prune()
    return pruner


def sparse_error(posterior: Posterior, share: float, x: Tensor) -> tuple[float, float]:
    """Largest relative error of the sparse mean and of sparse draws, against masked dense ones."""
    pruner = pruner_of(posterior, share)
    x = x.float()
    with torch.no_grad():
        masked, sparse = pruner.model(x), pruner.finalize()(x)
        ensemble = pruner.ensemble(draws=10).predict(x).outputs
        weights = posterior.thin(10).weights().flat().to(torch.float32)
        kept = pruner.layouts()["linear1"].mask()
        dense = weights.with_weight(0, weights.layers[0][0] * kept)(x)
    return tuple(
        float((a - b).abs().max() / b.abs().max()) for a, b in ((sparse, masked), (ensemble, dense))
    )  # type: ignore[return-value]
