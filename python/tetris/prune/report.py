"""What was stored, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..layout import BlockLayout
from ..reorder import SearchResult
from ..warn import warn

if TYPE_CHECKING:
    from .latency import LatencyPlan


@dataclass(frozen=True)
class LayerReport:
    """One layer. Saliency shares are of the layer's total, from 0 to 1.

    Attributes:
        name: Name in the model.
        shape: (out, in), or (out, in / groups, *kernel) of a convolution (also a transposed one).
        block: (bo, bi).
        blocks: Blocks of the layer.
        stored_blocks: Blocks stored.
        block_sparsity: Removed share of the blocks.
        element_sparsity: Removed share of the weights; differs at ragged edges.
        retained: Saliency in stored blocks.
        identity_retained: What blocks would have kept without reordering.
        l1_sort_retained: The same after sorting rows and columns by L1 norm.
        unstructured_retained: What the best single weights would have kept: an upper bound where
            blocks divide the matrix.
        empty_rows: Block rows without a stored block: outputs that are constant.
        empty_cols: Column groups without a stored block at any kernel position: inputs that are
            ignored.
        floor_bound: The budget was below one block per block row, and one each was kept.
    """

    name: str
    shape: tuple[int, ...]
    block: tuple[int, int]
    blocks: int
    stored_blocks: int
    block_sparsity: float
    element_sparsity: float
    retained: float
    identity_retained: float
    l1_sort_retained: float
    unstructured_retained: float
    empty_rows: int
    empty_cols: int
    floor_bound: bool

    @classmethod
    def of(
        cls,
        name: str,
        layout: BlockLayout,
        saliency: Tensor | None,
        search: SearchResult | None,
    ) -> LayerReport:
        """Describe a layout under a saliency in its weight's shape, beside its search.

        Magnitudes of the saliency count: it may be the weight. Without the two, shares are NaN.
        """
        mask = layout.block_mask()
        retained = math.nan
        if saliency is not None:
            total, kept = _sum(saliency), _sum(layout.pack(saliency))
            retained = kept / total if total > 0 else 1.0
        # [groups, block rows, positions, column groups]
        parts = mask.unflatten(1, (layout.blocking.positions, -1)).unflatten(0, (layout.groups, -1))
        return cls(
            name=name,
            shape=layout.weight_shape,
            block=layout.block,
            blocks=mask.numel(),
            stored_blocks=layout.nnz_blocks,
            block_sparsity=layout.sparsity,
            element_sparsity=1.0 - layout.stored_weights / math.prod(layout.weight_shape),
            retained=retained,
            identity_retained=getattr(search, "identity_retained", math.nan),
            l1_sort_retained=getattr(search, "l1_sort_retained", math.nan),
            unstructured_retained=getattr(search, "unstructured_retained", math.nan),
            empty_rows=int((~mask.any(1)).sum()),
            empty_cols=int((~parts.any(2).any(1)).sum()),
            floor_bound=search is not None and search.floor_bound,
        )


def _sum(tensor: Tensor) -> float:
    """Of magnitudes, in float64 and without a copy of a large tensor."""
    return sum(
        float(part.abs().sum(dtype=torch.float64)) for part in tensor.flatten().split(1 << 20)
    )


@dataclass(frozen=True)
class SparsifyReport:
    """All layers of a model: ``print`` it, or read the fields.

    Attributes:
        layers: One entry per sparse layer, in the model's order.
        skipped: Linear layers and convolutions that stay dense, with the reason.
        latency: What a :class:`tetris.prune.Latency` target chose; None with other targets.

    Example:
        >>> _, report = tetris.sparsify(model, sparsity=0.9, block=(8, 8), return_report=True)
        >>> [layer.name for layer in report.layers]
        ['fc', 'classifier']
        >>> report.layers[0].retained >= report.layers[0].identity_retained
        True
    """

    layers: tuple[LayerReport, ...]
    skipped: Mapping[str, str] = field(default_factory=dict)
    latency: LatencyPlan | None = None

    @property
    def sparsity(self) -> float:
        """Removed share of the weights of all sparse layers."""
        total = sum(math.prod(r.shape) for r in self.layers)
        removed = sum(math.prod(r.shape) * r.element_sparsity for r in self.layers)
        return removed / total if total else 0.0

    def overrides(self) -> dict[str, dict[str, Any]]:
        """Block and sparsity of each layer, for ``overrides=``: the same choice once more.

        Example:
            >>> _, report = tetris.sparsify(
            ...     model, latency=0.5, example_inputs=x, block="auto", return_report=True
            ... )
            >>> chosen = report.overrides()  # plain values, to be saved with a checkpoint
            >>> pruner = tetris.prune.TetrisPruner(model, include=[*chosen], overrides=chosen)
        """
        return {r.name: {"block": r.block, "sparsity": r.block_sparsity} for r in self.layers}

    def to_dict(self) -> dict[str, Any]:
        """Plain numbers and strings, ready for JSON."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "skipped": dict(self.skipped),
            "sparsity": self.sparsity,
            **({} if self.latency is None else {"latency": asdict(self.latency)}),
        }

    def __str__(self) -> str:
        width = max([len("layer"), *(len(r.name) for r in self.layers)])
        lines = [
            "retained saliency in stored blocks, beside other ways to choose as many",
            f"{'layer':{width}}  {'shape':>13}  {'block':>7}  {'stored':>14}  {'removed':>7}  "
            f"{'retained':>8}  {'no order':>8}  {'L1 sort':>8}  {'elements':>8}",
        ]
        for r in self.layers:
            lines.append(
                f"{r.name:{width}}  {'x'.join(map(str, r.shape)):>13}  "
                f"{f'{r.block[0]}x{r.block[1]}':>7}  {f'{r.stored_blocks}/{r.blocks}':>14}  "
                f"{r.element_sparsity:7.1%}  {_share(r.retained)}  {_share(r.identity_retained)}  "
                f"{_share(r.l1_sort_retained)}  {_share(r.unstructured_retained)}"
            )
            if r.floor_bound:
                lines.append(
                    f"{'':{width}}  more than asked: one block in each of the block rows is kept"
                )
            if r.empty_rows:
                lines.append(f"{'':{width}}  {r.empty_rows} block rows are empty")
        lines.append(f"{'all':{width}}  {self.sparsity:.1%} of these weights removed")
        lines += [f"dense: {name or '(root)'}: {reason}" for name, reason in self.skipped.items()]
        if self.latency is not None:
            lines.append(str(self.latency))
        return "\n".join(lines)


