"""A task as something that runs: an `fx.GraphModule`, and a PyTorch function that a person (or a language model) can read."""

from __future__ import annotations

import ast
import functools
import operator
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from torch_llmkernels.errors import TaskError
from torch_llmkernels.task import Node, Task, TensorSpec, parse_dim

_SIZE_OPERATORS = {ast.Add: operator.add, ast.Sub: operator.sub, ast.Mult: operator.mul, ast.FloorDiv: operator.floordiv,
                   ast.Mod: operator.mod}  # fmt: skip


def operator_of(op: str) -> torch._ops.OpOverload:
    """The operator that a program's `op` names.

    Raises:
        TaskError: if this torch has none of that name.
    """
    namespace, _, rest = op.partition(".")
    name, _, overload = rest.partition(".")
    try:
        return getattr(getattr(getattr(torch.ops, namespace), name), overload)
    except AttributeError:
        raise TaskError(f"torch {torch.__version__} has no operator {op}; the task was made by another release") from None


def module_of(task: Task) -> fx.GraphModule:
    """The task's program.

    Returns:
        A module that takes the task's inputs in order and then its symbols' values as ints, and returns a tuple with the outputs
        in order, as the operators make them (their strides are those of eager PyTorch).

    Raises:
        TaskError: if the program names an operator that this torch does not have.
    """
    graph = fx.Graph()
    values: dict[str, fx.Node] = {t.name: graph.placeholder(t.name) for t in task.inputs}
    symbols = {name: graph.placeholder(name) for name, _ in task.symbols}
    for node in task.program:
        values[node.name] = _call(graph, node, task, values, symbols)
    graph.output(tuple(values[name] for name in task.results))
    graph.lint()
    return fx.GraphModule(torch.nn.Module(), graph)


def _call(graph: fx.Graph, node: Node, task: Task, values: Mapping[str, fx.Node], symbols: Mapping[str, fx.Node]) -> fx.Node:
    if node.op == "getitem":
        return graph.call_function(operator.getitem, (values[node.args[0]["v"]], node.args[1]))
    target = operator_of(node.op)
    decoded = [_decoded(graph, a, task, values, symbols) for a in node.args]
    args, kwargs = _bound(target, decoded)
    return graph.call_function(target, tuple(args), kwargs)


def _bound(target: torch._ops.OpOverload, decoded: list[Any]) -> tuple[list[Any], dict[str, Any]]:
    """Schema-ordered arguments as positional and keyword ones; trailing defaults of other releases may be missing."""
    schema = target._schema.arguments
    pairs = list(zip(schema, decoded, strict=False))
    keywords = {a.name: v for a, v in pairs if a.kwarg_only and not (v is None and a.has_default_value())}
    return [v for a, v in pairs if not a.kwarg_only], keywords


def _decoded(graph: fx.Graph, arg: Any, task: Task, values: Mapping[str, fx.Node], symbols: Mapping[str, fx.Node]) -> Any:
    if isinstance(arg, (list, tuple)):
        return [_decoded(graph, a, task, values, symbols) for a in arg]
    if not isinstance(arg, dict):
        return arg
    ((tag, content),) = arg.items()
    if tag == "v":
        return values[content]
    if tag == "s":
        return _size(graph, parse_dim(content).body, symbols)
    return _literal(tag, content, task)


def _literal(tag: str, content: Any, task: Task) -> Any:
    if tag == "p":
        value = task.param[content]
        return list(value) if isinstance(value, tuple) else value
    if tag == "f":
        return float.fromhex(content)
    if tag == "dtype":
        return getattr(torch, content)
    if tag == "device":
        return torch.device(content)
    raise TaskError(f"task {task.signature}: an argument is tagged {tag!r}, which this release does not know")


