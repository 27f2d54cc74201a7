"""TetrisPruner in training loops, its schedules, and its way to a sparse model."""

import copy

import pytest
import torch
from torch import nn

from tetris import SparseLinear
from tetris.prune import BlockPruner, Cubic, LayerOptions, TetrisPruner

FAST = {"sweeps": 1, "block": (4, 4), "exclude": "4"}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 30), nn.ReLU(), nn.Linear(30, 10)
    )


def train(model, pruner, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        loss = model(torch.randn(8, 16, generator=generator)).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()


def test_cubic_is_the_published_formula():
    schedule = Cubic(begin=10, end=110, every=1, initial=0.1)
    assert schedule(9, 0.9) == 0.0
    assert schedule(10, 0.9) == pytest.approx(0.1)
    assert schedule(60, 0.9) == pytest.approx(0.9 + (0.1 - 0.9) * 0.5**3)
    assert schedule(110, 0.9) == schedule(500, 0.9) == 0.9
    stairs = Cubic(begin=0, end=100, every=30)
    assert stairs(59, 0.9) == stairs(30, 0.9) < stairs(60, 0.9)
    with pytest.raises(ValueError, match="begin < end"):
        Cubic(begin=5, end=5)


def test_masks_hold_during_training_and_finalize_agrees():
    model = mlp()
    parameters = list(model.parameters())
    optimizer = torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.1)
    train_before = copy.deepcopy(model.state_dict())
    for _ in range(2):  # momentum from before pruning pushes at masked weights
        model(torch.randn(8, 16)).square().mean().backward()
        optimizer.step()
    pruner = TetrisPruner(model, sparsity=0.75, **FAST)
    assert set(map(id, model.parameters())) == set(map(id, parameters))
    masks = {name: layout.mask() for name, layout in pruner.layouts().items()}
    train(model, pruner, optimizer, 5)
    assert list(masks) == ["0", "2"]
    for name, mask in masks.items():
        layer = model.get_submodule(name)
        assert not layer.weight[~mask].any()
        assert not layer.parametrizations.weight.original[~mask].any()
        assert layer.weight[mask].all()
        assert not torch.equal(layer.weight[mask], train_before[f"{name}.weight"][mask])
    sparse = pruner.finalize()
    assert isinstance(sparse[0], SparseLinear)
    assert torch.equal(sparse[0].layout.mask(), masks["0"])
    x = torch.randn(6, 16)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-6)
    assert type(sparse[4]) is nn.Linear
    train(model, pruner, optimizer, 1)  # the original trains on


def test_cubic_pruning_is_gradual_and_monotone():
    model = mlp()
    pruner = TetrisPruner(model, sparsity=0.9, schedule=Cubic(0, 6, every=2), **FAST)
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    assert pruner.sparsity == 0.0
    perms = model[0].parametrizations.weight[0].row_perm.clone()
    seen, kept = [], pruner.layouts()["0"].mask()
    for _ in range(8):
        train(model, pruner, optimizer, 1)
        seen.append(pruner.sparsity)
        now = pruner.layouts()["0"].mask()
        assert not (now & ~kept).any()
        kept = now
    assert seen == sorted(seen)
    assert seen[0] == 0.0 < seen[1] == seen[2] < seen[3] < seen[5] == seen[7]
    assert model[0].parametrizations.weight[0].block_mask.sum() >= 8  # a block in each block row
    assert torch.equal(model[0].parametrizations.weight[0].row_perm, perms)


def test_unfinished_schedules_are_pointed_out():
    pruner = TetrisPruner(mlp(), sparsity=0.9, schedule=Cubic(0, 10), **FAST)
    with pytest.warns(UserWarning, match="has not ended .0 steps, 0.0% .*planned"):
        pruner.finalize()


def test_custom_schedule_global_scope_and_refreshed_search():
    model = mlp()
    pruner = TetrisPruner(
        model,
        sparsity=0.5,
        schedule=lambda step, final: final if step >= 2 else final / 2,
        scope="global",
        search_every_update=True,
        **FAST,
    )
    assert pruner.sparsity == pytest.approx(0.25, abs=0.02)
    train(model, pruner, torch.optim.SGD(model.parameters(), 0.1), 2)
    assert pruner.sparsity == pytest.approx(0.5, abs=0.02)
    report = pruner.report()
    assert [layer.name for layer in report.layers] == ["0", "2"]
    assert report.layers[0].retained > report.layers[0].identity_retained * 0.99
    pruner.finalize(inplace=True)
    assert isinstance(model[0], SparseLinear)
    with pytest.raises(RuntimeError, match="the pruner has ended"):
        pruner.step()


