"""VR-PGE: estimator, projection, sampled layers against masked dense ones, and the whole life."""

import copy
import itertools

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import nn

from tetris.nn.base import SparseLayer
from tetris.prune import SharedOrder, Taylor, VRPGEPruner
from tetris.prune.tree import select_layers
from tetris.prune.vrpge.gates import Budget, Gates, estimate, project

# -- estimator ------------------------------------------------------------------------------------

S = torch.tensor([0.2, 0.5, 0.7, 0.9], dtype=torch.float64)
MASKS = torch.tensor(list(itertools.product([0.0, 1.0], repeat=4)), dtype=torch.float64)


def toy_loss(m):
    """Not linear, so that gates interact."""
    target = torch.tensor([1.0, -2.0, 0.5, 1.5], dtype=torch.float64)
    return ((m * target).sum(-1) - 1.0) ** 2 + 0.3 * m[..., 0] * m[..., 3]


def expected_loss(s):
    chance = (MASKS * s + (1 - MASKS) * (1 - s)).prod(1)
    return (chance * toy_loss(MASKS)).sum()


def estimates(samples, count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    gates = Gates(S, torch.ones(4, dtype=torch.float64), ())
    result = []
    for _ in range(count):
        masks = gates.draw(samples, generator)
        result.append(estimate(toy_loss(masks.double()), masks, S))
    return torch.stack(result)


@pytest.mark.parametrize("samples", [2, 3, 4])
def test_mean_of_the_estimate_is_the_scaled_gradient(samples):
    s = S.clone().requires_grad_()
    expected_loss(s).backward()
    want = (S * (1 - S)).sqrt() * s.grad
    found = estimates(samples, 20_000)
    error = found.std(0) / len(found) ** 0.5
    assert ((found.mean(0) - want).abs() < 3 * error).all()


def test_variance_of_the_estimate_is_that_of_enumeration():
    """For two samples all pairs of masks can be weighed; the score estimator is far above."""
    chance = (MASKS * S + (1 - MASKS) * (1 - S)).prod(1)
    z = (MASKS - S) / (S * (1 - S)).sqrt()
    loss = toy_loss(MASKS)
    pairs = 0.5 * (loss[:, None] - loss)[..., None] * (z[:, None] - z)
    weight = (chance[:, None] * chance)[..., None]
    mean = (weight * pairs).sum((0, 1))
    variance = (weight * pairs**2).sum((0, 1)) - mean**2
    found = estimates(2, 20_000)
    torch.testing.assert_close(found.var(0), variance, rtol=0.1, atol=0)
    score = loss[:, None] * (MASKS - S) / (S * (1 - S))  # L * grad log p, one sample
    score_mean = (chance[:, None] * score).sum(0)
    score_variance = (chance[:, None] * score**2).sum(0) - score_mean**2
    assert variance.sum() < score_variance.sum() / 3


def test_gates_at_their_bounds_have_no_gradient_and_settle_masks():
    s = torch.tensor([0.0, 1.0, 0.5], dtype=torch.float64)
    masks = Gates(s, torch.ones(3), ()).draw(1000, torch.Generator().manual_seed(0))
    assert not masks[:, 0].any()
    assert masks[:, 1].all()
    assert 400 < masks[:, 2].sum() < 600
    g = estimate(torch.tensor([1.0, 2.0], dtype=torch.float64), masks[:2], s)
    assert g[0] == 0.0
    assert g[1] == 0.0
    assert g.isfinite().all()


# -- projection -----------------------------------------------------------------------------------

NUMBERS = st.floats(-2.0, 3.0)
COSTS = st.floats(0.1, 10.0)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(NUMBERS, COSTS), min_size=1, max_size=40), st.floats(0.01, 1.0))
def test_projection_never_exceeds_its_budget_and_is_the_nearest_point(pairs, share):
    s, cost = torch.tensor(pairs, dtype=torch.float64).T.contiguous()
    budget = share * float(cost.sum())
    found = project(s, cost, budget)
    spent = float(torch.dot(found, cost))
    assert spent <= budget
    assert found.min() >= 0.0
    assert found.max() <= 1.0
    assert torch.equal(project(found, cost, budget), found)  # it is a projection
    # The optimality conditions: one v >= 0 explains all of it, and is 0 where the budget is left.
    clipped = s.clamp(0.0, 1.0)
    if float(torch.dot(clipped, cost)) <= budget:
        assert torch.equal(found, clipped)
        return
    assert spent >= budget * (1 - 1e-11)
    free = (found > 1e-9) & (found < 1 - 1e-9)
    v = ((s - found) / cost)[free]
    if len(v):
        assert v.min() >= -1e-9
        torch.testing.assert_close(v, v.mean().expand(len(v)), rtol=1e-6, atol=1e-8)
        torch.testing.assert_close(found, (s - v.mean() * cost).clamp(0, 1), rtol=0, atol=1e-6)


