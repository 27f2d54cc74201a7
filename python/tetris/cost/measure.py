"""The layers that calibration measures, and their time."""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
from torch import nn

from ..layout import BlockLayout
from ..machine import last_level_bytes
from ..nn.base import make_sparse
from ..nn.kinds import DenseLayer, sparse_type
from ..timing import rotate
from .features import Point
from .model import come_from_memory
from .problem import Problem, Stored

BLOCKS = ((1, 1), (2, 1), (4, 1), (8, 1), (16, 1), (32, 1), (4, 4), (8, 8), (16, 16), (32, 32))
"""Blocks that samples have."""
SPARSITIES = (0.5, 0.65, 0.75, 0.85, 0.9, 0.95)
"""Sparsities that samples have."""

_TIMED_S = 0.002  # shorter than a time slice of the system: most run undisturbed
_LEAST = 5  # timed at least so often ...
_PATIENCE_S = 0.5  # ... but no longer than this, on a machine that others use
_MOST_COPIES = 64
_MOST_WORK = 1 << 30  # multiply-adds of the dense layer: some hundredths of a second

T = TypeVar("T")


@dataclass(frozen=True)
class Sample:
    """A layer to measure.

    Attributes:
        layer: Dense, on the meta device: its sizes.
        input_shape: Of its input.
        block: (bo, bi) of a sparse layer; None of a dense one.
        sparsity: Removed share of the blocks.
        cold: Its weights come from memory.
    """

    layer: nn.Linear | nn.Conv2d
    input_shape: tuple[int, ...]
    block: tuple[int, int] | None = None
    sparsity: float = 0.0
    cold: bool = False

    @property
    def point(self) -> Point:
        """What a model predicts the time of."""
        output = self.layer(torch.empty(self.input_shape, device="meta"))
        problem = Problem.of(self.layer, self.input_shape, output.shape)
        stored = None if self.block is None else Stored.of(problem, self.block, self.sparsity)
        size = 4 * problem.weights if stored is None else stored.bytes
        return Point(problem, stored, self.cold or come_from_memory(size))


