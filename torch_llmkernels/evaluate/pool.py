"""Where evaluations run: one worker per local device, or the devices of a Ray cluster."""

from __future__ import annotations

import dataclasses
import queue
import tempfile
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.worker import Worker
from torch_llmkernels.evaluation import Evaluation
from torch_llmkernels.settings import Settings, current

MOST_COMPILERS = 4
"""Processes that compile ahead; each compiles several constants at a time."""


class Pool(Protocol):
    """Evaluates jobs, as many at a time as it has devices. Usable as a context manager."""

    def submit(self, job: Job) -> Future[Evaluation]:
        """Start a job on the next free device; the future always gives an evaluation."""

    def close(self) -> None:
        """Stop; jobs in flight are lost."""


class _Closing:
    def close(self) -> None:
        raise NotImplementedError

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalPool(_Closing):
    """One worker process per device of this machine, and for GPUs as many that compile ahead.

    Two evaluations never share a device, and on the CPU, where all cores are one device, none run side by side: times would be
    each other's noise. A GPU is idle while its next candidate compiles, so that is done beside the timing of the current one; on
    the CPU compiling would disturb it.

    Args:
        devices: Their indexes.
        settings: Default: those in force.
        compile_ahead: Whether to compile beside the timing; default: for CUDA jobs.
    """

    def __init__(
        self, devices: Sequence[int] = (0,), settings: Settings | None = None, compile_ahead: bool | None = None
    ) -> None:
        chosen = settings or current()
        self._workers = [Worker(chosen) for _ in devices]
        self._compilers = [Worker(chosen) for _ in devices[:MOST_COMPILERS]]
        self._free: queue.SimpleQueue[tuple[int, Worker]] = queue.SimpleQueue()
        for pair in zip(devices, self._workers, strict=True):
            self._free.put(pair)
        self._idle: queue.SimpleQueue[Worker] = queue.SimpleQueue()
        for compiler in self._compilers:
            self._idle.put(compiler)
        self._devices, self._ahead = devices, compile_ahead
        self._open: set[Future[Evaluation]] = set()
        self._binaries = tempfile.TemporaryDirectory(prefix="llmk-", ignore_cleanup_errors=True)
        self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="llmkernels-pool")
        self._compiling = ThreadPoolExecutor(len(self._compilers), thread_name_prefix="llmkernels-compile")

    def submit(self, job: Job) -> Future[Evaluation]:
        """See `Pool`; the job's `device_index` is replaced by that of the device it gets."""
        outcome: Future[Evaluation] = Future()
        self._open.add(outcome)
        outcome.add_done_callback(self._open.discard)
        ahead = job.task.device == "cuda" if self._ahead is None else self._ahead
        if ahead:
            self._compiling.submit(self._compile, dataclasses.replace(job, binaries=self._binaries.name), outcome)
        else:
            self._threads.submit(self._evaluate, job, outcome)
        return outcome

    def _compile(self, job: Job, outcome: Future[Evaluation]) -> None:
        """Compile, then queue for a device. Whatever goes wrong here, the evaluation tries again and reports."""
        compiler = self._idle.get()
        try:
            if not outcome.cancelled():
                compiler.compile(job.on(self._devices[0]))
        finally:
            self._idle.put(compiler)
            try:
                self._threads.submit(self._evaluate, job, outcome)
            except RuntimeError:  # the pool was closed meanwhile
                outcome.cancel()

    def _evaluate(self, job: Job, outcome: Future[Evaluation]) -> None:
        if not outcome.set_running_or_notify_cancel():
            return
        device, worker = self._free.get()
        try:
            outcome.set_result(worker.evaluate(job.on(device)))
        except BaseException as error:
            outcome.set_exception(error)
        finally:
            self._free.put((device, worker))

    def close(self) -> None:
        """See `Pool`."""
        for threads in (self._compiling, self._threads):
            threads.shutdown(wait=False, cancel_futures=True)
        for outcome in list(self._open):
            outcome.cancel()
        for worker in (*self._workers, *self._compilers):
            worker.close()
        self._binaries.cleanup()


class RayPool(_Closing):
    """One actor with a worker process per device of a Ray cluster (the `ray` extra).

    Args:
        workers: How many actors.
        gpus: GPUs per actor; 0 for the CPU target, of which each actor then takes a machine of its own by `cpus`.
        cpus: CPUs per actor.
        settings: Default: those in force.
        address: The cluster; default: the one Ray finds, else one on this machine.
    """

    def __init__(
        self, workers: int = 1, gpus: float = 1.0, cpus: float = 1.0, settings: Settings | None = None, address: str | None = None
    ) -> None:
        import ray

        if not ray.is_initialized():
            ray.init(address=address)
        actor = ray.remote(num_gpus=gpus, num_cpus=cpus)(_RayWorker)
        chosen = settings or current()
        self._actors = [actor.remote(chosen) for _ in range(workers)]
        self._free: queue.SimpleQueue[Any] = queue.SimpleQueue()
        for made in self._actors:
            self._free.put(made)
        self._threads = ThreadPoolExecutor(workers, thread_name_prefix="llmkernels-ray")

    def submit(self, job: Job) -> Future[Evaluation]:
        """See `Pool`; every actor sees its own GPU as device 0."""
        return self._threads.submit(self._evaluate, job.on(0))

    def _evaluate(self, job: Job) -> Evaluation:
        import ray

        actor = self._free.get()
        try:
            return Evaluation.from_json(ray.get(actor.evaluate.remote(job.to_json())))
        finally:
            self._free.put(actor)

    def close(self) -> None:
        """See `Pool`; the cluster itself stays up."""
        import ray

        self._threads.shutdown(wait=False, cancel_futures=True)
        for actor in self._actors:
            ray.kill(actor)


class _RayWorker:
    """What runs on the cluster: a worker process, spoken to in JSON."""

    def __init__(self, settings: Settings) -> None:
        self._worker = Worker(settings)

    def evaluate(self, job: dict[str, Any]) -> dict[str, Any]:
        return self._worker.evaluate(Job.from_json(job)).to_json()