@pytest.mark.parametrize("seed", range(5))
def test_projection_is_what_scipy_finds(seed):
    generator = np.random.default_rng(seed)
    s, cost = generator.normal(0.5, 0.7, 6), generator.uniform(0.5, 3.0, 6)
    budget = 0.3 * cost.sum()
    want = minimize(
        lambda x: ((x - s) ** 2).sum(),
        np.full(6, 0.3),
        bounds=[(0.0, 1.0)] * 6,
        constraints={"type": "ineq", "fun": lambda x: budget - cost @ x},
        options={"ftol": 1e-14, "maxiter": 500},
    ).x
    found = project(torch.from_numpy(s), torch.from_numpy(cost), budget)
    np.testing.assert_allclose(found.numpy(), want, atol=1e-5)


def test_projection_with_bounds_of_its_own():
    s = torch.tensor([-1.0, 2.0, 0.5, 0.5], dtype=torch.float64)
    found = project(s, torch.ones(4, dtype=torch.float64), 1.2, 1e-3, 1 - 1e-3)
    torch.testing.assert_close(
        found, torch.tensor([0.001, 0.999, 0.1, 0.1], dtype=torch.float64), rtol=0, atol=1e-9
    )


def test_budgets_of_their_own_and_the_floor():
    s = torch.tensor([0.9, 0.8, 0.7, 0.1, 0.2, 0.3], dtype=torch.float64)
    budgets = (Budget(slice(0, 3), 1.0), Budget(torch.arange(3, 6), 2.0))
    gates = Gates(s.clone(), torch.ones(6, dtype=torch.float64), budgets)
    gates.project()
    assert gates.s[:3].sum() <= 1.0
    assert torch.equal(gates.s[3:], s[3:])
    worth = torch.zeros(6)
    assert gates.top(worth).tolist() == [True, False, False, False, True, True]
    # Two block rows of three gates under one budget: without a floor the second loses all.
    one = Gates(s, torch.ones(6, dtype=torch.float64), (Budget(slice(None), 3.0),))
    assert one.top(worth).tolist() == [True] * 3 + [False] * 3
    assert one.top(worth, [(slice(0, 6), 2)]).tolist() == [True, True, False, False, False, True]


def test_equal_gates_are_ranked_by_worth():
    gates = Gates(torch.zeros(4, dtype=torch.float64), torch.ones(4), (Budget(slice(None), 2.0),))
    assert gates.top(torch.tensor([1.0, 4.0, 2.0, 3.0])).tolist() == [False, True, False, True]


# -- layers ---------------------------------------------------------------------------------------


def networks():
    torch.manual_seed(0)
    relu, flatten = nn.ReLU(), nn.Flatten()
    yield "linear", nn.Sequential(nn.Linear(30, 22), relu, nn.Linear(22, 5)), (7, 30), (4, 8)
    conv = nn.Conv2d(6, 10, 3, padding=1, stride=2)
    yield "conv", nn.Sequential(conv, relu, flatten, nn.Linear(160, 5)), (3, 6, 8, 8), (4, 4)
    conv = nn.Conv2d(8, 12, 3, groups=2, bias=False)
    yield "groups", nn.Sequential(conv, relu, flatten, nn.Linear(192, 5)), (3, 8, 6, 6), (4, 3)
    conv = nn.ConvTranspose2d(6, 10, 3, stride=2)
    yield "transposed", nn.Sequential(conv, relu, flatten, nn.Linear(810, 5)), (2, 6, 4, 4), (4, 4)
    conv = nn.Conv1d(6, 10, 3)
    yield "conv1d", nn.Sequential(conv, relu, flatten, nn.Linear(60, 5)), (2, 6, 8), (4, 2)


NETWORKS = {name: rest for name, *rest in networks()}


def make(name, optimizer=torch.optim.SGD, **arguments):
    """(model, x, target, optimizer, pruner), in float64."""
    model, shape, block = NETWORKS[name]
    model = copy.deepcopy(model).double()
    torch.manual_seed(1)
    x, target = torch.randn(shape, dtype=torch.float64), torch.randint(0, 5, shape[:1])
    settings = {"lr": 0.05} | ({"momentum": 0.9} if optimizer is torch.optim.SGD else {})
    made = optimizer(model.parameters(), **settings)
    arguments = {"sparsity": 0.5, "block": block, "include": "0", "sweeps": 3} | arguments
    return model, x, target, made, VRPGEPruner(model, optimizers=made, **arguments)


