"""The formulas in prompts compute what the operators compute, and every backward operator that has a pattern has one."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from torch_llmkernels.graph import patterns
from torch_llmkernels.program import operator_of
from torch_llmkernels.search.formulas import FORMULAS


def formula(op: str) -> Callable[..., Any]:
    names: dict[str, Any] = {"torch": torch, "F": F}
    exec(FORMULAS[op], names)
    return next(v for k, v in names.items() if k in FORMULAS[op].split("(")[0])


def rand(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64, generator=torch.Generator().manual_seed(sum(shape)))


IMAGE, ROWS = (2, 6, 5, 4), (3, 4, 7)
TARGET = torch.tensor([1, 0, -100, 4])
STATS = (rand(3, 4, 1), rand(3, 4, 1).abs())
GROUPS = (rand(2, 3), rand(2, 3).abs())
POOL = ([3, 3], [2, 2], [1, 1], [1, 1], False)
CONV = ([4], [2, 1], [1, 0], [1, 2], False, [0, 0], 1, [True] * 3)
INDICES = F.max_pool2d(rand(*IMAGE), *POOL, return_indices=True)[1]

CALLS: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
    ("native_layer_norm", (rand(*ROWS), [4, 7], rand(4, 7), rand(4, 7) + 1, 1e-5), {}),
    ("native_layer_norm", (rand(*ROWS), [7], None, None, 1e-5), {}),
    ("native_layer_norm_backward", (rand(*ROWS), rand(*ROWS) + 1, [7], *STATS, rand(7), rand(7), [True] * 3), {}),
    ("native_group_norm", (rand(*IMAGE), rand(6), rand(6), 2, 6, 20, 3, 1e-5), {}),
    ("native_group_norm_backward", (rand(*IMAGE), rand(*IMAGE) + 1, *GROUPS, rand(6), 2, 6, 20, 3, [True] * 3), {}),
    ("_fused_rms_norm", (rand(*ROWS), [7], rand(7), 1e-5), {}),
    ("_softmax_backward_data", (rand(*ROWS), rand(*ROWS).softmax(-1), -1, torch.float64), {}),
    ("_log_softmax_backward_data", (rand(*ROWS), rand(*ROWS).log_softmax(1), 1, torch.float64), {}),
    ("gelu_backward", (rand(*ROWS), 2 * rand(*ROWS)), {"approximate": "none"}),
    ("gelu_backward", (rand(*ROWS), 2 * rand(*ROWS)), {"approximate": "tanh"}),
    ("gelu_backward", (rand(4), torch.tensor([float("inf"), float("-inf"), float("nan"), 1.0]).double()), {}),
    ("silu_backward", (rand(*ROWS), 2 * rand(*ROWS)), {}),
    ("hardswish_backward", (rand(*ROWS), 3 * rand(*ROWS)), {}),
    ("hardswish_backward", (rand(3), torch.tensor([-3.0, 3.0, 9.0]).double()), {}),
    ("threshold_backward", (rand(3), torch.tensor([0.0, float("nan"), 1.0]).double(), 0), {}),
    ("nll_loss_forward", (rand(4, 5), TARGET, None, 0, -100), {}),
    ("nll_loss_forward", (rand(4, 5), TARGET, rand(5), 1, -100), {}),
    ("nll_loss_forward", (rand(4, 5), TARGET, None, 2, -100), {}),
    ("nll_loss_backward", (rand(4), rand(4, 5), TARGET, rand(5), 0, -100, torch.tensor(2.0).double()), {}),
    ("nll_loss_backward", (rand(1)[0], rand(4, 5), TARGET, rand(5), 1, -100, torch.tensor(2.0).double()), {}),
    ("nll_loss_backward", (rand(1)[0], rand(4, 5), TARGET, None, 2, -100, torch.tensor(2.0).double()), {}),
    ("max_pool2d_with_indices", (rand(*IMAGE).relu(), *POOL), {}),
    ("max_pool2d_with_indices_backward", (rand(*INDICES.shape), rand(*IMAGE), *POOL, INDICES), {}),
    ("convolution_backward", (rand(2, 4, 3, 3), rand(2, 3, 5, 7), rand(4, 3, 3, 3), *CONV), {}),
]


def expect(op: str, found: Any, true: Any) -> None:
    pairs = list(zip(found, true, strict=True)) if isinstance(found, tuple) else [(found, true)]
    for mine, theirs in pairs:
        torch.testing.assert_close(mine, theirs, equal_nan=True, msg=lambda text: f"{op}: {text}")


@pytest.mark.parametrize("index", range(len(CALLS)), ids=[name for name, *_ in CALLS])
def test_a_formula_computes_what_its_operator_does(index: int) -> None:
    name, args, kwargs = CALLS[index]
    op = f"aten.{name}.default"
    expect(op, formula(op)(*args, **kwargs), operator_of(op)(*args, **kwargs))


def test_the_gradients_of_rms_norm_which_has_no_backward_operator_on_the_cpu() -> None:
    grad, x, weight = rand(*ROWS), (rand(*ROWS) + 1).requires_grad_(), rand(7).requires_grad_()
    y, rstd = operator_of("aten._fused_rms_norm.default")(x, [7], weight, 1e-5)
    name = "aten._fused_rms_norm_backward.default"
    expect(name, formula(name)(grad, x, [7], rstd, weight, [True] * 2), torch.autograd.grad(y, (x, weight), grad))


@pytest.mark.parametrize("causal", [False, True])
def test_attention_with_its_logsumexp_and_its_gradients(causal: bool) -> None:
    q, k, v, grad = (rand(1, 2, 5, n) for n in (8, 8, 8, 8))
    name = "aten._scaled_dot_product_flash_attention_for_cpu"
    out, lse = true = operator_of(f"{name}.default")(q, k, v, 0.0, causal)
    expect(name, formula(f"{name}.default")(q, k, v, is_causal=causal), true)
    gradients = operator_of(f"{name}_backward.default")(grad, q, k, v, out, lse, 0.0, causal)
    expect(name, formula(f"{name}_backward.default")(grad, q, k, v, out, lse, is_causal=causal), gradients)


def test_every_backward_operator_that_a_pattern_matches_has_a_formula() -> None:
    calls = [c for p in patterns.PATTERNS for c in (p.anchor, *(c for s in (*p.before, *p.after) for c in s.calls))]
    backward = {c.op for c in calls if "backward" in c.op}
    assert len(backward) >= 10 and backward <= FORMULAS.keys()
