"""Which of the stored blocks to keep, at the cost of what is stored."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..relayout import block_keys


@dataclass(frozen=True)
class Units:
    """The stored ones of what a layer keeps or removes as one: blocks, or several tied together.

    Attributes:
        keys: int64[n], ascending: ``block row * width + column`` of each stored unit, rows counted
            from the first one here.
        rows: Block rows.
        width: Units of a block row, stored or not.
        tied: Blocks of a unit: 1, or all kernel positions of a convolution.
        first: Block row of the layer that is the first one here.
    """

    keys: Tensor
    rows: int
    width: int
    tied: int = 1
    first: int = 0

    @classmethod
    def of(cls, layout: BlockLayout, tied: int = 1) -> Units:
        """What a layout stores; tied blocks are ``columns / tied`` apart in a block row."""
        rows, columns = layout.block_grid
        units = cls(block_keys(layout), rows, columns // tied, tied)
        if tied == 1:
            return units
        return cls(units.of_blocks(units.keys).unique(), rows, columns // tied, tied)

    @property
    def total(self) -> int:
        """Units of the layer, stored or not."""
        return self.rows * self.width

    def split(self, groups: int) -> list[Units]:
        """The units of each of as many equal groups of block rows."""
        rows = self.rows // groups
        ends = torch.arange(1, groups, device=self.keys.device) * rows * self.width
        parts = self.keys.tensor_split(torch.searchsorted(self.keys, ends).cpu())
        return [
            Units(keys - a * rows * self.width, rows, self.width, self.tied, a * rows)
            for a, keys in enumerate(parts)
        ]

    def of_blocks(self, keys: Tensor) -> Tensor:
        """Keys of the units that blocks of given keys belong to."""
        columns = self.width * self.tied
        return keys // columns * self.width + keys % columns % self.width

    def blocks(self, keys: Tensor) -> Tensor:
        """Keys of the blocks of given units in the layer, ascending."""
        columns = self.width * self.tied
        first = (keys // self.width + self.first) * columns + keys % self.width
        steps = torch.arange(0, columns, self.width, device=keys.device)
        return (first[:, None] + steps).flatten().sort().values

    def sums(self, scores: Tensor, layout: BlockLayout) -> Tensor:
        """[n], worth of each unit, from that of each stored block."""
        if self.tied == 1:
            return scores
        unit = torch.searchsorted(self.keys, self.of_blocks(block_keys(layout)))
        return scores.new_zeros(len(self.keys)).index_add_(0, unit, scores)

    def best(self, scores: Tensor) -> Tensor:
        """bool[n]: the heaviest unit of each block row, the lower index of equals."""
        row = self.keys // self.width
        most = scores.new_zeros(self.rows).scatter_reduce(
            0, row, scores, "amax", include_self=False
        )
        found = (scores == most[row]).nonzero()[:, 0]
        again = row[found].diff(prepend=row.new_full((1,), -1)) == 0
        return torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, found[~again], True)

    def rank(self, scores: Tensor) -> Tensor:
        """int64[n]: 0 for the heaviest unit of its block row, 1 for the next, and so on."""
        row = self.keys // self.width
        order = scores.argsort(descending=True, stable=True)
        order = order[row[order].argsort(stable=True)]
        counts = row.bincount(minlength=self.rows)
        first = counts.cumsum(0) - counts
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order), device=order.device) - first[row]
        return rank


def keep_heaviest(
    scores: Tensor,
    units: Units,
    kept: int,
    *,
    balanced: bool = False,
    allow_empty_rows: bool = False,
) -> Tensor:
    """Choose among stored units as :func:`tetris.reorder.block_mask` does among all.

    Args:
        scores: [n], worth of each, finite.
        units: Where they are.
        kept: How many to keep; one per block row if that is more and the floor holds.
        balanced: Keep equally many in every block row (up to one).
        allow_empty_rows: No floor: block rows may lose all their blocks.

    Returns:
        bool[n]. Ties go to the lower index. Fewer are kept where fewer are stored.
    """
    if not allow_empty_rows:
        kept = max(kept, units.rows)
    if balanced:
        rank = units.rank(scores)
        each, rest = divmod(kept, units.rows)
        # The rows whose next one is heaviest keep it too.
        following = rank == each
        extra = _largest(torch.where(following, scores, -torch.inf), rest)
        return (rank < each) | (extra & following)
    if not allow_empty_rows:
        scores = torch.where(units.best(scores), torch.inf, scores)
    return _largest(scores, kept)


def _largest(scores: Tensor, count: int) -> Tensor:
    """bool[n]: as many of the largest, the lower index of equals; in time of n."""
    if not 0 < count < len(scores):
        return torch.full_like(scores, count > 0, dtype=torch.bool)
    least = scores.kthvalue(len(scores) - count + 1).values
    keep = scores > least
    equal = (scores == least).nonzero()[:, 0]
    return keep.index_fill_(0, equal[: count - int(keep.sum())], True)
