"""SparseLinear: equal to the masked dense layer, and a well-behaved torch module."""

import copy
import io
import pickle

import pytest
import torch
from torch import nn
from torch.nn.utils import prune

from tetris import BlockLayout, SparseLinear, sparsify

ACTIVATIONS = {
    "none": nn.Identity(),
    "relu": nn.ReLU(),
    "gelu": nn.GELU(),
    "gelu_tanh": nn.GELU(approximate="tanh"),
    "silu": nn.SiLU(),
}


def sparse_linear(block=(4, 4), sparsity=0.6, seed=0, perm=True, bias=True, in_=37, out=29, **kw):
    """A ragged layer with random blocks and permutations."""
    generator = torch.Generator().manual_seed(seed)
    grid = -(-out // block[0]), -(-in_ // block[1])
    perms = [torch.randperm(n, generator=generator).int() if perm else None for n in (out, in_)]
    layout = BlockLayout.from_block_mask(
        torch.rand(grid, generator=generator) > sparsity, block, out, in_, *perms
    )
    return SparseLinear(in_, out, bias, layout=layout, **kw)


def padding(module):
    ones = torch.ones(module.out_features, module.in_features, dtype=torch.bool)
    return ~module.layout.pack(ones)


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("bias", [True, False])
def test_equals_the_masked_dense_layer(activation, bias):
    dense = nn.Linear(37, 29, bias=bias)
    sparse = SparseLinear.from_dense(
        dense, sparsity=0.5, block=(4, 4), activation=activation, reorder="l1_sort"
    )
    with torch.no_grad():
        dense.weight.mul_(sparse.layout.mask())
    x = torch.randn(2, 3, 37)
    torch.testing.assert_close(sparse(x), ACTIVATIONS[activation](dense(x)), rtol=1e-5, atol=1e-6)


def test_to_dense_inverts_from_dense():
    dense = nn.Linear(37, 29, dtype=torch.float64).requires_grad_(False)
    layout = sparse_linear().layout
    sparse = SparseLinear.from_dense(dense.eval(), layout=layout)
    back = sparse.to_dense()
    assert torch.equal(back.weight, dense.weight * layout.mask())
    assert torch.equal(back.bias, dense.bias)
    assert back.bias is not sparse.bias
    assert not back.training
    assert not back.weight.requires_grad
    assert back.weight.dtype == torch.float64


def test_gradients_match_the_dense_layer_and_padding_gets_none():
    sparse = sparse_linear().double()
    dense = sparse.to_dense()
    x = torch.randn(5, 37, dtype=torch.float64)
    xs, xd = x.clone().requires_grad_(), x.clone().requires_grad_()
    sparse(xs).square().sum().backward()
    dense(xd).square().sum().backward()
    torch.testing.assert_close(xs.grad, xd.grad)
    torch.testing.assert_close(sparse.values.grad, sparse.layout.pack(dense.weight.grad))
    torch.testing.assert_close(sparse.bias.grad, dense.bias.grad)
    assert padding(sparse).any()
    assert not sparse.values.grad[padding(sparse)].any()


def test_padding_stays_zero_from_init_through_training_and_loading():
    sparse = sparse_linear()
    assert not sparse.values[padding(sparse)].any()
    optimizer = torch.optim.AdamW(sparse.parameters(), lr=0.1)
    for _ in range(3):
        sparse(torch.randn(4, 37)).square().sum().backward()
        optimizer.step()
    assert not sparse.values[padding(sparse)].any()
    state = sparse.state_dict()
    state["values"] = torch.full_like(state["values"], torch.nan)
    sparse.load_state_dict(state)
    assert not sparse.values[padding(sparse)].any()


@pytest.mark.parametrize("other", [
    {"sparsity": 0.2, "seed": 1},
    {"block": (8, 1)},
    {"block": (1, 16), "perm": False},
    {"sparsity": 1.1},
], ids=str)  # fmt: skip
def test_state_loads_into_any_sparsity_block_and_order(other):
    source = nn.Sequential(sparse_linear(**other))
    x = torch.randn(3, 37)
    for start in ({}, {"perm": False}):
        target = nn.Sequential(sparse_linear(seed=5, **start))
        parameter = target[0].values
        target.load_state_dict(source.state_dict())
        assert target[0].values is parameter
        assert target[0].layout == source[0].layout
        assert torch.equal(target(x), source(x))


def test_state_survives_a_file_and_assign():
    source, target = sparse_linear(), sparse_linear(block=(2, 2), perm=False)
    buffer = io.BytesIO()
    torch.save(source.state_dict(), buffer)
    buffer.seek(0)
    target.load_state_dict(torch.load(buffer, weights_only=True), assign=True)
    x = torch.randn(3, 37)
    assert torch.equal(target(x), source(x))


@pytest.mark.parametrize(
    ("key", "change", "message"),
    [
        ("col_idx", lambda t: t + 100, r"col_idx\[\d+\] must be in"),
        ("col_idx", lambda t: t.long(), "col_idx must be an int32"),
        ("col_idx", None, "only make sense together .*but not col_idx"),
        ("row_ptr", lambda t: t[:-1], "row_ptr must be"),
        ("row_perm", lambda t: torch.zeros_like(t), "row_perm must hold each index once"),
        ("values", lambda t: t[:-1], "both be nnzb"),
        ("values", lambda t: t[0], r"values must be a floating \[nnzb"),
        ("bias", lambda t: t[1:], r"bias must be \[29\]"),
    ],
)
def test_a_bad_state_is_explained_and_loads_nothing(key, change, message):
    target = nn.Sequential(sparse_linear(block=(2, 2)))
    before = {k: v.clone() for k, v in target.state_dict().items()}
    state = nn.Sequential(sparse_linear()).state_dict()
    if change is None:
        del state[f"0.{key}"]
    else:
        state[f"0.{key}"] = change(state[f"0.{key}"])
    with pytest.raises(RuntimeError, match=rf"SparseLinear 0: .*{message}"):
        target.load_state_dict(state)
    after = target.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[k], before[k]) for k in before)


