"""Whether two models compute the same."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..checks import describe
from ..progress import Advance, silent
from .apply import Perms, apply
from .capture import Inputs, run, twin
from .channels import Order

TOLERANCE = 1e-5
_LEAST = 1e-8  # numbers below are taken for rounding errors of nothing


def difference(a: Any, b: Any, least: float = _LEAST) -> float:
    """The largest difference between two results, relative to the largest number of a tensor.

    Args:
        a: A result: tensors and numbers in whatever holds them.
        b: Another one.
        least: What the largest number of a tensor is taken to be at least.
    """
    pairs = list(zip_longest(_numbers(a), _numbers(b)))
    return max((_distance(x, y, least) for x, y in pairs), default=0.0)


def _distance(x: Tensor | None, y: Tensor | None, least: float) -> float:
    if x is None or y is None or x.shape != y.shape or x.dtype != y.dtype:
        return float("inf")
    if not (x.is_floating_point() or x.is_complex()):
        return 0.0 if torch.equal(x, y) else float("inf")
    if not x.numel():
        return 0.0
    same = (x == y) | (x.isnan() & y.isnan())
    wide = torch.complex128 if x.is_complex() else torch.float64
    off = torch.where(same, 0.0, (x.to(wide) - y.to(wide)).abs())
    finite = x[x.isfinite()]
    size = max(least, float(finite.abs().max())) if finite.numel() else 1.0
    return float(off.nan_to_num(float("inf"), float("inf")).max()) / size


def _numbers(value: Any, seen: tuple[int, ...] = ()) -> Iterator[Tensor]:
    """The tensors and numbers in a result, those in attributes of objects included."""
    for leaf in pytree.tree_leaves(value):
        if isinstance(leaf, Tensor):
            yield leaf
        elif isinstance(leaf, (bool, int, float, complex, np.ndarray, np.generic)):
            yield torch.as_tensor(leaf, dtype=torch.float64 if isinstance(leaf, float) else None)
        elif not isinstance(leaf, (type, nn.Module)) and id(leaf) not in seen:
            names = [*getattr(leaf, "__dict__", ()), *getattr(leaf, "__slots__", ())]
            held = [getattr(leaf, name, None) for name in names]
            yield from _numbers(held, (*seen, id(leaf)))


def compare(where: str, model: nn.Module, changed: nn.Module, inputs: Inputs) -> float:
    """How far a changed model is from the model, at most.

    Sums in another sequence differ in their last bits, which a deep network may enlarge, and small
    results show. What is beyond the tolerance is therefore computed in double precision, where that
    is possible.

    Raises:
        ValueError: the model cannot be called with these inputs, or returns nothing to compare.
    """
    expected = run(where, twin(where, model), inputs)
    if not any(True for _ in _numbers(expected)):
        raise ValueError(
            f"{where}: {type(model).__name__} must return tensors or numbers, by which to see that "
            f"it still computes the same (got {describe(expected)})"
        )
    found = run(where, twin(where, changed), inputs)
    off = difference(expected, found)
    if off <= TOLERANCE:
        return off
    exact = pytree.tree_map(_double, inputs)
    pair = (copy.deepcopy(twin(where, m)).double() for m in (model, changed))
    try:
        return min(off, difference(*(run(where, m, exact) for m in pair)))
    except ValueError:  # it casts to a type of its own
        return difference(expected, found, 1.0)


class Checked(NamedTuple):
    """A model in other orders.

    Attributes:
        model: A copy.
        perms: The permutations it was put into.
        difference: How far its results are from those of the model.
        failed: By the number of the order, what difference those made that were left out.
    """

    model: nn.Module
    perms: Perms
    difference: float
    failed: dict[int, float]


def checked(
    where: str,
    model: nn.Module,
    orders: Sequence[Order],
    perms: Perms,
    inputs: Inputs,
    advance: Advance = silent,
) -> Checked:
    """A copy of the model in other orders, without those under which it computes something else.

    Args:
        where: Function named in messages.
        model: The model.
        orders: Its orders.
        perms: The permutation of each, None to leave it.
        inputs: What the model is called with.
        advance: Told what comes now, if each order must be tried alone.

    Raises:
        RuntimeError: the model does not compute the same twice, or no order alone explains a
            difference.
    """
    changed = _applied(model, orders, perms)
    if (off := compare(where, model, changed, inputs)) <= TOLERANCE:
        return Checked(changed, perms, off, {})
    again = compare(where, model, model, inputs)
    if again > TOLERANCE:
        raise RuntimeError(
            f"{where}: {type(model).__name__} does not return the same twice for example_inputs "
            f"(a difference of {again:.1e}), so nothing tells whether folding changes it"
        )
    alone: dict[int, float] = {}
    for number, perm in enumerate(perms):
        if perm is not None:
            advance(0, now=f"comparing order {number + 1} of {len(perms)} alone")
            one: Perms = [perm if n == number else None for n in range(len(perms))]
            own = compare(where, model, _applied(model, orders, one), inputs)
            if own > TOLERANCE:
                alone[number] = own
    perms = [None if n in alone else perm for n, perm in enumerate(perms)]
    changed = _applied(model, orders, perms)
    rest = compare(where, model, changed, inputs)
    if not alone or rest > TOLERANCE:
        raise RuntimeError(
            f"{where}: the reordered {type(model).__name__} differs by {off:.1e} on "
            "example_inputs, and no order alone explains it"
        )
    return Checked(changed, perms, rest, alone)


def _applied(model: nn.Module, orders: Sequence[Order], perms: Perms) -> nn.Module:
    changed = copy.deepcopy(model)
    apply(changed, orders, perms)
    return changed


def _double(value: Any) -> Any:
    floating = isinstance(value, Tensor) and value.is_floating_point()
    return value.double() if floating else value
