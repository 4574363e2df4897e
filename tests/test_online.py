"""The first calls of a graph decide between its swaps and Inductor, if asked to or where it matters. The clock is scripted."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest
import tasks
import torch
from records import evaluation
from swapping import Kernels, record_of, swapping
from torch import nn

import torch_llmkernels
from torch_llmkernels import backend, graph_decision, online
from torch_llmkernels.evaluation import Decision
from torch_llmkernels.graph_decision import Paired
from torch_llmkernels.options import read_request
from torch_llmkernels.task import Task

CALLS = 2 * online.WARM_UP + 2 * online.PAIRS
"""After so many calls a clear difference is decided."""


def swap_timed(tasks, settings):
    return [Decision(dataclasses.replace(record_of(task), evaluation=evaluation()), "swapped: it is a test") for task in tasks]


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[Kernels]:
    with swapping(tmp_path, swap_timed) as kernels:
        yield kernels


def clock(monkeypatch: pytest.MonkeyPatch, plain: float, swapped: float) -> None:
    """Calls take these milliseconds, give or take a little."""

    def milliseconds(self):
        return [plain * (1 + i % 3 / 100) for i in range(24)], [swapped * (1 + i % 3 / 100) for i in range(24)]

    monkeypatch.setattr(online._HostClock, "milliseconds", milliseconds)


def compiled(model: nn.Module) -> nn.Module:
    return torch.compile(model, backend=backend.llmkernels, options={"whole_graph": "measure"})


@pytest.mark.parametrize(("plain", "swapped"), [(1.0, 2.0), (2.0, 1.0)])
def test_the_first_calls_decide_and_the_outcome_is_remembered(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch, plain: float, swapped: float
) -> None:
    clock(monkeypatch, plain, swapped)
    model, x = nn.Sequential(nn.LayerNorm(16), nn.Softmax(-1)), torch.randn(4, 16)
    with torch.no_grad():
        expected, first = model(x), compiled(model)
        for _ in range(CALLS):
            torch.testing.assert_close(first(x), expected)
        assert kernels.calls["softmax"] == CALLS / 2, "every call ran one variant, in turns"
        first(x)
        stays = swapped < plain
        assert kernels.calls["softmax"] == CALLS / 2 + stays
        (graph,) = torch_llmkernels.report(first)
        assert graph.measured.speedup == (2.0 if stays else 1.0)
        assert {region.swapped for region in graph.regions} == {stays}
        assert all(("2.00x" if stays else "gains nothing") in region.reason for region in graph.regions)

        torch._dynamo.reset()
        monkeypatch.setattr(online, "Trial", None)  # calling it would fail
        compiled(model)(x)
        assert kernels.calls["softmax"] == CALLS / 2 + 2 * stays


def test_swaps_that_cannot_be_told_apart_from_inductor_do_not_stay(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 1.0, 1.0)
    seen: list[Paired] = []
    trial = online.Trial(lambda: "swapped", lambda: "plain", "cpu", seen.append)
    for _ in range(2 * online.WARM_UP + 2 * online.PAIRS * online.LOOKS - 1):
        trial()
    assert trial.winner is None, "it goes on looking while there is nothing to see"
    trial()
    assert trial.winner() == "plain" and len(seen) == 1 and trial() == "plain"


def test_a_measurement_that_fails_costs_no_call(monkeypatch: pytest.MonkeyPatch) -> None:
    clock(monkeypatch, 1.0, 2.0)

    def full(paired: Paired) -> None:
        raise OSError("No space left on device")

    trial = online.Trial(lambda: "swapped", lambda: "plain", "cpu", full)
    for _ in range(2 * online.WARM_UP + 2 * online.PAIRS * online.LOOKS):
        assert trial() in ("swapped", "plain")
    assert trial.winner is not None


def test_what_is_not_measured_by_calls(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(online, "Trial", None)
    model, x = nn.LayerNorm(16), torch.randn(4, 16)
    compiled(model)(x).sum().backward()  # a training graph
    torch._dynamo.reset()
    with torch.no_grad():
        torch.compile(model, backend=backend.llmkernels)(x)  # not asked for
        torch._dynamo.reset()
        torch.compile(model, backend=backend.llmkernels, dynamic=True, options={"whole_graph": "measure"})(x)
        torch._dynamo.reset()
        with graph_decision.forcing(frozenset()):
            compiled(model)(x)
    assert kernels.calls["layer_norm"] == 4


def test_by_default_only_short_kernels_that_are_launched_one_by_one_are_measured() -> None:
    task = tasks.layer_norm_task(3, 64, device="cuda")

    def why_not(mean_ms: float, task: Task = task, mode: str | None = None, **options: str) -> str:
        found = dataclasses.replace(evaluation(), time_ms=mean_ms)
        records = [dataclasses.replace(record_of(task), evaluation=found)] * 3
        return online.why_not([task], records, [], read_request(mode, options))

    assert why_not(online.SHORT_MS / 2) == ""
    assert why_not(online.SHORT_MS / 2, mode="max-autotune-no-cudagraphs") == ""
    assert "launching" in why_not(online.SHORT_MS * 2)
    assert "launching" in why_not(online.SHORT_MS / 2, mode="reduce-overhead")  # a replay launches nothing
    assert "launching" in why_not(online.SHORT_MS / 2, task=tasks.layer_norm_task(3, 64))
    assert "not asked for" in why_not(online.SHORT_MS / 2, whole_graph="stored")
    assert why_not(online.SHORT_MS * 2, whole_graph="measure") == ""


@pytest.mark.parametrize("launched", [False, True])
def test_a_cuda_graph_that_the_user_records_meanwhile_gets_what_its_replay_is_good_for(
    monkeypatch: pytest.MonkeyPatch, launched: bool
) -> None:
    trial = online.Trial(lambda: "swapped", lambda: "plain", "cpu", lambda paired: None, launched)
    assert online.undecided()
    monkeypatch.setattr(online._HostClock, "must_not_run", lambda self: True)
    assert {trial() for _ in range(4)} == {"swapped" if launched else "plain"}


def test_both_variants_see_the_graph_as_dynamo_made_it(kernels: Kernels) -> None:
    """Pre-grad passes rewrite it in place; here every layer norm is followed by another one."""

    def norm_again(graph: torch.fx.Graph) -> None:
        for node in [n for n in graph.nodes if n.target is nn.functional.layer_norm]:
            with graph.inserting_after(node):
                again = graph.call_function(nn.functional.layer_norm, (node, (16,), *node.args[2:4]))
            node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)

    norm, x = nn.LayerNorm(16), torch.randn(4, 16)
    with torch.no_grad():
        nn.init.constant_(norm.weight, 2.0), nn.init.constant_(norm.bias, 1.0)
        options = {"whole_graph": "measure", "pre_grad_custom_pass": norm_again}
        measured = torch.compile(norm, backend=backend.llmkernels, options=options)
        for _ in range(2):
            torch.testing.assert_close(measured(x), norm(norm(x)))
    assert kernels.calls["layer_norm"] == 2, "one call of the variant with two kernels"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("graphs", [False, True], ids=["launches", "cuda graphs"])
def test_both_variants_give_the_same_answers_on_a_gpu(kernels: Kernels, graphs: bool) -> None:
    """Timed by events of the stream; with CUDA graphs each variant records its own."""
    model = nn.Sequential(nn.LayerNorm(64), nn.Softmax(-1)).cuda()
    options = {"whole_graph": "measure", "triton.cudagraphs": graphs}
    measured = torch.compile(model, backend=backend.llmkernels, options=options)
    with torch.no_grad():
        for _ in range(CALLS * online.LOOKS + 2):
            x = torch.randn(32, 64, device="cuda")
            torch.testing.assert_close(measured(x).clone(), model(x))
    (graph,) = torch_llmkernels.report(measured)
    assert graph.measured is not None and graph.measured.inductor_ms > 0
