"""GAN compression: the loss, what it leaves alone, what is kept, and what happens when it fails."""

import copy
import json
import math
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

import tetris
from tetris.plotting import plot_images
from tetris.prune import (
    ConditionalGAN,
    Cubic,
    DivergenceError,
    GANPruner,
    ImageToImageGAN,
    UnconditionalGAN,
)
from tetris.prune.gan.loss import relative_difference

ROOT = Path(__file__).parent.parent
FAST = {"sweeps": 1, "block": (4, 4)}
SOON = Cubic(0, 6, every=2, initial=0.05)


def linear_generator():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Dropout(0.3),
        nn.Linear(32, 32),
        nn.BatchNorm1d(32),
        nn.ReLU(),
        nn.Linear(32, 16),
    )


def linear_discriminator():
    torch.manual_seed(1)
    leak = nn.LeakyReLU(0.2)
    return nn.Sequential(spectral_norm(nn.Linear(16, 32)), leak, spectral_norm(nn.Linear(32, 1)))


def conv_generator():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(8, 32 * 4),
        nn.Unflatten(1, (32, 2, 2)),
        nn.ConvTranspose2d(32, 16, 4, 2, 1, bias=False),
        nn.BatchNorm2d(16),
        nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 1, 3, padding=1),
    )


def conv_discriminator():
    torch.manual_seed(1)
    return nn.Sequential(nn.Conv2d(1, 8, 4, 2, 1), nn.LeakyReLU(0.2), nn.Conv2d(8, 1, 2))


class Told(nn.Module):
    """A network that takes classes beside its inputs; with ``guess``, one that guesses them too."""

    def __init__(self, net, guess=None):
        super().__init__()
        self.net = net
        self.guess = guess

    def forward(self, x, labels=None):
        if labels is not None:
            x = x + labels.to(x.dtype).view(-1, *[1] * (x.dim() - 1)) / 4
        return self.net(x) if self.guess is None else (self.net(x), self.guess(x))


LABELS = torch.arange(12) % 4
REAL = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
LATENT = torch.randn(12, 8, generator=torch.Generator().manual_seed(4))


def other(x):
    return torch.tanh(x).roll(1, -1)


def image_generator():
    """From images to images."""
    return nn.Sequential(nn.Linear(16, 8), linear_generator())


def guessing():
    torch.manual_seed(5)
    return Told(linear_discriminator(), nn.Linear(16, 4))


TASKS = {
    "unconditional": (UnconditionalGAN(), linear_generator, linear_discriminator, (REAL,), LATENT),
    "penalty": (
        UnconditionalGAN("wasserstein", penalty=10.0),
        linear_generator,
        linear_discriminator,
        (REAL,),
        LATENT,
    ),
    "conditional": (
        ConditionalGAN("hinge"),
        lambda: Told(linear_generator()),
        lambda: Told(linear_discriminator()),
        (REAL, LABELS),
        (LATENT, LABELS.flip(0)),
    ),
    "classifying": (
        ConditionalGAN(classify=0.7),
        lambda: Told(linear_generator()),
        guessing,
        (REAL, LABELS),
        (LATENT, LABELS.flip(0)),
    ),
    "paired": (ImageToImageGAN(), image_generator, linear_discriminator, (REAL,), REAL.flip(0)),
    "cycle": (
        ImageToImageGAN(back=lambda generator, sample: other(sample.generated)),
        image_generator,
        linear_discriminator,
        (REAL,),
        REAL.flip(0),
    ),
    "star": (
        ImageToImageGAN(
            "wasserstein",
            penalty=10.0,
            classify=1.0,
            back=lambda generator, sample: generator(sample.generated, sample.real[1]),
        ),
        lambda: Told(image_generator()),
        guessing,
        (REAL, LABELS),
        (REAL, LABELS.flip(0)),
    ),
}


def made(task, **settings):
    """A pruner for a task, and the arguments of its loss."""
    task, generator, discriminator, real, inputs = TASKS[task]
    generator, discriminator = generator(), discriminator()
    if settings.get("train_d", True):
        settings.setdefault("d_optimizer", torch.optim.Adam(discriminator.parameters(), 1e-3))
    settings = {"schedule": SOON, "sparsity": 0.5, **FAST, **settings}
    pruner = GANPruner(generator, discriminator, task=task, **settings)
    inputs = inputs if isinstance(inputs, tuple) else (inputs,)
    return pruner, (real if len(real) > 1 else real[0], *inputs)


def train(pruner, batch, optimizer, steps):
    for _ in range(steps):
        optimizer.zero_grad()
        pruner.loss(*batch).backward()
        optimizer.step()
        pruner.step()


def state_of(*networks):
    return [{k: v.clone() for k, v in n.state_dict().items()} for n in networks]


def same(a, b):
    return all(
        x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x)
        for x, y in zip(a, b, strict=True)
    )


# -- the loss ---------------------------------------------------------------------------------


def test_relative_difference_is_the_formula():
    a, b = torch.tensor([1.0, -3.0, 4.0]), torch.tensor([2.0, -3.0, 0.0])
    assert float(relative_difference(a, b, 0.1)) == pytest.approx((2 / 3 + 1 / 3) / (2 / 3 + 0.1))
    assert float(relative_difference(a, b, 0.1, True)) == pytest.approx((5 / 3) / (8 / 3 + 0.1))
    zero = torch.zeros(3)
    assert float(relative_difference(zero, b, 0.5)) == pytest.approx((1 / 3) / 0.5)


