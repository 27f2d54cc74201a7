"""The forward pass of a traced model, in pieces that meet at a layer."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, fx, nn

from ...folding import DENSE
from ...graph import trace_for, writes_to


class Forward:
    """What runs before a layer, and what runs after it.

    Pieces share modules and weights with the model. They follow the mode of its modules, but what
    forward itself asks of ``self.training`` is that of when they are made: make them anew after
    ``train()`` and ``eval()``.

    Args:
        where: Function named in messages.
        model: Traced once, here, in the mode it is in.

    Attributes:
        depth: name -> position of each linear layer and convolution in the order they run, from 1;
            of those that are called once, with nothing but their input.

    Raises:
        ValueError: the model cannot be traced.
    """

    def __init__(self, where: str, model: nn.Module) -> None:
        self.where = where
        self.model = model
        self.graph = trace_for(
            where,
            model,
            "and without its graph a part of it cannot run alone; take what depends on data out of "
            "forward, prune a part of the model that can be traced, or use TetrisPruner, which "
            "needs no graph",
        )
        self._modules = dict(model.named_modules(remove_duplicate=False))
        self._order = {node: i for i, node in enumerate(self.graph.nodes)}
        calls = [n for n in self.graph.nodes if n.op == "call_module"]
        counts = Counter(id(self._modules[str(n.target)]) for n in calls)
        self._calls = {
            str(n.target): n
            for n in calls
            if counts[id(self._modules[str(n.target)])] == 1
            and isinstance(self._modules[str(n.target)], DENSE)
            and n.all_input_nodes == [*n.args]
        }
        self._counts = {name: counts[id(module)] for name, module in self._modules.items()}
        self.depth = {name: i for i, name in enumerate(self._calls, start=1)}

    def check(self, name: str) -> None:
        """Raise ValueError unless the forward pass can be cut at a layer."""
        if name not in self.depth:
            raise ValueError(
                f"{self.where}: layer {name!r} must be called once, with nothing but its input "
                f"(torch.fx sees {self._counts.get(name, 0)} calls of it; it does not look into "
                "torch's own modules, such as nn.TransformerEncoderLayer); exclude it"
            )

    def leads(self, name: str, end: str) -> bool:
        """Whether the output of layer ``end`` depends on that of another one."""
        origins: dict[fx.Node, set[fx.Node]] = {}
        for node in self.graph.nodes:
            origins[node] = {node}.union(*(origins[n] for n in node.all_input_nodes))
            if (written := writes_to(node, self._modules)) is not None:
                origins[written] = origins[written] | origins[node]
        return self._calls[name] in origins[self._calls[end]]

    def until(self, name: str) -> fx.GraphModule:
        """``x -> output of a layer``."""
        self.check(name)
        return self._piece([], None, self._calls[name], [self._calls[name]])

    def before(self, name: str, end: str | None) -> fx.GraphModule:
        """``x -> (input of a layer, *what else :meth:`after` needs)``."""
        node = self._calls[name]
        wanted = [node.all_input_nodes[0], *self._crossing(node, self._end(end))]
        return self._piece([], None, node, wanted, inclusive=False)

    def after(self, name: str, end: str | None) -> fx.GraphModule:
        """``(output of a layer, *what else is needed) -> output of layer end``, or of the model."""
        node, last = self._calls[name], self._end(end)
        given = [node, *self._crossing(node, last)]
        return self._piece(given, node, last, [last])

    def with_heads(self, heads: Iterable[tuple[str, nn.Module]]) -> fx.GraphModule:
        """``x -> (output of each head, ..., output of the model)``."""
        root = nn.Module()
        graph = fx.Graph()
        copies: dict[fx.Node, fx.Node] = {}
        root.model = self.model
        attached = {self._calls[name]: (f"head{i}", head) for i, (name, head) in enumerate(heads)}
        outputs = []
        for node in self.graph.nodes:
            if node.op == "output":
                graph.output((*outputs, copies[node.all_input_nodes[0]]))
                continue
            copies[node] = graph.node_copy(node, copies.__getitem__)
            if node.op in ("call_module", "get_attr"):
                copies[node].target = f"model.{node.target}"
            if node in attached:
                name, head = attached[node]
                setattr(root, name, head)
                read = graph.call_method("clone", (copies[node],))  # the model may go on in place
                outputs.append(graph.call_module(name, (read,)))
        return fx.GraphModule(root, graph)

    # -- inside -------------------------------------------------------------------------------

    def _end(self, name: str | None) -> fx.Node:
        if name is not None:
            return self._calls[name]
        output = next(n for n in self.graph.nodes if n.op == "output")
        if not isinstance(output.args[0], fx.Node):
            raise ValueError(
                f"{self.where}: the model must return one tensor, the logits "
                f"(got {output.args[0]}); wrap it in a module that returns only these"
            )
        return output.args[0]

    def _between(self, node: fx.Node, last: fx.Node) -> list[fx.Node]:
        a, b = self._order[node], self._order[last]
        return [n for n, i in self._order.items() if a < i <= b]

    def _crossing(self, node: fx.Node, last: fx.Node) -> list[fx.Node]:
        """Values from before a node that are used between it and another."""
        first = self._order[node]
        used = {m: None for n in self._between(node, last) for m in n.all_input_nodes}
        return [m for m in used if self._order[m] < first]

    def _piece(
        self,
        given: list[fx.Node],
        first: fx.Node | None,
        last: fx.Node,
        wanted: list[fx.Node],
        inclusive: bool = True,
    ) -> fx.GraphModule:
        """What runs after ``first`` up to ``last``, all of it: it may have effects on memory."""
        graph = fx.Graph()
        copies = {node: graph.placeholder(f"given_{i}") for i, node in enumerate(given)}
        begin = -1 if first is None else self._order[first]
        nodes = [n for n, i in self._order.items() if begin < i <= self._order[last]]
        nodes = nodes if inclusive else nodes[:-1]
        if given and any(writes_to(n, self._modules) for n in nodes):
            # They are used again, in the next step.
            keep = graph.call_function(_clone_all, (tuple(copies.values()),))
            copies = {n: graph.call_function(_item, (keep, i)) for i, n in enumerate(copies)}
        for node in nodes:
            copies[node] = graph.node_copy(node, copies.__getitem__)
        results = tuple(copies[n] for n in wanted)
        graph.output(results if not inclusive else results[0])
        return fx.GraphModule(self.model, graph)


def _clone_all(values: tuple[object, ...]) -> list[object]:
    return [v.clone() if isinstance(v, Tensor) else v for v in values]


def _item(values: list[object], index: int) -> object:
    return values[index]
