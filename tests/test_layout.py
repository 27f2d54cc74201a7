"""BlockLayout: what it accepts, and that pack, unpack and masks agree under any permutation."""

import copy
import pickle
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import tetris
from tetris import BlockLayout
from tetris.blocking import removed_count


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def layouts(draw):
    """Any small layout: ragged edges, empty rows, none or both permutations."""
    out, in_ = draw(st.integers(1, 17)), draw(st.integers(1, 17))
    bo, bi = draw(st.integers(1, 6)), draw(st.integers(1, 6))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    density = draw(st.sampled_from([0.0, 0.3, 1.0]))
    blocks = torch.rand(-(-out // bo), -(-in_ // bi), generator=generator) < density
    row_perm, col_perm = (
        torch.randperm(n, generator=generator).to(torch.int32) if draw(st.booleans()) else None
        for n in (out, in_)
    )
    return BlockLayout.from_block_mask(blocks, (bo, bi), out, in_, row_perm, col_perm)


def slow_unpack(layout, values):
    """The format's definition, one element at a time."""
    bo, bi = layout.block
    dense = torch.zeros(layout.out_features, layout.in_features, dtype=values.dtype)
    for g in range(layout.block_grid[0]):
        for b in range(int(layout.row_ptr[g]), int(layout.row_ptr[g + 1])):
            for r in range(bo):
                for k in range(bi):
                    s, t = g * bo + r, int(layout.col_idx[b]) * bi + k
                    if s >= layout.out_features or t >= layout.in_features:
                        continue
                    row = s if layout.row_perm is None else int(layout.row_perm[s])
                    col = t if layout.col_perm is None else int(layout.col_perm[t])
                    dense[row, col] = values[b, k, r]
    return dense


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_pack_and_unpack_follow_the_definition(layout):
    weight = torch.randn(layout.out_features, layout.in_features, dtype=torch.float64)
    values = layout.pack(weight)
    assert values.shape == (layout.nnz_blocks, layout.block[1], layout.block[0])
    assert torch.equal(slow_unpack(layout, values), weight * layout.mask())
    assert torch.equal(layout.unpack(values), weight * layout.mask())
    assert torch.equal(layout.pack(layout.unpack(values)), values)  # so padding was zero
    assert layout.stored_values == values.numel()


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_masks_lead_back_to_the_same_layout(layout):
    perms = (layout.row_perm, layout.col_perm)
    size = (layout.out_features, layout.in_features)
    assert BlockLayout.from_block_mask(layout.block_mask(), layout.block, *size, *perms) == layout
    again = BlockLayout.from_mask(layout.mask(), layout.block, row_perm=perms[0], col_perm=perms[1])
    assert again == layout
    assert hash(again) == hash(layout)
    assert layout.density == pytest.approx(layout.block_mask().double().mean().item())


def test_from_mask_covers_every_element_and_no_spare_block():
    mask = torch.zeros(5, 7, dtype=torch.bool)
    mask[4, 6] = mask[0, 0] = True
    row_perm = int32(4, 1, 2, 3, 0)
    layout = BlockLayout.from_mask(mask, (2, 3), row_perm=row_perm)
    assert layout.nnz_blocks == 2
    assert bool(layout.mask()[mask].all())


def test_pack_and_unpack_are_differentiable():
    layout = BlockLayout.from_block_mask(
        torch.tensor([[True, False], [True, True]]), (2, 3), 3, 5, int32(2, 0, 1), None
    )
    weight = torch.randn(3, 5, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pack, weight)
    values = layout.pack(weight.detach()).requires_grad_()
    assert torch.autograd.gradcheck(layout.unpack, values)


@pytest.mark.parametrize("reorder", [False, "l1_sort", "swap", True])
def test_from_dense_stores_what_sparsity_leaves(reorder):
    weight = torch.randn(24, 33, generator=torch.Generator().manual_seed(0))
    layout = BlockLayout.from_dense(weight, (4, 4), 0.75, reorder=reorder, sweeps=2)
    blocks = 6 * 9
    assert layout.nnz_blocks == blocks - int(0.75 * blocks)
    assert int(layout.row_ptr.diff().min()) >= 1  # the floor
    assert (layout.row_perm is None) == (reorder is False)


def test_from_dense_keeps_the_heaviest_blocks_and_heeds_importance():
    weight = torch.ones(4, 8)
    weight[:2, :2] = 5.0
    weight[2:, 4:6] = -7.0
    kept = BlockLayout.from_dense(weight, (2, 2), 0.75, reorder=False).block_mask()
    assert kept.nonzero().tolist() == [[0, 0], [1, 2]]
    importance = torch.zeros(4, 8)
    importance[:, 6:] = 1.0
    kept = BlockLayout.from_dense(weight, (2, 2), 0.75, reorder=False, importance=importance)
    assert kept.col_idx.tolist() == [3, 3]


def test_reordering_gathers_a_planted_block():
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(32, 32, generator=generator) * 0.01
    rows, cols = (torch.randperm(32, generator=generator)[:8] for _ in range(2))
    weight[rows[:, None], cols] = 1.0
    layout = BlockLayout.from_dense(weight, (8, 8), 15 / 16, allow_empty_rows=True, sweeps=20)
    assert layout.nnz_blocks == 1
    assert bool(layout.mask()[rows[:, None], cols].all())


GOOD = {
    "block": (2, 2),
    "out_features": 4,
    "in_features": 6,
    "row_ptr": int32(0, 2, 3),
    "col_idx": int32(0, 2, 1),
    "row_perm": int32(3, 1, 0, 2),
    "col_perm": None,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"block": (0, 2)}, ValueError, r"each from 1 to 128 \(got \(0, 2\)"),
        ({"block": (129, 1)}, ValueError, "from 1 to 128"),
        ({"block": 4}, ValueError, "height along out"),
        ({"out_features": 0}, ValueError, "out_features must be an int"),
        ({"row_ptr": int32(0, 3)}, ValueError, r"row_ptr must be \[3\].*got shape \[2\]"),
        ({"row_ptr": torch.tensor([0, 2, 3])}, TypeError, "row_ptr must be an int32.*int64"),
        ({"row_ptr": [0, 2, 3]}, TypeError, "row_ptr must be an int32 tensor .got list"),
        ({"row_ptr": int32(1, 2, 3)}, ValueError, r"row_ptr\[0\] must be 0 \(got 1\)"),
        ({"row_ptr": int32(0, 4, 3)}, ValueError, r"decrease.*row_ptr\[1\] = 4.*row_ptr\[2\] = 3"),
        ({"row_ptr": int32(0, 2, 2)}, ValueError, r"row_ptr\[2\] = 2 and 3 elements"),
        ({"col_idx": int32(0, 3, 1)}, ValueError, r"col_idx\[1\] must be in \[0, 3\).*got 3"),
        ({"col_idx": int32(-1, 2, 1)}, ValueError, r"col_idx\[0\].*got -1"),
        ({"col_idx": int32(2, 2, 1)}, ValueError, r"ascend strictly.*in block row 0"),
        ({"row_perm": int32(0, 1, 2)}, ValueError, r"row_perm must be \[4\]"),
        ({"row_perm": int32(0, 1, 2, 4)}, ValueError, r"row_perm\[3\] must be in \[0, 4\)"),
        ({"row_perm": int32(0, 1, 1, 3)}, ValueError, "each index once .got 1 2 times and 2 never"),
        ({"col_perm": int32(0, 1, 2, 3, 4, 4)}, ValueError, "col_perm must hold each index once"),
    ],
    ids=lambda p: "-".join(p) if isinstance(p, dict) else "",
)
def test_broken_invariants_are_named(change, error, message):
    BlockLayout(**GOOD)
    with pytest.raises(error, match=message):
        BlockLayout(**{**GOOD, **change})