def test_relative_difference_has_no_gradient_of_the_original():
    a, b = torch.ones(2, requires_grad=True), torch.zeros(2, requires_grad=True)
    relative_difference(a, b, 1e-3, True).backward()
    assert a.grad is None
    torch.testing.assert_close(b.grad, torch.full((2,), -0.5 / 1.001))


@pytest.mark.parametrize("task", TASKS)
@pytest.mark.parametrize("training", [True, False])
def test_loss_is_zero_where_both_generators_are_equal(task, training):
    pruner, batch = made(task, sparsity=0.0, schedule="one_shot")
    pruner.model.train(training)
    pruner.discriminator.train()  # spectral norm would move between two looks
    assert float(pruner.loss(*batch).detach()) == pytest.approx(0.0, abs=1e-5)
    with torch.no_grad():
        for parameter in pruner.model.parameters():
            parameter.mul_(1.3)
    assert float(pruner.loss(*batch).detach()) > 1e-3


@pytest.mark.parametrize("task", TASKS)
def test_loss_leaves_everything_but_the_pruned_generator_alone(task):
    pruner, batch = made(task, schedule="one_shot")
    pruner.discriminator.train()
    before = state_of(pruner.discriminator, pruner.original)
    pruner.loss(*batch).backward()
    after = state_of(pruner.discriminator, pruner.original)
    assert same(before, after)
    assert all(p.grad is None for p in pruner.discriminator.parameters())
    assert all(p.requires_grad for p in pruner.discriminator.parameters())
    assert all(module.training for module in pruner.discriminator.modules())
    learnt = [p for p in pruner.model.parameters() if p.grad is not None and p.grad.any()]
    assert len(learnt) >= 4


def test_loss_of_a_classifying_gan_is_the_sum_of_the_paper():
    pruner, (real, *inputs) = made("classifying", schedule="one_shot", strength=0.3, eps=0.01)
    pruner.model.eval()
    loss = float(pruner.loss(real, *inputs).detach())
    judge = copy.deepcopy(pruner.discriminator).eval()
    (scores, _), labels = judge(real[0]), inputs[1]

    def terms(generator):
        own, guessed = judge(generator.eval()(*inputs))
        gen = F.softplus(-own).mean()
        dis = F.softplus(-scores).mean() + F.softplus(own).mean()
        return gen, F.cross_entropy(guessed, labels), dis

    with torch.no_grad():
        a, b = terms(pruner.original), terms(pruner.model)
    r = [float((x - y).abs() / (x.abs() + 0.01)) for x, y in zip(a, b, strict=True)]
    assert loss == pytest.approx(r[0] + 0.7 * r[1] + 0.3 * r[2], rel=1e-3)
    assert min(r) > 0.0
    assert pruner.terms["cla"] == pytest.approx(r[1], rel=1e-3)
    assert pruner.terms["d/cla"] == 0.0  # of the real images, equal for both generators


@pytest.mark.parametrize("loss", ["logistic", "hinge", "least_squares", "wasserstein"])
def test_adversarial_losses_have_their_minima_on_the_right_side(loss):
    task = UnconditionalGAN(loss)
    far = torch.tensor([[-9.0], [9.0]])

    def terms(real, generated):
        sample = tetris.prune.gan.tasks.Sample(nn.Identity(), (), (real,), generated)

        def look(x):
            return x

        return task.generator_terms(look, sample)["gen"], task.discriminator_terms(look, sample)

    one = torch.ones(2, 1)
    assert (terms(one, one)[0] < terms(one, -one)[0]).all()
    assert (terms(one, -one)[1]["dis"] < terms(-one, one)[1]["dis"]).all()
    assert set(terms(far, far)[1]) == {"dis"}


def test_gradient_penalty_is_that_of_a_linear_critic():
    critic = nn.Linear(16, 1, bias=False)
    generated = torch.randn(12, 16, requires_grad=True)
    sample = tetris.prune.gan.tasks.Sample(nn.Identity(), (), (REAL,), generated)
    terms = UnconditionalGAN("wasserstein", penalty=10.0).discriminator_terms(critic, sample)
    norm = critic.weight.norm()
    torch.testing.assert_close(terms["gp"], (norm - 1).square().expand(12))


def test_reconstruction_goes_through_the_generator_that_is_judged():
    pruner, batch = made("star", sparsity=0.0, schedule="one_shot", train_d=False)
    pruner.model.eval()
    with torch.no_grad():
        for parameter in pruner.model.parameters():
            parameter.mul_(1.1)
    pruner.loss(*batch)
    (images, labels), _, wanted = batch

    def rebuilt(generator):
        with torch.no_grad():
            return (images - generator(generator(images, wanted), labels)).abs().mean()

    a, b = rebuilt(pruner.original.eval()), rebuilt(pruner.model)
    assert pruner.terms["rec"] == pytest.approx(float((a - b).abs() / (a + 1e-3)), rel=1e-4)


# -- pruning ----------------------------------------------------------------------------------


