"""Small models that every end-to-end test runs: `CASES[name]` is `(module factory, input factory)`.

The factories take no arguments and seed nothing: a test that needs equal weights calls `torch.manual_seed` first. Inputs are a
tuple, to be splatted. Every model returns tensors only, so that a test may sum its outputs into a loss.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class ResNetBlock(nn.Module):
    """A stem (conv, batch norm, ReLU, max-pool), one residual block, group norm and a classifier; x is [N, 3, H, W]."""

    def __init__(self, width: int = 8, classes: int = 10) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, width, 7, stride=2, padding=3, bias=False)
        self.stem_norm = nn.BatchNorm2d(width)
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm1 = nn.BatchNorm2d(width)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(width)
        self.group_norm = nn.GroupNorm(2, width)
        self.head = nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.stem_norm(self.stem(x)), inplace=True), 3, stride=2, padding=1)
        y = F.relu(self.norm1(self.conv1(x)))
        y = F.relu(self.norm2(self.conv2(y)) + x)
        y = F.hardswish(F.silu(self.group_norm(y)))
        return self.head(F.adaptive_avg_pool2d(y, 1).flatten(1))


class DigitsCNN(nn.Module):
    """The small classifier of the demo: conv+ReLU+max-pool twice, then a linear layer; x is [N, 1, 8, 8]."""

    def __init__(self, classes: int = 10) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 8, 3, padding=1)
        self.conv2 = nn.Conv2d(8, 16, 3, padding=1)
        self.head = nn.Linear(16 * 2 * 2, classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        return self.head(x.flatten(1))


class GPTBlock(nn.Module):
    """Embedding, one causal transformer block (pre-norm, tanh-GELU), RMS norm and a language-model head; tokens are [B, T]."""

    def __init__(self, width: int = 32, heads: int = 2, vocabulary: int = 50, context: int = 16, dropout: float = 0.0) -> None:
        super().__init__()
        self.heads = heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.position = nn.Parameter(torch.randn(context, width))
        self.norm1 = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.norm2 = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)
        self.norm3 = nn.RMSNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.dropout = nn.Dropout(dropout)

    def forward(self, tokens: Tensor) -> Tensor:
        batch, length = tokens.shape
        x = self.dropout(self.embedding(tokens) + self.position[:length])
        q, k, v = (t.view(batch, length, self.heads, -1).transpose(1, 2) for t in self.qkv(self.norm1(x)).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, length, -1))
        x = x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))
        return self.head(self.norm3(x))


class EncoderLayer(nn.Module):
    """`nn.TransformerEncoderLayer` with GELU, batch first, no dropout; x is [B, T, 32].

    The activation is a function of our own: with torch's, the whole layer is one fused operator in inference.
    """

    def __init__(self, width: int = 32) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(width, 2, 2 * width, 0.0, activation=_gelu, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def _gelu(x: Tensor) -> Tensor:
    return F.gelu(x)


class HandAttention(nn.Module):
    """Attention spelled with matmul, scale, softmax and matmul; x is [B, T, 32]."""

    def __init__(self, width: int = 32, heads: int = 2) -> None:
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v = (nn.Linear(width, width) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        q, k, v = (m(x).view(batch, length, self.heads, -1).transpose(1, 2) for m in (self.q, self.k, self.v))
        scores = q @ k.transpose(-2, -1) / math.sqrt(width // self.heads)
        return (torch.softmax(scores, dim=-1) @ v).transpose(1, 2).reshape(batch, length, width)


class LSTM(nn.Module):
    """Three steps of an LSTM cell; x is [B, 6]."""

    def __init__(self, width: int = 6) -> None:
        super().__init__()
        self.cell = nn.LSTMCell(width, width)

    def forward(self, x: Tensor) -> Tensor:
        h, c = self.cell(x)
        for _ in range(2):
            h, c = self.cell(x, (h, c))
        return h + c


class Upsampler(nn.Module):
    """Transposed convolutions with leaky ReLU; x is [N, 4, H, W]."""

    def __init__(self) -> None:
        super().__init__()
        self.up1 = nn.ConvTranspose2d(4, 6, 3, stride=2, padding=1, output_padding=1)
        self.up2 = nn.ConvTranspose2d(6, 2, 2, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.up2(F.leaky_relu(self.up1(x), 0.1)))


class Mutations(nn.Module):
    """In-place ops on views, a buffer that is updated, and a slice that is normalised; x is [B, 12]."""

    running: Tensor

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(8)
        self.register_buffer("running", torch.zeros(8))

    def forward(self, original: Tensor) -> Tensor:
        x = original.clone()
        view = x[:, :8]
        view.add_(self.norm(original[:, :8]))
        x[:, 0] += 1
        x.mul_(2)
        self.running.add_(view.mean(0).detach())
        return torch.softmax(x, dim=-1) * self.norm(view)[:, :1]


class DropoutMLP(nn.Module):
    """Linear, GELU, dropout, linear, log-softmax; x is [B, 16]."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 32)
        self.down = nn.Linear(32, 4)
        self.dropout = nn.Dropout(0.5)

    def forward(self, x: Tensor) -> Tensor:
        return F.log_softmax(self.down(self.dropout(F.gelu(self.up(x)))), dim=-1)


def _normal(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape),)


def _channels_last(*shape: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randn(*shape).to(memory_format=torch.channels_last),)


def _tokens(batch: int, length: int) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: (torch.randint(0, 50, (batch, length)),)


CASES: dict[str, tuple[Callable[[], nn.Module], Callable[[], tuple[Tensor, ...]]]] = {
    "resnet": (ResNetBlock, _normal(2, 3, 32, 32)),
    "resnet_channels_last": (ResNetBlock, _channels_last(2, 3, 32, 32)),
    "digits": (DigitsCNN, _normal(4, 1, 8, 8)),
    "gpt": (GPTBlock, _tokens(2, 16)),
    "encoder": (EncoderLayer, _normal(2, 8, 32)),
    "hand_attention": (HandAttention, _normal(2, 8, 32)),
    "lstm": (LSTM, _normal(4, 6)),
    "upsampler": (Upsampler, _normal(2, 4, 6, 6)),
    "mutations": (Mutations, _normal(4, 12)),
    "dropout": (DropoutMLP, _normal(8, 16)),
}
