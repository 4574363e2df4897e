"""`llmkernels repro`: a standalone script for one task and its kernel."""

from __future__ import annotations

import argparse
from pathlib import Path

from torch_llmkernels import settings as knobs


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("repro", help="write a standalone script: a task, its kernel, inputs, check and timing")
    parser.add_argument("key", help="the task's key as logs and tables show it, or its first digits")
    parser.add_argument("--kernel", default="", help="name of the kernel (default: the accepted one)")
    parser.add_argument("-o", "--output", help="the file to write, or - for standard output (default: repro_<region>_<key>.py)")
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Write the script and say where it is."""
    from torch_llmkernels.repro import find, script

    subject = find(args.key, knobs.current(), args.kernel)
    text = script(subject)
    if args.output == "-":
        print(text, end="")
        return 0
    path = Path(args.output or subject.file_name)
    path.write_text(text)
    print(f"{path}: {subject.task.signature} {subject.task.key} by {subject.kernel_name} ({subject.origin}); run it with python")
    return 0
