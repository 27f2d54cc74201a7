"""Regrowth: blocks come back while others go, so that training also searches where to store."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.utils.hooks import RemovableHandle

from ..checks import check_seed, describe
from ..nn.base import SparseLayer
from ..nn.kinds import DenseLayer, oriented
from ..relayout import layout_of_keys
from . import ranks
from .masks import BlockMask
from .select import Units

Pairs = list[tuple[Tensor, Tensor]]  # inputs of a layer and gradients of its outputs


@dataclass(frozen=True)
class Regrow:
    """When a pruner that trains on stored blocks exchanges how many of them, and for which.

    At every update the ``share`` lightest stored blocks go and as many that were not stored come,
    with zero weights. The share falls as ``share / 2 * (1 + cos(pi * step / end))`` (Evci et al.,
    "Rigging the Lottery: Making All Tickets Winners", ICML 2020, section 3).

    A layer whose weight is frozen (``requires_grad=False``) exchanges nothing: what comes back
    would stay zero. What the schedule removes goes there, too.

    Attributes:
        share: Of the stored blocks, in (0, 1), that are exchanged at first.
        every: Steps between updates.
        end: Step from which nothing is exchanged any more; None: the share never falls.
        by: ``"gradient"``: those whose weights have the largest gradients, summed in magnitude
            (RigL). It needs the gradient of blocks that are not stored, so with
            ``execution="sparse"`` every update keeps the layers' inputs and output gradients of its
            step and costs one dense product per layer; masked layers have it.
            ``"random"``: any (SET, Mocanu et al., "Scalable training of artificial neural networks
            with adaptive sparse connectivity inspired by network science", Nature Communications
            2018), at the cost of the stored blocks.
        seed: Of the random choice.

    Example:
        >>> tetris.prune.Regrow(share=0.3, every=100, end=7500)(0)
        0.3
    """

    share: float = 0.3
    every: int = 100
    end: int | None = None
    by: Literal["gradient", "random"] = "gradient"
    seed: int = 0

    def __post_init__(self) -> None:
        if not (isinstance(self.share, Real) and 0.0 < self.share < 1.0):
            raise ValueError(
                f"Regrow: share must be a number in (0, 1) (got {describe(self.share)})"
            )
        if not _is_count(self.every):
            raise ValueError(f"Regrow: every must be an int >= 1 (got {describe(self.every)})")
        if self.end is not None and not _is_count(self.end):
            raise ValueError(f"Regrow: end must be an int >= 1 or None (got {describe(self.end)})")
        check_seed("Regrow", self.seed)
        if self.by not in ("gradient", "random"):
            raise ValueError(f"Regrow: by must be 'gradient' or 'random' (got {describe(self.by)})")

    def __call__(self, step: int) -> float:
        """Return the share to exchange in an update after ``step`` steps."""
        if self.end is None:
            return self.share
        return self.share / 2 * (1 + math.cos(math.pi * min(step, self.end) / self.end))

    def due(self, step: int) -> bool:
        """Whether there is an update after ``step`` steps."""
        return step > 0 and step % self.every == 0 and (self.end is None or step < self.end)


def _is_count(value: object) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= 1


class Regrowth:
    """Chooses what comes back, for one pruner.

    Args:
        where: Class named in messages.
        rule: When and how; None: never.
    """

    def __init__(self, where: str, rule: Regrow | None) -> None:
        if rule is not None and not isinstance(rule, Regrow):
            raise TypeError(
                f"{where}: regrow must be a tetris.prune.Regrow, such as Regrow(share=0.3, "
                f"every=100) (got {describe(rule)})"
            )
        seed = check_seed("Regrow", rule.seed) if rule else 0  # also of numpy's numbers
        self.generator = torch.Generator().manual_seed(seed)
        self._where = where
        self._rule = rule
        self._watches: dict[str, tuple[nn.Module, GradientWatch]] = {}
        self._found: dict[str, Tensor] = {}

    def share(self, step: int) -> float:
        """Share of the stored blocks to exchange after ``step`` steps."""
        return self._rule(step) if self._rule and self._rule.due(step) else 0.0

    def watch(self, step: int, layers: Mapping[str, nn.Module]) -> None:
        """Watch the gradients of a step if it ends with regrowth by them, and no others."""
        self.stop()
        if self._rule and self._rule.by == "gradient" and self._rule.due(step):
            for name, layer in layers.items():
                watch = watch_for(layer)
                if watch is not None:
                    self._watches[name] = layer, watch
                    watch.start(layer)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No hooks on the layers meanwhile, for copies to be free of them."""
        for _, watch in self._watches.values():
            watch.stop()
        try:
            yield
        finally:
            for layer, watch in self._watches.values():
                watch.start(layer)

    def stop(self) -> None:
        """Watch nothing."""
        for _, watch in self._watches.values():
            watch.stop()
        self._watches, self._found = {}, {}

    def grow(self, name: str, units: Units, count: int) -> Tensor:
        """Keys of units of a layer that are not stored and come back."""
        assert self._rule is not None
        if self._rule.by == "random":
            return random_absent(units, count, self.generator)
        gradients = self._gradients(name)[units.first : units.first + units.rows]
        return steepest_absent(units, gradients, count)

    def _gradients(self, name: str) -> Tensor:
        """[G, C], gradients of a layer's blocks in the step that has just ended."""
        if name not in self._found:
            layer, watch = self._watches.get(name, (None, None))
            if layer is None or watch is None or not watch.seen:
                raise RuntimeError(
                    f"{self._where}.step: regrowth by gradient needs a backward pass through layer "
                    f"{name!r} since the last step, and saw none (torch.compile drops the hook it "
                    "sees it by; Regrow(by='random') needs none)"
                )
            activation = getattr(layer, "activation", "none")
            if activation != "none":
                raise ValueError(
                    f"{self._where}.step: regrowth by gradient sees gradients behind the "
                    f"activation that layer {name!r} fuses, {activation!r}; fuse it later"
                )
            self._found[name] = watch.block_sums(layer)
        return self._found[name]


