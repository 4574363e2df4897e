"""A task at smaller sizes, for tools under which a kernel runs a thousand times slower.

The sizes of a static task are numbers in its inputs' shapes and in its program (`normalized_shape`, `size`). They are cut in
groups that must stay equal: where the program's operators check their shapes, running it on meta tensors tells which those are;
where they do not, every size of the same value is one group. Output shapes follow from running the program, strides keep their
order and gaps.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from torch_llmkernels.evaluate.buffers import dtype_of, span_bytes
from torch_llmkernels.evaluate.roofline import count_flops
from torch_llmkernels.program import module_of, operator_of
from torch_llmkernels.task import Node, Task, TensorSpec

MOST_BYTES, MOST_FLOPS = 8 << 20, 4 << 30
"""Inputs and outputs, and operations of products, that every tool gets through in seconds."""
STUCK_BYTES = 8 * MOST_BYTES
"""What is still run where no further size can be cut."""
MOST_SLOTS = 10  # of one value, up to which every subset is tried
_CHECKED = frozenset((
    "mm", "addmm", "bmm", "baddbmm", "convolution", "relu", "gelu", "silu", "sigmoid", "tanh", "add", "sub", "mul", "div",
    "native_layer_norm", "native_group_norm", "native_group_norm_backward", "_softmax", "_safe_softmax", "_log_softmax",
    "max_pool2d_with_indices", "getitem",
))  # fmt: skip
"""Operators that refuse inputs whose sizes do not belong together, on meta tensors too."""
_SIZES = frozenset(("normalized_shape", "size", "shape", "input_size", "N", "C"))

Slot = tuple[str, Any, int]
"""Where a size stands: (`input`, name, dimension), (`param`, name, index) or (`arg`, (node, argument), index or -1)."""


def cut(task: Task, admits: Callable[[Task], bool]) -> Task | None:
    """The static task itself if it is small; else with every dimension cut as far as that takes, tails included.

    A cut size is, where `admits` agrees, no multiple of any tile: one more than a power of two, or else a few more. A size that
    cannot be halved gives up a few elements.

    Args:
        task: Static.
        admits: Whether the kernel can serve a task.

    Returns:
        None if what `admits` lets through is still too large.
    """
    if _small(task):
        return task
    current, stuck = task, set[tuple[Slot, ...]]()
    groups = groups_of(task)
    while not _small(current):
        sizes = _sizes(current)
        open_groups = [g for g in groups if g not in stuck and sizes[g[0]] > 2]
        if not open_groups:
            break
        group = max(open_groups, key=lambda g: sizes[g[0]])
        smaller = _first(current, group, _halves(sizes[group[0]]), admits)
        stuck |= {group} if smaller is None else set()
        current = smaller or current
    if span(current) > STUCK_BYTES:
        return None
    sizes = _sizes(task)
    for group in (g for g in groups if _sizes(current)[g[0]] == sizes[g[0]]):
        current = _first(current, group, _tails(sizes[group[0]]), admits) or current
    return current


def groups_of(task: Task) -> list[tuple[Slot, ...]]:
    """Sizes that must stay equal, each group with at least one dimension of an input; sizes of 1 are left out."""
    by_value: dict[int, list[Slot]] = {}
    for slot, value in _sizes(task).items():
        by_value.setdefault(value, []).append(slot)
    checked = all(node.op.removeprefix("aten.").partition(".")[0] in _CHECKED for node in task.program)
    found = []
    for value, slots in by_value.items():
        if value > 1:
            found += _split(task, value, slots) if checked and len(slots) <= MOST_SLOTS else [tuple(slots)]
    return [group for group in found if any(kind == "input" for kind, _, _ in group)]


def _split(task: Task, value: int, slots: list[Slot]) -> list[tuple[Slot, ...]]:
    """The smallest sets of slots that can change without the others, beginning with the first slot's."""
    groups = []
    while slots:
        first, rest = slots[0], slots[1:]
        subsets = itertools.chain.from_iterable(itertools.combinations(rest, count) for count in range(len(rest) + 1))
        alone = next((s for s in subsets if with_sizes(task, dict.fromkeys((first, *s), value + 1))), tuple(rest))
        groups.append((first, *alone))
        slots = [slot for slot in rest if slot not in alone]
    return groups


