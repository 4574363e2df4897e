"""Small versions of the benchmarks' models on the CPU target: every region that is found is swapped, the results are eager's.

Graphs are captured, cut into tasks, swapped and decomposed as for a user, and then run node by node: Inductor's code generation
is `test_zero_regression`'s and `test_end_to_end`'s subject, and would take a minute here.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import small_models
import torch
import zoo
from functorch.compile import make_boxed_func
from swapping import Kernels, swapping
from torch import nn

import torch_llmkernels
from torch_llmkernels import backend

LEFT_OUT = ("dropout", "upsampler")  # the first is random, the second holds no region that has a pattern
CASES = {name: case for name, case in {**zoo.CASES, **small_models.CASES}.items() if name not in LEFT_OUT}
TRAINING = ("resnet", "encoder", "gpt", "llama_small", "swin_small", "convnext_small", "mobilenet_small")


@pytest.fixture
def kernels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Kernels]:
    """Every task has a kernel that runs its own program; what Inductor would generate code for runs as the graph it is."""
    compile_fx = backend._compile_fx

    def run_as_graph(*args: Any, **more: Any) -> Any:
        return compile_fx(*args, **{"inner_compile": lambda gm, inputs, **options: make_boxed_func(gm.forward), **more})

    monkeypatch.setattr(backend, "_compile_fx", run_as_graph)
    with swapping(tmp_path) as running:
        yield running


def made(name: str, training: bool) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
    torch.manual_seed(0)
    module, inputs = CASES[name]
    return module().train(training), inputs()


def results(name: str, compiled: bool, training: bool) -> list[torch.Tensor]:
    """The output, with `training` every gradient, and the buffers afterwards; of a model made anew."""
    model, inputs = made(name, training)
    function = torch.compile(model, backend=backend.llmkernels, options={"strict": True}) if compiled else model
    with torch.set_grad_enabled(training):
        output = function(*inputs)
    if training:
        output.square().sum().backward()
    return [output.detach(), *(p.grad for p in model.parameters() if p.grad is not None), *model.buffers()]


@pytest.mark.parametrize(("name", "training"), [*((name, False) for name in CASES), *((name, True) for name in TRAINING)])
def test_a_model_computes_what_eager_computes(kernels: Kernels, name: str, training: bool) -> None:
    for got, wanted in zip(results(name, True, training), results(name, False, training), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    report = torch_llmkernels.report()
    assert len(report.swapped) == sum(bool(region.key) for region in report.regions)
    assert kernels.calls.total() == len(report.swapped) > 0
    assert not training or any("backward" in region.signature for region in report.swapped)
