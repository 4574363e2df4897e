"""The backend: `torch.compile(model, backend="llmkernels")`.

Dynamo hands every captured graph to `llmkernels`. What happens to it:

1. `read_request` splits `mode=` and `options=` into our knobs and Inductor's config.
2. `why_plain` rules out, without a trace, graphs that nothing can be swapped in. They go to Inductor as they are.
3. `discover` learns which tasks the graph holds: it traces the graph with composite operators kept whole, up to the joint graph
   (forward and backward together), and stops there. The answer is remembered, in the process and in the store.
4. `resolve` decides for each task: a verified kernel of the library that wins here, or Inductor. The ranks of a job decide alike.
5. No winner: Inductor gets the graph as it is, and generates exactly what `backend="inductor"` would.
6. Otherwise Inductor compiles the graph with `SwapPass` in its joint-graph stage, which puts one `llmk::region` operator in the
   place of each winner and decomposes the rest as Inductor would have.

Whatever goes wrong on the way is logged and the graph goes to Inductor; `strict=True` raises instead.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import logging
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import fx
from torch._inductor.custom_graph_pass import CustomGraphPass

from torch_llmkernels import graph_decision, online, plan, ranks, registry
from torch_llmkernels.cache.library import Library
from torch_llmkernels.errors import TaskError
from torch_llmkernels.evaluation import Decision, Record
from torch_llmkernels.graph.constants import constants_of
from torch_llmkernels.graph.decompose import decomp_table, late_decompose
from torch_llmkernels.graph.op import binding, decode_spec, encode_spec, scratch_bytes, set_settings, workspace_layouts
from torch_llmkernels.graph.regions import Region, find_regions
from torch_llmkernels.graph.scan import might_match
from torch_llmkernels.graph.swap import swap, tidy
from torch_llmkernels.graph.task_of import RegionTask, task_of
from torch_llmkernels.graph.twin import twin_of
from torch_llmkernels.kernels.targets import on_device_of
from torch_llmkernels.options import Request, read_request
from torch_llmkernels.plan import Plan
from torch_llmkernels.registry import GraphReport, RegionReport
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task

log = logging.getLogger("torch_llmkernels.backend")


def llmkernels(
    gm: fx.GraphModule, example_inputs: Sequence[Any], *, mode: str | None = None, options: Mapping[str, Any] | None = None
) -> Any:
    """Compile one captured graph; the entry point that `torch.compile(backend="llmkernels")` finds.

    Args:
        gm: The graph that Dynamo captured.
        example_inputs: Its (fake) inputs.
        mode: A mode of Inductor.
        options: Our knobs and Inductor's options, by name.

    Returns:
        What Inductor's `compile_fx` returns: a callable, with whatever torch's caches need attached.

    Raises:
        SettingsError: for an unknown mode or option.
        LLMKernelsError: with `strict=True` or `on_miss="error"`, for what would otherwise be logged.
    """
    request = read_request(mode, options)
    if reason := why_plain(gm, request):
        return compile_plain(gm, example_inputs, request, reason)
    try:
        found = plan_of(gm, example_inputs, request)
        with on_device_of((*example_inputs, *gm.parameters())):
            decisions = decide(found.tasks, request)
        swaps = SwapPass(found.tasks, decisions, request)
        compiled = compile_swapped(gm, example_inputs, request, swaps) if swaps.wanted else None
    except torch._dynamo.exc.TorchDynamoException:
        raise  # Dynamo's own control flow, such as a restart of its analysis
    except Exception as error:
        return _give_up(gm, example_inputs, request, error)
    report = _report(found, swaps, request)
    if compiled is None:
        return compile_plain(gm, example_inputs, request)
    if reason := online.why_not(found.tasks, swaps.wanted, example_inputs, request):
        log.debug("graph %s is not measured by its first calls: %s", report.name, reason)
        return compiled
    return _on_trial(compiled, compile_plain(gm, example_inputs, request), found, swaps, request, report)


def register() -> None:
    """Make the name `llmkernels` known to torch where this package is on the path but not installed, so has no entry point."""
    from torch._dynamo import list_backends, register_backend

    if llmkernels.__name__ not in list_backends(exclude_tags=()):
        register_backend(llmkernels)


def _reset() -> None:
    """Called by `torch._dynamo.reset()`: what torch's Inductor front end does there."""
    if "torch._inductor.cudagraph_trees" in sys.modules:
        sys.modules["torch._inductor.cudagraph_trees"].reset_cudagraph_trees()


