"""One evaluation from a kernel file to a verdict: parse, compile, choose constants, check, time, check again.

Runs in the calling process, so only a worker should call it with code that is not yet accepted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from torch_llmkernels.errors import (
    CompileError,
    ExpressionError,
    KernelSourceError,
    LaunchError,
    LLMKernelsError,
    NotApplicable,
    ToolchainMissing,
)
from torch_llmkernels.evaluate.candidate import Binaries, Candidate, Device, compile_all, compile_each, spread
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.listed import check_listed
from torch_llmkernels.evaluation import ErrorStat, Evaluation, Resources, Status
from torch_llmkernels.kernels.source import Kernel, parse_kernel

if TYPE_CHECKING:
    from torch_llmkernels.evaluate.check import Answers
    from torch_llmkernels.evaluate.roofline import Floor
    from torch_llmkernels.evaluate.timing import Times

MOST_TUNINGS = 32
"""Combinations of constants that one evaluation tries, spread evenly over all of them."""
LOG_LINES = 40
WORTH_PROFILING = 0.5
"""Speed relative to the best baseline from which the seconds that counters take are spent."""

Progress = Callable[[str], None]


class _Rejected(Exception):
    """A check failed: what was measured until then, and why."""

    def __init__(self, errors: tuple[ErrorStat, ...], detail: str) -> None:
        super().__init__(detail)
        self.errors = errors


def evaluate(job: Job, progress: Progress = lambda stage: None) -> Evaluation:
    """Check and time one kernel in this process.

    Args:
        job: What to do.
        progress: Told the stage that begins, so that whoever watches a crash knows where it was.
    """
    start = time.monotonic()
    run = _Evaluator(job, progress)
    try:
        outcome = run.run()
    except _Rejected as rejected:
        outcome = run.failed(Status.WRONG, str(rejected), rejected.errors)
    except KernelSourceError as error:
        outcome = run.failed(Status.INVALID, str(error))
    except (NotApplicable, ExpressionError) as error:
        outcome = run.failed(Status.NOT_APPLICABLE, str(error))
    except CompileError as error:
        text = f"{error}\n{log_head(error.log)}".strip()
        outcome = run.failed(Status.FAILED if is_exhausted(f"{error}\n{error.log}") else Status.COMPILE_ERROR, text)
    except ToolchainMissing as error:
        outcome = run.failed(Status.NOT_APPLICABLE, f"cannot be evaluated here: {error}")
    except LaunchError as error:
        outcome = run.failed(Status.FAILED if is_exhausted(str(error)) else Status.LAUNCH_ERROR, str(error))
    except LLMKernelsError as error:
        outcome = run.failed(Status.NOT_APPLICABLE, f"the task cannot be checked: {error}")
    except (RuntimeError, MemoryError, OSError) as error:
        outcome = run.failed(*_machine_failure(error))
    return dataclasses.replace(outcome, seconds=time.monotonic() - start)


def compile_ahead(job: Job) -> None:
    """Compile what `evaluate` will compile: the kernel into the folder `job.binaries`, its baseline into torch's caches.

    Raises:
        LLMKernelsError: where there is nothing to compile; `evaluate` says it in its own way.
    """
    kernel, device = parse_kernel(job.kernel_text, job.kernel_name), Device(job.task, job.device_index)
    if kernel.why_not(job.task) is None:
        given = job.constants
        combinations = kernel.tunings(job.task, device.facts) if given is None else [dict(given)]
        with device:  # torch's caches know code by the device it was compiled for
            compile_each(kernel, job.task, spread(combinations, MOST_TUNINGS), device, Binaries(job.binaries))
            if job.timed:
                from torch_llmkernels.evaluate import baseline

                baseline.compile_ahead(job.task)


_EXHAUSTED = (
    "out of memory", "out_of_memory", "alloc_failed", "can't allocate memory", "cannot allocate memory",
    "no space left on device", "killed signal terminated program",
)  # fmt: skip
"""How torch, CUDA and its libraries, the compilers and the C library say that memory or disk space is used up."""


_UNREACHABLE = ("busy or unavailable", "driver initialization failed", "no cuda-capable device", "unknown error - this may be")
"""How CUDA says that a process cannot use a device at all, as where another one has it for itself."""


def is_exhausted(text: str) -> bool:
    """Whether an error's text says that memory or disk space was used up: another process may have it now."""
    return any(words in text.lower() for words in _EXHAUSTED)


