"""From a kernel, a task and constants to names with values, macros, workspaces, and the source that a compiler gets.

Nothing here touches a device or imports torch. What a launch needs, fully evaluated, is in `plan`.
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
    from torch_llmkernels.kernels.header import Launch
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.task import Task

__all__ = ["Expression", "Workspace", "assemble", "check_where", "environment", "is_float", "macros", "main_dtype", "why_not",
           "workspaces", "workspaces_at"]  # fmt: skip

C_TYPES = {
    "float64": "double", "float32": "float", "float16": "half", "bfloat16": "bfloat16",
    "int64": "int64_t", "int32": "int32_t", "int16": "int16_t", "int8": "int8_t", "uint8": "uint8_t", "bool": "bool",
}  # fmt: skip


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


def main_dtype(task: Task) -> str:
    """The dtype of the first floating input; without one, of the first tensor."""
    dtypes = [t.dtype for t in (*task.inputs, *task.outputs)]
    return next((t.dtype for t in task.inputs if t.dtype in FLOATS), dtypes[0])


def environment(
    kernel: Kernel,
    task: Task,
    constants: Mapping[str, int],
    facts: DeviceFacts | None = None,
    symbols: Mapping[str, int] | None = None,
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
    for name in kernel.optional:  # so that `where` can demand it of those that are present
        names.update({f"{name}.contiguous": 1, f"{name}.channels_last": 1})
    names.update(stage_positions(kernel, task))
    names.update(constants)
    for spec in tensors:
        names.update(_attributes(spec))
    if facts is not None:
        names.update({"device.sms": facts.sms, "device.smem_per_block": facts.smem_per_block, "device.threads": facts.threads})
        names["device.arch"] = facts.arch_number
    return names


def stages(kernel: Kernel) -> set[str]:
    """Every stage of every signature that a kernel implements: `conv2d.relu` has `conv2d` and `relu`."""
    return {stage for signature in kernel.implements for stage in signature.split(".")}


def stage_macro(stage: str) -> str:
    """`OP_RELU` for `relu`."""
    return f"OP_{stage.upper()}"


def stage_positions(kernel: Kernel, task: Task) -> dict[str, int]:
    """For each stage that the kernel knows: its place in the task's signature, counted from 1, or 0 where the task lacks it."""
    placed = task.signature.split(".")
    return {stage_macro(s): placed.index(s) + 1 if s in placed else 0 for s in sorted(stages(kernel))}


def _parameters(task: Task) -> dict[str, int]:
    names: dict[str, int] = {}
    for name, value in task.params:
        if isinstance(value, int):
            names[name] = int(value)
        elif isinstance(value, tuple):
            names.update(_indexed(name, value))
            if all(isinstance(v, int) for v in value):
                names[f"{name}.product"] = math.prod(value)
    return names


def _indexed(name: str, values: Sequence[Any]) -> dict[str, int]:
    ints = {i: int(v) for i, v in enumerate(values) if isinstance(v, int)}
    return {f"{name}[{i}]": v for i, v in ints.items()} | {f"{name}[{i - len(values)}]": v for i, v in ints.items()}


def _attributes(spec: TensorSpec) -> dict[str, int]:
    names = {f"{spec.name}.numel": math.prod(spec.shape), f"{spec.name}.ndim": len(spec.shape),  # type: ignore[arg-type]
             f"{spec.name}.itemsize": ITEMSIZE[spec.dtype], f"{spec.name}.contiguous": int(spec.is_contiguous),
             f"{spec.name}.channels_last": int(spec.is_channels_last)}  # fmt: skip
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
    for expression in (*kernel.where, *_all_scalars(kernel.launches, task)):
        if not _unbound(kernel, expression, names):
            expression.evaluate(names)  # a name that neither the kernel nor the task defines is a reason
    conditions = [c for c in kernel.where if not _unbound(kernel, c, names)]
    try:
        check_where(dataclasses.replace(kernel, where=tuple(conditions)), names)
    except NotApplicable as error:
        return f"{error} (at the hinted sizes)" if task.is_dynamic else str(error)
    return None


