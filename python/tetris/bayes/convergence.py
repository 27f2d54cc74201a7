"""Whether chains and fits arrived: R-hat, effective sample sizes, divergences, and words for it."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..checks import check_tensor

RHAT = 1.05
ESS = 100.0
DIVERGENT_SHARE = 0.01
SATURATED_SHARE = 0.05
LEAST_DRAWS = 4  # two halves, and a variance of each


def split_rhat(values: Tensor) -> Tensor:
    """Potential scale reduction of chains cut into halves.

    Args:
        values: [chains, draws, ...], four draws at least.

    Returns:
        R-hat [...]: square root of pooled over mean within-chain variance; near 1 if halves agree,
        NaN of constants. (Gelman et al., "Bayesian Data Analysis", 3rd edition, equation 11.4.)

    Raises:
        TypeError: values are no tensor.
        ValueError: values of another shape, too few draws, or integers.

    Example:
        >>> agree = torch.randn(4, 200)
        >>> apart = agree + torch.arange(4.0)[:, None]      # each chain around a number of its own
        >>> bool(split_rhat(agree) < 1.05 < split_rhat(apart))
        True
    """
    _check_values("split_rhat", values)
    half = values.shape[1] // 2
    halves = torch.cat([values[:, :half], values[:, -half:]]).double()
    within = halves.var(1).mean(0)
    between = halves.mean(1).var(0)
    return (((half - 1) / half * within + between) / within).sqrt()


def effective_size(values: Tensor) -> Tensor:
    """Number of independent draws that would tell the mean as well.

    Args:
        values: [chains, draws, ...], four draws at least.

    Returns:
        Effective sample size [...], by Geyer's initial monotone sequence over all chains; NaN of
        constants and of what is not finite. (Vehtari et al., "Rank-normalization, folding, and
        localization", 2021, 3.2.)

    Raises:
        TypeError: values are no tensor.
        ValueError: values of another shape, too few draws, or integers.

    Example:
        >>> independent = torch.randn(4, 200)
        >>> bool(effective_size(independent) > 10 * effective_size(independent.cumsum(1)))
        True
    """
    _check_values("effective_size", values)
    chains, draws = values.shape[:2]
    centred = (values - values.mean(1, keepdim=True)).double()
    spectrum = torch.fft.rfft(centred, n=2 * draws, dim=1).abs().square()
    covariance = torch.fft.irfft(spectrum, n=2 * draws, dim=1)[:, :draws] / draws
    covariance = covariance.mean(0)  # [draws, ...], biased
    within = covariance[0] * draws / (draws - 1)
    total = covariance[0] + (values.double().mean(1).var(0) if chains > 1 else 0.0)
    rho = 1 - (within - covariance) / total
    rho[0] = 1.0
    even = draws - draws % 2
    pairs = rho[0:even:2] + rho[1:even:2]
    positive = (pairs > 0).cumprod(0).bool()  # up to the first pair that is not
    pairs = torch.where(positive, pairs, torch.zeros_like(pairs)).cummin(0).values
    time = 2 * pairs.sum(0) - 1
    size = chains * draws / time.clamp(min=1 / math.log10(max(chains * draws, 11)))
    # Rounding gives constants a variance, and NaN compares like pairs that are not positive.
    varies = (values != values[:1, :1]).any(1).any(0)
    return torch.where(varies & (total > 0), size, math.nan)


def _check_values(where: str, values: Tensor) -> None:
    values = check_tensor(where, "values", values)
    if values.dim() < 2 or values.shape[1] < LEAST_DRAWS or not values.shape[0]:
        raise ValueError(
            f"{where}: values must be [chains, draws >= {LEAST_DRAWS}, ...] "
            f"(got {list(values.shape)})"
        )
    if not values.is_floating_point():
        raise ValueError(f"{where}: values must be floating point (got {values.dtype})")


@dataclass(frozen=True)
class Convergence:
    """What is known about a run, and :attr:`problems` in words.

    Attributes:
        method: How draws were made.
        rhat: Quantity -> split R-hat. Hidden nodes are exchangeable and have signs to choose, so
            quantities are what both leave alone: log density, scales, noise, outputs.
        ess: Quantity -> effective sample size.
        divergences: Share of divergent draws, per chain.
        accept: Mean acceptance probability, per chain.
        saturated: Share of draws whose tree reached the depth limit, per chain (NUTS only).
        notes: Other complaints.

    Example:
        >>> Convergence("HMC", rhat={"noise": 1.2}).problems
        ('chains disagree: R-hat above 1.05 of noise (worst noise: 1.20); run longer',)
    """

    method: str
    rhat: Mapping[str, float] = field(default_factory=dict)
    ess: Mapping[str, float] = field(default_factory=dict)
    divergences: tuple[float, ...] = ()
    accept: tuple[float, ...] = ()
    saturated: tuple[float, ...] = ()
    notes: tuple[str, ...] = ()

    @property
    def problems(self) -> tuple[str, ...]:
        """What speaks against the run, one sentence each; empty if nothing does."""
        found = []
        high = {n: r for n, r in self.rhat.items() if not r <= RHAT}
        if high:
            worst = max(high, key=lambda n: math.inf if math.isnan(high[n]) else high[n])
            found.append(
                f"chains disagree: R-hat above {RHAT} of {', '.join(high)} "
                f"(worst {worst}: {high[worst]:.2f}); run longer"
            )
        low = {n: e for n, e in self.ess.items() if not e >= ESS}
        if low:
            worst = min(low, key=lambda n: -math.inf if math.isnan(low[n]) else low[n])
            found.append(
                f"few independent draws: effective size below {ESS:g} of {', '.join(low)} "
                f"(worst {worst}: {low[worst]:.0f})"
            )
        for chain, share in enumerate(self.divergences):
            if share > DIVERGENT_SHARE:
                found.append(
                    f"chain {chain}: {share:.0%} of trajectories diverged; "
                    "ask for a higher acceptance probability"
                )
        for chain, share in enumerate(self.saturated):
            if share > SATURATED_SHARE:
                found.append(f"chain {chain}: {share:.0%} of trees reached the depth limit")
        return (*found, *self.notes)

    @property
    def converged(self) -> bool:
        """Whether nothing speaks against the run; nothing can prove that it converged."""
        return not self.problems

    def __str__(self) -> str:
        if self.converged:
            worst = f" (R-hat up to {max(self.rhat.values()):.3f})" if self.rhat else ""
            return f"{self.method}: nothing speaks against convergence{worst}"
        return f"{self.method} did not converge: " + "; ".join(self.problems)
