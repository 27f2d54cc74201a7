"""Batch norm as a scale and a shift of a layer's outputs, multiplied into the layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .nn import SparseLayer
from .nn.kinds import SPARSE_TYPES as SPARSE

BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d
TRANSPOSED = (nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
DENSE = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d, *TRANSPOSED)


@torch.no_grad()
def fold_batch_norm(layer: nn.Module, norm: BatchNorm) -> None:
    """Change a layer so that it computes ``norm(layer(x))`` of before.

    ``y = gamma (z - mean) / sqrt(var + eps) + beta`` is ``scale z + shift``: the scale goes into
    the rows of the weight (of a sparse layer: into its stored values, through ``row_perm``), the
    shift into the bias. Computed in float64, rounded once.

    Args:
        layer: Linear or convolution, dense or sparse; changed in place.
        norm: Batch norm in eval mode with running statistics.
    """
    assert norm.running_mean is not None
    assert norm.running_var is not None
    scale = (norm.running_var.double() + norm.eps).rsqrt()
    if norm.weight is not None:
        scale = scale * norm.weight.double()
    mean = norm.running_mean.double()
    bias = layer._parameters.get("bias")
    shift = ((0.0 if bias is None else bias.double()) - mean) * scale
    if norm.bias is not None:
        shift = shift + norm.bias.double()
    name = weight_name(layer)
    old = layer._parameters[name]
    assert old is not None
    weight = old.double() * _row_scale(layer, old, scale)
    # New Parameters: another layer may use the old ones.
    for key, tensor in ((name, weight), ("bias", shift)):
        new = nn.Parameter(tensor.to(old.dtype), requires_grad=old.requires_grad)
        setattr(layer, key, new)


def weight_name(layer: nn.Module) -> str:
    """Name of the Parameter that holds a layer's weight."""
    return "values" if isinstance(layer, SPARSE) else "weight"


def _row_scale(layer: nn.Module, weight: Tensor, scale: Tensor) -> Tensor:
    """The scale of each output, shaped to multiply the layer's weight."""
    if isinstance(layer, SPARSE):
        return _block_scale(layer, scale)
    if isinstance(layer, TRANSPOSED):  # [in, out / groups, ...], inputs of a group side by side
        by_group = scale.view(layer.groups, 1, -1).expand(-1, layer.in_channels // layer.groups, -1)
        return by_group.reshape(weight.shape[:2] + (1,) * (weight.dim() - 2))
    return scale.view(-1, *(1,) * (weight.dim() - 1))


def _block_scale(layer: SparseLayer, scale: Tensor) -> Tensor:
    """[nnzb, 1, bo]: the scale of each output of each stored block."""
    bo = layer.block[0]
    packed = scale if layer.row_perm is None else scale[layer.row_perm.long()]
    groups = getattr(layer, "groups", 1)
    outputs = packed.numel() // groups
    # Block rows do not cross groups: each group ends in a ragged block row of its own.
    rows = F.pad(packed.view(groups, outputs), (0, -outputs % bo)).view(-1, bo)
    return rows.repeat_interleave(layer.row_ptr.diff().long(), dim=0)[:, None, :]
