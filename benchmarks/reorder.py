"""Quality and time of the permutation search, against fixed targets.

    python -m benchmarks.reorder [--quick] [--budget SECONDS] [--threads N] [--json FILE]

Quality: share of |w| that 25 % of the blocks retain, synthetic 512 x 512 matrices. Targets are what
a first prototype (one swap at a time, no annealing schedule) reached in 10 s on one
core. Time: wall clock of the default search, everything included, with the peak memory it adds.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from pathlib import Path

import numpy as np

from tetris import reorder

# Target shares, with the floor (each block row keeps its best block) and without. The floor itself
# costs the lognormal matrices up to .003.
QUALITY = {
    ("gaussian", (32, 32)): 0.293,
    ("gaussian", (16, 16)): 0.299,
    ("gaussian", (8, 8)): 0.308,
    ("gaussian", (16, 1)): 0.330,
    ("gaussian", (8, 1)): 0.356,
    ("gaussian", (4, 1)): 0.393,
    ("lognormal", (32, 32)): 0.505,
    ("lognormal", (16, 16)): 0.513,
    ("lognormal", (8, 8)): 0.518,
    ("lognormal", (4, 1)): 0.551,
}
TIME = {  # (rows, cols, block): seconds on 2 cores
    (4096, 4096, (32, 32)): 5.0,
    (4096, 11008, (32, 32)): 15.0,
    (4096, 4096, (4, 1)): 30.0,
}


def matrix(kind: str, n: int = 512, seed: int = 0, block: int = 32) -> np.ndarray:
    """|w| of one of three kinds: gaussian, lognormal (row and column scales) or planted."""
    rng = np.random.default_rng(seed)
    if kind == "gaussian":
        return np.abs(rng.standard_normal((n, n)))
    if kind == "lognormal":
        rows = np.exp(0.5 * rng.standard_normal((n, 1)))
        cols = np.exp(0.5 * rng.standard_normal((1, n)))
        return np.abs(rows * cols * rng.standard_normal((n, n)))
    return planted(n, block, seed)[0]


def planted(n: int, block: int, seed: int, floor: bool = False) -> tuple[np.ndarray, float]:
    """A quarter of the blocks heavy, rows and columns shuffled; and the share those blocks hold.

    With the floor, a block row without a heavy block takes the place of the least heavy one.
    """
    rng = np.random.default_rng(seed)
    groups = n // block
    heavy = np.zeros(groups * groups, bool)
    heavy[rng.permutation(groups * groups)[: groups * groups // 4]] = True
    scale = np.where(heavy, 1.0, 0.1).reshape(groups, groups)
    w = np.abs(rng.standard_normal((n, n))) * scale.repeat(block, 0).repeat(block, 1)
    sums = w.reshape(groups, block, groups, block).sum((1, 3))
    rank = sums.copy()
    if floor:
        rank[np.arange(groups), rank.argmax(1)] = np.inf
    best = np.argsort(rank, axis=None)[-(groups * groups // 4) :]
    optimum = float(sums.ravel()[best].sum() / sums.sum())
    return w[rng.permutation(n)][:, rng.permutation(n)], optimum


def quality(budget: float | None, threads: int | None, quick: bool) -> list[dict]:
    rows = []
    for (kind, block), target in QUALITY.items():
        if quick and block not in ((32, 32), (4, 1)):
            continue
        w = matrix(kind)
        for allow in (True, False):
            found = reorder.search(
                w, block, 0.75, budget=budget, threads=threads, allow_empty_rows=allow
            )
            rows.append(
                {
                    "matrix": kind,
                    "block": f"{block[0]}x{block[1]}",
                    "empty_rows": allow,
                    "identity": found.identity_retained,
                    "l1_sort": found.l1_sort_retained,
                    "retained": found.retained,
                    "unstructured": found.unstructured_retained,
                    "target": target,
                    "seconds": found.seconds,
                }
            )
            print(
                f"{kind:10} {rows[-1]['block']:>6} {'empty rows' if allow else 'floor':10} "
                f"identity {found.identity_retained:.4f}  L1 {found.l1_sort_retained:.4f}  "
                f"found {found.retained:.4f}  target {target:.3f} "
                f"{'ok  ' if found.retained >= target else 'MISS'}  {found.seconds:5.2f} s",
                flush=True,
            )
    return rows


def recovery(budget: float | None, threads: int | None, quick: bool) -> list[dict]:
    rows = []
    for block, allow in itertools.product((32, 8), (True, False)):
        shares = []
        for seed in range(2 if quick else 10):
            w, optimum = planted(512, block, seed, floor=not allow)
            found = reorder.search(
                w, (block, block), 0.75, budget=budget, threads=threads, allow_empty_rows=allow
            )
            shares.append(found.retained / optimum)
        rows.append(
            {"matrix": "planted", "block": block, "empty_rows": allow, "of_optimum": shares}
        )
        print(
            f"planted    {f'{block}x{block}':>6} {'empty rows' if allow else 'floor':10} "
            f"{min(shares):.4f} .. {max(shares):.4f} of the optimum, "
            f"{len(shares)} seeds  {'ok' if min(shares) >= 0.99 else 'MISS'}",
            flush=True,
        )
    return rows


def peak_bytes() -> int:
    """Peak resident memory since it was last reset (Linux)."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    raise RuntimeError("/proc/self/status has no VmHWM line")


def timing(threads: int | None, quick: bool) -> list[dict]:
    rows = []
    for (out, cols, block), target in TIME.items():
        if quick and block != (32, 32):
            continue
        rng = np.random.default_rng(0)
        w = rng.standard_normal((out, cols), dtype=np.float32)
        np.abs(w, out=w)
        Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
        before = peak_bytes()
        start = time.perf_counter()
        found = reorder.search(w, block, 0.75, threads=threads)
        seconds = time.perf_counter() - start
        grown = (peak_bytes() - before) / w.nbytes
        rows.append(
            {
                "shape": [out, cols],
                "block": block,
                "seconds": seconds,
                "target": target,
                "peak_memory_over_matrix": 1 + grown,
                "identity": found.identity_retained,
                "retained": found.retained,
            }
        )
        print(
            f"{out}x{cols} {block[0]}x{block[1]}: {seconds:.1f} s (target {target:.0f} s), "
            f"{found.identity_retained:.4f} -> {found.retained:.4f} in {found.sweeps} sweeps, "
            f"peak memory {1 + grown:.2f} x the matrix  "
            f"{'ok' if seconds <= target and grown < 2 else 'MISS'}",
            flush=True,
        )
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer cases")
    parser.add_argument("--budget", type=float, help="seconds per 512 x 512 search")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--only", choices=("quality", "recovery", "timing"))
    parser.add_argument("--json", help="write all rows to this file")
    args = parser.parse_args()
    report = {}
    if args.only in (None, "timing"):  # first: peak memory never falls
        report["timing"] = timing(args.threads, args.quick)
    if args.only in (None, "quality"):
        report["quality"] = quality(args.budget, args.threads, args.quick)
    if args.only in (None, "recovery"):
        report["recovery"] = recovery(args.budget, args.threads, args.quick)
    if args.json:
        Path(args.json).write_text(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
