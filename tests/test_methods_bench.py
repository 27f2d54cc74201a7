"""The framework of the experiments with pruning methods, and tiny runs of them."""

import json
import math
import sys
from dataclasses import replace
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from torch import nn

import tetris

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.methods import __main__ as command
from benchmarks.methods import (
    compare,
    data,
    latency,
    networks,
    report,
    stats,
    steps,
    training,
    vrpge,
)
from benchmarks.methods import tetris as tetris_experiment
from benchmarks.methods.experiment import Claim, Row, Setting
from benchmarks.methods.progress import Progress
from benchmarks.methods.training import Recipe
from tetris.timing import Plan


def rows(name, accuracies, **figures):
    return [Row(name, seed, value, **figures) for seed, value in enumerate(accuracies)]


# -- statistics ---------------------------------------------------------------------------------


def test_mean_and_sample_deviation():
    mean, deviation = stats.mean_sd([1.0, 2.0, 4.0])
    assert mean == pytest.approx(7 / 3)
    assert deviation == pytest.approx(np.std([1, 2, 4], ddof=1))
    assert math.isnan(stats.mean_sd([1.0])[1])
    with pytest.raises(ValueError, match="at least one value"):
        stats.mean_sd([])


def test_a_claim_is_judged_by_paired_differences():
    """Seeds differ by far more than variants: unpaired, nothing could be said."""
    worse = [0.5, 0.6, 0.7, 0.8]
    better = [a + d for a, d in zip(worse, (0.02, 0.03, 0.02, 0.03), strict=True)]
    found = stats.compare(rows("a", better) + rows("b", worse), Claim("a", "b"))
    assert found.difference == pytest.approx(0.025)
    assert found.error == pytest.approx(np.std([0.02, 0.03, 0.02, 0.03], ddof=1) / 2)
    assert found.holds
    assert not stats.compare(rows("a", better) + rows("b", worse), Claim("b", "a")).holds


def test_a_claim_within_two_errors_fails():
    some = rows("a", [0.5, 0.7]) + rows("b", [0.5, 0.6])
    found = stats.compare(some, Claim("a", "b"))
    assert found.difference == pytest.approx(0.05)
    assert found.error == pytest.approx(0.05)
    assert found.holds is False


def test_one_seed_cannot_tell():
    assert stats.compare(rows("a", [0.9]) + rows("b", [0.5]), Claim("a", "b")).holds is None


def test_of_time_less_is_better():
    fast = [Row("fast", seed, 0.5, latency_ms=1.0 + 0.1 * seed) for seed in range(3)]
    slow = [Row("slow", seed, 0.5, latency_ms=2.0 + 0.1 * seed) for seed in range(3)]
    found = stats.compare(fast + slow, Claim("fast", "slow", field="latency_ms"))
    assert found.difference == pytest.approx(1.0)
    assert found.holds


def test_extra_figures_can_be_claimed():
    some = [
        Row(name, seed, 0.5, extra={"share": share + seed * 1e-3 * share})
        for name, share in (("a", 0.7), ("b", 0.4))
        for seed in range(3)
    ]
    assert stats.compare(some, Claim("a", "b", field="share")).holds
    with pytest.raises(ValueError, match="row 'a', seed 0, has no 'latency_ms'"):
        stats.compare(some, Claim("a", "b", field="latency_ms"))


def test_names_must_be_unambiguous():
    some = rows("a", [0.5, 0.6], block=(8, 8)) + rows("a", [0.5, 0.6], block=(4, 1))
    assert [r.block for r in stats.by_seed(some, "a 4x1").values()] == [(4, 1)] * 2
    with pytest.raises(ValueError, match="'a' names several rows .* a 8x8, a 4x1"):
        stats.by_seed(some, "a")
    with pytest.raises(ValueError, match="no row is named 'c'"):
        stats.by_seed(some, "c")
    with pytest.raises(ValueError, match=r"same seeds \(got \[0, 1\] and \[0\]\)"):
        stats.compare(some + rows("b", [0.5]), Claim("a 8x8", "b"))


@pytest.mark.parametrize(
    ("row", "label"),
    [
        (Row("a", 0, 0.5), "a"),
        (Row("a", 0, 0.5, block=(16, 1)), "a 16x1"),
        (Row("a", 0, 0.5, block=(16, 1), sparsity=0.875), "a 16x1 87.5%"),
    ],
)
def test_labels(row, label):
    assert row.label == label


