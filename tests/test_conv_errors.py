"""Bad calls of the convolution ops raise, name the op and the rule, and leave the process alive."""

import os
import subprocess
import sys

import pytest
import torch

WARNINGS = ["ignore:Sparse CSR tensor support"]
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

# Two groups: 3 block rows each, and at each of 6 taps 2 column groups, the second ragged.
IN, OUT, GROUPS, BO, BI = 10, 24, 2, 4, 3
H, W, KERNEL, STRIDE, PADDING, DILATION = 6, 7, (3, 2), (2, 1), (1, 2), (2, 3)
BIG = 2**31 - 1
OPS = ("bsconv2d", "bsconv_transpose2d")


def i32(*v):
    return torch.tensor(v, dtype=torch.int32)


def out_size(op):
    return (2, 8) if op == "bsconv2d" else (14, 7)


def good(op: str, images: int = 2) -> dict:
    """Operands of a valid call, by name and in order; output_padding is there for both."""
    order = torch.arange(11, -1, -1, dtype=torch.int32)
    inner = torch.arange(4, -1, -1, dtype=torch.int32)
    return {
        "x": torch.ones(images, IN, H, W),
        "values": torch.ones(7, BI, BO),
        "row_ptr": i32(0, 2, 2, 5, 5, 6, 7),
        "col_idx": i32(1, 11, 0, 2, 3, 10, 0),
        "row_perm": torch.cat([order, order + 12]),
        "col_perm": torch.cat([inner, inner + 5]),
        "bias": torch.zeros(OUT),
        "out_channels": OUT,
        "kernel_size": KERNEL,
        "stride": STRIDE,
        "padding": PADDING,
        "output_padding": (1, 1),
        "dilation": DILATION,
        "groups": GROUPS,
        "activation": "relu",
        "residual": torch.zeros(images, OUT, *out_size(op)),
    }


def call(op: str, a: dict):
    a = dict(a)
    if op == "bsconv2d":
        del a["output_padding"]
    return getattr(torch.ops.tetris, op)(*a.values())


def window(a):
    return [a[n] for n in ("kernel_size", "stride", "padding", "dilation", "groups")]


def grad_input(op, a):
    return getattr(torch.ops.tetris, f"{op}_grad_input")(
        torch.ones(a["x"].shape[0], OUT, *out_size(op)),
        *(a[n] for n in ("values", "row_ptr", "col_idx", "row_perm", "col_perm")),
        IN,
        (H, W),
        *window(a),
    )


def grad_values(op, a):
    return getattr(torch.ops.tetris, f"{op}_grad_values")(
        a["x"],
        torch.ones(a["x"].shape[0], OUT, *out_size(op)),
        *(a[n] for n in ("row_ptr", "col_idx", "row_perm", "col_perm")),
        (BO, BI),
        *window(a),
    )


def set_at(name, position, value):
    def change(a):
        a[name] = a[name].clone()
        a[name][position] = value

    return change


def put(**new):
    return lambda a: a.update(new)


def apply(name, f):
    return lambda a: a.update({name: f(a[name])})


def swap(name, i, j):
    def change(a):
        a[name] = a[name].clone()
        a[name][[i, j]] = a[name][[j, i]]

    return change


