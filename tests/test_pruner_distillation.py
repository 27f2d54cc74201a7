"""Distillation: the published loss, hints, and what it is to be safe from."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tetris.prune import Cubic, Distillation, TetrisPruner

FAST = {"sweeps": 1, "block": (4, 4), "exclude": "4"}


def mlp(seed=0, classes=10, width=32):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(16, 32), nn.ReLU(), nn.Linear(32, width), nn.ReLU(), nn.Linear(width, classes)
    )


X = torch.randn(8, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("temperature", [1.0, 4.0])
def test_the_gradient_is_that_of_soft_targets(temperature):
    """Hinton et al.: cross-entropy with softened targets, times T^2."""
    student, teacher = mlp(0), mlp(1)
    outputs, loss = Distillation(teacher, temperature=temperature)(student, X)
    assert torch.equal(outputs, student(X))
    loss.backward()
    found = student[0].weight.grad.clone()
    student.zero_grad()
    soft = (teacher(X) / temperature).softmax(-1).detach()
    (temperature**2 * F.cross_entropy(student(X) / temperature, soft)).backward()
    torch.testing.assert_close(found, student[0].weight.grad)
    assert all(p.grad is None for p in teacher.parameters())
    reference = F.kl_div(
        (student(X) / temperature).log_softmax(-1), soft, reduction="batchmean"
    )  # fmt: skip
    torch.testing.assert_close(loss, temperature**2 * reference)


def test_large_temperatures_compare_logits():
    """Section 2.1: for T above the logits, gradients are (z - v) / (N C), of centred logits."""
    z, v = (torch.randn(4, 10, dtype=torch.float64) for _ in range(2))
    z, v = (t - t.mean(1, keepdim=True) for t in (z, v))
    teacher = nn.Identity()
    distillation = Distillation(teacher, temperature=1e4)
    leaf = z.clone().requires_grad_()
    loss = distillation._divergence(leaf, v)
    loss.backward()
    torch.testing.assert_close(leaf.grad, (z - v) / (10 * 4), rtol=1e-3, atol=1e-6)


def test_classes_may_lie_in_another_dimension():
    student, teacher = nn.Conv2d(3, 5, 1), nn.Conv2d(3, 5, 1)
    x = torch.randn(2, 3, 4, 4)
    _, loss = Distillation(teacher, temperature=1.0, dim=1)(student, x)
    p, q = teacher(x).softmax(1), student(x).log_softmax(1)
    torch.testing.assert_close(loss, (p * (p.log() - q)).sum(1).mean())


def test_classes_that_are_ruled_out_add_nothing():
    generator = torch.Generator().manual_seed(0)
    z, v = (torch.randn(2, 4, 6, dtype=torch.float64, generator=generator) for _ in range(2))
    distillation = Distillation(nn.Identity(), temperature=2.0)
    z.requires_grad_()
    kept = [0, 2, 5]
    expected = distillation._divergence(z[..., kept], v[..., kept])
    (wanted,) = torch.autograd.grad(expected, z)
    out = torch.full((6,), -torch.inf, dtype=torch.float64).index_fill(0, torch.tensor(kept), 0.0)
    loss = distillation._divergence(z + out, v + out)
    (found,) = torch.autograd.grad(loss, z)
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(found, wanted)
    (alone,) = torch.autograd.grad(distillation._divergence(z, v + out), z)
    assert alone.isfinite().all()  # the student is to rule them out, too
    assert (alone[..., [1, 3, 4]] > 0).all()
    assert distillation._divergence(z + out, v) == torch.inf


def test_features_add_their_mean_square():
    student, teacher = mlp(0), mlp(1)
    plain = Distillation(teacher)(student, X)[1]
    pairs = {"1": "1", "3": "3"}
    _, loss = Distillation(teacher, features=pairs, feature_weight=2.0)(student, X)
    hints = [F.mse_loss(student[: i + 1](X), teacher[: i + 1](X)) for i in (1, 3)]
    torch.testing.assert_close(loss, plain + sum(hints))
    assert not student[1]._forward_hooks
    same = Distillation(teacher, features=("1", "3"), feature_weight=2.0)(student, X)[1]
    assert torch.equal(same, loss)
    loss.backward()
    assert student[0].weight.grad.any()


def test_features_of_a_wrapped_student():
    student = mlp(0)
    distillation = Distillation(nn.DataParallel(mlp(1)), features=["1", "3"])
    expected = Distillation(mlp(1), features=["1", "3"])(student, X)[1]
    wrapped = nn.DataParallel(student)
    wrapped.device_ids = []  # as without a GPU
    assert torch.equal(distillation(wrapped, X)[1], expected)
    wrapped.device_ids = [0, 1]
    with pytest.raises(ValueError, match="the student is an nn.DataParallel over 2 devices"):
        distillation(wrapped, X)


def test_the_teacher_is_a_frozen_copy():
    model = mlp().train()
    distillation = Distillation(model)
    _, loss = distillation(model, X)
    torch.testing.assert_close(loss, torch.zeros(()))
    with torch.no_grad():
        model[0].weight.zero_()
    assert distillation.teacher[0].weight.any()
    assert not distillation.teacher.training
    assert not any(p.requires_grad for p in distillation.teacher.parameters())
    assert model[0].weight.requires_grad


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_pruned_models_come_closer_to_their_teacher(execution):
    model = mlp()
    distillation = Distillation(model, features=["0", "2"])
    optimizer = torch.optim.Adam(model.parameters(), 0.01)
    pruner = TetrisPruner(
        model, sparsity=0.75, schedule=Cubic(0, 5), execution=execution, optimizers=optimizer,
        **FAST,
    )  # fmt: skip
    losses = []
    for _ in range(40):
        optimizer.zero_grad()
        _, loss = distillation(model, X)
        loss.backward()
        optimizer.step()
        pruner.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * max(losses)
    assert pruner.sparsity == pytest.approx(0.75)


def test_objects_with_logits_dicts_and_autocast():
    class Named(nn.Module):
        def __init__(self, seed):
            super().__init__()
            self.net = mlp(seed)

        def forward(self, x, scale):
            return SimpleNamespace(logits=self.net(x) * scale)

    student, teacher = Named(0), Named(1)
    with torch.autocast("cpu", torch.bfloat16):
        outputs, loss = Distillation(teacher)(student, {"x": X, "scale": 2.0})
    assert outputs.logits.dtype == torch.bfloat16
    assert loss.dtype == torch.float32
    loss.backward()


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: Distillation("model"), TypeError, "model must be an nn.Module"),
        (lambda: Distillation(mlp(), temperature=0), ValueError, r"temperature must.*got 0\)"),
        (lambda: Distillation(mlp(), feature_weight=-1), ValueError, "feature_weight must"),
        (lambda: Distillation(mlp(), features="9"), ValueError, "the teacher has no module '9'"),
        (lambda: Distillation(mlp())(mlp(), X[:, :3]), ValueError, r"inputs, float32\[8, 3\]"),
        (lambda: Distillation(mlp())(mlp(classes=4), X), ValueError, r"logits.*\[8, 4\].*\[8, 10"),
        (
            lambda: Distillation(mlp(), features="2")(mlp(width=24), X),
            ValueError,
            r"outputs of '2' must have one shape.*\[8, 24\] and \[8, 32\]",
        ),
        (
            lambda: Distillation(nn.Sequential(nn.Linear(16, 4)), features={"7": "0"})(mlp(), X),
            ValueError,
            "the student has no module '7'",
        ),
        (
            lambda: Distillation(nn.LSTM(16, 4))(nn.LSTM(16, 4), X),
            ValueError,
            "the teacher must return a tensor of logits",
        ),
    ],
)
def test_errors(make, error, message):
    with pytest.raises(error, match=f"tetris.prune.Distillation: .*{message}"):
        make()
