import itertools
import json
import math

import numpy as np
import pytest
import torch
from torch import nn

import tetris
from tetris.cost import CostModel, Point, Stored, store
from tetris.cost.calls import _answering, calls_of, measured_times
from tetris.nn import SparseLayer
from tetris.prune.curves import Candidate, _hull, choose, retained_at
from tetris.prune.latency import BLOCKS
from tetris.prune.options import LayerOptions
from tetris.timing import ms_text


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)
    torch.manual_seed(0)


def mlp():
    return nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


def rows(path):
    return torch.randn(path, 256)


def seconds(cost, call, layer):
    """What the cost model says of a layer, dense or sparse."""
    stored = None
    if isinstance(layer, SparseLayer):
        stored = Stored(layer.layout.block, layer.layout.block_grid[0], layer.layout.nnz_blocks)
    return cost.seconds(Point(call.problem, stored))


@pytest.fixture(params=["avx512", "avx2"])
def exact(request, monkeypatch):
    """Every layer takes exactly what the cost model says, and the rest of the model 10 us.

    It says the same on every machine: the library's own figures of each instruction set.
    """
    from tetris.prune import latency

    monkeypatch.setattr(tetris._C, "isa_in_use", lambda: request.param)
    monkeypatch.setattr(tetris._C, "l2_cache_bytes", lambda: 1 << 20)

    def times(model, layers, example_inputs, stand_ins=None):
        cost = store.default()
        calls = calls_of("test", model, layers, example_inputs)
        own = {n: sum(seconds(cost, c, (stand_ins or {}).get(n)) for c in calls[n]) for n in layers}
        return latency.ModelTimes(1e-5 + sum(own.values()), own, 1e-5)

    def times_with(model, layers, stand_ins, example_inputs, seconds):
        assert seconds is None or seconds == times(model, layers, example_inputs).total
        return times(model, layers, example_inputs, stand_ins)

    monkeypatch.setattr(latency, "measured_times", times)

    def relative_time(model, reference, example_inputs):
        sparse = {n: m for n, m in model.named_modules() if isinstance(m, SparseLayer)}
        layers = {n: reference.get_submodule(n) for n in sparse}
        taken = times(reference, layers, example_inputs, sparse)
        return taken.total / times(reference, layers, example_inputs).total

    monkeypatch.setattr(latency, "times_with", times_with)
    monkeypatch.setattr(latency, "relative_time", relative_time)


# -- choosing -------------------------------------------------------------------------------------


def random_curves(seed, layers=4, points=6):
    rng = np.random.default_rng(seed)
    return {
        f"layer {i}": [
            Candidate(float(t), float(r), (4, 1), 0.5)
            for t, r in zip(rng.uniform(1, 10, points), rng.uniform(0, 5, points), strict=True)
        ]
        for i in range(layers)
    }


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_keeps_the_budget_and_is_nearly_the_best(seed):
    curves = random_curves(seed)
    least = sum(min(c.seconds for c in own) for own in curves.values())
    most = sum(max(c.seconds for c in own) for own in curves.values())
    for share in (0.05, 0.3, 0.6, 0.9):
        budget = least + share * (most - least)
        chosen = choose(curves, budget)
        assert chosen is not None
        assert sum(c.seconds for c in chosen.values()) <= budget
        reached = sum(c.retained for c in chosen.values())
        best = max(
            sum(c.retained for c in combination)
            for combination in itertools.product(*curves.values())
            if sum(c.seconds for c in combination) <= budget
        )
        hulls = [_hull(own) for own in curves.values()]
        step = max(
            (b.retained - a.retained for h in hulls for a, b in itertools.pairwise(h)), default=0
        )
        assert best - step - 1e-9 <= reached <= best + 1e-9
    assert choose(curves, least * 0.999) is None


def test_more_time_never_retains_less():
    curves = random_curves(7)
    kept = []
    for budget in np.linspace(10, 40, 30):
        if chosen := choose(curves, budget):
            kept.append(sum(c.retained for c in chosen.values()))
    # Greedy steps along hulls: a larger budget may stop before a large step, never lose one.
    assert kept[-1] == max(kept)
    assert kept[0] == min(kept)


def test_what_is_over_goes_to_candidates_beside_the_hulls():
    """The next step, to the dense layer, is too large; there is something in between."""
    own = [Candidate(1.0, 1.0, (4, 1), 0.9), Candidate(2.0, 1.1, (4, 1), 0.8), Candidate(4.0, 9.0)]
    assert own[1] not in _hull(own)
    assert choose({"a": own, "b": own[:1]}, 3.5) == {"a": own[1], "b": own[0]}
    assert choose({"a": own, "b": own[:1]}, 2.5) == {"a": own[0], "b": own[0]}
    assert choose({"a": own, "b": own}, 6.5) == {"a": own[2], "b": own[1]}