def _size(graph: fx.Graph, tree: ast.expr, symbols: Mapping[str, fx.Node]) -> Any:
    if isinstance(tree, ast.Constant):
        return tree.value
    if isinstance(tree, ast.Name):
        return symbols[tree.id]
    if isinstance(tree, ast.BinOp):
        operands = (_size(graph, tree.left, symbols), _size(graph, tree.right, symbols))
        return graph.call_function(_SIZE_OPERATORS[type(tree.op)], operands)
    if isinstance(tree, ast.UnaryOp):
        return graph.call_function(operator.neg, (_size(graph, tree.operand, symbols),))
    if isinstance(tree, ast.Call):
        pick = torch.sym_max if ast.unparse(tree.func) == "max" else torch.sym_min
        values = [_size(graph, argument, symbols) for argument in tree.args]
        return functools.reduce(lambda a, b: graph.call_function(pick, (a, b)), values)
    raise TaskError(f"size {ast.unparse(tree)!r} is not one of a task")  # parse_dim refuses all others


def python_source(task: Task) -> str:
    """The task as one PyTorch function, to be read.

    The function takes the inputs in order and then the symbols' values; the task's parameters are keyword arguments with their
    values as defaults. It returns one tensor, or a tuple of all outputs. The text is a complete module: executing it defines the
    function under the signature's name with dots as underscores, and it computes what `module_of(task)` computes.
    """
    body = _Writer(task).lines()
    names = [t.name for t in task.inputs] + [name for name, _ in task.symbols]
    defaults = [f"{name}={_value(value)}" for name, value in task.params]
    parameters = [*_wrapped(names), *(["*", *_wrapped(defaults)] if defaults else [])]
    comments = [_describe(t) for t in task.inputs] + [f"{name}: int, such as {hint}" for name, hint in task.symbols]
    returned = ", ".join(t.name for t in task.outputs)
    return "\n".join([
        "import torch", "import torch.nn.functional as F", "", "",
        f"def {task.signature.replace('.', '_')}(", *(f"    {p}," for p in parameters), "):",
        *(f"    # {c}" for c in comments),
        *(f"    {line}" for line in body),
        *(f"    # {_describe(t)}" for t in task.outputs),
        f"    return {returned}", "",
    ])  # fmt: skip


def _wrapped(parts: list[str], width: int = 110) -> list[str]:
    """The parts, comma separated, in lines of at most `width` characters (a part alone may be longer)."""
    lines = [""]
    for part in parts:
        joined = f"{lines[-1]}, {part}" if lines[-1] else part
        lines = [*lines[:-1], joined] if len(joined) <= width or not lines[-1] else [*lines, part]
    return lines


def _describe(spec: TensorSpec) -> str:
    layout = "contiguous" if spec.is_contiguous else f"stride [{', '.join(map(str, spec.stride))}]"
    return f"{spec.name}: {spec.dtype} [{', '.join(map(str, spec.shape))}], {layout}"


def _value(value: Any) -> str:
    """A literal as Python source; infinities have no literal."""
    if isinstance(value, float) and value in (float("inf"), float("-inf")):
        return f'float("{value}")'
    return repr(value)


