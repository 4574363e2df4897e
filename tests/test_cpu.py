"""The CPU target: kernels compile with the machine's C++ compiler, compute, share torch's threads, and keep to themselves."""

import threading
from collections.abc import Mapping
from pathlib import Path

import pytest
import torch

from tests import tasks
from torch_llmkernels import graph_decision, settings
from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.store import open_store
from torch_llmkernels.errors import CompileError, LaunchError, NotApplicable, SchemaError, ToolchainMissing
from torch_llmkernels.evaluation import Decision, GraphDecision
from torch_llmkernels.kernels.device import cpu_facts
from torch_llmkernels.kernels.source import Kernel, parse_kernel
from torch_llmkernels.kernels.targets import Binary, Launcher, build, target_for
from torch_llmkernels.task import Task

CPU = target_for("cpu")
FACTS = cpu_facts()
LAYER_NORM = parse_kernel((Path(__file__).parent / "kernels" / "layer_norm.cpp").read_text(), "layer_norm")

VECTOR = """/*---
implements = "add.relu"
target = "cpu"
dtypes = ["float32"]
dims = {{ n = "y.numel" }}
align = {align}
{tables}
[[launch]]
kernel = "k"
args = [{args}]
---*/
{before}
extern "C" void k({params}) {{ {body} }}
"""


def vector(body: str, before: str = "", align: int = 4, tables: str = "", args: str = '"a", "b", "y", "n"',
           params: str = "const float* a, const float* b, float* y, int64_t n") -> Kernel:  # fmt: skip
    text = VECTOR.format(body=body, before=before, align=align, tables=tables, args=args, params=params)
    return parse_kernel(text, "vector")


def launcher_for(kernel: Kernel, task: Task, constants: Mapping[str, int] | None = None) -> Launcher:
    constants = constants or {}
    return CPU.load(CPU.compile(kernel, task, constants, FACTS), kernel, task, constants, FACTS)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_kernel_computes_what_torch_computes(dtype: str) -> None:
    kind = getattr(torch, dtype)
    task = tasks.layer_norm_task(5, 67, dtype)
    x, weight, bias = torch.randn(5, 67, dtype=kind), torch.randn(67, dtype=kind), torch.randn(67, dtype=kind)
    y = torch.full_like(x, torch.nan)
    launcher_for(LAYER_NORM, task, {"GRAIN": 1})(y, x, weight, bias)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (67,), weight, bias))


def test_absent_optionals_and_extra_outputs() -> None:
    task = tasks.layer_norm_task(5, 64, "float16", weight=False, bias=False, stats=True)
    x, y, mean, rstd = torch.randn(5, 64).half(), torch.empty(5, 64).half(), torch.empty(5, 1), torch.empty(5, 1)
    launcher_for(LAYER_NORM, task, {"GRAIN": 8})(y, mean, rstd, x)
    torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (64,)))
    torch.testing.assert_close(mean, x.float().mean(1, keepdim=True))


def test_one_binary_serves_every_size_of_a_dynamic_task() -> None:
    task = tasks.layer_norm_task("d0", 16, bias=False, hints={"d0": 4})
    launcher = launcher_for(LAYER_NORM, task, {"GRAIN": 1})
    for rows in (1, 9, 0):
        x, weight = torch.randn(rows, 16), torch.randn(16)
        y = torch.empty_like(x)
        launcher(y, x, weight, rows)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (16,), weight))


def test_kernels_use_the_threads_that_torch_uses() -> None:
    task = tasks.relu_add_task(8)
    launcher = launcher_for(vector("y[0] = omp_get_max_threads();"), task)
    a, y = torch.zeros(8), torch.zeros(8)
    before = torch.get_num_threads()
    try:
        for threads in (1, 3):
            torch.set_num_threads(threads)
            launcher(y, a, a)
            assert y[0] == threads
            # a thread that torch has not seen yet follows too
            worker = threading.Thread(target=launcher, args=(y.zero_(), a, a))
            worker.start()
            worker.join()
            assert y[0] == threads
    finally:
        torch.set_num_threads(before)


def test_what_was_decided_holds_for_one_number_of_threads(tmp_path: Path) -> None:
    """A kernel that wins on one thread may lose on many, in its graph too; shipped records are filed by kind alone."""
    task, before = tasks.layer_norm_task(), torch.get_num_threads()
    with settings.override(cache_dir=str(tmp_path / "store")) as knobs:
        store, facts = open_store(knobs), {}
        try:
            for threads in (1, 2):
                torch.set_num_threads(threads)
                facts[threads] = CPU.facts()
                assert store.decision(RecordKey.of(task, facts[threads])) is None
                assert graph_decision.recall("graph", "cpu", knobs) is None
                store.put_decision(RecordKey.of(task, facts[threads]), Decision(None, "decided"))
                graph_decision.remember(GraphDecision("graph", (), (), 1.0, 1.0, 0.1), "cpu", knobs)
        finally:
            torch.set_num_threads(before)
    assert facts[1].kind == facts[2].kind and facts[1].unit != facts[2].unit


