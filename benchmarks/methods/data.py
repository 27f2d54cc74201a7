"""Data of the experiments: one split per seed, shared by all variants."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from tetris.data import (
    DEBIAN_FOLDER,
    Dataset,
    cifar10,
    image_folder,
    load,
    load_digits,
    standardized,
)

TEST_DIGITS = 450
VALID = 1000  # images at most, and a tenth of the training images at most
_EXTERNAL = {"cifar10": cifar10, "folder": image_folder}
DATA = ("digits", "fashion", *_EXTERNAL)


@dataclass(frozen=True)
class Split(Dataset):
    """Data of one seed in three parts.

    Training images are trained on, whatever is chosen by accuracy is chosen on ``valid``, and test
    images are for the accuracy that is reported.

    Attributes:
        valid_x: Images to choose by, in the shape of the others.
        valid_y: int64, their classes.
    """

    valid_x: Tensor
    valid_y: Tensor

    @property
    def validation(self) -> Dataset:
        """The same with validation images in place of test images, for what measures on these."""
        return replace(self, test_x=self.valid_x, test_y=self.valid_y)


def split(
    name: str,
    seed: int,
    *,
    images: int | None = None,
    tests: int | None = None,
    flat: bool = False,
    root: Path | None = None,
) -> Split:
    """Training, validation and test data of one seed.

    Validation images are a tenth of the training images, no more than 1000, and not trained on.

    Args:
        name: ``digits``: a quarter of scikit-learn's 1797 digits, drawn by the seed, is test data.
            ``fashion``: Fashion-MNIST; the test images are the official ones, the seed draws
            which training images are used. ``cifar10`` and ``folder``, which is
            :func:`tetris.data.image_folder`: the same with theirs.
        seed: Of the split.
        images: Number of training images, all if None.
        tests: Number of test images, drawn by the seed, all if None.
        flat: Inputs [N, pixels]; else images [N, channels, height, width].
        root: Folder of the data; needed but for digits and an installed Fashion-MNIST.

    Raises:
        ValueError: another name, or no root.
        FileNotFoundError: the data are not there.
        ImportError: a library that reads them is not there; the message says which.
    """
    data = _load(name, root)
    order = torch.Generator().manual_seed(seed)
    if name == "digits":
        x, y = torch.cat([data.train_x, data.test_x]), torch.cat([data.train_y, data.test_y])
        chosen = torch.randperm(len(y), generator=order)
        test, train = chosen[:TEST_DIGITS], chosen[TEST_DIGITS:]
        data = replace(data, test_x=x[test], test_y=y[test])
    else:
        x, y = data.train_x, data.train_y
        train = torch.randperm(len(y), generator=order)
    if tests is not None:
        drawn = torch.randperm(len(data.test_y), generator=order)[:tests]
        data = replace(data, test_x=data.test_x[drawn], test_y=data.test_y[drawn])
    held = min(VALID, len(train) // 10)
    train, valid = train[: len(train) - held][:images], train[len(train) - held :]
    train_x, rest = standardized(x[train], torch.cat([data.test_x, x[valid]]))
    test_x, valid_x = rest.split([len(data.test_y), held])
    shape = _flat if flat else _image
    return Split(
        data.name,
        data.note,
        shape(train_x),
        y[train],
        shape(test_x),
        data.test_y,
        shape(valid_x),
        y[valid],
    )


def _flat(x: Tensor) -> Tensor:
    return x.flatten(1)


def _image(x: Tensor) -> Tensor:
    """Of one channel and square, where the shape does not say."""
    size = round(x.shape[1] ** 0.5)
    return x if x.dim() == 4 else x.view(-1, 1, size, size)


@lru_cache(maxsize=1)
def _load(name: str, root: Path | None) -> Dataset:
    if name == "digits":
        return load_digits()
    if name in _EXTERNAL:
        if root is None:
            raise ValueError(f"split: data {name!r} need a root, the folder where they are")
        return _EXTERNAL[name](root)
    if name != "fashion":
        raise ValueError(f"split: data must be one of {', '.join(DATA)} (got {name!r})")
    if root is not None:
        return load(root)
    data = load()  # TETRIS_DATA or the system's folder
    if data.name == "digits":
        raise FileNotFoundError(f"split: no Fashion-MNIST in TETRIS_DATA or {DEBIAN_FOLDER}")
    return data
