"""Candidates: the kernel file in a model's reply, and the checks that need no device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable

from torch_llmkernels.errors import (
    CompileError,
    ExpressionError,
    KernelSourceError,
    LLMKernelsError,
    ProviderError,
    ToolchainMissing,
)
from torch_llmkernels.evaluation import Evaluation, Status
from torch_llmkernels.task import Task

_OPEN = re.compile(r"^[ \t]*(`{3,}|~{3,})[ \t]*([\w+.#-]*)[ \t]*$", re.MULTILINE)


def parse_source(text: str, finish: str = "stop") -> str:
    """The kernel file in a reply: its last complete code block that looks like one.

    Args:
        text: The whole reply.
        finish: How the model stopped: `length` explains a block that never closes.

    Raises:
        ProviderError: if there is none; the message tells the model what to do.
    """
    text = text.replace("\r\n", "\n")
    blocks, unclosed = _blocks(text)
    kernels = [block for block in blocks if "/*---" in block]
    if kernels:
        return kernels[-1]
    if finish == "length" or unclosed:
        raise ProviderError(
            "the reply was cut off before its code block ended: answer with the code block alone, and keep it shorter"
        )
    if blocks:
        raise ProviderError(
            "the code block has no kernel header: start the file with the /*--- header ---*/ of the kernel format"
        )
    if "/*---" in text and "---*/" in text:
        return text[text.index("/*---") :].strip() + "\n"
    if finish == "refusal":
        raise ProviderError("the model refused to answer")
    raise ProviderError("no code block was found: answer with one fenced code block that holds the whole kernel file")


def _blocks(text: str) -> tuple[list[str], bool]:
    """Fenced blocks in order, and whether the last fence was left open."""
    found: list[str] = []
    position = 0
    while opening := _OPEN.search(text, position):
        fence = re.escape(opening[1][0]) + "{" + str(len(opening[1])) + ",}"
        closing = re.compile(rf"^[ \t]*{fence}[ \t]*$", re.MULTILINE).search(text, opening.end())
        if closing is None:
            return found, True
        found.append(text[opening.end() + 1 : closing.start()])
        position = closing.end()
    return found, False


StaticCheck = Callable[[Task, str, str], Evaluation | None]
"""`check(task, text, name)`: the evaluation of a file that cannot work, or None if nothing speaks against it so far."""


def static_check(task: Task, text: str, name: str) -> Evaluation | None:
    """Whether the file parses, implements the task and serves it; no compiler is run."""
    from torch_llmkernels.kernels.source import parse_kernel

    try:
        kernel = parse_kernel(text, name)
        reason = kernel.why_not(task)
    except (KernelSourceError, ExpressionError) as error:
        return Evaluation(Status.INVALID, detail=str(error))
    if reason is not None:
        return Evaluation(Status.NOT_APPLICABLE, detail=reason)
    return None


@dataclasses.dataclass(frozen=True)
class CompileCheck:
    """`static_check`, then a compilation with the first valid constants, for machines that have the compiler but no device.

    Attributes:
        facts: `kernels.device.DeviceFacts` of the device that will run the kernel.
    """

    facts: object

    def __call__(self, task: Task, text: str, name: str) -> Evaluation | None:
        """The evaluation of a file that does not compile; None if it does, or if there is no compiler here."""
        from torch_llmkernels.kernels.source import parse_kernel
        from torch_llmkernels.kernels.targets import target_for

        if (failed := static_check(task, text, name)) is not None:
            return failed
        kernel = parse_kernel(text, name)
        try:
            tunings = kernel.tunings(task, self.facts)
            if not tunings:
                return Evaluation(
                    Status.NOT_APPLICABLE, detail="no combination of `tune` values satisfies every `where` condition"
                )
            target_for(task.device).compile(kernel, task, tunings[0], self.facts)
        except ToolchainMissing:
            return None
        except CompileError as error:
            return Evaluation(Status.COMPILE_ERROR, detail=f"{error}\n{error.log}".strip())
        except LLMKernelsError as error:
            return Evaluation(Status.INVALID, detail=str(error))
        return None
