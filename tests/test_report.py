"""`torch_llmkernels.report`: what was decided for each region, for which `torch.compile` call, and by how much."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from records import evaluation
from swapping import record_of, swapping
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_inductor_cache

import torch_llmkernels
from torch_llmkernels import backend, graph_decision, passes
from torch_llmkernels.errors import CompileError, LLMKernelsError, TaskError
from torch_llmkernels.evaluation import Decision, Status
from torch_llmkernels.graph import op
from torch_llmkernels.graph_decision import GraphDecision
from torch_llmkernels.options import read_request
from torch_llmkernels.plan import record_digest
from torch_llmkernels.registry import GraphReport, RegionReport, Report


def one_wins_one_loses(tasks, settings):
    """The layer norm's kernel is twice as fast as eager, the softmax's kernel is wrong."""
    fast = dataclasses.replace(record_of(tasks[0]), evaluation=evaluation(time_ms=0.5), origin="library")
    won = Decision(fast, "swapped: reference runs at 2.00x the best baseline", (("reference", fast.evaluation),))
    lost = Decision(None, "kept Inductor: no kernel passed", (("k", evaluation(Status.WRONG)),))
    return [won if task.signature == "layer_norm" else lost for task in tasks]


@pytest.fixture
def decided(tmp_path: Path) -> Iterator[None]:
    with swapping(tmp_path, one_wins_one_loses), torch.no_grad():
        yield


class Softmax(nn.Module):
    """A module of the user's own: Dynamo does not look into `nn.Softmax._call_impl`."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(x, -1)


def norm_softmax(width: int) -> nn.Module:
    return nn.Sequential(nn.LayerNorm(width), nn.LayerNorm(width), nn.Softmax(-1))


def test_a_report_is_of_one_compiled_model_or_of_the_process(decided: None) -> None:
    model, function, in_place = norm_softmax(16), nn.Softmax(-1), Softmax()
    first = torch.compile(model, backend=backend.llmkernels)
    second = torch.compile(lambda x: function(x) + 1, backend=backend.llmkernels)
    in_place.compile(backend=backend.llmkernels, options={"max_regions": 7})
    never = torch.compile(nn.Tanh(), backend=backend.llmkernels)
    first(torch.ones(2, 16)), second(torch.ones(2, 8)), in_place(torch.ones(3, 4))
    assert [r.signature for r in torch_llmkernels.report(first).regions] == ["layer_norm", "layer_norm", "softmax"]
    assert [r.shapes for r in torch_llmkernels.report(second).regions] == ["2x8 f32"]
    assert [r.shapes for r in torch_llmkernels.report(in_place).regions] == ["3x4 f32"]
    assert len(torch_llmkernels.report()) == 3 and not torch_llmkernels.report(never)
    assert "no graph was compiled" in str(torch_llmkernels.report(never))
    with pytest.raises(LLMKernelsError, match="Sequential is not compiled"):
        torch_llmkernels.report(model)

    report = torch_llmkernels.report(first)
    norm, _, softmax = report.regions
    assert (norm.swapped, norm.speedup, norm.kernel_ms, norm.baseline_ms, norm.origin) == (True, 2.0, 0.5, 1.0, "library")
    assert not softmax.swapped and softmax.speedup is None
    plain = json.loads(json.dumps(report.to_json()))
    assert [region["speedup"] for region in plain[0]["regions"]] == [2.0, 2.0, None]
    assert plain[0]["regions"][0]["evaluation"]["baselines_ms"] == {"eager": 1.0, "inductor": 1.5}


