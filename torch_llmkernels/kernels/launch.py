"""From a kernel, a task and constants to what a target needs: names, macros, workspaces, and a fully evaluated plan of launches.

Nothing here touches a device or imports torch. A static task has one `Plan`; a dynamic one has a plan per tuple of symbol values,
which the targets cache.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_llmkernels.errors import ExpressionError, NotApplicable
from torch_llmkernels.kernels.expression import Expression
from torch_llmkernels.task import FLOATS, ITEMSIZE, TensorSpec

if TYPE_CHECKING:
    from torch_llmkernels.kernels.csource import Param
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.kernels.header import Launch, TensorMapSpec
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.task import Task

__all__ = ["Argument", "Expression", "LaunchPlan", "MapPlan", "Plan", "Workspace", "check_where", "environment", "macros",
           "main_dtype", "plan", "why_not", "workspaces"]  # fmt: skip

C_TYPES = {
    "float64": "double", "float32": "float", "float16": "half", "bfloat16": "bfloat16",
    "int64": "int64_t", "int32": "int32_t", "int16": "int16_t", "int8": "int8_t", "uint8": "uint8_t", "bool": "bool",
}  # fmt: skip
_RANGES = {
    "bool": (0, 1), "i32": (-(2**31), 2**31 - 1), "u32": (0, 2**32 - 1), "i64": (-(2**63), 2**63 - 1), "u64": (0, 2**64 - 1),
}  # fmt: skip
_GRID_LIMITS = (2**31 - 1, 65535, 65535)


@dataclasses.dataclass(frozen=True)
class Workspace:
    """Scratch memory the caller allocates for a launcher, contiguous; `zero`: the launcher fills it with zeros."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    zero: bool

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * ITEMSIZE[self.dtype]


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


def main_dtype(task: Task) -> str:
    """The dtype of the first floating input; without one, of the first tensor."""
    dtypes = [t.dtype for t in (*task.inputs, *task.outputs)]
    return next((t.dtype for t in task.inputs if t.dtype in FLOATS), dtypes[0])


def environment(
    kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts | None = None, symbols: Mapping[str, int] | None = None
) -> dict[str, int]:
    """Every name an expression may read, with its value.

    Args:
        kernel: Gives the dims and the optional names.
        task: Gives shapes, strides and integer parameters.
        constants: Values of the tunables.
        facts: Gives `device.*`; without it, expressions that read those have no value.
        symbols: Values of the task's symbols; default: its hints.

    Raises:
        ExpressionError: if a dim has no value, divides by zero or overflows.
    """
    names = _base_environment(kernel, task, constants, facts, symbols)
    for name, expression in kernel.dims:
        names[name] = expression.evaluate(names)
    return names


def _base_environment(
    kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts | None, symbols: Mapping[str, int] | None
) -> dict[str, int]:
    values = dict(task.symbols) if symbols is None else symbols
    tensors = [t.at(values) if task.symbols else t for t in (*task.inputs, *task.outputs)]
    present = {t.name for t in tensors}
    names = _parameters(task)
    names.update((f"HAS_{name.upper()}", int(name in present)) for name in kernel.optional)
    names.update(constants)
    for spec in tensors:
        names.update(_attributes(spec))
    if facts is not None:
        names.update({"device.sms": facts.sms, "device.smem_per_block": facts.smem_per_block, "device.threads": facts.threads})
    return names


def _parameters(task: Task) -> dict[str, int]:
    names: dict[str, int] = {}
    for name, value in task.params:
        if isinstance(value, int):
            names[name] = int(value)
        elif isinstance(value, tuple):
            names.update(_indexed(name, value))
    return names


def _indexed(name: str, values: Sequence[Any]) -> dict[str, int]:
    ints = {i: int(v) for i, v in enumerate(values) if isinstance(v, int)}
    return {f"{name}[{i}]": v for i, v in ints.items()} | {f"{name}[{i - len(values)}]": v for i, v in ints.items()}


def _attributes(spec: TensorSpec) -> dict[str, int]:
    names = {f"{spec.name}.numel": math.prod(spec.shape), f"{spec.name}.ndim": len(spec.shape),  # type: ignore[arg-type]
             f"{spec.name}.itemsize": ITEMSIZE[spec.dtype]}  # fmt: skip
    return names | _indexed(f"{spec.name}.shape", spec.shape) | _indexed(f"{spec.name}.stride", spec.stride)


def check_where(kernel: Kernel, names: Mapping[str, int]) -> None:
    """Check the `where` conditions.

    Raises:
        NotApplicable: for the first one that does not hold, with the values it read.
        ExpressionError: if one has no value.
    """
    for condition in kernel.where:
        if not condition.evaluate(names):
            read = ", ".join(f"{name} = {names[name]}" for name in sorted(condition.names))
            raise NotApplicable(f"where {condition.text!r} fails: {read}")


