"""From posteriors to layouts and sparse modules; the fit on minibatches."""

import math
import re

import pytest
import torch

import tetris
from tetris import bayes
from tetris.bayes import MAP, BayesianMLP, DirichletHorseshoe, Gaussian, Posterior
from tetris.bayes.convergence import Convergence
from tetris.bayes.scores import block_norms, spread
from tetris.blocking import Blocking
from tetris.prune import DSMPruner

NETWORK = BayesianMLP((10, 16, 3), DirichletHorseshoe(block=(4, 2)), 50, "classification")


def posterior(network=NETWORK, draws=12, chains=1, seed=0):
    theta = network.start(torch.Generator().manual_seed(seed), chains, draws)
    return Posterior(network, theta, Convergence("test"))


def test_norms_and_scores_by_hand():
    weights = torch.randn((7, 5, 6), generator=torch.Generator().manual_seed(0))
    norms = block_norms(weights, (2, 4))
    assert norms.shape == (7, 3, 2)  # both axes ragged
    torch.testing.assert_close(norms[3, 2, 1], weights[3, 4:, 4:].norm())
    score = bayes.block_score(weights, (2, 4))
    threshold = norms.flatten().sort().values[int(0.1 * norms.numel()) - 1]
    want = norms.mean(0) * (norms > threshold).float().mean(0)
    torch.testing.assert_close(score, want)
    with pytest.raises(ValueError, match="draws of one chain"):
        bayes.block_score(weights[None], (2, 4))


def test_spread_sums_to_the_score():
    blocking = Blocking((2, 4), 5, 6)
    score = torch.rand(3, 2)
    torch.testing.assert_close(blocking.sums(spread(score, blocking)), score)


@pytest.mark.parametrize("block", [(1, 1), (2, 4)])
def test_each_draw_loses_its_own_smallest_blocks(block):
    weights = torch.randn((3, 4, 5, 6), generator=torch.Generator().manual_seed(0))
    pruned = bayes.prune_draws(weights, 0.5, block)
    norms, left = block_norms(weights, block), block_norms(pruned, block)
    gone = left == 0
    assert bool((gone.flatten(-2).sum(-1) == math.floor(0.5 * norms[0, 0].numel())).all())
    for before, lost in zip(norms.flatten(0, 1), gone.flatten(0, 1), strict=True):
        assert before[lost].max() <= before[~lost].min()


@pytest.mark.parametrize("block", [(1, 1), (4, 2), (3, 4)])
def test_layouts_keep_the_best_scores_and_modules_agree(block):
    draws = posterior()
    pruner = DSMPruner(draws, sparsity=0.5, block=block)
    assert list(pruner.layers) == ["linear1"]
    pruner.prune()
    mask = pruner.layouts()["linear1"].block_mask()
    score = bayes.block_score(draws.weights().flat().layers[0][0], block)
    assert int((~mask).sum()) == math.floor(0.5 * mask.numel())
    assert score[mask].min() >= score[~mask].max()
    x = torch.randn((9, 10), generator=torch.Generator().manual_seed(1))
    masked, sparse = pruner.model(x).detach(), pruner.finalize()(x).detach()
    assert isinstance(pruner.finalize().linear1, tetris.SparseLinear)
    assert float((masked - sparse).abs().max() / masked.abs().max()) < 1e-5


def test_an_ensemble_is_the_masked_posterior():
    draws = posterior()
    pruner = DSMPruner(draws, sparsity=0.75, block=(4, 2))
    pruner.prune()
    ensemble = pruner.ensemble(draws=5)
    weights = draws.thin(5).weights().flat()
    kept = pruner.layouts()["linear1"].mask()
    weights = weights.with_weight(0, weights.layers[0][0] * kept)
    x = torch.randn((9, 10), generator=torch.Generator().manual_seed(1))
    want = bayes.Predictive.of(weights, x).mean
    torch.testing.assert_close(ensemble(x), want.float(), rtol=1e-5, atol=1e-6)
    assert tetris._C.last_kernel().startswith("bsmm")
    assert {m.linear1.layout for m in ensemble.members} == set(pruner.layouts().values())


def test_ensembles_say_what_they_lack():
    member = torch.nn.Linear(3, 1)
    with pytest.raises(ValueError, match="task must be"):
        bayes.Ensemble([member], "clustering")
    with pytest.raises(ValueError, match="one number for each of 1 networks"):
        bayes.Ensemble([member], "regression", torch.ones(2))
    found = bayes.Ensemble([member], "regression").predict(torch.ones(2, 3))
    assert found.rmse(torch.ones(2)) >= 0
    with pytest.raises(ValueError, match=r"noise are needed; Ensemble\(\.\.\., noise=\.\.\.\)"):
        found.nll(torch.ones(2))


