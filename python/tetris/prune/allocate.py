"""Scope ``global``: one threshold for the blocks of all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocking import Blocking, removed_count
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
        min_sparsity: Share that goes at least, whatever the blocks are worth.
        max_sparsity: Share that goes at most.
    """

    sums: Tensor
    cost: float
    keep_rows: bool
    stored: Units | None = None
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0

    @property
    def blocks(self) -> int:
        """Blocks of the layer, rated or not."""
        return self.sums.numel() if self.stored is None else self.stored.total

    @property
    def least(self) -> int:
        """Blocks that are kept at least."""
        return self.blocks - removed_count(self.max_sparsity, self.blocks)

    @property
    def most(self) -> int:
        """Blocks that are kept at most."""
        return self.blocks - removed_count(self.min_sparsity, self.blocks)

    def best(self) -> Tensor:
        """Shaped like sums: True for the best block of each block row."""
        if self.stored is not None:
            return self.stored.best(self.sums)
        best = torch.zeros_like(self.sums, dtype=torch.bool)
        best[torch.arange(self.sums.shape[0]), self.sums.argmax(1)] = True
        return best

    def bound(self, score: Tensor, best: Tensor) -> tuple[Tensor, Tensor]:
        """Which blocks are kept, and which removed, whatever those of other layers are worth.

        Args:
            score: [n], worth of each rated block.
            best: bool[n], those that the floor keeps.
        """
        never = torch.zeros_like(best)
        if self.min_sparsity == 0.0 and self.max_sparsity == 1.0:
            return best, never
        rank = torch.where(best, torch.inf, score).argsort(descending=True, stable=True)
        never = never.index_fill_(0, rank[self.most :], True) & ~best
        return best.index_fill(0, rank[: self.least], True), never


def scored(
    saliency: Tensor,
    blocking: Blocking,
    row_perm: Tensor | None,
    col_perm: Tensor | None,
    *,
    tie_kernel: bool,
    keep_rows: bool,
    cost: float = 1.0,
    bounds: tuple[float, float] = (0.0, 1.0),
) -> Scored:
    """Block sums of a layer under given permutations; ``cost`` is that of one number."""
    sums = blocking.sums(saliency, row_perm, col_perm)
    cost *= blocking.block[0] * blocking.block[1]
    if tie_kernel:
        sums = sums.unflatten(1, (blocking.positions, -1)).sum(1)
        cost *= blocking.positions
    return Scored(sums, cost, keep_rows, None, *bounds)


def check_reach(where: str, layers: Mapping[str, Scored], sparsity: float) -> None:
    """Raise ValueError if the bounds of the layers leave no way to this sparsity of all."""
    total = sum(layer.cost * layer.blocks for layer in layers.values())
    slack = sum(layer.cost for layer in layers.values()) / total + 1e-9  # whole blocks of each
    most = 1.0 - sum(layer.cost * layer.least for layer in layers.values()) / total
    least = 1.0 - sum(layer.cost * layer.most for layer in layers.values()) / total
    for name, share, beyond in (
        ("max_sparsity", most, sparsity - most),
        ("min_sparsity", least, least - sparsity),
    ):
        if beyond > slack:
            raise ValueError(
                f"{where}: {name} of the layers comes to {share:.1%} of all, which cannot be "
                f"reconciled with removing {sparsity:.1%}; change one of them"
            )


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
    in the budget (if the budget is smaller, these blocks win); so do the best blocks that
    ``max_sparsity`` keeps. Those that ``min_sparsity`` removes leave their place to other layers.

    Returns:
        name -> sparsity such that ``floor(sparsity * blocks)`` is the number of removed blocks.
    """
    scores: list[Tensor] = []
    costs, floor, ceiling = [], [], []
    for layer in layers.values():
        score = (layer.sums.double() / layer.cost).flatten()
        best = layer.best() if layer.keep_rows else torch.zeros_like(score, dtype=torch.bool)
        first, last = layer.bound(score, best.flatten())
        scores.append(score)
        floor.append(first)
        ceiling.append(last)
        costs.append(torch.full((score.numel(),), layer.cost, dtype=torch.float64))
    score, cost = torch.cat(scores), torch.cat(costs)
    first, last = torch.cat(floor), torch.cat(ceiling)
    score = torch.where(first, torch.inf, score).masked_fill(last, -torch.inf)
    order = score.argsort(descending=True, stable=True)
    total = sum(layer.cost * layer.blocks for layer in layers.values())
    budget = (1.0 - sparsity) * total * (1.0 + 1e-12)
    keep = torch.zeros_like(first)
    keep[order] = cost[order].cumsum(0) <= budget
    keep = (keep & ~last) | first
    result = {}
    for (name, layer), kept in zip(
        layers.items(), keep.split([s.numel() for s in scores]), strict=True
    ):
        blocks = layer.blocks
        removed = blocks - int(kept.sum())
        result[name] = min(1.0, (removed + 0.5) / blocks)  # floor() finds the count again
    return result
