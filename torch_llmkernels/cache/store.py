"""The user's persistent store: decisions, compiled binaries and imported records, by text key.

Kernels are capital: nothing here is ever evicted, and a damaged database is moved aside. An entry that cannot be read is a miss
with a logged reason, never an error; `LLMKERNELS_STRICT=1` raises instead.
"""

from __future__ import annotations

import abc
import contextlib
import hashlib
import json
import logging
import sqlite3
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

import diskcache

from torch_llmkernels.cache import disk
from torch_llmkernels.cache.key import Facts, RecordKey, seal, unseal
from torch_llmkernels.errors import SchemaError, StoreError
from torch_llmkernels.evaluation import Decision, GraphDecision, Record
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import canonical_json, digest

log = logging.getLogger("torch_llmkernels.cache")

T = TypeVar("T")

DECISION, BINARY, IMPORTED = "decision/", "binary/", "imported/"
GRAPH, IMPORTED_GRAPH = "graph/", "imported-graph/"
IMPORTED_DECISION = "imported-decision/"
_GENERATION = "meta/generation"
_NO_DECISIONS = "0" * 32


class BaseStore(abc.ABC):
    """What a store can do, on top of six primitives over text keys and bytes.

    Args:
        strict: Raise `StoreError` where the default is to log a reason and miss.
    """

    def __init__(self, strict: bool = False) -> None:
        self.strict = strict

    @property
    @abc.abstractmethod
    def directory(self) -> Path | None:
        """Where it persists, or None if it does not."""

    @abc.abstractmethod
    def _read(self, key: str) -> bytes | None: ...

    @abc.abstractmethod
    def _write(self, key: str, blob: bytes) -> None: ...

    @abc.abstractmethod
    def _remove(self, key: str) -> bool: ...

    @abc.abstractmethod
    def keys(self, prefix: str = "") -> list[str]:
        """Every key that starts with `prefix`, oldest first."""

    @abc.abstractmethod
    def lock(self, key: str, wait: bool = False) -> contextlib.AbstractContextManager[bool]:
        """Hold the lock of `key`, across processes; yields whether it is held.

        Look the key up again inside: another process may have stored it while this one was waiting or deciding.

        Args:
            key: Any text.
            wait: Block until the lock is free. The compile path does not wait: it yields False and goes on without.
        """

    @abc.abstractmethod
    def _transaction(self) -> contextlib.AbstractContextManager[Any]: ...

    def get(self, key: str) -> bytes | None:
        """The value of `key`, or None: absent, truncated, altered or unreadable (the last three with a logged reason)."""
        try:
            blob = self._read(key)
            return None if blob is None else unseal(key, blob)
        except (SchemaError, disk.NotBytes) as error:
            self._trouble(f"store entry {key} is unreadable and counts as a miss: {error}", error)
            return None

    def put(self, key: str, value: bytes) -> None:
        """Store `value` under `key`, replacing what was there.

        A store that cannot write (full, or read-only by now) logs a warning: the compilation goes on.
        """
        self._write(key, seal(key, value))

    def delete(self, key: str) -> bool:
        """Remove `key`; False if there was none."""
        with self._transaction():
            if key.startswith(DECISION):
                self._advance(self._stored(key), None)
            return self._remove(key)

    def decision(self, key: RecordKey, explained: bool = True) -> Decision | None:
        """What was decided for exactly this key; None is a miss, `explained` on the logger `torch_llmkernels.cache`."""
        stored = self._stored(DECISION + key.text)
        if stored is not None:
            return stored[1]
        if explained and log.isEnabledFor(logging.INFO):
            log.info("store miss: %s %s: %s", key.signature, key.task_key, "; ".join(self.explain(key)))
        return None

    def put_decision(self, key: RecordKey, decision: Decision) -> None:
        """Remember a decision and advance the generation."""
        name = DECISION + key.text
        plain = {"key": key.to_json(), "decision": decision.to_json()}
        with self._transaction():
            self._advance(self._stored(name), (key, decision))
            self.put(name, canonical_json(plain).encode())

    def put_winner(self, key: RecordKey, record: Record) -> Decision:
        """Make the record that a search found the decision for `key`, beside what was tried before.

        Returns:
            The decision; its record is another if a faster kernel was there.
        """
        from torch_llmkernels.kernels.source import parse_kernel

        known = self.decision(key, explained=False) or Decision(None, f"found by {record.origin}")
        label = parse_kernel(record.kernel_text, record.kernel_name).label
        tried = (*((name, e) for name, e in known.tried if name != label), (label, record.evaluation))
        faster = known.record and known.record.evaluation.relative_time <= record.evaluation.relative_time
        decision = Decision(known.record if faster else record, known.reason, tried)
        self.put_decision(key, decision)
        return decision

    def decisions(self) -> Iterator[tuple[RecordKey, Decision]]:
        """Every readable decision with its key, oldest first."""
        stored = (self._stored(name) for name in self.keys(DECISION))
        return (pair for pair in stored if pair is not None)

    def explain(self, key: RecordKey) -> list[str]:
        """Why `decision(key)` misses: the fields in which the nearest stored key differs; empty if it hits."""
        same_signature = [self._stored(name) for name in self.keys(f"{DECISION}{key.signature}/")]
        found = [stored[0] for stored in same_signature if stored is not None]
        if not found:
            return [f"nothing is stored for {key.signature}"]
        nearest = min(found, key=lambda other: (other.task_key != key.task_key, len(key.differences(other))))
        return key.differences(nearest)

    def binary(self, key: str) -> bytes | None:
        """The compiled binary of `key` (`Binary.key`), or None."""
        return self.get(BINARY + key)

    def put_binary(self, key: str, code: bytes) -> None:
        """Keep a compiled binary. It is derived: deleting it costs one compilation."""
        self.put(BINARY + key, code)

    def imported(self, signature: str) -> list[Record]:
        """Records that came in bundles: candidates with foreign evidence, to be verified here before use."""
        found = []
        for name in self.keys(f"{IMPORTED}{signature}/"):
            plain = self._json(name)
            with self._readable(name):
                found += [Record.from_json(plain)] if plain is not None else []
        return found

    def all_imported(self) -> list[Record]:
        """`imported` of every signature."""
        signatures = dict.fromkeys(name.split("/")[1] for name in self.keys(IMPORTED))
        return [record for signature in signatures for record in self.imported(signature)]

    def put_imported(self, record: Record) -> str:
        """Keep a record from elsewhere as a candidate; returns its store key."""
        plain = record.to_json()
        name = f"{IMPORTED}{record.task.signature}/{record.task.key}/{digest(plain)}"
        self.put(name, canonical_json(plain).encode())
        return name

    def imported_decision(self, key: RecordKey) -> Decision | None:
        """What a bundle says was tried for exactly this key, or None: a claim that nothing may be swapped in by."""
        stored = self._stored(IMPORTED_DECISION + key.text)
        return stored and stored[1]

    def put_imported_decision(self, key: RecordKey, decision: Decision) -> str:
        """Keep what was tried elsewhere, without the record that won there; returns its store key."""
        name = IMPORTED_DECISION + key.text
        plain = {"key": key.to_json(), "decision": Decision(None, decision.reason, decision.tried).to_json()}
        self.put(name, canonical_json(plain).encode())
        return name

    def graph_decision(self, graph: str, facts: Facts) -> GraphDecision | None:
        """What was measured about a graph on this device, else what a bundle says of a device of its kind and driver, or None."""
        own = f"{GRAPH}{graph}/{digest([facts.kind, facts.unit, str(facts.driver)])}"
        return self._graph(own) or self._graph(f"{IMPORTED_GRAPH}{graph}/{digest([facts.kind, str(facts.driver)])}")

    def put_graph_decision(self, decision: GraphDecision) -> str:
        """Keep what was measured about a graph on the device that `decision` names; returns its store key."""
        name = f"{GRAPH}{decision.graph}/{digest([decision.device_kind, decision.unit, decision.driver])}"
        self.put(name, canonical_json(decision.to_json()).encode())
        return name

    def put_imported_graph(self, decision: GraphDecision) -> str:
        """Keep what another unit's measurement says, for devices of its kind and driver; returns its store key."""
        name = f"{IMPORTED_GRAPH}{decision.graph}/{digest([decision.device_kind, decision.driver])}"
        self.put(name, canonical_json(decision.to_json()).encode())
        return name

    def graph_decisions(self) -> list[GraphDecision]:
        """Every readable one, measured here or imported."""
        found = (self._graph(name) for name in (*self.keys(GRAPH), *self.keys(IMPORTED_GRAPH)))
        return [decision for decision in found if decision is not None]

    def _graph(self, name: str) -> GraphDecision | None:
        plain = self._json(name)
        if plain is None:
            return None
        with self._readable(name):
            return GraphDecision.from_json(plain)
        return None

    def generation(self) -> str:
        """32 hex digits that change whenever what the stored decisions would swap changes, and only then."""
        value = self.get(_GENERATION)
        return value.decode() if value else _NO_DECISIONS

    def _advance(self, old: tuple[RecordKey, Decision] | None, new: tuple[RecordKey, Decision] | None) -> None:
        """Fold one replaced decision into the generation: the XOR over all decisions, so it does not depend on their order."""
        change = _identity(old) ^ _identity(new)
        if change:
            self.put(_GENERATION, f"{int(self.generation(), 16) ^ change:032x}".encode())

    def _stored(self, name: str) -> tuple[RecordKey, Decision] | None:
        plain = self._json(name)
        if plain is None:
            return None
        with self._readable(name):
            return RecordKey.from_json(plain["key"]), Decision.from_json(plain["decision"])
        return None

    def _json(self, name: str) -> Any:
        value = self.get(name)
        with self._readable(name):
            return None if value is None else json.loads(value)
        return None

    @contextlib.contextmanager
    def _readable(self, name: str) -> Iterator[None]:
        try:
            yield
        except (SchemaError, ValueError, KeyError, TypeError) as error:
            self._trouble(f"store entry {name} is unreadable and counts as a miss: {error}", error)

    def _trouble(self, message: str, cause: BaseException) -> None:
        if self.strict:
            raise StoreError(message) from cause
        log.warning("%s", message)


