"""A Parameter cut down to some of its rows for one optimizer step."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from ..parameters import replace_data


class Rows:
    """Some rows of a Parameter in its place, and of its optimizers' states, until put back.

    Whatever the optimizer does (momentum, second moments, weight decay, gradient clipping between
    backward and step) it does to these rows, at their cost, and to no others: what torch's sparse
    gradients give for SGD without momentum and for SparseAdam, here for every optimizer whose
    states are shaped like the Parameter. As with these, states of absent rows do not decay.

    Sparse gradients (``nn.Embedding(sparse=True)``) were the alternative. They must be sorted and
    summed per step (``coalesce``), torch's SGD refuses them weight decay and lets the momentum
    buffer grow by concatenation, Adam takes them only as SparseAdam.

    Args:
        parameter: [n, ...]; becomes [len(rows), ...].
        rows: int64, distinct.
        grad: [len(rows), ...], its gradient then.
        optimizers: Whose states are cut down, too.
    """

    @torch.no_grad()
    def __init__(
        self,
        parameter: nn.Parameter,
        rows: Tensor,
        grad: Tensor | None,
        optimizers: Iterable[Optimizer],
    ) -> None:
        self._parameter = parameter
        self._rows = rows
        self._home = parameter.data
        self._optimizers = tuple(optimizers)
        self._states: dict[tuple[int, str], Tensor] = {}
        for number, optimizer in enumerate(self._optimizers):
            for name, state in optimizer.state.get(parameter, {}).items():
                if isinstance(state, Tensor) and state.shape == self._home.shape:
                    self._states[number, name] = state
                    optimizer.state[parameter][name] = state.index_select(0, rows)
        parameter.grad = None
        replace_data(parameter, self._home.index_select(0, rows))
        parameter.grad = grad

    @torch.no_grad()
    def put_back(self) -> None:
        """Write the rows to where they came from; the gradient goes."""
        parameter, shape = self._parameter, self._parameter.shape
        self._home.index_copy_(0, self._rows, parameter.data)
        for number, optimizer in enumerate(self._optimizers):
            for name, state in optimizer.state.get(parameter, {}).items():
                if isinstance(state, Tensor) and state.shape == shape:
                    home = self._states.get((number, name))
                    if home is None:  # made in this step: a moment that is zero elsewhere
                        home = state.new_zeros(self._home.shape)
                    home.index_copy_(0, self._rows, state)
                    optimizer.state[parameter][name] = home
        parameter.grad = None
        replace_data(parameter, self._home)
