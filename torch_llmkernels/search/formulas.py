"""What eager computes where a program names an operator that few people know by heart, as PyTorch for whoever writes the kernel.

Each text is a function under the operator's name with the arguments of its schema; executing it on float64 tensors gives what the
operator gives (`tests/test_formulas.py` does). Comments say where eager rounds an intermediate to less than float32.
"""

from __future__ import annotations

from torch_llmkernels.task import Task

_NORM_BACKWARD = """\
def native_layer_norm_backward(grad_out, input, normalized_shape, mean, rstd, weight, bias, output_mask):
    k = len(normalized_shape)
    cols, rows = tuple(range(-k, 0)), tuple(range(input.ndim - k))
    xhat = (input - mean) * rstd
    g = grad_out if weight is None else grad_out * weight
    grad_input = rstd * (g - g.mean(cols, True) - xhat * (g * xhat).mean(cols, True))
    return grad_input, (grad_out * xhat).sum(rows), grad_out.sum(rows)
"""

_RMS_BACKWARD = """\
def _fused_rms_norm_backward(grad_out, input, normalized_shape, rstd, weight, output_mask):
    k = len(normalized_shape)
    cols, rows = tuple(range(-k, 0)), tuple(range(input.ndim - k))
    xhat = input * rstd
    g = grad_out if weight is None else grad_out * weight
    return rstd * (g - xhat * (g * xhat).mean(cols, True)), (grad_out * xhat).sum(rows)
"""

_GROUP_BACKWARD = """\
def native_group_norm_backward(grad_out, input, mean, rstd, weight, N, C, HxW, group, output_mask):
    # Eager sums grad_out * input and grad_out over each channel's HxW and subtracts mean times the second, which cancels where
    # the mean is large; sums over xhat do not.
    dy, x = (t.reshape(N, group, C // group, HxW) for t in (grad_out, input))
    mean, rstd = mean.view(N, group, 1, 1), rstd.view(N, group, 1, 1)
    xhat = (x - mean) * rstd
    g = dy if weight is None else dy * weight.view(1, group, C // group, 1)
    grad_input = rstd * (g - g.mean((2, 3), True) - xhat * (g * xhat).mean((2, 3), True))
    return grad_input.view_as(input), (dy * xhat).sum((0, 3)).view(C), dy.sum((0, 3)).view(C)
"""

_BATCH_BACKWARD = """\
def native_batch_norm_backward(
    grad_out, input, weight, running_mean, running_var, save_mean, save_invstd, train, eps, output_mask
):  # in training: the running statistics are not looked at
    dims, vector = [d for d in range(input.ndim) if d != 1], [1, -1] + [1] * (input.ndim - 2)
    mean, rstd = save_mean.view(vector), save_invstd.view(vector)
    xhat = (input - mean) * rstd
    g = grad_out if weight is None else grad_out * weight.view(vector)
    grad_input = rstd * (g - g.mean(dims, True) - xhat * (g * xhat).mean(dims, True))
    return grad_input, (grad_out * xhat).sum(dims), grad_out.sum(dims)
"""

_LAYER_NORM = """\
def native_layer_norm(input, normalized_shape, weight, bias, eps):
    cols = tuple(range(-len(normalized_shape), 0))
    mean = input.mean(cols, True)
    rstd = torch.rsqrt((input - mean).square().mean(cols, True) + eps)
    y = (input - mean) * rstd
    y = y if weight is None else y * weight
    return (y if bias is None else y + bias), mean, rstd
"""

_GROUP_NORM = """\
def native_group_norm(input, weight, bias, N, C, HxW, group, eps):
    x = input.reshape(N, group, -1)
    mean = x.mean(2, True)
    rstd = torch.rsqrt((x - mean).square().mean(2, True) + eps)
    y = ((x - mean) * rstd).view(N, C, HxW)
    y = y if weight is None else y * weight.view(C, 1)
    y = y if bias is None else y + bias.view(C, 1)
    return y.view_as(input), mean.view(N, group), rstd.view(N, group)
"""

_RMS_NORM = """\
def _fused_rms_norm(input, normalized_shape, weight, eps):  # eps None: torch.finfo(input.dtype).eps
    rstd = torch.rsqrt(input.square().mean(tuple(range(-len(normalized_shape), 0)), True) + eps)
    return (input * rstd if weight is None else input * rstd * weight), rstd
"""

