"""Layouts of convolutions: blocks at kernel positions, groups, tied kernels."""

import copy
import itertools
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from tetris import BlockLayout
from tetris.blocking import swap_channels


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


@st.composite
def layouts(draw):
    """Any small layout of a convolution: groups, ragged edges, empty rows, permutations."""
    groups = draw(st.integers(1, 3))
    out, in_ = draw(st.integers(1, 7)), draw(st.integers(1, 7))  # of a group
    bo, bi = draw(st.integers(1, 5)), draw(st.integers(1, 5))
    kernel = draw(st.sampled_from([(1,), (3,), (1, 1), (3, 3), (2, 3)]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    grid = groups * -(-out // bo), torch.Size(kernel).numel() * -(-in_ // bi)
    blocks = torch.rand(grid, generator=generator) < draw(st.sampled_from([0.0, 0.3, 1.0]))
    row_perm, col_perm = (
        torch.cat([torch.randperm(n, generator=generator) + a * n for a in range(groups)]).int()
        if draw(st.booleans())
        else None
        for n in (out, in_)
    )
    return BlockLayout.from_block_mask(
        blocks,
        (bo, bi),
        groups * out,
        groups * in_,
        row_perm,
        col_perm,
        kernel_size=kernel,
        groups=groups,
    )


def slow_unpack(layout, values):
    """The format's definition, one element at a time."""
    (bo, bi), groups = layout.block, layout.groups
    out, in_ = layout.out_features // groups, layout.in_features // groups
    rows, columns = -(-out // bo), -(-in_ // bi)
    positions = list(itertools.product(*map(range, layout.kernel_size)))
    dense = torch.zeros(layout.weight_shape, dtype=values.dtype)
    for row in range(groups * rows):
        a = row // rows
        for b in range(int(layout.row_ptr[row]), int(layout.row_ptr[row + 1])):
            position, g = divmod(int(layout.col_idx[b]), columns)
            for r, k in itertools.product(range(bo), range(bi)):
                s, t = row % rows * bo + r, g * bi + k
                if s >= out or t >= in_:
                    continue
                s, t = s + a * out, t + a * in_
                o = s if layout.row_perm is None else int(layout.row_perm[s])
                i = t if layout.col_perm is None else int(layout.col_perm[t])
                dense[(o, i - a * in_, *positions[position])] = values[b, k, r]
    return dense


@settings(max_examples=60, deadline=None)
@given(layouts())
def test_pack_and_unpack_follow_the_definition(layout):
    weight = torch.randn(layout.weight_shape, dtype=torch.float64)
    values = layout.pack(weight)
    assert values.shape == (layout.nnz_blocks, layout.block[1], layout.block[0])
    assert torch.equal(slow_unpack(layout, values), weight * layout.mask())
    assert torch.equal(layout.unpack(values), weight * layout.mask())
    assert torch.equal(layout.pack(layout.unpack(values)), values)  # so padding was zero


@settings(max_examples=40, deadline=None)
@given(layouts())
def test_masks_lead_back_to_the_same_layout(layout):
    perms = {"row_perm": layout.row_perm, "col_perm": layout.col_perm}
    again = BlockLayout.from_mask(layout.mask(), layout.block, groups=layout.groups, **perms)
    assert again == layout
    assert hash(again) == hash(layout)
    assert pickle.loads(pickle.dumps(layout)) == layout
    assert layout.density == pytest.approx(layout.block_mask().double().mean().item())


def test_a_matrix_and_a_1x1_convolution_have_the_same_index():
    weight = torch.randn(9, 14, generator=torch.Generator().manual_seed(0))
    matrix = BlockLayout.from_dense(weight, (4, 4), 0.6, sweeps=3)
    conv = BlockLayout.from_dense(weight[:, :, None, None], (4, 4), 0.6, sweeps=3)
    for name in ("row_ptr", "col_idx", "row_perm", "col_perm"):
        assert torch.equal(getattr(matrix, name), getattr(conv, name))
    assert torch.equal(conv.pack(weight[:, :, None, None]), matrix.pack(weight))
    assert conv != matrix  # another weight all the same


def test_pack_and_unpack_are_differentiable():
    blocks = torch.tensor([[1, 0, 1, 1], [0, 1, 1, 0]], dtype=torch.bool)
    layout = BlockLayout.from_block_mask(
        blocks, (2, 3), 4, 4, int32(1, 0, 2, 3), int32(1, 0, 3, 2), kernel_size=(2, 2), groups=2
    )
    weight = torch.randn(4, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(layout.pack, weight)
    values = layout.pack(weight.detach()).requires_grad_()
    assert torch.autograd.gradcheck(layout.unpack, values)


@pytest.mark.parametrize("groups", [1, 2, 3])
@pytest.mark.parametrize("kernel", [(5,), (3, 3)])
@pytest.mark.parametrize("tie_kernel", [False, True])
@pytest.mark.parametrize("reorder", [False, "l1_sort", True])
def test_from_dense_stores_what_sparsity_leaves(groups, kernel, tie_kernel, reorder):
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(24, 10, *kernel, generator=generator)
    layout = BlockLayout.from_dense(
        weight,
        (4, 3),
        0.7,
        groups=groups,
        tie_kernel=tie_kernel,
        reorder=reorder,
        sweeps=2,
    )
    assert layout.weight_shape == (24, 10, *kernel)
    assert layout.in_features == 10 * groups
    positions = torch.Size(kernel).numel()
    unit = positions if tie_kernel else 1  # what lives and dies together
    units = 24 // 4 * 4 * positions // unit
    assert layout.nnz_blocks == unit * (units - int(0.7 * units))
    assert int(layout.row_ptr.diff().min()) >= 1  # the floor
    assert (layout.row_perm is None) == (reorder is False)
    whole = layout.mask().flatten(2)
    assert bool((whole.all(2) == whole.any(2)).all()) == tie_kernel


def test_groups_are_searched_apart():
    generator = torch.Generator().manual_seed(3)
    weight = torch.randn(12, 6, 2, 2, generator=generator)
    whole = BlockLayout.from_dense(weight, (3, 2), 0.5, groups=2, sweeps=3)
    for a in range(2):
        part = weight[6 * a : 6 * a + 6]
        own = BlockLayout.from_dense(part, (3, 2), 0.5, sweeps=3)
        assert torch.equal(whole.mask()[6 * a : 6 * a + 6], own.mask())
        for name in ("row_perm", "col_perm"):
            perm = getattr(own, name)
            perm = torch.arange(6) if perm is None else perm
            assert torch.equal(getattr(whole, name)[6 * a : 6 * a + 6], perm + 6 * a)


def test_many_small_groups_together_have_the_sparsity():
    weight = torch.rand(40, 1, 3, 3)
    layout = BlockLayout.from_dense(weight, (4, 1), 0.75, groups=40)
    assert layout.nnz_blocks == 360 - 270  # of nine blocks each, two or three stay
    assert set(layout.row_ptr.diff().tolist()) == {2, 3}
    few = BlockLayout.from_dense(weight, (4, 1), 1.0, groups=40)
    assert few.nnz_blocks == 40  # one in each block row
    none = BlockLayout.from_dense(weight, (4, 1), 1.0, groups=40, allow_empty_rows=True)
    assert none.nnz_blocks == 0


def test_from_dense_keeps_the_heaviest_positions():
    weight = torch.ones(4, 4, 1, 3)
    weight[:2, 2:, 0, 1] = 5.0
    weight[2:, :2, 0, 2] = -7.0
    layout = BlockLayout.from_dense(weight, (2, 2), 10 / 12, reorder=False)
    assert layout.col_idx.tolist() == [1 * 2 + 1, 2 * 2 + 0]
    tied = BlockLayout.from_dense(weight, (2, 2), 0.5, reorder=False, tie_kernel=True)
    assert tied.col_idx.tolist() == [1, 3, 5, 0, 2, 4]


def test_swapping_channels_twice_changes_nothing():
    weight = torch.randn(6, 5, 2, 3)  # [in, out / groups, kh, kw]
    rows = swap_channels(weight, 3)
    assert rows.shape == (15, 2, 2, 3)
    assert torch.equal(rows[7, 1], weight[3, 2])  # output 2 and input 1 of group 1
    assert torch.equal(swap_channels(rows, 3), weight)


GOOD = {
    "block": (2, 2),
    "out_features": 6,
    "in_features": 8,
    "row_ptr": int32(0, 2, 3, 3, 4),
    "col_idx": int32(0, 5, 1, 3),
    "row_perm": int32(2, 1, 0, 3, 5, 4),
    "col_perm": None,
    "kernel_size": (1, 3),
    "groups": 2,
}


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"row_ptr": int32(0, 4)}, ValueError, r"row_ptr must be \[5\], 2 \* ceil\(3 / 2\) \+ 1"),
        ({"col_idx": int32(0, 6, 1, 3)}, ValueError, r"col_idx\[1\] must be in \[0, 6\).*got 6"),
        (
            {"row_perm": int32(2, 1, 3, 0, 5, 4)},
            ValueError,
            r"row_perm\[2\] must be in \[0, 3\), the channels of its group \(got 3\)",
        ),
        (
            {"col_perm": int32(0, 1, 2, 3, 4, 5, 6, 6)},
            ValueError,
            "col_perm must hold each index once",
        ),
        ({"groups": 4}, ValueError, "groups must divide the outputs .got 4 groups and 6 outputs"),
        ({"in_features": 7}, ValueError, "groups must divide the inputs .got 2 groups and 7"),
        ({"groups": 0}, ValueError, "groups must be an int >= 1 .got 0"),
        ({"kernel_size": None}, ValueError, "groups are of convolutions, a matrix has one"),
        ({"kernel_size": (1, 0)}, ValueError, r"kernel_size must be None, \(k,\) or .*\(1, 0\)"),
        ({"kernel_size": (1, 3, 3)}, ValueError, "kernel_size must be None"),
        ({"kernel_size": 3}, ValueError, "kernel_size must be None.*got 3"),
    ],
    ids=lambda p: "-".join(p) if isinstance(p, dict) else "",
)
def test_broken_invariants_are_named(change, error, message):
    BlockLayout(**GOOD)
    with pytest.raises(error, match=message):
        BlockLayout(**{**GOOD, **change})


def test_equality_is_by_content():
    layout = BlockLayout(**GOOD)
    assert layout == BlockLayout(**{k: copy.deepcopy(v) for k, v in GOOD.items()})
    assert layout != BlockLayout(**{**GOOD, "kernel_size": (3, 1)})
    assert layout != BlockLayout(**{**GOOD, "kernel_size": (3,)})
    assert layout.to("cpu") is layout
    assert layout.weight_shape == (6, 4, 1, 3)
    assert layout.block_grid == (4, 6)
    assert "6x4x1x3 in 2 groups, blocks of 2x2: 4 of 24 stored" in repr(layout)


def test_tensors_of_other_shapes_are_refused():
    layout = BlockLayout(**GOOD)
    with pytest.raises(
        ValueError, match=r"\[out, in / groups, \*kernel_size\] = \[6, 4, 1, 3\] \(got \[6, 8, 1"
    ):
        layout.pack(torch.zeros(6, 8, 1, 3))
    with pytest.raises(
        ValueError, match=r"must be bool\[4, 6\], the blocks of 2x2 in 6x4x1x3 in 2"
    ):
        BlockLayout.from_block_mask(
            torch.ones(3, 6, dtype=torch.bool), (2, 2), 6, 8, kernel_size=(1, 3), groups=2
        )
    with pytest.raises(ValueError, match="groups must divide the outputs .got 4 groups and 6"):
        BlockLayout.from_dense(torch.zeros(6, 4, 1, 3), (2, 2), 0.5, groups=4)
    with pytest.raises(ValueError, match="a matrix has one .got 2"):
        BlockLayout.from_mask(torch.ones(6, 4, dtype=torch.bool), (2, 2), groups=2)
    with pytest.raises(ValueError, match="importance must be shaped like the weight"):
        BlockLayout.from_dense(torch.ones(6, 4, 3), (2, 2), 0.5, importance=torch.ones(6, 4))


@pytest.mark.filterwarnings("ignore:Sparse BSR tensor support is in beta")
def test_bsr_of_a_convolution_is_its_packed_matrix():
    pytest.importorskip("scipy")
    layout = BlockLayout(**{**GOOD, "groups": 1, "row_perm": None, "row_ptr": int32(0, 2, 3, 4),
                            "col_idx": int32(0, 11, 1, 3)})  # fmt: skip
    weight = torch.randn(layout.weight_shape)
    values = layout.pack(weight)
    for convert in (layout.to_sparse_bsr, layout.to_scipy_bsr):
        with pytest.raises(ValueError, match="BSR is a matrix format.*6x8x1x3.*packed=True.*6x24"):
            convert(values)
    columns = (weight * layout.mask()).permute(0, 2, 3, 1).reshape(6, 24)  # position, then input
    assert torch.equal(layout.to_sparse_bsr(values, packed=True).to_dense(), columns)
    packed = layout.to_scipy_bsr(values, packed=True).toarray()
    assert torch.equal(torch.from_numpy(packed), columns)


def test_plot_writes_a_picture(tmp_path):
    pytest.importorskip("matplotlib")
    layout = BlockLayout(**GOOD)
    layout.plot(tmp_path / "a.png", torch.randn(layout.weight_shape))
    layout.plot(tmp_path / "b.svg")
    assert (tmp_path / "a.png").stat().st_size > 5000
    assert (tmp_path / "b.svg").read_text().count("<image") == 2
    with pytest.raises(ValueError, match=r"weight must be \[6, 4, 1, 3\] \(got \[6, 4\]\)"):
        layout.plot(tmp_path / "c.png", torch.randn(6, 4))
