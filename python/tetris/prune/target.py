"""What is to be left of a model: a share of its weights, a number of them, or of operations."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from ..blocking import Blocking
from ..checks import describe
from ..nn.kinds import DenseLayer, LinearLayer, groups_of, oriented
from .batches import Batch, undisturbed
from .options import LayerOptions
from .tree import Selection

if TYPE_CHECKING:
    from .latency import LatencyPlan


@dataclass(frozen=True)
class Budget:
    """A target, worked out for some layers.

    Attributes:
        kept: Share of the layers' cost that is left, in (0, 1].
        costs: name -> cost of one weight, in the target's unit.
        latency: What a :class:`tetris.prune.Latency` chose, None with other targets.
    """

    kept: float
    costs: Mapping[str, float]
    latency: LatencyPlan | None = None


class Target(ABC):
    """What is to be left of the layers that are pruned, in a unit of its own.

    A subclass says what one weight of each layer costs. With ``scope="global"`` blocks compete by
    saliency per cost until the budget is used up; with ``scope="layer"`` every layer keeps the
    same share, rounded to whole blocks. What is stored stays within the budget, counted in whole
    blocks, unless the floor of one block per block row is more. Layers whose sparsity an override
    sets are outside of the budget.

    Attributes:
        kept: A share of what the dense layers cost, if a float; else as many units, an int.

    Raises:
        ValueError: kept is neither.

    Example:
        >>> @dataclass(frozen=True)
        ... class Bytes(tetris.prune.Target):
        ...     kept: float | int
        ...     def costs(self, model, layers):
        ...         return {n: float(layer.weight.element_size()) for n, layer in layers.items()}
        >>> sparse = tetris.sparsify(model, target=Bytes(4_000), scope="global")
        >>> sum(layer.values.nbytes for layer in (sparse.fc, sparse.classifier)) <= 4_000
        True
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

    def resolve(
        self,
        where: str,
        model: nn.Module,
        selection: Selection,
        asked: LayerOptions,
        options: Mapping[str, LayerOptions],
        fixed: set[str],
        together: bool,
        progress: bool,
    ) -> tuple[Budget, LayerOptions, dict[str, LayerOptions]] | None:
        """Settings that the target chooses by itself, as :func:`budgeted` returns them.

        A target that does, changes ``selection`` and ``fixed``, too, and where the processes of a
        training call it ``together`` chooses alike in all. None: :meth:`costs` say it.
        """
        return None


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
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of
            them by name; run once, in eval mode. The whole batch counts.

    Example:
        >>> target = tetris.prune.Flops(0.25, torch.randn(1, 3, 224, 224))
        >>> tetris.sparsify(model, target=target, scope="global")
    """

    kept: float | int
    example_inputs: Any = field(repr=False)

    def costs(self, model: nn.Module, layers: Mapping[str, DenseLayer]) -> dict[str, float]:
        """Two operations at each position of the output.

        Raises:
            ValueError: the model does not take the example, or calls a layer not at all for it.
        """
        uses = uses_of(model, layers, self.example_inputs)
        unused = [name for name in layers if not uses[name]]
        if unused:
            raise ValueError(
                f"tetris.prune.Flops: the example does not go through "
                f"{', '.join(map(repr, unused))}; exclude them, or give other example_inputs"
            )
        return {name: 2.0 * count for name, count in uses.items()}


def uses_of(
    model: nn.Module,
    layers: Mapping[str, nn.Module],
    example_inputs: Any,
    where: str = "tetris.prune.Flops",
) -> dict[str, int]:
    """Name -> how often each weight of a layer is used when the model runs on an example.

    The output positions of a convolution, the input positions of a transposed one, the tokens of a
    linear layer; over the whole batch and all calls. The model stays as it was.
    """
    uses = dict.fromkeys(layers, 0)

    def note(name: str):
        def hook(layer: nn.Module, args: Any, kwargs: dict[str, Any], output: Tensor) -> None:
            if isinstance(layer, LinearLayer):
                uses[name] += output.numel() // max(1, output.shape[-1])
                return
            transposed = isinstance(layer, nn.ConvTranspose2d)
            seen = (args[0] if args else kwargs["input"]) if transposed else output
            spatial = seen.shape[-len(layer.kernel_size) :]  # type: ignore[arg-type]
            batch = seen.shape[0] if seen.dim() == len(spatial) + 2 else 1
            uses[name] += batch * spatial.numel()

        return hook

    handles = [
        layer.register_forward_hook(note(name), with_kwargs=True) for name, layer in layers.items()
    ]
    try:
        with undisturbed(model), torch.no_grad():
            Batch(example_inputs).outputs(where, model)
    finally:
        for handle in handles:
            handle.remove()
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
    together: bool = False,
    progress: bool = False,
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
        together: All processes of a distributed training call this, as they make a pruner.
        progress: Show a progress bar.

    Raises:
        TypeError: it is no target.
        ValueError: it asks for more than there is, there is no layer in its reach, or a sparsity
            is given, too.
    """
    if target is None:
        return None, asked, dict(options)
    if not isinstance(target, Target):
        raise TypeError(
            f"{where}: target must be tetris.prune.Parameters(kept), Flops(kept, example_inputs) "
            f"or Latency(kept, example_inputs) (got {describe(target)})"
        )
    if has_sparsity:
        raise ValueError(
            f"{where}: target= (or latency=) says how much is left; leave sparsity= out"
        )
    layers = {n: layer for n, layer in selection.layers.items() if n not in fixed}
    if not layers:
        raise ValueError(f"{where}: overrides set the sparsity of all layers, target= has none")
    if decided := target.resolve(
        where, model, selection, asked, options, fixed, together, progress
    ):
        return decided
    costs = target.costs(model, layers)
    units = {n: _units(where, n, layer, options[n], costs[n]) for n, layer in layers.items()}
    total = sum(count * cost for count, cost in units.values())
    budget = target.kept if isinstance(target.kept, int) else target.kept * total
    if budget > total:
        raise ValueError(
            f"{where}: target={target!r} asks for more than the dense layers have, {total:,.0f}"
        )
    least = min((cost, name) for name, (_, cost) in units.items())
    if budget < least[0]:
        hint = "; an int is a number, a float a share, such as 1.0" if target.kept == 1 else ""
        raise ValueError(
            f"{where}: target={target!r} leaves {budget:,.0f}, less than one block, "
            f"{least[0]:,.0f} in layer {least[1]!r}{hint}"
        )
    kept = _shared_out(units, budget)
    asked = replace(asked, sparsity=1.0 - budget / total)
    own = {
        # Half a unit more, and floor() finds the number of removed ones again.
        n: replace(o, sparsity=min(1.0, (units[n][0] - kept[n] + 0.5) / units[n][0]))
        for n, o in options.items()
        if n not in fixed
    }
    return Budget(budget / total, costs), asked, {**options, **own}


def _units(
    where: str, name: str, layer: DenseLayer, options: LayerOptions, cost: float
) -> tuple[int, float]:
    """How many blocks a layer has (those of all kernel positions as one, if tied), cost of each."""
    weight = oriented(layer, layer.weight.detach())
    sizes = Blocking.of(where, f"weight of layer {name!r}", weight, options.block, groups_of(layer))
    tied = sizes.positions if options.tie_kernel else 1
    bo, bi = sizes.block
    return math.prod(sizes.grid) // tied, bo * bi * tied * cost


def _shared_out(units: Mapping[str, tuple[int, float]], budget: float) -> dict[str, int]:
    """How many units each layer keeps: the same share, rounded such that the budget holds."""
    share = budget / sum(count * cost for count, cost in units.values())
    kept = {n: math.floor(share * count * (1.0 + 1e-12)) for n, (count, _) in units.items()}
    left = budget * (1.0 + 1e-12) - sum(kept[n] * cost for n, (_, cost) in units.items())
    for name in sorted(units, key=lambda n: kept[n] - share * units[n][0]):
        count, cost = units[name]
        if cost <= left and kept[name] < count:
            kept[name] += 1
            left -= cost
    return kept
