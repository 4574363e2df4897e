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
import json
import logging
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, Protocol

from torch_llmkernels.errors import ProviderError
from torch_llmkernels.evaluation import Evaluation, Record, Status
from torch_llmkernels.search import render
from torch_llmkernels.search.budget import WARN_AT, Meter, SearchSettings, Spend, cost
from torch_llmkernels.search.candidates import StaticCheck, parse_source, static_check
from torch_llmkernels.search.ideas import parse_ideas, words
from torch_llmkernels.search.journal import Event
from torch_llmkernels.search.llm import Provider, Reply, prompt_id, write_atomic
from torch_llmkernels.search.run import Goal, Run
from torch_llmkernels.search.tree import Candidate, IdeaNode, Prompt, place
from torch_llmkernels.task import Task, digest

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
        """Send prompts to the model as far as the budget goes, and candidates to the pool."""
        if self.provider is not None and not self.fatal:
            for prompt in self.unasked():
                if self._asking() >= self.provider.concurrency or self.refusal(prompt):
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

    def open_prompts(self) -> list[Prompt]:
        """Prompts without a reply that the search still wants, in order of place."""
        if self.tree.stop:
            return []
        return sorted((p for p in self.tree.prompts.values() if p.reply is None and not p.error), key=lambda p: place(p.slot))

    def unasked(self) -> list[Prompt]:
        """Open prompts that this process has not sent."""
        return [p for p in self.open_prompts() if p.id not in self.meter.flying]

    def waiting(self) -> list[tuple[Candidate, str]]:
        """Candidates and the tier of the evaluation they wait for; after the stop, the one finalist."""
        if not self.tree.stop:
            return [(c, "quick") for c in self.tree.unevaluated()]
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

    def _asking(self) -> int:
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
        constants = dict(candidate.evaluation.constants) if tier == "full" and candidate.evaluation else None
        job = Job(self.goal.task, candidate.text, candidate.name, constants=constants, tier=tier, timed=True)
        self.flights[self.pool.submit(job)] = (tier, candidate.id)

    def _evaluated(self, identity: str, tier: str, future: Future[Evaluation]) -> list[Event]:
        """The outcome as an event. A pool that fails is not the candidate's fault: the error goes to whoever runs the search."""
        return [{"event": "evaluation", "id": identity, "tier": tier, "evaluation": future.result().to_json()}]

    def _abandon(self) -> None:
        """Time is up: nothing in flight is waited for."""
        for future, (kind, identity) in list(self.flights.items()):
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


# The steps, in order. Each returns the events that follow from the state, or nothing.


def warn(engine: Engine) -> list[Event]:
    """A line when half and four fifths of a limit are used."""
    texts = [f"{mark:.0%} of {name} used" for name, share in engine.meter.shares().items() for mark in WARN_AT if share >= mark]
    new = [text for text in texts if text not in engine.tree.warned]
    for text in new:
        log.warning("search %s: %s", engine.run.name, text)
    return [{"event": "warning", "text": text} for text in new]


def read_replies(engine: Engine) -> list[Event]:
    """Replies become ideas or candidates, or are rejected with a reason that a repair can act on."""
    for prompt in sorted(engine.tree.prompts.values(), key=lambda p: place(p.slot)):
        if prompt.reply is None or prompt.rejected or prompt.candidate or prompt.id in engine.read:
            continue
        engine.read.add(prompt.id)
        try:
            events = _ideas_of(engine, prompt) if prompt.role == "ideas" else _candidate_of(engine, prompt)
        except ProviderError as error:
            events = [{"event": "rejected", "id": prompt.id, "reason": str(error)}]
        if new := [e for e in events if e["id"] not in engine.tree.ideas]:
            return new
    return []


def _ideas_of(engine: Engine, prompt: Prompt) -> list[Event]:
    tried = {words(n.idea.mechanism) for n in engine.tree.ideas.values() if n.round < prompt.round}
    ideas = parse_ideas(prompt.reply or "", engine.goal.settings.ideas)
    new = [idea for idea in ideas if words(idea.mechanism) not in tried]
    if not new:
        raise ProviderError("every idea of the reply repeats one that was tried before: propose others")
    prefix = prompt.chain.removesuffix(".ideas")
    slots = [f"{prefix}.i{number}" for number in range(len(new))]
    return [
        {"event": "idea", "id": digest([slot, prompt.id]), "slot": slot, "round": prompt.round, "seed": prompt.seed,
         "prompt": prompt.id, **dataclasses.asdict(idea)}
        for slot, idea in zip(slots, new, strict=True)
    ]  # fmt: skip


