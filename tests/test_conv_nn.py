"""Sparse convolutions: equal to the masked dense layer, and well-behaved torch modules."""

import copy
import io
import pickle
import re

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tetris import (
    BlockLayout,
    SparseConv1d,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseLinear,
)

SPARSE = {
    nn.Conv1d: SparseConv1d,
    nn.Conv2d: SparseConv2d,
    nn.ConvTranspose2d: SparseConvTranspose2d,
}
SPATIAL = {nn.Conv1d: (13,), nn.Conv2d: (9, 11), nn.ConvTranspose2d: (5, 6)}
ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}


def make(kind, in_=10, out=14, kernel=3, seed=0, dtype=None, **settings):
    """A dense layer, the same for each seed."""
    torch.manual_seed(seed)
    return kind(in_, out, kernel, **settings).to(dtype)


def sparse_of(dense, block=(4, 3), sparsity=0.6, perm=True, seed=0, activation="none"):
    """Random blocks and permutations of a dense layer, which loses the rest of its weights."""
    generator = torch.Generator().manual_seed(seed)
    groups, out, in_ = dense.groups, dense.out_channels, dense.in_channels
    grid = (
        groups * -(-(out // groups) // block[0]),
        torch.Size(dense.kernel_size).numel() * -(-(in_ // groups) // block[1]),
    )
    perms = [
        torch.cat([torch.randperm(n, generator=generator) + a * n for a in range(groups)]).int()
        if perm
        else None
        for n in (out // groups, in_ // groups)
    ]
    layout = BlockLayout.from_block_mask(
        torch.rand(grid, generator=generator) > sparsity,
        block,
        out,
        in_,
        *perms,
        kernel_size=dense.kernel_size,
        groups=groups,
    )
    kind = next(k for k in SPARSE if isinstance(dense, k))
    sparse = SPARSE[kind].from_dense(dense, layout=layout, activation=activation)
    with torch.no_grad():
        mask = layout.mask()
        if kind is nn.ConvTranspose2d:  # [out, in / groups, ...] to [in, out / groups, ...]
            mask = torch.cat([part.transpose(0, 1) for part in mask.chunk(groups)])
        dense.weight.mul_(mask)
    return sparse


def inputs(dense, batch=(2,), dtype=None, seed=1):
    kind = next(k for k in SPARSE if isinstance(dense, k))
    torch.manual_seed(seed)
    return torch.randn(*batch, dense.in_channels, *SPATIAL[kind], dtype=dtype)


def padding(module):
    """Entries of values beyond the edge of the weight."""
    return ~module.layout.pack(torch.ones(module.layout.weight_shape, dtype=torch.bool))


def assert_close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-4, atol=1e-5)


FORWARD = [
    {},
    {"bias": False},
    {"stride": 2},
    {"padding": 2},
    {"dilation": 2, "padding": 1},
    {"groups": 2},
    {"stride": 3, "padding": 1, "dilation": 2, "groups": 2},
    {"padding": "same"},
    {"padding": "same", "kernel": 4},
    {"padding": "same", "kernel": 2, "dilation": 3},
    {"padding": "valid"},
    {"kernel": 1},
    {"kernel": 1, "stride": 2, "groups": 2},
    {"kernel": 5, "padding": 4},
    {"padding": 2, "padding_mode": "reflect"},
    {"padding": 1, "padding_mode": "replicate", "stride": 2},
    {"padding": 2, "padding_mode": "circular", "groups": 2},
    {"padding": "same", "padding_mode": "reflect", "kernel": 4},
    {"in_": 12, "out": 12, "groups": 12, "padding": 1},
    {"in_": 1, "out": 3},
]


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel")
@pytest.mark.parametrize("settings", FORWARD, ids=str)
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d])
def test_equals_the_masked_dense_layer(kind, settings):
    dense = make(kind, **settings)
    sparse = sparse_of(dense)
    x = inputs(dense)
    assert_close(sparse(x), dense(x))
    assert_close(sparse(x[0]), dense(x[0]))  # unbatched
    assert "same" not in settings.values() or sparse(x).shape[2:] == x.shape[2:]


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel": (3, 1), "stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)},
        {"kernel": (1, 4), "padding": "same"},
        {"kernel": (2, 3), "padding": (3, 1), "padding_mode": "circular"},
    ],
    ids=str,
)
def test_axes_are_not_confused(settings):
    dense = make(nn.Conv2d, **settings)
    x = inputs(dense)
    assert_close(sparse_of(dense)(x), dense(x))


