"""Choosing one order for channels that meet, and putting parameters into it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from ..blocking import inverse_permutation
from ..layout import BlockLayout
from ..nn.base import INDEX, SparseLayer
from .channels import Axis, Ids, Order
from .find import tensor_at, tensor_names
from .layers import layers_of

Perms = list[NDArray[np.int64] | None]  # for each order: channel k becomes channel perm[k]


# -- choosing -------------------------------------------------------------------------------------


def choose(model: nn.Module, orders: Sequence[Order]) -> Perms:
    """For each order the permutation under which most sparse layers need none of their own.

    That is the permutation of one of them, or None where identity does as well.
    """
    slots = _slots(model)
    return [_best(order, slots) for order in orders]


def _slots(model: nn.Module) -> dict[Axis, tuple[Ids, Ids]]:
    """Of all axes of sparse layers: the channel in each packed slot, and the slot's block."""
    names = tensor_names(model)
    found: dict[Axis, tuple[Ids, Ids]] = {}
    for layer in layers_of(model):
        module = layer.module
        if isinstance(module, SparseLayer) and not layer.depthwise:
            for side, perm in enumerate((module.row_perm, module.col_perm)):
                axis = layer.axis(names[id(module.values)], side)
                slot = np.arange(axis.size)
                own = slot if perm is None else perm.cpu().numpy().astype(np.int64)
                size = axis.size // getattr(module, "groups", 1)
                found[axis] = own, slot // size * axis.size + slot % size // module.block[side]
    return found


def _best(order: Order, slots: dict[Axis, tuple[Ids, Ids]]) -> NDArray[np.int64] | None:
    """The permutation that suits most axes; one that several members have is tried once."""
    wishes: dict[Axis, list[tuple[Ids | None, Ids]]] = {}
    for member in order.members:
        if member.axis in slots:
            own, block = slots[member.axis]
            wishes.setdefault(member.axis, []).append(
                (_inside(own, member.index), block[member.index])
            )
    identity = np.arange(order.size)
    several = [p for parts in wishes.values() for p, _ in parts if p is not None]
    candidates = {p.tobytes(): p for p in [identity, *several]}

    def suits(perm: Ids) -> int:
        back = np.argsort(perm)
        return sum(
            all(p is not None and _moves_blocks(back[p], block) for p, block in parts)
            for parts in wishes.values()
        )

    best = max(candidates.values(), key=suits)  # the first of several
    return None if np.array_equal(best, identity) else best


def _inside(own: Ids, index: Ids) -> Ids | None:
    """A part of a permutation in the part's numbers; None if it leaves the part."""
    number = np.full(len(own), -1)
    number[index] = np.arange(len(index))
    found = number[own[index]]
    return None if (found < 0).any() else found


def _moves_blocks(perm: Ids, block: Ids) -> bool:
    """Whether slots that share a block share one afterwards, so that blocks may move instead."""
    pairs = np.unique(np.stack([block, block[perm]]), axis=1)
    return len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1]


# -- applying -------------------------------------------------------------------------------------


@torch.no_grad()
def apply(model: nn.Module, orders: Sequence[Order], perms: Perms) -> None:
    """Put all axes into the orders chosen; the model is changed in place.

    Sparse layers then lose the permutations that have become identities, or only move blocks.
    """
    moved: dict[Axis, Ids] = {}
    for order, perm in zip(orders, perms, strict=True):
        for member in order.members if perm is not None else ():
            whole = moved.setdefault(member.axis, np.arange(member.axis.size))
            whole[member.index] = member.index[perm]
    names = tensor_names(model)
    sparse: dict[str, list[SparseLayer]] = {}
    for layer in layers_of(model):
        if isinstance(layer.module, SparseLayer):
            sparse.setdefault(names[id(layer.module.values)], []).append(layer.module)
    for axis, perm in moved.items():
        if axis.tensor not in sparse:
            _move(tensor_at(model, axis.tensor), axis, torch.from_numpy(perm))
    for name, layers in sparse.items():
        first = layers[0]
        layout, weight = first.layout, None
        out, in_ = layout.out_features, layout.in_features
        rows = moved.get(Axis(name, 0, out))
        cols = moved.get(Axis(name, 1, in_, layout.groups))
        if 1 < layout.groups == in_:
            if rows is not None:
                layout, weight = _move_groups(layout, first.values, rows)
        else:
            layout = _renumbered(layout, rows, cols)
        found, values = _without_orders(layout, first.values, weight)
        first.values.copy_(values)
        for layer in layers:  # that share one weight
            for index in INDEX:
                own = getattr(found, index)
                layer._buffers[index] = None if own is None else own.clone()


def _move(tensor: Tensor, axis: Axis, perm: Tensor) -> None:
    """Reorder a dense parameter or buffer along an axis."""
    perm = perm.to(tensor.device)
    if axis.groups == 1:
        tensor.copy_(tensor.index_select(axis.dim, perm))
        return
    size = axis.size // axis.groups
    groups = tensor.chunk(axis.groups)  # rows; each has inputs of its own
    for part, own in zip(groups, (perm % size).split(size), strict=True):
        part.copy_(part.index_select(axis.dim, own))


def _renumbered(layout: BlockLayout, rows: Ids | None, cols: Ids | None) -> BlockLayout:
    """The layout of the same stored blocks when row k is what row ``rows[k]`` was before."""

    def own(perm: Tensor | None, moved: Ids | None) -> Tensor | None:
        if moved is None:
            return perm
        back = inverse_permutation(torch.from_numpy(moved)).to(layout.device)
        return (back if perm is None else back[perm.long()]).to(torch.int32)

    return _with_perms(layout, own(layout.row_perm, rows), own(layout.col_perm, cols))


def _move_groups(layout: BlockLayout, values: Tensor, rows: Ids) -> tuple[BlockLayout, Tensor]:
    """Layout and dense weight when whole groups of a convolution move."""
    moved = torch.from_numpy(rows).to(layout.device)
    copies = layout.out_features // layout.groups
    groups = moved[::copies] // copies
    mask = layout.block_mask().unflatten(0, (layout.groups, -1))[groups].flatten(0, 1)
    perm = layout.row_perm
    if perm is not None:
        local = (perm.long() % copies).view(layout.groups, copies)[groups]
        first = torch.arange(layout.groups, device=layout.device)[:, None] * copies
        perm = (local + first).flatten().to(torch.int32)
    found = _with_perms(layout, perm, layout.col_perm).with_blocks(mask)
    return found, layout.unpack(values)[moved]


def _without_orders(
    layout: BlockLayout, values: Tensor, weight: Tensor | None = None
) -> tuple[BlockLayout, Tensor]:
    """The same weight, cut without the permutations that only move blocks.

    An order of columns that are a block each, or of rows within a block, needs no gather: the
    blocks are stored elsewhere instead.
    """
    rows, cols = layout.row_perm, layout.col_perm
    for perms in ((None, None), (None, cols), (rows, None)):
        if perms == (rows, cols):
            break
        found = BlockLayout.from_mask(
            layout.mask(), layout.block, row_perm=perms[0], col_perm=perms[1], groups=layout.groups
        )
        if found.nnz_blocks == layout.nnz_blocks:
            return found, found.pack(layout.unpack(values) if weight is None else weight)
    return layout, values if weight is None else layout.pack(weight)


def _with_perms(layout: BlockLayout, rows: Tensor | None, cols: Tensor | None) -> BlockLayout:
    return BlockLayout(
        layout.block,
        layout.out_features,
        layout.in_features,
        layout.row_ptr,
        layout.col_idx,
        rows,
        cols,
        layout.kernel_size,
        layout.groups,
    )
