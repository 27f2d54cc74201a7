"""Classifiers in the middle of a network."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from torch import Tensor, nn
from torch.nn import functional as F

from ...checks import describe
from ...nn.kinds import DenseLayer, LinearLayer, features_of
from .forward import Forward


class Head(nn.Module):
    """``Linear(AvgPool(ReLU(BN(O))))`` of a layer's outputs O; without pooling for a linear layer.

    Zhuang et al., "Discrimination-aware Channel Pruning for Deep Neural Networks", NeurIPS 2018,
    equation 3.

    Args:
        layer: Whose outputs it reads.
        classes: Logits.
    """

    def __init__(self, layer: DenseLayer, classes: int) -> None:
        super().__init__()
        self.linear_input = isinstance(layer, LinearLayer)
        features, _ = features_of(layer)
        norm = nn.BatchNorm2d if layer.weight.dim() == 4 else nn.BatchNorm1d
        weight = layer.weight
        self.norm = norm(features, device=weight.device, dtype=weight.dtype)
        self.classify = nn.Linear(features, classes, device=weight.device, dtype=weight.dtype)

    def forward(self, outputs: Tensor) -> Tensor:
        """[N, channels, *map] or [N, features] to [N, classes]."""
        if self.linear_input and outputs.dim() != 2:
            raise ValueError(
                "DCPPruner: a head behind a linear layer reads [N, features] "
                f"(got {list(outputs.shape)}); place heads behind other layers"
            )
        hidden = F.relu(self.norm(outputs))
        return self.classify(hidden if hidden.dim() == 2 else hidden.flatten(2).mean(2))


@dataclass(frozen=True)
class Stage:
    """Layers whose channels are chosen under one loss.

    Attributes:
        head: Layer whose outputs the head reads; None for the network's own loss.
        layers: Pruned layers up to there, in the order they run.
    """

    head: str | None
    layers: tuple[str, ...]


def place_heads(
    where: str, heads: int | Iterable[str] | None, forward: Forward, pruned: Iterable[str]
) -> list[Stage]:
    """Divide the pruned layers into stages, each ending at a head, the last at the output.

    A layer belongs to the first head whose input depends on it: not to one beside which it runs.

    Args:
        where: Function named in messages.
        heads: Names of layers, or a number: spread evenly over the pruned layers; None for one per
            five of them, at least one where there are two.
        forward: The model.
        pruned: Names of layers.

    Raises:
        ValueError: a name is no layer that is called once, or the last one; no layer is pruned that
            leads to a head, and to none before.
        TypeError: heads is of another kind.
    """
    for name in pruned:
        forward.check(name)
    order = sorted(pruned, key=forward.depth.__getitem__)
    if heads is None:
        heads = max(min(1, len(order) - 1), len(order) // 5)
    if isinstance(heads, int) and not isinstance(heads, bool):
        if not 0 <= heads < len(order):
            raise ValueError(
                f"{where}: heads, their number, must be from 0 to {len(order) - 1}: at least one "
                f"of the {len(order)} pruned layers lies before each and one after the last "
                f"(got {heads}); or name the layers behind which they stand"
            )
        names = [order[(i + 1) * len(order) // (heads + 1) - 1] for i in range(heads)]
        return _stages(where, names, forward, order)
    if isinstance(heads, str) or not isinstance(heads, Iterable):
        raise TypeError(
            f"{where}: heads must be a number or a list of layer names, such as ['conv2'] "
            f"(got {describe(heads)})"
        )
    names = list(heads)
    for name in names:
        if name not in forward.depth:
            raise ValueError(
                f"{where}: heads names {describe(name)}, which is no linear layer or convolution "
                f"that is called once ({', '.join(map(repr, forward.depth))})"
            )
        if forward.depth[name] == len(forward.depth):
            raise ValueError(
                f"{where}: heads names {name!r}, the last layer, behind which is the network's own "
                "loss; leave it out"
            )
    if len(set(names)) < len(names):
        raise ValueError(f"{where}: heads names a layer twice (got {names})")
    return _stages(where, sorted(names, key=forward.depth.__getitem__), forward, order)


def _stages(where: str, heads: Sequence[str], forward: Forward, order: list[str]) -> list[Stage]:
    stages, rest = [], tuple(order)
    for head in heads:
        own = tuple(n for n in rest if forward.leads(n, head))
        if not own:
            raise ValueError(
                f"{where}: no pruned layer leads to the head behind {head!r} and to none before "
                f"it, so it has nothing to choose (pruned: {', '.join(map(repr, order))}); "
                "leave it out, or place it elsewhere"
            )
        stages.append(Stage(head, own))
        rest = tuple(n for n in rest if n not in own)
    return [*stages, Stage(None, rest)] if rest else stages
