"""What a region must compute, without the graph it came from.

A `Task` is a straight-line ATen program over named tensors with exact dtypes, shapes and strides, the numerics policy it runs
under, and the device type. Its `key` names exactly that; its `signature` is the readable, shape-free name that kernels declare in
`implements`. Both are identical across processes, call-site spellings, module names and torch releases, because the graph stage
normalises every call to its full schema before it builds one.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Any

from torch_llmkernels.errors import SchemaError, TaskError

SCHEMA = 1

Dim = int | str
"""A size or a stride: an int, or an integer expression over the task's symbols such as `"d0"`, `"64*d0"` or `"max(1,d0//2)"`."""

FLOATS = ("float64", "float32", "float16", "bfloat16")
ITEMSIZE = {
    "float64": 8, "float32": 4, "float16": 2, "bfloat16": 2,
    "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """One input or output of a task.

    Attributes:
        name: The role, unique in the task and a C identifier: `x`, `weight`, `bias`, `y`, `grad_weight`.
        dtype: A key of `ITEMSIZE`.
        shape: Sizes in elements.
        stride: Strides in elements, one per dimension.
    """

    name: str
    dtype: str
    shape: tuple[Dim, ...]
    stride: tuple[Dim, ...]

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise TaskError(f"tensor name {self.name!r} is not an identifier")
        if self.dtype not in ITEMSIZE:
            raise TaskError(f"tensor {self.name}: dtype {self.dtype} is not supported (one of {', '.join(ITEMSIZE)})")
        if len(self.shape) != len(self.stride):
            raise TaskError(f"tensor {self.name}: {len(self.shape)} sizes but {len(self.stride)} strides")

    def at(self, symbols: Mapping[str, int]) -> TensorSpec:
        """This spec with every symbol replaced by its value."""
        return dataclasses.replace(
            self,
            shape=tuple(evaluate_dim(d, symbols) for d in self.shape),
            stride=tuple(evaluate_dim(d, symbols) for d in self.stride),
        )

    @property
    def is_contiguous(self) -> bool:
        """Whether the strides are those of a row-major tensor of this (static) shape; sizes of 1 may have any stride."""
        return self._is_dense(range(len(self.shape)))

    @property
    def is_channels_last(self) -> bool:
        """The same for (n, c, h, w) in the order n, h, w, c; False for any other number of dimensions."""
        return len(self.shape) == 4 and self._is_dense((0, 2, 3, 1))

    def _is_dense(self, order: Sequence[int]) -> bool:
        """Whether memory holds the elements without gaps, `order` naming the dimensions from the outermost to the innermost."""
        expected = 1
        for dim in reversed(order):
            size, stride = self.shape[dim], self.stride[dim]
            if isinstance(size, str) or isinstance(stride, str):
                return False
            if size != 1 and stride != expected:
                return False
            expected *= max(size, 1)
        return True


@dataclasses.dataclass(frozen=True)
class Node:
    """One call of the program.

    Attributes:
        name: The value it defines, unique in the task.
        op: `aten.<name>.<overload>`, or `getitem` for one output of a call that returns several.
        args: Every argument of the schema in order, keyword-only ones included, encoded as plain JSON:
            `{"v": name}` a value, `{"p": name}` a parameter of the task, `{"s": expr}` a symbolic size, `{"dtype": "float32"}`,
            `{"device": "cpu"}`, `{"f": "0x1.8p+1"}` a float literal (hex), lists of those, or null, bool, int, str.
    """

    name: str
    op: str
    args: tuple[Any, ...]


@dataclasses.dataclass(frozen=True)
class Numerics:
    """The user's precision flags, as far as this program reads them (fields it does not read keep their defaults).

    Attributes:
        matmul: `ieee`, `tf32` or `bf16`: what float32 products may be computed in.
        conv: The same for convolutions.
        reduced_precision_reduction: Whether half-precision products may accumulate in half precision.
        deterministic: `torch.use_deterministic_algorithms`: two runs must agree bitwise.
    """

    matmul: str = "ieee"
    conv: str = "ieee"
    reduced_precision_reduction: bool = False
    deterministic: bool = False


@dataclasses.dataclass(frozen=True)
class Task:
    """A region's computation, canonical and independent of its graph.

    Attributes:
        signature: Readable shape-free name: the pattern and its stages, such as `layer_norm` or `conv2d.relu.max_pool2d`; for a
            grown region the pattern's name and a digest of the program.
        program: The calls in order; every value is an input, or defined by an earlier node.
        inputs: In the order the runtime operator receives them.
        outputs: In the order the runtime operator returns them.
        results: For each output, the name of the value in the program that it is.
        params: Literals lifted from the program, by name: bool, int, float, str, or a tuple of ints.
        numerics: The precision policy.
        device: `cuda` or `cpu`.
        symbols: Names of the dynamic sizes, each with the size seen when the task was made (a hint, not part of the key).
        constant: Names of the inputs that never change while the compiled graph lives (frozen parameters).
    """

    signature: str
    program: tuple[Node, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    results: tuple[str, ...]
    params: tuple[tuple[str, Any], ...]
    numerics: Numerics
    device: str
    symbols: tuple[tuple[str, int], ...] = ()
    constant: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        names = [t.name for t in (*self.inputs, *self.outputs)]
        if len(set(names)) != len(names):
            raise TaskError(f"task {self.signature}: a tensor name occurs twice in {names}")
        if len(self.results) != len(self.outputs):
            raise TaskError(f"task {self.signature}: {len(self.outputs)} outputs but {len(self.results)} results")
        if self.device not in ("cuda", "cpu"):
            raise TaskError(f"task {self.signature}: device {self.device!r} has no target (cuda or cpu)")

    @functools.cached_property
    def key(self) -> str:
        """Digest of everything but the symbols' hints: 20 hex digits."""
        plain = self.to_json()
        plain["symbols"] = [name for name, _ in self.symbols]
        return digest(plain)

    @functools.cached_property
    def signature_key(self) -> str:
        """Digest of the program with parameters by name only, and the names and presence of inputs and outputs: shape-free."""
        return digest([
            [[n.op, n.args] for n in self.program],
            [t.name for t in self.inputs], [t.name for t in self.outputs], [k for k, _ in self.params],
        ])  # fmt: skip

    @property
    def is_dynamic(self) -> bool:
        """Whether some size is a symbol."""
        return bool(self.symbols)

    @property
    def param(self) -> dict[str, Any]:
        """The lifted literals as a mapping."""
        return dict(self.params)

    def tensor(self, name: str) -> TensorSpec:
        """The input or output called `name`.

        Raises:
            KeyError: if the task has none.
        """
        for spec in (*self.inputs, *self.outputs):
            if spec.name == name:
                return spec
        raise KeyError(name)

    def at(self, symbols: Mapping[str, int] | None = None) -> Task:
        """The static task for these symbol values (default: the hints)."""
        values = dict(self.symbols) if symbols is None else dict(symbols)
        return dataclasses.replace(
            self,
            program=tuple(dataclasses.replace(n, args=tuple(_substitute(a, values) for a in n.args)) for n in self.program),
            inputs=tuple(t.at(values) for t in self.inputs),
            outputs=tuple(t.at(values) for t in self.outputs),
            symbols=(),
        )

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        plain = dataclasses.asdict(self)
        plain["schema"] = SCHEMA
        plain["params"] = [[k, encode_literal(v)] for k, v in self.params]
        return json.loads(json.dumps(plain))

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Task:
        """The task `to_json` wrote.

        Raises:
            SchemaError: for another schema version or missing fields.
        """
        if plain.get("schema") != SCHEMA:
            raise SchemaError(f"task schema {plain.get('schema')!r}, this release reads {SCHEMA}; search or verify again")
        try:
            return cls(
                signature=plain["signature"],
                program=tuple(Node(n["name"], n["op"], tuple(n["args"])) for n in plain["program"]),
                inputs=tuple(_tensor(t) for t in plain["inputs"]),
                outputs=tuple(_tensor(t) for t in plain["outputs"]),
                results=tuple(plain["results"]),
                params=tuple((k, decode_literal(v)) for k, v in plain["params"]),
                numerics=Numerics(**plain["numerics"]),
                device=plain["device"],
                symbols=tuple((k, int(v)) for k, v in plain["symbols"]),
                constant=tuple(plain["constant"]),
            )
        except (KeyError, TypeError) as error:
            raise SchemaError(f"task record is damaged: {error!r}") from error


def _tensor(plain: Mapping[str, Any]) -> TensorSpec:
    return TensorSpec(plain["name"], plain["dtype"], tuple(plain["shape"]), tuple(plain["stride"]))


def encode_literal(value: Any) -> Any:
    """A literal as tagged JSON that keeps floats exact (`{"f": hex}`) and tuples as lists."""
    if isinstance(value, float):
        return {"f": value.hex()}
    if isinstance(value, (list, tuple)):
        return [encode_literal(v) for v in value]
    if value is None or isinstance(value, (bool, int, str)):
        return value
    raise TaskError(f"literal {value!r} of type {type(value).__name__} has no canonical encoding")


def decode_literal(value: Any) -> Any:
    """The inverse of `encode_literal`; lists become tuples."""
    if isinstance(value, dict):
        return float.fromhex(value["f"])
    if isinstance(value, list):
        return tuple(decode_literal(v) for v in value)
    return value


def _substitute(arg: Any, symbols: Mapping[str, int]) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_substitute(a, symbols) for a in arg]
    if isinstance(arg, dict) and "s" in arg:
        return evaluate_dim(arg["s"], symbols)
    return arg


