"""From tasks to decisions: the lookup order, verification on this device, and what a miss does.

For each task, in order: what the store remembers from an earlier verification here; the library's record for this kind of
device; every library kernel of the signature; then `on_miss`. Whatever is not yet verified on this device is checked and timed
in a worker process once, and the outcome is remembered. `choose` is the function that decides a swap.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import functools
import logging
import math
import os
import queue
import tempfile
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.library import Library, default_library
from torch_llmkernels.cache.store import BaseStore, open_store
from torch_llmkernels.errors import LLMKernelsError, ToolchainMissing
from torch_llmkernels.evaluate.candidate import Binaries
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluation import Decision, Evaluation, Record, Status
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.kernels.source import Kernel, parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.settings import Settings, using
from torch_llmkernels.task import Task

log = logging.getLogger("torch_llmkernels.resolve")

COMPILERS = max(1, min(4, (os.cpu_count() or 1) // 4))
"""Processes that compile beside the measuring; each compiles several constants of a kernel at a time."""

AHEAD = frozenset({"cuda"})
"""Devices whose kernels are compiled ahead. On the CPU that would disturb the measuring."""

NOISY = "too noisy to tell"
"""How a kernel ended that is faster by enough, but not in three quarters of the turns; see `ending`."""

TRIES: dict[str, int] = {Status.TIMEOUT: 3, Status.FAILED: 3, Status.CRASHED: 2, NOISY: 3}
"""How often a kernel may end in these ways, which a busy or full machine can cause, before that is remembered for good: once in
a process at most, and after a crash, which can hang a device, only where nobody waits (`precompile`)."""


CALL_MS = {"cpu": 0.005}
"""Milliseconds a call that a swap must save where its call is not free. On the CPU a region is a call from Python between the
loops of Inductor's C++, with an output of its own: 5 us more in the graph than alone (LayerNorm of 8x64, softmax of 16x128). On
CUDA the host runs ahead of the device."""

GRACE_S = 10.0
"""Seconds beyond the verification budget for an evaluation in flight to end in."""

MOST_DETAIL = 160
"""Characters of a kernel's failure that a reason, which is one line, has room for."""

LIBRARY = "library"
"""How `Record.origin` begins for a kernel of the library that it was verified from."""


@functools.cache
def _warn_once(message: str) -> None:
    """Once in a process: what is missing on a machine is missing for every region."""
    log.warning("%s", message)


def resolve(tasks: Sequence[Task], settings: Settings) -> list[Decision]:
    """One decision per task, in order; equal tasks share one.

    Raises:
        LLMKernelsError: with `on_miss="error"`, for the first task that no kernel serves correctly.
        ToolchainMissing: with `strict`, if no kernel can run on a task's device.
    """
    resolver = Resolver(settings)
    distinct = list({task.key: task for task in tasks}.values())
    resolver.announced = distinct
    with resolver.compiling_ahead(distinct):
        decided = {task.key: resolver.decide(task) for task in distinct}
    return [decided[task.key] for task in tasks]


