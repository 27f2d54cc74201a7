"""Pruners that train on stored blocks: the masked trajectory, without the dense step."""

import copy

import pytest
import torch
from torch import nn

import tetris
from tetris import BlockLayout, SparseLinear
from tetris.nn.base import SparseLayer
from tetris.prune import BlockPruner, Cubic, LayerOptions, Regrow, TetrisPruner, VRPGEPruner
from tetris.prune.regrow import block_gradients, random_absent, steepest_absent
from tetris.prune.select import Units, keep_heaviest
from tetris.reorder import block_mask

FAST = {"sweeps": 1, "block": (4, 3), "exclude": "4"}
OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, 0.05, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, 0.01),
}


def mlp(dtype=torch.float64):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 30), nn.ReLU(), nn.Linear(30, 10)
    ).to(dtype)


def train(model, pruner, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = model[4].weight.dtype
    losses = []
    for _ in range(steps):
        x = torch.randn(8, 16, generator=generator, dtype=dtype)
        loss = model(x).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        losses.append(loss.item())
    return losses


def sparse_pruner(model, optimizer, **arguments):
    return TetrisPruner(model, execution="sparse", optimizers=optimizer, **{**FAST, **arguments})


def test_saliencies_meet_layouts_on_the_cpu(monkeypatch):
    """Where saliencies are, while a GPU's layers have their layouts there."""
    moved = []
    to, unpack, pack = BlockLayout.to, BlockLayout.unpack, BlockLayout.pack

    def move(self, device):
        moved.append((self, torch.device(device).type))
        return to(self, device)

    def check(function):
        def checked(self, tensor):
            assert any(layout is self and device == "cpu" for layout, device in moved)
            return function(self, tensor)

        return checked

    model = mlp(torch.float32)
    importance = {n: torch.rand_like(model.get_submodule(n).weight) for n in ("0", "2")}
    optimizer = OPTIMIZERS["sgd"](model.parameters())
    pruner = sparse_pruner(model, optimizer, sparsity=0.5, importance=importance)
    train(model, pruner, optimizer, 1)
    with monkeypatch.context() as patch:
        patch.setattr(BlockLayout, "to", move)
        patch.setattr(BlockLayout, "unpack", check(unpack))
        patch.setattr(BlockLayout, "pack", check(pack))
        found = pruner._saliencies()
    for name, layout in pruner.layouts().items():
        torch.testing.assert_close(found[name], importance[name] * layout.mask())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    "arguments",
    [
        {"sparsity": 0.75},
        {"sparsity": 0.9, "schedule": Cubic(1, 9, every=2)},
        {"sparsity": 0.8, "schedule": Cubic(0, 8, every=2, initial=0.3), "scope": "global"},
        {"sparsity": 0.8, "schedule": Cubic(0, 8, every=2), "balanced": True},
        {"sparsity": 0.8, "schedule": Cubic(0, 8), "importance": "squared"},
        {"sparsity": 0.95, "schedule": Cubic(0, 8), "allow_empty_rows": True},
    ],
    ids=["one-shot", "cubic", "global", "balanced", "squared", "empty-rows"],
)
def test_trajectories_are_those_of_masks(arguments, optimizer, dtype):
    """Trained before pruning, so that momentum exists when the layers change."""
    results = []
    for execution in ("masked", "sparse"):
        model = mlp(dtype)
        made = OPTIMIZERS[optimizer](model.parameters())
        for _ in range(2):
            made.zero_grad()
            model(torch.ones(3, 16, dtype=dtype)).square().mean().backward()
            made.step()
        pruner = TetrisPruner(model, execution=execution, optimizers=made, **{**FAST, **arguments})
        losses = train(model, pruner, made, 12)
        results.append((losses, pruner.layouts(), pruner.remove()))
    (masked, layouts, dense), (stored, same, again) = results
    assert layouts == same
    tight = dtype == torch.float64
    close = {"rtol": 1e-11, "atol": 1e-13} if tight else {"rtol": 2e-4, "atol": 2e-5}
    torch.testing.assert_close(torch.tensor(stored), torch.tensor(masked), rtol=1e-5, atol=0)
    for a, b in zip(again.parameters(), dense.parameters(), strict=True):
        torch.testing.assert_close(a, b, **close)


