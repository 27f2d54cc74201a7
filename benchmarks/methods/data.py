"""Data of the experiments: one split per seed, shared by all variants."""

from __future__ import annotations

from dataclasses import replace
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
_EXTERNAL = {"cifar10": cifar10, "folder": image_folder}
DATA = ("digits", "fashion", *_EXTERNAL)


def split(
    name: str,
    seed: int,
    *,
    images: int | None = None,
    flat: bool = False,
    root: Path | None = None,
) -> Dataset:
    """Training and test data of one seed.

    Args:
        name: ``digits``: a quarter of scikit-learn's 1797 digits, drawn by the seed, is test data.
            ``fashion``: Fashion-MNIST; the test images are the official ones, the seed draws
            which training images are used. ``cifar10`` and ``folder``, which is
            :func:`tetris.data.image_folder`: the same with theirs.
        seed: Of the split.
        images: Number of training images, all if None.
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
    train = train[:images]
    train_x, test_x = standardized(x[train], data.test_x)
    shape = _flat if flat else _image
    return replace(data, train_x=shape(train_x), train_y=y[train], test_x=shape(test_x))


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
