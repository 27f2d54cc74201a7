"""The values of the convolution ops, on every instruction set, against torch's in float64."""

import dataclasses
import functools

import pytest
import torch

import tetris
from cases import ACTIVATIONS, assert_product
from conv_cases import ConvCase, ConvLayer, grid, make_conv, maps, random_case, reference, results

pytestmark = pytest.mark.usefixtures("poison")

CONV = ConvCase(10, 14, (6, 7), padding=(1, 1), groups=2, block=(4, 2))
TRANSPOSE = dataclasses.replace(CONV, stride=(2, 3), output_padding=(1, 2), transposed=True)
BOTH = pytest.mark.parametrize("case", [CONV, TRANSPOSE], ids=["conv", "transpose"])
FORMATS = {"nchw": torch.contiguous_format, "nhwc": torch.channels_last}


@functools.cache  # the same for each instruction set
def prepared(case, seed=0):
    layer, x = make_conv(case, seed=seed), maps(case)
    return layer, x, *reference(layer, x)


@functools.cache
def stale_operands():
    case = ConvCase(24, 64, (12, 12), padding=(1, 1), block=(8, 1), images=4)
    return make_conv(case), maps(case) * torch.nan


def stale():
    """Fill the ops' working memory with NaN, so that a later read of stale data shows."""
    layer, x = stale_operands()
    assert layer.conv(x).isnan().any()


@pytest.mark.parametrize("case", grid(), ids=str)
def test_values(case, isa):
    layer, x, want, scale = prepared(case)
    stale()
    assert_product(layer.conv(x), want, scale, case.terms)


@pytest.mark.parametrize("seed", range(80))
def test_values_random_case(seed, isa):
    case = random_case(seed)
    layer, x, want, scale = prepared(case, seed)
    stale()
    y = layer.conv(x)
    assert_product(y, want, scale, case.terms)
    assert y.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(x))


@pytest.fixture
def taps_apart():
    tetris._C.force_taps(tetris._C.Taps.apart)
    yield
    tetris._C.force_taps(tetris._C.Taps.by_cost)


@pytest.mark.parametrize("case", [*grid()[::3], *map(random_case, range(600, 640))], ids=str)
def test_values_tap_by_tap(case, isa, taps_apart):
    layer, x, want, scale = prepared(case)
    stale()
    assert_product(layer.conv(x), want, scale, case.terms)


@BOTH
def test_which_layers_run_tap_by_tap(case, isa):
    """Those whose kernel reaches over much of the map; each tap is a pass."""
    case = dataclasses.replace(case, inputs=64, outputs=64, size=(20, 20), groups=1, block=(8, 1))
    case = dataclasses.replace(case, stride=(1, 1), output_padding=(0, 0))
    far = dataclasses.replace(case, dilation=(15, 15), padding=(15, 15))
    for one, passes in ((case, 1), (far, 9)):
        layer, x, want, scale = prepared(one)
        y = layer.conv(x)
        assert_product(y, want, scale, one.terms)
        assert tetris._C.conv_passes() == passes
        layer.grad_input(torch.ones_like(y))
        assert tetris._C.conv_passes() == passes
        layer.grad_values(x, torch.ones_like(y))
        assert tetris._C.conv_passes() == passes


@pytest.mark.parametrize("case", [*grid()[::4], *map(random_case, range(500, 530))], ids=str)
def test_values_float64(case):
    layer, x = make_conv(case, torch.float64), maps(case, torch.float64)
    assert_product(layer.conv(x), *reference(layer, x), case.terms)
    if case.images:
        assert tetris._C.last_kernel().startswith("bsconv_f64_")
        assert tetris._C.last_kernel().endswith("__scalar")


