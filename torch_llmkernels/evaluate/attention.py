"""Scaled dot-product attention by its formula, in any precision: what the fused operators compute (Vaswani et al., 2017).

Used where the fused operators have no float64 kernel, and to make their `out` and `logsumexp` for backward tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch

CHUNK_ELEMENTS = 1 << 28
"""Scores held at once; larger problems go batch by batch."""


def attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None = None, causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """`softmax(query @ key.T * scale + mask) @ value` and the logarithm of the softmax's denominator.

    Args:
        query: [batch, heads, L, E].
        key, value: [batch, kv_heads, S, E]; kv_heads divides heads.
        mask: Boolean (True: visible) or additive, broadcastable to [batch, heads, L, S].
        causal: Query i sees keys 0 to i.
        scale: Default 1 / sqrt(E).

    Returns:
        [batch, heads, L, E] and [batch, heads, L].
    """
    batch, heads, rows, _ = query.shape
    if batch > 1 and batch * heads * rows * key.shape[2] > CHUNK_ELEMENTS:
        one = [slice(i, i + 1) for i in range(batch)]
        parts = [attention(query[i], key[i], value[i], _slice(mask, i), causal, scale) for i in one]
        return torch.cat([p[0] for p in parts]), torch.cat([p[1] for p in parts])
    scores = _scores(query, _repeat(key, query), mask, causal, scale)
    lse = torch.logsumexp(scores, -1)
    return torch.softmax(scores, -1) @ _repeat(value, query), lse


def attention_backward(
    grad: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, out: torch.Tensor, lse: torch.Tensor,
    mask: torch.Tensor | None = None, causal: bool = False, scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:  # fmt: skip
    """Gradients of query, key, value and additive mask, from the forward's own `out` and `lse` [batch, heads, L].

    Dao et al., 2022, algorithm 4. Where `heads` are more than `kv_heads`, the gradients of a group of heads add up.
    """
    batch, heads, rows, _ = query.shape
    if batch > 1 and batch * heads * rows * key.shape[2] > CHUNK_ELEMENTS:
        one = [slice(i, i + 1) for i in range(batch)]
        tensors = (grad, query, key, value, out, lse)
        parts = [attention_backward(*(t[i] for t in tensors), _slice(mask, i), causal, scale) for i in one]
        grad_q, grad_k, grad_v, grad_mask = (torch.cat(made) for made in zip(*parts, strict=True))
        return grad_q, grad_k, grad_v, grad_mask
    factor = 1 / math.sqrt(query.shape[-1]) if scale is None else scale
    keys, values = _repeat(key, query), _repeat(value, query)
    probabilities = torch.exp(_scores(query, keys, mask, causal, scale) - lse.unsqueeze(-1))
    grad_scores = probabilities * (grad @ values.mT - (grad * out).sum(-1, keepdim=True))
    grad_keys, grad_values = grad_scores.mT @ query * factor, probabilities.mT @ grad
    return grad_scores @ keys * factor, _summed(grad_keys, key), _summed(grad_values, value), grad_scores


def _scores(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor | None, causal: bool, scale: float | None) -> torch.Tensor:
    scores = query @ key.mT * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, float("-inf"))
    if mask is None:
        return scores
    return scores.masked_fill(~mask, float("-inf")) if mask.dtype is torch.bool else scores + mask


def _repeat(kv: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    groups = query.shape[1] // kv.shape[1]
    return kv if groups == 1 else kv.repeat_interleave(groups, 1)


def _summed(grad: torch.Tensor, kv: torch.Tensor) -> torch.Tensor:
    """[batch, heads, S, E] -> [batch, kv_heads, S, E]: the reverse of `_repeat`."""
    return grad if grad.shape[1] == kv.shape[1] else grad.unflatten(1, (kv.shape[1], -1)).sum(2)


def _slice(mask: torch.Tensor | None, index: slice) -> torch.Tensor | None:
    return mask if mask is None or mask.ndim < 4 or mask.shape[0] == 1 else mask[index]


def _forward(a: Mapping[str, Any]) -> tuple[Any, ...]:
    mask = a.get("attn_mask", a.get("attn_bias"))
    out, lse = attention(a["query"], a["key"], a["value"], mask, bool(a.get("is_causal", False)), a.get("scale"))
    return (out, lse, *[None] * 7)


def _forward_padded(a: Mapping[str, Any]) -> tuple[Any, ...]:
    """The memory-efficient kernels round the rows of logsumexp up to 32, with +Inf."""
    out, lse, *rest = _forward(a)
    return (out, torch.nn.functional.pad(lse, (0, -lse.shape[-1] % 32), value=float("inf")), *rest)


def _forward_column(a: Mapping[str, Any]) -> tuple[Any, ...]:
    out, lse, *rest = _forward(a)
    return (out, lse.unsqueeze(-1), *rest)


def _backward(a: Mapping[str, Any]) -> tuple[torch.Tensor, ...]:
    grad = a["grad_out"] if "grad_out" in a else a["grad_out_"]
    query = a["query"]
    lse = a["logsumexp"].reshape(*query.shape[:2], -1)[..., : query.shape[2]]
    mask = a.get("attn_mask", a.get("attn_bias"))
    return attention_backward(
        grad, query, a["key"], a["value"], a["out"], lse, mask, bool(a.get("is_causal", False)), a.get("scale")
    )


FUSED: tuple[tuple[str, Callable[[Mapping[str, Any]], tuple[Any, ...]]], ...] = (
    ("_scaled_dot_product_flash_attention", _forward),
    ("_scaled_dot_product_flash_attention_for_cpu", _forward),
    ("_scaled_dot_product_efficient_attention", _forward_padded),
    ("_scaled_dot_product_cudnn_attention", _forward_column),
    ("_scaled_dot_product_flash_attention_backward", _backward),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", _backward),
    ("_scaled_dot_product_efficient_attention_backward", _backward),
    ("_scaled_dot_product_cudnn_attention_backward", _backward),
)
"""ATen operators by name: a function of their arguments (by schema name) with their results, `None` for random states."""
