"""The shipped library: kernels and records as files that people review.

    <root>/<signature>/<kernel>.cu | <kernel>.cpp
    <root>/records/<device kind>/<signature>/<task key>.json

A record names its kernel and the sha256 of its text instead of repeating it: editing a kernel retires the evidence for it.
"""

from __future__ import annotations

import functools
import hashlib
import json
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_llmkernels.errors import KernelSourceError, LLMKernelsError, SchemaError, SettingsError, StoreError
from torch_llmkernels.evaluation import Record
from torch_llmkernels.settings import Settings

if TYPE_CHECKING:
    from torch_llmkernels.kernels.source import Kernel

log = logging.getLogger("torch_llmkernels.cache")

SUFFIX = {"cuda": ".cu", "cpu": ".cpp"}
RECORDS = "records"
_PLAIN_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+-]*")


def default_library(settings: Settings) -> Library:
    """`library_dir` if it is set, else the checkout's `cache/`, else the copy inside the wheel.

    Raises:
        SettingsError: if `library_dir` is not a directory.
    """
    if settings.library_dir:
        root = Path(settings.library_dir).expanduser()
        if not root.is_dir():
            raise SettingsError(f"library_dir: {root} is not a directory; unset it to use the shipped library")
        return Library(root, strict=settings.strict)
    package = Path(__file__).resolve().parents[1]
    checkout = package.parent
    if (checkout / "pyproject.toml").is_file() and (checkout / "cache").is_dir():
        return Library(checkout / "cache", strict=settings.strict)
    return Library(package / "_library", strict=settings.strict)


class Library:
    """Kernels by signature and target, records by task and device kind. Reads files when asked; holds nothing open.

    Args:
        root: Its directory; one that does not exist is an empty library.
        strict: Raise for an unreadable file where the default is to log a warning and skip it.
    """

    def __init__(self, root: Path | str, strict: bool = False) -> None:
        self.root = Path(root)
        self.strict = strict

    def __repr__(self) -> str:
        return f"Library({str(self.root)!r})"

    def signatures(self) -> list[str]:
        """Every signature that has a kernel, sorted."""
        paths = (path for suffix in SUFFIX.values() for path in self.root.glob(f"*/*{suffix}"))
        return sorted({signature for path in paths for signature in self._implements(path)})

    def kernels(self, signature: str, target: str) -> tuple[Kernel, ...]:
        """The kernels of `signature` for `target` (`cuda` or `cpu`): its own folder first, then what others serve it too.

        Raises:
            KernelSourceError: with `strict`, for a file that does not parse.
        """
        paths = (path for path in self._paths(signature, f"*{SUFFIX[target]}") if signature in self._implements(path))
        return tuple(kernel for kernel in map(self._kernel, paths) if kernel is not None)

    def _paths(self, signature: str, pattern: str) -> list[Path]:
        """Files of kernels, the signature's own folder first."""
        home = _plain(signature)
        return sorted(self.root.glob(f"*/{pattern}"), key=lambda path: (path.parent.name != home, path))

    def _implements(self, path: Path) -> tuple[str, ...]:
        """The signatures of a file, by its header alone: reading whole files is left to those that a graph asks for."""
        stat = path.stat()
        found = _header(str(path), stat.st_mtime_ns, stat.st_size)
        if found is None:
            self._kernel(path)  # says what is wrong
        return found or ()

    def _kernel(self, path: Path) -> Kernel | None:
        stat = path.stat()
        kernel = _parsed(str(path), stat.st_mtime_ns, stat.st_size)
        if not isinstance(kernel, str):
            return kernel
        if self.strict:
            raise KernelSourceError(kernel)
        _warn_once(f"library kernel skipped: {kernel}")
        return None

    def broken(self) -> list[tuple[Path, str]]:
        """Every kernel file that does not parse, and one line about why, by path."""
        paths = sorted(path for suffix in SUFFIX.values() for path in self.root.glob(f"*/*{suffix}"))
        read = ((path, _parsed(str(path), path.stat().st_mtime_ns, path.stat().st_size)) for path in paths)
        return [(path, found) for path, found in read if isinstance(found, str)]

    def record(self, task_key: str, device_kind: str) -> Record | None:
        """The record of exactly this task on this kind of device, or None.

        Raises:
            StoreError: with `strict`, for a record that is damaged or whose kernel was edited since.
        """
        paths = sorted((self.root / RECORDS / _plain(device_kind)).glob(f"*/{_plain(task_key)}.json"))
        return self._record(paths[0]) if paths else None

    def records(self) -> Iterator[Record]:
        """Every readable record, by path."""
        found = (self._record(path) for path in sorted((self.root / RECORDS).glob("*/*/*.json")))
        return (record for record in found if record is not None)

    def _record(self, path: Path) -> Record | None:
        try:
            return self._read_record(path)
        except (StoreError, OSError, ValueError, KeyError, TypeError) as error:
            message = f"library record {path} does not count: {error or type(error).__name__}"
            if self.strict:
                raise StoreError(message) from error
            log.warning("%s", message)
            return None

    def _read_record(self, path: Path) -> Record:
        plain = json.loads(path.read_text())
        if not isinstance(plain, dict) or not {"task", "kernel_name", "kernel_sha256"} <= set(plain):
            raise SchemaError("it names no task, kernel_name and kernel_sha256")
        kernel = self._kernel_path(plain["task"]["signature"], plain["kernel_name"], plain["task"]["device"])
        text = kernel.read_text()
        if _sha256(text) != plain.pop("kernel_sha256"):
            raise SchemaError(f"{kernel.name} was edited after this evidence was taken; evaluate it again and add the new record")
        record = Record.from_json({**plain, "kernel_text": text})
        if record.task.key != path.stem:
            raise SchemaError(f"its task has key {record.task.key}, its file name says {path.stem}")
        return record

    def _kernel_path(self, signature: str, name: str, device: str) -> Path:
        """The file of a record's kernel: in the signature's own folder, else in that of another signature that it serves too."""
        home = self.root / _plain(signature) / (_plain(name) + SUFFIX[device])
        if home.exists():
            return home
        others = self._paths(signature, _plain(name) + SUFFIX[device])
        return next((path for path in others if signature in self._implements(path)), home)

    @property
    def digest(self) -> str:
        """20 hex digits over the content of every kernel and record. Files are read again only after one of them changed."""
        return _digest(str(self.root), tuple(self._stamps()))

    def _stamps(self) -> Iterator[tuple[str, int, int]]:
        patterns = [f"*/*{suffix}" for suffix in SUFFIX.values()] + [f"{RECORDS}/*/*/*.json"]
        for path in sorted(path for pattern in patterns for path in self.root.glob(pattern)):
            stat = path.stat()
            yield path.relative_to(self.root).as_posix(), stat.st_mtime_ns, stat.st_size

    def add(self, record: Record, replace: bool = False) -> Path:
        """Write an accepted kernel and its record; returns the record's path.

        Args:
            record: Its evaluation must be CORRECT or TIMED.
            replace: Overwrite a kernel of the same name with another text, which retires that kernel's other records.

        Raises:
            StoreError: for an evaluation that did not accept the kernel, or a name that another kernel has.
            KernelSourceError: for a kernel that does not parse.
        """
        from torch_llmkernels.kernels.source import parse_kernel

        task, name = record.task, record.kernel_name
        if not record.evaluation.status.is_correct:
            raise StoreError(f"kernel {name} was not accepted ({record.evaluation.status}); a library holds correct kernels only")
        home = parse_kernel(record.kernel_text, name).implements[0]
        kernel = self.root / _plain(home) / (_plain(name) + SUFFIX[task.device])
        if kernel.exists() and kernel.read_text() != record.kernel_text and not replace:
            raise StoreError(f"{kernel} exists with another text; rename the new kernel or pass replace=True")
        plain: dict[str, Any] = {**record.to_json(), "kernel_sha256": _sha256(record.kernel_text)}
        del plain["kernel_text"]
        path = self.root / RECORDS / _plain(record.device_kind) / _plain(task.signature) / f"{task.key}.json"
        write_atomically(kernel, record.kernel_text)
        write_atomically(path, json.dumps(plain, indent=1, sort_keys=True) + "\n")
        return path


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write `path` (and its folders) so that another process sees the old content or the new, never a part of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        temporary.write_bytes(content.encode() if isinstance(content, str) else content)
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # it is there only if something failed


