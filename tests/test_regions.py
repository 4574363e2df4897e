"""What becomes a region, what does not, and why."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import zoo
from graphs import capture
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel

from torch_llmkernels import registry
from torch_llmkernels.backend import llmkernels
from torch_llmkernels.cache.library import Library
from torch_llmkernels.capture import Call
from torch_llmkernels.capture import capture as capture_tasks
from torch_llmkernels.cli.explain import explain
from torch_llmkernels.graph.regions import Region, find_regions, has_anchor
from torch_llmkernels.graph.task_of import task_of
from torch_llmkernels.passes import served_by
from torch_llmkernels.program import module_of
from torch_llmkernels.settings import Settings


def regions(gm: fx.GraphModule, **kwargs: Any) -> list[Region]:
    return find_regions(gm.graph, **kwargs)[0]


KERNEL_OF_CONV = """/*---
implements = "{signature}"
target = "cpu"
dtypes = ["float32"]
where = ["{where}"]
align = 4
[[launch]]
kernel = "conv"
args = ["x", "weight", "bias", "y"]
---*/
extern "C" void conv(const T* x, const T* weight, const T* bias, T* y) {{}}
"""


def add_kernel_of_conv(library: Path, signature: str, where: str) -> None:
    (library / signature).mkdir(parents=True)
    (library / signature / "one.cpp").write_text(KERNEL_OF_CONV.format(signature=signature, where=where))


def signatures(gm: fx.GraphModule, **kwargs: Any) -> list[str]:
    return [r.signature for r in regions(gm, **kwargs)]


def reasons(gm: fx.GraphModule) -> dict[str, str]:
    return {s.signature: s.reason for s in find_regions(gm.graph)[1]}


def only(gm: fx.GraphModule) -> Region:
    (region,) = regions(gm)
    return region


def roles(region: Region) -> tuple[list[str], list[str]]:
    return [r for r, _ in region.inputs], [r for r, _ in region.outputs]


def test_layer_norm_in_inference_has_one_output() -> None:
    region = only(capture(nn.LayerNorm(8), torch.randn(4, 8)))
    assert region.signature == "layer_norm"
    assert roles(region) == (["x", "weight", "bias"], ["y"])


def test_layer_norm_in_training_returns_its_statistics_and_has_a_backward_region() -> None:
    forward, backward = regions(capture(nn.LayerNorm(8), torch.randn(4, 8, requires_grad=True), training=True))
    assert roles(forward) == (["x", "weight", "bias"], ["y", "mean", "rstd"])
    assert backward.signature == "layer_norm_backward"
    assert roles(backward) == (["grad_y", "x", "mean", "rstd", "weight", "bias"], ["grad_x", "grad_weight", "grad_bias"])


def test_a_residual_before_a_norm_is_absorbed_and_read_by_others() -> None:
    norm = nn.LayerNorm(8)

    def block(x: Tensor, r: Tensor) -> Tensor:
        h = x + r
        return h * norm(h).exp()

    region = only(capture(block, torch.randn(4, 8), torch.randn(4, 8)))
    assert region.signature == "add.layer_norm"
    assert roles(region) == (["x", "residual", "weight", "bias"], ["y", "add_out"])


NORMS = {
    "layer_norm": (nn.LayerNorm(8), ["weight", "bias"]), "group_norm": (nn.GroupNorm(2, 4), ["weight", "bias"]),
    "rms_norm": (nn.RMSNorm(8), ["weight"]),
    "batch_norm": (nn.BatchNorm2d(4).eval(), ["bn_weight", "bn_bias", "bn_mean", "bn_var"]),
}  # fmt: skip


@pytest.mark.parametrize("name", NORMS)
def test_a_residual_after_a_norm_is_absorbed_before_its_activation_or_after(name: str) -> None:
    norm, vectors = NORMS[name]
    x, r, s = torch.randn(3, 2, 4, 6, 8).unbind()
    state = {k.removeprefix("bn_"): v for k, v in {**dict(norm.named_parameters()), **dict(norm.named_buffers())}.items()}
    vectors_given = [state[v.removeprefix("bn_").replace("mean", "running_mean").replace("var", "running_var")] for v in vectors]
    spellings = {
        f"{name}.add.silu": lambda x, r, s: F.silu(r + norm(x)),
        f"{name}.silu.add": lambda x, r, s: F.silu(norm(x)) + r,
        f"add.{name}.add.silu": lambda x, r, s: F.silu(norm(x + s) + r),
    }
    for signature, call in spellings.items():
        region = only(capture(call, x, r, s))
        before = ["residual"] if signature.startswith("add") else []
        assert region.signature == signature
        assert roles(region) == (["x", *before, *vectors, "skip"], ["y"])
        task = task_of(region).task
        given = [x, *([s] if before else []), *vectors_given, r]
        shown = [value.reshape(spec.shape) for value, spec in zip(given, task.inputs, strict=True)]
        torch.testing.assert_close(module_of(task)(*shown)[0].reshape(x.shape), call(x, r, s))


def test_a_norm_that_is_added_to_its_own_input_reads_it_once() -> None:
    """What is added is the sum that the region makes itself, or its first input."""
    norm, x, r = nn.LayerNorm(8), torch.randn(4, 8), torch.randn(4, 8)

    def block(x: Tensor, r: Tensor) -> Tensor:
        h = x + r
        return norm(h) + h

    region = only(capture(block, x, r))
    assert region.signature == "add.layer_norm.add" and roles(region) == (["x", "residual", "weight", "bias"], ["y"])
    torch.testing.assert_close(module_of(task_of(region).task)(x, r, norm.weight, norm.bias)[0], block(x, r))
    region = only(capture(lambda x: norm(x) + x, x))
    assert region.signature == "layer_norm.add" and roles(region) == (["x", "weight", "bias", "skip"], ["y"])
    assert dict(region.inputs)["x"] is dict(region.inputs)["skip"]


def test_resnet_block_in_inference() -> None:
    found = signatures(capture(zoo.ResNetBlock().eval(), torch.randn(2, 3, 32, 32)))
    assert found[:4] == [
        "conv2d.batch_norm.relu.max_pool2d", "conv2d.batch_norm.relu", "conv2d.batch_norm.add.relu", "group_norm.silu",
    ]  # fmt: skip
    assert found[4].startswith("pointwise_reduce.")  # hardswish and the global average pool
    assert found[5:] == ["linear"]


def test_relu_output_and_pool_indices_are_extra_outputs_in_training() -> None:
    gm = capture(zoo.DigitsCNN(), torch.randn(4, 1, 8, 8), training=True)
    first = regions(gm)[0]
    assert first.signature == "conv2d.relu.max_pool2d"
    assert roles(first) == (["x", "weight", "bias"], ["y", "relu_out", "indices"])
    backward = [s for s in signatures(gm) if "backward" in s]
    assert backward == ["max_pool2d_backward.relu_backward", "conv2d_backward"] * 2


ACTIVATIONS = {
    "relu_backward": nn.ReLU(), "gelu_backward": nn.GELU(), "gelu_tanh_backward": nn.GELU("tanh"), "silu_backward": nn.SiLU(),
    "hardswish_backward": nn.Hardswish(), "leaky_relu_backward": nn.LeakyReLU(0.2), "sigmoid_backward": nn.Sigmoid(),
    "tanh_backward": nn.Tanh(),
}  # fmt: skip
SAVES_ITS_RESULT = ("relu_backward", "sigmoid_backward", "tanh_backward")


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_backward_of_an_activation_is_a_region_where_nothing_longer_takes_it(name: str) -> None:
    x, grad = torch.randn(4, 8, requires_grad=True), torch.randn(4, 8)
    region = only(capture(ACTIVATIONS[name], x, training=True))
    assert region.signature == name
    stem = name.removesuffix("_backward").removesuffix("_tanh")
    saved = f"{stem}_out" if name in SAVES_ITS_RESULT else f"{stem}_x"
    assert roles(region) == (["grad_y", saved], ["grad_x"])
    y = ACTIVATIONS[name](x)
    y.backward(grad)
    (grad_x,) = module_of(task_of(region).task)(grad, (y if name in SAVES_ITS_RESULT else x).detach())
    torch.testing.assert_close(grad_x, x.grad)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_the_backward_of_a_linear_layer_and_of_an_activation_is_a_task_of_matrices(name: str) -> None:
    net = nn.Sequential(nn.Linear(8, 16), ACTIVATIONS[name], nn.Linear(16, 8))
    found = {r.signature: r for r in regions(capture(net, torch.randn(2, 4, 8), training=True))}
    task = task_of(found[f"linear.{name}"]).task
    assert {len(spec.shape) for spec in (*task.inputs, *task.outputs)} == {2}


def test_the_backward_of_a_leaky_relu_in_place_is_the_same_task() -> None:
    """It keeps its result where the other keeps its input: the sign is the same."""

    def key(inplace: bool) -> str:
        gm = capture(lambda x: F.leaky_relu(x * 2, 0.2, inplace), torch.randn(4, 8, requires_grad=True), training=True)
        backward = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.leaky_relu_backward.default)
        assert backward.args[3] is inplace
        return task_of(only(gm)).task.key

    assert key(True) == key(False)


def test_the_backward_of_a_batch_norm_in_training() -> None:
    """It takes the batch's own statistics; the running ones, which it does not look at, are no input."""
    norm = nn.BatchNorm2d(4)
    nn.init.normal_(norm.weight)
    x, grad = torch.randn(3, 4, 5, 6, requires_grad=True), torch.randn(3, 4, 5, 6)
    region = regions(capture(norm, x, training=True))[-1]
    assert region.signature == "batch_norm_backward"
    assert roles(region) == (["grad_y", "x", "mean", "rstd", "weight"], ["grad_x", "grad_weight", "grad_bias"])
    assert task_of(region).task.program[0].args[3:5] == (None, None)
    norm(x).backward(grad)
    mean, var = x.detach().mean((0, 2, 3)), x.detach().var((0, 2, 3), correction=0)
    inputs = grad, x.detach(), mean, (var + norm.eps).rsqrt(), norm.weight.detach()
    expected = x.grad, norm.weight.grad, norm.bias.grad
    torch.testing.assert_close(module_of(task_of(region).task)(*inputs), expected, rtol=1e-4, atol=1e-5)