@pytest.mark.parametrize("tie_kernel", [False, True])
def test_estimates_are_what_a_sorted_order_retains(tie_kernel):
    layer = nn.Conv2d(32, 48, 3)
    saliency = layer.weight.detach().abs()
    options = LayerOptions(block=(4, 4), reorder="l1_sort", tie_kernel=tie_kernel)
    grid = math.prod(tetris.BlockLayout.from_dense(layer.weight, (4, 4), 0.0).block_grid)
    for sparsity in (0.5, 0.75, 0.9):
        layout = tetris.BlockLayout.from_dense(
            layer.weight, (4, 4), sparsity, reorder="l1_sort", tie_kernel=tie_kernel
        )
        [estimate] = retained_at("test", saliency, options, 1, [layout.nnz_blocks])
        found = float((saliency * layout.mask()).sum())
        assert estimate == pytest.approx(found, rel=1e-4)
    [everything] = retained_at("test", saliency, options, 1, [grid])
    assert everything == pytest.approx(float(saliency.sum()), rel=1e-5)


# -- the target -----------------------------------------------------------------------------------


def test_layers_within_a_model_are_timed():
    model = mlp()
    layers = {"0": model[0], "2": model[2]}
    times = measured_times(model, layers, rows(64))
    assert set(times.layers) == {"0", "2"}
    assert 0 < sum(times.layers.values()) <= times.total
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_share_of_the_time_is_reached_as_predicted(exact):
    x = rows(128)
    sparse, report = tetris.sparsify(
        mlp(), latency=0.4, example_inputs=x, exclude="4", sweeps=1, return_report=True
    )
    plan = report.latency
    assert plan.budget_ms == pytest.approx(0.4 * plan.dense_ms)
    assert 0.9 * plan.budget_ms < plan.predicted_ms <= plan.budget_ms
    assert plan.measured_ms == pytest.approx(plan.predicted_ms)
    assert plan.trials == ((plan.predicted_ms, pytest.approx(plan.predicted_ms)),)
    assert plan.threads == 1
    assert plan.source.startswith("not calibrated here")
    assert isinstance(sparse[2], tetris.SparseLinear)
    assert isinstance(sparse[4], nn.Linear)
    assert "predicted" in str(report)
    assert "measured" in str(report)
    assert report.to_dict()["latency"]["budget_ms"] == plan.budget_ms


def test_less_time_keeps_less(exact):
    x = rows(128)
    kept = []
    for share in (0.7, 0.5, 0.35):
        _, report = tetris.sparsify(
            mlp(), latency=share, example_inputs=x, exclude="4", sweeps=1, return_report=True
        )
        dense = {"0", "2"} & set(report.skipped)
        kept.append(sum(r.retained for r in report.layers) + len(dense))
    assert kept == sorted(kept, reverse=True)


def test_auto_chooses_blocks_for_each_layer(exact):
    sparse, report = tetris.sparsify(
        mlp(),
        latency=0.4,
        example_inputs=rows(128),
        block="auto",
        exclude="4",
        sweeps=1,
        return_report=True,
    )
    assert {r.block for r in report.layers} <= set(BLOCKS)
    # fewer choices never retain more: the estimate of one block is among those of all
    assert report.latency.predicted_ms <= report.latency.budget_ms
    assert all(isinstance(m, SparseLayer) for m in (sparse[2],))


def test_a_time_in_milliseconds(exact):
    x = rows(128)
    _, share = tetris.sparsify(
        mlp(), latency=0.4, example_inputs=x, exclude="4", reorder=False, return_report=True
    )
    for latency in (f"{share.latency.budget_ms} ms", f"{1e3 * share.latency.budget_ms:.6f}us"):
        torch.manual_seed(0)
        _, report = tetris.sparsify(
            mlp(), latency=latency, example_inputs=x, exclude="4", reorder=False, return_report=True
        )
        assert report.latency.budget_ms == pytest.approx(share.latency.budget_ms)


def test_a_layer_that_would_lose_stays_dense(exact):
    model = nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 16))
    slow = store.default()
    # sparse products of few outputs that never win: every call costs a second
    never = {f: tuple(1e9 for _ in c) for f, c in slow.threads[1].items() if "sparse" in f}
    lost = CostModel(slow.cpu, slow.isa, slow.version, {1: {**slow.threads[1], **never}})
    target = tetris.prune.Latency(0.5, rows(64), cost=lost)
    with pytest.raises(ValueError, match="the least that can be reached"):
        tetris.sparsify(model, target=target)
    assert isinstance(model[0], nn.Linear)


