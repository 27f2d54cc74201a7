"""A weight as strengths times directions: one strength per kernel, or per block."""

from __future__ import annotations

import math
from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.optim import Optimizer

from ...blocking import Blocking, swap_channels
from ...modules import unparametrize
from ...nn.kinds import DenseLayer, groups_of, oriented

_EPS = 1e-12  # V has a redundant scale that nothing keeps from zero


class Synapses:
    """Which weights of a layer share one number: the kernels, or the blocks.

    Args:
        blocking: Sizes; blocks of 1x1 for kernels.
        tied: The kernel positions of a block of channels are one unit.
        row_perm: int[out], original output of each packed slot; None is the identity.
        col_perm: int[in], the same for inputs.
    """

    def __init__(
        self,
        blocking: Blocking,
        tied: bool,
        row_perm: Tensor | None = None,
        col_perm: Tensor | None = None,
    ) -> None:
        self.blocking = blocking
        self.positions = blocking.positions if tied else 1
        self.row_perm = row_perm
        self.col_perm = col_perm

    @classmethod
    def of(cls, where: str, layer: DenseLayer, block: tuple[int, int], tied: bool) -> Synapses:
        """Synapses of a layer in the order its channels stand."""
        weight = oriented(layer, layer.weight.detach())
        return cls(Blocking.of(where, "weight", weight, block, groups_of(layer)), tied)

    @property
    def grid(self) -> tuple[int, int]:
        """Rows and columns of units: of kernels, (out, in / groups)."""
        rows, columns = self.blocking.grid
        return rows, columns // self.positions

    def split(self, weight: Tensor) -> Tensor:
        """[rows, bo, positions, columns, bi] of a weight [out, in / groups, ...]."""
        blocks = self.blocking.split(weight, self.row_perm, self.col_perm)
        rows, bo, _, bi = blocks.shape
        return blocks.view(rows, bo, self.positions, self.grid[1], bi)

    def join(self, units: Tensor) -> Tensor:
        """The inverse of :meth:`split`."""
        blocks = units.flatten(2, 3)
        return self.blocking.join(blocks, self.row_perm, self.col_perm)

    def norms(self, weight: Tensor) -> Tensor:
        """[rows, columns], Frobenius norm of each unit."""
        return torch.linalg.vector_norm(self.split(weight), dim=(1, 2, 4))

    def sizes(self, device: torch.device | None = None) -> Tensor:
        """[rows, columns], weights of each unit; fewer at ragged edges."""
        ones = torch.ones(self.blocking.weight_shape, device=device)
        return self.split(ones).sum((1, 2, 4))

    def spread(self, numbers: Tensor) -> Tensor:
        """Shaped like the weight: the number [rows, columns] of each weight's unit."""
        bo, bi = self.blocking.block
        shape = (-1, bo, self.positions, -1, bi)
        return self.join(numbers[:, None, None, :, None].expand(shape))


class Strength(nn.Module):
    """Parametrization ``W_B = s_B V_B / (|V_B| + 1e-12)`` of a weight.

    Its Parameters are ``original0``, the strengths s, [rows, columns] of units, and ``original1``,
    the directions V, shaped like the weight. Of a unit of one weight the direction is a sign, and
    V is frozen: all that an optimizer would see there is rounding noise. Strengths of weights in
    half precision are in float32: an optimizer step shrinks them by less than half a unit in their
    last place.

    Args:
        synapses: What shares a strength; permutations become buffers, and can be changed.
        transposed: The weight is that of a transposed convolution, ``[in, out / groups, kh, kw]``.
    """

    row_perm: Tensor | None
    col_perm: Tensor | None

    def __init__(self, synapses: Synapses, transposed: bool) -> None:
        super().__init__()
        self._blocking = synapses.blocking
        self.tied = synapses.positions > 1
        self.transposed = transposed
        self.register_buffer("row_perm", synapses.row_perm)
        self.register_buffer("col_perm", synapses.col_perm)

    @property
    def synapses(self) -> Synapses:
        """What shares a strength now."""
        return Synapses(self._blocking, self.tied, self.row_perm, self.col_perm)

    def forward(self, s: Tensor, v: Tensor) -> Tensor:
        """The weight."""
        synapses = self.synapses
        parts = synapses.split(self._oriented(v))
        # The norm's own gradient at zero is zero, which that of a root of squares is not.
        norm = torch.linalg.vector_norm(parts, dim=(1, 2, 4), dtype=s.dtype) + _EPS
        weight = synapses.join(parts * (s / norm)[:, None, None, :, None])
        return self._oriented(weight).to(v.dtype)

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        """Strengths and directions that give a weight: its norms, and itself."""
        wide = torch.promote_types(weight.dtype, torch.float32)
        return self.synapses.norms(self._oriented(weight).to(wide)), weight

    def _oriented(self, weight: Tensor) -> Tensor:
        return swap_channels(weight, self._blocking.groups) if self.transposed else weight

    def extra_repr(self) -> str:
        """Describe the units in one line."""
        bo, bi = self._blocking.block
        return f"block={bo}x{bi}, tie_kernel={self.tied}, strengths={math.prod(self.synapses.grid)}"


