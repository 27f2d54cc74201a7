"""Two generators under one judge: the same mode, the same random numbers, losses side by side."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping, Sequence
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
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            # Its own statistics are those of eval mode still; in training mode batches do not
            # reach them. A momentum of 0 let NaN through: 0 * NaN is one.
            module.track_running_stats = False
        elif isinstance(module, nn.modules.batchnorm._NormBase):
            module.momentum = 0.0  # instance norm, which asks the flag in eval mode too
    return copied


class Judge:
    """The discriminator while it judges: remembers its scores, and judges real images once.

    Everything but the call is that of the discriminator: its layers, its methods.
    """

    def __init__(self, discriminator: nn.Module, real: tuple[Tensor, ...]) -> None:
        self.discriminator = discriminator
        self.real = {id(tensor) for tensor in real}
        self.scores: list[Tensor] = []
        self._known: dict[tuple[int, ...], Any] = {}

    def __call__(self, *images: Any, **more: Any) -> Any:
        """What the discriminator returns."""
        key = tuple(map(id, images))
        both = not more and self.real.issuperset(key)  # the same for both generators
        judged = self._known.get(key) if both else None
        if judged is None:
            judged = self.discriminator(*images, **more)
            if both:
                self._known[key] = judged
        if (scores := _first_tensor(judged)) is not None:
            self.scores.append(scores.detach())
        return judged

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["discriminator"], name)

    def __getitem__(self, index: Any) -> Any:
        return self.discriminator[index]  # type: ignore[index]


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


def _first_tensor(judged: object) -> Tensor | None:
    """The scores, by convention the first of several outputs."""
    if isinstance(judged, Mapping):
        judged = list(judged.values())
    if isinstance(judged, Sequence) and judged and not isinstance(judged, str):
        return _first_tensor(judged[0])
    return judged if isinstance(judged, Tensor) else None
