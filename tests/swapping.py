"""The backend with a library that has a kernel for everything, and kernels that run the region's own program.

No compiler, store or worker is involved: what is tested is what happens to graphs.
"""

from __future__ import annotations

import collections
import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch._functorch import config as functorch_config
from torch._inductor import config

from torch_llmkernels import backend, plan, registry
from torch_llmkernels.evaluation import Decision, ErrorStat, Evaluation, Record, Status
from torch_llmkernels.graph import op
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task

CORRECT = Evaluation(Status.CORRECT, errors=(ErrorStat("y", "normal", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True),))


def record_of(task: Task, kernel_text: str = "the region's own program") -> Record:
    """A record that claims a kernel for `task`."""
    return Record(task, "reference", kernel_text, (), "cpu-test", CORRECT, "test")


def swap_all(tasks: Sequence[Task], settings: Settings) -> list[Decision]:
    """Every task has a kernel."""
    return [Decision(record_of(task), "swapped: it is a test") for task in tasks]


def swap_none(tasks: Sequence[Task], settings: Settings) -> list[Decision]:
    """No task has one."""
    return [Decision(None, "kept Inductor: it is a test")] * len(tasks)


class Kernels:
    """What ran.

    Attributes:
        calls: Signature -> number of calls of its kernel.
    """

    def __init__(self) -> None:
        self.calls: collections.Counter[str] = collections.Counter()

    def build(self, spec: op.Spec, settings: Settings, index: int) -> Callable[..., None]:
        """In the place of `op.build_launcher`."""
        slot = op.Slot(spec, settings)

        def launch(*args: Any) -> None:
            self.calls[spec.task.signature] += 1
            slot.run_reference(*args)

        return launch


@contextlib.contextmanager
def swapping(store: Path, resolve: Callable = swap_all) -> Iterator[Kernels]:
    """Compile under these decisions, with caches of torch off and ours empty.

    Args:
        store: An empty folder.
        resolve: In the place of `torch_llmkernels.resolve.resolve`.
    """
    kernels = Kernels()
    torch._dynamo.reset()
    plan.forget()
    registry.clear()
    with (
        mock.patch.object(backend, "resolve", resolve),
        mock.patch.object(op, "build_launcher", kernels.build),
        mock.patch.object(op, "_slots", {}),
        mock.patch.object(op, "_settings", {}),
        mock.patch.object(plan, "_fuel_used", 0),
        mock.patch.dict("os.environ", {"LLMKERNELS_CACHE_DIR": str(store)}),
        config.patch(fx_graph_cache=False, fx_graph_remote_cache=False),
        functorch_config.patch(enable_autograd_cache=False),
    ):
        yield kernels
    torch._dynamo.reset()
