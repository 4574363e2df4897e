"""How far a candidate is from the truth, next to how far eager is: the bounds of acceptance and the statistics they bound.

A candidate passes on an output and a distribution when, over all seeds,

- its Frobenius error is at most `FROBENIUS_RATIO` times the yardstick's (`TAIL_RATIO` where the problem amplifies rounding),
- the 99.9th percentile and the maximum of its scaled error are at most `TAIL_RATIO` times the yardstick's,

where an error below one unit in the last place of the output (and below the smallest subnormal) always passes. Both sides are
samples: two equally good kernels differ by chance, the more the fewer independent errors there are. The ratios are therefore
widened by exp(CONFIDENCE / sqrt(independent errors)), and the check draws more seeds for as long as chance could decide.
"""

from __future__ import annotations

import dataclasses
import math

import torch

from torch_llmkernels.evaluation import ErrorStat

FROBENIUS_RATIO = 1.1
"""Ten per cent: more than the order of summation costs at random, less than one bit of any operand."""
TAIL_RATIO = 2.0
"""One bit: the largest of many rounding errors moves by tens of per cent between equal kernels, never twofold."""
CONFIDENCE = 5.0
"""Standard deviations of the logarithm of a ratio of two sample deviations (1 / sqrt(n) each): an equal kernel exceeds five of
them once in three million comparisons, so that the some fifty comparisons of a full check fail less than once in ten thousand."""
AMPLIFIED_ULPS = 32
"""A yardstick that is further off, in a program without products, shows a problem that amplifies single roundings, such as that
of a large mean; which of several equally good orders of summation rounds it luckily is a chance that whole rows share."""
LOST_DIGITS = 2.0**-4
"""A yardstick with a larger relative error has hardly a digit left to compare."""
INTEGER_SLACK = 4
"""Indices that rounding moved between near-equal values: a count that is Poisson around one stays below it."""
PERCENTILE = 0.999
SAMPLE = 1 << 22
"""Elements that the percentile is taken over; larger outputs are sampled at regular steps."""
LARGEST = 1e308


@dataclasses.dataclass
class Worst:
    """The element with the largest scaled error so far."""

    scaled: float = -1.0
    text: str = ""


