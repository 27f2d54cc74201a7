"""The problems: random block-sparse layers of exact density, and dense rivals of equal shape."""

from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..blocking import removed_count
from ..timing import Candidate, prepacked_linear, rotate, unpacked_product


@dataclass(frozen=True)
class Shape:
    """One linear layer: tokens x in -> out."""

    tokens: int
    inputs: int
    outputs: int

    @classmethod
    def parse(cls, text: str) -> "Shape":
        """Reads ``512x1024x4096`` (tokens x in x out)."""
        parts = text.lower().split("x")
        if len(parts) != 3 or not all(p.isdigit() and int(p) > 0 for p in parts):
            raise ValueError(f"a shape is TOKENSxINxOUT, for example 512x1024x4096 (got {text!r})")
        return cls(*map(int, parts))

    @property
    def flops(self) -> int:
        """Of the dense product."""
        return 2 * self.tokens * self.inputs * self.outputs

    def __str__(self) -> str:
        return f"{self.tokens}x{self.inputs}x{self.outputs}"


def entries_inside(
    row_ptr: Tensor, group: Tensor, block: tuple[int, int], outputs: int, inputs: int
) -> int:
    """Stored entries that lie inside the matrix: those of ragged blocks beyond it are not computed.

    Args:
        row_ptr: int32 [block rows + 1].
        group: integer [nnzb], the group of inputs of each block.
        block: (height, width).
        outputs: Rows of the matrix.
        inputs: Columns of the matrix.
    """
    bo, bi = block
    block_row = torch.repeat_interleave(torch.diff(row_ptr).long())
    heights = (outputs - block_row * bo).clamp(max=bo)
    widths = (inputs - group.long() * bi).clamp(max=bi)
    return int((heights * widths).sum())


