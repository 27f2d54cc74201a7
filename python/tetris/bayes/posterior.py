"""Draws from the posterior of a network."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import DTYPES, check_seed, describe
from ..progress import counted
from ..warn import warn
from .convergence import LEAST_DRAWS, Convergence, effective_size, split_rhat
from .data import check_count, check_data, check_inputs, check_positive, check_targets
from .hmc import LEAST_WARMUP, hmc
from .network import NOISE, NOISE_LAW, BayesianMLP
from .predict import Predictive
from .weights import Weights, targets

PROBES = 10  # inputs at which outputs are compared between chains


@dataclass(frozen=True)
class Posterior:
    """Draws, and how far to trust them.

    Attributes:
        network: What was learnt.
        theta: [chains, draws, size].
        convergence: What speaks for and against the draws.

    Example:
        >>> posterior.predict(x).mean.shape                 # of all chains and draws
        torch.Size([40, 1])
        >>> weight, bias = posterior.chain(0).thin(10).weights().layers[0]
        >>> weight.shape                                    # [chains, draws, out, in]
        torch.Size([1, 10, 16, 8])
    """

    network: BayesianMLP
    theta: Tensor
    convergence: Convergence

    def weights(self) -> Weights:
        """Of all draws, with leading dimensions [chains, draws]."""
        return self.network.weights(self.theta)

    def chain(self, index: int) -> Posterior:
        """One chain alone: hidden nodes differ between chains, so weights compare within one."""
        if not -len(self.theta) <= operator.index(index) < len(self.theta):
            raise ValueError(
                f"Posterior.chain: index must be below {len(self.theta)}, the number of chains "
                f"(got {index})"
            )
        index = operator.index(index) % len(self.theta)
        return Posterior(self.network, self.theta[index : index + 1], self.convergence)

    def thin(self, draws: int) -> Posterior:
        """Evenly spaced draws, at most so many of each chain."""
        check_count("Posterior.thin", "draws", draws, 1)
        have = self.theta.shape[1]
        kept = torch.linspace(0, have - 1, min(draws, have)).round().long()
        return Posterior(self.network, self.theta[:, kept], self.convergence)

    def predict(self, x: Tensor) -> Predictive:
        """Posterior predictive at x [N, in], all chains and draws alike."""
        check_inputs("Posterior.predict", self.network.sizes[0], x)
        return Predictive.of(self.weights(), x)

    def held_out_noise(self, x: Tensor, y: Tensor) -> float:
        """The noise that points the draws have *not* seen call for, a standard deviation.

        The mode of its logarithm given the squared error of the predictive mean, less the variance
        of the draws. What was fitted tells too little noise, the more so with more weights.

        Args:
            x: [M, in].
            y: [M], or [M, out] of several outputs.

        Example:
            >>> noise = MAP(smaller).fit(x[:80], y[:80], 500).held_out_noise(x[80:], y[80:])
            >>> MAP(network).fit(x, y, 500).with_noise(noise).predict(test_x).nll(test_y)
        """
        where = "Posterior.held_out_noise"
        self._check_regression(where)
        found = self.predict(x)
        check_targets(where, y, x.shape[:1], self.network.sizes[-1], "regression")
        error = targets(y, found.outputs.shape[-1]) - found.mean
        squares = error.square() - found.outputs.var(0, correction=0)
        total = max(0.0, float(squares.sum()))
        # of (shape + count) s^2 - scale s - total = 0
        count, scale = NOISE_LAW.shape + error.numel(), NOISE_LAW.scale
        return (scale + math.sqrt(scale**2 + 4 * count * total)) / (2 * count)

    def with_noise(self, noise: float) -> Posterior:
        """The same draws with another standard deviation of a regression's noise."""
        where = "Posterior.with_noise"
        self._check_regression(where)
        check_positive(where, noise=noise)
        theta = self.theta.clone()
        self.network.get(theta, NOISE).fill_(math.log(noise))
        return Posterior(self.network, theta, self.convergence)

    def _check_regression(self, where: str) -> None:
        if self.network.task != "regression":
            raise ValueError(f"{where}: noise is of a regression (got {self.network.task!r})")


