"""How numbers are said to people."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`1 graph`, `2 graphs`: a number and what it counts."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
