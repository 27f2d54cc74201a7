"""The networks of the demo: what they are, how dense libraries run them, and how narrow ones match.

A hidden weight is one that pruning may remove: those of the first convolution and of the classifier
stay.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable

import torch
from torch import Tensor, nn

from ..fuse import fuse
from ..timing import prepacked_chain, prepacked_conv2d

Calls = dict[str, Callable[[], object]]
FORMATS = {"NCHW": torch.contiguous_format, "channels_last": torch.channels_last}


class Network(ABC):
    """A kind of network, of any width."""

    classifier: str
    """Name of the layer that stays dense."""

    @abstractmethod
    def inputs(self, flat: Tensor) -> Tensor:
        """What the network takes, of images [N, pixels]."""

    @abstractmethod
    def build(self, features: int, width: int, classes: int) -> nn.Module:
        """A network with fresh weights, for images of so many pixels."""

    @abstractmethod
    def hidden_weights(self, features: int, width: int) -> int:
        """Weights that may be pruned."""

    @abstractmethod
    def dense_calls(self, model: nn.Module, x: Tensor) -> Calls:
        """The ways torch has to run it without sparse layers; the fastest is the baseline."""

    @abstractmethod
    def sparse_calls(self, model: nn.Module, x: Tensor) -> Calls:
        """The ways to run it with sparse layers."""

    def narrow_width(self, features: int, width: int, sparsity: float) -> int:
        """Width of the dense network with as many hidden weights as a pruned one stores."""
        left = (1 - sparsity) * self.hidden_weights(features, width)
        return min(range(1, width + 1), key=lambda w: abs(self.hidden_weights(features, w) - left))


class Mlp(Network):
    """Two hidden layers."""

    classifier = "4"

    def inputs(self, flat: Tensor) -> Tensor:
        """The pixels as they are."""
        return flat

    def build(self, features: int, width: int, classes: int) -> nn.Sequential:
        """Pixels - width - width - classes."""
        return nn.Sequential(
            nn.Linear(features, width),
            nn.ReLU(),
            nn.Linear(width, width),
            nn.ReLU(),
            nn.Linear(width, classes),
        )

    def hidden_weights(self, features: int, width: int) -> int:
        """Of both hidden layers."""
        return features * width + width * width

    def dense_calls(self, model: nn.Module, x: Tensor) -> Calls:
        """``F.linear``, and oneDNN with packed weights and ReLU fused."""
        assert isinstance(model, nn.Sequential)
        calls: Calls = {"F.linear": lambda: model(x)}
        if packed := prepacked_chain(list(model), x):
            calls["oneDNN"] = lambda: packed(x)
        return calls

    def sparse_calls(self, model: nn.Module, x: Tensor) -> Calls:
        """With ReLU fused."""
        fused = fuse(model)
        return {"tetris": lambda: fused(x)}


class ResidualBlock(nn.Module):
    """``relu(norm(conv(relu(norm(conv(x))))) + shortcut(x))``, the basic block of a ResNet."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.shortcut: nn.Module = nn.Identity()
        if (inputs, stride) != (outputs, 1):
            self.shortcut = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride, bias=False), nn.BatchNorm2d(outputs)
            )
        self.relu = nn.ReLU()

    def forward(self, x: Tensor) -> Tensor:
        """[N, inputs, H, W] to [N, outputs, ceil(H / stride), ceil(W / stride)]."""
        return self.relu(self.body(x) + self.shortcut(x))


class ResidualNet(nn.Module):
    """A first convolution, three residual blocks of one, two and four widths, a classifier."""

    def __init__(self, width: int, classes: int, stride: int) -> None:
        super().__init__()
        self.stem = nn.Sequential(
            nn.Conv2d(1, width, 3, stride, 1, bias=False), nn.BatchNorm2d(width), nn.ReLU()
        )
        self.blocks = nn.Sequential(
            ResidualBlock(width, width, 1),
            ResidualBlock(width, 2 * width, 2),
            ResidualBlock(2 * width, 4 * width, 2),
        )
        self.classifier = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        """[N, 1, H, W] to [N, classes]."""
        return self.classifier(self.blocks(self.stem(x)).mean((2, 3)))


class Cnn(Network):
    """A small residual network with batch norm."""

    classifier = "classifier"

    def inputs(self, flat: Tensor) -> Tensor:
        """Square images [N, 1, H, H]."""
        size = round(flat.shape[1] ** 0.5)
        return flat.view(-1, 1, size, size)

    def build(self, features: int, width: int, classes: int) -> ResidualNet:
        """Maps of 14, 7 and 4 pixels a side for 28, of 8, 4 and 2 for 8."""
        return ResidualNet(width, classes, stride=2 if features >= 256 else 1)

    def hidden_weights(self, features: int, width: int) -> int:
        """Of the three blocks."""
        three = (1 + 1) + (2 + 4) + (8 + 16)  # products of widths, 3x3
        return (9 * three + 2 + 8) * width**2

    def dense_calls(self, model: nn.Module, x: Tensor) -> Calls:
        """``F.conv2d``, and oneDNN with packed weights, batch norm folded, both formats."""
        assert isinstance(model, ResidualNet)
        calls: Calls = {}
        for name, memory_format in FORMATS.items():
            image = x.contiguous(memory_format=memory_format)
            folded = fuse(model).to(memory_format=memory_format)  # type: ignore[call-overload]
            calls[f"F.conv2d {name}"] = lambda folded=folded, image=image: folded(image)
            if packed := _prepacked_cnn(folded, image):
                calls[f"oneDNN {name}"] = lambda packed=packed, image=image: packed(image)
        return calls

    def sparse_calls(self, model: nn.Module, x: Tensor) -> Calls:
        """Batch norm folded, activations and residuals fused, both formats."""
        calls: Calls = {}
        for name, memory_format in FORMATS.items():
            image = x.contiguous(memory_format=memory_format)
            fused = fuse(model).to(memory_format=memory_format)  # type: ignore[call-overload]
            calls[f"tetris {name}"] = lambda fused=fused, image=image: fused(image)
        return calls


def _prepacked_cnn(folded: nn.Module, x: Tensor) -> Callable[[Tensor], Tensor] | None:
    """A residual network without batch norm on oneDNN, ReLU and residuals fused."""
    sizes: dict[str, torch.Size] = {}
    convs = {n: m for n, m in folded.named_modules() if isinstance(m, nn.Conv2d)}

    def note(name: str):
        return lambda _, args: sizes.__setitem__(name, args[0].shape)

    hooks = [conv.register_forward_pre_hook(note(name)) for name, conv in convs.items()]
    folded(x)
    for hook in hooks:
        hook.remove()

    def pack(name: str, activation: str = "relu") -> Callable[..., Tensor] | None:
        conv = convs.get(name)
        return None if conv is None else prepacked_conv2d(conv, sizes[name], activation)

    stem = pack("stem.0")
    if stem is None:
        return None
    blocks = [
        (
            pack(f"blocks.{i}.body.0"),
            pack(f"blocks.{i}.body.3"),
            pack(f"blocks.{i}.shortcut.0", "none"),
        )
        for i in range(3)
    ]
    classifier = folded.get_submodule("classifier")

    def call(x: Tensor) -> Tensor:
        x = stem(x)
        for first, second, shortcut in blocks:
            assert first is not None
            assert second is not None
            x = second(first(x), x if shortcut is None else shortcut(x))
        return classifier(x.mean((2, 3)))

    return call


NETWORKS: dict[str, Network] = {"mlp": Mlp(), "cnn": Cnn()}