@dataclass(frozen=True)
class SparseLayer:
    """The five tensors of a layer, in the format of ``torch.ops.tetris.bsmm``."""

    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    row_perm: Tensor
    col_perm: Tensor
    outputs: int

    @classmethod
    def random(
        cls, inputs: int, outputs: int, block: tuple[int, int], sparsity: float, seed: int = 0
    ) -> "SparseLayer":
        """Blocks drawn uniformly, their number exact for the layer; both permutations random."""
        rng = np.random.default_rng(seed)
        bo, bi = block
        rows, columns = -(-outputs // bo), -(-inputs // bi)
        stored = rows * columns - removed_count(sparsity, rows * columns)
        kept = np.zeros(rows * columns, dtype=bool)
        kept[rng.choice(rows * columns, stored, replace=False, shuffle=False)] = True
        kept = kept.reshape(rows, columns)
        row_ptr = np.concatenate([[0], np.cumsum(kept.sum(1))]).astype(np.int32)
        scale = 1 / np.sqrt(inputs)  # results stay near 1, as in a trained network
        values = rng.standard_normal((stored, bi, bo), dtype=np.float32) * np.float32(scale)
        if outputs % bo or inputs % bi:  # entries outside the matrix are zero by contract
            block_row, group = kept.nonzero()
            inside = (group[:, None] * bi + np.arange(bi) < inputs)[:, :, None] & (
                block_row[:, None] * bo + np.arange(bo) < outputs
            )[:, None, :]
            values *= inside
        col_idx = kept.nonzero()[1]
        return cls(
            torch.from_numpy(values).clone(),  # torch's memory is aligned, numpy's starts anywhere
            torch.from_numpy(row_ptr),
            torch.from_numpy(col_idx.astype(np.int32)),
            torch.from_numpy(rng.permutation(outputs).astype(np.int32)),
            torch.from_numpy(rng.permutation(inputs).astype(np.int32)),
            outputs,
        )

    def copy(self) -> "SparseLayer":
        """The same layer elsewhere in memory."""
        return SparseLayer(
            self.values.clone(),
            self.row_ptr.clone(),
            self.col_idx.clone(),
            self.row_perm.clone(),
            self.col_perm.clone(),
            self.outputs,
        )

    @property
    def block(self) -> tuple[int, int]:
        """(height along outputs, width along inputs)."""
        return self.values.shape[2], self.values.shape[1]

    @property
    def stored_bytes(self) -> int:
        """Values and their int32 column index: what a product must at least read."""
        return 4 * (self.values.numel() + self.col_idx.numel() + self.row_ptr.numel())

    @cached_property
    def entries(self) -> int:
        """Stored entries, without the padding of ragged blocks."""
        inputs = self.col_perm.numel()
        return entries_inside(self.row_ptr, self.col_idx, self.block, self.outputs, inputs)

    @property
    def density(self) -> float:
        """Stored entries over all entries."""
        return self.entries / (self.outputs * self.col_perm.numel())

    def __call__(self, x: Tensor) -> Tensor:
        """The product under test."""
        return torch.ops.tetris.bsmm(
            x,
            self.values,
            self.row_ptr,
            self.col_idx,
            self.row_perm,
            self.col_perm,
            None,
            self.outputs,
            "none",
        )

    def dense_rows(self, block_row: int) -> tuple[Tensor, Tensor]:
        """Original row numbers of one block row and their dense weights, for checks."""
        bo, bi = self.block
        inputs = self.col_perm.numel()
        rows = self.row_perm[block_row * bo : (block_row + 1) * bo].long()
        padded = torch.zeros(bo, -(-inputs // bi) * bi)
        for b in range(int(self.row_ptr[block_row]), int(self.row_ptr[block_row + 1])):
            group = int(self.col_idx[b])
            padded[:, group * bi : (group + 1) * bi] = self.values[b].T
        weight = torch.zeros(len(rows), inputs)
        weight[:, self.col_perm.long()] = padded[: len(rows), :inputs]
        return rows, weight

    def check(self, x: Tensor) -> None:
        """Raises unless three block rows of the product agree with a dense reference."""
        y = self(x)
        last = self.row_ptr.numel() - 2
        for block_row in {0, last // 2, last}:
            rows, weight = self.dense_rows(block_row)
            expected = x.double() @ weight.double().T
            error = float((y[:, rows] - expected).abs().max())
            if not error < 1e-4 * max(1.0, float(expected.abs().max())):
                raise RuntimeError(f"wrong result in block row {block_row}: off by {error:.2g}")


def sparse_candidate(layer: SparseLayer, x: Tensor, copies: int) -> Candidate:
    """Calls of the op, rotated over copies of the layer."""
    layers = [layer, *(layer.copy() for _ in range(copies - 1))]
    return rotate([lambda layer=layer: layer(x) for layer in layers])


def dense_candidates(
    x: Tensor, weight: Tensor, copies: int, compiled: bool
) -> dict[str, Candidate]:
    """Every dense route that torch offers for this layer; the fastest is the baseline.

    ``F.linear`` is what a user has; ``oneDNN`` is the same library call with weights packed ahead
    of time, which torch itself does only in frozen graphs; ``compile`` is ``nn.Linear`` through
    ``torch.compile`` with freezing.
    """
    weights = [weight, *(weight.clone() for _ in range(copies - 1))]
    found: dict[str, Candidate] = {
        "F.linear": rotate([lambda w=w: F.linear(x, w) for w in weights])
    }
    packed = [call for w in weights if (call := prepacked_linear(w, None, x.shape[0]))]
    if packed:
        found["oneDNN"] = rotate([lambda call=call: call(x) for call in packed])
    if compiled:
        torch._dynamo.reset()
        calls = [call for w in weights if (call := _compiled(x, w))]
        if len(calls) == copies:
            found["compile"] = rotate(calls)
    return found


def dense_steps(x: Tensor, weight: Tensor, grad: Tensor) -> dict[str, Candidate]:
    """Dense training steps, forward and both gradients; the weights change with each step."""
    found: dict[str, Candidate] = {
        "F.linear": lambda: torch.autograd.grad(F.linear(x, weight), (x, weight), grad)
    }
    product = unpacked_product()
    if product:
        a, w = x.detach(), weight.detach()
        found["oneDNN"] = lambda: (product(a, w), product(grad, w.t()), product(grad.t(), a.t()))
    return found


def _compiled(x: Tensor, weight: Tensor) -> Candidate | None:
    """A frozen, compiled nn.Linear; None where this machine has no compiler."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False).eval()
    # an ordinary tensor: freezing refuses one that was made in inference mode
    with torch.inference_mode(False), torch.no_grad():
        linear.weight = nn.Parameter(weight.clone(), requires_grad=False)
        try:
            return frozen(linear, x.clone())
        except Exception:  # a missing compiler shows in many ways; then there is no such rival
            return None


def frozen(module: nn.Module, x: Tensor) -> Candidate:
    """Calls of a module through torch.compile with frozen weights.

    Raises:
        Exception: what torch.compile raises where it cannot compile the module.
    """
    import torch._inductor.config as inductor

    call = torch.compile(module, dynamic=False, fullgraph=True)

    def run() -> object:
        with torch.inference_mode(False), torch.no_grad():
            return call(x)

    with inductor.patch(freezing=True):
        run()
    return run
