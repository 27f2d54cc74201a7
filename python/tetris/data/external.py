"""Data through libraries that users have: torchvision, and Hugging Face's datasets."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..checks import check_seed
from .dataset import Dataset, from_arrays


def cifar10(root: str | Path, *, download: bool = False) -> Dataset:
    """CIFAR-10 through torchvision: 50000 training and 10000 test images, [3, 32, 32].

    Args:
        root: Folder with ``cifar-10-batches-py``.
        download: Let torchvision fetch it (170 MB) where it is missing.

    Raises:
        ImportError: torchvision is not installed.
        RuntimeError: the data are not there (from torchvision).

    Example:
        >>> data = tetris.data.cifar10("~/data", download=True)
    """
    make = _need("cifar10", "torchvision.datasets", "torchvision").CIFAR10
    folder = Path(root).expanduser()
    halves = [make(str(folder), train=train, download=download) for train in (True, False)]
    arrays = []
    for half in halves:
        arrays += [np.asarray(half.data).transpose(0, 3, 1, 2), np.asarray(half.targets)]
    return from_arrays("CIFAR-10", f"CIFAR-10 from {folder}", *arrays)


def image_folder(
    root: str | Path, *, size: int = 64, images: int | None = None, seed: int = 0
) -> Dataset:
    """Images in folders, one per class, as ImageNet has them; through torchvision, into memory.

    Args:
        root: Folder with ``train`` and with ``test`` or ``val``, in each a folder per class.
        size: Images are resized and cropped to this square. At float32, 10000 of 64 take 0.5 GB.
        images: At most as many of each half, drawn at random.
        seed: Of that draw.

    Raises:
        ImportError: torchvision is not installed.
        FileNotFoundError: a folder is missing.
        ValueError: the halves have other classes; images is not positive.

    Example:
        >>> data = tetris.data.image_folder("imagenette", size=96, images=5000)
    """
    where = "image_folder"
    make = _need(where, "torchvision.datasets", "torchvision").ImageFolder
    transforms = _need(where, "torchvision.transforms", "torchvision")
    steps = [transforms.Resize(size), transforms.CenterCrop(size), transforms.PILToTensor()]
    folder = Path(root).expanduser()
    test = next((folder / name for name in ("test", "val") if (folder / name).is_dir()), None)
    if test is None or not (folder / "train").is_dir():
        raise FileNotFoundError(
            f"image_folder: {folder} needs the folders train and test (or val), each with a folder "
            f"per class (got {sorted(p.name for p in folder.glob('*'))[:8]})"
        )
    halves = [make(str(p), transforms.Compose(steps)) for p in (folder / "train", test)]
    if halves[0].classes != halves[1].classes:
        raise ValueError(
            f"image_folder: {folder / 'train'} and {test} must have the same classes "
            f"(got {len(halves[0].classes)} and {len(halves[1].classes)})"
        )
    arrays = []
    for half in halves:
        arrays += _stack(where, half, len(half), images, seed, lambda pair: pair)
    return from_arrays(folder.name, f"images in {folder}", *arrays)


def hugging_face(
    name: str,
    *,
    image: str = "image",
    label: str = "label",
    test: str = "test",
    images: int | None = None,
    seed: int = 0,
    **arguments: Any,
) -> Dataset:
    """Images of equal size through Hugging Face's ``datasets``, into memory.

    Args:
        name: As for ``datasets.load_dataset``, such as ``"ylecun/mnist"``.
        image: Column with images.
        label: Column with class numbers.
        test: Split to test on.
        images: At most as many of each half, drawn at random.
        seed: Of that draw.
        **arguments: Go on to ``load_dataset``.

    Raises:
        ImportError: datasets is not installed.
        KeyError: there is no such split or column.
        ValueError: images are of several sizes or kinds; images= is not positive.

    Example:
        >>> data = tetris.data.hugging_face("ylecun/mnist", images=10_000)
    """
    where = "hugging_face"
    found = _need(where, "datasets", "datasets").load_dataset(name, **arguments)
    arrays = []

    def columns(row: Mapping[str, Any]) -> tuple[Any, int]:
        for column, argument in ((image, "image"), (label, "label")):
            if column not in row:
                raise KeyError(
                    f"{where}: {name} has no column {column!r} (it has {sorted(row)}); "
                    f"name one by {argument}="
                )
        return row[image], row[label]

    for split in ("train", test):
        if split not in found:
            raise KeyError(f"hugging_face: {name} has no split {split!r} (it has {sorted(found)})")
        half = found[split]
        arrays += _stack(where, half, len(half), images, seed, columns)
    return from_arrays(name, f"{name} from Hugging Face", *arrays)


def _stack(
    where: str,
    items: Any,
    count: int,
    most: int | None,
    seed: int,
    pair: Callable[[Any], tuple[Any, int]],
) -> tuple[Tensor, Tensor]:
    """Images and labels of items, drawn at random where there are too many."""
    if most is not None and (isinstance(most, bool) or not isinstance(most, int) or most < 1):
        raise ValueError(f"{where}: images must be an int of at least 1, or None (got {most!r})")
    seed = check_seed(where, seed)
    chosen: Iterable[int] = range(count)
    if most is not None and most < count:
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(count, generator=generator)[:most].sort().values.tolist()
    x, y = zip(*(pair(items[i]) for i in chosen), strict=True)
    images = [_channels_first(image) for image in x]
    shapes = sorted({tuple(image.shape) for image in images})
    if len(shapes) > 1:
        got = ", ".join(str([*shape]) for shape in shapes[:4])
        raise ValueError(
            f"{where}: images must all have one size and the same channels (got {got}); convert "
            "them, grey ones to RGB or all to grey, and resize them"
        )
    return torch.stack(images), torch.tensor(y)


def _channels_first(image: Any) -> Tensor:
    """A tensor as it is; an image or array [height, width(, channels)] with channels first."""
    if isinstance(image, Tensor):
        return image
    if getattr(image, "mode", None) in ("P", "PA"):  # numbers of colours in a palette
        image = image.convert("RGB")
    array = torch.from_numpy(np.array(image))
    return array.permute(2, 0, 1) if array.dim() == 3 else array


def _need(where: str, module: str, package: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise ImportError(
            f"{where} needs {package}, which is not installed: pip install {package}"
        ) from error
