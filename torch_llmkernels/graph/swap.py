"""Put one region operator where a region's nodes were."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from torch_llmkernels.errors import TaskError
from torch_llmkernels.evaluation import Record
from torch_llmkernels.graph import op
from torch_llmkernels.task import Task

if TYPE_CHECKING:
    from torch_llmkernels.graph.task_of import RegionTask

_COPIED_META = ("recompute", "ac_graph_id", "partitioner_tag", "stack_trace", "nn_module_stack", "seq_nr", "custom")


def swap(graph: fx.Graph, region: RegionTask, record: Record, replaced: dict[fx.Node, fx.Node] | None = None) -> fx.Node:
    """Replace the region by a call of `llmk::region` bound to `record`, in place; returns the call.

    The call goes after the region's last input. The region's nodes stay, unread: `tidy` drops them once all swaps are done.

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
    inputs = [replaced.get(node, node) for node in region.inputs]
    if region.task.is_dynamic and not record.task.is_dynamic:
        _specialize(region, record.task)
    symbols = _size_nodes(graph, record.task, region, inputs)
    with graph.inserting_after(_last(graph, [*inputs, *symbols])):
        call = graph.call_function(op.region_op(), (op.encode_spec(record), inputs, symbols))
    try:
        _describe(call, region, record)
    except TaskError:
        graph.erase_node(call)
        raise
    with graph.inserting_after(call):
        for i, old in reversed(list(enumerate(region.outputs))):
            new = graph.call_function(operator.getitem, (call, i))
            new.meta = dict(old.meta)
            old.replace_all_uses_with(new)
            replaced[old] = new
    return call


def tidy(graph: fx.Graph) -> None:
    """Drop what the swaps left unread, and restore topological order: a swap may put a call behind the user of one output."""
    from torch._inductor.pattern_matcher import stable_topological_sort

    stable_topological_sort(graph)
    graph.eliminate_dead_code()


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
    values = [(node.meta["val"], spec) for node, spec in pairs]
    if any(
        (v.node.hint if isinstance(v, torch.SymInt) else v) != size
        for t, s in values
        for v, size in zip(t.shape, s.shape, strict=True)
    ):
        raise TaskError(f"{static.signature}: the sizes seen now are not those the kernel was looked up for")
    for value, _ in values:
        tuple(map(int, value.shape))


def _describe(call: fx.Node, region: RegionTask, record: Record) -> None:
    """Give the call its value and tags.

    Raises:
        TaskError: if an output of the graph has another dtype, shape or stride than the record's task says.
    """
    values = [node.meta["val"] for node in region.outputs]
    symbols = [node.meta["val"] for node in call.args[2]]  # type: ignore[union-attr]
    for spec, value in zip(record.task.outputs, values, strict=True):
        shape, stride = op.concrete_layout(record.task, spec, symbols)
        if not (_same(shape, value.shape) and _same(stride, value.stride()) and str(value.dtype) == f"torch.{spec.dtype}"):
            found = f"{value.dtype} {tuple(value.shape)} stride {tuple(value.stride())}"
            raise TaskError(f"{record.task.signature}: output {spec.name} is {found} in the graph, {spec} in the task")
    call.meta["val"] = values
    call.meta.update({name: region.outputs[0].meta[name] for name in _COPIED_META if name in region.outputs[0].meta})


def _same(promised: Sequence[Any], found: Sequence[Any]) -> bool:
    """Whether two lists of sizes are equal for every value of their symbols (no guard is added)."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return len(promised) == len(found) and all(statically_known_true(a == b) for a, b in zip(promised, found, strict=True))
