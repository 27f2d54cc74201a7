"""The convolutions and their gradients on CUDA: every type and family, the CPU's cases."""

import functools

import pytest
import torch

import tetris
from cases import ACTIVATIONS
from conv_cases import (
    ConvCase,
    grid,
    make_conv,
    maps,
    random_case,
    reference,
    reference_grads,
    results,
)
from support import (
    DEVICE,
    DTYPES,
    assert_near,
    assert_ran,
    on_device,
    refusals_skip,
    refused,
)

pytestmark = pytest.mark.usefixtures("poison")

KINDS = [("none", True, False), ("both", False, False), ("rows", True, True)]
# Channels and blocks that tensor cores take.
TILES = [
    ConvCase(
        64, 128, (9, 10), (3, 3), stride, (1, 1), block=block, perm=perm, channels_last=last,
        transposed=transposed, images=2, density=0.4,
    )
    for block in [(16, 8), (32, 16), (64, 16), (128, 64)]
    for stride in [(1, 1), (2, 1)]
    for perm, last, transposed in KINDS
]  # fmt: skip
# One kernel position, and maps of two sizes.
OUTPUT_PADDED = [
    ConvCase(
        64, 64, (6, 5), (1, 1), dilation=(2, 2), output_padding=padding, block=(64, 16), perm=perm,
        channels_last=True, transposed=True,
    )
    for padding, perm in [((1, 1), "none"), ((0, 1), "both")]
]  # fmt: skip
TILES += [
    ConvCase(64, 128, (8, 8), (1, 1), block=(64, 16), perm="none", channels_last=True),
    ConvCase(64, 64, (7, 6), (3, 3), (1, 1), (1, 1), groups=4, block=(16, 16), channels_last=True),
    *OUTPUT_PADDED,
]
STEP = 1 if torch.cuda.is_available() else 40
CASES = grid()[::STEP] + [random_case(s) for s in range(0, 60, STEP)]
CASES += dict.fromkeys([*TILES[:: 1 + STEP // 20], *OUTPUT_PADDED])


def prepared(case, dtype):
    return make_conv(case, dtype), maps(case, dtype), results(case, dtype)


@functools.lru_cache(maxsize=64)
def wanted(case, dtype):
    layer, x, _ = prepared(case, dtype)
    return reference(layer, x)


def to_device(x):
    return x.to(DEVICE)  # keeps the memory format


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_values(case, dtype, family):
    layer, x, _ = prepared(case, DTYPES[dtype])
    moved = on_device(layer)
    with refusals_skip():
        y = moved.conv(to_device(x))
    assert_ran(family, y)
    # Of one channel or one pixel x is in both formats.
    assert y.is_contiguous(memory_format=torch._prims_common.suggest_memory_format(x))
    assert_near(y, *wanted(case, DTYPES[dtype]), terms=case.terms)


@pytest.mark.parametrize("dtype", ["f32", "bf16", "f64"])
@pytest.mark.parametrize("case", [*CASES[::3], *TILES], ids=str)
def test_gradients(case, dtype, family):
    layer, x, dy = prepared(case, DTYPES[dtype])
    moved, ran = on_device(layer), 0
    (dx, dx_scale), (dv, dv_scale) = reference_grads(layer, x, dy)
    calls = (
        (lambda: moved.grad_input(to_device(dy)), dx, dx_scale, case.outputs),
        (lambda: moved.grad_values(to_device(x), to_device(dy)), dv, dv_scale, 1),
    )
    for call, want, scale, channels in calls:
        got = refused(call)
        if got is None:
            continue
        assert_ran(family, got, dy)
        pixels = case.images * case.out_size[0] * case.out_size[1]
        terms = max(pixels, channels * case.kernel[0] * case.kernel[1])
        assert_near(got, want, scale, terms=terms)
        ran += 1
    if not ran:
        pytest.skip(f"{family} takes neither")


@pytest.mark.parametrize("dtype", ["f32", "bf16"])
@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("case", TILES[2:5], ids=str)
def test_residual_and_activation_are_fused(case, activation, dtype, family):
    layer, x, residual = prepared(case, DTYPES[dtype])
    moved = on_device(layer)
    with refusals_skip():
        y = moved.conv(to_device(x), activation, to_device(residual))
    z, scale = reference(layer, x)
    z, scale = z + residual.double(), scale + residual.double().abs()
    want = ACTIVATIONS[activation](z)
    assert_near(y, want, 1.2 * scale + 64 * want.abs() + 1e-3, terms=case.terms + 1)


def test_padding_times_an_infinite_weight_is_nan(family):
    """As where a dense convolution pads with zeros; pixels that see no padding are infinite."""
    case = ConvCase(
        64, 64, (6, 7), padding=(1, 1), block=(64, 16), perm="none", bias=False, density=1.0,
        channels_last=True,
    )  # fmt: skip
    layer, x = make_conv(case, torch.bfloat16, padding=0.0), maps(case, torch.bfloat16)
    layer.values[0, 0, 0] = torch.inf  # of the first output, at the first position of the kernel
    moved = on_device(layer)
    with refusals_skip():
        y = moved.conv(to_device(x)).cpu()
    padded = torch.nn.functional.pad(x.double(), (1, 1, 1, 1))
    want = torch.nn.functional.conv2d(padded, layer.dense(layer.values).double())
    assert want[:, 0].isnan().any()
    assert want[:, 0].isinf().any()
    assert torch.equal(y.isnan(), want.isnan())
    assert torch.equal(y.isinf(), want.isinf())


@pytest.mark.parametrize("case", TILES[::5], ids=str)
def test_tf32_where_torch_allows_it(case):
    torch.backends.cudnn.allow_tf32 = True
    layer, x, _ = prepared(case, torch.float32)
    moved = on_device(layer)
    tetris._C.cuda_force_kernel("mma")
    try:
        y = moved.conv(to_device(x))
    finally:
        tetris._C.cuda_force_kernel("")
    assert "tf32" in tetris._C.last_kernel()
    assert_near(y, *reference(layer, x), terms=case.terms, operand=torch.float32)


def test_tensor_cores_run_where_they_must():
    case = TILES[0]
    layer, x, dy = prepared(case, torch.bfloat16)
    moved = on_device(layer)
    tetris._C.cuda_force_kernel("mma")
    try:
        for call in (
            lambda: moved.conv(to_device(x)),
            lambda: moved.grad_input(to_device(dy)),
            lambda: moved.grad_values(to_device(x), to_device(dy)),
        ):
            call()
            assert_ran("mma")
    finally:
        tetris._C.cuda_force_kernel("")
