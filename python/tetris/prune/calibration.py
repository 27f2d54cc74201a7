"""Running a model on calibration batches, to see how large the inputs of its layers are."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import describe


def check_batches(where: str, batches: object) -> Iterable[Any] | None:
    """Batches that can be gone through more than once, or None.

    Raises:
        TypeError: something else.
    """
    if batches is None:
        return None
    if isinstance(batches, (Tensor, Mapping, str)) or not isinstance(batches, Iterable):
        raise TypeError(
            f"{where}: calibration must be a list or a DataLoader of batches, [x] for one batch x "
            f"(got {describe(batches)})"
        )
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{where}: calibration batches are gone through several times, an iterator only once "
            f"(got {describe(batches)}); pass the DataLoader itself, or list(batches)"
        )
    return batches


@torch.no_grad()
def input_rms(
    where: str, model: nn.Module, layers: Mapping[str, nn.Module], batches: Iterable[Any]
) -> dict[str, Tensor]:
    """Root mean square of each input channel of some layers, in eval mode.

    Args:
        where: Function named in messages.
        model: The model, called with each batch.
        layers: name -> linear layer or convolution of it.
        batches: Inputs: tensors; tuples or lists, whose first entry is the input, as of a
            DataLoader with targets; or mappings of keyword arguments.

    Returns:
        name -> float32[in], over all samples and positions.

    Raises:
        ValueError: no batches; a layer that none of them reaches; inputs that are not finite.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def watch(name: str, layer: Any) -> Any:
        axis = -1 if not hasattr(layer, "kernel_size") else -1 - len(layer.kernel_size)

        def hook(module: nn.Module, args: tuple[Tensor, ...]) -> None:
            x = args[0].detach().movedim(axis, -1).flatten(0, -2)
            squares = x.double().square().sum(0)
            sums[name] = sums[name] + squares if name in sums else squares
            counts[name] += len(x)

        return layer.register_forward_pre_hook(hook)

    handles = [watch(name, layer) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        number = 0
        for number, batch in enumerate(batches, start=1):
            _call(model, batch)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    if not number:
        raise ValueError(f"{where}: calibration has no batches; pass some inputs of the model")
    for name in layers:
        if not counts[name]:
            raise ValueError(
                f"{where}: no calibration batch reaches layer {name!r}; exclude it, or pass inputs "
                "that use it"
            )
        if not bool(sums[name].isfinite().all()):
            raise ValueError(
                f"{where}: the inputs of layer {name!r} are not finite for the calibration batches"
            )
    return {name: (sums[name] / counts[name]).sqrt().float() for name in layers}


def _call(model: nn.Module, batch: Any) -> None:
    if isinstance(batch, Mapping):
        model(**batch)
    else:
        model(batch[0] if isinstance(batch, (tuple, list)) else batch)


