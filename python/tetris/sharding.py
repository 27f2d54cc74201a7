"""Parameters that FSDP2 (``torch.distributed.fsdp.fully_shard``) has dealt out to processes.

Such a Parameter is a DTensor of the whole shape, and each process holds a part of it. While a layer
computes FSDP2 puts whole tensors in its place, so sparse layers and masks need to know nothing. It
counts on the sizes that it saw, so what changes sizes comes before ``fully_shard``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is one of which this process holds a part."""
    # Nobody has made one where this is not imported, and importing it takes a while.
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(tensor, module.DTensor)


def check_whole(where: str, tensors: Iterable[object], hint: str) -> None:
    """Raise ValueError if one of the tensors is sharded; ``hint`` says what to do about it."""
    if any(map(is_sharded, tensors)):
        raise ValueError(
            f"{where}: the parameters are sharded (FSDP2's fully_shard), and this needs whole "
            f"ones; {hint}"
        )


def check_unwrapped(where: str, model: nn.Module) -> None:
    """Raise TypeError if FSDP1 has flattened parameters of a model, whose layers have none then."""
    kind = _fsdp("FullyShardedDataParallel")
    if any(isinstance(module, kind) for module in model.modules()):
        raise TypeError(
            f"{where}: FullyShardedDataParallel (FSDP1) flattens parameters, so layers have no "
            "weights of their own; use FSDP2, torch.distributed.fsdp.fully_shard, after this call"
        )


@torch.no_grad()
def fill(tensor: Tensor, where: Tensor, value: float) -> None:
    """``tensor.masked_fill_(where, value)``, of the part that this process holds if it is sharded.

    Args:
        tensor: Whole or sharded.
        where: Whole bool tensor of its shape, the same in all processes.
        value: What to write.
    """
    if is_sharded(tensor):
        tensor.to_local().masked_fill_(_own(where, tensor), value)  # type: ignore[attr-defined]
    else:
        tensor.masked_fill_(where, value)


@contextmanager
def gathered(model: nn.Module) -> Iterator[None]:
    """Whole parameters in the place of the sharded ones of a model meanwhile, to read."""
    kind = _fsdp("FSDPModule")
    sharded: list[Any] = [module for module in model.modules() if isinstance(module, kind)]
    try:
        for module in sharded:
            module.unshard()
        yield
    finally:
        for module in sharded:
            module.reshard()


def _fsdp(name: str) -> Any:
    """A class of FSDP for ``isinstance``; none where FSDP has not been imported."""
    return getattr(sys.modules.get("torch.distributed.fsdp"), name, ())


def _own(whole: Tensor, like: Any) -> Tensor:
    """The part of a whole tensor that this process holds of a sharded one."""
    part = whole
    for axis, placement in enumerate(like.placements):
        if placement.is_shard():
            size = part.size(placement.dim)
            step = -(-size // like.device_mesh.size(axis))
            first = min(like.device_mesh.get_local_rank(axis) * step, size)
            part = part.narrow(placement.dim, first, min(step, size - first))
    if part.shape != like.to_local().shape:
        raise ValueError(
            f"tetris: a parameter is sharded as {like.placements}, of which this process should "
            f"hold {list(part.shape)} (it holds {list(like.to_local().shape)}); shard by "
            "fully_shard along one mesh dimension, and replicate along others"
        )
    return part
