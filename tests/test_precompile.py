"""Precompilation: what is captured, planned, decided and remembered. Evaluations and whole-graph timings are scripted."""

from __future__ import annotations

import dataclasses
import itertools
import json
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from records import evaluation
from tasks import layer_norm_task
from torch import nn

from torch_llmkernels import graph_decision, plan, resolve, settings
from torch_llmkernels.cache import bundle
from torch_llmkernels.capture import Call, capture, capture_graphs
from torch_llmkernels.cli import main
from torch_llmkernels.errors import LLMKernelsError, SearchError, SettingsError
from torch_llmkernels.evaluation import Decision, Evaluation, Record
from torch_llmkernels.graph_decision import GraphDecision, graph_key
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.options import read_request
from torch_llmkernels.plan import record_digest
from torch_llmkernels.precompilation import precompile, run, whole_graph
from torch_llmkernels.precompilation.whole_graph import Paired, Variants, measure
from torch_llmkernels.precompilation.worth import PlannedRegion, within_whole
from torch_llmkernels.search.on_miss import Standing

KERNEL = Path(__file__).parent / "kernels" / "layer_norm.cpp"
needs_compiler = pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")


class Norms(nn.Module):
    """Layer norms of two widths, the first of them twice, and running statistics that a forward pass changes."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.again, self.narrow = nn.LayerNorm(32), nn.LayerNorm(32), nn.LayerNorm(8)
        self.linear = nn.Linear(32, 8)
        self.batch = nn.BatchNorm1d(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.narrow(self.batch(self.linear(self.again(self.wide(x).tanh()))))


def norms(args: Any) -> list[int]:
    """Widths of the layer norms among captured regions."""
    return [region.task.inputs[0].shape[-1] for region in args if region.task.signature == "layer_norm"]


@dataclasses.dataclass
class Evaluations:
    """Stands in for the worker: every kernel runs twice as fast as Inductor; remembers what was asked."""

    asked: list[str] = dataclasses.field(default_factory=list)
    outcome: Evaluation = dataclasses.field(default_factory=evaluation)
    interrupt_at: int = -1

    def __call__(self, task: Any, kernel: Any, record: Record | None, knobs: Any, binaries: str = "", **_: Any) -> Evaluation:
        if len(self.asked) == self.interrupt_at:
            raise KeyboardInterrupt
        self.asked.append(task.key)
        return dataclasses.replace(self.outcome, constants=(("GRAIN", 1),))


@pytest.fixture
def script(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Evaluations]:
    """A library of one kernel, an empty store, scripted evaluations, and a graph measurement that keeps every swap."""
    folder = tmp_path / "library" / "layer_norm"
    folder.mkdir(parents=True)
    (folder / "layer_norm.cpp").write_text(KERNEL.read_text())
    monkeypatch.setenv("LLMKERNELS_LIBRARY_DIR", str(tmp_path / "library"))
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "store"))
    evaluations = Evaluations()
    monkeypatch.setattr(resolve, "evaluate", evaluations)
    monkeypatch.setattr(run, "measure", keep_all)
    monkeypatch.setattr(run, "build_all", lambda won, knobs: None)
    plan.forget()
    yield evaluations
    plan.forget()


def keep_all(model: Any, calls: Any, graphs: Any, winners: dict[str, Record], **options: Any) -> list[GraphDecision]:
    pairs = tuple(sorted((record.task.key, record_digest(record)) for record in winners.values()))
    return [GraphDecision(graph.key, pairs, (), 2.0, 1.0, 0.01) for graph in graphs]


def test_capture_lists_forward_and_backward_regions_without_generating_code(script: Evaluations, monkeypatch) -> None:
    def refuse(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("Inductor was asked to generate code")

    monkeypatch.setattr("torch._inductor.graph.GraphLowering.run", refuse)
    x = torch.randn(4, 32)
    assert norms(capture(Norms().eval(), (x,))) == [32, 32, 8]
    backward = [r.task.signature for r in capture(Norms(), (x,), training=True)]
    assert backward.count("layer_norm_backward") == 3 and backward.count("layer_norm") == 3


def test_capture_leaves_the_model_as_it_was(script: Evaluations) -> None:
    model = Norms()
    model.linear.weight.grad = gradient = torch.ones(8, 32)
    state = torch.get_rng_state()
    capture(model, (torch.zeros(4, 32),), training=True)
    assert model.batch.num_batches_tracked == 0 and torch.equal(model.batch.running_mean, torch.zeros(8))
    assert model.linear.weight.grad is gradient and torch.equal(torch.get_rng_state(), state)


def test_capture_sees_every_graph_of_a_model_with_a_break(script: Evaluations) -> None:
    norm = nn.LayerNorm(8)

    def broken(x: torch.Tensor) -> torch.Tensor:
        x = norm(x)
        torch._dynamo.graph_break()
        return torch.softmax(x, -1)

    graphs = capture_graphs(broken, [Call((torch.randn(2, 8),))])
    assert [[task.signature for task in graph.tasks] for graph in graphs] == [["layer_norm"], ["softmax"]]


def test_dynamic_dimensions_give_symbolic_tasks(script: Evaluations) -> None:
    x = torch.randn(4, 32)
    (graph,) = capture_graphs(nn.LayerNorm(32), [Call((x,), dynamic_dims={0: [0]})])
    assert graph.tasks[0].is_dynamic and graph.tasks[0].inputs[0].shape[1] == 32
    with pytest.raises(LLMKernelsError, match=r"argument 0 has no dimensions \[5\].*0: 2 dimensions"):
        capture_graphs(nn.LayerNorm(32), [Call((x,), dynamic_dims={0: [5]})])


def test_inputs_on_another_device_are_named(script: Evaluations) -> None:
    with pytest.raises(LLMKernelsError, match="argument 0 is on meta, the model on cpu; move one of them"):
        precompile(nn.LayerNorm(8), (torch.randn(2, 8, device="meta"),))
    inside = {"xs": [torch.randn(2, 8), {"mask": torch.randn(2, 8, device="meta")}]}
    with pytest.raises(LLMKernelsError, match="argument xs is on meta, the model on cpu"):
        capture(nn.LayerNorm(8), kwargs=inside)


def test_the_plan_counts_equal_tasks_once_and_orders_by_worth(script: Evaluations) -> None:
    report = precompile(Norms().eval(), (torch.randn(4, 32),), dry_run=True)
    worths = [region.worth for region in report.regions]
    assert worths == sorted(worths, reverse=True)
    assert {(r.task.signature, r.task.inputs[0].shape[-1]): r.count for r in report.regions}[("layer_norm", 32)] == 2


@needs_compiler
def test_a_dry_run_verifies_nothing_and_estimates(script: Evaluations) -> None:
    report = precompile(Norms().eval(), (torch.randn(4, 32),), dry_run=True)
    assert script.asked == [] and not report.complete
    assert sum(region.seconds for region in report.regions if region.is_open) > 0
    assert "will verify" in str(report) and "to decide: 2 regions" in str(report)


@needs_compiler
def test_a_dry_run_shows_what_was_decided_before(script: Evaluations) -> None:
    """A kernel that was measured to lose here is shown as such, and is no winner."""
    model, x = Norms().eval(), torch.randn(4, 32)
    script.outcome = evaluation(time_ms=1.0)
    script.outcome = dataclasses.replace(script.outcome, baselines_ms=(("eager", 0.5), ("inductor", 0.9)))
    precompile(model, (x,))
    again = precompile(model, (x,), dry_run=True)
    assert "to decide: 0 regions" in str(again) and not again.winners
    assert [r.decision.reason for r in again.regions if r.decision] == [
        "kept Inductor: layer_norm runs at 0.50x the best baseline, 1.03x is needed"
    ] * 2


@needs_compiler
def test_decisions_are_remembered_and_not_made_again(script: Evaluations) -> None:
    model, x = Norms().eval(), torch.randn(4, 32)
    first = precompile(model, (x,))
    assert len(script.asked) == 2 and first.complete and len(first.swapped) == 2
    again = precompile(model, (x,))
    assert len(script.asked) == 2 and again.swapped == first.swapped
    assert "whole model: Inductor 2.000 ms, with 2 swaps 1.000 ms: 2.00x" in str(again)


@needs_compiler
def test_with_specialize_the_static_tasks_are_decided_too(script: Evaluations, tmp_path: Path, monkeypatch) -> None:
    """Where a kernel serves fixed sizes only, the backend looks a dynamic region up at the sizes at hand."""
    path = tmp_path / "library" / "layer_norm" / "layer_norm.cpp"
    path.write_text(KERNEL.read_text().replace("\nalign ", '\nstatic = ["rows"]\nalign '))
    x = [torch.randn(rows, 32) for rows in (4, 6)]  # the second number of rows makes a dynamic graph
    captured = capture_graphs(nn.LayerNorm(32), [Call((each,)) for each in x])
    (dynamic,) = [task for graph in captured for task in graph.tasks if task.is_dynamic]
    report = precompile(nn.LayerNorm(32), (x[0],), more_inputs=[(x[1],)], options={"specialize": True}, progress=False)
    assert dynamic.at().key in script.asked and dynamic.key not in script.asked
    assert report.complete and dynamic.key in report.swapped
    asked = len(script.asked)
    again = precompile(nn.LayerNorm(32), (x[0],), more_inputs=[(x[1],)], options={"specialize": True}, progress=False)
    assert len(script.asked) == asked and again.swapped == report.swapped
    assert "to decide: 0 regions" in str(precompile(nn.LayerNorm(32), (x[0],), more_inputs=[(x[1],)],
                                                    options={"specialize": True}, dry_run=True))  # fmt: skip


def test_a_veto_binds_the_static_kernel_of_a_dynamic_region(script: Evaluations) -> None:
    (graph,) = capture_graphs(nn.LayerNorm(32), [Call((torch.randn(4, 32),), dynamic_dims={0: [0]})])
    (task,) = graph.tasks
    record = Record(task.at(), "static", KERNEL.read_text(), (("GRAIN", 1),), "cpu", evaluation(), "library")
    request, paired = read_request(None, {"specialize": True}), Paired(1.0, 2.0, 0.5, 0.01)
    graph_decision.decide_from(paired, [task], [record], request)
    (decision,) = graph_decision.apply([task], [Decision(record, "swapped")], request)
    assert decision.record is None and "gains nothing" in decision.reason


def test_an_interrupted_precompilation_goes_on_where_it_was(script: Evaluations) -> None:
    model, x = Norms().eval(), torch.randn(4, 32)
    script.interrupt_at = 1
    with pytest.raises(KeyboardInterrupt):
        precompile(model, (x,))
    script.interrupt_at = -1
    assert precompile(model, (x,)).complete
    assert len(script.asked) == len(set(script.asked)) == 2


@needs_compiler
def test_what_the_budget_does_not_cover_stays_open(script: Evaluations) -> None:
    report = precompile(Norms().eval(), (torch.randn(4, 32),), budget=0)
    assert script.asked == [] and not report.complete and not report.swapped
    assert "the budget ended before 2 regions; run it again" in str(report)


@needs_compiler
def test_with_a_provider_what_no_kernel_wins_is_searched(script: Evaluations, monkeypatch) -> None:
    """A search that fails leaves its region open and the others theirs."""
    searched: list[tuple[str, float]] = []

    def search(task: Any, facts: Any, key: Any, store: Any, knobs: Any) -> Record:
        searched.append((task.key, knobs.search_budget_s))
        raise SearchError("the model has nothing to say")

    monkeypatch.setattr("torch_llmkernels.search.on_miss.search", search)
    model, x = Norms().eval(), torch.randn(4, 32)
    with settings.override(provider="replay:nowhere", search_budget_s=7.0, search_budget_tokens=1000):
        planned = precompile(model, (x,), dry_run=True)
        report = precompile(model, (x,))
    unserved = [region.task.key for region in planned.regions if not region.kernels]
    assert unserved and sorted(searched) == sorted((key, 7.0) for key in unserved)
    assert f"at most {1000 * len(planned.regions):,} tokens" in str(planned)
    assert not report.complete and len(report.swapped) == 2


class Searches:
    """Stands in for the searches: each pays `price` tokens for a reply, and finds nothing in three of them."""

    def __init__(self, price: int) -> None:
        self.price, self.paid = price, {}

    def standing(self, task: Any, store: Any) -> Standing:
        tokens, stop = self.paid.get(task.key, (0, ""))
        return Standing(tokens, 1.0, stop)

    def search(self, task: Any, facts: Any, key: Any, store: Any, knobs: Any) -> None:
        tokens, stop = self.paid.get(task.key, (0, ""))[0], "rounds: all are done"
        while tokens < 3 * self.price:
            if tokens + self.price > knobs.search_budget_tokens:
                stop = "budget: the next request could pass the limit (max_tokens; ...)"
                break
            tokens += self.price
        self.paid[task.key] = tokens, stop


@pytest.fixture
def searches(monkeypatch: pytest.MonkeyPatch) -> Iterator[Searches]:
    """Scripted searches of 3,000 tokens each, of which one may use 5,000."""
    found = Searches(1000)
    monkeypatch.setattr("torch_llmkernels.search.on_miss.search", found.search)
    monkeypatch.setattr("torch_llmkernels.search.on_miss.standing", found.standing)
    with settings.override(provider="replay:nowhere", search_budget_tokens=5000):
        yield found


class Unserved(nn.Module):
    """Three regions that the script's library has no kernel for."""

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return torch.softmax(x, -1), torch.softmax(x[:, :16], -1), torch.softmax(x[:, :8], -1)


