"""The CPU target: one C++ function, compiled to a shared object for this machine's instruction set and called through ctypes.

A CPU kernel is native code. What stands between it and the process: the token deny list (`csource`), the check here of what the
shared object imports and keeps (`check_shared_object`), and the worker process it runs in until it is accepted. None of these is
a sandbox.

OpenMP: the object is linked without an OpenMP library. Before it is loaded, the runtime that torch already uses is made globally
visible, so that both share one thread pool and `torch.set_num_threads` holds for kernels too.
"""

from __future__ import annotations

import ctypes
import dataclasses
import functools
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Mapping
from importlib import resources as package_data
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_llmkernels import settings
from torch_llmkernels.errors import CompileError, ExpressionError, LaunchError, NotApplicable, ToolchainMissing
from torch_llmkernels.evaluation import Resources
from torch_llmkernels.kernels import launch
from torch_llmkernels.kernels.device import DeviceFacts, cpu_facts
from torch_llmkernels.kernels.elf import read_shared_object
from torch_llmkernels.kernels.plan import LaunchPlan, Plan, plan_launches
from torch_llmkernels.kernels.targets import Binary
from torch_llmkernels.task import digest

if TYPE_CHECKING:
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.task import Task

FLAGS = ("-O3", "-march=native", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-std=c++17", "-fPIC", "-fno-exceptions",
         "-Wall", "-Wno-unknown-pragmas", "-Wno-unused")  # fmt: skip
# Without -fopenmp: see the module's docstring. Without the start files, which have data of their own: see `check_shared_object`.
LINK_FLAGS = ("-shared", "-fPIC", "-nostartfiles")
COMPILE_TIMEOUT_S = 300
MAX_PLANS = 256

_CTYPES: dict[str, Any] = {
    "pointer": ctypes.c_void_p, "bool": ctypes.c_bool, "i32": ctypes.c_int32, "u32": ctypes.c_uint32, "i64": ctypes.c_int64,
    "u64": ctypes.c_uint64, "f32": ctypes.c_float, "f64": ctypes.c_double,
}  # fmt: skip
_MATH = (
    r"a?(?:cos|sin|tan)h?|atan2|exp|exp2|expm1|log|log2|log10|log1p|pow|sqrt|cbrt|hypot|erfc?|[tl]gamma|fmod|remainder|floor|ceil|trunc"
    r"|l?l?round|l?l?rint|nearbyint|fma|fmax|fmin|fdim|fabs|ldexp|frexp|scalbn|i?logb|modf|sincos|copysign|nextafter"
)
_ALLOWED_IMPORTS = re.compile(
    r"(?:GOMP_\w+|__kmpc_\w+|omp_get_\w+|omp_in_parallel|mem(?:cpy|move|set|cmp)|__mem(?:cpy|move|set)_chk"
    r"|(?:" + _MATH + r")[fl]?(?:_finite)?|__(?:exp|log|pow|sqrt)f?_finite"
    r"|malloc|calloc|realloc|free|aligned_alloc|posix_memalign|_Zn[wa]m(?:St11align_val_t)?|_Zd[la]Pvm?(?:St11align_val_t)?"
    r"|__cxa_finalize|__gmon_start__|_ITM_\w+|__stack_chk_fail|_ZSt\d+__throw_\w+|__cxa_pure_virtual|__tls_get_addr"
    r"|__(?:trunc|extend)\w+f\d?|__mul[sdtx]c3|__div[sdtx]c3)\Z"
)


