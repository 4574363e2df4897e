"""The lookup order and the decision, with evaluations that are scripted instead of measured."""

from __future__ import annotations

import contextlib
import dataclasses
import queue
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from tests.records import KERNEL, evaluation
from tests.tasks import layer_norm_task, softmax_task
from torch_llmkernels import resolve
from torch_llmkernels.cache.library import Library
from torch_llmkernels.cache.store import Store
from torch_llmkernels.errors import LLMKernelsError, ToolchainMissing
from torch_llmkernels.evaluate.candidate import Binaries
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluation import Evaluation, Record, Status
from torch_llmkernels.kernels import cuda
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.kernels.source import Kernel, parse_kernel
from torch_llmkernels.kernels.targets import on_device_of, target_for
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task

TASK = layer_norm_task(8, 64)
FAST = KERNEL.replace("UNROLL = [1, 4]", "UNROLL = [1, 2]")
pytestmark = pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")


@dataclasses.dataclass
class Script:
    """Evaluations by kernel name, and the jobs that were asked for."""

    outcomes: dict[str, Evaluation]
    asked: list[tuple[str, bool]] = dataclasses.field(default_factory=list)
    limits: list[float] = dataclasses.field(default_factory=list)
    second: dict[str, Evaluation] = dataclasses.field(default_factory=dict)  # of those that are timed again, if another

    def __call__(
        self, task: object, kernel: Kernel, record: Record | None, settings: Settings, binaries: str = "",
        again: Evaluation | None = None, limit_s: float = 0.0,
    ) -> Evaluation:  # fmt: skip
        self.limits.append(limit_s)
        self.asked.append((kernel.name, record is not None))
        outcome = self.second.get(kernel.name, self.outcomes[kernel.name]) if again else self.outcomes[kernel.name]
        if settings.swap == "correct" and outcome.status is Status.TIMED:
            return evaluation(Status.CORRECT)
        return outcome


def timed(ms: float, baseline: float = 2.0, spread: float = 0.01) -> Evaluation:
    return dataclasses.replace(evaluation(), time_ms=ms, baselines_ms=(("eager", 9.0), ("inductor", baseline)), spread=spread)


@pytest.fixture
def setup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """A library of two kernels of layer_norm, a store, and a script of outcomes."""
    folder = tmp_path / "library" / "layer_norm"
    folder.mkdir(parents=True)
    (folder / "slow.cpp").write_text(KERNEL)
    (folder / "fast.cpp").write_text(FAST)
    script = Script({"slow": timed(1.9), "fast": timed(1.0)})
    monkeypatch.setattr(resolve, "evaluate", script)
    store = Store(tmp_path / "store")

    def make(**knobs: object) -> resolve.Resolver:
        return resolve.Resolver(Settings(**knobs), Library(tmp_path / "library"), store)

    yield make, script
    store.close()


def test_the_fastest_correct_kernel_is_swapped_in(setup) -> None:
    make, script = setup
    decision = make().decide(TASK)
    assert decision.record and decision.record.kernel_name == "fast"
    assert "2.00x" in decision.reason and len(script.asked) == 2


def test_a_decision_is_remembered(setup) -> None:
    make, script = setup
    first = make().decide(TASK)
    script.asked.clear()
    assert make().decide(TASK) == first
    assert script.asked == []


def test_an_edited_kernel_is_verified_and_the_others_are_not(setup) -> None:
    make, script = setup
    resolver = make()
    resolver.decide(TASK)
    script.asked.clear()
    path = resolver.library.root / "layer_norm" / "slow.cpp"
    path.write_text(KERNEL + "// edited\n")
    script.outcomes["slow"] = timed(0.5)
    assert make().decide(TASK).record.kernel_name == "slow"
    assert [name for name, _ in script.asked] == ["slow"]


