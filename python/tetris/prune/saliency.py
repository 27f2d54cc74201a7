"""From an ``importance`` argument to one non-negative number per weight."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

from torch import Tensor, nn

from ..importance import saliency_of
from ..nn.base import SparseLayer
from ..nn.kinds import DenseLayer
from .options import LayerImportance, LayerOptions


def prepare_importance(
    model: nn.Module,
    layers: Mapping[str, DenseLayer | SparseLayer],
    options: Mapping[str, LayerOptions],
) -> None:
    """Let importances that have a method ``prepare(model, layers)`` look at the model.

    Comes before each round of :func:`layer_saliency`. An importance is called once, with all the
    layers that it rates.

    Args:
        model: The model.
        layers: name -> layer as it is in the model, dense, masked or sparse.
        options: name -> settings, of these layers at least.
    """
    rated: dict[int, tuple[object, dict[str, DenseLayer | SparseLayer]]] = {}
    for name, layer in layers.items():
        importance = options[name].importance
        rated.setdefault(id(importance), (importance, {}))[1][name] = layer
    for importance, own in rated.values():
        prepare = getattr(importance, "prepare", None)
        if callable(importance) and prepare is not None:
            prepare(model, own)


def layer_saliency(
    where: str, name: str, layer: DenseLayer | SparseLayer, importance: LayerImportance
) -> Tensor:
    """Worth of each weight of a layer, float32 on the CPU, non-negative, finite, in its shape.

    Of a sparse layer it is the worth of its values, [nnzb, bi, bo]; an importance in the shape of
    the dense weight is packed then.

    Args:
        where: Function named in messages.
        name: The layer's name.
        layer: The layer, dense or sparse.
        importance: See :data:`LayerImportance`.
    """
    where = f"{where}: layer {name!r}"
    value: object = importance
    if isinstance(importance, Mapping):
        if name not in importance:
            raise ValueError(
                f"{where}: importance has no entry for it (got "
                f"{', '.join(map(repr, importance)) or 'none'}); add one, or exclude the layer"
            )
        value = importance[name]
    elif callable(importance):
        value = importance(name, layer)
    if not isinstance(value, (str, Tensor)):
        hint = "; torch.from_numpy converts it" if type(value).__module__ == "numpy" else ""
        raise TypeError(
            f"{where}: importance must give a tensor (got {type(value).__name__}{hint})"
        )
    if not isinstance(layer, SparseLayer):
        return saliency_of(where, layer.weight, value)  # type: ignore[arg-type]
    if isinstance(value, Tensor) and value.shape != layer.values.shape:
        layout = layer.layout.to("cpu")  # where saliencies end, wherever they were computed
        value = layout.pack(layer.oriented(value.to("cpu"), layout.groups))
    return saliency_of(where, layer.values, value)  # type: ignore[arg-type]


def check_importance(where: str, importance: LayerImportance, names: Iterable[str]) -> None:
    """Raise if importance has entries for layers that are not pruned."""
    if isinstance(importance, Mapping):
        names = set(names)
        unknown = [key for key in importance if key not in names]
        if unknown:
            raise ValueError(
                f"{where}: importance names layers that are not pruned: "
                f"{', '.join(map(repr, unknown))} (pruned: {', '.join(sorted(names))})"
            )
