"""What the kernels must reach, and whether a result file shows that they do.

Efficiency is speed-up times stored share: 1 means that a layer with a tenth of its weights takes
a tenth of the time of the fastest dense library.
"""

from dataclasses import dataclass

import numpy as np

BANDS = {"50-75 %": (0.5, 0.75), "90 %": (0.9,), "95 %": (0.95,)}
_CONV_BANDS = {**BANDS, "75 %": (0.75,)}
_LARGE = (0.97, 0.93, 0.80)
_SMALL = (0.93, 0.88, 0.75)
TARGETS = {
    **{block: _LARGE for block in ("8x1", "16x1", "32x1", "8x8", "16x16", "32x32", "64x64")},
    **{block: _SMALL for block in ("4x1", "4x4")},
    "2x1": (0.65, 0.65, 0.55),
    "1x1": (0.42, 0.42, 0.38),
}
POINT_MARGIN = 0.12  # no single point may lie further below its target
FEW_TOKENS_SHARE = 0.7  # of the target, at 2 to 16 tokens
MANY_TOKENS = 128
TRAINING_TARGETS = {"4x1": 0.35, "16x16": 0.6, "32x32": 0.6}  # at 75 to 90 % sparsity
AVX2_PEAK_SHARE = 0.72  # of that instruction set's FMA peak, at every point of 4 rows and more
DECODE_SHARE = 0.8  # of the ratio of bytes read, at one token

CONV_CLASSES = ("3x3", "3x3 on 7x7", "1x1", "stride 2")
CONV_TARGETS = (  # class of layer, batches (None: all), blocks, {band: efficiency}
    ("3x3", None, ("8x1", "16x1"), {"50-75 %": 0.85, "90 %": 0.75}),
    ("3x3", None, ("4x1",), {"50-75 %": 0.75, "90 %": 0.65}),
    ("3x3 on 7x7", (8,), ("4x1", "8x1", "16x1"), {"75 %": 0.65}),
    ("1x1", None, ("8x1", "16x1"), {"50-75 %": 0.85, "90 %": 0.85}),
    ("stride 2", None, ("8x1", "16x1"), {"50-75 %": 0.7, "90 %": 0.7}),
)
NETWORK_TARGETS = {("VGG-16", 0.9): 6.0, ("ResNet-50", 0.8): 3.0}  # speed-up, batch 1
STEP_TARGET = 3.0  # times the dense step, whole training steps
STEP_SPARSITY = 0.9
STEP_BLOCKS = ("8x8", "16x16")


@dataclass(frozen=True)
class Verdict:
    """One line of the pass/fail table."""

    isa: str
    threads: int
    what: str
    block: str
    band: str
    target: float
    mean: float
    worst: float
    worst_at: str
    passed: bool


def block_height(block: str) -> int:
    """4 of ``4x1``."""
    return int(block.split("x")[0])


def geometric_mean(values: list[float]) -> float:
    """Of positive numbers."""
    return float(np.exp(np.mean(np.log(values))))


def judge(rows: list[dict], training: list[dict]) -> list[Verdict]:
    """Compares measured rows with the targets; combinations that were not measured are absent."""
    verdicts = []
    for isa, threads in sorted({(r["isa"], r["threads"]) for r in rows}):
        here = [r for r in rows if (r["isa"], r["threads"]) == (isa, threads)]
        if isa == "avx2":
            verdicts += _avx2_verdicts(here, threads)
            continue
        for what, low, high, share in (
            (f">= {MANY_TOKENS} tokens", MANY_TOKENS, 10**9, 1.0),
            ("2-16 tokens", 2, 16, FEW_TOKENS_SHARE),
        ):
            some = [r for r in here if low <= r["tokens"] <= high]
            for block, targets in TARGETS.items():
                for (band, levels), target in zip(BANDS.items(), targets, strict=True):
                    points = [r for r in some if r["block"] == block and r["sparsity"] in levels]
                    if points:
                        margin = POINT_MARGIN * share
                        verdicts.append(
                            _verdict(
                                isa, threads, what, block, band, target * share, margin, points
                            )
                        )
        for block in TARGETS:
            for band, levels in BANDS.items():
                points = [
                    {**r, "efficiency": r["speedup"] / r["bytes_ratio"]}
                    for r in here
                    if r["tokens"] == 1 and r["block"] == block and r["sparsity"] in levels
                ]
                if points:
                    what = "1 token, of bytes"
                    verdicts.append(
                        _verdict(
                            isa, threads, what, block, band, DECODE_SHARE, POINT_MARGIN, points
                        )
                    )
    for isa, threads in sorted({(r["isa"], r["threads"]) for r in training}):
        for block, target in TRAINING_TARGETS.items():
            points = [
                r
                for r in training
                if (r["isa"], r["threads"], r["block"]) == (isa, threads, block)
                and 0.75 <= r["sparsity"] <= 0.9
            ]
            if points:
                verdicts.append(
                    _verdict(
                        isa, threads, "training", block, "75-90 %", target, POINT_MARGIN, points
                    )
                )
    return verdicts


