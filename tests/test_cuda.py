"""The CUDA target: NVRTC compiles without a GPU; the launcher is checked against a recorded driver here, and on a GPU where there
is one (marked `gpu`)."""

import ctypes
import threading
from collections.abc import Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from tests import tasks
from torch_llmkernels.errors import CompileError, LaunchError, NotApplicable, ToolchainMissing
from torch_llmkernels.evaluation import KernelResources, Resources
from torch_llmkernels.kernels import cuda_launcher, nvrtc
from torch_llmkernels.kernels.cuda_launcher import CudaLauncher
from torch_llmkernels.kernels.device import facts_for_arch
from torch_llmkernels.kernels.source import Kernel, parse_kernel
from torch_llmkernels.kernels.targets import Binary, Launcher, target_for
from torch_llmkernels.task import Task

driver = pytest.importorskip("cuda.bindings.driver")
CUDA = target_for("cuda")
H100 = facts_for_arch("sm_90a")
KERNELS = Path(__file__).parent / "kernels"
GPU = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def kernel(name: str) -> Kernel:
    return parse_kernel((KERNELS / f"{name}.cu").read_text(), name)


def edited(name: str, old: str, new: str) -> Kernel:
    text = (KERNELS / f"{name}.cu").read_text()
    assert old in text
    return parse_kernel(text.replace(old, new), name)


@pytest.mark.parametrize("arch", ["sm_80", "sm_89", "sm_90a", "sm_100"])
def test_portable_kernels_compile_for_every_architecture(arch: str) -> None:
    facts = facts_for_arch(arch)
    for dtype in ("float32", "bfloat16"):
        found = CUDA.compile(kernel("layer_norm"), tasks.layer_norm_task(8, 64, dtype, "cuda"), {"THREADS": 128}, facts)
        assert found.code[:4] == b"\x7fELF" and found.resources.registers and found.resources.spill_bytes == 0
    add = CUDA.compile(kernel("add_relu"), tasks.relu_add_task(64, "float16", "cuda"), {"THREADS": 128, "VEC": 4}, facts)
    assert add.resources.binary_bytes == len(add.code)


def test_a_kernel_with_tma_mbarrier_wgmma_and_a_cluster_compiles() -> None:
    task = tasks.matmul_task(256, 256, 128, b_transposed=True)
    assert kernel("tma_wgmma").why_not(task) is None
    found = CUDA.compile(kernel("tma_wgmma"), task, {}, H100).resources
    assert found.registers is not None and 64 < found.registers <= 128 and found.spill_bytes == 0
    (one,) = found.kernels
    assert (one.registers, one.spill_bytes, one.occupancy) == (found.registers, 0, None) and found.warnings == ()


def test_every_function_has_its_resources_and_warnings_come_once() -> None:
    log = '''ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'two'
ptxas info    : (C7510) Potential Performance Loss: wgmma.mma_async instructions are serialized in 'two'
k.cu(12): warning #177-D: variable "a" was declared but never referenced
ptxas info    : 16 bytes gmem
ptxas info    : Compiling entry function 'two' for 'sm_90a'
ptxas info    : Function properties for two
ptxas         .     112 bytes stack frame, 96 bytes spill stores, 100 bytes spill loads
ptxas info    : Used 168 registers, used 1 barriers, 112 bytes cumulative stack size, 48 bytes smem
ptxas info    : Function properties for _Z5helper
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Compiling entry function 'one' for 'sm_90a'
ptxas info    : Function properties for one
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 41 registers, used 1 barriers
'''
    assert nvrtc.kernel_table(log) == (KernelResources("one", 41), KernelResources("two", 168, 112, 196, 48))
    serialised, unused = nvrtc.warnings_of(log)
    assert "serialized" in serialised and "never referenced" in unused


@pytest.mark.parametrize("arch", ["sm_80", "sm_90a", "sm_100a"])
def test_every_helper_of_the_prelude_assembles(arch: str) -> None:
    CUDA.compile(kernel("every_helper"), tasks.matmul_task(), {}, facts_for_arch(arch))