def images(kind, groups=1):
    """A layer of each kind between convolutions that stay dense."""
    torch.manual_seed(0)
    settings = {"padding": 1, "groups": groups}
    if kind is nn.Conv1d:
        return nn.Sequential(
            nn.Conv1d(3, 14, 3), nn.ReLU(), nn.Conv1d(14, 18, 3, **settings), nn.Conv1d(18, 2, 1)
        ).double()
    return nn.Sequential(
        nn.Conv2d(3, 14, 3), nn.ReLU(), kind(14, 18, 3, stride=2, **settings), nn.Conv2d(18, 2, 1)
    ).double()


def train_images(model, pruner, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    size = (2, 3, 9) if isinstance(model[0], nn.Conv1d) else (2, 3, 9, 8)
    for _ in range(steps):
        optimizer.zero_grad()
        x = torch.randn(size, generator=generator, dtype=torch.float64)
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step()


CONVOLUTIONS = pytest.mark.parametrize("kind", [nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d])


@CONVOLUTIONS
@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"tie_kernel": True},
        {"scope": "global"},
        {"balanced": True},
        {"tie_kernel": True, "scope": "global"},
    ],
    ids=str,
)
def test_trajectories_of_convolutions_are_those_of_masks(kind, groups, arguments):
    results = []
    for execution in ("masked", "sparse"):
        model = images(kind, groups)
        layer = model[2]
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        pruner = TetrisPruner(
            model, sparsity=0.7, schedule=Cubic(1, 7, every=2), execution=execution, sweeps=1,
            block=(4, 3), include="2", optimizers=optimizer, **arguments,
        )  # fmt: skip
        train_images(model, pruner, optimizer, 10)
        assert isinstance(model[2], SparseLayer) == (execution == "sparse")
        results.append((pruner.layouts(), pruner.remove()))
        assert model[2] is layer
    assert results[0][0] == results[1][0]
    for a, b in zip(results[0][1].parameters(), results[1][1].parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@CONVOLUTIONS
@pytest.mark.parametrize("tie_kernel", [False, True])
@pytest.mark.parametrize("by", ["random", "gradient"])
def test_convolutions_regrow_group_by_group(kind, tie_kernel, by):
    model = images(kind, groups=2)
    optimizer = torch.optim.SGD(model.parameters(), 0.01, momentum=0.9)
    pruner = TetrisPruner(
        model, sparsity=0.6, execution="sparse", sweeps=1, block=(4, 3), include="2",
        optimizers=optimizer, regrow=Regrow(0.5, every=1, by=by), tie_kernel=tie_kernel,
    )  # fmt: skip
    before = pruner.layouts()["2"]
    counts = before.row_ptr.diff().view(2, -1).sum(1)
    for _ in range(4):
        train_images(model, pruner, optimizer, 1)
        after = pruner.layouts()["2"]
        assert after != before
        assert torch.equal(after.row_ptr.diff().view(2, -1).sum(1), counts)
        assert (after.row_ptr.diff() >= 1).all()
        if tie_kernel:
            mask = after.block_mask().unflatten(1, (after.blocking.positions, -1))
            assert torch.equal(mask.any(1), mask.all(1))
        before = after


@CONVOLUTIONS
@pytest.mark.parametrize("groups", [1, 2])
def test_gradients_of_blocks_of_convolutions_are_those_of_the_dense_weight(kind, groups):
    dense = images(kind, groups)[2]
    layer = tetris.sparsify(
        nn.Sequential(dense), sparsity=0.7, block=(4, 3), sweeps=1, include="0"
    )[0]
    x = torch.randn((2, 14, 9) if kind is nn.Conv1d else (2, 14, 9, 8), dtype=torch.float64)
    y = dense(x)
    grad = torch.randn_like(y)
    y.backward(grad)
    layout = layer.layout
    weight = layer.oriented(dense.weight.grad, groups)
    torch.testing.assert_close(layer.gradient_of(layout, x, grad), layout.pack(weight))
    sums = layout.blocking.sums(weight.abs(), layout.row_perm, layout.col_perm)
    torch.testing.assert_close(block_gradients(layer, [(x, grad)]), sums)


def test_layers_are_dense_until_a_block_goes_and_sparse_from_then_on():
    model = mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 0.01)
    dense = model[0]
    pruner = sparse_pruner(model, optimizer, sparsity=0.8, schedule=Cubic(2, 6))
    assert model[0] is dense
    assert pruner.sparsity == 0.0
    train(model, pruner, optimizer, 2)
    assert model[0] is dense
    train(model, pruner, optimizer, 1)
    assert isinstance(model[0], SparseLinear)
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    stored = model[0].values.numel()
    assert optimizer.state[model[0].values]["exp_avg"].numel() == stored
    train(model, pruner, optimizer, 5)
    assert model[0].values.numel() < stored
    assert pruner.sparsity == pytest.approx(0.8, abs=0.02)
    report = pruner.report()
    assert [layer.name for layer in report.layers] == ["0", "2"]
    x = torch.randn(3, 16, dtype=torch.float64)
    y = model(x)
    finalized = pruner.finalize()
    assert finalized is not model
    assert torch.equal(finalized(x), y)
    assert pruner.finalize(inplace=True) is model
    with pytest.raises(RuntimeError, match="the pruner has ended"):
        pruner.step()


