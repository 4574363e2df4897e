"""The problems that the benchmarks measure and that searches are run for, each a module and a maker of inputs.

`SEED` are the operators of the article this project starts from, `WIDER` adds the shapes where an H100 has headroom, `ROWS` are
norms of rows from 256 to 262,144 columns, and `CPU` are small enough for two cores. `PROBLEMS` names them all.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn


class Call(nn.Module):
    """A function of tensors as a module without parameters."""

    def __init__(self, function: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.function(*tensors)


class ConvReluPool(nn.Module):
    """Conv2d, ReLU and max-pool in a row; the convolution's arguments as in `nn.Conv2d`."""

    def __init__(self, *conv: int, pool: int = 3, pool_stride: int = 2, **options: int) -> None:
        super().__init__()
        self.conv, self.pool = nn.Conv2d(*conv, **options), nn.MaxPool2d(pool, pool_stride)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.pool(F.relu(self.conv(x)))


class ConvBatchNormAddRelu(nn.Module):
    """The end of a residual block: Conv2d without bias, batch norm, the shortcut added, ReLU; arguments as in `nn.Conv2d`."""

    def __init__(self, *conv: int, **options: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(*conv, bias=False, **options), nn.BatchNorm2d(conv[1])
        self.eval()

    def forward(self, x: torch.Tensor, shortcut: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)) + shortcut)


class ConvBatchNormRelu(nn.Module):
    """The middle of a residual block: 3x3 convolution without bias of 256 channels, batch norm, ReLU."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(256, 256, 3, padding=1, bias=False), nn.BatchNorm2d(256)
        self.eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.norm(self.conv(x)))


class Stem(nn.Module):
    """The stem of a ResNet: 7x7 convolution with stride 2, batch norm, ReLU, 3x3 max-pool with stride 2."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 64, 7, 2, 3, bias=False)
        self.norm = nn.BatchNorm2d(64).eval()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.max_pool2d(F.relu(self.norm(self.conv(x))), 3, 2, 1)


class Attention(nn.Module):
    """Scaled dot-product attention of three (batch, heads, tokens, width) tensors."""

    def forward(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v)


@dataclasses.dataclass(frozen=True)
class Problem:
    """One operator at one shape.

    Attributes:
        name: Unique, with the shape in it.
        module: Makes the module, on the CPU in float32.
        shapes: Shapes of the inputs.
        dtype: dtype of the inputs and of the module.
        channels_last: Whether inputs and module use that layout.
        training: Whether a backward pass belongs to the problem.
        tf32: Whether TF32 is allowed for convolutions and products; the strict tier forbids it.
        frozen: Whether the parameters are constants of the compiled graph (Inductor's freezing).
        classes: If not 0, a last input of that many classes: an index for each row of the first input.
    """

    name: str
    module: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    dtype: torch.dtype = torch.float32
    channels_last: bool = False
    training: bool = False
    tf32: bool = False
    frozen: bool = False
    classes: int = 0

    def make(self, device: str, seed: int = 0) -> tuple[nn.Module, list[torch.Tensor]]:
        """The module and its inputs on `device`; affine weights are not their trivial defaults."""
        generator = torch.Generator().manual_seed(seed)
        module = self.module().to(self.dtype)
        with torch.no_grad():
            for parameter in module.parameters():
                if parameter.ndim == 1 or isinstance(module, nn.LayerNorm):
                    parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.2 + 1)
        inputs = [torch.randn(shape, generator=generator).to(device, self.dtype) for shape in self.shapes]
        if self.classes:
            inputs.append(torch.randint(self.classes, self.shapes[0][:1], generator=generator).to(device))
        module = module.to(device)
        if self.channels_last:
            module = module.to(memory_format=torch.channels_last)
            inputs = [t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in inputs]
        if self.training:
            inputs = [t.requires_grad_() if t.is_floating_point() else t for t in inputs]
        return module, inputs


def _softmax(x: torch.Tensor) -> torch.Tensor:
    return F.softmax(x, -1)


def _log_softmax(x: torch.Tensor) -> torch.Tensor:
    return F.log_softmax(x, -1)


