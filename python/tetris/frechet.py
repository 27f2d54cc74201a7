"""Frechet distance between sets of features: how far generated images are from real ones."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .checks import check_tensor


@dataclass(frozen=True)
class Gaussian:
    """The normal distribution that features have.

    Attributes:
        mean: [d], kept as float64.
        covariance: [d, d], symmetric, likewise.
    """

    mean: Tensor
    covariance: Tensor

    def __post_init__(self) -> None:
        for name in ("mean", "covariance"):
            value = check_tensor("Gaussian", name, getattr(self, name))
            object.__setattr__(self, name, value.detach().double())
        d = self.mean.numel()
        if tuple(self.mean.shape) != (d,) or tuple(self.covariance.shape) != (d, d):
            raise ValueError(
                "Gaussian: mean and covariance must be [d] and [d, d] "
                f"(got {list(self.mean.shape)} and {list(self.covariance.shape)})"
            )

    @classmethod
    def of(cls, features: Tensor) -> Gaussian:
        """Mean and covariance (divided by n - 1) of features, [n, d] of any floating type.

        Raises:
            ValueError: fewer than two rows, another shape, numbers that are not finite.
        """
        where = "Gaussian.of"
        check_tensor(where, "features", features)
        if features.dim() != 2 or len(features) < 2 or not features.is_floating_point():
            raise ValueError(
                f"{where}: features must be floating, [n, d] with n of 2 or more "
                f"(got {features.dtype}{list(features.shape)})"
            )
        features = features.detach().double()
        if not bool(features.isfinite().all()):
            raise ValueError(f"{where}: features must be finite (got Inf or NaN)")
        return cls(features.mean(0), torch.cov(features.T).reshape(2 * features.shape[1:]))


def frechet_distance(a: Tensor | Gaussian, b: Tensor | Gaussian) -> float:
    """Squared Frechet distance of two normal distributions.

    ``|m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2))`` (Heusel et al., "GANs Trained by a Two
    Time-Scale Update Rule Converge to a Local Nash Equilibrium", NeurIPS 2017, equation 6, after
    Dowson and Landau, 1982). The square root is taken of ``C_a^(1/2) C_b C_a^(1/2)``, which is
    symmetric and has the same trace: no complex numbers, and singular covariances, as of fewer
    images than features, are no special case.

    On features of Inception v3 this is the FID. Those weights are not here; torchmetrics (with
    torch-fidelity) computes the FID where they are: ``FrechetInceptionDistance(feature=2048,
    feature_extractor_weights_path=path)``. Distances compare among equal features and equal numbers
    of images only: few images make it larger.

    Args:
        a: Features [n, d], or the :class:`Gaussian` of some.
        b: The same.

    Raises:
        ValueError: different d or devices, or no features.

    Example:
        >>> real = Gaussian.of(features(images))
        >>> frechet_distance(features(generator(latent)), real)
    """
    first, second = (g if isinstance(g, Gaussian) else Gaussian.of(g) for g in (a, b))
    if first.mean.shape != second.mean.shape:
        raise ValueError(
            "frechet_distance: both need equally many features "
            f"(got {first.mean.numel()} and {second.mean.numel()})"
        )
    if first.mean.device != second.mean.device:
        raise ValueError(
            "frechet_distance: both must be on one device "
            f"(got {first.mean.device} and {second.mean.device})"
        )
    values, vectors = torch.linalg.eigh(first.covariance)
    root = (vectors * values.clamp(min=0.0).sqrt()) @ vectors.T
    product = torch.linalg.eigvalsh(root @ second.covariance @ root)
    traces = first.covariance.trace() + second.covariance.trace()
    apart = (first.mean - second.mean).square().sum()
    distance = apart + traces - 2.0 * product.clamp(min=0.0).sqrt().sum()
    return max(0.0, float(distance))  # equal distributions may round to below zero
