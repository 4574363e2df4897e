"""How long a kernel takes, beside its baselines, in one process and in turns.

One sample of a subject calls it once on each of several data sets, whose inputs and outputs lie in memory of their own. Before
every sample, outside the clock, the data is drawn again and the outputs are overwritten: a result kept from an earlier call is
never right again. On CUDA a sample is the replay of one captured graph between two events, with the L2 cache flushed before it
and the sets together larger than twice the L2 cache; on the CPU it is a loop under `perf_counter`.
"""

from __future__ import annotations

import dataclasses
import math
import random
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_llmkernels.evaluate.baseline import eager, inductor, wrapper
from torch_llmkernels.evaluate.buffers import FINITE_BYTE, assign, dtype_of, empty, span_bytes
from torch_llmkernels.evaluate.inputs import InputGenerator
from torch_llmkernels.evaluate.reference import precision
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.task import Task, TensorSpec

Run = Callable[..., None]

MOST_SETS = {"cuda": 256, "cpu": 16}
MOST_SET_BYTES = {"cuda": 4 << 30, "cpu": 256 << 20}
L2_MULTIPLE = 2
MOST_SAMPLES, FEWEST_SAMPLES = 240, 9
SCRATCH_ALIGN = 256
POOL_EXTRA = 1 << 18
"""Places in a pool of random values from which an input's data may begin."""
CLEAR_WIN, CLEAR_LOSS = 1.1, 1.0
"""The ratio of a baseline to the kernel: no more turns are needed where every one is above the first, or below the second."""
GROUPS = 12
"""Groups of consecutive samples whose medians the spread is taken over, where there are four samples in each."""
SECONDS_PER_SUBJECT = 0.7
"""Time spent inside the clock per subject; slow subjects get `FEWEST_SAMPLES`."""


@dataclasses.dataclass(frozen=True)
class Times:
    """Medians over samples, in milliseconds per call.

    Attributes:
        kernel_ms: The candidate's.
        spread: How far the lower quartile of the ratio to the best baseline lies below its median, as a share of it (quartiles
            over turns, or medians of groups of them, if there are many): the kernel wins in three quarters of the turns if
            ratio * (1 - spread) > 1.
        baselines_ms: (name, milliseconds) of `eager` and, where it compiles, `inductor`.
        ratios: (name, baseline's time over the kernel's): the median over turns, so that a machine that slows down for a while
            slows both sides of every ratio.
        mismatch: How the outputs of a timed sample differ from those of a checked call on the same data, or None.
    """

    kernel_ms: float
    spread: float
    baselines_ms: tuple[tuple[str, float], ...]
    ratios: tuple[tuple[str, float], ...]
    mismatch: str | None = None


@dataclasses.dataclass
class DataSet:
    """Tensors of one call: outputs, workspaces and inputs of exact stride."""

    outputs: list[torch.Tensor]
    workspaces: list[torch.Tensor]
    inputs: list[torch.Tensor]

    @property
    def tensors(self) -> list[torch.Tensor]:
        """In the order of a launcher's arguments."""
        return [*self.outputs, *self.workspaces, *self.inputs]


