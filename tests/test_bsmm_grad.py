"""Gradients of the bsmm ops, of every order, on every instruction set."""

import pytest
import torch

from cases import ACTIVATIONS, Case, assert_product, grid, make_layer, tokens

pytestmark = pytest.mark.usefixtures("poison")


def reference_grads(layer, x, dy):
    """dx and dvalues in float64 with the matching sums of absolute values; zero in padding."""
    w, mask = layer.dense(layer.values).double(), layer.mask()
    x, dy = x.double(), dy.double()
    dx, dx_scale = dy @ w, dy.abs() @ w.abs()
    dw, dw_scale = (dy.T @ x) * mask, (dy.abs().T @ x.abs()) * mask
    stored, place = layer.entries
    zeros = torch.zeros(layer.values.shape, dtype=torch.float64)
    return (
        (dx, dx_scale),
        (zeros.index_put(stored, dw[place]), zeros.index_put(stored, dw_scale[place])),
    )


@pytest.mark.parametrize("case", grid(), ids=str)
def test_gradient_products(case, isa):
    layer, x = make_layer(case), tokens(case)
    dy = tokens(case, seed=2, features=case.n)
    # Working memory full of NaN, as in the forward's tests.
    torch.ops.tetris.bsmm_grad_values(x * torch.nan, dy * torch.nan, *layer.index, case.bo, case.bi)
    dx = torch.ops.tetris.bsmm_grad_input(dy, layer.values, *layer.index, case.k)
    dvalues = torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi)
    want_dx, want_dvalues = reference_grads(layer, x, dy)
    assert_product(dx, *want_dx, terms=case.n)
    assert_product(dvalues, *want_dvalues, terms=case.m)


@pytest.mark.parametrize("m", [300, 1030])
def test_gradient_products_large_enough_for_threads(m, isa, threads):
    threads(4)
    case = Case(m, 530, 300, 4, 2, 0.2)
    layer, x = make_layer(case), tokens(case)
    dy = tokens(case, seed=2, features=case.n)
    want_dx, want_dvalues = reference_grads(layer, x, dy)
    dx = torch.ops.tetris.bsmm_grad_input(dy, layer.values, *layer.index, case.k)
    dvalues = torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi)
    assert_product(dx, *want_dx, terms=case.n)
    assert_product(dvalues, *want_dvalues, terms=case.m)


def tall() -> list[Case]:
    """What has outputs as the lanes: whole vectors of a block's height, and rows that are over."""
    cases = [
        Case(m, 96, 80, bo, bi, 0.4)
        for m in (0, 1, 15, 16, 17, 63, 65, 129, 300)
        for bo, bi in ((16, 16), (32, 3))
    ]
    cases += [
        Case(40, 2 * bo, 100, bo, bi, density)
        for bo in (8, 12, 16, 24, 32, 48, 64, 128)
        for bi, density in ((1, 0.3), (3, 0.5), (16, 1.0))
    ]
    # Ragged in both directions, and of every number of inputs that a tile takes.
    cases += [Case(33, n, 45, 32, 16, 0.7) for n in (33, 40, 50, 57, 63)]
    cases += [Case(20, 64, k, 32, 1, 1.0) for k in range(1, 13)]
    cases += [Case(70, 100, 90, 16, 4, 0.5, perm, bias=False) for perm in ("none", "rows", "cols")]
    return cases


@pytest.mark.parametrize("case", tall(), ids=str)
def test_values_gradient_of_tall_blocks(case, isa):
    layer, x = make_layer(case), tokens(case)
    dy = tokens(case, seed=2, features=case.n)
    torch.ops.tetris.bsmm_grad_values(x * torch.nan, dy * torch.nan, *layer.index, case.bo, case.bi)
    dvalues = torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi)
    assert_product(dvalues, *reference_grads(layer, x, dy)[1], terms=case.m)


def test_values_gradient_is_bit_identical_on_any_number_of_threads(isa, threads):
    case = Case(300, 600, 530, 32, 4, 0.3)
    layer, x = make_layer(case), tokens(case)
    dy = tokens(case, seed=2, features=case.n)
    results = []
    for n in (1, 2, 4):
        threads(n)
        results.append(torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


@pytest.mark.parametrize("bad", [torch.nan, torch.inf], ids=str)
@pytest.mark.parametrize("where", ["x", "dy"])
def test_values_gradient_shows_nan_and_inf_where_they_belong_and_nowhere_else(bad, where, isa):
    case = Case(70, 50, 40, 32, 4, 0.6)
    layer, x = make_layer(case), tokens(case)
    dy = tokens(case, seed=2, features=case.n)
    clean = torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi)
    (x if where == "x" else dy)[37, 11] = bad
    got = torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi)
    (b, i, o), (row, col) = layer.entries
    hit = torch.zeros_like(got, dtype=torch.bool)
    hit[b, i, o] = (col if where == "x" else row) == 11
    assert hit.any()
    assert not got[hit].isfinite().any()
    assert torch.equal(got[~hit], clean[~hit])


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("lead", [(1,), (20,), (2, 3), ()], ids=str)
def test_autograd_matches_autograd_of_the_dense_layer(lead, activation, isa):
    case = Case(1, 21, 18, 4, 2)
    layer = make_layer(case, padding=0.0)
    g = torch.Generator().manual_seed(5)
    x, dy = torch.randn(*lead, 18, generator=g), torch.randn(*lead, 21, generator=g)

    sparse = [t.clone().requires_grad_() for t in (x, layer.values, layer.bias)]
    y = torch.ops.tetris.bsmm(sparse[0], sparse[1], *layer.index, sparse[2], layer.n, activation)
    got = torch.autograd.grad(y, sparse, dy)

    dense = [t.double().requires_grad_() for t in (x, layer.values, layer.bias)]
    z = torch.nn.functional.linear(dense[0], layer.dense(dense[1]), dense[2])
    want_y = ACTIVATIONS[activation](z)
    want = torch.autograd.grad(want_y, dense, dy.double())
    torch.testing.assert_close(y.double(), want_y, rtol=1e-5, atol=1e-5)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a.double(), b, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("wanted", ["x", "values", "bias", "x values", "x bias", "values bias"])
