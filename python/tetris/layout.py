"""BlockLayout: which blocks of a weight are stored, and in which order.

A weight ``W[out, in]`` is looked at through two permutations that gather, ``W[row_perm][:,
col_perm]``, and cut into blocks of ``bo x bi``. The blocks worth keeping are stored, the others are
zero. A layout says which are which; the numbers are a separate tensor, ``values[nnzb, bi, bo]``,
made by :meth:`BlockLayout.pack`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any, Literal, TypedDict

import torch
from torch import Tensor
from torch.nn import functional as F

from . import reorder as _reorder
from .checks import (
    check_block,
    check_keywords,
    check_search,
    check_sparsity,
    check_tensor,
    describe,
)

if TYPE_CHECKING:
    from scipy.sparse import bsr_matrix
    from typing_extensions import Unpack

Reorder = _reorder.Method | bool
Importance = Literal["magnitude", "squared"] | Tensor


class _SearchArguments(TypedDict, total=False):
    """Arguments that go on to :func:`tetris.reorder.search` as they are."""

    seed: int
    budget: float | None
    sweeps: int | None
    balanced: bool
    allow_empty_rows: bool


class SearchOptions(_SearchArguments, total=False):
    """What else a search for a layout may be told; see :meth:`BlockLayout.from_dense`."""

    reorder: Reorder


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """The stored blocks of one weight matrix, and the two permutations they are cut under.

    Attributes:
        block: (bo, bi), block height along out and width along in, each from 1 to 128.
        out_features: Rows of the weight.
        in_features: Columns of the weight.
        row_ptr: int32[G + 1], G = ceil(out / bo): block row g holds the stored blocks
            ``row_ptr[g] .. row_ptr[g + 1] - 1``.
        col_idx: int32[nnzb], column group of each stored block, strictly ascending in a block row.
        row_perm: int32[out], packed slot s holds original output ``row_perm[s]``; None is the
            identity, and an identity that is passed is stored as None.
        col_perm: int32[in], the same for inputs.

    The last block row and column group may be ragged: their missing entries are zero in ``values``
    and stand for nothing. Layouts are immutable, compare and hash by content (wherever they live)
    and check themselves when made.

    Raises:
        ValueError: an invariant is broken; the message names it and the numbers.
        TypeError: an index tensor is not an int32 tensor.

    Example:
        >>> layout = tetris.BlockLayout.from_dense(weight, block=(4, 1), sparsity=0.9)
        >>> values = layout.pack(weight)            # [nnzb, 1, 4]
        >>> pruned = layout.unpack(values)          # [out, in], zero where nothing is stored
        >>> torch.equal(pruned, weight * layout.mask())
        True

    Reordering: Ji et al., "TETRIS: TilE-matching the TRemendous Irregular Sparsity", NeurIPS 2018.
    """

    block: tuple[int, int]
    out_features: int
    in_features: int
    row_ptr: Tensor
    col_idx: Tensor
    row_perm: Tensor | None = None
    col_perm: Tensor | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", check_block("BlockLayout", self.block))
        for name in ("out_features", "in_features"):
            _check_features("BlockLayout", name, getattr(self, name))
        rows, groups = self.block_grid
        _check_index(
            "row_ptr", self.row_ptr, rows + 1, f"ceil({self.out_features} / {self.block[0]}) + 1"
        )
        _check_index("col_idx", self.col_idx, None, "")
        _check_row_ptr(self.row_ptr, self.nnz_blocks)
        _check_col_idx(self._block_rows(), self.col_idx, groups)
        for name, size in (("row_perm", self.out_features), ("col_perm", self.in_features)):
            perm = getattr(self, name)
            if perm is not None and _check_permutation(name, perm, size):
                object.__setattr__(self, name, None)

    # -- making one ---------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        block: tuple[int, int],
        sparsity: float,
        *,
        importance: Importance | None = None,
        progress: bool = False,
        **search: Unpack[SearchOptions],
    ) -> BlockLayout:
        """Search for the permutations and blocks that keep the most of a dense weight.

        Args:
            weight: [out, in], any floating type.
            block: (bo, bi).
            sparsity: Share of *blocks* to remove, in [0, 1]: ``floor(sparsity * blocks)`` go.
            importance: What a weight is worth: ``"magnitude"`` (None is the same), ``"squared"``,
                or a non-negative tensor shaped like the weight.
            progress: Show a progress bar.
            **search: How to search:

        Keyword Args:
            reorder: How rows and columns are permuted. ``"threshold"`` (or True, the default) is
                the search of the library; ``"identity"`` (or False) keeps the order;
                ``"l1_sort"``, ``"swap"`` and ``"assign"`` are the simpler rungs, see
                :mod:`tetris.reorder`.
            seed: Seed of the search.
            budget: Seconds the search may take.
            sweeps: Sweeps of the search instead of a time budget: the result then depends on the
                arguments alone, not on the speed of the machine.
            balanced: Store the same number of blocks in every block row (up to one).
            allow_empty_rows: Let block rows lose all their blocks. Otherwise every block row keeps
                its best one, even where that exceeds what ``sparsity`` leaves.

        Returns:
            The layout, on the weight's device.

        Raises:
            NotImplementedError: a convolution weight ([out, in, kh, kw]).
            TypeError: the weight is no tensor.
            ValueError: a shape, a sparsity or an importance that breaks a rule.
        """
        where = "BlockLayout.from_dense"
        check_matrix(where, "weight", weight)
        saliency = saliency_of(where, weight, importance)
        layout, _ = search_layout(where, saliency, block, sparsity, progress=progress, **search)
        return layout.to(weight.device)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block: tuple[int, int],
        *,
        row_perm: Tensor | None = None,
        col_perm: Tensor | None = None,
    ) -> BlockLayout:
        """Store every block that holds at least one True of an element mask.

        Args:
            mask: bool[out, in] in original order.
            block: (bo, bi).
            row_perm: int32[out] or None, the permutations the blocks are cut under.
            col_perm: int32[in] or None.

        Returns:
            The smallest layout whose :meth:`mask` covers the given one.
        """
        where = "BlockLayout.from_mask"
        check_matrix(where, "mask", mask)
        if mask.dtype != torch.bool:
            raise TypeError(f"{where}: mask must be bool (got {mask.dtype}); compare it with 0")
        block = check_block(where, block)
        out_features, in_features = mask.shape
        for name, perm, size in (
            ("row_perm", row_perm, out_features),
            ("col_perm", col_perm, in_features),
        ):
            if perm is not None:
                _check_permutation(name, perm, size)
        blocks = _to_blocks(mask, block, row_perm, col_perm).any(dim=3).any(dim=1)
        return cls.from_block_mask(blocks, block, out_features, in_features, row_perm, col_perm)

    @classmethod
    def from_block_mask(
        cls,
        block_mask: Tensor,
        block: tuple[int, int],
        out_features: int,
        in_features: int,
        row_perm: Tensor | None = None,
        col_perm: Tensor | None = None,
    ) -> BlockLayout:
        """Store the blocks that are True in a mask over blocks.

        Args:
            block_mask: bool[ceil(out / bo), ceil(in / bi)] in packed order, True is stored.
            block: (bo, bi).
            out_features: out.
            in_features: in.
            row_perm: int32[out] or None.
            col_perm: int32[in] or None.
        """
        where = "BlockLayout.from_block_mask"
        bo, bi = check_block(where, block)
        for name, size in (("out_features", out_features), ("in_features", in_features)):
            _check_features(where, name, size)
        check_tensor(where, "block_mask", block_mask)
        grid = (math.ceil(out_features / bo), math.ceil(in_features / bi))
        if block_mask.dtype != torch.bool or tuple(block_mask.shape) != grid:
            raise ValueError(
                f"{where}: block_mask must be bool{list(grid)}, the blocks of "
                f"{bo}x{bi} in {out_features}x{in_features} "
                f"(got {block_mask.dtype}{list(block_mask.shape)})"
            )
        col_idx = block_mask.nonzero()[:, 1].to(torch.int32)
        row_ptr = F.pad(block_mask.sum(1).cumsum(0), (1, 0)).to(torch.int32)
        return cls((bo, bi), out_features, in_features, row_ptr, col_idx, row_perm, col_perm)

    # -- numbers ------------------------------------------------------------------------------

    @property
    def block_grid(self) -> tuple[int, int]:
        """(G, C): block rows ceil(out / bo) and column groups ceil(in / bi)."""
        return (
            math.ceil(self.out_features / self.block[0]),
            math.ceil(self.in_features / self.block[1]),
        )

    @property
    def nnz_blocks(self) -> int:
        """Stored blocks, nnzb."""
        return self.col_idx.numel()

    @property
    def stored_values(self) -> int:
        """Numbers stored, nnzb * bo * bi, padding included: what memory and time follow."""
        return self.nnz_blocks * self.block[0] * self.block[1]

    @property
    def density(self) -> float:
        """Stored share of the blocks."""
        rows, groups = self.block_grid
        return self.nnz_blocks / (rows * groups)

    @property
    def sparsity(self) -> float:
        """Removed share of the blocks, 1 - density."""
        return 1.0 - self.density

    @property
    def device(self) -> torch.device:
        """Where the index tensors live."""
        return self.row_ptr.device

    # -- values -------------------------------------------------------------------------------

    def pack(self, weight: Tensor) -> Tensor:
        """Stored blocks of a dense weight, as the kernels read them.

        Args:
            weight: [out, in], any type.

        Returns:
            [nnzb, bi, bo], ``values[b][k][r]`` is input k, output r of block b; entries beyond the
            edge of the matrix are zero. Differentiable.
        """
        check_tensor("BlockLayout.pack", "weight", weight)
        if tuple(weight.shape) != (self.out_features, self.in_features):
            raise ValueError(
                f"BlockLayout.pack: weight must be [out, in] = [{self.out_features}, "
                f"{self.in_features}] (got {list(weight.shape)})"
            )
        blocks = _to_blocks(weight, self.block, self.row_perm, self.col_perm)
        stored = blocks.permute(0, 2, 3, 1)[self._block_rows(), self.col_idx.long()]
        return stored.contiguous()

    def unpack(self, values: Tensor) -> Tensor:
        """Dense weight that stored blocks stand for: the inverse of :meth:`pack`.

        Args:
            values: [nnzb, bi, bo], any type.

        Returns:
            [out, in] in original order, zero where nothing is stored. Differentiable.
        """
        bo, bi = self.block
        self._check_values("unpack", values)
        rows, groups = self.block_grid
        blocks = values.new_zeros((rows, groups, bi, bo))
        blocks = blocks.index_put((self._block_rows(), self.col_idx.long()), values)
        packed = blocks.permute(0, 3, 1, 2).reshape(rows * bo, groups * bi)
        packed = packed[: self.out_features, : self.in_features]
        if self.row_perm is not None:
            packed = packed.index_select(0, inverse_permutation(self.row_perm))
        if self.col_perm is not None:
            packed = packed.index_select(1, inverse_permutation(self.col_perm))
        return packed.contiguous()

    def mask(self) -> Tensor:
        """bool[out, in] in original order: True where a weight is stored."""
        bo, bi = self.block
        return self.unpack(
            torch.ones((self.nnz_blocks, bi, bo), dtype=torch.bool, device=self.device)
        )

    def block_mask(self) -> Tensor:
        """bool[G, C] in packed order: True where a block is stored."""
        mask = torch.zeros(self.block_grid, dtype=torch.bool, device=self.device)
        mask[self._block_rows(), self.col_idx.long()] = True
        return mask

    def _check_values(self, function: str, values: Tensor) -> None:
        """Raise unless values are those of this layout's blocks."""
        bo, bi = self.block
        check_tensor(f"BlockLayout.{function}", "values", values)
        if tuple(values.shape) != (self.nnz_blocks, bi, bo):
            raise ValueError(
                f"BlockLayout.{function}: values must be [nnzb, bi, bo] = [{self.nnz_blocks}, "
                f"{bi}, {bo}] (got {list(values.shape)})"
            )

    def _block_rows(self) -> Tensor:
        """int64[nnzb], block row of each stored block."""
        rows = torch.arange(self.row_ptr.numel() - 1, device=self.device)
        return rows.repeat_interleave(self.row_ptr.diff().long(), output_size=self.nnz_blocks)

    # -- other formats ------------------------------------------------------------------------

    def to_sparse_bsr(self, values: Tensor, *, packed: bool = False) -> Tensor:
        """The weight as a torch sparse BSR tensor.

        Args:
            values: [nnzb, bi, bo].
            packed: BSR knows neither permutations nor ragged edges. With False, a layout that has
                either raises. With True the result is the *packed* matrix: rows and columns in
                packed order, padded with zeros to whole blocks, [G * bo, C * bi].

        Returns:
            Sparse BSR tensor with blocks of (bo, bi).
        """
        shape = self._bsr_shape("to_sparse_bsr", values, packed)
        return torch.sparse_bsr_tensor(
            self.row_ptr.clone(),
            self.col_idx.clone(),
            values.detach().transpose(1, 2).clone(memory_format=torch.contiguous_format),
            shape,
            check_invariants=False,  # a layout has been checked
        )

    @classmethod
    def from_sparse_bsr(cls, tensor: Tensor) -> tuple[BlockLayout, Tensor]:
        """Layout and values of a torch sparse BSR matrix, without permutations.

        Args:
            tensor: Sparse BSR, two-dimensional.

        Returns:
            The layout and its values [nnzb, bi, bo], in the tensor's type.
        """
        where = "BlockLayout.from_sparse_bsr"
        if not isinstance(tensor, Tensor):
            raise TypeError(f"{where}: a sparse BSR tensor is needed (got {describe(tensor)})")
        if tensor.layout != torch.sparse_bsr or tensor.dim() != 2:
            raise ValueError(
                f"{where}: a two-dimensional sparse BSR tensor is needed "
                f"(got {tensor.layout} with {tensor.dim()} dimensions)"
            )
        blocks = tensor.values()
        layout = cls(
            (int(blocks.shape[1]), int(blocks.shape[2])),
            tensor.shape[0],
            tensor.shape[1],
            tensor.crow_indices().to(torch.int32, copy=True),
            tensor.col_indices().to(torch.int32, copy=True),
        )
        return layout, blocks.transpose(1, 2).clone(memory_format=torch.contiguous_format)

    def to_scipy_bsr(self, values: Tensor, *, packed: bool = False) -> bsr_matrix:
        """The weight as a ``scipy.sparse.bsr_matrix``; rules as in :meth:`to_sparse_bsr`."""
        sparse = _import_scipy("BlockLayout.to_scipy_bsr")
        shape = self._bsr_shape("to_scipy_bsr", values, packed)
        # Copies: scipy sorts and sums in place.
        data = values.detach().cpu().transpose(1, 2).numpy().copy("C")
        indices, indptr = self.col_idx.cpu().numpy().copy(), self.row_ptr.cpu().numpy().copy()
        return sparse.bsr_matrix((data, indices, indptr), shape=shape, blocksize=self.block)

    @classmethod
    def from_scipy_bsr(cls, matrix: bsr_matrix) -> tuple[BlockLayout, Tensor]:
        """Layout and values of a ``scipy.sparse`` BSR matrix, without permutations.

        Duplicate blocks are summed and blocks are sorted; the matrix passed is not changed.
        """
        sparse = _import_scipy("BlockLayout.from_scipy_bsr")
        if not sparse.issparse(matrix) or matrix.format != "bsr":
            raise TypeError(
                "BlockLayout.from_scipy_bsr: a scipy.sparse BSR matrix is needed "
                f"(got {type(matrix).__name__})"
            )
        tidy: Any = sparse.bsr_matrix(matrix, copy=True)
        tidy.sum_duplicates()
        tidy.sort_indices()
        layout = cls(
            tidy.blocksize,
            int(tidy.shape[0]),
            int(tidy.shape[1]),
            torch.from_numpy(tidy.indptr.astype("int32")),
            torch.from_numpy(tidy.indices.astype("int32")),
        )
        return layout, torch.from_numpy(tidy.data.copy()).transpose(1, 2).contiguous()

    def _bsr_shape(self, function: str, values: Tensor, packed: bool) -> tuple[int, int]:
        bo, bi = self.block
        self._check_values(function, values)
        rows, groups = self.block_grid
        shape = (rows * bo, groups * bi)
        if packed:
            return shape
        if self.row_perm is not None or self.col_perm is not None:
            raise ValueError(
                f"BlockLayout.{function}: BSR cannot express the permutations of this layout; pass "
                "packed=True for the matrix in packed order, or search with reorder=False"
            )
        if shape != (self.out_features, self.in_features):
            raise ValueError(
                f"BlockLayout.{function}: BSR needs blocks that divide the matrix (got {bo}x{bi} "
                f"and {self.out_features}x{self.in_features}); pass packed=True for one padded to "
                f"{shape[0]}x{shape[1]}"
            )
        return shape

    # -- the rest -----------------------------------------------------------------------------

    def to(self, device: torch.device | str) -> BlockLayout:
        """The same layout with its index tensors on a device."""
        device = torch.device(device)
        if device == self.device:
            return self
        return BlockLayout(
            self.block,
            self.out_features,
            self.in_features,
            self.row_ptr.to(device),
            self.col_idx.to(device),
            None if self.row_perm is None else self.row_perm.to(device),
            None if self.col_perm is None else self.col_perm.to(device),
        )

    def plot(self, path: str | PathLike[str], weight: Tensor | None = None) -> None:
        """Save a picture: kept weights in original order, and as blocks in packed order.

        Args:
            path: File to write; the ending chooses the format (png, svg, pdf).
            weight: [out, in]; colours kept weights by magnitude.

        Raises:
            ImportError: matplotlib is missing; the message names the extra to install.
        """
        from .plotting import plot_layout

        if weight is not None:
            check_tensor("BlockLayout.plot", "weight", weight)
        plot_layout(self, path, weight)

    def _contents(self) -> tuple[Any, ...]:
        tensors = (self.row_ptr, self.col_idx, self.row_perm, self.col_perm)
        return (
            self.block,
            self.out_features,
            self.in_features,
            *(None if t is None else t.cpu().numpy().tobytes() for t in tensors),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return self is other or self._contents() == other._contents()

    def __hash__(self) -> int:
        return hash(self._contents())

    def __repr__(self) -> str:
        rows, groups = self.block_grid
        return (
            f"BlockLayout({self.out_features}x{self.in_features}, blocks of "
            f"{self.block[0]}x{self.block[1]}: {self.nnz_blocks} of {rows * groups} stored, "
            f"sparsity {self.sparsity:.1%}, reordered {self.reordered})"
        )

    @property
    def reordered(self) -> str:
        """Axes with a permutation: ``none``, ``rows``, ``columns`` or ``rows and columns``."""
        axes = [
            n for n, p in (("rows", self.row_perm), ("columns", self.col_perm)) if p is not None
        ]
        return " and ".join(axes) or "none"


# -- shared by the modules and the pruners ------------------------------------------------------


def search_layout(
    where: str,
    saliency: Tensor,
    block: tuple[int, int],
    sparsity: float,
    *,
    reorder: Reorder = "threshold",
    progress: bool = False,
    **search: Unpack[_SearchArguments],
) -> tuple[BlockLayout, _reorder.SearchResult]:
    """Layout for a saliency [out, in], with what the search reports about it.

    Arguments as in :meth:`BlockLayout.from_dense`, and the function named in messages; the layout
    is on the CPU.
    """
    block = check_block(where, block)
    sparsity = check_sparsity(where, sparsity)
    check_keywords(where, search, SearchOptions.__annotations__)
    check_search(
        where,
        seed=search.get("seed", 0),
        budget=search.get("budget"),
        sweeps=search.get("sweeps"),
    )
    method = search_method(where, reorder)
    result = _reorder.search(saliency, block, sparsity, method=method, progress=progress, **search)
    out_features, in_features = saliency.shape
    layout = BlockLayout.from_block_mask(
        result.mask, block, out_features, in_features, result.row_perm, result.col_perm
    )
    return layout, result


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


def saliency_of(where: str, weight: Tensor, importance: Importance | None) -> Tensor:
    """Worth of each weight, [out, in], non-negative and finite, detached, on the CPU, float32.

    Args:
        where: Function named in messages.
        weight: [out, in].
        importance: ``"magnitude"`` or None, ``"squared"``, or a tensor shaped like the weight.
    """
    weight = weight.detach()
    if importance is None or (isinstance(importance, str) and importance == "magnitude"):
        saliency, name = weight.abs(), "weight"
    elif isinstance(importance, str) and importance == "squared":
        saliency, name = weight.double().square(), "weight"
    elif isinstance(importance, str) or callable(importance):
        raise ValueError(
            f"{where}: importance must be 'magnitude', 'squared' or a tensor "
            f"(got {describe(importance)})"
        )
    else:
        check_tensor(where, "importance", importance)
        if importance.shape != weight.shape:
            raise ValueError(
                f"{where}: importance must be shaped like the weight (got {list(importance.shape)} "
                f"and {list(weight.shape)})"
            )
        saliency, name = importance.detach(), "importance"
    saliency = saliency.to("cpu", torch.float32).contiguous()
    if not bool(saliency.isfinite().all()):
        count = int((~saliency.isfinite()).sum())
        raise ValueError(f"{where}: {name} must be finite (got {count} NaN or infinite entries)")
    if bool((saliency < 0).any()):
        raise ValueError(
            f"{where}: importance must not be negative (got a minimum of {saliency.min():g})"
        )
    return saliency


def check_matrix(where: str, name: str, weight: Tensor) -> None:
    """Raise unless a weight, or a mask of one, is a tensor [out, in] with something in it."""
    check_tensor(where, name, weight)
    if weight.dim() in (3, 4, 5):
        raise NotImplementedError(
            f"{where}: a convolution weight (shape {list(weight.shape)}) needs SparseConv2d, which "
            "this version does not have; linear weights [out, in] only"
        )
    if weight.dim() != 2 or weight.numel() == 0:
        raise ValueError(
            f"{where}: {name} must be a non-empty matrix [out, in] (got shape {list(weight.shape)})"
        )


def block_sums(
    saliency: Tensor,
    block: tuple[int, int],
    row_perm: Tensor | None = None,
    col_perm: Tensor | None = None,
) -> Tensor:
    """[G, C], saliency of each block in packed order."""
    return _to_blocks(saliency, block, row_perm, col_perm).sum(dim=(1, 3))


def inverse_permutation(perm: Tensor) -> Tensor:
    """int64[n] with ``inverse[perm[s]] = s``."""
    inverse = torch.empty(perm.numel(), dtype=torch.int64, device=perm.device)
    inverse[perm.long()] = torch.arange(perm.numel(), device=perm.device)
    return inverse


def _to_blocks(
    weight: Tensor, block: tuple[int, int], row_perm: Tensor | None, col_perm: Tensor | None
) -> Tensor:
    """[out, in] in original order to [G, bo, C, bi] in packed order, padded with zeros."""
    (out_features, in_features), (bo, bi) = weight.shape, block
    if row_perm is not None:
        weight = weight.index_select(0, row_perm.to(weight.device))
    if col_perm is not None:
        weight = weight.index_select(1, col_perm.to(weight.device))
    rows, groups = math.ceil(out_features / bo), math.ceil(in_features / bi)
    if (rows * bo, groups * bi) != (out_features, in_features):
        weight = F.pad(weight, (0, groups * bi - in_features, 0, rows * bo - out_features))
    return weight.reshape(rows, bo, groups, bi)


def _check_features(where: str, name: str, size: int) -> None:
    if not isinstance(size, int) or not 1 <= size < 2**31:
        raise ValueError(f"{where}: {name} must be an int in [1, 2^31) (got {describe(size)})")


def _check_index(name: str, tensor: Tensor, size: int | None, rule: str) -> None:
    if not isinstance(tensor, Tensor) or tensor.dtype != torch.int32:
        got = tensor.dtype if isinstance(tensor, Tensor) else type(tensor).__name__
        raise TypeError(f"BlockLayout: {name} must be an int32 tensor (got {got})")
    if tensor.is_meta:
        raise ValueError(
            f"BlockLayout: {name} must hold numbers "
            "(got a tensor on the meta device, which has none)"
        )
    if tensor.dim() != 1 or (size is not None and tensor.numel() != size):
        expected = f"[{size}]" + (f", {rule}" if rule else "") if size is not None else "[nnzb]"
        raise ValueError(f"BlockLayout: {name} must be {expected} (got shape {list(tensor.shape)})")


def _check_row_ptr(row_ptr: Tensor, nnzb: int) -> None:
    first, last = int(row_ptr[0]), int(row_ptr[-1])
    if first != 0:
        raise ValueError(f"BlockLayout: row_ptr[0] must be 0 (got {first})")
    falls = (row_ptr.diff() < 0).nonzero()
    if falls.numel():
        r = int(falls[0])
        raise ValueError(
            f"BlockLayout: row_ptr must not decrease (got row_ptr[{r}] = {int(row_ptr[r])} and "
            f"row_ptr[{r + 1}] = {int(row_ptr[r + 1])})"
        )
    if last != nnzb:
        raise ValueError(
            f"BlockLayout: row_ptr must end at the number of stored blocks (got "
            f"row_ptr[{row_ptr.numel() - 1}] = {last} and {nnzb} elements in col_idx)"
        )


def _check_col_idx(block_rows: Tensor, col_idx: Tensor, groups: int) -> None:
    outside = ((col_idx < 0) | (col_idx >= groups)).nonzero()
    if outside.numel():
        i = int(outside[0])
        raise ValueError(
            f"BlockLayout: col_idx[{i}] must be in [0, {groups}), the column groups "
            f"(got {int(col_idx[i])})"
        )
    wrong = ((block_rows[1:] == block_rows[:-1]) & (col_idx[1:] <= col_idx[:-1])).nonzero()
    if wrong.numel():
        i = int(wrong[0]) + 1
        raise ValueError(
            "BlockLayout: col_idx must ascend strictly within a block row (got "
            f"col_idx[{i - 1}] = {int(col_idx[i - 1])} and col_idx[{i}] = {int(col_idx[i])} in "
            f"block row {int(block_rows[i])})"
        )


def _check_permutation(name: str, perm: Tensor, size: int) -> bool:
    """Raise unless each index occurs once; True if the permutation is the identity."""
    _check_index(name, perm, size, "")
    outside = ((perm < 0) | (perm >= size)).nonzero()
    if outside.numel():
        i = int(outside[0])
        raise ValueError(f"BlockLayout: {name}[{i}] must be in [0, {size}) (got {int(perm[i])})")
    counts = perm.long().bincount(minlength=size)
    if bool((counts != 1).any()):
        twice, never = int(counts.argmax()), int((counts == 0).nonzero()[0])
        raise ValueError(
            f"BlockLayout: {name} must hold each index once (got {twice} {int(counts[twice])} "
            f"times and {never} never)"
        )
    return bool((perm == torch.arange(size, device=perm.device)).all())


def _import_scipy(where: str) -> Any:
    try:
        import scipy.sparse as sparse
    except ImportError as error:
        raise ImportError(
            f"{where} needs scipy: pip install 'tetris[bench]', or scipy itself"
        ) from error
    return sparse
