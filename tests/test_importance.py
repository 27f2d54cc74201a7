"""Importances that look at data, against their formulas in float64."""

import copy
import itertools
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tetris import sparsify
from tetris.nn.base import SparseLayer
from tetris.progress import steps
from tetris.prune import ActivationNorm, Cubic, Fisher, Regrow, Taylor, TetrisPruner
from tetris.prune.saliency import layer_saliency

FAST = {"sweeps": 1, "allow_empty_rows": True}


class Mixed(nn.Module):
    """Every kind of layer, a group or two, and what a pass could leave traces in."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(4, 6, 3, padding=1, groups=2)
        self.norm = nn.BatchNorm2d(6)
        self.drop = nn.Dropout(0.5)
        self.up = nn.ConvTranspose2d(6, 4, 2, stride=2, groups=2)
        self.line = nn.Conv1d(4, 5, 3)
        self.head = nn.Linear(5, 3)

    def forward(self, x):
        y = self.drop(F.relu(self.norm(self.conv(x))))
        y = F.relu(self.line(self.up(y).flatten(2)))
        return self.head(y.transpose(1, 2)).mean(1)


LAYERS = ["conv", "up", "line", "head"]


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Mixed()
    model(torch.randn(16, 4, 4, 4))  # statistics of batch norm that are not the initial ones
    model.conv.weight.requires_grad_(False)
    model.head.weight.grad = torch.ones(3, 5)
    return model


@pytest.fixture
def batches():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(n, 4, 4, 4, generator=generator), torch.randint(3, (n,), generator=generator))
        for n in (5, 2, 4)
    ]


def layers_of(model):
    return {name: model.get_submodule(name) for name in LAYERS}


def gradients(model, x, target):
    """Of each layer's weight, by finite reference: a float64 copy, backward, nothing shared."""
    model = copy.deepcopy(model).double().eval()
    for name in LAYERS:
        model.get_submodule(name).weight.requires_grad_(True).grad = None
    F.cross_entropy(model(x.double()), target).backward()
    return {name: model.get_submodule(name).weight.grad for name in LAYERS}


def scores(importance, model):
    layers = layers_of(model)
    importance.prepare(model, layers)
    return {name: importance(name, layer) for name, layer in layers.items()}


def weights(model):
    return {name: model.get_submodule(name).weight.detach().double() for name in LAYERS}


def assert_scores(found, expected):
    for name, value in expected.items():
        assert value.any()
        error = (found[name].double() - value).abs().max() / value.abs().max()
        assert error < 1e-5, name


def test_taylor_is_the_mean_over_batches_of_weight_times_gradient(model, batches):
    found = scores(Taylor(batches, F.cross_entropy), model)
    each = [gradients(model, x, t) for x, t in batches]
    w = weights(model)
    assert_scores(found, {n: sum((w[n] * g[n]).abs() for g in each) / 3 for n in LAYERS})


def test_taylor_predicts_what_the_loss_loses_without_a_small_weight(model, batches):
    x, target = batches[0]
    model = model.double().eval()
    model.head.weight.data[1, 2] = 1e-4
    worth = scores(Taylor([(x.double(), target)], F.cross_entropy), model)["head"][1, 2]
    before = F.cross_entropy(model(x.double()), target)
    model.head.weight.data[1, 2] = 0.0
    change = F.cross_entropy(model(x.double()), target) - before
    assert change.abs().item() == pytest.approx(worth.item(), rel=1e-3)


def test_fisher_squares_the_gradients_of_batches(model, batches):
    found = scores(Fisher(batches, F.cross_entropy), model)
    each = [gradients(model, x, t) for x, t in batches]
    w = weights(model)
    assert_scores(found, {n: w[n] ** 2 * sum(g[n] ** 2 for g in each) / 3 for n in LAYERS})


def test_fisher_per_sample_squares_the_gradients_of_samples(model, batches):
    found = scores(Fisher(batches, F.cross_entropy, per_sample=True), model)
    each = [gradients(model, x[i : i + 1], t[i : i + 1]) for x, t in batches for i in range(len(x))]
    assert len(each) == 11
    w = weights(model)
    assert_scores(found, {n: w[n] ** 2 * sum(g[n] ** 2 for g in each) / 11 for n in LAYERS})


