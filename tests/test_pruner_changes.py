"""What changes blocks while training: new searches, exchanges, bounds of layers, skipped steps."""

import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn

from tetris import SparseLinear, sparsify
from tetris.nn.base import SparseLayer
from tetris.prune import Cubic, Parameters, Regrow, TetrisPruner, VRPGEPruner
from tetris.prune.allocate import Scored, allocate

FAST = {"sweeps": 1, "block": (4, 3), "exclude": "4"}


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 30), nn.ReLU(), nn.Linear(30, 10)
    ).double()


def images(kind=nn.Conv2d):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 14, 3), nn.ReLU(), kind(14, 18, 3, groups=2), nn.ReLU(), nn.Conv2d(18, 2, 1)
    ).double()


def batch(model, step, size=8):
    shape = (size, 16) if isinstance(model[4], nn.Linear) else (size, 3, 9, 8)
    generator = torch.Generator().manual_seed(step)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def train(model, pruner, optimizer, steps, after=lambda: None):
    for _ in range(steps):
        optimizer.zero_grad()
        model(batch(model, pruner.steps)).square().mean().backward()
        optimizer.step()
        pruner.step()
        after()


CHANGES = {
    "searched": {"search_every_update": True, "schedule": Cubic(0, 8, every=2)},
    "searched-at": {"search_at": (2, 5, 9)},
    "searched-global": {"search_at": (5,), "schedule": Cubic(0, 8), "scope": "global"},
    "gradient": {"regrow": Regrow(0.4, every=2)},
    "gradient-cubic": {"regrow": Regrow(0.4, every=2), "schedule": Cubic(0, 7)},
    "random-global": {"regrow": Regrow(0.4, every=3, by="random"), "scope": "global"},
    "both": {"regrow": Regrow(0.4, every=2), "search_at": range(5, 10, 5)},
}


@pytest.mark.parametrize("make", [mlp, images, lambda: images(nn.ConvTranspose2d)])
@pytest.mark.parametrize("change", CHANGES)
def test_masks_and_stored_blocks_change_alike(make, change):
    """Momenta of weights that come back start anew in both."""
    results = []
    for execution in ("masked", "sparse"):
        model = make()
        optimizer = torch.optim.AdamW(model.parameters(), 0.01)
        pruner = TetrisPruner(
            model, sparsity=0.7, execution=execution, optimizers=optimizer, include="2",
            **{**FAST, **CHANGES[change]},
        )  # fmt: skip
        first = pruner.layouts()
        train(model, pruner, optimizer, 11)
        assert pruner.layouts() != first
        assert pruner.sparsity == pytest.approx(0.7, abs=0.02)
        results.append((pruner.layouts(), pruner.remove()))
    (layouts, masked), (same, sparse) = results
    assert layouts == same
    for a, b in zip(masked.parameters(), sparse.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


def test_searches_come_at_the_steps_that_were_asked_for():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.3)
    pruner = TetrisPruner(model, sparsity=0.7, search_at={0, 3}, **FAST)
    orders = []
    train(model, pruner, optimizer, 5, lambda: orders.append(pruner.layouts()["0"].row_perm))
    same = [torch.equal(a, b) for a, b in zip(orders[:-1], orders[1:], strict=True)]
    assert same == [True, False, True, True]
    with pytest.raises(TypeError, match=r"search_at must hold step numbers.*got 100"):
        TetrisPruner(mlp(), search_at=100, **FAST)


def test_layouts_are_of_the_moment_and_what_comes_back_is_zero():
    """The optimizer moves removed weights before the mask that lets them back."""
    model = mlp()
    optimizer = torch.optim.AdamW(model.parameters(), 0.03)
    pruner = TetrisPruner(
        model, sparsity=0.75, schedule=Cubic(0, 9, every=3), search_at={6}, **FAST
    )
    train(model, pruner, optimizer, 5)
    before = pruner.layouts()
    masks = {name: layout.mask() for name, layout in before.items()}
    train(model, pruner, optimizer, 1)
    returned = 0
    for name, mask in masks.items():
        assert torch.equal(before[name].mask(), mask)
        back = pruner.layouts()[name].mask() & ~mask
        returned += int(back.sum())
        assert not model.get_submodule(name).weight[back].any()
    assert returned > 0


