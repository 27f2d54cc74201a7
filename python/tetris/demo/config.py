"""What the demo runs."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

Method = Literal["narrow", "element-wise", "unordered", "L1-sorted", "TETRIS"]


@dataclass(frozen=True)
class Variant:
    """One way to make the network smaller.

    Attributes:
        method: ``narrow`` is a dense network of as many weights; ``element-wise`` keeps the
            largest single weights (1x1 blocks); the others keep blocks, in the order they stand
            (``unordered``), with rows and columns sorted by L1 norm, or reordered by the search.
        block: (height along outputs, width along inputs).
        sparsity: share of the hidden layers' blocks that is removed.
    """

    method: Method
    block: tuple[int, int]
    sparsity: float


@dataclass(frozen=True)
class DemoConfig:
    """Everything that decides the result of a run.

    Attributes:
        hidden: width of the two hidden layers.
        sparsities: shares to remove.
        blocks: block shapes of the block methods.
        seeds: one dense network, and one of each variant, per seed.
        dense_epochs: epochs of dense training.
        tune_epochs: epochs of fine-tuning, the same for every variant.
        train_batch: images per step.
        latency_batch: images per call where time is measured.
        learning_rate: of Adam in training from scratch; falls linearly to 0.
        tune_learning_rate: the same in fine-tuning; few weights bear, and need, larger steps.
        allow_empty_rows: let block rows lose all their blocks; at 98 % and 16x16 the layers store
            about one block per block row, so a guaranteed one each leaves nothing to choose.
        search_sweeps: length of the TETRIS search; sweeps make it reproducible.
        digits: take scikit-learn's digits even where Fashion-MNIST is installed.
        data: folder with Fashion-MNIST, or None.
        out: folder for the pictures.
        threads: torch threads; None leaves torch's choice.
    """

    hidden: int = 1024
    sparsities: tuple[float, ...] = (0.90, 0.95, 0.98)
    blocks: tuple[tuple[int, int], ...] = ((4, 1), (16, 16))
    seeds: tuple[int, ...] = (0, 1)
    dense_epochs: int = 3
    tune_epochs: int = 2
    train_batch: int = 256
    latency_batch: int = 256
    learning_rate: float = 1e-3
    tune_learning_rate: float = 3e-3
    allow_empty_rows: bool = True
    search_sweeps: int = 4
    digits: bool = False
    data: Path | None = None
    out: Path = field(default=Path("tetris-demo"))
    threads: int | None = None

    def variants(self) -> list[Variant]:
        """Every variant, in the order of the table."""
        made = []
        for sparsity in self.sparsities:
            made.append(Variant("narrow", (1, 1), sparsity))
            made.append(Variant("element-wise", (1, 1), sparsity))
            for block in self.blocks:
                for method in ("unordered", "L1-sorted", "TETRIS"):
                    made.append(Variant(method, block, sparsity))
        return made
