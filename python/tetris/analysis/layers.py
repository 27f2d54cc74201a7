"""One layer at a time: what it would retain, and how long it would take."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from ..cost.calls import Call
from ..cost.features import Point
from ..cost.measure import seconds_of_call
from ..cost.model import CostModel
from ..cost.problem import Stored
from ..layout import BlockLayout, search_layout
from ..nn.base import make_sparse
from ..nn.kinds import DenseLayer, sparse_type
from ..reorder import SearchResult
from .report import LEAST_GAIN, Choice, LayerAnalysis

if TYPE_CHECKING:
    from ..layout_search import SearchOptions


@dataclass(frozen=True)
class Subject:
    """A layer to analyze.

    Attributes:
        name: Of the layer.
        saliency: [out, in / groups, ...], worth of each weight.
        groups: Of a convolution.
        calls: What it computes; empty if nothing is known of its inputs.
        cold: Its weights come from memory.
        layer: The dense layer, to measure; None if there are only weights.
        tied: Names of other layers that share the weight.
    """

    name: str
    saliency: Tensor
    groups: int
    calls: Sequence[Call]
    cold: bool
    layer: DenseLayer | None = None
    tied: tuple[str, ...] = ()


def analyze_layer(
    where: str,
    subject: Subject,
    blocks: Sequence[tuple[int, int]],
    sparsities: Sequence[float],
    cost: CostModel,
    threads: int,
    measure: bool,
    search: SearchOptions,
    advance: Callable[[], None],
) -> LayerAnalysis:
    """Search, predict and if asked for measure every block and sparsity; then recommend one.

    Args:
        where: Function named in messages.
        subject: The layer.
        blocks: Block shapes.
        sparsities: Shares of the blocks to remove.
        cost: Predicts times.
        threads: To predict for.
        measure: Measure, too, on torch's current number of threads.
        search: How to search for orders.
        advance: Called after each choice.
    """
    dense = seconds_of(cost, subject, None, threads)
    dense_measured = None
    if measure and subject.layer is not None:
        dense_measured = 1e3 * _measured(subject.layer, subject.calls)
    choices = []
    for block in blocks:
        for sparsity in sparsities:
            layout, found = search_layout(
                f"{where}: layer {subject.name!r}",
                subject.saliency,
                block,
                sparsity,
                groups=subject.groups,
                **search,
            )
            choice = _choice(layout, found)
            # Every block row keeps a block, so that a small layer may not reach what was asked for.
            if any((c.block, c.sparsity) == (choice.block, choice.sparsity) for c in choices):
                advance()
                continue
            if subject.calls:
                stored = Stored(block, layout.row_ptr.numel() - 1, layout.nnz_blocks)
                taken = seconds_of(cost, subject, stored, threads)
                choice = replace(choice, predicted_ms=1e3 * taken, speedup=dense / taken)
            if measure and subject.layer is not None:
                taken = _measured(_sparse(subject.layer, layout), subject.calls)
                choice = replace(choice, measured_ms=1e3 * taken)
            choices.append(choice)
            advance()
    best, reason = _recommend(subject, choices, cost, threads)
    return LayerAnalysis(
        subject.name,
        tuple(subject.saliency.shape),
        sum(call.problem.tokens for call in subject.calls),
        len(subject.calls),
        1e3 * dense if subject.calls else math.nan,
        tuple(choices),
        best,
        reason,
        dense_measured,
        subject.tied,
    )


def seconds_of(cost: CostModel, subject: Subject, stored: Stored | None, threads: int) -> float:
    """Predicted seconds of all calls; a weight that is used again at once is in cache."""
    return sum(
        cost.seconds(Point(call.problem, stored, subject.cold and i == 0), threads)
        for i, call in enumerate(subject.calls)
    )


def _choice(layout: BlockLayout, found: SearchResult) -> Choice:
    return Choice(
        layout.block,
        layout.sparsity,
        found.retained,
        found.l1_sort_retained,
        found.identity_retained,
        found.unstructured_retained,
    )


def _recommend(
    subject: Subject, choices: Sequence[Choice], cost: CostModel, threads: int
) -> tuple[Choice | None, str]:
    """The choice that saves the most time for the saliency that it loses, and why."""
    if not subject.calls:
        return None, ""  # the report says once that there are no times
    winning = [c for c in choices if c.speedup >= LEAST_GAIN]
    if winning:

        def saved(choice: Choice) -> float:
            return (1.0 - 1.0 / choice.speedup) / max(1.0 - choice.retained, 1e-3)

        best = max(winning, key=saved)
        return best, (
            f"sparse: {best.block[0]}x{best.block[1]} blocks at {best.sparsity:.0%} are predicted "
            f"to be {best.speedup:.2f}x as fast and retain {best.retained:.1%} of the saliency"
        )
    fastest = max(choices, key=lambda c: c.speedup)
    problem = subject.calls[0].problem
    point = Point(problem, Stored.of(problem, fastest.block, fastest.sparsity), subject.cold)
    parts = cost.parts(point, threads)
    dense = cost.seconds(Point(problem, None, subject.cold), threads)
    if parts["call"] > 0.5 * dense:
        why = (
            f"it is too small: a call of a sparse layer takes {1e6 * parts['call']:.2g} us by "
            f"itself, the dense one {1e6 * dense:.2g} us in all"
        )
    elif parts["activations"] > 0.5 * dense:
        why = (
            f"packing its inputs and storing its outputs takes {1e6 * parts['activations']:.2g} us "
            f"however little is stored, the dense layer {1e6 * dense:.2g} us"
        )
    else:
        why = "too much is stored at these sparsities for blocks of these shapes"
    return None, (
        f"leave it dense: {'x'.join(map(str, fastest.block))} blocks at {fastest.sparsity:.0%}, "
        f"the fastest of these, are predicted at {fastest.speedup:.2f}x; {why}"
    )


def _sparse(layer: DenseLayer, layout: BlockLayout) -> nn.Module:
    bias = cast("nn.Parameter | None", layer.bias)
    return make_sparse(sparse_type(layer), layer, layout, bias=bias)


@torch.inference_mode()
def _measured(layer: nn.Module, calls: Sequence[Call]) -> float:
    """Seconds of all calls on random numbers, weights in cache."""
    weight = next(layer.parameters())
    generator = torch.Generator().manual_seed(0)
    taken: dict[tuple[int, ...], float] = {}
    for call in calls:
        if call.input_shape not in taken:
            x = torch.randn(call.input_shape, dtype=weight.dtype, generator=generator)
            taken[call.input_shape] = seconds_of_call(lambda x=x: layer(x))
    return sum(taken[call.input_shape] for call in calls)
