"""Choices that are measured and corrected, with measurements that are made up."""

import collections
import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import nn

import tetris
from tetris.cost import CostModel, Point, Stored, store, trials
from tetris.cost.calls import ModelTimes, calls_of, measured_times
from tetris.cost.features import COEFFICIENTS
from tetris.cost.trials import relative_time, times_with
from tetris.nn import SparseLayer
from tetris.prune import latency
from tetris.prune.curves import Candidate
from tetris.prune.latency import DENSITIES
from tetris.prune.options import LayerOptions
from tetris.prune.refine import (
    TOLERANCE,
    TRIALS,
    OutOfReachError,
    Trial,
    _between,
    _Factors,
    refine,
)
from tetris.prune.stand_ins import stand_ins
from tetris.prune.target import uses_of
from tetris.prune.tree import select_layers

FAMILIES = {"a": "sparse linear", "b": "sparse linear", "c": "sparse convolution"}
OTHERS = 0.05


def curves(speedups=(1.0, 1.0, 1.0)):
    """Three layers of 1, 2 and 3 s; half of what a sparse layer stores is its best tenth."""
    found = {}
    for (name, speedup), dense in zip(zip(FAMILIES, speedups, strict=True), (1, 2, 3), strict=True):
        own = [Candidate(float(dense), dense)]
        for density in DENSITIES:
            seconds = dense * (0.02 + density) / speedup
            own.append(Candidate(seconds, dense * density**0.3, (4, 1), 1.0 - density))
        found[name] = own
    return found


def truth(candidates, wrong, others=OTHERS, noise=()):
    """Measures what `wrong(name, candidate)` makes of predictions, and notes what it measured."""
    predicted = {
        n: {(c.block, c.sparsity): c.seconds for c in own} for n, own in candidates.items()
    }
    asked, noise = [], itertools.cycle(noise or (1.0,))

    def measure(chosen):
        asked.append({n: (c.block, c.sparsity) for n, c in chosen.items()})
        own = {
            n: predicted[n][c.block, c.sparsity] * (1.0 if c.block is None else wrong(n, c))
            for n, c in chosen.items()
        }
        factor = next(noise)
        own = {n: factor * s for n, s in own.items()}
        return ModelTimes(factor * others + sum(own.values()), own, factor * others)

    return measure, asked


def of_family(name):
    return {"sparse linear": 1.5}.get(FAMILIES[name], 1.0)


WRONG = {
    "nothing": lambda n, c: 1.0,
    "one family too slow": lambda n, c: of_family(n),
    "one family too fast": lambda n, c: 1 / of_family(n),
    "every layer by its own": lambda n, c: {"a": 0.6, "b": 1.3, "c": 1.7}[n],
    "more where less is stored": lambda n, c: (1.0 - c.sparsity) ** -0.2,
    "less where less is stored": lambda n, c: (1.0 - c.sparsity) ** 0.2,
    "up and down": lambda n, c: 1.0 + 0.25 * math.sin(4.0 * math.log(1.0 - c.sparsity)),
}


@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("share", [0.3, 0.5, 0.7])
def test_a_wrong_model_is_corrected(wrong, share):
    candidates, budget = curves(), share * (6.0 + OTHERS)
    measure, asked = truth(candidates, WRONG[wrong])
    found = refine(candidates, FAMILIES, OTHERS, budget, measure)
    least = 0.95 if wrong == "up and down" else 1.0 - TOLERANCE  # no factor is right for long
    assert least * budget <= found.best.measured <= budget
    assert len(asked) == len(found.trials) <= (1 if wrong == "nothing" else TRIALS)
    if wrong == "nothing":
        assert found.best.predicted == pytest.approx(found.best.measured)
    elif wrong != "less where less is stored":
        first = found.trials[0]
        assert abs(first.measured / first.predicted - 1.0) > abs(
            found.best.measured / found.best.predicted - 1.0
        )