class Resolver:
    """The lookup of one compilation: its library, store, and what is left of its verification budget.

    Args:
        settings: The knobs in force.
        library: Kernels to consider; default: the shipped library or `library_dir`.
        store: Where decisions persist; default: the user's store.
        offline: Whether nobody waits for the outcome: see `TRIES`.
    """

    def __init__(
        self, settings: Settings, library: Library | None = None, store: BaseStore | None = None, offline: bool = False
    ) -> None:
        self.settings, self.offline = settings, offline
        self.library = library or default_library(settings)
        self.store = store or open_store(settings)
        self.deadline = time.monotonic() + settings.verify_budget_s
        self._binaries: tempfile.TemporaryDirectory[str] | None = None  # code that is shared with the worker processes
        self._ahead: tuple[Sequence[Task], threading.Event] | None = None  # what to compile ahead once something is verified
        self.excluded: dict[str, str] = {}  # kernels of the signature that cannot serve the last task, and why
        self.lost: dict[str, Evaluation] = {}  # kernels that lost elsewhere, by a bundle, for exactly the last task's key
        self.announced: Sequence[Task] = ()  # what the first verification says that it begins with; empty: it is silent
        self._evaluated = 0

    def decide(self, task: Task) -> Decision:
        """The decision for one task, verified here if it has to be."""
        with using(self.settings):  # for what reads the knobs further down, such as the choice of a compiler
            return self._decide(task)

    def _decide(self, task: Task) -> Decision:
        if self.settings.swap == "none":
            return Decision(None, "kept Inductor: swap='none'")
        target = target_for(task.device)
        if reason := target.unavailable():
            return self._without_target(task.device, reason)
        facts = target.facts()
        key = RecordKey.of(task, facts)
        known = self.known(key) or Decision(None, "nothing verified yet")
        if self.unverified(task, facts, known):
            self._announce()
            self._start_ahead()
            known = self._verify(task, facts, key, known)
        decision = choose(known, task, self.settings)
        if decision.record is None and not decision.tried and self.excluded:
            from torch_llmkernels.graph.rows import why_not_merged  # imports torch, which most look-ups have no need of

            unmerged = [reason] if (reason := why_not_merged(task)) else []
            why = "; ".join(unmerged + [f"{name}: {reason}" for name, reason in sorted(self.excluded.items())])
            reason = f"kept Inductor: no kernel of {task.signature} serves this task ({why})"
            decision = dataclasses.replace(decision, reason=reason)
        if decision.record is None and not decision.tried and self.lost:
            decision = dataclasses.replace(decision, reason=_why_lost(self.lost, task))
        return decision if decision.record else self._miss(task, facts, key, decision)

    def _announce(self) -> None:
        """Say aloud, once, that verifying begins: whoever compiles would otherwise wait for minutes without knowing for what."""
        tasks, self.announced = [task for task in self.announced if not target_for(task.device).unavailable()], ()
        if tasks:
            last = self.excluded, self.lost
            counts = [self._to_verify(task) for task in tasks]
            self.excluded, self.lost = last
            log.warning(
                "verifying up to %d kernels for %d regions, once per device (at most about %.0f s: verify_budget_s); "
                "TORCH_LOGS=+torch_llmkernels shows them", sum(counts), sum(map(bool, counts)), self.settings.verify_budget_s,
            )  # fmt: skip

    def _to_verify(self, task: Task) -> int:
        """How many kernels a decision about `task` would verify now."""
        facts = target_for(task.device).facts()
        known = self.known(RecordKey.of(task, facts), explained=False) or Decision(None, "")
        return len(self.unverified(task, facts, known))

    def _without_target(self, device: str, reason: str) -> Decision:
        """The decision for a device that no kernel can run on: all of its regions are lost, so it is said once, aloud."""
        if self.settings.strict:
            raise ToolchainMissing(f"{reason} (strict=True; without it, regions on {device} stay with Inductor)")
        _warn_once(f"regions on {device} stay with Inductor: {reason}")
        return Decision(None, f"kept Inductor: {reason}")

    def known(self, key: RecordKey, explained: bool = True) -> Decision | None:
        """What the store remembers for `key`, as far as it holds for the library in use; None is a miss.

        A library's kernel counts only while the library in use has it as it is: not under another `library_dir`, nor after an
        edit. The fastest of those that were tried and that it does have takes its place; if none, they are verified anew.
        """
        found = self.store.decision(key, explained)
        if found is None or found.record is None or not found.record.origin.startswith(LIBRARY):
            return found
        won, held = found.record, self._held(found.record.task)
        correct = [(e, held[label]) for label, e in found.tried if label in held and e.status.is_correct]
        if not correct:
            return dataclasses.replace(found, record=None, tried=tuple(t for t in found.tried if not t[1].status.is_correct))
        best, kernel = min(correct, key=lambda pair: pair[0].relative_time)
        if (kernel.name, kernel.text) == (won.kernel_name, won.kernel_text):
            return found
        record = Record(won.task, kernel.name, kernel.text, best.constants, won.device_kind, best, LIBRARY)
        return dataclasses.replace(found, record=record)

    def _held(self, task: Task) -> dict[str, Kernel]:
        """The kernels of the library in use that a decision about `task` may name, by label."""
        return {kernel.label: kernel for kernel in self.library.kernels(task.signature, task.device)}

    def _origin(self, kernel: Kernel, task: Task, record: Record | None) -> str:
        """Where a kernel comes from: `library` first, if the library in use has it."""
        origin = record.origin if record else LIBRARY
        return origin if origin.startswith(LIBRARY) or kernel.label not in self._held(task) else f"{LIBRARY}, {origin}"

    @property
    def binaries(self) -> str:
        """A folder for compiled code, of this process and its workers."""
        if self._binaries is None:
            self._binaries = tempfile.TemporaryDirectory(prefix="llmk-", ignore_cleanup_errors=True)
        return self._binaries.name

    @contextlib.contextmanager
    def compiling_ahead(self, tasks: Sequence[Task]) -> Iterator[None]:
        """While the GPU measures the kernels of one task, compile those of the next ones in processes beside it.

        That begins with the first kernel that has to be verified: where every decision is known, there is nothing to compile.
        """
        ended = threading.Event()
        if len(tasks) > 1 and AHEAD.issuperset(task.device for task in tasks):
            self._ahead = tasks, ended
        try:
            yield
        finally:
            self._ahead = None
            ended.set()

    def _start_ahead(self) -> None:
        """Start what `compiling_ahead` was asked for, once."""
        if self._ahead is not None:
            (tasks, ended), self._ahead = self._ahead, None
            # the folder is made before there are two threads; a thread starts on device 0, whichever is current here
            args = tasks, self.binaries, ended, target_for(tasks[0].device).current()
            threading.Thread(target=self._compile_ahead, args=args, name="llmkernels-ahead", daemon=True).start()

    def _compile_ahead(self, tasks: Sequence[Task], folder: str, ended: threading.Event, index: int) -> None:
        """The thread of `_start_ahead`."""
        try:
            with using(self.settings):
                target = target_for(tasks[0].device)
                if target.unavailable():
                    return
                facts, other = target.facts(index), Resolver(self.settings, self.library, self.store)
                jobs: queue.SimpleQueue[Job] = queue.SimpleQueue()
                for task in tasks:
                    known = self.known(RecordKey.of(task, facts), explained=False) or Decision(None, "")
                    for position, (kernel, record) in enumerate(other.unverified(task, facts, known)):
                        job = job_of(task, kernel, record, self.settings, folder, index)
                        jobs.put(dataclasses.replace(job, timed=job.timed and position == 0))  # the baseline once per task
                for number in range(min(COMPILERS, jobs.qsize())):
                    compiler = worker(self.settings, f"compile {number}")
                    threading.Thread(target=_compile_all, args=(compiler, jobs, ended), daemon=True).start()
        except Exception as error:  # whatever fails here, the evaluation that finds nothing compiled tries again and reports
            log.debug("compiling ahead ended: %s: %s", type(error).__name__, error)

    def unverified(self, task: Task, facts: DeviceFacts, known: Decision) -> list[tuple[Kernel, Record | None]]:
        """Kernels with no evaluation here that answers the question `settings.swap` asks; a record's kernel comes first.

        What lost on another device, of which a bundle says so for exactly the same key, is not verified here.
        """
        need_time = self.settings.swap == "fastest"
        answered = {name for name, e in known.tried if not e.status.is_correct or e.time_ms or not need_time}
        settled = {name for name in answered if not self._may_try_again(name, task, facts, known)}
        found: dict[str, tuple[Kernel, Record | None]] = {}
        plain = dataclasses.replace(task, constant=())  # a record of the same task without constants knows a kernel for it too
        record = self.library.record(task.key, facts.kind) or self.library.record(plain.key, facts.kind)
        if record is not None:
            kernel = parse_kernel(record.kernel_text, record.kernel_name)
            found[kernel.label] = (kernel, record)
        if known.record is not None:
            kernel = parse_kernel(known.record.kernel_text, known.record.kernel_name)
            found.setdefault(kernel.label, (kernel, known.record))
        for imported in self.store.imported(task.signature):
            if imported.task.key == task.key and imported.device_kind == facts.kind:
                kernel = parse_kernel(imported.kernel_text, imported.kernel_name)
                found.setdefault(kernel.label, (kernel, imported))
        for kernel in self.library.kernels(task.signature, task.device):
            found.setdefault(kernel.label, (kernel, None))
        self.excluded = {kernel.name: reason for kernel, _ in found.values() if (reason := kernel.why_not(task))}
        elsewhere = self.store.imported_decision(RecordKey.of(task, facts))
        self.lost = {n: e for n, e in elsewhere.tried if n in found and _has_lost(e, task, self.settings)} if elsewhere else {}
        settled |= self.lost.keys()
        return [pair for name, pair in found.items() if name not in settled and pair[0].name not in self.excluded]

    def _may_try_again(self, label: str, task: Task, facts: DeviceFacts, known: Decision) -> bool:
        """Whether what a kernel ended with may be the machine's fault, and it has tries left in this process: see `TRIES`."""
        end, times = last_outcome(known, label, task, self.settings)
        if times >= TRIES.get(end, 0) or (end == Status.CRASHED and not self.offline):
            return False
        if end == NOISY and choose(known, task, self.settings).record is not None:
            return False  # another kernel wins
        return (self.store.directory, RecordKey.of(task, facts).text, label) not in _failed_here

    def _verify(self, task: Task, facts: DeviceFacts, key: RecordKey, known: Decision) -> Decision:
        """Evaluate what is unverified under the task's lock, remember the outcome; what the budget does not cover stays open."""
        with self.store.lock(key.text) as mine:
            if not mine:
                return dataclasses.replace(known, reason="kept Inductor: another process is verifying this task")
            known = self.known(key, explained=False) or known
            complete = True
            for kernel, record in self.unverified(task, facts, known):  # anew: whoever held the lock before has verified some
                evaluation = self._evaluate(task, kernel, record) if self._left_s() > 0 else None
                if evaluation is None:
                    complete = False
                    break
                if ending(evaluation, task, self.settings) in TRIES:
                    _failed_here.add((self.store.directory, key.text, kernel.label))
                origin = self._origin(kernel, task, record)
                known = merge(known, task, kernel, evaluation, facts, origin, self.settings)
                self.store.put_decision(key, known)
        if known.record is not None:
            self._keep_binary(known.record, facts)
        if not complete:
            return dataclasses.replace(known, reason="kept Inductor: the verification budget is spent (verify_budget_s)")
        return known

    def _left_s(self) -> float:
        return self.deadline - time.monotonic()

    def _evaluate(self, task: Task, kernel: Kernel, record: Record | None) -> Evaluation | None:
        """One evaluation, and a second with full timing of the same constants if the first is too noisy to tell.

        None if the budget cut it short. That says nothing about the kernel, unless it had the budget to itself: such a one
        counts as timed out, or every process would spend its budget on it.
        """
        limit_s = self._left_s() + GRACE_S
        evaluation = evaluate(task, kernel, record, self.settings, self.binaries, limit_s=limit_s)
        first, self._evaluated = self._evaluated == 0, self._evaluated + 1
        if evaluation.status is Status.TIMEOUT and limit_s < self.settings.worker_timeout_s and (self.offline or not first):
            return None
        if ending(evaluation, task, self.settings) == NOISY and self._left_s() > 0:
            log.debug("%s %s on %s: %s; timed again", task.signature, task.key, kernel.label, NOISY)
            limit_s = self._left_s() + GRACE_S
            second = evaluate(task, kernel, record, self.settings, self.binaries, again=evaluation, limit_s=limit_s)
            evaluation = evaluation if second.status is Status.TIMEOUT else second
        log.debug("%s %s on %s: %s %s", task.signature, task.key, kernel.label, evaluation.status, evaluation.detail)
        return evaluation

    def _keep_binary(self, record: Record, facts: DeviceFacts) -> None:
        """Put the code that was measured into the store: the first call of the region need not compile it again."""
        kernel, target = parse_kernel(record.kernel_text, record.kernel_name), target_for(record.task.device)
        key = target.binary_key(kernel, record.task, dict(record.constants), facts)
        code = Binaries(self.binaries).binary(key)
        if code is not None:
            self.store.put_binary(key, code)

    def _miss(self, task: Task, facts: DeviceFacts, key: RecordKey, decision: Decision) -> Decision:
        """`on_miss` for a task that nothing wins."""
        if self.settings.on_miss == "fallback":
            return decision
        if self.settings.on_miss == "error":
            if any(evaluation.status.is_correct for evaluation in (*dict(decision.tried).values(), *self.lost.values())):
                return decision  # a kernel serves it, Inductor is faster
            raise LLMKernelsError(f"{task.signature} {task.key}: {decision.reason} (on_miss='error')")
        from torch_llmkernels.search import on_miss  # only a miss pays for importing the search

        record = on_miss.search(task, facts, key, self.store, self.settings)
        return decision if record is None else choose(self.store.put_winner(key, record), task, self.settings)


