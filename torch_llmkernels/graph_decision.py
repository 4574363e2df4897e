"""Never slower: what was measured about whole graphs, and which swaps it forbids.

A kernel that wins in isolation can lose in its graph, because an opaque region breaks a fusion that Inductor would have made.
`precompile` compiles and times a model with and without its swaps, and leaves a `GraphDecision` for each of its graphs in the
store; the backend asks `apply` before it swaps. A graph that was never measured has no vetoes: its swaps rest on their margin in
isolation (`min_speedup`).
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch_llmkernels.cache.key import torch_version
from torch_llmkernels.cache.store import open_store
from torch_llmkernels.errors import LLMKernelsError, SchemaError
from torch_llmkernels.evaluation import SCHEMA, Decision
from torch_llmkernels.options import Request
from torch_llmkernels.plan import record_digest
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task, canonical_json, digest

log = logging.getLogger("torch_llmkernels.graph_decision")

_PREFIX = "graph/"


@dataclasses.dataclass(frozen=True)
class GraphDecision:
    """What the measurement of a model says about one of its graphs.

    Attributes:
        graph: `graph_key` of the graph.
        swapped: Tasks whose kernels stay in, by key, each with the digest of the kernel that was measured.
        vetoed: The same for those that stay out.
        inductor_ms: Milliseconds of the model compiled by Inductor.
        swapped_ms: The same with the swaps that stay in.
        noise: The relative error of their ratio (two standard errors).
    """

    graph: str
    swapped: tuple[tuple[str, str], ...]
    vetoed: tuple[tuple[str, str], ...]
    inductor_ms: float
    swapped_ms: float
    noise: float

    @property
    def speedup(self) -> float:
        """Inductor's time over the time with swaps, for the whole model; 1 if no swap is left."""
        return self.inductor_ms / self.swapped_ms if self.swapped and self.swapped_ms else 1.0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        plain = dataclasses.asdict(self)
        return {**plain, "schema": SCHEMA, "swapped": dict(self.swapped), "vetoed": dict(self.vetoed)}

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> GraphDecision:
        """The decision `to_json` wrote.

        Raises:
            SchemaError: for another schema version or missing fields.
        """
        if plain.get("schema") != SCHEMA:
            raise SchemaError(f"graph decision schema {plain.get('schema')!r}, this release reads {SCHEMA}; precompile again")
        try:
            pairs = {name: tuple(sorted(plain[name].items())) for name in ("swapped", "vetoed")}
            return cls(
                plain["graph"], pairs["swapped"], pairs["vetoed"], plain["inductor_ms"], plain["swapped_ms"], plain["noise"]
            )
        except (KeyError, AttributeError) as error:
            raise SchemaError(f"graph decision is damaged: {error!r}; precompile again") from error


def graph_key(tasks: Sequence[Task], request: Request) -> str:
    """What a graph decision is filed under: the graph's tasks in order, Inductor's options, torch.

    Not the digest of the captured code: `no_grad` and `inference_mode`, and two spellings of one model, share a measurement.
    """
    options = sorted((name, repr(value)) for name, value in request.inductor.config.items())
    return digest([[task.key for task in tasks], options, torch_version()])


def job_key(tasks: Sequence[Task], request: Request) -> str:
    """What the ranks of a job agree under: all that their decisions for this graph may depend on, but not which unit each has."""
    from torch_llmkernels.kernels.targets import target_for

    target, settings = target_for(tasks[0].device), request.settings
    reason = target.unavailable()
    device = [reason] if reason else [target.facts().kind, str(target.facts().driver)]
    knobs = [settings.swap, settings.min_speedup, settings.specialize, settings.verify, settings.fuel]
    sizes = [task.at().key for task in tasks] if settings.specialize else []
    return digest([graph_key(tasks, request), device, knobs, sizes])


def vetoes(graph: str, device: str, settings: Settings) -> dict[str, str]:
    """Digests of the kernels that stay out of this graph, by task key.

    Args:
        graph: `graph_key` of the graph.
        device: `cuda` or `cpu`.
        settings: The knobs in force.
    """
    known = recall(graph, device, settings)
    return dict(known.vetoed) if known else {}


def apply(tasks: Sequence[Task], decisions: Sequence[Decision], request: Request) -> list[Decision]:
    """The decisions of a graph, with the swaps withdrawn that make the whole graph slower.

    Args:
        tasks: Of the graph, in order.
        decisions: One per task, taken in isolation.
        request: The request; with `swap="correct"` vetoes do not count.
    """
    forced = _forced.get()
    if forced is not None:
        reason = "kept Inductor: left out of this measurement"
        return [_without(d, reason) if t.key in forced else d for t, d in zip(tasks, decisions, strict=True)]
    known = measured(tasks, request) if any(decision.record for decision in decisions) else None
    return list(decisions) if known is None else [_judged(t, d, known) for t, d in zip(tasks, decisions, strict=True)]


def measured(tasks: Sequence[Task], request: Request) -> GraphDecision | None:
    """What was measured about the graph that has these tasks, or None; with `swap="correct"` it does not count."""
    from torch_llmkernels.kernels.targets import target_for

    if not tasks or request.settings.swap != "fastest" or target_for(tasks[0].device).unavailable():
        return None
    return recall(graph_key(tasks, request), tasks[0].device, request.settings)


def _judged(task: Task, decision: Decision, known: GraphDecision) -> Decision:
    if decision.record is None:
        return decision
    measured = record_digest(decision.record)
    if dict(known.vetoed).get(task.key) == measured:
        return _without(decision, f"kept Inductor: {decision.record.kernel_name} wins alone, the whole model gains nothing")
    if dict(known.swapped).get(task.key) == measured:
        return dataclasses.replace(decision, reason=f"{decision.reason}; whole model {known.speedup:.2f}x Inductor")
    return decision


def _without(decision: Decision, reason: str) -> Decision:
    return decision if decision.record is None else dataclasses.replace(decision, record=None, reason=reason)


_forced: contextvars.ContextVar[frozenset[str] | None] = contextvars.ContextVar("llmkernels_vetoed", default=None)


def is_forced() -> bool:
    """Whether a measurement is compiling one of its variants here."""
    return _forced.get() is not None


@contextlib.contextmanager
def forcing(vetoed: frozenset[str]) -> Iterator[None]:
    """Compile with exactly these tasks vetoed, whatever the store says: how a measurement makes its variants."""
    token = _forced.set(vetoed)
    try:
        yield
    finally:
        _forced.reset(token)


def recall(graph: str, device: str, settings: Settings) -> GraphDecision | None:
    """What was measured about a graph on this device, or None."""
    try:
        blob = open_store(settings).get(_name(graph, device))
        return None if blob is None else GraphDecision.from_json(json.loads(blob))
    except (LLMKernelsError, ValueError) as error:
        if settings.strict:
            raise
        log.warning("graph decision %s is unreadable and does not count: %s", graph, error)
        return None


def remember(decision: GraphDecision, device: str, settings: Settings) -> None:
    """Keep what was measured about a graph on this device."""
    open_store(settings).put(_name(decision.graph, device), canonical_json(decision.to_json()).encode())


def _name(graph: str, device: str) -> str:
    from torch_llmkernels.kernels.targets import target_for

    facts = target_for(device).facts()
    return f"{_PREFIX}{graph}/{digest([facts.kind, facts.unit, str(facts.driver)])}"
