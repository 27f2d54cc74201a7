import json
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

import tetris
from tetris.cost import CostModel, Point, Problem, Stored, store
from tetris.cost.calibration import measure_all
from tetris.cost.features import COEFFICIENTS, FAMILIES, TILES, features, seconds
from tetris.cost.fit import fit
from tetris.cost.measure import Draw, Sample, measure, random_layout
from tetris.cost.model import relative_error
from tetris.machine import cpu_model


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))
    return tmp_path


def points(seed=3, count=12):
    return [sample.point for sample in Draw(seed).samples(count)]


@pytest.mark.parametrize(
    ("layer", "shape"),
    [
        (nn.Linear(64, 96), (2, 5, 64)),
        (nn.Conv2d(32, 48, 3, padding=1), (2, 32, 14, 14)),
        (nn.Conv2d(32, 48, 3, stride=2, padding="valid", groups=2), (2, 32, 15, 13)),
        (nn.Conv2d(32, 48, (3, 5), padding="same", dilation=2), (1, 32, 9, 9)),
        (nn.Conv1d(32, 48, 3, padding=1), (32, 50)),
        (nn.ConvTranspose2d(32, 48, 4, stride=2, padding=1), (2, 32, 7, 7)),
    ],
)
def test_a_problem_counts_what_the_layer_computes(layer, shape):
    with torch.no_grad():
        y = layer(torch.zeros(shape))
    problem = Problem.of(layer, shape, y.shape)
    assert problem.tokens * problem.outputs == y.numel()
    assert problem.sources * problem.inputs == math.prod(shape)
    assert problem.weights == layer.weight.numel()
    if not isinstance(layer, nn.ConvTranspose2d):
        assert problem.tokens <= problem.lines <= 2 * problem.tokens + 64
    assert problem.blocking((4, 1)).out_features == problem.outputs


def test_the_lines_of_a_map_are_those_of_the_kernel():
    # csrc/cpu/conv_geometry.h: rows of 14 pixels lie 15 apart, images 15 rows
    problem = Problem.convolution(2, 8, (14, 14), 8, (3, 3), padding=1)
    assert problem.lines == (15 + 13) * 15 + 14
    assert Problem.convolution(2, 8, (14, 14), 8, (1, 1)).lines == 2 * 14 * 14


@pytest.mark.parametrize(
    "layer",
    [
        nn.Conv2d(1, 1, 3, padding=12, dilation=12, bias=False),
        nn.Conv2d(1, 1, (3, 5), stride=(2, 1), padding=(9, 20), dilation=(9, 10), bias=False),
        nn.ConvTranspose2d(1, 1, 3, padding=12, dilation=12, bias=False),
        nn.ConvTranspose2d(1, 1, (3, 4), stride=(2, 1), padding=8, dilation=9, bias=False),
    ],
    ids=str,
)
def test_the_windows_of_a_dilated_kernel_are_the_pixels_that_it_reads(layer):
    nn.init.ones_(layer.weight)
    with torch.no_grad():
        y = layer(torch.ones(2, 1, 17, 19))
    problem = Problem.of(layer, (2, 1, 17, 19), y.shape)
    assert problem.windows == int(y.sum())
    assert problem.computed < 0.75 * problem.lines


def test_a_kernel_that_reaches_next_door_has_no_windows():
    assert Problem.convolution(1, 8, (7, 7), 8, (3, 3), padding=1).windows == 0
    assert Problem.convolution(1, 8, (56, 56), 8, (3, 3), padding=2, dilation=2).windows == 0


def test_far_dilations_are_predicted_by_what_they_read():
    """Of nine taps one reads pixels."""
    model = tetris.cost.load()
    near, far = (
        Problem.convolution(1, 512, (33, 33), 256, (3, 3), padding=d, dilation=d) for d in (1, 36)
    )
    assert model.seconds(Point(far), 1) < model.seconds(Point(near), 1) / 4
    sparse = [model.seconds(Point(p, Stored.of(p, (8, 1), 0.9)), 1) for p in (far, near)]
    assert sparse[0] < sparse[1] / 4