# What is wrong -> (how, exception, what the message must say). Contents of index tensors:
CONTENTS = {
    "col_idx-too-large": (
        set_at("col_idx", 1, 12),
        ValueError,
        r"col_idx\[1\] \(block row 0\) must be in \[0, 12\), the column groups \(got 12\)",
    ),
    "col_idx-huge": (set_at("col_idx", 5, BIG), ValueError, r"col_idx\[5\].*\(got 2147483647\)"),
    "col_idx-negative": (set_at("col_idx", 2, -1), ValueError, r"col_idx\[2\].*\(got -1\)"),
    "col_idx-most-negative": (
        set_at("col_idx", 0, -(2**31)),
        ValueError,
        r"col_idx\[0\].*\(got -2147483648\)",
    ),
    "col_idx-of-the-last-row": (set_at("col_idx", 6, 12), ValueError, r"col_idx\[6\].*got 12"),
    "col_idx-equal": (
        set_at("col_idx", 3, 0),
        ValueError,
        r"must ascend strictly within a block row: col_idx\[3\] \(block row 2\) is 0 after 0",
    ),
    "col_idx-descending": (
        put(col_idx=i32(11, 1, 0, 2, 3, 10, 0)),
        ValueError,
        r"must ascend strictly.*col_idx\[1\] \(block row 0\) is 1 after 11",
    ),
    "row_ptr-does-not-start-at-0": (
        set_at("row_ptr", 0, 1),
        ValueError,
        r"row_ptr\[0\] must be 0 \(got 1\)",
    ),
    "row_ptr-decreases": (
        set_at("row_ptr", 1, 3),
        ValueError,
        r"row_ptr must not decrease \(got row_ptr\[1\] = 3 and row_ptr\[2\] = 2\)",
    ),
    "row_ptr-negative": (set_at("row_ptr", 1, -5), ValueError, r"row_ptr must not decrease"),
    "row_ptr-jumps-out-and-back": (set_at("row_ptr", 4, BIG), ValueError, "must not decrease"),
    "row_ptr-ends-early": (
        set_at("row_ptr", 6, 6),
        ValueError,
        r"row_ptr must end at the number of stored blocks \(got row_ptr\[6\] = 6 and .* = 7\)",
    ),
    "row_ptr-ends-late": (set_at("row_ptr", 6, BIG), ValueError, "row_ptr must end at"),
    "row_perm-too-large": (
        set_at("row_perm", 2, OUT),
        ValueError,
        r"row_perm\[2\] must be in \[0, 24\) \(got 24\)",
    ),
    "row_perm-negative": (set_at("row_perm", 0, -1), ValueError, r"row_perm\[0\].*\(got -1\)"),
    "row_perm-repeated": (
        set_at("row_perm", 5, 11),
        ValueError,
        r"row_perm must hold each index once \(got 11 at positions 0 and 5\)",
    ),
    "row_perm-crosses-groups": (
        swap("row_perm", 3, 20),
        ValueError,
        r"row_perm must keep each channel in its group of 12 \(got channel 8 at position 20\)",
    ),
    "col_perm-too-large": (
        set_at("col_perm", 9, IN),
        ValueError,
        r"col_perm\[9\] must be in \[0, 10\) \(got 10\)",
    ),
    "col_perm-huge": (set_at("col_perm", 1, BIG), ValueError, r"col_perm\[1\] must be in"),
    "col_perm-repeated": (
        put(col_perm=torch.zeros(IN, dtype=torch.int32)),
        ValueError,
        r"col_perm must hold each index once \(got 0 at positions 0 and 1\)",
    ),
    "col_perm-crosses-groups": (
        swap("col_perm", 0, 9),
        ValueError,
        r"col_perm must keep each channel in its group of 5 \(got channel 4 at position 9\)",
    ),
}
# The window; these arguments all ops share:
WINDOW = {
    "kernel_size-0": (
        put(kernel_size=(3, 0)),
        ValueError,
        r"kernel_size must be two numbers of at least 1 \(got \[3, 0\]\)",
    ),
    "kernel_size-negative": (put(kernel_size=(-3, 2)), ValueError, r"kernel_size.*\[-3, 2\]"),
    "kernel_size-three": (put(kernel_size=(3, 2, 1)), ValueError, "kernel_size must be two"),
    "kernel_size-none": (put(kernel_size=()), ValueError, "kernel_size must be two numbers"),
    "kernel_size-2^24": (
        put(kernel_size=(3, 2**24)),
        ValueError,
        r"kernel_size must be less than 2\^24 \(got \[3, 16777216\]\)",
    ),
    "stride-0": (put(stride=(0, 1)), ValueError, r"stride must be two .* 1 \(got \[0, 1\]\)"),
    "stride-negative": (put(stride=(1, -1)), ValueError, r"stride must be two numbers"),
    "stride-one": (put(stride=(2,)), ValueError, r"stride must be two numbers.*\(got \[2\]\)"),
    "stride-2^24": (put(stride=(2**24, 1)), ValueError, r"stride must be less than 2\^24"),
    "stride-2^63": (put(stride=(2**63 - 1, 1)), ValueError, r"stride must be less than 2\^24"),
    "padding-negative": (
        put(padding=(1, -1)),
        ValueError,
        r"padding must be two numbers of at least 0 \(got \[1, -1\]\)",
    ),
    "padding-three": (put(padding=(1, 1, 1)), ValueError, "padding must be two numbers"),
    "padding-2^24": (put(padding=(2**24, 0)), ValueError, r"padding must be less than 2\^24"),
    "padding-2^62": (put(padding=(0, 2**62)), ValueError, r"padding must be less than 2\^24"),
    "dilation-0": (put(dilation=(2, 0)), ValueError, r"dilation must be two numbers of at least 1"),
    "dilation-three": (put(dilation=(1, 1, 1)), ValueError, "dilation must be two numbers"),
    "dilation-2^24": (put(dilation=(1, 2**24)), ValueError, r"dilation must be less than 2\^24"),
    "groups-0": (put(groups=0), ValueError, r"groups must be at least 1 \(got 0\)"),
    "groups-negative": (put(groups=-2), ValueError, r"groups must be at least 1 \(got -2\)"),
    "groups-do-not-divide-inputs": (
        put(groups=3),
        ValueError,
        r"groups must divide the channels \(got 10 to 24 channels and groups 3\)",
    ),
    "groups-do-not-divide-outputs": (put(groups=5), ValueError, "groups must divide the channels"),
    "groups-huge": (put(groups=2**62), ValueError, "groups must divide the channels"),
    "groups-too-few-for-the-index": (
        put(groups=1, row_perm=None, col_perm=None, col_idx=i32(1, 11, 0, 2, 3, 10, 30)),
        (ValueError, RuntimeError),
        r"col_idx\[6\] .* must be in \[0, 24\)",
    ),
    "row_ptr-short": (
        apply("row_ptr", lambda t: t[:4]),
        RuntimeError,
        r"row_ptr must have .* elements \(got 4 and 7\)",
    ),
    "row_ptr-2d": (apply("row_ptr", lambda t: t[None]), RuntimeError, "must be one-dimensional"),
    "row_ptr-int64": (
        apply("row_ptr", lambda t: t.long()),
        TypeError,
        r"row_ptr must be int32 \(got Long\)",
    ),
    "col_idx-int64": (apply("col_idx", lambda t: t.long()), TypeError, "col_idx must be int32"),
    "row_perm-short": (
        apply("row_perm", lambda t: t[:12]),
        RuntimeError,
        r"row_perm must have .* elements \(got 12 and 24\)",
    ),
    "col_perm-of-one-group": (
        apply("col_perm", lambda t: t[:5]),
        RuntimeError,
        r"col_perm must have .* elements \(got 5 and 10\)",
    ),
    "col_perm-uint8": (apply("col_perm", lambda t: t.byte()), TypeError, "col_perm must be int32"),
}
# Maps, values and what is added:
OPERANDS = {
    "x-3d": (
        apply("x", lambda t: t[:, :, 0]),
        ValueError,
        r"x must be \[N, C, H, W\] \(got shape \[2, 10, 7\]\)",
    ),
    "x-5d": (apply("x", lambda t: t[None]), ValueError, r"x must be \[N, C, H, W\]"),
    "x-scalar": (put(x=torch.tensor(1.0)), ValueError, r"x must be \[N, C, H, W\]"),
    "x-no-channels": (
        put(x=torch.ones(2, 0, H, W), col_perm=None),
        ValueError,
        r"x must have channels and pixels \(got shape \[2, 0, 6, 7\]\)",
    ),
    "x-no-rows": (put(x=torch.ones(2, IN, 0, W)), ValueError, "x must have channels and pixels"),
    "x-other-channels": (
        put(x=torch.ones(2, 12, H, W)),
        RuntimeError,
        r"col_perm must have .* elements \(got 10 and 12\)",
    ),
    "x-odd-channels": (put(x=torch.ones(2, 11, H, W)), ValueError, "groups must divide"),
    "x-bfloat16": (
        apply("x", lambda t: t.bfloat16()),
        TypeError,
        r"x must be float32 or float64 \(got BFloat16\)",
    ),
    "x-int": (apply("x", lambda t: t.int()), TypeError, r"x must be float32 .* \(got Int\)"),
    "x-complex": (apply("x", lambda t: t.cfloat()), TypeError, r"\(got ComplexFloat\)"),
    "x-double": (
        apply("x", lambda t: t.double()),
        TypeError,
        r"values and x must have one type \(got Float and Double\)",
    ),
    "x-sparse": (apply("x", lambda t: t.to_sparse()), (RuntimeError, NotImplementedError), "conv"),
    "x-mkldnn": (apply("x", lambda t: t.to_mkldnn()), (RuntimeError, NotImplementedError), "conv"),
    "values-2d": (
        apply("values", lambda t: t[0]),
        RuntimeError,
        r"values must be \[nnzb, block width, block height\] \(got shape \[3, 4\]\)",
    ),
    "values-too-few": (
        apply("values", lambda t: t[:6]),
        RuntimeError,
        r"must both be nnzb, the stored blocks \(got 6 and 7\)",
    ),
    "values-129-high": (put(values=torch.ones(7, BI, 129)), RuntimeError, r"\[1, 128\].*129x3"),
    "values-0-wide": (put(values=torch.ones(7, 0, BO)), RuntimeError, r"\[1, 128\].*4x0"),
    "values-half": (apply("values", lambda t: t.half()), TypeError, "must have one type"),
    "values-sparse": (
        apply("values", lambda t: t.to_sparse()),
        (RuntimeError, NotImplementedError),
        "conv",
    ),
    "bias-short": (apply("bias", lambda t: t[:12]), RuntimeError, r"bias must be \[out_"),
    "bias-2d": (apply("bias", lambda t: t[None]), RuntimeError, r"bias must be \[out_"),
    "bias-double": (
        apply("bias", lambda t: t.double()),
        TypeError,
        r"bias and x must have one type \(got Double and Float\)",
    ),
    "residual-other-size": (
        apply("residual", lambda t: t[..., 1:]),
        ValueError,
        r"residual must be shaped like the result \(got \[2, 24, ",
    ),
    "residual-broadcasts": (
        apply("residual", lambda t: t[:, :, :1, :1]),
        ValueError,
        r"residual must be shaped like the result \(got \[2, 24, 1, 1\]",
    ),
    "residual-3d": (
        apply("residual", lambda t: t[:, 0]),
        ValueError,
        "residual must be shaped like",
    ),
    "residual-double": (
        apply("residual", lambda t: t.double()),
        TypeError,
        r"residual and x must have one type \(got Double and Float\)",
    ),
    "residual-int": (
        apply("residual", lambda t: t.int()),
        TypeError,
        r"residual and x must have one type \(got Int and Float\)",
    ),
    "residual-sparse": (
        apply("residual", lambda t: t.to_sparse()),
        (RuntimeError, NotImplementedError),
        "conv",
    ),
    "out_channels-0": (put(out_channels=0, bias=None), ValueError, "groups must divide"),
    "out_channels-negative": (put(out_channels=-24, bias=None), ValueError, "groups must divide"),
    "out_channels-2^40": (
        put(out_channels=2**40, bias=None),
        RuntimeError,
        r"out_features must be in \[1, 2\^31\) \(got 1099511627776\)",
    ),
    "out_channels-other": (
        put(out_channels=32, bias=None, row_perm=None),
        RuntimeError,
        r"row_ptr must have .* elements \(got 7 and 9\)",
    ),
    "activation-unknown": (
        put(activation="tanh"),
        ValueError,
        r"activation must be none, relu, gelu, gelu_tanh or silu \(got 'tanh'\)",
    ),
    "activation-case": (put(activation="ReLU"), ValueError, r"\(got 'ReLU'\)"),
}
BAD = {**CONTENTS, **WINDOW, **OPERANDS}

