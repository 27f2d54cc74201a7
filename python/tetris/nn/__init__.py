"""Sparse layers: drop-in ``nn`` modules that store and compute kept blocks only."""

from .base import SparseLayer as SparseLayer
from .conv import SparseConv1d as SparseConv1d
from .conv import SparseConv2d as SparseConv2d
from .conv_transpose import SparseConvTranspose2d as SparseConvTranspose2d
from .linear import SparseLinear as SparseLinear
from .transposed import SparseTransposedLinear as SparseTransposedLinear
