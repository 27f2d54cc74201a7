"""``tetris tune``: measure which CUDA kernel is fastest for the shapes of a model."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from . import _C, tuning
from .checks import how_to_build_cuda
from .layout import BlockLayout
from .tuning import Measurement

DTYPES = {
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "float32": torch.float32,
}


@dataclass(frozen=True)
class Problem:
    """Products of one layer: [tokens, in] to [tokens, out] in blocks, a share of them stored."""

    tokens: int
    in_features: int
    out_features: int
    block: tuple[int, int]
    sparsity: float
    dtype: str

    def __str__(self) -> str:
        return (
            f"{self.tokens}x{self.in_features}x{self.out_features} {self.block[0]}x{self.block[1]} "
            f"{100 * self.sparsity:g} % {self.dtype}"
        )


def random_layout(problem: Problem, seed: int = 0) -> BlockLayout:
    """Blocks kept at random, in the order they come in."""
    (bo, bi), g = problem.block, torch.Generator().manual_seed(seed)
    rows, columns = -(-problem.out_features // bo), -(-problem.in_features // bi)
    kept = torch.rand(rows, columns, generator=g) >= problem.sparsity
    return BlockLayout.from_block_mask(
        kept, problem.block, problem.out_features, problem.in_features
    )


def calls(problem: Problem, device: str, training: bool) -> dict[str, Callable[[], Tensor]]:
    """The ops of a problem by name, ready to run: forward, and with ``training`` the gradients."""
    layout = random_layout(problem).to(device)
    dtype, (bo, bi) = DTYPES[problem.dtype], problem.block
    random = torch.Generator(device).manual_seed(0)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, device=device, dtype=dtype, generator=random)

    x = draw(problem.tokens, problem.in_features)
    values = draw(layout.nnz_blocks, bi, bo)
    ops = torch.ops.tetris
    result = {
        "forward": lambda: ops.bsmm(x, values, *layout.index, None, problem.out_features, "none")
    }
    if training:
        dy = draw(problem.tokens, problem.out_features)
        result["dx"] = lambda: ops.bsmm_grad_input(dy, values, *layout.index, problem.in_features)
        result["dvalues"] = lambda: ops.bsmm_grad_values(x, dy, *layout.index, bo, bi)
    return result


def time_on_gpu(call: Callable[[], object], rounds: int = 15) -> float:
    """Median seconds of a call, by events, each time with other data in L2."""
    flush = torch.empty(256 << 20, dtype=torch.int8, device="cuda")
    times = []
    for _ in range(rounds + 2):
        flush.zero_()
        torch.cuda._sleep(300_000)  # clocks: the host has launched all before the GPU gets there
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1000)
    return statistics.median(times[2:])


def tune(
    named: Iterable[tuple[str, Callable[[], object]]],
    timer: Callable[[Callable[[], object]], float] = time_on_gpu,
    report: Callable[[str], None] = print,
) -> dict[str, dict[str, Measurement]]:
    """Measure every kernel that could run each call, and keep the fastest.

    Args:
        named: Names and calls, each of one op.
        timer: Seconds of a call.
        report: Takes one line per call.

    Returns:
        Device name -> problem -> measurement.
    """
    found: dict[str, dict[str, Measurement]] = {}
    for name, call in named:
        _C.cuda_watch(True)
        try:
            call()
            watched = _C.cuda_watched()
        finally:
            _C.cuda_watch(False)
        for device, key, candidates in watched:
            guess, times = candidates[0], {}
            for candidate in candidates:
                _C.cuda_force_kernel(candidate)
                try:
                    call()
                    times[candidate] = timer(call)
                except RuntimeError as error:  # say, too many stages for this GPU's shared memory
                    report(f"{name}: {candidate} does not run: {error}")
                finally:
                    _C.cuda_force_kernel("")
            if guess not in times:
                raise RuntimeError(f"tetris tune: {name}: the library's own choice did not run")
            best = min(times, key=times.__getitem__)
            found.setdefault(device, {})[key] = Measurement(best, times[best], guess, times[guess])
            report(
                f"{name}: {best} {1e6 * times[best]:.1f} us "
                f"(the guess, {guess}: {1e6 * times[guess]:.1f} us)"
            )
    return found


def run(problems: Iterable[Problem], training: bool) -> list[str]:
    """Tune for problems on the current GPU and write the files; their paths."""
    if not _C.cuda_built():
        raise ValueError(
            f"this build of tetris has no CUDA kernels to tune ({_C.cuda_why()}): "
            f"{how_to_build_cuda()}"
        )
    if not torch.cuda.is_available():
        raise ValueError("tuning measures on a GPU, and torch sees none")
    named = (
        (f"{problem} {op}", call)
        for problem in problems
        for op, call in calls(problem, "cuda", training).items()
    )
    paths = []
    for device, measured in tune(named).items():
        everything = {**tuning.loaded.get(device, {}), **measured}
        tuning.apply(device, everything)
        paths.append(str(tuning.save(device, everything)))
    return paths
