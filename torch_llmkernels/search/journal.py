"""The journal of a search: one JSON object a line, appended and synced before anything acts on it.

The journal is the search's only state: `tree.Tree` is what it says, and whoever opens the folder again goes on from there. A last
line that a killed process left half written is dropped with a warning; damage anywhere else is an error, because something other
than a crash did it.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch_llmkernels.errors import SchemaError

log = logging.getLogger("torch_llmkernels.search")

SCHEMA = 1

Event = dict[str, Any]
"""One line: `event` (its kind), `at` (seconds since the epoch), `clock` (seconds this search has been running), its fields."""


class Journal:
    """An append-only file of events.

    Args:
        path: The file; created by the first append.

    Raises:
        SchemaError: if a line other than the last is damaged.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.events = _repair(path) if path.exists() else []
        self._before = self.events[-1].get("clock", 0.0) if self.events else 0.0
        self._opened = time.monotonic()

    def clock(self) -> float:
        """Seconds this search has been running, over all the processes that ran it."""
        return self._before + time.monotonic() - self._opened

    def append(self, events: Iterable[Event]) -> list[Event]:
        """Write events and sync them to disk in one go.

        Returns:
            The events as written, with `at` and `clock`.
        """
        stamp = {"at": round(time.time(), 3), "clock": round(self.clock(), 3)}
        lines = [{**event, **stamp} for event in events]
        data = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines).encode()
        with open(self.path, "ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        self.events += lines
        return lines

    def merge(self, other: Iterable[Mapping[str, Any]]) -> int:
        """Append the events of a copy of this journal that are not here yet.

        Returns:
            How many there were.
        """
        here = {_identity(event) for event in self.events}
        new = [dict(event) for event in other if _identity(event) not in here]
        self.append(new)
        return len(new)


def read(path: Path) -> list[Event]:
    """The events of a journal, plain or gzipped, without touching the file.

    Raises:
        SchemaError: if a line other than the last is damaged.
    """
    data = path.read_bytes()
    return _parse(gzip.decompress(data) if path.suffix == ".gz" else data, path)[0]


def _repair(path: Path) -> list[Event]:
    """Read for appending: what a torn write left is cut off, so that the next line starts on its own."""
    data = path.read_bytes()
    events, whole = _parse(data, path)
    if whole < len(data):
        with open(path, "r+b") as file:
            file.truncate(whole)
    elif data and not data.endswith(b"\n"):
        with open(path, "ab") as file:
            file.write(b"\n")
    return events


def _parse(data: bytes, path: Path) -> tuple[list[Event], int]:
    """Events, and how many leading bytes hold them whole."""
    events: list[Event] = []
    offset = 0
    lines = [line + b"\n" for line in data.split(b"\n")]
    lines[-1] = lines[-1][:-1]
    lines = [line for line in lines if line]
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
            if not isinstance(event, dict) or "event" not in event:
                raise ValueError("not an event")
        except ValueError as error:
            if number < len(lines):
                raise SchemaError(f"{path}:{number}: damaged journal line ({error}); restore it from a copy of the run") from None
            log.warning(
                "%s:%d: dropped a half-written last line (%d bytes); the search goes on before it", path, number, len(line)
            )
            break
        events.append(event)
        offset += len(line)
    return events, offset


def _identity(event: Mapping[str, Any]) -> str:
    return json.dumps({k: v for k, v in event.items() if k not in ("at", "clock")}, sort_keys=True)
