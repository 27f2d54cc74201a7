"""Folding at its limits: models that hide what they do, keep state, or return objects."""

import copy
import sys
from dataclasses import dataclass

import pytest
import torch
from torch import nn

import tetris
from fold_cases import Lambda, make
from tetris.fold.verify import difference
from tetris.prune import SharedOrder

BLOCKS = {"sparsity": 0.5, "block": (4, 4), "sweeps": 1}


def two(inputs=8, outputs=8):
    return nn.Sequential(nn.Linear(inputs, 16), nn.ReLU(), nn.Linear(16, outputs))


class Around(nn.Module):
    """A block and what is made of it; ``results`` tells how."""

    def __init__(self, results, **modules):
        super().__init__()
        self.block, self.results = two(), results
        for name, module in modules.items():
            self.add_module(name, module)

    def forward(self, x):
        return self.results(self, x)


def searched_together(model):
    """The two layers of the block in one order."""
    share = SharedOrder("block.0", "block.2")
    return tetris.sparsify(model, share=share, include=["block.0", "block.2"], **BLOCKS)


def folded(results, **modules):
    """The pruned model, the same folded, the report, and an input."""
    torch.manual_seed(0)
    model, x = searched_together(Around(results, **modules).eval()), torch.rand(4, 8)
    assert model.block[0].row_perm is not None
    changed, report = tetris.fold(model, x, return_report=True)
    return model, changed, report, x


@dataclass
class Answer:
    """A type that torch knows nothing of."""

    logits: torch.Tensor


@pytest.mark.parametrize("peeks", [False, True])
def test_results_in_objects_are_compared(peeks):
    """What hides in an object of any type, or in numbers, tells whether folding is right."""
    weights = torch.arange(16.0)

    def results(model, x):
        extra = (model.block[0].bias * weights).sum() if peeks else 0.0
        return {"answer": Answer(model.block(x) + extra), "number": (x.sum() + extra).item()}

    model, changed, report, x = folded(results)
    assert (changed.block[0].row_perm is None) is not peeks
    if peeks:
        assert "results differ by" in report.kept["block.0", "rows"]
    torch.testing.assert_close(
        changed(x)["answer"].logits, model(x)["answer"].logits, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("scale", [1e-8, 1.0])
def test_small_results_are_compared_as_well(scale):
    weights = torch.arange(16.0)

    def results(model, x):
        assert x.sum().item() > 0  # no graph of this
        return (model.block(x) + (model.block[0].bias * weights).sum()) * scale

    _, changed, report, _ = folded(results)
    assert changed.block[0].row_perm is not None
    assert "results differ by" in report.kept["block.0", "rows"]


def test_a_part_that_is_called_from_elsewhere():
    def results(model, x):
        assert x.sum().item() > 0
        return model.block(x).sum() + model.block[0](x)

    model, changed, report, x = folded(results)
    assert "'block.0' is called from elsewhere, too" in report.kept["block.0", "rows"]
    torch.testing.assert_close(changed(x), model(x), rtol=1e-5, atol=1e-5)


def test_a_weight_that_is_read_elsewhere_untraced():
    torch.manual_seed(0)
    model = Around(lambda m, x: m.other(m.block(x)) if x.sum().item() > 0 else x)
    model.other = nn.Linear(8, 16)
    model.other.weight = model.block[0].weight
    orders = tetris.shared_orders(model, torch.rand(4, 8))
    assert not [order for order in orders if not order.fixed]
    assert "other reads it as well, untraced" in orders.free["block.0", "rows"]


def test_tensors_in_the_same_memory():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 6), nn.ReLU(), nn.Linear(6, 3))
    model[2].weight.data = model[0].weight.data.t()
    orders = tetris.shared_orders(model, torch.rand(4, 6))
    assert orders.held["0", "rows"] == "0.weight and 2.weight share memory"
    flat = torch.randn(6 * 16 + 16 + 6 * 16 + 6 + 18 + 3)  # one behind the other is no overlap
    nn.utils.vector_to_parameters(flat, model.parameters())
    assert [str(o) for o in tetris.shared_orders(model, torch.rand(4, 6)) if not o.fixed] == [
        "rows of 0 = columns of 2",
        "rows of 2 = columns of 4",
    ]


