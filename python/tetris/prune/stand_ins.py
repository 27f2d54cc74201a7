"""Sparse layers of a choice, before anything is searched: blocks at random places."""

from __future__ import annotations

from collections.abc import Mapping
from typing import cast

import torch
from torch import nn

from ..cost.calls import Call
from ..cost.features import Point
from ..cost.measure import random_layout
from ..cost.problem import Problem, Stored
from ..layout_search import search_method
from ..nn.base import SparseLayer, make_sparse
from ..nn.kinds import sparse_type
from .curves import Candidate
from .options import LayerOptions
from .tree import Selection


def stand_ins(
    where: str,
    selection: Selection,
    options: Mapping[str, LayerOptions],
    calls: Mapping[str, list[Call]],
    chosen: Mapping[str, Candidate],
) -> dict[str, SparseLayer]:
    """Sparse layers that take as long as those that a choice will become.

    Time depends on sizes, block and number of blocks, and on whether there are orders, hardly on
    where the blocks are. Values are those of the dense weights, so what layers pass on is of the
    usual size.

    Args:
        where: Function named in messages.
        selection: The layers.
        options: name -> settings.
        calls: name -> calls of a layer on the example.
        chosen: First name of each weight -> candidate.

    Returns:
        name -> layer, of those that are sparse; biases are those of the dense layers.
    """
    result: dict[str, SparseLayer] = {}
    for first, candidate in chosen.items():
        if candidate.block is None:
            continue
        own, problem = options[first], calls[first][0].problem
        tied = tied_positions(problem, own)
        stored = Stored.of(problem, candidate.block, candidate.sparsity, tied)
        layout = random_layout(
            Point(problem, stored),
            torch.Generator().manual_seed(own.seed),
            reordered=search_method(where, own.reorder) != "identity",
            tied=tied,
        )
        values: nn.Parameter | None = None
        for name in selection.tied[first]:
            layer = selection.layers[name]
            bias = cast("nn.Parameter | None", layer.bias)
            made = make_sparse(sparse_type(layer), layer, layout, bias=bias, values=values)
            result[name], values = made, made.values
    return result


def tied_positions(problem: Problem, options: LayerOptions) -> int:
    """Kernel positions of a layer whose blocks stay or go together."""
    return problem.taps if options.tie_kernel and problem.kernel else 1