def train(model, x, target, optimizer, pruner, steps):
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        losses.append(pruner.backward(lambda: F.cross_entropy(model(x), target)))
        optimizer.step()
        pruner.step()
    return torch.stack(losses)


def masks_of_next_step(pruner):
    """What the next backward() will draw, found without disturbing it."""
    generator = torch.Generator()
    generator.set_state(pruner.generator.get_state())
    return pruner.gates.draw(pruner.samples, generator)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(
    "arguments", [{}, {"atom": "channel"}, {"tie_kernel": True}, {"samples": 3}]
)
def test_a_step_is_that_of_masked_dense_layers(name, arguments):
    model, x, target, _, pruner = make(name, lazy=False, clip=None, **arguments)
    layer = pruner.sampled["0"]
    part = pruner._top.parts["0"]
    masks = masks_of_next_step(pruner)
    dense = copy.deepcopy(NETWORKS[name][0]).double()
    losses = []
    for mask in masks:
        kept = layer.whole.with_blocks(part.blocks(mask).view(layer.whole.block_grid))
        elements = type_of(layer).oriented(kept.mask(), kept.groups)
        weight = torch.where(elements, dense[0].weight, 0.0)
        masked = torch.func.functional_call(dense, {"0.weight": weight}, (x,))
        losses.append(F.cross_entropy(masked, target))
    torch.stack(losses).mean().backward()
    loss = pruner.backward(lambda: F.cross_entropy(model(x), target))
    torch.testing.assert_close(loss, torch.stack(losses).mean().detach())
    packed = layer.whole.pack(type_of(layer).oriented(dense[0].weight.grad, layer.whole.groups))
    torch.testing.assert_close(layer.weight.grad, packed)
    others = [p for n, p in model.named_parameters() if n != "0.weight"]
    for own, want in zip(
        others, [p for n, p in dense.named_parameters() if n != "0.weight"], strict=True
    ):
        torch.testing.assert_close(own.grad, want.grad)
    want = estimate(torch.stack(losses).detach(), masks, pruner.gates.s)
    torch.testing.assert_close(pruner.gates.s.grad, want)


def type_of(layer):
    return type(layer._runner[0])


@pytest.mark.parametrize("name", ["linear", "conv"])
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW, torch.optim.Adagrad])
def test_lazy_optimizers_leave_other_blocks_alone(name, optimizer):
    model, x, target, made, pruner = make(name, optimizer, sparsity=0.75)
    layer, part = pruner.sampled["0"], pruner._top.parts["0"]
    for _ in range(4):
        drawn = part.blocks(masks_of_next_step(pruner).any(0))
        before = layer.weight.detach().clone()
        states = {
            k: v.clone()
            for k, v in made.state.get(layer.weight, {}).items()
            if v is not None and v.shape == layer.weight.shape
        }
        train(model, x, target, made, pruner, 1)
        assert 0 < drawn.sum() < len(drawn)
        assert torch.equal(layer.weight[~drawn], before[~drawn])
        assert not torch.equal(layer.weight[drawn], before[drawn])
        for key, state in states.items():
            assert torch.equal(made.state[layer.weight][key][~drawn], state[~drawn])
    shaped = [s for s in made.state[layer.weight].values() if s is not None and s.dim()]
    assert all(s.shape == layer.weight.shape for s in shaped)
    assert shaped


def test_lazy_and_dense_optimizers_agree_where_absent_blocks_do_not_move():
    """Adagrad does not move a weight without a gradient."""
    ends = []
    for lazy in (True, False):
        model, x, target, made, pruner = make("linear", torch.optim.Adagrad, lazy=lazy)
        train(model, x, target, made, pruner, 10)
        ends.append((pruner.sampled["0"].weight.detach().clone(), pruner.gates.s.clone()))
    torch.testing.assert_close(ends[0], ends[1])


def test_the_joint_norm_is_clipped():
    model, x, target, _, pruner = make("linear", clip=0.01)
    pruner.backward(lambda: 100 * F.cross_entropy(model(x), target))
    grads = [*(p.grad for p in model.parameters()), pruner.gates.s.grad]
    norm = torch.stack([g.double().norm() for g in grads]).norm()
    torch.testing.assert_close(norm, torch.tensor(0.01, dtype=torch.float64), rtol=1e-3, atol=0)


@pytest.mark.parametrize("lazy", [True, False])
def test_gradients_do_not_add_up_over_steps(lazy):
    model, x, target, made, pruner = make("linear", lazy=lazy)
    train(model, x, target, made, pruner, 1)
    with pytest.raises(RuntimeError, match=r"has a gradient already.*call optimizer.zero_grad"):
        pruner.backward(lambda: F.cross_entropy(model(x), target))
    made.zero_grad(set_to_none=False)
    pruner.backward(lambda: F.cross_entropy(model(x), target))


