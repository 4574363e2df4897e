"""The backend: `torch.compile(model, backend="llmkernels")`.

Dynamo hands every captured graph to `llmkernels`. What happens to it:

1. `read_request` splits `mode=` and `options=` into our knobs and Inductor's config.
2. `why_plain` rules out, without a trace, graphs that nothing can be swapped in. They go to Inductor as they are.
3. `plan_of` learns which tasks the graph holds: `discover` traces it with composite operators kept whole, up to the joint graph
   (forward and backward together), and stops there. The answer is remembered, in the process and in the store.
4. `decide_in_job` decides for each task: a verified kernel of the library that wins here, or Inductor. The ranks of a job decide
   alike.
5. No winner: Inductor gets the graph as it is, and generates exactly what `backend="inductor"` would.
6. Otherwise Inductor compiles the graph with `SwapPass` in its joint-graph stage, which puts one `llmk::region` operator in the
   place of each winner and decomposes the rest as Inductor would have.
7. The report says, region by region, what became of that.

Whatever goes wrong in 2 to 7 is logged and the graph, which is still as Dynamo made it, goes to Inductor; `strict=True` raises
instead.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import fx

from torch_llmkernels import graph_decision, online, plan, ranks, registry
from torch_llmkernels.evaluation import Decision, GraphDecision
from torch_llmkernels.graph.decompose import decomp_table
from torch_llmkernels.graph.op import binding, encode_spec, set_settings
from torch_llmkernels.graph.scan import might_match
from torch_llmkernels.graph.twin import twin_of
from torch_llmkernels.kernels.targets import on_device_of
from torch_llmkernels.options import Request, read_request
from torch_llmkernels.passes import Discovered, DiscoverPass, SwapPass
from torch_llmkernels.plan import Plan
from torch_llmkernels.registry import GraphReport, RegionReport
from torch_llmkernels.resolve import resolve
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
    request, level = read_request(mode, options), logging.INFO
    try:
        note, compiled = why_plain(gm, request), None
        if not note:
            with on_device_of((*example_inputs, *gm.parameters())):
                compiled = compile_with_winners(gm, example_inputs, request)
    except torch._dynamo.exc.TorchDynamoException:
        raise  # Dynamo's own control flow, such as a restart of its analysis
    except Exception as error:
        if request.settings.strict or request.settings.on_miss == "error":
            raise
        compiled, note, level = None, f"{type(error).__name__}: {error}", logging.WARNING
        log.debug("this went wrong:", exc_info=True)
    if note:
        log.log(level, "graph %s goes to Inductor: %s", _graph_name(), note)
        registry.add(GraphReport(_graph_name(), (), note))
    return compile_plain(gm, example_inputs, request) if compiled is None else compiled


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


def compile_plain(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request) -> Any:
    """Exactly what `backend="inductor"` does, compile caches included."""
    return request.inductor(gm, example_inputs)


def compile_with_winners(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request) -> Any | None:
    """The graph with its winners swapped in, and its report filed; None if there is no winner."""
    held = plan_of(gm, example_inputs, request)
    decisions = decide_in_job(held.tasks, request)
    swaps = SwapPass(held.tasks, decisions, request)
    compiled = compile_swapped(gm, example_inputs, request, swaps) if swaps.wanted else None
    report = _report_of(held, swaps.outcomes(), graph_decision.measured(held.tasks, request))
    if compiled is not None:
        if reason := online.why_not(held.tasks, swaps.wanted, example_inputs, request):
            log.debug("graph %s is not measured by its first calls: %s", report.name, reason)
        else:
            compiled = _on_trial(compiled, compile_plain(gm, example_inputs, request), held, swaps, request, report)
    _file(report)
    return compiled


def compile_swapped(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request, swaps: SwapPass) -> Any:
    """Inductor with `swaps` in its joint-graph stage."""
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
    with _subgraph_caches_restored():
        return compile_fx(twin_of(gm), example_inputs, config_patches=patches, decompositions=table, **more)


@contextmanager
def _subgraph_caches_restored() -> Iterator[None]:
    """Forget what a trace leaves in Dynamo's caches of traced subgraphs (`nested_compile_region`): there may be another one."""
    context = torch._guards.TracingContext.try_get()
    caches = list(context.hop_dispatch_set_cache.hop_cache_map.values()) if context else []
    saved = [{name: value.copy() for name, value in vars(cache).items()} for cache in caches]
    try:
        yield
    finally:
        for cache, values in zip(caches, saved, strict=True):
            vars(cache).update(values)


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

    with suppress(Discovered):
        _compile_fx(gm, example_inputs, request, discovery, inner_compile=stop)
    return Plan(tuple(discovery.tasks), tuple(discovery.skipped))


def decide_in_job(tasks: Sequence[Task], request: Request) -> list[Decision]:
    """One decision per task, the same on every rank of a job; outside of one, what `decide_here` says."""
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


def _promised_dynamic() -> bool:
    """Whether the user marked a dimension of this graph's inputs as dynamic: fixing its size would then be an error."""
    context = torch._guards.TracingContext.try_get()
    contexts = context.tensor_to_context.values() if context else ()
    promises = [c for symbolic in contexts for c in getattr(symbolic, "constraint_sizes", None) or () if c is not None]
    return any(not promise.warn_only for promise in promises)  # the others are Dynamo's own guesses


def _on_trial(compiled: Any, plain: Any, held: Plan, swaps: SwapPass, request: Request, report: GraphReport) -> Any:
    """A callable that lets the graph's first calls decide between the two; the outcome goes into the store and the report."""

    def decided(paired: graph_decision.Paired) -> None:
        outcome = graph_decision.decide_from(paired, held.tasks, swaps.wanted, request)
        decisions = graph_decision.apply(held.tasks, swaps.outcomes(), request)
        log.info("graph %s: %s: %.2fx Inductor", report.name, "swaps stay" if outcome.swapped else "Inductor", paired.ratio)
        registry.replace(report, dataclasses.replace(_report_of(held, decisions, outcome), name=report.name))

    launched = request.settings.whole_graph == "auto"
    trial = online.Trial(compiled, plain, held.tasks[0].device, decided, launched)
    return lambda *args: trial(*args)  # torch looks for a function's attributes


def _report_of(held: Plan, decisions: Sequence[Decision], measured: GraphDecision | None) -> GraphReport:
    """The report of a graph, given what became of each of its regions."""
    regions = [RegionReport.of(task, decision) for task, decision in zip(held.tasks, decisions, strict=True)]
    return GraphReport(_graph_name(), (*regions, *held.skipped), measured=measured)


def _file(report: GraphReport) -> None:
    """Log one line per region, write the report into torch's structured trace, and keep it."""
    for region in report.regions:
        log.info("%s", region.line)
    torch._logging.trace_structured(
        "artifact",
        metadata_fn=lambda: {"name": "llmkernels_regions", "encoding": "json"},
        payload_fn=lambda: json.dumps(report.to_json()),
    )
    registry.add(report)  # last: of a graph that goes to Inductor because something failed here, there is another report


def _graph_name() -> str:
    """torch's compile id of the graph at hand, such as `0/0`; `?` outside a compilation."""
    return str(torch._guards.CompileContext.current_compile_id() or "?")