def test_stored_blocks_are_those_that_sparsify_stores():
    layer = nn.Linear(100, 50)
    sparse = tetris.sparsify(layer, sparsity=0.9, block=(4, 1), reorder=False)
    stored = Stored.of(Problem.linear(1, 100, 50), (4, 1), 0.9)
    assert stored.blocks == sparse.layout.nnz_blocks
    assert stored.values == sparse.values.numel()
    # one block in each block row, whatever was asked for
    assert Stored.of(Problem.linear(1, 100, 50), (4, 1), 1.0).blocks == 13


@pytest.mark.parametrize("isa", TILES)
@pytest.mark.parametrize("threads", [1, 4])
def test_time_grows_with_what_is_stored_and_with_tokens(threads, isa):
    model = store.default(isa)

    def predict(tokens, sparsity, block=(16, 1)):
        problem = Problem.linear(tokens, 1024, 2048)
        return model.seconds(Point(problem, Stored.of(problem, block, sparsity)), threads)

    for tokens in (1, 8, 64, 512):
        times = [predict(tokens, s) for s in (0.95, 0.9, 0.75, 0.5)]
        # a second thread is called in where it pays, so that twice the work may take less
        assert times == sorted(times) if threads == 1 else times[0] < times[-1]
    assert predict(64, 0.9) < predict(128, 0.9) < predict(512, 0.9)
    times = [predict(512, 0.9, (height, 1)) for height in (1, 4, 16)]
    if isa == "scalar":  # loads are no bottleneck without vectors
        assert max(times) < 1.01 * min(times)
    else:
        assert times == sorted(times, reverse=True)
    problem = Problem.linear(1, 4096, 4096)
    warm, cold = (model.seconds(Point(problem, None, cold), threads) for cold in (False, True))
    assert cold > warm


@pytest.mark.parametrize("isa", TILES)
def test_instruction_sets_have_figures_of_their_own(isa, monkeypatch):
    """Without AVX-512 neither dense nor sparse layers take the times they take with it."""
    monkeypatch.setattr(tetris._C, "isa_in_use", lambda: isa)
    model = tetris.cost.load()
    assert model.isa == isa
    assert f"with {isa}" in model.source
    problem = Problem.linear(512, 1024, 2048)
    stored = Stored.of(problem, (16, 16), 0.9)
    gain = model.seconds(Point(problem), 1) / model.seconds(Point(problem, stored), 1)
    assert (gain > 4) == (isa != "scalar")


def test_no_figures_of_an_unknown_instruction_set():
    with pytest.raises(ValueError, match="no instruction set 'sse' .avx512, avx2, scalar"):
        store.default("sse")


@pytest.mark.parametrize("height", [1, 2, 3, 4, 5, 8, 16, 32])
@pytest.mark.parametrize(
    ("layer", "shape"),
    [(nn.Linear(64, 96), (960, 64)), (nn.Conv2d(32, 96, 3), (1, 32, 64, 64))],
)
def test_tiles_are_those_of_the_kernels(isa, height, layer, shape):
    """Where cache holds a panel: beyond, low blocks take narrower ones (see Tiles)."""
    tetris.sparsify(layer, sparsity=0.5, block=(height, 1), reorder=False)(torch.ones(shape))
    kernel = tetris._C.last_kernel()
    rows, tokens = map(int, re.search(r"_(\d+)x(\d+)_", kernel).groups())
    tiles = TILES[isa]
    preferred = tiles.vectors if len(shape) == 2 else tiles.conv_vectors
    vectors = next(v for least, v in preferred if height >= least)
    assert rows == math.ceil(height / math.ceil(height / tiles.rows)), kernel
    assert tokens == vectors * tiles.lanes, kernel


def test_a_fit_finds_the_coefficients_that_made_the_times():
    own = [p for p in points(count=60) if p.family == "sparse linear"]
    f = np.stack([features(p, 1, "avx512") for p in own])
    truth = np.array([4e3, 3e3, 0.3, 2.0, 1.5, 0.4, 0.02, 0.1, 0.1, 0.2])
    noise = np.exp(0.05 * np.random.default_rng(0).standard_normal(len(own)))
    times = seconds(f, truth) * noise
    times[::10] *= 8  # disturbed
    found = fit(f, times, np.full(10, 0.2) * np.where(np.arange(10) < 2, 1e4, 1.0))
    error = relative_error(seconds(f, found), seconds(f, truth))
    assert np.median(error) < 0.05
    assert np.percentile(error, 90) < 0.15