def test_blocks_go_gradually_and_stay_gone():
    pruner, batch = made("unconditional", sparsity=0.75, allow_empty_rows=True)
    optimizer = torch.optim.Adam(pruner.model.parameters(), 1e-2, betas=(0.5, 0.99))
    assert list(pruner.layers) == ["0", "4"]  # not the last one
    seen, masks = [pruner.sparsity], [{n: o.mask() for n, o in pruner.layouts().items()}]
    for _ in range(8):
        train(pruner, batch, optimizer, 1)
        seen.append(pruner.sparsity)
        masks.append({n: o.mask() for n, o in pruner.layouts().items()})
    assert 0.0 < seen[0] < 0.1
    assert seen == sorted(seen)
    assert seen[6] == seen[-1] == pytest.approx(0.75, abs=0.02)
    for old, new in zip(masks, masks[1:], strict=False):
        assert all(bool((old[n] | ~new[n]).all()) for n in old)
    for name, mask in masks[-1].items():
        assert not pruner.modules()[name].weight[~mask].any()


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("atom", ["block", "filter"])
@pytest.mark.parametrize("block", [(4, 4), (1, 1), (8, 2), (32, 32)])
def test_sparse_generator_equals_the_masked_one_and_runs_on_kernels(execution, atom, block):
    generator, discriminator = conv_generator(), conv_discriminator()
    optimizer = torch.optim.Adam(generator.parameters(), 1e-3)
    pruner = GANPruner(
        generator,
        discriminator,
        task=UnconditionalGAN("hinge"),
        schedule=SOON,
        d_optimizer=torch.optim.Adam(discriminator.parameters(), 1e-4),
        optimizers=optimizer,
        execution=execution,
        atom=atom,
        include=["0", "2", "5"],
        sparsity=0.5,
        block=block,
        allow_empty_rows=block == (32, 32),  # one block is all that a row of the first layer has
        sweeps=1,
    )
    train(pruner, (torch.randn(12, 1, 4, 4), LATENT), optimizer, 7)
    sparse = pruner.finalize().eval()
    kinds = [type(sparse[i]).__name__ for i in (0, 2, 5)]
    assert kinds == ["SparseLinear", "SparseConvTranspose2d", "SparseConv2d"]
    with torch.inference_mode():
        want, got = generator.eval()(LATENT), sparse(LATENT)
        assert float((got - want).norm() / want.norm()) < 1e-5
        sparse[0](LATENT)
        assert tetris._C.last_kernel().startswith("bsmm")
    stored = [layer.layout for layer in (sparse[0], sparse[2], sparse[5])]
    if atom == "filter":
        for layout in stored:
            rows = layout.block_mask()
            assert torch.equal(rows.any(1), rows.all(1))
            assert int(rows.any(1).sum()) == -(-layout.block_grid[0] // 2)
    else:
        assert all(abs(layout.sparsity - 0.5) < 0.1 for layout in stored)


@pytest.mark.parametrize("atom", ["block", "filter"])
def test_training_on_stored_blocks_follows_the_masked_one(atom):
    found = []
    for execution in ("masked", "sparse"):
        torch.manual_seed(0)
        pruner, batch = made("unconditional", execution=execution, atom=atom, include=["0", "4"])
        optimizer = torch.optim.SGD(pruner.model.parameters(), 0.05, momentum=0.9)
        pruner.attach(optimizer)
        train(pruner, batch, optimizer, 8)
        found.append((pruner.layouts(), pruner.model.eval()(LATENT).detach()))
    assert found[0][0] == found[1][0]
    torch.testing.assert_close(found[0][1], found[1][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize("atom", ["block", "filter"])
def test_stored_blocks_do_not_come_back(atom):
    pruner, batch = made(
        "unconditional", execution="sparse", atom=atom, schedule=lambda step, s: s / (1 + step)
    )
    optimizer = torch.optim.Adam(pruner.model.parameters(), 1e-3)
    pruner.attach(optimizer)
    with pytest.raises(ValueError, match="the schedule falls from 50.0% to 25.0%"):
        train(pruner, batch, optimizer, 1)
    assert pruner.steps == 0


def test_filters_that_are_left_can_be_stored_in_blocks():
    generator, own = conv_generator(), ["0", "2", "5"]
    pruner = GANPruner(
        generator,
        conv_discriminator(),
        task=UnconditionalGAN(),
        schedule="one_shot",
        train_d=False,
        atom="filter",
        include=own,
        sparsity=0.5,
        block=(1, 1),
    )
    single = pruner.finalize()
    dense = pruner.remove().eval()
    stored = tetris.sparsify(
        dense, include=own, sparsity=0.5, block=(8, 8), reorder="l1_sort", allow_empty_rows=True
    ).eval()
    for name in own:
        layouts = [model.get_submodule(name).layout for model in (single, stored)]
        assert torch.equal(layouts[0].mask(), layouts[1].mask())
        rows = layouts[1].block_mask()
        assert torch.equal(rows.any(1), rows.all(1))
    with torch.no_grad():
        torch.testing.assert_close(stored(LATENT), dense(LATENT), rtol=1e-5, atol=1e-6)


def test_the_largest_filters_stay():
    generator = linear_generator()
    with torch.no_grad():
        generator[4].weight.mul_(torch.linspace(0.1, 3.0, 32)[torch.randperm(32)][:, None])
    norms = generator[4].weight.abs().sum(1)
    pruner = GANPruner(
        generator,
        linear_discriminator(),
        task=UnconditionalGAN(),
        schedule="one_shot",
        train_d=False,
        atom="filter",
        include="4",
        sparsity=0.75,
        block=(2, 4),
    )
    kept = pruner.layouts()["4"].mask().any(1)
    assert int(kept.sum()) == 8
    assert bool(norms[kept].min() > norms[~kept].max())


# -- the discriminator ------------------------------------------------------------------------


def test_an_adapting_discriminator_takes_one_ordinary_step():
    pruner, batch = made("unconditional", schedule="one_shot", train_d=False)
    pruner.train_d = True
    pruner.discriminator.train()
    pruner.d_optimizer = torch.optim.SGD(pruner.discriminator.parameters(), 0.1)
    copied = copy.deepcopy(pruner.discriminator)
    optimizer = torch.optim.SGD(copied.parameters(), 0.1)
    pruner.model.eval()
    with torch.no_grad():
        generated = pruner.model(LATENT)
    pruner.loss(*batch).backward()
    pruner.step()
    (F.softplus(-copied(REAL)).mean() + F.softplus(copied(generated)).mean()).backward()
    optimizer.step()
    for a, b in zip(pruner.discriminator.parameters(), copied.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    assert pruner.terms["d"] > 0.0


def test_a_fixed_discriminator_does_not_move():
    pruner, batch = made("unconditional", train_d=False)
    before = state_of(pruner.discriminator)
    train(pruner, batch, torch.optim.Adam(pruner.model.parameters(), 1e-3), 4)
    assert same(before, state_of(pruner.discriminator))
    assert "d" not in pruner.terms


def test_training_brings_the_pruned_generator_closer():
    pruner, batch = made("unconditional", train_d=False, schedule="one_shot", per_sample=True)
    pruner.model[3].p = pruner.original[3].p = 0.0
    optimizer = torch.optim.Adam(pruner.model.parameters(), 3e-3)
    losses = []
    for _ in range(150):
        loss = pruner.loss(*batch)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        pruner.step()
        losses.append(float(loss.detach()))
    assert sum(losses[-20:]) < 0.5 * sum(losses[:20])


# -- when it fails ----------------------------------------------------------------------------


def failing(**settings):
    """A pruner after five steps with a copy every two, and its states after four."""
    pruner, batch = made("unconditional", snapshot_every=2, **settings)
    optimizer = torch.optim.Adam(pruner.model.parameters(), 1e-3)
    pruner.attach(optimizer)
    train(pruner, batch, optimizer, 4)
    good = state_of(pruner.model, pruner.discriminator), copy.deepcopy(optimizer.state_dict())
    train(pruner, batch, optimizer, 1)
    return pruner, batch, optimizer, good


def check_good(pruner, batch, optimizer, good):
    states, its_state = good
    assert pruner.steps == 4
    assert same(states, state_of(pruner.model, pruner.discriminator))
    for key, old in its_state["state"].items():
        new = optimizer.state_dict()["state"][key]
        assert all(torch.equal(old[k], new[k]) for k in old)
    train(pruner, batch, optimizer, 3)  # goes on from there
    with torch.no_grad():
        assert bool(pruner.finalize().eval()(LATENT).isfinite().all())


def test_the_dense_generator_survives_numbers_that_are_not_finite():
    """Its batch norm sees them, and is not among what is brought back."""
    pruner, batch, _, _ = failing()
    before = state_of(pruner.original)
    with pytest.raises(DivergenceError):
        pruner.loss(REAL, torch.full_like(LATENT, torch.nan))
    assert same(before, state_of(pruner.original))
    pruner.model.eval()
    assert bool(pruner.loss(*batch).isfinite())


def test_an_optimizer_that_is_not_known_is_asked_for():
    pruner, batch = made("unconditional")
    pruner.loss(*batch)
    with torch.no_grad():
        pruner.model[7].bias[0] = torch.nan
    with pytest.raises(
        DivergenceError, match=r"and masks are back .*a new optimizer .* \(optimizers= would"
    ):
        pruner.step()


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_weights_that_are_not_finite_bring_the_last_good_state_back(execution):
    pruner, batch, optimizer, good = failing(execution=execution)
    optimizer.zero_grad()
    pruner.loss(*batch).backward()
    with torch.no_grad():
        pruner.model[7].bias[0] = torch.nan
    with pytest.raises(
        DivergenceError, match=r"step: after 5 steps 7\.bias .* back at step 4"
    ) as e:
        pruner.step()
    assert e.value.step == 4
    check_good(pruner, batch, optimizer, good)


def test_a_loss_that_is_not_finite_brings_the_last_good_state_back():
    pruner, batch, optimizer, good = failing()
    with pytest.raises(DivergenceError, match=r"the loss is nan \(gen nan.*; the inputs have such"):
        pruner.loss(REAL, torch.full_like(LATENT, torch.inf))
    check_good(pruner, batch, optimizer, good)


def test_a_discriminator_that_is_not_finite_brings_the_last_good_state_back():
    pruner, batch, optimizer, good = failing()
    pruner.loss(*batch).backward()
    for group in pruner.d_optimizer.param_groups:
        group["lr"] = float("inf")
    with pytest.raises(DivergenceError, match="of the discriminator is not finite"):
        pruner.step()
    assert all(group["lr"] == 1e-3 for group in pruner.d_optimizer.param_groups)
    check_good(pruner, batch, optimizer, good)


def test_a_discriminator_that_scores_all_alike_has_collapsed():
    pruner, batch, optimizer, good = failing(patience=3)
    before = pruner.discriminator[2].bias.detach().clone()
    with torch.no_grad():
        pruner.discriminator[2].bias.add_(1e6)
    for _ in range(2):  # one such step may pass, and is never copied as good
        optimizer.zero_grad()
        pruner.loss(*batch)
        pruner.step()
    with pytest.raises(DivergenceError, match="for 3 steps it gave every image the same score"):
        pruner.loss(*batch)
    assert float((pruner.discriminator[2].bias - before).detach().abs()) < 0.1
    check_good(pruner, batch, optimizer, good)


def test_a_discriminator_that_learns_nothing_any_more_has_collapsed():
    discriminator = nn.Sequential(nn.Linear(16, 1, bias=False))
    with torch.no_grad():
        discriminator[0].weight.fill_(100.0)
    generator = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 16))
    with torch.no_grad():
        generator[2].bias.fill_(-1e3)  # so that hinge losses are exactly zero
    pruner = GANPruner(
        generator,
        discriminator,
        task=UnconditionalGAN("hinge"),
        schedule="one_shot",
        d_optimizer=torch.optim.SGD(discriminator.parameters(), 0.1),
        patience=2,
        sparsity=0.5,
        **FAST,
    )
    real = REAL.abs()
    pruner.loss(real, LATENT)
    pruner.step()
    pruner.loss(real, LATENT)
    with pytest.raises(DivergenceError, match="for 2 steps its loss was below"):
        pruner.step()


# -- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("execution", ["masked", "sparse"])
@pytest.mark.parametrize("atom", ["block", "filter"])
def test_training_resumes_where_it_stopped(execution, atom):
    def make():
        pruner, batch = made("unconditional", execution=execution, atom=atom)
        pruner.model[3].p = 0.0
        pruner.original[3].p = 0.0
        optimizer = torch.optim.Adam(pruner.model.parameters(), 1e-2)
        pruner.attach(optimizer)
        return pruner, batch, optimizer

    pruner, batch, optimizer = make()
    train(pruner, batch, optimizer, 3)
    resumed, _, its_optimizer = make()
    with torch.no_grad():
        for parameter in resumed.original.parameters():
            parameter.zero_()  # comes with the state
    resumed.load_state_dict(copy.deepcopy(pruner.state_dict()))
    resumed.model.load_state_dict(pruner.model.state_dict())
    resumed.discriminator.load_state_dict(pruner.discriminator.state_dict())
    its_optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    resumed.d_optimizer.load_state_dict(copy.deepcopy(pruner.d_optimizer.state_dict()))
    train(pruner, batch, optimizer, 5)
    train(resumed, batch, its_optimizer, 5)
    assert resumed.layouts() == pruner.layouts()
    assert same(
        state_of(pruner.model, pruner.discriminator), state_of(resumed.model, resumed.discriminator)
    )


def test_a_state_is_of_one_atom():
    state = made("unconditional")[0].state_dict()
    other, _ = made("unconditional", atom="filter")
    before = other.layouts()
    with pytest.raises(ValueError, match="atom='block', this one has 'filter'"):
        other.load_state_dict(state)
    assert other.layouts() == before


# -- half precision ---------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_loss_under_autocast_and_step_outside(task):
    pruner, batch = made(task)
    optimizer = torch.optim.Adam(pruner.model.parameters(), 1e-3)
    pruner.attach(optimizer)
    for _ in range(7):
        optimizer.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            loss = pruner.loss(*batch)
        loss.backward()
        optimizer.step()
        pruner.step()
    assert all(p.dtype == torch.float32 for p in pruner.model.parameters())
    assert pruner.sparsity == pytest.approx(0.5, abs=0.05)


def test_weights_of_float16_say_what_to_do():
    generator, discriminator = linear_generator().half(), linear_discriminator().half()
    generator[3].p = 0.0
    pruner = GANPruner(
        generator,
        discriminator,
        task=UnconditionalGAN(),
        schedule="one_shot",
        train_d=False,
        sparsity=0.5,
        **FAST,
    )
    pruner.loss(REAL.half(), LATENT.half())
    with torch.no_grad():
        generator[7].bias[0] = torch.inf
    with pytest.raises(DivergenceError, match=r"7\.bias \(float16: train float32 under"):
        pruner.step()


# -- messages ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_optimizer": None}, "train_d needs d_optimizer"),
        ({"train_d": False, "d_optimizer": "adam"}, "of no use with train_d=False"),
        ({"d_optimizer": torch.optim.SGD([torch.zeros(1)], 0.1)}, "holds no parameter of the"),
        ({"strength": -1.0}, "strength must be a number, not negative"),
        ({"strength": "0.5"}, "strength must be a number, not negative"),
        ({"eps": 0.0}, "eps must be positive"),
        ({"eps": float("inf")}, "eps must be positive"),
        ({"atom": "row"}, "atom must be 'block' or 'filter'"),
        ({"snapshot_every": 0}, "snapshot_every must be an int of 1 or more"),
        ({"patience": 1.5}, "patience must be an int of 1 or more"),
        ({"atom": "filter", "scope": "global"}, "use scope='layer'"),
        ({"atom": "filter", "balanced": True}, "empties block rows, not balanced=True"),
        ({"atom": "filter", "share": [tetris.prune.SharedOrder("0", "4")]}, "no share="),
    ],
)
def test_settings_are_checked_before_anything_changes(settings, message):
    with pytest.raises(ValueError, match=message):
        made("unconditional", **settings)


