"""Bytes on disk: diskcache without its pickle path, in a directory that only this user can write.

diskcache pickles whatever is not a plain value and unpickles whatever a row claims to be pickled (CVE-2025-69872), so a changed
row could run code. Here a row is raw bytes or it is refused.
"""

from __future__ import annotations

import atexit
import contextlib
import datetime
import logging
import os
import re
import shutil
import sqlite3
import stat
import tempfile
import time
from pathlib import Path
from typing import Any

import diskcache
from diskcache.core import MODE_BINARY, MODE_RAW
from filelock import FileLock

from torch_llmkernels.errors import StoreError

log = logging.getLogger("torch_llmkernels.cache")

DATABASE = "cache.db"
_VALUE_FILE = re.compile(r"[0-9a-f]{2}/[0-9a-f]{2}/[0-9a-f]{28}\.val")
_BUSY_SECONDS = 30.0  # how long a write waits for another process's transaction, which are all short


class NotBytes(Exception):
    """A row that this package did not write: a pickle, text, or a value file outside the store."""


class BytesDisk(diskcache.Disk):
    """`str` keys and `bytes` values; every other kind of row is refused without looking into it."""

    def __init__(self, directory: str, min_file_size: int = 0, **_ignored: Any) -> None:
        super().__init__(directory, min_file_size=min_file_size)

    def put(self, key: Any) -> tuple[str, bool]:
        """The database form of a key.

        Raises:
            TypeError: for anything but a str.
        """
        if type(key) is not str:
            raise TypeError(f"store keys are str, not {type(key).__name__}")
        return key, True

    def get(self, key: Any, raw: Any) -> str | None:
        """The key of a row, or None for a row that this package did not write."""
        return key if raw == 1 and type(key) is str else None

    def store(self, value: Any, read: bool, key: Any = diskcache.UNKNOWN) -> tuple[int, int, str | None, Any]:
        """The database form of a value.

        Raises:
            TypeError: for anything but bytes.
        """
        if type(value) is not bytes or read:
            raise TypeError(f"store values are bytes, not {type(value).__name__}")
        return super().store(value, read, key=key)

    def fetch(self, mode: int, filename: str | None, value: Any, read: bool) -> bytes:
        """The value of a row.

        Raises:
            NotBytes: for a row that this package did not write.
            OSError: if its file is gone.
        """
        if mode == MODE_RAW and type(value) is bytes:
            return value
        if mode == MODE_BINARY and _is_value_file(filename):
            return (Path(self._directory) / str(filename)).read_bytes()
        raise NotBytes(f"the row is not raw bytes (diskcache mode {mode!r})")

    def remove(self, file_path: str) -> None:
        """Delete a value file; a path that this package cannot have written is left alone."""
        if _is_value_file(file_path):
            super().remove(file_path)


def _is_value_file(filename: Any) -> bool:
    return isinstance(filename, str) and _VALUE_FILE.fullmatch(filename) is not None