def test_compile_errors_carry_the_lines_of_the_kernel_file() -> None:
    broken = edited("add_relu", "if (i >= n) return;", "if (i >= undeclared) return;")
    line = next(i for i, text in enumerate(broken.text.splitlines(), 1) if "undeclared" in text)
    with pytest.raises(CompileError, match="undeclared") as caught:
        CUDA.compile(broken, tasks.relu_add_task(64, device="cuda"), {"THREADS": 128, "VEC": 4}, H100)
    assert f"add_relu.cu({line}): error" in caught.value.log


def test_device_variables_are_refused() -> None:
    text = kernel("add_relu").text.replace(
        "// y = relu", "#define GLOBAL __attribute__((device))\nGLOBAL int counter;\n// y = relu"
    )
    hidden = parse_kernel(text.replace("atomicAdd(calls, 1)", "atomicAdd(&counter, 1)"), "add_relu")
    with pytest.raises(CompileError, match=r"variables \(counter\); a kernel keeps no state"):
        CUDA.compile(hidden, tasks.relu_add_task(64, device="cuda"), {"THREADS": 128, "VEC": 4}, H100)


def test_a_constexpr_member_that_is_false_is_no_state() -> None:
    trait = """template <class E> struct is_half { static constexpr bool value = false; };
template <> struct is_half<__half> { static constexpr bool value = true; };
// y = relu"""
    text = kernel("add_relu").text.replace("// y = relu", trait).replace("if (i >= n)", "if (!is_half<T>::value && i >= n)")
    for dtype in ("float16", "bfloat16", "float32"):
        task = tasks.relu_add_task(64, dtype, device="cuda")
        assert CUDA.compile(parse_kernel(text, "add_relu"), task, {"THREADS": 128, "VEC": 4}, H100).code


def test_the_key_names_everything_the_code_depends_on() -> None:
    def key(task: Task, constants: Mapping[str, int], arch: str = "sm_90a") -> str:
        return CUDA.binary_key(kernel("layer_norm"), task, constants, facts_for_arch(arch))

    base = key(tasks.layer_norm_task(8, 64, device="cuda"), {"THREADS": 128})
    assert base == key(tasks.layer_norm_task(16, 64, device="cuda"), {"THREADS": 128})  # rows arrive at run time
    assert base not in (
        key(tasks.layer_norm_task(8, 64, "float16", "cuda"), {"THREADS": 128}),
        key(tasks.layer_norm_task(8, 64, device="cuda"), {"THREADS": 256}),
        key(tasks.layer_norm_task(8, 64, device="cuda", bias=False), {"THREADS": 128}),
        key(tasks.layer_norm_task(8, 64, device="cuda"), {"THREADS": 128}, "sm_80"),
    )


def test_missing_bindings_are_a_toolchain_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_include_candidates", lambda: iter(()))
    nvrtc.include_directory.cache_clear()
    try:
        with pytest.raises(ToolchainMissing, match=r"pip install 'torch-llmkernels\[cuda\]'"):
            nvrtc.include_directory()
    finally:
        nvrtc.include_directory.cache_clear()


# The launcher against a recorded driver: what would the device have been told?


