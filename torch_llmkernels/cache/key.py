"""What a stored decision is valid for, and the frame that every stored value carries.

A `RecordKey` is stored beside its value, so a miss can say which field differs instead of leaving the user to guess why the
same model is verified again.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import importlib.metadata
import json
from collections.abc import Mapping
from typing import Any, Protocol

from torch_llmkernels.errors import SchemaError
from torch_llmkernels.evaluation import SCHEMA
from torch_llmkernels.task import Task, TensorSpec, canonical_json, digest

_MAGIC = b"llmk1 "


class Facts(Protocol):
    """The part of a device's facts that a decision depends on."""

    kind: str
    unit: str
    driver: str


@dataclasses.dataclass(frozen=True)
class RecordKey:
    """Everything a decision depends on. Two keys with equal fields share one decision; any other difference is a miss.

    Attributes:
        task_key: `Task.key`: program, tensors, parameters and precision flags.
        signature: `Task.signature`, for people and for finding near misses.
        tensors: The inputs' dtypes and shapes in words. Implied by `task_key`; here so that a miss can name them.
        numerics: The precision flags in words. Implied by `task_key` too.
        device_kind: Slug of the device's kind, such as `nvidia-h100`.
        unit: What tells devices of that kind apart (`DeviceFacts.unit`): full name and core count, on a CPU also torch's threads.
        torch: Version of torch, whose kernels are the yardstick and the baseline.
        driver: Version of the device driver; on a CPU, of the compiler.
        schema: Version of the stored form.
    """

    task_key: str
    signature: str
    tensors: str
    numerics: str
    device_kind: str
    unit: str
    torch: str
    driver: str = ""
    schema: int = SCHEMA

    @classmethod
    def of(cls, task: Task, facts: Facts) -> RecordKey:
        """The key of `task` on the device that `facts` describes."""
        return cls(
            task.key, task.signature, _tensors(task.inputs), _numerics(task), facts.kind, facts.unit, torch_version(),
            str(facts.driver),
        )  # fmt: skip

    @functools.cached_property
    def text(self) -> str:
        """The store key: `<signature>/<task key>/<digest of every field>`."""
        return f"{self.signature}/{self.task_key}/{digest(self.to_json())}"

    def differences(self, other: RecordKey) -> list[str]:
        """Why a value stored under `other` does not answer this key, one line per field; empty if it does.

        The task's digest is named only if nothing readable tells the two tasks apart.
        """
        pairs = [(f.name, getattr(self, f.name), getattr(other, f.name)) for f in dataclasses.fields(self)]
        differing = [(name, here, there) for name, here, there in pairs if here != there]
        if any(name in ("signature", "tensors", "numerics") for name, _, _ in differing):
            differing = [d for d in differing if d[0] != "task_key"]
        return [f"{name}: {here or 'none'} here, {there or 'none'} in the store" for name, here, there in differing]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> RecordKey:
        """The key `to_json` wrote.

        Raises:
            SchemaError: for fields of another release.
        """
        try:
            return cls(**plain)
        except TypeError as error:
            raise SchemaError(f"stored key is of another release or damaged: {error}") from None


def _tensors(specs: tuple[TensorSpec, ...]) -> str:
    return " ".join(f"{t.name}:{t.dtype}[{','.join(map(str, t.shape))}]" for t in specs)


def _numerics(task: Task) -> str:
    return " ".join(f"{f.name}={getattr(task.numerics, f.name)}" for f in dataclasses.fields(task.numerics))


@functools.cache
def torch_version() -> str:
    """The installed torch's version, read from its metadata: importing torch costs seconds."""
    try:
        return importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return "none"


def seal(key: str, payload: bytes) -> bytes:
    """`payload` in a frame that holds its key, size and sha256, so that a torn or misplaced value is noticed."""
    head = {"key": key, "sha256": hashlib.sha256(payload).hexdigest(), "size": len(payload)}
    return _MAGIC + canonical_json(head).encode() + b"\n" + payload


def unseal(key: str, blob: bytes) -> bytes:
    """The payload that `seal(key, payload)` framed.

    Raises:
        SchemaError: if the frame is missing, belongs to another key, or the payload is truncated or altered.
    """
    head_line, newline, payload = blob.partition(b"\n")
    if not newline or not head_line.startswith(_MAGIC):
        raise SchemaError("no frame: not written by this release, or truncated")
    try:
        head = json.loads(head_line[len(_MAGIC) :])
        found = (head["key"], head["size"], head["sha256"])
    except (ValueError, KeyError, TypeError) as error:
        raise SchemaError(f"the frame does not parse: {error}") from None
    if found[0] != key:
        raise SchemaError(f"it belongs to key {found[0]!r}")
    if found[1] != len(payload):
        raise SchemaError(f"truncated: {len(payload)} of {found[1]} bytes")
    if found[2] != hashlib.sha256(payload).hexdigest():
        raise SchemaError("its content does not match its sha256")
    return payload