def test_factors_are_those_of_blocks_then_layers_then_families():
    blocks = [None, (4, 1), (8, 1), (16, 1)]
    candidates = {n: [Candidate(10.0, 1.0, block) for block in blocks] for n in FAMILIES}

    def seconds(name):
        return [c.seconds for c in factors.applied(candidates)[name]]

    factors = _Factors(FAMILIES)
    for taken, chosen in ((20.0, 1), (12.0, 2), (9.0, 0)):
        now = factors.applied(candidates)
        factors.note({"a": now["a"][chosen]}, {"a": taken})
    assert seconds("a") == pytest.approx([9.0, 20.0, 12.0, 16.0])  # the last one: never measured
    assert seconds("b") == pytest.approx([10.0, 16.0, 16.0, 16.0])
    assert seconds("c") == [10.0] * 4  # of another family
    factors.note({"a": factors.applied(candidates)["a"][1]}, {"a": 0.0})  # was not called
    assert seconds("a") == pytest.approx([9.0, 20.0, 12.0, 16.0])


def test_factors_of_sparsities_in_between_are_in_between():
    candidates = {"a": [Candidate(10.0, 1.0, (4, 1), s) for s in (0.5, 0.6, 0.7, 0.8, 0.9)]}
    factors = _Factors(FAMILIES)
    for taken, chosen in ((12.0, 1), (30.0, 3), (16.0, 3)):
        now = factors.applied(candidates)
        factors.note({"a": now["a"][chosen]}, {"a": taken})
    found = [c.seconds for c in factors.applied(candidates)["a"]]
    assert found == pytest.approx([12.0, 12.0, 14.0, 16.0, 16.0])


def test_what_is_between_two_choices_is_near_them():
    own = [Candidate(1.0, 1.0)] + [Candidate(1.0, 1.0, (4, 1), s / 100) for s in range(0, 100, 5)]
    own += [Candidate(1.0, 1.0, (8, 1), 0.5)]
    tried = [Trial({"a": Candidate(1.0, 1.0, (4, 1), s)}, 1.0, 1.0) for s in (0.6, 0.8)]
    near = _between({"a": own}, tried)["a"]
    assert {c.block for c in near} == {(4, 1)}
    assert [c.sparsity for c in near] == [0.6, 0.65, 0.7, 0.75, 0.8]
    tried.append(Trial({"a": own[0]}, 1.0, 1.0))
    assert _between({"a": own}, tried)["a"] == [own[0], *near]


def test_corrections_change_what_is_chosen():
    """The family that turns out slower gives up more than in proportion."""
    candidates = curves()
    measure, asked = truth(candidates, lambda n, c: 3.0 if n == "c" else 1.0)
    refine(candidates, FAMILIES, OTHERS, 2.5, measure)
    stored = {n: (1.0 - asked[0][n][1], 1.0 - asked[-1][n][1]) for n in FAMILIES}
    assert stored["c"][1] / stored["c"][0] < stored["b"][1] / stored["b"][0]


def test_what_is_predicted_to_be_out_of_reach_is_tried():
    candidates = curves(speedups=(0.25, 0.25, 0.25))  # says the model
    measure, asked = truth(candidates, lambda n, c: 0.25)
    budget = 0.1 * 6.0
    assert OTHERS + sum(min(c.seconds for c in own) for own in candidates.values()) > budget
    found = refine(candidates, FAMILIES, OTHERS, budget, measure)
    assert found.best.measured <= budget
    assert len(asked) > 1


def test_out_of_reach_is_what_was_measured():
    candidates = curves()
    measure, asked = truth(candidates, lambda n, c: 2.0)
    least = OTHERS + sum(2.0 * min(c.seconds for c in own) for own in candidates.values())
    with pytest.raises(OutOfReachError) as error:
        refine(candidates, FAMILIES, OTHERS, 0.9 * least, measure)
    assert error.value.least == pytest.approx(least)
    assert len(asked) <= TRIALS
    fastest = {n: min(own, key=lambda c: c.seconds) for n, own in candidates.items()}
    assert {n: (c.block, c.sparsity) for n, c in fastest.items()} in asked


def test_a_layer_that_loses_against_the_prediction_becomes_dense():
    candidates = curves()
    measure, asked = truth(candidates, lambda n, c: 60.0 if n == "a" else 1.0)
    found = refine(candidates, FAMILIES, OTHERS, 3.5, measure)
    assert asked[0]["a"][0] == (4, 1)
    assert found.best.chosen["a"].block is None
    assert found.best.measured <= 3.5