class CpuTarget:
    """g++ (or `$CXX`) and ctypes; see `targets.Target`."""

    name = "cpu"

    def unavailable(self) -> str | None:
        try:
            compiler()
        except ToolchainMissing as error:
            return str(error)
        return None

    def current(self) -> int:
        return 0

    def facts(self, index: int | None = None) -> DeviceFacts:
        import torch

        # Another number of threads makes other times, another compiler another kernel of a source.
        found = dataclasses.replace(cpu_facts(), unit=f"{cpu_facts().unit}, {torch.get_num_threads()} threads")
        return found if self.unavailable() else dataclasses.replace(found, driver=_version(compiler()))

    def binary_key(self, kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> str:
        return digest(
            [
                kernel.digest,
                _macros(kernel, task, constants, facts),
                digest(_prelude()),
                FLAGS,
                LINK_FLAGS,
                _instruction_set(compiler()),
            ]
        )

    def compile(self, kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> Binary:
        code = _compile(kernel, _macros(kernel, task, constants, facts))
        check_shared_object(code, kernel.name)
        return Binary(code, Resources(binary_bytes=len(code)), self.binary_key(kernel, task, constants, facts))

    def load(
        self,
        binary: Binary,
        kernel: Kernel,
        task: Task,
        constants: Mapping[str, int],
        facts: DeviceFacts,
        index: int | None = None,
    ) -> CpuLauncher:
        return CpuLauncher(_load(binary.code, kernel.name), binary.resources, kernel, task, constants, facts)


CPU = CpuTarget()


def compiler() -> str:
    """Path of the C++ compiler: the `cxx` knob, else `$CXX`, else g++, else clang++.

    Raises:
        ToolchainMissing: if there is none.
    """
    chosen = settings.current().cxx or os.environ.get("CXX", "")
    names = (chosen,) if chosen else ("g++", "clang++")
    found = next(filter(None, map(shutil.which, names)), None)
    if found is None:
        raise ToolchainMissing(
            f"no C++ compiler ({' or '.join(names)}) on PATH; install g++, or set LLMKERNELS_CXX to a compiler"
        )
    return found


@functools.lru_cache(maxsize=8)
def _instruction_set(path: str) -> str:
    """The compiler's version and what -march=native means to it here: part of the binary's key."""
    version = _version(path)
    native = _run([path, "-march=native", "-E", "-dM", "-x", "c++", os.devnull]).stdout
    return digest([version, native])


@functools.lru_cache(maxsize=8)
def _version(path: str) -> str:
    return next(iter(_run([path, "--version"]).stdout.splitlines()), "")


def _run(command: list[str], cwd: str | None = None) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "LC_ALL": "C"}
    return subprocess.run(
        command, capture_output=True, text=True, errors="replace", timeout=COMPILE_TIMEOUT_S, cwd=cwd, env=environment
    )


@functools.cache
def _prelude() -> str:
    return package_data.files("torch_llmkernels.kernels").joinpath("prelude.hpp").read_text()


def _macros(kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> dict[str, str]:
    try:
        return launch.macros(kernel, task, constants, facts)
    except ExpressionError as error:
        raise NotApplicable(f"{kernel.name}: {error}") from None


def _compile(kernel: Kernel, macros: Mapping[str, str]) -> bytes:
    """Compile and link in a private directory; gives the shared object's bytes."""
    path = compiler()
    with tempfile.TemporaryDirectory(prefix="llmk-") as directory:
        Path(directory, "kernel.cpp").write_text(launch.assemble(_prelude(), "prelude.hpp", macros, kernel, ".cpp"))
        _check(_step([path, *FLAGS, "-c", "kernel.cpp", "-o", "kernel.o"], directory), kernel.name)
        _check(_step([path, *LINK_FLAGS, "kernel.o", "-o", "kernel.so"], directory), kernel.name)
        return Path(directory, "kernel.so").read_bytes()


def _step(command: list[str], directory: str) -> subprocess.CompletedProcess[str]:
    try:
        return _run(command, cwd=directory)
    except subprocess.TimeoutExpired:
        raise CompileError(f"{command[0]} took longer than {COMPILE_TIMEOUT_S} s; unroll less", "") from None


def _check(done: subprocess.CompletedProcess[str], name: str) -> None:
    if done.returncode:
        first = next((line for line in done.stderr.splitlines() if "error" in line), "no message")
        raise CompileError(f"{name}: {Path(done.args[0]).name}: {first}", done.stderr[-16000:])


def check_shared_object(code: bytes, name: str) -> None:
    """Refuse an object that reaches outside a kernel's job or keeps state between calls.

    Raises:
        CompileError: naming the imported symbol, or the kind of state.
    """
    found = read_shared_object(code)
    foreign = sorted(s for s in found.imports if not _ALLOWED_IMPORTS.match(s))
    if foreign:
        raise CompileError(f"{name}: uses {', '.join(foreign)}; a kernel may call math, mem* and OpenMP functions only")
    if found.sections.get(".init_array", 0) or found.sections.get(".fini_array", 0):
        raise CompileError(f"{name}: has code that runs at load time; initialise globals with constants (constexpr)")
    if any(found.sections.get(section, 0) for section in (".data", ".bss", ".tdata", ".tbss")):
        raise CompileError(f"{name}: has mutable global or static variables; a kernel keeps no state, use a [[workspace]]")


@functools.cache
def _share_openmp() -> str:
    """Make the OpenMP runtime that torch uses visible to the objects we load; its path, for people.

    Raises:
        LaunchError: if there is none at all.
    """
    import torch  # loads its runtime

    for path in [*_loaded_openmp(Path(torch.__file__).parent), "libgomp.so.1", "libomp.so.5", "libiomp5.so"]:
        try:
            library = ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        if hasattr(library, "GOMP_parallel"):
            return path
    raise LaunchError("no OpenMP runtime (libgomp) is loaded or installed; install libgomp1")


def _loaded_openmp(torch_directory: Path) -> list[str]:
    """OpenMP runtimes mapped into this process, torch's own copy first."""
    try:
        maps = Path("/proc/self/maps").read_text()
    except OSError:
        return []
    paths = sorted(set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)[-.\w]*\.so[.\w]*)$", maps, re.MULTILINE)))
    own = (str(torch_directory), str(torch_directory.with_name("torch.libs")))
    return sorted(paths, key=lambda path: not path.startswith(own))


def _load(code: bytes, name: str) -> ctypes.CDLL:
    """Map a shared object. The file is unlinked at once: the mapping keeps it, and nobody can exchange it."""
    _share_openmp()
    with tempfile.TemporaryDirectory(prefix="llmk-") as directory:  # mode 0700
        path = Path(directory, f"{name}.so")
        path.write_bytes(code)
        try:
            return ctypes.CDLL(str(path), mode=os.RTLD_NOW | ctypes.RTLD_LOCAL)
        except OSError as error:
            raise LaunchError(f"{name}: the dynamic loader refused the kernel: {error}; is TMPDIR mounted noexec?") from None


_Call = tuple[Callable[..., Any], list[Any], tuple[tuple[int, int], ...]]
"""A function, its arguments with holes, and for each hole (place among the arguments, place among the call's tensors)."""


class CpuLauncher:
    """Calls the loaded function with the tensors' addresses; see `targets.Launcher`. ctypes releases the GIL meanwhile."""

    def __init__(
        self,
        library: ctypes.CDLL,
        resources: Resources,
        kernel: Kernel,
        task: Task,
        constants: Mapping[str, int],
        facts: DeviceFacts,
    ) -> None:
        import torch

        self.resources = resources
        self.prepared = False
        self._sync_threads = torch.get_num_threads
        self._library, self._kernel, self._task = library, kernel, task
        self._constants, self._facts = dict(constants), facts
        self._mask = kernel.align - 1
        self._symbols = [name for name, _ in task.symbols]
        self._tensors = len(task.outputs) + len(kernel.workspace) + len(task.inputs)
        self._plans: dict[tuple[int, ...], tuple[Plan, list[_Call], list[_Call]]] = {}
        if not task.is_dynamic:
            self._planned(())  # a task that it cannot serve is refused now

    def __call__(self, *args: Any) -> None:
        pointers, plan, prepare, launches = self._enter(args)
        if plan.empty:
            return
        if not self.prepared:
            _zero(plan.zero_prepare, pointers)
            _run_calls(prepare, pointers)
        _zero(plan.zero, pointers)
        _run_calls(launches, pointers)

    def prepare(self, *args: Any) -> None:
        pointers, plan, prepare, _ = self._enter(args)
        _zero(plan.zero_prepare, pointers)
        _run_calls(prepare, pointers)
        self.prepared = True

    def _enter(self, args: tuple[Any, ...]) -> tuple[list[int], Plan, list[_Call], list[_Call]]:
        pointers = [tensor.data_ptr() for tensor in args[: self._tensors]]
        bits = 0
        for pointer in pointers:
            bits |= pointer
        if bits & self._mask:
            raise NotApplicable(f"{self._kernel.name}: needs addresses that are multiples of {self._kernel.align} bytes")
        # torch applies set_num_threads to a thread of ours only when that thread first asks
        self._sync_threads()
        return pointers, *self._planned(args[self._tensors :])

    def _planned(self, values: tuple[int, ...]) -> tuple[Plan, list[_Call], list[_Call]]:
        found = self._plans.get(values)
        if found is None:
            symbols = dict(zip(self._symbols, values, strict=True))
            plan = plan_launches(self._kernel, self._task, self._constants, self._facts, symbols)
            found = (plan, [self._bind(s) for s in plan.prepare], [self._bind(s) for s in plan.launches])
            if len(self._plans) >= MAX_PLANS:
                self._plans = {}
            self._plans[values] = found
        return found

    def _bind(self, step: LaunchPlan) -> _Call:
        function = ctypes.CFUNCTYPE(None, *(_CTYPES[a.type] for a in step.args))((step.kernel, self._library))
        values = [None if a.type == "pointer" else a.value for a in step.args]
        holes = tuple((i, a.position) for i, a in enumerate(step.args) if a.position is not None)
        return function, values, holes


def _zero(spans: tuple[tuple[int, int], ...], pointers: list[int]) -> None:
    for position, nbytes in spans:
        ctypes.memset(pointers[position], 0, nbytes)


def _run_calls(calls: list[_Call], pointers: list[int]) -> None:
    for function, template, holes in calls:
        values = template.copy()
        for place, position in holes:
            values[place] = pointers[position]
        function(*values)
