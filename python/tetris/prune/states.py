"""What a saved state must hold, checked before anything is changed by it.

``where`` is the function the user called, ``name`` the entry of the state.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from ..checks import check_sparsity, describe


def check_state(where: str, state: object) -> None:
    """Raise ValueError unless a whole state is a dict."""
    if not isinstance(state, Mapping):
        raise ValueError(
            f"{where}: takes what state_dict() returned, a dict (got {describe(state)})"
        )


def check_count(where: str, name: str, value: object) -> int:
    """Return a number of steps and the like, or raise ValueError."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(
            f"{where}: {name} of the state must be an int >= 0 (got {describe(value)})"
        )
    return value


def check_flag(where: str, name: str, value: object) -> bool:
    """Return a bool that may be saved as a tensor, or raise ValueError."""
    flag = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
    if not isinstance(flag, bool):
        raise ValueError(f"{where}: {name} of the state must be a bool (got {describe(value)})")
    return flag


def check_mapping(
    where: str, name: str, value: object, keys: Iterable[str] | None = None
) -> Mapping[str, Any]:
    """Return a dict, of these keys and no others if they are given, or raise ValueError."""
    if not isinstance(value, Mapping):
        raise ValueError(f"{where}: {name} of the state must be a dict (got {describe(value)})")
    if keys is not None and set(value) != (expected := set(keys)):
        wanted, got = (", ".join(sorted(map(repr, k))) or "none" for k in (expected, value))
        raise ValueError(f"{where}: {name} of the state must have the keys {wanted} (got {got})")
    return value


def check_shares(where: str, name: str, value: object, layers: Iterable[str]) -> None:
    """Raise ValueError unless an entry holds a share in [0, 1] of each layer."""
    for layer, share in check_mapping(where, name, value, layers).items():
        check_sparsity(f"{where}: {name} of layer {layer!r} in the state", share)


def check_like(where: str, name: str, value: object, like: Tensor) -> None:
    """Raise ValueError unless an entry is a tensor of this type and shape."""
    expected = f"{like.dtype}{list(like.shape)}"
    if not isinstance(value, Tensor):
        raise ValueError(
            f"{where}: {name} of the state must be a tensor, {expected} (got {describe(value)})"
        )
    if value.dtype != like.dtype or value.shape != like.shape:
        raise ValueError(
            f"{where}: {name} of the state must be {expected} "
            f"(got {value.dtype}{list(value.shape)})"
        )


def check_generator(where: str, name: str, value: object) -> None:
    """Raise ValueError unless an entry is a state of a ``torch.Generator``."""
    try:
        torch.Generator().set_state(value)  # type: ignore[arg-type]
    except (TypeError, RuntimeError) as error:
        raise ValueError(
            f"{where}: {name} of the state must be what torch.Generator().get_state() returns "
            f"(got {describe(value)})"
        ) from error


def check_optimizer(where: str, name: str, value: object, optimizer: Optimizer) -> None:
    """Raise ValueError unless an optimizer takes an entry as its state."""
    trial = copy.deepcopy(optimizer)
    try:
        trial.load_state_dict(copy.deepcopy(value))  # type: ignore[arg-type]
        for parameter in (p for group in trial.param_groups for p in group["params"]):
            parameter.grad = torch.zeros_like(parameter)
            # NOTE: before step(), which writes past the end of a shorter tensor (torch 2.13).
            for key, part in trial.state[parameter].items():
                if isinstance(part, Tensor) and part.dim() and part.shape != parameter.shape:
                    raise ValueError(f"{key} must be {list(parameter.shape)}, not {part.shape}")
        trial.step()
    except Exception as error:  # torch checks little, so that anything may come
        raise ValueError(
            f"{where}: {name} of the state must be what this {type(optimizer).__name__}'s "
            f"state_dict() returns (got {describe(value)}: {type(error).__name__}: {error})"
        ) from error
