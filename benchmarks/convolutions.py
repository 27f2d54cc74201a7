"""The problems of the convolution benchmark: layers of known networks, sparse and dense."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tetris.bench.layers import entries_inside
from tetris.blocking import removed_count
from tetris.timing import Candidate, prepacked_conv2d, prepacked_linear

from .models import MODELS

FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


@dataclass(frozen=True)
class ConvShape:
    """One convolution: square kernel, zero padding that keeps the map up to the stride."""

    batch: int
    inputs: int
    size: int  # of the input map, square
    outputs: int
    kernel: int
    stride: int = 1
    dilation: int = 1

    @classmethod
    def parse(cls, text: str) -> "ConvShape":
        """Reads ``8x256x14x14-256k3s1`` (batch x inputs x height x width - outputs, k, stride).

        ``d2`` behind it is a dilation.
        """
        found = re.fullmatch(r"(\d+)x(\d+)x(\d+)x(\d+)-(\d+)k(\d+)s(\d+)(?:d(\d+))?", text.lower())
        numbers = [int(n or 1) for n in found.groups()] if found else [0]
        if min(numbers) < 1 or numbers[2] != numbers[3] or numbers[5] % 2 == 0:
            raise ValueError(
                "a convolution is NxCxHxH-OkKsS with an odd kernel K and a stride S, for example "
                "8x256x14x14-256k3s1, and may end in a dilation, as 1x512x28x28-512k3s1d2 does "
                f"(got {text!r})"
            )
        return cls(*numbers[:3], *numbers[4:])

    @property
    def output_size(self) -> int:
        """Height and width of the output map."""
        return (self.size - 1) // self.stride + 1

    @property
    def input_shape(self) -> tuple[int, int, int, int]:
        """[N, C, H, W]."""
        return self.batch, self.inputs, self.size, self.size

    @property
    def pixels(self) -> int:
        """Output pixels of the batch."""
        return self.batch * self.output_size**2

    @property
    def weights(self) -> int:
        """Entries of the dense weight."""
        return self.outputs * self.inputs * self.kernel**2

    @property
    def flops(self) -> int:
        """Of the dense convolution."""
        return 2 * self.pixels * self.weights

    @property
    def geometry(self) -> tuple[list[int], list[int], list[int], int]:
        """Stride, padding, dilation, groups, as torch takes them."""
        padding = self.dilation * (self.kernel // 2)
        return [self.stride] * 2, [padding] * 2, [self.dilation] * 2, 1

    def at(self, batch: int) -> "ConvShape":
        """The same layer for another batch."""
        return replace(self, batch=batch)

    def __str__(self) -> str:
        image = f"{self.batch}x{self.inputs}x{self.size}x{self.size}"
        dilation = f"d{self.dilation}" * (self.dilation > 1)
        return f"{image}-{self.outputs}k{self.kernel}s{self.stride}{dilation}"


def layers_of(model: nn.Module, size: int = 224) -> Iterator[ConvShape]:
    """The 3x3 and 1x1 convolutions of a network without groups, but for those of an RGB image."""
    shapes: list[ConvShape] = []

    def note(module: nn.Module, args: tuple[Tensor, ...], _: Tensor) -> None:
        assert isinstance(module, nn.Conv2d)
        if module.groups == 1 and module.in_channels > 3 and module.kernel_size[0] in (1, 3):
            kernel, stride = module.kernel_size[0], module.stride[0]
            inputs, outputs = module.in_channels, module.out_channels
            shapes.append(ConvShape(1, inputs, args[0].shape[2], outputs, kernel, stride))

    convs = [m for m in model.modules() if isinstance(m, nn.Conv2d)]
    hooks = [conv.register_forward_hook(note) for conv in convs]
    with torch.inference_mode():
        model(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    return iter(dict.fromkeys(shapes))


def known_layers(names: list[str]) -> dict[ConvShape, list[str]]:
    """Every distinct layer of the networks named, with the networks that have it."""
    found: dict[ConvShape, list[str]] = {}
    for name in names:
        for shape in layers_of(MODELS[name]()):
            found.setdefault(shape, []).append(name)
    return found


@dataclass(frozen=True)
class SparseConv:
    """The tensors of a layer, in the format of ``torch.ops.tetris.bsconv2d``."""

    shape: ConvShape
    values: Tensor
    row_ptr: Tensor
    col_idx: Tensor
    row_perm: Tensor
    col_perm: Tensor

    @classmethod
    def random(
        cls, shape: ConvShape, block: tuple[int, int], sparsity: float, seed: int = 0
    ) -> "SparseConv":
        """Blocks drawn uniformly, their number exact for the layer; both permutations random."""
        rng = np.random.default_rng(seed)
        bo, bi = block
        groups = -(-shape.inputs // bi)
        rows, columns = -(-shape.outputs // bo), shape.kernel**2 * groups
        stored = rows * columns - removed_count(sparsity, rows * columns)
        kept = np.zeros(rows * columns, dtype=bool)
        kept[rng.choice(rows * columns, stored, replace=False, shuffle=False)] = True
        kept = kept.reshape(rows, columns)
        block_row, column = kept.nonzero()
        scale = np.float32(shape.inputs * shape.kernel**2) ** -0.5
        values = rng.standard_normal((stored, bi, bo), dtype=np.float32) * scale
        # entries outside the matrix are zero by contract
        values *= ((column % groups)[:, None] * bi + np.arange(bi) < shape.inputs)[:, :, None]
        values *= (block_row[:, None] * bo + np.arange(bo) < shape.outputs)[:, None, :]
        row_ptr = np.concatenate([[0], np.cumsum(kept.sum(1))])
        return cls(
            shape,
            torch.from_numpy(values).clone(),  # torch's memory is aligned, numpy's starts anywhere
            torch.from_numpy(row_ptr.astype(np.int32)),
            torch.from_numpy(column.astype(np.int32)),
            torch.from_numpy(rng.permutation(shape.outputs).astype(np.int32)),
            torch.from_numpy(rng.permutation(shape.inputs).astype(np.int32)),
        )

    @property
    def block(self) -> tuple[int, int]:
        """(height along outputs, width along inputs)."""
        return self.values.shape[2], self.values.shape[1]

    @cached_property
    def entries(self) -> int:
        """Stored entries, without the padding of ragged blocks."""
        inputs, outputs = self.shape.inputs, self.shape.outputs
        group = self.col_idx % -(-inputs // self.block[1])
        return entries_inside(self.row_ptr, group, self.block, outputs, inputs)

    @property
    def density(self) -> float:
        """Stored entries over all entries."""
        return self.entries / self.shape.weights

    def __call__(self, x: Tensor) -> Tensor:
        """The convolution under test."""
        return torch.ops.tetris.bsconv2d(
            x,
            self.values,
            self.row_ptr,
            self.col_idx,
            self.row_perm,
            self.col_perm,
            None,
            self.shape.outputs,
            [self.shape.kernel] * 2,
            *self.shape.geometry,
        )

    def dense_rows(self, block_row: int) -> tuple[Tensor, Tensor]:
        """Original outputs of one block row and their dense weight, for checks."""
        bo, bi = self.block
        k, inputs = self.shape.kernel, self.shape.inputs
        groups = -(-inputs // bi)
        rows = self.row_perm[block_row * bo : (block_row + 1) * bo].long()
        packed = torch.zeros(bo, k * k, groups * bi)
        for b in range(int(self.row_ptr[block_row]), int(self.row_ptr[block_row + 1])):
            position, group = divmod(int(self.col_idx[b]), groups)
            packed[:, position, group * bi : (group + 1) * bi] = self.values[b].T
        weight = torch.zeros(len(rows), inputs, k * k)
        weight[:, self.col_perm.long()] = packed[: len(rows), :, :inputs].transpose(1, 2)
        return rows, weight.view(len(rows), inputs, k, k)

    def check(self, x: Tensor) -> None:
        """Raises unless three block rows of the first and the last image are right."""
        images = sorted({0, len(x) - 1})
        x, y = x[images].double(), self(x)[images]
        last = self.row_ptr.numel() - 2
        for block_row in {0, last // 2, last}:
            rows, weight = self.dense_rows(block_row)
            expected = F.conv2d(x, weight.double(), None, *self.shape.geometry)
            error = float((y[:, rows] - expected).abs().max())
            if not error < 1e-4 * max(1.0, float(expected.abs().max())):
                raise RuntimeError(f"wrong result in block row {block_row}: off by {error:.2g}")


def dense_convolutions(shape: ConvShape, x: Tensor) -> dict[str, Candidate]:
    """Every dense route that torch offers for this layer; the fastest is the baseline.

    ``F.conv2d`` is what a user has, ``oneDNN`` the same library with the weight packed ahead of
    time, as a compiled and frozen model calls it; each for both memory formats of input and weight.
    A layer of one kernel position is a product too (``linear``). No route has Winograd's algorithm:
    torch's NNPACK fails on most calls ("SpatialConvolution_updateOutput failed"), and oneDNN does
    not take it by itself.
    """
    padding = shape.dilation * (shape.kernel // 2)
    conv = nn.Conv2d(
        shape.inputs,
        shape.outputs,
        shape.kernel,
        shape.stride,
        padding,
        shape.dilation,
        bias=False,
    )
    found: dict[str, Candidate] = {}
    for name, memory_format in FORMATS.items():
        image = x.contiguous(memory_format=memory_format)
        weight = conv.weight.detach().contiguous(memory_format=memory_format)
        found[f"F.conv2d {name}"] = lambda image=image, weight=weight: F.conv2d(
            image, weight, None, *shape.geometry
        )
        conv.weight.data = weight
        if packed := prepacked_conv2d(conv, shape.input_shape):
            found[f"oneDNN {name}"] = lambda image=image, packed=packed: packed(image)
    weight = conv.weight.detach().contiguous()
    if (shape.kernel, shape.stride) == (1, 1):
        found |= _as_product(shape, x, weight.flatten(1))
    return found


def _as_product(shape: ConvShape, x: Tensor, weight: Tensor) -> dict[str, Candidate]:
    pixels = x.permute(0, 2, 3, 1).contiguous().flatten(0, 2)
    product = prepacked_linear(weight, None, len(pixels))
    size = (shape.batch, shape.size, shape.size, shape.outputs)
    return {"linear": lambda: product(pixels).view(size).permute(0, 3, 1, 2)} if product else {}
