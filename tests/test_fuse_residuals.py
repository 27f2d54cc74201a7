"""fuse: which residuals go into a convolution, and why others do not."""

import re
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import tetris
from tetris import fuse


class Net(nn.Module):
    """Layers that keep a map's size, halve it and double it; ``forward(self, x)`` is given."""

    def __init__(self, compute):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(16, 16, 3, 1, 1), nn.Conv2d(16, 16, 3, 1, 1)
        self.down = nn.Conv2d(16, 16, 3, 2, 1)
        self.up, self.up2 = nn.ConvTranspose2d(16, 16, 3, 2, 1), nn.ConvTranspose2d(16, 16, 3, 2, 1)
        self.up4 = nn.ConvTranspose2d(16, 16, 4, 2, 1)
        self.same = nn.ConvTranspose2d(16, 16, 3, 1, 1)
        self.one = nn.ConvTranspose2d(16, 1, 3, 1, 1)
        self.norm = nn.BatchNorm2d(16)
        self.norm.running_mean = torch.randn(16)
        self.slope = nn.Parameter(torch.rand(16))
        self.module: nn.Module = nn.Identity()
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


class Linears(nn.Module):
    """A linear layer, and ``forward(self, x)``."""

    def __init__(self, compute):
        super().__init__()
        torch.manual_seed(0)
        self.fc = nn.Linear(16, 16)
        self.compute = compute

    def forward(self, x):
        return self.compute(self, x)


def checked(model, x):
    """Fuse the sparse model, compare in float64, and return the report."""
    model = tetris.sparsify(model.double(), sparsity=0.5, block=(4, 2), sweeps=1).eval()
    x = x.double()
    want = model(x.clone())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nothing was fused"
        fused, report = fuse(model, return_report=True)
    torch.testing.assert_close(fused(x.clone()), want, rtol=1e-11, atol=1e-11)
    return report


def residuals(report):
    return {layer.name: layer.residual for layer in report.fused if layer.residual is not None}


@pytest.mark.parametrize("shape", [(2, 16, 7, 5), (2, 16, 1, 8), (16, 6, 6)])
@pytest.mark.parametrize(
    ("compute", "name"),
    [
        (lambda m, x: F.relu(m.same(m.a(x)) + x), "same"),
        (lambda m, x: x + m.same(x), "same"),
        (lambda m, x: F.relu(m.up(x) + F.silu(m.up2(x))), "up"),
        (lambda m, x: m.up(m.down(x), output_size=x.shape[-2:]).add(x, alpha=1), "up"),
        (lambda m, x: torch.add(m.up(m.down(x), x.size()), other=m.a(x)), "up"),
        (lambda m, x: F.silu(x + m.up(F.relu(m.down(x)), x.shape)), "up"),
        (lambda m, x: m.up(m.down(x), m.b(x).size()) + F.gelu(m.a(x)), "up"),
        (lambda m, x: (lambda y: m.up(x, y.shape[-2:]) + y)(m.up2(x)), "up"),
    ],
)
def test_transposed_convolutions_take_residuals(compute, name, shape):
    report = checked(Net(compute), torch.randn(shape))
    assert list(residuals(report)) == [name]
    assert report.kept == {}


def test_batch_norm_and_residual_of_a_transposed_convolution():
    def compute(m, x):
        return F.relu(m.norm(m.up(m.down(x), output_size=x.shape[2:])) + x)

    report = checked(Net(compute), torch.randn(2, 16, 6, 7))
    (layer,) = report.fused
    assert (layer.batch_norm, layer.residual, layer.activation) == (["norm"], "x", "relu")


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda m, x: F.relu(m.up4(m.down(x)) + x), "up4 may have another shape than x"),
        (lambda m, x: m.up(m.down(x), (6, 6)) + x, "up may have another shape than x"),
        (lambda m, x: m.up(m.down(x[:1]), x.shape[-2:]) + x, "up may have another shape than x"),
        (lambda m, x: m.up(x) + m.up4(x)[..., :-1, :-1], "up may have another shape than getit"),
        (lambda m, x: m.same(x) + m.one(x), "same may have another shape than one"),
        (lambda m, x: m.same(x) + x.mean((2, 3), keepdim=True), "may have another shape than mean"),
    ],
)
def test_transposed_convolutions_that_may_have_another_size(compute, reason):
    report = checked(Net(compute), torch.randn(2, 16, 6, 6))
    assert residuals(report) == {}
    assert any(reason in text for text in report.kept.values())