# What only one of the two can get wrong: (how, exception, message).
ONLY_CONV = {
    "kernel-larger-than-the-map": (
        put(padding=(0, 0), dilation=(3, 3)),
        ValueError,
        r"the map with its padding must be at least as large as the kernel's reach, .* "
        r"\(got 6x7, padding \[0, 0\], kernel_size \[3, 2\] and dilation \[3, 3\]\)",
    ),
    "kernel-largest": (put(kernel_size=(1, 2**24 - 1)), ValueError, "the map with its padding"),
    "dilation-largest": (put(dilation=(2**24 - 1, 1)), ValueError, "the map with its padding"),
}
ONLY_TRANSPOSE = {
    "output_padding-as-large-as-stride-and-dilation": (
        put(output_padding=(2, 0)),
        ValueError,
        r"output_padding must be less than stride or dilation \(got \[2, 0\], stride \[2, 1\] and "
        r"dilation \[2, 3\]\)",
    ),
    "output_padding-negative": (put(output_padding=(-1, 0)), ValueError, "output_padding must be"),
    "output_padding-three": (put(output_padding=(0, 0, 0)), ValueError, "output_padding must be"),
    "output_padding-2^24": (put(output_padding=(2**24, 0)), ValueError, "output_padding must be"),
    "padding-leaves-nothing": (
        put(padding=(8, 2)),
        ValueError,
        r"the output must have pixels \(got a size of 0 from 6x7, padding \[8, 2\]\)",
    ),
    "padding-largest": (put(padding=(2**24 - 1, 0)), ValueError, "the output must have pixels"),
}
CASES = [(op, name) for op in OPS for name in BAD]
CASES += [("bsconv2d", n) for n in ONLY_CONV] + [("bsconv_transpose2d", n) for n in ONLY_TRANSPOSE]


