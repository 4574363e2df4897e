"""The roofline floor: bytes and operations counted by hand, and the ceilings they are divided by."""

from __future__ import annotations

import dataclasses

import pytest
from tasks import contiguous, layer_norm_task, matmul_task, relu_add_task

from torch_llmkernels.errors import SchemaError
from torch_llmkernels.evaluate import roofline
from torch_llmkernels.evaluate.roofline import Ceilings, count_flops, floor, measure_ceilings
from torch_llmkernels.kernels.device import cpu_facts, facts_for_arch
from torch_llmkernels.task import Node, Numerics, Task

H100 = Ceilings(copy=3.0e12, cache=3.0e12, fp32=50e12, tf32=380e12, fp16=690e12)


def attention_task(causal: bool) -> Task:
    names = ("query", "key", "value")
    args = (*({"v": n} for n in names), {"f": (0.0).hex()}, causal, None, None)
    program = (
        Node("n0", "aten._scaled_dot_product_flash_attention_for_cpu.default", args),
        Node("n1", "getitem", ({"v": "n0"}, 0)),
    )
    inputs = tuple(contiguous(n, "float32", (2, 4, 128, 64)) for n in names)
    return Task("attention", program, inputs, (contiguous("y", "float32", (2, 4, 128, 64)),), ("n1",), (), Numerics(), "cpu")


def test_a_norm_moves_each_tensor_once() -> None:
    found = floor(layer_norm_task(4096, 65536, device="cuda"), facts_for_arch("sm_90a"), H100)
    assert found.bytes == 2 * 4096 * 65536 * 4 + 2 * 65536 * 4
    assert found.bound == "bytes"
    assert found.ms == pytest.approx(found.bytes / 3.0e12 * 1e3)


def test_a_product_counts_two_operations_per_term() -> None:
    assert count_flops(matmul_task(128, 256, 64)) == (2 * 128 * 256 * 64, True)


def test_strict_float32_products_may_be_split_into_three_float16_ones() -> None:
    task = matmul_task(4096, 4096, 4096, "float32")
    strict = floor(task, facts_for_arch("sm_90a"), H100)
    assert strict.bound == "flops"
    assert strict.ms == pytest.approx(2 * 4096**3 / 230e12 * 1e3)
    half = floor(matmul_task(4096, 4096, 4096, "float16"), facts_for_arch("sm_90a"), H100)
    assert half.ms == pytest.approx(strict.ms / 3)
    loose = dataclasses.replace(task, numerics=Numerics(matmul="tf32"))
    assert floor(loose, facts_for_arch("sm_90a"), H100).ms < strict.ms


def test_on_a_cpu_a_strict_product_is_bound_by_the_measured_float32_product() -> None:
    found = floor(matmul_task(512, 512, 512, "float32"), cpu_facts(), Ceilings(1e12, 1e12, 1e11, 1e11, 16e11))
    assert found.bound == "flops" and found.ms == pytest.approx(2 * 512**3 / 1e11 * 1e3)
    assert found.impossible_ms < found.ms / 2  # the machine may be faster than when it was measured


def test_a_cpu_s_ceilings_are_the_best_of_all_measurements(monkeypatch: pytest.MonkeyPatch) -> None:
    found = iter([Ceilings(1, 4, 3, 1, 1), Ceilings(2, 3, 1, 1, 5)])
    monkeypatch.setattr(roofline, "_measure_cpu", lambda: next(found))
    monkeypatch.setattr(roofline, "_best_cpu", {})
    assert measure_ceilings("cpu") == Ceilings(1, 4, 3, 1, 1)
    assert measure_ceilings("cpu", again=True) == measure_ceilings("cpu") == Ceilings(2, 4, 3, 1, 5)


def test_fast_convolutions_are_not_impossible() -> None:
    args = ({"v": "x"}, {"v": "weight"}, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1)
    inputs = (contiguous("x", "float32", (32, 64, 56, 56)), contiguous("weight", "float32", (64, 64, 3, 3)))
    outputs = (contiguous("y", "float32", (32, 64, 56, 56)),)
    program = (Node("n0", "aten.convolution.default", args),)
    task = Task("conv2d", program, inputs, outputs, ("n0",), (), Numerics(), "cuda")
    assert count_flops(task) == (2 * 32 * 56 * 56 * 64 * 64 * 9, True)
    found = floor(task, facts_for_arch("sm_90a"), H100)
    assert found.bound == "flops" and found.impossible_ms < found.ms / 3


def test_attention_counts_both_products_and_half_of_them_if_causal() -> None:
    full = count_flops(attention_task(causal=False))
    assert full == (2 * 2 * 2 * 4 * 128 * 128 * 64, True)
    assert count_flops(attention_task(causal=True))[0] * 2 == full[0]


def test_small_outputs_may_stay_in_a_gpu_s_cache() -> None:
    found = floor(relu_add_task(1024, device="cuda"), facts_for_arch("sm_90a"), H100)
    assert found.impossible_ms == pytest.approx(2 * 4096 / 3.0e12 * 1e3)


def test_ceilings_of_this_cpu_are_measured_and_survive_json() -> None:
    ceilings = measure_ceilings("cpu")
    assert ceilings.copy > 1e8 and ceilings.fp32 > 1e8 and ceilings.cache >= ceilings.copy
    assert Ceilings.from_json(ceilings.to_json()) == ceilings
    assert floor(relu_add_task(1 << 20), cpu_facts(), ceilings).ms > 0
    with pytest.raises(SchemaError, match="measure them again"):
        Ceilings.from_json({"copy": 1.0})