def test_layers_stay_dense_where_the_time_suffices(exact):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 1024), nn.Linear(1024, 1024), nn.Linear(1024, 256))
    with torch.no_grad():
        model[0].weight.mul_(50)  # far more saliency than the others
    sparse, report = tetris.sparsify(
        model, latency=0.6, example_inputs=rows(64), sweeps=1, return_report=True
    )
    assert type(sparse[0]) is nn.Linear
    assert "the time suffices: dense" in report.skipped["0"]
    assert isinstance(sparse[1], SparseLayer)


def test_overrides_are_kept(exact):
    sparse, report = tetris.sparsify(
        mlp(),
        latency=0.5,
        example_inputs=rows(128),
        exclude="4",
        overrides={"0": {"sparsity": 0.75, "block": (8, 8)}},
        reorder=False,
        return_report=True,
    )
    first = next(r for r in report.layers if r.name == "0")
    assert (first.block, first.block_sparsity) == ((8, 8), 0.75)


@pytest.mark.parametrize("block", [(2, 1), (4, 1)])
def test_a_block_of_an_override_is_kept(exact, block):
    """Also one that is the default; only the sparsity is chosen then."""
    arguments = {"latency": 0.3, "example_inputs": rows(256), "block": "auto", "exclude": "4"}
    _, report = tetris.sparsify(
        mlp(), overrides={"0": {"block": block}}, return_report=True, sweeps=1, **arguments
    )
    assert {r.name: r.block == block for r in report.layers}["0"]


def test_tied_kernels_are_predicted_as_they_are_stored(exact):
    """Whole units of nine blocks, and one in each row: else more would be stored than predicted."""
    model = nn.Sequential(nn.Conv2d(32, 64, 3), nn.Conv2d(64, 64, 3))
    x = torch.randn(1, 32, 20, 20)
    _, report = tetris.sparsify(
        model, latency=0.25, example_inputs=x, tie_kernel=True, return_report=True, sweeps=1
    )
    cost, calls = store.default(), calls_of("test", model, dict(model.named_children()), x)
    taken = 1e-5
    for name, own in calls.items():
        found = next(r for r in report.layers if r.name == name)
        stored = Stored(found.block, found.shape[0] // found.block[0], found.stored_blocks)
        taken += cost.seconds(Point(own[0].problem, stored))
    assert report.latency.predicted_ms == pytest.approx(1e3 * taken, rel=1e-9)
    assert 1e3 * taken <= report.latency.budget_ms


def test_tied_layers_stay_tied(exact):
    model = nn.Sequential(nn.Linear(256, 256), nn.ReLU(), nn.Linear(256, 256))
    model[2].weight = model[0].weight
    sparse = tetris.sparsify(model, latency=0.5, example_inputs=rows(128), reorder=False)
    assert sparse[0].values is sparse[2].values


def test_convolutions(exact):
    model = nn.Sequential(
        nn.Conv2d(3, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, groups=2)
    )
    sparse, report = tetris.sparsify(
        model,
        latency=0.6,
        example_inputs=torch.randn(1, 3, 28, 28),
        reorder=False,
        return_report=True,
    )
    assert type(sparse[0]) is nn.Conv2d
    assert isinstance(sparse[2], tetris.SparseConv2d)
    assert report.latency.other_ms > 0


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_pruners_take_the_target(exact, execution):
    model, x = mlp(), rows(128)
    target = tetris.prune.Latency(0.4, x, blocks=[(4, 1), (16, 1)])
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    pruner = tetris.prune.TetrisPruner(
        model,
        target=target,
        exclude="4",
        reorder=False,
        execution=execution,
        optimizers=optimizer,
        schedule=tetris.prune.Cubic(begin=0, end=2, every=1),
    )
    for _ in range(3):
        optimizer.zero_grad()
        model(x).sum().backward()
        optimizer.step()
        pruner.step()
    report = pruner.report()
    assert report.latency.predicted_ms <= report.latency.budget_ms
    assert report.latency.measured_ms == report.latency.trials[-1][1]
    sparse = pruner.finalize()
    stored = [m for m in sparse.modules() if isinstance(m, SparseLayer)]
    assert stored
    for layer, seen in zip(stored, report.layers, strict=True):
        assert layer.layout.sparsity == seen.block_sparsity


def test_what_was_chosen_can_be_chosen_again(exact):
    """For a program that resumes, where times are others: same layers, blocks and sparsities."""
    _, report = tetris.sparsify(
        mlp(), latency=0.4, example_inputs=rows(256), block="auto", return_report=True, sweeps=1
    )
    chosen = json.loads(json.dumps(report.overrides()))
    again = tetris.prune.TetrisPruner(mlp(), include=[*chosen], overrides=chosen, sweeps=1)
    assert list(again.layers) == [r.name for r in report.layers]
    for found in report.layers:
        layout = again.layouts()[found.name]
        assert (layout.block, layout.nnz_blocks) == (found.block, found.stored_blocks)


def test_importance_by_layer_may_name_layers_that_stay_dense(exact):
    model = mlp()
    importance = {n: m.weight.detach() ** 2 for n, m in model.named_modules() if n in "024" and n}
    tetris.sparsify(
        model, latency=0.5, example_inputs=rows(128), importance=importance, reorder=False
    )


# -- errors ---------------------------------------------------------------------------------------


def test_an_impossible_target_says_what_can_be_reached(exact):
    model = mlp()
    with pytest.raises(ValueError, match=r"the least that can be reached is [\d.]+ ms") as error:
        tetris.sparsify(model, latency=0.02, example_inputs=rows(128))
    assert str(error.value).startswith("tetris.sparsify: the latency target of ")
    assert all(type(m) is not tetris.SparseLinear for m in model)


def test_a_model_that_is_fast_enough(exact):
    with pytest.raises(ValueError, match="there is nothing to prune"):
        tetris.sparsify(mlp(), latency="10 s", example_inputs=rows(4))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"latency": 0.5}, "needs example_inputs="),
        ({"example_inputs": 1}, "example_inputs= goes with latency="),
        ({"block": "auto"}, 'block="auto" is for'),
        ({"latency": "fast", "example_inputs": 1}, "a time such as '3 ms'"),
        ({"latency": "3", "example_inputs": 1}, "a time such as '3 ms'"),
        ({"latency": "0 ms", "example_inputs": 1}, "a time such as '3 ms'"),
        ({"latency": 1.5, "example_inputs": 1}, "between 0 and 1"),
        ({"latency": True, "example_inputs": 1}, "between 0 and 1"),
        ({"latency": 0.5, "example_inputs": 1, "sparsity": 0.9}, "leave sparsity= out"),
        (
            {"latency": 0.5, "example_inputs": 1, "target": tetris.prune.Parameters(0.5)},
            "latency= or target=, not both",
        ),
    ],
)
def test_bad_arguments_of_sparsify(settings, message):
    with pytest.raises(ValueError, match="tetris.(sparsify|prune.Latency): ") as error:
        tetris.sparsify(mlp(), **settings)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either"),
        ({"kept": 0.5, "ms": 3}, "got both"),
        ({"ms": -1, "example_inputs": 1}, "ms must be a positive number"),
        ({"kept": 0.5}, "example_inputs must be"),
        ({"kept": 0.5, "example_inputs": 1, "blocks": []}, "blocks must name"),
        ({"kept": 0.5, "example_inputs": 1, "blocks": [(0, 1)]}, "Latency: blocks: block must"),
    ],
)
def test_bad_arguments_of_the_target(arguments, message):
    with pytest.raises(ValueError, match="tetris.prune.Latency") as error:
        tetris.prune.Latency(**arguments)
    assert message in str(error.value)


