"""A task runs, and reads, as what its region computed."""

from __future__ import annotations

from typing import Any

import pytest
import tasks
import torch
import zoo
from graphs import capture
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

from torch_llmkernels.errors import TaskError
from torch_llmkernels.graph.regions import find_regions
from torch_llmkernels.graph.task_of import task_of
from torch_llmkernels.program import module_of, operator_of, python_source
from torch_llmkernels.task import Task, TensorSpec


def sample(spec: TensorSpec, symbols: dict[str, int]) -> Tensor:
    """A tensor of exactly this shape and stride; integers are zeros, so that they are valid indices."""
    at = spec.at(symbols)
    length = 1 + sum((n - 1) * s for n, s in zip(at.shape, at.stride, strict=True))
    dtype = getattr(torch, spec.dtype)
    flat = torch.rand(length) if dtype.is_floating_point else torch.zeros(length)
    return torch.as_strided(flat.to(dtype), at.shape, at.stride)


def run_source(task: Task, values: list[Any]) -> tuple[Tensor, ...]:
    namespace: dict[str, Any] = {}
    exec(python_source(task), namespace)
    result = namespace[task.signature.replace(".", "_")](*values)
    return result if isinstance(result, tuple) else (result,)


def graph_tasks(name: str, training: bool, dynamic: bool) -> list[Task]:
    model, inputs = zoo.CASES[name]
    gm = capture(model().train(training), *inputs(), training=training, dynamic=dynamic)
    return [task_of(r).task for r in find_regions(gm.graph)[0]]


CASES = [
    ("resnet_channels_last", False, False), ("resnet", True, False),
    ("digits", True, False), ("gpt", True, False), ("gpt", False, True),
    ("encoder", True, False), ("hand_attention", True, False), ("dropout", True, False),
]  # fmt: skip


@pytest.mark.parametrize(("name", "training", "dynamic"), CASES, ids=lambda v: str(v))
def test_module_and_source_of_every_region_agree_with_the_graph(name: str, training: bool, dynamic: bool) -> None:
    found = graph_tasks(name, training, dynamic)
    assert found
    for task in found:
        symbols = dict(task.symbols)
        values = [sample(t, symbols) for t in task.inputs] + list(symbols.values())
        results = module_of(task)(*values)
        with FakeTensorMode() as mode:  # its strides are the graph's; on channels_last, torch 2.14's group_norm returns others
            fake = module_of(task)(*[mode.from_tensor(v) if isinstance(v, Tensor) else v for v in values])
        for spec, result, traced in zip(task.outputs, results, fake, strict=True):
            at = spec.at(symbols)
            assert (tuple(result.shape), traced.stride(), str(result.dtype)) == (at.shape, at.stride, f"torch.{at.dtype}"), task
        for mine, read in zip(results, run_source(task, values), strict=True):
            torch.testing.assert_close(mine, read, rtol=0, atol=0, equal_nan=True)


def test_module_runs_at_other_symbol_values() -> None:
    task = tasks.softmax_task("d0", 64, hints={"d0": 8})
    (y,) = module_of(task)(torch.randn(3, 64), 3)
    torch.testing.assert_close(y.sum(-1), torch.ones(3))


def test_source_shows_types_strides_and_parameters() -> None:
    source = python_source(tasks.matmul_task(b_transposed=True))
    assert "# b: float16 [64, 128], stride [1, 64]" in source
    assert "y = a @ b" in source
    source = python_source(tasks.layer_norm_task(stats=True))
    assert "    *,\n    eps=1e-05, normalized_shape=(64,),\n" in source
    assert "y, mean, rstd = " in source
    assert "y = F.layer_norm(x, normalized_shape, weight, bias, eps)" in python_source(tasks.layer_norm_task())


def test_infinite_parameters_are_written_as_python() -> None:
    def masked(x: Tensor, drop: Tensor) -> Tensor:
        return torch.softmax(x.masked_fill(drop, float("-inf")), -1)

    x, drop = torch.randn(4, 8), torch.rand(4, 8) > 0.5
    (region,) = find_regions(capture(masked, x, drop).graph)[0]
    (y,) = run_source(task_of(region).task, [x, drop])
    torch.testing.assert_close(y, masked(x, drop), rtol=0, atol=0, equal_nan=True)


def test_an_unknown_operator_names_the_torch_that_lacks_it() -> None:
    with pytest.raises(TaskError, match=f"torch {torch.__version__.split('+')[0]}"):
        operator_of("aten.no_such_operator.default")
