"""What is to be left of a model: a share of its weights, a number of them, or of operations."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import describe
from ..nn.kinds import DenseLayer
from .options import LayerOptions
from .tree import Selection


@dataclass(frozen=True)
class Budget:
    """A target, worked out for some layers.

    Attributes:
        kept: Share of the layers' cost that is left, in (0, 1].
        costs: name -> cost of one weight, in the target's unit.
    """

    kept: float
    costs: Mapping[str, float]


class Target(ABC):
    """What is to be left of the layers that are pruned, in a unit of its own.

    A subclass says what one weight of each layer costs. With ``scope="global"`` blocks compete by
    saliency per cost until the budget is used up; with ``scope="layer"`` every layer keeps the
    same share. Layers whose sparsity an override sets are outside of the budget.

    Attributes:
        kept: A share of what the dense layers cost, if a float; else as many units, an int.
    """

    kept: float | int

    def __post_init__(self) -> None:
        kept, where = self.kept, type(self).__name__
        whole = isinstance(kept, int) and not isinstance(kept, bool)
        if not (whole or isinstance(kept, float)) or not kept > 0 or (not whole and kept > 1.0):
            raise ValueError(
                f"tetris.prune.{where}: kept must be a share in (0, 1] as a float, such as 0.1, or "
                f"a positive number of units as an int (got {describe(kept)})"
            )

    @abstractmethod
    def costs(self, model: nn.Module, layers: Mapping[str, DenseLayer]) -> dict[str, float]:
        """Name -> cost of one weight of each layer."""


@dataclass(frozen=True)
class Parameters(Target):
    """A number of stored weights: ``Parameters(100_000)``, or a share: ``Parameters(0.1)``.

    Attributes:
        kept: Weights that the pruned layers store, an int; or their share of the dense ones, a
            float in (0, 1].

    Example:
        >>> tetris.prune.TetrisPruner(model, target=tetris.prune.Parameters(100_000))
    """

    kept: float | int

    def costs(self, model: nn.Module, layers: Mapping[str, DenseLayer]) -> dict[str, float]:
        """Every weight counts one."""
        return dict.fromkeys(layers, 1.0)


@dataclass(frozen=True)
class Flops(Target):
    """Floating-point operations of the pruned layers for given inputs, two per weight and use.

    A weight of a convolution is used at every output pixel, one of a linear layer for every token.

    Attributes:
        kept: Operations that are left, an int; or their share of the dense ones, a float in (0, 1].
        example_inputs: What the model is called with, a tensor or a tuple of arguments; run once,
            in eval mode. The whole batch counts.

    Example:
        >>> target = tetris.prune.Flops(0.25, torch.randn(1, 3, 224, 224))
        >>> tetris.sparsify(model, target=target, scope="global")
    """

    kept: float | int
    example_inputs: Any = field(repr=False)

    def costs(self, model: nn.Module, layers: Mapping[str, DenseLayer]) -> dict[str, float]:
        """Two operations at each position of the output.

        Raises:
            ValueError: a layer is not called for the example.
        """
        uses = uses_of(model, layers, self.example_inputs)
        unused = [name for name in layers if not uses[name]]
        if unused:
            raise ValueError(
                f"tetris.prune.Flops: the example does not go through "
                f"{', '.join(map(repr, unused))}; exclude them, or give other example_inputs"
            )
        return {name: 2.0 * count for name, count in uses.items()}


@torch.no_grad()
def uses_of(
    model: nn.Module, layers: Mapping[str, nn.Module], example_inputs: Any
) -> dict[str, int]:
    """Name -> how often each weight of a layer is used when the model runs on an example.

    The output positions of a convolution, the input positions of a transposed one, the tokens of a
    linear layer; over the whole batch and all calls. The model's mode and buffers are left alone.
    """
    uses = dict.fromkeys(layers, 0)

    def note(name: str):
        def hook(layer: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(layer, nn.Linear):
                uses[name] += output.numel() // max(1, output.shape[-1])
            else:
                seen = args[0] if isinstance(layer, nn.ConvTranspose2d) else output
                spatial = seen.shape[-(len(layer.kernel_size)) :]  # type: ignore[arg-type]
                batch = seen.shape[0] if seen.dim() == len(spatial) + 2 else 1
                uses[name] += batch * spatial.numel()

        return hook

    handles = [layer.register_forward_hook(note(name)) for name, layer in layers.items()]
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        inputs = example_inputs
        model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)
    finally:
        for handle in handles:
            handle.remove()
        for module, mode in modes:
            module.training = mode
    return uses


def budgeted(
    where: str,
    target: Target | None,
    model: nn.Module,
    selection: Selection,
    asked: LayerOptions,
    options: Mapping[str, LayerOptions],
    fixed: set[str],
    has_sparsity: bool,
) -> tuple[Budget | None, LayerOptions, dict[str, LayerOptions]]:
    """Work a target out, and put it in the place of the sparsity in settings.

    Args:
        where: Function named in messages.
        target: As the user gave it; None leaves everything as it is.
        model: The model.
        selection: Its layers.
        asked: Settings of all layers.
        options: name -> settings of each.
        fixed: Layers whose sparsity an override sets.
        has_sparsity: The user gave a sparsity, too.

    Raises:
        TypeError: it is no target.
        ValueError: it asks for more than there is, there is no layer in its reach, or a sparsity
            is given, too.
    """
    if target is None:
        return None, asked, dict(options)
    if not isinstance(target, Target):
        raise TypeError(
            f"{where}: target must be tetris.prune.Parameters(kept) or Flops(kept, example_inputs) "
            f"(got {describe(target)})"
        )
    if has_sparsity:
        raise ValueError(f"{where}: target= says how much is left; leave sparsity= out")
    layers = {n: layer for n, layer in selection.layers.items() if n not in fixed}
    if not layers:
        raise ValueError(f"{where}: overrides set the sparsity of all layers, target= has none")
    costs = target.costs(model, layers)
    total = sum(costs[name] * layer.weight.numel() for name, layer in layers.items())
    kept = target.kept / total if isinstance(target.kept, int) else target.kept
    if kept > 1.0:
        raise ValueError(
            f"{where}: target={target!r} asks for more than the dense layers have, {total:,.0f}"
        )
    asked = replace(asked, sparsity=1.0 - kept)
    own = {n: o if n in fixed else replace(o, sparsity=1.0 - kept) for n, o in options.items()}
    return Budget(kept, costs), asked, own