def span(task: Task) -> int:
    """Bytes of the static task's inputs and outputs."""
    return sum(span_bytes(t, dtype_of(t).itemsize) for t in (*task.inputs, *task.outputs))


def _small(task: Task) -> bool:
    return span(task) <= MOST_BYTES and count_flops(task)[0] <= MOST_FLOPS


def _first(
    task: Task, group: tuple[Slot, ...], candidates: Iterator[int], admits: Callable[[Task], bool]
) -> Task | None:
    made = (with_sizes(task, dict.fromkeys(group, size)) for size in candidates)
    return next((t for t in made if t is not None and admits(t)), None)


def _halves(size: int) -> Iterator[int]:
    """Sizes of about a half, a quarter, ... of `size`; the least round of each first."""
    power = 1 << ((size - 1) // 2).bit_length() - 1 if size > 2 else 1
    while power > 1:
        yield from (power + tail for tail in (1, 2, 4, 8, 16, 32, 64) if tail < power)
        yield power
        power //= 2


def _tails(size: int) -> Iterator[int]:
    """Sizes a few elements below a `size` worth a tile."""
    return (size - tail for tail in (1, 2, 4, 8, 16, 32, 64) if 16 * tail <= size)


def _sizes(task: Task) -> dict[Slot, int]:
    """Every size that stands in the task."""
    found: dict[Slot, int] = {}
    for spec in task.inputs:
        found |= {("input", spec.name, dim): int(size) for dim, size in enumerate(spec.shape)}
    sizes = _size_parameters(task)
    for name, value in task.params:
        if name in sizes and isinstance(value, tuple):
            found |= {("param", name, index): int(size) for index, size in enumerate(value)}
    for number, node in enumerate(task.program):
        for index, values in _size_arguments(node):
            listed = isinstance(values, (list, tuple))
            found |= {("arg", (number, index), i if listed else -1): v for i, v in enumerate(values if listed else [values])}
    return found


def _size_parameters(task: Task) -> set[str]:
    """The parameters that stand where a size is an argument, whatever they are called."""
    values = [value for node in task.program for _, value in _where_sizes_stand(node)]
    return {value["p"] for value in values if isinstance(value, dict) and "p" in value}


def _size_arguments(node: Node) -> Iterator[tuple[int, Any]]:
    """Arguments that are literal sizes: their index and value."""
    for index, value in _where_sizes_stand(node):
        values = value if isinstance(value, (list, tuple)) else [value]
        if values and all(type(v) is int for v in values):
            yield index, value


def _where_sizes_stand(node: Node) -> Iterator[tuple[int, Any]]:
    """Arguments that the schema calls by the name of a size: their index and value."""
    if node.op == "getitem":
        return
    schema = operator_of(node.op)._schema.arguments
    for index, (argument, value) in enumerate(zip(schema, node.args, strict=False)):
        if argument.name in _SIZES:
            yield index, value


def with_sizes(task: Task, changes: Mapping[Slot, int]) -> Task | None:
    """The task with some sizes changed and outputs to match; None if the program does not run at these sizes."""
    inputs = tuple(_resized(t, [changes.get(("input", t.name, d), int(s)) for d, s in enumerate(t.shape)]) for t in task.inputs)
    params = tuple(
        (name, tuple(changes.get(("param", name, i), v) for i, v in enumerate(value)) if isinstance(value, tuple) else value)
        for name, value in task.params
    )
    shapes = {t.name: t.shape for t in inputs}
    program = tuple(_derived(_reargued(number, node, changes), shapes) for number, node in enumerate(task.program))
    changed = dataclasses.replace(task, inputs=inputs, params=params, program=program)
    shapes = _output_shapes(changed)
    if shapes is None or any(len(shape) != len(t.shape) for shape, t in zip(shapes, task.outputs, strict=True)):
        return None
    outputs = tuple(_resized(t, shape) for t, shape in zip(task.outputs, shapes, strict=True))
    return dataclasses.replace(changed, outputs=outputs)


def _reargued(number: int, node: Node, changes: Mapping[Slot, int]) -> Node:
    args = list(node.args)
    for index, value in _size_arguments(node):
        place = (number, index)
        if isinstance(value, (list, tuple)):
            args[index] = [changes.get(("arg", place, i), v) for i, v in enumerate(value)]
        else:
            args[index] = changes.get(("arg", place, -1), value)
    return dataclasses.replace(node, args=tuple(args))


def _derived(node: Node, shapes: Mapping[str, tuple[Any, ...]]) -> Node:
    """The call with the literals that repeat its input's shape: group norm and its backward are told N, C and H * W."""
    if "attention_backward" in node.op:
        return _with_lengths(node, shapes)
    tensors = {"aten.native_group_norm.default": (0, 3), "aten.native_group_norm_backward.default": (1, 5)}.get(node.op)
    if tensors is None or node.args[tensors[0]]["v"] not in shapes:
        return node
    batch, channels, *image = shapes[node.args[tensors[0]]["v"]]
    first = tensors[1]
    return dataclasses.replace(node, args=(*node.args[:first], batch, channels, math.prod(image), *node.args[first + 3 :]))


def _with_lengths(node: Node, shapes: Mapping[str, tuple[Any, ...]]) -> Node:
    """An attention's backward with the numbers of queries and keys that it is told beside its tensors."""
    given = dict(zip([a.name for a in operator_of(node.op)._schema.arguments], node.args, strict=False))
    for length, of in (("max_q", "query"), ("max_k", "key")):
        if length in given and given[of]["v"] in shapes:
            given[length] = shapes[given[of]["v"]][2]
    return dataclasses.replace(node, args=tuple(given.values()))


def _resized(spec: TensorSpec, shape: list[int]) -> TensorSpec:
    """The spec at another shape: the same order of dimensions in memory, the same gaps between them."""
    strides, expected, needed = [0] * len(shape), 1, 1
    for dim in sorted(range(len(shape)), key=lambda d: (int(spec.stride[d]), int(spec.shape[d]) > 1, -d)):
        old = int(spec.stride[dim])
        if old:
            strides[dim] = needed + max(0, old - expected) if int(spec.shape[dim]) > 1 else needed
            expected = max(expected, old * int(spec.shape[dim])) if int(spec.shape[dim]) > 1 else expected
            needed = strides[dim] * shape[dim]
    return dataclasses.replace(spec, shape=tuple(shape), stride=tuple(strides))


def _biases_fit(task: Task) -> bool:
    """Whether every convolution's bias has a value per output channel, which the operator does not check on meta tensors."""
    shapes = {t.name: t.shape for t in task.inputs}
    calls = [node.args[1:3] for node in task.program if node.op.startswith("aten.convolution.")]
    pairs = [(weight["v"], bias["v"]) for weight, bias in calls if bias is not None]
    return all(shapes[b][0] == shapes[w][0] for w, b in pairs if w in shapes and b in shapes)


def _output_shapes(task: Task) -> list[list[int]] | None:
    if not _biases_fit(task):
        return None
    inputs = [torch.empty([int(d) for d in t.shape], dtype=dtype_of(t), device="meta") for t in task.inputs]
    try:
        with torch.no_grad():
            return [list(o.shape) for o in module_of(task)(*inputs)]
    except (RuntimeError, NotImplementedError, ValueError, IndexError):  # sizes that do not belong together
        return None
