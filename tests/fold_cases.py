"""Small networks that tie channels in different ways, and the orders that they leave free."""

import math

import torch
from torch import nn
from torch.nn import functional as F


class Lambda(nn.Module):
    """A function between modules."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)


class Residual(nn.Module):
    """A stream of 16 channels, a grouped and a depthwise convolution, and a concatenation."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.a1, self.a2 = nn.Conv2d(16, 32, 1), nn.Conv2d(32, 16, 1)
        self.grouped = nn.Conv2d(32, 32, 3, padding=1, groups=2, bias=False)
        self.inner = nn.BatchNorm2d(32)
        self.b1 = nn.Conv2d(16, 24, 1)
        self.depthwise = nn.Conv2d(24, 24, 3, padding=1, groups=24)
        self.b2 = nn.Conv2d(24, 8, 1)
        self.head = nn.Linear(16 + 8, 10)

    def forward(self, x):
        x = F.relu(self.norm(self.stem(x)))
        y = F.relu(self.inner(self.grouped(F.relu(self.a1(x)))))
        x = x + self.a2(y)
        y = self.b2(F.silu(self.depthwise(self.b1(x))))
        return self.head(torch.cat([x, F.max_pool2d(F.relu(y), 1)], 1).mean((2, 3)))


class Attention(nn.Module):
    """Queries, keys and values of 4 heads of 8 on a stream of 32, with ``kv`` heads of keys."""

    def __init__(self, kv=4, way="sdpa"):
        super().__init__()
        self.kv, self.way = kv, way
        self.embed, self.head = nn.Linear(6, 32), nn.Linear(32, 5)
        self.norm = nn.LayerNorm(32)
        self.q, self.k, self.v = nn.Linear(32, 32), nn.Linear(32, 8 * kv), nn.Linear(32, 8 * kv)
        self.o = nn.Linear(32, 32, bias=False)

    def forward(self, x):
        x = self.embed(x)
        n, t, _ = x.shape
        y = self.norm(x)
        q = self.q(y).view(n, t, 4, 8).transpose(1, 2)
        k, v = (f(y).view(n, t, self.kv, 8).transpose(1, 2) for f in (self.k, self.v))
        if self.way == "gqa":
            y = F.scaled_dot_product_attention(q, k, v, enable_gqa=True)
        else:
            k, v = (z.repeat_interleave(4 // self.kv, 1) for z in (k, v))
            if self.way == "sdpa":
                y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            else:
                y = (q @ k.transpose(-1, -2) / math.sqrt(8)).softmax(-1) @ v
        return self.head(x + self.o(y.transpose(1, 2).reshape(n, t, 32)))


class Fused(nn.Module):
    """Gate and value in one matrix, which is cut in two."""

    def __init__(self):
        super().__init__()
        self.up, self.down = nn.Linear(6, 40), nn.Linear(20, 5)

    def forward(self, x):
        gate, value = self.up(x).chunk(2, -1)
        return self.down(F.silu(gate) * value)


class Shuffle(nn.Module):
    """ShuffleNet's shuffle: channels of two groups, one of each in turn."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (
            nn.Conv2d(3, 12, 1),
            nn.Conv2d(12, 12, 1, groups=2),
            nn.Conv2d(12, 4, 1),
        )

    def forward(self, x):
        x = self.a(x)
        x = x.view(x.size(0), 2, 6, *x.shape[2:]).transpose(1, 2).flatten(1, 2)
        return self.c(self.b(x))


class Mixer(nn.Module):
    """Patches, mixed along tokens and along channels."""

    def __init__(self):
        super().__init__()
        self.patch = nn.Conv2d(3, 16, 2, 2)
        self.norm, self.tokens = nn.LayerNorm(16), nn.Linear(9, 9)
        self.up, self.down, self.head = nn.Linear(16, 24), nn.Linear(24, 16), nn.Linear(16, 4)

    def forward(self, x):
        x = self.patch(x).flatten(2).transpose(1, 2)
        x = x + self.tokens(self.norm(x).transpose(1, 2)).transpose(1, 2)
        return self.head((x + self.down(F.gelu(self.up(x)))).mean(1))


class Positions(nn.Module):
    """Tokens, a class token and positions, all of them parameters."""

    def __init__(self):
        super().__init__()
        self.tokens, self.head = nn.Embedding(11, 16), nn.Linear(16, 4)
        self.first, self.place = (
            nn.Parameter(torch.randn(1, 1, 16)),
            nn.Parameter(torch.randn(9, 16)),
        )
        self.norm = nn.RMSNorm(16)

    def forward(self, ids):
        x = self.tokens(ids)
        x = torch.cat([self.first.expand(x.size(0), -1, -1), x], 1) + self.place[: x.size(1) + 1]
        return self.head(self.norm(x)[:, 0])


class Twice(nn.Module):
    """One layer that is called twice: its inputs and outputs are the same channels."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 4)

    def forward(self, x):
        return self.c(self.b(torch.relu(self.b(torch.relu(self.a(x))))))


class Gate(nn.Module):
    """Squeeze and excitation, and one channel that scales all others."""

    def __init__(self):
        super().__init__()
        self.a, self.c = nn.Conv2d(3, 16, 1), nn.Conv2d(16, 4, 1)
        self.squeeze, self.excite, self.one = (
            nn.Linear(16, 8),
            nn.Linear(8, 16),
            nn.Conv2d(16, 1, 1),
        )

    def forward(self, x):
        x = self.a(x)
        y = self.excite(F.relu(self.squeeze(x.mean((2, 3)))))
        return self.c(x * y.sigmoid()[:, :, None, None] * self.one(x))


class Transposed(nn.Module):
    """Down and up again, and a norm over groups of channels."""

    def __init__(self):
        super().__init__()
        self.down, self.up = nn.Conv2d(3, 16, 2, 2), nn.ConvTranspose2d(16, 12, 2, 2)
        self.norm, self.act, self.out = nn.GroupNorm(4, 16), nn.PReLU(12), nn.Conv2d(12, 3, 1)

    def forward(self, x):
        return self.out(self.act(self.up(self.norm(self.down(x)))))


class Rotary(nn.Module):
    """Queries and keys that are turned by their position; values are not."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v, self.o = (nn.Linear(16, 16) for _ in range(4))
        self.embed, self.head = nn.Linear(6, 16), nn.Linear(16, 3)

    def forward(self, x):
        x = self.embed(x)
        n, t, _ = x.shape
        q, k, v = (f(x).view(n, t, 2, 8).transpose(1, 2) for f in (self.q, self.k, self.v))
        angle = torch.arange(t)[:, None] * torch.tensor([1.0, 0.1, 0.01, 0.001]).repeat(2)
        q, k = (
            z * angle.cos() + torch.cat([-z[..., 4:], z[..., :4]], -1) * angle.sin() for z in (q, k)
        )
        y = F.scaled_dot_product_attention(q, k, v)
        return self.head(x + self.o(y.transpose(1, 2).flatten(2)))


class Recurrent(nn.Module):
    """An LSTM, which nothing is known of, between linear layers."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.rnn = nn.LSTM(8, 8, batch_first=True)

    def forward(self, x):
        x = self.rnn(self.b(torch.relu(self.a(x))))[0]
        return self.d(torch.relu(self.c(x)))


class Single(nn.Module):
    """Convolutions of one image, without an axis of images."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 16, 3, padding=1), nn.Conv2d(16, 12, 1)
        self.depthwise, self.head = nn.Conv2d(12, 12, 3, groups=12), nn.Linear(12, 4)

    def forward(self, x):
        x = self.depthwise(self.b(F.relu(self.a(x))))
        return self.head(F.relu(x).mean((1, 2)))


class RawValues(nn.Module):
    """Attention to the input itself, and by the input itself."""

    def __init__(self):
        super().__init__()
        self.q, self.k, self.v = nn.Linear(6, 8), nn.Linear(6, 8), nn.Linear(6, 16)
        self.a, self.b = nn.Linear(6, 4), nn.Linear(16, 4)

    def forward(self, x):
        a = self.a(F.scaled_dot_product_attention(self.q(x), self.k(x), x))
        return a + self.b(F.scaled_dot_product_attention(x, x, self.v(x)))


class ShuffledSum(nn.Module):
    """Channels added to a shuffle of themselves: 1, 2, 4 and 3, 5, 6 go round in circles."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv1d(6, 8, 1), nn.Conv1d(8, 4, 1)

    def forward(self, x):
        x = self.a(x)
        y = x.view(x.size(0), 2, 4, -1).transpose(1, 2).flatten(1, 2)
        return self.b(torch.relu(x + y))


class Biased(nn.Module):
    """Attention with a bias for each head and distance, as in T5 and Swin, and a gated layer."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(6, 32), nn.Linear(20, 3)
        self.qkv, self.o, self.glu = nn.Linear(32, 96), nn.Linear(32, 32), nn.Linear(32, 40)
        self.table = nn.Embedding(9, 4)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = self.qkv(x).view(-1, 5, 3, 4, 8).permute(2, 0, 3, 1, 4).unbind()
        place = torch.arange(5)
        bias = self.table(place[:, None] - place + 4).permute(2, 0, 1)
        y = (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v
        x = x + self.o(y.transpose(1, 2).flatten(2))
        return self.head(torch.maximum(F.glu(self.glu(x)), x.new_zeros(1)))


class AcrossTokens(nn.Module):
    """A layer norm over tokens, for each channel alike."""

    def __init__(self):
        super().__init__()
        self.a, self.norm, self.b = nn.Linear(6, 16), nn.LayerNorm(5), nn.Linear(16, 3)

    def forward(self, x):
        return self.b(self.norm(self.a(x).transpose(1, 2)).transpose(1, 2))


def mlp():
    """Three linear layers, batch norm and dropout between them."""
    return nn.Sequential(
        nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(inplace=True), nn.Dropout(),
        nn.Linear(32, 24), nn.GELU(), nn.Linear(24, 10),
    )  # fmt: skip


def flat():
    """Maps of 2 x 2 that are flattened."""
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1, padding_mode="circular"), nn.AdaptiveAvgPool2d(2),
        nn.Flatten(), nn.Linear(32, 5),
    )  # fmt: skip


def scaled():
    """A convolution whose output every element has a factor of its own."""
    return nn.Sequential(nn.Conv1d(6, 8, 1), nn.LayerNorm([8, 5]), nn.Conv1d(8, 3, 1))


IMAGE = (2, 3, 6, 6)
#: name -> how to make it, shape of its input, sizes of the orders that are free.
ZOO = {
    "mlp": (mlp, (4, 12), [32, 24]),
    "residual": (Residual, IMAGE, [16, 16, 16, 16, 16, 24, 8]),
    "attention": (Attention, (2, 7, 6), [32] + [8] * 8),
    "attention matmul": (lambda: Attention(way="matmul"), (2, 7, 6), [32] + [8] * 8),
    "grouped heads": (lambda: Attention(kv=2), (2, 7, 6), [32] + [8] * 4),
    "grouped heads in one call": (lambda: Attention(kv=2, way="gqa"), (2, 7, 6), [32] + [8] * 4),
    "one head of keys": (lambda: Attention(kv=1, way="matmul"), (2, 7, 6), [32, 8, 8]),
    "encoder layer": (
        lambda: nn.Sequential(
            nn.Linear(6, 32),
            nn.TransformerEncoderLayer(32, 4, 48, batch_first=True),
            nn.Linear(32, 3),
        ),
        (2, 5, 6),
        [32] + [8] * 8 + [48],
    ),
    "fused": (Fused, (4, 6), [20]),
    "shuffle": (Shuffle, IMAGE, [6, 6, 6, 6]),
    "mixer": (Mixer, IMAGE, [16, 24]),
    "positions": (Positions, (2, 7), [16]),
    "twice": (Twice, (4, 6), [16]),
    "gate": (Gate, IMAGE, [16, 8]),
    "transposed": (Transposed, IMAGE, [4, 4, 4, 4, 12]),
    "rotary": (Rotary, (2, 5, 6), [16, 8, 8]),
    "recurrent": (Recurrent, (2, 5, 8), [8, 8]),
    "flat": (flat, IMAGE, [8]),
    "single": (Single, IMAGE[1:], [16, 12]),
    "raw values": (RawValues, (2, 5, 6), [8, 16]),
    "shuffled sum": (ShuffledSum, (2, 6, 3), [2]),
    "biased": (Biased, (2, 5, 6), [32, 20] + [8] * 8),
    "across tokens": (AcrossTokens, (2, 5, 6), [16]),
    "scaled": (scaled, (2, 6, 5), [8]),
}


def make(name):
    """A network of the zoo in eval mode, no two of its channels alike, and an input."""
    torch.manual_seed(0)
    function, shape, _ = ZOO[name]
    model = function()
    if name == "positions":
        x = torch.randint(0, 11, shape)
    else:
        x = torch.randn(shape)
    for tensor in model.state_dict().values():
        if tensor.dim() == 1 or (tensor.dim() and tensor.std() == 0):  # biases and norms
            tensor.uniform_(0.5, 1.5)
    return model.eval(), x
