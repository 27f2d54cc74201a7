"""Which learning rates optimizers stepped with."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle


class LearningRates:
    """Sums up the learning rates of the steps that optimizers take, by Parameter.

    A scheduler may have changed the rate by the time somebody asks: after the last step it is
    zero. So each optimizer tells when it steps; a step that a GradScaler skips does not count.
    """

    def __init__(self) -> None:
        self._taken: dict[nn.Parameter, float] = {}
        self._hooks: list[tuple[Optimizer, RemovableHandle]] = []

    def __getstate__(self) -> dict[str, Any]:
        # A copy of an optimizer has no hooks.
        return {"taken": self._taken, "optimizers": [optimizer for optimizer, _ in self._hooks]}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._taken, self._hooks = state["taken"], []
        self.follow(state["optimizers"])

    def follow(self, optimizers: Iterable[Optimizer]) -> None:
        """Listen to these optimizers too."""
        for optimizer in optimizers:
            if all(optimizer is not known for known, _ in self._hooks):
                hook = optimizer.register_step_post_hook(self._record)
                self._hooks.append((optimizer, hook))

    def take(self, parameter: nn.Parameter) -> float:
        """Sum since the last time it was asked for; 0 if there was no step."""
        return self._taken.pop(parameter, 0.0)

    def stop(self) -> None:
        """Listen no longer."""
        for _, hook in self._hooks:
            hook.remove()
        self._hooks, self._taken = [], {}

    def _record(self, optimizer: Optimizer, args: object, kwargs: object) -> None:
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                taken = self._taken.get(parameter, 0.0)
                self._taken[parameter] = taken + float(group["lr"])
