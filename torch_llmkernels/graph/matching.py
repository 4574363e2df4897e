"""Matching one pattern at one anchor: which nodes it would take, and what each tensor and literal is called."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Iterator
from typing import Any

from torch import fx

from torch_llmkernels.graph.calls import (
    COMMUTATIVE,
    IDENTITIES,
    arguments,
    canonical_op,
    getitems,
    is_identity,
    is_tensor,
    literal_of,
    op_name,
    returns_several,
    shape,
    unaliased,
)
from torch_llmkernels.graph.ignored import ignored_arguments, is_ignored
from torch_llmkernels.graph.patterns import THROUGH_VIEWS, VIEWS, Call, Pattern, Stage, Tree, tree_ops


@dataclasses.dataclass(frozen=True, eq=False)
class Step:
    """One matched stage.

    Attributes:
        label: Its part of the signature, may be empty.
        nodes: Its calls in order, views that lead to it first, `getitem`s last.
        source: The node that carries the chain value into it (outside of the step).
        result: The node that carries the chain value out of it.
        roles: (node, argument) -> role of the tensor or name of the parameter there.
        tensors: Role -> the tensor node that has it.
        outputs: Node -> role that it has if something outside reads it.
        chain: Node -> the argument that carries the chain value (or comes first, for a commutative call).
        prefix: What the parameters of its literals start with.
    """

    label: str
    nodes: tuple[fx.Node, ...]
    source: fx.Node
    result: fx.Node
    roles: dict[tuple[fx.Node, str], str]
    tensors: dict[str, fx.Node]
    outputs: dict[fx.Node, str]
    chain: dict[fx.Node, str]
    prefix: str


@dataclasses.dataclass(frozen=True, eq=False)
class Match:
    """A pattern matched around an anchor with some of its stages.

    Attributes:
        pattern: The pattern.
        steps: Its matched stages from top to bottom.
        anchor: The node whose op the scan found.
    """

    pattern: Pattern
    steps: tuple[Step, ...]
    anchor: fx.Node

    @property
    def signature(self) -> str:
        return ".".join(s.label for s in self.steps if s.label)

    @property
    def nodes(self) -> tuple[fx.Node, ...]:
        return tuple(n for s in self.steps for n in s.nodes)

    @property
    def calls(self) -> int:
        """How many calls it replaces, views and `getitem`s aside."""
        return sum(op_name(n) not in VIEWS and op_name(n) != "getitem" for n in self.nodes)


def matches(pattern: Pattern, node: fx.Node, backward: Collection[fx.Node] = ()) -> Iterator[Match] | str:
    """Every extent of `pattern` around the anchor `node`, or the reason why it is none.

    Args:
        pattern: The pattern.
        node: A call of its anchor's op.
        backward: The nodes that depend on a gradient: a match never mixes them with others.
    """
    anchor = _match_tree(pattern.anchor, node) if isinstance(pattern.anchor, Tree) else _match_anchor(pattern.anchor, node)
    if isinstance(anchor, str):
        return anchor
    phase = _Phase(backward, node in backward)
    above = _extend_up(anchor, pattern.before, phase)
    below = _extend_down(anchor, pattern.after, phase)
    missing = _missing(pattern.before, above) + _missing(pattern.after, below)
    if missing:
        return f"no {missing[0]}"
    return _extents(pattern, node, above, anchor, below)


@dataclasses.dataclass(frozen=True, eq=False)
class _Phase:
    backward: Collection[fx.Node]
    inside: bool

    def has(self, node: fx.Node) -> bool:
        return (node in self.backward) == self.inside


def _missing(stages: tuple[Stage, ...], found: list[tuple[Stage, Step]]) -> list[str]:
    have = {id(s) for s, _ in found}
    return [s.calls[0].op for s in stages if s.required and id(s) not in have]


def _extents(
    pattern: Pattern, node: fx.Node, above: list[tuple[Stage, Step]], anchor: Step, below: list[tuple[Stage, Step]]
) -> Iterator[Match]:
    for i in range(len(above) + 1):
        for j in range(len(below) + 1):
            left_out = [s for s, _ in above[: len(above) - i]] + [s for s, _ in below[j:]]
            if not any(s.required for s in left_out):
                steps = tuple([s for _, s in above[len(above) - i:]] + [anchor] + [s for _, s in below[:j]])
                yield Match(pattern, steps, node)


def _match_anchor(call: Call, node: fx.Node) -> Step | str:
    for argument in call.chain:
        step = _match_call(call, node, argument)
        if not isinstance(step, str):
            return step
    return step


def _match_call(call: Call, node: fx.Node, chain: str, views: tuple[fx.Node, ...] = ()) -> Step | str:
    """`node` as `call`, the chain value coming in by the argument `chain`; or why not."""
    given = arguments(node)
    source = given.get(chain)
    if not is_tensor(source):
        return f"{chain} is not a tensor"
    for name, want in call.where.items():
        if given[name] != want:
            return f"{name} is {given[name]!r}, not {want!r}"
    if call.rank is not None and source.meta["val"].ndim != call.rank:
        return f"{chain} has {source.meta['val'].ndim} dimensions, not {call.rank}"
    result, roles, tensors, outputs = node, {}, {}, {}
    tail: list[fx.Node] = []
    if returns_several(node):
        found = getitems(node)
        if len(found) != len(node.users):
            return "its results are read as one tuple"
        found = {i: n for i, n in found.items() if n.users}  # dead ones are no part of the computation
        if any(i in found and not is_ignored(found[i]) for i in call.unused):
            return "its random state is read"
        found = {i: n for i, n in found.items() if i not in call.unused}
        if not found:
            return "nothing reads it"
        tail = [found[i] for i in sorted(found)]
        result = found.get(0, tail[0])
        outputs = {found[i]: role for i, role in enumerate(call.outputs) if i in found and role}
    else:
        outputs[node] = call.outputs[0]
    if not outputs.get(result):
        outputs[result] = f"{call.label}_out" if call.label else "out"
    reason = _match_operand(call, node, given, chain)
    if reason:
        return reason
    ignored = ignored_arguments(node)
    for name in dict.fromkeys([*call.roles, *given]):
        value = given[name]
        if name == chain or name in ignored:
            continue
        if literal_of(value) is not None and is_tensor(value) and call.operand not in ("literal", "power_of_two"):
            continue
        if is_tensor(value) and literal_of(value) is None:
            if name not in call.roles:
                return f"{name} is a tensor"
            roles[node, name] = call.roles[name]
            if tensors.setdefault(call.roles[name], unaliased(value)) is not unaliased(value):
                return f"two tensors would be its {call.roles[name]}"
        elif name in call.params:
            roles[node, name] = call.params[name]
    return Step(call.label, (*views, node, *tail), source, result, roles, tensors, outputs, {node: chain}, call.label)


def _match_operand(call: Call, node: fx.Node, given: dict[str, Any], chain: str) -> str:
    """Why the other operand is not what the stage wants; empty if it is."""
    if call.operand == "any":
        return ""
    source, other = given[chain], given["other" if chain == "self" else "self"]
    number = literal_of(other)
    if call.operand == "literal":
        return "" if number is not None and _same_dtype(other, source) else "the other operand is not a number"
    if call.operand == "power_of_two":
        exact = number is not None and number > 0 and math.frexp(number)[0] == 0.5
        return "" if exact and _same_dtype(other, source) else "the divisor is not a power of two"
    if not is_tensor(other) or number is not None:
        return "the other operand is not a tensor"
    if node.meta["val"].dtype != source.meta["val"].dtype:
        return "the other operand changes the dtype"
    return "" if _fits(call.operand, shape(other), shape(source)) else "the other operand's shape does not fit"


def _same_dtype(other: Any, source: fx.Node) -> bool:
    return not isinstance(other, fx.Node) or other.meta["val"].dtype == source.meta["val"].dtype


def _fits(operand: str, other: tuple[Any, ...], chain: tuple[Any, ...]) -> bool:
    if operand == "same":
        return other == chain
    if operand == "last":
        return len(other) == 1 and other == chain[-1:]
    aligned = zip(reversed(other), reversed(chain), strict=False)
    return len(other) <= len(chain) and all(a in (1, b) for a, b in aligned)


def _extend_down(anchor: Step, stages: tuple[Stage, ...], phase: _Phase) -> list[tuple[Stage, Step]]:
    found: list[tuple[Stage, Step]] = []
    value, taken, used = anchor.result, set(anchor.nodes), dict(anchor.tensors)
    for stage in stages:
        options = [s for s in _readers(stage, value, phase) if not taken & set(s.nodes) and _agree(used, s.tensors)]
        if len(options) == 1:
            step = options[0]
            found.append((stage, step))
            value, taken, used = step.result, taken | set(step.nodes), used | step.tensors
    return found


def _agree(used: dict[str, fx.Node], more: dict[str, fx.Node]) -> bool:
    """Whether no role would name two tensors."""
    return all(used.get(role, node) is node for role, node in more.items())


def _readers(stage: Stage, value: fx.Node, phase: _Phase, views: tuple[fx.Node, ...] = ()) -> list[Step]:
    """Each reader of `value`, through views, as the stage's first alternative that it matches."""
    steps = []
    for user in value.users:
        if is_view(user) and len(views) < 4:
            steps += _readers(stage, user, phase, (*views, user))
        step = _first_alternative(stage, user, value, views) if phase.has(user) else None
        if step:
            steps.append(step)
    return steps


