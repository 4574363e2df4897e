"""Which nodes of a functional ATen graph one kernel could replace.

`find_regions` scans for anchors, matches every pattern at each, and takes matches greedily: at each anchor the longest one that
some kernel serves first, then the ones with more calls, then the one that comes first in the graph. A match whose nodes are
partly taken gives way to a shorter extent of itself. Around the reductions that are left, regions without a name grow.
Everything that could have been a region and is none is a `Skipped` with its reason: of each anchor one, the longest match, also
where a shorter one was taken because a kernel serves it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection

import torch
from torch import fx

from torch_llmkernels.graph.calls import arguments, is_tensor, literal_of, nodes_in, op_name, unaliased
from torch_llmkernels.graph.growth import Grown, canonical, grow
from torch_llmkernels.graph.ignored import ignored_arguments, tensors_read
from torch_llmkernels.graph.matching import Match, is_view, matches
from torch_llmkernels.graph.patterns import PATTERNS, REDUCTIONS, Call, anchor_ops
from torch_llmkernels.task import ITEMSIZE

_TAGS = ("recompute", "ac_graph_id", "partitioner_tag")
_DTYPES = frozenset(getattr(torch, name) for name in ITEMSIZE)


@dataclasses.dataclass(frozen=True, eq=False)
class Region:
    """Nodes that one kernel may replace.

    Attributes:
        signature: The name, such as `conv2d.relu.max_pool2d`.
        nodes: In topological order; sizes are not among them.
        inputs: (role, tensor node), in the order of the task; one node may have two roles.
        outputs: (role, tensor node), the chain's result first.
        roles: (node, schema argument) -> role of the input tensor, or name of the parameter, there.
        first: Node -> its argument that comes first where the call commutes.
        prefixes: Node -> what the parameters of its literals start with; empty for the anchor.
    """

    signature: str
    nodes: tuple[fx.Node, ...]
    inputs: tuple[tuple[str, fx.Node], ...]
    outputs: tuple[tuple[str, fx.Node], ...]
    roles: dict[tuple[fx.Node, str], str]
    first: dict[fx.Node, str]
    prefixes: dict[fx.Node, str]


@dataclasses.dataclass(frozen=True)
class Skipped:
    """A candidate that did not become a region.

    Attributes:
        signature: What it would have been, or its anchor's op if no pattern matched.
        node: Name of its anchor in the graph.
        reason: One line.
    """

    signature: str
    node: str
    reason: str


def has_anchor(graph: fx.Graph) -> bool:
    """Whether some node of an ATen graph could start a region: one pass over the targets, nothing else."""
    ops = anchor_ops() | REDUCTIONS
    return any(op_name(n) in ops for n in graph.nodes)


def find_regions(graph: fx.Graph, serves: Callable[[Region], bool] = lambda region: False) -> tuple[list[Region], list[Skipped]]:
    """The regions of a functional ATen graph (inference, or joint forward and backward) and what was not taken.

    Args:
        graph: With `meta["val"]` on every node.
        serves: Whether a kernel exists for a region: a shorter match that one serves wins over a longer one that none does.

    Returns:
        Regions in topological order of their first node; no two overlap, and replacing all of them leaves no cycle. And what
        was not taken, among it the longest match of each anchor where a shorter, served one was.
    """
    if not has_anchor(graph):
        return [], []
    finder = _Finder(graph)
    found, skipped = _candidates(graph, finder.backward)
    order = finder.order
    found.sort(key=lambda m: (-m.calls, min(order[n] for n in m.nodes)))
    preferred = _longest_served(found, finder, serves)
    found.sort(key=lambda m: m not in preferred)  # stable
    refused: dict[fx.Node, Skipped] = {}
    for match in found:
        if match.anchor in finder.anchors:
            continue
        reason = finder.refusal(match)
        if reason:
            refused.setdefault(match.anchor, Skipped(match.signature, match.anchor.name, reason))
        else:
            finder.anchors.add(match.anchor)
            finder.take(_region(match, order))
            if passed_over := preferred.get(match):
                refused[match.anchor] = passed_over
    for grown in grow(graph, finder.may_join, lambda nodes: bool(finder.cycle(nodes))):
        reason = finder.refuse_nodes(tuple(grown.nodes))
        if reason:
            skipped.append(Skipped("pointwise_reduce", grown.seed.name, reason))
        else:
            finder.take(_grown_region(grown, order))
    skipped += refused.values()
    return sorted(finder.regions, key=lambda r: order[r.nodes[0]]), skipped


def _longest_served(
    found: list[Match], finder: _Finder, serves: Callable[[Region], bool]
) -> dict[Match, Skipped | None]:
    """Of the matches at each anchor, longest first, the first that some kernel serves -> the longest one that it is taken before.

    Of those, one that could have been taken says more than one that could not.
    """
    preferred: dict[Match, Skipped | None] = {}
    longest: dict[fx.Node, tuple[Match, str]] = {}  # what no kernel serves, and why it could not be taken anyway
    served: set[fx.Node] = set()
    for match in found:
        anchor = match.anchor
        if anchor in served:
            continue
        reason = finder.refusal(match)
        if not reason and serves(_region(match, finder.order)):
            served.add(anchor)
            longer, why = longest.get(anchor, (match, ""))
            why = why or f"no kernel serves it; the shorter {match.signature} is served"
            preferred[match] = Skipped(longer.signature, anchor.name, why) if longer.calls > match.calls else None
        elif anchor not in longest or (longest[anchor][1] and not reason):
            longest[anchor] = (match, reason)
    return preferred


def _candidates(graph: fx.Graph, backward: Collection[fx.Node]) -> tuple[list[Match], list[Skipped]]:
    by_op: dict[str, list] = {}
    for pattern in PATTERNS:
        by_op.setdefault(pattern.anchor.op, []).append(pattern)
    found: list[Match] = []
    skipped: list[Skipped] = []
    for node in graph.nodes:
        here: list[Match] = []
        reasons: list[str] = []
        for pattern in by_op.get(op_name(node), ()):
            result = matches(pattern, node, backward)
            if isinstance(result, str):
                reasons += [result] if isinstance(pattern.anchor, Call) else []
            else:
                here += result
        found += here
        if reasons and not here:
            skipped.append(Skipped(op_name(node), node.name, reasons[0]))
    return found, skipped


class _Finder:
    """The state of one selection: what is taken, and the contracted graph that the cycle check runs on."""

    def __init__(self, graph: fx.Graph) -> None:
        self.order = {n: i for i, n in enumerate(graph.nodes)}
        self.backward = _backward_nodes(graph)
        self.regions: list[Region] = []
        self.anchors: set[fx.Node] = set()
        self._owner: dict[fx.Node, Region] = {}

    def refusal(self, match: Match) -> str:
        """Why the match cannot be taken now; empty if it can."""
        taken = next((self._owner[n] for n in match.nodes if n in self._owner), None)
        if taken:
            return f"overlaps {taken.signature}"
        return self.refuse_nodes(match.nodes) or ("" if _outputs(match) else "nothing reads its result")

    def refuse_nodes(self, nodes: tuple[fx.Node, ...]) -> str:
        """Why these nodes cannot be one region, whatever they compute; empty if they can."""
        return _tag_refusal(nodes) or _tensor_refusal(nodes) or self.cycle(set(nodes))

    def may_join(self, node: fx.Node, seed: fx.Node) -> bool:
        """Whether a node is free and of the seed's phase and tags."""
        same_phase = (node in self.backward) == (seed in self.backward)
        return node not in self._owner and same_phase and not _tag_refusal((node, seed)) and not _tensor_refusal((node,))

    def take(self, region: Region) -> None:
        """Make its nodes taken."""
        self.regions.append(region)
        for node in region.nodes:
            self._owner[node] = region

    def cycle(self, inside: set[fx.Node]) -> str:
        """A path that leaves the nodes and comes back, with every taken region as one node; empty if there is none."""
        limit = self._limit(inside)
        queue = [i for n in inside for i in n.all_input_nodes if i not in inside]
        seen: set[fx.Node] = set()
        while queue:
            node = queue.pop()
            if node in inside:
                return "a path leaves it and comes back"
            if node in seen or self.order[node] < limit:
                continue
            members = self._owner[node].nodes if node in self._owner else (node,)
            seen.update(members)
            queue += [i for m in members for i in m.all_input_nodes if i not in members]
        return ""

    def _limit(self, inside: set[fx.Node]) -> int:
        """A position that no taken region spans, at or before the first of the nodes: nothing before it can reach back."""
        limit, moved = min(self.order[n] for n in inside), True
        while moved:
            spans = [(self.order[r.nodes[0]], self.order[r.nodes[-1]]) for r in self.regions]
            lower = min((a for a, b in spans if a < limit <= b), default=limit)
            moved, limit = lower < limit, lower
        return limit