def test_held_out_layers_of_a_made_up_machine_are_predicted():
    """The whole way from points to prediction, on times that another formula makes."""

    def truth(point):  # a plain roofline, with a sum where the model has a smooth maximum
        p, stored = point.problem, point.stored
        values = p.weights if stored is None else stored.values
        size = 4 * p.weights if stored is None else stored.bytes
        moved = p.inputs * p.sources + p.outputs * p.tokens
        low = 1 if stored is None else 1 + 2.0 / stored.block[0]
        return 1e-9 * (5e3 + values * p.tokens * 0.02 * low + 0.15 * moved + 0.06 * size)

    own, held = points(0, 40), points(1000, 15)
    model = store.default().fitted(1, own, map(truth, own))
    error = [relative_error(model.seconds(p, 1), truth(p)) for p in held]
    assert np.median(error) < 0.15
    assert set(model.errors[1]) == set(FAMILIES)


def test_draws_repeat_and_seeds_differ():
    first, again, other = (
        [(s.point, s.sparsity) for s in Draw(seed).samples(5)] for seed in (1, 1, 2)
    )
    assert first == again
    assert not {p for p, _ in first} & {p for p, _ in other}
    assert {p.family for p, _ in first} == set(FAMILIES)


@pytest.mark.parametrize(
    "sample",
    [
        Sample(nn.Linear(64, 48, device="meta"), (5, 64), (4, 4), 0.75),
        Sample(nn.Conv2d(32, 64, 3, 2, 1, groups=2, device="meta"), (1, 32, 9, 9), (8, 1), 0.9),
    ],
)
def test_measured_layers_store_what_the_point_says(sample):
    layout = random_layout(sample.point, torch.Generator().manual_seed(0))
    assert layout.nnz_blocks == sample.point.stored.blocks
    assert layout.reordered != "none"
    assert (layout.row_ptr.diff() > 0).all()
    assert 0 < measure(sample) < 1


def test_many_points_at_once_are_predicted_as_one_by_one():
    model, problem = store.default(), Problem.linear(64, 256, 512)
    points = [Point(problem, Stored.of(problem, (8, 1), s)) for s in (0.5, 0.75, 0.9, 0.99)]
    for threads in (1, 2):
        one_by_one = [model.seconds(point, threads) for point in points]
        assert model.seconds_of(points, threads).tolist() == pytest.approx(one_by_one, rel=1e-12)
        assert one_by_one == sorted(one_by_one, reverse=True)


def test_a_calibration_is_kept_and_used(cache):
    count = torch.get_num_threads()
    model = tetris.calibrate(threads=1, quick=True, seed=5)
    assert torch.get_num_threads() == count
    assert list(cache.iterdir()) == [store.path()]
    kept = tetris.cost.load()
    assert kept.source == f"calibrated on this machine ({store.path()})"
    assert (kept.cpu, kept.isa, kept.version) == (
        cpu_model(),
        tetris._C.isa_in_use(),
        tetris.__version__,
    )
    point = Point(Problem.linear(64, 256, 256))
    assert kept.seconds(point, 1) == pytest.approx(model.seconds(point, 1), rel=1e-3)
    assert set(kept.errors[1]) == set(FAMILIES)


