"""Packed weights: kept where the compiled graph holds the weights as constants, made at every call elsewhere, and never stale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from graphs import capture
from torch import nn
from torch._functorch import config as functorch_config
from torch._inductor import config
from torch._inductor.utils import run_and_get_code

from torch_llmkernels import backend, plan, registry
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.run import _Evaluator, evaluate
from torch_llmkernels.evaluate.timing import Times
from torch_llmkernels.evaluation import Status
from torch_llmkernels.graph import op
from torch_llmkernels.graph.constants import constants_of
from torch_llmkernels.graph.regions import find_regions
from torch_llmkernels.graph.task_of import task_of
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.task import Task, TensorSpec

KERNEL = """/*---
implements = "linear.relu"
target = "cpu"
dtypes = ["float32"]
optional = ["bias"]
where = ["x.contiguous", "y.contiguous"]
dims = { rows = "x.shape[0]", depth = "x.shape[1]", cols = "weight.shape[1]" }
align = 4
[[workspace]]
name = "packed"
dtype = "float32"
shape = ["cols", "depth"]
[[workspace]]
name = "row"
dtype = "float32"
shape = ["cols"]
[[prepare]]
kernel = "pack"
args = ["weight", "packed", "depth", "cols", "weight.stride[0]", "weight.stride[1]"]
[[launch]]
kernel = "linear_relu"
args = ["x", "weight", "bias", "packed", "row", "y", "rows", "depth", "cols"]
---*/
extern "C" void pack(const float* weight, float* packed, int64_t depth, int64_t cols, int64_t down, int64_t right) {
  for (int64_t n = 0; n < cols; ++n)
    for (int64_t k = 0; k < depth; ++k) packed[n * depth + k] = weight[k * down + n * right];
}
extern "C" void linear_relu(const float* x, const float* weight, const float* bias, const float* packed, float* row, float* y,
                            int64_t rows, int64_t depth, int64_t cols) {
  for (int64_t m = 0; m < rows; ++m) {
    for (int64_t n = 0; n < cols; ++n) {
      double sum = 0;
      for (int64_t k = 0; k < depth; ++k) sum += (double)x[m * depth + k] * packed[n * depth + k];
      row[n] = (float)(HAS_BIAS ? sum + bias[n] : sum);
    }
    for (int64_t n = 0; n < cols; ++n) y[m * cols + n] = row[n] > 0 || row[n] != row[n] ? row[n] : 0;
  }
}
"""

pytestmark = pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")


class Layer(nn.Module):
    def __init__(self, width: int = 24) -> None:
        super().__init__()
        self.linear = nn.Linear(16, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.linear(x))


def library(root: Path) -> dict[str, object]:
    """Options of a compilation whose library holds the kernel, and nothing else."""
    file = root / "library" / "linear.relu" / "packing.cpp"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(KERNEL)
    return {
        "library_dir": str(root / "library"), "cache_dir": str(root / "store"), "swap": "correct", "strict": True,
        "verify_budget_s": 600.0,
    }  # fmt: skip


@pytest.fixture
def compiled(tmp_path: Path) -> Iterator[Callable]:
    """`torch.compile` with that library."""
    backend.register()  # where the package is on the path but not installed
    torch._dynamo.reset()
    plan.forget()
    registry.clear()
    torch.manual_seed(0)  # a ReLU of other weights could be zero everywhere, before and after an edit
    uncached = config.patch(fx_graph_cache=False, fx_graph_remote_cache=False)
    with uncached, functorch_config.patch(enable_autograd_cache=False), mock.patch.object(op, "_slots", {}):
        options = library(tmp_path)
        yield lambda fn, dynamic=False, **more: torch.compile(
            fn, backend="llmkernels", dynamic=dynamic, options={**options, **more}
        )
    torch._dynamo.reset()


@pytest.fixture
def packs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """One entry per run of `llmk::prepare`."""
    runs: list[int] = []
    prepare = op.Slot.prepare
    monkeypatch.setattr(op.Slot, "prepare", lambda slot, constants: runs.append(1) or prepare(slot, constants))
    return runs


def swapped() -> bool:
    """Whether every region that the kernel implements runs it."""
    return {r.swapped for graph in registry.report() for r in graph.regions if r.signature == "linear.relu"} == {True}


def in_place(layer: Layer) -> None:
    with torch.no_grad():
        layer.linear.weight.mul_(2).add_(1)


def by_data(layer: Layer) -> None:
    layer.linear.weight.data.add_(1)


def new_data(layer: Layer) -> None:
    layer.linear.weight.data = torch.randn_like(layer.linear.weight)


def loaded(layer: Layer) -> None:
    layer.load_state_dict(Layer().state_dict())


def stepped(layer: Layer) -> None:
    with torch.enable_grad():
        optimizer = torch.optim.SGD(layer.parameters(), lr=1.0)
        layer(torch.randn(4, 16, device=layer.linear.weight.device)).sum().backward()
        optimizer.step()


EDITS = [in_place, by_data, new_data, loaded, stepped]


@pytest.mark.parametrize("training", [False, True])
def test_an_edit_of_the_weights_is_seen_at_the_next_call(compiled: Callable, training: bool) -> None:
    layer, x = Layer(), torch.randn(4, 16)
    fn = compiled(layer)
    with torch.set_grad_enabled(training):
        torch.testing.assert_close(fn(x), layer(x))
        for edit in EDITS:
            before = layer(x)
            edit(layer)
            assert not torch.equal(before, layer(x)), edit.__name__
            torch.testing.assert_close(fn(x), layer(x), msg=lambda m, edit=edit: f"{edit.__name__}: {m}")
    assert swapped()


def test_freezing_by_options_alone_freezes_nothing_and_sees_edits(compiled: Callable, packs: list[int]) -> None:
    """Dynamo reads the process's config when it captures: the weights then are inputs of the graph, for Inductor too."""
    layer, x = Layer(), torch.randn(4, 16)
    fn = compiled(layer, freezing=True)
    with torch.no_grad():
        fn(x)
        by_data(layer)
        torch.testing.assert_close(fn(x), layer(x))
    assert swapped() and not packs


