"""Sparse peers that a pip user has: torch BSR and CSR, scipy BSR."""

import warnings

import numpy as np
import torch
from torch import Tensor

from tetris.bench.layers import SparseLayer
from tetris.timing import Candidate


def rival_candidates(layer: SparseLayer, x: Tensor) -> dict[str, Candidate]:
    """The same stored blocks in the peers' formats; none of them reorders, so neither does this.

    Only formats that can hold the block: torch's BSR wants blocks that divide the shape.
    """
    bo, bi = layer.block
    inputs = layer.col_perm.numel()
    if layer.outputs % bo or inputs % bi:
        return {}
    blocks = layer.values.transpose(1, 2).contiguous()
    found: dict[str, Candidate] = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "sparse BSR support is in beta"
        shape = (layer.outputs, inputs)
        if (bo, bi) == (1, 1):
            csr = torch.sparse_csr_tensor(layer.row_ptr, layer.col_idx, blocks.flatten(), shape)
            found["torch CSR"] = lambda: csr @ x.T
        else:
            bsr = torch.sparse_bsr_tensor(layer.row_ptr, layer.col_idx, blocks, shape)
            found["torch BSR"] = lambda: bsr @ x.T
    try:
        from scipy import sparse
    except ImportError:
        return found
    columns = np.ascontiguousarray(x.numpy().T)
    arrays = (layer.col_idx.numpy(), layer.row_ptr.numpy())
    if (bo, bi) == (1, 1):
        matrix = sparse.csr_array((blocks.flatten().numpy(), *arrays), shape=shape)
        found["scipy CSR"] = lambda: matrix @ columns
    else:
        matrix = sparse.bsr_array((blocks.numpy(), *arrays), shape=shape)
        found["scipy BSR"] = lambda: matrix @ columns
    return found
