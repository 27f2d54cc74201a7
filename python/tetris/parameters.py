"""Giving a Parameter other contents while it stays the same object, and optimizers hold it."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from .checks import describe
from .sharding import fill


def check_optimizers(
    where: str, optimizers: Optimizer | Iterable[Optimizer]
) -> tuple[Optimizer, ...]:
    """The optimizers of an argument that may be one or several."""
    found = (optimizers,) if isinstance(optimizers, Optimizer) else optimizers
    if not isinstance(found, Iterable):
        raise TypeError(
            f"{where}: optimizers must be torch.optim.Optimizer, one or several "
            f"(got {describe(found)})"
        )
    found = tuple(found)
    for optimizer in found:
        if not isinstance(optimizer, Optimizer):
            raise TypeError(
                f"{where}: optimizers must be torch.optim.Optimizer, one or several "
                f"(got {describe(optimizer)} among them)"
            )
    return found


def check_states(where: str, parameter: nn.Parameter, optimizers: Iterable[Optimizer]) -> None:
    """Raise ValueError unless all that optimizers keep of a Parameter can move with its blocks."""
    for optimizer in optimizers:
        kind = type(optimizer).__name__
        check_kind(where, parameter, optimizer)
        for name, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor) and state.shape == parameter.shape:
                continue
            for part in tensors_of(state):
                if part.dim():
                    inside = "" if part is state else f" in a {type(state).__name__}"
                    raise ValueError(
                        f"{where}: {kind} keeps {name!r} of shape {list(part.shape)}{inside}, "
                        "which cannot follow blocks: states must be scalars or tensors shaped "
                        f"like the parameter, {list(parameter.shape)}; use SGD or Adam"
                    )


def check_kind(where: str, parameter: nn.Parameter, optimizer: Optimizer) -> None:
    """Raise ValueError if an optimizer of a Parameter is of a kind that cannot follow blocks."""
    kind = type(optimizer).__name__
    # Its history is of all Parameters in one vector, kept under the first of them.
    if isinstance(optimizer, torch.optim.LBFGS) and holds(optimizer, parameter):
        raise ValueError(
            f"{where}: {kind} keeps vectors over all its parameters, which cannot follow blocks; "
            "use SGD or Adam"
        )
    if kind == "Muon" and holds(optimizer, parameter):  # by name: not all torch have it
        raise ValueError(
            f"{where}: {kind} needs matrices, and stored blocks are [nnzb, bi, bo]; use SGD or "
            "Adam, or masks of whole weights, TetrisPruner(execution='masked')"
        )
    check_zeros(where, parameter, optimizer)


def check_zeros(where: str, parameter: nn.Parameter, optimizer: Optimizer) -> None:
    """Raise ValueError if what an optimizer keeps of a Parameter cannot start at zero.

    That is how the states of weights that come back start.
    """
    # They start at the learning rate, and change by factors.
    if isinstance(optimizer, torch.optim.Rprop) and holds(optimizer, parameter):
        raise ValueError(
            f"{where}: {type(optimizer).__name__} keeps a step size for each weight, which would "
            "be zero where blocks come back, so that they do not learn; use SGD or Adam"
        )


def holds(optimizer: Optimizer, parameter: nn.Parameter) -> bool:
    """Whether an optimizer updates a Parameter."""
    return any(p is parameter for group in optimizer.param_groups for p in group["params"])


def move_parameter(
    parameter: nn.Parameter, move: Callable[[Tensor], Tensor], optimizers: Iterable[Optimizer]
) -> None:
    """Replace numbers, gradient and optimizers' states of a Parameter by ``move`` of each.

    The Parameter stays the same object, of another shape. :func:`check_states` tells beforehand
    whether this works.
    """
    shape, grad = parameter.shape, parameter.grad
    parameter.grad = None
    replace_data(parameter, move(parameter.data))
    if grad is not None:
        parameter.grad = move(grad)
    for optimizer in optimizers:
        for name, state in optimizer.state.get(parameter, {}).items():
            if isinstance(state, Tensor) and state.shape == shape:
                optimizer.state[parameter][name] = move(state)


@torch.no_grad()
def clear_states(parameter: nn.Parameter, where: Tensor, optimizers: Iterable[Optimizer]) -> None:
    """Zero what optimizers keep of some numbers of a Parameter, in states that are shaped like it.

    Args:
        parameter: The Parameter.
        where: bool, shaped like it.
        optimizers: Those that hold other Parameters only are left alone.
    """
    for optimizer in optimizers:
        for state in optimizer.state.get(parameter, {}).values():
            if isinstance(state, Tensor) and state.shape == parameter.shape:
                fill(state, where, 0.0)


def replace_data(parameter: nn.Parameter, data: Tensor) -> None:
    """Give a Parameter other numbers, perhaps of another shape."""
    # NOTE: a graph that is still alive, such as that of the last loss, keeps the node that
    # accumulates this gradient, and with it the old shape. Only another type makes torch drop it.
    other = torch.float64 if parameter.dtype != torch.float64 else torch.float32
    parameter.data = parameter.data.new_empty(0, dtype=other)
    parameter.data = data


def tensors_of(state: object) -> list[Tensor]:
    """The tensors of a value, in lists, tuples and mappings too."""
    if isinstance(state, Tensor):
        return [state]
    if isinstance(state, Mapping):
        state = list(state.values())
    return (
        [t for part in state for t in tensors_of(part)] if isinstance(state, (list, tuple)) else []
    )