def _masked_softmax(x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    return F.softmax(x * 0.125 + mask, -1)


SEED = (
    Problem("matmul_fp32_2048", lambda: Call(torch.matmul), ((2048, 2048), (2048, 2048))),
    Problem("matmul_fp32_4096", lambda: Call(torch.matmul), ((4096, 4096), (4096, 4096))),
    Problem("conv2d_11x11_s4_fp32", lambda: nn.Conv2d(3, 96, 11, 4, 2), ((100, 3, 224, 224),)),
    Problem("softmax_4096x65536_fp32", lambda: Call(_softmax), ((4096, 65536),)),
    Problem("layer_norm_16x64x256x256_fp32", lambda: nn.LayerNorm((64, 256, 256)), ((16, 64, 256, 256),)),
    Problem("conv2d_relu_max_pool_11x11_fp32", lambda: ConvReluPool(3, 96, 11, 4, 2), ((100, 3, 224, 224),)),
)
WIDER = (
    Problem("softmax_16x16384_fp32", lambda: Call(_softmax), ((16, 16384),)),
    Problem("layer_norm_8192x4096_fp16", lambda: nn.LayerNorm(4096), ((8192, 4096),), torch.float16),
    Problem("layer_norm_8192x4096_fp32", lambda: nn.LayerNorm(4096), ((8192, 4096),)),
    Problem("layer_norm_train_8192x4096_fp32", lambda: nn.LayerNorm(4096), ((8192, 4096),), training=True),
    Problem("rms_norm_8192x4096_bf16", lambda: nn.RMSNorm(4096), ((8192, 4096),), torch.bfloat16),
    Problem("linear_gelu_8192x768x3072_fp32", lambda: nn.Sequential(nn.Linear(768, 3072), nn.GELU()), ((8192, 768),)),
    Problem("linear_8192x3072x768_fp32", lambda: nn.Linear(3072, 768), ((8192, 3072),)),
    Problem("linear_128x9216x4096_fp32", lambda: nn.Linear(9216, 4096), ((128, 9216),)),
    Problem("conv3x3_relu_256_fp32", lambda: nn.Sequential(nn.Conv2d(256, 256, 3, 1, 1), nn.ReLU()), ((32, 256, 56, 56),)),
    Problem(
        "conv1x1_bn_add_relu_64_256_fp32",
        lambda: ConvBatchNormAddRelu(64, 256, 1),
        ((32, 64, 56, 56), (32, 256, 56, 56)),
    ),
    Problem("group_norm_32x256x56x56_fp32", lambda: nn.GroupNorm(32, 256), ((32, 256, 56, 56),)),
    Problem(
        "conv3x3_relu_max_pool_64_fp32",
        lambda: ConvReluPool(64, 64, 3, 1, 1, pool=2),
        ((32, 64, 224, 224),),
    ),
    Problem("log_softmax_8192x32000_fp32", lambda: Call(_log_softmax), ((8192, 32000),)),
    Problem("cross_entropy_8192x32000_fp32", lambda: Call(F.cross_entropy), ((8192, 32000),), classes=32000),
    Problem("masked_softmax_16x12x512x512_fp32", lambda: Call(_masked_softmax), ((16, 12, 512, 512), (16, 1, 1, 512))),
    Problem("resnet_stem_32_fp32", Stem, ((32, 3, 224, 224),)),
    Problem("resnet_stem_64_fp16", Stem, ((64, 3, 224, 224),), torch.float16, channels_last=True),
    Problem("attention_4x16x4096x128_fp16", Attention, ((4, 16, 4096, 128),) * 3, torch.float16),
    Problem("attention_32x32x512x1024_fp16", Attention, ((32, 32, 512, 1024),) * 3, torch.float16),
    Problem("attention_4x16x2048x64_fp16", Attention, ((4, 16, 2048, 64),) * 3, torch.float16),
    Problem("linear_2048_frozen_fp32", lambda: nn.Linear(2048, 2048), ((2048, 2048),), frozen=True),
    Problem("linear_4096_frozen_fp32", lambda: nn.Linear(4096, 4096), ((4096, 4096),), frozen=True),
    Problem(
        "linear_gelu_8192x768x3072_bf16", lambda: nn.Sequential(nn.Linear(768, 3072), nn.GELU()), ((8192, 768),), torch.bfloat16
    ),
    Problem("conv3x3_bn_relu_256_fp16", ConvBatchNormRelu, ((64, 256, 14, 14),), torch.float16, channels_last=True),
    Problem(
        "conv3x3_relu_max_pool_64_fp16",
        lambda: ConvReluPool(64, 64, 3, 1, 1, pool=2),
        ((32, 64, 224, 224),),
        torch.float16,
        channels_last=True,
    ),
    Problem("layer_norm_train_8192x4096_bf16", lambda: nn.LayerNorm(4096), ((8192, 4096),), torch.bfloat16, training=True),
    Problem("matmul_fp16_2048", lambda: Call(torch.matmul), ((2048, 2048), (2048, 2048)), torch.float16),
    Problem("matmul_fp16_4096", lambda: Call(torch.matmul), ((4096, 4096), (4096, 4096)), torch.float16),
)
WIDTHS = (256, 1024, 4096, 16384, 65536, 262144)
NORMS: dict[str, tuple[type[nn.Module], tuple[torch.dtype, ...]]] = {
    "layer_norm": (nn.LayerNorm, (torch.float32, torch.float16, torch.bfloat16)),
    "rms_norm": (nn.RMSNorm, (torch.float32, torch.bfloat16)),
}


def rows_of(norm: str, dtype: torch.dtype, columns: int, elements: int = 1 << 26) -> Problem:
    """A norm over the last dimension of a matrix of 64 M elements: larger than an L2 cache in every dtype."""
    name = f"{norm}_rows_{columns}_{str(dtype).removeprefix('torch.')}"
    return Problem(name, functools.partial(NORMS[norm][0], columns), ((elements // columns, columns),), dtype)


ROWS = tuple(rows_of(norm, dtype, columns) for norm, (_, dtypes) in NORMS.items() for dtype in dtypes for columns in WIDTHS)
CPU = (
    Problem("layer_norm_4096x1024_fp32", lambda: nn.LayerNorm(1024), ((4096, 1024),)),
    Problem("softmax_1024x4096_fp32", lambda: Call(_softmax), ((1024, 4096),)),
    Problem("conv2d_relu_max_pool_3x3_fp32", lambda: ConvReluPool(3, 32, 3, 1, 1, pool=2), ((8, 3, 64, 64),)),
    Problem("conv2d_3x3_fp32", lambda: nn.Conv2d(16, 32, 3, 1, 1), ((4, 16, 32, 32),)),
    Problem("linear_gelu_512x256x1024_fp32", lambda: nn.Sequential(nn.Linear(256, 1024), nn.GELU()), ((512, 256),)),
    Problem("attention_2x4x256x64_fp32", Attention, ((2, 4, 256, 64),) * 3),
    Problem("layer_norm_train_1024x512_fp32", lambda: nn.LayerNorm(512), ((1024, 512),), training=True),
)
PROBLEMS = {problem.name: problem for problem in (*SEED, *WIDER, *ROWS, *CPU)}