class StrengthLayer:
    """A layer whose weight is parametrised by strengths, until :meth:`fold`.

    V is the Parameter that the weight was, and becomes it again: an optimizer that holds the one
    holds the other.

    Attributes:
        layer: The layer.
        strength: The parametrization.
        learns: Whether the weight does.
    """

    def __init__(self, layer: DenseLayer, synapses: Synapses) -> None:
        self.layer = layer
        self.strength = Strength(synapses, isinstance(layer, nn.ConvTranspose2d))
        weight = layer.weight
        assert isinstance(weight, nn.Parameter)
        self.learns = weight.requires_grad
        self._root = synapses.sizes(weight.device).sqrt()
        parametrize.register_parametrization(layer, "weight", self.strength)
        self._originals.original1 = weight
        weight.requires_grad_(self.learns and int(synapses.sizes().max()) > 1)

    @property
    def _originals(self) -> nn.Module:
        return self.layer.parametrizations.weight  # type: ignore[union-attr,return-value]

    @property
    def s(self) -> nn.Parameter:
        """Strengths, [rows, columns] of units."""
        return self._originals.original0  # type: ignore[return-value]

    @property
    def v(self) -> nn.Parameter:
        """Directions, shaped like the weight."""
        return self._originals.original1  # type: ignore[return-value]

    @torch.no_grad()
    def shrink(self, amount: float) -> None:
        """``s <- sign(s) max(|s| - amount sqrt(|B|), 0)``, exact zeros included."""
        s = self.s
        s.copy_(s.sign() * (s.abs() - amount * self._root).clamp_(min=0.0))

    @torch.no_grad()
    def reorder(
        self,
        row_perm: Tensor | None,
        col_perm: Tensor | None,
        optimizers: Iterable[Optimizer] = (),
    ) -> None:
        """Share strengths by blocks of another order; the weight stays what it is.

        What optimizers keep of a strength becomes the mean over the weights of its new block.
        """
        old, weight = self.strength.synapses, self.layer.weight
        for name, perm in (("row_perm", row_perm), ("col_perm", col_perm)):
            buffer = getattr(self.strength, name)
            identity = torch.arange(buffer.numel(), dtype=buffer.dtype)
            fresh = (identity if perm is None else perm).to(buffer.device, copy=True)
            setattr(self.strength, name, fresh)  # not in place: old still has the other
        new = self.strength.synapses
        for original, numbers in zip(
            (self.s, self.v), self.strength.right_inverse(weight), strict=True
        ):
            original.copy_(numbers)
            original.grad = None
        for optimizer in optimizers:
            for name, state in optimizer.state.get(self.s, {}).items():
                if isinstance(state, Tensor) and state.shape == self.s.shape:
                    moved = new.split(old.spread(state)).sum((1, 2, 4)) / self._root.square()
                    optimizer.state[self.s][name] = moved

    @torch.no_grad()
    def fold(self, optimizers: Iterable[Optimizer] = ()) -> None:
        """Make the weight an ordinary Parameter again, the one that was V.

        Optimizers forget what they kept of s and V, whose gradients were others.
        """
        weight, s, v = self.layer.weight.clone(), self.s, self.v
        for optimizer in optimizers:
            for original in (s, v):
                optimizer.state.pop(original, None)
        self.undo()
        v.copy_(weight)
        v.grad = None

    @torch.no_grad()
    def undo(self) -> None:
        """Make V the weight, as it is: the layer as before, if V has not changed since."""
        v = self.v
        unparametrize(self.layer, "weight", leave_parametrized=True)
        v.requires_grad_(self.learns)
        self.layer.weight = v
        bias = self.layer._parameters.pop("bias")  # the weight comes first, as optimizers count
        self.layer._parameters["bias"] = bias

    @torch.no_grad()
    def relative(self) -> Tensor:
        """[units], ``|s_B| / sqrt(|B|)``: what shrinking takes equal amounts of."""
        return (self.s.abs() / self._root).flatten()
