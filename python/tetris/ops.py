"""Typed wrappers of ``torch.ops.tetris`` and the fake kernels that tracing needs.

The ops are the product's lowest level: :class:`tetris.SparseLinear` is what most people want. A
layer is five tensors, see :class:`tetris.BlockLayout` for how they are made:

========== ============== =======================================================================
values     [nnzb, bi, bo] stored blocks, input-major; the block shape (bo, bi) is read from here
row_ptr    int32[G + 1]   G = ceil(out / bo) block rows over packed output slots
col_idx    int32[nnzb]    column group of each stored block, ascending within a block row
row_perm   int32[out]     packed slot s is original output ``row_perm[s]``; None is the identity
col_perm   int32[in]      the same for inputs
========== ============== =======================================================================
"""

import torch
from torch import Tensor

from .ops_common import Activation as Activation
from .ops_common import check_activation, check_one_device, check_values, warn_of_onnx
from .ops_conv import bsconv2d as bsconv2d
from .ops_conv import bsconv_transpose2d as bsconv_transpose2d


def bsmm(
    x: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    row_perm: Tensor | None,
    col_perm: Tensor | None,
    bias: Tensor | None,
    out_features: int,
    activation: Activation = "none",
) -> Tensor:
    """Block-sparse matrix product, ``y = activation(x @ W.T + bias)``, computed on stored blocks.

    Args:
        x: [..., in] tokens, float32 or on CUDA also float16 and bfloat16 (float64 runs a plain
            path, for gradient checks); any strides.
        values: [nnzb, bi, bo], the type of x.
        row_ptr: int32[ceil(out / bo) + 1].
        col_idx: int32[nnzb].
        row_perm: int32[out] or None.
        col_perm: int32[in] or None.
        bias: [out] or None, the type of x.
        out_features: out.
        activation: fused into the store; ``gelu`` is exact, ``gelu_tanh`` its approximation.

    Returns:
        [..., out] in original output order. Differentiable in x, values and bias, any number of
        times in reverse mode (forward mode raises). Bit-identical from run to run and for any
        number of threads, on CUDA the gradient of values only under
        ``torch.use_deterministic_algorithms``. One token runs another kernel than the same token
        among several, and a fused gelu or silu another formula than under autograd: equal to
        rounding, not bit by bit. 16-bit types accumulate in float32.

        ``torch.autocast`` on CUDA casts x, values and bias to its type, as for ``F.linear``; on the
        CPU, which has no bfloat16 kernels, to float32.

    Raises:
        RuntimeError, TypeError, ValueError: a shape, a type, or the contents of an index tensor
            break a rule; the message names the rule and the values seen.

    Example:
        >>> layout = tetris.BlockLayout.from_dense(weight, (4, 1), sparsity=0.9)
        >>> values = layout.pack(weight)
        >>> y = tetris.ops.bsmm(x, values, layout.row_ptr, layout.col_idx,
        ...                     layout.row_perm, layout.col_perm, bias, layout.out_features)
    """
    return torch.ops.tetris.bsmm(
        x, values, row_ptr, col_idx, row_perm, col_perm, bias, out_features, activation
    )


@torch.library.register_fake("tetris::bsmm")
def _(x, values, row_ptr, col_idx, row_perm, col_perm, bias, out_features, activation="none"):
    warn_of_onnx("bsmm")
    check_one_device("bsmm", x, values, row_ptr, col_idx, row_perm, col_perm, bias)
    check_values("bsmm", values, x)
    check_activation("bsmm", activation)
    return x.new_empty((*x.shape[:-1], out_features))


def bsmm_grad_input(
    grad: Tensor,
    values: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    row_perm: Tensor | None,
    col_perm: Tensor | None,
    in_features: int,
) -> Tensor:
    """Gradient of :func:`bsmm` for x: ``dx = grad @ W``, computed on stored blocks.

    Args:
        grad: [..., out], of the product before its activation; types as for :func:`bsmm`.
        values: [nnzb, bi, bo], the type of grad; this and the index tensors as for :func:`bsmm`.
        row_ptr: int32[ceil(out / bo) + 1].
        col_idx: int32[nnzb].
        row_perm: int32[out] or None.
        col_perm: int32[in] or None.
        in_features: in.

    Returns:
        [..., in_features] in original input order, the type of grad; differentiable in grad and
        values.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`bsmm`.

    Example:
        >>> layout = tetris.BlockLayout.from_dense(weight, (4, 1), sparsity=0.9)
        >>> grad = torch.randn(16, layout.out_features)
        >>> dx = tetris.ops.bsmm_grad_input(grad, layout.pack(weight), layout.row_ptr,
        ...                                 layout.col_idx, layout.row_perm, layout.col_perm,
        ...                                 layout.in_features)
        >>> torch.allclose(dx, grad @ (weight * layout.mask()), atol=1e-4)
        True
    """
    return torch.ops.tetris.bsmm_grad_input(
        grad, values, row_ptr, col_idx, row_perm, col_perm, in_features
    )


@torch.library.register_fake("tetris::bsmm_grad_input")
def _(grad, values, row_ptr, col_idx, row_perm, col_perm, in_features):
    check_one_device("bsmm_grad_input", grad, values, row_ptr, col_idx, row_perm, col_perm)
    return grad.new_empty((*grad.shape[:-1], in_features))


def bsmm_grad_values(
    x: Tensor,
    grad: Tensor,
    row_ptr: Tensor,
    col_idx: Tensor,
    row_perm: Tensor | None,
    col_perm: Tensor | None,
    block: tuple[int, int],
) -> Tensor:
    """Gradient of :func:`bsmm` for values: ``grad.T @ x``, computed where blocks are stored.

    Args:
        x: [..., in] tokens; types as for :func:`bsmm`.
        grad: [..., out], of the product before its activation, the type of x.
        row_ptr: int32[ceil(out / bo) + 1]; this and the next three as for :func:`bsmm`.
        col_idx: int32[nnzb].
        row_perm: int32[out] or None.
        col_perm: int32[in] or None.
        block: (bo, bi), which no tensor tells here.

    Returns:
        [nnzb, bi, bo], the type of x, summed over all tokens; zero where a block at the edge
        reaches beyond the weight. Differentiable in x and grad.

    Raises:
        RuntimeError, TypeError, ValueError: as :func:`bsmm`.

    Example:
        >>> layout = tetris.BlockLayout.from_dense(weight, (4, 1), sparsity=0.9)
        >>> grad = torch.randn(16, layout.out_features)
        >>> found = tetris.ops.bsmm_grad_values(x, grad, layout.row_ptr, layout.col_idx,
        ...                                     layout.row_perm, layout.col_perm, layout.block)
        >>> torch.allclose(found, layout.pack(grad.T @ x), atol=1e-4)
        True
    """
    return torch.ops.tetris.bsmm_grad_values(
        x, grad, row_ptr, col_idx, row_perm, col_perm, block[0], block[1]
    )


@torch.library.register_fake("tetris::bsmm_grad_values")
def _(x, grad, row_ptr, col_idx, row_perm, col_perm, block_height, block_width):
    check_one_device("bsmm_grad_values", x, grad, row_ptr, col_idx, row_perm, col_perm)
    return x.new_empty((col_idx.shape[0], block_width, block_height))
