"""How much a prior lets the weights of a layer move: shrinkage factors, effective parameters."""

from __future__ import annotations

import torch
from torch import Tensor

from .posterior import Posterior

LOGISTIC_VARIANCE = 4.0  # of classification, in place of the noise's; Piironen and Vehtari, 3.4


def kappa(posterior: Posterior, layer: int = 0) -> Tensor:
    """Shrinkage factors ``kappa = 1 / (1 + N sd^2 / s^2)`` of a layer's weights.

    sd is a weight's prior standard deviation given its scales, s the noise's, N the number of data
    points, inputs standardized. 1 is shrunk to zero, 0 left to the data. (Piironen and Vehtari,
    2017, equation 2.6; exact for linear regression, an indication in a network. For classes s^2 is
    4, the inverse of a logistic likelihood's largest curvature.)

    Args:
        posterior: Draws.
        layer: Index of the weight matrix.

    Returns:
        [chains, draws, out, in], in [0, 1].

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> kappa(posterior).mean((0, 1)).shape             # of each weight of the first layer
        torch.Size([16, 8])
    """
    network, theta = posterior.network, posterior.theta
    if not 0 <= layer < network.layers:
        raise ValueError(f"kappa: layer must be from 0 to {network.layers - 1} (got {layer})")
    log_sd = torch.as_tensor(network.log_sd(theta, layer), dtype=theta.dtype)
    noise = posterior.weights().noise
    log_noise = torch.tensor(LOGISTIC_VARIANCE).log() / 2 if noise is None else noise.log()
    log_noise = log_noise.to(theta.dtype)
    if noise is not None:
        log_noise = log_noise[..., None, None]
    ratio = torch.log(torch.tensor(float(network.samples))) + 2 * (log_sd - log_noise)
    return torch.sigmoid(-ratio).expand(*theta.shape[:-1], *network.shape(layer))


def effective_parameters(posterior: Posterior, layer: int = 0) -> Tensor:
    """Effective number of weights of a layer: ``m_eff``, the sum of ``1 - kappa``.

    (Piironen and Vehtari, 2017, section 3; see :func:`kappa`.)

    Args:
        posterior: Draws.
        layer: Index of the weight matrix.

    Returns:
        [chains, draws], from 0 to the number of weights.

    Raises:
        ValueError: there is no such layer.

    Example:
        >>> count = effective_parameters(posterior)
        >>> bool(count.mean() < 16 * 8)
        True
    """
    return (1 - kappa(posterior, layer)).sum((-1, -2))