@pytest.mark.parametrize(
    ("compute", "reason"),
    [
        (lambda m, x: m.a(x).add(x, alpha=2), "layer a takes a residual as it is, .* alpha=2"),
        (lambda m, x: torch.add(x, m.a(x), alpha=0.5), "layer a takes a residual .* alpha=0.5"),
        (lambda m, x: m.same(x).add_(x, alpha=2), "layer same takes a residual .* alpha=2"),
        (lambda m, x: m.a(x) + 1, "layer a takes a residual of its own shape, .* adds a number"),
        (lambda m, x: (lambda y: y + y)(m.a(x)), "layer a is added to itself"),
    ],
)
def test_sums_that_are_no_residual_are_reported(compute, reason):
    report = checked(Net(compute), torch.randn(2, 16, 6, 5))
    assert residuals(report) == {}
    (text,) = report.kept.values()
    assert re.match(reason, text)


@pytest.mark.parametrize(
    "compute", [lambda m, x: F.relu(m.fc(x) + x), lambda m, x: x.add(m.fc(x), alpha=2)]
)
def test_linear_layers_take_none(compute):
    report = checked(Linears(compute), torch.randn(3, 16))
    assert report.kept == {"add": "layer fc takes no residual (only convolutions do)"}


MODULES = [
    *(nn.ReLU6(), nn.Hardtanh(), nn.Hardswish(), nn.Hardsigmoid(), nn.LeakyReLU(0.1), nn.PReLU()),
    *(nn.PReLU(16), nn.RReLU(), nn.ELU(), nn.SELU(), nn.CELU(), nn.Softplus(), nn.Mish()),
    *(nn.Sigmoid(), nn.LogSigmoid(), nn.Tanh(), nn.Softsign(), nn.Tanhshrink(), nn.Hardshrink()),
    *(nn.Softshrink(), nn.Threshold(0.1, 2.0)),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: str(module))
def test_modules_that_keep_a_shape(module):
    model = Net(lambda m, x: x + m.b(m.module(m.a(x))))
    model.module = module
    report = checked(model, torch.randn(2, 16, 6, 5))
    assert residuals(report) == {"b": "x"}
    (text,) = report.kept.values()
    assert text.startswith(f"layer a cannot fuse {type(module).__name__}")


@pytest.mark.parametrize(
    ("function", "name"),
    [
        (F.relu6, "relu6"),
        (F.hardtanh, "hardtanh"),
        (F.hardswish, "hardswish"),
        (F.hardsigmoid, "hardsigmoid"),
        (lambda y: F.leaky_relu(y, 0.2), "leaky_relu"),
        (lambda y: F.leaky_relu_(y, 0.2), "leaky_relu_"),
        (lambda y: F.elu(y, inplace=True), "elu"),
        (F.selu, "selu"),
        (F.celu, "celu"),
        (F.rrelu, "rrelu"),
        (lambda y: F.softplus(y, 2), "softplus"),
        (F.mish, "mish"),
        (F.logsigmoid, "log_sigmoid"),
        (F.softsign, "softsign"),
        (F.tanhshrink, "tanhshrink"),
        (F.hardshrink, "hardshrink"),
        (F.softshrink, "softshrink"),
        (lambda y: F.threshold(y, 0.1, 2.0), "_threshold"),
        (lambda y: F.prelu(y, torch.full((16,), 0.1).double()), "prelu"),
        (torch.tanh, "tanh"),
        (torch.sigmoid, "sigmoid"),
        (lambda y: y.sigmoid(), "sigmoid"),
        (lambda y: y.tanh_(), "tanh_"),
    ],
)
def test_functions_that_keep_a_shape(function, name):
    report = checked(Net(lambda m, x: x + m.b(function(m.a(x)))), torch.randn(2, 16, 6, 5))
    assert residuals(report) == {"b": "x"}
    (text,) = report.kept.values()
    assert text.startswith(f"layer a cannot fuse {name} ")


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: 2 * y,
        lambda m, y: y * 0.5,
        lambda m, y: y.mul(3),
        lambda m, y: torch.div(y, 3),
        lambda m, y: 1 - y / 2,
        lambda m, y: -y,
        lambda m, y: F.dropout(y, 0.0),
    ],
)
def test_what_changes_numbers_only(function):
    report = checked(Net(lambda m, x: x + m.b(function(m, m.a(x)))), torch.randn(2, 16, 6, 5))
    assert residuals(report) == {"b": "x"}
    assert report.kept == {}


