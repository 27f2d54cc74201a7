"""Scope ``global``: one threshold for the blocks of all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocking import Blocking
from .select import Units


@dataclass(frozen=True)
class Scored:
    """Block sums of one layer.

    Attributes:
        sums: [G, C], saliency of what is kept or removed as one: blocks, or with ``tie_kernel``
            the blocks of all kernel positions together; [n] of the stored ones, with ``stored``.
        cost: Of one, in the unit of the budget: the numbers it takes, bo * bi times the positions
            it spans, times what a number costs.
        keep_rows: Every block row keeps its best block.
        stored: Where the blocks are that sums are of, if not all of a layer are rated.
    """

    sums: Tensor
    cost: float
    keep_rows: bool
    stored: Units | None = None

    @property
    def blocks(self) -> int:
        """Blocks of the layer, rated or not."""
        return self.sums.numel() if self.stored is None else self.stored.total

    def best(self) -> Tensor:
        """Shaped like sums: True for the best block of each block row."""
        if self.stored is not None:
            return self.stored.best(self.sums)
        best = torch.zeros_like(self.sums, dtype=torch.bool)
        best[torch.arange(self.sums.shape[0]), self.sums.argmax(1)] = True
        return best


def scored(
    saliency: Tensor,
    blocking: Blocking,
    row_perm: Tensor | None,
    col_perm: Tensor | None,
    *,
    tie_kernel: bool,
    keep_rows: bool,
    cost: float = 1.0,
) -> Scored:
    """Block sums of a layer under given permutations; ``cost`` is that of one number."""
    sums = blocking.sums(saliency, row_perm, col_perm)
    cost *= blocking.block[0] * blocking.block[1]
    if tie_kernel:
        sums = sums.unflatten(1, (blocking.positions, -1)).sum(1)
        cost *= blocking.positions
    return Scored(sums, cost, keep_rows)


def l1_order(saliency: Tensor, blocking: Blocking) -> tuple[Tensor, Tensor]:
    """Rows and columns of each group by falling norm: a stand-in for the order yet to be found."""
    parts = blocking.ordered(saliency)  # [groups, out, positions, in]
    return _descending(parts.sum((2, 3))), _descending(parts.sum((1, 2)))


def _descending(norms: Tensor) -> Tensor:
    """int64[groups * n], global numbers of [groups, n] in falling order within each group."""
    first = torch.arange(norms.shape[0])[:, None] * norms.shape[1]
    return (norms.argsort(dim=1, descending=True, stable=True) + first).flatten()


def allocate(layers: Mapping[str, Scored], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer such that all together keep ``1 - sparsity`` of their cost.

    Blocks of all layers are ranked by saliency per cost; the best are kept until the budget is
    used up. The best block of each block row comes first where ``keep_rows`` asks for it, counted
    in the budget (if the budget is smaller, these blocks win).

    Returns:
        name -> sparsity such that ``floor(sparsity * blocks)`` is the number of removed blocks.
    """
    scores, costs, floor = [], [], []
    for layer in layers.values():
        score = layer.sums.double() / layer.cost
        best = layer.best() if layer.keep_rows else torch.zeros_like(score, dtype=torch.bool)
        scores.append(score.flatten())
        floor.append(best.flatten())
        costs.append(torch.full((score.numel(),), layer.cost, dtype=torch.float64))
    score, cost, first = torch.cat(scores), torch.cat(costs), torch.cat(floor)
    score = torch.where(first, torch.inf, score)
    order = score.argsort(descending=True, stable=True)
    total = sum(layer.cost * layer.blocks for layer in layers.values())
    budget = (1.0 - sparsity) * total * (1.0 + 1e-12)
    keep = torch.zeros_like(first)
    keep[order] = cost[order].cumsum(0) <= budget
    keep |= first
    result = {}
    for (name, layer), kept in zip(
        layers.items(), keep.split([s.numel() for s in scores]), strict=True
    ):
        blocks = layer.blocks
        removed = blocks - int(kept.sum())
        result[name] = min(1.0, (removed + 0.5) / blocks)  # floor() finds the count again
    return result
