"""SynapticPruner: the conversion, the proximal step, blocks, what it refuses, and its end."""

import copy
import math

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tetris import SparseConv2d, SparseLinear
from tetris.prune import LayerOptions, SynapticPruner
from tetris.prune.synaptic.inputs import input_scales
from tetris.prune.synaptic.strength import StrengthLayer, Synapses


def randomize(model, seed=0, positive=False):
    """Batch norms as after training: scales of both signs and statistics that are not trivial."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            gamma = torch.randn(module.num_features, generator=generator)
            with torch.no_grad():
                module.weight.copy_(gamma.abs() + 0.1 if positive else gamma)
                module.bias.copy_(torch.randn(module.num_features, generator=generator))
                module.running_mean.copy_(torch.randn(module.num_features, generator=generator))
                module.running_var.uniform_(0.5, 2.0, generator=generator)
    return model.eval()


def cnn():
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            nn.Conv2d(1, 16, 3, padding=1, bias=False),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Conv2d(16, 24, 3, padding=1),
            nn.BatchNorm2d(24),
            nn.LeakyReLU(0.1),
            nn.MaxPool2d(2),
            nn.Conv2d(24, 16, 3, padding=1, groups=2),
            nn.BatchNorm2d(16),
            nn.ReLU(),
            nn.Flatten(),
            nn.Dropout(0.1),
            nn.Linear(64, 20),
            nn.BatchNorm1d(20),
            nn.ReLU(),
            nn.Linear(20, 10),
        )
    )


class Residual(nn.Module):
    """A map with two consumers, a residual sum, and one activation that is not homogeneous."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.norm = nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.a, self.a_norm = nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)
        self.b, self.b_norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.d, self.d_norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)
        self.e = nn.Conv2d(16, 16, 1)
        self.up = nn.ConvTranspose2d(16, 16, 2, stride=2)
        randomize(self)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))  # to a and b: both take its scale over
        y = F.relu(self.a_norm(self.a(x))) + self.b_norm(self.b(x))
        z = F.gelu(self.d_norm(self.d(self.c(y))))
        return self.up(self.e(z)).mean((2, 3))


FAST = {"sweeps": 1, "lr_sum": 1.0}
LAYERS = ["3", "7", "12"]


def image(n=4):
    return torch.randn(n, 1, 4, 4, generator=torch.Generator().manual_seed(3))


def made(model, **settings):
    settings = {"include": LAYERS, "sparsity": 0.75, "block": (4, 4), **FAST, **settings}
    return SynapticPruner(model, **settings)


def train(model, pruner, optimizer, steps, seed=1):
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for _ in range(steps):
        x = torch.randn(8, 1, 4, 4, generator=generator)
        optimizer.zero_grad()
        model(x).square().mean().backward()
        optimizer.step()
        pruner.step()
    model.eval()


# -- where scales come from -------------------------------------------------------------------


def test_scales_are_found_through_homogeneous_steps_only():
    model = cnn()
    found = input_scales(model, {n: model.get_submodule(n) for n in ("0", *LAYERS, "15")})
    assert [(s.norm, s.repeat, s.pushable) for s in found.values()] == [
        (None, 1, False),
        ("1", 1, True),
        ("4", 1, True),
        ("8", 4, True),
        ("13", 1, True),
    ]
    assert "model's input" in found["0"].reason
    model = Residual()
    names = ("a", "b", "c", "d", "e", "up")
    found = input_scales(model, {n: model.get_submodule(n) for n in names})
    assert found["a"].norm == found["b"].norm == "norm"
    assert found["a"].pushable
    assert found["b"].pushable
    assert "add" in found["c"].reason  # the residual sum
    assert "c, a Conv2d" in found["d"].reason
    assert "gelu" in found["e"].reason
    # With one of its consumers left alone, batch norm has to stay.
    found = input_scales(model, {"a": model.a})
    assert found["a"].norm == "norm"
    assert not found["a"].pushable
    assert "also goes to b" in found["a"].reason


