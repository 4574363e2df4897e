"""A search as one self-contained HTML page, and as training data.

The page shows the task, the best time per round against the baselines and the floor, the tree of ideas and implementations with
what each died of, every source with the difference to its parent, and what was spent. It loads nothing and runs no script;
whatever a model or a user wrote is escaped.
"""

from __future__ import annotations

import difflib
import html
import math
from collections.abc import Iterator
from importlib import resources
from typing import Any

from torch_llmkernels.evaluation import Evaluation
from torch_llmkernels.search.budget import Spend
from torch_llmkernels.search.ideas import FAMILIES
from torch_llmkernels.search.render import known_floor, measurements, speed
from torch_llmkernels.search.run import Run
from torch_llmkernels.search.tree import Candidate, IdeaNode, Prompt, Tree, place

ROLES = ("ideas", "code", "repair")
_POLICY = "default-src 'none'; style-src 'unsafe-inline'"
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 1000, 380, 64, 132, 20, 36


def render_html(run: Run) -> str:
    """The whole page."""
    style = (resources.files("torch_llmkernels.search") / "report.css").read_text(encoding="utf-8")
    title = f"{run.goal.task.signature} on {run.goal.facts.get('name') or run.goal.facts.get('kind', 'an unnamed device')}"
    body = [_header(run, title), _plot(run), _tree(run), _families(run.tree), _spend(run.tree), _task(run)]
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n<title>{_(title)}</title>\n'
        f"<style>\n{style}</style></head>\n"
        f"<body>\n{''.join(body)}</body></html>\n"
    )


def dataset(run: Run) -> Iterator[dict[str, Any]]:
    """One row per implementation: the task, the idea, the code, what it was made from, and how it ended.

    Duplicates and kernels of the bank are left out; replies that held no code have an empty `code`.
    """
    tree = run.tree
    for prompt in sorted(tree.prompts.values(), key=lambda p: place(p.slot)):
        candidate = tree.candidates.get(prompt.candidate)
        node = tree.ideas.get(prompt.idea)
        if node is None or prompt.reply is None or (candidate and candidate.duplicate_of):
            continue
        evaluation = candidate.evaluation if candidate else None
        yield {
            "run": run.name,
            "slot": prompt.slot,
            "role": prompt.role,
            "device": dict(run.goal.facts),
            "task": run.goal.task.to_json(),
            "idea": {"family": node.idea.family, "mechanism": node.idea.mechanism, "expected": node.idea.expected},
            "system": tree.systems[prompt.system],
            "prompt": prompt.text,
            "reply": prompt.reply,
            "parent": tree.candidates[candidate.parent].text if candidate and candidate.parent else "",
            "code": candidate.text if candidate else "",
            "outcome": evaluation.to_json()
            if evaluation
            else {"status": "unusable", "detail": prompt.rejected or "not evaluated"},
            "speedup": evaluation.speedup if evaluation else None,
        }


def _(text: Any) -> str:
    return html.escape(str(text))


def _header(run: Run, title: str) -> str:
    tree, best = run.tree, run.tree.candidates.get(run.tree.winner) or run.tree.best()
    evaluation = (best.evaluations.get("full") or best.evaluation) if best else None
    state = tree.ended or tree.stop or "still open"
    tiles = [
        (
            "no correct kernel" if evaluation is None else f"{evaluation.speedup:.2f}x",
            "winner" if tree.winner else "best so far",
        )
    ]
    if evaluation is not None and evaluation.time_ms:
        tiles += [
            (f"{ms / evaluation.time_ms:.2f}x", f"the speed of {name} ({ms:.4g} ms)") for name, ms in evaluation.baselines_ms
        ]
        tiles.append((f"{evaluation.time_ms:.4g} ms", "beside them"))
        if floor := tree.floor_ms(run.goal.floor_ms):
            tiles.append((f"{floor / evaluation.time_ms:.0%}", f"of the floor ({floor:.4g} ms)"))
    correct = len(tree.ranking())
    tiles += [
        (str(len(tree.rounds)), "rounds"), (str(len(tree.ideas)), "ideas"),
        (str(len(tree.candidates)), f"candidates, {correct} correct"), (f"{tree.spent.tokens / 1e3:.0f} k", "tokens"),
    ]  # fmt: skip
    if tree.spent.cost:
        tiles.append((f"{tree.spent.cost:.2f}", "cost"))
    boxes = "".join(f'<div class="tile"><b>{_(value)}</b><span>{_(name)}</span></div>' for value, name in tiles)
    subtitle = f"Search {run.name} · {run.goal.preset or 'own'} preset · {state}"
    return f'<h1>{_(title)}</h1>\n<p class="soft">{_(subtitle)}</p>\n<div class="tiles">{boxes}</div>\n'


