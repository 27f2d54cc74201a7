"""Models with convolutions: sparsify, densify, and a pruner's life."""

import copy

import pytest
import torch
from torch import nn

from tetris import (
    SparseConv1d,
    SparseConv2d,
    SparseConvTranspose2d,
    SparseLinear,
    densify,
    sparsify,
)
from tetris.prune import BlockPruner, Cubic, LayerOptions, TetrisPruner

FAST = {"sweeps": 1, "block": (4, 4), "sparsity": 0.5}


def cnn():
    """A first layer, an ordinary, a grouped and a depthwise one, an upsampling one, a head."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1, bias=False),
        nn.BatchNorm2d(32),
        nn.Conv2d(32, 64, 1, groups=2),
        nn.Conv2d(64, 64, 3, padding=1, groups=64),
        nn.ConvTranspose2d(64, 16, 4, stride=2, padding=1, groups=2),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(16, 10),
    ).eval()


PRUNED = ["2", "4", "6", "9"]


def images(n=3):
    return torch.randn(n, 3, 8, 8, generator=torch.Generator().manual_seed(1))


def rows_first(layer, weight):
    """A tensor shaped like a layer's weight with its outputs first."""
    if not isinstance(layer, nn.ConvTranspose2d):
        return weight
    return torch.cat([part.transpose(0, 1) for part in weight.chunk(layer.groups)])


def test_sparsify_replaces_convolutions_and_leaves_thin_ones():
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    sparse, report = sparsify(model, return_report=True, **FAST)
    kinds = [type(sparse[int(i)]) for i in PRUNED]
    assert kinds == [SparseConv2d, SparseConv2d, SparseConvTranspose2d, SparseLinear]
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert [r.name for r in report.layers] == PRUNED
    assert list(report.skipped) == ["0", "5"]
    assert report.skipped["0"].startswith("3 input channels (fewer than 16), expected not to win")
    assert report.skipped["5"].startswith("1 input channel per group (fewer")
    for entry in report.layers:
        layer, dense = sparse.get_submodule(entry.name), model.get_submodule(entry.name)
        weight = rows_first(dense, dense.weight.detach()).abs()
        mask = layer.layout.mask()
        assert entry.shape == tuple(weight.shape) == layer.layout.weight_shape
        assert entry.retained == pytest.approx(float(weight[mask].sum() / weight.sum()), rel=1e-5)
        assert entry.retained >= entry.l1_sort_retained - 1e-6
        assert entry.block_sparsity == pytest.approx(0.5, abs=0.02)
    assert report.sparsity == pytest.approx(0.5, abs=0.01)
    assert "16x32x4x4" in str(report)
    assert report.to_dict()["layers"][0]["shape"] == (32, 16, 3, 3)


def test_the_sparse_model_computes_what_its_dense_weights_say():
    model = cnn()
    sparse = sparsify(model, **FAST)
    with torch.no_grad():
        for name in PRUNED:
            layer = model.get_submodule(name)
            mask = sparse.get_submodule(name).layout.mask()
            layer.weight.mul_(
                sparse.get_submodule(name).oriented(mask, getattr(layer, "groups", 1))
            )
    torch.testing.assert_close(sparse(images()), model(images()), rtol=1e-4, atol=1e-5)
    dense = densify(sparse)
    assert [type(m) for m in dense] == [type(m) for m in model]
    assert all(torch.equal(v, model.state_dict()[k]) for k, v in dense.state_dict().items())