def test_what_else_reads_a_map_or_a_batch_norm_keeps_its_scale_in_place():
    class Reads(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.stem, self.norm = nn.Linear(4, 16), nn.BatchNorm1d(16)
            self.next, self.how = nn.Linear(16, 16), how

        def forward(self, x):
            x = self.norm(self.stem(x))
            if self.how == "shape":
                assert x.size(0) is not None
            if self.how == "twice":
                x = self.norm(x)
            if self.how == "layer twice":
                x = self.next(x)
            y = self.next(torch.relu(x))
            if self.how == "output":
                return y, x
            return y + self.norm.bias if self.how == "parameter" else y

    def scale(how):
        model = Reads(how)
        return input_scales(model, {"next": model.next}, {"norm": 0})["next"]

    assert scale("shape").pushable
    for how in ("output", "parameter"):
        assert scale(how).norm == "norm"
        assert not scale(how).pushable
    assert "called 2 times" in scale("twice").reason
    assert "called 2 times" in scale("layer twice").reason


@pytest.mark.parametrize(
    ("flat", "found"),
    [
        (lambda x: x.view(x.size(0), -1), True),
        (lambda x: x.view(x.shape[0], -1), True),
        (lambda x: x.relu().reshape(x.size(0), -1), True),
        (lambda x: x.flatten(1), True),
        (lambda x: torch.flatten(x, 1), True),
        (lambda x: x.mean((2, 3)), True),
        (lambda x: x.mean(dim=[-2, -1]), True),
        (lambda x: F.pad(x.mean(3).relu(), (1, 1)).flatten(1), False),
        (lambda x: x.permute(0, 2, 3, 1).flatten(1), False),  # channels go last
        (lambda x: x.flatten(2).transpose(1, 2), False),
        (lambda x: torch.sigmoid(x).flatten(1), False),
    ],
)
def test_flattening_repeats_channels_in_order(flat, found):
    class Net(nn.Module):
        def __init__(self, inputs):
            super().__init__()
            torch.manual_seed(0)
            self.conv, self.norm = nn.Conv2d(1, 6, 3), nn.BatchNorm2d(6)
            self.fc = nn.Linear(inputs, 5)

        def forward(self, x):
            return self.fc(flat(F.relu(self.norm(self.conv(x)))))

    inputs = flat(torch.zeros(2, 6, 2, 2)).shape[-1]
    model = randomize(Net(inputs))
    scale = input_scales(model, {"fc": model.fc})["fc"]
    assert scale.pushable == found
    if found:
        assert scale.repeat == inputs // 6
        want = model(image())
        SynapticPruner(model, include="fc", block=(2, 2), **FAST)
        torch.testing.assert_close(model(image()), want, rtol=1e-5, atol=1e-5)


class Behind(nn.Module):
    """A batch norm, something between, and a linear layer."""

    def __init__(self, front, norm, between, features=6):
        super().__init__()
        self.front, self.norm, self.between = front, norm, between
        self.fc = nn.Linear(features, 5)

    def forward(self, x):
        return self.fc(self.between(self.norm(self.front(x))))


@pytest.mark.parametrize(
    ("front", "norm", "between", "shape"),  # sizes are such that channels seem to fit
    [
        (nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), lambda y: y.mean(2), (2, 1, 4, 6)),
        (nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6), lambda y: y.mean((-1, 1)), (2, 1, 6, 4)),
        (nn.Conv1d(1, 6, 3, padding=1), nn.BatchNorm1d(6), F.relu, (2, 1, 6)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), F.relu, (2, 6, 4)),
        (nn.Linear(4, 6), nn.BatchNorm1d(6), lambda y: F.max_pool1d(y, 3, 1, 1), (2, 4)),
        (nn.Flatten(), nn.BatchNorm1d(6), lambda y: F.max_pool1d(y, 3, 1, 1), (2, 3, 2)),
        (
            nn.Conv1d(1, 6, 3, padding=1),
            nn.BatchNorm1d(6),
            lambda y: y.view(y.size(1), -1),
            (6, 1, 6),
        ),
        (
            nn.Conv1d(1, 6, 3, padding=1),
            nn.BatchNorm1d(6),
            lambda y: y.flatten(end_dim=1),
            (2, 1, 6),
        ),
    ],
    ids=["mean", "mean-channels", "maps", "tokens", "pool", "pool-flat", "view", "flatten"],
)
def test_channels_along_another_axis_keep_their_scale(front, norm, between, shape):
    torch.manual_seed(0)
    x = torch.randn(shape)
    features = between(norm(front(x))).shape[-1]
    model = randomize(Behind(front, norm, between, features), positive=True)
    want, gamma = model(x), model.norm.weight.detach().clone()
    scale = input_scales(model, {"fc": model.fc})["fc"]
    assert scale.norm is None
    with pytest.raises(ValueError, match="pass batches"):
        SynapticPruner(model, include="fc", block=(2, 2), **FAST)
    SynapticPruner(model, include="fc", block=(2, 2), batches=[x], **FAST)  # it measures
    assert torch.equal(model.norm.weight, gamma)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)


