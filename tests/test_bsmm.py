"""The values of tetris::bsmm, on every instruction set, against a float64 product."""

import dataclasses
import functools

import pytest
import torch

from cases import ACTIVATIONS, Case, assert_product, grid, make_layer, reference, tokens

pytestmark = pytest.mark.usefixtures("poison")


def stale(layer, m):
    """Fill the op's working memory with NaN, so that a later read of stale data shows."""
    layer.bsmm(torch.full((m, layer.k), torch.nan))
    torch.ops.tetris.bsmm_grad_input(
        torch.full((m, layer.n), torch.nan), layer.values, *layer.index, layer.k
    )


@functools.cache  # the same for each instruction set
def prepared(case, seed=0):
    layer, x = make_layer(case, seed=seed), tokens(case)
    return layer, x, *reference(layer, x)


@pytest.mark.parametrize("case", grid(), ids=str)
def test_values(case, isa):
    layer, x, want, scale = prepared(case)
    stale(layer, case.m)
    assert_product(layer.bsmm(x), want, scale, terms=case.k)


@pytest.mark.parametrize("case", grid()[::5], ids=str)
def test_values_float64(case, isa):
    layer, x = make_layer(case, torch.float64), tokens(case, torch.float64)
    assert_product(layer.bsmm(x), *reference(layer, x), terms=case.k)


@pytest.mark.parametrize("seed", range(40))
def test_values_random_case(seed, isa):
    g = torch.Generator().manual_seed(1000 + seed)

    def draw(low, high):
        return int(torch.randint(low, high + 1, (), generator=g))

    case = Case(
        m=draw(0, 90),
        n=draw(1, 150),
        k=draw(1, 150),
        bo=draw(1, [4, 16, 128][seed % 3]),
        bi=draw(1, [1, 4, 128][seed // 3 % 3]),
        density=draw(0, 10) / 10,
        perm=["both", "rows", "cols", "none"][draw(0, 3)],
        bias=bool(draw(0, 1)),
    )
    layer, x, want, scale = prepared(case, seed)
    stale(layer, case.m)
    assert_product(layer.bsmm(x), want, scale, terms=case.k)


@pytest.mark.parametrize("m", [64, 512])
def test_values_large_enough_for_threads_and_several_panels(m, isa, threads):
    threads(4)
    case = Case(m, 530, 2050, 4, 1, 0.2)
    layer, x = make_layer(case), tokens(case)
    assert_product(layer.bsmm(x), *reference(layer, x), terms=case.k)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3), (3, 1, 2, 2)], ids=str)
def test_any_leading_shape(lead, isa):
    layer = make_layer(Case(1, 21, 18, 4, 2))
    x = torch.randn(*lead, 18, generator=torch.Generator().manual_seed(3))
    y = layer.bsmm(x)
    assert y.shape == (*lead, 21)
    assert y.is_contiguous()
    assert_product(y, *reference(layer, x), terms=18)


def strided_tokens():
    g = torch.Generator().manual_seed(4)
    big = torch.randn(40, 60, generator=g)
    complexes = torch.randn(12, 18, dtype=torch.complex64, generator=g)
    return {
        "transposed": torch.randn(18, 12, generator=g).t(),
        "rows-strided": big[::3, :18],
        "columns-strided": big[:12, ::3][:, :18],
        "offset": big[5:17, 7:25],
        "one-row-expanded": big[:1, :18].expand(12, 18),
        "one-column-expanded": big[:12, :1].expand(12, 18),
        "flipped": big[:12, :18].flip(0).flip(1),
        "permuted-3d": torch.randn(4, 18, 3, generator=g).permute(2, 0, 1),
        "real-part": complexes.real,
        "negative-view": complexes.conj().imag,
        "channels-last": torch.randn(2, 3, 4, 18, generator=g).to(
            memory_format=torch.channels_last
        ),
    }