llmkernels.reset = _reset  # type: ignore[attr-defined]


def why_plain(gm: fx.GraphModule, request: Request) -> str:
    """Why this graph goes to Inductor without a second trace; empty if regions have to be looked for."""
    if request.settings.swap == "none":
        return "swap='none'"
    if not request.inductor_option("use_joint_graph_passes"):
        return "Inductor's joint graph passes are off (mode 'lite' or use_joint_graph_passes=False), where kernels are swapped in"
    if not might_match(gm):
        return "no operator that a pattern starts from"
    return ""


def compile_plain(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request, reason: str = "") -> Any:
    """Exactly what `backend="inductor"` does, compile caches included."""
    if reason:
        log.info("graph %s goes to Inductor: %s", _graph_name(), reason)
        registry.add(GraphReport(_graph_name(), (), reason))
    return request.inductor(gm, example_inputs)


def compile_swapped(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request, swaps: SwapPass) -> Any:
    """Inductor with the winners swapped in."""
    import torch_llmkernels.graph.lowering  # noqa: F401 (teaches Inductor the operator)

    for record in swaps.wanted:
        set_settings(encode_spec(record), request.settings)
    with binding() as swaps.bound:
        return _compile_fx(gm, example_inputs, request, swaps)


def _compile_fx(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request, joint_pass: Any, **more: Any) -> Any:
    """`compile_fx` with composites kept whole and `joint_pass` in the joint-graph stage; the process's config is untouched.

    It compiles a twin: pre-grad passes rewrite a graph in place, and `gm` may have to be compiled once more.
    """
    from torch._inductor import config
    from torch._inductor.compile_fx import compile_fx

    patches = {**request.inductor.config, "joint_custom_pre_pass": joint_pass}
    with config.patch(patches):
        table = decomp_table()
    return compile_fx(twin_of(gm), example_inputs, config_patches=patches, decompositions=table, **more)


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
        found, skipped = find_tasks(graph, self.request)
        self.tasks += [region.task for region in found]
        self.skipped += skipped
        if not self.nested:
            raise Discovered


class SwapPass(CustomGraphPass):
    """Swaps the winners in and decomposes the rest; Inductor runs it first in its joint-graph stage.

    Args:
        tasks: The tasks of the graph; one that the pass finds and that is not among them stays with Inductor.
        decisions: What was decided for each of them.
        request: The request; a `joint_custom_pre_pass` of the user's own runs after the swaps.
    """

    def __init__(self, tasks: Sequence[Task], decisions: Sequence[Decision], request: Request) -> None:
        self.decisions = dict(zip((task.key for task in tasks), decisions, strict=True))
        self.request, self.settings = request, request.settings
        theirs = request.inductor_option("joint_custom_pre_pass")
        self.theirs = list(theirs) if isinstance(theirs, (list, tuple)) else [theirs] if theirs else []
        self.cacheable = all(isinstance(p, CustomGraphPass) and p.uuid() for p in self.theirs) and self.settings.fuel < 0
        self.became: dict[str, list[Decision]] | None = None  # by task, what became of each of its regions; None: it did not run
        self.bound: set[str] = set()  # the specs that the compiled graph holds, as far as it is loaded

    @property
    def wanted(self) -> list[Record]:
        """The kernels to swap in."""
        return [decision.record for decision in self.decisions.values() if decision.record]

    def outcomes(self, tasks: Sequence[Task]) -> list[Decision]:
        """What became of the decisions for the tasks of the graph's regions, in graph order."""
        if self.became is None:
            return [self._in_cached_code(self.decisions[task.key]) for task in tasks]
        became = {key: iter(decisions) for key, decisions in self.became.items()}
        missed = [_kept(self.decisions[task.key], "the region is not in the graph that Inductor compiled") for task in tasks]
        return [next(became.get(task.key, iter(())), kept) for task, kept in zip(tasks, missed, strict=True)]

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
        if self._swap(graph):
            tidy(graph)
        late_decompose(graph)
        for their_pass in self.theirs:
            their_pass(graph)

    def _swap(self, graph: fx.Graph) -> bool:
        """Swap every winner in; whether there was one."""
        replaced: dict[fx.Node, fx.Node] = {}
        self.became = {} if self.became is None else self.became  # subgraphs come one by one
        for region in find_tasks(graph, self.request)[0]:
            decision = self.decisions.get(region.task.key)
            if decision is not None:
                self.became.setdefault(region.task.key, []).append(self._swap_one(graph, region, decision, replaced))
        return bool(replaced)

    def _swap_one(
        self, graph: fx.Graph, region: RegionTask, decision: Decision, replaced: dict[fx.Node, fx.Node]
    ) -> Decision:
        """Swap the winner in, if there is one and it can be; what became of the decision."""
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
    """Inductor in the place of a decision's kernel."""
    return decision if decision.record is None else dataclasses.replace(decision, record=None, reason=f"kept Inductor: {reason}")


