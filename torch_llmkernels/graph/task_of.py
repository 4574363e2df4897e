"""A region's canonical task: what it computes, independent of how the graph around it was written."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import fx

from torch_llmkernels.errors import TaskError
from torch_llmkernels.graph.calls import (
    COMMUTATIVE,
    arguments,
    canonical_op,
    is_identity,
    is_tensor,
    literal_of,
    op_name,
    shape,
    unaliased,
)
from torch_llmkernels.graph.ignored import ignored_arguments
from torch_llmkernels.graph.regions import Region
from torch_llmkernels.graph.rows import Rows, rows_of
from torch_llmkernels.graph.sizes import Sizes
from torch_llmkernels.task import Node, Numerics, Task, TensorSpec, encode_literal

_INLINE = frozenset({
    "half_to_float", "transposed", "output_padding", "alpha", "beta", "output_mask", "threshold", "approximate", "dropout_p",
    "compute_log_sumexp", "return_debug_mask", "max_q", "max_k", "grad_input_mask", "N", "C", "HxW", "bias_sizes", "keepdim",
    "exponent", "momentum", "train", "self_is_result",
})  # fmt: skip
"""Arguments that stay in the program: a pattern fixes them, or the shapes of the tensors say the same."""

_PRODUCTS = ("aten.mm.default", "aten.addmm.default", "aten.bmm.default", "aten.baddbmm.default")


@dataclasses.dataclass(frozen=True, eq=False)
class RegionTask:
    """A region with its task.

    Attributes:
        task: What the region computes.
        region: Where it is.
        inputs: The graph nodes of `task.inputs`, in their order; a node may occur twice.
        outputs: The graph nodes of `task.outputs`, in their order.
        symbols: For each of `task.symbols` a graph node that holds its value, or None if no node holds just that.
        views: Inputs and outputs that the task sees in another shape than the graph -> their (fake) value in that shape.
    """

    task: Task
    region: Region
    inputs: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    symbols: tuple[fx.Node | None, ...]
    views: Mapping[fx.Node, torch.Tensor] = dataclasses.field(default_factory=dict)

    def value(self, node: fx.Node) -> torch.Tensor:
        """The (fake) value of an input or output as the task sees it."""
        return self.views.get(node, node.meta["val"])


def task_of(region: Region, *, constant: Collection[fx.Node] = frozenset()) -> RegionTask:
    """The canonical task of a region, under the precision flags in force now.

    Args:
        region: From `find_regions`.
        constant: Graph nodes whose value never changes while the compiled graph lives (frozen parameters).

    Raises:
        TaskError: if the region has no canonical encoding: an argument or a size expression outside of the task language.
    """
    nodes = [n for _, n in (*region.inputs, *region.outputs)] + list(region.nodes)
    rows = rows_of(region)
    views = rows.values if rows else {}
    values = {n: views.get(n, n.meta["val"]) for n in nodes if is_tensor(n)}
    sizes = Sizes(list(values.values()), [values[n] for _, n in region.inputs])
    inputs = tuple(_spec(role, values[node], sizes) for role, node in region.inputs)
    outputs = tuple(_spec(role, values[node], sizes) for role, node in region.outputs)
    program = _Program(region, sizes, rows)
    results = tuple(program.value(node) for _, node in region.outputs)
    task = Task(
        signature=region.signature,
        program=tuple(program.nodes),
        inputs=inputs,
        outputs=outputs,
        results=results,
        params=tuple(sorted(program.params.items())),
        numerics=_numerics(region, program),
        device=region.outputs[0][1].meta["val"].device.type,
        symbols=sizes.symbols(),
        constant=tuple(role for role, node in region.inputs if node in constant),
    )
    tensors = [tuple(n for _, n in group) for group in (region.inputs, region.outputs)]
    return RegionTask(task, region, *tensors, sizes.sources(region.nodes[0].graph), views)


def _spec(role: str, value: torch.Tensor, sizes: Sizes) -> TensorSpec:
    dtype = str(value.dtype).removeprefix("torch.")
    return TensorSpec(role, dtype, tuple(map(sizes.dim, value.shape)), tuple(map(sizes.dim, value.stride())))


class _Program:
    """The calls in the order in which the outputs need them (depth first, arguments in schema order)."""

    def __init__(self, region: Region, sizes: Sizes, rows: Rows | None) -> None:
        self.nodes: list[Node] = []
        self.params: dict[str, Any] = {}
        self._region, self._sizes, self._rows = region, sizes, rows
        self._inside = set(region.nodes)
        self._names: dict[fx.Node, str] = {}

    def value(self, node: fx.Node) -> str:
        """The name of a node's value in the program; the calls it needs are appended first."""
        if node in self._names:
            return self._names[node]
        if is_identity(node) or (self._rows and self._rows.is_dropped(node)):
            source = node.args[0]
            self._names[node] = self.value(source) if source in self._inside else self._operand(node, "self", source)
            return self._names[node]
        if op_name(node) == "getitem":
            op, args = "getitem", ({"v": self.value(node.args[0])}, node.args[1])  # type: ignore[arg-type]
        else:
            op, args = self._call(node)
        self._names[node] = f"n{len(self.nodes)}"
        self.nodes.append(Node(self._names[node], op, args))
        return self._names[node]

    def _call(self, node: fx.Node) -> tuple[str, tuple[Any, ...]]:
        op, given = _rewritten(node, arguments(node), self._region.roles)
        given |= {name: given[other] if other else None for name, other in ignored_arguments(node).items()}
        names = list(given)
        if op in COMMUTATIVE and self._region.first.get(node) == names[1]:
            given = {names[0]: given[names[1]], names[1]: given[names[0]], **{n: given[n] for n in names[2:]}}
            names[:2] = names[1], names[0]
        pairs = zip(names, given.values(), strict=True)
        return op, tuple(self._encoded(node, name, value) for name, value in pairs)

    def _encoded(self, node: fx.Node, name: str, value: Any) -> Any:
        if isinstance(value, fx.Node) and literal_of(value) is not None:
            value = _scalar(node, value)
        if is_tensor(value):
            return {"v": self._operand(node, name, value)}
        if isinstance(value, fx.Node) and value.meta.get("val", value) is None:
            return None  # an output that the operator leaves undefined
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return {"device": value.type}
        if value is None:
            return None
        if name == "size":
            value = list(node.meta["val"].shape)  # -1 spelled out
        if name == "dim" and self._rows:
            value = self._rows.dim(node, value)
        encoded = [self._size(v) for v in value] if isinstance(value, (list, tuple)) else self._size(value)
        symbolic = isinstance(encoded, dict) or (isinstance(encoded, list) and any(isinstance(v, dict) for v in encoded))
        if symbolic or name in _INLINE:
            return encoded if symbolic else encode_literal(value)
        return {"p": self._lift(node, name, tuple(value) if isinstance(value, list) else value)}

    def _size(self, value: Any) -> Any:
        if isinstance(value, fx.Node):
            value = value.meta.get("val", value)
        if isinstance(value, torch.SymInt):
            dim = self._sizes.dim(value)
            return dim if isinstance(dim, int) else {"s": dim}
        if value is None or isinstance(value, (bool, int, float, str)):
            return value
        raise TaskError(f"{self._region.signature}: an argument of type {type(value).__name__} has no encoding")

    def _operand(self, node: fx.Node, name: str, value: fx.Node) -> str:
        if value in self._inside:
            return self.value(value)
        role = self._region.roles.get((node, name))
        by_node = {n: r for r, n in reversed(self._region.inputs)}
        return role if role else by_node[unaliased(value)]

    def _lift(self, node: fx.Node, name: str, value: Any) -> str:
        """The literal as a parameter of the task; returns the parameter's name."""
        prefix = self._region.prefixes[node]
        wanted = self._region.roles.get((node, name)) or (f"{prefix}_{name}" if prefix else name)
        chosen, count = wanted, 0
        while chosen in self.params:
            count += 1
            chosen = f"{wanted}_{count}"
        self.params[chosen] = value
        return chosen


