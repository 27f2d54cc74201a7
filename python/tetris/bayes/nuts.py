"""The reference sampler: NUTS by numpyro, an extra (``pip install 'tetris[bayes]'``).

The model is written once more, in numpyro's distributions, so that comparing the two samplers
compares two derivations of the same posterior.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_seed
from .convergence import LEAST_DRAWS
from .data import check_count, check_data, check_share
from .laws import Gamma, HalfCauchy, HalfStudentT, InverseGamma, Law
from .network import NOISE, BayesianMLP
from .posterior import Posterior, check_network, judge, warn_of_runs
from .priors import DirichletHorseshoe, DirichletStudentT, Gaussian, RegularizedHorseshoe

_KNOWN = (Gaussian, RegularizedHorseshoe, DirichletHorseshoe, DirichletStudentT)


def _numpyro(where: str) -> tuple[Any, Any, Any]:
    """(jax, jax.numpy, numpyro), or an ImportError that names the extra."""
    try:
        import jax
        import numpyro
    except ImportError as error:
        raise ImportError(
            f"{where} needs jax and numpyro, which are an extra: pip install 'tetris[bayes]'; "
            "tetris.bayes.sample_hmc needs neither"
        ) from error
    return jax, jax.numpy, numpyro


def sample_nuts(
    network: BayesianMLP,
    x: Tensor,
    y: Tensor,
    *,
    chains: int = 4,
    warmup: int = 1000,
    draws: int = 1000,
    accept: float | None = None,
    max_tree_depth: int | None = None,
    seed: int = 0,
    progress: bool = False,
) -> Posterior:
    """Posterior of a network by NUTS, in double precision, one chain after the other.

    Defaults are the paper's: four chains of 1000 + 1000, acceptance .90 and trees of depth 12 for
    regression, .80 and 10 for classification. Warns of a run that did not converge; the result
    says why.

    Args:
        network: What to learn.
        x: [N, in].
        y: [N], or [N, out] of several outputs.
        chains: Number of chains.
        warmup: Iterations per chain that are thrown away.
        draws: Iterations per chain that are kept.
        accept: Acceptance probability to adapt to.
        max_tree_depth: Trees have up to 2 ** depth - 1 leapfrog steps.
        seed: Of the starts and draws.
        progress: Show numpyro's progress bars.

    Returns:
        Draws in float64, [chains, draws, size].

    Raises:
        ImportError: jax or numpyro is missing; the message names the extra.
        TypeError: x or y is no tensor; a prior that numpyro is not told of here, such as a
            subclass of one.
        ValueError: x or y do not go with the network, or counts are out of range.

    Example:
        >>> posterior = sample_nuts(network, x, y, chains=4)
        >>> print(posterior.convergence)
        >>> posterior.predict(x).rmse(y)

    NUTS: Hoffman and Gelman, "The No-U-Turn Sampler", JMLR 2014.
    """
    where = "sample_nuts"
    jax, jnp, numpyro = _numpyro(where)
    check_network(where, network)
    for prior in network.priors:  # one of another class, also a subclass, has formulas of its own
        if type(prior) not in _KNOWN:
            raise TypeError(
                f"{where}: no numpyro form of the prior {type(prior).__name__}; use sample_hmc"
            )
    check_data(where, network, x, y)
    check_count(where, "chains", chains, 1)
    check_count(where, "warmup", warmup, 1)
    check_count(where, "draws, which R-hat is of,", draws, LEAST_DRAWS)
    regression = network.task == "regression"
    accept = (0.9 if regression else 0.8) if accept is None else accept
    depth = (12 if regression else 10) if max_tree_depth is None else max_tree_depth
    check_share(where, accept=accept)
    check_count(where, "max_tree_depth", depth, 1)
    seed = check_seed(where, seed)
    with _double(jax):  # gammas of shape 0.1 underflow in float32
        targets = y.double().numpy() if regression else y.numpy()
        if regression and network.sizes[-1] == 1:
            targets = targets[:, None]
        kernel = numpyro.infer.NUTS(
            _model,
            target_accept_prob=accept,
            max_tree_depth=depth,
            init_strategy=numpyro.infer.init_to_uniform(radius=1.0),
            inverse_mass_matrix=jnp.asarray(_variance(network)),
        )
        run = numpyro.infer.MCMC(
            kernel,
            num_warmup=warmup,
            num_samples=draws,
            num_chains=chains,
            chain_method="sequential",
            progress_bar=progress,
        )
        run.run(
            jax.random.PRNGKey(seed),
            network,
            jnp.asarray(x.double().numpy()),
            jnp.asarray(targets),
            extra_fields=("diverging", "num_steps", "accept_prob"),
        )
        sites = {n: np.asarray(v) for n, v in run.get_samples(group_by_chain=True).items()}
        extra = {n: np.asarray(v) for n, v in run.get_extra_fields(group_by_chain=True).items()}
    theta = _theta(network, sites)
    with torch.no_grad():
        values = network.log_joint(theta, x.double(), y.double() if regression else y)
    convergence = judge(
        "NUTS",
        network,
        theta,
        values,
        x.double(),
        divergences=tuple(extra["diverging"].mean(1).tolist()),
        accept=tuple(extra["accept_prob"].mean(1).tolist()),
        saturated=tuple((extra["num_steps"] >= 2**depth - 1).mean(1).tolist()),
    )
    warn_of_runs(where, [convergence])
    return Posterior(network, theta, convergence)


def _double(jax: Any) -> Any:
    """The context in which jax computes in double precision; elsewhere before 0.8."""
    if hasattr(jax, "enable_x64"):
        return jax.enable_x64(True)
    experimental: Any = importlib.import_module("jax.experimental")
    return experimental.enable_x64(True)


def _theta(network: BayesianMLP, sites: Mapping[str, np.ndarray]) -> Tensor:
    """[chains, draws, size] of numpyro's samples, whose scales are not logarithms."""
    scales = network.scales()
    parts = {}
    for name in network.slots:
        value = torch.from_numpy(np.array(sites[name], dtype=np.float64))
        parts[name] = value.log() if name in scales else value
    return network.pack(parts)


