"""What one precompilation may spend: seconds, and the tokens of all its searches together."""

from __future__ import annotations

import dataclasses
import time
from typing import TYPE_CHECKING, Any

from torch_llmkernels.settings import Settings

if TYPE_CHECKING:
    from torch_llmkernels.search.on_miss import Standing

_NO_SECONDS = "the seconds of this precompilation are spent (budget)"


@dataclasses.dataclass
class Budget:
    """The limits of one precompilation, and what its searches have used of them.

    Attributes:
        deadline: When deciding ends, by `time.monotonic`.
        tokens: In and out, all searches together; None: no limit but each search's own, 0: no search.
        used: Tokens that the searches of this precompilation have paid so far.
        refused: Whether a search stopped because its next request could have passed `tokens`; then no other one starts.
    """

    deadline: float
    tokens: int | None = None
    used: int = 0
    refused: bool = False

    @property
    def seconds_left(self) -> float:
        """Seconds until the deadline; 0 once it has passed."""
        return max(self.deadline - time.monotonic(), 0.0)

    def refusal(self) -> str:
        """Why no search may start; empty if one may."""
        if not self.seconds_left:
            return _NO_SECONDS
        if self.tokens is None or (self.used < self.tokens and not self.refused):
            return ""
        return f"the {self.tokens:,} tokens of this precompilation are spent (budget_tokens)"

    def search_knobs(self, before: Standing, settings: Settings) -> dict[str, Any]:
        """Knobs of a search that may use what is left here, beyond what it has used before, and no more than its own limits."""
        seconds = before.seconds + max(self.seconds_left, 1.0)
        knobs: dict[str, Any] = {"on_miss": "search", "search_budget_s": _tighter(settings.search_budget_s, seconds)}
        if self.tokens is not None:
            left = before.tokens + self.tokens - self.used
            knobs["search_budget_tokens"] = _tighter(settings.search_budget_tokens, left)
        return knobs

    def book(self, before: Standing, after: Standing, settings: Settings, knobs: dict[str, Any]) -> str:
        """Count what a search has used; the limit of this budget that stopped it, so that a later one can go on, or empty."""
        self.used += after.tokens - before.tokens
        limits = {"max_seconds": "search_budget_s", "max_tokens": "search_budget_tokens"}  # in the reason: the knob
        ours = {limit for limit, knob in limits.items() if knob in knobs and knobs[knob] != getattr(settings, knob)}
        stopped = {limit for limit in ours if f"({limit}" in after.stop}
        self.refused |= "max_tokens" in stopped
        return self.refusal() or _NO_SECONDS if stopped else ""


def _tighter(own: float, left: float) -> float:
    """The smaller of a search's own limit, of which 0 means none, and of what is left."""
    return min(own, left) if own else left
