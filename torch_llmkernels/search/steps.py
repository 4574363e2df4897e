"""The steps that a search takes by itself, in order: each returns the events that follow from the state, or nothing.

They read the journalled state and what this process knows: what is in flight, what was looked at, what the budget allows.
"""

from __future__ import annotations

import dataclasses
import json
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch_llmkernels.errors import ProviderError
from torch_llmkernels.evaluation import Record, Status
from torch_llmkernels.search import render
from torch_llmkernels.search.budget import WARN_AT
from torch_llmkernels.search.candidates import parse_source
from torch_llmkernels.search.ideas import parse_ideas, words
from torch_llmkernels.search.journal import Event
from torch_llmkernels.search.llm import prompt_id, write_atomic
from torch_llmkernels.search.run import Run
from torch_llmkernels.search.tree import CONFIRM, Candidate, IdeaNode, Prompt, place
from torch_llmkernels.task import digest

if TYPE_CHECKING:
    from torch_llmkernels.search.engine import Engine

log = logging.getLogger("torch_llmkernels.search")


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
    return f"provider: {engine.fatal}" if engine.fatal and not engine.flights and not _to_evaluate(engine) else ""


def _spent(engine: Engine) -> str:
    """The budget, once nothing that was begun is left and the next prompt would break it."""
    if not engine.asked or engine.meter.flying or engine.flights or _to_evaluate(engine):
        return ""
    refusal = next((engine.refusal(prompt) for prompt in engine.unasked()), "")
    return f"budget: {refusal}" if refusal else ""


def _to_evaluate(engine: Engine) -> list[Candidate]:
    """Candidates whose quick evaluation does not count yet: there is none, or it is to be repeated."""
    return engine.tree.unevaluated() + engine.tree.noisy()


def _settled(engine: Engine) -> bool:
    """Whether the round is over: nothing to ask, to wait for, or to evaluate."""
    waits = engine.wanted() or _to_evaluate(engine) or engine.tree.unconfirmed(engine.goal.floor_ms)
    return not waits and engine.tree.banked


def _finished(engine: Engine) -> str:
    settings, done = engine.goal.settings, len(engine.tree.rounds)
    best = engine.tree.best()
    floor = engine.goal.floor_ms
    errors = [p.error for p in engine.tree.prompts.values() if p.round == done and p.error]
    if done and errors and not any(p.reply for p in engine.tree.prompts.values() if p.round == done):
        return f"provider: no request of round {done} was answered; the last error: {errors[-1]}"
    if best and engine.tree.at_floor(best, floor) and engine.tree.at_floor(best, floor, CONFIRM):
        return f"floor: {best.time_ms:.4g} ms is within {settings.floor_margin:.0%} of the roofline floor, measured twice"
    if done >= settings.rounds:
        return f"rounds: all {done} are done"
    if done > settings.patience and best:
        before = engine.tree.best(done - settings.patience)
        if before and best.relative_time > before.relative_time * (1 - settings.min_gain):
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