def _candidate_of(engine: Engine, prompt: Prompt) -> list[Event]:
    text = parse_source(prompt.reply or "", prompt.finish)
    earlier = [p for p in engine.tree.chains[prompt.chain] if p.attempt < prompt.attempt and p.candidate]
    parent = earlier[-1].candidate if earlier else prompt.seed
    name = prompt.slot.replace(".", "_")
    return [_candidate(engine, prompt.slot, prompt.round, text, name, idea=prompt.idea, parent=parent, prompt=prompt.id)]


def _candidate(engine: Engine, slot: str, number: int, text: str, name: str, **links: str) -> Event:
    same = [c for c in engine.tree.candidates.values() if c.text == text and c.slot != slot and not c.duplicate_of]
    return {"event": "candidate", "id": digest([slot, text]), "slot": slot, "round": number, "name": name, "text": text,
            "idea": "", "parent": "", "prompt": "", **links, "duplicate_of": same[0].id if same else ""}  # fmt: skip


def check_files(engine: Engine) -> list[Event]:
    """Files that cannot work are evaluated on the spot."""
    for candidate in engine.tree.unevaluated():
        if candidate.id in engine.sound or ("quick", candidate.id) in engine.flights.values():
            continue
        failed = engine.check(engine.goal.task, candidate.text, candidate.name)
        if failed is not None:
            return [{"event": "evaluation", "id": candidate.id, "tier": "quick", "evaluation": failed.to_json()}]
        engine.sound.add(candidate.id)
    return []


def open_bank(engine: Engine) -> list[Event]:
    """Round 0: known kernels of the same or neighbouring signatures compete like any other."""
    if engine.tree.banked:
        return []
    bank = engine.goal.bank[: engine.goal.settings.bank]
    rows = [_candidate(engine, f"bank.{n}", 0, text, name) for n, (name, text) in enumerate(bank)]
    return [*rows, {"event": "bank"}]


def ask_code(engine: Engine) -> list[Event]:
    """Every idea is implemented several times."""
    if engine.tree.stop:
        return []
    events: list[Event] = []
    written = {p.slot for p in engine.tree.prompts.values()}
    for node in sorted(engine.tree.ideas.values(), key=lambda n: place(n.slot)):
        for variant in range(engine.goal.settings.variants):
            slot = f"{node.slot}.v{variant}.a0"
            if slot not in written:
                rendered = render.code_prompt(engine.goal, engine.tree, node, variant)
                asked = _prompt(engine, "code", slot, rendered, node.round, node.seed, node, variant)
                events += [event for event in asked if event not in events]
    return events


def ask_repairs(engine: Engine) -> list[Event]:
    """What failed goes back to the model with the reason, a bounded number of times."""
    if engine.tree.stop:
        return []
    for chain, prompts in engine.tree.chains.items():
        last = prompts[-1]
        reason = engine.tree.failure(last)
        if not reason or len(prompts) > engine.goal.settings.repairs:
            continue
        rendered = render.repair_prompt(engine.goal, engine.tree, last, reason)
        role = "ideas" if last.role == "ideas" else "repair"
        slot = f"{chain}.a{last.attempt + 1}"
        node = engine.tree.ideas.get(last.idea)
        return _prompt(engine, role, slot, rendered, last.round, last.seed, node, last.variant, last.attempt + 1)
    return []


def _prompt(
    engine: Engine, role: str, slot: str, rendered: tuple[str, str], number: int, seed: str, node: IdeaNode | None = None,
    variant: int = 0, attempt: int = 0,
) -> list[Event]:  # fmt: skip
    system, text = rendered
    text = f"{text}\n<!-- {slot} -->\n"  # two places may ask for the same, and must not share an answer
    key = digest(system)
    known = [] if key in engine.tree.systems else [{"event": "system", "id": key, "text": system}]
    place_of = {"role": role, "slot": slot, "round": number, "seed": seed, "idea": node.id if node else ""}
    asked = {"event": "prompt", "id": prompt_id(role, system, text), **place_of, "variant": variant, "attempt": attempt}
    return [*known, {**asked, "system": key, "text": text}]


def stop_search(engine: Engine) -> list[Event]:
    """The reasons to stop; kernels in flight still land, and the best one has its full check after."""
    if engine.tree.stop:
        return []
    reason = _endpoint(engine) or _spent(engine) or (_finished(engine) if _settled(engine) else "")
    return [{"event": "stop", "reason": reason}] if reason else []


def _endpoint(engine: Engine) -> str:
    return f"provider: {engine.fatal}" if engine.fatal and not engine.flights and not engine.tree.unevaluated() else ""


def _spent(engine: Engine) -> str:
    """The budget, once nothing that was begun is left and the next prompt would break it."""
    if not engine.asked or engine.meter.flying or engine.flights or engine.tree.unevaluated():
        return ""
    refusal = next((engine.refusal(prompt) for prompt in engine.unasked()), "")
    return f"budget: {refusal}" if refusal else ""


