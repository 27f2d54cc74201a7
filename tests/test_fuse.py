"""fuse: equal outputs, fewer calls, and a reason for whatever stays."""

import copy
import operator
import pickle
import re
import warnings

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import prune

import tetris
from tetris import SparseLinear, fuse


def randomize(model, seed=0):
    """Give batch norms the statistics and scales of a trained network."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            size = module.num_features
            if module.track_running_stats:
                module.running_mean = torch.randn(size, generator=generator)
                module.running_var = torch.rand(size, generator=generator) + 0.5
            if module.affine:
                module.weight.data = torch.randn(size, generator=generator)
                module.bias.data = torch.randn(size, generator=generator)
    return model.eval()


def types(model):
    return [type(m) for m in model.modules()]


def check(model, *inputs, inplace=False):
    """Fuse, and compare with the model that was passed."""
    want = model(*inputs)
    fused, report = fuse(model, inplace=inplace, return_report=True)
    for result in (fused(*inputs), model(*inputs)):  # the model itself computes what it did
        torch.testing.assert_close(result, want, rtol=1e-5, atol=1e-5)
    return fused, report


def mlp(activation=nn.ReLU, bias=True):
    torch.manual_seed(0)
    return randomize(
        nn.Sequential(
            nn.Linear(20, 37, bias=bias),
            nn.BatchNorm1d(37),
            activation(),
            nn.Dropout(0.3),
            nn.Linear(37, 29, bias=bias),
            nn.BatchNorm1d(29, affine=False),
            activation(),
            nn.Linear(29, 5),
        )
    )


def sparse(model, **settings):
    settings = {"sparsity": 0.5, "block": (4, 2), "sweeps": 1} | settings
    return tetris.sparsify(model, **settings).eval()


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_dense_mlp(bias, inplace):
    fused, report = check(mlp(bias=bias), torch.randn(9, 20), inplace=inplace)
    assert nn.BatchNorm1d not in types(fused)
    assert types(fused).count(nn.ReLU) == 2  # nn.Linear fuses no activation
    assert [(f.name, f.batch_norm, f.activation) for f in report.fused] == [
        ("0", ["1"], "none"),
        ("4", ["5"], "none"),
    ]
    assert report.kept == {}


@pytest.mark.parametrize("reorder", ["identity", "l1_sort"])
@pytest.mark.parametrize(
    ("activation", "name"),
    [
        (nn.ReLU, "relu"),
        (nn.SiLU, "silu"),
        (nn.GELU, "gelu"),
        (lambda: nn.GELU(approximate="tanh"), "gelu_tanh"),
    ],
)
def test_sparse_mlp(activation, name, reorder):
    model = sparse(mlp(activation), reorder=reorder)
    fused, report = check(model, torch.randn(9, 20))
    assert [type(m) for m in fused.children()] == [SparseLinear] * 3
    assert [f.activation for f in report.fused] == [name, name]
    assert f"fused into 0: batch norm 1, {name}" in str(report)
    assert report.to_dict()["fused"][1]["batch_norm"] == ["5"]
    assert [m.activation for m in model if isinstance(m, SparseLinear)] == ["none"] * 3


def test_inplace_shares_parameters_and_keeps_the_model_right():
    model = sparse(mlp(nn.SiLU))
    fused, _ = check(model, torch.randn(9, 20), inplace=True)
    assert fused.get_submodule("0").values is model[0].values
    assert isinstance(model[1], nn.Identity)


@pytest.mark.parametrize(
    "function",
    [
        F.relu,
        torch.relu,
        F.gelu,
        F.silu,
        lambda x: x.relu(),
        lambda x: F.gelu(x, approximate="tanh"),
    ],
)
def test_activation_as_a_function(function):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(16, 12)

        def forward(self, x):
            return function(self.fc(x))

    fused, report = check(sparse(Net()), torch.randn(3, 16))
    assert report.fused[0].activation in ("relu", "gelu", "silu", "gelu_tanh")
    assert [n.op for n in fused.graph.nodes] == ["placeholder", "call_module", "output"]


DENSE_CONVOLUTIONS = {
    "conv1d": (lambda **kw: nn.Conv1d(6, 8, 3, **kw), nn.BatchNorm1d, (2, 6, 9)),
    "conv2d": (lambda **kw: nn.Conv2d(6, 8, 3, padding=1, **kw), nn.BatchNorm2d, (2, 6, 9, 7)),
    "reflect": (
        lambda **kw: nn.Conv2d(6, 8, 3, padding=1, padding_mode="reflect", **kw),
        nn.BatchNorm2d,
        (2, 6, 9, 7),
    ),
    "conv3d": (lambda **kw: nn.Conv3d(6, 8, 2, **kw), nn.BatchNorm3d, (2, 6, 4, 5, 3)),
    "transpose": (
        lambda **kw: nn.ConvTranspose2d(6, 8, 3, stride=2, **kw),
        nn.BatchNorm2d,
        (2, 6, 5, 4),
    ),
}


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", DENSE_CONVOLUTIONS)
def test_dense_convolutions(kind, groups):
    make, norm, shape = DENSE_CONVOLUTIONS[kind]
    for bias in (False, True):
        model = randomize(nn.Sequential(make(groups=groups, bias=bias), norm(8), norm(8)))
        fused, report = check(model, torch.randn(shape))
        assert len(list(fused.children())) == 1
        assert report.fused[0].batch_norm == ["1", "2"]


@pytest.mark.parametrize("groups", [1, 2])
@pytest.mark.parametrize("kind", ["conv1d", "conv2d", "reflect", "transpose"])
def test_sparse_convolutions(kind, groups):
    make, norm, shape = DENSE_CONVOLUTIONS[kind]
    for bias in (False, True):
        torch.manual_seed(0)
        model = randomize(nn.Sequential(make(groups=groups, bias=bias), norm(8), nn.ReLU()))
        model = sparse(model, include="0", block=(3, 2), sparsity=0.3)
        fused, report = check(model, torch.randn(shape))
        (layer,) = fused.children()
        assert layer.activation == "relu"
        assert layer.row_perm is not None  # the scale goes through it
        assert report.fused[0].batch_norm == ["1"]


def vgg():
    layers, channels = [], 3
    for width in (16, 16, "pool", 24, "pool"):
        if width == "pool":
            layers.append(nn.MaxPool2d(2))
            continue
        layers += [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU(True)]
        channels = width
    layers += [nn.Flatten(), nn.Linear(24 * 4, 32), nn.ReLU(True), nn.Dropout(), nn.Linear(32, 10)]
    torch.manual_seed(0)
    return randomize(nn.Sequential(*layers))


class Block(nn.Module):
    """The basic block of a ResNet, written as most are: one ReLU used twice, an in-place add."""

    def __init__(self, inputs, outputs, stride):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.relu = nn.ReLU(inplace=True)
        self.downsample = None
        if (inputs, stride) != (outputs, 1):
            conv = nn.Conv2d(inputs, outputs, 1, stride, bias=False)
            self.downsample = nn.Sequential(conv, nn.BatchNorm2d(outputs))

    def forward(self, x):
        identity = x
        out = self.relu(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        if self.downsample is not None:
            identity = self.downsample(x)
        out += identity
        return self.relu(out)


def resnet():
    torch.manual_seed(0)
    stem = [nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU(True)]
    blocks = [Block(16, 16, 1), Block(16, 32, 2)]
    head = [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)]
    return randomize(nn.Sequential(*stem, nn.MaxPool2d(3, 2, 1), *blocks, *head))


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("make", [vgg, resnet])
def test_dense_networks(make, memory_format):
    x = torch.randn(2, 3, 8 if make is vgg else 15, 8 if make is vgg else 15)
    fused, report = check(make(), x.contiguous(memory_format=memory_format))
    assert nn.BatchNorm2d not in types(fused)
    assert report.kept == {}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("block", [(8, 1), (4, 4)])
def test_sparse_vgg(block, memory_format):
    model = sparse(vgg(), block=block, exclude="13")
    fused, report = check(model, torch.randn(2, 3, 8, 8).contiguous(memory_format=memory_format))
    kinds = [type(m) for m in fused.children()]
    assert nn.BatchNorm2d not in kinds
    assert kinds.count(nn.ReLU) == 1  # behind the first convolution, which stays dense
    assert [f.activation for f in report.fused] == ["none", "relu", "relu", "relu"]
    assert report.kept == {}


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("inplace", [False, True])
def test_sparse_resnet(inplace, memory_format):
    model = sparse(resnet(), exclude="8")
    x = torch.randn(2, 3, 15, 15).contiguous(memory_format=memory_format)
    fused, report = check(model, x, inplace=inplace)
    assert report.kept == {}
    assert [(f.name, f.residual is not None, f.activation) for f in report.fused] == [
        ("0", False, "none"),
        ("4.conv1", False, "relu"),
        ("4.conv2", True, "relu"),
        ("5.conv1", False, "relu"),
        ("5.downsample.0", False, "none"),
        ("5.conv2", True, "relu"),
    ]
    called = [n.target for n in fused.graph.nodes if n.op == "call_function"]
    assert operator.add not in called
    assert operator.iadd not in called


def test_compiled():
    model = fuse(sparse(resnet(), exclude="8"))
    x = torch.randn(2, 3, 15, 15)
    with torch.no_grad():
        want = model(x)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want, rtol=1e-5, atol=1e-5)


class Add(nn.Module):
    """``forward(self, x)`` is given; two convolutions."""

    def __init__(self, forward, stride=1):
        super().__init__()
        self.a = nn.Conv2d(16, 16, 3, stride, 1)
        self.b = nn.Conv2d(16, 16, 3, 1, 1)
        self.c = nn.Conv2d(16, 1, 1)
        self.compute = forward

    def forward(self, x):
        return self.compute(self, x)


@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.a(x) + x,
        lambda m, x: x + m.a(x),
        lambda m, x: torch.add(m.b(m.a(x)), x),
        lambda m, x: F.silu(m.a(x).add_(x)),
        lambda m, x: F.relu(m.a(F.silu(x)) + m.b(x)),
    ],
)
def test_residuals(forward):
    model = sparse(Add(forward), include=["a", "b"])
    _, report = check(model, torch.randn(2, 16, 6, 5))
    assert [f.residual is not None for f in report.fused] == [True]
    assert report.kept == {}


@pytest.mark.parametrize(
    ("forward", "stride", "reason"),
    [
        (lambda m, x: m.a(x) + m.c(x), 1, "may have another shape than c"),
        (lambda m, x: m.a(x) + x.mean((2, 3), keepdim=True), 1, "may have another shape than mean"),
        (lambda m, x: m.b(x[:, :, ::2, ::2]) + m.a(x), 2, "may have another shape"),
        (lambda m, x: m.a(x) + F.max_pool2d(x, 3, 1, 1), 1, "may have another shape"),
        (lambda m, x: _used_twice(m.a(x), x), 1, "has an output that is used 2 times"),
        (lambda m, x: _overwritten(m, x + 0), 1, "has an input, add, that is overwritten"),
        (lambda m, x: _into(x + 0, m.a(x)), 1, "is added into the memory of add"),
        (lambda m, x: m.a(x) + x + F.relu(x), 1, "adds a residual already"),
    ],
)
def test_residuals_that_are_not_safe(forward, stride, reason):
    model = sparse(Add(forward, stride), include=["a", "b"])
    x = torch.randn(2, 16, 6, 6)
    want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nothing was fused"
        fused, report = fuse(model, return_report=True)
    torch.testing.assert_close(fused(x), want, rtol=1e-5, atol=1e-5)
    assert any(reason in r for r in report.kept.values())


class Doubled(tetris.SparseConv2d):
    """Takes no residual."""

    def forward(self, x):
        return 2 * super().forward(x)


class Single(tetris.SparseConv2d):
    """Has another shape than its settings say."""

    def forward(self, x):
        return super().forward(x)[:, :1]


class Overwriting(tetris.SparseConv2d):
    def forward(self, x):
        y = super().forward(x)
        x.mul_(2)
        return y


@pytest.mark.parametrize(
    ("kind", "forward", "fused"),
    [
        (Doubled, lambda m, x: m.a(x) + x, []),
        (Single, lambda m, x: m.b(x) + m.a(x), []),
        (Overwriting, lambda m, x: _overwritten_by(m, x + 0), []),
        (Doubled, lambda m, x: F.relu(m.b(F.silu(m.a(x)))), ["b"]),
    ],
)
def test_nothing_is_assumed_of_subclasses(kind, forward, fused):
    model, x = sparse(Add(forward), include=["a", "b"]), torch.randn(2, 16, 6, 5)
    model.a.__class__ = kind
    want = model(x)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # "nothing was fused"
        result, report = fuse(model, return_report=True)
    torch.testing.assert_close(result(x), want, rtol=1e-5, atol=1e-5)
    assert [f.name for f in report.fused] == fused


def _overwritten_by(m, x):
    y, other = m.b(x), F.silu(x)
    m.a(x)
    return y + other


def test_batch_norm_behind_a_residual_stays():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = sparse(nn.Sequential(nn.Conv2d(16, 16, 3, 1, 1)))[0]
            self.norm = nn.BatchNorm2d(16)

        def forward(self, x):
            return F.relu(self.norm(self.conv(x, x)))

    model, x = randomize(Net()), torch.randn(2, 16, 5, 5)
    with pytest.warns(UserWarning, match="layer conv takes more than its input"):
        fused = fuse(model)
    torch.testing.assert_close(fused(x), model(x))


def _used_twice(y, x):
    return (y + x) * y


def _overwritten(m, x):
    y = m.a(x)
    x.mul_(2)
    return y + x


@pytest.mark.parametrize(
    "change",
    [
        lambda x: operator.iadd(x, 1),
        lambda x: operator.isub(x, 1),
        lambda x: operator.imul(x, 3),
        lambda x: operator.itruediv(x, 3),
        lambda x: operator.ifloordiv(x, 3),
        lambda x: operator.imod(x, 3),
        lambda x: operator.ipow(x, 2),
    ],
)
def test_in_place_operators_change_the_value_itself(change):
    def forward(m, x):
        y = alias = x + 0
        y = change(y)
        return F.relu(m.a(alias)) + y.sum()

    check(sparse(Add(forward), include=["a", "b"]), torch.randn(2, 16, 6, 5))


@pytest.mark.parametrize(
    "change", [operator.iand, operator.ior, operator.ixor, operator.ilshift, operator.irshift]
)
def test_in_place_operators_of_integers(change):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc = nn.Linear(8, 8)

        def forward(self, x, index):
            y = alias = index + 0
            y = change(y, 1)
            return F.relu(self.fc(x)) + alias

    check(sparse(Net()), torch.randn(3, 8), torch.arange(24).view(3, 8))


def _into(x, y):
    x += y
    return x


class Branches(nn.Module):
    """Everything that must not be fused."""

    def __init__(self):
        super().__init__()
        self.twice = nn.Linear(8, 8)
        self.used = nn.Linear(8, 8)
        self.batch = nn.Linear(8, 8)
        self.norm_twice = nn.BatchNorm1d(8)
        self.norm_used = nn.BatchNorm1d(8)
        self.norm_batch = nn.BatchNorm1d(8, track_running_stats=False)
        self.norm_input = nn.BatchNorm1d(8)
        self.good = nn.Linear(8, 8)
        self.norm_good = nn.BatchNorm1d(8)
        self.read = nn.Linear(8, 8)
        self.norm_read = nn.BatchNorm1d(8)

    def forward(self, x):
        a = self.norm_twice(self.twice(x)) + self.twice(x + 1)
        b = self.used(x)
        b = self.norm_used(b) + b
        c = self.norm_batch(self.batch(x))
        d = self.norm_read(self.read(x)) + self.read.bias
        return self.norm_good(self.good(a + b + c + d + self.norm_input(x)))


def test_what_stays_has_a_reason():
    _, report = check(randomize(Branches()), torch.randn(7, 8))
    assert [f.name for f in report.fused] == ["good"]
    assert report.kept == {
        "norm_twice": "layer twice is used 2 times",
        "norm_used": "layer used has an output that is used 2 times",
        "norm_batch": "it has no running statistics, so it normalizes by each batch",
        "norm_read": "the parameters of layer read are read elsewhere in forward",
        "norm_input": "it follows the input x, not a linear layer or convolution",
    }
    assert "left: norm_used: layer used has" in str(report)


def test_hooks_stay_with_their_layer():
    seen = []
    model = mlp()
    model[0].register_forward_hook(lambda module, args, out: seen.append(out))
    fused, report = check(model, torch.randn(4, 20))
    assert report.kept == {"1": "layer 0 has forward_hooks"}
    assert len(seen) == 3
    assert torch.equal(seen[0], seen[1])


def test_shared_batch_norm_and_tied_weights():
    first, norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
    second = nn.Linear(8, 8)
    second.weight = first.weight
    model = randomize(nn.Sequential(first, norm, second, norm))
    with pytest.warns(UserWarning, match="nothing was fused in Sequential .1: it is used 2 times"):
        fuse(model)
    model = randomize(nn.Sequential(first, norm, second))
    check(model, torch.randn(4, 8))  # the other user of the weight keeps it


def test_parametrized_layers_are_left_alone():
    model = mlp()
    nn.utils.parametrizations.weight_norm(model[0])
    prune.l1_unstructured(model[4], "weight", 0.5)
    with pytest.warns(UserWarning, match="ParametrizedLinear.*forward_pre_hooks"):
        fuse(model.eval(), inplace=True)  # torch cannot copy such a model


def test_activation_that_cannot_be_fused_has_a_reason():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 8), nn.Linear(8, 8)

        def forward(self, x):
            y = self.a(x)
            return F.relu(y) + y + F.relu(F.silu(self.b(x)))

    fused, report = check(sparse(Net()), torch.randn(3, 8))
    assert report.kept == {"relu": "layer a has an output that is used 2 times"}
    assert [(f.name, f.activation) for f in report.fused] == [("b", "silu")]


def test_training_mode_is_refused():
    model = mlp()
    model[1].train()
    with pytest.raises(ValueError, match="must be in eval mode.*1 modules in training.*first '1'"):
        fuse(model)
    with pytest.raises(TypeError, match="must be an nn.Module"):
        fuse(mlp().state_dict())


class Untraceable(nn.Module):
    def __init__(self, chain):
        super().__init__()
        self.chain = chain
        self.heads = nn.ModuleList([nn.Sequential(nn.Linear(5, 3), nn.BatchNorm1d(3))])

    def forward(self, x):
        x = self.chain(x)
        return self.heads[0](x) if x.sum() > 0 else self.heads[0](-x)


@pytest.mark.parametrize("inplace", [False, True])
def test_chains_of_an_untraceable_model(inplace):
    model = randomize(Untraceable(mlp()))
    fused, report = check(model, torch.randn(6, 20), inplace=inplace)
    assert isinstance(fused, Untraceable)
    assert nn.BatchNorm1d not in types(fused)
    assert [f.name for f in report.fused] == ["chain.0", "chain.4", "heads.0.0"]
    assert "Untraceable cannot be traced: TraceError" in report.untraced
    assert "only nn.Sequential chains and modules of one argument were fused" in str(report)


def test_a_chain_that_shares_a_layer_with_the_rest():
    model = Untraceable(mlp())
    model.other = model.chain[0]
    _, report = check(randomize(model), torch.randn(6, 20))
    assert report.kept == {"chain.1": "layer chain.0 is also used as other"}


def test_untraceable_with_nothing_to_fuse_says_both():
    model = Untraceable(nn.Sequential(nn.Linear(20, 5)))
    model.heads[0][1] = nn.Identity()
    with pytest.raises(ValueError, match="Untraceable cannot be traced.*have nothing to fuse"):
        fuse(model.eval(), inplace=True)  # torch cannot copy such a model


def test_hooks_and_random_numbers_cannot_be_traced():
    class Noise(nn.Module):
        def forward(self, x):
            return x + torch.randn(3)

    model = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3), Noise()).eval()
    with pytest.raises(ValueError, match="draws random numbers"):
        fuse(model)
    hooked = nn.Sequential(mlp()).eval()
    hooked.register_forward_hook(lambda *_: None)
    _, report = fuse(hooked, return_report=True)
    assert [f.name for f in report.fused] == ["0.0", "0.4"]
    assert "'the model' has forward_hooks" in report.untraced


def test_optional_arguments_take_their_default():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)

        def forward(self, x, mask=None, double=False):
            x = self.norm(self.fc(x))
            x = x if mask is None else x * mask
            return 2 * x if double else x

    fused, _ = check(randomize(Net()), torch.randn(3, 8))
    with pytest.raises(AssertionError, match="mask has been specialized"):
        fused(torch.randn(3, 8), torch.ones(8))


def test_arguments_keep_their_names_and_numbers_are_not_fixed():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.norm, self.mask = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.ReLU()

        def forward(self, x, mask=None, mask_1=1.0, dim=1, *, keep=True):
            x = self.mask(self.norm(self.fc(x))) * mask_1
            x = x if mask is None else x * mask
            return x.softmax(dim) if keep else x

    model, x = randomize(Net()), torch.randn(3, 8)
    fused, _ = check(model, x)
    torch.testing.assert_close(fused(x, mask=None, keep=True), model(x), rtol=1e-5, atol=1e-5)
    want = model(x, mask_1=0.5, dim=0)
    torch.testing.assert_close(fused(x=x, mask_1=0.5, dim=0), want, rtol=1e-5, atol=1e-5)
    with pytest.raises(AssertionError, match="mask has been specialized to have value None"):
        fused(x, mask=torch.ones(8))
    with pytest.raises(AssertionError, match="keep has been specialized to have value True"):
        fused(x, keep=False)


def test_a_forward_of_the_object_cannot_be_traced():
    model = nn.Sequential(mlp())
    model.forward = lambda x, inner=model[0]: 2 * inner(x)
    _, report = check(model.eval(), torch.randn(3, 20))
    assert "forward was replaced" in report.untraced


def doubled(layer):
    """Replace a layer's forward in the object, as wrappers do."""
    inner = layer.forward
    layer.forward = lambda x: 1 - 2 * inner(x)


