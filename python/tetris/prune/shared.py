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
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import reorder
from ..blocking import Blocking, removed_count
from ..layout import BlockLayout
from ..layout_search import by_group, concatenate, search_method
from .options import LayerOptions
from .orders import Member, Share, SharedOrder, check_share, components

#: Times that every order is searched, from each start. Two more found at most 0.1 % more, in three
#: layers of lognormal scales with blocks of 4 to 16.
ROUNDS = 3

Unit = tuple[str, int]  # a layer's name and one of its groups, which is searched like a layer


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
    difference to what they retain. What is left of an axis that is partly shared keeps its place;
    groups of a convolution have orders of their own, and count by what they hold. Floor and
    ``balanced`` are heeded in what is kept, and in the search for axes that are not shared, but not
    in that for shared ones.

    Args:
        where: Function named in messages.
        saliency: name -> [out, in] or [out, in / groups, *kernel], of all layers.
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
    for part, shared in components(check_share(where, share, shapes, options, groups)).items():
        layers = {n: _SharedLayer.of(where, saliency[n], options[n], groups[n]) for n in part}
        joint = _Joint(layers, shared, where)
        with reorder.progress_bar(progress) as report:
            joint.run(report or (lambda done: None))
        result.update({name: joint.found(name) for name in part})
    return result


@dataclass
class _Layer:
    """One layer of a joint search, or one group of a convolution.

    Attributes:
        values: float32[out, in, positions, 1], saliency divided by its layer's sum.
        options: Settings.
        mass: What it holds of its layer's saliency: 1 unless the layer has groups.
        order: Row and column orders, int64[out] and int64[in].
        retained: Share of the saliency that is kept under them.
    """

    values: Tensor
    options: LayerOptions
    mass: float = 1.0
    order: list[Tensor] = field(default_factory=list)
    retained: float = 0.0

    @classmethod
    def of(cls, saliency: Tensor, options: LayerOptions, total: float) -> _Layer:
        """A layer, or a group of one, from its saliency [out, in, *kernel] and the layer's sum."""
        values = (saliency.double() / total).float() if total > 0 else saliency
        mass = float(saliency.sum(dtype=torch.float64)) / total if total > 0 else 1.0
        return cls(values.reshape(*saliency.shape[:2], -1, 1), options, mass)

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


@dataclass
class _SharedLayer:
    """A layer as the joint search has it: group by group.

    Attributes:
        saliency: [out, in / groups, *kernel].
        blocking: Its sizes.
        units: One per group.
    """

    saliency: Tensor
    blocking: Blocking
    units: list[_Layer]

    @classmethod
    def of(cls, where: str, saliency: Tensor, options: LayerOptions, groups: int) -> _SharedLayer:
        """A layer from its saliency."""
        blocking = Blocking.of(where, "saliency", saliency, options.block, groups)
        budget = None if options.budget is None else options.budget / groups
        total = float(saliency.sum(dtype=torch.float64))
        units = [
            _Layer.of(part, replace(options, sparsity=own, budget=budget), total)
            for part, own in by_group(saliency, blocking, options.sparsity, options.tie_kernel)
        ]
        return cls(saliency, blocking, units)

    def located(self, member: Member) -> tuple[int, Tensor | None]:
        """The group that a member's channels are in, and which they are there; None for all."""
        if member.index is None:
            return 0, None
        size = self.blocking.group_shape[member.axis]
        index = torch.tensor(list(member.index))
        return int(index[0]) // size, index % size


class _Axis(NamedTuple):
    """Channels of one layer (or group of a convolution) that move together with others.

    Attributes:
        unit: Layer and group.
        axis: 0 for rows, 1 for columns.
        index: int64[n], the channels, in the order in which they meet the others'; None for all.
    """

    unit: Unit
    axis: int
    index: Tensor | None


