"""``tetris compare``: verdicts that know the noise, and files that cannot be compared."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from tetris import cli
from tetris.bench.compare import compare

RESULTS = Path(__file__).parent.parent / "benchmarks" / "results"
MACHINE = {"cpu": "a CPU", "cores": 2, "versions": {"tetris": "0.1", "torch": "2.6"}}


def row(block="4x1", ms=10.0, spread=0.02, speedup=5.0, **other):
    made = {"isa": "avx2", "threads": 1, "shape": "64x64x64", "block": block, "sparsity": 0.9}
    made |= {"sparse_ms": ms, "sparse_iqr_ms": [ms * (1 - spread), ms * (1 + spread)]}
    made |= {"speedup": speedup, "speedup_iqr": [speedup * (1 - spread), speedup * (1 + spread)]}
    return made | other


@pytest.fixture
def files(tmp_path):
    """Writes two results and gives their paths."""

    def write(old, new, before=MACHINE, now=MACHINE):
        paths = tmp_path / "old.json", tmp_path / "new.json"
        for path, rows, machine in zip(paths, (old, new), (before, now), strict=True):
            path.write_text(json.dumps({"rows": rows, "machine": machine}))
        return paths

    return write


@pytest.mark.parametrize(
    ("ms", "spread", "verdict"),
    [
        (11.0, 0.02, "slower"),
        (9.0, 0.02, "faster"),
        (10.2, 0.02, "same"),
        (9.8, 0.02, "same"),
        (15.0, 0.40, "same"),  # half as much again, and yet within the noise of both
    ],
)
def test_verdict_needs_more_than_the_spread(files, ms, spread, verdict):
    (change,) = compare(*files([row(spread=spread)], [row(ms=ms, spread=spread)])).changes
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(ms / 10)
    assert change.spread[0] < change.ratio < change.spread[1]


def test_speedups_compare_the_other_way_round(files):
    paths = files([row(ms=10, speedup=5)], [row(ms=20, speedup=8)])
    assert compare(*paths, by="time").changes[0].verdict == "slower"
    (change,) = compare(*paths, by="speedup").changes
    assert change.verdict == "faster"  # the machine was slower, the dense library even more so
    assert change.ratio == pytest.approx(5 / 8)
    assert change.spread[0] < change.ratio < change.spread[1]
    assert (change.old, change.new) == (5, 8)


@pytest.mark.parametrize(("dense", "told"), [(30.0, True), (9.0, True), (22.0, False)])
def test_dense_times_that_moved_are_told(files, dense, told):
    """The dense library is the same in both: if it is not as fast, the machine was not."""
    paths = files([row(dense_ms=20.0)], [row(dense_ms=dense)])
    warnings = compare(*paths).warnings
    assert any("the machine's state differs" in w for w in warnings) is told
    assert not compare(*paths, by="speedup").warnings


def test_rows_are_matched_by_what_they_measured(files):
    old = [row("4x1"), row("8x8"), row("4x1", threads=2)]
    new = [row("4x1", threads=2, ms=5), row("16x16"), row("4x1", ms=20)]
    found = compare(*files(old, new))
    assert [(c.key["threads"], c.ratio) for c in found.changes] == [(1, 2.0), (2, 0.5)]
    assert [key["block"] for key in found.only_old] == ["8x8"]
    assert [key["block"] for key in found.only_new] == ["16x16"]
    assert found.mean == pytest.approx(1)


@pytest.mark.parametrize(
    ("ms", "spread", "percent", "status"),
    [
        (12.0, 0.02, "10", 3),
        (12.0, 0.02, "25", 0),
        (12.0, 0.20, "10", 0),
        (8.0, 0.02, "0", 0),
    ],
)
def test_exit_status(files, ms, spread, percent, status, capsys):
    old, new = files([row(spread=spread)], [row(ms=ms, spread=spread)])
    assert cli.main(["compare", str(old), str(new), "--fail-above", percent]) == status
    assert ("slower by more than" in capsys.readouterr().err) == (status == 3)
    assert cli.main(["compare", str(old), str(new)]) == 0


def test_json_says_everything(files, tmp_path, capsys):
    old, new = files([row("4x1"), row("8x8")], [row("4x1", ms=20), row("8x8")])
    out = tmp_path / "change.json"
    assert cli.main(["compare", str(old), str(new), "--json", str(out)]) == 0
    assert "written: " in capsys.readouterr().out
    told = json.loads(out.read_text())
    assert cli.main(["compare", str(old), str(new), "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert json.loads(printed.out) == told
    assert "1 slower" in printed.err
    assert [(c["key"]["block"], c["verdict"]) for c in told["changes"]] == [
        ("4x1", "slower"),
        ("8x8", "same"),
    ]
    assert told["geometric_mean"] == pytest.approx(2**0.5)
    assert told["old"] == str(old)


def test_other_machines_and_versions_are_warned_about(files, capsys):
    now = {**MACHINE, "cpu": "another", "versions": {"tetris": "0.2", "torch": "2.7"}}
    old, new = files([row()], [row()], now=now)
    assert compare(old, new).warnings == [
        "cpu differs: a CPU and another",
        "version of torch differs: 2.6 and 2.7",
    ]
    assert cli.main(["compare", str(old), str(new)]) == 0
    assert "warning: cpu differs" in capsys.readouterr().err
    assert compare(*files([row()], [row()])).warnings == []
    unknown = compare(*files([row()], [row()], now=None)).warnings
    assert unknown == ["a file does not say which machine it was measured on"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("no json", "is not JSON"),
        ("[1]", 'it has no list "rows"'),
        ('{"rows": [1]}', '"rows" is no list of objects'),
        ('{"rows": [], "training": 3}', '"training" is no list of objects'),
        ('{"rows": []}', "has no row with sparse_ms"),
        ('{"rows": [{"accuracy": 1}]}', "has no row with sparse_ms"),
        (json.dumps({"rows": [row(), row()]}), "has two rows for isa avx2, threads 1"),
        (json.dumps({"rows": [row(ms=0)]}), "must be above 0"),
        (json.dumps({"rows": [row() | {"sparse_iqr_ms": 3}]}), "must be a pair"),
        (json.dumps({"rows": [row("64x64")]}), "no row in common"),
    ],
)
def test_wrong_files_are_explained(files, text, message, capsys):
    old, new = files([row()], [row()])
    new.write_text(text)
    assert cli.main(["compare", str(old), str(new)]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert str(new) in error
    assert error.count("\n") == 1


def test_a_missing_file_is_named(files, capsys):
    old, _ = files([row()], [row()])
    assert cli.main(["compare", str(old), "absent.json"]) == 1
    assert "absent.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "by", "rows"),
    [
        ("gemm.json", "time", 660),
        ("gemm.json", "speedup", 700),
        ("conv.json", "time", 3300),
        ("training.json", "speedup", 6),
    ],
)
def test_published_results_compare(name, by, rows):
    found = compare(RESULTS / name, RESULTS / name, by)
    assert len(found.changes) == rows
    assert {c.verdict for c in found.changes} == {"same"}
    assert found.mean == pytest.approx(1)


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["compare", "--help"])
    printed = capsys.readouterr().out
    for text in ("What the verdicts mean", "exit status", "--by speedup"):
        assert text in printed


@pytest.mark.parametrize("by", ["time", "speedup"])
@pytest.mark.parametrize(
    ("rounds", "verdict"), [(15, "slower"), (40, "slower"), (5, "same"), (3, "same")]
)
def test_quartiles_of_few_rounds_say_less(files, rounds, verdict, by):
    """Five percent slower, with quartiles of two percent."""
    old = row(rounds=rounds)
    new = row(ms=10.5, speedup=5 / 1.05, rounds=rounds)
    (change,) = compare(*files([old], [new]), by=by).changes
    assert change.verdict == verdict
    assert change.ratio == pytest.approx(1.05)
    assert change.spread[0] < change.ratio < change.spread[1]


def test_equal_layers_are_seldom_told_apart(files):
    """Of rows that differ by noise alone, even at five rounds."""
    generator = np.random.default_rng(0)

    def noisy(name):
        taken = 10 * np.exp(0.02 * generator.standard_normal(5))
        low, middle, high = (float(v) for v in np.percentile(taken, [25, 50, 75]))
        return row(name, middle, rounds=5) | {"sparse_iqr_ms": [low, high]}

    both = ([noisy(f"{i}x1") for i in range(1000)] for _ in range(2))
    changes = compare(*files(*both)).changes
    assert sum(change.verdict != "same" for change in changes) < 50


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": [row(shape=[1, 2])]}, '"shape" of a row must be a text or a number'),
        ({"rows": [row()], "machine": [1]}, '"machine" does not describe one'),
        ({"rows": [row()], "machine": {"versions": [1]}}, '"machine" does not describe one'),
    ],
)
def test_json_that_only_looks_like_a_result(files, tmp_path, content, message, capsys):
    old, _ = files([row()], [row()])
    other = tmp_path / "other.json"
    other.write_text(json.dumps(content))
    assert cli.main(["compare", str(old), str(other)]) == 1
    assert message in capsys.readouterr().err


def test_files_that_cannot_be_read_or_written_are_one_line(files, tmp_path, capsys):
    old, new = map(str, files([row()], [row()]))
    for words in ([str(tmp_path), new], [old, new, "--json", str(tmp_path)]):
        assert cli.main(["compare", *words]) == 1
        printed = capsys.readouterr()
        assert printed.err.startswith("tetris compare: ")
        assert printed.err.count("\n") == 1
        assert printed.out == ""


def test_a_reader_that_has_enough(files):
    """``tetris compare ... | head -1``: no traceback."""
    old, new = files([row()], [row()])
    code = "import sys; from tetris import cli; sys.stdin.read(); sys.exit(cli.main(sys.argv[1:]))"
    with subprocess.Popen(
        [sys.executable, "-c", code, "compare", str(old), str(new)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        process.stdout.close()  # before it prints, for it waits for the end of its input
        process.stdin.close()
        assert process.stderr.read() == ""
        assert process.wait() == 1
