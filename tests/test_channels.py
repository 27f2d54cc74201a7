"""shrink_channels: smaller dense models that compute what the masked ones do."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.utils import prune

from tetris.prune.dcp.channels import SelectChannels, shrink_channels


def seeded(make):
    """A model with batch norm statistics of its own, in eval mode."""
    torch.manual_seed(0)
    model = make()
    for module in model.modules():
        if isinstance(module, (nn.BatchNorm1d, nn.BatchNorm2d)):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2.0)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return model.eval()


def masked(model, keep):
    """The model with zero weights where input channels are not kept."""
    model = copy.deepcopy(model)
    for name, mask in keep.items():
        layer = model.get_submodule(name)
        axis = 0 if isinstance(layer, nn.ConvTranspose2d) else 1
        view = [1] * layer.weight.dim()
        view[axis] = -1
        with torch.no_grad():
            layer.weight.mul_(mask.view(view))
    return model


def some(count, kept, seed=0):
    order = torch.randperm(count, generator=torch.Generator().manual_seed(seed))
    mask = torch.zeros(count, dtype=torch.bool)
    mask[order[:kept]] = True
    return mask


def check(model, keep, x):
    """Shrink, compare with the masked model, and return the small one and its report."""
    before = copy.deepcopy(model.state_dict())
    small, report = shrink_channels(model, keep)
    with torch.no_grad():
        expected, y = masked(model, keep)(x), small(x)
    assert float((y - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())  # untouched
    return small, report


def plain():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1),
        nn.BatchNorm2d(16),
        nn.ReLU(inplace=True),
        nn.Conv2d(16, 24, 3, padding=1, bias=False),
        nn.BatchNorm2d(24),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Conv2d(24, 32, 3, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 16, 20),
        nn.BatchNorm1d(20),
        nn.ReLU(),
        nn.Linear(20, 10),
    )


class Block(nn.Module):
    def __init__(self, inputs, outputs, stride=1):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.shortcut = None
        if stride > 1 or inputs != outputs:
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        y += x if self.shortcut is None else self.shortcut(x)
        return F.relu(y)


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.one = Block(16, 16)
        self.two = Block(16, 16)
        self.three = Block(16, 32, 2)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(32, 10)

    def forward(self, x):
        x = self.three(self.two(self.one(F.relu(self.stem(x)))))
        return self.fc(torch.flatten(self.pool(x), 1))


def test_plain_cnn_loses_rows_norms_and_columns():
    model = seeded(plain)
    features = some(32, 9, 2).repeat_interleave(16) & some(512, 300, 3)
    keep = {"3": some(16, 5), "7": some(24, 7, 1), "10": features, "13": some(20, 6, 4)}
    small, report = check(model, keep, torch.randn(3, 1, 8, 8))
    shapes = {n: tuple(p.shape) for n, p in small.named_parameters()}
    assert shapes["0.weight"] == (5, 1, 3, 3)
    assert shapes["1.weight"] == (5,)
    assert shapes["3.weight"] == (7, 5, 3, 3)
    assert shapes["7.weight"] == (9, 7, 3, 3)
    assert isinstance(small[10], nn.Sequential)  # 32 x 16 features: some of a channel's only
    assert small[10][1].weight.shape == (6, int(features.sum()))
    assert shapes["13.weight"] == (10, 6)
    assert (small[3].in_channels, small[3].out_channels, small[1].num_features) == (5, 7, 5)
    by_name = {layer.name: layer for layer in report.layers}
    assert by_name["3"].inputs == (5, 16)
    assert by_name["0"].outputs == (5, 16)
    assert by_name["3"].gathers is None
    assert "flattened features" in by_name["10"].gathers
    assert "3: inputs 5 of 16, outputs 7 of 24" in str(report)


def test_residual_stream_goes_only_where_every_reader_agrees():
    model = seeded(Residual)
    stream = some(16, 6)
    keep = {f"{b}.conv1": stream for b in ("one", "two", "three")}
    keep |= {f"{b}.conv2": some(16, 4, 1) for b in ("one", "two")}
    x = torch.randn(2, 3, 8, 8)
    small, report = check(model, keep, x)
    # The shortcut of `three` reads all of the stream: producers keep their rows.
    assert small.stem.out_channels == 16
    assert small.one.conv1[1].weight.shape == (4, 6, 3, 3)
    assert isinstance(small.one.conv1[0], SelectChannels)
    gathers = {layer.name: layer.gathers for layer in report.layers}
    assert "three.shortcut.0" in gathers["one.conv1"]
    assert gathers["one.conv2"] is None
    keep["three.shortcut.0"] = stream
    small, report = check(model, keep, x)
    assert small.stem.out_channels == small.one.conv2.out_channels == 6
    assert small.two.bn2.num_features == small.three.conv1.in_channels == 6
    assert all(layer.gathers is None for layer in report.layers)


def test_readers_that_differ_gather_from_the_union():
    model = seeded(Residual)
    keep = {f"{b}.conv1": some(16, 4, i) for i, b in enumerate(("one", "two", "three"))}
    keep["three.shortcut.0"] = some(16, 4, 3)
    small, report = check(model, keep, torch.randn(2, 3, 8, 8))
    union = torch.stack(list(keep.values())).any(0)
    assert small.stem.out_channels == int(union.sum()) < 16
    assert [layer.gathers is None for layer in report.layers if layer.name in keep] == [False] * 4


def test_mlp():
    def make():
        return nn.Sequential(
            nn.Flatten(), nn.Linear(64, 30), nn.ReLU(), nn.Linear(30, 20), nn.GELU(),
            nn.Dropout(0.5), nn.Linear(20, 10),
        )  # fmt: skip

    keep = {"1": some(64, 20), "3": some(30, 10), "6": some(20, 5)}
    small, report = check(seeded(make), keep, torch.randn(4, 8, 8))
    assert [tuple(p.shape) for p in small.parameters() if p.dim() == 2] == [
        (10, 20),
        (5, 10),
        (10, 5),
    ]
    # The model's input cannot become smaller.
    assert "input input_1" in next(r for r in report.layers if r.name == "1").gathers


class Mixed(nn.Module):
    """Depthwise, grouped, transposed convolutions, a concatenation and averages."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 1)
        self.depthwise = nn.Conv2d(8, 8, 3, padding=1, groups=8)
        self.norm = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(3, 12, 1)
        self.c = nn.Conv2d(20, 16, 3, padding=1)
        self.grouped = nn.Conv2d(16, 16, 3, padding=1, groups=4)
        self.up = nn.ConvTranspose2d(16, 24, 2, stride=2)
        self.d = nn.ConvTranspose2d(24, 8, 2, stride=2)
        self.fc = nn.Linear(8, 10)

    def forward(self, x):
        a = self.norm(self.depthwise(self.a(x))).clamp(-1.0, 1.0) * 2.0
        x = torch.cat([a, torch.sigmoid(self.b(x))], dim=1)
        x = F.relu(self.grouped(F.relu(self.c(x))))
        x = self.d(F.max_pool2d(self.up(x), 2))
        return self.fc(x.mean((2, 3)))


