"""What a search shows in the terminal while it runs, and the one-line state of a run."""

from __future__ import annotations

import contextlib
import sys
from collections import Counter
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from torch_llmkernels.search.engine import Engine, Progress
from torch_llmkernels.search.llm import ExchangeProvider
from torch_llmkernels.search.run import Run

if TYPE_CHECKING:
    from rich.table import Table


def summary(run: Run) -> dict[str, Any]:
    """A run's state as plain JSON: round, candidates by status, best, spend, what is waited for, and the end.

    `waiting_for_replies` counts prompts that can be answered, `prompts` names them; `not_issued` counts those that
    `withheld` says why were not written.
    """
    tree, settings = run.tree, run.goal.settings
    engine = Engine(run, provider=ExchangeProvider(run.exchange) if run.exchange else None)
    waiting = [prompt.id for prompt in (engine.open_prompts() if run.exchange else engine.wanted())]
    not_issued, withheld = engine.withheld() if run.exchange else (0, "")
    best, floor = tree.best(), tree.floor_ms(run.goal.floor_ms)
    statuses = Counter(
        str(c.evaluation.status) if c.evaluation else "duplicate" if c.duplicate_of else "waiting"
        for c in tree.candidates.values()
    )
    return {
        "task": f"{run.goal.task.signature} {run.goal.task.key}",
        "round": len(tree.rounds),
        "rounds": settings.rounds,
        "ideas": len(tree.ideas),
        "candidates": dict(statuses),
        "best_ms": best.time_ms if best else None,
        "best_speedup": best.evaluation.speedup if best and best.evaluation else None,
        "best_of_floor": floor / best.time_ms if best and floor else None,
        "requests": tree.spent.requests,
        "tokens": tree.spent.tokens,
        "max_tokens": settings.max_tokens,
        "cost": tree.spent.cost,
        "seconds": round(run.journal.clock(), 1),
        "max_seconds": settings.max_seconds,
        "waiting_for_replies": len(waiting),
        "prompts": waiting,
        "not_issued": not_issued,
        "withheld": withheld,
        "waiting_for_evaluation": 0 if tree.ended else len(engine.waiting()),
        "stopped": tree.stop,
        "ended": tree.ended,
        "winner": tree.winner,
    }


def line(run: Run) -> str:
    """The state in one line, for logs and terminals without cursor control."""
    state = summary(run)
    best = "nothing correct yet"
    if state["best_ms"]:
        floor = f", {state['best_of_floor']:.0%} of floor" if state["best_of_floor"] else ""
        best = f"best {state['best_speedup']:.2f}x ({state['best_ms']:.4g} ms then{floor})"
    counts = " ".join(f"{name} {count}" for name, count in sorted(state["candidates"].items())) or "no candidates"
    return f"round {state['round']}/{state['rounds']} · {counts} · {best} · {state['tokens'] / 1e3:.0f} k tokens"


@contextlib.contextmanager
def shown(quiet: bool = False) -> Iterator[Progress]:
    """A `progress` for an engine: a live table on a terminal, a line per change elsewhere, nothing if `quiet`."""
    if quiet:
        yield lambda engine: None
    elif sys.stderr.isatty():
        yield from _live()
    else:
        yield _Lines()


class _Lines:
    def __init__(self) -> None:
        self.last = ""

    def __call__(self, engine: Engine) -> None:
        now = line(engine.run)
        if now != self.last:
            print(now, file=sys.stderr)
        self.last = now


def _live() -> Iterator[Progress]:
    from rich.console import Console
    from rich.live import Live

    with Live(console=Console(stderr=True), refresh_per_second=4) as live:
        yield lambda engine: live.update(table(engine.run))


def table(run: Run) -> Table:
    """The state as a small table."""
    from rich.table import Table

    state = summary(run)
    grid = Table.grid(padding=(0, 2))
    counts = ", ".join(f"{count} {name.replace('_', ' ')}" for name, count in sorted(state["candidates"].items())) or "none yet"
    best = "none yet"
    if state["best_ms"]:
        best = f"{state['best_speedup']:.2f}x the best baseline ({state['best_ms']:.4g} ms then)"
        best += f", {state['best_of_floor']:.0%} of the floor" if state["best_of_floor"] else ""
    left = f"{max(0.0, state['max_seconds'] - state['seconds']):.0f} s left" if state["max_seconds"] else "no time limit"
    limit = f" of {state['max_tokens'] / 1e3:.0f} k" if state["max_tokens"] else ""
    grid.add_row("round", f"{state['round']} of {state['rounds']}, {state['ideas']} ideas")
    grid.add_row("candidates", counts)
    grid.add_row("best", best)
    grid.add_row("tokens", f"{state['tokens'] / 1e3:.0f} k{limit}" + (f", cost {state['cost']:.2f}" if state["cost"] else ""))
    grid.add_row("time", f"{state['seconds']:.0f} s, {left}")
    if state["stopped"]:
        grid.add_row("stopped", state["stopped"])
    return grid
