"""Weights of one or many networks of equal shape, and what they say about data."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch import Tensor

Task = Literal["regression", "classification"]
Activation = Literal["tanh", "relu"]


@dataclass(frozen=True)
class Weights:
    """Weights and biases, with leading dimensions for draws.

    Attributes:
        layers: Pairs ([..., out, in], [..., out]).
        noise: Standard deviation [...] of regression's noise, or None.
        task: What outputs stand for.
        activation: Between layers.

    Example:
        >>> theta = network.start(torch.Generator().manual_seed(0), 5)
        >>> weights = network.weights(theta)                # of five networks
        >>> weights(x.double()).shape                       # [..., N, out]
        torch.Size([5, 40, 1])
    """

    layers: tuple[tuple[Tensor, Tensor], ...]
    noise: Tensor | None
    task: Task
    activation: Activation

    def __call__(self, x: Tensor) -> Tensor:
        """Outputs [..., N, out] of x [..., N, in]."""
        for index, (weight, bias) in enumerate(self.layers):
            if index:
                x = torch.tanh(x) if self.activation == "tanh" else torch.relu(x)
            x = x @ weight.transpose(-1, -2) + bias.unsqueeze(-2)
        return x

    def log_likelihood(self, outputs: Tensor, y: Tensor) -> Tensor:
        """Log likelihood [..., N] of targets.

        Args:
            outputs: [..., N, out], of :meth:`__call__`.
            y: int64[..., N] classes, or numbers: [..., N] of a single output, else
                [..., N, out].
        """
        if self.task == "classification":
            logs = outputs.log_softmax(-1)
            y = y.expand(logs.shape[:-1]).unsqueeze(-1)
            return logs.gather(-1, y).squeeze(-1)
        assert self.noise is not None
        noise = self.noise[..., None, None]
        error = (targets(y, outputs.shape[-1]) - outputs) / noise
        return (-0.5 * error.square() - noise.log() - 0.5 * math.log(2 * math.pi)).sum(-1)

    def flat(self) -> Weights:
        """The same with one leading dimension."""
        layers = tuple(
            (w.reshape(-1, *w.shape[-2:]), b.reshape(-1, b.shape[-1])) for w, b in self.layers
        )
        return replace(
            self, layers=layers, noise=None if self.noise is None else self.noise.reshape(-1)
        )

    def __getitem__(self, index: int | slice | Tensor) -> Weights:
        """Of the first dimension."""
        layers = tuple((w[index], b[index]) for w, b in self.layers)
        return replace(self, layers=layers, noise=None if self.noise is None else self.noise[index])

    def mean(self) -> Weights:
        """Mean over all leading dimensions."""
        flat = self.flat()
        layers = tuple((w.mean(0), b.mean(0)) for w, b in flat.layers)
        return replace(flat, layers=layers, noise=None if flat.noise is None else flat.noise.mean())

    def with_weight(self, index: int, weight: Tensor) -> Weights:
        """The same with another weight in one layer."""
        layers = list(self.layers)
        layers[index] = (weight, layers[index][1])
        return replace(self, layers=tuple(layers))

    def to(self, dtype: torch.dtype) -> Weights:
        """The same numbers in another type."""
        layers = tuple((w.to(dtype), b.to(dtype)) for w, b in self.layers)
        return replace(
            self, layers=layers, noise=None if self.noise is None else self.noise.to(dtype)
        )


def targets(y: Tensor, outputs: int) -> Tensor:
    """[..., N, outputs] of a regression's targets, which of one output are [..., N]."""
    return y if outputs > 1 else y.unsqueeze(-1)
