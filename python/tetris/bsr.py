"""Layouts and values to and from the block-sparse matrices of torch and scipy."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .checks import check_flags, describe
from .invariants import check_values

if TYPE_CHECKING:
    from scipy.sparse import bsr_matrix

    from .layout import BlockLayout


Index = tuple[tuple[int, int], int, int, Tensor, Tensor]
"""block, out_features, in_features, row_ptr, col_idx."""


def to_torch(layout: BlockLayout, values: Tensor, packed: bool) -> Tensor:
    """See :meth:`tetris.BlockLayout.to_sparse_bsr`."""
    shape = _shape(layout, "to_sparse_bsr", values, packed)
    return torch.sparse_bsr_tensor(
        layout.row_ptr.clone(),
        layout.col_idx.clone(),
        values.detach().transpose(1, 2).clone(memory_format=torch.contiguous_format),
        shape,
        check_invariants=False,  # a layout has been checked
    )


def from_torch(tensor: Tensor) -> tuple[Index, Tensor]:
    """Index and values; see :meth:`tetris.BlockLayout.from_sparse_bsr`."""
    where = "BlockLayout.from_sparse_bsr"
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{where}: a sparse BSR tensor is needed (got {describe(tensor)})")
    if tensor.layout != torch.sparse_bsr or tensor.dim() != 2:
        raise ValueError(
            f"{where}: a two-dimensional sparse BSR tensor is needed "
            f"(got {tensor.layout} with {tensor.dim()} dimensions)"
        )
    blocks = tensor.values()
    index = (
        (int(blocks.shape[1]), int(blocks.shape[2])),
        tensor.shape[0],
        tensor.shape[1],
        tensor.crow_indices().to(torch.int32, copy=True),
        tensor.col_indices().to(torch.int32, copy=True),
    )
    return index, blocks.transpose(1, 2).clone(memory_format=torch.contiguous_format)


def to_scipy(layout: BlockLayout, values: Tensor, packed: bool) -> bsr_matrix:
    """See :meth:`tetris.BlockLayout.to_scipy_bsr`."""
    sparse = _import_scipy("BlockLayout.to_scipy_bsr")
    shape = _shape(layout, "to_scipy_bsr", values, packed)
    if values.dtype in (torch.float16, torch.bfloat16):
        raise ValueError(
            "BlockLayout.to_scipy_bsr: values must be float32 or float64, scipy has no half "
            f"precision (got {values.dtype}); convert with .float() first"
        )
    # Copies: scipy sorts and sums in place.
    data = values.detach().cpu().transpose(1, 2).numpy().copy("C")
    indices, indptr = layout.col_idx.cpu().numpy().copy(), layout.row_ptr.cpu().numpy().copy()
    return sparse.bsr_matrix((data, indices, indptr), shape=shape, blocksize=layout.block)


def from_scipy(matrix: bsr_matrix) -> tuple[Index, Tensor]:
    """Index and values; see :meth:`tetris.BlockLayout.from_scipy_bsr`."""
    sparse = _import_scipy("BlockLayout.from_scipy_bsr")
    if not sparse.issparse(matrix) or matrix.format != "bsr":
        raise TypeError(
            "BlockLayout.from_scipy_bsr: a scipy.sparse BSR matrix is needed "
            f"(got {type(matrix).__name__})"
        )
    tidy: Any = sparse.bsr_matrix(matrix, copy=True)
    tidy.sum_duplicates()
    tidy.sort_indices()
    index = (
        tidy.blocksize,
        int(tidy.shape[0]),
        int(tidy.shape[1]),
        torch.from_numpy(tidy.indptr.astype("int32")),
        torch.from_numpy(tidy.indices.astype("int32")),
    )
    return index, torch.from_numpy(tidy.data.copy()).transpose(1, 2).contiguous()


def _shape(layout: BlockLayout, function: str, values: Tensor, packed: bool) -> tuple[int, int]:
    where = f"BlockLayout.{function}"
    check_flags(where, packed=packed)
    bo, bi = layout.block
    check_values(function, values, layout.nnz_blocks, layout.block)
    rows, columns = layout.block_grid
    shape = (rows * bo, columns * bi)
    if packed:
        return shape
    if layout.kernel_size is not None:
        raise ValueError(
            f"{where}: BSR is a matrix format, this is the layout of a convolution "
            f"(weight {layout.blocking}); pass packed=True for the matrix of its packed rows, "
            f"{shape[0]}x{shape[1]}, or unpack(values) for the dense weight"
        )
    if layout.row_perm is not None or layout.col_perm is not None:
        raise ValueError(
            f"{where}: BSR cannot express the permutations of this layout; pass "
            "packed=True for the matrix in packed order, or search with reorder=False"
        )
    if shape != (layout.out_features, layout.in_features):
        raise ValueError(
            f"{where}: BSR needs blocks that divide the matrix (got {bo}x{bi} "
            f"and {layout.out_features}x{layout.in_features}); pass packed=True for one padded to "
            f"{shape[0]}x{shape[1]}"
        )
    return shape


def _import_scipy(where: str) -> Any:
    try:
        import scipy.sparse as sparse
    except ImportError as error:
        raise ImportError(
            f"{where} needs scipy: pip install 'tetris[bench]', or scipy itself"
        ) from error
    return sparse
