"""Input data for a task: named distributions, made for the roles that the program gives its inputs.

Data is deterministic in (seed, distribution, input name, device type). Inputs that must agree with others (a backward's mean and
rstd, a softmax output, pooling indices, an attention's logsumexp) are computed from them by the program's own forward operator.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable

import torch

from torch_llmkernels.evaluate.buffers import dtype_of
from torch_llmkernels.evaluate.roles import Role, calm_inputs, has_dependent_inputs, make_consistent, roles
from torch_llmkernels.program import module_of
from torch_llmkernels.task import FLOATS, Task, TensorSpec

MEAN_OF_OFFSET = {torch.float64: 1e6, torch.float32: 1e3, torch.float16: 32.0, torch.bfloat16: 8.0}
"""Means for `offset` (spread 1): they cost E[x^2] - E[x]^2 most of the format's digits and leave a two-pass variance its own."""
WIDE_EXPONENT = {torch.float64: 40, torch.float32: 16, torch.float16: 4, torch.bfloat16: 16}
"""Exponents of `wide` are uniform in [-e, e]; sums of products stay finite."""
SPECIALS = (float("nan"), float("inf"), float("-inf"))


def _normal(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return torch.randn(shape, generator=g, device=g.device, dtype=torch.float64 if dtype is torch.float64 else torch.float32)


def _uniform(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=g, device=g.device, dtype=torch.float64 if dtype is torch.float64 else torch.float32)


def _relu(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return _normal(shape, dtype, g).clamp_(min=0)


def _wide(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    exponents = (_uniform(shape, dtype, g) * 2 - 1) * WIDE_EXPONENT[dtype]
    return _normal(shape, dtype, g).mul_(torch.exp2(exponents))


def _offset(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return _normal(shape, dtype, g).add_(MEAN_OF_OFFSET[dtype])


def _outliers(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    values = _normal(shape, dtype, g)
    return torch.where(_uniform(shape, dtype, g) < 1 / 256, values * 64, values)


def _zeros(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return torch.zeros(shape, device=g.device)


def _denormals(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Magnitudes from the smallest subnormal to 2^6 times the smallest normal."""
    info = torch.finfo(dtype)
    low, high = torch.tensor([info.smallest_normal * info.eps, info.smallest_normal * 64], dtype=torch.float64).log2().tolist()
    exponents = low + (high - low) * _uniform(shape, torch.float64, g)
    return torch.exp2(exponents) * torch.where(_uniform(shape, dtype, g) < 0.5, -1.0, 1.0)


Generate = Callable[[list[int], torch.dtype, torch.Generator], torch.Tensor]

DISTRIBUTIONS: tuple[tuple[str, Generate], ...] = (
    ("normal", _normal),
    ("offset", _offset),
    ("wide", _wide),
    ("planted", _normal),  # NaN, +Inf, -Inf at random places
    ("uniform", _uniform),
    ("relu", _relu),
    ("outliers", _outliers),
    ("zeros", _zeros),
    ("denormals", _denormals),
)
QUICK = ("normal", "offset", "wide", "planted")
"""The distributions of the quick tier; the full tier takes all. `offset` and `planted` go to one input at a time, the others
stay normal: a large mean in two factors at once leaves no digit to compare."""

_WEIGHTS = ("weight", "bias", "gamma", "beta", "scale")


class InputGenerator:
    """Makes values for the inputs of one static task.

    Args:
        task: Static: `task.at(symbols)`.
        device: Default: the task's.
    """

    def __init__(self, task: Task, device: torch.device | str | None = None) -> None:
        self._task = task
        self._device = torch.device(device or task.device)
        self._module = module_of(task)
        self._roles = roles(self._module, task)
        self._calm = calm_inputs(self._module, task)
        self._floats = [t.name for t in task.inputs if t.dtype in FLOATS]
        self._plantable = [name for name in self._floats if not (_pads(task) and name == "weight")]
        self._depends = has_dependent_inputs(task)

    def make(self, distribution: str, seed: int) -> list[torch.Tensor]:
        """Values in input order, each of its spec's shape and dtype (the layout is the buffer's business).

        Args:
            distribution: A name in `DISTRIBUTIONS`.
            seed: Any int.
        """
        primary = _primary(self._plantable if distribution == "planted" else self._floats, distribution, seed)
        if distribution != "planted":
            primary -= self._calm
        values = []
        for spec in self._task.inputs:
            g = torch.Generator(self._device).manual_seed(zlib.crc32(f"{seed}/{distribution}/{spec.name}".encode()))
            mine = distribution if spec.name in primary else "normal"
            values.append(_value(spec, mine, self._roles.get(spec.name), g))
        return make_consistent(self._module, values) if self._depends else values


def _pads(task: Task) -> bool:
    """Whether a convolution of the task pads.

    Infinity in its weights would meet the zeros of the padding or not, by the algorithm that eager chooses for the shape: some
    skip padded taps, others multiply them. There is no answer that a kernel could be held to.
    """
    padding = task.param.get("padding")
    padded = any(padding) if isinstance(padding, tuple) else bool(padding)
    return padded and any(".convolution." in node.op for node in task.program)


def _primary(floats: list[str], distribution: str, seed: int) -> set[str]:
    """The inputs that follow the distribution: data, not weights; one of them for `offset`; each in turn for `planted`."""
    data = [name for name in floats if not name.endswith(_WEIGHTS)] or floats
    if distribution == "planted":
        return {floats[seed % len(floats)]} if floats else set()
    if distribution != "offset":
        return set(data)
    named = [name for name in data if name in ("x", "input")]
    return set((named or data)[:1])


def _value(spec: TensorSpec, distribution: str, role: Role | None, g: torch.Generator) -> torch.Tensor:
    shape, dtype = [int(d) for d in spec.shape], dtype_of(spec)
    if role is not None:
        return role(shape, dtype, g).to(dtype)
    if not dtype.is_floating_point:
        return torch.randint(2 if dtype is torch.bool else 8, shape, generator=g, device=g.device).to(dtype)
    values = dict(DISTRIBUTIONS)[distribution](shape, dtype, g)
    if distribution == "planted" and values.numel():
        places = torch.randint(values.numel(), (min(3, values.numel()),), generator=g, device=g.device)
        values.view(-1)[places] = torch.tensor(SPECIALS[: len(places)], device=g.device, dtype=values.dtype)
    return values.to(dtype)