def test_without_a_calibration_the_shipped_figures_say_so():
    model = tetris.cost.load()
    assert model.source.startswith("not calibrated here (run `tetris calibrate`)")
    assert set(model.threads[1]) == set(FAMILIES)


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda c: c | {"cpu": "another"}, "another processor: another"),
        (lambda c: c | {"version": "0.0.1"}, "another version of tetris: 0.0.1"),
        (lambda c: c | {"isa": "scalar"}, "another instruction set: scalar"),
        (lambda c: c | {"isa": "none"}, "no instruction set 'none'"),
        (lambda c: c | {"format": 99}, "format 99"),
        (lambda c: c | {"threads": {}}, "numbers of threads"),
        (lambda c: c | {"threads": {"1": {}}}, "KeyError: 'sparse vector'"),
        (lambda c: c | {"coefficients": ["fma"]}, "other names"),
        (lambda c: [], "no file of `tetris calibrate`"),
        (lambda c: {}, "KeyError: 'format'"),
    ],
)
def test_a_file_of_no_use_is_ignored_with_a_warning(change, why):
    isa = tetris._C.isa_in_use()
    shipped = json.loads(store.default().to_json())
    content = shipped | {"cpu": cpu_model(), "isa": isa, "version": tetris.__version__}
    store.path().write_text(json.dumps(content))
    assert tetris.cost.load().source.startswith("calibrated on")
    if why.endswith("scalar") and isa == "scalar":
        pytest.skip("scalar is in use")
    store.path().write_text(json.dumps(change(content)))
    with pytest.warns(UserWarning, match="ignoring .*run `tetris calibrate` again") as caught:
        model = tetris.cost.load()
    assert why in str(caught[0].message)
    assert model.source.startswith("not calibrated here")


@pytest.mark.parametrize("text", ["", "no json", '{"format": 2, "threads": 3}', "\x00"])
def test_a_corrupt_file_is_ignored_with_a_warning(text):
    store.path().write_text(text)
    with pytest.warns(UserWarning, match="no file of `tetris calibrate`"):
        tetris.cost.load()


def test_numbers_in_a_file_must_be_positive():
    content = json.loads(store.default().to_json())
    content["threads"]["1"]["dense linear"][2] = -1.0
    with pytest.raises(ValueError, match="'dense linear' needs 10 positive numbers"):
        CostModel.from_json(json.dumps(content), "test")


def test_passes_are_counted(monkeypatch):
    seen = []

    def measured(samples, threads, passes, advance):
        seen.append(passes)
        return np.full(len(samples), 1e-4)

    monkeypatch.setattr("tetris.cost.calibration.measure_all", measured)
    for passes in (None, 4, np.int64(3)):
        tetris.calibrate(threads=1, quick=True, passes=passes, save=False)
    assert seen == [1, 4, 3]


@pytest.mark.parametrize("passes", [0, -1, 1.5, True, "2"])
def test_bad_passes(passes):
    with pytest.raises(ValueError, match="tetris.calibrate: passes must be at least 1"):
        tetris.calibrate(passes=passes, quick=True)


@pytest.mark.parametrize("threads", [0, -1, [], [1, 0], "two", 1.5])
def test_bad_thread_counts(threads):
    with pytest.raises((ValueError, TypeError), match="tetris.calibrate: threads"):
        tetris.calibrate(threads=threads, quick=True)


def test_measuring_leaves_the_number_of_threads_alone(threads):
    threads(1)
    samples = [Sample(nn.Linear(32, 32, device="meta"), (4, 32))]
    assert measure_all(samples, 2, 2, lambda: None).shape == (1,)
    assert torch.get_num_threads() == 1


def test_other_numbers_of_threads_use_the_nearest_calibration():
    model = store.default()
    one = CostModel(model.cpu, model.isa, model.version, {1: model.threads[1]})
    problem = Problem.linear(2048, 2048, 2048)
    assert one.seconds(Point(problem), 8) < one.seconds(Point(problem), 1)
    assert len(COEFFICIENTS) == len(model.threads[1]["dense linear"])


def test_the_benchmark_writes_its_table(tmp_path, monkeypatch, capsys):
    from benchmarks import cost_model

    monkeypatch.setattr(
        cost_model, "measure_all", lambda s, count, passes, advance: np.full(len(s), 1e-4)
    )
    assert cost_model.main(["--quick", "--threads", "1", "--out", str(tmp_path)]) == 0
    rows = json.loads((tmp_path / "cost_model.json").read_text())["rows"]
    assert [r["family"] for r in rows] == [*FAMILIES, "all"]
    assert all(r["repeat"] == 0 for r in rows)
    assert (tmp_path / "cost_model.md").read_text() in capsys.readouterr().out