def test_a_layer_not_tried_as_a_sparse_one_has_the_factor_of_its_family():
    """So it is not taken for fast because it has not been measured."""
    candidates = curves()
    candidates["a"] = [
        Candidate(c.seconds, 50 * c.retained, c.block, c.sparsity) for c in candidates["a"]
    ]
    measure, asked = truth(candidates, lambda n, c: 1.5)
    found = refine(candidates, FAMILIES, OTHERS, 5.0, measure)
    assert asked[0]["a"] == (None, 0.0)
    before, after = candidates["a"], found.candidates["a"]
    assert after[0].seconds == before[0].seconds
    assert after[5].seconds == pytest.approx(1.5 * before[5].seconds)


def test_the_same_choice_is_not_measured_twice():
    """One layer, two ways to be: there is nothing within the tolerance."""
    candidates = {"a": [Candidate(1.0, 1.0), Candidate(0.1, 0.5, (4, 1), 0.9)]}
    measure, asked = truth(candidates, lambda n, c: 1.2)
    found = refine(candidates, FAMILIES, OTHERS, 0.5, measure)
    assert len(asked) == 1
    assert found.best.measured == pytest.approx(0.12 + OTHERS)


@pytest.mark.parametrize("seed", range(10))
def test_noise_is_lived_with(seed):
    """Of what was measured the choice that retains most in the budget is taken."""
    noise = np.random.default_rng(seed).normal(1.0, 0.02, TRIALS).tolist()
    candidates, budget = curves(), 3.0
    measure, asked = truth(candidates, lambda n, c: of_family(n), noise=noise)
    found = refine(candidates, FAMILIES, OTHERS, budget, measure)
    assert len(asked) <= TRIALS
    kept = [t for t in found.trials if t.measured <= budget]
    if kept:
        assert found.best.retained == max(t.retained for t in kept)
        assert found.best.measured > 0.9 * budget
    else:
        assert found.best.measured == min(t.measured for t in found.trials) < 1.1 * budget


def test_a_machine_that_gets_slower_little_by_little():
    """Each time is a little longer than the last one says: more than what is aimed below."""
    candidates, budget = curves(), 3.0
    slower = (1.0, 1.02, 1.04, 1.06, 1.08)
    measure, _ = truth(candidates, lambda n, c: 1.5, noise=slower)
    found = refine(candidates, FAMILIES, OTHERS, budget, measure)
    assert [t.measured > budget for t in found.trials] == [True, True, False]
    assert (1.0 - TOLERANCE) * budget <= found.best.measured


def test_a_machine_that_gets_slower_and_slower():
    """Nothing keeps the budget, though nothing says that it is out of reach."""
    candidates, slower = curves(), (1.1, 1.25, 1.4, 1.6, 1.8)
    measure, asked = truth(candidates, lambda n, c: 1.0, noise=slower)
    found = refine(candidates, FAMILIES, OTHERS, 3.0, measure)
    assert len(asked) == TRIALS
    assert found.best.measured == min(t.measured for t in found.trials) > 3.0
    assert found.best in found.trials


# -- in a model -----------------------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 512), nn.ReLU(), nn.Linear(512, 10)
    )


@pytest.fixture
def library_is_right(monkeypatch, tmp_path):
    """Times are those of the library's own figures; returns factors on the times of trials."""
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))
    cost, factors = store.default(), []

    def times_with(model, layers, stand_ins, example_inputs, seconds):
        calls = calls_of("test", model, layers, example_inputs)
        own = {}
        for name in layers:
            stored = None
            if name in stand_ins:
                layout = stand_ins[name].layout
                stored = Stored(layout.block, layout.block_grid[0], layout.nnz_blocks)
            own[name] = sum(cost.seconds(Point(c.problem, stored)) for c in calls[name])
        if factors:
            factor = factors.pop(0)
            own = {n: factor * s for n, s in own.items()}
        return ModelTimes(1e-5 + sum(own.values()), own, 1e-5)

    monkeypatch.setattr(latency, "times_with", times_with)
    monkeypatch.setattr(
        latency, "measured_times", lambda model, layers, x: times_with(model, layers, {}, x, 0.0)
    )
    monkeypatch.setattr(latency, "relative_time", lambda *_: 0.4)
    return factors


