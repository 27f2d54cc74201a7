"""Keep probabilities: drawing masks, the gradient from loss differences, the budget.

Everything here is of all layers at once: one vector with one gate per atom, an atom being what is
kept or dropped as one (a block, or several). Gates are float64: they are few beside the weights,
and a budget that is "never exceeded" should not depend on rounding to float32.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ...blocking import Blocking, removed_count
from ..options import LayerOptions

Atom = Literal["block", "channel"]
"""What one gate keeps or drops: a block, or a whole block row (with bo = 1: a filter)."""


def atoms_of_blocks(blocking: Blocking, atom: Atom, tie_kernel: bool) -> tuple[Tensor, int]:
    """Which atom each block of a layer belongs to, and how many atoms there are.

    Args:
        blocking: The weight, cut into blocks.
        atom: ``"block"`` or ``"channel"``.
        tie_kernel: Blocks of one channel pair at all kernel positions are one atom.

    Returns:
        int64[G * C], atom of each block, blocks numbered ``block row * C + column group``; atoms
        are all of one size.
    """
    rows, columns = blocking.grid
    row = torch.arange(rows).repeat_interleave(columns)
    if atom == "channel":
        return row, rows
    width = columns // blocking.positions if tie_kernel else columns
    return row * width + torch.arange(columns).repeat(rows) % width, rows * width


def project(s: Tensor, cost: Tensor, budget: float, low: float = 0.0, high: float = 1.0) -> Tensor:
    """The nearest gates within bounds and budget: ``clip(s - v * cost, low, high)``, v >= 0.

    v is the smallest one with ``sum(cost * gates) <= budget``, the Lagrange multiplier of the
    Euclidean projection. The sum falls with v along straight pieces, so Newton steps inside a
    bracket find it in about ten evaluations where bisection alone takes fifty; the bracket's side
    within the budget is what is returned.

    Args:
        s: float64[n].
        cost: float64[n], positive.
        budget: At least ``low * sum(cost)``.
        low: Lower bound of each gate.
        high: Upper bound.

    Returns:
        float64[n]; the sum is at most ``budget`` and, where s was above it, at least
        ``(1 - 1e-12) * budget``.
    """

    def spent(gates: Tensor) -> float:
        return float(torch.dot(gates, cost))

    gates = s.clamp(low, high)
    if spent(gates) <= budget:
        return gates
    # Every gate is at its lower bound beyond `end`, so the bracket holds the solution.
    begin, end = 0.0, float(((s - low) / cost).max()) * (1 + 1e-15)
    goal = budget * (1 - 5e-13)  # inside the tolerance, away from the rounding of the sum
    best = torch.full_like(s, low)
    v = begin
    for _ in range(200):
        moved = s - v * cost
        gates = moved.clamp(low, high)
        total = spent(gates)
        if total > budget:
            begin = v
        else:
            end, best = v, gates
            if total >= budget * (1 - 1e-12):
                break
        free = (moved > low) & (moved < high)
        slope = float(cost.square().mul_(free).sum())
        v = v + (total - goal) / slope if slope > 0.0 else begin
        if not begin < v < end:
            v = 0.5 * (begin + end)
            if v in (begin, end):
                break
    return best


def estimate(losses: Tensor, masks: Tensor, s: Tensor) -> Tensor:
    """Variance-reduced policy gradient of the gates from the losses of several masks.

    ``g = 1 / (Ks - 1) * sum_k (L_k - mean(L)) * z_k`` with ``z_k = (m_k - s) / sqrt(s (1 - s))``;
    for two samples that is ``(L_1 - L_2) (z_1 - z_2) / 2``. Its mean is ``sqrt(s (1 - s))`` times
    the gradient of E[L] (Zhou et al., NeurIPS 2021; this form follows the authors' code).

    Args:
        losses: float64[Ks], Ks >= 2.
        masks: bool[Ks, n].
        s: float64[n], probabilities that the masks were drawn with.

    Returns:
        float64[n].
    """
    # Weights that sum to zero: of z_k = (m_k - s) / sqrt(s (1 - s)) the s drops out.
    weights = (losses - losses.mean()) / (len(losses) - 1)
    variance = s * (1.0 - s)
    inside = variance > 0.0
    scale = torch.where(inside, variance, 1.0).rsqrt_().mul_(inside)  # z is 0 where s is 0 or 1
    return (weights @ masks.double()).mul_(scale)


@dataclass(frozen=True)
class Budget:
    """What some of the gates may spend together.

    Attributes:
        gates: Which.
        amount: Sum of gate times cost at most.
    """

    gates: slice | Tensor
    amount: float


@dataclass
class Gates:
    """The gates of all layers.

    Attributes:
        s: float64[n], keep probabilities; ``s.grad`` is set by the pruner.
        cost: float64[n], numbers that an atom stores, in units of the largest.
        budgets: That divide the gates among them.
        clamp: Gates stay in [clamp, 1 - clamp]: at 0 and 1 they have no gradient.
    """

    s: Tensor
    cost: Tensor
    budgets: tuple[Budget, ...]
    clamp: float = 0.0

    @torch.no_grad()
    def project(self) -> None:
        """Bring gates back within bounds and budgets."""
        for budget in self.budgets:
            part = budget.gates
            self.s[part] = project(
                self.s[part], self.cost[part], budget.amount, self.clamp, 1.0 - self.clamp
            )

    def draw(self, samples: int, generator: torch.Generator) -> Tensor:
        """bool[samples, n], masks with independent entries, True with probability s."""
        # float32 is enough: numbers in [0, 1) in steps of 2^-24, so 0 never and 1 always is drawn.
        return torch.rand((samples, len(self.s)), generator=generator) < self.s.float()

    def top(self, worth: Tensor, floors: Iterable[tuple[slice, int]] = ()) -> Tensor:
        """The gates to keep in the end: the largest that fit the budgets.

        Args:
            worth: [n], decides among equal gates, of which there are many at 0.
            floors: Gates of layers, and how many block rows these are: each keeps its best gate,
                counted in the budgets (if a budget is smaller, the floor wins).

        Returns:
            bool[n].
        """
        by_worth = worth.argsort(descending=True, stable=True)
        order = by_worth[self.s[by_worth].argsort(descending=True, stable=True)]
        rank = torch.empty_like(order)
        rank[order] = torch.arange(len(order))
        keep = torch.zeros_like(self.s, dtype=torch.bool)
        for gates, rows in floors:
            best = rank[gates].view(rows, -1).amin(1)
            keep[order[best]] = True
        order = torch.cat([order[keep[order]], order[~keep[order]]])
        for budget in self.budgets:
            mine = torch.zeros_like(keep)
            mine[budget.gates] = True
            own = order[mine[order]]
            fits = self.cost[own].cumsum(0) <= budget.amount * (1 + 1e-12)
            keep[own[fits]] = True
        return keep


@dataclass(frozen=True)
class Part:
    """What one layer has of the gates.

    Attributes:
        gates: Which of all.
        atom: int64[G * C], the atom of each block, counted from 0; None: every block is one.
        keep_rows: Every block row keeps its best block in the end.
    """

    gates: slice
    atom: Tensor | None
    keep_rows: bool

    def blocks(self, atoms: Tensor) -> Tensor:
        """[G * C] of a vector over all gates."""
        own = atoms[self.gates]
        return own if self.atom is None else own.index_select(0, self.atom)

    def per_atom(self, blocks: Tensor) -> Tensor:
        """Sums of numbers per block, one per atom."""
        if self.atom is None:
            return blocks
        sums = blocks.new_zeros(self.gates.stop - self.gates.start)
        return sums.index_add_(0, self.atom, blocks)


def make_gates(
    where: str,
    blockings: Mapping[str, Blocking],
    options: Mapping[str, LayerOptions],
    groups: Sequence[tuple[Sequence[str], float]],
    *,
    atom: Atom,
    costs: Mapping[str, float],
    clamp: float,
) -> tuple[Gates, dict[str, Part]]:
    """Gates of layers, all at what their budget leaves, and whose they are.

    Args:
        where: Named in messages.
        blockings: name -> sizes of a layer's weight.
        options: name -> settings.
        groups: Layers that share a budget, and the sparsity that it leaves; each layer in one.
        atom: ``"block"`` or ``"channel"``.
        costs: name -> what a stored number costs, 1 if absent.
        clamp: Of the gates.

    Raises:
        ValueError: a budget is too small for one atom, or for ``clamp`` of all.
    """
    parts: dict[str, Part] = {}
    prices, start = [], 0
    for name, blocking in blockings.items():
        own, (bo, bi) = options[name], blocking.block
        atoms, count = atoms_of_blocks(blocking, atom, own.tie_kernel)
        keep_rows = atom == "block" and not own.allow_empty_rows
        every = count == len(atoms)
        parts[name] = Part(slice(start, start + count), None if every else atoms, keep_rows)
        price = bo * bi * (len(atoms) // count) * costs.get(name, 1.0)
        prices.append(torch.full((count,), price, dtype=torch.float64))
        start += count
    cost = torch.cat(prices)
    cost /= cost.max()
    s, budgets = torch.empty_like(cost), []
    for names, sparsity in groups:
        mine = torch.cat([torch.arange(len(cost))[parts[n].gates] for n in names])
        total = float(cost[mine].sum())
        amount = (1.0 - sparsity) * total
        if len(names) == 1:  # whole atoms, as all methods count them
            amount = (len(mine) - removed_count(sparsity, len(mine))) * float(cost[mine[0]])
        if amount < float(cost[mine].min()) or amount < clamp * total:
            raise ValueError(
                f"{where}: sparsity {sparsity:g} leaves a budget of {amount / total:.3g} of the "
                f"blocks of {', '.join(map(repr, names))}, too little for one of {len(mine)}"
                + (f", or for clamp={clamp:g} of each" if clamp else "")
            )
        s[mine] = amount / total
        budgets.append(Budget(mine if len(names) < len(parts) else slice(None), amount))
    gates = Gates(s, cost, tuple(budgets), clamp)
    gates.project()
    return gates, parts
