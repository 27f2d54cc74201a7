"""tools/gpu_check.py: tests of each kind run once, and one part's failure is its own."""

import importlib.util
import os
import sys
import tarfile
import time
from pathlib import Path

import pytest

PATH = Path(__file__).resolve().parent.parent / "tools" / "gpu_check.py"


@pytest.fixture(scope="module")
def gpu_check():
    spec = importlib.util.spec_from_file_location("gpu_check", PATH)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look for it there
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def asked_for(part):
    """What a part asks pytest for: files, files left out, an expression of names."""
    words = part.command[part.command.index("--") + 1 :]
    left_out = [w.removeprefix("--ignore=") for w in words if w.startswith("--ignore=")]
    files = [w for w in words[: words.index("-k")] if w not in left_out and not w.startswith("-")]
    return files, left_out, words[words.index("-k") + 1]


@pytest.mark.parametrize(
    "test",
    [
        "test_gpu_bsmm.py::test_values[37x70x53-f32-hopper]",
        "test_gpu_bsmm.py::test_values[37x70x53-f32-mma]",
        "test_gpu_bsmm.py::test_families_run_where_they_must[skinny-bf16-block2-1]",
        "test_gpu_conv.py::test_gradients[case3-f64-simt]",
        "test_gpu_conv.py::test_of_no_family",
        "test_gpu_errors.py::test_a_forced_kernel_that_cannot_says_why",
        "test_gpu_runtime.py::test_graph_capture_and_replay[mma]",
        "test_gpu_runtime.py::test_compile_with_graphs_trains",
        "test_gpu_training.py::test_states_are_of_what_is_stored[dtype1]",
    ],
)
def test_each_test_is_in_one_part(gpu_check, tmp_path, test):
    file, name = test.split("::")
    hits = []
    for part in gpu_check.test_parts(tmp_path, 100.0):
        if not part.name.startswith("tests-"):
            continue
        files, left_out, which = asked_for(part)
        path = f"tests/gpu/{file}"
        if path in left_out or not any(path.startswith(f) for f in files):
            continue
        words = which.replace("(", " ( ").replace(")", " ) ").split()
        logic = [w if w in ("and", "or", "not", "(", ")") else str(w in name) for w in words]
        if eval(" ".join(logic)):
            hits.append(part.name)
    assert len(hits) == 1, hits


def test_parts_fail_and_hang_alone(gpu_check, tmp_path, capsys):
    commands = {
        "passed": ("print('well')", 60),
        "failed (3)": ("raise SystemExit(3)", 60),
        "stopped after 1 s": ("import time; print('begun', flush=True); time.sleep(60)", 1),
    }
    parts = [
        gpu_check.Part(f"part{i}", [sys.executable, "-c", text], limit)
        for i, (text, limit) in enumerate(commands.values())
    ]
    for part in parts:
        part.start(tmp_path)
    assert [part.wait() for part in parts] == [True, False, False]
    assert [part.status for part in parts] == list(commands)
    assert "well" in capsys.readouterr().out


def test_programs_beside_the_interpreter_are_found(gpu_check):
    assert gpu_check.programs().startswith(str(Path(sys.executable).parent))


def test_the_archive_has_what_this_run_made(gpu_check, tmp_path):
    out, results = tmp_path / "out", tmp_path / "results"
    out.mkdir()
    results.mkdir()
    (out / "build.log").write_text("log")
    (results / "old.json").write_text("of another machine")
    (results / "gpu.json").write_text("new")
    os.utime(results / "old.json", (1e9, 1e9))
    archive = out / "all.tar.gz"
    for _ in range(2):  # the second time over the first
        gpu_check.archive(archive, out, results, time.time())
    with tarfile.open(archive) as file:
        names = {m.name for m in file.getmembers() if m.isfile()}
    assert names == {"out/build.log", "results/gpu.json"}
