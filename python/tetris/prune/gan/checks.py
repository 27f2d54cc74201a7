"""What the arguments of the GAN pruner, and the terms of a task, must be."""

from __future__ import annotations

import math
from collections.abc import Mapping
from numbers import Real
from typing import Literal, get_args

from torch import Tensor, nn
from torch.optim import Optimizer

from ...checks import describe

Atom = Literal["block", "filter"]


def checked_terms(where: str, whose: str, found: object) -> dict[str, Tensor]:
    """The terms that a task returned, if they are that."""
    method = f"task.{whose}_terms"
    if not isinstance(found, Mapping):
        raise TypeError(
            f"{where}: {method} must return a dict from names to tensors (got {describe(found)})"
        )
    for name, term in found.items():
        if not isinstance(term, Tensor):
            raise TypeError(
                f"{where}: {method} must return tensors, [N] or scalars "
                f"(got {describe(term)} for {name!r})"
            )
    return dict(found)


def check_settings(
    where: str, strength: float, eps: float, atom: Atom, snapshot_every: int, patience: int
) -> None:
    """Raise ValueError for a setting out of its range."""
    if not isinstance(strength, Real) or not 0.0 <= strength < math.inf:
        raise ValueError(
            f"{where}: strength must be a number, not negative (got {describe(strength)})"
        )
    if not isinstance(eps, Real) or not 0.0 < eps < math.inf:
        raise ValueError(f"{where}: eps must be positive, such as 1e-3 (got {describe(eps)})")
    if atom not in get_args(Atom):
        raise ValueError(f"{where}: atom must be 'block' or 'filter' (got {describe(atom)})")
    for name, value in (("snapshot_every", snapshot_every), ("patience", patience)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"{where}: {name} must be an int of 1 or more (got {describe(value)})")


def check_task(where: str, task: object) -> None:
    """Raise TypeError unless something is a task."""
    members = ("generator_terms", "discriminator_terms", "weights")
    if isinstance(task, type) or not all(hasattr(task, member) for member in members):
        hint = f", an instance: {task.__name__}()" if isinstance(task, type) else ""
        raise TypeError(
            f"{where}: task must be a UnconditionalGAN, ConditionalGAN, ImageToImageGAN or another "
            f"GANTask{hint} (got {describe(task)})"
        )


def check_discriminator(
    where: str,
    generator: nn.Module,
    discriminator: nn.Module,
    train_d: bool,
    d_optimizer: Optimizer | None,
) -> None:
    """Raise ValueError unless the optimizer is that of a discriminator that adapts."""
    if not train_d:
        if d_optimizer is not None:
            raise ValueError(f"{where}: d_optimizer is of no use with train_d=False; leave it out")
        return
    if not isinstance(d_optimizer, Optimizer):
        raise ValueError(
            f"{where}: train_d needs d_optimizer=torch.optim.Adam(discriminator.parameters(), a "
            "tenth of the learning rate it was trained with), or pass train_d=False for a fixed "
            f"discriminator (got {describe(d_optimizer)})"
        )
    known = {id(p) for group in d_optimizer.param_groups for p in group["params"]}
    if not any(id(p) in known for p in discriminator.parameters()):
        raise ValueError(f"{where}: d_optimizer holds no parameter of the discriminator")
    if any(id(p) in known for p in generator.parameters()):
        raise ValueError(
            f"{where}: d_optimizer holds parameters of the generator, which an optimizer of its "
            "own is for"
        )
