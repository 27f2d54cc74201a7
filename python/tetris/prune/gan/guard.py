"""Watching a training of two networks, and the way back to when it was well."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

if TYPE_CHECKING:
    from ..pruner import Pruner

_SPREAD = 1e-4
"""Scores that differ by less than this share of their size say nothing. Those of a trained
discriminator differ by about their size; of one that is down to its last bias, by rounding."""

_CERTAIN = 1e-6
"""A discriminator's loss below this has no gradient to speak of."""


class DivergenceError(RuntimeError):
    """The training of a GAN has failed; everything is back at the last good state.

    Attributes:
        step: Step of the state that was brought back.
    """

    def __init__(self, message: str, step: int) -> None:
        super().__init__(message)
        self.step = step


@dataclass(frozen=True)
class Snapshot:
    """Everything that training changes, as it was after some step."""

    step: int
    pruner: Mapping[str, Any]
    networks: Sequence[Mapping[str, Any]]
    optimizers: Sequence[Mapping[str, Any]]

    @classmethod
    def of(
        cls, pruner: Pruner, networks: Iterable[nn.Module], optimizers: Iterable[Optimizer]
    ) -> Snapshot:
        """A copy of what is now."""
        return cls(
            pruner.steps,
            pruner.state_dict(),
            [{k: _copy(v) for k, v in network.state_dict().items()} for network in networks],
            [copy.deepcopy(optimizer.state_dict()) for optimizer in optimizers],
        )

    def restore(
        self, pruner: Pruner, networks: Iterable[nn.Module], optimizers: Iterable[Optimizer]
    ) -> None:
        """Bring it back. The pruner comes first: it gives the layers their shapes."""
        pruner.load_state_dict(self.pruner)
        for network, state in zip(networks, self.networks, strict=True):
            network.load_state_dict(state)
        for optimizer, state in zip(optimizers, self.optimizers, strict=True):
            optimizer.load_state_dict(copy.deepcopy(dict(state)))


@dataclass
class Watch:
    """Tells whether a discriminator still tells anything.

    Attributes:
        patience: Steps in a row before it counts as collapsed; a few happen in good training.
    """

    patience: int
    _alike: int = field(default=0, init=False)
    _certain: int = field(default=0, init=False)

    @property
    def suspicious(self) -> bool:
        """Whether the last step was such a step."""
        return self._alike > 0 or self._certain > 0

    def scores(self, scores: Sequence[Tensor]) -> str | None:
        """What is wrong with the scores of a step, real and generated images together."""
        if not scores:  # a task that asks the discriminator for something else
            return None
        joined = torch.cat([s.flatten() for s in scores]).double()
        spread = float(joined.std(correction=0)) / max(float(joined.abs().mean()), 1e-30)
        self._alike = self._alike + 1 if spread < _SPREAD else 0
        if self._alike < self.patience:
            return None
        return (
            f"the discriminator has collapsed: for {self._alike} steps it gave every image the "
            f"same score, {float(joined.mean()):.4g}"
        )

    def loss(self, value: float) -> str | None:
        """What is wrong with the discriminator's loss in its own step."""
        self._certain = self._certain + 1 if abs(value) < _CERTAIN else 0
        if self._certain < self.patience:
            return None
        return (
            f"the discriminator has collapsed: for {self._certain} steps its loss was below "
            f"{_CERTAIN:g}, so that it tells all images apart and learns nothing"
        )


@torch.no_grad()
def not_finite(network: nn.Module) -> str | None:
    """Name of a parameter or buffer with a number that is not finite, and its type if that is why.

    Adam's eps of 1e-8 is zero in float16, and its first step may divide by it.
    """
    for name, tensor in (*network.named_parameters(), *network.named_buffers()):
        # One pass and one number; a sum of finite numbers may overflow, so it only asks.
        if tensor.is_floating_point() and not math.isfinite(float(tensor.sum())):
            if not bool(tensor.isfinite().all()):
                half = tensor.dtype == torch.float16
                return f"{name} (float16: train float32 under torch.autocast)" if half else name
    return None


def _copy(value: object) -> object:
    return value.detach().clone() if isinstance(value, Tensor) else copy.deepcopy(value)
