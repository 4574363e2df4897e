"""A kernel file made runnable on a device: compiled for each choice of constants, and loaded."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_llmkernels.errors import CompileError, LaunchError, LLMKernelsError, NotApplicable, ToolchainMissing
from torch_llmkernels.task import Task, TensorSpec

if TYPE_CHECKING:
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.kernels.targets import Binary, Launcher, Target

COMPILE_THREADS = max(4, min(16, os.cpu_count() or 1))


def spread(items: list[dict[str, int]], most: int) -> list[dict[str, int]]:
    """At most `most` of the items, at even steps."""
    if len(items) <= most:
        return items
    return [items[i * len(items) // most] for i in range(most)]


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A compiled and loaded kernel."""

    kernel: Kernel
    binary: Binary
    constants: dict[str, int]
    launcher: Launcher
    facts: DeviceFacts
    task: Task

    def workspaces(self, task: Task) -> list[TensorSpec]:
        """The workspaces for a static task, as specs."""
        from torch_llmkernels.kernels import launch

        return [_spec(w) for w in launch.workspaces(self.kernel, task, self.constants, self.facts)]

    def again(self, device: Device) -> Candidate:
        """The same code with a launcher of its own."""
        return dataclasses.replace(self, launcher=device.load(self.binary, self.kernel, self.task, self.constants))


def _spec(workspace: Any) -> TensorSpec:
    strides, running = [], 1
    for size in reversed(workspace.shape):
        strides.append(running)
        running *= size
    return TensorSpec(workspace.name, workspace.dtype, tuple(workspace.shape), tuple(reversed(strides)))


class Binaries:
    """Compiled code in a folder, a file per key, for the processes of one pool: a `targets.BinaryStore`."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder)

    def binary(self, key: str) -> bytes | None:
        """What `put_binary` kept, or None."""
        path = self._folder / key
        return path.read_bytes() if path.exists() else None

    def put_binary(self, key: str, code: bytes) -> None:
        """Keep it, all or nothing. A folder that its pool has removed keeps nothing."""
        with contextlib.suppress(FileNotFoundError):
            part = self._folder / f"{key}.{os.getpid()}.{threading.get_ident()}"
            part.write_bytes(code)
            part.replace(self._folder / key)


def compile_each(
    kernel: Kernel, task: Task, combinations: list[dict[str, int]], device: Device, store: Binaries | None = None
) -> list[Binary | LLMKernelsError]:
    """For each combination its binary, or why there is none; several compile at a time."""
    from torch_llmkernels.kernels.targets import build

    def compiled(constants: dict[str, int]) -> Binary | LLMKernelsError:
        try:
            return build(kernel, task, constants, device.target, device.facts, store)
        except (CompileError, NotApplicable) as error:
            return error

    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        return list(pool.map(compiled, combinations))


def compile_all(
    kernel: Kernel, task: Task, combinations: list[dict[str, int]], device: Device, store: Binaries | None = None
) -> list[Candidate]:
    """Every combination that compiles and loads, in order.

    Raises:
        CompileError, NotApplicable, LaunchError: of the first combination, if there is none.
    """
    results = compile_each(kernel, task, combinations, device, store)
    made: list[Candidate] = []
    first: LLMKernelsError | None = None
    for constants, binary in zip(combinations, results, strict=True):
        try:
            if isinstance(binary, LLMKernelsError):
                raise binary
            launcher = device.load(binary, kernel, task, constants)
            made.append(Candidate(kernel, binary, dict(constants), launcher, device.facts, task))
        except (CompileError, NotApplicable, LaunchError) as error:
            first = first or error
    if not made:
        assert first is not None
        raise first
    return made


class Device:
    """The device that a job runs on; entering it makes it the current one."""

    def __init__(self, task: Task, index: int) -> None:
        from torch_llmkernels.kernels.targets import target_for

        self.target: Target = target_for(task.device)
        reason = self.target.unavailable()
        if reason:
            raise ToolchainMissing(reason)
        self.index = index
        self.facts: DeviceFacts = self.target.facts(index)
        self._current = contextlib.ExitStack()

    def __enter__(self) -> None:
        if self.target.name == "cuda":
            import torch

            self._current.enter_context(torch.cuda.device(self.index))  # leaves without a context on the device it came from

    def __exit__(self, *_: object) -> None:
        self._current.close()

    def load(self, binary: Binary, kernel: Kernel, task: Task, constants: Mapping[str, int]) -> Launcher:
        """Load a binary onto this device."""
        return self.target.load(binary, kernel, task, constants, self.facts, self.index)

    def environment(self, task: Task) -> tuple[tuple[str, str], ...]:
        """What the numbers hold for."""
        import torch

        numerics = ", ".join(f"{k}={v}" for k, v in sorted(dataclasses.asdict(task.numerics).items()))
        return (
            ("torch", torch.__version__),
            ("device", self.facts.name),
            ("device_kind", self.facts.kind),
            ("unit", self.facts.unit),
            ("arch", self.facts.arch),
            ("driver", self.facts.driver),
            ("threads", str(torch.get_num_threads())),
            ("numerics", numerics),
        )
