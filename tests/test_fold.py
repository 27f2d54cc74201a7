"""Folding: no permutation is left at run time, and the results are the same."""

import copy
import json
import warnings

import pytest
import torch
from torch import nn

import tetris
from fold_cases import Lambda, Residual, make
from tetris.prune import Cubic, Part, SharedOrder, TetrisPruner

BLOCKS = {"sparsity": 0.5, "block": (4, 4), "sweeps": 2}
ALL = {"include": [nn.Linear, nn.Conv2d, nn.ConvTranspose2d]}


def permutations(model):
    """Rows and columns that are permuted at run time, by layer."""
    return {
        (name, side)
        for name, module in model.named_modules()
        if isinstance(module, tetris.nn.base.SparseLayer)
        for side in ("row_perm", "col_perm")
        if getattr(module, side) is not None
    }


def named(model, *types):
    """Every convolution by its own name, which includes even those that have few channels."""
    return [n for n, m in model.named_modules() if isinstance(m, types or (nn.Linear, nn.Conv2d))]


def pruned(model, x, share=True, **settings):
    share = tetris.shared_orders(model, x) if share else ()
    settings = {**BLOCKS, "include": named(model), **settings}
    return tetris.sparsify(model, share=share, **settings)


def same(a, b, x):
    torch.testing.assert_close(a(x), b(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "name", ["mlp", "residual", "attention", "grouped heads", "fused", "mixer", "rotary", "flat"]
)
def test_nothing_is_left_of_layers_that_were_searched_together(name):
    model, x = make(name)
    sparse = pruned(model, x)
    folded, report = tetris.fold(sparse, x, return_report=True)
    assert report.before == len(permutations(sparse)) > 0
    assert report.after == 0
    assert not permutations(folded)
    assert not report.kept
    same(folded, sparse, x)
    assert not torch.allclose(folded(x), model(x), atol=1e-3)
    for layer, module in folded.named_modules():  # stored blocks are the same, elsewhere
        if isinstance(module, tetris.nn.base.SparseLayer):
            before = sparse.get_submodule(layer).values.flatten().sort().values
            assert torch.equal(module.values.flatten().sort().values, before)


@pytest.mark.parametrize("name", ["mlp", "residual", "attention", "twice"])
@pytest.mark.parametrize("block", [(4, 4), (4, 1), (1, 1)])
def test_layers_that_were_searched_alone_keep_what_does_not_agree(name, block):
    model, x = make(name)
    sparse = pruned(model, x, share=False, block=block)
    folded, report = tetris.fold(sparse, x, return_report=True)
    left = permutations(folded)
    sides = {"row_perm": "rows", "col_perm": "columns"}
    assert set(report.kept) == {(layer, sides[side]) for layer, side in left}
    assert (report.before, report.after) == (len(permutations(sparse)), len(left))
    assert report.after < report.before or report.before == 0
    same(folded, sparse, x)
    if block[1] == 1:  # columns one wide move without a gather
        assert all(side == "row_perm" for _, side in left)
    else:
        assert any("search them together" in why for why in report.kept.values())
    if block == (4, 1) and name == "mlp":
        assert report.kept == {("6", "rows"): "it is an output of the model"}


def test_columns_one_wide_follow_whatever_order():
    model, x = make("mlp")
    sparse = pruned(model, x, share=False, block=(4, 1))
    layout = sparse[4].layout
    perm = torch.randperm(layout.in_features, generator=torch.Generator().manual_seed(1))
    other = tetris.BlockLayout.from_mask(
        layout.mask(), layout.block, row_perm=layout.row_perm, col_perm=perm.int()
    )
    sparse[4] = tetris.SparseLinear.from_dense(sparse[4].to_dense(), layout=other)
    folded = tetris.fold(sparse, x)
    assert folded[4].col_perm is None
    same(folded, sparse, x)


def test_one_call_prunes_and_folds():
    model, x = make("residual")
    folded, report = tetris.fold(
        model, x, return_report=True, include=named(model), exclude="head", **BLOCKS
    )
    assert isinstance(folded, Residual)
    assert isinstance(folded.head, nn.Linear)
    assert not permutations(folded)
    assert report.pruning.layers[0].name == "stem"
    assert report.difference <= 1e-5
    sparse = pruned(model, x, exclude="head")
    same(folded, sparse, x)
    assert not any(isinstance(m, tetris.nn.base.SparseLayer) for m in model.modules())


def test_a_latency_is_measured_on_the_example():
    # Layers that gain much more than is asked for: it must be in reach beside other processes too.
    model = nn.Sequential(nn.Linear(1024, 1024), nn.ReLU(), nn.Linear(1024, 1024))
    x = torch.randn(128, 1024)
    folded, report = tetris.fold(model, x, latency=0.7, return_report=True, sweeps=1)
    assert report.pruning.latency.measured_ms < report.pruning.latency.dense_ms
    assert report.difference <= 1e-5


def test_in_place_and_modes():
    model, x = make("residual")
    sparse = pruned(model, x)
    expected = sparse(x)
    parameters = [id(p) for p in sparse.parameters()]
    sparse.train()
    sparse.norm.eval()
    assert tetris.fold(sparse, x, inplace=True) is sparse
    assert sparse.training
    assert not sparse.norm.training
    assert [id(p) for p in sparse.parameters()] == parameters
    assert not permutations(sparse)
    torch.testing.assert_close(sparse.eval()(x), expected, rtol=1e-5, atol=1e-5)
    dense, x = make("mlp")
    assert tetris.fold(dense, x, inplace=True, **BLOCKS) is dense
    assert isinstance(dense[4], tetris.SparseLinear)


def test_a_copy_leaves_the_model_alone():
    model, x = make("residual")
    sparse = pruned(model, x)
    before = copy.deepcopy(sparse.state_dict())
    folded = tetris.fold(sparse, x)
    after = sparse.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert folded.stem is not sparse.stem


def test_a_folded_model_is_a_model_like_others(tmp_path):
    """Saved, loaded, trained, fused, made dense, folded again."""
    model, x = make("residual")
    sparse = pruned(model, x)
    folded = tetris.fold(sparse, x)
    tetris.save(folded, tmp_path / "model.safetensors")
    loaded = tetris.load(tmp_path / "model.safetensors", copy.deepcopy(model))
    assert torch.equal(loaded.eval()(x), folded(x))
    same(tetris.fuse(folded), sparse, x)
    fused, report = tetris.fold(tetris.fuse(sparse), x, return_report=True)  # with residuals
    assert report.before > report.after == 0
    same(fused, sparse, x)
    same(tetris.densify(folded), sparse, x)
    again, report = tetris.fold(folded, x, return_report=True)
    assert (report.before, report.after, report.orders) == (0, 0, ())
    assert torch.equal(again(x), folded(x))
    for each in (folded.train(), sparse.train()):
        each(x).square().mean().backward()
    same(folded.eval(), sparse.eval(), x)
    grad, before = folded.head.values.grad, sparse.head.values.grad
    assert grad.norm() == pytest.approx(before.norm().item(), rel=1e-4)


def test_pruners_take_the_orders_of_a_model():
    model, x = make("residual")
    pruner = TetrisPruner(
        model,
        include=named(model),
        exclude=("depthwise", "head"),
        share=tetris.shared_orders(model, x),
        schedule=Cubic(0, 2),
        **BLOCKS,
    )
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    for _ in range(3):
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step()
    sparse = pruner.finalize().eval()
    folded, report = tetris.fold(sparse, x, return_report=True)
    assert report.before > report.after == 0
    same(folded, sparse, x)


def test_sparse_depthwise_convolutions_move_by_group():
    model, x = make("residual")
    sparse = pruned(model, x, overrides={"depthwise": {"block": (1, 1), "sparsity": 0.3}})
    assert sparse.depthwise.layout.sparsity > 0.2
    folded, report = tetris.fold(sparse, x, return_report=True)
    assert report.after == 0
    assert not torch.equal(folded.depthwise.row_ptr, sparse.depthwise.row_ptr)
    same(folded, sparse, x)


def test_tied_sparse_layers():
    """Two layers with one weight and one bias, as sparsify makes them."""
    model = nn.Sequential(
        nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16)
    )
    model[4].weight, model[4].bias = model[2].weight, model[2].bias
    model.append(nn.ReLU()).append(nn.Linear(16, 3))
    x = torch.randn(4, 6)
    sparse = pruned(model.eval(), x)
    assert sparse[2].values is sparse[4].values
    folded, report = tetris.fold(sparse, x, return_report=True)
    assert report.after == 0
    assert folded[2].values is folded[4].values
    same(folded, sparse, x)