_SOFTMAX_BACKWARD = """\
def _softmax_backward_data(grad_output, output, dim, input_dtype):
    p = grad_output * output  # CUDA's eager rounds this product to the tensors' dtype; both sums are float32
    return p - output * p.sum(dim, True)
"""

_LOG_SOFTMAX_BACKWARD = """\
def _log_softmax_backward_data(grad_output, output, dim, input_dtype):
    return grad_output - torch.exp(output) * grad_output.sum(dim, True)
"""

_GELU_BACKWARD = """\
def gelu_backward(grad_output, self, approximate="none"):  # NaN where self is infinite: inf * 0
    x = self
    if approximate == "none":
        cdf = 0.5 * (1 + torch.erf(x * 0.5**0.5))
        return grad_output * (cdf + x * torch.exp(-0.5 * x * x) * (2 * torch.pi) ** -0.5)
    beta = (2 / torch.pi) ** 0.5
    t = torch.tanh(beta * (x + 0.044715 * x**3))
    return grad_output * (0.5 * (1 + t) + 0.5 * x * (1 - t * t) * beta * (1 + 3 * 0.044715 * x * x))
"""

_SILU_BACKWARD = """\
def silu_backward(grad_output, self):
    s = torch.sigmoid(self)
    return grad_output * s * (1 + self * (1 - s))
"""

_HARDSWISH_BACKWARD = """\
def hardswish_backward(grad_output, self):
    inner = torch.where(self < 3, grad_output * (self / 3 + 0.5), grad_output)
    return torch.where(self <= -3, 0, inner)
"""

_THRESHOLD_BACKWARD = """\
def threshold_backward(grad_output, self, threshold):
    return torch.where(self <= threshold, 0, grad_output)  # where self is NaN, the gradient passes
"""

_LEAKY_RELU_BACKWARD = """\
def leaky_relu_backward(grad_output, self, negative_slope, self_is_result):  # of self, only the sign counts
    return torch.where(self > 0, grad_output, grad_output * negative_slope)
"""

_SIGMOID_BACKWARD = """\
def sigmoid_backward(grad_output, output):
    return grad_output * (1 - output) * output
"""

_TANH_BACKWARD = """\
def tanh_backward(grad_output, output):
    return grad_output * (1 - output * output)
"""

_NLL_FORWARD = """\
def nll_loss_forward(self, target, weight, reduction, ignore_index):  # self: [rows, classes]; reduction: 0 none, 1 mean, 2 sum
    kept = target != ignore_index
    column = torch.where(kept, target, 0)
    w = kept.to(self.dtype) if weight is None else torch.where(kept, weight[column], 0)
    each = torch.where(kept, -w * self.gather(1, column[:, None])[:, 0], 0)
    total_weight = w.sum() if reduction else w.new_zeros(())
    return (each, each.sum() / total_weight, each.sum())[reduction], total_weight
"""

_NLL_BACKWARD = """\
def nll_loss_backward(grad_output, self, target, weight, reduction, ignore_index, total_weight):
    # reduction: 0 none, 1 mean, 2 sum. Of each row all is 0 but the element of its target.
    kept = target != ignore_index
    column = torch.where(kept, target, 0)
    g = -grad_output / total_weight if reduction == 1 else -grad_output
    g = torch.where(kept, g if weight is None else g * weight[column], 0)
    return torch.zeros_like(self).scatter(1, column[:, None], g[:, None])
"""

_MAX_POOL = """\
def max_pool2d_with_indices(self, kernel_size, stride, padding, dilation, ceil_mode):
    # indices: h * W + w in the plane of the input; the first of equal maxima in row-major order, the last of several NaN
    return F.max_pool2d(self, kernel_size, stride, padding, dilation, ceil_mode, return_indices=True)
"""

_MAX_POOL_BACKWARD = """\
def max_pool2d_with_indices_backward(grad_output, self, kernel_size, stride, padding, dilation, ceil_mode, indices):
    # indices: h * W + w in the plane of the input; windows that overlap may name an element several times, the sum is float32
    out = torch.zeros_like(self).flatten(2)
    return out.scatter_add(2, indices.flatten(2), grad_output.flatten(2)).view_as(self)
"""