def rule_of(name):
    return {**BAD, **ONLY_CONV, **ONLY_TRANSPOSE}[name]


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("images", [0, 1, 20])
def test_the_good_calls_are_good(op, images):
    a = good(op, images)
    assert call(op, a).shape == (images, OUT, *out_size(op))
    assert grad_input(op, a).shape == a["x"].shape
    assert grad_values(op, a).shape == a["values"].shape


@pytest.mark.parametrize(("op", "name"), CASES)
def test_bad_call(op, name):
    change, error, message = rule_of(name)
    a = good(op)
    change(a)
    with pytest.raises(error, match=message) as info:
        call(op, a)
    assert op in str(info.value)


@pytest.mark.parametrize(("op", "name"), CASES)
def test_bad_call_that_wants_gradients(op, name):
    change, error, message = rule_of(name)
    a = good(op)
    a["values"].requires_grad_()
    change(a)
    with pytest.raises(error, match=message) as info:
        call(op, a)
    assert op in str(info.value)


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", CONTENTS)
def test_bad_index_contents_with_many_threads(name, op, isa, threads):
    """No thread has begun, and the caller gets one error."""
    threads(4)
    change, error, message = CONTENTS[name]
    a = good(op, 20)
    change(a)
    with pytest.raises(error, match=message):
        call(op, a)


