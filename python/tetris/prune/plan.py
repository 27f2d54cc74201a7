"""From settings to one layout per layer: saliency, scope, search."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import Tensor

from ..blocking import Blocking
from ..layout import BlockLayout, search_layout
from ..layout_search import search_method
from ..reorder import SearchResult
from .allocate import allocate, check_reach, l1_order, scored
from .options import LayerOptions, check_bounds
from .orders import Share
from .shared import search_shared

Scope = Literal["layer", "global"]


@dataclass(frozen=True)
class Plan:
    """What one layer will store.

    Attributes:
        options: Settings; ``sparsity`` is the layer's own, also with scope ``global``.
        saliency: That the search saw, shaped like the layout's weight.
        layout: Result.
        search: What the search reported.
    """

    options: LayerOptions
    saliency: Tensor
    layout: BlockLayout
    search: SearchResult


def plan_layers(
    where: str,
    saliency: Mapping[str, Tensor],
    options: Mapping[str, LayerOptions],
    fixed: set[str],
    scope: Scope,
    sparsity: float,
    progress: bool,
    groups: Mapping[str, int],
    costs: Mapping[str, float] | None = None,
    share: Share = (),
    absolute: bool = False,
) -> dict[str, Plan]:
    """Search a layout for every layer.

    Args:
        where: Function named in messages.
        saliency: name -> [out, in], or [out, in / groups, *kernel] of a convolution.
        options: name -> settings.
        fixed: Layers that keep their own sparsity with scope ``global``.
        scope: ``layer``, each layer has its sparsity; ``global``, the layers share ``sparsity``.
        sparsity: Of all layers together, with scope ``global``.
        progress: Show progress bars.
        groups: name -> groups of a convolution, 1 of a linear layer.
        costs: name -> cost of one weight, with scope ``global``; 1 where nothing is said.
        share: Orders that several layers have in common.
        absolute: Magnitudes of the saliency count: it may be the weights. For layers that share
            neither sparsity nor order.
    """
    if scope not in ("layer", "global"):
        raise ValueError(f"{where}: scope must be 'layer' or 'global' (got {scope!r})")
    options = dict(options)
    check_bounds(where, scope, options, fixed)
    shared = [name for name in saliency if name not in fixed]
    if scope == "global" and shared:
        scores = {}
        for name in shared:
            o = options[name]
            blocking = Blocking.of(where, "saliency", saliency[name], o.block, groups[name])
            sort = search_method(where, o.reorder) != "identity"
            scores[name] = scored(
                saliency[name],
                blocking,
                *(l1_order(saliency[name], blocking) if sort else (None, None)),
                tie_kernel=o.tie_kernel,
                keep_rows=not o.allow_empty_rows,
                cost=(costs or {}).get(name, 1.0),
                bounds=(o.min_sparsity, o.max_sparsity),
            )
        check_reach(where, scores, sparsity)
        for name, own in allocate(scores, sparsity).items():
            options[name] = replace(options[name], sparsity=own)
    together = search_shared(where, saliency, options, share, groups, progress)
    plans = {}
    for name, values in saliency.items():
        o = options[name]
        if name in together:
            plans[name] = Plan(o, values, *together[name])
            continue
        try:
            layout, search = search_layout(
                f"{where}: layer {name!r}",
                values,
                o.block,
                o.sparsity,
                groups=groups[name],
                progress=progress,
                absolute=absolute,
                **o.search,
            )
        except ValueError as error:
            if str(error).startswith(where):
                raise
            raise ValueError(f"{where}: layer {name!r}: {error}") from error
        plans[name] = Plan(o, values, layout, search)
    return plans
