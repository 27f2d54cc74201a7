"""Bad calls raise, name the op and the rule, and leave the process alive."""

import os
import subprocess
import sys

import pytest
import torch

WARNINGS = ["ignore:Sparse CSR tensor support", "ignore:torch.quantize_per_tensor"]
pytestmark = [pytest.mark.filterwarnings(w) for w in WARNINGS]

N, K, BO, BI = 12, 10, 4, 3  # 3 block rows, 4 column groups of which the last is ragged


def good(m: int) -> dict:
    """Operands of a valid call."""
    return {
        "x": torch.ones(m, K),
        "values": torch.ones(5, BI, BO),
        "row_ptr": torch.tensor([0, 2, 2, 5], dtype=torch.int32),
        "col_idx": torch.tensor([1, 3, 0, 2, 3], dtype=torch.int32),
        "row_perm": torch.arange(N - 1, -1, -1, dtype=torch.int32),
        "col_perm": torch.arange(K - 1, -1, -1, dtype=torch.int32),
        "bias": torch.zeros(N),
        "out_features": N,
        "activation": "relu",
    }


def i32(*v):
    return torch.tensor(v, dtype=torch.int32)


def set_at(name, position, value):
    def change(a):
        a[name] = a[name].clone()
        a[name][position] = value

    return change


def put(**new):
    return lambda a: a.update(new)


def apply(name, f):
    return lambda a: a.update({name: f(a[name])})


BIG = 2**31 - 1
DENSE = "must be a dense tensor on the CPU"

