"""How large the inputs of layers are, by running the model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.kinds import DenseLayer
from .batches import Batches, read_batches, undisturbed
from .providers import spatial_dims


@torch.no_grad()
def input_rms(
    where: str, model: nn.Module, layers: Mapping[str, DenseLayer], batches: Batches
) -> dict[str, Tensor]:
    """Root mean square of each input channel of some layers, in eval mode.

    Args:
        where: Function named in messages.
        model: The model that batches go through; left as it was.
        layers: name -> layer of it.
        batches: As for :class:`tetris.prune.Taylor`; targets are not looked at.

    Returns:
        name -> float32[in], over all samples and positions.

    Raises:
        ValueError: no batch; a layer that none of them passes through; inputs that are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def watch(name: str, layer: DenseLayer) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
            x = (args[0] if args else next(iter(kwargs.values()))).detach()
            samples = x.movedim(x.dim() - 1 - spatial_dims(layer), -1).flatten(0, -2)
            squares = samples.double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] += len(samples)

        return hook

    handles = [
        layer.register_forward_pre_hook(watch(name, layer), with_kwargs=True)
        for name, layer in layers.items()
    ]
    try:
        with undisturbed(model):
            for batch in read_batches(where, batches):
                batch.outputs(model)
    finally:
        for handle in handles:
            handle.remove()
    for name in layers:
        if not counts[name]:
            raise ValueError(
                f"{where}: no batch passes through layer {name!r}; exclude it, or pass batches "
                "that use it"
            )
        if not bool(sums[name].isfinite().all()):
            raise ValueError(f"{where}: the batches give layer {name!r} inputs that are not finite")
    return {name: (sums[name] / counts[name]).sqrt().float() for name in layers}
