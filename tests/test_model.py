"""sparsify and densify on whole models: what is replaced, what is refused, what is left alone."""

import copy

import pytest
import torch
from torch import nn

import tetris
from tetris import SparseLinear, densify, sparsify

FAST = {"sweeps": 1, "block": (4, 4), "sparsity": 0.5}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Sequential(nn.Linear(32, 32), nn.ReLU()), nn.Linear(32, 10)
    )


def sparse_names(model):
    return [name for name, module in model.named_modules() if isinstance(module, SparseLinear)]


def test_replaces_every_linear_layer_of_a_copy():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    sparse, report = sparsify(model, return_report=True, **FAST)
    assert sparse_names(sparse) == ["0", "2.0", "3"]
    assert sparse_names(model) == []
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [r.name for r in report.layers] == ["0", "2.0", "3"]
    first = report.layers[0]
    assert (first.blocks, first.stored_blocks) == (32, 16)
    assert first.retained >= first.l1_sort_retained - 1e-6
    assert first.unstructured_retained >= first.retained
    mask = sparse[0].layout.mask()
    weight = model[0].weight.detach().abs()
    assert first.retained == pytest.approx(float(weight[mask].sum() / weight.sum()), rel=1e-5)
    assert "2.0" in str(report)
    assert report.to_dict()["layers"][0]["block"] == (4, 4)


def test_dense_again_computes_the_same():
    sparse = sparsify(mlp(), **FAST)
    dense = densify(sparse)
    assert sparse_names(dense) == []
    assert len(sparse_names(sparse)) == 3
    x = torch.randn(5, 16)
    torch.testing.assert_close(dense(x), sparse(x))
    assert densify(sparse, inplace=True) is sparse


@pytest.mark.parametrize(
    ("include", "exclude", "expected"),
    [
        ("2", None, ["2.0"]),
        (None, "2.*", ["0", "3"]),
        (["0", "3"], "3", ["0"]),
        (nn.Sequential, None, ["0", "2.0", "3"]),
        (nn.Linear, ["?"], []),
        ("?.0", None, ["2.0"]),
    ],
)
def test_include_and_exclude(include, exclude, expected):
    if not expected:
        with pytest.raises(ValueError, match="no layer to prune.*0: excluded"):
            sparsify(mlp(), include=include, exclude=exclude, **FAST)
        return
    sparse, report = sparsify(mlp(), include=include, exclude=exclude, return_report=True, **FAST)
    assert sparse_names(sparse) == expected
    assert len(report.skipped) == 3 - len(expected)


def test_nothing_to_prune_says_why():
    known = (
        "nn.Linear, nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d or transformers.pytorch_utils.Conv1D"
    )
    with pytest.raises(ValueError, match=f"in ReLU .it has no {known}"):
        sparsify(nn.ReLU())
    with pytest.raises(ValueError, match="sparse already: tetris.densify"):
        sparsify(sparsify(mlp(), **FAST))


def test_a_module_selects_itself_and_what_is_below():
    model = mlp()
    assert sparse_names(sparsify(model, exclude=model[2], **FAST)) == ["0", "3"]


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"include": "fc*"}, ValueError, r"include entry 'fc\*' matches no module .*0, 2.0, 3"),
        ({"exclude": nn.Conv2d}, ValueError, "matches no module"),
        ({"include": "1"}, ValueError, "no linear layer or convolution .only ReLU"),
        ({"include": 3}, TypeError, "include takes names.*got 3; names are strings: '3'"),
        ({"overrides": {"1": {"sparsity": 0.1}}}, ValueError, "matches no layer that is pruned"),
        ({"overrides": {"0": {"density": 0.1}}}, ValueError, "may set sparsity.*got 'density'"),
        ({"overrides": {"0": {"block": (0, 1)}}}, ValueError, "each from 1 to 128"),
        ({"sparsity": 1.5}, ValueError, "sparsity"),
        ({"scope": "model"}, ValueError, "'layer' or 'global'"),
        ({"importance": "size"}, ValueError, "layer '0': importance must be"),
        ({"importance": {"0": torch.ones(32, 16)}}, ValueError, "layer '2.0': importance has no"),
        ({"importance": {"7": torch.ones(1)}}, ValueError, "not pruned: '7'"),
        ({"importance": lambda name, layer: None}, TypeError, "must give a tensor .got NoneType"),
    ],
    ids=lambda p: next(iter(p)) if isinstance(p, dict) else "",
)  # fmt: skip
def test_bad_arguments_are_explained_and_leave_the_model(arguments, error, message):
    model = mlp()
    with pytest.raises(error, match=message):
        sparsify(model, inplace=True, **{**FAST, **arguments})
    assert sparse_names(model) == []


