"""Whether two models compute the same."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .apply import Perms, apply
from .capture import Inputs, evaluating, run
from .channels import Order

TOLERANCE = 1e-5


def difference(a: Any, b: Any) -> float:
    """The largest difference between two results, relative to the largest number if that is > 1."""
    worst = 0.0
    for x, y in zip(pytree.tree_leaves(a), pytree.tree_leaves(b), strict=True):
        if not isinstance(x, Tensor):
            continue
        if x.shape != y.shape or not x.is_floating_point():
            worst = max(worst, 0.0 if torch.equal(x, y) else float("inf"))
        elif x.numel():
            same = (x == y) | (x.isnan() & y.isnan())
            off = torch.where(same, 0.0, (x.double() - y.double()).abs())
            size = max(1.0, float(x[x.isfinite()].abs().max()) if x.isfinite().any() else 1.0)
            worst = max(worst, float(off.nan_to_num(float("inf"), float("inf")).max()) / size)
    return worst


def compare(where: str, model: nn.Module, changed: nn.Module, inputs: Inputs) -> float:
    """How far a changed model is from the model, at most.

    Sums in another sequence differ in their last bits, which a deep network may enlarge. What is
    beyond the tolerance is therefore computed in double precision, where that is possible.
    """
    with evaluating(model), evaluating(changed):
        off = difference(run(where, model, inputs), run(where, changed, inputs))
        if off <= TOLERANCE:
            return off
        exact = pytree.tree_map(_double, inputs)
        pair = (copy.deepcopy(m).double() for m in (model, changed))
        try:
            return min(off, difference(*(run(where, m, exact) for m in pair)))
        except ValueError:  # it casts to a type of its own
            return off


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
    where: str, model: nn.Module, orders: Sequence[Order], perms: Perms, inputs: Inputs
) -> Checked:
    """A copy of the model in other orders, without those under which it computes something else.

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
