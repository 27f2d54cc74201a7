"""A classification problem in memory."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor


@dataclass(frozen=True)
class Dataset:
    """A classification problem in memory.

    Attributes:
        name: For titles.
        note: Where it comes from, and how to get the other one.
        train_x: float32[n, pixels], or [n, channels, height, width] of colour images; centred and
            scaled, each channel by its own mean and standard deviation in the training images.
        train_y: int64[n].
        test_x: float32, the same of m test images.
        test_y: int64[m].
    """

    name: str
    note: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def from_arrays(
    name: str,
    note: str,
    train_x: np.ndarray | Tensor,
    train_y: np.ndarray | Tensor,
    test_x: np.ndarray | Tensor,
    test_y: np.ndarray | Tensor,
) -> Dataset:
    """A dataset of images as they come.

    Args:
        name: For titles.
        note: Where it comes from.
        train_x: [n, pixels], [n, height, width], which become pixels, or [n, channels, height,
            width], of any type.
        train_y: [n], labels from 0.
        test_x: The same for test.
        test_y: The same for test.

    Raises:
        ValueError: numbers of images and labels differ, or there are none; images of the halves
            have other sizes or channels.
    """
    images = [_images(part) for part in (train_x, test_x)]
    labels = [_tensor(part, np.int64) for part in (train_y, test_y)]
    for half, x, y in zip(("train", "test"), images, labels, strict=True):
        if y.dim() != 1 or len(x) != len(y) or not len(y):
            raise ValueError(
                f"{name}: {half} needs a label for every image, and at least one "
                f"(got images {list(x.shape)} and labels {list(y.shape)})"
            )
    sizes = [list(x.shape[1:]) for x in images]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"{name}: images of train and test must have one size and the same channels "
            f"(got {sizes[0]} and {sizes[1]}); convert one half"
        )
    train, test = standardized(*images)
    return Dataset(name, note, train, labels[0], test, labels[1])


def standardized(train: Tensor, test: Tensor) -> tuple[Tensor, Tensor]:
    """Both, centred and scaled by the mean and deviation of the first, channel by channel."""
    axes = (0, 2, 3) if train.dim() == 4 else (0, 1)
    mean = train.mean(axes, keepdim=True)
    scale = train.std(axes, keepdim=True).clamp(min=1e-12)
    return (train - mean) / scale, (test - mean) / scale


def _images(part: np.ndarray | Tensor) -> Tensor:
    x = _tensor(part, np.float32)
    return x if x.dim() == 4 else x.flatten(1)


def _tensor(part: np.ndarray | Tensor, dtype: type[np.generic]) -> Tensor:
    array = part.numpy() if isinstance(part, Tensor) else part
    return torch.from_numpy(array.astype(dtype))  # a copy: files are read into read-only arrays