def test_batches_tell_what_batch_norm_sees():
    model = randomize(Behind(nn.Linear(4, 6), nn.BatchNorm1d(6), F.relu), positive=True)
    layers = {"fc": model.fc}
    assert "[N, C] or [N, C, L]" in input_scales(model, layers)["fc"].reason
    assert input_scales(model, layers, {"norm": 0})["fc"].pushable
    x = torch.randn(8, 4)
    want = model(x)
    SynapticPruner(model, include="fc", block=(2, 2), batches=[x], **FAST)
    assert bool((model.norm.weight == 1).all())
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)


def test_a_layer_behind_that_sees_other_axes_keeps_the_scale_of_all_in_place():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.conv, self.fc = nn.Conv2d(6, 4, 1), nn.Linear(6, 4)

        def forward(self, x):
            x = self.norm(self.stem(x)).relu()
            return self.conv(x).sum() + self.fc(x).sum()  # the linear layer along the width

    model = randomize(Two())
    found = input_scales(model, {"conv": model.conv, "fc": model.fc})
    assert found["conv"].norm == "norm"
    assert "also goes to fc" in found["conv"].reason
    assert found["fc"].norm is None
    x = torch.randn(2, 1, 4, 6)
    want = model(x)
    SynapticPruner(model, include=["conv", "fc"], batches=[x], block=(2, 2), **FAST)
    torch.testing.assert_close(model(x), want, rtol=1e-5, atol=1e-6)


def test_a_graph_that_is_not_the_model_is_found_out_and_undone():
    class Lies(nn.Module):
        """Reads the scale of batch norm in a way that no graph shows."""

        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.stem, self.norm = nn.Conv2d(1, 6, 3, padding=1), nn.BatchNorm2d(6)
            self.conv = nn.Conv2d(6, 4, 1)

        def forward(self, x):
            y = self.conv(self.norm(self.stem(x)).relu())
            return y if isinstance(x, torch.fx.Proxy) else y * float(self.norm.weight.sum())

    model = randomize(Lies())
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    with pytest.raises(ValueError, match=r"moving the scales of batch norms \(norm\).*exclude"):
        SynapticPruner(model, include="conv", batches=[image()], block=(2, 2), **FAST)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))


# -- the conversion ---------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["connection", "block"])
@pytest.mark.parametrize("tied", [False, True])
def test_conversion_changes_the_outputs_by_rounding_only(per, tied):
    model = cnn()
    want, old = model(image()), copy.deepcopy(model)
    made(model, per=per, tie_kernel=tied)
    assert (model(image()) - want).abs().max() < 1e-5
    for index in (1, 4, 8):
        gamma, now = old[index].weight, model[index].weight
        assert bool((gamma < 0).any())
        assert torch.equal(now[gamma > 0], torch.ones_like(now[gamma > 0]))
        assert torch.equal(now[gamma <= 0], gamma[gamma <= 0])
        assert torch.allclose(
            model[index].bias, old[index].bias / gamma.where(gamma > 0, 1.0), rtol=1e-6
        )
    model.train()
    old.train()
    torch.manual_seed(5)
    want = old(image())
    torch.manual_seed(5)  # of dropout
    torch.testing.assert_close(model(image()), want, rtol=1e-4, atol=1e-5)


def test_conversion_with_several_consumers_and_sums():
    model = Residual()
    want, gamma = model(image()), model.norm.weight.detach().clone()
    pruner = SynapticPruner(
        model, include=["a", "b", "c", "d", "e", "up"], batches=[image()], block=(4, 4), **FAST
    )
    assert (model(image()) - want).abs().max() < 1e-5
    assert torch.equal(model.norm.weight == 1, gamma > 0)
    assert pruner.scores()["up"].shape == (16, 16)
    alone = Residual()
    SynapticPruner(alone, include=["a"], block=(4, 4), **FAST)  # b would not know
    assert torch.equal(alone.norm.weight, gamma)
    assert (alone(image()) - want).abs().max() < 1e-5


def test_strengths_are_scales_times_norms():
    model = cnn()
    gamma, weight = model[1].weight.detach().clone(), model[3].weight.detach().clone()
    pruner = made(model)
    norms = weight.flatten(2).norm(dim=2)
    torch.testing.assert_close(pruner.scores()["3"], norms * gamma.abs(), rtol=1e-5, atol=1e-7)
    s = model[3].parametrizations.weight.original0
    torch.testing.assert_close(s, norms * gamma.where(gamma > 0, 1.0), rtol=1e-5, atol=1e-7)