def test_a_layer_with_a_forward_of_its_own_takes_nothing_over():
    model = mlp()
    doubled(model[0])
    _, report = check(model, torch.randn(9, 20))
    assert [f.name for f in report.fused] == ["4"]
    assert report.kept == {"1": "layer 0 has a forward of its own"}


def test_a_sparse_layer_with_a_forward_of_its_own_takes_nothing_over():
    model = sparse(nn.Sequential(nn.Linear(20, 16), nn.ReLU(), nn.Linear(16, 8), nn.ReLU()))
    doubled(model[0])
    _, report = check(model, torch.randn(9, 20))
    assert [f.name for f in report.fused] == ["2"]
    assert list(report.kept.values()) == ["layer 0 has a forward of its own"]


@pytest.mark.parametrize("number", [1, 2, 3])
def test_what_has_a_forward_of_its_own_is_taken_over_by_nothing(number):
    layers = [nn.Linear(20, 16), nn.BatchNorm1d(16), nn.Dropout(), nn.ReLU()]
    model = randomize(sparse(nn.Sequential(*layers)))
    doubled(model[number])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing is fused if it is the batch norm
        check(model, torch.randn(9, 20))


def test_no_residual_of_unknown_shape():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            return self.conv(x) + self.other(x)

    model = sparse(Block(), exclude="other")
    x = torch.randn(2, 16, 4, 4)
    _, report = check(model, x)
    assert [f.residual for f in report.fused] == ["other"]
    inner = model.other.forward
    model.other.forward = lambda x: inner(x).mean((2, 3), keepdim=True)
    with pytest.warns(UserWarning, match="may have another shape than other"):
        check(model, x)


