"""Measures a grid of convolutions and returns plain rows, ready for JSON."""

import gc
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch

import tetris
from tetris.timing import Durations, Plan, interleave

from .convolutions import ConvShape, SparseConv, dense_convolutions
from .sweep import Row, Step, check_agreement, comparison, near_best

FIRST_LOOK = Plan(sample_s=0.004, budget_s=0.5, min_rounds=3, max_rounds=5)


@dataclass(frozen=True)
class ConvGrid:
    """What to measure; ``layers`` maps each layer to the networks that have it."""

    layers: dict[ConvShape, list[str]]
    blocks: list[tuple[int, int]]
    sparsities: list[float]
    threads: list[int]
    plan: Plan

    def steps(self) -> int:
        """How often :func:`run` calls its step."""
        return len(self.layers) * len(self.threads) * len(self.sparsities)


@torch.inference_mode()
def run(grid: ConvGrid, step: Step) -> Iterator[Row]:
    """Times layer by layer: all blocks of one sparsity in turns with the dense routes.

    What is timed is checked first: sparse layers against float64, dense routes against each other.
    """
    before = torch.get_num_threads()
    for shape, networks in grid.layers.items():
        x = torch.randn(shape.input_shape, generator=torch.Generator().manual_seed(0))
        dense = dense_convolutions(shape, x)
        check_agreement(dense)
        layers: dict[tuple, SparseConv] = {}
        for threads in grid.threads:
            torch.set_num_threads(threads)
            first = interleave(dense, FIRST_LOOK)
            rivals = near_best(dense, first)
            torchs = min(_of_torch(first), key=lambda name, first=first: float(first[name].min()))
            rivals[torchs] = dense[torchs]  # what a user has is compared with even if far behind
            for sparsity in grid.sparsities:
                group = dict(rivals)
                for block in grid.blocks:
                    if (block, sparsity) not in layers:
                        layers[block, sparsity] = SparseConv.random(shape, block, sparsity)
                    layer = layers[block, sparsity]
                    layer.check(x)
                    group[_name(block)] = lambda layer=layer, x=x: layer(x)
                times = interleave(group, grid.plan)
                for block in grid.blocks:
                    group[_name(block)]()
                    row = _row(layers[block, sparsity], times, list(rivals), first)
                    yield {"threads": threads, "networks": networks, "sparsity": sparsity, **row}
                step(f"{shape}, {threads} thread{'s' * (threads > 1)}, {sparsity:.0%}")
        gc.collect()
    torch.set_num_threads(before)


def _name(block: tuple[int, int]) -> str:
    return f"{block[0]}x{block[1]}"


def _of_torch(times: Durations) -> Durations:
    """The routes that nn.Conv2d takes."""
    return {name: t for name, t in times.items() if name.startswith("F.conv2d")}


def _row(layer: SparseConv, times: Durations, rivals: list[str], first: Durations) -> Row:
    shape, sparse = layer.shape, times[_name(layer.block)]
    seconds = float(np.median(sparse))
    against = comparison(sparse, {name: times[name] for name in rivals}, layer.density)
    conv2d = comparison(sparse, _of_torch({n: times[n] for n in rivals}), layer.density)
    looked = {name: 1e3 * float(np.median(t)) for name, t in first.items()}
    return {
        "isa": tetris._C.isa_in_use(),
        "shape": str(shape),
        "batch": shape.batch,
        "kernel_size": shape.kernel,
        "stride": shape.stride,
        "map": shape.size,
        "block": _name(layer.block),
        "density": layer.density,
        "kernel": tetris._C.last_kernel(),
        **against,
        "conv2d": {k: conv2d[k] for k in ("dense", "dense_ms", "speedup", "efficiency")},
        "all_dense_ms": {**looked, **against["all_dense_ms"]},  # slow ones: at the first look
        "stored_gflops": 2e-9 * shape.pixels * layer.entries / seconds,
        "equivalent_gflops": 1e-9 * shape.flops / seconds,
        "dense_gflops": 1e-6 * shape.flops / against["dense_ms"],
    }