def test_depthwise_transposed_and_concatenated_channels_go_along_and_groups_stay():
    model = seeded(Mixed)
    keep = {"c": some(20, 9), "up": some(16, 5, 1), "d": some(24, 7, 2), "fc": some(8, 3, 3)}
    small, report = check(model, keep, torch.randn(2, 3, 8, 8))
    first = int(keep["c"][:8].sum())
    assert small.a.out_channels == small.depthwise.groups == small.norm.num_features == first
    assert small.b.out_channels == 9 - first
    assert small.c.weight.shape == (16, 9, 3, 3)  # what the grouped one reads stays
    assert small.up[1].weight.shape == (5, 7, 2, 2)  # its input comes from the grouped one
    assert "groups" in next(r for r in report.layers if r.name == "up").gathers
    assert small.d.weight.shape == (7, 3, 2, 2)


def test_channels_stay_where_the_graph_does_not_tell():
    class Odd(nn.Module):
        def __init__(self, how):
            super().__init__()
            self.first, self.second = nn.Linear(8, 16), nn.Linear(16, 4)
            self.how = how

        def forward(self, x):
            return self.second(self.how(self.first(x)))

    keep = {"second": some(16, 5)}
    for how in (
        lambda y: y.softmax(-1),
        lambda y: F.layer_norm(y, (16,)),
        lambda y: y * y.size(-1),
        lambda y: y.flip(1),
        lambda y: y + torch.ones(16),
        lambda y: y.view(-1, 16),
    ):
        small, report = check(seeded(lambda how=how: Odd(how)), keep, torch.randn(3, 8))
        assert small.first.out_features == 16
        assert report.layers[0].gathers is not None
    small, _ = check(seeded(lambda: Odd(lambda y: y * y.size(0))), keep, torch.randn(3, 8))
    assert small.first.out_features == 5


