"""Graph surgery: one call in the place of a region, wherever its inputs and readers are."""

from __future__ import annotations

import dataclasses

import graphs
import pytest
import torch
import torch.nn.functional as F
from swapping import record_of
from torch import fx

from torch_llmkernels.errors import TaskError
from torch_llmkernels.graph import op
from torch_llmkernels.graph.regions import find_regions
from torch_llmkernels.graph.swap import swap, tidy
from torch_llmkernels.graph.task_of import RegionTask, task_of


def regions_of(gm: fx.GraphModule) -> list[RegionTask]:
    return [task_of(region) for region in find_regions(gm.graph)[0]]


def swapped(gm: fx.GraphModule) -> fx.GraphModule:
    """Every region of the graph replaced by its reference behind the operator."""
    replaced: dict[fx.Node, fx.Node] = {}
    for region in regions_of(gm):
        swap(gm.graph, region, record_of(region.task), replaced)
    tidy(gm.graph)
    gm.graph.lint()
    gm.recompile()
    return gm


def calls(gm: fx.GraphModule) -> list[fx.Node]:
    return [node for node in gm.graph.nodes if node.target is op.region_op()]


def test_a_region_becomes_one_call() -> None:
    x = torch.randn(4, 8)
    gm = swapped(graphs.capture(lambda x: F.softmax(x, -1), x))
    (call,) = calls(gm)
    assert next(n.target for n in gm.graph.nodes if n.op == "call_function") is call.target
    torch.testing.assert_close(gm(x)[0], x.softmax(-1))


def test_regions_that_feed_each_other() -> None:
    """The second region's input is the first one's output, which a call has replaced by then."""
    x = torch.randn(4, 8)
    gm = swapped(graphs.capture(lambda x: F.softmax(F.softmax(x, -1).exp().softmax(0), -1), x))
    assert len(calls(gm)) == 3
    torch.testing.assert_close(gm(x)[0], F.softmax(F.softmax(x, -1).exp().softmax(0), -1))


def test_unused_outputs_leave_no_dead_nodes() -> None:
    x = torch.randn(4, 8)
    gm = swapped(graphs.capture(lambda x: F.layer_norm(x, [8]), x))
    assert not any("native_layer_norm" in str(node.target) for node in gm.graph.nodes)


def test_dynamic_sizes_are_passed_as_nodes() -> None:
    x = torch.randn(4, 8)
    gm = swapped(graphs.capture(lambda x: F.softmax(x, -1), x, dynamic=True))
    (call,) = calls(gm)
    assert len(call.args[2]) == len(op.decode_spec(call.args[0]).task.symbols) > 0
    assert all(isinstance(size, fx.Node) for size in call.args[2])


def test_tags_of_checkpointing_are_copied() -> None:
    gm = graphs.capture(lambda x: F.softmax(x, -1), torch.randn(4, 8))
    for node in gm.graph.nodes:
        node.meta["recompute"] = "must recompute"
    (call,) = calls(swapped(gm))
    assert call.meta["recompute"] == "must recompute"
    assert all(user.meta["recompute"] == "must recompute" for user in call.users)


def test_a_record_with_other_strides_is_refused() -> None:
    gm = graphs.capture(lambda x: F.softmax(x, -1), torch.randn(4, 8))
    (region,) = regions_of(gm)
    y = dataclasses.replace(region.task.outputs[0], stride=(1, 4))
    before = str(gm.graph)
    with pytest.raises(TaskError, match="in the graph"):
        swap(gm.graph, region, record_of(dataclasses.replace(region.task, outputs=(y,))))
    assert str(gm.graph) == before
