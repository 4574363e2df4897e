"""The state of a search: the tree of rounds, ideas, implementations and repairs that a journal describes.

A `Tree` is a fold over events. It holds no decision of its own beyond what follows from them, so that two processes that read the
same journal see the same search. Applying an event twice, or one that another machine wrote for the same thing, changes nothing.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch_llmkernels.errors import SchemaError
from torch_llmkernels.evaluation import Evaluation
from torch_llmkernels.search.budget import SearchSettings, Spend
from torch_llmkernels.search.ideas import Idea
from torch_llmkernels.search.journal import SCHEMA

CONFIRM = "confirm"
"""Tier of a second quick evaluation: a search does not end at its floor on the strength of one."""

REPEAT = "repeat"
"""Tier of a second quick evaluation of a candidate whose first was noisy: the steadier of the two counts."""

NOISY = 0.3  # a spread above this says more about the machine at that moment than about the kernel


@dataclasses.dataclass
class Prompt:
    """One request to the model, and what became of it.

    Attributes:
        id: See `llm.prompt_id`.
        role: `ideas`, `code` or `repair`.
        slot: Its place: round, seed, idea, variant, attempt; unique in the search.
        round: From 1.
        seed: The candidate it starts from, or empty.
        idea: The idea it implements, or empty for role `ideas`.
        variant, attempt: Which implementation, and which try at it.
        system: Digest of the system text, in `Tree.systems`.
        text: The request itself.
        reply: The text that came back.
        finish: How the model stopped.
        error: Why there is no reply.
        rejected: Why the reply holds nothing usable.
        candidate: The candidate that it holds.
    """

    id: str
    role: str
    slot: str
    round: int
    seed: str
    idea: str
    variant: int
    attempt: int
    system: str
    text: str
    reply: str | None = None
    finish: str = ""
    error: str = ""
    rejected: str = ""
    candidate: str = ""

    @property
    def chain(self) -> str:
        """The place without the attempt: a first draft and its repairs share it."""
        return self.slot.rsplit(".", 1)[0]


@dataclasses.dataclass
class IdeaNode:
    """An idea in its place.

    Attributes:
        id, slot: Identity and place.
        round: From 1.
        seed: The candidate it improves, or empty.
        prompt: The request that brought it.
        idea: Its words.
    """

    id: str
    slot: str
    round: int
    seed: str
    prompt: str
    idea: Idea


@dataclasses.dataclass
class Candidate:
    """A kernel file in its place.

    Attributes:
        id: Digest of its place and source.
        slot: Place; `bank.<n>` for one from the library.
        round: From 1; 0 for the bank.
        idea: The idea it implements, or empty.
        parent: The candidate it was made from (the seed, or the draft it repairs), or empty.
        prompt: The request that brought it.
        name: For messages and file names.
        text: The file.
        evaluations: By tier.
        duplicate_of: An earlier candidate with the same source, which was evaluated in its stead.
    """

    id: str
    slot: str
    round: int
    idea: str
    parent: str
    prompt: str
    name: str
    text: str
    evaluations: dict[str, Evaluation] = dataclasses.field(default_factory=dict)
    duplicate_of: str = ""

    @property
    def evaluation(self) -> Evaluation | None:
        """The quick evaluation that decides its place in the search: of two, the one of less spread, or the failure."""
        quick, repeat = self.evaluations.get("quick"), self.evaluations.get(REPEAT)
        if quick is None or quick.spread is None or repeat is None:
            return quick
        if repeat.spread is None:  # not timed: what fails the second time is not correct
            return quick if repeat.status.is_correct else repeat
        return min(quick, repeat, key=lambda e: e.spread or 0.0)  # the first, if equal

    def counted(self) -> list[Evaluation]:
        """Its evaluations, of two quick ones only that which counts."""
        others = [e for tier, e in self.evaluations.items() if tier not in ("quick", REPEAT)]
        return [self.evaluation, *others] if self.evaluation else others

    @property
    def is_noisy(self) -> bool:
        """Whether its quick evaluation must be repeated before it counts."""
        quick = self.evaluations.get("quick")
        return bool(quick and (quick.spread or 0.0) > NOISY and REPEAT not in self.evaluations)

    @property
    def time_ms(self) -> float:
        """Infinite unless it was found correct and timed."""
        return self.evaluation.time_ms if self.evaluation and self.evaluation.time_ms else math.inf

    @property
    def relative_time(self) -> float:
        """Its time over the best baseline's beside it, which candidates are ranked by; infinite unless correct and timed."""
        return self.evaluation.relative_time if self.evaluation else math.inf