def test_batch_norms_without_running_statistics_have_the_same_backward() -> None:
    def key(tracked: bool) -> str:
        norm = nn.BatchNorm2d(4, track_running_stats=tracked)
        gm = capture(norm, torch.randn(2, 4, 4, 4, requires_grad=True), training=True)
        return task_of(regions(gm)[-1]).task.key

    assert key(True) == key(False)


def test_the_backward_of_a_batch_norm_in_evaluation_says_why_it_is_none() -> None:
    gm = capture(nn.BatchNorm2d(4).eval(), torch.randn(2, 4, 4, 4, requires_grad=True), training=True)
    assert reasons(gm)["aten.native_batch_norm_backward.default"] == "train is False, not True"


def test_backward_regions_of_a_model_in_training() -> None:
    """An activation's backward belongs to the batch norm or the product next to it."""
    model = nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.LeakyReLU(), nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), nn.ReLU(),
        nn.AvgPool2d(2), nn.Flatten(), nn.Linear(16, 8), nn.Sigmoid(), nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 2),
    )  # fmt: skip
    found = signatures(capture(model, torch.randn(2, 3, 8, 8), training=True))
    assert [s for s in found if "backward" in s] == [
        "linear.tanh_backward", "linear.sigmoid_backward", "relu_backward.batch_norm_backward", "conv2d_backward",
        "leaky_relu_backward.batch_norm_backward", "conv2d_backward",
    ]  # fmt: skip


