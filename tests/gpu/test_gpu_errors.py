"""Bad calls on CUDA raise before anything is launched, with the CPU's messages."""

import os
import subprocess
import sys

import pytest
import torch

import tetris
from support import DEVICE, EMULATED
from test_errors import CONTENTS, SHAPES, call, good


def moved(a):
    return {n: t.to(DEVICE) if isinstance(t, torch.Tensor) else t for n, t in a.items()}


@pytest.mark.parametrize("name", [*CONTENTS, *SHAPES])
def test_bad_call(name):
    change, error, message = {**CONTENTS, **SHAPES}[name]
    a = good(5)
    change(a)
    with pytest.raises(error, match=message) as info:
        call(moved(a))
    assert "tetris::bsmm" in str(info.value)


@pytest.mark.parametrize("name", CONTENTS)
@pytest.mark.parametrize("op", ["bsmm_grad_input", "bsmm_grad_values"])
def test_bad_index_contents_in_the_gradient_ops(name, op):
    change, error, message = CONTENTS[name]
    a = good(5)
    change(a)
    a, ops = moved(a), torch.ops.tetris
    index = [a[n] for n in ("row_ptr", "col_idx", "row_perm", "col_perm")]
    grad = torch.ones(5, 12, device=DEVICE)
    arguments = {
        "bsmm_grad_input": (grad, a["values"], *index, 10),
        "bsmm_grad_values": (a["x"], grad, *index, 4, 3),
    }[op]
    with pytest.raises(error, match=message.split(r" \(got")[0]):
        getattr(ops, op)(*arguments)


@pytest.mark.parametrize("dtype", [torch.int32, torch.bool, torch.complex64])
def test_types_without_a_kernel(dtype):
    a = moved(good(5))
    a["x"] = a["x"].to(dtype)
    with pytest.raises(TypeError, match="x must be float16, bfloat16, float32 or float64"):
        call(a)


@pytest.mark.hardware
@pytest.mark.parametrize("operand", ["x", "values", "row_ptr", "col_idx", "bias", "row_perm"])
def test_operands_on_two_devices(operand):
    a = moved(good(3))
    a[operand] = a[operand].cpu()
    with pytest.raises(RuntimeError, match="must be a dense tensor on (a CUDA device|cuda:0)"):
        call(a)


def test_an_index_that_is_changed_in_place_is_checked_again():
    a = moved(good(5))
    call(a)
    a["col_idx"][1] = 99
    with pytest.raises(ValueError, match=r"col_idx\[1\].*got 99"):
        call(a)
    a["col_idx"][1] = 3
    call(a)


def test_layouts_are_kept_while_their_tensors_live():
    tetris._C.cuda_forget_layouts()
    a = moved(good(5))
    for _ in range(3):
        call(a)
    grad = torch.ones(5, 12, device=DEVICE)
    index = [a[n] for n in ("row_ptr", "col_idx", "row_perm", "col_perm")]
    torch.ops.tetris.bsmm_grad_input(grad, a["values"], *index, 10)
    assert tetris._C.cuda_prepared_layouts() == 1
    del a, index
    b = moved(good(5))
    call(b)
    assert tetris._C.cuda_prepared_layouts() == 1


def test_tensors_of_inference_mode_are_checked_each_time():
    with torch.inference_mode():
        a = moved(good(5))
        a["col_idx"] = a["col_idx"].clone()
        call(a)
        a["col_idx"][1] = 99
        with pytest.raises(ValueError, match=r"col_idx\[1\].*got 99"):
            call(a)


def test_unknown_kernel_is_an_error():
    with pytest.raises(ValueError, match="TETRIS_CUDA_KERNEL=fastest: no such kernel"):
        tetris._C.cuda_force_kernel("fastest")


def test_a_forced_kernel_that_cannot_says_why():
    tetris._C.cuda_force_kernel("hopper")
    try:
        with pytest.raises(ValueError, match="TETRIS_CUDA_KERNEL=hopper cannot: .*"):
            call(moved(good(5)))
    finally:
        tetris._C.cuda_force_kernel("")


PRINT = """
import sys, torch, tetris
sys.path[:0] = {folders!r}
from test_gpu_errors import call, good, moved
call(moved(good(5)))
"""


def test_the_choice_can_be_printed():
    folders = [os.path.dirname(__file__), os.path.dirname(os.path.dirname(__file__))]
    done = subprocess.run(
        [sys.executable, "-c", PRINT.format(folders=folders)],
        env={**os.environ, "TETRIS_PRINT_CONFIG": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "tetris::bsmm: product float32 12x10 blocks 4x3" in done.stderr


@pytest.mark.skipif(not EMULATED, reason="on a GPU test_gpu_runtime captures a real graph")
def test_a_new_layout_is_refused_while_capturing(monkeypatch):
    a = moved(good(5))
    grad = torch.ones(5, 12, device=DEVICE)
    index = [a[n] for n in ("row_ptr", "col_idx", "row_perm", "col_perm")]
    monkeypatch.setenv("TETRIS_EMULATED_CAPTURE", "1")
    with pytest.raises(RuntimeError, match="run the same layers once before the capture"):
        call(a)
    monkeypatch.setenv("TETRIS_EMULATED_CAPTURE", "0")
    call(a)
    monkeypatch.setenv("TETRIS_EMULATED_CAPTURE", "1")
    call(a)
    with pytest.raises(RuntimeError, match="transposing a layout needs the host"):
        torch.ops.tetris.bsmm_grad_input(grad, a["values"], *index, 10)


@pytest.mark.skipif(not EMULATED, reason="on a GPU test_gpu_runtime captures a real graph")
def test_a_first_call_waits_beside_another_threads_capture(monkeypatch):
    monkeypatch.setenv("TETRIS_EMULATED_CAPTURE", "elsewhere")
    a = moved(good(5))
    call(a)
    index = [a[n] for n in ("row_ptr", "col_idx", "row_perm", "col_perm")]
    grad = torch.ones(5, 12, device=DEVICE)
    torch.ops.tetris.bsmm_grad_input(grad, a["values"], *index, 10)
