"""Milliseconds per batch of whole networks, dense and sparse in turns."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor, nn

from ..timing import Plan, interleave, prepacked_linear


def dense_calls(model: nn.Sequential, x: Tensor) -> dict[str, Callable[[], object]]:
    """The ways torch has to run a dense MLP; the fastest of them is the baseline."""
    calls: dict[str, Callable[[], object]] = {"F.linear": lambda: model(x)}
    if packed := _prepacked(model, x.shape[0]):
        calls["oneDNN"] = lambda: packed(x)
    return calls


def _prepacked(model: nn.Sequential, tokens: int) -> Callable[[Tensor], Tensor] | None:
    """The MLP on oneDNN with packed weights and ReLU fused where one follows."""
    stages = []
    for index, layer in enumerate(model):
        if isinstance(layer, nn.Linear):
            fused = index + 1 < len(model) and isinstance(model[index + 1], nn.ReLU)
            weight, bias = layer.weight.detach(), layer.bias.detach()
            stage = prepacked_linear(weight, bias, tokens, "relu" if fused else "none")
            if stage is None:
                return None
            stages.append(stage)

    def call(x: Tensor) -> Tensor:
        for stage in stages:
            x = stage(x)
        return x

    return call


@torch.inference_mode()
def measure(
    dense: nn.Sequential, models: dict[str, nn.Sequential], x: Tensor
) -> tuple[str, dict[str, float]]:
    """Median milliseconds per call of every network.

    Args:
        dense: The full network.
        models: Others by name; one without sparse layers is run in the fastest dense way too.
        x: A batch.

    Returns:
        The name of the fastest dense library, and milliseconds by name, ``"dense"`` included.
    """
    calls: dict[str, Callable[[], object]] = {}
    groups: dict[str, list[str]] = {}
    for name, model in {"dense": dense, **models}.items():
        if all(isinstance(layer, (nn.Linear, nn.ReLU)) for layer in model):
            found = {f"{name}/{way}": call for way, call in dense_calls(model, x).items()}
        else:
            found = {name: lambda model=model: model(x)}
        calls |= found
        groups[name] = list(found)
    times = interleave(calls, Plan(budget_s=8.0, min_rounds=5, max_rounds=11))
    medians = {name: 1e3 * float(np.median(t)) for name, t in times.items()}
    best = {name: min(members, key=medians.__getitem__) for name, members in groups.items()}
    return best["dense"].split("/")[1], {name: medians[best[name]] for name in groups}


def fuse_relu(model: nn.Sequential) -> nn.Sequential:
    """The same network with every ReLU that follows a sparse layer fused into it."""
    layers: list[nn.Module] = []
    for layer in model:
        last = layers[-1] if layers else None
        if isinstance(layer, nn.ReLU) and hasattr(last, "activation"):
            last.activation = "relu"  # type: ignore[union-attr]
        else:
            layers.append(layer)
    return nn.Sequential(*layers)
