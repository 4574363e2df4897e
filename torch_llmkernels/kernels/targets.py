"""What every target offers, and the choice of one by the task's device.

binary = build(kernel, task, constants, target_for("cuda"), facts, store)      # compiled, or from the store
launcher = target_for("cuda").load(binary, kernel, task, constants, facts)
launcher(*outputs, *workspaces, *inputs, *symbol_values)
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, Protocol

from torch_llmkernels.errors import SchemaError, ToolchainMissing
from torch_llmkernels.evaluation import Resources
from torch_llmkernels.task import canonical_json, digest

if TYPE_CHECKING:
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.task import Task

SCHEMA = 1


@dataclasses.dataclass(frozen=True)
class Binary:
    """Compiled code.

    Attributes:
        code: A cubin, or a shared object.
        resources: What the compiler reports.
        key: Digest of everything the code depends on: source, macros, prelude, compiler, flags, architecture.
    """

    code: bytes
    resources: Resources
    key: str

    def to_bytes(self) -> bytes:
        """One line of JSON, then the code; `from_bytes` reads it back."""
        head = {
            "schema": SCHEMA,
            "key": self.key,
            "resources": dataclasses.asdict(self.resources),
            "code": digest(self.code.hex()),
        }
        return canonical_json(head).encode() + b"\n" + self.code

    @classmethod
    def from_bytes(cls, data: bytes) -> Binary:
        """The binary `to_bytes` wrote.

        Raises:
            SchemaError: for another schema version, or damaged bytes.
        """
        head, _, code = data.partition(b"\n")
        try:
            plain = json.loads(head)
            if plain["schema"] != SCHEMA or plain["code"] != digest(code.hex()):
                raise SchemaError("a stored binary is damaged or of another schema version; it will be compiled again")
            return cls(code, Resources.from_json(plain["resources"]), plain["key"])
        except (ValueError, KeyError, TypeError) as error:
            raise SchemaError(f"a stored binary is damaged: {error!r}; it will be compiled again") from None


class Launcher(Protocol):
    """A loaded kernel. Thread-safe.

    Attributes:
        prepared: Whether the prepare launches are left out of calls, because `prepare` ran and its workspaces are kept.
        resources: What the compiler and the driver report.
    """

    prepared: bool
    resources: Resources

    def __call__(self, *args: Any) -> None:
        """Enqueue on the current stream (CUDA) or run (CPU): `(*outputs, *workspaces, *inputs, *symbol_values)`.

        No allocation and no synchronisation.

        Raises:
            NotApplicable: for tensors or sizes that it cannot serve; nothing was launched.
            LaunchError: if the driver refuses.
        """

    def prepare(self, *args: Any) -> None:
        """Run the prepare launches alone and leave them out of later calls; the caller keeps the workspaces they wrote."""


class Target(Protocol):
    """A compiler and a loader. Implemented by the modules `cuda` and `cpu`, through one object each."""

    name: str

    def unavailable(self) -> str | None:
        """Why kernels cannot run on this target here, or None."""

    def current(self) -> int:
        """Index of the device that is current in this thread."""

    def facts(self, index: int | None = None) -> DeviceFacts:
        """Facts of device `index` (default: the current one)."""

    def binary_key(self, kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> str:
        """What `compile` would give the binary as its key, without compiling."""

    def compile(self, kernel: Kernel, task: Task, constants: Mapping[str, int], facts: DeviceFacts) -> Binary:
        """Compile for a device.

        Raises:
            NotApplicable: if a macro has no value for this task.
            CompileError: if the compiler refuses the source.
            ToolchainMissing: if there is no compiler.
        """

    def load(
        self,
        binary: Binary,
        kernel: Kernel,
        task: Task,
        constants: Mapping[str, int],
        facts: DeviceFacts,
        index: int | None = None,
    ) -> Launcher:
        """Load onto device `index` (default: the current one).

        Raises:
            NotApplicable: if the kernel does not serve this (static) task.
            LaunchError: if the driver or the dynamic loader refuses the code.
        """


class BinaryStore(Protocol):
    """The part of the store that `build` uses."""

    def binary(self, key: str) -> bytes | None: ...

    def put_binary(self, key: str, code: bytes) -> None: ...


@contextlib.contextmanager
def on_device_of(values: Iterable[Any]) -> Iterator[None]:
    """Make the CUDA device of the first CUDA tensor among `values` the current one: facts, checks and times are of it then."""
    indexes = (value.device.index for value in values if getattr(value, "is_cuda", False))
    index = next(indexes, None)
    if index is None:
        yield
        return
    import torch

    with torch.cuda.device(index):
        yield


def target_for(name: str) -> Target:
    """The target called `name`: `cuda` or `cpu`.

    Raises:
        ToolchainMissing: for any other name.
    """
    if name == "cuda":
        from torch_llmkernels.kernels.cuda import CUDA

        return CUDA
    if name == "cpu":
        from torch_llmkernels.kernels.cpu import CPU

        return CPU
    raise ToolchainMissing(f"no target is called {name!r}; there are 'cuda' and 'cpu'")


def build(
    kernel: Kernel, task: Task, constants: Mapping[str, int], target: Target, facts: DeviceFacts, store: BinaryStore | None = None
) -> Binary:
    """The kernel's binary for this task and device: from the store if it is there and whole, else compiled and stored.

    Raises:
        CompileError, NotApplicable, ToolchainMissing: as `Target.compile`.
    """
    key = target.binary_key(kernel, task, constants, facts)
    found = _stored(store, key)
    if found is not None:
        return found
    binary = target.compile(kernel, task, constants, facts)
    if store is not None:
        store.put_binary(key, binary.to_bytes())
    return binary


def _stored(store: BinaryStore | None, key: str) -> Binary | None:
    data = store.binary(key) if store is not None else None
    try:
        binary = Binary.from_bytes(data) if data is not None else None
    except SchemaError:
        return None  # derived data: a damaged entry is a miss
    return binary if binary is not None and binary.key == key else None
