"""What kernels and records need to know about a device, as plain numbers and names.

`DeviceFacts` of a device at hand come from the targets; `facts_for_arch` describes a well-known GPU of an architecture, so that
kernels can be compiled and planned for it on a machine without one.
"""

from __future__ import annotations

import dataclasses
import functools
import os
import platform
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch_llmkernels.errors import SchemaError, ToolchainMissing


@dataclasses.dataclass(frozen=True)
class DeviceFacts:
    """A device.

    Attributes:
        target: `cuda` or `cpu`.
        kind: Slug that devices of one kind share; records are filed under it: `nvidia-h100`, `cpu-x86_64-avx512`.
        name: As the vendor spells it.
        arch: What the compiler targets: `sm_90a`, `x86_64-avx512`.
        sms: Streaming multiprocessors, or CPU cores that this process may use.
        smem_per_block: Bytes of shared memory a block may opt in to; 0 on the CPU.
        l2_bytes: Size of the L2 cache (CPU: of one core).
        threads: Most threads of a block (CPU: cores that this process may use).
        max_threads_per_sm: Resident threads of a multiprocessor; 1 on the CPU.
        regs_per_sm: 32-bit registers of a multiprocessor; 0 on the CPU.
        memory_bytes: Device memory.
        driver: CUDA version of the driver such as `13.0`; empty on the CPU.
        unit: What a time depends on besides the kind: full name and core count; from the CPU target also torch's number of
            threads. Two GPUs with one name and count are one unit.
    """

    target: str
    kind: str
    name: str
    arch: str
    sms: int
    smem_per_block: int
    l2_bytes: int
    threads: int
    max_threads_per_sm: int
    regs_per_sm: int
    memory_bytes: int
    driver: str
    unit: str

    @property
    def arch_number(self) -> int:
        """What headers know as `device.arch`: 90 for `sm_90a`; 0 on the CPU."""
        match = re.fullmatch(r"sm_(\d+)[a-z]?", self.arch)
        return int(match[1]) if match else 0

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> DeviceFacts:
        """The facts `to_json` wrote.

        Raises:
            SchemaError: for missing or unknown fields.
        """
        try:
            return cls(**plain)
        except TypeError as error:
            raise SchemaError(f"device facts are damaged: {error}") from None


# name, multiprocessors, opt-in shared memory, L2, threads per multiprocessor, memory: NVIDIA's data sheets and programming guide
_KNOWN: dict[str, tuple[str, int, int, int, int, int]] = {
    "sm_80": ("NVIDIA A100-SXM4-80GB", 108, 163 << 10, 40 << 20, 2048, 80 << 30),
    "sm_86": ("NVIDIA A10", 72, 99 << 10, 6 << 20, 1536, 24 << 30),
    "sm_89": ("NVIDIA L40S", 142, 99 << 10, 96 << 20, 1536, 48 << 30),
    "sm_90": ("NVIDIA H100 80GB HBM3", 132, 227 << 10, 50 << 20, 2048, 80 << 30),
    "sm_100": ("NVIDIA B200", 148, 227 << 10, 126 << 20, 2048, 180 << 30),
    "sm_120": ("NVIDIA GeForce RTX 5090", 170, 99 << 10, 96 << 20, 1536, 32 << 30),
}


def facts_for_arch(arch: str) -> DeviceFacts:
    """Facts of a well-known GPU of `arch` (`sm_80`, `sm_90a`, ...), to compile and plan for it without having one.

    Raises:
        ToolchainMissing: for an architecture that is not in the table.
    """
    if arch.removesuffix("a") not in _KNOWN:
        raise ToolchainMissing(f"no facts about {arch!r}; known: {', '.join(_KNOWN)} (with or without a final 'a')")
    name, sms, smem, l2, threads_per_sm, memory = _KNOWN[arch.removesuffix("a")]
    return DeviceFacts("cuda", slug(name), name, arch, sms, smem, l2, 1024, threads_per_sm, 65536, memory, "", unit(name, sms))


def cuda_arch(major: int, minor: int) -> str:
    """`sm_90a` for (9, 0): from compute capability 9 on, the architecture-specific features are switched on."""
    return f"sm_{major}{minor}{'a' if major >= 9 else ''}"