@needs_compiler
def test_the_searches_of_a_call_share_its_tokens_and_the_next_call_goes_on(script: Evaluations, searches: Searches) -> None:
    model, x = Unserved(), torch.randn(4, 32)
    first = precompile(model, (x,), budget_tokens=4500)
    assert first.tokens == 4000 and not first.complete
    assert [tokens for tokens, _ in searches.paid.values()] == [3000, 1000]  # the third was not begun
    kept = [str(region.note) for region in first.regions if region.is_open]
    assert kept == ["the 4,500 tokens of this precompilation are spent (budget_tokens)"] * 2
    assert "kept Inductor, still to search: the 4,500 tokens" in str(first)
    assert "searches used 4,000 of 4,500 tokens" in str(first) and "run it again" in str(first)
    second = precompile(model, (x,), budget_tokens=10_000)
    assert second.tokens == 5000 and second.complete
    assert [tokens for tokens, _ in searches.paid.values()] == [3000, 3000, 3000]


@needs_compiler
def test_a_dry_run_estimates_no_more_tokens_than_the_call_may_use(script: Evaluations, searches: Searches) -> None:
    model, x = Unserved(), torch.randn(4, 32)
    assert "at most 15,000 tokens\n" in str(precompile(model, (x,), dry_run=True)) + "\n"
    assert "at most 4,500 tokens (budget_tokens)" in str(precompile(model, (x,), dry_run=True, budget_tokens=4500))
    assert not searches.paid


