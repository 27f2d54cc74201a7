"""The sweeps beside that of ``tetris bench``: sparse peers, and training steps."""

from collections.abc import Iterator

import numpy as np
import torch

import tetris
from tetris.bench.layers import Shape, SparseLayer, dense_steps
from tetris.bench.sweep import (
    FEW_TOKENS,
    Grid,
    Row,
    Step,
    block_name,
    check_agreement,
    comparison,
    fast_dense,
    fma_peak,
    near_best,
    run,
)
from tetris.timing import Plan, interleave, quartiles

from .rivals import rival_candidates

__all__ = [
    "FEW_TOKENS",
    "Grid",
    "Row",
    "Step",
    "check_agreement",
    "comparison",
    "fma_peak",
    "near_best",
    "run",
    "run_rivals",
    "run_training",
]


@torch.inference_mode()
def run_rivals(shape: Shape, points: list[tuple[tuple[int, int], float]], step: Step):
    """Sparse peers at a few points, on one thread (scipy has no more)."""
    torch.set_num_threads(1)
    x = torch.randn(shape.tokens, shape.inputs, generator=torch.Generator().manual_seed(0))
    grid = Grid([shape], [], [], [1], False, Plan())
    dense = fast_dense(shape, x, grid)
    for block, sparsity in points:
        layer = SparseLayer.random(shape.inputs, shape.outputs, block, sparsity)
        group = {**dense, "tetris": lambda layer=layer: layer(x), **rival_candidates(layer, x)}
        times = interleave(group, Plan(budget_s=4.0, min_rounds=3, max_rounds=5))
        medians = {name: 1e3 * float(np.median(t)) for name, t in times.items()}
        best = min(medians[name] for name in dense)
        for name in group:
            if name not in dense:
                yield {
                    "name": name,
                    "shape": str(shape),
                    "block": block_name(block),
                    "sparsity": sparsity,
                    "ms": medians[name],
                    "dense_ms": best,
                    "speedup": best / medians[name],
                }
        step(f"peers, {block_name(block)}, {sparsity:.0%}")


def run_training(grid: Grid, step: Step) -> Iterator[Row]:
    """A training step of the layer (forward, dX, dValues) against the fastest dense one.

    Dense is autograd through F.linear, as a user has it, and oneDNN's three products, which torch
    does not use in training by itself but are faster than MKL on some machines.
    """
    for shape in grid.shapes:
        random = torch.Generator().manual_seed(0)
        x = torch.randn(shape.tokens, shape.inputs, generator=random).requires_grad_()
        grad = torch.randn(shape.tokens, shape.outputs, generator=random)
        weight = torch.randn(shape.outputs, shape.inputs, generator=random).requires_grad_()
        rivals = dense_steps(x, weight, grad)

        for threads in grid.threads:
            torch.set_num_threads(threads)
            for sparsity in grid.sparsities:
                group = dict(rivals)
                densities = {}
                for block in grid.blocks:
                    layer = SparseLayer.random(shape.inputs, shape.outputs, block, sparsity)
                    layer.check(x.detach())
                    layer.values.requires_grad_()
                    densities[block_name(block)] = layer.density

                    def sparse(x=x, grad=grad, layer=layer) -> object:
                        return torch.autograd.grad(layer(x), (x, layer.values), grad)

                    group[block_name(block)] = sparse
                times = interleave(group, grid.plan)
                best = min(rivals, key=lambda name: float(np.median(times[name])))
                dense_ms = 1e3 * float(np.median(times[best]))
                for name, density in densities.items():
                    low, speedup, high = quartiles(times[best] / times[name])
                    sparse_ms = 1e3 * float(np.median(times[name]))
                    yield {
                        "isa": tetris._C.isa_in_use(),
                        "threads": threads,
                        "shape": str(shape),
                        "block": name,
                        "sparsity": sparsity,
                        "density": density,
                        "sparse_ms": sparse_ms,
                        "dense_ms": dense_ms,
                        "dense": best,
                        "speedup": speedup,
                        "speedup_iqr": [low, high],
                        "efficiency": speedup * density,
                    }
                step(f"training {shape}, {sparsity:.0%}")
