"""Importances that data has a say in: they pass batches through the model before they rate it.

Each is an ``importance=`` of :func:`tetris.sparsify` and of the pruners. These call ``prepare``
once before they ask for the layers' saliencies, at the start and whenever masks change, so that
scores are of the weights as they are. ``prepare`` takes the model's layers dense, masked or sparse,
and leaves the model as it was: parameters, gradients, ``requires_grad``, modes, buffers and torch's
random numbers. Batches go through it in eval mode and must be on its device.

Scores multiply a power of the weight with what was measured, so a removed weight of a masked layer,
which is zero, is worth nothing.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sized
from contextlib import AbstractContextManager, contextmanager, suppress

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from ..checks import describe
from ..nn.base import SparseLayer
from ..nn.kinds import DenseLayer, groups_of, oriented
from ..progress import Advance, steps
from ..sharding import check_whole
from .batches import Batch, Batches, check_batches, read_batches, undisturbed
from .calibration import input_squares

Layers = Mapping[str, DenseLayer | SparseLayer]


class DataImportance(ABC):
    """What the importances of this module share: measure all layers, then rate one at a time."""

    per_sample = False

    def __init__(self, batches: Batches, *, progress: bool = False) -> None:
        self.batches = check_batches(self._where, batches)
        self.progress = progress
        self._measured: dict[str, Tensor] = {}

    def prepare(self, model: nn.Module, layers: Layers) -> None:
        """Measure what scores are made of, for the weights as they are now.

        Args:
            model: The model that batches go through.
            layers: name -> layer of the model, those to be rated.

        Raises:
            ValueError: there are no batches, or a layer took no part.
        """
        with undisturbed(model), self._bar() as advance:
            self._measured = self._measure(model, layers, advance)

    def __call__(self, name: str, layer: nn.Module) -> Tensor:
        """Worth of each weight, shaped like ``layer.weight``, or ``layer.values`` of a sparse one.

        Raises:
            RuntimeError: :meth:`prepare` has not seen the layer, or not with these weights.
        """
        assert isinstance(layer, DenseLayer | SparseLayer)
        weight = _weight(layer).detach()
        if name in self._measured:
            factor = self._factor(layer, self._measured[name])
            if factor.shape == weight.shape:
                return self._score(weight.abs().to(factor.dtype), factor)
        raise RuntimeError(
            f"{self._where}: prepare(model, layers) must come before layer {name!r} is rated, and "
            "again when its weights change shape; tetris.sparsify and the pruners call it"
        )

    @abstractmethod
    def _measure(self, model: nn.Module, layers: Layers, advance: Advance) -> dict[str, Tensor]:
        """Measurements by layer; the model is in eval mode. Call ``advance`` after each pass."""

    def _factor(self, layer: DenseLayer | SparseLayer, measured: Tensor) -> Tensor:
        """A layer's measurement in the shape of its weight."""
        return measured

    def _score(self, weight: Tensor, factor: Tensor) -> Tensor:
        """Worth, of magnitudes and what multiplies them."""
        return weight * factor

    def _bar(self) -> AbstractContextManager[Advance]:
        """A bar over the passes, of which a function of batches does not tell the number."""
        total = None
        if isinstance(self.batches, Sized) and not self.per_sample:
            with suppress(TypeError):  # a DataLoader of an iterable dataset
                total = len(self.batches)
        return steps(self.progress, f"{type(self).__name__} of batches", total)

    @property
    def _where(self) -> str:
        return f"tetris.prune.{type(self).__name__}"

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.batches)})"


