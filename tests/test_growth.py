"""Regions without a pattern: pointwise chains around a reduction."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from graphs import capture
from torch import Tensor, fx

from torch_llmkernels.graph.growth import LIMIT
from torch_llmkernels.graph.regions import Region, find_regions
from torch_llmkernels.graph.task_of import task_of
from torch_llmkernels.program import module_of


def regions(gm: fx.GraphModule) -> list[Region]:
    return find_regions(gm.graph)[0]


def only(gm: fx.GraphModule) -> Region:
    (region,) = regions(gm)
    return region


def l1_norm(x: Tensor) -> Tensor:
    return x / x.abs().mean(-1, keepdim=True)


def test_a_reduction_takes_its_producers_and_readers() -> None:
    region = only(capture(l1_norm, torch.randn(4, 8)))
    assert region.signature.startswith("pointwise_reduce.")
    assert ([r for r, _ in region.inputs], [r for r, _ in region.outputs]) == (["x"], ["y"])
    x = torch.randn(4, 8)
    torch.testing.assert_close(module_of(task_of(region).task)(x)[0], l1_norm(x))


def test_the_name_depends_on_the_program_only() -> None:
    first = only(capture(l1_norm, torch.randn(4, 8)))
    other_shape = only(capture(lambda t: t / torch.mean(torch.abs(t), dim=(1,), keepdim=True), torch.randn(6, 16)))
    other_program = only(capture(lambda x: x / x.abs().sum(-1, keepdim=True), torch.randn(4, 8)))
    assert first.signature == other_shape.signature != other_program.signature
    assert task_of(first).task.signature_key == task_of(other_shape).task.signature_key


def test_the_order_of_commuting_operands_does_not_matter() -> None:
    a, b = torch.randn(4, 8), torch.randn(4, 8)
    spellings = [
        lambda a, b: (a * b + a).sum(-1),
        lambda a, b: (a + b * a).sum(-1),
        lambda b, a: (a + a * b).sum(-1),
    ]
    assert len({task_of(only(capture(f, a, b))).task.key for f in spellings}) == 1


def test_all_readers_of_a_value_come_along_or_none_does() -> None:
    def two_readers(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.exp().sum(-1)
        return total.log(), total.sqrt()

    region = only(capture(two_readers, torch.randn(4, 8)))
    assert [role for role, _ in region.outputs] == ["y", "y1"]

    def read_elsewhere(x: Tensor) -> tuple[Tensor, Tensor]:
        total = x.exp().sum(-1)
        return total.log(), total.cumsum(0)

    region = only(capture(read_elsewhere, torch.randn(4, 8)))
    assert [str(n.target) for _, n in region.outputs] == ["aten.sum.dim_IntList"]


def test_a_lone_reduction_is_left_to_inductor() -> None:
    assert regions(capture(lambda x: x.sum(-1), torch.randn(4, 8))) == []


def test_growth_stops_at_the_limit_and_at_named_regions() -> None:
    def long(x: Tensor) -> Tensor:
        for _ in range(2 * LIMIT):
            x = x.sin()
        return x.sum(-1)

    assert len(only(capture(long, torch.randn(4, 8))).nodes) == LIMIT
    found = regions(capture(lambda x: F.softmax(x, -1).exp().sum(-1), torch.randn(4, 8)))
    assert [r.signature.split(".")[0] for r in found] == ["softmax", "pointwise_reduce"]


def test_a_cycle_is_never_grown() -> None:
    def net(x: Tensor) -> Tensor:
        total = x.exp().sum(-1, keepdim=True)
        return total + torch.cumsum(total, 0)

    gm = capture(net, torch.randn(4, 8))
    for region in regions(gm):
        inside = set(region.nodes)
        assert not any("cumsum" in str(n.target) for n in inside)
        assert not any(str(n.target) == "aten.add.Tensor" for n in inside)
