"""DCPPruner: what it chooses, where it stops, and what becomes of the model."""

import copy
import itertools
import math

import pytest
import torch
from rich.live import Live
from torch import nn
from torch.nn import functional as F

from tetris import SparseConv2d
from tetris.nn.kinds import oriented
from tetris.prune import DCPPruner, SharedOrder
from tetris.prune.dcp.atoms import Atoms
from tetris.prune.dcp.forward import Forward
from tetris.prune.dcp.greedy import Objective, select_atoms
from tetris.prune.dcp.heads import Head

PRUNED = ["3", "6"]


def cnn():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace=True),
        nn.Conv2d(16, 24, 3, stride=2), nn.BatchNorm2d(24), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(24, 4),
    )  # fmt: skip


def data(count=5, shape=(1, 8, 8), batch=8):
    generator = torch.Generator().manual_seed(3)
    return [
        (
            torch.randn(batch, *shape, generator=generator),
            torch.randint(0, 4, (batch,), generator=generator),
        )
        for _ in range(count)
    ]


def pruner(model, **settings):
    settings = {"sparsity": 0.75, "block": (4, 4), "sweeps": 1, "include": PRUNED} | settings
    return DCPPruner(model, **settings)


def close(got, expected):
    with torch.no_grad():
        a, b = got, expected
        return float((a - b).abs().max()) <= 1e-5 * float(b.abs().max())


