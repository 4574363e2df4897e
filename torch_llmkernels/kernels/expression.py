"""The integer expressions of a kernel's header: `ceil_div(rows, ROWS)`, `cols % 4 == 0`, `1 <= x.shape[-1] < 65536`.

The language: int literals, names, `tensor.attribute`, `name[i]` with a literal index, `+ - * // %` (Python's floor
semantics), unary minus, chained comparisons (0 or 1), and `min`, `max`, `ceil_div`. Nothing else parses. Every intermediate value
must fit int64.
"""

from __future__ import annotations

import ast
import dataclasses
import functools
import operator
from collections.abc import Callable, Mapping

from torch_llmkernels.errors import ExpressionError

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
MAX_LENGTH = 400  # characters; also bounds the parser's recursion

_LANGUAGE = "an expression has ints, names, + - * // %, comparisons, min(...), max(...) and ceil_div(a, b), nothing else"
_BINARY: dict[type[ast.AST], Callable[[int, int], int]] = {
    ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul,
    ast.FloorDiv: operator.floordiv, ast.Mod: operator.mod,
}  # fmt: skip
_COMPARE: dict[type[ast.AST], Callable[[int, int], bool]] = {
    ast.Eq: operator.eq, ast.NotEq: operator.ne, ast.Lt: operator.lt,
    ast.LtE: operator.le, ast.Gt: operator.gt, ast.GtE: operator.ge,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Expression:
    """One parsed expression.

    Args:
        text: As written in the header.

    Raises:
        ExpressionError: if the text is outside the language.
    """

    text: str

    def __post_init__(self) -> None:
        _parse(self.text)

    def __str__(self) -> str:
        return self.text

    @property
    def names(self) -> frozenset[str]:
        """Every name it reads, in the environment's spelling: `cols`, `x.shape[-1]`, `stride[0]`, `device.sms`."""
        return _parse(self.text)[1]

    def evaluate(self, environment: Mapping[str, int]) -> int:
        """Its value.

        Raises:
            ExpressionError: for an unknown name, a division by zero, or a value outside int64.
        """
        return _evaluate(_parse(self.text)[0], environment, self.text)


@functools.lru_cache(maxsize=4096)
def _parse(text: str) -> tuple[ast.expr, frozenset[str]]:
    if len(text) > MAX_LENGTH:
        raise ExpressionError(f"expression {text[:40]!r}... is longer than {MAX_LENGTH} characters; split it into dims")
    try:
        tree = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise ExpressionError(f"expression {text!r} does not parse; {_LANGUAGE}") from None
    names: set[str] = set()
    _check(tree, text, names)
    return tree, frozenset(names)


def _check(node: ast.expr, text: str, names: set[str]) -> None:
    name = spelled(node)
    if name is not None:
        names.add(name)
        return
    for child in _operands(node, text):
        _check(child, text, names)


def _operands(node: ast.expr, text: str) -> list[ast.expr]:
    """The operands of an operator node; refuses every node outside the language."""
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            if not INT64_MIN <= value <= INT64_MAX:
                raise ExpressionError(f"expression {text!r}: {value} does not fit int64")
            return []
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return [operand]
        case ast.BinOp(left=left, op=op, right=right) if type(op) in _BINARY:
            return [left, right]
        case ast.Compare(left=left, ops=ops, comparators=right) if all(type(op) in _COMPARE for op in ops):
            return [left, *right]
        case ast.Call(func=ast.Name(id="min" | "max"), args=args, keywords=[]) if args:
            return args
        case ast.Call(func=ast.Name(id="ceil_div"), args=[left, right], keywords=[]):
            return [left, right]
    raise ExpressionError(f"expression {text!r}: {ast.unparse(node)!r} is not allowed; {_LANGUAGE}")


def spelled(node: ast.expr) -> str | None:
    """`name`, `name.attribute`, and either with a literal `[i]`, as one string; None for any other node."""
    match node:
        case ast.Name(id=name):
            return name
        case ast.Attribute(value=ast.Name(id=name), attr=attribute):
            return f"{name}.{attribute}"
        case ast.Subscript(value=(ast.Name() | ast.Attribute()) as value, slice=index):
            base, position = spelled(value), _literal(index)
            return f"{base}[{position}]" if base is not None and position is not None else None
    return None


def _literal(node: ast.expr) -> int | None:
    match node:
        case ast.Constant(value=int() as value) if not isinstance(value, bool):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() as value)) if not isinstance(value, bool):
            return -value
    return None


def _evaluate(node: ast.expr, environment: Mapping[str, int], text: str) -> int:
    name = spelled(node)
    if name is not None:
        if name not in environment:
            raise ExpressionError(f"expression {text!r}: {name!r} has no value here")  # unknown names are refused by the parser
        return environment[name]
    if isinstance(node, ast.Constant):
        return int(node.value)  # `_check` allowed ints only
    values = [_evaluate(child, environment, text) for child in _operands(node, text)]
    try:
        value = _apply(node, values)
    except ZeroDivisionError:
        raise ExpressionError(f"expression {text!r}: division by zero in {ast.unparse(node)!r}") from None
    if not INT64_MIN <= value <= INT64_MAX:
        raise ExpressionError(f"expression {text!r}: {ast.unparse(node)!r} is {value}, which does not fit int64")
    return value


def _apply(node: ast.expr, values: list[int]) -> int:
    match node:
        case ast.UnaryOp():
            return -values[0]
        case ast.BinOp(op=op):
            return _BINARY[type(op)](values[0], values[1])
        case ast.Compare(ops=ops):
            pairs = zip(ops, values, values[1:], strict=False)
            return int(all(_COMPARE[type(op)](a, b) for op, a, b in pairs))
        case ast.Call(func=ast.Name(id="min")):
            return min(values)
        case ast.Call(func=ast.Name(id="max")):
            return max(values)
    return -(-values[0] // values[1])  # ceil_div, the only form left
