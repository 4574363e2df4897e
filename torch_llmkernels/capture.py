"""Every region of a model, without compiling it: Dynamo captures each graph, the backend lists its tasks, eager runs it.

What is listed is what `torch.compile(model, backend="llmkernels")` would look up: the same trace, settings and limits, graph
breaks included, and the joint forward and backward graph when training. Inductor generates no code and no kernel is run.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils._pytree import tree_leaves

from torch_llmkernels import backend
from torch_llmkernels.errors import LLMKernelsError
from torch_llmkernels.graph_decision import graph_key
from torch_llmkernels.options import read_request
from torch_llmkernels.registry import RegionReport
from torch_llmkernels.task import Task


@dataclasses.dataclass(frozen=True)
class Call:
    """One way a model is called.

    Attributes:
        args: Positional arguments.
        kwargs: Keyword arguments.
        dynamic_dims: Dimensions that vary from call to call, by position or keyword of the argument.
    """

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    dynamic_dims: Mapping[int | str, Sequence[int]] = dataclasses.field(default_factory=dict)

    @property
    def tensors(self) -> list[tuple[int | str, torch.Tensor]]:
        """Every tensor, those inside lists and dicts too, with the position or keyword of its argument."""
        named = (*enumerate(self.args), *self.kwargs.items())
        return [(name, t) for name, value in named for t in tree_leaves(value) if isinstance(t, torch.Tensor)]

    def mark(self) -> None:
        """Tell Dynamo about `dynamic_dims`.

        Raises:
            LLMKernelsError: if they name an argument that is not a tensor, or a dimension it does not have.
        """
        named: dict[int | str, Any] = {**dict(enumerate(self.args)), **self.kwargs}
        for name, dims in self.dynamic_dims.items():
            tensor = named.get(name)
            if not isinstance(tensor, torch.Tensor) or any(not -tensor.ndim <= dim < tensor.ndim for dim in dims):
                known = ", ".join(f"{k}: {v.ndim} dimensions" for k, v in named.items() if isinstance(v, torch.Tensor))
                raise LLMKernelsError(
                    f"dynamic_dims: argument {name!r} has no dimensions {list(dims)}; tensors are {known or 'none'}"
                )
            for dim in dims:
                torch._dynamo.mark_dynamic(tensor, dim % tensor.ndim)


@dataclasses.dataclass(frozen=True)
class CapturedGraph:
    """One graph that Dynamo made.

    Attributes:
        key: What whole-graph decisions are filed under; see `graph_decision.graph_key`.
        tasks: Of its regions, in graph order; equal regions give equal tasks.
        skipped: Regions that were recognised but cannot be taken, and why.
        note: Why the whole graph goes to Inductor unseen; else empty.
    """

    key: str
    tasks: tuple[Task, ...]
    skipped: tuple[RegionReport, ...] = ()
    note: str = ""


@dataclasses.dataclass(frozen=True)
class CapturedRegion:
    """One region.

    Attributes:
        task: What it computes.
        graph: `CapturedGraph.key` of its graph.
    """

    task: Task
    graph: str


def capture(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    training: bool = False,
    dynamic: bool = False,
) -> list[CapturedRegion]:
    """Every region of every graph of `model(*args, **kwargs)`, in the order in which the backend would meet them.

    Args:
        model: A module or function; left in the train or eval mode it is in. It is run once, eagerly.
        args: Positional arguments, on the model's device.
        kwargs: Keyword arguments.
        training: Capture forward and backward together; else the forward graph without gradients.
        dynamic: As in `torch.compile`.

    Raises:
        LLMKernelsError: if arguments and model are on different devices.
    """
    graphs = capture_graphs(model, [Call(tuple(args), kwargs or {})], training=training, dynamic=dynamic)
    return [CapturedRegion(task, graph.key) for graph in graphs for task in graph.tasks]


def capture_graphs(
    model: Any,
    calls: Sequence[Call],
    *,
    training: bool = False,
    dynamic: bool = False,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> list[CapturedGraph]:
    """Every graph of these calls, made one after another as a user would (a second shape may so give a dynamic graph).

    Args:
        model: See `capture`.
        calls: At least one.
        training: See `capture`.
        dynamic: As in `torch.compile`.
        mode: As in `torch.compile`.
        options: As in `torch.compile`.

    Raises:
        LLMKernelsError: if arguments and model are on different devices.
        SettingsError: for an unknown mode or option.
    """
    request = read_request(mode, options)
    found: list[CapturedGraph] = []

    def list_regions(gm: fx.GraphModule, example_inputs: Sequence[Any]) -> Any:
        note = backend.why_plain(gm, request)
        if note:
            found.append(CapturedGraph("", (), (), note))
        else:
            plan = backend.plan_of(gm, example_inputs, request)
            found.append(CapturedGraph(graph_key(plan.tasks, request), plan.tasks, plan.skipped))
        return gm.forward

    for call in calls:
        check_devices(model, call)
    with fresh_dynamo(), untouched(model), torch.set_grad_enabled(training):
        compiled = torch.compile(model, backend=list_regions, dynamic=dynamic or None)
        for call in calls:
            call.mark()
            compiled(*call.args, **call.kwargs)
    return found


def check_devices(model: Any, call: Call) -> None:
    """Refuse a call whose tensors are not where the model's are: Dynamo's own message for it is a page long.

    Raises:
        LLMKernelsError: naming both devices.
    """
    state = (*model.parameters(), *model.buffers()) if isinstance(model, nn.Module) else ()
    homes = {str(t.device) for t in state}
    for name, tensor in call.tensors:
        # a scalar on the CPU may be mixed with anything
        if tensor.ndim and homes and str(tensor.device) not in homes:
            raise LLMKernelsError(
                f"argument {name} is on {tensor.device}, the model on {', '.join(sorted(homes))}; move one of them with .to(...)"
            )


@contextlib.contextmanager
def fresh_dynamo() -> Iterator[None]:
    """Drop Dynamo's compiled code before and after, so that captures neither see nor fill up its per-function cache."""
    torch._dynamo.reset()
    try:
        yield
    finally:
        torch._dynamo.reset()


@contextlib.contextmanager
def untouched(model: Any) -> Iterator[None]:
    """Restore what running a model changes: its buffers (running statistics), its gradients and the random state."""
    if not isinstance(model, nn.Module):
        with torch.random.fork_rng():
            yield
        return
    buffers = {name: buffer.detach().clone() for name, buffer in model.named_buffers()}
    gradients = {name: parameter.grad for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = None
    try:
        with torch.random.fork_rng():
            yield
    finally:
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in buffers:
                    buffer.copy_(buffers[name])
        for name, parameter in model.named_parameters():
            parameter.grad = gradients.get(name)
