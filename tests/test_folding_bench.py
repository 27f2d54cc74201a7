"""benchmarks.folding: its table, and that only a full run fills the page."""

import json
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks import folding

ROW = {
    "model": "MLP",
    "block": "8x8",
    "layers": 3,
    "no order": 0.25,
    "elements": 0.5,
    "alone": {"retained": 0.31, "before": 6, "after": 3, "difference": 1e-7},
    "together": {"retained": 0.3, "before": 5, "after": 0, "difference": 2e-7},
}
LINE = "| MLP | 3 | 8x8 | 6 | 3 | 5 | **0** | 25.0% | 31.0% | **30.0%** | 50.0% |"


@pytest.mark.parametrize(
    ("words", "full"),
    [([], True), (["--sparsity", "50"], False), (["--quick"], False), (["--steps", "1"], False)],
)
def test_only_a_full_run_fills_the_page(tmp_path, monkeypatch, words, full):
    page = tmp_path / "folding-page.md"
    pieces = ("folding", "folding-machine")
    page.write_text("".join(f"<!-- {p} -->\nas it was\n<!-- /{p} -->\n" for p in pieces))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(folding, "PAGE", page)
    monkeypatch.setattr(folding, "measure", lambda *_: [ROW])
    assert folding.main(words) == 0
    out = tmp_path / ("benchmarks/results" if full else "build/benchmarks")
    result, text = json.loads((out / "folding.json").read_text()), (out / "folding.md").read_text()
    assert result["rows"][0]["together"]["after"] == 0
    assert LINE in text
    assert f"{result['steps']} steps of training, {result['sweeps']} sweeps" in text
    assert (LINE in page.read_text()) is full
    assert ("as it was" in page.read_text()) is not full