# What is wrong -> (how, exception, what the message must say). Contents of index tensors:
CONTENTS = {
    "col_idx-too-large": (
        set_at("col_idx", 1, 4),
        ValueError,
        r"col_idx\[1\] \(block row 0\) must be in \[0, 4\), the column groups \(got 4\)",
    ),
    "col_idx-huge": (set_at("col_idx", 4, BIG), ValueError, r"col_idx\[4\].*\(got 2147483647\)"),
    "col_idx-negative": (set_at("col_idx", 2, -1), ValueError, r"col_idx\[2\].*\(got -1\)"),
    "col_idx-most-negative": (
        set_at("col_idx", 0, -(2**31)),
        ValueError,
        r"col_idx\[0\].*\(got -2147483648\)",
    ),
    "col_idx-huge-in-the-middle": (
        set_at("col_idx", 3, BIG),
        ValueError,
        r"col_idx\[3\].*got 21474",
    ),
    "col_idx-equal": (
        set_at("col_idx", 3, 0),
        ValueError,
        r"must ascend strictly within a block row: col_idx\[3\] \(block row 2\) is 0 after 0",
    ),
    "col_idx-descending": (
        put(col_idx=i32(3, 1, 0, 2, 3)),
        ValueError,
        r"must ascend strictly.*col_idx\[1\] \(block row 0\) is 1 after 3",
    ),
    "row_ptr-does-not-start-at-0": (
        set_at("row_ptr", 0, 1),
        ValueError,
        r"row_ptr\[0\] must be 0 \(got 1\)",
    ),
    "row_ptr-negative-start": (set_at("row_ptr", 0, -1), ValueError, r"row_ptr\[0\].*\(got -1\)"),
    "row_ptr-decreases": (
        set_at("row_ptr", 1, 3),
        ValueError,
        r"row_ptr must not decrease \(got row_ptr\[1\] = 3 and row_ptr\[2\] = 2\)",
    ),
    "row_ptr-negative": (set_at("row_ptr", 1, -5), ValueError, r"row_ptr must not decrease"),
    "row_ptr-jumps-out-and-back": (set_at("row_ptr", 1, BIG), ValueError, "must not decrease"),
    "row_ptr-ends-early": (
        set_at("row_ptr", 3, 4),
        ValueError,
        r"row_ptr must end at the number of stored blocks \(got row_ptr\[3\] = 4 and .* = 5\)",
    ),
    "row_ptr-ends-late": (set_at("row_ptr", 3, BIG), ValueError, "row_ptr must end at"),
    "row_perm-too-large": (
        set_at("row_perm", 2, N),
        ValueError,
        r"row_perm\[2\] must be in \[0, 12\) \(got 12\)",
    ),
    "row_perm-negative": (set_at("row_perm", 0, -1), ValueError, r"row_perm\[0\].*\(got -1\)"),
    "row_perm-huge": (set_at("row_perm", 0, BIG), ValueError, r"row_perm\[0\] must be in"),
    "row_perm-duplicate": (
        set_at("row_perm", 5, 11),
        ValueError,
        r"row_perm must hold each index once \(got 11 at positions 0 and 5\)",
    ),
    "col_perm-too-large": (
        set_at("col_perm", 9, K),
        ValueError,
        r"col_perm\[9\] must be in \[0, 10\) \(got 10\)",
    ),
    "col_perm-negative": (set_at("col_perm", 1, -7), ValueError, r"col_perm\[1\].*\(got -7\)"),
    "col_perm-huge": (set_at("col_perm", 1, BIG), ValueError, r"col_perm\[1\] must be in"),
    "col_perm-duplicate": (
        put(col_perm=torch.zeros(K, dtype=torch.int32)),
        ValueError,
        r"col_perm must hold each index once \(got 0 at positions 0 and 1\)",
    ),
}
# Shapes:
SHAPES = {
    "x-scalar": (put(x=torch.tensor(1.0)), RuntimeError, r"x must have at least one dimension"),
    "x-no-features": (
        put(x=torch.ones(3, 0), col_perm=None),
        RuntimeError,
        r"in_features must be in \[1, 2\^31\) \(got 0\)",
    ),
    "x-too-wide": (
        put(x=torch.ones(3, K + 1)),
        RuntimeError,
        r"col_perm must have in_features elements \(got 10 and 11\)",
    ),
    "x-narrower-than-col_idx": (
        put(x=torch.ones(3, K - 1), col_perm=None),
        ValueError,
        r"col_idx\[1\] .* must be in \[0, 3\)",
    ),
    "values-2d": (
        apply("values", lambda v: v[0]),
        RuntimeError,
        r"values must be \[nnzb, block width, block height\] \(got shape \[3, 4\]\)",
    ),
    "values-4d": (apply("values", lambda v: v[None]), RuntimeError, "values must be .nnzb"),
    "values-too-few": (
        apply("values", lambda v: v[:4]),
        RuntimeError,
        r"must both be nnzb, the stored blocks \(got 4 and 5\)",
    ),
    "block-height-0": (
        put(values=torch.ones(5, BI, 0)),
        RuntimeError,
        r"block height and width must be in \[1, 128\] \(got 0x3\)",
    ),
    "block-width-0": (put(values=torch.ones(5, 0, BO)), RuntimeError, r"\(got 4x0\)"),
    "block-height-129": (put(values=torch.ones(5, BI, 129)), RuntimeError, r"\(got 129x3\)"),
    "block-width-129": (put(values=torch.ones(5, 129, BO)), RuntimeError, r"\(got 4x129\)"),
    "row_ptr-short": (
        apply("row_ptr", lambda t: t[:3]),
        RuntimeError,
        r"row_ptr must have ceil\(out_features / block height\) \+ 1 elements \(got 3 and 4\)",
    ),
    "row_ptr-long": (
        put(row_ptr=i32(0, 2, 2, 5, 5)),
        RuntimeError,
        r"row_ptr must have .* elements \(got 5 and 4\)",
    ),
    "row_ptr-empty": (put(row_ptr=i32()), RuntimeError, r"row_ptr must have .* \(got 0 and 4\)"),
    "row_ptr-2d": (
        apply("row_ptr", lambda t: t[None]),
        RuntimeError,
        r"row_ptr must be one-dimensional \(got shape \[1, 4\]\)",
    ),
    "row_ptr-scalar": (put(row_ptr=torch.tensor(0).int()), RuntimeError, "row_ptr must be one-dim"),
    "col_idx-2d": (
        apply("col_idx", lambda t: t[None]),
        RuntimeError,
        r"col_idx must be one-dimensional \(got shape \[1, 5\]\)",
    ),
    "col_idx-short": (
        apply("col_idx", lambda t: t[:4]),
        RuntimeError,
        r"must both be nnzb, the stored blocks \(got 5 and 4\)",
    ),
    "row_perm-short": (
        apply("row_perm", lambda t: t[:3]),
        RuntimeError,
        r"row_perm must have out_features elements \(got 3 and 12\)",
    ),
    "row_perm-2d": (
        apply("row_perm", lambda t: t.view(3, 4)),
        RuntimeError,
        r"row_perm must be one-dimensional",
    ),
    "col_perm-long": (
        put(col_perm=torch.arange(K + 1).int()),
        RuntimeError,
        r"col_perm must have in_features elements \(got 11 and 10\)",
    ),
    "bias-short": (
        apply("bias", lambda t: t[:1]),
        RuntimeError,
        r"bias must be \[out_features\] \(got shape \[1\] and out_features 12\)",
    ),
    "bias-2d": (apply("bias", lambda t: t[None]), RuntimeError, r"bias must be \[out_features\]"),
    "bias-scalar": (put(bias=torch.tensor(1.0)), RuntimeError, r"bias must be \[out_features\]"),
    "out_features-0": (
        put(out_features=0, bias=None),
        RuntimeError,
        r"out_features must be in \[1, 2\^31\) \(got 0\)",
    ),
    "out_features-negative": (put(out_features=-4, bias=None), RuntimeError, r"\(got -4\)"),
    "out_features-2^31": (put(out_features=2**31, bias=None), RuntimeError, r"got 2147483648\)"),
    "out_features-largest": (
        put(out_features=BIG, bias=None, row_perm=None),
        RuntimeError,
        r"row_ptr must have .* \(got 4 and 536870913\)",
    ),
    "out_features-2^62": (put(out_features=2**62, bias=None), RuntimeError, "out_features must be"),
    "out_features-smaller-than-rows": (
        put(out_features=8, bias=None, row_perm=None),
        RuntimeError,
        r"row_ptr must have .* \(got 4 and 3\)",
    ),
}
# Types, devices and layouts:
TYPES = {
    "x-bfloat16": (
        apply("x", lambda t: t.bfloat16()),
        TypeError,
        r"x must be float32 or float64 \(got BFloat16\).*autocast",
    ),
    "x-half": (apply("x", lambda t: t.half()), TypeError, r"x must be float32 .* \(got Half\)"),
    "x-int": (apply("x", lambda t: t.int()), TypeError, r"x must be float32 .* \(got Int\)"),
    "x-bool": (apply("x", lambda t: t.bool()), TypeError, r"x must be float32 .* \(got Bool\)"),
    "x-complex": (apply("x", lambda t: t.cfloat()), TypeError, r"\(got ComplexFloat\)"),
    "x-double-values-float": (
        apply("x", lambda t: t.double()),
        TypeError,
        r"values and x must have one type \(got Float and Double\)",
    ),
    "values-bfloat16": (
        apply("values", lambda t: t.bfloat16()),
        TypeError,
        r"values and x must have one type \(got BFloat16 and Float\)",
    ),
    "bias-double": (
        apply("bias", lambda t: t.double()),
        TypeError,
        r"bias and x must have one type \(got Double and Float\)",
    ),
    "row_ptr-int64": (
        apply("row_ptr", lambda t: t.long()),
        TypeError,
        r"row_ptr must be int32 \(got Long\)",
    ),
    "row_ptr-float": (apply("row_ptr", lambda t: t.float()), TypeError, r"row_ptr must be int32"),
    "col_idx-int64": (apply("col_idx", lambda t: t.long()), TypeError, r"col_idx must be int32"),
    "col_idx-int16": (apply("col_idx", lambda t: t.short()), TypeError, r"got Short"),
    "row_perm-int64": (apply("row_perm", lambda t: t.long()), TypeError, r"row_perm must be int32"),
    "col_perm-uint8": (apply("col_perm", lambda t: t.byte()), TypeError, r"col_perm must be int32"),
    "x-sparse": (apply("x", lambda t: t.to_sparse()), (RuntimeError, NotImplementedError), "bsmm"),
    "values-sparse": (
        apply("values", lambda t: t.to_sparse()),
        (RuntimeError, NotImplementedError),
        "bsmm",
    ),
    "row_ptr-sparse": (
        apply("row_ptr", lambda t: t.to_sparse()),
        (RuntimeError, NotImplementedError),
        "bsmm",
    ),
    "bias-sparse": (
        apply("bias", lambda t: t.to_sparse()),
        (RuntimeError, NotImplementedError),
        "bsmm",
    ),
    "x-csr": (apply("x", lambda t: t.to_sparse_csr()), (RuntimeError, NotImplementedError), "bsmm"),
    "x-mkldnn": (apply("x", lambda t: t.to_mkldnn()), (RuntimeError, NotImplementedError), "bsmm"),
    "x-quantized": (
        apply("x", lambda t: torch.quantize_per_tensor(t, 0.1, 0, torch.qint8)),
        (RuntimeError, NotImplementedError),
        "bsmm",
    ),
    "activation-unknown": (
        put(activation="tanh"),
        ValueError,
        r"activation must be none, relu, gelu, gelu_tanh or silu \(got 'tanh'\)",
    ),
    "activation-empty": (put(activation=""), ValueError, r"\(got ''\)"),
    "activation-case": (put(activation="ReLU"), ValueError, r"\(got 'ReLU'\)"),
}
BAD = {**CONTENTS, **SHAPES, **TYPES}