def test_outputs_of_the_model_stay():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(8, 16), nn.Linear(16, 4)

        def forward(self, x):
            hidden = self.a(x).relu()
            return self.b(hidden), hidden.sum(1)

    model = seeded(Two)
    small, report = shrink_channels(model, {"b": some(16, 5)})
    assert small.a.out_features == 16
    x = torch.randn(3, 8)
    for got, expected in zip(small(x), masked(model, {"b": some(16, 5)})(x), strict=True):
        torch.testing.assert_close(got, expected)


def test_small_models_train_save_and_load():
    model = seeded(Residual)
    keep = {"one.conv1": some(16, 6), "one.conv2": some(16, 4, 1)}
    small, _ = shrink_channels(model, keep)
    other, _ = shrink_channels(seeded(Residual), keep)
    with torch.no_grad():
        for p in other.parameters():
            p.zero_()
    other.load_state_dict(small.state_dict())
    x = torch.randn(2, 3, 8, 8)
    assert torch.equal(small(x), other(x))
    small.train()(x).sum().backward()
    assert all(p.grad is not None for p in small.parameters())
    changed, _ = shrink_channels(model, keep, inplace=True)
    assert changed is model
    assert torch.equal(changed.eval()(x), other(x))


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({"nothing": some(16, 5)}, "'nothing' is no module"),
        ({"norm": some(8, 5)}, "a BatchNorm2d"),
        ({"grouped": some(16, 5)}, "4 groups cannot lose single input channels"),
        ({"c": some(19, 5)}, r"must be bool\[20\]"),
        ({"c": torch.zeros(20, dtype=torch.bool)}, "at least one True"),
        ({"c": torch.ones(20)}, r"must be bool\[20\]"),
    ],
)
def test_errors_say_what_to_do(keep, message):
    with pytest.raises(ValueError, match=message):
        shrink_channels(seeded(Mixed), keep)


def test_shared_layers_and_untraceable_models_are_refused():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            return self.layer(self.layer(x))

    class Branch(Twice):
        def forward(self, x):
            return self.layer(x) if x.sum() > 0 else x

    with pytest.raises(ValueError, match="called 2 times"):
        shrink_channels(Twice(), {"layer": some(8, 3)})
    with pytest.raises(ValueError, match="Branch cannot be traced"):
        shrink_channels(Branch(), {"layer": some(8, 3)})


class Written(nn.Module):
    """Modules by name, and a function that calls them."""

    def __init__(self, how, **modules):
        super().__init__()
        self.how = how
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.how(self, x)


def conv(inputs, outputs, dims=2):
    return getattr(nn, f"Conv{dims}d")(inputs, outputs, 1)


