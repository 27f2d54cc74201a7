"""Data to train on, in memory.

Fashion-MNIST from its IDX files and the digits that ship with scikit-learn, for demo and
experiments; others through torchvision and Hugging Face's datasets, for users who have these.
Nothing is downloaded by :func:`load`. Fashion-MNIST is looked for in the folder given, in
``TETRIS_DATA``, and where Debian's package ``dataset-fashion-mnist`` puts it.
"""

import gzip
import os
import struct
from pathlib import Path

import numpy as np

from .dataset import Dataset as Dataset
from .dataset import from_arrays as from_arrays
from .dataset import standardized as standardized
from .external import cifar10 as cifar10
from .external import hugging_face as hugging_face
from .external import image_folder as image_folder

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
    return from_arrays("Fashion-MNIST", f"Fashion-MNIST from {folder}", **arrays)


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
    return from_arrays(
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
