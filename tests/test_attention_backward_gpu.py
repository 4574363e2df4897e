"""Training attention on CUDA: the backward of each fused operator is found, accepted by its own check, and runs swapped."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from swapping import swapping
from test_evaluate_cuda import eager_candidate
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_llmkernels import backend
from torch_llmkernels.capture import capture
from torch_llmkernels.evaluate.check import check
from torch_llmkernels.task import Task

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

FUSED = {
    "flash": (SDPBackend.FLASH_ATTENTION, torch.float16),
    "efficient": (SDPBackend.EFFICIENT_ATTENTION, torch.float32),
    "cudnn": (SDPBackend.CUDNN_ATTENTION, torch.bfloat16),
}


class Attention(nn.Module):
    """Causal self-attention of two heads over x [B, T, 128]."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(128, 384), nn.Linear(128, 128)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (t.unflatten(-1, (2, 64)).transpose(1, 2) for t in self.qkv(x).chunk(3, dim=-1))
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(attended.transpose(1, 2).flatten(2))


def model_and_input(dtype: torch.dtype) -> tuple[nn.Module, Tensor]:
    torch.manual_seed(0)
    return Attention().to("cuda", dtype), torch.randn(2, 96, 128, device="cuda", dtype=dtype)


def backward_task(name: str) -> Task:
    backend, dtype = FUSED[name]
    model, x = model_and_input(dtype)
    with sdpa_kernel(backend):
        tasks = [region.task for region in capture(model, (x,), training=True)]
    (task,) = (t for t in tasks if t.signature == "attention_backward")
    assert "attention" in [t.signature for t in tasks]
    return task


@pytest.mark.parametrize("name", FUSED)
def test_the_backward_is_a_task_of_its_own(name: str) -> None:
    task = backward_task(name)
    (call,) = (node for node in task.program if node.op != "getitem")
    assert call.op == f"aten._scaled_dot_product_{name}_attention_backward.default"
    assert [t.name for t in task.inputs] == ["grad_y", "q", "k", "v", "y", "logsumexp"]
    assert [t.name for t in task.outputs] == ["grad_q", "grad_k", "grad_v"]


@pytest.mark.parametrize("name", FUSED)
def test_eager_passes_the_check_of_the_backward(name: str) -> None:
    """The operator takes the logsumexp in the place of its random state, and the inputs are those of a forward."""
    task = backward_task(name)
    _, failure = check(task, eager_candidate(task))
    assert failure is None, failure


@pytest.mark.parametrize("name", FUSED)
def test_training_runs_swapped_and_has_the_gradients_of_eager(name: str, tmp_path: Path) -> None:
    backend.register()  # where the package is on the path but not installed
    fused, dtype = FUSED[name]
    model, x = model_and_input(dtype)
    with sdpa_kernel(fused), swapping(tmp_path) as kernels:
        ours, theirs = (gradients(function, model, x) for function in (torch.compile(model, backend="llmkernels"), model))
    assert kernels.calls["attention"] == kernels.calls["attention_backward"] == 1
    tolerance = 1e-4 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(ours, theirs, rtol=tolerance, atol=tolerance)


def gradients(function: nn.Module, model: nn.Module, x: Tensor) -> list[Tensor]:
    model.zero_grad()
    function(x).float().square().mean().backward()
    return [p.grad.clone() for p in model.parameters() if p.grad is not None]
