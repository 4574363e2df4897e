"""CUDA C to a cubin with NVRTC; needs `cuda-bindings` and the CUDA headers, but no GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from importlib import resources as package_data
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch_llmkernels.errors import CompileError, ToolchainMissing
from torch_llmkernels.evaluation import Resources
from torch_llmkernels.kernels import launch
from torch_llmkernels.kernels.elf import read_shared_object

if TYPE_CHECKING:
    from torch_llmkernels.kernels.source import Kernel

FLAGS = ("--std=c++17", "--extra-device-vectorization", "-lineinfo", "--ptxas-options=-v")
_INSTALL = "pip install 'torch-llmkernels[cuda]' (cuda-bindings, nvidia-cuda-nvrtc, nvidia-cuda-runtime of torch's CUDA version)"
_LOG_LIMIT = 16000


@functools.cache
def bindings() -> ModuleType:
    """The module `cuda.bindings.nvrtc`, with its library loaded.

    Raises:
        ToolchainMissing: if it is not installed, or finds no NVRTC.
    """
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()
    except (ImportError, OSError, RuntimeError) as error:  # RuntimeError: cuda-pathfinder's DynamicLibNotFoundError
        raise ToolchainMissing(f"NVRTC cannot be loaded ({error}); {_INSTALL}") from None
    return nvrtc


@functools.cache
def version() -> tuple[int, int]:
    """NVRTC's (major, minor)."""
    _, major, minor = bindings().nvrtcVersion()
    return major, minor


@functools.cache
def include_directory() -> Path:
    """The directory with `cuda_fp16.h`, of NVRTC's own CUDA version where there is one.

    Raises:
        ToolchainMissing: if there is none.
    """
    for directory in _include_candidates():
        if (directory / "cuda_fp16.h").is_file():
            return directory
    raise ToolchainMissing(f"the CUDA headers (cuda_fp16.h) are not installed, or CUDA_HOME is not set; {_INSTALL}")


def _include_candidates() -> Iterator[Path]:
    spec = importlib.util.find_spec("nvidia")
    roots = [Path(p) for p in (spec.submodule_search_locations or ())] if spec else []
    for root in roots:
        yield root / f"cu{version()[0]}" / "include"
    for root in roots if version()[0] < 13 else ():
        yield root / "cuda_runtime" / "include"  # where the CUDA 12 wheels put them
    for home in (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda"):
        if home:
            yield Path(home) / "include"


@functools.cache
def prelude() -> str:
    """The text of prelude.cuh."""
    return package_data.files("torch_llmkernels.kernels").joinpath("prelude.cuh").read_text()


def compile_cubin(kernel: Kernel, macros: Mapping[str, str], arch: str) -> tuple[bytes, Resources]:
    """Compile a kernel file for `arch` (such as `sm_90a`).

    Raises:
        CompileError: with the compiler's log; its line numbers are those of the kernel file.
        ToolchainMissing: without NVRTC or the headers.
    """
    source = launch.assemble(prelude(), "prelude.cuh", macros, kernel, ".cu")
    code, log = _compile(source, f"{kernel.name}.cu", [f"-arch={arch}", f"-I{include_directory()}", *FLAGS])
    if code is None:
        raise CompileError(f"{kernel.name}: {_first_error(log)}", log[:_LOG_LIMIT])
    check_stateless(code, kernel.name)
    return code, resources_of(log, len(code))


def _compile(source: str, name: str, options: Sequence[str]) -> tuple[bytes | None, str]:
    """(cubin or None, log)."""
    nvrtc = bindings()
    status, program = nvrtc.nvrtcCreateProgram(source.encode(), name.encode(), 0, [], [])
    if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
        raise CompileError(f"{name}: NVRTC gave {status.name} before compiling")
    try:
        encoded = [option.encode() for option in options]
        (status,) = nvrtc.nvrtcCompileProgram(program, len(encoded), encoded)
        log = _read(program, nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog).rstrip(b"\0").decode(errors="replace")
        if status != nvrtc.nvrtcResult.NVRTC_SUCCESS:
            return None, log or status.name
        return _read(program, nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN), log
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _read(program: object, size_of: object, read: object) -> bytes:
    _, size = size_of(program)  # type: ignore[operator]
    buffer = b" " * size  # NVRTC writes into it
    read(program, buffer)  # type: ignore[operator]
    return buffer


def _first_error(log: str) -> str:
    return next((line.strip() for line in log.splitlines() if "error" in line), log.strip()[:200] or "no message")


def check_stateless(code: bytes, name: str) -> None:
    """Refuse zero-initialised `__device__` variables, which would keep state between calls (`csource` refuses the others).

    Raises:
        CompileError: if the cubin has writable global memory of its own.
    """
    size = read_shared_object(code).sections.get(".nv.global", 0)
    if size:
        raise CompileError(f"{name}: has {size} bytes of __device__ variables; a kernel keeps no state, use a [[workspace]]")


def resources_of(log: str, binary_bytes: int) -> Resources:
    """What `ptxas -v` reports, the largest over the file's kernels."""

    def largest(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, log)), default=0)

    return Resources(
        registers=largest(r"Used (\d+) registers"),
        spill_bytes=largest(r"(\d+) bytes stack frame"),
        static_smem_bytes=largest(r"(\d+) bytes smem"),
        binary_bytes=binary_bytes,
    )
