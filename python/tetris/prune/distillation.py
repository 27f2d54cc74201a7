"""Knowledge distillation: a pruned model learns from what it was before, or from another model."""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checks import check_model, describe
from .batches import Batch

_WHERE = "tetris.prune.Distillation"


class Distillation:
    """Runs student and teacher on a batch, and says how far the student is from the teacher.

    With logits z of the student and v of the teacher, at temperature T, and outputs h_f and g_f of
    F modules in them::

        L = T^2 KL(softmax(v / T) || softmax(z / T)) + w / F sum_f mean((h_f - g_f)^2)

    The divergence is summed over classes and averaged over everything else. It has the gradient of
    the cross-entropy with soft targets of Hinton et al., "Distilling the Knowledge in a Neural
    Network", 2015, section 2, whose factor T^2 keeps gradients alike at all temperatures. The
    second term, with ``features`` only, are the hints of Romero et al., "FitNets", ICLR 2015,
    equation 3, between outputs of one shape. A loss with the labels is added by the caller.

    Modules are found by name in every call, so it goes with masked and with stored blocks, with
    copies and with ``DistributedDataParallel``. Under ``torch.autocast`` both models run in it; the
    loss is float32 at least. Classes whose logit is -inf in the teacher add nothing; if it is -inf
    in the student alone, the divergence is infinite.

    Args:
        teacher: The trained model. A frozen copy in eval mode is made: pass the model that is to be
            pruned, before its pruner is made, or any other.
        temperature: T, positive; 1 compares the probabilities as they are.
        features: Names of modules whose outputs should agree, or a mapping from names in the
            student to names in the teacher.
        feature_weight: w.
        dim: Dimension of the classes in the logits.

    Raises:
        TypeError: the teacher is no module.
        ValueError: a number out of its range; a name that is no module; in use: inputs that do not
            fit, shapes that differ, outputs that are no logits; features of an ``nn.DataParallel``
            over several devices.

    Example:
        >>> distillation = tetris.prune.Distillation(model, temperature=4.0)
        >>> pruner = tetris.prune.TetrisPruner(model, sparsity=0.9)
        >>> outputs, soft = distillation(model, x)
        >>> loss = 0.1 * torch.nn.functional.cross_entropy(outputs, target) + 0.9 * soft
    """

    def __init__(
        self,
        teacher: nn.Module,
        *,
        temperature: float = 4.0,
        features: Iterable[str] | Mapping[str, str] = (),
        feature_weight: float = 1.0,
        dim: int = -1,
    ) -> None:
        check_model(_WHERE, teacher)
        if not 0.0 < temperature < math.inf:
            raise ValueError(
                f"{_WHERE}: temperature must be a finite number > 0 (got {describe(temperature)})"
            )
        if not 0.0 <= feature_weight < math.inf:
            raise ValueError(
                f"{_WHERE}: feature_weight must be a finite number >= 0 "
                f"(got {describe(feature_weight)})"
            )
        names = [features] if isinstance(features, str) else features
        self.features = dict(names) if isinstance(names, Mapping) else {n: n for n in names}
        self.teacher = copy.deepcopy(teacher).eval().requires_grad_(False)
        self.temperature = temperature
        self.feature_weight = feature_weight
        self.dim = dim
        for name in self.features.values():
            _module("teacher", self.teacher, name)

    def __call__(self, student: nn.Module, inputs: Any) -> tuple[Any, Tensor]:
        """Run both models.

        Args:
            student: The model in training, in the mode it is in.
            inputs: A tensor, a tuple of arguments, or a dict of them by name; for both models.

        Returns:
            What the student returned, and L, a scalar to call ``backward()`` of.
        """
        batch = Batch(inputs)
        with torch.no_grad(), _watched("teacher", self.teacher, self.features.values()) as goals:
            target = _logits("teacher", batch.outputs(_WHERE, self.teacher))
        with _watched("student", student, self.features) as hints:
            outputs = batch.outputs(_WHERE, student)
        logits = _logits("student", outputs)
        _check_shapes("logits", logits, target)
        loss = self._divergence(logits, target)
        for own, other in self.features.items():
            _check_shapes(f"outputs of {own!r}", hints[own], goals[other])
            difference = F.mse_loss(_wide(hints[own]), _wide(goals[other]))
            loss = loss + self.feature_weight / len(self.features) * difference
        return outputs, loss

    def _divergence(self, logits: Tensor, target: Tensor) -> Tensor:
        q, p = ((_wide(t) / self.temperature).log_softmax(self.dim) for t in (logits, target))
        # Classes that the teacher rules out add 0 * log 0 = 0, also where the student does as well.
        difference = (p - q).masked_fill(p == -math.inf, 0.0)
        return self.temperature**2 * (p.exp() * difference).sum(self.dim).mean()


@contextmanager
def _watched(what: str, model: nn.Module, names: Iterable[str]) -> Iterator[dict[str, Tensor]]:
    """Name -> output of modules of a model that runs meanwhile; the last one of several calls."""
    found: dict[str, Tensor] = {}
    names = list(names)
    modules = {name: _module(what, model, name) for name in names}

    def watch(name: str):
        return lambda module, inputs, output: found.__setitem__(name, output)

    handles = [module.register_forward_hook(watch(name)) for name, module in modules.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()
    for name in names:
        if not isinstance(found.get(name), Tensor):
            raise ValueError(
                f"{_WHERE}: module {name!r} of the {what} must return a tensor when the model "
                f"runs (got {describe(found.get(name))})"
            )


def _module(what: str, model: nn.Module, name: str) -> nn.Module:
    """The module of a name, which is that in the model inside a wrapper."""
    if isinstance(model, nn.DataParallel) and len(model.device_ids) > 1:
        raise ValueError(
            f"{_WHERE}: the {what} is an nn.DataParallel over {len(model.device_ids)} devices, "
            "where a module sees a part of the batch in each; use DistributedDataParallel, or "
            "leave out features="
        )
    wrapped = isinstance(model, (nn.DataParallel, nn.parallel.DistributedDataParallel))
    inner: nn.Module = model.module if wrapped else model
    try:
        return inner.get_submodule(name)
    except AttributeError as error:
        raise ValueError(f"{_WHERE}: the {what} has no module {name!r}") from error


def _logits(what: str, outputs: Any) -> Tensor:
    logits = getattr(outputs, "logits", outputs)
    if not isinstance(logits, Tensor) or not logits.is_floating_point() or not logits.dim():
        raise ValueError(
            f"{_WHERE}: the {what} must return a tensor of logits, or an object that has them as "
            f".logits (got {describe(outputs)})"
        )
    return logits


def _check_shapes(what: str, student: Tensor, teacher: Tensor) -> None:
    if student.shape != teacher.shape:
        raise ValueError(
            f"{_WHERE}: {what} must have one shape in student and teacher "
            f"(got {list(student.shape)} and {list(teacher.shape)})"
        )


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))