# -- data, networks, training -------------------------------------------------------------------


def test_a_split_is_drawn_by_its_seed():
    first, again, other = (data.split("digits", seed) for seed in (0, 0, 1))
    assert first.train_x.shape == (1213, 1, 8, 8)
    assert first.valid_x.shape == (134, 1, 8, 8)
    assert first.test_x.shape == (450, 1, 8, 8)
    assert torch.equal(first.test_y, again.test_y)
    assert not torch.equal(first.test_y, other.test_y)
    assert abs(float(first.train_x.mean())) < 1e-5
    everything = torch.cat([first.train_x, first.valid_x, first.test_x]).flatten(1)
    assert len(everything.unique(dim=0)) > 1790  # no image is in two parts


def test_validation_images_take_the_place_of_test_images():
    found = data.split("digits", 0, images=100)
    assert torch.equal(found.valid_y, data.split("digits", 0).valid_y)
    assert torch.equal(found.validation.test_x, found.valid_x)
    assert torch.equal(found.validation.test_y, found.valid_y)
    assert torch.equal(found.validation.train_x, found.train_x)


def test_a_split_may_be_small_and_flat():
    small = data.split("digits", 0, images=100, flat=True)
    assert small.train_x.shape == (100, 64)
    assert torch.equal(small.train_y, data.split("digits", 0).train_y[:100])


def test_test_images_may_be_fewer():
    small, full = data.split("digits", 0, tests=50), data.split("digits", 0)
    assert len(small.test_x) == len(small.test_y) == 50
    assert torch.equal(small.train_x, full.train_x)
    known = torch.cat([full.test_x, small.test_x]).flatten(1)
    assert len(known.unique(dim=0)) == len(full.test_x.flatten(1).unique(dim=0))


def test_a_split_needs_its_data(tmp_path):
    with pytest.raises(ValueError, match="one of digits, fashion, cifar10, folder"):
        data.split("mnist", 0)
    with pytest.raises(ValueError, match="'cifar10' need a root"):
        data.split("cifar10", 0)
    with pytest.raises(FileNotFoundError, match="train-images"):
        data.split("fashion", 0, root=tmp_path)


@pytest.mark.parametrize(
    ("name", "size", "channels", "maps"),
    [("digits", 8, 1, (8, 4)), ("fashion", 28, 1, (14, 7)), ("cifar10", 32, 3, (16, 8))],
)
def test_the_cnn_has_the_maps_it_says(name, size, channels, maps):
    network = networks.cnn(name, width=4, channels=channels)
    sizes = {}
    for layer in ("conv2", "conv4"):
        network.get_submodule(layer).register_forward_hook(
            lambda _, args, out, layer=layer: sizes.__setitem__(layer, out.shape[-1])
        )
    assert network(torch.zeros(2, channels, size, size)).shape == (2, 10)
    assert tuple(sizes.values()) == maps


def test_the_mlp_ends_without_relu():
    assert [n for n, _ in networks.mlp((4, 8, 8, 2)).named_children()] == [
        "linear1",
        "relu1",
        "linear2",
        "relu2",
        "linear3",
    ]


@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
@pytest.mark.parametrize("schedule", ["linear", "cosine", "constant"])
def test_recipes_train(optimizer, schedule):
    split = data.split("digits", 0, images=200, flat=True)
    torch.manual_seed(0)
    model = networks.mlp((64, 32, 10))
    rate = 1e-2 if optimizer == "adam" else 0.05
    recipe = Recipe(6, 50, rate, optimizer, schedule=schedule)
    made, rates = recipe.optimizer_of(model), []
    reached = training.fit(
        model,
        split,
        recipe,
        0,
        optimizer=made,
        step=lambda: rates.append(made.param_groups[0]["lr"]),
    )
    assert reached > 0.6
    assert len(rates) == 24
    assert rates[-1] == pytest.approx(rate if schedule == "constant" else 0.0, abs=1e-6)


def test_accuracy_before_fine_tuning_is_that_of_fresh_statistics():
    split = data.split("digits", 0, images=300)
    torch.manual_seed(0)
    model = networks.cnn("digits", width=8)
    training.fit(model, split, Recipe(4), 0)
    right = training.accuracy(model, split)
    with torch.no_grad():
        model.get_submodule("conv2").weight.mul_(30.0)  # batch norm would undo it
    assert training.accuracy(model, split) < right - 0.2
    assert training.before(model, split) == pytest.approx(right, abs=0.03)