@pytest.mark.parametrize("gradient", [grad_input, grad_values])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", {**CONTENTS, **WINDOW})
def test_bad_call_of_the_gradient_ops(name, op, gradient):
    change, error, message = rule_of(name)
    a = good(op)
    change(a)
    # With another window the sizes of the two maps may not fit together any more either.
    with pytest.raises(error, match=message) as info:
        gradient(op, a)
    assert f"tetris::{op}_{gradient.__name__}" in str(info.value)


def maps_of(op):
    return torch.ones(2, IN, H, W), torch.ones(2, OUT, *out_size(op))


def call_grad_input(op, **new):
    a = good(op) | {"grad": maps_of(op)[1], "in_channels": IN, "input_size": (H, W)} | new
    names = ("grad", "values", "row_ptr", "col_idx", "row_perm", "col_perm")
    return getattr(torch.ops.tetris, f"{op}_grad_input")(
        *(a[n] for n in (*names, "in_channels", "input_size")), *window(a)
    )


def call_grad_values(op, **new):
    a = good(op) | {"grad": maps_of(op)[1], "block": (BO, BI)} | new
    names = ("x", "grad", "row_ptr", "col_idx", "row_perm", "col_perm", "block")
    return getattr(torch.ops.tetris, f"{op}_grad_values")(*(a[n] for n in names), *window(a))


