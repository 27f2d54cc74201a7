"""What is kept or removed as one: blocks, blocks at all kernel positions, or input channels."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...layout import BlockLayout

Atom = Literal["block", "channel"]


@dataclass(frozen=True)
class Atoms:
    """The atoms of a layer.

    Attributes:
        layout: Sizes and permutations; which blocks it stores does not matter.
        index: int64[G, C], the atom each block belongs to, counted from 0.
        count: Number of atoms.
        rows: Block rows that must not lose all their atoms: number of rows if an atom lies in one
            row and the floor holds, else 0.
    """

    layout: BlockLayout
    index: Tensor
    count: int
    rows: int

    @classmethod
    def of(cls, layout: BlockLayout, atom: Atom, *, tie_kernel: bool, floor: bool) -> Atoms:
        """Blocks, or with ``channel`` block columns: bi input channels with all their weights."""
        rows, columns = layout.block_grid
        width = columns // layout.blocking.positions if tie_kernel or atom == "channel" else columns
        column = (torch.arange(columns, device=layout.device) % width).expand(rows, -1)
        if atom == "channel":
            return cls(layout, column, width, 0)
        row = torch.arange(rows, device=layout.device)[:, None]
        return cls(layout, row * width + column, rows * width, rows if floor else 0)

    def norms(self, weight: Tensor) -> Tensor:
        """float64[count], Frobenius norm of each atom of a weight [out, in / groups, *kernel]."""
        layout = self.layout
        squares = layout.blocking.sums(weight.double().square(), layout.row_perm, layout.col_perm)
        sums = squares.new_zeros(self.count).index_add_(0, self.index.flatten(), squares.flatten())
        return sums.sqrt()

    def stored(self, chosen: Tensor) -> BlockLayout:
        """The layout that stores the chosen atoms, bool[count]."""
        return self.layout.with_blocks(chosen[self.index])

    def best_of_rows(self, scores: Tensor, otherwise: Tensor) -> Tensor:
        """int64[rows], the best atom of each block row that must keep one.

        Args:
            scores: [count].
            otherwise: [count], in place of the scores of rows that have none above zero.
        """
        if not self.rows:
            return self.index.new_empty(0)
        scores, otherwise = scores.view(self.rows, -1), otherwise.view(self.rows, -1)
        best = torch.where((scores > 0).any(1, keepdim=True), scores, otherwise).argmax(1)
        return best + torch.arange(self.rows, device=best.device) * scores.shape[1]