def merge(
    known: Decision, task: Task, kernel: Kernel, evaluation: Evaluation, facts: DeviceFacts, origin: str, settings: Settings
) -> Decision:
    """`known` with one more evaluation; the record is the fastest correct kernel so far (relative to its baselines), if not yet
    a winner. Earlier tries stay while they all end in one of the ways of `TRIES`, to be counted."""
    again = TRIES if ending(evaluation, task, settings) in TRIES else {}
    earlier = [(n, e) for n, e in known.tried if n != kernel.label or ending(e, task, settings) in again]
    tried = (*earlier, (kernel.label, evaluation))
    record = known.record
    if record is not None and record.kernel_name == kernel.name and record.kernel_text == kernel.text:
        record = None  # its evidence is being replaced
    if evaluation.status.is_correct and (record is None or evaluation.relative_time < record.evaluation.relative_time):
        record = Record(task, kernel.name, kernel.text, evaluation.constants, facts.kind, evaluation, origin)
    return Decision(record, known.reason, tried)


def ending(evaluation: Evaluation, task: Task, settings: Settings) -> str:
    """How an evaluation ended: its status, or `NOISY` if it is the spread alone that keeps the kernel out."""
    wins = evaluation.speedup is not None and not _too_slow(evaluation, task, settings)
    if settings.swap != "fastest" or not wins or _at_quartile(evaluation) >= 1.0:
        return str(evaluation.status)
    return NOISY


