"""What the backend decided in this process, for every region of every graph: `torch_llmkernels.report()`.

`report()` has every graph, `report(compiled)` those that one `torch.compile` call made. A graph is filed with the backend object
of the call that it was compiled for, which is how the two find one another.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import io
import threading
import weakref
from collections import Counter
from collections.abc import Iterator
from typing import Any

from torch_llmkernels.errors import LLMKernelsError
from torch_llmkernels.evaluation import Decision, Evaluation, GraphDecision
from torch_llmkernels.graph.op import encode_spec, why_reference
from torch_llmkernels.task import Task
from torch_llmkernels.words import counted, shapes_of


@dataclasses.dataclass(frozen=True)
class RegionReport:
    """One region of a compiled graph.

    Attributes:
        signature: Name of what it computes.
        key: The task's key; empty for a region that never became a task.
        shapes: Its inputs in words, such as `16x1024 f32, 1024 f32`.
        swapped: Whether a kernel of the library runs instead of Inductor's code. Where one was swapped in and cannot be built in
            this process, the region runs its reference, eagerly, and this is False from the first call on.
        reason: Why, in one line.
        kernel: Name of the kernel that was swapped in, else empty.
        origin: Where that kernel came from, else empty.
        evaluation: Its evidence, if a kernel was considered.
        considered: Name of the kernel that `evaluation` is about, swapped in or not.
        spec: What the region's slot was bound from, if a kernel was swapped in; not part of `to_json`.
    """

    signature: str
    key: str
    shapes: str
    swapped: bool
    reason: str
    kernel: str = ""
    origin: str = ""
    evaluation: Evaluation | None = None
    considered: str = ""
    spec: str = dataclasses.field(default="", repr=False)

    @classmethod
    def of(cls, task: Task, decision: Decision) -> RegionReport:
        """The report of a task that was looked up."""
        record, name = decision.record, decision.record.kernel_name if decision.record else ""
        label, evidence = (name, record.evaluation) if record else decision.tried[-1] if decision.tried else ("", None)
        return cls(
            task.signature, task.key, shapes_of(task), record is not None, decision.reason, name,
            record.origin if record else "", evidence, label.partition("@")[0], encode_spec(record) if record else "",
        )  # fmt: skip

    def as_it_runs(self) -> RegionReport:
        """This report, or the one of a region that was swapped and runs its reference in this process."""
        reason = why_reference(self.spec) if self.swapped and self.spec else ""
        if not reason:
            return self
        return dataclasses.replace(self, swapped=False, kernel="", reason=f"runs its reference: {reason}")

    @property
    def kernel_ms(self) -> float | None:
        """Milliseconds of the kernel alone, as it was measured on this device; None if it was not timed."""
        return self.evaluation.time_ms if self.evaluation else None

    @property
    def baseline_ms(self) -> float | None:
        """The same of the best baseline, eager or Inductor."""
        return self.evaluation.baseline_ms if self.evaluation else None

    @property
    def speedup(self) -> float | None:
        """The best baseline's time over the kernel's, the region alone: above 1, the kernel is faster."""
        return self.evaluation.speedup if self.evaluation else None

    def to_json(self) -> dict[str, Any]:
        """Plain JSON: the fields, and the three numbers above."""
        plain = {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "spec"}
        numbers = {"kernel_ms": self.kernel_ms, "baseline_ms": self.baseline_ms, "speedup": self.speedup}
        return {**plain, **numbers, "evaluation": self.evaluation and self.evaluation.to_json()}

    @property
    def line(self) -> str:
        """The log line of the region."""
        what = f"{self.signature} [{self.shapes}] key={self.key}" if self.key else self.signature
        return f"region {what}: {self.reason}"


@dataclasses.dataclass(frozen=True)
class GraphReport:
    """One compiled graph.

    Attributes:
        name: Which graph: torch's compile id, such as `0/0`; `?` for one compiled outside Dynamo.
        regions: Every region that was found, in graph order.
        note: Why the whole graph went to Inductor without a look at its regions; else empty.
        measured: What was measured about the whole graph, or None: then its swaps rest on their margin in isolation.
    """

    name: str
    regions: tuple[RegionReport, ...]
    note: str = ""
    measured: GraphDecision | None = None

    @property
    def swapped(self) -> list[RegionReport]:
        """Those that run a kernel of the library."""
        return [region for region in self.regions if region.swapped]

    def as_it_runs(self) -> GraphReport:
        """This report, with `RegionReport.as_it_runs` of every region."""
        return dataclasses.replace(self, regions=tuple(region.as_it_runs() for region in self.regions))

    def to_json(self) -> dict[str, Any]:
        """Plain JSON."""
        measured = self.measured and {**self.measured.to_json(), "speedup": self.measured.speedup}
        return {"name": self.name, "note": self.note, "measured": measured, "regions": [r.to_json() for r in self.regions]}


class Report(tuple[GraphReport, ...]):
    """Graphs in the order in which they were compiled; printing it prints a table."""

    @property
    def regions(self) -> list[RegionReport]:
        """The regions of all graphs."""
        return [region for graph in self for region in graph.regions]

    @property
    def swapped(self) -> list[RegionReport]:
        """Those that run a kernel of the library."""
        return [region for region in self.regions if region.swapped]

    def to_json(self) -> list[dict[str, Any]]:
        """Plain JSON, one entry per graph."""
        return [graph.to_json() for graph in self]

    def __str__(self) -> str:
        return table(self)


_graphs: list[tuple[GraphReport, weakref.ref[Any] | None]] = []
_lock = threading.Lock()


def add(report: GraphReport) -> None:
    """Remember one compiled graph, and for which `torch.compile` call it was compiled."""
    owner = _compiling_for()
    with _lock:
        _graphs.append((report, None if owner is None else weakref.ref(owner)))


def replace(old: GraphReport, new: GraphReport) -> None:
    """Put a report in another's place: what was decided about the graph has changed since it was compiled."""
    with _lock:
        _graphs[:] = [(new if graph is old else graph, owner) for graph, owner in _graphs]


