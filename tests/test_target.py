"""Targets: what is to be left, in weights or operations, instead of a sparsity."""

import math

import pytest
import torch
from torch import nn

import tetris
from tetris.prune import Cubic, Flops, Parameters, TetrisPruner
from tetris.prune.target import uses_of

FAST = {"sweeps": 1, "block": (4, 4)}


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(16, 32, 3, padding=1),
        nn.BatchNorm2d(32),
        nn.ReLU(),
        nn.Conv2d(32, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.ConvTranspose2d(32, 16, 2, stride=2),
        nn.Flatten(2),
        nn.Linear(64, 24),
    )


EXAMPLE = torch.randn(2, 16, 8, 8)


def test_uses_are_those_of_a_brute_force_count():
    model = cnn().train()
    uses = uses_of(model, {n: model.get_submodule(n) for n in ("0", "3", "5", "7")}, EXAMPLE)
    # Two images: 8x8 and 4x4 output pixels, 4x4 input pixels, 16 channels as tokens.
    assert uses == {"0": 2 * 64, "3": 2 * 16, "5": 2 * 16, "7": 2 * 16}
    assert model.training
    assert model[1].num_batches_tracked == 0
    assert not model[0]._forward_hooks


def test_uses_count_every_call_and_images_without_a_batch():
    conv = nn.Conv2d(3, 3, 1)
    twice = nn.Sequential(conv, conv)
    assert uses_of(twice, {"0": conv}, torch.randn(3, 5, 7)) == {"0": 70}
    line = nn.Conv1d(3, 4, 3)
    assert uses_of(line, {"": line}, (torch.randn(2, 3, 10),)) == {"": 16}
    linear = nn.Linear(3, 4)
    assert uses_of(linear, {"": linear}, torch.randn(3)) == {"": 1}


def stored(model):
    sparse = [m for m in model.modules() if hasattr(m, "layout")]
    return sum(m.values.numel() for m in sparse)


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kept", [0.25, 5000])
def test_parameters_bound_what_is_stored(scope, kept):
    total = sum(cnn()[i].weight.numel() for i in (0, 3, 5, 7))
    budget = kept if isinstance(kept, int) else kept * total
    sparse = tetris.sparsify(cnn(), target=Parameters(kept), scope=scope, **FAST)
    assert budget - 16 < stored(sparse) <= budget  # no block of 4x4 more fits


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("block", [(8, 8), (32, 32), (7, 3)])
def test_ragged_blocks_stay_within_the_budget(scope, block):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(30, 40), nn.ReLU(), nn.Linear(40, 35))
    sparse = tetris.sparsify(
        model, target=Parameters(1500), scope=scope, block=block, allow_empty_rows=True, sweeps=1
    )
    assert 1500 - block[0] * block[1] < stored(sparse) <= 1500


def flops(model, example):
    layers = {
        n: m
        for n, m in model.named_modules()
        if isinstance(m, tetris.SparseLinear)
        or (isinstance(m, (tetris.SparseConv2d, tetris.SparseConvTranspose2d)))
    }
    dense = tetris.densify(model)
    uses = uses_of(dense, {n: dense.get_submodule(n) for n in layers}, example)
    return sum(2 * uses[n] * layer.values.numel() for n, layer in layers.items())


@pytest.mark.parametrize("scope", ["layer", "global"])
@pytest.mark.parametrize("kept", [0.25, 400_000])
def test_flops_bound_the_operations(scope, kept):
    dense = tetris.sparsify(cnn(), sparsity=0.0, **FAST)
    total = flops(dense, EXAMPLE)
    budget = kept if isinstance(kept, int) else kept * total
    sparse = tetris.sparsify(cnn(), target=Flops(kept, EXAMPLE), scope=scope, **FAST)
    most = 2 * 16 * 128  # of one block
    assert budget - most < flops(sparse, EXAMPLE) <= budget


def test_flops_take_from_where_operations_are():
    """The first layer works at four times the pixels: the same saliency there costs more."""
    by_flops = tetris.sparsify(cnn(), target=Flops(0.3, EXAMPLE), scope="global", **FAST)
    by_number = tetris.sparsify(cnn(), target=Parameters(0.3), scope="global", **FAST)
    assert by_flops[0].layout.density < by_number[0].layout.density
    assert by_flops[3].layout.density > by_number[3].layout.density


def test_a_pruner_follows_its_schedule_to_the_target():
    model = cnn()
    pruner = TetrisPruner(
        model, target=Flops(0.25, EXAMPLE), scope="global", schedule=Cubic(0, 4), **FAST
    )
    total = flops(tetris.sparsify(cnn(), sparsity=0.0, **FAST), EXAMPLE)
    seen = []
    for _ in range(4):
        pruner.step()
        seen.append(flops(pruner.finalize(), EXAMPLE) / total)
    assert seen == sorted(seen, reverse=True)
    assert seen[0] > 0.4
    assert math.isclose(seen[-1], 0.25, abs_tol=0.02)


def test_overrides_stay_out_of_the_budget():
    sparse = tetris.sparsify(
        cnn(), target=Parameters(0.1), overrides={"7": {"sparsity": 0.5}}, **FAST
    )
    assert sparse[7].layout.sparsity == pytest.approx(0.5)
    assert sparse[3].layout.sparsity == pytest.approx(0.9, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"target": 0.5}, TypeError, r"target must be tetris.prune.Parameters.*got.*0\.5"),
        ({"target": Parameters(0.5), "sparsity": 0.9}, ValueError, "leave sparsity= out"),
        ({"target": Parameters(10**9)}, ValueError, "more than the dense layers have"),
        (
            {"target": Parameters(0.5), "overrides": {"*": {"sparsity": 0.5}}},
            ValueError,
            "overrides set the sparsity of all layers",
        ),
    ],
)
def test_bad_targets(arguments, error, message):
    for make in (tetris.sparsify, TetrisPruner):
        with pytest.raises(error, match=message):
            make(cnn(), **{**FAST, **arguments})


@pytest.mark.parametrize("kept", [0, 0.0, -1, 1.5, True, "0.1", float("nan")])
def test_bad_budgets(kept):
    with pytest.raises(ValueError, match="kept must be a share"):
        Parameters(kept)
    with pytest.raises(ValueError, match="kept must be a share"):
        Flops(kept, EXAMPLE)


def test_an_example_that_misses_a_layer():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return self.used(x)

    with pytest.raises(ValueError, match="does not go through 'unused'"):
        tetris.sparsify(Branch(), target=Flops(0.5, torch.randn(2, 16)))


def test_the_example_leaves_no_trace():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x, scale=1.0):
            self.calls += 1
            return nn.functional.dropout(self.up(input=x), 0.5) * scale

    model = Net()
    example = {"x": torch.randn(1, 16, 4, 4), "scale": 2.0}
    state = torch.get_rng_state()
    assert uses_of(model, {"up": model.up}, example) == {"up": 16}
    assert torch.equal(torch.get_rng_state(), state)
    assert model.calls == 0
    assert tetris.sparsify(model, target=Flops(0.5, example), **FAST).up.layout.density == 0.5
