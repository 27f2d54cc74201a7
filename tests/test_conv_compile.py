"""The convolution ops as the rest of torch sees them: tracing, export, autocast, packaging."""

import dataclasses
import io
import shutil
import subprocess
import sys

import pytest
import torch

import tetris
from cases import ACTIVATIONS
from conv_cases import ConvCase, make_conv, maps, results

OPS = {
    op + product
    for op in ("bsconv2d", "bsconv_transpose2d")
    for product in ("", "_grad_input", "_grad_values")
}
CASE = ConvCase(6, 10, (8, 6), (3, 3), (2, 2), (1, 1), groups=2, block=(4, 2))
TRANSPOSE = ConvCase(10, 6, (4, 3), (3, 2), (2, 2), (1, 0), (1, 1), (1, 0), 1, transposed=True)
SAME = ConvCase(6, 6, (8, 6), (3, 1), padding=(1, 0), block=(3, 1), perm="rows")


class Net(torch.nn.Module):
    """A convolution, a transposed one back to about the size of x, and one with a residual."""

    def __init__(self, activation="gelu"):
        super().__init__()
        self.activation = activation
        self.norm = torch.nn.GroupNorm(2, 10)
        for name, case in (("down", CASE), ("up", TRANSPOSE), ("same", SAME)):
            layer = make_conv(case, padding=0.0)
            setattr(self, f"{name}_op", getattr(tetris.ops, layer.op))
            setattr(self, f"{name}_settings", (case.outputs, *layer.settings))
            for field in ("values", "bias"):
                self.register_parameter(
                    f"{name}_{field}", torch.nn.Parameter(getattr(layer, field))
                )
            for field in ("row_ptr", "col_idx", "row_perm", "col_perm"):
                self.register_buffer(f"{name}_{field}", getattr(layer, field))

    def layer(self, x, name, activation, residual=None):
        fields = ("values", "row_ptr", "col_idx", "row_perm", "col_perm", "bias")
        operands = [getattr(self, f"{name}_{field}") for field in fields]
        settings = getattr(self, f"{name}_settings")
        return getattr(self, f"{name}_op")(x, *operands, *settings, activation, residual)

    def forward(self, x):
        y = self.layer(self.norm(self.layer(x, "down", self.activation)), "up", "none")
        return self.layer(y, "same", "relu", residual=y)


def images(n, height, width, channels_last=False):
    g = torch.Generator().manual_seed(n + height + width)
    x = torch.randn(n, CASE.inputs, height, width, generator=g)
    return x.contiguous(memory_format=torch.channels_last) if channels_last else x


@pytest.fixture(autouse=True)
def _fresh_dynamo():
    torch.compiler.reset()


SAMPLES = [
    CASE,
    dataclasses.replace(CASE, channels_last=True, perm="none", bias=False),
    TRANSPOSE,
    dataclasses.replace(TRANSPOSE, channels_last=True, perm="cols", block=(16, 16)),
]


@pytest.mark.parametrize("requires_grad", [False, True])
@pytest.mark.parametrize("case", SAMPLES, ids=str)
def test_opcheck(case, requires_grad):
    layer, x, dy, residual = make_conv(case, padding=0.0), maps(case), results(case), results(case)
    for t in (x, dy, layer.values, layer.bias, residual):
        if t is not None:
            t.requires_grad_(requires_grad)
    call = getattr(torch.ops.tetris, layer.op).default
    args = (x, layer.values, *layer.index, layer.bias, case.outputs, *layer.settings)
    torch.library.opcheck(call, (*args, "gelu", residual))
    torch.library.opcheck(call, args)
    args = (dy, layer.values, *layer.index, case.inputs, case.size, *layer.window)
    torch.library.opcheck(getattr(torch.ops.tetris, f"{layer.op}_grad_input").default, args)
    args = (x, dy, *layer.index, case.block, *layer.window)
    torch.library.opcheck(getattr(torch.ops.tetris, f"{layer.op}_grad_values").default, args)