def test_the_backward_of_an_activation_goes_to_a_product_unless_a_kernel_serves_it_alone() -> None:
    gm = capture(nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)), torch.randn(4, 8), training=True)
    assert "linear.gelu_backward" in signatures(gm)
    alone = signatures(gm, serves=lambda region: region.signature == "gelu_backward")
    assert "gelu_backward" in alone and "linear.gelu_backward" not in alone


def test_in_place_relu_is_the_same_region() -> None:
    def net(inplace: bool) -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(inplace=inplace), nn.MaxPool2d(2))

    x = torch.randn(1, 3, 8, 8)
    assert signatures(capture(net(True), x)) == signatures(capture(net(False), x)) == ["conv2d.relu.max_pool2d"]


def test_linear_looks_through_the_view_of_a_batched_input() -> None:
    region = only(capture(nn.Sequential(nn.Linear(8, 16), nn.GELU("tanh")), torch.randn(2, 4, 8)))
    assert region.signature == "linear.gelu_tanh"
    assert roles(region) == (["x", "weight", "bias"], ["y"])
    assert region.outputs[0][1].meta["val"].shape == (2, 4, 16)


def test_gelu_input_is_an_extra_output_in_training_before_its_view() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 4))
    found = regions(capture(net, torch.randn(2, 4, 8), training=True))
    assert found[0].signature == "linear.gelu"
    assert [(role, tuple(n.meta["val"].shape)) for role, n in found[0].outputs] == [("y", (2, 4, 16)), ("linear_out", (8, 16))]
    assert "linear.gelu_backward" in [r.signature for r in found]