def test_remove_brings_the_dense_layers_back():
    model = mlp()
    layers = list(model)
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, 0.05, momentum=0.9)
    pruner = sparse_pruner(model, optimizer, sparsity=0.75)
    train(model, pruner, optimizer, 3)
    mask, momentum = pruner.layouts()["0"].mask(), optimizer.state[parameters[0]]
    x = torch.randn(3, 16, dtype=torch.float64)
    y = model(x)
    assert pruner.remove() is model
    assert list(model) == layers
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    assert torch.equal(model[0].weight != 0, mask)
    assert momentum["momentum_buffer"].any()
    assert not momentum["momentum_buffer"][~mask].any()
    torch.testing.assert_close(model(x), y)
    model(x).sum().backward()


def test_remove_refuses_states_that_cannot_follow_before_it_changes_a_layer():
    model = mlp()
    sgd = torch.optim.SGD(model[0].parameters(), 0.05, momentum=0.9)
    pruner = sparse_pruner(model, sgd, sparsity=0.75)
    factored = torch.optim.Adafactor(model[2].parameters())
    pruner.attach(factored)
    model(torch.ones(3, 16, dtype=torch.float64)).sum().backward()
    sgd.step()
    factored.step()
    layers = list(model)
    with pytest.raises(ValueError, match=r"TetrisPruner.remove: layer '2': Adafactor keeps"):
        pruner.remove()
    assert list(model) == layers
    assert sgd.state[model[0].values]["momentum_buffer"].shape == model[0].values.shape
    factored.state.clear()
    assert pruner.remove() is model
    assert isinstance(model[2], nn.Linear)


class Muon(torch.optim.SGD):
    """Stands for torch's, which older ones do not have."""


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_step_sizes_of_weights_that_come_back_would_be_zero(execution):
    arguments = {"sparsity": 0.75, "execution": execution, **FAST}
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="Pruner.*: Rprop keeps a step size.*use SGD or Adam"):
        TetrisPruner(model, optimizers=torch.optim.Rprop(model.parameters()), **arguments)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(p, before[n]) for n, p in model.state_dict().items())
    elsewhere = torch.optim.Rprop(model[4].parameters())  # of a layer that is not pruned
    TetrisPruner(model, optimizers=elsewhere, **arguments)
    model = mlp()
    with pytest.raises(ValueError, match="Rprop keeps a step size"):
        VRPGEPruner(model, optimizers=torch.optim.Rprop(model.parameters()), **arguments)


def test_an_optimizer_of_matrices_takes_no_stored_blocks():
    model = mlp()
    weights = [layer.weight for layer in model if isinstance(layer, nn.Linear)]
    optimizer = Muon(weights, 0.01)
    with pytest.raises(ValueError, match=r"'0': Muon needs matrices.*\(execution='masked'\)"):
        sparse_pruner(model, optimizer, sparsity=0.75)
    assert all(type(layer) in (nn.Linear, nn.ReLU) for layer in model)
    TetrisPruner(model, sparsity=0.75, optimizers=optimizer, **FAST)


