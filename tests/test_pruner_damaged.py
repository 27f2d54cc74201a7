"""A damaged state is refused by name, and nothing is changed by it."""

import copy
from collections.abc import Mapping

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from nested import same
from tetris.prune import (
    Cubic,
    DCPPruner,
    GANPruner,
    Regrow,
    SynapticPruner,
    TetrisPruner,
    UnconditionalGAN,
    VRPGEPruner,
)

FAST = {"sweeps": 1, "block": (4, 4), "sparsity": 0.5, "exclude": "3"}
X, Y = torch.randn(12, 16, generator=torch.Generator().manual_seed(0)), torch.arange(12) % 6


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32, 6))


def block_pruner(**settings):
    def make(model, optimizer):
        schedule, regrow = Cubic(1, 4), Regrow(0.3, every=2, by="random")
        settings.update(schedule=schedule, regrow=regrow, optimizers=optimizer)
        return TetrisPruner(model, **FAST, **settings)

    def train(model, optimizer, pruner):
        for _ in range(3):
            optimizer.zero_grad()
            cross_entropy(model(X), Y).backward()
            optimizer.step()
            pruner.step()

    return make, train


def vrpge(model, optimizer):
    return VRPGEPruner(model, optimizers=optimizer, **FAST)


def draw(model, optimizer, pruner):
    for _ in range(2):
        optimizer.zero_grad()
        pruner.backward(lambda: cross_entropy(model(X), Y))
        optimizer.step()
        pruner.step()


def synaptic(model, optimizer):
    # Two layers, so that a batch norm's scale is moved.
    return SynapticPruner(model, penalty=1e-3, batches=[X], **{**FAST, "exclude": ()})


def dcp(model, optimizer):
    return DCPPruner(model, **FAST)


def choose(model, optimizer, pruner):
    pruner.select([(X, Y)], rounds=1, steps=1, epochs=1)


def gan(model, optimizer):
    torch.manual_seed(1)
    judge = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 1))
    d_optimizer = torch.optim.SGD(judge.parameters(), 1e-3)
    return GANPruner(
        model, judge, task=UnconditionalGAN(), schedule="one_shot", d_optimizer=d_optimizer,
        optimizers=optimizer, **FAST,
    )  # fmt: skip


def nothing(*_):
    pass


CASES = {
    "masked": block_pruner(),
    "stored": block_pruner(execution="sparse"),
    "vrpge": (vrpge, draw),
    "vrpge-pruned": (vrpge, lambda model, optimizer, pruner: pruner.prune()),
    "synaptic": (synaptic, nothing),
    "synaptic-pruned": (synaptic, lambda model, optimizer, pruner: pruner.prune()),
    "dcp": (dcp, choose),
    "gan": (gan, nothing),
}


def paths(state, path=()):
    """Of every entry of nested dicts; an optimizer's param_groups are torch's business."""
    for key, value in state.items():
        if key == "param_groups":
            continue
        yield (*path, key)
        if isinstance(value, Mapping):
            yield from paths(value, (*path, key))


def damaged(state, path, value):
    whole = copy.deepcopy(state)
    inside = whole
    for key in path[:-1]:
        inside = inside[key]
    inside[path[-1]] = value
    return whole


@pytest.mark.parametrize("case", CASES)
def test_a_damaged_state_is_refused_and_changes_nothing(case):
    make, train = CASES[case]

    def run(seed):
        model = mlp()
        with torch.no_grad():
            model[0].weight.add_(0.1 * seed)
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        return model, optimizer, make(model, optimizer)

    parts = run(0)
    train(*parts)
    state = parts[-1].state_dict()
    model, optimizer, pruner = run(1)

    def now():
        parts = model.state_dict(), optimizer.state_dict(), pruner.state_dict()
        return copy.deepcopy(parts), list(model.modules())

    before = now()
    entries = list(paths(state))
    assert len(entries) > 20
    for path in entries:
        for value in ("damaged", torch.zeros(3)):
            with pytest.raises(ValueError, match=f"^{pruner.name}.load_state_dict: "):
                pruner.load_state_dict(damaged(state, path, value))
            assert same(now(), before), path
    for whole in (None, "damaged", [state]):
        with pytest.raises(ValueError, match=f"^{pruner.name}.load_state_dict: takes what"):
            pruner.load_state_dict(whole)
    pruner.load_state_dict(state)
    assert same(pruner.state_dict(), state)
