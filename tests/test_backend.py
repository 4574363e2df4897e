"""Everything that users of torch.compile do, with regions swapped in.

Every region has a kernel here that runs the region's own program (`swapping`), and most models are nothing but regions: Inductor
then has no kernel to build, and a compilation takes a second.
"""

from __future__ import annotations

import copy
import dataclasses
import logging
import multiprocessing
import os
import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from swapping import Kernels, record_of, swap_all, swap_none, swapping
from tasks import softmax_task
from torch import nn
from torch._inductor import config
from torch._inductor.custom_graph_pass import CustomGraphPass
from torch._inductor.graph import GraphLowering
from torch.utils.checkpoint import checkpoint

import torch_llmkernels
from torch_llmkernels import backend, passes
from torch_llmkernels.errors import LLMKernelsError, SettingsError
from torch_llmkernels.evaluation import Decision
from torch_llmkernels.graph import op
from torch_llmkernels.kernels.cpu import CPU
from torch_llmkernels.options import read_request
from torch_llmkernels.settings import KNOBS, Settings, override
from torch_llmkernels.task import Task


class NormSoftmax(nn.Module):
    """Layer norm and softmax: two regions forward, two backward, nothing else."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        with torch.no_grad():
            self.norm.weight.normal_()
            self.norm.bias.normal_()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.softmax(self.norm(x), dim=-1)


@pytest.fixture
def kernels(tmp_path: Path) -> Iterator[Kernels]:
    with swapping(tmp_path) as running:
        yield running


@pytest.fixture
def no_kernels(tmp_path: Path) -> Iterator[Kernels]:
    with swapping(tmp_path, swap_none) as running:
        yield running


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def compiled(function: Callable[..., Any], **kwargs: Any) -> Callable[..., Any]:
    return torch.compile(function, backend=backend.llmkernels, **kwargs)


def gradients(function: Callable[..., torch.Tensor], module: nn.Module, x: torch.Tensor) -> list[torch.Tensor]:
    """The output of `function(x)`, then the gradients of the input and the parameters."""
    module.zero_grad()
    x = x.clone().requires_grad_()
    y = function(x)
    y.float().square().sum().backward()
    return [y.detach(), x.grad, *(p.grad.clone() for p in module.parameters())]


def reasons() -> list[str]:
    return [region.reason for graph in torch_llmkernels.report() for region in graph.regions]


# what is swapped, and what is said about it


def test_the_backend_is_registered() -> None:
    from importlib.metadata import entry_points

    (entry,) = entry_points(group="torch_dynamo_backends", name="llmkernels")
    assert entry.value == "torch_llmkernels.backend:llmkernels"


def test_forward_runs_swapped_and_equals_eager(kernels: Kernels, caplog: pytest.LogCaptureFixture) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    with caplog.at_level(logging.INFO, "torch_llmkernels"), torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert kernels.calls == {"layer_norm": 1, "softmax": 1}
    assert any(line.startswith("region layer_norm [4x16 f32, 16 f32, 16 f32] key=") for line in caplog.messages)
    (graph,) = torch_llmkernels.report()
    assert [(r.signature, r.swapped, r.kernel) for r in graph.regions] == [
        ("layer_norm", True, "reference"), ("softmax", True, "reference"),
    ]  # fmt: skip


def test_training_runs_swapped_forward_and_backward(kernels: Kernels) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    torch.testing.assert_close(gradients(compiled(model), model, x), gradients(model, model, x))
    assert kernels.calls == {"layer_norm": 1, "softmax": 1, "softmax_backward": 1, "layer_norm_backward": 1}


def test_a_convolutional_net_trains_as_in_eager(kernels: Kernels) -> None:
    """Batch norm's buffers are updated, channels_last is kept, in-place ReLU and the fused region with two readers work."""

    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.conv = nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return F.max_pool2d(F.relu(self.conv(self.norm(x)), inplace=True), 2)

    model = Net().to(memory_format=torch.channels_last)
    twin = copy.deepcopy(model)
    x = torch.randn(2, 3, 16, 16).to(memory_format=torch.channels_last)
    ours, theirs = gradients(compiled(model), model, x), gradients(twin, twin, x)
    torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(dict(model.named_buffers()), dict(twin.named_buffers()))
    assert ours[0].is_contiguous(memory_format=torch.channels_last)
    assert kernels.calls["conv2d.relu.max_pool2d"] == 1
    assert any("backward" in name for name in kernels.calls)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_grad_modes_and_autocast(kernels: Kernels, context: Callable[[], Any]) -> None:
    model, x = nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)), torch.randn(4, 16)
    with context():
        ours, theirs = compiled(model)(x), model(x)
    torch.testing.assert_close(ours, theirs)
    assert kernels.calls.total() == 2