def test_frozen_weights_are_packed_once(compiled: Callable, packs: list[int]) -> None:
    layer, x = Layer(), torch.randn(4, 16)
    with torch.no_grad(), config.patch(freezing=True):
        fn = compiled(layer)
        got, (code,) = run_and_get_code(fn, x)
        torch.testing.assert_close(got, layer(x))
        torch.testing.assert_close(fn(x + 1), layer(x + 1))
    assert swapped() and len(packs) == 1
    (call,) = [line for line in code.splitlines() if line.strip().startswith("llmk_linear_relu") and "bind" not in line]
    assert call.count("_frozen_param") == 3  # packed, weight and bias


def test_what_is_kept_serves_every_size(compiled: Callable, packs: list[int]) -> None:
    layer, x = Layer(), torch.randn(6, 16)
    torch._dynamo.mark_dynamic(x, 0)
    with torch.no_grad(), config.patch(freezing=True):
        fn = compiled(layer, dynamic=None)
        for rows in (6, 3, 9):
            y = torch.randn(rows, 16) if rows != 6 else x
            torch.testing.assert_close(fn(y), layer(y))
    assert swapped() and len(packs) == 1


def test_layers_of_one_task_keep_copies_of_their_own(compiled: Callable, packs: list[int]) -> None:
    """They share a slot, a binary and a launcher; what is packed belongs to the graph."""
    model, x = nn.Sequential(*(Layer(16) for _ in range(3))), torch.randn(4, 16)
    with torch.no_grad(), config.patch(freezing=True):
        fn = compiled(model)
        for _ in range(2):
            torch.testing.assert_close(fn(x), model(x))
    assert swapped() and len(packs) == 3 and len(op.slots()) == 1


@pytest.mark.parametrize("edit", EDITS, ids=lambda e: e.__name__)
def test_a_frozen_graph_compiled_anew_has_the_new_weights(compiled: Callable, edit: Callable) -> None:
    """Nothing is kept outside of the graph: not by address, not by task."""
    layer, x = Layer(), torch.randn(4, 16)
    with torch.no_grad(), config.patch(freezing=True):
        compiled(layer)(x)
        edit(layer)
        torch._dynamo.reset()
        torch.testing.assert_close(compiled(layer)(x), layer(x))
    assert swapped()


def test_a_frozen_graph_holds_the_weights_it_froze(compiled: Callable) -> None:
    """What freezing means in Inductor: a parameter that the graph has folded may be edited, but not for this graph."""
    layer, x = Layer(), torch.randn(4, 16)
    with torch.no_grad(), config.patch(freezing=True):
        fn = compiled(layer)
        before = fn(x)
        layer.linear.weight.data.add_(1)
        torch.testing.assert_close(fn(x), before)


def test_a_weight_that_the_graph_changes_is_no_constant(compiled: Callable, packs: list[int]) -> None:
    layer, x = Layer(), torch.randn(4, 16)

    def decayed(x: torch.Tensor) -> torch.Tensor:
        layer.linear.weight.mul_(0.5)
        return layer(x)

    with torch.no_grad(), config.patch(freezing=True):
        fn = compiled(decayed)
        for _ in range(2):
            expected = F.relu(F.linear(x, layer.linear.weight * 0.5, layer.linear.bias))
            torch.testing.assert_close(fn(x), expected)
    assert not packs


def task(constant: bool) -> Task:
    gm = capture(Layer(), torch.randn(4, 16))
    (region,) = find_regions(gm.graph)[0]
    weights = {node for role, node in region.inputs if role != "x"}
    return task_of(region, constant=weights if constant else frozenset()).task


@pytest.mark.parametrize("constant", [False, True])
def test_one_file_serves_tasks_with_and_without_constants(constant: bool) -> None:
    kernel = parse_kernel(KERNEL, "packing")
    found = task(constant)
    assert kernel.why_not(found) is None
    assert kernel.prepared(found) == (("packed",) if constant else ())
    outcome = evaluate(Job(found, KERNEL, "packing", timed=False))
    assert outcome.status is Status.CORRECT, outcome.detail