@pytest.mark.parametrize(
    ("name", "forward"), [("before", lambda x: x), ("between", lambda x: x.mul_(2))]
)
def test_no_residual_if_a_forward_of_its_own_changes_the_input(name, forward):
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.other = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)
            self.before, self.between = nn.Conv2d(16, 16, 1), nn.Conv2d(16, 16, 1)

        def forward(self, x):
            x = x + 1
            copy = self.before(x)
            y, other = self.conv(x), self.other(x)
            copy.mul_(2)
            self.between(x)
            return y + other

    model = sparse(Block(), exclude=["other", "before", "between"])
    x = torch.randn(2, 16, 4, 4)
    _, report = check(model, x)
    assert [f.residual for f in report.fused] == ["other"]
    model.get_submodule(name).forward = forward
    with pytest.warns(UserWarning, match="that is overwritten before the add"):
        check(model, x)


def test_the_forward_of_the_class_put_back_is_none_of_its_own():
    model = sparse(nn.Sequential(nn.Linear(20, 16), nn.ReLU()))
    for module in (model, model[0], model[1]):
        module.forward = module.forward
    fused, report = check(model, torch.randn(9, 20))
    assert str(report) == "fused into 0: relu"
    assert nn.ReLU not in {type(module) for _, module in fused.named_children()}


