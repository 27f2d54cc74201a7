"""Time against saliency: what each layer could be, and the best choice within a budget of time."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..blocking import Blocking
from ..layout_search import search_method
from .allocate import l1_order
from .options import LayerOptions


@dataclass(frozen=True)
class Candidate:
    """What a layer could be.

    Attributes:
        seconds: Predicted time of it, all calls together.
        retained: Saliency that is left.
        block: (bo, bi); None of the dense layer.
        sparsity: Removed share of the blocks.
    """

    seconds: float
    retained: float
    block: tuple[int, int] | None = None
    sparsity: float = 0.0


def retained_at(
    where: str,
    saliency: Tensor,
    options: LayerOptions,
    groups: int,
    stored: Sequence[int],
) -> list[float]:
    """Saliency of the best blocks, for several numbers of them.

    In the order that sorting by norm gives, a stand-in for the one that a search will find; in the
    order they come in, where ``reorder`` is off.

    Args:
        where: Function named in messages.
        saliency: [out, in / groups, ...].
        options: The layer's settings.
        groups: Of the convolution.
        stored: Numbers of blocks.
    """
    blocking = Blocking.of(where, "saliency", saliency, options.block, groups)
    sort = search_method(where, options.reorder) != "identity"
    sums = blocking.sums(
        saliency.double(), *(l1_order(saliency, blocking) if sort else (None, None))
    )
    each = 1
    if options.tie_kernel:  # all positions of a block go together
        each = blocking.positions
        sums = sums.unflatten(1, (each, -1)).sum(1)
    best = torch.zeros_like(sums, dtype=torch.bool)
    if not options.allow_empty_rows:
        best[torch.arange(sums.shape[0]), sums.argmax(1)] = True
    order = torch.where(best, torch.inf, sums).flatten().argsort(descending=True)
    reached = sums.flatten()[order].cumsum(0)
    counts = torch.tensor(stored).div(each, rounding_mode="floor").clamp(1, len(reached))
    return reached[counts - 1].tolist()


def choose(
    candidates: Mapping[str, Sequence[Candidate]], budget: float
) -> dict[str, Candidate] | None:
    """One candidate for each layer, for the most saliency within a budget of seconds.

    Each layer starts from its fastest candidate, and steps along the concave hull of its curve; the
    step that brings the most saliency for its time comes first, while the budget lasts. That is
    the best choice for what it spends (a Lagrangian's), and what is over is at most the next step,
    which may be a large one, such as to the dense layer. It goes to candidates beside the hulls.

    Returns:
        name -> candidate; None if even the fastest ones take longer than the budget.
    """
    hulls = {name: _hull(own) for name, own in candidates.items()}
    chosen = dict.fromkeys(hulls, 0)
    left = budget - sum(hull[0].seconds for hull in hulls.values())
    if left < 0.0:
        return None
    steps = sorted(
        ((_gain(a, b), name, i) for name, h in hulls.items() for i, (a, b) in _pairs(h)),
        key=lambda step: -step[0],
    )
    stopped: set[str] = set()
    for _, name, i in steps:
        hull = hulls[name]
        extra = hull[i + 1].seconds - hull[i].seconds
        if name in stopped or extra > left:
            stopped.add(name)  # its later steps build on this one
            continue
        chosen[name] = i + 1
        left -= extra
    return _filled(candidates, {name: hulls[name][i] for name, i in chosen.items()}, left)


def _filled(
    candidates: Mapping[str, Sequence[Candidate]], chosen: dict[str, Candidate], left: float
) -> dict[str, Candidate]:
    """Each layer's candidate that retains the most for what is left, largest gains first."""

    def better(name: str) -> Candidate:
        most = chosen[name].seconds + max(left, 0.0)  # rounding may leave less than nothing
        return max((c for c in candidates[name] if c.seconds <= most), key=lambda c: c.retained)

    for name in sorted(chosen, key=lambda n: chosen[n].retained - better(n).retained):
        found = better(name)
        if found.retained > chosen[name].retained:
            left -= found.seconds - chosen[name].seconds
            chosen[name] = found
    return chosen


def _pairs(hull: Sequence[Candidate]) -> Iterable[tuple[int, tuple[Candidate, Candidate]]]:
    return enumerate(zip(hull[:-1], hull[1:], strict=True))


def _gain(a: Candidate, b: Candidate) -> float:
    return (b.retained - a.retained) / max(b.seconds - a.seconds, 1e-15)


def _hull(own: Sequence[Candidate]) -> list[Candidate]:
    """The candidates from the fastest on that bring ever less saliency for ever more time."""
    hull: list[Candidate] = []
    for candidate in sorted(own, key=lambda c: (c.seconds, -c.retained)):
        if hull and candidate.retained <= hull[-1].retained:
            continue
        while len(hull) > 1 and _gain(hull[-2], hull[-1]) <= _gain(hull[-1], candidate):
            hull.pop()
        hull.append(candidate)
    return hull