def make_sets(task: Task, workspaces: Sequence[TensorSpec], facts: DeviceFacts, seed: int = 0) -> list[DataSet]:
    """Data sets of a static task, normal data: at least two, on CUDA together larger than twice the L2 cache if memory allows."""
    specs = (*task.outputs, *workspaces, *task.inputs)
    size = max(1, sum(span_bytes(t, dtype_of(t).itemsize) for t in specs))
    wanted = math.ceil(L2_MULTIPLE * facts.l2_bytes / size) + 1 if task.device == "cuda" else MOST_SETS["cpu"]
    count = max(2, min(wanted, MOST_SETS[task.device], MOST_SET_BYTES[task.device] // size))
    generator = InputGenerator(task)
    sets = []
    for number in range(count):
        made = DataSet(*([empty(t, task.device) for t in group] for group in (task.outputs, workspaces, task.inputs)))
        for tensor, values in zip(made.inputs, generator.make("normal", seed + number), strict=True):
            assign(tensor, values)
        sets.append(made)
    return sets


class Subject:
    """Something to time: one call per data set."""

    def __init__(self, name: str, calls: Sequence[Callable[[], Any]]) -> None:
        self.name, self.calls = name, calls
        self.samples: list[float] = []

    def sample(self) -> None:
        """Add the milliseconds per call of one pass over the sets."""
        start = time.perf_counter()
        for call in self.calls:
            call()
        self.samples.append((time.perf_counter() - start) * 1e3 / len(self.calls))

    @property
    def enough(self) -> bool:
        spent = sum(self.samples) * len(self.calls) / 1e3
        return len(self.samples) >= MOST_SAMPLES or (len(self.samples) >= FEWEST_SAMPLES and spent >= SECONDS_PER_SUBJECT)

    @property
    def median(self) -> float:
        return statistics.median(self.samples)

    @property
    def spread(self) -> float:
        """Interquartile range over the median."""
        low, _, high = statistics.quantiles(_grouped(self.samples), n=4)
        return (high - low) / self.median if self.median else 0.0


class CudaSubject(Subject):
    """The same as one captured graph; where capture fails, calls one after the other."""

    def __init__(self, name: str, calls: Sequence[Callable[[], Any]], flush: torch.Tensor) -> None:
        super().__init__(name, calls)
        self._flush = flush
        self._graph = self._capture()

    def _capture(self) -> torch.cuda.CUDAGraph | None:
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for call in (self.calls[0], self.calls[-1]):
                call()
        torch.cuda.current_stream().wait_stream(stream)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                for call in self.calls:
                    call()
        except (RuntimeError, AssertionError):  # an operator that synchronises cannot be captured
            torch.cuda.synchronize()
            return None
        return graph

    def sample(self) -> None:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        self._flush.zero_()
        torch.cuda.synchronize()
        begin.record()
        if self._graph is not None:
            self._graph.replay()
        else:
            for call in self.calls:
                call()
        end.record()
        end.synchronize()
        self.samples.append(begin.elapsed_time(end) / len(self.calls))


class Stopwatch:
    """Times one task's candidates; keeps the data sets and the compiled baselines between them.

    Args:
        task: Static.
        symbols: Values of the dynamic task's symbols, passed to the candidate after its tensors.
        workspaces: What the candidate wants.
        facts: The device.
    """

    def __init__(self, task: Task, symbols: Sequence[int], workspaces: Sequence[TensorSpec], facts: DeviceFacts) -> None:
        self._task, self._symbols = task, list(symbols)
        self._sets = make_sets(task, workspaces, facts)
        self._flush = torch.empty(
            L2_MULTIPLE * facts.l2_bytes if task.device == "cuda" else 0, dtype=torch.uint8, device=task.device
        )
        self._fresh = [i for i, t in enumerate(task.inputs) if self._may_change(t)]
        self._random = random.Random(0)
        self._pools = {i: _pool(self._sets[0].inputs[i]) for i in self._fresh}

    def _may_change(self, spec: TensorSpec) -> bool:
        """Whether new normal values keep an input valid: floating, not a parameter, not a statistic of another input."""
        tied = spec.name.endswith(("mean", "var", "rstd", "invstd", "logsumexp", "out", "output", "total_weight", "mask"))
        return dtype_of(spec).is_floating_point and spec.name not in self._task.constant and not tied

    @torch.no_grad()
    def sweep(self, candidates: Sequence[tuple[Run, Sequence[TensorSpec]]]) -> list[float]:
        """Times of candidates relative to each other, from a few samples in turns: to choose among constants.

        Args:
            candidates: Each with its workspaces, which lie in the set's only workspace (see `scratch`).
        """
        with precision(self._task.numerics):
            subjects = [self._subject("", self._calls_in_scratch(run, specs)) for run, specs in candidates]
            take_turns(subjects, lambda: len(subjects[-1].samples) >= FEWEST_SAMPLES, self._renew)
        turns = [statistics.median(turn) for turn in zip(*(s.samples for s in subjects), strict=True)]
        return [statistics.median(paired(s.samples, turns)) for s in subjects]

    def _calls_in_scratch(self, run: Run, specs: Sequence[TensorSpec]) -> list[Callable[[], Any]]:
        return [
            _bound(run, (*data.outputs, *_carve(data.workspaces[0], specs), *data.inputs, *self._symbols)) for data in self._sets
        ]

    @torch.no_grad()
    def compare(self, run: Run, checked: Run, *, prepare: Run | None = None, brief: bool = False) -> Times:
        """Time a candidate beside eager and Inductor, in turns.

        Args:
            run: The candidate, called as a launcher is.
            checked: The same kernel as it was checked, with nothing prepared; its outputs are what the timed ones must be.
            prepare: Called once per data set before timing, for constants that the runtime would prepare once.
            brief: End when it is clear which is faster (`is_clear`).
        """
        if prepare is not None:
            for data in self._sets:
                prepare(*data.tensors, *self._symbols)
        with precision(self._task.numerics):
            kernel = self._subject("kernel", self._kernel_calls(run))
            baselines = self._baselines()
            turns = [kernel, *baselines]
            for subject in turns:  # warm up
                subject.sample()
                subject.samples.clear()
            take_turns(turns, lambda: all(s.enough for s in turns) or (brief and is_clear(kernel, baselines)), self._renew)
            mismatch = self._mismatch(kernel, checked)
        times = tuple((s.name, s.median) for s in baselines)
        turns_of = {s.name: paired(s.samples, kernel.samples) for s in baselines}
        ratios = tuple((name, statistics.median(found)) for name, found in turns_of.items())
        best = min(ratios, key=lambda ratio: ratio[1])[0]
        return Times(kernel.median, lower_spread(turns_of[best]), times, ratios, mismatch)

    def _kernel_calls(self, run: Run) -> list[Callable[[], Any]]:
        """Calls of the candidate; on the CPU each beside a call of Inductor's wrapper, which the compiled baseline pays too."""
        calls = [_bound(run, (*data.tensors, *self._symbols)) for data in self._sets]
        return calls if self._task.device == "cuda" else [_both(call, wrapper()) for call in calls]

    def _baselines(self) -> list[Subject]:
        found = [("eager", eager(self._task)), ("inductor", inductor(self._task, self._sets[0].inputs))]
        return [self._subject(n, [_bound(c, (data.inputs,)) for data in self._sets]) for n, c in found if c is not None]

    def _subject(self, name: str, calls: list[Callable[[], Any]]) -> Subject:
        if self._task.device == "cuda":
            return CudaSubject(name, calls, self._flush)
        for call in (calls[0], calls[-1]):
            call()
        return Subject(name, calls)

    def _renew(self) -> None:
        """New data in the same buffers, and outputs that are nobody's answer."""
        for data in self._sets:
            for i, pool in self._pools.items():
                self._draw(data.inputs[i], pool)
            for tensor in data.outputs:
                tensor.view(torch.uint8).fill_(FINITE_BYTE) if tensor.is_contiguous() and tensor.ndim else tensor.fill_(1)

    def _draw(self, tensor: torch.Tensor, pool: torch.Tensor) -> None:
        """Other normal values: a stretch of the pool from a random place on, times a random factor."""
        begin, factor = self._random.randrange(POOL_EXTRA), self._random.uniform(0.5, 1.5)
        values = pool[begin : begin + tensor.numel()].view(tensor.shape)
        if 0 in tensor.stride():
            assign(tensor, values * factor)
        else:
            torch.mul(values, factor, out=tensor)

    def _mismatch(self, kernel: Subject, checked: Run) -> str | None:
        """Compare what a timed sample leaves in the outputs of the first and last set with a checked call on the same data."""
        self._renew()
        kernel.sample()
        kernel.samples.pop()
        if self._task.device == "cuda":
            torch.cuda.synchronize()
        for number in (0, -1):
            data = self._sets[number]
            again = [torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=t.device) for t in data.outputs]
            scratch = [torch.empty_like(t) for t in data.workspaces]
            checked(*again, *scratch, *data.inputs, *self._symbols)
            for spec, timed, right in zip(self._task.outputs, data.outputs, again, strict=True):
                if not agree(timed, right):
                    return f"output {spec.name} of a timed call differs from that of a checked call on the same data"
        return None


def take_turns(
    subjects: Sequence[Subject], done: Callable[[], bool], before: Callable[[], None] = lambda: None
) -> None:
    """Sample every subject once per turn, in random order (whoever always followed eager would be measured slower).

    Args:
        subjects: Warm.
        done: Asked before each turn.
        before: Called before each sample, outside the clock.
    """
    order = random.Random(0)
    while not done():
        for subject in order.sample(subjects, len(subjects)):
            before()
            subject.sample()


def is_clear(kernel: Subject, baselines: Sequence[Subject]) -> bool:
    """Whether every turn of at least `FEWEST_SAMPLES` says the same: the kernel beats all baselines by far, or one of them
    beats it by anything."""
    if len(kernel.samples) < FEWEST_SAMPLES:
        return False
    turns = [paired(s.samples, kernel.samples) for s in baselines]
    return all(min(ratios) > CLEAR_WIN for ratios in turns) or any(max(ratios) < CLEAR_LOSS for ratios in turns)


def _pool(tensor: torch.Tensor) -> torch.Tensor:
    """Normal values for `Stopwatch._draw`: drawing every one anew would take longer than the calls that are timed."""
    return torch.empty(tensor.numel() + POOL_EXTRA, dtype=tensor.dtype, device=tensor.device).normal_()


def paired(above: Sequence[float], below: Sequence[float]) -> list[float]:
    """Ratios of samples that were taken in the same turns; positive milliseconds."""
    return [a / b for a, b in zip(above, below, strict=True)]


def lower_spread(ratios: Sequence[float]) -> float:
    """See `Times.spread`. One disturbed turn in four does not widen it, as it does a range or a deviation."""
    middle = statistics.median(ratios)
    return max(0.0, (middle - statistics.quantiles(_grouped(ratios), n=4)[0]) / middle)


def _grouped(samples: Sequence[float]) -> list[float]:
    """Medians of groups of consecutive samples, or the samples if there are few."""
    size = max(1, len(samples) // GROUPS) if len(samples) >= 4 * GROUPS else 1
    return [statistics.median(samples[i : i + size]) for i in range(0, len(samples) - size + 1, size)]


def scratch(candidates: Sequence[Sequence[TensorSpec]]) -> TensorSpec:
    """One workspace that holds those of any of the candidates."""
    size = max(sum(_padded(t) for t in specs) for specs in candidates)
    return TensorSpec("scratch", "uint8", (max(size, 1),), (1,))


def _padded(spec: TensorSpec) -> int:
    return -(-span_bytes(spec, dtype_of(spec).itemsize) // SCRATCH_ALIGN) * SCRATCH_ALIGN


def _carve(buffer: torch.Tensor, specs: Sequence[TensorSpec]) -> list[torch.Tensor]:
    """Tensors of contiguous specs, one after the other in a buffer of bytes."""
    made, begin = [], 0
    for spec in specs:
        size = span_bytes(spec, dtype_of(spec).itemsize)
        made.append(buffer[begin : begin + size].view(dtype_of(spec)).view([int(d) for d in spec.shape]))
        begin += _padded(spec)
    return made


def agree(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two results of one kernel on one data set agree to rounding (64 ulps of the norm), NaN where NaN is."""
    if not a.is_floating_point():
        return bool((a != b).sum() <= a.numel() // 1000)
    same = torch.equal(a.isnan(), b.isnan()) and torch.equal(a.isinf(), b.isinf())
    x, y = (torch.where(t.isfinite(), t, 0).double() for t in (a, b))
    return same and float((x - y).norm()) <= 64 * torch.finfo(a.dtype).eps * float(y.norm())


def _both(first: Callable[[], Any], second: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: (first(), second())


def _bound(call: Callable[..., Any], args: tuple[Any, ...]) -> Callable[[], Any]:
    return lambda: call(*args)
