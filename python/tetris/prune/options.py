"""Settings of one layer."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import Literal, TypedDict

from torch import Tensor, nn

from ..layout import Reorder, check_block, check_sparsity, search_method

LayerImportance = (
    Literal["magnitude", "squared"] | Callable[[str, nn.Module], Tensor] | Mapping[str, Tensor]
)
"""Worth of weights: a name, ``f(layer name, layer) -> [out, in]``, or tensors by layer name."""


class LayerOverride(TypedDict, total=False):
    """Settings that ``overrides`` may change for some layers; see :func:`tetris.sparsify`."""

    sparsity: float
    block: tuple[int, int]
    importance: LayerImportance
    reorder: Reorder
    balanced: bool
    allow_empty_rows: bool
    seed: int
    budget: float | None
    sweeps: int | None


@dataclass(frozen=True)
class LayerOptions:
    """Settings of one layer, checked; the fields are the arguments of :func:`tetris.sparsify`."""

    sparsity: float = 0.9
    block: tuple[int, int] = (4, 1)
    importance: LayerImportance = "magnitude"
    reorder: Reorder = "threshold"
    balanced: bool = False
    allow_empty_rows: bool = False
    seed: int = 0
    budget: float | None = None
    sweeps: int | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "sparsity", check_sparsity(self.sparsity))
        object.__setattr__(self, "block", check_block(self.block))
        search_method(self.reorder)

    def override(self, where: str, changes: LayerOverride) -> LayerOptions:
        """These settings with some replaced; ``where`` is named in messages."""
        known = [f.name for f in fields(self)]
        unknown = [key for key in changes if key not in known]
        if unknown:
            raise ValueError(
                f"{where}: overrides may set {', '.join(known)} "
                f"(got {', '.join(map(repr, unknown))})"
            )
        return replace(self, **changes)
