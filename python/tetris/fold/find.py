"""The orders of a model, from its graphs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
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
    read: set[str] = set()
    for region in captured.regions:
        signature = region.program.graph_signature
        stored = {
            node: names[id(tensor_at(model, f"{region.prefix}.{name}" if region.prefix else name))]
            for given in (signature.inputs_to_parameters, signature.inputs_to_buffers)
            for node, name in given.items()
        }
        constants = signature.inputs_to_lifted_tensor_constants
        Flow(channels, region.program.graph, stored, constants, region.boundary, region.prefix)
        read.update(stored.values())
    for name, reason in _read_elsewhere(model, captured, names):
        if name in read:
            channels.freeze_tensor(name, reason)
    for name, other in _overlapping(model, names):
        for each in (name, other):
            channels.freeze_tensor(each, Reason(f"{name} and {other} share memory"))
    orders, stays = channels.result()
    return Found(tuple(orders), tuple(stays), channels.stuck, captured)


def _read_elsewhere(
    model: nn.Module, captured: Capture, names: Mapping[int, str]
) -> Iterator[tuple[str, Reason]]:
    """Parameters and buffers of modules that no graph has, by the names that graphs use."""
    prefixes = [f"{region.prefix}." if region.prefix else "" for region in captured.regions]
    for name, module in model.named_modules(remove_duplicate=False):
        if not any(f"{name}.".startswith(prefix) for prefix in prefixes):
            reason = Reason(f"{name or 'the model'} reads it as well, untraced", held=False)
            for tensor in (*module.parameters(False), *module.buffers(False)):
                yield names[id(tensor)], reason


def _overlapping(model: nn.Module, names: Mapping[int, str]) -> Iterator[tuple[str, str]]:
    """Pairs of tensors in the same memory: whoever moves one moves the other."""
    spans: list[tuple[str, int, int, str]] = []
    for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
        if tensor.layout is torch.strided and not tensor.is_meta and tensor.numel():
            last = sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
            start = tensor.data_ptr()
            end = start + (last + 1) * tensor.element_size()
            spans.append((str(tensor.device), start, end, names[id(tensor)]))
    widest = ("", 0, 0, "")  # of those before, the one that ends last
    for span in sorted(spans):
        if span[0] == widest[0] and span[1] < widest[2]:
            yield widest[3], span[3]
        widest = span if span[0] != widest[0] else max(widest, span, key=lambda s: s[2])


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
