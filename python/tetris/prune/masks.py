"""The mask of one layer while it trains."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ..blocking import Blocking, swap_channels
from ..layout import BlockLayout


class BlockMask(nn.Module):
    """Parametrization that zeroes the blocks of a weight which are not kept.

    One bool per block and two permutations are its whole state; the element mask is expanded from
    them when they change.

    Args:
        layout: What is kept.
        transposed: The weight is that of a transposed convolution, ``[in, out / groups, kh, kw]``.

    Attributes:
        block_mask: bool[G, C] buffer in packed order, True is kept.
        row_perm: int32[out] buffer, original output of each packed slot.
        col_perm: int32[in] buffer, the same for inputs.
    """

    block_mask: Tensor
    row_perm: Tensor
    col_perm: Tensor

    def __init__(self, layout: BlockLayout, transposed: bool = False) -> None:
        super().__init__()
        self._blocking: Blocking = layout.blocking
        self.transposed = transposed
        self._expanded: tuple[tuple[Tensor, ...], tuple[int, ...], Tensor] | None = None
        self.register_buffer("block_mask", layout.block_mask())
        for name, size in (("row_perm", layout.out_features), ("col_perm", layout.in_features)):
            perm = getattr(layout, name)
            identity = torch.arange(size, dtype=torch.int32, device=layout.device)
            self.register_buffer(name, identity if perm is None else perm.clone())

    @property
    def block(self) -> tuple[int, int]:
        """(bo, bi)."""
        return self._blocking.block

    def element_mask(self) -> Tensor:
        """bool, shaped like the weight, in original order; do not change it."""
        buffers = (self.block_mask, self.row_perm, self.col_perm)
        if torch.compiler.is_compiling() or any(b.is_inference() for b in buffers):
            return self._expand()
        versions = tuple(b._version for b in buffers)
        # Kept with the tensors it was made of: identity and version tell whether it still holds.
        kept = self._expanded
        if (
            kept is None
            or kept[1] != versions
            or any(a is not b for a, b in zip(kept[0], buffers, strict=True))
        ):
            self._expanded = kept = (buffers, versions, self._expand())
        return kept[2]

    def _expand(self) -> Tensor:
        bo, bi = self.block
        blocks = self.block_mask[:, None, :, None].expand(-1, bo, -1, bi)
        mask = self._blocking.join(blocks, self.row_perm, self.col_perm)
        return swap_channels(mask, self._blocking.groups) if self.transposed else mask

    def layout(self) -> BlockLayout:
        """The layout that stores the kept blocks."""
        return self.layout_of(self.block_mask, self.row_perm, self.col_perm)

    def layout_of(self, block_mask: Tensor, row_perm: Tensor, col_perm: Tensor) -> BlockLayout:
        """The layout that stores other blocks of this weight."""
        sizes = self._blocking
        return BlockLayout.from_block_mask(
            block_mask,
            sizes.block,
            sizes.out_features,
            sizes.in_features,
            row_perm,
            col_perm,
            kernel_size=sizes.kernel_size,
            groups=sizes.groups,
        )

    def set(self, layout: BlockLayout) -> None:
        """Keep what a layout of the same block and sizes stores."""
        fresh = BlockMask(layout)
        for name, buffer in self.named_buffers():
            buffer.copy_(getattr(fresh, name))

    def saved_layout(self, saved: Mapping[str, Tensor]) -> BlockLayout:
        """The layout that a saved state of a mask stands for."""
        return self.layout_of(saved["block_mask"], saved["row_perm"], saved["col_perm"])

    def forward(self, weight: Tensor) -> Tensor:
        """Return the weight, zero outside kept blocks (even where it is NaN)."""
        return torch.where(self.element_mask(), weight, 0.0)

    def extra_repr(self) -> str:
        """Describe the mask in one line."""
        return (
            f"block={self.block[0]}x{self.block[1]}, "
            f"blocks={int(self.block_mask.sum())}/{self.block_mask.numel()}"
        )
