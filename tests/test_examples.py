"""Every example runs, with --tiny, and explains itself."""

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = sorted((Path(__file__).parent.parent / "examples").glob("*.py"))
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=1"]


def run(path, *words):
    start = TORCHRUN if "torchrun" in path.read_text() else []
    done = subprocess.run(
        [sys.executable, *start, str(path), *words],
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_there_are_examples():
    assert {"tetris_pruning.py", "distributed.py"} <= {path.name for path in EXAMPLES}


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_runs(path):
    said = run(path, "--tiny")
    assert said.strip()  # what came of it
    assert "Warning" not in said


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_example_is_short_and_explains_itself(path, monkeypatch, capsys):
    """In this process, which has torch already: --help ends before anything is done."""
    assert len(path.read_text().splitlines()) <= 80
    monkeypatch.setattr(sys, "argv", [str(path), "--help"])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(path), run_name="__main__")
    assert ended.value.code == 0
    shown = capsys.readouterr().out
    assert f"examples/{path.name}" in shown  # a command to copy; usage has the name alone