def test_the_process_has_one_openmp_runtime() -> None:
    launcher_for(vector("\n#pragma omp parallel for\nfor (int64_t i = 0; i < n; i++) y[i] = 1;\n"), tasks.relu_add_task(8))
    mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "/libgomp" in line}
    assert len(mapped) == 1 and "/torch/" in mapped.pop()


def test_workspaces_are_zeroed_before_each_call() -> None:
    tables = '[[workspace]]\nname = "count"\ndtype = "int32"\nshape = ["1"]\nzero = true'
    kernel = vector("count[0] += 1; y[0] = count[0];", tables=tables, args='"a", "b", "y", "count"',
                    params="const float* a, const float* b, float* y, int* count")  # fmt: skip
    launcher = launcher_for(kernel, tasks.relu_add_task(8))
    a, y, count = torch.zeros(8), torch.zeros(8), torch.full((1,), 77, dtype=torch.int32)
    for _ in range(2):
        launcher(y, count, a, a)
        assert y[0] == 1


def test_prepare_launches_run_in_each_call_until_prepared() -> None:
    tables = """[[workspace]]\nname = "packed"\ndtype = "float32"\nshape = ["1"]\nzero = true
    [[prepare]]\nkernel = "pack"\nargs = ["b", "packed"]"""
    before = 'extern "C" void pack(const float* b, float* packed) { packed[0] += b[0]; }'
    kernel = vector("y[0] = packed[0];", before, tables=tables, args='"a", "packed", "y"',
                    params="const float* a, const float* packed, float* y")  # fmt: skip
    launcher = launcher_for(kernel, tasks.relu_add_task(8))
    a, b, y, packed = torch.zeros(8), torch.ones(8), torch.zeros(8), torch.zeros(1)
    launcher(y, packed, a, b)
    assert y[0] == 1
    launcher.prepare(y, packed, a, b)
    launcher(y, packed, a, b.fill_(5))
    assert launcher.prepared and y[0] == 1  # what was prepared is kept


def test_misaligned_tensors_and_sizes_outside_where_are_not_applicable() -> None:
    launcher = launcher_for(vector("y[0] = 1;", align=16), tasks.relu_add_task(8))
    memory = torch.zeros(16)
    start = (-memory.data_ptr() % 16) // 4
    aligned, shifted = memory[start : start + 8], memory[start + 1 : start + 9]
    launcher(aligned, aligned, aligned)
    with pytest.raises(NotApplicable, match="multiples of 16 bytes"):
        launcher(aligned, shifted, aligned)


def test_compile_errors_carry_the_lines_of_the_kernel_file() -> None:
    kernel = vector("y[0] = undeclared;")
    line = kernel.text.splitlines().index(next(li for li in kernel.text.splitlines() if "undeclared" in li)) + 1
    with pytest.raises(CompileError, match="undeclared") as caught:
        CPU.compile(kernel, tasks.relu_add_task(8), {}, FACTS)
    assert f"vector.cpp:{line}:" in caught.value.log


@pytest.mark.parametrize(
    "before, body, message",
    [
        ("int calls;", "y[0] = ++calls;", "mutable global"),
        ("static float start = std::sin(1.0f) + omp_get_max_threads();", "y[0] = start;", "mutable global|load time"),
        ("", "y[0] = ::rand();", "uses rand; a kernel may call"),
        ("", "::omp_set_num_threads(1);", "uses omp_set_num_threads"),
    ],
)
def test_what_the_object_imports_and_keeps_is_checked(before: str, body: str, message: str) -> None:
    with pytest.raises(CompileError, match=message):
        CPU.compile(vector(body, before), tasks.relu_add_task(8), {}, FACTS)


def test_build_stores_the_binary_and_finds_it_again() -> None:
    class Store(dict[str, bytes]):
        def binary(self, key: str) -> bytes | None:
            return self.get(key)

        def put_binary(self, key: str, code: bytes) -> None:
            self[key] = code

    store, kernel, task = Store(), vector("y[0] = 1;"), tasks.relu_add_task(8)
    binary = build(kernel, task, {}, CPU, FACTS, store)
    assert list(store) == [binary.key] and Binary.from_bytes(store[binary.key]) == binary
    with settings.override(cxx="no-such-compiler"), pytest.raises(ToolchainMissing, match="no-such-compiler"):
        build(kernel, task, {}, CPU, FACTS, store)
    assert build(kernel, task, {}, CPU, FACTS, store) == binary
    store[binary.key] = store[binary.key][:-9]
    assert build(kernel, task, {}, CPU, FACTS, store).code  # a damaged entry is compiled again
    assert Binary.from_bytes(store[binary.key]).key == binary.key


def test_damaged_binaries_are_refused() -> None:
    with pytest.raises(SchemaError, match="damaged"):
        Binary.from_bytes(b"not json\n")
    with pytest.raises(LaunchError, match="dynamic loader refused"):
        CPU.load(Binary(b"\x7fELF", CPU_RESOURCES, "k"), vector(""), tasks.relu_add_task(8), {}, FACTS)


def test_an_unknown_target_is_an_error() -> None:
    with pytest.raises(ToolchainMissing, match="'cuda' and 'cpu'"):
        target_for("metal")


CPU_RESOURCES = CPU.compile(vector(""), tasks.relu_add_task(8), {}, FACTS).resources