def why_not(kernel: Kernel, task: Task) -> str | None:
    """Why the header's expressions exclude `task` whatever the tunables and the device, or None."""
    dynamic = _dynamic_names(kernel, task)
    for name in kernel.static:
        if name in dynamic:
            expression = dict(kernel.dims)[name]
            return f"its static dim {name} = {expression.text!r} depends on a dynamic size of the task"
    shapes = [e for w in kernel.workspace for e in w.shape]
    for expression in shapes:
        if expression.names & dynamic:
            return f"a workspace's size {expression.text!r} depends on a dynamic size of the task, which is not supported"
    names = _base_environment(kernel, task, {}, None, None)
    try:
        _evaluate_dims(kernel, names)
        return _why_not_conditions(kernel, task, names)
    except ExpressionError as error:
        return str(error)


def _evaluate_dims(kernel: Kernel, names: dict[str, int]) -> None:
    """Add the dims that have a value without tunables and device facts."""
    for name, expression in kernel.dims:
        if not _unbound(kernel, expression, names):
            names[name] = expression.evaluate(names)


def _unbound(kernel: Kernel, expression: Expression, names: Mapping[str, int]) -> bool:
    """Whether it reads a tunable, a device fact, or a dim that does."""
    later = {n for n, _ in kernel.tune} | {n for n, _ in kernel.dims}
    return any(n not in names and (n in later or n.startswith("device.")) for n in expression.names)


def _why_not_conditions(kernel: Kernel, task: Task, names: Mapping[str, int]) -> str | None:
    for expression in (*kernel.where, *_all_scalars(kernel, task)):
        if not _unbound(kernel, expression, names):
            expression.evaluate(names)  # a name that neither the kernel nor the task defines is a reason
    conditions = [c for c in kernel.where if not _unbound(kernel, c, names)]
    try:
        check_where(dataclasses.replace(kernel, where=tuple(conditions)), names)
    except NotApplicable as error:
        return f"{error} (at the hinted sizes)" if task.is_dynamic else str(error)
    return None


def _all_scalars(kernel: Kernel, task: Task) -> list[Expression]:
    """Every expression of the launches, without floating parameters."""
    found = [e for step in kernel.launches for e in step.expressions]
    for step in kernel.launches:
        for arg, param in zip(step.args, step.params, strict=True):
            if param.type not in ("pointer", "tensor_map") and not _is_float(arg, param, task):
                found.append(Expression(arg))
    return found


def _is_float(arg: str, param: Param, task: Task) -> bool:
    return param.type in ("f32", "f64", "acc") and isinstance(task.param.get(arg), float)


def _dynamic_names(kernel: Kernel, task: Task) -> set[str]:
    """Names whose value depends on a symbol, dims included."""
    dynamic: set[str] = set()
    for spec in (*task.inputs, *task.outputs):
        for kind, values in (("shape", spec.shape), ("stride", spec.stride)):
            for i, value in enumerate(values):
                if isinstance(value, str):
                    dynamic |= {f"{spec.name}.{kind}[{i}]", f"{spec.name}.{kind}[{i - len(values)}]"}
        if any(isinstance(size, str) for size in spec.shape):
            dynamic.add(f"{spec.name}.numel")
    for name, expression in kernel.dims:
        if expression.names & dynamic:
            dynamic.add(name)
    return dynamic


def macros(kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts | None = None) -> dict[str, str]:
    """The macros that the source sees, name to replacement (see docs/design.md, Kernel file).

    Args:
        kernel: The kernel file.
        task: What it is compiled for.
        constants: Values of the tunables.
        facts: Needed only if a static dim reads `device.*`.

    Raises:
        ExpressionError: if a static dim has no value.
    """
    dtype = main_dtype(task)
    found = {"T": C_TYPES[dtype], "ACC": "double" if dtype == "float64" else "float"}
    present = {t.name: t.dtype for t in (*task.inputs, *task.outputs)}
    for name in kernel.optional:
        found[f"HAS_{name.upper()}"] = str(int(name in present))
        found[f"T_{name}"] = "T"  # an absent tensor's pointer still needs a type
    found.update((f"T_{name}", C_TYPES[kind]) for name, kind in present.items())
    for name, value in task.params:
        found.update(_parameter_macros(f"P_{name.upper()}", value))
    names = _base_environment(kernel, task, constants, facts, None)
    _evaluate_dims(kernel, names)
    for name in kernel.static:
        found[name.upper()] = _literal(Expression(name).evaluate(names))
    found.update((name, _literal(value)) for name, value in constants.items())
    return found


def _parameter_macros(name: str, value: Any) -> dict[str, str]:
    """Numbers as literals, lists by index, a string `tanh` as `P_APPROXIMATE_TANH` = 1."""
    if isinstance(value, tuple):
        return {f"{name}_{i}": _literal(v) for i, v in enumerate(value)}
    if isinstance(value, str):
        return {f"{name}_{value.upper()}": "1"} if value.isidentifier() else {}
    return {} if value is None else {name: _literal(value)}