def test_a_forward_inside_is_traced():
    model = nn.Sequential(mlp())
    first, norm = model[0][:2]
    model[0].forward = lambda x: 2 * norm(first(x))
    x = torch.randn(9, 20)
    want = model.eval()(x)
    fused, report = fuse(model, inplace=True, return_report=True)  # a copy would call these layers
    assert [f.name for f in report.fused] == ["0.0"]
    torch.testing.assert_close(fused(x), want, rtol=1e-5, atol=1e-5)


def test_the_weight_that_a_sparse_layer_has_not_cannot_be_traced():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc, self.act = nn.Linear(16, 16), nn.ReLU()
            self.inner = nn.Sequential(nn.Linear(16, 16), nn.ReLU())

        def forward(self, x):
            return self.inner(self.act(self.fc(x)) + F.linear(x, self.fc.weight))

    _, report = fuse(sparse(Net()), return_report=True)
    assert [f.name for f in report.fused] == ["inner.0"]
    assert "a sparse layer has no dense weight" in report.untraced


@pytest.mark.parametrize("scale", [torch.tensor(1.0), torch.ones(3), np.ones(3)])
def test_arrays_as_defaults_cannot_be_traced(scale):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))

        def forward(self, x, scale=scale):
            return self.inner(x) * torch.as_tensor(scale).float()

    _, report = check(randomize(Net()), torch.randn(2, 3))
    assert [f.name for f in report.fused] == ["inner.0"]
    assert "cannot be traced" in report.untraced


