"""Row-wise regions as matrices: the leading dimensions of every tensor merged into one.

LayerNorm of [batch, time, width] does what LayerNorm of [batch * time, width] does, and a linear layer is `mm` of a matrix
whatever its caller's tensor looked like. So that one kernel, one verification and one record serve all spellings, the task of
such a region is the two-dimensional one wherever every tensor's strides allow it; views between its calls are then no part of it.
"""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import fx

from torch_llmkernels.graph.calls import (
    arguments,
    canonical_op,
    is_identity,
    is_tensor,
    nodes_in,
    op_name,
    returns_several,
    shape,
    size,
    unaliased,
)
from torch_llmkernels.graph.patterns import POINTWISE
from torch_llmkernels.graph.regions import Region
from torch_llmkernels.task import Task

_RESHAPES = ("aten.view.default", "aten._unsafe_view.default", "aten.reshape.default")
_NORMS = ("aten.native_layer_norm.default", "aten.native_layer_norm_backward.default", "aten._fused_rms_norm.default",
          "aten._fused_rms_norm_backward.default")  # fmt: skip
_OVER_ONE_DIM = ("aten._softmax.default", "aten._safe_softmax.default", "aten._log_softmax.default",
                 "aten._softmax_backward_data.default", "aten._log_softmax_backward_data.default")  # fmt: skip
_PRODUCTS = ("aten.mm.default", "aten.addmm.default")
_LOSSES = ("aten.nll_loss_forward.default", "aten.nll_loss_backward.default")
_ELEMENTWISE = (POINTWISE - {"aten.unsqueeze.default", "aten.expand.default", "aten.squeeze.dims"}) | {
    f"aten.{name}_backward.default" for name in ("threshold", "gelu", "silu", "hardswish", "leaky_relu", "sigmoid", "tanh")
}


@dataclasses.dataclass(frozen=True, eq=False)
class Rows:
    """How a region's tensors look as matrices.

    Attributes:
        columns: How many trailing dimensions stay as they are.
        values: Tensor node, inside the region or an input, -> its value with the leading dimensions merged (a fake view).
    """

    columns: int
    values: Mapping[fx.Node, torch.Tensor]

    def is_dropped(self, node: fx.Node) -> bool:
        """Whether a call of the region only reshapes its rows."""
        return op_name(node) in _RESHAPES

    def dim(self, node: fx.Node, value: Any) -> Any:
        """A `dim` argument, counted in the merged tensor."""
        rank = next(n.meta["val"].ndim for n in node.all_input_nodes if is_tensor(n) and unaliased(n) in self.values)
        shift = rank - 1 - self.columns
        return [d - shift for d in value] if isinstance(value, (list, tuple)) else value - shift


def rows_of(region: Region) -> Rows | None:
    """The region's tensors as matrices; None where it is not row-wise, has nothing to merge, or a stride forbids it."""
    columns = _columns(region)
    if columns is None:
        return None
    found = _row_tensors(region, columns)
    if found is None or not (any(n.meta["val"].ndim > 1 + columns for n in found) or any(map(_is_reshape, region.nodes))):
        return None
    outputs = {n for _, n in region.outputs}
    held = outputs | {n for _, n in region.inputs}
    values = {n: _merged(n.meta["val"], columns, n in held, n in outputs) for n in found}
    merged = {n: v for n, v in values.items() if v is not None}
    return Rows(columns, merged) if len(merged) == len(values) else None


def _is_reshape(node: fx.Node) -> bool:
    return op_name(node) in _RESHAPES


def _columns(region: Region) -> int | None:
    """Over how many trailing dimensions its calls work; None if one is not row-wise, or they differ."""
    found = set()
    for node in region.nodes:
        if op_name(node) == "getitem" or _is_reshape(node) or is_identity(node) or canonical_op(node) in _ELEMENTWISE:
            continue
        found.add(_columns_of(node))
    return found.pop() if len(found) == 1 else None


def _columns_of(node: fx.Node) -> int | None:
    op, given = op_name(node), arguments(node)
    if op in _NORMS:
        return len(given["normalized_shape"])
    if op in _PRODUCTS or op in _LOSSES:
        return 1
    if op in _OVER_ONE_DIM:
        rank = next(v.meta["val"].ndim for v in given.values() if is_tensor(v))
        return 1 if given["dim"] == rank - 1 else None
    if op == "aten.mean.dim" and given["keepdim"] and given["dim"]:
        rank, count = given["self"].meta["val"].ndim, len(given["dim"])
        return count if given["dim"] == list(range(rank - count, rank)) else None
    return None