def test_softmax_with_scale_and_masks() -> None:
    def scores(x: Tensor, keep: Tensor, bias: Tensor) -> tuple[Tensor, ...]:
        return (
            torch.softmax(x * 0.3 + bias, -1),
            torch.softmax(bias + x / 8, -1),
            torch.softmax((x / 3).masked_fill(keep, -1e9), -1),
            torch.log_softmax(x.transpose(0, 1), -1),
        )

    gm = capture(scores, torch.randn(2, 8, 8), torch.rand(8, 8) > 0.5, torch.randn(8, 8))
    assert signatures(gm) == ["scale.mask.softmax", "scale.mask.softmax", "div.masked_fill.softmax", "log_softmax"]
    assert roles(regions(gm)[1]) == (["x", "mask"], ["y"])


def test_attention_by_name_and_by_hand() -> None:
    q = torch.randn(2, 2, 8, 16)
    assert signatures(capture(lambda q: F.scaled_dot_product_attention(q, q, q, is_causal=True), q)) == ["attention"]
    by_hand = capture(zoo.HandAttention(), torch.randn(2, 8, 32))
    assert signatures(by_hand) == ["linear"] * 3 + ["bmm.scale.softmax.bmm"]
    assert roles(regions(by_hand)[3]) == (["q", "k", "v"], ["y"])


def heads_apart(x: Tensor) -> Tensor:
    return x.view(2, 8, 4, 16).transpose(1, 2)


def by_products(x: Tensor, mask: Tensor | None) -> Tensor:
    """Attention as torch takes it apart where no fused one takes the mask: products around a safe softmax."""
    q, k, v = (heads_apart(x + i) for i in range(3))
    with sdpa_kernel(SDPBackend.MATH):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def hides_queries(position: Tensor) -> Tensor:
    return (position[:, None] >= 0).expand(2, 1, 8, 8)


def test_attention_that_torch_takes_apart() -> None:
    x, position = torch.randn(2, 8, 64), torch.arange(8)
    gm = capture(lambda x, p: by_products(x, hides_queries(p)), x, position)
    assert signatures(gm) == ["bmm.mask.safe_softmax.bmm"]
    assert roles(only(gm)) == (["q", "k", "mask", "v"], ["y"])
    assert signatures(capture(lambda x: by_products(x, None), x)) == ["bmm.safe_softmax.bmm"]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_attention_that_torch_takes_apart_in_half_precision(dtype: torch.dtype) -> None:
    """The casts to and from float32, the scales and the copies between heads and batches belong to it."""
    x, position = torch.randn(2, 8, 64, dtype=dtype), torch.arange(8)
    region = only(capture(lambda x, p: by_products(x, hides_queries(p)), x, position))
    assert region.signature == "attention_math" and roles(region) == (["q", "k", "mask", "v"], ["y"])
    task = task_of(region).task
    assert {t.dtype for t in (*task.inputs, *task.outputs)} == {str(dtype).removeprefix("torch.")}
    assert task.tensor("q").shape == (2, 4, 8, 16) and task.tensor("q").stride == (512, 16, 64, 1)
    q, k, v = (heads_apart(x + i) for i in range(3))
    mask = torch.zeros(2, 1, 8, 8, dtype=dtype)
    expected = F.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(module_of(task)(q, k, mask, v)[0], expected, rtol=2e-2, atol=2e-2)
    assert signatures(capture(lambda x: by_products(x, None), x)) == ["attention_math"]


