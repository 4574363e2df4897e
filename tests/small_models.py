"""Small versions of the architectures of `benchmarks/models.py` that `zoo` has no relative of: `CASES`, made as there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class AlexNetSmall(nn.Module):
    """Convolution + ReLU + max-pool with a large stride, then dense layers with dropout; x is [N, 3, 35, 35]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 8, 11, 4, 2), nn.Conv2d(8, 12, 5, padding=2)
        self.dropout, self.dense, self.head = nn.Dropout(0.0), nn.Linear(12, 16), nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x), inplace=True), 3, 2)
        x = F.max_pool2d(F.relu(self.conv2(x), inplace=True), 3, 2)
        return self.head(F.relu(self.dense(self.dropout(x.flatten(1)))))


class MobileNetSmall(nn.Module):
    """An inverted residual: expand, depthwise, squeeze and excite, project, with batch norm and hard-swish; x is [N, 8, H, W]."""

    def __init__(self, width: int = 8, inner: int = 16) -> None:
        super().__init__()
        self.expand, self.norm1 = nn.Conv2d(width, inner, 1, bias=False), nn.BatchNorm2d(inner)
        self.depthwise = nn.Conv2d(inner, inner, 3, padding=1, groups=inner, bias=False)
        self.norm2 = nn.BatchNorm2d(inner)
        self.squeeze, self.excite = nn.Conv2d(inner, 8, 1), nn.Conv2d(8, inner, 1)
        self.project, self.norm3 = nn.Conv2d(inner, width, 1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        y = F.hardswish(self.norm1(self.expand(x)))
        y = F.hardswish(self.norm2(self.depthwise(y)))
        scale = self.excite(F.relu(self.squeeze(F.adaptive_avg_pool2d(y, 1))))
        return x + self.norm3(self.project(y * F.hardsigmoid(scale)))


class ConvNeXtSmall(nn.Module):
    """One block: depthwise 7x7, layer norm over channels that come last, two linear layers with GELU; x is [N, 8, H, W]."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.depthwise, self.norm = nn.Conv2d(width, width, 7, padding=3, groups=width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.scale = nn.Parameter(torch.full((width,), 0.5))

    def forward(self, x: Tensor) -> Tensor:
        y = self.norm(self.depthwise(x).permute(0, 2, 3, 1))
        return x + (self.scale * self.down(F.gelu(self.up(y)))).permute(0, 3, 1, 2)


class SwinSmall(nn.Module):
    """Shifted windows with a relative position bias, then an MLP; x is [N, 8, 8, 16], channels last."""

    def __init__(self, width: int = 16, heads: int = 2, window: int = 4) -> None:
        super().__init__()
        self.heads, self.window = heads, window
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.bias = nn.Parameter(torch.randn(heads, window**2, window**2))
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        (n, h, w, c), s = x.shape, self.window
        y = torch.roll(self.norm1(x), (-s // 2, -s // 2), (1, 2))
        y = y.view(n, h // s, s, w // s, s, c).transpose(2, 3).reshape(-1, s * s, c)
        q, k, v = (t.view(-1, s * s, self.heads, c // self.heads).transpose(1, 2) for t in self.qkv(y).chunk(3, dim=-1))
        y = torch.softmax(q * (c // self.heads) ** -0.5 @ k.transpose(-2, -1) + self.bias, dim=-1) @ v
        y = self.out(y.transpose(1, 2).reshape(-1, s * s, c))
        y = y.view(n, h // s, w // s, s, s, c).transpose(2, 3).reshape(n, h, w, c)
        x = x + torch.roll(y, (s // 2, s // 2), (1, 2))
        return x + self.down(F.gelu(self.up(self.norm2(x))))


class MixerSmall(nn.Module):
    """Patches, a token-mixing and a channel-mixing MLP, the mean of the tokens; x is [N, 3, 16, 16]."""

    def __init__(self, width: int = 16, tokens: int = 16) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, width, 4, stride=4)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.mix = nn.Sequential(nn.Linear(tokens, 32), nn.GELU(), nn.Linear(32, tokens))
        self.mlp = nn.Sequential(nn.Linear(width, 32), nn.GELU(), nn.Linear(32, width))

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = x + self.mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return self.norm3(x + self.mlp(self.norm2(x))).mean(1)


class LlamaSmall(nn.Module):
    """RMS norm, rotary positions, grouped-query causal attention and SwiGLU; tokens are [B, T]."""

    def __init__(self, width: int = 32, heads: int = 4, groups: int = 2, vocabulary: int = 50) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups, width // heads
        self.embedding = nn.Embedding(vocabulary, width)
        self.norm1, self.norm2, self.norm3 = (nn.RMSNorm(width, eps=1e-6) for _ in range(3))
        self.q, self.out = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = (nn.Linear(width, groups * self.size, bias=False) for _ in range(2))
        self.gate, self.up = (nn.Linear(width, 2 * width, bias=False) for _ in range(2))
        self.down, self.head = nn.Linear(2 * width, width, bias=False), nn.Linear(width, vocabulary, bias=False)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens)
        y = self.norm1(x)
        q, k, v = (m(y).unflatten(-1, (-1, self.size)).transpose(1, 2) for m in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(_rotary(q), _rotary(k), v, is_causal=True, enable_gqa=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        y = self.norm2(x)
        return self.head(self.norm3(x + self.down(F.silu(self.gate(y)) * self.up(y))))


def _rotary(x: Tensor) -> Tensor:
    """Rotate the halves of the last dimension by the position; x is [B, heads, T, size]."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2], device=x.device)[:, None] / 10000 ** (torch.arange(half, device=x.device) / half)
    first, second, cos, sin = x[..., :half], x[..., half:], angle.cos().to(x.dtype), angle.sin().to(x.dtype)
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


CASES = {
    "alexnet_small": (AlexNetSmall, lambda: (torch.randn(2, 3, 35, 35),)),
    "mobilenet_small": (MobileNetSmall, lambda: (torch.randn(2, 8, 6, 6),)),
    "convnext_small": (ConvNeXtSmall, lambda: (torch.randn(2, 8, 8, 8),)),
    "swin_small": (SwinSmall, lambda: (torch.randn(2, 8, 8, 16),)),
    "mixer_small": (MixerSmall, lambda: (torch.randn(2, 3, 16, 16),)),
    "llama_small": (LlamaSmall, lambda: (torch.randint(0, 50, (2, 8)),)),
}