def _scalar(node: fx.Node, operand: fx.Node) -> int | float | bool:
    """What a scalar-making operand of a call holds: a float in a floating call, as a literal is, else of the operand's dtype."""
    literal, dtype = literal_of(operand), operand.meta["val"].dtype
    assert literal is not None
    if dtype.is_floating_point or node.meta["val"].is_floating_point():
        return float(literal)
    return bool(literal) if dtype is torch.bool else int(literal)


def _rewritten(
    node: fx.Node, given: dict[str, Any], roles: dict[tuple[fx.Node, str], str]
) -> tuple[str, dict[str, Any]]:
    """The call with shape-dependent defaults filled in, spelled canonically where several spellings agree bit for bit."""
    op = canonical_op(node)
    if op == "aten.div.Tensor" and roles.get((node, "other")) == "scale":
        return "aten.mul.Tensor", {"self": given["self"], "other": 1.0 / literal_of(given["other"])}  # type: ignore[operator]
    if op == "aten.where.self":
        scalars = [n for n in ("self", "other") if literal_of(given[n]) is not None]
        op = {"self": "aten.where.ScalarSelf", "other": "aten.where.ScalarOther"}[scalars[0]] if len(scalars) == 1 else op
    if op == "aten._native_batch_norm_legit_no_training.default":
        given = {**given, "momentum": 0.0}  # not read in evaluation
    if op == "aten.leaky_relu_backward.default":
        given = {**given, "self_is_result": False}  # only the sign of `self` counts, which the result of an in-place call has too
    if op == "aten.view.default" and (node, "self") not in roles and _is_copy(given["self"]):
        return "aten.reshape.default", {"self": given["self"].args[0], "shape": list(node.meta["val"].shape)}
    if "scale" in given and given["scale"] is None and "query" in given:
        head = shape(given["query"])[-1]
        given = {**given, "scale": 1.0 / math.sqrt(head) if isinstance(head, int) else None}
    if op == "aten._fused_rms_norm.default" and given["eps"] is None:
        double = given["input"].meta["val"].dtype is torch.float64
        given = {**given, "eps": torch.finfo(torch.float64 if double else torch.float32).eps}  # of the dtype it computes in
    return op, given


