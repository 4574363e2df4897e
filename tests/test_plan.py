"""What identifies a captured graph, and how its tasks are remembered."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tasks import layer_norm_task, softmax_task
from torch import fx

from torch_llmkernels import plan
from torch_llmkernels.cache.store import open_store
from torch_llmkernels.options import read_request
from torch_llmkernels.plan import Plan, graph_digest
from torch_llmkernels.registry import RegionReport
from torch_llmkernels.settings import Settings

FOUND = Plan((layer_norm_task(), softmax_task()), (RegionReport("linear", "", "", False, "kept Inductor: overlaps"),))


@pytest.fixture
def settings(tmp_path: Path) -> Iterator[Settings]:
    plan.forget()
    yield Settings(cache_dir=str(tmp_path))
    plan.forget()


def graph(function: Callable = torch.relu) -> fx.GraphModule:
    return fx.symbolic_trace(lambda x: function(x))


def digest_of(gm: fx.GraphModule | None = None, x: torch.Tensor | None = None, **options: object) -> str:
    return graph_digest(gm or graph(), [torch.zeros(4, 8) if x is None else x], read_request(None, options))


def test_equal_graphs_have_one_digest() -> None:
    assert digest_of() == digest_of()


@pytest.mark.parametrize(
    "x", [torch.zeros(8, 4), torch.zeros(8, 4).t(), torch.zeros(4, 8).half(), torch.zeros(4, 8).requires_grad_()]
)
def test_the_digest_tells_inputs_apart(x: torch.Tensor) -> None:
    assert digest_of(x=x) != digest_of()


def test_the_digest_tells_code_options_and_modes_apart() -> None:
    digests = {digest_of(), digest_of(graph(torch.tanh)), digest_of(max_autotune=True), digest_of(max_regions=1)}
    with torch.no_grad():
        digests.add(digest_of())
    with torch.autocast("cpu", torch.bfloat16):
        digests.add(digest_of())
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
        digests.add(digest_of())
    assert len(digests) == 7


def test_plans_survive_the_process(settings: Settings) -> None:
    plan.remember("key", FOUND, settings)
    plan.forget()
    assert plan.recall("key", settings) == FOUND
    assert plan.recall("another", settings) is None


def test_a_plan_of_another_schema_is_a_miss(settings: Settings) -> None:
    open_store(settings).put("plan/key", b'{"schema": -1}')
    assert plan.recall("key", settings) is None


def test_a_damaged_plan_is_a_miss(settings: Settings) -> None:
    open_store(settings).put("plan/key", b"{")
    assert plan.recall("key", settings) is None


def test_fuel_is_counted_over_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_fuel_used", 0)
    assert [plan.take_fuel(2) for _ in range(3)] == [True, True, False]
    assert plan.take_fuel(-1)
