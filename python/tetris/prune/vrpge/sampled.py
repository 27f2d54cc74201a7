"""A layer that holds all blocks of its weight and computes with some of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ...layout import BlockLayout
from ...nn.base import make_sparse
from ...nn.kinds import DenseLayer, sparse_type
from .gates import Gates, Part
from .rows import Scratch


@dataclass(frozen=True)
class Index:
    """Some blocks of a layer as the kernels take them.

    Attributes:
        blocks: int64[nnzb], ascending: which of all blocks.
        row_ptr: int32[G + 1].
        col_idx: int32[nnzb].
    """

    blocks: Tensor
    row_ptr: Tensor
    col_idx: Tensor


_NOTHING = nn.Parameter(torch.empty(0, 1, 1))


class SampledLayer(nn.Module):
    """Stands for a dense layer while masks are sampled: all blocks stored, some computed with.

    Forward and backward run on the sparse kernels. In training mode they take the blocks and values
    that :meth:`use` was given; otherwise those that ``kept`` returns.

    Args:
        layer: The dense layer, whose Parameters this one takes. That of its weight must hold blocks
            by now, ``whole.pack(weight)``.
        whole: Layout that stores all blocks, with the permutations.
        kept: Returns the blocks to use outside :meth:`use`.

    Attributes:
        weight: Parameter [G * C, bi, bo], the blocks in the order of the layout.
        bias: Parameter [out] or None.
        whole: As passed.
        runs: Forward passes since :meth:`use`.
    """

    weight: nn.Parameter
    bias: nn.Parameter | None

    def __init__(self, layer: DenseLayer, whole: BlockLayout, kept: Callable[[], Index]) -> None:
        super().__init__()
        rows, columns = whole.block_grid
        self.whole = whole
        self.runs = 0
        self._kept = kept
        self._bounds = torch.arange(rows + 1) * columns
        self._columns = torch.arange(columns, dtype=torch.int32).repeat(rows)
        # In a tuple, for it is no submodule: its Parameters are those of this layer.
        self._runner = (make_sparse(sparse_type(layer), layer, whole, bias=None, values=_NOTHING),)
        self._scratch = Scratch()
        self._use: tuple[Index, Tensor] | None = None
        self.weight = layer.weight  # type: ignore[assignment]
        self.bias = layer.bias  # type: ignore[assignment]
        self.train(layer.training)

    def index(self, mask: Tensor) -> Index:
        """Index of the blocks that are True in bool[G * C]."""
        blocks = mask.nonzero().squeeze(1)
        row_ptr = torch.searchsorted(blocks, self._bounds, out_int32=True)
        return Index(blocks, row_ptr, self._columns.index_select(0, blocks))

    def use(self, index: Index, rows: Tensor) -> Tensor:
        """Compute with these blocks in training mode, until :meth:`rest`.

        Args:
            index: The blocks.
            rows: int64[nnzb], where they are in the weight, which may have been cut to some.

        Returns:
            [nnzb, bi, bo], the values that the layer computes with: a leaf, whose gradient autograd
            fills in. They are overwritten by the next call.
        """
        values = self._scratch.gather("values", self.weight.detach(), rows)
        values.requires_grad_(self.weight.requires_grad)
        self._use = index, values
        self.runs = 0
        return values

    def rest(self) -> None:
        """Compute with what is kept again."""
        self._use = None

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """What the dense layer returns, with absent blocks zero."""
        if self._use is not None:
            if not self.training:
                raise RuntimeError(
                    "SampledLayer: masks are drawn in training mode only; call model.train() "
                    "before pruner.backward()"
                )
            index, values = self._use
            self.runs += 1
        elif len(self.weight) != self.whole.nnz_blocks:
            raise RuntimeError(
                "SampledLayer: between pruner.backward() and pruner.step() the weight holds the "
                f"drawn blocks only ({len(self.weight)} of {self.whole.nnz_blocks}); run the "
                "model after pruner.step()"
            )
        else:
            index = self._kept()
            values = self.weight.index_select(0, index.blocks)
        (run,) = self._runner
        run._parameters["values"] = values  # type: ignore[assignment]
        run._parameters["bias"] = self.bias
        run._buffers["row_ptr"], run._buffers["col_idx"] = index.row_ptr, index.col_idx
        try:
            return run(*args, **kwargs)
        finally:
            run._parameters["values"] = _NOTHING  # a copy of the model must not meet a graph
            run._parameters["bias"] = None

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        bo, bi = self.whole.block
        return f"{self.whole.blocking}, block={bo}x{bi}, blocks={self.whole.nnz_blocks}"


class TopBlocks:
    """The blocks that the layers compute with when no mask is sampled, found when needed.

    All layers hold it, and copies of a model a copy, which then stays as it is.

    Attributes:
        gates: Of all layers.
        parts: name -> a layer's.
        layers: name -> layer.
        version: To be changed whenever gates are.
    """

    def __init__(self, gates: Gates, parts: dict[str, Part]) -> None:
        self.gates = gates
        self.parts = parts
        self.layers: dict[str, SampledLayer] = {}
        self.version = 0
        self._found: tuple[tuple[int, ...], dict[str, Index]] | None = None

    def index(self, name: str) -> Index:
        """The blocks of a layer."""
        key = (self.version, *(layer.weight._version for layer in self.layers.values()))
        if self._found is None or self._found[0] != key:
            masks = self.masks()
            self._found = key, {n: layer.index(masks[n]) for n, layer in self.layers.items()}
        return self._found[1][name]

    @torch.no_grad()
    def masks(self) -> dict[str, Tensor]:
        """Name -> bool[G * C], True for the largest gates within the budgets.

        Among equal gates those with heavier blocks come first, by their mean square in units of
        the layer's.
        """
        worth = torch.empty_like(self.gates.s)
        for name, part in self.parts.items():
            squares = self.layers[name].weight.double().square().sum((1, 2))
            worth[part.gates] = part.per_atom(squares / squares.mean().clamp_min(1e-300))
        floors = [
            (part.gates, self.layers[name].whole.block_grid[0])
            for name, part in self.parts.items()
            if part.keep_rows
        ]
        keep = self.gates.top(worth, floors)
        return {name: part.blocks(keep) for name, part in self.parts.items()}
