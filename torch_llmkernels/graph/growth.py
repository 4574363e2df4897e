"""Regions without a name: reductions and the pointwise calls around them, grown where no pattern matched.

From a reduction a region grows over pointwise producers that nothing else reads, and over readers as long as all readers of a
value can come along. Its signature is `pointwise_reduce.<digest>`, the digest of its program with every literal lifted: the same
code at another shape has the same name.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

from torch import fx

from torch_llmkernels.graph.calls import (
    COMMUTATIVE,
    arguments,
    canonical_op,
    getitems,
    is_tensor,
    literal_of,
    nodes_in,
    op_name,
    returns_several,
    shape,
    unaliased,
)
from torch_llmkernels.graph.patterns import POINTWISE, REDUCTIONS
from torch_llmkernels.task import digest

LIMIT = 24
"""Calls of a grown region, at most: more would be a model, not a kernel."""


@dataclasses.dataclass(frozen=True, eq=False)
class Grown:
    """A grown region before it is checked.

    Attributes:
        nodes: Its nodes, in no particular order.
        seed: The reduction it grew from.
    """

    nodes: frozenset[fx.Node]
    seed: fx.Node


def grow(graph: fx.Graph, allowed: Callable[[fx.Node, fx.Node], bool], cyclic: Callable[[set[fx.Node]], bool]) -> Iterator[Grown]:
    """Every grown region of the graph, in order; the caller takes one before it asks for the next.

    Args:
        graph: A functional ATen graph.
        allowed: Whether a node is free and may be together with the seed in one region.
        cyclic: Whether replacing these nodes by one would make a cycle.
    """
    order = {n: i for i, n in enumerate(graph.nodes)}
    for seed in graph.nodes:
        if op_name(seed) in REDUCTIONS and allowed(seed, seed):
            members = _grown_from(seed, order, lambda n, seed=seed: allowed(n, seed), cyclic)
            if any(canonical_op(n) in POINTWISE for n in members):
                yield Grown(frozenset(members), seed)


def _grown_from(
    seed: fx.Node, order: dict[fx.Node, int], allowed: Callable[[fx.Node], bool], cyclic: Callable[[set[fx.Node]], bool]
) -> set[fx.Node]:
    members = _with_getitems(seed)
    while True:
        offers = _offers(sorted(members, key=order.__getitem__), allowed)
        fitting = (more for more in offers if len(members | more) <= LIMIT and not cyclic(members | more))
        more = next(fitting, None)
        if more is None:
            return members
        members |= more


def _with_getitems(node: fx.Node) -> set[fx.Node]:
    return {node, *getitems(node).values()} if returns_several(node) else {node}


def _offers(members: list[fx.Node], allowed: Callable[[fx.Node], bool]) -> Iterator[set[fx.Node]]:
    """What could be taken next: producers that only the region reads, then all readers of one of its values."""
    for member in members:
        for producer in member.all_input_nodes:
            inner = producer not in members and canonical_op(producer) in POINTWISE and allowed(producer)
            if inner and all(u in members for u in producer.users):
                yield {producer}
    for member in members:
        readers = [u for u in member.users if u not in members]
        fusible = all((canonical_op(r) in POINTWISE or op_name(r) in REDUCTIONS) and allowed(r) for r in readers)
        if readers and fusible and len(readers) <= 3:
            yield {n for r in readers for n in _with_getitems(r)}


@dataclasses.dataclass(frozen=True, eq=False)
class Canonical:
    """A grown region in canonical form.

    Attributes:
        signature: `pointwise_reduce.<digest>`.
        inputs, outputs: (role, node) in canonical order.
        roles: (node, argument) -> role of the input there.
        first: Node -> its argument that comes first, for calls that commute.
    """

    signature: str
    inputs: tuple[tuple[str, fx.Node], ...]
    outputs: tuple[tuple[str, fx.Node], ...]
    roles: dict[tuple[fx.Node, str], str]
    first: dict[fx.Node, str]


def canonical(nodes: frozenset[fx.Node]) -> Canonical:
    """Name the inputs and outputs of a grown region independent of node order, node names and the order of commuting operands.

    Values are ordered by a hash of how they are made, then by how they are used, then by literals and shapes; outputs with more
    dimensions come first.
    """
    form = _Form(nodes)
    read = [n for n in nodes if is_tensor(n) and any(u not in nodes for u in n.users)]
    outputs = sorted(read, key=lambda n: (-n.meta["val"].ndim, form.rank(n)))
    for node in outputs:
        form.visit(node)
    text = digest([form.body, [form.names[n] for n in outputs]])[:10]
    named = tuple((f"y{i}" if i else "y", n) for i, n in enumerate(outputs))
    return Canonical(f"pointwise_reduce.{text}", tuple(form.inputs.items()), named, form.roles, form.first)


class _Form:
    def __init__(self, nodes: frozenset[fx.Node]) -> None:
        self.names: dict[fx.Node, str] = {}
        self.body: list[Any] = []
        self.inputs: dict[str, fx.Node] = {}
        self.roles: dict[tuple[fx.Node, str], str] = {}
        self.first: dict[fx.Node, str] = {}
        self._nodes = nodes
        self._made: dict[tuple[fx.Node, bool], str] = {}
        self._used: dict[fx.Node, str] = {}

    def rank(self, node: fx.Node) -> tuple[str, str, str]:
        """What values are ordered by."""
        return self._made_hash(node, False), self._used_hash(node), self._made_hash(node, True)

    def _made_hash(self, node: fx.Node, exact: bool) -> str:
        """How a value is computed; `exact` includes literals and layouts."""
        if (node, exact) not in self._made:
            value = node.meta["val"]
            layout = str((value.dtype, shape(node))) if exact and is_tensor(node) else ""
            if node in self._nodes:
                self._made[node, exact] = digest([canonical_op(node), layout, self._operands(node, exact)])
            else:
                self._made[node, exact] = digest(["input", layout])
        return self._made[node, exact]

    def _operands(self, node: fx.Node, exact: bool) -> list[Any]:
        if op_name(node) == "getitem":
            return [self._made_hash(node.args[0], exact), node.args[1]]  # type: ignore[arg-type]
        encoded = [self._operand(v, exact) for v in arguments(node).values()]
        return sorted(encoded[:2], key=str) + encoded[2:] if canonical_op(node) in COMMUTATIVE else encoded

    def _operand(self, value: Any, exact: bool) -> Any:
        if is_tensor(value) and literal_of(value) is None:
            return self._made_hash(unaliased(value) if value not in self._nodes else value, exact)
        return str(value) if exact and not isinstance(value, fx.Node) else "literal"

    def _used_hash(self, node: fx.Node) -> str:
        if node not in self._used:
            uses = [self._made_hash(u, False) + self._place(u, node) for u in node.users if u in self._nodes]
            self._used[node] = digest(sorted(uses))
        return self._used[node]

    def _place(self, user: fx.Node, node: fx.Node) -> str:
        if op_name(user) == "getitem" or canonical_op(user) in COMMUTATIVE:
            return ""
        return ",".join(name for name, value in arguments(user).items() if node in nodes_in(value))

    def visit(self, node: fx.Node) -> str:
        """Number a value and what it needs, depth first."""
        if node not in self.names:
            entry = self._entry(node)
            self.names[node] = f"n{len(self.body)}"
            self.body.append(entry)
        return self.names[node]

    def _entry(self, node: fx.Node) -> list[Any]:
        if op_name(node) == "getitem":
            return ["getitem", self.visit(node.args[0]), node.args[1]]  # type: ignore[arg-type]
        given = arguments(node)
        names = list(given)
        if canonical_op(node) in COMMUTATIVE:
            names[:2] = sorted(names[:2], key=lambda n: self._order(given[n]))
            self.first[node] = names[0]
        return [canonical_op(node), [self._argument(node, n, given[n]) for n in names]]

    def _order(self, value: Any) -> tuple[Any, ...]:
        return (0, *self.rank(value)) if is_tensor(value) and literal_of(value) is None else (1,)

    def _argument(self, node: fx.Node, name: str, value: Any) -> Any:
        if not is_tensor(value) or literal_of(value) is not None:
            return None if value is None else "literal"
        if value in self._nodes:
            return self.visit(value)
        value = unaliased(value)
        role = next((r for r, n in self.inputs.items() if n is value), f"x{len(self.inputs)}" if self.inputs else "x")
        self.inputs[role] = value
        self.roles[node, name] = role
        return role
