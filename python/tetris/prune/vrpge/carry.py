"""Gates travel with their weights when blocks are cut in another order."""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from ...layout import BlockLayout
from .gates import Part


def spread(whole: BlockLayout, part: Part, gates: Tensor) -> Tensor:
    """[out, in / groups, ...] with the gate of each weight.

    Args:
        whole: Stores all blocks.
        part: Which of the gates are the layer's.
        gates: Of all layers.
    """
    bo, bi = whole.block
    return whole.unpack(part.blocks(gates)[:, None, None].expand(-1, bi, bo))


def carry(old: BlockLayout, new: BlockLayout, part: Part, gates: Tensor) -> Tensor:
    """Gates of a layer in a new order: of each atom the mean over its entries.

    Entries that ragged blocks lack count, too, and stay at the end where they are, so the sum over
    gates stays what it was. The mean over weights alone changed it: a ragged block's few weights
    cost as much as a full block's.

    Args:
        old: Stores all blocks, in the order of ``gates``.
        new: The same, in another order.
        part: Which of the gates are the layer's.
        gates: Of all layers.
    """
    means = _filled(new).pack(spread(_filled(old), part, gates)).mean((1, 2))
    return part.per_atom(means) / part.per_atom(torch.ones_like(means))


def _filled(whole: BlockLayout) -> BlockLayout:
    """The layout with channels added where its last blocks are ragged, which no order moves."""
    (rows, columns), (bo, bi) = whole.blocking.group_grid, whole.block
    out, in_ = whole.blocking.group_shape
    return replace(
        whole,
        out_features=whole.groups * rows * bo,
        in_features=whole.groups * columns * bi,
        row_perm=_longer(whole.row_perm, out, rows * bo),
        col_perm=_longer(whole.col_perm, in_, columns * bi),
    )


def _longer(perm: Tensor | None, size: int, room: int) -> Tensor | None:
    """A permutation of ``size`` channels per group, and of the channels added up to ``room``."""
    if perm is None:
        return None
    own = perm.long().view(-1, size) % size  # groups keep to themselves
    added = torch.arange(size, room, device=perm.device).expand(len(own), -1)
    begin = room * torch.arange(len(own), device=perm.device)[:, None]
    return (torch.cat([own, added], 1) + begin).flatten().to(torch.int32)