@needs_compiler
def test_without_tokens_what_is_there_is_verified_and_nothing_is_searched(script: Evaluations, searches: Searches) -> None:
    report = precompile(Norms().eval(), (torch.randn(4, 32),), budget_tokens=0)
    assert len(report.swapped) == 2 and not searches.paid and not report.complete
    with pytest.raises(SettingsError, match="budget_tokens must not be negative"):
        precompile(Unserved(), (torch.randn(4, 32),), budget_tokens=-1)


def test_a_model_without_regions_is_said_to_have_none(script: Evaluations) -> None:
    report = precompile(nn.Tanh(), (torch.randn(4),))
    assert report.complete and report.regions == () and "no swaps" in str(report)


@needs_compiler
def test_winners_are_exported(script: Evaluations, tmp_path: Path) -> None:
    report = precompile(Norms().eval(), (torch.randn(4, 32),), export=tmp_path / "model.llmk")
    names = zipfile.ZipFile(report.exported).namelist()
    assert sum(name.startswith("records/") for name in names) == 2
    assert sum(name.startswith("graphs/") for name in names) == 1


def test_a_bundle_that_cannot_be_written_is_refused_before_anything_is_verified(script: Evaluations, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for place in (tmp_path, tmp_path / "file" / "model.llmk", tmp_path / "nowhere" / "model.llmk"):
        with pytest.raises(LLMKernelsError, match="bundle cannot be written"):
            precompile(Norms().eval(), (torch.randn(4, 32),), export=place)
    assert script.asked == [] and not (tmp_path / "nowhere").exists()


@pytest.mark.parametrize("budget", [-5.0, float("nan")])
def test_a_budget_that_is_no_number_of_seconds_is_refused(budget: float) -> None:
    with pytest.raises(SettingsError, match="budget must be a number of seconds"):
        precompile(nn.Tanh(), (torch.randn(4),), budget=budget)


def test_shares_add_up_to_no_more_than_the_model() -> None:
    """Alone, each region pays for a call of its own, so the two of a tiny model can each take as long as all of it."""
    tasks = [layer_norm_task(rows, 16) for rows in (2, 4)]
    assert [r.share for r in within_whole([PlannedRegion(t, 1, "miss", share=1.0) for t in tasks])] == [0.5, 0.5]
    assert [r.share for r in within_whole([PlannedRegion(t, 1, "miss", share=0.25) for t in tasks])] == [0.25, 0.25]


def test_inputs_that_the_model_does_not_take_are_its_own_error(script: Evaluations) -> None:
    with pytest.raises(RuntimeError, match="expected input with shape") as raised:
        precompile(nn.LayerNorm(8), (torch.randn(2, 7),))
    assert "Dynamo" not in str(raised.value)


@pytest.fixture
def exported(script: Evaluations, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bundle of a model's two winners; the store is then another, empty one, as on another machine."""
    path = tmp_path / "model.llmk"
    precompile(Norms().eval(), (torch.randn(4, 32),), export=path)
    script.asked.clear()
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "elsewhere"))
    return path


