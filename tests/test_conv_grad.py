"""Gradients of the convolution ops, of every order, on every instruction set."""

import dataclasses

import pytest
import torch

from cases import ACTIVATIONS, assert_product
from conv_cases import ConvCase, grid, make_conv, maps, random_case, reference_grads, results

pytestmark = pytest.mark.usefixtures("poison")


def check_gradient_products(case, dtype=torch.float32, seed=0):
    layer, x, dy = make_conv(case, dtype, seed), maps(case, dtype), results(case, dtype)
    (want_dx, dx_scale), (want_dvalues, dvalues_scale) = reference_grads(layer, x, dy)
    layer.grad_values(x * torch.nan, dy * torch.nan)  # working memory full of NaN
    out_terms = case.outputs // case.groups * case.kernel[0] * case.kernel[1]
    dx = layer.grad_input(dy)
    assert_product(dx, want_dx, dx_scale, out_terms)
    assert dx.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(dy))
    pixels = min(case.size[0] * case.size[1], case.out_size[0] * case.out_size[1])
    layer.grad_input(dy * torch.nan)
    dvalues = layer.grad_values(x, dy)
    assert_product(dvalues, want_dvalues, dvalues_scale, case.images * pixels)
    outside = torch.ones_like(dvalues, dtype=torch.bool)
    outside[layer.entries[0]] = False
    assert (dvalues[outside] == 0).all()


@pytest.mark.parametrize("case", grid()[::2], ids=str)
def test_gradient_products(case, isa):
    check_gradient_products(case)


@pytest.mark.parametrize("seed", range(200, 260))
def test_gradient_products_random_case(seed, isa):
    check_gradient_products(random_case(seed), seed=seed)


@pytest.mark.parametrize("case", [*grid()[1::8], *map(random_case, range(300, 320))], ids=str)
def test_gradient_products_float64(case):
    check_gradient_products(case, torch.float64)


