"""Environment variables that are wrong are named by tetris info, on any machine."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import tetris
from tetris import environment

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("TETRIS_CUDA_KERNEL", "foo", "must be simt, skinny, mma or hopper, .*got 'foo'"),
        ("TETRIS_CUDA_KERNEL", "mma 128x", "must be simt"),
        ("TETRIS_CUDA_KERNEL", "mma 4 stage", "must be simt"),
        ("TETRIS_CUDA_KERNEL", "mma 0x16", "must be simt"),
        ("TETRIS_CUDA_KERNEL", "mma 0 splits", "must be simt"),
        ("TETRIS_PRINT_CONFIG", "yes", "must be 0 or 1 .got 'yes'"),
        ("TETRIS_CUDA", "on", "must be 0 or 1 or AUTO .got 'on'"),
        ("TETRIS_CACHE_DIR", __file__, "must be a folder, or the name of one to be made"),
        ("TETRIS_DATA", "/there/is/none", "must be a folder that exists"),
        ("TETRIS_CUDA_KERNELS", "mma", "no variable that tetris reads; did you mean TETRIS_CUDA_K"),
        ("TETRIS_XYZ", "1", "no variable that tetris reads; there are TETRIS_CPU_ISA"),
    ],
)
def test_a_wrong_variable_is_named_with_the_rule(name, value, message, monkeypatch):
    monkeypatch.setenv(name, value)
    (found,) = tetris.info().problems
    assert re.match(f"{name} .*{message}", found)
    assert found in str(tetris.info())


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(
            ("TETRIS_CUDA_KERNEL", v)
            for v in ("", "simt", " mma  128x256 4 stages", "hopper 2 ctas")
        ),
        ("TETRIS_CUDA_KERNEL", "skinny by row 8 warps 16 pixels 2 splits"),
        *(("TETRIS_PRINT_CONFIG", v) for v in ("", "0", "1")),
        *(("TETRIS_CUDA", v) for v in ("0", "1", "AUTO")),
        ("TETRIS_CACHE_DIR", "/there/is/none/yet"),
        ("TETRIS_DATA", str(ROOT)),
        ("TETRIS_CPU_ISA", "avx2"),
        ("TETRIS_CMAKE_ARGS", "-DX=1"),
        ("OTHER_XYZ", "1"),
    ],
)
def test_nothing_is_said_of_others(name, value):
    assert environment.problems({name: value}) == ()


def test_the_command_says_it_and_goes_on():
    done = subprocess.run(
        [sys.executable, "-m", "tetris", "info"],
        env={**os.environ, "TETRIS_CUDA_KERNEL": "foo"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert "TETRIS_CUDA_KERNEL must be simt" in done.stdout


def test_kernels_are_written_as_the_library_reads_them():
    text = (ROOT / "csrc/cuda/config.cpp").read_text()
    units = set(re.findall(r'unit == "(\w+)"', text)) - {"row"}
    assert units == set(re.search(r"\(([\w|]+)\)", environment._PART)[1].split("|"))
    families = re.search(r"there are (\w+), (\w+), (\w+) and (\w+), each", text).groups()
    assert all(environment.problems({"TETRIS_CUDA_KERNEL": family}) == () for family in families)


def test_the_readme_has_every_variable_and_the_values_it_takes():
    section = (ROOT / "README.md").read_text().partition("## Environment variables")[2]
    table = section.partition("\n## ")[0]
    rows = dict(re.findall(r"^\| `(TETRIS_\w+)` \|(.*)$", table, re.MULTILINE))
    assert rows.keys() == environment._VARIABLES.keys()
    said = "\n".join(environment.problems(dict.fromkeys(rows, "?")))
    choices = dict(re.findall(r"^(\w+) must be (\w+(?: or \w+)+) \(", said, re.MULTILINE))
    assert choices.keys() == {"TETRIS_CUDA", "TETRIS_PRINT_CONFIG"}
    for name, values in choices.items():
        assert all(f"`{value}`" in rows[name] for value in values.split(" or ")), rows[name]
