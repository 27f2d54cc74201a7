"""How large the inputs of layers are, and of which shape, by running the model."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..nn.base import SparseLayer
from ..nn.kinds import DenseLayer, LinearLayer
from .batches import Batch, Batches, read_batches, undisturbed


@torch.no_grad()
def show_inputs(
    where: str,
    model: nn.Module,
    modules: Mapping[str, nn.Module],
    batches: Iterable[Batch],
    show: Callable[[str, Tensor], None],
) -> None:
    """Pass batches through a model, and call ``show(name, x)`` with each input of some modules.

    ``where`` is named in messages.
    """

    def watch(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: Any, kwargs: dict[str, Any], outputs: Any) -> None:
            show(name, (args[0] if args else next(iter(kwargs.values()))).detach())

        return hook

    handles = [m.register_forward_hook(watch(n), with_kwargs=True) for n, m in modules.items()]
    try:
        for batch in batches:
            batch.outputs(where, model)
    finally:
        for handle in handles:
            handle.remove()


def input_squares(
    where: str,
    model: nn.Module,
    layers: Mapping[str, DenseLayer | SparseLayer],
    batches: Batches,
    advance: Callable[[], object] = lambda: None,
) -> dict[str, tuple[Tensor, int]]:
    """Sum of the squares of each input channel of some layers.

    Args:
        where: Function named in messages.
        model: The model that batches go through, in the mode it is in.
        layers: name -> layer of it.
        batches: As for :class:`tetris.prune.Taylor`; targets are not looked at.
        advance: Called after each batch.

    Returns:
        name -> ([in] in float32 at least, samples times positions that the sum is over).

    Raises:
        ValueError: no batch; a layer that none of them passes through.
    """
    sums: dict[str, Tensor] = {}
    counts = dict.fromkeys(layers, 0)

    def add(name: str, x: Tensor) -> None:
        x = x.to(torch.promote_types(x.dtype, torch.float32))  # squares of half precision overflow
        channels = x.movedim(x.dim() - 1 - spatial_dims(layers[name]), 0).flatten(1)
        squares = channels.square().sum(1)
        sums[name] = sums[name].add_(squares) if name in sums else squares
        counts[name] += channels.shape[1]

    def counted() -> Iterator[Batch]:
        for batch in read_batches(where, batches):
            yield batch
            advance()

    show_inputs(where, model, layers, counted(), add)
    if absent := [name for name in layers if name not in sums]:
        raise ValueError(
            f"{where}: no batch passed through layer {absent[0]!r}; exclude it, or pass batches "
            "that use it (torch.compile drops the hook that sees it: compile later)"
        )
    return {name: (sums[name], counts[name]) for name in layers}


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
        ValueError: as :func:`input_squares`; inputs that are not finite.
    """
    with undisturbed(model):
        found = input_squares(where, model, layers, batches)
    for name, (squares, _) in found.items():
        if not bool(squares.isfinite().all()):
            raise ValueError(f"{where}: the batches give layer {name!r} inputs that are not finite")
    return {name: (squares / count).sqrt().float() for name, (squares, count) in found.items()}


def spatial_dims(layer: nn.Module) -> int:
    """Dimensions behind the channels of an input."""
    dense = layer.dense_type if isinstance(layer, SparseLayer) else type(layer)
    if issubclass(dense, LinearLayer):
        return 0
    return 1 if issubclass(dense, nn.Conv1d) else 2
