"""A standalone script for one task and one kernel, to answer "is it that kernel?" and to attach to a report.

The script holds the task, its PyTorch program to read and run, the kernel and its constants; it makes the inputs, runs both, and
repeats the check and the timing. It needs torch and this package, not the model, the store or the library.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator

from torch_llmkernels.cache.library import default_library
from torch_llmkernels.cache.store import open_store
from torch_llmkernels.errors import StoreError
from torch_llmkernels.plan import stored
from torch_llmkernels.program import python_source
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task


@dataclasses.dataclass(frozen=True)
class Subject:
    """What a script reproduces.

    Attributes:
        task: The task.
        kernel_name: The kernel's file stem.
        kernel_text: The whole kernel file.
        constants: Its tunables; None lets the evaluation choose them.
        origin: Where the kernel was found.
    """

    task: Task
    kernel_name: str
    kernel_text: str
    constants: tuple[tuple[str, int], ...] | None
    origin: str

    @property
    def file_name(self) -> str:
        """`repro_<signature>_<8 digits of the key>.py`."""
        return f"repro_{self.task.signature.replace('.', '_')}_{self.task.key[:8]}.py"


def find(key: str, settings: Settings, kernel: str = "") -> Subject:
    """The task whose key starts with `key`, with its kernel.

    Args:
        key: A task's key as logs and tables show it, or its first digits.
        settings: Names the store and the library.
        kernel: Name of the kernel, if there is more than the accepted one.

    Raises:
        StoreError: if no task or no kernel answers, or several tasks do.
    """
    found = [s for s in _subjects(key, settings) if kernel in ("", s.kernel_name)]
    keys = sorted({subject.task.key for subject in found})
    if len(keys) > 1:
        raise StoreError(f"{key!r} starts {len(keys)} keys; give more digits of one: {', '.join(keys[:5])}")
    if not found:
        what = f"kernel {kernel!r} for a task" if kernel else "task with a kernel"
        listed = "llmkernels cache list, llmkernels cache list --library"
        raise StoreError(f"no {what} has a key that starts with {key!r}, in the store or the library; see: {listed}")
    return found[0]


def _subjects(key: str, settings: Settings) -> Iterator[Subject]:
    """Accepted kernels first, then those of the library that were tried, records of the library, and imported candidates.

    Last, for tasks that nothing was accepted for: whatever in the library serves a task of a graph that was compiled here.
    """
    library, store = default_library(settings), open_store(settings)
    for where, decision in store.decisions():
        if not where.task_key.startswith(key) or decision.record is None:
            continue
        record = decision.record
        yield Subject(record.task, record.kernel_name, record.kernel_text, record.constants, f"store, {record.origin}")
        for other in library.kernels(record.task.signature, record.task.device):
            if other.name != record.kernel_name and other.why_not(record.task) is None:
                yield Subject(record.task, other.name, other.text, None, "library")
    for record in library.records():
        if record.task.key.startswith(key):
            yield Subject(record.task, record.kernel_name, record.kernel_text, record.constants, f"library, {record.device_kind}")
    for record in store.all_imported():
        if record.task.key.startswith(key):
            yield Subject(record.task, record.kernel_name, record.kernel_text, record.constants, record.origin)
    for task in {task.key: task for found in stored(settings) for task in found.tasks if task.key.startswith(key)}.values():
        for kernel in library.kernels(task.signature, task.device):
            if kernel.why_not(task) is None:
                yield Subject(task, kernel.name, kernel.text, None, "library, not accepted here")


def script(subject: Subject) -> str:
    """The script's text."""
    task = subject.task
    return _TEMPLATE.format(
        signature=task.signature,
        key=task.key,
        kernel=subject.kernel_name,
        origin=subject.origin,
        file=subject.file_name,
        program=python_source(task).strip().replace("import torch\nimport torch.nn.functional as F\n", "", 1).strip(),
        function=task.signature.replace(".", "_"),
        task=_literal(json.dumps(task.to_json())),
        name=subject.kernel_name,
        text=_literal(subject.kernel_text),
        constants=None if subject.constants is None else dict(subject.constants),
    )


def _literal(text: str) -> str:
    """`text` as a Python literal, readable where that is possible."""
    return f"r'''{text}'''" if "'''" not in text and not text.endswith(("\\", "'")) else repr(text)


_TEMPLATE = '''"""Reproducer of {signature} {key} by kernel {kernel} ({origin}).

    python {file}               run it beside its PyTorch program, check it against float64, time it
    python {file} --run-only    run it beside its PyTorch program

Exits with 0 if the kernel passes.
"""

import json
import sys

import torch
import torch.nn.functional as F  # noqa: F401

from torch_llmkernels import settings
from torch_llmkernels.evaluate.inputs import InputGenerator
from torch_llmkernels.evaluate.run import Job, evaluate
from torch_llmkernels.evaluate.statistics import FROBENIUS_RATIO
from torch_llmkernels.graph.op import Slot, Spec
from torch_llmkernels.task import Task


{program}


TASK = Task.from_json(json.loads({task}))
KERNEL = {text}
CONSTANTS = {constants}


def run() -> None:
    """The kernel beside its program, on normal data."""
    task, symbols = TASK.at(), [hint for _, hint in TASK.symbols]
    inputs = InputGenerator(task).make("normal", 0)
    expected = {function}(*inputs, *symbols)
    expected = expected if isinstance(expected, tuple) else (expected,)
    outputs = [torch.empty_strided(t.shape, t.stride, dtype=getattr(torch, t.dtype), device=task.device) for t in task.outputs]
    slot = Slot(Spec(TASK, "{name}", KERNEL, tuple(sorted((CONSTANTS or {{}}).items()))), settings.current())
    slot(*outputs, *slot.workspaces(outputs[0].device), *inputs, *symbols)
    if slot.reason:
        print("the kernel did not run:", slot.reason)
    for spec, got, want in zip(task.outputs, outputs, expected):
        difference = (got.double() - want.double()).abs().max().item()
        print(f"{{spec.name}} {{tuple(got.shape)}} {{got.dtype}}: largest difference {{difference:.3g}}")


def check() -> bool:
    """The check and the timing that decide whether the kernel is used."""
    outcome = evaluate(Job(TASK, KERNEL, "{name}", CONSTANTS))
    if outcome.errors:
        worst = max(outcome.errors, key=lambda e: e.frobenius / max(e.frobenius_yardstick, 1e-300))
        eager = worst.frobenius_yardstick
        print(f"error against float64: {{worst.frobenius:.3g}} on {{worst.distribution}} data, eager's {{eager:.3g}}")
    if outcome.time_ms:
        times = ", ".join(f"{{name}} {{ms:.4f}} ms" for name, ms in (("kernel", outcome.time_ms), *outcome.baselines_ms))
        print(f"{{times}}, floor {{outcome.floor_ms:.4f}} ms, constants {{dict(outcome.constants)}}")
    bound = f"the error may be {{FROBENIUS_RATIO}} times eager's, or one unit in the last place (docs/design.md, Acceptance)"
    if outcome.status.is_correct:
        print(f"PASS: {{bound}}")
    else:
        print(f"FAIL: {{outcome.status}}: {{outcome.detail}}; {{bound}}")
    return outcome.status.is_correct


if __name__ == "__main__":
    if CONSTANTS is not None:
        run()
    sys.exit(0 if "--run-only" in sys.argv or check() else 1)
'''