def slower(family, factor):
    """The library's figures with one family of kernels predicted to take a multiple."""
    right = store.default()
    own = dict(right.threads[1])
    own[family] = tuple(
        x if name in ("load", "latency") else factor * x  # these two are multiples of others
        for name, x in zip(COEFFICIENTS, own[family], strict=True)
    )
    return CostModel(right.cpu, right.isa, right.version, {1: own}, source="made up")


@pytest.mark.parametrize("factor", [1.5, 1 / 1.5])
@pytest.mark.parametrize("blocks", [None, tetris.prune.BLOCKS])
def test_a_family_that_is_wrong_by_half(library_is_right, threads, factor, blocks):
    threads(1)
    target = tetris.prune.Latency(
        0.4, torch.randn(128, 256), blocks=blocks, cost=slower("sparse linear", factor)
    )
    pruner = tetris.prune.TetrisPruner(mlp(), target=target, exclude="4", reorder=False)
    plan = pruner.report().latency
    first, last = plan.trials[0], plan.trials[-1]
    assert first[1] / first[0] == pytest.approx(1 / factor, rel=0.05)
    assert 0.97 * plan.budget_ms <= plan.measured_ms <= plan.budget_ms
    assert plan.measured_ms == last[1] == pytest.approx(last[0], rel=0.02)
    assert len(plan.trials) == 2
    assert "tried: " in str(plan)
    assert f"measured {plan.measured_ms:.3g} ms" in str(plan)


@pytest.mark.parametrize("prune", [tetris.sparsify, tetris.prune.TetrisPruner])
def test_what_takes_too_long_in_the_end_is_warned_of(library_is_right, threads, prune):
    threads(1)
    library_is_right += [1.0, 1.1, 1.25, 1.4, 1.6, 1.8]  # of the dense model, and of each trial
    target = tetris.prune.Latency(0.4, torch.randn(128, 256))
    much = r"measured, \d+\.\d% more than the latency target of"
    with pytest.warns(UserWarning, match=much) as caught:
        prune(mlp(), target=target, exclude="4", reorder=False)
    assert {w.filename for w in caught} == {__file__}


def test_layers_without_kernels_are_refused_before_anything_is_measured(monkeypatch):
    monkeypatch.setattr(latency, "measured_times", lambda *_: pytest.fail("it was measured"))
    target = tetris.prune.Latency(0.4, torch.randn(128, 256).bfloat16())
    with pytest.raises(ValueError, match="layer '0': the weight must be float32"):
        tetris.prune.TetrisPruner(mlp().bfloat16(), target=target, exclude="4")


# -- stand-ins ------------------------------------------------------------------------------------

LAYERS = {
    "linear": (lambda: nn.Linear(64, 96), (7, 64), {}),
    "ragged": (lambda: nn.Linear(61, 93), (7, 61), {}),
    "no order": (lambda: nn.Linear(64, 96), (7, 64), {"reorder": False}),
    "conv": (lambda: nn.Conv2d(32, 48, 3), (2, 32, 9, 9), {}),
    "groups": (lambda: nn.Conv2d(64, 32, 3, groups=2), (1, 64, 7, 7), {}),
    "tied": (lambda: nn.Conv2d(64, 48, 3), (1, 64, 9, 9), {"tie_kernel": True}),
    "transposed": (lambda: nn.ConvTranspose2d(32, 16, 2, stride=2), (1, 32, 5, 5), {}),
    "conv1d": (lambda: nn.Conv1d(32, 48, 5), (1, 32, 20), {}),
}