class _Gradients(DataImportance):
    """Means over batches of a function of the loss' gradient."""

    def __init__(
        self, batches: Batches, loss: Callable[..., Tensor], *, progress: bool = False
    ) -> None:
        super().__init__(batches, progress=progress)
        if not callable(loss) or isinstance(loss, type):
            hint = "; make an instance of it" if isinstance(loss, type) else ""
            raise TypeError(
                f"{self._where}: loss must be a function of outputs and target, such as "
                f"torch.nn.functional.cross_entropy (got {describe(loss)}{hint})"
            )
        self.loss = loss

    @abstractmethod
    def _of(self, gradient: Tensor) -> Tensor:
        """What the mean is taken of."""

    def _draws(self) -> Iterator[Batch]:
        for batch in read_batches(self._where, self.batches):
            if self.per_sample:
                yield from batch.samples(self._where)
            else:
                yield batch

    def _measure(self, model: nn.Module, layers: Layers, advance: Advance) -> dict[str, Tensor]:
        check_whole(
            self._where, model.parameters(), "rate by magnitude or ActivationNorm under FSDP2"
        )
        sums: dict[int, Tensor] = {}
        count = 0
        with torch.enable_grad(), _differentiable(layers) as weights:
            distinct = list({id(w): w for w in weights.values()}.values())
            for batch in self._draws():
                loss = batch.loss(self._where, self.loss, batch.outputs(self._where, model))
                gradients = torch.autograd.grad(loss, distinct, allow_unused=True)
                count += 1
                for weight, gradient in zip(distinct, gradients, strict=True):
                    if gradient is None:
                        continue
                    new = self._of(_widened(gradient))
                    sums[id(weight)] = sums[id(weight)].add_(new) if id(weight) in sums else new
                advance()
            users = Counter(id(w) for w in weights.values())
            absent = [name for name, w in weights.items() if id(w) not in sums]
            if absent:
                raise ValueError(
                    f"{self._where}: the loss does not depend on layer {absent[0]!r}, which no "
                    "gradient tells the worth of; exclude it, or pass batches that use it"
                )
            # A gradient is that of all layers which share a weight; their scores get added.
            return {n: sums[id(w)] / (count * users[id(w)]) for n, w in weights.items()}

    def __repr__(self) -> str:
        return f"{type(self).__name__}({describe(self.batches)}, {describe(self.loss)})"


class Taylor(_Gradients):
    r"""Worth ``|w * dL/dw|``: what the loss would change without a weight, to first order.

    The mean over batches of ``|w * g_b|``, with g_b the gradient of batch b's loss. Means are taken
    of magnitudes: gradients themselves average out to nothing in a trained network. Molchanov
    et al., "Importance Estimation for Neural Network Pruning", CVPR 2019, equation 8 squares it;
    magnitudes add up over a block as those of weights do. All batches count alike, whatever their
    size.

    Args:
        batches: Iterable of ``(inputs, target)`` or of ``inputs``, see
            :data:`tetris.prune.batches.Batches`, or a function that returns one. A few hundred
            samples will do.
        loss: ``loss(outputs, target)``, or ``loss(outputs)`` for batches without target: a number.
        progress: Show a progress bar while batches pass, unless another one is shown.

    Raises:
        TypeError: batches that can be read but once, such as a generator; a loss that is none.
        ValueError: in use: no batch, a loss that is not one number, a layer it does not depend on.

    Example:
        >>> batches = lambda: itertools.islice(loader, 8)
        >>> taylor = tetris.prune.Taylor(batches, torch.nn.functional.cross_entropy)
        >>> sparse = tetris.sparsify(model, sparsity=0.9, importance=taylor)
    """

    def _of(self, gradient: Tensor) -> Tensor:
        return gradient.abs()


class Fisher(_Gradients):
    """Worth ``w^2 * E[g^2]``: the second-order cost of a weight, by the diagonal empirical Fisher.

    Half of it is the rise of the loss without the weight where its gradient is zero, with the
    diagonal of the Fisher matrix in place of the Hessian's (LeCun et al., "Optimal Brain Damage",
    NeurIPS 1989, equation 5; Theis et al., "Faster gaze prediction with dense networks and Fisher
    pruning", 2018, equation 8). It is empirical: targets are the data's, not drawn from the model.

    What is averaged: by default g is the gradient of one *batch's* loss, and E the mean over
    batches, all alike: one backward pass per batch. Of a loss that is a mean over B independent
    samples this has the expectation ``E[g_n^2] / B + (1 - 1/B) * E[g_n]^2`` with g_n the gradients
    of single *samples*: near a minimum, where the second term vanishes, it ranks weights as
    ``E[g_n^2]`` does, from fewer draws. ``per_sample=True`` takes g_n, the definition, at one
    forward and backward pass per sample.

    Args:
        batches: As for :class:`Taylor`.
        loss: As for :class:`Taylor`.
        per_sample: Square the gradients of single samples, slices of all tensors along their first
            dimension, instead of whole batches'.
        progress: As for :class:`Taylor`.

    Raises:
        TypeError: as :class:`Taylor`.
        ValueError: as :class:`Taylor`; with ``per_sample``, tensors of different first dimensions.

    Example:
        >>> fisher = tetris.prune.Fisher(loader, torch.nn.functional.cross_entropy)
        >>> pruner = tetris.prune.TetrisPruner(model, sparsity=0.9, importance=fisher)
    """

    def __init__(
        self,
        batches: Batches,
        loss: Callable[..., Tensor],
        *,
        per_sample: bool = False,
        progress: bool = False,
    ) -> None:
        super().__init__(batches, loss, progress=progress)
        self.per_sample = per_sample

    def _of(self, gradient: Tensor) -> Tensor:
        return gradient.square()

    def _score(self, weight: Tensor, factor: Tensor) -> Tensor:
        return weight.square() * factor