def test_a_folded_linear_layer_refuses_sequences():
    fused = fuse(randomize(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8))))
    with pytest.raises(AssertionError, match=r"folded into 0, for inputs \[N, features\]"):
        fused(torch.randn(2, 8, 8))


@pytest.mark.parametrize("convert", [lambda model: model, sparse])
@pytest.mark.parametrize("kind", [nn.Conv1d, nn.ConvTranspose1d])
def test_a_folded_convolution_refuses_unbatched_sequences(kind, convert):
    model = nn.Sequential(kind(16, 8, 1), nn.BatchNorm1d(8))
    if kind is nn.Conv1d:
        model = convert(model)
    fused = fuse(randomize(model))
    with pytest.raises(AssertionError, match=r"folded into 0, for inputs \[N, channels, L\]"):
        fused(torch.randn(16, 8))


def test_batch_norm_of_another_axis_stays():
    model = randomize(nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm1d(8)))  # takes [C, H, W]
    with pytest.warns(UserWarning, match="channels along another axis than a BatchNorm1d"):
        fused = fuse(model)
    x = torch.randn(3, 8, 5)
    torch.testing.assert_close(fused(x), model(x))


LAYERS_OF_SYNC = {
    "linear": (lambda: nn.Linear(16, 16), (5, 16), (2, 16, 16), "[N, features]"),
    "conv1d": (lambda: nn.Conv1d(16, 16, 1), (2, 16, 9), (16, 16), "[N, channels, L]"),
    "conv2d": (lambda: nn.Conv2d(16, 16, 1), (2, 16, 5, 4), (16, 16, 4), "[N, channels, H, W]"),
    "conv3d": (lambda: nn.Conv3d(16, 16, 1), (2, 16, 3, 2, 4), (16, 16, 2, 4), "[N, channels, D"),
    "up": (lambda: nn.ConvTranspose2d(16, 16, 2, 2), (2, 16, 3, 4), (16, 8, 4), "[N, channels, H"),
}


