"""Permutation search: which rows and columns should share blocks.

After pruning to blocks, a layer keeps the saliency of its kept blocks and loses the rest. Permuting
output and input channels first gathers small weights in the same blocks, so that less is lost
(TETRIS: Ji et al., "TETRIS: TilE-matching the TRemendous Irregular Sparsity", NeurIPS 2018).
``"swap"`` is the paper's alternation, in a form that needs a table of lines x groups instead of
lines x lines. ``"threshold"``, the default, is ours: it chooses the blocks anew with every swap,
and anneals; csrc/reorder/threshold.h explains it.

Retained saliency is a proxy for accuracy. Orders of equal share can differ in accuracy: sorted
starts crowd the kept blocks into few rows, so try both values of ``start`` and ``balanced``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from tetris import _C

from .blocking import removed_count
from .checks import (
    check_block,
    check_flags,
    check_search,
    check_sparsity,
    check_tensor,
    describe,
)
from .progress import make_bar

if TYPE_CHECKING:
    from collections.abc import Iterator

    from numpy.typing import NDArray

Method = Literal["identity", "l1_sort", "swap", "assign", "threshold"]
Start = Literal["identity", "l1_sort", "both"]

METHODS: tuple[Method, ...] = ("identity", "l1_sort", "swap", "assign", "threshold")
STARTS: tuple[Start, ...] = ("identity", "l1_sort", "both")

#: Exact assignment takes time with the cube of the matrix; above this it wants ``sweeps``.
ASSIGN_LIMIT = 1024


@dataclass(frozen=True, eq=False)
class SearchResult:
    """What :func:`search` found. Shares are of the total saliency, from 0 to 1.

    Attributes:
        row_perm: int32 ``[out]``, original row at each packed position; None is the identity.
        col_perm: int32 ``[in]``, original column at each packed position; None is the identity.
        mask: bool ``[ceil(out/bo), kh*kw*ceil(in/bi)]`` in packed order, True where a block is
            kept; the column of block ``g`` at kernel position ``(ky, kx)`` is
            ``(ky*kw + kx)*ceil(in/bi) + g``.
        retained: share of the saliency in kept blocks.
        identity_retained: the same without reordering.
        l1_sort_retained: the same after sorting rows and columns by L1 norm.
        unstructured_retained: share in the heaviest single elements, as many (relatively) as
            blocks are kept: an upper bound where blocks divide the matrix.
        method: the method that was asked for.
        sweeps: sweeps (``"threshold"``) or rounds (``"swap"``, ``"assign"``) of the longest start.
        seconds: wall-clock time of the search.
        floor_bound: the budget was below one block per block row; one each was kept.
        removed_trace: for ``"swap"`` and ``"assign"``, the removed share after each choice of
            blocks and each permutation step, in turn; it never rises. Otherwise empty.
    """

    row_perm: torch.Tensor | None
    col_perm: torch.Tensor | None
    mask: torch.Tensor
    retained: float
    identity_retained: float
    l1_sort_retained: float
    unstructured_retained: float
    method: Method
    sweeps: int
    seconds: float
    floor_bound: bool
    removed_trace: tuple[float, ...] = ()

    @property
    def kept_blocks(self) -> int:
        """Number of kept blocks."""
        return int(self.mask.sum())

    def summary(self) -> str:
        """A few lines for people: what was kept, beside what simpler ways would have kept."""
        lines = [
            f"{self.method}: {self.kept_blocks} of {self.mask.numel()} blocks kept, "
            f"{self.sweeps} sweeps in {self.seconds:.2f} s",
            f"  identity      {self.identity_retained:7.2%} of the saliency",
            f"  L1 sort       {self.l1_sort_retained:7.2%}",
            f"  this order    {self.retained:7.2%}",
            f"  unstructured  {self.unstructured_retained:7.2%} (upper bound)",
        ]
        if self.floor_bound:
            lines.append("  the budget was below one block per block row: each kept its best")
        return "\n".join(lines)

    def __repr__(self) -> str:
        return (
            f"SearchResult({self.method}: retained {self.retained:.4f}, "
            f"identity {self.identity_retained:.4f}, L1 sort {self.l1_sort_retained:.4f}, "
            f"unstructured {self.unstructured_retained:.4f}; "
            f"{self.kept_blocks}/{self.mask.numel()} blocks, {self.seconds:.2f} s)"
        )


def search(
    saliency: torch.Tensor | NDArray[Any],
    block: tuple[int, int],
    sparsity: float,
    *,
    method: Method = "threshold",
    start: Start = "both",
    seed: int = 0,
    budget: float | None = None,
    sweeps: int | None = None,
    balanced: bool = False,
    allow_empty_rows: bool = False,
    tie_kernel: bool = False,
    absolute: bool = False,
    row_perm: torch.Tensor | NDArray[Any] | None = None,
    col_perm: torch.Tensor | NDArray[Any] | None = None,
    threads: int | None = None,
    progress: bool = False,
) -> SearchResult:
    """Find an order of rows and columns under which the kept blocks hold the most saliency.

    What ``"swap"``, ``"assign"`` and ``"threshold"`` find never retains less than identity or the
    L1 sort. With ``sweeps`` it depends on the arguments only, whatever the number of threads; with
    a time budget (the default) it may also depend on the speed of the machine.

    An order that is given, ``row_perm`` or ``col_perm``, is held and the other axis alone searched;
    identity and L1 sort then stand for orders of the other axis under it. To go on from an order p
    instead, permute the saliency: ``search(saliency[p], ..., start="identity")`` starts there, and
    ``p[found.row_perm]`` is its result.

    Args:
        saliency: ``[out, in]`` or ``[out, in, kh, kw]``, non-negative and finite, of any float
            dtype: how much is lost when an element goes, ``weight.abs()`` for example. A
            convolution's blocks lie at single kernel positions; all share the permutations.
        block: ``(bo, bi)``, block height along out and width along in, each from 1 to 128. The
            last block row and column may be ragged. If bo (bi) is 1, the order of rows (columns)
            is irrelevant and stays the identity.
        sparsity: removed share of blocks; ``n - floor(sparsity * n)`` of ``n`` are kept.
        method: ``"identity"``; ``"l1_sort"``, descending L1 norms; ``"swap"``, the alternation of
            the paper; ``"assign"``, the same with exact assignment steps (slow: up to 1024 rows
            and columns unless ``sweeps`` is given); ``"threshold"``, the default.
        start: order to start from. With ``"both"`` each is tried and the better one kept.
        seed: of the random numbers of ``"threshold"``.
        budget: seconds for ``"threshold"``, all starts together; by default :func:`default_budget`.
            0 takes the better start as it is.
        sweeps: number of sweeps over both axes for each start, in place of a time budget; the
            most rounds for ``"swap"`` and ``"assign"``.
        balanced: every block row keeps the same number of blocks, give or take one.
        allow_empty_rows: otherwise every block row keeps its best block, counted in the budget.
        tie_kernel: all positions of a channel block live or die together.
        absolute: take the saliency for ``|saliency|``: of a float32 weight, magnitude is searched
            without a copy of it.
        row_perm: int ``[out]``, original row at each packed position: an order to hold.
        col_perm: int ``[in]``, the same of columns.
        threads: number of threads, by default all.
        progress: show a progress bar.

    Returns:
        The order, the mask of kept blocks and the shares.

    Raises:
        ValueError: for an argument out of range, or saliency that is NaN, infinite, or (unless
            ``absolute``) negative.
        KeyboardInterrupt: on Ctrl-C, within about half a second.

    Example:
        >>> weight = torch.randn(512, 512)
        >>> found = tetris.reorder.search(weight, (32, 32), sparsity=0.75, absolute=True)
        >>> packed = weight[found.row_perm][:, found.col_perm]
        >>> next_layer = torch.randn(10, 512).abs()  # its inputs in the order of these outputs
        >>> tetris.reorder.search(next_layer, (2, 32), 0.75, col_perm=found.row_perm)
    """
    _check_choice("method", method, METHODS)
    _check_choice("start", start, STARTS)
    where = "tetris.reorder.search"
    check_search(where, seed=seed, budget=budget, sweeps=sweeps, threads=threads)
    check_flags(where, progress=progress, balanced=balanced, allow_empty_rows=allow_empty_rows)
    problem = _Problem.of(where, saliency, block, sparsity, tie_kernel, absolute)
    rows, cols, _ = problem.values.shape
    held_rows = None if row_perm is None else _permutation(where, "row_perm", row_perm, rows)
    held_cols = None if col_perm is None else _permutation(where, "col_perm", col_perm, cols)
    if method == "assign" and sweeps is None and max(rows, cols) > ASSIGN_LIMIT:
        raise ValueError(
            f'{where}: method="assign" takes minutes above {ASSIGN_LIMIT} rows or columns '
            f'(got {rows} x {cols}); use method="threshold", or give sweeps to insist'
        )
    enough = default_budget((rows, cols, problem.values.shape[2]), problem.block)
    if budget is None:
        budget = enough
    # Beyond some length, a second search from each start finds more than a slower one.
    repeats = 1 if sweeps else max(1, min(8, int(budget / (2 * enough)))) if enough > 0 else 1
    with progress_bar(progress) as report:
        found = _C.reorder_search(
            problem.values,
            *problem.block,
            problem.kept,
            balanced,
            allow_empty_rows,
            held_rows,
            held_cols,
            METHODS.index(method),
            STARTS.index(start),
            int(seed) % 2**64,
            float(budget),
            repeats,
            sweeps or 0,
            threads or 0,
            report,
        )
    total = found["total"]

    def share(mass: float) -> float:
        return mass / total if total > 0 else 1.0

    return SearchResult(
        row_perm=_perm_tensor(found["row_perm"]),
        col_perm=_perm_tensor(found["col_perm"]),
        mask=problem.expand(found["mask"]),
        retained=share(found["mass"]),
        identity_retained=share(found["identity_mass"]),
        l1_sort_retained=share(found["l1_sort_mass"]),
        unstructured_retained=found["unstructured_share"],
        method=method,
        sweeps=found["sweeps"],
        seconds=found["seconds"],
        floor_bound=found["floor_bound"],
        removed_trace=tuple(mass / total for mass in found["trace"]) if total > 0 else (),
    )


def block_mask(
    saliency: torch.Tensor | NDArray[Any],
    block: tuple[int, int],
    sparsity: float,
    row_perm: torch.Tensor | NDArray[Any] | None = None,
    col_perm: torch.Tensor | NDArray[Any] | None = None,
    *,
    balanced: bool = False,
    allow_empty_rows: bool = False,
    tie_kernel: bool = False,
    absolute: bool = False,
) -> torch.Tensor:
    """The blocks to keep under given permutations.

    Args:
        saliency: see :func:`search`.
        block: see :func:`search`.
        sparsity: see :func:`search`.
        row_perm: int ``[out]``, original row at each packed position; None is the identity.
        col_perm: int ``[in]``, original column at each packed position; None is the identity.
        balanced: see :func:`search`.
        allow_empty_rows: see :func:`search`.
        tie_kernel: see :func:`search`.
        absolute: see :func:`search`.

    Returns:
        bool, in packed order and shaped like :attr:`SearchResult.mask`. Ties go to the lower index.

    Raises:
        ValueError: as :func:`search`, and for a permutation that is none.

    Example:
        >>> found = tetris.reorder.search(saliency, (16, 16), 0.9)
        >>> mask = tetris.reorder.block_mask(
        ...     saliency, (16, 16), 0.8, found.row_perm, found.col_perm
        ... )
    """
    where = "tetris.reorder.block_mask"
    check_flags(where, balanced=balanced, allow_empty_rows=allow_empty_rows)
    problem = _Problem.of(where, saliency, block, sparsity, tie_kernel, absolute)
    mask = _C.reorder_select(
        problem.values,
        *problem.block,
        problem.kept,
        balanced,
        allow_empty_rows,
        _permutation(where, "row_perm", row_perm, problem.values.shape[0]),
        _permutation(where, "col_perm", col_perm, problem.values.shape[1]),
    )
    return problem.expand(mask)


def default_budget(shape: tuple[int, ...], block: tuple[int, int]) -> float:
    """Seconds that :func:`search` gives the threshold search: 2 for 512 x 512, at most 26.

    Args:
        shape: of the saliency.
        block: ``(bo, bi)``.

    Returns:
        More where visiting all pairs of lines takes longer: tall matrices, narrow blocks.

    Example:
        >>> tetris.reorder.default_budget((512, 512), (32, 32))
        2.0
    """
    out, in_features, positions = shape[0], shape[1], math.prod(shape[2:])
    bo, bi = check_block("tetris.reorder.default_budget", block)
    elements = out * in_features * positions
    # Numbers to compare when every pair of rows, and of columns, is tried once.
    work = (out * elements / bi if bo > 1 else 0) + (in_features * elements / bo if bi > 1 else 0)
    return round(2 * min(1.0, math.sqrt(elements / 512**2)) + min(24.0, work / 3e9), 1)


@dataclass(frozen=True)
class _Problem:
    """Checked arguments, as the native search wants them."""

    values: NDArray[np.float32]  # [rows, cols, positions]; their magnitudes count
    block: tuple[int, int]
    kept: int
    tied: int  # positions that each mask column stands for

    @staticmethod
    def of(
        where: str,
        saliency: torch.Tensor | NDArray[Any],
        block: tuple[int, int],
        sparsity: float,
        tie_kernel: bool,
        absolute: bool,
    ) -> _Problem:
        check_flags(where, tie_kernel=tie_kernel, absolute=absolute)
        if isinstance(saliency, torch.Tensor):
            tensor = check_tensor(where, "saliency", saliency).detach().cpu().resolve_neg()
            if tensor.dtype in (torch.float16, torch.bfloat16):
                tensor = tensor.float()
            array = tensor.numpy()
        else:
            array = np.asarray(saliency)
            if array.dtype == object:
                raise TypeError(
                    f"{where}: saliency must be a tensor or an array (got {describe(saliency)})"
                )
        if array.ndim not in (2, 4) or array.size == 0:
            raise ValueError(
                f"{where}: saliency must be [out, in] or [out, in, kh, kw] and not empty "
                f"(got shape {tuple(array.shape)})"
            )
        if array.dtype == np.float16:
            array = array.astype(np.float32)
        if array.dtype not in (np.float32, np.float64):
            raise ValueError(f"{where}: saliency must be floating point (got {array.dtype})")
        low, high = array.min(), array.max()  # NaN propagates to both
        least = -np.finfo(array.dtype).max if absolute else 0
        if not (low >= least and high < np.inf):
            bad = np.argwhere(~((array >= least) & (array < np.inf)))[0]
            place = ", ".join(str(i) for i in bad)
            rule = "finite" if absolute else "finite and non-negative"
            negative = not absolute and -np.inf < array[tuple(bad)] < 0
            hint = "; pass absolute=True to search by magnitude" if negative else ""
            raise ValueError(
                f"{where}: saliency must be {rule} (got {array[tuple(bad)]} at [{place}]){hint}"
            )
        bo, bi = check_block(where, block)
        sparsity = check_sparsity(where, sparsity)
        high = max(high, -low)
        if not (1e-20 < high < 1e20):  # sums should stay far from the ends of float32
            array = array / high if high > 0 else array
        rows, cols = array.shape[:2]
        positions = math.prod(array.shape[2:])
        if tie_kernel and positions > 1:
            array = np.abs(array).reshape(rows, cols, positions).sum(axis=2)
        tied = positions if tie_kernel else 1
        # Aligned, too, which a buffer that was read from a file need not be.
        values = np.require(array, np.float32, ["C", "A"]).reshape(rows, cols, -1)
        blocks = -(-rows // bo) * -(-cols // bi) * values.shape[2]
        return _Problem(values, (bo, bi), blocks - removed_count(sparsity, blocks), tied)

    def expand(self, mask: NDArray[np.bool_]) -> torch.Tensor:
        """The mask of all kernel positions."""
        return torch.from_numpy(mask).repeat(1, self.tied)


def _check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(
            f"tetris.reorder.search: {name} must be one of {', '.join(choices)} "
            f"(got {describe(value)})"
        )


def _perm_tensor(perm: NDArray[np.int32] | None) -> torch.Tensor | None:
    return None if perm is None else torch.from_numpy(perm)


def _permutation(
    where: str, name: str, perm: torch.Tensor | NDArray[Any] | None, n: int
) -> NDArray[np.int32]:
    if perm is None:
        return np.arange(n, dtype=np.int32)
    array = perm.detach().cpu().numpy() if isinstance(perm, torch.Tensor) else np.asarray(perm)
    if array.shape != (n,) or array.dtype.kind not in "iu":
        raise ValueError(
            f"{where}: {name} must be {n} integers (got {array.dtype} {tuple(array.shape)})"
        )
    if not np.array_equal(np.sort(array), np.arange(n)):
        raise ValueError(f"{where}: {name} must hold each of 0 .. {n - 1} once")
    return np.ascontiguousarray(array, dtype=np.int32)


@contextmanager
def progress_bar(show: bool) -> Iterator[Callable[[float], None] | None]:
    """A callback for the share of work done, or None."""
    if not show:
        yield None
        return
    try:
        bar = make_bar()
    except ImportError:
        yield None
        return
    with bar:
        task = bar.add_task("reordering", total=1.0)
        yield lambda done: bar.update(task, completed=min(1.0, done))
