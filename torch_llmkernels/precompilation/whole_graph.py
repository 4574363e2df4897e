"""Measure a model with and without its swaps, and decide which of them the whole model is faster with.

Equal tasks form one swap group. The variants of a model (Inductor alone, every swap, every swap but one group, ...) are compiled
side by side and timed in turn, call by call, so that whatever drifts on the machine drifts for all of them; a variant is better
only if the median of the paired ratios clears two standard errors.
"""

from __future__ import annotations

import contextlib
import logging
import math
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch

from torch_llmkernels import graph_decision, registry
from torch_llmkernels.backend import llmkernels
from torch_llmkernels.capture import Call, CapturedGraph, fresh_dynamo, untouched
from torch_llmkernels.errors import LLMKernelsError
from torch_llmkernels.evaluation import Record
from torch_llmkernels.graph_decision import GraphDecision, Paired
from torch_llmkernels.plan import record_digest

log = logging.getLogger("torch_llmkernels.graph_decision")

ROUNDS = 25
"""Paired samples of a comparison: with 25, two standard errors of the median are about half of the samples' spread."""
LOOKS = 4
"""How often a comparison that is still undecided takes as many samples again."""
SAMPLE_S = 0.002
"""Seconds that one sample lasts at least: shorter ones measure the clock and the wake-up of the device."""


def samples_ms(
    calls: Mapping[str, Callable[[], Any]], device: str, rounds: int = ROUNDS, max_s: float = 60.0
) -> dict[str, list[float]]:
    """Milliseconds per call, for each sample of each callable, taken in turn: each once per round, in random order.

    Args:
        calls: What to time, warm.
        device: `cuda` or `cpu`; what is timed ends when the device is done.
        rounds: Samples of each.
        max_s: After this many seconds no further round starts (at least five are taken).
    """
    sync = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    repeats = {name: _repeats(call, sync) for name, call in calls.items()}
    samples: dict[str, list[float]] = {name: [] for name in calls}
    order = random.Random(0)
    begin = time.perf_counter()
    for done in range(rounds):
        if done >= 5 and time.perf_counter() - begin > max_s:
            break
        # In a new order each round, after an untimed call: on a CPU, whoever always follows eager is measured 10 % slower.
        for name in order.sample(list(calls), len(calls)):
            calls[name]()
            samples[name].append(_sample_s(calls[name], repeats[name], sync) * 1e3)
    return samples


def median_ms(call: Callable[[], Any], device: str) -> float:
    """Median milliseconds of a warm callable, in at most five seconds."""
    return statistics.median(samples_ms({"it": call}, device, rounds=7, max_s=5.0)["it"])


def _repeats(call: Callable[[], Any], sync: Callable[[], None]) -> int:
    _sample_s(call, 1, sync)
    return max(1, math.ceil(SAMPLE_S / _sample_s(call, 2, sync)))


def _sample_s(call: Callable[[], Any], repeats: int, sync: Callable[[], None]) -> float:
    sync()
    begin = time.perf_counter()
    for _ in range(repeats):
        call()
    sync()
    return (time.perf_counter() - begin) / repeats


def step_of(compiled: Callable[..., Any], model: Any, calls: Sequence[Call], training: bool) -> Callable[[], Any]:
    """A function that runs every call once: forward, and with `training` the backward of the sum of its floating outputs."""

    def step() -> list[Any]:
        outputs = []
        for call in calls:
            torch.compiler.cudagraph_mark_step_begin()
            output = compiled(*call.args, **call.kwargs)
            if training:
                loss_of(output).backward()
                clear_gradients(model, call)
            outputs.append(output)
        return outputs

    return step


def clear_gradients(model: Any, call: Call) -> None:
    """Drop the gradients of the model's parameters and of a call's inputs."""
    for leaf in (*(model.parameters() if isinstance(model, torch.nn.Module) else ()), *(t for _, t in call.tensors)):
        leaf.grad = None