LARGE = [
    ConvCase(64, 80, (30, 31), padding=(1, 1), block=(8, 1), images=3, density=0.1),
    ConvCase(64, 64, (14, 14), padding=(1, 1), block=(16, 16), images=1, density=0.3),
    ConvCase(256, 300, (7, 7), padding=(1, 1), block=(4, 1), images=1, density=0.1),
    ConvCase(48, 48, (40, 37), (5, 5), (2, 2), (2, 2), groups=48, block=(1, 1)),
    ConvCase(32, 48, (19, 21), (4, 4), (2, 2), (1, 1), block=(8, 2), transposed=True),
    ConvCase(256, 128, (5, 5), (3, 3), (2, 2), (1, 1), block=(8, 1), images=1, transposed=True),
    ConvCase(128, 64, (19, 19), padding=(14, 14), dilation=(14, 14), block=(8, 1)),  # tap by tap
]


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_bits_are_the_same_for_any_thread_count_and_any_run(case, isa, threads):
    layer, x, want, scale = prepared(case)
    threads(1)
    first = layer.conv(x, "gelu")
    assert_product(layer.conv(x), want, scale, case.terms)
    for n in (1, 2, 3, 7):
        threads(n)
        for _ in range(2):
            stale()
            assert torch.equal(layer.conv(x, "gelu"), first)


@BOTH
@pytest.mark.parametrize("name", FORMATS)
def test_the_result_is_in_the_memory_format_of_x(case, name, isa):
    layer, x = make_conv(case), maps(case).contiguous(memory_format=FORMATS[name])
    y = layer.conv(x)
    assert y.shape == (case.images, case.outputs, *case.out_size)
    assert y.is_contiguous(memory_format=FORMATS[name])
    assert y.dtype == x.dtype
    assert_product(y, *reference(layer, x), case.terms)


def strided_maps(case):
    """Maps of one shape and all manner of strides."""
    g = torch.Generator().manual_seed(4)
    n, c, (h, w) = case.images, case.inputs, case.size
    big = torch.randn(n + 3, c + 5, h + 4, 2 * w + 3, generator=g)
    complexes = torch.randn(n, c, h, w, dtype=torch.complex64, generator=g)
    hwnc = torch.randn(h, w, n, c, generator=g)
    return {
        "crop": big[2 : n + 2, 1 : c + 1, 3 : h + 3, 2 : w + 2],
        "columns-strided": big[:n, :c, :h, : 2 * w : 2],
        "channels-strided": torch.randn(n, 2 * c, h, w, generator=g)[:, ::2],
        "channels-of-channels-last": torch.randn(n, 2 * c, h, w, generator=g).contiguous(
            memory_format=torch.channels_last
        )[:, c:],
        "crop-of-channels-last": torch.randn(n, c, h + 2, w + 2, generator=g).contiguous(
            memory_format=torch.channels_last
        )[:, :, 1:-1, 1:-1],
        "transposed": torch.randn(n, c, w, h, generator=g).mT,
        "permuted": hwnc.permute(2, 3, 0, 1),
        "flipped": torch.randn(n, c, h, w, generator=g).flip(1, 2, 3),
        "one-image-expanded": torch.randn(1, c, h, w, generator=g).expand(n, -1, -1, -1),
        "one-channel-expanded": torch.randn(n, 1, h, w, generator=g).expand(-1, c, -1, -1),
        "one-pixel-expanded": torch.randn(n, c, 1, 1, generator=g).expand(-1, -1, h, w),
        "real-part": complexes.real,
        "negative-view": complexes.conj().imag,
    }


@BOTH
@pytest.mark.parametrize("kind", strided_maps(CONV))
def test_any_strides_of_x(kind, case, isa):
    layer, x = make_conv(case), strided_maps(case)[kind]
    y = layer.conv(x)
    assert_product(y, *reference(layer, x), case.terms)
    assert torch.equal(y, layer.conv(x.clone(memory_format=torch.preserve_format)))


@BOTH
def test_other_operands_may_be_strided(case, isa):
    layer, x, residual = make_conv(case), maps(case), results(case)

    def stretch(t):
        return torch.stack([t, torch.full_like(t, 99)], dim=-1)[..., 0]

    names = ("values", "row_ptr", "col_idx", "row_perm", "col_perm", "bias")
    other = dataclasses.replace(layer, **{name: stretch(getattr(layer, name)) for name in names})
    assert not other.values.is_contiguous()
    want = layer.conv(x, residual=residual)
    assert torch.equal(other.conv(x, residual=stretch(residual)), want)
    other_format = residual.contiguous(memory_format=torch.channels_last)
    assert torch.equal(layer.conv(x, residual=other_format), want)


