"""The convolution ops of :mod:`tetris.ops`, which has all names, and their fake kernels."""

from collections.abc import Sequence

import torch
from torch import Tensor
from torch._prims_common import suggest_memory_format

from .ops_common import (
    Activation,
    check_activation,
    check_one_device,
    check_values,
    warn_of_onnx,
)


def bsconv2d(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    row_perm: Tensor | None,
    col_perm: Tensor | None,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Block-sparse convolution, ``activation(conv2d(x, W) + bias + residual)``, on stored blocks.

    Blocks lie at single kernel positions: ``col_idx`` holds ``(ky * kw + kx) * ceil(in / bi) + g``
    for column group g. With several groups, in and out are a group's channels, the block rows of
    the groups lie behind each other, and ``col_idx`` counts within the group; permutations hold
    numbers of all channels and keep each in its group.

    Args:
        x: [N, in, H, W], float32 or on CUDA also float16 and bfloat16 (float64 runs a plain path),
            contiguous or channels_last; other strides are copied. On CUDA, float32 may be rounded
            to TF32 where ``torch.backends.cudnn.allow_tf32`` says so, as torch's convolutions do.
        values: [nnzb, bi, bo], the type of x.
        row_ptr: int32[groups * ceil(out / groups / bo) + 1].
        col_idx: int32[nnzb].
        row_perm: int32[out] or None.
        col_perm: int32[in] or None.
        bias: [out] or None, the type of x.
        out_channels: out.
        kernel_size: (kh, kw), that of the layout: the index does not tell, so another one computes
            something else.
        stride: (vertical, horizontal), as are padding (zeros, on both sides) and dilation.
        padding: See stride.
        dilation: See stride.
        groups: Of channels; divides in and out.
        activation: Fused into the store, with bias and residual.
        residual: Added before the activation; shaped like the result, or None.

    Returns:
        [N, out, H', W'] in the memory format of x and in original channel order. Differentiable in
        x, values, bias and residual, any number of times in reverse mode. Bit-identical from run to
        run and for any number of threads, on CUDA the gradient of values only under
        ``torch.use_deterministic_algorithms``.

    Raises:
        RuntimeError, TypeError, ValueError: a shape, a type, or the contents of an index tensor
            break a rule; the message names the rule and the values seen.

    Example:
        >>> layout = tetris.BlockLayout.from_dense(weight, (8, 1), sparsity=0.9)  # [out, in, 3, 3]
        >>> y = tetris.ops.bsconv2d(x, layout.pack(weight), layout.row_ptr, layout.col_idx,
        ...                         layout.row_perm, layout.col_perm, bias, layout.out_features,
        ...                         kernel_size=(3, 3), padding=(1, 1), activation="relu")
    """
    return torch.ops.tetris.bsconv2d(
        x,
        values,
        row_ptr,
        col_idx,
        row_perm,
        col_perm,
        bias,
        out_channels,
        kernel_size,
        stride,
        padding,
        dilation,
        groups,
        activation,
        residual,
    )


def bsconv_transpose2d(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    row_perm: Tensor | None,
    col_perm: Tensor | None,
    bias: Tensor | None,
    out_channels: int,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (1, 1),
    padding: Sequence[int] = (0, 0),
    output_padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    groups: int = 1,
    activation: Activation = "none",
    residual: Tensor | None = None,
) -> Tensor:
    """Block-sparse transposed convolution, as ``torch.nn.functional.conv_transpose2d``.

    Rows of the layout are *output* channels and columns input channels, here too: for a dense
    weight [in, out / groups, kh, kw], pack it with its first two axes (of each group) exchanged.

    Args:
        x: [N, in, H, W]; this and what is not named below as for :func:`bsconv2d`.
        values: [nnzb, bi, bo].
        row_ptr: int32[groups * ceil(out / groups / bo) + 1].
        col_idx: int32[nnzb].
        row_perm: int32[out] or None.
        col_perm: int32[in] or None.
        bias: [out] or None.
        out_channels: out.
        kernel_size: (kh, kw).
        stride: (vertical, horizontal).
        padding: Rows and columns to leave out at each side of the result.
        output_padding: Rows and columns to add at the end; less than stride or dilation.
        dilation: (vertical, horizontal).
        groups: Of channels.
        activation: Fused into the store.
        residual: Added before the activation, or None.

    Returns:
        [N, out, (H - 1) stride - 2 padding + dilation (kh - 1) + output_padding + 1, ...], in
        the memory format of x; differentiable as :func:`bsconv2d`.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`bsconv2d`.

    Example:
        >>> weight = torch.randn(16, 32, 2, 2)                          # [in, out, kh, kw]
        >>> rows = weight.transpose(0, 1)
        >>> layout = tetris.BlockLayout.from_dense(rows, (8, 1), sparsity=0.9)
        >>> y = tetris.ops.bsconv_transpose2d(
        ...     x, layout.pack(rows), layout.row_ptr, layout.col_idx, layout.row_perm,
        ...     layout.col_perm, bias, layout.out_features, kernel_size=(2, 2), stride=(2, 2),
        ... )
        >>> y.shape                                                     # of 8x8 pixels
        torch.Size([2, 32, 16, 16])
    """
    return torch.ops.tetris.bsconv_transpose2d(
        x,
        values,
        row_ptr,
        col_idx,
        row_perm,
        col_perm,
        bias,
        out_channels,
        kernel_size,
        stride,
        padding,
        output_padding,
        dilation,
        groups,
        activation,
        residual,
    )


def _like(x: Tensor, size: Sequence[int]) -> Tensor:
    # The format that the kernels choose: that of x.
    return torch.empty(
        size,
        dtype=x.dtype,
        device=x.device,
        memory_format=suggest_memory_format(x),
    )


def _conv_size(size, kernel_size, stride, padding, dilation):
    return [
        (n + 2 * p - d * (k - 1) - 1) // s + 1
        for n, k, s, p, d in zip(size, kernel_size, stride, padding, dilation, strict=True)
    ]


def _check_map(op, name, x):
    torch._check(
        x.dim() == 4,
        lambda: f"tetris::{op}: {name} must be [N, C, H, W] (got shape {list(x.shape)})",
    )


def _fake_conv(op, x, values, index, bias, activation, residual, out_channels, size):
    check_one_device(op, x, values, *index, bias, residual)
    check_values(op, values, x)
    check_activation(op, activation)
    y = _like(x, [x.shape[0], out_channels, *size])
    if residual is not None:
        torch._check(
            residual.shape == y.shape and residual.dtype == y.dtype,
            lambda: (
                f"tetris::{op}: residual must be shaped like the result and of its type "
                f"(got {residual.dtype}{list(residual.shape)} and {y.dtype}{list(y.shape)})"
            ),
        )
    return y


@torch.library.register_fake("tetris::bsconv2d")
def _(
    x,
    values,
    row_ptr,
    col_idx,
    row_perm,
    col_perm,
    bias,
    out_channels,
    kernel_size,
    stride,
    padding,
    dilation,
    groups,
    activation="none",
    residual=None,
):
    warn_of_onnx("bsconv2d")
    _check_map("bsconv2d", "x", x)
    size = _conv_size(x.shape[2:], kernel_size, stride, padding, dilation)
    index = (row_ptr, col_idx, row_perm, col_perm)
    return _fake_conv("bsconv2d", x, values, index, bias, activation, residual, out_channels, size)


@torch.library.register_fake("tetris::bsconv_transpose2d")
def _(
    x,
    values,
    row_ptr,
    col_idx,
    row_perm,
    col_perm,
    bias,
    out_channels,
    kernel_size,
    stride,
    padding,
    output_padding,
    dilation,
    groups,
    activation="none",
    residual=None,
):
    warn_of_onnx("bsconv_transpose2d")
    _check_map("bsconv_transpose2d", "x", x)
    size = [
        (x.shape[2 + i] - 1) * stride[i]
        - 2 * padding[i]
        + dilation[i] * (kernel_size[i] - 1)
        + output_padding[i]
        + 1
        for i in range(2)
    ]
    index = (row_ptr, col_idx, row_perm, col_perm)
    return _fake_conv(
        "bsconv_transpose2d", x, values, index, bias, activation, residual, out_channels, size
    )


def _register_gradients(op: str) -> None:
    """Fake kernels of an op's two gradients."""

    @torch.library.register_fake(f"tetris::{op}_grad_input")
    def _(grad, values, row_ptr, col_idx, row_perm, col_perm, in_channels, input_size, *settings):
        _check_map(f"{op}_grad_input", "grad", grad)
        check_one_device(f"{op}_grad_input", grad, values, row_ptr, col_idx, row_perm, col_perm)
        return _like(grad, [grad.shape[0], in_channels, *input_size])

    @torch.library.register_fake(f"tetris::{op}_grad_values")
    def _(x, grad, row_ptr, col_idx, row_perm, col_perm, block, *settings):
        _check_map(f"{op}_grad_values", "x", x)
        check_one_device(f"{op}_grad_values", x, grad, row_ptr, col_idx, row_perm, col_perm)
        torch._check(
            x.dtype == grad.dtype,
            lambda: (
                f"tetris::{op}_grad_values: x and grad must have one type "
                f"(got {x.dtype} and {grad.dtype})"
            ),
        )
        return x.new_empty((col_idx.shape[0], block[1], block[0]))


for _op in ("bsconv2d", "bsconv_transpose2d"):
    _register_gradients(_op)
