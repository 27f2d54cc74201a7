"""Graphs of a model: of the whole, or where that cannot be traced, of the modules that can."""

from __future__ import annotations

import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..checks import describe
from .channels import Reason

Inputs = tuple[tuple[Any, ...], dict[str, Any]]  # arguments of a call


@dataclass(frozen=True)
class Region:
    """A module that was traced.

    Attributes:
        prefix: Its name.
        program: Its graph.
        boundary: Why its inputs and outputs are no inputs and outputs of the model; None if they
            are.
    """

    prefix: str
    program: ExportedProgram
    boundary: Reason | None = None


@dataclass
class Capture:
    """What could be traced of a model.

    Attributes:
        regions: The parts.
        left: Module -> why neither it nor anything around it was traced.
        error: Why the model as a whole could not be traced, or None.
    """

    regions: list[Region] = field(default_factory=list)
    left: dict[str, str] = field(default_factory=dict)
    error: str | None = None


def as_inputs(where: str, example_inputs: object) -> Inputs:
    """Arguments of the model's call, from a tensor, a tuple of arguments, or a dict of keywords."""
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        if all(isinstance(key, str) for key in example_inputs):
            return (), dict(example_inputs)
    elif isinstance(example_inputs, (tuple, list)):
        return tuple(example_inputs), {}
    raise TypeError(
        f"{where}: example_inputs must be what the model is called with: a tensor, a tuple of "
        f"arguments, or a dict of keyword arguments (got {describe(example_inputs)})"
    )


def capture(where: str, model: nn.Module, inputs: Inputs) -> Capture:
    """Trace a model, in eval mode; whatever part of it can be traced.

    Raises:
        ValueError: the model cannot be called with these inputs.
    """
    result = Capture()
    try:
        result.regions.append(Region("", _export(model, inputs)))
        return result
    except Exception as error:  # the model's own code runs here
        result.error = f"{type(model).__name__} cannot be traced: {one_line(error)}"
        if "Cache'" in str(error):
            result.error += " (of transformers; leave it out: use_cache=False in example_inputs)"
    calls, counts = _record(where, model, inputs)
    _inside(model, "", result.error, calls, counts, result)
    return result


def _inside(
    module: nn.Module,
    name: str,
    error: str,
    calls: Mapping[int, Inputs],
    counts: Mapping[int, int],
    result: Capture,
) -> None:
    """Trace what is inside a module that cannot be traced."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        count = counts.get(id(child), 0)
        if any(True for _ in child.children()):
            if count == 1:
                try:
                    program = _export(child, calls[id(child)])
                except Exception as failed:  # as above
                    error_here = f"{path!r} cannot be traced: {one_line(failed)}"
                    _inside(child, path, error_here, calls, counts, result)
                else:
                    boundary = Reason(f"the surroundings of {path!r}: {error}", held=False)
                    result.regions.append(Region(path, program, boundary))
                continue
            if count == 0:  # a list of modules, perhaps
                _inside(child, path, error, calls, counts, result)
                continue
            error = f"{path!r} is called {count} times from where nothing can be traced: {error}"
        for inner, _ in child.named_modules():
            result.left[f"{path}.{inner}" if inner else path] = error


def _export(module: nn.Module, inputs: Inputs) -> ExportedProgram:
    args, kwargs = inputs
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        # Without decompositions of its own, the second step leaves whole layers and attention, and
        # replaces operations in place by ones that return their result.
        return torch.export.export(module, args, kwargs, strict=False).run_decompositions({})


def _record(where: str, model: nn.Module, inputs: Inputs) -> tuple[dict[int, Inputs], Counter[int]]:
    """What each module is called with, and how often."""
    calls: dict[int, Inputs] = {}
    counts: Counter[int] = Counter()

    def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        counts[id(module)] += 1
        calls[id(module)] = args, kwargs

    handles = [
        m.register_forward_pre_hook(hook, with_kwargs=True)
        for m in model.modules()
        if m is not model
    ]
    try:
        run(where, model, inputs)
    finally:
        for handle in handles:
            handle.remove()
    return calls, counts


@torch.no_grad()
def run(where: str, model: nn.Module, inputs: Inputs) -> Any:
    """What a model returns; a ValueError if it cannot be called so."""
    args, kwargs = inputs
    try:
        return model(*args, **kwargs)
    except Exception as error:  # as above
        raise ValueError(
            f"{where}: {type(model).__name__} cannot be called with example_inputs "
            f"({one_line(error)}); pass what forward takes: a tensor, a tuple, or a dict"
        ) from error


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in eval mode; every module is as before afterwards."""
    before = {module: module.training for module in model.modules()}
    try:
        yield model.eval() and None
    finally:
        for module, training in before.items():
            module.training = training


def one_line(error: BaseException) -> str:
    """Kind and message of an error, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"
