"""The evaluation on a CUDA device: references, crashes, graphs, floors and the sanitizer."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tasks import contiguous, layer_norm_task, matmul_task, softmax_task

from torch_llmkernels.evaluate import roofline
from torch_llmkernels.evaluate.check import check
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.timing import Stopwatch
from torch_llmkernels.evaluate.worker import Worker
from torch_llmkernels.evaluation import Status
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.program import module_of
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Node, Numerics, Task

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]

LAYER_NORM = (Path(__file__).parent / "kernels" / "layer_norm.cu").read_text()
SHAPE = (2, 4, 128, 64)
ZERO, SMALL = {"f": (0.0).hex()}, {"f": (1e-5).hex()}


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(Settings(worker_timeout_s=300.0)) as made:
        yield made


def test_a_kernel_is_checked_sanitized_and_timed(worker: Worker) -> None:
    outcome = worker.evaluate(Job(layer_norm_task(4096, 1024, "float16", "cuda"), LAYER_NORM, "layer_norm", tier="full"))
    assert outcome.status is Status.TIMED, outcome.detail
    assert dict(outcome.baselines_ms).keys() == {"eager", "inductor"}
    assert outcome.time_ms and outcome.time_ms >= 0.9 * outcome.floor_ms > 0
    environment = dict(outcome.environment)
    assert environment["sanitizer"].startswith(("passed", "skipped: no compute-sanitizer")), environment["sanitizer"]


def rogue(body: str) -> str:
    return f"""/*---
implements = "softmax"
target = "cuda"
dtypes = ["float32"]
dims = {{ n = "y.numel" }}
[[launch]]
kernel = "f"
grid = ["1"]
block = ["32"]
args = ["x", "y", "n"]
---*/
extern "C" __global__ void f(const T_x* x, T_y* y, long long n) {{ {body} }}
"""


def test_an_illegal_access_is_a_crash_and_the_next_job_runs(worker: Worker) -> None:
    outcome = worker.evaluate(Job(softmax_task(device="cuda"), rogue("y[n << 40] = 0;"), timed=False))
    assert outcome.status is Status.CRASHED and "CUDA" in outcome.detail, outcome.detail
    outcome = worker.evaluate(Job(softmax_task(device="cuda"), rogue("y[0] = 0;"), timed=False))
    assert outcome.status is Status.WRONG and "never written" in outcome.detail


def test_an_endless_kernel_is_a_timeout() -> None:
    with Worker(Settings(worker_timeout_s=20.0)) as impatient:
        body = "volatile const T_x* p = x; while (p[0] == p[0]) {}"
        outcome = impatient.evaluate(Job(softmax_task(device="cuda"), rogue(body), timed=False))
    assert outcome.status is Status.TIMEOUT, outcome.detail


def fused(op: str, args: tuple[Any, ...], names: dict[str, tuple[int, ...]], items: int, dtype: str = "float16") -> Task:
    """A task of one operator with several outputs, the first `items` of them the task's, each of attention's shape."""
    specs = tuple(contiguous(n, "float32" if n == "lse" else dtype if n not in ("seed", "offset") else "int64", s)
                  for n, s in names.items())  # fmt: skip
    program = [Node("n0", f"aten.{op}.default", args)] + [Node(f"n{i + 1}", "getitem", ({"v": "n0"}, i)) for i in range(items)]
    outputs = tuple(contiguous(f"y{i}", dtype, SHAPE) for i in range(items))
    return Task("attention", tuple(program), specs, outputs, tuple(f"n{i + 1}" for i in range(items)), (), Numerics(), "cuda")


def eager_candidate(task: Task) -> Any:
    module = module_of(task)
    count = len(task.outputs)

    def run(*tensors: torch.Tensor) -> None:
        for target, value in zip(tensors[:count], module(*tensors[count:]), strict=True):
            target.copy_(value)

    return run


Q, K, V = ({"v": n} for n in ("query", "key", "value"))
QKV = {"query": SHAPE, "key": SHAPE, "value": SHAPE}
BACKWARD = {"grad": SHAPE, **QKV, "out": SHAPE, "lse": (2, 4, 128), "seed": (), "offset": ()}
B = {n: {"v": n} for n in BACKWARD}
ATTENTION = {
    "flash": fused("_scaled_dot_product_flash_attention", (Q, K, V, ZERO, True, False, None), QKV, 1),
    "efficient": fused("_scaled_dot_product_efficient_attention", (Q, K, V, None, False, ZERO, False, None), QKV, 1, "float32"),
    "cudnn": fused("_scaled_dot_product_cudnn_attention", (Q, K, V, None, False, ZERO, True, False, None), QKV, 1),
    "efficient backward": fused(
        "_scaled_dot_product_efficient_attention_backward",
        (*(B[n] for n in ("grad", "query", "key", "value")), None, *(B[n] for n in ("out", "lse", "seed", "offset")), ZERO,
         [True, True, True, False], True, None), BACKWARD, 3, "float32",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ATTENTION)
def test_fused_attention_passes_its_own_check(name: str) -> None:
    _, failure = check(ATTENTION[name], eager_candidate(ATTENTION[name]))
    assert failure is None, failure


def test_strict_float32_products_must_not_use_tf32() -> None:
    def tf32(y: torch.Tensor, a: torch.Tensor, b: torch.Tensor) -> None:
        from torch_llmkernels.evaluate.reference import precision

        with precision(Numerics(matmul="tf32")):
            torch.mm(a, b, out=y)

    task = matmul_task(256, 256, 512, "float32")
    _, failure = check(task, tf32)
    assert failure and "Frobenius" in failure
    assert check(task, lambda y, a, b: torch.mm(a, b, out=y))[1] is None


def test_a_gigabyte_is_checked_on_the_device() -> None:
    def run(y: torch.Tensor, x: torch.Tensor) -> None:
        torch.softmax(x, -1, out=y)

    _, failure = check(softmax_task(4096, 65536, device="cuda"), run, "quick")
    assert failure is None, failure


def test_an_answer_kept_by_address_is_found_under_graph_replay() -> None:
    task = layer_norm_task(512, 256, "float32", "cuda")
    kept: dict[int, torch.Tensor] = {}

    def honest(y: torch.Tensor, *x: torch.Tensor) -> None:
        y.copy_(torch.nn.functional.layer_norm(x[0], (256,), *x[1:]))

    def remembers(y: torch.Tensor, *x: torch.Tensor) -> None:
        if x[0].data_ptr() not in kept:
            kept[x[0].data_ptr()] = torch.nn.functional.layer_norm(x[0], (256,), *x[1:])
        y.copy_(kept[x[0].data_ptr()])

    facts = target_for("cuda").facts(0)
    assert Stopwatch(task, [], [], facts).compare(honest, honest).mismatch is None
    assert "differs" in (Stopwatch(task, [], [], facts).compare(remembers, honest).mismatch or "")


def test_ceilings_are_those_of_a_gpu() -> None:
    ceilings = roofline.measure_ceilings("cuda")
    assert ceilings.copy > 1e11 and ceilings.fp16 > ceilings.fp32 > 1e12