def test_a_failure_in_the_last_layer_leaves_the_model():
    model = mlp()
    with torch.no_grad():
        model[3].weight[0, 0] = torch.inf
    with pytest.raises(ValueError, match="layer '3': weight must be finite"):
        sparsify(model, inplace=True, **FAST)
    assert sparse_names(model) == []


def test_overrides_and_importance_reach_their_layers():
    calls = []

    def importance(name, layer):
        calls.append(name)
        score = torch.zeros_like(layer.weight)
        score[:, :4] = 1.0
        return score

    sparse = sparsify(
        mlp(),
        sparsity=0.5,
        block=(4, 4),
        reorder=False,
        overrides={
            "*": {"sparsity": 0.75},
            "0": {"block": (8, 1), "importance": importance, "sparsity": 0.75},
            "3": {"sparsity": 0.0},
        },
    )
    assert calls == ["0"]
    assert sparse[0].block == (8, 1)
    assert sparse[0].layout.block_mask()[:, :4].all()
    assert sparse[0].layout.nnz_blocks == 4 * 4
    assert sparse[2][0].layout.sparsity == 0.75
    assert sparse[3].layout.sparsity == 0.0


def test_squared_importance_prefers_a_few_large_weights():
    model = nn.Linear(8, 4, bias=False)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.weight[0, 4:] = torch.tensor([3.0, 0.0, 0.0, 0.0])  # row sum 3, squares 9
        model.weight[0, :4] = 1.0
    magnitude, squared = (
        sparsify(model, sparsity=0.5, block=(1, 4), reorder=False, importance=i)
        for i in ("magnitude", "squared")
    )
    assert magnitude.layout.col_idx[0] == 0
    assert squared.layout.col_idx[0] == 1


def test_global_scope_shares_one_budget_and_keeps_every_block_row():
    model = mlp()
    with torch.no_grad():
        model[0].weight.mul_(10)
        model[2][0].weight.mul_(0.01)
    sparse = sparsify(model, scope="global", **FAST)
    layouts = [sparse[0].layout, sparse[2][0].layout, sparse[3].layout]
    stored = sum(layout.stored_values for layout in layouts)
    total = sum(layout.stored_values / layout.density for layout in layouts)
    assert stored == total // 2
    assert layouts[0].sparsity == 0.0
    assert int(layouts[1].row_ptr.diff().min()) >= 1
    fixed = sparsify(model, scope="global", overrides={"0": {"sparsity": 0.75}}, **FAST)
    assert fixed[0].layout.sparsity == 0.75


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(24, 16)
        self.a, self.b, self.c = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 24)
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.c(self.b(self.a(self.embed(x))))


def test_layers_that_share_a_weight_share_values():
    model = Tied()
    sparse = sparsify(model, **FAST)
    assert sparse.a.values is sparse.b.values
    assert sparse.a.layout == sparse.b.layout
    assert sparse.a.bias is not sparse.b.bias
    dense = densify(sparse)
    assert dense.a.weight is dense.b.weight
    x = torch.arange(5)
    torch.testing.assert_close(dense(x), sparse(x))


def test_a_weight_shared_with_something_dense_is_refused():
    model = Tied()
    with pytest.raises(ValueError, match="'a' shares its weight with 'b.weight', which stays"):
        sparsify(model, exclude="b", **FAST)
    model.c.weight = model.embed.weight
    with pytest.raises(ValueError, match="'c' shares its weight with 'embed.weight'"):
        sparsify(model, **FAST)
    sparse, report = sparsify(model, exclude="c", return_report=True, **FAST)
    assert sparse.c.weight is sparse.embed.weight
    assert report.skipped == {"c": "excluded"}