class Residual(nn.Module):
    """A block with a shortcut, of which a later layer is pruned while the shortcut waits."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 16, 3, padding=1)
        self.a = nn.Conv2d(16, 16, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(16)
        self.b = nn.Conv2d(16, 16, 3, padding=1)
        self.c = nn.Conv2d(16, 16, 3, padding=1)
        self.fc = nn.Linear(16, 4)

    def forward(self, x):
        x = F.relu(self.stem(x))
        y = self.b(F.relu(self.norm(self.a(x))))
        y += x
        return self.fc(self.c(F.relu_(y)).mean((2, 3)))


# -- pieces of the forward pass -------------------------------------------------------------------


@pytest.mark.parametrize("end", ["b", "c", None])
@pytest.mark.parametrize("name", ["a", "b"])
def test_pieces_of_the_forward_pass_make_the_whole(name, end):
    torch.manual_seed(0)
    model = Residual().eval()
    x = torch.randn(2, 1, 8, 8)
    forward = Forward("test", model)
    inputs, *others = forward.before(name, end)(x)
    after = forward.after(name, end)
    outputs = model.get_submodule(name)(inputs)
    expected = model(x) if end is None else forward.until(end)(x)
    for _ in range(2):  # in-place operations leave what they are given alone
        kept = [outputs.clone(), *(o.clone() for o in others)]
        torch.testing.assert_close(after(outputs, *others), expected)
        for before, now in zip(kept, [outputs, *others], strict=True):
            assert torch.equal(before, now)
    torch.testing.assert_close(forward.until(name)(x), outputs)


# -- the choice -----------------------------------------------------------------------------------


def objective(model, name, batches, head, **weights):
    forward = Forward("test", model.eval())
    reference = Forward("test", copy.deepcopy(model))
    return Objective(
        model.get_submodule(name),
        forward.before(name, None),
        forward.after(name, None),
        head,
        reference.until(name),
        batches,
        F.cross_entropy,
        **{"lam": 0.7, "reconstruction": 1.3, **weights},
    )


@pytest.mark.parametrize("atom", ["block", "channel"])
@pytest.mark.parametrize("tie_kernel", [False, True])
def test_scores_are_the_gradient_of_the_whole_loss(atom, tie_kernel):
    model, batches = cnn(), data(3)
    layer = model[3]
    original = layer.weight.detach().clone()
    made = objective(model, "3", batches, nn.Identity())
    weight = torch.zeros_like(original)
    weight[:, :3] = original[:, :3]
    loss, gradient = made.gradient(weight.clone().requires_grad_(), None)
    # By hand: the whole network on all samples at once.
    x, y = (torch.cat(parts) for parts in zip(*batches, strict=True))
    model = model.double()
    hidden = model[:3](x.double())
    wanted = model[3](hidden).detach()
    w = weight.double().requires_grad_()
    outputs = F.conv2d(hidden, w, None, padding=1)
    expected = 1.3 * ((wanted - outputs) ** 2).sum() / (2 * wanted.numel())
    expected = expected + 0.7 * F.cross_entropy(model[4:](outputs), y)
    expected.backward()
    assert loss == pytest.approx(float(expected.detach()), rel=1e-5)
    torch.testing.assert_close(gradient.double(), w.grad, rtol=1e-3, atol=1e-7)
    # Norms by loops, under permutations.
    plan = pruner(cnn(), tie_kernel=tie_kernel, sweeps=2).search(
        {"3": torch.rand(16, 16, 3, 3), "6": torch.rand(24, 16, 3, 3)}
    )["3"]
    atoms = Atoms.of(plan.layout, atom, tie_kernel=tie_kernel, floor=True)
    rows, cols = plan.layout.row_perm.long(), plan.layout.col_perm.long()
    norms = []
    packed = w.grad[rows][:, cols]
    for i in range(4):
        for k in range(9):
            for j in range(4):
                block = packed[4 * i : 4 * i + 4, 4 * j : 4 * j + 4].flatten(2)[..., k]
                norms.append(((i, k, j), float(block.square().sum())))
    if atom == "channel":
        sums = [sum(v for (_, _, j), v in norms if j == at) for at in range(4)]
    elif tie_kernel:
        sums = [sum(v for (i, _, j), v in norms if (i, j) == divmod(at, 4)) for at in range(16)]
    else:
        sums = [v for _, v in norms]
    expected = torch.tensor(sums, dtype=torch.float64).sqrt()
    torch.testing.assert_close(atoms.norms(w.grad), expected)


def choose(model, batches, budget, *, floor=False, atom="channel", **settings):
    layer = model[3]
    layout = pruner(cnn(), block=(4, 1) if atom == "channel" else (4, 4)).layouts()["3"]
    atoms = Atoms.of(layout, atom, tie_kernel=False, floor=floor)
    defaults = {
        "score": "gradient", "rounds": 4, "steps": 2, "lr": 0.01, "momentum": 0.9,
        "weight_decay": 1e-4, "epsilon": None, "seed": (0, 0), "where": "test",
    }  # fmt: skip
    weights = {k: settings.pop(k) for k in ("lam", "reconstruction") if k in settings}
    made = objective(model, "3", batches, nn.Identity(), **weights)
    chosen, log = select_atoms(made, atoms, budget, **{**defaults, **settings})
    return chosen, log, oriented(layer, atoms.stored(chosen).mask())


def test_the_first_choice_has_the_largest_gradient_and_old_weights():
    model, batches = cnn(), data()
    original = model[3].weight.detach().clone()
    weight = torch.zeros_like(original).requires_grad_()
    _, gradient = objective(model, "3", batches, nn.Identity()).gradient(weight, None)
    best = int(gradient.square().sum((0, 2, 3)).argmax())
    chosen, log, _ = choose(model, batches, 1, steps=0)
    assert log.chosen == [best]
    assert chosen.nonzero().flatten().tolist() == [best]
    assert torch.equal(model[3].weight[:, best], original[:, best])
    assert int((model[3].weight != 0).any(0).any(1).any(1).sum()) == 1


def test_steps_lower_the_loss_on_what_is_chosen_only():
    chosen, log, mask = choose(model := cnn(), data(), 6, steps=20)
    assert int(chosen.sum()) == len(set(log.chosen)) == 6
    assert not model[3].weight[~mask].any()
    assert len(log.losses) == 5  # the empty layer, and rounds of 1, 2, 1, 2
    assert log.losses[-1] < log.losses[0]
    assert log.stopped == "budget"
    _, still, _ = choose(cnn(), data(), 6, steps=0)
    assert log.losses[-1] < still.losses[-1]


def test_no_atom_is_chosen_twice_and_zero_gradients_end_the_choice():
    model, batches = cnn(), data()
    with torch.no_grad():
        # Only five channels arrive: the others have no gradient, chosen ones have none either.
        model[1].weight[5:] = 0.0
        model[1].bias[5:] = -1.0
    chosen, log, _ = choose(model, batches, 12)
    assert log.stopped == "gradient"
    assert sorted(log.chosen) == [0, 1, 2, 3, 4]


def test_every_block_row_keeps_its_best_block_first():
    model, batches = cnn(), data()
    weight = torch.zeros_like(model[3].weight).requires_grad_()
    _, gradient = objective(model, "3", batches, nn.Identity()).gradient(weight, None)
    _, log, _ = choose(model, batches, 10, floor=True, atom="block")
    sums = gradient.square().view(4, 4, 4, 4, 9).sum((1, 3)).transpose(1, 2).reshape(4, -1)
    assert log.chosen[:4] == [i * 36 + int(sums[i].argmax()) for i in range(4)]
    assert len(log.chosen) == 10
    # Without a gradient anywhere the heaviest block of a row stays.
    with torch.no_grad():
        model[1].weight.zero_()
        model[1].bias.fill_(-1.0)
    norms = model[3].weight.detach().square().view(4, 4, 4, 4, 9).sum((1, 3)).transpose(1, 2)
    best = norms.reshape(4, -1).argmax(1)
    _, log, _ = choose(model, batches, 10, floor=True, atom="block")
    assert (log.stopped, log.chosen) == ("gradient", [i * 36 + int(best[i]) for i in range(4)])


def test_adapt_stops_where_the_loss_stops_falling():
    _, full, _ = choose(cnn(), data(), 16, rounds=16)
    changes = [
        abs(a - b) / full.losses[0]
        for a, b in zip(full.losses, full.losses[1:], strict=False)
    ]  # fmt: skip
    epsilon = sorted(changes)[4]
    stop = next(i for i, change in enumerate(changes) if change <= epsilon) + 1
    assert 1 <= stop < 16
    chosen, log, _ = choose(cnn(), data(), 16, rounds=16, epsilon=epsilon)
    assert log.stopped == "epsilon"
    assert int(chosen.sum()) == len(log.losses) - 1 == stop
    assert log.losses == full.losses[: stop + 1]
    assert int(choose(cnn(), data(), 16, rounds=16, epsilon=0.0)[0].sum()) == 16


def test_baselines_choose_by_chance_or_norm():
    norms = cnn()[3].weight.detach().square().sum((0, 2, 3))
    _, log, _ = choose(cnn(), data(), 8, score="norm")
    assert log.chosen == norms.argsort(descending=True)[:8].tolist()
    _, one, _ = choose(cnn(), data(), 8, score="random")
    _, other, _ = choose(cnn(), data(), 8, score="random", seed=(1, 0))
    assert one.chosen != other.chosen
    _, recon, _ = choose(cnn(), data(), 8, lam=0.0)
    _, discr, _ = choose(cnn(), data(), 8, reconstruction=0.0)
    assert recon.chosen != discr.chosen


# -- the pruner -----------------------------------------------------------------------------------


@pytest.mark.parametrize("atom", ["block", "channel"])
@pytest.mark.parametrize("joint", [False, True])
def test_selects_trains_and_finalizes(atom, joint):
    model = cnn()
    parameters = list(model.parameters())
    made = pruner(model, atom=atom, joint=joint, heads=["3"])
    assert [(s.head, s.layers) for s in made.stages] == [("3", ("3",)), (None, ("6",))]
    report = made.select(data(), rounds=3, steps=2)
    assert model.training  # as before
    assert [layer.name for layer in report.layers] == PRUNED
    assert all(layer.block_sparsity == pytest.approx(0.75) for layer in report.layers)
    assert {id(p) for p in parameters} == {id(p) for p in model.parameters()}
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    masks = {name: layout.mask() for name, layout in made.layouts().items()}
    for x, y in data():
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        made.step()
    for name, mask in masks.items():
        assert not model.get_submodule(name).weight[~mask].any()
    model.eval()
    x = data(1)[0][0]
    final = made.finalize()
    assert close(final(x), model(x))
    if atom == "block":
        assert isinstance(final[3], SparseConv2d)
        return
    assert final[0].out_channels == final[3].in_channels == 4  # of 16
    assert final[3].out_channels == final[6].in_channels == 4
    assert "3: inputs 4 of 16, outputs 4 of 16" in str(made.shrunk)
    assert made.finalize(inplace=True) is model
    assert torch.equal(model(x), final(x))
    with pytest.raises(RuntimeError, match="has ended"):
        made.finalize()


def test_wide_atoms_of_channels_follow_the_column_order():
    model = cnn()
    made = pruner(model, atom="channel", block=(4, 4), sparsity=0.5, sweeps=3)
    with torch.no_grad():  # columns that belong together stand apart
        model[3].weight[:, ::4] *= 10.0
    made.select(data(), rounds=2, steps=1)
    assert made.layouts()["3"].reordered.endswith("columns")
    model.eval()
    x = data(1)[0][0]
    final = made.finalize()
    assert final[3].in_channels == 8
    assert close(final(x), model(x))


def test_residual_networks_and_mlps():
    torch.manual_seed(0)
    model = Residual()
    made = DCPPruner(
        model, atom="channel", include=["a", "b", "c"], heads=["b"], sparsity=0.5, progress=False
    )
    made.select(data(), rounds=2, steps=2)
    model.eval()
    x = data(1)[0][0]
    final = made.finalize()
    assert close(final(x), model(x))
    assert final.a[1].out_channels == final.norm.num_features == final.b.in_channels == 8
    read = [made.layouts()[n].mask().any(0).flatten(1).any(1) for n in ("a", "c")]
    stream = int((read[0] | read[1]).sum())  # one value with the outputs of b, by the add
    assert final.stem.out_channels == final.b.out_channels == stream

    mlp = nn.Sequential(
        nn.Linear(8, 16), nn.ReLU(inplace=True), nn.Linear(16, 16), nn.ReLU(inplace=True),
        nn.Linear(16, 4),
    )  # fmt: skip
    for atom in ("channel", "block"):
        model = copy.deepcopy(mlp)
        made = DCPPruner(model, atom=atom, include=["0", "2"], heads=1, sparsity=0.5, sweeps=1)
        assert made.stages[0].head == "0"
        made.select(data(shape=(8,)), rounds=2, steps=2)
        x = data(1, (8,))[0][0]
        assert close(made.finalize()(x), model(x))


def test_transposed_grouped_and_one_dimensional_layers():
    model = nn.Sequential(
        nn.Conv1d(2, 16, 3, padding=1), nn.ReLU(), nn.Conv1d(16, 16, 3, groups=4, padding=1),
        nn.Unflatten(2, (2, 4)), nn.ConvTranspose2d(16, 8, 2, groups=2), nn.ReLU(),
        nn.Conv2d(8, 8, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
    )  # fmt: skip
    made = DCPPruner(
        model, include=["2", "4", "6"], heads=["2", "4"], block=(2, 2), sparsity=0.5, sweeps=1
    )
    made.select(data(shape=(2, 8)), rounds=2, steps=2)
    for layout in made.layouts().values():
        assert layout.sparsity == pytest.approx(0.5)
    x = data(1, (2, 8))[0][0]
    assert close(made.finalize()(x), model(x))


def test_blocks_in_an_order_that_layers_share():
    model = cnn()
    made = pruner(model, share=SharedOrder(rows="3", cols="6"))
    made.select(data(), rounds=2, steps=1)
    layouts = made.layouts()
    assert torch.equal(layouts["3"].row_perm, layouts["6"].col_perm)
    model.eval()
    x = data(1)[0][0]
    assert close(made.finalize()(x), model(x))


def test_training_on_stored_blocks_after_the_choice():
    model = cnn()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    made = pruner(model, execution="sparse", optimizers=optimizer)
    made.select(data(), rounds=2, steps=1)
    assert isinstance(model[3], SparseConv2d)
    assert all(module.training for module in model.modules())
    for x, y in data(2):
        optimizer.zero_grad()
        F.cross_entropy(model(x), y).backward()
        optimizer.step()
        made.step()
    x = data(1)[0][0]
    assert close(made.finalize().eval()(x), model.eval()(x))


def test_same_seed_same_choice_and_random_numbers_outside_are_left_alone():
    runs = []
    for seed in (0, 0, 1):
        model = cnn()
        made = pruner(model, seed=seed, heads=["3"])
        torch.manual_seed(seed + 5)
        state = torch.get_rng_state()
        made.select(torch.utils.data.TensorDataset(*data(1, batch=40)[0]), batch=8, steps=2)
        assert torch.equal(torch.get_rng_state(), state)
        runs.append((model[6].weight.detach().clone(), made.selections["6"]))
    assert torch.equal(runs[0][0], runs[1][0])
    assert runs[0][1] == runs[1][1]
    assert not torch.equal(runs[0][0], runs[2][0])


def test_values_that_do_not_fit_are_computed_again(monkeypatch):
    kept = cnn()
    pruner(kept).select(data(), rounds=2, steps=2)
    monkeypatch.setattr("tetris.prune.dcp.greedy.CACHE_BYTES", 0)
    again = cnn()
    pruner(again).select(data(), rounds=2, steps=2)
    assert torch.equal(kept[3].weight, again[3].weight)
    assert torch.equal(kept[6].weight, again[6].weight)


def test_state_dict_round_trip():
    model = cnn()
    made = pruner(model, atom="channel")
    made.select(data(), rounds=2, steps=1, samples=20)
    state, weights = made.state_dict(), copy.deepcopy(model.state_dict())
    fresh = cnn()
    other = pruner(fresh, atom="channel")
    other.load_state_dict(state)
    fresh.load_state_dict(weights)
    assert other.layouts() == made.layouts()
    assert other.selections == made.selections
    x = data(1)[0][0]
    assert torch.equal(other.finalize().eval()(x), made.finalize().eval()(x))
    with pytest.raises(RuntimeError, match="have been chosen"):
        other.select(data())
    with pytest.raises(ValueError, match="atom='channel', this pruner has 'block'"):
        pruner(cnn(), atom="block").load_state_dict(state)


def test_a_failure_leaves_the_model_as_it_was():
    model = cnn()
    before = copy.deepcopy(model.state_dict())
    made = pruner(model, heads=["3"])
    calls = []

    def loss(logits, target):
        calls.append(1)
        if len(calls) > 30:
            raise ArithmeticError("late")
        return F.cross_entropy(logits, target)

    with pytest.raises(ArithmeticError, match="late"):
        made.select(data(), loss=loss)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    made.select(data(), rounds=2, steps=1)  # and it can be tried again


def test_one_bar_at_a_time_is_shown_on_standard_error(capsys, monkeypatch):
    monkeypatch.setenv("FORCE_COLOR", "1")  # as on a terminal
    monkeypatch.setenv("TERM", "xterm")
    start, stop, live = Live.start, Live.stop, set()

    def start_alone(self, refresh=False):
        assert not live  # where some versions of rich raise
        live.add(self)
        start(self, refresh)

    def stop_it(self):
        live.discard(self)
        stop(self)

    monkeypatch.setattr(Live, "start", start_alone)
    monkeypatch.setattr(Live, "stop", stop_it)
    model = cnn()
    pruner(model, progress=True, heads=["3"]).select(data(), rounds=2, steps=1)
    shown = capsys.readouterr()
    assert "reordering" in shown.err
    assert "choosing in 6" in shown.err
    assert not shown.out
    assert not live


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_a_failure_of_the_last_step_leaves_the_model_as_it_was(execution, monkeypatch):
    model = cnn().eval()
    before = copy.deepcopy(model.state_dict())
    made = pruner(model, execution=execution)

    def refuse(layouts):
        raise ArithmeticError("late")

    with monkeypatch.context() as patch:
        patch.setattr(made, "keep", refuse)
        with pytest.raises(ArithmeticError, match="late"):
            made.select(data(), rounds=2, steps=1)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not any(module.training for module in model)
    with pytest.raises(RuntimeError, match="nothing has been chosen"):
        made.step()
    made.select(data(), rounds=2, steps=1)
    assert not any(module.training for module in model)


def test_states_that_cannot_follow_are_refused_before_the_work(monkeypatch):
    model = cnn()
    optimizer = torch.optim.Adafactor(model.parameters())
    x, y = data(1)[0]
    F.cross_entropy(model(x), y).backward()
    optimizer.step()
    before = copy.deepcopy(model.state_dict())
    made = pruner(model, execution="sparse", optimizers=optimizer)
    monkeypatch.setattr(made, "_train", lambda *rest: pytest.fail("the work began"))
    with pytest.raises(ValueError, match=r"DCPPruner.select: layer '3': Adafactor keeps"):
        made.select(data())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert not made.selections


# -- the algorithm, replayed ----------------------------------------------------------------------


class Descent:
    """SGD with Nesterov's momentum 0.9 and weight decay 1e-4, by its formula."""

    def __init__(self, lr):
        self.lr, self.velocity = lr, {}

    def step(self, parameters, loss, masks=None):
        gradients = torch.autograd.grad(loss, parameters, allow_unused=True)
        for i, (parameter, gradient) in enumerate(zip(parameters, gradients, strict=True)):
            if gradient is None:
                continue
            with torch.no_grad():
                gradient = gradient * (masks or {}).get(i, 1.0) + 1e-4 * parameter
                velocity = 0.9 * self.velocity.get(i, torch.zeros_like(gradient)) + gradient
                self.velocity[i] = velocity
                parameter -= self.lr * (gradient + 0.9 * velocity)


