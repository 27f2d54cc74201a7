"""A build without CUDA kernels says so, and how to get one; reports of GPUs without a GPU."""

import json
import re

import pytest
import torch
from torch import nn
from torch._subclasses import FakeTensor, FakeTensorMode

import tetris
from benchmarks import gpu_report
from cases import Case, make_layer, tokens
from tetris import cli
from tetris.checks import check_dtype, check_weight
from tetris.prune import Latency, TetrisPruner

without_cuda = pytest.mark.skipif(tetris._C.cuda_built(), reason="this build has CUDA kernels")


@without_cuda
def test_ops_on_cuda_say_what_is_missing():
    """The CUDA dispatch key, reached without a GPU."""
    case = Case(3, 12, 16, 4, 2)
    layer, x = make_layer(case), tokens(case)
    keys = torch._C.DispatchKeySet(torch._C.DispatchKey.CUDA)
    op = torch.ops.tetris.bsmm.default
    with pytest.raises(
        NotImplementedError, match="tetris::bsmm: this build.*no CUDA kernels.*TETRIS_CUDA=1"
    ):
        op.redispatch(keys, x, layer.values, *layer.index, layer.bias, case.n, "none")


@without_cuda
def test_layers_on_cuda_say_what_is_missing():
    weight = FakeTensor(FakeTensorMode(), torch.empty(8, 8, device="meta"), torch.device("cuda:0"))
    with pytest.raises(
        ValueError, match="here: the weight must be on the CPU.*got cuda:0.*TETRIS_CUDA=1"
    ):
        check_weight("here", weight)


@without_cuda
@pytest.mark.parametrize(
    ("cuda", "first"),
    [
        (None, "install a torch with CUDA first .this one is .*, then, where nvcc is, "),
        ("12.8", "where nvcc 12 is, for this torch with CUDA 12.8, "),
    ],
)
def test_the_advice_is_for_the_torch_that_is_installed(cuda, first, monkeypatch, capsys):
    monkeypatch.setattr(torch.version, "cuda", cuda)
    advice = first + "TETRIS_CUDA=1 pip install --no-build-isolation ."
    weight = FakeTensor(FakeTensorMode(), torch.empty(8, 8, device="meta"), torch.device("cuda:0"))
    with pytest.raises(ValueError, match=f"this build has none: .*: {advice}"):
        check_weight("here", weight)
    assert cli.main(["tune"]) == 1
    assert re.search(f"no CUDA kernels to tune .*: {advice}", capsys.readouterr().err)


@pytest.mark.parametrize(
    ("call", "otherwise"),
    [
        (lambda m, x: tetris.analyze(m, x), "leave example_inputs out"),
        (lambda m, x: tetris.sparsify(m, latency=0.5, example_inputs=x), "give a sparsity="),
        (lambda m, x: TetrisPruner(m, target=Latency(0.5, x)), "give a sparsity="),
        (lambda m, x: Latency(0.5, x).costs(m, {"1": m[1]}), "give a sparsity="),
    ],
    ids=["analyze", "sparsify", "pruner", "costs"],
)
def test_times_are_those_of_the_cpu(call, otherwise, monkeypatch):
    """A model of which one layer is on a GPU, without one."""
    model = nn.Sequential(nn.Linear(32, 32), nn.Linear(32, 32))
    numbers = torch.empty(32, 32, device="meta")
    weight = FakeTensor(FakeTensorMode(), numbers, torch.device("cuda:0"))
    model[1].weight = nn.Parameter(weight)
    monkeypatch.setattr(nn.Sequential, "__deepcopy__", lambda m, _: m, raising=False)  # of a fake
    message = (
        "layer '1': times are predicted and measured for the CPU .got cuda:0.; pass a "
        f"copy of the model that is there, .*, or {otherwise}"
    )
    with pytest.raises(ValueError, match=message):
        call(model, torch.ones(4, 32))


@without_cuda
def test_info_and_kernel_functions_without_cuda():
    info = tetris.info()
    assert not info.cuda
    assert info.cuda_targets == ()
    assert info.cuda_why in str(info)
    with pytest.raises(RuntimeError, match="no CUDA kernels"):
        tetris._C.cuda_force_kernel("mma")


@pytest.mark.parametrize(
    ("dtype", "device", "taken"),
    [
        (torch.float32, None, True),
        (torch.bfloat16, None, False),
        (torch.bfloat16, "cpu", False),
        (torch.bfloat16, "cuda:1", True),
        (torch.float16, "meta", True),
        (torch.float64, "cuda", True),
        (torch.int32, "cuda", False),
    ],
)
def test_types_of_new_layers_depend_on_the_device(dtype, device, taken):
    if taken:
        check_dtype("here", dtype, device)
        return
    with pytest.raises(ValueError, match=f"here: dtype must be float32.*got {dtype}"):
        check_dtype("here", dtype, device)


def row(**changes):
    times = {
        "tetris": {"seconds": 1e-4, "kernel": "bsmm_bf16_128x256__sm90"},
        "dense": {"seconds": 2e-4},
    }
    made = {
        "what": "matmul", "shape": "4096x4096x4096", "block": "128x16", "dtype": "bfloat16",
        "sparsity": 0.9, "perm": "none", "times": times, "speedup": 2.0, "efficiency": 0.2,
        "stored_tflops": 70.0, "equivalent_tflops": 700.0, "dense_tflops": 680.0,
        "roofline_share": 0.25,
    }  # fmt: skip
    return {**made, **changes}


MACHINE = {
    "gpu": "Some GPU", "capability": "9.0", "multiprocessors": 132, "torch": "2", "cuda": "13",
    "tetris": "0", "targets": ["sm_90"], "copy_bytes_per_second": 4e12,
}  # fmt: skip


def test_report_of_partial_results(tmp_path, capsys):
    """Sections cut short, rivals that failed, files that are broken: all that is there."""
    pytest.importorskip("matplotlib")
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    failed = row(times={"tetris": {"error": "RuntimeError: no"}, "dense": {"seconds": 1e-4}})
    del failed["speedup"]
    rows = [row(), row(sparsity=0.5), failed]
    content = {"section": "matmul", "machine": MACHINE, "rows": rows, "complete": False}
    (out / "matmul.json").write_text(json.dumps(content))
    rival = row(what="bsr", times={**row()["times"], "bsr": {"seconds": 3e-4}})
    content = {"section": "bsr", "machine": MACHINE, "rows": [rival], "complete": True}
    (out / "bsr.json").write_text(json.dumps(content))
    (out / "conv.json").write_text('{"section": "co')
    (out / "summary.json").write_text("[]")
    assert gpu_report.main([str(out), str(results)]) == 0
    text = (results / "some-gpu.md").read_text()
    assert "2.00" in text
    assert "0.3000" in text
    assert "RuntimeError: no" in text
    assert "Not all points were measured in the time given: conv, matmul" in text
    assert (results / "some-gpu-speedup.png").stat().st_size > 1000
    assert len(json.loads((results / "some-gpu.json").read_text())["rows"]) == 4
    assert "Some GPU" in capsys.readouterr().out


def test_report_of_nothing(tmp_path, capsys):
    assert gpu_report.main([str(tmp_path), str(tmp_path / "results")]) == 1
    assert "nothing was measured" in capsys.readouterr().err