def test_remove_keeps_hooks_of_layers_that_are_dense_still():
    model = mlp()
    pruner = sparse_pruner(model, (), sparsity=0.8, schedule=Cubic(2, 6))
    model[0].register_forward_hook(lambda *a: None)
    assert pruner.remove() is model
    assert len(model[0]._forward_hooks) == 1


def test_hooks_of_sparse_layers_are_not_lost_without_a_word():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = sparse_pruner(model, optimizer, schedule=Cubic(1, 4), regrow=Regrow(0.3, every=1))
    dense = copy.deepcopy(pruner.state_dict())
    train(model, pruner, optimizer, 3)
    layers = list(model)
    assert len(model[2]._forward_hooks) == 1  # of regrowth, which does not count
    handle = model[2].register_forward_hook(lambda *a: None)
    lost = "layer '2' has forward_hooks, which the dense layer that comes back would not have"
    with pytest.raises(ValueError, match=f"TetrisPruner.remove: {lost}"):
        pruner.remove()
    with pytest.raises(ValueError, match=lost):
        pruner.load_state_dict(dense)
    assert list(model) == layers
    assert len(model[2]._forward_hooks) == 2
    handle.remove()
    pruner.load_state_dict(dense)
    assert isinstance(model[2], nn.Linear)
    train(model, pruner, optimizer, 3)
    assert isinstance(model[2], SparseLinear)
    assert pruner.remove() is model
    assert isinstance(model[2], nn.Linear)


def test_optimizers_can_be_attached_later_and_are_missed():
    model = mlp()
    pruner = sparse_pruner(model, (), sparsity=0.8, schedule=Cubic(0, 4))
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    with pytest.raises(RuntimeError, match=r"holds the weight of layer '0'.*pruner.attach"):
        train(model, pruner, optimizer, 1)
    assert pruner.sparsity == 0.0
    assert pruner.steps == 0
    pruner.attach(optimizer)
    train(model, pruner, optimizer, 5)
    assert pruner.sparsity == pytest.approx(0.8, abs=0.02)
    with pytest.raises(TypeError, match="TetrisPruner.attach: optimizers must be"):
        pruner.attach(model.parameters())


@pytest.mark.parametrize("by", ["random", "gradient"])
@pytest.mark.parametrize("arguments", [{}, {"scope": "global"}, {"schedule": Cubic(0, 6, every=2)}])
def test_regrowth_keeps_the_number_of_blocks_and_the_floor(by, arguments):
    model = mlp()
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    regrow = Regrow(share=0.4, every=3, end=13, by=by)
    pruner = sparse_pruner(model, optimizer, sparsity=0.8, regrow=regrow, **arguments)
    train(model, pruner, optimizer, 7)
    exchanged = 0
    for _ in range(8):
        before = pruner.layouts()
        train(model, pruner, optimizer, 1)
        after = pruner.layouts()
        total = [sum(v.nnz_blocks for v in x.values()) for x in (before, after)]
        assert total[0] == total[1]
        for name in before:
            assert (after[name].row_ptr.diff() >= 1).all()
            new = after[name].block_mask() & ~before[name].block_mask()
            assert not pruner.model.get_submodule(name).values.isnan().any()
            if pruner.steps in (9, 12):
                exchanged += int(new.sum())
            else:
                assert not new.any()
    assert exchanged > 0


@pytest.mark.parametrize("by", ["random", "gradient"])
def test_a_frozen_layer_exchanges_nothing(by):
    """What comes back would stay zero; once it learns again, it exchanges as the others do."""
    found = []
    for execution in ("masked", "sparse"):
        model = mlp()
        model[2].weight.requires_grad_(False)
        optimizer = OPTIMIZERS["sgd"](model.parameters())
        pruner = TetrisPruner(
            model, execution=execution, optimizers=optimizer, sparsity=0.75, **FAST,
            regrow=Regrow(share=0.4, every=2, by=by),
        )  # fmt: skip
        first = pruner.layouts()
        train(model, pruner, optimizer, 4)
        frozen = pruner.layouts()
        assert frozen["2"] == first["2"]
        assert frozen["0"] != first["0"]
        stored = model[2].values if execution == "sparse" else pruner._masks["2"].parameter
        stored.requires_grad_(True)
        train(model, pruner, optimizer, 2)
        assert pruner.layouts()["2"] != first["2"]
        found.append((frozen, pruner.layouts()))
    assert found[0] == found[1]