def test_the_dense_baseline_is_a_copy_trained_on():
    split = data.split("digits", 0, images=300, flat=True)
    torch.manual_seed(0)
    dense = networks.mlp((64, 16, 10))
    start = training.fit(dense, split, Recipe(1), 0)
    weight = dense.get_parameter("linear1.weight").clone()
    model, reached = training.baseline(dense, split, Recipe(6), 1)
    assert torch.equal(dense.get_parameter("linear1.weight"), weight)
    assert reached > start
    assert training.accuracy(model, split) == reached


# -- latency ------------------------------------------------------------------------------------


@pytest.fixture
def sparse_cnn():
    torch.manual_seed(0)
    dense = networks.cnn("digits", width=16).eval()
    return dense, tetris.sparsify(dense, block=(8, 1), include=networks.PRUNED, sweeps=1)


def test_every_network_is_run_in_all_ways(sparse_cnn):
    x = torch.randn(4, 1, 8, 8)
    with torch.inference_mode():
        for model in sparse_cnn:
            found = latency.ways(model, x)  # raises where two disagree
            assert set(found) == {
                "torch NCHW",
                "oneDNN NCHW",
                "torch channels_last",
                "oneDNN channels_last",
            }
    flat = networks.mlp((64, 32, 10)).eval()
    with torch.inference_mode():
        assert set(latency.ways(flat, torch.randn(4, 64))) == {"torch", "oneDNN"}


def test_times_are_of_the_fastest_way(sparse_cnn, monkeypatch):
    x = torch.randn(4, 1, 8, 8)
    seconds = iter([5.0, 3.0, 2.0, 4.0])

    def interleave(calls, plan):
        return {name: np.asarray([2.0, 1.0, 3.0]) * s for name, s in times.items() if name in calls}

    with torch.inference_mode():
        names = [f"dense\0{way}" for way in latency.ways(sparse_cnn[0], x)]
    times = dict(zip(names, seconds, strict=True))
    monkeypatch.setattr(latency, "interleave", interleave)
    found = latency.measure({"dense": sparse_cnn[0]}, x)
    assert found["dense"].ms == pytest.approx(2000.0)
    assert found["dense"].way == "torch channels_last"
    assert found["dense"].quartiles == pytest.approx((3000.0, 4000.0, 5000.0))
    assert found["dense"].x_dense == 1.0


def test_ratios_are_paired_within_a_round(monkeypatch):
    """The second round is four times as slow for both: no ratio shows it."""
    seconds = {"dense": [2.0, 8.0, 2.2], "sparse": [1.0, 4.0, 1.0]}
    monkeypatch.setattr(latency, "ways", lambda model, x: {"torch": lambda: None})
    monkeypatch.setattr(
        latency, "interleave", lambda calls, plan: {n: np.asarray(seconds[n[:-6]]) for n in calls}
    )
    models = {name: nn.Identity() for name in seconds}
    found = latency.measure(models, torch.zeros(1))
    assert found["sparse"].ms == 1000.0
    assert found["sparse"].x_dense == 2.0
    row = latency.timed(Row("sparse", 0, 0.5), found)
    assert (row.latency_ms, row.x_dense) == (1000.0, 2.0)
    assert row.quartiles_ms == (1000.0, 1000.0, 2500.0)
    other = Row("another", 0, 0.5)
    assert latency.timed(other, found) is other
    alone = latency.measure({"sparse": nn.Identity()}, torch.zeros(1))
    assert alone["sparse"].x_dense is None


def test_a_wrong_way_is_noticed(sparse_cnn, monkeypatch):
    monkeypatch.setattr(latency, "prepacked_chain", lambda layers, x: lambda x: torch.ones(4, 10))
    with torch.inference_mode(), pytest.raises(RuntimeError, match="oneDNN NCHW computes somethi"):
        latency.ways(sparse_cnn[0], torch.randn(4, 1, 8, 8))


def test_a_chain_has_no_branches():
    class Residual(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 4)

        def forward(self, x):
            return self.linear(x) + x

    with pytest.raises(ValueError, match=r"must be a sequence of modules \(got add\)"):
        latency.chain(torch.fx.symbolic_trace(Residual()))


