"""What a layout must be; each message names the invariant and the numbers."""

from __future__ import annotations

import torch
from torch import Tensor

from .checks import check_tensor, describe


def check_features(where: str, name: str, size: int) -> None:
    """Raise ValueError unless a number of features is one."""
    if not isinstance(size, int) or not 1 <= size < 2**31:
        raise ValueError(f"{where}: {name} must be an int in [1, 2^31) (got {describe(size)})")


def check_kernel(where: str, kernel_size: object) -> None:
    """Raise ValueError unless a kernel size is None, (k,) or (kh, kw)."""
    if kernel_size is None:
        return
    sizes = kernel_size if isinstance(kernel_size, tuple) else ()
    if len(sizes) not in (1, 2) or not all(isinstance(k, int) and k >= 1 for k in sizes):
        raise ValueError(
            f"{where}: kernel_size must be None, (k,) or (kh, kw), of ints >= 1 "
            f"(got {describe(kernel_size)})"
        )


def check_index(name: str, tensor: Tensor, size: int | None, rule: str) -> None:
    """Raise unless an index is an int32 vector, of a size that a rule gives."""
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


def check_row_ptr(row_ptr: Tensor, nnzb: int) -> None:
    """Raise ValueError unless row_ptr counts up from 0 to the stored blocks."""
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


def check_col_idx(block_rows: Tensor, col_idx: Tensor, columns: int) -> None:
    """Raise ValueError unless column groups are in range and ascend in each block row."""
    outside = ((col_idx < 0) | (col_idx >= columns)).nonzero()
    if outside.numel():
        i = int(outside[0])
        raise ValueError(
            f"BlockLayout: col_idx[{i}] must be in [0, {columns}), the column groups "
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


def check_permutation(name: str, perm: Tensor, size: int, groups: int = 1) -> bool:
    """Raise unless each index occurs once, in its group; True if it is the identity."""
    check_index(name, perm, size, "")
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
    slots = torch.arange(size, device=perm.device)
    own = size // groups
    astray = (perm // own != slots // own).nonzero()
    if astray.numel():
        i = int(astray[0])
        low = i // own * own
        raise ValueError(
            f"BlockLayout: {name}[{i}] must be in [{low}, {low + own}), the channels of its group "
            f"(got {int(perm[i])})"
        )
    return bool((perm == slots).all())


def check_values(function: str, values: Tensor, nnzb: int, block: tuple[int, int]) -> None:
    """Raise unless values are those of a layout's blocks."""
    bo, bi = block
    check_tensor(f"BlockLayout.{function}", "values", values)
    if tuple(values.shape) != (nnzb, bi, bo):
        raise ValueError(
            f"BlockLayout.{function}: values must be [nnzb, bi, bo] = [{nnzb}, {bi}, {bo}] "
            f"(got {list(values.shape)})"
        )
