"""The orders of a model as ``share=`` of :func:`tetris.sparsify` and the pruners takes them."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
from torch import nn

from ..checks import check_flags, check_python
from ..progress import steps
from ..prune.orders import Part, SharedOrder, SharedOrders
from .apply import Perms
from .capture import as_inputs
from .channels import Axis, Ids
from .find import Found, find_orders, tensor_names
from .layers import SIDES, Layer, Side, layers_of
from .verify import checked


def shared_orders(
    model: nn.Module, example_inputs: object, *, progress: bool = False
) -> SharedOrders:
    """Find the channels of a model that share an order, so that :func:`fold` can remove it.

    Layers that write to and read from the same channels are searched together and end in one
    order: siblings, producers and consumers, along residual sums and concatenations, through norms,
    within the heads of an attention and the groups of a convolution. What meets an input or output
    of the model keeps its order, and so does what is combined with numbers that have one, such as
    the queries and keys of rotary embeddings.

    The model is traced by ``torch.export``, in eval mode, along the path that it takes with these
    inputs. Of a model that cannot be traced as a whole the largest modules that can be are taken,
    and their inputs and outputs keep orders of their own. Before anything is returned all channels
    are shuffled, in a copy, to see that the model computes the same.

    Args:
        model: The model, sparse or not; it is not changed.
        example_inputs: What it is called with: a tensor, a tuple of arguments, or a dict of keyword
            arguments. Shapes matter, numbers hardly.
        progress: Show a progress bar: large models take minutes to trace and to compare.

    Returns:
        :class:`tetris.prune.SharedOrders`, for ``share=``; ``print`` shows who shares what, and
        what keeps its order and why.

    Raises:
        TypeError: no module, or inputs of another kind.
        ValueError: the model cannot be copied, or not be called with these inputs; it returns
            nothing to compare.
        RuntimeError: the model does not return the same twice, or in other orders.

    Example:
        >>> orders = tetris.shared_orders(model, images)
        >>> pruner = tetris.prune.TetrisPruner(model, sparsity=0.9, block=(16, 16), share=orders)
        >>> ...                                         # train
        >>> fast = tetris.fold(pruner.finalize(), images)
    """
    where = "tetris.shared_orders"
    check_python(where, model)
    check_flags(where, progress=progress)
    inputs = as_inputs(where, example_inputs)
    with steps(progress, "tracing", 2) as advance:
        found = find_orders(where, model, inputs)
        advance(now="comparing in other orders")
        generator = np.random.default_rng(0)
        shuffled: Perms = [_cycle(generator, order.size) for order in found.orders]
        failed = checked(where, model, found.orders, shuffled, inputs, advance).failed
        advance()
    return _as_share(model, found, failed)


def _cycle(generator: np.random.Generator, size: int) -> Ids:
    """A random permutation that leaves no channel where it is."""
    sequence = generator.permutation(size)
    result = np.empty(size, np.int64)
    result[sequence] = np.roll(sequence, 1)
    return result


def _as_share(model: nn.Module, found: Found, failed: Iterable[int]) -> SharedOrders:
    names = tensor_names(model)
    sides: dict[Axis, Side] = {}
    layers: dict[str, Layer] = {}
    for layer in layers_of(model):
        if layer.weight is not None:
            layers[layer.name] = layer
            for side in (0, 1):
                axis = layer.axis(names[id(layer.weight)], side)
                sides.setdefault(axis, (layer.name, side))
    orders: list[SharedOrder] = []
    held: dict[tuple[str, str], str] = {}
    free = unread(model, found)

    def part(axis: Axis, index: Ids) -> str | Part:
        name = sides[axis][0]
        whole = len(index) == axis.size and bool((np.diff(index) == 1).all())
        return name if whole else Part(name, index.tolist())

    def fix(axis: Axis, index: Ids, why: str) -> None:
        name, side = sides[axis]
        own = (part(axis, index),)
        orders.append(SharedOrder(*((), own) if side else (own, ()), fixed=True))
        held.setdefault((name, SIDES[side]), why)

    skipped = set(failed)
    for number, order in enumerate(found.orders):
        members: tuple[list[str | Part], list[str | Part]] = [], []
        for axis, index in order.members:
            if axis not in sides:
                continue
            name, side = sides[axis]
            if number in skipped:
                fix(axis, index, "in another order the model computes something else")
            elif layers[name].depthwise:
                fix(axis, index, "its groups move as a whole")
            else:
                members[side].append(part(axis, index))
        every = [*members[0], *members[1]]
        if len(every) > 1 or any(isinstance(m, Part) for m in every):
            orders.append(SharedOrder(tuple(members[0]), tuple(members[1])))
    for stay in found.stays:
        if stay.axis in sides:
            name, side = sides[stay.axis]
            if stay.reason.held:
                fix(stay.axis, stay.index, stay.reason.text)
            else:
                free.setdefault((name, SIDES[side]), stay.reason.text)
    return SharedOrders(tuple(orders), held, free)


def unread(model: nn.Module, found: Found) -> dict[tuple[str, str], str]:
    """Rows and columns of layers that no graph reads, with the reason."""
    names, axes = tensor_names(model), found.axes()
    result = {}
    for layer in layers_of(model):
        name = "" if layer.weight is None else names[id(layer.weight)]
        if layer.weight is None:
            why = "its weight is computed (by weight_norm, or a pruner's mask)"
        elif any(layer.axis(name, side) in axes for side in (0, 1)):
            continue
        elif name in found.stuck:
            why = found.stuck[name].text
        else:
            why = found.capture.left.get(layer.name, "the model does not call it with these inputs")
        result.update({(layer.name, side): why for side in SIDES})
    return result