# -- reports ------------------------------------------------------------------------------------


@pytest.fixture
def outcome(tmp_path):
    some = [Row("dense", seed, 0.9 + 0.01 * seed, stored=1000, latency_ms=2.0) for seed in range(3)]
    for name, base in (("a", 0.85), ("b", 0.8)):
        for sparsity in (0.5, 0.9):
            some += [
                Row(
                    name,
                    seed,
                    base - 0.1 * sparsity + 0.01 * seed,
                    before=0.3,
                    block=(8, 8),
                    sparsity=sparsity,
                    stored=int(1000 * (1 - sparsity)),
                    latency_ms=2.0 - sparsity,
                    extra={"retained": 0.4},
                )
                for seed in range(3)
            ]
    claims = [Claim("a 8x8 90%", "b 8x8 90%", note="why"), Claim("b 8x8 50%", "a 8x8 50%")]
    setting = Setting("digits", (0, 1, 2), True, tmp_path)
    checks = [("a point", False, "0.1"), ("another", True, "0.2")]
    found = [stats.compare(some, claim) for claim in claims]
    return report.Outcome("name", "A title", setting, some, found, checks, 1.5, "python -m x")


def test_a_table_has_a_line_per_label(outcome):
    head, body = report.cells(outcome.rows)
    assert head[:4] == ["variant", "block", "sparsity", "before, %"]
    assert len(body) == 5
    assert body[0][0] == "dense"
    assert body[0][head.index("before, %")] == ""
    assert body[1][head.index("accuracy, %")] == "81.0 ± 1.0"
    assert body[1][head.index("retained")] == "0.4 ± 0"


def test_failing_points_are_said_to_fail(outcome):
    lines = report.verdicts(outcome)
    assert [line[1] for line in lines] == ["holds", "FAILS", "FAILS", "holds"]
    assert lines[0][0] == "a 8x8 90% beats b 8x8 90%: why"
    assert lines[0][2] == "+0.0500 ± 0.0000"


def test_reports_are_written(outcome):
    paths = report.write(outcome)
    assert [path.name for path in paths] == [f"name-digits.{end}" for end in ("json", "md", "png")]
    saved = json.loads(paths[0].read_text())
    assert len(saved["rows"]) == len(outcome.rows)
    assert saved["claims"][1]["holds"] is False
    assert saved["checks"][0] == {"what": "a point", "holds": False, "measured": "0.1"}
    assert saved["command"] == "python -m x"
    text = paths[1].read_text()
    assert "| a | 8x8 | 90% |" in text
    assert "**" not in text
    assert "(name-digits.png)" in text
    assert paths[2].stat().st_size > 10_000


@pytest.mark.parametrize(
    ("quartiles", "moved", "said"),
    [
        ([(2.0, 2.05, 2.1), (2.05, 2.1, 2.2)], 0.1, False),
        ([(2.0, 2.1, 2.6), (2.0, 2.0, 2.1)], 0.3, True),  # while a seed was measured
        ([(2.0, 2.0, 2.0), (3.0, 3.0, 3.0)], 0.5, True),  # between seeds
    ],
)
def test_a_busy_machine_is_noted(outcome, quartiles, moved, said):
    dense = [Row("dense", s, 0.9, latency_ms=2.0, quartiles_ms=q) for s, q in enumerate(quartiles)]
    slow = Row("a", 0, 0.9, latency_ms=2.0, x_dense=1.5, quartiles_ms=(1.0, 5.0, 9.0))
    found = replace(outcome, rows=[*dense, slow])
    assert report.moved(found.rows) == pytest.approx(moved)
    text = report.markdown(found)
    assert (f"The machine was busy: dense times moved by {100 * moved:.0f} %." in text) is said
    assert "median of the ratios" in text
    head, body = report.cells(found.rows)
    assert [line[head.index("x dense")] for line in body] == ["", "1.5"]


def test_the_page_says_what_settings_were_chosen_on(outcome):
    text = report.markdown(outcome)
    assert "settings were looked for by test accuracy on seeds 0 to 2" in text
    assert "settings of their own" in text
    assert report.moved(outcome.rows) is None


def test_nothing_is_drawn_of_single_points(outcome):
    single = [row for row in outcome.rows if row.sparsity != 0.5]
    assert report.plot(replace(outcome, rows=single), outcome.setting.out / "x.png") is None


