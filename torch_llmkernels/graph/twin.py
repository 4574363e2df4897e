"""A second copy of a captured graph, for a compilation that may not be the last one of that graph.

Inductor's pre-grad passes, the user's own among them, rewrite the graph module they are given in place. What is traced to look
for regions, and then compiled, would see their work twice.
"""

from __future__ import annotations

import copy

from torch import fx

_TABLES = ("_parameters", "_buffers", "_modules", "meta")
"""Attributes of a module that are tables: the twin has tables of its own, with the same things in them."""


def twin_of(gm: fx.GraphModule) -> fx.GraphModule:
    """A graph module with a graph of its own, subgraphs included; parameters, buffers and all other attributes are shared."""
    twin = gm.__new__(type(gm))  # a class of its own too: it carries the generated code
    for name, value in vars(gm).items():
        if name != "forward":  # bound to `gm`; the twin's comes with its graph
            vars(twin)[name] = copy.copy(value) if name in _TABLES else value
    for name, child in gm.named_children():
        if isinstance(child, fx.GraphModule):
            setattr(twin, name, twin_of(child))
    twin.graph = _copied(gm.graph)
    return twin


def _copied(graph: fx.Graph) -> fx.Graph:
    new = copy.deepcopy(graph)  # its nodes: what they name and what is in `meta` is shared
    for old_node, new_node in zip(graph.nodes, new.nodes, strict=True):
        if hasattr(old_node, "_dynamo_source"):  # where an input comes from, an attribute that `fx` does not know
            new_node._dynamo_source = old_node._dynamo_source
        new_node.meta.pop("grapharg", None)  # Dynamo's, which holds the example input, and drops it from its own graph
    return new