def _first_alternative(stage: Stage, node: fx.Node, value: fx.Node, views: tuple[fx.Node, ...]) -> Step | None:
    for call in stage.calls:
        if canonical_op(node) != call.op:
            continue
        carrying = [name for name in call.chain if arguments(node).get(name) is value]
        if len(carrying) == 1:
            step = _match_call(call, node, carrying[0], views)
            if isinstance(step, Step):
                return step
    return None


def _extend_up(anchor: Step, stages: tuple[Stage, ...], phase: _Phase) -> list[tuple[Stage, Step]]:
    """The stages above the anchor, top first."""
    found: list[tuple[Stage, Step]] = []
    value, used = anchor.source, dict(anchor.tensors)
    for i in reversed(range(len(stages))):
        step = _producer(stages[i], value, stages[:i], phase)
        if step and _agree(used, step.tensors):
            found.insert(0, (stages[i], step))
            value, used = step.source, used | step.tensors
    return found


def _producer(stage: Stage, value: fx.Node, higher: tuple[Stage, ...], phase: _Phase) -> Step | None:
    """The call that made `value`, through views, as the alternative and operand order that lets most higher stages match."""
    views: list[fx.Node] = []
    while is_view(value) and len(views) < 4:
        views.insert(0, value)
        value = value.args[0]  # type: ignore[assignment]
    made = value.args[0] if op_name(value) == "getitem" and value.args[1] == 0 else value
    if not isinstance(made, fx.Node) or made.op != "call_function" or not phase.has(made):
        return None
    options: list[tuple[int, Step]] = []
    for call in stage.calls:
        if canonical_op(made) != call.op:
            continue
        for chain in call.chain:
            step = _match_call(call, made, chain)
            if isinstance(step, Step) and step.result is value:
                options.append((len(_extend_up(step, higher, phase)), _with_views_after(step, tuple(views))))
    return max(options, key=lambda o: o[0])[1] if options else None


