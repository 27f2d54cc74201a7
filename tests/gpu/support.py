"""The generated cases of the CPU's tests, their operands on the device, and how exact is exact."""

import contextlib
import dataclasses

import pytest
import torch
from torch import Tensor

import tetris

EMULATED = tetris._C.cuda_targets() == ["emulated"]
DEVICE = "cpu" if EMULATED else "cuda"
DTYPES = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}


def on_device(layer):
    """A Layer or ConvLayer with its tensors on the device; its references stay on the CPU."""
    moved = {
        f.name: getattr(layer, f.name).to(DEVICE)
        for f in dataclasses.fields(layer)
        if isinstance(getattr(layer, f.name), Tensor)
    }
    return dataclasses.replace(layer, **moved)


@contextlib.contextmanager
def refusals_skip():
    """Turn a forced family's refusal into a skip that gives its reason."""
    try:
        yield
    except ValueError as error:
        if "TETRIS_CUDA_KERNEL" not in str(error):
            raise
        pytest.skip(str(error).split("cannot: ")[-1])


def refused(call) -> Tensor | None:
    """What a call returns, None where the forced family refuses it."""
    try:
        return call()
    except ValueError as error:
        if "TETRIS_CUDA_KERNEL" not in str(error):
            raise
        return None


def assert_ran(family: str, *operands: Tensor) -> None:
    """The last kernel was one of a family; where an operand is empty there was none to run."""
    if any(t.numel() == 0 for t in operands):
        return
    target = {"simt": "__simt", "skinny": "__skinny", "mma": "__sm80", "hopper": "__sm90"}[family]
    assert tetris._C.last_kernel().endswith(target), tetris._C.last_kernel()


def assert_near(
    got: Tensor, want: Tensor, scale: Tensor, terms: int, operand: torch.dtype | None = None
) -> None:
    """|got - want| is what sums of `terms` products can lose: in the accumulator, and once in y.

    ``want`` and ``scale`` are float64, made of the very operands; ``operand``: a type narrower
    than the accumulator's that operands are rounded to (TF32).
    """
    assert got.shape == want.shape
    accumulator = 2.0**-53 if got.dtype == torch.float64 else 2.0**-24
    unit = torch.finfo(got.dtype).eps / 2
    rounding = 2 * 2.0**-11 if operand is not None else 0.0
    got = got.detach().cpu().double()
    # Partial sums may leave float16's range; results beyond it are infinite.
    bound = (
        (2 * (terms + 3) * accumulator + rounding) * scale
        + unit * want.abs()
        + 1e-7 * (unit > 1e-4)
    )
    bad = ~((got - want).abs() <= bound)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} differ, first at {bad.nonzero()[0].tolist()}: "
        f"got {got[bad][0]}, want {want[bad][0]}, bound {bound[bad][0]}"
    )