def _settled(engine: Engine) -> bool:
    """Whether the round is over: nothing to ask, to wait for, or to evaluate."""
    return not engine.open_prompts() and not engine.tree.unevaluated() and engine.tree.banked


def _finished(engine: Engine) -> str:
    settings, done = engine.goal.settings, len(engine.tree.rounds)
    best = engine.tree.best()
    floor = engine.goal.floor_ms
    errors = [p.error for p in engine.tree.prompts.values() if p.round == done and p.error]
    if done and errors and not any(p.reply for p in engine.tree.prompts.values() if p.round == done):
        return f"provider: no request of round {done} was answered; the last error: {errors[-1]}"
    if best and floor and best.time_ms <= floor * (1 + settings.floor_margin):
        return f"floor: {best.time_ms:.4g} ms is within {settings.floor_margin:.0%} of the roofline floor"
    if done >= settings.rounds:
        return f"rounds: all {done} are done"
    if done > settings.patience and best:
        before = engine.tree.best(done - settings.patience)
        if before and best.time_ms > before.time_ms * (1 - settings.min_gain):
            return f"plateau: {settings.patience} rounds gained less than {settings.min_gain:.0%}"
    return ""


def open_round(engine: Engine) -> list[Event]:
    """The next round: its seeds, and a prompt for ideas from each. The first one also asks without a seed."""
    if engine.tree.stop or not _settled(engine):
        return []
    number = len(engine.tree.rounds) + 1
    seeds: list[Candidate | None] = [*engine.tree.seeds()]
    if number == 1 or not seeds:  # keep room for a fresh design beside what the bank holds
        seeds = [*seeds[: max(engine.goal.settings.seeds - 1, 1)], None][: engine.goal.settings.seeds]
    events: list[Event] = [{"event": "round", "index": number, "seeds": [s.id if s else "" for s in seeds]}]
    return events + _ideas_prompts(engine, number, seeds)


def ask_ideas(engine: Engine) -> list[Event]:
    """The prompts of the open round that a killed process did not get to write."""
    if engine.tree.stop or not engine.tree.rounds:
        return []
    number = len(engine.tree.rounds)
    return _ideas_prompts(engine, number, [engine.tree.candidates.get(identity) for identity in engine.tree.rounds[-1]])


def _ideas_prompts(engine: Engine, number: int, seeds: list[Candidate | None]) -> list[Event]:
    written = {p.slot for p in engine.tree.prompts.values()}
    events: list[Event] = []
    for index, seed in enumerate(seeds):
        slot = f"r{number}.s{index}.ideas.a0"
        if slot not in written:
            rendered = render.ideas_prompt(engine.goal, engine.tree, seed, number)
            asked = _prompt(engine, "ideas", slot, rendered, number, seed.id if seed else "")
            events += [event for event in asked if event not in events]
    return events


def finish(engine: Engine) -> list[Event]:
    """After the stop: the end, once the winner passed its full check or no candidate is left to try."""
    if not engine.tree.stop or engine.flights or engine.finalist():
        return []
    if engine.tree.ended:
        return []
    passed = [c for c in engine.tree.ranking() if "full" in c.evaluations and c.evaluations["full"].status is Status.TIMED]
    if passed:
        write_winner(engine.run, passed[0])
    return [{"event": "end", "reason": engine.tree.stop, "winner": passed[0].id if passed else ""}]


def write_winner(run: Run, winner: Candidate) -> Record:
    """`winner.json`: the record of the candidate that passed the full check."""
    record = record_of(run, winner)
    write_atomic(run.directory / "winner.json", json.dumps(record.to_json(), indent=1))
    return record


def record_of(run: Run, winner: Candidate) -> Record:
    """A candidate that passed the full check, as a record."""
    evaluation = winner.evaluations["full"]
    kind = str(run.goal.facts.get("kind", "unknown"))
    name = f"{run.goal.task.signature.replace('.', '_')}_{winner.id[:8]}"
    return Record(run.goal.task, name, winner.text, evaluation.constants, kind, evaluation, f"search:{run.name}")


STEPS: tuple[Callable[[Engine], list[Event]], ...] = (
    warn, read_replies, check_files, open_bank, ask_ideas, ask_code, ask_repairs, stop_search, open_round, finish,
)  # fmt: skip


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
        settings: The numbers.
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
    engine = Engine(run, provider=provider, pool=pool, check=check, progress=progress)
    engine.drive()
    return result(run)


def open_run(directory: Path, goal: Goal | None = None) -> Run:
    """Open a folder to go on with its search: failed requests may be asked again, unless the search has its winner."""
    run = Run(directory, goal)
    if run.tree.interrupted():
        run.record([{"event": "resume", "settings": {}}])
    return run


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