def test_graph_breaks_and_fullgraph(kernels: Kernels) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)

    def broken(x: torch.Tensor) -> torch.Tensor:
        y = model(x)
        torch._dynamo.graph_break()
        return model(y)

    with torch.no_grad():
        torch.testing.assert_close(compiled(broken)(x), broken(x))
        torch.testing.assert_close(compiled(model, fullgraph=True)(x), model(x))
    assert kernels.calls["layer_norm"] == 3


# dynamic shapes


@pytest.mark.parametrize("how", ["dynamic=True", "mark_dynamic", "automatic"])
def test_dynamic_batch(kernels: Kernels, how: str) -> None:
    model = NormSoftmax()
    function = compiled(model, dynamic=True if how == "dynamic=True" else None)
    for rows in (4, 6, 9):
        x = torch.randn(rows, 16)
        if how == "mark_dynamic":
            torch._dynamo.mark_dynamic(x, 0)
        with torch.no_grad():
            torch.testing.assert_close(function(x), model(x))
    assert kernels.calls == {"layer_norm": 3, "softmax": 3}
    assert len(torch_llmkernels.report()) == (2 if how == "automatic" else 1)


def test_specialize_fixes_sizes_for_kernels_that_need_it(tmp_path: Path) -> None:
    def static_only(tasks, settings):
        return [swap_none([t], settings)[0] if t.is_dynamic else swap_all([t], settings)[0] for t in tasks]

    model = NormSoftmax()
    with swapping(tmp_path, static_only) as kernels, torch.no_grad():
        function = compiled(model, dynamic=True, options={"specialize": True})
        for rows in (4, 6, 4):
            x = torch.randn(rows, 16)
            torch.testing.assert_close(function(x), model(x))
        assert kernels.calls["layer_norm"] == 3 and len(torch_llmkernels.report()) == 2


def test_specialize_leaves_marked_dimensions_dynamic(tmp_path: Path) -> None:
    def static_only(tasks, settings):
        return [swap_none([t], settings)[0] if t.is_dynamic else swap_all([t], settings)[0] for t in tasks]

    x = torch.randn(4, 16)
    torch._dynamo.mark_dynamic(x, 0)
    with swapping(tmp_path, static_only) as kernels, torch.no_grad():
        compiled(lambda x: F.softmax(x, -1), options={"specialize": True})(x)
        assert not kernels.calls


# modes and options


def test_every_mode_of_inductor_is_taken() -> None:
    for mode, patches in torch._inductor.list_mode_options().items():
        request = read_request(mode, None)
        assert {k: request.inductor.config[k] for k in patches} == patches
    assert read_request("max-autotune", None).settings.preset == "thorough"
    assert read_request("reduce-overhead", None).settings.preset == "default"


def test_an_unknown_mode_lists_the_modes() -> None:
    with pytest.raises(SettingsError, match="reduce-overhead"):
        read_request("fastest", None)


def test_options_are_split_between_us_and_inductor() -> None:
    request = read_request(None, {"min-speedup": 1.5, "triton.cudagraphs": True, "max-autotune": True})
    assert request.settings.min_speedup == 1.5
    assert request.inductor.config == {"triton.cudagraphs": True, "max_autotune": True}


@pytest.mark.parametrize("option", ["sawp", "triton.cudagraph"])
def test_an_unknown_option_lists_the_valid_ones(option: str) -> None:
    with pytest.raises(SettingsError, match="did you mean") as error:
        read_request(None, {option: True})
    ours, _, inductors = str(error.value).partition("and Inductor's")
    assert set(KNOBS) <= set(ours.replace(",", " ").replace(".", " ").split())
    assert "list_options()" in inductors and len(str(error.value)) < 800  # a screen of Inductor's hundreds hides ours


