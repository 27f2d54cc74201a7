"""BlockLayout: which blocks of a weight are stored, and in which order.

A weight ``W[out, in]`` is looked at through two permutations that gather, ``W[row_perm][:,
col_perm]``, and cut into blocks of ``bo x bi``; a convolution's ``W[out, in / groups, kh, kw]`` at
each kernel position. The blocks worth keeping are stored, the others are zero. A layout says which
are which; the numbers are a separate tensor, ``values[nnzb, bi, bo]``, made by
:meth:`BlockLayout.pack`.
"""

from __future__ import annotations

from dataclasses import dataclass
from os import PathLike
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional as F

from . import bsr
from .blocking import Blocking
from .checks import check_block, check_groups, check_keywords, check_tensor, describe
from .importance import Importance as Importance
from .importance import saliency_or_weight
from .invariants import (
    check_col_idx,
    check_features,
    check_index,
    check_kernel,
    check_permutation,
    check_row_ptr,
    check_values,
)
from .layout_search import Reorder as Reorder
from .layout_search import SearchOptions as SearchOptions
from .layout_search import search_blocks
from .reorder import SearchResult

if TYPE_CHECKING:
    from scipy.sparse import bsr_matrix
    from typing_extensions import Unpack


class _SearchKeywords(SearchOptions, total=False):
    progress: bool
    absolute: bool