def _scratch(record: Record) -> tuple[int, ...]:
    """Bytes of the workspaces that a record's kernel needs here."""
    return scratch_bytes(workspace_layouts(decode_spec(encode_spec(record)), torch.device(record.task.device)))


def plan_of(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request) -> Plan:
    """The tasks of this graph: remembered from an earlier compilation, else discovered by a trace."""
    digest = plan.graph_digest(gm, example_inputs, request)
    known = plan.recall(digest, request.settings)
    if known is None:
        known = discover(gm, example_inputs, request)
        plan.remember(digest, known, request.settings)
    return known


def discover(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request) -> Plan:
    """Trace the graph as far as its joint form, list what is in it, and drop the trace."""
    nested = any(isinstance(module, fx.GraphModule) and module is not gm for module in gm.modules())
    discovery = DiscoverPass(request, nested)

    def stop(*args: Any, **kwargs: Any) -> Any:
        raise Discovered

    try:
        with _subgraph_caches_restored():
            _compile_fx(gm, example_inputs, request, discovery, inner_compile=stop)
    except Discovered:
        pass
    return Plan(tuple(discovery.tasks), tuple(discovery.skipped))


@contextmanager
def _subgraph_caches_restored() -> Iterator[None]:
    """Forget what a trace that is dropped left in Dynamo's caches of traced subgraphs (`nested_compile_region`)."""
    context = torch._guards.TracingContext.try_get()
    caches = list(context.hop_dispatch_set_cache.hop_cache_map.values()) if context else []
    saved = [{name: value.copy() for name, value in vars(cache).items()} for cache in caches]
    try:
        yield
    finally:
        for cache, values in zip(caches, saved, strict=True):
            vars(cache).update(values)


def find_tasks(graph: fx.Graph, request: Request) -> tuple[list[RegionTask], list[RegionReport]]:
    """The regions of a functional ATen graph as tasks, in graph order, and a report of every one that was not taken."""
    most = request.settings.max_regions
    regions, skipped = find_regions(graph, served_by(request.library))
    reports = [RegionReport(s.signature, "", "", False, f"kept Inductor: {s.reason}") for s in skipped]
    constants = constants_of(graph) if regions else frozenset()
    found = []
    for region in regions[:most]:
        try:
            found.append(task_of(region, constant=constants))
        except TaskError as error:
            reports.append(RegionReport(region.signature, "", "", False, f"kept Inductor: {error}"))
    for region in regions[most:]:
        reason = f"kept Inductor: more than max_regions={most} regions in one graph"
        reports.append(RegionReport(region.signature, "", "", False, reason))
    return found, reports


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


