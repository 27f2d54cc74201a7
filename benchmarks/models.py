"""Networks of well-known shape with random weights, for input [N, 3, 224, 224].

Written here because torchvision is not needed for anything else. Layers, strides and channels are
those of the papers: He et al. 2016 (ResNet, stride on the 3x3 of a bottleneck), Simonyan and
Zisserman 2015 with batch norm (VGG-16), Sandler et al. 2018 (MobileNetV2). Weights are drawn so
that activations stay near 1; accuracy means nothing.
"""

from collections.abc import Callable

import torch
from torch import Tensor, nn


def conv_norm(
    inputs: int, outputs: int, kernel: int = 3, stride: int = 1, groups: int = 1
) -> list[nn.Module]:
    """A convolution that keeps the map's size up to its stride, and batch norm."""
    conv = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return [conv, nn.BatchNorm2d(outputs)]


class Residual(nn.Module):
    """``activation(body(x) + shortcut(x))``."""

    def __init__(self, body: nn.Module, shortcut: nn.Module, activation: nn.Module) -> None:
        super().__init__()
        self.body, self.shortcut, self.activation = body, shortcut, activation

    def forward(self, x: Tensor) -> Tensor:
        """Any shape that body and shortcut map alike."""
        return self.activation(self.body(x) + self.shortcut(x))


def _shortcut(inputs: int, outputs: int, stride: int) -> nn.Module:
    if (inputs, stride) == (outputs, 1):
        return nn.Identity()
    return nn.Sequential(*conv_norm(inputs, outputs, 1, stride))


def basic_block(inputs: int, width: int, stride: int) -> Residual:
    """Two 3x3 convolutions."""
    body = [*conv_norm(inputs, width, 3, stride), nn.ReLU(inplace=True), *conv_norm(width, width)]
    return Residual(nn.Sequential(*body), _shortcut(inputs, width, stride), nn.ReLU(inplace=True))


def bottleneck(inputs: int, width: int, stride: int) -> Residual:
    """1x1, 3x3, 1x1; four times as many channels come out."""
    body = [*conv_norm(inputs, width, 1), nn.ReLU(inplace=True)]
    body += [*conv_norm(width, width, 3, stride), nn.ReLU(inplace=True)]
    body += conv_norm(width, 4 * width, 1)
    shortcut = _shortcut(inputs, 4 * width, stride)
    return Residual(nn.Sequential(*body), shortcut, nn.ReLU(inplace=True))


def _resnet(block: Callable[[int, int, int], Residual], growth: int, depths: list[int]):
    layers = [*conv_norm(3, 64, 7, 2), nn.ReLU(inplace=True), nn.MaxPool2d(3, 2, 1)]
    channels = 64
    for stage, depth in enumerate(depths):
        width = 64 << stage
        for index in range(depth):
            layers.append(block(channels, width, 2 if stage > 0 and index == 0 else 1))
            channels = growth * width
    return _finish(layers, channels)


def _finish(layers: list[nn.Module], channels: int) -> nn.Sequential:
    layers += [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000)]
    return _initialize(nn.Sequential(*layers))


def resnet18() -> nn.Sequential:
    """ResNet-18: 11.7 million weights, 1.8 GMAC."""
    return _resnet(basic_block, 1, [2, 2, 2, 2])


def resnet50() -> nn.Sequential:
    """ResNet-50: 25.6 million weights, 4.1 GMAC."""
    return _resnet(bottleneck, 4, [3, 4, 6, 3])


def vgg16() -> nn.Sequential:
    """VGG-16 with batch norm: 138 million weights, 15.5 GMAC."""
    layers: list[nn.Module] = []
    channels = 3
    for width, depth in ((64, 2), (128, 2), (256, 3), (512, 3), (512, 3)):
        for _ in range(depth):
            layers += [*conv_norm(channels, width), nn.ReLU(inplace=True)]
            channels = width
        layers.append(nn.MaxPool2d(2))
    layers += [nn.Flatten(), nn.Linear(512 * 7 * 7, 4096), nn.ReLU(inplace=True)]
    layers += [nn.Linear(4096, 4096), nn.ReLU(inplace=True), nn.Linear(4096, 1000)]
    return _initialize(nn.Sequential(*layers))


def mobilenet_v2() -> nn.Sequential:
    """MobileNetV2: 3.5 million weights, 0.3 GMAC, most of them in 1x1 convolutions."""
    layers: list[nn.Module] = [*conv_norm(3, 32, 3, 2), nn.ReLU6(inplace=True)]
    channels = 32
    for expansion, width, depth, stride in (
        (1, 16, 1, 1),
        (6, 24, 2, 2),
        (6, 32, 3, 2),
        (6, 64, 4, 2),
        (6, 96, 3, 1),
        (6, 160, 3, 2),
        (6, 320, 1, 1),
    ):
        for index in range(depth):
            layers.append(_inverted(channels, expansion, width, stride if index == 0 else 1))
            channels = width
    layers += [*conv_norm(channels, 1280, 1), nn.ReLU6(inplace=True)]
    return _finish(layers, 1280)


def _inverted(inputs: int, expansion: int, outputs: int, stride: int) -> nn.Module:
    width = expansion * inputs
    body: list[nn.Module] = []
    if expansion > 1:
        body += [*conv_norm(inputs, width, 1), nn.ReLU6(inplace=True)]
    body += [*conv_norm(width, width, 3, stride, groups=width), nn.ReLU6(inplace=True)]
    body += conv_norm(width, outputs, 1)
    if (inputs, stride) != (outputs, 1):
        return nn.Sequential(*body)
    return Residual(nn.Sequential(*body), nn.Identity(), nn.Identity())


MODELS: dict[str, Callable[[], nn.Sequential]] = {
    "ResNet-18": resnet18,
    "ResNet-50": resnet50,
    "VGG-16": vgg16,
    "MobileNetV2": mobilenet_v2,
}


@torch.no_grad()
def _initialize(model: nn.Sequential, seed: int = 0) -> nn.Sequential:
    """Kaiming weights; the last batch norm of a residual body starts small, so that sums stay."""
    generator = torch.Generator().manual_seed(seed)
    for module in model.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            fan_in = module.weight[0].numel()
            module.weight.normal_(0, (2 / fan_in) ** 0.5, generator=generator)
            if module.bias is not None:
                module.bias.zero_()
        elif isinstance(module, Residual):
            norms = [m for m in module.body.modules() if isinstance(m, nn.BatchNorm2d)]
            norms[-1].weight.fill_(0.25)
    return model.eval()