def private_directory(directory: Path) -> bool:
    """Make `directory` (mode 0700) or check that it is a directory of this user that nobody else may write.

    Returns:
        Whether it can be written. One that cannot be (a read-only mount, mode 0500) may also be root's, and readable by all.

    Raises:
        StoreError: if its content is not to be trusted, or it cannot be made.
    """
    try:
        if not os.path.lexists(directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                directory.mkdir(mode=0o700)
        found = directory.lstat()
        writable = found.st_mode & 0o700 == 0o700 and os.access(directory, os.W_OK)
        if writable and found.st_uid == os.geteuid() and stat.S_ISDIR(found.st_mode) and _is_fresh(directory, found.st_mode):
            directory.chmod(0o700)
            found = directory.lstat()
    except OSError as error:
        raise StoreError(_advice(directory, f"cannot be created: {error.strerror or error}")) from error
    if problem := _problem(directory, found, writable):
        raise StoreError(_advice(directory, problem))
    return writable


def _is_fresh(directory: Path, mode: int) -> bool:
    """An empty directory that others can read but not write, as a plain mkdir makes it: safe to take over."""
    return mode & 0o077 != 0 and mode & 0o022 == 0 and not any(directory.iterdir())


def _problem(directory: Path, found: os.stat_result, writable: bool) -> str | None:
    if stat.S_ISLNK(found.st_mode):
        return f"is a symbolic link; name its target {os.path.realpath(directory)} instead"
    if not stat.S_ISDIR(found.st_mode):
        return "is not a directory"
    if found.st_uid != os.geteuid() and (writable or found.st_uid != 0):
        return f"belongs to user {found.st_uid}, and kernels in it would run as user {os.geteuid()}"
    if found.st_mode & (0o077 if writable else 0o022):
        return f"is open to other users (mode {stat.S_IMODE(found.st_mode):04o}); run: chmod 700 {directory}"
    return None


_copies: dict[tuple[Path, int, int], Path] = {}


def private_copy(directory: Path) -> Path:
    """A copy of a read-only store that this process may write, made once and removed at exit.

    SQLite and the locks need a directory that can be written. Only files of this user or root that nobody else may write are
    taken; the check is of the file that is read, not of its name.

    Raises:
        StoreError: if there is nothing to copy, or it cannot be read or trusted.
    """
    try:
        source = (directory / DATABASE).stat()
        name = directory, source.st_ino, source.st_mtime_ns
        if name not in _copies or not (_copies[name] / DATABASE).exists():
            _copies[name] = _copied(directory)
            log.info("store %s is read-only: a private copy of it is used, which is gone when the process ends", directory)
        return _copies[name]
    except FileNotFoundError as error:
        mode = stat.S_IMODE(directory.stat().st_mode)
        remedy = f"run: chmod 700 {directory}" if mode & 0o700 != 0o700 else "fill it where it can be written"
        raise StoreError(_advice(directory, f"is read-only (mode {mode:04o}) and empty; {remedy}")) from error
    except OSError as error:
        raise StoreError(_advice(directory, f"is read-only and cannot be copied: {error}")) from error


def _copied(directory: Path) -> Path:
    copy, owner = Path(tempfile.mkdtemp(prefix="llmk-store-")), os.getpid()
    atexit.register(lambda: shutil.rmtree(copy, ignore_errors=True) if os.getpid() == owner else None)
    values = [path.relative_to(directory) for path in directory.glob("??/??/*.val")]
    for name in (Path(DATABASE), *filter(lambda name: _is_value_file(str(name)), values)):
        (copy / name).parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        _copy_trusted(directory / name, copy / name)
    journal = Path(f"{DATABASE}-journal")  # of a transaction that was interrupted
    if (directory / journal).exists():
        _copy_trusted(directory / journal, copy / journal)
    return copy


def _copy_trusted(path: Path, to: Path) -> None:
    with open(os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK), "rb") as file:
        found = os.fstat(file.fileno())
        if not stat.S_ISREG(found.st_mode) or found.st_uid not in (0, os.geteuid()) or found.st_mode & 0o022:
            raise PermissionError(f"{path} is not a file of user {os.geteuid()} or root that nobody else may write")
        with open(os.open(to, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as copy:
            shutil.copyfileobj(file, copy)


def _advice(directory: Path, problem: str) -> str:
    return f"store directory {directory} {problem}. Or set LLMKERNELS_CACHE_DIR to a directory of your own"


def open_database(directory: Path) -> diskcache.Cache:
    """The database in a checked `directory`; a damaged one is moved aside, never deleted, and a new one is started.

    Raises:
        StoreError: if it can be neither opened nor moved.
    """
    try:
        return _open(directory)
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # busy, read-only, disk full: not damage
            raise StoreError(_advice(directory, f"cannot be opened: {error}")) from error
    except OSError as error:
        raise StoreError(_advice(directory, f"cannot be opened: {error}")) from error
    return replace_damaged(directory)


def _open(directory: Path) -> diskcache.Cache:
    """Open the database, again while others write: some statements of diskcache's own set-up do not wait for them."""
    deadline = time.monotonic() + _BUSY_SECONDS
    while True:
        try:
            return _open_now(directory)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _open_now(directory: Path) -> diskcache.Cache:
    return diskcache.Cache(
        str(directory), timeout=_BUSY_SECONDS, disk=BytesDisk, eviction_policy="none", cull_limit=0, statistics=0, tag_index=0,
        # home directories are often on NFS, where a write-ahead log and a memory map do not work between machines
        sqlite_journal_mode="delete", sqlite_synchronous=2, sqlite_mmap_size=0,
    )  # fmt: skip


def replace_damaged(directory: Path) -> diskcache.Cache:
    """Move a damaged database aside and open a new one; if another process has done so meanwhile, open that one.

    Raises:
        StoreError: if the file cannot be moved.
    """
    try:
        with file_lock(directory, "replace-damaged"):
            if _is_sound(directory):
                return _open(directory)
            aside = _move_aside(directory)
            log.warning("store %s is damaged: moved its database to %s and started a new one; kernels verified before will be "
                        "verified again", directory, aside)  # fmt: skip
            return _open(directory)
    except (OSError, sqlite3.Error) as error:
        raise StoreError(_advice(directory, f"is damaged and cannot be replaced: {error}")) from error


def _is_sound(directory: Path) -> bool:
    try:
        with contextlib.closing(sqlite3.connect(directory / DATABASE, timeout=_BUSY_SECONDS)) as connection:
            return connection.execute("PRAGMA quick_check").fetchone() == ("ok",)
    except sqlite3.OperationalError:
        raise  # busy or unreadable is not damage, and must not move a good database aside
    except sqlite3.DatabaseError:
        return False


def _move_aside(directory: Path) -> Path:
    stamp = datetime.datetime.now().strftime("%Y%m%d-%H%M%S-%f")
    aside = directory / f"{DATABASE}.damaged-{stamp}"
    for suffix in ("", "-wal", "-shm"):
        part = directory / (DATABASE + suffix)
        if part.exists():
            part.rename(str(aside) + suffix)
    return aside


def file_lock(directory: Path, name: str) -> FileLock:
    """The inter-process lock called `name` (letters, digits, dashes) of a store.

    `fallback_to_soft=False`: a lock file without `flock` behind it would stay for ever when its process is killed.
    """
    locks = directory / "locks"
    locks.mkdir(mode=0o700, exist_ok=True)
    return FileLock(locks / f"{name}.lock", mode=0o600, fallback_to_soft=False)
