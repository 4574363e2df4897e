"""Row-wise regions are matrices: one task however many leading dimensions the caller's tensors have."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from graphs import capture
from swapping import Kernels, swapping
from torch import nn

from torch_llmkernels import registry
from torch_llmkernels.graph.regions import find_regions
from torch_llmkernels.graph.rows import why_not_merged
from torch_llmkernels.graph.task_of import task_of
from torch_llmkernels.task import Task

SHAPES = [(24, 8), (4, 6, 8), (2, 2, 6, 8)]


def tasks(fn: Callable, *inputs: torch.Tensor, training: bool = False, dynamic: bool = False) -> list[Task]:
    graph = capture(fn, *inputs, training=training, dynamic=dynamic).graph
    return [task_of(region).task for region in find_regions(graph)[0]]


def rms_norm(x: torch.Tensor, w: torch.Tensor) -> torch.Tensor:
    """As language models spell it."""
    return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * w


W = torch.randn(8)
FORWARD = {
    "layer_norm": lambda x: F.layer_norm(x, (8,), W, W),
    "residual and layer_norm": lambda x: F.layer_norm(x + x.exp(), (8,)),
    "rms_norm": lambda x: F.rms_norm(x, (8,), W),
    "rms_norm by hand": lambda x: rms_norm(x, W),
    "softmax": lambda x: (x / 8).softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, -1),
    "linear and gelu": lambda x: F.gelu(F.linear(x, torch.outer(W, W), W)),
    "linear, activation and residual": lambda x: x + F.silu(F.linear(x, torch.outer(W, W))),
    "cross_entropy": lambda x: F.nll_loss(F.log_softmax(x, -1).view(-1, 8), x.argmax(-1).view(-1)),
}


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("name", FORWARD)
def test_two_three_and_four_dimensions_are_one_task(name: str, dynamic: bool) -> None:
    found = [tasks(FORWARD[name], torch.randn(shape), dynamic=dynamic) for shape in SHAPES]
    assert [len(each) for each in found] == [1, 1, 1]
    assert len({each[0].key for each in found}) == 1
    task = found[0][0]
    assert task.tensor("x").shape[0] == ("d0" if dynamic else 24)
    assert len(task.tensor("x").shape) == 2
    assert not any("view" in node.op for node in task.program)


TRAINING = {
    "layer_norm": nn.LayerNorm(8),
    "rms_norm": nn.RMSNorm(8),
    "softmax": nn.Softmax(-1),
    "log_softmax": nn.LogSoftmax(-1),
    "linear and gelu": nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8)),
}


@pytest.mark.parametrize("name", TRAINING)
def test_backward_regions_are_matrices_too(name: str) -> None:
    found = [tasks(TRAINING[name], torch.randn(shape, requires_grad=True), training=True) for shape in SHAPES]
    keys = [sorted(t.key for t in each if not t.signature.startswith("pointwise_reduce")) for each in found]
    assert keys[0] and keys[0] == keys[1] == keys[2]
    assert {t.tensor("mean").shape for t in found[2] if name == "layer_norm"} <= {(24, 1)}


def test_a_linear_layers_task_has_no_trace_of_its_callers_shape() -> None:
    (task,) = tasks(nn.Sequential(nn.Linear(8, 16), nn.GELU()), torch.randn(2, 12, 8))
    assert (task.tensor("x").shape, task.tensor("y").shape, task.params) == ((24, 8), (24, 16), ())


def test_normalised_dimensions_stay() -> None:
    (task,) = tasks(lambda x: F.layer_norm(x, (6, 8)), torch.randn(2, 2, 6, 8))
    assert task.tensor("x").shape == (4, 6, 8)
    assert task.param["normalized_shape"] == (6, 8)


def test_a_slice_of_every_row_can_be_merged() -> None:
    (task,) = tasks(nn.LayerNorm(8), torch.randn(4, 6, 24)[..., 8:16])
    assert (task.tensor("x").shape, task.tensor("x").stride) == ((24, 8), (24, 1))


@pytest.mark.parametrize(
    ("what", "x"),
    [
        ("transposed rows", torch.randn(6, 4, 8).transpose(0, 1)),
        ("a slice of the rows", torch.randn(4, 9, 8)[:, :6]),
        ("columns first", torch.randn(4, 8, 6).transpose(1, 2)),
    ],
)
def test_strides_that_cannot_be_merged_keep_their_own_task(what: str, x: torch.Tensor) -> None:
    (task,) = tasks(nn.LayerNorm(8), x)
    assert (task.tensor("x").shape, task.tensor("x").stride) == ((4, 6, 8), x.stride())


@pytest.mark.parametrize(
    "fn",
    [
        lambda x: x.softmax(1),
        lambda x: (x + torch.ones(6, 8)).softmax(-1),
        lambda x: (x + torch.ones(4, 1, 8)).softmax(-1),
    ],
    ids=["over another dimension", "a mask of some rows", "a mask of all rows of a batch"],
)
def test_where_rows_differ_they_stay_apart(fn: Callable) -> None:
    (task,) = tasks(fn, torch.randn(4, 6, 8))
    assert task.tensor("x").shape == (4, 6, 8)


def test_rows_of_one_tensor_are_not_columns_of_another() -> None:
    """`x @ x` reads one tensor as rows and as the matrix."""
    (task,) = tasks(lambda x: F.relu(x @ x).view(2, 4, 8), torch.randn(8, 8))
    assert task.tensor("x").shape == (8, 8)


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[Kernels]:
    with swapping(tmp_path) as running:
        yield running


class Block(nn.Module):
    """Norm, feed-forward network with residual, RMS norm and softmax: row-wise throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down, self.last = nn.LayerNorm(8), nn.Linear(8, 16), nn.Linear(16, 8), nn.RMSNorm(8)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(self.last(x + self.down(F.gelu(self.up(self.norm(x))))), -1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_swapped_matrices_compute_what_eager_does(kernels: Kernels, dynamic: bool) -> None:
    """Forward and backward, outputs in the graph's own shape and strides."""
    torch.manual_seed(0)
    block = Block()
    mine = copy.deepcopy(block)
    compiled = torch.compile(mine, backend="llmkernels", dynamic=dynamic, options={"strict": True})
    for shape in [(4, 6, 8), (5, 3, 8)] if dynamic else [(4, 6, 8)]:
        x = torch.randn(shape)
        a, b = x.clone().requires_grad_(), x.clone().requires_grad_()
        got, expected = compiled(a), block(b)
        assert (got.shape, got.stride()) == (expected.shape, expected.stride())
        torch.testing.assert_close(got, expected)
        got.square().sum().backward()
        expected.square().sum().backward()
        torch.testing.assert_close(a.grad, b.grad)
    for p, q in zip(mine.parameters(), block.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad)
    assert {"layer_norm", "layer_norm_backward", "linear.gelu", "softmax"} <= set(kernels.calls)


def test_a_strided_input_is_viewed_without_a_copy(kernels: Kernels) -> None:
    from torch._inductor.utils import run_and_get_code

    x = torch.randn(4, 6, 24)
    compiled = torch.compile(lambda x: F.softmax(x[..., 8:16], -1), backend="llmkernels", dynamic=False)
    got, (code,) = run_and_get_code(compiled, x)
    torch.testing.assert_close(got, x[..., 8:16].softmax(-1))
    assert kernels.calls["softmax"] == 1
    assert "cpp_fused" not in code and "reinterpret_tensor" in code


@pytest.mark.parametrize(
    "fn", [lambda x: F.layer_norm(x, (8,), W, W), lambda x: x.softmax(-1)], ids=["layer_norm", "softmax"]
)
def test_strides_that_keep_rows_apart_are_named(fn: Callable) -> None:
    """What a patch embedding leaves: channels in front of the patches in memory."""
    (task,) = tasks(fn, torch.randn(4, 8, 6).transpose(1, 2))
    assert why_not_merged(task) == "rows cannot be merged: x of shape (4, 6, 8) has strides (48, 1, 6)"
    (merged,) = tasks(fn, torch.randn(4, 6, 8))
    assert why_not_merged(merged) == ""


def test_a_softmax_over_another_dimension_has_no_rows() -> None:
    (task,) = tasks(lambda x: x.softmax(1), torch.randn(4, 8, 6).transpose(1, 2))
    assert why_not_merged(task) == ""


def test_a_shipped_kernel_serves_every_rank(tmp_path: Path) -> None:
    """The library's kernel, built, verified and swapped: the second rank finds what was verified for the first."""
    from torch_llmkernels.kernels.targets import target_for

    if reason := target_for("cpu").unavailable():
        pytest.skip(reason)
    options = {"swap": "correct", "strict": True, "cache_dir": str(tmp_path), "verify_budget_s": 600.0}
    keys = set()
    with torch.no_grad():
        for shape in [(24, 96), (4, 6, 96)]:
            torch._dynamo.reset()
            registry.clear()
            norm, x = nn.LayerNorm(96), torch.randn(shape)
            compiled = torch.compile(norm, backend="llmkernels", dynamic=False, options=options)
            torch.testing.assert_close(compiled(x), norm(x), rtol=1e-4, atol=1e-4)
            (region,) = [r for g in registry.report() for r in g.regions]
            assert region.swapped
            keys.add(region.key)
    assert len(keys) == 1