def _plain(name: str) -> str:
    """`name` if it can be one component of a path and of a glob pattern.

    Raises:
        StoreError: otherwise.
    """
    if not _PLAIN_NAME.fullmatch(name):
        raise StoreError(f"{name!r} cannot name a file of a library (letters, digits and _ . + - only)")
    return name


@functools.cache
def _warn_once(message: str) -> None:
    """Once in a process: a library is asked for every region of every graph."""
    log.warning("%s", message)


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


@functools.lru_cache(maxsize=1024)
def _header(path: str, _mtime_ns: int, _size: int) -> tuple[str, ...] | None:
    """The signatures that a file's header names, None if it cannot be read; remembered until the file changes."""
    from torch_llmkernels.kernels.source import implements

    try:
        return implements(Path(path).read_text())
    except (LLMKernelsError, UnicodeDecodeError):
        return None


@functools.lru_cache(maxsize=1024)
def _parsed(path: str, _mtime_ns: int, _size: int) -> Kernel | str:
    """The kernel in a file, or one line about why it has none; remembered until the file changes."""
    from torch_llmkernels.kernels.source import parse_kernel

    try:
        return parse_kernel(Path(path).read_text(), Path(path).stem)
    except (LLMKernelsError, UnicodeDecodeError) as error:
        return f"{path}: {error}"


@functools.lru_cache(maxsize=16)
def _digest(root: str, stamps: tuple[tuple[str, int, int], ...]) -> str:
    whole = hashlib.sha256()
    for name, _, _ in stamps:
        content = (Path(root) / name).read_bytes()
        whole.update(f"{name} {len(content)}\n".encode())
        whole.update(content)
    return whole.hexdigest()[:20]
