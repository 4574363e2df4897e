"""What we do inside Inductor's joint-graph stage: list the regions of a graph, or put kernels in their place.

`backend` hands one of two passes to Inductor: `DiscoverPass` in a trace that is then dropped, `SwapPass` in the compilation that
counts. Both look at the joint graph, forward and backward together, before Inductor decomposes anything.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from torch_llmkernels import plan
from torch_llmkernels.cache.library import Library
from torch_llmkernels.errors import TaskError
from torch_llmkernels.evaluation import Decision, Record
from torch_llmkernels.graph.constants import constants_of
from torch_llmkernels.graph.decompose import late_decompose
from torch_llmkernels.graph.op import decode_spec, encode_spec, scratch_bytes, workspace_layouts
from torch_llmkernels.graph.regions import Region, find_regions
from torch_llmkernels.graph.swap import swap, tidy
from torch_llmkernels.graph.task_of import RegionTask, task_of
from torch_llmkernels.options import Request
from torch_llmkernels.registry import RegionReport
from torch_llmkernels.task import Task


class Discovered(BaseException):
    """Ends a discovery: not an error, and not an `Exception`, so that nothing on the way swallows it."""


class DiscoverPass(CustomGraphPass):
    """Collects the tasks of a joint graph (and of its subgraphs) and leaves the graph alone.

    Args:
        request: The request.
        nested: Whether the graph has subgraphs (`torch.cond`): the pass then sees several graphs and may not stop at the first.
    """

    def __init__(self, request: Request, nested: bool) -> None:
        self.request, self.nested = request, nested
        self.tasks: list[Task] = []
        self.skipped: list[RegionReport] = []

    def uuid(self) -> str:
        return "llmkernels discovery"  # nothing is ever cached under it: the compilation does not finish

    def __call__(self, graph: fx.Graph) -> None:
        regions, skipped = find_tasks(graph, self.request)
        self.tasks += [region.task for region in regions]
        self.skipped += skipped
        if not self.nested:
            raise Discovered


class SwapPass(CustomGraphPass):
    """Swaps the winners in and decomposes the rest; Inductor runs it first in its joint-graph stage.

    Args:
        tasks: The tasks of the graph; one that the pass finds and that is not among them stays with Inductor.
        decisions: What was decided for each of them.
        request: The request; a `joint_custom_pre_pass` of the user's own runs after the swaps.

    Attributes:
        bound: The specs that the compiled graph holds, as far as its code is loaded; whoever compiles fills it in.
    """

    def __init__(self, tasks: Sequence[Task], decisions: Sequence[Decision], request: Request) -> None:
        self.tasks, self.request, self.settings = tasks, request, request.settings
        self.decisions = dict(zip((task.key for task in tasks), decisions, strict=True))
        theirs = request.inductor_option("joint_custom_pre_pass")
        self.theirs = list(theirs) if isinstance(theirs, (list, tuple)) else [theirs] if theirs else []
        self.cacheable = all(isinstance(p, CustomGraphPass) and p.uuid() for p in self.theirs) and self.settings.fuel < 0
        self.bound: set[str] = set()
        self._ran = False
        self._outcomes: dict[str, list[Decision]] = {}  # by task, one for each of its regions

    @property
    def wanted(self) -> list[Record]:
        """The kernels to swap in."""
        return [decision.record for decision in self.decisions.values() if decision.record]

    def outcomes(self) -> list[Decision]:
        """What became of the decisions, one per region of the graph, in graph order."""
        decided = [self.decisions[task.key] for task in self.tasks]
        if not self._ran:  # nothing was wanted, or torch's cache had the compiled graph
            return [self._in_cached_code(decision) for decision in decided]
        recorded = {key: iter(outcomes) for key, outcomes in self._outcomes.items()}
        missed = [_kept(decision, "the region is not in the graph that Inductor compiled") for decision in decided]
        return [next(recorded.get(task.key, iter(())), other) for task, other in zip(self.tasks, missed, strict=True)]

    def _in_cached_code(self, decision: Decision) -> Decision:
        """The decision, if the code that torch's cache had holds the kernel; C++ wrappers do not say what they hold."""
        if decision.record and not self.request.inductor_option("cpp_wrapper") and encode_spec(decision.record) not in self.bound:
            return _kept(decision, "it could not be swapped in when torch's cached code of this graph was compiled")
        return decision

    def uuid(self) -> Any:
        """Everything that the swapped graph depends on and torch's own key lacks.

        Among it the sizes of the kernels' workspaces here: generated code allocates them, and they may depend on the number of
        cores that a process may use, which torch's key does not hold.

        None, which switches torch's caches off, if a pass of the user's has no uuid, or while `fuel` limits the swaps: what
        is swapped then depends on the graphs before.
        """
        if not self.cacheable:
            return None
        chosen = sorted((key, plan.record_digest(d.record), _scratch(d.record)) for key, d in self.decisions.items() if d.record)
        return ("llmkernels", plan.source_digest(), self.settings.max_regions, chosen, [p.uuid() for p in self.theirs])

    def __call__(self, graph: fx.Graph) -> None:
        self._ran = True
        self._swap_all(graph)
        late_decompose(graph)
        for their_pass in self.theirs:
            their_pass(graph)

    def _swap_all(self, graph: fx.Graph) -> None:
        """Swap every winner in and record what became of it."""
        replaced: dict[fx.Node, fx.Node] = {}
        for region in find_tasks(graph, self.request)[0]:
            decision = self.decisions.get(region.task.key)
            if decision is not None:
                self._outcomes.setdefault(region.task.key, []).append(self._swap(graph, region, decision, replaced))
        if replaced:
            tidy(graph)

    def _swap(self, graph: fx.Graph, region: RegionTask, decision: Decision, replaced: dict[fx.Node, fx.Node]) -> Decision:
        """Swap one winner in, if there is one and it can be."""
        if decision.record is None:
            return decision
        if not plan.take_fuel(self.settings.fuel):
            return _kept(decision, f"the fuel of {self.settings.fuel} regions is spent")
        try:
            swap(graph, region, decision.record, replaced)
        except TaskError as error:
            return _kept(decision, str(error))
        return decision


