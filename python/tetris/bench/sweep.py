"""Measures a grid of layers and returns plain rows, ready for JSON."""

import gc
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from .. import _C
from ..machine import last_level_bytes
from ..timing import Candidate, Durations, Plan, interleave, quartiles
from .layers import Shape, SparseLayer, dense_candidates, sparse_candidate

Row = dict[str, Any]
Step = Callable[[str], None]  # called once per finished group, with its name

FEW_TOKENS = 16  # up to here weights come from memory, not from cache
GROUP = 4  # sparse candidates between two turns of the dense baselines
MOST_DENSE, MOST_SPARSE = 64, 1024  # copies of a layer; each dense one may have to be compiled


@dataclass(frozen=True)
class Grid:
    """What to measure."""

    shapes: list[Shape]
    blocks: list[tuple[int, int]]
    sparsities: list[float]
    threads: list[int]
    compiled: bool
    plan: Plan

    def groups(self) -> list[tuple[Shape, int, float, list[tuple[int, int]]]]:
        """Groups of candidates that are timed together with the dense baselines."""
        return [
            (shape, threads, sparsity, self.blocks[first : first + GROUP])
            for shape in self.shapes
            for threads in self.threads
            for sparsity in self.sparsities
            for first in range(0, len(self.blocks), GROUP)
        ]


def fma_peak(seconds: float = 0.5) -> float:
    """Measured FMA peak of one core for the instruction set in use, FLOP/s."""
    return _C.fma_peak(seconds)


def copies_for(tokens: int, layer_bytes: int, most: int) -> int:
    """How many copies of a layer make it come from memory on every call.

    With few tokens a network streams its weights: every other layer runs in between, so its
    weights are not in cache. Here copies take turns until together they fill the last-level
    cache three times. With more tokens the same layer is called again and again: what of it the
    last-level cache holds is warm, which may be a sparse layer and not the dense one.
    """
    if tokens > FEW_TOKENS:
        return 1
    return int(np.clip(np.ceil(3 * last_level_bytes() / layer_bytes), 1, most))


def weights_from(tokens: int, layer_bytes: int, copies: int) -> str:
    """Where the weights are when a call starts, for the table."""
    if tokens > FEW_TOKENS:
        return "warm" if layer_bytes < last_level_bytes() else "larger than the cache"
    far = copies * layer_bytes >= 2 * last_level_bytes()
    return f"{'memory' if far else 'in part from memory'}, {copies} copies"


@torch.inference_mode()
def run(grid: Grid, step: Step) -> Iterator[Row]:
    """Times the grid group by group, slow dense baselines dropped after a first look."""
    dense: dict[str, Candidate] = {}
    layers: dict[tuple, SparseLayer] = {}
    x = torch.empty(0)
    at: tuple[Shape, int] | None = None
    peak = None
    for shape, threads, sparsity, blocks in grid.groups():
        if at is None or at[0] != shape:
            layers.clear()
            x = torch.randn(shape.tokens, shape.inputs, generator=torch.Generator().manual_seed(0))
        if at != (shape, threads):
            torch.set_num_threads(threads)
            dense = fast_dense(shape, x, grid)
            peak = fma_peak()
            at = (shape, threads)
        group = dict(dense)
        copies = {}
        for block in blocks:
            key = (block, sparsity)
            if key not in layers:
                layers[key] = SparseLayer.random(shape.inputs, shape.outputs, *key)
            layers[key].check(x)
            copies[block] = copies_for(shape.tokens, layers[key].stored_bytes, MOST_SPARSE)
            group[block_name(block)] = sparse_candidate(layers[key], x, copies[block])
        times = interleave(group, grid.plan)
        for block in blocks:
            group[block_name(block)]()
            yield _row(
                shape,
                threads,
                sparsity,
                layers[block, sparsity],
                times[block_name(block)],
                {name: times[name] for name in dense},
                copies[block],
                peak,
            )
        del group
        gc.collect()
        step(f"{shape}, {threads} thread{'s' * (threads > 1)}, {sparsity:.0%}")


