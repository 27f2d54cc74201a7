"""Training, and what comes after it."""

from collections.abc import Callable
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from ..data import Dataset

Step = Callable[[], object]
Decay = Literal["linear", "cosine", "constant"]


def train(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
    step: Step,
    optimizer: torch.optim.Optimizer | None = None,
    schedule: Decay = "linear",
) -> None:
    """Adam, or another optimizer, with a learning rate that falls linearly to zero, or otherwise.

    The order of the batches depends on the seed alone, so all variants of a seed see the same
    batches. Sparse layers train as they are: gradients exist for stored blocks only.
    """
    order = torch.Generator().manual_seed(seed)
    steps = steps_of(data, epochs=epochs, batch=batch)
    optimizer = optimizer or torch.optim.Adam(model.parameters(), lr=learning_rate)
    decay = _decay(optimizer, schedule, steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train_y), generator=order).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_x[chosen]), data.train_y[chosen]).backward()
            optimizer.step()
            decay.step()
            step()
    model.eval()


def _decay(
    optimizer: torch.optim.Optimizer, schedule: Decay, steps: int
) -> torch.optim.lr_scheduler.LRScheduler:
    if schedule == "cosine":
        return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)
    end = 1.0 if schedule == "constant" else 0.0
    return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, end, total_iters=steps)


@torch.no_grad()
def recalibrate(model: nn.Module, data: Dataset, batch: int, batches: int = 32) -> None:
    """Measure the statistics of batch norm anew, which pruning and training have moved.

    Averages over batches of the training images, without changing a weight.
    """
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    if not norms:
        return
    momenta = [norm.momentum for norm in norms]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over the batches
    model.train()
    for images in data.train_x.split(batch)[:batches]:
        model(images)
    model.eval()
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.momentum = momentum


def steps_of(data: Dataset, *, epochs: int, batch: int) -> int:
    """Steps that :func:`train` takes."""
    return epochs * -(-len(data.train_y) // batch)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of test images classified correctly."""
    right = [
        (model(x).argmax(1) == y).float()
        for x, y in zip(data.test_x.split(1000), data.test_y.split(1000), strict=True)
    ]
    return float(torch.cat(right).mean())
