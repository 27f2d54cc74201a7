"""Whole networks, dense and sparse: milliseconds per batch, every way of running them in turns."""

import copy
import gc
import itertools
import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

import tetris
from tetris.bench.layers import frozen
from tetris.blocking import removed_count
from tetris.modules import replace_modules
from tetris.timing import Candidate, Durations, Plan, interleave, quartiles

from .convolutions import FORMATS
from .models import MODELS
from .sweep import Row, Step, near_best


@dataclass(frozen=True)
class NetworkGrid:
    """What to measure: (network, batch) pairs, each at every sparsity and thread count."""

    networks: list[tuple[str, int]]
    sparsities: list[float]
    blocks: list[tuple[int, int]]
    threads: list[int]
    compiled: bool
    plan: Plan
    size: int = 224  # of the image

    def steps(self) -> int:
        """How often :func:`run` calls its step."""
        return len(self.networks) * len(self.threads) * len(self.sparsities) * len(self.blocks)


def random_sparse(model: nn.Module, block: tuple[int, int], sparsity: float) -> nn.Module:
    """Random blocks under random orders, in all but the first convolution and the classifier.

    Their number is exact for each layer; depthwise convolutions stay dense too.
    """
    generator = torch.Generator().manual_seed(0)
    layers = {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or (isinstance(module, nn.Conv2d) and module.groups == 1)
    }
    new = {}
    for name, module in list(layers.items())[1:-1]:
        layout = random_layout(module.weight.shape, block, sparsity, generator)
        if isinstance(module, nn.Linear):
            new[name] = tetris.SparseLinear.from_dense(module, layout=layout)
        else:
            new[name] = tetris.SparseConv2d.from_dense(module, layout=layout)
    return replace_modules(copy.deepcopy(model), new)


def random_layout(
    shape: torch.Size, block: tuple[int, int], sparsity: float, generator: torch.Generator
) -> tetris.BlockLayout:
    """Random blocks, as many as a sparsity leaves, under random orders."""
    outputs, inputs, *kernel = shape
    grid = -(-outputs // block[0]), -(-inputs // block[1]) * math.prod(kernel)
    removed = removed_count(sparsity, grid[0] * grid[1])
    order = torch.randperm(grid[0] * grid[1], generator=generator)
    row_perm, col_perm = (torch.randperm(n, generator=generator).int() for n in (outputs, inputs))
    return tetris.BlockLayout.from_block_mask(
        (order >= removed).view(grid),
        block,
        outputs,
        inputs,
        row_perm,
        col_perm,
        kernel_size=tuple(kernel) or None,
    )


def ways(model: nn.Module, x: Tensor, compiled: bool) -> tuple[dict[str, Candidate], list[str]]:
    """Every way to run a network, checked against each other, and what did not work.

    ``eager`` is the model as it is, ``fused`` after :func:`tetris.fuse`, both in both memory
    formats; ``compile`` the model through torch.compile with frozen weights, in channels_last,
    which it would choose itself.
    """
    fused = tetris.fuse(model)
    found: dict[str, Candidate] = {}
    failed: list[str] = []
    for name, memory_format in FORMATS.items():
        image = x.contiguous(memory_format=memory_format)
        for label, network in {"eager": model, "fused": fused}.items():
            made = _in_format(network, memory_format)
            found[f"{label} {name}"] = lambda made=made, image=image: made(image)
        if compiled and memory_format == torch.channels_last:
            try:
                made = _in_format(model, memory_format)
                found[f"compile {name}"] = frozen(made, image)
            except Exception as error:  # a missing compiler, or a part that cannot be compiled
                failed.append(f"compile {name}: {type(error).__name__}")
    want = model(x)
    for way, call in found.items():
        got = call()
        assert isinstance(got, Tensor)
        error = float((got - want).abs().max() / want.abs().max())
        if not error < 1e-3:
            raise RuntimeError(f"{way} computes something else: off by {error:.2g}")
    return found, failed


def _in_format(model: nn.Module, memory_format: torch.memory_format) -> nn.Module:
    """A model in a memory format: itself, or a copy, since ``to`` changes its argument."""
    if memory_format == torch.contiguous_format:
        return model
    return copy.deepcopy(model).to(memory_format=memory_format)  # type: ignore[call-overload]


@torch.no_grad()
def run(grid: NetworkGrid, step: Step) -> Iterator[Row]:
    """Times the networks; slow ways are dropped after a first look, whose times are kept."""
    before = torch.get_num_threads()
    for network, batch in grid.networks:
        torch.manual_seed(0)
        x = torch.randn(batch, 3, grid.size, grid.size)
        model = MODELS[network]()
        for threads in grid.threads:
            torch.set_num_threads(threads)
            torch._dynamo.reset()
            dense, dense_failed = ways(model, x, grid.compiled)
            look = Plan(sample_s=0.0, budget_s=1.0, min_rounds=2, max_rounds=3)
            first = interleave(dense, look)
            dense = near_best(dense, first)
            for block, sparsity in itertools.product(grid.blocks, grid.sparsities):
                pruned = random_sparse(model, block, sparsity)
                sparse, failed = ways(pruned, x, compiled=False)
                group = {f"dense {n}": c for n, c in dense.items()}
                group |= {f"sparse {n}": c for n, c in sparse.items()}
                times = interleave(group, grid.plan)
                yield {
                    "network": network,
                    "batch": batch,
                    "threads": threads,
                    "block": f"{block[0]}x{block[1]}",
                    "sparsity": sparsity,
                    "not_run": "; ".join(
                        [f"dense {f}" for f in dense_failed] + [f"sparse {f}" for f in failed]
                    ),
                    **_comparison(times, {f"dense {n}": t for n, t in first.items()}),
                }
                del pruned, sparse, group
                gc.collect()
                step(
                    f"{network}, batch {batch}, {threads} thread(s), {block[0]}x{block[1]}, "
                    f"{sparsity:.0%}"
                )
    torch.set_num_threads(before)


def _comparison(times: Durations, first: Durations) -> Row:
    medians = {name: 1e3 * float(np.median(t)) for name, t in times.items()}
    dense = min((n for n in times if n.startswith("dense")), key=medians.__getitem__)
    sparse = min((n for n in times if n.startswith("sparse")), key=medians.__getitem__)
    low, speedup, high = quartiles(times[dense] / times[sparse])
    looked = {name: 1e3 * float(np.median(t)) for name, t in first.items()}
    return {
        "sparse": sparse.removeprefix("sparse "),
        "sparse_ms": medians[sparse],
        "dense": dense.removeprefix("dense "),
        "dense_ms": medians[dense],
        "speedup": speedup,
        "speedup_iqr": [low, high],
        "all_ms": {**looked, **medians},  # ways that were dropped: at the first look
    }
