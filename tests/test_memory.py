"""Bytes: what a sparse layer takes on disk and in memory, and what making one takes on top."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import tetris

FEATURES = 4096
DENSE = 4 * FEATURES**2


@pytest.fixture(scope="module", params=[((16, 16), 0.13), ((4, 1), 0.16)], ids=["16x16", "4x1"])
def layer(request):
    """A layer at 90 %, both permutations stored, and the share of the dense bytes it may take."""
    block, share = request.param
    rows, cols = -(-FEATURES // block[0]), -(-FEATURES // block[1])
    generator = torch.Generator().manual_seed(0)
    mask = torch.zeros(rows * cols, dtype=torch.bool)
    mask[torch.randperm(rows * cols, generator=generator)[: rows * cols // 10]] = True
    perms = [torch.randperm(FEATURES, generator=generator).int() for _ in range(2)]
    layout = tetris.BlockLayout.from_block_mask(
        mask.view(rows, cols), block, FEATURES, FEATURES, *perms
    )
    sparse = tetris.SparseLinear(FEATURES, FEATURES, bias=False, layout=layout)
    return nn.Sequential(sparse).requires_grad_(False), share


def test_on_disk(layer, tmp_path):
    model, share = layer
    tetris.save(model, tmp_path / "tetris")
    torch.save(model.state_dict(), tmp_path / "torch")
    for name in ("tetris", "torch"):
        assert (tmp_path / name).stat().st_size < share * DENSE


def test_in_memory(layer):
    model, share = layer
    tensors = [*model.parameters(), *model.buffers()]
    assert sum(t.untyped_storage().nbytes() for t in tensors) < share * DENSE


PEAK = """
import sys
import torch
import tetris
from torch import nn

def status(key):
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith(key))

def dense(features, count):
    layers = (nn.Linear(features, features, bias=False) for _ in range(count))
    return nn.Sequential(*layers)

def sparsified(model, block, inplace=True, **search):
    return tetris.sparsify(
        model, sparsity=0.9, block=block, inplace=inplace, allow_empty_rows=True, **search
    )

def taken(prepare, run, features, count):
    "Of run(prepare(features, count)), in layers: at most, and afterwards."
    torch.set_num_threads(1)
    run(prepare(64, 2))  # code and pools are loaded
    made = prepare(features, count)
    before = status("VmRSS")
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")  # the high-water mark starts anew
    result = run(made)
    layer = 4 * features**2
    print((status("VmHWM") - before) / layer, (status("VmRSS") - before) / layer)
    return result
"""

SPARSIFY = """
inplace, block, search, features, count = eval(sys.argv[1])
sparse = taken(dense, lambda model: sparsified(model, block, inplace, **search), features, count)
assert isinstance(sparse[0], tetris.SparseLinear)
"""

TRAIN = """
block, features, steps = eval(sys.argv[1])

def prepare(features, count):
    model = dense(features, count)
    return model if block is None else sparsified(model, block, reorder="l1_sort")

def train(model):
    optimizer = torch.optim.Adam(model.parameters())
    inputs = torch.randn(64, model[0].in_features)
    for _ in range(steps):
        optimizer.zero_grad()
        model(inputs).square().mean().backward()
        optimizer.step()
    with torch.no_grad():
        return model(inputs)

taken(prepare, train, features, 1)
"""


CONVOLVE = """
(images, channels, size, outputs, kernel, stride, dilation), channels_last, _ = eval(sys.argv[1])
format = torch.channels_last if channels_last else torch.contiguous_format

def prepare(features, _):
    "A layer of 64 channels on one pixel first, which takes next to nothing."
    small = features == 64
    ins, outs = (64, 64) if small else (channels, outputs)
    padding = kernel // 2 * dilation
    dense = nn.Conv2d(ins, outs, kernel, stride, padding, dilation, bias=False)
    sparse = tetris.SparseConv2d.from_dense(dense, sparsity=0.75, block=(8, 1), reorder=False)
    x = torch.randn((1, 64, 1, 1) if small else (images, channels, size, size))
    return sparse.requires_grad_(False), x.contiguous(memory_format=format)

