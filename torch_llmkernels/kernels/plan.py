"""A kernel's launches with every number filled in: what a target needs to bind arguments and call.

A static task has one `Plan`; a dynamic one has a plan per tuple of symbol values, which the launchers cache. Nothing here
touches a device or imports torch.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from torch_llmkernels.errors import ExpressionError, NotApplicable
from torch_llmkernels.kernels import launch
from torch_llmkernels.kernels.expression import Expression
from torch_llmkernels.task import ITEMSIZE

if TYPE_CHECKING:
    from torch_llmkernels.kernels.csource import Param
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.kernels.header import Launch, TensorMapSpec
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.task import Task

_RANGES = {
    "bool": (0, 1), "i32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1), "i64": (-(2**63), 2**63 - 1), "u64": (0, 2**64 - 1),
}  # fmt: skip
_GRID_LIMITS = (2**31 - 1, 65535, 65535)
_MAX_BLOCK_Z = 64


@dataclasses.dataclass(frozen=True)
class Argument:
    """One evaluated launch argument.

    Attributes:
        type: As `csource.Param.type`, with `acc` resolved.
        position: For a pointer, its place among the call's tensors (outputs, workspaces, inputs); for a tensor map, its place in
            `Plan.maps`; None for a null pointer and for scalars.
        value: A scalar's value.
    """

    type: str
    position: int | None = None
    value: int | float = 0


@dataclasses.dataclass(frozen=True)
class LaunchPlan:
    """One launch with every number filled in (blocks per grid, threads per block, bytes of dynamic shared memory)."""

    kernel: str
    args: tuple[Argument, ...]
    grid: tuple[int, int, int] = (1, 1, 1)
    block: tuple[int, int, int] = (1, 1, 1)
    smem: int = 0
    cluster: tuple[int, int, int] | None = None
    cooperative: bool = False
    pdl: bool = False


@dataclasses.dataclass(frozen=True)
class MapPlan:
    """A tensor map with every number filled in; `position` is the tensor's place in the call. See `header.TensorMapSpec`."""

    position: int
    dtype: str
    dims: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]
    elem_strides: tuple[int, ...]
    swizzle: str
    l2: str
    oob: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What one call does.

    Attributes:
        tensors: How many tensors a call passes: outputs, workspaces, inputs.
        empty: Every output has zero elements, so there is nothing to launch.
        zero_prepare: (position, bytes) of the workspaces to zero before the prepare launches, which write them.
        zero: The same for the main launches.
        prepare, launches: In order.
        maps: Tensor maps that the launches pass.
    """

    tensors: int
    empty: bool
    zero_prepare: tuple[tuple[int, int], ...]
    zero: tuple[tuple[int, int], ...]
    prepare: tuple[LaunchPlan, ...]
    launches: tuple[LaunchPlan, ...]
    maps: tuple[MapPlan, ...]


def plan_launches(
    kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts, symbols: Mapping[str, int] | None = None
) -> Plan:
    """Evaluate everything a call needs.

    Args:
        kernel, task, constants, facts: What is launched, on what, with which tunables, where.
        symbols: Values of the task's symbols; default: its hints.

    Raises:
        NotApplicable: if a `where` fails, an expression has no value, a value does not fit its parameter, or the launch exceeds
            the device's limits.
    """
    values = dict(task.symbols) if symbols is None else symbols
    if all(0 in spec.at(values).shape for spec in task.outputs):
        return Plan(len(task.outputs) + len(kernel.workspace) + len(task.inputs), True, (), (), (), (), ())
    try:
        names = launch.environment(kernel, task, constants, facts, values)
        launch.check_where(kernel, names)
        return _Planner(kernel, task, facts, names).plan()
    except (ExpressionError, NotApplicable) as error:
        raise NotApplicable(f"{kernel.name}: {error}") from None


class _Planner:
    def __init__(self, kernel: Kernel, task: Task, facts: DeviceFacts, names: Mapping[str, int]) -> None:
        self.kernel, self.task, self.facts, self.names = kernel, task, facts, names
        self.workspaces = launch.workspaces_at(kernel, task, names)
        order = [*(t.name for t in task.outputs), *(w.name for w in self.workspaces), *(t.name for t in task.inputs)]
        self.positions = {name: i for i, name in enumerate(order)}
        self.dtypes = {t.name: t.dtype for t in (*task.inputs, *task.outputs, *self.workspaces)}

    def plan(self) -> Plan:
        kernel = self.kernel
        prepared = {arg for step in kernel.prepare for arg in step.args}
        zero = [(w.name in prepared, (self.positions[w.name], w.nbytes)) for w in self.workspaces if w.zero and w.nbytes]
        return Plan(
            tensors=len(self.positions),
            empty=False,
            zero_prepare=tuple(z for early, z in zero if early),
            zero=tuple(z for early, z in zero if not early),
            prepare=tuple(self.launch(step) for step in kernel.prepare),
            launches=tuple(self.launch(step) for step in kernel.launch),
            maps=tuple(self.map(spec) for spec in kernel.tensor_map),
        )

    def launch(self, step: Launch) -> LaunchPlan:
        args = tuple(self.argument(arg, param) for arg, param in zip(step.args, step.params, strict=True))
        if self.kernel.target == "cpu":
            return LaunchPlan(step.kernel, args)
        grid, block = self.extent(step.grid), self.extent(step.block)
        found = LaunchPlan(
            step.kernel, args, grid, block, step.smem.evaluate(self.names), self.extent(step.cluster) if step.cluster else None,
            step.cooperative, step.pdl,
        )  # fmt: skip
        self.check(found)
        return found

    def extent(self, expressions: Sequence[Expression]) -> tuple[int, int, int]:
        values = [e.evaluate(self.names) for e in expressions]
        x, y, z = (*values, 1, 1, 1)[:3]
        return x, y, z

    def check(self, step: LaunchPlan) -> None:
        """Refuse what the driver would refuse, with the numbers."""
        threads, limit = math.prod(step.block), self.facts.threads
        if min(step.grid) < 1 or any(g > most for g, most in zip(step.grid, _GRID_LIMITS, strict=True)):
            raise NotApplicable(f"{step.kernel}: grid {step.grid} is empty or above {_GRID_LIMITS}")
        if min(step.block) < 1 or threads > limit or step.block[2] > _MAX_BLOCK_Z:
            raise NotApplicable(f"{step.kernel}: block {step.block} is empty or above {limit} threads")
        if not 0 <= step.smem <= self.facts.smem_per_block:
            raise NotApplicable(f"{step.kernel}: {step.smem} bytes of shared memory, the device has {self.facts.smem_per_block}")
        if step.cluster and (min(step.cluster) < 1 or any(g % c for g, c in zip(step.grid, step.cluster, strict=True))):
            raise NotApplicable(f"{step.kernel}: grid {step.grid} is not a multiple of the cluster {step.cluster}")

    def argument(self, arg: str, param: Param) -> Argument:
        if param.type == "pointer":
            return Argument("pointer", self.positions.get(arg))  # None: an optional tensor that the task lacks
        if param.type == "tensor_map":
            return Argument("tensor_map", [m.name for m in self.kernel.tensor_map].index(arg))
        kind = param.type if param.type != "acc" else ("f64" if launch.main_dtype(self.task) == "float64" else "f32")
        if launch.is_float(arg, param, self.task):
            return Argument(kind, value=float(self.task.param[arg]))
        value = Expression(arg).evaluate(self.names)
        if kind in ("f32", "f64"):
            return Argument(kind, value=float(value))
        low, high = _RANGES[kind]
        if not low <= value <= high:
            raise NotApplicable(f"argument {arg} = {value} does not fit the {kind} parameter {param.name}")
        return Argument(kind, value=value)

    def map(self, spec: TensorMapSpec) -> MapPlan:
        if spec.over not in self.positions:
            raise NotApplicable(f"tensor map {spec.name} is over {spec.over}, which the task lacks")
        sizes = [tuple(e.evaluate(self.names) for e in part) for part in (spec.dims, spec.strides, spec.box, spec.elem_strides)]
        dtype = spec.dtype or self.dtypes[spec.over]
        _check_map(spec, dtype, sizes)
        return MapPlan(self.positions[spec.over], dtype, *sizes, spec.swizzle, spec.l2, spec.oob)


def _check_map(spec: TensorMapSpec, dtype: str, sizes: list[tuple[int, ...]]) -> None:
    """The documented limits of `cuTensorMapEncodeTiled`, which itself only answers "invalid value"."""
    dims, strides, box, elem_strides = sizes
    inner = box[0] * ITEMSIZE[dtype]
    for broken, rule in (
        (min(dims) < 1 or max(dims) > 2**32, "each of dims must be 1 to 2**32"),
        (
            any(s % 16 or not 0 < s < 2**40 for s in strides),
            "each of strides must be a positive multiple of 16 bytes below 2**40",
        ),
        (min(box) < 1 or max(box) > 256, "each of box must be 1 to 256"),
        (min(elem_strides) < 1 or max(elem_strides) > 8, "each of elem_strides must be 1 to 8"),
        (inner % 16 != 0, "the innermost box size in bytes must be a multiple of 16"),
        (
            spec.swizzle != "none" and inner > int(spec.swizzle),
            "the innermost box size exceeds the swizzle span",
        ),
    ):
        if broken:
            raise NotApplicable(f"tensor map {spec.name}: {rule} (dims {dims}, strides {strides}, box {box})")
