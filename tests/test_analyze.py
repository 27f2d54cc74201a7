import json
import math
import re
from dataclasses import replace

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import tetris
from tetris import cli
from tetris.analysis.report import LEAST_GAIN
from tetris.analysis.weights import analyze_file
from tetris.cost import CostModel, store
from tetris.nn import SparseLayer

QUICK = {"sweeps": 1, "blocks": [(4, 1), (16, 16)], "sparsities": [0.75]}


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path_factory.mktemp("cache")))


@pytest.fixture(autouse=True)
def one_thread(threads):
    threads(1)
    torch.manual_seed(0)


def mlp():
    return nn.Sequential(nn.Linear(256, 512), nn.ReLU(), nn.Linear(512, 256))


def cnn():
    return nn.Sequential(
        nn.Conv2d(3, 32, 3, padding=1),
        nn.Conv2d(32, 64, 3, padding=1, stride=2),
        nn.Conv2d(64, 64, 1, groups=2),
        nn.Flatten(),
        nn.Linear(64 * 49, 10),
    )


def test_every_layer_block_and_sparsity_is_reported():
    model = mlp()
    weights = [p.clone() for p in model.parameters()]
    report = tetris.analyze(model, torch.randn(3, 5, 256), **QUICK)
    assert [r.name for r in report.layers] == ["0", "2"]
    assert [r.tokens for r in report.layers] == [15, 15]
    assert [r.shape for r in report.layers] == [(512, 256), (256, 512)]
    for layer in report.layers:
        assert [c.block for c in layer.choices] == [(4, 1), (16, 16)]
        assert layer.dense_ms > 0
        for c in layer.choices:
            assert c.identity_retained <= c.retained <= c.unstructured_retained
            assert c.l1_sort_retained <= c.retained
            assert c.speedup == pytest.approx(layer.dense_ms / c.predicted_ms)
            assert c.sparsity == pytest.approx(0.75)
            assert c.measured_ms is None
    for parameter, before in zip(model.parameters(), weights, strict=True):
        assert torch.equal(parameter, before)
    assert report.source.startswith("not calibrated here")
    assert not any(m._forward_hooks for m in model.modules())


def test_retained_saliency_is_what_sparsify_reports():
    model = mlp()
    report = tetris.analyze(model, **QUICK)
    _, made = tetris.sparsify(model, sparsity=0.75, block=(4, 1), sweeps=1, return_report=True)
    for seen, layer in zip(report.layers, made.layers, strict=True):
        choice = seen.choices[0]
        assert choice.retained == pytest.approx(layer.retained, rel=1e-5)
        assert choice.identity_retained == pytest.approx(layer.identity_retained)
        assert choice.l1_sort_retained == pytest.approx(layer.l1_sort_retained)
        assert choice.unstructured_retained == pytest.approx(layer.unstructured_retained)


def test_convolutions_count_their_output_positions():
    report = tetris.analyze(cnn(), torch.randn(2, 3, 14, 14), **QUICK)
    layers = {r.name: r for r in report.layers}
    assert layers["1"].tokens == layers["2"].tokens == 2 * 49
    assert layers["4"].tokens == 2
    assert "3 input channels" in report.skipped["0"]
    # a block that covers a layer is made smaller, as sparsify does it
    small = tetris.analyze(nn.Linear(16, 8), sweeps=1, blocks=[(32, 32)] * 2, sparsities=[0.5] * 2)
    (choice,) = small.layers[0].choices  # once, though asked twice
    assert choice.block == (8, 8)


def test_calls_add_up():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(64, 64)

        def forward(self, x):
            return self.layer(self.layer(x))

    once = tetris.analyze(nn.Linear(64, 64), torch.randn(9, 64), **QUICK).layers[0]
    twice = tetris.analyze(Twice(), torch.randn(9, 64), **QUICK).layers[0]
    assert (twice.calls, twice.tokens) == (2, 18)
    assert twice.dense_ms == pytest.approx(2 * once.dense_ms)
    tied = mlp()
    tied[0] = nn.Linear(256, 256)
    tied[2] = nn.Linear(256, 256)
    tied[2].weight = tied[0].weight
    report = tetris.analyze(tied, torch.randn(9, 256), **QUICK)
    assert [(r.name, r.calls) for r in report.layers] == [("0", 2)]


