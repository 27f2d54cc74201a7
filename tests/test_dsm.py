"""Dirichlet scale mixture priors: densities, samplers, what they predict."""

import builtins
import math

import numpy as np
import pytest
import torch
from scipy import stats

from tetris import bayes
from tetris.bayes import (
    BayesianMLP,
    DirichletHorseshoe,
    DirichletStudentT,
    Gaussian,
    Predictive,
    RegularizedHorseshoe,
)
from tetris.bayes.convergence import Convergence
from tetris.bayes.laws import Gamma, HalfCauchy, HalfStudentT, InverseGamma
from tetris.bayes.posterior import judge

PRIORS = {
    "gaussian": Gaussian(),
    "rhs": RegularizedHorseshoe(p0=2),
    "rhs-2x3": RegularizedHorseshoe(p0=2, block=(2, 3)),
    "dhs": DirichletHorseshoe(p0=2),
    "dhs-2x3": DirichletHorseshoe(p0=2, block=(2, 3)),
    "dst": DirichletStudentT(p0=2),
}


def problem(samples=12, inputs=5, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn((samples, inputs), generator=generator, dtype=torch.float64)
    noise = torch.randn(samples, generator=generator, dtype=torch.float64)
    return x, torch.sin(x[:, 0]) + 0.5 * x[:, 1] + 0.1 * noise


@pytest.mark.parametrize(
    ("law", "reference"),
    [
        (HalfCauchy(0.3), lambda x: stats.halfcauchy.logpdf(x, scale=0.3)),
        (HalfStudentT(3.0), lambda x: stats.t.logpdf(x, 3) + math.log(2)),
        (InverseGamma(2.0, 4.0), lambda x: stats.invgamma.logpdf(x, 2, scale=4)),
        (Gamma(0.1), lambda x: stats.gamma.logpdf(x, 0.1)),
    ],
    ids=["half-cauchy", "half-t", "inverse-gamma", "gamma"],
)
def test_laws_are_scipys_with_the_jacobian_of_the_log(law, reference):
    u = torch.linspace(-4, 3, 15, dtype=torch.float64)
    np.testing.assert_allclose(
        law.log_density(u), reference(u.exp().numpy()) + u.numpy(), rtol=1e-10
    )


@pytest.mark.parametrize(
    "law", [HalfCauchy(), HalfStudentT(3.0), InverseGamma(2.0, 4.0), Gamma(0.1)], ids=repr
)
def test_variances_of_logs(law):
    u = torch.linspace(-400, 60, 400_001, dtype=torch.float64)
    weight = law.log_density(u).exp() * (u[1] - u[0])
    mean = (weight * u).sum()
    assert float(weight.sum()) == pytest.approx(1, abs=1e-6)
    assert float((weight * (u - mean).square()).sum()) == pytest.approx(law.variance, rel=1e-5)


def test_gammas_make_a_dirichlet():
    torch.manual_seed(0)
    v = torch.distributions.Gamma(torch.full((20000, 4), 0.5), torch.tensor(1.0)).sample().log()
    phi = v.softmax(-1)
    reference = stats.dirichlet([0.5] * 4)
    np.testing.assert_allclose(phi.mean(0), reference.mean(), atol=0.01)
    np.testing.assert_allclose(phi.var(0), reference.var(), atol=0.01)


@pytest.mark.parametrize("name", PRIORS)
def test_gradient_of_the_log_density_agrees_with_finite_differences(name):
    x, y = problem()
    network = BayesianMLP((5, 4, 1), PRIORS[name], 12)
    theta = network.start(torch.Generator().manual_seed(1), 2).requires_grad_()
    assert torch.autograd.gradcheck(lambda t: network.log_joint(t, x, y), (theta,))


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_two_hidden_layers_and_likelihoods(task):
    x, y = problem()
    out = 1 if task == "regression" else 3
    network = BayesianMLP((5, 6, 4, out), [DirichletHorseshoe(p0=2)] * 2, 12, task)
    theta = network.start(torch.Generator().manual_seed(1))
    weights = network.weights(theta)
    (w1, b1), (w2, b2), (w3, b3) = weights.layers
    outputs = torch.tanh(torch.tanh(x @ w1.T + b1) @ w2.T + b2) @ w3.T + b3
    torch.testing.assert_close(weights(x), outputs)
    if task == "regression":
        noise = float(network.get(theta, "noise").exp())
        want = stats.norm.logpdf(y, outputs[:, 0], noise)
    else:
        y = torch.arange(12) % 3
        want = outputs.softmax(1)[torch.arange(12), y].log()
    np.testing.assert_allclose(network.log_likelihood(theta, x, y), want)
    module = network.module(weights)
    torch.testing.assert_close(module(x.float()), outputs.float(), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "prior", [DirichletHorseshoe(p0=2), DirichletHorseshoe(p0=2, block=(2, 2))]
)
def test_a_nodes_variance_does_not_depend_on_the_block(prior):
    network = BayesianMLP((6, 4, 1), prior, 50)
    theta = network.start(torch.Generator().manual_seed(0))
    tau, lam, c2 = (network.get(theta, f"0.{n}").exp() for n in ("tau", "lambda", "c2"))
    tau = tau * 2 / (6 - 2) / math.sqrt(50)
    expected = tau**2 * c2 * lam**2 / (c2 + tau**2 * lam**2)
    variances = (2 * network.log_sd(theta, 0)).exp().sum(1)
    torch.testing.assert_close(variances, expected.repeat_interleave(4 // len(expected)))


def test_pack_inverts_get():
    network = BayesianMLP((5, 4, 1), DirichletHorseshoe(p0=2), 12)
    theta = network.start(torch.Generator().manual_seed(0), 3, 2)
    parts = {name: network.get(theta, name) for name in network.slots}
    assert torch.equal(network.pack(parts), theta)
    for name, part in network.unpack(theta).items():
        assert torch.equal(part, parts[name])
    with pytest.raises(ValueError, match=r"theta must be \[\.\.\., 59\] \(got \[3\]\)"):
        network.log_prior(torch.zeros(3))


def test_the_first_metric_is_the_prior():
    network = BayesianMLP((5, 4, 1), DirichletHorseshoe(p0=2), 12)
    variance = network.prior_variance()
    assert float(network.get(variance, "0.gamma")[0, 0]) == pytest.approx(101.4, abs=0.1)
    assert bool((network.get(variance, "0.z") == 1).all())


def test_a_metric_to_begin_with_spares_warm_up():
    def spread(variance):
        chains = bayes.hmc(
            lambda q: -0.5 * (q / sd).square().sum(-1),
            torch.zeros((8, 2), dtype=torch.float64),
            warmup=20,
            draws=40,
            steps=10,
            generator=torch.Generator().manual_seed(0),
            variance=variance,
        )
        return float(chains.theta[..., 1].std())

    sd = torch.tensor([1.0, 1000.0], dtype=torch.float64)
    known = spread(sd.square())
    assert known == pytest.approx(1000, rel=0.3)
    assert spread(None) < 500


def test_hmc_draws_from_a_gaussian():
    sd = torch.tensor([0.1, 1.0, 10.0], dtype=torch.float64)
    mean = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
    chains = bayes.hmc(
        lambda q: -0.5 * ((q - mean) / sd).square().sum(-1),
        torch.zeros((4, 3), dtype=torch.float64),
        warmup=200,
        draws=400,
        steps=8,
        generator=torch.Generator().manual_seed(0),
    )
    draws = chains.theta.flatten(0, 1)
    error = sd / math.sqrt(200)
    assert bool(((draws.mean(0) - mean).abs() < 5 * error).all())
    np.testing.assert_allclose(draws.std(0), sd, rtol=0.15)
    assert int(chains.divergences.sum()) == 0
    assert bool(((chains.accept > 0.6) & (chains.accept < 0.98)).all())
    assert float(bayes.split_rhat(chains.theta).max()) < 1.05


def test_hmc_counts_divergences_and_refuses_bad_starts():
    def cliff(q):  # a density that jumps by more than the limit
        return torch.where(q[..., 0] > 0.5, -1e6 * q[..., 0], -0.5 * q.square().sum(-1))

    start = torch.zeros((2, 1), dtype=torch.float64)
    settings = {"warmup": 20, "draws": 60, "generator": torch.Generator().manual_seed(0)}
    found = bayes.hmc(cliff, start, **settings)
    assert int(found.divergences.sum()) > 0
    assert bool((found.theta <= 0.5).all())
    with pytest.raises(FloatingPointError, match="where chains start; 2 of 2 values are not"):
        bayes.hmc(lambda q: q.sum(-1) + torch.inf, start, **settings)
    with pytest.raises(ValueError, match="warmup must be an int >= 20"):
        bayes.hmc(cliff, start, **{**settings, "warmup": 3})


def test_rhat_and_effective_size_are_numpyros():
    diagnostics = pytest.importorskip("numpyro.diagnostics")
    generator = np.random.default_rng(0)
    noise = generator.normal(size=(4, 200, 3))
    chains = np.zeros_like(noise)
    for step in range(1, 200):  # autoregressive, the last quantity slowly so
        chains[:, step] = np.array([0.0, 0.5, 0.95]) * chains[:, step - 1] + noise[:, step]
    ours = torch.from_numpy(chains)
    np.testing.assert_allclose(bayes.split_rhat(ours), diagnostics.split_gelman_rubin(chains))
    np.testing.assert_allclose(
        bayes.effective_size(ours), diagnostics.effective_sample_size(chains), rtol=1e-6
    )


@pytest.mark.parametrize("chains", [1, 4])
def test_constants_have_no_effective_size(chains):
    noise = torch.randn((chains, 50), generator=torch.Generator().manual_seed(0))
    zeros = torch.zeros_like(noise)
    values = torch.stack([noise, zeros, zeros + 0.1, noise.log()], -1)
    size = bayes.effective_size(values)
    assert size.isnan().tolist() == [False, True, True, True]
    assert size.dtype == torch.float64
    assert float(bayes.effective_size(values[..., 1])) != 0.0
    stuck = zeros + torch.arange(chains)[:, None]  # each chain at its own value
    assert not float(bayes.effective_size(stuck)) > 4


def test_stuck_chains_are_no_good_ones():
    x, _ = problem()
    network = BayesianMLP((5, 4, 1), Gaussian(), 12)
    theta = network.start(torch.Generator().manual_seed(0), 1)[:, None].expand(2, 200, -1)
    found = judge("HMC", network, theta, torch.zeros(2, 200), x)
    assert set(found.ess.values()) == {0.0}
    assert any("below 100 of log density, outputs" in p for p in found.problems)
    unknown = Convergence("HMC", {}, {"a": 20.0, "b": math.nan})
    assert "worst b: nan" in str(unknown)


def test_a_bad_run_says_so():
    fine = Convergence("HMC", {"a": 1.01}, {"a": 300.0}, (0.0,), (0.8,))
    assert fine.converged
    assert "R-hat up to 1.010" in str(fine)
    bad = Convergence("NUTS", {"a": 1.3, "b": math.nan}, {"a": 20.0}, (0.5, 0.0), (), (0.0, 0.9))
    text = str(bad)
    for words in ("R-hat above 1.05 of a, b", "below 100 of a", "chain 0: 50%", "chain 1: 90%"):
        assert words in text
    x, y = problem()
    network = BayesianMLP((5, 4, 1), Gaussian(), 12)
    with pytest.warns(UserWarning, match="sample_hmc: 1 of 1 runs did not converge"):
        (posterior,) = bayes.sample_hmc(network, x[None], y[None], warmup=20, draws=8, steps=2)
    assert not posterior.convergence.converged


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:sample_")
def test_nuts_of_numpyro_and_hmc_draw_from_the_same_posterior():
    pytest.importorskip("numpyro")
    x, y = problem()
    network = BayesianMLP((5, 2, 1), PRIORS["dhs"], 12)
    nuts = bayes.sample_nuts(network, x, y, chains=1, warmup=200, draws=400, max_tree_depth=6)
    (hmc,) = bayes.sample_hmc(network, x[None], y[None], chains=8, warmup=150, draws=150, steps=20)

    def figures(posterior):
        theta = posterior.theta
        probes = network.weights(theta)(x[:3])[..., 0]
        scales = [network.get(theta, n) for n in network.slots if n.endswith((".tau", "noise"))]
        prior = network.log_prior(theta)[..., None]
        return torch.cat([probes, *scales, prior], -1)

    ours, theirs = figures(hmc), figures(nuts)
    for a, b in zip(ours.unbind(-1), theirs.unbind(-1), strict=True):
        size = [float(bayes.effective_size(v)) for v in (a, b)]
        error = math.sqrt(float(a.var()) / size[0] + float(b.var()) / size[1])
        assert abs(float(a.mean() - b.mean())) < 4.5 * error


def test_numpyros_model_has_our_density():
    numpyro = pytest.importorskip("numpyro")
    jax = pytest.importorskip("jax")
    from tetris.bayes.nuts import _model

    x, y = problem()
    for prior in PRIORS.values():
        network = BayesianMLP((5, 4, 1), prior, 12)
        theta = network.start(torch.Generator().manual_seed(3))
        scales = network.scales()
        with jax.enable_x64(True):
            sites = {}
            jacobian = 0.0
            for name in network.slots:
                part = network.get(theta, name)
                sites[name] = jax.numpy.asarray((part.exp() if name in scales else part).numpy())
                jacobian += float(part.sum()) if name in scales else 0.0
            arguments = (
                network,
                jax.numpy.asarray(x.numpy()),
                jax.numpy.asarray(y.numpy()[:, None]),
            )
            want, _ = numpyro.infer.util.log_density(_model, arguments, {}, sites)
            want = float(want)
        assert float(network.log_joint(theta, x, y)) == pytest.approx(want + jacobian, rel=1e-9)


def test_nuts_starts_from_the_same_metric():
    """Numpyro flattens sites by name."""
    jax = pytest.importorskip("jax")
    pytest.importorskip("numpyro")
    from jax.flatten_util import ravel_pytree

    from tetris.bayes.nuts import _variance

    network = BayesianMLP((5, 4, 1), DirichletHorseshoe(p0=2, block=(2, 1)), 12)
    variance = network.prior_variance()
    sites = {name: network.get(variance, name).numpy() for name in network.slots}
    with jax.enable_x64(True):
        flat, _ = ravel_pytree(sites)
    np.testing.assert_array_equal(_variance(network), np.asarray(flat))


def test_nuts_refuses_priors_of_your_own():
    """A subclass could have another density, which the numpyro model would not know."""
    pytest.importorskip("numpyro")

    class Own(DirichletHorseshoe):
        pass

    x, y = problem()
    with pytest.raises(TypeError, match="no numpyro form of the prior Own; use sample_hmc"):
        bayes.sample_nuts(BayesianMLP((5, 4, 1), Own(p0=2), 12), x, y)


def test_a_missing_extra_is_named(monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] in ("jax", "numpyro"):
            raise ImportError(name)
        return real(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without)
    x, y = problem()
    with pytest.raises(ImportError, match=r"pip install 'tetris\[bayes\]'"):
        bayes.sample_nuts(BayesianMLP((5, 4, 1), Gaussian(), 12), x, y)


def test_predictive_of_two_networks_by_hand():
    outputs = torch.tensor([[[0.0], [1.0]], [[2.0], [1.0]]], dtype=torch.float64)
    noise = torch.tensor([1.0, 0.5], dtype=torch.float64)
    found = Predictive(outputs, noise, "regression")
    y = torch.tensor([1.0, 1.5], dtype=torch.float64)
    density = [
        np.mean([stats.norm.pdf(y[n], outputs[d, n, 0], noise[d]) for d in range(2)])
        for n in range(2)
    ]
    assert found.nll(y) == pytest.approx(-np.mean(np.log(density)))
    assert found.rmse(y) == pytest.approx(math.sqrt(0.25 / 2))
    logits = torch.tensor([[[0.9, 0.1], [0.3, 0.7], [0.8, 0.2]]], dtype=torch.float64).log()
    classes = Predictive(logits, None, "classification")
    labels = torch.tensor([0, 1, 1])
    assert classes.accuracy(labels) == pytest.approx(2 / 3)
    # bins of width 1/10: one point in each, gaps 0.1, 0.3 and 0.8
    assert classes.ece(labels, bins=10) == pytest.approx((0.1 + 0.3 + 0.8) / 3)


def test_a_calibrated_regression_has_a_small_error():
    torch.manual_seed(0)
    y = torch.randn(4000, dtype=torch.float64)
    right = Predictive(torch.zeros(1, 4000, 1).double(), torch.ones(1).double(), "regression")
    narrow = Predictive(right.outputs, torch.full((1,), 0.3).double(), "regression")
    assert right.ece(y) < 0.02 < 0.1 < narrow.ece(y)


def test_calibration_by_bins():
    logits = torch.tensor([[[0.9, 0.1], [0.3, 0.7], [0.92, 0.08]]], dtype=torch.float64).log()
    promised, observed, share = Predictive(logits, None, "classification").calibration(
        torch.tensor([0, 1, 1]), bins=5
    )
    assert promised[4] == pytest.approx(0.91)
    assert observed[3:].tolist() == [1.0, 0.5]
    np.testing.assert_allclose(share, [0, 0, 0, 1 / 3, 2 / 3])
    assert bool(promised[:3].isnan().all())


def test_noise_of_points_that_were_held_out():
    network = BayesianMLP((5, 4, 1), Gaussian(), 12)
    theta = network.start(torch.Generator().manual_seed(0), 1, 1)
    draws = bayes.Posterior(network, theta, Convergence("test"))
    x, y = problem(40)
    noise = draws.held_out_noise(x, y)
    residual = (draws.predict(x).mean[:, 0] - y).numpy()
    grid = np.linspace(0.05, 5, 20_001)
    density = stats.invgamma.logpdf(grid, 3, scale=2) + np.log(grid)
    density += stats.norm.logpdf(residual[:, None], scale=grid).sum(0)
    assert noise == pytest.approx(grid[density.argmax()], abs=1e-3)
    assert float(draws.with_noise(noise).weights().noise) == pytest.approx(noise)
    classes = BayesianMLP((5, 4, 2), Gaussian(), 12, "classification")
    theta = classes.start(torch.Generator().manual_seed(0), 1, 1)
    with pytest.raises(ValueError, match="noise is of a regression"):
        bayes.Posterior(classes, theta, Convergence("test")).with_noise(0.5)


def test_fgsm_harms_the_predictive_within_its_box():
    network = BayesianMLP((5, 4, 3), Gaussian(), 12, "classification")
    weights = network.weights(network.start(torch.Generator().manual_seed(0), 6))
    x, _ = problem()
    y = torch.arange(12) % 3
    moved = bayes.fgsm(lambda v: Predictive.of(weights, v), x, y, 0.05)
    assert float((moved - x).abs().max()) <= 0.05 + 1e-12
    assert Predictive.of(weights, moved).nll(y) > Predictive.of(weights, x).nll(y)
    posterior = bayes.Posterior(
        network, network.start(torch.Generator(), 1, 1), Convergence("test")
    )
    with pytest.raises(TypeError, match="such as posterior.predict"):
        bayes.fgsm(posterior, x, y, 0.05)
    with pytest.raises(ValueError, match=r"eps must be a number >= 0 \(got -1\)"):
        bayes.fgsm(posterior.predict, x, y, -1)


def test_settings_out_of_range():
    with pytest.raises(ValueError, match="more inputs than p0"):
        BayesianMLP((4, 3, 1), DirichletHorseshoe(), 10)
    with pytest.raises(ValueError, match="alpha must be a positive number"):
        DirichletHorseshoe(alpha=0.0)
    with pytest.raises(ValueError, match="task must be"):
        BayesianMLP((5, 3, 1), Gaussian(), 10, "clustering")
    with pytest.raises(ValueError, match="one for each of the first layers"):
        BayesianMLP((5, 3, 1), [Gaussian()] * 3, 10)
    with pytest.raises(ValueError, match="needs two outputs or more"):
        BayesianMLP((5, 3, 1), Gaussian(), 10, "classification")
    with pytest.raises(ValueError, match="prior must be a Prior.*the class DirichletHorseshoe"):
        BayesianMLP((5, 3, 1), DirichletHorseshoe, 10)
    with pytest.raises(ValueError, match="sizes must be inputs, hidden widths and outputs"):
        BayesianMLP(5, Gaussian(), 10)
    with pytest.raises(ValueError, match="slab must be shape and scale"):
        DirichletHorseshoe(slab=3.0)
    with pytest.raises(
        ValueError, match=r"samples, the number of data points, must be .* \(got 0\)"
    ):
        BayesianMLP((5, 3, 1), Gaussian(), 0)
    assert BayesianMLP((np.int64(5), 3, 1), Gaussian(), np.int64(10)).sizes == (5, 3, 1)


WRONG = {
    "numpy": (lambda x, y: (x.numpy(), y), TypeError, "torch.from_numpy converts it"),
    "no data sets": (lambda x, y: (x[0], y[0]), ValueError, r"x\[None\] and y\[None\]"),
    "inputs": (lambda x, y: (x[..., :4], y), ValueError, r"x must be \[data sets, N, 5\]"),
    "integers": (lambda x, y: (x.long(), y), ValueError, "x must be finite floating-point"),
    "a nan in x": (lambda x, y: (x / x.relu(), y), ValueError, "x must be finite"),
    "column": (lambda x, y: (x, y[..., None]), ValueError, r"y.squeeze\(-1\) has that shape"),
    "other sets": (lambda x, y: (x, y.expand(2, -1)), ValueError, r"here \[1, 12\]"),
    "fewer points": (lambda x, y: (x[:, :6], y[:, :6]), ValueError, "made for samples=12"),
    "none": (lambda x, y: (x[:, :0], y[:, :0]), ValueError, r"\(got 0 points\)"),
}


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize(("spoil", "error", "match"), WRONG.values(), ids=WRONG)
def test_data_that_do_not_go_with_the_network(spoil, error, match, task):
    network = BayesianMLP((5, 3, 2 if task == "classification" else 1), Gaussian(), 12, task)
    x, y = problem()
    y = (y > 0).long() if task == "classification" else y
    with pytest.raises(error, match=match):
        bayes.sample_hmc(network, *spoil(x[None], y[None]), warmup=20, draws=8)


def test_targets_of_the_wrong_kind():
    x, y = problem()
    classifier = BayesianMLP((5, 3, 2), Gaussian(), 12, "classification")
    with pytest.raises(ValueError, match=r"int64 classes \(got torch.float64\); y.long\(\)"):
        bayes.sample_hmc(classifier, x[None], y[None])
    with pytest.raises(ValueError, match=r"classes from 0 to 1 \(got some from 2 to 2\)"):
        bayes.MAP(classifier).fit(x, torch.full((12,), 2), 1)
    regression = BayesianMLP((5, 3, 1), Gaussian(), 12)
    with pytest.raises(ValueError, match=r"y must be finite numbers \(got 12 that are not\)"):
        bayes.MAP(regression).fit(x, y * torch.nan, 1)
    whole = bayes.MAP(regression).fit(x, (3 * y).long(), 1)  # counts are numbers
    found = whole.predict(x)
    assert found.rmse((3 * y).long()) > 0
    with pytest.raises(ValueError, match=r"y.squeeze\(-1\)"):  # broadcasting would compare all
        found.rmse(y[:, None])
    with pytest.raises(ValueError, match=r"Posterior.predict: x must be \[N, 5\]"):
        whole.predict(x[:, :3])


def test_counts_are_refused_before_sampling():
    x, y = problem()
    network = BayesianMLP((5, 3, 1), Gaussian(), 12)
    for settings, match in (
        ({"draws": 3}, r"draws, which R-hat is of, must be an int >= 4 \(got 3\)"),
        ({"chains": 0}, "chains must be an int >= 1"),
        ({"warmup": 3}, "sample_hmc: warmup must be an int >= 20"),
        ({"accept": 2.0}, r"accept must be a number in \(0, 1\)"),
        ({"dtype": torch.float16}, "float32 or float64"),
        ({"seed": 1.5}, r"sample_hmc: seed must be an int \(got 1.5\)"),
    ):
        with pytest.raises(ValueError, match=match):
            bayes.sample_hmc(network, x[None], y[None], **settings)
    with pytest.raises(ValueError, match="MAP: seed must be an int"):
        bayes.MAP(network, seed="a")
    assert torch.equal(bayes.MAP(network, seed=np.int64(7)).theta, bayes.MAP(network, seed=7).theta)
    with pytest.raises(TypeError, match="network must be a BayesianMLP"):
        bayes.sample_hmc(None, x[None], y[None])
    draws = bayes.Posterior(network, network.start(torch.Generator(), 2, 3), Convergence("test"))
    with pytest.raises(ValueError, match="index must be below 2"):
        draws.chain(2)
    assert torch.equal(draws.chain(-1).theta, draws.theta[1:])
    with pytest.raises(ValueError, match="draws must be an int >= 1"):
        draws.thin(0)


@pytest.mark.filterwarnings("ignore:sample_hmc")  # so few draws do not converge
def test_progress_is_shown_on_standard_error(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    x, y = problem()
    network = BayesianMLP((5, 3, 1), Gaussian(), 12)
    calls = []
    few = {"warmup": 20, "draws": 4, "steps": 1, "advance": lambda: calls.append(1)}
    for show in (True, False):
        fit = bayes.MAP(network)
        bayes.sample_hmc(network, x[None], y[None], progress=show, **few)
        fit.fit(x, y, 2, progress=show, advance=few["advance"])
        fit.around(x, y, 3, 1, progress=show, advance=few["advance"])
        assert len(calls) == 24 + 2 + 3  # whether a bar is shown or not
        calls.clear()
        shown = capsys.readouterr()
        assert not shown.out
        for name in ("sampling", "fitting", "walking"):
            assert (name in shown.err) == show
