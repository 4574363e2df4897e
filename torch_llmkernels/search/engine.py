"""The branching search: rounds -> seeds -> ideas -> implementations -> check, repair, time -> seeds of the next round.

One engine serves the search that runs in one process, the one whose model is a folder of files, and the one that proposes on one
machine and evaluates on another: they differ in whether a provider and a pool are there. What can be decided from the journal
alone is decided in `STEPS`, a flat list; what needs the model or the device is dispatched, and its outcome journalled before
anything reads it. The same journal always leads to the same next step, so a killed search goes on where it was and no answer is
paid twice.
"""

from __future__ import annotations

import concurrent.futures
import dataclasses
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from torch_llmkernels.evaluation import Evaluation, Record, Status
from torch_llmkernels.search.budget import Meter, SearchSettings, Spend, cost
from torch_llmkernels.search.candidates import StaticCheck, static_check
from torch_llmkernels.search.journal import Event
from torch_llmkernels.search.llm import ExchangeProvider, Provider, Reply
from torch_llmkernels.search.run import Goal, Run
from torch_llmkernels.search.steps import STEPS, record_of
from torch_llmkernels.search.tree import CONFIRM, REPEAT, Candidate, Prompt, place
from torch_llmkernels.task import Task

log = logging.getLogger("torch_llmkernels.search")

FAILURES_IN_A_ROW = 5  # requests that may fail one after the other before the endpoint counts as down

Progress = Callable[["Engine"], None]


class Pool(Protocol):
    """What evaluates: `evaluate.pool.Pool`, or anything with this method."""

    def submit(self, job: Any) -> Future[Evaluation]:
        """Start an evaluation."""
        ...


