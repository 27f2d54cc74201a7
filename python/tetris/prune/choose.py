"""Which blocks to keep where the order of the channels is given: no layout search."""

from __future__ import annotations

from collections.abc import Collection, Mapping

from torch import Tensor

from ..layout import BlockLayout
from ..layout_search import select_blocks
from .allocate import allocate, scored
from .options import LayerOptions


def choose_blocks(
    saliency: Mapping[str, Tensor],
    orders: Mapping[str, BlockLayout],
    options: Mapping[str, LayerOptions],
    sparsity: Mapping[str, float],
    together: float | None,
    fixed: Collection[str],
    costs: Mapping[str, float],
) -> dict[str, BlockLayout]:
    """Layouts that keep the most saliency under given permutations.

    Args:
        saliency: Layer -> worth of each weight, ``[out, in / groups, *kernel]``.
        orders: Layer -> layout with its permutations.
        options: Layer -> settings.
        sparsity: Layer -> share of its blocks to remove.
        together: In place of ``sparsity``, that of all layers together; None for scope "layer".
        fixed: Layers that keep to ``sparsity`` all the same.
        costs: Layer -> what one stored number costs, 1 where it is left out.
    """
    if together is not None:
        scores = {
            name: scored(
                saliency[name],
                orders[name].blocking,
                orders[name].row_perm,
                orders[name].col_perm,
                tie_kernel=o.tie_kernel,
                keep_rows=not o.allow_empty_rows,
                cost=costs.get(name, 1.0),
                bounds=(o.min_sparsity, o.max_sparsity),
            )
            for name, o in options.items()
            if name not in fixed
        }
        sparsity = {**sparsity, **(allocate(scores, together) if scores else {})}
    result = {}
    for name, layout in orders.items():
        o = options[name]
        blocks = select_blocks(
            saliency[name],
            layout.blocking,
            sparsity[name],
            layout.row_perm,
            layout.col_perm,
            balanced=o.balanced,
            allow_empty_rows=o.allow_empty_rows,
            tie_kernel=o.tie_kernel,
        )
        result[name] = layout.with_blocks(blocks.to(layout.device))
    return result
