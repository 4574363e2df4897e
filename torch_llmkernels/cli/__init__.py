"""The command line, `llmkernels`.

A command is one function that adds its parser and sets `run`, which returns the exit code: 0 for success, 1 for a problem found,
2 for wrong usage. An error is one line that says what, where and what to do; `--debug` shows the traceback.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence

from torch_llmkernels import __version__
from torch_llmkernels.cli import cache, doctor, explain, knobs, precompile, repro
from torch_llmkernels.cli.output import UsageError, short
from torch_llmkernels.errors import LLMKernelsError, SettingsError

Command = Callable[["argparse._SubParsersAction[argparse.ArgumentParser]"], None]

COMMANDS: tuple[Command, ...] = (
    doctor.register, explain.register, precompile.register, cache.register, repro.register, knobs.register,
)  # fmt: skip


def commands() -> Iterator[Command]:
    """The commands of this package, then those of the search if it is installed."""
    yield from COMMANDS
    if importlib.util.find_spec("torch_llmkernels.search.commands"):
        from torch_llmkernels.search.commands import COMMANDS as OF_THE_SEARCH

        yield from OF_THE_SEARCH


def parser() -> argparse.ArgumentParser:
    """The whole command line."""
    top = argparse.ArgumentParser(prog="llmkernels", description="Kernels that language models wrote, in torch.compile.")
    top.add_argument("--version", action="version", version=f"torch-llmkernels {__version__}")
    top.add_argument("--debug", action="store_true", help="show the traceback of an error")
    subparsers = top.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for register in commands():
        register(subparsers)
    return top


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    args = parser().parse_args(argv)
    try:
        return args.run(args)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:  # the reader of a pipe, such as `head`, has seen enough
        sys.stderr.close()
        return 0
    except Exception as error:  # the boundary to the shell: every error becomes one line
        if args.debug:
            raise
        print(_one_line(error), file=sys.stderr)
        return 2 if isinstance(error, (SettingsError, UsageError)) else 1


def _one_line(error: Exception) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    if isinstance(error, LLMKernelsError):
        return f"llmkernels: {text}"
    return f"llmkernels: {type(error).__name__}: {short(text)} (llmkernels --debug ... shows where)"
