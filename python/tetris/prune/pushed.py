"""Batch norm whose scale went into the layers behind it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..folding import BatchNorm
from ..nn.kinds import DenseLayer, groups_of, oriented

#: A channel keeps its scale where that is below this share of the largest one: the shift becomes
#: beta / gamma, which an optimizer could no longer move if it were huge.
LEAST_SCALE = 1e-3


def by_input(layer: DenseLayer, numbers: Tensor) -> Tensor:
    """Numbers [in] of a layer's inputs, shaped to multiply its weight [out, in / groups, ...]."""
    weight = oriented(layer, layer.weight)
    groups = groups_of(layer)
    rows = numbers.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).flatten(0, 1)
    return rows.reshape(*weight.shape[:2], *(1,) * (weight.dim() - 2))


class PushedScale:
    """Moves the scale of a batch norm into the layers behind it, and keeps it there.

    ``ReLU(gamma x + beta) = gamma ReLU(x + beta / gamma)`` for gamma > 0: the scale becomes 1, the
    shift beta / gamma, and the inputs of the layers behind are multiplied by gamma in their
    weights. Channels with gamma <= 0, or hardly above, stay as they are.

    Attributes:
        norm: The batch norm.
        channels: bool[C], whose scale was moved.
    """

    def __init__(self, norm: BatchNorm, layers: Sequence[tuple[DenseLayer, int]]) -> None:
        self.norm = norm
        self._layers = layers  # with the number of inputs per channel
        gamma = norm.weight.detach()
        self.channels = gamma > LEAST_SCALE * gamma.abs().max()

    @torch.no_grad()
    def push(self) -> None:
        """Move the scale; the model computes the same afterwards."""
        gamma = torch.where(self.channels, self.norm.weight, 1.0).double()
        for layer, repeat in self._layers:
            scale = by_input(layer, gamma.repeat_interleave(repeat))
            scaled = oriented(layer, oriented(layer, layer.weight).double() * scale)
            layer.weight.copy_(scaled)
        self.norm.bias.copy_(self.norm.bias.double() / gamma)
        self.hold()

    @torch.no_grad()
    def hold(self) -> None:
        """Scale 1 again in these channels, wherever an optimizer has moved it."""
        self.norm.weight.masked_fill_(self.channels, 1.0)