def call(a: dict):
    return torch.ops.tetris.bsmm(*a.values())


@pytest.mark.parametrize("m", [0, 1, 20])
def test_the_good_call_is_good(m):
    assert call(good(m)).shape == (m, N)


@pytest.mark.parametrize("m", [0, 1, 2, 20])
@pytest.mark.parametrize("name", BAD)
def test_bad_call(name, m):
    change, error, message = BAD[name]
    a = good(m)
    change(a)
    with pytest.raises(error, match=message) as info:
        call(a)
    assert "tetris::bsmm" in str(info.value)


@pytest.mark.parametrize("name", BAD)
def test_bad_call_that_wants_gradients(name):
    change, error, message = BAD[name]
    a = good(5)
    change(a)
    if a["bias"] is None or not a["bias"].is_floating_point():
        pytest.skip("nothing here requires a gradient")
    a["bias"] = a["bias"].requires_grad_()
    with pytest.raises(error, match=message):
        call(a)


@pytest.mark.parametrize("name", CONTENTS)
def test_bad_index_contents_with_many_threads(name, isa, threads):
    """Every thread stops, and the caller gets one error."""
    threads(4)
    change, error, message = CONTENTS[name]
    a = good(3000)
    change(a)
    with pytest.raises(error, match=message):
        call(a)


