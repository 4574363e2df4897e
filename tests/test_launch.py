"""Expressions, macros, workspaces and plans: from a header to the numbers of a launch."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tasks
from torch_llmkernels.errors import ExpressionError, NotApplicable
from torch_llmkernels.kernels import launch
from torch_llmkernels.kernels.device import DeviceFacts, cpu_level, cuda_arch, facts_for_arch, slug
from torch_llmkernels.kernels.expression import Expression
from torch_llmkernels.kernels.plan import plan_launches
from torch_llmkernels.kernels.source import Kernel, parse_kernel
from torch_llmkernels.task import TensorSpec

FACTS = facts_for_arch("sm_90a")
TEXT = """/*---
implements = "layer_norm"
target     = "cuda"
dtypes     = ["float32", "float64", "float16"]
optional   = ["weight", "bias"]
where      = ["cols <= 4096"]
dims       = { cols = "x.shape[-1]", rows = "x.numel // cols" }
static     = ["cols"]
tune       = { THREADS = [128] }
[[workspace]]
name  = "partial"
dtype = "ACC"
shape = ["cols", "2"]
zero  = true
[[launch]]
kernel = "ln"
grid   = ["rows", "HAS_BIAS + 1"]
block  = ["THREADS"]
smem   = "cols * x.itemsize"
args   = ["x", "weight", "bias", "partial", "y", "rows", "eps", "cols * 2"]
---*/
extern "C" __global__ void ln(const T* x, const T_weight* weight, const T_bias* bias, ACC* p, T_y* y, int rows, ACC eps,
                              int64_t n) {}
