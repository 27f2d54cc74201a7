"""Measured milliseconds per batch of whole networks, each in the fastest way there is to run it."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

import tetris
from tetris.demo.networks import FORMATS
from tetris.timing import Candidate, Plan, interleave, prepacked_chain


@dataclass(frozen=True)
class Latency:
    """Of one network.

    Attributes:
        ms: Milliseconds per batch in the fastest round: other programs only ever add time, and
            experiments run where there are others.
        way: The fastest way, such as ``oneDNN channels_last``.
    """

    ms: float
    way: str


_LOOK = Plan(sample_s=0.002, budget_s=1.0, min_rounds=2, max_rounds=3)


@torch.inference_mode()
def measure(
    models: Mapping[str, nn.Module], x: Tensor, plan: Plan | None = None
) -> dict[str, Latency]:
    """Time networks in turns, after a first look that drops the slow ways to run each.

    Args:
        models: Sequences of layers by name, dense or sparse, in eval mode; not changed.
        x: A batch.
        plan: How long to measure.

    Raises:
        RuntimeError: two ways to run a network disagree.
    """
    found = {name: ways(model, x) for name, model in models.items()}
    calls = {(name, way): call for name, group in found.items() for way, call in group.items()}
    look = _fastest(calls, _LOOK)
    near = {
        (name, way): calls[name, way]
        for name, group in found.items()
        for way in group
        if look[name, way] <= 1.5 * min(look[name, other] for other in group)
    }
    times = _fastest(near, plan or Plan(sample_s=0.002, budget_s=8.0, min_rounds=10, max_rounds=60))
    result = {}
    for name in models:
        ms, way = min((t, way) for (owner, way), t in times.items() if owner == name)
        result[name] = Latency(ms, way)
    return result


def ways(model: nn.Module, x: Tensor) -> dict[str, Candidate]:
    """The ways to run a network: batch norm folded, dense layers by torch or oneDNN, both formats.

    Sparse layers take their activations along. Each way is checked against the model.
    """
    want = model(x)
    result: dict[str, Candidate] = {}
    for name, memory_format in FORMATS.items() if x.dim() == 4 else [("", torch.preserve_format)]:
        image = x.contiguous(memory_format=memory_format) if x.dim() == 4 else x
        with warnings.catch_warnings():  # of a dense MLP there is nothing to fuse
            warnings.filterwarnings("ignore", "tetris.fuse: nothing was fused")
            fused = tetris.fuse(model)
        if x.dim() == 4:
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
        if node.op == "call_module" and list(node.args) == [last] and not node.kwargs:
            layers.append(model.get_submodule(str(node.target)))
        elif node.op not in ("placeholder", "output"):
            raise ValueError(f"chain: the network must be a sequence of modules (got {node})")
        last = node
    return layers


def _fastest(
    calls: Mapping[tuple[str, str], Candidate], plan: Plan
) -> dict[tuple[str, str], float]:
    times = interleave({"\0".join(key): call for key, call in calls.items()}, plan)
    return {key: 1e3 * float(np.min(times["\0".join(key)])) for key in calls}
