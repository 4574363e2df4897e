"""Composite operators stay whole until the swaps are done, and then decompose as Inductor would have decomposed them."""

from __future__ import annotations

import pickle

import torch
from torch import fx
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx

from torch_llmkernels.graph.decompose import DecompTable, decomp_table, kept_operators, late_decompose

aten = torch.ops.aten


def targets(graph: fx.Graph) -> list[str]:
    return [str(node.target) for node in graph.nodes if node.op == "call_function"]


def traced(function, *inputs: torch.Tensor, table=None) -> fx.GraphModule:
    mode = FakeTensorMode()
    fakes = [mode.from_tensor(x) for x in inputs]
    with mode:
        return make_fx(function, table)(*fakes)


def block(x, weight):
    y = aten.native_layer_norm(x, [8], weight, None, 1e-5)[0]
    return aten._softmax(aten.gelu(y), -1, False)


def test_the_table_lacks_exactly_the_kept_operators() -> None:
    theirs, ours = select_decomp_table(), decomp_table()
    assert set(theirs) - set(ours) == kept_operators()
    assert all(ours[op] is theirs[op] for op in ours)


def test_composites_of_the_patterns_are_kept() -> None:
    assert {aten.native_layer_norm.default, aten._softmax.default, aten.addmm.default} <= kept_operators()
    assert not any(op._schema.is_mutable for op in kept_operators())


def test_the_table_pickles_as_a_reference() -> None:
    """torch pickles it into its cache keys: a table that did not pickle would switch the caches off."""
    text = pickle.dumps(decomp_table())
    assert len(text) < 200
    assert isinstance(pickle.loads(text), DecompTable)


def test_the_table_follows_fallback_random() -> None:
    with config.patch(fallback_random=True):
        exact = decomp_table()
    with config.patch(fallback_random=False):
        fast = decomp_table()
    assert set(exact) != set(fast)


def test_late_decomposition_gives_the_graph_of_inductors_table() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    ours = traced(block, x, weight, table=decomp_table())
    assert "aten.native_layer_norm.default" in targets(ours.graph)
    assert late_decompose(ours.graph) == 3
    ours.graph.eliminate_dead_code()
    theirs = traced(block, x, weight, table=select_decomp_table())
    theirs.graph.eliminate_dead_code()
    assert targets(ours.graph) == targets(theirs.graph)


def test_late_decomposition_computes_the_same() -> None:
    x, weight = torch.randn(4, 8), torch.randn(8)
    gm = traced(block, x, weight, table=decomp_table())
    late_decompose(gm.graph)
    gm.recompile()
    torch.testing.assert_close(gm(x, weight), block(x, weight))


def test_outputs_that_are_none_stay_none() -> None:
    """`output_mask` of a backward operator leaves some of its outputs undefined."""

    def backward(grad, x, mean, rstd):
        return aten.native_layer_norm_backward(grad, x, [8], mean, rstd, None, None, [True, False, False])[0]

    stats = torch.randn(4, 1)
    gm = traced(backward, torch.randn(4, 8), torch.randn(4, 8), stats, stats.abs(), table=decomp_table())
    assert late_decompose(gm.graph) == 1
    assert not kept_operators() & {node.target for node in gm.graph.nodes}


def test_recompute_tags_survive() -> None:
    """Activation checkpointing marks nodes; their decomposition must be marked as well."""
    gm = traced(lambda x: aten._softmax(x, -1, False), torch.randn(4, 8), table=decomp_table())
    softmax = next(node for node in gm.graph.nodes if node.target is aten._softmax.default)
    softmax.meta["recompute"] = "must recompute"
    late_decompose(gm.graph)
    calls = [node for node in gm.graph.nodes if node.op == "call_function"]
    assert calls and all(node.meta.get("recompute") == "must recompute" for node in calls)


def test_a_graph_without_composites_is_left_alone() -> None:
    gm = traced(lambda x: x.relu() + 1, torch.randn(4))
    before = targets(gm.graph)
    assert not late_decompose(gm.graph)
    assert targets(gm.graph) == before
