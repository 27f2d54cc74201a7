"""fold: channel orders out of the layers' run time, into their parameters."""

from __future__ import annotations

import inspect
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any, Literal, overload

from torch import nn

from ..checks import check_flags, check_keywords, check_python
from ..model import PruneArguments, sparsify
from ..modules import replace_modules
from ..nn.base import SparseLayer
from ..progress import steps
from ..prune.report import SparsifyReport
from .apply import Perms, apply, choose
from .capture import Inputs, as_inputs
from .channels import Axis
from .find import Found, find_orders, tensor_names
from .layers import SIDES, layers_of
from .report import FoldedOrder, FoldReport
from .shared import shared_orders, unread
from .verify import checked

if TYPE_CHECKING:
    from typing_extensions import Unpack

_WHERE = "tetris.fold"
_OWN = ("model", "share", "inplace", "return_report")
_ELSEWHERE = (
    "the layers on these channels have several orders, or move them between heads or groups; "
    "search them together: share=tetris.shared_orders(model, example_inputs)"
)


@overload
def fold(
    model: nn.Module,
    example_inputs: object,
    *,
    inplace: bool = ...,
    return_report: Literal[False] = ...,
    progress: bool = ...,
    **settings: Unpack[PruneArguments],
) -> nn.Module: ...


@overload
def fold(
    model: nn.Module,
    example_inputs: object,
    *,
    inplace: bool = ...,
    return_report: Literal[True],
    progress: bool = ...,
    **settings: Unpack[PruneArguments],
) -> tuple[nn.Module, FoldReport]: ...


def fold(
    model: nn.Module,
    example_inputs: object,
    *,
    inplace: bool = False,
    return_report: bool = False,
    progress: bool = False,
    **settings: Unpack[PruneArguments],
) -> nn.Module | tuple[nn.Module, FoldReport]:
    """Make a sparse model compute the same without permutations at run time.

    A sparse layer gathers its inputs and scatters its outputs through the orders that its blocks
    were searched under. Along channels that all layers keep in one order the network itself can be
    put into it: rows and biases of the layers that write them, norms, embeddings and depthwise
    layers on the way, columns of the layers that read them. Then nothing is left to apply.

    Layers agree if they were searched together, with ``share=tetris.shared_orders(model,
    example_inputs)``, or, if pruning is a matter of one call, with ``fold(model, example_inputs,
    sparsity=..., block=...)``, which does all three steps. Otherwise the order of most of them is
    folded, and each of the others keeps its own; blocks that are one row high or one column wide
    move without any. The report says which, and why.

    Args:
        model: A model with sparse layers, or with ``settings`` a dense one.
        example_inputs: What the model is called with: a tensor, a tuple of arguments, or a dict of
            keyword arguments. The model is traced on the path that it takes with them in eval mode,
            as :func:`shared_orders` says, and before it is returned compared on them.
        inplace: Change the model itself; otherwise a deep copy. Parameters remain the same objects
            with their elements in another order: make an optimizer that has stepped anew.
        return_report: Return ``(model, report)``; ``print(report)`` shows how many permutations
            were folded, and which are left and why.
        progress: Show progress bars: large models take minutes to trace and to compare.
        **settings: Prune first, with these arguments of :func:`tetris.sparsify`, all layers that
            share an order together.

    Returns:
        The model, of the same class and with the same names; its results are the same to 1e-5. With
        ``return_report`` the model and a :class:`tetris.FoldReport`.

    Raises:
        TypeError: no module, inputs of another kind, or an argument that sparsify has not.
        ValueError: the model has no sparse layers and there are no settings to prune it; it cannot
            be copied, or not be called with these inputs; it returns nothing to compare; as
            :func:`tetris.sparsify`.
        RuntimeError: the model does not return the same twice; the folded one differs, and no
            single order is to blame. The model is as it was then.

    Example:
        >>> fast, report = tetris.fold(
        ...     model, images, sparsity=0.9, block=(16, 16), exclude="head", return_report=True
        ... )
        >>> print(report)

    Permutations that cancel between layers: Ji et al., "TETRIS: TilE-matching the TRemendous
    Irregular Sparsity", NeurIPS 2018, section 3.3; Pool and Yu, "Channel Permutations for N:M
    Sparsity", NeurIPS 2021, section 5.
    """
    check_python(_WHERE, model)
    check_flags(_WHERE, inplace=inplace, progress=progress, return_report=return_report)
    inputs = as_inputs(_WHERE, example_inputs)
    if settings:
        known = inspect.signature(sparsify).parameters
        check_keywords(_WHERE, settings, [n for n in known if n not in _OWN])
        timed = {}
        if settings.get("latency") is not None:
            timed["example_inputs"] = example_inputs
        orders = shared_orders(model, example_inputs, progress=progress)
        before = dict(model.named_modules())
        model, pruning = sparsify(
            model,
            share=orders,
            inplace=inplace,
            return_report=True,
            progress=progress,
            **timed,
            **settings,
        )
        try:
            result, report = _fold(model, inputs, True, pruning, progress)
        except BaseException:
            if inplace:  # as it was, not half of what was asked for
                replace_modules(model, {layer.name: before[layer.name] for layer in pruning.layers})
            raise
        return (result, report) if return_report else result
    if not any(isinstance(m, SparseLayer) for m in model.modules()):
        raise ValueError(
            f"{_WHERE}: {type(model).__name__} has no sparse layers; prune it first, with "
            "share=tetris.shared_orders(model, example_inputs), or pass what tetris.sparsify "
            "takes: fold(model, example_inputs, sparsity=0.9, block=(16, 16))"
        )
    result, report = _fold(model, inputs, inplace, None, progress)
    return (result, report) if return_report else result


