"""Whether a candidate computes its task: values, non-finite patterns, memory it may touch, and that it depends on nothing else.

The candidate is called as the runtime calls it, `run(*outputs, *workspaces, *inputs, *symbol_values)`. Its buffers stay the same
while the data in them changes, so an answer kept by address is stale; outputs and workspaces are filled with one byte before the
first run and with another before the second, so an element that nobody wrote, or a workspace that nobody cleared, shows.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

from torch_llmkernels.errors import NotApplicable
from torch_llmkernels.evaluate.buffers import FINITE_BYTE, NAN_BYTE, GuardedTensor, dtype_of
from torch_llmkernels.evaluate.inputs import DISTRIBUTIONS, QUICK, InputGenerator
from torch_llmkernels.evaluate.reference import condition, has_products, magnitude, reference, yardstick
from torch_llmkernels.evaluate.statistics import ErrorSums, MismatchCount, all_finite, finite_mask, problem_scale, unravel
from torch_llmkernels.evaluation import ErrorStat
from torch_llmkernels.task import Node, Task, TensorSpec

Run = Callable[..., None]
Workspaces = Callable[[Task], Sequence[TensorSpec]]
"""The workspaces a kernel wants for a static task, in argument order, with int shapes."""


@dataclasses.dataclass(frozen=True)
class Effort:
    """How much a tier checks.

    Attributes:
        distributions: Their names.
        seeds: Data sets per distribution.
        most_seeds: Data sets where chance could still decide.
    """

    distributions: tuple[str, ...]
    seeds: int
    most_seeds: int


EFFORTS = {
    "probe": Effort(("normal",), 1, 1),  # before a sweep times one set of constants
    "again": Effort(("normal", "planted"), 1, 2),  # after timing
    "quick": Effort(QUICK, 2, 16),
    "full": Effort(tuple(name for name, _ in DISTRIBUTIONS), 4, 48),
}

GROSS = 4.0
"""A ratio this far beyond what chance allows is believed at once; anything nearer is confirmed on all seeds, because looking at
a verdict after every seed would make chance's threshold be crossed more often than once."""
ENOUGH_ELEMENTS = 1 << 26
"""Elements of the smallest output, over all seeds, after which no more are drawn: large samples are decided, and slow."""

LONG_SUM_ROUNDING = 2e-4
"""What two float32 orders of a sum of a few thousand terms of size one may differ by, where only eager can be compared."""

Outcome = tuple[tuple[ErrorStat, ...], str | None]


@torch.no_grad()
def check(
    task: Task, run: Run, tier: str = "quick", *, workspaces: Workspaces | None = None, alignment: int = 16, seed: int = 0,
    answers: Answers | None = None,
) -> Outcome:  # fmt: skip
    """Check a candidate on the task's device; dynamic tasks also at other sizes than the hints.

    Args:
        task: What it should compute.
        run: The candidate; any exception it raises is passed on, except `NotApplicable` at sizes other than the hints.
        tier: A key of `EFFORTS`.
        workspaces: What the candidate wants beside inputs and outputs.
        alignment: Bytes that every tensor's address is a multiple of, and no more.
        seed: Different seeds give different data.
        answers: Kept over several checks of one task, spares computing the last data set's answers again.

    Returns:
        One `ErrorStat` per output and distribution (up to the failure), and what failed, or None.
    """
    errors: list[ErrorStat] = []
    for symbols in symbol_values(task, tier):
        bench = _Bench(task, symbols, run, workspaces, alignment, answers or Answers())
        at_hints = symbols == dict(task.symbols)
        try:
            found, failure = bench.check(EFFORTS[tier], seed)
        except NotApplicable:
            if at_hints:
                raise
            continue
        errors += found
        if failure:
            return tuple(errors), failure
    return tuple(errors), None


def symbol_values(task: Task, tier: str) -> Iterator[dict[str, int]]:
    """The sizes a dynamic task is checked at: the hints, then 2 * hint + 1, 1 and 3; a static task has one, empty."""
    hints = dict(task.symbols)
    yield hints
    if task.is_dynamic and tier in ("quick", "full"):
        for others in ({k: 2 * v + 1 for k, v in hints.items()}, dict.fromkeys(hints, 1), dict.fromkeys(hints, 3)):
            if others != hints and _runs(task.at(others)):
                yield others


