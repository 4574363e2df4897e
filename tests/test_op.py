"""The runtime operator: specs, slots, the reference behind every kernel, and what Inductor makes of the operator."""

from __future__ import annotations

import dataclasses
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from swapping import record_of
from tasks import layer_norm_task, softmax_task
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torch_llmkernels.errors import CompileError, NotApplicable, SchemaError, TaskError
from torch_llmkernels.graph import op
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task


@pytest.fixture(autouse=True)
def fresh_slots(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setattr(op, "_slots", {})
    monkeypatch.setattr(op, "_settings", {})
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path))
    yield


@pytest.fixture
def build(monkeypatch: pytest.MonkeyPatch) -> Callable[[Callable[..., None]], None]:
    """Give every slot this launcher."""
    return lambda launcher: monkeypatch.setattr(op, "build_launcher", lambda spec, settings, index: launcher)


def fill_with(value: float) -> Callable[..., None]:
    return lambda output, *rest: output.fill_(value)


def spec_of(task: Task, text: str = "not a kernel file") -> str:
    return op.encode_spec(record_of(task, text))


def region(task: Task, *inputs: torch.Tensor, symbols: tuple[int, ...] = ()) -> list[torch.Tensor]:
    return torch.ops.llmk.region(spec_of(task), list(inputs), list(symbols))


def test_a_spec_holds_the_region_and_its_kernel() -> None:
    record = dataclasses.replace(record_of(layer_norm_task()), constants=(("THREADS", 256),))
    spec = op.decode_spec(op.encode_spec(record))
    assert (spec.task, spec.kernel_text, spec.constants) == (record.task, record.kernel_text, record.constants)


def test_a_spec_can_be_pasted_into_a_string_literal() -> None:
    text = spec_of(layer_norm_task(), 'quotes " and \\ backslashes\n')
    assert not set(text) & set("\"'\\\n ")


def test_a_spec_of_another_schema_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(op, "canonical_json", lambda plain: '{"task": {"schema": -1}}')
    with pytest.raises(SchemaError, match="schema -1"):
        op.decode_spec(spec_of(softmax_task()))


def test_the_operator_runs_the_kernel(build: Callable) -> None:
    build(fill_with(7.0))
    (y,) = region(softmax_task(4, 8), torch.randn(4, 8))
    assert y.shape == (4, 8) and (y == 7).all()


def test_several_outputs() -> None:
    x, w, b = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    outputs = region(layer_norm_task(4, 8, stats=True), x, w, b)
    torch.testing.assert_close(tuple(outputs), torch.native_layer_norm(x, [8], w, b, 1e-5))


def test_a_kernel_that_cannot_be_built_runs_the_reference(caplog: pytest.LogCaptureFixture) -> None:
    x = torch.randn(4, 8)
    with caplog.at_level(logging.WARNING, "torch_llmkernels"):
        for _ in range(2):
            torch.testing.assert_close(region(softmax_task(4, 8), x)[0], x.softmax(-1))
    (message,) = [r.getMessage() for r in caplog.records]
    assert "softmax" in message and "runs its reference" in message


def test_strict_raises_where_a_kernel_cannot_be_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*args: Any) -> None:
        raise CompileError("no such instruction")

    monkeypatch.setattr(op, "build_launcher", refuse)
    spec = spec_of(softmax_task(4, 8))
    op.set_settings(spec, Settings(strict=True))
    with pytest.raises(CompileError, match="no such instruction"):
        torch.ops.llmk.region(spec, [torch.randn(4, 8)], [])