def loss_of(output: Any) -> torch.Tensor:
    """The sum of every output that has a gradient.

    Raises:
        LLMKernelsError: if none has.
    """
    leaves = torch.utils._pytree.tree_leaves(output)
    sums = [t.float().sum() for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    if not sums:
        raise LLMKernelsError("training: no output of the model has a gradient; give it parameters or inputs that require one")
    return torch.stack(sums).sum()


class Variants:
    """The compiled variants of one model; each is compiled and warmed up at its first use.

    Args:
        model: The model.
        calls: How it is called.
        device: `cuda` or `cpu`.
        training: Time forward and backward.
        compile_options: `mode`, `options` and `dynamic` of `torch.compile`.
    """

    def __init__(
        self, model: Any, calls: Sequence[Call], device: str, training: bool, compile_options: Mapping[str, Any]
    ) -> None:
        self.model, self.calls, self.device, self.training = model, calls, device, training
        self.compile_options = dict(compile_options)
        self.steps: dict[frozenset[str], Callable[[], Any]] = {}
        self.slowest_s = 0.0

    def step(self, vetoed: frozenset[str]) -> Callable[[], Any]:
        """The variant without the swaps of the tasks `vetoed`."""
        if vetoed not in self.steps:
            begin = time.monotonic()
            compiled = torch.compile(self.model, backend=_variant(vetoed), **self.compile_options)
            step = step_of(compiled, self.model, self.calls, self.training)
            for _ in range(3):  # compile; with CUDA graphs: warm up, then record
                step()
            self.steps[vetoed] = step
            self.slowest_s = max(self.slowest_s, time.monotonic() - begin)
        return self.steps[vetoed]

    def compare(self, first: frozenset[str], second: frozenset[str], max_s: float) -> Paired:
        """Time two variants in turn, until they can be told apart or `LOOKS` times `ROUNDS` samples are taken."""
        calls = {"first": self.step(first), "second": self.step(second)}
        taken: dict[str, list[float]] = {"first": [], "second": []}
        for _ in range(LOOKS):
            for name, samples in samples_ms(calls, self.device, max_s=max_s / LOOKS).items():
                taken[name] += samples
            paired = Paired.of(taken["first"], taken["second"])
            if abs(paired.ratio - 1.0) > paired.noise:
                break
        return paired


def _variant(vetoed: frozenset[str]) -> Callable[..., Any]:
    """A backend of its own, so that Dynamo keeps its code apart from the other variants'."""

    def llmkernels_variant(gm: Any, example_inputs: Any, **options: Any) -> Any:
        with graph_decision.forcing(vetoed):
            return llmkernels(gm, example_inputs, **options)

    return llmkernels_variant


@contextlib.contextmanager
def _aside(variants: int) -> Iterator[None]:
    """Room in Dynamo's cache for that many variants of every graph; their reports do not outlive the measurement."""
    config = torch._dynamo.config
    with config.patch(recompile_limit=config.recompile_limit + variants * 8), registry.forgetting():
        yield


def measure(
    model: Any,
    calls: Sequence[Call],
    graphs: Sequence[CapturedGraph],
    winners: Mapping[str, Record],
    *,
    training: bool = False,
    compile_options: Mapping[str, Any] | None = None,
    budget_s: float = 300.0,
) -> list[GraphDecision]:
    """Decide, for a model whose regions are decided in isolation, which swaps stay; one decision per graph that has winners.

    Greedy: from every swap in, the group that promises least is left out first; it stays out if the model is then faster by more
    than the noise. What is left must beat Inductor by more than the noise, or nothing is swapped.

    Args:
        model: The model.
        calls: How it is called.
        graphs: Its graphs, as captured with the same settings.
        winners: Records that won in isolation, by task key.
        training: Time forward and backward.
        compile_options: `mode`, `options` and `dynamic` of `torch.compile`.
        budget_s: Seconds; the comparisons that do not fit are left out. Inductor against every swap always runs.
    """
    groups = _groups(graphs, winners)
    if not groups:
        return []
    device = next(iter(winners.values())).task.device
    deadline = time.monotonic() + budget_s
    variants = Variants(model, calls, device, training, compile_options or {})
    inductor = frozenset(groups)
    with fresh_dynamo(), untouched(model), _aside(len(groups) + 2), torch.set_grad_enabled(training):
        best = frozenset[str]()
        variants.step(inductor)
        variants.step(best)
        for group in groups if len(groups) > 1 else ():
            left = deadline - time.monotonic()
            if left < 2 * variants.slowest_s:
                log.info("whole graph: the budget ends before %s; it was not left out", group)
                break
            without = variants.compare(best, best | {group}, max_s=left / 4)
            log.info("whole graph: without %s %.3f ms, with %.3f ms", group, without.second_ms, without.first_ms)
            if without.second_is_faster:
                best |= {group}
        if best == inductor:  # every group was left out; what all of them together cost is still to be said
            best = frozenset()
        final = variants.compare(inductor, best, max_s=max(deadline - time.monotonic(), 1.0))
    if not final.second_is_faster:
        best = inductor
    return [_decision(graph, winners, best, final) for graph in graphs if any(t.key in winners for t in graph.tasks)]


def _groups(graphs: Sequence[CapturedGraph], winners: Mapping[str, Record]) -> list[str]:
    """Task keys of the swaps, those that promise least first."""
    counts: dict[str, int] = {}
    for graph in graphs:
        for task in graph.tasks:
            if task.key in winners:
                counts[task.key] = counts.get(task.key, 0) + 1

    def gain_ms(key: str) -> float:
        evaluation = winners[key].evaluation
        return counts[key] * ((evaluation.baseline_ms or 0.0) - (evaluation.time_ms or 0.0))

    return sorted(counts, key=gain_ms)


def _decision(graph: CapturedGraph, winners: Mapping[str, Record], vetoed: frozenset[str], final: Paired) -> GraphDecision:
    keys = sorted({task.key for task in graph.tasks} & set(winners))
    stay, leave = ([winners[key] for key in keys if (key in vetoed) == out] for out in (False, True))
    return GraphDecision(
        graph.key, _digests(stay), _digests(leave), final.first_ms, final.second_ms, final.noise,
    )  # fmt: skip


def _digests(records: Sequence[Record]) -> tuple[tuple[str, str], ...]:
    return tuple(sorted((record.task.key, record_digest(record)) for record in records))