def test_resuming_from_state_dicts_equals_not_stopping():
    def make(model):
        pruner = TetrisPruner(model, sparsity=0.8, schedule=Cubic(0, 8), **FAST)
        return pruner, torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)

    model = mlp()
    pruner, optimizer = make(model)
    train(model, pruner, optimizer, 4)
    saved = copy.deepcopy((model.state_dict(), pruner.state_dict(), optimizer.state_dict()))
    train(model, pruner, optimizer, 6)

    again = mlp()
    with torch.no_grad():
        again[0].weight.mul_(torch.rand(32, 1) + 0.1)  # another start, so other permutations
    pruner2, optimizer2 = make(again)
    again.load_state_dict(saved[0])
    pruner2.load_state_dict(saved[1])
    optimizer2.load_state_dict(saved[2])
    assert pruner2.steps == 4
    train(again, pruner2, optimizer2, 6)
    assert pruner2.layouts() == pruner.layouts()
    x = torch.randn(3, 16)
    torch.testing.assert_close(again(x), model(x))


def test_a_foreign_state_is_refused():
    state = TetrisPruner(mlp(), sweeps=1, block=(4, 4)).state_dict()
    pruner = TetrisPruner(mlp(), **FAST)
    with pytest.raises(ValueError, match="same include and exclude"):
        pruner.load_state_dict(state)
    other = TetrisPruner(mlp(), **{**FAST, "block": (8, 1)})
    with pytest.raises(ValueError, match=r"blocks of \(4, 4\) here and \(8, 1\)"):
        pruner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="lacks steps"):
        pruner.load_state_dict({})


def test_remove_leaves_an_ordinary_masked_model():
    model = mlp()
    keys = list(model.state_dict())
    pruner = TetrisPruner(model, sparsity=0.75, **FAST)
    x = torch.randn(3, 16)
    mask, y = pruner.layouts()["0"].mask(), model(x)
    assert pruner.remove() is model
    assert list(model.state_dict()) == keys
    assert type(model[0]) is nn.Linear
    assert torch.equal(model[0].weight != 0, mask)
    assert torch.equal(model(x), y)


def test_a_schedule_of_other_arguments_is_named_with_the_rule():
    model = mlp()
    pruner = TetrisPruner(mlp(), **FAST)

    def warmup(step):
        return min(1.0, step / 10)

    message = r"^TetrisPruner: schedule must take two arguments, \(step, final sparsity\), "
    for schedule, got in (
        (warmup, r"got the function warmup of \(step\)"),
        (lambda: 0.5, r"of \(\)"),
        (lambda step, final, *, rate: 0.5, "rate"),
    ):
        with pytest.raises(TypeError, match=message + f".*{got}"):
            TetrisPruner(model, schedule=schedule, **FAST)
        with pytest.raises(TypeError, match=message):
            pruner.schedule = schedule
    with pytest.raises(ValueError, match=r"Cubic\(begin, end, every\).*got the class Cubic"):
        TetrisPruner(model, schedule=Cubic, **FAST)
    for schedule in (max, lambda step, final=0.5, rate=1: 0.5, lambda *both: 0.5):
        pruner.schedule = schedule  # takes two


def test_a_failing_start_leaves_the_model_as_it_was():
    model = mlp()
    before = copy.deepcopy(model.state_dict())

    def schedule(step, final):
        raise ZeroDivisionError

    for arguments in ({"schedule": schedule}, {"schedule": lambda step, final: 2.0}):
        with pytest.raises((ZeroDivisionError, ValueError)):
            TetrisPruner(model, **FAST, **arguments)
    assert list(model.state_dict()) == list(before)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    model[2].weight = model[2].weight
    with pytest.raises(ValueError, match="'one_shot'"):
        TetrisPruner(model, schedule="cubic", **FAST)
    shared = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    shared[1].weight = shared[0].weight
    with pytest.raises(ValueError, match="'0' and '1' share one weight"):
        TetrisPruner(shared, block=(4, 4))


def test_masks_follow_every_way_their_buffers_can_change():
    model = mlp()
    pruner = TetrisPruner(model, sparsity=0.5, **FAST)
    mask = model[0].parametrizations.weight[0]

    def agrees(module):
        return torch.equal(module.element_mask(), module.layout().mask())

    assert agrees(mask)
    mask.block_mask[0] = ~mask.block_mask[0]
    assert agrees(mask)
    other = copy.deepcopy(model)
    mask.row_perm.copy_(mask.row_perm.flip(0))
    assert agrees(mask)
    again = other[0].parametrizations.weight[0]
    assert agrees(again)
    assert not torch.equal(again.element_mask(), mask.element_mask())
    other.load_state_dict(model.state_dict(), assign=True)
    assert torch.equal(again.element_mask(), mask.element_mask())
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    x = torch.randn(2, 16)
    torch.testing.assert_close(compiled(x), model(x))
    pruner.remove()


def test_a_method_is_one_function():
    class FirstRows(BlockPruner):
        def saliency(self, name, layer):
            score = torch.zeros(layer.weight.shape)
            score[:, :4] = 1.0
            return score

    model = mlp()
    FirstRows(model, LayerOptions(sparsity=0.75, block=(4, 4), reorder=False), include="0")
    assert model[0].weight[:, :4].all()
    assert not model[0].weight[:, 4:].any()