def test_one_seed_has_no_spread(outcome):
    one = replace(outcome, rows=[row for row in outcome.rows if row.seed == 0])
    assert "±" not in json.dumps(report.cells(one.rows), ensure_ascii=False)


# -- the command --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "seeds", "folder"),
    [
        ([], 5, "benchmarks/results/methods"),
        (["--quick"], 1, "build/benchmarks/methods"),
        (["--seeds", "3"], 3, "build/benchmarks/methods"),
        (["--seeds", "8"], 8, "benchmarks/results/methods"),
        (["--seeds", "8", "--out", "here"], 8, "here"),
    ],
)
def test_only_full_runs_replace_the_published_ones(words, seeds, folder):
    args = command.parser().parse_args(["--method", "tetris", *words])
    setting = command.setting_of(args)
    assert setting.seeds == tuple(range(seeds))
    assert setting.out == Path(folder)


def test_seeds_start_where_they_are_told_to():
    words = ["--method", "tetris", "--seeds", "3", "--first-seed", "10"]
    assert command.setting_of(command.parser().parse_args(words)).seeds == (10, 11, 12)


def test_unknown_methods_and_data_are_explained(capsys):
    with pytest.raises(SystemExit):
        command.main(["--method", "magic"])
    assert "choose from" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        command.main(["--method", "tetris", "--data", "folder"])
    assert "takes --data digits, fashion, cifar10 (got folder)" in capsys.readouterr().err


def run(experiment, tmp_path, seeds=2):
    said = Console(file=StringIO(), width=200)
    setting = Setting("digits", tuple(range(seeds)), True, tmp_path)
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found = command.run(experiment, setting, "python -m benchmarks.methods", said)
    finally:
        torch.set_num_threads(before)
    report.show(found, said)
    report.write(found)
    return found, said.file.getvalue()


@pytest.fixture
def hasty(monkeypatch):
    """Experiments with hardly any training and timing."""
    short = Recipe(1, 100, 3e-3)
    for plans in (tetris_experiment._DENSE, tetris_experiment._TUNE):
        monkeypatch.setitem(plans, "digits", short)
    monkeypatch.setitem(tetris_experiment._WIDTH, "digits", 64)
    monkeypatch.setitem(tetris_experiment._IMAGES, "digits", 200)
    monkeypatch.setattr(tetris_experiment, "SWEEPS", 1)
    monkeypatch.setitem(
        compare._PLANS, "digits", compare.Plan(200, None, short, short, short, batch=4)
    )
    quick = Plan(sample_s=0.0, budget_s=0.0, min_rounds=2, max_rounds=2)
    measure = latency.measure
    monkeypatch.setattr(latency, "measure", lambda models, x: measure(models, x, quick))


def test_tiny_run_of_tetris(hasty, tmp_path):
    found, said = run(tetris_experiment.EXPERIMENT, tmp_path)
    labels = {row.label for row in found.rows}
    assert len(labels) == 2 + 2 * 7
    assert len(found.rows) == 2 * len(labels)
    by_label = stats.by_seed(found.rows, "random 16x16 90%")
    assert by_label[0].stored == 2 * (16 - 14) * 256  # whole blocks of two layers
    retained = {
        name: by_seed.extra["retained"]
        for name in ("random", "identity", "swaps from identity")
        for by_seed in [stats.by_seed(found.rows, f"{name} 8x8 90%")[0]]
    }
    assert list(retained.values()) == sorted(retained.values())
    assert all(row.latency_ms > 0 for row in found.rows)
    assert (tmp_path / "tetris-digits.md").exists()
    assert "planted 32x32 blocks" in said
    synthetic = [check for check in found.checks if "planted" in check[0] or "gain" in check[0]]
    assert synthetic
    assert all(holds for _, holds, _ in synthetic)