def _backward_nodes(graph: fx.Graph) -> set[fx.Node]:
    """The nodes that depend on a gradient in a joint graph; none in an inference graph."""
    late = {n for n in graph.nodes if n.op == "placeholder" and n.name.startswith("tangents")}
    for node in graph.nodes if late else ():
        if any(i in late for i in node.all_input_nodes):
            late.add(node)
    return late


def _tag_refusal(nodes: tuple[fx.Node, ...]) -> str:
    for tag in _TAGS:
        if len({str(n.meta.get(tag)) for n in nodes}) > 1:
            return f"its nodes differ in {tag}"
    return ""


def _tensor_refusal(nodes: tuple[fx.Node, ...]) -> str:
    """Why some tensor that the nodes read or make is outside of what kernels serve."""
    tensors = {n for m in nodes for n in (m, *tensors_read(m)) if is_tensor(n)}
    scalars = {n for n in tensors if op_name(n) in ("aten.scalar_tensor.default", "aten.full.default")}
    for node in tensors - scalars:
        reason = _value_refusal(node.meta["val"])
        if reason:
            return f"{node.name} {reason}"
    devices = {n.meta["val"].device for n in tensors - scalars}
    if len(devices) > 1:
        return f"its tensors are on {' and '.join(sorted(map(str, devices)))}"
    return ""


