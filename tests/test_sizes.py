"""Dynamic sizes as tasks write them: integer expressions over symbols, closed under what pooling and strides make of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import sympy
import torch
import torch.nn.functional as F
from graphs import capture
from swapping import swapping
from torch import nn
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._sympy.functions import FloorDiv, Max, Min

from torch_llmkernels.errors import TaskError
from torch_llmkernels.graph.op import concrete_layout
from torch_llmkernels.graph.regions import find_regions
from torch_llmkernels.graph.sizes import Sizes
from torch_llmkernels.graph.task_of import task_of
from torch_llmkernels.program import module_of, python_source
from torch_llmkernels.task import Task, evaluate_dim, parse_dim


def task(module: nn.Module, *inputs: torch.Tensor) -> Task:
    (region,) = find_regions(capture(module, *inputs, dynamic=True).graph)[0]
    return task_of(region).task


def pooled(**pool: object) -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 5, 3, stride=2), nn.ReLU(), nn.MaxPool2d(**pool))


POOLS = {
    "plain": pooled(kernel_size=2),
    "overlapping and padded": pooled(kernel_size=3, stride=2, padding=1),
    "ceil mode": pooled(kernel_size=3, stride=2, ceil_mode=True),
    "dilated": pooled(kernel_size=2, stride=1, dilation=2),
    "average": nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.AvgPool2d(3, 2, 1)),
}


@pytest.mark.parametrize("name", POOLS)
def test_sizes_of_pooled_images_are_what_the_module_gives(name: str) -> None:
    """Shapes and strides at sizes that the task was not made at, however the expressions are evaluated."""
    module = POOLS[name]
    found = task(module, torch.randn(2, 3, 15, 18))
    assert [hint for _, hint in found.symbols] == [2, 15, 18]
    for sizes in [(2, 15, 18), (1, 9, 9), (3, 32, 11)]:
        x = torch.randn(sizes[0], 3, *sizes[1:])
        expected = module(x)
        static = found.at(dict(zip([n for n, _ in found.symbols], sizes, strict=True)))
        assert (static.tensor("y").shape, static.tensor("y").stride) == (tuple(expected.shape), expected.stride())
        size, stride = concrete_layout(found, found.tensor("y"), sizes)
        assert (tuple(size), tuple(stride)) == (tuple(expected.shape), expected.stride())
        (y,) = module_of(found)(x, *module[0].parameters(), *sizes)
        torch.testing.assert_close(y, expected)


def test_layouts_of_symbolic_sizes_add_no_guard() -> None:
    """What the compiler asks: sizes as SymInts, or as sympy expressions."""
    found = task(POOLS["plain"], torch.randn(2, 3, 15, 18))
    env = ShapeEnv()
    batch, height, width = (env.create_unbacked_symint() for _ in range(3))
    size, _ = concrete_layout(found, found.tensor("y"), [batch, height, width])
    assert isinstance(size[2], torch.SymInt) and not env.guards
    h = sympy.Symbol("h", integer=True, positive=True)
    _, (_, _, row, _) = concrete_layout(found, found.tensor("y"), [2, h, h])
    assert row.subs(h, 15) == 3


def symint(expression: sympy.Expr) -> torch.SymInt:
    env = ShapeEnv()
    return env.create_symintnode(expression, hint=1)


a, b = (sympy.Symbol(name, integer=True, positive=True) for name in ("s5", "s3"))


@pytest.mark.parametrize(
    ("expression", "text"),
    [
        (FloorDiv(a, 2), "(d0//2)"),
        (Max(1, FloorDiv(a, 2)), "max(1,(d0//2))"),
        (Min(8, a), "min(8,d0)"),
        (FloorDiv(a - 1, 2) + 1, "((d0+(-1))//2)+1"),
        (2 * a * b, "2*d0*d1"),
        (a**2, "d0*d0"),
    ],
)
def test_the_encoding_evaluates_to_the_expression(expression: sympy.Expr, text: str) -> None:
    value = symint(expression)
    sizes = Sizes([], [])
    assert sizes.dim(value) == text
    names = sorted(expression.free_symbols, key=str)
    for numbers in [(1, 1), (2, 7), (9, 4)]:
        given = dict(zip(names, numbers, strict=False))
        symbols = {sizes.dim(symint(s)): n for s, n in given.items()}
        assert evaluate_dim(text, symbols) == int(expression.subs(given))


def test_operands_are_ordered_by_the_tasks_names_not_by_torchs() -> None:
    """torch names symbols after the caller's variables."""
    for first, second in [(a, b), (b, a)]:
        sizes = Sizes([], [])
        assert [sizes.dim(symint(first)), sizes.dim(symint(second))] == ["d0", "d1"]
        assert sizes.dim(symint(Max(first * second, second))) == sizes.dim(symint(Max(second, second * first)))
        assert sizes.dim(symint(first * second)) == "d0*d1"


@pytest.mark.parametrize("text", ["d0/2", "abs(d0)", "max()", "max(d0, key=1)", "d0.real", "max(d0)(1)", "1.5", "d0 if 1 else 1"])
def test_the_language_of_sizes_is_closed(text: str) -> None:
    with pytest.raises(TaskError):
        parse_dim(text)


def test_a_logarithm_has_no_encoding() -> None:
    with pytest.raises(TaskError, match="too complex"):
        Sizes([], []).dim(symint(sympy.floor(sympy.log(a))))