def test_transposed_convolutions_and_channels_last():
    model, x = make("transposed")
    sparse = pruned(model, x, include=[*named(model), "up"])
    folded, report = tetris.fold(sparse, x, return_report=True)
    assert report.before > report.after == 0
    same(folded, sparse, x.contiguous(memory_format=torch.channels_last))


def test_the_order_of_most_layers_wins():
    """Two of three members of a stream agree: the third keeps its own."""
    model, x = make("residual")
    stream = SharedOrder(rows=("stem", "a2"), cols=("a1",))
    sparse = tetris.sparsify(model, share=stream, include=["stem", "a2", "a1", "b1"], **BLOCKS)
    assert not torch.equal(sparse.b1.col_perm, sparse.a1.col_perm)
    folded, report = tetris.fold(sparse, x, return_report=True)
    assert {("stem", "row_perm"), ("a1", "col_perm")}.isdisjoint(permutations(folded))
    assert "search them together" in report.kept["b1", "columns"]
    same(folded, sparse, x)


def test_orders_within_heads_survive_only_there():
    model, x = make("attention")
    share = [SharedOrder(Part("v", range(i, i + 8)), Part("o", range(i, i + 8))) for i in (0, 16)]
    sparse = tetris.sparsify(model, share=share, include=["v", "o"], **BLOCKS)
    folded, report = tetris.fold(sparse, x, return_report=True)
    assert {("v", "row_perm"), ("o", "col_perm")}.isdisjoint(permutations(folded))
    alone = tetris.sparsify(model, include=["v", "o"], **BLOCKS)
    folded, report = tetris.fold(alone, x, return_report=True)
    assert "between heads" in report.kept["v", "rows"]
    same(folded, alone, x)


