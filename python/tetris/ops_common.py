"""What the wrappers and fake kernels of all ops share."""

import sys
from typing import Literal, get_args

import torch
from torch import Tensor

from .warn import warn

Activation = Literal["none", "relu", "gelu", "gelu_tanh", "silu"]

# Fake kernels check what would otherwise surface only when the traced program runs.


def warn_of_onnx(op: str) -> None:
    """Say what to do inside ``torch.onnx.export``, whose error about the op does not.

    A warning, no error: the export works for who passes ``custom_translation_table=``. The exporter
    that traces by TorchScript calls no fake kernels; docs/compilers.md quotes its message.
    """
    # Looked up, not imported: torch loads torch.onnx when it is first used.
    onnx = sys.modules.get("torch.onnx")
    if onnx is not None and onnx.is_in_onnx_export():
        warn(
            f"tetris::{op}: ONNX has no block-sparse product, so that an export fails; export "
            "tetris.densify(model), which computes the same with zeros where nothing is stored, or "
            "pass a custom_translation_table with an op of your runtime (docs/compilers.md)"
        )


def check_one_device(op: str, *operands: Tensor | None) -> None:
    """Raise unless operands share a device: a mixed call reaches the fake kernel, too."""
    devices = sorted({str(t.device) for t in operands if t is not None})
    torch._check(
        len(devices) == 1, lambda: f"tetris::{op}: operands must be on one device (got {devices})"
    )


def check_values(op: str, values: Tensor, x: Tensor) -> None:
    """Raise unless values are stored blocks of the type of x."""
    torch._check(
        values.dim() == 3 and values.dtype == x.dtype,
        lambda: (
            f"tetris::{op}: values must be [nnzb, block width, block height] of the type of x "
            f"(got {values.dtype}{list(values.shape)} and {x.dtype})"
        ),
    )


def check_activation(op: str, activation: str) -> None:
    """Raise unless an activation is known."""
    torch._check(
        activation in get_args(Activation),
        lambda: (
            f"tetris::{op}: activation must be one of {', '.join(get_args(Activation))} "
            f"(got {activation!r})"
        ),
    )
