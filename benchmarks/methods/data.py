"""Data of the experiments: one split per seed, shared by all variants."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache

import torch
from torch import Tensor

from tetris.data import DEBIAN_FOLDER, Dataset, load, load_digits

TEST_DIGITS = 450


def split(name: str, seed: int, *, images: int | None = None, flat: bool = False) -> Dataset:
    """Training and test data of one seed.

    Args:
        name: ``digits``: a quarter of scikit-learn's 1797 digits, drawn by the seed, is test data.
            ``fashion``: Fashion-MNIST; the test images are the official ones, the seed draws
            which training images are used.
        seed: Of the split.
        images: Number of training images, all if None.
        flat: Inputs [N, pixels]; else images [N, 1, height, width].

    Raises:
        ValueError: another name.
        FileNotFoundError: Fashion-MNIST is not installed.
    """
    data = _load(name)
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
    mean, scale = x[train].mean(), x[train].std()
    shape = as_they_are if flat else square
    return replace(
        data,
        train_x=shape((x[train] - mean) / scale),
        train_y=y[train],
        test_x=shape((data.test_x - mean) / scale),
    )


def as_they_are(flat: Tensor) -> Tensor:
    """[N, pixels]."""
    return flat


def square(flat: Tensor) -> Tensor:
    """[N, pixels] to [N, 1, height, width] of square images."""
    size = round(flat.shape[1] ** 0.5)
    return flat.view(-1, 1, size, size)


@lru_cache(maxsize=1)
def _load(name: str) -> Dataset:
    if name == "digits":
        return load_digits()
    if name != "fashion":
        raise ValueError(f"split: data must be 'digits' or 'fashion' (got {name!r})")
    data = load()  # TETRIS_DATA or the system's folder
    if data.name == "digits":
        raise FileNotFoundError(f"split: no Fashion-MNIST in TETRIS_DATA or {DEBIAN_FOLDER}")
    return data
