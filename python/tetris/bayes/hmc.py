"""Hamiltonian Monte Carlo, many chains of many data sets in one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import describe
from .data import check_count, check_share

LogDensity = Callable[[Tensor], Tensor]
DIVERGENT = 1000.0  # error of the energy from which a trajectory counts as divergent, as in Stan
LEAST_WARMUP = 20


@dataclass(frozen=True)
class Chains:
    """What came out of :func:`hmc`.

    Attributes:
        theta: [*batch, draws, size].
        log_density: [*batch, draws].
        accept: Mean acceptance probability [*batch] of the draws.
        divergences: Divergent trajectories [*batch] among the draws.
        step_size: [*batch].
    """

    theta: Tensor
    log_density: Tensor
    accept: Tensor
    divergences: Tensor
    step_size: Tensor


def hmc(
    log_density: LogDensity,
    start: Tensor,
    *,
    warmup: int,
    draws: int,
    steps: int = 20,
    jitter: float = 0.5,
    accept: float = 0.8,
    generator: torch.Generator,
    variance: Tensor | None = None,
    advance: Callable[[], object] = lambda: None,
) -> Chains:
    """Draw from a density, all chains together.

    Leapfrog trajectories of random length, a diagonal metric and a step size per chain, both
    adapted during warm-up: the step size by dual averaging, the metric from the variance of draws
    in windows that double. (Hoffman and Gelman, "The No-U-Turn Sampler", JMLR 2014, section 3.2;
    windows as in Stan's reference manual.) All chains take equally many leapfrog steps, so that one
    gradient serves them all.

    Args:
        log_density: [*batch, size] -> [*batch], differentiable; -inf and NaN are rejected.
        start: [*batch, size]; its type is the one computed in.
        warmup: Iterations that are thrown away, at least 20.
        draws: Iterations that are kept.
        steps: Leapfrog steps of a trajectory, on average.
        jitter: Trajectories have ``steps * (1 +- jitter)`` steps, uniformly: equal ones could
            resonate with the density.
        accept: Acceptance probability to adapt to.
        generator: Random numbers.
        variance: Of theta [size], roughly: the metric to begin with, by default ones. A short
            warm-up needs it where variances differ much, as do those of the Dirichlet's gammas
            (Friedman, N = 100, 200 + 200 iterations: RMSE .278 with the prior's, .342 without).
        advance: Called once per iteration, for progress.

    Returns:
        :class:`Chains`, the draws and what is known of their trajectories, in the type of start.

    Raises:
        ValueError: counts out of range, a start that is not floating point, or a density of
            another shape.
        FloatingPointError: the density is not finite at a start.

    Example:
        >>> def log_density(theta):                                 # three standard normals
        ...     return -0.5 * theta.square().sum(-1)
        >>> found = hmc(log_density, torch.zeros(4, 3), warmup=50, draws=100, steps=5,
        ...             generator=torch.Generator().manual_seed(0))
        >>> found.theta.shape                                       # of four chains
        torch.Size([4, 100, 3])
    """
    for name, count, least in (
        ("warmup", warmup, LEAST_WARMUP),
        ("draws", draws, 1),
        ("steps", steps, 1),
    ):
        check_count("hmc", name, count, least)
    check_share("hmc", accept=accept)
    if not 0 <= jitter < 1:
        raise ValueError(f"hmc: jitter must be in [0, 1) (got {jitter})")
    if not isinstance(start, Tensor) or not start.is_floating_point() or start.dim() < 1:
        raise ValueError(
            f"hmc: start must be floating point [*batch, size] (got {describe(start)})"
        )
    position = start.detach()
    value, gradient = _with_gradient(log_density, position)
    if value.shape != start.shape[:-1]:
        raise ValueError(
            f"hmc: log_density must return {list(start.shape[:-1])} numbers for states "
            f"{list(start.shape)} (got {list(value.shape)})"
        )
    if not bool(value.isfinite().all() and gradient.isfinite().all()):
        raise FloatingPointError(
            "hmc: the log density and its gradient must be finite where chains start; "
            f"{int((~value.isfinite()).sum())} of {value.numel()} values are not"
        )
    batch = value.shape
    unit = torch.ones((), dtype=position.dtype) if variance is None else variance.to(position.dtype)
    metric = unit.expand(position.shape)  # estimated variance; the mass is its inverse
    dual = _DualAveraging(torch.full(batch, 0.1, dtype=value.dtype), accept)
    moments = _Moments(position)
    ends = _window_ends(warmup)
    low, high = round(steps * (1 - jitter)), round(steps * (1 + jitter))
    found: list[tuple[Tensor, Tensor]] = []
    total = torch.zeros_like(value)
    divergences = torch.zeros(batch, dtype=torch.int64)
    for iteration in range(warmup + draws):
        warming = iteration < warmup
        step = dual.step if warming else dual.smooth
        length = int(torch.randint(max(1, low), high + 1, (), generator=generator))
        noise = torch.randn(position.shape, generator=generator, dtype=position.dtype)
        momentum = noise / metric.sqrt()
        energy = 0.5 * noise.square().sum(-1) - value
        moved, speed, slope = position, momentum, gradient
        size = step.unsqueeze(-1)
        reached = value
        for _ in range(length):
            speed = speed + 0.5 * size * slope
            moved = moved + size * metric * speed
            reached, slope = _with_gradient(log_density, moved)
            speed = speed + 0.5 * size * slope
        change = energy - 0.5 * (metric * speed.square()).sum(-1) + reached
        change = change.nan_to_num(-torch.inf, posinf=-torch.inf)
        probability = change.clamp(max=0.0).exp()
        uniform = torch.rand(batch, generator=generator, dtype=value.dtype)
        taken = uniform < probability
        position = torch.where(taken.unsqueeze(-1), moved, position)
        gradient = torch.where(taken.unsqueeze(-1), slope, gradient)
        value = torch.where(taken, reached, value)
        if warming:
            dual.update(probability)
            if ends and ends[0] <= iteration < ends[-1]:
                moments.add(position)
            if iteration in ends[1:]:
                metric = moments.variance(unit)
                moments = _Moments(position)
                dual = _DualAveraging(dual.step, accept)
        else:
            found.append((position, value))
            total += probability
            divergences += change < -DIVERGENT
        advance()
    theta, values = (torch.stack(parts, len(batch)) for parts in zip(*found, strict=True))
    return Chains(theta, values, total / draws, divergences, dual.smooth)


def _with_gradient(log_density: LogDensity, position: Tensor) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        position = position.detach().requires_grad_()
        value = log_density(position)
        (gradient,) = torch.autograd.grad(value.sum(), position)
    return value.detach(), gradient


def _window_ends(warmup: int) -> list[int]:
    """Where estimation of the metric starts, then iterations after which the metric changes.

    Then come up to 50 for the step size, as in Stan.
    """
    begin, end = int(0.15 * warmup), warmup - min(50, warmup // 4)
    ends, size = [begin], 25
    while ends[-1] < end:
        after = ends[-1] + size
        if after + 2 * size > end:  # no room for another one of twice the size
            after = end
        ends.append(after)
        size *= 2
    return ends


class _DualAveraging:
    """Step sizes that steer acceptance; constants of Hoffman and Gelman."""

    def __init__(self, step: Tensor, target: float) -> None:
        self.center = (10 * step).log()
        self.target = target
        self.error = torch.zeros_like(step)
        self.count = 0
        self.log_step = step.log()
        self.log_smooth = torch.zeros_like(step)

    def update(self, probability: Tensor) -> None:
        self.count += 1
        weight = 1 / (self.count + 10)
        self.error = (1 - weight) * self.error + weight * (self.target - probability)
        self.log_step = self.center - self.count**0.5 / 0.05 * self.error
        share = self.count**-0.75
        self.log_smooth = share * self.log_step + (1 - share) * self.log_smooth

    @property
    def step(self) -> Tensor:
        return self.log_step.exp()

    @property
    def smooth(self) -> Tensor:
        return self.log_smooth.exp()


class _Moments:
    """Running variance (Welford), shrunk towards a small one while draws are few, as in Stan."""

    def __init__(self, like: Tensor) -> None:
        self.count = 0
        self.mean = torch.zeros_like(like)
        self.squares = torch.zeros_like(like)

    def add(self, value: Tensor) -> None:
        self.count += 1
        delta = value - self.mean
        self.mean = self.mean + delta / self.count
        self.squares = self.squares + delta * (value - self.mean)

    def variance(self, unit: Tensor) -> Tensor:
        share = self.count / (self.count + 5)
        return share * self.squares / max(1, self.count - 1) + (1 - share) * 1e-3 * unit