@pytest.mark.parametrize("which", LAYERS)
@pytest.mark.parametrize("block", [(4, 1), (8, 8)])
def test_stand_ins_store_what_the_choice_will(which, block):
    make, shape, settings = LAYERS[which]
    model, x = nn.Sequential(make()), torch.randn(shape)
    options = {"0": LayerOptions(block=block, sparsity=0.8, **settings)}
    selection = select_layers("test", model, None, None, (type(model[0]),))
    calls = calls_of("test", model, selection.layers, x)
    chosen = {"0": Candidate(1.0, 1.0, block, 0.8)}
    before = torch.random.get_rng_state()
    made = stand_ins("test", selection, options, calls, chosen)["0"]
    assert torch.equal(torch.random.get_rng_state(), before)
    sparse = tetris.sparsify(model, sparsity=0.8, block=block, sweeps=1, **settings)[0]
    assert made.layout.nnz_blocks == sparse.layout.nnz_blocks
    assert (made.row_perm is None) == ("reorder" in settings)
    mask = made.layout.mask()
    dense = copy.deepcopy(model[0])
    with torch.no_grad():
        dense.weight.mul_(mask if which != "transposed" else mask.transpose(0, 1))
    torch.testing.assert_close(made(x), dense(x), rtol=1e-4, atol=1e-5)
    if which == "tied":
        assert torch.equal(mask, mask[:, :, :1, :1].expand_as(mask))


def test_stand_ins_of_a_shared_weight_share_values():
    model = nn.Sequential(nn.Linear(64, 64), nn.Linear(64, 64))
    model[1].weight = model[0].weight
    selection = select_layers("test", model, None, None, (nn.Linear,))
    calls = calls_of("test", model, selection.layers, torch.randn(3, 64))
    options = dict.fromkeys("01", LayerOptions())
    made = stand_ins("test", selection, options, calls, {"0": Candidate(1.0, 1.0, (4, 1), 0.9)})
    assert made["0"].values is made["1"].values
    assert made["1"].bias is model[1].bias
    assert not stand_ins("test", selection, options, calls, {"0": Candidate(1.0, 1.0)})


# -- measuring beside the dense model -------------------------------------------------------------


class Clock:
    """Seconds that layers say they take; `pace` is how slow the machine is."""

    def __init__(self):
        self.now, self.pace = 0.0, itertools.repeat(1.0)

    def __call__(self):
        return self.now

    def layer(self, seconds):
        clock = self

        class Taking(nn.Module):
            def forward(self, x):
                clock.now += seconds * next(clock.pace)
                return x

        return Taking()


@pytest.fixture
def clock(monkeypatch):
    made = Clock()
    monkeypatch.setattr(trials, "clock", lambda: made)
    return made


def layers_of(clock):
    seconds = {"first": 10.0, "second": 20.0, "rest": 2.0}
    return nn.Sequential(collections.OrderedDict((n, clock.layer(s)) for n, s in seconds.items()))


def test_times_are_those_with_the_stand_ins(clock):
    model = layers_of(clock)
    layers = {n: model.get_submodule(n) for n in ("first", "second")}
    before = {n: dict(m.__dict__) for n, m in model.named_modules()}
    times = times_with(model, layers, {"second": clock.layer(4.0)}, torch.zeros(1), 0.032)
    assert times.total == pytest.approx(0.016)  # as if the dense model's 32 s were 32 ms
    assert times.layers == {"first": pytest.approx(0.010), "second": pytest.approx(0.004)}
    assert times.others == pytest.approx(0.002)
    times = times_with(model, layers, {"second": clock.layer(4.0)}, torch.zeros(1))
    assert times == ModelTimes(16.0, {"first": 10.0, "second": 4.0}, 2.0)  # as the clock says
    for name, module in model.named_modules():
        assert module.__dict__.keys() == before[name].keys()
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
    assert relative_time(nn.Sequential(clock.layer(4.0)), model, torch.zeros(1)) == 4.0 / 32.0


def test_a_machine_that_changes_pace_does_not_count(clock):
    """Each round at another pace, which all that take turns in it share."""
    model = layers_of(clock)
    rounds = np.random.default_rng(0).uniform(1.0, 3.0, 40)
    # The three warm up with two calls each of three layers, then take turns.
    paces = [1.0] * 18 + [float(p) for p in rounds for _ in range(9)]
    clock.pace = itertools.chain(paces, itertools.repeat(1.0))
    layers = {"second": model.get_submodule("second")}
    times = times_with(model, layers, {"second": clock.layer(4.0)}, torch.zeros(1), 0.032)
    assert times.total == pytest.approx(0.016)


