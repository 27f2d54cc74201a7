"""The scale of every input of layers: of batch norm, kept there or moved on, or measured."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...folding import BatchNorm
from ...nn.kinds import DenseLayer, groups_of, oriented
from ...parameters import tensors_of
from ..batches import Batches, read_batches, undisturbed
from ..calibration import input_rms, show_inputs
from ..providers import per_input
from .inputs import input_scales

#: A channel keeps its scale where that is below this share of the largest one: the shift becomes
#: beta / gamma, which an optimizer could no longer move if it were huge.
LEAST_SCALE = 1e-3


class Scales:
    """Scales of the inputs of some layers of a model.

    Args:
        where: Function named in messages.
        model: The model.
        layers: name -> layer of it.
        batches: For layers whose inputs no batch norm scales. The first one also tells what a
            ``BatchNorm1d`` sees, and whether :meth:`push` leaves the outputs as they are.

    Raises:
        ValueError: there are such layers, and no batches.
    """

    def __init__(
        self,
        where: str,
        model: nn.Module,
        layers: Mapping[str, DenseLayer],
        batches: Batches | None,
    ) -> None:
        self._where = where
        self._first = None if batches is None else next(iter(read_batches(where, batches)))
        self.inputs = input_scales(model, layers, self._dims(model))
        self._model = model
        self._layers = layers
        self._batches = batches
        self._pushed: dict[str, PushedScale] = {}
        unknown = {n: s.reason for n, s in self.inputs.items() if s.norm is None}
        if unknown and batches is None:
            reasons = "; ".join(f"{n or '(root)'}: {reason}" for n, reason in unknown.items())
            raise ValueError(
                f"{where}: no batch norm tells the scale of the inputs of these layers "
                f"({reasons}); pass batches=[x], inputs that they can be measured on, or exclude "
                "the layers"
            )

    def push(self) -> None:
        """Move what can be moved from batch norms into the layers; the model computes the same.

        Raises:
            ValueError: the first batch says that it does not; everything is as it was then.
        """
        behind: dict[str, list[tuple[DenseLayer, int]]] = {}
        for name, scale in self.inputs.items():
            if scale.norm is not None and scale.pushable:
                behind.setdefault(scale.norm, []).append((self._layers[name], scale.repeat))
        pushed = {norm: PushedScale(self._norm(norm), layers) for norm, layers in behind.items()}
        before = self._outputs() if pushed else []
        for norm in pushed:
            pushed[norm].push()
            self._pushed[norm] = pushed[norm]
        after = self._outputs() if pushed else []
        if not all(map(self._close, after, before)):
            self.undo()
            raise ValueError(
                f"{self._where}: moving the scales of batch norms ({', '.join(behind)}) into the "
                "layers behind changes the outputs for the first batch, so the model does not "
                "compute what its graph says; exclude the layers behind those that see their "
                "channels along another axis, or that forward reads otherwise"
            )

    def undo(self) -> None:
        """Undo :meth:`push`, exactly, until :meth:`settle`."""
        for pushed in self._pushed.values():
            pushed.undo()
        self._pushed = {}

    def settle(self) -> None:
        """Forget what :meth:`undo` needs."""
        self._first = None
        for pushed in self._pushed.values():
            pushed.settle()

    def hold(self) -> None:
        """Keep batch norms' scales at 1 where they were moved, wherever an optimizer put them."""
        for pushed in self._pushed.values():
            pushed.hold()

    def release(self) -> None:
        """Let batch norms' scales learn again."""
        self._pushed = {}

    def now(self) -> dict[str, Tensor]:
        """Layer -> [in], scale of each input: 1 where it was moved, |gamma|, or as measured."""
        unknown = {n: self._layers[n] for n, s in self.inputs.items() if s.norm is None}
        found = {}
        if unknown:
            assert self._batches is not None
            found = input_rms(self._where, self._model, unknown, self._batches)
        for name, scale in self.inputs.items():
            if scale.norm is None:
                continue
            norm = self._norm(scale.norm)
            gamma = torch.ones(norm.num_features) if norm.weight is None else norm.weight.detach()
            found[name] = gamma.abs().repeat_interleave(scale.repeat)
        return {name: found[name].to(layer.weight.device) for name, layer in self._layers.items()}

    def weights(self) -> dict[str, Tensor]:
        """Layer -> weight times the scale of its inputs, ``[out, in / groups, *kernel]``."""
        with torch.no_grad():
            return {
                name: oriented(self._layers[name], self._layers[name].weight)
                * _by_input(self._layers[name], scale)
                for name, scale in self.now().items()
            }

    def state_dict(self) -> dict[str, Tensor]:
        """Batch norm -> bool[C], channels whose scale was moved."""
        return {name: pushed.channels.clone() for name, pushed in self._pushed.items()}

    def load_state_dict(self, state: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state_dict` gave."""
        for name, channels in state.items():
            self._pushed[name].channels = channels.to(self._pushed[name].channels.device)

    def _dims(self, model: nn.Module) -> dict[str, int]:
        """Batch norm -> spatial dimensions of what it sees in the first batch."""
        if self._first is None:
            return {}
        found: dict[str, int] = {}
        norms = {n: m for n, m in model.named_modules() if type(m) is nn.BatchNorm1d}
        if norms:
            with undisturbed(model):
                show_inputs(
                    self._where,
                    model,
                    norms,
                    [self._first],
                    lambda n, x: found.update({n: x.dim() - 2}),
                )
        return found

    def _outputs(self) -> list[Tensor]:
        """What the model makes of the first batch, if there is one."""
        if self._first is None:
            return []
        with undisturbed(self._model), torch.no_grad():
            outputs = tensors_of(self._first.outputs(self._where, self._model))
        return [x.clone() for x in outputs if x.is_floating_point()]

    def _close(self, after: Tensor, before: Tensor) -> bool:
        """Whether outputs differ by rounding, which moving a scale changes, at most."""
        dtypes = {before.dtype, *(layer.weight.dtype for layer in self._layers.values())}
        eps = max(torch.finfo(dtype).eps for dtype in dtypes)
        if before.is_cuda:  # torch lets convolutions round to TF32
            eps = max(eps, 2.0**-10)
        after, before = after.double().nan_to_num(), before.double().nan_to_num()
        return bool((after - before).norm() <= math.sqrt(eps) * before.norm())

    def _norm(self, name: str) -> BatchNorm:
        norm: Any = self._model.get_submodule(name)
        return norm


class PushedScale:
    """Moves the scale of a batch norm into the layers behind it, and keeps it there.

    ``ReLU(gamma x + beta) = gamma ReLU(x + beta / gamma)`` for gamma > 0: the scale becomes 1, the
    shift beta / gamma, and the layers behind multiply the weights of their inputs by gamma.
    Channels with gamma <= 0, or hardly above, stay as they are.

    Args:
        norm: The batch norm.
        layers: All layers behind it, with the number of inputs in a row that share a channel.

    Attributes:
        norm: As passed.
        channels: bool[C], whose scale is moved.
    """

    def __init__(self, norm: BatchNorm, layers: Sequence[tuple[DenseLayer, int]]) -> None:
        self.norm = norm
        self._layers = layers
        gamma = norm.weight.detach()
        self.channels = gamma > LEAST_SCALE * gamma.abs().max()
        self._before: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def push(self) -> None:
        """Move the scale; the model computes the same afterwards."""
        changed = [self.norm.weight, self.norm.bias, *(layer.weight for layer, _ in self._layers)]
        self._before = [(tensor, tensor.detach().clone()) for tensor in changed]
        gamma = torch.where(self.channels, self.norm.weight, 1.0).double()
        for layer, repeat in self._layers:
            scale = _by_input(layer, gamma.repeat_interleave(repeat))
            weight = oriented(layer, layer.weight)
            layer.weight.copy_(oriented(layer, weight.double() * scale))
        self.norm.bias.copy_(self.norm.bias.double() / gamma)
        self.hold()

    @torch.no_grad()
    def undo(self) -> None:
        """Undo :meth:`push`, until :meth:`settle`."""
        for tensor, before in self._before:
            tensor.copy_(before)

    def settle(self) -> None:
        """Forget what :meth:`undo` needs."""
        self._before = []

    @torch.no_grad()
    def hold(self) -> None:
        """Scale 1 again in these channels."""
        self.norm.weight.masked_fill_(self.channels, 1.0)


def _by_input(layer: DenseLayer, numbers: Tensor) -> Tensor:
    """Numbers [in] of a layer's inputs at its weights, ``[out, in / groups, *kernel]``."""
    return per_input(numbers, tuple(oriented(layer, layer.weight).shape), groups_of(layer))
