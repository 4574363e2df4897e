"""One spelling for every ATen call: all arguments of the schema by name, defaults filled in, literals normalised."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx

_SCALAR_SPELLING = {
    "aten.add.Scalar": torch.ops.aten.add.Tensor,
    "aten.sub.Scalar": torch.ops.aten.sub.Tensor,
    "aten.mul.Scalar": torch.ops.aten.mul.Tensor,
    "aten.div.Scalar": torch.ops.aten.div.Tensor,
    "aten._unsafe_view.default": torch.ops.aten.view.default,
    "aten.reshape.default": torch.ops.aten.view.default,
}
"""Overloads that compute the same as another one: both are written as the other."""

COMMUTATIVE = frozenset({"aten.add.Tensor", "aten.mul.Tensor", "aten.maximum.default", "aten.minimum.default"})


def op_name(node: fx.Node) -> str:
    """`aten.relu.default`, `getitem`, or an empty string for what is not a call of an operator."""
    if node.op != "call_function":
        return ""
    if node.target is operator.getitem:
        return "getitem"
    return str(node.target) if isinstance(node.target, torch._ops.OpOverload) else ""


def canonical_op(node: fx.Node) -> str:
    """`op_name`, with overloads that compute the same written as one of them."""
    name = op_name(node)
    return str(_SCALAR_SPELLING[name]) if name in _SCALAR_SPELLING else name


def arguments(node: fx.Node) -> dict[str, Any]:
    """Every argument by its name in the schema of `canonical_op`, in schema order, with defaults and normalised literals."""
    given, values = _given(node), {}
    schema = _SCALAR_SPELLING.get(op_name(node), node.target)._schema
    rank = next((v.meta["val"].ndim for v in given.values() if is_tensor(v)), None)
    if op_name(node) == "aten.unsqueeze.default":
        rank = node.meta["val"].ndim  # it names a dimension of its result
    floating = _is_floating(node)
    for argument in schema.arguments:
        value = given.get(argument.name, argument.default_value)
        values[argument.name] = _normalised(argument.name, value, str(argument.type), rank, floating)
    if "stride" in values and "kernel_size" in values and values["stride"] == []:
        values["stride"] = values["kernel_size"]  # pooling's documented default
    _widen_pairs(schema, values)
    return values


def _given(node: fx.Node) -> dict[str, Any]:
    names = [a.name for a in node.target._schema.arguments]  # type: ignore[union-attr]
    return {**dict(zip(names, node.args, strict=False)), **node.kwargs}


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, torch.Tensor) and value.is_floating_point()


def _normalised(name: str, value: Any, kind: str, rank: int | None, floating: bool) -> Any:
    """Dimensions count from the front; a number in a floating call is a float; `float` arguments are floats."""
    if name in ("dim", "dims") and rank:
        if isinstance(value, int):
            return value % rank
        if isinstance(value, (list, tuple)):
            counted = [d % rank for d in value]
            return sorted(counted) if name == "dim" else counted  # the order of reduced dimensions does not matter
    if isinstance(value, tuple):
        value = list(value)
    is_int = isinstance(value, int) and not isinstance(value, bool)
    if is_int and (kind in ("float", "Optional[float]") or (floating and kind in ("Tensor", "number") and name != "alpha")):
        return float(value)
    return value


def _widen_pairs(schema: Any, values: dict[str, Any]) -> None:
    """`int[2]` arguments given as one number mean two equal ones; so do one-element lists of a 2-D convolution."""
    for argument in schema.arguments:
        value = values[argument.name]
        if str(argument.type) == "List[int]" and argument.N == 2:
            value = [value] if isinstance(value, int) else value
            values[argument.name] = value * 2 if len(value) == 1 else value
    if schema.name == "aten::convolution":
        for name in ("stride", "padding", "dilation", "output_padding"):
            rank = len(_shape_of(values["input"])) - 2
            values[name] = values[name] * rank if len(values[name]) == 1 else values[name]


def _shape_of(node: fx.Node) -> tuple[Any, ...]:
    return tuple(node.meta["val"].shape)


def literal_of(value: Any) -> int | float | bool | None:
    """The number that an argument is: itself, or what a scalar-making node holds; None for anything else."""
    if isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, fx.Node):
        name = op_name(value)
        if name == "aten.scalar_tensor.default" and isinstance(value.args[0], (bool, int, float)):
            return value.args[0]
        if name == "aten.full.default" and list(value.args[0]) == [] and isinstance(value.args[1], (bool, int, float)):
            return value.args[1]
    return None


IDENTITIES = ("aten.alias.default", "aten.expand.default", "aten.clone.default")


def is_identity(node: fx.Node) -> bool:
    """Whether a call returns its argument's values in its argument's shape and strides (in a functional graph: does nothing)."""
    return op_name(node) in IDENTITIES and _layout(node) == _layout(node.args[0])  # type: ignore[arg-type]


def _layout(node: fx.Node) -> tuple[Any, ...]:
    return shape(node), tuple(size(s) for s in node.meta["val"].stride())


def unaliased(node: fx.Node) -> fx.Node:
    """The node whose value this one is, `alias` calls skipped."""
    while op_name(node) == "aten.alias.default":
        node = node.args[0]  # type: ignore[assignment]
    return node


def nodes_in(value: Any) -> Iterator[fx.Node]:
    """Every node inside an argument, in order."""
    if isinstance(value, fx.Node):
        yield value
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from nodes_in(item)


def is_tensor(value: Any) -> bool:
    """Whether an argument is a node that holds a tensor."""
    return isinstance(value, fx.Node) and isinstance(value.meta.get("val"), torch.Tensor)


def size(value: Any) -> Any:
    """A size or stride as an int or a sympy expression: comparing two adds no guard."""
    if isinstance(value, torch.SymInt):
        expression = value.node.expr
        return int(expression) if expression.is_number else expression
    return value


def shape(node: fx.Node) -> tuple[Any, ...]:
    """The sizes of a tensor node, as `size` gives them."""
    return tuple(size(s) for s in node.meta["val"].shape)


def returns_several(node: fx.Node) -> bool:
    """Whether a call returns more than one value, read through `getitem`."""
    return isinstance(node.meta.get("val"), (tuple, list))


def getitems(node: fx.Node) -> dict[int, fx.Node]:
    """The `getitem` readers of a call that returns several values, by index."""
    return {u.args[1]: u for u in node.users if u.target is operator.getitem}