def slug(name: str) -> str:
    """`nvidia-h100` from `NVIDIA H100 80GB HBM3`: lower case, without words about memory."""
    words = re.split(r"[^a-z0-9.]+", name.lower())
    return "-".join(w for w in words if w and not re.fullmatch(r"\d+(gb|g)|hbm\w*|gddr\w*", w))


def unit(name: str, cores: int) -> str:
    """The text that tells apart units of one kind."""
    return f"{name}, {cores} {'SMs' if name.startswith('NVIDIA') else 'cores'}"


@functools.cache
def cpu_facts() -> DeviceFacts:
    """Facts of this machine's CPU, as this process may use it."""
    machine = platform.machine() or "unknown"
    level, name = cpu_level(machine), _cpu_name()
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    arch = f"{machine}-{level}" if level else machine
    return DeviceFacts("cpu", f"cpu-{arch}", name, arch, cores, 0, _l2_bytes(), cores, 1, 0, memory, "", unit(name, cores))


def cpu_level(machine: str, flags: frozenset[str] | None = None) -> str:
    """`avx512`, `avx2` or `generic` on x86-64; `sve` or nothing on others."""
    flags = cpu_flags() if flags is None else flags
    if machine in ("x86_64", "AMD64"):
        if {"avx512f", "avx512bw", "avx512vl", "avx512dq"} <= flags:
            return "avx512"
        return "avx2" if {"avx2", "fma"} <= flags else "generic"
    return "sve" if "sve" in flags else ""


@functools.cache
def cpu_flags() -> frozenset[str]:
    """Feature flags of the first CPU in /proc/cpuinfo; empty where there is none."""
    match = re.search(r"^(?:flags|Features)\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return frozenset(match[1].split()) if match else frozenset()


def _cpu_name() -> str:
    match = re.search(r"^model name\s*:\s*(.*)$", _cpuinfo(), re.MULTILINE)
    return match[1].strip() if match else platform.processor() or platform.machine()


@functools.cache
def _cpuinfo() -> str:
    try:
        return Path("/proc/cpuinfo").read_text()
    except OSError:
        return ""


def _l2_bytes() -> int:
    try:
        text = Path("/sys/devices/system/cpu/cpu0/cache/index2/size").read_text().strip()
    except OSError:
        return 1 << 20
    units = {"K": 1 << 10, "M": 1 << 20}
    return int(text[:-1]) * units[text[-1]] if text[-1] in units else int(text)


@functools.lru_cache(maxsize=64)
def cuda_facts(index: int) -> DeviceFacts:
    """Facts of CUDA device `index`.

    Raises:
        ToolchainMissing: if torch sees no such device.
    """
    import torch

    if index >= torch.cuda.device_count():
        raise ToolchainMissing(f"no CUDA device {index}; torch sees {torch.cuda.device_count()} of them")
    found = torch.cuda.get_device_properties(index)
    sms = found.multi_processor_count
    return DeviceFacts(
        target="cuda",
        kind=slug(found.name),
        name=found.name,
        arch=cuda_arch(found.major, found.minor),
        sms=sms,
        smem_per_block=found.shared_memory_per_block_optin,
        l2_bytes=found.L2_cache_size,
        threads=_attribute(index, "MAX_THREADS_PER_BLOCK"),
        max_threads_per_sm=found.max_threads_per_multi_processor,
        regs_per_sm=found.regs_per_multiprocessor,
        memory_bytes=found.total_memory,
        driver=_driver_version(),
        unit=unit(found.name, sms),
    )


def _attribute(index: int, name: str) -> int:
    driver = _driver()
    driver.cuInit(0)
    # the driver orders devices as torch does: both follow CUDA_VISIBLE_DEVICES
    status, value = driver.cuDeviceGetAttribute(getattr(driver.CUdevice_attribute, f"CU_DEVICE_ATTRIBUTE_{name}"), index)
    return value if status == driver.CUresult.CUDA_SUCCESS else 1024


def _driver() -> Any:
    try:
        from cuda.bindings import driver
    except ImportError as error:
        raise ToolchainMissing(f"cuda-bindings cannot be imported ({error}); pip install 'torch-llmkernels[cuda]'") from None
    return driver


def _driver_version() -> str:
    driver = _driver()
    status, version = driver.cuDriverGetVersion()
    return f"{version // 1000}.{version % 1000 // 10}" if status == driver.CUresult.CUDA_SUCCESS else ""
