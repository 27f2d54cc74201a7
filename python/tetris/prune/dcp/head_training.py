"""Training heads and the network, before layers are chosen under their losses."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.optim import SGD

from .greedy import Batch, Loss

MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4

Masks = Sequence[tuple[Tensor, Tensor]]
"""Weights of layers that have been pruned, and bool of the same shape, what they keep."""


def train_stage(
    model: nn.Module,
    until: Callable[[Tensor], Tensor] | None,
    head: nn.Module | None,
    batches: Iterable[Batch],
    lr: float,
    loss: Loss,
    masks: Masks,
) -> None:
    """Per batch, a step on the loss of the head and one on that of the network.

    Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural Networks", NeurIPS 2018,
    algorithm 1, lines 4 and 5.

    Args:
        model: The network, in the mode it is trained in.
        until: ``x -> what the head reads``.
        head: The head, or None for the network's own loss alone.
        batches: To go through once.
        lr: Learning rate.
        loss: ``(logits, target) -> scalar``.
        masks: What is kept at zero.
    """
    network = _optimizer(model.parameters(), lr)
    if head is not None:
        both = _optimizer([*head.train().parameters(), *model.parameters()], lr)
    for x, target in batches:
        if head is not None and until is not None:
            _step(both, loss(head(until(x)), target))
            _remask(masks)
        _step(network, loss(model(x), target))
        _remask(masks)
    if head is not None:
        head.eval()


def train_jointly(
    forward: nn.Module,
    heads: Iterable[nn.Module],
    weights: Sequence[float],
    batches: Iterable[Batch],
    lr: float,
    loss: Loss,
) -> None:
    """Steps on the losses of all heads and of the network together.

    Args:
        forward: ``x -> (logits of each head, ..., logits of the network)``, holding all parameters.
        heads: The heads.
        weights: Of the losses.
        batches: To go through once.
        lr: Learning rate.
        loss: ``(logits, target) -> scalar``.
    """
    heads = [head.train() for head in heads]
    optimizer = _optimizer(forward.parameters(), lr)
    for x, target in batches:
        losses = [w * loss(y, target) for w, y in zip(weights, forward(x), strict=True)]
        _step(optimizer, torch.stack(losses).sum())
    for head in heads:
        head.eval()


def _optimizer(parameters: Iterable[nn.Parameter], lr: float) -> SGD:
    return SGD(parameters, lr, momentum=MOMENTUM, weight_decay=WEIGHT_DECAY, nesterov=True)


def _step(optimizer: SGD, loss: Tensor) -> None:
    optimizer.zero_grad()  # to None: what the loss does not reach is not moved
    loss.backward()
    optimizer.step()


@torch.no_grad()
def _remask(masks: Masks) -> None:
    for weight, mask in masks:
        weight.masked_fill_(~mask, 0.0)
