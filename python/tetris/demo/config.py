"""What the demo runs."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

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
        model: ``mlp``, or ``cnn``, a small residual network with batch norm.
        width: of the two hidden layers; of the first of three residual blocks.
        sparsities: shares to remove.
        blocks: block shapes of the block methods.
        seeds: one dense network, and one of each variant, per seed.
        dense_epochs: epochs of dense training.
        tune_epochs: epochs of fine-tuning, the same for every variant.
        train_batch: images per step.
        latency_batch: images per call where time is measured.
        learning_rate: of Adam in training from scratch; falls linearly to 0.
        train_images: as many training images are used, all if None; convolutions take their time.
        tune_learning_rate: the same in fine-tuning; few weights bear, and need, larger steps.
        allow_empty_rows: let block rows lose all their blocks; at 98 % and 16x16 the layers store
            about one block per block row, so a guaranteed one each leaves nothing to choose.
        search_sweeps: length of the TETRIS search; sweeps make it reproducible.
        digits: take scikit-learn's digits even where Fashion-MNIST is installed.
        data: folder with Fashion-MNIST, or None.
        out: folder for the pictures.
        threads: torch threads; None leaves torch's choice.
    """

    model: Literal["mlp", "cnn"] = "mlp"
    width: int = 1024
    sparsities: tuple[float, ...] = (0.90, 0.95, 0.98)
    blocks: tuple[tuple[int, int], ...] = ((4, 1), (16, 16))
    seeds: tuple[int, ...] = (0, 1)
    dense_epochs: int = 3
    tune_epochs: int = 2
    train_batch: int = 256
    latency_batch: int = 256
    train_images: int | None = None
    learning_rate: float = 1e-3
    tune_learning_rate: float = 3e-3
    allow_empty_rows: bool = True
    search_sweeps: int = 4
    digits: bool = False
    data: Path | None = None
    out: Path = field(default=Path("tetris-demo"))
    threads: int | None = None

    @classmethod
    def preset(cls, model: Literal["mlp", "cnn"], size: str, seed: int = 0, **common) -> DemoConfig:
        """What ``tetris demo`` runs: ``quick``, ``default`` or ``full``, from a first seed on."""
        chosen: dict[str, Any] = {"seeds": tuple(range(seed, seed + _SEEDS[model, size]))}
        return cls(model=model, **{**chosen, **_PRESETS[model, size], **common})

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


_SEEDS = {
    ("mlp", "quick"): 1,
    ("mlp", "default"): 2,
    ("mlp", "full"): 5,
    ("cnn", "quick"): 1,
    ("cnn", "default"): 1,
    ("cnn", "full"): 3,
}
_CNN = {"width": 64, "sparsities": (0.75, 0.9), "blocks": ((4, 1), (8, 1)), "latency_batch": 32}
_PRESETS: dict[tuple[str, str], dict[str, Any]] = {
    ("mlp", "quick"): {
        "width": 256,
        "sparsities": (0.9,),
        "dense_epochs": 15,
        "tune_epochs": 10,
        "train_batch": 64,
    },
    ("mlp", "default"): {},
    ("mlp", "full"): {"dense_epochs": 6, "tune_epochs": 4},
    ("cnn", "quick"): {
        **_CNN,
        "sparsities": (0.9,),
        "dense_epochs": 4,
        "tune_epochs": 2,
        "train_batch": 64,
        "search_sweeps": 1,
    },
    ("cnn", "default"): {
        **_CNN,
        "train_images": 6000,
        "dense_epochs": 4,
        "tune_epochs": 1,
        "train_batch": 128,
    },
    ("cnn", "full"): {**_CNN, "dense_epochs": 4, "tune_epochs": 2},
}
