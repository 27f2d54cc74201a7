"""What a weight is worth: one non-negative number each."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from .checks import check_tensor, describe

Importance = Literal["magnitude", "squared"] | Tensor


def saliency_of(where: str, weight: Tensor, importance: Importance | None) -> Tensor:
    """Worth of each weight, non-negative and finite, detached, on the CPU, float32.

    Args:
        where: Function named in messages.
        weight: Any shape.
        importance: ``"magnitude"`` or None, ``"squared"``, or a tensor shaped like the weight.
    """
    weight = weight.detach()
    if importance is None or (isinstance(importance, str) and importance == "magnitude"):
        saliency, name = weight.abs(), "weight"
    elif isinstance(importance, str) and importance == "squared":
        saliency, name = weight.double().square(), "the weight's square"
    elif isinstance(importance, str) or callable(importance):
        raise ValueError(
            f"{where}: importance must be 'magnitude', 'squared' or a tensor; for whole models "
            "also a function, or tetris.prune.Taylor, Fisher or ActivationNorm with batches "
            f"(got {describe(importance)})"
        )
    else:
        check_tensor(where, "importance", importance)
        if importance.shape != weight.shape:
            raise ValueError(
                f"{where}: importance must be shaped like the weight (got {list(importance.shape)} "
                f"and {list(weight.shape)})"
            )
        saliency, name = importance.detach(), "importance"
    saliency = saliency.to("cpu", torch.float32).contiguous()
    low = _check_finite(where, name, saliency)
    if low < 0:
        raise ValueError(f"{where}: importance must not be negative (got a minimum of {low:g})")
    return saliency


def saliency_or_weight(
    where: str, weight: Tensor, importance: Importance | None
) -> tuple[Tensor, bool]:
    """The same, or of ``"magnitude"`` the weight itself and True: its entries' magnitudes count.

    Such a float32 weight on the CPU is not copied: in a large model, that is the memory which
    pruning takes.
    """
    if not (importance is None or (isinstance(importance, str) and importance == "magnitude")):
        return saliency_of(where, weight, importance), False
    weight = weight.detach().to("cpu", torch.float32).contiguous()
    _check_finite(where, "weight", weight)
    return weight, True


def _check_finite(where: str, name: str, values: Tensor) -> Tensor:
    """Raise unless all are finite; the least of them."""
    low, high = values.aminmax() if values.numel() else (torch.zeros(()), torch.zeros(()))
    if not bool(low.isfinite() and high.isfinite()):  # NaN goes through to both
        count = int((~values.isfinite()).sum())
        raise ValueError(
            f"{where}: {name} must be finite in float32 (got {count} entries of NaN, infinity or "
            "more than it can hold)"
        )
    return low