def test_what_cannot_be_swapped_in_is_not_reported_as_swapped(decided: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor by a later compilation that finds the code in torch's caches, where nothing is swapped any more."""

    def refuse(*args: Any) -> None:
        raise TaskError("a size cannot be read off the inputs")

    monkeypatch.setattr(passes, "swap", refuse)
    with inductor_config.patch(fx_graph_cache=True), functorch_config.patch(enable_autograd_cache=True), fresh_inductor_cache():
        for why in ("a size cannot be read off the inputs", "torch's cached code"):
            torch._dynamo.reset()
            compiled = torch.compile(nn.LayerNorm(16), backend=backend.llmkernels)
            compiled(torch.ones(2, 16))
            (region,) = torch_llmkernels.report(compiled).regions
            assert not region.swapped and why in region.reason


def test_what_goes_wrong_during_the_swaps_leaves_the_graph_to_inductor(
    decided: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = passes.swap, []

    def second_fails(*args: Any) -> Any:
        calls.append(args)
        if len(calls) == 2:
            raise RuntimeError("boom")
        return real(*args)

    monkeypatch.setattr(passes, "swap", second_fails)
    compiled, x = torch.compile(norm_softmax(16), backend=backend.llmkernels), torch.randn(2, 16)
    torch.testing.assert_close(compiled(x), norm_softmax(16)(x))
    (graph,) = torch_llmkernels.report(compiled)
    assert "boom" in graph.note and not graph.swapped
    with pytest.raises(Exception, match="boom"):
        calls.clear()
        torch.compile(norm_softmax(16), backend=backend.llmkernels, options={"strict": True})(x)


def test_a_region_that_runs_its_reference_is_not_reported_as_swapped(
    decided: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*args: Any) -> None:
        raise CompileError("no such instruction")

    monkeypatch.setattr(op, "build_launcher", refuse)
    compiled = torch.compile(nn.LayerNorm(16), backend=backend.llmkernels)
    compiled(torch.ones(2, 16))
    report = torch_llmkernels.report(compiled)
    assert not report.swapped and report.regions[0].reason == "runs its reference: no such instruction"
    (row,) = [line for line in str(report).splitlines() if "layer_norm" in line]
    assert "eager" in row and "Inductor" not in row


def test_a_report_prints_one_line_per_distinct_region() -> None:
    norm = RegionReport("layer_norm", "0123456789", "4x8 f32", True, "swapped: k runs at 2.00x", "k", "library", evaluation())
    softmax = RegionReport("softmax", "abc", "4x8 f32", False, "kept Inductor: no kernel")
    measured = GraphDecision("g", (("0123456789", "d"),), (), 3.0, 2.0, 0.01)
    graphs = [GraphReport("0/0", (norm, norm, softmax), measured=measured), GraphReport("1/0", (), "nothing")]
    lines = str(Report(graphs)).splitlines()
    (row,) = [line.split() for line in lines if "layer_norm" in line]
    assert row[:5] == ["0/0", "layer_norm", "01234567", "4x8", "f32"] and row[5] == "2" and "2.00" in row
    assert any("Inductor" in line and "no kernel" in line for line in lines if "softmax" in line)
    assert any(line.startswith(" 1/0") and "nothing" in line for line in lines)
    assert "2 graphs, 3 regions, 2 swapped" in lines[-2]
    assert lines[-1] == "graph 0/0, measured whole: Inductor 3.000 ms, with 1 kernel 2.000 ms: 1.50x (noise 1.0%)"
    vetoed = GraphDecision("g", (), (("0123456789", "d"),), 3.0, 4.0, 0.01)
    last = str(Report([GraphReport("0/0", (norm,), measured=vetoed)])).splitlines()[-1]
    assert last == "graph 0/0, measured whole: Inductor 3.000 ms, with 1 kernel 4.000 ms: none of them stays (noise 1.0%)"


def test_what_was_measured_about_the_whole_graph_is_in_its_report(decided: None) -> None:
    compiled = torch.compile(nn.LayerNorm(16), backend=backend.llmkernels)
    compiled(torch.ones(2, 16))
    (region,) = torch_llmkernels.report(compiled).regions
    (plan,) = backend.plan._plans.values()
    record = one_wins_one_loses(plan.tasks, None)[0].record
    request = read_request(None, None)
    key = graph_decision.graph_key(plan.tasks, request)
    vetoed = GraphDecision(key, (), ((region.key, record_digest(record)),), 1.0, 2.0, 0.01)
    graph_decision.remember(vetoed, "cpu", request.settings)
    torch._dynamo.reset()
    again = torch.compile(nn.LayerNorm(16), backend=backend.llmkernels)
    again(torch.ones(2, 16))
    (graph,) = torch_llmkernels.report(again)
    assert graph.measured.vetoed == vetoed.vetoed and not graph.regions[0].swapped and graph.regions[0].speedup == 2.0