def _with_views_after(step: Step, views: tuple[fx.Node, ...]) -> Step:
    if not views:
        return step
    outputs = {**step.outputs, views[-1]: step.outputs[step.result]}
    return dataclasses.replace(step, nodes=(*step.nodes, *views), result=views[-1], outputs=outputs)


def is_view(node: fx.Node) -> bool:
    """Whether stages are looked for through this node: a view, or a call that returns its argument as it is."""
    return op_name(node) in VIEWS and (op_name(node) not in IDENTITIES or is_identity(node))


def _match_tree(tree: Tree, node: fx.Node) -> Step | str:
    """The tree whose rare call is `node`."""
    for root in _roots(tree, node):
        bound: dict[str, Any] = {}
        nodes: list[fx.Node] = []
        roles: dict[tuple[fx.Node, str], str] = {}
        first: dict[fx.Node, str] = {}
        if _bind(tree.root, root, bound, nodes, roles, first) and node in nodes:
            outputs = {n: tree.outputs.get(canonical_op(n), f"{tree.label}_{i}") for i, n in enumerate(nodes[:-1])}
            outputs[root] = f"{tree.label}_out"
            return Step(tree.label, tuple(nodes), bound[tree.chain], root, roles, bound, outputs, first, "")
    return f"not a {tree.label}"


