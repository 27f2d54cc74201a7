"""Least squares on the logarithm of time: relative errors count, whatever the layer's size."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from .features import seconds

Array = NDArray[np.float64]

_WIDTH = 1.0  # of the prior, in units of log: what no measurement says stays where it was
_NOISE = 0.10  # relative error of one measurement
_ROUNDS = 200


def fit(features: Array, measured: Array, prior: Array) -> Array:
    """Coefficients of one family.

    Levenberg-Marquardt on the logarithms of the coefficients, which keeps them positive. Residuals
    beyond three times the noise count by their size, not its square, so that a disturbed
    measurement costs little. The prior is weak, and decides only what the measurements leave open.

    Args:
        features: [points, coefficients].
        measured: [points], seconds.
        prior: [coefficients], where to start.
    """
    start = np.log(prior)
    log = start.copy()

    def residuals(at: Array) -> Array:
        error = (np.log(seconds(features, np.exp(at))) - np.log(measured)) / _NOISE
        return np.concatenate([error, (at - start) / _WIDTH])

    def weights(error: Array) -> Array:
        return np.minimum(1.0, 3.0 / np.maximum(np.abs(error), 1e-12))

    def cost(error: Array) -> float:
        size = np.abs(error)
        return float(np.where(size <= 3.0, size**2, 6.0 * size - 9.0).sum())

    damping, error = 1e-2, residuals(log)
    best = cost(error)
    for _ in range(_ROUNDS):
        step = 1e-4
        jacobian = np.stack(
            [(residuals(log + step * unit) - error) / step for unit in np.eye(len(log))], axis=1
        )
        scale = weights(error)[:, None]
        normal = jacobian.T @ (scale * jacobian)
        gradient = jacobian.T @ (scale[:, 0] * error)
        change = -np.linalg.solve(normal + damping * np.diag(np.diag(normal)), gradient)
        trial = log + np.clip(change, -2.0, 2.0)
        trial_error = residuals(trial)
        now = cost(trial_error)
        if now < best:
            small = best - now < 1e-9 * best
            log, error, best, damping = trial, trial_error, now, max(damping / 3, 1e-9)
            if small:
                break
        else:
            damping *= 4
            if damping > 1e12:
                break
    return np.exp(log)
