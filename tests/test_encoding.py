"""Keys outlive releases: a shipped record's task, run through this torch as a graph, is encoded as that very task again.

Keys are what records are found by. A torch that adds an argument to a schema, spells an operator in another way or orders a
commuting pair differently would make every record of that operator unreachable, without any error.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp

from torch_llmkernels.cache.library import Library
from torch_llmkernels.evaluate.reference import precision
from torch_llmkernels.evaluation import Record
from torch_llmkernels.graph.regions import find_regions
from torch_llmkernels.graph.task_of import task_of
from torch_llmkernels.program import module_of
from torch_llmkernels.task import Task, TensorSpec

RECORDS = list(Library(Path(__file__).parent.parent / "cache", strict=True).records())


def fake(spec: TensorSpec, device: str) -> torch.Tensor:
    """A tensor without memory; its device need not be here."""
    return torch.empty_strided(spec.shape, spec.stride, dtype=getattr(torch, spec.dtype), device=device)


def graph_of(task: Task) -> fx.Graph:
    """The task's program as a graph with values, as the backend's pass sees one.

    Outputs have the strides of the record: a convolution's depend on the libraries that torch was built with.
    """
    module = module_of(task)
    _take_reshapes_apart(module.graph)
    with FakeTensorMode() as mode, precision(task.numerics):
        FakeTensorProp(module, mode).propagate_dont_convert_inputs(*(fake(spec, task.device) for spec in task.inputs))
        for node, spec in zip(module.graph.output_node().args[0], task.outputs, strict=True):
            node.meta["val"] = fake(spec, task.device)
    return module.graph


def _take_reshapes_apart(graph: fx.Graph) -> None:
    """A reshape stands in a task's program where torch's graphs hold a copy and a view of it."""
    for node in graph.find_nodes(op="call_function", target=torch.ops.aten.reshape.default):
        source, shape = node.args
        with graph.inserting_before(node):
            copy = graph.call_function(torch.ops.aten.clone.default, (source,), {"memory_format": torch.contiguous_format})
            node.replace_all_uses_with(graph.call_function(torch.ops.aten.view.default, (copy, shape)))
        graph.erase_node(node)


@pytest.mark.parametrize("record", RECORDS, ids=lambda r: f"{r.device_kind}-{r.task.signature}-{r.task.key[:8]}")
def test_a_record_is_found_by_the_graph_that_it_was_made_for(record: Record) -> None:
    task = record.task.at()
    graph = graph_of(task)
    constant = {node for node in graph.nodes if node.name in task.constant}
    with precision(task.numerics):
        (found,) = (task_of(region, constant=constant).task for region in find_regions(graph)[0])
    assert found.to_json() == task.to_json()
    assert found.key == task.key
