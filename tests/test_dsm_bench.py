"""Data and rows of the experiment with Dirichlet scale mixture priors."""

import json
import sys
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console
from scipy import stats

from tetris.bayes import DirichletHorseshoe, Posterior
from tetris.bayes.convergence import Convergence

sys.path.insert(0, str(Path(__file__).parent.parent))

from benchmarks.methods import __main__ as command
from benchmarks.methods import dsm, dsm_data, dsm_small, dsm_wide, report
from benchmarks.methods.experiment import Setting
from benchmarks.methods.progress import Progress


def test_friedmans_targets_follow_its_function():
    x = np.random.default_rng(0).uniform(size=(40, 10))
    from sklearn.datasets import make_friedman1

    made, y = make_friedman1(40, 10, noise=0.0, random_state=3)
    np.testing.assert_allclose(dsm_data.friedman_function(made), y)
    data = dsm_data.friedman(60, (0, 1))
    assert data.x.shape == (2, 60, 10)
    assert data.test_x.shape == (2, 500, 10)
    torch.testing.assert_close(data.y.std(1), torch.ones(2, dtype=torch.float64))
    assert not torch.equal(data.y[0], data.y[1])
    assert x.shape[1] == data.x.shape[2]


def test_correlated_inputs_are_uniform_and_correlated():
    x = dsm_data.correlated_uniform(4000, 0)
    assert stats.kstest(x[:, 2], "uniform").pvalue > 0.001
    rank = stats.spearmanr(x).statistic
    assert rank[2, 7] > 0.5  # as near to .9 as the others allow
    assert rank[3, 4] < -0.6
    assert rank[0, 1] > 0.5


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_rows_of_a_posterior(task):
    data = (
        dsm_data.friedman(100, (0,)) if task == "regression" else dsm_data.breast_cancer(400, (0,))
    )
    network = dsm_small.network_of(data, DirichletHorseshoe(block=(4, 2)), task)
    theta = network.start(torch.Generator().manual_seed(0), 2, 5)
    posterior = Posterior(network, theta, Convergence("test"))
    x, y = data.test_x[0], data.test_y[0]
    found = list(
        dsm_small.rows_of("x", 0, posterior, x, y, per_draw=(0.5,), blocks=(0.75,), inputs=(0.5,))
    )
    assert [r.variant for r in found] == [
        "x",
        "x, 50% per draw",
        "x, 75% of blocks",
        "x, 50% of inputs",
    ]
    assert all(r.extra["nll, FGSM 0.1"] > r.extra["nll"] for r in found)
    kept = dsm_small.masks(posterior, 0.75)
    assert kept.shape == (2, 1, *network.shape(0))
    assert not torch.equal(kept[0], kept[1])  # a mask per chain
    assert max(dsm_small.sparse_error(posterior.chain(0), 0.75, x)) < 1e-5


def test_tiny_wide_run(monkeypatch):
    monkeypatch.setitem(dsm_wide.WIDTH, "digits", 32)
    monkeypatch.setitem(dsm_wide.EPOCHS, "digits", 2)
    monkeypatch.setattr(dsm_wide, "SHARES", (0.5,))
    setting = Setting(seeds=(0,), quick=True)
    with Progress() as progress:
        found = list(dsm_wide.rows(setting, progress))
    assert [r.label for r in found] == [
        "wide plain",
        "wide plain 16x16 50%",
        "wide DHS",
        "wide DHS 16x16 50%",
    ]
    plain, half = found[2], found[3]
    assert half.stored == plain.stored // 2
    assert half.before is not None
    assert half.latency_ms > 0
    assert half.extra["sparse error"] < 1e-5


def test_whole_tiny_run(monkeypatch, tmp_path):
    """Every row, claim, check and picture, of chains too short to mean anything."""

    def short(data, prior, task, sampling, index=0):  # numpyro would compile for minutes
        one = dsm_data.Points(*(part[index : index + 1] for part in vars(data).values()))
        with Progress() as progress:
            return dsm_small.sample("x", one, prior, task, sampling, progress)[0]

    monkeypatch.setattr(dsm_small, "sample_nuts", short)
    monkeypatch.setattr(dsm, "QUICK", dsm_small.Sampling(20, 8, steps=2))
    monkeypatch.setattr(dsm, "QUICK_NUTS", dsm_small.Sampling(20, 8, steps=3))
    monkeypatch.setattr(dsm, "QUICK_EPOCHS", 2)
    monkeypatch.setitem(dsm_wide.WIDTH, "digits", 32)
    monkeypatch.setitem(dsm_wide.EPOCHS, "digits", 2)
    setting = Setting(seeds=(0,), quick=True, out=tmp_path)
    outcome = command.run(dsm.EXPERIMENT, setting, "tiny", Console(file=StringIO()))
    page = report.write(outcome)[1].read_text()
    for picture in ("pruning", "fgsm", "calibration"):
        assert f"dsm-digits-{picture}.png" in page
    assert "authors' 0.357" in page
    curves = json.loads((tmp_path / "dsm-digits-curves.json").read_text())
    (shares, errors) = curves["pruning"]["cancer, NLL: 4x2 blocks, one mask"]["DHS 4x2"]
    assert shares[0] == 0
    assert len(errors) == len(shares)
    labels = {row.label for row in outcome.rows}
    assert {"Friedman 100 authors' DHS", "cancer DHS NUTS", "cancer DST SWAG"} <= labels
    sampled = next(row for row in outcome.rows if row.label == "cancer DHS NUTS")
    assert 0 < sampled.extra["distance from HMC"] < 1
    assert sampled.extra["converged"] == 0.0
