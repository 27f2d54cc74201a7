import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from rich.console import Console

import tetris
from tetris import cli
from tetris.demo.config import DemoConfig
from tetris.demo.latency import fuse_relu, measure
from tetris.demo.run import run
from tetris.demo.train import mlp
from tetris.demo.variants import build

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


def test_every_variant_stores_its_share():
    torch.manual_seed(0)
    dense = mlp(64, 128, 10)
    config = DemoConfig(hidden=128, sparsities=(0.75,), blocks=((4, 1), (16, 16)))
    full = dense[0].weight.numel() + dense[2].weight.numel()
    for variant in config.variants():
        model = build(dense, variant, config, seed=0)
        if variant.method == "narrow":
            stored = model[0].weight.numel() + model[2].weight.numel()
            assert stored == pytest.approx(full / 4, rel=0.05)
        else:
            assert model[0].values.numel() + model[2].values.numel() == full // 4
        assert isinstance(model[4], torch.nn.Linear)


def test_fused_network_computes_the_same():
    torch.manual_seed(0)
    dense = mlp(64, 96, 10)
    config = DemoConfig()
    model = build(dense, config.variants()[-1], config, seed=0)
    x = torch.randn(33, 64)
    expected = model(x)
    fused = fuse_relu(model)
    assert len(fused) == 3
    torch.testing.assert_close(fused(x), expected)


def test_latency_covers_every_network():
    dense = mlp(64, 96, 10)
    library, times = measure(dense, {"again": mlp(64, 32, 10)}, torch.randn(16, 64))
    assert library in ("F.linear", "oneDNN")
    assert set(times) == {"dense", "again"}
    assert all(ms > 0 for ms in times.values())


def test_demo_end_to_end(tmp_path):
    config = DemoConfig(
        hidden=96,
        sparsities=(0.8,),
        blocks=((4, 1),),
        seeds=(0, 1),
        threads=1,
        dense_epochs=8,
        tune_epochs=4,
        digits=True,
        out=tmp_path,
    )
    console = Console(record=True, width=100)
    outcome = run(config, console)
    text = console.export_text()
    assert "TETRIS" in text
    assert "±" in text
    files = {path.name for path in tmp_path.iterdir()}
    assert files == {"layout.png", "accuracy-latency.png", "demo.md"}
    assert "| TETRIS | 4x1 | 80% |" in (tmp_path / "demo.md").read_text()
    for result in outcome.results:
        assert len(result.accuracies) == 2
        assert min(result.accuracies) > 0.7
        assert result.milliseconds > 0


def test_readme_example_runs():
    examples = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    assert examples
    names = {"__name__": "readme"}  # each goes on from the one before
    for example in examples:
        exec(compile(example, "README.md", "exec"), names)
    assert isinstance(names["sparse"][0], tetris.SparseLinear)


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
