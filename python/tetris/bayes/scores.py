"""From draws of weights to what a block is worth, and to masks."""

from __future__ import annotations

import torch
from torch import Tensor

from ..blocking import Blocking, removed_count
from ..checks import check_block, check_sparsity, check_tensor

QUANTILE = 0.1


def block_norms(weights: Tensor, block: tuple[int, int]) -> Tensor:
    """Frobenius norms [..., G, C] of the blocks of weights [..., out, in]."""
    weights = check_tensor("block_norms", "weights", weights)
    block = check_block("block_norms", block)
    if block == (1, 1):
        return weights.abs()
    (bo, bi), (out, in_) = block, weights.shape[-2:]
    rows, columns = -(-out // bo), -(-in_ // bi)
    squares = torch.nn.functional.pad(weights.square(), (0, columns * bi - in_, 0, rows * bo - out))
    return squares.view(*weights.shape[:-2], rows, bo, columns, bi).sum((-3, -1)).sqrt()


def block_score(weights: Tensor, block: tuple[int, int]) -> Tensor:
    """Posterior worth of blocks, ``E|W_B| * P(|W_B| > t)``, t the 10 % quantile of all norms.

    Score within one chain: hidden nodes are exchangeable, and what is row 3 in one chain is row 7
    in the next.

    Args:
        weights: Draws [draws, out, in], of one chain.
        block: (bo, bi); (1, 1) rates single weights.

    Returns:
        [ceil(out / bo), ceil(in / bi)].

    Raises:
        ValueError: weights of several chains, or of one network; a block out of its range.

    Example:
        >>> weight, _ = posterior.chain(0).weights().layers[0]      # [1, draws, 16, 8]
        >>> block_score(weight[0], (4, 2)).shape
        torch.Size([4, 4])
    """
    if weights.dim() != 3:
        raise ValueError(
            "block_score: weights must be the draws of one chain, [draws, out, in], since rows "
            f"mean something else in each chain (got {list(weights.shape)})"
        )
    norms = block_norms(weights, block)
    # torch.quantile takes 16 million numbers at most
    rank = max(1, int(QUANTILE * norms.numel()))
    threshold = norms.flatten().kthvalue(rank).values
    return norms.mean(0) * (norms > threshold).to(norms.dtype).mean(0)


def input_score(weights: Tensor) -> Tensor:
    """Posterior worth of inputs: :func:`block_score` of whole columns.

    Args:
        weights: Draws [draws, out, in], of one chain.

    Returns:
        [in].

    Raises:
        ValueError: weights of several chains, or of one network.

    Example:
        >>> weight, _ = posterior.chain(0).weights().layers[0]      # [1, draws, 16, 8]
        >>> best = input_score(weight[0]).topk(4).indices
    """
    if weights.dim() != 3:
        raise ValueError(
            f"input_score: weights must be draws [draws, out, in] (got {list(weights.shape)})"
        )
    return block_score(weights.norm(dim=1, keepdim=True), (1, 1))[0]


def prune_draws(weights: Tensor, sparsity: float, block: tuple[int, int] = (1, 1)) -> Tensor:
    """Each draw without its own smallest weights or blocks: a diagnostic, not one mask.

    Args:
        weights: [..., out, in].
        sparsity: Share of blocks that goes, ``floor(sparsity * blocks)`` of each draw.
        block: (bo, bi).

    Returns:
        Like weights, zero where a draw lost a block.

    Raises:
        ValueError: weights of fewer than two dimensions, sparsity or a block out of its range.

    Example:
        >>> drawn = posterior.weights()
        >>> pruned = prune_draws(drawn.layers[0][0], 0.5, block=(4, 2))
        >>> found = Predictive.of(drawn.with_weight(0, pruned), x)
    """
    where = "prune_draws"
    if weights.dim() < 2:
        raise ValueError(f"{where}: weights must be [..., out, in] (got {list(weights.shape)})")
    norms = block_norms(weights, block)
    flat = norms.flatten(-2)
    count = removed_count(check_sparsity(where, sparsity), flat.shape[-1])
    order = flat.argsort(dim=-1, stable=True)
    kept = torch.ones_like(flat, dtype=torch.bool).scatter(-1, order[..., :count], False)
    mask = kept.view(norms.shape)
    for axis, step in ((-2, block[0]), (-1, block[1])):
        mask = mask.repeat_interleave(step, axis).narrow(axis, 0, weights.shape[axis])
    return weights * mask


def spread(score: Tensor, blocking: Blocking) -> Tensor:
    """[out, in] whose sums over blocks are the scores [G, C]; for a search in unchanged order."""
    bo, bi = blocking.block
    counts = blocking.split(torch.ones(blocking.weight_shape)).sum((1, 3))
    each = (score.double() / counts).to(torch.float32)
    grid = each[:, None, :, None].expand(-1, bo, -1, bi)
    return blocking.join(grid)
