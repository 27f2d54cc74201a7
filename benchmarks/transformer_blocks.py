"""Layers of BERT-base and of Llama 7B with random weights, for input [batch, tokens, hidden].

Written here so that dense, compiled and sparse models are the same few lines, without caches and
masks that a library adds. Shapes, norms and activations are those of the papers: Devlin et al.
2019, Touvron et al. 2023. Weights are drawn so that activations stay near 1; accuracy means
nothing.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Attention among the tokens of a sequence, with keys and values of earlier ones.

    Args:
        hidden: Channels.
        heads: Heads.
        causal: Tokens see earlier ones only, at positions that rotate queries and keys.
    """

    def __init__(self, hidden: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (
            nn.Linear(hidden, hidden, bias=not causal) for _ in range(4)
        )
        self.past: tuple[Tensor, Tensor] | None = None  # keys and values [batch, heads, n, size]

    def remember(self, batch: int, tokens: int) -> None:
        """Have keys and values of so many earlier tokens; none if 0."""
        size = self.query.in_features // self.heads
        shape = (batch, self.heads, tokens, size)
        self.past = (torch.randn(shape), torch.randn(shape)) if tokens else None

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, hidden] to the same."""
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        before = 0 if self.past is None else self.past[0].shape[2]
        if self.causal:
            q, k = rotated(q, before), rotated(k, before)
        if self.past is not None:
            k, v = torch.cat((self.past[0], k), 2), torch.cat((self.past[1], v), 2)
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal and before == 0)
        return self.out(mixed.transpose(1, 2).flatten(2))


def rotated(x: Tensor, first: int) -> Tensor:
    """Queries or keys [batch, heads, tokens, size], rotated by positions from ``first`` on."""
    tokens, half = x.shape[2], x.shape[3] // 2
    frequencies = 1e4 ** (-torch.arange(half) / half)
    angles = torch.arange(first, first + tokens)[:, None] * frequencies
    a, b = x.split(half, -1)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat((a * cos - b * sin, b * cos + a * sin), -1)


class Mlp(nn.Module):
    """``down(gelu(up(x)))``."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.up, self.act, self.down = nn.Linear(hidden, inner), nn.GELU(), nn.Linear(inner, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        return self.down(self.act(self.up(x)))


class GatedMlp(nn.Module):
    """``down(silu(gate(x)) * up(x))``."""

    def __init__(self, hidden: int, inner: int) -> None:
        super().__init__()
        self.gate, self.up = (nn.Linear(hidden, inner, bias=False) for _ in range(2))
        self.act, self.down = nn.SiLU(), nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """[..., hidden] to the same."""
        return self.down(self.act(self.gate(x)) * self.up(x))


class BertLayer(nn.Module):
    """Norms behind the sums."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(768, 12, causal=False), Mlp(768, 3072)
        self.norms = nn.ModuleList(nn.LayerNorm(768) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 768] to the same."""
        x = self.norms[0](x + self.attention(x))
        return self.norms[1](x + self.mlp(x))


class LlamaLayer(nn.Module):
    """Norms before the layers."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = Attention(4096, 32, causal=True), GatedMlp(4096, 11008)
        self.norms = nn.ModuleList(nn.RMSNorm(4096) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        """[batch, tokens, 4096] to the same."""
        x = x + self.attention(self.norms[0](x))
        return x + self.mlp(self.norms[1](x))


@dataclass(frozen=True)
class Model:
    """Layers behind each other, and what they are measured with.

    Attributes:
        layer: Makes one.
        depth: How many.
        hidden: Channels of the input.
        cases: (batch, tokens, earlier tokens) of inputs.
    """

    layer: Callable[[], nn.Module]
    depth: int
    hidden: int
    cases: tuple[tuple[int, int, int], ...]

    @torch.no_grad()
    def build(self) -> nn.Sequential:
        """The model in eval mode."""
        model = nn.Sequential(*(self.layer() for _ in range(self.depth)))
        generator = torch.Generator().manual_seed(0)
        for module in model.modules():
            if isinstance(module, nn.Linear):
                scale = 1 / math.sqrt(module.in_features)
                module.weight.normal_(0, scale, generator=generator)
        return model.eval().requires_grad_(False)


MODELS = {
    "BERT-base": Model(BertLayer, 12, 768, ((1, 128, 0), (8, 128, 0))),
    "Llama 7B, one layer": Model(LlamaLayer, 1, 4096, ((1, 128, 0), (1, 1, 128))),
}
PARTS = ("attention", "mlp", "whole")


def part_of(model: nn.Sequential, name: str) -> nn.Module:
    """The attentions of all layers behind each other, or the MLPs, or the whole model."""
    if name == "whole":
        return model
    return nn.Sequential(*(getattr(layer, name) for layer in model)).eval()
