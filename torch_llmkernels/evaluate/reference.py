"""What a task's outputs should be: the program in float64, in its own precision, and on magnitudes.

`reference` is the truth, `yardstick` is what the user has today, `magnitude` is the size of the terms that rounding acts on.
"""

from __future__ import annotations

import contextlib
import math
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx

from torch_llmkernels.errors import TaskError
from torch_llmkernels.evaluate.attention import FUSED
from torch_llmkernels.evaluate.roles import schema_arguments
from torch_llmkernels.evaluate.statistics import all_finite
from torch_llmkernels.program import module_of
from torch_llmkernels.task import Numerics, Task

_FUSED = dict(FUSED)


class Float64(fx.Interpreter):
    """Runs a program in float64: no conversion inside it rounds, fused attention follows its formula."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        stand_in = _stand_in(target)
        if stand_in is not None:
            return stand_in(schema_arguments(target, args, kwargs))
        args = tuple(_float64_dtype(a) for a in args)
        kwargs = {k: _float64_dtype(v) for k, v in kwargs.items()}
        return super().call_function(target, args, kwargs)


def _float64_dtype(value: Any) -> Any:
    return torch.float64 if isinstance(value, torch.dtype) and value.is_floating_point else value


def _stand_in(target: Any) -> Callable[[dict[str, Any]], Any] | None:
    if not isinstance(target, torch._ops.OpOverload) or target.namespace != "aten":
        return None
    name = target._schema.name.removeprefix("aten::")
    if name in _FUSED:
        return lambda a: _without_dropout(target, a) or _FUSED[name](a)
    return _STAND_INS.get(name)


def _without_dropout(target: Any, arguments: dict[str, Any]) -> None:
    if arguments.get("dropout_p", 0.0):
        raise TaskError(f"{target} with dropout has no reference: its random numbers are its own")


def _softmax(a: dict[str, Any]) -> torch.Tensor:
    return torch.softmax(a["self"], a["dim"])


def _log_softmax(a: dict[str, Any]) -> torch.Tensor:
    return torch.log_softmax(a["self"], a["dim"])


def _batch_norm_training(a: dict[str, Any]) -> tuple[torch.Tensor, ...]:
    training, eps = a["training"], a.get("eps", a.get("epsilon"))
    arguments = (a["input"], a["weight"], a["bias"], _copy(a["running_mean"]), _copy(a["running_var"]), training, 0.0, eps)
    return (*torch.ops.aten.native_batch_norm(*arguments), None)


def _copy(tensor: torch.Tensor | None) -> torch.Tensor | None:
    return None if tensor is None else tensor.clone()


_STAND_INS: dict[str, Callable[[dict[str, Any]], Any]] = {
    "_softmax": _softmax,  # with half_to_float the operator insists on half
    "_log_softmax": _log_softmax,
    "cudnn_batch_norm": _batch_norm_training,
}


def upcast(value: Any) -> Any:
    """Floating tensors in float64, everything else as it is."""
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


@torch.no_grad()
def reference(task: Task, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a static task in float64 (integers and booleans in their own type), on the inputs' device.

    Raises:
        TaskError: if the program draws random numbers.
    """
    return list(Float64(module_of(task)).run(*map(upcast, inputs)))


@torch.no_grad()
def yardstick(task: Task, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """The outputs of a static task as eager computes them in the task's own dtypes, under its precision flags."""
    with precision(task.numerics):
        return list(module_of(task)(*inputs))


@contextlib.contextmanager
def precision(numerics: Numerics) -> Iterator[None]:
    """Set torch's precision and determinism flags as `numerics` says, for a `with` block."""
    holders = [
        (torch.backends.cuda.matmul, "fp32_precision", _cuda_precision(numerics.matmul)),
        (torch.backends.cudnn.conv, "fp32_precision", _cuda_precision(numerics.conv)),
        (torch.backends.mkldnn.matmul, "fp32_precision", numerics.matmul),
        (torch.backends.mkldnn.conv, "fp32_precision", numerics.conv),
        (torch.backends.cuda.matmul, "allow_fp16_reduced_precision_reduction", numerics.reduced_precision_reduction),
        (torch.backends.cuda.matmul, "allow_bf16_reduced_precision_reduction", numerics.reduced_precision_reduction),
    ]
    before = [getattr(holder, name) for holder, name, _ in holders]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    try:
        for holder, name, value in holders:
            setattr(holder, name, value)
        # an operator without a deterministic kernel still is the yardstick: warn, do not raise
        torch.use_deterministic_algorithms(numerics.deterministic, warn_only=True)
        yield
    finally:
        for (holder, name, _), value in zip(holders, before, strict=True):
            setattr(holder, name, value)
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)


def _cuda_precision(policy: str) -> str:
    return "tf32" if policy == "bf16" else policy


