"""From a saliency to the blocks to store: :mod:`tetris.reorder`, group by group."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypedDict

import torch
from torch import Tensor

from . import reorder as _reorder
from .blocking import Blocking, removed_count
from .checks import check_flags, check_keywords, check_search, check_sparsity, describe

if TYPE_CHECKING:
    from collections.abc import Iterator

    from typing_extensions import Unpack

Reorder = _reorder.Method | bool


class SelectArguments(TypedDict, total=False):
    """Arguments that go on to :func:`tetris.reorder.block_mask` as they are."""

    balanced: bool
    allow_empty_rows: bool
    tie_kernel: bool


class SearchArguments(SelectArguments, total=False):
    """Arguments that go on to :func:`tetris.reorder.search` as they are."""

    seed: int
    budget: float | None
    sweeps: int | None


class SearchOptions(SearchArguments, total=False):
    """What else a search for a layout may be told; see :meth:`tetris.BlockLayout.from_dense`."""

    reorder: Reorder


def search_blocks(
    where: str,
    saliency: Tensor,
    blocking: Blocking,
    sparsity: float,
    *,
    reorder: Reorder = "threshold",
    progress: bool = False,
    absolute: bool = False,
    **search: Unpack[SearchArguments],
) -> _reorder.SearchResult:
    """Permutations and blocks for a saliency ``[out, in / groups, *kernel]``, on the CPU.

    Groups are searched one by one: each removes its share of the blocks, and of the budget of
    seconds it takes its part. Arguments as in :meth:`tetris.BlockLayout.from_dense`, ``absolute``
    as in :func:`tetris.reorder.search`; ``where`` is the function named in messages.
    """
    sparsity = check_sparsity(where, sparsity)
    check_keywords(where, search, SearchOptions.__annotations__)
    flags = {name: search[name] for name in SelectArguments.__annotations__ if name in search}
    check_flags(where, progress=progress, **flags)
    budget = search.get("budget")
    check_search(where, seed=search.get("seed", 0), budget=budget, sweeps=search.get("sweeps"))
    method = search_method(where, reorder)
    if budget is not None:
        search = {**search, "budget": budget / blocking.groups}
    found = [
        _reorder.search(
            part,
            blocking.block,
            own,
            method=method,
            progress=progress,
            absolute=absolute,
            **search,
        )
        for part, own in by_group(saliency, blocking, sparsity, search.get("tie_kernel", False))
    ]
    return found[0] if len(found) == 1 else concatenate(found, saliency, blocking)


def select_blocks(
    saliency: Tensor,
    blocking: Blocking,
    sparsity: float,
    row_perm: Tensor | None,
    col_perm: Tensor | None,
    **select: Unpack[SelectArguments],
) -> Tensor:
    """bool[G, C], the blocks to keep under given permutations."""
    rows = _own(row_perm, blocking.groups)
    columns = _own(col_perm, blocking.groups)
    tied = select.get("tie_kernel", False)
    return torch.cat(
        [
            _reorder.block_mask(part, blocking.block, own, rows[a], columns[a], **select)
            for a, (part, own) in enumerate(by_group(saliency, blocking, sparsity, tied))
        ]
    )


def search_method(where: str, reorder: Reorder) -> _reorder.Method:
    """Name of the search that a ``reorder`` argument stands for."""
    if reorder is True:
        return "threshold"
    if reorder is False:
        return "identity"
    if reorder not in _reorder.METHODS:
        raise ValueError(
            f"{where}: reorder must be True, False or one of {', '.join(_reorder.METHODS)} "
            f"(got {describe(reorder)})"
        )
    return reorder


def shares(count: int, groups: int) -> list[int]:
    """A count, divided among groups as evenly as can be."""
    return [count * (a + 1) // groups - count * a // groups for a in range(groups)]


def by_group(
    saliency: Tensor, blocking: Blocking, sparsity: float, tied: bool
) -> Iterator[tuple[Tensor, float]]:
    """Saliency of each group, as the search takes it, and the share of its blocks to remove."""
    groups = blocking.groups
    if saliency.dim() == 3:
        saliency = saliency.unsqueeze(2)
    if groups == 1:
        yield saliency, sparsity
        return
    rows, columns = blocking.group_grid
    blocks = rows * columns * (1 if tied else blocking.positions)
    # Rounded once for the layer: of nine blocks in each of many groups, 0.9 would remove 8/9.
    removed = shares(removed_count(sparsity, blocks * groups), groups)
    for part, own in zip(saliency.split(blocking.group_shape[0]), removed, strict=True):
        yield part, min(1.0, (own + 0.5) / blocks)  # floor() finds the count again


def _own(perm: Tensor | None, groups: int) -> list[Tensor | None]:
    """A permutation's part of each group, in the group's own numbers."""
    if perm is None:
        return [None] * groups
    size = perm.numel() // groups
    return list((perm % size).split(size))


def concatenate(
    found: list[_reorder.SearchResult], saliency: Tensor, blocking: Blocking
) -> _reorder.SearchResult:
    """One result of those of the groups."""
    parts = saliency.chunk(blocking.groups)
    mass = [float(part.abs().sum(dtype=torch.float64)) for part in parts]
    total = sum(mass)

    def share(name: str) -> float:
        if total == 0:
            return 1.0
        return sum(m * getattr(f, name) for m, f in zip(mass, found, strict=True)) / total

    def perm(name: str, size: int) -> Tensor | None:
        own = [getattr(f, name) for f in found]
        if all(p is None for p in own):
            return None
        identity = torch.arange(size, dtype=torch.int32)
        parts = [(identity if p is None else p) + a * size for a, p in enumerate(own)]
        return torch.cat(parts).to(torch.int32)

    out, in_ = blocking.group_shape
    return _reorder.SearchResult(
        row_perm=perm("row_perm", out),
        col_perm=perm("col_perm", in_),
        mask=torch.cat([f.mask for f in found]),
        retained=share("retained"),
        identity_retained=share("identity_retained"),
        l1_sort_retained=share("l1_sort_retained"),
        unstructured_retained=share("unstructured_retained"),
        method=found[0].method,
        sweeps=max(f.sweeps for f in found),
        seconds=sum(f.seconds for f in found),
        floor_bound=any(f.floor_bound for f in found),
    )
