"""Layers that share an order of channels: the joint search, and what the order is good for."""

import copy

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tetris import reorder, sparsify
from tetris.prune import Cubic, LayerOptions, Part, SharedOrder, SharedOrders, TetrisPruner
from tetris.prune.plan import plan_layers
from tetris.prune.shared import search_shared

FAST = {"sweeps": 4}


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def planted(rows, cols, positions, kept, g, block=8):
    """A saliency whose heavy weights are in blocks, before rows and columns are shuffled."""
    n, m = len(rows), len(cols)
    grid = (n // block, m // block, positions)
    heavy = torch.rand(grid, generator=g).flatten().argsort().view(grid) < kept * n * m / block**2
    heavy = heavy.repeat_interleave(block, 0).repeat_interleave(block, 1)
    values = torch.randn(n, m, positions, generator=g).abs() * torch.where(heavy, 1.0, 0.1)
    result = torch.empty_like(values)
    result[rows[:, None], cols[None]] = values
    return result


def planted_layers(seed=0):
    """Two producers and a consumer of 128 channels that hide one order, and its settings."""
    g = generator(seed)

    def perm(n):
        return torch.randperm(n, generator=g)

    order = perm(128)
    saliency = {
        "linear": planted(order, perm(96), 1, 0.25, g).squeeze(2),
        "conv": planted(order, perm(64), 9, 0.9, g).unflatten(2, (3, 3)),  # 0.1 per position
        "head": planted(perm(192), order, 1, 0.2, g).squeeze(2),
    }
    removed = {"linear": 0.75, "conv": 0.9, "head": 0.8}
    options = {n: LayerOptions(sparsity=s, block=(8, 8), **FAST) for n, s in removed.items()}
    return saliency, options


SHARED = SharedOrder(rows=("linear", "conv"), cols="head")


def searched(saliency, options, share=SHARED):
    return search_shared("here", saliency, options, share, dict.fromkeys(saliency, 1))


def total(found):
    return sum(search.retained for _, search in found.values())


def test_one_order_is_found_for_all_that_hide_it():
    saliency, options = planted_layers()
    found = searched(saliency, options)
    assert list(found) == ["linear", "conv", "head"]
    layouts = {name: layout for name, (layout, _) in found.items()}
    assert torch.equal(layouts["linear"].row_perm, layouts["conv"].row_perm)
    assert torch.equal(layouts["linear"].row_perm, layouts["head"].col_perm)
    for name, (layout, search) in found.items():
        o = options[name]
        alone = reorder.search(saliency[name], o.block, o.sparsity, **FAST)
        assert alone.retained > alone.l1_sort_retained + 0.1
        assert search.retained > alone.retained - 0.02
        assert search.l1_sort_retained == pytest.approx(alone.l1_sort_retained)
        assert search.identity_retained == pytest.approx(alone.identity_retained)
        assert search.unstructured_retained == pytest.approx(alone.unstructured_retained)
        share = saliency[name][layout.mask()].sum() / saliency[name].sum()
        assert search.retained == pytest.approx(share.item(), rel=1e-5)
        assert layout.sparsity == pytest.approx(o.sparsity, abs=0.01)
        assert layout.weight_shape == saliency[name].shape


def test_layers_count_alike_however_large_their_numbers():
    saliency, options = planted_layers()
    scaled = {**saliency, "conv": saliency["conv"] * 1e6, "head": saliency["head"] * 1e-6}
    plain = searched(saliency, options)
    for name, (_, search) in searched(scaled, options).items():
        assert search.retained == pytest.approx(plain[name][1].retained, abs=0.01)


@pytest.mark.parametrize("method", ["identity", "l1_sort", "swap", "assign", "threshold"])
@pytest.mark.parametrize("more", [{}, {"balanced": True}, {"allow_empty_rows": True}])
def test_never_worse_in_total_than_identity_and_the_common_sort(method, more):
    g = generator(3)
    scale = torch.randn(40, generator=g).exp()
    saliency = {
        "a": torch.randn(40, 24, generator=g).abs() * scale[:, None],
        "b": torch.randn(40, 20, 3, generator=g).abs() * scale[:, None, None],
        "c": torch.randn(30, 40, generator=g).abs() * scale,
    }
    options = {
        "a": LayerOptions(sparsity=0.8, block=(8, 4), reorder=method, **more, **FAST),
        "b": LayerOptions(sparsity=0.6, block=(8, 1), reorder=method, **more, **FAST),
        "c": LayerOptions(sparsity=0.5, block=(4, 8), reorder=method, **more, **FAST),
    }
    found = searched(saliency, options, SharedOrder(rows=("a", "b"), cols="c"))

    def kept(orders):
        shares = []
        for name, value in saliency.items():
            o, value = options[name], value[:, :, None] if value.dim() == 3 else value
            fixed = reorder.search(
                value,
                o.block,
                o.sparsity,
                method="identity",
                row_perm=orders[name][0],
                col_perm=orders[name][1],
                **more,
            )
            shares.append(fixed.retained)
        return sum(shares)

    identity = {n: [torch.arange(m) for m in s.shape[:2]] for n, s in saliency.items()}
    norms = {n: s / s.sum() for n, s in saliency.items()}
    common = norms["a"].sum(1) + norms["b"].sum((1, 2)) + norms["c"].sum(0)
    common = common.argsort(descending=True)
    sort = {
        "a": (common, norms["a"].sum(0).argsort(descending=True)),
        "b": (common, torch.arange(20)),
        "c": (norms["c"].sum(1).argsort(descending=True), common),
    }
    least = {"identity": kept(identity), "l1_sort": max(kept(identity), kept(sort))}
    assert least["l1_sort"] > least["identity"]  # otherwise this shows nothing
    if method in least:
        assert total(found) == pytest.approx(least[method])
    else:
        assert total(found) > least["l1_sort"]
    for name, (_, search) in found.items():
        assert search.method == method
        rows = search.mask.sum(1)
        if more.get("balanced"):
            assert rows.max() - rows.min() <= 1, name
        assert more.get("allow_empty_rows") or rows.min() >= 1


def test_the_result_depends_on_the_arguments_alone():
    saliency, options = planted_layers(1)
    first, second = searched(saliency, options), searched(saliency, options)
    assert all(first[name][0] == second[name][0] for name in saliency)
    backwards = dict(reversed(saliency.items()))
    assert all(searched(backwards, options)[n][0] == first[n][0] for n in saliency)


def test_axes_whose_order_makes_no_difference_take_it_too():
    saliency, options = planted_layers()
    options["head"] = LayerOptions(sparsity=0.8, block=(8, 1), **FAST)
    found = searched(saliency, options)
    assert found["head"][0].col_perm is not None
    assert torch.equal(found["head"][0].col_perm, found["conv"][0].row_perm)
    narrow = {n: LayerOptions(sparsity=0.8, block=(1, 1), **FAST) for n in saliency}
    assert all(layout.reordered == "none" for layout, _ in searched(saliency, narrow).values())


def test_a_stream_that_a_layer_reads_and_writes():
    g = generator()
    order = torch.randperm(64, generator=g)
    saliency = {
        "first": planted(order, torch.randperm(48, generator=g), 1, 0.25, g).squeeze(2),
        "both": planted(order, order, 1, 0.25, g).squeeze(2),
    }
    options = {n: LayerOptions(sparsity=0.75, block=(8, 8), **FAST) for n in saliency}
    found = searched(saliency, options, SharedOrder(rows=("first", "both"), cols="both"))
    (first, _), (both, search) = found["first"], found["both"]
    assert torch.equal(both.row_perm, both.col_perm)
    assert torch.equal(both.row_perm, first.row_perm)
    assert search.retained > 0.7


def test_groups_that_hang_together_are_searched_together():
    """A chain: every layer is in two groups, and each hides its orders."""
    g = generator()
    orders = [torch.randperm(64, generator=g) for _ in range(4)]
    saliency = {str(i): planted(orders[i + 1], orders[i], 1, 0.25, g).squeeze(2) for i in range(3)}
    options = {n: LayerOptions(sparsity=0.75, block=(8, 8), **FAST) for n in saliency}
    chain = [SharedOrder(rows=str(i), cols=str(i + 1)) for i in range(2)]
    found = searched(saliency, options, chain)
    assert torch.equal(found["0"][0].row_perm, found["1"][0].col_perm)
    assert torch.equal(found["1"][0].row_perm, found["2"][0].col_perm)
    for name, (_, search) in found.items():
        alone = reorder.search(saliency[name], (8, 8), 0.75, **FAST)
        assert search.retained > alone.retained - 0.02, name


def test_tied_kernels_and_extreme_settings():
    g = generator()
    saliency = {"conv": torch.rand(18, 12, 3, 3, generator=g), "next": torch.zeros(5, 18)}
    for sparsity in (0.0, 0.5, 1.0):
        options = {
            "conv": LayerOptions(
                sparsity=sparsity, block=(4, 2), tie_kernel=True, allow_empty_rows=True, **FAST
            ),
            "next": LayerOptions(sparsity=sparsity, block=(2, 4), **FAST),
        }
        found = searched(saliency, options, SharedOrder(rows="conv", cols="next"))
        conv, after = found["conv"][0], found["next"][0]
        tied = conv.block_mask().unflatten(1, (9, -1))
        assert (tied == tied[:, :1]).all()
        assert conv.nnz_blocks == 9 * (30 - int(sparsity * 30))
        assert conv.row_perm is None or torch.equal(conv.row_perm, after.col_perm)


def test_time_budgets_are_kept():
    saliency, options = planted_layers()
    options = {n: LayerOptions(sparsity=0.8, block=(8, 8), budget=0.2) for n in options}
    found = searched(saliency, options)
    assert total(found) > 1.9
    assert found["head"][1].seconds < 3


def test_other_layers_are_planned_as_without():
    saliency, options = planted_layers()
    arguments = (options, set(), "layer", 0.8, False, dict.fromkeys(saliency, 1))
    alone = plan_layers("here", saliency, *arguments)
    plans = plan_layers("here", saliency, *arguments, share=SharedOrder(rows="linear", cols="head"))
    assert list(plans) == list(saliency)
    assert plans["conv"].layout == alone["conv"].layout
    assert torch.equal(plans["linear"].layout.row_perm, plans["head"].layout.col_perm)
    assert plans["head"].saliency is saliency["head"]


# -- parts of an axis ------------------------------------------------------------------------------


def stays_within(perm, size):
    """Whether a permutation moves channels only within parts of a size."""
    return torch.equal(perm // size, torch.arange(len(perm), dtype=perm.dtype) // size)


def test_parts_have_orders_of_their_own():
    """Two heads, each with an order that rows and columns hide; nothing moves between heads."""
    g = generator()
    heads = torch.cat([torch.randperm(64, generator=g) + 64 * h for h in range(2)])
    saliency = {
        "value": planted(heads, torch.randperm(96, generator=g), 1, 0.25, g).squeeze(2),
        "output": planted(torch.randperm(96, generator=g), heads, 1, 0.25, g).squeeze(2),
    }
    options = {n: LayerOptions(sparsity=0.75, block=(8, 8), **FAST) for n in saliency}
    parts = [range(64), range(64, 128)]
    share = [SharedOrder(Part("value", p), Part("output", p)) for p in parts]
    found = searched(saliency, options, share)
    rows, cols = found["value"][0].row_perm, found["output"][0].col_perm
    assert torch.equal(rows, cols)
    assert stays_within(rows, 64)
    assert not torch.equal(rows[64:] - 64, rows[:64])
    for name, (_, search) in found.items():
        alone = reorder.search(saliency[name], (8, 8), 0.75, **FAST)
        assert search.retained > alone.retained - 0.03, name
        assert search.retained > search.identity_retained + 0.2, name


@pytest.mark.parametrize("faint", [0, 1])
def test_parts_that_keep_nothing_or_all(faint):
    """A head so faint that all of its blocks go: no order gains anything, and none is searched."""
    g = generator()
    saliency = {"value": torch.rand(32, 48, generator=g), "output": torch.rand(48, 32, generator=g)}
    parts = [range(16), range(16, 32)]
    saliency["value"][parts[faint]] *= 1e-6
    saliency["output"][:, parts[faint]] *= 1e-6
    options = {
        n: LayerOptions(sparsity=0.5, block=(4, 4), allow_empty_rows=True, **FAST) for n in saliency
    }
    share = [SharedOrder(Part("value", p), Part("output", p)) for p in parts]
    found = searched(saliency, options, share)
    assert found["value"][0].row_perm is None
    assert found["output"][0].col_perm is None
    assert all(s.retained > 0.99 for _, s in found.values())


def test_a_layer_that_reads_two_values_behind_each_other():
    g = generator()
    orders = [torch.randperm(n, generator=g) for n in (48, 64)]
    cols = torch.cat([orders[0], orders[1] + 48])
    saliency = {
        "a": planted(orders[0], torch.randperm(64, generator=g), 1, 0.25, g).squeeze(2),
        "b": planted(orders[1], torch.randperm(64, generator=g), 1, 0.25, g).squeeze(2),
        "both": planted(torch.randperm(64, generator=g), cols, 1, 0.25, g).squeeze(2),
    }
    options = {n: LayerOptions(sparsity=0.75, block=(8, 8), **FAST) for n in saliency}
    share = [
        SharedOrder("a", Part("both", range(48))),
        SharedOrder("b", Part("both", tuple(range(48, 112)))),
    ]
    found = searched(saliency, options, share)
    both = found["both"][0].col_perm
    assert torch.equal(both[:48], found["a"][0].row_perm)
    assert torch.equal(both[48:] - 48, found["b"][0].row_perm)
    assert all(s.retained > s.identity_retained + 0.2 for _, s in found.values())


def test_the_rest_of_an_axis_keeps_its_place():
    g = generator()
    saliency = {"a": torch.rand(32, 32, generator=g), "b": torch.rand(32, 48, generator=g)}
    options = {n: LayerOptions(sparsity=0.75, block=(4, 4), **FAST) for n in saliency}
    found = searched(saliency, options, SharedOrder(rows="a", cols=Part("b", range(8, 40))))
    cols = found["b"][0].col_perm
    assert torch.equal(cols[:8], torch.arange(8).int())
    assert torch.equal(cols[40:], torch.arange(40, 48).int())
    assert torch.equal(cols[8:40] - 8, found["a"][0].row_perm)


def test_channels_that_lie_apart_follow_if_nothing_is_lost():
    """Flattened maps: four features per channel, which blocks of four do not mix."""
    g = generator()
    order = torch.randperm(32, generator=g)
    saliency = {
        "conv": planted(order, torch.randperm(32, generator=g), 1, 0.25, g).squeeze(2),
        "head": torch.rand(24, 128, generator=g),
    }
    options = {n: LayerOptions(sparsity=0.75, block=(8, 4), **FAST) for n in saliency}
    options["conv"] = LayerOptions(sparsity=0.75, block=(4, 4), **FAST)
    features = [Part("head", range(i, 128, 4)) for i in range(4)]
    found = searched(saliency, options, SharedOrder(rows="conv", cols=features))
    rows, cols = found["conv"][0].row_perm, found["head"][0].col_perm
    assert torch.equal(cols, (4 * rows[:, None] + torch.arange(4)).flatten().int())
    assert found["conv"][1].retained > found["conv"][1].identity_retained + 0.2


def test_fixed_axes_stay():
    saliency, options = planted_layers()
    share = [SharedOrder("linear", "head"), SharedOrder(cols="linear", fixed=True)]
    found = searched(saliency, options, share)
    assert found["linear"][0].col_perm is None
    assert found["linear"][0].row_perm is not None
    free = searched(saliency, options, share[:1])
    assert free["linear"][1].retained > found["linear"][1].retained
    part = [SharedOrder(rows=Part("linear", range(64)), fixed=True)]
    assert searched(saliency, options, part)["linear"][0].row_perm is None


GROUPED = [
    SharedOrder(Part("a", range(h, h + 32)), Part("grouped", range(h, h + 32))) for h in (0, 32)
]


def test_groups_of_a_convolution_are_searched_beside_their_producers():
    g = generator()
    parts = [torch.randperm(32, generator=g) for _ in range(2)]
    rows = torch.cat([parts[0], parts[1] + 32])
    saliency = {
        "a": planted(rows, torch.randperm(64, generator=g), 1, 0.25, g).squeeze(2),
        "grouped": torch.cat(
            [planted(torch.randperm(48, generator=g), p, 1, 0.25, g) for p in parts]
        ).unsqueeze(3),
    }
    options = {n: LayerOptions(sparsity=0.75, block=(8, 8), **FAST) for n in saliency}
    found = search_shared("here", saliency, options, GROUPED, {"a": 1, "grouped": 2})
    a, grouped = (found[name][0] for name in ("a", "grouped"))
    assert grouped.groups == 2
    assert torch.equal(a.row_perm, grouped.col_perm)
    assert stays_within(a.row_perm, 32)
    for name, (layout, search) in found.items():
        assert search.retained > search.identity_retained + 0.15, name
        share = saliency[name][layout.mask()].sum() / saliency[name].sum()
        assert search.retained == pytest.approx(share.item(), rel=1e-5)
        assert layout.sparsity == pytest.approx(0.75, abs=0.02)


# -- in a model ------------------------------------------------------------------------------------


class Residual(nn.Module):
    """A stream of 16 channels: two blocks of two convolutions, and one that goes up and down."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(16, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.a1, self.a2 = nn.Conv2d(16, 24, 3, padding=1), nn.Conv2d(24, 16, 1)
        self.down, self.up = nn.Conv2d(16, 20, 2, 2), nn.ConvTranspose2d(20, 16, 2, 2)
        self.head = nn.Linear(16, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        x = x + self.a2(F.relu(self.a1(x)))
        x = x + self.up(F.relu(self.down(x)))
        return self.head(x.mean((2, 3)))


STREAM = SharedOrder(rows=("stem", "a2", "up"), cols=("a1", "down", "head"))
INNER = SharedOrder(rows="a1", cols="a2")
LOW = SharedOrder(rows="down", cols="up")


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = Residual()
    for _ in range(3):
        model(torch.randn(8, 16, 8, 8))
    return model.eval()


def test_orders_cancel_along_a_residual_stream(model):
    """Without the shared permutations, and bias and norm in their order: the same output."""
    x = torch.randn(2, 16, 8, 8)
    settings = {"sparsity": 0.5, "block": (4, 4), "share": (STREAM, INNER, LOW), **FAST}
    sparse, report = sparsify(model, return_report=True, **settings)
    assert len(report.layers) == 6
    expected = sparse(x)
    assert not torch.allclose(expected, model(x))
    order = sparse.stem.row_perm.long()
    assert not torch.equal(order, torch.arange(16))
    packed = copy.deepcopy(sparse)
    for shared in (STREAM, INNER, LOW):
        for name in shared.rows:
            layer = packed.get_submodule(name)
            layer.bias.data = layer.bias.data[layer.row_perm.long()]
            layer.row_perm = None
        for name in shared.cols:
            packed.get_submodule(name).col_perm = None
    for tensor in packed.norm.state_dict().values():
        if tensor.dim():
            tensor.copy_(tensor[order])
    torch.testing.assert_close(packed(x), expected)


def test_shared_orders_retain_more_than_none_in_a_network(model):
    settings = {"sparsity": 0.75, "block": (4, 4), "return_report": True, **FAST}
    _, report = sparsify(model, share=(STREAM, INNER, LOW), **settings)
    _, plain = sparsify(model, reorder=False, **settings)
    retained = [sum(layer.retained for layer in r.layers) for r in (report, plain)]
    assert retained[0] > retained[1] + 0.1


def test_scope_global_and_overrides(model):
    sparse = sparsify(
        model,
        sparsity=0.6,
        block=(4, 4),
        scope="global",
        share=STREAM,
        overrides={"head": {"block": (1, 4)}, "a1": {"sparsity": 0.25}},
        **FAST,
    )
    assert torch.equal(sparse.head.col_perm, sparse.up.row_perm)
    assert sparse.a1.layout.sparsity == pytest.approx(0.25, abs=0.02)


@pytest.mark.parametrize("execution", ["masked", "sparse"])
def test_pruners_keep_the_order_while_masks_change(model, execution):
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    pruner = TetrisPruner(
        model,
        sparsity=0.5,
        block=(4, 4),
        share=iter([STREAM]),
        schedule=Cubic(0, 4),
        execution=execution,
        optimizers=optimizer,
        **FAST,
    )
    model.train()
    for _ in range(5):
        optimizer.zero_grad()
        model(torch.randn(4, 16, 8, 8)).square().mean().backward()
        optimizer.step()
        pruner.step()
    sparse = pruner.finalize()
    orders = [sparse.get_submodule(name).row_perm for name in STREAM.rows]
    orders += [sparse.get_submodule(name).col_perm for name in STREAM.cols]
    assert not torch.equal(orders[0], torch.arange(16, dtype=torch.int32))
    assert all(torch.equal(order, orders[0]) for order in orders)
    with pytest.raises(ValueError, match="TetrisPruner: share names 'steam'"):
        TetrisPruner(pruner.remove(), share=SharedOrder(rows=("stem", "steam")))


@pytest.mark.parametrize(
    ("share", "more", "error", "match"),
    [
        ("stem", {}, TypeError, "share must be SharedOrder objects .got a str"),
        (["stem"], {}, TypeError, r"one or several tetris.prune.SharedOrder.*got 'stem'"),
        (
            SharedOrder(rows=("stem", "stam")),
            {},
            ValueError,
            "names 'stam', which is not a layer that is pruned .pruned: stem, a1",
        ),
        (
            SharedOrder(rows="stem", cols="head"),
            {"exclude": "head"},
            ValueError,
            "names 'head', which is not a layer that is pruned",
        ),
        (
            SharedOrder(rows=("stem", "a1")),
            {},
            ValueError,
            "must have sizes .got 16 rows of 'stem', 24 rows of 'a1'",
        ),
        (
            STREAM,
            {"overrides": {"a2": {"block": (8, 4)}, "a1": {"block": (4, 1)}}},
            ValueError,
            "must have blocks of one size .or 1. .got 4 rows of 'stem', 8 rows of 'a2'.*1 columns",
        ),
        (
            [SharedOrder(rows=("stem", "a2")), SharedOrder(rows="a2", cols="head")],
            {},
            ValueError,
            "the rows of 'a2' twice; put everything",
        ),
        (SharedOrder(cols=("a1", "a1")), {}, ValueError, "the columns of 'a1' twice"),
        (
            STREAM,
            {"overrides": {"a2": {"seed": 3}}},
            ValueError,
            "one seed .got 0 for 'stem' and 3 for 'a2'",
        ),
        (
            [INNER, SharedOrder(rows="stem", cols="a1")],
            {"overrides": {"a2": {"reorder": "swap"}}},
            ValueError,
            "one reorder",
        ),
    ],
)
def test_errors_say_what_was_seen(model, share, more, error, match):
    with pytest.raises(error, match=match):
        sparsify(model, sparsity=0.5, block=(4, 4), share=share, **more, **FAST)


def test_orders_of_a_whole_model_may_name_layers_that_stay_dense(model):
    shared = SharedOrders((STREAM, INNER, SharedOrder(cols="stem", fixed=True)))
    sparse = sparsify(model, sparsity=0.5, block=(4, 4), exclude=("a2", "head"), share=shared)
    assert torch.equal(sparse.stem.row_perm, sparse.a1.col_perm)
    assert sparse.stem.col_perm is None
    assert sparse.a1.row_perm is not None  # alone in its order: free
    assert [str(order) for order in shared.among(["a1", "stem"])] == [
        "rows of stem = columns of a1",
        "columns of stem (as they are)",
    ]
    with pytest.raises(ValueError, match="names 'a2', which is not a layer that is pruned"):
        sparsify(model, sparsity=0.5, exclude=("a2", "head"), share=tuple(shared))


@pytest.mark.parametrize(
    ("order", "match"),
    [
        (SharedOrder("stem", Part("head", range(8))), "sizes .got 16 rows of 'stem', 8 columns"),
        (SharedOrder(rows=Part("stem", range(8, 24))), "has row 23 of 'stem', which has 16"),
        (
            [SharedOrder(rows=Part("stem", (1, 5, 3))), SharedOrder(rows=Part("stem", [3]))],
            "the rows of 'stem' twice",
        ),
    ],
)
def test_errors_about_parts(model, order, match):
    with pytest.raises(ValueError, match=match):
        sparsify(model, sparsity=0.5, block=(4, 4), share=order, **FAST)


def test_parts_are_checked():
    with pytest.raises(TypeError, match="layer must be a name"):
        Part(3, range(4))
    with pytest.raises(TypeError, match="index must be ints .got 'a'|must be channels"):
        Part("a", "a")
    with pytest.raises(TypeError, match="index must be ints"):
        Part("a", [None])
    for index in ((), (1, 1), (-1, 2)):
        with pytest.raises(ValueError, match="distinct channels, counted from 0, and not empty"):
            Part("a", index)
    assert Part("a", [4, 6, 8]) == Part("a", range(4, 9, 2))
    assert str(Part("a", [4, 5])) == "a[4:6]"


def test_groups_of_convolutions_are_refused():
    model = nn.Sequential(nn.Conv2d(32, 32, 1), nn.Conv2d(32, 32, 1, groups=2))
    for cols in ("1", Part("1", range(8, 24))):
        rows = "0" if cols == "1" else Part("0", range(8, 24))
        with pytest.raises(ValueError, match=r"layer '1' has 2 groups, whose.*Part\('1', range"):
            sparsify(model, sparsity=0.5, share=SharedOrder(rows=rows, cols=cols), **FAST)


def test_an_order_needs_two_axes_and_names():
    with pytest.raises(ValueError, match=r"two axes at least .got rows=\('a',\), cols=\(\)"):
        SharedOrder(rows="a")
    with pytest.raises(TypeError, match="names of layers"):
        SharedOrder(rows=(nn.Linear(2, 2), "b"))
    with pytest.raises(TypeError, match="names of layers"):
        SharedOrder(cols=3)