GRADIENT_CALLS = {
    "grad-3d": (call_grad_input, {"grad": torch.ones(24, 2, 8)}, ValueError, "grad must be .N, C"),
    "grad-scalar": (call_grad_values, {"grad": torch.tensor(1.0)}, ValueError, "grad must be .N"),
    "x-scalar": (call_grad_values, {"x": torch.tensor(1.0)}, ValueError, "x must be .N, C, H, W"),
    "x-3d": (call_grad_values, {"x": torch.ones(IN, H, W)}, ValueError, "x must be .N, C, H, W"),
    "stride-one": (call_grad_values, {"stride": (1,)}, ValueError, "stride must be two numbers"),
    "stride-none": (call_grad_input, {"stride": ()}, ValueError, "stride must be two numbers"),
    "grad-bfloat16": (
        call_grad_input,
        {"grad": torch.ones(2, OUT, 2, 8).bfloat16()},
        TypeError,
        "grad must be float32 or float64",
    ),
    "grad-of-another-size": (
        call_grad_input,
        {"grad": torch.ones(2, OUT, 4, 4)},
        ValueError,
        "grad must",
    ),
    "in_channels-0": (call_grad_input, {"in_channels": 0}, ValueError, "in_channels one, at least"),
    "in_channels-negative": (call_grad_input, {"in_channels": -10}, ValueError, "at least 1"),
    "in_channels-2^40": (
        call_grad_input,
        {"in_channels": 2**40, "col_perm": None},
        (ValueError, RuntimeError),
        r"less than 2\^31",
    ),
    "in_channels-2^62": (  # times the taps, a multiple of 2^64
        call_grad_input,
        {"in_channels": 2**62, "col_perm": None, "kernel_size": (4, 2), "padding": (2, 2)},
        (ValueError, RuntimeError),
        "must be",
    ),
    "input_size-0": (call_grad_input, {"input_size": (0, 7)}, ValueError, "input_size must be two"),
    "input_size-one": (call_grad_input, {"input_size": (7,)}, ValueError, "input_size must be two"),
    "input_size-large": (call_grad_input, {"input_size": (60, 70)}, ValueError, "grad must"),
    "input_size-2^62": (call_grad_input, {"input_size": (2**62, 2**62)}, ValueError, "grad must"),
    "x-and-grad-of-other-sizes": (
        call_grad_values,
        {"grad": torch.ones(2, OUT, 30, 30)},
        ValueError,
        r"which the other map's size gives|must have the size that the input's gives",
    ),
    "x-and-grad-of-other-batches": (
        call_grad_values,
        {"x": torch.ones(3, IN, H, W)},
        ValueError,
        r"which the other map's size gives",
    ),
    "x-and-grad-of-other-types": (
        call_grad_values,
        {"x": torch.ones(2, IN, H, W).double()},
        TypeError,
        r"x and grad must have one type \(got Double and Float\)",
    ),
    "block-one": (call_grad_values, {"block": (4,)}, ValueError, "block must be two numbers"),
    "block-0": (
        call_grad_values,
        {"block": (0, 3)},
        RuntimeError,
        r"block height and width must be in \[1, 128\] \(got 0x3\)",
    ),
    "block-2^40": (call_grad_values, {"block": (4, 2**40)}, RuntimeError, "block height and width"),
    "grad-other-channels": (
        call_grad_values,
        {"grad": torch.ones(2, 16, 2, 8), "row_perm": None},
        (RuntimeError, ValueError),
        "must",
    ),
}


@pytest.mark.parametrize("wants_gradients", [False, True], ids=["", "grad"])
@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize("name", GRADIENT_CALLS)
def test_bad_gradient_call(name, op, wants_gradients):
    run, new, error, message = GRADIENT_CALLS[name]
    if wants_gradients:
        operands = {n: good(op)[n] for n in ("x", "values")} | {"grad": maps_of(op)[1]} | new
        for operand, t in operands.items():
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                new = new | {operand: t.clone().requires_grad_()}
    with pytest.raises(error, match=message) as info:
        run(op, **new)
    assert f"{op}_grad_" in str(info.value)


NO_BLOCKS = {
    "values": torch.ones(0, 1, 1),
    "col_idx": i32(),
    "row_ptr": i32(0, 0),
    "row_perm": None,
    "col_perm": None,
    "bias": None,
    "residual": None,
    "out_channels": 1,
    "groups": 1,
    "output_padding": (0, 0),
}
LARGEST = 2**24 - 1


def test_kernel_positions_times_channels_may_overflow_64_bits():
    window = {
        "kernel_size": (2**22, 2**22),
        "padding": (2**21, 2**21),
        "stride": (LARGEST, LARGEST),
        "dilation": (1, 1),
    }
    x = torch.ones(1, 1, 1, 1).expand(1, 2**20, 1, 1)  # 2^44 positions of 2^20 channels: 2^64
    message = r"kernel positions times channels must be less than 2\^31"
    with pytest.raises(ValueError, match=message):
        call("bsconv2d", good("bsconv2d") | NO_BLOCKS | window | {"x": x})
    with pytest.raises(ValueError, match=message):
        call_grad_input(
            "bsconv2d",
            **(NO_BLOCKS | window),
            grad=torch.ones(1, 1, 1, 1),
            in_channels=2**20,
            input_size=(1, 1),
        )