@needs_compiler
def test_an_import_verifies_once_and_the_model_then_starts_warm(script: Evaluations, exported: Path, monkeypatch, capsys) -> None:
    built: list[str] = []
    monkeypatch.setattr(run, "build_all", lambda won, knobs: built.extend(won))
    assert main(["cache", "import", str(exported)]) == 0
    out = capsys.readouterr().out
    assert len(script.asked) == 2 and sorted(built) == sorted(script.asked)
    assert out.count("swapped: layer_norm runs at 2.00x") == 2
    again = precompile(Norms().eval(), (torch.randn(4, 32),), dry_run=True)
    assert [region.state for region in again.regions if region.kernels] == [] and len(script.asked) == 2
    assert main(["cache", "import", str(exported)]) == 0 and len(script.asked) == 2


@needs_compiler
def test_an_import_brings_what_lost_as_well(script: Evaluations, tmp_path: Path, monkeypatch) -> None:
    """The first compilation there verifies nothing again."""
    script.outcome = dataclasses.replace(evaluation(), baselines_ms=(("eager", 0.5),))
    precompile(Norms().eval(), (torch.randn(4, 32),), export=tmp_path / "model.llmk")
    tried = len(script.asked)
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "elsewhere"))
    assert main(["cache", "import", str(tmp_path / "model.llmk")]) == 0
    report = precompile(Norms().eval(), (torch.randn(4, 32),))
    assert tried == 2 == len(script.asked)
    reasons = [region.decision.reason for region in report.regions if region.decision]
    assert sum("as an imported bundle says" in reason for reason in reasons) == 2