@pytest.mark.parametrize(
    "function",
    [
        lambda m, y: y * m.slope[:, None, None],
        lambda m, y: y * y,
        lambda m, y: torch.div(y, 3, rounding_mode="floor"),
        lambda m, y: y * y.size(2),
        lambda m, y: F.softmax(y, 1, dtype=torch.float64),
        lambda m, y: F.glu(torch.cat([y, y], 1), 1),
        lambda m, y: y.mean(0, keepdim=True).expand(2, -1, -1, -1),
    ],
)
def test_what_may_change_more_is_not_taken_to_keep_a_shape(function):
    report = checked(Net(lambda m, x: x + m.b(function(m, m.a(x)))), torch.randn(2, 16, 6, 5))
    assert residuals(report) == {}
    assert any("b may have another shape than x" in text for text in report.kept.values())


def test_a_value_tells_its_channels_behind_a_function_of_unknown_ones():
    def compute(m, x):
        y = torch.sigmoid(x.flip(0))
        return m.a(y) + y

    assert residuals(checked(Net(compute), torch.randn(2, 16, 6, 5))) == {"a": "sigmoid"}


def test_integers_are_no_residual_of_what_is_computed_from_them():
    model = tetris.sparsify(Net(lambda m, x: m.a(x * 0.5) + x), sparsity=0.5, sweeps=1).eval()
    x = torch.arange(2 * 16 * 5 * 4).view(2, 16, 5, 4) % 7
    with pytest.warns(UserWarning, match="a may have another shape than x"):
        fused = fuse(model)
    torch.testing.assert_close(fused(x), model(x))


def test_a_module_whose_hook_may_return_anything():
    model = Net(lambda m, x: m.a(x) + m.module(m.b(x)))
    model.module = nn.Tanh()
    model.module.register_forward_hook(lambda module, args, y: y.mean((2, 3), keepdim=True))
    report = checked(model, torch.randn(2, 16, 6, 5))
    assert residuals(report) == {}
    assert any("a may have another shape than module" in text for text in report.kept.values())


@pytest.mark.parametrize(
    "dropout",
    [
        lambda m, y: F.dropout(y, 0.5, training=m.training),
        lambda m, y: F.dropout(y, 0.5, False, True),
        lambda m, y: F.dropout2d(y, training=False),
        lambda m, y: F.alpha_dropout(y, 0.5),
    ],
)
def test_dropout_that_is_off_is_nothing(dropout):
    def compute(m, x):
        y = F.relu(dropout(m, m.a(x)))
        return F.relu(dropout(m, m.norm(m.b(y))) + dropout(m, y))

    report = checked(Net(compute), torch.randn(2, 16, 6, 5))
    assert [layer.activation for layer in report.fused] == ["relu", "relu"]
    assert list(residuals(report)) == ["b"]
    assert report.kept == {}


def test_dropout_that_is_on_stays():
    model = tetris.sparsify(Net(lambda m, x: F.relu(F.dropout(m.a(x), 0.5))), sparsity=0.5).eval()
    x = torch.randn(2, 16, 6, 5)
    with pytest.warns(UserWarning, match="nothing was fused"):
        fused = fuse(model)
    torch.manual_seed(1)
    want = model(x)
    torch.manual_seed(1)
    torch.testing.assert_close(fused(x), want)