def test_an_optimizer_of_both_networks_is_refused():
    generator, discriminator = linear_generator(), linear_discriminator()
    both = torch.optim.Adam([*generator.parameters(), *discriminator.parameters()])
    with pytest.raises(ValueError, match="d_optimizer holds parameters of the generator"):
        GANPruner(
            generator,
            discriminator,
            task=UnconditionalGAN(),
            schedule="one_shot",
            d_optimizer=both,
            **FAST,
        )


@pytest.mark.parametrize(
    ("task", "message"),
    [
        (UnconditionalGAN, r"an instance: UnconditionalGAN\(\) \(got the class Unc"),
        ("unconditional", r"another GANTask \(got 'unconditional'\)"),
        (F.softplus, "task must be a UnconditionalGAN"),
    ],
)
def test_a_task_is_an_object_with_terms(task, message):
    with pytest.raises(TypeError, match=message):
        GANPruner(
            linear_generator(),
            linear_discriminator(),
            task=task,
            schedule="one_shot",
            train_d=False,
            **FAST,
        )


class Own:
    """A task as a user might write one."""

    def __init__(self, generator, discriminator, weights):
        self.found = generator, discriminator
        self.weights = weights

    def generator_terms(self, discriminator, sample):
        found = self.found[0]
        return found(discriminator, sample) if callable(found) else found

    def discriminator_terms(self, discriminator, sample):
        return self.found[1]


