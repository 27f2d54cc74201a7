"""Networks of the experiments: plain sequences, so that layers have short names."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence

from torch import nn

PRUNED = ("conv2", "conv3", "conv4")
"""Convolutions of :func:`cnn` that are pruned; the first and the classifier stay dense."""


def cnn(data: str, width: int | None = None, classes: int = 10, channels: int = 1) -> nn.Sequential:
    """Four 3x3 convolutions with batch norm: width, width, pooling, 2 width, 2 width.

    Maps are 8x8 and 4x4 for digits, 14x14 and 7x7 for Fashion-MNIST, a half and a quarter of the
    image for all but digits: the first convolution has stride 2 there. No convolution has a bias,
    which batch norm would remove.

    Args:
        data: ``digits``, ``fashion``, ...
        width: Channels of the first two; 32 for digits and 64 for others by default.
        classes: Outputs.
        channels: Of the images.

    Layers: ``conv1 norm1 relu1 conv2 ... pool conv3 ... relu4 average flatten classifier``.
    """
    width = width or (32 if data == "digits" else 64)
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    inputs = channels
    for index, outputs in enumerate((width, width, 2 * width, 2 * width), start=1):
        stride = 2 if index == 1 and data != "digits" else 1
        layers[f"conv{index}"] = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm2d(outputs)
        layers[f"relu{index}"] = nn.ReLU()
        if index == 2:
            layers["pool"] = nn.MaxPool2d(2)
        inputs = outputs
    layers["average"] = nn.AdaptiveAvgPool2d(1)
    layers["flatten"] = nn.Flatten()
    layers["classifier"] = nn.Linear(inputs, classes)
    return nn.Sequential(layers)


def mlp(sizes: Sequence[int]) -> nn.Sequential:
    """Linear layers ``linear1``, ``linear2``, ... with ReLU between them.

    Args:
        sizes: Inputs, hidden widths, classes.
    """
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, (inputs, outputs) in enumerate(zip(sizes, sizes[1:], strict=False), start=1):
        layers[f"linear{index}"] = nn.Linear(inputs, outputs)
        if index < len(sizes) - 1:
            layers[f"relu{index}"] = nn.ReLU()
    return nn.Sequential(layers)
