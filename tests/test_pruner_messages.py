"""Data, targets and settings that do not fit are named, with the function and the value."""

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import tetris
from tetris.prune import (
    ActivationNorm,
    Cubic,
    DCPPruner,
    Fisher,
    Flops,
    Parameters,
    SynapticPruner,
    Taylor,
    TetrisPruner,
    VRPGEPruner,
)

FAST = {"sweeps": 1, "block": (4, 4), "exclude": "4"}
X, Y = torch.randn(8, 16), torch.zeros(8, dtype=torch.int64)


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 10)
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"target": Flops(0.5, X[:, :5])}, r"Flops: the model does not take.*float32\[8, 5\]"),
        ({"target": Flops(0.5, None)}, "Flops: the model does not take the inputs, None"),
        (
            {"importance": Fisher([(X[:, :5], Y)], cross_entropy)},
            r"Fisher: the model does not take the inputs, float32\[8, 5\]",
        ),
        (
            {"importance": Taylor([(X, Y + 12)], cross_entropy)},
            r"Taylor: the loss does not take outputs and target.*int64\[8\]: Target 12",
        ),
        (
            {"importance": Fisher([(X, Y[:5])], cross_entropy)},
            r"Fisher: the loss does not take.*float32\[8, 10\], int64\[5\]",
        ),
        ({"importance": ActivationNorm([Y])}, r"ActivationNorm: the model does not.*int64\[8\]"),
        ({"target": Parameters(1)}, r"kept=1\) leaves 1, less than one block, 16.*a share, such"),
        ({"target": Flops(30, X)}, "leaves 30, less than one block"),
        ({"budget": 0.1}, "budget and sweeps both say how long.*0.1 seconds and 1 sweeps"),
    ],
)
def test_what_does_not_fit_is_named(arguments, message):
    for make in (tetris.sparsify, TetrisPruner):
        with pytest.raises(ValueError, match=message):
            make(mlp(), **FAST, **arguments)


def test_errors_of_the_users_own_code_pass():
    def fails(outputs, target):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        tetris.sparsify(mlp(), importance=Taylor([(X, Y)], fails), **FAST)


def test_a_search_for_no_time_takes_the_better_start():
    found = tetris.reorder.search(mlp()[2].weight.abs(), (4, 4), 0.7, budget=0)
    assert found.sweeps == 0
    assert found.retained == max(found.l1_sort_retained, found.identity_retained)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ([(X[:, :3], Y)], "the model does not take the inputs: mat1 and mat2"),
        ([(X, Y + 12)], "the loss does not take logits and targets: Target 12"),
    ],
)
def test_data_that_dcp_cannot_select_by(data, message):
    model = mlp().train()
    with pytest.raises(ValueError, match=f"DCPPruner.select: {message}"):
        DCPPruner(model, sparsity=0.5, **FAST).select(data)
    assert model.training
    assert not model[0]._forward_hooks


def test_vrpge_says_when_the_floor_keeps_more_than_was_asked_for():
    pruner = VRPGEPruner(mlp(), sparsity=0.95, reorder="identity", **FAST)
    with pytest.warns(UserWarning, match=r"VRPGEPruner.prune: .*keep more blocks than asked for"):
        pruner.prune()


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_an_optimizer_that_outlived_strengths_resumes(execution):
    """It holds strengths beside weights: it is made before states are loaded, as at first."""

    def make():
        model = mlp()
        pruner = SynapticPruner(
            model, sparsity=0.5, penalty=1e-3, batches=[X], execution=execution, **FAST
        )
        optimizer = torch.optim.SGD(pruner.parameter_groups(), 0.05, momentum=0.9)
        pruner.attach(optimizer)
        return model, pruner, optimizer

    def train(model, pruner, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            cross_entropy(model(X), Y).backward()
            optimizer.step()
            pruner.step()

    parts = model, pruner, optimizer = make()
    train(*parts, 2)
    pruner.prune()
    train(*parts, 2)
    again = make()
    again[1].load_state_dict(pruner.state_dict())
    again[0].load_state_dict(model.state_dict())
    again[2].load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for run in (parts, again):
        train(*run, 3)
    pairs = zip(again[0].parameters(), model.parameters(), strict=True)
    assert all(torch.equal(a, b) for a, b in pairs)
    assert again[1].layouts() == pruner.layouts()


def test_a_pruner_says_where_it_is():
    pruner = TetrisPruner(mlp(), sparsity=0.5, schedule=Cubic(0, 2), **FAST)
    assert repr(pruner) == "TetrisPruner(2 layers, step 0, 0.0% of blocks removed)"
    pruner.step()
    pruner.step()
    assert repr(pruner) == "TetrisPruner(2 layers, step 2, 50.0% of blocks removed)"
    pruner.remove()
    assert repr(pruner) == "TetrisPruner(ended)"


@pytest.mark.parametrize("name", ["sparsity", "report", "state_dict"])
def test_what_a_pruner_that_has_ended_does_not_know(name):
    pruner = TetrisPruner(mlp(), sparsity=0.5, **FAST)
    pruner.remove()
    with pytest.raises(RuntimeError, match=f"TetrisPruner.{name}: the pruner has ended"):
        getattr(pruner, name)()


@pytest.mark.parametrize("wrong", [{"begin": "0"}, {"begin": 0.5}, {"end": None}, {"every": "5"}])
def test_a_schedule_of_no_numbers(wrong):
    with pytest.raises(ValueError, match="Cubic: needs whole numbers of steps"):
        Cubic(**({"begin": 0, "end": 10} | wrong))


def test_the_state_of_a_model_of_another_size():
    state = TetrisPruner(mlp(), sparsity=0.5, **FAST).state_dict()
    other = mlp()
    other[0], other[2] = nn.Linear(16, 64), nn.Linear(64, 32)
    with pytest.raises(ValueError, match="layer '0' of the state is of another size"):
        TetrisPruner(other, sparsity=0.5, **FAST).load_state_dict(state)


def test_hooks_of_states_are_the_users_or_the_masks():
    """A mask has one of its own, for its message, which ends with it."""
    pruner = TetrisPruner(mlp(), sparsity=0.5, **FAST)
    assert isinstance(pruner.finalize()[0], tetris.SparseLinear)
    pruner.model[0].register_load_state_dict_pre_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer '0' has load_state_dict_pre_hooks"):
        pruner.finalize()