TRANSPOSED = [
    {},
    {"bias": False},
    {"stride": 2},
    {"stride": 2, "padding": 1, "output_padding": 1},
    {"padding": 2},
    {"dilation": 2},
    {"groups": 2},
    {"kernel": 4, "stride": 2, "padding": 1},
    {"kernel": (2, 3), "stride": (3, 2), "output_padding": (1, 0), "dilation": (1, 2), "groups": 2},
    {"in_": 6, "out": 12, "groups": 6},
    {"kernel": 1, "stride": 2},
]


@pytest.mark.parametrize("settings", TRANSPOSED, ids=str)
def test_equals_the_masked_transposed_layer(settings):
    dense = make(nn.ConvTranspose2d, **settings)
    sparse = sparse_of(dense)
    x = inputs(dense)
    assert_close(sparse(x), dense(x))
    assert_close(sparse(x[0]), dense(x[0]))
    assert sparse.layout.weight_shape[0] == dense.out_channels


@pytest.mark.parametrize("size", [(9, 11), (10, 12), (2, 14, 10, 11)], ids=str)
def test_output_size_chooses_among_the_sizes_a_stride_allows(size):
    dense = make(nn.ConvTranspose2d, stride=2, padding=1)
    sparse = sparse_of(dense)
    x = inputs(dense)
    assert_close(sparse(x, output_size=size), dense(x, output_size=size))
    assert sparse(x, output_size=size).shape[-2:] == size[-2:]
    assert sparse(x[0], size[-2:]).shape[-2:] == size[-2:]


def test_impossible_output_sizes_are_refused():
    sparse = sparse_of(make(nn.ConvTranspose2d, stride=2, padding=1))
    x = torch.randn(2, 10, 5, 6)
    message = r"from \(9, 11\) to \(10, 12\) for an input of \(5, 6\) \(got \(11, 11\)\)"
    with pytest.raises(ValueError, match=f"SparseConvTranspose2d: output_size must be {message}"):
        sparse(x, output_size=(11, 11))
    with pytest.raises(ValueError, match=r"output_size must be \(H, W\) or 4 sizes .got \(9,\)"):
        sparse(x, output_size=(9,))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("kind", SPARSE)
def test_activation_and_residual_are_fused(kind, activation):
    dense = make(kind, padding=1)
    sparse = sparse_of(dense, activation=activation)
    x = inputs(dense)
    y = dense(x)
    residual = torch.randn_like(y)
    function = ACTIVATIONS[activation]
    assert_close(sparse(x), function(y))
    assert_close(sparse(x, residual=residual), function(y + residual))
    assert_close(sparse(x[0], residual=residual[0]), function(y[0] + residual[0]))


@pytest.mark.parametrize("settings", [{"padding": 1}, {"padding": "same", "kernel": 2}], ids=str)
def test_memory_format_is_that_of_the_input(settings):
    dense = make(nn.Conv2d, **settings)
    sparse = sparse_of(dense)
    x = inputs(dense)
    last = x.contiguous(memory_format=torch.channels_last)
    assert sparse(x).is_contiguous()
    assert sparse(last).is_contiguous(memory_format=torch.channels_last)
    assert_close(sparse(last), dense(x))


@pytest.mark.parametrize("block", [(1, 1), (4, 1), (3, 5), (16, 16)], ids=str)
@pytest.mark.parametrize("kind", SPARSE)
def test_block_shapes(kind, block):
    dense = make(kind, padding=1, groups=2)
    sparse = sparse_of(dense, block=block)
    assert sparse.block == block
    x = inputs(dense)
    assert_close(sparse(x), dense(x))


