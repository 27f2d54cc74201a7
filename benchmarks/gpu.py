"""Block-sparse products on a GPU against cuBLAS, cuDNN and torch's own block-sparse product.

    python -m benchmarks.gpu --section matmul --seconds 60 --out build/matmul.json
    python -m benchmarks.gpu_report build benchmarks/results     tables and figures of all sections

`make gpu-check` runs every section in a process of its own. A section measures its most important
points first, writes what it has after each and ends when its time is over.

Contenders of a point are timed in turns, by events on the stream, each time with L2 full of other
data (a buffer as large as it is written before each call); medians count. Inputs are random
normal: zeros draw less power and run faster. The roofline of a point is the larger of two times:
products at cuBLAS's own measured rate for this shape, times block height / 128 below 128 (an
activation that comes from L2 serves that many outputs; L2 gives a multiprocessor about 32 bytes a
clock), and each operand's bytes once at the speed of a copy.
"""

import argparse
import functools
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional as F

import tetris

Calls = dict[str, Callable[[], object]]
BLOCKS = [(128, 128), (128, 16), (64, 64), (64, 16), (32, 32), (16, 16), (8, 8), (4, 1), (1, 1)]
SPARSITIES = [0.9, 0.75, 0.5, 0.95]
ROUNDS = 11
HEAD_START = 300_000  # clocks, some 150 microseconds


@dataclass
class Layer:
    """A random block-sparse weight on the device."""

    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    row_perm: Tensor | None
    col_perm: Tensor | None
    shape: tuple[int, int]
    block: tuple[int, int]

    @property
    def index(self):
        """As the ops take it."""
        return self.row_ptr, self.col_idx, self.row_perm, self.col_perm

    @property
    def stored(self) -> int:
        """Numbers."""
        return self.values.numel()


