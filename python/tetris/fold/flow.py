"""Which channels a graph makes meet, operation by operation.

The graph is one of torch.export: ATen operations on values of known shape, parameters as inputs.
Rules for operations are in :mod:`tetris.fold.rules`. What has no rule may do anything: the channels
that reach it stay where they are.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, fx

from .channels import Axis, Channels, Ids, Reason
from .values import Labelled, Plain, Shape, Stored, Value, coordinates

Rule = Callable[["Flow", dict[str, Any]], Any]

#: Rules by name of the operation, such as ``aten.linear``; filled by :mod:`tetris.fold.rules`.
RULES: dict[str, Rule] = {}


def rule(*names: str) -> Callable[[Rule], Rule]:
    """Register the rule of some operations, of ATen where no other namespace is named.

    A rule takes the flow and the arguments by name, with values in place of tensors. It returns the
    value of the result, a list where there are several, or NotImplemented.
    """

    def register(function: Rule) -> Rule:
        RULES.update(dict.fromkeys((n if "." in n else f"aten.{n}" for n in names), function))
        return function

    return register


class Flow:
    """Reads a graph into a model's channels.

    Args:
        channels: Where to note what is found.
        graph: The graph.
        stored: Placeholder -> name of the parameter or buffer that it is.
        constants: Placeholder -> name of the tensor that it is otherwise, an attribute perhaps.
        boundary: Of inputs and outputs: None if they are the model's, or why others stand here.
        prefix: Name of the module that was traced, for messages.

    Attributes:
        shape: Of the result of the operation at hand; a list of shapes if it has several.
    """

    def __init__(
        self,
        channels: Channels,
        graph: fx.Graph,
        stored: Mapping[str, str],
        constants: Mapping[str, str],
        boundary: Reason | None = None,
        prefix: str = "",
    ) -> None:
        self.channels = channels
        self.boundary = boundary
        self.prefix = prefix
        self.shape: Any = None
        self._node: fx.Node | None = None
        self._steps = 0
        self._values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            self._node = node
            self.shape = _shape_of(node.meta.get("val"))
            if node.op == "placeholder":
                self._values[node] = self._input(node, stored, constants)
            elif node.op == "call_function":
                self._values[node] = self._call(node)
            elif node.op == "output":
                outputs = fx.map_arg(node.args, self._values.__getitem__)
                self.stop(outputs, boundary or Reason("it is an output of the model"))
            else:  # get_attr: a constant, or a graph inside
                self._values[node] = Plain(self.shape or (), Reason("a constant"))

    # -- the operation at hand ------------------------------------------------------------------

    @property
    def operation(self) -> str:
        """Its name, without a namespace."""
        assert self._node is not None
        return name_of(self._node.target).rpartition(".")[2]

    @property
    def first_only(self) -> bool:
        """Whether of several results only the first one is used."""
        assert self._node is not None
        return all(u.target is operator.getitem and u.args[1] == 0 for u in self._node.users)

    # -- results --------------------------------------------------------------------------------

    def describe(self) -> str:
        """The operation at hand, and where it is."""
        node = self._node
        assert node is not None
        stack = node.meta.get("nn_module_stack") or {}
        inside = [path for path, _ in stack.values() if path]
        where = ".".join(part for part in (self.prefix, *inside[-1:]) if part)
        return f"{node.name} (in {where})" if where else node.name

    def plain(self) -> Plain:
        """A result that stays the same when channels are reordered."""
        return Plain(self.shape, Reason(self.describe()))

    def labelled(self, dim: int, ids: Ids) -> Value:
        """A result whose channels lie along one axis."""
        return self.checked(Labelled.along(self.shape, dim % len(self.shape), ids))

    def checked(self, value: Labelled) -> Value:
        """The same, unless it is of one channel: it would meet all others and tie them together."""
        if value.dims:
            return value
        self.stop(value, Reason(f"{self.describe()} is of one channel"))
        return Plain(value.shape, Reason(self.describe()))

    def unknown(self, values: Any) -> Any:
        """The result of an operation of which nothing is known."""
        moving = any(isinstance(v, (Labelled, Stored)) for v in _flat(values))
        self.stop(values, Reason(f"{self.describe()} may mix channels", held=False))
        return _each(self.shape, Reason(self.describe(), held=not moving))

    # -- channels -------------------------------------------------------------------------------

    def of(self, stored: Stored, dim: int) -> Ids:
        """The channels along an axis of a parameter."""
        entry = stored.dims[dim % len(stored.dims)]
        if entry is None:
            return self.channels.constant(stored.shape[dim], Reason("it is repeated"))
        own, index = entry
        return self.channels.of(Axis(stored.tensor, own, stored.whole[own]))[index]

    def stop(self, values: Any, reason: Reason) -> None:
        """Let all channels of some values stay where they are."""
        for value in _flat(values):
            if isinstance(value, Labelled):
                self.channels.freeze(value.ids, reason)
            elif isinstance(value, Stored):
                self.channels.freeze_tensor(value.tensor, reason)

    def settled(self, value: Value, dim: int) -> Value:
        """A value as one that stays the same, if all its channels do and none lie along an axis."""
        if not isinstance(value, Labelled) or dim % len(value.shape) in value.dims:
            return value
        if not self.channels.frozen(value.ids):
            return value
        return Plain(value.shape, Reason(self.describe()))

    def alike(self, value: Labelled, among: Sequence[int]) -> None:
        """An operation treats channels alike, as long as they trade places along some axes only."""
        kept = [d for d in value.dims if d not in among] if {*among} & {*value.dims} else []
        self.channels.meet([value.ids], [value.places, *coordinates(value.ids.shape, kept)])

    def contract(self, value: Value, dim: int, ids: Ids) -> None:
        """Channels of a parameter meet those along an axis of a value: it is summed over these."""
        if not isinstance(value, Labelled):
            origin = value.origin if isinstance(value, Plain) else Reason(self.describe())
            self.channels.freeze(ids, Reason(f"it reads {origin.text}", origin.held))
            self.stop(value, Reason(f"{self.describe()} reads it as it is"))
            return
        dim %= len(value.shape)
        label = [1] * len(value.shape)
        label[dim] = len(ids)
        others = [d for d in value.dims if d != dim]
        places = [value.places, *coordinates(value.ids.shape, others)]
        self.channels.meet([value.ids, ids.reshape(label)], places)

    def elementwise(self, operands: Sequence[Value], like: Shape | None = None) -> Value:
        """Values that meet element by element; along axes of size one they are repeated.

        Args:
            operands: The values.
            like: Shape of the result, if it is not that of the operation.
        """
        shape: Shape = self.shape if like is None else like
        rank = len(shape)
        labels = {i: o.padded(rank) for i, o in enumerate(operands) if isinstance(o, Labelled)}
        if not labels:
            self.stop(operands, Reason(f"{self.describe()} reads it as it is"))
            origins = [o.origin for o in operands if isinstance(o, Plain)]
            return Plain(shape, origins[0] if origins else Reason(self.describe()))
        axes = sorted({d for label in labels.values() for d in label.dims})
        for i, operand in enumerate(operands):
            if isinstance(operand, Stored) and (found := self._beside(operand, axes, rank)):
                labels[i] = found
        #: Axes of channels along which an operand differs for other reasons than channels.
        given = {
            d: operand
            for i, operand in enumerate(operands)
            for d in axes
            if _size(operand, d, rank) > 1 and (i not in labels or d not in labels[i].dims)
        }
        every = [label.ids for label in labels.values()]
        full = np.broadcast_shapes(*(ids.shape for ids in every))
        covering = [label for label in labels.values() if label.ids.shape == full]
        for d, operand in given.items():
            origin = operand.origin if isinstance(operand, Plain) else Reason("a parameter")
            order = ", whose order is given" if origin.held else ""
            reason = Reason(f"{self.describe()} combines it with {origin.text}{order}", origin.held)
            for ids in every:
                if len(given) == len(axes):
                    self.channels.freeze(ids, reason)
                elif ids.shape[d] > 1:
                    self.channels.note(ids, reason)
        if not covering:
            for ids in every:
                self.channels.freeze(ids, Reason(f"{self.describe()} combines several axes"))
            return Plain(shape, Reason(self.describe()))
        places = [label.places for label in labels.values()]
        self.channels.meet(every, [*places, *coordinates(full, sorted(given))])
        return Labelled(shape, covering[0].ids, covering[0].places)

    def fresh(self) -> int:
        """A large odd number that no other call gives, to tell places apart."""
        self._steps += 1
        return int(np.random.default_rng(self._steps).integers(1 << 40, 1 << 62)) | 1

    # -- inside ---------------------------------------------------------------------------------

    def _beside(self, stored: Stored, axes: Sequence[int], rank: int) -> Labelled | None:
        """A parameter that meets channels along one axis, as that axis's channels."""
        offset = rank - len(stored.shape)
        filled = [d for d, entry in enumerate(stored.dims) if entry is not None]
        meeting = [d for d in filled if d + offset in axes]
        for d in filled:
            if len(meeting) != 1 or d not in meeting:
                self.channels.freeze(
                    self.of(stored, d), Reason(f"{self.describe()} reads it as it is")
                )
        if len(meeting) != 1:
            return None
        return Labelled.along(stored.shape, meeting[0], self.of(stored, meeting[0])).padded(rank)

    def _input(
        self, node: fx.Node, stored: Mapping[str, str], constants: Mapping[str, str]
    ) -> Value:
        if node.name in constants:
            name = ".".join(part for part in (self.prefix, constants[node.name]) if part)
            return Plain(self.shape or (), Reason(f"the constant {name}"))
        if (name := stored.get(node.name)) is None:
            return Plain(self.shape or (), self.boundary or Reason("an input of the model"))
        shape = self.shape
        if not node.meta["val"].is_floating_point():
            return Plain(shape, Reason(name))  # counts, positions
        dims = tuple((d, np.arange(n)) if n > 1 else None for d, n in enumerate(shape))
        return Stored(shape, name, dims, shape)

    def _call(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            source, index = cast("tuple[fx.Node, int]", node.args)
            values = self._values[source]
            return values[index] if isinstance(values, list) else self.unknown(values)
        args, kwargs = fx.map_arg((node.args, node.kwargs), self._values.__getitem__)  # type: ignore[misc]
        bound = _bound(node.target, args, kwargs)
        tensors = _flat(bound)
        if self.shape is None:  # an assertion, or who knows
            if not self.operation.lstrip("_").startswith(("assert", "sym_constrain")):
                self.unknown(tensors)
            return None
        if not any(isinstance(v, (Labelled, Stored)) for v in tensors):
            origins = [v.origin for v in tensors if isinstance(v, Plain)]
            return _each(self.shape, origins[0] if origins else Reason(self.describe()))
        found = RULES.get(name_of(node.target))
        result = NotImplemented if found is None else found(self, bound)
        return self.unknown(tensors) if result is NotImplemented else result


def name_of(target: Any) -> str:
    """``aten.linear`` of an operation, whichever overload it is."""
    return str(getattr(target, "overloadpacket", target))


def _bound(target: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Arguments by name."""
    schema = getattr(target, "_schema", None)
    if schema is None:
        return {**{str(i): a for i, a in enumerate(args)}, **kwargs}
    bound = {a.name: a.default_value for a in schema.arguments if a.has_default_value()}
    bound.update({a.name: value for a, value in zip(schema.arguments, args, strict=False)})
    return {**bound, **kwargs}


def _flat(values: Any) -> list[Value]:
    """The values in nested arguments."""

    def walk(part: Any) -> Iterator[Value]:
        if isinstance(part, (Plain, Stored, Labelled)):
            yield part
        elif isinstance(part, (list, tuple)):
            for p in part:
                yield from walk(p)
        elif isinstance(part, Mapping):
            yield from walk(list(part.values()))

    return list(walk(values))


def _shape_of(value: Any) -> Any:
    """Shape of a tensor, of each of several ones, or None of anything else."""
    if isinstance(value, Tensor):
        return tuple(int(n) for n in value.shape)
    if isinstance(value, (list, tuple)):
        return [_shape_of(v) for v in value]
    return () if isinstance(value, (int, float, torch.SymInt)) else None


def _each(shape: Any, origin: Reason) -> Any:
    """Plain values of a shape, or of each of several."""
    if isinstance(shape, list):
        return [None if s is None else _each(s, origin) for s in shape]
    return Plain(shape, origin)


def _size(value: Value, dim: int, rank: int) -> int:
    """Size of a value along an axis of what it is repeated to."""
    own = dim - (rank - len(value.shape))
    return value.shape[own] if own >= 0 else 1