@pytest.mark.parametrize("tie_kernel", [False, True])
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", SPARSE)
def test_from_dense_searches_and_to_dense_inverts(kind, groups, tie_kernel):
    dense = make(kind, in_=12, out=16, groups=groups, dtype=torch.float64)
    dense.requires_grad_(False).eval()
    sparse = SPARSE[kind].from_dense(
        dense, sparsity=0.5, block=(2, 2), tie_kernel=tie_kernel, sweeps=1
    )
    back = sparse.to_dense()
    assert type(back) is kind
    kept = back.weight != 0
    assert torch.equal(back.weight, dense.weight * kept)
    assert sparse.layout.sparsity == 0.5
    assert torch.equal(kept, sparse.oriented(sparse.layout.mask(), groups))
    assert bool((kept.flatten(2).all(2) == kept.flatten(2).any(2)).all()) == tie_kernel
    # What stays is worth more than what goes: the search saw this weight, not another order of it.
    size = dense.weight.abs()
    assert size[kept].mean() > 1.1 * size[~kept].mean()
    assert torch.equal(back.bias, dense.bias)
    assert back.bias is not sparse.bias
    assert not back.training
    assert not sparse.values.requires_grad
    assert not back.weight.requires_grad
    assert sparse.values.dtype == back.weight.dtype == torch.float64
    x = inputs(dense, dtype=torch.float64)
    torch.testing.assert_close(sparse(x), back(x))


def test_importance_is_shaped_like_the_dense_weight():
    dense = make(nn.ConvTranspose2d, in_=4, out=6, kernel=2, groups=2)  # [4, 3, 2, 2]
    importance = torch.zeros_like(dense.weight)
    importance[1, 2, 0, 1] = importance[2, 0, 1, 1] = 1.0
    back = SparseConvTranspose2d.from_dense(
        dense, sparsity=0.9, block=(1, 1), importance=importance, allow_empty_rows=True
    ).to_dense()
    assert back.weight[1, 2, 0, 1] != 0
    assert back.weight[2, 0, 1, 1] != 0


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (nn.Conv1d, {"padding": 1, "stride": 2}),
        (nn.Conv2d, {"padding": "same", "kernel": 2, "groups": 2}),
        (nn.Conv2d, {"padding": 1, "padding_mode": "reflect"}),
        (nn.ConvTranspose2d, {"stride": 2, "output_padding": 1, "groups": 2}),
    ],
    ids=str,
)
def test_gradients_match_the_dense_layer_and_padding_gets_none(kind, settings):
    dense = make(kind, **settings, dtype=torch.float64)
    sparse = sparse_of(dense)
    dense = sparse.to_dense()
    x = inputs(dense, dtype=torch.float64)
    xs, xd = x.clone().requires_grad_(), x.clone().requires_grad_()
    rs, rd = (torch.ones_like(dense(x)).requires_grad_() for _ in range(2))
    sparse(xs, residual=rs).square().sum().backward()
    (dense(xd) + rd).square().sum().backward()
    torch.testing.assert_close(xs.grad, xd.grad)
    torch.testing.assert_close(rs.grad, rd.grad)
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    grad = sparse.oriented(dense.weight.grad, dense.groups)
    torch.testing.assert_close(sparse.values.grad, sparse.layout.pack(grad))
    assert padding(sparse).any()
    assert not sparse.values.grad[padding(sparse)].any()


@pytest.mark.parametrize("kind", SPARSE)
def test_padding_stays_zero_from_init_through_training_and_loading(kind):
    layout = sparse_of(make(kind, groups=2)).layout
    sparse = SPARSE[kind](10, 14, 3, groups=2, layout=layout)
    assert sparse.values.abs().sum() > 0
    assert not sparse.values[padding(sparse)].any()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    for _ in range(2):
        sparse(torch.randn(2, 10, *SPATIAL[kind])).square().sum().backward()
        optimizer.step()
    assert not sparse.values[padding(sparse)].any()
    state = sparse.state_dict()
    state["values"] = torch.full_like(state["values"], torch.nan)
    sparse.load_state_dict(state)
    assert padding(sparse).any()
    assert not sparse.values[padding(sparse)].any()


