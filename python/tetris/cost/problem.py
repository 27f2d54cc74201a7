"""What a layer computes on one input: the sizes that its time depends on."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from ..blocking import Blocking, removed_count
from ..nn.kinds import DenseLayer, LinearLayer, features_of


@dataclass(frozen=True)
class Problem:
    """One layer on one input, the whole batch counted.

    Attributes:
        outputs: Output channels, of all groups.
        inputs: Input channels, of all groups.
        tokens: Results of each output channel: tokens of a linear layer, output positions of a
            convolution.
        kernel: None of a linear layer, else the kernel's size.
        groups: Groups of a convolution.
        sources: Input positions.
        lines: Positions that the sparse kernel computes, ``tokens`` and those between the rows of a
            map that are dropped (see csrc/cpu/conv_geometry.h).
        width: Of a row of the output map.
        windows: Outputs that read a pixel at a kernel position, of all positions together, where
            that makes the sparse kernel go position by position: where a dilation reaches so far
            that much of what lines hold are zeros. 0 of all other layers.

    Example:
        >>> Problem.linear(tokens=128, inputs=768, outputs=3072).weights
        2359296
        >>> Problem.convolution(1, 64, (56, 56), 128, (3, 3), padding=1).tokens
        3136
    """

    outputs: int
    inputs: int
    tokens: int
    kernel: tuple[int, ...] | None = None
    groups: int = 1
    sources: int = 0
    lines: int = 0
    width: int = 1
    windows: int = 0

    @classmethod
    def linear(cls, tokens: int, inputs: int, outputs: int) -> Problem:
        """[tokens, inputs] to [tokens, outputs]."""
        return cls(outputs, inputs, tokens, sources=tokens, lines=tokens)

    @classmethod
    def convolution(
        cls,
        batch: int,
        inputs: int,
        size: Sequence[int],
        outputs: int,
        kernel: Sequence[int],
        *,
        stride: Sequence[int] | int = 1,
        padding: Sequence[int] | int = 0,
        dilation: Sequence[int] | int = 1,
        groups: int = 1,
        transposed: bool = False,
        output_size: Sequence[int] | None = None,
    ) -> Problem:
        """[batch, inputs, *size] to [batch, outputs, *output_size].

        Args:
            batch: Images.
            inputs: Channels.
            size: Of the input map: rows and columns, or the length of a sequence.
            outputs: Channels.
            kernel: Its size along each axis.
            stride: One number, or one for each axis; like padding and dilation.
            padding: Of zeros at each side.
            dilation: Distance of kernel positions.
            groups: Groups.
            transposed: A transposed convolution, which needs its ``output_size``.
            output_size: Of the output map; worked out if None.
        """
        axes = len(size)

        def each(value: Sequence[int] | int) -> Sequence[int]:
            return [value] * axes if isinstance(value, int) else value

        steps, pads, dilations = each(stride), each(padding), each(dilation)
        if output_size is None:
            output_size = [
                (n + 2 * p - d * (k - 1) - 1) // s + 1
                for n, p, d, k, s in zip(size, pads, dilations, kernel, steps, strict=True)
            ]
        # One row of the map and the zeros that it shares with the next.
        if transposed:
            count = [n + d * (k - 1) // s for n, d, k, s in zip(
                size, dilations, kernel, steps, strict=True)]  # fmt: skip
            pitch = count
        else:
            count = output_size
            pitch = [
                max(m, -(-(n + p) // s))
                for m, n, p, s in zip(output_size, size, pads, steps, strict=True)
            ]
        lines = batch * math.prod(pitch) - math.prod(pitch) + 1
        for axis in range(axes):
            lines += (count[axis] - 1) * math.prod(pitch[axis + 1 :])
        lines = max(lines, 1)
        windows = batch
        for m, n, p, d, k, s in zip(output_size, size, pads, dilations, kernel, steps, strict=True):
            small, big = (n, m) if transposed else (m, n)
            windows *= sum(_met(small, big, s, p - tap * d) for tap in range(k))
        # Without a dilation the kernel's reach is too short: csrc/cpu/conv_plan.cpp, tap_by_tap.
        far = max(dilations) > 1 and 4 * windows < 3 * lines * math.prod(kernel)
        return cls(
            outputs,
            inputs,
            batch * math.prod(output_size),
            tuple(kernel),
            groups,
            batch * math.prod(size),
            lines,
            output_size[-1],
            windows if far else 0,
        )

    @classmethod
    def of(
        cls, layer: DenseLayer, input_shape: Sequence[int], output_shape: Sequence[int]
    ) -> Problem:
        """A layer of a model on an input of this shape."""
        if isinstance(layer, LinearLayer):
            outputs, inputs = features_of(layer)
            return cls.linear(math.prod(input_shape[:-1]), inputs, outputs)
        axes = len(layer.kernel_size)
        padding = layer.padding
        if isinstance(padding, str):
            kernel = zip(layer.kernel_size, layer.dilation, strict=True)
            padding = [d * (k - 1) // 2 if padding == "same" else 0 for k, d in kernel]
        return cls.convolution(
            input_shape[0] if len(input_shape) == axes + 2 else 1,
            layer.in_channels,
            input_shape[-axes:],
            layer.out_channels,
            layer.kernel_size,
            stride=layer.stride,
            padding=padding,
            dilation=layer.dilation,
            groups=layer.groups,
            transposed=isinstance(layer, nn.ConvTranspose2d),
            output_size=output_shape[-axes:],
        )

    @property
    def taps(self) -> int:
        """Kernel positions."""
        return math.prod(self.kernel or ())

    @property
    def computed(self) -> float:
        """Positions at which a stored weight of a convolution is multiplied, on average."""
        return self.windows / self.taps if self.windows else float(self.lines)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """(out, in / groups, *kernel)."""
        return (self.outputs, self.inputs // self.groups, *(self.kernel or ()))

    @property
    def weights(self) -> int:
        """Entries of the dense weight."""
        return math.prod(self.weight_shape)

    def blocking(self, block: tuple[int, int]) -> Blocking:
        """How the weight is cut into blocks."""
        return Blocking(block, self.outputs, self.inputs, self.kernel, self.groups)


def _met(small: int, big: int, stride: int, lead: int) -> int:
    """Pixels j of the smaller map for which the bigger one has a pixel j stride - lead."""
    first, last = max(0, -(-lead // stride)), min(small - 1, (big - 1 + lead) // stride)
    return max(0, last - first + 1)


@dataclass(frozen=True)
class Stored:
    """What a sparse layer stores.

    Attributes:
        block: (bo, bi).
        rows: Block rows, of all groups.
        blocks: Stored blocks.

    Example:
        >>> problem = Problem.linear(tokens=128, inputs=768, outputs=3072)
        >>> Stored.of(problem, block=(16, 1), sparsity=0.9)
        Stored(block=(16, 1), rows=192, blocks=14746)
    """

    block: tuple[int, int]
    rows: int
    blocks: int

    @classmethod
    def of(cls, problem: Problem, block: tuple[int, int], sparsity: float, tied: int = 1) -> Stored:
        """That of a layer at a sparsity: a share of its blocks, but one in each block row.

        ``tied`` blocks stay or go together: with ``tie_kernel`` those of all kernel positions.
        """
        rows, columns = problem.blocking(block).grid
        units = rows * columns // tied
        return cls(block, rows, tied * max(rows, units - removed_count(sparsity, units)))

    @property
    def values(self) -> int:
        """Stored numbers, those of ragged blocks outside of the weight included."""
        return self.blocks * math.prod(self.block)

    @property
    def bytes(self) -> int:
        """Of values and index, float32 and int32: what one pass over the weight reads."""
        return 4 * (self.values + self.blocks + self.rows)