# -- what cannot be traced -------------------------------------------------------------------------


def test_what_an_unknown_operation_reads_keeps_its_gather():
    model, x = make("recurrent")
    folded, report = tetris.fold(model, x, return_report=True, **BLOCKS)
    assert permutations(folded) == {("b", "row_perm"), ("c", "col_perm")}
    assert report.kept["b", "rows"] == "lstm (in rnn) may mix channels"
    assert report.kept["c", "columns"].startswith("it reads lstm")
    assert "left: rows of b: lstm (in rnn) may mix channels" in str(report)
    same(folded, tetris.sparsify(model, share=tetris.shared_orders(model, x), **BLOCKS), x)


class Branches(nn.Module):
    """Which block runs depends on the numbers."""

    def __init__(self):
        super().__init__()
        self.a = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8))
        self.b = nn.Linear(8, 8)

    def forward(self, x):
        return self.a(x) if x.sum() > 0 else self.b(x)


def test_modules_that_can_be_traced_are_folded():
    torch.manual_seed(0)
    model, x = Branches(), torch.rand(4, 8)
    folded, report = tetris.fold(model, x, return_report=True, **BLOCKS)
    left = permutations(folded)
    assert ("a.0", "row_perm") not in left
    assert ("a.2", "col_perm") not in left
    assert {("a.0", "col_perm"), ("a.2", "row_perm"), ("b", "col_perm")} <= left
    assert "Branches cannot be traced" in report.untraced
    assert "surroundings of 'a'" in report.kept["a.0", "columns"]
    assert "Branches cannot be traced" in report.kept["b", "columns"]
    assert "only parts of the model were folded: Branches cannot be traced" in str(report)
    sparse = tetris.sparsify(model, share=tetris.shared_orders(model, x), **BLOCKS)
    for each in (x, -x):
        same(folded, sparse, each)


