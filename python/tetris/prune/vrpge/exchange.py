"""Sampled layers in a model, in the place of the dense ones, and the other way round."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from functools import partial

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ...layout import BlockLayout
from ...modules import hooks_of, replace_modules
from ...nn.kinds import DenseLayer, oriented
from ...parameters import check_states, move_parameter
from ..stored import check_held
from .rows import Rows
from .sampled import Index, SampledLayer, TopBlocks


class Exchange:
    """Changes which layers a model has, and with them the shapes of Parameters and states.

    Args:
        model: The model.
        layers: name -> dense layer.
        top: Keeps the sampled layers, and knows their gates.
        lazy: Parameters hold drawn blocks only, see :meth:`cut`.
    """

    def __init__(
        self, model: nn.Module, layers: Mapping[str, DenseLayer], top: TopBlocks, lazy: bool
    ) -> None:
        self._model = model
        self._dense = layers
        self._top = top
        self._lazy = lazy
        self._rows: dict[str, Rows] = {}

    @property
    def layers(self) -> dict[str, SampledLayer]:
        """Name -> sampled layer that is in the model."""
        return self._top.layers

    def sample(self, wholes: Mapping[str, BlockLayout], optimizers: Iterable[Optimizer]) -> None:
        """Put layers that hold all blocks, in the order of layouts, in the place of dense ones."""
        for name, whole in wholes.items():
            layer = self._dense[name]
            whole = whole.to(layer.weight.device)
            _move(layer, lambda w, o=whole, x=layer: o.pack(oriented(x, w)), optimizers)
            self.layers[name] = SampledLayer(layer, whole, partial(self._top.index, name))
            self._rows[name] = Rows(self.layers[name].weight)
        if wholes:
            self._top.version += 1
            replace_modules(self._model, dict(self.layers))

    def unsample(self, optimizers: Iterable[Optimizer]) -> None:
        """Put the dense layers back."""
        for name, sampled in self.layers.items():
            layer, unpack = self._dense[name], sampled.whole.unpack
            _move(layer, lambda v, u=unpack, x=layer: oriented(x, u(v)).contiguous(), optimizers)
            layer.train(sampled.training)
        replace_modules(self._model, dict(self._dense))
        self.layers.clear()
        self._rows.clear()

    def cut(self, masks: Tensor, optimizers: Iterable[Optimizer]) -> list[dict[str, Index]]:
        """Let Parameters hold what any of the masks needs, with gradients of zero.

        Args:
            masks: bool[Ks, gates].
            optimizers: Whose states are cut, too.

        Returns:
            For each mask, name -> its blocks.
        """
        optimizers = tuple(optimizers)
        drawn: list[dict[str, Index]] = [{} for _ in masks]
        for name, layer in self.layers.items():
            part = self._top.parts[name]
            for indices, mask in zip(drawn, masks, strict=True):
                indices[name] = layer.index(part.blocks(mask))
            weight = layer.weight
            if weight.requires_grad and self._lazy:
                self._rows[name].cut(part.blocks(masks.any(0)).nonzero().squeeze(1), optimizers)
            elif weight.requires_grad:
                weight.grad = torch.zeros_like(weight)
        return drawn

    def local(self, name: str, blocks: Tensor) -> Tensor:
        """Where blocks of a layer are in its Parameter as it is now."""
        return self._rows[name].local(blocks)

    def put_back(self) -> None:
        """Let Parameters hold all blocks again."""
        for rows in self._rows.values():
            rows.put_back()

    def check_hooks(self, where: str) -> None:
        """Raise ValueError if :meth:`unsample` would lose hooks."""
        for name, layer in self.layers.items():
            if found := hooks_of(layer, state=True):
                raise ValueError(
                    f"{where}: layer {name!r} has {found}, which the layer that takes its place "
                    "would not have; remove them and register them on the result"
                )

    def check_states(
        self, where: str, optimizers: Iterable[Optimizer], held: bool, otherwise: str = ""
    ) -> None:
        """Raise unless what optimizers keep can follow the blocks.

        Args:
            where: Named in messages.
            optimizers: That are known.
            held: One of them must hold each weight that learns.
            otherwise: What else helps if none does.
        """
        optimizers = tuple(optimizers)
        for name, layer in self.layers.items():
            weight = layer.weight
            check_states(f"{where}: layer {name!r}", weight, optimizers)
            if held and weight.requires_grad:
                check_held(where, name, weight, optimizers, otherwise)


@torch.no_grad()
def _move(
    layer: DenseLayer, move: Callable[[Tensor], Tensor], optimizers: Iterable[Optimizer]
) -> None:
    move_parameter(layer.weight, move, optimizers)  # type: ignore[arg-type]
