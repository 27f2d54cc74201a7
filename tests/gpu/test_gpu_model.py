"""Modules and whole models on CUDA: types, states, sparsify, training."""

import copy

import pytest
import torch
from torch import nn

import tetris
from support import DEVICE, EMULATED

FAST = {"sweeps": 1}
pytestmark = pytest.mark.skipif(EMULATED, reason="needs CUDA tensors")


def dense(dtype=torch.float32):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(128, 256), nn.GELU(), nn.Linear(256, 64))
    return model.to(DEVICE, dtype)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_sparsify_on_the_device(dtype):
    model = dense(dtype)
    sparse = tetris.sparsify(model, sparsity=0.5, block=(16, 16), **FAST)
    for layer in (sparse[0], sparse[2]):
        assert {t.device.type for t in layer.state_dict().values() if t is not None} <= {
            "cuda", "cpu"
        }  # fmt: skip
        assert layer.values.device == layer.row_ptr.device == model[0].weight.device
        assert layer.values.dtype == dtype
    x = torch.randn(9, 128, device=DEVICE, dtype=dtype)
    want = tetris.densify(sparse)(x)
    torch.testing.assert_close(sparse(x), want, rtol=2e-2, atol=2e-2)


def test_the_layout_is_that_of_the_cpu():
    model = dense()
    here = tetris.sparsify(model, sparsity=0.7, block=(8, 4), **FAST)
    there = tetris.sparsify(copy.deepcopy(model).cpu(), sparsity=0.7, block=(8, 4), **FAST)
    assert here[0].layout == there[0].layout
    assert torch.equal(here[0].values.cpu(), there[0].values)


def test_to_moves_everything():
    layer = tetris.sparsify(dense().cpu(), sparsity=0.5, block=(16, 16), **FAST)
    moved = copy.deepcopy(layer).to(device=DEVICE, dtype=torch.bfloat16)
    assert moved[0].values.dtype == torch.bfloat16
    assert moved[0].row_ptr.dtype == torch.int32
    x = torch.randn(5, 128)
    got = moved(x.to(DEVICE, torch.bfloat16)).cpu().float()
    torch.testing.assert_close(got, layer(x), rtol=5e-2, atol=5e-2)


def test_made_on_the_device():
    layout = tetris.sparsify(dense(), sparsity=0.5, block=(16, 16), **FAST)[0].layout
    layer = tetris.SparseLinear(128, 256, layout=layout, device=DEVICE, dtype=torch.float16)
    assert layer(torch.randn(3, 128, device=DEVICE, dtype=torch.float16)).shape == (3, 256)


def test_states_travel():
    first = tetris.sparsify(dense(torch.bfloat16), sparsity=0.5, block=(16, 16), **FAST)
    second = tetris.sparsify(dense().cpu(), sparsity=0.8, block=(8, 1), **FAST)
    second.load_state_dict(first.state_dict())
    x = torch.randn(4, 128)
    want = first(x.to(DEVICE, torch.bfloat16)).cpu().float()
    torch.testing.assert_close(second(x), want, rtol=5e-2, atol=5e-2)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_training_reduces_the_loss(dtype):
    model = tetris.sparsify(dense(dtype), sparsity=0.5, block=(16, 16), **FAST)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    x = torch.randn(256, 128, device=DEVICE, dtype=dtype)
    y = torch.randn(256, 64, device=DEVICE, dtype=dtype)
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        loss = nn.functional.mse_loss(model(x).float(), y.float())
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.9 * losses[0]


def test_pruning_on_the_device():
    model = dense()
    pruner = tetris.prune.TetrisPruner(model, sparsity=0.5, block=(16, 16), **FAST)
    sparse = pruner.finalize()
    x = torch.randn(9, 128, device=DEVICE)
    torch.testing.assert_close(sparse(x), pruner.model(x), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d])
@pytest.mark.parametrize("channels_last", [False, True])
def test_convolutions(kind, channels_last):
    torch.manual_seed(0)
    layer = kind(32, 64, 3, padding=1).to(DEVICE, torch.float16)
    sparse = tetris.sparsify(layer, sparsity=0.5, block=(16, 16), **FAST)
    x = torch.randn(2, 32, 9, 8, device=DEVICE, dtype=torch.float16)
    if channels_last:
        x = x.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(sparse(x), tetris.densify(sparse)(x), rtol=2e-2, atol=2e-2)


def test_info_names_the_gpu():
    info = tetris.info()
    assert info.cuda
    # Of a build for this GPU alone, too; PTX is there for newer ones.
    major, minor = torch.cuda.get_device_capability()
    assert {f"sm_{major}{minor}", "compute_80"} & set(info.cuda_targets)
    assert torch.cuda.get_device_name() in info.gpu


def test_tune(tmp_path, monkeypatch):
    from tetris import tune, tuning

    monkeypatch.setenv("TETRIS_CACHE_DIR", str(tmp_path))
    problem = tune.Problem(256, 256, 256, (64, 16), 0.5, "bfloat16")
    paths = tune.run([problem], training=True)
    device, measured = tuning.read(tmp_path / paths[0])
    assert device == torch.cuda.get_device_name()
    assert len(measured) == 3
    assert all(m.seconds <= m.guess_seconds for m in measured.values())
    forward = tune.calls(problem, "cuda", training=False)["forward"]
    forward()
    best = next(m.config for key, m in measured.items() if key.startswith("product")
                and "transposed" not in key)  # fmt: skip
    kind = {"simt": "simt", "skinny": "skinny", "mma": "sm80", "hopper": "sm90"}[best.split()[0]]
    assert tetris._C.last_kernel().endswith(kind)
    tetris._C.cuda_set_measured(device, {})
    tuning.loaded.pop(device)