def test_only_the_wanted_gradients_are_made(wanted):
    case = Case(6, 21, 18, 4, 2)
    layer, x = make_layer(case, padding=0.0), tokens(case)
    operands = {"x": x, "values": layer.values, "bias": layer.bias}
    for name, t in operands.items():
        t.requires_grad_(name in wanted.split())
    y = layer.bsmm(x, "gelu")
    y.sum().backward()  # an expanded gradient: every stride is zero
    for name, t in operands.items():
        assert (t.grad is not None) == (name in wanted.split())
    dense = torch.nn.functional.gelu(
        torch.nn.functional.linear(x, layer.dense(layer.values), layer.bias)
    )
    for name in wanted.split():
        want = torch.autograd.grad(dense.sum(), operands[name], retain_graph=True)[0]
        torch.testing.assert_close(operands[name].grad, want, rtol=1e-4, atol=1e-5)


def test_no_graph_without_a_need_for_one():
    case = Case(6, 21, 18, 4, 2)
    layer, x = make_layer(case), tokens(case)
    assert layer.bsmm(x).grad_fn is None
    layer.values.requires_grad_()
    with torch.no_grad():
        assert layer.bsmm(x).grad_fn is None
    with torch.inference_mode():
        assert layer.bsmm(x).grad_fn is None
    assert layer.bsmm(x).grad_fn is not None


def test_fused_and_differentiable_activation_agree(isa):
    case = Case(33, 21, 18, 4, 2)
    layer, x = make_layer(case), tokens(case)
    for activation in ACTIVATIONS:
        fused = layer.bsmm(x, activation)
        unfused = layer.bsmm(x.clone().requires_grad_(), activation)
        torch.testing.assert_close(fused, unfused.detach(), rtol=2e-6, atol=1e-6)


GRADCHECK = [
    Case(3, 7, 5, 2, 2, 0.6),
    Case(1, 7, 5, 4, 1, 0.6),
    Case(2, 5, 6, 1, 3, 0.6, "rows"),
    Case(6, 4, 5, 1, 1, 0.5, "none"),
    Case(2, 6, 6, 8, 8, 1.0, "cols"),
    Case(0, 4, 4, 2, 2),
    Case(2, 4, 4, 2, 2, 0.0),
]


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck_and_gradgradcheck(case, activation):
    layer = make_layer(case, torch.float64, padding=0.0)
    x = tokens(case, torch.float64)
    inputs = [t.requires_grad_() for t in (x, layer.values, layer.bias)]

    def f(x, values, bias):
        return torch.ops.tetris.bsmm(x, values, *layer.index, bias, layer.n, activation)

    assert torch.autograd.gradcheck(f, inputs)
    assert torch.autograd.gradgradcheck(f, inputs)


@pytest.mark.parametrize("case", GRADCHECK, ids=str)
def test_gradcheck_of_the_gradient_ops(case):
    layer = make_layer(case, torch.float64, padding=0.0)
    x = tokens(case, torch.float64).requires_grad_()
    dy = tokens(case, torch.float64, seed=2, features=case.n).requires_grad_()
    values = layer.values.requires_grad_()

    def grad_input(dy, values):
        return torch.ops.tetris.bsmm_grad_input(dy, values, *layer.index, layer.k)

    def grad_values(x, dy):
        return torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi)

    for f, inputs in ((grad_input, (dy, values)), (grad_values, (x, dy))):
        assert torch.autograd.gradcheck(f, inputs)
        assert torch.autograd.gradgradcheck(f, inputs)


def test_third_order():
    case = Case(3, 5, 4, 2, 2, 0.7)
    layer = make_layer(case, torch.float64, padding=0.0)
    x = tokens(case, torch.float64).requires_grad_()
    values = layer.values.requires_grad_()

    def chain(product):
        g = product(x, values).sin().sum()
        for _ in range(3):
            gx, gv = torch.autograd.grad(g, (x, values), create_graph=True)
            g = gx.pow(2).sum() + gv.sin().sum()
        return g

    got = chain(lambda x, v: torch.ops.tetris.bsmm(x, v, *layer.index, None, layer.n))
    want = chain(lambda x, v: torch.nn.functional.linear(x, layer.dense(v)))
    torch.testing.assert_close(got, want, rtol=1e-9, atol=1e-9)


def test_grad_values_leaves_zero_where_no_weight_is(isa):
    case = Case(20, 30, 25, 16, 16, 1.0)
    layer, x = make_layer(case), tokens(case)
    dy = tokens(case, seed=2, features=case.n)
    dvalues = torch.ops.tetris.bsmm_grad_values(x, dy, *layer.index, case.bo, case.bi)
    outside = torch.ones_like(dvalues, dtype=torch.bool)
    outside[layer.entries[0]] = False
    assert outside.any()
    assert (dvalues[outside] == 0).all()
    assert (dvalues[~outside] != 0).all()