def test_only_gradients_that_learn_count():
    model, x, target, _, pruner = make("linear", clip=0.01)
    frozen = model[2].bias.requires_grad_(False)
    frozen.grad = torch.full_like(frozen, 7.0)
    pruner.backward(lambda: 100 * F.cross_entropy(model(x), target))
    assert (frozen.grad == 7.0).all()


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("to_none", [True, False])
def test_a_failing_second_mask_leaves_no_gradient(lazy, to_none):
    model, x, target, made, pruner = make("linear", lazy=lazy)
    train(model, x, target, made, pruner, 1)
    made.zero_grad(to_none)
    before = copy.deepcopy(model.state_dict())
    calls = []

    def closure():
        calls.append(None)
        if len(calls) == 2:
            raise KeyError("the second")
        return F.cross_entropy(model(x), target)

    with pytest.raises(KeyError, match="the second"):
        pruner.backward(closure)
    assert pruner.gates.s.grad is None
    assert not any(p.grad is not None and p.grad.any() for p in model.parameters())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    pruner.backward(lambda: F.cross_entropy(model(x), target))


def test_dropout_is_the_same_for_all_samples():
    model, x, target, _, pruner = make("linear")
    model.insert(1, nn.Dropout(0.5))
    seen = []
    pruner.backward(lambda: seen.append(torch.rand(3)) or F.cross_entropy(model(x), target))
    assert torch.equal(seen[0], seen[1])


def test_batch_norm_sees_every_mask_and_update_bn_measures_the_final_one():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 5))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = VRPGEPruner(
        model, sparsity=0.5, block=(4, 4), include="0", optimizers=optimizer, sweeps=1
    )
    x, target = torch.randn(32, 16), torch.randint(0, 5, (32,))
    train(model, x, target, optimizer, pruner, 5)
    assert model[1].num_batches_tracked == 5 * pruner.samples
    pruner.prune()
    torch.optim.swa_utils.update_bn([x], model)
    torch.testing.assert_close(model[1].running_mean, model[0](x).mean(0).detach())


# -- its life -------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["sparse", "masked"])
@pytest.mark.parametrize("name", NETWORKS)
def test_from_sampling_to_a_sparse_model(name, execution):
    model, x, target, made, pruner = make(name, execution=execution)
    budget = pruner.gates.budgets[0]
    for _ in range(15):
        losses = train(model, x, target, made, pruner, 1)
        assert float(torch.dot(pruner.gates.s, pruner.gates.cost)) <= budget.amount
    assert losses.isfinite().all()
    planned = pruner.layouts()
    model.eval()
    out = model(x)
    assert torch.equal(out, model(x))  # nothing is drawn
    torch.testing.assert_close(copy.deepcopy(model)(x), out, rtol=0, atol=0)
    pruner.prune()
    torch.testing.assert_close(model(x), out)
    assert pruner.layouts() == planned
    assert pruner.sparsity == pytest.approx(0.5, abs=0.03)
    model.train()
    for _ in range(5):
        made.zero_grad()
        F.cross_entropy(model(x), target).backward()
        made.step()
        pruner.step()
    sparse = pruner.finalize()
    assert isinstance(sparse[0], SparseLayer)
    want = model(x).detach()
    assert float((sparse(x).detach() - want).abs().max() / want.abs().max()) < 1e-5
    assert "removed" in str(pruner.report())
    pruner.remove()
    assert type(model[0]) is type(NETWORKS[name][0][0])
    torch.testing.assert_close(model(x), want)


def unattached(**arguments):
    """As make(), with an optimizer that the pruner does not know."""
    model, x, target, made, pruner = make("linear", lazy=False, **arguments)
    pruner._optimizers = ()
    train(model, x, target, made, pruner, 3)
    return model, x, target, made, pruner


@pytest.mark.parametrize("end", ["finalize", "remove"])
def test_masked_fine_tuning_needs_no_optimizer_known(end):
    model, x, target, _, pruner = unattached(execution="masked")
    planned = pruner.layouts()
    pruner.prune()
    assert pruner.layouts() == planned
    fresh = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    for _ in range(3):
        fresh.zero_grad()
        F.cross_entropy(model(x), target).backward()
        fresh.step()
        pruner.step()
    want = model(x).detach()
    torch.testing.assert_close(getattr(pruner, end)()(x).detach(), want)


