import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console
from torch import nn

from tetris import cli
from tetris.data import Dataset
from tetris.demo.config import DemoConfig
from tetris.demo.latency import measure
from tetris.demo.networks import NETWORKS
from tetris.demo.run import run
from tetris.demo.train import recalibrate
from tetris.demo.variants import build
from tetris.nn import SparseLayer

ROOT = Path(__file__).parent.parent


def test_help_teaches(capsys):
    for words, expected in (
        (["--help"], "tetris demo --quick"),
        (["demo", "--help"], "What the rows mean"),
        (["info", "--help"], "bug reports"),
    ):
        with pytest.raises(SystemExit, match="0"):
            cli.main(words)
        assert expected in capsys.readouterr().out


def test_what_full_means_is_said_as_it_is(capsys):
    words = {3: "three", 5: "five"}
    mlp, cnn = (words[len(DemoConfig.preset(model, "full").seeds)] for model in ("mlp", "cnn"))
    with pytest.raises(SystemExit, match="0"):
        cli.main(["demo", "--help"])
    assert f"{mlp} seeds (cnn: {cnn})" in " ".join(capsys.readouterr().out.split())
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert f"`--full` takes all images, {cnn} seeds" in readme


def test_info_as_module():
    done = subprocess.run(
        [sys.executable, "-m", "tetris", "info"], capture_output=True, text=True, check=True
    )
    assert "CPU kernels" in done.stdout


def test_user_error_is_one_line(capsys, tmp_path):
    assert cli.main(["demo", "--data", str(tmp_path), "--out", str(tmp_path)]) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith("tetris demo: ")
    assert captured.err.count("\n") == 1
    assert "train-images-idx3-ubyte" in captured.err


@pytest.mark.parametrize("threads", ["0", "-1", "two"])
def test_bad_thread_count(threads, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["demo", "--threads", threads])
    assert "expected a number from 1" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["demo", "bench", "calibrate", "analyze"])
def test_more_threads_than_cores_are_refused(command, capsys):
    """OpenMP ends the process where it cannot have its threads' stacks."""
    with pytest.raises(SystemExit):
        cli.main([command, *["model.safetensors"] * (command == "analyze"), "--threads", "100000"])
    assert "(got 100000)" in capsys.readouterr().err


def test_a_folder_for_a_file_and_too_much_memory_are_one_line(tmp_path, capsys):
    assert cli.main(["compare", str(tmp_path), str(tmp_path)]) == 1
    assert cli.main(["bench", "--shapes", "100000000000x1024x4096"]) == 1
    folder, *_, memory = capsys.readouterr().err.strip().splitlines()
    assert "irectory" in folder
    assert "out of memory" in memory


@pytest.mark.parametrize(("model", "features"), [("mlp", 64), ("cnn", 64)])
def test_every_variant_stores_its_share(model, features):
    torch.manual_seed(0)
    network, width = NETWORKS[model], 128 if model == "mlp" else 16
    config = DemoConfig(
        model=model, width=width, sparsities=(0.75,), blocks=((4, 1), (4, 4)), search_sweeps=1
    )
    dense = network.build(features, width, 10)
    full = network.hidden_weights(features, width)
    hidden = [m for m in dense.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]
    assert full == sum(m.weight.numel() for m in hidden[model == "cnn" :])
    for variant in config.variants():
        built = build(dense, network, variant, config, features, seed=0)
        if variant.method == "narrow":
            narrow = [m for m in built.modules() if isinstance(m, (nn.Linear, nn.Conv2d))][:-1]
            stored = sum(m.weight.numel() for m in narrow[model == "cnn" :])
            assert stored == pytest.approx(full / 4, rel=0.05)
        else:
            sparse = [m for m in built.modules() if isinstance(m, SparseLayer)]
            assert sum(m.values.numel() for m in sparse) == full // 4
        assert type(built.get_submodule(network.classifier)) is nn.Linear


@pytest.mark.parametrize(("model", "features"), [("mlp", 64), ("cnn", 64), ("cnn", 784)])
def test_every_way_to_run_a_network_computes_the_same(model, features):
    torch.manual_seed(0)
    network = NETWORKS[model]
    dense = network.build(features, 16, 10)
    x = network.inputs(torch.randn(9, features))
    with torch.no_grad():
        dense.train()(x)  # batch norm gets statistics
        dense.eval()
        config = DemoConfig(model=model, sparsities=(0.5,), blocks=((4, 1),), search_sweeps=1)
        sparse = build(dense, network, config.variants()[-1], config, features, seed=0)
        for made, calls in (
            (dense, network.dense_calls(dense, x)),
            (sparse, network.sparse_calls(sparse, x)),
        ):
            assert len(calls) == (4 if model == "cnn" else 2) // (1 + (made is sparse))
            for call in calls.values():
                torch.testing.assert_close(call(), made(x), rtol=1e-4, atol=1e-5)


def test_recalibration_measures_batch_norm_and_changes_no_weight():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.Flatten())
    x = 3 + torch.randn(64, 1, 5, 5)
    data = Dataset("", "", x, torch.zeros(64), x, torch.zeros(64))
    before = model[0].weight.clone()
    recalibrate(model, data, batch=16)
    assert torch.equal(model[0].weight, before)
    mean = model[0](x).mean((0, 2, 3))
    torch.testing.assert_close(model[1].running_mean, mean, rtol=1e-4, atol=1e-5)
    assert model[1].momentum == 0.1
    assert not model.training


def test_latency_covers_every_network():
    network = NETWORKS["mlp"]
    dense, other = network.build(64, 96, 10), network.build(64, 32, 10)
    library, times = measure(network, dense, {"again": other}, torch.randn(16, 64))
    assert library in ("F.linear", "oneDNN")
    assert set(times) == {"dense", "again"}
    assert all(ms > 0 for ms in times.values())


@pytest.mark.parametrize(
    ("model", "settings"),
    [
        ("mlp", {"width": 96, "dense_epochs": 8, "tune_epochs": 4}),
        ("cnn", {"width": 16, "dense_epochs": 3, "tune_epochs": 2, "train_batch": 64}),
    ],
)
def test_demo_end_to_end(model, settings, tmp_path):
    config = DemoConfig(
        model=model,
        sparsities=(0.8,),
        blocks=((4, 1),),
        seeds=(0, 1),
        threads=1,
        digits=True,
        search_sweeps=1,
        out=tmp_path,
        **settings,
    )
    console = Console(record=True, width=100)
    outcome = run(config, console)
    text = console.export_text()
    assert "TETRIS" in text
    assert "±" in text
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"layout.png", "accuracy-latency.png", "demo.md"}
    table = (tmp_path / "demo.md").read_text()
    assert "| TETRIS | 4x1 | 80% |" in table
    assert ("batch norm recalibrated" in table) == (model == "cnn")
    for result in outcome.results:
        assert len(result.accuracies) == 2
        assert min(result.accuracies) > 0.7
        assert result.milliseconds > 0


@pytest.mark.parametrize("model", ["mlp", "cnn"])
@pytest.mark.parametrize("size", ["quick", "default", "full"])
def test_presets(model, size):
    config = DemoConfig.preset(model, size, seed=7, threads=1)
    assert (config.model, config.seeds[0], config.threads) == (model, 7, 1)
    assert {v.method for v in config.variants()} >= {"element-wise", "TETRIS"}


def test_an_unknown_instruction_set_is_one_line(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "tetris", "info"],
        env={**os.environ, "TETRIS_CPU_ISA": "nonsense"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 1
    assert done.stderr.startswith("tetris info: ")
    assert "Traceback" not in done.stderr