def test_a_layout_that_somebody_holds_stays_as_it_is():
    """Whoever writes into the buffers, as torch.distributed.checkpoint does on loading."""
    module, other = sparse_linear(sparsity=-1), sparse_linear(sparsity=-1, seed=1)
    layout = module.layout
    before, hashed = copy.deepcopy(layout), hash(layout)
    for name, buffer in module.named_buffers():
        buffer.copy_(other.get_buffer(name))
    assert module.layout == other.layout != layout
    assert layout == before
    assert hash(layout) == hashed


def test_missing_and_unexpected_keys_are_torch_s():
    module = sparse_linear(bias=False)
    state = {**module.state_dict(), "stranger": torch.zeros(1)}
    with pytest.raises(RuntimeError, match="stranger"):
        module.load_state_dict(state)
    result = module.load_state_dict(state, strict=False)
    assert result.unexpected_keys == ["stranger"]
    assert set(module.load_state_dict({}, strict=False).missing_keys) == set(module.state_dict())
    values = torch.zeros_like(module.values)
    module.load_state_dict({"values": values}, strict=False)  # new numbers, same layout
    assert not module.values.any()


def test_copies_are_independent_and_equal():
    module = sparse_linear(activation="relu")
    x = torch.randn(3, 37)
    for other in (copy.deepcopy(module), pickle.loads(pickle.dumps(module))):
        assert torch.equal(other(x), module(x))
        with torch.no_grad():
            other.values.add_(1.0)
            other.col_idx.zero_()
        assert not torch.equal(other.values, module.values)
        assert module.layout.nnz_blocks == module.values.shape[0]  # and it is still valid


def test_conversions_move_parameters_and_keep_indices():
    module = sparse_linear().double()
    assert module(torch.randn(2, 37, dtype=torch.float64)).dtype == torch.float64
    assert module.row_ptr.dtype == torch.int32
    assert module.to(torch.float32)(torch.randn(37)).shape == (29,)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        module(torch.randn(2, 37))
    assert module.to("meta").values.is_meta


def test_the_input_may_go_by_keyword():
    module = sparse_linear()
    x = torch.randn(2, 37)
    assert torch.equal(module(input=x), module(x))


def test_values_that_a_hook_provides_are_used():
    module = sparse_linear(bias=False)
    prune.custom_from_mask(module, "values", torch.zeros_like(module.values))
    assert not module(torch.randn(2, 37)).any()


def test_layers_that_share_values_train_together():
    first = sparse_linear(in_=32, out=32)
    second = copy.deepcopy(first)
    second.values = first.values
    model = nn.Sequential(first, second)
    assert len(list(model.parameters())) == 3
    model(torch.randn(4, 32)).sum().backward()
    torch.optim.SGD(model.parameters(), 0.1).step()
    assert torch.equal(first.values, second.values)


CONV = {"kernel_size": (3, 2), "groups": 2}
DENSE = [
    lambda: nn.Linear(37, 29, dtype=torch.float64),
    lambda: nn.Conv1d(32, 16, 3),
    lambda: nn.Conv2d(32, 16, **CONV),
    lambda: nn.ConvTranspose2d(32, 16, **CONV),
]