def test_what_moves_states_asks_for_the_optimizer():
    """The advice to make the pruner with lazy=False would be no help: it has been."""
    model, x, target, made, pruner = unattached(execution="sparse")
    for call in (pruner.refresh, pruner.prune, pruner.remove):
        with pytest.raises(RuntimeError, match=r"call pruner.attach\(optimizer\)$"):
            call()
        assert pruner.sampled
    pruner.attach(made)
    pruner.refresh()
    train(model, x, target, made, pruner, 1)
    pruner.prune()
    assert made.state[model[0].values]["momentum_buffer"].shape == model[0].values.shape
    assert isinstance(pruner.finalize()[0], SparseLayer)


def test_it_learns_which_inputs_matter():
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    target = (x[:, :8].sum(1) > 0).long()  # of eight groups of inputs only the first matters
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 3e-3)
    pruner = VRPGEPruner(
        model,
        sparsity=0.75,
        block=(8, 8),
        include="0",
        reorder="identity",
        optimizers=optimizer,
    )
    start = pruner.probabilities()["0"][:, 0].mean()
    for _ in range(3):
        for part in torch.randperm(512).split(64):
            train(model, x[part], target[part], optimizer, pruner, 5)
    gates = pruner.probabilities()["0"]
    assert gates[:, 0].mean() > start + 0.2
    assert gates[:, 0].mean() > gates[:, 1:].mean() + 0.2


def test_refresh_moves_gates_with_their_weights():
    model, x, target, made, pruner = make("linear", sparsity=0.7, sweeps=5)
    train(model, x, target, made, pruner, 10)
    layer = pruner.sampled["0"]
    weight = layer.whole.unpack(layer.weight.detach())
    momentum = layer.whole.unpack(made.state[layer.weight]["momentum_buffer"])
    s = pruner.probabilities()["0"]
    pruner.refresh()
    after = pruner.sampled["0"]
    assert after.whole != layer.whole
    torch.testing.assert_close(after.whole.unpack(after.weight.detach()), weight)
    moved = made.state[after.weight]["momentum_buffer"]
    torch.testing.assert_close(after.whole.unpack(moved), momentum)
    # Of 24 x 32 entries 22 x 30 are weights; the others stay at the end, and count.
    entries = torch.empty(24, 32, dtype=torch.float64)
    rows, columns = slots(layer.whole)
    entries[rows[:, None], columns] = s.repeat_interleave(4, 0).repeat_interleave(8, 1)
    rows, columns = slots(after.whole)
    want = entries[rows[:, None], columns].view(6, 4, 4, 8).mean((1, 3))
    torch.testing.assert_close(pruner.probabilities()["0"], want)
    train(model, x, target, made, pruner, 3)


def slots(whole):
    """Which row and column each slot of a 22 x 30 weight in blocks of 4 x 8 holds."""
    return torch.cat([whole.row_perm.long(), torch.arange(22, 24)]), torch.cat(
        [whole.col_perm.long(), torch.arange(30, 32)]
    )


@pytest.mark.parametrize("arguments", [{}, {"tie_kernel": True}, {"atom": "channel"}])
@pytest.mark.parametrize("name", NETWORKS)
def test_refresh_spends_what_was_spent(name, arguments):
    model, x, target, made, pruner = make(name, sweeps=5, gate_lr=0.1, **arguments)
    train(model, x, target, made, pruner, 10)
    whole, s = pruner.sampled["0"].whole, pruner.gates.s.clone()
    assert len(s.unique()) > 2
    pruner.refresh()
    assert pruner.sampled["0"].whole != whole
    assert float(pruner.gates.s.sum()) == pytest.approx(float(s.sum()), rel=1e-9)


def test_refresh_keeps_gates_whose_blocks_stay():
    model, x, target, made, pruner = make("conv", reorder="identity")
    train(model, x, target, made, pruner, 5)
    s = pruner.gates.s.clone()
    state = {k: v.clone() for k, v in pruner.gate_optimizer.state[pruner.gates.s].items()}
    pruner.refresh()
    torch.testing.assert_close(pruner.gates.s, s)
    for key, value in state.items():
        torch.testing.assert_close(pruner.gate_optimizer.state[pruner.gates.s][key], value)


@pytest.mark.parametrize("clamp", [0.0, 0.05])
def test_clamped_gates_can_come_back(clamp):
    """Gates of the only inputs that matter start at the lower bound; at 0 they are stuck."""
    torch.manual_seed(0)
    x = torch.randn(512, 64)
    target = (x[:, :8].sum(1) > 0).long()
    model = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 2))
    optimizer = torch.optim.Adam(model.parameters(), 1e-2)
    pruner = VRPGEPruner(
        model,
        sparsity=0.5,
        block=(8, 8),
        include="0",
        reorder="identity",
        clamp=clamp,
        optimizers=optimizer,
    )
    pruner.gates.s.view(4, 8)[:, 0] = clamp
    for part in torch.randperm(512).split(64) * 15:
        train(model, x[part], target[part], optimizer, pruner, 1)
    gates = pruner.probabilities()["0"]
    assert gates.min() >= clamp
    assert gates.max() <= 1 - clamp
    assert float(gates.sum()) <= pruner.gates.budgets[0].amount
    if clamp:
        assert gates[:, 0].mean() > 3 * clamp
    else:
        assert (gates[:, 0] == 0).all()


