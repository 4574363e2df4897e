"""A rogues' gallery: every way to look right or fast without being either, and the status that each one ends in.

The kernels run in one worker, as candidates do. Those that the source rules or the compiler step refuse never run at all.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from tasks import layer_norm_task, relu_add_task, softmax_task

from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.worker import Worker
from torch_llmkernels.evaluation import Evaluation, Status
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task

pytestmark = pytest.mark.skipif(target_for("cpu").unavailable() is not None, reason="no C++ compiler")

ROWS, COLS = 8, 192


@pytest.fixture(scope="module")
def worker() -> Iterator[Worker]:
    with Worker(Settings(worker_timeout_s=90.0)) as made:
        yield made


def kernel(signature: str, args: dict[str, str], body: str, header: str = "") -> str:
    """A CPU kernel file: `args` maps each argument to its C type."""
    names = ", ".join(f'"{name}"' for name in args)
    parameters = ", ".join(f"{kind} {name}" for name, kind in args.items())
    return f"""/*---
implements = "{signature}"
target = "cpu"
dtypes = ["float32"]
dims = {{ n = "y.numel", cols = "y.shape[-1]" }}
{header}
[[launch]]
kernel = "f"
args = [{names}]
---*/
extern "C" void f({parameters}) {{
{body}
}}
"""


SOFTMAX_ARGS = {"x": "const T_x*", "y": "T_y*", "n": "int64_t", "cols": "int64_t"}
SOFTMAX = """
    for (int64_t r = 0; r < n / cols; r++) {
        const T_x* in = x + r * cols; T_y* out = y + r * cols;
        float top = in[0];
        for (int64_t i = 1; i < cols; i++) top = (in[i] > top || in[i] != in[i]) ? in[i] : top;
        double sum = 0;
        for (int64_t i = 0; i < cols; i++) { out[i] = std::exp(in[i] - top); sum = sum + out[i]; }
        for (int64_t i = 0; i < cols; i++) out[i] = T_y(out[i] / sum);
    }
"""
WORKSPACE = '[[workspace]]\nname = "memo"\ndtype = "float32"\nshape = ["n"]'


def softmax(body: str, header: str = "", **more: str) -> str:
    return kernel("softmax", {**SOFTMAX_ARGS, **more}, body, header)


def evaluate(worker: Worker, text: str, task: Task | None = None, timed: bool = False, tier: str = "quick") -> Evaluation:
    return worker.evaluate(Job(task or softmax_task(ROWS, COLS), text, "rogue", timed=timed, tier=tier))


def test_an_honest_kernel_is_correct(worker: Worker) -> None:
    outcome = evaluate(worker, softmax(SOFTMAX), tier="full")
    assert outcome.status is Status.CORRECT, outcome.detail
    assert {e.distribution for e in outcome.errors} >= {"normal", "wide", "planted", "denormals"}


def test_an_honest_kernel_is_timed_beside_its_baselines(worker: Worker) -> None:
    outcome = evaluate(worker, softmax(SOFTMAX), timed=True)
    assert outcome.status is Status.TIMED, outcome.detail
    assert dict(outcome.baselines_ms).keys() == {"eager", "inductor"}
    assert outcome.floor_ms > 0 and dict(outcome.environment)["torch"]


WRONG = {
    "returns zeros, which tiny probabilities nearly are": softmax("for (int64_t i = 0; i < n; i++) y[i] = 0;"),
    "returns the mean of the answer": softmax("for (int64_t i = 0; i < n; i++) y[i] = 1.0f / cols;"),
    "leaves the last element": softmax(SOFTMAX.replace("i < cols; i++) out[i] = T_y", "i < cols - 1; i++) out[i] = T_y")),
    "does nothing": softmax("(void)x;"),
    "writes past the end": softmax(SOFTMAX + "y[n] = 0;"),
    "writes before the beginning": softmax(SOFTMAX + "y[-1] = 0;"),
    "clears its input": softmax(SOFTMAX + "const_cast<T_x*>(x)[3] = 0;"),
    "swallows NaN": softmax(
        SOFTMAX.replace("|| in[i] != in[i]", "").replace("in[i] - top", "(in[i] == in[i] ? in[i] : top) - top")
    ),
    "accumulates in half precision": softmax(SOFTMAX.replace("double sum = 0", "bfloat16 sum(0.0f)")),
    "sums without care": softmax(SOFTMAX.replace("double sum", "float sum")),
    "skips the maximum": softmax(SOFTMAX.replace("- top", "")),
    "drops small probabilities": softmax(SOFTMAX + "for (int64_t i = 0; i < n; i++) if (y[i] < 1e-4f) y[i] = 0;"),
    "depends on what a workspace held": softmax(
        SOFTMAX + "for (int64_t i = 0; i < n; i++) y[i] += memo[i] * 1e-3f;", WORKSPACE, memo="float*"
    ),
    "remembers its answer in a workspace by address": softmax(
        "if (memo[0] == 1234.0f) { for (int64_t i = 0; i < n; i++) y[i] = memo[i + 1]; return; }"
        + SOFTMAX
        + "memo[0] = 1234.0f; for (int64_t i = 0; i + 1 < n; i++) memo[i + 1] = y[i]; y[0] = memo[n];",
        WORKSPACE,
        memo="float*",
    ),
    "keeps an output that is there already": softmax("if (y[0] == y[0] && y[0] != 0) return;" + SOFTMAX),
}


@pytest.mark.parametrize("trick", WRONG)
def test_wrong_answers_are_wrong(worker: Worker, trick: str) -> None:
    outcome = evaluate(worker, WRONG[trick])
    assert outcome.status is Status.WRONG, f"{outcome.status}: {outcome.detail}"
    assert outcome.detail


LAYER_NORM_ARGS = {"x": "const T_x*", "weight": "const T_weight*", "bias": "const T_bias*", "y": "T_y*", "n": "int64_t",
                   "cols": "int64_t"}  # fmt: skip
ONE_PASS_LAYER_NORM = """
    for (int64_t r = 0; r < n / cols; r++) {
        float sum = 0, squares = 0;
        for (int64_t i = 0; i < cols; i++) { float v = x[r * cols + i]; sum += v; squares += v * v; }
        float mean = sum / cols, scale = 1 / std::sqrt(squares / cols - mean * mean + 1e-5f);
        for (int64_t i = 0; i < cols; i++) y[r * cols + i] = (x[r * cols + i] - mean) * scale * weight[i] + bias[i];
    }
