"""The network of the demo and its training."""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ..data import Dataset

Step = Callable[[], None]


def mlp(features: int, hidden: int, classes: int) -> nn.Sequential:
    """Two hidden layers; the classifier is small and stays dense throughout."""
    return nn.Sequential(
        nn.Linear(features, hidden),
        nn.ReLU(),
        nn.Linear(hidden, hidden),
        nn.ReLU(),
        nn.Linear(hidden, classes),
    )


def train(
    model: nn.Module,
    data: Dataset,
    *,
    epochs: int,
    batch: int,
    learning_rate: float,
    seed: int,
    step: Step,
) -> None:
    """Adam with a learning rate that falls linearly to zero.

    The order of the batches depends on the seed alone, so all variants of a seed see the same
    batches. Sparse layers train as they are: gradients exist for stored blocks only.
    """
    order = torch.Generator().manual_seed(seed)
    steps = steps_of(data, epochs=epochs, batch=batch)
    optimizer = torch.optim.Adam(model.parameters(), lr=learning_rate)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=steps)
    model.train()
    for _ in range(epochs):
        for chosen in torch.randperm(len(data.train_y), generator=order).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(model(data.train_x[chosen]), data.train_y[chosen]).backward()
            optimizer.step()
            schedule.step()
            step()
    model.eval()


def steps_of(data: Dataset, *, epochs: int, batch: int) -> int:
    """Steps that :func:`train` takes."""
    return epochs * -(-len(data.train_y) // batch)


@torch.inference_mode()
def accuracy(model: nn.Module, data: Dataset) -> float:
    """Share of test images classified correctly."""
    return float((model(data.test_x).argmax(1) == data.test_y).float().mean())