@needs_compiler
def test_a_bundle_for_another_device_waits_and_says_so(script: Evaluations, exported: Path, tmp_path: Path, capsys) -> None:
    foreign = [
        dataclasses.replace(Record.from_json(json.loads(content)), device_kind="cpu-another")
        for name, content in bundle.read(exported).items()
        if name.startswith("records/")
    ]
    bundle.export(tmp_path / "foreign.llmk", foreign)
    assert main(["cache", "import", str(tmp_path / "foreign.llmk")]) == 0
    assert "2 candidates not verified here: they are for cpu-another, this device is cpu-" in capsys.readouterr().out
    assert script.asked == []


def test_contenders_take_turns_in_changing_order_each_after_an_untimed_call(monkeypatch) -> None:
    """Nobody is always the one that follows a certain other: whoever does finds caches that the other has filled."""
    called: list[str] = []
    timed: list[str] = []
    monkeypatch.setattr(whole_graph, "_repeats", lambda call, sync: 1)

    def sample(call: Callable[[], Any], repeats: int, sync: Any) -> float:
        timed.append(called[-1])
        return 1.0

    monkeypatch.setattr(whole_graph, "_sample_s", sample)
    whole_graph.samples_ms({name: lambda name=name: called.append(name) for name in "abc"}, "cpu", rounds=40)
    assert timed == called and all(sorted(timed[i : i + 3]) == list("abc") for i in range(0, 120, 3))
    assert {(a, b) for a, b in itertools.pairwise(timed) if a != b} == set(itertools.permutations("abc", 2))


