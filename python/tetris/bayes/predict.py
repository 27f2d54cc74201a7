"""What a posterior says about data: predictive, errors, calibration, attacks."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .weights import Task, Weights, targets


@dataclass(frozen=True)
class Predictive:
    """Mixture over draws of what each network says.

    Attributes:
        outputs: [draws, N, out]; logits, or means.
        noise: Standard deviations [draws] of regression, else None.
        task: What outputs stand for.
    """

    outputs: Tensor
    noise: Tensor | None
    task: Task

    @classmethod
    def of(cls, weights: Weights, x: Tensor) -> Predictive:
        """Of networks with any leading dimensions at x [N, in]; differentiable in x."""
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
        return float((self.mean - self._numbers(y)).square().mean().sqrt())

    @torch.no_grad()
    def accuracy(self, y: Tensor) -> float:
        """Share of right classes; of regression R^2, one minus squared error over variance."""
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
        if self.task == "classification":
            confidence, label = self.mean.max(-1)
            right = (label == y).to(confidence.dtype)
            index = (confidence * bins).long().clamp(max=bins - 1)
            zeros = torch.zeros(bins, dtype=confidence.dtype)
            count = zeros.index_add(0, index, torch.ones_like(confidence))
            promised = zeros.index_add(0, index, confidence) / count
            return promised, zeros.index_add(0, index, right) / count, count / len(y)
        assert self.noise is not None
        score = (self._numbers(y) - self.outputs) / self.noise[:, None, None]
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
        y: Targets.
        eps: In units of x.
    """
    with torch.enable_grad():
        moved = x.detach().clone().requires_grad_()
        (gradient,) = torch.autograd.grad(-predict(moved).log_density(y).sum(), moved)
    return x + eps * gradient.sign()
