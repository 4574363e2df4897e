"""The backward of attention on CUDA: one region whichever of the three fused operators a graph holds, without its random state.

The graphs are made by hand on fake CUDA tensors: nothing runs, so no device is needed. What a device shows is in
`test_attention_backward_gpu.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from swapping import record_of
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torch_llmkernels.evaluate.cut import with_sizes
from torch_llmkernels.evaluate.inputs import InputGenerator
from torch_llmkernels.evaluate.reference import reference
from torch_llmkernels.evaluate.roofline import count_flops
from torch_llmkernels.graph.regions import Region, find_regions
from torch_llmkernels.graph.swap import swap, tidy
from torch_llmkernels.graph.task_of import task_of
from torch_llmkernels.program import python_source
from torch_llmkernels.task import ITEMSIZE, Task

aten = torch.ops.aten
ROWS, COLUMNS, WIDTH = 24, 40, 16  # queries, keys, size of a head


def flash(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Any:
    out, lse, cum_q, cum_k, max_q, max_k, seed, offset, _ = aten._scaled_dot_product_flash_attention(q, k, v, dropout, True)
    lengths = (cum_q, cum_k, max_q, max_k)
    return out, aten._scaled_dot_product_flash_attention_backward(
        grad, q, k, v, out, lse, *lengths, dropout, True, seed, offset
    )


def efficient(grad: Tensor, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Any:
    out, lse, *state = aten._scaled_dot_product_efficient_attention(q, k, v, mask, True)
    wanted = [True, True, True, mask is not None]
    grads = aten._scaled_dot_product_efficient_attention_backward(grad, q, k, v, mask, out, lse, *state, 0.0, wanted)
    return out, [g for g in grads if g is not None]


def cudnn(grad: Tensor, q: Tensor, k: Tensor, v: Tensor) -> Any:
    out, lse, cum_q, cum_k, max_q, max_k, *state, _ = aten._scaled_dot_product_cudnn_attention(q, k, v, None, True)
    lengths = (cum_q, cum_k, max_q, max_k)
    return out, aten._scaled_dot_product_cudnn_attention_backward(grad, q, k, v, out, lse, *state, None, *lengths, 0.0, False)


FUSED = {"flash": flash, "efficient": efficient, "cudnn": cudnn}


def joint(fn: Callable[..., Any], *, kv_heads: int = 4, mask: bool = False, dynamic: bool = False) -> fx.GraphModule:
    """The joint graph of `fn(gradient, q, k, v)` on half-precision CUDA tensors; with `mask` a fifth argument, additive."""
    mode = FakeTensorMode(shape_env=ShapeEnv())
    rows, columns = (mode.from_tensor(torch.empty(n)).shape[0] if dynamic else n for n in (ROWS, COLUMNS))
    with mode:
        grad, q = (torch.empty(2, 4, rows, WIDTH, device="cuda", dtype=torch.half) for _ in range(2))
        k, v = (torch.empty(2, kv_heads, columns, WIDTH, device="cuda", dtype=torch.half) for _ in range(2))
        masks = [torch.empty(2, 4, ROWS, COLUMNS, device="cuda", dtype=torch.half)] if mask else []

        def positional(*tensors: Tensor) -> Any:
            return fn(*tensors)

        gm = make_fx(positional, decomposition_table={}, tracing_mode="symbolic" if dynamic else "real")(grad, q, k, v, *masks)
    next(iter(gm.graph.nodes)).name = "tangents_1"
    return gm


def both(gm: fx.GraphModule) -> tuple[Region, Region]:
    forward, backward = find_regions(gm.graph)[0]
    assert (forward.signature, backward.signature) == ("attention", "attention_backward")
    return forward, backward


def backward_task(gm: fx.GraphModule) -> Task:
    return task_of(both(gm)[1]).task


def random_state(gm: fx.GraphModule) -> list[fx.Node]:
    """What the backward gets of the forward beside its output and logsumexp, as far as these are tensors."""
    forward = next(n for n in gm.graph.nodes if "attention" in str(n.target))
    return [n for n in forward.users if n.args[1] > 1 and n.users and isinstance(n.meta["val"], Tensor)]


def roles(region: Region) -> tuple[list[str], list[str]]:
    return [r for r, _ in region.inputs], [r for r, _ in region.outputs]


@pytest.mark.parametrize("name", FUSED)
def test_forward_and_backward_are_regions_without_the_random_state(name: str) -> None:
    forward, backward = both(joint(FUSED[name]))
    assert roles(forward) == (["q", "k", "v"], ["y", "logsumexp"])
    assert roles(backward) == (["grad_y", "q", "k", "v", "y", "logsumexp"], ["grad_q", "grad_k", "grad_v"])


def test_an_additive_mask_has_a_gradient() -> None:
    backward = both(joint(efficient, mask=True))[1]
    assert roles(backward)[0][-1] == "mask"
    assert roles(backward)[1] == ["grad_q", "grad_k", "grad_v", "grad_mask"]


@pytest.mark.parametrize("name", FUSED)
def test_the_task_does_not_tell_what_random_state_a_release_has(name: str) -> None:
    gm = joint(FUSED[name])
    task = backward_task(gm)
    assert len(random_state(gm)) == 2
    for node in random_state(gm):
        node.meta["val"] = torch.empty(3, dtype=torch.int32, device="meta")
    assert backward_task(gm).key == task.key
    assert {t.dtype for t in (*task.inputs, *task.outputs)} <= set(ITEMSIZE)


def test_dropout_is_refused_with_a_reason() -> None:
    found, skipped = find_regions(joint(lambda *tensors: flash(*tensors, dropout=0.1)).graph)
    assert found == []
    assert {s.reason for s in skipped} == {"dropout_p is 0.1, not 0.0"}


def test_dynamic_lengths_are_symbols() -> None:
    task = backward_task(joint(flash, dynamic=True))
    (call,) = (n for n in task.program if n.op != "getitem")
    lengths = dict(zip((t.name for t in task.inputs), (t.shape[2] for t in task.inputs), strict=True))
    assert call.args[8:10] == ({"s": lengths["q"]}, {"s": lengths["k"]})


def gradients(task: Task, given: dict[str, Tensor], causal: bool) -> list[Tensor]:
    """By torch's own autograd in float64 of attention as it is without fused operators."""
    names = ["q", "k", "v", *(["mask"] if "mask" in given else [])]
    leaves = {n: given[n].double().requires_grad_() for n in names}
    heads = leaves["q"].shape[1] // leaves["k"].shape[1]
    k, v = (leaves[n].repeat_interleave(heads, 1) for n in "kv")
    scores = leaves["q"] @ k.mT / WIDTH**0.5 + leaves.get("mask", 0.0)
    if causal:
        scores = scores.masked_fill(~torch.ones(ROWS, COLUMNS, dtype=torch.bool).tril(), float("-inf"))
    return list(torch.autograd.grad(scores.softmax(-1) @ v, list(leaves.values()), given["grad_y"].double()))