def test_a_difference_counts_only_beyond_the_noise() -> None:
    steady = [1.0 + 0.001 * (i % 5) for i in range(25)]
    assert Paired.of([1.1 * t for t in steady], steady).second_is_faster
    assert not Paired.of(steady, steady).second_is_faster
    noisy = [1.0, 2.0, 0.5, 1.5, 0.8] * 5
    assert not Paired.of([1.05 * a for a in noisy], noisy[::-1]).second_is_faster


@pytest.fixture
def two_winners(script: Evaluations) -> tuple[nn.Module, Any, dict[int, str], dict[str, Record]]:
    """A model, its graphs, its layer norms' keys by width, and a record for each."""
    model = Norms().eval()
    graphs = capture_graphs(model, [Call((torch.randn(4, 32),))])
    tasks = {t.inputs[0].shape[-1]: t for t in graphs[0].tasks if t.signature == "layer_norm"}
    records = {
        t.key: Record(t, "layer_norm", KERNEL.read_text(), (), "cpu-test", evaluation(), "library") for t in tasks.values()
    }
    return model, graphs, {width: task.key for width, task in tasks.items()}, records


def scripted(monkeypatch: pytest.MonkeyPatch, cost: Callable[[frozenset[str]], float]) -> None:
    """Variants take the milliseconds that `cost` says of what is left out, instead of being compiled."""
    monkeypatch.setattr(Variants, "step", lambda self, vetoed: None)
    monkeypatch.setattr(Variants, "compare", lambda self, a, b, max_s: Paired(cost(a), cost(b), cost(a) / cost(b), 0.01))


def test_a_swap_that_slows_the_whole_model_down_is_vetoed(two_winners, monkeypatch) -> None:
    model, graphs, keys, records = two_winners
    scripted(monkeypatch, lambda vetoed: 5.0 + (keys[8] not in vetoed) - 2.0 * (keys[32] not in vetoed))
    (decision,) = measure(model, [Call()], graphs, records)
    assert dict(decision.vetoed).keys() == {keys[8]} and dict(decision.swapped).keys() == {keys[32]}
    assert decision.speedup == pytest.approx(5.0 / 3.0)


def test_nothing_is_swapped_if_the_whole_model_gains_nothing(two_winners, monkeypatch) -> None:
    model, graphs, _, records = two_winners
    scripted(monkeypatch, lambda vetoed: 1.0)
    (decision,) = measure(model, [Call()], graphs, records)
    assert dict(decision.vetoed).keys() == set(records) and not decision.swapped


