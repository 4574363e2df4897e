"""Branching against sequential search at equal token budgets: the best speedup that each had reached, task by task.

From recorded journals (runs of one task with different presets), or from searches run now with a provider:

    python benchmarks/branching.py [RUN ...]                                   # default: every folder of cache/journals
    python benchmarks/branching.py --docs                                      # and write the table into docs/search.md
    python benchmarks/branching.py --task TASK.json --provider openai --model MODEL --tokens 300000 [--folder searches/branching]

A kernel counts from the moment its reply was paid for. The table says what happened in these runs; one run of each is one sample.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table
from trajectories import ROOT, journal_of, read_run, recorded

from torch_llmkernels.evaluate.pool import LocalPool
from torch_llmkernels.evaluate.roofline import floor, measure_ceilings
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.search import progress
from torch_llmkernels.search.budget import preset
from torch_llmkernels.search.engine import run_search
from torch_llmkernels.search.llm import provider_for
from torch_llmkernels.search.run import Goal
from torch_llmkernels.search.tree import Tree
from torch_llmkernels.task import Task

SHARES = (0.25, 0.5, 0.75, 1.0)
FOIL = "sequential"


def curve(tree: Tree, events: Iterable[Mapping[str, Any]]) -> list[tuple[int, float]]:
    """(tokens spent when a kernel's reply had arrived, the best speedup over the best baseline so far), in order of spend."""
    spent, paid = 0, {"": 0}
    for event in events:
        if event["event"] == "reply" and event["id"] not in paid:
            spent += event["input_tokens"] + event["output_tokens"]
            paid[event["id"]] = spent
    found = [(paid[c.prompt], c.evaluation.speedup) for c in tree.ranking() if c.evaluation and c.prompt in paid]
    points, best = [], 0.0
    for tokens, speedup in sorted(found, key=lambda point: point[0]):
        best = max(best, speedup or 0.0)
        points.append((tokens, best))
    return points


def reached(points: Sequence[tuple[int, float]], tokens: float) -> float | None:
    """The best speedup within a budget, None if nothing was correct by then."""
    return max((speedup for spent, speedup in points if spent <= tokens), default=None)


def compare(runs: Sequence[tuple[Goal, Tree, list[Mapping[str, Any]]]]) -> list[dict[str, Any]]:
    """A row per run of every task that was searched both ways; the budget is the smallest spend among the task's runs."""
    tasks: dict[str, list[tuple[Goal, Tree, list[Mapping[str, Any]]]]] = defaultdict(list)
    for run in runs:
        tasks[run[0].task.key].append(run)
    rows = []
    for group in tasks.values():
        if len({goal.preset == FOIL for goal, _, _ in group}) < 2:
            continue
        budget = min(tree.spent.tokens for _, tree, _ in group)
        for goal, tree, events in sorted(group, key=lambda run: run[0].preset == FOIL):
            points = curve(tree, events)
            best = [reached(points, budget * share) for share in SHARES]
            rows.append({"task": goal.task.signature, "device": goal.facts.get("kind", ""), "preset": goal.preset,
                         "tokens": budget, "best": best, "full": checked(tree), "candidates": len(tree.candidates)})  # fmt: skip
    return rows


def checked(tree: Tree) -> float | None:
    """The winner's speedup in its full check, a second measurement of what was the best of many."""
    winner = tree.candidates.get(tree.winner)
    return winner.evaluations["full"].speedup if winner else None


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """Best speedup over the best baseline at shares of the common budget."""
    grid = Table(*COLUMNS, box=box.SIMPLE)
    for row in rows:
        grid.add_row(*cells(row))
    return grid


COLUMNS = ("task", "device", "search", "tokens", *(f"at {share:.0%}" for share in SHARES), "full check", "candidates")


def cells(row: Mapping[str, Any]) -> list[str]:
    """One row of the table, as text."""
    speedups = ["-" if value is None else f"{value:.2f}x" for value in (*row["best"], row["full"])]
    search = FOIL if row["preset"] == FOIL else f"branching ({row['preset']})"
    return [row["task"], row["device"], search, f"{row['tokens'] / 1e3:.0f} k", *speedups, str(row["candidates"])]


def write(rows: Sequence[Mapping[str, Any]], page: Path) -> None:
    """The table in Markdown, between the page's `<!-- begin:branching -->` and `<!-- end:branching -->`."""
    lines = ["| " + " | ".join(line) + " |" for line in (COLUMNS, ["---"] * len(COLUMNS), *(cells(row) for row in rows))]
    place = re.compile(r"(<!-- begin:branching -->\n).*?(<!-- end:branching -->)", re.DOTALL)
    page.write_text(place.sub(lambda match: "\n".join([match[1].rstrip(), *lines, match[2]]), page.read_text()))


def search(task: Task, name: str, args: argparse.Namespace) -> Path:
    """Search a task with a preset, or go on with what a folder holds; the folder."""
    settings = preset(name, max_tokens=args.tokens, max_candidates=0, max_seconds=args.seconds)
    folder = args.folder / f"{task.signature}-{task.key[:8]}-{name}"
    target, ceilings = target_for(task.device), measure_ceilings(task.device)
    folder.mkdir(parents=True, exist_ok=True)
    provider = provider_for(args.provider, folder, models=args.model, wait_s=args.seconds, concurrency=settings.concurrency)
    if not (folder / "run.json").exists():  # the preset's name is what the comparison goes by
        facts, least = target.facts(), floor(task, target.facts(), ceilings)
        goal = Goal(task, settings, facts.to_json(), ceilings.to_json(), dataclasses.asdict(least), preset=name)
        (folder / "run.json").write_text(json.dumps(goal.to_json(), indent=1))
    with LocalPool() as pool, progress.shown() as shown:
        run_search(
            task, settings, provider=provider, pool=pool, facts=target.facts().to_json(), directory=folder,
            ceilings=ceilings.to_json(), progress=shown,
        )  # fmt: skip
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("runs", type=Path, nargs="*", help="folders of searches (default: cache/journals)")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/search.md")
    parser.add_argument("--task", type=Path, action="append", default=[], help="a task's JSON file, to be searched both ways now")
    parser.add_argument("--provider", default="openai", help="who answers, as for `llmkernels search`")
    parser.add_argument("--model", default="", help="for openai, as for `llmkernels search`")
    parser.add_argument("--preset", default="default", help="the branching preset")
    parser.add_argument("--tokens", type=int, default=300_000, help="budget of each search")
    parser.add_argument("--seconds", type=float, default=7200.0, help="most seconds of each search")
    parser.add_argument("--folder", type=Path, default=Path("searches/branching"), help="where searches that run now are kept")
    args = parser.parse_args()
    folders = args.runs or ([] if args.task else recorded(ROOT / "cache" / "journals"))
    for path in args.task:
        plain = json.loads(path.read_text())
        folders += [search(Task.from_json(plain.get("task", plain)), name, args) for name in (args.preset, FOIL)]
    rows = compare([(*read_run(folder), journal_of(folder)) for folder in folders])
    if not rows:
        print(f"no task among {len(folders)} searches was searched both ways (preset {FOIL!r} and another)")
        return
    Console(width=150).print(table(rows))
    if args.docs:
        write(rows, ROOT / "docs" / "search.md")


if __name__ == "__main__":
    main()
