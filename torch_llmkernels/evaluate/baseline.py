"""What a kernel has to beat: the task's program as eager runs it, and as Inductor compiles it."""

from __future__ import annotations

import collections
import functools
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch._guards import TracingContext, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from torch_llmkernels.evaluate.buffers import empty
from torch_llmkernels.evaluate.reference import precision
from torch_llmkernels.program import module_of
from torch_llmkernels.task import Task

log = logging.getLogger("torch_llmkernels.evaluate")

Call = Callable[[Sequence[torch.Tensor]], Any]
"""Runs a static task on its inputs and gives its outputs."""

KEPT = 8
"""Compiled baselines kept by a process: a search evaluates many candidates of one task."""
_compiled: collections.OrderedDict[str, Call | None] = collections.OrderedDict()


def eager(task: Task) -> Call:
    """The static task's program, operator by operator."""
    module = module_of(task)
    return lambda inputs: module(*inputs)


def inductor(task: Task, inputs: Sequence[torch.Tensor]) -> Call | None:
    """The static task compiled by Inductor, called as Inductor's own wrapper calls it; None if it does not compile.

    Inductor's options are its defaults, whatever the model is compiled with. Neither Dynamo's guards nor AOTAutograd's wrapper
    are in the call: inside a larger graph a region pays for neither.
    """
    if task.key not in _compiled:
        _compiled[task.key] = _compile(task, inputs)
        while len(_compiled) > KEPT:
            _compiled.popitem(last=False)
    return _compiled[task.key]


def compile_ahead(task: Task) -> None:
    """Let Inductor compile the task and run nothing: a later `inductor` finds the code in torch's compile caches on disk."""
    if task.key in _ahead:
        return
    _ahead.add(task.key)
    try:
        _compile_task(task.at())
    except Exception as error:  # `inductor` will say the same
        log.debug("no Inductor baseline for %s ahead: %s: %s", task.signature, type(error).__name__, error)


_ahead: set[str] = set()  # keys of the tasks that this process has compiled ahead


@functools.cache
def wrapper() -> Callable[[], Any]:
    """Inductor's wrapper on the CPU around almost nothing, one element plus one: what every call of `inductor` pays as well.

    Inside a larger graph neither Inductor's code for the region nor a kernel pays it. Does nothing where it does not compile.
    """
    one = torch.ones(1)
    try:
        inner: list[Any] = []
        _compile_fx(torch.fx.symbolic_trace(_PlusOne()), lambda: [torch.ones(1)], inner_compile=functools.partial(_keep, inner))
        (compiled,) = inner
        compiled([one])
    except Exception as error:  # `inductor` fails in the same way, and eager is left
        log.info("Inductor's wrapper alone was not measured: %s: %s", type(error).__name__, error)
        return lambda: None
    return lambda: compiled([one])


class _PlusOne(torch.nn.Module):
    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor]:
        return (x + 1,)


def _compile_task(task: Task, **options: Any) -> Call:
    with precision(task.numerics):
        return _compile_fx(module_of(task), lambda: [empty(t, task.device) for t in task.inputs], **options)


def _compile_fx(module: torch.fx.GraphModule, make: Callable[[], list[torch.Tensor]], **options: Any) -> Call:
    """`compile_fx` on a module and the inputs that `make` makes.

    The inputs are fake, with sizes that are no symbols (Inductor would give symbolic ones to an input that it makes fake itself),
    in a tracing context with a shape environment, without which Inductor would not use its cache. AOTAutograd's cache stays off:
    a hit there would skip `inner_compile`, and with it the call without AOTAutograd's wrapper.
    """
    from torch._inductor.compile_fx import compile_fx

    fake = FakeTensorMode(shape_env=ShapeEnv())
    with fake:
        inputs = make()
    no_cache = torch._functorch.config.patch(enable_autograd_cache=False)
    with torch.no_grad(), tracing(TracingContext(fake)), no_cache:
        return compile_fx(module, inputs, **options)


def _keep(inner: list[Any], *args: Any, **kwargs: Any) -> Any:
    from torch._inductor.compile_fx import compile_fx_inner

    inner.append(compile_fx_inner(*args, **kwargs))
    return inner[-1]


def _compile(task: Task, inputs: Sequence[torch.Tensor]) -> Call | None:
    inner: list[Any] = []
    try:
        whole = _compile_task(task, inner_compile=functools.partial(_keep, inner))
        with torch.no_grad(), precision(task.numerics):
            expected = whole(*inputs)
            return _inner_call(inner, inputs, expected) or (lambda tensors: whole(*tensors))
    except Exception as error:  # whatever Inductor cannot do, eager is left to compare with
        log.info("no Inductor baseline for %s: %s: %s", task.signature, type(error).__name__, error)
        return None


def _inner_call(inner: list[Any], inputs: Sequence[torch.Tensor], expected: Any) -> Call | None:
    """Inductor's wrapper alone, if it takes the program's inputs and gives its outputs as they are."""
    if len(inner) != 1:
        return None
    got = inner[0](list(inputs))
    same = len(got) == len(expected) and all(
        isinstance(g, torch.Tensor) and g.shape == e.shape and g.dtype == e.dtype for g, e in zip(got, expected, strict=True)
    )
    return (lambda tensors: inner[0](list(tensors))) if same else None
