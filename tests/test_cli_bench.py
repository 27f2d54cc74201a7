"""``tetris bench``: what it measures, prints and writes."""

import json

import pytest
import torch

from tetris import _C, cli


def test_a_small_run_prints_and_writes(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("sys.argv", ["tetris", "bench"])
    out, threads = tmp_path / "new.json", torch.get_num_threads()
    words = ["bench", "--shapes", "64x48x96", "2x48x96", "--blocks", "4x1", "8x8"]
    words += ["--sparsity", "50", "--seconds", "0", "--threads", "1", "--json", str(out)]
    assert cli.main(words) == 0
    assert torch.get_num_threads() == threads
    printed = capsys.readouterr().out
    assert "64x48x96, 1 thread" in printed
    assert "2x48x96, 1 thread" in printed
    result = json.loads(out.read_text())
    assert [(r["shape"], r["block"]) for r in result["rows"]] == [
        (shape, block) for shape in ("64x48x96", "2x48x96") for block in ("4x1", "8x8")
    ]
    for row in result["rows"]:
        low, high = row["speedup_iqr"]
        assert low <= row["speedup"] <= high
        assert row["dense"] in ("F.linear", "oneDNN")
        assert row["dense_ms"] == min(row["all_dense_ms"].values())
        assert row["efficiency"] == pytest.approx(row["speedup"] * row["density"])
        tokens = row["tokens"]
        seconds = row["sparse_ms"] / 1e3
        assert row["equivalent_gflops"] == pytest.approx(2e-9 * tokens * 48 * 96 / seconds)
        assert row["stored_gflops"] == pytest.approx(row["equivalent_gflops"] * row["density"])
        assert row["kernel"].endswith(_C.isa_in_use())
    assert result["machine"]["cpu"] in printed.replace("\n", "")
    assert result["command"].startswith("tetris bench")


def test_json_on_standard_output_is_alone_there(capsys):
    words = ["bench", "--shapes", "2x48x96", "--blocks", "4x1", "--sparsity", "50"]
    assert cli.main([*words, "--seconds", "0", "--json", "-"]) == 0
    printed = capsys.readouterr()
    assert [row["shape"] for row in json.loads(printed.out)["rows"]] == ["2x48x96"]
    assert "2x48x96, 1 thread" in printed.err


def test_the_table_fits_a_terminal_without_loss(capsys, monkeypatch):
    from rich.console import Console

    from tetris.commands.bench import _tables

    row = {"shape": "2048x4096x4096", "threads": 16, "isa": "avx512", "block": "128x128"}
    row |= {"sparsity": 0.975, "sparse_ms": 12.34567, "dense_ms": 456.789, "dense": "F.linear"}
    row |= {"speedup": 37.0, "speedup_iqr": [36.26, 37.84], "efficiency": 0.925}
    row |= {"stored_gflops": 139.2, "equivalent_gflops": 5566.0}
    (table,) = _tables([row])
    Console(width=80).print(table)
    printed = capsys.readouterr().out
    for text in ("128x128", "97.5%", "12.3", "457", "F.linear", "36.3-37.8", "5566"):
        assert text in printed
    assert "…" not in printed


def test_a_busy_machine_is_pointed_out():
    from tetris.commands.bench import _noisy

    quiet, busy = {"speedup_iqr": [5.0, 5.1]}, {"speedup_iqr": [60.0, 755.0]}
    assert _noisy([quiet, quiet]) == ""
    assert _noisy([quiet, busy]).startswith("1 of 2 rows spread by more than 20 %")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--shapes", "64x48"], "TOKENSxINxOUT"),
        (["--blocks", "129x1"], "from 1 to 128"),
        (["--sparsity", "0.9"], "0 or from 1 to below 100"),
        (["--sparsity", "many"], "expected a number from 0"),
        (["--threads", "0"], "numbers from 1, as in 1,2"),
        (["--seconds", "-1"], "expected a number from 0"),
    ],
)
def test_a_wrong_argument_is_explained(words, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        cli.main(["bench", *words])
    assert message in capsys.readouterr().err


def test_a_missing_folder_is_told_before_measuring(tmp_path, capsys):
    assert cli.main(["bench", "--json", str(tmp_path / "none" / "new.json")]) == 1
    assert "there is no folder" in capsys.readouterr().err


def test_help_teaches(capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["bench", "--help"])
    printed = capsys.readouterr().out
    for text in ("What the columns mean", "TOKENSxINxOUT", "tetris compare", "fastest of"):
        assert text in printed
