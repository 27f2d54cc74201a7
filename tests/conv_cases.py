"""Generated convolution layers with an obvious float64 reference, on the pattern of cases.py.

A :class:`ConvLayer` is what the ops take, drawn at random from a :class:`ConvCase`. Entries of
ragged blocks that lie outside the weight hold NaN: an op that reads one shows it. The reference is
torch's own dense convolution in float64.
"""

import dataclasses
import functools
import random

import torch
from torch import Tensor
from torch.nn import functional as F

Pair = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class ConvCase:
    """Maps [images, inputs, *size] to `outputs` channels; blocks bo x bi, a share is stored."""

    inputs: int
    outputs: int
    size: Pair
    kernel: Pair = (3, 3)
    stride: Pair = (1, 1)
    padding: Pair = (0, 0)
    dilation: Pair = (1, 1)
    output_padding: Pair = (0, 0)
    groups: int = 1
    block: Pair = (4, 1)
    images: int = 2
    density: float = 0.5
    perm: str = "both"  # both | rows | cols | none
    bias: bool = True
    channels_last: bool = False
    transposed: bool = False

    def __str__(self) -> str:
        def pair(letter, p, usual=None):
            return "" if p == usual else f"-{letter}{p[0]}x{p[1]}"

        return (
            ("transpose-" if self.transposed else "conv-")
            + f"{self.images}x{self.inputs}x{self.size[0]}x{self.size[1]}-to{self.outputs}"
            + pair("k", self.kernel)
            + pair("s", self.stride, (1, 1))
            + pair("p", self.padding, (0, 0))
            + pair("op", self.output_padding, (0, 0))
            + pair("d", self.dilation, (1, 1))
            + ("" if self.groups == 1 else f"-g{self.groups}")
            + pair("b", self.block)
            + f"-{self.density * 100:.0f}%"
            + ("" if self.perm == "both" else f"-{self.perm}")
            + ("" if self.bias else "-nobias")
            + ("-nhwc" if self.channels_last else "")
        )

    @property
    def out_size(self) -> Pair:
        """Height and width of the result; not positive where the case is none."""
        sizes = []
        for n, k, s, p, d, op in zip(
            self.size,
            self.kernel,
            self.stride,
            self.padding,
            self.dilation,
            self.output_padding,
            strict=True,
        ):
            reach = d * (k - 1) + 1
            if self.transposed:
                sizes.append((n - 1) * s - 2 * p + reach + op)
            else:
                sizes.append((n + 2 * p - reach) // s + 1)
        return sizes[0], sizes[1]

    @property
    def valid(self) -> bool:
        """Whether torch takes it."""
        fits = all(
            op < max(s, d)
            for op, s, d in zip(self.output_padding, self.stride, self.dilation, strict=True)
        )
        return fits and min(self.out_size) >= 1

    @property
    def terms(self) -> int:
        """Of one output, at most."""
        return self.inputs // self.groups * self.kernel[0] * self.kernel[1]

    @property
    def format(self) -> torch.memory_format:
        """Of the maps."""
        return torch.channels_last if self.channels_last else torch.contiguous_format


@dataclasses.dataclass
class ConvLayer:
    """Operands of the ops, and the dense float64 weight they stand for."""

    case: ConvCase
    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    row_perm: Tensor | None
    col_perm: Tensor | None
    bias: Tensor | None

    @property
    def index(self) -> tuple:
        """The four index operands, in the order of every op."""
        return self.row_ptr, self.col_idx, self.row_perm, self.col_perm

    @property
    def op(self) -> str:
        """Name of the op, and what the names of its gradients begin with."""
        return "bsconv_transpose2d" if self.case.transposed else "bsconv2d"

    @property
    def window(self) -> tuple:
        """What the gradient ops take at the end."""
        c = self.case
        return c.kernel, c.stride, c.padding, c.dilation, c.groups

    @property
    def settings(self) -> tuple:
        """What the op takes from kernel_size to groups."""
        c = self.case
        more = (c.output_padding,) if c.transposed else ()
        return c.kernel, c.stride, c.padding, *more, c.dilation, c.groups

    @functools.cached_property
    def entries(self) -> tuple[tuple[Tensor, ...], tuple[Tensor, ...]]:
        """Stored entries inside the weight: their place in values, in W[out, in/groups, kh, kw]."""
        c = self.case
        nnzb, bi, bo = self.values.shape
        group_out, group_in = c.outputs // c.groups, c.inputs // c.groups
        rows, cols = -(-group_out // bo), -(-group_in // bi)
        block_row = torch.repeat_interleave(
            torch.arange(self.row_ptr.numel() - 1), self.row_ptr.diff().long()
        )
        b, i, o = torch.meshgrid(
            torch.arange(nnzb), torch.arange(bi), torch.arange(bo), indexing="ij"
        )
        group, tap = (block_row // rows)[b], (self.col_idx.long() // cols)[b]
        row_slot = (block_row % rows)[b] * bo + o
        col_slot = (self.col_idx.long() % cols)[b] * bi + i
        inside = (row_slot < group_out) & (col_slot < group_in)
        group, tap = group[inside], tap[inside]
        row = group * group_out + row_slot[inside]
        col = group * group_in + col_slot[inside]
        if self.row_perm is not None:
            row = self.row_perm.long()[row]
        if self.col_perm is not None:
            col = self.col_perm.long()[col]
        place = (row, col - group * group_in, tap // c.kernel[1], tap % c.kernel[1])
        return (b[inside], i[inside], o[inside]), place

    def dense(self, values: Tensor) -> Tensor:
        """W[out, in/groups, kh, kw] of these values, in their type; differentiable."""
        c = self.case
        stored, place = self.entries
        w = values.new_zeros(c.outputs, c.inputs // c.groups, *c.kernel)
        return w.index_put(place, values[stored])

    def dense_conv(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """Torch's convolution with W[out, in/groups, kh, kw]."""
        c = self.case
        if not c.transposed:
            return F.conv2d(x, weight, bias, c.stride, c.padding, c.dilation, c.groups)
        out, width = c.outputs // c.groups, c.inputs // c.groups
        weight = weight.view(c.groups, out, width, *c.kernel).transpose(1, 2)
        weight = weight.reshape(c.inputs, out, *c.kernel)
        return F.conv_transpose2d(
            x, weight, bias, c.stride, c.padding, c.output_padding, c.groups, c.dilation
        )

    def conv(
        self,
        x: Tensor,
        activation: str = "none",
        residual: Tensor | None = None,
        values: Tensor | None = None,
        bias: Tensor | None = None,
    ) -> Tensor:
        """The op, with the layer's own values and bias unless others are given."""
        values = self.values if values is None else values
        bias = self.bias if bias is None else bias
        return getattr(torch.ops.tetris, self.op)(
            x, values, *self.index, bias, self.case.outputs, *self.settings, activation, residual
        )

    def grad_input(self, grad: Tensor, values: Tensor | None = None) -> Tensor:
        """The op that makes dx."""
        values = self.values if values is None else values
        call = getattr(torch.ops.tetris, f"{self.op}_grad_input")
        return call(grad, values, *self.index, self.case.inputs, self.case.size, *self.window)

    def grad_values(self, x: Tensor, grad: Tensor) -> Tensor:
        """The op that makes dvalues."""
        call = getattr(torch.ops.tetris, f"{self.op}_grad_values")
        return call(x, grad, *self.index, self.case.block, *self.window)


def make_conv(
    case: ConvCase, dtype: torch.dtype = torch.float32, seed: int = 0, padding: float = torch.nan
) -> ConvLayer:
    """Draw a layer; the second block row of three or more stays empty unless all is kept."""
    g = torch.Generator().manual_seed(seed)
    (bo, bi), groups = case.block, case.groups
    group_out, group_in = case.outputs // groups, case.inputs // groups
    rows, cols = -(-group_out // bo), -(-group_in // bi)
    kept = torch.rand(groups * rows, case.kernel[0] * case.kernel[1] * cols, generator=g)
    kept = kept < case.density
    if groups * rows > 2 and case.density < 1:
        kept[1] = False
    counts = kept.sum(1)

    def permutation(of, channels):
        if case.perm not in ("both", of):
            return None
        each = channels // groups
        parts = [torch.randperm(each, generator=g) + a * each for a in range(groups)]
        return torch.cat(parts).int()

    layer = ConvLayer(
        case=case,
        values=torch.randn(int(counts.sum()), bi, bo, generator=g, dtype=dtype),
        row_ptr=torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)]).int(),
        col_idx=kept.nonzero()[:, 1].int(),
        row_perm=permutation("rows", case.outputs),
        col_perm=permutation("cols", case.inputs),
        bias=torch.randn(case.outputs, generator=g, dtype=dtype) if case.bias else None,
    )
    outside = torch.ones_like(layer.values, dtype=torch.bool)
    outside[layer.entries[0]] = False
    layer.values[outside] = padding
    return layer


def maps(case: ConvCase, dtype: torch.dtype = torch.float32, seed: int = 1) -> Tensor:
    """An input of the case, in its memory format."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(case.images, case.inputs, *case.size, generator=g, dtype=dtype)
    return x.contiguous(memory_format=case.format)


def results(case: ConvCase, dtype: torch.dtype = torch.float32, seed: int = 2) -> Tensor:
    """A gradient or residual of the case: shaped like its output."""
    g = torch.Generator().manual_seed(seed)
    y = torch.randn(case.images, case.outputs, *case.out_size, generator=g, dtype=dtype)
    return y.contiguous(memory_format=case.format)


def reference(layer: ConvLayer, x: Tensor) -> tuple[Tensor, Tensor]:
    """The convolution in float64, and the same sum of absolute values."""
    w, bias = layer.dense(layer.values).double(), layer.bias
    bias = None if bias is None else bias.double()
    y = layer.dense_conv(x.double(), w, bias)
    scale = layer.dense_conv(x.double().abs(), w.abs(), None if bias is None else bias.abs())
    return y, scale


def reference_grads(layer: ConvLayer, x: Tensor, dy: Tensor) -> tuple:
    """dx and dvalues in float64, each with its sum of absolute values; zero in padding."""

    def grads(x, w, dy):
        x, w = x.requires_grad_(), w.requires_grad_()
        return torch.autograd.grad(layer.dense_conv(x, w), (x, w), dy)

    w = layer.dense(layer.values).double()
    dx, dw = grads(x.double(), w.clone(), dy.double())
    dx_scale, dw_scale = grads(x.double().abs(), w.abs(), dy.double().abs())
    stored, place = layer.entries
    zeros = torch.zeros(layer.values.shape, dtype=torch.float64)
    return (
        (dx, dx_scale),
        (zeros.index_put(stored, dw[place]), zeros.index_put(stored, dw_scale[place])),
    )


def grid() -> list[ConvCase]:
    """Every kind of window, group, block, map and format; the valid ones, in both directions."""
    cases = []
    # Windows, with paddings up to beyond the kernel's reach.
    for kernel in [(1, 1), (3, 3), (3, 1), (2, 4), (5, 5)]:
        for stride in [(1, 1), (2, 2), (3, 1), (4, 5)]:
            for padding in [(0, 0), (1, 2), (kernel[0] + 1, kernel[1] + 2)]:
                cases.append(ConvCase(5, 7, (9, 11), kernel, stride, padding, block=(4, 2)))
    for dilation in [(2, 2), (1, 3), (3, 2), (5, 4)]:
        for stride in [(1, 1), (2, 2), (3, 4), (2, 1)]:
            for padding in [(0, 0), (2, 3)]:
                cases.append(
                    ConvCase(6, 9, (13, 12), (3, 3), stride, padding, dilation, block=(8, 1))
                )
    # Groups, down to one channel each.
    for inputs, outputs, groups in [(6, 4, 2), (9, 21, 3), (8, 8, 8), (5, 15, 5), (40, 20, 20)]:
        for block in [(1, 1), (4, 1), (16, 16)]:
            cases.append(ConvCase(inputs, outputs, (7, 6), groups=groups, block=block))
            cases.append(
                ConvCase(
                    inputs, outputs, (8, 7), (3, 3), (2, 2), (1, 1), groups=groups, block=block
                )
            )
    # Blocks, whole and ragged.
    for block in [(1, 1), (2, 1), (3, 1), (4, 4), (5, 3), (8, 1), (9, 2), (12, 7), (16, 1)]:
        for inputs, outputs in [(16, 48), (13, 29)]:
            cases.append(ConvCase(inputs, outputs, (8, 9), padding=(1, 1), block=block))
    for block in [(16, 16), (32, 1), (1, 16), (33, 20), (128, 1), (1, 128)]:
        cases.append(ConvCase(37, 130, (5, 6), padding=(1, 1), block=block, density=0.2))
    # Maps: runs of output pixels around the vector widths; tiny, flat and tall ones.
    for width in [1, 2, 7, 8, 9, 15, 16, 17, 31, 33, 48, 64, 100]:
        cases.append(ConvCase(3, 9, (3, width), (1, 1), block=(8, 1)))
        cases.append(ConvCase(3, 9, (2, width), padding=(1, 1), block=(8, 1)))
    for size in [(1, 1), (1, 40), (40, 1), (2, 2), (14, 14)]:
        for images in [1, 3, 7]:
            cases.append(ConvCase(6, 10, size, padding=(2, 2), images=images))
    # Densities, with no stored block and all of them.
    for density in [0.0, 0.1, 1.0]:
        for block in [(1, 1), (8, 1), (16, 16)]:
            cases.append(ConvCase(20, 20, (6, 7), padding=(1, 1), block=block, density=density))
    # Optional operands.
    for perm in ["none", "rows", "cols"]:
        cases.append(ConvCase(10, 14, (6, 7), groups=2, perm=perm, bias=False))
    # No images.
    cases.append(ConvCase(4, 6, (5, 5), images=0))
    cases += [dataclasses.replace(c, transposed=True) for c in cases]
    for output_padding in [(1, 0), (0, 1), (1, 2)]:
        for dilation in [(1, 1), (2, 3)]:
            cases.append(
                ConvCase(
                    5,
                    7,
                    (6, 5),
                    (3, 2),
                    (2, 3),
                    (1, 1),
                    dilation,
                    output_padding,
                    transposed=True,
                )
            )
    # An output_padding beyond the stride: pixels at the end that no input reaches.
    cases.append(ConvCase(5, 7, (6, 5), (1, 2), (1, 2), (0, 0), (4, 5), (3, 4), transposed=True))
    # Both memory formats, one after the other.
    return [
        dataclasses.replace(c, channels_last=bool(i % 2))
        for i, c in enumerate(c for c in cases if c.valid)
    ]


def random_case(seed: int) -> ConvCase:
    """A valid case, any of them."""
    r = random.Random(seed)

    def pair(choices):
        return r.choice(choices), r.choice(choices)

    while True:
        groups = r.choice([1, 1, 1, 2, 3])
        case = ConvCase(
            inputs=groups * r.choice([1, 2, 5, 16, 20]),
            outputs=groups * r.choice([1, 3, 8, 17, 32]),
            size=pair([1, 2, 3, 5, 7, 14, 33]),
            kernel=r.choice([(1, 1), (3, 3), (3, 1), (2, 4), (5, 5), (1, 3), (4, 2)]),
            stride=pair([1, 1, 2, 3, 6]),
            padding=pair([0, 0, 1, 2, 3, 7]),
            dilation=pair([1, 1, 2, 3]),
            output_padding=pair([0, 0, 1, 2]),
            groups=groups,
            block=(r.choice([1, 2, 4, 8, 16, 5, 128]), r.choice([1, 1, 2, 4, 16, 3])),
            images=r.choice([0, 1, 1, 2, 5]),
            density=r.choice([0, 0.1, 0.3, 0.5, 1]),
            perm=r.choice(["both", "both", "rows", "cols", "none"]),
            bias=r.random() < 0.6,
            channels_last=r.random() < 0.5,
            transposed=r.random() < 0.5,
        )
        if not case.transposed:
            case = dataclasses.replace(case, output_padding=(0, 0))
        if case.valid:
            return case
