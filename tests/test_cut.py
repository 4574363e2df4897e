"""Tasks cut to sizes for the sanitizer: every dimension, consistently, with tails, and only as far as the kernel serves."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import contiguous, layer_norm_task, matmul_task, relu_add_task

from torch_llmkernels.cache.library import Library
from torch_llmkernels.evaluate.buffers import assign, empty
from torch_llmkernels.evaluate.cut import MOST_BYTES, MOST_FLOPS, STUCK_BYTES, cut, groups_of, span, with_sizes
from torch_llmkernels.evaluate.inputs import InputGenerator
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.roofline import count_flops
from torch_llmkernels.evaluate.sanitize import reduced
from torch_llmkernels.kernels.device import cpu_facts, facts_for_arch
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.program import module_of
from torch_llmkernels.task import Node, Numerics, Task, TensorSpec

CACHE = Path(__file__).parents[1] / "cache"


def records() -> list[Any]:
    paths = sorted((CACHE / "records").rglob("*.json"))
    return [pytest.param(json.loads(p.read_text()), id=f"{p.parents[1].name}-{p.parent.name}-{p.stem[:4]}") for p in paths]


def anything(task: Task) -> bool:
    return True


def shapes(task: Task) -> dict[str, tuple[int, ...]]:
    return {t.name: tuple(t.shape) for t in (*task.inputs, *task.outputs)}


@pytest.mark.parametrize("record", records())
def test_every_shipped_kernel_serves_a_small_cut_of_its_task_with_its_constants(record: dict[str, Any]) -> None:
    task = Task.from_json(record["task"])
    found = Library(CACHE, strict=True).record(task.key, record["device_kind"])
    assert found is not None
    facts = facts_for_arch("sm_90a") if task.device == "cuda" else cpu_facts()
    small = reduced(Job(task, found.kernel_text, found.kernel_name, constants=record["constants"]), facts)
    assert small is not None and small.constants == record["constants"]
    # the constants of both group norms, four blocks a group, are for groups as large as the task's: only the batch can shrink
    stuck = task.signature in ("group_norm", "group_norm_backward")
    assert span(small.task) <= (STUCK_BYTES if stuck else MOST_BYTES)
    assert count_flops(small.task)[0] <= MOST_FLOPS
    assert record["constants"] in parse_kernel(found.kernel_text).tunings(small.task, facts)
    assert shapes(small.task).keys() == shapes(task.at()).keys()


@pytest.mark.parametrize("record", records())
def test_the_program_of_a_cut_task_runs_and_gives_what_its_specs_say(record: dict[str, Any]) -> None:
    small = cut(Task.from_json(record["task"]).at(), anything)
    assert small is not None
    if any(name in node.op for node in small.program for name in ("cudnn", "efficient_attention")):
        pytest.skip("an operator that only a GPU has")
    if small.signature == "layer_norm_backward" and small.inputs[0].dtype == "bfloat16":
        pytest.skip("the CPU's operator wants the statistics in bfloat16, the GPU's in float32")
    small = dataclasses.replace(small, device="cpu")
    inputs = [empty(t, "cpu") for t in small.inputs]
    for tensor, values in zip(inputs, InputGenerator(small).make("normal", 0), strict=True):
        assign(tensor, values)
    outputs = module_of(small)(*inputs)
    assert [tuple(o.shape) for o in outputs] == [t.shape for t in small.outputs]


def test_a_small_task_is_itself() -> None:
    task = layer_norm_task(8, 64)
    assert cut(task, anything) is task


def test_the_three_sizes_of_a_product_are_cut_apart_even_if_they_are_equal() -> None:
    task = matmul_task(4096, 4096, 4096)
    assert len(groups_of(task)) == 3
    small = cut(task, lambda t: int(t.inputs[0].shape[1]) % 8 == 0 and int(t.outputs[0].shape[1]) % 4 == 0)
    assert small is not None
    (m, k), (_, n) = small.inputs[0].shape, small.inputs[1].shape
    assert (m % 2, k % 16, n % 8) == (1, 8, 4)  # tails as odd as the kernel serves
    assert small.outputs[0].shape == (m, n)


def test_normalized_dims_are_cut_with_weight_bias_and_the_program_s_literal() -> None:
    args = ({"v": "x"}, {"p": "normalized_shape"}, {"v": "weight"}, {"v": "bias"}, {"p": "eps"})
    program = (Node("n0", "aten.native_layer_norm.default", args), Node("n1", "getitem", ({"v": "n0"}, 0)))
    norm = tuple(contiguous(n, "float32", (64, 256, 256)) for n in ("weight", "bias"))
    x, y = (contiguous(n, "float32", (16, 64, 256, 256)) for n in "xy")
    params = (("eps", 1e-5), ("normalized_shape", (64, 256, 256)))
    small = cut(Task("layer_norm", program, (x, *norm), (y,), ("n1",), params, Numerics(), "cpu"), anything)
    assert small is not None
    inner = small.inputs[0].shape[1:]
    assert small.inputs[1].shape == small.inputs[2].shape == small.param["normalized_shape"] == inner
    assert inner != (64, 256, 256) and small.outputs[0].shape == small.inputs[0].shape


def test_broadcast_and_elementwise_sizes_stay_equal() -> None:
    small = cut(relu_add_task(1 << 24), anything)
    assert small is not None and len({t.shape for t in (*small.inputs, *small.outputs)}) == 1


def test_a_size_that_cannot_be_halved_still_gets_a_tail() -> None:
    small = cut(layer_norm_task(8192, 4096), lambda t: 2048 < int(t.inputs[1].shape[0]) <= 4096 and t.inputs[1].shape[0] % 4 == 0)
    assert small is not None and small.inputs[1].shape == (4092,)


def test_what_the_kernel_does_not_serve_is_not_cut() -> None:
    task = relu_add_task(1 << 24)
    assert cut(task, lambda t: t is task) is None


@pytest.mark.parametrize("stride, expected", [((1, 64), (1, 33)), ((80, 1), (65, 1)), ((0, 1), (0, 1))])
def test_order_gaps_and_repeats_of_the_layout_are_kept(stride: tuple[int, int], expected: tuple[int, int]) -> None:
    x = TensorSpec("x", "float32", (64, 64), stride)
    y = contiguous("y", "float32", (64, 64))
    task = Task("relu", (Node("n0", "aten.relu.default", ({"v": "x"},)),), (x,), (y,), ("n0",), (), Numerics(), "cpu")
    small = with_sizes(task, {("input", "x", 0): 33, ("input", "x", 1): 49})
    assert small is not None
    assert small.inputs[0].stride == expected and small.outputs[0].stride == (49, 1)
    assert torch.empty_strided(small.inputs[0].shape, small.inputs[0].stride).shape == (33, 49)


def test_a_convolution_s_bias_has_a_value_per_output_channel() -> None:
    tasks = (Task.from_json(json.loads(p.read_text())["task"]) for p in sorted((CACHE / "records").rglob("*.json")))
    task = next(t for t in tasks if t.signature.startswith("conv2d") and any(i.name == "bias" for i in t.inputs))
    channels = {t.name: t.shape for t in task.inputs}["bias"][0]
    assert with_sizes(task, {("input", "bias", 0): channels + 1}) is None
    assert with_sizes(task, {("input", "bias", 0): channels + 1, ("input", "weight", 0): channels + 1}) is not None


def test_a_cut_backward_of_group_norm_is_told_its_own_sizes() -> None:
    call = Node("n0", "aten.native_group_norm_backward.default",
                ({"v": "grad_y"}, {"v": "x"}, {"v": "mean"}, {"v": "rstd"}, {"v": "weight"}, 32, 256, 3136, {"p": "group"},
                 [True, True, True]))  # fmt: skip
    items = tuple(Node(f"n{i + 1}", "getitem", ({"v": "n0"}, i)) for i in range(3))
    image, statistics, channels = (32, 256, 56, 56), (32, 32), (256,)
    named = {"grad_y": image, "x": image, "mean": statistics, "rstd": statistics, "weight": channels}
    outs = {"grad_x": image, "grad_weight": channels, "grad_bias": channels}
    task = Task(
        signature="group_norm_backward", program=(call, *items), device="cuda", numerics=Numerics(), params=(("group", 32),),
        inputs=tuple(contiguous(name, "float32", shape) for name, shape in named.items()),
        outputs=tuple(contiguous(name, "float32", shape) for name, shape in outs.items()), results=("n1", "n2", "n3"),
    )  # fmt: skip
    small = cut(task, anything)
    assert small is not None and span(small) < span(task)
    batch, channel, *rest = small.inputs[1].shape
    assert small.program[0].args[5:8] == (batch, channel, int(rest[0]) * int(rest[1]))