def test_the_written_program_takes_the_sizes() -> None:
    assert "d1: int, such as 15" in python_source(task(POOLS["plain"], torch.randn(2, 3, 15, 18)))


class Digits(nn.Module):
    """Two stages of convolution, ReLU and max-pool: the second one's input has an expression as its size."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 6, 3, padding=1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)
        return F.max_pool2d(F.relu(self.conv2(x)), 2)


def graphs_of_dynamo(module: nn.Module, shapes: list[tuple[int, ...]]) -> int:
    """How many graphs Dynamo itself makes of a module that is called at these shapes."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(module, backend="eager", dynamic=True)
    for shape in shapes:
        compiled(torch.randn(shape))
    torch._dynamo.reset()
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize("training", [False, True])
def test_pooled_regions_are_swapped_under_dynamic_shapes(tmp_path: Path, training: bool) -> None:
    """One compilation serves images of every size, where Dynamo asks for no more of them (2.11 does, for odd sizes)."""
    module, shapes = Digits(), [(2, 1, 16, 20), (3, 1, 13, 9)]
    needed = graphs_of_dynamo(module, shapes)
    with swapping(tmp_path) as kernels, torch.set_grad_enabled(training):
        torch._dynamo.utils.counters.clear()
        compiled = torch.compile(module, backend="llmkernels", dynamic=True, options={"strict": True})
        for shape in shapes:
            x = torch.randn(shape)
            got, expected = compiled(x), module(x)
            assert got.stride() == expected.stride()
            torch.testing.assert_close(got, expected)
            if training:
                wanted = torch.autograd.grad(expected.sum(), list(module.parameters()))
                torch.testing.assert_close(torch.autograd.grad(got.sum(), list(module.parameters())), wanted)
        assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == needed
        assert kernels.calls["conv2d.relu.max_pool2d"] == 4


KERNEL = """/*---
implements = "conv2d.relu.max_pool2d"
target = "cpu"
dtypes = ["float32"]
where = ["x.contiguous", "weight.contiguous", "y.contiguous", "stride.product == 1", "padding[0] == 1", "padding[1] == 1",
         "weight.shape[2] == 3", "weight.shape[3] == 3", "max_pool2d_kernel_size.product == 4", "max_pool2d_stride.product == 4"]
dims = { c = "x.shape[1]", h = "x.shape[2]", w = "x.shape[3]", k = "bias.numel", ph = "y.shape[2]", pw = "y.shape[3]"}
align = 4
[[launch]]
kernel = "pooled"
args = ["x", "weight", "bias", "y", "x.shape[0]", "c", "h", "w", "k", "ph", "pw"]
---*/
extern "C" void pooled(const float* x, const float* weight, const float* bias, float* y, int64_t n, int64_t c, int64_t h,
                       int64_t w, int64_t k, int64_t ph, int64_t pw) {
  for (int64_t at = 0; at < n * k * ph * pw; ++at) {
    const int64_t image = at / (k * ph * pw), out = at / (ph * pw) % k, top = at / pw % ph * 2, left = at % pw * 2;
    float best = 0;
    for (int64_t i = top; i < top + 2; ++i)
      for (int64_t j = left; j < left + 2; ++j) {
        float sum = bias[out];
        for (int64_t in = 0; in < c; ++in)
          for (int64_t a = 0; a < 3; ++a)
            for (int64_t b = 0; b < 3; ++b) {
              const int64_t row = i + a - 1, col = j + b - 1;
              if (row >= 0 && row < h && col >= 0 && col < w)
                sum += x[((image * c + in) * h + row) * w + col] * weight[((out * c + in) * 3 + a) * 3 + b];
            }
        best = sum > best || sum != sum ? sum : best;
      }
    y[at] = best;
  }
}
"""


def test_a_kernel_serves_images_of_every_size() -> None:
    """Its dims are read off tensors whose sizes are expressions; the check runs it at other sizes too."""
    from torch_llmkernels.evaluate.job import Job
    from torch_llmkernels.evaluate.run import evaluate
    from torch_llmkernels.evaluation import Status
    from torch_llmkernels.kernels.targets import target_for

    if reason := target_for("cpu").unavailable():
        pytest.skip(reason)
    found = task(nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(2, 3, 15, 18))
    outcome = evaluate(Job(found, KERNEL, "pooled", timed=False))
    assert outcome.status is Status.CORRECT, outcome.detail


def test_a_shipped_kernel_serves_images_of_every_size(tmp_path: Path) -> None:
    """Its scratch memory depends on the width of the image, which only a call knows."""
    from torch_llmkernels import registry
    from torch_llmkernels.kernels.targets import target_for

    if reason := target_for("cpu").unavailable():
        pytest.skip(reason)
    torch._dynamo.reset()
    registry.clear()
    module = nn.Sequential(nn.Conv2d(3, 5, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2))
    options = {"swap": "correct", "strict": True, "cache_dir": str(tmp_path), "verify_budget_s": 600.0}
    with torch.no_grad():
        compiled = torch.compile(module, backend="llmkernels", dynamic=True, options=options)
        for shape in [(2, 3, 15, 18), (1, 3, 40, 66), (3, 3, 6, 5)]:
            x = torch.randn(shape)
            torch.testing.assert_close(compiled(x), module(x), rtol=1e-4, atol=1e-4)
    assert {r.swapped for g in registry.report() for r in g.regions} == {True}
