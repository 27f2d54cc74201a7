"""All or nothing: a model as it was if what was to be loaded into it does not go in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import nn

from .nn.base import SparseLayer
from .parameters import replace_data


@contextmanager
def all_or_nothing(model: nn.Module) -> Iterator[None]:
    """Leave a model's modules, parameters, buffers and activations as they were on any error.

    Copies of the tensors are in the CPU's memory meanwhile.
    """
    modules = [(m, dict(m._modules), dict(m._buffers)) for m in model.modules()]
    activations = [
        (m, cast(Any, m.activation)) for m in model.modules() if isinstance(m, SparseLayer)
    ]
    tensors = [
        (tensor, tensor.data, tensor.detach().to("cpu", copy=True))
        for tensor in (*model.parameters(), *model.buffers())
    ]
    gradients = [(parameter, parameter.grad) for parameter in model.parameters()]
    try:
        yield
    except BaseException:
        for module, children, buffers in modules:
            module._modules.clear()
            module._modules.update(children)
            module._buffers.clear()
            module._buffers.update(buffers)
        for layer, activation in activations:
            layer.activation = activation
        with torch.no_grad():
            for tensor, data, copy in tensors:
                if isinstance(tensor, nn.Parameter) and tensor.shape != data.shape:
                    replace_data(tensor, data)
                if all(
                    n == 1 or step for n, step in zip(tensor.shape, tensor.stride(), strict=True)
                ):
                    tensor.copy_(copy)  # what is expanded cannot be written, by loading neither
        for parameter, gradient in gradients:
            parameter.grad = gradient
        raise