class ErrorSums:
    """Errors of one output under one distribution, added up over seeds.

    Args:
        output: Name of the output.
        distribution: Name of the distribution.
        dtype: The output's.
        products: Whether the program is one of products, whose yardstick's errors grow with their length.
    """

    def __init__(self, output: str, distribution: str, dtype: torch.dtype, products: bool = False) -> None:
        self.output, self.distribution, self.dtype = output, distribution, dtype
        info = torch.finfo(dtype)
        self._ulp, self._subnormal = info.eps, info.smallest_normal * info.eps
        self._amplified = LOST_DIGITS if products else AMPLIFIED_ULPS * info.eps
        self._square = [0.0, 0.0]
        self._tails: list[list[float]] = [[], []]
        self._maxima = [0.0, 0.0]
        self._reference = 0.0
        self._count = 0
        self._independent = 0.0
        self.worst = Worst()

    def add(self, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, seed: int) -> None:
        """Add one run: the candidate's output, eager's, the float64 reference, and the size of the problem at each element.

        Elements that are not finite in any of them are left out; the check compares their pattern by itself.
        """
        finite = got.isfinite() & eager.isfinite() & truth.isfinite()
        errors = [torch.where(finite, t.double() - truth, 0.0) for t in (got, eager)]
        scaled = [_scaled(e, scale, self._subnormal) for e in errors]
        for side in (0, 1):
            self._square[side] += _finite(float(errors[side].square().sum()))
            self._tails[side].append(_percentile(scaled[side]))
            self._maxima[side] = max(self._maxima[side], _finite(float(scaled[side].max())) if truth.numel() else 0.0)
        self._reference += _finite(float(torch.where(finite, truth, 0.0).square().sum()))
        self._count += truth.numel()
        self._independent += independent_errors(errors[1])
        self._note_worst(scaled[0], got, eager, truth, seed)

    def _note_worst(self, scaled: torch.Tensor, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, seed: int) -> None:
        if not scaled.numel():
            return
        place = int(scaled.argmax())
        if float(scaled.view(-1)[place]) > self.worst.scaled:
            index = unravel(place, truth.shape)
            text = f"worst at {self.output}{list(index)}, seed {seed}: got {got[index].item():.9g}, expected "
            text += f"{truth[index].item():.9g} (eager: {eager[index].item():.9g})"
            self.worst = Worst(float(scaled.view(-1)[place]), text)

    def chance(self) -> float:
        """The factor that chance allows on a ratio of errors: 1 for many independent errors."""
        return math.exp(CONFIDENCE / math.sqrt(max(self._independent, 1.0)))

    def ratio(self) -> float:
        """The candidate's errors over what the bounds allow before chance: at most 1 is a pass whatever the sample."""
        norms = [math.sqrt(s) for s in self._square]
        reference = math.sqrt(self._reference)
        bound = TAIL_RATIO if norms[1] > min(self._amplified, LOST_DIGITS) * reference else FROBENIUS_RATIO
        floor = self._ulp * reference + self._subnormal * math.sqrt(self._count)
        tails = [_mean(t) for t in self._tails]
        return max(
            _over(norms[0], max(bound * norms[1], floor)),
            _over(tails[0], max(TAIL_RATIO * tails[1], self._ulp)),
            _over(self._maxima[0], max(TAIL_RATIO * self._maxima[1], self._ulp)),
        )

    def stat(self, passed: bool) -> ErrorStat:
        """The record of these errors. A relative Frobenius error of an all-zero reference is the absolute one."""
        reference = math.sqrt(self._reference) or 1.0
        frobenius = [_finite(math.sqrt(s) / reference) for s in self._square]
        tails = [_mean(t) for t in self._tails]
        return ErrorStat(self.output, self.distribution, *frobenius, *tails, *self._maxima, passed)


