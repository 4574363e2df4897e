"""The header of a kernel file: TOML into typed, validated fields.

Everything here is about one table at a time: unknown keys, types, ranges, expressions that parse. What the fields mean together
(names, launches against the C source) is checked in `source`.
"""

from __future__ import annotations

import dataclasses
import keyword
import math
import re
import tomllib
from collections.abc import Mapping
from typing import Any

from torch_llmkernels.errors import ExpressionError, KernelSourceError
from torch_llmkernels.kernels.csource import Param
from torch_llmkernels.kernels.expression import Expression
from torch_llmkernels.task import ITEMSIZE

TARGETS = ("cuda", "cpu")
SWIZZLES = ("none", "32", "64", "128")
L2_PROMOTIONS = ("none", "64", "128", "256")
OOB_FILLS = ("zero", "nan")
MAX_COMBINATIONS = 4096
WORKSPACE_DTYPES = (*ITEMSIZE, "T", "ACC")

_DIM = re.compile(r"[a-z_][a-z0-9_]*\Z")
_TUNABLE = re.compile(r"[A-Z][A-Z0-9_]*\Z")
_RESERVED = re.compile(r"(T|ACC|(T|P|HAS)_.*)\Z")  # macros of ours
_TOP = ("implements", "target", "dtypes", "optional", "where", "dims", "static", "tune", "align", "workspace", "prepare",
        "tensor_map", "launch")  # fmt: skip
_LAUNCH = {"cuda": ("kernel", "args", "grid", "block", "smem", "cluster", "cooperative", "pdl"), "cpu": ("kernel", "args")}


@dataclasses.dataclass(frozen=True)
class WorkspaceSpec:
    """Scratch memory that the caller provides; `zero`: filled with zeros before the launches of every call.

    `dtype` is a key of `ITEMSIZE`, or `T` or `ACC` of the task.
    """

    name: str
    dtype: str
    shape: tuple[Expression, ...]
    zero: bool


@dataclasses.dataclass(frozen=True)
class TensorMapSpec:
    """A TMA descriptor over a tensor or workspace, as `cuTensorMapEncodeTiled` takes it.

    Attributes:
        name: What launches pass as an argument.
        over: The tensor or workspace.
        dtype: Element type; empty: the tensor's own.
        dims: Sizes in elements, innermost first.
        strides: Strides in bytes of dimensions 1 and up (one fewer than `dims`).
        box: Elements per dimension that one copy moves.
        elem_strides: Element strides per dimension.
        swizzle, l2, oob: See `SWIZZLES`, `L2_PROMOTIONS`, `OOB_FILLS`.
    """

    name: str
    over: str
    dtype: str
    dims: tuple[Expression, ...]
    strides: tuple[Expression, ...]
    box: tuple[Expression, ...]
    elem_strides: tuple[Expression, ...]
    swizzle: str
    l2: str
    oob: str


@dataclasses.dataclass(frozen=True)
class Launch:
    """One launch: `args` as written, `params` as the C signature declares them (same length)."""

    kernel: str
    args: tuple[str, ...]
    params: tuple[Param, ...] = ()
    grid: tuple[Expression, ...] = ()
    block: tuple[Expression, ...] = ()
    smem: Expression = Expression("0")
    cluster: tuple[Expression, ...] = ()
    cooperative: bool = False
    pdl: bool = False

    @property
    def expressions(self) -> tuple[Expression, ...]:
        """The configuration's expressions (scalar arguments are not among them)."""
        return (*self.grid, *self.block, self.smem, *self.cluster)


@dataclasses.dataclass(frozen=True)
class Header:
    """The validated header; see docs/design.md for every field."""

    implements: tuple[str, ...]
    target: str
    dtypes: tuple[str, ...]
    optional: tuple[str, ...]
    where: tuple[Expression, ...]
    dims: tuple[tuple[str, Expression], ...]
    static: tuple[str, ...]
    tune: tuple[tuple[str, tuple[int, ...]], ...]
    align: int
    workspace: tuple[WorkspaceSpec, ...]
    prepare: tuple[Launch, ...]
    tensor_map: tuple[TensorMapSpec, ...]
    launch: tuple[Launch, ...]


def parse_header(toml: str) -> Header:
    """The typed header.

    Args:
        toml: The text between `/*---` and `---*/`, with as many newlines in front as make its line numbers those of the file.

    Raises:
        KernelSourceError: saying which field is wrong, why, and what it should be.
    """
    table = _table(toml)
    _known(table, _TOP, "header")
    target = _choice(table, "target", TARGETS, "header")
    return Header(
        implements=_implements(table),
        target=target,
        dtypes=_choices(table, "dtypes", tuple(ITEMSIZE), "header"),
        optional=_names(table, "optional"),
        where=_expressions(table, "where", "header"),
        dims=_dims(table),
        static=_names(table, "static"),
        tune=_tune(table),
        align=_align(table),
        workspace=tuple(_workspace(t, w) for t, w in _tables(table, "workspace")),
        prepare=tuple(_launch(t, w, target) for t, w in _tables(table, "prepare")),
        tensor_map=tuple(_tensor_map(t, w) for t, w in _tables(table, "tensor_map")),
        launch=tuple(_launch(t, w, target) for t, w in _tables(table, "launch")),
    )


