"""A search's folder: `run.json` (task, device, numbers), `journal.jsonl`, `exchange/`, `winner.json`, `report.html`.

Nothing in it is bound to a machine or a path, so it can be copied to where the device is and back. It never holds a key.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch_llmkernels.errors import SchemaError, SearchError
from torch_llmkernels.search.budget import SearchSettings
from torch_llmkernels.search.journal import SCHEMA, Journal
from torch_llmkernels.search.llm import write_atomic
from torch_llmkernels.search.tree import Tree
from torch_llmkernels.task import Task


@dataclasses.dataclass(frozen=True)
class Goal:
    """What is searched, and what is known before the first round. All of it goes into prompts.

    Attributes:
        task: What the kernel must compute.
        settings: The search's numbers.
        facts: `kernels.device.DeviceFacts` of the device, as plain JSON.
        ceilings: `evaluate.roofline` ceilings measured on it, as plain JSON; empty if they were not.
        floor: `evaluate.roofline.Floor` of the task there, as plain JSON; empty if unknown.
        bank: Accepted kernels of the same signature, which compete from the start: name and source of each.
        neighbours: Accepted kernels of neighbouring signatures, which are shown for their techniques: name and source of each.
        preset: Name of the preset the settings came from, for people.
        provider: How the run was started (`exchange`, `openai`, `replay:...`), for going on in the same way.
        models: For `openai`: the models with weights and endpoints, no keys.
        effort: For `openai`: the reasoning effort, if any.
        notes: What the person who started the search adds to the task, such as other shapes that the kernel should serve.
    """

    task: Task
    settings: SearchSettings
    facts: Mapping[str, Any]
    ceilings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    floor: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    bank: tuple[tuple[str, str], ...] = ()
    neighbours: tuple[tuple[str, str], ...] = ()
    preset: str = ""
    provider: str = ""
    models: str = ""
    effort: str = ""
    notes: str = ""

    def to_json(self) -> dict[str, Any]:
        """Plain JSON; `from_json` reads it back."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        return {"schema": SCHEMA, **plain, "task": self.task.to_json(), "settings": self.settings.to_json(),
                "bank": [list(row) for row in self.bank],
                "neighbours": [list(row) for row in self.neighbours]}  # fmt: skip

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Goal:
        """The goal `to_json` wrote.

        Raises:
            SchemaError: for another schema version or missing fields.
        """
        if plain.get("schema") != SCHEMA:
            raise SchemaError(
                f"run schema {plain.get('schema')!r}, this release reads {SCHEMA}; use the release that wrote the run"
            )
        try:
            values = {f.name: plain[f.name] for f in dataclasses.fields(cls) if f.name != "notes"}
        except KeyError as error:
            raise SchemaError(f"run.json is damaged: no field {error}") from error
        values["notes"] = plain.get("notes", "")  # runs of before it existed have none
        values["task"] = Task.from_json(plain["task"])
        values["settings"] = SearchSettings().replaced(plain["settings"])
        for name in ("bank", "neighbours"):
            values[name] = tuple((title, text) for title, text in plain[name])
        return cls(**values)

    @property
    def floor_ms(self) -> float:
        """The roofline floor in milliseconds; 0 if unknown."""
        return float(self.floor.get("ms") or 0.0)


class Run:
    """A search's folder, opened by one process.

    Args:
        directory: The folder.
        goal: What is searched; None reads it from `run.json`.

    Raises:
        SearchError: if the folder holds no run, or holds another one than `goal`.
        SchemaError: if the run is damaged or another release's.
    """

    def __init__(self, directory: Path, goal: Goal | None = None) -> None:
        self.directory = directory
        self.goal = self._agree(goal)
        self.journal = Journal(directory / "journal.jsonl")
        self.tree = Tree(self.goal.settings, self.journal.events)
        self.goal = dataclasses.replace(self.goal, settings=self.tree.settings)
        if not self.journal.events:
            self.record([{"event": "start", "schema": SCHEMA, "task": self.goal.task.key}])

    def _agree(self, goal: Goal | None) -> Goal:
        path = self.directory / "run.json"
        if path.exists():
            try:
                known = Goal.from_json(json.loads(path.read_text()))
            except ValueError as error:
                raise SchemaError(f"{path} is not JSON ({error}); restore it from a copy of the run") from None
            if goal is not None and goal.task.key != known.task.key:
                raise SearchError(f"{self.directory} holds a search for another task ({known.task.signature} {known.task.key})")
            return known
        if goal is None:
            raise SearchError(f"{self.directory} holds no search (no run.json); make one with `llmkernels search start`")
        self.directory.mkdir(parents=True, exist_ok=True)
        write_atomic(path, json.dumps(goal.to_json(), indent=1))
        return goal

    def record(self, events: list[dict[str, Any]]) -> None:
        """Journal events, then let them take effect."""
        self.tree.apply(self.journal.append(events))

    @property
    def exchange(self) -> Path | None:
        """The folder of prompts and replies, if the run was started with files as its model."""
        kind, _, folder = self.goal.provider.partition(":")
        if kind != "exchange":
            return None
        return Path(folder).expanduser() if folder else self.directory / "exchange"

    @property
    def name(self) -> str:
        """The folder's name."""
        return self.directory.resolve().name