def sample_hmc(
    network: BayesianMLP,
    x: Tensor,
    y: Tensor,
    *,
    chains: int = 2,
    warmup: int = 400,
    draws: int = 400,
    steps: int = 50,
    accept: float = 0.8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    advance: Callable[[], object] = lambda: None,
    progress: bool = False,
) -> list[Posterior]:
    """Posteriors of one network on several data sets, by :func:`tetris.bayes.hmc`, all at once.

    Small networks spend their time in calls, not in arithmetic: ten chains cost about as much as
    one. Warns of chains that did not converge; the result says why.

    Args:
        network: What to learn.
        x: [data sets, N, in].
        y: [data sets, N]: int64 classes, or numbers; one more dimension for several outputs.
        chains: Per data set.
        warmup: See :func:`tetris.bayes.hmc`; this and the next three.
        draws: Per chain, at least four.
        steps: Leapfrog steps. Horseshoes are stiff, so that trajectories of few walk at random
            (Friedman, N = 100, DHS, 200 + 200 iterations: R-hat of outputs 1.27 of 20, 1.13 of 60).
        accept: Acceptance probability to adapt to.
        seed: Of starts and draws.
        dtype: To compute in.
        advance: Called once per iteration.
        progress: Show a progress bar.

    Returns:
        One posterior per data set.

    Raises:
        TypeError: x or y is no tensor.
        ValueError: data do not go with the network, or counts are out of range.

    Example:
        >>> (posterior,) = sample_hmc(network, x[None], y[None], warmup=400, draws=400, steps=60)
        >>> print(posterior.convergence)
        >>> posterior.predict(test_x).nll(test_y)
    """
    where = "sample_hmc"
    check_network(where, network)
    check_data(where, network, x, y, sets=True)
    check_count(where, "chains", chains, 1)
    check_count(where, "warmup", warmup, LEAST_WARMUP)
    check_count(where, "draws, which R-hat is of,", draws, LEAST_DRAWS)
    if dtype not in DTYPES["cpu"]:
        raise ValueError(f"{where}: dtype must be float32 or float64 (got {dtype})")
    generator = torch.Generator().manual_seed(check_seed(where, seed))
    inputs = x.to(dtype).unsqueeze(1)
    outputs = (y if network.task == "classification" else y.to(dtype)).unsqueeze(1)
    with counted(progress, "sampling", warmup + draws, advance) as after:
        found = hmc(
            lambda theta: network.log_joint(theta, inputs, outputs),
            network.start(generator, len(x), chains, dtype=dtype),
            warmup=warmup,
            draws=draws,
            steps=steps,
            accept=accept,
            generator=generator,
            variance=network.prior_variance(dtype),
            advance=after,
        )
    posteriors = []
    for index in range(len(x)):
        theta = found.theta[index]
        convergence = judge(
            "HMC",
            network,
            theta,
            found.log_density[index],
            inputs[index, 0],
            divergences=tuple((found.divergences[index] / draws).tolist()),
            accept=tuple(found.accept[index].tolist()),
        )
        posteriors.append(Posterior(network, theta, convergence))
    warn_of_runs(where, [p.convergence for p in posteriors])
    return posteriors


def check_network(where: str, network: BayesianMLP) -> None:
    """Raise TypeError unless it is a network."""
    if not isinstance(network, BayesianMLP):
        raise TypeError(f"{where}: network must be a BayesianMLP (got {describe(network)})")


def warn_of_runs(where: str, runs: list[Convergence]) -> None:
    """Warn once of all runs that did not converge, with the words of the first."""
    bad = [c for c in runs if not c.converged]
    if bad:
        warn(f"{where}: {len(bad)} of {len(runs)} runs did not converge; the first: {bad[0]}")


def judge(
    method: str,
    network: BayesianMLP,
    theta: Tensor,
    log_density: Tensor,
    x: Tensor,
    *,
    divergences: tuple[float, ...] = (),
    accept: tuple[float, ...] = (),
    saturated: tuple[float, ...] = (),
    notes: tuple[str, ...] = (),
) -> Convergence:
    """Compare chains [chains, draws, size] in quantities that exchanging nodes does not change."""
    probes = x[torch.linspace(0, len(x) - 1, min(PROBES, len(x))).long()].to(theta.dtype)
    quantities = {"log density": log_density.unsqueeze(-1)}
    quantities["outputs"] = network.weights(theta)(probes).flatten(2)
    for name in network.slots:
        if name == NOISE or name.endswith(".tau"):
            quantities[name] = network.get(theta, name)
    return Convergence(
        method,
        {n: float(split_rhat(v).nan_to_num(torch.inf).max()) for n, v in quantities.items()},
        {n: float(effective_size(v).nan_to_num(0.0).min()) for n, v in quantities.items()},
        divergences,
        accept,
        saturated,
        notes,
    )
