"""The axes that graphs name, as rows and columns of layers."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from torch import Tensor, nn

from ..nn.base import SparseLayer
from ..nn.kinds import DenseLayer, features_of, groups_of, is_transposed
from .channels import Axis

Side = tuple[str, int]  # a layer's name, and 0 for its rows or 1 for its columns
SIDES = ("rows", "columns")


@dataclass(frozen=True)
class Layer:
    """A layer that is sparse or can be.

    Attributes:
        name: Name in the model.
        module: The layer.
    """

    name: str
    module: DenseLayer | SparseLayer

    @property
    def weight(self) -> Tensor | None:
        """The Parameter that graphs read, None if there is none (weight_norm, masks)."""
        name = "values" if isinstance(self.module, SparseLayer) else "weight"
        return self.module._parameters.get(name)

    def axis(self, tensor: str, side: int) -> Axis:
        """Rows or columns, by the name of the weight."""
        module = self.module
        if isinstance(module, SparseLayer):
            out, in_, *_ = module.sizes.values()
            groups = getattr(module, "groups", 1)
        else:
            (out, in_), groups = features_of(module), groups_of(module)
        if is_transposed(module):
            return Axis(tensor, 1 - side, (out, in_)[side])
        return Axis(tensor, side, (out, in_)[side], groups if side else 1)

    @property
    def depthwise(self) -> bool:
        """Whether each input channel is a group, so that whole groups trade places."""
        groups = getattr(self.module, "groups", 1)
        return 1 < groups == getattr(self.module, "in_channels", None)


def layers_of(model: nn.Module) -> Iterator[Layer]:
    """The layers of a model that are sparse, or can be; each once."""
    for name, module in model.named_modules():
        if isinstance(module, (SparseLayer, DenseLayer)):
            yield Layer(name, cast("DenseLayer | SparseLayer", module))