@pytest.mark.parametrize("make", DENSE, ids=lambda make: type(make()).__name__)
def test_weight_has_the_type_the_device_and_the_shape_of_the_dense_one(make):
    dense = make()
    sparse = sparsify(dense, sparsity=0.5, reorder=False)
    got, want = sparse.weight, dense.weight
    assert isinstance(got, torch.Tensor)
    for read in ("dtype", "device", "shape", "ndim", "layout", "is_cuda", "is_cpu", "is_meta"):
        assert getattr(got, read) == getattr(want, read)
    for read in ("size", "dim", "numel", "is_floating_point", "is_complex", "element_size"):
        assert getattr(got, read)() == getattr(want, read)()
    assert torch.is_floating_point(got)
    assert f"{got}" == repr(got)
    assert got.size(1) == want.size(1)
    assert str(want.dtype) in repr(got)
    assert sparse.to(torch.float32).weight.dtype == torch.float32
    assert sparse.to("meta").weight.device.type == "meta"


ABSENT = "a sparse layer has no dense weight; layer.to_dense.*layer.values are the stored ones"
USES = {
    "+": lambda w: w + 1,
    "@": lambda w: torch.ones(2, 29) @ w,
    "mul_": lambda w: torch.ones(29, 37).mul_(w),
    "linear": lambda w: nn.functional.linear(torch.ones(2, 37), w),
    "aten": lambda w: torch.ops.aten.add.Tensor(w, w),
    "[0]": lambda w: w[0],
    "clone": lambda w: w.clone(),
    "detach": lambda w: w.detach(),
    "float": lambda w: w.float(),
    "numpy": lambda w: w.numpy(),
    "tolist": lambda w: w.tolist(),
    "data": lambda w: w.data,
    "grad": lambda w: w.grad,
    "copy_": lambda w: w.copy_(torch.ones(29, 37)),
    "data=": lambda w: setattr(w, "data", torch.ones(29, 37)),
    "requires_grad=": lambda w: setattr(w, "requires_grad", False),
    "init": nn.init.normal_,
    "Parameter": nn.Parameter,
    "zeros_like": torch.zeros_like,
    "deepcopy": copy.deepcopy,
}


@pytest.mark.parametrize("use", USES)
def test_a_weight_that_is_not_there_has_no_numbers(use):
    with pytest.raises(RuntimeError, match=ABSENT):
        USES[use](sparse_linear().weight)


@pytest.mark.parametrize("value", [nn.Parameter(torch.ones(29, 37)), torch.ones(29, 37), None])
def test_a_weight_cannot_be_set(value):
    module = sparse_linear()
    with pytest.raises(AttributeError, match=f"SparseLinear: weight cannot be set: {ABSENT}"):
        module.weight = value
    with pytest.raises(AttributeError, match="weight cannot be set"):
        module.register_parameter("weight", None)


def test_a_weight_that_is_not_there_is_in_no_state():
    module = sparse_linear()
    before = pickle.dumps(module)
    assert module.weight.shape == (29, 37)
    assert pickle.dumps(module) == before
    names = {*module.state_dict(), *dict(module.named_parameters()), *dict(module.named_buffers())}
    assert not [name for name in names if "weight" in name]
    assert "weight" not in vars(copy.deepcopy(module))
    assert not nn.utils.parametrize.is_parametrized(module, "weight")
    with pytest.raises(ValueError, match="does not have a parameter"):
        nn.utils.parametrizations.weight_norm(module)
    with pytest.raises(RuntimeError, match=ABSENT):
        prune.identity(module, "weight")


class ReadsTheType(nn.Module):
    """As T5 does in forward."""

    def __init__(self):
        super().__init__()
        self.fc = sparse_linear()

    def forward(self, x):
        weight = self.fc.weight
        if isinstance(weight, torch.Tensor) and x.dtype != weight.dtype != torch.int8:
            x = x.to(self.fc.weight.dtype)
        return self.fc(x.to(weight.device)[..., : weight.shape[1]]) + weight.size(0)


def test_models_that_read_the_type_of_a_weight_compile_and_export():
    model, x = ReadsTheType(), torch.randn(6, 40, dtype=torch.float64)
    want = model.fc(x[:, :37].float()) + 29
    assert torch.equal(model(x), want)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), want)
    for strict in (False, True):
        program = torch.export.export(model, (x,), strict=strict).module()
        torch.testing.assert_close(program(x), want)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), want)