def test_from_dense_names_what_it_cannot_take():
    weight = torch.randn(4, 4)
    with pytest.raises(
        ValueError, match=r"weight must be \[out, in\], or .*got shape \[4, 4, 3, 3, 3\]"
    ):
        BlockLayout.from_dense(torch.randn(4, 4, 3, 3, 3), (2, 2), 0.5)
    with pytest.raises(ValueError, match=r"sparsity.*in \[0, 1\] \(got 90\)"):
        BlockLayout.from_dense(weight, (2, 2), 90)
    with pytest.raises(ValueError, match="finite in float32 .got 1 entries of NaN"):
        BlockLayout.from_dense(weight.index_fill(0, torch.tensor([0]), 1.0).put(
            torch.tensor([3]), torch.tensor([float("nan")])), (2, 2), 0.5)  # fmt: skip
    with pytest.raises(ValueError, match="finite in float32 .*more than it can hold"):
        BlockLayout.from_dense(weight.double() * 1e39, (2, 2), 0.5)
    with pytest.raises(ValueError, match="must not be negative"):
        BlockLayout.from_dense(weight, (2, 2), 0.5, importance=-weight.abs())
    with pytest.raises(ValueError, match="one of .*threshold"):
        BlockLayout.from_dense(weight, (2, 2), 0.5, reorder="magic")


