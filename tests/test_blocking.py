"""How the driver cuts the work must not show: slabs of inputs, token tiles, tiles of a block."""

import pytest
import torch

import tetris
from cases import Case, assert_product, make_layer, reference, tokens

BLOCKS = [(1, 1), (2, 1), (4, 1), (8, 1), (16, 16), (5, 3), (12, 1), (20, 7), (32, 2), (1, 16)]


@pytest.fixture
def caches():
    """Pretend that the level-1 and level-2 caches have so many bytes."""
    yield tetris._C.assume_cache_bytes
    tetris._C.assume_cache_bytes(0, 0)


@pytest.mark.parametrize("block", BLOCKS, ids=lambda b: f"b{b[0]}x{b[1]}")
@pytest.mark.parametrize("l1", [512, 4096])
@pytest.mark.parametrize("l2", [2048, 8192, 40000, 1 << 20])
def test_slabs_keep_every_bit(l1, l2, block, isa, caches, threads):
    layer = make_layer(Case(70, 130, 257, *block))
    x = tokens(Case(70, 130, 257, *block))

    def run():
        return torch.ops.tetris.bsmm(x, layer.values, *layer.index, layer.bias, layer.n)

    whole = run()
    want, scale = reference(layer, x)
    assert_product(whole, want, scale, layer.k)
    caches(l1, l2)
    for n in (1, 3):
        threads(n)
        assert torch.equal(run(), whole)


@pytest.mark.parametrize("m", [17, 33, 48, 100])
@pytest.mark.parametrize(
    "block", [(12, 1), (16, 1), (32, 1), (5, 3)], ids=lambda b: f"b{b[0]}x{b[1]}"
)
def test_grad_input_keeps_every_bit_for_any_threads(block, m, isa):
    case = Case(m, 300, 300, *block)
    layer, grad = make_layer(case), torch.randn(m, 300)
    before, seen = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            seen.append(torch.ops.tetris.bsmm_grad_input(grad, layer.values, *layer.index, layer.k))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(s, seen[0]) for s in seen)


def test_forward_mode_raises():
    layer = make_layer(Case(3, 8, 8, 2, 2))
    x = torch.randn(3, 8)
    with pytest.raises(NotImplementedError, match="tetris::bsmm: forward-mode"):
        torch.func.jvp(
            lambda t: torch.ops.tetris.bsmm(t, layer.values, *layer.index, layer.bias, layer.n),
            (x,),
            (x,),
        )


def test_leading_shapes_must_match():
    layer = make_layer(Case(6, 8, 8, 2, 2))
    with pytest.raises(
        RuntimeError, match=r"same leading shape \(got \[2, 3, 8\] and \[3, 2, 8\]\)"
    ):
        torch.ops.tetris.bsmm_grad_values(
            torch.randn(2, 3, 8), torch.randn(3, 2, 8), *layer.index, 2, 2
        )
