"""Which channels of which layers are to be kept in one order: what ``share=`` takes.

The search for such orders is in :mod:`tetris.prune.shared`; :func:`tetris.shared_orders` finds them
in a model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from ..checks import describe, kind
from .options import LayerOptions

AXES = ("rows", "columns")


@dataclass(frozen=True)
class Part:
    """Some channels of a layer's rows or columns, which trade places among themselves.

    A part is a head of an attention layer, a group of a convolution, or what a layer reads of one
    of several concatenated values. The others of the axis keep their places, or are in a part of
    another order.

    Attributes:
        layer: Name of the layer.
        index: The channels, in the order in which they meet those of other layers: best a range.

    Example:
        >>> heads = [range(i, i + 64) for i in range(0, 768, 64)]
        >>> share = [SharedOrder(rows=Part("value", h), cols=Part("output", h)) for h in heads]
    """

    layer: str
    index: Sequence[int]

    def __post_init__(self) -> None:
        where = "tetris.prune.Part"
        if not isinstance(self.layer, str):
            raise TypeError(f"{where}: layer must be a name (got {describe(self.layer)})")
        if isinstance(self.index, str) or not isinstance(self.index, Iterable):
            raise TypeError(
                f"{where}: index must be channels, such as range(0, 64) (got {self.index!r})"
            )
        try:
            index = _as_range([int(i) for i in self.index])
        except (TypeError, ValueError) as error:
            raise TypeError(f"{where}: index must be ints (got {describe(self.index)})") from error
        if not index or min(index) < 0 or len(set(index)) < len(index):
            raise ValueError(
                f"{where}: index must be distinct channels, counted from 0, and not empty "
                f"(got {describe(self.index)})"
            )
        object.__setattr__(self, "index", index)

    def __str__(self) -> str:
        index = self.index
        if isinstance(index, range) and index.step == 1:
            return f"{self.layer}[{index.start}:{index.stop}]"
        text = f"{index.start}:{index.stop}:{index.step}" if isinstance(index, range) else "..."
        return f"{self.layer}[{text}]"


class Member(NamedTuple):
    """An axis of a layer, or a part of it, that has a shared order.

    Attributes:
        layer: Its name.
        axis: 0 for rows, 1 for columns.
        index: The channels, None for all.
    """

    layer: str
    axis: int
    index: Sequence[int] | None


@dataclass(frozen=True)
class SharedOrder:
    """Channels that several layers write or read, to be kept in one order by all of them.

    Rows are outputs, also of transposed convolutions, columns inputs. What adds up needs one order:
    in a residual network the rows of all layers that write to a stream and the columns of those
    that read it. A layer may be among both. :func:`tetris.shared_orders` finds them.

    Along such channels permutations cancel: bias and norms put into the order, none is left to
    apply, which is what :func:`tetris.fold` does. The CPU kernels gather through any order at no
    more cost, so there it buys nothing yet and costs some saliency; it is for contiguous loads.

    Attributes:
        rows: Names of layers whose outputs these channels are, or a :class:`Part` of a layer.
        cols: Names of layers whose inputs they are, or parts.
        fixed: The channels stay in the order they have.

    Example:
        >>> stream = tetris.prune.SharedOrder(rows=("stem", "conv2"), cols=("conv1", "head"))
        >>> inner = tetris.prune.SharedOrder(rows="conv1", cols="conv2")
        >>> sparse = tetris.sparsify(model, block=(8, 8), share=(stream, inner))
        >>> sparse.stem.row_perm.equal(sparse.head.col_perm)
        True
    """

    rows: tuple[str | Part, ...] = ()
    cols: tuple[str | Part, ...] = ()
    fixed: bool = False

    def __post_init__(self) -> None:
        for axis in ("rows", "cols"):
            given = getattr(self, axis)
            names = (given,) if isinstance(given, (str, Part)) else given
            names = tuple(names) if isinstance(names, Iterable) else (names,)
            if not all(isinstance(name, (str, Part)) for name in names):
                raise TypeError(
                    f"tetris.prune.SharedOrder: {axis} must be names of layers, as in "
                    f"model.named_modules(), or tetris.prune.Part (got {describe(given)})"
                )
            object.__setattr__(self, axis, names)
        members = self.members
        if not members or (len(members) == 1 and not self.fixed and members[0].index is None):
            raise ValueError(
                "tetris.prune.SharedOrder: an order is shared by two axes at least "
                f"(got rows={self.rows}, cols={self.cols})"
            )

    @property
    def members(self) -> list[Member]:
        """Layers and axes, 0 for rows and 1 for columns."""
        return [
            Member(m, axis, None) if isinstance(m, str) else Member(m.layer, axis, m.index)
            for axis, members in enumerate((self.rows, self.cols))
            for m in members
        ]

    def among(self, layers: Iterable[str]) -> SharedOrder | None:
        """What of it concerns these layers; None if they are as free without it."""
        known = set(layers)
        rows, cols = (
            tuple(m for m in members if (m if isinstance(m, str) else m.layer) in known)
            for members in (self.rows, self.cols)
        )
        alone = len(rows + cols) == 1 and not self.fixed and isinstance((rows + cols)[0], str)
        return None if alone or not rows + cols else SharedOrder(rows, cols, self.fixed)

    def __str__(self) -> str:
        text = f"rows of {_listed(self.rows)}" if self.rows else ""
        text += " = " if self.rows and self.cols else ""
        text += f"columns of {_listed(self.cols)}" if self.cols else ""
        return f"{text} (as they are)" if self.fixed else text


@dataclass(frozen=True)
class SharedOrders:
    """The orders of a model, as :func:`tetris.shared_orders` finds them; iterate, or ``print``.

    As ``share=`` it may name more layers than are pruned: the others take any order.

    Attributes:
        orders: What has one order each; those that are ``fixed`` stay as they are.
        held: (layer, ``"rows"`` or ``"columns"``) -> why these, or some of them, are fixed.
        free: The same -> why nothing is known of these: each keeps an order of its own, and with
            it a permutation at run time.

    Example:
        >>> orders = tetris.shared_orders(model, images)
        >>> print(orders)
        >>> sparse = tetris.sparsify(model, sparsity=0.9, block=(8, 8), share=orders)
    """

    orders: tuple[SharedOrder, ...] = ()
    held: Mapping[tuple[str, str], str] = field(default_factory=dict)
    free: Mapping[tuple[str, str], str] = field(default_factory=dict)

    def __iter__(self) -> Iterator[SharedOrder]:
        return iter(self.orders)

    def __len__(self) -> int:
        return len(self.orders)

    def among(self, layers: Iterable[str]) -> SharedOrders:
        """What concerns these layers."""
        known = set(layers)
        own = (order.among(known) for order in self.orders)
        return SharedOrders(
            tuple(order for order in own if order is not None),
            {key: why for key, why in self.held.items() if key[0] in known},
            {key: why for key, why in self.free.items() if key[0] in known},
        )

    def __str__(self) -> str:
        lines = [str(order) for order in self.orders if not order.fixed]
        lines += [f"held: {axis} of {name}: {why}" for (name, axis), why in self.held.items()]
        lines += [f"own order: {axis} of {name}: {why}" for (name, axis), why in self.free.items()]
        return "\n".join(lines) or "no layer shares an order with another one"


Share = SharedOrder | SharedOrders | Iterable[SharedOrder]


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
        shapes: name -> (out, in / groups, ...) of all layers.
        options: name -> settings.
        groups: name -> groups of a convolution, 1 of a linear layer.

    Raises:
        TypeError: something else than :class:`SharedOrder`.
        ValueError: a name of no pruned layer, a channel in two groups, axes of different sizes or
            blocks, channels of several groups of a convolution, settings of the search that differ.
    """
    if isinstance(share, SharedOrders):
        share = share.among(shapes)
    several = (share,) if isinstance(share, SharedOrder) else share
    if isinstance(several, (str, Mapping)) or not isinstance(several, Iterable):
        raise TypeError(f"{where}: share must be SharedOrder objects (got {kind(several)})")
    several = tuple(several)
    seen: dict[tuple[str, int], set[int]] = {}
    for shared in several:
        if not isinstance(shared, SharedOrder):
            raise TypeError(
                f"{where}: share must be one or several tetris.prune.SharedOrder(rows=..., "
                f"cols=...) (got {describe(shared)})"
            )
        for member in shared.members:
            index = _check_member(where, member, shapes, groups, shared.fixed)
            taken = seen.setdefault((member.layer, member.axis), set())
            if not taken.isdisjoint(index):
                raise ValueError(
                    f"{where}: share has the {AXES[member.axis]} of {member.layer!r} twice; put "
                    "everything that needs one order into one SharedOrder"
                )
            taken.update(index)
        if not shared.fixed:
            _agree(where, "sizes", shared, lambda m: len(_index(m, shapes, groups)))
            _agree(
                where,
                "blocks of one size (or 1)",
                shared,
                lambda m: options[m.layer].block[m.axis],
                besides=1,
            )
    for part in components(several):
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