def test_measured_scales_are_root_mean_squares():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(16, 24), nn.GELU(), nn.Linear(24, 8))
    x = torch.randn(50, 3, 16)
    pruner = SynapticPruner(model, batches=[x[:20], (x[20:], None)], block=(4, 4), **FAST)
    for name, inputs in (("0", x), ("2", model[:2](x))):
        rms = inputs.square().mean((0, 1)).sqrt()
        want = model.get_submodule(name).weight.abs() * rms
        torch.testing.assert_close(pruner.scores()[name], want, rtol=1e-5, atol=1e-7)


# -- training ---------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["connection", "block"])
def test_shrinking_is_the_proximal_step_with_exact_zeros(per):
    model = cnn()
    pruner = made(model, per=per, lr_sum=None, penalty=0.5)
    before = {n: model.get_submodule(n).parametrizations.weight.original0.clone() for n in LAYERS}
    for name in LAYERS:  # signs may change in training
        model.get_submodule(name).parametrizations.weight.original0.data[0] *= -1
        before[name][0] *= -1
    pruner.step(lr=0.1)
    zeros = total = 0
    for name, s in before.items():
        size = 1 if name == "12" else 9
        if per == "block":
            size = 16  # 24x16, 16x12 per group, 20x64: all blocks are whole
        want = s.sign() * (s.abs() - 0.1 * 0.5 * math.sqrt(size)).clamp(min=0)
        now = model.get_submodule(name).parametrizations.weight.original0
        torch.testing.assert_close(now, want, rtol=0, atol=1e-7)
        gone = s.abs() < 0.1 * 0.5 * math.sqrt(size) - 1e-6
        assert bool((now[gone] == 0).all())
        zeros, total = zeros + int((now == 0).sum()), total + now.numel()
    assert 0 < zeros < total
    assert pruner.zeros == zeros / total


def test_ragged_blocks_shrink_by_the_weights_they_have():
    layer = nn.Linear(5, 6)
    strengths = StrengthLayer(layer, Synapses.of("test", layer, (4, 4), False))
    before = strengths.s.clone()
    strengths.shrink(0.01)
    sizes = torch.tensor([[16.0, 4.0], [8.0, 2.0]])
    torch.testing.assert_close(strengths.s, before - 0.01 * sizes.sqrt())


def test_gradients_are_those_of_the_formula():
    torch.manual_seed(0)
    layer = nn.Conv2d(4, 6, 3).double()
    strengths = StrengthLayer(layer, Synapses.of("test", layer, (1, 1), True))
    with torch.no_grad():
        strengths.v[2, 1] = 0  # a dead kernel is no NaN
        strengths.s[0, 0] *= -2
    x = torch.randn(2, 4, 5, 5, dtype=torch.float64)
    layer(x).square().sum().backward()
    s, v = (p.detach().clone().requires_grad_() for p in (strengths.s, strengths.v))
    w = s[..., None, None] * v / (v.square().sum((2, 3), keepdim=True) + 1e-30).sqrt()
    F.conv2d(x, w, layer.bias).square().sum().backward()
    torch.testing.assert_close(strengths.s.grad, s.grad)
    alive = torch.ones(6, 4, dtype=torch.bool)
    alive[2, 1] = False
    torch.testing.assert_close(strengths.v.grad[alive], v.grad[alive])
    assert bool(strengths.v.grad.isfinite().all())


def test_learning_rates_are_those_of_the_steps_that_were_taken():
    model = cnn()
    pruner = made(model, lr_sum=None, penalty=1.0)
    s = model[3].parametrizations.weight.original0
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.01)
    pruner.attach(optimizer)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.0 if step else 1.0)
    optimizer.zero_grad(set_to_none=False)  # gradients are None: SGD moves nothing
    start = s.detach().clone()
    optimizer.step()
    schedule.step()  # the learning rate is 0 by now
    assert optimizer.param_groups[0]["lr"] == 0
    pruner.step()
    torch.testing.assert_close(s, (start - 0.03).clamp(min=0), rtol=0, atol=1e-7)
    after = s.detach().clone()
    pruner.step()  # no step was taken
    assert torch.equal(s, after)
    pruner.step(lr=0.01)
    torch.testing.assert_close(s, (after - 0.03).clamp(min=0), rtol=0, atol=1e-7)


def test_default_penalty_shrinks_by_a_share_of_the_median():
    model = cnn()
    pruner = made(model, lr_sum=2.0, shrinkage=0.5)
    relative = torch.cat(
        [
            model.get_submodule(n).parametrizations.weight.original0.detach().flatten()
            / (1 if n == "12" else 3)
            for n in LAYERS
        ]
    )
    assert pruner.penalty == pytest.approx(0.5 * float(relative.median()) / 2.0, rel=1e-6)
    for _ in range(20):
        pruner.step(lr=0.1)
    assert pruner.zeros == pytest.approx(
        float((relative <= 0.5 * relative.median()).float().mean())
    )