def evaluate_dim(dim: Dim, symbols: Mapping[str, int]) -> int:
    """The value of a size or stride expression (`+ - * // %`, `min` and `max` over ints and symbols).

    Raises:
        TaskError: for anything else.
    """
    if isinstance(dim, int):
        return dim
    code = _compiled_dim(dim)
    try:
        return int(eval(code, {"__builtins__": {}, "min": min, "max": max}, dict(symbols)))  # the tree was checked node by node
    except NameError as error:
        raise TaskError(f"size {dim!r}: {error}") from None


@functools.lru_cache(maxsize=4096)
def _compiled_dim(dim: str) -> Any:
    return compile(parse_dim(dim), "<size>", "eval")


_DIM_NODES = (ast.BinOp, ast.Add, ast.Sub, ast.Mult, ast.FloorDiv, ast.Mod, ast.Name, ast.Load, ast.Constant, ast.UnaryOp,
              ast.USub, ast.Call)  # fmt: skip


def parse_dim(dim: str) -> ast.Expression:
    """The tree of a size or stride expression, every node checked.

    Raises:
        TaskError: for anything but `+ - * // %`, `min` and `max` over ints and symbols.
    """
    try:
        tree = ast.parse(dim, mode="eval")
    except SyntaxError:
        raise TaskError(f"size {dim!r} is not an expression") from None
    for node in ast.walk(tree.body):
        number = not isinstance(node, ast.Constant) or type(node.value) is int
        call = not isinstance(node, ast.Call) or (ast.unparse(node.func) in ("min", "max") and node.args and not node.keywords)
        if not (isinstance(node, _DIM_NODES) and number and call):
            raise TaskError(f"size {dim!r}: only + - * // %, min and max over ints and symbols are allowed")
    return tree


def canonical_json(plain: Any) -> str:
    """JSON with sorted keys and no spaces: equal values give equal text."""
    return json.dumps(plain, sort_keys=True, separators=(",", ":"), allow_nan=False)


def digest(plain: Any) -> str:
    """First 20 hex digits of the sha256 of `canonical_json(plain)` (or of the text itself, given a str)."""
    text = plain if isinstance(plain, str) else canonical_json(plain)
    return hashlib.sha256(text.encode()).hexdigest()[:20]
