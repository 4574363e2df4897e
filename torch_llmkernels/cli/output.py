"""How commands print: JSON for scripts, tables for people."""

from __future__ import annotations

import argparse
import json
import textwrap
from collections.abc import Iterable, Sequence
from typing import Any

from torch_llmkernels.errors import LLMKernelsError


class UsageError(LLMKernelsError):
    """An argument that cannot be what was meant: exit code 2."""


def short(text: str, most: int = 300) -> str:
    """`text` on one line and cut: torch's own errors can fill a screen."""
    return textwrap.shorten(text, most, placeholder=" ...")


def add_json(parser: argparse.ArgumentParser) -> None:
    """Give a command `--json`."""
    parser.add_argument("--json", action="store_true", help="print JSON for a script instead of a table")


def print_json(plain: Any) -> None:
    """One JSON value on stdout."""
    print(json.dumps(plain, indent=1))


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table on stdout; the last column wraps, the others do not."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    for column in columns:
        table.add_column(column, no_wrap=column != columns[-1], overflow="fold")
    for row in rows:
        table.add_row(*(_escape(cell) for cell in row))
    console = Console()
    # a file or a pipe has no width; 80 columns would fold every line
    console = console if console.is_terminal else Console(width=160)
    console.print(title, style="bold", markup=False, highlight=False, soft_wrap=True)
    console.print(table)


def _escape(cell: Any) -> str:
    from rich.markup import escape

    return escape(str(cell))
