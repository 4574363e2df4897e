"""Which values of a graph never change while it lives: parameters that Inductor freezes into it, and what is made of them alone.

Freezing happens behind our swap point: `compile_fx` runs the joint-graph passes first, then replaces parameters by constants and
folds. So the parameters are still inputs here, and this module foretells which of them Inductor will replace.
"""

from __future__ import annotations

import torch
from torch import fx

from torch_llmkernels.graph.calls import is_tensor


def constants_of(graph: fx.Graph) -> frozenset[fx.Node]:
    """The tensor nodes of an inference graph that will be constants; none unless Inductor freezes this graph.

    A mistake here costs time, never a wrong result: what is prepared from a node that is no constant in the end is prepared
    again at every call (`op.prepare_op`).
    """
    found = {node for node in _frozen_parameters(graph) if is_tensor(node)}
    for node in graph.nodes if found else ():
        if _is_pure(node) and node.all_input_nodes and all(i in found for i in node.all_input_nodes):
            found.add(node)
    return frozenset(node for node in found if is_tensor(node))


def _frozen_parameters(graph: fx.Graph) -> list[fx.Node]:
    """The placeholders that Inductor replaces: the captured module's own parameters, unless mutated or returned."""
    from torch._inductor import config

    context = torch._guards.TracingContext.try_get()
    metadata = context.fw_metadata if context else None
    if not config.freezing or torch.is_grad_enabled() or metadata is None:
        return []
    flat = getattr(context, "params_flat_unwrap_subclasses", None) or context.params_flat or []
    kept = {info.base_idx for info in metadata.output_info if info.base_idx is not None}
    kept |= {i for i, info in enumerate(metadata.input_info) if info.mutates_data or info.mutates_metadata}
    placeholders = graph.find_nodes(op="placeholder")
    return [node for i, (node, _) in enumerate(zip(placeholders, flat, strict=False)) if i not in kept]


def _is_pure(node: fx.Node) -> bool:
    target = node.target
    if node.op != "call_function" or not isinstance(target, torch._ops.OpOverload):
        return False
    return not target._schema.is_mutable and torch.Tag.nondeterministic_seeded not in target.tags