def test_tensors_that_a_kernel_does_not_serve_run_the_reference(build: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """A misaligned view, say: this call only, and one line in the log however many calls there are."""

    def aligned_only(output: torch.Tensor, x: torch.Tensor) -> None:
        if x.data_ptr() % 16:
            raise NotApplicable("x is not aligned to 16 bytes")
        output.fill_(7.0)

    build(aligned_only)
    storage = torch.randn(4 * 8 + 1)
    aligned, shifted = storage[:32].view(4, 8), storage[1:].view(4, 8)
    with caplog.at_level(logging.WARNING, "torch_llmkernels"):
        for _ in range(2):
            torch.testing.assert_close(region(softmax_task(4, 8), shifted)[0], shifted.softmax(-1))
    assert (region(softmax_task(4, 8), aligned)[0] == 7).all()
    assert len(caplog.records) == 1 and "aligned" in caplog.text


def test_tensors_of_another_layout_never_reach_the_kernel(build: Callable, caplog: pytest.LogCaptureFixture) -> None:
    """A kernel is compiled for its task's strides and does not look at those of its arguments."""
    build(fill_with(7.0))
    slot, y = op.bind(spec_of(softmax_task(4, 8))), torch.empty(4, 8)
    padded = torch.randn(4, 11)[:, :8]
    with caplog.at_level(logging.WARNING, "torch_llmkernels"):
        slot(y, padded)
    torch.testing.assert_close(y, padded.softmax(-1))
    assert "x has shape (4, 8) and strides (11, 1), the kernel was compiled for shape (4, 8) and strides (8, 1)" in caplog.text
    slot(y, padded.contiguous())
    assert (y == 7).all()


def test_a_slot_can_be_rebound_while_graphs_hold_it(build: Callable) -> None:
    build(fill_with(1.0))
    task, x = softmax_task(4, 8), torch.randn(4, 8)
    assert (region(task, x)[0] == 1).all()
    slot = op.bind(spec_of(task))
    slot.fn = fill_with(2.0)
    assert (region(task, x)[0] == 2).all()
    assert op.slots() == [slot]


def test_dynamic_sizes_arrive_as_values(build: Callable) -> None:
    seen = []
    build(lambda output, x, rows: seen.append(rows))
    task = softmax_task("d0", 8, hints={"d0": 4})
    for rows in (4, 6):
        (y,) = region(task, torch.randn(rows, 8), symbols=(rows,))
        assert y.shape == (rows, 8)
    assert seen == [4, 6]


def test_dynamic_sizes_reach_the_reference() -> None:
    x = torch.randn(6, 8)
    task = softmax_task("d0", 8, hints={"d0": 4})
    torch.testing.assert_close(region(task, x, symbols=(6,))[0], x.softmax(-1))


def test_tensors_without_elements() -> None:
    task = softmax_task("d0", 8, hints={"d0": 4})
    assert region(task, torch.randn(0, 8), symbols=(0,))[0].shape == (0, 8)


def test_outputs_never_alias_inputs() -> None:
    """A program may return an input as it is; the operator's outputs are new memory all the same."""
    base = softmax_task(4, 8)
    task = dataclasses.replace(base, program=(), results=("x",), params=())
    x = torch.randn(4, 8)
    (y,) = region(task, x)
    assert torch.equal(x, y) and y.data_ptr() != x.data_ptr()


def test_the_out_variant_writes_where_it_is_told(build: Callable) -> None:
    build(fill_with(3.0))
    out = torch.empty(4, 8)
    torch.ops.llmk.region_out(spec_of(softmax_task(4, 8)), [out], [torch.randn(4, 8)], [])
    assert (out == 3).all()


def test_fake_outputs_have_the_strides_of_the_task() -> None:
    y = dataclasses.replace(softmax_task(4, 8).outputs[0], stride=(1, 4))
    task = dataclasses.replace(softmax_task(4, 8), outputs=(y,))
    mode = FakeTensorMode()
    with mode:
        (fake,) = region(task, torch.empty(4, 8))
    assert fake.stride() == (1, 4)


def test_fake_outputs_keep_symbolic_sizes() -> None:
    """The fake implementation adds no guard: the graph stays dynamic."""
    env = ShapeEnv()
    mode = FakeTensorMode(shape_env=env)
    x = mode.from_tensor(torch.randn(4, 8), static_shapes=False)
    with mode:
        (fake,) = torch.ops.llmk.region(spec_of(softmax_task("d0", 8, hints={"d0": 4})), [x], [x.size(0)])
    assert isinstance(fake.size(0), torch.SymInt) and not env.guards


def test_layout_expressions_are_arithmetic_only() -> None:
    task = softmax_task("d0", 8, hints={"d0": 4})
    evil = dataclasses.replace(task.outputs[0], shape=("__import__('os')", 8))
    with pytest.raises(TaskError):
        op.concrete_layout(task, evil, [4])


def test_profiler_ranges_name_the_region(build: Callable) -> None:
    build(fill_with(1.0))
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        region(softmax_task(4, 8), torch.randn(4, 8))
    assert "llmkernels::softmax" in {event.key for event in profile.key_averages()}


def test_the_operator_passes_torchs_own_checks(build: Callable) -> None:
    samples = (spec_of(softmax_task(4, 8)), [torch.randn(4, 8)], [])
    torch.library.opcheck(op.region_op(), samples, test_utils=("test_schema", "test_faketensor"))


KERNEL = """/*---
implements = "softmax"
target = "cpu"
dtypes = ["float32"]
dims = { cols = "x.shape[1]", rows = "x.shape[0]" }
[[workspace]]
name = "scratch"
dtype = "float32"
shape = ["cols"]
[[launch]]
kernel = "rows_in_order"
args = ["x", "scratch", "y", "rows", "cols"]
---*/
extern "C" void rows_in_order(const T_x* x, float* scratch, T_y* y, int64_t rows, int64_t cols) {
  for (int64_t r = 0; r < rows; ++r) {
    float sum = 0;
    for (int64_t c = 0; c < cols; ++c) sum += scratch[c] = exp(x[r * cols + c]);
    for (int64_t c = 0; c < cols; ++c) y[r * cols + c] = scratch[c] / sum;
  }
}
"""


def test_a_real_kernel_is_built_loaded_and_run() -> None:
    x = torch.randn(4, 8)
    spec = spec_of(softmax_task(4, 8), KERNEL)
    (y,) = torch.ops.llmk.region(spec, [x], [])
    torch.testing.assert_close(y, x.softmax(-1))
    assert not op.bind(spec).reason


def test_workspaces_that_are_too_small_are_never_written(caplog: pytest.LogCaptureFixture) -> None:
    """Code that was generated elsewhere may allocate less than the kernel writes here, and both may be in one process."""
    spec, x = spec_of(softmax_task(4, 8), KERNEL), torch.randn(4, 8)
    for floats, runs_its_kernel in ((8, True), (4, False), (16, True)):
        y, memory = torch.empty(4, 8), torch.full((64,), 7.0)
        slot = op.bind(spec, (floats * 4,))
        slot(y, memory[:floats], x)
        torch.testing.assert_close(y, x.softmax(-1))
        assert (memory[floats:] == 7).all() and bool((memory[0] != 7).item()) == runs_its_kernel
        assert bool(slot.reason) != runs_its_kernel
    assert "workspaces of [16] bytes, here it needs [32]" in caplog.text


@pytest.mark.parametrize("dynamic", [False, True])
def test_inductor_plans_outputs_and_workspaces(dynamic: bool) -> None:
    """The compiled graph allocates both as its own buffers and hands them to the slot."""
    from torch._inductor import config
    from torch._inductor.utils import run_and_get_code

    import torch_llmkernels.graph.lowering  # noqa: F401

    task = softmax_task("d0", 8, hints={"d0": 4}) if dynamic else softmax_task(4, 8)
    spec = spec_of(task, KERNEL)

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.ops.llmk.region(spec, [x], [x.size(0)] if dynamic else [])[0]

    torch._dynamo.reset()
    compiled = torch.compile(function, dynamic=dynamic)
    x = torch.randn(4, 8)
    with config.patch(force_disable_caches=True):
        y, (code,) = run_and_get_code(compiled, x)
    torch.testing.assert_close(y, x.softmax(-1))
    (call,) = [line.strip() for line in code.splitlines() if line.strip().startswith("llmk_softmax_") and "bind" not in line]
    assert call.count(",") == (3 if dynamic else 2) and call.count("buf") == 2
    (slot,) = op.slots()
    assert slot is op.bind(spec, (8 * 4,)) and not slot.reason


def test_a_lock_that_was_held_at_a_fork_is_free_in_the_child() -> None:
    slot = op.bind(op.encode_spec(record_of(layer_norm_task(8, 64))))
    with op._slots_lock, slot._lock:
        child = os.fork()
        if not child:
            os._exit(int(op._slots_lock.locked() or slot._lock.locked()))
    assert os.waitpid(child, 0)[1] == 0