@pytest.mark.parametrize(
    ("how", "modules", "shape"),
    [
        # Sizes: of tokens [N, T, C] the third is that of the channels.
        (
            lambda m, x: m.b((y := m.a(x)) / y.size(2)),
            {"a": nn.Linear(8, 16), "b": nn.Linear(16, 4)},
            (3, 6, 8),
        ),
        (
            lambda m, x: m.b((y := m.a(x)) * y.shape[2]),
            {"a": nn.Linear(8, 16), "b": nn.Linear(16, 4)},
            (3, 6, 8),
        ),
        (
            lambda m, x: m.b(m.a(x).view(x.size(2), -1)),
            {"a": conv(3, 8), "b": nn.Linear(96, 4)},
            (3, 3, 4, 4),
        ),
        # Pools and pads of more axes than the map has take channels for one.
        (
            lambda m, x: m.b(m.pool(m.a(x))),
            {"a": conv(3, 16), "pool": nn.MaxPool3d((3, 1, 1), 1, (1, 0, 0)), "b": conv(16, 4)},
            (2, 3, 5, 5),
        ),
        (
            lambda m, x: m.b(m.pool(m.a(x))),
            {"a": conv(3, 16, 1), "pool": nn.AvgPool2d(3, 1, 1), "b": conv(16, 4, 1)},
            (2, 3, 9),
        ),
        (
            lambda m, x: m.b(F.max_pool2d(m.a(x), 2).flatten(1)),
            {"a": conv(3, 16, 1), "b": nn.Linear(64, 4)},
            (2, 3, 16),
        ),
        (
            lambda m, x: m.b(m.pad(m.a(x))),
            {"a": conv(3, 16), "pad": nn.ZeroPad3d((0, 0, 0, 0, 2, -2)), "b": conv(16, 4)},
            (2, 3, 5, 5),
        ),
        # Means over some of the spatial axes leave channels where they were.
        (
            lambda m, x: m.b(m.a(x).mean(2)),
            {"a": conv(3, 8), "b": nn.Linear(8, 4)},
            (2, 3, 5, 8),
        ),
        (
            lambda m, x: m.b(m.a(x).mean((2, 3))),
            {"a": conv(3, 8, 3), "b": nn.Linear(8, 4)},
            (2, 3, 4, 5, 8),
        ),
        # Of [N, T, C] batch norm takes T.
        (
            lambda m, x: m.b(m.norm(m.a(x))),
            {"a": nn.Linear(5, 8), "norm": nn.BatchNorm1d(8), "b": nn.Linear(8, 4)},
            (2, 8, 5),
        ),
        # Axes meet from the last one on.
        (
            lambda m, x: m.b(m.a(x) + m.c(x.mean(2))),
            {"a": conv(3, 4), "c": conv(3, 4, 1), "b": conv(4, 4)},
            (4, 3, 4, 4),
        ),
    ],
)
def test_axes_that_are_not_the_channels_are_not_taken_for_them(how, modules, shape):
    model = seeded(lambda: Written(how, **copy.deepcopy(modules)))
    inputs = model.b.weight.shape[1]
    small, _ = check(model, {"b": torch.arange(inputs) < inputs // 3}, torch.randn(shape))
    assert small.a.weight.shape == model.a.weight.shape


@pytest.mark.parametrize(
    ("how", "modules", "shape"),
    [
        (
            lambda m, x: m.b(F.interpolate(m.pool(m.a(x)), scale_factor=2)),
            {"a": conv(3, 16, 1), "pool": nn.AvgPool1d(3, 1, 1), "b": conv(16, 4, 1)},
            (2, 3, 9),
        ),
        (
            lambda m, x: m.b(m.a(x).mean((-1, 2, 3), True)),
            {"a": conv(3, 16, 3), "b": conv(16, 4, 3)},
            (2, 3, 4, 5, 3),
        ),
        (
            lambda m, x: m.b(m.norm(m.a(x).mean(-1))),
            {"a": conv(3, 16, 1), "norm": nn.BatchNorm1d(16), "b": nn.Linear(16, 4)},
            (2, 3, 9),
        ),
        (
            lambda m, x: m.b((y := m.a(x)) * y.size(2)),
            {"a": conv(3, 16), "b": conv(16, 4)},
            (2, 3, 4, 4),
        ),
        (
            lambda m, x: m.b(m.a(x) + m.c(x.mean(1))),
            {"a": nn.Linear(8, 16), "c": nn.Linear(8, 16), "b": nn.Linear(16, 4)},
            (2, 5, 8),
        ),
    ],
)
def test_known_axes_let_channels_go(how, modules, shape):
    model = seeded(lambda: Written(how, **copy.deepcopy(modules)))
    if "c" in modules:
        shape = (1, *shape[1:])
    small, _ = check(model, {"b": some(16, 5)}, torch.randn(shape))
    assert small.a.weight.shape[0] == 5


def two(how=lambda m, x: m.b(m.a(x).relu()), **more):
    return seeded(lambda: Written(how, a=conv(3, 8), b=conv(8, 4), **more))


def test_hooks_keep_the_channels_that_they_may_read():
    x, keep = torch.randn(2, 3, 4, 4), {"b": some(8, 3)}
    model = two(lambda m, x: m.b(m.act(m.a(x))), act=nn.ReLU())
    for name in ("a", "act"):
        hook = model.get_submodule(name).register_forward_hook(lambda _, __, y: y.flip(1))
        small, report = check(model, keep, x)
        assert small.a.out_channels == 8
        assert "forward_hooks" in str(report)
        hook.remove()
    pruned = two()
    prune.l1_unstructured(pruned.a, "weight", 0.3)
    pruned.a.weight = pruned.a.weight.detach()  # can be copied
    small, _ = check(pruned, keep, x)
    assert small.a.out_channels == 8
    with pytest.raises(ValueError, match="'a' cannot be narrowed: it has forward_pre_hooks"):
        shrink_channels(pruned, {"a": some(3, 2)})


def test_one_layer_under_two_names_has_one_mask():
    layer = conv(8, 4)
    model = seeded(lambda: Written(lambda m, x: m.one(m.a(x)), a=conv(3, 8), one=layer, two=layer))
    mask = some(8, 3)
    small, _ = shrink_channels(model, {"two": mask})
    assert small.a.out_channels == small.one.in_channels == 3
    x = torch.randn(2, 3, 4, 4)
    torch.testing.assert_close(small(x), masked(model, {"one": mask})(x))
    both, _ = shrink_channels(model, {"one": mask, "two": mask})
    assert both.one.in_channels == 3
    with pytest.raises(ValueError, match="one layer twice, 'two'"):
        shrink_channels(model, {"one": mask, "two": ~mask})


@pytest.mark.parametrize("inplace", [False, True])
def test_numbers_that_forward_reads_from_layers_are_compared(inplace):
    x, keep = torch.randn(2, 3, 4, 4), {"b": some(8, 3)}
    model = two(lambda m, x: m.b(m.a(x) / m.a.out_channels))
    before = copy.deepcopy(model.state_dict())
    with pytest.raises(ValueError, match="sizes of layers that become smaller, which changes true"):
        shrink_channels(model, keep, inplace=inplace)
    gathers = two(lambda m, x: m.b(y := m.a(x)) / m.b.kernel_size[0] + m.c(y), c=conv(8, 4))
    with pytest.raises(ValueError, match="kernel_size.*gather their inputs: 'b'"):
        shrink_channels(gathers, keep, inplace=inplace)
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert isinstance(gathers.b, nn.Conv2d)
    fine = two(lambda m, x: m.b(m.a(x)) / m.a.in_channels + torch.ones(m.b.out_channels, 1, 1))
    check(fine, keep, x)


def test_tied_weights_and_values_that_cannot_go_stay():
    x = torch.randn(2, 3, 4, 4)
    tied = seeded(
        lambda: Written(
            lambda m, x: m.b(m.a(x)) + m.d(m.c(x)),
            **{"a": conv(3, 8), "b": conv(8, 4), "c": conv(3, 8), "d": conv(8, 4)},
        )
    )
    tied.c.weight = tied.a.weight
    small, report = check(tied, {"b": some(8, 3)}, x)
    assert small.a.out_channels == 8
    assert "shares a parameter" in str(report)
    # A linear layer on the last axis of a map, as long as there are channels.
    last = seeded(lambda: Written(lambda m, x: m.b(m.a(x)), a=conv(3, 8), b=nn.Linear(8, 4)))
    small, report = check(last, {"b": some(8, 3)}, torch.randn(2, 3, 4, 8))
    assert small.a.out_channels == 8
    assert "another axis" in str(report)
    # An add with a stream that stays, from either side.
    for how in (_joined, lambda m, x: _joined(m, x, swap=True)):
        model = seeded(lambda how=how: Written(how, a=conv(3, 8), b=conv(8, 4), c=conv(3, 8)))
        small, report = check(model, {"b": some(8, 3)}, x)
        assert small.a.out_channels == small.c.out_channels == 8
        assert "softmax" in str(report)


def _joined(m, x, swap=False):
    stays = m.a(x)
    seen = stays.softmax(1).amax()
    return m.b(m.c(x) + stays if swap else stays + m.c(x)) + seen