class _Joint:
    """The search for the orders of layers that hang together."""

    def __init__(
        self, layers: dict[str, _SharedLayer], shared: list[SharedOrder], where: str
    ) -> None:
        first = next(iter(layers.values())).units[0].options
        self.layers = layers
        self.units = {
            (n, g): unit for n, each in layers.items() for g, unit in enumerate(each.units)
        }
        self.method = search_method(where, first.reorder)
        self.arguments = {"method": self.method, "seed": first.seed, "sweeps": first.sweeps}
        self.sweeps, self.seconds = 0, 0.0
        #: Axes, or parts of them, that move together, or alone. What is left of an axis that is
        #: partly in one stays in place.
        self.groups: list[list[_Axis]] = []
        taken: set[tuple[Unit, int]] = set()
        for order in shared:
            group = []
            for member in order.members:
                g, index = layers[member.layer].located(member)
                group.append(_Axis((member.layer, g), member.axis, index))
                every = range(len(layers[member.layer].units)) if member.index is None else [g]
                taken.update(((member.layer, h), member.axis) for h in every)
            if not order.fixed:
                self.groups.append(group)
        axes = [(unit, axis) for unit in self.units for axis in (0, 1)]
        self.groups += [[_Axis(*axis, None)] for axis in axes if axis not in taken]

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
                best, result = total, {n: list(unit.order) for n, unit in self.units.items()}
        self._set(result)
        self.seconds = time.perf_counter() - begin

    def found(self, name: str) -> tuple[BlockLayout, reorder.SearchResult]:
        """Layout of a layer under its orders, beside what other orders retain."""
        layer = self.layers[name]
        parts = [self._found(unit) for unit in layer.units]
        whole = parts[0]
        if len(parts) > 1:
            whole = replace(
                concatenate(parts, layer.saliency, layer.blocking),
                sweeps=self.sweeps,
                seconds=self.seconds,
            )
        sizes = layer.blocking
        layout = BlockLayout.from_block_mask(
            whole.mask,
            sizes.block,
            sizes.out_features,
            sizes.in_features,
            whole.row_perm,
            whole.col_perm,
            kernel_size=sizes.kernel_size,
            groups=sizes.groups,
        )
        return layout, replace(whole, row_perm=layout.row_perm, col_perm=layout.col_perm)

    def _found(self, layer: _Layer) -> reorder.SearchResult:
        rows, cols = (order.to(torch.int32) for order in layer.order)
        return replace(
            layer.search(layer.values, None, None, method="l1_sort"),
            row_perm=rows,
            col_perm=cols,
            mask=layer.mask(layer.order),
            retained=layer.retained,
            method=self.method,
            sweeps=self.sweeps,
            seconds=self.seconds,
        )

    # -- starts -------------------------------------------------------------------------------

    def _identity(self) -> dict[Unit, list[Tensor]]:
        return {
            name: [torch.arange(n) for n in unit.values.shape[:2]]
            for name, unit in self.units.items()
        }

    def _sorted(self) -> dict[Unit, list[Tensor]]:
        """Heavy channels first, by all members that care."""
        orders = self._identity()
        for group in self.groups:
            norms = [_part(self.units[m.unit].norms(m.axis), m.index) for m in self._caring(group)]
            if norms:
                order = torch.stack(norms).sum(0).argsort(descending=True, stable=True)
                for m in group:
                    orders[m.unit][m.axis] = _placed(orders[m.unit][m.axis], m.index, order)
        return orders

    def _set(self, orders: Mapping[Unit, list[Tensor]]) -> float:
        """Take orders over; the sum of what the layers retain."""
        for name, unit in self.units.items():
            unit.order = list(orders[name])
            unit.retained = unit.share(unit.order)
        return sum(unit.mass * unit.retained for unit in self.units.values())

    # -- a step -------------------------------------------------------------------------------

    def _caring(self, group: list[_Axis]) -> list[_Axis]:
        """Members of a group whose order makes a difference to what their layer retains.

        Of channels that lie apart, as those of flattened maps, nothing is said: their blocks hold
        other channels too. Such members take the order that is found, if it loses nothing.
        """
        return [
            m
            for m in group
            if (m.index is None or _consecutive(m.index))
            and 1 < self.units[m.unit].options.block[m.axis]
            and (m.index is None or self.units[m.unit].options.block[m.axis] < len(m.index))
        ]

    def _improve(self, group: list[_Axis], share: float) -> float:
        """Search one order, all others held, and take it if it is better; the gain.

        Args:
            group: Members that have this order.
            share: Of the seconds for the layers, for a round of all groups.
        """
        members = []
        for m in self._caring(group):
            kept, blocks = self.units[m.unit].kept
            if 0 < kept < blocks:
                members.append((self.units[m.unit], m.axis, m.index))
        if not members:
            return 0.0
        budget = sum(
            layer.seconds * (1.0 if index is None else len(index) / layer.values.shape[axis])
            for layer, axis, index in members
        )
        budget *= share / 2  # half for each axis
        arguments = {**self.arguments, "start": "identity"}
        if arguments["sweeps"] is None:
            arguments["budget"] = budget
        layer, axis, index = members[0]
        order = _order_of(layer.order[axis], index)
        if len(group) == 1 and index is None:
            held: list[Tensor | None] = [*layer.order]
            held[axis] = None
            found = layer.search(layer.values.index_select(axis, order), *held, **arguments)
            perm = found.col_perm if axis else found.row_perm
        else:
            table, block, (kept, blocks) = _side_by_side(members)
            if not 0 < kept < blocks:  # parts that keep all or nothing gain by no order
                return 0.0
            sparsity = (blocks - kept + 0.5) / blocks  # floor() finds the count again
            found = reorder.search(
                table[order], (block, 1), sparsity, allow_empty_rows=True, **arguments
            )
            perm = found.row_perm
        self.sweeps = max(self.sweeps, found.sweeps)
        return 0.0 if perm is None else self._try(group, order[perm.long()])

    def _try(self, group: list[_Axis], order: Tensor) -> float:
        """Take an order if the members retain more with it; the gain."""
        orders = {m.unit: list(self.units[m.unit].order) for m in group}
        for m in group:
            orders[m.unit][m.axis] = _placed(orders[m.unit][m.axis], m.index, order)
        now = {name: self.units[name].share(orders[name]) for name in orders}
        gain = sum(self.units[n].mass * (now[n] - self.units[n].retained) for n in orders)
        if gain <= 0.0:
            return 0.0
        for name in orders:
            self.units[name].order, self.units[name].retained = orders[name], now[name]
        return gain


