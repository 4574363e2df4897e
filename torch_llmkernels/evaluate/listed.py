"""What a kernel's header promises beside the task at hand: its other dtypes and signatures, compiled to see whether they build.

A task of another dtype or signature is derived from the one at hand, by the names that tensors and parameters have in all tasks:
good enough to compile for, not to run. Where that is not possible, or the header's own conditions exclude it, nothing is asked.
"""

from __future__ import annotations

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

from torch_llmkernels.errors import CompileError, NotApplicable
from torch_llmkernels.evaluate.candidate import COMPILE_THREADS, Binaries
from torch_llmkernels.kernels.launch import main_dtype
from torch_llmkernels.kernels.targets import build
from torch_llmkernels.task import Task, TensorSpec

if TYPE_CHECKING:
    from torch_llmkernels.kernels.device import DeviceFacts
    from torch_llmkernels.kernels.source import Kernel
    from torch_llmkernels.kernels.targets import Target

LOG_LINES = 10
"""Lines of the compiler's log that a dtype or signature gets."""

_STATISTICS = ("mean", "rstd", "logsumexp")  # float32 whatever the half precision beside them
_PLAIN = ("relu", "silu", "gelu", "gelu_tanh", "hardswish", "sigmoid", "tanh", "softmax", "log_softmax")  # nothing of their own
_TENSORS = {
    "add": ("residual",), "mul": ("gate",), "max_pool2d": ("indices",),
    "batch_norm": ("bn_weight", "bn_bias", "bn_mean", "bn_var"),
}  # fmt: skip
_PARAMETERS = {"batch_norm": {"batch_norm_eps": 1e-5}, "scale": {"scale": 0.125}}
_ADDED = (*_PLAIN, "add", "mul", "batch_norm", "scale")
_DROPPED = (*_ADDED, "max_pool2d")


def listed_tasks(kernel: Kernel, task: Task) -> list[tuple[str, Task]]:
    """For each other dtype, and each other signature, that the header lists: what it is, and a task to compile for."""
    own = main_dtype(task)
    found = [(f"dtype {dtype}", _as_dtype(task, own, dtype)) for dtype in kernel.dtypes if dtype != own]
    for signature in kernel.implements:
        other = _as_signature(task, signature) if signature not in (task.signature, task.signature_key) else None
        found += [(f"signature {signature}", other)] if other else []
    return [(label, other) for label, other in found if kernel.why_not(other) is None]


def _as_dtype(task: Task, own: str, dtype: str) -> Task:
    """The task with its main dtype replaced."""

    def changed(spec: TensorSpec) -> TensorSpec:
        kept = spec.dtype != own or (spec.name in _STATISTICS and dtype != "float64")
        return spec if kept else dataclasses.replace(spec, dtype=dtype)

    return dataclasses.replace(task, inputs=tuple(map(changed, task.inputs)), outputs=tuple(map(changed, task.outputs)))


def _as_signature(task: Task, signature: str) -> Task | None:
    """The task under another signature whose main operator is the same; None where a stage's tensors are not known here."""
    before, after = task.signature.split("."), signature.split(".")
    dropped, added = [s for s in before if s not in after], [s for s in after if s not in before]
    if not set(added) <= set(_ADDED) or not set(dropped) <= set(_DROPPED):
        return None
    gone = {name for stage in dropped for name in _TENSORS.get(stage, ())}
    inputs = [t for t in task.inputs if t.name not in gone]
    inputs += [_tensor(task, stage, name) for stage in added for name in _TENSORS.get(stage, ())]
    outputs = tuple(t for t in task.outputs if t.name not in gone)
    params = {k: v for k, v in task.params if not any(k == s or k.startswith(f"{s}_") for s in dropped)}
    for stage in added:
        params |= _PARAMETERS.get(stage, {})
    return dataclasses.replace(
        task, signature=signature, inputs=tuple(inputs), outputs=outputs, params=tuple(sorted(params.items()))
    )


def _tensor(task: Task, stage: str, name: str) -> TensorSpec:
    """A tensor that a stage reads: one value per channel for batch normalisation, else of the output's shape."""
    like = task.outputs[0]
    if stage == "batch_norm":
        return TensorSpec(name, main_dtype(task), (*like.shape, 1)[1:2], (1,))
    return dataclasses.replace(like, name=name)


def check_listed(kernel: Kernel, task: Task, target: Target, facts: DeviceFacts, store: Binaries | None = None) -> None:
    """Compile for everything else that the header lists, with the first constants that `where` admits.

    Raises:
        CompileError: naming each dtype and signature that does not compile; its log holds the compiler's words for each.
        ToolchainMissing: if there is no compiler.
    """
    failed = compile_listed(kernel, task, target, facts, store)
    if failed:
        named = ", ".join(label for label, _ in failed)
        logs = [f"{label}: {error}\n{_head(error.log)}".strip() for label, error in failed]
        raise CompileError(
            f"{kernel.name}: compiles for the task but not for {named}, which its header lists; mend the source, or list less",
            "\n".join(logs),
        )


def compile_listed(
    kernel: Kernel, task: Task, target: Target, facts: DeviceFacts, store: Binaries | None = None
) -> list[tuple[str, CompileError]]:
    """What does not compile (`dtype bfloat16`, `signature linear.relu`), with the compiler's error; see `check_listed`."""

    def attempt(case: tuple[str, Task]) -> tuple[str, CompileError] | None:
        label, other = case
        try:
            for constants in kernel.tunings(other, facts)[:1]:
                build(kernel, other, constants, target, facts, store)
        except CompileError as error:
            return label, error
        except NotApplicable:  # a macro that has no value for a derived task
            pass
        return None

    with ThreadPoolExecutor(COMPILE_THREADS) as pool:
        return [failure for failure in pool.map(attempt, listed_tasks(kernel, task)) if failure]


def _head(log: str) -> str:
    """The first errors of a log: one dtype's are mostly the next one's too."""
    lines = log.splitlines()
    first = next((i for i, line in enumerate(lines) if "error" in line.lower()), 0)
    return "\n".join(lines[first : first + LOG_LINES])