def test_one_tensor_in_two_roles_is_passed_twice() -> None:
    q = torch.randn(2, 2, 8, 16)
    region = only(capture(lambda q: F.scaled_dot_product_attention(q, q, q), q))
    assert [r for r, _ in region.inputs] == ["q", "k", "v"]
    assert len({n for _, n in region.inputs}) == 1


def test_rms_norm_is_found_decomposed_in_half_precision_too() -> None:
    for dtype in (torch.float32, torch.bfloat16):
        region = only(capture(nn.RMSNorm(8, dtype=dtype), torch.randn(4, 8, dtype=dtype)))
        assert region.signature == "rms_norm"
        assert [str(n.meta["val"].dtype) for _, n in (*region.inputs, *region.outputs)] == [str(dtype)] * 3


def test_losses() -> None:
    x, t = torch.randn(4, 8, requires_grad=True), torch.randint(0, 8, (4,))
    assert signatures(capture(F.cross_entropy, x, t, training=True)) == ["cross_entropy", "cross_entropy_backward"]


def test_autocast_gives_half_precision_regions() -> None:
    net = nn.Sequential(nn.Linear(8, 16), nn.ReLU())

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return net(x)

    region = only(capture(run, torch.randn(4, 8)))
    assert region.signature == "linear.relu"
    assert {str(n.meta["val"].dtype) for _, n in region.inputs} == {"torch.bfloat16"}


def test_a_stage_that_would_close_a_cycle_is_left_out() -> None:
    linear = nn.Linear(8, 8)

    def net(x: Tensor) -> Tensor:
        y = linear(x)
        return y + torch.softmax(y, -1)

    gm = capture(net, torch.randn(4, 8))
    assert signatures(gm) == ["linear", "softmax"]
    assert reasons(gm) == {"linear.add": "a path leaves it and comes back"}


def test_two_regions_that_are_fine_alone_never_make_a_cycle_together() -> None:
    a, b = nn.Linear(8, 8), nn.Linear(8, 8)

    def net(x: Tensor) -> tuple[Tensor, Tensor]:
        p, q = a(x), b(x)
        return p + q.exp(), q + p.exp()

    gm = capture(net, torch.randn(4, 8))
    assert sorted(signatures(gm)) == ["linear", "linear.add"]
    assert reasons(gm) == {"linear.add": "a path leaves it and comes back"}


def test_overlap_goes_to_the_longer_match_then_to_the_first_and_the_loser_shrinks() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8))
    gm = capture(lambda x: net[1](net[0](x) + x), torch.randn(4, 8))
    assert signatures(gm) == ["linear.add", "layer_norm"]
    assert reasons(gm) == {"add.layer_norm": "overlaps linear.add"}
    assert signatures(gm, serves=lambda region: region.signature == "add.layer_norm") == ["linear", "add.layer_norm"]


def test_a_shorter_match_that_a_kernel_serves_wins_over_a_longer_one() -> None:
    gm = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(1, 3, 8, 8))
    assert signatures(gm, serves=lambda region: region.signature == "conv2d.relu") == ["conv2d.relu"]
    assert signatures(gm, serves=lambda region: region.signature in ("conv2d", "conv2d.relu")) == ["conv2d.relu"]


def chained(*modules: nn.Module) -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    return nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), *modules).eval(), (torch.randn(1, 3, 8, 8),)


def added() -> tuple[Callable[..., Any], tuple[Tensor, ...]]:
    conv = nn.Conv2d(3, 3, 3, padding=1)
    return lambda x, r: F.relu(conv(x) + r), (torch.randn(1, 3, 8, 8), torch.randn(1, 3, 8, 8))


LONGER = {
    "conv2d.silu": lambda: chained(nn.SiLU()),
    "conv2d.relu.avg_pool2d": lambda: chained(nn.ReLU(), nn.AvgPool2d(2)),
    "conv2d.batch_norm.relu": lambda: chained(nn.BatchNorm2d(3), nn.ReLU()),
    "conv2d.add.relu": added,
}


