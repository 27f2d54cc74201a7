"""The four networks of :mod:`benchmarks.folding`, trained for a moment on this machine.

Weights of a fresh network are noise, in which no order is better than another: a few hundred steps
give rows and columns that differ.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tetris.data import load_digits

TEXTS = ("README.md", "HACKING.md", "LICENSE")


@dataclass(frozen=True)
class Trained:
    """A network and what it takes.

    Attributes:
        model: In eval mode.
        example: What it is called with.
        exclude: Layers that stay dense.
        loss: On what it was trained on, after the last step.
    """

    model: nn.Module
    example: object
    exclude: tuple[str, ...]
    loss: float


class ResidualCNN(nn.Module):
    """Two residual blocks, one with a grouped convolution, and a concatenation at the end."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.norm = nn.BatchNorm2d(width)
        self.a1, self.a2 = self._conv(width, width), self._conv(width, width)
        self.b1, self.b3 = self._conv(width, 2 * width, 1), self._conv(2 * width, width, 1)
        self.b2 = self._conv(2 * width, 2 * width, 3, groups=4)
        self.side = self._conv(width, width, 1)
        self.last = self._conv(2 * width, 2 * width, 1)
        self.head = nn.Linear(2 * width, 10)

    @staticmethod
    def _conv(inputs: int, outputs: int, kernel: int = 3, groups: int = 1) -> nn.Sequential:
        layer = nn.Conv2d(inputs, outputs, kernel, padding=kernel // 2, groups=groups, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(outputs))

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, 64] or [N, 1, 8, 8] to logits."""
        x = F.relu(self.norm(self.stem(x.view(-1, 1, 8, 8))))
        x = F.relu(x + self.a2(F.relu(self.a1(x))))
        y = F.relu(self.b2(F.relu(self.b1(x))))
        x = F.relu(x + self.b3(y))
        x = torch.cat([x, F.relu(self.side(F.avg_pool2d(x, 3, 1, 1)))], 1)
        return self.head(F.relu(self.last(x)).mean((2, 3)))


def mlp(steps: int) -> Trained:
    """Four linear layers with batch norm, on digits."""
    torch.manual_seed(0)
    sizes = (64, 256, 256, 128)
    layers: list[nn.Module] = []
    for inputs, outputs in zip(sizes, sizes[1:], strict=False):
        layers += [nn.Linear(inputs, outputs), nn.BatchNorm1d(outputs), nn.ReLU()]
    return _on_digits(nn.Sequential(*layers, nn.Linear(sizes[-1], 10)), steps, ("9",))


def cnn(steps: int) -> Trained:
    """A small residual network, on digits."""
    torch.manual_seed(0)
    return _on_digits(ResidualCNN(), steps, ("stem", "head"))


def bert(steps: int) -> Trained:
    """BERT with two layers of 128, on masked characters."""
    import transformers

    torch.manual_seed(0)
    text, size = _text()
    config = transformers.BertConfig(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    model = transformers.BertForMaskedLM(config)

    def loss() -> Tensor:
        ids = _lines(text, 16, 48)
        masked = torch.rand(ids.shape) < 0.2
        logits = model(input_ids=ids.masked_fill(masked, 0)).logits
        return F.cross_entropy(logits[masked], ids[masked])

    last = _train(model, loss, steps, 1e-3)
    return Trained(model, {"input_ids": _lines(text, 2, 48)}, ("*.decoder",), last)


def llama(steps: int) -> Trained:
    """Llama with two blocks of 128 and two heads of keys and values for four, on characters."""
    import transformers

    torch.manual_seed(0)
    text, size = _text()
    config = transformers.LlamaConfig(
        vocab_size=size,
        hidden_size=128,
        intermediate_size=352,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    model = transformers.LlamaForCausalLM(config)

    def loss() -> Tensor:
        ids = _lines(text, 16, 49)
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        return F.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten())

    last = _train(model, loss, steps, 1e-3)
    example = {"input_ids": _lines(text, 2, 48), "use_cache": False}
    return Trained(model, example, ("lm_head",), last)


MODELS: dict[str, Callable[[int], Trained]] = {
    "MLP": mlp,
    "residual CNN": cnn,
    "BERT": bert,
    "Llama": llama,
}
NEEDS_TRANSFORMERS = ("BERT", "Llama")


def _on_digits(model: nn.Module, steps: int, exclude: tuple[str, ...]) -> Trained:
    data = load_digits()

    def loss() -> Tensor:
        index = torch.randint(len(data.train_x), (64,))
        return F.cross_entropy(model(data.train_x[index]), data.train_y[index])

    last = _train(model, loss, steps, 2e-3)
    return Trained(model, data.test_x[:8], exclude, last)


def _train(model: nn.Module, loss: Callable[[], Tensor], steps: int, rate: float) -> float:
    """Adam with weight decay; the mean loss of the last tenth."""
    optimizer = torch.optim.AdamW(model.parameters(), rate, weight_decay=0.05)
    model.train()
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    model.eval()
    last = losses[-max(1, steps // 10) :]
    return sum(last) / len(last)


def _text() -> tuple[Tensor, int]:
    """The project's own text as numbers of characters, and how many there are; 0 is the mask."""
    folder = Path(__file__).parent.parent
    text = "".join((folder / name).read_text() for name in TEXTS)
    known = {c: i + 1 for i, c in enumerate(sorted({c for c in text if c.isascii()}))}
    return torch.tensor([known[c] for c in text if c in known]), len(known) + 1


def _lines(text: Tensor, count: int, length: int) -> Tensor:
    starts = torch.randint(len(text) - length, (count, 1))
    return text[starts + torch.arange(length)]