@pytest.mark.parametrize("kernels", ["avx512", "avx2"])  # scalar ones would lose
def test_recommendations_are_what_sparsify_takes(kernels):
    model = mlp()
    x = torch.randn(256, 256)
    report = tetris.analyze(model, x, cost=store.default(kernels), **QUICK)
    assert report.dense == ()
    for layer in report.layers:
        assert layer.best is not None
        assert layer.best.speedup >= LEAST_GAIN
        assert "predicted to be" in layer.reason
    sparse, made = tetris.sparsify(
        model,
        overrides=report.overrides(),
        exclude=report.dense,
        reorder=False,
        return_report=True,
    )
    assert all(isinstance(sparse[i], SparseLayer) for i in (0, 2))
    for layer, seen in zip(made.layers, report.layers, strict=True):
        assert layer.block == seen.best.block
        assert layer.block_sparsity == pytest.approx(seen.best.sparsity)


def with_sparse(**changes):
    """The shipped model, with these coefficients of sparse kernels."""
    from tetris.cost.features import COEFFICIENTS

    shipped = store.default()
    sets = {
        family: tuple(changes.get(name, c) for name, c in zip(COEFFICIENTS, own, strict=True))
        if "sparse" in family
        else own
        for family, own in shipped.threads[1].items()
    }
    return CostModel(shipped.cpu, shipped.isa, shipped.version, {1: sets}, {}, "made up")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"call": 1e9}, "it is too small: a call of a sparse layer takes"),
        ({"read": 1e3}, "packing its inputs and storing its outputs takes"),
        ({"fma": 1e3}, "too much is stored"),
    ],
)
def test_where_sparse_would_lose_it_says_so_and_why(changes, why):
    report = tetris.analyze(mlp(), torch.randn(64, 256), cost=with_sparse(**changes), **QUICK)
    assert report.dense == ("0", "2")
    assert report.overrides() == {}
    for layer in report.layers:
        assert layer.best is None
        assert layer.reason.startswith("leave it dense: ")
        assert why in layer.reason
        assert all(c.speedup < LEAST_GAIN for c in layer.choices)
    assert "made up" in str(report)


def test_without_an_example_there_are_no_times():
    report = tetris.analyze(mlp(), **QUICK)
    assert all(math.isnan(layer.dense_ms) and layer.best is None for layer in report.layers)
    assert "pass example_inputs" in str(report)
    assert "speed-up" not in str(report)
    assert report.to_dict()["layers"][0]["dense_ms"] is None
    with pytest.raises(ValueError, match=r"AnalysisReport\.dense: .*pass example_inputs="):
        report.dense  # noqa: B018  # all layers, if it did not raise: nothing left to prune
    with pytest.raises(ValueError, match=r"AnalysisReport\.overrides: .*pass example_inputs="):
        report.overrides()


@pytest.mark.parametrize(("wrong", "right"), [("block", "blocks"), ("sparsity", "sparsities")])
def test_the_names_that_sparsify_has_are_corrected(wrong, right):
    with pytest.raises(TypeError, match=f"unexpected argument '{wrong}' .did you mean '{right}'"):
        tetris.analyze(mlp(), **{wrong: 0.9})


def test_a_choice_that_a_small_layer_cannot_tell_from_another_is_there_once():
    """Each of the 16 block rows keeps one of 4 blocks: 90 % is 75 %."""
    layer = nn.Linear(64, 256)
    report = tetris.analyze(layer, blocks=[(16, 16)], sparsities=[0.5, 0.75, 0.9], sweeps=1)
    assert [choice.sparsity for choice in report.layers[0].choices] == [0.5, 0.75]


