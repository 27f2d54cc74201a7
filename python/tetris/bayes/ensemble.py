"""Several draws as one module: their predictions together are the posterior's."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..checks import describe
from .predict import Predictive
from .weights import Task


class Ensemble(nn.Module):
    """Networks of equal shape that answer together.

    Args:
        members: Networks, dense or sparse.
        task: What outputs stand for.
        noise: Standard deviations [members] of a regression's noise; NLL and calibration need it.

    Raises:
        ValueError: no network, another task, or noise of another shape.

    Example:
        >>> ensemble = pruner.ensemble(draws=16)
        >>> ensemble(x)                     # probabilities, or means, [N, out]
        >>> ensemble.predict(x).nll(y)
    """

    noise: Tensor | None

    def __init__(self, members: list[nn.Module], task: Task, noise: Tensor | None = None) -> None:
        super().__init__()
        if not members:
            raise ValueError("Ensemble: at least one network is needed (got none)")
        if task not in ("regression", "classification"):
            raise ValueError(
                f"Ensemble: task must be 'regression' or 'classification' (got {describe(task)})"
            )
        if noise is not None and noise.shape != (len(members),):
            raise ValueError(
                f"Ensemble: noise must be one number for each of {len(members)} networks "
                f"(got {list(noise.shape)})"
            )
        self.members = nn.ModuleList(members)
        self.task: Task = task
        self.register_buffer("noise", noise)

    def predict(self, x: Tensor) -> Predictive:
        """Predictive at x [N, in]."""
        return Predictive(torch.stack([m(x) for m in self.members]), self.noise, self.task)

    def forward(self, x: Tensor) -> Tensor:
        """Mean [N, out] over members: of probabilities for classification, else of outputs."""
        return self.predict(x).mean
