"""Small regressions and classifications for Bayesian networks, one split per seed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy.stats import norm
from sklearn.datasets import load_breast_cancer, make_friedman1
from torch import Tensor

TEST_POINTS = 500
# Spearman correlations of the authors' correlated Friedman inputs (notebook Friedman_correlated):
# groups, then pairs; not all can hold together, so the nearest possible ones are used.
_GROUPS = (
    (range(3), range(3), 0.8),
    (range(5, 10), range(5, 10), -0.5),
    (range(5), range(5, 10), 0.15),
)
_PAIRS = ((0, 9, 0.4), (2, 7, 0.9), (3, 4, -0.9), (1, 6, -0.9))


@dataclass(frozen=True)
class Points:
    """Data sets of several seeds, standardized by their training points.

    Attributes:
        x: float64[seeds, N, in].
        y: [seeds, N].
        test_x: float64[seeds, M, in].
        test_y: [seeds, M].
    """

    x: Tensor
    y: Tensor
    test_x: Tensor
    test_y: Tensor


def friedman(
    points: int, seeds: Sequence[int], *, correlated: bool = False, standardize: bool = True
) -> Points:
    """Friedman #1, ten inputs of which five matter, noise of standard deviation 1.

    The target is standardized, so errors are in units of its deviation, of which noise alone makes
    about .2; inputs are, too, unless they are to stay in [0, 1] as the authors'.
    """
    xs, ys = [], []
    for seed in seeds:
        x, y = make_friedman1(points + TEST_POINTS, 10, noise=1.0, random_state=seed)
        if correlated:
            x = correlated_uniform(len(x), seed)
            y = friedman_function(x) + np.random.default_rng(seed + 1000).normal(size=len(x))
        xs.append(torch.from_numpy(x))
        ys.append(torch.from_numpy(y))
    x, y = torch.stack(xs), torch.stack(ys)
    own = y[:, :points]
    y = (y - own.mean(1, keepdim=True)) / own.std(1, keepdim=True)
    if standardize:
        return _split(x, y, points)
    return Points(x[:, :points], y[:, :points], x[:, points:], y[:, points:])


def friedman_function(x: np.ndarray) -> np.ndarray:
    """Target without noise of inputs [N, >= 5] in [0, 1]."""
    waves = 10 * np.sin(np.pi * x[:, 0] * x[:, 1]) + 20 * (x[:, 2] - 0.5) ** 2
    return waves + 10 * x[:, 3] + 5 * x[:, 4]


def correlated_uniform(count: int, seed: int) -> np.ndarray:
    """Ten uniform inputs [count, 10] under a Gaussian copula; see ``_GROUPS``."""
    wanted = np.eye(10)
    for rows, columns, value in _GROUPS:
        for i in rows:
            for j in columns:
                if i != j:
                    wanted[i, j] = wanted[j, i] = value
    for i, j, value in _PAIRS:
        wanted[i, j] = wanted[j, i] = value
    normal = 2 * np.sin(np.pi * wanted / 6)  # Spearman's to Pearson's of a Gaussian
    np.fill_diagonal(normal, 1.0)
    values, vectors = np.linalg.eigh(normal)
    root = vectors * np.sqrt(values.clip(min=1e-8))
    root /= np.linalg.norm(root, axis=1, keepdims=True)  # variances of one again
    return norm.cdf(np.random.default_rng(seed).normal(size=(count, 10)) @ root.T)


def breast_cancer(points: int, seeds: Sequence[int]) -> Points:
    """Thirty measurements of 569 tumours, two classes; ``points`` of them for training."""
    data, labels = load_breast_cancer(return_X_y=True)
    orders = [np.random.default_rng(seed).permutation(len(labels)) for seed in seeds]
    x = torch.from_numpy(np.stack([data[order] for order in orders]))
    y = torch.from_numpy(np.stack([labels[order] for order in orders])).long()
    return _split(x, y, points)


def _split(x: Tensor, y: Tensor, points: int) -> Points:
    own = x[:, :points]
    x = (x - own.mean(1, keepdim=True)) / own.std(1, keepdim=True)
    return Points(x[:, :points], y[:, :points], x[:, points:], y[:, points:])