def _fold(
    model: nn.Module,
    inputs: Inputs,
    inplace: bool,
    pruning: SparsifyReport | None,
    progress: bool,
) -> tuple[nn.Module, FoldReport]:
    with steps(progress, "tracing", 2) as advance:
        found = find_orders(_WHERE, model, inputs)
        advance(now="comparing")
        perms = choose(model, found.orders)
        changed, perms, off, failed = checked(_WHERE, model, found.orders, perms, inputs, advance)
        advance()
    report = FoldReport(
        before=len(list(_permuted(model))),
        after=len(list(_permuted(changed))),
        orders=tuple(_folded(found, perms)),
        kept=_kept(changed, found, failed),
        difference=off,
        untraced=found.capture.error,
        pruning=pruning,
    )
    if inplace:
        apply(model, found.orders, perms)
        return model, report
    return changed, report


def _permuted(model: nn.Module) -> Iterable[tuple[str, int, Axis]]:
    """Rows and columns that are permuted at run time."""
    names = tensor_names(model)
    for layer in layers_of(model):
        if isinstance(layer.module, SparseLayer):
            for side, perm in enumerate((layer.module.row_perm, layer.module.col_perm)):
                if perm is not None:
                    yield layer.name, side, layer.axis(names[id(layer.module.values)], side)


def _folded(found: Found, perms: Perms) -> Iterable[FoldedOrder]:
    for order, perm in zip(found.orders, perms, strict=True):
        if perm is not None:
            yield FoldedOrder(
                order.size, tuple(dict.fromkeys(m.axis.tensor for m in order.members))
            )


def _kept(model: nn.Module, found: Found, failed: dict[int, float]) -> dict[tuple[str, str], str]:
    """Why permutations are left."""
    reasons: dict[Axis, str] = {}
    for stay in found.stays:
        reasons.setdefault(stay.axis, stay.reason.text)
    for number, off in failed.items():
        for member in found.orders[number].members:
            reasons.setdefault(member.axis, f"in another order results differ by {off:.1e}")
    nowhere: dict[Any, str] = unread(model, found)
    return {
        (name, SIDES[side]): nowhere.get((name, SIDES[side])) or reasons.get(axis, _ELSEWHERE)
        for name, side, axis in _permuted(model)
    }
