"""Class-conditional generators, their discriminators, and the classifier that judges both."""

from __future__ import annotations

from collections import OrderedDict

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.parametrizations import spectral_norm

CLASSES = 10
LATENT = {"digits": 16, "fashion": 64}
WIDTH = {"digits": 128, "fashion": 32}
LAST = "net.last"
"""The layer that makes the image stays dense."""


class Generator(nn.Module):
    """``net(latent and one-hot label)``; a sequence inside, so that it can be timed as one.

    Digits: three linear layers with batch norm, [N, 64]. Fashion-MNIST: a linear layer to 7x7 maps,
    two transposed convolutions, a 3x3 convolution, [N, 1, 28, 28].

    Args:
        data: ``digits`` or ``fashion``.
        width: Of the hidden layers, or channels before the last convolution.
    """

    def __init__(self, data: str, width: int | None = None) -> None:
        super().__init__()
        make = _linear_generator if data == "digits" else _conv_generator
        self.net = nn.Sequential(make(LATENT[data] + CLASSES, width or WIDTH[data]))

    def forward(self, latent: Tensor, labels: Tensor) -> Tensor:
        """Images in [-1, 1] of the classes asked for."""
        return self.net(self.inputs(latent, labels))

    @staticmethod
    def inputs(latent: Tensor, labels: Tensor) -> Tensor:
        """What ``net`` takes."""
        return torch.cat([latent, F.one_hot(labels, CLASSES).to(latent.dtype)], 1)


class Discriminator(nn.Module):
    """Scores of images and labels, all layers with spectral norm.

    Args:
        data: ``digits`` or ``fashion``.
    """

    def __init__(self, data: str) -> None:
        super().__init__()
        self.flat = data == "digits"
        leak = nn.LeakyReLU(0.2)
        if self.flat:
            layers = [nn.Linear(64 + CLASSES, 128), leak, nn.Linear(128, 128), leak]
            layers += [nn.Linear(128, 1)]
        else:
            layers = [nn.Conv2d(1 + CLASSES, 32, 4, 2, 1), leak, nn.Conv2d(32, 64, 4, 2, 1), leak]
            layers += [nn.Flatten(), nn.Linear(64 * 7 * 7, 1)]
        has_weight = (nn.Linear, nn.Conv2d)
        self.net = nn.Sequential(
            *(spectral_norm(m) if type(m) in has_weight else m for m in layers)
        )

    def forward(self, images: Tensor, labels: Tensor) -> Tensor:
        """[N, 1]."""
        told = F.one_hot(labels, CLASSES).to(images.dtype)
        if not self.flat:
            told = told[:, :, None, None].expand(-1, -1, *images.shape[2:])
        return self.net(torch.cat([images, told], 1))


class Classifier(nn.Module):
    """Fixed judge: its features for the Frechet distance, its guesses for the label accuracy.

    Args:
        data: ``digits`` or ``fashion``.
    """

    def __init__(self, data: str) -> None:
        super().__init__()
        if data == "digits":
            layers = [nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 32), nn.ReLU()]
            features = 32
        else:
            layers = [nn.Conv2d(1, 16, 3, 2, 1), nn.ReLU(), nn.Conv2d(16, 32, 3, 2, 1), nn.ReLU()]
            layers += [nn.Flatten(), nn.Linear(32 * 7 * 7, 64), nn.ReLU()]
            features = 64
        self.features = nn.Sequential(*layers)
        self.last = nn.Linear(features, CLASSES)

    def forward(self, images: Tensor) -> Tensor:
        """Logits."""
        return self.last(self.features(images))


def weights_of(model: nn.Module) -> int:
    """Weights of all linear layers and convolutions, biases and batch norm not counted."""
    kinds = (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)
    return sum(m.weight.numel() for m in model.modules() if isinstance(m, kinds))


def small_generator(data: str, weights: int) -> Generator:
    """The widest generator that has at most so many weights."""
    width = WIDTH[data]
    while width > 1 and weights_of(Generator(data, width)) > weights:
        width -= 1
    return Generator(data, width)


def _linear_generator(inputs: int, width: int) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    for index, size in enumerate((inputs, width), start=1):
        layers[f"linear{index}"] = nn.Linear(size, width, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm1d(width)
        layers[f"relu{index}"] = nn.ReLU()
    layers["last"] = nn.Linear(width, 64)
    layers["tanh"] = nn.Tanh()
    return layers


def _conv_generator(inputs: int, width: int) -> OrderedDict[str, nn.Module]:
    layers: OrderedDict[str, nn.Module] = OrderedDict()
    layers["linear"] = nn.Linear(inputs, 4 * width * 49, bias=False)
    layers["maps"] = nn.Unflatten(1, (4 * width, 7, 7))
    layers["norm"] = nn.BatchNorm2d(4 * width)
    layers["relu"] = nn.ReLU()
    for index, channels in enumerate((4 * width, 2 * width), start=1):
        layers[f"up{index}"] = nn.ConvTranspose2d(channels, channels // 2, 4, 2, 1, bias=False)
        layers[f"norm{index}"] = nn.BatchNorm2d(channels // 2)
        layers[f"relu{index}"] = nn.ReLU()
    layers["last"] = nn.Conv2d(width, 1, 3, 1, 1)
    layers["tanh"] = nn.Tanh()
    return layers
