"""Numbers and tasks in the words that tables, logs and errors use."""

from __future__ import annotations

from torch_llmkernels.task import Task

_SHORT = {"float64": "f64", "float32": "f32", "float16": "f16", "bfloat16": "bf16", "int64": "i64", "int32": "i32"}


def shapes_of(task: Task) -> str:
    """The inputs in words: `16x1024 f32, 1024 f32`."""
    return ", ".join(f"{'x'.join(map(str, t.shape)) or 'scalar'} {_SHORT.get(t.dtype, t.dtype)}" for t in task.inputs)


def counted(count: int, noun: str) -> str:
    """`1 graph`, `2 graphs`: a number and what it counts."""
    return f"{count} {noun}{'' if count == 1 else 's'}"