def test_activation_norm_is_magnitude_times_norm_of_each_input_channel(model, batches):
    found = scores(ActivationNorm(batches), model)
    reference = copy.deepcopy(model).double().eval()
    seen = {name: [] for name in LAYERS}
    for name in LAYERS:
        reference.get_submodule(name).register_forward_pre_hook(
            lambda m, args, name=name: seen[name].append(args[0].detach())
        )
    for x, _ in batches:
        reference(x.double())
    expected = {name: torch.empty_like(w) for name, w in weights(model).items()}
    for name, w in weights(model).items():
        channel_dim = {"conv": 1, "up": 1, "line": 1, "head": 2}[name]
        for index in itertools.product(*map(range, w.shape)):
            if name == "up":  # [in, out / groups, kh, kw]
                channel = index[0]
            elif name == "conv":  # six outputs in two groups, each sees two of four inputs
                channel = index[0] // 3 * 2 + index[1]
            else:
                channel = index[1]
            squares = sum(x.select(channel_dim, channel).square().sum() for x in seen[name])
            expected[name][index] = w[index].abs() * squares.sqrt()
    assert_scores(found, expected)


def test_activation_norm_takes_single_images():
    conv = nn.Conv2d(3, 2, 1)
    x = torch.randn(3, 5, 7)
    model = nn.Sequential(conv)
    norm = ActivationNorm([x])
    norm.prepare(model, {"0": conv})
    norms = torch.tensor([x[c].norm() for c in range(3)])
    torch.testing.assert_close(norm("0", conv), conv.weight.abs() * norms[:, None, None])


PROVIDERS = {
    "taylor": lambda b: Taylor(b, F.cross_entropy),
    "fisher": lambda b: Fisher(b, F.cross_entropy),
    "fisher-samples": lambda b: Fisher(b, F.cross_entropy, per_sample=True),
    "activation-norm": ActivationNorm,
}


@pytest.fixture(params=PROVIDERS)
def provider(request):
    return PROVIDERS[request.param]


def test_sparse_layers_are_rated_as_the_dense_ones_with_the_same_weight(model, batches, provider):
    model.eval()
    selected = {"include": LAYERS, "block": (2, 2), "sparsity": 0.5, **FAST}
    sparse = sparsify(model, **selected)
    dense = copy.deepcopy(model)
    for name in LAYERS:
        layer = sparse.get_submodule(name)
        assert isinstance(layer, SparseLayer)
        dense.get_submodule(name).weight = layer.to_dense().weight
    importance = provider(batches)
    expected = scores(importance, dense)
    found = scores(importance, sparse)
    for name, layer in layers_of(sparse).items():
        packed = layer.layout.pack(layer.oriented(expected[name], layer.layout.groups))
        assert packed.any()
        assert found[name].shape == layer.values.shape
        torch.testing.assert_close(found[name], packed, rtol=1e-3, atol=1e-6 * packed.max().item())


def test_masked_weights_are_rated_as_they_are_and_removed_ones_are_worth_nothing(
    model, batches, provider
):
    importance = provider(batches)
    pruner = TetrisPruner(model, sparsity=0.4, include=LAYERS, block=(1, 1), **FAST)
    dense = copy.deepcopy(pruner.finalize())
    plain = Mixed().eval()
    plain.load_state_dict({k: v for k, v in model.state_dict().items() if "param" not in k}, False)
    for name in LAYERS:
        plain.get_submodule(name).weight = dense.get_submodule(name).to_dense().weight
        plain.get_submodule(name).bias = dense.get_submodule(name).to_dense().bias
    expected, found = scores(importance, plain), scores(importance, model)
    for name in LAYERS:
        torch.testing.assert_close(found[name], expected[name])
        assert not found[name][plain.get_submodule(name).weight == 0].any()


