"""Changing the stored blocks of a layer: numbers, gradients and optimizer states follow."""

import copy

import pytest
import torch
from torch import nn

import tetris
from tetris import BlockLayout, SparseLinear, relayout

OPTIMIZERS = {
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=0.01),
    "adam": lambda p: torch.optim.AdamW(p, 0.01, amsgrad=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.01, momentum=0.5, centered=True),
}


def layout_of(seed, density=0.4, *, out=22, inputs=19, block=(4, 3), reorder=True):
    generator = torch.Generator().manual_seed(seed)
    order = torch.Generator().manual_seed(7)
    grid = (-(-out // block[0]), -(-inputs // block[1]))
    row_perm = torch.randperm(out, generator=order).int() if reorder else None
    col_perm = torch.randperm(inputs, generator=order).int() if reorder else None
    mask = torch.rand(grid, generator=generator) < density
    return BlockLayout.from_block_mask(mask, block, out, inputs, row_perm, col_perm)


def sparse_of(layout, dtype=torch.float64):
    torch.manual_seed(0)
    return SparseLinear(layout.in_features, layout.out_features, layout=layout, dtype=dtype)


def steps(module, optimizer, count, masked=None):
    """Train on fixed data; a dense module is held to a mask as the masked pruner does."""
    generator = torch.Generator().manual_seed(3)
    for _ in range(count):
        x = torch.randn(5, 19, generator=generator, dtype=torch.float64)
        optimizer.zero_grad()
        loss = module(x).square().mean()  # stays alive over the next change
        loss.backward()
        if masked is not None:
            module.weight.grad.mul_(masked)
        optimizer.step()
        if masked is not None:
            with torch.no_grad():
                module.weight.mul_(masked)
    return loss


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_training_goes_on_as_if_masked(optimizer):
    """Blocks go, come back at zero with fresh states, and the rest never notices."""
    layouts = [layout_of(0, 0.6), layout_of(1, 0.5), layout_of(2, 0.3)]
    module = sparse_of(layouts[0])
    dense = module.to_dense()
    optimizers = [OPTIMIZERS[optimizer](m.parameters()) for m in (module, dense)]
    values = module.values
    loss = None
    for layout in layouts:
        kept = module.layout.mask() & layout.mask()
        relayout(module, layout, optimizers=optimizers[0])
        with torch.no_grad():
            dense.weight.mul_(kept)
            for state in optimizers[1].state.get(dense.weight, {}).values():
                if state.dim():
                    state.mul_(kept)
        loss = steps(module, optimizers[0], 3)
        steps(dense, optimizers[1], 3, layout.mask())
        torch.testing.assert_close(module.to_dense().weight, dense.weight, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(module.bias, dense.bias, rtol=1e-10, atol=1e-12)
    assert loss is not None
    assert module.values is values
    assert module.layout == layouts[-1]


def test_gradients_move_and_fill_reaches_new_blocks_only():
    old, new = layout_of(0), layout_of(1)
    module = sparse_of(old)
    module(torch.randn(4, 19, dtype=torch.float64)).sum().backward()
    weight, grad = old.unpack(module.values.detach()), old.unpack(module.values.grad)
    fill = torch.randn(22, 19, dtype=torch.float64)
    relayout(module, new, fill=new.pack(fill))
    common = old.mask() & new.mask()
    added = new.mask() & ~old.mask()
    assert common.any()
    assert added.any()
    expected = torch.where(common, weight, torch.where(added, fill, 0.0))
    assert torch.equal(new.unpack(module.values.detach()), expected)
    assert torch.equal(new.unpack(module.values.grad), grad * common)


@pytest.mark.parametrize(("before", "after"), [(0.0, 0.5), (0.5, 0.0), (1.0, 0.2), (0.3, 1.0)])
def test_from_nothing_to_nothing_and_everything(before, after):
    old, new = layout_of(0, before), layout_of(1, after)
    module = sparse_of(old)
    weight = old.unpack(module.values.detach())
    relayout(module, new)
    assert torch.equal(new.unpack(module.values.detach()), weight * new.mask())
    assert torch.equal(module.row_ptr, new.row_ptr)
    assert torch.equal(module.col_idx, new.col_idx)
    x = torch.randn(3, 19, dtype=torch.float64)
    torch.testing.assert_close(module(x), module.to_dense()(x))
    module(x).sum().backward()


def test_a_state_of_other_blocks_loads_while_a_loss_is_alive():
    module, other = sparse_of(layout_of(0)), sparse_of(layout_of(1))
    x = torch.randn(4, 19, dtype=torch.float64)
    loss = module(x).sum()
    loss.backward()
    module.load_state_dict(other.state_dict())
    module(x).sum().backward()
    assert module.values.grad.shape == other.values.shape
    del loss


def test_hooks_of_the_parameter_survive():
    module, seen = sparse_of(layout_of(0)), []
    module.values.register_post_accumulate_grad_hook(lambda p: seen.append(p.grad.shape))
    loss = module(torch.randn(4, 19, dtype=torch.float64)).sum()
    loss.backward()
    relayout(module, layout_of(1))
    module(torch.randn(4, 19, dtype=torch.float64)).sum().backward()
    assert seen == [(layout_of(i).nnz_blocks, 3, 4) for i in (0, 1)]


def test_memory_is_that_of_the_stored_blocks():
    """One block in a thousand of a matrix of 4 GiB."""
    size, block = 32768, (16, 16)
    groups = size // block[0]

    def layout(shift):
        columns = torch.stack([torch.arange(groups), (torch.arange(groups) + shift) % groups])
        index = columns.sort(0).values.t().flatten().int()
        row_ptr = torch.arange(0, 2 * groups + 1, 2).int()
        return BlockLayout(block, size, size, row_ptr, index)

    module = SparseLinear(size, size, bias=False, layout=layout(1))
    optimizer = torch.optim.Adam(module.parameters())
    module.values.grad = torch.ones_like(module.values)
    optimizer.step()
    largest = _largest_tensor(lambda: relayout(module, layout(5), optimizers=optimizer))
    assert largest <= module.values.numel()
    assert optimizer.state[module.values]["exp_avg"].count_nonzero() == module.values.numel() // 2


def _largest_tensor(call):
    from torch.utils._python_dispatch import TorchDispatchMode

    class Largest(TorchDispatchMode):
        numel = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, (list, tuple)) else [out]:
                if isinstance(tensor, torch.Tensor):
                    self.numel = max(self.numel, tensor.numel())
            return out

    with Largest() as seen:
        call()
    assert seen.numel > 0
    return seen.numel


def test_what_cannot_follow_is_refused_and_nothing_changes():
    layout = layout_of(0)
    module = sparse_of(layout, torch.float32)
    before = copy.deepcopy(module.state_dict())
    other = layout_of(1)
    factored = torch.optim.Adafactor(module.parameters())
    module(torch.randn(3, 19)).sum().backward()
    factored.step()
    before = copy.deepcopy(module.state_dict())
    with pytest.raises(ValueError, match=r"Adafactor keeps 'row_var'.*cannot follow blocks"):
        relayout(module, other, optimizers=[factored])
    with pytest.raises(ValueError, match="layer's row_perm"):
        relayout(module, layout_of(1, reorder=False))
    with pytest.raises(
        ValueError, match=r"layer's block \(got \(2, 3\) and the layer has \(4, 3\)"
    ):
        relayout(module, layout_of(1, block=(2, 3)))
    with pytest.raises(ValueError, match=r"fill must be \[nnzb, bi, bo\]"):
        relayout(module, other, fill=torch.zeros(22, 19))
    with pytest.raises(TypeError, match="must be a BlockLayout"):
        relayout(module, other.mask())
    with pytest.raises(TypeError, match="with values and a layout"):
        relayout(nn.Linear(19, 22), other)
    with pytest.raises(TypeError, match=r"optimizers must be torch.optim.Optimizer"):
        relayout(module, other, optimizers=module.parameters())
    assert all(torch.equal(v, before[k]) for k, v in module.state_dict().items())
    assert module.layout == layout


def test_lbfgs_is_refused_wherever_its_state_is():
    """It keeps everything under its first parameter, which is not the values here."""
    module, first = sparse_of(layout_of(0)), nn.Linear(19, 19).double()
    optimizer = torch.optim.LBFGS([*first.parameters(), *module.parameters()], max_iter=2)

    def loss():
        optimizer.zero_grad()
        value = module(first(torch.ones(2, 19, dtype=torch.float64))).square().mean()
        value.backward()
        return value

    optimizer.step(loss)
    assert module.values not in optimizer.state
    with pytest.raises(ValueError, match="relayout: LBFGS keeps vectors over all its parameters"):
        relayout(module, layout_of(1), optimizers=optimizer)
    assert module.layout == layout_of(0)
    relayout(module, layout_of(1), optimizers=torch.optim.LBFGS(first.parameters()))


@pytest.mark.parametrize(
    "container", [list, tuple, lambda t: {"last": t[0]}], ids=["list", "tuple", "dict"]
)
def test_states_within_containers_are_refused_unless_scalars(container):
    module = sparse_of(layout_of(0))
    optimizer = torch.optim.SGD(module.parameters(), 0.1)
    optimizer.state[module.values]["steps"] = container([torch.tensor(3.0)])
    relayout(module, layout_of(1), optimizers=optimizer)
    optimizer.state[module.values]["past"] = container([torch.zeros_like(module.values)])
    with pytest.raises(ValueError, match=r"SGD keeps 'past' of shape .* in a .*cannot follow"):
        relayout(module, layout_of(2), optimizers=optimizer)
    assert module.layout == layout_of(1)


def test_an_optimizer_of_other_parameters_is_left_alone():
    module = sparse_of(layout_of(0))
    other = nn.Linear(3, 3)
    optimizer = torch.optim.Adam(other.parameters())
    other(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    before = copy.deepcopy(optimizer.state_dict())
    tetris.relayout(module, layout_of(1), optimizers=optimizer)
    after = optimizer.state_dict()
    assert str(after) == str(before)
