"""From a layer to the quantities its time is made of.

One formula for every family of kernels, each with its own ten positive coefficients (nanoseconds
for each unit):

    time = call + parallel * [more than one thread]
         + norm(fma * norm(1, load / rows, latency / accumulators) * FMAs + block * visits,
                stream * streamed bytes, memory * bytes from memory)
         + read * inputs + write * outputs

``norm`` is a smooth maximum, for the slowest of several things that overlap; what does not overlap
is added. All work is divided by the threads that take part, but not what comes from memory, which
they share.

* An FMA is one vector of tokens (lanes) for one stored weight. A tile of ``rows`` outputs reads a
  vector of x for ``rows`` FMAs: low blocks wait for these loads. A tile with few accumulators waits
  for the FMAs themselves.
* A stored block is visited once by each tile of its height in each panel of tokens.
* Stored values are streamed once for each panel of tokens (strip of lines of a convolution), from
  the second or third level of cache, or from memory when the layer's weights do not stay in cache.
* Inputs are packed and outputs stored once, whatever is left of the weights; or once for each
  kernel position, where the pixels are that it reads (``Problem.windows``).

A dense library's kernels are as high as they like: ``rows`` stands for the tokens (pixels of a row)
that share the load of a weight, and there is a visit for each weight, which is packed in each call.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from .. import _C
from .problem import Problem, Stored

COEFFICIENTS = (
    "call",
    "parallel",
    "fma",
    "load",
    "latency",
    "block",
    "stream",
    "memory",
    "read",
    "write",
)
"""Names of the coefficients of a family."""

FAMILIES = (
    "sparse vector",
    "sparse linear",
    "sparse convolution",
    "dense vector",
    "dense linear",
    "dense convolution",
    "dense pointwise",
)
"""Families of kernels; ``vector`` is a linear layer on one token, ``pointwise`` a 1x1 convolution.
"""

_POWER = 3.0  # of the smooth maximum
_WORK_PER_THREAD = 1 << 18  # multiply-adds: csrc/cpu/parallel.h


class Tiles(NamedTuple):
    """What an instruction set offers; see csrc/cpu/isa_*.cpp.

    Attributes:
        lanes: float32 of a vector.
        rows: Tallest tile.
        narrow_rows: Tallest tile of a panel of one vector.
        vectors: (least height of a block, vectors of a panel), tallest first. Where L2 does not
            hold a panel, low ones and those of short rows take narrower panels (csrc/cpu/bsmm.cpp,
            choose_blocking), which is left out here.
        conv_vectors: The same of a convolution.
    """

    lanes: int
    rows: int
    narrow_rows: int
    vectors: tuple[tuple[int, int], ...]
    conv_vectors: tuple[tuple[int, int], ...]


_AVX2 = ((3, 3), (2, 4), (1, 8))
_SCALAR = ((3, 2), (2, 4), (1, 8))
TILES = {
    "avx512": Tiles(16, 8, 16, ((5, 2), (1, 4)), ((5, 3), (1, 4))),
    "avx2": Tiles(8, 4, 4, _AVX2, _AVX2),
    "scalar": Tiles(4, 4, 4, _SCALAR, _SCALAR),
}


@dataclass(frozen=True)
class Point:
    """A layer to predict the time of, or to measure.

    Attributes:
        problem: The layer on an input.
        stored: What it stores; None of a dense layer.
        cold: Its weights come from memory in each call, as in a network that cache cannot hold.

    Example:
        >>> Point(Problem.linear(tokens=1, inputs=768, outputs=3072), cold=True).family
        'dense vector'
    """

    problem: Problem
    stored: Stored | None = None
    cold: bool = False

    @property
    def family(self) -> str:
        """The kernels that it runs on."""
        kind = "dense" if self.stored is None else "sparse"
        p = self.problem
        if p.kernel is None:
            return f"{kind} vector" if p.tokens == 1 else f"{kind} linear"
        if self.stored is None and p.taps == 1:
            return "dense pointwise"
        return f"{kind} convolution"


def features(point: Point, threads: int, isa: str) -> NDArray[np.float64]:
    """One number for each coefficient, in their order."""
    if point.stored is None:
        return _dense(point.problem, point.cold, threads)
    return _sparse(point.problem, point.stored, point.cold, threads, TILES[isa])


def seconds(f: NDArray[np.float64], coefficients: NDArray[np.float64]) -> NDArray[np.float64]:
    """The formula; ``f`` is [points, 10], ``coefficients`` [10]."""
    call, parallel, fma, load, latency, block, stream, memory, read, write = coefficients
    each = _norm(np.ones(len(f)), load * f[:, 3], latency * f[:, 4])
    work = _norm(fma * f[:, 2] * each + block * f[:, 5], stream * f[:, 6], memory * f[:, 7])
    moved = read * f[:, 8] + write * f[:, 9]
    return 1e-9 * (call * f[:, 0] + parallel * f[:, 1] + work + moved)


def parts(f: NDArray[np.float64], coefficients: NDArray[np.float64]) -> dict[str, float]:
    """Seconds of one point, ``f`` [10], by what they are spent on: call, weights, activations."""
    calls, moving = coefficients.copy(), coefficients.copy()
    calls[2:] = 0.0
    moving[:8] = 0.0
    every, call, moved = (float(seconds(f[None], c)[0]) for c in (coefficients, calls, moving))
    return {"call": call, "weights": every - call - moved, "activations": moved}


def _norm(*parts: NDArray[np.float64]) -> NDArray[np.float64]:
    return sum(part**_POWER for part in parts) ** (1 / _POWER)


def _sparse(
    p: Problem, stored: Stored, cold: bool, threads: int, isa: Tiles
) -> NDArray[np.float64]:
    bo = min(stored.block[0], p.outputs // p.groups)
    if p.kernel is None and p.tokens == 1:
        used = _useful_threads(stored.values, threads)
        units, panels, rows, accumulators = 1.0 / isa.lanes, 1, bo, bo
        visits = stored.blocks
    else:
        used = _useful_threads((stored.values + 4 * (p.inputs + p.outputs)) * p.computed, threads)
        units = math.ceil(p.computed / isa.lanes)
        preferred = isa.conv_vectors if p.kernel else isa.vectors
        vectors = min(next(v for height, v in preferred if bo >= height), units)
        tallest = isa.narrow_rows if vectors == 1 else isa.rows
        tiles = math.ceil(bo / tallest)
        rows = bo / tiles
        accumulators = rows * vectors
        visits = stored.blocks * tiles * math.ceil(units / vectors)
        if p.kernel is None:
            panels = math.ceil(units / vectors)
        else:
            channels = p.inputs // p.groups
            strip = _C.l2_cache_bytes() // 2  # bytes of its lines: csrc/cpu/conv_plan.cpp
            panels = max(1, math.ceil(4 * channels * p.computed / strip))
    return np.array(
        [
            1.0,
            float(used > 1),
            stored.values * units / used,
            1.0 / rows,
            1.0 / accumulators,
            visits / used,
            stored.bytes * panels / used,
            stored.bytes * float(cold),
            p.inputs * (p.windows or p.sources) / used,
            p.outputs * max(2 * p.windows, p.tokens) / used,
        ]
    )


def _dense(p: Problem, cold: bool, threads: int) -> NDArray[np.float64]:
    if p.kernel is None:
        fmas, sharing = p.tokens * p.weights / 16, p.tokens
    else:  # channels are computed by vectors

        def padded(channels: int) -> int:
            return 16 * math.ceil(channels / 16)

        inputs, outputs = padded(p.inputs // p.groups), padded(p.outputs // p.groups)
        # padding is skipped
        positions = p.windows or p.tokens * p.taps
        fmas = positions * inputs * outputs * p.groups / 16
        sharing = p.width
    used = _useful_threads(16 * fmas, threads)
    return np.array(
        [
            1.0,
            float(used > 1),
            fmas / used,
            1.0 / sharing,
            0.0,
            p.weights / used,
            4.0 * p.weights / used,
            4.0 * p.weights * cold,
            p.inputs * p.sources / used,
            p.outputs * p.tokens / used,
        ]
    )


def _useful_threads(work: float, threads: int) -> int:
    return int(min(max(work // _WORK_PER_THREAD, 1), threads))
