"""How long a model takes with other layers in the place of its own."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import nn

from ..prune.batches import Batch, undisturbed
from ..timing import Candidate, Plan, interleave
from .calls import ModelTimes, computing, watched
from .measure import clock

# A second or two. Models that take longer than a sample for one call run at least three times.
_PLAN = Plan(sample_s=0.02, budget_s=2.0, min_rounds=3, max_rounds=15)


def times_with(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    stand_ins: Mapping[str, nn.Module],
    example_inputs: Any,
    seconds: float | None = None,
) -> ModelTimes:
    """Measure a model while other layers compute in the place of some of its own.

    If it is known what the model takes as it is, it takes turns with what is measured, and all
    times are relative to it: a machine that has become slower since, or is slower for a while, does
    not count.

    Args:
        model: The model; as it was afterwards.
        layers: name -> layer of it whose time is wanted.
        stand_ins: name of such a layer -> what computes in its place.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of
            them by name.
        seconds: What the model as it is takes; None for times as the clock says.

    Returns:
        Medians of several rounds; ``others`` is what the total leaves beside the layers.
    """
    now, batch = clock(), Batch(example_inputs)
    forwards = {name: layer.forward for name, layer in stand_ins.items()}
    seen: list[dict[str, float]] = []

    def trial() -> None:
        with computing(layers, forwards):
            batch.run(model)

    def looked_into() -> None:  # takes longer by the looking, so the total is that of `trial`
        with computing(layers, forwards), watched(layers, now) as taken:
            batch.run(model)
        seen.append(taken)

    calls: dict[str, Candidate] = {"trial": trial, "layers": looked_into}
    if seconds is not None:
        calls["model"] = lambda: batch.run(model)
    with undisturbed(model), torch.no_grad():
        durations = interleave(calls, _PLAN, now)
    if seconds is None:
        total, unit = float(np.median(durations["trial"])), 1.0
    else:
        total = seconds * _ratio(durations["trial"], durations["model"])
        unit = seconds / float(np.median(durations["model"]))
    own = {n: unit * float(np.median([s.get(n, 0.0) for s in seen])) for n in layers}
    return ModelTimes(total, own, max(total - sum(own.values()), 0.0))


def relative_time(model: nn.Module, reference: nn.Module, example_inputs: Any) -> float:
    """How long a model takes in units of another, both on the example in turns; a median."""
    batch = Batch(example_inputs)
    with undisturbed(model), undisturbed(reference), torch.no_grad():
        calls = {"model": lambda: batch.run(model), "reference": lambda: batch.run(reference)}
        durations = interleave(calls, _PLAN, clock())
    return _ratio(durations["model"], durations["reference"])


def _ratio(a: np.ndarray, b: np.ndarray) -> float:
    """Of entries that were measured in the same round."""
    return float(np.median(a / b))