def test_a_kernel_that_does_not_win_keeps_inductor_and_says_by_how_much(setup) -> None:
    make, script = setup
    script.outcomes = {"slow": timed(3.0), "fast": timed(2.0)}
    decision = make().decide(TASK)
    assert decision.record is None
    assert decision.reason == "kept Inductor: fast runs at 1.00x the best baseline, 1.03x is needed"


def test_a_win_that_saves_less_than_a_call_costs_is_none(setup) -> None:
    make, script = setup
    baselines, ratios = (("eager", 0.02), ("inductor", 0.008)), (("eager", 5.0), ("inductor", 2.0))
    tiny = dataclasses.replace(timed(0.004), baselines_ms=baselines, ratios=ratios)
    script.outcomes = {"slow": timed(3.0), "fast": dataclasses.replace(tiny, spread=0.8)}
    decision = make().decide(TASK)
    assert decision.record is None and [name for name, _ in script.asked] == ["fast", "slow"]  # noise changes nothing: timed once
    assert decision.reason.endswith("and saves 4.0 us, less than a call of its own costs in the graph")


def test_a_win_inside_the_noise_is_timed_again_and_no_win_if_it_stays_there(setup) -> None:
    make, script = setup
    script.outcomes = {"slow": timed(3.0), "fast": timed(0.82, spread=0.8)}
    decision = make().decide(TASK)
    assert decision.record is None and [name for name, _ in script.asked] == ["fast", "fast", "slow"]
    assert "too noisy to tell: fast runs at 2.44x the best baseline, but at 0.49x at the lower quartile" in decision.reason
    assert decision.reason.endswith("later processes time it again, try 1 of 3")


def test_a_win_that_a_second_timing_makes_clear_is_a_win(setup) -> None:
    make, script = setup
    script.outcomes["fast"], script.second["fast"] = timed(0.82, spread=0.8), timed(0.9)
    assert make().decide(TASK).record.kernel_name == "fast"
    script.asked.clear()
    assert make().decide(TASK).reason == "swapped: fast runs at 2.22x the best baseline" and script.asked == []


def test_noise_is_remembered_for_good_after_three_processes(setup) -> None:
    make, script = setup
    script.outcomes = {"slow": timed(3.0), "fast": timed(0.82, spread=0.8)}
    for times in (1, 2, 3):
        in_another_process()
        reason = make().decide(TASK).reason
        assert make().decide(TASK).reason == reason
        assert reason.endswith(f"try {times} of 3" if times < 3 else f"to time it again: llmkernels cache rm {TASK.key}")
    in_another_process()
    script.outcomes["fast"] = timed(0.82)
    assert make().decide(TASK).reason == reason


def test_a_quiet_process_undoes_what_noise_decided(setup) -> None:
    make, script = setup
    script.outcomes = {"slow": timed(3.0), "fast": timed(0.82, spread=0.8)}
    assert make().decide(TASK).record is None
    in_another_process()
    script.outcomes["fast"] = timed(0.82)
    decision = make().decide(TASK)
    assert decision.record.kernel_name == "fast" and len(decision.tried) == 2


def at_home(setup, **outcomes: Evaluation) -> tuple[resolve.RecordKey, resolve.Decision]:
    """What another process found at this key, taken out of the store again."""
    make, script = setup
    script.outcomes |= outcomes
    resolver = make()
    resolver.decide(TASK)
    key = resolve.RecordKey.of(TASK, target_for("cpu").facts())
    found = resolver.store.decision(key)
    resolver.store.delete(f"decision/{key.text}")
    script.asked.clear()
    in_another_process()
    return key, found


def test_what_lost_elsewhere_is_not_verified_here(setup) -> None:
    """A bundle's word is enough to keep Inductor: that can cost speed, never a right answer."""
    make, script = setup
    key, found = at_home(setup, slow=timed(3.0), fast=evaluation(Status.WRONG))
    make().store.put_imported_decision(key, found)
    reason = make().decide(TASK).reason
    assert script.asked == [] and "as an imported bundle says" in reason
    assert "0.67x the best baseline" in reason and "wrong" in reason
    assert reason.endswith(f"llmkernels cache rm {TASK.key}")
    assert make(on_miss="error").decide(TASK).reason == reason
    assert make(swap="correct").decide(TASK).record.kernel_name == "slow"