def test_pushed_scales_stay_one_and_others_learn():
    model = cnn()
    gamma = model[1].weight.detach().clone()
    pruner = made(model)
    optimizer = torch.optim.Adam(pruner.parameter_groups(), lr=0.01)
    pruner.attach(optimizer)
    train(model, pruner, optimizer, 3)
    assert bool((model[1].weight[gamma > 0] == 1).all())
    moved = model[1].weight[gamma <= 0] != gamma[gamma <= 0]
    assert moved.float().mean() > 0.5  # but for channels that ReLU shuts
    pruner.prune()
    train(model, pruner, torch.optim.Adam(model.parameters(), lr=0.01), 1)
    assert bool((model[1].weight[gamma > 0] != 1).any())  # free again


def test_decay_of_strengths_is_refused():
    model = cnn()
    pruner = made(model)
    with pytest.raises(ValueError, match=r"decays the strengths.*parameter_groups"):
        pruner.attach(torch.optim.AdamW(model.parameters(), lr=0.01))
    model = cnn()
    pruner = made(model)
    groups = pruner.parameter_groups(weight_decay=0.1)
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters())
    optimizer = torch.optim.AdamW(groups, lr=0.01)
    pruner.attach(optimizer)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1, 0.0]
    optimizer.param_groups[1]["weight_decay"] = 0.1
    model(image()).sum().backward()
    optimizer.step()
    with pytest.raises(ValueError, match="decays"):
        pruner.step()


def test_every_optimizer_and_group_is_asked_for_decay():
    pruner = made(model := cnn())
    decaying = torch.optim.AdamW(model.parameters(), lr=0.01)
    sparing = torch.optim.Adam(pruner.parameter_groups(), lr=0.01)
    with pytest.raises(ValueError, match="decays the strengths"):
        pruner.attach(decaying, sparing)
    pruner.attach(sparing)  # what was refused has not stayed
    model(image()).sum().backward()
    sparing.step()
    pruner.step()
    assert not decaying._optimizer_step_post_hooks


def test_what_the_constructor_refuses_leaves_the_model_as_it_was():
    model = cnn()
    model(image()).sum().backward()
    before, parameters = copy.deepcopy(model.state_dict()), list(model.parameters())
    gradients = [p.grad for p in parameters]
    optimizer = torch.optim.AdamW(model.parameters())
    for _ in range(2):
        with pytest.raises(ValueError, match="decays the directions"):
            made(model, optimizers=optimizer)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    assert all(p is q for p, q in zip(model.parameters(), parameters, strict=True))
    assert all(p.requires_grad and p.grad is g for p, g in zip(parameters, gradients, strict=True))
    assert not optimizer._optimizer_step_post_hooks
    made(model)  # and it can be pruned


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_strengths_of_half_precision_shrink_by_small_steps(dtype):
    model = cnn().to(dtype)
    pruner = made(model, lr_sum=None, penalty=1.0)
    assert model[3].weight.dtype == dtype
    s = model[3].parametrizations.weight.original0
    before, weight = s.detach().clone(), model[3].weight.detach().clone()
    for _ in range(100):
        pruner.step(lr=1e-4)
    torch.testing.assert_close(s, (before - 0.03).clamp(min=0), rtol=0, atol=1e-5)
    assert model[3].weight.float().norm() < 0.99 * weight.float().norm()
    model(image().to(dtype)).sum().backward()
    pruner.prune()
    assert model[3].weight.dtype == dtype
    late = cnn()
    pruner = made(late)
    late.to(dtype)
    with pytest.raises(RuntimeError, match=r"layer '3' have become.*before making the pruner"):
        pruner.step(lr=0.1)


def test_copies_of_model_pruner_and_optimizer_go_on_alike():
    model = cnn()
    pruner = made(model, lr_sum=None, penalty=1.0)
    optimizer = torch.optim.SGD(pruner.parameter_groups(), lr=0.01)
    pruner.attach(optimizer)
    train(model, pruner, optimizer, 1)
    others = copy.deepcopy((model, pruner, optimizer))
    for own in ((model, pruner, optimizer), others):
        torch.manual_seed(7)  # of dropout
        train(*own, 3)
    s, t = (m[3].parametrizations.weight.original0 for m in (model, others[0]))
    assert s is not t
    assert torch.equal(s, t)
    for _, own, _ in ((model, pruner, optimizer), others):
        own.prune()
    assert torch.equal(model(image()), others[0](image()))