@pytest.mark.parametrize("block", [(4, 1), (4, 4)])
def test_whole_inputs_go(block):
    pruner = DSMPruner(posterior(), sparsity=0.5, block=block, granularity="input")
    pruner.prune()
    mask = pruner.layouts()["linear1"].block_mask()
    assert torch.equal(mask, mask[:1].expand_as(mask))
    assert int((~mask[0]).sum()) == math.floor(0.5 * mask.shape[1])


def test_pruner_refuses_what_it_cannot_mean():
    with pytest.raises(ValueError, match=r"differ between chains.*posterior.chain\(0\)"):
        DSMPruner(posterior(chains=2))
    with pytest.raises(TypeError, match="must be a tetris.bayes.Posterior"):
        DSMPruner(torch.nn.Linear(3, 3))
    with pytest.raises(ValueError, match="granularity must be"):
        DSMPruner(posterior(), granularity="row")
    with pytest.raises(ValueError, match="keeps whole inputs"):
        DSMPruner(posterior(), granularity="input", reorder="swap")
    with pytest.raises(ValueError, match="leave out target and scope"):
        DSMPruner(posterior(), granularity="input", scope="global")


def test_calls_out_of_order_are_refused():
    pruner = DSMPruner(posterior(), sparsity=0.5, block=(4, 2))
    for method in (pruner.finalize, pruner.ensemble):
        with pytest.raises(RuntimeError, match=r"has been removed yet; call prune\(\) first"):
            method()
    saved = DSMPruner(posterior(), sparsity=0.5, block=(4, 2))
    saved.prune()
    pruner.load_state_dict(saved.state_dict())
    assert len(pruner.ensemble(draws=2).members) == 2
    pruner.finalize(inplace=True)
    saved.remove()
    for ended in (pruner, saved):
        for name in ("prune", "scores", "ensemble", "finalize"):
            with pytest.raises(RuntimeError, match=rf"DSMPruner.{name}: the pruner has ended"):
                getattr(ended, name)()


def test_what_was_asked_to_lose_nothing_is_pruned():
    pruner = DSMPruner(posterior(), sparsity=0.0, block=(4, 2))
    pruner.prune()
    assert isinstance(pruner.finalize().linear1, tetris.SparseLinear)


def test_a_pruner_resumes(tmp_path):
    pruner = DSMPruner(posterior(), sparsity=0.5, block=(4, 2))
    pruner.prune()
    again = DSMPruner(posterior(), sparsity=0.5, block=(4, 2))
    again.load_state_dict(pruner.state_dict())
    assert again.layouts() == pruner.layouts()


def test_a_target_and_a_search():
    pruner = DSMPruner(posterior(), target=tetris.prune.Parameters(0.5), block=(4, 2))
    pruner.prune()
    assert pruner.sparsity == pytest.approx(0.5, abs=0.03)
    searched = DSMPruner(posterior(), sparsity=0.5, block=(4, 2), reorder="swap")
    searched.prune()
    assert searched.layouts()["linear1"].reordered != "none"


def test_kappa_of_a_gaussian_prior():
    network = BayesianMLP((10, 4, 1), Gaussian(0.5), 50)
    draws = posterior(network)
    noise = draws.weights().noise[0, 3]
    kappa = bayes.kappa(draws)
    assert kappa.shape == (1, 12, 4, 10)
    torch.testing.assert_close(kappa[0, 3, 1, 2], 1 / (1 + 50 * 0.25 / noise**2))
    torch.testing.assert_close(bayes.effective_parameters(draws), 40 * (1 - kappa[..., 0, 0]))


def blobs():
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(240) % 3
    x = 0.3 * torch.randn((240, 32), generator=generator)
    x[torch.arange(240), y] += 2.0  # inputs from 3 on are noise
    return x, y


def test_the_fit_finds_the_inputs_that_matter():
    x, y = blobs()
    network = BayesianMLP(
        (32, 32, 3), DirichletHorseshoe(block=(8, 4)), 240, "classification", "relu"
    )
    fit = MAP(network, batch=60)
    found = fit.fit(x, y, 60, learning_rate=0.03)
    assert found.convergence.converged, str(found.convergence)
    assert fit.history[-1] < fit.history[0]
    pruner = DSMPruner(found, sparsity=31 / 32, block=(8, 4))  # the prior turns off the other rows
    pruner.prune()
    (column,) = pruner.layouts()["linear1"].col_idx.tolist()
    assert column == 0
    assert float((pruner.finalize()(x).argmax(1) == y).float().mean()) > 0.95
    draws = fit.around(x, y, 4, 10)
    assert draws.theta.shape == (1, 10, network.size)
    assert draws.predict(x).accuracy(y) > 0.95


