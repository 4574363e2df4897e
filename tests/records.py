"""Evaluations, records, decisions and keys for tests that are about storing them, not about making them."""

from __future__ import annotations

from types import SimpleNamespace

from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.evaluation import Decision, ErrorStat, Evaluation, Record, Status
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.task import Task

FACTS = SimpleNamespace(kind="cpu-x86_64-avx2", unit="host-1", driver="g++ 12")

KERNEL = """/*---
implements = "layer_norm"
target = "cpu"
dtypes = ["float32"]
optional = ["weight", "bias"]
dims = { cols = "x.shape[1]", rows = "x.shape[0]" }
tune = { UNROLL = [1, 4] }
[[launch]]
kernel = "ln"
args = ["x", "weight", "bias", "y", "rows", "cols", "eps"]
---*/
extern "C" void ln(const T_x* x, const T_weight* weight, const T_bias* bias, T_y* y, int64_t rows, int64_t cols, float eps) {
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t c = 0; c < cols; ++c) y[r * cols + c] = x[r * cols + c];
}
"""

LABEL = parse_kernel(KERNEL, "ln").label
"""How decisions name that kernel."""


def evaluation(status: Status = Status.TIMED, time_ms: float = 1.0) -> Evaluation:
    """A timed, correct evaluation twice as fast as eager; or a bare one of another status."""
    if not status.is_correct:
        return Evaluation(status, detail="output y is wrong")
    errors = (ErrorStat("y", "normal", 1e-7, 1e-7, 1e-7, 1e-7, 1e-6, 1e-6, True),)
    if status is Status.CORRECT:
        return Evaluation(status, errors=errors)
    baselines = (("eager", 2 * time_ms), ("inductor", 3 * time_ms))
    return Evaluation(status, errors=errors, time_ms=time_ms, spread=0.01, baselines_ms=baselines)


def record_for(task: Task, text: str = KERNEL, status: Status = Status.TIMED) -> Record:
    """A record of `task` with this kernel text."""
    return Record(task, "ln", text, (("UNROLL", 4),), FACTS.kind, evaluation(status), "search:test")


def decision_for(task: Task, text: str = KERNEL) -> Decision:
    """A decision to swap that record in."""
    record = record_for(task, text)
    return Decision(record, "swapped: 2.00x the best baseline", ((LABEL if text == KERNEL else "ln", record.evaluation),))


def key_for(task: Task) -> RecordKey:
    """The key of `task` on the device of these records."""
    return RecordKey.of(task, FACTS)