@pytest.mark.parametrize("end", ["prune", "remove"])
def test_copies_of_the_model_outlive_the_strengths(end):
    model = cnn()
    pruner = made(model)
    copied, want = copy.deepcopy(model), model(image())
    getattr(pruner, end)()
    torch.testing.assert_close(copied(image()), want)
    masked = copy.deepcopy(model)
    if end == "prune":
        want = masked(image())
        pruner.remove()
        torch.testing.assert_close(masked(image()), want)


def test_refresh_keeps_the_weights_and_moves_states():
    model = cnn()
    pruner = made(model, per="block", refresh=3, lr_sum=None, penalty=0.0)
    optimizer = torch.optim.Adam(pruner.parameter_groups(), lr=0.01)
    pruner.attach(optimizer)
    train(model, pruner, optimizer, 2)
    layer = model[3]
    with torch.no_grad():  # another order is better now
        layer.parametrizations.weight.original1[::3] *= 50
    model(image()).square().mean().backward()
    optimizer.step()
    strength, s = layer.parametrizations.weight[0], layer.parametrizations.weight.original0
    order, weight = strength.row_perm.clone(), layer.weight.detach().clone()
    state = optimizer.state[s]["exp_avg_sq"].clone()
    old = Synapses(strength._blocking, False, order, strength.col_perm.clone())
    pruner.step()
    assert not torch.equal(strength.row_perm, order)
    torch.testing.assert_close(layer.weight, weight, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(s, strength.synapses.norms(weight), rtol=1e-5, atol=1e-7)
    assert not torch.equal(optimizer.state[s]["exp_avg_sq"], state)
    means = strength.synapses.split(Synapses.spread(old, state)).mean((1, 2, 4))
    torch.testing.assert_close(optimizer.state[s]["exp_avg_sq"], means)
    train(model, pruner, optimizer, 1)


def test_refresh_stops_when_strengths_are_no_longer_dense():
    model = cnn()
    pruner = made(model, per="block", refresh=1, lr_sum=None, penalty=1e3)
    order = model[12].parametrizations.weight[0].row_perm.clone()
    pruner.step(lr=1.0)
    assert pruner.zeros == 1.0
    assert torch.equal(model[12].parametrizations.weight[0].row_perm, order)


# -- pruning ----------------------------------------------------------------------------------


def test_kernels_are_ranked_by_strength_over_all_layers():
    model = cnn()
    pruner = made(model, include=["3", "7"], block=(1, 1), tie_kernel=True, sparsity=0.75)
    scores = torch.cat([s.flatten() for s in pruner.scores().values()])
    shapes = {n: s.shape for n, s in pruner.scores().items()}
    report = pruner.prune()
    kept = {n: layout.mask().amax((2, 3)) for n, layout in pruner.layouts().items()}
    assert {n: k.shape for n, k in kept.items()} == shapes
    flat = torch.cat([k.flatten() for k in kept.values()])
    assert int(flat.sum()) == len(flat) - 0.75 * len(flat)
    # The floor takes the best of each row; the others are the strongest of all.
    best = torch.zeros_like(flat)
    start = 0
    for out, inputs in shapes.values():
        for _ in range(out):
            best[start + int(scores[start : start + inputs].argmax())] = True
            start += inputs
    assert bool(flat[best].all())
    assert scores[flat & ~best].min() >= scores[~flat].max()
    shares = [layout.sparsity for layout in pruner.layouts().values()]
    assert abs(shares[0] - shares[1]) > 0.05  # not the same of each layer
    assert report.sparsity == 0.75


@pytest.mark.parametrize("per", ["connection", "block"])
def test_prune_that_is_refused_changes_nothing(per):
    model = cnn()
    block = (4, 4) if per == "block" else (1, 1)
    pruner = made(model, per=per, block=block, execution="sparse")
    pruner.step(lr=0.01)  # the optimizer is not known
    before = copy.deepcopy(model.state_dict())
    for _ in range(2):
        with pytest.raises(RuntimeError, match=r"no optimizer known.*pruner\.attach"):
            pruner.prune()
        assert not pruner.pruned
        with pytest.raises(RuntimeError, match=r"call prune\(\) first"):
            pruner.finalize()
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)
    bad = torch.optim.LBFGS([p for p in model.parameters() if p.requires_grad])
    pruner.attach(bad)
    with pytest.raises((ValueError, RuntimeError)):
        pruner.prune()
    assert not pruner.pruned
    hook = model[3].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="layer '3' has forward_hooks"):
        pruner.prune()
    assert not pruner.pruned
    hook.remove()
    pruner._optimizers = ()
    pruner.attach(torch.optim.SGD(model.parameters(), lr=0.01))
    pruner.prune()
    assert pruner.pruned
    assert pruner.sparsity == pytest.approx(0.75, abs=0.02)


