"""Training on stored blocks on the device: what masks give, while blocks go, return and move."""

import pytest
import torch
from torch import nn

import tetris
from support import DEVICE
from tetris.nn.base import SparseLayer
from tetris.prune import Cubic, Regrow, TetrisPruner

CHANGES = {
    "regrown": {"schedule": Cubic(0, 5, every=2), "regrow": Regrow(0.4, every=2)},
    "searched": {"schedule": Cubic(0, 5, every=2), "search_at": (3,)},
}


def matrices(block):
    rows, columns = block
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4 * columns, 6 * rows), nn.ReLU(),
                          nn.Linear(6 * rows, 4 * rows), nn.ReLU())  # fmt: skip
    model.add_module("last", nn.Linear(4 * rows, 3))
    return model


def images(block):
    rows, columns = block
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8 * columns, 1), nn.ReLU(),
                          nn.Conv2d(8 * columns, 4 * rows, 3, 2, 1), nn.ReLU(),
                          nn.ConvTranspose2d(4 * rows, 3 * rows, 2, 2), nn.ReLU())  # fmt: skip
    model.add_module("last", nn.Conv2d(3 * rows, 2, 1))
    return model


def batch(model, seed):
    convolution = isinstance(model[0], nn.Conv2d)
    shape = (2, 3, 5, 4) if convolution else (8, model[0].in_features)
    like = next(model.parameters())
    x = torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return x.to(DEVICE, like.dtype)


def trained(model, execution, block, steps=7, **arguments):
    """A pruner that has trained a model, its optimizer, the losses."""
    optimizer = torch.optim.AdamW(model.parameters(), 0.01)
    pruner = TetrisPruner(
        model, sparsity=0.6, block=block, sweeps=1, exclude="last", execution=execution,
        optimizers=optimizer, **arguments,
    )  # fmt: skip
    losses = []
    for seed in range(steps):
        optimizer.zero_grad()
        loss = model(batch(model, seed)).square().mean()
        loss.backward()
        optimizer.step()
        pruner.step()
        losses.append(loss.item())
    return pruner, optimizer, losses


@pytest.mark.parametrize("make", [matrices, images])
@pytest.mark.parametrize("change", CHANGES)
def test_stored_blocks_train_as_masks_do(make, change):
    """In float64, where no order of a sum decides between two blocks."""
    block = (4, 2)
    results = []
    for execution in ("masked", "sparse"):
        model = make(block).to(DEVICE, torch.float64)
        pruner, _, losses = trained(model, execution, block, **CHANGES[change])
        results.append((pruner.layouts(), losses, pruner))
    (layouts, losses, masked), (same, stored, sparse) = results
    assert layouts == same
    assert stored == pytest.approx(losses, rel=1e-9)

    assert len(layouts) == 2
    assert all(isinstance(sparse.model.get_submodule(name), SparseLayer) for name in layouts)
    x = batch(masked.model, 99)
    want = masked.model(x)
    for y in (sparse.model(x), sparse.finalize()(x), masked.finalize()(x)):
        torch.testing.assert_close(y, want, rtol=1e-8, atol=1e-10)
    for a, b in zip(sparse.remove().parameters(), masked.remove().parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize(
    "dtype", [torch.float32, pytest.param(torch.bfloat16, marks=pytest.mark.hardware)]
)
def test_states_are_of_what_is_stored(dtype):
    """On tensor cores: numbers and their moments stay on the device, of the same size."""
    torch.backends.cuda.matmul.allow_tf32 = True
    block = (64, 16)
    model = matrices(block).to(DEVICE, dtype)
    before = batch(model, 0)
    pruner, optimizer, losses = trained(model, "sparse", block, steps=9, **CHANGES["regrown"])
    assert pruner.sparsity == pytest.approx(0.6, abs=0.03)
    assert sum(losses[-3:]) < sum(losses[:3])
    for name, layout in pruner.layouts().items():
        values = model.get_submodule(name).values
        assert values.device.type == DEVICE
        assert values.shape[0] == layout.nnz_blocks
        for state in ("exp_avg", "exp_avg_sq"):
            assert optimizer.state[values][state].shape == values.shape
            assert optimizer.state[values][state].device == values.device
    sparse = pruner.finalize()
    want = tetris.densify(sparse)(before)
    torch.testing.assert_close(sparse(before), want, rtol=2e-2, atol=2e-2)