def test_a_model_that_fails_is_left_as_it_was(clock):
    model = layers_of(clock)

    def fail(x):
        raise RuntimeError("no")

    stand_in = nn.Identity()
    stand_in.forward = fail
    layers = {"second": model.get_submodule("second")}
    with pytest.raises(RuntimeError, match="no"):
        times_with(model, layers, {"second": stand_in}, torch.zeros(1), 1.0)
    assert "forward" not in model.second.__dict__
    assert model.training


def test_a_real_model_is_measured_with_sparse_layers(threads):
    threads(1)
    model, x = mlp(), torch.randn(64, 256)
    sparse = tetris.sparsify(model, sparsity=0.9, reorder=False, exclude="4")
    layers = {"0": model[0], "2": model[2]}
    before = model(x)
    times = times_with(model, layers, {n: sparse.get_submodule(n) for n in layers}, x, 1.0)
    assert all(isinstance(sparse.get_submodule(n), SparseLayer) for n in layers)
    assert set(times.layers) == {"0", "2"}
    assert 0.0 < sum(times.layers.values())
    assert 0.0 < times.total
    assert torch.equal(model(x), before)


RUNS = {
    "calls": lambda model, layers, x: calls_of("test", model, layers, x),
    "dense": measured_times,
    "trial": lambda model, layers, x: times_with(model, layers, layers, x, 1.0),
    "relative": lambda model, layers, x: relative_time(model, model, x),
    "uses": uses_of,
}


@pytest.mark.parametrize("run", RUNS)
@pytest.mark.parametrize("inference", [False, True])
def test_what_is_measured_is_inference(run, inference):
    """No graph is recorded: it takes time, and keeps all activations."""
    recorded = []

    class Probe(nn.Module):
        def forward(self, x):
            recorded.append(x.requires_grad)
            return x

    with torch.inference_mode(inference):  # Parameters made in this mode record none anyway
        model = nn.Sequential(nn.Linear(16, 16), Probe(), nn.Linear(16, 16))
    RUNS[run](model, {"0": model[0], "2": model[2]}, torch.randn(4, 16))
    assert recorded
    assert not any(recorded)


# -- the benchmark --------------------------------------------------------------------------------


def test_the_benchmark_writes_its_table(tmp_path, monkeypatch, capsys, threads):
    from benchmarks import latency_targets

    threads(1)

    small = (nn.Sequential(collections.OrderedDict(a=nn.Linear(64, 64))), torch.randn(4, 64))
    monkeypatch.setattr(latency_targets, "MODELS", {"small": lambda: small})
    plan = latency.LatencyPlan(8.0, 4.0, 1.0, 3.9, 3.92, 1, "made up", ((3.8, 4.75), (3.9, 3.96)))
    report = tetris.prune.SparsifyReport((), {}, plan)

    def sparsify(model, latency, **arguments):
        if latency == 0.1:
            raise ValueError("tetris.sparsify: the latency target is out of reach")
        return model, report

    monkeypatch.setattr(tetris, "sparsify", sparsify)
    words = ["--models", "small", "--shares", "0.5", "0.1", "--out", str(tmp_path)]
    assert latency_targets.main(words) == 0
    text = (tmp_path / "latency_targets.md").read_text()
    row = "8.00 ms | 4.00 ms | 3.80 ms | 4.75 ms | +25.0% | 2 | 3.90 ms | 3.96 ms | 99.0% | 98.0% |"
    assert f"| small | 0.5 | {row}" in text
    assert "| small | 0.1 | out of reach |" in text
    assert "small at 0.1: the latency target is out of reach." in text
    assert "written:" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["mlp", "cnn"])
def test_models_of_the_benchmark_run(name):
    from benchmarks import latency_targets

    model, x = latency_targets.MODELS[name]()
    with torch.no_grad():
        assert model.eval()(x).shape == (len(x), 10)