def test_swaps_that_all_lose_are_vetoed_with_what_they_cost(two_winners, monkeypatch) -> None:
    model, graphs, keys, records = two_winners
    scripted(monkeypatch, lambda vetoed: 3.0 - len(vetoed & set(keys.values())))
    (decision,) = measure(model, [Call()], graphs, records)
    assert dict(decision.vetoed).keys() == set(records) and not decision.swapped
    assert (decision.inductor_ms, decision.swapped_ms, decision.speedup) == (1.0, 3.0, 1.0)


def test_the_backend_heeds_a_veto_for_the_kernel_that_was_measured(two_winners) -> None:
    _, graphs, keys, records = two_winners
    request = read_request(None, None)
    tasks = [task for task in graphs[0].tasks if task.key in records]
    decisions = [resolve.Decision(records[task.key], "swapped: it wins alone") for task in tasks]
    key = graph_key(tasks, request)
    vetoed = ((keys[8], record_digest(records[keys[8]])),)
    kept = ((keys[32], record_digest(records[keys[32]])),)
    graph_decision.remember(GraphDecision(key, kept, vetoed, 5.0, 4.0, 0.01), "cpu", request.settings)

    def outcome(task: Any, decisions: Any, request: Any) -> dict[str, Any]:
        return {t.key: d for t, d in zip(task, graph_decision.apply(task, decisions, request), strict=True)}

    applied = outcome(tasks, decisions, request)
    assert applied[keys[8]].record is None and "gains nothing" in applied[keys[8]].reason
    assert applied[keys[32]].record and "whole model 1.25x Inductor" in applied[keys[32]].reason

    edited = dataclasses.replace(records[keys[8]], kernel_text=KERNEL.read_text() + "// faster now\n")
    newer = [dataclasses.replace(d, record=edited) if d.record is records[keys[8]] else d for d in decisions]
    assert outcome(tasks, newer, request)[keys[8]].record is edited
    everything = read_request(None, {"swap": "correct"})
    assert outcome(tasks, decisions, everything)[keys[8]].record


def test_variants_swap_what_they_are_told(two_winners) -> None:
    _, graphs, keys, records = two_winners
    tasks = [task for task in graphs[0].tasks if task.key in records]
    decisions = [resolve.Decision(records[task.key], "swapped") for task in tasks]
    with graph_decision.forcing(frozenset({keys[32]})):
        applied = graph_decision.apply(tasks, decisions, read_request(None, None))
    assert [d.record is not None for d in applied] == [task.key != keys[32] for task in tasks]


SECOND_PROCESS = """
import socket, sys
import torch
from torch import nn
from torch_llmkernels import registry, resolve
from torch_llmkernels.kernels.targets import target_for

def refuse(*args, **kwargs):
    raise AssertionError("a warm start must not do this")

socket.socket.connect = resolve.evaluate = target_for("cpu").compile = refuse
torch.manual_seed(0)
model, x = nn.LayerNorm(32), torch.randn(4, 32)
with torch.no_grad():
    y = torch.compile(model, backend="llmkernels", options={"strict": True})(x)
torch.testing.assert_close(y, model(x))
assert [region.swapped for graph in registry.report() for region in graph.regions] == [True]
assert "openai" not in sys.modules and "torch_llmkernels.search" not in sys.modules
"""


