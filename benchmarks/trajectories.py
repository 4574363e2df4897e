"""Recorded searches: a table of every journal under cache/journals, and their trajectories as docs/trajectories.svg.

A trajectory is the best correct kernel after each round, as the speedup over the best baseline that was timed beside it.

    python benchmarks/trajectories.py [--journals cache/journals] [--svg docs/trajectories.svg]
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from rich import box
from rich.console import Console
from rich.table import Table

from torch_llmkernels.search import journal
from torch_llmkernels.search.run import Goal
from torch_llmkernels.search.tree import Tree

ROOT = Path(__file__).resolve().parents[1]
COLORS = ("#2f6db3", "#b0483c", "#2f7d4f", "#8a5fb0", "#b07a1e", "#3b8f94", "#a14a7d", "#6b6b2f")
WIDTH, LEFT, RIGHT, TOP, ROW, PLOT = 900, 60, 250, 44, 18, 340
TITLE = "Best correct kernel after each round: speedup over the best baseline"
AXIS, TEXT = "#8a8a8a", "#555555"


def read_run(folder: Path) -> tuple[Goal, Tree]:
    """A run's goal and state, from `run.json` and `journal.jsonl`, compressed or not; nothing is written."""
    goal = Goal.from_json(json.loads((folder / "run.json").read_text()))
    return goal, Tree(goal.settings, journal_of(folder))


def journal_of(folder: Path) -> list[journal.Event]:
    """The events of a run, compressed or not."""
    packed = folder / "journal.jsonl.gz"
    return journal.read(packed if packed.exists() else folder / "journal.jsonl")


def recorded(root: Path) -> list[Path]:
    """Folders of runs under `root`, by name; empty if there is none."""
    return sorted(path.parent for path in root.glob("*/run.json")) if root.is_dir() else []


def summary(name: str, goal: Goal, tree: Tree) -> dict[str, Any]:
    """One search in numbers; `speedups` and `of_floor` have an entry per round, None before anything was correct."""
    best = [tree.best(number) for number in range(1, len(tree.rounds) + 1)]
    measured, floor = [c.evaluation if c else None for c in best], tree.floor_ms(goal.floor_ms)
    statuses = Counter(str(c.evaluation.status) for c in tree.candidates.values() if c.evaluation)
    return {
        "run": name, "signature": goal.task.signature, "device": str(goal.facts.get("kind", "")),
        "rounds": len(tree.rounds), "ideas": len(tree.ideas), "candidates": dict(statuses),
        "speedups": [e.speedup if e else None for e in measured],
        "of_floor": [floor / e.time_ms if e and e.time_ms and floor else None for e in measured],
        "requests": tree.spent.requests, "tokens": tree.spent.tokens, "ended": tree.ended or tree.stop or "open",
        "accepted": bool(tree.winner),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]]) -> Table:
    """What a reader wants to know of each search, one a line."""
    best = "best per round / best baseline"
    grid = Table("run", "device", "rounds", "ideas", "candidates", best, "of floor", "tokens", "accepted", box=box.SIMPLE)
    for row in rows:
        counts = ", ".join(f"{count} {status}" for status, count in sorted(row["candidates"].items()))
        grid.add_row(
            row["run"], row["device"], str(row["rounds"]), str(row["ideas"]), counts or "none",
            " ".join(_cell(v, ".2f", "x") for v in row["speedups"]), " ".join(_cell(v, ".0%") for v in row["of_floor"]),
            f"{row['tokens'] / 1e3:.0f} k", "yes" if row["accepted"] else "no",
        )  # fmt: skip
    return grid


def _cell(value: float | None, spec: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{spec}}{unit}"


def _last(row: dict[str, Any]) -> float:
    return float(next(v for v in reversed(row["speedups"]) if v))


def draw(rows: Sequence[dict[str, Any]]) -> str:
    """Speedup over the best baseline after each round, logarithmic, a line per search; the dashed line is the baseline."""
    shown = sorted((row for row in rows if any(row["speedups"])), key=_last, reverse=True)  # the legend in the lines' order
    values = [v for row in shown for v in row["speedups"] if v] + [1.0]
    high, low = math.log2(max(values) * 1.1), math.log2(min(values) / 1.1)
    rounds = max([len(row["speedups"]) for row in shown] + [2])
    height = max(PLOT, len(shown) * ROW) + TOP + 40

    def x(number: int) -> float:
        return LEFT + (WIDTH - LEFT - RIGHT) * (number - 1) / (rounds - 1)

    def y(value: float) -> float:
        return TOP + PLOT * (high - math.log2(value)) / (high - low)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{height}" font-family="sans-serif" font-size="12">',
        f'<text x="8" y="22" font-weight="bold" fill="{TEXT}">{TITLE}</text>',
    ]
    for tick in [v for v in (0.125, 0.25, 0.5, 1, 1.5, 2, 3, 4, 6, 8, 16, 32) if low <= math.log2(v) <= high]:
        dash = ' stroke-dasharray="5 4"' if tick == 1 else ' stroke-opacity="0.3"'
        parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.1f}" y2="{y(tick):.1f}" stroke="{AXIS}"{dash}/>')
        parts.append(f'<text x="{LEFT - 8}" y="{y(tick) + 4:.1f}" text-anchor="end" fill="{TEXT}">{tick:g}x</text>')
    for number in range(1, rounds + 1):
        parts.append(f'<text x="{x(number):.1f}" y="{TOP + PLOT + 22}" text-anchor="middle" fill="{TEXT}">round {number}</text>')
    for place, row in enumerate(shown):
        color, points = COLORS[place % len(COLORS)], [(x(n), y(v)) for n, v in enumerate(row["speedups"], 1) if v]
        line = " ".join(f"{a:.1f},{b:.1f}" for a, b in points)
        parts.append(f'<polyline points="{line}" fill="none" stroke="{color}" stroke-width="2"/>')
        parts += [f'<circle cx="{a:.1f}" cy="{b:.1f}" r="3" fill="{color}"/>' for a, b in points]
        top, label = TOP + 10 + place * ROW, f"{escape(row['run'])} {_last(row):.2f}x"
        parts.append(f'<text x="{WIDTH - RIGHT + 16}" y="{top}" fill="{color}">{label}</text>')
    if not shown:
        parts.append(f'<text x="{LEFT + 20}" y="{TOP + 40}" fill="{TEXT}">no recorded search has a correct kernel</text>')
    return "\n".join([*parts, "</svg>", ""])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journals", type=Path, default=ROOT / "cache" / "journals", help="folder of runs")
    parser.add_argument("--svg", type=Path, default=ROOT / "docs" / "trajectories.svg", help="the plot")
    args = parser.parse_args()
    rows = [summary(folder.name, *read_run(folder)) for folder in recorded(args.journals)]
    if not rows:
        print(f"no recorded searches in {args.journals}")
        return
    Console(width=190).print(table(rows))
    args.svg.write_text(draw(rows))
    print(f"wrote {args.svg}")


if __name__ == "__main__":
    main()
