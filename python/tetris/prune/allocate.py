"""Scope ``global``: one threshold for the blocks of all layers."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..layout import block_sums


@dataclass(frozen=True)
class Scored:
    """Block sums of one layer.

    Attributes:
        sums: [G, C], saliency of each block.
        area: Numbers a stored block takes, bo * bi.
        keep_rows: Every block row keeps its best block.
    """

    sums: Tensor
    area: int
    keep_rows: bool


def sorted_sums(saliency: Tensor, block: tuple[int, int], reorder: bool) -> Tensor:
    """Block sums [G, C] in L1-sorted order, a cheap stand-in for the order yet to be found."""
    if not reorder:
        return block_sums(saliency, block)
    rows = saliency.sum(1).argsort(descending=True, stable=True)
    cols = saliency.sum(0).argsort(descending=True, stable=True)
    return block_sums(saliency, block, rows, cols)


def allocate(layers: Mapping[str, Scored], sparsity: float) -> dict[str, float]:
    """Sparsity of each layer such that all together store ``1 - sparsity`` of their numbers.

    Blocks of all layers are ranked by saliency per number; the best are kept until the budget is
    used up. The best block of each block row comes first where ``keep_rows`` asks for it, counted
    in the budget (if the budget is smaller, these blocks win).

    Returns:
        name -> sparsity such that ``floor(sparsity * blocks)`` is the number of removed blocks.
    """
    scores, areas, floor = [], [], []
    for layer in layers.values():
        score = layer.sums.double() / layer.area
        best = torch.zeros_like(score, dtype=torch.bool)
        if layer.keep_rows:
            best[torch.arange(score.shape[0]), score.argmax(1)] = True
        scores.append(score.flatten())
        floor.append(best.flatten())
        areas.append(torch.full((score.numel(),), layer.area))
    score, area, first = torch.cat(scores), torch.cat(areas), torch.cat(floor)
    score = torch.where(first, torch.inf, score)
    order = score.argsort(descending=True, stable=True)
    budget = (1.0 - sparsity) * float(area.sum()) * (1.0 + 1e-12)
    keep = torch.zeros_like(first)
    keep[order] = area[order].cumsum(0) <= budget
    keep |= first
    result = {}
    for (name, layer), kept in zip(
        layers.items(), keep.split([s.numel() for s in scores]), strict=True
    ):
        blocks = layer.sums.numel()
        removed = blocks - int(kept.sum())
        result[name] = min(1.0, (removed + 0.5) / blocks)  # floor() finds the count again
    return result