def test_what_won_elsewhere_is_verified_and_what_lost_beside_it_is_not(setup) -> None:
    make, script = setup
    key, found = at_home(setup, slow=timed(3.0), fast=timed(1.0))
    make().store.put_imported_decision(key, found)
    assert make().decide(TASK).record.kernel_name == "fast" and [name for name, _ in script.asked] == ["fast"]


@pytest.mark.parametrize("field", ["unit", "torch", "driver", "device_kind"])
def test_what_lost_on_another_device_or_torch_is_verified(setup, field: str) -> None:
    make, script = setup
    key, found = at_home(setup, slow=timed(3.0), fast=timed(3.0))
    make().store.put_imported_decision(dataclasses.replace(key, **{field: "another"}), found)
    make().decide(TASK)
    assert len(script.asked) == 2


def test_what_lost_elsewhere_by_chance_is_verified(setup) -> None:
    make, script = setup
    key, found = at_home(setup, slow=evaluation(Status.TIMEOUT), fast=timed(0.82, spread=0.8))
    make().store.put_imported_decision(key, found)
    make().decide(TASK)
    assert {name for name, _ in script.asked} == {"slow", "fast"}


def test_noise_of_a_kernel_beside_a_winner_is_left_alone(setup) -> None:
    make, script = setup
    script.outcomes["slow"] = timed(1.8, spread=0.3)
    assert make().decide(TASK).record.kernel_name == "fast"
    in_another_process()
    script.asked.clear()
    assert make().decide(TASK).record.kernel_name == "fast" and script.asked == []