def test_floor_can_be_left_out_and_layers_can_be_ranked_alone():
    model = cnn()
    with torch.no_grad():
        model[3].weight.mul_(1e-3)  # a weak layer
    weak, alone = copy.deepcopy(model), copy.deepcopy(model)
    settings = {"include": ["3", "7"], "block": (1, 1), "tie_kernel": True, "sparsity": 0.7}
    pruner = made(weak, **settings, allow_empty_rows=True)
    pruner.prune()
    assert pruner.layouts()["3"].nnz_blocks == 0
    pruner = made(alone, **settings, scope="layer")
    pruner.prune()
    assert pruner.layouts()["3"].sparsity == pytest.approx(0.7, abs=0.01)


@pytest.mark.parametrize("per", ["connection", "block"])
@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_pruned_finetuned_and_finalized(per, execution):
    model = cnn()
    refresh = 2 if per == "block" else None
    pruner = made(model, per=per, execution=execution, refresh=refresh, scope="layer")
    optimizer = torch.optim.Adam(pruner.parameter_groups(), lr=0.01)
    pruner.attach(optimizer)
    train(model, pruner, optimizer, 5)
    with pytest.raises(RuntimeError, match=r"prune\(\) first"):
        pruner.finalize()
    dense = {n: model.get_submodule(n).weight.detach().clone() for n in LAYERS}
    pruner.prune()
    masks = {n: layout.mask() for n, layout in pruner.layouts().items()}
    for name, layer in pruner.modules().items():
        weight = layer.to_dense().weight if execution == "sparse" else layer.weight
        want = dense[name].where(masks[name], 0.0)
        torch.testing.assert_close(weight, want, rtol=1e-6, atol=0)
        assert masks[name].float().mean() == pytest.approx(0.25, abs=0.02)
    train(model, pruner, optimizer, 3)  # the same optimizer goes on
    held = {id(p) for group in optimizer.param_groups for p in group["params"]}
    assert {id(p) for p in model.parameters()} <= held
    sparse = pruner.finalize()
    assert type(sparse[3]) is SparseConv2d
    assert type(sparse[12]) is SparseLinear
    assert torch.equal(sparse[12].layout.mask(), masks["12"])
    x = image(16)
    torch.testing.assert_close(sparse(x), model(x), rtol=1e-5, atol=1e-6)
    assert not any("parametrizations" in key for key in sparse.state_dict())


def test_block_strengths_decide_under_their_own_order():
    model = cnn()
    pruner = made(model, per="block", block=(4, 8), sparsity=0.5)
    scores = pruner.scores()
    orders = {n: model.get_submodule(n).parametrizations.weight[0] for n in LAYERS}
    pruner.prune()
    kept, others = [], []
    for name, layout in pruner.layouts().items():
        assert torch.equal(layout.row_perm, orders[name].row_perm)
        mask = layout.block_mask()
        rest = mask.clone()
        rest[torch.arange(len(rest)), scores[name].argmax(1)] = False
        kept.append(scores[name][rest])
        others.append(scores[name][~mask])
    assert torch.cat(kept).min() >= torch.cat(others).max()


def test_remove_gives_the_dense_model_back():
    model = cnn()
    parameter = model[3].weight
    pruner = made(model)
    pruner.step(lr=0.01)
    want = model(image())
    assert pruner.remove() is model
    assert model[3].weight is parameter
    assert type(model[3]) is nn.Conv2d
    torch.testing.assert_close(model(image()), want, rtol=1e-6, atol=1e-6)


# -- checkpoints ------------------------------------------------------------------------------


@pytest.mark.parametrize("per", ["connection", "block"])
@pytest.mark.parametrize("pruned", [False, True])
def test_resumes_midway(per, pruned):
    def start():
        model = cnn()
        model.train()
        refresh = 2 if per == "block" else None
        return model, made(model, per=per, refresh=refresh)

    def optimizer_of(pruner):
        optimizer = torch.optim.Adam(pruner.parameter_groups(), lr=0.01)
        pruner.attach(optimizer)
        return optimizer

    def go_on(model, pruner, optimizer):
        torch.manual_seed(7)  # of dropout
        train(model, pruner, optimizer, 3, seed=2)
        if not pruner.pruned:
            pruner.prune()
        return model(image())

    model, pruner = start()
    optimizer = optimizer_of(pruner)
    train(model, pruner, optimizer, 3)
    if pruned:
        pruner.prune()
        optimizer = optimizer_of(pruner)
        train(model, pruner, optimizer, 2)
    saved = copy.deepcopy([pruner.state_dict(), model.state_dict(), optimizer.state_dict()])
    want, layouts = go_on(model, pruner, optimizer), pruner.layouts()

    model, pruner = start()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    pruner.load_state_dict(saved[0])
    model.load_state_dict(saved[1])
    optimizer = optimizer_of(pruner)
    optimizer.load_state_dict(saved[2])
    assert pruner.pruned == pruned
    torch.testing.assert_close(go_on(model, pruner, optimizer), want, rtol=1e-5, atol=1e-6)
    for name, layout in pruner.layouts().items():
        assert torch.equal(layout.mask(), layouts[name].mask())


