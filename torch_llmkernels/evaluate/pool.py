"""Where evaluations run: one worker per local device, or the devices of a Ray cluster."""

from __future__ import annotations

import queue
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.worker import Worker
from torch_llmkernels.evaluation import Evaluation
from torch_llmkernels.settings import Settings, current


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
    """One worker process per device of this machine.

    Two evaluations never share a device, and on the CPU, where all cores are one device, none run side by side: times would be
    each other's noise.

    Args:
        devices: Their indexes.
        settings: Default: those in force.
    """

    def __init__(self, devices: Sequence[int] = (0,), settings: Settings | None = None) -> None:
        self._workers = [Worker(settings or current()) for _ in devices]
        self._free: queue.SimpleQueue[tuple[int, Worker]] = queue.SimpleQueue()
        for pair in zip(devices, self._workers, strict=True):
            self._free.put(pair)
        self._threads = ThreadPoolExecutor(len(self._workers), thread_name_prefix="llmkernels-pool")

    def submit(self, job: Job) -> Future[Evaluation]:
        """See `Pool`; the job's `device_index` is replaced by that of the device it gets."""
        return self._threads.submit(self._evaluate, job)

    def _evaluate(self, job: Job) -> Evaluation:
        device, worker = self._free.get()
        try:
            return worker.evaluate(job.on(device))
        finally:
            self._free.put((device, worker))

    def close(self) -> None:
        """See `Pool`."""
        self._threads.shutdown(wait=False, cancel_futures=True)
        for worker in self._workers:
            worker.close()


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