class MismatchCount:
    """Integer and boolean outputs: how many elements differ from the reference, beside how many of eager's do.

    The fields of its `ErrorStat` are the fractions of elements that differ.
    """

    def __init__(self, output: str, distribution: str) -> None:
        self.output, self.distribution = output, distribution
        self._wrong = [0, 0]
        self._count = 0
        self._allowed = 0
        self.worst = Worst()

    def add(self, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, rounds: bool, seed: int) -> None:
        """Add one run; `rounds` says whether rounding could move eager's own answer at all."""
        wrong = got != truth
        self._wrong[0] += int(wrong.sum())
        self._wrong[1] += int((eager != truth).sum())
        self._count += truth.numel()
        self._allowed += min(INTEGER_SLACK, truth.numel() // 1000) if rounds else 0
        if bool(wrong.any()) and not self.worst.text:
            index = unravel(int(wrong.view(-1).int().argmax()), truth.shape)
            text = f"first at {self.output}{list(index)}, seed {seed}: got {got[index].item()}, expected {truth[index].item()}"
            self.worst = Worst(1.0, text)

    def chance(self) -> float:
        """Integers leave nothing to chance beyond `INTEGER_SLACK`."""
        return 1.0

    def ratio(self) -> float:
        """Mismatches over what is allowed."""
        return _over(self._wrong[0], 2 * self._wrong[1] + self._allowed)

    def stat(self, passed: bool) -> ErrorStat:
        """The record of these mismatches."""
        mine, yardstick = (w / max(self._count, 1) for w in self._wrong)
        return ErrorStat(self.output, self.distribution, mine, yardstick, mine, yardstick, mine, yardstick, passed)


def independent_errors(error: torch.Tensor) -> float:
    """How many independent errors a tensor of errors amounts to.

    Two things make it fewer than its elements: a few large ones that carry the norm (participation ratio, 3 * (sum e^2)^2 /
    sum e^4, the 3 for normal errors), and errors shared along a dimension, as of a row's mean (Kish's design effect,
    1 + (group size - 1) * intraclass correlation), of which the worst grouping counts.
    """
    if not error.numel():
        return 0.0
    scale = float(error.abs().max())
    if scale == 0.0:
        return float(error.numel())
    e = error / scale
    square = float(e.square().mean())
    participating = min(1.0, 3 * square**2 / float(e.square().square().mean()))
    return max(1.0, error.numel() * participating / max(_design_effect(e, square, dims) for dims in _groupings(e.ndim)))


def _groupings(ndim: int) -> list[list[int]]:
    """Dimensions reduced over: groups are rows, columns, and for images channels, samples and their pairs."""
    if ndim < 2:
        return [[]]
    last, every = ndim - 1, list(range(ndim))
    groupings = [[last], every[:-1], every[1:]]
    if ndim > 2:
        groupings += [[d for d in every if d != 1], every[2:]]
    return groupings


def _design_effect(e: torch.Tensor, square: float, dims: list[int]) -> float:
    size = math.prod(e.shape[d] for d in dims)
    if size < 2:
        return 1.0
    between = float(e.mean(dims).square().mean())
    groups = e.numel() / size
    # a mean of independent errors has variance square / size; with few groups that estimate scatters by itself
    excess = between - square / size * (1 + 3 * math.sqrt(2 / groups))
    correlation = min(1.0, max(0.0, excess / (square * (1 - 1 / size))))
    return 1 + (size - 1) * correlation


def problem_scale(truth: torch.Tensor, magnitude: torch.Tensor | None, exponential: bool) -> torch.Tensor:
    """The size that errors of each element are measured by.

    - Never less than the element itself.
    - For products the sum of |a||b| (`magnitude`): rounding acts on the terms, not on what is left after they cancel.
    - For results of an exponential |y| (1 + |ln |y||), its condition: small probabilities keep their digits.
    - Else the root mean square of the element's row or column, the smaller: what cancels in a row has errors of the row's size.
    """
    size = truth.abs().nan_to_num(0.0, 0.0, 0.0)
    if exponential:
        return size * (1 + size.clamp(min=torch.finfo(torch.float64).tiny).log().abs())
    if truth.ndim >= 2:
        square = size.square()
        rows, columns = square.mean(-1, keepdim=True), square.mean(list(range(truth.ndim - 1)), keepdim=True)
        typical = torch.minimum(rows, columns).sqrt()
    else:
        typical = size.square().mean().sqrt()
    size = torch.maximum(size, typical)
    return size if magnitude is None else torch.maximum(size, magnitude.abs().nan_to_num(0.0, 0.0, 0.0))


def unravel(place: int, shape: torch.Size) -> tuple[int, ...]:
    """The index of the `place`-th element in row-major order."""
    index: list[int] = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.append(rest)
    return tuple(reversed(index))


def _scaled(error: torch.Tensor, scale: torch.Tensor, subnormal: float) -> torch.Tensor:
    beyond = (error.abs() - subnormal).clamp_(min=0)
    return torch.where(beyond == 0, 0.0, beyond / scale)


def _percentile(scaled: torch.Tensor) -> float:
    flat = scaled.reshape(-1)
    if not flat.numel():
        return 0.0
    flat = flat[:: max(1, flat.numel() // SAMPLE)]
    return _finite(float(flat.kthvalue(max(1, math.floor(PERCENTILE * flat.numel()))).values))


def _finite(value: float) -> float:
    return min(value, LARGEST) if value == value else LARGEST


def _mean(values: list[float]) -> float:
    return _finite(sum(v / len(values) for v in values)) if values else 0.0


def _over(value: float, bound: float) -> float:
    if value <= bound:
        return value / bound if bound else 0.0
    return _finite(value / bound) if bound else LARGEST
