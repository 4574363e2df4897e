"""Candidates: the kernel file in a model's reply, and the checks that need no device."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from typing import TYPE_CHECKING

from torch_llmkernels.errors import (
    CompileError,
    ExpressionError,
    KernelSourceError,
    LLMKernelsError,
    NotApplicable,
    ProviderError,
    ToolchainMissing,
)
from torch_llmkernels.evaluation import Evaluation, Status
from torch_llmkernels.task import Task

if TYPE_CHECKING:
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.kernels.source import Kernel

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
    """`static_check`, then a compilation, for machines that have the compiler but no device.

    For the task with the first constants whose launches and tensor maps the device takes, then for what else the header lists.

    Attributes:
        facts: `kernels.device.DeviceFacts` of the device that will run the kernel.
    """

    facts: DeviceFacts

    def __call__(self, task: Task, text: str, name: str) -> Evaluation | None:
        """The evaluation of a file that does not compile; None if it does, or if there is no compiler here."""
        from torch_llmkernels.evaluate.listed import check_listed
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
            target = target_for(task.device)
            target.compile(kernel, task, self._launchable(kernel, task, tunings), self.facts)
            check_listed(kernel, task, target, self.facts)
        except ToolchainMissing:
            return None
        except CompileError as error:
            return Evaluation(Status.COMPILE_ERROR, detail=f"{error}\n{error.log}".strip())
        except NotApplicable as error:
            return Evaluation(Status.NOT_APPLICABLE, detail=str(error))
        except LLMKernelsError as error:
            return Evaluation(Status.INVALID, detail=str(error))
        return None

    def _launchable(self, kernel: Kernel, task: Task, tunings: list[dict[str, int]]) -> dict[str, int]:
        """The first constants for which every launch and every tensor map is within the device's limits.

        Raises:
            NotApplicable: of the first constants, if there are none.
        """
        from torch_llmkernels.kernels.plan import plan_launches

        first: NotApplicable | None = None
        for constants in tunings:
            try:
                plan_launches(kernel, task, constants, self.facts)
                return constants
            except NotApplicable as error:
                first = first or error
        assert first is not None
        raise first
