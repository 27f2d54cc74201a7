"""What the layers of a model compute on an example, and how long they take in it."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from ..nn.kinds import DenseLayer
from ..prune.batches import Batch, undisturbed
from .measure import clock, seconds_of_call
from .problem import Problem

_ROUNDS = 15


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        problem: What it computes.
        input_shape: Of its input.
    """

    problem: Problem
    input_shape: tuple[int, ...]


@torch.no_grad()
def calls_of(
    where: str, model: nn.Module, layers: Mapping[str, DenseLayer], example_inputs: Any
) -> dict[str, list[Call]]:
    """Name -> the calls of each layer, when the model runs on an example.

    The model stays as it was.

    Args:
        where: Function named in messages.
        model: The model.
        layers: name -> dense layer of it.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of
            them by name.

    Raises:
        ValueError: the model does not take the example, or a layer is not called for it, or only
            with empty inputs.
    """
    found: dict[str, list[Call]] = {name: [] for name in layers}

    def note(name: str) -> Callable[..., None]:
        def hook(layer: Any, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            x = args[0] if args else next(iter(kwargs.values()))  # called input, or x
            if x.numel():  # an expert without tokens takes no time
                found[name].append(Call(Problem.of(layer, x.shape, output.shape), tuple(x.shape)))

        return hook

    with _hooks(
        layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()
    ):
        with undisturbed(model):
            Batch(example_inputs).outputs(where, model)
    if unused := [name for name, calls in found.items() if not calls]:
        raise ValueError(
            f"{where}: the example does not go through {', '.join(map(repr, unused))}; exclude "
            "them, or give other example_inputs"
        )
    return found


@dataclass(frozen=True)
class ModelTimes:
    """Measured seconds of one call of a model.

    Attributes:
        total: Of the model.
        layers: name -> of a layer, all its calls together.
        others: Of all else, while the layers take no time. What they leave in the caches is part of
            it, so that it is less than the total's difference to the layers, and closer to what is
            left once they are sparse.
    """

    total: float
    layers: Mapping[str, float]
    others: float


@torch.no_grad()
def measured_times(
    model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any
) -> ModelTimes:
    """Measure a model on an example, in eval mode and without gradients, and layers within it.

    Lower quartiles of several runs on torch's current number of threads; see
    :func:`tetris.cost.measure.clock`.
    """
    now = clock()
    begun: dict[str, float] = {}
    taken: dict[str, float] = {}

    def before(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            begun[name] = now()

        return hook

    def after(name: str) -> Callable[..., None]:
        def hook(*_: Any) -> None:
            taken[name] = taken.get(name, 0.0) + now() - begun[name]

        return hook

    batch = Batch(example_inputs)
    rounds: list[dict[str, float]] = []
    between: list[float] = []
    with undisturbed(model):
        seconds_of_call(lambda: batch.run(model))  # caches and clocks settle
        handles = [layer.register_forward_pre_hook(before(n)) for n, layer in layers.items()]
        handles += [layer.register_forward_hook(after(n)) for n, layer in layers.items()]
        with _hooks(iter(handles)):
            for _ in range(_ROUNDS):
                taken = {}
                started = now()
                batch.run(model)
                between.append(now() - started - sum(taken.values()))
                rounds.append(taken)
        with _answering(layers, lambda: batch.run(model)):
            others = seconds_of_call(lambda: batch.run(model))
    own = {n: float(np.percentile([r.get(n, 0.0) for r in rounds], 25)) for n in layers}
    # Of the same rounds as the layers: their difference to a total of other rounds is mostly noise.
    total = sum(own.values()) + float(np.percentile(between, 25))
    return ModelTimes(total, own, min(others, total))


@contextmanager
def _answering(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> Iterator[None]:
    """Makes layers return at once what they returned when the model ran."""
    outputs: dict[str, list[Any]] = {name: [] for name in layers}

    def note(name: str) -> Callable[..., None]:
        return lambda _layer, _args, output: outputs[name].append(output)

    with _hooks(layer.register_forward_hook(note(n)) for n, layer in layers.items()):
        run()
    replaced = {name: layer.__dict__.get("forward") for name, layer in layers.items()}
    try:
        for name, layer in layers.items():
            if outputs[name]:
                answers = itertools.cycle(outputs[name])
                layer.__dict__["forward"] = lambda *_a, answers=answers, **_k: next(answers)
        yield
    finally:
        for name, layer in layers.items():
            layer.__dict__.pop("forward", None)
            if replaced[name] is not None:
                layer.__dict__["forward"] = replaced[name]


@contextmanager
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
    made = list(handles)
    try:
        yield
    finally:
        for handle in made:
            handle.remove()
