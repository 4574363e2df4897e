"""What values an input may take: the roles that the program's operators give it, and the inputs that others determine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import fx

from torch_llmkernels.evaluate.attention import attention
from torch_llmkernels.evaluate.buffers import dtype_of
from torch_llmkernels.task import Task, TensorSpec

aten = torch.ops.aten

Role = Callable[[list[int], torch.dtype, torch.Generator], torch.Tensor]
"""Makes values of a shape and dtype with a generator, on the generator's device."""


def schema_arguments(target: Any, args: Any, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call by the names in the operator's schema."""
    names = [a.name for a in target._schema.arguments]
    return {**dict(zip(names, args, strict=False)), **kwargs}


def operator_calls(module: fx.GraphModule) -> Iterator[fx.Node]:
    """The nodes of a program that call an operator (not `getitem`)."""
    return (n for n in module.graph.nodes if n.op == "call_function" and isinstance(n.target, torch._ops.OpOverload))


def placeholders(module: fx.GraphModule) -> list[fx.Node]:
    """The inputs' nodes, in input order."""
    return [n for n in module.graph.nodes if n.op == "placeholder"]


def _integers(low: int, high: int) -> Role:
    def generate(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
        return torch.randint(low, max(high, low + 1), shape, generator=g, device=g.device).to(dtype)

    return generate


def _positive(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    return torch.rand(shape, generator=g, device=g.device).mul_(2).add_(0.25)


def _class_targets(classes: int, ignored: int) -> Role:
    """Targets in [0, classes), one in sixteen of them the ignored value; the first is never ignored."""

    def generate(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
        targets = torch.randint(classes, shape, generator=g, device=g.device)
        skip = torch.rand(shape, generator=g, device=g.device) < 1 / 16
        skip.view(-1)[:1] = False
        return torch.where(skip, ignored, targets).to(dtype)

    return generate


def _attention_mask(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Boolean, or additive with -Inf; the first key is visible to every query, so that no row is empty.

    In turns over the first dimension: any numbers and hidden at random, causal, padded at the end (these two 0 where visible, as
    a model's). A kernel that skips what is hidden altogether is so held to being right, and is paid for it as it would be there.
    """
    visible = torch.rand(shape, generator=g, device=g.device) < 0.75
    rows = shape[-2] if len(shape) > 1 else 1
    queries, keys = torch.arange(rows, device=g.device).unsqueeze(-1), torch.arange(shape[-1], device=g.device)
    first = int(torch.randint(3, (), generator=g, device=g.device))
    values = torch.randn(shape, generator=g, device=g.device)
    one = len(shape) < 3
    for batch, shown in enumerate([visible] if one else visible):
        kind = (batch + first) % 3
        if kind == 1 and rows > 1:
            shown.copy_(keys <= queries)
        elif kind == 2:
            shown.copy_(keys < torch.randint(1, max(shape[-1], 2), (), generator=g, device=g.device))
        if kind == 2 or (kind == 1 and rows > 1):
            (values if one else values[batch]).zero_()
    visible[..., 0] = True
    return visible if dtype is torch.bool else values.masked_fill_(~visible, float("-inf"))


def _padding_mask(shape: list[int], dtype: torch.dtype, g: torch.Generator) -> torch.Tensor:
    """Like `_attention_mask`, but one row in eight hides every key."""
    mask = _attention_mask(shape, dtype, g)
    empty = torch.rand([*shape[:-1], 1], generator=g, device=g.device) < 1 / 8
    return mask.masked_fill_(empty, False if dtype is torch.bool else float("-inf"))


def roles(module: fx.GraphModule, task: Task) -> dict[str, Role]:
    """By input name: how its values are bounded by the operators that read it (a static task and its module)."""
    found: dict[str, Role] = {t.name: _positive for t in task.inputs if t.name.endswith(("var", "rstd", "invstd"))}
    empty_rows = any(node.op == "aten._safe_softmax.default" for node in task.program)
    found |= {t.name: _padding_mask if empty_rows else _attention_mask for t in task.inputs if t.name == "mask"}
    specs = dict(zip(placeholders(module), task.inputs, strict=False))
    shapes = _shapes(module, task)
    for node in operator_calls(module):
        bound = schema_arguments(node.target, node.args, node.kwargs)
        for name, arg in bound.items():
            if name == "indices" and isinstance(arg, (list, tuple)):
                ranges = {a: _integers(0, _size(shapes, bound["self"], dim)) for dim, a in enumerate(arg) if a in specs}
                found.update({specs[a].name: role for a, role in ranges.items() if specs[a].dtype != "bool"})
            if isinstance(arg, fx.Node) and arg in specs:
                role = _role_of(node.target, name, bound, specs[arg], shapes)
                found.update({specs[arg].name: role} if role else {})
    return found


def _role_of(
    target: Any, name: str, bound: Mapping[str, Any], spec: TensorSpec, shapes: Mapping[fx.Node, tuple[int, ...]]
) -> Role | None:
    integer = spec.dtype.startswith(("int", "uint"))
    if name in ("running_var", "rstd", "save_invstd", "save_var"):
        return _positive
    if name == "target" and integer:
        return _class_targets(_size(shapes, bound["self"], 1), int(bound.get("ignore_index", -100)))
    if name in ("index", "indices") and integer:
        source = bound.get("self", bound.get("weight"))
        return _integers(0, _size(shapes, source, int(bound.get("dim", 0) or 0)))
    if name in ("attn_mask", "attn_bias"):
        return _attention_mask
    if name == "self" and target in (aten.log.default, aten.sqrt.default, aten.rsqrt.default):
        return _positive
    return None


def calm_inputs(module: fx.GraphModule, task: Task) -> set[str]:
    """Queries and keys of attention backwards: exp(scores - logsumexp) of large scores magnifies the logsumexp's own rounding
    beyond any comparison, so they stay normal."""
    specs = dict(zip(placeholders(module), task.inputs, strict=False))
    found = set()
    for node in operator_calls(module):
        if "attention" in str(node.target) and "backward" in str(node.target):
            bound = schema_arguments(node.target, node.args, node.kwargs)
            found |= {specs[bound[n]].name for n in ("query", "key") if bound[n] in specs}
    return found


def _size(shapes: Mapping[fx.Node, tuple[int, ...]], value: Any, dim: int) -> int:
    """Size of a program value along `dim` (of a vector: its only one); 1 where it is not known."""
    shape = shapes.get(value, ())
    return shape[min(dim, len(shape) - 1)] if shape else 1


def _shapes(module: fx.GraphModule, task: Task) -> dict[fx.Node, tuple[int, ...]]:
    shapes: dict[fx.Node, tuple[int, ...]] = {}

    class Shapes(fx.Interpreter):
        def run_node(self, n: fx.Node) -> Any:
            result = super().run_node(n)
            if isinstance(result, torch.Tensor):
                shapes[n] = tuple(result.shape)
            return result

    inputs = [torch.empty([int(d) for d in t.shape], dtype=dtype_of(t), device="meta") for t in task.inputs]
    # an operator without a meta kernel ends the walk; what came before it is known
    with contextlib.suppress(RuntimeError, NotImplementedError):
        Shapes(module).run(*inputs)
    return shapes


def _norm_statistics(a: Mapping[str, Any]) -> dict[str, Any]:
    _, mean, rstd = aten.native_layer_norm(a["input"], a["normalized_shape"], None, None, 1e-5)
    return {"mean": mean, "rstd": rstd}


def _group_statistics(a: Mapping[str, Any]) -> dict[str, Any]:
    _, mean, rstd = aten.native_group_norm(a["input"], None, None, a["N"], a["C"], a["HxW"], a["group"], 1e-5)
    return {"mean": mean, "rstd": rstd}


def _rms_statistics(a: Mapping[str, Any]) -> dict[str, Any]:
    dims = list(range(-len(a["normalized_shape"]), 0))
    return {"rstd": (a["input"].to(a["rstd"].dtype).square().mean(dims, keepdim=True) + 1e-6).rsqrt()}


def _batch_statistics(a: Mapping[str, Any]) -> dict[str, Any]:
    x = a["input"].to(torch.float32)
    dims = [d for d in range(x.ndim) if d != 1]
    mean, invstd = x.mean(dims), (x.var(dims, unbiased=False) + 1e-5).rsqrt()
    return {"save_mean": mean, "save_invstd": invstd, "save_var": invstd}


def _softmax_output(a: Mapping[str, Any]) -> dict[str, Any]:
    return {"output": torch.softmax(a["output"].float(), a["dim"])}


def _log_softmax_output(a: Mapping[str, Any]) -> dict[str, Any]:
    return {"output": torch.log_softmax(a["output"].float(), a["dim"])}


def _pool_indices(a: Mapping[str, Any]) -> dict[str, Any]:
    window = (a["kernel_size"], a["stride"], a["padding"], a["dilation"], a["ceil_mode"])
    return {"indices": aten.max_pool2d_with_indices(a["self"], *window)[1]}


def _total_weight(a: Mapping[str, Any]) -> dict[str, Any]:
    forward = (a["self"], a["target"], a["weight"], a["reduction"], a["ignore_index"])
    return {"total_weight": aten.nll_loss_forward(*forward)[1]}


def _attention_outputs(a: Mapping[str, Any]) -> dict[str, Any]:
    """`out` and `logsumexp` of any of the attention backwards, in the layout that the backward's arguments have."""
    query, key, value = (a[n].float() for n in ("query", "key", "value"))
    mask = a.get("attn_mask", a.get("attn_bias"))
    out, lse = attention(query, key, value, mask, bool(a.get("is_causal", False)), a.get("scale"))
    padded = torch.full_like(a["logsumexp"].reshape(*query.shape[:2], -1), float("inf"))  # some kernels pad rows to 32
    padded[..., : lse.shape[-1]] = lse
    return {"out": out, "logsumexp": padded}


DEPENDENT: tuple[tuple[str, Callable[[Mapping[str, Any]], dict[str, Any]]], ...] = (
    ("native_layer_norm_backward", _norm_statistics),
    ("native_group_norm_backward", _group_statistics),
    ("_fused_rms_norm_backward", _rms_statistics),
    ("native_batch_norm_backward", _batch_statistics),
    ("cudnn_batch_norm_backward", _batch_statistics),
    ("batch_norm_backward", _batch_statistics),
    ("_softmax_backward_data", _softmax_output),
    ("_log_softmax_backward_data", _log_softmax_output),
    ("max_pool2d_with_indices_backward", _pool_indices),
    ("nll_loss_backward", _total_weight),
    ("_scaled_dot_product_flash_attention_backward", _attention_outputs),
    ("_scaled_dot_product_efficient_attention_backward", _attention_outputs),
    ("_scaled_dot_product_cudnn_attention_backward", _attention_outputs),
    ("_scaled_dot_product_flash_attention_for_cpu_backward", _attention_outputs),
)


def _rule(op: str) -> Callable[[Mapping[str, Any]], dict[str, Any]] | None:
    namespace, name = op.split(".")[:2] if "." in op else ("", op)
    return dict(DEPENDENT).get(name) if namespace == "aten" else None


def has_dependent_inputs(task: Task) -> bool:
    """Whether `make_consistent` would change anything."""
    return any(_rule(node.op) for node in task.program)


def make_consistent(module: fx.GraphModule, values: list[torch.Tensor]) -> list[torch.Tensor]:
    """`values` with every input that other inputs determine replaced: runs the program once, in its own precision.

    It stops at the last operator that has such inputs: nothing reads its results, and it may exist on another device only.
    """
    with torch.no_grad():
        return _Consistency(module).replace(values)


class _Consistency(fx.Interpreter):
    """Replaces, before each backward operator, those of its arguments that are inputs and that its others determine."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module, garbage_collect_values=False)
        self._last = [n for n in operator_calls(module) if _rule(str(n.target))][-1:]
        self._done = False

    def replace(self, values: list[torch.Tensor]) -> list[torch.Tensor]:
        self.run(*values)
        return [self.env[node] for node in placeholders(self.module)][: len(values)]

    def run_node(self, n: fx.Node) -> Any:
        if self._done:
            return None
        rule = _rule(str(n.target)) if isinstance(n.target, torch._ops.OpOverload) else None
        if rule:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            made = rule(schema_arguments(n.target, args, kwargs))
            for name, node in schema_arguments(n.target, n.args, n.kwargs).items():
                if name in made and isinstance(node, fx.Node) and node.op == "placeholder":
                    self.env[node] = made[name].reshape(self.env[node].shape).to(self.env[node].dtype)
        self._done = n in self._last
        return None if self._done else super().run_node(n)