@dataclass(frozen=True, eq=False, repr=False)
class BlockLayout:
    """The stored blocks of one weight, and the two permutations they are cut under.

    Attributes:
        block: (bo, bi), block height along out and width along in, each from 1 to 128.
        out_features: Outputs: rows of the weight; of a convolution its output channels.
        in_features: Inputs: columns of the weight; of a convolution its input channels, of all
            groups.
        row_ptr: int32[G + 1], G = ceil(out / bo): block row g holds the stored blocks
            ``row_ptr[g] .. row_ptr[g + 1] - 1``.
        col_idx: int32[nnzb], column group of each stored block, strictly ascending in a block row.
        row_perm: int32[out], packed slot s holds original output ``row_perm[s]``; None is the
            identity, and an identity that is passed is stored as None.
        col_perm: int32[in], the same for inputs.
        kernel_size: None for a matrix; (k,) or (kh, kw) for a convolution, whose blocks lie at
            single kernel positions: the column group of inputs ``g * bi ..`` at (ky, kx) is
            ``(ky * kw + kx) * ceil(in / bi) + g``.
        groups: Groups of a convolution. Each is cut for itself: its block rows,
            ``ceil(out / groups / bo)``, follow those of the group before, its column groups count
            its own inputs, and permutations stay within it.

    The last block row and column group (of each group) may be ragged: their missing entries are
    zero in ``values`` and stand for nothing. Layouts are immutable, compare and hash by content
    (wherever they live) and check themselves when made; they copy the index tensors they are given.

    A transposed convolution's weight is ``[in, out / groups, kh, kw]``; its layout is that of
    ``[out, in / groups, kh, kw]``, kernel positions as they are.

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
    kernel_size: tuple[int, ...] | None = None
    groups: int = 1

    def __post_init__(self) -> None:
        object.__setattr__(self, "block", check_block("BlockLayout", self.block))
        _check_sizes(
            "BlockLayout", self.out_features, self.in_features, self.kernel_size, self.groups
        )
        rows, columns = self.block_grid
        rule = f"ceil({self.out_features // self.groups} / {self.block[0]}) + 1"
        if self.groups > 1:
            rule = f"{self.groups} * {rule}"
        check_index("row_ptr", self.row_ptr, rows + 1, rule)
        check_index("col_idx", self.col_idx, None, "")
        check_row_ptr(self.row_ptr, self.nnz_blocks)
        check_col_idx(self._block_rows(), self.col_idx, columns)
        for name, size in (("row_perm", self.out_features), ("col_perm", self.in_features)):
            perm = getattr(self, name)
            if perm is not None and check_permutation(name, perm, size, self.groups):
                object.__setattr__(self, name, None)
        # Copies: whoever passed them, such as a module its buffers, may write into them. Ordinary
        # tensors in inference mode too: autograd refuses to keep those that are made in it.
        with torch.inference_mode(False):
            for name in ("row_ptr", "col_idx", "row_perm", "col_perm"):
                index = getattr(self, name)
                object.__setattr__(self, name, None if index is None else index.clone())

    # -- making one ---------------------------------------------------------------------------

    @classmethod
    def from_dense(
        cls,
        weight: Tensor,
        block: tuple[int, int],
        sparsity: float,
        *,
        groups: int = 1,
        importance: Importance | None = None,
        progress: bool = False,
        **search: Unpack[SearchOptions],
    ) -> BlockLayout:
        """Search for the permutations and blocks that keep the most of a dense weight.

        Args:
            weight: [out, in], or [out, in / groups, k] or [out, in / groups, kh, kw] of a
                convolution; any floating type.
            block: (bo, bi).
            sparsity: Share of *blocks* to remove, in [0, 1]: ``floor(sparsity * blocks)`` go.
            groups: Groups of a convolution; each is searched for itself, at this sparsity.
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
            tie_kernel: Of a convolution, keep or remove all kernel positions of a block of
                channels together, as TETRIS does. Otherwise each position has blocks of its own,
                which retains more.

        Returns:
            The layout, on the weight's device.

        Raises:
            TypeError: the weight is no tensor.
            ValueError: a shape, a sparsity or an importance that breaks a rule.
        """
        where = "BlockLayout.from_dense"
        Blocking.of(where, "weight", weight, check_block(where, block), groups)
        saliency, absolute = saliency_or_weight(where, weight, importance)
        check_keywords(where, search, SearchOptions.__annotations__)
        layout, _ = search_layout(
            where,
            saliency,
            block,
            sparsity,
            groups=groups,
            progress=progress,
            absolute=absolute,
            **search,
        )
        return layout.to(weight.device)

    @classmethod
    def from_mask(
        cls,
        mask: Tensor,
        block: tuple[int, int],
        *,
        row_perm: Tensor | None = None,
        col_perm: Tensor | None = None,
        groups: int = 1,
    ) -> BlockLayout:
        """Store every block that holds at least one True of an element mask.

        Args:
            mask: bool[out, in], or [out, in / groups, *kernel] of a convolution; original order.
            block: (bo, bi).
            row_perm: int32[out] or None, the permutations the blocks are cut under.
            col_perm: int32[in] or None.
            groups: Groups of a convolution.

        Returns:
            The smallest layout whose :meth:`mask` covers the given one.
        """
        where = "BlockLayout.from_mask"
        blocking = Blocking.of(where, "mask", mask, check_block(where, block), groups)
        if mask.dtype != torch.bool:
            raise TypeError(f"{where}: mask must be bool (got {mask.dtype}); compare it with 0")
        for name, perm, size in (
            ("row_perm", row_perm, blocking.out_features),
            ("col_perm", col_perm, blocking.in_features),
        ):
            if perm is not None:
                check_permutation(name, perm, size, groups)
        return cls.from_block_mask(
            blocking.split(mask, row_perm, col_perm).any(dim=3).any(dim=1),
            blocking.block,
            blocking.out_features,
            blocking.in_features,
            row_perm,
            col_perm,
            kernel_size=blocking.kernel_size,
            groups=groups,
        )

    @classmethod
    def from_block_mask(
        cls,
        block_mask: Tensor,
        block: tuple[int, int],
        out_features: int,
        in_features: int,
        row_perm: Tensor | None = None,
        col_perm: Tensor | None = None,
        *,
        kernel_size: tuple[int, ...] | None = None,
        groups: int = 1,
    ) -> BlockLayout:
        """Store the blocks that are True in a mask over blocks.

        Args:
            block_mask: bool[G, C] in packed order, True is stored: [ceil(out / bo),
                ceil(in / bi)], or :attr:`block_grid` of a convolution.
            block: (bo, bi).
            out_features: out.
            in_features: in.
            row_perm: int32[out] or None.
            col_perm: int32[in] or None.
            kernel_size: None, or (k,) or (kh, kw) of a convolution.
            groups: Groups of a convolution.
        """
        where = "BlockLayout.from_block_mask"
        block = check_block(where, block)
        _check_sizes(where, out_features, in_features, kernel_size, groups)
        blocking = Blocking(block, out_features, in_features, kernel_size, groups)
        check_tensor(where, "block_mask", block_mask)
        if block_mask.dtype != torch.bool or tuple(block_mask.shape) != blocking.grid:
            raise ValueError(
                f"{where}: block_mask must be bool{list(blocking.grid)}, the blocks of "
                f"{block[0]}x{block[1]} in {blocking} "
                f"(got {block_mask.dtype}{list(block_mask.shape)})"
            )
        # Not mask.sum(1), which takes eight bytes for each block of the matrix.
        rows, columns = block_mask.nonzero().unbind(1)
        counts = rows.bincount(minlength=blocking.grid[0])
        row_ptr = F.pad(counts.cumsum(0), (1, 0)).to(torch.int32)
        col_idx = columns.to(torch.int32)
        return cls(
            block,
            out_features,
            in_features,
            row_ptr,
            col_idx,
            row_perm,
            col_perm,
            kernel_size,
            groups,
        )

    def with_blocks(self, block_mask: Tensor) -> BlockLayout:
        """The layout with other blocks stored, under the same sizes and permutations.

        Args:
            block_mask: bool, shaped like :meth:`block_mask`, True is stored.

        Example:
            >>> kept = layout.block_mask()
            >>> kept[0] = True                      # all blocks of the first block row
            >>> more = layout.with_blocks(kept)
        """
        return BlockLayout.from_block_mask(
            block_mask,
            self.block,
            self.out_features,
            self.in_features,
            self.row_perm,
            self.col_perm,
            kernel_size=self.kernel_size,
            groups=self.groups,
        )

    # -- numbers ------------------------------------------------------------------------------

    @property
    def blocking(self) -> Blocking:
        """The sizes alone."""
        return Blocking(
            self.block, self.out_features, self.in_features, self.kernel_size, self.groups
        )

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the dense weight: (out, in / groups, *kernel_size)."""
        return self.blocking.weight_shape

    @property
    def block_grid(self) -> tuple[int, int]:
        """(G, C): block rows ceil(out / bo) and column groups ceil(in / bi).

        Of a convolution ``groups * ceil(out / groups / bo)`` and
        ``kh * kw * ceil(in / groups / bi)``.
        """
        return self.blocking.grid

    @property
    def nnz_blocks(self) -> int:
        """Stored blocks, nnzb."""
        return self.col_idx.numel()

    @property
    def stored_values(self) -> int:
        """Numbers stored, nnzb * bo * bi, padding included: what memory and time follow."""
        return self.nnz_blocks * self.block[0] * self.block[1]

    @property
    def stored_weights(self) -> int:
        """Weights that are stored: :attr:`stored_values` without the padding."""
        rows, columns = self.blocking.extents()
        heights = rows.repeat_interleave(self.row_ptr.diff().cpu())
        return int((heights * columns[self.col_idx.cpu()]).sum())

    @property
    def density(self) -> float:
        """Stored share of the blocks."""
        rows, columns = self.block_grid
        return self.nnz_blocks / (rows * columns)

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
            weight: [out, in] or [out, in / groups, *kernel], any type.

        Returns:
            [nnzb, bi, bo], ``values[b][k][r]`` is input k, output r of block b; entries beyond the
            edge of the weight are zero. Differentiable.
        """
        check_tensor("BlockLayout.pack", "weight", weight)
        if tuple(weight.shape) != self.weight_shape:
            names = "[out, in]" if self.kernel_size is None else "[out, in / groups, *kernel_size]"
            raise ValueError(
                f"BlockLayout.pack: weight must be {names} = {list(self.weight_shape)} "
                f"(got {list(weight.shape)})"
            )
        if self.blocking.in_one_run(weight) or (weight.requires_grad and torch.is_grad_enabled()):
            # Runs would each have a gradient of the weight's size.
            blocks = self.blocking.split(weight, self.row_perm, self.col_perm)
            stored = blocks.permute(0, 2, 3, 1)[self._block_rows(), self.col_idx.long()]
        else:
            stored = self._pack_runs(weight)
        # By way of one dimension: the strides of dimensions of size one would be arbitrary, and
        # DistributedDataParallel compares them with the gradient's.
        return stored.contiguous().flatten().view(stored.shape)

    def _pack_runs(self, weight: Tensor) -> Tensor:
        """Stored blocks of a large weight, without a copy of it in packed order."""
        bo, bi = self.block
        stored = weight.new_empty((self.nnz_blocks, bi, bo))
        first = 0
        for sizes, rows in self.blocking.runs(weight, self.row_perm):
            last = first + sizes.grid[0]
            row_ptr = self.row_ptr[first : last + 1]
            own = slice(int(row_ptr[0]), int(row_ptr[-1]))
            at = _block_rows(row_ptr, own.stop - own.start), self.col_idx[own].long()
            stored[own] = sizes.split(rows, None, self.col_perm).permute(0, 2, 3, 1)[at]
            first = last
        return stored

    def unpack(self, values: Tensor) -> Tensor:
        """Dense weight that stored blocks stand for: the inverse of :meth:`pack`.

        Args:
            values: [nnzb, bi, bo], any type.

        Returns:
            [out, in] or [out, in / groups, *kernel] in original order, zero where nothing is
            stored. Differentiable.
        """
        bo, bi = self.block
        check_values("unpack", values, self.nnz_blocks, self.block)
        blocks = values.new_zeros((*self.block_grid, bi, bo))
        blocks = blocks.index_put((self._block_rows(), self.col_idx.long()), values)
        return self.blocking.join(blocks.permute(0, 3, 1, 2), self.row_perm, self.col_perm)

    def mask(self) -> Tensor:
        """bool, shaped like the weight, in original order: True where a weight is stored."""
        bo, bi = self.block
        return self.unpack(
            torch.ones((self.nnz_blocks, bi, bo), dtype=torch.bool, device=self.device)
        )

    @property
    def index(self) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
        """(row_ptr, col_idx, row_perm, col_perm), as the ops take them."""
        return self.row_ptr, self.col_idx, self.row_perm, self.col_perm

    def block_mask(self) -> Tensor:
        """bool[G, C] in packed order: True where a block is stored."""
        mask = torch.zeros(self.block_grid, dtype=torch.bool, device=self.device)
        mask[self._block_rows(), self.col_idx.long()] = True
        return mask

    def _block_rows(self) -> Tensor:
        """int64[nnzb], block row of each stored block."""
        return _block_rows(self.row_ptr, self.nnz_blocks)

    # -- other formats ------------------------------------------------------------------------

    def to_sparse_bsr(self, values: Tensor, *, packed: bool = False) -> Tensor:
        """The weight as a torch sparse BSR tensor.

        Args:
            values: [nnzb, bi, bo].
            packed: BSR knows neither permutations, ragged edges nor kernels. With False, a layout
                that has one raises. With True the result is the *packed* matrix: rows and columns
                in packed order, padded with zeros to whole blocks, [G * bo, C * bi].

        Returns:
            Sparse BSR tensor with blocks of (bo, bi).
        """
        return bsr.to_torch(self, values, packed)

    @classmethod
    def from_sparse_bsr(cls, tensor: Tensor) -> tuple[BlockLayout, Tensor]:
        """Layout and values of a torch sparse BSR matrix, without permutations.

        Args:
            tensor: Sparse BSR, two-dimensional.

        Returns:
            The layout and its values [nnzb, bi, bo], in the tensor's type.
        """
        index, values = bsr.from_torch(tensor)
        return cls(*index), values

    def to_scipy_bsr(self, values: Tensor, *, packed: bool = False) -> bsr_matrix:
        """The weight as a ``scipy.sparse.bsr_matrix``; rules as in :meth:`to_sparse_bsr`."""
        return bsr.to_scipy(self, values, packed)

    @classmethod
    def from_scipy_bsr(cls, matrix: bsr_matrix) -> tuple[BlockLayout, Tensor]:
        """Layout and values of a ``scipy.sparse`` BSR matrix, without permutations.

        Duplicate blocks are summed and blocks are sorted; the matrix passed is not changed.
        """
        index, values = bsr.from_scipy(matrix)
        return cls(*index), values

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
            self.kernel_size,
            self.groups,
        )

    def plot(self, path: str | PathLike[str], weight: Tensor | None = None) -> None:
        """Save a picture: kept weights in original order, and as blocks in packed order.

        Args:
            path: File to write; the ending chooses the format (png, svg, pdf).
            weight: The dense weight; colours kept weights by magnitude.

        Of a convolution the kernel positions stand side by side, each with the inputs of a group.

        Raises:
            ImportError: matplotlib is missing; the message names the extra to install.
            TypeError: the path is none.
        """
        from .plotting import plot_layout

        if not isinstance(path, (str, PathLike)):
            raise TypeError(
                f"BlockLayout.plot: path must name the file to write (got {describe(path)})"
            )
        if weight is not None:
            check_tensor("BlockLayout.plot", "weight", weight)
        plot_layout(self, path, weight)

    def _contents(self) -> tuple[Any, ...]:
        tensors = (self.row_ptr, self.col_idx, self.row_perm, self.col_perm)
        return (
            self.block,
            self.out_features,
            self.in_features,
            self.kernel_size,
            self.groups,
            *(None if t is None else t.cpu().numpy().tobytes() for t in tensors),
        )

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, BlockLayout):
            return NotImplemented
        return self is other or self._contents() == other._contents()

    def __hash__(self) -> int:
        return hash(self._contents())

    def __repr__(self) -> str:
        rows, columns = self.block_grid
        return (
            f"BlockLayout({self.blocking}, blocks of "
            f"{self.block[0]}x{self.block[1]}: {self.nnz_blocks} of {rows * columns} stored, "
            f"sparsity {self.sparsity:.1%}, reordered {self.reordered})"
        )

    @property
    def reordered(self) -> str:
        """Axes with a permutation: ``none``, ``rows``, ``columns`` or ``rows and columns``."""
        axes = [
            n for n, p in (("rows", self.row_perm), ("columns", self.col_perm)) if p is not None
        ]
        return " and ".join(axes) or "none"


def search_layout(
    where: str,
    saliency: Tensor,
    block: tuple[int, int],
    sparsity: float,
    *,
    groups: int = 1,
    **search: Unpack[_SearchKeywords],
) -> tuple[BlockLayout, SearchResult]:
    """Layout for a saliency [out, in / groups, *kernel], with what the search reports about it.

    Arguments as in :meth:`BlockLayout.from_dense`, and the function named in messages; with
    ``absolute``, magnitudes of the saliency count: it may be the weight. The layout is on the CPU.
    """
    blocking = Blocking.of(where, "saliency", saliency, check_block(where, block), groups)
    result = search_blocks(where, saliency, blocking, sparsity, **search)
    layout = BlockLayout.from_block_mask(
        result.mask,
        blocking.block,
        blocking.out_features,
        blocking.in_features,
        result.row_perm,
        result.col_perm,
        kernel_size=blocking.kernel_size,
        groups=groups,
    )
    return layout, result


def _block_rows(row_ptr: Tensor, count: int) -> Tensor:
    """int64[count], block row of each stored block of a few block rows, the first being 0."""
    rows = torch.arange(row_ptr.numel() - 1, device=row_ptr.device)
    return rows.repeat_interleave(row_ptr.diff().long(), output_size=count)


def _check_sizes(
    where: str, out: int, in_: int, kernel_size: tuple[int, ...] | None, groups: int
) -> None:
    check_features(where, "out_features", out)
    check_features(where, "in_features", in_)
    check_kernel(where, kernel_size)
    check_groups(where, groups, out, in_, kernel_size is not None)