@pytest.mark.parametrize("mode", [True, False])
def test_nothing_is_left_behind(model, batches, provider, mode):
    model.train(mode)
    model.norm.eval()  # frozen, as in fine-tuning
    model.register_buffer("calls", torch.zeros(()))
    model.register_forward_hook(lambda m, *_: m.calls.add_(torch.rand(())) and None)
    before = copy.deepcopy(model.state_dict())
    buffers = dict(model.named_buffers())
    needs = {n: p.requires_grad for n, p in model.named_parameters()}
    grads = {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters()}
    modes = {n: m.training for n, m in model.named_modules()}
    random = torch.get_rng_state()
    scores(provider(lambda: ((x + torch.rand(()) * 0, t) for x, t in batches)), model)
    assert torch.equal(torch.get_rng_state(), random)
    assert modes == {n: m.training for n, m in model.named_modules()}
    assert needs == {n: p.requires_grad for n, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        assert (parameter.grad is None) == (grads[name] is None)
        assert parameter.grad is None or torch.equal(parameter.grad, grads[name])
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert all(buffer is buffers[name] for name, buffer in model.named_buffers())
    assert not any(m._forward_hooks for m in model.children())
    assert torch.backends.mha.get_fastpath_enabled()


def test_an_error_leaves_nothing_behind_either(model, batches):
    def fails(outputs, target):
        raise ZeroDivisionError

    model.train()
    with pytest.raises(ZeroDivisionError):
        scores(Taylor(batches, fails), model)
    assert model.training
    assert not model.conv.weight.requires_grad
    with pytest.raises(
        ValueError, match=r"ActivationNorm: the model does not take the inputs.*3, 4"
    ):
        scores(ActivationNorm([torch.ones(1, 3, 4, 4)]), model)
    assert model.training
    assert not model.conv._forward_hooks


def test_scores_work_inside_no_grad_and_inference_mode(model, batches, provider):
    expected = scores(provider(batches), model)
    for context in (torch.no_grad(), torch.inference_mode()):
        with context:
            found = scores(provider(batches), model)
        for name in LAYERS:
            assert torch.equal(found[name], expected[name])


def test_dropout_is_off_and_batch_norm_uses_its_statistics(model, batches, provider):
    expected = scores(provider(batches), model.eval())
    found = scores(provider(batches), model.train())
    for name in LAYERS:
        assert torch.equal(found[name], expected[name])


def test_batches_come_in_many_forms():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(4, 2)

        def forward(self, a, b):
            return self.linear(a) + self.linear(b)

    model = Two()
    a, b, target = torch.randn(3, 4), torch.randn(3, 4), torch.randn(3, 2)

    def worth(batches, loss=F.mse_loss, per_sample=False):
        fisher = Fisher(batches, loss, per_sample=per_sample)
        fisher.prepare(model, {"linear": model.linear})
        return fisher("linear", model.linear)

    def alone(outputs):
        return F.mse_loss(outputs, target)

    expected = worth([((a, b), target)])
    for batch in (([a, b], target), [{"a": a, "b": b}, target], ({"b": b, "a": a}, target)):
        assert torch.equal(worth([batch]), expected)
        assert torch.equal(worth(lambda batch=batch: iter([batch])), expected)
    for batch in (((a, b),), {"a": a, "b": b}):
        assert torch.equal(worth([batch], alone), expected)
    each = [((a[i : i + 1], b[i : i + 1]), target[i : i + 1]) for i in range(3)]
    for batch in (((a, b), target), ({"a": a, "b": b}, target)):
        assert torch.equal(worth([batch], per_sample=True), worth(each))


def test_layers_that_share_a_weight_are_worth_its_gradient_once():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    x = torch.randn(4, 8)
    taylor = Taylor([x], lambda y: y.square().mean())
    _, report = sparsify(
        model, block=(1, 1), sparsity=0.5, importance=taylor, return_report=True, **FAST
    )
    (gradient,) = torch.autograd.grad(model(x).square().mean(), [model[0].weight])
    taylor.prepare(model, {"0": model[0], "2": model[2]})
    total = taylor("0", model[0]) + taylor("2", model[2])
    torch.testing.assert_close(total, (model[0].weight * gradient).abs())
    best = total.flatten().topk(32).values.sum() / total.sum()
    assert report.layers[0].retained == pytest.approx(best.item(), rel=1e-4)


def test_encoder_layers_do_not_hide_their_linear_layers():
    encoder = nn.TransformerEncoderLayer(16, 2, 32, batch_first=True).eval()
    x = torch.randn(2, 5, 16)
    norm = ActivationNorm([x])
    norm.prepare(encoder, {"linear1": encoder.linear1})
    assert norm("linear1", encoder.linear1).any()


# -- in sparsify and the pruners ------------------------------------------------------------------


def mlp():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU(), nn.Linear(32, 4)
    )


