"""The ops as the rest of torch sees them: tracing, export, autocast, packaging."""

import copy
import io
import shutil
import subprocess
import sys

import pytest
import torch

import test_conv_compile
import tetris
from cases import ACTIVATIONS, Case, make_layer, tokens

CASE = Case(6, 21, 18, 4, 2)


class Net(torch.nn.Module):
    """Two layers with a normalization between them, held as parameters and buffers."""

    def __init__(self, activation="gelu"):
        super().__init__()
        self.activation = activation
        self.norm = torch.nn.LayerNorm(21)
        for name, case in (("a", CASE), ("b", Case(6, 9, 21, 3, 1, 0.6, perm="rows"))):
            layer = make_layer(case, padding=0.0)
            setattr(self, f"{name}_n", layer.n)
            for field in ("values", "bias"):
                self.register_parameter(
                    f"{name}_{field}", torch.nn.Parameter(getattr(layer, field))
                )
            for field in ("row_ptr", "col_idx", "row_perm", "col_perm"):
                self.register_buffer(f"{name}_{field}", getattr(layer, field))

    def layer(self, x, name, activation):
        fields = ("values", "row_ptr", "col_idx", "row_perm", "col_perm", "bias")
        operands = [getattr(self, f"{name}_{field}") for field in fields]
        return tetris.ops.bsmm(x, *operands, getattr(self, f"{name}_n"), activation)

    def forward(self, x):
        return self.layer(self.norm(self.layer(x, "a", self.activation)), "b", "none")


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()


def samples(requires_grad):
    """Operands for opcheck: optional ones present and absent, one token, several, a 3d batch."""
    for case, lead in [
        (CASE, (6,)),
        (Case(1, 21, 18, 4, 2, perm="none", bias=False), (1,)),
        (Case(6, 21, 18, 16, 16, perm="cols"), (2, 3)),
        (Case(5, 8, 8, 1, 1, perm="rows"), (5,)),
    ]:
        layer = make_layer(case, padding=0.0)
        x = torch.randn(*lead, case.k, generator=torch.Generator().manual_seed(7))
        dy = torch.randn(*lead, case.n, generator=torch.Generator().manual_seed(8))
        for t in (x, dy, layer.values, layer.bias):
            if t is not None:
                t.requires_grad_(requires_grad)
        yield case, layer, x, dy


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("activation", ["none", "gelu"])
def test_opcheck_bsmm(activation, requires_grad):
    for _, layer, x, _ in samples(requires_grad):
        args = (x, layer.values, *layer.index, layer.bias, layer.n, activation)
        torch.library.opcheck(torch.ops.tetris.bsmm.default, args)


@pytest.mark.parametrize("requires_grad", [False, True])
def test_opcheck_gradient_ops(requires_grad):
    for case, layer, x, dy in samples(requires_grad):
        torch.library.opcheck(
            torch.ops.tetris.bsmm_grad_input.default, (dy, layer.values, *layer.index, layer.k)
        )
        torch.library.opcheck(
            torch.ops.tetris.bsmm_grad_values.default, (x, dy, *layer.index, case.bo, case.bi)
        )


def test_every_op_is_tested_here_or_in_test_conv_compile():
    ops = {
        name.split("::")[1] for name in torch._C._dispatch_get_all_op_names() if "tetris::" in name
    }
    assert ops == {"bsmm", "bsmm_grad_input", "bsmm_grad_values"} | test_conv_compile.OPS