def _all_scalars(steps: Sequence[Launch], task: Task) -> list[Expression]:
    """Every expression of some launches, without floating parameters."""
    found = [e for step in steps for e in step.expressions]
    for step in steps:
        for arg, param in zip(step.args, step.params, strict=True):
            if param.type not in ("pointer", "tensor_map") and not is_float(arg, param, task):
                found.append(Expression(arg))
    return found


def is_float(arg: str, param: Param, task: Task) -> bool:
    """Whether an argument is a floating parameter of the task, passed as it is."""
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
            dynamic |= {f"{spec.name}.numel", f"{spec.name}.contiguous", f"{spec.name}.channels_last"}
    for name, expression in kernel.dims:
        if expression.names & dynamic:
            dynamic.add(name)
    return dynamic


def is_dynamic(kernel: Kernel, steps: Sequence[Launch], task: Task) -> bool:
    """Whether some number of these launches depends on a dynamic size of the task."""
    dynamic = _dynamic_names(kernel, task)
    return any(e.names & dynamic for e in _all_scalars(steps, task))


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
    found.update((name, str(position)) for name, position in stage_positions(kernel, task).items())
    for name, value in task.params:
        found.update(_parameter_macros(f"P_{name.upper()}", value))
    names = _base_environment(kernel, task, constants, facts, None)
    _evaluate_dims(kernel, names)
    for name in kernel.static:
        found[name.upper()] = _literal(Expression(name).evaluate(names))
    found.update((name, _literal(value)) for name, value in constants.items())
    return found


def assemble(prelude: str, prelude_name: str, found: Mapping[str, str], kernel: Kernel, suffix: str) -> str:
    """The source a compiler gets: ACC, the prelude, the other macros, the body; line numbers are those of the files they are in.

    The prelude comes before the macros, because names such as `N` and `T` would break the headers that it includes.
    """
    lines = [f"#define {name} {value}" for name, value in found.items() if name != "ACC"]
    return "\n".join([
        f"#define ACC {found['ACC']}", f'#line 1 "{prelude_name}"', prelude, *lines,
        "namespace kernel_file {",  # a helper of the file hides one of the prelude with the same name
        f'#line {kernel.first_line} "{kernel.name}{suffix}"', kernel.body, "}",
    ])  # fmt: skip


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


def has_dynamic_workspace(kernel: Kernel, task: Task) -> bool:
    """Whether some workspace's size depends on a dynamic size of the task, so that it is known at the call only."""
    dynamic = _dynamic_names(kernel, task)
    return any(e.names & dynamic for w in kernel.workspace for e in w.shape)


def workspaces(
    kernel: Kernel,
    task: Task,
    constants: Mapping[str, int],
    facts: DeviceFacts | None = None,
    symbols: Mapping[str, int] | None = None,
) -> tuple[Workspace, ...]:
    """The scratch tensors a caller allocates.

    Args:
        kernel, task, constants, facts: As for `environment`.
        symbols: Values of the task's symbols; needed where `has_dynamic_workspace`.

    Raises:
        NotApplicable: for a size that is dynamic (without `symbols`), negative or without a value.
    """
    if symbols is None and has_dynamic_workspace(kernel, task):
        raise NotApplicable(f"{kernel.name}: a workspace's size depends on a dynamic size of the task")
    try:
        return workspaces_at(kernel, task, environment(kernel, task, constants, facts, symbols))
    except ExpressionError as error:
        raise NotApplicable(f"{kernel.name}: {error}") from None


def workspaces_at(kernel: Kernel, task: Task, names: Mapping[str, int]) -> tuple[Workspace, ...]:
    """The workspaces in an environment that has all names.

    Raises:
        NotApplicable: for a negative size.
    """
    dtype = main_dtype(task)
    special = {"T": dtype, "ACC": "float64" if dtype == "float64" else "float32"}
    found = []
    for spec in kernel.workspace:
        shape = tuple(e.evaluate(names) for e in spec.shape)
        if min(shape) < 0:
            raise NotApplicable(f"{kernel.name}: workspace {spec.name} would have the shape {list(shape)}")
        found.append(Workspace(spec.name, special.get(spec.dtype, spec.dtype), shape, spec.zero))
    return tuple(found)