class Tied(nn.Module):
    """Two layers with one weight, and one of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.second, self.last = (nn.Linear(256, 256) for _ in range(3))
        self.second.weight = self.first.weight

    def forward(self, x):
        return self.last(self.second(self.first(x)))


@pytest.mark.parametrize("tokens", [1024, 1])
def test_recommendations_for_layers_that_share_a_weight(tokens):
    """They name all of them: sparsify takes no other setting for one of several."""
    model = Tied()
    choice = {"sparsities": [0.75], "blocks": [(16, 1)]} if tokens > 1 else {"sparsities": [0.0]}
    choice["cost"] = store.default("avx2")  # scalar kernels would lose
    report = tetris.analyze(model, torch.randn(tokens, 256), sweeps=1, exclude="last", **choice)
    (layer,) = report.layers
    assert (layer.name, layer.tied, layer.calls) == ("first", ("second",), 2)
    if tokens > 1:
        overrides = report.overrides()
        assert set(overrides) == {"first", "second"}
        assert report.dense == ()
        sparse = tetris.sparsify(model, overrides=overrides, exclude="last", sweeps=1)
        assert sparse.first.values is sparse.second.values
    else:
        assert report.dense == ("first", "second")
        tetris.sparsify(model, exclude=report.dense, sweeps=1)
    assert report.to_dict()["layers"][0]["tied"] == ["second"]


class Called(nn.Module):
    """Calls a layer by keyword, as often as there are tensors."""

    def __init__(self, layer, name):
        super().__init__()
        self.layer, self.name = layer, name

    def forward(self, *inputs):
        return [self.layer(**{self.name: x}) for x in inputs]


def test_inputs_by_keyword_whatever_its_name():
    conv1d = pytest.importorskip("transformers.pytorch_utils").Conv1D(128, 256)
    for layer, name in ((conv1d, "x"), (nn.Linear(256, 128), "input")):
        report = tetris.analyze(Called(layer, name), torch.randn(32, 256), **QUICK)
        assert report.layers[0].tokens == 32


def test_calls_without_tokens():
    """One of several takes no time; a layer that has only such ones cannot be timed."""
    model, x = Called(nn.Linear(256, 128), "input"), torch.randn(32, 256)
    assert tetris.analyze(model, (x, x[:0]), **QUICK).layers[0].calls == 1
    with pytest.raises(
        ValueError, match=r"analyze: the example does not go through 'layer', or is empty there"
    ):
        tetris.analyze(model, x[:0], **QUICK)


def test_an_example_that_does_not_fit():
    with pytest.raises(
        ValueError, match=r"tetris.analyze: the model does not take .* float32\[3, 7\]"
    ):
        tetris.analyze(mlp(), torch.randn(3, 7), **QUICK)
    with pytest.raises(ValueError, match=r"tetris.sparsify: the model does not take"):
        tetris.sparsify(mlp(), latency=0.5, example_inputs=torch.randn(3, 7))


def test_measuring_leaves_random_numbers_alone():
    model, x = mlp(), torch.randn(16, 256)
    state = torch.get_rng_state()
    tetris.analyze(model, x, measure=True, **QUICK)
    assert torch.equal(torch.get_rng_state(), state)


def test_measured_times_on_request():
    report = tetris.analyze(mlp(), torch.randn(16, 256), measure=True, **QUICK)
    for layer in report.layers:
        assert layer.dense_measured_ms > 0
        assert all(c.measured_ms > 0 for c in layer.choices)
    assert "measured: dense" in str(report)


def test_prints_converts_and_draws(tmp_path):
    report = tetris.analyze(cnn(), torch.randn(1, 3, 14, 14), **QUICK)
    text = str(report)
    for word in ("64x32x3x3", "speed-up", "16x16", "skipped: 3 input channels", "1 thread"):
        assert word in text
    table = report.to_markdown()
    rows = [line for line in table.splitlines() if line.startswith("|")]
    assert len(rows) == 2 + sum(len(layer.choices) for layer in report.layers)
    assert len({row.count("|") for row in rows}) == 1
    content = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert content["layers"][0]["choices"][0]["block"] == [4, 1]
    pytest.importorskip("matplotlib")
    report.plot(tmp_path / "analysis.png")
    assert (tmp_path / "analysis.png").stat().st_size > 1000
    tetris.analyze(mlp(), **QUICK).plot(tmp_path / "untimed.svg")


def test_threads_are_predicted_for():
    model, x = mlp(), torch.randn(512, 256)
    one, two = (tetris.analyze(model, x, threads=t, **QUICK) for t in (1, 2))
    assert two.layers[0].dense_ms < one.layers[0].dense_ms
    assert (one.threads, two.threads) == (1, 2)


def test_a_report_says_which_threads_its_times_were_measured_on():
    """What they are on others is what the formula makes of it."""
    model, x = mlp(), torch.randn(512, 256)
    cost = tetris.cost.load()
    most = max(cost.threads)
    assert most < 99
    asked = {t: tetris.analyze(model, x, cost=cost, threads=t, **QUICK) for t in (most, 99)}
    assert asked[most].source == cost.source
    counts = " and ".join(map(str, sorted(cost.threads)))
    assert asked[99].source == f"{cost.source}, on {counts} threads only"
    assert f"99 threads; cost model {asked[99].source}" in str(asked[99]).replace("\n", " ")
    one = replace(cost, threads={1: cost.threads[1]})
    found = tetris.analyze(model, x, cost=one, threads=2, **QUICK)
    assert found.source.endswith(", on 1 thread only")


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"blocks": []}, ValueError, "blocks and sparsities must each name one"),
        ({"blocks": (4, 1)}, ValueError, "blocks: block must be two ints"),
        ({"sparsities": 0.9}, TypeError, r"sparsities must be several, such as \[0.75, 0.9\]"),
        ({"sparsities": [90]}, ValueError, "for 90 % pass 0.9"),
        ({"threads": 0}, ValueError, "threads must be at least 1"),
        ({"measure": True}, ValueError, "measure=True needs example_inputs"),
        ({"cost": 3}, TypeError, "cost must be a tetris.cost.CostModel"),
        ({"speed": 3}, TypeError, "speed"),
        ({"include": "none"}, ValueError, "matches no module"),
        ({"importance": {"9": torch.ones(1)}}, ValueError, "not pruned: '9'"),
    ],
)
def test_bad_arguments(arguments, error, message):
    with pytest.raises(error, match="tetris.analyze: .*" + message):
        tetris.analyze(mlp(), **arguments)


def test_measuring_needs_torchs_number_of_threads():
    with pytest.raises(ValueError, match="torch.set_num_threads first"):
        tetris.analyze(mlp(), torch.randn(4, 256), measure=True, threads=7)


# -- the command ----------------------------------------------------------------------------------


@pytest.fixture
def weights(tmp_path):
    tensors = {
        "fc.weight": torch.randn(128, 96).to(torch.bfloat16),
        "fc.bias": torch.randn(128),
        "conv.weight": torch.randn(64, 32, 3, 3),
        "stem.weight": torch.randn(64, 3, 7, 7),
        "head.weight": torch.randn(4, 96),
        "table": torch.randn(100, 100),
        "line.weight": torch.randn(32, 32, 3),
    }
    path = tmp_path / "model.safetensors"
    save_file(tensors, path)
    return path


FAST = ["--seconds", "0", "--blocks", "4x1", "--sparsity", "75"]


def test_a_file_is_analyzed_without_code(weights, capsys):
    assert cli.main(["analyze", str(weights), *FAST, "--tokens", "64", "--map", "28x20"]) == 0
    text = capsys.readouterr().out
    assert re.search(r"^ fc +128x96", text, re.MULTILINE)  # the module, as sparsify names it
    assert re.search(r"^ head +4x96", text, re.MULTILINE)
    assert "stem: skipped: 3 input channels per group" in text
    assert "table: skipped: a tensor not called weight" in text
    assert "line: skipped: 3-D" in text
    assert "bias" not in text
    assert "560" in text  # 28 * 20 positions


def test_json_for_programs(weights, capsys):
    arguments = [*FAST, "--json", "-", "--batch", "2", "--threads", "1", "--include", "conv", "f*"]
    assert cli.main(["analyze", str(weights), *arguments, "--exclude", "fc"]) == 0
    printed = capsys.readouterr()
    assert "conv" in printed.err  # the table
    content = json.loads(printed.out)
    [layer] = content["layers"]
    assert (layer["name"], layer["tokens"]) == ("conv", 2 * 14 * 14)
    assert layer["choices"][0]["speedup"] > 0
    assert content["skipped"]["fc"] == "excluded"
    assert content["skipped"]["head"] == "not included"


def test_json_in_a_file(weights, tmp_path, capsys):
    out = tmp_path / "analysis.json"
    assert cli.main(["analyze", str(weights), *FAST, "--include", "fc", "--json", str(out)]) == 0
    assert f"written: {out}" in capsys.readouterr().out.replace("\n", "")
    assert [layer["name"] for layer in json.loads(out.read_text())["layers"]] == ["fc"]
    assert cli.main(["analyze", str(weights), "--json", str(tmp_path / "none" / "x")]) == 1
    printed = capsys.readouterr()
    assert "--json: there is no folder" in printed.err
    assert printed.out == ""


def test_a_file_names_and_chooses_layers_as_sparsify_does(tmp_path):
    layers = {
        "in": nn.Linear(128, 64),
        "body": nn.Sequential(nn.Linear(64, 10), nn.Linear(10, 128)),
    }
    model = nn.ModuleDict(layers)
    save_file(model.state_dict(), tmp_path / "f")
    grid = {"blocks": [(4, 1), (16, 16)], "sparsities": [0.75], "sweeps": 1}
    for include, exclude in (("*", ()), ("body", ()), ("*", ["body.0"]), ("*.1", ())):
        found = analyze_file(tmp_path / "f", include=[include], exclude=exclude, **grid)
        same = tetris.analyze(model, None, include=include, exclude=exclude, **grid)
        assert {layer.name for layer in found.layers} == {layer.name for layer in same.layers}
        blocks = [{layer.name: [c.block for c in layer.choices] for layer in r.layers}
                  for r in (found, same)]  # fmt: skip
        assert blocks[0] == blocks[1]
        assert found.skipped == same.skipped


def test_a_file_and_a_model_are_predicted_alike(weights):
    [layer] = analyze_file(
        weights, tokens=64, include=["fc"], blocks=[(4, 1)], sparsities=[0.75], sweeps=1
    ).layers
    model = nn.Linear(96, 128)
    [same] = tetris.analyze(
        model, torch.randn(64, 96), blocks=[(4, 1)], sparsities=[0.75], sweeps=1
    ).layers
    assert layer.dense_ms == pytest.approx(same.dense_ms)
    assert layer.choices[0].predicted_ms == pytest.approx(same.choices[0].predicted_ms)


def test_weights_that_are_not_finite_are_named_and_the_rest_analyzed(tmp_path):
    save_file(
        {"a.weight": torch.full((32, 32), torch.nan), "b.weight": torch.ones(32, 32)},
        tmp_path / "f",
    )
    report = analyze_file(tmp_path / "f", blocks=[(4, 1)], sparsities=[0.5])
    assert [layer.name for layer in report.layers] == ["b"]
    assert report.skipped == {"a": "not finite"}


def test_a_sparse_file_is_told_apart(tmp_path):
    tetris.save(tetris.sparsify(nn.Sequential(nn.Linear(32, 32)), reorder=False), tmp_path / "f")
    with pytest.raises(ValueError, match="sparse already"):
        analyze_file(tmp_path / "f", blocks=[(4, 1)], sparsities=[0.5])


def test_wrong_files_are_one_line(tmp_path, weights, capsys):
    torch.save({"a": torch.ones(3)}, tmp_path / "model.pt")
    save_file({"bias": torch.ones(3)}, tmp_path / "bias.safetensors")
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(weights.read_bytes()[:-100])
    for arguments, message in (
        (["missing.safetensors"], "there is no file 'missing.safetensors'"),
        ([str(tmp_path)], "is a folder"),
        ([str(tmp_path / "model.pt")], "is no safetensors file"),
        ([str(cut)], "is no safetensors file, or not a whole one"),
        ([str(tmp_path / "bias.safetensors")], "holds no weight of a linear layer"),
        ([str(weights), "--include", "x.*"], "no module matches 'x.*' (the first: conv, fc"),
        ([str(weights), "--include", "fc.weight"], "modules are named, without .weight"),
    ):
        assert cli.main(["analyze", *arguments]) == 1
        error = capsys.readouterr().err
        assert error.startswith("tetris analyze: ")
        assert message in error
        assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--map", "14"], "expected HxW, numbers from 1 (got '14')"),
        (["--tokens", "0"], "expected a number from 1"),
        (["--sparsity", "0.9"], "sparsity is a percentage"),
        (["--blocks", "4"], "a block is HEIGHTxWIDTH, each from 1 to 128 (got '4')"),
        (["--blocks", "200x1"], "each from 1 to 128 (got '200x1')"),
    ],
)
def test_bad_options(arguments, message, weights, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["analyze", str(weights), *arguments])
    assert message in capsys.readouterr().err


@pytest.fixture
def no_measuring(monkeypatch):
    """Layers take what the shipped model says, twice over; nothing is measured."""

    def measured(samples, threads, passes, advance):
        shipped = store.default()
        return torch.tensor([2 * shipped.seconds(s.point, threads) for s in samples]).numpy()

    monkeypatch.setattr("tetris.cost.calibration.measure_all", measured)


def test_calibrate_writes_what_analyze_reads(no_measuring, weights, capsys):
    assert cli.main(["calibrate", "--quick", "--threads", "1,2"]) == 0
    text = capsys.readouterr().out
    assert "sparse convolution" in text
    assert f"written: {store.path()}" in text
    assert sorted(tetris.cost.load().threads) == [1, 2]
    assert cli.main(["analyze", str(weights), *FAST]) == 0
    assert "calibrated on this machine" in capsys.readouterr().out
    assert cli.main(["calibrate", "--quick", "--threads", "1", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert f"written: {store.path()}" in printed.err
    kept = CostModel.from_json(printed.out, "test")
    assert sorted(kept.threads) == [1]


def test_calibrate_writes_json_where_it_is_asked_to(no_measuring, tmp_path):
    out = tmp_path / "model.json"
    words = ["calibrate", "--quick", "--threads", "1", "--json"]
    assert cli.main([*words, str(out)]) == 0
    assert out.read_text() == store.path().read_text()
    assert cli.main([*words, str(tmp_path)]) == 1


def test_calibrate_finds_out_first_that_it_cannot_write(monkeypatch, tmp_path, capsys):
    def measured(*_):
        raise AssertionError("measured for nothing")

    monkeypatch.setattr("tetris.cost.calibration.measure_all", measured)
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path / "file" / "cache"))
    assert cli.main(["calibrate", "--quick", "--threads", "1"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tetris calibrate: ")
    assert error.count("\n") == 1


def test_help_teaches(capsys):
    for command, expected in (("analyze", "--map 28x28"), ("calibrate", "--threads 1,4")):
        with pytest.raises(SystemExit, match="0"):
            cli.main([command, "--help"])
        assert expected in capsys.readouterr().out