def grad_input(a, m):
    return torch.ops.tetris.bsmm_grad_input(
        torch.ones(m, N),
        *(a[n] for n in ("values", "row_ptr", "col_idx", "row_perm", "col_perm")),
        K,
    )


def grad_values(a, m):
    return torch.ops.tetris.bsmm_grad_values(
        a["x"],
        torch.ones(m, N),
        *(a[n] for n in ("row_ptr", "col_idx", "row_perm", "col_perm")),
        BO,
        BI,
    )


@pytest.mark.parametrize("m", [0, 1, 20])
@pytest.mark.parametrize("op", [grad_input, grad_values], ids=["grad_input", "grad_values"])
@pytest.mark.parametrize("name", CONTENTS)
def test_bad_index_contents_in_the_gradient_ops(name, op, m):
    change, error, message = CONTENTS[name]
    a = good(m)
    change(a)
    with pytest.raises(error, match=message.split(r" \(got")[0]) as info:
        op(a, m)
    assert f"tetris::bsmm_{op.__name__}" in str(info.value)


GRADIENT_CALLS = {
    "grad-bfloat16": (
        lambda a: torch.ops.tetris.bsmm_grad_input(
            torch.ones(2, N).bfloat16(), a["values"], a["row_ptr"], a["col_idx"], None, None, K
        ),
        TypeError,
        "grad must be float32 or float64",
    ),
    "grad-scalar": (
        lambda a: torch.ops.tetris.bsmm_grad_input(
            torch.tensor(1.0), a["values"], a["row_ptr"], a["col_idx"], None, None, K
        ),
        RuntimeError,
        "grad must have at least one dimension",
    ),
    "in_features-0": (
        lambda a: torch.ops.tetris.bsmm_grad_input(
            torch.ones(2, N), a["values"], a["row_ptr"], a["col_idx"], None, None, 0
        ),
        RuntimeError,
        "in_features must be in",
    ),
    "in_features-2^40": (
        lambda a: torch.ops.tetris.bsmm_grad_input(
            torch.ones(2, N), a["values"], a["row_ptr"], a["col_idx"], None, None, 2**40
        ),
        RuntimeError,
        "in_features must be in",
    ),
    "token-counts-differ": (
        lambda a: torch.ops.tetris.bsmm_grad_values(
            torch.ones(3, K), torch.ones(2, N), a["row_ptr"], a["col_idx"], None, None, BO, BI
        ),
        RuntimeError,
        r"x and grad must have the same leading shape \(got \[3, 10\] and \[2, 12\]\)",
    ),
    "types-differ": (
        lambda a: torch.ops.tetris.bsmm_grad_values(
            torch.ones(2, K).double(),
            torch.ones(2, N),
            *(a[n] for n in ("row_ptr", "col_idx")),
            None,
            None,
            BO,
            BI,
        ),
        TypeError,
        r"x and grad must have one type \(got Double and Float\)",
    ),
    "block-0": (
        lambda a: torch.ops.tetris.bsmm_grad_values(
            torch.ones(2, K), torch.ones(2, N), a["row_ptr"], a["col_idx"], None, None, 0, BI
        ),
        RuntimeError,
        r"block height and width must be in \[1, 128\] \(got 0x3\)",
    ),
    "block-2^40": (
        lambda a: torch.ops.tetris.bsmm_grad_values(
            torch.ones(2, K), torch.ones(2, N), a["row_ptr"], a["col_idx"], None, None, BO, 2**40
        ),
        RuntimeError,
        "block height and width must be in",
    ),
    "col_idx-sparse": (
        lambda a: torch.ops.tetris.bsmm_grad_values(
            torch.ones(2, K),
            torch.ones(2, N),
            a["row_ptr"],
            a["col_idx"].to_sparse(),
            None,
            None,
            BO,
            BI,
        ),
        (RuntimeError, NotImplementedError),
        "bsmm_grad_values",
    ),
}


