"""Loaded CUDA kernels: launched through the driver on torch's current stream.

A launcher prepares everything it can when it is loaded: modules, function attributes, launch configurations, argument buffers.
A call reads the tensors' addresses, writes them into a buffer, and launches. It neither allocates device memory nor synchronises,
so it can be captured in a CUDA graph. Argument buffers come from a free list, one per call in flight, which makes launchers
thread-safe without a lock: the driver copies the arguments before a launch returns.
"""

from __future__ import annotations

import contextlib
import ctypes
import dataclasses
import functools
import math
import struct
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch_llmkernels.errors import LaunchError, NotApplicable, ToolchainMissing
from torch_llmkernels.evaluation import KernelResources, Resources
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.kernels.plan import Argument, LaunchPlan, MapPlan, Plan, plan_launches
from torch_llmkernels.kernels.targets import Binary

if TYPE_CHECKING:
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.task import Task

MAX_PLANS = 256  # symbol tuples that a dynamic launcher remembers
MAX_DESCRIPTORS = 4096
"""Encoded tensor maps that a plan remembers: layers of one shape share a plan, and one encoding costs the host 10 us."""
_PORTABLE_CLUSTER = 8
_DEFAULT_SMEM = 48 << 10

_CTYPES: dict[str, Any] = {
    "bool": ctypes.c_bool, "i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64, "u64": ctypes.c_uint64,
    "f32": ctypes.c_float, "f64": ctypes.c_double,
}  # fmt: skip
_MAP_DTYPES = {
    "float64": "FLOAT64", "float32": "FLOAT32", "float16": "FLOAT16", "bfloat16": "BFLOAT16", "int64": "INT64", "int32": "INT32",
    "int16": "UINT16", "int8": "UINT8", "uint8": "UINT8", "bool": "UINT8",
}  # fmt: skip


@functools.cache
def _driver() -> Any:
    try:
        from cuda.bindings import driver

        driver.cuDriverGetVersion()
    except (ImportError, OSError, RuntimeError) as error:
        raise ToolchainMissing(
            f"the CUDA driver cannot be loaded ({error}); install cuda-bindings and the NVIDIA driver"
        ) from None
    return driver


def _call(what: str, result: Sequence[Any]) -> Any:
    """The value of a driver call.

    Raises:
        LaunchError: with the driver's name for the failure.
    """
    if result[0]:
        raise LaunchError(f"{what}: the driver answered {result[0].name}")
    return result[1] if len(result) > 1 else None


@contextlib.contextmanager
def _relaxed_capture() -> Iterator[None]:
    """Let this thread load modules although a stream of it is being captured: loading is no part of the graph."""
    driver = _driver()
    relaxed = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_RELAXED
    previous = _call("cuThreadExchangeStreamCaptureMode", driver.cuThreadExchangeStreamCaptureMode(relaxed))
    try:
        yield
    finally:
        driver.cuThreadExchangeStreamCaptureMode(previous)


def _current_context(index: int) -> Any:
    """Torch's context on the current device, made if it is not there yet."""
    import torch

    context = _call("cuCtxGetCurrent", _driver().cuCtxGetCurrent())
    if int(context):
        return context
    torch.empty(1, device=f"cuda:{index}")
    return _call("cuCtxGetCurrent", _driver().cuCtxGetCurrent())


class _Device:
    """A module loaded on one device."""

    def __init__(self, code: bytes, kernel: Kernel, index: int) -> None:
        import torch

        with torch.cuda.device(index), _relaxed_capture():
            self.context = _current_context(index)
            loaded = _driver().cuModuleLoadData(code)
            if loaded[0] == _driver().CUresult.CUDA_ERROR_NO_BINARY_FOR_GPU:
                raise NotApplicable(f"{kernel.name}: compiled for another architecture than that of cuda:{index}")
            self.module = _call(f"{kernel.name}: loading the cubin", loaded)
            self.functions = {name: self._function(name) for name in dict.fromkeys(s.kernel for s in kernel.launches)}
        self.index = index

    def _function(self, name: str) -> Any:
        return _call(f"cuModuleGetFunction({name})", _driver().cuModuleGetFunction(self.module, name.encode()))

    def attribute(self, name: str, kernel: str) -> int:
        driver = _driver()
        which = getattr(driver.CUfunction_attribute, f"CU_FUNC_ATTRIBUTE_{name}")
        return _call(f"cuFuncGetAttribute({name})", driver.cuFuncGetAttribute(which, self.functions[kernel]))

    def allow(self, step: LaunchPlan) -> None:
        """Opt in to what a launch needs beyond the defaults."""
        driver, function = _driver(), self.functions[step.kernel]
        attributes = driver.CUfunction_attribute
        if step.smem + self.attribute("SHARED_SIZE_BYTES", step.kernel) > _DEFAULT_SMEM:
            which = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
            if self.attribute("MAX_DYNAMIC_SHARED_SIZE_BYTES", step.kernel) < step.smem:
                result = driver.cuFuncSetAttribute(function, which, step.smem)
                if result[0]:
                    raise NotApplicable(
                        f"{step.kernel}: {step.smem} bytes of dynamic shared memory are more than the device gives"
                    )
        if step.cluster and math.prod(step.cluster) > _PORTABLE_CLUSTER:
            which = attributes.CU_FUNC_ATTRIBUTE_NON_PORTABLE_CLUSTER_SIZE_ALLOWED
            _call(f"{step.kernel}: cluster {step.cluster}", driver.cuFuncSetAttribute(function, which, 1))

    def occupancy(self, step: LaunchPlan, facts: DeviceFacts) -> float:
        """Resident threads over the multiprocessor's maximum, for this launch."""
        threads = math.prod(step.block)
        found = _driver().cuOccupancyMaxActiveBlocksPerMultiprocessor(self.functions[step.kernel], threads, step.smem)
        return _call(f"{step.kernel}: occupancy", found) * threads / facts.max_threads_per_sm