def _identity(stored: tuple[RecordKey, Decision] | None) -> int:
    """128 bits that name what a decision would swap: its key, and the kernel and constants or their absence."""
    if stored is None:
        return 0
    key, decision = stored
    record = decision.record
    text = canonical_json([key.text, record and [record.kernel_text, dict(record.constants)]])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:16], "big")


class Store(BaseStore):
    """The store on disk. Safe for threads, forks and any number of processes on one machine.

    Args:
        directory: Created with mode 0700; an existing one must be this user's alone. Of one that cannot be written (this user's
            or root's) a private copy is used: what is in it counts, what is added is gone when the process ends.
        strict: Raise where the default is to log a reason and miss.

    Attributes:
        is_read_only: Whether nothing that is stored outlives the process.

    Raises:
        StoreError: if the directory is foreign, open to others, a symbolic link, read-only and empty, or cannot be created.
    """

    def __init__(self, directory: Path | str, strict: bool = False) -> None:
        super().__init__(strict)
        self._directory = Path(directory)
        self.is_read_only = not disk.private_directory(self._directory)
        self._warned = False
        self._folder = disk.private_copy(self._directory) if self.is_read_only else self._directory
        self._database = disk.open_database(self._folder)
        self._inode = self._database_inode()

    @property
    def directory(self) -> Path:
        """Where it persists."""
        return self._directory

    def is_current(self) -> bool:
        """Whether the directory still is what was opened, and still private: not deleted, replaced or opened to others."""
        try:
            read_only = not disk.private_directory(self._directory)
        except StoreError:
            return False
        return read_only == self.is_read_only and self._inode is not None and self._inode == self._database_inode()

    def _database_inode(self) -> int | None:
        try:
            return (self._folder / disk.DATABASE).stat().st_ino
        except OSError:
            return None

    def close(self) -> None:
        """Close this thread's connection; it reopens by itself at the next use."""
        self._database.close()

    def keys(self, prefix: str = "") -> list[str]:
        """Every key that starts with `prefix`, oldest first."""
        found = self._attempt(lambda: list(self._database), [])
        return [key for key in found if key is not None and key.startswith(prefix)]

    def _read(self, key: str) -> bytes | None:
        return self._attempt(lambda: self._database.get(key), None)

    def _write(self, key: str, blob: bytes) -> None:
        if self.is_read_only and not self._warned and key.startswith(DECISION):
            self._warned = True
            log.warning("store %s is read-only: what is verified now is verified again in every process. Fill the store where it "
                        "can be written, or set LLMKERNELS_CACHE_DIR to a directory of your own", self._directory)  # fmt: skip
        self._attempt(lambda: self._database.set(key, blob), False)

    def _remove(self, key: str) -> bool:
        return self._attempt(lambda: bool(self._database.delete(key)), False)

    @contextlib.contextmanager
    def _transaction(self) -> Iterator[None]:
        try:
            with contextlib.ExitStack() as stack:
                self._attempt(lambda: stack.enter_context(self._database.transact()), None)
                yield
        except sqlite3.Error as error:  # of the commit: what runs inside has handled its own
            self._unusable(error)

    def _attempt(self, action: Callable[[], T], otherwise: T) -> T:
        """`action()`; a database found damaged is replaced and `action` tried once more, other failures give `otherwise`."""
        try:
            try:
                return action()
            except sqlite3.DatabaseError as error:
                if isinstance(error, sqlite3.OperationalError):
                    raise
                self._database.close()
                self._database = disk.replace_damaged(self._folder)
                self._inode = self._database_inode()
                return action()
        except (sqlite3.Error, diskcache.Timeout, OSError) as error:
            self._unusable(error)
            return otherwise

    def _unusable(self, error: Exception) -> None:
        what = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        self._trouble(f"store {self._directory} cannot be used just now ({what}); going on without", error)

    @contextlib.contextmanager
    def lock(self, key: str, wait: bool = False) -> Iterator[bool]:
        """Hold the lock of `key`, across processes; yields whether it is held. See `BaseStore.lock`."""
        lock = disk.file_lock(self._folder, hashlib.sha256(key.encode()).hexdigest()[:32])
        try:
            lock.acquire(blocking=wait)
        except TimeoutError:
            yield False
            return
        except OSError as error:
            # a file system without locks: doing the work twice is better than not at all
            self._trouble(f"store {self._directory} has no working file locks ({error}); going on without", error)
            yield True
            return
        try:
            yield True
        finally:
            lock.release()


