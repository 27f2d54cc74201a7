"""tests/gpu/run.py: a test that hangs, crashes or loses the GPU leaves the others' results."""

import os
import subprocess
import sys
from pathlib import Path

RUN = Path(__file__).parent / "gpu" / "run.py"
TESTS = """
import os, sys, time, types
import pytest

def broken():
    raise RuntimeError("an illegal memory access was encountered")

def test_first(): pass
def test_fails(): assert 1 == 2
def test_hangs(): time.sleep(60)
def test_crashes(): os._exit(3)
@pytest.mark.skip
def test_skipped(): pass
def test_loses_the_gpu():
    cuda = types.SimpleNamespace(is_initialized=lambda: True, synchronize=broken)
    sys.modules["torch"] = types.SimpleNamespace(cuda=cuda)
def test_last(): pass
"""


def run(tmp_path, text, *arguments):
    (tmp_path / "test_some.py").write_text(text)
    return subprocess.run(
        [sys.executable, str(RUN), "out", "--", "test_some.py", "-q", *arguments],
        cwd=tmp_path,
        env={**os.environ, "TETRIS_TEST_SECONDS": "1", "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )


def outcomes(tmp_path):
    lines = (tmp_path / "out" / "outcomes.txt").read_text().splitlines()
    return [line.replace("test_some.py::", "") for line in lines]


def test_every_test_runs_whatever_one_does(tmp_path):
    done = run(tmp_path, TESTS)
    assert done.returncode == 1, done.stdout + done.stderr
    assert outcomes(tmp_path) == [
        "passed test_first",
        "failed test_fails",
        "stopped test_hangs",
        "stopped test_crashes",
        "skipped test_skipped",
        "passed test_loses_the_gpu",
        "lost test_loses_the_gpu",
        "passed test_last",
    ]
    failures = (tmp_path / "out" / "failures.txt").read_text()
    assert "assert 1 == 2" in failures
    assert "illegal memory access" in failures
    assert "test_hangs" in (tmp_path / "out" / "hung.txt").read_text()
    assert "STOPPED test_some.py::test_hangs" in done.stdout


def test_all_well_is_success(tmp_path):
    done = run(tmp_path, "def test_one(): pass")
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("1 passed\n")


def test_no_test_is_no_success(tmp_path):
    assert run(tmp_path, "def test_one(): pass", "-k", "two").returncode == 1
    assert run(tmp_path, "import nowhere").returncode == 1
