"""What can become a region: one literal table of declarative patterns over undecomposed ATen graphs.

A pattern is a chain. It starts at an *anchor*, the call that gives the region its name and most of its work, and is extended
along the chain value by optional stages: `before` (upwards through the anchor's chain argument, nearest to the anchor last) and
`after` (downwards through the readers of its first output). The stages that matched give the signature:
`conv2d.relu.max_pool2d`. Views between two stages are looked through and belong to the region. To add a pattern, add an entry to
`PATTERNS`: nothing else needs to change.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import torch

Operand = Literal["any", "same", "last", "mask", "literal", "power_of_two"]
"""What the other operand of a binary call must be: any tensor; a tensor of the chain value's shape; a vector over its last
dimension; a tensor that broadcasts to the chain value; a number; a number whose reciprocal is exact."""


@dataclasses.dataclass(frozen=True, eq=False)
class Call:
    """One ATen call as a stage matches it.

    Attributes:
        op: The overload, such as `aten.relu.default`.
        label: Its part of the signature and the prefix of its parameters; empty: it adds nothing to the name.
        chain: Schema names of the arguments that may carry the chain value, in the order they are tried.
        roles: Schema name of each other tensor argument -> its role in the task.
        outputs: Role of each returned value; the first one carries the chain on (its role is used where something else reads it).
        where: Schema name -> the literal that it must be.
        operand: What the argument that does not carry the chain must be.
        params: Schema name -> parameter name, where the schema's own would not read well.
        rank: Number of dimensions that the chain value must have.
        unused: Indices of outputs that nothing may read (random states), except calls that ignore them.
        ignored: Schema name of each argument that the call, as `where` has it, does not look at (a random state without dropout)
            -> the argument whose tensor stands there in the task; None: nothing does.
    """

    op: str
    label: str
    chain: tuple[str, ...] = ("self",)
    roles: Mapping[str, str] = dataclasses.field(default_factory=dict)
    outputs: tuple[str, ...] = ("",)
    where: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    operand: Operand = "any"
    params: Mapping[str, str] = dataclasses.field(default_factory=dict)
    rank: int | None = None
    unused: tuple[int, ...] = ()
    ignored: Mapping[str, str | None] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Tree:
    """An anchor of several calls that share a value, as nested tuples `(op or ops, argument, ...)`.

    Attributes:
        op: The rare call in it that the anchor scan looks for.
        label: As in `Call`.
        root: The expression. A string is a tensor role (the same role is the same value), `"$name"` a literal that becomes a
            parameter, anything else a literal that must be equal. Arguments follow the schema; `add` and `mul` commute.
            `(THROUGH_VIEWS, tree)` is the tree behind any number of views, whose sizes become parameters.
        chain: The role that carries the chain value in.
        outputs: op -> role of a value inside the tree that something else may read.
    """

    op: str
    label: str
    root: tuple[Any, ...]
    chain: str = "x"
    outputs: Mapping[str, str] = dataclasses.field(default_factory=dict)


@dataclasses.dataclass(frozen=True, eq=False)
class Stage:
    """One position of a chain: the first of `calls` that matches.

    Attributes:
        calls: The alternatives.
        required: Whether the pattern needs it.
    """

    calls: tuple[Call, ...]
    required: bool = False


@dataclasses.dataclass(frozen=True, eq=False)
class Pattern:
    """A chain of stages around an anchor.

    Attributes:
        anchor: The call that gives the region its name, or a tree of calls.
        before: Optional stages above the anchor, nearest last.
        after: Optional stages below the anchor, nearest first.
        result: Role of the chain's last value.
        entry: Role of the chain's first value.
    """

    anchor: Call | Tree
    before: tuple[Stage, ...] = ()
    after: tuple[Stage, ...] = ()
    result: str = "y"
    entry: str = "x"


VIEWS = (
    "aten.view.default", "aten._unsafe_view.default", "aten.reshape.default", "aten.alias.default", "aten.expand.default",
    "aten.clone.default",
)  # fmt: skip
"""Calls between two stages that are looked through (`expand` and `clone` only where they keep shape and strides)."""

THROUGH_VIEWS = "views"
"""Stands for any number of `VIEWS` in a tree."""

_BOTH = ("self", "other")
_CAST = Stage((Call("prims.convert_element_type.default", "", ("a",)),))

_ACTIVATION = Stage((
    Call("aten.relu.default", "relu"),
    Call("aten.silu.default", "silu"),
    Call("aten.gelu.default", "gelu", where={"approximate": "none"}),
    Call("aten.gelu.default", "gelu_tanh", where={"approximate": "tanh"}),
    Call("aten.hardswish.default", "hardswish"),
    Call("aten.leaky_relu.default", "leaky_relu"),
    Call("aten.sigmoid.default", "sigmoid"),
    Call("aten.tanh.default", "tanh"),
))  # fmt: skip

_ACTIVATION_BACKWARD = Stage((
    Call("aten.threshold_backward.default", "relu_backward", ("grad_output",), {"self": "relu_out"}, where={"threshold": 0}),
    Call("aten.gelu_backward.default", "gelu_backward", ("grad_output",), {"self": "gelu_x"}, where={"approximate": "none"}),
    Call("aten.gelu_backward.default", "gelu_tanh_backward", ("grad_output",), {"self": "gelu_x"}, where={"approximate": "tanh"}),
    Call("aten.silu_backward.default", "silu_backward", ("grad_output",), {"self": "silu_x"}),
    Call("aten.hardswish_backward.default", "hardswish_backward", ("grad_output",), {"self": "hardswish_x"}),
    Call("aten.leaky_relu_backward.default", "leaky_relu_backward", ("grad_output",), {"self": "leaky_relu_x"}),
    Call("aten.sigmoid_backward.default", "sigmoid_backward", ("grad_output",), {"output": "sigmoid_out"}),
    Call("aten.tanh_backward.default", "tanh_backward", ("grad_output",), {"output": "tanh_out"}),
))  # fmt: skip

_RESIDUAL = Stage((
    Call("aten.add.Tensor", "add", _BOTH, {"self": "residual", "other": "residual"}, where={"alpha": 1}, operand="same"),
))  # fmt: skip
_SKIP = Stage((
    Call("aten.add.Tensor", "add", _BOTH, {"self": "skip", "other": "skip"}, where={"alpha": 1}, operand="same"),
))  # below an anchor that may have a residual above it: the two are different tensors  # fmt: skip
_GATE = Stage((Call("aten.mul.Tensor", "mul", _BOTH, {"self": "gate", "other": "gate"}, operand="same"),))
_BIAS = Stage((Call("aten.add.Tensor", "", _BOTH, {"self": "bias", "other": "bias"}, where={"alpha": 1}, operand="last"),))
_WEIGHT = Stage((Call("aten.mul.Tensor", "", _BOTH, {"self": "weight", "other": "weight"}, operand="last"),))

_BATCH_NORM = Call(
    "aten._native_batch_norm_legit_no_training.default", "batch_norm", ("input",),
    {"weight": "bn_weight", "bias": "bn_bias", "running_mean": "bn_mean", "running_var": "bn_var"},
    outputs=("batch_norm_out", "bn_save_mean", "bn_save_var"),
)  # fmt: skip

_POOL = Stage((
    Call("aten.max_pool2d_with_indices.default", "max_pool2d", outputs=("max_pool2d_out", "indices")),
    Call("aten.avg_pool2d.default", "avg_pool2d"),
))  # fmt: skip

_SCALE = Stage((
    Call("aten.mul.Tensor", "scale", operand="literal", params={"other": "scale"}),
    Call("aten.div.Tensor", "scale", operand="power_of_two", params={"other": "scale"}),
    Call("aten.div.Tensor", "div", operand="literal", params={"other": "divisor"}),
))  # fmt: skip
_MASK = Stage((
    Call("aten.add.Tensor", "mask", _BOTH, {"self": "mask", "other": "mask"}, where={"alpha": 1}, operand="mask"),
    Call("aten.where.self", "masked_fill", ("other",), {"condition": "mask"}, operand="literal",
         params={"self": "masked_fill_value"}),
    Call("aten.where.self", "where", ("self",), {"condition": "mask"}, operand="literal", params={"other": "where_value"}),
))  # fmt: skip

_LINEAR_AFTER = (_BIAS, _ACTIVATION, _GATE, _RESIDUAL)
_CONV_AFTER = (Stage((_BATCH_NORM,)), _RESIDUAL, _ACTIVATION, _RESIDUAL, _POOL)
_NORM = {"before": (_RESIDUAL,), "after": (_SKIP, _ACTIVATION, _SKIP)}
_QKV = {"key": "k", "value": "v"}
_BMM_ATTENTION: dict[str, Any] = {
    "before": (Stage((Call("aten.bmm.default", "bmm", roles={"mat2": "k"}),), required=True), _SCALE, _MASK),
    "after": (Stage((Call("aten.bmm.default", "bmm", roles={"mat2": "v"}),), required=True),),
    "entry": "q",
}
_NO_DROPOUT = {"dropout_p": 0.0}
_ATTENTION_BACKWARD = {"query": "q", "key": "k", "value": "v", "out": "y", "logsumexp": "logsumexp"}
_RANDOM_STATE = {"philox_seed": "logsumexp", "philox_offset": "logsumexp"}
_GRADS = ("grad_q", "grad_k", "grad_v")

_RMS_NORM = (
    "aten.mul.Tensor", "x",
    ("aten.rsqrt.default",
     (("aten.add.Scalar", "aten.add.Tensor"),
      ("aten.mean.dim", ("aten.pow.Tensor_Scalar", "x", 2), "$dim", True), "$eps")),
)  # fmt: skip



def _math_attention(half: torch.dtype, masked: bool) -> Pattern:
    """Attention in half precision as torch takes it apart where no fused one takes the mask: scaled, multiplied and summed in
    float32, from and to `half`."""

    def single(role: str) -> tuple[Any, ...]:
        return ("prims.convert_element_type.default", role, torch.float32)

    mul = ("aten.mul.Scalar", "aten.mul.Tensor")
    query = (mul, single("q"), "$scale_q")
    key = (mul, ("aten.permute.default", single("k"), [0, 1, 3, 2]), "$scale_k")
    scores = (THROUGH_VIEWS, ("aten.bmm.default", (THROUGH_VIEWS, query), (THROUGH_VIEWS, key)))
    softmax = ("aten._safe_softmax.default", ("aten.add.Tensor", scores, "mask", 1) if masked else scores, "$dim", None)
    product = ("aten.bmm.default", (THROUGH_VIEWS, softmax), (THROUGH_VIEWS, single("v")))
    root = ("prims.convert_element_type.default", (THROUGH_VIEWS, product), half)
    return Pattern(Tree("aten._safe_softmax.default", "attention_math", root, chain="q"), entry="q")


PATTERNS: tuple[Pattern, ...] = (
    # convolution and its epilogue
    Pattern(
        Call("aten.convolution.default", "conv2d", ("input",), {"weight": "weight", "bias": "bias"}, ("conv2d_out",),
             where={"transposed": False}, rank=4),
        after=_CONV_AFTER,
    ),
    # matrix products and their epilogue; addmm and mm are the same signature, the bias is optional
    Pattern(
        Call("aten.addmm.default", "linear", ("mat1",), {"mat2": "weight", "self": "bias"}, ("linear_out",),
             where={"alpha": 1, "beta": 1}),
        after=_LINEAR_AFTER,
    ),
    Pattern(Call("aten.mm.default", "linear", ("self",), {"mat2": "weight"}, ("linear_out",)), after=_LINEAR_AFTER),
    Pattern(Call("aten.bmm.default", "bmm", ("self",), {"mat2": "b"}, ("bmm_out",)), after=_LINEAR_AFTER, entry="a"),
    Pattern(
        Call("aten.mm.default", "linear", ("self",), {"mat2": "weight"}, ("linear_out",)), after=(_ACTIVATION_BACKWARD,),
    ),
    # normalisation
    Pattern(
        Call("aten.native_layer_norm.default", "layer_norm", ("input",), {"weight": "weight", "bias": "bias"},
             ("layer_norm_out", "mean", "rstd")),
        **_NORM,
    ),
    Pattern(
        Call("aten.native_group_norm.default", "group_norm", ("input",), {"weight": "weight", "bias": "bias"},
             ("group_norm_out", "mean", "rstd")),
        **_NORM,
    ),
    Pattern(
        Call("aten._fused_rms_norm.default", "rms_norm", ("input",), {"weight": "weight"}, ("rms_norm_out", "rstd")), **_NORM,
    ),
    Pattern(
        Tree("aten.rsqrt.default", "rms_norm", _RMS_NORM, outputs={"aten.rsqrt.default": "rstd"}),
        before=(_RESIDUAL, _CAST), after=(_CAST, _WEIGHT, _CAST, _SKIP, _ACTIVATION, _SKIP),
    ),
    Pattern(_BATCH_NORM, **_NORM),
    # softmax, losses
    Pattern(Call("aten._softmax.default", "softmax"), before=(_SCALE, _MASK)),
    Pattern(Call("aten._safe_softmax.default", "safe_softmax"), before=(_SCALE, _MASK)),
    Pattern(Call("aten._log_softmax.default", "log_softmax"), before=(_SCALE, _MASK)),
    Pattern(
        Call("aten._log_softmax.default", "cross_entropy", outputs=("log_softmax",)),
        after=(Stage((Call("aten.nll_loss_forward.default", "", roles={"target": "target", "weight": "weight"},
                           outputs=("loss", "total_weight")),), required=True),),
    ),
    # attention: one call, or spelled with bmm and softmax
    Pattern(
        Call("aten._scaled_dot_product_flash_attention_for_cpu.default", "attention", ("query",), {**_QKV, "attn_mask": "mask"},
             ("attention_out", "logsumexp"), where=_NO_DROPOUT),
        entry="q",
    ),
    Pattern(
        Call("aten._scaled_dot_product_flash_attention.default", "attention", ("query",), _QKV, ("attention_out", "logsumexp"),
             where={**_NO_DROPOUT, "return_debug_mask": False}, unused=(2, 3, 4, 5, 6, 7, 8)),
        entry="q",
    ),
    Pattern(
        Call("aten._scaled_dot_product_efficient_attention.default", "attention", ("query",), {**_QKV, "attn_bias": "mask"},
             ("attention_out", "logsumexp"), where=_NO_DROPOUT, unused=(2, 3)),
        entry="q",
    ),
    Pattern(
        Call("aten._scaled_dot_product_cudnn_attention.default", "attention", ("query",), {**_QKV, "attn_bias": "mask"},
             ("attention_out", "logsumexp"), where={**_NO_DROPOUT, "return_debug_mask": False}, unused=(2, 3, 4, 5, 6, 7, 8)),
        entry="q",
    ),
    Pattern(Call("aten._softmax.default", "softmax"), **_BMM_ATTENTION),
    Pattern(Call("aten._safe_softmax.default", "safe_softmax"), **_BMM_ATTENTION),  # torch's own, where no fused one takes a mask
    *(_math_attention(half, masked) for half in (torch.float16, torch.bfloat16) for masked in (True, False)),
    # backward
    Pattern(
        Call("aten.native_layer_norm_backward.default", "layer_norm_backward", ("grad_out",),
             {"input": "x", "mean": "mean", "rstd": "rstd", "weight": "weight", "bias": "bias"},
             ("grad_x", "grad_weight", "grad_bias")),
        entry="grad_y", result="grad_x",
    ),
    Pattern(
        Call("aten.native_group_norm_backward.default", "group_norm_backward", ("grad_out",),
             {"input": "x", "mean": "mean", "rstd": "rstd", "weight": "weight"}, ("grad_x", "grad_weight", "grad_bias")),
        entry="grad_y", result="grad_x",
    ),
    Pattern(
        Call("aten._fused_rms_norm_backward.default", "rms_norm_backward", ("grad_out",),
             {"input": "x", "rstd": "rstd", "weight": "weight"}, ("grad_x", "grad_weight")),
        entry="grad_y", result="grad_x",
    ),
    Pattern(  # in training, where it does not look at the running statistics
        Call("aten.native_batch_norm_backward.default", "batch_norm_backward", ("grad_out",),
             {"input": "x", "save_mean": "mean", "save_invstd": "rstd", "weight": "weight"},
             ("grad_x", "grad_weight", "grad_bias"), where={"train": True},
             ignored={"running_mean": None, "running_var": None}),
        before=(_ACTIVATION_BACKWARD,), entry="grad_y", result="grad_x",
    ),
    Pattern(
        Call("aten._softmax_backward_data.default", "softmax_backward", ("grad_output",), {"output": "y"}, ("grad_x",)),
        after=(_SCALE,), entry="grad_y", result="grad_x",
    ),
    Pattern(
        Call("aten._log_softmax_backward_data.default", "log_softmax_backward", ("grad_output",), {"output": "y"}, ("grad_x",)),
        entry="grad_y", result="grad_x",
    ),
    Pattern(
        Call("aten._log_softmax_backward_data.default", "cross_entropy_backward", ("grad_output",), {"output": "log_softmax"},
             ("grad_x",)),
        before=(Stage((Call("aten.nll_loss_backward.default", "", ("grad_output",),
                            {"self": "log_softmax", "target": "target", "weight": "weight", "total_weight": "total_weight"}),),
                      required=True),),
        entry="grad_y", result="grad_x",
    ),
    Pattern(
        Call("aten.max_pool2d_with_indices_backward.default", "max_pool2d_backward", ("grad_output",),
             {"self": "x", "indices": "indices"}, ("grad_x",)),
        after=(_ACTIVATION_BACKWARD,), entry="grad_y", result="grad_x",
    ),
    Pattern(
        Call("aten.convolution_backward.default", "conv2d_backward", ("grad_output",), {"input": "x", "weight": "weight"},
             ("grad_x", "grad_weight", "grad_bias"), where={"transposed": False}, rank=4),
        before=(_ACTIVATION_BACKWARD,), entry="grad_y", result="grad_x",
    ),
    Pattern(
        Call("aten._scaled_dot_product_flash_attention_for_cpu_backward.default", "attention_backward", ("grad_out",),
             {**_ATTENTION_BACKWARD, "attn_mask": "mask"}, _GRADS, where=_NO_DROPOUT),
        entry="grad_y", result="grad_q",
    ),
    Pattern(
        Call("aten._scaled_dot_product_flash_attention_backward.default", "attention_backward", ("grad_out",),
             _ATTENTION_BACKWARD, _GRADS, where=_NO_DROPOUT, ignored=_RANDOM_STATE),
        entry="grad_y", result="grad_q",
    ),
    Pattern(
        Call("aten._scaled_dot_product_efficient_attention_backward.default", "attention_backward", ("grad_out_",),
             {**_ATTENTION_BACKWARD, "attn_bias": "mask"}, (*_GRADS, "grad_mask"), where=_NO_DROPOUT, ignored=_RANDOM_STATE),
        entry="grad_y", result="grad_q",
    ),
    Pattern(
        Call("aten._scaled_dot_product_cudnn_attention_backward.default", "attention_backward", ("grad_out",),
             {**_ATTENTION_BACKWARD, "attn_bias": "mask"}, _GRADS, where=_NO_DROPOUT, ignored=_RANDOM_STATE),
        entry="grad_y", result="grad_q",
    ),
    # an activation's backward that no product or pool takes in; alone it is pointwise, where Inductor is hard to beat
    *(Pattern(call, entry="grad_y", result="grad_x") for call in _ACTIVATION_BACKWARD.calls),
)  # fmt: skip


REDUCTIONS = frozenset({
    "aten.sum.dim_IntList", "aten.sum.default", "aten.mean.dim", "aten.mean.default", "aten.amax.default", "aten.amin.default",
    "aten.var.correction", "aten.var_mean.correction", "aten.logsumexp.default", "aten.linalg_vector_norm.default",
})  # fmt: skip
"""Where regions without a pattern grow from."""

POINTWISE = frozenset({
    *(f"aten.{name}.Tensor" for name in ("add", "sub", "mul", "div", "eq", "ne", "lt", "le", "gt", "ge")),
    *(f"aten.{name}.Scalar" for name in ("eq", "ne", "lt", "le", "gt", "ge")),
    *(f"aten.{name}.default" for name in (
        "abs", "neg", "sign", "exp", "expm1", "log", "log1p", "sqrt", "rsqrt", "reciprocal", "sin", "cos", "erf",
        "relu", "gelu", "silu", "elu", "mish", "softplus", "leaky_relu", "sigmoid", "tanh", "hardswish", "hardsigmoid",
        "hardtanh", "maximum", "minimum", "clamp", "logical_and", "logical_or", "logical_not", "unsqueeze", "expand",
    )),
    "aten.pow.Tensor_Scalar", "aten.where.self", "aten.squeeze.dims", "prims.convert_element_type.default",
})  # fmt: skip
"""What they grow over."""


def anchor_ops() -> frozenset[str]:
    """Every op at which some pattern starts."""
    return frozenset(p.anchor.op for p in PATTERNS)


def pattern_ops() -> frozenset[str]:
    """Every op that some pattern mentions: the composites among them must reach the joint graph whole."""
    stages = [c.op for p in PATTERNS for s in (*p.before, *p.after) for c in s.calls]
    trees = [op for p in PATTERNS if isinstance(p.anchor, Tree) for op in tree_ops(p.anchor.root)]
    return frozenset([*anchor_ops(), *stages, *trees])


def tree_ops(tree: tuple[Any, ...]) -> list[str]:
    """The ops of a tree, from the root down; views that it looks through are not among them."""
    here = [tree[0]] if isinstance(tree[0], str) else list(tree[0])
    return [op for op in here if op != THROUGH_VIEWS] + [op for a in tree[1:] if isinstance(a, tuple) for op in tree_ops(a)]