class NullStore(BaseStore):
    """Stands in for a store that cannot be used: the same calls, kept in memory until the process ends."""

    def __init__(self) -> None:
        super().__init__()
        self._entries: dict[str, bytes] = {}
        self._guard = threading.RLock()
        self._locks: dict[str, threading.Lock] = {}

    @property
    def directory(self) -> None:
        """None: it does not persist."""
        return None

    def close(self) -> None:
        """Nothing to close."""

    def keys(self, prefix: str = "") -> list[str]:
        """Every key that starts with `prefix`, oldest first."""
        return [key for key in self._entries if key.startswith(prefix)]

    def _read(self, key: str) -> bytes | None:
        return self._entries.get(key)

    def _write(self, key: str, blob: bytes) -> None:
        self._entries[key] = blob

    def _remove(self, key: str) -> bool:
        return self._entries.pop(key, None) is not None

    def _transaction(self) -> contextlib.AbstractContextManager[Any]:
        return self._guard

    @contextlib.contextmanager
    def lock(self, key: str, wait: bool = False) -> Iterator[bool]:
        """Hold the lock of `key` among this process's threads; yields whether it is held."""
        lock = self._locks.setdefault(key, threading.Lock())
        held = lock.acquire(blocking=wait)
        try:
            yield held
        finally:
            if held:
                lock.release()


_opened: dict[tuple[Path, bool], Store] = {}
_in_memory: dict[Path, NullStore] = {}


def open_store(settings: Settings) -> Store | NullStore:
    """The store these settings name; where it cannot be used, a store in memory, with one warning per directory.

    A process opens each store once: opening writes, which takes a while on a network file system.

    Raises:
        StoreError: with `strict`, instead of falling back to memory.
    """
    directory = settings.store_directory()
    known = _opened.get((directory, settings.strict))
    if known is not None and known.is_current():
        return known
    try:
        opened = _opened[directory, settings.strict] = Store(directory, strict=settings.strict)
        return opened
    except StoreError as error:
        if settings.strict:
            raise
        if directory not in _in_memory:
            log.warning("%s. Until then, kernels are verified again in every process", error)
        return _in_memory.setdefault(directory, NullStore())
