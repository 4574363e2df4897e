"""The scan that spares a trace: it may suspect too much, never too little."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import pytest
import torch
import torch.nn.functional as F
import zoo
from torch import fx, nn

from torch_llmkernels.graph.scan import might_match


@pytest.fixture(autouse=True)
def reset() -> Iterator[None]:
    torch._dynamo.reset()
    yield


def captured(function: Callable, *inputs: torch.Tensor) -> list[fx.GraphModule]:
    """The graphs that Dynamo hands to a backend."""
    graphs: list[fx.GraphModule] = []

    def keep(gm: fx.GraphModule, _: object) -> Callable:
        graphs.append(gm)
        return gm.forward

    with torch.no_grad():
        torch.compile(function, backend=keep)(*inputs)
    return graphs


@pytest.mark.parametrize("case", list(zoo.CASES))
def test_every_model_of_the_zoo_is_suspected(case: str) -> None:
    module_of, inputs_of = zoo.CASES[case]
    assert all(might_match(gm) for gm in captured(module_of(), *inputs_of()))


X = torch.randn(4, 8, 8)
SUSPECTS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "operator": lambda x: x @ x, "method": lambda x: x.matmul(x), "bmm": lambda x: torch.bmm(x, x),
    "einsum": lambda x: torch.einsum("bij,bjk->bik", x, x), "baddbmm": lambda x: torch.baddbmm(x, x, x),
    "softmin": lambda x: F.softmin(x, -1), "method softmax": lambda x: x.softmax(-1),
    "nll": lambda x: F.nll_loss(x[0], torch.zeros(8).long()),
    "rsqrt": lambda x: x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6),
    "tensordot": lambda x: torch.tensordot(x, x, dims=([2], [2])),
    "instance norm": lambda x: F.instance_norm(x), "addmv": lambda x: torch.mv(x[0], x[0, 0]),
    "pool": lambda x: F.max_pool2d(x, 2),
    "sum": lambda x: (x * 2).sum(-1), "mean": lambda x: x.mean(), "loss": lambda x: F.l1_loss(x, x * 2),
    "amax": lambda x: x.amax(-1),
    "cond": lambda x: torch.cond(x.sum() > 0, lambda x: x.softmax(-1), lambda x: -x, (x,)),
}  # fmt: skip


@pytest.mark.parametrize("name", list(SUSPECTS))
def test_spellings_of_anchors_are_suspected(name: str) -> None:
    assert any(might_match(gm) for gm in captured(SUSPECTS[name], X))


@pytest.mark.parametrize("function", [lambda x: x + 1, lambda x: x.relu().transpose(0, 1), lambda x: torch.cat([x, x.exp()])])
def test_pointwise_graphs_are_not(function: Callable) -> None:
    assert not any(might_match(gm) for gm in captured(function, X))


def test_modules_that_dynamo_did_not_look_into_are_suspected() -> None:
    root = nn.Module()
    root.inner = nn.Identity()
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    assert might_match(fx.GraphModule(root, graph))