def _row_tensors(region: Region, columns: int) -> set[fx.Node] | None:
    """The tensors that have rows, if every call keeps its rows apart; None if rows meet, or some tensor has other ones."""
    rows: set[fx.Node] = set()
    whole: set[fx.Node] = set()
    for node in region.nodes:
        leading = set()
        for value, has_rows in _tensors(node, columns):
            (rows if has_rows else whole).add(unaliased(value))
            if has_rows:
                leading.add(shape(value)[:-columns])
        if len(leading) > 1 and not _is_reshape(node):
            return None
        if _is_reshape(node) and shape(node)[-columns:] != shape(node.args[0])[-columns:]:  # type: ignore[arg-type]
            return None
    counts = {size(math.prod(n.meta["val"].shape[:-columns])) for n in rows}
    return rows if len(counts) == 1 and not rows & whole else None


def _tensors(node: fx.Node, columns: int) -> Iterator[tuple[fx.Node, bool]]:
    """Every tensor that a call reads or makes, and whether it has rows: more dimensions than columns, and no right factor."""
    if not returns_several(node):
        yield node, node.meta["val"].ndim > columns
    if op_name(node) == "getitem":
        return
    for name, value in arguments(node).items():
        for read in nodes_in(value):
            if is_tensor(read):
                factor = op_name(node) in _PRODUCTS and name == "mat2"
                yield read, read.meta["val"].ndim > columns and not factor


def _merged(value: torch.Tensor, columns: int, held: bool, made: bool) -> torch.Tensor | None:
    """The tensor with its leading dimensions as one, or None if its strides forbid it.

    Args:
        value: A fake tensor.
        columns: How many trailing dimensions stay.
        held: Whether something outside of the region holds it, so that its strides count.
        made: Whether the region makes it: viewed back, it must have the strides that the graph promises.
    """
    leading = value.ndim - columns
    if leading == 1:
        return value
    if held and not _steps_evenly(value.shape[:leading], value.stride()[:leading]):
        return None
    with torch.no_grad():
        shown = value if held else torch.empty_like(value, memory_format=torch.contiguous_format)
        merged = shown.view(math.prod(value.shape[:leading]), *value.shape[leading:])
        if made and not _same(merged.view(value.shape).stride(), value.stride()):
            return None
    return merged


def _steps_evenly(sizes: tuple[Any, ...], strides: tuple[Any, ...]) -> bool:
    """Whether one stride walks over all of these dimensions, for every value of their symbols."""
    kept = [(n, s) for n, s in zip(sizes, strides, strict=True) if not _same([n], [1])]
    return all(_same([outer], [n * inner]) for (_, outer), (n, inner) in itertools.pairwise(kept))


def why_not_merged(task: Task) -> str:
    """Why the rows of a norm's or a softmax's task are no matrix, as far as strides forbid it: one line, or empty."""
    static = task.at()
    columns = _columns_of_task(static)
    if columns is None:
        return ""
    for spec in (*static.inputs, *static.outputs):
        leading = len(spec.shape) - columns
        if leading > 1 and not _steps_evenly(spec.shape[:leading], spec.stride[:leading]):
            return f"rows cannot be merged: {spec.name} of shape {spec.shape} has strides {spec.stride}"
    return ""


def _columns_of_task(task: Task) -> int | None:
    """Over how many trailing dimensions the first norm or softmax of a static task works; None if it has none."""
    ranks = {spec.name: len(spec.shape) for spec in task.inputs}
    for node in task.program:
        given = [task.param[arg["p"]] if isinstance(arg, dict) and "p" in arg else arg for arg in node.args]
        if node.op in _NORMS:
            return next((len(value) for value in given if isinstance(value, (list, tuple))), None)
        if node.op in _OVER_ONE_DIM:
            dim, rank = next((v for v in given if type(v) is int), None), max(ranks.values())
            return 1 if dim in (-1, rank - 1) else None
    return None


def _same(left: Any, right: Any) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    return all(statically_known_true(a == b) for a, b in zip(left, right, strict=True))