def _implements(table: Mapping[str, Any]) -> tuple[str, ...]:
    """One signature, or a list of those that the source serves (it asks `OP_<STAGE>` which one a task has)."""
    if isinstance(table.get("implements"), list):
        found = _strings(table, "implements", "header")
        if not found or "" in found or len(set(found)) < len(found):
            raise KernelSourceError(f"header: 'implements' lists {list(found)!r}; it must name one or more different signatures")
        return found
    return (_text(table, "implements", "header"),)


def signatures_of(toml: str) -> tuple[str, ...]:
    """The `implements` of a header.

    Raises:
        KernelSourceError: if it is no TOML, or has none.
    """
    return _implements(_table(toml))


def _table(toml: str) -> dict[str, Any]:
    try:
        return tomllib.loads(toml)
    except tomllib.TOMLDecodeError as error:
        raise KernelSourceError(f"the header is not TOML: {error}") from None


def _known(table: Mapping[str, Any], keys: tuple[str, ...], where: str) -> None:
    for key in table:
        if key not in keys:
            raise KernelSourceError(f"{where}: unknown key '{key}' (known: {', '.join(keys)})")


def _text(table: Mapping[str, Any], key: str, where: str, default: str | None = None) -> str:
    value = table.get(key, default)
    if not isinstance(value, str) or (not value and default is None):
        problem = "is missing" if key not in table else f"is {value!r}"
        raise KernelSourceError(f"{where}: '{key}' {problem}; it must be a non-empty string")
    return value


def _strings(table: Mapping[str, Any], key: str, where: str) -> tuple[str, ...]:
    value = table.get(key, [])
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise KernelSourceError(f"{where}: '{key}' must be a list of strings, such as {key} = [\"...\"], not {value!r}")
    return tuple(value)


def _choice(table: Mapping[str, Any], key: str, known: tuple[str, ...], where: str, default: str | None = None) -> str:
    value = table.get(key, default)
    if value not in known:
        raise KernelSourceError(f"{where}: '{key}' is {value!r}, not one of {', '.join(known)}")
    return str(value)


def _choices(table: Mapping[str, Any], key: str, known: tuple[str, ...], where: str) -> tuple[str, ...]:
    values = _strings(table, key, where)
    if not values or any(v not in known for v in values):
        raise KernelSourceError(f"{where}: '{key}' is {list(values)!r}; it must list one or more of {', '.join(known)}")
    return values


def _names(table: Mapping[str, Any], key: str) -> tuple[str, ...]:
    values = _strings(table, key, "header")
    for value in values:
        if not value.isidentifier() or values.count(value) > 1:
            raise KernelSourceError(f"header: '{key}' entry {value!r} must be an identifier that occurs once")
    return values


def _flag(table: Mapping[str, Any], key: str, where: str) -> bool:
    value = table.get(key, False)
    if not isinstance(value, bool):
        raise KernelSourceError(f"{where}: '{key}' must be true or false, not {value!r}")
    return value


def _expression(value: Any, where: str) -> Expression:
    if isinstance(value, int) and not isinstance(value, bool):
        value = str(value)
    if not isinstance(value, str):
        raise KernelSourceError(f"{where}: {value!r} must be an expression in quotes, or an int")
    try:
        return Expression(value)
    except ExpressionError as error:
        raise KernelSourceError(f"{where}: {error}") from None


def _expressions(table: Mapping[str, Any], key: str, where: str, most: int | None = None) -> tuple[Expression, ...]:
    values = table.get(key, [])
    if not isinstance(values, list):
        raise KernelSourceError(f"{where}: '{key}' must be a list of expressions, such as {key} = [\"...\"], not {values!r}")
    if most is not None and not 1 <= len(values) <= most:
        raise KernelSourceError(f"{where}: '{key}' must have 1 to {most} expressions, it has {len(values)}")
    return tuple(_expression(v, f"{where}.{key}[{i}]") for i, v in enumerate(values))


def _tables(table: Mapping[str, Any], key: str) -> list[tuple[Mapping[str, Any], str]]:
    values = table.get(key, [])
    if not isinstance(values, list) or not all(isinstance(v, dict) for v in values):
        raise KernelSourceError(f"header: write each '{key}' as a [[{key}]] table")
    return [(v, f"{key}[{i}]") for i, v in enumerate(values)]


