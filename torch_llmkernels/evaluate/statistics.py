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
FEWEST_GROUPS = 32
"""Groups from which a scatter can be estimated; fewer are taken to share one error each."""
FEWEST_MEMBERS = 8
"""Finite elements from which a row's or column's size can be told."""
INTEGER_SLACK = 4
"""Indices that rounding moved between near-equal values: a count that is Poisson around one stays below it."""
PERCENTILE = 0.999
SAMPLE = 1 << 22
"""Elements that the percentile is taken over; larger outputs are sampled at regular steps."""
FEW = 1 << 14
"""Elements from which a threshold below the percentile is guessed."""
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
        self._independence = Independence()
        self.worst = Worst()

    def add(self, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, scale: torch.Tensor, seed: int) -> None:
        """Add one run: the candidate's output, eager's, the float64 reference, and the size of the problem at each element.

        Elements that are not finite in any of them are left out; the check compares their pattern by itself.
        """
        finite = None if all_finite(got, eager, truth) else finite_mask(got) & finite_mask(eager) & finite_mask(truth)
        scale = scale if finite is None else torch.where(finite, scale, 0.0)
        for side, value in enumerate((got, eager)):  # one after the other: an output may fill a tenth of the device
            error = torch.sub(value, truth)  # in float64, as the truth is
            error = error if finite is None else torch.where(finite, error, 0.0)
            self._square[side] += _finite(_squares(error))
            if side == 1:
                self._independence.add(error, scale)
            scaled = _scaled(error, scale, self._subnormal)
            del error
            self._tails[side].append(_percentile(scaled))
            self._maxima[side] = max(self._maxima[side], _finite(float(scaled.max())) if truth.numel() else 0.0)
            if side == 0:
                self._note_worst(scaled, got, eager, truth, seed)
            del scaled
        self._reference += _finite(_squares(truth if finite is None else torch.where(finite, truth, 0.0)))
        self._count += truth.numel() if finite is None else int(finite.sum())

    def _note_worst(self, scaled: torch.Tensor, got: torch.Tensor, eager: torch.Tensor, truth: torch.Tensor, seed: int) -> None:
        if not scaled.numel():
            return
        place = int(scaled.argmax())
        if float(scaled.reshape(-1)[place]) > self.worst.scaled:
            index = unravel(place, truth.shape)
            text = f"worst at {self.output}{list(index)}, seed {seed}: got {got[index].item():.9g}, expected "
            text += f"{truth[index].item():.9g} (eager: {eager[index].item():.9g})"
            self.worst = Worst(float(scaled.reshape(-1)[place]), text)

    def chance(self) -> float:
        """The factor that chance allows on a ratio of errors: 1 for many independent errors."""
        return math.exp(CONFIDENCE / math.sqrt(self._independence.count()))

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
            index = unravel(int(wrong.reshape(-1).int().argmax()), truth.shape)
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


class Independence:
    """How many independent errors a sample amounts to, from the scatter of their energy.

    Fewer than its elements where a few large ones carry the norm, and where elements share an error, as those of a row share its
    mean's. Both show in groups of elements (rows, columns, channels, single elements): the energy E of a group, a sum of m
    squares, has a squared coefficient of variation of 2 / m if its normal errors are independent, and of 2 if they share one. So
    G groups with coefficient c amount to 2 G / c^2 independent errors; the grouping that gives the fewest counts.
    """

    def __init__(self) -> None:
        self._groups: dict[int, list[float]] = {}  # grouping -> [number of groups, sum of E, sum of E^2]
        self._weights = [0.0, 0.0]

    def add(self, error: torch.Tensor, scale: torch.Tensor) -> None:
        """Add the yardstick's errors of one run, and the size that each is expected to be proportional to."""
        square = error.square()
        for grouping, dims in enumerate(_groupings(list(error.shape))):
            energy = square.sum(dims) if dims else square
            sums = self._groups.setdefault(grouping, [0.0, 0.0, 0.0])
            for i, value in enumerate((energy.numel(), float(energy.sum()), _squares(energy))):
                sums[i] += value
        weight = (scale if all_finite(error) else torch.where(finite_mask(error), scale, 0.0)).square()
        self._weights[0] += float(weight.sum())
        self._weights[1] += _squares(weight)

    def count(self) -> float:
        """The number of independent errors, at least 1."""
        fewest = self._weights[0] * _ratio(self._weights[0], self._weights[1])
        for groups, total, squares in self._groups.values():
            scatter = groups * _ratio(_ratio(squares, total), total) - 1
            enough = groups >= FEWEST_GROUPS and math.isfinite(scatter)
            fewest = min(fewest, groups if not enough else 2 * groups / scatter if scatter > 0 else math.inf)
        return max(1.0, fewest) if fewest == fewest else 1.0


def _ratio(a: float, b: float) -> float:
    return a / b if b > 0 else math.inf