def conv_class(row: dict) -> str:
    """Which of :data:`CONV_CLASSES` a measured convolution belongs to."""
    if row["stride"] > 1:
        return "stride 2"
    if row["kernel_size"] == 1:
        return "1x1"
    return "3x3" if row["map"] >= 14 else "3x3 on 7x7"


def judge_convolutions(rows: list[dict]) -> list[Verdict]:
    """Compares measured convolutions with their targets, block by block."""
    verdicts = []
    for isa, threads in sorted({(r["isa"], r["threads"]) for r in rows}):
        here = [r for r in rows if (r["isa"], r["threads"]) == (isa, threads)]
        for kind, batches, blocks, targets in CONV_TARGETS:
            for block in blocks:
                for band, target in targets.items():
                    points = [
                        r
                        for r in here
                        if (conv_class(r), r["block"]) == (kind, block)
                        and r["sparsity"] in _CONV_BANDS[band]
                        and (batches is None or r["batch"] in batches)
                    ]
                    if points:
                        verdicts.append(
                            _verdict(isa, threads, kind, block, band, target, POINT_MARGIN, points)
                        )
    return verdicts


def against_conv2d(rows: list[dict]) -> list[dict]:
    """The same convolutions against the faster memory format of ``F.conv2d`` alone."""
    return [{**r, **r["conv2d"]} for r in rows]


def judge_steps(rows: list[dict]) -> list[str]:
    """One sentence per whole training step that has a target."""
    return [
        f"{row['model']} {row['block']} at {100 * STEP_SPARSITY:g} %: {row['speedup']:.2f}x the "
        f"dense step, target {STEP_TARGET:g}x: "
        f"{'met' if row['speedup'] >= STEP_TARGET else 'missed'}"
        for row in rows
        if row["block"] in STEP_BLOCKS and abs(row["sparsity"] - STEP_SPARSITY) < 1e-9
    ]


def _avx2_verdicts(rows: list[dict], threads: int) -> list[Verdict]:
    """Against the peak instead of the dense libraries, block by block."""
    verdicts = []
    for block in TARGETS:
        points = [
            {**r, "efficiency": r["peak_share"]}
            for r in rows
            if r["block"] == block
            and block_height(block) >= 4
            and r["tokens"] >= MANY_TOKENS
            and 0.5 <= r["sparsity"] <= 0.9
            and r["peak_share"]
        ]
        if points:
            what = "of FMA peak"
            verdicts.append(
                _verdict("avx2", threads, what, block, "50-90 %", AVX2_PEAK_SHARE, 0.0, points)
            )
    return verdicts


def _verdict(
    isa: str,
    threads: int,
    what: str,
    block: str,
    band: str,
    target: float,
    margin: float,
    points: list[dict],
) -> Verdict:
    mean = geometric_mean([p["efficiency"] for p in points])
    worst = min(points, key=lambda p: p["efficiency"])
    return Verdict(
        isa=isa,
        threads=threads,
        what=what,
        block=block,
        band=band,
        target=target,
        mean=mean,
        worst=worst["efficiency"],
        worst_at=f"{worst['shape']} {worst['sparsity']:.0%}",
        passed=mean >= target and worst["efficiency"] >= target - margin,
    )