def _runs(task: Task) -> bool:
    """Whether the program accepts these sizes (a view of a fixed size may not)."""
    try:
        yardstick(task, InputGenerator(task).make("normal", 0))
    except (RuntimeError, IndexError, ValueError):
        return False
    return True


@dataclasses.dataclass
class _Expected:
    """What one data set should give."""

    truth: list[torch.Tensor]
    eager: list[torch.Tensor]
    scale: list[torch.Tensor | None]
    rounds: bool


class Answers:
    """The last data set of a task and what it should give: constants are probed one after the other on the same data."""

    def __init__(self) -> None:
        self._key: tuple[Any, ...] = ()
        self._kept: tuple[list[torch.Tensor], _Expected] | None = None

    def get(
        self, key: tuple[Any, ...], make: Callable[[], tuple[list[torch.Tensor], _Expected]]
    ) -> tuple[list[torch.Tensor], _Expected]:
        """Inputs and answers for (task, distribution, seed), made if they are not the last ones."""
        if self._kept is None or key != self._key:
            self._kept = None  # before the new ones take memory
            self._key, self._kept = key, make()
        return self._kept


class _Bench:
    """One task at one size: its buffers, and the candidate that runs on them."""

    def __init__(
        self, task: Task, symbols: dict[str, int], run: Run, workspaces: Workspaces | None, alignment: int, answers: Answers
    ) -> None:
        self.task, self._answers = task.at(symbols), answers
        self._run = run
        self._values = [symbols[name] for name, _ in task.symbols]
        self._where = f" at {', '.join(f'{k}={v}' for k, v in symbols.items())}" if symbols != dict(task.symbols) else ""
        self._generator = InputGenerator(self.task)
        self._elements = min(math.prod(int(d) for d in t.shape) for t in self.task.outputs)
        self._order_decides = any("norm" in _operator(node) or "var" in _operator(node) for node in self.task.program)
        self._exponential = exponential_outputs(self.task)
        self._inputs = [GuardedTensor(t, task.device, alignment) for t in self.task.inputs]
        self._outputs = [GuardedTensor(t, task.device, alignment) for t in self.task.outputs]
        scratch = workspaces(self.task) if workspaces else ()
        self._workspaces = [GuardedTensor(t, task.device, alignment) for t in scratch]

    def check(self, effort: Effort, seed: int) -> Outcome:
        errors: list[ErrorStat] = []
        for distribution in effort.distributions:
            sums = [self._sums(t, distribution + self._where) for t in self.task.outputs]
            for number in range(effort.most_seeds):
                failure = self._one(distribution, seed * 1000 + number, sums)
                if failure:
                    return (*errors, *(s.stat(passed=False) for s in sums)), failure
                drawn = number + 1
                if drawn >= effort.seeds and (all(_decided(s) for s in sums) or drawn * self._elements > ENOUGH_ELEMENTS):
                    break
            errors += [s.stat(passed=s.ratio() <= s.chance()) for s in sums]
            bad = next((s for s in sums if s.ratio() > s.chance()), None)
            if bad:
                return tuple(errors), _too_far(bad)
        return tuple(errors), None

    def _sums(self, spec: TensorSpec, distribution: str) -> ErrorSums | MismatchCount:
        dtype = dtype_of(spec)
        if not dtype.is_floating_point:
            return MismatchCount(spec.name, distribution)
        return ErrorSums(spec.name, distribution, dtype, products=has_products(self.task))

    def _one(self, distribution: str, seed: int, sums: list[ErrorSums | MismatchCount]) -> str | None:
        """Two runs on one data set; what failed, or None."""
        values, expected = self._answers.get((self.task.key, distribution, seed), lambda: self._data_set(distribution, seed))
        for buffer, value in zip(self._inputs, values, strict=True):
            buffer.load(value)
        before = [b.storage.clone() for b in self._inputs]
        kept: list[list[torch.Tensor]] = []
        for byte in (NAN_BYTE, FINITE_BYTE):
            failure = self._call(byte) or self._touched(before) or self._compare(expected)
            if failure:
                return f"distribution {distribution}{self._where}, seed {seed}: {failure}"
            kept.append([b.tensor.clone() for b in self._outputs])
        repeated = all(torch.equal(bits(a), bits(b)) for a, b in zip(*kept, strict=True))
        if self.task.numerics.deterministic and not repeated:
            return f"distribution {distribution}{self._where}, seed {seed}: {_first_difference(self.task, *kept)}"
        for outputs in kept[: 1 if repeated else 2]:
            for total, got, *rest in zip(sums, outputs, expected.eager, expected.truth, expected.scale, strict=True):
                total.add(got, *rest[:2], rest[2] if isinstance(total, ErrorSums) else expected.rounds, seed)
        return None

    def _data_set(self, distribution: str, seed: int) -> tuple[list[torch.Tensor], _Expected]:
        values = self._generator.make(distribution, seed)
        for buffer, value in zip(self._inputs, values, strict=True):
            buffer.load(value)
        return values, self._expected()

    def _expected(self) -> _Expected:
        inputs = [b.tensor for b in self._inputs]
        truth, eager = reference(self.task, inputs), yardstick(self.task, inputs)
        truth = [t.reshape(e.shape) for t, e in zip(truth, eager, strict=True)]
        sizes = magnitude(self.task, inputs) or condition(self.task, inputs, truth)
        scale = [
            problem_scale(t, m, exponential) if t.is_floating_point() else None
            for t, m, exponential in zip(truth, sizes, self._exponential, strict=True)
        ]
        rounds = any(e.is_floating_point() and not _same(e, t) for e, t in zip(eager, truth, strict=True))
        return _Expected(truth, eager, scale, rounds)

    def _call(self, byte: int) -> str | None:
        for buffer in (*self._outputs, *self._workspaces):
            buffer.poison(byte)
        tensors = [b.tensor for b in (*self._outputs, *self._workspaces, *self._inputs)]
        self._run(*tensors, *self._values)
        synchronize(self.task.device)
        return None

    def _touched(self, before: list[torch.Tensor]) -> str | None:
        for buffer, bytes_before in zip(self._inputs, before, strict=True):
            if not torch.equal(buffer.storage, bytes_before):
                what = buffer.damage() or "its elements changed"
                return f"input {buffer.spec.name} or the memory around it was modified: {what}"
        for buffer in (*self._outputs, *self._workspaces):
            damage = buffer.damage()
            if damage:
                return f"memory around {buffer.spec.name} was modified: {damage}"
        return None

    def _compare(self, expected: _Expected) -> str | None:
        for buffer, truth, eager in zip(self._outputs, expected.truth, expected.eager, strict=True):
            if buffer.tensor.dtype is torch.bool and bool((buffer.tensor.view(torch.uint8) > 1).any()):
                return f"output {buffer.spec.name}: a boolean that is neither 0 nor 1 (was every element written?)"
            if buffer.tensor.is_floating_point():
                failure = non_finite_mismatch(buffer.spec.name, buffer.tensor, eager, truth, self._order_decides)
                if failure:
                    return failure
        return None