class _Writer:
    """One line of Python per call; one that returns several values is unpacked, or written as the function for the first only."""

    def __init__(self, task: Task) -> None:
        self._task = task
        self._names = {t.name: t.name for t in task.inputs}
        self._taken = {t.name for t in (*task.inputs, *task.outputs)} | {name for name, _ in task.symbols}
        self._results = dict(zip(reversed(task.results), reversed([t.name for t in task.outputs]), strict=True))
        self._reads = {n.name: self._read_indices(n) for n in task.program if n.op != "getitem"}

    def _read_indices(self, node: Node) -> dict[int, Node]:
        """The `getitem`s of a call that returns several values."""
        return {n.args[1]: n for n in self._task.program if n.op == "getitem" and n.args[0]["v"] == node.name}

    def lines(self) -> list[str]:
        lines = [self._line(n) for n in self._task.program if n.op != "getitem"]
        aliases = zip(self._task.outputs, self._task.results, strict=True)
        return lines + [f"{t.name} = {self._names[r]}" for t, r in aliases if self._names[r] != t.name]

    def _line(self, node: Node) -> str:
        given = self._arguments(node)
        reads = self._reads[node.name]
        if not reads:
            return f"{self._define(node.name)} = {_expression(node.op, given)}"
        first_only = _FIRST_OF_SEVERAL.get(node.op)
        if first_only and set(reads) == {0}:
            return f"{self._define(reads[0].name)} = {first_only(given)}"
        count = len(operator_of(node.op)._schema.returns)
        targets = [self._define(reads[i].name) if i in reads else "_" for i in range(count)]
        return f"{', '.join(targets)} = {_expression(node.op, given)}"

    def _define(self, value: str) -> str:
        name = self._results.get(value)
        if name is None:
            name = f"t{len(self._names)}"
            while name in self._taken:
                name += "_"
        self._names[value] = name
        return name

    def _arguments(self, node: Node) -> dict[str, str]:
        schema = operator_of(node.op)._schema.arguments
        return {a.name: self._text(v) for a, v in zip(schema, node.args, strict=False)}

    def _text(self, arg: Any) -> str:
        if isinstance(arg, (list, tuple)):
            return f"[{', '.join(map(self._text, arg))}]"
        if not isinstance(arg, dict):
            return repr(arg)
        ((tag, content),) = arg.items()
        if tag == "v":
            return self._names[content]
        if tag in ("s", "p"):
            return str(content)
        value = _literal(tag, content, self._task)
        return f'torch.device("{content}")' if tag == "device" else _value(value)


def _expression(op: str, given: dict[str, str]) -> str:
    """One call as Python: spelled as people spell it where that computes the same, else through `torch.ops`."""
    if op in _SPELLING:
        written = _SPELLING[op](given)
        if written:
            return written
    target = operator_of(op)
    keyword_only = {a.name for a in target._schema.arguments if a.kwarg_only}
    parts = [v for n, v in given.items() if n not in keyword_only]
    parts += [f"{n}={v}" for n, v in given.items() if n in keyword_only and v != "None"]
    return f"torch.ops.{op}({', '.join(parts)})"


def _binary(symbol: str, scale: str = "alpha") -> Callable[[dict[str, str]], str]:
    def write(a: dict[str, str]) -> str:
        return f"{a['self']} {symbol} {a['other']}" if a.get(scale, "1") == "1" else ""

    return write


def _unary(name: str) -> Callable[[dict[str, str]], str]:
    return lambda a: f"{name}({a['self']})"


def _reduction(name: str) -> Callable[[dict[str, str]], str]:
    def write(a: dict[str, str]) -> str:
        dtype = f", dtype={a['dtype']}" if a.get("dtype", "None") != "None" else ""
        return f"torch.{name}({a['self']}, dim={a['dim']}, keepdim={a['keepdim']}{dtype})" if a["dim"] != "None" else ""

    return write


def _convolution(a: dict[str, str]) -> str:
    if a["transposed"] != "False":
        return ""
    return f"F.conv2d({a['input']}, {a['weight']}, {a['bias']}, {a['stride']}, {a['padding']}, {a['dilation']}, {a['groups']})"


def _addmm(a: dict[str, str]) -> str:
    plain = {a["alpha"], a["beta"]} <= {"1", "1.0"}
    return f"torch.addmm({a['self']}, {a['mat1']}, {a['mat2']})" if plain else ""