def test_fake_kernels_give_shape_type_and_device():
    from torch._subclasses import FakeTensorMode

    for case, layer, x, dy in samples(False):
        with FakeTensorMode() as mode:
            fake = [None if t is None else mode.from_tensor(t) for t in (x, dy, layer.values)]
            index = [None if t is None else mode.from_tensor(t) for t in layer.index]
            y = torch.ops.tetris.bsmm(fake[0], fake[2], *index, None, layer.n)
            dx = torch.ops.tetris.bsmm_grad_input(fake[1], fake[2], *index, layer.k)
            dv = torch.ops.tetris.bsmm_grad_values(fake[0], fake[1], *index, case.bo, case.bi)
        assert (y.shape, dx.shape, dv.shape) == (dy.shape, x.shape, layer.values.shape)
        assert y.device.type == "cpu"
        assert y.dtype == torch.float32


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compile_fullgraph(backend, dynamic):
    if backend == "inductor" and not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend=backend)
    for m in (6, 1, 33):
        x = torch.randn(m, 18, generator=torch.Generator().manual_seed(m))
        with torch.no_grad():
            torch.testing.assert_close(compiled(x), net(x))
        want = torch.autograd.grad(net(x).pow(2).sum(), list(net.parameters()))
        got = torch.autograd.grad(compiled(x).pow(2).sum(), list(net.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_dynamic_shapes_compile_once():
    net, graphs = Net(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        for m in (5, 6, 17, 100):
            compiled(torch.ones(m, 18))
    assert len(graphs) == 1


def exported(net):
    batch = torch.export.Dim("batch", min=1, max=4096)
    return torch.export.export(net, (torch.randn(6, 18),), dynamic_shapes={"x": {0: batch}})


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_export_save_load_run(activation):
    net = Net(activation).eval()
    file = io.BytesIO()
    torch.export.save(exported(net), file)
    file.seek(0)
    program = torch.export.load(file)
    assert "tetris.bsmm" in str(program.graph)
    for m in (1, 2, 40):
        x = torch.randn(m, 18, generator=torch.Generator().manual_seed(m))
        with torch.no_grad():
            torch.testing.assert_close(program.module()(x), net(x))


AOTI = """
import sys, torch, tetris
model = torch._inductor.aoti_load_package(sys.argv[1])
x, want = torch.load(sys.argv[2])
torch.testing.assert_close(model(x), want)
print(tetris._C.last_kernel())
"""


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")
def test_aot_inductor_package_runs_in_another_process(tmp_path):
    if not shutil.which("g++"):
        pytest.skip("AOTInductor needs g++")
    net = Net().eval()
    package, data = str(tmp_path / "net.pt2"), str(tmp_path / "data.pt")
    with torch.no_grad():
        torch._inductor.aoti_compile_and_package(exported(net), package_path=package)
        x = torch.randn(9, 18, generator=torch.Generator().manual_seed(0))
        torch.save((x, net(x)), data)
    done = subprocess.run(
        [sys.executable, "-c", AOTI, package, data], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("bsmm_f32_")


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
def test_autocast_raises_operands_to_float32(low):
    layer, x = make_layer(CASE, padding=0.0), tokens(CASE)
    weights = (layer.values.to(low), *layer.index, layer.bias.to(low), layer.n)
    want = torch.ops.tetris.bsmm(
        x.to(low).float(), weights[0].float(), *layer.index, weights[5].float(), layer.n
    )
    with torch.autocast("cpu", dtype=low):
        got = torch.ops.tetris.bsmm(x.to(low), *weights)
        mixed = torch.ops.tetris.bsmm(x, *weights)
    assert got.dtype == mixed.dtype == torch.float32
    assert torch.equal(got, want)
    with pytest.raises(TypeError, match="autocast"):
        torch.ops.tetris.bsmm(x.to(low), *weights)


def test_autocast_gradients_come_back_in_the_operands_types():
    layer, x = make_layer(CASE, padding=0.0), tokens(CASE)
    x16 = x.bfloat16().requires_grad_()
    values = layer.values.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = torch.ops.tetris.bsmm(x16, values, *layer.index, layer.bias, layer.n, "silu")
        y.sum().backward()
    assert x16.grad.dtype == torch.bfloat16
    assert values.grad.dtype == torch.float32
    x32 = x16.detach().float().requires_grad_()
    want = torch.autograd.grad(layer.bsmm(x32, "silu").sum(), (x32, values))
    torch.testing.assert_close(x16.grad, want[0].bfloat16())
    torch.testing.assert_close(values.grad, want[1])


def test_autocast_leaves_float64_alone():
    layer, x = make_layer(CASE, torch.float64), tokens(CASE, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.bsmm(x).dtype == torch.float64


def test_compile_under_autocast():
    net = Net()
    x = tokens(CASE)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), net(x))


def test_checkpoint_recomputes_the_same():
    net, x = Net(), tokens(CASE).requires_grad_()
    want = torch.autograd.grad(net(x).sum(), x)[0]
    y = torch.utils.checkpoint.checkpoint(copy.deepcopy(net), x, use_reentrant=False)
    assert torch.equal(torch.autograd.grad(y.sum(), x)[0], want)


def test_tracing_rejects_what_the_kernel_would():
    mode = torch._subclasses.FakeTensorMode()
    with mode:
        x, values = torch.empty(4, 8), torch.empty(2, 1, 4)
        index = [torch.empty(3, dtype=torch.int32), torch.empty(2, dtype=torch.int32), None, None]
        with pytest.raises(RuntimeError, match="activation must be one of none, .*got 'bogus'"):
            torch.ops.tetris.bsmm(x, values, *index, None, 8, "bogus")
        with pytest.raises(RuntimeError, match="values must be .*got torch.float64"):
            torch.ops.tetris.bsmm(x, values.double(), *index, None, 8)
