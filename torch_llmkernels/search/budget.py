"""What a search may spend, what it has spent, and the presets."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Mapping
from typing import Any

from torch_llmkernels.errors import SettingsError
from torch_llmkernels.settings import A_TYPE, unknown_name

WARN_AT = (0.5, 0.8)  # shares of a limit at which the user hears of it
CHARS_PER_TOKEN = 3.5  # of code and English prose, on the low side: estimates should not come out short
OUTPUT_GUESS = {"ideas": 4_000, "code": 12_000, "repair": 12_000}  # tokens of one reply, thinking included, before any was seen


@dataclasses.dataclass(frozen=True)
class SearchSettings:
    """Every number of a search. A limit of 0 means no limit.

    Attributes:
        rounds: Rounds at most.
        ideas: Ideas asked for per seed and round.
        variants: Implementations of each idea.
        seeds: Kernels that the next round starts from.
        repairs: Times one implementation goes back to the model with what was wrong.
        bank: Accepted kernels of the same or neighbouring signatures that are evaluated before the first round.
        max_tokens: Input and output tokens, requests in flight included.
        max_candidates: Implementations asked for (repairs not counted).
        max_seconds: Seconds the search may run, over all the processes that run it.
        max_cost: In the currency of `prices`.
        patience: Rounds without a gain of `min_gain` after which the search ends.
        min_gain: Share by which the best time (relative to the baselines beside it) must fall to count as progress.
        floor_margin: A best time within this share of the roofline floor, twice, ends the search; one that is below the floor by
            more shows that the floor is wrong.
        diversity: A second seed of one idea line must be faster than every other line's best by this share.
        concurrency: Requests to the model at a time.
        max_output_tokens: Limit passed to the model; 0 leaves it to the endpoint.
        finalists: Candidates that may try the full check before the search ends without a winner.
        prices: For each model, its name and the price of a million input and of a million output tokens.
    """

    rounds: int = 3
    ideas: int = 4
    variants: int = 2
    seeds: int = 2
    repairs: int = 1
    bank: int = 3
    max_tokens: int = 1_000_000
    max_candidates: int = 64
    max_seconds: float = 3600.0
    max_cost: float = 0.0
    patience: int = 2
    min_gain: float = 0.02
    floor_margin: float = 0.05
    diversity: float = 0.10
    concurrency: int = 4
    max_output_tokens: int = 0
    finalists: int = 3
    prices: tuple[tuple[str, float, float], ...] = ()

    def __post_init__(self) -> None:
        for name in ("rounds", "ideas", "variants", "seeds", "concurrency", "patience", "finalists"):
            if getattr(self, name) < 1:
                raise SettingsError(f"search setting {name} must be at least 1, not {getattr(self, name)}")
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, (int, float)) and value < 0:
                raise SettingsError(f"search setting {field.name} must not be negative, not {value}")

    def replaced(self, values: Mapping[str, Any]) -> SearchSettings:
        """A copy with some numbers changed; text is converted to the field's type.

        Raises:
            SettingsError: for an unknown name or a value that does not parse.
        """
        known = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        converted: dict[str, Any] = {}
        for name, value in values.items():
            if name not in known:
                raise SettingsError(unknown_name(name, known, "search setting "))
            try:
                converted[name] = _prices(value) if name == "prices" else type(known[name])(value)
            except (TypeError, ValueError):
                raise SettingsError(f"search setting {name}: {value!r} is not {A_TYPE[type(known[name])]}") from None
        return dataclasses.replace(self, **converted)

    def to_json(self) -> dict[str, Any]:
        """Plain JSON for `SearchSettings().replaced`."""
        return dataclasses.asdict(self)


def _prices(rows: Iterable[Any]) -> tuple[tuple[str, float, float], ...]:
    return tuple((str(model), float(into), float(out)) for model, into, out in rows)


PRESETS: dict[str, SearchSettings] = {
    "quick": SearchSettings(
        rounds=2, ideas=3, variants=1, seeds=1, bank=2, max_tokens=250_000, max_candidates=10, max_seconds=600.0, patience=1,
    ),
    "default": SearchSettings(),
    "thorough": SearchSettings(
        rounds=5, ideas=4, variants=2, seeds=3, repairs=2, bank=5, max_tokens=8_000_000, max_candidates=240,
        max_seconds=6 * 3600.0, patience=3,
    ),
    "sequential": SearchSettings(
        rounds=64, ideas=1, variants=1, seeds=1, bank=1, max_tokens=1_000_000, max_candidates=64, max_seconds=3600.0, patience=64,
    ),
}  # fmt: skip
"""`sequential` edits one kernel again and again: the foil that the branching search is measured against at equal tokens."""


def preset(name: str, **changes: Any) -> SearchSettings:
    """A preset with some numbers changed.

    Raises:
        SettingsError: for an unknown preset or number.
    """
    if name not in PRESETS:
        raise SettingsError(unknown_name(name, PRESETS, "search preset "))
    return PRESETS[name].replaced(changes)


@dataclasses.dataclass(frozen=True)
class Spend:
    """Requests, tokens, seconds at the model and cost."""

    requests: int = 0
    input_tokens: int = 0
    output_tokens: int = 0
    seconds: float = 0.0
    cost: float = 0.0

    @property
    def tokens(self) -> int:
        """Input and output tokens."""
        return self.input_tokens + self.output_tokens

    def __add__(self, other: Spend) -> Spend:
        return Spend(*(a + b for a, b in zip(dataclasses.astuple(self), dataclasses.astuple(other), strict=True)))


def tokens_in(text: str) -> int:
    """Tokens of a text, estimated from its length."""
    return math.ceil(len(text) / CHARS_PER_TOKEN)


def cost(settings: SearchSettings, model: str, input_tokens: int, output_tokens: int) -> float:
    """What a request cost by the user's price table.

    A model that is not listed is free, unless the table has a `*` row.
    """
    table = {name: (into, out) for name, into, out in settings.prices}
    into, out = table.get(model) or table.get("*") or (0.0, 0.0)
    return (input_tokens * into + output_tokens * out) / 1e6


def highest_price(settings: SearchSettings) -> tuple[float, float]:
    """The dearest row, for requests whose model is not known yet."""
    into = max((row[1] for row in settings.prices), default=0.0)
    return into, max((row[2] for row in settings.prices), default=0.0)


@dataclasses.dataclass
class Meter:
    """The limits of a search against its spend, requests in flight included.

    Attributes:
        settings: The limits.
        spent: What replies have cost.
        candidates: Implementations asked for and answered.
        seconds: How long the search has been running.
        seen: The largest reply of each role in output tokens, which is what one in flight is expected to cost.
        flying: Estimate of each request in flight, by prompt.
    """

    settings: SearchSettings
    spent: Spend = dataclasses.field(default_factory=Spend)
    candidates: int = 0
    seconds: float = 0.0
    seen: dict[str, int] = dataclasses.field(default_factory=dict)
    flying: dict[str, Spend] = dataclasses.field(default_factory=dict)
    flying_candidates: set[str] = dataclasses.field(default_factory=set)

    def estimate(self, role: str, prompt: str) -> Spend:
        """What a request is expected to cost at most."""
        into = tokens_in(prompt)
        out = self.settings.max_output_tokens or max(self.seen.get(role, 0), OUTPUT_GUESS[role] if role not in self.seen else 0)
        price_in, price_out = highest_price(self.settings)
        return Spend(1, into, out, 0.0, (into * price_in + out * price_out) / 1e6)

    def refusal(self, role: str, prompt: str) -> str:
        """Why this request must not be sent, or an empty string: the budget it would break."""
        limits, ask = self.settings, self.estimate(role, prompt)
        total = sum(self.flying.values(), self.spent) + ask
        if limits.max_seconds and self.seconds >= limits.max_seconds:
            return f"{limits.max_seconds:.0f} seconds have passed (max_seconds)"
        if limits.max_tokens and total.tokens > limits.max_tokens:
            return f"the next request could pass {limits.max_tokens:,} tokens (max_tokens; {self.spent.tokens:,} spent)"
        if limits.max_cost and total.cost > limits.max_cost:
            return f"the next request could pass a cost of {limits.max_cost:g} (max_cost; {self.spent.cost:.4g} spent)"
        if role == "code" and limits.max_candidates and self.candidates + len(self.flying_candidates) >= limits.max_candidates:
            return f"{self.candidates} candidates were written (max_candidates)"
        return ""

    def take_off(self, prompt_id: str, role: str, prompt: str) -> None:
        """A request leaves."""
        self.flying[prompt_id] = self.estimate(role, prompt)
        if role == "code":
            self.flying_candidates.add(prompt_id)

    def land(self, prompt_id: str) -> None:
        """Its reply is there, or will never come."""
        self.flying.pop(prompt_id, None)
        self.flying_candidates.discard(prompt_id)

    def shares(self) -> dict[str, float]:
        """The used share of every limit that is set."""
        limits = self.settings
        used = {"max_tokens": self.spent.tokens, "max_candidates": self.candidates, "max_seconds": self.seconds,
                "max_cost": self.spent.cost}  # fmt: skip
        return {name: value / getattr(limits, name) for name, value in used.items() if getattr(limits, name)}


@dataclasses.dataclass(frozen=True)
class Estimate:
    """What a search will ask for at most, before it starts."""

    requests: int
    candidates: int
    input_tokens: int
    output_tokens: int
    cost: float

    def __str__(self) -> str:
        price = f", about {self.cost:.2f} by your price table" if self.cost else ""
        return (
            f"at most {self.requests} requests, {self.candidates} candidates, about {self.input_tokens / 1e3:.0f} k input and "
            f"{self.output_tokens / 1e3:.0f} k output tokens{price}"
        )


def estimate(settings: SearchSettings, ideas_prompt: str, code_prompt: str) -> Estimate:
    """The size of a search by the length of its prompts, cut at its token limit.

    Args:
        settings: The search.
        ideas_prompt: A rendered prompt for ideas.
        code_prompt: A rendered prompt for one implementation.
    """
    asks = 1 + (settings.rounds - 1) * settings.seeds
    candidates = asks * settings.ideas * settings.variants
    if settings.max_candidates:
        candidates = min(candidates, settings.max_candidates)
    repairs = math.ceil(candidates * min(settings.repairs, 1) / 2)  # half of all first drafts need one, in published searches
    into = asks * tokens_in(ideas_prompt) + (candidates + repairs) * tokens_in(code_prompt)
    out = asks * OUTPUT_GUESS["ideas"] + candidates * OUTPUT_GUESS["code"] + repairs * OUTPUT_GUESS["repair"]
    if settings.max_tokens and into + out > settings.max_tokens:
        share = settings.max_tokens / (into + out)
        into, out = int(into * share), int(out * share)
    price_in, price_out = highest_price(settings)
    return Estimate(asks + candidates + repairs, candidates, into, out, (into * price_in + out * price_out) / 1e6)