def test_the_example_must_reach_every_layer():
    model = mlp()
    model.add_module("unused", nn.Linear(64, 64))
    model.forward = lambda x: model[2](model[0](x))
    with pytest.raises(ValueError, match="does not go through '4', 'unused'"):
        tetris.sparsify(model, latency=0.5, example_inputs=rows(4))


def test_plain_sparsify_asks_for_no_calibration(monkeypatch):
    monkeypatch.setattr(store, "load", lambda: pytest.fail("the cost model was read"))
    tetris.sparsify(mlp(), sparsity=0.9, reorder=False)


def test_the_rest_is_measured_while_the_layers_do_nothing():
    model = mlp().eval()
    model[0].forward = model[0].forward  # somebody's own, which comes back
    own = model[0].__dict__["forward"]
    layers = {"0": model[0], "2": model[2]}
    x = rows(512)
    times = measured_times(model, layers, x)
    assert 0 < times.others <= times.total
    assert model[0].__dict__["forward"] is own
    assert "forward" not in model[2].__dict__
    with _answering(layers, lambda: model(x)):
        before = model(x)
        nn.init.zeros_(model[0].weight)
        assert torch.equal(model(x), before)  # layers are not asked
    assert not torch.equal(model(x), before)


def test_seconds_are_read_as_milliseconds_without_an_exponent():
    assert [ms_text(ms) for ms in (0.01234, 3.0, 999.4, 999.6, 12345.6)] == [
        "0.0123 ms",
        "3 ms",
        "999 ms",
        "1000 ms",
        "12346 ms",
    ]
