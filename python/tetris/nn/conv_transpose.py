"""SparseConvTranspose2d: a drop-in ``nn.ConvTranspose2d`` that computes kept blocks only."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from ..blocking import swap_channels
from ..layout import BlockLayout
from ..ops import Activation
from .conv import SparseConv

_bsconv_transpose2d = torch.ops.tetris.bsconv_transpose2d.default


class SparseConvTranspose2d(SparseConv[nn.ConvTranspose2d]):
    """Transposed convolution with a block-sparse weight, for upsampling.

    ``y = activation(conv_transpose2d(x, W) + bias + residual)``. Rows of the layout are output
    channels, as in every layer: it is the layout of the dense weight ``[in_channels, out_channels
    / groups, kh, kw]`` with its channels exchanged, ``[out_channels, in_channels / groups, kh,
    kw]``, kernel positions as they are. Otherwise like :class:`tetris.SparseConv2d`.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: int or (kh, kw).
        stride: int or (sh, sw).
        padding: int or (ph, pw), what is cut off the result on each side.
        output_padding: int or (oh, ow), what is added to the result on one side.
        groups: Groups, which divide both numbers of channels.
        bias: Learn a bias.
        dilation: int or (dh, dw).
        padding_mode: ``zeros``, as ``nn.ConvTranspose2d`` has no other.
        layout: Which blocks are stored.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``, applied in the same
            pass.
        device: Where the parameters and the layout go.
        dtype: Type of the parameters: float32, on CUDA also float16 and bfloat16, or float64 for
            checks (slow).

    Raises:
        ValueError: an argument that ``nn.ConvTranspose2d`` refuses, a layout of another size, or
            an activation that is unknown.

    Example:
        >>> sparse = tetris.SparseConvTranspose2d.from_dense(conv, sparsity=0.9, block=(8, 1))
        >>> y = sparse(x, output_size=(32, 32))     # x: [N, C, H, W]
    """

    dense_type = nn.ConvTranspose2d
    settings = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "output_padding",
        "groups",
        "dilation",
        "padding_mode",
    )
    padding: tuple[int, ...]
    output_padding: tuple[int, ...]

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | tuple[int, ...] = 0,
        output_padding: int | tuple[int, ...] = 0,
        groups: int = 1,
        bias: bool = True,
        dilation: int | tuple[int, ...] = 1,
        padding_mode: str = "zeros",
        *,
        layout: BlockLayout,
        activation: Activation = "none",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self._configure(
            in_channels=in_channels,
            out_channels=out_channels,
            kernel_size=kernel_size,
            stride=stride,
            padding=padding,
            output_padding=output_padding,
            groups=groups,
            dilation=dilation,
            padding_mode=padding_mode,
        )
        self._build(bias, layout, activation, device, dtype)

    @staticmethod
    def oriented(weight: Tensor, groups: int) -> Tensor:
        """``[in, out / groups, kh, kw]`` as ``[out, in / groups, kh, kw]``, or back."""
        return swap_channels(weight, groups)

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return self.in_channels, self.out_channels // self.groups, *self.kernel_size

    def forward(
        self,
        input: Tensor,
        output_size: Sequence[int] | None = None,
        residual: Tensor | None = None,
    ) -> Tensor:
        """Convolve.

        Args:
            input: [N, C, H, W] or [C, H, W].
            output_size: (H, W) of the result, or its whole shape, in place of ``output_padding``.
            residual: Shaped like the result, added in the same pass.

        Raises:
            ValueError: the stride allows no such ``output_size``; the message says which.
        """
        self._check_input(input)
        spare = self.output_padding
        if output_size is not None:
            spare = self._spare(input, output_size)
        try:
            y = _bsconv_transpose2d(
                self._images(input),
                *self._operands(),
                self._bias(),
                self.out_channels,
                self.kernel_size,
                self.stride,
                self.padding,
                spare,
                self.dilation,
                self.groups,
                self.activation,
                self._residual(residual, input),
            )
        except (TypeError, NotImplementedError) as error:
            self._explain(error, input)
            raise
        return self._as_input(y, input)

    def gradient_of(self, layout: BlockLayout, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of blocks of the weight; see :meth:`SparseLayer.gradient_of`."""
        return torch.ops.tetris.bsconv_transpose2d_grad_values(
            self._images(x),
            self._images(grad),
            *layout.index,
            layout.block,
            self.kernel_size,
            self.stride,
            self.padding,
            self.dilation,
            self.groups,
        )

    def _spare(self, x: Tensor, output_size: Sequence[int]) -> list[int]:
        """The output padding that gives a result of this size."""
        if isinstance(output_size, Tensor):
            raise TypeError(
                "SparseConvTranspose2d: output_size must be sizes such as (16, 16) (got a tensor "
                f"of shape {list(output_size.shape)}; a residual goes by name: residual=)"
            )
        if len(output_size) not in (2, x.dim()):
            raise ValueError(
                f"SparseConvTranspose2d: output_size must be (H, W) or {x.dim()} sizes "
                f"(got {tuple(output_size)})"
            )
        low = [
            (x.size(axis) - 1) * self.stride[axis]
            - 2 * self.padding[axis]
            + self.dilation[axis] * (self.kernel_size[axis] - 1)
            + 1
            for axis in (-2, -1)
        ]
        spare = [size - least for size, least in zip(output_size[-2:], low, strict=True)]
        if not all(0 <= p < s for p, s in zip(spare, self.stride, strict=True)):
            high = [least + s - 1 for least, s in zip(low, self.stride, strict=True)]
            raise ValueError(
                f"SparseConvTranspose2d: output_size must be from {tuple(low)} to {tuple(high)} "
                f"for an input of {tuple(x.shape[-2:])} (got {tuple(output_size[-2:])})"
            )
        return spare