def _is_copy(value: fx.Node) -> bool:
    """Whether a value is a copy that lays its elements out one behind the other, which a view needs."""
    return op_name(value) == "aten.clone.default" and value.kwargs.get("memory_format") is torch.contiguous_format


def _numerics(region: Region, program: _Program) -> Numerics:
    """The precision flags that the program reads; the others keep their defaults, so that they do not split keys."""
    ops = [n.op for n in program.nodes]
    value = region.inputs[0][1].meta["val"]
    single, cuda = value.dtype is torch.float32, value.device.type == "cuda"
    products = any(op in _PRODUCTS or "attention" in op for op in ops)
    convolution = any(op.startswith("aten.convolution") for op in ops)
    backends = torch.backends
    half = value.dtype in (torch.float16, torch.bfloat16)
    reduced = backends.cuda.matmul.allow_fp16_reduced_precision_reduction if value.dtype is torch.float16 else (
        backends.cuda.matmul.allow_bf16_reduced_precision_reduction
    )
    return Numerics(
        matmul=_precision((backends.cuda if cuda else backends.mkldnn).matmul.fp32_precision) if products and single else "ieee",
        conv=_precision((backends.cudnn if cuda else backends.mkldnn).conv.fp32_precision) if convolution and single else "ieee",
        reduced_precision_reduction=bool(_first(reduced)) if products and half and cuda else False,
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )


def _precision(name: str) -> str:
    """torch says `none` where nothing was chosen: that computes in full precision."""
    return "ieee" if name == "none" else name


def _first(flag: Any) -> Any:
    """Some releases answer with a pair (allow, allow split-k)."""
    return flag[0] if isinstance(flag, tuple) else flag