@pytest.mark.parametrize(
    "other",
    [{"sparsity": 0.2, "seed": 1}, {"block": (7, 1)}, {"block": (1, 4), "perm": False}],
    ids=str,
)
@pytest.mark.parametrize("kind", SPARSE)
def test_state_loads_into_any_sparsity_block_and_order(kind, other):
    source = nn.Sequential(sparse_of(make(kind, groups=2), **other))
    x = torch.randn(2, 10, *SPATIAL[kind])
    for start in ({}, {"perm": False}):
        target = nn.Sequential(sparse_of(make(kind, groups=2, seed=4), seed=5, **start))
        parameter = target[0].values
        target.load_state_dict(source.state_dict())
        assert target[0].values is parameter
        assert target[0].layout == source[0].layout
        assert torch.equal(target(x), source(x))


def test_state_survives_a_file_and_assign():
    source, target = (sparse_of(make(nn.Conv2d, seed=s), block=(2 + s, 2)) for s in (0, 1))
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    x = torch.randn(2, 10, 6, 6)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kernel": (1, 9)}, "got 14, 10, 1, 9 and 1, the state has 14, 10, 3, 3 and 1"),
        ({"groups": 2}, "out_channels, in_channels, kernel height, kernel width and groups must"),
        ({"in_": 11}, "got 14, 11, 3, 3 and 1, the state has 14, 10, 3, 3 and 1"),
    ],
    ids=lambda p: str(p) if isinstance(p, dict) else "",
)
def test_a_state_of_other_sizes_is_refused(settings, message):
    source = sparse_of(make(nn.Conv2d), block=(1, 1), perm=False)
    target = sparse_of(make(nn.Conv2d, **settings), block=(1, 1), perm=False)
    before = {k: v.clone() for k, v in target.state_dict().items()}
    with pytest.raises(RuntimeError, match=rf"SparseConv2d \(root\): .*{message}"):
        target.load_state_dict(source.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("col_idx", lambda t: t + 100, r"col_idx\[\d+\] must be in \[0, 18\)"),
        ("row_ptr", lambda t: t[:-1], r"row_ptr must be \[5\], 2 \* ceil\(7 / 4\) \+ 1"),
        ("row_perm", lambda t: t.flip(0), r"row_perm\[0\] must be in \[0, 7\), the channels of"),
        ("values", lambda t: t[:-1], "both be nnzb"),
        ("bias", lambda t: t[1:], r"bias must be \[14\]"),
    ],
)
def test_a_bad_state_is_explained_and_loads_nothing(key, change, message):
    target = nn.Sequential(sparse_of(make(nn.Conv2d, groups=2), block=(2, 2)))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = nn.Sequential(sparse_of(make(nn.Conv2d, groups=2))).state_dict()
    state[f"0.{key}"] = change(state[f"0.{key}"])
    with pytest.raises(RuntimeError, match=rf"SparseConv2d 0: .*{message}"):
        target.load_state_dict(state)
    assert all(torch.equal(v, before[k]) for k, v in target.state_dict().items())


@pytest.mark.parametrize("kind", SPARSE)
def test_copies_are_independent_and_equal(kind):
    module = sparse_of(make(kind, groups=2), activation="relu")
    x = torch.randn(2, 10, *SPATIAL[kind])
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        with torch.no_grad():
            other.values.add_(1.0)
            other.col_idx.zero_()
        assert not torch.equal(other.values, module.values)
        assert module.layout.nnz_blocks == module.values.shape[0]  # and it is still valid


def test_conversions_move_parameters_and_keep_indices():
    module = sparse_of(make(nn.Conv2d)).double()
    x = torch.randn(2, 10, 6, 6)
    assert module(x.double()).dtype == torch.float64
    assert module.row_ptr.dtype == torch.int32
    assert module.float()(x).shape == (2, 14, 4, 4)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert module(x.bfloat16()).shape == (2, 14, 4, 4)
    assert module.to("meta").values.is_meta


@pytest.mark.parametrize("kind", SPARSE)
def test_arguments_may_go_by_keyword(kind):
    dense = make(kind)
    sparse = sparse_of(dense)
    x = torch.randn(2, 10, *SPATIAL[kind])
    torch.testing.assert_close(sparse(input=x), dense(input=x))
    y = sparse(residual=torch.ones_like(dense(x)), input=x)
    torch.testing.assert_close(y, dense(x) + 1)