def random_absent(units: Units, count: int, generator: torch.Generator) -> Tensor:
    """Keys of ``count`` units that are not stored, drawn without replacement.

    The r-th absent one is found from the sorted keys of the stored ones: before stored unit i lie
    ``keys[i] - i`` absent ones.
    """
    absent = units.total - len(units.keys)
    keys = units.keys.cpu()
    before = keys - torch.arange(len(keys))
    ranks = _distinct(absent, min(count, absent), generator)
    return (ranks + torch.searchsorted(before, ranks, right=True)).to(units.keys.device)


def _distinct(size: int, count: int, generator: torch.Generator) -> Tensor:
    """``count`` different numbers below ``size``, in time and memory of the count."""
    if 2 * count >= size:
        return torch.randperm(size, generator=generator)[:count]
    found = torch.empty(0, dtype=torch.int64)
    while len(found) < count:
        drawn = torch.randint(size, (2 * count,), generator=generator)
        found = torch.cat([found, drawn]).unique()
    return found[torch.randperm(len(found), generator=generator)[:count]]


def steepest_absent(units: Units, gradient: Tensor, count: int) -> Tensor:
    """Keys of the ``count`` units that are not stored with the largest gradients.

    Args:
        units: What is stored.
        gradient: [G, C], a number per block, as :func:`block_gradients` returns it.
        count: How many.
    """
    score = gradient.unflatten(1, (units.tied, units.width)).sum(1).flatten()
    score = score.index_fill(0, units.keys, -1.0)
    return score.topk(min(count, units.total - len(units.keys))).indices


