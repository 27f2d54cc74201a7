"""One layer that trains on its stored blocks."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..layout import BlockLayout
from ..modules import hooks_of, replace_modules
from ..nn.base import INDEX, SparseLayer, make_sparse
from ..nn.kinds import DenseLayer, oriented, sparse_type
from ..parameters import check_states, holds, move_parameter
from ..relayout import relayout
from ..sharding import check_whole
from .regrow import GradientWatch
from .tree import check_hooks


class StoredBlocks:
    """A layer of a model that is dense until something is removed, and sparse from then on.

    The Parameter of the dense weight becomes that of the stored values: the same object with other
    contents, so optimizers made before or after hold it alike. Their states follow where the
    optimizers are known, see :func:`tetris.relayout`.

    Attributes:
        dense: The dense layer, which the model no longer has once the layer is sparse.
        module: The layer as it is in the model.
        block: (bo, bi).
    """

    def __init__(self, model: nn.Module, name: str, layer: DenseLayer, layout: BlockLayout) -> None:
        self.dense = layer
        self.module: DenseLayer | SparseLayer = layer
        self.block = layout.block
        self._model = model
        self._name = name
        self._whole = layout  # while the layer is dense

    @property
    def parameter(self) -> nn.Parameter:
        """The weight or the stored values."""
        module = self.module
        weight = module.values if isinstance(module, SparseLayer) else module.weight
        assert isinstance(weight, nn.Parameter)  # the selection has made sure
        return weight

    def layout(self) -> BlockLayout:
        """What is stored."""
        return self.module.layout if isinstance(self.module, SparseLayer) else self._whole

    def state_dict(self) -> dict[str, Tensor]:
        """Whether the layer is dense, and the index tensors of the layout.

        A permutation that is the identity is left out.
        """
        layout = self.layout()
        found = {name: getattr(layout, name) for name in INDEX}
        found["dense"] = torch.tensor(self.module is self.dense)
        return {name: tensor for name, tensor in found.items() if tensor is not None}

    def saved_layout(self, saved: Mapping[str, Any]) -> BlockLayout:
        """The layout that a saved state of this layer stands for."""
        return replace(self._whole, **{name: saved.get(name) for name in INDEX})

    def check(self, where: str, optimizers: tuple[Optimizer, ...], trained: bool) -> None:
        """Raise unless the layer can be changed.

        Args:
            where: Function named in messages.
            optimizers: Whose states are to follow.
            trained: There have been steps, so that there are states.
        """
        check_whole(
            f"{where}: layer {self._name!r}",
            [self.parameter],
            "with execution='sparse' blocks must be fixed before fully_shard, which counts on "
            "their number; use execution='masked' to change them under FSDP2",
        )
        check_states(f"{where}: layer {self._name!r}", self.parameter, optimizers)
        if self.module is self.dense:
            check_hooks(where, self._name, self.dense)
        if trained and self.parameter.requires_grad:
            check_held(where, self._name, self.parameter, optimizers)

    def changes(self, layout: BlockLayout, dense: bool | None = None) -> bool:
        """Whether :meth:`set` would change the Parameter."""
        if self._becomes_dense(layout, dense):
            return self.module is not self.dense
        return self.module is self.dense or layout != self.layout()

    def check_unset(self, where: str, optimizers: tuple[Optimizer, ...]) -> None:
        """Raise unless :meth:`unset` can do its work."""
        if isinstance(self.module, SparseLayer):
            self.check(where, optimizers, trained=False)
            if found := _hooks_lost(self.module):
                raise ValueError(
                    f"{where}: layer {self._name!r} has {found}, which the dense layer that comes "
                    "back would not have; remove them and register them on the result"
                )

    def apply(self) -> None:
        """Nothing: what is removed has no numbers."""

    def set(
        self, layout: BlockLayout, optimizers: tuple[Optimizer, ...], dense: bool | None = None
    ) -> None:
        """Store what a layout of the same block and features says.

        Args:
            layout: What to store.
            optimizers: Whose states follow.
            dense: Whether the layer is dense then, as a saved state says. None: a sparse one stays
                sparse, a dense one stays dense until something is removed.
        """
        if self._becomes_dense(layout, dense):
            self.unset(optimizers)
            self._whole = layout
        elif isinstance(self.module, SparseLayer):
            if layout != self.layout():
                self._change(layout, optimizers)
        else:
            self._move(lambda w: layout.pack(oriented(self.dense, w)), optimizers)
            bias: Any = self.dense.bias
            sparse = make_sparse(
                sparse_type(self.dense), self.dense, layout, bias=bias, values=self.parameter
            )
            self._replace(sparse)

    def unset(self, optimizers: tuple[Optimizer, ...]) -> None:
        """Put the dense layer back, with zeros where nothing was stored."""
        if isinstance(self.module, SparseLayer):
            unpack = self.layout().unpack
            self._move(lambda v: oriented(self.dense, unpack(v)).contiguous(), optimizers)
            self.dense.train(self.module.training)
            self._replace(self.dense)

    def _becomes_dense(self, layout: BlockLayout, dense: bool | None) -> bool:
        if dense is None:
            return self.module is self.dense and layout.density == 1.0
        return dense

    def _change(self, layout: BlockLayout, optimizers: tuple[Optimizer, ...]) -> None:
        old = self.layout()
        if _same_order(old, layout):
            relayout(self.module, layout, optimizers=optimizers)
            return
        # Blocks of another order share no numbers with these; only a checkpoint brings one.
        self._move(lambda blocks: layout.pack(old.unpack(blocks)), optimizers)
        for index in INDEX:
            tensor = getattr(layout, index)
            self.module._buffers[index] = None if tensor is None else tensor.clone()

    @torch.no_grad()
    def _move(self, move: Callable[[Tensor], Tensor], optimizers: tuple[Optimizer, ...]) -> None:
        move_parameter(self.parameter, move, optimizers)

    def _replace(self, module: DenseLayer | SparseLayer) -> None:
        replace_modules(self._model, {self._name: module})
        self.module = module


def _hooks_lost(layer: SparseLayer) -> str:
    """The kinds of hooks that go with a layer; the watch of regrowth starts anew at every step."""
    layer = copy.copy(layer)
    hooks = layer._forward_hooks.items()
    own = {k: h for k, h in hooks if not isinstance(getattr(h, "__self__", None), GradientWatch)}
    layer._forward_hooks = own  # type: ignore[assignment]
    return hooks_of(layer, state=True)


def _same_order(a: BlockLayout, b: BlockLayout) -> bool:
    for name in ("row_perm", "col_perm"):
        p, q = getattr(a, name), getattr(b, name)
        if (p is None) != (q is None) or (p is not None and not torch.equal(p, q)):
            return False
    return True


def check_held(
    where: str,
    name: str,
    parameter: nn.Parameter,
    optimizers: tuple[Optimizer, ...],
    otherwise: str = "",
) -> None:
    """Raise unless one of the optimizers holds the Parameter of a layer that was trained.

    ``otherwise`` says what else helps.
    """
    if not any(holds(optimizer, parameter) for optimizer in optimizers):
        raise RuntimeError(
            f"{where}: no optimizer known to the pruner holds the weight of layer {name!r}, so its "
            "state cannot follow the blocks; pass optimizers= or call pruner.attach(optimizer)"
            f"{otherwise}"
        )