@BOTH
@pytest.mark.parametrize("name", FORMATS)
def test_operands_are_not_written(case, name, isa):
    layer = make_conv(case, padding=0.0)
    x = maps(case).contiguous(memory_format=FORMATS[name])
    residual = results(case).contiguous(memory_format=FORMATS[name])
    operands = (x, layer.values, *layer.index, layer.bias, residual)
    before = [t.clone() for t in operands]
    layer.conv(x, "gelu", residual)
    for now, then in zip(operands, before, strict=True):
        assert torch.equal(now, then)


@BOTH
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("residual", [False, True], ids=["", "residual"])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activation_after_product_bias_and_residual(activation, bias, residual, name, case, isa):
    case = dataclasses.replace(case, bias=bias, channels_last=name == "nhwc")
    layer, x, z, scale = prepared(case)
    more = results(case) if residual else None
    if more is not None:
        z, scale = z + more.double(), scale + more.double().abs()
    want = ACTIVATIONS[activation](z)
    # Each of these functions has slope below 1.13; its own error is a few units of the result.
    assert_product(layer.conv(x, activation, more), want, 1.2 * scale + 8 * want.abs(), case.terms)


def stored_only(layer: ConvLayer, x: torch.Tensor) -> torch.Tensor:
    """The convolution in float64, summed over stored entries and pixels inside the map only.

    One weight at a time, and nothing is ever multiplied by a zero that is not in the data.
    """
    c = layer.case
    y = torch.zeros(c.images, c.outputs, *c.out_size, dtype=torch.float64)
    if layer.bias is not None:
        y += layer.bias.double()[:, None, None]
    stored, place = layer.entries
    group_out, group_in = c.outputs // c.groups, c.inputs // c.groups

    def pairs(axis, k):  # (output, input) positions on one axis that meet at this tap
        n, m = c.size[axis], c.out_size[axis]
        found = []
        for o in range(m):
            for i in range(n):
                small, big = (i, o) if c.transposed else (o, i)
                if big == small * c.stride[axis] - c.padding[axis] + k * c.dilation[axis]:
                    found.append((o, i))
        return torch.tensor(found).reshape(-1, 2).T

    for b, i, o, row, col, ky, kx in zip(
        *(t.tolist() for t in stored), *(t.tolist() for t in place), strict=True
    ):
        (oy, iy), (ox, ix) = pairs(0, ky), pairs(1, kx)
        channel = row // group_out * group_in + col
        part = x[:, channel].double()[:, iy[:, None], ix]
        y[:, row, oy[:, None], ox] += layer.values[b, i, o].double() * part
    return y


NONFINITE = [
    ConvCase(4, 9, (5, 6), padding=(1, 1), groups=1, block=(4, 1), density=0.2),
    ConvCase(6, 6, (5, 6), (3, 2), (2, 1), groups=2, block=(2, 2), density=0.3),
    ConvCase(4, 9, (4, 5), (3, 3), (2, 2), (1, 1), block=(4, 1), density=0.2, transposed=True),
    ConvCase(4, 9, (4, 5), (2, 3), block=(5, 3), density=0.2, transposed=True),
]


@pytest.mark.parametrize("case", NONFINITE, ids=str)
@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
def test_nonfinite_x_reaches_the_outputs_that_store_it_and_no_other(case, name, value, isa):
    layer, x = make_conv(case), maps(case).contiguous(memory_format=FORMATS[name])
    x[0, 1, 2, 3] = value
    x[1, :2, -1, -1] = torch.tensor([torch.inf, -torch.inf])  # these may meet: NaN
    x[1, 3, 0, 0] = value  # next to the padding
    want, got = stored_only(layer, x), layer.conv(x)
    finite = want.isfinite()
    assert torch.equal(got.isnan(), want.isnan())
    assert torch.equal(got.double()[want.isinf()], want[want.isinf()])
    torch.testing.assert_close(got.double()[finite], want[finite], rtol=1e-4, atol=1e-4)
    assert finite.any()
    assert not finite.all()


