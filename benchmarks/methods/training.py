"""Training as the experiments need it; the loop itself is the demo's."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from tetris.data import Dataset
from tetris.demo.train import accuracy as accuracy
from tetris.demo.train import recalibrate as recalibrate
from tetris.demo.train import steps_of as steps_of
from tetris.demo.train import train


@dataclass(frozen=True)
class Recipe:
    """How a network is trained.

    Attributes:
        epochs: Passes over the training images.
        batch: Images per step.
        learning_rate: At the start.
        optimizer: ``adam``, or ``sgd`` with momentum 0.9.
        weight_decay: Of the optimizer.
        schedule: ``linear`` or ``cosine``, both down to zero, or ``constant``.
    """

    epochs: int
    batch: int = 64
    learning_rate: float = 2e-3
    optimizer: Literal["adam", "sgd"] = "adam"
    weight_decay: float = 0.0
    schedule: Literal["linear", "cosine", "constant"] = "linear"

    def optimizer_of(self, model: nn.Module) -> torch.optim.Optimizer:
        """A fresh optimizer of a model's parameters."""
        if self.optimizer == "adam":
            return torch.optim.Adam(
                model.parameters(), lr=self.learning_rate, weight_decay=self.weight_decay
            )
        return torch.optim.SGD(
            model.parameters(), self.learning_rate, momentum=0.9, weight_decay=self.weight_decay
        )


def fit(
    model: nn.Module,
    data: Dataset,
    recipe: Recipe,
    seed: int,
    *,
    optimizer: torch.optim.Optimizer | None = None,
    step: Callable[[], object] = lambda: None,
) -> float:
    """Train, measure batch norm anew, and return test accuracy.

    Args:
        model: Dense, masked or sparse; left in eval mode.
        data: Of the seed, see :func:`benchmarks.methods.data.split`.
        recipe: How.
        seed: Of the order of batches: all variants of a seed see the same.
        optimizer: In place of the recipe's, for one that a pruner knows.
        step: Called after each optimizer step: ``pruner.step``.
    """
    train(
        model,
        data,
        epochs=recipe.epochs,
        batch=recipe.batch,
        learning_rate=recipe.learning_rate,
        seed=seed,
        optimizer=optimizer or recipe.optimizer_of(model),
        schedule=recipe.schedule,
        step=step,
    )
    recalibrate(model, data, recipe.batch)
    return accuracy(model, data)


def baseline(dense: nn.Module, data: Dataset, tune: Recipe, seed: int) -> tuple[nn.Module, float]:
    """A dense network that is trained as long as the pruned ones, and its test accuracy.

    Fine-tuning is training: without it pruned networks had more steps than what they are held
    against.

    Args:
        dense: Trained network that the pruned ones start from; not changed.
        data: Of the seed.
        tune: How the pruned networks are fine-tuned.
        seed: Theirs.
    """
    model = copy.deepcopy(dense)
    return model, fit(model, data, tune, seed)


def before(model: nn.Module, data: Dataset, batch: int = 64) -> float:
    """Accuracy of a pruned model before fine-tuning, with batch norm measured anew."""
    model.eval()
    recalibrate(model, data, batch)
    return accuracy(model, data)
