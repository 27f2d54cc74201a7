"""Which sparse layer stands for which dense one."""

from __future__ import annotations

from torch import Tensor, nn

from .base import SparseLayer
from .conv import SparseConv1d, SparseConv2d
from .conv_transpose import SparseConvTranspose2d
from .linear import SparseLinear
from .transposed import SparseTransposedLinear, TransposedLinear, is_conv1d

SPARSE_TYPES: tuple[type[SparseLayer], ...] = (
    SparseLinear,
    SparseConv1d,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseTransposedLinear,
)
DenseLayer = nn.Linear | TransposedLinear | nn.Conv1d | nn.Conv2d | nn.ConvTranspose2d
"""A layer that has a sparse counterpart."""
LinearLayer = nn.Linear | TransposedLinear
"""One without a kernel, of those."""
DENSE_TYPES: tuple[type[nn.Module], ...] = tuple(t.dense_type for t in SPARSE_TYPES)


def sparse_type(module: DenseLayer) -> type[SparseLayer]:
    """The sparse layer that stands for a dense one."""
    return next(t for t in SPARSE_TYPES if isinstance(module, t.dense_type))


def exact_type(module: nn.Module) -> type[nn.Module]:
    """The class of a module, as ``types=`` arguments name it."""
    return TransposedLinear if is_conv1d(type(module)) else type(module)


def features_of(module: DenseLayer) -> tuple[int, int]:
    """Outputs and inputs, of all groups."""
    if isinstance(module, nn.Linear):
        return module.out_features, module.in_features
    if isinstance(module, TransposedLinear):
        return module.nf, module.nx
    return module.out_channels, module.in_channels


def groups_of(module: DenseLayer) -> int:
    """Groups of a convolution, 1 of a linear layer."""
    return 1 if isinstance(module, LinearLayer) else module.groups


def is_transposed(module: nn.Module) -> bool:
    """Whether a dense layer's weight has its inputs first, ``[in, out / groups, ...]``."""
    return isinstance(module, (TransposedLinear, nn.ConvTranspose2d))


def oriented(module: DenseLayer, weight: Tensor) -> Tensor:
    """A tensor shaped like a dense layer's weight, as ``[out, in / groups, ...]``, or back."""
    return sparse_type(module).oriented(weight, groups_of(module))
