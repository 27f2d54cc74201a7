import gzip
import struct

import numpy as np
import pytest

from tetris import data


def idx(array: np.ndarray) -> bytes:
    header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
    return header + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path):
    """A folder with eight tiny images per half, some files plain and some gzipped."""
    rng = np.random.default_rng(0)
    for part, name in data.FILES.items():
        array = rng.integers(0, 255, (8, 4, 4)) if part.endswith("x") else np.arange(8) % 3
        if part.startswith("train"):
            (tmp_path / f"{name}.gz").write_bytes(gzip.compress(idx(array)))
        else:
            (tmp_path / name).write_bytes(idx(array))
    return tmp_path


def test_idx_round_trip(tmp_path):
    array = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
    (tmp_path / "a").write_bytes(idx(array))
    np.testing.assert_array_equal(data.read_idx(tmp_path / "a"), array)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "two zero bytes"),
        (b"PK\x03\x04", "two zero bytes"),
        (b"\0\0\x0d\x01\0\0\0\x01\0\0\0\0", "got type 13"),
        (b"\0\0\x08\x00", "0 dimensions"),
        (b"\0\0\x08\x03\0\0", "header needs 16 bytes"),
        (idx(np.zeros((2, 3)))[:-1], r"promises 2 x 3 = 6 bytes \(got 5\)"),
        (idx(np.zeros((2, 3))) + b"x", r"promises 2 x 3 = 6 bytes \(got 7\)"),
    ],
)
def test_broken_idx_is_explained(tmp_path, content, message):
    (tmp_path / "broken").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        data.read_idx(tmp_path / "broken")


def test_broken_gzip_is_explained(tmp_path):
    (tmp_path / "broken.gz").write_bytes(gzip.compress(idx(np.zeros(100)))[:-12])
    with pytest.raises(ValueError, match="not a complete gzip file"):
        data.read_idx(tmp_path / "broken.gz")


def test_folder_by_argument_and_by_environment(fashion, monkeypatch):
    given = data.load(fashion)
    assert given.name == "Fashion-MNIST"
    assert given.train_x.shape == (8, 16)
    assert abs(float(given.train_x.mean())) < 1e-5
    assert given.test_y.tolist() == [0, 1, 2, 0, 1, 2, 0, 1]
    monkeypatch.setenv("TETRIS_DATA", str(fashion))
    assert str(fashion) in data.load().note


def test_missing_file_names_it_and_the_way_out(fashion):
    (fashion / data.FILES["test_y"]).unlink()
    with pytest.raises(FileNotFoundError, match="t10k-labels.*apt install"):
        data.load(fashion)


def test_labels_must_fit_images(fashion):
    (fashion / data.FILES["test_y"]).write_bytes(idx(np.zeros(7)))
    with pytest.raises(ValueError, match="test images must be"):
        data.load(fashion)


def test_digits_when_nothing_is_installed(tmp_path, monkeypatch):
    monkeypatch.delenv("TETRIS_DATA", raising=False)
    monkeypatch.setattr(data, "DEBIAN_FOLDER", tmp_path)
    digits = data.load()
    assert digits.name == "digits"
    assert "apt install dataset-fashion-mnist" in digits.note
    assert digits.train_x.shape == (1347, 64)
    assert digits.test_x.shape == (450, 64)