def _too_slow(evaluation: Evaluation, task: Task, settings: Settings) -> str:
    """What a timed kernel lacks beside the best baseline, noise aside; empty if it is faster by enough."""
    speedup = evaluation.speedup or 0.0
    if speedup < settings.min_speedup:
        return f", {settings.min_speedup:.2f}x is needed"
    saved_ms = (evaluation.time_ms or 0.0) * (speedup - 1.0)
    if saved_ms < CALL_MS.get(task.device, 0.0):
        return f" and saves {saved_ms * 1e3:.1f} us, less than a call of its own costs in the graph"
    return ""


def _has_lost(evaluation: Evaluation, task: Task, settings: Settings) -> bool:
    """Whether a kernel stays out by what an evaluation elsewhere found, not by chance or for want of an answer."""
    if evaluation.status.is_correct:
        return settings.swap == "fastest" and evaluation.speedup is not None and bool(_too_slow(evaluation, task, settings))
    return evaluation.status not in TRIES


def _why_lost(lost: Mapping[str, Evaluation], task: Task) -> str:
    said = [f"{n} {f'{e.speedup:.2f}x the best baseline' if e.speedup else e.status}" for n, e in lost.items()]
    where = "on another device like this one, as an imported bundle says"
    return f"kept Inductor: not faster {where} ({'; '.join(said)}); to verify it here: llmkernels cache rm {task.key}"


