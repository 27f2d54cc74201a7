"""Batches to learn about a model from, and the model left as it was."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import describe, kind

Batches = Iterable[Any] | Callable[[], Iterable[Any]]
"""Batches, each time from the start: a list, a DataLoader, or a function that returns an iterable.

A batch is ``inputs`` or a pair ``(inputs, target)``, tuple or list. Inputs are a tensor, a tuple of
them for ``model(*inputs)``, or a mapping for ``model(**inputs)``; without a target a tuple goes
into another, ``((a, b),)``, as a dataset of one tensor gives it.
"""

_NONE: Any = object()


@dataclass(frozen=True)
class Batch:
    """What goes into the model, and what should come out.

    Attributes:
        inputs: See :data:`Batches`.
        target: Second argument of a loss, if there is one.
    """

    inputs: Any
    target: Any = _NONE

    @classmethod
    def of(cls, where: str, batch: object) -> Batch:
        """One item of :data:`Batches`."""
        if not isinstance(batch, (tuple, list)):
            return cls(batch)
        if len(batch) not in (1, 2):
            raise ValueError(
                f"{where}: a batch must be inputs or (inputs, target), with several inputs in a "
                f"tuple of their own, ((a, b), target) (got {kind(batch)} of {len(batch)})"
            )
        return cls(*batch)

    def outputs(self, where: str, model: nn.Module) -> Any:
        """What the model makes of the inputs.

        Raises:
            ValueError: it cannot, for their shape or type.
        """
        with fitting(where, f"the model does not take the inputs, {_shapes(self.inputs)}"):
            return self.run(model)

    def run(self, model: nn.Module) -> Any:
        """The same, whatever it raises."""
        if isinstance(self.inputs, Mapping):
            return model(**self.inputs)
        if isinstance(self.inputs, (tuple, list)):
            return model(*self.inputs)
        return model(self.inputs)

    def loss(self, where: str, loss: Callable[..., Tensor], outputs: Any) -> Tensor:
        """``loss(outputs, target)``, or ``loss(outputs)`` without a target; one number."""
        taken = (outputs,) if self.target is _NONE else (outputs, self.target)
        with fitting(where, f"the loss does not take outputs and target, {_shapes(taken)}"):
            value = loss(*taken)
        if not isinstance(value, Tensor) or value.numel() != 1:
            got = f"shape {list(value.shape)}" if isinstance(value, Tensor) else describe(value)
            raise ValueError(
                f"{where}: loss must return one number, as with reduction='mean' (got {got})"
            )
        if not value.requires_grad:
            raise ValueError(
                f"{where}: the loss has no gradient; model and loss must compute in torch, without "
                "no_grad() or detach() in between"
            )
        return value

    def samples(self, where: str) -> Iterator[Batch]:
        """Batches of one sample each: slices of all tensors along their first dimension."""
        parts = [self.inputs] if self.target is _NONE else [self.inputs, self.target]
        sizes = sorted({tensor.size(0) for tensor in _tensors(where, parts)})
        if len(sizes) != 1:
            raise ValueError(
                f"{where}: per_sample=True needs batches whose tensors have one first dimension, "
                f"the samples (got sizes {sizes})"
            )
        for i in range(sizes[0]):
            target = self.target if self.target is _NONE else _slice(self.target, i)
            yield Batch(_slice(self.inputs, i), target)


@contextmanager
def fitting(where: str, what: str) -> Iterator[None]:
    """What torch raises for data that do not fit, as a ValueError that says whose they are.

    Args:
        where: Function named in messages.
        what: What does not fit.
    """
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, IndexError, TypeError, ValueError) as error:
        if str(error).startswith((where, "tetris")):
            raise
        raise ValueError(f"{where}: {what}: {error}") from error


def check_batches(where: str, batches: Batches) -> Batches:
    """Return batches, or raise TypeError where they are none, or can be read but once."""
    if isinstance(batches, Iterator):
        raise TypeError(
            f"{where}: batches are read at every change of masks, and an iterator only gives them "
            f"once (got {describe(batches)}); pass a list, a DataLoader, or a function such as "
            "lambda: itertools.islice(loader, 8)"
        )
    if isinstance(batches, (Tensor, str, Mapping)) or not (
        isinstance(batches, Iterable) or callable(batches)
    ):
        hint = "; for one batch pass [(inputs, target)]" if isinstance(batches, Tensor) else ""
        raise TypeError(
            f"{where}: batches must be an iterable of inputs or (inputs, target), such as a "
            f"DataLoader, or a function that returns one (got {kind(batches)}{hint})"
        )
    return batches


def read_batches(where: str, batches: Batches) -> Iterator[Batch]:
    """The batches, from the start.

    Raises:
        ValueError: there are none.
    """
    found = batches if isinstance(batches, Iterable) else batches()
    if not isinstance(found, Iterable):
        raise TypeError(
            f"{where}: batches() must return an iterable of batches (got {describe(found)})"
        )
    batch = _NONE
    for batch in found:
        yield Batch.of(where, batch)
    if batch is _NONE:
        raise ValueError(
            f"{where}: batches must give at least one (got none; a function must return a new "
            "iterable at each call)"
        )


@contextmanager
def undisturbed(model: nn.Module) -> Iterator[None]:
    """The model in eval mode, to pass batches through; afterwards everything is as it was.

    That is each module's mode, buffers and torch's random numbers. Modes are set as attributes:
    ``train()`` of some modules does more, such as merging weights, which would not be undone.
    Gradients are recorded inside, for importances that need them, even where the caller has
    switched them off: what needs none says ``torch.no_grad()`` after it.
    """
    modes = [(module, module.training) for module in model.modules()]
    buffers = [
        (module, name, buffer, buffer._version, buffer.clone())
        for module in model.modules()
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_inference()  # such do not change in place
    ]
    tensors = chain(model.parameters(), model.buffers())
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    # The fused encoder layer of torch.nn reads weights past the layers, hooks and all.
    fast = torch.backends.mha.get_fastpath_enabled()
    with torch.random.fork_rng(devices), torch.inference_mode(False):
        try:
            torch.backends.mha.set_fastpath_enabled(False)
            for module, _ in modes:
                module.training = False
            yield
        finally:
            torch.backends.mha.set_fastpath_enabled(fast)
            for module, mode in modes:
                module.training = mode
            with torch.no_grad():
                for module, name, buffer, version, copy in buffers:
                    module._buffers[name] = buffer
                    if buffer._version != version:
                        buffer.copy_(copy)


def _shapes(value: object) -> str:
    """Tensors by type and shape, in what holds them."""
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')}{list(value.shape)}"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{k}: {_shapes(v)}" for k, v in value.items()) + "}"
    if isinstance(value, (tuple, list)):
        return ", ".join(map(_shapes, value))
    return describe(value)


def _tensors(where: str, value: object) -> Iterator[Tensor]:
    if isinstance(value, Tensor) and value.dim() > 0:
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(where, item)
    elif isinstance(value, Mapping):
        yield from _tensors(where, list(value.values()))
    elif value is not None:
        raise TypeError(
            f"{where}: per_sample=True slices tensors along their first dimension, "
            f"in tuples, lists and dicts (got {describe(value)})"
        )


def _slice(value: Any, i: int) -> Any:
    if isinstance(value, Tensor):
        return value[i : i + 1]
    if isinstance(value, Mapping):
        return {key: _slice(item, i) for key, item in value.items()}
    return None if value is None else tuple(_slice(item, i) for item in value)