def _literal(value: float) -> str:
    if isinstance(value, float):
        text = "NAN" if math.isnan(value) else "INFINITY" if value > 0 else "-INFINITY"
        return f"((ACC)({value!r}))" if math.isfinite(value) else f"((ACC)({text}))"
    value = int(value)
    suffix = "" if -(2**31) < value < 2**31 else "LL"
    return f"{value}{suffix}" if value >= 0 else f"({value}{suffix})"


def workspaces(
    kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts | None = None
) -> tuple[Workspace, ...]:
    """The scratch tensors a caller allocates.

    Raises:
        NotApplicable: for a size that is dynamic, negative or without a value.
    """
    dynamic = _dynamic_names(kernel, task)
    if any(e.names & dynamic for w in kernel.workspace for e in w.shape):
        raise NotApplicable(f"{kernel.name}: a workspace's size depends on a dynamic size of the task")
    try:
        return _workspaces(kernel, task, environment(kernel, task, constants, facts))
    except ExpressionError as error:
        raise NotApplicable(f"{kernel.name}: {error}") from None


def _workspaces(kernel: Kernel, task: Task, names: Mapping[str, int]) -> tuple[Workspace, ...]:
    dtype = main_dtype(task)
    special = {"T": dtype, "ACC": "float64" if dtype == "float64" else "float32"}
    found = []
    for spec in kernel.workspace:
        shape = tuple(e.evaluate(names) for e in spec.shape)
        if min(shape) < 0:
            raise NotApplicable(f"{kernel.name}: workspace {spec.name} would have the shape {list(shape)}")
        found.append(Workspace(spec.name, special.get(spec.dtype, spec.dtype), shape, spec.zero))
    return tuple(found)


def plan(kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts, symbols: Mapping[str, int] | None = None) -> Plan:
    """Evaluate everything a call needs.

    Args:
        kernel, task, constants, facts: What is launched, on what, with which tunables, where.
        symbols: Values of the task's symbols; default: its hints.

    Raises:
        NotApplicable: if a `where` fails, an expression has no value, a value does not fit its parameter, or the launch exceeds
            the device's limits.
    """
    try:
        names = environment(kernel, task, constants, facts, symbols)
        check_where(kernel, names)
        return _Planner(kernel, task, facts, names, dict(task.symbols) if symbols is None else symbols).plan()
    except ExpressionError as error:
        raise NotApplicable(f"{kernel.name}: {error}") from None
    except NotApplicable as error:
        raise NotApplicable(f"{kernel.name}: {error}") from None


class _Planner:
    def __init__(self, kernel: Kernel, task: Task, facts: DeviceFacts, names: Mapping[str, int], symbols: Mapping[str, int]) -> None:
        self.kernel, self.task, self.facts, self.names = kernel, task, facts, names
        self.workspaces = _workspaces(kernel, task, names)
        order = [*(t.name for t in task.outputs), *(w.name for w in self.workspaces), *(t.name for t in task.inputs)]
        self.positions = {name: i for i, name in enumerate(order)}
        self.dtypes = {t.name: t.dtype for t in (*task.inputs, *task.outputs, *self.workspaces)}
        self.empty = all(0 in t.at(symbols).shape for t in task.outputs)

    def plan(self) -> Plan:
        kernel = self.kernel
        prepared = {arg for step in kernel.prepare for arg in step.args}
        zero = [(w.name in prepared, (self.positions[w.name], w.nbytes)) for w in self.workspaces if w.zero and w.nbytes]
        return Plan(
            tensors=len(self.positions),
            empty=self.empty,
            zero_prepare=tuple(z for early, z in zero if early),
            zero=tuple(z for early, z in zero if not early),
            prepare=() if self.empty else tuple(self.launch(step) for step in kernel.prepare),
            launches=() if self.empty else tuple(self.launch(step) for step in kernel.launch),
            maps=() if self.empty else tuple(self.map(spec) for spec in kernel.tensor_map),
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
        if min(step.block) < 1 or threads > limit or step.block[2] > 64:
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
        kind = param.type if param.type != "acc" else ("f64" if main_dtype(self.task) == "float64" else "f32")
        if _is_float(arg, param, self.task):
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
        (any(s % 16 or not 0 < s < 2**40 for s in strides), "each of strides must be a positive multiple of 16 bytes below 2**40"),
        (min(box) < 1 or max(box) > 256, "each of box must be 1 to 256"),
        (min(elem_strides) < 1 or max(elem_strides) > 8, "each of elem_strides must be 1 to 8"),
        (inner % 16 != 0, "the innermost box size in bytes must be a multiple of 16"),
        (spec.swizzle != "none" and inner > int(spec.swizzle.replace("none", "0")), "the innermost box size exceeds the swizzle span"),
    ):
        if broken:
            raise NotApplicable(f"tensor map {spec.name}: {rule} (dims {dims}, strides {strides}, box {box})")
