"""What data and counts must be, said once for samplers, fits and predictives."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from numbers import Real
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ..checks import check_tensor, describe, is_int

if TYPE_CHECKING:
    from .network import BayesianMLP
    from .weights import Task


def check_data(
    where: str, network: BayesianMLP, x: Tensor, y: Tensor, *, sets: bool = False
) -> None:
    """Raise unless x [N, in] and y [N] go with a network; of several data sets, one more in front.

    Raises:
        TypeError: x or y is no tensor.
        ValueError: shapes, classes, numbers that are not finite, or a number of points other than
            the network's.
    """
    x, y = check_tensor(where, "x", x), check_tensor(where, "y", y)
    out, in_ = network.sizes[-1], network.sizes[0]
    front = ["data sets"] if sets else []
    if x.dim() != 2 + sets or x.shape[-1] != in_:
        hint = "; x[None] and y[None] are one data set" if sets and x.dim() == 2 else ""
        raise ValueError(
            f"{where}: x must be {_shape([*front, 'N', in_])} (got {list(x.shape)}){hint}"
        )
    if not x.is_floating_point() or not bool(x.isfinite().all()):
        seen = f"{int((~x.isfinite()).sum())} that are not" if x.is_floating_point() else x.dtype
        raise ValueError(f"{where}: x must be finite floating-point numbers (got {seen})")
    check_targets(where, y, tuple(x.shape[:-1]), out, network.task, front)
    for name, value in (("x", x), ("y", y)):
        if value.device.type != "cpu":
            raise ValueError(f"{where}: {name} must be on the CPU (got {value.device})")
    if x.shape[-2] != network.samples:
        raise ValueError(
            f"{where}: the network was made for samples={network.samples}, which its prior depends "
            f"on (got {x.shape[-2]} points)"
        )


def check_targets(
    where: str, y: Tensor, points: tuple[int, ...], out: int, task: Task, front: Sequence[str] = ()
) -> None:
    """Raise unless y [*points] are classes, or numbers; [*points, out] of several outputs."""
    y = check_tensor(where, "y", y)
    several = task == "regression" and out > 1
    wanted = (*points, out) if several else points
    if tuple(y.shape) != wanted:
        named = _shape([*front, "N", out] if several else [*front, "N"])
        hint = "; y.squeeze(-1) has that shape" if y.shape == (*wanted, 1) else ""
        raise ValueError(
            f"{where}: y must be {named}, here {list(wanted)} (got {list(y.shape)}){hint}"
        )
    if task == "regression":
        if y.is_complex() or y.dtype == torch.bool or not bool(y.isfinite().all()):
            bad = int((~y.isfinite()).sum())
            seen = f"{bad} that are not" if bad else y.dtype
            raise ValueError(f"{where}: y must be finite numbers (got {seen})")
    elif y.dtype != torch.int64:
        hint = "; y.long() converts them" if not y.is_complex() else ""
        raise ValueError(f"{where}: y must be int64 classes (got {y.dtype}){hint}")
    elif y.numel() and not 0 <= int(y.min()) <= int(y.max()) < out:
        raise ValueError(
            f"{where}: y must be classes from 0 to {out - 1} "
            f"(got some from {int(y.min())} to {int(y.max())})"
        )


def check_inputs(where: str, in_: int, x: Tensor) -> None:
    """Raise unless x is [N, in]."""
    x = check_tensor(where, "x", x)
    if x.dim() != 2 or x.shape[1] != in_:
        raise ValueError(f"{where}: x must be [N, {in_}] (got {list(x.shape)})")


def check_count(where: str, name: str, value: int, least: int) -> int:
    """Return an int that is not too small, or raise ValueError."""
    if is_int(value) and operator.index(value) >= least:
        return operator.index(value)
    raise ValueError(f"{where}: {name} must be an int >= {least} (got {describe(value)})")


def check_positive(where: str, **values: float) -> None:
    """Raise ValueError unless all are positive finite numbers."""
    for name, value in values.items():
        number = isinstance(value, Real) and not isinstance(value, bool)
        if not (number and 0 < value < math.inf):
            raise ValueError(f"{where}: {name} must be a positive number (got {describe(value)})")


def check_share(where: str, **values: float) -> None:
    """Raise ValueError unless all are numbers strictly between 0 and 1."""
    for name, value in values.items():
        if not (isinstance(value, Real) and not isinstance(value, bool) and 0 < value < 1):
            raise ValueError(f"{where}: {name} must be a number in (0, 1) (got {describe(value)})")


def _shape(parts: Sequence[object]) -> str:
    return f"[{', '.join(map(str, parts))}]"
