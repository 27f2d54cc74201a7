"""Files of `tetris tune` and the tuning loop, without a GPU."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import tetris
from tetris import cli, tune, tuning
from tetris.commands import calibrate
from tetris.cost import store
from tetris.tuning import Measurement

BEST = Measurement("mma 128x64 4 stages", 1e-5, "mma 128x128 4 stages", 2e-5)


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))
    monkeypatch.setattr(tuning, "loaded", {})
    return tmp_path


def test_what_is_saved_is_read(cache):
    path = tuning.save("NVIDIA H200", {"product a": BEST})
    assert path == cache / "cuda-nvidia-h200.json"
    assert tuning.read(path) == ("NVIDIA H200", {"product a": BEST})
    assert [p.name for p in cache.iterdir()] == [path.name]  # nothing temporary is left


def test_folder_follows_the_environment(monkeypatch, tmp_path):
    monkeypatch.delenv("TETRIS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert tuning.folder() == tmp_path / "xdg" / "tetris"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert tuning.folder() == tmp_path / ".cache" / "tetris"


def test_whoever_names_the_folder_names_all_three():
    root = Path(__file__).parents[1]
    row = re.compile(r"^\| `TETRIS_CACHE_DIR` .*", re.MULTILINE)
    page = re.compile(r"keeps the fastest in .*?\.\s", re.DOTALL)
    for text in (
        cli.TUNE,
        calibrate.DESCRIPTION,
        tetris.calibrate.__doc__ or "",
        row.search((root / "README.md").read_text())[0],
        page.search((root / "docs/cuda.md").read_text().partition("## Tune")[2])[0],
    ):
        order = [text.find(n) for n in ("TETRIS_CACHE_DIR", "XDG_CACHE_HOME", "~/.cache/tetris")]
        assert -1 < order[0] < order[1] < order[2], text


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "",
        lambda text: "[]",
        lambda text: "null",
        lambda text: text.replace('"seconds"', '"minutes"'),
        lambda text: text.replace('"measured"', '"guessed"'),
        lambda text: text.replace('"NVIDIA H200"', "7"),
        lambda text: "\x00" * 100,
    ],
)
def test_a_damaged_file_is_ignored_with_a_warning(damage):
    path = tuning.save("NVIDIA H200", {"product a": BEST})
    path.write_text(damage(path.read_text()))
    with pytest.warns(UserWarning, match="ignoring .*cuda-nvidia-h200.json, which is not a file"):
        assert tuning.read(path) is None
    with pytest.warns(UserWarning, match="ignoring"):
        tuning.load()
    assert tuning.loaded == {}


@pytest.mark.parametrize(("field", "value"), [("version", "0.0.1"), ("format", 0)])
def test_a_file_of_another_version_is_ignored_with_a_warning(field, value):
    path = tuning.save("NVIDIA H200", {"product a": BEST})
    path.write_text(json.dumps({**json.loads(path.read_text()), field: value}))
    with pytest.warns(UserWarning, match="ignoring .*run `tetris tune` again"):
        assert tuning.read(path) is None


def test_a_folder_that_cannot_be_made_names_the_variable(monkeypatch, tmp_path, capsys):
    file = tmp_path / "file"
    file.touch()
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(file / "folder"))
    assert cli.main(["calibrate", "--quick"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tetris calibrate: the folder ")
    assert error.endswith("cannot be made (Not a directory); TETRIS_CACHE_DIR names another\n")


def test_a_command_shows_a_warning_in_one_line(monkeypatch, tmp_path, capsys):
    save_file({"fc.weight": torch.randn(32, 32)}, tmp_path / "m.safetensors")
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))
    store.path().write_text("{}")
    words = ["analyze", str(tmp_path / "m.safetensors"), "--seconds", "0", "--sparsity", "90"]
    assert cli.main(words) == 0
    error = capsys.readouterr().err
    assert error.startswith("tetris analyze: ignoring ")
    assert error.count("\n") == 1


def test_no_folder_is_no_error(monkeypatch, tmp_path):
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path / "absent"))
    tuning.load()
    assert tuning.loaded == {}


def test_the_fastest_candidate_is_kept(monkeypatch):
    """The loop alone: what the library would say and measure stands in for a GPU."""
    ran, forced = [], [""]
    took = {"simt": 3.0, "mma 128x128 4 stages": 2.0, "mma 128x64 4 stages": 1.0}

    def call():
        if forced[0] == "hopper":
            raise RuntimeError("too much shared memory")
        ran.append(forced[0])

    names = ["mma 128x128 4 stages", "mma 128x64 4 stages", "hopper", "simt"]
    monkeypatch.setattr(tetris._C, "cuda_watch", lambda enabled: None)
    monkeypatch.setattr(tetris._C, "cuda_watched", lambda: [("GPU", "product a", names)])
    monkeypatch.setattr(tetris._C, "cuda_force_kernel", lambda text: forced.__setitem__(0, text))
    lines = []
    found = tune.tune([("a", call)], timer=lambda _: took[forced[0]], report=lines.append)
    assert found == {
        "GPU": {
            "product a": Measurement("mma 128x64 4 stages", 1.0, "mma 128x128 4 stages", 2.0),
        }
    }
    assert forced == [""]
    assert ran == ["", "mma 128x128 4 stages", "mma 128x64 4 stages", "simt"]
    assert "hopper does not run: too much shared memory" in lines[0]


def test_tuning_measures_the_same_numbers_each_time():
    problem = tune.Problem(8, 32, 16, (4, 1), 0.5, "float32")
    first, again = (tune.calls(problem, "cpu", training=True) for _ in range(2))
    assert list(first) == ["forward", "dx", "dvalues"]
    assert all(torch.equal(first[op](), again[op]()) for op in first)


def test_tune_command_says_what_is_missing(capsys):
    assert cli.main(["tune"]) == 1
    error = capsys.readouterr().err
    assert error.startswith("tetris tune: ")
    if not tetris._C.cuda_built():
        assert "no CUDA kernels to tune" in error
        assert "TETRIS_CUDA=1 pip install" in error


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "4096x4096"], "expected TOKENSxINxOUT"),
        (["--blocks", "0x4"], "a block is HEIGHTxWIDTH, each from 1 to 128"),
        (["--blocks", "129x1"], "a block is HEIGHTxWIDTH, each from 1 to 128"),
        (["--sparsity", "100"], "sparsity is a percentage, 0 or from 1 to below 100"),
        (["--sparsity", "0.9"], "sparsity is a percentage, 0 or from 1"),
        (["--sparsity", "much"], "expected a number from 0"),
        (["--dtypes", "int8"], "invalid choice"),
    ],
)
def test_tune_command_checks_its_words(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["tune", *words])
    assert message in capsys.readouterr().err


@pytest.fixture
def homeless(monkeypatch):
    """HOME is not set, and the user has no entry that names a home."""

    def unknown(_):
        raise KeyError("no such user")

    for name in ("HOME", "XDG_CACHE_HOME", "TETRIS_CACHE_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr("pwd.getpwuid", unknown)
    tuning._homeless.cache_clear()
    yield
    tuning._homeless.cache_clear()


def test_without_a_home_a_temporary_folder_is_named_once(homeless, monkeypatch, tmp_path, recwarn):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    model = tetris.cost.load()  # nothing is there
    own = tuning.folder()
    assert own == tmp_path / f"tetris-{os.getuid()}"
    assert tetris.info().problems == ()
    tuning.load()
    tuning.make_folder()
    path = tuning.save("GPU", {})
    assert path.parent == own
    assert tuning.read(path) == ("GPU", {})
    assert model.cpu == tetris.cost.default().cpu
    [warning] = recwarn
    assert "no home directory" in str(warning.message)
    assert str(own) in str(warning.message)
    assert warning.filename == __file__


def test_a_folder_that_is_named_needs_no_home(homeless, monkeypatch, tmp_path, recwarn):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert tuning.folder() == tmp_path / "cache" / "tetris"
    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))
    assert tuning.folder() == tmp_path
    assert not list(recwarn)


def test_a_write_that_fails_leaves_nothing_behind(tmp_path, monkeypatch):
    def fails(*_):
        raise OSError("disk full")

    monkeypatch.setattr(tuning.os, "replace", fails)
    with pytest.raises(OSError, match="disk full"):
        tuning.write_whole(tmp_path / "a.json", "{}")
    assert list(tmp_path.iterdir()) == []