@pytest.mark.parametrize("signature", LONGER)
def test_the_longest_match_that_a_served_one_is_taken_before_says_so(signature: str) -> None:
    """One entry of the anchor, whatever lies between the two."""
    fn, inputs = LONGER[signature]()
    gm = capture(fn, *inputs)
    found, skipped = find_regions(gm.graph, lambda region: region.signature == "conv2d")
    assert "conv2d" in [r.signature for r in found] and signature not in [r.signature for r in found]
    reason = "no kernel serves it; the shorter conv2d is served"
    assert [(s.signature, s.reason) for s in skipped if s.node == "convolution"] == [(signature, reason)]
    for served in ({signature}, {signature, "conv2d"}, set()):
        found, skipped = find_regions(gm.graph, lambda region, served=served: region.signature in served)
        entries = [s for s in skipped if s.node == "convolution"]
        assert ([r.signature for r in found], entries) == ([signature], [])


def test_an_anchor_has_one_entry_though_more_than_one_thing_is_in_the_way() -> None:
    """What could have been taken says more than what could not; what overlaps in the end says that."""
    linear = nn.Linear(8, 8)

    def net(x: Tensor) -> Tensor:
        y = linear(x).relu()
        return y + torch.softmax(y, -1)

    gm = capture(net, torch.randn(4, 8))

    def entries(*served: str) -> dict[str, str]:
        skipped = find_regions(gm.graph, lambda region: region.signature in served)[1]
        assert len({s.node for s in skipped}) == len(skipped)
        return {s.signature: s.reason for s in skipped}

    assert entries() == entries("linear.relu") == {"linear.relu.add": "a path leaves it and comes back"}
    assert entries("linear") == {"linear.relu": "no kernel serves it; the shorter linear is served"}
    norm = nn.LayerNorm(8)
    gm = capture(lambda x: norm(linear(x) + x), torch.randn(4, 8))
    assert entries("add.layer_norm") == {"linear.add": "overlaps add.layer_norm"}
    assert entries("linear", "add.layer_norm") == {"linear.add": "no kernel serves it; the shorter linear is served"}
    gm = capture(lambda q, k, v, r: torch.bmm(torch.softmax(torch.bmm(q, k), -1), v) + r, *torch.randn(4, 2, 8, 8).unbind())
    assert entries("bmm", "bmm.softmax.bmm") == {"bmm": "overlaps bmm.softmax.bmm"}
    gm = capture(lambda x: norm(linear(x) + x), torch.randn(4, 8))
    assert entries("linear.add", "layer_norm") == {"add.layer_norm": "no kernel serves it; the shorter layer_norm is served"}