def test_nothing_pruned_changes_nothing():
    model = cnn()
    sparse = sparsify(model, **{**FAST, "sparsity": 0.0})
    torch.testing.assert_close(sparse(images()), model(images()), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("include", ["0", ["0", "9"], "object"], ids=str)
def test_thin_layers_are_pruned_when_named(include):
    model = cnn()
    sparse = sparsify(model, include=model[0] if include == "object" else include, **FAST)
    assert isinstance(sparse[0], SparseConv2d)


@pytest.mark.parametrize("include", ["*", nn.Conv2d, nn.Sequential], ids=str)
def test_patterns_and_types_do_not_name_thin_layers(include):
    sparse = sparsify(cnn(), include=include, **FAST)
    assert type(sparse[0]) is type(sparse[5]) is nn.Conv2d
    assert isinstance(sparse[2], SparseConv2d)
    with pytest.raises(ValueError, match="0: 3 input .*; 5: 1 input .* include it by its own name"):
        sparsify(cnn(), include="[05]", **FAST)


def test_a_depthwise_layer_can_be_pruned():
    model = cnn()
    sparse = sparsify(model, include="5", sparsity=2 / 3, block=(1, 1))
    kept = densify(sparse)[5].weight != 0
    assert kept.flatten(1).sum(1).tolist() == [3] * 64
    top = model[5].weight.abs().flatten(1).topk(3).indices.sort().values
    assert torch.equal(kept.flatten(1).nonzero()[:, 1].view(64, 3), top)


def test_types_leave_out_what_they_do_not_list():
    sparse, report = sparsify(cnn(), types=(nn.Conv2d,), return_report=True, **FAST)
    assert [type(m) for m in sparse if "Sparse" in type(m).__name__] == [SparseConv2d] * 2
    assert report.skipped["9"] == "a Linear, which types= leaves out"


def test_other_convolutions_are_listed_as_dense():
    model = nn.Sequential(nn.Conv1d(16, 16, 3), nn.Conv3d(16, 16, 3), nn.ConvTranspose1d(16, 8, 3))
    sparse, report = sparsify(model, return_report=True, **FAST)
    assert isinstance(sparse[0], SparseConv1d)
    assert report.skipped == {
        "1": "there is no sparse Conv3d",
        "2": "there is no sparse ConvTranspose1d",
    }


class Custom(nn.Conv2d):
    pass


def test_subclasses_stay_dense_unless_declared():
    model = nn.Sequential(Custom(16, 16, 3), nn.Conv2d(16, 16, 3))
    sparse, report = sparsify(model, return_report=True, **FAST)
    assert type(sparse[0]) is Custom
    assert report.skipped["0"].endswith("pass types= if it is an ordinary Conv2d")
    assert isinstance(sparsify(model, types=(Custom,), **FAST)[0], SparseConv2d)


def test_tie_kernel_is_a_setting_of_layers():
    model = cnn()
    sparse = sparsify(model, tie_kernel=True, overrides={"6": {"tie_kernel": False}}, **FAST)
    for name, tied in (("2", True), ("6", False)):
        mask = sparse.get_submodule(name).layout.mask().flatten(2)
        assert bool((mask.all(2) == mask.any(2)).all()) == tied


def test_importance_is_shaped_like_each_weight():
    def first_input(name, layer):
        score = torch.zeros_like(layer.weight)
        score[:4] = 1.0  # of a transposed convolution the first inputs, else the first outputs
        return score

    sparse = sparsify(
        cnn(), importance=first_input, include=["2", "6"], allow_empty_rows=True,
        **{**FAST, "sparsity": 0.875, "reorder": False},
    )  # fmt: skip
    assert densify(sparse)[2].weight[:4].all()
    assert not densify(sparse)[2].weight[4:].any()
    kept = densify(sparse)[6].weight != 0  # [in, out / groups, 4, 4], two groups of 32 inputs
    assert kept[:4].all()


def test_global_scope_shares_one_budget():
    model = cnn()
    with torch.no_grad():
        model[2].weight.mul_(10)
        model[6].weight.mul_(0.01)
    for tie_kernel in (False, True):
        sparse = sparsify(model, scope="global", tie_kernel=tie_kernel, **FAST)
        layouts = [sparse.get_submodule(name).layout for name in PRUNED]
        stored = sum(layout.stored_values for layout in layouts)
        total = sum(layout.stored_values / layout.density for layout in layouts)
        unit = 16 * (16 if tie_kernel else 1)  # numbers that live and die together, at most
        assert stored == pytest.approx(total / 2, abs=unit)
        assert layouts[0].sparsity == 0.0
        assert layouts[2].sparsity > 0.5
        assert int(layouts[2].row_ptr.diff().min()) >= 1


class Tied(nn.Module):
    def __init__(self, other):
        super().__init__()
        self.a, self.b = nn.Conv2d(16, 16, 3, padding=1), other
        self.b.weight = self.a.weight

    def forward(self, x):
        return self.b(self.a(x))


def test_convolutions_that_share_a_weight_share_values():
    model = Tied(nn.Conv2d(16, 16, 3, stride=2))
    sparse = sparsify(model, **FAST)
    assert sparse.a.values is sparse.b.values
    dense = densify(sparse)
    assert dense.a.weight is dense.b.weight
    x = torch.randn(2, 16, 6, 6)
    torch.testing.assert_close(dense(x), sparse(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "other", [nn.ConvTranspose2d(16, 16, 3), nn.Conv2d(32, 16, 3, groups=2)], ids=str
)
def test_a_weight_that_two_layers_read_differently_is_refused(other):
    with pytest.raises(ValueError, match="'a' and 'b' share a weight but read it differently"):
        sparsify(Tied(other), **FAST)


def test_a_model_that_is_one_convolution():
    layer = nn.Conv2d(16, 16, 3)
    assert isinstance(sparsify(layer, **FAST), SparseConv2d)
    with pytest.raises(ValueError, match="use inplace=False"):
        sparsify(layer, inplace=True, **FAST)
    with pytest.raises(
        ValueError, match=r"in Conv2d .\(root\): 3 input channels \(fewer than 16\)"
    ):
        sparsify(nn.Conv2d(3, 3, 3))


def test_a_fused_activation_cannot_become_dense():
    sparse = sparsify(cnn(), **FAST)
    sparse[2].activation = "relu"
    with pytest.raises(ValueError, match="layer '2' fuses 'relu', which nn.Conv2d cannot express"):
        densify(sparse)


def test_sparse_models_load_into_each_other():
    source = sparsify(cnn(), **FAST)
    target = sparsify(cnn(), sparsity=0.9, block=(8, 1), reorder=False)
    target.load_state_dict(source.state_dict())
    assert torch.equal(target(images()), source(images()))


def train(model, pruner, optimizer, steps):
    model.train()
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(4, 3, 8, 8, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize("settings", [{}, {"tie_kernel": True}, {"scope": "global"}], ids=str)
def test_a_pruner_s_life(settings):
    model = cnn()
    pruner = TetrisPruner(
        model, **{**FAST, "sparsity": 0.8}, schedule=Cubic(0, 6, every=2), **settings
    )
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9, weight_decay=0.01)
    assert list(pruner.layouts()) == PRUNED
    assert pruner.sparsity == 0.0
    kept = {name: layout.mask() for name, layout in pruner.layouts().items()}
    for _ in range(4):
        train(model, pruner, optimizer, 2)
        for name, layout in pruner.layouts().items():
            now = layout.mask()
            if settings != {"scope": "global"}:  # there a layer may win blocks back
                assert not (now & ~kept[name]).any()
            kept[name] = now
            layer = model.get_submodule(name)
            weight = layer.parametrizations.weight
            assert torch.equal(rows_first(layer, weight[0].element_mask()), now)
            assert not rows_first(layer, weight.original)[~now].any()
            if settings.get("tie_kernel") and now.dim() == 4:
                assert torch.equal(now.flatten(2).all(2), now.flatten(2).any(2))
    # One block a row stays: of tied 4x4 blocks with four or eight in a row that is a good part.
    assert pruner.sparsity == pytest.approx(0.8, abs=0.04)
    report = pruner.report()
    assert [layer.name for layer in report.layers] == PRUNED
    assert list(report.skipped) == ["0", "5"]
    sparse = pruner.finalize().eval()
    assert isinstance(sparse[6], SparseConvTranspose2d)
    for name, mask in kept.items():
        assert torch.equal(sparse.get_submodule(name).layout.mask(), mask)
    y = model.eval()(images())
    torch.testing.assert_close(sparse(images()), y, rtol=1e-4, atol=1e-5)
    assert pruner.remove() is model
    assert type(model[6]) is nn.ConvTranspose2d
    torch.testing.assert_close(model(images()), y)


def test_resuming_from_state_dicts_equals_not_stopping():
    def make(model):
        pruner = TetrisPruner(model, schedule=Cubic(0, 6), **FAST)
        return pruner, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    model = cnn()
    pruner, optimizer = make(model)
    train(model, pruner, optimizer, 3)
    saved = copy.deepcopy((model.state_dict(), pruner.state_dict(), optimizer.state_dict()))
    train(model, pruner, optimizer, 4)

    again = cnn()
    with torch.no_grad():
        again[6].weight.mul_(torch.rand(64, 1, 1, 1) + 0.1)  # so other permutations
    pruner2, optimizer2 = make(again)
    for target, state in zip((again, pruner2, optimizer2), saved, strict=True):
        target.load_state_dict(state)
    train(again, pruner2, optimizer2, 4)
    assert pruner2.layouts() == pruner.layouts()
    torch.testing.assert_close(again.eval()(images()), model.eval()(images()))


def test_a_method_is_one_function_and_sees_weights_as_they_are():
    shapes = {}

    class FirstAxis(BlockPruner):
        def saliency(self, name, layer):
            shapes[name] = tuple(layer.weight.shape)
            score = torch.zeros(layer.weight.shape)
            score[:4] = 1.0
            return score

    model = cnn()
    options = LayerOptions(sparsity=0.875, block=(4, 4), reorder=False, allow_empty_rows=True)
    FirstAxis(model, options, include=["2", "6"])
    assert shapes == {"2": (32, 16, 3, 3), "6": (64, 8, 4, 4)}
    assert model[2].weight[:4].all()
    assert not model[2].weight[4:].any()
    assert model[6].weight[:4].all()


def test_masked_models_compile():
    model = cnn()
    pruner = TetrisPruner(model, **FAST)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()))
    pruner.remove()