def test_the_order_follows_importance_and_may_be_shared():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 16))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    batches = [(torch.randn(8, 16), torch.randint(0, 16, (8,)))]
    pruner = VRPGEPruner(
        model,
        sparsity=0.5,
        block=(4, 4),
        sweeps=2,
        importance=Taylor(batches, F.cross_entropy),
        share=SharedOrder(rows=("0",), cols=("2",)),
        optimizers=optimizer,
    )
    train(model, *batches[0], optimizer, pruner, 3)
    for _ in range(2):
        layouts = pruner.layouts()
        assert torch.equal(layouts["0"].row_perm, layouts["2"].col_perm)
        pruner.refresh()


@pytest.mark.parametrize("arguments", [{}, {"scope": "layer"}, {"sparsity": 0.6, "scope": "layer"}])
def test_budgets_of_layers(arguments):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 16))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = VRPGEPruner(
        model,
        **{"sparsity": 0.5, "block": (4, 4), "sweeps": 1, "optimizers": optimizer} | arguments,
        overrides={"2": {"sparsity": 0.75}},
    )
    gates = pruner.probabilities()
    assert gates["2"].sum() == pytest.approx(8)
    assert gates["0"].sum() == pytest.approx(64 * (1 - arguments.get("sparsity", 0.5)), abs=0.9)
    x, target = torch.randn(16, 32), torch.randint(0, 16, (16,))
    train(model, x, target, optimizer, pruner, 20)
    pruner.prune()
    layouts = pruner.layouts()
    assert layouts["2"].nnz_blocks == 8
    assert layouts["0"].nnz_blocks == 64 - int(64 * arguments.get("sparsity", 0.5))


def test_channels_are_dropped_as_a_whole():
    model, x, target, made, pruner = make("linear", atom="channel", sparsity=0.5)
    assert len(pruner.gates.s) == 6
    train(model, x, target, made, pruner, 5)
    pruner.prune()
    rows = pruner.layouts()["0"].block_mask()
    assert torch.equal(rows.any(1), rows.all(1))
    assert rows.any(1).sum() == 3


# -- checkpoints ----------------------------------------------------------------------------------


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adam])
@pytest.mark.parametrize("name", ["linear", "conv"])
def test_a_checkpoint_resumes_exactly(name, optimizer, tmp_path):
    model, x, target, made, pruner = make(name, optimizer)
    train(model, x, target, made, pruner, 6)
    pruner.refresh()
    saved = {
        "pruner": pruner.state_dict(),
        "model": model.state_dict(),
        "optimizer": made.state_dict(),
    }
    torch.save(saved, tmp_path / "state.pt")
    want = train(model, x, target, made, pruner, 6)
    again, _, _, made2, pruner2 = make(name, optimizer)
    pruner2.generator.manual_seed(3)
    state = torch.load(tmp_path / "state.pt", weights_only=False)
    pruner2.load_state_dict(state["pruner"])
    again.load_state_dict(state["model"])
    made2.load_state_dict(state["optimizer"])
    assert pruner2.steps == 6
    assert torch.equal(train(again, x, target, made2, pruner2, 6), want)
    assert torch.equal(pruner2.gates.s, pruner.gates.s)
    assert pruner2.layouts() == pruner.layouts()


def test_hooks_of_sampled_layers_are_not_lost_without_a_word():
    model, *_, pruner = make("linear")
    sampled = model[0]
    handle = sampled.register_forward_hook(lambda *a: None)
    for call in (pruner.refresh, pruner.prune, pruner.remove):
        with pytest.raises(ValueError, match="layer '0' has forward_hooks, which the layer that"):
            call()
    assert pruner.sampled
    assert model[0] is sampled
    handle.remove()
    pruner.prune()
    assert not pruner.sampled


def test_a_state_holds_no_numbers_of_numpy(tmp_path):
    pruner = make("linear", clamp=np.float64(1e-3), gate_lr=np.float64(0.01))[-1]
    torch.save(pruner.state_dict(), tmp_path / "state.pt")
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    make("linear", clamp=1e-3, gate_lr=0.01)[-1].load_state_dict(state)