def test_the_second_timing_is_of_the_same_constants_and_not_cut_short(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = setup
    jobs: list[Job] = []

    class Recorder:
        def evaluate(self, job: Job) -> Evaluation:
            jobs.append(job)
            return dataclasses.replace(timed(1.8, spread=0.3), constants=(("UNROLL", 4),))

    monkeypatch.undo()  # of the script
    monkeypatch.setattr(resolve, "worker", lambda settings: Recorder())
    make().decide(TASK)
    assert [(job.brief, job.constants) for job in jobs[:2]] == [(True, None), (False, {"UNROLL": 4})]


def test_a_wrong_kernel_is_never_swapped_in(setup) -> None:
    make, script = setup
    script.outcomes["fast"] = evaluation(Status.WRONG)
    assert make().decide(TASK).record.kernel_name == "slow"
    assert script.asked == [("fast", False), ("slow", False)]


def test_the_reason_of_a_wrong_kernel_says_what_by_how_much_and_how_to_see_it(setup) -> None:
    make, script = setup
    detail = "output y, distribution wide: 3.2 times the error allowed. Relative Frobenius error 1e-3 (eager 1e-7), ..."
    script.outcomes = dict.fromkeys(("slow", "fast"), dataclasses.replace(evaluation(Status.WRONG), detail=detail))
    reason = make().decide(TASK).reason
    assert reason.count("wrong: output y, distribution wide: 3.2 times the error allowed") == 2 and "Frobenius" not in reason
    assert reason.endswith(f"; to see it: llmkernels repro {TASK.key} --kernel fast")


def in_another_process() -> None:
    """What follows is as another process would see it."""
    resolve._failed_here.clear()


def test_a_kernel_that_timed_out_is_tried_by_three_processes(setup) -> None:
    """A busy machine may have been the cause; for how long it stays busy, nobody knows."""
    make, script = setup
    script.outcomes = {"slow": evaluation(Status.WRONG), "fast": evaluation(Status.TIMEOUT)}
    for times in (1, 2, 3):
        in_another_process()
        script.asked.clear()
        reason = make().decide(TASK).reason
        assert make().decide(TASK).reason == reason  # at most once in each
        assert f"timeout, try {times} of 3" in reason and reason.endswith(f"llmkernels cache rm {TASK.key}")
        assert [name for name, _ in script.asked] == (["fast", "slow"] if times == 1 else ["fast"])
    in_another_process()
    script.outcomes["fast"] = timed(1.0)
    assert make().decide(TASK).reason == reason
    (name,) = make().store.keys("decision/")
    assert TASK.key in name and make().store.delete(name)
    assert make().decide(TASK).record.kernel_name == "fast"


def test_a_full_machine_bans_no_kernel(setup) -> None:
    """What ran out of memory is tried by as many processes as what timed out; the two count together."""
    make, script = setup
    outcomes = [evaluation(Status.FAILED), evaluation(Status.TIMEOUT), evaluation(Status.FAILED)]
    script.outcomes["slow"] = evaluation(Status.WRONG)
    for times, outcome in enumerate(outcomes, start=1):
        in_another_process()
        script.outcomes["fast"] = outcome
        assert f"fast@{parse_kernel(FAST, 'fast').digest[:8]} {outcome.status}, try {times} of 3" in make().decide(TASK).reason
    in_another_process()
    script.outcomes["fast"] = timed(1.0)
    assert make().decide(TASK).record is None


def test_a_kernel_that_ran_out_of_memory_once_wins_in_the_next_process(setup) -> None:
    make, script = setup
    script.outcomes["fast"] = evaluation(Status.FAILED)
    assert make().decide(TASK).record.kernel_name == "slow"
    in_another_process()
    script.outcomes["fast"] = timed(1.0)
    assert make().decide(TASK).record.kernel_name == "fast"


def test_a_try_that_ends_in_another_way_is_what_counts(setup) -> None:
    make, script = setup
    script.outcomes["fast"] = evaluation(Status.TIMEOUT)
    assert make().decide(TASK).record.kernel_name == "slow"
    in_another_process()
    script.outcomes["fast"] = timed(1.0)
    decision = make().decide(TASK)
    assert decision.record.kernel_name == "fast" and len(decision.tried) == 2


def test_a_kernel_that_crashed_is_tried_once_more_where_nobody_waits(setup) -> None:
    """A crash can hang a device."""
    make, script = setup
    script.outcomes["fast"] = evaluation(Status.CRASHED)
    make().decide(TASK)
    in_another_process()
    script.asked.clear()
    make().decide(TASK)
    assert script.asked == []
    for expected in (["fast"], []):
        in_another_process()
        script.asked.clear()
        resolver = make()
        resolver.offline = True
        resolver.decide(TASK)
        assert [name for name, _ in script.asked] == expected


def test_swap_correct_needs_no_times(setup) -> None:
    make, script = setup
    script.outcomes = {"slow": timed(3.0), "fast": evaluation(Status.WRONG)}
    assert make(swap="correct").decide(TASK).record.kernel_name == "slow"


def test_a_check_without_times_is_repeated_with_times_when_speed_decides(setup) -> None:
    make, script = setup
    make(swap="correct").decide(TASK)
    script.asked.clear()
    assert make().decide(TASK).record.kernel_name == "fast"
    assert {name for name, _ in script.asked} == {"slow", "fast"}


def test_swap_none_looks_at_nothing(setup) -> None:
    make, script = setup
    assert make(swap="none").decide(TASK).record is None
    assert script.asked == []


def test_no_kernel_of_the_signature(setup) -> None:
    make, _ = setup
    assert make().decide(softmax_task()).reason == "kept Inductor: no kernel implements softmax for this task on cpu"


def test_on_miss_error_raises_where_no_kernel_serves(setup) -> None:
    make, script = setup
    with pytest.raises(LLMKernelsError, match="softmax"):
        make(on_miss="error").decide(softmax_task())
    script.outcomes = {"slow": evaluation(Status.WRONG), "fast": timed(4.0)}
    assert "0.50x the best baseline" in make(on_miss="error").decide(TASK).reason  # it serves, Inductor is faster


def test_a_decision_holds_for_the_library_it_was_made_with(setup, tmp_path: Path) -> None:
    """What the store remembers of another library's kernel is not swapped in; of those that were tried, the next best is."""
    make, script = setup
    resolver = make()
    assert resolver.decide(TASK).record.kernel_name == "fast"
    script.asked.clear()
    one = tmp_path / "one" / "layer_norm"
    one.mkdir(parents=True)
    (one / "slow.cpp").write_text(KERNEL)
    other = resolve.Resolver(Settings(), Library(one.parent), resolver.store)
    assert other.decide(TASK).record.kernel_name == "slow" and script.asked == []
    (tmp_path / "none").mkdir()
    decision = resolve.Resolver(Settings(), Library(tmp_path / "none"), resolver.store).decide(TASK)
    assert decision.record is None and "no kernel implements layer_norm" in decision.reason
    assert make().decide(TASK).record.kernel_name == "fast" and script.asked == []


def test_what_a_search_found_holds_for_every_library(setup, tmp_path: Path) -> None:
    make, _ = setup
    resolver = make()
    key = resolve.RecordKey.of(TASK, target_for("cpu").facts())
    resolver.store.put_winner(key, Record(TASK, "found", FAST, (), key.device_kind, timed(0.5), "search:autumn"))
    decision = resolve.Resolver(Settings(), Library(tmp_path / "none"), resolver.store).decide(TASK)
    assert decision.record is not None and decision.record.kernel_name == "found"


def test_without_a_compiler_it_is_said_once_and_strict_raises(setup, caplog: pytest.LogCaptureFixture) -> None:
    make, _ = setup
    for _ in range(2):
        assert "no C++ compiler" in make(cxx="/nowhere/g++").decide(TASK).reason
    assert caplog.text.count("regions on cpu stay with Inductor: no C++ compiler (/nowhere/g++)") == 1
    with pytest.raises(ToolchainMissing, match="strict=True"):
        make(cxx="/nowhere/g++", strict=True).decide(TASK)


def test_a_spent_verification_budget_keeps_inductor_until_the_next_time(setup) -> None:
    make, script = setup
    assert "budget is spent" in make(verify_budget_s=0.0).decide(TASK).reason
    assert script.asked == []
    assert make().decide(TASK).record.kernel_name == "fast"


def test_an_evaluation_may_take_what_is_left_of_the_budget_and_a_little(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    make, script = setup
    clock = iter(range(0, 1000, 15))
    monkeypatch.setattr(resolve.time, "monotonic", lambda: float(next(clock)))
    make(verify_budget_s=80.0).decide(TASK)
    first, second = script.limits
    assert second < first <= 80.0 + resolve.GRACE_S


def test_what_the_budget_cuts_short_stays_open(setup) -> None:
    make, script = setup
    script.outcomes = {"fast": evaluation(Status.WRONG), "slow": evaluation(Status.TIMEOUT)}
    assert "budget is spent" in make(verify_budget_s=20.0).decide(TASK).reason
    script.outcomes["slow"] = timed(1.0)
    assert make().decide(TASK).record.kernel_name == "slow"


def test_a_kernel_that_all_of_the_budget_is_too_short_for_has_timed_out(setup) -> None:
    """Else every process would spend its budget on it."""
    make, script = setup
    script.outcomes = {"fast": evaluation(Status.TIMEOUT), "slow": timed(1.0)}
    assert make(verify_budget_s=20.0).decide(TASK).record.kernel_name == "slow"
    script.asked.clear()
    assert make(verify_budget_s=20.0).decide(TASK).record.kernel_name == "slow" and script.asked == []


def test_a_verification_says_once_what_it_begins_with(setup, monkeypatch: pytest.MonkeyPatch, caplog) -> None:
    make, _ = setup
    kind, made = resolve.Resolver, make()
    monkeypatch.setattr(resolve, "Resolver", lambda settings: kind(settings, made.library, made.store))
    tasks = [TASK, layer_norm_task(16, 64), softmax_task()]
    resolve.resolve(tasks, Settings())
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert line.startswith("verifying up to 4 kernels for 2 regions, once per device (at most about 120 s: verify_budget_s)")
    caplog.clear()
    resolve.resolve(tasks, Settings())
    assert caplog.records == []


def test_while_another_process_verifies_inductor_is_kept(setup) -> None:
    make, script = setup
    resolver = make()
    key = resolve.RecordKey.of(TASK, target_for("cpu").facts())
    with resolver.store.lock(key.text) as mine:
        assert mine
        other = resolve.Resolver(Settings(), resolver.library, Store(resolver.store.directory))
        assert "another process" in other.decide(TASK).reason
        other.store.close()
    assert script.asked == []


def test_what_another_process_verified_just_before_is_not_verified_again(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look-up and the lock, the process that held it finishes."""
    make, script = setup
    resolver, other = make(), make()
    other.store = Store(resolver.store.directory)
    lock = resolver.store.lock

    def late(key: str, wait: bool = False) -> contextlib.AbstractContextManager[bool]:
        other.decide(TASK)
        return lock(key, wait)

    monkeypatch.setattr(resolver.store, "lock", late)
    assert resolver.decide(TASK).record.kernel_name == "fast"
    assert sorted(name for name, _ in script.asked) == ["fast", "slow"]  # once each
    other.store.close()


def test_equal_tasks_share_one_decision(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    make, script = setup
    resolver = make()
    monkeypatch.setattr(resolve, "Resolver", lambda settings: resolver)
    first, second = resolve.resolve([TASK, layer_norm_task(8, 64)], Settings())
    assert first is second and len(script.asked) == 2


def test_a_kernel_that_cannot_serve_the_task_is_named_with_its_reason(setup) -> None:
    make, _ = setup
    reason = make().decide(layer_norm_task(8, 64, "float64")).reason
    assert "fast: " in reason and "float64" in reason


def test_rows_that_no_stride_walks_over_are_said_first(setup) -> None:
    """What a patch embedding leaves: a matrix per image, channels in front of patches in memory."""
    make, _ = setup
    task = layer_norm_task(8, 64)
    spec = dataclasses.replace(task.inputs[0], shape=(4, 8, 64), stride=(512, 1, 8))
    resolver = make()
    path = resolver.library.root / "layer_norm" / "slow.cpp"
    for name in ("slow", "fast"):
        path.with_stem(name).write_text(KERNEL.replace("dtypes", 'where = ["x.ndim == 2"]\ndtypes'))
    reason = make().decide(dataclasses.replace(task, inputs=(spec, *task.inputs[1:]))).reason
    assert "serves this task (rows cannot be merged: x of shape (4, 8, 64) has strides (512, 1, 8); fast: " in reason


def test_kernels_of_later_tasks_compile_in_a_process_of_their_own(
    setup, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    make, _ = setup
    compiled: queue.SimpleQueue[tuple[str, str, bool]] = queue.SimpleQueue()

    class Compiler:
        def compile(self, job: Job) -> None:
            compiled.put((job.task.key, job.kernel_name, job.timed))

    monkeypatch.setattr(resolve, "worker", lambda settings, purpose: Compiler())
    other = layer_norm_task(16, 64)
    make()._compile_ahead([TASK, other], str(tmp_path), threading.Event(), 0)
    found = {compiled.get(timeout=60) for _ in range(4)}
    assert {job[:2] for job in found} == {(task.key, name) for task in (TASK, other) for name in ("slow", "fast")}
    assert sorted(key for key, _, baseline in found if baseline) == sorted([TASK.key, other.key])


def test_a_rank_verifies_on_its_own_device(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rank 5 of a host sets device 5 before it compiles: its facts, evaluations and compilations ahead are of that one."""
    make, _ = setup
    seen: list[int | None] = []
    jobs: list[Job] = []

    class Fifth(type(target_for("cpu"))):
        def current(self) -> int:
            return 5

        def facts(self, index: int | None = None) -> DeviceFacts:
            seen.append(index)
            return super().facts(index)

    class Recorder:
        def evaluate(self, job: Job) -> Evaluation:
            jobs.append(job)
            return evaluation(Status.WRONG)

        def compile(self, job: Job) -> None:
            jobs.append(job)

    monkeypatch.undo()  # of the script
    monkeypatch.setattr(resolve, "target_for", lambda name: Fifth())
    monkeypatch.setattr(resolve, "worker", lambda settings, purpose="": Recorder())
    monkeypatch.setattr(resolve, "AHEAD", {"cpu"})
    resolver = make()
    other = layer_norm_task(16, 64)
    with resolver.compiling_ahead([TASK, other]):
        resolver.decide(TASK)
        join_ahead()
    assert {job.device_index for job in jobs} == {5} and len(jobs) >= 2
    assert set(seen) <= {None, 5} and 5 in seen  # None is the current device, 5 what a thread of its own has to be told


def test_facts_are_of_the_current_cuda_device(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 5)
    monkeypatch.setattr(cuda, "cuda_facts", lambda index: f"facts of device {index}")
    assert target_for("cuda").facts() == "facts of device 5"
    assert target_for("cuda").facts(1) == "facts of device 1"


def test_the_device_of_a_graph_s_tensors_is_made_current(monkeypatch: pytest.MonkeyPatch) -> None:
    entered: list[int] = []
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext(entered.append(index)))
    on_host, on_third = torch.empty(1), SimpleNamespace(is_cuda=True, device=torch.device("cuda:3"))
    with on_device_of([4, on_host]):
        assert entered == []
    with on_device_of([4, on_host, on_third]):
        assert entered == [3]


def join_ahead() -> None:
    """Wait for the threads that compile ahead."""
    for thread in [thread for thread in threading.enumerate() if thread.name == "llmkernels-ahead"]:
        thread.join(timeout=60)


def test_nothing_is_started_ahead_where_every_decision_is_known(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    make, _ = setup
    started: list[list[str]] = []
    monkeypatch.setattr(resolve, "AHEAD", {"cpu"})
    monkeypatch.setattr(
        resolve.Resolver, "_compile_ahead", lambda self, tasks, folder, ended, index: started.append([t.key for t in tasks])
    )
    resolver = make()
    tasks = [TASK, layer_norm_task(16, 64)]
    monkeypatch.setattr(resolve, "Resolver", lambda settings: resolver)
    resolve.resolve(tasks, Settings())
    join_ahead()
    assert started == [[task.key for task in tasks]]
    resolve.resolve(tasks, Settings())
    join_ahead()
    assert len(started) == 1


def test_the_measured_code_goes_into_the_store(setup, monkeypatch: pytest.MonkeyPatch) -> None:
    make, script = setup

    def measured(
        task: Task, kernel: Kernel, record: Record | None, settings: Settings, binaries: str, **_: object
    ) -> Evaluation:
        key = target_for("cpu").binary_key(kernel, task, {"UNROLL": 1}, target_for("cpu").facts())
        Binaries(binaries).put_binary(key, b"code of " + kernel.name.encode())
        return dataclasses.replace(script(task, kernel, record, settings), constants=(("UNROLL", 1),))

    monkeypatch.setattr(resolve, "evaluate", measured)
    resolver = make()
    record = resolver.decide(TASK).record
    kernel, target = parse_kernel(record.kernel_text, record.kernel_name), target_for("cpu")
    assert resolver.store.binary(target.binary_key(kernel, TASK, {"UNROLL": 1}, target.facts())) == b"code of fast"