@pytest.mark.parametrize("way", ["nonzero", "mask", "item"])
def test_shapes_that_depend_on_numbers_are_not_traced(way, capfd):
    def results(model, x):
        x = model.block(x)
        positive = x.sum(1) > -1e9
        if way == "nonzero":
            return x[positive.nonzero().squeeze(1)]
        return x[positive] if way == "mask" else x[: int(positive.sum().item())]

    model, changed, report, x = folded(results)
    assert changed.block[0].row_perm is None  # the block itself can be traced
    assert "Around cannot be traced" in report.untraced
    torch.testing.assert_close(changed(x), model(x), rtol=1e-5, atol=1e-5)
    captured = capfd.readouterr()
    assert captured.out == captured.err == ""


def test_inputs_and_state_are_left_alone():
    def results(model, x):
        x += 1
        model.count += 1
        model.last = model.block(x) * model.count
        return model.last

    torch.manual_seed(0)
    model = searched_together(Around(results).eval())
    model.register_buffer("count", torch.zeros(()))
    model.last = None
    x = torch.rand(4, 8)
    before = x.clone()
    changed = tetris.fold(model, x)
    assert changed.block[0].row_perm is None
    assert torch.equal(x, before)
    assert model.count == changed.count == 0
    assert model.last is changed.last is None


def test_complex_results():
    model, changed, report, x = folded(lambda m, x: torch.fft.fft(m.block(x)))
    assert changed.block[0].row_perm is None
    assert report.difference <= 1e-5
    torch.testing.assert_close(changed(x), model(x), rtol=1e-5, atol=1e-5)


def test_constants_are_named():
    factors = torch.arange(16.0)
    model = nn.Sequential(nn.Linear(8, 16), Lambda(lambda x: x * factors), nn.Linear(16, 3))
    orders = tetris.shared_orders(model, torch.rand(2, 8))
    assert "with the constant" in orders.held["0", "rows"]


def test_models_that_return_nothing_or_cannot_be_copied():
    torch.manual_seed(0)
    model, x = Around(lambda m, x: None if m.block(x).sum().item() else None), torch.rand(4, 8)
    with pytest.raises(ValueError, match="must return tensors or numbers.*got None"):
        tetris.shared_orders(model, x)
    model = two()
    model.kept = model(x)  # with a graph behind it
    with pytest.raises(ValueError, match="Sequential cannot be copied .*must be detached"):
        tetris.shared_orders(model, x)


def test_a_failure_leaves_nothing_half_done(monkeypatch):
    model, x = make("mlp")
    before, modules = copy.deepcopy(model.state_dict()), list(model.modules())

    def fails(*_):
        raise RuntimeError("as it happens")

    monkeypatch.setattr(sys.modules["tetris.fold.fold"], "checked", fails)
    with pytest.raises(RuntimeError, match="as it happens"):
        tetris.fold(model, x, inplace=True, **BLOCKS)
    assert list(model.modules()) == modules
    assert all(torch.equal(t, before[n]) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("a", "b", "off"),
    [
        (torch.tensor([1e-6]), torch.tensor([2e-6]), 1.0),
        (torch.tensor([100.0, 1.0]), torch.tensor([100.0, 2.0]), 0.01),
        (torch.zeros(2), torch.full((2,), 1e-17), 1e-9),
        (torch.tensor([1j]), torch.tensor([2j]), 1.0),
        ({"a": Answer(torch.ones(1))}, {"a": Answer(torch.zeros(1))}, 1.0),
        ([1.0, True, "x"], [1.5, True, "y"], 0.5),
        (torch.ones(2), torch.ones(3), float("inf")),
        ([torch.ones(2)], [torch.ones(2)] * 2, float("inf")),
        (torch.tensor([1, 2]), torch.tensor([1, 3]), float("inf")),
        (torch.tensor([float("nan"), 1.0]), torch.tensor([float("nan"), 1.0]), 0.0),
        (torch.tensor([float("inf")]), torch.tensor([1.0]), float("inf")),
        ((), (), 0.0),
    ],
)
def test_differences(a, b, off):
    assert difference(a, b) == pytest.approx(off, rel=1e-6)
