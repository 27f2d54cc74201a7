"""Averages over the processes of a distributed run."""

from __future__ import annotations

import torch.distributed as dist
from torch import Tensor


def average(tensor: Tensor) -> Tensor:
    """The tensor, averaged in place over all ranks where ``torch.distributed`` is initialised."""
    if dist.is_available() and dist.is_initialized():
        dist.all_reduce(tensor)  # sums: gloo knows no average
        tensor /= dist.get_world_size()
    return tensor
