"""How a weight is cut into blocks: sizes, and the way between a weight and its blocks.

A linear weight ``[out, in]`` is a convolution weight ``[out, in / groups, *kernel]`` with one
kernel position and one group, so there is one way for all. Which blocks are stored is the layout's
business, see :class:`tetris.BlockLayout`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from .checks import check_groups, check_tensor

#: Elements from which copies of a whole weight are avoided.
_LARGE = 1 << 20


def removed_count(sparsity: float, count: int) -> int:
    """How many of so many blocks (channels, weights) a sparsity removes: ``floor(sparsity * n)``.

    As written, not as rounded: 0.29 * 100 is 28.999999999999996 in floating point, and 29 go.
    """
    return math.floor(sparsity * count + 1e-9)


@dataclass(frozen=True)
class Blocking:
    """Sizes of a weight and of its blocks.

    Attributes:
        block: (bo, bi).
        out_features: Outputs, of all groups.
        in_features: Inputs, of all groups.
        kernel_size: None for a matrix, (k,) or (kh, kw) for a convolution.
        groups: Groups of a convolution.
    """

    block: tuple[int, int]
    out_features: int
    in_features: int
    kernel_size: tuple[int, ...] | None = None
    groups: int = 1

    @staticmethod
    def of(
        where: str, name: str, weight: Tensor, block: tuple[int, int], groups: int = 1
    ) -> Blocking:
        """Sizes of a weight, or of a mask of one, which is checked to be one."""
        check_tensor(where, name, weight)
        if weight.dim() not in (2, 3, 4) or weight.numel() == 0:
            raise ValueError(
                f"{where}: {name} must be [out, in], or [out, in/groups, k] or "
                "[out, in/groups, kh, kw] of a convolution, and not empty "
                f"(got shape {list(weight.shape)})"
            )
        out_features, inputs, *kernel = weight.shape
        check_groups(where, groups, out_features, None, bool(kernel))
        return Blocking(block, out_features, inputs * groups, tuple(kernel) or None, groups)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in / groups, *kernel)."""
        return (self.out_features, self.in_features // self.groups, *(self.kernel_size or ()))

    @property
    def positions(self) -> int:
        """Kernel positions; 1 for a matrix."""
        return math.prod(self.kernel_size or ())

    @property
    def group_shape(self) -> tuple[int, int]:
        """(out / groups, in / groups)."""
        return self.out_features // self.groups, self.in_features // self.groups

    @property
    def group_grid(self) -> tuple[int, int]:
        """Block rows, and column groups at one kernel position, of one group."""
        (out, in_), (bo, bi) = self.group_shape, self.block
        return math.ceil(out / bo), math.ceil(in_ / bi)

    @property
    def grid(self) -> tuple[int, int]:
        """(G, C): block rows of all groups, and column groups of all kernel positions."""
        rows, columns = self.group_grid
        return self.groups * rows, self.positions * columns

    def ordered(
        self, weight: Tensor, row_perm: Tensor | None = None, col_perm: Tensor | None = None
    ) -> Tensor:
        """[groups, out / groups, positions, in / groups] in packed order of a weight."""
        out, in_ = self.group_shape
        if row_perm is not None:
            weight = weight.index_select(0, row_perm.to(weight.device))
        matrix = weight.reshape(self.groups, out, in_, self.positions).transpose(2, 3)
        return matrix if col_perm is None else self._gather(matrix, col_perm.to(weight.device))

    def split(
        self, weight: Tensor, row_perm: Tensor | None = None, col_perm: Tensor | None = None
    ) -> Tensor:
        """[G, bo, C, bi], blocks in packed order of a weight; padded with zeros."""
        (rows, columns), (bo, bi) = self.group_grid, self.block
        out, in_ = self.group_shape
        matrix = self.ordered(weight, row_perm, col_perm)
        if (rows * bo, columns * bi) != (out, in_):
            matrix = F.pad(matrix, (0, columns * bi - in_, 0, 0, 0, rows * bo - out))
        blocks = matrix.reshape(self.groups, rows, bo, self.positions, columns, bi)
        return blocks.reshape(self.groups * rows, bo, self.positions * columns, bi)

    def join(
        self, blocks: Tensor, row_perm: Tensor | None = None, col_perm: Tensor | None = None
    ) -> Tensor:
        """Weight in original order of blocks [G, bo, C, bi]: the inverse of :meth:`split`."""
        (rows, columns), (bo, bi) = self.group_grid, self.block
        out, in_ = self.group_shape
        matrix = blocks.reshape(self.groups, rows * bo, self.positions, columns * bi)
        matrix = matrix[:, :out, :, :in_]
        if col_perm is not None:
            matrix = self._gather(matrix, inverse_permutation(col_perm))
        weight = matrix.transpose(2, 3).reshape(self.weight_shape)
        if row_perm is not None:
            weight = weight.index_select(0, inverse_permutation(row_perm))
        return weight.contiguous()

    def in_one_run(self, weight: Tensor) -> bool:
        """Whether :meth:`runs` leaves a weight in one piece: a small one, or one in groups."""
        return self.groups > 1 or weight.numel() < _LARGE

    def runs(
        self, weight: Tensor, row_perm: Tensor | None = None
    ) -> Iterator[tuple[Blocking, Tensor]]:
        """A weight in runs of whole block rows, rows in packed order, with the sizes of each run.

        What is then done to a run copies that run only: a sixteenth of a large weight.
        """
        bo, rows = self.block[0], self.group_grid[0]
        count = 1 if self.in_one_run(weight) else min(16, rows)
        height = self.out_features if count == 1 else -(-rows // count) * bo
        for first in range(0, self.out_features, height):
            last = min(first + height, self.out_features)
            if row_perm is None:
                own = weight[first:last]
            else:
                own = weight.index_select(0, row_perm[first:last].to(weight.device))
            yield replace(self, out_features=last - first), own

    def sums(
        self, saliency: Tensor, row_perm: Tensor | None = None, col_perm: Tensor | None = None
    ) -> Tensor:
        """[G, C], saliency of each block in packed order."""
        return torch.cat(
            [
                sizes.split(own, None, col_perm).sum(dim=(1, 3))
                for sizes, own in self.runs(saliency, row_perm)
            ]
        )

    def extents(self) -> tuple[Tensor, Tensor]:
        """int64[G] and int64[C], rows and columns of each block that lie in the weight."""
        own = []
        for size, block, count, repeat in zip(
            self.group_shape,
            self.block,
            self.group_grid,
            (self.groups, self.positions),
            strict=True,
        ):
            inside = torch.full((count,), block)
            inside[-1] = size - (count - 1) * block
            own.append(inside.repeat(repeat))
        return own[0], own[1]

    def _gather(self, matrix: Tensor, perm: Tensor) -> Tensor:
        """Columns of [groups, out, positions, in], each group by its part of a permutation."""
        if self.groups == 1:
            return matrix.index_select(3, perm)
        in_ = self.in_features // self.groups
        own = (perm.long() % in_).view(self.groups, 1, 1, in_)  # groups keep to themselves
        return matrix.gather(3, own.expand(matrix.shape))

    def __str__(self) -> str:
        text = "x".join(map(str, self.weight_shape))
        return text if self.groups == 1 else f"{text} in {self.groups} groups"


def inverse_permutation(perm: Tensor) -> Tensor:
    """int64[n] with ``inverse[perm[s]] = s``."""
    inverse = torch.empty(perm.numel(), dtype=torch.int64, device=perm.device)
    inverse[perm.long()] = torch.arange(perm.numel(), device=perm.device)
    return inverse


def swap_channels(weight: Tensor, groups: int) -> Tensor:
    """``[in, out / groups, ...]`` as ``[out, in / groups, ...]``, for transposed convolutions.

    Its own inverse; differentiable.
    """
    first, second = weight.shape[0] // groups, weight.shape[1]
    parts = weight.reshape(groups, first, second, *weight.shape[2:]).transpose(1, 2)
    return parts.reshape(groups * second, first, *weight.shape[2:])
