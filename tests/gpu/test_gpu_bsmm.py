"""tetris::bsmm and its gradients on CUDA: every type, every family of kernels, the CPU's cases."""

import dataclasses
import functools
import os

import pytest
import torch

import tetris
from cases import ACTIVATIONS, Case, grid, make_layer, reference, tokens
from support import (
    DEVICE,
    DTYPES,
    EMULATED,
    assert_near,
    assert_ran,
    on_device,
    refusals_skip,
    refused,
)

pytestmark = pytest.mark.usefixtures("poison")

# Beyond the CPU's: blocks that tensor cores take, whole and ragged, few and many tokens.
TILES = [
    Case(m, n, k, bo, bi, density, perm)
    for bo, bi in [(16, 16), (32, 32), (64, 16), (64, 64), (128, 16), (128, 128), (24, 8), (48, 40)]
    for m, n, k, density, perm in [
        (70, 256, 256, 0.4, "none"),
        (130, 200, 264, 0.5, "both"),
        (5, 384, 128, 1.0, "rows"),
    ]
]
CASES = grid()[:: 1 if torch.cuda.is_available() else 9] + TILES


def prepared(case, dtype, **more):
    return make_layer(case, dtype, **more), tokens(case, dtype)


@functools.lru_cache(maxsize=64)  # the same for each family
def wanted(case, dtype):
    return reference(*prepared(case, dtype))


def rows_of(layer, x, dy):
    """dx and dvalues in float64, each with its sum of absolute values."""
    w, mask = layer.dense(layer.values.nan_to_num(0)).double(), layer.mask()
    x, dy = x.double(), dy.double()
    stored, place = layer.entries
    dw, dw_scale = dy.t() @ x, dy.abs().t() @ x.abs()
    zeros = torch.zeros(layer.values.shape, dtype=torch.float64)
    w = torch.where(mask, w, 0.0)
    return (
        (dy @ w, dy.abs() @ w.abs()),
        (zeros.index_put(stored, dw[place]), zeros.index_put(stored, dw_scale[place])),
    )


# Families vary fastest, so that they share the reference.
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, family):
    layer, x = prepared(case, DTYPES[dtype])
    moved = on_device(layer)
    with refusals_skip():
        y = moved.bsmm(x.to(DEVICE))
    assert_ran(family, y)
    assert_near(y, *wanted(case, DTYPES[dtype]), terms=case.k)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES[::2], ids=str)
def test_gradients(case, dtype, family):
    layer, x = prepared(case, DTYPES[dtype])
    dy, moved = tokens(case, DTYPES[dtype], seed=2, features=case.n), on_device(layer)
    (dx, dx_scale), (dv, dv_scale) = rows_of(layer, x, dy)
    ops, ran = torch.ops.tetris, 0
    for call, want, scale, terms in (
        (
            lambda: ops.bsmm_grad_input(dy.to(DEVICE), moved.values, *moved.index, case.k),
            dx,
            dx_scale,
            case.n,
        ),
        (
            lambda: ops.bsmm_grad_values(
                x.to(DEVICE), dy.to(DEVICE), *moved.index, case.bo, case.bi
            ),
            dv,
            dv_scale,
            case.m,
        ),
    ):
        got = refused(call)
        if got is None:
            continue
        assert_ran(family, got, dy)
        assert_near(got, want, scale, terms=terms)
        ran += 1
    if not ran:
        pytest.skip(f"{family} takes neither")


@pytest.mark.parametrize(
    ("family", "dtype", "block", "tokens_"),
    [
        ("simt", "f64", (1, 1), 40),
        ("simt", "f32", (128, 128), 40),
        ("skinny", "bf16", (4, 1), 1),
        ("skinny", "f16", (64, 16), 16),
        ("mma", "f16", (16, 16), 40),
        ("mma", "bf16", (128, 16), 300),
        ("hopper", "bf16", (128, 16), 300),
        ("hopper", "f16", (64, 64), 300),
    ],
)
def test_families_run_where_they_must(family, dtype, block, tokens_):
    """A family that refused everything would pass the tests above."""
    if family == "hopper" and not hopper_here():
        pytest.skip("compute capability 9.0 only")
    case = Case(tokens_, 256, 256, *block, perm="both")
    layer, x = prepared(case, DTYPES[dtype])
    moved = on_device(layer)
    tetris._C.cuda_force_kernel(family)
    try:
        y = moved.bsmm(x.to(DEVICE))
    finally:
        tetris._C.cuda_force_kernel("")
    assert_ran(family)
    assert_near(y, *reference(layer, x), terms=case.k)


def hopper_here():
    if EMULATED:
        return os.environ.get("TETRIS_EMULATED_GPU", "9.0") == "9.0"
    return torch.cuda.get_device_capability()[0] == 9