def test_what_was_passed_over_is_explained_and_reported(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    add_kernel_of_conv(tmp_path, "conv2d", "weight.shape[0] == 3")
    model, inputs = LONGER["conv2d.silu"]()
    settings = Settings(library_dir=str(tmp_path))
    reason = "kept Inductor: no kernel serves it; the shorter conv2d is served"
    explained = {e.signature: (e.state, e.detail) for e in explain(model, Call(inputs), settings)}
    assert explained["conv2d.silu"] == ("skipped", reason) and explained["conv2d"][0] in ("unverified", "miss")
    options = {"library_dir": str(tmp_path), "verify_budget_s": 0.0}
    compiled = torch.compile(model, backend=llmkernels, options=options)
    with torch.no_grad(), caplog.at_level("INFO", "torch_llmkernels.backend"):
        compiled(*inputs)
    regions_reported = {r.signature: r.reason for graph in registry.report(compiled) for r in graph.regions}
    assert regions_reported["conv2d.silu"] == reason
    assert any("conv2d.silu" in line and reason in line for line in caplog.messages)


def test_a_search_sees_the_longer_match_with_a_library_that_serves_no_shorter_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is captured is what searches are for: the regions as this library has them."""
    (tmp_path / "empty").mkdir()
    add_kernel_of_conv(tmp_path / "full", "conv2d", "weight.shape[0] == 3")
    model, inputs = LONGER["conv2d.silu"]()
    for library, signature in (("full", "conv2d"), ("empty", "conv2d.silu")):
        monkeypatch.setenv("LLMKERNELS_LIBRARY_DIR", str(tmp_path / library))
        assert [found.task.signature for found in capture_tasks(model, inputs)] == [signature]


def test_what_serves_is_asked_of_the_task_not_of_its_signature(tmp_path: Path) -> None:
    for signature, where in (("conv2d.relu.max_pool2d", "weight.shape[0] == 64"), ("conv2d.relu", "weight.shape[0] == 4")):
        add_kernel_of_conv(tmp_path, signature, where)
    serves = served_by(Library(tmp_path, strict=True))
    small = capture(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(1, 3, 8, 8))
    wide = capture(nn.Sequential(nn.Conv2d(3, 64, 3), nn.ReLU(), nn.MaxPool2d(2)), torch.randn(1, 3, 8, 8))
    assert signatures(small, serves=serves) == ["conv2d.relu"]
    assert signatures(wide, serves=serves) == ["conv2d.relu.max_pool2d"]


def test_nodes_of_different_recompute_tags_are_not_mixed() -> None:
    gm = capture(nn.Sequential(nn.Linear(8, 8), nn.ReLU()), torch.randn(4, 8))
    relu = next(n for n in gm.graph.nodes if n.target is torch.ops.aten.relu.default)
    relu.meta["recompute"] = 1
    assert signatures(gm) == ["linear"]
    assert reasons(gm) == {"linear.relu": "its nodes differ in recompute"}


def test_forward_and_backward_are_not_mixed() -> None:
    net = nn.Sequential(nn.Linear(8, 8), nn.Sigmoid())
    gm = capture(net, torch.randn(4, 8), training=True)
    for region in regions(gm):
        assert len({"autograd_backward" in n.meta for n in region.nodes}) == 1


def skip_reason(fn: Callable[..., Any], *inputs: Tensor) -> str:
    found, skipped = find_regions(capture(fn, *inputs).graph)
    assert not found
    return skipped[0].reason


def test_unsupported_regions_say_why() -> None:
    assert "dtype complex64" in skip_reason(lambda x: x @ x, torch.randn(4, 4, dtype=torch.complex64))
    assert "no elements" in skip_reason(nn.LayerNorm(8), torch.randn(0, 8))
    assert "transposed is True" in skip_reason(nn.ConvTranspose2d(2, 2, 2), torch.randn(1, 2, 4, 4))
    assert "3 dimensions, not 4" in skip_reason(nn.Conv1d(2, 2, 2), torch.randn(1, 2, 4))


def test_attention_with_dropout_is_left_alone() -> None:
    q = torch.randn(1, 1, 4, 8)
    gm = capture(lambda q: torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, q, q)[0], q)
    node = next(n for n in gm.graph.nodes if "attention" in str(n.target))
    node.args = (*node.args[:3], 0.1)
    found, skipped = find_regions(gm.graph)
    assert not found
    assert skipped[0].reason == "dropout_p is 0.1, not 0.0"


def cuda_attention(fn: Callable[[Tensor], Any]) -> fx.GraphModule:
    """The graph of `fn` on a half-precision CUDA tensor; nothing runs, so no device is needed."""
    with FakeTensorMode():
        q = torch.empty(2, 2, 8, 16, device="cuda", dtype=torch.half)
        return make_fx(fn, decomposition_table={})(q)


def test_cuda_attention_is_a_region_only_where_its_random_state_is_not_read() -> None:
    sdpa = torch.ops.aten
    efficient = only(cuda_attention(lambda q: sdpa._scaled_dot_product_efficient_attention(q, q, q, None, False)[0]))
    flash = only(cuda_attention(lambda q: sdpa._scaled_dot_product_flash_attention(q, q, q, 0.0, True)[:2]))
    assert (roles(efficient), roles(flash)) == ((["q", "k", "v"], ["y"]), (["q", "k", "v"], ["y", "logsumexp"]))
    found, skipped = find_regions(cuda_attention(lambda q: sdpa._scaled_dot_product_flash_attention(q, q, q)[:7:6]).graph)
    assert found == []
    assert skipped[0].reason == "its random state is read"


def test_has_anchor_is_false_where_nothing_could_start_a_region() -> None:
    assert not has_anchor(capture(lambda x: torch.relu(x) * 2, torch.randn(4)).graph)
    assert has_anchor(capture(lambda x: torch.softmax(x, 0), torch.randn(4)).graph)