def _decided(sums: ErrorSums | MismatchCount) -> bool:
    """Whether more seeds cannot change the verdict: within the bounds, or far beyond what chance could do."""
    return sums.ratio() <= 1.0 or sums.ratio() > GROSS * sums.chance()


def _too_far(sums: ErrorSums | MismatchCount) -> str:
    stat = sums.stat(passed=False)
    if isinstance(sums, MismatchCount):
        return (
            f"output {stat.output}, distribution {stat.distribution}: {stat.frobenius:.3g} of the elements differ from the "
            f"reference (eager: {stat.frobenius_yardstick:.3g}); {sums.worst.text}"
        )
    return (
        f"output {stat.output}, distribution {stat.distribution}: {sums.ratio():.3g} times the error allowed. Relative Frobenius "
        f"error {stat.frobenius:.3g} (eager {stat.frobenius_yardstick:.3g}), 99.9th percentile {stat.p999:.3g} "
        f"({stat.p999_yardstick:.3g}), maximum {stat.maximum:.3g} ({stat.maximum_yardstick:.3g}); {sums.worst.text}"
    )


def _same_kind(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Where both are NaN, the same infinity, or finite."""
    return (a.isnan() == b.isnan()) & (a.isinf() == b.isinf()) & (~a.isinf() | (a == b))


def non_finite_mismatch(
    name: str, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, order_decides: bool = False
) -> str | None:
    """The first place where NaN or infinity differs from eager's, or None.

    Where eager overflowed an intermediate and the true value is finite, a value near the true one is as good; where eager and the
    formula differ in which non-finite value it is (Winograd's transform of an infinity is NaN), the formula's is. Where eager is
    finite though the formula is not (a fully masked row), the candidate's value must be eager's, to rounding. With
    `order_decides` NaN and infinity are one: a running mean over an infinity is either, by the order of summation.
    """
    eager = eager.to(got.dtype)
    if all_finite(got, eager, truth):
        return None
    usual = truth[truth.isfinite()].abs().mean()  # a sum that cancels is as near as rounding lets values of this size be
    odd = ~(finite_mask(got) & finite_mask(eager) & finite_mask(truth))  # elsewhere nothing can be wrong
    places = odd.reshape(-1).nonzero().reshape(-1)
    shape, (got, eager, truth) = got.shape, (t.reshape(-1)[places] for t in (got, eager, truth))
    same_kind = _same_kind(got, eager)
    close = (got.double() - truth).abs() <= truth.abs() / 32 + LONG_SUM_ROUNDING * usual
    better = got.isfinite() & ~eager.isfinite() & truth.to(got.dtype).isfinite() & close
    better |= ~eager.isfinite() & ~truth.isfinite() & _same_kind(got, truth.to(got.dtype))
    if order_decides:
        better |= ~eager.isfinite() & ~got.isfinite() & ~truth.isfinite()
    rounding = max(8 * torch.finfo(got.dtype).eps, LONG_SUM_ROUNDING)
    near = (got.double() - eager.double()).abs() <= rounding * eager.double().abs().clamp(min=1.0)
    far = same_kind & eager.isfinite() & ~truth.isfinite() & ~near
    wrong = ~(same_kind | better) | far
    if not bool(wrong.any()):
        return None
    first = int(wrong.int().argmax())
    index = unravel(int(places[first]), shape)
    if bool(far[first]):
        return (
            f"output {name}{list(index)}: got {got[first].item():.9g}; the formula has no finite value there, eager gives "
            f"{eager[first].item():.9g}, which must be met to rounding ({int(wrong.sum())} of {math.prod(shape)} elements)"
        )
    unwritten = " (never written, or Inf - Inf, or 0 * Inf?)" if got[first].isnan() and not eager[first].isnan() else ""
    return (
        f"output {name}{list(index)}: got {got[first].item():.9g}{unwritten} where eager gives {eager[first].item():.9g}; "
        f"{int(wrong.sum())} of {math.prod(shape)} elements differ in being NaN or infinite"
    )


def exponential_outputs(task: Task) -> list[bool]:
    """For each output, whether it is the direct result of an exponential, whose small values carry digits of their own."""
    producers = {node.name: node for node in task.program}
    found = []
    for result in task.results:
        node = producers.get(result)
        while node is not None and _operator(node) in ("_to_copy", "clone", "view"):
            first: Any = node.args[0]
            node = producers.get(first["v"]) if isinstance(first, dict) and "v" in first else None
        found.append(node is not None and _operator(node) in ("_softmax", "_safe_softmax", "exp", "sigmoid"))
    return found


def _operator(node: Node) -> str:
    return node.op.split(".")[1] if "." in node.op else node.op


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of a tensor's elements in row-major order."""
    return tensor.contiguous().view(-1).view(torch.uint8)


def synchronize(device: str) -> None:
    """Wait for the device; raises what an asynchronous kernel did wrong."""
    if device == "cuda":
        torch.cuda.synchronize()


def _same(eager: torch.Tensor, truth: torch.Tensor) -> bool:
    return torch.equal(eager.double(), truth) or bool(((eager.double() == truth) | (eager.isnan() & truth.isnan())).all())


def _first_difference(task: Task, first: list[torch.Tensor], second: list[torch.Tensor]) -> str:
    for spec, a, b in zip(task.outputs, first, second, strict=True):
        different = (a != b) & ~((a != a) & (b != b))
        if bool(different.any()):
            index = unravel(int(different.reshape(-1).int().argmax()), a.shape)
            values = f"{a[index].item():.9g}, then {b[index].item():.9g}"
            return f"two runs on the same data differ under deterministic mode: {spec.name}{list(index)} was {values}"
    names = [t.name for t, a, b in zip(task.outputs, first, second, strict=True) if not torch.equal(bits(a), bits(b))]
    return f"two runs on the same data differ bitwise under deterministic mode in {', '.join(itertools.islice(names, 3))}"