def _baselines(tree: Tree) -> dict[str, float]:
    """Each baseline's time in the evaluation of the best candidate: they are measured side by side."""
    best = tree.best()
    return dict(best.evaluation.baselines_ms) if best and best.evaluation else {}


def _plot(run: Run) -> str:
    """Best time per round, every timed candidate, the baselines and the floor; logarithmic in time.

    Every time is relative to the baselines beside it, times the best baseline's milliseconds in the best candidate's evaluation:
    what it would have been had the machine always been as fast as then.
    """
    tree = run.tree
    timed = tree.ranking()
    if not timed:
        return "<h2>Best time per round</h2>\n<p>No candidate was correct and timed, so there is nothing to plot.</p>\n"
    lines = {name: ms for name, ms in {**_baselines(tree), "floor": tree.floor_ms(run.goal.floor_ms)}.items() if ms > 0}
    unit = timed[0].time_ms / timed[0].relative_time
    axis = _Axis([c.relative_time * unit for c in timed] + list(lines.values()), max(len(tree.rounds), 1))
    parts = [axis.grid()]
    labels = []
    for name, ms in lines.items():
        kind = name if name in ("eager", "inductor", "floor") else "grid"
        parts.append(f'<line class="{kind}" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{axis.y(ms):.1f}" y2="{axis.y(ms):.1f}"/>')
        labels.append((axis.y(ms), kind, f"{name} {ms:.4g}"))
    for candidate in timed:
        title = f"{candidate.slot}: {_speed(candidate)}"
        x, y = axis.x(candidate.round) + axis.jitter(candidate.slot), axis.y(candidate.relative_time * unit)
        parts.append(f'<circle class="dot" cx="{x:.1f}" cy="{y:.1f}" r="4"><title>{_(title)}</title></circle>')
    best = [(number, tree.best(number)) for number in range(len(tree.rounds) + 1)]
    points = [(axis.x(number), axis.y(c.relative_time * unit)) for number, c in best if c]
    path = "".join(
        f"{'L' if i else 'M'}{x:.1f},{points[i - 1][1]:.1f}L{x:.1f},{y:.1f}" if i else f"M{x:.1f},{y:.1f}"
        for i, (x, y) in enumerate(points)
    )
    parts.append(f'<path class="best" d="{path.replace("LL", "L")}"/>')
    parts += [f'<circle class="mark" cx="{x:.1f}" cy="{y:.1f}" r="4.5"/>' for x, y in points]
    labels.append((points[-1][1], "best", f"best {timed[0].time_ms:.4g}"))
    parts += [
        f'<text class="{kind}" x="{_WIDTH - _RIGHT + 8}" y="{y + 4:.1f}">{_(text)}</text>' for y, kind, text in _spread(labels)
    ]
    description = f"Best time per round; the last is {timed[0].time_ms:.4g} milliseconds"
    return (
        f'<h2>Best time per round</h2>\n<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{_(description)}">'
        f'{"".join(parts)}</svg>\n<p class="soft">Milliseconds, logarithmic, at the speed that the machine '
        "had when the best was timed: every time is taken relative to the baselines beside it. Line: best so far. "
        "Dots: every correct candidate; hover for its place in the tree.</p>\n"
    )