class Recorder(SimpleNamespace):
    """Stands for `cuda.bindings.driver`: real types, but launches and memsets are written down with the arguments behind their
    pointers (`sizes` bytes each)."""

    def __init__(self, sizes: list[int]) -> None:
        super().__init__(sizes=sizes, calls=[], fail_next=None)

    def __getattr__(self, name: str) -> Any:
        return getattr(driver, name)

    def cuLaunchKernelEx(self, config: Any, function: Any, addresses: int, extra: int) -> tuple[Any]:
        if self.fail_next is not None:
            status, self.fail_next = self.fail_next, None
            return (status,)
        pointers = (ctypes.c_void_p * len(self.sizes)).from_address(addresses)
        values = [ctypes.string_at(p, n) for p, n in zip(pointers, self.sizes, strict=True)]
        kinds = {a.id for a in config.attrs} if config.numAttrs else set()
        self.calls.append(SimpleNamespace(function=function, values=values, grid=config.gridDimX, block=config.blockDimX,
                                          smem=config.sharedMemBytes, stream=int(config.hStream), kinds=kinds))  # fmt: skip
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuMemsetD8Async(self, pointer: int, value: int, nbytes: int, stream: int) -> tuple[Any]:
        self.calls.append(("memset", pointer, value, nbytes, stream))
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuCtxSetCurrent(self, context: Any) -> tuple[Any]:
        self.calls.append(("context", context))
        return (driver.CUresult.CUDA_SUCCESS,)

    def cuTensorMapEncodeTiled(self, *args: Any) -> tuple[Any, Any]:
        self.calls.append(("encode", int(args[2])))
        found = driver.CUtensorMap()
        ctypes.memset(int(found.getPtr()), len(self.calls), 128)
        return driver.CUresult.CUDA_SUCCESS, found


class FakeDevice:
    """Stands for a device with a loaded module."""

    def __init__(self, code: bytes, kernel: Kernel, index: int) -> None:
        self.index, self.context = index, "context"
        self.functions = {s.kernel: s.kernel for s in kernel.launches}

    def allow(self, step: Any) -> None: ...


class FakeTensor:
    def __init__(self, pointer: int, index: int = 0) -> None:
        self.pointer, self.index = pointer, index

    def data_ptr(self) -> int:
        return self.pointer

    def get_device(self) -> int:
        return self.index


def recorded(monkeypatch: pytest.MonkeyPatch, which: Kernel, task: Task, constants: Mapping[str, int], sizes: list[int]) -> Any:
    """(launcher, recorder, current device as a one-element list)."""
    recorder, current = Recorder(sizes), [0]
    monkeypatch.setattr(cuda_launcher, "_driver", lambda: recorder)
    monkeypatch.setattr(cuda_launcher, "_Device", FakeDevice)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 70 + index, raising=False)
    monkeypatch.setattr(torch._C, "_cuda_getDevice", lambda: current[0], raising=False)
    monkeypatch.setattr(torch._C, "_cuda_setDevice", lambda index: current.__setitem__(0, index), raising=False)
    return CudaLauncher(Binary(b"", Resources(), ""), which, task, constants, H100), recorder, current


def as_int(value: bytes) -> int:
    return int.from_bytes(value, "little")