def test_a_mask_regrows_where_the_dense_gradient_is_steepest():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.01)
    regrow = Regrow(share=0.5, every=1, end=10)
    pruner = TetrisPruner(model, sparsity=0.7, regrow=regrow, **FAST)
    dense = pruner.finalize()
    for layer in (0, 2):
        dense[layer] = dense[layer].to_dense()
    before = pruner.layouts()
    for step in range(2):  # two backward passes, one step
        for m in (model, dense):
            m(batch(model, step)).square().mean().backward()
    optimizer.step()
    pruner.step()
    for name, old in before.items():
        new = pruner.layouts()[name]
        gradient = dense.get_submodule(name).weight.grad.abs()
        score = old.blocking.sums(gradient, old.row_perm, old.col_perm)
        absent = score[~old.block_mask()].sort(descending=True).values
        grown = new.block_mask() & ~old.block_mask()
        assert 0 < grown.sum() < len(absent)
        assert score[grown].min() >= absent[int(grown.sum()) - 1] * (1 - 1e-12)


# -- bounds -------------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("target", [None, Parameters(0.4)])
def test_bounds_hold_and_all_layers_together_reach_the_sparsity(execution, target):
    def reached(**bounds):
        model = mlp()
        with torch.no_grad():
            model[0].weight.mul_(20)  # worth more: nothing of it would go
        optimizer = torch.optim.SGD(model.parameters(), 0.0)
        how = {"sparsity": 0.6} if target is None else {"target": target}
        pruner = TetrisPruner(
            model, scope="global", execution=execution, schedule=Cubic(0, 6), optimizers=optimizer,
            **how, **FAST, **bounds,
        )  # fmt: skip
        seen = []
        train(model, pruner, optimizer, 7, lambda: seen.append(pruner.layouts()["0"].sparsity))
        assert seen == sorted(seen)
        assert pruner.sparsity == pytest.approx(0.6, abs=0.03)
        return [layout.sparsity for layout in pruner.layouts().values()]

    free = reached()
    assert free[0] < 0.1
    assert free[1] > 0.8
    low = reached(overrides={"0": {"min_sparsity": 0.5}})
    assert low[0] == 0.5
    assert low[1] < free[1]
    high = reached(overrides={"2": {"max_sparsity": 0.7}})
    assert high[1] == pytest.approx(0.7, abs=0.02)
    assert high[0] > free[0]
    both = reached(min_sparsity=0.55, max_sparsity=0.65)
    assert all(0.53 <= share <= 0.65 for share in both)


def test_bounds_of_sparsify_and_of_layers_with_a_sparsity_of_their_own():
    sparse = sparsify(
        mlp(), sparsity=0.6, scope="global", max_sparsity=0.62, overrides={"0": {"sparsity": 0.75}},
        **FAST,
    )  # fmt: skip
    assert sparse[0].layout.sparsity == 0.75
    assert sparse[2].layout.sparsity == pytest.approx(0.6, abs=0.01)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"min_sparsity": 0.5}, r"bound what scope='global' removes.*layer '0'"),
        ({"scope": "global", "min_sparsity": 0.6, "max_sparsity": 0.5}, "must not be above"),
        ({"scope": "global", "max_sparsity": 1.5}, r"max_sparsity: sparsity.*got 1\.5"),
        ({"scope": "global", "sparsity": 0.9, "max_sparsity": 0.5}, "comes to 50.0% of all.*90.0%"),
        ({"scope": "global", "sparsity": 0.3, "min_sparsity": 0.5}, "comes to 50.0% of all.*30.0%"),
    ],
)
def test_bounds_that_nothing_can_reach(arguments, message):
    for make in (sparsify, TetrisPruner):
        with pytest.raises(ValueError, match=message):
            make(mlp(), **FAST, **arguments)
    with pytest.raises(ValueError, match="gates compete without bounds"):
        VRPGEPruner(mlp(), scope="global", min_sparsity=0.2, **FAST)