@pytest.mark.parametrize("options", [{"swap": "sometimes"}, {"max_autotune": "yes"}])
def test_an_option_of_the_wrong_type_is_an_error(options: dict[str, Any]) -> None:
    with pytest.raises(SettingsError, match=next(iter(options))):
        read_request(None, options)


def test_our_knobs_and_inductors_options_do_not_collide() -> None:
    assert not set(KNOBS) & set(config.get_config_copy())


def test_options_beat_override_beats_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LLMKERNELS_FUEL", "1")
    with override(fuel=2):
        assert read_request(None, None).settings.fuel == 2
        assert read_request(None, {"fuel": 3}).settings.fuel == 3
    assert read_request(None, None).settings.fuel == 1


def test_the_config_of_inductor_is_left_alone(kernels: Kernels) -> None:
    before = config.get_config_copy()
    with torch.no_grad():
        compiled(NormSoftmax(), options={"max_autotune": True})(torch.randn(4, 16))
    assert config.get_config_copy() == before


@pytest.mark.parametrize("mode", ["reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"])
def test_modes_run_swapped(kernels: Kernels, mode: str) -> None:
    """And Inductor lowers the swapped graph under the mode's config, nothing of which is the default."""
    model, x, seen = NormSoftmax(), torch.randn(4, 16), []
    run = GraphLowering.run

    def recording(graph: GraphLowering, *args: Any) -> Any:
        seen.append(config.get_config_copy())
        return run(graph, *args)

    with torch.no_grad(), mock.patch.object(GraphLowering, "run", recording):
        torch.testing.assert_close(compiled(model, mode=mode)(x), model(x))
    assert kernels.calls == {"layer_norm": 1, "softmax": 1}
    asked, default = torch._inductor.list_mode_options()[mode], config.get_config_copy()
    assert [{name: at_work[name] for name in asked} for at_work in seen] == [asked]
    assert all(default[name] != value for name, value in asked.items())
    assert asked.get("max_autotune", False) == mode.startswith("max-autotune")


def test_freezing_runs_swapped(kernels: Kernels) -> None:
    model, x = NormSoftmax().eval(), torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, options={"freezing": True})(x), model(x))
    assert kernels.calls["layer_norm"] == 1


class CountNodes(CustomGraphPass):
    """A user's own pass: it sees the decomposed graph, as it would under Inductor."""

    def __init__(self, name: str | None) -> None:
        self.name = name
        self.seen: list[list[str]] = []

    def __call__(self, graph: torch.fx.Graph) -> None:
        self.seen.append([str(node.target) for node in graph.nodes if node.op == "call_function"])

    def uuid(self) -> str | None:
        return self.name


class PadProducts(CustomGraphPass):
    """Widens every product by three columns and cuts them off again, as Inductor does on GPUs where its clock says it pays."""

    def __call__(self, graph: torch.fx.Graph) -> None:
        for node in graph.find_nodes(op="call_function", target=torch.ops.aten.mm.default):
            a, b = node.args
            with graph.inserting_before(node):
                wide = graph.call_function(torch.ops.aten.constant_pad_nd.default, (b, [0, 3]))
                product = graph.call_function(torch.ops.aten.mm.default, (a, wide))
                cut = graph.call_function(torch.ops.aten.slice.Tensor, (product, 1, 0, b.meta["val"].shape[1]))
            node.replace_all_uses_with(cut)
            graph.erase_node(node)

    def uuid(self) -> str | None:
        return None


@pytest.mark.parametrize("dynamic", [False, True])
def test_strides_that_later_passes_change_are_put_right_before_the_kernel_runs(tmp_path: Path, dynamic: bool) -> None:
    def only_softmax(tasks: list[Task], settings: Settings) -> list[Decision]:
        return [(swap_all if task.signature == "softmax" else swap_none)([task], settings)[0] for task in tasks]

    seen: list[tuple[int, ...]] = []

    def build(spec: op.Spec, settings: Settings, index: int) -> Callable[..., None]:
        def launch(y: torch.Tensor, x: torch.Tensor, *symbols: int) -> None:
            seen.append(x.stride())
            y.copy_(x.softmax(-1))

        return launch

    x, w = torch.randn(4, 6), torch.randn(6, 5)
    padding, launchers = config.patch(joint_custom_post_pass=PadProducts()), mock.patch.object(op, "build_launcher", build)
    with swapping(tmp_path, only_softmax), padding, launchers, torch.no_grad():
        y = compiled(lambda x, w: F.softmax(x @ w, dim=-1), dynamic=dynamic)(x, w)
    torch.testing.assert_close(y, (x @ w).softmax(-1))
    assert seen == [(5, 1)]