"""


def kernel(old: str = "", new: str = "") -> Kernel:
    assert old in TEXT
    return parse_kernel(TEXT.replace(old, new), "ln")


@pytest.mark.parametrize(
    "text, value",
    [
        ("1 + 2 * 3 - 4", 3), ("-7 // 2", -4), ("-7 % 4", 1), ("ceil_div(7, 2)", 4), ("min(3, 1, 2)", 1), ("max(n, 2)", 5),
        ("1 < n < 6", 1), ("1 < n < 5", 0), ("n == 5", 1), ("x.shape[-1] + stride[0]", 10), ("(n)", 5),
    ],
)  # fmt: skip
def test_expressions_have_the_values_of_python_integers(text: str, value: int) -> None:
    assert Expression(text).evaluate({"n": 5, "x.shape[-1]": 8, "stride[0]": 2}) == value


@pytest.mark.parametrize(
    "text",
    ["", "1.5", "True", "'a'", "n / 2", "n ** 2", "n << 1", "n and 1", "not n", "f(n)", "n.a.b", "n[i]", "[1]", "lambda: 1",
     "n if n else 1", "min()", "ceil_div(1)", "min(n, key=n)", "__import__('os')", "(n := 2)", "~n", "n[True]", "n in n",
     "9" * 30, "(" * 300 + "1" + ")" * 300,
     "+".join(["n"] * 300)],
)  # fmt: skip
def test_everything_outside_the_language_is_refused(text: str) -> None:
    with pytest.raises(ExpressionError, match="expression"):
        Expression(text)


def test_errors_of_evaluation_name_the_expression() -> None:
    for text, message in (("n // (n - n)", "division by zero"), ("n % 0", "division by zero"), ("m + 1", "'m' has no value"),
                          ("n * 9223372036854775807", "does not fit int64")):  # fmt: skip
        with pytest.raises(ExpressionError, match=message):
            Expression(text).evaluate({"n": 5})


@settings(max_examples=100, deadline=None)
@given(st.integers(-(2**40), 2**40), st.integers(1, 2**20))
def test_ceil_div_is_the_smallest_cover(a: int, b: int) -> None:
    value = Expression("ceil_div(a, b)").evaluate({"a": a, "b": b})
    assert (value - 1) * b < a <= value * b


def test_the_environment_has_every_documented_name() -> None:
    names = launch.environment(kernel(), tasks.layer_norm_task(6, 32, bias=False, device="cuda"), {"THREADS": 128}, FACTS)
    expected = {"rows": 6, "cols": 32, "THREADS": 128, "x.shape[0]": 6, "x.stride[-2]": 32, "x.ndim": 2, "x.itemsize": 4,
                "HAS_WEIGHT": 1, "HAS_BIAS": 0, "normalized_shape[0]": 32, "device.sms": 132, "weight.numel": 32}  # fmt: skip
    assert expected.items() <= names.items()


def test_macros_give_types_presence_parameters_dims_and_tunables() -> None:
    found = launch.macros(kernel(), tasks.layer_norm_task(6, 32, "float16", "cuda", bias=False), {"THREADS": 128})
    expected = {"T": "half", "ACC": "float", "T_y": "half", "T_bias": "T", "HAS_WEIGHT": "1", "HAS_BIAS": "0",
                "P_EPS": "((ACC)(1e-05))", "P_NORMALIZED_SHAPE_0": "32", "COLS": "32", "THREADS": "128"}  # fmt: skip
    assert expected.items() <= found.items()
    assert launch.macros(kernel(), tasks.layer_norm_task(dtype="float64", device="cuda"), {"THREADS": 128})["ACC"] == "double"


def test_a_plan_has_every_number_and_the_places_of_the_pointers() -> None:
    plan = plan_launches(kernel(), tasks.layer_norm_task(6, 32, bias=False, device="cuda"), {"THREADS": 128}, FACTS)
    step = plan.launches[0]
    assert (step.grid, step.block, step.smem) == ((6, 1, 1), (128, 1, 1), 128)
    # the call is (y, partial, x, weight); the absent bias is null
    assert [a.position for a in step.args if a.type == "pointer"] == [2, 3, None, 1, 0]
    assert [(a.type, a.value) for a in step.args[5:]] == [("i32", 6), ("f32", 1e-5), ("i64", 64)]
    assert plan.zero == ((1, 32 * 2 * 4),) and plan.tensors == 4


def test_a_dynamic_task_is_planned_for_its_symbol_values() -> None:
    task = tasks.layer_norm_task("d0", 32, device="cuda", hints={"d0": 6})
    assert kernel().why_not(task) is None
    assert plan_launches(kernel(), task, {"THREADS": 128}, FACTS, {"d0": 9}).launches[0].grid[0] == 9
    with pytest.raises(NotApplicable, match=r"rows = 2147483648 does not fit the i32 parameter rows|grid"):
        plan_launches(kernel(), task, {"THREADS": 128}, FACTS, {"d0": 2**31})


def test_nothing_is_launched_for_empty_outputs() -> None:
    task = tasks.layer_norm_task("d0", 32, device="cuda", hints={"d0": 6})
    plan = plan_launches(kernel(), task, {"THREADS": 128}, FACTS, {"d0": 0})
    assert plan.empty and not plan.launches


@pytest.mark.parametrize(
    "old, new, message",
    [
        ('"cols <= 4096"', '"cols < 32"', "where 'cols < 32' fails: cols = 32"),
        ('["THREADS"]', '["THREADS * 16"]', "block .2048"),
        ('["rows", "HAS_BIAS + 1"]', '["rows - 6"]', "grid .0"),
        ('"cols * x.itemsize"', '"cols * 10000"', "320000 bytes of shared memory, the device has 232448"),
        ("smem   =", 'cluster = ["4"]\nsmem   =', "not a multiple of the cluster"),
        ('"cols * 2"', '"cols // (cols - 32)"', "division by zero"),
    ],
)
def test_what_the_device_or_the_kernel_cannot_do_is_not_applicable(old: str, new: str, message: str) -> None:
    with pytest.raises(NotApplicable, match=message):
        plan_launches(kernel(old, new), tasks.layer_norm_task(6, 32, device="cuda"), {"THREADS": 128}, FACTS)


def test_workspaces_have_sizes_and_dtypes_of_the_task() -> None:
    (found,) = launch.workspaces(kernel(), tasks.layer_norm_task(6, 32, "float64", "cuda"), {"THREADS": 128}, FACTS)
    assert (found.name, found.dtype, found.shape, found.zero) == ("partial", "float64", (32, 2), True)


def test_a_workspace_of_dynamic_size_has_one_at_a_call() -> None:
    task = tasks.layer_norm_task("d0", 32, device="cuda", hints={"d0": 6})
    dynamic = kernel('["cols", "2"]', '["rows", "2"]')
    assert dynamic.why_not(task) is None
    assert launch.has_dynamic_workspace(dynamic, task) and not launch.has_dynamic_workspace(kernel(), task)
    with pytest.raises(NotApplicable, match="dynamic size"):
        launch.workspaces(dynamic, task, {"THREADS": 128}, FACTS)
    (found,) = launch.workspaces(dynamic, task, {"THREADS": 128}, FACTS, {"d0": 40})
    assert found.shape == (40, 2)


def test_device_facts_round_trip_and_name_kinds() -> None:
    assert DeviceFacts.from_json(FACTS.to_json()) == FACTS
    assert FACTS.kind == "nvidia-h100" and slug("NVIDIA A100-SXM4-80GB") == "nvidia-a100-sxm4"
    assert slug("NVIDIA GeForce RTX 4090") == "nvidia-geforce-rtx-4090"
    assert cuda_arch(8, 9) == "sm_89" and cuda_arch(9, 0) == "sm_90a" and cuda_arch(12, 0) == "sm_120a"
    assert cpu_level("x86_64", frozenset({"avx2", "fma"})) == "avx2" and cpu_level("x86_64", frozenset()) == "generic"


def test_contiguity_and_products_of_list_parameters_are_names() -> None:
    text = KERNEL_OF_LISTS
    task = tasks.layer_norm_task(8, 64)
    names = launch.environment(parse_kernel(text), task, {})
    assert names["x.contiguous"] == 1 and names["cols"] == 64
    transposed = dataclasses.replace(task, inputs=(dataclasses.replace(task.inputs[0], stride=(1, 8)), *task.inputs[1:]))
    assert launch.environment(parse_kernel(text), transposed, {})["x.contiguous"] == 0


def test_channels_last_is_the_order_n_h_w_c() -> None:
    shape, nhwc = (2, 3, 4, 5), (60, 1, 15, 3)
    assert TensorSpec("x", "float32", shape, nhwc).is_channels_last
    assert not TensorSpec("x", "float32", shape, (60, 20, 5, 1)).is_channels_last
    assert not TensorSpec("x", "float32", shape, (120, 1, 30, 6)).is_channels_last  # every other pixel
    assert TensorSpec("x", "float32", (2, 1, 4, 5), (20, 20, 5, 1)).is_channels_last  # one channel: both orders are the same
    assert not TensorSpec("x", "float32", (6, 4), (4, 1)).is_channels_last


KERNEL_OF_LISTS = """/*---
implements = "layer_norm"
target = "cpu"
dtypes = ["float32"]
optional = ["weight", "bias"]
where = ["x.contiguous"]
dims = { cols = "normalized_shape.product", rows = "x.numel // cols" }
[[launch]]
kernel = "ln"
args = ["x", "weight", "bias", "y", "rows", "cols"]
---*/
extern "C" void ln(const T_x* x, const T_weight* weight, const T_bias* bias, T_y* y, int64_t rows, int64_t cols) {}
"""


def test_an_absent_optional_tensor_counts_as_contiguous() -> None:
    without, needs = tasks.layer_norm_task(device="cuda", bias=False), kernel('"cols <= 4096"', '"bias.contiguous"')
    names = launch.environment(needs, without, {"THREADS": 128}, FACTS)
    assert names["bias.contiguous"] == names["bias.channels_last"] == 1
    assert needs.why_not(without) is None