def fast_dense(shape: Shape, x: torch.Tensor, grid: Grid) -> dict[str, Candidate]:
    """The dense baselines worth interleaving: those whose best time is near the very best.

    Best times, because a disturbance must not drop a baseline and flatter the sparse side.
    """
    random = torch.Generator().manual_seed(1)  # the inputs have 0
    weight = torch.randn(shape.outputs, shape.inputs, generator=random) / shape.inputs**0.5
    copies = copies_for(shape.tokens, 4 * weight.numel(), MOST_DENSE)
    candidates = dense_candidates(x, weight, copies, grid.compiled)
    check_agreement(candidates)
    return near_best(
        candidates, interleave(candidates, Plan(budget_s=1.5, min_rounds=3, max_rounds=8))
    )


def check_agreement(candidates: dict[str, Candidate]) -> None:
    """Raises unless all dense routes compute the same."""
    first, *others = candidates
    expected = candidates[first]()
    for name in others:
        torch.testing.assert_close(
            candidates[name](), expected, rtol=1e-3, atol=1e-3, msg=lambda m, n=name: f"{n}: {m}"
        )


def near_best(candidates: dict[str, Candidate], times: Durations) -> dict[str, Candidate]:
    """The candidates whose best time is within 30 % of the very best."""
    best = min(t.min() for t in times.values())
    return {name: c for name, c in candidates.items() if times[name].min() < 1.3 * best}


def comparison(sparse: np.ndarray, dense: Durations, density: float) -> Row:
    """The part of a row that says how a sparse candidate did against the fastest dense one."""
    best = min(dense, key=lambda name: float(np.median(dense[name])))
    low, median, high = quartiles(sparse)
    dense_low, dense_median, dense_high = quartiles(dense[best])
    # paired by round: a machine that slows down for a while slows both
    ratio_low, speedup, ratio_high = quartiles(dense[best] / sparse)
    return {
        "sparse_ms": 1e3 * median,
        "sparse_iqr_ms": [1e3 * low, 1e3 * high],
        "dense_ms": 1e3 * dense_median,
        "dense_iqr_ms": [1e3 * dense_low, 1e3 * dense_high],
        "dense": best,
        "all_dense_ms": {name: 1e3 * float(np.median(t)) for name, t in dense.items()},
        "rounds": len(sparse),
        "speedup": speedup,
        "speedup_iqr": [ratio_low, ratio_high],
        "efficiency": speedup * density,
    }


def block_name(block: tuple[int, int]) -> str:
    """``16x1``: height x width."""
    return f"{block[0]}x{block[1]}"


def _row(
    shape: Shape,
    threads: int,
    sparsity: float,
    layer: SparseLayer,
    sparse: np.ndarray,
    dense: dict[str, np.ndarray],
    copies: int,
    peak: float | None,
) -> Row:
    stored = 2 * shape.tokens * layer.entries
    median = float(np.median(sparse))
    against = comparison(sparse, dense, layer.density)
    dense_bytes = 4 * shape.inputs * shape.outputs
    return {
        "isa": _C.isa_in_use(),
        "threads": threads,
        "shape": str(shape),
        "tokens": shape.tokens,
        "block": block_name(layer.block),
        "sparsity": sparsity,
        "density": layer.density,
        "cache": weights_from(shape.tokens, layer.stored_bytes, copies),
        "kernel": _C.last_kernel(),
        **against,
        "stored_gflops": stored / median / 1e9,
        "equivalent_gflops": shape.flops / median / 1e9,
        "dense_gflops": shape.flops / float(np.median(dense[str(against["dense"])])) / 1e9,
        "peak_share": stored / median / (peak * threads) if peak else None,
        "bytes_ratio": dense_bytes / layer.stored_bytes,
    }
