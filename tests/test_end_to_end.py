"""Everything that users of torch.compile do, with real kernels: a library on disk, checked in the worker, built and swapped in.

`options={"swap": "correct"}` takes every kernel that is right, so a region that stays with Inductor here is a defect.
`test_backend` has the same situations, and more, with stand-ins for kernels. All models share a few tasks, which are verified
once.
"""

from __future__ import annotations

import collections
import copy
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from torch_llmkernels import plan, registry
from torch_llmkernels.graph import op
from torch_llmkernels.kernels.targets import target_for

pytestmark = pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")

KERNELS = Path(__file__).parent / "kernels"
FILES = {
    "layer_norm": "layer_norm", "layer_norm_backward": "layer_norm_backward", "softmax": "softmax",
    "softmax_backward": "softmax_backward", "conv2d.relu": "conv2d_relu",
}  # fmt: skip
EAGER = {"rtol": 1e-5, "atol": 1e-5}


class NormSoftmax(nn.Module):
    """Layer norm and softmax over [rows, 16]: two regions forward, two backward, nothing else."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(self.norm(x), dim=-1)


@pytest.fixture(scope="module")
def options(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """A library of five plain kernels and a store, shared by all tests of this file."""
    folder = tmp_path_factory.mktemp("end-to-end")
    for signature, name in FILES.items():
        (folder / "library" / signature).mkdir(parents=True)
        (folder / "library" / signature / f"{name}.cpp").write_text((KERNELS / f"{name}.cpp").read_text())
    return {
        "swap": "correct", "strict": True, "verify_budget_s": 600.0,
        "library_dir": str(folder / "library"), "cache_dir": str(folder / "store"),
    }  # fmt: skip


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Iterator[collections.Counter[str]]:
    """How often the kernel of each signature ran to its end in this process."""
    calls: collections.Counter[str] = collections.Counter()
    build = op.build_launcher

    def counted(spec: op.Spec, settings: Any, index: int) -> Callable[..., None]:
        launcher = build(spec, settings, index)

        def launch(*args: Any) -> None:
            launcher(*args)
            calls[spec.task.signature] += 1

        return launch

    torch.manual_seed(0)
    torch._dynamo.reset()
    plan.forget()
    registry.clear()
    monkeypatch.setattr(op, "build_launcher", counted)
    monkeypatch.setattr(op, "_slots", {})
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield calls
    torch._dynamo.reset()


@pytest.fixture
def compiled(options: dict[str, Any], ran: Any) -> Callable[..., Callable[..., Any]]:
    return lambda function, **more: torch.compile(function, backend="llmkernels", options=options, **more)


def gradients(function: Callable[..., torch.Tensor], module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of `function(x)`, then the gradients of the input and the parameters."""
    module.zero_grad()
    x.grad = None
    y = function(x.requires_grad_())
    (y * torch.linspace(-1, 1, y.numel()).view_as(y)).sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def test_training(compiled: Callable, ran: collections.Counter[str]) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    torch.testing.assert_close(gradients(compiled(model), model, x), gradients(model, model, x), **EAGER)
    assert ran == {"layer_norm": 1, "softmax": 1, "softmax_backward": 1, "layer_norm_backward": 1}


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_inference(compiled: Callable, ran: collections.Counter[str], context: Callable[[], AbstractContextManager]) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    with context():
        torch.testing.assert_close(compiled(model, fullgraph=True)(x), model(x))
    assert ran == {"layer_norm": 1, "softmax": 1}


def test_autocast(compiled: Callable, ran: collections.Counter[str]) -> None:
    """The softmax gets the bfloat16 output of the linear layer."""
    model, x = nn.Sequential(nn.Linear(16, 16), nn.Softmax(-1)), torch.randn(4, 16)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        ours, theirs = compiled(model)(x), model(x)
    assert ours.dtype == theirs.dtype == torch.bfloat16
    torch.testing.assert_close(ours, theirs)
    assert ran == {"softmax": 1}


def test_channels_last(compiled: Callable, ran: collections.Counter[str]) -> None:
    model = nn.Sequential(nn.Conv2d(3, 4, 3, padding=1), nn.ReLU()).to(memory_format=torch.channels_last)
    x = torch.randn(2, 3, 6, 6).to(memory_format=torch.channels_last)
    with torch.no_grad():
        y = compiled(model)(x)
        torch.testing.assert_close(y, model(x))
    assert y.is_contiguous(memory_format=torch.channels_last)
    assert ran == {"conv2d.relu": 1}


