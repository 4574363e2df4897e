"""Timing: in turns, on data that changes, and nothing skipped goes unseen. No test here asserts how long something takes."""

from __future__ import annotations

import dataclasses
import statistics
from typing import Any

import pytest
import torch
from tasks import contiguous, layer_norm_task, relu_add_task
from torch._dynamo.utils import counters
from torch._inductor import compile_fx
from torch._inductor.utils import fresh_cache

from torch_llmkernels.evaluate import timing
from torch_llmkernels.evaluate.baseline import compile_ahead, inductor, wrapper
from torch_llmkernels.evaluate.buffers import empty
from torch_llmkernels.evaluate.timing import Stopwatch, agree, make_sets
from torch_llmkernels.kernels.device import cpu_facts


def relu_add(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    torch.add(a, b, out=y).relu_()


@pytest.fixture
def stopwatch(monkeypatch: pytest.MonkeyPatch) -> Stopwatch:
    monkeypatch.setattr(timing, "inductor", lambda *_, **__: None)  # compiling is a test of its own
    return Stopwatch(relu_add_task(256), [], [], cpu_facts())


def test_the_kernel_and_its_baselines_are_timed_in_turns(stopwatch: Stopwatch) -> None:
    times = stopwatch.compare(relu_add, relu_add)
    assert times.kernel_ms > 0 and times.spread >= 0
    assert dict(times.baselines_ms).keys() == dict(times.ratios).keys() == {"eager"}
    assert times.mismatch is None


def test_ratios_are_taken_turn_by_turn() -> None:
    baseline, kernel = [2.0, 20.0, 2.0, 2.0], [1.0, 10.0, 1.0, 10.0]  # ten times slower in the second turn
    assert statistics.median(timing.paired(baseline, kernel)) == 2.0


def test_one_disturbed_turn_in_five_does_not_make_a_clear_win_doubtful() -> None:
    assert timing.lower_spread([2.0, 2.1, 0.1, 1.9, 2.0, 2.0, 50.0, 2.0]) < 0.1
    assert 2.0 * (1 - timing.lower_spread([2.0, 0.5, 0.6, 3.0, 2.0, 0.7, 2.5, 2.2])) < 1  # loses in three turns of eight


def test_it_is_clear_which_is_faster_only_when_every_turn_says_so() -> None:
    def subject(samples: list[float]) -> timing.Subject:
        made = timing.Subject("", [])
        made.samples = samples
        return made

    few, many = [1.0] * (timing.FEWEST_SAMPLES - 1), [1.0] * timing.FEWEST_SAMPLES
    twice, near, once_near = [2.0 * x for x in many], [1.05 * x for x in many], [*[2.0] * (len(many) - 1), 1.05]
    assert not timing.is_clear(subject(few), [subject([2.0] * len(few))])
    assert timing.is_clear(subject(many), [subject(twice)])
    assert not timing.is_clear(subject(many), [subject(twice), subject(near)])
    assert not timing.is_clear(subject(many), [subject(once_near)])
    assert timing.is_clear(subject(twice), [subject(many), subject([4.0] * len(many))])  # one baseline beats it
    assert timing.is_clear(subject(near), [subject(many)])  # a win needs more than 1, a loss is a loss
    assert not timing.is_clear(subject(near), [subject([*many[1:], 2.0])])


def test_constants_are_chosen_in_turns_with_workspaces_of_different_sizes() -> None:
    needs = [[contiguous("part", "float32", (5,)), contiguous("count", "int64", (2, 3))], []]
    watch = Stopwatch(relu_add_task(64), [], [timing.scratch(needs)], cpu_facts())
    seen = set()

    def with_workspaces(y: torch.Tensor, part: torch.Tensor, count: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        part.fill_(1.0)
        count.zero_()
        seen.add((part.shape, count.shape, count.data_ptr() % 256, bool(part.sum() == 5)))
        relu_add(y, a, b)

    assert len(watch.sweep([(with_workspaces, needs[0]), (relu_add, needs[1])])) == 2
    assert {(*row[:2], row[3]) for row in seen} == {((5,), (2, 3), True)}


def test_an_answer_kept_by_address_is_found(stopwatch: Stopwatch) -> None:
    kept: dict[int, torch.Tensor] = {}

    def remembers(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        if a.data_ptr() not in kept:
            kept[a.data_ptr()] = torch.relu(a + b)
        y.copy_(kept[a.data_ptr()])

    assert "differs" in (stopwatch.compare(remembers, relu_add).mismatch or "")


def test_work_skipped_under_timing_is_found(stopwatch: Stopwatch) -> None:
    calls = []

    def lazy(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        calls.append(None)
        if len(calls) < 10:
            relu_add(y, a, b)

    assert "differs" in (stopwatch.compare(lazy, relu_add).mismatch or "")


def test_every_call_of_a_sample_has_data_of_its_own() -> None:
    sets = make_sets(relu_add_task(256), [], cpu_facts())
    assert len(sets) >= 2
    assert len({s.inputs[0].data_ptr() for s in sets}) == len({s.outputs[0].data_ptr() for s in sets}) == len(sets)
    assert not torch.equal(sets[0].inputs[0], sets[1].inputs[0])


def test_parameters_and_statistics_keep_their_values() -> None:
    task = dataclasses.replace(layer_norm_task(), constant=("weight",))
    watch = Stopwatch(task, [], [], cpu_facts())
    before = [t.clone() for t in watch._sets[0].inputs]
    watch._renew()
    changed = [not torch.equal(a, b) for a, b in zip(before, watch._sets[0].inputs, strict=True)]
    assert changed == [True, False, True]
    outputs = watch._sets[0].outputs
    assert outputs[0].unique().numel() == 1


def test_agreement_is_to_rounding() -> None:
    a = torch.randn(1000)
    assert agree(a, a * (1 + 1e-7)) and not agree(a, a * 1.001)
    with_nan = a.clone()
    with_nan[3] = float("nan")
    assert not agree(a, with_nan) and agree(with_nan, with_nan)


def test_inductor_s_own_wrapper_is_the_baseline() -> None:
    task = layer_norm_task(16, 64)
    inputs = [empty(t, "cpu").normal_() for t in task.inputs]
    call = inductor(task, inputs)
    assert call is not None and inductor(task, inputs) is call
    fresh = [torch.randn_like(t) for t in inputs]
    (got,) = call(fresh)
    assert torch.allclose(got, torch.nn.functional.layer_norm(fresh[0], (64,), *fresh[1:]), atol=1e-5)


def test_a_kernel_on_the_cpu_is_timed_beside_the_wrapper_that_the_baseline_pays(
    stopwatch: Stopwatch, monkeypatch: pytest.MonkeyPatch
) -> None:
    paid: list[str] = []
    monkeypatch.setattr(timing, "wrapper", lambda: lambda: paid.append("wrapper"))
    for call in (calls := stopwatch._kernel_calls(lambda *_: paid.append("kernel"))):
        call()
    assert paid == ["kernel", "wrapper"] * len(calls)
    assert wrapper()() is not None  # it compiles here


def test_a_program_that_inductor_refuses_leaves_eager(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise RuntimeError("unsupported")

    monkeypatch.setattr("torch._inductor.compile_fx.compile_fx", refuse)
    assert inductor(relu_add_task(32, "float64"), [torch.randn(32).double()] * 2) is None


def test_workspaces_come_between_outputs_and_inputs() -> None:
    (data, *_) = make_sets(relu_add_task(64), [contiguous("scratch", "float32", (5,))], cpu_facts())
    assert [t.numel() for t in data.tensors] == [64, 5, 64, 64]


def test_a_baseline_that_was_compiled_ahead_is_found_in_torchs_cache() -> None:
    task = relu_add_task(320)
    with fresh_cache():
        compile_ahead(task)
        counters.clear()
        assert inductor(task, [torch.randn(320), torch.randn(320)]) is not None
        assert counters["inductor"]["fxgraph_cache_hit"] == 1 and counters["inductor"]["fxgraph_cache_miss"] == 0
        assert not counters["aot_autograd"]["autograd_cache_hit"]  # which would hide the call without its wrapper


def test_a_baseline_is_compiled_for_the_sizes_of_the_task(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[torch.Size] = []
    compile_inner = compile_fx.compile_fx_inner

    def watched(gm: torch.fx.GraphModule, inputs: list[torch.Tensor], **options: Any) -> Any:
        seen.extend(t.shape for t in inputs)
        return compile_inner(gm, inputs, **options)

    monkeypatch.setattr(compile_fx, "compile_fx_inner", watched)
    assert inductor(relu_add_task(321), [torch.randn(321), torch.randn(321)]) is not None
    assert [tuple(map(type, shape)) for shape in seen] == [(int,), (int,)] and seen[0] == (321,)