def test_a_checkpoint_of_the_fine_tuning_resumes():
    model, x, target, made, pruner = make("linear")
    train(model, x, target, made, pruner, 4)
    sampling = pruner.state_dict()
    weights = copy.deepcopy(model.state_dict())
    pruner.prune()
    again, _, _, _, pruner2 = make("linear")
    pruner2.load_state_dict(pruner.state_dict())
    again.load_state_dict(model.state_dict())
    torch.testing.assert_close(again(x), model(x))
    assert pruner2.layouts() == pruner.layouts()
    # And back: a pruner that has pruned takes the state of one that draws.
    layouts = pruner2.layouts()
    pruner2.load_state_dict(sampling)
    again.load_state_dict(weights)
    assert pruner2.sampled
    assert pruner2.layouts() == layouts


def test_a_state_is_nobody_elses():
    model, x, target, made, pruner = make("linear")
    train(model, x, target, made, pruner, 3)
    state = pruner.state_dict()
    want = copy.deepcopy(state)
    again, _, _, made2, pruner2 = make("linear")
    pruner2.load_state_dict(state)
    train(again, x, target, made2, pruner2, 3)
    train(model, x, target, made, pruner, 3)
    for key in ("gates", "gate_optimizer", "orders"):
        torch.testing.assert_close(state[key], want[key], rtol=0, atol=0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 3}, "samples is 2 in the state and 3 in this pruner.*same samples"),
        ({"clamp": 1e-3}, "clamp is 0.0 in the state and 0.001 in this"),
        ({"atom": "channel"}, "atom is 'block' in the state and 'channel' in this"),
        (
            {"sparsity": 0.75},
            r"budget is \[12.0\] in the state and \[6.0\] .*same sparsity, target",
        ),
    ],
)
def test_a_state_of_other_settings_is_refused(arguments, message):
    *_, pruner = make("linear")
    *_, other = make("linear", **arguments)
    before = other.gates.s.clone()
    with pytest.raises(ValueError, match=message):
        other.load_state_dict(pruner.state_dict())
    assert torch.equal(other.gates.s, before)
    assert other.sampled


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"samples": 1}, "samples must be an int of 2 or more"),
        ({"sparsity": 1.0}, "leaves a budget of 0 of the blocks"),
        ({"sparsity": 1.5}, "sparsity, the share of blocks to remove"),
        ({"atom": "filter"}, "atom must be 'block' or 'channel'"),
        ({"clip": 0.0}, "clip must be positive"),
        ({"clamp": 0.5}, "clamp must be in"),
        ({"sparsity": 0.9, "clamp": 0.2}, "or for clamp=0.2 of each"),
        ({"gate_lr": 0.0}, "gate_lr must be positive"),
        ({"balanced": True}, "which balanced=True forbids"),
        ({"block": (0, 4)}, "block must be two ints"),
        ({"scope": "model"}, "scope must be"),
    ],
)
def test_errors_of_settings(arguments, message):
    with pytest.raises(ValueError, match=message):
        make("linear", **arguments)


@pytest.mark.parametrize(
    ("closure", "kind", "message"),
    [
        (lambda y: 1.0, TypeError, "the closure must return the loss"),
        (lambda y: y.sum(1), ValueError, "the loss must be one number"),
        (lambda y: y.sum().detach(), ValueError, "the loss has no gradient"),
        (lambda y: y.sum() * torch.inf, RuntimeError, "gates cannot learn from it"),
    ],
)
def test_errors_of_closures(closure, kind, message):
    model, x, target, made, pruner = make("linear")
    with pytest.raises(kind, match=message):
        pruner.backward(lambda: closure(model(x)))
    train(model, x, target, made, pruner, 1)  # nothing is half done


def test_errors_of_the_order_of_calls():
    model, x, target, made, pruner = make("linear")

    def loss():
        return F.cross_entropy(model(x), target)

    with pytest.raises(RuntimeError, match="no gradients to learn from"):
        pruner.step()
    assert pruner.steps == 0
    with pytest.raises(RuntimeError, match=r"call prune\(\) first"):
        pruner.finalize()
    model.eval()
    with pytest.raises(RuntimeError, match=r"call model.train\(\)"):
        pruner.backward(loss)
    model.train()
    with pytest.raises(RuntimeError, match="the closure ran no sampled layer"):
        pruner.backward(lambda: model[2](torch.ones(1, 22, dtype=torch.float64)).sum())
    pruner.backward(loss)
    for call in (pruner.state_dict, pruner.prune, pruner.refresh):
        with pytest.raises(RuntimeError, match="a step is under way"):
            call()
    with pytest.raises(RuntimeError, match="after each backward"):
        pruner.backward(loss)
    with pytest.raises(RuntimeError, match=r"run the model after pruner.step\(\)"):
        loss()
    made.step()
    pruner.step()
    pruner.prune()
    for call in (lambda: pruner.backward(loss), pruner.refresh, pruner.prune):
        with pytest.raises(RuntimeError, match=r"fixed since prune\(\)"):
            call()