def test_values_that_a_hook_provides_are_used():
    module = sparse_of(make(nn.Conv2d, bias=False))
    prune.custom_from_mask(module, "values", torch.zeros_like(module.values))
    assert not module(torch.randn(2, 10, 6, 6)).any()


@pytest.mark.parametrize("kind", SPARSE)
def test_compile_and_export(kind):
    model = nn.Sequential(sparse_of(make(kind, padding=1), activation="relu"), nn.ReLU())
    x = torch.randn(4, 10, *SPATIAL[kind])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[0].values.grad is not None
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    torch.testing.assert_close(exported.module()(x[:2]), model(x[:2]))


@pytest.mark.parametrize(
    ("kind", "x", "error", "message"),
    [
        (nn.Conv2d, torch.randn(2, 9, 6, 6), ValueError, r"input.size\(-3\) must equal in_channels"
         r" .got 9 and 10; input has shape \[2, 9, 6, 6\]"),
        (nn.Conv2d, torch.randn(10, 6), TypeError, r"\[N, in_channels, H, W\] .*shape \[10, 6\]"),
        (nn.Conv1d, torch.randn(2, 9, 6), ValueError, r"input.size\(-2\) must equal in_channels"),
        (nn.Conv1d, torch.randn(2, 10, 6, 6), TypeError, r"\[N, in_channels, L\]"),
        (nn.ConvTranspose2d, [[1.0]], TypeError, r"\(got \[\[1.0\]\]\)"),
    ],
    ids=lambda p: p.__name__ if isinstance(p, type) else "",
)  # fmt: skip
def test_a_layer_says_what_it_wants(kind, x, error, message):
    with pytest.raises(error, match=f"{SPARSE[kind].__name__}: .*{message}"):
        sparse_of(make(kind))(x)


def test_messages_of_bad_arguments():
    layout = sparse_of(make(nn.Conv2d)).layout
    for settings, message in (
        (
            {"groups": 3},
            "SparseConv2d: in_channels must be divisible by groups .got in_ch.*groups=3",
        ),
        ({"padding": "some"}, "SparseConv2d: Invalid padding string 'some'"),
        ({"padding": "same", "stride": 2}, "SparseConv2d: padding='same' is not supported for str"),
        ({"padding_mode": "mirror"}, "SparseConv2d: padding_mode must be one of"),
        (
            {"kernel_size": 5},
            "layout must be .*out x in/groups x kernel .got 14x10x3x3 and 14x10x5x5",
        ),
        ({"activation": "tanh"}, "activation must be one of.*got 'tanh'"),
        ({"dtype": torch.float16}, "SparseConv2d: dtype must be float32.*got torch.float16"),
    ):
        arguments = {"kernel_size": 3, "layout": layout, **settings}
        with pytest.raises(ValueError, match=message):
            SparseConv2d(10, 14, **arguments)
    with pytest.raises(ValueError, match="14x10x3x3 and 14x5x3x3 in 2 groups"):
        SparseConv2d(10, 14, 3, groups=2, layout=layout)
    with pytest.raises(ValueError, match="14x10x3x3 and 14x10x3"):
        SparseConv1d.from_dense(make(nn.Conv1d), layout=layout)
    with pytest.raises(ValueError, match=r"SparseLinear: .*10x3x3 and 14x10"):
        SparseLinear(10, 14, layout=layout)
    with pytest.raises(ValueError, match="SparseConv1d.from_dense: .*or sparsity= .got neither"):
        SparseConv1d.from_dense(make(nn.Conv1d))
    with pytest.raises(
        TypeError, match="SparseConv2d.from_dense: .*nn.Conv2d .got ConvTranspose2d"
    ):
        SparseConv2d.from_dense(make(nn.ConvTranspose2d), sparsity=0.5)
    with pytest.raises(ValueError, match="SparseConv2d.from_dense: .*float32.*got torch.bfloat16"):
        SparseConv2d.from_dense(make(nn.Conv2d, dtype=torch.bfloat16), layout=layout)
    with pytest.raises(ValueError, match="to_dense: nn.Conv2d has no activation .*'relu'"):
        sparse_of(make(nn.Conv2d), activation="relu").to_dense()


