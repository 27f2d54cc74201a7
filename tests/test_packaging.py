"""What is built: the sdist, an extension beside another torch than its own, make TORCH=..."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
HERE = torch.__version__
SUFFIX = sysconfig.get_config_var("EXT_SUFFIX")
# As far as setup.py can tell: it puts an empty file where the extension belongs.
CMAKE = """#!/bin/sh
for word; do
  folder=${word#-DCMAKE_LIBRARY_OUTPUT_DIRECTORY=}
  [ "$folder" = "$word" ] || { mkdir -p "$folder"; : >"$folder/_C$SUFFIX"; }
done
"""


def run(*words, cwd, **env):
    return subprocess.run(
        [str(word) for word in words],
        cwd=cwd,
        env={**os.environ, **{name: str(value) for name, value in env.items()}},
        capture_output=True,
        text=True,
        check=False,
    )


def executable(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


def tracked(*where):
    found = run("git", "ls-files", *where, cwd=ROOT)
    if found.returncode:
        pytest.skip("no git checkout")
    return {name for name in found.stdout.split() if (ROOT / name).exists()}


@pytest.fixture
def sources(tmp_path):
    """A copy of the sources with some of what must not be published."""
    pytest.importorskip("setuptools")  # for setup.py
    root = tmp_path / "sources"
    for name in tracked():
        if not name.endswith((".png", ".json")) or name.startswith("python/"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, root / name)
    for name in (f"python/tetris/_C{SUFFIX}", "python/tetris/_C.torch", "csrc/__pycache__/a.pyc"):
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("")
    return root


def test_the_sdist_has_what_a_build_needs_and_no_more(sources, tmp_path):
    done = run(sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path, cwd=sources)
    assert done.returncode == 0, done.stderr
    with tarfile.open(next(tmp_path.glob("tetris-*.tar.gz"))) as archive:
        files = {m.name.partition("/")[2] for m in archive.getmembers() if m.isfile()}
    needed = tracked("CMakeLists.txt", "MANIFEST.in", "cmake", "csrc", "python", "pyproject.toml")
    needed |= {"setup.py", "README.md", "LICENSE"}
    made = {name for name in files if name.startswith("python/tetris.egg-info/")}
    assert files - made - {"PKG-INFO", "setup.cfg"} == needed


@pytest.mark.parametrize("place", ["build_lib", "inplace"])
def test_a_build_notes_its_torch_beside_the_extension(place, sources, tmp_path):
    executable(tmp_path / "bin" / "cmake", CMAKE)
    lib = tmp_path / "lib"
    words = ["--inplace"] if place == "inplace" else []
    done = run(
        *(sys.executable, "setup.py", "-q", "build_ext", "--build-lib", lib, *words),
        cwd=sources,
        SUFFIX=SUFFIX,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    folder = sources / "python" if words else lib
    note = (folder / "tetris" / f"_C{SUFFIX}").with_suffix(".torch")
    assert note.read_text().strip() == HERE


def test_a_strict_editable_install_links_the_note(sources, tmp_path):
    executable(tmp_path / "bin" / "cmake", CMAKE)
    done = run(
        *(sys.executable, "setup.py", "-q", "editable_wheel", "-d", tmp_path, "--mode=strict"),
        cwd=sources,
        SUFFIX=SUFFIX,
        PATH=f"{tmp_path / 'bin'}:{os.environ['PATH']}",
    )
    assert done.returncode == 0, done.stderr
    (extension,) = sources.glob(f"build/__editable__.*/tetris/_C{SUFFIX}")
    assert extension.with_suffix(".torch").read_text().strip() == HERE


@pytest.mark.parametrize(
    ("built", "message"),
    [
        (
            "2.0.1+other",
            f"built with torch 2.0.1+other and does not load beside torch {HERE}. ",
        ),
        (HERE, "file too short"),
        (None, "cannot import name '_C'"),
    ],
)
def test_an_extension_that_does_not_load(built, message, tmp_path):
    """The package without the rest of it, an empty file as its extension; None: with none."""
    package = tmp_path / "tetris"
    package.mkdir()
    for name in ("__init__.py", "torch_version.py"):
        shutil.copy(ROOT / "python" / "tetris" / name, package)
    if built:
        (package / f"_C{SUFFIX}").write_text("")
        (package / f"_C{SUFFIX}").with_suffix(".torch").write_text(built + "\n")
    done = run(sys.executable, "-c", "import tetris", cwd=tmp_path, PYTHONPATH=tmp_path)
    last = done.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: ")
    assert message in last
    if built not in (HERE, None):
        assert "pip install --no-build-isolation --force-reinstall --no-deps ." in last
        assert re.search("file too short\n\nThe above .* direct cause", done.stderr)


@pytest.mark.skipif(not all(map(shutil.which, ["make", "c++"])), reason="no make or no c++")
def test_another_torch_is_installed_once_and_stays(tmp_path, monkeypatch):
    for name in ("TORCH", "MAKEFLAGS"):  # of a `make test` that runs this
        monkeypatch.delenv(name, raising=False)
    log = tmp_path / "log"
    stub = f"""#!/bin/sh\necho "$@" >>"{log}"\ncase "$*" in *torch==0*) exit 1; esac\n"""
    python = executable(tmp_path / "venv/bin/python", stub)
    (tmp_path / "venv/.torch").touch()  # as it was left before it held a value

    def make(*words, **env):
        return run("make", f"VENV={tmp_path / 'venv'}", f"PYTHON={python}", *words, cwd=ROOT, **env)

    def installed(*words, fails=False, **env):
        log.write_text("")
        (tmp_path / "venv/.built").touch()  # newer than all sources
        done = make(*words, tmp_path / "venv/.built", **env)
        assert (done.returncode != 0) == fails, done.stderr
        return [line for line in log.read_text().splitlines() if "install" in line]

    _, usual_torch, _ = installed("TORCH=")
    assert " torch==" in usual_torch
    assert installed() == []
    *_, torch_line, extension = installed("TORCH=torch==2.6.0")
    assert " torch==2.6.0 " in torch_line
    assert extension.endswith("-e .")
    assert installed("TORCH=torch==2.6.0") == []
    assert installed() == []
    assert installed("TORCH=") == installed(TORCH="") == []
    for value in ("'torch>=2.6,<2.8'", "torch>=2.7,<2.9", "--upgrade torch", "torch --pre -i URL"):
        said = value.strip("'")
        assert f" {said} " in installed(f"TORCH={value}")[1]
        assert installed() == installed(f"TORCH={value}") == []
        shown = make("help")
        assert shown.returncode == 0, shown.stderr
        assert f" TORCH={said} " in shown.stdout
    assert " torch==0 " in installed("TORCH=torch==0", fails=True)[-1]
    assert installed()[1:] == [usual_torch, extension]
    assert installed() == []