class Engine:
    """A search, or the part of it that can be done here.

    Args:
        run: The folder.
        provider: Answers prompts; None leaves them to another process.
        pool: Evaluates candidates; None leaves them to another machine.
        check: Rejects files that cannot work before they are evaluated.
        progress: Called after every change.
    """

    def __init__(
        self, run: Run, *, provider: Provider | None = None, pool: Pool | None = None, check: StaticCheck = static_check,
        progress: Progress = lambda engine: None,
    ) -> None:  # fmt: skip
        self.run, self.tree, self.goal = run, run.tree, run.goal
        self.provider, self.pool, self.check, self.progress = provider, pool, check, progress
        self.meter = Meter(self.goal.settings)
        self.flights: dict[Future[Any], tuple[str, str]] = {}  # what is on its way: ("reply" or a tier, prompt or candidate id)
        self.sound: set[str] = set()  # candidates that passed `check`
        self.read: set[str] = set()  # prompts whose reply became ideas or a candidate
        self.asked = False  # whether every open prompt was offered to the provider
        self.failures = 0
        self.fatal = ""

    # The whole search on one screen.

    def drive(self) -> None:
        """Go on until the search has ended, or until someone else (a person, another machine) must act."""
        while not self.tree.ended:
            self.advance()
            self.dispatch()
            if self.flights:
                self.collect()
            elif not self.advance():
                break

    def advance(self) -> bool:
        """Take every step that follows from the journal alone, the first that has something to do first; whether any had."""
        before = len(self.run.journal.events)
        self._measure()
        while events := next((found for step in STEPS if (found := step(self))), None):
            self.run.record(events)
            self._measure()
            self.progress(self)
        return len(self.run.journal.events) > before

    def dispatch(self) -> None:
        """Send prompts to the model as far as the budget goes, and candidates to the pool.

        The budget is asked once, when a prompt is issued. One that lies in an exchange folder was let through then, and its reply
        costs no more if it is read than if it is dropped: so it goes first, is never refused (whatever the replies before it came
        to), and counts as in flight while the budget judges new ones. A search stops for its budget when all of these are in.
        """
        if self.provider is not None and not self.fatal:
            for prompt in sorted(self.unasked(), key=lambda p: not self.issued(p)):
                if self.asking() >= self.provider.concurrency or (not self.issued(prompt) and self.refusal(prompt)):
                    break
                self._ask(prompt)
            self.asked = True
        if self.pool is not None:
            for candidate, tier in self.waiting():
                if (tier, candidate.id) not in self.flights.values():
                    self._evaluate(candidate, tier)

    def collect(self) -> None:
        """Wait for the first outcome, or for the end of the time budget, and journal what came."""
        left = self.goal.settings.max_seconds - self.run.journal.clock() if self.goal.settings.max_seconds else None
        if left is not None and left <= 0 and not self.tree.stop:
            return self._abandon()
        timeout = None if self.tree.stop else left
        done, _ = concurrent.futures.wait(self.flights, timeout, return_when=concurrent.futures.FIRST_COMPLETED)
        for future in done:
            kind, identity = self.flights.pop(future)
            events = self._landed(identity, future.result()) if kind == "reply" else self._evaluated(identity, kind, future)
            self.run.record(events)
            self._measure()
            self.progress(self)
        return None

    # What is open.

    def wanted(self) -> list[Prompt]:
        """Prompts without a reply that the search still wants, issued or not, in order of place."""
        if self.tree.stop or self.tree.ended:
            return []
        return sorted((p for p in self.tree.prompts.values() if p.reply is None and not p.error), key=lambda p: place(p.slot))

    def open_prompts(self) -> list[Prompt]:
        """Wanted prompts that someone can answer now: those that were issued. None once the search has stopped."""
        return [p for p in self.wanted() if self.issued(p)]

    def issued(self, prompt: Prompt) -> bool:
        """Whether a prompt has left: it lies in the exchange folder, or this process sent it."""
        if isinstance(self.provider, ExchangeProvider):
            return self.provider.issued(prompt.id)
        return prompt.id in self.meter.flying

    def unasked(self) -> list[Prompt]:
        """Wanted prompts that this process has not sent."""
        return [p for p in self.wanted() if p.id not in self.meter.flying]

    def withheld(self) -> tuple[int, str]:
        """How many wanted prompts were not issued, and why the budget forbids the first, with all issued ones in flight."""
        self._measure()
        held = [p for p in self.wanted() if not self.issued(p)]
        for prompt in self.open_prompts():
            self.meter.take_off(prompt.id, prompt.role, self.tree.systems[prompt.system] + prompt.text)
        return len(held), self.refusal(held[0]) if held else ""

    def waiting(self) -> list[tuple[Candidate, str]]:
        """Candidates and the tier of the evaluation they wait for; after the stop, the one finalist.

        A noisy evaluation is repeated once; at the end of a round whose best seems to be at the floor, so is that one's.
        """
        if not self.tree.stop:
            doubtful = None if self.wanted() else self.tree.unconfirmed(self.goal.floor_ms)
            first = [(c, "quick") for c in self.tree.unevaluated()] + [(c, REPEAT) for c in self.tree.noisy()]
            return first or ([(doubtful, CONFIRM)] if doubtful else [])
        finalist = self.finalist()
        return [(finalist, "full")] if finalist else []

    def finalist(self) -> Candidate | None:
        """The fastest candidate whose full check is still to come; None once one passed or enough of them failed."""
        for candidate in self.tree.ranking()[: self.goal.settings.finalists]:
            full = candidate.evaluations.get("full")
            if full is None:
                return candidate
            if full.status is Status.TIMED:
                break
        return None

    def refusal(self, prompt: Prompt) -> str:
        """Why the budget forbids this prompt; empty if it does not."""
        return self.meter.refusal(prompt.role, self.tree.systems[prompt.system] + prompt.text)

    # The model and the device.

    def asking(self) -> int:
        """Requests in flight."""
        return sum(kind == "reply" for kind, _ in self.flights.values())

    def _ask(self, prompt: Prompt) -> None:
        provider, system = self.provider, self.tree.systems[prompt.system]
        assert provider is not None
        self.meter.take_off(prompt.id, prompt.role, system + prompt.text)
        future = _in_thread(lambda: provider.complete(prompt.role, prompt.text, system=system, slot=prompt.slot))
        self.flights[future] = ("reply", prompt.id)

    def _landed(self, identity: str, reply: Reply) -> list[Event]:
        if reply.pending:
            return []  # still counted as in flight: whoever answers may be at it
        self.meter.land(identity)
        self.failures = self.failures + 1 if reply.error else 0
        if reply.fatal or self.failures >= FAILURES_IN_A_ROW:
            self.fatal = reply.error
        price = cost(self.goal.settings, reply.model, reply.input_tokens, reply.output_tokens)
        fields = {k: v for k, v in dataclasses.asdict(reply).items() if k != "fatal"}
        return [{"event": "reply", "id": identity, **fields, "cost": price}]

    def _evaluate(self, candidate: Candidate, tier: str) -> None:
        from torch_llmkernels.evaluate.run import Job

        assert self.pool is not None
        constants = dict(candidate.evaluation.constants) if tier != "quick" and candidate.evaluation else None
        kind, profiled = "full" if tier == "full" else "quick", tier in ("quick", REPEAT)
        job = Job(
            self.goal.task, candidate.text, candidate.name, constants=constants, tier=kind, profiled=profiled,
            listed=tier == "quick",
        )  # fmt: skip
        self.flights[self.pool.submit(job)] = (tier, candidate.id)

    def _evaluated(self, identity: str, tier: str, future: Future[Evaluation]) -> list[Event]:
        """The outcome as an event. A pool that fails is not the candidate's fault: the error goes to whoever runs the search."""
        return [{"event": "evaluation", "id": identity, "tier": tier, "evaluation": future.result().to_json()}]

    def _abandon(self) -> None:
        """Time is up: nothing in flight is waited for, but replies that lie in an exchange folder are taken in."""
        for future, (kind, identity) in list(self.flights.items()):
            if kind == "reply" and isinstance(self.provider, ExchangeProvider) and self.provider.answered(identity):
                self.run.record(self._landed(identity, future.result()))
                continue
            future.cancel()
            if kind == "reply":
                self.meter.land(identity)
        self.flights.clear()
        self.run.record(
            [{"event": "stop", "reason": f"budget: {self.goal.settings.max_seconds:.0f} seconds have passed (max_seconds)"}]
        )

    def _measure(self) -> None:
        self.meter.spent, self.meter.candidates, self.meter.seen = self.tree.spent, self.tree.written(), self.tree.seen
        self.meter.seconds = self.run.journal.clock()