def test_state_of_another_kind_is_refused():
    state = made(cnn()).state_dict()
    with pytest.raises(ValueError, match="per='connection'"):
        made(cnn(), per="block").load_state_dict(state)
    beyond = made(cnn())
    beyond.prune()
    with pytest.raises(ValueError, match="before prune"):
        beyond.load_state_dict(state)


# -- what is refused --------------------------------------------------------------------------


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(16, 16), nn.BatchNorm1d(16), nn.Linear(16, 16)

    def forward(self, x):
        return self.b(self.norm(self.a(x))) if x.sum() > 0 else x


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"lr_sum": None}, r"one of penalty and lr_sum.*got none"),
        ({"penalty": 0.1}, r"one of penalty and lr_sum.*got both"),
        ({"lr_sum": 0.0}, "lr_sum must be a finite number > 0"),
        ({"lr_sum": None, "penalty": -1.0}, "penalty must be a finite number >= 0"),
        ({"shrinkage": math.inf}, "shrinkage must be"),
        ({"per": "kernel"}, "per must be 'connection' or 'block'"),
        ({"refresh": 10}, "refresh forms blocks anew"),
        ({"refresh": 0, "per": "block"}, "refresh must be a number of steps"),
        ({"importance": "squared"}, "importance is not used"),
        ({"sparsity": 1.0, "allow_empty_rows": True}, "would keep nothing"),
        ({"include": "nothing"}, "matches no module"),
        ({"include": ["0", "3"]}, r"no batch norm.*0: its input comes from the model's input"),
    ],
)
def test_settings_that_are_refused(settings, message):
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match=message):
        made(model, **settings)
    after = model.state_dict()
    assert list(after) == list(before)
    assert all(torch.equal(after[key], before[key]) for key in before)


def test_models_without_batch_norm_or_a_graph_need_batches():
    mlp = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))
    settings = {"block": (4, 4), **FAST}
    with pytest.raises(ValueError, match=r"no batch norm.*pass batches=\[x\]"):
        SynapticPruner(mlp, **settings)
    with pytest.raises(ValueError, match=r"Branches cannot be traced"):
        SynapticPruner(Branches(), **settings)
    with pytest.raises(TypeError, match="iterator"):
        SynapticPruner(mlp, batches=iter([torch.randn(4, 16)]), **settings)
    pruner = SynapticPruner(Branches(), batches=[torch.ones(4, 16)], **settings)
    pruner.prune()
    assert pruner.sparsity > 0.7
    pruner = SynapticPruner(Branches(), batches=[-torch.ones(4, 16)], **settings)
    with pytest.raises(ValueError, match="no batch passed through layer 'a'"):
        pruner.prune()
    pruner = SynapticPruner(mlp, batches=[torch.full((4, 16), math.nan)], **settings)
    with pytest.raises(ValueError, match="not finite"):
        pruner.prune()


def test_steps_that_are_refused():
    model = cnn()
    early = torch.optim.SGD(model.parameters(), lr=0.1)
    pruner = made(model, optimizers=early)
    with pytest.raises(RuntimeError, match=r"strengths of layer '3'.*after the pruner"):
        pruner.step()
    with pytest.raises(ValueError, match="lr must be a number >= 0"):
        pruner.step(lr=-1.0)
    assert pruner.steps == 0
    pruner.prune()
    with pytest.raises(RuntimeError, match="strengths are gone"):
        pruner.prune()
    with pytest.raises(RuntimeError, match="strengths are gone"):
        pruner.scores()
    pruner.remove()
    with pytest.raises(RuntimeError, match="has ended"):
        pruner.step()


def test_options_as_one_object():
    options = LayerOptions(sparsity=0.5, block=(4, 4), sweeps=1)
    pruner = SynapticPruner(cnn(), options, include=LAYERS, lr_sum=1.0)
    pruner.prune()
    assert pruner.sparsity == pytest.approx(0.5, abs=0.01)