def _roots(tree: Tree, node: fx.Node) -> Iterator[fx.Node]:
    """The calls that may be the root of the tree around `node`: it and what reads it, through the tree's ops and views."""
    ops, queue, seen = {*tree_ops(tree.root), *VIEWS}, [node], {node}
    wanted = tree.root[0] if isinstance(tree.root[0], tuple) else (tree.root[0],)
    while queue:
        here = queue.pop(0)
        if op_name(here) in wanted:
            yield here
        more = [user for user in here.users if user not in seen and op_name(user) in ops]
        queue += more
        seen.update(more)


def _bind(
    tree: Any, value: Any, bound: dict[str, Any], nodes: list[fx.Node], roles: dict[tuple[fx.Node, str], str],
    first: dict[fx.Node, str],
) -> bool:  # fmt: skip
    """Match the call tree at `value`; children before parents in `nodes`."""
    if tree[0] == THROUGH_VIEWS:
        return _bind_through_views(tree[1], value, bound, nodes, roles, first)
    ops = tree[0] if isinstance(tree[0], tuple) else (tree[0],)
    if not isinstance(value, fx.Node) or op_name(value) not in ops:
        return False
    given = arguments(value)
    names = list(given)
    orders = [names, [names[1], names[0], *names[2:]]] if canonical_op(value) in COMMUTATIVE else [names]
    for order in orders:
        trial = (dict(bound), list(nodes), dict(roles), dict(first))
        if all(_bind_argument(want, given[name], value, name, trial) for want, name in zip(tree[1:], order, strict=False)):
            for mine, tried in zip((bound, roles, first), (trial[0], trial[2], trial[3]), strict=True):
                mine.update(tried)
            nodes[:] = [*trial[1], value]
            first[value] = order[0]
            return True
    return False


def _bind_through_views(
    tree: Any, value: Any, bound: dict[str, Any], nodes: list[fx.Node], roles: dict[tuple[fx.Node, str], str],
    first: dict[fx.Node, str],
) -> bool:  # fmt: skip
    views: list[fx.Node] = []
    while isinstance(value, fx.Node) and op_name(value) in VIEWS:
        views.insert(0, value)
        value = value.args[0]
    if not _bind(tree, value, bound, nodes, roles, first):
        return False
    nodes += views
    first.update((view, "self") for view in views)
    return True


def _bind_argument(want: Any, value: Any, node: fx.Node, name: str, state: tuple[Any, Any, Any, Any]) -> bool:
    bound, nodes, roles, first = state
    if isinstance(want, tuple):
        return _bind(want, value, bound, nodes, roles, first)
    if not isinstance(want, str):
        return bool(value == want)
    if want.startswith("$"):
        roles[node, name] = want[1:]
        return literal_of(value) is not None or (isinstance(value, list) and all(isinstance(v, int) for v in value))
    roles[node, name] = want
    return is_tensor(value) and bound.setdefault(want, value) is value