def _groupings(shape: list[int]) -> list[list[int]]:
    """Dimensions summed over: none, the last, all but the last, all but the first; of images also all but the channel, and the
    plane. Dimensions of size 1 and groupings into a single group say nothing."""
    used = [d for d, n in enumerate(shape) if n > 1]
    found = [[], used[-1:], used[:-1], used[1:], [d for d in used if d != 1], [d for d in used if d > 1]]
    unique = [g for i, g in enumerate(found) if g not in found[:i] and (not g or len(g) < len(used))]
    return unique


def problem_scale(truth: torch.Tensor, magnitude: torch.Tensor | None, exponential: bool) -> torch.Tensor:
    """The size that errors of each element are measured by.

    - Never less than the element itself.
    - Never less than how far it moves with its operands (`reference.condition`); for products that is the sum of |a||b|
      (`reference.magnitude`): rounding acts on the terms, not on what is left after they cancel.
    - For results of an exponential |y| (1 + |ln |y||), its condition: small probabilities keep their digits.
    - Else the root mean square of the element's row or column, the smaller: what cancels in a row has errors of the row's size.
      Of a vector, which may be the statistics of rows, the root mean square of all.
    """
    size = truth.abs() if all_finite(truth) else truth.abs().nan_to_num(0.0, 0.0, 0.0)
    if exponential:
        return size.clamp(min=torch.finfo(torch.float64).tiny).log_().abs_().add_(1).mul_(size)
    typical = _typical(size, finite_mask(truth))
    size = torch.maximum(size, typical)
    return size if magnitude is None else torch.maximum(size, magnitude.abs().nan_to_num(0.0, 0.0, 0.0))


def _typical(size: torch.Tensor, finite: torch.Tensor) -> torch.Tensor:
    """Root mean square of each element's row or column, the smaller; of all elements where those are too short to tell."""
    square = size.square()
    used = [d for d, n in enumerate(size.shape) if n > 1]
    means = []
    for dims in (used[-1:], used[:-1]) if len(used) > 1 else ():
        count = finite.sum(dims, keepdim=True)
        mean = square.sum(dims, keepdim=True) / count
        means.append(torch.where(count >= FEWEST_MEMBERS, mean, math.inf))
    overall = square.sum() / finite.sum().clamp(min=1)
    if not means:
        return overall.sqrt().expand(size.shape)
    if not any(all_finite(mean) for mean in means):  # somewhere both may be missing
        typical = torch.minimum(*means)
        return torch.where(typical.isinf(), overall, typical).sqrt()
    return torch.minimum(*(mean.sqrt() for mean in means))


def unravel(place: int, shape: torch.Size) -> tuple[int, ...]:
    """The index of the `place`-th element in row-major order."""
    index: list[int] = []
    for size in reversed(shape):
        place, rest = divmod(place, size)
        index.append(rest)
    return tuple(reversed(index))


def all_finite(*tensors: torch.Tensor) -> bool:
    """Whether no element is NaN or infinite, by one pass each; False also where a sum overflows, so only True says something."""
    return all(math.isfinite(float(t.sum(dtype=torch.promote_types(t.dtype, torch.float32)))) for t in tensors)


def finite_mask(tensor: torch.Tensor) -> torch.Tensor:
    """`isfinite` in half its time on the CPU: a difference of an element with itself is 0, or NaN."""
    return (tensor - tensor) == 0


def _squares(tensor: torch.Tensor) -> float:
    flat = tensor.reshape(-1)
    return float(torch.dot(flat, flat))


def _scaled(error: torch.Tensor, scale: torch.Tensor, subnormal: float) -> torch.Tensor:
    beyond = error.abs().sub_(subnormal).clamp_(min=0)
    if scale.numel() and float(scale.min()) > 0:
        return beyond.div_(scale)
    return torch.where(beyond == 0, 0.0, beyond / scale)


def _percentile(scaled: torch.Tensor) -> float:
    flat = scaled.reshape(-1)
    if not flat.numel():
        return 0.0
    flat = flat[:: max(1, flat.numel() // SAMPLE)]
    rank = max(1, math.floor(PERCENTILE * flat.numel()))
    largest = _largest(flat, flat.numel() - rank + 1)
    return _finite(float(flat.kthvalue(rank).values if largest is None else largest.min()))


def _largest(flat: torch.Tensor, count: int) -> torch.Tensor | None:
    """The `count` largest elements, looked for above the 99th percentile of a few of them; None if they are not (or NaN is)."""
    few = flat[:: max(1, flat.numel() // FEW)]
    above = flat[flat > few.kthvalue(max(1, math.floor(0.99 * few.numel()))).values]
    if above.numel() < count or not all_finite(flat):
        return None
    return above.topk(count, sorted=False).values


def _finite(value: float) -> float:
    return min(value, LARGEST) if value == value else LARGEST


def _mean(values: list[float]) -> float:
    return _finite(sum(v / len(values) for v in values)) if values else 0.0


def _over(value: float, bound: float) -> float:
    if value <= bound:
        return value / bound if bound else 0.0
    return _finite(value / bound) if bound else LARGEST
