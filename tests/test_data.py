import gzip
import struct
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch

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


class FakeHalf:
    """What torchvision's ImageFolder is, of random images."""

    def __init__(self, root, transform):
        self.classes = sorted(p.name for p in Path(root).iterdir())
        rng = np.random.default_rng(len(root))
        self.items = [
            (transform(rng.integers(0, 255, (6, 7, 3), dtype=np.uint8)), label)
            for label in range(len(self.classes))
            for _ in range(5)
        ]

    def __len__(self):
        return len(self.items)

    def __getitem__(self, index):
        return self.items[index]


class FakeCifar:
    """What torchvision's CIFAR10 is."""

    def __init__(self, root, train, download):
        rng = np.random.default_rng(int(train))
        count = 40 if train else 12
        self.data = rng.integers(0, 255, (count, 32, 32, 3), dtype=np.uint8)
        self.targets = rng.integers(0, 10, count).tolist()


@pytest.fixture
def torchvision(monkeypatch):
    """As much of torchvision as is used, since the tests do not need the real one."""
    package = ModuleType("torchvision")
    datasets, transforms = ModuleType("torchvision.datasets"), ModuleType("torchvision.transforms")
    datasets.CIFAR10, datasets.ImageFolder = FakeCifar, FakeHalf
    transforms.Resize = transforms.CenterCrop = lambda size: lambda x: x[:size, :size]
    transforms.PILToTensor = lambda: lambda x: torch.from_numpy(x.transpose(2, 0, 1).copy())
    transforms.Compose = lambda steps: lambda x: [x := step(x) for step in steps][-1]
    for module in (package, datasets, transforms):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    return package


def test_cifar10_keeps_channels_and_scales_each(torchvision):
    found = data.cifar10("somewhere")
    assert found.train_x.shape == (40, 3, 32, 32)
    assert found.test_x.shape == (12, 3, 32, 32)
    torch.testing.assert_close(found.train_x.mean((0, 2, 3)), torch.zeros(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(found.train_x.std((0, 2, 3)), torch.ones(3), atol=1e-5, rtol=0)
    raw = FakeCifar("", True, False)
    assert found.train_y.tolist() == raw.targets
    pixels = torch.from_numpy(raw.data).permute(0, 3, 1, 2).float()
    where = (3, 1, 4, 5)
    expected = (pixels[where] - pixels[:, 1].mean()) / pixels[:, 1].std()
    assert float(found.train_x[where]) == pytest.approx(float(expected), abs=1e-4)


@pytest.fixture
def folders(tmp_path):
    for half in ("train", "val"):
        for name in ("cat", "dog"):
            (tmp_path / half / name).mkdir(parents=True)
    return tmp_path


def test_image_folder(torchvision, folders):
    found = data.image_folder(folders, size=4)
    assert found.train_x.shape == (10, 3, 4, 4)
    assert found.test_y.tolist() == [0] * 5 + [1] * 5
    some = data.image_folder(folders, size=4, images=6, seed=1)
    assert some.train_x.shape == some.test_x.shape == (6, 3, 4, 4)
    again = data.image_folder(folders, size=4, images=6, seed=1)
    assert torch.equal(some.train_x, again.train_x)


def test_image_folder_names_what_is_missing(torchvision, folders):
    (folders / "val" / "bird").mkdir()
    with pytest.raises(ValueError, match=r"same classes \(got 2 and 3\)"):
        data.image_folder(folders, size=4)
    with pytest.raises(FileNotFoundError, match=r"folders train and test .*got \['cat', 'dog'\]"):
        data.image_folder(folders / "train", size=4)


def test_hugging_face(monkeypatch):
    rows = [{"image": np.full((5, 5), i, np.uint8), "label": i % 3} for i in range(9)]
    library = ModuleType("datasets")
    library.load_dataset = lambda name, **arguments: {"train": rows, "test": rows[:4]}
    monkeypatch.setitem(sys.modules, "datasets", library)
    found = data.hugging_face("someone/digits")
    assert found.train_x.shape == (9, 25)
    assert found.train_x[:, 0].argsort().tolist() == list(range(9))
    assert found.test_y.tolist() == [0, 1, 2, 0]
    assert len(data.hugging_face("someone/digits", images=5).train_y) == 5
    with pytest.raises(KeyError, match=r"no split 'validation' \(it has \['test', 'train'\]\)"):
        data.hugging_face("someone/digits", test="validation")


class FakePalette:
    """What a palette image of PIL is: an array of colour numbers, unless it is converted."""

    mode = "P"

    def __array__(self, dtype=None, copy=None):
        return np.zeros((4, 4), np.uint8)

    def convert(self, mode):
        assert mode == "RGB"
        return np.full((4, 4, 3), np.arange(3) * 100, np.uint8)


def test_images_that_do_not_go_together(monkeypatch):
    grey, colour = np.zeros((4, 4), np.uint8), np.ones((4, 4, 3), np.uint8)
    library = ModuleType("datasets")
    monkeypatch.setitem(sys.modules, "datasets", library)

    def load(*images, **arguments):
        rows = [{"image": image, "label": i} for i, image in enumerate(images)]
        library.load_dataset = lambda name: {"train": rows, "test": rows}
        return data.hugging_face("someone/mixed", **arguments)

    with pytest.raises(ValueError, match=r"same channels \(got \[3, 4, 4\], \[4, 4\]\); convert"):
        load(grey, colour)
    with pytest.raises(ValueError, match="one size"):
        load(grey, grey[:3])
    for images in (0, -1, True):
        with pytest.raises(ValueError, match="images must be an int of at least 1"):
            load(grey, grey, images=images)
    for seed in (True, 1.5, "1", np.array([1])):
        with pytest.raises(ValueError, match="hugging_face: seed must be an int"):
            load(grey, grey, images=1, seed=seed)
    drawn = (load(grey, grey, grey, grey, images=2, seed=s).train_y for s in (np.int64(3), 3))
    assert torch.equal(*drawn)
    with pytest.raises(KeyError, match=r"no column 'img' \(it has \['image', 'label'\]\).*image="):
        load(grey, image="img")
    assert load(FakePalette(), colour).train_x.shape[:2] == (2, 3)


@pytest.mark.parametrize(
    ("call", "package"),
    [
        (lambda: data.cifar10("x"), "torchvision"),
        (lambda: data.image_folder("x"), "torchvision"),
        (lambda: data.hugging_face("x"), "datasets"),
    ],
)
def test_a_missing_library_is_named(call, package, monkeypatch):
    for module in ("torchvision", "torchvision.datasets", "datasets"):
        monkeypatch.setitem(sys.modules, module, None)
    with pytest.raises(ImportError, match=f"pip install {package}"):
        call()


def test_images_need_labels():
    with pytest.raises(ValueError, match=r"test needs a label .*images \[3, 4\] and labels \[2\]"):
        data.from_arrays("x", "", np.ones((2, 4)), np.ones(2), np.ones((3, 4)), np.ones(2))


def test_halves_have_images_of_one_kind():
    ones = np.ones(2)
    with pytest.raises(ValueError, match=r"one size.*got \[3, 4, 4\] and \[16\]"):
        data.from_arrays("x", "", np.ones((2, 3, 4, 4)), ones, np.ones((2, 4, 4)), ones)