def _at_quartile(evaluation: Evaluation) -> float:
    """The best baseline's time over the kernel's at the lower quartile of the turns in which both ran."""
    return (evaluation.speedup or 0.0) * (1.0 - (evaluation.spread or 0.0))


def last_outcome(known: Decision, label: str, task: Task, settings: Settings) -> tuple[str, int]:
    """How the last evaluation of a kernel that was tried ended, and how many there were; see `merge` for those that count."""
    outcomes = [ending(evaluation, task, settings) for name, evaluation in known.tried if name == label]
    return outcomes[-1], len(outcomes)


def choose(known: Decision, task: Task, settings: Settings) -> Decision:
    """Swap or not: the one place where that is decided.

    `swap="correct"` takes any correct kernel. `swap="fastest"` takes one only if the best baseline's time over its own is at
    least `min_speedup`, it saves more than its call costs, and it also wins at the lower quartile of the turns in which both ran.
    """
    record = known.record
    if record is None:
        return dataclasses.replace(known, reason=_why_nothing(known, task, settings))
    if settings.swap == "correct":
        return dataclasses.replace(known, reason=f"swapped: {record.kernel_name} is correct (swap='correct')")
    speedup = record.evaluation.speedup
    if speedup is None:
        return dataclasses.replace(known, record=None, reason="kept Inductor: the kernel is correct but was not timed")
    found = f"{record.kernel_name} runs at {speedup:.2f}x the best baseline"
    if lacks := _too_slow(record.evaluation, task, settings):
        return dataclasses.replace(known, record=None, reason=f"kept Inductor: {found}{lacks}")
    if ending(record.evaluation, task, settings) == NOISY:
        return dataclasses.replace(known, record=None, reason=_why_noisy(known, record, found, task, settings))
    return dataclasses.replace(known, reason=f"swapped: {found}")


def _why_noisy(known: Decision, record: Record, found: str, task: Task, settings: Settings) -> str:
    label = parse_kernel(record.kernel_text, record.kernel_name).label
    times = sum(name == label and ending(evaluation, task, settings) == NOISY for name, evaluation in known.tried)
    next_time = f"later processes time it again, try {times} of {TRIES[NOISY]}"
    if times >= TRIES[NOISY]:
        next_time = f"to time it again: llmkernels cache rm {record.task.key}"
    return f"kept Inductor: {NOISY}: {found}, but at {_at_quartile(record.evaluation):.2f}x at the lower quartile; {next_time}"


