"""With nothing to swap, what Inductor generates under our backend is what it generates without it: kernels and extern calls.

Sources are compared, nothing is built or run. CI takes a subset in which every pair of (model, mode, shapes, precision) values
that matters occurs; `-m slow` takes the whole product.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import unified_diff
from pathlib import Path
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import Tensor, nn
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.graph import GraphLowering
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_llmkernels import backend, plan, registry
from torch_llmkernels.evaluation import Decision
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.resolve import resolve


class Generated(Exception):
    """Raised where the generated code would run."""


@contextmanager
def sources_only() -> Iterator[list[str]]:
    """Inductor generates code and neither builds nor runs it; yields what it generated, forward before backward."""
    codes: list[str] = []

    def collect(graph: GraphLowering) -> SimpleNamespace:
        codes.append(graph.codegen()[0].value)
        return SimpleNamespace(call=_stop, __file__="generated", value=None)

    with (
        mock.patch.object(GraphLowering, "compile_to_module", collect),
        functorch_config.patch(force_non_lazy_backward_lowering=True, enable_autograd_cache=False),
        config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
    ):
        yield codes


def _stop(*args: object) -> None:
    raise Generated


def generate(
    compiler: str | Callable, model: str, training: bool, dynamic: bool, autocast: bool, device: str = "cpu"
) -> list[str]:
    """The sources that `compiler` generates for a model of the zoo."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    module_of, inputs_of = zoo.CASES[model]
    module, inputs = module_of().to(device).train(training), [x.to(device) for x in inputs_of()]
    compiled = torch.compile(module, backend=compiler, dynamic=dynamic)
    grad, precision = torch.set_grad_enabled(training), torch.autocast(device, torch.bfloat16, enabled=autocast)
    with sources_only() as codes, grad, precision, pytest.raises(Generated):
        compiled(*inputs)
    return codes


def kernels(code: str) -> list[str]:
    """The kernels that a wrapper defines, without comments (they name the graph's nodes)."""
    found = re.findall(r"async_compile\.\w+\([^\n]*?(?:'''|\"\"\")(.*?)(?:'''|\"\"\")", code, re.DOTALL)
    return [re.sub(r"//.*", "", kernel) for kernel in found]


def extern_calls(code: str) -> list[str]:
    """The calls into ATen and libraries, in order."""
    body = code[code.index("def call(") :]
    return re.findall(r"(extern_kernels\.\w+|torch\.ops\.[\w.]+|aten\.\w+)\(", body)


@pytest.fixture(autouse=True)
def nothing_to_swap(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """An empty library and store: every region is looked up, none is found."""
    monkeypatch.setattr(backend, "resolve", lambda tasks, settings: [Decision(None, "kept Inductor: no kernel")] * len(tasks))
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path))
    plan.forget()


def check(model: str, training: bool, dynamic: bool, autocast: bool, device: str = "cpu") -> None:
    """Inductor's sources with and without us are the same, kernel by kernel and call by call."""
    theirs = generate("inductor", model, training, dynamic, autocast, device)
    ours = generate(backend.llmkernels, model, training, dynamic, autocast, device)
    assert len(theirs) == len(ours) > 0
    assert any(kernels(code) or extern_calls(code) for code in theirs)
    assert registry.report()[-1].regions, "no region was looked up, so nothing is shown"
    for before, after in zip(theirs, ours, strict=True):
        assert sorted(kernels(before)) == sorted(kernels(after))
        assert extern_calls(before) == extern_calls(after)


SUBSET = [
    ("resnet", False, False, False), ("resnet_channels_last", False, False, True), ("digits", True, False, False),
    ("gpt", True, False, True), ("gpt", False, True, False), ("encoder", True, False, False), ("lstm", False, True, True),
    ("hand_attention", True, False, False), ("hand_attention", False, False, True), ("upsampler", True, False, False),
    ("mutations", True, True, False), ("dropout", True, False, False), ("dropout", False, False, True),
]  # fmt: skip


@pytest.mark.parametrize(("model", "training", "dynamic", "autocast"), SUBSET)
def test_generated_code_is_that_of_inductor(model: str, training: bool, dynamic: bool, autocast: bool) -> None:
    check(model, training, dynamic, autocast)


@pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")
@pytest.mark.parametrize(
    ("model", "training", "dynamic", "autocast"),
    [("gpt", True, False, False), ("digits", True, True, False), ("lstm", False, True, True), ("encoder", False, False, False)],
)
def test_an_empty_library_and_store_change_no_line(
    model: str, training: bool, dynamic: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As a user has it whose kernels serve nothing: every region is really looked up."""
    monkeypatch.setattr(backend, "resolve", resolve)
    for name in ("library", "cache"):
        (tmp_path / name).mkdir()
        monkeypatch.setenv(f"LLMKERNELS_{name.upper()}_DIR", str(tmp_path / name))
    theirs = generate("inductor", model, training, dynamic, autocast)
    ours = generate(backend.llmkernels, model, training, dynamic, autocast)
    looked_up = [region.reason for region in registry.report()[-1].regions if region.key]
    assert looked_up and all("no kernel implements" in reason for reason in looked_up), looked_up
    assert len(theirs) == len(ours) == 1 + training
    for before, after in zip(theirs, ours, strict=True):
        assert list(unified_diff(*(re.sub(r"# AOT ID: .*", "", code).splitlines() for code in (before, after)), n=0)) == []


class MathAttention(nn.Module):
    """Attention that torch takes apart, in two precisions."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(32, 32)

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        heads, mask = self.inner(x).view(2, 8, 4, 8).transpose(1, 2), (position[:, None] >= 0).expand(2, 1, 8, 8)
        half = heads.half()
        with sdpa_kernel(SDPBackend.MATH):
            attended = F.scaled_dot_product_attention(heads, heads, heads, mask)
            return attended + F.scaled_dot_product_attention(half, half, half, mask)


@pytest.mark.parametrize("training", [False, True])
def test_attention_that_torch_takes_apart_is_taken_apart_the_same(training: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(zoo.CASES, "math_attention", (MathAttention, lambda: (torch.randn(2, 8, 32), torch.arange(8))))
    check("math_attention", training, dynamic=False, autocast=False)
    assert {"bmm.mask.safe_softmax.bmm", "attention_math"} & {r.signature for r in registry.report()[-1].regions}


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("model", list(zoo.CASES))
def test_generated_code_is_that_of_inductor_everywhere(model: str, training: bool, dynamic: bool, autocast: bool) -> None:
    check(model, training, dynamic, autocast)


def test_every_pair_of_values_is_in_the_subset() -> None:
    """Each model in CI, and each combination of two of the three switches."""
    assert {case[0] for case in SUBSET} == set(zoo.CASES)
    for i, j in itertools.combinations((1, 2, 3), 2):
        assert {(case[i], case[j]) for case in SUBSET} == set(itertools.product([False, True], repeat=2))