class Peeking(Branches):
    """Reads a parameter of a block behind its back."""

    def forward(self, x):
        weights = torch.arange(16.0)
        return (self.a(x) if x.sum() > 0 else x) + (self.a[0].bias * weights).sum()


def test_an_order_that_changes_the_result_is_left_out_and_named():
    torch.manual_seed(0)
    model, x = Peeking(), torch.rand(4, 8)
    orders = tetris.shared_orders(model, x)
    assert all(order.fixed for order in orders)
    assert "computes something else" in orders.held["a.0", "rows"]
    sparse = tetris.sparsify(model, share=SharedOrder("a.0", "a.2"), include="a", **BLOCKS)
    folded, report = tetris.fold(sparse, x, return_report=True)
    assert folded.a[0].row_perm is not None
    assert "results differ by" in report.kept["a.0", "rows"]
    same(folded, sparse, x)


# -- reports and wrong usage -----------------------------------------------------------------------


def test_reports_are_printed_and_become_json():
    model, x = make("mlp")
    sparse = pruned(model, x, share=False)
    _, report = tetris.fold(sparse, x, return_report=True)
    lines = str(report).splitlines()
    assert lines[0] == f"permutations at run time: {report.before} before, {report.after} after"
    assert lines[1] == "reordered: 56 channels in 2 orders, in 9 parameters and buffers"
    assert "left: columns of 0: it reads an input of the model" in lines
    data = json.loads(json.dumps(report.to_dict()))
    assert data["kept"]["rows of 6"] == "it is an output of the model"
    assert str(report.orders[0]).startswith("32 channels: 0.values, 0.bias, 1.weight")


def test_wrong_usage():
    model, x = make("mlp")
    with pytest.raises(ValueError, match="has no sparse layers; prune it first, with share=tetris"):
        tetris.fold(model, x)
    with pytest.raises(TypeError, match="model must be an nn.Module .got an OrderedDict"):
        tetris.fold(model.state_dict(), x)
    with pytest.raises(TypeError, match="tetris.fold: example_inputs must be .*got 3"):
        tetris.fold(model, 3, sparsity=0.5)
    with pytest.raises(TypeError, match="unexpected argument 'sparsty' .did you mean 'sparsity'"):
        tetris.fold(model, x, sparsty=0.5)
    with pytest.raises(TypeError, match="unexpected argument 'share'"):
        tetris.fold(model, x, share=())
    sparse = tetris.sparsify(model, **BLOCKS)
    with pytest.raises(ValueError, match="tetris.fold: Sequential cannot be called with example"):
        tetris.fold(sparse, torch.randn(4, 11))
    with pytest.raises(ValueError, match="tetris.sparsify: no layer to prune"):
        tetris.fold(sparse, x, **BLOCKS)


def test_a_model_that_draws_numbers_is_refused():
    noise = nn.Sequential(nn.Linear(8, 8), Lambda(torch.nn.functional.relu), nn.Linear(8, 8))
    sparse = tetris.sparsify(noise, share=SharedOrder("0", "2"), **BLOCKS)
    sparse[1].function = lambda x: x * torch.rand_like(x)
    with pytest.raises(RuntimeError, match="does not return the same twice"):
        tetris.fold(sparse, torch.randn(3, 8))


def test_no_warnings_from_the_way_there():
    model, x = make("mlp")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tetris.fold(pruned(model, x), x)


def test_progress_is_shown_on_standard_error(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    model, x = make("residual")
    orders = tetris.shared_orders(model, x, progress=True)
    shown = capsys.readouterr()
    assert "comparing in other orders" in shown.err
    assert not shown.out
    sparse = tetris.sparsify(model, share=orders, include=named(model), **BLOCKS)
    for show in (True, False):
        _, report = tetris.fold(sparse, x, progress=show, return_report=True)
        assert report.pruning is None  # it was asked for a bar, not for blocks
        assert report.after < report.before
        shown = capsys.readouterr()
        assert ("comparing" in shown.err) == show
        assert not shown.out
    tetris.fold(model, x, progress=True, include=named(model), **BLOCKS)
    shown = capsys.readouterr().err
    assert shown.index("in other orders") < shown.index("reordering")
