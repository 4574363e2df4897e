"""Input data: deterministic, of every named kind, valid for the operators that read it, in guarded memory."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from tasks import contiguous, layer_norm_task, matmul_task, softmax_task

from torch_llmkernels.evaluate.buffers import FINITE_BYTE, GuardedTensor
from torch_llmkernels.evaluate.inputs import DISTRIBUTIONS, InputGenerator
from torch_llmkernels.evaluate.roles import _attention_mask
from torch_llmkernels.task import Node, Numerics, Task, TensorSpec


def task_of(op: str, args: tuple, inputs: list[TensorSpec], output: TensorSpec, item: int | None = None) -> Task:
    program = [Node("n0", op, args)] + ([] if item is None else [Node("n1", "getitem", ({"v": "n0"}, item))])
    return Task("made", tuple(program), tuple(inputs), (output,), (program[-1].name,), (), Numerics(), "cpu")


def values(task: Task, distribution: str = "normal", seed: int = 0) -> dict[str, torch.Tensor]:
    made = InputGenerator(task).make(distribution, seed)
    return {t.name: v for t, v in zip(task.inputs, made, strict=True)}


def test_the_same_seed_gives_the_same_data_and_another_does_not() -> None:
    task = layer_norm_task()
    first, again, other = values(task, seed=3), values(task, seed=3), values(task, seed=4)
    assert all(torch.equal(first[n], again[n]) and not torch.equal(first[n], other[n]) for n in first)


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
@pytest.mark.parametrize("distribution", [name for name, _ in DISTRIBUTIONS])
def test_every_distribution_fits_every_format(distribution: str, dtype: str) -> None:
    x = values(softmax_task(32, 64, dtype), distribution)["x"]
    assert x.shape == (32, 64) and x.dtype is getattr(torch, dtype)
    assert bool(x.isfinite().all()) == (distribution != "planted")


def test_distributions_are_what_their_names_say() -> None:
    x = {name: values(softmax_task(64, 64), name)["x"] for name, _ in DISTRIBUTIONS}
    assert x["planted"].isnan().any() and x["planted"].isposinf().any() and x["planted"].isneginf().any()
    assert x["offset"].mean() > 500 * x["offset"].std()
    assert x["zeros"].abs().max() == 0 and x["relu"].min() == 0
    tiny = torch.finfo(torch.float32).smallest_normal
    assert ((x["denormals"] != 0) & (x["denormals"].abs() < tiny)).any()
    assert x["wide"].abs().max() > 1e4 * x["wide"].abs().median()
    assert x["outliers"].abs().max() > 20


def test_weights_stay_ordinary_and_are_never_ones_or_zeros() -> None:
    made = values(layer_norm_task(), "offset")
    assert made["x"].mean() > 500
    assert made["weight"].std() > 0.5 and made["bias"].std() > 0.5


def test_a_large_mean_goes_to_one_factor_of_a_product() -> None:
    made = values(matmul_task(8, 8, 8, "float32", "cpu"), "offset")
    assert made["a"].mean() > 500 > made["b"].abs().max()


def test_class_targets_lie_in_range_or_are_ignored() -> None:
    inputs = [contiguous("x", "float32", (512, 10)), contiguous("target", "int64", (512,))]
    args = ({"v": "x"}, {"v": "target"}, None, 1, -100)
    target = values(task_of("aten.nll_loss_forward.default", args, inputs, contiguous("y", "float32", ()), 0))["target"]
    assert set(target[target != -100].tolist()) == set(range(10))
    assert (target == -100).any() and target[0] != -100


def test_indices_lie_in_range() -> None:
    inputs = [contiguous("table", "float32", (7, 4)), contiguous("which", "int64", (256,))]
    task = task_of("aten.index_select.default", ({"v": "table"}, 0, {"v": "which"}), inputs, contiguous("y", "float32", (256, 4)))
    assert set(values(task)["which"].tolist()) == set(range(7))


def test_variances_are_positive() -> None:
    inputs = [contiguous("x", "float32", (2, 64, 4)), contiguous("mu", "float32", (64,)), contiguous("sigma", "float32", (64,))]
    args = ({"v": "x"}, None, None, {"v": "mu"}, {"v": "sigma"}, {"f": (0.1).hex()}, {"f": (1e-5).hex()})
    output = contiguous("y", "float32", (2, 64, 4))
    assert values(task_of("aten._native_batch_norm_legit_no_training.default", args, inputs, output, 0))["sigma"].min() > 0


def test_statistics_of_a_backward_are_those_of_its_input() -> None:
    names = {"grad": (8, 64), "x": (8, 64), "mean": (8, 1), "rstd": (8, 1), "weight": (64,), "bias": (64,)}
    inputs = [contiguous(n, "float32", s) for n, s in names.items()]
    v = {n: {"v": n} for n in names}
    args = (v["grad"], v["x"], [64], v["mean"], v["rstd"], v["weight"], v["bias"], [True, True, True])
    task = task_of("aten.native_layer_norm_backward.default", args, inputs, contiguous("y", "float32", (8, 64)), 0)
    made = values(task, "offset")
    assert torch.allclose(made["mean"], made["x"].mean(-1, keepdim=True))
    assert torch.allclose(made["rstd"], made["x"].std(-1, keepdim=True, unbiased=False).reciprocal(), rtol=1e-3)


def test_pooling_indices_are_those_of_the_forward() -> None:
    shapes = {"grad": (2, 3, 4, 4), "x": (2, 3, 8, 8), "indices": (2, 3, 4, 4)}
    inputs = [contiguous(n, "int64" if n == "indices" else "float32", s) for n, s in shapes.items()]
    args = ({"v": "grad"}, {"v": "x"}, [2, 2], [2, 2], [0, 0], [1, 1], False, {"v": "indices"})
    output = contiguous("y", "float32", (2, 3, 8, 8))
    made = values(task_of("aten.max_pool2d_with_indices_backward.default", args, inputs, output))
    assert torch.equal(made["indices"], torch.nn.functional.max_pool2d(made["x"], 2, return_indices=True)[1])


def test_attention_backward_gets_the_forward_s_results() -> None:
    shape = (2, 2, 16, 8)
    names = ["grad", "q", "k", "v", "out", "lse"]
    inputs = [contiguous(n, "float32", shape if n != "lse" else shape[:3]) for n in names]
    args = (*({"v": n} for n in names), {"f": (0.0).hex()}, False, None, None)
    task = task_of("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", args, inputs,
                   contiguous("y", "float32", shape), 0)  # fmt: skip
    made = values(task)
    expected = torch.nn.functional.scaled_dot_product_attention(made["q"], made["k"], made["v"])
    assert torch.allclose(made["out"], expected, atol=1e-5)
    scores = made["q"] @ made["k"].mT / 8**0.5
    assert torch.allclose(made["lse"], scores.logsumexp(-1), atol=1e-5)


def test_a_safe_softmax_meets_rows_that_hide_every_key() -> None:
    inputs = [contiguous("x", "float32", (64, 8)), contiguous("mask", "float32", (64, 8))]
    for op, empty in (("_softmax", False), ("_safe_softmax", True)):
        program = (
            Node("n0", "aten.add.Tensor", ({"v": "x"}, {"v": "mask"})),
            Node("n1", f"aten.{op}.default", ({"v": "n0"}, -1, *([False] if op == "_softmax" else []))),
        )
        task = Task("made", program, tuple(inputs), (contiguous("y", "float32", (64, 8)),), ("n1",), (), Numerics(), "cpu")
        hidden = values(task)["mask"] == float("-inf")
        assert hidden.any() and bool(hidden.all(-1).any()) == empty


def test_buffers_have_the_exact_layout_and_no_more_alignment_than_promised() -> None:
    spec = TensorSpec("x", "float32", (3, 5), (1, 7))
    buffer = GuardedTensor(spec, "cpu", alignment=16)
    assert buffer.tensor.stride() == (1, 7) and buffer.tensor.shape == (3, 5)
    assert buffer.tensor.data_ptr() % 16 == 0 and buffer.tensor.data_ptr() % 32 == 16


@pytest.mark.parametrize("where, offset", [("before", -4), ("after", 31 * 4), ("gaps", 3 * 4)])
def test_a_write_outside_the_elements_is_found(where: str, offset: int) -> None:
    buffer = GuardedTensor(TensorSpec("x", "float32", (3, 5), (1, 7)), "cpu")
    buffer.poison(FINITE_BYTE)
    buffer.load(torch.randn(3, 5))
    assert buffer.damage() is None
    start = buffer.tensor.data_ptr() - buffer.storage.data_ptr()
    buffer.storage[start + offset] = 0
    assert where in (buffer.damage() or "")


def test_expanded_inputs_are_loaded_once_per_element() -> None:
    buffer = GuardedTensor(TensorSpec("x", "float32", (4, 3), (0, 1)), "cpu")
    buffer.load(torch.arange(12.0).view(4, 3))
    assert torch.equal(buffer.tensor, torch.tensor([0.0, 1.0, 2.0]).expand(4, 3))


def test_integers_of_no_known_role_are_small() -> None:
    task = dataclasses.replace(softmax_task(), inputs=(contiguous("x", "int32", (8, 64)),))
    assert values(task)["x"].min() >= 0 and values(task)["x"].max() < 8


def test_masks_of_attention_are_random_causal_and_padded_in_turns_and_hide_no_row() -> None:
    masks = [_attention_mask([3, 2, 8, 8], torch.bool, torch.Generator().manual_seed(seed)) for seed in range(3)]
    for visible in masks:
        causal = [bool((batch == torch.ones(8, 8, dtype=torch.bool).tril()).all()) for batch in visible]
        padded = [bool((batch == batch[0, 0]).all()) for batch in visible]
        assert sum(causal) == 1 and sum(padded) == 1 and bool(visible.any(-1).all())
    seen = _attention_mask([3, 2, 8, 8], torch.float32, torch.Generator().manual_seed(7))
    assert sorted(len(batch[batch.isfinite()].unique()) > 1 for batch in seen) == [False, False, True]
    assert bool(_attention_mask([8], torch.bool, torch.Generator().manual_seed(0))[0])
    keys = _attention_mask([6, 1, 1, 64], torch.bool, torch.Generator().manual_seed(0))
    assert int((keys.sum(-1) == 1).sum()) == 0  # one query: no causal mask, which would leave one key