@pytest.mark.parametrize("uuid", ["mine", None])
def test_a_joint_pass_of_the_users_own_runs_as_well(kernels: Kernels, uuid: str | None) -> None:
    theirs = CountNodes(uuid)
    with torch.no_grad():
        compiled(NormSoftmax(), options={"joint_custom_pre_pass": theirs})(torch.randn(4, 16))
    (seen,) = theirs.seen
    assert seen.count("llmk.region.default") == 2
    swaps = passes.SwapPass([], [], read_request(None, {"joint_custom_pre_pass": theirs}))
    assert bool(swaps.uuid()) == bool(uuid)


def softmax_again(graph: torch.fx.Graph) -> None:
    """A pre-grad pass of a user's that is not idempotent: every softmax is followed by another one."""
    for node in [n for n in graph.nodes if n.target is F.softmax]:
        with graph.inserting_after(node):
            again = graph.call_function(F.softmax, (node, -1))
        node.replace_all_uses_with(again, delete_user_cb=lambda user, again=again: user is not again)


def soft(x: torch.Tensor) -> torch.Tensor:
    return F.softmax(x, -1)


def soft_in_branches(x: torch.Tensor) -> torch.Tensor:
    return torch.cond(x[0, 0] > 0, soft, lambda x: soft(-x), (x,))


@pytest.mark.parametrize("function", [soft, soft_in_branches])
def test_a_pre_grad_pass_of_the_users_own_rewrites_the_graph_once(kernels: Kernels, function: Callable) -> None:
    x = torch.ones(4, 16)
    with torch.no_grad():
        got = compiled(function, options={"pre_grad_custom_pass": softmax_again})(x)
    torch.testing.assert_close(got, soft(soft(x)))
    assert kernels.calls == {"softmax": 2}