@pytest.mark.parametrize("block", [(16, 8), (64, 16), (128, 128)], ids=str)
def test_tf32_where_torch_allows_it(block):
    torch.backends.cuda.matmul.allow_tf32 = True
    case = Case(100, 256, 264, *block)
    layer, x = prepared(case, torch.float32)
    moved = on_device(layer)
    tetris._C.cuda_force_kernel("mma")
    try:
        y = moved.bsmm(x.to(DEVICE))
    finally:
        tetris._C.cuda_force_kernel("")
    assert "tf32" in tetris._C.last_kernel()
    assert_near(y, *reference(layer, x), terms=case.k, operand=torch.float32)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_are_fused(activation, dtype, family):
    case = Case(33, 128, 96, 64, 16, 0.4)
    layer, x = prepared(case, DTYPES[dtype])
    moved = on_device(layer)
    with refusals_skip():
        y = moved.bsmm(x.to(DEVICE), activation)
    z, scale = reference(layer, x)
    want = ACTIVATIONS[activation](z)
    assert_near(y, want, 1.2 * scale + 64 * want.abs() + 1e-3, terms=case.k)


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf], ids=str)
@pytest.mark.parametrize("block", [(1, 1), (5, 3), (16, 16), (64, 16)], ids=str)
def test_nonfinite_x_reaches_the_outputs_that_store_it_and_no_other(block, value, dtype, family):
    case = Case(40, 150, 170, *block, 0.3)
    layer, x = prepared(case, DTYPES[dtype], padding=0.0)
    # Whole blocks: an entry that is stored as zero would be NaN in dense torch, too.
    stored = torch.where(layer.mask()[int(layer.mask().sum(1).argmax())])[0]
    x[20, stored[0]] = value
    moved = on_device(layer)
    with refusals_skip():
        y = moved.bsmm(x.to(DEVICE)).cpu()
    want, scale = reference(layer, x)
    finite = want.isfinite()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.double()[want.isinf()], want[want.isinf()])
    assert_near(y[finite], want[finite], scale[finite], terms=case.k)


@pytest.mark.parametrize("lead", [(), (1,), (0,), (5,), (2, 3), (2, 0, 3)], ids=str)
def test_any_leading_shape(lead, chosen):
    layer = make_layer(Case(1, 64, 80, 16, 16))
    x = torch.randn(*lead, 80, generator=torch.Generator().manual_seed(3))
    y = on_device(layer).bsmm(x.to(DEVICE))
    assert y.shape == (*lead, 64)
    assert_near(y, *reference(layer, x), terms=80)


# Made on the device: moving a tensor there makes it dense.
STRIDED = {
    "transposed": lambda big: big[:24, :32].t().contiguous().t(),
    "rows-strided": lambda big: big[::3, :32],
    "columns-strided": lambda big: big[:14, ::2][:, :32],
    "offset": lambda big: big[5:19, 7:39],
    "expanded": lambda big: big[:1, :32].expand(14, 32),
}


@pytest.mark.parametrize("kind", STRIDED)
def test_any_strides(kind, family):
    big = torch.randn(40, 70, generator=torch.Generator().manual_seed(4)).half().to(DEVICE)
    x = STRIDED[kind](big)
    assert not x.is_contiguous()
    layer = make_layer(Case(1, 48, 32, 16, 8), torch.float16)
    moved = on_device(layer)
    with refusals_skip():
        y = moved.bsmm(x)
    assert_near(y, *reference(layer, x.cpu()), terms=32)


def test_same_bits_every_time(family):
    case = Case(200, 256, 512, 64, 16, 0.3)
    layer, x = prepared(case, torch.bfloat16, padding=0.0)
    moved, x = on_device(layer), x.to(DEVICE)
    with refusals_skip():
        first = moved.bsmm(x)
    for _ in range(3):
        assert torch.equal(moved.bsmm(x), first)


def test_same_bits_every_time_for_values_gradient_when_asked(chosen):
    """The poison fixture asks for deterministic algorithms."""
    case = Case(3000 if DEVICE == "cuda" else 100, 64, 64, 16, 16, 0.5)
    layer, x = prepared(case, torch.bfloat16)
    moved, dy = on_device(layer), tokens(case, torch.bfloat16, 2, 64).to(DEVICE)

    def gradient():
        return torch.ops.tetris.bsmm_grad_values(x.to(DEVICE), dy, *moved.index, 16, 16)

    first = gradient()
    assert "split" not in tetris._C.last_kernel()
    for _ in range(3):
        assert torch.equal(gradient(), first)


def test_values_gradient_split_over_tokens(family):
    torch.use_deterministic_algorithms(False)
    case = Case(20000 if DEVICE == "cuda" else 600, 32, 32, 16, 16, 1.0)
    for dtype in (torch.bfloat16, torch.float32, torch.float64):  # float64 is not split
        layer, x = prepared(case, dtype)
        dy, moved = tokens(case, dtype, 2, 32), on_device(layer)
        with refusals_skip():
            got = torch.ops.tetris.bsmm_grad_values(
                x.to(DEVICE), dy.to(DEVICE), *moved.index, 16, 16
            )
        _, (want, scale) = rows_of(layer, x, dy)
        assert_near(got, want, scale, terms=case.m)


def test_operands_are_not_written(family):
    case = Case(40, 128, 96, 64, 16, 0.4)
    layer, x = prepared(case, torch.float16, padding=0.0)
    moved, x = on_device(layer), x.to(DEVICE)
    before = [t.clone() for t in (x, moved.values, *moved.index, moved.bias)]
    with refusals_skip():
        moved.bsmm(x, "gelu")
    for now, then in zip((x, moved.values, *moved.index, moved.bias), before, strict=True):
        assert torch.equal(now, then)


def test_strided_other_operands(chosen):
    case = Case(9, 64, 48, 16, 8)
    layer, x = prepared(case, torch.float16, padding=0.0)
    moved, x = on_device(layer), x.to(DEVICE)
    want = moved.bsmm(x)
    names = ("values", "row_ptr", "col_idx", "row_perm", "col_perm", "bias")
    other = dataclasses.replace(
        moved,
        **{n: torch.stack([t := getattr(moved, n), torch.full_like(t, 9)], -1)[..., 0]
           for n in names},
    )  # fmt: skip
    assert torch.equal(other.bsmm(x), want)