def _variance(network: BayesianMLP) -> np.ndarray:
    """Variance of the unconstrained state before data; numpyro orders sites by name."""
    theta = network.prior_variance()
    return torch.cat([network.get(theta, name).flatten() for name in sorted(network.slots)]).numpy()


def _distribution(law: Law) -> Any:
    import numpyro.distributions as d

    if isinstance(law, HalfCauchy):
        return d.HalfCauchy(law.scale)
    if isinstance(law, HalfStudentT):
        return d.FoldedDistribution(d.StudentT(law.df))
    if isinstance(law, InverseGamma):
        return d.InverseGamma(law.shape, law.scale)
    assert isinstance(law, Gamma)
    return d.Gamma(law.shape)


def _independent(law: Law, shape: tuple[int, ...]) -> Any:
    return _distribution(law).expand(shape).to_event(len(shape))


def _model(network: BayesianMLP, x: Any, y: Any) -> None:
    """The numpyro model; sites are named as the network's slots."""
    import jax
    import jax.numpy as jnp
    import numpyro
    import numpyro.distributions as d

    hidden = x
    for index in range(network.layers):
        out, in_ = network.shape(index)
        scales: dict[str, Any] = {
            name: numpyro.sample(f"{index}.{name}", _independent(s.law, s.shape))
            for name, s in network.priors[index].scales(out, in_).items()
        }
        normal: Any = d.Normal(0.0, 1.0)
        z = numpyro.sample(f"{index}.z", normal.expand((out, in_)).to_event(2))
        bias = numpyro.sample(f"{index}.bias", normal.expand((out,)).to_event(1))
        if index:
            hidden = jnp.tanh(hidden) if network.activation == "tanh" else jax.nn.relu(hidden)
        hidden = hidden @ (z * _sd(network, index, scales)).T + bias
    if network.task == "classification":
        categorical: Any = d.Categorical(logits=hidden)  # type: ignore[abstract]
        numpyro.sample("y", categorical.to_event(1), obs=y)
    else:
        law = network.scales()[NOISE].law
        noise: Any = numpyro.sample(NOISE, _independent(law, (1,)))
        numpyro.sample("y", d.Normal(hidden, noise[0]).to_event(2), obs=y)


def _sd(network: BayesianMLP, index: int, scales: Mapping[str, Any]) -> Any:
    """Standard deviations [out, in] of a layer, in jax and from the formulas, not from logs."""
    import jax.numpy as jnp

    prior, (out, in_) = network.priors[index], network.shape(index)
    if isinstance(prior, Gaussian):
        return out**-0.5 if prior.sd is None else prior.sd
    assert isinstance(prior, (RegularizedHorseshoe, DirichletHorseshoe))
    bo, bi = prior.block
    tau = prior.p0 / (in_ - prior.p0) / network.samples**0.5 * scales["tau"]
    local, slab = scales["lambda"], scales["c2"]
    if isinstance(prior, DirichletHorseshoe):
        local, slab = local[:, None], slab[:, None]
        share = scales["gamma"] / scales["gamma"].sum(1, keepdims=True) / bi
    else:
        slab, share = slab[:, None], 1.0
    squared = slab * local**2 / (slab + tau**2 * local**2)
    blocks = tau * jnp.sqrt(squared * share)
    return jnp.repeat(jnp.repeat(blocks, bo, 0)[:out], bi, 1)[:, :in_]