CASES = {
    "flash": lambda: joint(flash),
    "flash, grouped queries": lambda: joint(flash, kv_heads=2),
    "efficient": lambda: joint(efficient),
    "efficient, mask": lambda: joint(efficient, mask=True),
    "cudnn": lambda: joint(cudnn),
}


@pytest.mark.parametrize("case", CASES)
def test_the_float64_reference_is_the_gradient_and_needs_no_gpu(case: str) -> None:
    """Inputs are rounded to half precision, `y` and `logsumexp` too, so the two agree to about that."""
    task = backward_task(CASES[case]())
    values = InputGenerator(task, "cpu").make("normal", 0)
    given = dict(zip((t.name for t in task.inputs), values, strict=True))
    expected = gradients(task, given, causal=case.startswith("flash"))
    for found, wanted in zip(reference(task, values), expected, strict=True):
        assert found.dtype is torch.float64
        torch.testing.assert_close(found, wanted, rtol=5e-3, atol=5e-3)


@pytest.mark.parametrize("name", FUSED)
def test_the_task_is_readable_counted_and_cut(name: str) -> None:
    task = backward_task(joint(FUSED[name]))
    compile(python_source(task), "task", "exec")
    full = count_flops(task)
    assert full[1] and full[0] in (10 * 2 * 4 * ROWS * COLUMNS * WIDTH // (1 + (name == "flash")),)
    queries = [("input", t.name, 2) for t in task.inputs if t.shape[2] == ROWS]
    small = with_sizes(task, dict.fromkeys(queries, 8))
    assert small is not None and small.outputs[0].shape == (2, 4, 8, WIDTH)
    (call,) = (n for n in small.program if n.op != "getitem")
    assert ROWS not in call.args


@pytest.mark.parametrize("name", FUSED)
def test_a_swapped_forward_is_not_kept_for_the_random_state_of_a_backward_that_stays(name: str) -> None:
    gm = joint(FUSED[name])
    state = random_state(gm)
    region = task_of(both(gm)[0])
    swap(gm.graph, region, record_of(region.task))
    tidy(gm.graph)
    gm.graph.lint()
    fused = [n for n in gm.graph.nodes if "attention" in str(n.target)]
    assert len(fused) == 1 and "backward" in str(fused[0].target)
    assert len(state) == 2 and not set(state) & set(fused[0].all_input_nodes)


@pytest.mark.parametrize("name", FUSED)
def test_a_swapped_backward_leaves_the_forward_without_random_state(name: str) -> None:
    gm = joint(FUSED[name])
    region = task_of(both(gm)[1])
    swap(gm.graph, region, record_of(region.task))
    tidy(gm.graph)
    (forward,) = (n for n in gm.graph.nodes if "attention" in str(n.target))
    assert {n.args[1] for n in forward.users} == {0, 1}


