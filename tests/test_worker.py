"""The worker and the pools: isolation, what crosses the boundary, and what does not."""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tasks import layer_norm_task, relu_add_task, softmax_task

from torch_llmkernels import resolve
from torch_llmkernels.errors import CompileError, LaunchError, SchemaError, WorkerDied
from torch_llmkernels.evaluate import run, sanitize, worker
from torch_llmkernels.evaluate.candidate import spread
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.pool import LocalPool
from torch_llmkernels.evaluate.run import compile_ahead, evaluate, log_head
from torch_llmkernels.evaluate.worker import Worker, clean_environment
from torch_llmkernels.evaluation import Evaluation, Status
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.settings import Settings

KERNEL = (Path(__file__).parent / "kernels" / "layer_norm.cpp").read_text()
needs_compiler = pytest.mark.skipif(target_for("cpu").unavailable() is not None, reason="no C++ compiler")


def test_a_job_survives_json() -> None:
    job = Job(relu_add_task("d0", hints={"d0": 4}), "text", "name", {"N": 4}, "full", False, 7, 1)
    assert Job.from_json(json.loads(json.dumps(job.to_json()))) == job
    with pytest.raises(SchemaError, match="damaged"):
        Job.from_json({"kernel_text": ""})
    with pytest.raises(ValueError, match="tier"):
        Job(softmax_task(), "", tier="thorough")


def test_credentials_stay_behind() -> None:
    secrets = {"OPENAI_API_KEY": "a", "MY_TOKEN": "b", "AWS_REGION": "c", "db_password": "d", "LAB": "e"}
    kept = clean_environment({**secrets, "PATH": "/bin", "OMP_NUM_THREADS": "2"}, Settings(api_key_env="LAB"))
    assert not set(secrets) & set(kept)
    assert kept["PATH"] == "/bin" and kept["OMP_NUM_THREADS"] == "2"


@needs_compiler
def test_a_pool_evaluates_and_chooses_constants() -> None:
    with LocalPool(settings=Settings(worker_timeout_s=90.0), compile_ahead=True) as pool:
        futures = [pool.submit(Job(layer_norm_task(8, 64), KERNEL, "layer_norm", timed=t)) for t in (False, True)]
        futures.append(pool.submit(Job(softmax_task(), "not a kernel")))
        untimed, timed, invalid = (f.result() for f in futures)
    assert untimed.status is Status.CORRECT and untimed.time_ms is None, untimed.detail
    assert timed.status is Status.TIMED and dict(timed.constants).keys() == {"GRAIN"}, timed.detail
    assert invalid.status is Status.INVALID and "header" in invalid.detail


def test_a_worker_that_does_not_start_is_a_crash(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker.sys, "executable", "/bin/false")
    outcome = Worker(Settings()).evaluate(Job(softmax_task(), KERNEL))
    assert outcome.status is Status.CRASHED and "exited with code 1" in outcome.detail


def test_a_job_may_have_less_time_than_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker._Child, "_receive", lambda self, deadline, name: None if name == "ready" else self._line(deadline))
    with Worker(Settings(worker_timeout_s=90.0)) as made:
        outcome = made.evaluate(Job(softmax_task(), KERNEL, limit_s=0.0))
    assert outcome.status is Status.TIMEOUT and "killed after 0 s (what was left of the budget)" in outcome.detail


def _impostor(monkeypatch: pytest.MonkeyPatch, folder: Path, body: str) -> None:
    """Children run this body instead; `GET` and `PUT` are their pipes."""
    impostor = folder / "python"
    impostor.write_text(f"#!{sys.executable}\nimport os, sys, time\nGET, PUT = int(sys.argv[3]), int(sys.argv[4])\n{body}\n")
    impostor.chmod(0o755)
    monkeypatch.setattr(worker.sys, "executable", str(impostor))


@pytest.mark.parametrize("afterwards", ["os.read(GET, 1); time.sleep(99)", ""], ids=["stays", "exits"])
def test_an_answer_that_is_no_message_is_a_crash(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, afterwards: str) -> None:
    _impostor(monkeypatch, tmp_path, f"os.write(PUT, b'nonsense\\n')\n{afterwards}")
    outcome = Worker(Settings()).evaluate(Job(softmax_task(), KERNEL))
    assert outcome.status is Status.CRASHED and "no message" in outcome.detail


