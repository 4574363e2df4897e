"""The backend on CUDA: swaps inside Inductor's Triton code, under CUDA graphs, with nothing to swap."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import zoo
from swapping import Kernels, swap_none, swapping
from test_backend import NormSoftmax, compiled, gradients
from test_zero_regression import check
from torch import nn

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[Kernels]:
    torch.manual_seed(0)
    with swapping(tmp_path) as running:
        yield running


def test_training_runs_swapped(kernels: Kernels) -> None:
    model, x = NormSoftmax().cuda(), torch.randn(4, 16, device="cuda")
    torch.testing.assert_close(gradients(compiled(model), model, x), gradients(model, model, x))
    assert kernels.calls == {"layer_norm": 1, "softmax": 1, "softmax_backward": 1, "layer_norm_backward": 1}


@pytest.mark.parametrize("dynamic", [False, True])
def test_autocast_with_fused_neighbours(kernels: Kernels, dynamic: bool) -> None:
    model = nn.Sequential(nn.Linear(64, 64), nn.GELU(), nn.LayerNorm(64), nn.Linear(64, 64), nn.ReLU()).cuda()
    function = compiled(model, dynamic=dynamic)
    for rows in (8, 24):
        x = torch.randn(rows, 64, device="cuda")
        with torch.no_grad(), torch.autocast("cuda", torch.float16):
            torch.testing.assert_close(function(x), model(x), rtol=2e-3, atol=2e-3)
    assert kernels.calls["layer_norm"] == 2


def test_swaps_are_captured_in_cuda_graphs(kernels: Kernels) -> None:
    """The kernel runs for warm-up and capture; replays run it without Python, on fresh data."""
    model = NormSoftmax(64).cuda()
    function = compiled(model, mode="reduce-overhead")
    with torch.no_grad():
        for _ in range(6):
            x = torch.randn(8, 64, device="cuda")
            torch.testing.assert_close(function(x).clone(), model(x))
    assert 0 < kernels.calls["layer_norm"] < 6


def test_training_under_cuda_graphs(kernels: Kernels) -> None:
    model = NormSoftmax(64).cuda()
    function = compiled(model, mode="reduce-overhead")
    for _ in range(4):
        x = torch.randn(8, 64, device="cuda")
        torch.compiler.cudagraph_mark_step_begin()
        torch.testing.assert_close(gradients(function, model, x), gradients(model, model, x))
    assert 0 < kernels.calls["layer_norm_backward"] < 4


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_one_graph_on_two_devices(kernels: Kernels) -> None:
    model = NormSoftmax()
    for index in (0, 1, 0):
        twin, x = model.to(f"cuda:{index}"), torch.randn(4, 16, device=f"cuda:{index}")
        with torch.no_grad():
            torch.testing.assert_close(compiled(twin)(x), twin(x))


@pytest.mark.parametrize("model", ["gpt", "resnet_channels_last", "encoder"])
@pytest.mark.parametrize("training", [False, True])
def test_generated_code_is_that_of_inductor(model: str, training: bool, tmp_path: Path) -> None:
    with swapping(tmp_path, swap_none):
        check(model, training, dynamic=False, autocast=True, device="cuda")


@pytest.mark.parametrize("model", list(zoo.CASES))
def test_the_zoo_trains_as_in_eager(kernels: Kernels, model: str) -> None:
    module_of, inputs_of = zoo.CASES[model]
    module, inputs = module_of().cuda().eval(), [x.cuda() for x in inputs_of()]
    with torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False):
        ours, theirs = (parameter_gradients(function, module, inputs) for function in (compiled(module), module))
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-4)
    assert kernels.calls or model == "upsampler"


def parameter_gradients(function, module: nn.Module, inputs: list[torch.Tensor]) -> list[torch.Tensor]:
    module.zero_grad()
    function(*inputs).float().square().mean().backward()
    return [p.grad.clone() for p in module.parameters()]