def pairs():
    generator = torch.Generator().manual_seed(1)
    return [
        (torch.randn(8, 16, generator=generator), torch.randint(4, (8,), generator=generator))
        for _ in range(3)
    ]


def train(model, pruner, optimizer, steps):
    for x, target in itertools.islice(itertools.cycle(pairs()), steps):
        optimizer.zero_grad()
        F.cross_entropy(model(x), target).backward()
        optimizer.step()
        pruner.step()


def test_sparsify_keeps_the_blocks_that_score(provider):
    model = mlp()
    importance = provider(pairs())
    sparse = sparsify(
        model,
        sparsity=0.75,
        block=(2, 2),
        reorder=False,
        importance=importance,
        exclude="4",
        **FAST,
    )
    for name in ("0", "2"):
        worth = layer_saliency("here", name, model.get_submodule(name), importance)
        sums = worth.unflatten(1, (-1, 2)).unflatten(0, (-1, 2)).sum((1, 3))
        kept = sparse.get_submodule(name).layout.block_mask()
        assert sums[kept].min() >= sums[~kept].max()


def test_inputs_that_are_always_zero_are_worth_nothing():
    x = torch.randn(32, 16)
    x[:, 8:] = 0
    model = mlp()
    model[0].weight.data[:, 8:] *= 100  # magnitude falls for these
    for importance in (
        ActivationNorm([x]),
        Taylor([x], lambda y: y.square().mean()),
        Fisher([x], lambda y: y.square().mean()),
    ):
        sparse = sparsify(model, sparsity=0.5, include="0", importance=importance, **FAST)
        assert torch.equal(sparse[0].layout.mask()[:, :8], torch.ones(32, 8, dtype=torch.bool))


def test_importances_are_prepared_once_a_round_with_the_layers_they_rate():
    class Spy:
        def __init__(self):
            self.calls = []

        def prepare(self, model, layers):
            self.calls.append((sorted(layers), model[0].weight.detach().clone()))

        def __call__(self, name, layer):
            assert self.calls
            return layer.weight.abs()

    everywhere, first = Spy(), Spy()
    model = mlp()
    settings = {
        "importance": everywhere,
        "sparsity": 0.75,
        "overrides": {"0": {"importance": first}, "2": {"importance": first}},
        **FAST,
    }
    sparsify(model, **settings)
    assert [names for names, _ in everywhere.calls] == [["4"]]
    assert [names for names, _ in first.calls] == [["0", "2"]]
    pruner = TetrisPruner(model, schedule=Cubic(0, 4, every=2), **settings)
    optimizer = torch.optim.SGD(model.parameters(), 0.5)
    train(model, pruner, optimizer, 4)
    assert len(first.calls) == len(everywhere.calls) >= 4
    seen = [weight for _, weight in first.calls[1:]]
    assert not torch.equal(seen[-1], seen[-2])  # the weights as they were then
    assert (seen[-1] == 0).sum() > (seen[-2] == 0).sum()


def test_stored_blocks_are_chosen_as_the_masked_ones_are(provider):
    def run(execution):
        model = mlp()
        optimizer = torch.optim.SGD(model.parameters(), 0.1, momentum=0.9)
        pruner = TetrisPruner(
            model,
            importance=provider(pairs()),
            schedule=Cubic(0, 6),
            sparsity=0.8,
            block=(4, 4),
            exclude="4",
            execution=execution,
            optimizers=optimizer,
            **FAST,
        )
        train(model, pruner, optimizer, 8)
        return {name: layout.mask() for name, layout in pruner.layouts().items()}

    masked, sparse = run("masked"), run("sparse")
    for name, mask in masked.items():
        assert torch.equal(mask, sparse[name])


