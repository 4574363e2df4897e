"""Ideas: one optimisation in words, before any code. What the model writes, parsed leniently and never trusted."""

from __future__ import annotations

import dataclasses
import json
import re
from typing import Any

from torch_llmkernels.errors import ProviderError

FAMILIES: tuple[str, ...] = (
    "memory access",
    "asynchrony and latency hiding",
    "data types and precision",
    "compute and instructions",
    "parallelism and occupancy",
    "control flow and loops",
)
"""The families an idea belongs to, as found in published searches: one word list for prompts, reports and statistics."""

OTHER = "other"
MAX_TEXT = 3000  # characters of one field; the rest of a model's essay would only crowd later prompts


@dataclasses.dataclass(frozen=True)
class Idea:
    """One optimisation.

    Attributes:
        family: One of `FAMILIES`, or `other`.
        mechanism: What to do and why it helps.
        expected: What it should gain.
    """

    family: str
    mechanism: str
    expected: str


def parse_ideas(text: str, limit: int) -> list[Idea]:
    """The ideas of a reply: the last JSON list of objects with a `mechanism` in it, fenced or not.

    Args:
        text: The whole reply.
        limit: Ideas beyond this many are dropped.

    Raises:
        ProviderError: if there is none; the message tells the model what to do.
    """
    for block in reversed(_json_blocks(text)):
        ideas = _ideas_of(block)
        if ideas:
            return ideas[:limit]
    raise ProviderError(
        "no list of ideas was found: end the reply with one ```json block that holds a list of "
        '{"family": ..., "mechanism": ..., "expected": ...} objects'
    )


def _json_blocks(text: str) -> list[Any]:
    """Every JSON list or object of the reply that decodes, in order: fenced blocks first, then bare ones."""
    decoder = json.JSONDecoder(strict=False)
    fenced = re.findall(r"```[a-zA-Z]*[ \t]*\n(.*?)```", text, flags=re.DOTALL)
    found = []
    for source in (text, *fenced):
        starts = [m.start() for m in re.finditer(r"^[ \t]*[\[{]", source, flags=re.MULTILINE)]
        end = -1
        for start in starts:
            if start < end:
                continue  # inside what was just decoded
            begin = start + len(source[start:]) - len(source[start:].lstrip())
            try:
                value, end = decoder.raw_decode(source, begin)
            except ValueError:
                continue
            found.append(value)
    return found


def _ideas_of(block: Any) -> list[Idea]:
    if isinstance(block, dict):
        block = block.get("ideas", [block])
    if not isinstance(block, list):
        return []
    return unique([_idea(entry) for entry in block if isinstance(entry, dict) and str(entry.get("mechanism") or "").strip()])


def _idea(entry: dict[str, Any]) -> Idea:
    family = _clean(entry.get("family")).lower().replace("_", " ")
    return Idea(family if family in FAMILIES else _closest(family), _clean(entry["mechanism"]), _clean(entry.get("expected")))


def _closest(family: str) -> str:
    """The family that shares a telling word with what the model wrote."""
    for known in FAMILIES:
        if any(word in family for word in known.split() if len(word) > 4):
            return known
    return OTHER


def _clean(value: Any) -> str:
    return " ".join(str(value or "").split())[:MAX_TEXT]


def unique(ideas: list[Idea]) -> list[Idea]:
    """Without those whose mechanism says, word for word, what an earlier one said."""
    seen: dict[str, Idea] = {}
    for idea in ideas:
        seen.setdefault(words(idea.mechanism), idea)
    return list(seen.values())


def words(mechanism: str) -> str:
    """A mechanism reduced to its words, for telling whether two are the same."""
    return " ".join(re.findall(r"[a-z0-9]+", mechanism.lower()))
