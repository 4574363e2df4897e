"""A small world for tests of the search: a scripted model, a pool that reads an evaluation off the source, and a run folder."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import tasks

from torch_llmkernels.evaluation import ErrorStat, Evaluation, Status
from torch_llmkernels.search.budget import SearchSettings
from torch_llmkernels.search.engine import Engine, open_run
from torch_llmkernels.search.llm import Reply, prompt_id
from torch_llmkernels.search.run import Goal, Run

FACTS: dict[str, Any] = {"target": "cpu", "kind": "cpu-test", "name": "a scripted processor", "threads": 2}

KERNEL = """/*---
implements = "add.relu"
target = "cpu"
dtypes = ["float32"]
dims = { n = "y.numel" }
[[launch]]
kernel = "add_relu"
args = ["a", "b", "y", "n"]
---*/
// verdict: %s
extern "C" void add_relu(const T* a, const T* b, T* y, int64_t n) {
    for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i] < 0 ? T(0) : a[i] + b[i];
}
"""


def kernel(verdict: str) -> str:
    """A kernel that the scripted pool finds `<milliseconds>` fast, `wrong`, or of another status by name."""
    return KERNEL % verdict


def code_reply(verdict: str) -> str:
    """A reply with one code block."""
    return f"Here it is.\n\n```cpp\n{kernel(verdict)}```\n"


def ideas_reply(*mechanisms: str) -> str:
    """A reply with one idea per mechanism."""
    rows = [{"family": "memory access", "mechanism": m, "expected": "faster"} for m in mechanisms]
    return f"Bandwidth limits it.\n```json\n{json.dumps(rows)}\n```"


def evaluation(verdict: str, tier: str = "quick") -> Evaluation:
    """What the scripted pool says of a verdict: eager takes 4 ms, Inductor 3 ms."""
    if not re.fullmatch(r"[\d.]+", verdict):
        return Evaluation(Status(verdict), detail=f"scripted: {verdict}")
    errors = (ErrorStat("y", "normal", 1e-7, 1e-7, 1e-7, 1e-7, 1e-7, 1e-7, True),)
    times = (("eager", 4.0), ("inductor", 3.0))
    return Evaluation(
        Status.TIMED, errors=errors, time_ms=float(verdict), spread=0.01, baselines_ms=times, floor_ms=0.5, tier=tier
    )


class ScriptedPool:
    """Evaluates at once by the `verdict:` line of a source; `full` holds verdicts of the full check by quick verdict."""

    def __init__(self, full: Mapping[str, str] | None = None) -> None:
        self.full = full or {}
        self.jobs: Counter[tuple[str, str]] = Counter()

    def submit(self, job: Any) -> Future[Evaluation]:
        verdict = re.search(r"verdict: (\S+)", job.kernel_text)[1]
        self.jobs[verdict, job.tier] += 1
        future: Future[Evaluation] = Future()
        future.set_result(evaluation(self.full.get(verdict, verdict) if job.tier == "full" else verdict, job.tier))
        return future


class ScriptedModel:
    """Answers by place in the search; counts every question."""

    def __init__(self, answer: Callable[[str, str], str | Reply], concurrency: int = 1) -> None:
        self.answer = answer
        self.concurrency = concurrency
        self.calls: Counter[str] = Counter()
        self.slots: list[str] = []
        self.prompts: dict[str, str] = {}
        self._lock = threading.Lock()

    def complete(self, role: str, prompt: str, *, system: str, slot: str = "") -> Reply:
        with self._lock:
            self.calls[prompt_id(role, system, prompt)] += 1
            self.slots.append(slot)
            self.prompts[slot] = prompt
        answer = self.answer(role, slot)
        return answer if isinstance(answer, Reply) else Reply(answer, 1000, 100, model="scripted")


def default_answer(role: str, slot: str) -> str:
    """Two ideas a round; each round is faster; the second variant of the first idea is wrong at first, the second idea slower."""
    number = int(slot[1])
    if role == "ideas":
        return ideas_reply(f"{slot} tile by rows", f"{slot} vector loads")
    idea, variant = re.search(r"i(\d)\.v(\d)", slot).groups()
    if (idea, variant) == ("0", "1") and role == "code":
        return code_reply("wrong")
    return code_reply(f"{3.0 - 0.5 * number + 0.1 * int(idea) + 0.01 * int(variant):.3f}")


SMALL = SearchSettings(rounds=2, ideas=2, variants=2, seeds=1, repairs=1, patience=5)


def goal(settings: SearchSettings = SMALL, **changes: Any) -> Goal:
    """A search for relu(a + b) on the CPU."""
    return Goal(**{"task": tasks.relu_add_task(), "settings": settings, "facts": FACTS, "floor": {"ms": 0.5}, **changes})


def open_engine(folder: Path, settings: SearchSettings = SMALL, model: Any = None, pool: Any = None, **changes: Any) -> Engine:
    """An engine over a run in `folder`."""
    run: Run = open_run(folder, goal(settings, **changes))
    return Engine(run, provider=model, pool=pool)