def test_repr_says_what_matters():
    text = repr(sparse_of(make(nn.Conv2d, groups=2, padding="same"), activation="silu"))
    for part in ("10, 14, kernel_size=(3, 3)", "padding=same", "groups=2", "block=4x3", "sparsity=",
                 "/72", "rows+columns", "activation=silu"):  # fmt: skip
        assert part in text
    assert "dilation" not in text
    text = repr(sparse_of(make(nn.ConvTranspose2d, stride=2, output_padding=1)))
    assert "output_padding=(1, 1)" in text


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
def test_residuals_of_another_kind_or_number_of_dimensions_are_refused(kind):
    dense = make(kind)
    sparse, x = sparse_of(dense), inputs(dense)
    y = sparse(x)
    assert torch.equal(sparse(x[0], residual=y[0]), sparse(x[:1], residual=y[:1])[0])
    for wrong in (y, 1.0):
        with pytest.raises(TypeError, match="residual must be a tensor shaped like the result"):
            sparse(x[0], residual=wrong)


def test_a_residual_in_place_of_an_output_size_is_explained():
    dense = make(nn.ConvTranspose2d)
    sparse, x = sparse_of(dense), inputs(dense)
    with pytest.raises(TypeError, match="a residual goes by name: residual="):
        sparse(x, sparse(x))


def test_settings_of_a_search_beside_a_layout_are_refused():
    dense = make(nn.Conv2d)
    layout = sparse_of(dense).layout
    with pytest.raises(ValueError, match="block and sweeps would only matter to a search"):
        SparseConv2d.from_dense(dense, layout=layout, block=(8, 8), sweeps=1)


def test_other_blocks_under_the_same_permutations():
    layout = sparse_of(make(nn.Conv2d)).layout
    kept = layout.block_mask()
    assert layout.with_blocks(kept) == layout
    kept[0] = True
    more = layout.with_blocks(kept)
    assert torch.equal(more.block_mask(), kept)
    assert torch.equal(more.row_perm, layout.row_perm)
    assert more.kernel_size == layout.kernel_size


@pytest.mark.parametrize("mode", ["zeros", "reflect", "replicate", "circular"])
def test_padding_keeps_the_memory_format(mode):
    """Where dense layers lose it: circular padding."""
    dense = nn.Conv2d(16, 32, 3, padding=1, padding_mode=mode)
    sparse = SparseConv2d.from_dense(dense, sparsity=0.0, reorder=False)
    x = torch.randn(2, 16, 6, 5)
    for memory_format in (torch.channels_last, torch.contiguous_format):
        y = sparse(x.contiguous(memory_format=memory_format))
        assert y.is_contiguous(memory_format=memory_format)
        torch.testing.assert_close(y, dense(x))


@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("padding_mode", ["zeros", "circular"])
def test_messages_of_one_dimension_have_one(batch, padding_mode):
    """Though the op computes images of height 1."""
    conv = make(nn.Conv1d, kernel=5, padding=1, stride=2, padding_mode=padding_mode)
    sparse = SparseConv1d.from_dense(conv, sparsity=0.5, reorder=False)
    got, expected = [*batch, 14, 9], [*batch, 14, 4]
    message = f"SparseConv1d: residual must be shaped like the result (got {got} and {expected})"
    with pytest.raises(ValueError, match=re.escape(message)):
        sparse(torch.randn(*batch, 10, 9), torch.randn(got))
    with pytest.raises(
        ValueError, match=r"SparseConv1d: .*\(got length 2, padding \(1,\), kernel_size \(5,\)"
    ):
        sparse(torch.randn(*batch, 10, 2))
    assert sparse(torch.randn(*batch, 10, 3)).shape == (*batch, 14, 1)
    assert sparse(torch.randn(*batch, 10, 9), torch.randn(expected)).shape == (*batch, 14, 4)
