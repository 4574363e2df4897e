"""A search that `torch.compile` starts: in this process within a budget, or behind it in a process that ends with this one.

Whoever holds the task's search lock searches; every other process and rank goes on with Inductor. The run's folder lies in the
store's directory, so a search that was interrupted goes on where it was at the next miss.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch_llmkernels import settings as knobs
from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.store import BaseStore, open_store
from torch_llmkernels.errors import SearchError
from torch_llmkernels.evaluation import Record
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.search import budget, journal, progress
from torch_llmkernels.search.commands import bank
from torch_llmkernels.search.engine import run_search
from torch_llmkernels.search.llm import provider_for
from torch_llmkernels.search.tree import Tree
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task

log = logging.getLogger("torch_llmkernels.search")

_behind: dict[str, subprocess.Popen[bytes]] = {}


def search(task: Task, facts: DeviceFacts, key: RecordKey, store: BaseStore, settings: Settings) -> Record | None:
    """The record that a search for `task` found, or None; with `on_miss="background"` always None: the store learns of it later.

    Args:
        task: What no kernel wins.
        facts: The device.
        key: The task's key in the store.
        store: Its directory holds the run; a store without one cannot search.
        settings: Provider, preset and budgets.

    Raises:
        SettingsError: without a usable provider.
    """
    if store.directory is None:
        log.warning("%s %s: no search without a store directory", task.signature, task.key)
        return None
    folder = _folder(task, store.directory)
    provider_for(settings.provider, folder, models=settings.model, base_url=settings.base_url, api_key_env=settings.api_key_env)
    if settings.on_miss == "background":
        _start_behind(task, settings)
        return None
    with store.lock(f"search/{key.text}") as mine:
        if not mine:
            log.info("%s %s: another process is searching", task.signature, task.key)
            return None
        return _search_now(task, facts, folder, settings)


@dataclasses.dataclass(frozen=True)
class Standing:
    """How far the search for a task got, over all the processes that ran it.

    Attributes:
        tokens: In and out, paid so far.
        seconds: That it ran.
        stop: Why it stopped; empty while it is open, and if there was none.
    """

    tokens: int = 0
    seconds: float = 0.0
    stop: str = ""


def standing(task: Task, store: BaseStore) -> Standing:
    """What the journal of the search for `task` says.

    Raises:
        SchemaError: if it is damaged.
    """
    path = _folder(task, store.directory) / "journal.jsonl" if store.directory else None
    if path is None or not path.exists():
        return Standing()
    events = journal.read(path)
    tree = Tree(budget.SearchSettings(), events)
    return Standing(tree.spent.tokens, events[-1]["clock"] if events else 0.0, tree.stop)


def _folder(task: Task, directory: Path) -> Path:
    return directory / "searches" / f"{task.signature}-{task.key}"


def _search_now(task: Task, facts: DeviceFacts, folder: Path, settings: Settings) -> Record | None:
    from torch_llmkernels.evaluate.pool import LocalPool
    from torch_llmkernels.evaluate.roofline import floor, measure_ceilings

    index = target_for(task.device).current()
    ceilings = measure_ceilings(task.device, index)
    limits = budget.preset(
        settings.preset, max_tokens=settings.search_budget_tokens, max_seconds=settings.search_budget_s
    )  # fmt: skip
    provider = provider_for(
        settings.provider, folder, models=settings.model, base_url=settings.base_url, api_key_env=settings.api_key_env,
        wait_s=settings.search_budget_s, concurrency=limits.concurrency,
    )  # fmt: skip
    with LocalPool((index,), settings) as pool:
        found = run_search(
            task, limits, provider=provider, pool=pool, facts=facts.to_json(), directory=folder, ceilings=ceilings.to_json(),
            floor=dataclasses.asdict(floor(task, facts, ceilings)), bank=bank(task), progress=_line(task),
        )  # fmt: skip
    log.info("%s %s: %s (%d tokens)", task.signature, task.key, found.reason, found.spent.tokens)
    return found.record


def _line(task: Task) -> Callable[[Any], None]:
    """Progress for a user who waits in front of `torch.compile`: one line, rewritten where the terminal can."""
    terminal = sys.stderr.isatty()

    def show(engine: Any) -> None:
        text = f"searching {task.signature}: {progress.line(engine.run)}"
        if terminal:
            print(f"\r\x1b[K{text}", end="", file=sys.stderr, flush=True)
        else:
            log.info("%s", text)

    return show


def _start_behind(task: Task, settings: Settings) -> None:
    """Search in a child that ends when this process does: its standard input closes then."""
    child = _behind.get(task.key)
    if child is not None and child.poll() is None:
        return
    import torch

    environment = {k: v for k, v in os.environ.items() if not k.startswith("LLMKERNELS_")}
    child = subprocess.Popen(
        [sys.executable, "-m", "torch_llmkernels.search.on_miss"],
        stdin=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        env=environment,
    )
    wanted = {
        "task": task.to_json(),
        "settings": dataclasses.asdict(dataclasses.replace(settings, on_miss="search")),
        "device": target_for(task.device).current(),
        "threads": torch.get_num_threads(),
    }
    assert child.stdin is not None
    child.stdin.write(json.dumps(wanted).encode() + b"\n")
    child.stdin.flush()
    _behind[task.key] = child
    log.info("%s %s: searching behind, process %d", task.signature, task.key, child.pid)


def main() -> None:
    """The child: on the first line of standard input one task, its settings, its device and number of threads.

    The end of input ends the process.
    """
    import torch

    wanted = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with_parent, daemon=True).start()
    settings = Settings().updated(wanted["settings"])
    task = Task.from_json(wanted["task"])
    torch.set_num_threads(wanted["threads"])
    if task.device == "cuda":
        torch.cuda.set_device(wanted["device"])
    with knobs.override(**wanted["settings"]):
        found = remember_winner(task, settings)
    log.info("%s", found)


def remember_winner(task: Task, settings: Settings) -> str:
    """Search `task` here and put the winner into the store; what became of it, in one line.

    Raises:
        SearchError: if the task's device is not here.
    """
    target = target_for(task.device)
    if reason := target.unavailable():
        raise SearchError(f"{task.signature} cannot be searched here: {reason}")
    facts, store = target.facts(), open_store(settings)
    key = RecordKey.of(task, facts)
    record = search(task, facts, key, store, settings)
    if record is None:
        return "no winner"
    store.put_winner(key, record)
    return f"winner {record.kernel_name}"


def _end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


if __name__ == "__main__":
    main()