class _Axis:
    """Maps rounds and milliseconds to the plot's coordinates."""

    def __init__(self, times: list[float], rounds: int) -> None:
        self.low, self.high, self.rounds = math.log(min(times) * 0.9), math.log(max(times) * 1.1), rounds

    def x(self, number: int) -> float:
        return _LEFT + 24 + (_WIDTH - _RIGHT - _LEFT - 48) * number / self.rounds

    def y(self, ms: float) -> float:
        return _TOP + (_HEIGHT - _TOP - _BOTTOM) * (self.high - math.log(ms)) / (self.high - self.low)

    def jitter(self, slot: str) -> float:
        """Apart, so that equal times of one round can be told from each other."""
        return (sum(place(slot)[1:]) % 5 - 2) * 3.0

    def grid(self) -> str:
        """Ticks at 1, 2 and 5 times powers of ten (or at both ends, if none falls inside), and a mark per round."""
        exponents = range(math.floor(self.low / math.log(10)), math.ceil(self.high / math.log(10)) + 1)
        inside = [m * 10.0**e for e in exponents for m in (1, 1.5, 2, 3, 5, 7) if self.low <= math.log(m * 10.0**e) <= self.high]
        ticks = inside if len(inside) > 1 else [math.exp(self.low) / 0.9, math.exp(self.high) / 1.1]
        parts = []
        for ms in ticks:
            parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{self.y(ms):.1f}" y2="{self.y(ms):.1f}"/>')
            parts.append(f'<text x="{_LEFT - 8}" y="{self.y(ms) + 4:.1f}" text-anchor="end">{ms:.3g}</text>')
        step = max(1, self.rounds // 12)
        for number in range(0, self.rounds + 1, step):
            name = "start" if number == 0 else f"round {number}" if self.rounds <= 8 else str(number)
            parts.append(f'<text x="{self.x(number):.1f}" y="{_HEIGHT - 12}" text-anchor="middle">{name}</text>')
        return "".join(parts)


def _spread(labels: list[tuple[float, str, str]], gap: float = 16.0) -> list[tuple[float, str, str]]:
    """Labels moved down where they would overlap."""
    placed: list[tuple[float, str, str]] = []
    for y, kind, text in sorted(labels):
        placed.append((max(y, placed[-1][0] + gap) if placed else y, kind, text))
    over = max(0.0, placed[-1][0] - (_HEIGHT - _BOTTOM + 8)) if placed else 0.0
    return [(y - over, kind, text) for y, kind, text in placed]


def _tree(run: Run) -> str:
    tree = run.tree
    parts = ["<h2>Ideas and candidates</h2>\n"]
    bank = [c for c in tree.candidates.values() if not c.prompt]
    if bank:
        parts.append(f"<h3>Known kernels</h3>\n{''.join(_candidate(run, c) for c in bank)}")
    for number, seeds in enumerate(tree.rounds, 1):
        best = tree.best(number)
        outcome = f"best so far {_speed(best)}" if best else "nothing correct yet"
        parts.append(f"<h3>Round {number} <span class='soft'>({outcome})</span></h3>\n")
        for index, seed in enumerate(seeds):
            name = f"from {tree.candidates[seed].slot}, {_speed(tree.candidates[seed])}" if seed else "from scratch"
            nodes = [n for n in tree.ideas.values() if n.slot.startswith(f"r{number}.s{index}.")]
            inner = "".join(_idea(run, n) for n in sorted(nodes, key=lambda n: place(n.slot))) or _unanswered(tree, number, index)
            parts.append(f"<details open><summary>Seed {index}: {_(name)}</summary>\n{inner}</details>\n")
    return "".join(parts) if len(parts) > 1 else f"{parts[0]}<p>Nothing has been asked yet.</p>\n"


def _speed(candidate: Candidate) -> str:
    return speed(candidate.evaluation) if candidate.evaluation and candidate.evaluation.time_ms else "not timed"


def _unanswered(tree: Tree, number: int, index: int) -> str:
    prompts = [p for p in tree.prompts.values() if p.chain == f"r{number}.s{index}.ideas"]
    return f"<p>No ideas: {_(_fate(tree, prompts[-1]) if prompts else 'not asked yet')}</p>"


def _fate(tree: Tree, prompt: Prompt) -> str:
    unanswered = "without a reply when the search stopped" if tree.stop else "waits for a reply"
    return prompt.error or prompt.rejected or (unanswered if prompt.reply is None else "nothing usable")


def _idea(run: Run, node: IdeaNode) -> str:
    tree = run.tree
    made = sorted((c for c in tree.candidates.values() if c.idea == node.id), key=lambda c: place(c.slot))
    best = min((c.relative_time for c in made), default=math.inf)
    badge = (
        _badge("good", f"{1 / best:.2f}x")
        if best < math.inf
        else _badge("bad" if made else "wait", "no correct kernel" if made else "no candidate")
    )
    lost = [p for p in tree.prompts.values() if p.idea == node.id and not p.candidate]
    inner = "".join(_candidate(run, c) for c in made)
    inner += "".join(f"<p class='soft'>{_(p.slot)}: {_(_fate(tree, p))}</p>" for p in lost)
    return (
        f"<details><summary>{badge} <b>{_(node.idea.family)}</b>: {_(node.idea.mechanism)}</summary>\n"
        f"<p class='soft'>Expected: {_(node.idea.expected or 'nothing said')}</p>{inner}</details>\n"
    )


def _badge(kind: str, text: str) -> str:
    return f'<span class="status {kind}">{_(text)}</span>'


def _candidate(run: Run, candidate: Candidate) -> str:
    tree, evaluation = run.tree, candidate.evaluation
    winner = " · winner" if candidate.id == tree.winner else ""
    notes = [line for tier, e in candidate.evaluations.items() for line in _notes(tier, e, known_floor(run.goal, tree))]
    if candidate.duplicate_of:
        notes.append(f"the same source as {tree.candidates[candidate.duplicate_of].slot}")
    parent = tree.candidates.get(candidate.parent)
    lines = "".join(f"<p>{_(note)}</p>" for note in notes)
    difference = (
        f"<details><summary>difference to {_(parent.slot)}</summary>{_diff(parent.text, candidate.text)}</details>"
        if parent
        else ""
    )
    return (
        f"<details><summary>{_verdict(evaluation, candidate)} <code>{_(candidate.slot)}</code>{winner}</summary>\n{lines}"
        f"<details><summary>source</summary><pre>{_(candidate.text)}</pre></details>{difference}</details>\n"
    )


def _verdict(evaluation: Evaluation | None, candidate: Candidate) -> str:
    if evaluation is None:
        return _badge("wait", "duplicate" if candidate.duplicate_of else "not evaluated yet")
    if evaluation.time_ms:
        return _badge("good", f"{evaluation.speedup:.2f}x ({evaluation.time_ms:.4g} ms)")
    return _badge("good" if evaluation.status.is_correct else "bad", str(evaluation.status).replace("_", " "))


def _notes(tier: str, evaluation: Evaluation, floor_ms: float) -> list[str]:
    if not evaluation.status.is_correct:
        return [f"{tier} check: {evaluation.status}: {evaluation.detail}"]
    return [f"{tier} check passed", *measurements(evaluation, floor_ms)]


def _diff(before: str, after: str) -> str:
    rows = []
    for line in difflib.unified_diff(before.splitlines(), after.splitlines(), "parent", "this", lineterm="", n=2):
        kind = {"+": "a", "-": "d"}.get(line[:1], "")
        rows.append(f'<span class="{kind}">{_(line)}</span>')
    return f'<pre class="diff">{"".join(rows) or "no difference"}</pre>'


def _families(tree: Tree) -> str:
    rows = []
    for family in (*FAMILIES, "other"):
        nodes = [n for n in tree.ideas.values() if n.idea.family == family]
        made = [[c for c in tree.candidates.values() if c.idea == n.id] for n in nodes]
        times = [min((c.relative_time for c in group), default=math.inf) for group in made]
        best = f"{1 / min(times):.2f}x" if times and min(times) < math.inf else ""
        if nodes:
            rows.append((family, len(nodes), sum(t < math.inf for t in times), best))
    return "<h2>Families of ideas</h2>\n" + _table(("family", "ideas", "with a correct kernel", "best"), rows) if rows else ""


def _spend(tree: Tree) -> str:
    rows = [(role, tree.spend.get(role, Spend())) for role in ROLES] + [("all", tree.spent)]
    cells = [
        (role, s.requests, f"{s.input_tokens:,}", f"{s.output_tokens:,}", f"{s.seconds:.0f}", f"{s.cost:.4g}" if s.cost else "")
        for role, s in rows
    ]  # fmt: skip
    return "<h2>Spend</h2>\n" + _table(
        ("role", "requests", "input tokens", "output tokens", "seconds at the model", "cost"), cells
    )


def _table(columns: tuple[str, ...], rows: list[tuple[Any, ...]]) -> str:
    head = "".join(f'<th class="{"n" if i else ""}">{_(c)}</th>' for i, c in enumerate(columns))
    lines = "".join(
        "<tr>" + "".join(f'<td class="{"n" if i else ""}">{_(cell)}</td>' for i, cell in enumerate(row)) + "</tr>\n"
        for row in rows
    )
    return f'<div class="wide"><table><tr>{head}</tr>\n{lines}</table></div>\n'


def _task(run: Run) -> str:
    from torch_llmkernels.program import python_source

    task = run.goal.task
    rows = [
        (t.name, role, t.dtype, list(t.shape), list(t.stride))
        for role, group in (("in", task.inputs), ("out", task.outputs))
        for t in group
    ]
    table = _table(("tensor", "role", "dtype", "shape", "stride"), rows)
    return f"<h2>The task</h2>\n<pre>{_(python_source(task))}</pre>\n{table}<p class='soft'>Task {_(task.key)}</p>\n"