def test_a_graph_that_goes_to_inductor_after_an_error_is_as_dynamo_made_it(
    kernels: Kernels, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(graph: torch.fx.Graph) -> None:
        raise LLMKernelsError("after the pre-grad passes")

    monkeypatch.setattr(passes, "late_decompose", fail)
    x = torch.randn(4, 16)
    with torch.no_grad():
        got = compiled(soft, options={"pre_grad_custom_pass": softmax_again})(x)
    torch.testing.assert_close(got, soft(soft(x)))
    assert not kernels.calls and "after the pre-grad passes" in torch_llmkernels.report()[0].note


def test_looking_for_regions_leaves_the_graph_alone(kernels: Kernels) -> None:
    """`capture` runs it afterwards."""
    request, codes = read_request(None, {"pre_grad_custom_pass": softmax_again}), []

    def look(gm: torch.fx.GraphModule, inputs: list[Any]) -> Callable:
        codes.append(gm.graph.python_code("self").src)
        assert len(backend.plan_of(gm, inputs, request).tasks) == 2
        codes.append(gm.graph.python_code("self").src)
        return gm.forward

    with torch.no_grad():
        torch.compile(soft, backend=look)(torch.randn(4, 16))
    assert codes[0] == codes[1]


PER_THREAD = """/*---
implements = "softmax"
target = "cpu"
dtypes = ["float32"]
dims = { cols = "x.shape[1]", threads = "device.threads" }
[[workspace]]
name = "scratch"
dtype = "float32"
shape = ["threads", "cols"]
[[launch]]
kernel = "rows"
args = ["x", "scratch", "y"]
---*/
extern "C" void rows(const T_x* x, float* scratch, T_y* y) {}
"""


def test_code_for_other_workspaces_is_other_code_to_torchs_caches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Generated code allocates them, and how large they are depends on the cores that the process may use."""
    facts, task, uuids = CPU.facts(), softmax_task(4, 16), []
    for threads in (1, 2, 2):
        monkeypatch.setattr(CPU, "facts", lambda index=0, threads=threads: dataclasses.replace(facts, threads=threads))
        swaps = passes.SwapPass([task], [Decision(record_of(task, PER_THREAD), "swapped")], read_request(None, None))
        uuids.append(swaps.uuid())
    assert uuids[0] != uuids[1] == uuids[2]


# when nothing is swapped


@pytest.mark.parametrize(
    ("options", "why"), [({"swap": "none"}, "swap='none'"), ({"use_joint_graph_passes": False}, "joint graph passes are off")]
)
def test_graphs_that_go_to_inductor_without_a_second_trace(
    kernels: Kernels, options: dict[str, Any], why: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(backend, "discover", None)  # calling it would fail
    with torch.no_grad():
        compiled(lambda x: x.t() if False else F.layer_norm(x, [16]), options=options)(torch.randn(4, 16))
    (graph,) = torch_llmkernels.report()
    assert why in graph.note and not kernels.calls


def test_a_graph_without_anchors_is_not_traced_twice(kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "discover", None)
    with torch.no_grad():
        compiled(lambda x: x + 1)(torch.randn(4))
    assert "no operator that a pattern starts from" in torch_llmkernels.report()[0].note


def test_what_a_graph_holds_is_remembered(no_kernels: Kernels, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the process and in the store: only the first compilation of a graph pays for a second trace."""
    model, x = nn.Softmax(-1), torch.randn(4, 16)
    with torch.no_grad():
        compiled(model)(x)
        monkeypatch.setattr(backend, "discover", None)
        torch._dynamo.reset()
        compiled(model)(x)
        backend.plan.forget()
        torch._dynamo.reset()
        compiled(model)(x)
    assert reasons() == ["kept Inductor: it is a test"] * 3


def test_a_changed_input_is_another_graph(kernels: Kernels) -> None:
    model = nn.Softmax(-1)
    with torch.no_grad():
        for x in (torch.randn(4, 16), torch.randn(4, 16).double(), torch.randn(16, 4).t()):
            torch._dynamo.reset()
            torch.testing.assert_close(compiled(model)(x), model(x))
    assert len({region.key for graph in torch_llmkernels.report() for region in graph.regions}) == 3


def broken_lookup(tasks, settings):
    raise LLMKernelsError("the store is on fire")


def test_errors_of_ours_are_logged_and_inductor_compiles(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, x = nn.Softmax(-1), torch.randn(4, 16)
    with swapping(tmp_path, broken_lookup), caplog.at_level(logging.WARNING, "torch_llmkernels"), torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
        assert "the store is on fire" in torch_llmkernels.report()[0].note
    assert "goes to Inductor: LLMKernelsError: the store is on fire" in caplog.text


@pytest.mark.parametrize("step", ["backend.might_match", "graph_decision.measured", "online.why_not", "online.Trial"])
def test_whatever_goes_wrong_the_graph_goes_to_inductor(kernels: Kernels, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    """Before, after and beside the compilation; there is one report, and it says what happened."""

    def fail(*args: Any) -> None:
        raise OSError("the disk is on fire")

    monkeypatch.setattr(f"torch_llmkernels.{step}", fail)
    model, x = nn.Softmax(-1), torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, options={"whole_graph": "measure"})(x), model(x))
    (graph,) = torch_llmkernels.report()
    assert graph.note == "OSError: the disk is on fire" and not graph.regions and not kernels.calls


@pytest.mark.parametrize("options", [{"strict": True}, {"on_miss": "error"}])
def test_strict_raises_instead(tmp_path: Path, options: dict[str, Any]) -> None:
    with swapping(tmp_path, broken_lookup), pytest.raises(Exception, match="the store is on fire"):
        compiled(nn.Softmax(-1), options=options)(torch.randn(4, 16))


def test_fuel_limits_the_swaps_of_a_process(kernels: Kernels) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, options={"fuel": 1})(x), model(x))
    assert kernels.calls == {"layer_norm": 1}
    assert reasons()[1] == "kept Inductor: the fuel of 1 regions is spent"