def decide(tasks: Sequence[Task], request: Request) -> list[Decision]:
    """One decision per task, the same on every rank of a job."""
    store = ranks.job_store()
    if store is None or not tasks or graph_decision.is_forced():
        return decide_here(tasks, request)
    settings = ranks.settings_in_job(request.settings)
    here = dataclasses.replace(request, settings=settings)
    key = graph_decision.job_key(tasks, request)
    return ranks.agree(store, key, len(tasks), lambda: decide_here(tasks, here), ranks.patience_s(settings))


def decide_here(tasks: Sequence[Task], request: Request) -> list[Decision]:
    """One decision per task, less the swaps that were measured to make this whole graph slower.

    With `specialize`, a dynamic task that nothing serves is looked up at the sizes seen now.
    """
    decisions = resolve(tasks, request.settings) if tasks else []
    dynamic = [i for i, d in enumerate(decisions) if tasks[i].is_dynamic and d.record is None]
    if dynamic and request.settings.specialize and not _promised_dynamic():
        for i, static in zip(dynamic, resolve([tasks[i].at() for i in dynamic], request.settings), strict=True):
            decisions[i] = static if static.record else decisions[i]
    return graph_decision.apply(tasks, decisions, request)


def resolve(tasks: Sequence[Task], settings: Settings) -> list[Decision]:
    """See `torch_llmkernels.resolve`; imported at the first region that is looked up."""
    from torch_llmkernels.resolve import resolve as look_up

    return look_up(tasks, settings)


def _promised_dynamic() -> bool:
    """Whether the user marked a dimension of this graph's inputs as dynamic: fixing its size would then be an error."""
    context = torch._guards.TracingContext.try_get()
    contexts = context.tensor_to_context.values() if context else ()
    promises = [c for symbolic in contexts for c in getattr(symbolic, "constraint_sizes", None) or () if c is not None]
    return any(not promise.warn_only for promise in promises)  # the others are Dynamo's own guesses


def _give_up(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request, error: Exception) -> Any:
    """The graph goes to Inductor because of an error of ours, or with `strict` the error goes to the user."""
    if request.settings.strict or request.settings.on_miss == "error":
        raise error
    reason = f"{type(error).__name__}: {error}"
    log.warning("graph %s goes to Inductor: %s", _graph_name(), reason, exc_info=log.isEnabledFor(logging.DEBUG))
    return compile_plain(gm, example_inputs, request, reason)


def _on_trial(compiled: Any, plain: Any, found: Plan, swaps: SwapPass, request: Request, report: GraphReport) -> Any:
    """A callable that lets the graph's first calls decide between the two; the outcome goes into the store and the report."""

    def decided(paired: graph_decision.Paired) -> None:
        outcome = graph_decision.decide_from(paired, found.tasks, swaps.wanted, request)
        decisions = graph_decision.apply(found.tasks, swaps.outcomes(found.tasks), request)
        regions = [RegionReport.of(task, decision) for task, decision in zip(found.tasks, decisions, strict=True)]
        log.info("graph %s: %s: %.2fx Inductor", report.name, "swaps stay" if outcome.swapped else "Inductor", paired.ratio)
        registry.replace(report, dataclasses.replace(report, regions=(*regions, *found.skipped), measured=outcome))

    trial = online.Trial(compiled, plain, found.tasks[0].device, decided)
    return lambda *args: trial(*args)  # torch looks for a function's attributes


def _report(found: Plan, swaps: SwapPass, request: Request) -> GraphReport:
    """Log one line per region, keep the report of the graph, and write it into torch's structured trace."""
    regions = [RegionReport.of(task, decision) for task, decision in zip(found.tasks, swaps.outcomes(found.tasks), strict=True)]
    measured = graph_decision.measured(found.tasks, request)
    report = GraphReport(_graph_name(), (*regions, *found.skipped), measured=measured)
    for region in report.regions:
        log.info("%s", region.line)
    registry.add(report)
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "llmkernels_regions", "encoding": "json"},
        payload_fn=lambda: json.dumps(report.to_json()),
    )
    return report


def _graph_name() -> str:
    """torch's compile id of the graph at hand, such as `0/0`; `?` outside a compilation."""
    return str(torch._guards.CompileContext.current_compile_id() or "?")