def three_layers():
    torch.manual_seed(4)
    return nn.Sequential(
        nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 8), nn.BatchNorm1d(8),
        nn.ReLU(), nn.Linear(8, 4),
    )  # fmt: skip


def replay(model, head, batches, sample, *, joint, lam, reconstruction):
    """Algorithm 1 for layers "0", under a head right behind it, and "3", under the output."""
    original = copy.deepcopy(model).eval()
    chosen = {}
    of_model, of_head = list(model.parameters()), list(head.parameters())

    def logits(outputs):
        return head.classify(F.relu(head.norm(outputs)))

    for stage, name in enumerate((0, 3)):
        model.train()
        head.train()
        one, other = Descent(0.05), Descent(0.05)
        for x, y in batches if not joint or stage == 0 else []:
            if joint:
                hidden = model[0](x)
                loss = F.cross_entropy(logits(hidden), y) / 9.0  # layer 1 of 3, squared
                loss = loss + F.cross_entropy(model[1:](hidden), y)
                one.step(of_head + of_model, loss)
                continue
            if stage == 0:
                one.step(of_head + of_model, F.cross_entropy(logits(model[0](x)), y))
            other.step(of_model, F.cross_entropy(model(x), y))
            if stage == 1:
                with torch.no_grad():
                    model[0].weight[:, [i for i in range(6) if i not in chosen[0]]] = 0.0
        model.eval()
        head.eval()
        layer = model[name]
        old = layer.weight.detach().clone()
        count = old.shape[1]
        weight = torch.zeros_like(old).requires_grad_()
        bias = layer.bias.detach().clone().requires_grad_()

        def loss_of(x, y, name=name, stage=stage, weight=weight, bias=bias):
            outputs = F.linear(model[:name](x), weight, bias)
            wanted = original[: name + 1](x).detach()
            total = reconstruction * (outputs - wanted).square().sum() / (2 * wanted.numel())
            behind = logits(outputs) if stage == 0 else model[name + 1 :](outputs)
            return total + lam * F.cross_entropy(behind, y)

        chosen[name], descent, order = [], Descent(0.02), itertools.cycle(sample)
        for enough in (count // 4, count // 2):
            every = sum(len(y) for _, y in sample)
            loss = sum(len(y) / every * loss_of(x, y) for x, y in sample)
            norms = torch.autograd.grad(loss, weight)[0].norm(dim=0)
            norms[chosen[name]] = -1.0
            new = norms.argsort(descending=True)[: enough - len(chosen[name])].tolist()
            chosen[name] += new
            mask = torch.zeros(count)
            mask[chosen[name]] = 1.0
            with torch.no_grad():
                weight[:, new] = old[:, new]
            for _ in range(3):
                descent.step([weight, bias], loss_of(*next(order)), {0: mask})
        with torch.no_grad():
            layer.weight.copy_(weight)
            layer.bias.copy_(bias)
    return chosen


@pytest.mark.parametrize("joint", [False, True])
def test_algorithm_1_by_hand(joint, monkeypatch):
    heads = []

    class Recorded(Head):
        def __init__(self, *args):
            super().__init__(*args)
            heads.append(copy.deepcopy(self))

    monkeypatch.setattr("tetris.prune.dcp.pruner.Head", Recorded)
    cycle = lambda count, generator: itertools.cycle(range(count))  # noqa: E731
    monkeypatch.setattr("tetris.prune.dcp.greedy._shuffled", cycle)
    batches = [data(1, (6,), size)[0] for size in (8, 5, 3)]
    model, losses = three_layers(), {"lam": 0.7, "reconstruction": 1.3}
    made = DCPPruner(
        model, atom="channel", include=["0", "3"], heads=["0"], joint=joint, sparsity=0.5, **losses
    )
    made.select(batches, epochs=2, lr=0.05, rounds=2, steps=3, step_lr=0.02, samples=14)
    expected = three_layers()
    sample = [*batches[:2], tuple(part[:1] for part in batches[2])]
    chosen = replay(expected, heads[0], batches * 2, sample, joint=joint, **losses)
    for name in (0, 3):
        assert made.selections[str(name)].chosen == chosen[name]
        torch.testing.assert_close(model[name].weight, expected[name].weight, rtol=1e-3, atol=1e-5)
        torch.testing.assert_close(model[name].bias, expected[name].bias, rtol=1e-3, atol=1e-5)
        norm, other = model[name + 1], expected[name + 1]
        torch.testing.assert_close(norm.running_mean, other.running_mean, rtol=1e-3, atol=1e-5)


def test_settings_reach_the_choice(monkeypatch):
    made_of, called_with = [], []

    def objective(**arguments):
        made_of.append(arguments)
        return Objective(**arguments)

    def choice(*arguments, **settings):
        called_with.append(settings)
        return select_atoms(*arguments, **settings)

    monkeypatch.setattr("tetris.prune.dcp.pruner.Objective", objective)
    monkeypatch.setattr("tetris.prune.dcp.pruner.select_atoms", choice)
    model = cnn()
    original = copy.deepcopy(model).eval()
    made = pruner(model, lam=0.25, reconstruction=2.0, score="norm", heads=["3"])
    made.select(data(), samples=19, epsilon=0.5, rounds=2, steps=1)
    x = data(1)[0][0]
    for arguments, settings, at in zip(made_of, called_with, (3, 6), strict=True):
        assert (arguments["lam"], arguments["reconstruction"]) == (0.25, 2.0)
        assert [len(x) for x, _ in arguments["batches"]] == [8, 8, 3]
        torch.testing.assert_close(arguments["reference"](x), original[: at + 1](x))
        assert (settings["score"], settings["epsilon"]) == ("norm", 0.5)
    assert isinstance(made_of[0]["head"], Head)
    with pytest.warns(UserWarning, match="keep more blocks than asked for"):
        pruner(cnn(), sparsity=0.999).select(data(), rounds=2, steps=1)


@pytest.mark.parametrize("dims", [1, 2])
def test_heads_pool_maps(dims):
    layer = [nn.Conv1d, nn.Conv2d][dims - 1](3, 5, 1)
    head = Head(layer, 4).eval()
    outputs = torch.randn(2, 5, *[6] * dims)
    scaled = torch.relu(outputs / math.sqrt(1.0 + 1e-5))
    expected = head.classify(scaled.flatten(2).sum(2) / 6**dims)
    torch.testing.assert_close(head(outputs), expected)


# -- what select() makes of models, modes and data ----------------------------------------------


def mlp(bias=True, norm=False):
    torch.manual_seed(1)
    layers = [nn.Linear(8, 16, bias=bias)]
    for _ in range(2):
        norms = [nn.BatchNorm1d(16)] if norm else []
        layers += [*norms, nn.ReLU(), nn.Linear(16, 16, bias=bias)]
    return nn.Sequential(*layers, nn.ReLU(), nn.Linear(16, 4))


def channels(model, **settings):
    settings = {"include": ["2", "4"], "heads": 1, "sparsity": 0.5} | settings
    return DCPPruner(model, atom="channel", **settings)


def test_functions_follow_the_mode_and_a_pruner_can_be_copied():
    class Dropout(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)

        def forward(self, x):
            x = F.relu(self.b(F.relu(self.a(x))))
            return self.c(F.dropout(x, 0.5, training=self.training))

    runs = []
    for training in (True, False):
        torch.manual_seed(0)
        model = Dropout().train(training)
        made = copy.deepcopy(channels(model, include=["b"], heads=0))
        made.select(data(shape=(8,)), steps=0, epochs=0)
        assert made.sparsity == pytest.approx(0.5)
        assert made.layers["b"] is made.model.b
        assert made.model.training is training
        runs.append(made.selections["b"])
    assert runs[0] == runs[1]  # no dropout in either


def test_layers_are_judged_by_heads_that_depend_on_them():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(1, 8, 1)
            self.short, self.one, self.two = (nn.Conv2d(8, 8, 1) for _ in range(3))
            self.fc = nn.Linear(8, 4)

        def forward(self, x):
            x = F.relu(self.stem(x))
            short = self.short(x)
            y = self.two(F.relu(self.one(x)))
            return self.fc(F.relu(y + short).mean((2, 3)))

    made = channels(Branches(), include=["short", "one", "two"], heads=["two"], reconstruction=0.0)
    assert [(s.head, s.layers) for s in made.stages] == [
        ("two", ("one", "two")),
        (None, ("short",)),
    ]
    made.select(data(), steps=1)
    assert made.sparsity == pytest.approx(0.5)


@pytest.mark.parametrize("settings", [{}, {"atom": "block", "allow_empty_rows": True}])
def test_networks_without_a_gradient_at_zero_start_from_the_largest_norms(settings):
    model = mlp(bias=False)
    settings = {"include": ["2", "4"], "heads": 1, "sparsity": 0.5, "sweeps": 1} | settings
    made = DCPPruner(model, **{"atom": "channel", "reconstruction": 0.0, **settings})
    made.select(data(shape=(8,)), epochs=0, steps=2, rounds=8)
    assert made.selections["2"].chosen
    if not settings.get("allow_empty_rows"):
        norms = mlp(bias=False)[2].weight.square().sum(0)
        assert made.selections["2"].chosen[0] == int(norms.argmax())
        assert made.sparsity == pytest.approx(0.5)
    x = data(1, (8,))[0][0]
    assert close(made.finalize()(x), model(x))
    nothing = mlp(bias=False)
    nn.init.zeros_(nothing[2].weight)
    with pytest.raises(ValueError, match="'2': no atom has a gradient or a weight.*exclude"):
        channels(nothing, reconstruction=0.0).select(data(shape=(8,)), epochs=0)


def test_losses_that_are_not_finite_are_refused():
    model = mlp()
    before = copy.deepcopy(model.state_dict())
    made = channels(model)
    with pytest.raises(ValueError, match="layer '2': the loss is nan.*lower lr"):
        made.select(data(shape=(8,)), lr=1e6)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())


