"""Two generators under one judge: the same mode, the same random numbers, losses side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def relative_difference(
    original: Tensor, pruned: Tensor, eps: float = 1e-3, per_sample: bool = False
) -> Tensor:
    """R(a, b) = |a - b| / (|a| + eps), a scalar.

    Args:
        original: Loss per sample, [N], or a scalar: a, without gradient.
        pruned: The same of the pruned generator: b.
        eps: Keeps the quotient finite.
        per_sample: ``mean|a_i - b_i| / (mean|a_i| + eps)``, not of the means.
    """
    a, b = original.detach(), pruned
    if not per_sample:
        a, b = a.mean(), b.mean()
    return (a - b).abs().mean() / (a.abs().mean() + eps)


def frozen_copy(generator: nn.Module) -> nn.Module:
    """A copy that does not learn, and whose batch norm does not."""
    copied = copy.deepcopy(generator).requires_grad_(False)
    for module in copied.modules():
        if isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = 0.0  # in training mode, statistics of the batch do not move its own
    return copied


class Judge:
    """The discriminator while it judges: remembers its scores, and judges real images once."""

    def __init__(self, discriminator: nn.Module, real: tuple[Tensor, ...]) -> None:
        self.discriminator = discriminator
        self.real = {id(tensor) for tensor in real}
        self.scores: list[Tensor] = []
        self._known: dict[tuple[int, ...], Any] = {}

    def __call__(self, *images: Tensor) -> Any:
        """What the discriminator returns."""
        key = tuple(map(id, images))
        judged = self._known.get(key)
        if judged is None:
            judged = self.discriminator(*images)
            if self.real.issuperset(key):
                self._known[key] = judged
        self.scores.append((judged[0] if isinstance(judged, tuple) else judged).detach())
        return judged


@contextmanager
def judging(discriminator: nn.Module) -> Iterator[None]:
    """In eval mode, so that spectral norm and batch norm stay as they are, and without gradients.

    Modes are set as attributes: ``train()`` of some modules does more.
    """
    modes = [(module, module.training) for module in discriminator.modules()]
    learning = [p for p in discriminator.parameters() if p.requires_grad]
    try:
        for module, _ in modes:
            module.training = False
        for parameter in learning:
            parameter.requires_grad_(False)
        yield
    finally:
        for module, mode in modes:
            module.training = mode
        for parameter in learning:
            parameter.requires_grad_(True)


def same_mode(copied: nn.Module, model: nn.Module) -> None:
    """Put the copy in the modes of the model, whose layers may have become sparse ones."""
    modes = {name: module.training for name, module in model.named_modules()}
    for name, module in copied.named_modules():
        module.training = modes.get(name, model.training)