PRODUCTS = frozenset([
    "mm", "addmm", "bmm", "baddbmm", "addmv", "mv", "dot", "linear", "matmul",
    "convolution", "_convolution", "convolution_backward",
])  # fmt: skip
_SLOPE_ONE = frozenset([
    "relu", "leaky_relu", "gelu", "silu", "hardswish", "hardtanh", "relu6", "elu", "tanh", "sigmoid", "hardsigmoid", "mish",
    "softplus", "clamp", "clamp_min",
])  # fmt: skip
"""Activations that pass an error on with a factor of about one at most: on magnitudes they are the identity."""
_LINEAR = frozenset([
    "view", "_unsafe_view", "reshape", "permute", "transpose", "t", "unsqueeze", "squeeze", "expand", "clone", "contiguous",
    "alias", "slice", "select", "cat", "_to_copy", "convert_element_type", "avg_pool2d", "mean", "sum",
    "max_pool2d_with_indices", "constant_pad_nd",
])  # fmt: skip
_SIGNED = frozenset(["add", "sub", "rsub", "mul", "div", "neg"])


class _Magnitude(Float64):
    """Runs a program of products and linear steps on absolute values: sums of |a||b| instead of sums of ab."""

    def call_function(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if target is operator.getitem:
            return super().call_function(target, args, kwargs)
        name = _name(target)
        if name in _SLOPE_ONE:
            return args[0]
        if name == "_native_batch_norm_legit_no_training":
            x, weight, bias, mean, var, _, eps = args
            column = [1, -1] + [1] * (x.ndim - 2)
            scaled = (x + mean.view(column)) / (var.view(column) + eps).sqrt()
            scaled = scaled if weight is None else scaled * weight.view(column)
            return (scaled if bias is None else scaled + bias.view(column), None, None)
        if name in ("sub", "rsub"):
            return torch.add(args[0], args[1])
        args = tuple(abs(a) if isinstance(a, float) else a for a in args) if name in _SIGNED else args
        result = super().call_function(target, args, kwargs)
        return result.abs() if isinstance(result, torch.Tensor) else result


def _name(target: Any) -> str:
    return target._schema.name.split("::")[-1] if isinstance(target, torch._ops.OpOverload) else str(target)


def has_products(task: Task) -> bool:
    """Whether the program multiplies matrices or convolves."""
    return any(node.op.split(".")[1:2] and node.op.split(".")[1] in PRODUCTS for node in task.program)


@torch.no_grad()
def magnitude(task: Task, inputs: Sequence[torch.Tensor]) -> list[torch.Tensor] | None:
    """For programs of products and linear steps: each output computed on absolute values, in float64; else None.

    An output of magnitude m that was computed in a format of precision eps cannot be trusted beyond a multiple of m * eps,
    however small it is itself (Higham, Accuracy and Stability of Numerical Algorithms, section 3.5).
    """
    module = module_of(task)
    names = {_name(n.target) for n in module.graph.nodes if n.op == "call_function" and n.target is not operator.getitem}
    known = PRODUCTS | _SLOPE_ONE | _LINEAR | _SIGNED | {"_native_batch_norm_legit_no_training"}
    if not names & PRODUCTS or not names <= known:
        return None
    absolute = [upcast(x).abs() if x.is_floating_point() else x for x in inputs]
    return list(_Magnitude(module).run(*absolute))


PERTURBATION = 2.0**-30
"""Relative change of the inputs that shows a program's condition: far above float64's rounding, far below curvature."""
DRAWS = ((1 << 18, 32), (1 << 24, 6))
"""(Elements of the inputs, draws) up to that size; one draw above: among very many outputs no single one counts."""


@torch.no_grad()
def condition(task: Task, inputs: Sequence[torch.Tensor], truth: Sequence[torch.Tensor]) -> list[torch.Tensor]:
    """How far each output moves, relative to the change, when every input element changes a little and at random.

    Rounding errors act on a result as such changes of its operands do (Higham, section 1.6): a mean that almost cancels moves by
    the size of its terms, not by its own. Root mean square over a few draws, in float64; 0 where the result is not finite.
    """
    elements = sum(x.numel() for x in inputs)
    draws = next((number for size, number in DRAWS if elements <= size), 1)
    total = [torch.zeros(t.shape, dtype=torch.float64, device=t.device) for t in truth]
    g = torch.Generator(inputs[0].device).manual_seed(0)
    for _ in range(draws):
        for square, moved, value in zip(total, _perturbed(task, inputs, g), truth, strict=True):
            if value.is_floating_point():
                change = moved.reshape(value.shape).sub(value)
                square.addcmul_(change, change, value=1 / (draws * PERTURBATION**2))
    return [square.sqrt_() if all_finite(square) else square.sqrt_().nan_to_num_(0.0, 0.0, 0.0) for square in total]


def _perturbed(task: Task, inputs: Sequence[torch.Tensor], g: torch.Generator) -> list[torch.Tensor]:
    changed = []
    for x in inputs:
        changed.append(_near_one(x.shape, g).mul_(x) if x.is_floating_point() else x)
    return reference(task, changed)


def _near_one(shape: torch.Size, g: torch.Generator) -> torch.Tensor:
    """Independent numbers of mean 1 and deviation `PERTURBATION` in float64: uniform over 256 values, drawn eight at a time."""
    words = torch.empty(-(-shape.numel() // 8), dtype=torch.int64, device=g.device).random_(-(2**63), None, generator=g)
    values = words.view(torch.int8)[: shape.numel()].view(shape)  # -128 to 127
    step = PERTURBATION / math.sqrt((256**2 - 1) / 12)
    return values.double().mul_(step).add_(1 + step / 2)