def test_a_module_used_twice_is_replaced_everywhere_once():
    layer = nn.Linear(16, 16)
    sparse = sparsify(nn.Sequential(layer, nn.ReLU(), layer), **FAST)
    assert isinstance(sparse[0], SparseLinear)
    assert sparse[0] is sparse[2]


@pytest.mark.parametrize("padding", [False, True])
def test_transformer_encoder_works_in_every_mode(padding):
    torch.manual_seed(0)
    model = nn.TransformerEncoder(
        nn.TransformerEncoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2
    ).eval()
    sparse, report = sparsify(model, return_report=True, **FAST)
    assert len(sparse_names(sparse)) == 4
    assert "MultiheadAttention" in report.skipped["layers.0.self_attn.out_proj"]
    x = torch.randn(3, 5, 16)
    mask = torch.arange(5)[None] >= torch.tensor([[5], [3], [4]]) if padding else None
    dense = densify(sparse)
    assert dense.layers[0].activation_relu_or_gelu == 1  # torch's fused layer is back
    with torch.no_grad():
        y, expected = (m(x, src_key_padding_mask=mask) for m in (sparse, dense))
    keep = slice(None) if mask is None else ~mask
    torch.testing.assert_close(y[keep], expected[keep], rtol=1e-4, atol=1e-5)
    trained = sparse.train()(x, src_key_padding_mask=mask)
    torch.testing.assert_close(trained[keep], expected[keep], rtol=1e-4, atol=1e-5)


class Custom(nn.Linear):
    pass


def test_subclasses_and_wrapped_weights_stay_dense_unless_declared():
    model = nn.Sequential(Custom(16, 16), nn.Linear(16, 16), nn.Linear(16, 16))
    nn.utils.parametrizations.weight_norm(model[1])
    sparse, report = sparsify(model, return_report=True, **FAST)
    assert sparse_names(sparse) == ["2"]
    assert "types=" in report.skipped["0"]
    assert "parametrized" in report.skipped["1"]
    assert sparse_names(sparsify(model, types=(nn.Linear, Custom), **FAST)) == ["0", "2"]


def test_hooks_are_not_lost_silently():
    model = mlp()
    handle = model[0].register_forward_hook(lambda *args: None)
    with pytest.raises(ValueError, match="layer '0' has forward_hooks"):
        sparsify(model, **FAST)
    handle.remove()
    sparsify(model, **FAST)


def test_a_forward_of_its_own_is_not_lost_silently():
    model = mlp()
    model[0].forward = lambda x, inner=model[0].forward: 2 * inner(x)
    message = "layer '0' has a forward of its own, which its sparse replacement would not have"
    with pytest.raises(ValueError, match=message):
        sparsify(model, **FAST)
    assert sparse_names(sparsify(model, exclude="0", **FAST)) == ["2.0", "3"]
    pruner = tetris.prune.TetrisPruner(model, **FAST)
    with pytest.raises(ValueError, match=message):
        pruner.finalize()
    pruner.remove()
    with pytest.raises(ValueError, match=message):
        tetris.prune.TetrisPruner(model, execution="sparse", **FAST)
    model[0].forward = type(model[0]).forward.__get__(model[0])  # what some wrappers leave behind
    sparse = sparsify(model, **FAST)
    assert sparse_names(sparse) == ["0", "2.0", "3"]
    sparse[0].forward = lambda x, inner=sparse[0].forward: 2 * inner(x)
    with pytest.raises(ValueError, match="densify: layer '0' has a forward of its own"):
        densify(sparse)


STATE_HOOKS = {
    "state_dict_hooks": lambda layer: layer.register_state_dict_post_hook(lambda *_: None),
    "state_dict_pre_hooks": lambda layer: layer.register_state_dict_pre_hook(lambda *_: None),
    "load_state_dict_pre_hooks": lambda m: m.register_load_state_dict_pre_hook(lambda *_: None),
    "load_state_dict_post_hooks": lambda m: m.register_load_state_dict_post_hook(lambda *_: None),
}


