"""One evaluation from a kernel file to a verdict: parse, compile, choose constants, check, time, check again.

Runs in the calling process, so only a worker should call it with code that is not yet accepted.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

from torch_llmkernels.errors import (
    CompileError,
    ExpressionError,
    KernelSourceError,
    LaunchError,
    LLMKernelsError,
    NotApplicable,
    SchemaError,
    ToolchainMissing,
)
from torch_llmkernels.evaluation import ErrorStat, Evaluation, Resources, Status
from torch_llmkernels.kernels.source import Kernel, parse_kernel
from torch_llmkernels.task import Task, TensorSpec

if TYPE_CHECKING:
    from torch_llmkernels.evaluate.timing import Times
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.kernels.targets import Binary, Launcher, Target

MOST_TUNINGS = 32
"""Combinations of constants that one evaluation tries, spread evenly over all of them."""
COMPILE_THREADS = 4
LOG_LINES = 40

Progress = Callable[[str], None]


@dataclasses.dataclass(frozen=True)
class Job:
    """One evaluation to do.

    Attributes:
        task: What the kernel should compute.
        kernel_text: The whole kernel file.
        kernel_name: File stem, for messages.
        constants: Tunables to use; None: choose among the kernel's own.
        tier: `quick` or `full`.
        timed: Whether to time it beside its baselines.
        seed: Of the data.
        device_index: Which device.
    """

    task: Task
    kernel_text: str
    kernel_name: str = "candidate"
    constants: Mapping[str, int] | None = None
    tier: str = "quick"
    timed: bool = True
    seed: int = 0
    device_index: int = 0

    def __post_init__(self) -> None:
        if self.tier not in ("quick", "full"):
            raise ValueError(f"tier {self.tier!r} is not 'quick' or 'full'")

    def on(self, device_index: int) -> Job:
        """The same job on another device."""
        return dataclasses.replace(self, device_index=device_index)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {**plain, "task": self.task.to_json(), "constants": None if self.constants is None else dict(self.constants)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Job:
        """The job `to_json` wrote.

        Raises:
            SchemaError: if fields are missing or unknown.
        """
        try:
            return cls(**{**plain, "task": Task.from_json(plain["task"])})
        except (KeyError, TypeError, ValueError) as error:
            raise SchemaError(f"evaluation job is damaged: {error}") from error


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
        outcome = run.failed(Status.COMPILE_ERROR, f"{error}\n{log_head(error.log)}".strip())
    except ToolchainMissing as error:
        outcome = run.failed(Status.NOT_APPLICABLE, f"cannot be evaluated here: {error}")
    except LaunchError as error:
        outcome = run.failed(Status.LAUNCH_ERROR, str(error))
    except LLMKernelsError as error:
        outcome = run.failed(Status.NOT_APPLICABLE, f"the task cannot be checked: {error}")
    except RuntimeError as error:
        outcome = run.failed(*_device_failure(error))
    return dataclasses.replace(outcome, seconds=time.monotonic() - start)


def _device_failure(error: RuntimeError) -> tuple[Status, str]:
    """A CUDA error outlives the call that made it: the process cannot go on. Too little memory is an error of this job."""
    text = f"{type(error).__name__}: {error}".split("\nCUDA kernel errors might")[0]
    if "out of memory" in text:
        return Status.LAUNCH_ERROR, f"the evaluation ran out of device memory: {text}"
    if "CUDA" in text or "cuda" in text:
        return Status.CRASHED, f"the kernel broke the CUDA context: {text}"
    return Status.LAUNCH_ERROR, text


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
        device = _Device(self.task, self.job.device_index)
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
            Status.TIMED, errors=errors, time_ms=times.kernel_ms, spread=times.spread, baselines_ms=times.baselines_ms
        )

    def _choose(self, kernel: Kernel, device: _Device) -> _Made:
        """The kernel with its constants: those of the job, the only ones, or the fastest of its own that pass a probe."""
        given = self.job.constants
        combinations = kernel.tunings(self.task, device.facts) if given is None else [dict(given)]
        if not combinations:
            raise NotApplicable("no combination of `tune` values satisfies every `where` condition for this task and device")
        self._progress("compiling")
        made = _compile_all(kernel, self.task, spread(combinations, MOST_TUNINGS), device)
        best = made[0] if len(made) == 1 else self._fastest(made, device)
        self._constants, self._resources = best.constants, best.launcher.resources
        return best

    def _fastest(self, made: list[_Made], device: _Device) -> _Made:
        """The fastest that passes a probe; without timing the first. If none passes, the first one's failure counts."""
        passed: list[tuple[float, int]] = []
        first: Exception | None = None
        for number, candidate in enumerate(made):
            self._constants = candidate.constants
            self._progress(f"trying constants {candidate.constants}")
            try:
                self._check(candidate, "probe")
                passed.append(
                    (self._stopwatch(candidate, device).kernel_only(candidate.launcher) if self.job.timed else 0.0, number)
                )
            except (_Rejected, NotApplicable, LaunchError) as error:
                first = first or error
            if passed and not self.job.timed:
                break
        if not passed:
            assert first is not None
            raise first
        return made[min(passed)[1]]

    def _check(self, made: _Made, tier: str, seed: int | None = None) -> tuple[ErrorStat, ...]:
        from torch_llmkernels.evaluate.check import check

        self._progress(f"checking ({tier})")
        seed = self.job.seed if seed is None else seed
        alignment = made.kernel.align
        errors, failure = check(self.task, made.launcher, tier, workspaces=made.workspaces, alignment=alignment, seed=seed)
        if failure:
            raise _Rejected(errors, failure if tier != "again" else f"after timing: {failure}")
        return errors

    def _check_memory(self, made: _Made) -> None:
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

    def _stopwatch(self, made: _Made, device: _Device) -> Any:
        from torch_llmkernels.evaluate.timing import Stopwatch

        symbols = [hint for _, hint in self.task.symbols]
        return Stopwatch(self.task.at(), symbols, made.workspaces(self.task.at()), device.facts)

    def _time(self, made: _Made, device: _Device) -> Times:
        from torch_llmkernels.evaluate import roofline

        self._progress("timing")
        ceilings = roofline.measure_ceilings(self.task.device, self.job.device_index)
        floor = roofline.floor(self.task, device.facts, ceilings)
        self._floor_ms = floor.ms
        timed = made.again(device)  # a launcher of its own: preparing it must not change the checked one
        prepare = timed.launcher.prepare if _is_prepared(made.kernel, self.task) else None
        times = self._stopwatch(made, device).compare(timed.launcher, made.launcher, prepare=prepare)
        if times.mismatch:
            raise _Rejected((), f"under timing: {times.mismatch}")
        if times.kernel_ms < roofline.BELOW_FLOOR * floor.impossible_ms:
            moving = f"{floor.impossible_ms:.4g} ms to move {floor.bytes} bytes and do {floor.flops} operations"
            raise _Rejected((), f"{times.kernel_ms:.4g} ms is below what the device can do ({moving}): work was skipped")
        return times


