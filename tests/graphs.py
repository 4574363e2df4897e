"""Functional ATen graphs as the backend's pass sees them, captured without compiling anything."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import fx
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from torch_llmkernels.graph.decompose import decomp_table


def capture(fn: Callable[..., Any], *inputs: Any, training: bool = False, dynamic: bool | None = False) -> fx.GraphModule:
    """The inference graph of `fn(*inputs)`, or with `training` the joint forward and backward graph.

    Raises:
        RuntimeError: if Dynamo made more than one graph.
    """
    graphs: list[fx.GraphModule] = []

    def forward_only(gm: fx.GraphModule, _: Any) -> Callable[..., Any]:
        graphs.append(_snapshot(gm))
        return gm.forward

    def partition(joint: fx.GraphModule, joint_inputs: Any, **kwargs: Any) -> tuple[fx.GraphModule, fx.GraphModule]:
        graphs.append(_snapshot(joint))
        return min_cut_rematerialization_partition(joint, joint_inputs, **kwargs)

    backend = aot_autograd(
        fw_compiler=lambda gm, _: gm.forward, bw_compiler=lambda gm, _: gm.forward, inference_compiler=forward_only,
        partition_fn=partition, decompositions=decomp_table(), keep_inference_input_mutations=True,
    )  # fmt: skip
    torch._dynamo.reset()
    with torch.set_grad_enabled(training):
        torch.compile(fn, backend=backend, dynamic=dynamic, fullgraph=True)(*inputs)
    if len(graphs) != 1:
        raise RuntimeError(f"expected one graph, captured {len(graphs)}")
    return graphs[0]


def _snapshot(gm: fx.GraphModule) -> fx.GraphModule:
    """A copy whose nodes keep their metadata; the caller's passes may change the original."""
    graph = fx.Graph()
    graph.output(graph.graph_copy(gm.graph, {}))
    return fx.GraphModule(gm, graph)
