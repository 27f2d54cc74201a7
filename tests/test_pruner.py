"""What all pruning methods inherit, seen through a method of a few lines."""

import copy
import math

import pytest
import torch
from torch import nn

import tetris
from tetris.prune import Pruner

FAST = {"sweeps": 1, "block": (4, 4), "exclude": "4"}


class Late(Pruner):
    """Trains dense, then removes what moved least, and remembers where it started."""

    def __init__(self, model, **settings):
        super().__init__(model, **settings)
        self.start = {n: layer.weight.detach().clone() for n, layer in self.layers.items()}

    def prune(self):
        moved = {n: (layer.weight - self.start[n]).abs() for n, layer in self.layers.items()}
        self.keep({n: plan.layout for n, plan in self.search(moved).items()})

    def extra_state(self):
        return {"start": self.start}

    def load_extra_state(self, state):
        self.start = state["start"]


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


def train(model, pruner, optimizer, steps):
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        optimizer.zero_grad()
        model(torch.randn(8, 16, generator=generator)).square().mean().backward()
        optimizer.step()
        pruner.step()


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_layers_are_dense_until_something_is_kept(execution):
    model, plain = mlp(), mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    reference = torch.optim.SGD(plain.parameters(), 0.1, momentum=0.9)
    pruner = Late(model, sparsity=0.75, execution=execution, optimizers=optimizer, **FAST)
    assert pruner.sparsity == 0.0
    assert [type(m) for m in model] == [type(m) for m in plain]
    assert list(model.state_dict()) == list(plain.state_dict())
    train(model, pruner, optimizer, 3)
    generator = torch.Generator().manual_seed(1)
    for _ in range(3):
        reference.zero_grad()
        plain(torch.randn(8, 16, generator=generator)).square().mean().backward()
        reference.step()
    assert all(
        torch.equal(a, b) for a, b in zip(model.parameters(), plain.parameters(), strict=True)
    )

    pruner.prune()
    assert pruner.sparsity == pytest.approx(0.75)
    assert pruner.report().sparsity == pytest.approx(0.75)
    masks = {n: layout.mask() for n, layout in pruner.layouts().items()}
    train(model, pruner, optimizer, 3)
    sparse, x = pruner.finalize(), torch.randn(5, 16)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-6)
    assert isinstance(sparse[0], tetris.SparseLinear)
    dense = pruner.remove()
    for name, mask in masks.items():
        assert not dense.get_submodule(name).weight[~mask].any()
    torch.testing.assert_close(sparse(x), dense(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("pruned", [False, True])
def test_states_resume_before_and_after_pruning(execution, pruned):
    def make():
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        return (
            model,
            optimizer,
            Late(model, sparsity=0.75, execution=execution, optimizers=optimizer, **FAST),
        )

    model, optimizer, pruner = make()
    train(model, pruner, optimizer, 2)
    if pruned:
        pruner.prune()
    other, its_optimizer, resumed = make()
    resumed.load_state_dict(pruner.state_dict())
    other.load_state_dict(model.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.steps == pruner.steps
    assert resumed.layouts() == pruner.layouts()
    for m, p, o in ((model, pruner, optimizer), (other, resumed, its_optimizer)):
        if not pruned:
            p.prune()
        train(m, p, o, 2)
    x = torch.randn(5, 16)
    assert torch.equal(model(x), other(x))
    assert resumed.layouts() == pruner.layouts()


def test_a_state_rolls_back_to_before_pruning():
    model = mlp()
    pruner = Late(model, sparsity=0.75, **FAST)
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    train(model, pruner, optimizer, 1)
    before, weights = pruner.state_dict(), {k: v.clone() for k, v in model.state_dict().items()}
    pruner.prune()
    pruner.load_state_dict(before)
    model.load_state_dict(weights)
    assert pruner.sparsity == 0.0
    assert list(model.state_dict()) == list(weights)


def test_errors_say_what_is_missing():
    pruner = Late(mlp(), sparsity=0.75, **FAST)
    with pytest.raises(RuntimeError, match="Late.report: nothing has been removed yet"):
        pruner.report()
    state = pruner.state_dict()
    del state["start"]
    with pytest.raises(ValueError, match="Late.load_state_dict: the state lacks start"):
        pruner.load_state_dict(state)
    with pytest.raises(ValueError, match=r"importance must be shaped like the weight"):
        pruner.search({"0": torch.ones(3, 3), "2": torch.ones(32, 32)})
    with pytest.raises(ValueError, match="must not be negative"):
        pruner.search({"0": -torch.ones(32, 16), "2": torch.ones(32, 32)})
    pruner.remove()
    with pytest.raises(RuntimeError, match="Late.step: the pruner has ended"):
        pruner.step()


def test_only_fitting_layouts_are_kept():
    pruner = Late(mlp(), sparsity=0.75, **FAST)
    right = tetris.BlockLayout.from_mask(torch.ones(32, 16, dtype=torch.bool), (4, 4))
    with pytest.raises(ValueError, match=r"no layer '1' is pruned here \(only 0, 2\)"):
        pruner.keep({"1": right})
    with pytest.raises(ValueError, match="Late.keep: the layout of layer '2' must have its size"):
        pruner.keep({"2": right})
    other = tetris.BlockLayout.from_mask(torch.ones(32, 16, dtype=torch.bool), (8, 8))
    with pytest.raises(ValueError, match="the pruner's block"):
        pruner.keep({"0": other})
    assert pruner.sparsity == 0.0
    pruner.keep({"0": right})


def test_a_search_takes_dense_shapes_also_when_blocks_are_stored():
    model = mlp()
    pruner = Late(model, sparsity=0.75, execution="sparse", **FAST)
    worth = {n: layer.weight.detach().abs() for n, layer in pruner.layers.items()}
    first = {n: p.layout for n, p in pruner.search(worth).items()}
    pruner.keep(first)
    assert {n: p.layout for n, p in pruner.search(worth).items()} == first


def test_after_a_resume_the_report_knows_no_saliency():
    pruner = Late(mlp(), sparsity=0.75, **FAST)
    pruner.search({n: torch.ones_like(layer.weight) for n, layer in pruner.layers.items()})
    pruner.prune()
    resumed = Late(mlp(), sparsity=0.75, **FAST)
    resumed.load_state_dict(pruner.state_dict())
    before, after = pruner.report(), resumed.report()
    assert after.sparsity == before.sparsity
    assert math.isnan(after.layers[0].retained)
    assert "nan" not in str(after)


def test_a_block_that_covers_a_layer_is_halved():
    model = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 20))
    for scope in ("layer", "global"):
        sparse, report = tetris.sparsify(
            model, sparsity=0.5, block=(128, 128), scope=scope, sweeps=1, return_report=True
        )
        assert [r.block for r in report.layers] == [(64, 32), (20, 32)]
        assert sparse[0].layout.density == 0.5


def test_a_falling_schedule_is_refused_on_stored_blocks():
    def schedule(step, final):
        return final if step < 2 else final / 2

    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = tetris.prune.TetrisPruner(
        model, sparsity=0.75, schedule=schedule, execution="sparse", optimizers=optimizer, **FAST
    )
    train(model, pruner, optimizer, 1)
    with pytest.raises(ValueError, match=r"the schedule falls from 75\.0% to 37\.5%"):
        train(model, pruner, optimizer, 1)
    assert pruner.sparsity == pytest.approx(0.75)


def test_a_star_import_brings_pruners_and_no_modules():
    names = {}
    exec("from tetris.prune import *", names)
    del names["__builtins__"]
    assert {"TetrisPruner", "DCPPruner", "SynapticPruner", "VRPGEPruner"} <= set(names)
    assert not [n for n, v in names.items() if type(v) is type(tetris)]