def test_regrown_blocks_are_those_of_the_steepest_gradients():
    """Against the gradient of the dense weight, accumulated over two backward passes."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    regrow = Regrow(share=0.5, every=1, end=10)
    pruner = sparse_pruner(model, optimizer, sparsity=0.7, regrow=regrow)
    before = pruner.layouts()
    masked = pruner.finalize()
    for layer in (0, 2):
        masked[layer] = masked[layer].to_dense()
    for _ in range(2):
        x = torch.randn(8, 16, dtype=torch.float64)
        for m in (model, masked):
            m(x).square().mean().backward()
    optimizer.step()
    pruner.step()
    for name, old in before.items():
        new = pruner.layouts()[name]
        grown = (new.block_mask() & ~old.block_mask()).flatten()
        gradient = masked.get_submodule(name).weight.grad.abs()
        whole = old.from_block_mask(
            torch.ones_like(old.block_mask()), old.block, old.out_features, old.in_features,
            old.row_perm, old.col_perm,
        )  # fmt: skip
        score = whole.pack(gradient).sum((1, 2))
        absent = score[~old.block_mask().flatten()].sort(descending=True).values
        assert 0 < grown.sum() < len(absent)
        assert score[grown].min() >= absent[int(grown.sum()) - 1] * (1 - 1e-12)
        block = new.unpack(model.get_submodule(name).values)
        assert block.count_nonzero() < new.mask().sum()  # they start at zero


def test_random_blocks_are_absent_distinct_and_uniform():
    layout = sparse_layout()
    generator = torch.Generator().manual_seed(0)
    stored = set(layout.block_mask().flatten().nonzero()[:, 0].tolist())
    absent = layout.block_mask().numel() - len(stored)
    for count in (0, 1, 5, absent - 1, absent, absent + 5):
        keys = random_absent(Units.of(layout), count, generator).tolist()
        assert len(set(keys)) == len(keys) == min(count, absent)
        assert not stored & set(keys)
        assert all(0 <= k < layout.block_mask().numel() for k in keys)
    counts = torch.zeros(layout.block_mask().numel())
    for _ in range(3000):
        counts[random_absent(Units.of(layout), 3, generator)] += 1
    drawn = counts[~layout.block_mask().flatten()]
    expected = 9000 / absent
    chi = float(((drawn - expected) ** 2 / expected).sum())
    assert chi < absent + 5 * (2 * absent) ** 0.5


def test_gradients_per_block_are_those_of_the_dense_weight():
    layout = sparse_layout()
    layer = SparseLinear(19, 22, layout=layout, dtype=torch.float64)
    pairs = [(torch.randn(2, 5, 19).double(), torch.randn(2, 5, 22).double()) for _ in range(2)]
    dense = sum(g.flatten(0, 1).t() @ x.flatten(0, 1) for x, g in pairs)
    sums = block_gradients(layer, pairs)
    assert sums.shape == layout.block_grid
    torch.testing.assert_close(
        sums.flatten()[layout.block_mask().flatten()], layout.pack(dense.abs()).sum((1, 2))
    )
    keys = steepest_absent(Units.of(layout), sums, 4)
    best = sums.masked_fill(layout.block_mask(), 0.0).flatten().topk(4).indices
    assert torch.equal(keys, best)


@pytest.mark.parametrize("options", [{}, {"balanced": True}, {"allow_empty_rows": True}], ids=str)
def test_tied_blocks_live_and_die_together(options):
    """A convolution's positions are columns: unit u of a row is at u, u + width, ..."""
    generator = torch.Generator().manual_seed(4)
    rows, width, tied = 5, 7, 3
    score = torch.rand((rows, tied, width), generator=generator)
    mask = (torch.rand((rows, 1, width), generator=generator) < 0.6).expand(-1, tied, -1)
    layout = BlockLayout.from_block_mask(mask.flatten(1), (1, 1), rows, tied * width)
    units = Units.of(layout, tied)
    assert torch.equal(units.keys, mask[:, 0].flatten().nonzero()[:, 0])
    assert torch.equal(units.blocks(units.keys), mask.flatten().nonzero()[:, 0])
    sums = units.sums(score[mask], layout)
    torch.testing.assert_close(sums, score.sum(1)[mask[:, 0]])
    keep = units.keys[keep_heaviest(sums, units, 9, **options)]
    dense = torch.where(mask[:, 0], score.sum(1), 0.0)
    expected = block_mask(dense, (1, 1), 1 - 9 / (rows * width) + 1e-9, **options)
    assert torch.equal(keep, expected.flatten().nonzero()[:, 0])


