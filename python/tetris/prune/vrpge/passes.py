"""The forward and backward passes of one training step, one per drawn mask."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from ...checks import describe
from .exchange import Exchange
from .sampled import Index


@contextmanager
def own_gradients(where: str, model: nn.Module) -> Iterator[None]:
    """Let gradients of a model be those of one step, or what they were if something fails.

    Drawn blocks change from step to step, so their gradients cannot add up over steps; those of
    other layers would, and a joint norm would mix both.

    Raises:
        RuntimeError: there is a gradient already.
    """
    before = {}
    for name, parameter in model.named_parameters():
        grad = parameter.grad
        if not parameter.requires_grad:
            continue
        if grad is not None and (grad.is_sparse or bool(grad.any())):
            raise RuntimeError(
                f"{where}: {name!r} has a gradient already, and gradients of drawn blocks cannot "
                "add up over steps; call optimizer.zero_grad() before each pruner.backward(), or "
                "model.zero_grad() if the optimizer holds only some of the model's parameters"
            )
        before[parameter] = grad
    try:
        yield
    except BaseException:
        for parameter, grad in before.items():
            parameter.grad = None if grad is None else grad.zero_()
        raise


def run_masks(
    where: str,
    closure: Callable[[], Tensor],
    exchange: Exchange,
    drawn: Sequence[Mapping[str, Index]],
) -> list[float]:
    """Losses with each of the drawn masks; gradients become those of their mean.

    All start from the same state of torch's random numbers.
    """
    random = torch.get_rng_state()
    losses = []
    try:
        for indices in drawn:
            torch.set_rng_state(random)
            losses.append(_run(where, closure, exchange, indices, 1.0 / len(drawn)))
    finally:
        for layer in exchange.layers.values():
            layer.rest()
    return losses


def _run(
    where: str,
    closure: Callable[[], Tensor],
    exchange: Exchange,
    indices: Mapping[str, Index],
    weight_of_loss: float,
) -> float:
    used: list[tuple[Tensor, Tensor, nn.Parameter]] = []
    for name, layer in exchange.layers.items():
        rows = exchange.local(name, indices[name].blocks)
        used.append((rows, layer.use(indices[name], rows), layer.weight))
    loss = closure()
    _check_loss(where, loss)
    if not any(layer.runs for layer in exchange.layers.values()):
        raise RuntimeError(
            f"{where}: the closure ran no sampled layer; run the model that the pruner was given"
        )
    (loss * weight_of_loss).backward()
    for rows, values, weight in used:
        if values.grad is not None and weight.grad is not None:
            weight.grad.index_add_(0, rows, values.grad)
    return float(loss.detach())


def _check_loss(where: str, loss: object) -> None:
    if not isinstance(loss, Tensor):
        raise TypeError(
            f"{where}: the closure must return the loss, a tensor with a gradient, not "
            f"{describe(loss)}; pruner.backward(lambda: criterion(model(x), target))"
        )
    if loss.numel() != 1:
        raise ValueError(
            f"{where}: the loss must be one number (got shape {list(loss.shape)}); take the mean"
        )
    if not loss.requires_grad:
        raise ValueError(
            f"{where}: the loss has no gradient; the closure must not detach it or run under "
            "torch.no_grad()"
        )
    if not bool(loss.isfinite()):
        raise RuntimeError(
            f"{where}: the loss is {float(loss.detach())}; gates cannot learn from it. Lower the "
            "learning rate"
        )
