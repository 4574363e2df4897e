"""A graph's first calls decide whether its swaps pay in the whole graph.

`precompile` measures a model offline. This does it with the user's own calls, for an inference graph that nothing is known about:
the graph is compiled with its swaps and without, and the calls alternate between the two, each call running exactly one of them,
until they can be told apart. The faster one then runs alone, and the outcome is remembered as `precompile` would remember it.

No call is made twice, so nothing has to be undone, and on CUDA nothing waits for the device before the end of a group of calls.
The price is a second compilation. `options={"whole_graph": "measure"}` pays it for every graph that has swaps. By default only
those graphs pay it whose kernels are short and launched one by one: there the host may be what takes the time, and a swapped call
costs the host more than a library's (several launches, scratch buffers), which the times of the kernels alone do not show.
"""

from __future__ import annotations

import contextlib
import logging
import statistics
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_llmkernels import graph_decision, ranks
from torch_llmkernels.evaluation import Record
from torch_llmkernels.graph_decision import Paired
from torch_llmkernels.options import Request
from torch_llmkernels.task import Task

log = logging.getLogger("torch_llmkernels.graph_decision")

WARM_UP = 4
"""Untimed calls of each variant: with CUDA graphs the first ones warm up and record."""
PAIRS = 12
"""Calls of each variant after which they are compared."""
LOOKS = 4
"""How often a comparison that is undecided takes as many again; then the swaps do not pay."""
MOST_CALLS = 2 * (WARM_UP + PAIRS * LOOKS)
"""Calls after which every graph is decided."""
SHORT_MS = 0.05
"""Mean time of a graph's kernels below which launching them may take longer than running them."""


def why_not(tasks: Sequence[Task], wanted: Sequence[Record], example_inputs: Sequence[Any], request: Request) -> str:
    """Why the first calls of this graph do not decide about it; empty if they do."""
    if request.settings.whole_graph == "stored" or request.settings.swap != "fastest":
        return "not asked for"
    if request.settings.whole_graph == "auto" and not _may_wait_for_the_host(wanted, request):
        return "launching its kernels is not what takes the time"
    if graph_decision.is_forced():
        return "it is being measured offline"
    known = graph_decision.measured(tasks, request)
    if known is not None and graph_decision.covers(known, wanted):
        return "it was measured before"
    if torch.is_grad_enabled() and any(isinstance(t, torch.Tensor) and t.requires_grad for t in example_inputs):
        return "it is a training graph, whose backward is not called from here; use precompile(training=True)"
    if any(task.is_dynamic for task in tasks) or any(isinstance(value, torch.SymInt) for value in example_inputs):
        return "its sizes vary from call to call; use precompile"
    if ranks.job_store() is not None:
        return "the ranks of a job decide alike, and their clocks do not; use precompile on one of them"
    if torch._dynamo.config.caching_precompile:
        return "caching_precompile stores one compiled graph, not two"
    return ""


def _may_wait_for_the_host(wanted: Sequence[Record], request: Request) -> bool:
    """Whether a graph's kernels are so short, and launched one by one, that the host may be what takes the time."""
    if wanted[0].task.device != "cuda" or request.inductor_option("triton.cudagraphs"):
        return False
    times = [record.evaluation.time_ms for record in wanted]
    return all(times) and statistics.mean(times) < SHORT_MS


class Trial:
    """Two variants of a compiled graph that take turns until one has won; then that one alone.

    Args:
        swapped: With the swaps.
        plain: Inductor alone.
        device: `cuda` or `cpu`.
        decided: Called once with the comparison, Inductor first.
        launched: Whether the doubt is about launching the kernels: then a CUDA graph that the user records before the end of the
            trial gets the swapped variant, because its replay launches nothing; else it gets Inductor.
    """

    def __init__(
        self,
        swapped: Callable[..., Any],
        plain: Callable[..., Any],
        device: str,
        decided: Callable[[Paired], None],
        launched: bool = False,
    ) -> None:
        self.variants = (plain, swapped)
        self._launched = launched
        _trials.add(self)
        self.winner: Callable[..., Any] | None = None
        self._clock = _CudaClock() if device == "cuda" else _HostClock()
        self._decided = decided
        self._calls = 0
        self._lock = threading.Lock()

    def __call__(self, *args: Any) -> Any:
        if self.winner is not None:
            return self.winner(*args)
        if self._clock.must_not_run():  # a CUDA graph of the user's is recording
            return self.variants[self._launched](*args)
        if not self._lock.acquire(blocking=False):  # another thread is timing
            return self.variants[0](*args)
        try:
            return self._timed(*args)
        finally:
            self._lock.release()

    def _timed(self, *args: Any) -> Any:
        which, self._calls = self._calls % 2, self._calls + 1
        if self._calls <= 2 * WARM_UP:
            return self.variants[which](*args)
        result = self._clock.time(which, lambda: self.variants[which](*args))
        done = self._calls - 2 * WARM_UP
        if done % (2 * PAIRS) == 0:
            try:
                self._compare(last=done == 2 * PAIRS * LOOKS)
            except Exception:  # this is a user's call, and its result is at hand
                log.warning("the measurement of a whole graph failed; it will be measured again", exc_info=True)
                self.winner = self.winner or self.variants[0]
        return result

    def _compare(self, last: bool) -> None:
        with self._clock.device():
            paired = Paired.of(*self._clock.milliseconds())
            if last or abs(paired.ratio - 1.0) > paired.noise:
                self.winner = self.variants[paired.second_is_faster]
                self.variants = (self.winner, self.winner)  # the other one's memory is free
                self._decided(paired)


_trials: weakref.WeakSet[Trial] = weakref.WeakSet()


def undecided() -> bool:
    """Whether a graph of this process is still being decided by its calls; a benchmark calls it until then."""
    return any(trial.winner is None for trial in _trials)


class _HostClock:
    """Times calls of two variants on the host."""

    def __init__(self) -> None:
        self._samples: tuple[list[float], list[float]] = ([], [])

    def device(self) -> contextlib.AbstractContextManager[object]:
        return contextlib.nullcontext()

    def must_not_run(self) -> bool:
        return False

    def time(self, which: int, call: Callable[[], Any]) -> Any:
        begin = time.perf_counter()
        result = call()
        self._samples[which].append((time.perf_counter() - begin) * 1e3)
        return result

    def milliseconds(self) -> tuple[list[float], list[float]]:
        return self._samples


class _CudaClock:
    """Times calls of two variants between events of the stream that is current on the graph's device, which is the current device
    where the clock is made; only reading the times waits for the device."""

    def __init__(self) -> None:
        self._events: tuple[list[Any], list[Any]] = ([], [])
        self._index = torch.cuda.current_device()

    def device(self) -> contextlib.AbstractContextManager[object]:
        return torch.cuda.device(self._index)

    def must_not_run(self) -> bool:
        with self.device():
            return torch.cuda.is_current_stream_capturing()

    def time(self, which: int, call: Callable[[], Any]) -> Any:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        stream = torch.cuda.current_stream(self._index)
        begin.record(stream)
        result = call()
        end.record(stream)
        self._events[which].append((begin, end))
        return result

    def milliseconds(self) -> tuple[list[float], list[float]]:
        torch.cuda.synchronize()
        first, second = ([begin.elapsed_time(end) for begin, end in events] for events in self._events)
        return first, second
