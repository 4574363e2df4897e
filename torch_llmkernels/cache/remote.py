"""A cache that several machines share: two methods to implement, and one wrapper that keeps its failures harmless.

What comes from a remote is as foreign as a bundle: it enters the store as a candidate and is verified on this device.
"""

from __future__ import annotations

import abc
import dataclasses
import hashlib
import json
import logging
from pathlib import Path

from torch_llmkernels.cache.key import seal, unseal
from torch_llmkernels.cache.library import write_atomically
from torch_llmkernels.errors import SchemaError
from torch_llmkernels.evaluation import Record
from torch_llmkernels.task import canonical_json

log = logging.getLogger("torch_llmkernels.cache")


class RemoteCache(abc.ABC):
    """Bytes by text key, somewhere else. Either method may raise anything; `Shared` makes a failure a miss."""

    @abc.abstractmethod
    def get(self, key: str) -> bytes | None:
        """The value of `key`, or None."""

    @abc.abstractmethod
    def put(self, key: str, value: bytes) -> None:
        """Store `value` under `key`."""


class FileRemote(RemoteCache):
    """A directory that several machines mount.

    Args:
        directory: Created if it does not exist.
    """

    def __init__(self, directory: Path | str) -> None:
        self.directory = Path(directory)

    def _path(self, key: str) -> Path:
        name = hashlib.sha256(key.encode()).hexdigest()
        return self.directory / name[:2] / f"{name}.llmk"

    def get(self, key: str) -> bytes | None:
        """The value of `key`, or None.

        Raises:
            SchemaError: if the file is truncated or altered.
            OSError: if the directory cannot be read.
        """
        try:
            blob = self._path(key).read_bytes()
        except FileNotFoundError:
            return None
        return unseal(key, blob)

    def put(self, key: str, value: bytes) -> None:
        """Store `value` under `key`.

        Raises:
            OSError: if the directory cannot be written.
        """
        write_atomically(self._path(key), seal(key, value))


class Shared:
    """Records in a remote cache. After the first failure it is left alone for the rest of the process.

    Args:
        remote: Any `RemoteCache`.
        name: What to call it in `Record.origin` and in warnings.
    """

    def __init__(self, remote: RemoteCache, name: str = "remote") -> None:
        self.remote = remote
        self.name = name
        self.failed = False

    def record(self, task_key: str, device_kind: str) -> Record | None:
        """The record of this task on this kind of device as a candidate (origin `import:<name>`), or None."""
        value = self._guarded("get", record_key(task_key, device_kind))
        if value is None:
            return None
        try:
            record = Record.from_json(json.loads(value))
        except (SchemaError, ValueError, TypeError, AttributeError) as error:
            log.warning("remote cache %s: record %s is unreadable and counts as a miss: %s", self.name, task_key, error)
            return None
        return dataclasses.replace(record, origin=f"import:{self.name}") if record.task.key == task_key else None

    def publish(self, record: Record) -> bool:
        """Offer an accepted record to the others; False if it could not be stored."""
        key = record_key(record.task.key, record.device_kind)
        self._guarded("put", key, canonical_json(record.to_json()).encode())
        return not self.failed

    def _guarded(self, method: str, *args: str | bytes) -> bytes | None:
        if self.failed:
            return None
        try:
            return getattr(self.remote, method)(*args)
        except SchemaError as error:
            log.warning("remote cache %s: an entry is unreadable and counts as a miss: %s", self.name, error)
        except Exception as error:  # a remote is other people's code and network: whatever it raises, compiling goes on
            self.failed = True
            log.warning("remote cache %s failed (%s: %s); going on with the local store", self.name, type(error).__name__, error)
        return None


def record_key(task_key: str, device_kind: str) -> str:
    """The remote key of a task's record on a kind of device."""
    return f"record/{device_kind}/{task_key}"
