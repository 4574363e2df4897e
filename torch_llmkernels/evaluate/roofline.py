"""The time that no implementation beats: bytes that must move, arithmetic that must be done, and this device's measured ceilings.

Every input is read once and every output written once; products count 2 * m * n * k, convolutions and attention likewise. The
rate for products follows the precision policy. Strict float32 on a GPU with float16 tensor cores can be had from three float16
products of split operands, as accurately as from the scalar units, so its ceiling is a third of the float16 rate where that is
more than the float32 rate. On a CPU it is the float32 rate.

A CPU is shared, and its speed drifts: what counts is the best of all the measurements of a process, and a search takes the best
of its processes (`search.tree.Tree.floor_ms`).
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from torch_llmkernels.errors import SchemaError
from torch_llmkernels.evaluate.buffers import dtype_of
from torch_llmkernels.evaluate.reference import precision
from torch_llmkernels.evaluate.roles import operator_calls, schema_arguments
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.program import module_of
from torch_llmkernels.task import ITEMSIZE, Numerics, Task

SPLIT_PRODUCTS = 3
"""float16 products that make one product of float32 accuracy (high*high, high*low, low*high)."""
FAST_CONVOLUTION = 4.0
"""Factor that Winograd's F(4x4, 3x3) saves of a 3x3 convolution's multiplications (Lavin and Gray, 2016)."""
CPU_PRODUCT_SLACK = 5.0
"""How much faster than the measured product one on a CPU may be before it is impossible: the machine may have sped up since."""
BELOW_FLOOR = 0.9
"""A measured time under this part of the impossible time is a mistake of the measurement; above it, noise of the ceilings."""


@dataclasses.dataclass(frozen=True)
class Ceilings:
    """What a device was measured to do, per second.

    Attributes:
        copy: Bytes read plus bytes written by a large copy in device memory.
        cache: The same while it stays in cache (CPU: over all threads).
        fp32: Operations of a strict float32 matrix product.
        tf32: The same with TF32 allowed; `fp32` where there is no such mode.
        fp16: Operations of a float16 matrix product.
    """

    copy: float
    cache: float
    fp32: float
    tf32: float
    fp16: float

    def to_json(self) -> dict[str, float]:
        """Plain JSON; `from_json` reads it back."""
        return dataclasses.asdict(self)

    @classmethod
    def from_json(cls, plain: Mapping[str, Any]) -> Ceilings:
        """The ceilings `to_json` wrote.

        Raises:
            SchemaError: for missing or unknown fields.
        """
        try:
            return cls(**{k: float(v) for k, v in plain.items()})
        except (TypeError, ValueError) as error:
            raise SchemaError(f"ceilings are damaged: {error}; measure them again") from None


@dataclasses.dataclass(frozen=True)
class Floor:
    """The roofline floor of a task.

    Attributes:
        bytes: Of every input and output, once.
        flops: Of the products; of a program without products, one per element of every intermediate.
        ms: The larger of both at the device's ceilings.
        bound: `bytes` or `flops`: which one.
        impossible_ms: A bound that holds for fast convolution algorithms and for data that is still in cache too.
    """

    bytes: int
    flops: int
    ms: float
    bound: str
    impossible_ms: float


def floor(task: Task, facts: DeviceFacts, ceilings: Ceilings) -> Floor:
    """The floor of a task (dynamic: at its hints) on a device."""
    task = task.at()
    read = sum(_bytes(t) for t in task.inputs)
    written = sum(_bytes(t) for t in task.outputs)
    flops, is_product = count_flops(task)
    rate = _rate(task, ceilings, facts.target) if is_product else ceilings.fp32
    in_cache = facts.target == "cpu" and read + written <= facts.l2_bytes * facts.threads
    moving, computing = (read + written) / (ceilings.cache if in_cache else ceilings.copy), flops / rate
    # outputs that fit the cache need not reach memory within the measurement; the inputs are rotated out of a GPU's
    cold = (read + max(0, written - facts.l2_bytes)) / ceilings.copy
    least_moving = (read + written) / ceilings.cache if facts.target == "cpu" else cold
    saving = FAST_CONVOLUTION if any("convolution" in node.op for node in task.program) else 1.0
    saving *= CPU_PRODUCT_SLACK if facts.target == "cpu" else 1.0
    least_computing = computing / saving if is_product else 0.0
    return Floor(
        read + written, flops, max(moving, computing) * 1e3, "bytes" if moving >= computing else "flops",
        max(least_moving, least_computing) * 1e3,
    )  # fmt: skip


def _bytes(spec: Any) -> int:
    sizes = [int(n) for n, s in zip(spec.shape, spec.stride, strict=True) if s != 0]
    return math.prod(sizes) * ITEMSIZE[spec.dtype] if 0 not in spec.shape else 0


def _rate(task: Task, ceilings: Ceilings, target: str) -> float:
    dtypes = {t.dtype for t in task.inputs}
    if dtypes & {"float16", "bfloat16"}:
        return ceilings.fp16
    if "float64" in dtypes and target == "cpu":
        return ceilings.fp32
    if "float64" in dtypes:
        return 2 * ceilings.fp32  # the tensor cores of some GPUs do float64 somewhat faster than their scalar units do float32
    policy = task.numerics.conv if any("convolution" in node.op for node in task.program) else task.numerics.matmul
    if policy != "ieee":
        return max(ceilings.tf32, ceilings.fp16)
    return max(ceilings.fp32, ceilings.fp16 / SPLIT_PRODUCTS) if target == "cuda" else ceilings.fp32


def count_flops(task: Task) -> tuple[int, bool]:
    """(operations of the program's products, True), or without products (elements of every result, False); a static task."""
    from torch.utils.flop_counter import FlopCounterMode

    module = module_of(task)
    inputs = [torch.empty([int(d) for d in t.shape], dtype=dtype_of(t), device="meta") for t in task.inputs]
    elements = sum(math.prod(int(d) for d in t.shape) for t in task.outputs)
    counter = FlopCounterMode(display=False)
    try:
        with counter, torch.no_grad():
            module(*inputs)
        products = counter.get_total_flops()
    except (RuntimeError, NotImplementedError):  # an operator without a meta kernel
        products = 0
    products = products or _attention_flops(task)
    if any(schema_arguments(n.target, n.args, n.kwargs).get("is_causal") for n in operator_calls(module)):
        products //= 2
    return (products, True) if products else (elements * len(task.program), False)


def _attention_flops(task: Task) -> int:
    """Of the CPU's fused attention, which torch's counter does not know: two products forward, five backward."""
    fused = [node.op for node in task.program if "_scaled_dot_product" in node.op]
    if not fused:
        return 0
    shapes = {t.name: [int(d) for d in t.shape] for t in task.inputs if len(t.shape) == 4}
    query, key = (shapes.get(n) for n in ("query", "key"))
    query, key = (query, key) if query and key else list(shapes.values())[-2:] if len(shapes) > 1 else ([0] * 4, [0] * 4)
    return (5 if "backward" in fused[0] else 2) * 2 * math.prod(query) * key[2]


_best_cpu: dict[int, Ceilings] = {}  # by threads


def measure_ceilings(target: str, index: int = 0, *, again: bool = False) -> Ceilings:
    """Measure device `index` of `target` (`cuda` or `cpu`); a fraction of a second.

    A GPU is measured once per process. A CPU is measured `again` if asked, and every ceiling is the highest it saw.
    """
    if target == "cuda":
        return _measure_cuda(index)
    threads = torch.get_num_threads()
    if threads in _best_cpu and not again:
        return _best_cpu[threads]
    found = _measure_cpu()
    known = _best_cpu.get(threads, found)
    _best_cpu[threads] = Ceilings(*map(max, dataclasses.astuple(known), dataclasses.astuple(found)))
    return _best_cpu[threads]


def _measure_cpu() -> Ceilings:
    threads = torch.get_num_threads()
    large, small = torch.rand(1 << 23), torch.rand(1 << 14)
    target_large, target_small = torch.empty_like(large), torch.empty_like(small)
    a = torch.rand(768, 768)
    out = torch.empty_like(a)
    copy = 2 * large.nbytes / _best(lambda: target_large.copy_(large))
    cache = 2 * small.nbytes / _best(lambda: target_small.copy_(small), repeat=200) * threads
    with precision(Numerics()):
        fp32 = 2 * 768**3 / _best(lambda: torch.mm(a, a, out=out))
        half, half_out = a.bfloat16(), out.bfloat16()
        bf16 = 2 * 768**3 / _best(lambda: torch.mm(half, half, out=half_out), repeat=2)
    return Ceilings(copy, max(cache, copy), fp32, fp32, max(fp32, bf16))


def _best(call: Callable[[], Any], repeat: int = 8) -> float:
    call()
    times = []
    for _ in range(repeat):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return min(times)


@functools.cache
def _measure_cuda(index: int) -> Ceilings:
    with torch.cuda.device(index):
        source = torch.empty(1 << 30, dtype=torch.uint8, device="cuda").random_()
        target = torch.empty_like(source)
        copy = 2 * source.nbytes / _best_cuda(functools.partial(target.copy_, source))
        del source, target
        rates = []
        for dtype, policy in ((torch.float32, "ieee"), (torch.float32, "tf32"), (torch.float16, "ieee")):
            a = torch.randn(8192, 8192, device="cuda", dtype=dtype)
            out = torch.empty_like(a)
            with precision(Numerics(matmul=policy)):
                rates.append(2 * 8192**3 / _best_cuda(functools.partial(torch.mm, a, a, out=out)))
        return Ceilings(copy, copy, *rates)


def _best_cuda(call: Callable[[], Any], repeat: int = 8) -> float:
    call()
    times = []
    for _ in range(repeat):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        call()
        end.record()
        end.synchronize()
        times.append(begin.elapsed_time(end) / 1e3)
    return min(times)
