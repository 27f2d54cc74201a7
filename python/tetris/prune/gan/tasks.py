"""Loss terms of generative adversarial networks, one number per sample, by the kind of task."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from numbers import Real
from typing import Literal, NamedTuple, Protocol

import torch
from torch import Tensor
from torch.nn import functional as F

from ...checks import describe

Network = Callable[..., Tensor]
Adversarial = Literal["logistic", "hinge", "least_squares", "wasserstein"]


class _Losses(NamedTuple):
    """What a score costs: the generator, and the discriminator on real and generated images."""

    generator: Callable[[Tensor], Tensor]
    real: Callable[[Tensor], Tensor]
    generated: Callable[[Tensor], Tensor]


_LOSSES: dict[str, _Losses] = {
    "logistic": _Losses(lambda s: F.softplus(-s), lambda s: F.softplus(-s), F.softplus),
    "hinge": _Losses(lambda s: -s, lambda s: F.relu(1.0 - s), lambda s: F.relu(1.0 + s)),
    "least_squares": _Losses(
        lambda s: (s - 1.0).square(), lambda s: (s - 1.0).square(), torch.square
    ),
    "wasserstein": _Losses(lambda s: -s, lambda s: -s, lambda s: s),
}


@dataclass(frozen=True)
class Sample:
    """What a generator made of a batch, and what there is to judge it by.

    Attributes:
        generator: That made it: the dense one, or the pruned one.
        inputs: Of the generator: latents; latents and labels; images; images and labels.
        real: Real images, and their labels if there are any.
        generated: ``generator(*inputs)``.
    """

    generator: Network
    inputs: tuple[Tensor, ...]
    real: tuple[Tensor, ...]
    generated: Tensor


class GANTask(Protocol):
    """What a GAN was trained for: its loss terms, and their weights in its own training.

    A class of your own with these three members will do. Terms are tensors ``[N]``, one number per
    sample, or a scalar. Random numbers that they draw are the same for both generators. The
    ``discriminator`` may be called, and has the attributes and methods of yours.

    Example:
        >>> class Sharp(tetris.prune.UnconditionalGAN):
        ...     weights = {"edges": 0.1}
        ...     def generator_terms(self, discriminator, sample):
        ...         edges = sample.generated.diff(dim=-1).abs().flatten(1).mean(1)
        ...         return {**super().generator_terms(discriminator, sample), "edges": edges}
    """

    @property
    def weights(self) -> Mapping[str, float]:
        """Term -> weight; 1 for terms that are not in it."""
        ...

    def generator_terms(self, discriminator: Network, sample: Sample) -> Mapping[str, Tensor]:
        """What the generator is trained to make small."""
        ...

    def discriminator_terms(self, discriminator: Network, sample: Sample) -> Mapping[str, Tensor]:
        """What the discriminator is trained to make small."""
        ...


@dataclass(frozen=True)
class UnconditionalGAN:
    """``generator(latent)``, ``discriminator(images) -> scores``, real images.

    Terms: ``gen`` and ``dis`` of the adversarial loss; ``gp``, the gradient penalty
    ``(|grad D(x)| - 1)^2`` at a random point x between a real and a generated image (Gulrajani et
    al., "Improved Training of Wasserstein GANs", NeurIPS 2017, equation 3), if it has a weight.

    Attributes:
        loss: ``logistic`` (not saturating), ``hinge``, ``least_squares`` or ``wasserstein``.
            Scores are of any shape ``[N, ...]``, such as those of patches. ``logistic`` takes
            logits: a discriminator that ends in a sigmoid, for ``nn.BCELoss``, is passed without.
        penalty: Weight of the gradient penalty.

    Raises:
        ValueError: another loss, or a weight that is negative or no number.

    Example:
        >>> task = tetris.prune.UnconditionalGAN("wasserstein", penalty=10.0)
        >>> pruner = tetris.prune.GANPruner(
        ...     generator, discriminator, task=task, train_d=False, schedule="one_shot",
        ...     sparsity=0.5, block=(8, 8),
        ... )
    """

    loss: Adversarial = "logistic"
    penalty: float = 0.0

    def __post_init__(self) -> None:
        name = type(self).__name__
        if self.loss not in _LOSSES:
            raise ValueError(
                f"{name}: loss must be one of {', '.join(_LOSSES)} (got {describe(self.loss)})"
            )
        for field in ("penalty", "classify", "reconstruct"):
            weight = getattr(self, field, None)
            if weight is not None and not (
                isinstance(weight, Real) and 0 <= float(weight) < math.inf
            ):
                raise ValueError(
                    f"{name}: {field}, the weight of a term, must be a number, 0 or more "
                    f"(got {describe(weight)})"
                )

    @property
    def weights(self) -> Mapping[str, float]:
        """Term -> weight."""
        return {"gp": self.penalty}

    def generator_terms(self, discriminator: Network, sample: Sample) -> dict[str, Tensor]:
        """``gen``, and ``cla`` of a discriminator that classifies."""
        scores, logits = self._judged(discriminator, sample.generated, _labels(sample.inputs))
        terms = {"gen": _each(_LOSSES[self.loss].generator(scores))}
        if logits is not None:
            terms["cla"] = self._classes(logits, _labels(sample.inputs), "inputs")
        return terms

    def discriminator_terms(self, discriminator: Network, sample: Sample) -> dict[str, Tensor]:
        """``dis``, ``cla`` of the real images, ``gp``."""
        losses, images = _LOSSES[self.loss], (sample.real[0], sample.generated)
        if len({(image.dim(), *image.shape[1:2]) for image in images}) > 1:
            raise ValueError(
                f"{type(self).__name__}: real and generated images must be shaped alike, for one "
                f"discriminator (got {list(images[0].shape)} and {list(images[1].shape)})"
            )
        real, logits = self._judged(discriminator, sample.real[0], _labels(sample.real))
        generated, _ = self._judged(discriminator, sample.generated, _labels(sample.inputs))
        terms = {"dis": losses.real(real).mean() + _each(losses.generated(generated))}
        if logits is not None:
            terms["cla"] = self._classes(logits, _labels(sample.real), "real")
        if self.penalty:
            terms["gp"] = self._gradient_penalty(discriminator, sample)
        return terms

    def judge(
        self, discriminator: Network, images: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores, and the logits of classes if the discriminator classifies."""
        return discriminator(images), None

    def _judged(
        self, discriminator: Network, images: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """What :meth:`judge` gives, if it is scores."""
        scores, logits = self.judge(discriminator, images, labels)
        if not isinstance(scores, Tensor):
            raise TypeError(
                f"{type(self).__name__}: the discriminator must return scores, a tensor "
                f"(got {describe(scores)}); one that returns (scores, logits) has a weight for "
                "classify, others need a task of your own"
            )
        if scores.dim() == 0 or len(scores) != len(images):
            raise ValueError(
                f"{type(self).__name__}: the discriminator must return scores [N, ...], one or "
                f"more per image (got {list(scores.shape)} for {len(images)} images)"
            )
        return scores, logits

    def _gradient_penalty(self, discriminator: Network, sample: Sample) -> Tensor:
        real, generated = sample.real[0], sample.generated
        if real.shape != generated.shape:
            raise ValueError(
                f"{type(self).__name__}: a gradient penalty needs as many real images as generated "
                f"ones, of one shape (got {list(real.shape)} and {list(generated.shape)})"
            )
        mix = torch.rand(len(real), *[1] * (real.dim() - 1), device=real.device)
        between = torch.lerp(real, generated.to(real.dtype), mix.to(real.dtype))
        if not between.requires_grad:
            between.requires_grad_()
        scores, _ = self._judged(discriminator, between, _labels(sample.inputs))
        (gradient,) = torch.autograd.grad(scores.sum(), between, create_graph=True)
        return (gradient.flatten(1).norm(dim=1) - 1.0).square()

    def _known(self, labels: Tensor | None, where: str) -> Tensor:
        if labels is None:
            raise ValueError(
                f"{type(self).__name__}: labels are needed, the last of {where}: "
                "loss((images, labels), latent, labels)"
            )
        return labels

    def _classes(self, logits: Tensor, labels: Tensor | None, where: str) -> Tensor:
        """[N], cross entropy of classes, or the sum of those of attributes."""
        labels = self._known(labels, where)
        if labels.is_floating_point() and labels.shape == logits.shape:
            each = F.binary_cross_entropy_with_logits(logits, labels, reduction="none")
            return each.flatten(1).sum(1)
        count, classes = logits.shape
        fits = labels.dtype == torch.int64 and tuple(labels.shape) == (count,)
        if not fits or not 0 <= int(labels.min()) <= int(labels.max()) < classes:
            span = "" if not fits else f" from {int(labels.min())} to {int(labels.max())}"
            raise ValueError(
                f"{type(self).__name__}: labels of {where} must be classes, int64[{count}] from 0 "
                f"to {classes - 1}, or attributes, floating{list(logits.shape)} of 0 and 1 "
                f"(got {labels.dtype}{list(labels.shape)}{span})"
            )
        return F.cross_entropy(logits, labels, reduction="none")

    def _classified(self, discriminator: Network, images: Tensor) -> tuple[Tensor, Tensor]:
        judged = discriminator(images)
        if not isinstance(judged, tuple) or len(judged) != 2:
            raise TypeError(
                f"{type(self).__name__}: with a weight for classify the discriminator returns "
                f"(scores, logits) (got {describe(judged)})"
            )
        logits = judged[1]
        if not isinstance(logits, Tensor) or logits.dim() != 2 or len(logits) != len(images):
            got = list(logits.shape) if isinstance(logits, Tensor) else describe(logits)
            raise ValueError(
                f"{type(self).__name__}: logits must be [N, classes] (got {got} for "
                f"{len(images)} images)"
            )
        return judged


@dataclass(frozen=True)
class ConditionalGAN(UnconditionalGAN):
    """``generator(latent, labels)``; real images come with labels.

    Without ``classify`` the discriminator is told the labels, ``discriminator(images, labels) ->
    scores``. With it, it guesses them: ``discriminator(images) -> (scores, logits)``, and there is
    a term ``cla``: the cross entropy of classes, int64[N] (Odena et al., "Conditional Image
    Synthesis with Auxiliary Classifier GANs", ICML 2017), or the sum of the binary ones of
    attributes, floating [N, attributes] of 0 and 1 (Choi et al., "StarGAN", CVPR 2018).

    Attributes:
        loss: As of :class:`UnconditionalGAN`.
        penalty: Likewise.
        classify: Weight of ``cla``, or None.

    Example:
        >>> told = tetris.prune.ConditionalGAN("hinge")         # discriminator(images, labels)
        >>> guesses = tetris.prune.ConditionalGAN("logistic", classify=1.0)
    """

    classify: float | None = None

    @property
    def weights(self) -> Mapping[str, float]:
        """Term -> weight."""
        return {**super().weights, "cla": self.classify or 0.0}

    def judge(
        self, discriminator: Network, images: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores, and with ``classify`` logits."""
        if self.classify is not None:
            return self._classified(discriminator, images)
        return discriminator(images, self._known(labels, "real and inputs")), None


@dataclass(frozen=True)
class ImageToImageGAN(UnconditionalGAN):
    """``generator(images)`` or ``generator(images, labels)``, with a reconstruction term ``rec``.

    Paired (``back=None``): the real images are what the inputs should become, and ``rec`` is the
    distance to them (pix2pix). With ``back``, ``rec`` is the distance of the inputs to what
    ``back(generator, sample)`` makes of the generated images: of another, frozen generator in
    CycleGAN, of the same one and the labels of the real images in StarGAN. Distances are mean
    absolute differences.

    Attributes:
        loss: As of :class:`UnconditionalGAN`.
        penalty: Likewise.
        reconstruct: Weight of ``rec``.
        back: The way back, None if images come in pairs.
        classify: Weight of ``cla`` if the discriminator returns (scores, logits), or None.

    Example:
        >>> cycle = ImageToImageGAN(back=lambda generator, sample: other(sample.generated))
        >>> star = ImageToImageGAN(
        ...     "wasserstein", penalty=10.0, classify=1.0,
        ...     back=lambda generator, sample: generator(sample.generated, sample.real[1]),
        ... )
        >>> loss = pruner.loss((images, labels), images, wanted)     # real, inputs
    """

    loss: Adversarial = "least_squares"
    reconstruct: float = 10.0
    back: Callable[[Network, Sample], Tensor] | None = None
    classify: float | None = None

    @property
    def weights(self) -> Mapping[str, float]:
        """Term -> weight."""
        return {**super().weights, "rec": self.reconstruct, "cla": self.classify or 0.0}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.back is not None and not callable(self.back):
            raise TypeError(
                f"{type(self).__name__}: back must be a function (generator, sample) -> images "
                f"(got {describe(self.back)})"
            )

    def generator_terms(self, discriminator: Network, sample: Sample) -> dict[str, Tensor]:
        """``gen``, ``rec`` and, of a discriminator that classifies, ``cla``."""
        if self.back is None:
            wanted, got = sample.real[0], sample.generated
        else:
            wanted, got = sample.inputs[0], self.back(sample.generator, sample)
        if wanted.shape != got.shape:
            raise ValueError(
                f"{type(self).__name__}: rec compares images of one shape (got {list(got.shape)} "
                f"for {list(wanted.shape)}); pass back= unless real images are the targets"
            )
        terms = super().generator_terms(discriminator, sample)
        return {**terms, "rec": _each((wanted - got).abs())}

    def judge(
        self, discriminator: Network, images: Tensor, labels: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Scores, and with ``classify`` logits."""
        if self.classify is not None:
            return self._classified(discriminator, images)
        return discriminator(images), None


def _labels(tensors: tuple[Tensor, ...]) -> Tensor | None:
    return tensors[-1] if len(tensors) > 1 else None


def _each(values: Tensor) -> Tensor:
    """[N], mean per sample."""
    return values.reshape(len(values), -1).mean(1)