@pytest.mark.parametrize("kind", STATE_HOOKS)
def test_hooks_of_states_are_not_lost_silently(kind):
    model = mlp()
    handle = STATE_HOOKS[kind](model[0])
    message = f"layer '0' has {kind}, which its sparse replacement would not have.*or exclude"
    with pytest.raises(ValueError, match=message):
        sparsify(model, **FAST)
    pruner = tetris.prune.TetrisPruner(model, **FAST)  # masked layers keep them
    with pytest.raises(ValueError, match=message):
        pruner.finalize()
    handle.remove()
    sparse = pruner.finalize()
    STATE_HOOKS[kind](sparse[0])
    message = f"densify: layer '0' has {kind}, which its dense replacement would not have; "
    with pytest.raises(ValueError, match=message) as raised:
        tetris.densify(sparse)
    assert "exclude" not in str(raised.value)


@pytest.mark.parametrize("kind", ["register_hook", "register_post_accumulate_grad_hook"])
def test_hooks_of_parameters_are_not_lost_silently(kind):
    model = mlp()
    handle = getattr(model[0].weight, kind)(lambda _: None)
    sparsify(model, **FAST)  # torch's copy has none either
    message = "layer '0' has parameter.*hooks"
    with pytest.raises(ValueError, match=message):
        sparsify(model, inplace=True, **FAST)
    handle.remove()
    sparse = sparsify(model, inplace=True, **FAST)
    handle = getattr(sparse[0].values, kind)(lambda _: None)
    with pytest.raises(ValueError, match=message):
        tetris.densify(sparse, inplace=True)
    handle.remove()
    pruner = tetris.prune.TetrisPruner(mlp(), **FAST)
    getattr(pruner.model[0].parametrizations.weight.original, kind)(lambda _: None)
    with pytest.raises(ValueError, match=message):
        pruner.finalize(inplace=True)
    pruner.finalize()


def test_what_torchs_weight_norm_leaves_behind_is_no_hook_of_the_user():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    nn.utils.parametrize.remove_parametrizations(model[0], "weight")
    assert model[0]._load_state_dict_pre_hooks
    assert isinstance(sparsify(model, **FAST)[0], SparseLinear)


def test_a_model_that_is_one_layer():
    layer = nn.Linear(16, 16)
    assert isinstance(sparsify(layer, **FAST), SparseLinear)
    with pytest.raises(ValueError, match="use inplace=False"):
        sparsify(layer, inplace=True, **FAST)


def test_mode_dtype_and_requires_grad_are_kept_and_random_numbers_untouched():
    model = mlp().double().eval()
    model[0].weight.requires_grad_(False)
    torch.manual_seed(7)
    expected = torch.rand(1)
    torch.manual_seed(7)
    sparse = sparsify(model, **FAST)
    assert torch.rand(1) == expected
    assert not sparse[0].training
    assert not sparse[0].values.requires_grad
    assert sparse[0].bias.requires_grad
    assert sparse[3].values.dtype == torch.float64


def test_sparse_models_load_into_each_other():
    source = sparsify(mlp(), **FAST)
    target = sparsify(mlp(), sparsity=0.9, block=(8, 1), reorder=False)
    target.load_state_dict(source.state_dict())
    x = torch.randn(3, 16)
    assert torch.equal(target(x), source(x))


def test_info_describes_the_build():
    info = tetris.info()
    assert info.isa_in_use in info.isas_supported
    assert tetris.__version__ in str(info)
    sparsify(mlp(), **FAST)(torch.randn(1, 16))
    assert tetris.info().last_kernel


def test_shortfall_warns_with_asked_and_got():
    model = nn.Linear(100, 200)
    with pytest.warns(UserWarning, match=r"0\.0% sparse instead of 90\.0%.*allow_empty_rows"):
        tetris.sparsify(model, sparsity=0.9, block=(128, 128), reorder=False)
