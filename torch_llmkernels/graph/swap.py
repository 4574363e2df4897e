"""Put one region operator where a region's nodes were."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torch_llmkernels.errors import TaskError
from torch_llmkernels.evaluation import Record
from torch_llmkernels.graph import op
from torch_llmkernels.graph.calls import arguments, op_name, size
from torch_llmkernels.graph.ignored import forget, is_ignored
from torch_llmkernels.graph.sizes import is_from_placeholders
from torch_llmkernels.task import Task

if TYPE_CHECKING:
    from torch_llmkernels.graph.task_of import RegionTask

_COPIED_META = ("recompute", "ac_graph_id", "partitioner_tag", "stack_trace", "nn_module_stack", "seq_nr", "custom")


def swap(graph: fx.Graph, region: RegionTask, record: Record, replaced: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
    """Replace the region by a call of `llmk::region` bound to `record`, in place; returns the call.

    Where the task sees a tensor in another shape than the graph, a view goes between. The call goes after the region's last
    input. The region's nodes stay, unread: `tidy` drops them once all swaps are done. A random state that a later call names but
    does not look at is replaced there by another of that call's arguments.

    Args:
        graph: A functional ATen graph with fake values in `meta["val"]`.
        region: What to replace.
        record: The kernel, made for an equal task, or for a dynamic task at the sizes seen now: these then become guards.
        replaced: Outputs of earlier swaps of this graph and what took their place; this swap reads it and adds to it.

    Raises:
        TaskError: if a size cannot be read off the inputs, or an output's strides are not those the task promises. The
            graph then computes what it did.
    """
    replaced = {} if replaced is None else replaced
    given = [replaced.get(node, node) for node in region.inputs]
    if region.task.is_dynamic and not record.task.is_dynamic:
        _specialize(region, record.task)
    shapes = [_size_arguments(graph, n.meta["val"].shape, given) if _is_viewed(region, n) else [] for n in region.outputs]
    inputs = [_viewed(graph, node, region, old) for node, old in zip(given, region.inputs, strict=True)]
    symbols = _size_nodes(graph, record.task, region, inputs)
    inputs += _prepared(graph, region, record, inputs)
    with graph.inserting_after(_last(graph, [*inputs, *symbols])):
        call = graph.call_function(op.region_op(), (op.encode_spec(record), inputs, symbols))
    try:
        _describe(call, region, record)
    except TaskError:
        graph.erase_node(call)  # what it read is dead now, and dropped with all else that is
        raise
    with graph.inserting_after(call):
        for i, old in reversed(list(enumerate(region.outputs))):
            replaced[old] = _output(graph, call, i, region, shapes[i])
            old.replace_all_uses_with(replaced[old])
    _forget_ignored(region)
    return call


def _forget_ignored(region: RegionTask) -> None:
    """Values of the region that something outside names but does not look at would keep the region itself alive."""
    inside = set(region.region.nodes)
    for value in [user for node in region.region.nodes for user in node.users if user not in inside]:
        if value.target is operator.getitem and value.users and is_ignored(value):
            forget(value)


def _prepared(graph: fx.Graph, region: RegionTask, record: Record, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """The workspaces that the kernel writes once, made by a call of `llmk::prepare` of the region's constants; else none."""
    spec = op.encode_spec(record)
    if not op.decode_spec(spec).prepared:
        return []
    named = dict(zip((t.name for t in record.task.inputs), inputs, strict=True))
    constants = [named[name] for name in record.task.constant]
    with graph.inserting_after(_last(graph, constants)):
        call = graph.call_function(op.prepare_op(), (spec, constants))
    call.meta = {"val": op.prepare_op()(spec, [n.meta["val"] for n in constants])} | _tags(region)
    made = []
    with graph.inserting_after(call):
        for i, value in enumerate(call.meta["val"]):
            made.append(graph.call_function(operator.getitem, (call, i)))
            made[-1].meta = {"val": value} | _tags(region)
    return made


def _output(graph: fx.Graph, call: fx.Node, index: int, region: RegionTask, sizes: Sequence[Any]) -> fx.Node:
    """One output of the call in the graph's own shape."""
    old = region.outputs[index]
    new = graph.call_function(operator.getitem, (call, index))
    new.meta = {**old.meta, "val": region.value(old)}
    if not _is_viewed(region, old):
        return new
    with graph.inserting_after(new):
        shown = graph.call_function(torch.ops.aten.view.default, (new, sizes))
    shown.meta = dict(old.meta)
    return shown


def _viewed(graph: fx.Graph, node: fx.Node, region: RegionTask, old: fx.Node) -> fx.Node:
    """The input `old`, by now `node`, in the shape that the task sees it in; an output of an earlier swap is not viewed twice."""
    wanted = region.value(old)
    if not _is_viewed(region, old):
        return node
    source = node.args[0] if node.target is torch.ops.aten.view.default else None
    if isinstance(source, fx.Node) and _layout(source.meta["val"]) == _layout(wanted):
        return source
    sizes = _size_arguments(graph, wanted.shape, [node])
    with graph.inserting_after(_last(graph, [node, *(n for n in sizes if isinstance(n, fx.Node))])):
        shown = graph.call_function(torch.ops.aten.view.default, (node, sizes))
    shown.meta = {"val": wanted} | _tags(region)
    return shown


def _is_viewed(region: RegionTask, node: fx.Node) -> bool:
    """Whether the task sees an input or output in another shape than the graph."""
    return region.value(node).ndim != node.meta["val"].ndim


def _layout(value: torch.Tensor) -> list[Any]:
    return [size(s) for s in (*value.shape, *value.stride())]