@pytest.mark.parametrize("convert", [False, True])
@pytest.mark.parametrize("kind", LAYERS_OF_SYNC)
def test_sync_batch_norm_is_folded_for_inputs_of_which_it_normalizes_the_channels(kind, convert):
    make, shape, other, axes = LAYERS_OF_SYNC[kind]
    torch.manual_seed(0)
    model = randomize(nn.Sequential(make(), nn.SyncBatchNorm(16), nn.ReLU())).double()
    if convert and kind != "conv3d":
        model = sparse(model, include="0")
    fused, report = fuse(model, return_report=True)
    assert report.fused[0].batch_norm == ["1"]
    assert report.kept == {}
    x = torch.randn(shape).double()
    torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11)
    model(torch.randn(other).double())  # another axis is normalized
    with pytest.raises(AssertionError, match=re.escape(f"folded into 0, for inputs {axes}")):
        fused(torch.randn(other).double())


def test_batch_norm_as_a_function_is_reported():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(16, 16, 1), nn.BatchNorm2d(16)

        def forward(self, x):
            mean, var = self.norm.running_mean, self.norm.running_var
            return F.batch_norm(self.conv(x), mean, var, training=self.training)

    with pytest.warns(UserWarning, match=r"batch_norm: it is a function, and only modules such as"):
        _, report = check(randomize(Net()), torch.randn(2, 16, 4, 4))
    assert list(report.kept) == ["batch_norm"]