def _in_thread(work: Callable[[], Reply]) -> Future[Reply]:
    """Run in a daemon thread: a request that hangs must not keep the process from ending."""
    future: Future[Reply] = Future()
    future.set_running_or_notify_cancel()  # it cannot be called back any more

    def target() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=target, name="llmkernels-model", daemon=True).start()
    return future


@dataclasses.dataclass(frozen=True)
class SearchResult:
    """How a search ended.

    Attributes:
        record: The accepted kernel, fully checked; None if there is none. Whether it beats the baselines, its evaluation says.
        spent: What the model was paid.
        reason: Why it ended.
    """

    record: Record | None
    spent: Spend
    reason: str


def run_search(
    task: Task, settings: SearchSettings, *, provider: Provider, pool: Pool, facts: Mapping[str, Any], directory: Path,
    ceilings: Mapping[str, Any] | None = None, floor: Mapping[str, Any] | None = None, bank: tuple[tuple[str, str], ...] = (),
    neighbours: tuple[tuple[str, str], ...] = (),
    progress: Progress = lambda engine: None, check: StaticCheck = static_check,
) -> SearchResult:  # fmt: skip
    """Search in this process until it ends; a folder that holds an unfinished search of the task is gone on with.

    Args:
        task: What the kernel must compute.
        settings: The numbers. A search that is gone on with keeps its own, but for the limits of tokens and seconds.
        provider: Answers prompts.
        pool: Evaluates candidates on this machine.
        facts: `DeviceFacts` as plain JSON.
        directory: The run's folder.
        ceilings, floor: What `evaluate.roofline` says, as plain JSON.
        bank: Names and sources of kernels of the task's signature to start from.
        neighbours: Names and sources of kernels of neighbouring signatures, shown for their techniques.
        progress: Called after every change.
        check: See `Engine`.
    """
    goal = Goal(task, settings, dict(facts), dict(ceilings or {}), dict(floor or {}), bank, neighbours)
    run = open_run(directory, goal)
    _limit(run, settings)
    engine = Engine(run, provider=provider, pool=pool, check=check, progress=progress)
    engine.drive()
    return result(run)


def _limit(run: Run, settings: SearchSettings) -> None:
    """Apply the limits of whoever goes on with a search; one that stopped at its old ones is open again."""
    limits = {name: getattr(settings, name) for name in ("max_tokens", "max_seconds")}
    changed = any(getattr(run.goal.settings, name) != value for name, value in limits.items())
    if changed and (not run.tree.stop or run.tree.stop.startswith("budget")):
        extend(run, limits)


def open_run(directory: Path, goal: Goal | None = None) -> Run:
    """Open a folder to go on with its search: failed requests may be asked again, unless the search has its winner."""
    run = Run(directory, goal)
    if run.tree.interrupted():
        run.record([{"event": "resume", "settings": {}}])
    return run


def finish(run: Run) -> None:
    """Ask no more: open prompts are dropped, and the best candidate so far has its full check."""
    if not run.tree.stop:
        run.record([{"event": "stop", "reason": "finish: asked for before the search had ended by itself"}])


def extend(run: Run, changes: Mapping[str, Any]) -> None:
    """Go on with a search that has ended, with other numbers.

    Args:
        run: The folder.
        changes: `SearchSettings` fields, such as `rounds` or `max_tokens`.

    Raises:
        SettingsError: for an unknown field or a value that does not parse.
    """
    run.tree.settings.replaced(changes)
    run.record([{"event": "resume", "settings": dict(changes)}])
    run.goal = dataclasses.replace(run.goal, settings=run.tree.settings)


def result(run: Run) -> SearchResult:
    """How a search stands."""
    winner = run.tree.candidates.get(run.tree.winner)
    record = record_of(run, winner) if winner else None
    return SearchResult(record, run.tree.spent, run.tree.ended or run.tree.stop or "open: it waits for replies or evaluations")
