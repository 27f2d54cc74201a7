"""SparseConv1d and SparseConv2d: drop-in convolutions that store and compute kept blocks only."""

from __future__ import annotations

from typing import Any, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..blocking import Blocking
from ..checks import describe, is_int
from ..layout import BlockLayout
from ..ops import Activation
from .base import SparseLayer

_bsconv2d = torch.ops.tetris.bsconv2d.default
_Dense = TypeVar("_Dense", bound=nn.Module)


class SparseConv(SparseLayer[_Dense]):
    """What the convolutions share: their settings, checks, and the shapes the ops take."""

    in_channels: int
    out_channels: int
    kernel_size: tuple[int, ...]
    stride: tuple[int, ...]
    padding: str | tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int
    padding_mode: str

    def _configure(self, **arguments: Any) -> None:
        """Set the settings, as the dense layer checks and completes them."""
        try:
            dense = self.dense_type(**arguments, bias=False, device="meta")
        except (ValueError, TypeError, RuntimeError) as error:
            got = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
            raise type(error)(f"{type(self).__name__}: {error} (got {got})") from error
        for name in self.settings:
            value = getattr(dense, name)
            setattr(self, name, self._sizes(name, value) if isinstance(value, tuple) else value)

    def _sizes(self, name: str, sizes: tuple[Any, ...]) -> tuple[int, ...]:
        """A size for each axis, which torch checks in calls, if at all."""
        least = 0 if name in ("padding", "output_padding") else 1
        axes = 1 if issubclass(self.dense_type, nn.Conv1d) else 2
        if len(sizes) == 1 and name != "kernel_size":
            sizes *= axes  # of a tuple of one torch takes it for all
        if len(sizes) != axes or not all(is_int(s) and s >= least for s in sizes):
            what = "an int" if axes == 1 else f"an int or {axes} ints"
            raise ValueError(
                f"{type(self).__name__}: {name} must be {what} of at least {least} (got {sizes})"
            )
        return sizes

    @property
    def sizes(self) -> dict[str, int]:
        """Channels, kernel and groups."""
        axes = ("height", "width") if len(self.kernel_size) == 2 else ("size",)
        return {
            "out_channels": self.out_channels,
            "in_channels": self.in_channels,
            **{f"kernel {a}": k for a, k in zip(axes, self.kernel_size, strict=True)},
            "groups": self.groups,
        }

    @property
    def _dense_shape(self) -> tuple[int, ...]:
        return self.out_channels, self.in_channels // self.groups, *self.kernel_size

    def _blocking(self, block: tuple[int, int]) -> Blocking:
        return Blocking(block, self.out_channels, self.in_channels, self.kernel_size, self.groups)

    def _check_input(self, x: Tensor) -> None:
        axes = "L" if len(self.kernel_size) == 1 else "H, W"
        dims = len(self.kernel_size) + 1
        where = type(self).__name__
        if not isinstance(x, Tensor) or x.dim() not in (dims, dims + 1):
            got = f"shape {list(x.shape)}" if isinstance(x, Tensor) else describe(x)
            raise TypeError(
                f"{where}: input must be a tensor [N, in_channels, {axes}] or "
                f"[in_channels, {axes}] (got {got})"
            )
        if x.size(-dims) != self.in_channels:
            raise ValueError(
                f"{where}: input.size({-dims}) must equal in_channels (got {x.size(-dims)} and "
                f"{self.in_channels}; input has shape {list(x.shape)})"
            )

    def _images(self, x: Tensor) -> Tensor:
        """[N, C, H, W] of a checked input, or of anything shaped like an output."""
        if x.dim() == len(self.kernel_size) + 1:
            x = x.unsqueeze(0)
        return x if len(self.kernel_size) == 2 else x.unsqueeze(2)

    def _residual(self, residual: Tensor | None, x: Tensor) -> Tensor | None:
        """[N, C, H, W] of a residual, which has the dimensions of the input."""
        if residual is None:
            return None
        if not isinstance(residual, Tensor) or residual.dim() != x.dim():
            got = f"shape {list(residual.shape)}" if isinstance(residual, Tensor) else ""
            raise TypeError(
                f"{type(self).__name__}: residual must be a tensor shaped like the result, "
                f"{x.dim()}-dimensional like the input (got {got or describe(residual)})"
            )
        return self._images(residual)

    def _as_input(self, y: Tensor, x: Tensor) -> Tensor:
        """[N, C, H, W] with the dimensions of an input."""
        if len(self.kernel_size) == 1:
            y = y.squeeze(2)
        return y if x.dim() == len(self.kernel_size) + 2 else y.squeeze(0)

    def extra_repr(self) -> str:
        """Describe the layer in one line."""
        text = (
            f"{self.in_channels}, {self.out_channels}, kernel_size={self.kernel_size}, "
            f"stride={self.stride}"
        )
        for name in self.settings:
            value, usual = getattr(self, name), _USUAL.get(name)
            if usual is not None and value not in (usual, (usual,) * len(self.kernel_size)):
                text += f", {name}={value}"
        return f"{text}, {self._sparse_repr()}"