def test_a_refused_end_keeps_the_masks():
    model = mlp()
    made = channels(model)
    made.select(data(shape=(8,)), steps=1)
    hook = model[2].register_forward_hook(lambda _, __, y: y.flip(1))
    with pytest.raises(ValueError, match="'2' cannot be narrowed: it has forward_hooks"):
        made.finalize(inplace=True)
    assert all(hasattr(model[i], "parametrizations") for i in (2, 4))
    hook.remove()
    made.step()
    assert made.finalize(inplace=True) is model
    assert model[2].in_features == 8


@pytest.mark.parametrize("rounds", [1, 3, 8, 20])
def test_the_budget_enters_in_as_many_rounds_as_asked(rounds):
    _, log, _ = choose(cnn(), data(2), 9, rounds=rounds, steps=0)
    assert len(log.losses) - 1 == min(rounds, 9)
    assert len(log.chosen) == 9


def test_one_sample_left_over_and_streams_of_samples():
    class Stream(torch.utils.data.IterableDataset):
        def __iter__(self):
            x, y = data(1, (8,), 17)[0]
            return iter(zip(x, y, strict=True))

    for given in (torch.utils.data.TensorDataset(*data(1, (8,), 17)[0]), Stream()):
        made = channels(mlp())
        made.select(given, batch=8, steps=1)
        assert made.sparsity == pytest.approx(0.5)
    with pytest.raises(ValueError, match="at least two samples"):
        channels(mlp()).select(data(3, (8,), 1))


