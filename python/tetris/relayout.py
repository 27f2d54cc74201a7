"""Changing which blocks a sparse layer stores while it trains, at the cost of what it stores."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import Optimizer

from .checks import describe
from .layout import BlockLayout
from .parameters import check_optimizers, check_states, move_parameter
from .sharding import check_whole

_SAME = ("block", "out_features", "in_features", "kernel_size", "groups", "row_perm", "col_perm")


@torch.no_grad()
def relayout(
    module: nn.Module,
    layout: BlockLayout,
    *,
    optimizers: Optimizer | Iterable[Optimizer] = (),
    fill: Tensor | None = None,
) -> None:
    """Change which blocks a sparse layer stores, in place.

    Blocks that both layouts store keep their numbers, the others go, new ones start at zero. So do
    the gradient and the optimizers' states: a tensor shaped like ``values`` (a momentum, a second
    moment) moves with its blocks and is zero in new ones, a scalar (a step count) stays. The
    Parameter stays the object it was. Blocks are matched by their sorted positions: time and memory
    are those of the stored blocks, nothing has the size of the dense weight.

    Args:
        module: A sparse layer, such as :class:`tetris.SparseLinear`. Layers that share their
            ``values`` need a layout of their own first: this changes one of them.
        layout: What to store from now on: the block, sizes and permutations of ``module.layout``.
        optimizers: Whose states follow. One that holds other parameters only is left alone.
        fill: [nnzb, bi, bo] of the new layout: what new blocks start with, such as
            ``layout.pack(weight)``. Blocks that were stored before keep their numbers.

    Raises:
        TypeError: an argument is of the wrong kind.
        ValueError: the layout differs in more than its blocks, fill does not fit, or a state of an
            optimizer cannot follow (Adafactor's factors, lists of tensors, Rprop's step sizes, all
            that LBFGS keeps). Nothing is changed then.

    Example:
        >>> kept = sparse.layout.block_mask()
        >>> kept[0] = True                          # store all blocks of the first block row
        >>> tetris.relayout(sparse, sparse.layout.with_blocks(kept), optimizers=optimizer)
    """
    where = "tetris.relayout"
    if not isinstance(module, nn.Module):
        raise TypeError(f"{where}: module must be a sparse layer (got {describe(module)})")
    if not isinstance(layout, BlockLayout):
        raise TypeError(f"{where}: layout must be a BlockLayout (got {describe(layout)})")
    values = module._parameters.get("values")
    old: object = getattr(module, "layout", None)
    if values is None or not isinstance(old, BlockLayout):
        raise TypeError(
            f"{where}: module must be a sparse layer, with values and a layout "
            f"(got {type(module).__name__}); tetris.sparsify makes them"
        )
    check_whole(where, [values], "change blocks before fully_shard, which counts on their number")
    layout = layout.to(values.device)
    _check_same(where, old, layout)
    if fill is not None:
        _check_fill(where, fill, (layout.nnz_blocks, *values.shape[1:]))
    optimizers = check_optimizers(where, optimizers)
    check_states(where, values, optimizers)

    position, kept = find_blocks(old, layout)
    source, target = position[kept], kept.nonzero()[:, 0]

    def move(blocks: Tensor) -> Tensor:
        moved = blocks.new_zeros((layout.nnz_blocks, *blocks.shape[1:]))
        return moved.index_copy_(0, target, blocks.index_select(0, source))

    move_parameter(values, move, optimizers)
    if fill is not None:
        added = (~kept).nonzero()[:, 0]
        values.index_copy_(0, added, fill.to(values).index_select(0, added))
    for name in ("row_ptr", "col_idx"):
        module._buffers[name] = getattr(layout, name).clone()


# -- shared with the pruners ----------------------------------------------------------------------


def block_keys(layout: BlockLayout) -> Tensor:
    """int64[nnzb], ascending: ``block row * column groups + column group`` of stored blocks."""
    return layout._block_rows() * layout.block_grid[1] + layout.col_idx


def all_blocks(layout: BlockLayout) -> BlockLayout:
    """The layout that stores all blocks, in the order of another one."""
    return layout_of_keys(layout, torch.arange(math.prod(layout.block_grid)))


def layout_of_keys(like: BlockLayout, keys: Tensor) -> BlockLayout:
    """The layout that stores the blocks of given keys, ascending, and is else as another one."""
    rows, groups = like.block_grid
    counts = (keys // groups).bincount(minlength=rows)
    return replace(
        like,
        row_ptr=F.pad(counts.cumsum(0), (1, 0)).to(torch.int32),
        col_idx=(keys % groups).to(torch.int32),
    )


def find_blocks(old: BlockLayout, new: BlockLayout) -> tuple[Tensor, Tensor]:
    """Where the blocks of a new layout are in an old one.

    Returns:
        int64[nnzb] position in the old layout, and bool[nnzb], whether it was stored there: the
        position means nothing where it was not.
    """
    have, want = block_keys(old), block_keys(new)
    position = torch.searchsorted(have, want)
    if not have.numel():
        return position, torch.zeros_like(want, dtype=torch.bool)
    position.clamp_(max=have.numel() - 1)
    return position, have[position] == want


def _check_same(where: str, old: BlockLayout, new: BlockLayout) -> None:
    for name in _SAME:
        a, b = getattr(old, name, None), getattr(new, name, None)
        if isinstance(a, Tensor) and isinstance(b, Tensor):
            if not torch.equal(a, b):
                raise ValueError(
                    f"{where}: layout must have the layer's {name} (got another order); blocks of "
                    "other orders share no numbers: new.pack(old.unpack(values)) goes through the "
                    "dense weight"
                )
        elif a is not b and a != b:
            raise ValueError(
                f"{where}: layout must have the layer's {name} (got {describe(b)} and the layer "
                f"has {describe(a)})"
            )


def _check_fill(where: str, fill: object, shape: tuple[int, ...]) -> None:
    if not isinstance(fill, Tensor):
        raise TypeError(f"{where}: fill must be a tensor (got {describe(fill)})")
    if tuple(fill.shape) != shape:
        raise ValueError(
            f"{where}: fill must be [nnzb, bi, bo] = {list(shape)} of the new layout, such as "
            f"layout.pack(weight) (got {list(fill.shape)})"
        )
