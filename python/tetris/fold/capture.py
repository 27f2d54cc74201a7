"""Graphs of a model: of the whole, or where that cannot be traced, of the modules that can."""

from __future__ import annotations

import copy
import io
import logging
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils import _pytree as pytree

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


def twin(where: str, model: nn.Module) -> nn.Module:
    """A copy in eval mode to trace and to run, so that the model's own state stays as it is.

    Parameters are shared; buffers, caches and modes are its own.

    Raises:
        ValueError: the model cannot be copied.
    """
    try:
        return copy.deepcopy(model, {id(p): p for p in model.parameters()}).eval()
    except Exception as error:  # an attribute that refuses
        raise ValueError(
            f"{where}: {type(model).__name__} cannot be copied ({one_line(error)}); results that "
            "modules keep as attributes must be detached or removed first"
        ) from error


def fresh(inputs: Inputs) -> Inputs:
    """The same arguments anew, for a model that writes into what it is given."""

    def leaf(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return value.detach().requires_grad_(value.requires_grad)  # results cannot be copied

    return copy.deepcopy(pytree.tree_map(leaf, inputs))


def capture(where: str, model: nn.Module, inputs: Inputs) -> Capture:
    """Trace a model; whatever part of it can be traced.

    Raises:
        ValueError: the model cannot be copied, or not be called with these inputs.
    """
    result = Capture()
    try:
        result.regions.append(Region("", _export(where, model, inputs)))
        return result
    except Exception as error:  # the model's own code runs here
        result.error = f"{type(model).__name__} cannot be traced: {one_line(error)}"
        if "Cache'" in str(error):
            result.error += " (of transformers; leave it out: use_cache=False in example_inputs)"
    model = twin(where, model)
    _inside(where, model, "", result.error, _record(where, model, inputs), result)
    return result


@dataclass
class _Calls:
    """Calls of a model's modules, by the id of the module.

    Attributes:
        arguments: Of the last call.
        count: How many.
        within: (a module, one inside) -> calls of the second while the first was running.
    """

    arguments: dict[int, Inputs] = field(default_factory=dict)
    count: Counter[int] = field(default_factory=Counter)
    within: Counter[tuple[int, int]] = field(default_factory=Counter)


def _inside(
    where: str, module: nn.Module, name: str, error: str, calls: _Calls, result: Capture
) -> None:
    """Trace what is inside a module that cannot be traced."""
    for child_name, child in module.named_children():
        path = f"{name}.{child_name}" if name else child_name
        count = calls.count[id(child)]
        if any(True for _ in child.children()):
            if count == 1:
                try:
                    _check_entered(child, path, calls)
                    program = _export(where, child, calls.arguments[id(child)])
                except Exception as failed:  # as above
                    error_here = f"{path!r} cannot be traced: {one_line(failed)}"
                    _inside(where, child, path, error_here, calls, result)
                else:
                    boundary = Reason(f"the surroundings of {path!r}: {error}", held=False)
                    result.regions.append(Region(path, program, boundary))
                continue
            if count == 0:  # a list of modules, perhaps
                _inside(where, child, path, error, calls, result)
                continue
            error = f"{path!r} is called {count} times from where nothing can be traced: {error}"
        for inner, _ in child.named_modules():
            result.left[f"{path}.{inner}" if inner else path] = error


def _check_entered(module: nn.Module, path: str, calls: _Calls) -> None:
    """Raise if a part of a module is called from elsewhere, too: its graph is not all then."""
    for name, part in module.named_modules():
        if part is not module and calls.within[id(module), id(part)] < calls.count[id(part)]:
            raise RuntimeError(f"'{path}.{name}' is called from elsewhere, too")


def _export(where: str, module: nn.Module, inputs: Inputs) -> ExportedProgram:
    """The graph of a module.

    Raises:
        Exception: of any kind, from torch or the module; RuntimeError if shapes depend on numbers.
    """
    args, kwargs = fresh(inputs)
    with _quiet():
        # Without decompositions of its own, the second step leaves whole layers and attention, and
        # replaces operations in place by ones that return their result.
        program = torch.export.export(twin(where, module), args, kwargs, strict=False)
        program = program.run_decompositions({})
    if program.range_constraints:
        raise RuntimeError("the shape of a result depends on numbers, not on shapes alone")
    return program


@contextmanager
def _quiet() -> Iterator[None]:
    """No word from torch: where it cannot trace, it prints the graph as far as it got."""
    disabled = logging.root.manager.disable
    with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield
        finally:
            logging.disable(disabled)


def _record(where: str, model: nn.Module, inputs: Inputs) -> _Calls:
    """What the modules inside are called with, how often, and while which others run."""
    calls = _Calls()
    running: list[int] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        own = id(module)
        calls.count[own] += 1
        calls.within.update((outer, own) for outer in {*running})
        if any(True for _ in module.children()):
            calls.arguments[own] = fresh((args, kwargs))
        running.append(own)

    def leave(*_: object) -> None:
        running.pop()

    handles = []
    for module in model.modules():
        if module is not model:
            handles.append(module.register_forward_pre_hook(enter, with_kwargs=True))
            handles.append(module.register_forward_hook(leave))
    run(where, model, inputs)
    for handle in handles:  # the modules are traced next
        handle.remove()
    return calls


@torch.no_grad()
def run(where: str, model: nn.Module, inputs: Inputs) -> Any:
    """What a model returns; a ValueError if it cannot be called so."""
    args, kwargs = fresh(inputs)
    try:
        return model(*args, **kwargs)
    except Exception as error:  # as above
        raise ValueError(
            f"{where}: {type(model).__name__} cannot be called with example_inputs "
            f"({one_line(error)}); pass what forward takes: a tensor, a tuple, or a dict"
        ) from error


def one_line(error: BaseException) -> str:
    """Kind and message of an error, shortened."""
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:160]}{'...' if len(text) > 160 else ''}"
