"""What deciding each region of a model is worth, and what it costs: the order in which a precompilation spends its budget."""

from __future__ import annotations

import dataclasses
import logging
from collections import Counter
from collections.abc import Iterable, Sequence

import torch

from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.capture import CapturedGraph
from torch_llmkernels.errors import LLMKernelsError
from torch_llmkernels.evaluate.baseline import eager
from torch_llmkernels.evaluate.inputs import InputGenerator
from torch_llmkernels.evaluate.reference import precision
from torch_llmkernels.evaluate.roofline import floor, measure_ceilings
from torch_llmkernels.evaluation import Decision
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.kernels.source import Kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.precompilation.whole_graph import median_ms
from torch_llmkernels.resolve import Resolver, choose
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task

log = logging.getLogger("torch_llmkernels.precompile")

SECONDS_PER_KERNEL = {"cpu": 5.0, "cuda": 3.0}
"""What one kernel's check and timing takes, roughly: most of it is Inductor compiling the baseline."""
SECONDS_PER_TUNING = {"cpu": 0.5, "cuda": 0.3}
"""What each further choice of its constants adds: one compilation and a few samples."""


@dataclasses.dataclass(frozen=True)
class PlannedRegion:
    """One task of the model, and what deciding it is worth.

    Attributes:
        task: The task.
        count: How often it occurs in the model's graphs.
        state: `decided` (on this device, before), `unverified` (kernels are there), `search` (there are none, a provider is
            configured), `miss` (there are none), or `unavailable` (its target does not run here).
        kernels: Names of the kernels that would be verified.
        region_ms: Milliseconds of one call: the best baseline of its evaluation, else eager; 0 if it could not be timed.
        floor_ms: Its roofline floor; 0 if unknown.
        share: Its part of the model's eager time, all occurrences together, 0 to 1.
        seconds: Estimate of what deciding it takes.
        tokens: Estimate of what a search for it uses.
        decision: What is known now.
        note: Why it was left open, if it was.
    """

    task: Task
    count: int
    state: str
    kernels: tuple[str, ...] = ()
    region_ms: float = 0.0
    floor_ms: float = 0.0
    share: float = 0.0
    seconds: float = 0.0
    tokens: int = 0
    decision: Decision | None = None
    note: str = ""

    @property
    def headroom(self) -> float:
        """The part of its time that the roofline leaves to be won, 0 to 1; 1 if the floor is unknown."""
        return max(0.0, 1.0 - self.floor_ms / self.region_ms) if self.region_ms and self.floor_ms else 1.0

    @property
    def worth(self) -> float:
        """The part of the model's time that a perfect kernel would save."""
        return self.share * self.headroom

    @property
    def is_open(self) -> bool:
        """Whether deciding it takes time."""
        return self.state in ("unverified", "search")


def plan_regions(graphs: Iterable[CapturedGraph], model_ms: float, settings: Settings) -> list[PlannedRegion]:
    """Every distinct task of the graphs, those worth most first."""
    tasks = [task for graph in graphs for task in graph.tasks]
    counts = Counter(task.key for task in tasks)
    resolver = Resolver(settings, offline=True)
    planned = [_planned(task, counts[task.key], model_ms, resolver) for task in {t.key: t for t in tasks}.values()]
    return sorted(within_whole(planned), key=lambda region: -region.worth)


def within_whole(regions: Sequence[PlannedRegion]) -> list[PlannedRegion]:
    """The regions with shares that add up to no more than the model: alone, each also pays for a call of its own."""
    total = max(1.0, sum(region.share for region in regions))
    return [dataclasses.replace(region, share=region.share / total) for region in regions]


def _planned(task: Task, count: int, model_ms: float, resolver: Resolver) -> PlannedRegion:
    target = target_for(task.device)
    if reason := target.unavailable():
        return PlannedRegion(task, count, "unavailable", decision=Decision(None, f"kept Inductor: {reason}"))
    facts, settings = target.facts(), resolver.settings
    chosen, pending = standing(resolver, task, facts)
    kernels = [kernel for _, kernel in pending]
    searching = bool(settings.provider) and not (chosen and chosen.record)
    state = "unverified" if kernels else "search" if searching else "decided" if chosen else "miss"
    region_ms = best_baseline_ms(chosen) or _eager_region_ms(task)
    seconds, tokens = _estimate(task.device, facts, pending, settings if searching else None)
    return PlannedRegion(
        task,
        count,
        state,
        tuple(kernel.name for kernel in kernels),
        region_ms,
        _floor_ms(task, facts),
        min(1.0, count * region_ms / model_ms) if model_ms else 0.0,
        seconds,
        tokens,
        chosen,
    )


def best_baseline_ms(known: Decision | None) -> float:
    """The best baseline that an earlier evaluation of the task measured, or 0."""
    return min((e.baseline_ms for _, e in known.tried if e.baseline_ms), default=0.0) if known else 0.0


def _eager_region_ms(task: Task) -> float:
    """The task's own time, eager, on normal data; 0 if this torch cannot run it by itself."""
    static = task.at()
    try:
        inputs = InputGenerator(static).make("normal", 0)
        run = eager(static)
        with torch.no_grad(), precision(static.numerics):
            return median_ms(lambda: run(inputs), task.device)
    except (RuntimeError, NotImplementedError, LLMKernelsError) as error:
        log.info("%s %s was not timed: %s", task.signature, task.key, error)
        return 0.0


def _floor_ms(task: Task, facts: DeviceFacts) -> float:
    return floor(task, facts, measure_ceilings(task.device, target_for(task.device).current())).ms


def _estimate(
    device: str, facts: DeviceFacts, pending: Sequence[tuple[Task, Kernel]], search: Settings | None
) -> tuple[float, int]:
    """(seconds, tokens) that verifying the pending kernels takes, roughly; `search`: the settings, if a search follows."""
    choices = sum(max(0, len(kernel.tunings(task, facts)) - 1) for task, kernel in pending)
    seconds = len(pending) * SECONDS_PER_KERNEL[device] + choices * SECONDS_PER_TUNING[device]
    return (seconds + search.search_budget_s, search.search_budget_tokens) if search else (seconds, 0)


def looked_up(task: Task, settings: Settings) -> list[Task]:
    """The tasks that the backend looks up for a region, in order.

    With `specialize`, where nothing serves a dynamic one, that is also the static one that it is at the sizes that were captured.
    """
    return [task, task.at()] if settings.specialize and task.is_dynamic else [task]


def standing(resolver: Resolver, task: Task, facts: DeviceFacts) -> tuple[Decision | None, list[tuple[Task, Kernel]]]:
    """What is decided for a region on this device (None: nothing is), and which kernels are to be verified for which task."""
    decision, pending = None, []
    for each in looked_up(task, resolver.settings):
        known = resolver.known(RecordKey.of(each, facts))
        open_here = resolver.unverified(each, facts, known or Decision(None, "nothing verified yet"))
        pending += [(each, kernel) for kernel, _ in open_here]
        found = choose(known, each, resolver.settings) if known else None
        if found is not None and (decision is None or found.record):
            decision = found
        if found is not None and found.record and not open_here:
            break
    return decision, pending