def _kept(decision: Decision, reason: str) -> Decision:
    """Inductor in the place of a decision's kernel, if it has one."""
    return decision if decision.record is None else dataclasses.replace(decision, record=None, reason=f"kept Inductor: {reason}")


def _scratch(record: Record) -> tuple[int, ...]:
    """Bytes of the workspaces that a record's kernel needs here."""
    return scratch_bytes(workspace_layouts(decode_spec(encode_spec(record)), torch.device(record.task.device)))


def find_tasks(graph: fx.Graph, request: Request) -> tuple[list[RegionTask], list[RegionReport]]:
    """The regions of a functional ATen graph as tasks, in graph order, and a report of every one that was not taken."""
    most = request.settings.max_regions
    regions, skipped = find_regions(graph, served_by(request.library))
    reports = [RegionReport(s.signature, "", "", False, f"kept Inductor: {s.reason}") for s in skipped]
    constants = constants_of(graph) if regions else frozenset()
    tasks = []
    for region in regions[:most]:
        try:
            tasks.append(task_of(region, constant=constants))
        except TaskError as error:
            reports.append(RegionReport(region.signature, "", "", False, f"kept Inductor: {error}"))
    for region in regions[most:]:
        reason = f"kept Inductor: more than max_regions={most} regions in one graph"
        reports.append(RegionReport(region.signature, "", "", False, reason))
    return tasks, reports


def served_by(library: Library) -> Callable[[Region], bool]:
    """Whether some kernel of the library would serve a region, by its header; how fast it is, `resolve` finds out."""
    signatures = frozenset(library.signatures())
    kernels = functools.cache(library.kernels)

    def serves(region: Region) -> bool:
        if region.signature not in signatures:
            return False
        try:
            task = task_of(region).task
        except TaskError:
            return False
        return any(kernel.why_not(task) is None for kernel in kernels(task.signature, task.device))

    return serves
