"""Small Bayesian networks, sampled: what their posteriors know, and lose when pruned."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from tetris import bayes
from tetris.bayes import BayesianMLP, Posterior, Predictive, Weights
from tetris.bayes.priors import Scale
from tetris.bayes.weights import Task
from tetris.prune import DSMPruner

from .dsm_data import Points
from .experiment import Row
from .progress import Progress

HIDDEN = 16
BLOCK = (4, 2)
ATTACKS = (0.1, 0.3)  # epsilon of FGSM, in standard deviations of inputs
SHOWN = 200  # draws per chain that figures are made of; diagnostics see all
PRIORS: dict[str, bayes.Prior] = {
    "Gaussian": bayes.Gaussian(),
    "RHS": bayes.RegularizedHorseshoe(),
    "DHS": bayes.DirichletHorseshoe(),
    "DST": bayes.DirichletStudentT(),
}


class AuthorsDHS(bayes.DirichletHorseshoe):
    """The Dirichlet horseshoe behind the authors' Friedman figures (their older Stan file).

    ``w_ji ~ N(0, (tau lt_ji phi_ji)^2)``: lambda per weight, and phi in place of its root.
    """

    def scales(self, out: int, in_: int) -> dict[str, Scale]:
        """See :meth:`tetris.bayes.Prior.scales`."""
        return {**super().scales(out, in_), "lambda": Scale((out, in_), self.local())}

    def log_sd(self, logs: Mapping[str, Tensor], out: int, in_: int, samples: int) -> Tensor:
        """See :meth:`tetris.bayes.Prior.log_sd`."""
        return self._log_local(logs, in_, samples) + logs["gamma"].log_softmax(-1)


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
        steps: Leapfrog steps of HMC, on average.
        depth: Of NUTS's trees, at most: 9 is 511 leapfrog steps.
    """

    warmup: int
    draws: int
    chains: int = 2
    steps: int = 20
    depth: int = 9


def network_of(data: Points, prior: bayes.Prior, task: Task, layers: int = 1) -> BayesianMLP:
    """One hidden layer of tanh nodes, as the authors'; or more, all under the prior."""
    samples, in_ = data.x.shape[1:]
    out = 1 if task == "regression" else int(data.y.max()) + 1
    return BayesianMLP((in_, *[HIDDEN] * layers, out), [prior] * layers, samples, task)


def sample(
    name: str,
    data: Points,
    prior: bayes.Prior,
    task: Task,
    sampling: Sampling,
    progress: Progress,
    layers: int = 1,
) -> list[Posterior]:
    """Posteriors of all seeds by batched HMC, in single precision: twice as fast, all in logs."""
    progress.describe(f"{name}: HMC")
    with warnings.catch_warnings():  # rows say what did not converge
        warnings.filterwarnings("ignore", "sample_hmc: ")
        found = bayes.sample_hmc(
            network_of(data, prior, task, layers),
            data.x,
            data.y,
            chains=sampling.chains,
            warmup=sampling.warmup,
            draws=sampling.draws,
            steps=sampling.steps,
            dtype=torch.float32,
        )
    progress.advance()
    return found


