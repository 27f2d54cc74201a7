"""Which sparse layer stands for which dense one."""

from __future__ import annotations

from torch import Tensor, nn

from .base import SparseLayer
from .conv import SparseConv1d, SparseConv2d
from .conv_transpose import SparseConvTranspose2d
from .linear import SparseLinear

SPARSE_TYPES: tuple[type[SparseLayer], ...] = (
    SparseLinear,
    SparseConv1d,
    SparseConv2d,
    SparseConvTranspose2d,
)
DenseLayer = nn.Linear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d
"""A layer that has a sparse counterpart."""
DENSE_TYPES: tuple[type[nn.Module], ...] = tuple(t.dense_type for t in SPARSE_TYPES)


def sparse_type(module: DenseLayer) -> type[SparseLayer]:
    """The sparse layer that stands for a dense one."""
    return next(t for t in SPARSE_TYPES if isinstance(module, t.dense_type))


def groups_of(module: DenseLayer) -> int:
    """Groups of a convolution, 1 of a linear layer."""
    return 1 if isinstance(module, nn.Linear) else module.groups


def oriented(module: DenseLayer, weight: Tensor) -> Tensor:
    """A tensor shaped like a dense layer's weight, as ``[out, in / groups, ...]``, or back."""
    return sparse_type(module).oriented(weight, groups_of(module))
