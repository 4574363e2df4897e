"""CPU tensors that end where a page without access begins: reading past the end is a fault, not a lucky guess.

What compute-sanitizer's memcheck is on CUDA, for the one mistake that a native kernel makes most: a vector load over the last
elements. The fault kills the worker, which reports the signal and the stage.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Callable, Sequence

import torch

from torch_llmkernels.evaluate.buffers import assign, dtype_of, span_bytes
from torch_llmkernels.evaluate.inputs import InputGenerator
from torch_llmkernels.task import Task, TensorSpec

LARGEST_BYTES = 64 << 20
"""Tasks above this are not fenced: a kernel's tails do not depend on how many whole vectors come before them."""


def run_fenced(
    task: Task, run: Callable[..., None], workspaces: Sequence[TensorSpec], alignment: int, symbols: Sequence[int]
) -> None:
    """Call a CPU candidate once on normal data, every tensor against the fence; a static task. Past the end lies SIGSEGV.

    Where mprotect is missing (not Linux or macOS) nothing is run.
    """
    specs = (*task.outputs, *workspaces, *task.inputs)
    if os.name != "posix" or sum(span_bytes(t, dtype_of(t).itemsize) for t in specs) > LARGEST_BYTES:
        return
    regions = [_Region(t, alignment) for t in specs]
    inputs = regions[len(specs) - len(task.inputs) :]
    for region, values in zip(inputs, InputGenerator(task).make("normal", 0), strict=True):
        region.load(values)
    run(*(r.tensor for r in regions), *symbols)


class _Region:
    """Pages of memory, the last of them without access, and a tensor that ends within `alignment` bytes of it."""

    def __init__(self, spec: TensorSpec, alignment: int) -> None:
        dtype = dtype_of(spec)
        span = span_bytes(spec, dtype.itemsize)
        alignment = max(alignment, dtype.itemsize)
        padded = -(-max(span, 1) // alignment) * alignment
        page = mmap.PAGESIZE
        usable = -(-padded // page) * page
        self._memory = mmap.mmap(-1, usable + page)
        address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))
        if ctypes.CDLL(None, use_errno=True).mprotect(ctypes.c_void_p(address + usable), page, 0):
            raise OSError(ctypes.get_errno(), "mprotect failed; the fence cannot be set up")
        flat = torch.frombuffer(self._memory, dtype=torch.uint8, offset=usable - padded, count=max(span, 1))
        shape, stride = ([int(d) for d in dims] for dims in (spec.shape, spec.stride))
        self.tensor = flat[:span].view(dtype).as_strided(shape, stride)

    def load(self, values: torch.Tensor) -> None:
        """Write values of the tensor's shape."""
        assign(self.tensor, values)
