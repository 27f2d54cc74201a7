"""Choosing the atoms of one layer, round by round, by the gradient of a loss behind it."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from torch.func import functional_call

from ...nn.kinds import DenseLayer, oriented
from .atoms import Atoms

Batch = tuple[Tensor, Tensor]
Loss = Callable[[Tensor, Tensor], Tensor]
Score = Literal["gradient", "random", "norm"]

CACHE_BYTES = 1 << 30  # values around a layer are kept from step to step up to this size


Stopped = Literal["budget", "epsilon", "gradient"]
"""Why no more atoms of a layer were chosen, see :class:`Selection`."""


@dataclass
class Selection:
    """How the atoms of one layer were chosen.

    Attributes:
        chosen: Atoms in the order they were chosen.
        losses: L on the sample set before the first round, and after each.
        atoms: Number of atoms of the layer.
        stopped: ``budget``: as many were chosen as asked for; ``epsilon``: the loss changed too
            little; ``gradient``: it was zero in all other atoms.
    """

    chosen: list[int] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    atoms: int = 0
    stopped: Stopped = "budget"


@dataclass(frozen=True)
class Objective:
    """``L = reconstruction * L_M + lam * L_S`` as a function of one layer's weight and bias.

    Attributes:
        layer: The layer.
        before: ``x -> (its input, *others)``.
        after: ``(its output, *others) -> outputs`` that ``head`` reads.
        head: ``outputs -> logits``.
        reference: ``x -> outputs of the layer in the unpruned network``.
        batches: The sample set.
        loss: ``(logits, target) -> scalar``, a mean.
        lam: Weight of L_S, ``loss`` of the head.
        reconstruction: Weight of L_M, half the mean squared difference to the reference.
    """

    layer: DenseLayer
    before: Callable[[Tensor], tuple[Any, ...]]
    after: Callable[..., Tensor]
    head: Callable[[Tensor], Tensor]
    reference: Callable[[Tensor], Tensor]
    batches: Sequence[Batch]
    loss: Loss
    lam: float
    reconstruction: float
    _cache: dict[int, tuple[Any, ...]] = field(default_factory=dict)

    def __call__(self, index: int, weight: Tensor, bias: Tensor | None) -> Tensor:
        """Loss of one batch."""
        (x, *others), wanted, target = self._values(index)
        tensors = {"weight": weight} if bias is None else {"weight": weight, "bias": bias}
        outputs = functional_call(self.layer, tensors, (x,))
        total = weight.new_zeros(())
        if self.reconstruction:  # before what follows, which may go on in place
            total = total + self.reconstruction * 0.5 * (outputs - wanted).square().mean()
        if self.lam:
            total = total + self.lam * self.loss(self.head(self.after(outputs, *others)), target)
        return total

    def gradient(self, weight: Tensor, bias: Tensor | None) -> tuple[float, Tensor]:
        """Loss over the sample set, and its gradient for the weight, absent atoms included."""
        total, gradient = 0.0, torch.zeros_like(weight)
        samples = sum(len(x) for x, _ in self.batches)
        for index, (x, _) in enumerate(self.batches):
            value = self(index, weight, bias)
            share = len(x) / samples
            gradient += share * torch.autograd.grad(value, weight)[0]
            total += share * float(value.detach())
        return total, gradient

    @torch.no_grad()
    def _values(self, index: int) -> tuple[Any, ...]:
        """Input and others, wanted outputs and target of a batch."""
        if index in self._cache:
            return self._cache[index]
        x, target = self.batches[index]
        wanted = self.reference(x) if self.reconstruction else None
        result = (self.before(x), wanted, target)
        tensors = [t for t in (*result[0], wanted) if isinstance(t, Tensor)]
        if len(self.batches) * sum(t.nbytes for t in tensors) <= CACHE_BYTES:
            self._cache[index] = result
        return result


def select_atoms(
    objective: Objective,
    atoms: Atoms,
    budget: int,
    *,
    where: str,
    score: Score,
    rounds: int,
    steps: int,
    lr: float,
    momentum: float,
    weight_decay: float,
    epsilon: float | None,
    seed: Sequence[int],
) -> tuple[Tensor, Selection]:
    """Choose atoms of the layer, and leave weights in it that minimise the objective on them.

    Algorithm 2 of Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural Networks",
    NeurIPS 2018, several atoms a round: starting from a weight of zero, take those outside whose
    gradient has the largest norm, give them their old weights, and descend by SGD on what is
    chosen, and on the bias unless it is frozen.

    A zero weight may leave no gradient anywhere, as before a ReLU in a network without biases and
    without L_M. The first round then takes the atoms whose old weights have the largest norm.

    Args:
        objective: L.
        atoms: Of the layer.
        budget: Atoms to choose, at least one.
        where: Function and layer, for messages.
        score: ``gradient``, or in its place ``random`` or the ``norm`` of the old weights.
        rounds: After round i, from 1, ``i * budget // rounds`` atoms are chosen; a round that would
            add none is left out.
        steps: SGD steps, with Nesterov's momentum, per round.
        lr: Their learning rate.
        momentum: Of SGD.
        weight_decay: Of SGD.
        epsilon: Stop after the round that changes L by no more than ``epsilon`` times L of the
            empty layer; None does not.
        seed: Of the order of batches, and, apart from it, of random atoms.

    Returns:
        bool[atoms.count], the chosen ones, and how it went.

    Raises:
        ValueError: L or its gradient is not finite; no atom has a gradient or a weight.
    """
    layer = objective.layer
    original = layer.weight.detach().clone()
    weight = torch.zeros_like(original).requires_grad_()
    bias = None
    if layer.bias is not None:
        bias = layer.bias.detach().clone().requires_grad_(layer.bias.requires_grad)
    states = np.random.SeedSequence([n % 2**64 for n in seed]).generate_state(2)
    draws, shuffles = (torch.Generator().manual_seed(int(state)) for state in states)
    fixed = _fixed_scores(score, atoms, oriented(layer, original), draws)
    norms = atoms.norms(oriented(layer, original))
    trained = [weight] if bias is None or not bias.requires_grad else [weight, bias]
    optimizer = torch.optim.SGD(
        trained, lr, momentum=momentum, weight_decay=weight_decay, nesterov=momentum > 0
    )
    order = _shuffled(len(objective.batches), shuffles)
    chosen = torch.zeros(atoms.count, dtype=torch.bool, device=weight.device)
    log = Selection(atoms=atoms.count)
    for number in count(1):
        due = min(number * budget // rounds, budget) - len(log.chosen)
        if due <= 0 and len(log.chosen) < budget:
            continue
        loss, gradient = objective.gradient(weight, bias)
        if not (math.isfinite(loss) and bool(gradient.isfinite().all())):
            raise ValueError(
                f"{where}: the loss is {loss} with {len(log.chosen)} atoms, or its gradient is not "
                "finite; lower lr or step_lr, and look for NaN in the data and the model"
            )
        log.losses.append(loss)
        if len(log.chosen) >= budget:
            break
        if epsilon is not None and len(log.losses) > 1:
            if abs(log.losses[-2] - loss) <= epsilon * log.losses[0]:
                log.stopped = "epsilon"
                break
        scores = atoms.norms(oriented(layer, gradient)) if fixed is None else fixed.clone()
        if not log.chosen and not bool((scores > 0).any()):
            scores = norms
        new = _next(scores, norms, chosen, due, atoms, log)
        if not len(new):
            if not log.chosen:
                raise ValueError(
                    f"{where}: no atom has a gradient or a weight, so nothing tells which to keep; "
                    "exclude the layer"
                )
            log.stopped = "gradient"
            break
        chosen[new] = True
        log.chosen += new.tolist()
        mask = oriented(layer, atoms.stored(chosen).mask())
        fresh = torch.zeros_like(chosen)
        fresh[new] = True
        entered = oriented(layer, atoms.stored(fresh).mask())
        with torch.no_grad():
            weight.copy_(torch.where(entered, original, weight))
        for _ in range(steps):
            gradients = torch.autograd.grad(objective(next(order), weight, bias), trained)
            for tensor, own in zip(trained, gradients, strict=True):
                tensor.grad = own
            weight.grad = gradients[0].masked_fill(~mask, 0.0)
            optimizer.step()
    with torch.no_grad():
        layer.weight.copy_(weight)
        if bias is not None:
            layer.bias.copy_(bias)  # type: ignore[union-attr]
    return chosen, log


def _fixed_scores(
    score: Score, atoms: Atoms, original: Tensor, generator: torch.Generator
) -> Tensor | None:
    """Scores that do not depend on the gradient."""
    if score == "norm":
        return atoms.norms(original)
    if score == "random":
        drawn = torch.rand(atoms.count, generator=generator, dtype=torch.float64)
        return (drawn + 1.0).to(original.device)  # never zero
    return None


def _next(
    scores: Tensor, norms: Tensor, chosen: Tensor, count: int, atoms: Atoms, log: Selection
) -> Tensor:
    """Atoms to add: the best outside, first of all one in each block row if these must have one."""
    if not log.chosen and atoms.rows:
        # Where no atom of a row has a gradient, dead units for example, the heaviest is kept.
        best = atoms.best_of_rows(scores, norms)
        rest = scores.clone()
        rest[best] = -1.0
        return torch.cat([best, _largest(rest, count - len(best))])
    # A weight that is zero under SGD has a zero gradient, and argmax would choose it again.
    return _largest(torch.where(chosen, -1.0, scores), count)


def _largest(scores: Tensor, count: int) -> Tensor:
    """Indices of as many of the largest positive scores, the lower index of equals."""
    order = scores.argsort(descending=True, stable=True)[: max(count, 0)]
    return order[scores[order] > 0]


def _shuffled(count: int, generator: torch.Generator) -> Iterator[int]:
    while True:
        yield from torch.randperm(count, generator=generator).tolist()