def _dims(table: Mapping[str, Any]) -> tuple[tuple[str, Expression], ...]:
    values = table.get("dims", {})
    if not isinstance(values, dict):
        raise KernelSourceError("header: 'dims' must be a table such as { rows = \"x.shape[0]\" }")
    for name in values:
        if not _DIM.match(name) or keyword.iskeyword(name) or name in ("min", "max", "ceil_div", "device"):
            raise KernelSourceError(f"header: dim '{name}' must be a lower-case identifier that is not reserved")
    return tuple((name, _expression(value, f"dims.{name}")) for name, value in values.items())


def _tune(table: Mapping[str, Any]) -> tuple[tuple[str, tuple[int, ...]], ...]:
    values = table.get("tune", {})
    if not isinstance(values, dict):
        raise KernelSourceError("header: 'tune' must be a table such as { THREADS = [128, 256] }")
    for name, choices in values.items():
        if not _TUNABLE.match(name) or _RESERVED.match(name):
            raise KernelSourceError(f"header: tunable '{name}' must be upper case and not T, ACC, T_..., P_... or HAS_...")
        ints = isinstance(choices, list) and all(isinstance(c, int) and not isinstance(c, bool) for c in choices)
        if not ints or not choices or len(set(choices)) != len(choices):
            raise KernelSourceError(f"header: tune.{name} must be a list of different ints, not {choices!r}")
    combinations = math.prod(len(choices) for choices in values.values())
    if combinations > MAX_COMBINATIONS:
        raise KernelSourceError(
            f"header: 'tune' has {combinations} combinations; at most {MAX_COMBINATIONS} are tried, drop values"
        )
    return tuple((name, tuple(choices)) for name, choices in values.items())


def _align(table: Mapping[str, Any]) -> int:
    value = table.get("align", 16)
    if not isinstance(value, int) or isinstance(value, bool) or value not in (1, 2, 4, 8, 16, 32, 64, 128, 256):
        raise KernelSourceError(f"header: 'align' is {value!r}; it must be a power of two from 1 to 256 (bytes)")
    return value


def _workspace(table: Mapping[str, Any], where: str) -> WorkspaceSpec:
    _known(table, ("name", "dtype", "shape", "zero"), where)
    shape = _expressions(table, "shape", where)
    if not shape:
        raise KernelSourceError(f"{where}: 'shape' is missing; give at least one size expression")
    dtype = _choice(table, "dtype", WORKSPACE_DTYPES, where)
    return WorkspaceSpec(_identifier(table, "name", where), dtype, shape, _flag(table, "zero", where))


def _identifier(table: Mapping[str, Any], key: str, where: str) -> str:
    value = _text(table, key, where)
    if not value.isidentifier() or keyword.iskeyword(value):
        raise KernelSourceError(f"{where}: '{key}' is {value!r}, which is not an identifier")
    return value


def _tensor_map(table: Mapping[str, Any], where: str) -> TensorMapSpec:
    keys = tuple(f.name for f in dataclasses.fields(TensorMapSpec))
    _known(table, keys, where)
    dims, box = _expressions(table, "dims", where, most=5), _expressions(table, "box", where, most=5)
    strides = _expressions(table, "strides", where)
    elem_strides = _expressions(table, "elem_strides", where) or tuple(Expression("1") for _ in dims)
    if len(box) != len(dims) or len(strides) != len(dims) - 1 or len(elem_strides) != len(dims):
        raise KernelSourceError(
            f"{where}: {len(dims)} dims need {len(dims)} box sizes, {len(dims)} elem_strides and {len(dims) - 1} strides (in "
            f"bytes, of dimensions 1 and up); it has {len(box)}, {len(elem_strides)} and {len(strides)}"
        )
    return TensorMapSpec(
        _identifier(table, "name", where), _identifier(table, "over", where),
        _choice(table, "dtype", ("", *ITEMSIZE), where, default=""), dims, strides, box, elem_strides,
        _choice(table, "swizzle", SWIZZLES, where, default="none"), _choice(table, "l2", L2_PROMOTIONS, where, default="none"),
        _choice(table, "oob", OOB_FILLS, where, default="zero"),
    )  # fmt: skip


def _launch(table: Mapping[str, Any], where: str, target: str) -> Launch:
    _known(table, _LAUNCH[target], where)
    kernel, args = _identifier(table, "kernel", where), _strings(table, "args", where)
    if target == "cpu":
        return Launch(kernel, args)
    return Launch(
        kernel=kernel,
        args=args,
        grid=_expressions(table, "grid", where, most=3),
        block=_expressions(table, "block", where, most=3),
        smem=_expression(table.get("smem", "0"), f"{where}.smem"),
        cluster=_expressions(table, "cluster", where, most=3) if "cluster" in table else (),
        cooperative=_flag(table, "cooperative", where),
        pdl=_flag(table, "pdl", where),
    )