_USUAL = {"padding": 0, "output_padding": 0, "dilation": 1, "groups": 1, "padding_mode": "zeros"}


def pair(sizes: tuple[int, ...], beside: int) -> tuple[int, ...]:
    """Sizes along H and W of those of a layer; of one along L, H has size ``beside``."""
    return sizes if len(sizes) == 2 else (beside, *sizes)


class SparseConvNd(SparseConv[_Dense]):
    """Convolutions that are not transposed."""

    settings = (
        "in_channels",
        "out_channels",
        "kernel_size",
        "stride",
        "padding",
        "dilation",
        "groups",
        "padding_mode",
    )

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, ...],
        stride: int | tuple[int, ...] = 1,
        padding: int | str | tuple[int, ...] = 0,
        dilation: int | tuple[int, ...] = 1,
        groups: int = 1,
        bias: bool = True,
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
            dilation=dilation,
            groups=groups,
            padding_mode=padding_mode,
        )
        self._build(bias, layout, activation, device, dtype)

    def forward(self, input: Tensor, residual: Tensor | None = None) -> Tensor:
        """Convolve, ``y = activation(conv(input, W) + bias + residual)``.

        Args:
            input: [N, C, H, W] or [C, H, W] ([N, C, L] or [C, L] in one dimension).
            residual: Shaped like the result, added in the same pass.

        Returns:
            What the dense layer returns, in the memory format of the input.
        """
        self._check_input(input)
        try:
            padded, padding = self._padded(input)
            y = _bsconv2d(
                self._images(padded),
                *self._operands(),
                self._bias(),
                self.out_channels,
                pair(self.kernel_size, 1),
                pair(self.stride, 1),
                pair(padding, 0),
                pair(self.dilation, 1),
                self.groups,
                self.activation,
                self._residual(residual, input),
            )
        except (TypeError, ValueError, NotImplementedError) as error:
            self._explain(error, input, residual)
            raise
        return self._as_input(y, input)

    def gradient_of(self, layout: BlockLayout, x: Tensor, grad: Tensor) -> Tensor:
        """Gradient of blocks of the weight; see :meth:`SparseLayer.gradient_of`."""
        padded, padding = self._padded(x)
        return torch.ops.tetris.bsconv2d_grad_values(
            self._images(padded),
            self._images(grad),
            *layout.index,
            layout.block,
            pair(self.kernel_size, 1),
            pair(self.stride, 1),
            pair(padding, 0),
            pair(self.dilation, 1),
            self.groups,
        )

    def _padded(self, x: Tensor) -> tuple[Tensor, tuple[int, ...]]:
        """An input with what the op cannot pad, and the padding that is left to the op."""
        around, padding = self._padding()
        if around is None:
            return x, padding
        mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
        padded = F.pad(x, around, mode=mode)
        last = torch.channels_last
        if x.dim() == 4 and x.is_contiguous(memory_format=last) and not x.is_contiguous():
            padded = padded.contiguous(memory_format=last)  # circular padding drops the format
        return padded, padding

    def _padding(self) -> tuple[list[int] | None, tuple[int, ...]]:
        """What F.pad has to do before, if anything, and the padding that is left to the op."""
        if self.padding == "same":
            total = [d * (k - 1) for d, k in zip(self.dilation, self.kernel_size, strict=True)]
            before = tuple(t // 2 for t in total)  # an odd one has its spare zero behind, as torch
            after = tuple(t - b for t, b in zip(total, before, strict=True))
        elif self.padding == "valid":
            before = after = (0,) * len(self.kernel_size)
        else:
            assert not isinstance(self.padding, str)
            before = after = self.padding
        if before == after and (self.padding_mode == "zeros" or not any(before)):
            return None, before
        pairs = zip(reversed(before), reversed(after), strict=True)  # F.pad: last dimension first
        return [size for both in pairs for size in both], (0,) * len(self.kernel_size)


class SparseConv2d(SparseConvNd[nn.Conv2d]):
    """Convolution with a block-sparse weight, ``y = activation(conv2d(x, W) + bias + residual)``.

    Blocks are bo output channels by bi input channels at single kernel positions; the layout is
    that of the weight ``[out_channels, in_channels / groups, kh, kw]``. The layer trains, copies,
    saves and loads as :class:`tetris.SparseLinear` does, and takes the arguments of ``nn.Conv2d``.

    Attributes:
        values: Parameter [nnzb, bi, bo], the stored blocks; entries beyond the edge of the weight
            are zero and receive a zero gradient.
        bias: Parameter [out_channels] or None.
        row_ptr, col_idx, row_perm, col_perm: int32 buffers, the layout; permutations may be None.

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        kernel_size: int or (kh, kw).
        stride: int or (sh, sw).
        padding: int, (ph, pw), ``"same"`` or ``"valid"``.
        dilation: int or (dh, dw).
        groups: Groups, which divide both numbers of channels.
        bias: Learn a bias.
        padding_mode: ``zeros``, ``reflect``, ``replicate`` or ``circular``; all but zeros, and
            ``"same"`` for even kernels, copy the input once more.
        layout: Which blocks are stored.
        activation: ``none``, ``relu``, ``gelu``, ``gelu_tanh`` or ``silu``, applied in the same
            pass.
        device: Where the parameters and the layout go.
        dtype: Type of the parameters: float32, on CUDA also float16 and bfloat16, or float64 for
            checks (slow).

    Raises:
        ValueError: an argument that ``nn.Conv2d`` refuses, a layout of another size, or an
            activation that is unknown.

    Example:
        >>> sparse = tetris.SparseConv2d.from_dense(conv, sparsity=0.9, block=(8, 1))
        >>> y = sparse(x)                           # x: [N, C, H, W], also channels_last
        >>> y = sparse(x, residual)                 # residual: shaped like y
    """

    dense_type = nn.Conv2d


class SparseConv1d(SparseConvNd[nn.Conv1d]):
    """Convolution along one dimension with a block-sparse weight.

    As :class:`tetris.SparseConv2d`, for x of [N, C, L] or [C, L], and computed as a convolution of
    images of height 1. The layout is that of ``[out_channels, in_channels / groups, k]``.

    Example:
        >>> sparse = tetris.SparseConv1d.from_dense(conv, sparsity=0.9, block=(8, 1))
        >>> y = sparse(x)                           # x: [N, C, L]
    """

    dense_type = nn.Conv1d

    def _explain(self, error: Exception, x: Tensor, residual: Tensor | None = None) -> None:
        super()._explain(error, x, residual)
        if not isinstance(error, ValueError):
            return
        # The op speaks of images of height 1, which nobody passed.
        (kernel,), (stride,), (dilation,) = self.kernel_size, self.stride, self.dilation
        around, padding = self._padding()
        spare = x.size(-1) + sum(around or ()) + 2 * padding[0] - dilation * (kernel - 1) - 1
        if spare < 0:
            raise ValueError(
                "SparseConv1d: the input with its padding must be at least as long as the kernel's "
                f"reach, dilation * (kernel_size - 1) + 1 (got length {x.size(-1)}, padding "
                f"{self.padding}, kernel_size {self.kernel_size} and dilation {self.dilation})"
            ) from error
        expected = [*x.shape[:-2], self.out_channels, spare // stride + 1]
        if residual is not None and list(residual.shape) != expected:
            raise ValueError(
                "SparseConv1d: residual must be shaped like the result "
                f"(got {list(residual.shape)} and {expected})"
            ) from error
