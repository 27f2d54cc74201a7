"""Layers that share an order of channels: rows of those that write, columns of those that read.

Layers that are searched alone end in an order each, and what lies between two of them gathers. With
one order for all that touch the same channels, a consumer reads what its producers wrote, block by
block, and a residual sum adds like to like (layers that tie channels: coupled layers).

One order is searched at a time, all others held. With the other axes in place, each member shrinks
to one line per shared channel, of sums over its own groups; side by side these lines are a matrix
like any other, whose rows :func:`tetris.reorder.search` orders::

                conv1 (rows)   conv2 (rows)   head (columns)
    channel 0   [ lines of 0 |  lines of 0  |  lines of 0   ]   blocks: b channels x one element
    channel 1   [ ...        |              |               ]

Every layer keeps a number of blocks of its own, but that matrix has one price for a block to be
worth keeping. So prices are made equal: a constant on all elements of a layer raises its block sums
up to the dearest layer's price, and changes no gain of a swap. Without it layers of many blocks,
which are worth less each, were hardly heeded: of three layers of lognormal scales 2 to 7 % less was
retained.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import reorder
from ..blocking import Blocking, removed_count
from ..checks import describe, kind
from ..layout import BlockLayout
from ..layout_search import search_method
from .options import LayerOptions

#: Times that every order is searched, from each start. Two more found at most 0.1 % more, in three
#: layers of lognormal scales with blocks of 4 to 16.
ROUNDS = 3

_AXES = ("rows", "columns")

Member = tuple[str, int]  # a layer's name and one of its axes


@dataclass(frozen=True)
class SharedOrder:
    """Channels that several layers write or read, to be kept in one order by all of them.

    Rows are outputs, also of transposed convolutions, columns inputs. What adds up needs one order:
    in a residual network the rows of all layers that write to a stream and the columns of those
    that read it. A layer may be among both.

    Along such channels permutations cancel: bias and norms put into the order, none is left to
    apply. Layers keep theirs all the same, and the CPU kernels gather through any order at no more
    cost, so there it buys nothing yet and costs some saliency; it is for contiguous loads.

    Attributes:
        rows: Names of layers whose outputs these channels are.
        cols: Names of layers whose inputs they are.

    Example:
        >>> stream = tetris.prune.SharedOrder(rows=("stem", "conv2"), cols=("conv1", "head"))
        >>> inner = tetris.prune.SharedOrder(rows="conv1", cols="conv2")
        >>> sparse = tetris.sparsify(model, block=(8, 8), share=(stream, inner))
        >>> sparse.stem.row_perm.equal(sparse.head.col_perm)
        True
    """

    rows: tuple[str, ...] = ()
    cols: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for axis in ("rows", "cols"):
            given = getattr(self, axis)
            names = (given,) if isinstance(given, str) else given
            names = tuple(names) if isinstance(names, Iterable) else (names,)
            if not all(isinstance(name, str) for name in names):
                raise TypeError(
                    f"tetris.prune.SharedOrder: {axis} must be names of layers, as in "
                    f"model.named_modules() (got {describe(given)})"
                )
            object.__setattr__(self, axis, names)
        if len(self.members) < 2:
            raise ValueError(
                "tetris.prune.SharedOrder: an order is shared by two axes at least "
                f"(got rows={self.rows}, cols={self.cols})"
            )

    @property
    def members(self) -> list[Member]:
        """Layers and axes, 0 for rows and 1 for columns."""
        return [(name, 0) for name in self.rows] + [(name, 1) for name in self.cols]


Share = SharedOrder | Iterable[SharedOrder]


def check_share(
    where: str,
    share: Share,
    shapes: Mapping[str, Sequence[int]],
    options: Mapping[str, LayerOptions],
    groups: Mapping[str, int],
) -> tuple[SharedOrder, ...]:
    """Return groups of axes that can have one order each, or raise.

    Args:
        where: Function named in messages.
        share: See :class:`SharedOrder`.
        shapes: name -> (out, in, ...) of all layers.
        options: name -> settings.
        groups: name -> groups of a convolution, 1 of a linear layer.

    Raises:
        TypeError: something else than :class:`SharedOrder`.
        ValueError: a name of no pruned layer, an axis in two groups, axes of different sizes or
            blocks, a convolution with groups, settings of the search that differ.
    """
    several = (share,) if isinstance(share, SharedOrder) else share
    if isinstance(several, (str, Mapping)) or not isinstance(several, Iterable):
        raise TypeError(f"{where}: share must be SharedOrder objects (got {kind(several)})")
    several = tuple(several)
    seen: set[tuple[str, int]] = set()
    for shared in several:
        if not isinstance(shared, SharedOrder):
            raise TypeError(
                f"{where}: share must be one or several tetris.prune.SharedOrder(rows=..., "
                f"cols=...) (got {describe(shared)})"
            )
        for name, axis in shared.members:
            if name not in shapes:
                raise ValueError(
                    f"{where}: share names {name!r}, which is not a layer that is pruned "
                    f"(pruned: {', '.join(shapes)})"
                )
            if groups[name] > 1:
                raise ValueError(
                    f"{where}: layer {name!r} has {groups[name]} groups, whose channels keep to "
                    "themselves; leave it out of share"
                )
            if (name, axis) in seen:
                raise ValueError(
                    f"{where}: share has the {_AXES[axis]} of {name!r} twice; put everything that "
                    "needs one order into one SharedOrder"
                )
            seen.add((name, axis))
        _agree(where, "sizes", shared, lambda name, axis: shapes[name][axis])
        _agree(
            where,
            "blocks of one size (or 1)",
            shared,
            lambda name, axis: options[name].block[axis],
            besides=1,
        )
    for part in _components(several):
        first = next(iter(part))
        for setting in ("reorder", "seed", "sweeps"):
            for name in part:
                here, there = (getattr(options[n], setting) for n in (first, name))
                if here != there:
                    raise ValueError(
                        f"{where}: layers that share orders are searched together and need one "
                        f"{setting} (got {here!r} for {first!r} and {there!r} for {name!r})"
                    )
    return several


def search_shared(
    where: str,
    saliency: Mapping[str, Tensor],
    options: Mapping[str, LayerOptions],
    share: Share,
    groups: Mapping[str, int],
    progress: bool = False,
) -> dict[str, tuple[BlockLayout, reorder.SearchResult]]:
    """Layouts of the layers that share orders, as :func:`tetris.layout.search_layout` gives one.

    Orders are chosen for the sum of the shares that the layers retain, each of its own saliency,
    so that large layers do not decide alone. It is never below that of identity or of the L1 sort:
    shared channels by their norm in all members together, other axes by their own. A single layer
    may retain less than alone. With ``sweeps`` the result depends on the arguments only.

    Rows and columns whose blocks are one wide take the shared order too, although it makes no
    difference to what they retain. Floor and ``balanced`` are heeded in what is kept, and in the
    search for axes that are not shared, but not in that for shared ones.

    Args:
        where: Function named in messages.
        saliency: name -> [out, in] or [out, in, *kernel], of all layers.
        options: name -> settings. ``budget`` is one layer's; layers bring it into the joint search.
        share: See :class:`SharedOrder`.
        groups: name -> groups of a convolution, 1 of a linear layer.
        progress: Show a progress bar.

    Returns:
        name -> (layout, search) of the layers that share names. In a search the shares of identity
        and L1 sort are those of the layer alone, seconds and sweeps those of all its partners.

    Raises:
        TypeError, ValueError: as :func:`check_share`.
    """
    result = {}
    shapes = {name: values.shape for name, values in saliency.items()}
    for part, shared in _components(check_share(where, share, shapes, options, groups)).items():
        joint = _Joint({n: _Layer.of(saliency[n], options[n]) for n in part}, shared, where)
        with reorder.progress_bar(progress) as report:
            joint.run(report or (lambda done: None))
        result.update({name: joint.found(name, saliency[name].shape) for name in part})
    return result


@dataclass
class _Layer:
    """One layer of a joint search.

    Attributes:
        values: float32[out, in, positions, 1], saliency divided by its sum.
        options: Settings.
        order: Row and column orders, int64[out] and int64[in].
        retained: Share of the saliency that is kept under them.
    """

    values: Tensor
    options: LayerOptions
    order: list[Tensor] = field(default_factory=list)
    retained: float = 0.0

    @classmethod
    def of(cls, saliency: Tensor, options: LayerOptions) -> _Layer:
        """A layer, from its saliency [out, in, *kernel]."""
        total = saliency.sum(dtype=torch.float64)
        values = (saliency.double() / total).float() if total > 0 else saliency
        return cls(values.reshape(*saliency.shape[:2], -1, 1), options)

    @property
    def seconds(self) -> float:
        """For the search, as for a layer that is searched alone."""
        budget = self.options.budget
        shape = self.values.shape
        return reorder.default_budget(shape, self.options.block) if budget is None else budget

    @property
    def kept(self) -> tuple[int, int]:
        """Blocks that are kept, and all of them; those of tied positions count as one."""
        out, in_, positions, _ = self.values.shape
        (bo, bi), o = self.options.block, self.options
        blocks = -(-out // bo) * -(-in_ // bi) * (1 if o.tie_kernel else positions)
        return blocks - removed_count(o.sparsity, blocks), blocks

    def norms(self, axis: int) -> Tensor:
        """float64[n], saliency of each channel of an axis."""
        return self.values.double().sum([d for d in range(4) if d != axis])

    def lines(self, axis: int) -> Tensor:
        """float32[n, length], channels of an axis, summed over the groups of the other one."""
        values = self.values.squeeze(3).movedim(axis, 0)[:, self.order[1 - axis]]
        if self.options.tie_kernel:
            values = values.sum(2, keepdim=True)
        return _grouped(values, 1, self.options.block[1 - axis]).flatten(1)

    def price(self, axis: int, lines: Tensor) -> float:
        """What a block must be worth to be kept, floor and balance aside."""
        sums = _grouped(lines[self.order[axis]], 0, self.options.block[axis]).flatten()
        kept, _ = self.kept
        ranked = sums.sort(descending=True).values
        return 0.5 * float(ranked[kept - 1] + ranked[kept])

    def mask(self, order: list[Tensor]) -> Tensor:
        """bool[G, C], blocks to keep under an order of rows and one of columns."""
        o = self.options
        return reorder.block_mask(
            self.values,
            o.block,
            o.sparsity,
            *order,
            balanced=o.balanced,
            allow_empty_rows=o.allow_empty_rows,
            tie_kernel=o.tie_kernel,
        )

    def share(self, order: list[Tensor]) -> float:
        """What these blocks retain of the saliency."""
        out, in_, *kernel = self.values.shape
        sums = Blocking(self.options.block, out, in_, tuple(kernel)).sums(self.values, *order)
        total = float(sums.sum(dtype=torch.float64))
        kept = float(sums[self.mask(order)].sum(dtype=torch.float64))
        return kept / total if total > 0 else 1.0

    def search(
        self, values: Tensor, rows: Tensor | None, cols: Tensor | None, **arguments: Any
    ) -> reorder.SearchResult:
        """Search the axes that are not held, of values in another order perhaps."""
        o = self.options
        return reorder.search(
            values,
            o.block,
            o.sparsity,
            row_perm=rows,
            col_perm=cols,
            balanced=o.balanced,
            allow_empty_rows=o.allow_empty_rows,
            tie_kernel=o.tie_kernel,
            **arguments,
        )


class _Joint:
    """The search for the orders of layers that hang together."""

    def __init__(self, layers: dict[str, _Layer], shared: list[SharedOrder], where: str) -> None:
        first = next(iter(layers.values())).options
        self.layers = layers
        self.method = search_method(where, first.reorder)
        self.arguments = {"method": self.method, "seed": first.seed, "sweeps": first.sweeps}
        self.sweeps, self.seconds = 0, 0.0
        taken = {member for group in shared for member in group.members}
        axes = [(name, axis) for name in layers for axis in (0, 1)]
        #: Axes that move together, or alone.
        self.groups = [
            *(group.members for group in shared),
            *([member] for member in axes if member not in taken),
        ]

    def run(self, report: Callable[[float], None]) -> None:
        """Set the layers' orders to the best found; ``report`` is told the share of work done."""
        begin = time.perf_counter()
        starts = [self._identity()]
        if self.method != "identity":
            starts.append(self._sorted())
        rounds = 0 if self.method in ("identity", "l1_sort") else ROUNDS
        best = -1.0
        result = starts[0]
        for s, start in enumerate(starts):
            total = self._set(start)
            for r in range(rounds):
                before = total
                for g, group in enumerate(self.groups):
                    report((g / len(self.groups) + r + s * rounds) / (rounds * len(starts)))
                    total += self._improve(group, 1.0 / (rounds * len(starts)))
                if total - before <= 1e-5 * len(self.layers):
                    break
            if total > best:
                best, result = total, {n: list(layer.order) for n, layer in self.layers.items()}
        self._set(result)
        self.seconds = time.perf_counter() - begin

    def found(self, name: str, shape: torch.Size) -> tuple[BlockLayout, reorder.SearchResult]:
        """Layout of a layer under its orders, beside what other orders retain."""
        layer = self.layers[name]
        mask = layer.mask(layer.order)
        layout = BlockLayout.from_block_mask(
            mask,
            layer.options.block,
            shape[0],
            shape[1],
            *(order.to(torch.int32) for order in layer.order),
            kernel_size=tuple(shape[2:]) or None,
        )
        search = replace(
            layer.search(layer.values, None, None, method="l1_sort"),
            row_perm=layout.row_perm,
            col_perm=layout.col_perm,
            mask=mask,
            retained=layer.retained,
            method=self.method,
            sweeps=self.sweeps,
            seconds=self.seconds,
        )
        return layout, search

    # -- starts -------------------------------------------------------------------------------

    def _identity(self) -> dict[str, list[Tensor]]:
        return {
            name: [torch.arange(n) for n in layer.values.shape[:2]]
            for name, layer in self.layers.items()
        }

    def _sorted(self) -> dict[str, list[Tensor]]:
        """Heavy channels first, by all members that care."""
        orders = self._identity()
        for group in self.groups:
            norms = [self.layers[name].norms(axis) for name, axis in self._caring(group)]
            if norms:
                order = torch.stack(norms).sum(0).argsort(descending=True, stable=True)
                for name, axis in group:
                    orders[name][axis] = order
        return orders

    def _set(self, orders: Mapping[str, list[Tensor]]) -> float:
        """Take orders over; the sum of what the layers retain."""
        for name, layer in self.layers.items():
            layer.order = list(orders[name])
            layer.retained = layer.share(layer.order)
        return sum(layer.retained for layer in self.layers.values())

    # -- a step -------------------------------------------------------------------------------

    def _caring(self, group: list[Member]) -> list[Member]:
        """Axes of a group whose order makes a difference to what their layer retains."""
        return [(name, axis) for name, axis in group if self.layers[name].options.block[axis] > 1]

    def _improve(self, group: list[Member], share: float) -> float:
        """Search one order, all others held, and take it if it is better; the gain.

        Args:
            group: Axes that have this order.
            share: Of the seconds for the layers, for a round of all groups.
        """
        members = [
            (self.layers[name], axis)
            for name, axis in self._caring(group)
            if 0 < self.layers[name].kept[0] < self.layers[name].kept[1]
        ]
        if not members:
            return 0.0
        budget = sum(layer.seconds for layer, _ in members) * share / 2  # half for each axis
        arguments = {**self.arguments, "start": "identity", "budget": budget}
        layer, axis = members[0]
        order = layer.order[axis]
        if len(group) == 1:
            held: list[Tensor | None] = [*layer.order]
            held[axis] = None
            found = layer.search(layer.values.index_select(axis, order), *held, **arguments)
        else:
            table, block, sparsity = _side_by_side(members)
            found = reorder.search(
                table[order], (block, 1), sparsity, allow_empty_rows=True, **arguments
            )
        self.sweeps = max(self.sweeps, found.sweeps)
        perm = found.row_perm if axis == 0 or len(group) > 1 else found.col_perm
        return 0.0 if perm is None else self._try(group, order[perm.long()])

    def _try(self, group: list[Member], order: Tensor) -> float:
        """Take an order if the members retain more with it; the gain."""
        orders = {name: list(self.layers[name].order) for name, _ in group}
        for name, axis in group:
            orders[name][axis] = order
        now = {name: self.layers[name].share(orders[name]) for name in orders}
        gain = sum(now[name] - self.layers[name].retained for name in orders)
        if gain <= 0.0:
            return 0.0
        for name in orders:
            self.layers[name].order, self.layers[name].retained = orders[name], now[name]
        return gain


