"""The orders of a model, from its graphs."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, nn

from . import rules as rules  # registers them
from .capture import Capture, Inputs, capture
from .channels import Axis, Channels, Order, Reason, Stay
from .flow import Flow


@dataclass(frozen=True)
class Found:
    """What a model's graphs tell.

    Attributes:
        orders: Channels that may be reordered, with all axes they are in.
        stays: Channels that may not, and why.
        stuck: Parameters that stay as a whole, by name, and why.
        capture: The graphs.
    """

    orders: tuple[Order, ...]
    stays: tuple[Stay, ...]
    stuck: Mapping[str, Reason]
    capture: Capture

    def axes(self) -> set[Axis]:
        """All axes that a graph reads."""
        return {m.axis for o in self.orders for m in o.members} | {s.axis for s in self.stays}


def find_orders(where: str, model: nn.Module, inputs: Inputs) -> Found:
    """Trace a model in eval mode, and find which channels share an order."""
    names = tensor_names(model)
    channels = Channels()
    captured = capture(where, model, inputs)
    for region in captured.regions:
        signature = region.program.graph_signature
        stored = {
            node: names[id(tensor_at(model, f"{region.prefix}.{name}" if region.prefix else name))]
            for given in (signature.inputs_to_parameters, signature.inputs_to_buffers)
            for node, name in given.items()
        }
        Flow(channels, region.program.graph, stored, region.boundary, region.prefix)
    orders, stays = channels.result()
    return Found(tuple(orders), tuple(stays), channels.stuck, captured)


def tensor_names(model: nn.Module) -> dict[int, str]:
    """Id of each parameter and buffer -> the first of its names."""
    names: dict[int, str] = {}
    for given in (model.named_parameters, model.named_buffers):
        for name, tensor in given(remove_duplicate=False):
            names.setdefault(id(tensor), name)
    return names


def tensor_at(model: nn.Module, name: str) -> Tensor:
    """A parameter or buffer by name."""
    path, _, own = name.rpartition(".")
    return getattr(model.get_submodule(path), own)
