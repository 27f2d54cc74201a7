"""The scalable path: non-centred MAP on minibatches, and draws around it."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES, check_seed, describe
from ..progress import counted
from .convergence import Convergence
from .data import check_count, check_data, check_positive
from .network import NOISE, BayesianMLP
from .posterior import Posterior, check_network

SETTLED = 0.02  # of the objective's fall, what the second half of the epochs may bring


class MAP:
    r"""Descends ``-log p(y | theta) - log p(theta)`` in minibatches, and can draw around its end.

    Theta is the non-centred state: ``1/2 |z|^2`` and the densities of the *logarithms* of scales
    bound the objective from below; the centred one falls without end as tau goes to zero.

    :meth:`fit` ends at one network. :meth:`around` walks on at a constant step and returns draws of
    a Gaussian with the walk's mean and its diagonal plus low-rank covariance (SWAG: Maddox et al.,
    "A simple baseline for Bayesian uncertainty in deep learning", NeurIPS 2019, section 3). Scales
    and weights covary in it, and it sits at a network that fits: the factorized variational family
    fitted from the prior, by contrast, prefers a nearly linear network. It knows one mode only, and
    how far it is from a sampler is for an experiment to say
    (``python -m benchmarks.methods --method dsm``).

    Attributes:
        theta: State [size], the last one that was finite.
        history: Objective per data point, mean of each epoch.

    Args:
        network: What to learn.
        batch: Points per step.
        seed: Of the start, of batches and of draws.
        dtype: To compute in.
        noise: Standard deviation of a regression's noise, held fixed: by default 2/3, the mode of
            its logarithm under the prior, for targets of unit variance. None learns it, which with
            few points per weight ends in interpolation (Friedman, N = 100, DHS: noise .02 and
            RMSE .53; held at 2/3 .36). Held, it is too wide to predict with: see
            :meth:`tetris.bayes.Posterior.held_out_noise`.

    Raises:
        ValueError: batch or noise out of range.

    Example:
        >>> network = BayesianMLP((64, 1024, 10), DirichletHorseshoe(block=(16, 16)), len(x),
        ...                       "classification", "relu")
        >>> fit = MAP(network)
        >>> fit.fit(x, y, epochs=60)
        >>> posterior = fit.around(x, y, epochs=20, draws=20)
    """

    def __init__(
        self,
        network: BayesianMLP,
        *,
        batch: int = 128,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        noise: float | None = 2 / 3,
    ) -> None:
        check_network("MAP", network)
        check_count("MAP", "batch", batch, 1)
        if noise is not None:
            check_positive("MAP", noise=noise)
        if dtype not in DTYPES["cpu"]:
            raise ValueError(f"MAP: dtype must be float32 or float64 (got {describe(dtype)})")
        self.network = network
        self.batch = batch
        self.generator = torch.Generator().manual_seed(check_seed("MAP", seed))
        self.theta = network.start(self.generator, dtype=dtype, spread=0.0)
        self._fixed: slice | None = None
        if noise is not None and network.task == "regression":
            network.get(self.theta, NOISE).fill_(math.log(noise))
            self._fixed = network.slots[NOISE][0]
        self.history: list[float] = []
        self._notes: tuple[str, ...] = ("the fit has not run",)

    def fit(
        self,
        x: Tensor,
        y: Tensor,
        epochs: int,
        *,
        learning_rate: float = 1e-2,
        advance: Callable[[], object] = lambda: None,
        progress: bool = False,
    ) -> Posterior:
        """Adam with a learning rate that falls to zero as a cosine.

        Args:
            x: [N, in].
            y: [N].
            epochs: Passes over the data.
            learning_rate: At the start.
            advance: Called once per epoch.
            progress: Show a progress bar.

        Returns:
            The end as a posterior of one draw.

        Raises:
            FloatingPointError: the objective is not finite. :attr:`theta` is then the last state
                whose objective was, and the fit may go on from it at a smaller learning rate.
        """
        self._check("MAP.fit", x, y, epochs, learning_rate)
        began = len(self.history)
        with counted(progress, "fitting", epochs, advance) as after:
            self._descend("MAP.fit", x, y, epochs, learning_rate, True, after, lambda theta: None)
        self._notes = self._descended(began)
        return Posterior(self.network, self.theta[None, None].clone(), self.convergence)

    def around(
        self,
        x: Tensor,
        y: Tensor,
        epochs: int,
        draws: int,
        *,
        learning_rate: float = 1e-3,
        rank: int = 20,
        advance: Callable[[], object] = lambda: None,
        progress: bool = False,
    ) -> Posterior:
        """Walk on at a constant learning rate and draw from the Gaussian that fits the walk.

        Args:
            x: [N, in].
            y: [N].
            epochs: Passes over the data; the state after each counts.
            draws: How many to draw.
            learning_rate: Of Adam; sets how wide the walk is.
            rank: Columns of the low-rank part, of the last epochs.
            advance: Called once per epoch.
            progress: Show a progress bar.

        Returns:
            Draws as one chain; their convergence tells whether the walk still descended.
            :attr:`theta` stays where :meth:`fit` ended.

        Raises:
            FloatingPointError: as :meth:`fit`.
        """
        where = "MAP.around"
        self._check(where, x, y, epochs, learning_rate)
        for name, value, least in (("epochs", epochs, 2), ("draws", draws, 1), ("rank", rank, 2)):
            check_count(where, name, value, least)
        end, began = self.theta, len(self.history)
        mean, square, count = torch.zeros_like(end), torch.zeros_like(end), 0
        last: list[Tensor] = []

        def collect(theta: Tensor) -> None:
            nonlocal mean, square, count
            count += 1
            mean = mean + (theta - mean) / count
            square = square + (theta.square() - square) / count
            last.append(theta - mean)
            del last[:-rank]

        try:
            with counted(progress, "walking", epochs, advance) as after:
                self._descend(where, x, y, epochs, learning_rate, False, after, collect)
        finally:
            self.theta = end
        sd = (square - mean.square()).clamp(min=0).sqrt()
        deviations = torch.stack(last)
        like = {"generator": self.generator, "dtype": end.dtype}
        own = torch.randn((draws, len(end)), **like) * sd
        shared = torch.randn((draws, len(last)), **like) @ deviations
        theta = mean + (own + shared / math.sqrt(len(last) - 1)) / math.sqrt(2)
        return Posterior(
            self.network, theta[None], Convergence("SWAG", notes=self._notes + self._walked(began))
        )

    def _descended(self, began: int) -> tuple[str, ...]:
        """What speaks against a fit: an objective that still falls, or that rose."""
        run = self.history[began:]
        # The last epochs tell nothing: at a vanishing learning rate every objective settles.
        first, half, last = run[0], run[len(run) // 2], run[-1]
        fall, late = first - last, half - last
        if len(run) > 1 and (fall <= 0 or late < -SETTLED * fall):
            return (
                f"the objective rose from {min(first, half):.4g} to {last:.4g} nats per point; "
                "lower learning_rate",
            )
        if len(run) < 10:
            return (f"{len(run)} epochs are too few to tell whether the objective settled",)
        if late > SETTLED * fall:
            return (
                f"the second half of the epochs still brought {late:.3g} of the {fall:.3g} "
                "nats per point by which the objective fell; run longer",
            )
        return ()

    def _walked(self, began: int) -> tuple[str, ...]:
        """What speaks against a walk: a Gaussian around a descent is no posterior."""
        walk = self.history[began:]
        half = len(walk) // 2
        fell = sum(walk[:half]) / half - sum(walk[-half:]) / half
        fall = self.history[0] - walk[-1]
        if fell <= SETTLED * abs(fall):
            return ()
        return (
            f"the walk still descended: the objective fell by {fell:.3g} nats per point from its "
            f"first half to its second, of {fall:.3g} altogether; fit longer",
        )

    def state_dict(self) -> dict[str, Any]:
        """All that :meth:`load_state_dict` needs to go on, for ``torch.save``."""
        return {
            "theta": self.theta.clone(),
            "history": list(self.history),
            "notes": list(self._notes),
            "generator": self.generator.get_state(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from where another MAP of the same network was.

        The next :meth:`fit` starts its learning rate and Adam's moments anew, as it does without
        a checkpoint.

        Raises:
            ValueError: the state is of another network, or of something else.
        """
        missing = sorted({"theta", "history", "notes", "generator"} - set(state))
        if missing:
            raise ValueError(f"MAP.load_state_dict: state lacks {', '.join(missing)}")
        if state["theta"].shape != self.theta.shape:
            raise ValueError(
                f"MAP.load_state_dict: theta must be {list(self.theta.shape)}, as this network's "
                f"(got {list(state['theta'].shape)})"
            )
        self.theta = state["theta"].to(self.theta.dtype, copy=True)
        self.history = list(state["history"])
        self._notes = tuple(state["notes"])
        self.generator.set_state(state["generator"])

    @property
    def convergence(self) -> Convergence:
        """Whether the objective settled; of a MAP nothing else can be said."""
        return Convergence("MAP", notes=self._notes)

    def _check(self, where: str, x: Tensor, y: Tensor, epochs: int, learning_rate: float) -> None:
        check_data(where, self.network, x, y)
        check_count(where, "epochs", epochs, 1)
        check_positive(where, learning_rate=learning_rate)

    def _descend(
        self,
        where: str,
        x: Tensor,
        y: Tensor,
        epochs: int,
        learning_rate: float,
        anneal: bool,
        advance: Callable[[], object],
        after_epoch: Callable[[Tensor], None],
    ) -> None:
        samples = len(x)
        x = x.to(self.theta.dtype)
        y = y if self.network.task == "classification" else y.to(self.theta.dtype)
        theta = self.theta.clone().requires_grad_()
        optimizer = torch.optim.Adam([theta], lr=learning_rate)
        total, done = epochs * math.ceil(samples / self.batch), 0
        for _ in range(epochs):
            mean = 0.0
            for chosen in torch.randperm(samples, generator=self.generator).split(self.batch):
                if anneal:
                    share = 0.5 * (1 + math.cos(math.pi * done / total))
                    optimizer.param_groups[0]["lr"] = learning_rate * share
                optimizer.zero_grad()
                fit = self.network.log_likelihood(theta, x[chosen], y[chosen]).mean()
                objective = -fit - self.network.log_prior(theta) / samples
                value = float(objective.detach())
                if not math.isfinite(value):
                    raise FloatingPointError(
                        f"{where}: the objective became {value} in epoch {len(self.history)}; "
                        f"theta is the last state that was finite. A learning rate below "
                        f"{learning_rate:g} may go on from it"
                    )
                self.theta = theta.detach().clone()
                objective.backward()
                if self._fixed is not None and theta.grad is not None:
                    theta.grad[self._fixed] = 0
                optimizer.step()
                mean += value * len(chosen) / samples
                done += 1
            self.history.append(mean)
            after_epoch(theta.detach().clone())
            advance()
        with torch.no_grad():
            ended = self.network.log_joint(theta, x[: self.batch], y[: self.batch])
        if bool(ended.isfinite()):
            self.theta = theta.detach().clone()