@pytest.mark.parametrize(
    "compiler",
    [
        lambda model, x: torch.compile(model, backend="aot_eager")(x),
        lambda model, x: torch.export.export(model, (x,), strict=False),
        lambda model, x: torch.export.export(model, (x,), strict=True),
    ],
    ids=["compile", "export", "strict"],
)
def test_compilers_do_not_compute_with_a_weight_that_is_not_there(compiler):
    class Computes(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = sparse_linear()

        def forward(self, x):
            return nn.functional.linear(x, self.fc.weight)

    model, x = Computes(), torch.randn(6, 37)
    with pytest.raises(Exception, match="no dense weight"):  # torch wraps it
        compiler(model, x)


def test_an_encoder_layer_made_sparse_by_hand_leaves_torch_s_fused_kernel():
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True).eval()
    x = torch.randn(2, 3, 8)
    want = layer(x)
    layer.linear1 = SparseLinear.from_dense(layer.linear1, sparsity=0.0, reorder=False)
    with torch.no_grad():
        torch.testing.assert_close(layer(x), want, rtol=1e-4, atol=1e-5)


def test_compile_and_export():
    model = nn.Sequential(sparse_linear(activation="gelu"), nn.Linear(29, 3))
    x = torch.randn(6, 37)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(x), model(x))
    compiled(x).sum().backward()
    assert model[0].values.grad is not None
    batch = torch.export.Dim("batch")
    exported = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    torch.testing.assert_close(exported.module()(x[:2]), model(x[:2]))


def test_a_block_beside_a_layout_must_be_the_layout_s():
    dense, layout = nn.Linear(64, 32), sparse_linear((16, 16), in_=64, out=32).layout
    for block in (None, (16, 16), [16, 16]):
        sparse = SparseLinear.from_dense(dense, layout=layout, block=block)
        assert sparse.layout == layout
    for block in ((4, 1), [4, 1], (8, 8)):
        with pytest.raises(ValueError, match="from_dense: block would only matter to a search"):
            SparseLinear.from_dense(dense, layout=layout, block=block)
    with pytest.raises(ValueError, match="from_dense: block must be two ints"):
        SparseLinear.from_dense(dense, layout=layout, block=16)
    assert SparseLinear.from_dense(dense, sparsity=0.5, reorder=False).block == (4, 1)


def test_messages_of_bad_calls():
    module = sparse_linear()
    message = r"in_features \(got 36 and 37; input has shape \[2, 36\]\)"
    with pytest.raises(ValueError, match=message):
        module(torch.randn(2, 36))
    with pytest.raises(ValueError, match="either layout= or sparsity= .got neither"):
        SparseLinear.from_dense(nn.Linear(4, 4))
    with pytest.raises(TypeError, match="must be an nn.Linear .got Conv2d; tetris.sparsify"):
        SparseLinear.from_dense(nn.Conv2d(4, 4, 3), sparsity=0.5)
    with pytest.raises(TypeError, match="got ReLU"):
        SparseLinear.from_dense(nn.ReLU(), sparsity=0.5)
    with pytest.raises(ValueError, match="layout must be of the layer's size.*29x37 and 38x37"):
        SparseLinear(37, 38, layout=module.layout)
    with pytest.raises(ValueError, match="activation must be one of.*got 'tanh'"):
        SparseLinear(37, 29, layout=module.layout, activation="tanh")
    with pytest.raises(ValueError, match="no activation"):
        sparse_linear(activation="relu").to_dense()


def test_repr_says_what_matters():
    text = repr(sparse_linear(block=(8, 1), activation="silu"))
    for part in ("in_features=37", "block=8x1", "sparsity=", "rows+columns", "activation=silu"):
        assert part in text


def test_a_state_of_other_features_is_refused():
    """4x1 blocks without permutations: nothing else in the state tells the width."""
    narrow, wide = (
        SparseLinear.from_dense(nn.Linear(n, 128), sparsity=0.5, block=(4, 1), reorder=False)
        for n in (64, 128)
    )
    before = {k: v.clone() for k, v in wide.state_dict().items()}
    with pytest.raises(RuntimeError, match=r"got 128 and 128, the state has 128 and 64"):
        wide.load_state_dict(narrow.state_dict())
    assert all(torch.equal(v, before[k]) for k, v in wide.state_dict().items())


def test_a_dense_state_says_what_to_do():
    dense = nn.Linear(8, 8)
    sparse = SparseLinear.from_dense(dense, sparsity=0.5)
    with pytest.raises(RuntimeError, match="the state has a dense weight; load it into the dense"):
        sparse.load_state_dict(dense.state_dict())
