"""Which kernel runs: chosen, forced, and seen."""

import os
import subprocess
import sys

import pytest
import torch

import tetris
from cases import Case, make_layer, tokens


def python(code: str, **env: str) -> subprocess.CompletedProcess:
    """Run code in a fresh interpreter."""
    env = {"PATH": os.environ["PATH"], **env}
    return subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, timeout=300
    )


RUN_ONE = """
import torch, tetris
for m in (1, 40):
    torch.ops.tetris.bsmm(torch.ones(m, 8), torch.ones(2, 1, 4), torch.tensor([0, 1, 2]).int(),
                          torch.tensor([3, 5]).int(), None, None, None, 8)
    print(tetris._C.last_kernel())
print(tetris._C.isa_in_use())
"""


@pytest.mark.parametrize("m", [1, 2, 16, 33, 300])
def test_forced_isa_is_the_one_that_runs(m, isa):
    case = Case(m, 64, 64, 4, 1)
    layer, x = make_layer(case), tokens(case)
    layer.bsmm(x)
    kernel = tetris._C.last_kernel()
    assert kernel.startswith("bsmm_f32_")
    assert kernel.endswith(f"__{isa}")
    assert tetris._C.isa_in_use() == isa


def test_gradient_kernels_are_named(isa):
    case = Case(33, 64, 64, 4, 1)
    layer, x = make_layer(case), tokens(case)
    dy = tokens(case, features=64)
    torch.ops.tetris.bsmm_grad_input(dy, layer.values, *layer.index, 64)
    assert tetris._C.last_kernel().endswith(f"__{isa}")
    torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, 4, 1)
    assert tetris._C.last_kernel().startswith("sample_f32_")
    assert tetris._C.last_kernel().endswith(f"__{isa}")


@pytest.mark.parametrize("bo", [1, 7, 8, 15, 16, 24, 31, 32, 64])
def test_tall_blocks_put_outputs_in_the_lanes(bo, isa):
    case = Case(33, 128, 64, bo, 4)
    layer, x = make_layer(case), tokens(case)
    torch.ops.tetris.bsmm_grad_values(x, tokens(case, features=128), *layer.index, bo, 4)
    lanes = {"avx512": 16, "avx2": 8, "scalar": 4}[isa]
    rows = tetris._C.last_kernel().removeprefix("sample_f32_").partition("x")[0]
    assert int(rows) == (4 if bo < lanes else lanes if bo < 2 * lanes else 2 * lanes)


def test_float64_has_one_path(isa):
    case = Case(33, 64, 64, 4, 1)
    make_layer(case, torch.float64).bsmm(tokens(case, torch.float64))
    assert tetris._C.last_kernel().startswith("bsmm_f64_")
    assert tetris._C.last_kernel().endswith("__scalar")


@pytest.mark.parametrize("name", tetris._C.isas_built())
def test_environment_forces_the_isa(name):
    done = python(RUN_ONE, TETRIS_CPU_ISA=name)
    if name not in tetris._C.isas_supported():
        assert done.returncode != 0
        assert f"TETRIS_CPU_ISA={name}: this CPU does not support it (it runs" in done.stderr
        return
    *kernels, in_use = done.stdout.split()
    assert in_use == name
    assert [k.rsplit("__")[-1] for k in kernels] == [name, name]


def test_the_default_is_the_best_supported():
    for env in ({}, {"TETRIS_CPU_ISA": ""}):
        done = python(RUN_ONE, **env)
        assert done.stdout.split()[-1] == tetris._C.isas_supported()[0], done.stderr


def test_unknown_name_in_the_environment_raises_on_the_first_call():
    done = python(f"import tetris\nprint('imported')\n{RUN_ONE}", TETRIS_CPU_ISA="altivec")
    assert done.stdout == "imported\n"  # only the use of a kernel needs the choice
    assert done.returncode == 1  # an exception, not a signal
    assert "TETRIS_CPU_ISA=altivec: no such instruction set in this build (it has" in done.stderr
    for name in tetris._C.isas_built():
        assert name in done.stderr


def test_unknown_name_raises_and_changes_nothing(isa):
    with pytest.raises(RuntimeError, match="no such instruction set in this build"):
        tetris._C.force_isa("altivec")
    with pytest.raises(RuntimeError, match="no such instruction set in this build"):
        tetris._C.force_isa(isa.upper())
    assert tetris._C.isa_in_use() == isa


def test_lists():
    built, supported = tetris._C.isas_built(), tetris._C.isas_supported()
    assert built[-1] == "scalar"
    assert supported == [name for name in built if name in supported]
    assert "scalar" in supported


def test_forcing_nothing_returns_to_the_environment():
    first = tetris._C.isa_in_use()
    tetris._C.force_isa("scalar")
    assert tetris._C.isa_in_use() == "scalar"
    tetris._C.force_isa("")
    assert tetris._C.isa_in_use() == first