LARGE = [
    ConvCase(64, 80, (30, 31), padding=(1, 1), block=(8, 1), images=3, density=0.1),
    ConvCase(256, 300, (7, 7), padding=(1, 1), block=(4, 1), images=1, density=0.1),
    ConvCase(48, 48, (40, 37), (5, 5), (2, 2), (2, 2), groups=48, block=(1, 1)),
    ConvCase(32, 48, (19, 21), (4, 4), (2, 2), (1, 1), block=(8, 2), transposed=True),
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_gradients_are_the_same_for_any_thread_count_and_any_run(case, isa, threads):
    layer, x, dy = make_conv(case), maps(case), results(case)
    threads(1)
    dx, dvalues = layer.grad_input(dy), layer.grad_values(x, dy)
    for n in (2, 3, 7):
        threads(n)
        assert torch.equal(layer.grad_input(dy), dx)
        assert torch.equal(layer.grad_values(x, dy), dvalues)


CONV = ConvCase(6, 10, (7, 6), (3, 2), (2, 1), (1, 1), groups=2, block=(4, 2))
TRANSPOSE = dataclasses.replace(CONV, output_padding=(1, 0), transposed=True)
BOTH = pytest.mark.parametrize("case", [CONV, TRANSPOSE], ids=["conv", "transpose"])


@BOTH
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_autograd_matches_autograd_of_the_dense_layer(activation, channels_last, case, isa):
    case = dataclasses.replace(case, channels_last=channels_last)
    layer, x, dy = make_conv(case, padding=0.0), maps(case), results(case, seed=3)
    operands = (x, layer.values, layer.bias, results(case))

    sparse = [t.clone().requires_grad_() for t in operands]
    x, values, bias, residual = sparse
    y = layer.conv(x, activation, residual, values, bias)
    got = torch.autograd.grad(y, sparse, dy)

    dense = [t.double().requires_grad_() for t in operands]
    x, values, bias, residual = dense
    want_y = ACTIVATIONS[activation](layer.dense_conv(x, layer.dense(values), bias) + residual)
    want = torch.autograd.grad(want_y, dense, dy.double())
    torch.testing.assert_close(y.double(), want_y, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=2e-5)


@BOTH
@pytest.mark.parametrize(
    "wanted", ["x", "values", "bias", "residual", "x values", "values bias", "x bias residual"]
)
def test_only_the_wanted_gradients_are_made(wanted, case):
    layer = make_conv(case, padding=0.0)
    operands = {
        "x": maps(case),
        "values": layer.values,
        "bias": layer.bias,
        "residual": results(case),
    }
    for name, t in operands.items():
        t.requires_grad_(name in wanted.split())
    x, values, bias, residual = operands.values()
    layer.conv(x, "gelu", residual).sum().backward()  # an expanded gradient: every stride is zero
    for name, t in operands.items():
        assert (t.grad is not None) == (name in wanted.split())
    dense = torch.nn.functional.gelu(layer.dense_conv(x, layer.dense(values), bias) + residual)
    for name in wanted.split():
        want = torch.autograd.grad(dense.sum(), operands[name], retain_graph=True)[0]
        torch.testing.assert_close(operands[name].grad, want, rtol=1e-4, atol=1e-4)


@BOTH
def test_no_graph_without_a_need_for_one(case):
    layer, x = make_conv(case), maps(case)
    assert layer.conv(x).grad_fn is None
    layer.values.requires_grad_()
    with torch.no_grad():
        assert layer.conv(x).grad_fn is None
    with torch.inference_mode():
        assert layer.conv(x).grad_fn is None
    assert layer.conv(x).grad_fn is not None


@BOTH
def test_fused_and_differentiable_activation_agree(case, isa):
    layer, x, residual = make_conv(case), maps(case), results(case)
    for activation in ACTIVATIONS:
        fused = layer.conv(x, activation, residual)
        unfused = layer.conv(x.clone().requires_grad_(), activation, residual)
        torch.testing.assert_close(fused, unfused.detach(), rtol=2e-6, atol=2e-6)


GRADCHECK = [
    ConvCase(2, 3, (3, 4), (2, 2), padding=(1, 1), block=(2, 1), images=2),
    ConvCase(4, 2, (4, 3), (3, 2), (2, 1), (1, 0), groups=2, block=(1, 2), images=1, perm="rows"),
    ConvCase(3, 3, (4, 4), (2, 2), (2, 3), (2, 1), (2, 1), groups=3, block=(1, 1), images=1),
    ConvCase(3, 2, (2, 2), (1, 1), block=(4, 4), density=1.0, perm="none"),
    ConvCase(2, 2, (3, 3), density=0.0, images=1),
    ConvCase(2, 2, (3, 3), images=0),
]
GRADCHECK += [dataclasses.replace(case, transposed=True) for case in GRADCHECK]
GRADCHECK += [
    ConvCase(2, 3, (2, 3), (2, 2), (2, 3), (1, 0), (1, 2), (1, 2), block=(2, 1), transposed=True),
    ConvCase(2, 2, (2, 2), (1, 2), (1, 1), (0, 0), (3, 2), (2, 1), block=(2, 2), transposed=True),
]
GRADCHECK = [case for case in GRADCHECK if case.valid]


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck_and_gradgradcheck(case):
    layer = make_conv(case, torch.float64, padding=0.0)
    residual = results(case, torch.float64)
    operands = (maps(case, torch.float64), layer.values, layer.bias, residual)
    inputs = [t.requires_grad_() for t in operands]

    def f(x, values, bias, residual):
        return layer.conv(x, "silu", residual, values, bias)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck_of_the_gradient_ops(case):
    layer = make_conv(case, torch.float64, padding=0.0)
    x = maps(case, torch.float64).requires_grad_()
    dy = results(case, torch.float64).requires_grad_()
    values = layer.values.requires_grad_()
    for f, inputs in ((layer.grad_input, (dy, values)), (layer.grad_values, (x, dy))):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@BOTH
def test_gradcheck_of_activations(activation, case):
    case = dataclasses.replace(case, inputs=2, outputs=2, size=(3, 3), images=1)
    layer = make_conv(case, torch.float64, padding=0.0)
    x = maps(case, torch.float64).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: layer.conv(x, activation), x)
    assert torch.autograd.gradgradcheck(lambda x: layer.conv(x, activation), x)


@BOTH
def test_third_order(case):
    # With output_padding torch's own convolution has no third derivative.
    case = dataclasses.replace(case, output_padding=(0, 0))
    layer = make_conv(case, torch.float64, padding=0.0)
    x = maps(case, torch.float64).requires_grad_()
    values = layer.values.requires_grad_()

    def chain(product):
        g = product(x, values).sin().sum()
        for _ in range(3):
            gx, gv = torch.autograd.grad(g, (x, values), create_graph=True)
            g = gx.pow(2).mean() + gv.sin().sum()
        return g

    got = chain(lambda x, v: layer.conv(x, values=v))
    want = chain(lambda x, v: layer.dense_conv(x, layer.dense(v), layer.bias))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("transposed", [False, True])
def test_pixels_that_a_kernel_position_never_reads_do_not_reach_its_gradient(bad, transposed, isa):
    """The last column of the big map is out of reach of a 3x3 kernel's first column."""
    settings = ((3, 3), (1, 1), (1, 1), (1, 1), 1)
    index = (torch.tensor([0, 9]).int(), torch.arange(9).int(), None, None)
    g = torch.Generator().manual_seed(0)
    big, small = (torch.randn(2, 1, 5, 6, generator=g) for _ in range(2))
    big[:, :, :, -1] = bad
    name = "bsconv_transpose2d" if transposed else "bsconv2d"
    op = getattr(torch.ops.tetris, f"{name}_grad_values")
    x, grad = (small, big) if transposed else (big, small)
    got = op(x, grad, *index, (1, 1), *settings).view(3, 3)
    assert got[:, 0].isfinite().all()
    assert not got[:, 1:].isfinite().any()