def _why_nothing(known: Decision, task: Task, settings: Settings) -> str:
    if known.reason.startswith("kept Inductor"):
        return known.reason
    if known.tried:
        last = dict(known.tried)
        outcomes = {name: last_outcome(known, name, task, settings) for name in last}
        said = "; ".join(f"{name} {_in_words(*outcome, last[name].detail)}" for name, outcome in outcomes.items())
        by_chance = any(end in TRIES for end, _ in outcomes.values())
        remedy = f"; to try them again: llmkernels cache rm {task.key}" if by_chance else ""
        wrong = [name for name, (end, _) in outcomes.items() if end not in TRIES]
        script = f"; to see it: llmkernels repro {task.key} --kernel {wrong[0].partition('@')[0]}" if wrong else ""
        return f"kept Inductor: no kernel passed on this device ({said}){script}{remedy}"
    return f"kept Inductor: no kernel implements {task.signature} for this task on {task.device}"


def _in_words(end: str, times: int, detail: str) -> str:
    """How a kernel ended, how often it was tried if that may be chance, and the first sentence of the detail (what, how far)."""
    ended = f"{end}, try {times} of {TRIES[end]}" if end in TRIES else end
    first = detail.strip().partition("\n")[0].partition(". ")[0].rstrip(".")
    return f"{ended}: {first if len(first) <= MOST_DETAIL else first[:MOST_DETAIL] + '...'}" if first else ended


def evaluate(
    task: Task, kernel: Kernel, record: Record | None, settings: Settings, binaries: str = "", again: Evaluation | None = None,
    limit_s: float = math.inf,
) -> Evaluation:  # fmt: skip
    """Check and time one kernel on the current device, in this process's worker; a record's constants are taken, others tuned.

    Args:
        binaries: Folder of compiled code that the worker looks in and adds to.
        again: What an earlier evaluation found: its constants are taken, and timed for as long as a ranking takes.
        limit_s: Seconds it may take, where `worker_timeout_s` allows more.
    """
    job = job_of(task, kernel, record, settings, binaries, target_for(task.device).current())
    if limit_s < settings.worker_timeout_s:
        job = dataclasses.replace(job, limit_s=limit_s)
    if again is not None:
        job = dataclasses.replace(job, constants=dict(again.constants), brief=False, seed=job.seed + 1)
    return worker(settings).evaluate(job)


def job_of(task: Task, kernel: Kernel, record: Record | None, settings: Settings, binaries: str, index: int) -> Job:
    """The evaluation that decides whether a kernel is swapped in, on device `index`."""
    return Job(
        task=task, kernel_text=kernel.text, kernel_name=kernel.name, tier=settings.verify, timed=settings.swap == "fastest",
        constants=dict(record.constants) if record else None, brief=True, binaries=binaries, device_index=index,
    )  # fmt: skip


def _compile_all(compiler: Any, jobs: queue.SimpleQueue[Job], ended: threading.Event) -> None:
    with contextlib.suppress(queue.Empty):
        while not ended.is_set():
            compiler.compile(jobs.get_nowait())


_failed_here: set[tuple[Path | None, str, str]] = set()
"""Kernels that this process will not try again, whatever `TRIES` allows: the store's directory, the decision's key, the label."""

_workers: dict[tuple[str, float, str], Any] = {}
_worker_lock = threading.Lock()


def worker(settings: Settings, purpose: str = "evaluate") -> Any:
    """The worker of this process for a purpose and these limits, started at first use and closed at exit."""
    limits = purpose, settings.worker_timeout_s, settings.cxx
    with _worker_lock:
        if limits not in _workers:
            from torch_llmkernels.evaluate.worker import Worker

            _workers[limits] = Worker(settings)
        return _workers[limits]


@atexit.register
def _close_workers() -> None:
    for each in list(_workers.values()):  # a thread that compiles ahead may start one
        each.close()


def _leave_workers() -> None:
    """In a forked process: the workers are its parent's, and two that write into one pipe would read each other's answers."""
    global _worker_lock
    _worker_lock = threading.Lock()  # whoever held it is not in this process
    for each in _workers.values():
        each.leave()
    _workers.clear()


os.register_at_fork(after_in_child=_leave_workers)
