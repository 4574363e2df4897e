"""What identifies a captured graph, and how its tasks are remembered."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tasks import layer_norm_task, softmax_task
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from torch_llmkernels import graph_decision, plan
from torch_llmkernels.cache.store import open_store
from torch_llmkernels.evaluation import GraphDecision
from torch_llmkernels.graph_decision import graph_key
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


class Pass(CustomGraphPass):
    """A pass of a user, that does nothing."""

    def __init__(self, name: str | None) -> None:
        self.name = name

    def __call__(self, graph: fx.Graph) -> None: ...

    def uuid(self) -> str | None:
        return self.name


def a_pass(graph: fx.Graph) -> None:
    """Another, as a function."""


@pytest.mark.parametrize("make", [lambda: Pass("a"), lambda: a_pass, lambda: [Pass("a"), a_pass]])
def test_passes_are_known_by_what_another_process_calls_them(make: Callable, settings: Settings) -> None:
    keys = {digest_of(post_grad_custom_pre_pass=make()) for _ in range(2)}
    assert len(keys) == 1 and keys != {digest_of(post_grad_custom_pre_pass=Pass("b"))}
    assert len({graph_key([], read_request(None, {"post_grad_custom_pre_pass": make()})) for _ in range(2)}) == 1
    plan.remember(*keys, FOUND, settings)
    assert plan.recall(*keys, settings) == FOUND


@pytest.mark.parametrize("nameless", [Pass(None), lambda graph: None, functools.partial(a_pass), object()])
def test_what_depends_on_a_pass_without_a_name_is_not_remembered(nameless: object, settings: Settings) -> None:
    """It would never be found by another process, and might be found for another object at the same address."""
    key = digest_of(post_grad_custom_pre_pass=nameless)
    plan.remember(key, FOUND, settings)
    assert plan.recall(key, settings) is None
    graph = graph_key([], read_request(None, {"post_grad_custom_pre_pass": nameless}))
    graph_decision.remember(GraphDecision(graph, (), (), 1.0, 1.0, 0.1), "cpu", settings)
    assert graph_decision.recall(graph, "cpu", settings) is None and not open_store(settings).keys()


def test_ranks_agree_whatever_the_address_of_a_pass(settings: Settings) -> None:
    requests = [read_request(None, {"post_grad_custom_pre_pass": functools.partial(a_pass)}) for _ in range(2)]
    assert len({graph_decision.job_key(FOUND.tasks, request) for request in requests}) == 1


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


def test_the_compiler_is_all_that_finds_keys_and_swaps_regions() -> None:
    """A release that serves or keys tasks otherwise must not take over what an earlier one left in torch's caches."""
    names = {path.relative_to(Path(plan.__file__).parent).as_posix() for path in plan.source_files()}
    assert names >= {"backend.py", "passes.py", "task.py", "graph/task_of.py", "graph/op.py"}
    assert names >= {f"kernels/{name}.py" for name in ("source", "header", "launch", "expression")}
    assert all(path.exists() for path in plan.source_files())


def test_fuel_is_counted_over_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "_fuel_used", 0)
    assert [plan.take_fuel(2) for _ in range(3)] == [True, True, False]
    assert plan.take_fuel(-1)
