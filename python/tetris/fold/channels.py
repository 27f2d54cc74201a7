"""Channels as numbers: which must move together, and which may trade places.

Every channel of every axis of a parameter has a number. Reading a graph says two things of them:

* channels *meet*, as when two layers' outputs are added: then they move together, all or none;
* an operation treats channels alike, or not: a convolution's groups, the heads of an attention.
  Each operation leaves a mark on the channels it sees, the same mark where it makes no difference.

Channels that meet are a class. Two classes may trade places if their members are in the same axes
and carry the same marks; they then form an :class:`Order`. Marks are sums of 64-bit hashes, so that
neither the number of operations nor their sequence matters. They also say with what a channel
meets: classes of the same marks hang together in the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ids = NDArray[np.int64]


class Axis(NamedTuple):
    """An axis of a parameter or buffer along which channels lie.

    Attributes:
        tensor: Its name in the model; of a sparse layer, its ``values``.
        dim: The dimension; of a sparse layer 0 for rows and 1 for columns.
        size: Channels.
        groups: Of a convolution's inputs: ``weight.shape[1]`` counts those of one group, this axis
            has those of all.
    """

    tensor: str
    dim: int
    size: int
    groups: int = 1


class Reason(NamedTuple):
    """Why channels stay where they are.

    Attributes:
        text: Ends a sentence that begins with their name.
        held: Whether their order is given. Otherwise it is unknown what reads them, and each layer
            may as well keep an order of its own and gather.
    """

    text: str
    held: bool = True


class Member(NamedTuple):
    """Where the channels of an order lie in an axis: channel k at ``index[k]``."""

    axis: Axis
    index: Ids


@dataclass(frozen=True)
class Order:
    """Channels that may trade places, and all axes they are in.

    Attributes:
        size: Number of channels.
        members: The axes; an axis that has several features per channel is there several times.
    """

    size: int
    members: tuple[Member, ...]


@dataclass(frozen=True)
class Stay:
    """Channels of an axis that stay where they are.

    Attributes:
        axis: The axis.
        index: The channels.
        reason: Why.
    """

    axis: Axis
    index: Ids
    reason: Reason


ALONE = Reason("no two of its channels are read and written alike")


class Channels:
    """The channels of a model, while its graph is read."""

    def __init__(self) -> None:
        self._axes: list[tuple[Axis | None, int]] = []  # with the number of the first channel
        self._first: dict[Axis, int] = {}
        #: Tensors that stay as a whole, and why.
        self.stuck: dict[str, Reason] = {}
        self._reasons: list[Reason] = [ALONE]
        self._count = 0
        self._marks = np.zeros(0, np.uint64)
        self._why = np.zeros(0, np.int32)  # why a channel stays, 0 if it need not
        self._note = np.zeros(0, np.int32)  # why it may be alone
        self._ties: list[tuple[Ids, Ids]] = []  # what meets, each time two arrays
        self._events = 0

    # -- what an operation says ---------------------------------------------------------------

    def of(self, axis: Axis) -> Ids:
        """The channels of an axis, the same ones each time."""
        if axis not in self._first:
            others = [a for a in self._first if (a.tensor, a.dim) == (axis.tensor, axis.dim)]
            self._first[axis] = self._new(axis, axis.size)
            if others:  # one weight in two convolutions of other groups
                self.freeze_tensor(axis.tensor, Reason("it is read in two ways"))
            elif axis.tensor in self.stuck:
                self.freeze(self._numbers(axis), self.stuck[axis.tensor])
        return self._numbers(axis)

    def constant(self, size: int, reason: Reason) -> Ids:
        """Channels of no parameter, which stay."""
        first = self._new(None, size)
        ids = np.arange(first, first + size)
        self.freeze(ids, reason)
        return ids

    def freeze(self, ids: Ids, reason: Reason) -> None:
        """Channels stay where they are."""
        self._set(self._why, ids, reason)

    def frozen(self, ids: Ids) -> bool:
        """Whether it is known already that all of these stay."""
        return bool((self._why[ids.ravel()] > 0).all())

    def freeze_tensor(self, name: str, reason: Reason) -> None:
        """All axes of a tensor stay as they are."""
        self.stuck.setdefault(name, reason)
        for axis in self._first:
            if axis.tensor == name:
                self.freeze(self._numbers(axis), reason)

    def note(self, ids: Ids, reason: Reason) -> None:
        """What to say of channels that turn out to be alone."""
        self._set(self._note, ids, reason)

    def meet(self, operands: Sequence[Ids], alike: Sequence[NDArray[np.int64]] = ()) -> None:
        """Channels at the same places of several arrays move together.

        Args:
            operands: The arrays, of one shape after broadcasting; of one, nothing is tied.
            alike: Arrays of numbers: places that differ in one of them do not trade places.
        """
        self._events += 1
        shape = np.broadcast_shapes(*(a.shape for a in (*operands, *alike)))
        place = np.zeros(shape, np.uint64)
        for numbers in alike:
            place = _mix(place + np.uint64(0x9E3779B97F4A7C15) ^ numbers.astype(np.uint64))
        whole = [np.broadcast_to(ids, shape).ravel() for ids in operands]
        for role, ids in enumerate(whole):
            event = _mix(np.array([self._events, role], np.uint64))
            np.add.at(self._marks, ids, _mix(place.ravel() ^ event[0]) ^ event[1])
            if role:
                self._ties.append((whole[0], ids))

    # -- what follows ---------------------------------------------------------------------------

    def result(self) -> tuple[list[Order], list[Stay]]:
        """What may be reordered, and what stays."""
        root = self._classes()
        marks = self._refined()
        axis_of = np.zeros(self._count, np.int64)
        for number, (axis, first) in enumerate(self._axes):
            size = 0 if axis is None else axis.size
            axis_of[first : first + size] = number
        # Members of a class, in a sequence that is the same for classes that may trade places.
        by_class = np.lexsort((np.arange(self._count), marks, axis_of, root))
        roots, first, sizes = np.unique(root[by_class], return_index=True, return_counts=True)
        rank = np.arange(self._count) - np.repeat(first, sizes)
        own = _mix(marks[by_class] ^ _mix(axis_of[by_class].astype(np.uint64)))
        own = _mix(own + rank.astype(np.uint64))
        key = np.add.reduceat(own, first) if self._count else own
        why, note = (_first_of(numbers[by_class], first) for numbers in (self._why, self._note))
        orders, reason = [], np.where(why > 0, why, note)
        # Two members of a class in one axis with the same marks, as when channels are added to a
        # shuffle of themselves: nothing tells which of the two is which one of another class.
        doubles = (np.diff(root[by_class]) == 0) & (np.diff(axis_of[by_class]) == 0)
        doubles &= marks[by_class][1:] == marks[by_class][:-1]
        sure = np.ones(len(roots), bool)
        sure[np.searchsorted(roots, root[by_class][1:][doubles])] = False
        free = np.flatnonzero((why == 0) & sure)
        kinds = np.stack([key, sizes.astype(np.uint64)], 1)[free]
        _, kind = np.unique(kinds, axis=0, return_inverse=True)
        alone = why == 0
        for classes in _by_value(kind.ravel()):
            classes = free[classes]
            if len(classes) > 1:
                alone[classes] = False
                members = by_class[first[classes][:, None] + np.arange(int(sizes[classes[0]]))]
                orders.append(self._order(members))
        stay = np.empty(self._count, np.int64)  # reason of each channel, -1 if it may move
        stay[by_class] = np.repeat(np.where(alone | (why > 0), reason, -1), sizes)
        orders.sort(key=lambda o: [self._start(m) for m in o.members])
        return orders, self._stays(stay)

    # -- inside ---------------------------------------------------------------------------------

    def _new(self, axis: Axis | None, size: int) -> int:
        first = self._count
        self._axes.append((axis, first))
        self._count += size
        if self._count > len(self._marks):
            more = max(self._count, 2 * len(self._marks)) - len(self._marks)
            for name in ("_marks", "_why", "_note"):
                old = getattr(self, name)
                setattr(self, name, np.concatenate([old, np.zeros(more, old.dtype)]))
        return first

    def _numbers(self, axis: Axis) -> Ids:
        return np.arange(self._first[axis], self._first[axis] + axis.size)

    def _set(self, target: NDArray[np.int32], ids: Ids, reason: Reason) -> None:
        if reason not in self._reasons:
            self._reasons.append(reason)
        ids = ids.ravel()
        target[ids] = np.where(target[ids] > 0, target[ids], self._reasons.index(reason))

    def _classes(self) -> Ids:
        """The lowest channel that each one moves with."""
        for name in ("_marks", "_why", "_note"):
            setattr(self, name, getattr(self, name)[: self._count])
        root = np.arange(self._count)
        if not self._ties:
            return root
        a, b = (np.concatenate(side) for side in zip(*self._ties, strict=True))
        while True:
            low = np.minimum(root[a], root[b])
            before = root.copy()
            for side in (a, b):
                np.minimum.at(root, before[side], low)
            while not np.array_equal(root, root[root]):
                root = root[root]
            if np.array_equal(root, before):
                return root

    def _refined(self) -> NDArray[np.uint64]:
        """Marks that also say with what a channel meets, and with what that meets, and so on.

        Classes whose members carry the same marks then hang together in the same way. This is
        colour refinement (Weisfeiler and Leman, 1968).
        """
        marks, distinct = self._marks, len(np.unique(self._marks))
        while True:
            finer = _mix(marks)
            for number, (a, b) in enumerate(self._ties):
                event = _mix(np.array([number], np.uint64))
                from_b, from_a = _mix(marks[b] ^ event), _mix(marks[a] + event)
                np.add.at(finer, a, from_b)
                np.add.at(finer, b, from_a)
            before, distinct = distinct, len(np.unique(finer))
            if distinct == before:
                return marks
            marks = finer

    def _order(self, members: Ids) -> Order:
        """An order, from channels [n, members]."""
        found = []
        for ids in members.T:
            axis, first = self._axis(int(ids[0]))
            found.append(Member(axis, ids - first))
        return Order(len(members), tuple(sorted(found, key=self._start)))

    def _axis(self, channel: int) -> tuple[Axis, int]:
        starts = [first for _, first in self._axes]
        axis, first = self._axes[int(np.searchsorted(starts, channel, "right")) - 1]
        assert axis is not None  # constants stay
        return axis, first

    def _start(self, member: Member) -> int:
        return self._first[member.axis] + int(member.index[0])

    def _stays(self, stay: Ids) -> list[Stay]:
        found = []
        for axis, first in self._axes:
            if axis is None:
                continue
            own = stay[first : first + axis.size]
            for number in sorted(set(own[own >= 0].tolist())):
                index = np.flatnonzero(own == number)
                found.append(Stay(axis, index, self._reasons[number]))
        return found


def _mix(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """A hash of 64 bits (splitmix64: Steele, Lea and Flood, OOPSLA 2014)."""
    x = x + np.uint64(0x9E3779B97F4A7C15)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


def _first_of(numbers: NDArray[np.int32], first: Ids) -> NDArray[np.int32]:
    """The lowest number but 0 of each class, 0 if it has none."""
    if not len(numbers):
        return numbers
    top = np.iinfo(np.int32).max
    low = np.minimum.reduceat(np.where(numbers > 0, numbers, top), first)
    return np.where(low == top, 0, low)


def _by_value(values: Ids) -> list[Ids]:
    """Positions of each value, the value that comes first in front."""
    order = np.argsort(values, kind="stable")
    cuts = np.flatnonzero(np.diff(values[order])) + 1
    return sorted(np.split(order, cuts), key=lambda part: part[0]) if len(values) else []
