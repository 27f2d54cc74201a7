"""Fair timing: candidates take turns, so a slow minute of the machine hits all of them.

Also the dense opponents that every comparison has to beat, see :func:`prepacked_linear` and
:func:`prepacked_conv2d`.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

Candidate = Callable[[], object]
Durations = dict[str, np.ndarray]  # seconds per call, one entry per round


@dataclass(frozen=True)
class Plan:
    """How long to measure.

    Attributes:
        sample_s: a sample repeats the call until this much time has passed.
        budget_s: rounds stop when the group has used this much time ...
        min_rounds: ... but not before this many rounds ...
        max_rounds: ... and at the latest after this many.
    """

    sample_s: float = 0.02
    budget_s: float = 6.0
    min_rounds: int = 5
    max_rounds: int = 15


def ms_text(ms: float) -> str:
    """Milliseconds for people to read: three digits, also where they are thousands."""
    return f"{ms:.0f} ms" if ms >= 999.5 else f"{ms:.3g} ms"


def interleave(
    candidates: dict[str, Candidate],
    plan: Plan | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Durations:
    """Times the candidates round-robin: one sample of each per round.

    The first call of each is not timed (allocation, lazy packing); the fastest of the next three
    sets how many calls make a sample, since a disturbed one would make all samples short. Every
    other round runs in reverse order, so that no candidate always follows the same neighbour.

    Args:
        candidates: name -> what to time.
        plan: How long to measure.
        clock: Seconds, what samples are measured with; the plan's time is that of the wall.

    Returns:
        For every candidate the seconds per call of each round; equal positions ran in the same
        round, so ratios of equal positions are paired.
    """
    plan = plan or Plan()
    repeats = {}
    for name, call in candidates.items():
        call()
        repeats[name] = max(1, int(np.ceil(plan.sample_s / _fastest(call, plan.sample_s, clock))))
    durations: dict[str, list[float]] = {name: [] for name in candidates}
    order = list(candidates.items())
    started = time.perf_counter()
    for done in range(plan.max_rounds):
        if done >= plan.min_rounds and time.perf_counter() - started > plan.budget_s:
            break
        for name, call in order if done % 2 == 0 else reversed(order):
            durations[name].append(_sample(call, repeats[name], clock))
    return {name: np.asarray(values) for name, values in durations.items()}


def _fastest(call: Candidate, sample_s: float, clock: Callable[[], float]) -> float:
    """Seconds of the fastest of three calls, or of fewer where one takes several samples' time."""
    fastest = np.inf
    for _ in range(3):
        fastest = min(fastest, _sample(call, 1, clock))
        if fastest > 5 * sample_s:
            break
    return fastest


def _sample(call: Candidate, repeats: int, clock: Callable[[], float]) -> float:
    started = clock()
    for _ in range(repeats):
        call()
    return max((clock() - started) / repeats, 1e-9)


def rotate(calls: list[Candidate]) -> Candidate:
    """One candidate that takes the given calls in turn, for example one per copy of the weights."""
    if len(calls) == 1:
        return calls[0]
    position = 0

    def call() -> object:
        nonlocal position
        position = (position + 1) % len(calls)
        return calls[position]()

    return call


def quartiles(values: np.ndarray) -> tuple[float, float, float]:
    """Lower quartile, median and upper quartile."""
    low, middle, high = np.percentile(values, [25, 50, 75])
    return float(low), float(middle), float(high)


def prepacked_linear(
    weight: Tensor, bias: Tensor | None, tokens: int, activation: str = "none"
) -> Callable[[Tensor], Tensor] | None:
    """The fastest dense linear layer inside torch: oneDNN with weights packed ahead of time.

    torch uses this route only in frozen graphs; ``nn.Linear`` goes to MKL, which is slower on most
    shapes. None where this torch has no oneDNN or no such op.
    """
    ops = _onednn()
    if ops is None:
        return None
    packed = weight
    if hasattr(ops, "_reorder_linear_weight"):
        packed = ops._reorder_linear_weight(weight, tokens)
    return lambda x: ops._linear_pointwise(x, packed, bias, activation, [], "")


def prepacked_conv2d(
    conv: nn.Conv2d, input_shape: Sequence[int], activation: str = "none"
) -> Callable[..., Tensor] | None:
    """A dense convolution by oneDNN with its weight packed ahead of time, as in frozen graphs.

    Args:
        conv: Zero-padded convolution; its memory format is that of its weight.
        input_shape: [N, C, H, W] that the weight is packed for.
        activation: ``none`` or ``relu``, fused.

    Returns:
        ``(x, residual) -> activation(conv(x) + residual)``, the residual fused too; the output is
        channels_last. None where this torch has no oneDNN or no such op.
    """
    ops = _onednn()
    if ops is None or not hasattr(ops, "_reorder_convolution_weight"):
        return None
    geometry = [list(conv.padding), list(conv.stride), list(conv.dilation), conv.groups]
    weight = conv.weight.detach()
    packed = ops._reorder_convolution_weight(weight, *geometry, list(input_shape))
    bias = None if conv.bias is None else conv.bias.detach()
    unary = None if activation == "none" else activation

    def call(x: Tensor, residual: Tensor | None = None) -> Tensor:
        if residual is None:
            return ops._convolution_pointwise(x, packed, bias, *geometry, activation, [], "")
        return ops._convolution_pointwise(
            x, residual, packed, bias, *geometry, "add", 1.0, unary, [], ""
        )

    return call


def prepacked_chain(layers: Sequence[nn.Module], x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """Layers behind each other, the dense ones among them by oneDNN with ReLU fused.

    Args:
        layers: In the order of the forward pass, in eval mode; batch norm should be folded. Others
            than ``nn.Linear`` and zero-padded ``nn.Conv2d``, sparse ones for example, run as they
            are.
        x: A batch, whose sizes and memory format the weights are packed for.

    Returns:
        None where this torch has no oneDNN or no such ops.
    """
    stages: list[Callable[[Tensor], Tensor]] = []
    fused = False
    for layer, after in zip(layers, [*layers[1:], nn.Identity()], strict=True):
        if fused:  # a ReLU that the stage before computes
            fused = False
            continue
        stage = layer
        activation = "relu" if isinstance(after, nn.ReLU) else "none"
        if type(layer) is nn.Linear:
            bias = None if layer.bias is None else layer.bias.detach()
            stage = prepacked_linear(layer.weight.detach(), bias, x.shape[0], activation)
        elif type(layer) is nn.Conv2d and layer.padding_mode == "zeros":
            stage = prepacked_conv2d(layer, x.shape, activation)
        if stage is None:
            return None
        fused = stage is not layer and activation == "relu"
        stages.append(stage)
        x = stage(x)

    def call(x: Tensor) -> Tensor:
        for stage in stages:
            x = stage(x)
        return x

    return call


def unpacked_product() -> Callable[[Tensor, Tensor], Tensor] | None:
    """OneDNN's ``(a, b) -> a @ b.T`` on operands as they lie; None where this torch has none."""
    ops = _onednn()
    if ops is None:
        return None
    return lambda a, b: ops._linear_pointwise(a, b, None, "none", [], "")


def _onednn():
    """Torch's oneDNN ops, or None where this torch has no oneDNN or no such ops."""
    ops = torch.ops.mkldnn
    there = torch.backends.mkldnn.is_available() and hasattr(ops, "_linear_pointwise")
    return ops if there else None
