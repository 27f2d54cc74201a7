"""Draws from the posterior of a network."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .convergence import Convergence, effective_size, split_rhat
from .hmc import hmc
from .network import NOISE, BayesianMLP
from .predict import Predictive
from .weights import Weights

PROBES = 10  # inputs at which outputs are compared between chains


@dataclass(frozen=True)
class Posterior:
    """Draws, and how far to trust them.

    Attributes:
        network: What was learnt.
        theta: [chains, draws, size].
        convergence: What speaks for and against the draws.
    """

    network: BayesianMLP
    theta: Tensor
    convergence: Convergence

    def weights(self) -> Weights:
        """Of all draws, with leading dimensions [chains, draws]."""
        return self.network.weights(self.theta)

    def chain(self, index: int) -> Posterior:
        """One chain alone: hidden nodes differ between chains, so weights compare within one."""
        return Posterior(self.network, self.theta[index : index + 1], self.convergence)

    def thin(self, draws: int) -> Posterior:
        """Evenly spaced draws, at most so many of each chain."""
        have = self.theta.shape[1]
        kept = torch.linspace(0, have - 1, min(draws, have)).round().long()
        return Posterior(self.network, self.theta[:, kept], self.convergence)

    def predict(self, x: Tensor) -> Predictive:
        """Posterior predictive at x [N, in], all chains and draws alike."""
        return Predictive.of(self.weights(), x)


def check_data(where: str, network: BayesianMLP, x: Tensor, y: Tensor) -> None:
    """Raise ValueError unless x [..., N, in] and y [..., N] go with a network."""
    out, in_ = network.sizes[-1], network.sizes[0]
    several = network.task == "regression" and out > 1
    rows = y.shape[:-1] if several else y.shape
    if x.dim() < 2 or x.shape[-1] != in_ or x.shape[:-1] != rows:
        raise ValueError(
            f"{where}: x must be [N, {in_}] and y {f'[N, {out}]' if several else '[N]'} "
            f"(got {list(x.shape)} and {list(y.shape)})"
        )
    if x.shape[-2] != network.samples:
        raise ValueError(
            f"{where}: the network was made for {network.samples} samples, which its prior depends "
            f"on (got {x.shape[-2]})"
        )
    if network.task == "classification":
        if y.dtype != torch.int64 or int(y.min()) < 0 or int(y.max()) >= out:
            raise ValueError(
                f"{where}: y must be int64 classes from 0 to {out - 1} "
                f"(got {y.dtype}, from {y.min()} to {y.max()})"
            )


def sample_hmc(
    network: BayesianMLP,
    x: Tensor,
    y: Tensor,
    *,
    chains: int = 2,
    warmup: int = 400,
    draws: int = 400,
    steps: int = 20,
    accept: float = 0.8,
    seed: int = 0,
    dtype: torch.dtype = torch.float64,
    advance: Callable[[], object] = lambda: None,
) -> list[Posterior]:
    """Posteriors of one network on several data sets, by :func:`tetris.bayes.hmc`, all at once.

    Small networks spend their time in calls, not in arithmetic: ten chains cost about as much as
    one. Warns of chains that did not converge; the result says why.

    Args:
        network: What to learn.
        x: [data sets, N, in].
        y: [data sets, N].
        chains: Per data set.
        warmup: See :func:`tetris.bayes.hmc`; this and the next three.
        draws: Per chain.
        steps: Leapfrog steps.
        accept: Acceptance probability to adapt to.
        seed: Of starts and draws.
        dtype: To compute in.
        advance: Called once per iteration.

    Returns:
        One posterior per data set.
    """
    where = "sample_hmc"
    if x.dim() != 3:
        raise ValueError(
            f"{where}: x must be [data sets, N, in] (got {list(x.shape)}); "
            "x[None] and y[None] are one data set"
        )
    check_data(where, network, x, y)
    generator = torch.Generator().manual_seed(seed)
    inputs = x.to(dtype).unsqueeze(1)
    outputs = (y if network.task == "classification" else y.to(dtype)).unsqueeze(1)
    found = hmc(
        lambda theta: network.log_joint(theta, inputs, outputs),
        network.start(generator, len(x), chains, dtype=dtype),
        warmup=warmup,
        draws=draws,
        steps=steps,
        accept=accept,
        generator=generator,
        variance=network.prior_variance(dtype),
        advance=advance,
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
    warn(where, [p.convergence for p in posteriors])
    return posteriors


def warn(where: str, runs: list[Convergence]) -> None:
    """Warn once of all runs that did not converge, with the words of the first."""
    bad = [c for c in runs if not c.converged]
    if bad:
        warnings.warn(
            f"{where}: {len(bad)} of {len(runs)} runs did not converge; the first: {bad[0]}",
            stacklevel=3,
        )


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
