"""One layer that trains with a masked weight."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from ..blocking import Blocking, swap_channels
from ..invariants import check_permutation
from ..layout import BlockLayout
from ..modules import unparametrize
from ..nn.kinds import DenseLayer, is_transposed
from ..parameters import check_zeros, clear_states
from ..sharding import check_whole, fill

BEFORE = "let layers be masked or sparse first, then fully_shard the model (docs/distributed.md)"
GATHER = (
    "load the full state dict into a model and a pruner that are not sharded, and end there "
    "(docs/distributed.md)"
)


class BlockMask(nn.Module):
    """Parametrization that zeroes the blocks of a weight which are not kept.

    One bool per block and two permutations are its whole state; the element mask is expanded from
    them when they change.

    Args:
        layout: What is kept.
        transposed: The weight has its inputs first, as that of a transposed convolution,
            ``[in, out / groups, kh, kw]``.

    Attributes:
        block_mask: bool[G, C] buffer in packed order, True is kept.
        row_perm: int32[out] buffer, original output of each packed slot.
        col_perm: int32[in] buffer, the same for inputs.

    Example:
        >>> layout = tetris.BlockLayout.from_dense(weight, (8, 8), sparsity=0.75)
        >>> torch.equal(BlockMask(layout)(weight), weight * layout.mask())
        True
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
        """bool, shaped like the weight, in original order; do not change it.

        Raises:
            ValueError: a permutation is none: the mask was averaged with others.
        """
        buffers = (self.block_mask, self.row_perm, self.col_perm)
        if torch.compiler.is_compiling():
            return self._expand()
        if any(b.is_inference() for b in buffers):  # which have no versions
            if not self.block_mask.is_cuda:  # where looking waits for the device, at every call
                self._check()
            return self._expand()
        versions = tuple(b._version for b in buffers)
        # Kept with the tensors it was made of: identity and version tell whether it still holds.
        kept = self._expanded
        if (
            kept is None
            or kept[1] != versions
            or any(a is not b for a, b in zip(kept[0], buffers, strict=True))
        ):
            self._check()
            self._expanded = kept = (buffers, versions, self._expand())
        return kept[2]

    def _check(self) -> None:
        """Raise ValueError unless the permutations are such, which others than pruners can change.

        Left unchecked, they give some mask or other without a word.
        """
        if self.block_mask.is_meta:
            return
        sizes = self._blocking
        try:
            check_permutation("row_perm", self.row_perm, sizes.out_features, sizes.groups)
            check_permutation("col_perm", self.col_perm, sizes.in_features, sizes.groups)
        except ValueError as error:
            raise ValueError(
                f"{error}; an average of masked models (EMA) must copy index buffers, not average "
                "them, as AveragedModel(..., use_buffers=False) does (docs/training.md)"
            ) from None

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


class MaskedWeight:
    """A layer that is as it was until something is kept, and masked from then on.

    Attributes:
        module: The layer.
        block: (bo, bi).
    """

    def __init__(self, layer: DenseLayer, layout: BlockLayout) -> None:
        self.module = layer
        self.block = layout.block
        self._whole = layout  # while there is no mask
        self._mask: BlockMask | None = None
        self._refusal: RemovableHandle | None = None  # of dense states, while there is a mask

    @property
    def parameter(self) -> nn.Parameter:
        """The Parameter behind the weight."""
        if self._mask is None:
            return self.module.weight  # type: ignore[return-value]
        return self.module.parametrizations.weight.original  # type: ignore[union-attr,return-value]

    def layout(self) -> BlockLayout:
        """What is kept."""
        return self._whole if self._mask is None else self._mask.layout()

    def state_dict(self) -> dict[str, Tensor]:
        """Whether there is no mask, and the mask."""
        mask = {} if self._mask is None else dict(self._mask.named_buffers())
        return {"dense": torch.tensor(self._mask is None), **mask}

    def saved_layout(self, saved: Mapping[str, Tensor]) -> BlockLayout:
        """The layout that a saved state of this layer stands for."""
        if "block_mask" not in saved:
            return self._whole
        return BlockMask(self._whole).saved_layout(saved)

    def changes(self, layout: BlockLayout, dense: bool | None = None) -> bool:
        """Whether :meth:`set` might change something."""
        return True

    def check(self, where: str, optimizers: tuple[Optimizer, ...], trained: bool) -> None:
        """Raise unless the layer can be changed: a mask can, but none can be added to shards."""
        if self._mask is None:
            check_whole(where, [self.parameter], BEFORE)
        for optimizer in optimizers:
            check_zeros(where, self.parameter, optimizer)

    def check_unset(self, where: str, optimizers: tuple[Optimizer, ...]) -> None:
        """Raise unless the layer can be dense again."""
        check_whole(where, [self.parameter], GATHER)

    @torch.no_grad()
    def set(
        self,
        layout: BlockLayout,
        optimizers: tuple[Optimizer, ...] = (),
        dense: bool | None = None,
    ) -> None:
        """Keep what a layout of the same block and sizes says; with ``dense``, have no mask.

        What these optimizers keep of weights that come back starts at zero, as the weights do.
        """
        if dense:
            self.unset()
        elif self._mask is None:
            layout = layout.to(self.module.weight.device)
            mask = BlockMask(layout, transposed=is_transposed(self.module))
            parametrize.register_parametrization(self.module, "weight", mask)
            self._mask = mask
            self._refusal = self.module.register_load_state_dict_pre_hook(_refuse_dense)
        else:
            self.apply()  # what comes back is zero, not what the last optimizer step made of it
            before = self._mask.element_mask()
            self._mask.set(layout)
            clear_states(self.parameter, self._mask.element_mask() & ~before, optimizers)

    @torch.no_grad()
    def apply(self) -> None:
        """Zero the masked numbers of the Parameter, which optimizers have moved."""
        if self._mask is not None:
            fill(self.parameter, ~self._mask.element_mask(), 0.0)

    def unset(self, optimizers: tuple[Optimizer, ...] = (), *, masked: bool = True) -> None:
        """End the parametrization, with the masked weight or the original one."""
        if self._mask is None:
            return
        check_whole("tetris.prune", [self.parameter], GATHER)
        unparametrize(self.module, "weight", leave_parametrized=masked)
        self._mask = None
        if self._refusal is not None:
            self._refusal.remove()
            self._refusal = None


def _refuse_dense(layer: nn.Module, state: Mapping[str, Any], prefix: str, *others: Any) -> None:
    """Say what to do where a masked layer gets the weight of a dense one.

    A hook of the layer: a mask sees no more of the state than its own part, so that it cannot tell
    a dense layer from one that the state is not of, as with ``strict=False``.
    """
    error_msgs: list[str] = others[-1]
    if prefix + "weight" in state and parametrize.is_parametrized(layer, "weight"):
        error_msgs.append(
            f"layer {prefix.rstrip('.') or '(root)'} is masked by a pruner, and the state has no "
            "mask for it. To resume, load the pruner's state before the model's "
            "(docs/training.md); a dense state goes into the model before the pruner is made"
        )
