"""Data for the demo: Fashion-MNIST from its IDX files, or the digits that ship with scikit-learn.

Nothing is downloaded. Fashion-MNIST is looked for in the folder given, in ``TETRIS_DATA``, and
where Debian's package ``dataset-fashion-mnist`` puts it.
"""

import gzip
import os
import struct
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

DEBIAN_FOLDER = Path("/usr/share/datasets/fashion-mnist")
FILES = {
    "train_x": "train-images-idx3-ubyte",
    "train_y": "train-labels-idx1-ubyte",
    "test_x": "t10k-images-idx3-ubyte",
    "test_y": "t10k-labels-idx1-ubyte",
}
HINT = (
    "For Fashion-MNIST, without --quick: apt install dataset-fashion-mnist, or pass --data FOLDER "
    "(or set TETRIS_DATA) with its four IDX files, plain or .gz"
)


@dataclass(frozen=True)
class Dataset:
    """A classification problem with flat inputs.

    Attributes:
        name: For titles.
        note: Where it comes from, and how to get the other one.
        train_x: float32[n, features], centred and scaled.
        train_y: int64[n].
        test_x: float32[m, features].
        test_y: int64[m].
    """

    name: str
    note: str
    train_x: Tensor
    train_y: Tensor
    test_x: Tensor
    test_y: Tensor


def load(folder: str | Path | None = None, *, digits: bool = False) -> Dataset:
    """Loads Fashion-MNIST where it can be found, else scikit-learn's digits.

    Args:
        folder: Where the IDX files are; None looks in ``TETRIS_DATA``, then where Debian's package
            puts them, then takes the digits.
        digits: Take the digits in any case.

    Raises:
        FileNotFoundError: the folder given, or ``TETRIS_DATA``, lacks a file.
        ValueError: a file is not what its name says.
        ImportError: neither Fashion-MNIST nor scikit-learn is there.
    """
    if digits:
        return load_digits()
    if folder is None:
        folder = os.environ.get("TETRIS_DATA") or None
    if folder is not None:
        return load_fashion(Path(folder))
    if all(_find(DEBIAN_FOLDER, name) for name in FILES.values()):
        return load_fashion(DEBIAN_FOLDER)
    return load_digits()


def load_fashion(folder: Path) -> Dataset:
    """Fashion-MNIST from its four IDX files: 60000 training and 10000 test images, 28 x 28."""
    arrays = {}
    for part, name in FILES.items():
        path = _find(folder, name)
        if path is None:
            raise FileNotFoundError(f"{folder} has neither {name} nor {name}.gz. {HINT}")
        arrays[part] = read_idx(path)
    for half in ("train", "test"):
        images, labels = arrays[f"{half}_x"], arrays[f"{half}_y"]
        if images.ndim != 3 or labels.ndim != 1 or len(images) != len(labels):
            raise ValueError(
                f"{folder}: {half} images must be [n, rows, columns] and labels [n] "
                f"(got {list(images.shape)} and {list(labels.shape)})"
            )
    return _dataset("Fashion-MNIST", f"Fashion-MNIST from {folder}", **arrays)


def load_digits() -> Dataset:
    """The 1797 handwritten digits of 8 x 8 pixels in scikit-learn, a quarter held out for test."""
    try:
        from sklearn import datasets
    except ImportError as error:
        raise ImportError(
            "the digits come with scikit-learn, which is an extra: pip install 'tetris[demo]'. "
            + HINT
        ) from error
    images, labels = (np.asarray(part) for part in datasets.load_digits(return_X_y=True))
    order = np.random.default_rng(0).permutation(len(labels))
    train, test = order[450:], order[:450]
    return _dataset(
        "digits",
        f"the digits of scikit-learn. {HINT}",
        images[train],
        labels[train],
        images[test],
        labels[test],
    )


def read_idx(path: Path) -> np.ndarray:
    """Reads an IDX file of unsigned bytes, plain or gzipped.

    The header is two zero bytes, a type (8 is unsigned byte), the number of dimensions, then each
    dimension as a big-endian 32-bit integer; the data follow.

    Raises:
        ValueError: the header or the length is wrong; the message says what was found.
    """
    try:
        with (gzip.open if path.suffix == ".gz" else open)(path, "rb") as file:
            content = file.read()
    except (gzip.BadGzipFile, EOFError) as error:
        raise ValueError(f"{path}: not a complete gzip file ({error})") from error
    if len(content) < 4 or content[:2] != b"\0\0":
        raise ValueError(
            f"{path}: an IDX file starts with two zero bytes (got {content[:4].hex() or 'nothing'})"
        )
    kind, dimensions = content[2], content[3]
    if kind != 8 or not 1 <= dimensions <= 4:
        raise ValueError(
            f"{path}: expected type 8 (unsigned byte) and 1 to 4 dimensions "
            f"(got type {kind} and {dimensions} dimensions)"
        )
    start = 4 + 4 * dimensions
    if len(content) < start:
        raise ValueError(f"{path}: the header needs {start} bytes (the file has {len(content)})")
    shape = struct.unpack(f">{dimensions}I", content[4:start])
    expected = int(np.prod(shape, dtype=np.int64))
    if len(content) - start != expected:
        raise ValueError(
            f"{path}: the header promises {' x '.join(map(str, shape))} = {expected} bytes "
            f"(got {len(content) - start})"
        )
    return np.frombuffer(content, np.uint8, offset=start).reshape(shape)


def _find(folder: Path, name: str) -> Path | None:
    for path in (folder / name, folder / f"{name}.gz"):
        if path.is_file():
            return path
    return None


def _dataset(
    name: str,
    note: str,
    train_x: np.ndarray,
    train_y: np.ndarray,
    test_x: np.ndarray,
    test_y: np.ndarray,
) -> Dataset:
    def flat(images: np.ndarray) -> Tensor:
        return torch.from_numpy(images.reshape(len(images), -1).astype(np.float32))

    inputs = flat(train_x)
    mean, scale = inputs.mean(), inputs.std()
    return Dataset(
        name,
        note,
        (inputs - mean) / scale,
        torch.from_numpy(train_y.astype(np.int64)),
        (flat(test_x) - mean) / scale,
        torch.from_numpy(test_y.astype(np.int64)),
    )
