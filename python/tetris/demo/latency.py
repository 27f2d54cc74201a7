"""Milliseconds per batch of whole networks, dense and sparse in turns."""

import numpy as np
import torch
from torch import Tensor, nn

from ..nn import SparseLayer
from ..timing import Plan, interleave
from .networks import Calls, Network


@torch.inference_mode()
def measure(
    network: Network, dense: nn.Module, models: dict[str, nn.Module], x: Tensor
) -> tuple[str, dict[str, float]]:
    """Median milliseconds per call of every model, run in the fastest way there is for it.

    Args:
        network: What the models are.
        dense: The full one, in eval mode like the others.
        models: Others by name; one without sparse layers is run in the fastest dense way too.
        x: A batch.

    Returns:
        The name of the fastest dense library, and milliseconds by name, ``"dense"`` included.
    """
    calls: Calls = {}
    groups: dict[str, list[str]] = {}
    for name, model in {"dense": dense, **models}.items():
        sparse = any(isinstance(m, SparseLayer) for m in model.modules())
        found = network.sparse_calls(model, x) if sparse else network.dense_calls(model, x)
        named = {f"{name}/{way}": call for way, call in found.items()}
        calls |= named
        groups[name] = list(named)
    times = interleave(calls, Plan(budget_s=8.0, min_rounds=5, max_rounds=11))
    medians = {name: 1e3 * float(np.median(t)) for name, t in times.items()}
    best = {name: min(members, key=medians.__getitem__) for name, members in groups.items()}
    return best["dense"].split("/")[1], {name: medians[best[name]] for name in groups}
