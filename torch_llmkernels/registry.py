"""What the backend decided in this process: `torch_llmkernels.report()`."""

from __future__ import annotations

import dataclasses
import json
import threading

from torch_llmkernels.evaluation import Decision, Evaluation
from torch_llmkernels.task import Task


@dataclasses.dataclass(frozen=True)
class RegionReport:
    """One region of a compiled graph.

    Attributes:
        signature: Name of what it computes.
        key: The task's key; empty for a region that never became a task.
        shapes: Its inputs in words, such as `16x1024 f32, 1024 f32`.
        swapped: Whether a kernel of the library runs instead of Inductor's code.
        reason: Why, in one line.
        kernel: Name of the kernel that was swapped in, else empty.
        origin: Where that kernel came from, else empty.
        evaluation: Its evidence, if a kernel was considered.
    """

    signature: str
    key: str
    shapes: str
    swapped: bool
    reason: str
    kernel: str = ""
    origin: str = ""
    evaluation: Evaluation | None = None

    @classmethod
    def of(cls, task: Task, decision: Decision) -> RegionReport:
        """The report of a task that was looked up."""
        record = decision.record
        evidence = record.evaluation if record else decision.tried[-1][1] if decision.tried else None
        return cls(
            task.signature, task.key, shapes_of(task), record is not None, decision.reason,
            record.kernel_name if record else "", record.origin if record else "", evidence,
        )  # fmt: skip

    @property
    def line(self) -> str:
        """The log line of the region."""
        what = f"{self.signature} [{self.shapes}] key={self.key}" if self.key else self.signature
        return f"region {what}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    Attributes:
        name: Which graph: torch's compile id, such as `0/0`, or the digest of a graph compiled outside Dynamo.
        regions: Every region that was found, in graph order.
        note: Why the whole graph went to Inductor without a look at its regions; else empty.
    """

    name: str
    regions: tuple[RegionReport, ...]
    note: str = ""

    def to_json(self) -> str:
        """JSON text, for the structured trace."""
        plain = dataclasses.asdict(self)
        for region, found in zip(plain["regions"], self.regions, strict=True):
            region["evaluation"] = found.evaluation and found.evaluation.to_json()
        return json.dumps(plain)


_SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32"}


def shapes_of(task: Task) -> str:
    """The inputs in words: `16x1024 f32, 1024 f32`."""
    return ", ".join(f"{'x'.join(map(str, t.shape)) or 'scalar'} {_SHORT.get(t.dtype, t.dtype)}" for t in task.inputs)


_graphs: list[GraphReport] = []
_lock = threading.Lock()


def add(report: GraphReport) -> None:
    """Remember one compiled graph."""
    with _lock:
        _graphs.append(report)


def report() -> list[GraphReport]:
    """Every graph that this process compiled with the backend, oldest first."""
    with _lock:
        return list(_graphs)


def clear() -> None:
    """Forget them; `torch._dynamo.reset()` does."""
    with _lock:
        _graphs.clear()
