"""What a posterior says about data: predictive, errors, calibration, attacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from ..checks import check_tensor, describe
from .data import check_count, check_inputs, check_targets
from .weights import Task, Weights, targets


@dataclass(frozen=True)
class Predictive:
    """Mixture over draws of what each network says.

    Attributes:
        outputs: [draws, N, out]; logits, or means.
        noise: Standard deviations [draws] of regression, else None.
        task: What outputs stand for.

    Example:
        >>> found = posterior.predict(x)
        >>> found.nll(y), found.rmse(y), found.ece(y)
        >>> promised, observed, share = found.calibration(y, bins=10)
    """

    outputs: Tensor
    noise: Tensor | None
    task: Task

    @classmethod
    def of(cls, weights: Weights, x: Tensor) -> Predictive:
        """Of networks with any leading dimensions at x [N, in]; differentiable in x."""
        check_inputs("Predictive.of", weights.layers[0][0].shape[-1], x)
        flat = weights.flat()
        return cls(flat(x.to(flat.layers[0][0].dtype)), flat.noise, flat.task)

    @property
    def mean(self) -> Tensor:
        """[N, out]: mean of y, or probabilities of classes."""
        if self.task == "classification":
            return self.outputs.softmax(-1).mean(0)
        return self.outputs.mean(0)

    def log_density(self, y: Tensor) -> Tensor:
        """Log predictive density [N] of targets: the log of the mean over draws."""
        self._check(y)
        self._need_noise("log_density")
        weights = Weights((), self.noise, self.task, "tanh")
        each = weights.log_likelihood(self.outputs, y)
        return each.logsumexp(0) - math.log(len(each))

    @torch.no_grad()
    def nll(self, y: Tensor) -> float:
        """Mean negative log predictive density."""
        return -float(self.log_density(y).mean())

    @torch.no_grad()
    def rmse(self, y: Tensor) -> float:
        """Root mean squared error of the mean; of probabilities against 0 and 1 for classes."""
        self._check(y)
        return float((self.mean - self._numbers(y)).square().mean().sqrt())

    @torch.no_grad()
    def accuracy(self, y: Tensor) -> float:
        """Share of right classes; of regression R^2, one minus squared error over variance."""
        self._check(y)
        if self.task == "classification":
            return float((self.mean.argmax(-1) == y).double().mean())
        numbers = self._numbers(y)
        return 1 - float((self.mean - numbers).square().mean() / numbers.var(correction=0))

    @torch.no_grad()
    def calibration(self, y: Tensor, bins: int = 15) -> tuple[Tensor, Tensor, Tensor]:
        """What was promised, what came true, and for which share of points, [bins] each.

        Classification: mean confidence and accuracy in equally wide bins of confidence (Guo et al.,
        "On calibration of modern neural networks", ICML 2017); NaN in empty bins. Regression: how
        often y lies below predictive quantiles, against their levels ``1 / (bins + 1), ...``
        (Kuleshov et al., "Accurate uncertainties for deep learning using calibrated regression",
        ICML 2018); shares are equal.
        """
        self._check(y)
        check_count("Predictive.calibration", "bins", bins, 1)
        if self.task == "classification":
            confidence, label = self.mean.max(-1)
            right = (label == y).to(confidence.dtype)
            index = (confidence * bins).long().clamp(max=bins - 1)
            zeros = torch.zeros(bins, dtype=confidence.dtype)
            count = zeros.index_add(0, index, torch.ones_like(confidence))
            promised = zeros.index_add(0, index, confidence) / count
            return promised, zeros.index_add(0, index, right) / count, count / len(y)
        score = (self._numbers(y) - self.outputs) / self._need_noise("calibration")[:, None, None]
        below = torch.special.ndtr(score).mean(0).flatten()
        levels = torch.arange(1, bins + 1, dtype=below.dtype) / (bins + 1)
        observed = (below[:, None] <= levels).to(below.dtype).mean(0)
        return levels, observed, torch.full_like(levels, 1 / bins)

    def ece(self, y: Tensor, bins: int = 15) -> float:
        """Expected calibration error, in [0, 1]: mean of ``|came true - promised|``.

        See :meth:`calibration`; for classes this is equation 3 of Guo et al.
        """
        promised, observed, share = self.calibration(y, bins)
        return float(((observed - promised).abs() * share).nansum())

    def _check(self, y: Tensor) -> None:
        _, points, out = self.outputs.shape
        check_targets("Predictive", y, (points,), out, self.task)

    def _need_noise(self, what: str) -> Tensor:
        """Of a regression; classes get by without."""
        if self.noise is None and self.task == "regression":
            raise ValueError(
                f"Predictive.{what}: of a regression, the standard deviations of its noise are "
                "needed; Ensemble(..., noise=...) takes them"
            )
        return self.outputs.new_ones(()) if self.noise is None else self.noise

    def _numbers(self, y: Tensor) -> Tensor:
        out = self.outputs.shape[-1]
        if self.task == "classification":
            return torch.nn.functional.one_hot(y, out).to(self.outputs.dtype)
        return targets(y, out).to(self.outputs.dtype)


def fgsm(predict: Callable[[Tensor], Predictive], x: Tensor, y: Tensor, eps: float) -> Tensor:
    """Inputs moved by ``eps`` per component so as to harm the predictive most, to first order.

    ``x + eps * sign(grad_x -log p(y | x))`` with p the posterior predictive, so that the attack
    sees the whole ensemble. (Goodfellow et al., "Explaining and harnessing adversarial examples",
    ICLR 2015, section 4.)

    Args:
        predict: Such as :meth:`tetris.bayes.Posterior.predict`.
        x: [N, in].
        y: Targets: int64[N] classes, or numbers [N]; [N, out] of several outputs.
        eps: In units of x; 0 moves nothing.

    Returns:
        [N, in], of the type of x.

    Raises:
        TypeError: predict cannot be called, or x or y is no tensor.
        ValueError: x are no floating-point numbers, eps is negative, or y does not go with x.

    Example:
        >>> moved = fgsm(posterior.predict, x, y, eps=0.05)
        >>> posterior.predict(moved).nll(y) > posterior.predict(x).nll(y)
        True
    """
    if not callable(predict):
        raise TypeError(
            "fgsm: predict must be a function from inputs to a Predictive, such as "
            f"posterior.predict (got {describe(predict)})"
        )
    if not check_tensor("fgsm", "x", x).is_floating_point():
        raise ValueError(f"fgsm: x must be floating point (got {x.dtype})")
    if not isinstance(eps, (int, float)) or not 0 <= eps < math.inf:
        raise ValueError(f"fgsm: eps must be a number >= 0 (got {describe(eps)})")
    with torch.inference_mode(False), torch.enable_grad():
        moved = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(-predict(moved).log_density(y).sum(), moved)
    return x + eps * gradient.sign()
