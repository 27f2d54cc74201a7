"""Settings of one layer."""

from __future__ import annotations

import inspect
import operator
from collections.abc import Callable, Collection, Mapping
from dataclasses import InitVar, dataclass, fields, replace
from typing import Literal, TypeVar

from torch import Tensor, nn

from ..checks import check_block, check_keywords, check_search, check_sparsity, describe
from ..layout_search import Reorder, SearchOptions, search_method

LayerImportance = (
    Literal["magnitude", "squared"] | Callable[[str, nn.Module], Tensor] | Mapping[str, Tensor]
)
"""Worth of weights: a name, ``f(layer name, layer) -> tensor`` shaped like the layer's weight, or
such tensors by layer name.

A callable object may have a method ``prepare(model, layers)``, with layers by name, as
:class:`tetris.prune.Taylor` has: it is called once before each round of saliencies.
"""


class LayerOverride(SearchOptions, total=False):
    """Settings that each layer may have its own of; see :func:`tetris.sparsify`.

    Example:
        >>> half: tetris.prune.LayerOverride = {"sparsity": 0.5, "block": (8, 1)}
        >>> sparse = tetris.sparsify(model, sparsity=0.75, overrides={"fc": half})
    """

    sparsity: float
    block: tuple[int, int] | Literal["auto"]
    importance: LayerImportance
    min_sparsity: float
    max_sparsity: float


@dataclass(frozen=True)
class LayerOptions:
    """Settings of one layer, checked; the fields are the arguments of :func:`tetris.sparsify`.

    ``where`` is named in messages.

    Raises:
        ValueError, TypeError: a setting is out of its range, or of another type.

    Example:
        >>> LayerOptions(sparsity=0.75, block=(16, 16)).reorder
        'threshold'
    """

    sparsity: float = 0.9
    block: tuple[int, int] = (4, 1)
    importance: LayerImportance = "magnitude"
    reorder: Reorder = "threshold"
    balanced: bool = False
    allow_empty_rows: bool = False
    tie_kernel: bool = False
    seed: int = 0
    budget: float | None = None
    sweeps: int | None = None
    min_sparsity: float = 0.0
    max_sparsity: float = 1.0
    where: InitVar[str] = "tetris.prune.LayerOptions"

    def __post_init__(self, where: str) -> None:
        object.__setattr__(self, "sparsity", check_sparsity(where, self.sparsity))
        for name in ("min_sparsity", "max_sparsity"):
            object.__setattr__(self, name, check_sparsity(f"{where}: {name}", getattr(self, name)))
        low, high = self.min_sparsity, self.max_sparsity
        if low > high:
            raise ValueError(
                f"{where}: min_sparsity must not be above max_sparsity (got {low:g} and {high:g})"
            )
        if isinstance(self.block, str) and self.block == "auto":
            raise ValueError(
                f'{where}: block="auto" is for tetris.sparsify(model, latency=..., '
                "example_inputs=...); elsewhere name the shapes to choose from, "
                "target=tetris.prune.Latency(0.5, x, blocks=[(4, 1), (16, 16)]) (got no latency)"
            )
        object.__setattr__(self, "block", check_block(where, self.block))
        if isinstance(self.importance, type):
            raise TypeError(
                f"{where}: importance must be an object of the class, such as "
                f"{self.importance.__name__}(batches, ...) (got {describe(self.importance)})"
            )
        search_method(where, self.reorder)
        check_search(where, seed=self.seed, budget=self.budget, sweeps=self.sweeps)
        numbers = {"seed": operator.index, "sweeps": operator.index, "budget": float}
        for name, number in numbers.items():  # a state holds Python's, which torch.load takes
            if (value := getattr(self, name)) is not None:
                object.__setattr__(self, name, number(value))

    @classmethod
    def of(
        cls, where: str, settings: LayerOverride, function: Callable[..., object]
    ) -> LayerOptions:
        """Settings from what was left over of a function's keyword arguments."""
        parameters = inspect.signature(function).parameters.values()
        known = [p.name for p in parameters if p.kind is p.KEYWORD_ONLY]
        check_keywords(where, settings, dict.fromkeys([*known, *(f.name for f in fields(cls))]))
        return cls(**settings, where=where)  # type: ignore[arg-type]  # it refuses "auto"

    @property
    def bounded(self) -> bool:
        """Whether bounds say how much scope ``global`` may remove."""
        return self.min_sparsity > 0.0 or self.max_sparsity < 1.0

    @property
    def search(self) -> SearchOptions:
        """What the search for a layout is told."""
        return {name: getattr(self, name) for name in SearchOptions.__annotations__}  # type: ignore[return-value]

    def override(self, where: str, changes: LayerOverride) -> LayerOptions:
        """These settings with some replaced; ``where`` is named in messages."""
        if not isinstance(changes, Mapping):
            raise TypeError(
                f"{where}: a dict of settings is needed, such as {{'sparsity': 0.8}} "
                f"(got {describe(changes)})"
            )
        known = [f.name for f in fields(self)]
        unknown = [key for key in changes if key not in known]
        if unknown:
            raise ValueError(
                f"{where}: overrides may set {', '.join(known)} "
                f"(got {', '.join(map(repr, unknown))})"
            )
        return replace(self, where=where, **changes)


def check_bounds(
    where: str, scope: str, options: Mapping[str, LayerOptions], fixed: Collection[str]
) -> None:
    """Raise ValueError if layers have bounds, and no competition that could reach them."""
    bounded = next((n for n, o in options.items() if o.bounded and n not in fixed), None)
    if scope != "global" and bounded is not None:
        raise ValueError(
            f"{where}: min_sparsity and max_sparsity bound what scope='global' removes of a layer; "
            f"with scope={scope!r} its sparsity says it (layer {bounded!r})"
        )


F = TypeVar("F", bound=Callable)


def shows_settings(function: F, **defaults: object) -> F:
    """Lets ``help()`` and ``inspect.signature`` show what ``**settings`` stands for, and defaults.

    For a function whose ``**settings`` are the fields of :class:`LayerOptions`.

    Args:
        function: The function.
        **defaults: Those of settings that have another one in it.
    """
    signature = inspect.signature(function)
    keyword = inspect.Parameter.KEYWORD_ONLY
    own = [p for p in signature.parameters.values() if p.kind is not p.VAR_KEYWORD]
    own += [
        inspect.Parameter(
            f.name, keyword, default=defaults.get(f.name, f.default), annotation=f.type
        )
        for f in fields(LayerOptions)
    ]
    function.__signature__ = signature.replace(parameters=own)  # type: ignore[attr-defined]
    return function