@pytest.mark.parametrize("kind", strided_tokens())
def test_any_strides_of_x(kind, isa):
    layer, x = make_layer(Case(12, 21, 18, 4, 2)), strided_tokens()[kind]
    for part in (x, x[:1], x[0], x[..., :1, :]):
        assert_product(layer.bsmm(part), *reference(layer, part), terms=18)


def test_other_operands_may_be_strided(isa):
    case = Case(9, 21, 18, 4, 2)
    layer, x = make_layer(case), tokens(case)
    want = layer.bsmm(x)

    def stretch(t):
        return torch.stack([t, torch.full_like(t, 99)], dim=-1)[..., 0]

    other = dataclasses.replace(
        layer,
        **{
            name: stretch(getattr(layer, name))
            for name in ("values", "row_ptr", "col_idx", "row_perm", "col_perm", "bias")
        },
    )
    assert not other.values.is_contiguous()
    assert torch.equal(other.bsmm(x), want)


@pytest.mark.parametrize("m", [1, 2, 17, 40])
def test_operands_are_not_written(m, isa):
    case = Case(m, 21, 18, 4, 2)
    layer, x = make_layer(case, padding=0.0), tokens(case)
    before = [t.clone() for t in (x, layer.values, *layer.index, layer.bias)]
    layer.bsmm(x, "gelu")
    for now, then in zip((x, layer.values, *layer.index, layer.bias), before, strict=True):
        assert torch.equal(now, then)


@pytest.mark.parametrize("m", [1, 2, 15, 16, 40])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("block", [(1, 1), (4, 1), (5, 3), (16, 16)], ids=str)
def test_nonfinite_x_reaches_the_outputs_that_store_it_and_no_other(m, value, block, isa):
    case = Case(m, 37, 50, *block, 0.3)
    layer, x = make_layer(case), tokens(case)
    stored = torch.where(layer.mask()[int(layer.mask().sum(1).argmax())])[0]
    x[m // 2, stored[0]] = value
    if m > 2:
        x[0, stored[:2]] = torch.tensor([torch.inf, -torch.inf])  # these may meet: NaN
    want, scale = reference(layer, x)
    got = layer.bsmm(x)
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.double()[want.isinf()], want[want.isinf()])
    assert_product(got[finite], want[finite], scale[finite], terms=50)
    assert finite.any()
    assert not finite.all()


@pytest.mark.parametrize("m", [1, 20])
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nonfinite_weight_and_bias_stay_in_their_row(m, value, isa):
    case = Case(m, 30, 24, 4, 3, 0.5)
    layer, x = make_layer(case), tokens(case).abs() + 1
    row = int(torch.where(layer.mask().any(1))[0][0])
    stored, place = layer.entries
    at = int(torch.where(place[0] == row)[0][0])
    layer.values[tuple(i[at] for i in stored)] = value
    layer.bias[5] = value
    got = layer.bsmm(x)
    hit = torch.zeros(30, dtype=torch.bool)
    hit[[row, 5]] = True
    assert not got[:, hit].isfinite().any()
    assert got[:, ~hit].isfinite().all()


EDGES = [0.0, -0.0, 1e-45, -1e-45, 1e-38, -1e-38, 1e-7, -1e-7, 1e-3, -1e-3, 3e38, -3e38]
EDGES += [torch.inf, -torch.inf, torch.nan, 10.0, -10.0, 20.0, -20.0, 88.7, -88.7, 89.5, -89.5]
EDGES += [-5.0, -5.5, -6.0, -8.0, -12.0, -13.5, -14.2, -30.0, 104.0, -104.0, 1e10, -1e10, 1e20]


def through(x, activation):
    """The activation alone: every x[t, i] times an identity weight in 1x1 blocks."""
    k = x.shape[-1]
    return torch.ops.tetris.bsmm(
        x,
        torch.ones(k, 1, 1),
        torch.arange(k + 1, dtype=torch.int32),
        torch.arange(k, dtype=torch.int32),
        None,
        None,
        None,
        k,
        activation,
    )


