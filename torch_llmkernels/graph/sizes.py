"""Symbolic sizes of a region as the task writes them: `d0`, `d1`, ... and integer expressions over those."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import sympy
import torch
from torch import fx

from torch_llmkernels.errors import TaskError
from torch_llmkernels.graph.calls import size
from torch_llmkernels.task import Dim

_INFIX = {"FloorDiv": "//", "CleanDiv": "//", "Mod": "%", "PythonMod": "%"}


class Sizes:
    """Names of the dynamic sizes of one region, given out in order of first use.

    A product of sizes that an input has as one dimension (`B*T` after flattening) and that occurs only as that product becomes
    one symbol, so that the task does not depend on how the caller's tensor was shaped before.

    Args:
        values: Every tensor of the region, inputs, outputs and intermediates.
        inputs: Those that are inputs.
    """

    def __init__(self, values: Sequence[torch.Tensor], inputs: Sequence[torch.Tensor]) -> None:
        self._names: dict[sympy.Expr, str] = {}
        self._hints: dict[sympy.Expr, int] = {}
        symbolic = [s for v in values for s in (*v.shape, *v.stride()) if isinstance(s, torch.SymInt)]
        for value in symbolic:
            self._note(value)
        everything = {size(s) for s in symbolic}
        whole = [size(s) for v in inputs for s in v.shape if isinstance(s, torch.SymInt)]
        products = [e for e in dict.fromkeys(whole) if isinstance(e, (sympy.Mul, sympy.Pow))]
        self._whole = [e for e in products if _only_as_factor(e, everything)]
        self._stand_in = {e: sympy.Symbol(f"whole{i}", integer=True, positive=True) for i, e in enumerate(self._whole)}

    def _note(self, value: torch.SymInt) -> None:
        hint = value.node.hint
        if hint is not None:
            self._hints.setdefault(value.node.expr, int(hint))
        for symbol in value.node.expr.free_symbols:
            known = _known_values(value.node.shape_env).get(symbol)
            if known is not None:
                self._hints.setdefault(symbol, int(known))

    def dim(self, value: Any) -> Dim:
        """A size or stride as the task writes it.

        Raises:
            TaskError: for an expression that is not made of sums, products, integer division, remainder, minimum and maximum.
        """
        expression = size(value)
        if isinstance(expression, int):
            return expression
        for whole, stand_in in self._stand_in.items():
            if whole.free_symbols & expression.free_symbols:
                expression = sympy.cancel(expression / whole) * stand_in
        return self._printed(expression)

    def _printed(self, expression: sympy.Expr) -> str:
        """The expression in Python, the same text for equal expressions."""
        kind = type(expression).__name__
        if expression.is_Symbol:
            return self._name(expression)
        if expression.is_Integer:
            return str(int(expression))
        if expression.is_Mul:
            return "*".join(map(self._operand, self._ordered(expression)))
        if expression.is_Add:
            operands = self._ordered(expression)
            return "+".join(self._operand(e) for e in [*operands[operands[0].is_Integer :], *operands[: operands[0].is_Integer]])
        if expression.is_Pow and expression.exp.is_Integer and expression.exp > 0:
            return "*".join([self._operand(expression.base)] * int(expression.exp))
        if kind in _INFIX:
            a, b = map(self._operand, expression.args)
            return f"({a}{_INFIX[kind]}{b})"
        if kind == "ModularIndexing":
            a, b, c = map(self._operand, expression.args)
            return f"(({a}//{b})%{c})"
        if kind in ("Max", "Min"):
            return f"{kind.lower()}({','.join(map(self._printed, self._ordered(expression)))})"
        raise TaskError(f"size {expression} ({kind}) is too complex for a task; the region stays with Inductor")

    def _operand(self, expression: sympy.Expr) -> str:
        text = self._printed(expression)
        return f"({text})" if expression.is_Add or text.startswith("-") else text

    def _ordered(self, expression: sympy.Expr) -> list[sympy.Expr]:
        """The operands of a call that commutes: a number first, then by their text; torch's own names count only at first use."""

        def rank(e: sympy.Expr) -> tuple[bool, int, bool, str]:
            named = all(s in self._names for s in e.free_symbols)
            return not e.is_Integer, len(e.free_symbols), not named, self._printed(e) if named else str(e)

        return sorted(expression.args, key=rank)

    def _name(self, symbol: sympy.Expr) -> str:
        if symbol not in self._names:
            self._names[symbol] = f"d{len(self._names)}"
        return self._names[symbol]

    def _meaning(self, symbol: sympy.Expr) -> sympy.Expr:
        return {v: k for k, v in self._stand_in.items()}.get(symbol, symbol)

    def symbols(self) -> tuple[tuple[str, int], ...]:
        """Every name that was given out, with the size seen now.

        Raises:
            TaskError: if a size has never been seen (it depends on data).
        """
        try:
            return tuple((name, self._hints[self._meaning(s)]) for s, name in self._names.items())
        except KeyError as error:
            raise TaskError(f"size {error} depends on data; the region stays with Inductor") from None

    def sources(self, graph: fx.Graph) -> tuple[fx.Node | None, ...]:
        """For every name a node of the graph whose value is that size (the first), or None."""
        held: dict[sympy.Expr, fx.Node] = {}
        for node in graph.nodes if self._names else ():
            value = node.meta.get("val")
            if isinstance(value, torch.SymInt) and value.node.expr not in held and is_from_placeholders(node):
                held[value.node.expr] = node
        return tuple(held.get(self._meaning(s)) for s in self._names)


def is_from_placeholders(node: fx.Node) -> bool:
    """Whether a size is known before anything is computed: one read off a tensor of the region would close a cycle."""
    return node.op == "placeholder" or (bool(node.all_input_nodes) and all(map(is_from_placeholders, node.all_input_nodes)))


def _known_values(shape_env: Any) -> dict[sympy.Symbol, Any]:
    """Sizes seen for the environment's symbols; the attribute was renamed between torch releases."""
    return getattr(shape_env, "backed_var_to_val", None) or shape_env.var_to_val


def _only_as_factor(whole: sympy.Expr, everything: Iterable[Any]) -> bool:
    """Whether no size mentions the symbols of `whole` other than by a factor `whole`."""
    mine = whole.free_symbols
    others = [e for e in everything if not isinstance(e, int) and e.free_symbols & mine]
    return all(not (sympy.cancel(e / whole).free_symbols & mine) for e in others)
