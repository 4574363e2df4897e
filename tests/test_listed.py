"""A header promises only what compiles: each other dtype and signature that it lists is compiled, and named where it does not."""

from __future__ import annotations

from concurrent.futures import Future
from pathlib import Path

import pytest
import tasks
from scripted_search import ScriptedModel, ScriptedPool, code_reply, ideas_reply, open_engine

from torch_llmkernels.errors import CompileError, ToolchainMissing
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.listed import check_listed, listed_tasks
from torch_llmkernels.evaluate.run import evaluate
from torch_llmkernels.evaluation import Evaluation, Status
from torch_llmkernels.kernels.device import facts_for_arch
from torch_llmkernels.kernels.launch import main_dtype
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.search.candidates import CompileCheck
from torch_llmkernels.task import Node, Task

H100 = facts_for_arch("sm_90a")
SOURCE = """/*---
implements = ["add.relu", "relu", "add.silu", "add.batch_norm.relu", "add.relu.max_pool2d"]
target = "cuda"
dtypes = ["float32", "float16", "bfloat16"]
optional = ["residual", "bn_weight", "bn_bias", "bn_mean", "bn_var"]
dims = { n = "x.numel" }
where = ["x.numel >= 1"]
tune = { THREADS = [THREADS_LIST] }
[[launch]]
kernel = "add_relu"
grid = ["ceil_div(n, THREADS)"]
block = ["THREADS"]
args = ["x", "residual", "bn_weight", "bn_bias", "bn_mean", "bn_var", "y", "n"]
---*/
HELPER
extern "C" __global__ void add_relu(const T_x* x, const T_residual* residual, const T_bn_weight* w, const T_bn_bias* b,
                                    const T_bn_mean* m, const T_bn_var* var, T_y* y, int n) {
    const int i = blockIdx.x * THREADS + threadIdx.x;
    if (i >= n) return;
    ACC v = to_acc(x[i]);
#if HAS_RESIDUAL
    v += to_acc(residual[i]);
#endif
#if OP_BATCH_NORM
    v = (v - to_acc(m[0])) / sqrtf(to_acc(var[0]) + P_BATCH_NORM_EPS) * to_acc(w[0]) + to_acc(b[0]);
#endif
    y[i] = from_acc<T_y>(v < 0 ? ACC(0) : v);
    BODY
}
"""
ALL = ["dtype float16", "dtype bfloat16", "signature relu", "signature add.silu", "signature add.batch_norm.relu"]


def source(helper: str = "", body: str = "", threads: str = "128") -> str:
    return SOURCE.replace("HELPER", helper).replace("BODY", body).replace("THREADS_LIST", threads)


def add_relu(device: str = "cuda") -> Task:
    program = (Node("n0", "aten.add.Tensor", ({"v": "x"}, {"v": "residual"}, 1)), Node("n1", "aten.relu.default", ({"v": "n0"},)))
    x, residual, y = (tasks.contiguous(name, "float32", (64, 16)) for name in ("x", "residual", "y"))
    return Task("add.relu", program, (x, residual), (y,), ("n1",), (), tasks.relu_add_task().numerics, device)


def check(text: str) -> None:
    try:
        check_listed(parse_kernel(text), add_relu(), target_for("cuda"), H100)
    except ToolchainMissing as missing:
        pytest.skip(str(missing))


def test_every_other_dtype_and_every_signature_whose_tensors_are_known() -> None:
    found = dict(listed_tasks(parse_kernel(source()), add_relu()))
    assert list(found) == ALL  # what max_pool2d makes of the sizes is not known
    assert main_dtype(found["dtype bfloat16"]) == "bfloat16" and found["dtype bfloat16"].outputs[0].dtype == "bfloat16"
    assert [t.name for t in found["signature relu"].inputs] == ["x"]
    assert found["signature add.batch_norm.relu"].param == {"batch_norm_eps": 1e-5}


def test_what_the_header_itself_excludes_is_not_asked() -> None:
    only = source().replace("x.numel >= 1", "x.itemsize == 4")
    assert [label for label, _ in listed_tasks(parse_kernel(only), add_relu())] == ALL[2:]


def test_a_source_that_serves_all_it_lists_passes() -> None:
    check(source())


def test_the_dtypes_that_do_not_compile_are_named_with_the_compilers_words() -> None:
    half_only = "template <class E> __device__ void twice(E) = delete;\ntemplate <> __device__ void twice<float>(float) {}"
    with pytest.raises(CompileError, match="not for dtype float16, dtype bfloat16, which its header lists") as caught:
        check(source(half_only, "twice(x[i]);"))
    assert "dtype bfloat16:" in caught.value.log and "deleted function" in caught.value.log


def test_a_signature_that_does_not_compile_is_named() -> None:
    with pytest.raises(CompileError, match=r"not for signature add\.silu, which"):
        check(source("#if OP_SILU\n#error no silu\n#endif"))


def test_a_machine_without_the_device_says_it_too() -> None:
    check(source())  # skips where there is no compiler
    outcome = CompileCheck(H100)(add_relu(), source("#if OP_SILU\n#error no silu\n#endif"), "k")
    assert outcome is not None and outcome.status is Status.COMPILE_ERROR and "signature add.silu" in outcome.detail


def test_limits_of_launches_are_found_without_the_device() -> None:
    ahead = CompileCheck(H100)
    refused = ahead(add_relu(), source(threads="2048"), "k")
    assert refused is not None and refused.status is Status.NOT_APPLICABLE and "2048" in refused.detail
    assert ahead(add_relu(), source(threads="2048, 64"), "k") is None


CPU = """/*---
implements = "add.relu"
target = "cpu"
dtypes = ["float32", "float64"]
[[launch]]
kernel = "add_relu"
args = ["x", "residual", "y", "x.numel"]
---*/
extern "C" void add_relu(const T* x, const T* residual, T* y, long long n) {
    static_assert(sizeof(T) == 4, "only float");
    for (long long i = 0; i < n; ++i) y[i] = x[i] + residual[i] < 0 ? T(0) : x[i] + residual[i];
}
"""


@pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")
def test_the_evaluation_of_a_candidate_asks_for_it_and_that_of_a_known_kernel_does_not() -> None:
    asked, plain = (evaluate(Job(add_relu("cpu"), CPU, timed=False, listed=listed)) for listed in (True, False))
    assert asked.status is Status.COMPILE_ERROR and "dtype float64" in asked.detail and "only float" in asked.detail
    assert plain.status is Status.CORRECT, plain.detail


def test_a_search_asks_for_it_once_in_the_quick_check(tmp_path: Path) -> None:
    jobs: list[Job] = []

    class Watched(ScriptedPool):
        def submit(self, job: Job) -> Future[Evaluation]:
            jobs.append(job)
            return super().submit(job)

    model = ScriptedModel(lambda role, slot: ideas_reply("a") if role == "ideas" else code_reply("1.0"))
    open_engine(tmp_path, model=model, pool=Watched()).drive()
    assert {job.listed for job in jobs if job.tier == "quick" and job.constants is None} == {True}
    assert not any(job.listed for job in jobs if job.tier == "full")