def _size_arguments(graph: fx.Graph, sizes: Iterable[Any], given: Sequence[fx.Node]) -> list[Any]:
    """Sizes as arguments of a view: ints, -1 for the only symbolic one, else a node for each of those.

    Raises:
        TaskError: if several are symbolic, and one of them is neither held by the graph nor a size of a tensor in `given`.
    """
    found = list(sizes)
    symbolic = [i for i, s in enumerate(found) if not isinstance(size(s), int)]
    if len(symbolic) == 1:
        return [-1 if i in symbolic else size(s) for i, s in enumerate(found)]
    return [_size_node(graph, s, given) if i in symbolic else size(s) for i, s in enumerate(found)]


def _size_node(graph: fx.Graph, wanted: torch.SymInt, given: Sequence[fx.Node]) -> fx.Node:
    for node in graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.SymInt) and size(value) == size(wanted) and is_from_placeholders(node):
            return node
    for position, node in enumerate(given):
        for dim, extent in enumerate(node.meta["val"].shape):
            if size(extent) == size(wanted):
                return _query(graph, position, torch.ops.aten.sym_size.int, dim, given)
    raise TaskError(f"the size {size(wanted)} of an output is not a size of any input, so the output cannot be viewed back")


def tidy(graph: fx.Graph) -> None:
    """Drop what the swaps left unread, and restore topological order: a swap may put a call behind the user of one output."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
    graph.eliminate_dead_code(_has_effects)


def _has_effects(node: fx.Node) -> bool:
    """As torch has it, except that attention without dropout draws no random numbers, although its operators say they might."""
    without_dropout = "attention" in op_name(node) and arguments(node).get("dropout_p") == 0.0
    return bool(node.is_impure()) and not without_dropout


def _last(graph: fx.Graph, nodes: Sequence[fx.Node]) -> fx.Node:
    """The node that comes last; the last placeholder of the graph if all are placeholders, which must stay together."""
    among = set(nodes)
    last = next(node for node in reversed(graph.nodes) if node in among)
    return next(node for node in reversed(graph.nodes) if node.op == "placeholder") if last.op == "placeholder" else last


def _size_nodes(graph: fx.Graph, task: Task, region: RegionTask, inputs: Sequence[fx.Node]) -> list[fx.Node]:
    """One node per symbol of the task, in its order: one that the graph has, or a new query of an input's size.

    Raises:
        TaskError: for a symbol that occurs only inside expressions.
    """
    nodes = []
    for (name, _), node in zip(region.task.symbols, region.symbols, strict=True) if task.symbols else ():
        nodes.append(node if node is not None else _query(graph, *_place(region, name), inputs))
    return nodes


def _query(graph: fx.Graph, position: int, query: Any, dim: int, inputs: Sequence[fx.Node]) -> fx.Node:
    """A node that asks the input at `position` for a size or stride, right behind it."""
    value = inputs[position].meta["val"]
    with graph.inserting_after(_last(graph, [inputs[position]])):
        node = graph.call_function(query, (inputs[position], dim))
    node.meta["val"] = (value.size if query is torch.ops.aten.sym_size.int else value.stride)(dim)
    return node


def _place(region: RegionTask, symbol: str) -> tuple[int, Any, int]:
    """The position of the input, the query and the dimension that a symbol can be read from."""
    for query, field in ((torch.ops.aten.sym_size.int, "shape"), (torch.ops.aten.sym_stride.int, "stride")):
        for position, spec in enumerate(region.task.inputs):
            if symbol in getattr(spec, field):
                return position, query, getattr(spec, field).index(symbol)
    raise TaskError(
        f"{region.task.signature}: the size {symbol} is not the size of any input's dimension, so it cannot be passed on"
    )


def _specialize(region: RegionTask, static: Task) -> None:
    """Fix the sizes of a dynamic region's tensors: reading a symbolic size as an int installs the guard.

    Raises:
        TaskError: if the sizes are not those of the static task.
    """
    pairs = zip((*region.inputs, *region.outputs), (*static.inputs, *static.outputs), strict=True)
    values = [(region.value(node), spec) for node, spec in pairs]
    if any(
        (v.node.hint if isinstance(v, torch.SymInt) else v) != size
        for t, s in values
        for v, size in zip(t.shape, s.shape, strict=True)
    ):
        raise TaskError(f"{static.signature}: the sizes seen now are not those the kernel was looked up for")
    for value in [node.meta["val"] for node in (*region.inputs, *region.outputs)] + [value for value, _ in values]:
        tuple(map(int, value.shape))


def _describe(call: fx.Node, region: RegionTask, record: Record) -> None:
    """Give the call its value and tags.

    Raises:
        TaskError: if an output of the graph has another dtype, shape or stride than the record's task says.
    """
    values = [region.value(node) for node in region.outputs]
    symbols = [node.meta["val"] for node in call.args[2]]  # type: ignore[union-attr]
    for spec, value in zip(record.task.outputs, values, strict=True):
        shape, stride = op.concrete_layout(record.task, spec, symbols)
        if not (_same(shape, value.shape) and _same(stride, value.stride()) and str(value.dtype) == f"torch.{spec.dtype}"):
            found = f"{value.dtype} {tuple(value.shape)} stride {tuple(value.stride())}"
            raise TaskError(f"{record.task.signature}: output {spec.name} is {found} in the graph, {spec} in the task")
    call.meta |= {"val": values} | _tags(region)


def _tags(region: RegionTask) -> dict[str, Any]:
    meta = region.outputs[0].meta
    return {name: meta[name] for name in _COPIED_META if name in meta}


def _same(promised: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether two lists of sizes are equal for every value of their symbols (no guard is added)."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(promised) == len(found) and all(statically_known_true(a == b) for a, b in zip(promised, found, strict=True))