def test_a_reach_times_channels_may_overflow_32_bits():
    a = good("bsconv2d") | NO_BLOCKS
    a |= {"x": torch.ones(1, 1, 1, 1).expand(1, 2**24, 1, 1), "kernel_size": (1, 1)}
    a |= {"padding": (0, 0), "dilation": (1, 1), "stride": (1, 1)}
    message = (
        r"input channels times the pixels that the kernel reaches over must be less than 2\^31"
    )
    with pytest.raises(ValueError, match=message):
        call("bsconv2d", a)
    a |= {"block": (1, 1), "grad": torch.ones(1, 1, 1, 1)}
    with pytest.raises(ValueError, match=message):
        call_grad_values("bsconv2d", **a)


def test_taps_far_apart_reach_over_nothing():
    """Two taps 2^23 pixels apart, as many zeros between them: each is taken by itself."""
    a = good("bsconv2d") | NO_BLOCKS
    a |= {"x": torch.ones(1, 2**9, 1, 1), "kernel_size": (1, 2), "bias": torch.ones(1)}
    a |= {"padding": (0, 2**22), "dilation": (1, 2**23), "stride": (1, 1)}
    assert torch.equal(call("bsconv2d", a), torch.ones(1, 1, 1, 1))


@pytest.mark.parametrize("op", OPS)
@pytest.mark.parametrize(
    "operand", [n for n, v in good(OPS[0]).items() if isinstance(v, torch.Tensor)]
)
@pytest.mark.parametrize("grad", [False, True], ids=["", "grad"])
def test_operands_on_two_devices(operand, op, grad):
    """Not the fake kernel's empty tensor: nothing would ever fill it."""
    a = good(op)
    a["x" if operand != "x" else "values"].requires_grad_(grad)
    a[operand] = a[operand].to("meta")
    with pytest.raises((RuntimeError, TypeError), match="device"):
        call(op, a)


@pytest.mark.parametrize("op", OPS)
def test_all_operands_on_meta_give_a_shape(op):
    a = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in good(op).items()}
    y = call(op, a)
    assert y.device.type == "meta"
    assert y.shape == (2, OUT, *out_size(op))


@pytest.mark.parametrize("op", OPS)
def test_wrong_python_arguments(op):
    for change in (
        put(out_channels=1.5),
        put(kernel_size="33"),
        put(stride=None),
        put(groups=2.0),
        put(activation=3),
        put(x=[1.0]),
    ):
        a = good(op)
        change(a)
        with pytest.raises((TypeError, RuntimeError), match=f"tetris::{op}"):
            call(op, a)


SURVIVE = """
import sys, torch, tetris
sys.path.insert(0, {folder!r})
from test_conv_errors import CASES, CONTENTS, WINDOW, call, good, grad_input, grad_values, rule_of
raised = expected = 0
for images in (0, 1, 20):
    for threads in (1, 4):
        torch.set_num_threads(threads)
        for op, name in CASES:
            change, error, _ = rule_of(name)
            calls = [call]
            if name in CONTENTS or name in WINDOW:
                calls += [grad_input, grad_values]
            for function in calls:
                a = good(op, images)
                change(a)
                expected += 1
                try:
                    function(op, a)
                except error:
                    raised += 1
                else:
                    print("no error:", op, name, images, threads, function)
        for op in ("bsconv2d", "bsconv_transpose2d"):
            assert call(op, good(op, images)).isfinite().all()  # and good calls still work
print("raised", raised, "expected", expected)
"""


def test_the_process_survives_all_of_it(isa):
    folder = os.path.dirname(os.path.abspath(__file__))
    done = subprocess.run(
        [sys.executable, "-X", "faulthandler", "-c", SURVIVE.format(folder=folder)],
        capture_output=True,
        text=True,
        # glibc then fills freed and fresh memory, so that stray reads rarely look plausible.
        env={**os.environ, "TETRIS_CPU_ISA": isa, "MALLOC_PERTURB_": "165"},
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "no error" not in done.stdout
    _, raised, _, expected = done.stdout.split()
    assert raised == expected
