"""Densities of positive quantities, as functions of their logarithm."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


class Law(ABC):
    """Distribution of x > 0, seen through u = log x, where samplers move without a border."""

    @abstractmethod
    def log_density(self, u: Tensor) -> Tensor:
        """Log density *of u*, elementwise: that of x = exp(u), plus u."""

    @property
    @abstractmethod
    def variance(self) -> float:
        """Variance of u: how far samplers have to move."""


def _trigamma(x: float) -> float:
    return float(torch.special.polygamma(1, torch.tensor(x, dtype=torch.float64)))


@dataclass(frozen=True)
class HalfCauchy(Law):
    """C+(0, scale)."""

    scale: float = 1.0

    def log_density(self, u: Tensor) -> Tensor:
        """See :class:`Law`."""
        ratio = u - math.log(self.scale)
        return math.log(2 / math.pi) + ratio - F.softplus(2 * ratio)

    @property
    def variance(self) -> float:
        """See :class:`Law`."""
        return math.pi**2 / 4


@dataclass(frozen=True)
class HalfStudentT(Law):
    """Half-t with ``df`` degrees of freedom and scale 1."""

    df: float = 3.0

    def log_density(self, u: Tensor) -> Tensor:
        """See :class:`Law`."""
        half = (self.df + 1) / 2
        constant = (
            math.log(2)
            + math.lgamma(half)
            - math.lgamma(self.df / 2)
            - 0.5 * math.log(self.df * math.pi)
        )
        return constant + u - half * F.softplus(2 * u - math.log(self.df))

    @property
    def variance(self) -> float:
        """See :class:`Law`: half the log of a ratio of chi squares."""
        return (_trigamma(0.5) + _trigamma(self.df / 2)) / 4


@dataclass(frozen=True)
class InverseGamma(Law):
    """InvGamma(shape, scale): density proportional to x^(-shape-1) exp(-scale / x)."""

    shape: float
    scale: float

    def log_density(self, u: Tensor) -> Tensor:
        """See :class:`Law`."""
        constant = self.shape * math.log(self.scale) - math.lgamma(self.shape)
        return constant - self.shape * u - self.scale * torch.exp(-u)

    @property
    def variance(self) -> float:
        """See :class:`Law`."""
        return _trigamma(self.shape)


@dataclass(frozen=True)
class Gamma(Law):
    """Gamma(shape, rate 1). In u it is well-behaved for any shape, also below one."""

    shape: float

    def log_density(self, u: Tensor) -> Tensor:
        """See :class:`Law`."""
        return self.shape * u - torch.exp(u) - math.lgamma(self.shape)

    @property
    def variance(self) -> float:
        """See :class:`Law`; 101 of shape 0.1, where most of u is a long tail to the left."""
        return _trigamma(self.shape)
