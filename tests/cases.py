"""Generated layers with an obvious float64 reference.

A :class:`Layer` is what the ops take, drawn at random from a :class:`Case`. Entries of ragged
blocks that lie outside the matrix hold NaN: an op that reads one shows it. The reference sums over
stored entries only, one output at a time, so NaN and Inf propagate as the ops promise.
"""

import dataclasses
import functools

import torch
from torch import Tensor

ACTIVATIONS = {
    "none": lambda z: z,
    "relu": torch.relu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": functools.partial(torch.nn.functional.gelu, approximate="tanh"),
    "silu": torch.nn.functional.silu,
}


@dataclasses.dataclass(frozen=True)
class Case:
    """m tokens times W[n, k] in blocks bo x bi, of which a share `density` is stored."""

    m: int
    n: int
    k: int
    bo: int
    bi: int
    density: float = 0.5
    perm: str = "both"  # both | rows | cols | none
    bias: bool = True

    def __str__(self) -> str:
        text = f"m{self.m}-n{self.n}-k{self.k}-b{self.bo}x{self.bi}-d{self.density * 100:.0f}"
        return (
            text
            + ("" if self.perm == "both" else f"-{self.perm}")
            + ("" if self.bias else "-nobias")
        )


@dataclasses.dataclass
class Layer:
    """Operands of the ops, and the dense float64 weight they stand for."""

    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    row_perm: Tensor | None
    col_perm: Tensor | None
    bias: Tensor | None
    n: int
    k: int

    @property
    def index(self) -> tuple:
        """The four index operands, in the order of every op."""
        return self.row_ptr, self.col_idx, self.row_perm, self.col_perm

    @functools.cached_property
    def entries(self) -> tuple[tuple[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]:
        """Stored entries inside the matrix: their place in values, their place in W."""
        nnzb, bi, bo = self.values.shape
        block_row = torch.repeat_interleave(
            torch.arange(self.row_ptr.numel() - 1), self.row_ptr.diff().long()
        )
        b, i, o = torch.meshgrid(
            torch.arange(nnzb), torch.arange(bi), torch.arange(bo), indexing="ij"
        )
        row_slot = block_row[b] * bo + o
        col_slot = self.col_idx.long()[b] * bi + i
        inside = (row_slot < self.n) & (col_slot < self.k)
        row, col = row_slot[inside], col_slot[inside]
        if self.row_perm is not None:
            row = self.row_perm.long()[row]
        if self.col_perm is not None:
            col = self.col_perm.long()[col]
        return (b[inside], i[inside], o[inside]), (row, col)

    def dense(self, values: Tensor) -> Tensor:
        """W[n, k] of these values, in their type; differentiable."""
        stored, place = self.entries
        return values.new_zeros(self.n, self.k).index_put(place, values[stored])

    def mask(self) -> Tensor:
        """Where W has stored entries."""
        return self.dense(torch.ones_like(self.values)) != 0

    def bsmm(self, x: Tensor, activation: str = "none") -> Tensor:
        return torch.ops.tetris.bsmm(x, self.values, *self.index, self.bias, self.n, activation)


def make_layer(
    case: Case, dtype: torch.dtype = torch.float32, seed: int = 0, padding: float = torch.nan
) -> Layer:
    """Draw a layer; the second block row of three or more stays empty unless everything is kept."""
    g = torch.Generator().manual_seed(seed)
    rows, groups = -(-case.n // case.bo), -(-case.k // case.bi)
    kept = torch.rand(rows, groups, generator=g) < case.density
    if rows > 2 and case.density < 1:
        kept[1] = False
    counts = kept.sum(1)
    layer = Layer(
        values=torch.randn(int(counts.sum()), case.bi, case.bo, generator=g, dtype=dtype),
        row_ptr=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int(),
        col_idx=kept.nonzero()[:, 1].int(),
        row_perm=torch.randperm(case.n, generator=g).int()
        if case.perm in ("both", "rows")
        else None,
        col_perm=torch.randperm(case.k, generator=g).int()
        if case.perm in ("both", "cols")
        else None,
        bias=torch.randn(case.n, generator=g, dtype=dtype) if case.bias else None,
        n=case.n,
        k=case.k,
    )
    outside = torch.ones_like(layer.values, dtype=torch.bool)
    outside[layer.entries[0]] = False
    layer.values[outside] = padding
    return layer


def tokens(
    case: Case, dtype: torch.dtype = torch.float32, seed: int = 1, features: int = 0
) -> Tensor:
    """[m, k], or [m, features]."""
    g = torch.Generator().manual_seed(seed)
    return torch.randn(case.m, features or case.k, generator=g, dtype=dtype)


def reference(layer: Layer, x: Tensor) -> tuple[Tensor, Tensor]:
    """x W^T + bias in float64 over stored entries, and the same sum of absolute values."""
    w, mask, x = layer.dense(layer.values).double(), layer.mask(), x.double()
    y = x.new_zeros(*x.shape[:-1], layer.n)
    scale = torch.zeros_like(y)
    for o in range(layer.n):
        terms = x[..., mask[o]] * w[o, mask[o]]
        y[..., o] = terms.sum(-1)
        scale[..., o] = terms.abs().sum(-1)
    if layer.bias is not None:
        y, scale = y + layer.bias.double(), scale + layer.bias.double().abs()
    return y, scale


def assert_product(got: Tensor, want: Tensor, scale: Tensor, terms: int) -> None:
    """|got - want| stays below the rounding error that sums of this many terms can have."""
    assert got.shape == want.shape
    unit = torch.finfo(got.dtype).eps / 2
    error, bound = (got.double() - want).abs(), (terms + 3) * unit * scale
    bad = ~(error <= bound)
    assert not bad.any(), (
        f"{int(bad.sum())} of {bad.numel()} differ, first at {bad.nonzero()[0].tolist()}: "
        f"got {got[bad][0]}, want {want[bad][0]}, bound {bound[bad][0]}"
    )


def grid() -> list[Case]:
    """Ragged and whole sizes, every kind of block, every token path; each case has its reason."""
    cases = []
    # Tokens around the vector widths and panel sizes, on a ragged layer.
    for m in [*range(18), 31, 32, 33, 47, 48, 49, 63, 64, 65, 100, 129, 257]:
        cases.append(Case(m, 37, 53, 4, 1, 0.3))
    # Block shapes, whole and ragged, one token / few / many.
    shapes = [(1, 1), (2, 1), (3, 1), (4, 1), (5, 1), (7, 1), (8, 1), (9, 1), (12, 1), (16, 1)]
    shapes += [(17, 1), (32, 1), (1, 16), (1, 5), (4, 4), (5, 3), (12, 7), (16, 16), (31, 2)]
    shapes += [(32, 32), (33, 65), (128, 1), (1, 128), (128, 128)]
    for bo, bi in shapes:
        for m, n, k in [(1, 130, 67), (7, 64, 96), (50, 129, 131)]:
            cases.append(Case(m, n, k, bo, bi, 0.25))
    # Densities, with zero stored blocks and all of them.
    for density in [0.0, 0.05, 0.9, 1.0]:
        for bo, bi in [(1, 1), (8, 1), (16, 16)]:
            for m in [1, 3, 40]:
                cases.append(Case(m, 70, 90, bo, bi, density))
    # Optional operands.
    for perm in ["none", "rows", "cols"]:
        for m in [1, 20]:
            cases.append(Case(m, 45, 50, 4, 2, 0.4, perm, bias=False))
    # Tiny and lopsided matrices, and blocks larger than the matrix.
    for n, k in [(1, 1), (1, 200), (200, 1), (3, 1000), (1000, 3)]:
        for bo, bi in [(1, 1), (4, 1), (16, 16)]:
            for m in [1, 5, 34]:
                cases.append(Case(m, n, k, bo, bi, 0.6))
    return cases