@needs_compiler
def test_a_second_process_starts_warm(script: Evaluations, monkeypatch) -> None:
    """No verification, none of our compilers, no network: they are made to fail."""
    monkeypatch.setattr(run, "build_all", BUILD_ALL)
    torch.manual_seed(0)
    precompile(nn.LayerNorm(32), (torch.randn(4, 32),))
    done = subprocess.run([sys.executable, "-c", SECOND_PROCESS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


@needs_compiler
def test_a_second_process_starts_warm_from_an_imported_bundle(script: Evaluations, tmp_path: Path, monkeypatch, capsys) -> None:
    """The import verifies and builds in another store, beside a library that has no such kernel; then nothing is left to do."""
    torch.manual_seed(0)
    precompile(nn.LayerNorm(32), (torch.randn(4, 32),), export=tmp_path / "model.llmk")
    script.asked.clear()
    (tmp_path / "empty").mkdir()
    monkeypatch.setenv("LLMKERNELS_LIBRARY_DIR", str(tmp_path / "empty"))
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "elsewhere"))
    monkeypatch.setattr(run, "build_all", BUILD_ALL)
    assert main(["cache", "import", str(tmp_path / "model.llmk")]) == 0
    assert len(script.asked) == 1 and "swapped: layer_norm runs at 2.00x" in capsys.readouterr().out
    done = subprocess.run([sys.executable, "-c", SECOND_PROCESS], capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr


BUILD_ALL = run.build_all

FACTORY = """
import torch

def make():
    return torch.nn.LayerNorm(16), (torch.randn(2, 16),)

def one_tensor():
    return torch.nn.LayerNorm(16), torch.randn(2, 16)

def by_name():
    return torch.nn.LayerNorm(16), {"input": torch.randn(2, 16)}

def broken():
    raise ValueError("no weights here")
"""


@pytest.fixture
def factory(tmp_path: Path) -> Path:
    path = tmp_path / "factory.py"
    path.write_text(FACTORY)
    return path


def test_command_prints_the_plan_for_several_shapes(script: Evaluations, factory: Path, capsys) -> None:
    assert main(["precompile", f"{factory}:make", "--dry-run", "--input", "3x16", "--input", "5x16"]) == 0
    out = capsys.readouterr().out
    assert "2 graphs" in out and "3x16 f32" in out and "layer_norm" in out


@pytest.mark.parametrize("name", ["make", "one_tensor", "by_name"])
def test_command_takes_the_inputs_that_the_factory_returns(script: Evaluations, factory: Path, name: str, capsys) -> None:
    assert main(["precompile", f"{factory}:{name}", "--dry-run", "--device", "cpu"]) == 0
    assert "2x16 f32" in capsys.readouterr().out


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_command_says_that_a_device_is_not_here(script: Evaluations, factory: Path, capsys) -> None:
    assert main(["precompile", f"{factory}:make", "--device", "cuda"]) == 1
    assert "llmkernels: --device cuda:" in capsys.readouterr().err


def test_command_reports_a_factory_that_raises(script: Evaluations, factory: Path, capsys) -> None:
    assert main(["precompile", f"{factory}:broken"]) == 1
    assert "raised ValueError: no weights here" in capsys.readouterr().err


@pytest.mark.parametrize("wrong", [["--input", "3xb"], ["--input", "3:floaty"], ["--dynamic", "0"]])
def test_command_explains_wrong_inputs(script: Evaluations, factory: Path, wrong: list[str], capsys) -> None:
    assert main(["precompile", f"{factory}:make", *wrong]) == 2
    assert "such as" in capsys.readouterr().err


def test_settings_of_the_call_reach_the_lookup(script: Evaluations) -> None:
    with settings.override(swap="none"):
        report = precompile(nn.LayerNorm(16), (torch.randn(2, 16),))
    assert report.regions == () and script.asked == []


def test_one_variant_runs_as_the_user_would_run_it() -> None:
    """The step that is timed runs every call, backwards too, and leaves no gradients."""
    model, seen = nn.Linear(4, 4), []
    model.register_forward_hook(lambda module, args, output: seen.append(args[0].shape[0]))
    step = whole_graph.step_of(model, model, [Call((torch.ones(1, 4),)), Call((torch.ones(2, 4),))], training=True)
    step()
    assert seen == [1, 2] and model.weight.grad is None
    leaf = torch.ones(2, requires_grad=True)
    whole_graph.step_of(lambda x: x["a"][0], None, [Call(kwargs={"x": {"a": [leaf]}})], training=True)()
    assert leaf.grad is None