class GradientWatch:
    """Keeps a layer's inputs and output gradients between :meth:`start` and :meth:`stop`.

    By reference, without a copy: what is kept is memory that autograd would have freed. A copy of
    the layer made meanwhile has a watch that keeps nothing.
    """

    def __init__(self) -> None:
        self.pairs: Pairs = []
        self._handle: RemovableHandle | None = None

    def start(self, layer: nn.Module) -> None:
        """Watch a layer."""
        self._handle = layer.register_forward_hook(self._forward, with_kwargs=True)

    def stop(self) -> None:
        """Let go of the layer."""
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @property
    def seen(self) -> bool:
        """Whether there was a backward pass."""
        return bool(self.pairs)

    def block_sums(self, layer: nn.Module) -> Tensor:
        """[G, C], magnitudes of the gradients that were seen; see :func:`block_gradients`."""
        assert isinstance(layer, SparseLayer)
        return block_gradients(layer, self.pairs)

    def _forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self._handle is not None and output.requires_grad:
            # Called as nn.Linear calls it, or as Conv1D of transformers does.
            x = args[0] if args else kwargs["input" if "input" in kwargs else "x"]
            x = x.detach()
            output.register_hook(lambda grad: self.pairs.append((x, grad.detach())))

    def __reduce__(self) -> tuple[type[GradientWatch], tuple[()]]:
        return GradientWatch, ()


class MaskWatch(GradientWatch):
    """The same for a masked layer, whose mask sees the gradient of the whole weight.

    Gradients of several backward passes are added up, so that one is kept.
    """

    def __init__(self) -> None:
        super().__init__()
        self._total: Tensor | None = None

    def start(self, layer: nn.Module) -> None:
        """Watch a masked layer."""
        super().start(mask_of(layer))

    def block_sums(self, layer: nn.Module) -> Tensor:
        """[G, C], magnitudes of the gradients that were seen."""
        assert isinstance(layer, DenseLayer)
        mask = mask_of(layer)
        assert self._total is not None
        layout = mask.layout()
        weight = oriented(layer, ranks.mean(self._total).abs())
        return layout.blocking.sums(weight, layout.row_perm, layout.col_perm)

    @property
    def seen(self) -> bool:
        """Whether there was a backward pass."""
        return self._total is not None

    def _forward(
        self, layer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Tensor
    ) -> None:
        if self._handle is not None and output.requires_grad:
            output.register_hook(self._add)

    def _add(self, grad: Tensor) -> None:
        self._total = grad.detach() if self._total is None else self._total + grad

    def __reduce__(self) -> tuple[type[MaskWatch], tuple[()]]:
        return MaskWatch, ()


def mask_of(layer: nn.Module) -> BlockMask:
    """The mask of a masked layer."""
    return layer.parametrizations.weight[0]  # type: ignore[index, union-attr, return-value]


def watch_for(layer: nn.Module) -> GradientWatch | None:
    """What sees the gradients of a layer's blocks that are not kept; None where all are."""
    if isinstance(layer, SparseLayer):
        return GradientWatch()
    return MaskWatch() if parametrize.is_parametrized(layer, "weight") else None


def block_gradients(layer: SparseLayer, pairs: Pairs) -> Tensor:
    """Sum of the magnitudes of the weights' gradients per block, stored or not.

    The product ``grad.T @ x`` is that of the stored values' gradient, for all blocks instead: a few
    block rows at a time, such that what is held at once is of the size of the stored blocks. Under
    ``torch.distributed`` the gradients are the means over processes, as those of the optimizer.

    Args:
        layer: A sparse layer.
        pairs: Its inputs and the gradients of its outputs in one step.

    Returns:
        [G, C].
    """
    same = [(x.to(layer.values.dtype), grad.to(layer.values.dtype)) for x, grad in pairs]
    layout = layer.layout
    rows, columns = layout.block_grid
    keys = torch.arange(rows * columns, device=layout.device)
    sums = []
    for part in keys.split(max(1, layout.nnz_blocks // columns) * columns):
        index = layout_of_keys(layout, part)
        gradient = sum(layer.gradient_of(index, x, grad) for x, grad in same)
        assert isinstance(gradient, Tensor)
        sums.append(ranks.mean(gradient).abs_().sum((1, 2)))
    return torch.cat(sums).view(rows, columns)
