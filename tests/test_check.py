"""The check: what an equal kernel passes, what a worse one does not, and what the numbers mean."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from tasks import contiguous, layer_norm_task, matmul_task, relu_add_task, softmax_task

from torch_llmkernels.evaluate import check as check_module
from torch_llmkernels.evaluate import statistics
from torch_llmkernels.evaluate.attention import attention, attention_backward
from torch_llmkernels.evaluate.check import check, exponential_outputs, non_finite_mismatch, symbol_values
from torch_llmkernels.evaluate.reference import condition, magnitude, precision, reference, yardstick
from torch_llmkernels.evaluate.statistics import FROBENIUS_RATIO, ErrorSums, Independence, MismatchCount, problem_scale
from torch_llmkernels.task import Node, Numerics, Task, TensorSpec


def permuted_matmul(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
    """The same arithmetic in another order of summation."""
    order = torch.randperm(a.shape[1])
    y.copy_(a[:, order] @ b[order])


def permuted_softmax(y: torch.Tensor, x: torch.Tensor) -> None:
    order = torch.randperm(x.shape[-1])
    y.copy_(torch.softmax(x[:, order], -1)[:, order.argsort()])


@pytest.mark.parametrize(
    "task, run",
    [
        (matmul_task(16, 24, 128, "float32", "cpu", b_transposed=True), permuted_matmul),
        (matmul_task(2, 3, 64, "float32", "cpu"), permuted_matmul),
        (softmax_task(8, 512), permuted_softmax),
    ],
    ids=["product", "tiny product", "softmax"],
)
def test_an_equal_kernel_does_not_fail_by_chance(task: Task, run) -> None:
    failures = [check(task, run, "quick", seed=seed)[1] for seed in range(25)]
    assert not any(failures), next(filter(None, failures))


def test_a_kernel_with_twice_the_error_fails() -> None:
    def worse(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        exact = a.double() @ b.double()
        y.copy_(exact + 2.5 * (a @ b - exact))

    errors, failure = check(matmul_task(32, 48, 512, "float32", "cpu"), worse)
    assert failure and "Frobenius" in failure and not errors[-1].passed


def test_products_in_lower_precision_fail() -> None:
    task = matmul_task(16, 24, 128, "float32", "cpu")
    _, failure = check(task, lambda y, a, b: y.copy_(a.bfloat16() @ b.bfloat16()))
    assert failure and "times the error allowed" in failure
    _, failure = check(task, lambda y, a, b: y.copy_(a.half().float() @ b.half().float()))
    assert failure


def test_errors_are_recorded_beside_the_yardstick_s() -> None:
    errors, failure = check(layer_norm_task(), lambda y, *x: y.copy_(torch.nn.functional.layer_norm(x[0], (64,), *x[1:])), "full")
    assert failure is None
    assert {e.distribution for e in errors} >= {"normal", "offset", "planted", "zeros"}
    assert all(e.passed and math.isfinite(e.maximum) for e in errors)
    normal = next(e for e in errors if e.distribution == "normal")
    assert normal.frobenius == normal.frobenius_yardstick > 0


def test_a_failure_says_where_and_what_was_expected() -> None:
    def wrong(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        y.copy_((a + b).relu())
        y[17] += 1

    _, failure = check(relu_add_task(64), wrong)
    assert failure and "y[17]" in failure and "expected" in failure and "distribution normal" in failure


def test_wrong_signs_of_infinity_fail() -> None:
    def flipped(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        y.copy_((a + b).relu())
        y[y.isinf()] *= -1

    _, failure = check(relu_add_task(64), flipped)
    assert failure and "where eager gives inf" in failure


def test_results_that_change_between_runs_fail_under_deterministic_mode() -> None:
    def drifting(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        y.copy_((a + b).relu())
        place = torch.randint(64, ())
        if y[place].isfinite():
            y[place].nextafter_(torch.tensor(9.0))

    task = relu_add_task(64)
    assert check(task, drifting)[1] is None
    _, failure = check(dataclasses.replace(task, numerics=Numerics(deterministic=True)), drifting)
    assert failure and "deterministic" in failure


def test_dynamic_tasks_are_checked_at_other_sizes() -> None:
    task = relu_add_task("d0", hints={"d0": 16})
    assert [s["d0"] for s in symbol_values(task, "quick")] == [16, 33, 1, 3]
    seen = []

    def run(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor, size: int) -> None:
        seen.append(size)
        y.copy_((a + b).relu())

    errors, failure = check(task, run)
    assert failure is None and set(seen) == {16, 33, 1, 3}
    assert any(e.distribution == "normal at d0=33" for e in errors)


def pool_task() -> Task:
    program = (
        Node("n0", "aten.max_pool2d_with_indices.default", ({"v": "x"}, [2, 2], [2, 2], [0, 0], [1, 1], False)),
        Node("n1", "getitem", ({"v": "n0"}, 0)),
        Node("n2", "getitem", ({"v": "n0"}, 1)),
    )
    outputs = (contiguous("y", "float32", (2, 3, 4, 4)), contiguous("indices", "int64", (2, 3, 4, 4)))
    inputs = (contiguous("x", "float32", (2, 3, 8, 8)),)
    return Task("max_pool2d", program, inputs, outputs, ("n1", "n2"), (), Numerics(), "cpu")


def test_integer_outputs_must_be_exact_where_nothing_rounds() -> None:
    def pool(y: torch.Tensor, indices: torch.Tensor, x: torch.Tensor) -> None:
        values, places = torch.nn.functional.max_pool2d(x, 2, return_indices=True)
        y.copy_(values)
        indices.copy_(places)

    def off_by_one(y: torch.Tensor, indices: torch.Tensor, x: torch.Tensor) -> None:
        pool(y, indices, x)
        indices[1, 2, 3, 3] += 1

    assert check(pool_task(), pool)[1] is None
    _, failure = check(pool_task(), off_by_one)
    assert failure and "indices[1, 2, 3, 3]" in failure


def test_indices_moved_by_rounding_are_allowed_for() -> None:
    count = MismatchCount("indices", "normal")
    truth = torch.arange(10_000)
    got = truth.clone()
    got[:3] += 1
    count.add(got, truth, truth, rounds=True, seed=0)
    assert count.ratio() <= 1
    count.add(got, truth, truth, rounds=False, seed=1)
    assert count.ratio() > 1


def test_the_reference_does_not_round_where_the_program_converts() -> None:
    program = (
        Node("n0", "aten._to_copy.default", ({"v": "x"}, {"dtype": "float16"}, None, None, None, False, None)),
        Node("n1", "aten._to_copy.default", ({"v": "n0"}, {"dtype": "float32"}, None, None, None, False, None)),
    )
    spec = (contiguous("x", "float32", (64,)),)
    task = Task("t", program, spec, (contiguous("y", "float32", (64,)),), ("n1",), (), Numerics(), "cpu")
    x = torch.randn(64)
    (truth,), (eager,) = reference(task, [x]), yardstick(task, [x])
    assert torch.equal(truth, x.double()) and not torch.equal(eager, x)


def test_precision_flags_hold_inside_and_are_restored() -> None:
    before = torch.backends.mkldnn.matmul.fp32_precision
    with precision(Numerics(matmul="bf16", deterministic=True)):
        assert torch.backends.mkldnn.matmul.fp32_precision == "bf16"
        assert torch.backends.cuda.matmul.fp32_precision == "tf32"
        assert torch.are_deterministic_algorithms_enabled()
    assert torch.backends.mkldnn.matmul.fp32_precision == before
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("causal", [False, True])
def test_attention_follows_torch_s_formula_and_gradient(causal: bool) -> None:
    q, k, v = (torch.randn(2, 3, n, 8, dtype=torch.float64, requires_grad=True) for n in (5, 7, 7))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=causal)
    out, lse = attention(q, k, v, causal=causal)
    assert torch.allclose(out, expected)
    grad = torch.randn_like(expected)
    gradients = attention_backward(grad, q, k, v, out, lse, causal=causal)[:3]
    assert all(torch.allclose(a, b) for a, b in zip(gradients, torch.autograd.grad(expected, (q, k, v), grad), strict=True))


def test_products_are_scaled_by_the_sum_of_their_terms() -> None:
    a, b = torch.tensor([[1.0, -1.0]]), torch.tensor([[3.0], [3.0]])
    task = matmul_task(1, 1, 2, "float32", "cpu")
    (size,) = magnitude(task, [a, b]) or [None]
    assert size is not None and size.item() == 6.0 and reference(task, [a, b])[0].item() == 0.0
    assert magnitude(softmax_task(), [torch.randn(8, 64)]) is None


def test_a_mean_that_cancels_is_scaled_by_its_terms() -> None:
    program = (Node("n0", "aten.mean.dim", ({"v": "x"}, [1], False, None)),)
    outputs = (contiguous("y", "float32", (4,)),)
    task = Task("mean", program, (contiguous("x", "float32", (4, 64)),), outputs, ("n0",), (), Numerics(), "cpu")
    x = torch.tensor([1.0, -1.0]).repeat(4, 32)
    truth = reference(task, [x])
    (size,) = condition(task, [x], truth)
    assert truth[0].abs().max() == 0 and bool(((size > 0.02) & (size < 0.5)).all())  # 1 / sqrt(64), at random


def test_small_probabilities_keep_their_own_scale() -> None:
    assert exponential_outputs(softmax_task()) == [True] and exponential_outputs(layer_norm_task()) == [False]
    truth = torch.full((4, 16), 1e-9, dtype=torch.float64)
    truth[:, 0] = 1.0
    assert problem_scale(truth, None, exponential=True)[0, 5] < 1e-7
    assert problem_scale(truth, None, exponential=False)[0, 0] == 1.0


def test_eager_s_overflow_need_not_be_copied() -> None:
    truth, eager = torch.tensor([100.0, 1.0], dtype=torch.float64), torch.tensor([math.inf, 1.0])
    assert non_finite_mismatch("y", torch.tensor([100.0, 1.0]), eager, truth) is None
    assert non_finite_mismatch("y", torch.tensor([math.inf, 1.0]), eager, truth) is None
    assert "y[0]" in (non_finite_mismatch("y", torch.tensor([7.0, 1.0]), eager, truth) or "")


def test_the_formulas_infinity_is_right_where_eagers_algorithm_makes_it_nan() -> None:
    eager, truth = torch.tensor([math.nan, 1.0]), torch.tensor([math.inf, 1.0], dtype=torch.float64)
    assert non_finite_mismatch("y", torch.tensor([math.inf, 1.0]), eager, truth) is None
    assert non_finite_mismatch("y", torch.tensor([math.nan, 1.0]), eager, truth) is None
    assert "y[0]" in (non_finite_mismatch("y", torch.tensor([-math.inf, 1.0]), eager, truth) or "")
    assert "y[0]" in (non_finite_mismatch("y", torch.tensor([3.0, 1.0]), eager, truth) or "")


def independent(error: torch.Tensor, runs: int = 4) -> float:
    counted = Independence()
    for part in error.chunk(runs):
        counted.add(part, torch.ones_like(part))
    return counted.count()


def test_shared_errors_count_once() -> None:
    g = torch.Generator().manual_seed(0)
    noise = torch.randn(256, 128, generator=g, dtype=torch.float64)
    assert independent(noise) > 0.5 * noise.numel()
    shared = torch.randn(256, 1, generator=g, dtype=torch.float64)
    assert independent(shared * torch.ones(1, 128)) < 2 * 256
    assert independent(shared * noise.sign() * (1 + 0.01 * noise)) < 2 * 256
    spike = torch.zeros(256, 128, dtype=torch.float64)
    spike[3, 5] = 1
    assert independent(spike) < 8


def test_one_ulp_of_the_output_always_passes() -> None:
    sums = ErrorSums("y", "normal", torch.float16)
    truth = torch.ones(1000, dtype=torch.float64)
    got = torch.full((1000,), 1 + 2**-10, dtype=torch.float16)
    sums.add(got, torch.ones(1000, dtype=torch.float16), truth, truth, seed=0)
    assert sums.ratio() <= 1
    sums.add(got + 2**-9, torch.ones(1000, dtype=torch.float16), truth, truth, seed=1)
    assert sums.ratio() > FROBENIUS_RATIO and "seed 1" in sums.worst.text


def test_outputs_need_not_be_row_major() -> None:
    task = relu_add_task(64)
    task = dataclasses.replace(
        task,
        inputs=tuple(TensorSpec(t.name, t.dtype, (4, 3, 5), (15, 1, 3)) for t in task.inputs),
        outputs=tuple(TensorSpec(t.name, t.dtype, (4, 3, 5), (16, 1, 3)) for t in task.outputs),
    )

    def wrong(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        y.copy_((a + b).relu())
        y[1, 2, 3] += 1

    assert check(task, lambda y, a, b: y.copy_((a + b).relu()))[1] is None
    assert "y[1, 2, 3]" in (check(task, wrong)[1] or "")


@pytest.mark.parametrize("kind", ["normal", "ties", "zeros", "few", "nan", "inf"])
def test_the_percentile_is_exact_however_it_is_found(kind: str) -> None:
    values = torch.randn(200_001, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).abs()
    values = {"ties": (values * 4).round(), "zeros": values * 0, "few": values[:7]}.get(kind, values)
    if kind in ("nan", "inf"):
        values[::50] = float(kind)
    exact = float(values.kthvalue(max(1, math.floor(statistics.PERCENTILE * values.numel()))).values)
    assert statistics._percentile(values) == statistics._finite(exact)


def test_masks_and_sums_tell_what_is_not_finite() -> None:
    for dtype in (torch.float16, torch.float32, torch.float64):
        values = torch.tensor([0.0, -1.0, torch.finfo(dtype).max, 5e-8, math.inf, -math.inf, math.nan], dtype=dtype)
        assert torch.equal(statistics.finite_mask(values), values.isfinite())
        assert statistics.all_finite(values[:2], values[:0])
        assert not any(statistics.all_finite(values[:2], values[i : i + 1]) for i in (4, 5, 6))


def test_answers_are_computed_once_for_probes_of_one_data_set(monkeypatch: pytest.MonkeyPatch) -> None:
    computed = []
    monkeypatch.setattr(check_module, "reference", lambda *a: computed.append(a) or reference(*a))
    task, answers = relu_add_task(64), check_module.Answers()

    def run(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        torch.add(a, b, out=y).relu_()

    for _ in range(3):
        assert check_module.check(task, run, "probe", answers=answers)[1] is None
    assert len(computed) == 1
    assert check_module.check(task, lambda y, a, b: y.zero_(), "probe", answers=answers)[1] is not None