def test_fuel_counts_equal_regions_one_by_one(kernels: Kernels) -> None:
    """A model of equal layers can be bisected: the report says which of them run the kernel."""
    model, x = nn.Sequential(*(nn.LayerNorm(16) for _ in range(3))), torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model, options={"fuel": 2})(x), model(x))
    assert kernels.calls == {"layer_norm": 2}
    assert [region.swapped for region in torch_llmkernels.report().regions] == [True, True, False]
    assert reasons()[2] == "kept Inductor: the fuel of 2 regions is spent"


def test_max_regions_limits_the_regions_of_a_graph(kernels: Kernels) -> None:
    with torch.no_grad():
        compiled(NormSoftmax(), options={"max_regions": 1})(torch.randn(4, 16))
    assert kernels.calls == {"layer_norm": 1}
    assert any("max_regions=1" in reason for reason in reasons())


# higher-order operators and control flow of Dynamo


def test_checkpoint_with_dropout_recomputes_the_same_mask(kernels: Kernels) -> None:
    """The recomputation must see the random state of the first run: the whole graph may not be traced again for the swaps."""
    norm = nn.LayerNorm(16)
    x = torch.randn(8, 16)

    def block(x: torch.Tensor) -> torch.Tensor:
        return F.dropout(norm(x), 0.5)

    y = compiled(lambda x: checkpoint(block, x, use_reentrant=False))(x)
    y.sum().backward()
    torch.testing.assert_close(norm.bias.grad, (y != 0).float().mul(2).sum(0))
    assert kernels.calls["layer_norm_backward"] == 1


def test_cond_swaps_in_both_branches(kernels: Kernels) -> None:
    model = NormSoftmax()

    def function(x: torch.Tensor) -> torch.Tensor:
        return torch.cond(x.sum() > 0, model, lambda x: model(-x), (x,))

    with torch.no_grad():
        for x in (torch.ones(4, 16), -torch.ones(4, 16)):
            torch.testing.assert_close(compiled(function)(x), function(x))
    assert kernels.calls["layer_norm"] == 2


@pytest.mark.parametrize("training", [False, True])
def test_nested_compile_regions(tmp_path: Path, training: bool) -> None:
    """With kernels, and without: the dropped trace must leave nothing in Dynamo's caches of subgraphs."""
    model, x = NormSoftmax(), torch.randn(4, 16)

    @torch.compiler.nested_compile_region
    def nested(x: torch.Tensor) -> torch.Tensor:
        return model(x)

    def function(x: torch.Tensor) -> torch.Tensor:
        return nested(nested(x))

    for store, resolve in (("all", swap_all), ("none", swap_none)):
        with swapping(tmp_path / store, resolve) as kernels, torch.set_grad_enabled(training):
            if training:
                torch.testing.assert_close(gradients(compiled(function), model, x), gradients(function, model, x))
            else:
                torch.testing.assert_close(compiled(function)(x), function(x))
        assert bool(kernels.calls) == (resolve is swap_all)


def test_restarts_of_dynamos_analysis_pass_through(kernels: Kernels) -> None:
    """Dynamo raises an exception through the backend to start again when a float turns out not to be symbolic."""
    function = compiled(lambda x, scale: F.softmax(x * scale, -1))
    with torch._dynamo.config.patch(specialize_float=False), torch.no_grad():
        for scale in (1.5, 2.5, 3.5):
            x = torch.randn(4, 16)
            torch.testing.assert_close(function(x, scale), F.softmax(x * scale, -1))


def test_functional_transforms_inside(kernels: Kernels) -> None:
    x = torch.randn(4, 16)
    per_row = torch.vmap(lambda row: F.softmax(row, -1))
    with torch.no_grad():
        torch.testing.assert_close(compiled(per_row)(x), per_row(x))