def _side_by_side(
    members: list[tuple[_Layer, int, Tensor | None]],
) -> tuple[Tensor, int, tuple[int, int]]:
    """One matrix of the lines of several layers, its block height, blocks to keep and of all."""
    block = max(layer.options.block[axis] for layer, axis, _ in members)
    tables, prices, kept, blocks = [], [], 0, 0
    for layer, axis, index in members:
        lines = layer.lines(axis)
        price = layer.price(axis, lines)
        own = layer.kept
        lines = _part(lines, index)
        if index is not None:  # of the layer's blocks, those that lie in this part
            sums = _grouped(lines[_order_of(layer.order[axis], index)], 0, block)
            own = int((sums > price).sum()), sums.numel()
        tables.append(lines)
        prices.append(price)
        kept, blocks = kept + own[0], blocks + own[1]
    top = max(prices)
    table = torch.cat([x + (top - p) / block for x, p in zip(tables, prices, strict=True)], dim=1)
    return table, block, (kept, blocks)


def _grouped(values: Tensor, dim: int, block: int) -> Tensor:
    """Sums of groups of a block's size along one dimension; the last one may be ragged."""
    parts = [part.sum(dim) for part in values.split(block, dim)]
    return torch.stack(parts, dim)


# -- parts of an axis -----------------------------------------------------------------------------


def _part(values: Tensor, index: Tensor | None) -> Tensor:
    return values if index is None else values[index]


def _placed(whole: Tensor, index: Tensor | None, order: Tensor) -> Tensor:
    """The order of an axis, with that of a part put in."""
    if index is None:
        return order
    whole = whole.clone()
    whole[index] = index[order]
    return whole


def _order_of(whole: Tensor, index: Tensor | None) -> Tensor:
    """The order of a part, in its own numbers: the inverse of :func:`_placed`."""
    if index is None:
        return whole
    number = torch.empty_like(whole)
    number[index] = torch.arange(len(index))
    return number[whole[index]]


def _consecutive(index: Tensor) -> bool:
    return bool((index.diff() == 1).all())