def make_layer(out, inputs, block, sparsity, dtype, perm="none", taps=1, seed=0) -> Layer:
    """Blocks kept at random; rows differ in length as real ones do."""
    g = torch.Generator("cuda").manual_seed(seed)
    bo, bi = block
    rows, columns = -(-out // bo), taps * -(-inputs // bi)
    kept = torch.rand(rows, columns, device="cuda", generator=g) >= sparsity
    col_idx = kept.nonzero()[:, 1].int()
    row_ptr = F.pad(kept.sum(1).cumsum(0), (1, 0)).int()
    permutation = functools.partial(torch.randperm, device="cuda", generator=g)
    return Layer(
        torch.randn(col_idx.numel(), bi, bo, device="cuda", dtype=dtype, generator=g),
        row_ptr,
        col_idx,
        permutation(out).int() if perm in ("rows", "both") else None,
        permutation(inputs).int() if perm in ("cols", "both") else None,
        (out, inputs),
        block,
    )


def randn(*size, dtype=torch.bfloat16) -> Tensor:
    """Random normal, on the device."""
    return torch.randn(*size, device="cuda", dtype=dtype)


class Clock:
    """Times calls in turns."""

    def __init__(self):
        self.scratch = torch.empty(256 << 20, dtype=torch.int8, device="cuda")

    def measure(self, calls: Calls, rounds: int = ROUNDS) -> dict[str, dict]:
        """Median and quartiles of each call, seconds; what raises is reported as such."""
        result: dict[str, dict] = {}
        good = {}
        for name, call in calls.items():
            try:
                for _ in range(2):
                    call()
                torch.cuda.synchronize()
                good[name] = call
                result[name] = {"kernel": tetris._C.last_kernel()} if "tetris" in name else {}
            except Exception as error:  # a rival that does not run is a result, too
                result[name] = {"error": f"{type(error).__name__}: {error}"[:300]}
        events: dict[str, list] = {name: [] for name in good}
        for _ in range(rounds):
            for name, call in good.items():
                self.scratch.zero_()
                # Long enough for the host to be ahead: what is timed is the GPU alone.
                torch.cuda._sleep(HEAD_START)
                pair = [torch.cuda.Event(enable_timing=True) for _ in range(2)]
                pair[0].record()
                call()
                pair[1].record()
                events[name].append(pair)
        torch.cuda.synchronize()
        for name, pairs in events.items():
            times = [begin.elapsed_time(end) / 1000 for begin, end in pairs]
            low, middle, high = statistics.quantiles(times, n=4)
            result[name].update(seconds=middle, low=low, high=high)
        return result


@functools.lru_cache(maxsize=1)
def copy_rate() -> float:
    """Bytes a second of a device-to-device copy, read and written."""
    a = torch.empty(1 << 30, dtype=torch.int8, device="cuda").random_()
    b = torch.empty_like(a)
    times = Clock().measure({"copy": lambda: b.copy_(a)})
    return 2 * a.numel() / times["copy"]["seconds"]


def point(
    what: str, layer: Layer, pixels: int, moved_bytes: int, dense_flops: int, dtype, **more
) -> dict:
    """What describes a point, before it is measured."""
    return {
        "what": what,
        "block": f"{layer.block[0]}x{layer.block[1]}",
        "dtype": str(dtype).removeprefix("torch."),
        "sparsity": more.pop("sparsity"),
        "stored_share": layer.stored / (dense_flops / 2 / pixels),
        "flops": 2 * layer.stored * pixels,
        "dense_flops": dense_flops,
        "bytes": moved_bytes,
        **more,
    }


def finish(row: dict, times: dict[str, dict], dense: str) -> dict:
    """Adds what follows from the times: rates, speed-up, share of the roofline."""
    row["times"] = times
    ours, theirs = times["tetris"], times[dense]
    if "seconds" not in ours or "seconds" not in theirs:
        return row
    dense_rate = row["dense_flops"] / theirs["seconds"]
    height = int(row["block"].split("x")[0])
    roof = max(row["flops"] / (dense_rate * min(1.0, height / 128)), row["bytes"] / copy_rate())
    row.update(
        speedup=theirs["seconds"] / ours["seconds"],
        # 1: time proportional to what is stored, at cuBLAS's own rate.
        efficiency=row["flops"] / ours["seconds"] / dense_rate,
        stored_tflops=row["flops"] / ours["seconds"] / 1e12,
        equivalent_tflops=row["dense_flops"] / ours["seconds"] / 1e12,
        dense_tflops=dense_rate / 1e12,
        roofline_share=roof / ours["seconds"],
    )
    return row


# -- sections: iterators over rows, most important first -----------------------------------------


def matmul(clock: Clock) -> Iterator[dict]:
    """Forward products: 4096 and 8192 class shapes, all blocks."""
    ops = torch.ops.tetris

    def measure(m, k, n, block, sparsity, dtype, perm="none"):
        layer = make_layer(n, k, block, sparsity, dtype, perm)
        x, w = randn(m, k, dtype=dtype), randn(n, k, dtype=dtype)
        row = point(
            "matmul", layer, m, x.element_size() * (m * k + m * n + layer.stored), 2 * m * k * n,
            dtype, sparsity=sparsity, shape=f"{m}x{k}x{n}", perm=perm,
        )  # fmt: skip
        times = clock.measure(
            {
                "dense": lambda: F.linear(x, w),
                "tetris": lambda: ops.bsmm(x, layer.values, *layer.index, None, n, "none"),
            }
        )
        return finish(row, times, "dense")

    bf16 = torch.bfloat16
    for size in (4096, 8192):
        for block in ((128, 16), (128, 128), (64, 16), (64, 64)):
            yield measure(size, size, size, block, 0.9, bf16)
    for perm in ("rows", "cols", "both"):
        yield measure(4096, 4096, 4096, (128, 16), 0.9, bf16, perm)
    for sparsity in SPARSITIES:
        for block in BLOCKS:
            for size in (4096, 8192):
                yield measure(size, size, size, block, sparsity, bf16)
    for dtype in (torch.float16, torch.float32):
        for block in BLOCKS:
            yield measure(4096, 4096, 4096, block, 0.9, dtype)
    for perm in ("both",):
        for block in ((64, 16), (32, 32), (16, 16), (4, 1)):
            yield measure(8192, 8192, 8192, block, 0.9, bf16, perm)


def decode(clock: Clock) -> Iterator[dict]:
    """One to sixteen tokens: bound by the bytes of values."""
    ops, dtype = torch.ops.tetris, torch.bfloat16
    for block in ((128, 16), (16, 16), (8, 8), (4, 1), (64, 16), (32, 32), (1, 1)):
        for m in (1, 16, 4):
            for k, n in ((8192, 8192), (4096, 4096)):
                layer = make_layer(n, k, block, 0.9, dtype)
                x, w = randn(m, k), randn(n, k)
                index_bytes = 4 * layer.col_idx.numel()
                row = point(
                    "decode", layer, m, 2 * (m * k + m * n + layer.stored) + index_bytes,
                    2 * m * k * n, dtype, sparsity=0.9, shape=f"{m}x{k}x{n}",
                )  # fmt: skip
                times = clock.measure(
                    {
                        "dense": lambda x=x, w=w: F.linear(x, w),
                        "tetris": lambda x=x, layer=layer, n=n: ops.bsmm(
                            x, layer.values, *layer.index, None, n, "none"
                        ),
                    },
                    rounds=21,
                )
                yield finish(row, times, "dense")


def training(clock: Clock) -> Iterator[dict]:
    """Both gradients against the dense products that make them."""
    ops, dtype = torch.ops.tetris, torch.bfloat16
    for sparsity in (0.9, 0.75, 0.5):
        for size in (4096, 8192):
            for block in ((128, 16), (128, 128), (64, 16), (32, 32), (16, 16), (4, 1)):
                layer = make_layer(size, size, block, sparsity, dtype)
                x, dy, w = (randn(size, size) for _ in range(3))
                moved = 2 * (2 * size * size + layer.stored)
                flops = 2 * size**3
                shape = f"{size}x{size}x{size}"
                calls = {
                    "dx": (
                        lambda dy=dy, w=w: dy @ w,
                        lambda dy=dy, layer=layer, size=size: ops.bsmm_grad_input(
                            dy, layer.values, *layer.index, size
                        ),
                    ),
                    "dvalues": (
                        lambda dy=dy, x=x: dy.t() @ x,
                        lambda x=x, dy=dy, layer=layer, block=block: ops.bsmm_grad_values(
                            x, dy, *layer.index, *block
                        ),
                    ),
                }
                for what, (dense, sparse) in calls.items():
                    row = point(
                        what, layer, size, moved, flops, dtype, sparsity=sparsity, shape=shape
                    )
                    yield finish(row, clock.measure({"dense": dense, "tetris": sparse}), "dense")


def conv(clock: Clock) -> Iterator[dict]:
    """3x3 convolutions of ResNet's sizes, channels last, against cuDNN."""
    torch.backends.cudnn.benchmark = True
    ops, dtype = torch.ops.tetris, torch.bfloat16
    for channels, size in ((256, 14), (512, 7), (128, 28), (64, 56)):
        for block in ((64, 16), (128, 16), (32, 32), (16, 16)):
            if block[0] > channels:
                continue
            for sparsity in (0.9, 0.75):
                images = 64
                layer = make_layer(channels, channels, block, sparsity, dtype, taps=9)
                x = randn(images, channels, size, size).contiguous(
                    memory_format=torch.channels_last
                )
                w = randn(channels, channels, 3, 3).contiguous(memory_format=torch.channels_last)
                pixels = images * size * size
                row = point(
                    "conv", layer, pixels, 2 * (2 * pixels * channels + layer.stored),
                    2 * pixels * channels * channels * 9, dtype, sparsity=sparsity,
                    shape=f"{images}x{channels}x{size}x{size}-{channels}k3",
                )  # fmt: skip
                times = clock.measure(
                    {
                        "dense": lambda x=x, w=w: F.conv2d(x, w, padding=1),
                        "tetris": lambda x=x, layer=layer, channels=channels: ops.bsconv2d(
                            x, layer.values, *layer.index, None, channels,
                            (3, 3), (1, 1), (1, 1), (1, 1), 1, "none", None,
                        ),
                    }
                )  # fmt: skip
                yield finish(row, times, "dense")


def bsr(clock: Clock) -> Iterator[dict]:
    """Torch's block-sparse product (Triton), as it comes and tuned for each point."""
    ops, dtype = torch.ops.tetris, torch.bfloat16
    for tuned in (False, True):
        for block in (128, 64, 32, 16):
            for sparsity in (0.9, 0.5):
                size = 4096
                layer = make_layer(size, size, (block, block), sparsity, dtype)
                x, w = randn(size, size), randn(size, size)
                weight = torch.sparse_bsr_tensor(
                    layer.row_ptr.long(),
                    layer.col_idx.long(),
                    layer.values.transpose(1, 2).contiguous(),
                    size=(size, size),
                    check_invariants=False,
                )
                name = "bsr-tuned" if tuned else "bsr"
                if tuned:
                    tune_bsr(size, block, dtype, sparsity)
                row = point(
                    name, layer, size, 2 * (2 * size * size + layer.stored), 2 * size**3, dtype,
                    sparsity=sparsity, shape=f"{size}x{size}x{size}",
                )  # fmt: skip
                times = clock.measure(
                    {
                        "dense": lambda x=x, w=w: F.linear(x, w),
                        "tetris": lambda x=x, layer=layer: ops.bsmm(
                            x, layer.values, *layer.index, None, 4096, "none"
                        ),
                        name: lambda x=x, weight=weight: F.linear(x, weight),
                    }
                )
                yield finish(row, times, "dense")


def tune_bsr(size: int, block: int, dtype, sparsity: float) -> None:
    """Lets torch find its kernel's parameters for a point, where this torch can."""
    try:
        from torch.sparse import _triton_ops_meta

        _triton_ops_meta.optimize_bsr_dense_addmm(
            size, size, size, block, block, beta=0, alpha=1, use_right_alpha=False,
            dtype=dtype, sparsity=sparsity, force=False, verbose=False,
        )  # fmt: skip
    except Exception as error:  # private, and different from version to version
        print(f"tuning torch's BSR product: {type(error).__name__}: {error}"[:300], flush=True)


def tuned(clock: Clock) -> Iterator[dict]:
    """What `tetris tune` finds beside the library's own choice."""
    from tetris import tune

    for block in ((128, 16), (64, 16), (32, 32), (16, 16), (128, 128)):
        for size in (4096, 8192):
            problem = tune.Problem(size, size, size, block, 0.9, "bfloat16")
            named = [(f"{problem} {op}", c) for op, c in tune.calls(problem, "cuda", True).items()]
            lines: list[str] = []
            found = tune.tune(named, timer=functools.partial(tune.time_on_gpu, rounds=7),
                              report=lines.append)  # fmt: skip
            for measured in found.values():
                for key, m in measured.items():
                    yield {
                        "what": "tuned",
                        "problem": key,
                        "best": m.config,
                        "seconds": m.seconds,
                        "guess": m.guess,
                        "guess_seconds": m.guess_seconds,
                    }
            print("\n".join(lines), flush=True)


IDENTITY = ("what", "shape", "block", "sparsity", "dtype", "perm", "problem")  # of a point
SECTIONS = {f.__name__: f for f in (matmul, decode, training, conv, bsr, tuned)}


def machine() -> dict:
    """What the numbers were measured on."""
    p = torch.cuda.get_device_properties(0)
    return {
        "gpu": p.name,
        "capability": f"{p.major}.{p.minor}",
        "multiprocessors": p.multi_processor_count,
        "l2_bytes": getattr(p, "L2_cache_size", 0),
        "memory_bytes": p.total_memory,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "tetris": tetris.__version__,
        "targets": list(tetris._C.cuda_targets()),
        "copy_bytes_per_second": copy_rate(),
    }


def main(argv: list[str] | None = None) -> int:
    """Measures one section."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--section", choices=SECTIONS, required=True)
    parser.add_argument("--seconds", type=float, default=60.0)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args(argv)
    if not tetris._C.cuda_built() or not torch.cuda.is_available():
        print("benchmarks.gpu: needs a GPU and a build with CUDA kernels", file=sys.stderr)
        return 1
    began, clock, rows = time.monotonic(), Clock(), []
    result = {"section": args.section, "machine": machine(), "rows": rows, "complete": False}
    torch.backends.cuda.matmul.allow_tf32 = False  # float32 against float32
    seen = set()
    for row in SECTIONS[args.section](clock):
        mark = tuple(str(row.get(name)) for name in IDENTITY)
        if mark not in seen:
            rows.append(row)
            args.out.write_text(json.dumps(result) + "\n")
            print(line(row), flush=True)
        seen.add(mark)
        if time.monotonic() - began > args.seconds:
            print(f"time is over after {len(rows)} points", flush=True)
            return 0
    result["complete"] = True
    args.out.write_text(json.dumps(result) + "\n")
    return 0


def line(row: dict) -> str:
    """A row on one line."""
    if "best" in row:
        return (
            f"{row['problem']}: {row['best']} {1e6 * row['seconds']:.1f} us, "
            f"guess {row['guess']} {1e6 * row['guess_seconds']:.1f} us"
        )
    times = ", ".join(
        f"{name} {1e3 * t['seconds']:.3f} ms" if "seconds" in t else f"{name} {t['error']}"
        for name, t in row["times"].items()
    )
    head = f"{row['what']} {row['shape']} {row['block']} {row['sparsity']:.0%} {row['dtype']}"
    if "speedup" not in row:
        return f"{head}: {times}"
    return (
        f"{head}: {times}; {row['speedup']:.2f}x, {row['stored_tflops']:.1f} TFLOP/s stored, "
        f"efficiency {row['efficiency']:.2f}, roofline {row['roofline_share']:.2f} "
        f"{row['times']['tetris'].get('kernel', '')}"
    )


if __name__ == "__main__":
    sys.exit(main())