def test_what_was_frozen_stays():
    model = mlp(norm=True).train()
    model[1].eval()
    mean, other = model[1].running_mean.clone(), model[4].running_mean.clone()
    model[3].bias.requires_grad_(False)
    bias, first = model[3].bias.clone(), model[0].weight.clone()
    made = channels(model, include=["3", "6"])
    made.select(data(shape=(8,)), steps=2)
    assert torch.equal(model[1].running_mean, mean)
    assert not torch.equal(model[4].running_mean, other)
    assert torch.equal(model[3].bias, bias)
    assert not torch.equal(model[0].weight, first)
    assert model.training
    assert not model[1].training
    frozen = mlp()
    frozen[2].weight.requires_grad_(False)
    with pytest.raises(ValueError, match="layer '2' is frozen"):
        channels(frozen).select(data(shape=(8,)))


def test_a_refusal_leaves_the_mode():
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 4)).train()
    with pytest.raises(ValueError, match="logits"):
        channels(model, include="0", heads=0).select(data(shape=(3, 8)))
    assert all(module.training for module in model.modules())


def test_random_atoms_differ_between_layers_and_not_with_batches():
    made = channels(mlp(), score="random")
    made.select(data(shape=(8,)), steps=1)
    assert made.selections["2"].chosen != made.selections["4"].chosen
    again = channels(mlp(), score="random")
    again.select(data(3, (8,)), steps=3)
    assert {n: s.chosen for n, s in again.selections.items()} == {
        n: s.chosen for n, s in made.selections.items()
    }