@pytest.mark.parametrize("size", [[7, 8], (7, 8)])
@pytest.mark.parametrize("convert", [lambda model: model, sparse])
@pytest.mark.parametrize("by_name", [False, True])
def test_batch_norm_behind_an_output_size(size, convert, by_name):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.up, self.norm = nn.ConvTranspose2d(16, 16, 3, 2, 1), nn.BatchNorm2d(16)

        def forward(self, x):
            y = self.up(x, output_size=size) if by_name else self.up(x, size)
            return F.relu(self.norm(y))

    torch.manual_seed(0)
    model = convert(randomize(Net()).double())
    x = torch.randn(2, 16, 4, 4).double()
    fused, report = fuse(model, return_report=True)
    assert [f.batch_norm for f in report.fused] == [["norm"]]
    assert report.kept == {}
    assert fused(x).shape == (2, 16, 7, 8)
    torch.testing.assert_close(fused(x), model(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize(
    ("layers", "name"),
    [
        (lambda: [nn.LazyConv2d(8, 3), nn.BatchNorm2d(8)], "0, a LazyConv2d,"),
        (lambda: [nn.Conv2d(4, 8, 3), nn.LazyBatchNorm2d()], "1, a LazyBatchNorm2d,"),
    ],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_layers_of_unknown_size_are_refused(layers, name, inplace):
    model = nn.Sequential(*layers()).eval()
    with pytest.raises(ValueError, match=f"the size of {name} is not known yet: call the model on"):
        fuse(model, inplace=inplace)
    model(torch.randn(2, 4, 6, 6))
    check(randomize(model), torch.randn(2, 4, 6, 6), inplace=inplace)


@pytest.mark.parametrize("norm", [True, False])
def test_a_model_that_a_pruner_still_masks(norm):
    layers = [nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU()]
    model = nn.Sequential(*layers if norm else layers[::2])
    pruner = tetris.prune.TetrisPruner(model, sparsity=0.5, block=(4, 4))
    with pytest.warns(UserWarning, match=r"0 is masked by a pruner: call its finalize\(\) first"):
        fuse(model.eval())
    check(pruner.finalize().eval(), torch.randn(2, 16, 6, 6))


def test_a_model_that_is_trained_with_sampled_blocks():
    model = nn.Sequential(nn.Conv2d(16, 16, 3), nn.BatchNorm2d(16), nn.ReLU())
    tetris.prune.VRPGEPruner(model, sparsity=0.5, block=(4, 4))
    with pytest.raises(ValueError, match=r"0 is masked by a pruner: call its finalize\(\) first"):
        fuse(model.eval())


def test_a_single_layer_has_nothing_to_fuse():
    with pytest.warns(UserWarning, match="nothing was fused in Linear"):
        fuse(nn.Linear(3, 3).eval())


def test_the_result_is_an_ordinary_module():
    model = sparse(mlp())
    x = torch.randn(9, 20)
    want = model(x)
    fused = fuse(model)
    for twin in (copy.deepcopy(fused), pickle.loads(pickle.dumps(fused))):
        torch.testing.assert_close(twin(x), want, rtol=1e-5, atol=1e-5)
    fresh = fuse(sparse(mlp(), sparsity=0.75))
    fresh.load_state_dict(fused.state_dict())
    torch.testing.assert_close(fresh(x), want, rtol=1e-5, atol=1e-5)
    with pytest.warns(UserWarning, match="nothing was fused"):
        fuse(fused)


@pytest.mark.parametrize("activation", [nn.ReLU6(), nn.Hardswish(), nn.LeakyReLU(0.1), nn.Tanh()])
def test_the_report_says_which_activations_stay(activation):
    model = nn.Sequential(
        nn.Conv2d(16, 16, 3),
        nn.BatchNorm2d(16),
        activation,
        nn.Conv2d(16, 16, 1),
        nn.BatchNorm2d(16),
    )
    sparse = tetris.sparsify(model, sparsity=0.5, sweeps=1).eval()
    _, report = tetris.fuse(sparse, return_report=True)
    name = type(activation).__name__
    assert any(f"cannot fuse {name} (only relu, " in reason for reason in report.kept.values())


def test_the_report_says_which_functions_stay():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x):
            return nn.functional.relu(self.b(torch.sigmoid(self.a(x))))

    sparse = tetris.sparsify(Net(), sparsity=0.5, sweeps=1).eval()
    _, report = tetris.fuse(sparse, return_report=True)
    assert list(report.kept) == ["sigmoid"]


class Gated(nn.Module):
    """A part that takes one argument, and one that has a branch which it is not known to take."""

    def __init__(self):
        super().__init__()
        self.up, self.gate, self.down = nn.Linear(16, 32), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return self.down(F.silu(self.gate(x)) * self.up(x))


class Branch(Gated):
    def forward(self, x, scale=None):
        y = F.relu(self.gate(x)) * self.up(x)
        return self.down(y if scale is None else y * scale)


def test_parts_of_one_argument_of_an_untraceable_model():
    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.gated, self.branch = Gated(), Branch()

        def forward(self, x):
            x = self.gated(x) if float(x.sum()) > 0 else x
            return self.branch(x, 2.0)

    torch.manual_seed(0)
    sparse = tetris.sparsify(Outer().eval(), sparsity=0.5, block=(4, 4), sweeps=1)
    fused, report = tetris.fuse(sparse, return_report=True)
    assert [(layer.name, layer.activation) for layer in report.fused] == [("gated.gate", "silu")]
    x = torch.rand(3, 16)
    torch.testing.assert_close(fused(x), sparse(x))