def exact(x, activation):
    """In float64, by formulas that do not cancel in the tails (torch's own do)."""
    x = x.double()
    s = 0.7978845608028654 * (x + 0.044715 * x**3)
    return {
        "none": lambda: x,
        "relu": lambda: x.relu(),
        "gelu": lambda: x * torch.special.erfc(-x * 0.5**0.5) / 2,
        "gelu_tanh": lambda: x * torch.sigmoid(2 * s),
        "silu": lambda: x * torch.sigmoid(x),
    }[activation]()


@pytest.mark.parametrize("m", [1, 3, 33])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_at_least_as_accurate_as_torch(activation, m, isa):
    x = torch.cat([torch.tensor(EDGES), torch.linspace(-16, 16, 4001)])
    got, torchs = through(x.expand(m, -1), activation), ACTIVATIONS[activation](x)
    want = exact(x, activation)
    torch.testing.assert_close(got, got[:1].expand(m, -1), rtol=0, atol=0, equal_nan=True)
    got = got[-1].double()
    # Infinities as in the formulas. (Torch's own vectorized gelu makes NaN of inf and inf of 3e38.)
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.isinf(), want.isinf()), x[got.isinf() != want.isinf()]
    # exp(-x^2 / 2) magnifies the rounding of its argument by x^2. Subnormal results may flush.
    rounding = (10 + x.double().clamp(-99, 99) ** 2) * 2**-24 * want.abs()
    bound = torch.maximum(rounding, 2 * (torchs - want).abs().nan_to_num(0, 0)).clamp_min(2e-38)
    finite = want.isfinite()
    bad = finite & ~((got - want).abs() <= bound)
    assert not bad.any(), (x[bad][:5], got[bad][:5], want[bad][:5])


@pytest.mark.parametrize("m", [1, 2, 40])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_after_product_and_bias(activation, bias, m, isa):
    case = Case(m, 45, 33, 8, 1, 0.4, bias=bias)
    layer, x = make_layer(case), tokens(case)
    z, scale = reference(layer, x)
    # Each of these functions has slope below 1.13; its own error is a few units of the result.
    want = ACTIVATIONS[activation](z)
    assert_product(layer.bsmm(x, activation), want, 1.2 * scale + 8 * want.abs(), terms=33)


def test_the_default_activation_is_none():
    case = Case(3, 8, 8, 4, 1)
    layer, x = make_layer(case), tokens(case)
    got = torch.ops.tetris.bsmm(x, layer.values, *layer.index, layer.bias, layer.n)
    assert torch.equal(got, layer.bsmm(x, "none"))


def test_identity_permutation_equals_none(isa):
    case = Case(19, 40, 24, 4, 2, perm="none")
    layer, x = make_layer(case), tokens(case)
    other = dataclasses.replace(
        layer,
        row_perm=torch.arange(40, dtype=torch.int32),
        col_perm=torch.arange(24, dtype=torch.int32),
    )
    assert torch.equal(layer.bsmm(x), other.bsmm(x))
    assert torch.equal(layer.bsmm(x[:1]), other.bsmm(x[:1]))


@pytest.mark.parametrize("m", [2, 7, 16, 33, 100])
def test_a_token_does_not_depend_on_its_neighbours(m, isa):
    """Batching changes no bit: from two tokens on, one order of summation whatever the panel."""
    case = Case(m, 37, 53, 4, 1, 0.3)
    layer, x = make_layer(case), tokens(case)
    whole = layer.bsmm(x)
    for begin in range(0, m - 1, 5):
        assert torch.equal(layer.bsmm(x[begin : begin + 2]), whole[begin : begin + 2])


@pytest.mark.parametrize("wrapper", [True, False])
def test_python_wrapper_is_the_op(wrapper):
    import tetris

    case = Case(5, 12, 16, 4, 2)
    layer, x = make_layer(case), tokens(case)
    args = (x, layer.values, *layer.index, layer.bias, layer.n, "silu")
    call = tetris.ops.bsmm if wrapper else torch.ops.tetris.bsmm
    assert torch.equal(call(*args), layer.bsmm(x, "silu"))
