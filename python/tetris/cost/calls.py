"""What the layers of a model compute on an example, and how long they take in it."""

from __future__ import annotations

import itertools
import time
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
_LEAST_ROUNDS = 5  # of a model that takes long ...
_PATIENCE_S = 4.0  # ... so that these are over


@dataclass(frozen=True)
class Call:
    """One call of a layer.

    Attributes:
        problem: What it computes.
        input_shape: Of its input.
    """

    problem: Problem
    input_shape: tuple[int, ...]


def check_on_cpu(where: str, layers: Mapping[str, DenseLayer], otherwise: str) -> None:
    """Raise ValueError unless the weights of all layers are where times mean something.

    ``otherwise`` says what to do without times.
    """
    for name, layer in layers.items():
        if layer.weight.device.type != "cpu":
            raise ValueError(
                f"{where}: layer {name!r}: times are predicted and measured for the CPU (got "
                f"{layer.weight.device}); pass a copy of the model that is there, "
                f"copy.deepcopy(model).cpu(), with example_inputs there, too, or {otherwise}"
            )


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
        with undisturbed(model), torch.no_grad():
            Batch(example_inputs).outputs(where, model)
    if unused := [name for name, calls in found.items() if not calls]:
        raise ValueError(
            f"{where}: the example does not go through {', '.join(map(repr, unused))}, or is empty "
            "there; exclude them, or give other example_inputs"
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


def measured_times(
    model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any
) -> ModelTimes:
    """Measure a model on an example, in eval mode and without gradients, and layers within it.

    Lower quartiles of several runs on torch's current number of threads; see
    :func:`tetris.cost.measure.clock`.
    """
    now = clock()
    batch = Batch(example_inputs)
    rounds: list[dict[str, float]] = []
    between: list[float] = []
    with undisturbed(model), torch.no_grad():
        seconds_of_call(lambda: batch.run(model))  # caches and clocks settle
        begun = time.perf_counter()
        with watched(layers, now) as taken:
            for done in range(_ROUNDS):
                if done >= _LEAST_ROUNDS and time.perf_counter() - begun > _PATIENCE_S:
                    break
                taken.clear()
                started = now()
                batch.run(model)
                between.append(now() - started - sum(taken.values()))
                rounds.append(dict(taken))
        with _answering(layers, lambda: batch.run(model)):
            others = seconds_of_call(lambda: batch.run(model))
    own = {n: float(np.percentile([r.get(n, 0.0) for r in rounds], 25)) for n in layers}
    # Of the same rounds as the layers: their difference to a total of other rounds is mostly noise.
    total = sum(own.values()) + float(np.percentile(between, 25))
    return ModelTimes(total, own, min(others, total))


@contextmanager
def watched(
    layers: Mapping[str, nn.Module], now: Callable[[], float]
) -> Iterator[dict[str, float]]:
    """Name -> seconds that a layer has taken so far, all its calls; clear it to start anew."""
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

    handles = [layer.register_forward_pre_hook(before(n)) for n, layer in layers.items()]
    handles += [layer.register_forward_hook(after(n)) for n, layer in layers.items()]
    with _hooks(iter(handles)):
        yield taken


@contextmanager
def computing(
    layers: Mapping[str, nn.Module], forwards: Mapping[str, Callable[..., Any]]
) -> Iterator[None]:
    """Layers of a model that compute something else: name -> what is called in their place."""
    replaced = {name: layers[name].__dict__.get("forward") for name in forwards}
    try:
        for name, forward in forwards.items():
            layers[name].__dict__["forward"] = forward
        yield
    finally:
        for name, own in replaced.items():
            layers[name].__dict__.pop("forward", None)
            if own is not None:
                layers[name].__dict__["forward"] = own


@contextmanager
def _answering(layers: Mapping[str, nn.Module], run: Callable[[], object]) -> Iterator[None]:
    """Makes layers return at once what they returned when the model ran."""
    outputs: dict[str, list[Any]] = {name: [] for name in layers}

    def note(name: str) -> Callable[..., None]:
        return lambda _layer, _args, output: outputs[name].append(output)

    with _hooks(layer.register_forward_hook(note(n)) for n, layer in layers.items()):
        run()

    def answer(own: list[Any]) -> Callable[..., Any]:
        answers = itertools.cycle(own)
        return lambda *_args, **_kwargs: next(answers)

    with computing(layers, {n: answer(own) for n, own in outputs.items() if own}):
        yield


@contextmanager
def _hooks(handles: Iterator[Any]) -> Iterator[None]:
    made = list(handles)
    try:
        yield
    finally:
        for handle in made:
            handle.remove()
