"""CUDA C to a cubin with NVRTC; needs `cuda-bindings` and the CUDA headers, but no GPU."""

from __future__ import annotations

import functools
import importlib.util
import os
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from importlib import resources as package_data
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING

from torch_llmkernels.errors import CompileError, NotApplicable, ToolchainMissing
from torch_llmkernels.evaluation import KernelResources, Resources
from torch_llmkernels.kernels import csource, launch
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
        NotApplicable: if the source uses what `arch` does not have (wgmma, TMA, clusters, ...).
        ToolchainMissing: without NVRTC or the headers.
    """
    source = launch.assemble(prelude(), "prelude.cuh", macros, kernel, ".cu")
    code, log = _compile(source, f"{kernel.name}.cu", [f"-arch={arch}", f"-I{include_directory()}", *FLAGS])
    if code is None and (lacking := lacking_feature(log)):
        raise NotApplicable(f"{kernel.name}: written for another architecture than {arch}: {lacking}")
    if code is None:
        raise CompileError(f"{kernel.name}: {_first_error(log)}", log[:_LOG_LIMIT])
    check_stateless(code, kernel.name, csource.constant_members(csource.tokenize(kernel.body)))
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


_PTXAS_LACKS = re.compile(r"error\s*: (.*(?:not supported on \.target|requires \.target|cannot be compiled for arch).*)")
_UNDEFINED = re.compile(r'error: identifier "(\w+)" is undefined')


def lacking_feature(log: str) -> str:
    """What a source uses that the architecture does not have, in one line, by the log of a failed compilation; else empty.

    That is an instruction that ptxas refuses for this target, or a helper that the prelude defines for other ones only.
    """
    refused = _PTXAS_LACKS.search(log)
    if refused:
        return refused[1].strip()
    helpers = guarded_helpers()
    name = next((name for name in _UNDEFINED.findall(log) if name in helpers), "")
    return f"{name} exists only where {helpers[name]}" if name else ""


@functools.cache
def guarded_helpers() -> Mapping[str, str]:
    """The prelude's helpers that not every architecture has, and the condition under which they are defined."""
    found: dict[str, str] = {}
    condition = ""
    for line in prelude().splitlines():
        if line.startswith("#if"):
            condition = line.removeprefix("#if ") if "__CUDA_ARCH" in line else condition
        elif line.startswith("#endif"):
            condition = ""
        for name in re.findall(r"\b(\w+)\(", line) if condition and "__device__" in line else ():
            found.setdefault(name, condition)
    return found


def _first_error(log: str) -> str:
    return next((line.strip() for line in log.splitlines() if "error" in line), log.strip()[:200] or "no message")


def check_stateless(code: bytes, name: str, constants: Collection[str] = ()) -> None:
    """Refuse zero-initialised `__device__` variables, which would keep state between calls (`csource` refuses the others).

    `constants` are the names of constexpr members: NVRTC gives one of a template a place among them if it is zero or false.

    Raises:
        CompileError: if the cubin has writable global memory of its own.
    """
    found = read_shared_object(code)
    held = [n for n in found.symbols.get(".nv.global", ()) if not n.startswith(".")]
    kept = [n for n in held if not (_is_member(n) and any(re.search(rf"{len(c)}{c}E$", n) for c in constants))]
    if found.sections.get(".nv.global", 0) and (kept or not held):
        names = ", ".join(sorted(map(_unmangled, kept)))
        raise CompileError(
            f"{name}: has __device__ variables ({names or 'unnamed'}); a kernel keeps no state, use a [[workspace]] (a constexpr "
            "at namespace scope whose address is taken counts: make it an enum or a macro)"
        )


def _is_member(symbol: str) -> bool:
    """Whether a mangled name such as `_ZN11kernel_file7is_halfIfE5valueE` has a class between its namespace and itself."""
    first = re.match(r"_ZN11kernel_file(\d+)", symbol)
    return first is not None and symbol[first.end() + int(first[1]) :] != "E"


def _unmangled(symbol: str) -> str:
    """The last name in a mangled one such as `_ZN11kernel_file7counterE`; any other as it is."""
    rest, name = symbol.removeprefix("_ZN"), symbol
    while rest != symbol and (length := re.match(r"\d+", rest)):
        end = length.end() + int(length[0])
        name, rest = rest[length.end() : end], rest[end:]
    return name


def resources_of(log: str, binary_bytes: int) -> Resources:
    """What `ptxas -v` reports, the largest over the file's kernels."""

    def largest(pattern: str) -> int:
        return max((int(n) for n in re.findall(pattern, log)), default=0)

    return Resources(
        kernels=kernel_table(log),
        warnings=warnings_of(log),
        registers=largest(r"Used (\d+) registers"),
        spill_bytes=largest(r"(\d+) bytes stack frame"),
        static_smem_bytes=largest(r"(\d+) bytes smem"),
        binary_bytes=binary_bytes,
    )


MOST_WARNINGS = 8
_ENTRY = re.compile(
    r"Compiling entry function '(?P<name>\w+)'.*?(?P<stack>\d+) bytes stack frame, (?P<stores>\d+) bytes spill stores, "
    r"(?P<loads>\d+) bytes spill loads.*?Used (?P<registers>\d+) registers(?P<rest>[^\n]*)",
    re.DOTALL,
)


def kernel_table(log: str) -> tuple[KernelResources, ...]:
    """What `ptxas -v` reports of each `__global__` function, by name."""
    found = []
    for part in log.split("ptxas info    : Compiling entry")[1:]:
        match = _ENTRY.search("Compiling entry" + part)
        if match:
            smem = re.search(r"(\d+) bytes smem", match["rest"])
            found.append(KernelResources(
                match["name"], int(match["registers"]), int(match["stack"]), int(match["stores"]) + int(match["loads"]),
                int(smem[1]) if smem else 0,
            ))  # fmt: skip
    return tuple(sorted(found, key=lambda k: k.name))


def warnings_of(log: str) -> tuple[str, ...]:
    """Lines in which the compiler or ptxas warns, such as of serialised wgmma instructions; each once."""
    lines = [" ".join(line.split()) for line in log.splitlines() if re.search(r"\bwarning\b|Performance Loss", line)]
    return tuple(dict.fromkeys(line[:400] for line in lines))[:MOST_WARNINGS]
