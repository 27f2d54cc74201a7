"""Warnings point at the line of the program that uses the library, not into it."""

import contextlib
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import tetris
from tetris.cost import store
from tetris.prune import Cubic, DCPPruner, Flops, Latency, SynapticPruner, TetrisPruner, VRPGEPruner
from tetris.warn import warn

X, Y = torch.randn(8, 16), torch.arange(8) % 4
MUCH = {"sparsity": 0.95, "block": (16, 16), "sweeps": 1}  # half of the blocks are the floor


def mlp():
    return nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32))


def synaptic():
    SynapticPruner(mlp(), penalty=1e-3, batches=[X], allow_empty_rows=False, **MUCH).prune()


def unfinished():
    TetrisPruner(mlp(), sparsity=0.5, sweeps=1, schedule=Cubic(0, 9)).finalize()


CALLS = {
    "sparsify": lambda: tetris.sparsify(mlp(), **MUCH),
    "everything": lambda: tetris.sparsify(mlp(), sparsity=1.0, block=(16, 16), sweeps=1),
    "target": lambda: tetris.sparsify(mlp(), target=Flops(0.3, X), block=(16, 16), sweeps=1),
    "fold": lambda: tetris.fold(mlp(), X, **MUCH),
    "pruner": lambda: TetrisPruner(mlp(), **MUCH),
    "finalize": unfinished,
    "synaptic": synaptic,
    "vrpge": lambda: VRPGEPruner(mlp(), scope="layer", **MUCH).prune(),
    "dcp": lambda: DCPPruner(mlp(), allow_empty_rows=False, **MUCH).select(
        [(X, Y)], rounds=1, steps=1, epochs=1
    ),
    "fuse": lambda: tetris.fuse(mlp().eval()),
}


@pytest.mark.parametrize("name", CALLS)
def test_a_warning_is_at_the_callers_line(name):
    with pytest.warns(UserWarning, match=r"tetris|Pruner") as caught:
        CALLS[name]()
    assert {w.filename for w in caught} == {__file__}


def test_a_calibration_of_no_use_is_reported_at_the_callers_line(tmp_path, monkeypatch):
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))
    store.path().parent.mkdir(exist_ok=True)
    store.path().write_text("{}")
    for call in (
        store.load,
        lambda: tetris.sparsify(mlp(), latency=0.9, example_inputs=X),
        lambda: TetrisPruner(mlp(), target=Latency(0.9, X)),
    ):
        with pytest.warns(UserWarning, match="ignoring") as caught:
            with contextlib.suppress(ValueError):  # no sparse layer so small is faster
                call()
        assert {w.filename for w in caught} == {__file__}


def test_the_library_warns_in_one_way():
    files = Path(tetris.__file__).parent.rglob("*.py")
    assert [f.name for f in files if "warnings.warn(" in f.read_text()] == ["warn.py"]


def test_lines_of_torch_are_passed_over():
    @torch.no_grad()
    def library():
        warn("here")

    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        library()
    assert caught[0].filename == __file__


def test_a_warning_of_the_import_is_at_the_import(tmp_path):
    # A module of the library that warns while it is imported.
    (tmp_path / "early.py").write_text("from tetris.warn import warn\nwarn('while imported')\n")
    program = tmp_path / "program.py"
    program.write_text(
        f"import tetris\ntetris.__path__.append({str(tmp_path)!r})\nimport tetris.early\n"
    )
    found = subprocess.run([sys.executable, program], capture_output=True, text=True, check=True)
    assert f"{program}:3: UserWarning: while imported" in found.stderr