def sparse_layout():
    generator = torch.Generator().manual_seed(2)
    mask = torch.rand((6, 7), generator=generator) < 0.3
    perms = [torch.randperm(n, generator=generator).int() for n in (22, 19)]
    return BlockLayout.from_block_mask(mask, (4, 3), 22, 19, *perms)


def test_a_fused_activation_is_in_the_way_of_regrowth_by_gradient():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = sparse_pruner(model, optimizer, sparsity=0.7, regrow=Regrow(0.3, every=1))
    model[0].activation = "relu"
    with pytest.raises(ValueError, match="behind the activation that layer '0' fuses, 'relu'"):
        train(model, pruner, optimizer, 1)


class Named(nn.Module):
    """Calls its layer by keyword, as nn.Linear and the convolutions name their argument."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, x):
        return self.layer(input=x)


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(16, 32), (4, 16)),
        (nn.Conv1d(16, 32, 3), (2, 16, 5)),
        (nn.Conv2d(16, 32, 3), (2, 16, 5, 4)),
        (nn.ConvTranspose2d(16, 32, 3), (2, 16, 5, 4)),
    ],
    ids=lambda p: type(p).__name__ if isinstance(p, nn.Module) else "",
)
def test_inputs_may_go_by_keyword_and_under_autocast(layer, shape):
    model = Named(copy.deepcopy(layer))
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = TetrisPruner(
        model, sparsity=0.7, block=(4, 4), sweeps=1, execution="sparse", optimizers=optimizer,
        regrow=Regrow(0.5, every=1),
    )  # fmt: skip
    before = pruner.layouts()
    with torch.autocast("cpu"):
        model(torch.randn(shape).bfloat16()).square().mean().backward()
    optimizer.step()
    pruner.step()
    after = pruner.layouts()
    assert isinstance(model.layer, SparseLayer)
    assert before != after
    assert before["layer"].nnz_blocks == after["layer"].nnz_blocks


def test_a_compiled_model_follows_the_blocks():
    """Also where their number stays, so that shapes tell nothing."""
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    regrow = Regrow(0.4, every=1, by="random")
    pruner = sparse_pruner(model, optimizer, sparsity=0.7, regrow=regrow)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
        torch.testing.assert_close(compiled(x), model(x))
        optimizer.zero_grad()
        compiled(x).square().mean().backward()
        grads = [p.grad.clone() for p in model.parameters()]
        optimizer.zero_grad()
        model(x).square().mean().backward()
        for p, grad in zip(model.parameters(), grads, strict=True):
            torch.testing.assert_close(p.grad, grad)
        optimizer.step()
        pruner.step()


def test_a_compiled_model_cannot_be_watched_and_says_so():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = sparse_pruner(model, optimizer, sparsity=0.7, regrow=Regrow(0.3, every=1))
    with pytest.raises(RuntimeError, match=r"needs a backward pass through layer '0'"):
        pruner.step()


def test_the_watch_lasts_one_step_and_copies_are_free_of_it():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = sparse_pruner(model, optimizer, sparsity=0.7, regrow=Regrow(0.3, every=2))
    assert not model[0]._forward_hooks
    train(model, pruner, optimizer, 1)
    assert len(model[0]._forward_hooks) == 1
    copied = copy.deepcopy(model)
    copied(torch.ones(1, 16).double()).sum().backward()
    watch = next(iter(copied[0]._forward_hooks.values())).__self__
    assert watch.pairs == []
    assert not pruner.finalize()[0]._forward_hooks
    train(model, pruner, optimizer, 1)
    assert not model[0]._forward_hooks


def test_the_watch_goes_on_after_a_copy_that_failed():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = sparse_pruner(model, optimizer, sparsity=0.7, regrow=Regrow(0.3, every=1))

    class Uncopied(nn.Identity):
        def __deepcopy__(self, memo):
            raise MemoryError

    model.append(Uncopied())
    with pytest.raises(MemoryError):
        pruner.finalize()
    assert len(model[0]._forward_hooks) == 1
    train(model, pruner, optimizer, 1)


@pytest.mark.parametrize("regrow", [None, Regrow(0.3, every=3, by="random")])
def test_resuming_equals_not_stopping(regrow):
    def make(model):
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        pruner = sparse_pruner(model, optimizer, sparsity=0.8, schedule=Cubic(0, 8), regrow=regrow)
        return pruner, optimizer

    model = mlp()
    pruner, optimizer = make(model)
    train(model, pruner, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), pruner.state_dict(), optimizer.state_dict()))
    train(model, pruner, optimizer, 6, seed=5)

    again = mlp()
    with torch.no_grad():
        again[0].weight.mul_(torch.rand(32, 1) + 0.1)  # another start, so other permutations
    pruner2, optimizer2 = make(again)
    if regrow:
        train(again, pruner2, optimizer2, 2)  # sparse already, under those permutations
    pruner2.load_state_dict(saved[1])
    again.load_state_dict(saved[0])
    optimizer2.load_state_dict(saved[2])
    assert pruner2.steps == 4
    train(again, pruner2, optimizer2, 6, seed=5)
    assert pruner2.layouts() == pruner.layouts()
    for a, b in zip(again.parameters(), model.parameters(), strict=True):
        assert torch.equal(a, b)


def test_rolling_back_to_a_state_of_dense_layers():
    model = mlp()
    layers, parameters = list(model), list(model.parameters())
    optimizer = torch.optim.Adam(parameters, 0.01)
    pruner = sparse_pruner(model, optimizer, sparsity=0.8, schedule=Cubic(2, 6))
    train(model, pruner, optimizer, 2)
    assert list(model) == layers
    saved = copy.deepcopy((pruner.state_dict(), model.state_dict(), optimizer.state_dict()))
    losses = train(model, pruner, optimizer, 6, seed=5)
    layouts = pruner.layouts()
    assert isinstance(model[0], SparseLinear)

    pruner.load_state_dict(saved[0])
    assert list(model) == layers
    assert [id(p) for p in model.parameters()] == [id(p) for p in parameters]
    state = optimizer.state[parameters[0]]["exp_avg"]
    assert state.shape == model[0].weight.shape
    model.load_state_dict(saved[1])
    optimizer.load_state_dict(saved[2])
    assert pruner.sparsity == 0.0
    assert train(model, pruner, optimizer, 6, seed=5) == losses
    assert pruner.layouts() == layouts


def test_a_sparse_layer_that_stores_everything_is_saved_as_sparse():
    removing = True

    def schedule(step, final):
        return final if removing else 0.0

    model, again = mlp(), mlp()
    pruner = sparse_pruner(model, (), sparsity=0.5, schedule=schedule)
    layout = pruner.layouts()["0"]
    every = torch.ones(layout.block_grid, dtype=torch.bool)
    order = layout.row_perm, layout.col_perm
    whole = BlockLayout.from_block_mask(every, layout.block, 32, 16, *order)
    tetris.relayout(model[0], whole)
    removing = False
    other = sparse_pruner(again, (), sparsity=0.5, schedule=schedule)
    assert isinstance(again[0], nn.Linear)
    other.load_state_dict(pruner.state_dict())
    assert isinstance(again[0], SparseLinear)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again[0].values, model[0].values)


def test_states_of_the_other_execution_are_refused():
    masked, sparse = TetrisPruner(mlp(), **FAST), sparse_pruner(mlp(), ())
    with pytest.raises(ValueError, match="execution='masked', this one has 'sparse'"):
        sparse.load_state_dict(masked.state_dict())
    with pytest.raises(ValueError, match="execution='sparse', this one has 'masked'"):
        masked.load_state_dict(sparse.state_dict())


def test_what_stored_blocks_cannot_do_is_refused_and_the_model_stays():
    model = mlp()
    before = copy.deepcopy(model.state_dict())

    def schedule(step, final):
        raise ZeroDivisionError

    refused = [
        ({"execution": "dense"}, "'masked' or 'sparse'"),
        ({"balanced": True, "regrow": Regrow()}, "which balanced=True forbids"),
    ]
    for arguments, message in refused:
        with pytest.raises(ValueError, match=message):
            TetrisPruner(model, **{**FAST, "execution": "sparse", **arguments})
    with pytest.raises(TypeError, match="must be a tetris.prune.Regrow"):
        sparse_pruner(model, (), regrow=0.3)
    with pytest.raises(ZeroDivisionError):
        sparse_pruner(model, (), schedule=schedule)
    with pytest.raises(ValueError, match="one layer cannot be replaced in place"):
        TetrisPruner(nn.Linear(8, 8), execution="sparse", block=(4, 4))
    with pytest.raises(ValueError, match=r"layer '0'.*float16"):
        TetrisPruner(mlp(torch.float16), execution="sparse", **FAST)
    hooked = mlp()
    hooked[0].register_forward_hook(lambda *a: None)
    with pytest.raises(ValueError, match="has forward_hooks"):
        sparse_pruner(hooked, ())
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        *(({"share": x}, r"share must be a number in \(0, 1\)") for x in (0.0, 1.0, "0.3", True)),
        *(({"every": x}, "every must be an int >= 1 ") for x in (0, 2.5, "2", None, True)),
        *(({"end": x}, "end must be an int >= 1 or None") for x in (0, 1.5, "9", False)),
        *(({"seed": x}, "seed must be an int") for x in (1.5, "a", None)),
        ({"by": "luck"}, "by must be 'gradient' or 'random'"),
    ],
    ids=str,
)
def test_a_rule_that_is_none_is_refused(arguments, message):
    (value,) = arguments.values()
    with pytest.raises(ValueError, match=rf"Regrow: {message}.*\(got {value!r}\)"):
        Regrow(**arguments)


def test_the_share_falls_as_published():
    regrow = Regrow(share=0.3, every=10, end=100)
    assert regrow(0) == pytest.approx(0.3)
    assert regrow(50) == pytest.approx(0.15)
    assert regrow(100) == pytest.approx(0.0)
    assert [s for s in range(130) if regrow.due(s)] == list(range(10, 100, 10))
    assert Regrow(share=0.2)(10**6) == 0.2


def test_importance_may_be_a_function_or_tensors_of_the_dense_weight():
    torch.manual_seed(0)
    worth = {"0": torch.rand(32, 16), "2": torch.rand(30, 32)}
    layouts = []
    for importance in (worth, lambda name, layer: worth[name]):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.01)
        pruner = sparse_pruner(
            model, optimizer, sparsity=0.8, schedule=Cubic(0, 4), importance=importance
        )
        train(model, pruner, optimizer, 5)
        layouts.append(pruner.layouts())
    model = mlp()
    masked = TetrisPruner(model, sparsity=0.8, schedule=Cubic(0, 4), importance=worth, **FAST)
    train(model, masked, torch.optim.SGD(model.parameters(), 0.01), 5)
    assert layouts[0] == layouts[1] == masked.layouts()


def test_a_method_rates_stored_values():
    class Latest(BlockPruner):
        def saliency(self, name, layer):
            if isinstance(layer, SparseLinear):
                return layer.values.detach().abs().float()
            return layer.weight.detach().abs().float()

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = Latest(
        model,
        LayerOptions(sparsity=0.75, block=(4, 4), reorder=False),
        execution="sparse",
        optimizers=optimizer,
        schedule=Cubic(0, 3),
        include="0",
    )
    train(model, pruner, optimizer, 4)
    assert model[0].layout.sparsity == 0.75