FORMATS = [
    dataclasses.replace(CASE, channels_last=channels_last, **change)
    for channels_last in (False, True)
    for change in (
        {},
        {"images": 0},
        {"images": 1},
        {"inputs": 2},
        {"outputs": 2},
        {"size": (1, 1)},
        {"size": (1, 9)},
        {"stride": (9, 9)},
    )
]
FORMATS += [dataclasses.replace(case, transposed=True) for case in FORMATS]


@pytest.mark.parametrize("case", [case for case in FORMATS if case.valid], ids=str)
def test_fake_kernels_give_shape_type_device_and_strides(case):
    from torch._subclasses import FakeTensorMode

    layer, x, dy = make_conv(case), maps(case), results(case)
    real = layer.conv(x), layer.grad_input(dy), layer.grad_values(x, dy)
    with FakeTensorMode() as mode:
        fields = ("values", "row_ptr", "col_idx", "row_perm", "col_perm", "bias")
        fake = dataclasses.replace(
            layer, **{n: mode.from_tensor(getattr(layer, n)) for n in fields}
        )
        x, dy = mode.from_tensor(x), mode.from_tensor(dy)
        traced = fake.conv(x), fake.grad_input(dy), fake.grad_values(x, dy)
    for a, b in zip(traced, real, strict=True):
        assert (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)
        assert a.stride() == b.stride()