@contextlib.contextmanager
def forgetting() -> Iterator[None]:
    """Forget the graphs that are compiled inside: a measurement compiles variants that are nobody's."""
    with _lock:
        before = list(_graphs)
    try:
        yield
    finally:
        with _lock:
            _graphs[:] = before


def report(compiled: Any = None) -> Report:
    """What was decided for each region of each graph, by how much, and why.

    Args:
        compiled: What `torch.compile` returned, or a module after `module.compile(...)`. Default: every graph of this process.

    Returns:
        The graphs, oldest first. Empty if `compiled` was not called yet, or runs code that Dynamo had compiled before for another
        module of its class.

    Raises:
        LLMKernelsError: if `compiled` was not compiled.
    """
    owner = None if compiled is None else _backend_of(compiled)
    with _lock:
        graphs = [graph for graph, of in _graphs if compiled is None or (of is not None and of() is owner)]
    return Report(graph.as_it_runs() for graph in graphs)


def _compiling_for() -> Any:
    """The backend object of the `torch.compile` call that Dynamo is compiling a graph for; None outside Dynamo."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return _innermost(InstructionTranslator.current_tx().output.compiler_fn)
    except AttributeError:  # no translation in progress
        return None


def _backend_of(compiled: Any) -> Any:
    """The backend object inside what `torch.compile` returned.

    Raises:
        LLMKernelsError: if there is none.
    """
    compiled = getattr(compiled, "_compiled_call_impl", None) or compiled  # module.compile(...)
    context = getattr(compiled, "dynamo_ctx", None)
    wrapper = inspect.unwrap(compiled, stop=lambda f: "callback" in _closure(f)) if callable(compiled) else None
    callback = context.callback if context is not None else _closure(wrapper).get("callback")
    if callback is None:
        raise LLMKernelsError(
            f"report() takes what torch.compile returned, or a module after .compile(); {type(compiled).__name__} is not compiled"
        )
    return _innermost(callback)


def _innermost(backend: Any) -> Any:
    """The backend inside Dynamo's wrappers; releases of torch differ in how they name what they wrap."""
    names = ("_torchdynamo_orig_backend", "_torchdynamo_orig_callable")
    while inner := next((getattr(backend, name) for name in names if getattr(backend, name, None) is not None), None):
        backend = inner
    return backend


def _closure(function: Any) -> dict[str, Any]:
    names = getattr(getattr(function, "__code__", None), "co_freevars", ())
    return {name: cell.cell_contents for name, cell in zip(names, getattr(function, "__closure__", None) or (), strict=False)}


def clear() -> None:
    """Forget every graph."""
    with _lock:
        _graphs.clear()


_WIDTH = 170
_COLUMNS = ("graph", "region", "task", "inputs", "n", "runs", "kernel ms", "best baseline ms", "ratio", "source", "why")
_NUMBERS = ("n", "kernel ms", "best baseline ms", "ratio")


def table(report: Report) -> str:
    """The table and its summary, as plain text."""
    if not report:
        return "no graph was compiled: not called yet, or it runs code that Dynamo had compiled before (see report())"
    from rich import box
    from rich.console import Console
    from rich.table import Table

    shown = Table(box=box.SIMPLE, pad_edge=False)
    for column in _COLUMNS:
        shown.add_column(column, overflow="fold", justify="right" if column in _NUMBERS else "left")
    for row in (row for graph in report for row in _rows(graph)):
        shown.add_row(*row)
    buffer = io.StringIO()
    console = Console(file=buffer, width=_WIDTH)
    console.print(shown)
    for line in _summary(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def _rows(graph: GraphReport) -> list[list[str]]:
    """The lines of one graph; equal regions share one, and `n` counts them."""
    if not graph.regions:
        return [[graph.name, "-", *[""] * 8, graph.note or "no region was found"]]
    counts = Counter((region.signature, region.key, region.reason) for region in graph.regions)
    distinct = {(region.signature, region.key, region.reason): region for region in graph.regions}
    return [_row(graph.name, region, counts[name]) for name, region in distinct.items()]


def _row(graph: str, region: RegionReport, count: int) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        graph, region.signature, region.key[:8], region.shapes, str(count), _runs(region),
        number(region.kernel_ms, ".4f"), number(region.baseline_ms, ".4f"), number(region.speedup, ".2f"), region.origin or "-",
        region.reason.removeprefix("kept Inductor: ").removeprefix("swapped: "),
    ]  # fmt: skip


def _runs(region: RegionReport) -> str:
    return region.kernel if region.swapped else "eager" if region.spec else "Inductor"


def _summary(report: Report) -> list[str]:
    """The lines below the table."""
    counts = f"{counted(len(report), 'graph')}, {counted(len(report.regions), 'region')}, {len(report.swapped)} swapped"
    lines = [f"{counts}; ratio: baseline over kernel, the region alone, as the median of the ratios of paired samples"]
    for graph in report:
        if found := graph.measured:
            count = len(found.swapped or found.vetoed)
            times = f"Inductor {found.inductor_ms:.3f} ms, with {counted(count, 'kernel')} {found.swapped_ms:.3f} ms"
            outcome = f"{found.speedup:.2f}x" if found.swapped else "none of them stays"
            lines.append(f"graph {graph.name}, measured whole: {times}: {outcome} (noise {found.noise:.1%})")
    return lines