def components(share: Iterable[SharedOrder]) -> dict[tuple[str, ...], list[SharedOrder]]:
    """Groups that hang together through layers, by the names of all these layers."""
    result: dict[tuple[str, ...], list[SharedOrder]] = {}
    for shared in share:
        names = dict.fromkeys(member.layer for member in shared.members)
        touching = [part for part in result if any(name in names for name in part)]
        merged = tuple(dict.fromkeys([*(n for part in touching for n in part), *names]))
        result[merged] = [*(g for part in touching for g in result.pop(part)), shared]
    return result


def _check_member(
    where: str,
    member: Member,
    shapes: Mapping[str, Sequence[int]],
    groups: Mapping[str, int],
    fixed: bool,
) -> Sequence[int]:
    """The channels of a member that has some, and one group's only; or raise."""
    name, axis, index = member
    if name not in shapes:
        raise ValueError(
            f"{where}: share names {name!r}, which is not a layer that is pruned "
            f"(pruned: {', '.join(shapes)})"
        )
    size = _size(member, shapes, groups)
    own = range(size) if index is None else index
    if max(own) >= size:
        raise ValueError(
            f"{where}: share has {AXES[axis][:-1]} {max(own)} of {name!r}, which has {size}"
        )
    group = size // groups[name]
    if not fixed and min(own) // group != max(own) // group:
        raise ValueError(
            f"{where}: layer {name!r} has {groups[name]} groups, whose channels keep to "
            "themselves; leave it out of share, or name the channels of a group, as in "
            f"tetris.prune.Part({name!r}, range({group}))"
        )
    return own