def dynamic(task: Task) -> Task:
    """The task with a number of rows that only a call knows."""

    def of_rows(spec: TensorSpec) -> TensorSpec:
        return dataclasses.replace(spec, shape=("d0", *spec.shape[1:])) if spec.name in ("x", "y") else spec

    inputs, outputs = (tuple(map(of_rows, group)) for group in (task.inputs, task.outputs))
    return dataclasses.replace(task, inputs=inputs, outputs=outputs, symbols=(("d0", 4),))


@pytest.mark.parametrize("is_kept", [False, True])
def test_a_kernel_is_timed_as_it_will_run(is_kept: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a workspace has a size that only a call knows, the compiled graph keeps nothing: packing is timed too."""
    text = KERNEL if is_kept else KERNEL.replace('shape = ["cols"]', 'shape = ["rows * cols"]')
    found = dynamic(task(True))
    assert bool(parse_kernel(text).prepared(found)) == is_kept
    timed: list[bool] = []

    class Stopwatch:
        def compare(self, *runs: object, prepare: object, **options: object) -> Times:
            timed.append(prepare is not None)
            return Times(1.0, 0.0, (("eager", 1.0),), (("eager", 1.0),))

    monkeypatch.setattr(_Evaluator, "_stopwatch", lambda self, made, device: Stopwatch())
    outcome = evaluate(Job(found, text, "packing"))
    assert outcome.status is Status.TIMED, outcome.detail
    assert timed == [is_kept]


def test_what_is_made_of_more_than_constants_is_not_kept() -> None:
    """A prepare launch that reads the activation runs at every call, whatever else is constant."""
    reads_x = KERNEL.replace('args = ["weight", "packed", "depth"', 'args = ["x", "packed", "depth"')
    assert parse_kernel(reads_x).prepared(task(True)) == ()


@pytest.mark.parametrize("args", ['["weight", "y", "depth"', '["packed", "packed", "depth"'])
def test_a_launch_that_writes_an_output_or_reads_no_input_is_no_packing(args: str) -> None:
    """Where packing runs, once, there is no output; and what reads nothing belongs to no constant."""
    kernel = parse_kernel(KERNEL.replace('args = ["weight", "packed", "depth"', f"args = {args}"))
    assert kernel.prepared(task(True)) == ()


def test_outside_of_freezing_nothing_is_constant() -> None:
    assert constants_of(capture(Layer(), torch.randn(4, 16)).graph) == frozenset()


CUDA_KERNEL = """/*---
implements = "linear.relu"
target = "cuda"
dtypes = ["float32"]
optional = ["bias"]
where = ["x.contiguous", "y.contiguous"]
dims = { rows = "x.shape[0]", depth = "x.shape[1]", cols = "weight.shape[1]" }
align = 4
[[workspace]]
name = "packed"
dtype = "float32"
shape = ["cols", "depth"]
[[prepare]]
kernel = "pack"
grid = ["cols"]
block = ["128"]
args = ["weight", "packed", "depth", "weight.stride[0]", "weight.stride[1]"]
[[launch]]
kernel = "linear_relu"
grid = ["rows"]
block = ["128"]
args = ["x", "weight", "bias", "packed", "y", "depth", "cols"]
---*/
extern "C" __global__ void pack(const float* weight, float* packed, int depth, int down, int right) {
  for (int k = threadIdx.x; k < depth; k += blockDim.x) packed[blockIdx.x * depth + k] = weight[k * down + blockIdx.x * right];
}
extern "C" __global__ void linear_relu(const float* x, const float* weight, const float* bias, const float* packed, float* y,
                                       int depth, int cols) {
  for (int n = threadIdx.x; n < cols; n += blockDim.x) {
    double sum = HAS_BIAS ? bias[n] : 0;
    for (int k = 0; k < depth; ++k) sum += (double)x[blockIdx.x * depth + k] * packed[n * depth + k];
    y[blockIdx.x * cols + n] = sum > 0 || sum != sum ? (float)sum : 0.0f;
  }
}
"""


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_a_replayed_cuda_graph_sees_an_edit(tmp_path: Path, compiled: Callable, frozen: bool) -> None:
    """The packing is part of the graph, unless the weights were frozen: then the replay has what was frozen."""
    if not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    library(tmp_path)
    (tmp_path / "library" / "linear.relu" / "packing.cu").write_text(CUDA_KERNEL)
    layer, x = Layer().cuda(), torch.randn(4, 16, device="cuda")
    with torch.no_grad(), config.patch(freezing=frozen):
        fn = compiled(layer, **{"triton.cudagraphs": True})
        for _ in range(3):
            before = fn(x).clone()
        torch.testing.assert_close(before, layer(x))
        for edit in [in_place, by_data] + ([] if frozen else [new_data, loaded, stepped]):
            edit(layer)
            torch.testing.assert_close(fn(x).clone(), before if frozen else layer(x))
    assert swapped()