@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_compile_fullgraph(dynamic, channels_last):
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for size in [(2, 8, 6), (1, 8, 6), (5, 9, 12)]:
        x = images(*size, channels_last)
        with torch.no_grad():
            got, want = compiled(x), net(x)
        torch.testing.assert_close(got, want)
        assert got.stride() == want.stride()
        want = torch.autograd.grad(net(x).pow(2).sum(), list(net.parameters()))
        got = torch.autograd.grad(compiled(x).pow(2).sum(), list(net.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


@pytest.mark.slow
def test_compile_with_inductor():
    if not shutil.which("g++"):
        pytest.skip("inductor needs g++")
    net = Net()
    compiled = torch.compile(net, fullgraph=True, dynamic=True)
    for size in [(2, 8, 6), (5, 9, 12)]:
        x = images(*size)
        want = torch.autograd.grad(net(x).pow(2).sum(), list(net.parameters()))
        got = torch.autograd.grad(compiled(x).pow(2).sum(), list(net.parameters()))
        for a, b in zip(got, want, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-3)


def test_dynamic_shapes_compile_once():
    net, graphs = Net(), []

    def backend(graph, _):
        graphs.append(graph)
        return graph

    compiled = torch.compile(net, fullgraph=True, dynamic=True, backend=backend)
    with torch.no_grad():
        # All different at first, channels too: torch takes equal sizes for one.
        for size in [(3, 8, 7), (4, 12, 7), (17, 13, 20), (2, 5, 30)]:
            compiled(images(*size))
    assert len(graphs) == 1


def exported(net):
    shapes = {"x": {0: torch.export.Dim("batch", min=1, max=4096)}}
    shapes["x"][2] = torch.export.Dim("height", min=4, max=512)
    shapes["x"][3] = torch.export.Dim("width", min=4, max=512)
    return torch.export.export(net, (images(3, 8, 6),), dynamic_shapes=shapes)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_export_save_load_run(activation):
    net = Net(activation).eval()
    file = io.BytesIO()
    torch.export.save(exported(net), file)
    file.seek(0)
    program = torch.export.load(file)
    assert "tetris.bsconv2d" in str(program.graph)
    assert "tetris.bsconv_transpose2d" in str(program.graph)
    for size in [(1, 8, 6), (2, 9, 31), (7, 30, 5)]:
        with torch.no_grad():
            torch.testing.assert_close(program.module()(images(*size)), net(images(*size)))


AOTI = """
import sys, torch, tetris
model = torch._inductor.aoti_load_package(sys.argv[1])
for x, want in torch.load(sys.argv[2]):
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
        pairs = [(x, net(x)) for x in (images(3, 8, 6), images(1, 13, 20))]
    torch.save(pairs, data)
    done = subprocess.run(
        [sys.executable, "-c", AOTI, package, data], capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.startswith("bsconv_f32_")


@pytest.mark.parametrize("low", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("case", [CASE, TRANSPOSE], ids=["conv", "transpose"])
def test_autocast_raises_operands_to_float32(case, low):
    layer, x, residual = make_conv(case, padding=0.0), maps(case).to(low), results(case).to(low)
    layer.values, layer.bias = layer.values.to(low), layer.bias.to(low)
    raised = dataclasses.replace(layer, values=layer.values.float(), bias=layer.bias.float())
    with torch.autocast("cpu", dtype=low):
        got = layer.conv(x, "relu", residual)
        mixed = layer.conv(x.float(), "relu", residual)
    assert got.dtype == mixed.dtype == torch.float32
    assert torch.equal(got, raised.conv(x.float(), "relu", residual.float()))
    assert torch.equal(got, mixed)
    with pytest.raises(TypeError, match="must be float32 or float64"):
        layer.conv(x)


@pytest.mark.parametrize("case", [CASE, TRANSPOSE], ids=["conv", "transpose"])
def test_autocast_gradients_come_back_in_the_operands_types(case):
    layer, x = make_conv(case, padding=0.0), maps(case)
    x16, residual16 = x.bfloat16().requires_grad_(), results(case).bfloat16().requires_grad_()
    values = layer.values.requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer.conv(x16, "silu", residual16).sum().backward()
    assert x16.grad.dtype == residual16.grad.dtype == torch.bfloat16
    assert values.grad.dtype == torch.float32
    x32, residual32 = (t.detach().float().requires_grad_() for t in (x16, residual16))
    y = layer.conv(x32, "silu", residual32)
    want = torch.autograd.grad(y.sum(), (x32, residual32, values))
    torch.testing.assert_close(x16.grad, want[0].bfloat16())
    torch.testing.assert_close(residual16.grad, want[1].bfloat16())
    torch.testing.assert_close(values.grad, want[2])


@pytest.mark.parametrize("case", [CASE, TRANSPOSE], ids=["conv", "transpose"])
def test_autocast_leaves_float64_alone(case):
    layer, x = make_conv(case, torch.float64), maps(case, torch.float64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer.conv(x).dtype == torch.float64


def test_compile_under_autocast():
    net, x = Net(), images(2, 8, 6)
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        compiled = torch.compile(net, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), net(x))


@pytest.mark.parametrize("case", [CASE, TRANSPOSE], ids=["conv", "transpose"])
def test_tracing_rejects_what_the_kernel_would(case):
    layer, x, residual = make_conv(case), maps(case), results(case)
    with torch._subclasses.FakeTensorMode() as mode:
        fields = ("values", "row_ptr", "col_idx", "row_perm", "col_perm", "bias")
        fake = dataclasses.replace(
            layer, **{n: mode.from_tensor(getattr(layer, n)) for n in fields}
        )
        x, residual = mode.from_tensor(x), mode.from_tensor(residual)
        with pytest.raises(RuntimeError, match="activation must be one of none, .*got 'bogus'"):
            fake.conv(x, "bogus")
        with pytest.raises(RuntimeError, match="values must be .*got torch.float64"):
            fake.conv(x, values=fake.values.double())
        with pytest.raises(RuntimeError, match=r"x must be \[N, C, H, W\]"):
            fake.conv(x[0])
        with pytest.raises(RuntimeError, match="residual must be shaped like the result"):
            fake.conv(x, residual=residual[..., :1])
        with pytest.raises(RuntimeError, match="residual must be .* and of its type"):
            fake.conv(x, residual=residual.double())
        for call, operands in ((fake.grad_input, (residual[0],)), (fake.grad_values, (x[0], x))):
            with pytest.raises(RuntimeError, match=rf"{layer.op}_grad_\w+: \w+ must be \[N, C"):
                call(*operands)