def test_regrowth_does_not_see_the_batches_of_an_importance(monkeypatch):
    from tetris.prune import regrow

    seen = []
    original = regrow.block_gradients
    monkeypatch.setattr(
        regrow,
        "block_gradients",
        lambda layer, pairs: seen.append(len(pairs)) or original(layer, pairs),
    )
    model = mlp()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = TetrisPruner(
        model,
        importance=Taylor(pairs(), F.cross_entropy),
        sparsity=0.5,
        block=(4, 4),
        exclude="4",
        execution="sparse",
        optimizers=optimizer,
        regrow=Regrow(every=2),
        **FAST,
    )
    train(model, pruner, optimizer, 4)
    assert seen == [1] * 4  # two layers, two updates, one training batch in each


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: Taylor(iter(pairs()), F.cross_entropy), TypeError, "only gives them once.*islice"),
        (lambda: ActivationNorm(x for x in pairs()), TypeError, "only gives them once"),
        (lambda: ActivationNorm(torch.ones(2, 16)), TypeError, "for one batch pass"),
        (lambda: ActivationNorm(3), TypeError, "must be an iterable"),
        (lambda: Taylor(pairs(), nn.CrossEntropyLoss), TypeError, "make an instance"),
        (lambda: Fisher(pairs(), 0.5), TypeError, "loss must be a function"),
        (lambda: ActivationNorm([]), ValueError, "at least one"),
        (lambda: ActivationNorm(lambda: None), TypeError, "must return an iterable"),
        (lambda: ActivationNorm([tuple(torch.ones(3, 2, 16))]), ValueError, "tuple of their own"),
        (lambda: Taylor([torch.ones(2, 16)], lambda y: y.sum(1)), ValueError, r"shape \[2\]"),
        (lambda: Taylor([torch.ones(2, 16)], lambda y: 1.0), ValueError, "one number.*got 1.0"),
        (
            lambda: Taylor([torch.ones(2, 16)], lambda y: y.detach().sum()),
            ValueError,
            "no gradient",
        ),
        (
            lambda: Fisher([(torch.ones(2, 16), 1)], lambda y, t: y.sum(), per_sample=True),
            TypeError,
            "per_sample=True slices tensors",
        ),
        (
            lambda: Fisher(
                [(torch.ones(2, 16), torch.ones(3))], lambda y, t: y.sum(), per_sample=True
            ),
            ValueError,
            r"one first dimension.*\[2, 3\]",
        ),
        (lambda: Taylor, TypeError, "object of the class, such as Taylor.batches"),
    ],
)
def test_errors_say_what_to_do(make, error, match):
    with pytest.raises(error, match=match):
        sparsify(mlp(), importance=make(), **FAST)


def test_layers_that_take_no_part_are_named():
    class Half(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.idle = nn.Linear(16, 8), nn.Linear(16, 8)

        def forward(self, x):
            return self.used(x)

    x = torch.ones(2, 16)
    with pytest.raises(ValueError, match="does not depend on layer 'idle'.*exclude"):
        sparsify(Half(), importance=Taylor([x], torch.sum), **FAST)
    with pytest.raises(ValueError, match="no batch passed through layer 'idle'.*exclude"):
        sparsify(Half(), importance=ActivationNorm([x]), **FAST)
    sparsify(Half(), importance=ActivationNorm([x]), exclude="idle", sparsity=0.5, **FAST)


def test_scores_of_other_layers_than_the_prepared_ones_are_refused(provider):
    model = mlp()
    importance = provider(pairs())
    with pytest.raises(RuntimeError, match="prepare.model, layers. must come before layer '0'"):
        importance("0", model[0])
    importance.prepare(model, {"0": model[0]})
    with pytest.raises(RuntimeError, match="again when its weights change shape"):
        importance("0", model[2])


@pytest.mark.parametrize("rate", [Taylor, Fisher, partial(Fisher, per_sample=True), ActivationNorm])
def test_progress_is_shown_on_standard_error(model, batches, rate, capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    loss = () if rate is ActivationNorm else (F.cross_entropy,)
    quiet = scores(rate(batches, *loss), model)
    assert not capsys.readouterr().err
    for source in (batches, lambda: iter(batches)):
        found = scores(rate(source, *loss, progress=True), model)
        assert all(torch.equal(found[name], quiet[name]) for name in LAYERS)
        shown = capsys.readouterr()
        assert "of batches" in shown.err
        assert not shown.out
    with steps(True, "around", 1):  # as a target measures: one bar at a time
        scores(rate(batches, *loss, progress=True), model)
    shown = capsys.readouterr()
    assert "around" in shown.err
    assert "of batches" not in shown.err
