"""SparseLinear: a drop-in ``nn.Linear`` that stores and computes kept blocks only."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from ..blocking import Blocking
from ..checks import describe
from ..layout import BlockLayout
from ..ops import Activation
from .base import SparseLayer

_bsmm = torch.ops.tetris.bsmm.default


class SparseLinear(SparseLayer[nn.Linear]):
    """Linear layer with a block-sparse weight, ``y = activation(x @ W.T + bias)``.

    Attributes:
        values: Parameter [nnzb, bi, bo], the stored blocks; entries beyond the edge of the weight
            are zero and receive a zero gradient.
        bias: Parameter [out] or None.
        row_ptr, col_idx, row_perm, col_perm: int32 buffers, the layout; permutations may be None.
        in_features, out_features, activation: as passed.
        weight: Type, device and shape of the dense weight, for models that ask for them in forward;
            no numbers.

    ``state_dict`` holds values, bias and layout, and loads into a module of any other sparsity,
    block or order with the same features. Such a load is checked as a whole before anything
    changes. It keeps the Parameter objects; an optimizer that has already stepped holds moments of
    the old shape and must be made anew.

    Args:
        in_features: Size of the last dimension of the input.
        out_features: Size of the last dimension of the output.
        bias: Learn a bias.
        layout: Which blocks are stored.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``, applied in the same
            pass.
        device: Where the parameters and the layout go.
        dtype: Type of the parameters: float32, on CUDA also float16 and bfloat16, or float64 for
            checks (slow).

    Values and bias start uniform in ``+-1 / sqrt(inputs an output really sees, on average)``, the
    bound of ``nn.Linear`` for the weights that are there.

    Raises:
        ValueError: the layout is of another size, or the activation is unknown.

    Example:
        >>> sparse = tetris.SparseLinear.from_dense(linear, sparsity=0.9, block=(8, 1))
        >>> y = sparse(x)                           # x: [..., in], y: [..., out]
    """

    dense_type = nn.Linear
    settings = ("in_features", "out_features")

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool = True,
        *,
        layout: BlockLayout,
        activation: Activation = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.in_features = in_features
        self.out_features = out_features
        self._build(bias, layout, activation, device, dtype)

    @property
    def sizes(self) -> dict[str, int]:
        """out_features and in_features."""
        return {"out_features": self.out_features, "in_features": self.in_features}

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return self.out_features, self.in_features

    def _blocking(self, block: tuple[int, int]) -> Blocking:
        return Blocking(block, self.out_features, self.in_features)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., in] to [..., out]."""
        if not isinstance(input, Tensor) or input.dim() == 0:
            raise TypeError(
                f"{type(self).__name__}: input must be a tensor [..., in_features], such as "
                f"torch.as_tensor(array) (got {describe(input)})"
            )
        if input.size(-1) != self.in_features:
            raise ValueError(
                f"{type(self).__name__}: input.size(-1) must equal in_features (got "
                f"{input.size(-1)} and {self.in_features}; input has shape {list(input.shape)})"
            )
        try:
            return _bsmm(input, *self._operands(), self._bias(), self.out_features, self.activation)
        except (TypeError, NotImplementedError) as error:
            self._explain(error, input)
            raise

    def gradient_of(self, layout: BlockLayout, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of blocks of the weight; see :meth:`SparseLayer.gradient_of`."""
        bo, bi = layout.block
        return torch.ops.tetris.bsmm_grad_values(x, grad, *layout.index, bo, bi)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, "
            f"{self._sparse_repr()}"
        )