@pytest.mark.parametrize("name", GRADIENT_CALLS)
def test_bad_gradient_call(name):
    run, error, message = GRADIENT_CALLS[name]
    with pytest.raises(error, match=message) as info:
        run(good(2))
    assert "tetris::bsmm_grad_" in str(info.value)


@pytest.mark.parametrize("operand", [n for n in good(1) if n not in ("out_features", "activation")])
def test_operands_on_two_devices(operand):
    """Not the fake kernel's empty tensor: nothing would ever fill it."""
    a = good(3)
    a[operand] = a[operand].to("meta")
    with pytest.raises((RuntimeError, TypeError), match="device"):
        call(a)


def test_all_operands_on_meta_give_a_shape():
    a = {n: t.to("meta") if isinstance(t, torch.Tensor) else t for n, t in good(3).items()}
    y = call(a)
    assert y.device.type == "meta"
    assert y.shape == (3, N)


def test_wrong_python_arguments():
    a = good(2)
    for change in (put(out_features=1.5), put(out_features="12"), put(activation=3), put(x=[1.0])):
        b = dict(a)
        change(b)
        with pytest.raises((TypeError, RuntimeError), match="tetris::bsmm"):
            call(b)
    with pytest.raises((TypeError, RuntimeError), match="missing value for argument"):
        torch.ops.tetris.bsmm(a["x"])


SURVIVE = """
import sys, torch, tetris
sys.path.insert(0, {folder!r})
from test_errors import BAD, CONTENTS, call, good, grad_input, grad_values
raised = 0
for m in (0, 1, 2, 15, 16, 17, 64, 1000):
    for threads in (1, 4):
        torch.set_num_threads(threads)
        for name, (change, error, _) in BAD.items():
            ops = [lambda a, m: call(a)]
            if name in CONTENTS:
                ops += [grad_input, grad_values]
            for op in ops:
                a = good(m)
                change(a)
                try:
                    op(a, m)
                except error:
                    raised += 1
                else:
                    print("no error:", name, m, threads, op)
        assert call(good(m)).isfinite().all()  # and good calls still work
print("raised", raised, "expected", 16 * (len(BAD) + 2 * len(CONTENTS)))
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