def test_shares_that_are_no_binary_fractions_are_whole_atoms():
    model = nn.Sequential(nn.Linear(8, 100), nn.ReLU(), nn.Linear(100, 4))
    made = channels(model, include="2", heads=0, sparsity=0.29)
    made.select(data(shape=(8,)), steps=0, epochs=0)
    assert made.sparsity == pytest.approx(0.29)


# -- errors ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"heads": ["nothing"]}, "heads names 'nothing'.*'0', '3', '6', '11'"),
        ({"heads": ["4"]}, "no linear layer or convolution"),
        ({"heads": ["11"]}, "the last layer, behind which is the network's own loss"),
        ({"heads": ["0"]}, "nothing to choose.*pruned: '3', '6'"),
        ({"heads": ["3", "3"]}, "twice"),
        ({"heads": 2}, "from 0 to 1"),
        ({"heads": True}, "a number or a list"),
        ({"heads": "3"}, "a number or a list"),
        ({"atom": "filter"}, "atom must be one of 'block', 'channel'"),
        ({"score": "size"}, "score must be one of"),
        ({"lam": 0.0, "reconstruction": 0.0}, "no loss"),
        ({"lam": -1.0}, "at least 0"),
        ({"lam": float("inf")}, "lam must be a finite number"),
        ({"reconstruction": "1"}, "reconstruction must be a finite number"),
        ({"sparsity": 1.0}, "keeps nothing with sparsity=1"),
        ({"balanced": True}, "balanced"),
        ({"atom": "channel", "execution": "sparse"}, "execution='masked'"),
        ({"atom": "channel", "scope": "global"}, "scope='global'"),
        ({"atom": "channel", "share": SharedOrder("3", "6")}, "share="),
    ],
)
def test_settings_that_cannot_be(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        pruner(cnn(), **settings)


def test_networks_that_cannot_be():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            return self.b(self.a(x)) if x.sum() > 0 else self.b(self.a(-x))

    class Twice(Branch):
        def forward(self, x):
            return self.b(self.a(x) + self.a(-x))

    class Tokens(Branch):
        def forward(self, x):
            return self.b(self.a(x))

    with pytest.raises(ValueError, match="Branch cannot be traced.*TetrisPruner"):
        DCPPruner(Branch(), include="a")
    with pytest.raises(ValueError, match="'a' must be called once.*2 calls"):
        DCPPruner(Twice(), include="a")
    made = DCPPruner(Tokens(), include="a", heads=0, sweeps=1)
    with pytest.raises(ValueError, match=r"must return logits \[N, classes\]"):
        made.select(data(shape=(3, 8)))
    grouped = nn.Sequential(nn.Conv2d(16, 16, 1, groups=2), nn.Flatten(), nn.Linear(64, 4))
    with pytest.raises(ValueError, match="2 groups"):
        DCPPruner(grouped, atom="channel", include="0")


def test_data_that_cannot_be():
    made = pruner(cnn())
    with pytest.raises(TypeError, match="read several times"):
        made.select(iter(data()))
    with pytest.raises(TypeError, match="pairs of inputs and targets"):
        made.select([torch.zeros(3, 1, 8, 8)])
    with pytest.raises(ValueError, match="at least one batch"):
        made.select([])
    with pytest.raises(ValueError, match="rounds must be an int of at least 1"):
        made.select(data(), rounds=0)
    with pytest.raises(ValueError, match="rounds must be an int of at least 1"):
        made.select(data(), rounds=True)
    for name in ("lr", "step_lr", "epsilon"):
        for value in (-1.0, float("nan"), "1"):
            with pytest.raises(ValueError, match=f"{name} must be a finite number"):
                made.select(data(), **{name: value})
    x, y = data(1)[0]
    with pytest.raises(TypeError, match="one tensor each.*several inputs"):
        made.select([((x, x), y)])


@pytest.mark.parametrize("atom", ["block", "channel"])
def test_nothing_goes_on_before_the_choice(atom):
    pruner = DCPPruner(cnn(), atom=atom, include=["3", "6"], heads=1, sparsity=0.5, sweeps=1)
    for method in (pruner.step, pruner.finalize):
        with pytest.raises(RuntimeError, match=r"call select\(data\) first"):
            method()