def test_bounds_hold_for_any_worth_and_the_rest_goes_by_worth():
    """Against one choice at a time: the best block that may still be kept."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        layers = {}
        for name in "abc":
            rows, columns = torch.randint(1, 6, (2,), generator=generator).tolist()
            low, high = torch.rand(2, generator=generator).sort().values.tolist()
            sums = torch.rand(rows, columns, generator=generator)
            layers[name] = Scored(sums, 1.0, False, None, low, high)
        total = sum(layer.blocks for layer in layers.values())
        least = sum(layer.least for layer in layers.values())
        most = sum(layer.most for layer in layers.values())
        budget = int(torch.randint(least, most + 1, (), generator=generator))
        kept = {name: layer.least for name, layer in layers.items()}
        sums = {
            n: x.sums.flatten().sort(descending=True).values.tolist() for n, x in layers.items()
        }
        while sum(kept.values()) < budget:
            free = [n for n in layers if kept[n] < layers[n].most]
            kept[max(free, key=lambda n: sums[n][kept[n]])] += 1
        found = allocate(layers, 1 - budget / total)
        for name, layer in layers.items():
            assert layer.blocks - int(found[name] * layer.blocks) == kept[name]


# -- optimizers ---------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_groups_and_several_optimizers_are_followed(execution):
    """The same trajectory, however the parameters are dealt to groups and optimizers."""

    def run(split):
        model = mlp()
        weights, others = (
            [model[0].weight, model[2].weight],
            [
                p
                for p in model.parameters()
                if p is not model[0].weight and p is not model[2].weight
            ],
        )
        settings = {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.01}
        if split == "one":
            made = [torch.optim.SGD(weights + others, **settings)]
        elif split == "groups":
            groups = [{"params": weights[:1]}, {"params": weights[1:]}, {"params": others}]
            made = [torch.optim.SGD(groups, **settings)]
        else:
            made = [
                torch.optim.SGD(part, **settings) for part in (weights[:1], weights[1:], others)
            ]
        pruner = TetrisPruner(
            model, sparsity=0.75, schedule=Cubic(1, 7, every=2), execution=execution,
            optimizers=made, regrow=Regrow(0.3, every=3), **FAST,
        )  # fmt: skip
        for step in range(9):
            for optimizer in made:
                optimizer.zero_grad()
            model(batch(model, step)).square().mean().backward()
            for optimizer in made:
                optimizer.step()
            pruner.step()
        return pruner.layouts(), list(model.parameters())

    layouts, parameters = run("one")
    for split in ("groups", "several"):
        same, others = run(split)
        assert same == layouts
        assert all(torch.equal(a, b) for a, b in zip(others, parameters, strict=True))


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_accumulated_gradients_prune_as_those_of_the_whole_batch(execution):
    def run(parts):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        pruner = TetrisPruner(
            model, sparsity=0.75, schedule=Cubic(0, 6, every=2), execution=execution,
            optimizers=optimizer, regrow=Regrow(0.3, every=2), **FAST,
        )  # fmt: skip
        for step in range(8):
            optimizer.zero_grad()
            for part in batch(model, step).chunk(parts):
                (model(part).square().mean() / parts).backward()
            optimizer.step()
            pruner.step()  # once per step of the optimizer
        return pruner.layouts(), list(model.parameters())

    (layouts, whole), (same, accumulated) = run(1), run(4)
    assert layouts == same
    for a, b in zip(accumulated, whole, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-13)


# -- mixed precision ----------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("regrow", [None, Regrow(0.3, every=2)])
def test_a_step_that_a_scaler_skips_counts_for_nothing(execution, regrow):
    """A run with batches that overflow ends where one without them does."""

    def run(overflows):
        model = mlp().float()
        optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
        pruner = TetrisPruner(
            model, sparsity=0.75, schedule=Cubic(0, 6, every=2), execution=execution,
            optimizers=optimizer, regrow=regrow, **FAST,
        )  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
        skipped = 0
        for step in range(8):
            for overflow in [True, False] if step in overflows else [False]:
                before, layouts = pruner.steps, pruner.layouts()
                optimizer.zero_grad()
                with torch.autocast("cpu", torch.bfloat16):
                    loss = model(batch(model, step).float()).float().square().mean()
                scaler.scale(loss * (torch.inf if overflow else 1.0)).backward()
                scale = scaler.get_scale()
                scaler.step(optimizer)
                scaler.update()
                pruner.step(skipped=scaler.get_scale() < scale)
                if overflow:
                    skipped += 1
                    assert pruner.steps == before
                    assert pruner.layouts() == layouts
        assert skipped == len(overflows)
        assert all(bool(p.isfinite().all()) for p in model.parameters())
        return pruner.layouts(), list(model.parameters())

    layouts, parameters = run(())
    same, others = run((1, 3, 5))
    assert same == layouts
    for a, b in zip(others, parameters, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)  # scales are powers of two


def test_sampled_blocks_go_back_when_a_step_is_skipped():
    """VR-PGE: neither weights nor gates learn, and the next step is as if there had been none."""
    model = nn.Sequential(nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 4))
    optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
    pruner = VRPGEPruner(
        model, sparsity=0.5, block=(4, 4), reorder="identity", sweeps=1, exclude="2",
        optimizers=optimizer,
    )  # fmt: skip
    x = torch.randn(8, 16)
    before = {k: v.clone() for k, v in model.state_dict().items()}
    gates = pruner.gates.s.clone()
    optimizer.zero_grad()
    pruner.backward(lambda: model(x).square().mean())
    pruner.step(skipped=True)
    assert pruner.steps == 0
    assert torch.equal(pruner.gates.s, gates)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    optimizer.zero_grad()
    pruner.backward(lambda: model(x).square().mean())
    optimizer.step()
    pruner.step()
    assert pruner.steps == 1
    assert not torch.equal(pruner.gates.s, gates)


def test_bfloat16_autocast_trains_masks_and_stored_blocks():
    for execution in ("masked", "sparse"):
        model = mlp().float()
        optimizer = torch.optim.Adam(model.parameters(), 0.01)
        pruner = TetrisPruner(
            model, sparsity=0.75, schedule=Cubic(0, 6), execution=execution, optimizers=optimizer,
            **FAST,
        )  # fmt: skip
        losses = []
        for step in range(12):
            optimizer.zero_grad()
            with torch.autocast("cpu", torch.bfloat16):
                loss = model(batch(model, step % 2).float()).float().square().mean()
            loss.backward()
            optimizer.step()
            pruner.step()
            losses.append(loss.item())
        assert losses[-1] < losses[0]
        assert all(p.dtype == torch.float32 for p in model.parameters())
        assert isinstance(pruner.finalize()[0], SparseLinear)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weights_in_half_precision_train_with_masks(dtype):
    model = mlp().to(dtype)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    pruner = TetrisPruner(model, sparsity=0.75, regrow=Regrow(0.3, every=2), **FAST)
    for step in range(4):
        optimizer.zero_grad()
        model(batch(model, step).to(dtype)).square().mean().backward()
        optimizer.step()
        pruner.step()
    for name, layout in pruner.layouts().items():
        weight = model.get_submodule(name).weight
        assert weight.dtype == dtype
        assert not weight[~layout.mask()].any()
    with pytest.raises(ValueError, match=r"finalize: layer '0'.*convert with .float\(\)"):
        pruner.finalize()
    model.float()
    assert isinstance(pruner.finalize()[0], SparseLayer)


# -- averages of models -------------------------------------------------------------------------


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("decay", [0.9, 0.9999])
def test_a_mask_whose_indices_were_averaged_raises(decay, inference):
    """Means of indices in floating point are rounded towards zero: some come twice."""
    model = nn.Sequential(nn.Linear(48, 48))
    TetrisPruner(model, sparsity=0.75, block=(4, 4), sweeps=1)
    with torch.inference_mode(inference):
        average = AveragedModel(model, use_buffers=True, avg_fn=get_ema_avg_fn(decay))
        for _ in range(3):
            average.update_parameters(model)
        with pytest.raises(ValueError, match=r"_perm must hold each index once.*use_buffers=False"):
            average(torch.ones(2, 48))


def test_an_average_of_parameters_has_the_masks_of_now():
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.05, momentum=0.9)
    pruner = TetrisPruner(
        model, sparsity=0.75, schedule=Cubic(0, 8), optimizers=optimizer,
        regrow=Regrow(0.3, every=2), search_at={5}, **FAST,
    )  # fmt: skip
    average = AveragedModel(model, use_buffers=False, avg_fn=get_ema_avg_fn(0.9))
    want = {name: p.detach().clone() for name, p in model.named_parameters()}

    def follow():
        average.update_parameters(model)
        for name, p in model.named_parameters():
            want[name].lerp_(p.detach(), 0.1 if pruner.steps > 1 else 1.0)

    train(model, pruner, optimizer, 10, follow)
    for name, p in average.module.named_parameters():
        torch.testing.assert_close(p, want[name])
    for name, layout in pruner.layouts().items():
        layer = average.module.get_submodule(name)
        assert layer.parametrizations.weight[0].layout() == layout
    x = batch(model, 0)
    averaged = average(x)
    model.load_state_dict(average.module.state_dict())
    torch.testing.assert_close(pruner.finalize()(x), averaged)