"""


def test_a_one_pass_variance_fails_on_a_large_mean(worker: Worker) -> None:
    outcome = evaluate(worker, kernel("layer_norm", LAYER_NORM_ARGS, ONE_PASS_LAYER_NORM), layer_norm_task(ROWS, COLS))
    assert outcome.status is Status.WRONG and "distribution offset" in outcome.detail


def test_ignoring_the_weights_is_wrong(worker: Worker) -> None:
    body = ONE_PASS_LAYER_NORM.replace("* weight[i] + bias[i]", "")
    outcome = evaluate(worker, kernel("layer_norm", LAYER_NORM_ARGS, body), layer_norm_task(ROWS, COLS))
    assert outcome.status is Status.WRONG and "distribution normal" in outcome.detail


def test_serving_only_the_sizes_of_the_hint_is_wrong(worker: Worker) -> None:
    text = kernel("add.relu", {"a": "const T_a*", "b": "const T_b*", "y": "T_y*"},
                  "for (int i = 0; i < 64; i++) y[i] = a[i] + b[i] <= 0 ? 0 : a[i] + b[i];")  # fmt: skip
    outcome = evaluate(worker, text, relu_add_task("d0", hints={"d0": 64}))
    assert outcome.status is Status.WRONG and "d0=" in outcome.detail


REFUSED = {
    "exits": (softmax("exit(0);"), Status.INVALID),
    "answers from a static variable": (softmax("static float memo[4096]; memo[0] += 1; y[0] = memo[0];"), None),
    "does not compile": (softmax("y[0] = undefined_name;"), Status.COMPILE_ERROR),
    "has no header": ("void f() {}", Status.INVALID),
    "is for another signature": (kernel("relu", SOFTMAX_ARGS, SOFTMAX), Status.NOT_APPLICABLE),
}


@pytest.mark.parametrize("trick", REFUSED)
def test_what_must_not_run_does_not(worker: Worker, trick: str) -> None:
    text, status = REFUSED[trick]
    outcome = evaluate(worker, text)
    assert outcome.status in ((status,) if status else (Status.INVALID, Status.COMPILE_ERROR)), outcome.detail
    assert outcome.detail


def test_a_compile_error_names_the_line(worker: Worker) -> None:
    outcome = evaluate(worker, REFUSED["does not compile"][0])
    assert "undefined_name" in outcome.detail and "rogue.cpp:" in outcome.detail


def test_a_segmentation_fault_is_a_crash_and_the_next_job_runs(worker: Worker) -> None:
    outcome = evaluate(worker, softmax("volatile float* p = (volatile float*)8; y[0] = *p;"))
    assert outcome.status is Status.CRASHED and "SIGSEGV" in outcome.detail and "checking" in outcome.detail
    assert evaluate(worker, softmax(SOFTMAX)).status is Status.CORRECT


def test_reading_past_the_end_is_a_crash_against_the_fence(worker: Worker) -> None:
    outcome = evaluate(worker, softmax(SOFTMAX + "volatile float beyond = x[n + 15]; (void)beyond;"))
    assert outcome.status is Status.CRASHED and "page without access" in outcome.detail


def test_a_hang_is_a_timeout() -> None:
    with Worker(Settings(worker_timeout_s=8.0)) as impatient:
        outcome = evaluate(impatient, softmax("volatile int go = 1; while (go) {}"))
    assert outcome.status is Status.TIMEOUT and "killed after 8 s" in outcome.detail