def test_errors_of_optimizers():
    model, x, target, made, pruner = make("linear")
    pruner._optimizers = ()
    with pytest.raises(RuntimeError, match="or make the pruner with lazy=False"):
        pruner.backward(lambda: F.cross_entropy(model(x), target))
    pruner.attach(made)
    train(model, x, target, made, pruner, 1)


class Muon(torch.optim.SGD):
    """Stands for torch's, which older ones do not have."""


@pytest.mark.parametrize("lazy", [True, False])
@pytest.mark.parametrize("kind", [torch.optim.LBFGS, torch.optim.Rprop, Muon])
def test_optimizers_that_cannot_follow_blocks_are_refused_at_once(kind, lazy):
    model = copy.deepcopy(NETWORKS["linear"][0])
    arguments = {"block": (4, 8), "sweeps": 1, "lazy": lazy}
    with pytest.raises(ValueError, match=rf"VRPGEPruner: layer '0': {kind.__name__} (keeps|needs)"):
        VRPGEPruner(model, optimizers=kind([model[0].weight], lr=0.1), **arguments)
    assert [type(layer) for layer in model] == [nn.Linear, nn.ReLU, nn.Linear]
    late, known = kind([model[0].weight], lr=0.1), torch.optim.SGD(model.parameters(), 0.1)
    pruner = VRPGEPruner(model, **arguments)
    with pytest.raises(ValueError, match=rf"attach: layer '0': {kind.__name__} (keeps|needs)"):
        pruner.attach(known, late)
    assert pruner._optimizers == ()
    pruner.attach(known)


def test_states_that_cannot_follow_blocks_are_refused_before_the_training_is_over():
    model, x, target, made, pruner = make("linear", torch.optim.Adafactor, lazy=False)
    train(model, x, target, made, pruner, 1)  # which makes the states
    with pytest.raises(ValueError, match=r"backward: layer '0': Adafactor keeps 'row_var'"):
        train(model, x, target, made, pruner, 1)


def test_errors_of_states_and_models():
    *_, pruner = make("linear")
    *_, other = make("linear", atom="channel")
    with pytest.raises(ValueError, match="atom is .channel. in the state and .block. in"):
        pruner.load_state_dict(other.state_dict())
    with pytest.raises(ValueError, match="put it into an nn.Sequential"):
        VRPGEPruner(nn.Linear(32, 32), block=(4, 4))


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_other_devices_are_refused(execution, monkeypatch):
    def select_elsewhere(where, model, *rest):
        found = select_layers(where, model, *rest)
        model.to("meta")  # for want of a GPU
        return found

    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    with monkeypatch.context() as patch:
        patch.setattr("tetris.prune.pruner.select_layers", select_elsewhere)
        with pytest.raises(ValueError, match="Pruner: it draws blocks on the CPU.*'0' is on meta"):
            VRPGEPruner(model, block=(4, 4), execution=execution)
    model, x, target, _, pruner = make("linear")
    model.to("meta")
    with pytest.raises(ValueError, match="VRPGEPruner.backward: it draws blocks on the CPU"):
        pruner.backward(lambda: F.cross_entropy(model(x), target))


def test_frozen_weights_still_learn_gates():
    model, x, target, made, pruner = make("linear")
    pruner.sampled["0"].weight.requires_grad_(False)
    before = pruner.sampled["0"].weight.clone()
    train(model, x, target, made, pruner, 3)
    assert torch.equal(pruner.sampled["0"].weight, before)
    assert len(pruner.gates.s.unique()) > 2


def test_empty_masks_run():
    model, x, target, made, pruner = make("linear", sparsity=0.95)
    pruner.gates.s.zero_()
    with torch.no_grad():
        bias = model[0].bias.expand(len(x), -1)
        want = F.cross_entropy(model[2](model[1](bias)), target)
    (loss,) = train(model, x, target, made, pruner, 1)
    torch.testing.assert_close(loss, want)


def test_a_loss_instead_of_a_function_is_explained():
    model = torch.nn.Sequential(torch.nn.Linear(16, 16), torch.nn.ReLU(), torch.nn.Linear(16, 4))
    pruner = VRPGEPruner(model, sparsity=0.5, block=(4, 4), exclude="2", sweeps=1)
    with pytest.raises(TypeError, match="pass a function that computes the loss"):
        pruner.backward(model(torch.randn(2, 16)).sum())