def test_checkpoint_with_dropout(compiled: Callable, ran: collections.Counter[str]) -> None:
    """The forward pass runs a second time in the backward pass, with the same mask."""
    model, x = NormSoftmax(), torch.randn(4, 16, requires_grad=True)
    function = compiled(lambda x: checkpoint(lambda x: F.dropout(model.norm(x), 0.5), x, use_reentrant=False))
    y = function(x)
    y.sum().backward()
    torch.testing.assert_close(model.norm.bias.grad, (y != 0).float().mul(2).sum(0))
    assert ran["layer_norm"] >= 1 and ran["layer_norm_backward"] == 1


def test_a_graph_break(compiled: Callable, ran: collections.Counter[str]) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y)

    with torch.no_grad():
        torch.testing.assert_close(compiled(broken)(x), broken(x))
    assert ran == {"layer_norm": 2, "softmax": 2}


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic", "automatic"])
def test_a_dynamic_batch(compiled: Callable, ran: collections.Counter[str], how: str) -> None:
    model = NormSoftmax()
    function = compiled(model, dynamic=True if how == "dynamic=True" else None)
    for rows in (4, 6, 9):
        x = torch.randn(rows, 16)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        torch.testing.assert_close(gradients(function, model, x), gradients(model, model, x), **EAGER)
    assert ran == {"layer_norm": 3, "softmax": 3, "softmax_backward": 3, "layer_norm_backward": 3}
    assert len(registry.report()) == (2 if how == "automatic" else 1)


def test_two_models_and_a_reset(compiled: Callable, ran: collections.Counter[str]) -> None:
    """Equal tasks of different models share a kernel; after `torch._dynamo.reset()` everything is found again."""
    x = torch.randn(4, 16)
    with torch.no_grad():
        for _ in range(2):
            for model in (NormSoftmax(), nn.Sequential(NormSoftmax(), NormSoftmax())):
                torch.testing.assert_close(compiled(model)(x), model(x))
            torch._dynamo.reset()
    assert ran == {"layer_norm": 6, "softmax": 6} and len(op.slots()) == 2


def test_threads(compiled: Callable, ran: collections.Counter[str]) -> None:
    model, wrong = NormSoftmax(), []
    function = compiled(model)

    def work(seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        for _ in range(20):
            x = torch.randn(4, 16, generator=generator)
            with torch.no_grad():
                wrong.extend([] if torch.allclose(function(x), model(x), atol=1e-6) else [x])

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and len(op.slots()) == 2


def _compare(function: Callable[..., Any], x: torch.Tensor, expected: torch.Tensor) -> None:
    """In a forked child: call what the parent has compiled."""
    torch.set_num_threads(1)  # a forked OpenMP pool has no threads
    with torch.no_grad():
        os._exit(0 if torch.allclose(function(x), expected, atol=1e-6) else 1)


def _compile_and_compare(options: dict[str, Any], x: torch.Tensor, expected: torch.Tensor) -> None:
    """In a spawned child: compile again; the store knows the kernels."""
    with torch.no_grad():
        y = torch.compile(NormSoftmax(), backend="llmkernels", options={**options, "verify_budget_s": 0.0})(x)
    swapped = [region.swapped for graph in registry.report() for region in graph.regions]
    assert swapped == [True, True] and torch.allclose(y, expected, atol=1e-6)


def test_forked_and_spawned_workers(compiled: Callable, options: dict[str, Any], ran: collections.Counter[str]) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    function = compiled(model)
    with torch.no_grad():
        expected = function(x)
    fork, spawn = (multiprocessing.get_context(how) for how in ("fork", "spawn"))
    children = [
        fork.Process(target=_compare, args=(function, x, expected)),
        spawn.Process(target=_compile_and_compare, args=(options, x, expected)),
    ]
    for child in children:
        child.start()
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]


def test_copies_and_pickles(options: dict[str, Any], ran: collections.Counter[str]) -> None:
    """Of a compiled module: a copy runs compiled again; a pickle of one that ran holds the module."""
    model, x = NormSoftmax(), torch.randn(4, 16)
    model.compile(backend="llmkernels", options=options)
    with torch.no_grad():
        expected = model(x)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected)
        restored = pickle.loads(pickle.dumps(model))
        torch.testing.assert_close(restored(x), expected)
    assert ran["layer_norm"] >= 1