def one(discriminator, sample):
    return {"gen": -discriminator(sample.generated)}


@pytest.mark.parametrize(
    ("task", "error", "message"),
    [
        (Own({}, {}, {}), ValueError, "the task has no terms"),
        (Own(one, {}, {"recon": 2.0}), ValueError, r"weight for 'recon', .* none of .* \(gen\)"),
        (Own(torch.ones(3), {}, {}), TypeError, "generator_terms must return a dict"),
        (Own(one, None, {}), TypeError, "discriminator_terms must return a dict"),
        (Own({"gen": 0.3}, {}, {}), TypeError, r"tensors, .* \(got 0.3 for 'gen'\)"),
        (Own({"gen": torch.ones(3)}, {}, {}), ValueError, "no parameter of the generator"),
    ],
)
def test_terms_of_a_task_of_your_own_are_checked(task, error, message):
    pruner, batch = made("unconditional", train_d=False)
    pruner.task = task
    with pytest.raises(error, match=message):
        pruner.loss(*batch)


def test_a_task_of_your_own_sees_the_discriminators_layers():
    """Feature matching: a layer of the discriminator, and outputs that are a list."""

    class Matching(UnconditionalGAN):
        weights = {"features": 2.0}

        def generator_terms(self, discriminator, sample):
            inner = discriminator[0](sample.generated)
            scores = discriminator(sample.generated)
            assert not discriminator.training
            return {"features": inner.square().mean(1), "gen": -scores}

    class Both(nn.Module):
        """Scores of two scales, by keyword too."""

        def __init__(self):
            super().__init__()
            self.net = linear_discriminator()

        def __getitem__(self, index):
            return self.net[index]

        def forward(self, images, scale=1.0):
            return [scale * self.net(images), self.net(images)]

    class Scales(UnconditionalGAN):
        def judge(self, discriminator, images, labels):
            return discriminator(images, scale=2.0)[0], None

    pruner, batch = made("unconditional", train_d=False)
    pruner.task = Matching()
    pruner.loss(*batch).backward()
    assert set(pruner.terms) == {"features", "gen", "d/dis"}
    pruner.discriminator, pruner.task = Both(), Scales()
    assert float(pruner.loss(*batch).detach()) > 0.0