class _Frame:
    """Argument buffers and launch configurations of one call in flight."""

    def __init__(self, plan: Plan, device: _Device) -> None:
        self.pointers = (ctypes.c_uint64 * (plan.tensors + 1))()  # the last one stays null, for absent optional tensors
        self.seen: list[int] = []  # the addresses that are in `pointers`
        self.stream = -1
        # TensorMap is 64-byte aligned; ctypes is not
        self._map_memory = ctypes.create_string_buffer(128 * len(plan.maps) + 64)
        base = -(-ctypes.addressof(self._map_memory) // 64) * 64
        self.maps = [base + 128 * i for i in range(len(plan.maps))]
        self.map_pointers = [0] * len(plan.maps)
        self._keep: list[Any] = []
        self.prepare = [self._launch(step, device) for step in plan.prepare]
        self.launches = [self._launch(step, device) for step in plan.launches]
        self._configs = [config for config, _, _, _ in (*self.prepare, *self.launches)]

    def _launch(self, step: LaunchPlan, device: _Device) -> tuple[Any, Any, int, str]:
        addresses = [self._address(argument) for argument in step.args]
        array = (ctypes.c_void_p * max(len(addresses), 1))(*addresses)
        self._keep.append(array)
        return _config(step), device.functions[step.kernel], ctypes.addressof(array), step.kernel

    def _address(self, argument: Argument) -> int:
        if argument.type == "tensor_map":
            return self.maps[argument.position or 0]
        if argument.type == "pointer":
            place = len(self.pointers) - 1 if argument.position is None else argument.position
            return ctypes.addressof(self.pointers) + 8 * place
        value = _CTYPES[argument.type](argument.value)
        self._keep.append(value)
        return ctypes.addressof(value)

    def set_stream(self, stream: int) -> None:
        self.stream = stream
        for config in self._configs:
            config.hStream = stream


def _config(step: LaunchPlan) -> Any:
    driver = _driver()
    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = step.grid
    config.blockDimX, config.blockDimY, config.blockDimZ = step.block
    config.sharedMemBytes = step.smem
    attributes = []
    kinds = driver.CUlaunchAttributeID
    if step.cluster:
        attribute = _attribute(kinds.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION)
        attribute.value.clusterDim.x, attribute.value.clusterDim.y, attribute.value.clusterDim.z = step.cluster
        attributes.append(attribute)
    if step.cooperative:
        attribute = _attribute(kinds.CU_LAUNCH_ATTRIBUTE_COOPERATIVE)
        attribute.value.cooperative = 1
        attributes.append(attribute)
    if step.pdl:
        attribute = _attribute(kinds.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION)
        attribute.value.programmaticStreamSerializationAllowed = 1
        attributes.append(attribute)
    config.attrs, config.numAttrs = attributes, len(attributes)
    return config


def _attribute(kind: Any) -> Any:
    attribute = _driver().CUlaunchAttribute()
    attribute.id = kind
    return attribute


@dataclasses.dataclass
class _Bound:
    """A plan on a device, with its free frames and its encoded tensor maps by address."""

    plan: Plan
    device: _Device
    frames: list[_Frame] = dataclasses.field(default_factory=list)
    descriptors: dict[tuple[int, int], tuple[int, Any]] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self.index = self.device.index
        self.pack = struct.Struct(f"{self.plan.tensors}Q").pack_into

    def frame(self) -> _Frame:
        try:
            return self.frames.pop()
        except IndexError:
            return _Frame(self.plan, self.device)

    def fill(self, frame: _Frame, pointers: list[int]) -> None:
        """Write the tensors' addresses, and the descriptors over them, into the frame.

        Raises:
            NotApplicable: if a tensor map cannot start at an address.
            LaunchError: if the driver refuses to encode one.
        """
        frame.seen = []
        self.pack(frame.pointers, 0, *pointers)
        for i, spec in enumerate(self.plan.maps):
            pointer = pointers[spec.position]
            if frame.map_pointers[i] != pointer:
                address, _held = self._descriptor(i, spec, pointer)
                ctypes.memmove(frame.maps[i], address, 128)
                frame.map_pointers[i] = pointer
        frame.seen = pointers

    def _descriptor(self, i: int, spec: MapPlan, pointer: int) -> tuple[int, Any]:
        """Where the encoded map lies, and the object that holds it, which must live as long as somebody reads there."""
        found = self.descriptors.get((i, pointer))
        if found is None:
            if len(self.descriptors) >= MAX_DESCRIPTORS:
                self.descriptors = {}
            encoded = encode_tensor_map(spec, pointer)
            found = self.descriptors[i, pointer] = int(encoded.getPtr()), encoded
        return found


def encode_tensor_map(spec: MapPlan, pointer: int) -> Any:
    """The `CUtensorMap` of a plan's map over the memory at `pointer`.

    Raises:
        NotApplicable: if the address is not a multiple of 16 bytes.
        LaunchError: if the driver refuses.
    """
    if pointer % 16:
        raise NotApplicable("a tensor map needs an address that is a multiple of 16 bytes")
    driver = _driver()
    none = "NONE"
    swizzle = none if spec.swizzle == "none" else f"{spec.swizzle}B"
    l2 = none if spec.l2 == "none" else f"L2_{spec.l2}B"
    oob = none if spec.oob == "zero" else "NAN_REQUEST_ZERO_FMA"
    return _call("cuTensorMapEncodeTiled", driver.cuTensorMapEncodeTiled(
        getattr(driver.CUtensorMapDataType, f"CU_TENSOR_MAP_DATA_TYPE_{_MAP_DTYPES[spec.dtype]}"),
        len(spec.dims), pointer,
        [driver.cuuint64_t(v) for v in spec.dims], [driver.cuuint64_t(v) for v in spec.strides],
        [driver.cuuint32_t(v) for v in spec.box], [driver.cuuint32_t(v) for v in spec.elem_strides],
        driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
        getattr(driver.CUtensorMapSwizzle, f"CU_TENSOR_MAP_SWIZZLE_{swizzle}"),
        getattr(driver.CUtensorMapL2promotion, f"CU_TENSOR_MAP_L2_PROMOTION_{l2}"),
        getattr(driver.CUtensorMapFloatOOBfill, f"CU_TENSOR_MAP_FLOAT_OOB_FILL_{oob}"),
    ))  # fmt: skip


class CudaLauncher:
    """See `targets.Launcher`. Serves every device of the architecture it was compiled for; the module is loaded once on each."""

    def __init__(self, binary: Binary, kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> None:
        import torch

        self.resources = binary.resources
        self.prepared = False
        self._code, self._kernel, self._task = binary.code, kernel, task
        self._constants, self._facts = dict(constants), facts
        self._mask = kernel.align - 1
        self._symbols = [name for name, _ in task.symbols]
        self._tensors = len(task.outputs) + len(kernel.workspace) + len(task.inputs)
        self._devices: dict[int, _Device] = {}
        self._bound: dict[tuple[int, ...], _Bound] = {}
        self._launch = _driver().cuLaunchKernelEx
        self._raw_stream = torch._C._cuda_getCurrentRawStream
        self._get_device, self._set_device = torch._C._cuda_getDevice, torch._C._cuda_setDevice

    def load_on(self, index: int) -> None:
        """Load the module on a device, and plan a static task there.

        Raises:
            NotApplicable: if the kernel does not serve the task, or the device's architecture is another.
            LaunchError: if the driver refuses the module.
        """
        self._devices[index] = _Device(self._code, self._kernel, index)
        bound = self._plan(index, tuple(value for _, value in self._task.symbols))
        if bound is not None:
            self.resources = self._measured(bound)

    def _measured(self, bound: _Bound) -> Resources:
        """The compiler's report completed by the driver's, for this plan."""
        device, steps = bound.device, bound.plan.launches
        if not steps:
            return self.resources
        return dataclasses.replace(
            self.resources,
            registers=max(device.attribute("NUM_REGS", s.kernel) for s in steps),
            spill_bytes=max(device.attribute("LOCAL_SIZE_BYTES", s.kernel) for s in steps),
            static_smem_bytes=max(device.attribute("SHARED_SIZE_BYTES", s.kernel) for s in steps),
            dynamic_smem_bytes=max(s.smem for s in steps),
            occupancy=min(device.occupancy(s, self._facts) for s in steps),
            kernels=tuple(self._launched(k, bound) for k in self.resources.kernels),
        )

    def _launched(self, reported: KernelResources, bound: _Bound) -> KernelResources:
        """One function's report completed by what its launches ask for."""
        steps = [s for s in (*bound.plan.prepare, *bound.plan.launches) if s.kernel == reported.name]
        if not steps:
            return reported
        occupancy = min(bound.device.occupancy(s, self._facts) for s in steps)
        return dataclasses.replace(reported, dynamic_smem_bytes=max(s.smem for s in steps), occupancy=occupancy)

    def _plan(self, index: int, values: tuple[int, ...]) -> _Bound:
        """The plan for these symbol values on a loaded device."""
        symbols = dict(zip(self._symbols, values, strict=True))
        plan = plan_launches(self._kernel, self._task, self._constants, self._facts, symbols)
        device = self._devices[index]
        for step in (*plan.prepare, *plan.launches):
            device.allow(step)
        if len(self._bound) >= MAX_PLANS:
            self._bound = {}
        bound = self._bound[index, *values] = _Bound(plan, device)
        bound.frames.append(_Frame(plan, device))
        return bound

    def _bind(self, index: int, values: tuple[int, ...]) -> _Bound:
        if index not in self._devices:
            self._devices[index] = _Device(self._code, self._kernel, index)
        return self._plan(index, values)

    def __call__(self, *args: Any) -> None:
        self._go(args, main=True)

    def prepare(self, *args: Any) -> None:
        """Run the prepare launches alone, on the arguments of a call; from then on calls leave them out."""
        self._go(args, main=False)
        self.prepared = True

    def _go(self, args: tuple[Any, ...], main: bool) -> None:
        pointers = [tensor.data_ptr() for tensor in args[: self._tensors]]
        key = (args[0].get_device(), *args[self._tensors :])
        bound = self._bound.get(key) or self._bind(key[0], key[1:])
        if bound.plan.empty:
            return
        current = self._get_device()
        if current == bound.index:
            self._enqueue(bound, pointers, main)
            return
        self._set_device(bound.index)
        try:
            self._enqueue(bound, pointers, main)
        finally:
            self._set_device(current)

    def _check_alignment(self, pointers: list[int]) -> None:
        bits = 0
        for pointer in pointers:
            bits |= pointer
        if bits & self._mask:
            raise NotApplicable(f"{self._kernel.name}: needs addresses that are multiples of {self._kernel.align} bytes")

    def _enqueue(self, bound: _Bound, pointers: list[int], main: bool) -> None:
        plan, frame = bound.plan, bound.frame()
        stream = self._raw_stream(bound.index)
        if frame.stream != stream:
            frame.set_stream(stream)
        if pointers != frame.seen:  # a graph's buffers mostly come back at the same addresses
            try:
                self._check_alignment(pointers)
                bound.fill(frame, pointers)
            except (NotApplicable, LaunchError):
                bound.frames.append(frame)
                raise
        if plan.prepare and not (main and self.prepared):
            self._run(plan.zero_prepare, frame.prepare, frame, bound)
        if main:
            self._run(plan.zero, frame.launches, frame, bound)
        bound.frames.append(frame)

    def _run(
        self, zero: Sequence[tuple[int, int]], launches: list[tuple[Any, Any, int, str]], frame: _Frame, bound: _Bound
    ) -> None:
        for position, nbytes in zero:
            self._memset(frame.pointers[position], nbytes, frame.stream, bound.device)
        for config, function, addresses, name in launches:
            status = self._launch(config, function, addresses, 0)[0]
            if status:
                self._relaunch(status, config, function, addresses, name, bound.device)

    def _relaunch(self, status: Any, config: Any, function: Any, addresses: int, name: str, device: _Device) -> None:
        """Launch again with torch's context current: a thread that never called the CUDA runtime has none."""
        driver = _driver()
        if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            driver.cuCtxSetCurrent(device.context)
            status = self._launch(config, function, addresses, 0)[0]
        _call(f"{self._kernel.name}: launching {name}", (status,))

    def _memset(self, pointer: int, nbytes: int, stream: int, device: _Device) -> None:
        driver = _driver()
        status = driver.cuMemsetD8Async(pointer, 0, nbytes, stream)[0]
        if status == driver.CUresult.CUDA_ERROR_INVALID_CONTEXT:
            driver.cuCtxSetCurrent(device.context)
            status = driver.cuMemsetD8Async(pointer, 0, nbytes, stream)[0]
        _call(f"{self._kernel.name}: zeroing a workspace", (status,))
