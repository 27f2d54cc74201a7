"""Decisions that all processes of a distributed training take alike.

Processes of ``torchrun`` see other data each and search at other speeds, so each would remove other
blocks. Under ``torch.distributed`` the first process decides, from worth averaged over all; the
others take its layouts. Without it these functions return what they are given.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, distributed

from ..layout import BlockLayout

T = TypeVar("T")


def count() -> int:
    """Number of processes that train together; 1 without ``torch.distributed``."""
    there = distributed.is_available() and distributed.is_initialized()
    return distributed.get_world_size() if there else 1


def mean(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """Mean of a tensor over all processes, the same bits in each.

    Args:
        tensor: Of one shape in all processes.
        device: Where to reduce, one that the backend knows; None: where the tensor is.
    """
    if count() == 1:
        return tensor
    reduced = tensor.detach().to(device or tensor.device, copy=True).contiguous()
    distributed.all_reduce(reduced)
    return (reduced / count()).to(tensor.device)


def first(make: Callable[[], T]) -> T:
    """What ``make`` returns in the first process, in all of them; its exception likewise.

    ``make`` runs in the first process only. Its result is pickled: tensors should be on the CPU.
    """
    if count() == 1:
        return make()
    message: list[Any] = [None]
    if distributed.get_rank() == 0:
        try:
            message = [(make(), None)]
        except Exception as error:  # or the others would wait for a result
            message = [(None, error)]
    distributed.broadcast_object_list(message, src=0)
    result, error = message[0]
    if error is not None:
        raise error
    return result


def first_layouts(layouts: Mapping[str, BlockLayout]) -> dict[str, BlockLayout]:
    """The layouts of the first process, each on the device of this process's own."""
    if count() == 1:
        return dict(layouts)
    sent = first(lambda: {name: layout.to("cpu") for name, layout in layouts.items()})
    return {name: layout.to(layouts[name].device) for name, layout in sent.items()}


@torch.no_grad()
def check_same(where: str, weights: Mapping[str, Tensor]) -> None:
    """Raise ValueError, in all processes, unless these weights agree over processes."""
    if count() == 1:
        return
    for name, weight in weights.items():
        size = weight.double().abs().sum()
        own = torch.stack([weight.double().sum(), size])
        every = [torch.empty_like(own) for _ in range(count())]
        distributed.all_gather(every, own)
        # Rounding on unlike processors may differ; other weights differ by 1 / sqrt(numel).
        if any(float((other - every[0]).abs().max()) > 1e-5 * float(size) for other in every):
            raise ValueError(
                f"{where}: layer {name!r} has other weights in other processes (sums "
                f"{', '.join(f'{float(other[0]):.6g}' for other in every)}); start from the same "
                "ones: one seed, one checkpoint, or DistributedDataParallel(model) before the "
                "pruner"
            )