def test_networks_that_cannot_learn_are_named():
    pruner, batch = made("unconditional")
    pruner.model.requires_grad_(False)
    with pytest.raises(ValueError, match=r"call generator\.requires_grad_\(True\)"):
        pruner.loss(*batch)
    with torch.no_grad():
        pruner.loss(*batch)  # to look at, not to learn from
    pruner.model.requires_grad_(True)
    pruner.loss(*batch).backward()
    pruner.discriminator.requires_grad_(False)
    with pytest.raises(RuntimeError, match=r"call discriminator\.requires_grad_\(True\)"):
        pruner.step()


def test_several_processes_are_refused(monkeypatch):
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda: 2)
    with pytest.raises(RuntimeError, match="one process trains; here are 2"):
        made("unconditional")


def test_calls_in_the_wrong_order_say_what_comes_first():
    pruner, batch = made("unconditional")
    with pytest.raises(RuntimeError, match=r"call loss = pruner\.loss"):
        pruner.step()
    with pytest.raises(ValueError, match="takes real images"):
        pruner.loss(REAL)
    pruner.loss(*batch)
    pruner.step()
    with pytest.raises(RuntimeError, match=r"call loss = pruner\.loss"):
        pruner.step()
    pruner.remove()
    with pytest.raises(RuntimeError, match="the pruner has ended"):
        pruner.loss(*batch)