def _side_by_side(members: list[tuple[_Layer, int]]) -> tuple[Tensor, int, float]:
    """One matrix of the lines of several layers, its block height, and the share to remove."""
    lines = [layer.lines(axis) for layer, axis in members]
    prices = [layer.price(axis, x) for (layer, axis), x in zip(members, lines, strict=True)]
    block = max(layer.options.block[axis] for layer, axis in members)
    table = torch.cat(
        [x + (max(prices) - p) / block for x, p in zip(lines, prices, strict=True)], dim=1
    )
    blocks = sum(layer.kept[1] for layer, _ in members)
    kept = sum(layer.kept[0] for layer, _ in members)
    return table, block, (blocks - kept + 0.5) / blocks  # floor() finds the count again


def _grouped(values: Tensor, dim: int, block: int) -> Tensor:
    """Sums of groups of a block's size along one dimension; the last one may be ragged."""
    parts = [part.sum(dim) for part in values.split(block, dim)]
    return torch.stack(parts, dim)


def _agree(
    where: str,
    what: str,
    shared: SharedOrder,
    value: Callable[[str, int], int],
    besides: int | None = None,
) -> None:
    """Raise unless all members of a group have one value, or the one that goes with any."""
    found = {member: value(*member) for member in shared.members}
    if len({v for v in found.values() if v != besides}) > 1:
        got = ", ".join(f"{v} {_AXES[axis]} of {name!r}" for (name, axis), v in found.items())
        raise ValueError(f"{where}: axes that share an order must have {what} (got {got})")


def _components(share: Iterable[SharedOrder]) -> dict[tuple[str, ...], list[SharedOrder]]:
    """Groups that hang together through layers, by the names of all these layers."""
    result: dict[tuple[str, ...], list[SharedOrder]] = {}
    for shared in share:
        names = dict.fromkeys(name for name, _ in shared.members)
        touching = [part for part in result if any(name in names for name in part)]
        merged = tuple(dict.fromkeys([*(n for part in touching for n in part), *names]))
        result[merged] = [*(g for part in touching for g in result.pop(part)), shared]
    return result