def _machine_failure(error: Exception) -> tuple[Status, str]:
    """What an error says that no step expects. A CUDA error outlives the call that made it: the process cannot go on."""
    text = f"{type(error).__name__}: {error}".split("\nCUDA kernel errors might")[0]
    if isinstance(error, MemoryError) or is_exhausted(text):
        return Status.FAILED, f"the machine ran out of memory or disk space: {text}"
    if any(words in text.lower() for words in _UNREACHABLE):
        return Status.FAILED, f"the worker cannot use the device: {text}"
    if "CUDA" in text or "cuda" in text:
        return Status.CRASHED, f"the kernel broke the CUDA context: {text}"
    return Status.FAILED, f"the evaluation failed: {text}"


def log_head(log: str) -> str:
    """The part of a compiler's log that a repair needs: from the first error on, `LOG_LINES` lines."""
    lines = log.splitlines()
    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    kept = lines[max(0, first - 2) : first + LOG_LINES]
    return "\n".join([*kept, "..."] if len(lines) > first + LOG_LINES else kept)


class _Evaluator:
    """The steps of one job, and what they have found out so far."""

    def __init__(self, job: Job, progress: Progress) -> None:
        self.job, self.task, self._progress = job, job.task, progress
        self._constants: dict[str, int] = dict(job.constants or {})
        self._resources = Resources()
        self._environment: tuple[tuple[str, str], ...] = ()
        self._floor_ms = 0.0
        self._answers: Answers | None = None

    def failed(self, status: Status, detail: str, errors: tuple[ErrorStat, ...] = ()) -> Evaluation:
        """An evaluation that ended early."""
        return self._evaluation(status, detail=detail or str(status), errors=errors)

    def _evaluation(self, status: Status, **fields: Any) -> Evaluation:
        return Evaluation(
            status, constants=tuple(sorted(self._constants.items())), resources=self._resources, tier=self.job.tier,
            environment=self._environment, floor_ms=self._floor_ms, **fields,
        )  # fmt: skip

    def run(self) -> Evaluation:
        """All steps, in order.

        Raises:
            _Rejected: if a check fails.
            LLMKernelsError: as the steps do.
        """
        self._progress("parsing the kernel file")
        kernel = parse_kernel(self.job.kernel_text, self.job.kernel_name)
        reason = kernel.why_not(self.task)
        if reason:
            raise NotApplicable(reason)
        device = Device(self.task, self.job.device_index)
        self._environment = device.environment(self.task)
        with device:
            made = self._choose(kernel, device)
            errors = self._check(made, self.job.tier)
            self._check_memory(made)
            if not self.job.timed:
                return self._evaluation(Status.CORRECT, errors=errors)
            times = self._time(made, device)
            self._check(made, "again", self.job.seed + 1)
        return self._evaluation(
            Status.TIMED, errors=errors, time_ms=times.kernel_ms, spread=times.spread, baselines_ms=times.baselines_ms,
            ratios=times.ratios, counters=self._count(made, times),
        )  # fmt: skip

    def _choose(self, kernel: Kernel, device: Device) -> Candidate:
        """The kernel with its constants: those of the job, the only ones, or the fastest of its own that pass a probe."""
        given = self.job.constants
        combinations = kernel.tunings(self.task, device.facts) if given is None else [dict(given)]
        if not combinations:
            raise NotApplicable("no combination of `tune` values satisfies every `where` condition for this task and device")
        self._progress("compiling")
        store = Binaries(self.job.binaries) if self.job.binaries else None
        made = compile_all(kernel, self.task, spread(combinations, MOST_TUNINGS), device, store)
        if self.job.listed:
            self._progress("compiling for what else the header lists")
            check_listed(kernel, self.task, device.target, device.facts, store)
        best = made[0] if len(made) == 1 else self._fastest(made, device)
        self._constants, self._resources = best.constants, best.launcher.resources
        return best

    def _fastest(self, made: list[Candidate], device: Device) -> Candidate:
        """The fastest that passes a probe; without timing the first. If none passes, the first one's failure counts."""
        passed: list[Candidate] = []
        first: Exception | None = None
        for candidate in made:
            self._constants = candidate.constants
            self._progress(f"trying constants {candidate.constants}")
            try:
                self._check(candidate, "probe")
                passed.append(candidate)
            except (_Rejected, NotApplicable, LaunchError) as error:
                first = first or error
            if passed and not self.job.timed:
                break
        if not passed:
            assert first is not None
            raise first
        return self._sweep(passed, device) if len(passed) > 1 else passed[0]

    def _sweep(self, passed: list[Candidate], device: Device) -> Candidate:
        """The fastest of several; the first of equals. They run in turns, so that a machine that drifts favours none."""
        from torch_llmkernels.evaluate.timing import Stopwatch, scratch

        self._progress(f"choosing among {len(passed)} combinations of constants")
        task, symbols = self.task.at(), [hint for _, hint in self.task.symbols]
        needs = [candidate.workspaces(task) for candidate in passed]
        watch = Stopwatch(task, symbols, [scratch(needs)], device.facts)
        times = watch.sweep([(candidate.launcher, need) for candidate, need in zip(passed, needs, strict=True)])
        return passed[times.index(min(times))]

    def _check(self, made: Candidate, tier: str, seed: int | None = None) -> tuple[ErrorStat, ...]:
        from torch_llmkernels.evaluate.check import Answers, check

        self._progress(f"checking ({tier})")
        seed = self.job.seed if seed is None else seed
        alignment = made.kernel.align
        self._answers = self._answers or Answers()
        errors, failure = check(
            self.task, made.launcher, tier, workspaces=made.workspaces, alignment=alignment, seed=seed, answers=self._answers
        )
        if failure:
            raise _Rejected(errors, failure if tier != "again" else f"after timing: {failure}")
        return errors

    def _check_memory(self, made: Candidate) -> None:
        """Faults outside the tensors that values do not show: fences on the CPU, compute-sanitizer for winners on CUDA."""
        from torch_llmkernels.evaluate import fence, sanitize

        task, symbols = self.task.at(), [hint for _, hint in self.task.symbols]
        if task.device == "cpu":
            self._progress("running against a page without access (a fault means that it reads or writes past a tensor's end)")
            fence.run_fenced(task, made.launcher, made.workspaces(task), made.kernel.align, symbols)
        elif self.job.tier == "full":
            self._progress("running under compute-sanitizer")
            report = sanitize.sanitize(dataclasses.replace(self.job, constants=made.constants))
            self._environment += (("sanitizer", report.summary),)
            if report.failure:
                raise _Rejected((), report.failure)

    def _stopwatch(self, made: Candidate, device: Device) -> Any:
        from torch_llmkernels.evaluate.timing import Stopwatch

        symbols = [hint for _, hint in self.task.symbols]
        return Stopwatch(self.task.at(), symbols, made.workspaces(self.task.at()), device.facts)

    def _time(self, made: Candidate, device: Device) -> Times:
        from torch_llmkernels.evaluate import roofline

        self._progress("timing")
        floor = self._floor(device)
        timed = made.again(device)  # a launcher of its own: preparing it must not change the checked one
        prepare = timed.launcher.prepare if made.kernel.prepared(self.task) else None
        times = self._stopwatch(made, device).compare(
            timed.launcher, made.launcher, prepare=prepare, brief=self.job.brief
        )
        if times.mismatch:
            raise _Rejected((), f"under timing: {times.mismatch}")
        if times.kernel_ms < roofline.BELOW_FLOOR * floor.impossible_ms:  # or was the device slow when it was measured?
            floor = self._floor(device)
        if times.kernel_ms < roofline.BELOW_FLOOR * floor.impossible_ms:
            moving = f"{floor.impossible_ms:.4g} ms to move {floor.bytes} bytes and do {floor.flops} operations"
            raise _Rejected((), f"{times.kernel_ms:.4g} ms is below what the device can do ({moving}): work was skipped")
        return times

    def _count(self, made: Candidate, times: Times) -> tuple[str, ...]:
        """What the profiler counts of a CUDA kernel that may become a seed."""
        speedup = min((ratio for _, ratio in times.ratios), default=0.0)
        if not self.job.profiled or self.task.device != "cuda" or speedup < WORTH_PROFILING:
            return ()
        from torch_llmkernels.evaluate import ncu

        self._progress("reading counters")
        return ncu.profile(dataclasses.replace(self.job, constants=made.constants))

    def _floor(self, device: Device) -> Floor:
        """The roofline floor by the ceilings measured until now; the evaluation keeps its time."""
        from torch_llmkernels.evaluate import roofline

        ceilings = roofline.measure_ceilings(self.task.device, self.job.device_index, again=True)
        floor = roofline.floor(self.task, device.facts, ceilings)
        self._floor_ms = floor.ms
        return floor