def test_a_launch_passes_pointers_and_scalars_by_the_kernels_own_types(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.relu_add_task(1000, device="cuda")
    launcher, recorder, _ = recorded(monkeypatch, kernel("add_relu"), task, {"THREADS": 128, "VEC": 4}, [8, 8, 8, 8, 8])
    y, calls, a, b = FakeTensor(0x100), FakeTensor(0x200), FakeTensor(0x300), FakeTensor(0x400)
    launcher(y, calls, a, b)
    memset, launch = recorder.calls
    assert memset == ("memset", 0x200, 0, 4, 70)
    assert [as_int(v) for v in launch.values] == [0x300, 0x400, 0x100, 0x200, 1000]
    assert (launch.grid, launch.block, launch.smem, launch.stream, launch.kinds) == (2, 128, 0, 70, set())


def test_absent_tensors_are_null_and_floats_are_floats(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.layer_norm_task("d0", 64, device="cuda", bias=False, eps=0.5, hints={"d0": 3})
    launcher, recorder, _ = recorded(monkeypatch, kernel("layer_norm"), task, {"THREADS": 128}, [8] * 6 + [4, 4])
    for rows in (3, 11):
        launcher(FakeTensor(1), FakeTensor(2), FakeTensor(3), rows)
        values = recorder.calls[-1].values
        assert [as_int(v) for v in values[:7]] == [2, 3, 0, 1, 0, 0, 64]
        assert ctypes.c_float.from_buffer_copy(values[7]).value == 0.5 and recorder.calls[-1].grid == rows
    launcher(FakeTensor(0), FakeTensor(0), FakeTensor(3), 0)
    assert len(recorder.calls) == 2  # nothing to do for zero rows


def test_tensors_on_another_device_launch_there_and_the_current_device_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.relu_add_task(1000, device="cuda")
    launcher, recorder, current = recorded(monkeypatch, kernel("add_relu"), task, {"THREADS": 128, "VEC": 4}, [8] * 5)
    launcher(*(FakeTensor(16 * i, index=1) for i in range(4)))
    assert recorder.calls[-1].stream == 71 and current == [0]


def test_a_thread_without_a_context_gets_torchs(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.layer_norm_task(3, 64, device="cuda")
    launcher, recorder, _ = recorded(monkeypatch, kernel("layer_norm"), task, {"THREADS": 128}, [8] * 6 + [4, 4])
    recorder.fail_next = driver.CUresult.CUDA_ERROR_INVALID_CONTEXT
    launcher(*(FakeTensor(16 * i) for i in range(4)))
    assert recorder.calls[0] == ("context", "context") and recorder.calls[1].grid == 3
    recorder.fail_next = driver.CUresult.CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES
    with pytest.raises(LaunchError, match=r"layer_norm: .*CUDA_ERROR_LAUNCH_OUT_OF_RESOURCES"):
        launcher(*(FakeTensor(16 * i) for i in range(4)))


def test_misaligned_tensors_are_not_applicable_and_launch_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.relu_add_task(1000, device="cuda")
    launcher, recorder, _ = recorded(monkeypatch, kernel("add_relu"), task, {"THREADS": 128, "VEC": 4}, [8] * 5)
    with pytest.raises(NotApplicable, match="multiples of 16 bytes"):
        launcher(FakeTensor(16), FakeTensor(32), FakeTensor(48), FakeTensor(68))
    assert not recorder.calls


def test_every_call_launches_on_its_own_tensors_and_stream(monkeypatch: pytest.MonkeyPatch) -> None:
    task, aligned = tasks.layer_norm_task(3, 64, device="cuda", bias=False), edited("layer_norm", "align      = 1", "align = 16")
    launcher, recorder, _ = recorded(monkeypatch, aligned, task, {"THREADS": 128}, [8] * 6 + [4, 4])
    first, second = ([FakeTensor(16 * (i + start)) for i in range(3)] for start in (1, 9))
    for stream, (y, x, weight) in ((70, first), (70, first), (71, second), (70, first)):
        monkeypatch.setattr(launcher, "_raw_stream", lambda index, stream=stream: stream)
        launcher(y, x, weight)
        made = recorder.calls[-1]
        assert [as_int(v) for v in made.values[:4]] == [x.pointer, weight.pointer, 0, y.pointer] and made.stream == stream
    (bound,) = launcher._bound.values()
    frames = list(bound.frames)
    with pytest.raises(NotApplicable, match="16 bytes"):
        launcher(FakeTensor(first[0].pointer + 1), *first[1:])
    assert len(recorder.calls) == 4 and bound.frames == frames  # the next call makes no new one


def test_tensor_maps_are_encoded_once_per_address_and_passed_by_value(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.matmul_task(256, 128, 64, b_transposed=True)
    launcher, recorder, _ = recorded(monkeypatch, kernel("tma_wgmma"), task, {}, [128, 128, 8, 4, 4])
    y, a, b, other = FakeTensor(0x1000), FakeTensor(0x2000), FakeTensor(0x3000), FakeTensor(0x4000)
    launcher(y, a, b)
    launcher(y, a, b)
    launcher(y, other, b)
    assert [c[1] for c in recorder.calls if isinstance(c, tuple)] == [0x2000, 0x3000, 0x4000]
    first, second, third = (c for c in recorder.calls if not isinstance(c, tuple))
    assert first.values == second.values and len(set(first.values[0])) == 1
    assert third.values[0] != first.values[0] and third.values[1] == first.values[1]
    assert first.kinds == {driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION} and first.smem == 66560


def test_a_hundred_layers_that_share_a_launcher_encode_their_maps_once(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.matmul_task(256, 128, 64, b_transposed=True)
    launcher, recorder, _ = recorded(monkeypatch, kernel("tma_wgmma"), task, {}, [128, 128, 8, 4, 4])
    y, a, weights = FakeTensor(0x1000), FakeTensor(0x2000), [FakeTensor(0x10000 * i) for i in range(1, 101)]
    for weight in (*weights, *weights):
        launcher(y, a, weight)
    assert [c[1] for c in recorder.calls if isinstance(c, tuple)] == [0x2000, *(w.pointer for w in weights)]


def test_addresses_that_a_map_refuses_leave_no_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.matmul_task(256, 128, 64, b_transposed=True)
    launcher, recorder, _ = recorded(monkeypatch, kernel("tma_wgmma"), task, {}, [128, 128, 8, 4, 4])
    y, a, b, other = (FakeTensor(0x1000 * i) for i in range(1, 5))
    launcher(y, a, b)
    with pytest.raises(NotApplicable, match="16 bytes"):
        launcher(other, FakeTensor(a.pointer + 8), b)
    launcher(y, a, b)
    first, second = (c for c in recorder.calls if not isinstance(c, tuple))
    assert first.values == second.values


def test_launch_attributes_follow_the_header(monkeypatch: pytest.MonkeyPatch) -> None:
    text = (KERNELS / "layer_norm.cu").read_text().replace("block  =", "cooperative = true\npdl = true\nblock  =")
    which = parse_kernel(text + "__device__ void in_order() { pdl_wait(); }\n", "layer_norm")
    task = tasks.layer_norm_task(3, 64, device="cuda")
    launcher, recorder, _ = recorded(monkeypatch, which, task, {"THREADS": 128}, [8] * 6 + [4, 4])
    launcher(*(FakeTensor(16 * i) for i in range(4)))
    kinds = driver.CUlaunchAttributeID
    assert recorder.calls[0].kinds == {
        kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE, kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION,
    }  # fmt: skip


def test_threads_share_a_launcher_without_mixing_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    task = tasks.layer_norm_task(3, 64, device="cuda")
    launcher, recorder, _ = recorded(monkeypatch, kernel("layer_norm"), task, {"THREADS": 128}, [8] * 6 + [4, 4])

    def work(base: int) -> None:
        for _ in range(300):
            launcher(*(FakeTensor(base + i) for i in range(4)))

    workers = [threading.Thread(target=work, args=(base,)) for base in (0x1000, 0x2000, 0x3000)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    seen = [[as_int(v) for v in c.values[:4]] for c in recorder.calls]
    assert len(seen) == 900 and all(len({value & ~0xFFF for value in values}) == 1 for values in seen)


# On a GPU


def loaded(which: Kernel, task: Task, constants: Mapping[str, int]) -> Launcher:
    facts = CUDA.facts(torch.cuda.current_device())
    return CUDA.load(CUDA.compile(which, task, constants, facts), which, task, constants, facts)


def arguments(*shape: int, dtype: torch.dtype = torch.float32, count: int = 1) -> list[torch.Tensor]:
    return [torch.randn(*shape, device="cuda", dtype=dtype) for _ in range(count)]


@GPU
@pytest.mark.gpu
@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "bfloat16"])
def test_layer_norm_agrees_with_torch_on_the_gpu(dtype: str) -> None:
    kind = getattr(torch, dtype)
    task = tasks.layer_norm_task("d0", 1000, dtype, "cuda", stats=True, hints={"d0": 4})
    launcher = loaded(kernel("layer_norm"), task, {"THREADS": 256})
    assert launcher.resources.registers and launcher.resources.occupancy and 0 < launcher.resources.occupancy <= 1
    stat = torch.float64 if dtype == "float64" else torch.float32
    for rows in (1, 70000):
        (x,), (weight, bias) = arguments(rows, 1000, dtype=kind), arguments(1000, dtype=kind, count=2)
        y, mean, rstd = torch.empty_like(x), x.new_empty(rows, 1, dtype=stat), x.new_empty(rows, 1, dtype=stat)
        launcher(y, mean, rstd, x, weight, bias, rows)
        torch.testing.assert_close(y, torch.nn.functional.layer_norm(x, (1000,), weight, bias))
        torch.testing.assert_close(mean, x.to(stat).mean(1, keepdim=True))


@GPU
@pytest.mark.gpu
def test_streams_graphs_and_fresh_threads_on_the_gpu() -> None:
    task = tasks.relu_add_task(4096, device="cuda")
    launcher = loaded(kernel("add_relu"), task, {"THREADS": 256, "VEC": 4})
    a, b, y = arguments(4096, count=3)
    calls = torch.full((1,), 9, dtype=torch.int32, device="cuda")
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        launcher(y, calls, a, b)
    side.synchronize()
    torch.testing.assert_close(y, torch.relu(a + b))
    assert calls.item() == 1
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        launcher(y, calls, a, b)
    a.normal_()
    graph.replay()
    torch.testing.assert_close(y, torch.relu(a + b))
    assert calls.item() == 1
    failures: list[BaseException] = []

    def work() -> None:
        try:
            launcher(y, calls, a, b)
        except BaseException as error:  # reported in the main thread
            failures.append(error)

    y.zero_()
    torch.cuda.synchronize()
    worker = threading.Thread(target=work)
    worker.start()
    worker.join()
    assert not failures
    torch.testing.assert_close(y, torch.relu(a + b))


@GPU
@pytest.mark.gpu
def test_a_launch_neither_allocates_nor_synchronises() -> None:
    task = tasks.relu_add_task(4096, device="cuda")
    launcher = loaded(kernel("add_relu"), task, {"THREADS": 256, "VEC": 4})
    a, b, y = arguments(4096, count=3)
    calls = torch.zeros(1, dtype=torch.int32, device="cuda")
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        launcher(y, calls, a, b)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


@GPU
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_one_launcher_serves_two_gpus() -> None:
    task = tasks.relu_add_task(4096, device="cuda")
    launcher = loaded(kernel("add_relu"), task, {"THREADS": 256, "VEC": 4})
    for index in (1, 0, 1):
        a, b, y = (torch.randn(4096, device=f"cuda:{index}") for _ in range(3))
        launcher(y, torch.zeros(1, dtype=torch.int32, device=y.device), a, b)
        torch.testing.assert_close(y, torch.relu(a + b))
    assert torch.cuda.current_device() == 0


@GPU
@pytest.mark.gpu
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="wgmma is for sm_90a")
@pytest.mark.parametrize("m, n, k", [(256, 128, 64), (512, 384, 1024), (2048, 2048, 2048)])
def test_the_expert_kernel_agrees_with_matmul_on_the_gpu(m: int, n: int, k: int) -> None:
    launcher = loaded(kernel("tma_wgmma"), tasks.matmul_task(m, n, k, b_transposed=True), {})
    for _ in range(3):  # fresh addresses: fresh descriptors
        a, b = torch.randn(m, k, device="cuda").half(), torch.randn(n, k, device="cuda").half().t()
        y = torch.full((m, n), torch.nan, device="cuda", dtype=torch.float16)
        launcher(y, a, b)
        torch.testing.assert_close(y.float(), a.float() @ b.float(), rtol=2e-3, atol=2e-2 * (k / 64) ** 0.5)