class ActivationNorm(DataImportance):
    """Worth ``|w_oi| * ||x_i||_2``: a weight's share in its output, by the norm of its input.

    The norm runs over everything input i was in all batches: samples and tokens of a linear layer,
    samples and positions of a convolution's channel, one norm for all kernel positions. Padding is
    not looked at. (Sun et al., "A Simple and Effective Pruning Approach for Large Language Models",
    Wanda, ICLR 2024, equation 1.) Wanda compares weights within an output; here blocks compete in
    the whole layer, or with ``balanced=True`` within their block row.

    No gradients, no targets: the cheapest of these.

    Args:
        batches: As for :class:`Taylor`; targets are not looked at.
        progress: As for :class:`Taylor`.

    Raises:
        TypeError: batches that can be read but once, such as a generator.
        ValueError: in use: no batch, or a layer that none of them passed through.

    Example:
        >>> wanda = tetris.prune.ActivationNorm(lambda: itertools.islice(loader, 8))
        >>> sparse = tetris.sparsify(model, sparsity=0.75, importance=wanda)
    """

    def _measure(self, model: nn.Module, layers: Layers, advance: Advance) -> dict[str, Tensor]:
        found = input_squares(self._where, model, layers, self.batches, advance)
        return {name: squares.sqrt() for name, (squares, _) in found.items()}

    def _factor(self, layer: DenseLayer | SparseLayer, measured: Tensor) -> Tensor:
        if isinstance(layer, SparseLayer):
            layout = layer.layout
            shape, groups = layout.weight_shape, layout.groups
        else:
            shape, groups = oriented(layer, layer.weight).shape, groups_of(layer)
        if measured.numel() != shape[1] * groups:
            return measured  # of another layer: its shape tells
        factor = per_input(measured, shape, groups)
        return (
            layer.layout.pack(factor) if isinstance(layer, SparseLayer) else oriented(layer, factor)
        )


def per_input(numbers: Tensor, shape: tuple[int, ...], groups: int) -> Tensor:
    """One number per input channel, [in], at each weight ``[out, in / groups, *kernel]`` of it."""
    out, inputs, *kernel = shape
    parts = numbers.view(groups, 1, inputs).expand(groups, out // groups, inputs)
    return parts.reshape(out, inputs, *(1 for _ in kernel)).expand(shape)


def _widened(tensor: Tensor) -> Tensor:
    """In float32 at least: squares of half precision overflow."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def _weight(layer: nn.Module) -> Tensor:
    """The weights a layer computes with, masked if they are."""
    return getattr(layer, _name(layer))


def _name(layer: nn.Module) -> str:
    return "values" if isinstance(layer, SparseLayer) else "weight"


@contextmanager
def _differentiable(layers: Layers) -> Iterator[dict[str, Tensor]]:
    """Weight by name, as the layer computes with it, to take gradients by; frozen ones too.

    A parametrized one is computed once, here: its gradient is that of the result.
    """
    parameters: list[nn.Parameter] = []
    for layer in layers.values():
        if parametrize.is_parametrized(layer, _name(layer)):
            parameters += layer.parametrizations[_name(layer)].parameters()  # type: ignore[index]
        else:
            parameters.append(layer._parameters[_name(layer)])  # type: ignore[arg-type]
    before = [p.requires_grad for p in parameters]
    try:
        for parameter in parameters:
            parameter.requires_grad_(True)
        with parametrize.cached():
            yield {name: _weight(layer) for name, layer in layers.items()}
    finally:
        for parameter, required in zip(parameters, before, strict=True):
            parameter.requires_grad_(required)