class Draw:
    """Random layers, their sizes spread evenly on a scale of logarithms.

    Layers of transformers and of ResNets lie within. Two seeds share hardly any layer.
    """

    def __init__(self, seed: int) -> None:
        self.rng = np.random.default_rng(seed)

    def samples(self, count: int) -> Iterator[Sample]:
        """As many sparse ones of each kind of layer as ``count``, and half as many dense ones."""
        for i in range(count):
            yield from self._round(sparse=True)
            if i % 2 == 0:
                yield from self._round(sparse=False)

    def _round(self, sparse: bool) -> Iterator[Sample]:
        yield self._sample(*self._linear(1), sparse)
        yield self._sample(*self._linear(self._size(2, 32)), sparse)
        yield self._sample(*self._linear(self._size(16, 2048)), sparse)
        yield self._sample(*self._convolution(3), sparse)
        yield self._sample(*self._convolution(1), sparse)

    def _sample(
        self, layer: nn.Linear | nn.Conv2d, input_shape: tuple[int, ...], sparse: bool
    ) -> Sample:
        few = isinstance(layer, nn.Linear) and input_shape[0] <= 32
        cold = few and bool(self.rng.random() < 0.5)
        if not sparse:
            return Sample(layer, input_shape, cold=cold)
        groups = 1 if isinstance(layer, nn.Linear) else layer.groups
        smallest = min(layer.weight.shape[0] // groups, layer.weight.shape[1])
        block = self._one(tuple(b for b in BLOCKS if 2 * max(b) <= smallest))
        return Sample(layer, input_shape, block, self._one(SPARSITIES), cold)

    def _linear(self, tokens: int) -> tuple[nn.Linear, tuple[int, ...]]:
        inputs, outputs = self._size(64, 4096, 16), self._size(64, 4096, 16)
        tokens = max(1, min(tokens, _MOST_WORK // (inputs * outputs)))
        return nn.Linear(inputs, outputs, device="meta"), (tokens, inputs)

    def _convolution(self, side: int) -> tuple[nn.Conv2d, tuple[int, ...]]:
        while True:
            rows, batch = self._one((7, 10, 14, 20, 28, 40, 56)), self._one((1, 1, 2, 4, 8))
            inputs, outputs = self._size(16, 1024, 8), self._size(16, 1024, 8)
            stride = self._one((1, 1, 1, 2))
            groups = self._one((1, 1, 1, 2, 4))
            if inputs % groups or outputs % groups or min(inputs, outputs) // groups < 16:
                groups = 1
            work = batch * (rows // stride) ** 2 * side**2 * inputs * outputs // groups
            if work <= _MOST_WORK:
                layer = nn.Conv2d(
                    inputs, outputs, side, stride, side // 2, groups=groups, device="meta"
                )
                return layer, (batch, inputs, rows, rows)

    def _size(self, low: int, high: int, multiple: int = 1) -> int:
        drawn = math.exp(self.rng.uniform(math.log(low), math.log(high)))
        return max(multiple, round(drawn / multiple) * multiple)

    def _one(self, items: tuple[T, ...]) -> T:
        return items[self.rng.integers(len(items))]


def random_layout(
    point: Point, generator: torch.Generator, *, reordered: bool = True, tied: int = 1
) -> BlockLayout:
    """Blocks at random, their number exact and at least one in each block row.

    Args:
        point: A sparse layer.
        generator: Of random numbers on the CPU.
        reordered: In random orders of rows and columns; else in the order as it is, which saves
            the kernels a gather.
        tied: As many kernel positions have the same blocks: all of them, with ``tie_kernel``.
    """
    problem, stored = point.problem, point.stored
    assert stored is not None
    blocking = problem.blocking(stored.block)
    rows, columns = blocking.grid
    columns //= tied  # kernel positions come one after the other
    worth = torch.rand(rows, columns, generator=generator)
    worth[torch.arange(rows), torch.randint(columns, (rows,), generator=generator)] = 2.0
    kept = torch.zeros(rows * columns, dtype=torch.bool)
    kept[worth.flatten().topk(stored.blocks // tied, sorted=False).indices] = True

    def order(size: int) -> torch.Tensor | None:
        if not reordered:
            return None
        own = size // problem.groups
        parts = [torch.randperm(own, generator=generator) + own * g for g in range(problem.groups)]
        return torch.cat(parts).to(torch.int32)

    return BlockLayout.from_block_mask(
        kept.view(rows, columns).repeat(1, tied),
        stored.block,
        problem.outputs,
        problem.inputs,
        order(problem.outputs),
        order(problem.inputs),
        kernel_size=problem.kernel,
        groups=problem.groups,
    )


@torch.inference_mode()
def measure(sample: Sample, seed: int = 0) -> float:
    """Seconds of one call on torch's current number of threads.

    The lower quartile of many short measurements, so that other work on the machine counts little.
    A cold layer takes turns with copies of itself that together are twice the last-level cache.
    """
    generator = torch.Generator().manual_seed(seed)
    point = sample.point
    layer: nn.Module = copy.deepcopy(sample.layer).to_empty(device="cpu")
    for parameter in layer.parameters():
        parameter.data.normal_(generator=generator).mul_(point.problem.weight_shape[1] ** -0.5)
    size = 4 * point.problem.weights
    if point.stored is not None:
        dense: DenseLayer = layer  # type: ignore[assignment]
        layout = random_layout(point, generator)
        bias: nn.Parameter = dense.bias  # type: ignore[assignment]
        layer = make_sparse(sparse_type(dense), dense, layout, bias=bias)
        size = point.stored.bytes
    copies = math.ceil(2 * last_level_bytes() / size) if sample.cold else 1
    layers = [layer, *(copy.deepcopy(layer) for _ in range(min(copies, _MOST_COPIES) - 1))]
    x = torch.randn(sample.input_shape, generator=generator)
    return seconds_of_call(rotate([lambda layer=layer: layer(x) for layer in layers]), len(layers))


def clock() -> Callable[[], float]:
    """What to measure with on torch's current number of threads.

    On one thread it is the thread's own time that counts: while the system runs something else, it
    stands still. Several threads wait for each other, and only the clock on the wall counts that.
    """
    return time.thread_time if torch.get_num_threads() == 1 else time.perf_counter


def seconds_of_call(call: Callable[[], object], once: int = 1) -> float:
    """Lower quartile of the seconds of a call; ``once`` calls come first, untimed."""
    now = clock()
    for _ in range(once):
        call()
    started = now()
    call()
    repeats = max(1, math.ceil(_TIMED_S / max(now() - started, 1e-6)))
    taken: list[float] = []
    begun = time.perf_counter()
    while len(taken) < _LEAST or sum(taken) * repeats < 20 * _TIMED_S:
        started = now()
        for _ in range(repeats):
            call()
        taken.append((now() - started) / repeats)
        if time.perf_counter() - begun > _PATIENCE_S:
            break
    return float(np.percentile(taken, 25))
