"""Measured milliseconds per batch of whole networks, each in the fastest way there is to run it."""

from __future__ import annotations

import operator
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor, fx, nn

import tetris
from tetris.demo.networks import FORMATS
from tetris.timing import Candidate, Plan, interleave, prepacked_chain, quartiles

from .experiment import Row

DENSE = "dense"
"""Name of the network that others are held against."""


@dataclass(frozen=True)
class Latency:
    """Of one network.

    Attributes:
        ms: Milliseconds per batch in the fastest round: other programs only ever add time, and
            experiments run where there are others.
        way: The fastest way, such as ``oneDNN channels_last``.
        quartiles: Of the rounds' milliseconds: what else ran on the machine shows in the spread.
        x_dense: The dense network's time over this one's, median of the rounds' ratios; None where
            no dense network was measured.
    """

    ms: float
    way: str
    quartiles: tuple[float, float, float]
    x_dense: float | None = None


Key = tuple[str, str]
"""Network and way to run it."""
_SHAPE_CHECKS = ("dim", operator.eq, torch._assert)
"""With which a fused network makes sure that it is called with what it was fused for."""

_LOOK = Plan(sample_s=0.002, budget_s=1.0, min_rounds=2, max_rounds=3)


@torch.inference_mode()
def measure(
    models: Mapping[str, nn.Module], x: Tensor, plan: Plan | None = None
) -> dict[str, Latency]:
    """Time networks in turns, after a first look that drops the slow ways to run each.

    Args:
        models: Sequences of layers by name, dense or sparse, in eval mode; not changed. One named
            ``dense`` is what the others are held against.
        x: A batch.
        plan: How long to measure.

    Raises:
        RuntimeError: two ways to run a network disagree.
    """
    found = {name: ways(model, x) for name, model in models.items()}
    calls = {(name, way): call for name, group in found.items() for way, call in group.items()}
    look = _fastest(_rounds(calls, _LOOK))
    near = {
        (name, way): calls[name, way]
        for name, group in found.items()
        for way in group
        if look[name, way] <= 1.5 * min(look[name, other] for other in group)
    }
    plan = plan or Plan(sample_s=0.002, budget_s=8.0, min_rounds=10, max_rounds=60)
    rounds = _rounds(near, plan)
    least = _fastest(rounds)
    best = {name: min((ms, way) for (n, way), ms in least.items() if n == name) for name in models}
    result = {}
    for name, (ms, way) in best.items():
        own, ratio = rounds[name, way], None
        if DENSE in models:
            ratio = float(np.median(rounds[DENSE, best[DENSE][1]] / own))
        result[name] = Latency(ms, way, quartiles(1e3 * own), ratio)
    return result


def timed(row: Row, times: Mapping[str, Latency]) -> Row:
    """A row with the times of its network, found by its label; as it is if there are none."""
    found = times.get(row.label)
    if found is None:
        return row
    return replace(row, latency_ms=found.ms, x_dense=found.x_dense, quartiles_ms=found.quartiles)


def ways(model: nn.Module, x: Tensor) -> dict[str, Candidate]:
    """The ways to run a network: batch norm folded, dense layers by torch or oneDNN, both formats.

    Sparse layers take their activations along. Each way is checked against the model.
    """
    want = model(x)
    result: dict[str, Candidate] = {}
    # A generator takes vectors and may convolve: its weights choose the format then.
    spatial = x.dim() == 4 or any(p.dim() == 4 for p in model.parameters())
    for name, memory_format in FORMATS.items() if spatial else [("", torch.preserve_format)]:
        image = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
        with warnings.catch_warnings():  # of a dense MLP there is nothing to fuse
            warnings.filterwarnings("ignore", "tetris.fuse: nothing was fused")
            fused = tetris.fuse(model)
        if spatial:
            fused = fused.to(memory_format=memory_format)  # type: ignore[call-overload]
        calls: dict[str, Candidate] = {"torch": lambda fused=fused, image=image: fused(image)}
        packed = prepacked_chain(chain(fused), image)
        if packed is not None:
            calls["oneDNN"] = lambda packed=packed, image=image: packed(image)
        for library, call in calls.items():
            got = call()
            assert isinstance(got, Tensor)
            error = float((got - want).abs().max() / want.abs().max().clamp(min=1e-12))
            if not error < 1e-3:
                raise RuntimeError(f"{library} {name} computes something else: off by {error:.2g}")
            result[f"{library} {name}".strip()] = call
    return result


def chain(model: nn.Module) -> list[nn.Module]:
    """The layers of a fused network without branches, in order.

    Raises:
        ValueError: the network is more than a sequence of modules.
    """
    if not isinstance(model, fx.GraphModule):
        raise ValueError(f"chain: a traced network is needed (got {type(model).__name__})")
    layers = []
    last: fx.Node | None = None
    for node in model.graph.nodes:
        if node.target in _SHAPE_CHECKS:
            continue
        if node.op == "call_module" and list(node.args) == [last] and not node.kwargs:
            layers.append(model.get_submodule(str(node.target)))
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"chain: the network must be a sequence of modules (got {node})")
        last = node
    return layers


def _rounds(calls: Mapping[Key, Candidate], plan: Plan) -> dict[Key, np.ndarray]:
    """Seconds per round of each."""
    times = interleave({"\0".join(key): call for key, call in calls.items()}, plan)
    return {key: times["\0".join(key)] for key in calls}


def _fastest(rounds: Mapping[Key, np.ndarray]) -> dict[Key, float]:
    return {key: 1e3 * float(np.min(seconds)) for key, seconds in rounds.items()}