class Tree:
    """A search as its journal tells it.

    Args:
        settings: The search's numbers, for counting cost and choosing seeds.
        events: What was journalled so far.
    """

    def __init__(self, settings: SearchSettings, events: Iterable[Mapping[str, Any]] = ()) -> None:
        self.settings = settings
        self.systems: dict[str, str] = {}
        self.prompts: dict[str, Prompt] = {}
        self.ideas: dict[str, IdeaNode] = {}
        self.candidates: dict[str, Candidate] = {}
        self.rounds: list[tuple[str, ...]] = []
        self.spend: dict[str, Spend] = {}
        self.seen: dict[str, int] = {}
        self.warned: set[str] = set()
        self.banked = False
        self.stop = ""
        self.ended = ""
        self.winner = ""
        self.apply(events)

    def apply(self, events: Iterable[Mapping[str, Any]]) -> None:
        """Take in events, in order.

        Raises:
            SchemaError: for an event of another release, or one without its fields.
        """
        for event in events:
            handler = _HANDLERS.get(event["event"])
            if handler is None:
                raise SchemaError(
                    f"journal event {event['event']!r} is unknown to this release; use the release that wrote the run"
                )
            try:
                handler(self, event)
            except KeyError as error:
                raise SchemaError(
                    f"journal event {event['event']!r} lacks {error} or names something that was never journalled"
                ) from None

    def _start(self, event: Mapping[str, Any]) -> None:
        if event["schema"] != SCHEMA:
            raise SchemaError(
                f"journal schema {event['schema']}, this release reads {SCHEMA}; use the release that wrote the run"
            )

    def _resume(self, event: Mapping[str, Any]) -> None:
        """A search that was cut short goes on: what failed on the way to the model may be asked again, and new numbers apply."""
        for prompt in self.prompts.values():
            prompt.error = "" if prompt.round == len(self.rounds) else prompt.error
        self.settings = self.settings.replaced(event["settings"])
        self.stop = self.ended = self.winner = ""

    def _bank(self, event: Mapping[str, Any]) -> None:
        self.banked = True

    def _round(self, event: Mapping[str, Any]) -> None:
        if event["index"] == len(self.rounds) + 1:
            self.rounds.append(tuple(event["seeds"]))

    def _system(self, event: Mapping[str, Any]) -> None:
        self.systems[event["id"]] = event["text"]

    def _prompt(self, event: Mapping[str, Any]) -> None:
        fields = {f.name: event[f.name] for f in dataclasses.fields(Prompt) if f.name in event}
        self.prompts.setdefault(event["id"], Prompt(**fields))

    def _reply(self, event: Mapping[str, Any]) -> None:
        prompt = self.prompts[event["id"]]
        if prompt.reply is not None:
            return
        self._pay(prompt, event)
        if event["error"]:
            prompt.error = event["error"]
        else:
            prompt.reply, prompt.finish, prompt.error = event["text"], event["finish"], ""

    def _pay(self, prompt: Prompt, event: Mapping[str, Any]) -> None:
        one = Spend(1, event["input_tokens"], event["output_tokens"], event["seconds"], event["cost"])
        self.spend[prompt.role] = self.spend.get(prompt.role, Spend()) + one
        self.seen[prompt.role] = max(self.seen.get(prompt.role, 0), event["output_tokens"])

    def _rejected(self, event: Mapping[str, Any]) -> None:
        self.prompts[event["id"]].rejected = event["reason"]

    def _idea(self, event: Mapping[str, Any]) -> None:
        idea = Idea(event["family"], event["mechanism"], event["expected"])
        node = IdeaNode(event["id"], event["slot"], event["round"], event["seed"], event["prompt"], idea)
        self.ideas.setdefault(node.id, node)

    def _candidate(self, event: Mapping[str, Any]) -> None:
        fields = {f.name: event[f.name] for f in dataclasses.fields(Candidate) if f.name in event}
        candidate = self.candidates.setdefault(event["id"], Candidate(**fields))
        if candidate.prompt:
            self.prompts[candidate.prompt].candidate = candidate.id

    def _evaluation(self, event: Mapping[str, Any]) -> None:
        self.candidates[event["id"]].evaluations.setdefault(event["tier"], Evaluation.from_json(event["evaluation"]))

    def _warning(self, event: Mapping[str, Any]) -> None:
        self.warned.add(event["text"])

    def _stop(self, event: Mapping[str, Any]) -> None:
        self.stop = self.stop or event["reason"]

    def _end(self, event: Mapping[str, Any]) -> None:
        self.ended, self.winner = event["reason"], event["winner"]

    @property
    def spent(self) -> Spend:
        """All roles together."""
        return sum(self.spend.values(), Spend())

    @property
    def chains(self) -> dict[str, list[Prompt]]:
        """First drafts with their repairs, by place, in order of attempts."""
        found: dict[str, list[Prompt]] = {}
        for prompt in sorted(self.prompts.values(), key=lambda p: place(p.slot)):
            found.setdefault(prompt.chain, []).append(prompt)
        return found

    def written(self) -> int:
        """Implementations that were asked for and answered."""
        return sum(p.role == "code" and p.reply is not None for p in self.prompts.values())

    def failure(self, prompt: Prompt) -> str:
        """Why this attempt needs a repair: an unusable reply, or what its candidate died of; else empty.

        A failed full check counts too: a search that is extended after it has that kernel repaired first.
        """
        if prompt.rejected or not prompt.candidate:
            return prompt.rejected
        candidate = self.candidates[prompt.candidate]
        for evaluation, check in ((candidate.evaluation, ""), (candidate.evaluations.get("full"), " in the full check")):
            if evaluation and not evaluation.status.is_correct:
                return f"{evaluation.status}{check}: {evaluation.detail}"
        return ""

    def unevaluated(self) -> list[Candidate]:
        """Candidates that wait for their quick evaluation, in order of place."""
        waiting = [c for c in self.candidates.values() if c.evaluation is None and not c.duplicate_of]
        return sorted(waiting, key=lambda c: place(c.slot))

    def noisy(self) -> list[Candidate]:
        """Candidates whose noisy quick evaluation waits to be repeated, in order of place."""
        return sorted((c for c in self.candidates.values() if c.is_noisy), key=lambda c: place(c.slot))

    def ranking(self) -> list[Candidate]:
        """Correct and timed candidates, fastest first by relative time; equals by place."""
        timed = (c for c in self.candidates.values() if c.relative_time < math.inf)
        return sorted(timed, key=lambda c: (c.relative_time, place(c.slot)))

    def best(self, until_round: int | None = None) -> Candidate | None:
        """The fastest correct candidate, or that of the rounds up to one."""
        return next((c for c in self.ranking() if until_round is None or c.round <= until_round), None)

    def line(self, candidate: Candidate) -> str:
        """The root of a candidate's ancestry: the first idea (or bank kernel) that everything before it grew from."""
        root = candidate
        while root.parent:
            root = self.candidates[root.parent]
        return root.idea or root.id

    def seeds(self) -> list[Candidate]:
        """Where the next round starts: the fastest, one per idea line unless far ahead of all the other lines.

        Where there are fewer lines than seeds, the fastest of other ideas fill up, then nothing: two variants of one idea
        would only be asked the same question twice.
        """
        ranking, chosen = self.ranking(), []
        for fill in (False, True):
            for candidate in ranking:
                if len(chosen) < self.settings.seeds and candidate not in chosen and self._adds(candidate, chosen, fill):
                    chosen.append(candidate)
        return sorted(chosen, key=lambda c: (c.relative_time, place(c.slot)))

    def _adds(self, candidate: Candidate, chosen: list[Candidate], fill: bool) -> bool:
        if fill:
            return (candidate.idea or candidate.id) not in {c.idea or c.id for c in chosen}
        taken = {self.line(c) for c in chosen}
        if self.line(candidate) not in taken:
            return True
        others = [c.relative_time for c in self.ranking() if self.line(c) not in taken]
        return bool(others) and candidate.relative_time * (1 + self.settings.diversity) < min(others)

    def floor_ms(self, measured: float) -> float:
        """The roofline floor by the best ceilings that any evaluation of this search measured.

        Args:
            measured: The floor that the search began with, milliseconds; 0 if unknown.

        Returns:
            Milliseconds; 0 if unknown, or if a kernel was faster by more than `floor_margin`: then the ceilings were measured in
            a slow moment, and how fast the machine is at its best is not known.
        """
        known = [e for c in self.candidates.values() for e in c.evaluations.values()]
        floor = min([ms for ms in (measured, *(e.floor_ms for e in known)) if ms > 0], default=0.0)
        counted = [e for c in self.candidates.values() for e in c.counted()]
        beaten = any(e.time_ms and e.time_ms < floor * (1 - self.settings.floor_margin) for e in counted)
        return 0.0 if beaten else floor

    def at_floor(self, candidate: Candidate, measured: float, tier: str = "quick") -> bool:
        """Whether an evaluation of a candidate found it within `floor_margin` of the floor."""
        evaluation = candidate.evaluation if tier == "quick" else candidate.evaluations.get(tier)
        floor = self.floor_ms(measured)
        return bool(evaluation and evaluation.time_ms and evaluation.time_ms <= floor * (1 + self.settings.floor_margin))

    def unconfirmed(self, measured: float) -> Candidate | None:
        """The best candidate, if it seems to be at the floor and no second evaluation has said so."""
        best = self.best()
        return best if best and CONFIRM not in best.evaluations and self.at_floor(best, measured) else None

    def interrupted(self) -> bool:
        """Whether the model's endpoint, not the search, is why it stopped or why a request of the last round has no reply."""
        failed = any(p.error and p.round == len(self.rounds) for p in self.prompts.values())
        return self.stop.startswith("provider") or (failed and not self.stop)


def place(slot: str) -> tuple[int, ...]:
    """A slot as numbers, to sort by: `r2.s0.i1.v0.a0` is (2, 0, 1, 0, 0)."""
    return tuple(int("".join(filter(str.isdigit, part)) or 0) for part in slot.split("."))


_HANDLERS: dict[str, Callable[[Tree, Mapping[str, Any]], None]] = {
    "start": Tree._start,
    "resume": Tree._resume,
    "bank": Tree._bank,
    "round": Tree._round,
    "system": Tree._system,
    "prompt": Tree._prompt,
    "reply": Tree._reply,
    "rejected": Tree._rejected,
    "idea": Tree._idea,
    "candidate": Tree._candidate,
    "evaluation": Tree._evaluation,
    "warning": Tree._warning,
    "stop": Tree._stop,
    "end": Tree._end,
}