def _share(value: float) -> str:
    return f"{'-':>8}" if math.isnan(value) else f"{value:8.1%}"


def warn_of_shortfall(
    where: str,
    reached: Mapping[str, float],
    asked: Mapping[str, float],
    *,
    tolerance: float = 0.02,
) -> None:
    """Say which layers store more blocks than asked for; whole blocks and the floor are why.

    Args:
        where: Function named in messages.
        reached: name -> removed share of the blocks.
        asked: name -> share that was to be removed.
        tolerance: What is not worth a word, unless it is half as much again as asked for.
    """
    short = {
        n: s
        for n, s in asked.items()
        if reached[n] < s - tolerance or 1.0 - reached[n] > 1.5 * (1.0 - s) + 1e-9
    }
    if all(s == 1.0 for s in short.values()) and short:
        warn(
            f"{where}: sparsity=1.0 asks to remove every block; each block row keeps its best one "
            "(for one percent of the weights left, pass 0.99)"
        )
    elif short:
        worst = max(short, key=lambda n: asked[n] - reached[n])
        warn(
            f"{where}: {len(short)} of {len(reached)} layers keep more blocks than asked for, "
            f"e.g. {worst!r} is {reached[worst]:.1%} sparse instead of "
            f"{asked[worst]:.1%}: a layer keeps whole blocks, and one in each block row "
            "(use smaller blocks, or allow_empty_rows=True)"
        )
