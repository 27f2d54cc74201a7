"""What a value of the graph is made of: which channel each of its elements belongs to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from .channels import Ids, Reason

Shape = tuple[int, ...]


@dataclass(frozen=True)
class Plain:
    """A value that stays the same when channels are reordered: an input, a mask, a score.

    Attributes:
        shape: Its shape.
        origin: Why its order is given, and where it comes from.
    """

    shape: Shape
    origin: Reason


@dataclass(frozen=True)
class Stored:
    """A parameter or buffer as it is, perhaps with axes exchanged or a part of it.

    Attributes:
        shape: Its shape.
        tensor: Its name in the model.
        dims: For each axis of the value the dimension of the tensor it is, and the positions along
            it; None where it has size one or is repeated.
        whole: Shape of the tensor.
    """

    shape: Shape
    tensor: str
    dims: tuple[tuple[int, Ids] | None, ...]
    whole: Shape


@dataclass(frozen=True)
class Labelled:
    """A value whose elements move with channels.

    Attributes:
        shape: Its shape.
        ids: The channel of each element, of size 1 along axes that make no difference.
        places: Shaped like ``ids``: tells the elements of one channel apart, the same number for
            elements of different channels that trade places.
    """

    shape: Shape
    ids: Ids
    places: Ids

    @classmethod
    def along(cls, shape: Shape, dim: int, ids: Ids) -> Labelled:
        """A value whose channels lie along one axis."""
        label = [1] * len(shape)
        label[dim] = len(ids)
        return cls(shape, ids.reshape(label), np.zeros(label, np.int64))

    @property
    def dims(self) -> list[int]:
        """Axes along which channels lie."""
        return [d for d, n in enumerate(self.ids.shape) if n > 1]

    def padded(self, rank: int) -> Labelled:
        """The same with axes of size one in front."""
        more = (1,) * (rank - len(self.shape))
        return Labelled(
            more + self.shape,
            self.ids.reshape(more + self.ids.shape),
            self.places.reshape(more + self.ids.shape),
        )

    def sized(self, shape: Shape) -> Labelled:
        """The same channels in a value of other size along axes that make no difference."""
        return Labelled(shape, self.ids, self.places)

    def expanded(self, dims: Sequence[int], new_places: Sequence[int]) -> Labelled:
        """Elements along more axes told apart.

        Args:
            dims: Axes.
            new_places: A large number for each, which no other axis has.
        """
        shape = list(self.ids.shape)
        places = self.places
        for dim, step in zip(dims, new_places, strict=True):
            if shape[dim] == 1:
                shape[dim] = self.shape[dim]
                places = places + _along(len(shape), dim, self.shape[dim]) * np.int64(step)
        return Labelled(
            self.shape,
            np.ascontiguousarray(np.broadcast_to(self.ids, shape)),
            np.ascontiguousarray(np.broadcast_to(places, shape)),
        )

    def compressed(self) -> Labelled:
        """The same without telling elements apart along axes that hold one channel each."""
        ids, places = self.ids, self.places
        for dim in self.dims:
            one = [slice(None)] * ids.ndim
            one[dim] = slice(0, 1)
            step = places - places[tuple(one)]
            rest = tuple(d for d in range(ids.ndim) if d != dim)
            if (ids == ids[tuple(one)]).all() and (
                step
                == step[tuple(slice(0, 1) if d in rest else slice(None) for d in range(ids.ndim))]
            ).all():
                ids, places = ids[tuple(one)], places[tuple(one)]
        return Labelled(self.shape, ids, places)


Value = Plain | Stored | Labelled


def coordinates(shape: Sequence[int], dims: Sequence[int]) -> list[NDArray[np.int64]]:
    """Positions along some axes, one array for each that broadcasts."""
    return [_along(len(shape), d, shape[d]) for d in dims]


def common_groups(old: Shape, new: Shape) -> list[tuple[list[int], list[int]]]:
    """Axes of two shapes of one size that hold the same elements, in the finest groups.

    ``(6, 4, 5) -> (2, 3, 20)`` gives ``[([0], [0, 1]), ([1, 2], [2])]``.
    """
    groups: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) and j < len(new):
        a, b, p, q = [i], [j], old[i], new[j]
        i, j = i + 1, j + 1
        while p != q:
            if p < q:
                p *= old[i]
                a.append(i)
                i += 1
            else:
                q *= new[j]
                b.append(j)
                j += 1
        groups.append((a, b))
    if i < len(old) or j < len(new):  # axes of size one are left
        groups.append((list(range(i, len(old))), list(range(j, len(new)))))
    return groups


def _along(rank: int, dim: int, size: int) -> NDArray[np.int64]:
    shape = [1] * rank
    shape[dim] = size
    return np.arange(size).reshape(shape)