def _value_refusal(value: torch.Tensor) -> str:
    from torch._subclasses.fake_tensor import FakeTensor

    if type(value) not in (FakeTensor, torch.Tensor, torch.nn.Parameter):
        return f"is a {type(value).__name__}"
    if value.device.type not in ("cpu", "cuda"):
        return f"is on {value.device.type}"
    if value.layout is not torch.strided or value.is_quantized or value.dtype not in _DTYPES:
        return f"has dtype {value.dtype} and layout {value.layout}".replace("torch.", "")
    if value.is_complex() or value.is_conj() or value.is_neg():
        return "is complex, conjugated or negated"
    if any(isinstance(s, int) and s == 0 for s in value.shape):
        return "has no elements"
    return _symbol_refusal(value)


def _symbol_refusal(value: torch.Tensor) -> str:
    symbolic = [s for s in (*value.shape, *value.stride()) if isinstance(s, torch.SymInt)]
    if any(str(f).startswith(("u", "zuf")) for s in symbolic for f in s.node.expr.free_symbols):
        return "has a size that depends on data"
    return ""


def _outputs(match: Match) -> list[tuple[str, fx.Node]]:
    """(role, node) of everything that something outside reads, the chain's result first.

    A view inside that somebody reads stays in the graph: what it looks at is the output.
    """
    inside = set(match.nodes)
    named = {n: role for s in match.steps for n, role in s.outputs.items()}
    last = match.steps[-1].result
    named[last] = _result_role(match, last)
    read = [n for s in match.steps for n in s.nodes if is_tensor(n) and not is_view(n) and _is_read(n, inside)]
    read.sort(key=lambda n: n is not last)
    outputs: list[tuple[str, fx.Node]] = []
    for node in read:
        role, taken = named[node], [r for r, _ in outputs]
        outputs.append((role if role not in taken else f"{role}_{len(taken)}", node))
    return outputs


def _is_read(node: fx.Node, inside: set[fx.Node]) -> bool:
    """Whether something outside reads a value, itself or through views inside."""
    return any(u not in inside or (is_view(u) and _is_read(u, inside)) for u in node.users)


def _result_role(match: Match, last: fx.Node) -> str:
    """The role of the chain's last value: the pattern's, unless the anchor ends the chain with another of its outputs."""
    step = match.steps[-1]
    several = op_name(last) == "getitem" and last.args[1] != 0
    return step.outputs[last] if several else match.pattern.result


def _region(match: Match, order: dict[fx.Node, int]) -> Region:
    inside = set(match.nodes)
    roles = {at: name for s in match.steps for at, name in s.roles.items()}
    first = {n: a for s in match.steps for n, a in s.chain.items()}
    top = match.steps[0]
    for node, argument in first.items():
        if (node, argument) not in roles and _argument_is(node, argument, top.source, inside):
            roles[node, argument] = match.pattern.entry
    inputs = _inputs(match, roles)
    prefixes = {n: s.prefix for s in match.steps for n in s.nodes}
    prefixes |= {n: "" for s in match.steps if match.anchor in s.nodes for n in s.nodes}
    return Region(
        match.signature, tuple(sorted(inside, key=order.__getitem__)), inputs, tuple(_outputs(match)), roles, first, prefixes
    )


def _grown_region(grown: Grown, order: dict[fx.Node, int]) -> Region:
    form = canonical(grown.nodes)
    nodes = tuple(sorted(grown.nodes, key=order.__getitem__))
    prefixes = {n: op_name(n).split(".")[1] if n.op == "call_function" and "." in op_name(n) else "" for n in nodes}
    return Region(form.signature, nodes, form.inputs, form.outputs, form.roles, form.first, prefixes)


def _argument_is(node: fx.Node, argument: str, source: fx.Node, inside: set[fx.Node]) -> bool:
    return source not in inside and arguments(node)[argument] is source


def _inputs(match: Match, roles: dict[tuple[fx.Node, str], str]) -> tuple[tuple[str, fx.Node], ...]:
    """(role, node) of every tensor from outside: the chain's first value, then in the order in which the pattern names them."""
    inside, found = set(match.nodes), dict[str, fx.Node]()
    for node in match.nodes:
        if op_name(node) == "getitem":
            continue
        ignored = ignored_arguments(node)
        for name, value in arguments(node).items():
            for read in nodes_in(value) if name not in ignored else ():
                if is_tensor(read) and read not in inside and literal_of(read) is None:
                    found.setdefault(roles.get((node, name), match.pattern.entry), unaliased(read))
    declared = [role for s in match.steps for role in s.tensors]
    order = list(dict.fromkeys([match.pattern.entry, *declared, *found]))
    return tuple((role, found[role]) for role in order if role in found)