def _size(member: Member, shapes: Mapping[str, Sequence[int]], groups: Mapping[str, int]) -> int:
    size = shapes[member.layer][member.axis]
    return size * groups[member.layer] if member.axis else size


def _index(
    member: Member, shapes: Mapping[str, Sequence[int]], groups: Mapping[str, int]
) -> Sequence[int]:
    return range(_size(member, shapes, groups)) if member.index is None else member.index


def _agree(
    where: str,
    what: str,
    shared: SharedOrder,
    value: Callable[[Member], int],
    besides: int | None = None,
) -> None:
    """Raise unless all members of a group have one value, or the one that goes with any."""
    found = [(value(member), member) for member in shared.members]
    if len({v for v, _ in found if v != besides}) > 1:
        got = ", ".join(f"{v} {AXES[m.axis]} of {m.layer!r}" for v, m in found)
        raise ValueError(f"{where}: axes that share an order must have {what} (got {got})")


def _as_range(index: Sequence[int]) -> Sequence[int]:
    """The same numbers as a range where they are one, else as a tuple."""
    step = index[1] - index[0] if len(index) > 1 else 1
    if step > 0 and index:
        found = range(index[0], index[-1] + 1, step)
        if list(found) == list(index):
            return found
    return tuple(index)


def _listed(members: Sequence[str | Part]) -> str:
    return ", ".join(map(str, members))