@pytest.mark.parametrize("case", NONFINITE, ids=str)
@pytest.mark.parametrize("value", [torch.nan, torch.inf], ids=str)
def test_nonfinite_weight_bias_and_residual_stay_where_they_belong(case, value, isa):
    layer, x, residual = make_conv(case), maps(case).abs() + 1, results(case)
    stored, place = layer.entries
    row = int(place[0][0])
    layer.values[tuple(i[0] for i in stored)] = value
    other = (row + 1) % case.outputs
    layer.bias[other] = value
    third = (row + 2) % case.outputs
    residual[1, third, 1, 2] = value
    got = layer.conv(x, residual=residual)
    # A weight counts at each pixel whose window has it inside the map.
    assert (
        not got[:, row].isfinite()[(stored_only(layer, x)[:, row]).isfinite().logical_not()].any()
    )
    assert not got[:, row].isfinite().all()
    assert not got[:, other].isfinite().any()
    assert not got[1, third, 1, 2].isfinite()
    rest = torch.ones_like(got, dtype=torch.bool)
    rest[:, [row, other]] = False
    rest[1, third, 1, 2] = False
    assert got[rest].isfinite().all()


@BOTH
def test_identity_permutation_equals_none(case, isa):
    case = dataclasses.replace(case, perm="none")
    layer, x = make_conv(case), maps(case)
    other = dataclasses.replace(
        layer,
        row_perm=torch.arange(case.outputs, dtype=torch.int32),
        col_perm=torch.arange(case.inputs, dtype=torch.int32),
    )
    assert torch.equal(layer.conv(x), other.conv(x))


@BOTH
def test_an_image_does_not_depend_on_its_neighbours(case, isa):
    case = dataclasses.replace(case, images=5)
    layer, x = make_conv(case), maps(case)
    whole = layer.conv(x)
    for i in range(5):
        assert torch.equal(layer.conv(x[i : i + 1]), whole[i : i + 1])


@pytest.mark.parametrize("height", [1, 2, 4, 8, 16, 32])
@BOTH
def test_forced_isa_is_the_one_that_runs(case, height, isa):
    case = dataclasses.replace(case, block=(height, 1), groups=1, outputs=64, size=(20, 20))
    layer, x = make_conv(case), maps(case)
    y = layer.conv(x)
    kernel = tetris._C.last_kernel()
    assert kernel.startswith("bsconv_f32_")
    assert kernel.endswith(f"__{isa}")
    rows = int(kernel.removeprefix("bsconv_f32_").split("x")[0])
    assert height % rows == 0
    layer.grad_input(torch.ones_like(y))
    assert tetris._C.last_kernel().startswith("bsconv_f32_")
    assert tetris._C.last_kernel().endswith(f"__{isa}")
    layer.grad_values(x, torch.ones_like(y))
    assert tetris._C.last_kernel().startswith("sample_f32_")
    assert tetris._C.last_kernel().endswith(f"__{isa}")


@pytest.mark.parametrize("wrapper", [True, False])
@BOTH
def test_python_wrapper_is_the_op(case, wrapper):
    layer, x, residual = make_conv(case), maps(case), results(case)
    call = getattr(tetris.ops if wrapper else torch.ops.tetris, layer.op)
    args = (x, layer.values, *layer.index, layer.bias, case.outputs, *layer.settings)
    assert torch.equal(call(*args, "silu", residual), layer.conv(x, "silu", residual))
    assert torch.equal(call(*args), layer.conv(x))


def test_python_wrapper_has_the_defaults_of_torch():
    layer = make_conv(ConvCase(4, 6, (5, 5)))
    x = maps(layer.case)
    args = (x, layer.values, *layer.index, layer.bias, 6, (3, 3))
    assert torch.equal(tetris.ops.bsconv2d(*args), layer.conv(x))
    layer = make_conv(dataclasses.replace(layer.case, transposed=True))
    args = (x, layer.values, *layer.index, layer.bias, 6, (3, 3))
    assert torch.equal(tetris.ops.bsconv_transpose2d(*args), layer.conv(x))
