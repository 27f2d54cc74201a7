"""Which channels share an order: what graphs say, against what networks compute."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

import tetris
from fold_cases import ZOO, Lambda, Residual, make
from tetris.fold.apply import apply
from tetris.fold.channels import Axis, Channels, Reason
from tetris.fold.find import find_orders
from tetris.fold.shared import _cycle
from tetris.fold.values import Labelled, common_groups
from tetris.prune import Part, SharedOrder, SharedOrders

FAST = {"sweeps": 2}


def orders_of(model, x):
    return find_orders("here", model, ((x,), {}))


@pytest.mark.parametrize("name", ZOO)
def test_all_orders_may_be_shuffled_and_none_is_missed(name):
    model, x = make(name)
    found = orders_of(model, x)
    assert found.capture.error is None
    assert sorted(o.size for o in found.orders) == sorted(ZOO[name][2])
    expected = model(x)
    before = {n: t.clone() for n, t in model.state_dict().items()}
    generator = np.random.default_rng(0)
    for order in found.orders:  # each by itself, then all together
        apply(model, [order], [_cycle(generator, order.size)])
        torch.testing.assert_close(model(x), expected, rtol=1e-5, atol=1e-5)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {m.axis.tensor for o in found.orders for m in o.members}


@pytest.mark.parametrize("name", ["residual", "attention", "rotary"])
def test_channels_that_stay_may_not_move(name):
    """What is reported to stay would change the result: nothing is held without need."""
    model, x = make(name)
    found = orders_of(model, x)
    expected = model(x)
    for stay in found.stays:
        assert stay.reason.held
        assert any(
            word in stay.reason.text
            for word in ("input of the model", "output of the model", "combines")
        )
    tensor = dict(model.named_parameters())[found.stays[0].axis.tensor]
    with torch.no_grad():
        tensor.copy_(tensor.flip(found.stays[0].axis.dim))
    assert not torch.allclose(model(x), expected, atol=1e-3)


def test_orders_of_a_residual_network_are_named_by_layer():
    model, x = make("residual")
    orders = tetris.shared_orders(model, x)
    assert isinstance(orders, SharedOrders)
    assert {str(order) for order in orders if not order.fixed} == {
        "rows of stem, a2 = columns of a1, b1, head[0:16]",
        "rows of a1[0:16] = columns of grouped[0:16]",
        "rows of a1[16:32] = columns of grouped[16:32]",
        "rows of grouped[0:16] = columns of a2[0:16]",
        "rows of grouped[16:32] = columns of a2[16:32]",
        "rows of b1 = columns of b2",
        "rows of b2 = columns of head[16:24]",
    }
    assert orders.held == {
        ("stem", "columns"): "it reads an input of the model",
        ("head", "rows"): "it is an output of the model",
        ("depthwise", "rows"): "its groups move as a whole",
    }
    assert not orders.free
    assert "held: columns of stem: it reads an input of the model" in str(orders)


def test_what_an_unknown_operation_reads_keeps_an_order_of_its_own():
    model, x = make("recurrent")
    orders = tetris.shared_orders(model, x)
    assert [str(o) for o in orders if not o.fixed] == [
        "rows of a = columns of b",
        "rows of c = columns of d",
    ]
    assert set(orders.free) == {("b", "rows"), ("c", "columns")}
    assert orders.free["b", "rows"] == "lstm (in rnn) may mix channels"
    assert orders.free["c", "columns"].startswith("it reads lstm")


def test_queries_and_keys_of_rotary_embeddings_are_held():
    model, x = make("rotary")
    orders = tetris.shared_orders(model, x)
    for name in "qk":
        assert "whose order is given" in orders.held[name, "rows"]
    assert SharedOrder(Part("v", range(8)), Part("o", range(8))) in orders.orders


def test_flattened_maps_move_by_channel():
    model, x = make("flat")
    (order,) = (o for o in tetris.shared_orders(model, x) if not o.fixed)
    assert order == SharedOrder("0", tuple(Part("3", range(i, 32, 4)) for i in range(4)))


def test_sparse_layers_have_the_same_orders():
    model, x = make("residual")
    sparse = tetris.sparsify(model, sparsity=0.5, block=(4, 4), include=["a1", "grouped"], **FAST)
    assert set(tetris.shared_orders(sparse, x)) == set(tetris.shared_orders(model, x))


class AllButTheLast(nn.Sequential):
    """Leaves its last module out."""

    def forward(self, x):
        for module in self[:-1]:
            x = module(x)
        return x


def test_layers_that_are_not_called_and_computed_weights():
    model, x = make("mlp")
    model = AllButTheLast(*model).eval()
    nn.utils.parametrizations.weight_norm(model[4])
    model.extra = nn.Linear(3, 3)
    free = tetris.shared_orders(model, x).free
    assert free["extra", "rows"] == "the model does not call it with these inputs"
    assert free["4", "columns"].startswith("its weight is computed")
    assert "may mix channels" in free["0", "rows"]


def test_a_grouped_transposed_convolution_is_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.ConvTranspose2d(8, 8, 2, groups=2)).eval()
    orders = tetris.shared_orders(model, torch.randn(1, 3, 4, 4))
    assert set(orders.free) == {("0", "rows"), ("1", "rows"), ("1", "columns")}
    assert len(set(orders.free.values())) == 1


def test_the_model_is_as_it_was():
    model, x = make("residual")
    model.train()
    model.norm.eval()
    before = {n: t.clone() for n, t in model.state_dict().items()}
    state = torch.get_rng_state()
    tetris.shared_orders(model, x)
    assert model.training
    assert not model.norm.training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    "inputs", [lambda x: x, lambda x: (x,), lambda x: [x], lambda x: {"input": x}]
)
def test_ways_to_pass_inputs(inputs):
    model, x = make("mlp")
    assert len([o for o in tetris.shared_orders(model, inputs(x)) if not o.fixed]) == 2


# -- what cannot be traced -------------------------------------------------------------------------


class Untraceable(nn.Module):
    """Two blocks, of which the second is used or not, as the numbers say."""

    def __init__(self):
        super().__init__()
        self.first = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 8))
        self.second = nn.Sequential(nn.Linear(8, 12), nn.ReLU(), nn.Linear(12, 8))
        self.single = nn.Linear(8, 4)

    def forward(self, x):
        x = self.first(x)
        if x.sum() > -1e9:
            x = self.second(x)
        return self.single(x)


def test_modules_of_a_model_that_cannot_be_traced():
    torch.manual_seed(0)
    orders = tetris.shared_orders(Untraceable(), torch.randn(3, 6))
    assert [str(o) for o in orders] == [
        "rows of first.0 = columns of first.2",
        "rows of second.0 = columns of second.2",
    ]
    assert set(orders.free) == {
        *((f"{n}.0", "columns") for n in ("first", "second")),
        *((f"{n}.2", "rows") for n in ("first", "second")),
        ("single", "rows"),
        ("single", "columns"),
    }
    for why in orders.free.values():
        assert "Untraceable cannot be traced: " in why
    assert "surroundings of 'first'" in orders.free["first.0", "columns"]


class Often(Untraceable):
    """A block that is called twice where nothing tells what is in between."""

    def forward(self, x):
        x = self.first(x)
        while x.abs().sum() < 10 and x.abs().sum() > 0:
            x = self.second(self.second(x)) + 10
        return self.single(x)


def test_a_module_that_is_called_more_than_once_from_there():
    torch.manual_seed(0)
    orders = tetris.shared_orders(Often(), 0.01 * torch.randn(1, 6))
    assert [str(o) for o in orders] == ["rows of first.0 = columns of first.2"]
    assert "'second' is called 2 times from where nothing can" in orders.free["second.0", "rows"]


# -- the parts -------------------------------------------------------------------------------------


def test_channels_with_the_same_marks_are_one_order():
    channels = Channels()
    a, b = channels.of(Axis("a", 0, 6)), channels.of(Axis("b", 1, 6))
    channels.meet([a, b])
    channels.meet([a[:4]])  # an operation on some of them
    orders, stays = channels.result()
    assert [o.size for o in orders] == [4, 2]
    assert [m.index.tolist() for m in orders[1].members] == [[4, 5], [4, 5]]
    assert not stays


def test_channels_that_meet_are_frozen_together_and_singles_stay():
    channels = Channels()
    a, b = channels.of(Axis("a", 0, 5)), channels.of(Axis("b", 1, 5))
    channels.meet([a, b[::-1]])
    why = Reason("so it is")
    channels.freeze(b[:2], why)
    channels.meet([a[:1]])
    orders, stays = channels.result()
    assert [m.index.tolist() for m in orders[0].members] == [[1, 2], [3, 2]]
    found = {(s.axis.tensor, s.reason.text): s.index.tolist() for s in stays}
    assert found["a", "so it is"] == [3, 4]
    assert found["b", "so it is"] == [0, 1]
    assert found["a", "no two of its channels are read and written alike"] == [0]


def test_chains_of_meetings_are_one_class():
    channels = Channels()
    n = 50
    axes = [channels.of(Axis(str(i), 0, 3)) for i in range(n)]
    for i in np.random.default_rng(0).permutation(n - 1):
        channels.meet([axes[i], axes[i + 1]])
    orders, _ = channels.result()
    assert [len(o.members) for o in orders] == [n]


def test_places_tell_elements_of_a_channel_apart():
    channels = Channels()
    a, b = channels.of(Axis("a", 0, 3)), channels.of(Axis("b", 0, 6))
    channels.meet([a.repeat(2), b], [np.array([0, 1, 0, 1, 1, 0])])  # the last two the other way
    (order,), _ = channels.result()
    assert [m.index.tolist() for m in order.members] in (
        [[0, 1, 2], [0, 2, 5], [1, 3, 4]],
        [[0, 1, 2], [1, 3, 4], [0, 2, 5]],
    )


@pytest.mark.parametrize(
    ("old", "new", "groups"),
    [
        ((6, 4, 5), (2, 3, 20), [([0], [0, 1]), ([1, 2], [2])]),
        ((1, 6), (6,), [([0, 1], [0])]),
        ((6,), (6, 1, 1), [([0], [0]), ([], [1, 2])]),
        ((5, 2, 32), (5, 8, 8), [([0], [0]), ([1, 2], [1, 2])]),
        ((), (1, 1), [([], [0, 1])]),
    ],
)
def test_axes_that_hold_the_same_elements(old, new, groups):
    assert common_groups(old, new) == groups


@pytest.mark.parametrize("size", [2, 3, 17])
def test_shuffles_move_every_channel(size):
    """Of two channels every second permutation is none, and would prove nothing."""
    generator = np.random.default_rng(0)
    for _ in range(10):
        perm = _cycle(generator, size)
        assert sorted(perm) == list(range(size))
        assert (perm != np.arange(size)).all()


def test_axes_are_forgotten_that_tell_no_channels_apart():
    """[3 images, 4 channels] joined and cut again."""
    value = Labelled.along((3, 4), 1, np.arange(4)).expanded([0], [1 << 50 | 1])
    assert value.dims == [0, 1]
    joined = Labelled((12,), value.ids.reshape(12), value.places.reshape(12))
    assert joined.compressed().dims == [0]
    again = Labelled((3, 4), joined.ids.reshape(3, 4), joined.places.reshape(3, 4)).compressed()
    assert again.dims == [1]
    assert again.ids.tolist() == [[0, 1, 2, 3]]
    turned = Labelled((3, 4), value.ids, value.places[:, ::-1] * value.ids)
    assert turned.compressed().dims == [0, 1]


# -- wrong usage -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("inputs", "error", "match"),
    [
        (None, TypeError, "example_inputs must be what the model is called with.*got None"),
        ({1: 2}, TypeError, "a dict of keyword arguments"),
        (torch.randn(2, 5), ValueError, "cannot be called with example_inputs .RuntimeError: mat1"),
        ({"wrong": torch.randn(2, 12)}, ValueError, "cannot be called with.*unexpected keyword"),
    ],
)
def test_wrong_inputs(inputs, error, match):
    model, _ = make("mlp")
    with pytest.raises(error, match=f"tetris.shared_orders: .*{match}"):
        tetris.shared_orders(model, inputs)


def test_wrong_models():
    with pytest.raises(TypeError, match="tetris.shared_orders: model must be an nn.Module"):
        tetris.shared_orders(Residual, torch.randn(2, 3, 6, 6))
    noise = nn.Sequential(
        nn.Linear(4, 8), Lambda(lambda x: F.dropout(x, training=True)), nn.Linear(8, 2)
    )
    with pytest.raises(RuntimeError, match="does not return the same twice"):
        tetris.shared_orders(noise, torch.randn(3, 4))
