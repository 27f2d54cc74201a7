"""Linear layers that hold the transposed weight ``[in, out]``, as GPT-2 in transformers does."""

from __future__ import annotations

from abc import ABC
from typing import Any

import torch
from torch import Tensor, nn

from ..blocking import swap_channels
from .linear import SparseLinear


class TransposedLinear(nn.Module, ABC):
    """``transformers.pytorch_utils.Conv1D``, known by its name: nothing imports transformers.

    Never made; ``isinstance`` and ``issubclass`` hold for that class and its subclasses.

    Attributes:
        weight: Parameter [in, out].
        bias: Parameter [out].
        nx: Inputs.
        nf: Outputs.
    """

    weight: nn.Parameter
    bias: nn.Parameter
    nx: int
    nf: int

    @classmethod
    def __subclasshook__(cls, other: type) -> bool:
        """Whether a class is or derives from ``Conv1D``."""
        return any(is_conv1d(base) for base in other.__mro__)


def is_conv1d(cls: type) -> bool:
    """Whether a class is ``transformers.pytorch_utils.Conv1D`` itself."""
    return cls.__name__ == "Conv1D" and cls.__module__ == "transformers.pytorch_utils"


class SparseTransposedLinear(SparseLinear):
    """:class:`tetris.SparseLinear` in the place of transformers' ``Conv1D``.

    That is a linear layer whose weight is ``[in, out]``, as in GPT-2. The sparse layers compute
    the same; what differs is which dense layer they are made from and turn back into.
    Rows of the layout are outputs, as in every layer: it is the layout of the transposed weight.

    Example:
        >>> sparse = tetris.SparseTransposedLinear.from_dense(
        ...     gpt2.h[0].mlp.c_fc, sparsity=0.9, block=(4, 1)
        ... )
        >>> y = sparse(x)                           # x: [..., in], y: [..., out]
    """

    dense_type = TransposedLinear

    def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]  # as Conv1D names it
        """Map [..., in] to [..., out]."""
        return super().forward(x)

    @staticmethod
    def oriented(weight: Tensor, groups: int) -> Tensor:
        """``[in, out]`` as ``[out, in]``, or back."""
        return swap_channels(weight, groups)

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return self.in_features, self.out_features

    @classmethod
    def dense_name(cls) -> str:
        """Name of the dense layer in messages."""
        return "transformers.pytorch_utils.Conv1D"

    @classmethod
    def arguments_of(cls, module: nn.Module) -> dict[str, Any]:
        """Arguments of the constructor that a dense layer stands for."""
        return {"in_features": module.nx, "out_features": module.nf}

    def _empty_dense(self, bias: bool) -> nn.Module:
        try:
            from transformers.pytorch_utils import Conv1D
        except ImportError as error:
            raise ImportError(
                "SparseTransposedLinear: its dense layer is transformers.pytorch_utils.Conv1D, "
                "and transformers is not installed (pip install transformers)"
            ) from error
        with torch.device("meta"):  # it draws a weight, which would cost random numbers
            return Conv1D(self.out_features, self.in_features)