@pytest.mark.parametrize("words, expected", [("nonsense", "no message"), ('{"stage": "leaving"}', "exited with code 3")])
def test_what_a_child_wrote_counts_though_it_takes_no_job(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, words: str, expected: str
) -> None:
    """Its exit may be seen first, as a broken pipe when the parent sends: here it always is."""
    _impostor(monkeypatch, tmp_path, f"os.write(PUT, b'{words}\\n')\nsys.exit(3)")
    send = worker._Child._send

    def late(self: worker._Child, message: dict[str, object]) -> None:
        self._process.wait()
        send(self, message)

    monkeypatch.setattr(worker._Child, "_send", late)
    outcome = Worker(Settings()).evaluate(Job(softmax_task(), KERNEL))
    assert outcome.status is Status.CRASHED and expected in outcome.detail


def test_a_child_that_only_stops_listening_is_dead(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """It has not ended, and its end is not waited for as long as a start would be."""
    monkeypatch.setattr(worker, "LAST_WORDS_S", 0.2)
    _impostor(monkeypatch, tmp_path, 'os.close(GET)\nos.write(PUT, b\'{"stage": "deaf"}\\n\')\ntime.sleep(99)')
    send = worker._Child._send

    def late(self: worker._Child, message: dict[str, object]) -> None:
        self._poll.poll()  # it has written, so its end of the pipe is closed
        send(self, message)

    monkeypatch.setattr(worker._Child, "_send", late)
    outcome = Worker(Settings()).evaluate(Job(softmax_task(), KERNEL))
    assert outcome.status is Status.CRASHED and "closed its pipe" in outcome.detail


@needs_compiler
def test_closing_ends_the_child_and_a_later_job_starts_another() -> None:
    job = Job(layer_norm_task(), "not a kernel")
    made = Worker(Settings())
    assert made.evaluate(job).status is Status.INVALID
    child = made._child
    assert child is not None
    made.close()
    with pytest.raises(ProcessLookupError):
        os.kill(child._process.pid, 0)
    assert made.evaluate(job).status is Status.INVALID
    made.close()


def test_a_forked_process_leaves_its_parents_worker_alone() -> None:
    """It would read the parent's answers, and end the parent's worker when it exits."""
    job, settings = Job(layer_norm_task(), "not a kernel"), Settings(worker_timeout_s=99.0)
    made = resolve.worker(settings)
    assert made.evaluate(job).status is Status.INVALID
    child = made._child
    forked = os.fork()
    if not forked:
        resolve._close_workers()  # what a normal exit does
        os._exit(int(made._child is not None or resolve.worker(settings) is made))
    assert os.waitpid(forked, 0)[1] == 0
    assert made.evaluate(job).status is Status.INVALID and made._child is child
    made.close()


def test_an_idle_child_ends_and_the_next_job_starts_another() -> None:
    job = Job(layer_norm_task(), "not a kernel")
    with Worker(Settings()) as made:
        made.evaluate(job)
        first, timer = made._child, made._timer
        assert first is not None and timer is not None and timer.interval == worker.IDLE_S and timer.daemon
        timer.function()
        assert made._child is None and first._process.poll() is not None
        assert made.evaluate(job).status is Status.INVALID and made._child is not None and made._timer is not timer


def test_a_worker_that_somebody_terminated_is_no_crash_of_the_kernel() -> None:
    job = Job(layer_norm_task(), "not a kernel")
    with Worker(Settings()) as made:
        assert made.evaluate(job).status is Status.INVALID
        first = made._child
        assert first is not None
        os.kill(first._process.pid, signal.SIGTERM)
        assert made.evaluate(job).status is Status.INVALID
        assert made._child is not first


def test_but_only_once(monkeypatch: pytest.MonkeyPatch) -> None:
    class Doomed:
        asked = 0

        def __init__(self, settings: Settings) -> None: ...

        def ask(self, job: Job) -> None:
            Doomed.asked += 1
            raise WorkerDied("the worker was killed by SIGTERM", terminated=True)

        def kill(self) -> None: ...

    monkeypatch.setattr(worker, "_Child", Doomed)
    outcome = Worker(Settings()).evaluate(Job(softmax_task(), KERNEL))
    assert outcome.status is Status.CRASHED and "SIGTERM" in outcome.detail and Doomed.asked == 2


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), Status.FAILED),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), Status.FAILED),
        (RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"), Status.FAILED),
        (LaunchError("loading: the driver answered CUDA_ERROR_OUT_OF_MEMORY"), Status.FAILED),
        (CompileError("k: g++: fatal error", "cc1plus: No space left on device"), Status.FAILED),
        (OSError(errno.ENOSPC, "No space left on device"), Status.FAILED),
        (MemoryError(), Status.FAILED),
        (RuntimeError("nobody has seen this before"), Status.FAILED),
        (LaunchError("k: the driver answered CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"), Status.LAUNCH_ERROR),
        (CompileError("k: expected ';'"), Status.COMPILE_ERROR),
        (RuntimeError("CUDA error: an illegal memory access was encountered"), Status.CRASHED),
        (RuntimeError("CUDA error: CUDA-capable device(s) is/are busy or unavailable"), Status.FAILED),
    ],
)
def test_a_machine_without_memory_or_disk_space_is_told_from_a_bad_kernel(
    error: Exception, status: Status, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(self: object) -> None:
        raise error

    monkeypatch.setattr(run._Evaluator, "run", fail)
    outcome = evaluate(Job(softmax_task(), KERNEL))
    assert outcome.status is status and str(error) in outcome.detail


def test_the_log_tells_what_an_evaluation_s_time_went_to(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.DEBUG, "torch_llmkernels.evaluate"), Worker(Settings()) as made:
        assert made.evaluate(Job(layer_norm_task(), KERNEL, "rows", timed=False)).status.is_correct
    (line,) = [r.getMessage() for r in caplog.records]
    assert re.match(r"layer_norm: rows of [0-9a-f]{20}: .*compiling \d+\.\d s", line)


def test_a_worker_without_memory_tries_again_where_its_parent_held_some(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's allocator keeps what a program has freed: a worker sees a full device until the program gives it back."""
    outcomes = [Evaluation(Status.FAILED, detail="CUDA out of memory."), Evaluation(Status.INVALID, detail="no header")]
    asked: list[Job] = []

    class Child:
        def __init__(self, settings: Settings) -> None: ...

        def ask(self, job: Job) -> Evaluation:
            asked.append(job)
            return outcomes[len(asked) - 1]

        def kill(self) -> None: ...

    monkeypatch.setattr(worker, "_Child", Child)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda index: 1)
    monkeypatch.setattr(torch.cuda, "device", lambda index: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    for reserved, tries, status in ((2, 2, Status.INVALID), (1, 1, Status.FAILED)):
        asked.clear()
        monkeypatch.setattr(torch.cuda, "memory_reserved", lambda index, reserved=reserved: reserved)
        assert Worker(Settings()).evaluate(Job(softmax_task(), KERNEL)).status is status and len(asked) == tries


def test_a_child_that_the_system_killed_says_nothing_about_the_kernel() -> None:
    job = Job(layer_norm_task(), "not a kernel")
    with Worker(Settings()) as made:
        assert made.evaluate(job).status is Status.INVALID
        assert made._child is not None
        os.kill(made._child._process.pid, signal.SIGKILL)
        outcome = made.evaluate(job)
    assert outcome.status is Status.FAILED and "SIGKILL" in outcome.detail


def test_a_child_that_hangs_ends_with_its_parent() -> None:
    script = (
        "import sys, threading, time\n"
        "from torch_llmkernels.evaluate.worker import _end_with_parent\n"
        "threading.Thread(target=_end_with_parent, args=(int(sys.argv[1]),), daemon=True).start()\n"
        "time.sleep(600)\n"
    )
    theirs, ours = os.pipe()
    child = subprocess.Popen([sys.executable, "-c", script, str(theirs)], pass_fds=(theirs,), start_new_session=True)
    os.close(theirs)
    os.close(ours)  # as when this process ends
    assert child.wait(120) == -signal.SIGKILL


@needs_compiler
def test_what_was_compiled_ahead_is_not_compiled_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    job = Job(layer_norm_task(8, 64), KERNEL, "layer_norm", timed=False, binaries=str(tmp_path))
    compile_ahead(job)
    assert len(list(tmp_path.iterdir())) == len(parse_kernel(KERNEL).tunings(job.task, target_for("cpu").facts()))

    def refuse(*_: object) -> None:
        raise AssertionError("compiled again")

    monkeypatch.setattr(type(target_for("cpu")), "compile", refuse)
    assert evaluate(job).status is Status.CORRECT


def test_a_compiler_s_log_is_cut_to_its_errors() -> None:
    log = "\n".join([*["In file included"] * 50, "x.cu:7: error: no", *["note"] * 100])
    head = log_head(log)
    assert "x.cu:7: error: no" in head and len(head.splitlines()) < 50


def test_many_tunings_are_sampled_evenly() -> None:
    items = [{"N": i} for i in range(100)]
    assert spread(items[:5], 10) == items[:5]
    assert spread(items, 4) == [{"N": 0}, {"N": 25}, {"N": 50}, {"N": 75}]


def test_without_a_sanitizer_the_reason_is_recorded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sanitize, "find_sanitizer", lambda: None)
    report = sanitize.sanitize(Job(layer_norm_task(device="cuda"), KERNEL, constants={}))
    assert report.failure is None and report.summary.startswith("skipped: no compute-sanitizer")