# A unit is what input and output take.
maps = images * (channels * size**2 + outputs * (size // stride) ** 2)
taken(prepare, lambda made: made[0](made[1]), maps**0.5, 1)
"""


def peak(script, *arguments):
    """Memory that a script takes in a process of its own, in layers: at most, and afterwards."""
    environment = {
        **os.environ,
        # Freed memory goes back to the system at once, so that the mark shows what was in use.
        "MALLOC_MMAP_THRESHOLD_": "65536",
        "MALLOC_TRIM_THRESHOLD_": "65536",
    }
    done = subprocess.run(
        [sys.executable, "-c", PEAK + script, repr(arguments)],
        capture_output=True,
        text=True,
        env=environment,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    high, after = map(float, done.stdout.split())
    return high, after


needs_proc = pytest.mark.skipif(
    not (sys.platform == "linux" and Path("/proc/self/clear_refs").exists()),
    reason="reads the high-water mark of Linux",
)


@needs_proc
@pytest.mark.parametrize("block", [(16, 16), (4, 1)], ids=lambda block: f"{block[0]}x{block[1]}")
@pytest.mark.parametrize(
    ("inplace", "search"), [(False, {"reorder": False}), (True, {"budget": 0.5})], ids=str
)
def test_sparsify_takes_less_than_the_largest_layer(inplace, block, search):
    """The sums of one layer's blocks, what a search copies of it, and what will be stored."""
    high, after = peak(SPARSIFY, inplace, block, search, FEATURES, 3)
    assert high < 0.6
    if inplace:
        assert after < -2.6  # the dense weights are gone
    else:
        assert after < 0.4  # and here they are not copied


@needs_proc
@pytest.mark.slow
def test_the_default_search_peaks_as_low():
    high, _ = peak(SPARSIFY, True, (16, 16), {}, FEATURES, 2)
    assert high < 0.6


@needs_proc
@pytest.mark.parametrize("block", [(16, 16), (4, 1)], ids=lambda block: f"{block[0]}x{block[1]}")
def test_training_takes_what_is_stored(block):
    """Gradient, two moments and what Adam computes with, a tenth each; and buffers of products."""
    high, _ = peak(TRAIN, block, FEATURES, 1)
    assert high < 0.7


@needs_proc
def test_training_a_dense_layer_takes_several():
    """So that the bound above means something."""
    high, _ = peak(TRAIN, None, FEATURES, 1)
    assert high > 3


@needs_proc
@pytest.mark.parametrize("block", [(16, 16), (4, 1)], ids=lambda block: f"{block[0]}x{block[1]}")
def test_inference_takes_activations_alone(block):
    high, _ = peak(TRAIN, block, FEATURES, 0)
    assert high < 0.15


@needs_proc
@pytest.mark.parametrize("channels_last", [False, True], ids=["nchw", "nhwc"])
@pytest.mark.parametrize(
    (
        "layer",
        "output",
    ),  # images, channels, size, outputs, kernel, stride, dilation; output's share
    [
        ((8, 64, 56, 64, 3, 1, 1), 1 / 2),
        ((8, 256, 28, 128, 3, 1, 1), 1 / 3),
        ((8, 128, 56, 256, 3, 2, 1), 1 / 3),
        ((8, 256, 56, 64, 1, 1, 1), 1 / 5),
        ((1, 64, 224, 64, 3, 1, 1), 1 / 2),
        ((1, 2048, 33, 256, 3, 1, 6), 1 / 9),
        ((1, 2048, 33, 256, 3, 1, 12), 1 / 9),
        ((1, 2048, 33, 256, 3, 1, 24), 1 / 9),
        ((1, 2048, 33, 256, 3, 1, 36), 1 / 9),  # reaches beyond the map
    ],
    ids=str,
)
def test_a_convolution_takes_less_than_its_maps(layer, output, channels_last):
    """Its output, and buffers of less than one and a half times its input and output."""
    high, after = peak(CONVOLVE, layer, channels_last, 0)
    assert output - 0.1 < after
    assert high < output + 1.5


def test_packing_a_large_weight_in_runs():
    """Runs of block rows, ragged at the end, give what the whole weight gives."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(1030, 1025, generator=generator)
    layout = tetris.BlockLayout.from_dense(weight, (4, 3), 0.8, sweeps=1)
    packed = layout.pack(weight)
    assert torch.equal(packed, layout.pack(weight.clone().requires_grad_()))
    assert torch.equal(layout.unpack(packed), weight * layout.mask())
    assert layout.stored_weights == int(layout.mask().sum()) < layout.stored_values


@pytest.mark.parametrize("groups", [1, 2])
def test_stored_weights_of_a_convolution(groups):
    weight = torch.randn(10, 7, 3, 3, generator=torch.Generator().manual_seed(0))
    layout = tetris.BlockLayout.from_dense(weight, (4, 3), 0.5, groups=groups, sweeps=1)
    assert layout.stored_weights == int(layout.mask().sum()) < layout.stored_values