_SPELLING: dict[str, Callable[[dict[str, str]], str]] = {
    "aten.add.Tensor": _binary("+"),
    "aten.sub.Tensor": _binary("-"),
    "aten.mul.Tensor": _binary("*"),
    "aten.div.Tensor": _binary("/"),
    "aten.mm.default": lambda a: f"{a['self']} @ {a['mat2']}",
    "aten.bmm.default": lambda a: f"torch.bmm({a['self']}, {a['mat2']})",
    "aten.addmm.default": _addmm,
    "aten.convolution.default": _convolution,
    "aten.relu.default": _unary("F.relu"),
    "aten.silu.default": _unary("F.silu"),
    "aten.hardswish.default": _unary("F.hardswish"),
    "aten.sigmoid.default": _unary("torch.sigmoid"),
    "aten.tanh.default": _unary("torch.tanh"),
    "aten.rsqrt.default": _unary("torch.rsqrt"),
    "aten.exp.default": _unary("torch.exp"),
    "aten.neg.default": _unary("-"),
    "aten.gelu.default": lambda a: f"F.gelu({a['self']}, approximate={a['approximate']})",
    "aten.leaky_relu.default": lambda a: f"F.leaky_relu({a['self']}, {a['negative_slope']})",
    "aten.pow.Tensor_Scalar": lambda a: f"torch.pow({a['self']}, {a['exponent']})",
    "aten.mean.dim": _reduction("mean"),
    "aten.sum.dim_IntList": _reduction("sum"),
    "aten.amax.default": _reduction("amax"),
    "aten.amin.default": _reduction("amin"),
    "aten.reshape.default": lambda a: f"{a['self']}.reshape({a['shape']})",
    "aten.view.default": lambda a: f"{a['self']}.view({a['size']})",
    "aten.where.self": lambda a: f"torch.where({a['condition']}, {a['self']}, {a['other']})",
    "aten.where.ScalarSelf": lambda a: f"torch.where({a['condition']}, {a['self']}, {a['other']})",
    "aten.where.ScalarOther": lambda a: f"torch.where({a['condition']}, {a['self']}, {a['other']})",
    "aten._softmax.default": lambda a: f"torch.softmax({a['self']}, dim={a['dim']})" if a["half_to_float"] == "False" else "",
    "aten._log_softmax.default": (
        lambda a: f"torch.log_softmax({a['self']}, dim={a['dim']})" if a["half_to_float"] == "False" else ""
    ),
    "aten.avg_pool2d.default": lambda a: f"F.avg_pool2d({', '.join(a.values())})",
    "prims.convert_element_type.default": lambda a: f"{a['a']}.to({a['dtype']})",
}
"""How one result is spelled, given the arguments by name as source; an empty string: not in this form."""


def _group_norm(a: dict[str, str]) -> str:
    return f"F.group_norm({a['input']}, {a['group']}, {a['weight']}, {a['bias']}, {a['eps']})"


def _batch_norm(a: dict[str, str]) -> str:
    stats = f"{a['running_mean']}, {a['running_var']}"
    return f"F.batch_norm({a['input']}, {stats}, {a['weight']}, {a['bias']}, training=False, eps={a['eps']})"


def _max_pool(a: dict[str, str]) -> str:
    return f"F.max_pool2d({', '.join(a.values())})"


def _attention(a: dict[str, str]) -> str:
    mask = next((a[n] for n in ("attn_mask", "attn_bias") if n in a), "None")
    named = f"attn_mask={mask}, is_causal={a['is_causal']}, scale={a['scale']}"
    return f"F.scaled_dot_product_attention({a['query']}, {a['key']}, {a['value']}, {named})"


def _nll_loss(a: dict[str, str]) -> str:
    reduction = f'("none", "mean", "sum")[{a["reduction"]}]'
    return f"F.nll_loss({a['self']}, {a['target']}, {a['weight']}, ignore_index={a['ignore_index']}, reduction={reduction})"


_FIRST_OF_SEVERAL: dict[str, Callable[[dict[str, str]], str]] = {
    "aten.native_layer_norm.default": (
        lambda a: f"F.layer_norm({a['input']}, {a['normalized_shape']}, {a['weight']}, {a['bias']}, {a['eps']})"
    ),
    "aten._fused_rms_norm.default": lambda a: f"F.rms_norm({a['input']}, {a['normalized_shape']}, {a['weight']}, {a['eps']})",
    "aten.native_group_norm.default": _group_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.max_pool2d_with_indices.default": _max_pool,
    "aten.nll_loss_forward.default": _nll_loss,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention,
    "aten._scaled_dot_product_flash_attention.default": _attention,
    "aten._scaled_dot_product_efficient_attention.default": _attention,
    "aten._scaled_dot_product_cudnn_attention.default": _attention,
}
"""The function that returns only the first value, where nothing reads the others."""