def sample_nuts(
    data: Points, prior: bayes.Prior, task: Task, sampling: Sampling, index: int = 0
) -> Posterior:
    """Posterior of one seed by the reference sampler."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "sample_nuts: ")
        return bayes.sample_nuts(
            network_of(data, prior, task),
            data.x[index],
            data.y[index],
            chains=sampling.chains,
            warmup=sampling.warmup,
            draws=sampling.draws,
            max_tree_depth=sampling.depth,
            accept=0.8,
        )


def fit_map(
    data: Points, prior: bayes.Prior, task: Task, index: int, epochs: int
) -> dict[str, Posterior]:
    """The scalable path on one seed: MAP, and draws around it.

    A regression's noise is told by the last fifth of the points, of a fit to the others.
    """

    def fitted(points: int) -> dict[str, Posterior]:
        part = replace(data, x=data.x[:, :points], y=data.y[:, :points])
        fit = bayes.MAP(network_of(part, prior, task), seed=index, dtype=torch.float64)
        x, y = part.x[index], part.y[index]
        return {
            "MAP": fit.fit(x, y, epochs, learning_rate=0.02),
            "SWAG": fit.around(x, y, 40, 40, learning_rate=0.01),
        }

    every = data.x.shape[1]
    found = fitted(every)
    if task == "classification":
        return found
    kept = every * 4 // 5
    rest = data.x[index, kept:], data.y[index, kept:]
    noise = {way: each.held_out_noise(*rest) for way, each in fitted(kept).items()}
    return {way: each.with_noise(noise[way]) for way, each in found.items()}


def figures(weights: Weights, x: Tensor, y: Tensor) -> tuple[float, dict[str, float]]:
    """Accuracy (R^2 of regression), and figures of error, calibration and attack."""
    found = Predictive.of(weights, x)
    extra = {"nll": found.nll(y), "ece": found.ece(y)}
    if found.task == "regression":
        extra["rmse"] = found.rmse(y)
        errors = (found.outputs[..., 0] - y).square().mean(1).sqrt()
        extra["rmse of single draws"] = float(errors.mean())
    for eps in ATTACKS:
        attacked = attack(weights, x, y, eps)
        extra[f"nll, FGSM {eps:g}"] = attacked.nll(y)
        if found.task == "classification":
            extra[f"accuracy, FGSM {eps:g}"] = attacked.accuracy(y)
        else:
            extra[f"rmse, FGSM {eps:g}"] = attacked.rmse(y)
    return found.accuracy(y), extra


def attack(weights: Weights, x: Tensor, y: Tensor, eps: float) -> Predictive:
    """Predictive at inputs moved by FGSM."""
    return Predictive.of(weights, bayes.fgsm(lambda v: Predictive.of(weights, v), x, y, eps))


def distance(a: Predictive, mean: Tensor) -> float:
    """How far a predictive is from the mean of another one, over all points.

    Classification: total variation of the probabilities. Regression: root mean square difference of
    the means, in standard deviations of the target.
    """
    difference = a.mean - mean
    if a.task == "classification":
        return float(0.5 * difference.abs().sum(1).mean())
    return float(difference.square().mean().sqrt())


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
    reference: Tensor | None = None,
) -> Iterator[Row]:
    """Rows of one posterior: whole, pruned draw by draw, and by one mask per chain.

    Args:
        name: Of the rows.
        seed: Of the rows.
        posterior: All its draws; figures are made of ``SHOWN`` per chain.
        x: [M, in], test points.
        y: [M].
        per_draw: Shares of weights that each draw loses for itself.
        blocks: Shares of blocks that a chain's mask removes.
        inputs: Shares of inputs.
        reference: Mean [M, out] of HMC's predictive at x, to measure the distance from.
    """
    weights = posterior.thin(SHOWN).weights()
    accuracy, extra = figures(weights, x, y)
    run = posterior.convergence
    if run.rhat:
        extra["R-hat, outputs"] = run.rhat["outputs"]
        extra["R-hat, worst"] = max(run.rhat.values())
        extra["ESS, outputs"] = run.ess["outputs"]
    extra["converged"] = float(run.converged)
    extra["effective weights"] = float(bayes.effective_parameters(posterior).mean())
    if reference is not None:
        extra["distance from HMC"] = distance(Predictive.of(weights, x), reference)
    yield Row(name, seed, accuracy, extra=extra)
    first = weights.layers[0][0]
    for share in per_draw:
        pruned = weights.with_weight(0, bayes.prune_draws(first, share))
        accuracy, extra = figures(pruned, x, y)
        yield Row(f"{name}, {share:.0%} per draw", seed, accuracy, extra=extra)
    for kind, shares in (("blocks", blocks), ("inputs", inputs)):
        for share in shares:
            kept = masks(posterior, share, kind == "inputs")
            accuracy, extra = figures(weights.with_weight(0, first * kept), x, y)
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
