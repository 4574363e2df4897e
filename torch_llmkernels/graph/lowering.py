"""How Inductor compiles `llmk::region`: an extern kernel that writes into Inductor's own buffers.

Outputs and workspaces are ordinary Inductor buffers, planned and reused like all others; the generated Python wrapper calls the
slot directly, `llmk_softmax_1f2e(buf0, buf1, arg0, s0)`, without the dispatcher. A C++ wrapper calls `llmk::region_out` instead.
An AOTInductor package is to run without Python, where neither exists: there the operator is refused.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import fx
from torch._inductor import ir
from torch._inductor.lowering import empty_strided, register_lowering
from torch._inductor.virtualized import V
from torch.utils._ordered_set import OrderedSet

from torch_llmkernels.errors import LLMKernelsError
from torch_llmkernels.graph import op
from torch_llmkernels.task import Task, digest

if TYPE_CHECKING:
    from torch_llmkernels.kernels.launch import Workspace


class RegionCall(ir.ExternKernel):
    """`slot(*outputs, *workspaces, *inputs, *symbols)` in Inductor's Python wrapper.

    Args:
        spec: What the slot is bound from.
        scratch: Bytes of each workspace among `tensors`.
        tensors: Outputs, workspaces, inputs.
        written: Those that the call writes; at least one.
        symbols: Values of the task's symbols.
    """

    def __init__(
        self, spec: str, scratch: tuple[int, ...], tensors: Sequence[Any], written: Sequence[Any], symbols: Sequence[Any]
    ) -> None:
        self.device = written[0].get_device()
        none = ir.NoneLayout(device=self.device)
        super().__init__(None, none, self.unwrap_storage(list(tensors)), tuple(symbols))
        self.spec, self.scratch = spec, scratch
        self.mutation_outputs = [ir.MutationOutput(none, buffer, self) for buffer in written]
        V.graph.register_operation(self)
        for buffer in written:
            V.graph.mark_buffer_mutated(buffer.get_name())

    def codegen(self, wrapper: Any) -> None:
        signature = op.decode_spec(self.spec).task.signature.replace(".", "_")
        name = f"llmk_{signature}_{digest([self.spec, self.scratch])[:12]}"
        slot = f"llmk_bind({self.spec!r}, {self.scratch!r})"
        wrapper.add_import_once(f"from torch_llmkernels.graph.op import bind as llmk_bind; {name} = {slot}")
        args = [buffer.codegen_reference() for buffer in self.inputs]
        args += [wrapper.val_to_arg_str(symbol) for symbol in self.constant_args]
        wrapper.writeline(f"{name}({', '.join(args)})")

    def should_allocate(self) -> bool:
        return False

    def get_outputs(self) -> list[Any]:
        return list(self.mutation_outputs)

    def get_device(self) -> torch.device:
        return self.device

    def get_unbacked_symbol_defs(self) -> OrderedSet[Any]:
        return OrderedSet()


def _expressions(sizes: Sequence[Any]) -> list[Any]:
    return [size.node.expr if isinstance(size, torch.SymInt) else size for size in sizes]


def _buffer(size: Sequence[Any], stride: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Any:
    buffer = empty_strided(_expressions(size), _expressions(stride), dtype=dtype, device=device)
    buffer.realize()
    return buffer


def _scratch(layout: Workspace, device: torch.device) -> Any:
    """Scratch memory of the kernel as an Inductor buffer; the launcher zeroes what has to be zero."""
    stride = torch._prims_common.make_contiguous_strides_for(layout.shape)
    return _buffer(layout.shape, stride, getattr(torch, layout.dtype), device)


def _exact(value: Any, stride: Sequence[Any]) -> Any:
    """The input as a buffer with these strides, copied if it has others."""
    return ir.ExternKernel.require_exact_strides(ir.ExternKernel.realize_input(value), _expressions(stride))


def _strides(task: Task, node: fx.Node, symbols: Sequence[Any]) -> list[Sequence[Any]]:
    """Strides of the call's tensors: of the task's inputs those that the kernel was compiled for, then those of what is prepared.

    The graph's own may be others by now: passes that run after the swap pad products, and what reads those is then a slice.
    """
    given = [arg.meta["val"].stride() for arg in node.args[1]]  # type: ignore[union-attr]
    return [op.concrete_layout(task, tensor, symbols)[1] for tensor in task.inputs] + given[len(task.inputs) :]


@register_lowering(op.region_op(), type_promotion_kind=None)
def lower_region(spec: str, ins: Sequence[Any], syms: Sequence[Any]) -> list[Any]:
    """The lowering of `llmk::region`; outputs have exactly the strides that the graph promises.

    Raises:
        LLMKernelsError: in an AOTInductor compilation.
    """
    decoded = op.decode_spec(spec)
    if V.graph.aot_mode:
        raise LLMKernelsError(
            f"{decoded.label}: an AOTInductor package runs without Python, and a swapped region needs it; export "
            "the model itself, without swaps (torch.export.export of the uncompiled model)"
        )
    node = V.graph.current_node
    values = node.meta["val"]
    strides = _strides(decoded.task, node, _expressions(syms))
    inputs = [_exact(value, stride) for value, stride in zip(ins, strides, strict=True)]
    outputs = [_buffer(v.size(), v.stride(), v.dtype, v.device) for v in values]
    if V.graph.cpp_wrapper:
        ir.FallbackKernel.create(op.region_out_op(), spec, outputs, inputs, list(syms))
    else:
        device = values[0].device
        inputs, prepared = inputs[: len(decoded.task.inputs)], inputs[len(decoded.task.inputs) :]
        layouts = op.workspace_layouts(decoded, device)
        workspaces = op.merged(decoded, layouts, prepared, functools.partial(_scratch, device=device))
        scratch = [w for w in workspaces if not any(w is p for p in prepared)]
        RegionCall(spec, op.scratch_bytes(layouts), [*outputs, *workspaces, *inputs], [*outputs, *scratch], syms)
    return outputs
