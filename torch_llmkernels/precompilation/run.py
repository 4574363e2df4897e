"""Decide everything about a model before it is deployed: `torch_llmkernels.precompile(model, args)`.

1. `capture_graphs` lists the regions of every graph, forward and backward; equal tasks are decided once.
2. `plan_regions` looks each up and asks what it is worth: its share of the model's time, times its headroom to the roofline.
3. Worth decides the order in which the budget is spent: verification, tuning, and with a provider a search.
4. `whole_graph` times the whole model with and without the winners; what does not pay in the graph is vetoed.

Every decision is stored when it is made, so a precompilation that is interrupted goes on where it was. Afterwards the model
starts warm: nothing is verified, compiled by us or asked of a language model.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from torch_llmkernels import settings as knobs
from torch_llmkernels.cache import bundle
from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.store import open_store
from torch_llmkernels.capture import Call, CapturedGraph, capture_graphs, check_devices, untouched
from torch_llmkernels.errors import LLMKernelsError, SearchError, SettingsError
from torch_llmkernels.evaluation import Decision, Record
from torch_llmkernels.graph_decision import GraphDecision, recall, remember
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.kernels.targets import build, on_device_of, target_for
from torch_llmkernels.plan import record_digest
from torch_llmkernels.precompilation.budget import Budget
from torch_llmkernels.precompilation.table import bar, text
from torch_llmkernels.precompilation.whole_graph import measure, median_ms, step_of
from torch_llmkernels.precompilation.worth import PlannedRegion, best_baseline_ms, looked_up, plan_regions, standing, within_whole
from torch_llmkernels.resolve import Resolver
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task

log = logging.getLogger("torch_llmkernels.precompile")

GRAPH_SHARE = 0.3
"""Part of the budget that is kept for timing the whole graph."""


@dataclasses.dataclass(frozen=True)
class PrecompileReport:
    """What a precompilation did, or with `dry_run` would do.

    Attributes:
        regions: Every distinct task, those worth most first.
        graphs: Whole-graph decisions; empty if nothing won, or with `dry_run`.
        captured: Graphs that Dynamo made.
        skipped: (signature, reason) of what was recognised but cannot be taken.
        model_ms: Milliseconds of the model, eager.
        seconds: What it took.
        complete: Whether everything was decided within the budget.
        dry_run: Whether nothing was decided.
        exported: The bundle that was written, or None.
        tokens: What its searches paid, in and out.
        budget_tokens: What they were allowed together; None: no limit.
    """

    regions: tuple[PlannedRegion, ...]
    graphs: tuple[GraphDecision, ...]
    captured: int
    skipped: tuple[tuple[str, str], ...]
    model_ms: float
    seconds: float
    complete: bool
    dry_run: bool = False
    exported: Path | None = None
    tokens: int = 0
    budget_tokens: int | None = None

    @property
    def winners(self) -> dict[str, Record]:
        """Records that win in isolation, by task key."""
        return winners(self.regions)

    @property
    def swapped(self) -> frozenset[str]:
        """Keys of the tasks whose kernels a compilation of this model now swaps in, in at least one graph."""
        if not self.graphs:
            return frozenset(self.winners)
        kept = {key for graph in self.graphs for key, _ in graph.swapped}
        return frozenset(key for key, record in self.winners.items() if record.task.key in kept)

    def __str__(self) -> str:
        return text(self)


def precompile(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
    dynamic_dims: Mapping[int | str, Sequence[int]] | None = None,
    more_inputs: Sequence[Sequence[Any]] = (),
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
    budget: float = 900.0,
    budget_tokens: int | None = None,
    dry_run: bool = False,
    export: str | Path | None = None,
    progress: bool = True,
) -> PrecompileReport:
    """Find, verify and remember the kernels of a model, for this device and these shapes.

    The model is run several times, eagerly and compiled; its buffers, gradients and the random state are restored. Compiled
    code that this process already holds is dropped (`torch._dynamo.reset`): precompile first, then compile.

    Args:
        model: A module or function, in the train or eval mode it will be used in.
        args: Positional arguments, on the model's device.
        kwargs: Keyword arguments.
        training: Decide forward and backward; else the forward without gradients.
        dynamic_dims: Dimensions that will vary, by position or keyword: `{0: [0]}` is the batch of the first argument.
        more_inputs: Further positional arguments, one sequence per input shape.
        mode: As in `torch.compile`; decide for the mode you will use, graph replay changes what is fast.
        options: As in `torch.compile`, ours and Inductor's.
        budget: Seconds. What does not fit stays with Inductor and is taken up by the next precompilation.
        budget_tokens: Tokens, in and out, that the searches of this call may use together (each one's own limits hold besides);
            None: no such limit, 0: no search. What does not fit is treated as with `budget`.
        dry_run: Plan and estimate only.
        export: Write the winners to this file (`*.llmk`), for `llmkernels cache import`.
        progress: Show a progress bar on a terminal.

    Raises:
        LLMKernelsError: for arguments on another device than the model, and for a place that `export` cannot be written to.
        SettingsError: for an unknown mode or option, or both at once, and for negative seconds or tokens.
    """
    if mode and options:
        raise SettingsError("torch.compile takes mode= or options=, not both; write the mode's options out")
    if not budget >= 0:  # nor not-a-number, which no clock reaches
        raise SettingsError(f"budget must be a number of seconds, 0 or more, not {budget}")
    if budget_tokens is not None and budget_tokens < 0:
        raise SettingsError(f"budget_tokens must not be negative, not {budget_tokens}")
    begin = time.monotonic()
    settings = knobs.current().updated(_ours(options))
    if dynamic_dims:
        settings = settings.updated({"specialize": False})  # sizes that were promised to vary are never fixed
    calls = [Call(tuple(a), kwargs or {}, dynamic_dims or {}) for a in (args, *more_inputs)]
    for call in calls:
        check_devices(model, call)
    if export:
        check_writable(Path(export))
    with on_device_of(_tensors(model, calls)):
        model_ms = eager_ms(model, calls, training)  # first: inputs that the model does not take are its own error, not Dynamo's
        graphs = capture_graphs(model, calls, training=training, mode=mode, options=options)
        regions = plan_regions(graphs, model_ms, settings)
        skipped = tuple((s.signature, s.reason) for graph in graphs for s in graph.skipped)
        report = PrecompileReport(
            tuple(regions), (), len(graphs), skipped, model_ms, 0.0, False, dry_run, budget_tokens=budget_tokens
        )  # fmt: skip
        if dry_run:
            return dataclasses.replace(report, seconds=time.monotonic() - begin)
        spending = Budget(begin + budget * (1 - GRAPH_SHARE), budget_tokens)
        regions = within_whole(decide(regions, settings, spending, progress))
        compile_options = {"mode": mode, "options": dict(options) if options else None}
        left = max(budget - (time.monotonic() - begin), 1.0)
        decided = decide_graphs(model, calls, graphs, winners(regions), settings, training, compile_options, left)
        build_all(winners(regions), settings)
        exported = _export(export, regions, decided, settings) if export else None
        complete = not any(r.is_open for r in regions)
        return dataclasses.replace(
            report,
            regions=tuple(regions),
            graphs=tuple(decided),
            seconds=time.monotonic() - begin,
            complete=complete,
            exported=exported,
            tokens=spending.used,
        )


def check_writable(path: Path) -> None:
    """Refuse a bundle's path before minutes are spent on what is to go into it.

    Raises:
        LLMKernelsError: if it is a folder, or its folder is not there or cannot be written to.
    """
    folder = path.absolute().parent
    reason = "it is a folder" if path.is_dir() else "" if os.access(folder, os.W_OK) else f"{folder} is not writable"
    if not folder.is_dir():
        reason = f"there is no folder {folder}; make it first, or name another place"
    if reason:
        raise LLMKernelsError(f"the bundle cannot be written to {path}: {reason}; nothing was verified yet")


def _ours(options: Mapping[str, Any] | None) -> dict[str, Any]:
    plain = {name.replace("-", "_"): value for name, value in (options or {}).items()}
    return {name: value for name, value in plain.items() if name in knobs.KNOBS}


def eager_ms(model: Any, calls: Sequence[Call], training: bool) -> float:
    """Median milliseconds of all calls together, eager; with `training` forward and backward."""
    with untouched(model), torch.set_grad_enabled(training):
        return median_ms(step_of(model, model, calls, training), _device(model, calls))


def _device(model: Any, calls: Sequence[Call]) -> str:
    return "cuda" if any(tensor.is_cuda for tensor in _tensors(model, calls)) else "cpu"


def _tensors(model: Any, calls: Sequence[Call]) -> tuple[torch.Tensor, ...]:
    """The model's parameters and the tensors that it is called with."""
    parameters = model.parameters() if isinstance(model, torch.nn.Module) else ()
    return (*parameters, *(tensor for call in calls for _, tensor in call.tensors))


def decide(regions: Sequence[PlannedRegion], settings: Settings, budget: Budget, progress: bool = False) -> list[PlannedRegion]:
    """Verify, tune and search, in this order of regions, as far as `budget` goes; what is left stays open."""
    decided = []
    with bar(len(regions), progress) as advance:
        for region in regions:
            advance(f"{region.task.signature} {region.task.key[:8]}")
            decided.append(_decide(region, settings, budget))
    return decided


def _decide(region: PlannedRegion, settings: Settings, budget: Budget) -> PlannedRegion:
    if region.state == "unavailable" or (region.is_open and not budget.seconds_left):
        return region
    searchable = bool(settings.provider) and region.is_open
    if region.state == "search" and (note := budget.refusal()):
        return _left_open(region, note)
    settings = settings.updated({"verify_budget_s": budget.seconds_left, **({"on_miss": "fallback"} if searchable else {})})
    resolver = Resolver(settings, offline=True)
    try:
        decision = decide_region(region.task, resolver)
        note = budget.refusal() if searchable else ""
        if searchable and decision.record is None and not note:
            decision, note = _search(region.task, settings, budget)
    except SearchError as error:  # one region's search must not cost the others theirs
        return _left_open(region, str(error))
    return _decided(region, resolver, decision, note)


def decide_region(task: Task, resolver: Resolver) -> Decision:
    """The decision for a region as the backend would make it: see `worth.looked_up`."""
    first, *others = looked_up(task, resolver.settings)
    found = resolver.decide(first)
    for static in others if found.record is None else ():
        at_this_size = resolver.decide(static)
        found = at_this_size if at_this_size.record else found
    return found


def _search(task: Task, settings: Settings, budget: Budget) -> tuple[Decision, str]:
    """Search for a task that nothing wins, with what is left: the decision, and why the search is open still, if it is."""
    from torch_llmkernels.search.on_miss import standing

    store = open_store(settings)
    before = standing(task, store)
    knobs = budget.search_knobs(before, settings)
    try:
        decision = Resolver(settings.updated(knobs)).decide(task)
    finally:
        note = budget.book(before, standing(task, store), settings, knobs)
    return decision, note


def _left_open(region: PlannedRegion, note: str) -> PlannedRegion:
    log.warning("%s %s stays open: %s", region.task.signature, region.task.key, note)
    return dataclasses.replace(region, note=note)


def _decided(region: PlannedRegion, resolver: Resolver, decision: Decision, note: str) -> PlannedRegion:
    """The region with what is known now; `note`: why a search for it is still to come, or empty."""
    facts = target_for(region.task.device).facts()
    _, unfinished = standing(resolver, region.task, facts)
    to_search = bool(note) and decision.record is None
    state = "unverified" if unfinished else "search" if to_search else "miss" if region.state == "miss" else "decided"
    region_ms = best_baseline_ms(decision) or region.region_ms
    share = min(1.0, region.share * region_ms / region.region_ms) if region.region_ms else region.share
    found = dataclasses.replace(region, decision=decision, state=state, region_ms=region_ms, share=share)
    return _left_open(found, note) if to_search else found


def winners(regions: Iterable[PlannedRegion]) -> dict[str, Record]:
    """Records that win in isolation, by the key of the region's task; with `specialize`, a record may be of it at one size."""
    return {r.task.key: r.decision.record for r in regions if r.decision and r.decision.record and r.state != "unavailable"}


def decide_graphs(
    model: Any,
    calls: Sequence[Call],
    graphs: Sequence[CapturedGraph],
    won: Mapping[str, Record],
    settings: Settings,
    training: bool,
    compile_options: Mapping[str, Any],
    budget_s: float,
) -> list[GraphDecision]:
    """Whole-graph decisions for the graphs that have winners: the store's if they were made with these kernels, else measured."""
    if not won or settings.swap != "fastest":
        return []
    device = next(iter(won.values())).task.device
    concerned = list({g.key: g for g in graphs if any(t.key in won for t in g.tasks)}.values())
    known = [recall(graph.key, device, settings) for graph in concerned]
    if all(d is not None and _answers(d, g, won) for d, g in zip(known, concerned, strict=True)):
        return [d for d in known if d is not None]
    decided = measure(model, calls, concerned, won, training=training, compile_options=compile_options, budget_s=budget_s)
    for decision in decided:
        remember(decision, device, settings)
    return decided


def _answers(decision: GraphDecision, graph: CapturedGraph, won: Mapping[str, Record]) -> bool:
    """Whether a stored measurement was made with the kernels that would be swapped in now."""
    records = [won[task.key] for task in graph.tasks if task.key in won]
    now = {record.task.key: record_digest(record) for record in records}
    return now == dict((*decision.swapped, *decision.vetoed))


def build_all(won: Mapping[str, Record], settings: Settings) -> None:
    """Put the binary of every winner into the store, so that the first use of the model compiles none."""
    store = open_store(settings)
    for record in won.values():
        target = target_for(record.task.device)
        kernel = parse_kernel(record.kernel_text, record.kernel_name)
        build(kernel, record.task, dict(record.constants), target, target.facts(), store)


def _export(path: str | Path, regions: Iterable[PlannedRegion], decided: Iterable[GraphDecision], settings: Settings) -> Path:
    """Write the winners to a bundle, with what else was tried, and what was measured about the graphs, as it is stored: with the
    device."""
    path, regions, store = Path(path), list(regions), open_store(settings)
    won = winners(regions)
    tasks = [t for r in regions if not target_for(r.task.device).unavailable() for t in looked_up(r.task, settings)]
    keys = [RecordKey.of(task, target_for(task.device).facts()) for task in tasks]
    found = [(key, decision) for key in keys if (decision := store.decision(key, explained=False))]
    tried = [(key, dataclasses.replace(decision, record=None)) for key, decision in found]
    stored = [recall(graph.graph, next(iter(won.values())).task.device, settings) for graph in decided]
    bundle.export(path, records=won.values(), decisions=tried, graphs=[graph for graph in stored if graph is not None])
    return path