def test_equality_is_by_content_and_identity_permutations_are_none():
    layout = BlockLayout(**GOOD)
    assert layout == BlockLayout(**{k: copy.deepcopy(v) for k, v in GOOD.items()})
    assert layout == pickle.loads(pickle.dumps(layout))
    assert layout != BlockLayout(**{**GOOD, "row_perm": None})
    assert layout != BlockLayout(**{**GOOD, "col_idx": int32(0, 2, 0)})
    identity = BlockLayout(**{**GOOD, "row_perm": int32(0, 1, 2, 3)})
    assert identity.row_perm is None
    assert len({layout, identity, BlockLayout(**GOOD)}) == 2
    assert "3 of 6 stored" in repr(layout)
    assert "reordered rows" in repr(layout)


MASK = {"mask": torch.eye(4, 6, dtype=torch.bool), "row_perm": int32(1, 0, 3, 2)}
BLOCKS = {"block_mask": torch.eye(2, 3, dtype=torch.bool), "row_perm": int32(1, 0, 3, 2)}


@pytest.mark.parametrize(
    ("make", "given"),
    [
        (lambda **given: BlockLayout(**{**GOOD, **given}), GOOD),
        (lambda **given: BlockLayout.from_mask(block=(2, 2), **given), MASK),
        (
            lambda **given: BlockLayout.from_block_mask(
                block=(2, 2), out_features=4, in_features=6, **given
            ),
            BLOCKS,
        ),
    ],
    ids=["constructor", "from_mask", "from_block_mask"],
)
def test_layouts_do_not_change_with_tensors_they_were_made_from(make, given):
    tensors = {k: v.clone() for k, v in given.items() if isinstance(v, torch.Tensor)}
    layout = make(**tensors)
    before, hashed = copy.deepcopy(layout), hash(layout)
    for tensor in tensors.values():
        tensor.zero_()
    assert layout == before
    assert hash(layout) == hashed


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_bsr_round_trips():
    pytest.importorskip("scipy")
    layout = BlockLayout(**{**GOOD, "row_perm": None})
    values = torch.randn(3, 2, 2)
    dense = layout.unpack(values)
    bsr = layout.to_sparse_bsr(values)
    assert torch.equal(bsr.to_dense(), dense)
    again, same = BlockLayout.from_sparse_bsr(bsr)
    assert again == layout
    assert torch.equal(same, values)
    matrix = layout.to_scipy_bsr(values)
    assert torch.equal(torch.from_numpy(matrix.toarray()), dense)
    matrix.indices[:2], matrix.data[:2] = matrix.indices[1::-1].copy(), matrix.data[1::-1].copy()
    again, same = BlockLayout.from_scipy_bsr(matrix)  # blocks out of order
    assert again == layout
    assert torch.equal(same, values)


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_bsr_of_a_reordered_layout_must_be_asked_for():
    layout = BlockLayout(**GOOD)
    values = torch.randn(3, 2, 2)
    with pytest.raises(ValueError, match="packed=True"):
        layout.to_sparse_bsr(values)
    packed = layout.to_sparse_bsr(values, packed=True).to_dense()
    assert torch.equal(packed, layout.unpack(values)[layout.row_perm])
    ragged = BlockLayout.from_mask(torch.ones(3, 5, dtype=torch.bool), (2, 2))
    with pytest.raises(ValueError, match="divide the matrix .got 2x2 and 3x5"):
        ragged.to_sparse_bsr(ragged.pack(torch.ones(3, 5)))


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    BlockLayout(**GOOD).plot(tmp_path / "a.png", torch.randn(4, 6))
    BlockLayout(**GOOD).plot(tmp_path / "b.svg")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.svg").read_text().count("<image") == 2


def test_missing_matplotlib_names_the_extra(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ImportError, match=r"tetris\[plot\]"):
        BlockLayout(**GOOD).plot(tmp_path / "a.png")


@pytest.mark.parametrize(
    ("sparsity", "count", "removed"),
    [(0.9, 10, 9), (0.29, 100, 29), (0.57, 100, 57), (0.3, 9, 2), (1.0, 7, 7), (0.0, 7, 0)],
)
def test_a_sparsity_removes_what_it_says(sparsity, count, removed):
    assert removed_count(sparsity, count) == removed


def test_a_layout_made_in_inference_mode_serves_training():
    layer = tetris.SparseLinear.from_dense(torch.nn.Linear(8, 8), sparsity=0.5, reorder=False)
    with torch.inference_mode():
        layout = layer.layout
    values = torch.ones(len(layout.col_idx), 1, 4, requires_grad=True)
    index = (layout.row_ptr, layout.col_idx, layout.row_perm, layout.col_perm)
    y = tetris.ops.bsmm(torch.ones(2, 8), values, *index, None, 8)
    y.sum().backward()  # which keeps the index
    assert values.grad is not None
