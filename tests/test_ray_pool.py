"""The pool over a real Ray cluster on this machine: the same answers as locally, also after a worker was killed."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from scripted_search import kernel
from tasks import relu_add_task, softmax_task

from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.pool import RayPool
from torch_llmkernels.evaluation import Status
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.settings import Settings

ray = pytest.importorskip("ray", reason="needs the ray extra")
pytestmark = pytest.mark.skipif(target_for("cpu").unavailable() is not None, reason="no C++ compiler")

ENDLESS = kernel("endless").replace("for (int64_t i = 0; i < n; ++i)", "for (volatile int64_t i = 0; i >= 0; i = 0)")


@pytest.fixture(scope="module")
def pool() -> Iterator[RayPool]:
    """One actor of a cluster that ends with the module."""
    ray.init(num_cpus=1, include_dashboard=False, log_to_driver=False)
    with RayPool(gpus=0, settings=Settings(worker_timeout_s=90.0)) as made:
        yield made
    ray.shutdown()


def worker_processes() -> list[int]:
    """Evaluation workers of Ray's actors, as /proc tells; a worker of this very process belongs to another test."""
    parents: dict[int, int] = {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            parents[int(stat.parent.name)] = int(stat.read_text().rpartition(")")[2].split()[1])
        except OSError:
            continue  # it has ended
    return [pid for pid in parents if _descends(pid, parents) and _is_worker(pid) and parents[pid] != os.getpid()]


def _descends(pid: int, parents: dict[int, int]) -> bool:
    while pid in parents and pid != os.getpid():
        pid = parents[pid]
    return pid == os.getpid()


def _is_worker(pid: int) -> bool:
    try:
        return b"torch_llmkernels.evaluate.worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def test_a_worker_killed_in_the_middle_costs_one_evaluation(pool: RayPool) -> None:
    assert pool.submit(Job(softmax_task(), "not a kernel")).result().status is Status.INVALID
    (worker,) = worker_processes()
    endless = pool.submit(Job(relu_add_task(), ENDLESS, timed=False))
    following = pool.submit(Job(relu_add_task(), kernel("1.0"), timed=False))
    while "/llmk-" not in Path(f"/proc/{worker}/maps").read_text():  # the compiled kernel is not loaded yet
        threading.Event().wait(0.01)
    os.kill(worker, signal.SIGKILL)
    killed, survived = endless.result(), following.result()
    assert killed.status is Status.FAILED and "SIGKILL" in killed.detail
    assert survived.status is Status.CORRECT, survived.detail
    assert worker not in worker_processes()
