"""TETRIS: is it worth reordering before blocks are removed?

An MLP; 90 % of both hidden layers' blocks go, without a floor; then fine-tuning on stored blocks.
The rivals differ in nothing but the order of rows and columns, or in which blocks they keep.
Accuracy of orders that retain equally much may differ, so swaps and search run from both starts.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

import tetris
from tetris import reorder
from tetris.modules import replace_modules

from ..reorder import matrix, planted
from . import latency
from .data import split
from .experiment import Check, Claim, Row, Setting
from .networks import mlp
from .progress import Progress
from .stats import figure
from .training import Recipe, accuracy, baseline, fit

SPARSITY = 0.9
BLOCKS = ((8, 8), (16, 16))
LAYERS = ("linear1", "linear2")
SEARCHES: dict[str, tuple[reorder.Method, reorder.Start]] = {
    "identity": ("identity", "identity"),
    "L1 sort": ("l1_sort", "l1_sort"),
    "swaps from identity": ("swap", "identity"),
    "swaps from L1 sort": ("swap", "l1_sort"),
    "search from identity": ("threshold", "identity"),
    "search from both": ("threshold", "both"),
}
SWEEPS = 10  # of the threshold search: reproducible, and within 1 % of what a long one retains

_WIDTH = {"digits": 256, "fashion": 512, "cifar10": 1024}
_DENSE = {
    "digits": Recipe(epochs=40, batch=64, learning_rate=1e-3),
    "fashion": Recipe(epochs=8, batch=128, learning_rate=1e-3),
    "cifar10": Recipe(epochs=10, batch=128, learning_rate=1e-3),
}
_TUNE = {
    "digits": Recipe(epochs=20, batch=64, learning_rate=1e-3),
    "fashion": Recipe(epochs=4, batch=128, learning_rate=2e-3),
    "cifar10": Recipe(epochs=4, batch=128, learning_rate=2e-3),
}
_IMAGES = {"digits": None, "fashion": 15_000, "cifar10": None}


class TetrisExperiment:
    """See the module."""

    name = "tetris"
    data = tuple(_WIDTH)
    title = "TETRIS: 90 % of the blocks of an MLP's hidden layers removed, by order"

    def rows(self, setting: Setting, progress: Progress) -> Iterator[Row]:
        """Dense, single weights, and per block shape random blocks and every order."""
        progress.plan(len(setting.seeds) * (2 + len(BLOCKS) * (1 + len(SEARCHES))))
        for seed in setting.seeds:
            progress.describe(f"seed {seed}: dense training")
            data = split(
                setting.data, seed, images=_IMAGES[setting.data], flat=True, root=setting.root
            )
            torch.manual_seed(seed)
            width, classes = _WIDTH[setting.data], int(data.train_y.max()) + 1
            dense = mlp((data.train_x.shape[1], width, width, classes))
            tune = _TUNE[setting.data]
            epochs = _DENSE[setting.data].epochs + tune.epochs
            untuned = fit(dense, data, _DENSE[setting.data], seed)
            longer, reached = baseline(dense, data, tune, seed + 1000)
            progress.advance()
            models: dict[str, nn.Module] = {"dense": longer}
            stored = sum(_weight(dense, name).numel() for name in LAYERS)
            rows = [Row("dense", seed, reached, untuned, stored=stored, epochs=epochs)]
            for variant, block in _variants():
                progress.describe(f"seed {seed}: {variant} {block[0]}x{block[1]}")
                layouts = {n: _layout(variant, block, _weight(dense, n), seed) for n in LAYERS}
                model = _pruned(dense, layouts)
                before = accuracy(model, data)
                reached = fit(model, data, tune, seed + 1000)
                row = Row(
                    variant,
                    seed,
                    reached,
                    before,
                    block,
                    SPARSITY,
                    stored=sum(layout.stored_values for layout in layouts.values()),
                    epochs=epochs,
                    extra={"retained": _retained(dense, layouts)},
                )
                models[row.label] = model
                rows.append(row)
                progress.advance()
            progress.describe(f"seed {seed}: measuring latency")
            times = latency.measure(models, data.test_x[:256].contiguous())
            for row in rows:
                yield latency.timed(row, times)

    def claims(self, setting: Setting) -> list[Claim]:
        """Swaps and the search beat orders that are not searched."""
        result = []
        for block in BLOCKS:
            end = f" {block[0]}x{block[1]} {SPARSITY:.0%}"
            for order in ("swaps from identity", "swaps from L1 sort", "search from both"):
                for rival in ("identity", "L1 sort"):
                    result.append(Claim(order + end, rival + end))
            result.append(Claim("swaps from identity" + end, "random" + end))
            result.append(
                Claim("search from both" + end, "swaps from L1 sort" + end, field="retained")
            )
        return result

    def check(self, rows: Sequence[Row]) -> list[Check]:
        """Equal storage, and what the orders do to synthetic matrices."""
        return [_equal_storage(rows), _recovers(), *_gains_nothing(), *_never_rises()]


def _variants() -> Iterator[tuple[str, tuple[int, int]]]:
    yield "unstructured", (1, 1)
    for block in BLOCKS:
        for variant in ("random", *SEARCHES):
            yield variant, block


def _weight(model: nn.Module, name: str) -> Tensor:
    layer = model.get_submodule(name)
    assert isinstance(layer, nn.Linear)
    return layer.weight.detach()


def _layout(variant: str, block: tuple[int, int], weight: Tensor, seed: int) -> tetris.BlockLayout:
    out, in_ = weight.shape
    if variant == "random":
        grid = -(-out // block[0]), -(-in_ // block[1])
        blocks = grid[0] * grid[1]
        order = torch.randperm(blocks, generator=torch.Generator().manual_seed(seed))
        kept = (order >= int(SPARSITY * blocks)).view(grid)
        return tetris.BlockLayout.from_block_mask(kept, block, out, in_)
    method, start = SEARCHES["identity" if variant == "unstructured" else variant]
    found = reorder.search(
        weight.abs(),
        block,
        SPARSITY,
        method=method,
        start=start,
        seed=seed,
        sweeps=SWEEPS if method == "threshold" else None,
        allow_empty_rows=True,
    )
    return tetris.BlockLayout.from_block_mask(
        found.mask, block, out, in_, found.row_perm, found.col_perm
    )


def _pruned(dense: nn.Module, layouts: dict[str, tetris.BlockLayout]) -> nn.Module:
    """A copy of a dense network that stores these blocks only."""
    new: dict[str, nn.Module] = {}
    for name, layout in layouts.items():
        layer = dense.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        new[name] = tetris.SparseLinear.from_dense(layer, layout=layout)
    return replace_modules(copy.deepcopy(dense), new)


def _retained(dense: nn.Module, layouts: dict[str, tetris.BlockLayout]) -> float:
    """Share of the magnitude of all weights that the stored ones have."""
    weights = {name: _weight(dense, name).abs() for name in layouts}
    kept = sum(float((weights[n] * layout.mask()).sum()) for n, layout in layouts.items())
    return kept / sum(float(w.sum()) for w in weights.values())


def _equal_storage(rows: Sequence[Row]) -> Check:
    """Neither more nor less than the share that is left, to one block a layer."""
    dense = {row.seed: figure(row, "stored") for row in rows if row.variant == "dense"}
    pruned = [row for row in rows if row.block is not None]
    shares = [figure(row, "stored") / dense[row.seed] for row in pruned]
    # Each layer rounds the number of removed blocks; of 16x16 blocks the digits' first has 64.
    holds = all(
        abs(figure(row, "stored") - (1 - SPARSITY) * dense[row.seed])
        <= len(LAYERS) * math.prod(row.block or ())
        for row in pruned
    )
    spread = f"{min(shares):.4f} to {max(shares):.4f} of the weights"
    return "equal numbers of stored weights, to one block a layer", holds, spread


def _recovers() -> Check:
    weight, optimum = planted(512, 32, 0)
    found = reorder.search(weight, (32, 32), 0.75, sweeps=30, allow_empty_rows=True)
    return (
        "planted 32x32 blocks, shuffled, are found again: retained share at least .75",
        found.retained >= 0.75,
        f"{found.retained:.3f} of {optimum:.3f} planted; L1 sort {found.l1_sort_retained:.3f}",
    )


def _gains_nothing() -> Iterator[Check]:
    for method in ("swap", "threshold"):
        found = reorder.search(matrix("gaussian"), (32, 32), 0.75, method=method, sweeps=30)
        gain = found.retained - found.identity_retained
        yield (
            f"no structure, no gain: {method} adds at most .05 on an iid Gaussian matrix",
            gain <= 0.05,
            f"{gain:+.3f} to {found.identity_retained:.3f}",
        )


def _never_rises() -> Iterator[Check]:
    for kind in ("gaussian", "lognormal", "planted"):
        found = reorder.search(matrix(kind), (8, 8), 0.75, method="swap")
        trace = found.removed_trace
        rise = max(b - a for a, b in zip(trace, trace[1:], strict=False))
        yield (
            f"{kind}: the removed share never rises while swapping",
            rise <= 1e-6,
            f"{trace[0]:.3f} to {trace[-1]:.3f} in {len(trace)} steps",
        )


EXPERIMENT = TetrisExperiment()