def test_mutated_and_aliased_inputs(kernels: Kernels) -> None:
    def function(x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        y = F.softmax(x, -1)
        x.add_(1)
        return y, x.view(-1)

    ours, theirs = torch.randn(4, 16), None
    theirs = ours.clone()
    with torch.no_grad():
        (y, view), (expected, _) = compiled(function)(ours), function(theirs)
    torch.testing.assert_close((y, ours), (expected, theirs))
    assert view.data_ptr() == ours.data_ptr()


@pytest.mark.parametrize(
    "make", [lambda: torch.randn(16, 4).t(), lambda: torch.randn(4, 20)[:, 3:19], lambda: torch.randn(16).expand(4, 16),
             lambda: torch.randn(0, 16), lambda: torch.randn(4, 16).double()],
)  # fmt: skip
def test_inputs_that_are_not_plain(kernels: Kernels, make: Callable[[], torch.Tensor]) -> None:
    x = make()
    with torch.no_grad():
        torch.testing.assert_close(compiled(lambda x: F.softmax(x, -1))(x), F.softmax(x, -1))


# processes, threads, copies


def test_two_models_share_one_slot(kernels: Kernels) -> None:
    first, second, x = NormSoftmax(), NormSoftmax(), torch.randn(4, 16)
    with torch.no_grad():
        for model in (first, second):
            torch._dynamo.reset()
            torch.testing.assert_close(compiled(model)(x), model(x))
    assert len(op.slots()) == 2 and kernels.calls == {"layer_norm": 2, "softmax": 2}


def test_threads(kernels: Kernels) -> None:
    model, failures = NormSoftmax(), []
    function = compiled(model)

    def work() -> None:
        for _ in range(20):
            x = torch.randn(4, 16)
            with torch.no_grad():
                if not torch.allclose(function(x), model(x), atol=1e-6):
                    failures.append(x)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures and kernels.calls["softmax"] == 60


def test_rebinding_a_slot_needs_no_recompile(kernels: Kernels) -> None:
    function, x = compiled(nn.Softmax(-1)), torch.randn(4, 16)
    with torch.no_grad():
        function(x)
        (slot,) = op.slots()
        slot.fn = lambda output, x: output.fill_(5.0)
        assert (function(x) == 5).all()
    assert len(torch_llmkernels.report()) == 1


def _run_in_child(function: Callable[..., Any], x: torch.Tensor, expected: torch.Tensor) -> None:
    torch.set_num_threads(1)  # a forked OpenMP pool has no threads
    with torch.no_grad():
        os._exit(0 if torch.allclose(function(x), expected) else 1)


def test_forked_workers(kernels: Kernels) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    function = compiled(model)
    with torch.no_grad():
        expected = function(x)
    child = multiprocessing.get_context("fork").Process(target=_run_in_child, args=(function, x, expected))
    child.start()
    child.join(60)
    assert child.exitcode == 0


def test_copies_and_pickles_of_a_compiled_module(kernels: Kernels) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    model.compile(backend=backend.llmkernels)
    with torch.no_grad():
        expected = model(x)
        for twin in (copy.deepcopy(model), pickle.loads(pickle.dumps(NormSoftmax().requires_grad_(False)))):
            twin.load_state_dict(model.state_dict())
            torch.testing.assert_close(twin(x), expected)


def test_reset_compiles_again(kernels: Kernels) -> None:
    function, x = compiled(nn.Softmax(-1)), torch.randn(4, 16)
    with torch.no_grad():
        function(x)
        torch._dynamo.reset()
        function(x)
    assert len(torch_llmkernels.report()) == 2 and kernels.calls["softmax"] == 2


@pytest.mark.slow
def test_cpp_wrapper(kernels: Kernels) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    function = compiled(model, options={"cpp_wrapper": True})
    torch.testing.assert_close(gradients(function, model, x), gradients(model, model, x))
    assert kernels.calls["softmax"] == 1 and kernels.calls["layer_norm_backward"] == 1


@pytest.mark.slow
def test_compiled_autograd(kernels: Kernels) -> None:
    model, x = NormSoftmax(), torch.randn(4, 16)
    with torch._dynamo.config.patch(compiled_autograd=True):
        ours = gradients(compiled(model), model, x)
    torch.testing.assert_close(ours, gradients(model, model, x))


@pytest.mark.slow
def test_a_deep_graph_compiles(kernels: Kernels) -> None:
    """48 layers: the lowering is registered, so Inductor does not explain an implicit fallback for every region."""
    model = nn.Sequential(*(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(48)))
    x = torch.randn(4, 16)
    with torch.no_grad():
        torch.testing.assert_close(compiled(model)(x), model(x))
    assert kernels.calls.total() == 96
