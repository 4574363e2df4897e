"""Guarded memory: tensors of exact shape, stride and alignment inside a larger buffer whose every other byte is watched.

A candidate sees only the tensor. Around it lie guard bands, and between its elements (non-dense strides) lie gaps; both hold a
known byte, so that a write outside the tensor is found, and so that a read outside it, of 0xFF bytes, is NaN or -1.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from torch_llmkernels.task import TensorSpec

GUARD_BYTES = 1 << 16
"""Bytes watched on each side. Writes further off are the sanitizer's business."""
PAGE = 4096
NAN_BYTE, FINITE_BYTE = 0xFF, 0x3C
"""Fill bytes. 0xFF.. is NaN in every float format and -1 as an integer; 0x3C.. is a small ordinary number in each."""


def dtype_of(spec: TensorSpec) -> torch.dtype:
    """The torch dtype of a spec."""
    return getattr(torch, spec.dtype)


class GuardedTensor:
    """A tensor of exact layout in a watched buffer.

    Args:
        spec: Static (no symbols).
        device: Where it lives.
        alignment: The first element's address is a multiple of this many bytes, and of no larger power of two: a kernel that
            counts on more than it declares is found.

    Attributes:
        tensor: The view a candidate gets.
        storage: Every byte of the buffer, uint8.
    """

    def __init__(self, spec: TensorSpec, device: torch.device | str, alignment: int = PAGE) -> None:
        self.spec = spec
        dtype = dtype_of(spec)
        alignment = max(alignment, dtype.itemsize)  # torch has no tensors between elements
        self._span = span_bytes(spec, dtype.itemsize)
        self.storage = torch.empty(self._span + 2 * GUARD_BYTES + 2 * PAGE, dtype=torch.uint8, device=device)
        self._begin = -self.storage.data_ptr() % PAGE + GUARD_BYTES + (alignment if alignment < PAGE else 0)
        flat = self.storage[self._begin : self._begin + self._span].view(dtype)
        self.tensor = flat.as_strided(_ints(spec.shape), _ints(spec.stride))
        self.fill = NAN_BYTE
        self.poison(NAN_BYTE)

    def poison(self, byte: int) -> None:
        """Fill the whole buffer, tensor and guards, with one byte."""
        self.fill = byte
        self.storage.fill_(byte)

    def load(self, values: torch.Tensor) -> None:
        """Write `values` (of the spec's shape, any layout); guards and gaps keep their fill."""
        assign(self.tensor, values)

    def damage(self) -> str | None:
        """What was written outside the tensor's elements, or None."""
        for where, band in (
            ("before the tensor's first element", self.storage[: self._begin]),
            ("after the tensor's last element", self.storage[self._begin + self._span :]),
            ("in the gaps between the tensor's elements", self._gaps()),
        ):
            if band is not None and bool((band != self.fill).any()):
                return f"{int((band != self.fill).sum())} bytes written {where}"
        return None

    def _gaps(self) -> torch.Tensor | None:
        if self._span == self.tensor.numel() * self.tensor.element_size():
            return None
        size = self.tensor.element_size()
        covered = torch.zeros(self._span // size, dtype=torch.bool, device=self.storage.device)
        _one_element_per_address(covered.as_strided(self.tensor.shape, self.tensor.stride())).fill_(True)
        return self.storage[self._begin : self._begin + self._span].view(-1, size)[~covered]


def empty(spec: TensorSpec, device: torch.device | str) -> torch.Tensor:
    """An uninitialised tensor of a static spec, in an allocation of its own."""
    return torch.empty_strided(_ints(spec.shape), _ints(spec.stride), dtype=dtype_of(spec), device=device)


def assign(tensor: torch.Tensor, values: torch.Tensor) -> None:
    """Copy `values`, of the same shape, into a tensor that may repeat elements (stride 0)."""
    for dim, stride in enumerate(tensor.stride()):
        if stride == 0 and tensor.shape[dim] > 1:
            tensor, values = tensor.narrow(dim, 0, 1), values.narrow(dim, 0, 1)
    tensor.copy_(values)


def span_bytes(spec: TensorSpec, itemsize: int) -> int:
    """Bytes from the first element to the end of the last; 0 for an empty tensor."""
    shape, stride = _ints(spec.shape), _ints(spec.stride)
    if 0 in shape:
        return 0
    return (1 + sum((n - 1) * s for n, s in zip(shape, stride, strict=True))) * itemsize


def _ints(dims: Sequence[int | str]) -> list[int]:
    return [int(d) for d in dims]


def _one_element_per_address(tensor: torch.Tensor) -> torch.Tensor:
    """The view without the repeats of expanded (stride 0) dimensions."""
    for dim, (size, stride) in enumerate(zip(tensor.shape, tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