def test_tasks_say_what_they_need():
    with pytest.raises(ValueError, match="loss must be one of logistic"):
        UnconditionalGAN("l2")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"penalty, the weight .* \(got -1\)"):
        UnconditionalGAN(penalty=-1)
    with pytest.raises(ValueError, match=r"classify, the weight .* \(got 'yes'\)"):
        ConditionalGAN(classify="yes")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"back must be a function .* \(got 3\)"):
        ImageToImageGAN(back=3)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="reconstruct, the weight"):
        ImageToImageGAN(reconstruct=float("nan"))
    pruner, _ = made("unconditional")
    with pytest.raises(ValueError, match=r"shaped alike, .* \(got \[12, 4, 4\] and \[12, 16\]\)"):
        pruner.loss(REAL.view(12, 4, 4), LATENT)
    pruner.discriminator = nn.Sequential(pruner.discriminator, nn.Flatten(0), nn.Linear(12, 1))
    with pytest.raises(ValueError, match=r"scores \[N, \.\.\.\], .* \(got \[1\] for 12 images\)"):
        pruner.loss(REAL.view(12, 16), LATENT)
    pruner.discriminator = guessing()
    with pytest.raises(TypeError, match=r"must return scores, .* \(got a tuple\).* classify"):
        pruner.loss(REAL, LATENT)
    pruner, _ = made("conditional")
    with pytest.raises(ValueError, match="labels are needed, the last of real and inputs"):
        pruner.loss(REAL, LATENT, LABELS)
    pruner, _ = made("penalty")
    with pytest.raises(ValueError, match="as many real images as generated"):
        pruner.loss(REAL[:6], LATENT)
    pruner, _ = made("paired")
    with pytest.raises(ValueError, match="rec compares images of one shape"):
        pruner.loss(REAL[:6], REAL)
    _, generator, _, real, inputs = TASKS["classifying"]
    silent = GANPruner(
        generator(),
        Told(linear_discriminator()),
        task=ConditionalGAN(classify=1.0),
        schedule="one_shot",
        train_d=False,
        sparsity=0.5,
        **FAST,
    )
    with pytest.raises(TypeError, match=r"the discriminator returns \(scores, logits\)"):
        silent.loss(real, *inputs)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (LABELS.float(), r"labels of inputs .* \(got torch\.float32\[12\]\)"),
        (LABELS[:6], r"\(got torch\.int64\[6\]\)"),
        (LABELS[:, None], r"\(got torch\.int64\[12, 1\]\)"),
        (LABELS + 1, r"from 0 to 3, .* from 1 to 4\)"),
    ],
)
def test_classes_are_checked(labels, message):
    pruner, _ = made("classifying")
    pruner.model.forward = lambda latent, _: pruner.model.net(latent)  # takes any label
    pruner.original.forward = lambda latent, _: pruner.original.net(latent)
    with pytest.raises(ValueError, match=message):
        pruner.loss((REAL, LABELS), LATENT, labels)
    with pytest.raises(ValueError, match=message.replace("inputs", "real")):
        pruner.loss((REAL, labels), LATENT, LABELS)


def test_attributes_are_judged_one_by_one():
    logits = torch.randn(3, 4)
    labels = torch.tensor([[1.0, 0, 1, 0], [0, 0, 0, 1], [1, 1, 1, 1]])
    task = ConditionalGAN(classify=1.0)
    sample = tetris.prune.gan.tasks.Sample(nn.Identity(), (logits, labels), (), logits)
    got = task.generator_terms(lambda x: (x, x), sample)["cla"]
    want = -(labels * logits.sigmoid().log() + (1 - labels) * (-logits).sigmoid().log()).sum(1)
    torch.testing.assert_close(got, want)


# -- pictures and the experiment --------------------------------------------------------------


def test_image_grids_are_written_and_checked(tmp_path):
    path = tmp_path / "grid.png"
    plot_images({"dense": torch.rand(3, 5, 4), "pruned": torch.rand(3, 5, 4)}, path)
    assert path.read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"of one shape \(got \[3, 5, 4\], \[3, 5, 5\]\)"):
        plot_images({"a": torch.rand(3, 5, 4), "b": torch.rand(3, 5, 5)}, path)
    with pytest.raises(ValueError, match="got no rows"):
        plot_images({}, path)


def test_distances_that_rise_are_told_from_noise():
    sys.path.insert(0, str(ROOT))
    from benchmarks.methods import gan
    from benchmarks.methods.experiment import Row

    def rows(distances):
        for place, values in enumerate(zip(*distances, strict=True)):
            block = ((1, 1), (4, 1), (8, 8), (16, 16), None)[place]
            name = "method, filters" if block is None else "method"
            for seed, value in enumerate(values):
                yield Row(name, seed, 0.5, block=block, sparsity=0.5, extra={"FD": value})

    rising = [(1, 2, 4, 8, 16), (3, 6, 11, 25, 50), (2, 4, 9, 16, 31)]
    bumpy = [(1, 4, 2, 8, 16), (3, 12, 6, 25, 50), (2, 8, 4, 16, 31)]
    flat = [(4, 2, 1, 2, 4), (1, 2, 4, 2, 1), (3, 2, 3, 1, 3)]
    lost = [rising[0], (1, 2, math.nan, 8, 16)]
    found = {
        n: list(gan._rises(list(rows(d)), 0.5))
        for n, d in {
            "rising": rising,
            "bumpy": bumpy,
            "flat": flat,
            "one": rising[:1],
            "lost": lost,
        }.items()
    }
    verdicts = {name: [holds for _, holds, _ in checks] for name, checks in found.items()}
    assert verdicts == {
        "rising": [True, True],
        "bumpy": [False, True],
        "flat": [False, False],
        "one": [True, None],
        "lost": [None, None],
    }
    slope = float(found["rising"][1][2].split()[0])
    assert slope == pytest.approx(0.69, abs=0.02)  # doubles with each step: log 2