def _is_prepared(kernel: Kernel, task: Task) -> bool:
    """Whether the prepare launches read nothing but inputs that are constant for the graph: the runtime runs them once."""
    inputs = {t.name for t in task.inputs}
    read = {arg for step in kernel.prepare for arg in step.args} & inputs
    return bool(kernel.prepare) and read <= set(task.constant)


def spread(items: list[dict[str, int]], most: int) -> list[dict[str, int]]:
    """At most `most` of the items, at even steps."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


@dataclasses.dataclass(frozen=True)
class _Made:
    """A compiled and loaded kernel."""

    kernel: Kernel
    binary: Binary
    constants: dict[str, int]
    launcher: Launcher
    facts: DeviceFacts
    task: Task

    def workspaces(self, task: Task) -> list[TensorSpec]:
        """The workspaces for a static task, as specs."""
        from torch_llmkernels.kernels import launch

        return [_spec(w) for w in launch.workspaces(self.kernel, task, self.constants, self.facts)]

    def again(self, device: _Device) -> _Made:
        """The same code with a launcher of its own."""
        return dataclasses.replace(self, launcher=device.load(self.binary, self.kernel, self.task, self.constants))


def _spec(workspace: Any) -> TensorSpec:
    strides, running = [], 1
    for size in reversed(workspace.shape):
        strides.append(running)
        running *= size
    return TensorSpec(workspace.name, workspace.dtype, tuple(workspace.shape), tuple(reversed(strides)))


def _compile_all(kernel: Kernel, task: Task, combinations: list[dict[str, int]], device: _Device) -> list[_Made]:
    """Every combination that compiles and loads, in order.

    Raises:
        CompileError, NotApplicable, LaunchError: of the first combination, if there is none.
    """

    def compiled(constants: dict[str, int]) -> Binary | LLMKernelsError:
        try:
            return device.target.compile(kernel, task, constants, device.facts)
        except (CompileError, NotApplicable) as error:
            return error

    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        results = list(pool.map(compiled, combinations))
    made: list[_Made] = []
    first: LLMKernelsError | None = None
    for constants, binary in zip(combinations, results, strict=True):
        try:
            if isinstance(binary, LLMKernelsError):
                raise binary
            launcher = device.load(binary, kernel, task, constants)
            made.append(_Made(kernel, binary, dict(constants), launcher, device.facts, task))
        except (CompileError, NotApplicable, LaunchError) as error:
            first = first or error
    if not made:
        assert first is not None
        raise first
    return made


class _Device:
    """The device that a job runs on; entering it makes it the current one."""

    def __init__(self, task: Task, index: int) -> None:
        from torch_llmkernels.kernels.targets import target_for

        self.target: Target = target_for(task.device)
        reason = self.target.unavailable()
        if reason:
            raise ToolchainMissing(reason)
        self.index = index
        self.facts: DeviceFacts = self.target.facts(index)
        self._previous = 0

    def __enter__(self) -> None:
        if self.target.name == "cuda":
            import torch

            self._previous = torch.cuda.current_device()
            torch.cuda.set_device(self.index)

    def __exit__(self, *_: object) -> None:
        if self.target.name == "cuda":
            import torch

            torch.cuda.set_device(self._previous)

    def load(self, binary: Binary, kernel: Kernel, task: Task, constants: Mapping[str, int]) -> Launcher:
        """Load a binary onto this device."""
        return self.target.load(binary, kernel, task, constants, self.facts, self.index)

    def environment(self, task: Task) -> tuple[tuple[str, str], ...]:
        """What the numbers hold for."""
        import torch

        numerics = ", ".join(f"{k}={v}" for k, v in sorted(dataclasses.asdict(task.numerics).items()))
        return (
            ("torch", torch.__version__), ("device", self.facts.name), ("device_kind", self.facts.kind),
            ("unit", self.facts.unit), ("arch", self.facts.arch), ("driver", self.facts.driver), ("threads", str(torch.get_num_threads())),
            ("numerics", numerics),
        )  # fmt: skip
