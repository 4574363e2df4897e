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
import logging
import math
import statistics
from collections.abc import Iterator, Sequence

from torch_llmkernels.cache.key import torch_version
from torch_llmkernels.cache.store import open_store
from torch_llmkernels.evaluation import Decision, GraphDecision, Record
from torch_llmkernels.options import Request
from torch_llmkernels.plan import is_lasting, lasting, named_options, record_digest, without_addresses
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task, digest

log = logging.getLogger("torch_llmkernels.graph_decision")


@dataclasses.dataclass(frozen=True)
class Paired:
    """Two variants timed in turn.

    Attributes:
        first_ms: Median milliseconds of a call of the first.
        second_ms: The same of the second.
        ratio: Median of first over second, sample by sample: above 1, the second is faster.
        noise: Two standard errors of that median.
    """

    first_ms: float
    second_ms: float
    ratio: float
    noise: float

    @classmethod
    def of(cls, first: Sequence[float], second: Sequence[float]) -> Paired:
        """From milliseconds of samples taken in turn."""
        ratios = [a / b for a, b in zip(first, second, strict=True)]
        low, _, high = statistics.quantiles(ratios, n=4)
        # of a normal sample: sigma is IQR / 1.349, the median's standard error is 1.253 sigma / sqrt(n)
        noise = 2 * 1.253 * (high - low) / 1.349 / math.sqrt(len(ratios))
        return cls(statistics.median(first), statistics.median(second), statistics.median(ratios), noise)

    @property
    def second_is_faster(self) -> bool:
        """Whether the second is faster by more than the noise."""
        return self.ratio - self.noise > 1.0


def graph_key(tasks: Sequence[Task], request: Request) -> str:
    """What a graph decision is filed under: the graph's tasks in order, Inductor's options, torch.

    Not the digest of the captured code: `no_grad` and `inference_mode`, and two spellings of one model, share a measurement.
    """
    options = named_options(request)
    return lasting(options, digest([[task.key for task in tasks], options, torch_version()]))


def job_key(tasks: Sequence[Task], request: Request) -> str:
    """What the ranks of a job agree under: all that their decisions for this graph may depend on, but not which unit each has."""
    from torch_llmkernels.kernels.targets import target_for

    target, settings = target_for(tasks[0].device), request.settings
    reason = target.unavailable()
    device = [reason] if reason else [target.facts().kind, str(target.facts().driver)]
    knobs = [settings.swap, settings.min_speedup, settings.specialize, settings.verify, settings.fuel]
    sizes = [task.at().key for task in tasks] if settings.specialize else []
    options = without_addresses(str(named_options(request)))  # the ranks run one program: a nameless pass is the same on all
    return digest([[task.key for task in tasks], options, torch_version(), device, knobs, sizes])


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
    return list(decisions) if known is None else [_judged(d, known) for d in decisions]


def measured(tasks: Sequence[Task], request: Request) -> GraphDecision | None:
    """What was measured about the graph that has these tasks, or None; with `swap="correct"` it does not count."""
    from torch_llmkernels.kernels.targets import target_for

    if not tasks or request.settings.swap != "fastest" or target_for(tasks[0].device).unavailable():
        return None
    return recall(graph_key(tasks, request), tasks[0].device, request.settings)


def covers(known: GraphDecision, records: Sequence[Record]) -> bool:
    """Whether the measurement kept exactly these kernels in (equal ones count once)."""
    return dict(known.swapped) == {record.task.key: record_digest(record) for record in records}


def decide_from(paired: Paired, tasks: Sequence[Task], records: Sequence[Record], request: Request) -> GraphDecision:
    """Remember what a comparison of the graph without and with all of these swaps says, and return it."""
    pairs = tuple(sorted({record.task.key: record_digest(record) for record in records}.items()))
    stay, leave = (pairs, ()) if paired.second_is_faster else ((), pairs)
    key = graph_key(tasks, request)
    decision = GraphDecision(key, stay, leave, paired.first_ms, paired.second_ms, paired.noise)
    remember(decision, tasks[0].device, request.settings)
    return decision


def _judged(decision: Decision, known: GraphDecision) -> Decision:
    if decision.record is None:
        return decision
    key, measured = decision.record.task.key, record_digest(decision.record)  # with `specialize`, of the static task
    if dict(known.vetoed).get(key) == measured:
        return _without(decision, f"kept Inductor: {decision.record.kernel_name} wins alone, the whole model gains nothing")
    if dict(known.swapped).get(key) == measured:
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
    """What was measured about a graph on this device, or came in a bundle from one of its kind and driver; or None."""
    if not is_lasting(graph):
        return None
    from torch_llmkernels.kernels.targets import target_for

    return open_store(settings).graph_decision(graph, target_for(device).facts())


def remember(decision: GraphDecision, device: str, settings: Settings) -> None:
    """Keep what was measured about a graph on this device, if its key lasts."""
    if not is_lasting(decision.graph):
        log.warning("what was measured about a graph is not kept: an option is a pass without a uuid() or a name of its own")
        return
    from torch_llmkernels.kernels.targets import target_for

    facts = target_for(device).facts()
    here = dataclasses.replace(decision, device_kind=facts.kind, unit=facts.unit, driver=str(facts.driver))
    open_store(settings).put_graph_decision(here)