def test_a_short_fit_says_that_it_cannot_tell():
    x, y = blobs()
    network = BayesianMLP((32, 8, 3), Gaussian(), 240, "classification")
    fit = MAP(network)
    assert not fit.convergence.converged
    assert "too few" in str(fit.fit(x, y, 2).convergence)
    short = MAP(network).fit(x, y, 10, learning_rate=0.03).convergence
    assert "the second half of the epochs still brought" in str(short)
    walked = MAP(network).around(x, y, 20, 5, learning_rate=0.01).convergence
    assert "the fit has not run; the walk still descended" in str(walked)


HISTORIES = {
    "rises": ([1.0 + 0.1 * i for i in range(19)], "rose from 1 to 2.8 nats .*lower learning_rate"),
    "back up": ([5.0, 3.0, *[1.4] * 6, 3.0, 5.5, 5.5, 5.5], "rose from 1.4 to 5.5"),
    "half up": ([5.0, *[1.0] * 10, 2.0], "rose from 1 to 2"),
    "up, then down": ([1.0, *[4.0] * 9, 1.1], "rose from 1 to 1.1"),
    "few, up": ([1.0, 2.0], "rose from 1 to 2"),
    "one": ([1.0], "1 epochs are too few"),
    "falls": ([5.0 - 0.1 * i for i in range(20)], "still brought 0.9 of the 1.9 nats"),
    "settled": ([5.0, 3.0, *[1.0] * 20, 1.01], "nothing speaks against"),
}


@pytest.mark.parametrize(("history", "words"), HISTORIES.values(), ids=HISTORIES)
def test_what_a_fit_says_of_its_objective(monkeypatch, history, words):
    x, y = blobs()
    fit = MAP(BayesianMLP((32, 8, 3), Gaussian(), 240, "classification"))
    fit.history = [7.0]  # of an earlier fit
    monkeypatch.setattr(MAP, "_descend", lambda self, *rest: self.history.extend(history))
    assert re.search(words, str(fit.fit(x, y, len(history)).convergence))


def test_a_diverging_fit_stops_and_keeps_the_last_good_state():
    x, y = blobs()
    network = BayesianMLP((32, 8, 3), DirichletHorseshoe(), 240, "classification", "relu")
    fit = MAP(network)
    fit.fit(x, y, 2)
    with pytest.raises(FloatingPointError, match=r"MAP.fit: the objective became .* below 1e\+06"):
        fit.fit(x, y, 5, learning_rate=1e6)
    assert bool(network.log_joint(fit.theta, x, y).isfinite())
    assert fit.fit(x, y, 2).predict(x).accuracy(y) > 0.2  # goes on from there


def test_a_fit_resumes(tmp_path):
    x, y = blobs()
    network = BayesianMLP((32, 8, 3), DirichletHorseshoe(), 240, "classification")
    whole = MAP(network, seed=1)
    whole.fit(x, y, 2)
    torch.save(whole.state_dict(), tmp_path / "map.pt")
    again = MAP(network, seed=2)
    again.load_state_dict(torch.load(tmp_path / "map.pt"))
    whole.fit(x, y, 2)
    again.fit(x, y, 2)
    assert torch.equal(again.theta, whole.theta)
    assert again.history == whole.history
    other = MAP(BayesianMLP((32, 4, 3), Gaussian(), 240, "classification"))
    with pytest.raises(ValueError, match="as this network's"):
        other.load_state_dict(whole.state_dict())
    with pytest.raises(ValueError, match="state lacks generator, history, notes"):
        other.load_state_dict({"theta": whole.theta})


def test_the_fit_takes_regression():
    x, _ = blobs()
    y = x[:, 0].double()
    network = BayesianMLP((32, 8, 1), DirichletHorseshoe(), 240)
    held = MAP(network).fit(x, y, 60, learning_rate=0.03)
    assert held.predict(x).accuracy(y) > 0.9
    assert float(held.weights().noise) == pytest.approx(2 / 3)
    free = MAP(network, noise=None).fit(x, y, 60, learning_rate=0.03)
    assert float(free.weights().noise) < 2 / 3
    with pytest.raises(ValueError, match="noise must be a positive number"):
        MAP(network, noise=0.0)