_CONVOLUTION_BACKWARD = """\
def convolution_backward(
    grad_output, input, weight, bias_sizes, stride, padding, dilation, transposed, output_padding, groups, output_mask
):  # written for groups = 1
    size, dy = weight.shape[2:], grad_output.flatten(2)  # dy: [N, C_out, OH * OW]
    patches = F.unfold(input, size, dilation, padding, stride)  # [N, C_in * KH * KW, OH * OW]
    grad_weight = torch.einsum("nol,nkl->ok", dy, patches).view_as(weight)
    columns = torch.einsum("ok,nol->nkl", weight.flatten(1), dy)
    grad_input = F.fold(columns, input.shape[2:], size, dilation, padding, stride)
    return grad_input, grad_weight, grad_output.sum((0, 2, 3))
"""

_ATTENTION = """\
def attention(query, key, value, mask=None, is_causal=False, scale=None):  # products and softmax in float32, rounded once
    scores = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    scores = scores if mask is None else scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    return torch.softmax(scores, -1) @ value, torch.logsumexp(scores, -1)  # logsumexp: float32, natural logarithm
"""

_ATTENTION_BACKWARD = """\
def attention_backward(grad_out, query, key, value, out, logsumexp, mask=None, is_causal=False, scale=None):
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    scores = query @ key.transpose(-2, -1) * scale
    scores = scores if mask is None else scores + mask
    if is_causal:
        scores = scores.masked_fill(torch.ones_like(scores).triu(1).bool(), float("-inf"))
    p = torch.exp(scores - logsumexp[..., None])
    ds = p * (grad_out @ value.transpose(-2, -1) - (grad_out * out).sum(-1, True)) * scale
    return ds @ key, ds.transpose(-2, -1) @ query, p.transpose(-2, -1) @ grad_out
"""

_FUSED = ("flash_attention_for_cpu", "flash_attention", "efficient_attention", "cudnn_attention")

FORMULAS: dict[str, str] = {
    "aten.native_layer_norm.default": _LAYER_NORM,
    "aten.native_layer_norm_backward.default": _NORM_BACKWARD,
    "aten.native_group_norm.default": _GROUP_NORM,
    "aten.native_group_norm_backward.default": _GROUP_BACKWARD,
    "aten.native_batch_norm_backward.default": _BATCH_BACKWARD,
    "aten._fused_rms_norm.default": _RMS_NORM,
    "aten._fused_rms_norm_backward.default": _RMS_BACKWARD,
    "aten._softmax_backward_data.default": _SOFTMAX_BACKWARD,
    "aten._log_softmax_backward_data.default": _LOG_SOFTMAX_BACKWARD,
    "aten.gelu_backward.default": _GELU_BACKWARD,
    "aten.silu_backward.default": _SILU_BACKWARD,
    "aten.hardswish_backward.default": _HARDSWISH_BACKWARD,
    "aten.leaky_relu_backward.default": _LEAKY_RELU_BACKWARD,
    "aten.sigmoid_backward.default": _SIGMOID_BACKWARD,
    "aten.tanh_backward.default": _TANH_BACKWARD,
    "aten.threshold_backward.default": _THRESHOLD_BACKWARD,
    "aten.nll_loss_forward.default": _NLL_FORWARD,
    "aten.nll_loss_backward.default": _NLL_BACKWARD,
    "aten.max_pool2d_with_indices.default": _MAX_POOL,
    "aten.max_pool2d_with_indices_backward.default": _MAX_POOL_BACKWARD,
    "aten.convolution_backward.default": _CONVOLUTION_BACKWARD,
    **{f"aten._scaled_dot_product_{name}.default": _ATTENTION for name in _FUSED},
    **{f"aten._scaled_dot_product_{name}_backward.default": _ATTENTION_BACKWARD for name in _FUSED},
}
"""By the operator as a program names it."""


def formulas_of(task: Task, source: str) -> list[str]:
    """The formulas of the operators that `source`, the task as PyTorch, calls by their ATen names, in the program's order."""
    named = dict.fromkeys(node.op for node in task.program if f"torch.ops.{node.op}(" in source)
    return list(dict.fromkeys(FORMULAS[op] for op in named if op in FORMULAS))
