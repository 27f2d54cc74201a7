"""What was folded, and what was not."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from ..prune.report import SparsifyReport


@dataclass(frozen=True)
class FoldedOrder:
    """Channels that are in another order now.

    Attributes:
        channels: How many.
        tensors: Parameters and buffers that were reordered, by name.
    """

    channels: int
    tensors: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.channels} channels: {', '.join(self.tensors)}"


@dataclass(frozen=True)
class FoldReport:
    """What was folded and what was not: ``print`` it, or read the fields.

    Attributes:
        before: Permutations that the sparse layers applied at run time, rows and columns each.
        after: Those that are left.
        orders: Channels that were reordered.
        kept: (layer, ``"rows"`` or ``"columns"``) -> why it still applies a permutation.
        difference: Largest difference between the model's results before and after, on the example
            inputs; of each tensor relative to its largest number.
        untraced: Why the model could not be traced as a whole; only its parts were then. None
            otherwise.
        pruning: What :func:`tetris.sparsify` reported, if the model was pruned in the same call.

    Example:
        >>> _, report = tetris.fold(
        ...     model, images, sparsity=0.9, block=(8, 8), return_report=True
        ... )
        >>> report.after < report.before, report.difference < 1e-5
        (True, True)
    """

    before: int
    after: int
    orders: tuple[FoldedOrder, ...] = ()
    kept: Mapping[tuple[str, str], str] = field(default_factory=dict)
    difference: float = 0.0
    untraced: str | None = None
    pruning: SparsifyReport | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "before": self.before,
            "after": self.after,
            "orders": [asdict(order) for order in self.orders],
            "kept": {f"{axis} of {name}": why for (name, axis), why in self.kept.items()},
            "difference": self.difference,
            "untraced": self.untraced,
            "pruning": None if self.pruning is None else self.pruning.to_dict(),
        }

    def __str__(self) -> str:
        tensors = {name for order in self.orders for name in order.tensors}
        lines = [
            f"permutations at run time: {self.before} before, {self.after} after",
            f"reordered: {sum(order.channels for order in self.orders)} channels in "
            f"{len(self.orders)} orders, in {len(tensors)} parameters and buffers",
        ]
        for why in dict.fromkeys(self.kept.values()):
            left = [f"{axis} of {name}" for (name, axis), w in self.kept.items() if w == why]
            lines.append(f"left: {', '.join(left)}: {why}")
        if self.untraced is not None:
            lines.append(f"only parts of the model were folded: {self.untraced}")
        return "\n".join(lines)