def test_tiny_run_of_the_comparison(hasty, tmp_path):
    found, said = run(compare.EXPERIMENT, tmp_path)
    variants = {row.variant for row in found.rows}
    assert variants == {"dense", *compare.METHODS}
    stored = {row.stored for row in found.rows if row.sparsity == 0.75}
    assert stored == {64512 // 4}
    assert {row.stored for row in found.rows if row.sparsity == 0.875} == {64512 // 8}
    assert {row.epochs for row in found.rows} == {3}
    assert all(row.before is not None and row.valid is not None for row in found.rows)
    assert (tmp_path / "compare-digits.png").exists()
    assert "equal numbers of stored weights at 75%, to 2%" in said


def stored_rows(*stored, block=(8, 8)):
    names = ("x", "y")
    return [
        Row(name, 0, 0.9, block=block, sparsity=0.9, stored=n)
        for name, n in zip(names, stored, strict=False)
    ]


def test_a_block_of_whole_kernels_more_is_not_equal_storage():
    ((_, holds, measured),) = compare._equal_storage(stored_rows(4032, 4032 + 64))
    assert holds
    ((_, holds, measured),) = compare._equal_storage(stored_rows(4032, 4032 + 9 * 64))
    assert not holds
    assert measured == "4032 to 4608"
    assert not list(compare._equal_storage(stored_rows(4032)))  # one variant equals itself


@pytest.mark.parametrize(
    ("stored", "holds"), [(6554, True), (6553 + 512, True), (7168, False), (5900, False)]
)
def test_storing_less_is_not_equal_storage(stored, holds):
    """Two layers of 16x16 blocks: a tenth of 65536 weights, 512 more or less."""
    dense = [Row("dense", 0, 0.9, stored=65536)]
    found = tetris_experiment._equal_storage([*dense, *stored_rows(stored, block=(16, 16))])
    assert found[1] is holds


def test_tiny_run_of_vrpge(hasty, tmp_path, monkeypatch):
    monkeypatch.setitem(vrpge._TRAIN, "digits", Recipe(4, 100, 3e-3))
    monkeypatch.setitem(vrpge._TUNE, "digits", Recipe(1, 100, 3e-3))
    monkeypatch.setitem(vrpge._IMAGES, "digits", 200)
    found, said = run(vrpge.EXPERIMENT, tmp_path)
    assert {row.variant for row in found.rows} == {
        *("dense", "magnitude", "input norm", "random static", "random static, equal passes"),
        *("VR-PGE Ks=2", "VR-PGE Ks=4"),
    }
    verdict = {what: holds for what, holds, _ in found.checks}
    assert verdict["every pruned layer keeps blocks, in all rows"]
    assert "median accuracy of VR-PGE Ks=2" in said
    assert not any("step of" in what for what in verdict)  # timed by benchmarks.methods.steps alone
    cut = [replace(row, extra={**row.extra, "fewest blocks": 0}) for row in found.rows[:1]]
    checks = vrpge.EXPERIMENT.check(cut + found.rows[1:])
    assert [what for what, holds, _ in checks if "keeps blocks" in what and not holds]


def test_rivals_of_vrpge_keep_blocks_in_every_layer():
    """A first layer that is far heavier, as wide layers beside noise are, takes nothing away."""
    model = networks.mlp((256, 128, 64, 10))
    with torch.no_grad():
        model.linear1.weight.mul_(1e3)
    for worth in ("magnitude", vrpge.random(model, 0)):
        assert vrpge.blocks_of(vrpge.keep(model, worth)) == {"linear1": 26, "linear2": 7}


def test_rivals_of_vrpge_clip_gradients(monkeypatch):
    norms = []

    class Watching(torch.optim.SGD):
        def step(self, closure=None):
            grads = [p.grad for group in self.param_groups for p in group["params"]]
            norms.append(float(nn.utils.get_total_norm(grads)))
            return super().step(closure)

    monkeypatch.setattr(vrpge, "CLIP", 1e-3)
    monkeypatch.setattr(Recipe, "optimizer_of", lambda _, m: Watching(m.parameters(), 0.1))
    small = data.split("digits", 0, images=100, flat=True)
    vrpge.trained(networks.mlp((64, 16, 10)), small, Recipe(1, 50), 0)
    assert norms == pytest.approx([1e-3] * 2, rel=1e-2)


# -- steps of VR-PGE ------------------------------------------------------------------------------


def timed(dense):
    """Step times whose ratio to a dense step is 1/2, but in one round."""
    dense = np.asarray(dense)
    sampled = 0.5 * dense * np.where(np.arange(len(dense)) == 0, 2.0, 1.0)
    times = {"torch": 2 * dense, "oneDNN": dense, "start": sampled}
    return steps.judge("1-2", 0.2, ["torch", "oneDNN"], times)


def test_a_step_is_judged_against_the_faster_dense_one_round_by_round():
    (step,) = timed([1e-3] * 8)
    assert (step.dense_by, step.dense_ms, step.ms) == ("oneDNN", 1.0, 0.5)
    assert (step.low, step.ratio, step.high) == (0.5, 0.5, 0.5)
    assert step.drift == 0.0
    assert steps.warning([step]) is None


def test_a_machine_that_is_not_quiet_is_told_of():
    assert steps.warning(timed([1e-3] * 4 + [1.09e-3] * 4)) is None
    told = steps.warning(timed([1e-3] * 8) + timed([1e-3] * 4 + [0.8e-3] * 4))
    assert told is not None
    assert "moved by -20% between the halves" in told


def test_steps_write_files_of_their_own(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(steps, "measure", lambda sizes, kept, block: timed([1e-3] * 4 + [2e-3] * 4))
    monkeypatch.setattr(steps, "TARGETS", {0.2: 0.5})
    monkeypatch.setattr(steps, "BLOCKS", ((16, 16),))
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)
    assert steps.main(["--quick", "--out", str(tmp_path)]) == 0
    assert {path.name for path in tmp_path.iterdir()} == {"steps.md", "steps.json"}
    text = (tmp_path / "steps.md").read_text()
    assert "| 0.50 (0.50-0.50) | +100% |" in text
    assert "Warning: the machine was not quiet" in text
    assert "Warning" in capsys.readouterr().out
    (saved,) = json.loads((tmp_path / "steps.json").read_text())["steps"]
    assert (saved["low"], saved["high"], saved["drift"]) == (0.5, 0.5, 1.0)


# -- equal time -----------------------------------------------------------------------------------


def curve(points):
    return [
        Row("x", 0, accuracy, sparsity=0.5, latency_ms=ms, valid=rest[0] if rest else accuracy)
        for ms, accuracy, *rest in points
    ]


def test_accuracy_at_a_time_lies_between_measured_points():
    found = curve([(4.0, 0.9), (1.0, 0.7)])
    assert compare.at_time(found, 1.0) == pytest.approx(0.7)
    assert compare.at_time(found, 2.0) == pytest.approx(0.8)  # halfway between 1 and 4
    assert compare.at_time(found, 4.0) == pytest.approx(0.9)


def test_slower_networks_that_are_no_better_do_not_count():
    assert compare.at_time(curve([(1.0, 0.8), (2.0, 0.7), (4.0, 0.9)]), 2.0) == pytest.approx(0.85)


def test_which_networks_count_is_chosen_on_validation_images():
    """The one at 2 ms is luckier on test images only, that at 3 ms worse on these only."""
    found = curve([(1.0, 0.8, 0.8), (2.0, 0.95, 0.8), (3.0, 0.7, 0.85), (4.0, 0.9, 0.9)])
    assert compare.at_time(found, 3.0) == pytest.approx(0.7)
    assert compare.at_time(found, 3.0**0.5) == pytest.approx(0.75)


def two_methods(sparsities, scale):
    return [
        Row(
            name,
            seed,
            accuracy := 0.99 - 0.2 * s + gain,
            sparsity=s,
            latency_ms=factor * (2 - s),
            valid=accuracy,
        )
        for name, gain, factor in (("a", 0.0, 1.0), ("b", 0.05, scale))
        for seed in range(2)
        for s in sparsities
    ]


@pytest.mark.parametrize(
    ("sparsities", "verdict"), [(compare.QUICK, None), (compare.SPARSITIES, False)]
)
def test_equal_time_needs_times_in_common(sparsities, verdict):
    """A quick run may have none; a full one must."""
    ((what, holds, _),) = compare._equal_time(two_methods(sparsities, 10.0))
    assert what == "all methods reach a common time"
    assert holds is verdict


def test_equal_time_compares_with_single_weights():
    checks = list(compare._equal_time(two_methods((0.5, 0.75, 0.9, 0.95), 1.0)))
    assert [holds for _, holds, _ in checks] == [True] * 3
    assert [what for what, _, _ in checks] == [
        f"at {ms} ms b beats a" for ms in ("1.050", "1.255", "1.500")
    ]
    assert checks[0][2].startswith("+0.0500")


def test_progress_without_a_terminal_is_a_log():
    console = Console(file=StringIO())
    with Progress(console) as progress:
        progress.plan(2)
        progress.describe("one thing")
        progress.advance()
    assert "one thing" in console.file.getvalue()