def test_a_variant_that_diverges_leaves_the_others_their_rows(tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT))
    from dataclasses import replace
    from io import StringIO

    from rich.console import Console

    from benchmarks.methods import __main__ as command
    from benchmarks.methods import gan, gan_training, latency, report
    from benchmarks.methods.experiment import Setting

    def diverges(start):
        if start.seed not in lost:
            return gan._small(start)
        if start.seed == 0:
            raise DivergenceError("the loss is nan", 2)
        masked, model = gan._small(start)  # a way to train that does not notice
        next(model.parameters()).data[0] = math.nan
        return masked, model

    tiny = replace(gan_training.QUICK["digits"], dense=2, compress=2, classifier=1, images=100)
    monkeypatch.setitem(gan_training.QUICK, "digits", tiny)
    rivals = [gan.Run(rival, gan._small) for rival in (*gan.BASELINES, gan.CONTROL)]
    runs = [gan.Run("method", diverges), *rivals]
    monkeypatch.setattr(gan, "_runs", lambda data: iter(runs))
    monkeypatch.setattr(latency, "measure", lambda models, x: {})
    setting, log, lost = Setting("digits", (0, 1), True, tmp_path), StringIO(), set()
    for seed, said in ((0, r"\d \(1 of 2 diverged\)"), (1, "diverged")):
        lost.add(seed)
        outcome = command.run(gan.EXPERIMENT, setting, "test", Console(file=log))
        assert "seed 0: method 8x8 75% diverged: the loss is nan" in log.getvalue()
        assert len(outcome.rows) == 2 * (2 + len(runs))
        head, body = report.cells(outcome.rows)
        accuracy = {line[0]: line[head.index("accuracy, %")] for line in body}
        assert re.search(f"{said}$", accuracy.pop("method"))
        assert not any("diverged" in cell or "nan" in cell for cell in accuracy.values())
        told = {
            point: verdict
            for point, verdict, measured in report.verdicts(outcome)
            if "div" in measured
        }
        (distance,) = (point for point in told if point.startswith("FD within twice"))
        assert told.pop(distance) == "FAILS"
        assert set(told.values()) == {"not judged"}
        report.write(outcome)
        written = (tmp_path / "gan-digits.json").read_text()
        assert json.loads(written, parse_constant=pytest.fail)["rows"]


@pytest.mark.slow
@pytest.mark.parametrize("data", ["digits", "fashion"])
def test_the_experiment_gives_every_row_and_holds_its_checks(data, tmp_path, monkeypatch):
    sys.path.insert(0, str(ROOT))
    from dataclasses import replace
    from functools import partial

    from benchmarks.methods import gan, gan_training, latency
    from benchmarks.methods.experiment import Setting
    from benchmarks.methods.progress import Progress
    from benchmarks.methods.stats import compare
    from tetris.timing import Plan

    if data == "fashion":
        try:
            gan_training.images("fashion", 0)
        except FileNotFoundError as error:
            pytest.skip(str(error))
    tiny = replace(gan_training.QUICK[data], dense=3, compress=4, classifier=1, batch=8, images=200)
    monkeypatch.setitem(gan_training.QUICK, data, tiny)
    monkeypatch.setattr(gan, "SWEEPS", 1)
    # Numbers mean nothing here: fewer real images, shorter averages, small batches timed once.
    monkeypatch.setitem(gan_training.IMAGES, "fashion", 4000)
    monkeypatch.setattr(gan, "recalibrate", partial(gan_training.recalibrate, count=2))
    quick, measure = Plan(0.0, 0.0, 1, 1), latency.measure
    monkeypatch.setattr(gan, "BATCH", 4)
    monkeypatch.setattr(latency, "_LOOK", quick)
    monkeypatch.setattr(latency, "measure", lambda models, x: measure(models, x, quick))
    setting = Setting(data, (0,), True, tmp_path)
    experiment = gan.EXPERIMENT
    rows = list(experiment.rows(setting, Progress()))
    assert len({row.label for row in rows}) == len(rows) == (17 if data == "digits" else 21)
    by_label = {row.label: row for row in rows}
    stored = {row.stored for row in rows if row.block == (8, 8) and row.sparsity == 0.75}
    assert len(stored) == 1  # all compete at equal storage
    assert by_label["small dense"].stored <= max(stored) < by_label["dense"].stored
    filters, blocks = (by_label[f"method{v} 50%"] for v in (", filters", " 8x8"))
    assert filters.stored == blocks.stored  # rows that are left fill blocks
    assert all(row.extra["FD"] > 0.0 for row in rows)
    assert by_label["real images"].extra["FD"] < by_label["dense"].extra["FD"]
    timed = [row for row in rows if row.label not in ("real images", "dense, trained on")]
    assert all(row.latency_ms > 0.0 and row.x_dense > 0.0 for row in timed)
    for claim in experiment.claims(setting):
        assert compare(rows, claim).seeds == 1
    checks = {what: holds for what, holds, _ in experiment.check(rows)}
    assert checks["L is 0 where both generators are equal"]
    assert checks["sparse generators equal the masked ones to 1e-5"]
    for picture in ("samples", "figures"):
        assert (tmp_path / f"gan-{data}-{picture}.png").exists()
