"""Tasks are canonical: one computation, one key."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import zoo
from graphs import capture
from torch import fx, nn

from torch_llmkernels.graph.regions import find_regions
from torch_llmkernels.graph.task_of import RegionTask, task_of
from torch_llmkernels.program import module_of
from torch_llmkernels.task import Task


def region_tasks(gm: fx.GraphModule) -> list[RegionTask]:
    return [task_of(r) for r in find_regions(gm.graph)[0]]


def tasks(gm: fx.GraphModule) -> list[Task]:
    return [t.task for t in region_tasks(gm)]


def only(gm: fx.GraphModule) -> Task:
    (task,) = tasks(gm)
    return task


def test_layer_norm_task_says_everything() -> None:
    task = only(capture(nn.LayerNorm(8), torch.randn(4, 8)))
    assert [n.op for n in task.program] == ["aten.native_layer_norm.default", "getitem"]
    assert task.program[0].args == ({"v": "x"}, {"p": "normalized_shape"}, {"v": "weight"}, {"v": "bias"}, {"p": "eps"})
    assert task.param == {"eps": 1e-5, "normalized_shape": (8,)}
    assert (task.results, task.device, task.symbols) == (("n1",), "cpu", ())
    assert Task.from_json(task.to_json()).key == task.key


def test_scalar_tensors_keep_integers_integers() -> None:
    """In an integer call the scalar is an integer, in a floating one a float: the program's dtype is the graph's."""
    x = torch.arange(12).reshape(3, 4)
    for call in (
        lambda x: (x * torch.full([], 3)).sum(-1),
        lambda x: torch.where(x > 0, x, torch.full([], 7)).sum(-1),
        lambda x: (x.float() * torch.full([], 3)).sum(-1),
    ):
        task = only(capture(call, x))
        (got,) = module_of(task)(x if task.inputs[0].dtype == "int64" else x.float())
        assert got.dtype is getattr(torch, task.outputs[0].dtype)
        torch.testing.assert_close(got, call(x))


def test_call_site_spelling_does_not_matter() -> None:
    norm = nn.LayerNorm(8)
    x, w, b = torch.randn(4, 8), torch.randn(8), torch.randn(8)
    spellings = [
        capture(norm, x),
        capture(lambda x, w, b: F.layer_norm(x, (8,), w, b), x, w, b),
        capture(lambda b, w, x: F.layer_norm(input=x, bias=b, weight=w, eps=0.00001, normalized_shape=[8]), b, w, x),
    ]
    assert len({only(gm).key for gm in spellings}) == 1


def test_dims_scales_and_operand_order_are_normalised() -> None:
    x, m = torch.randn(2, 8, 8), torch.randn(8, 8)
    spellings = [
        capture(lambda x, m: torch.softmax(x * 0.125 + m, -1), x, m),
        capture(lambda x, m: F.softmax(m + x / 8, dim=2), x, m),
        capture(lambda x, m: torch.add(m, torch.div(x, 8.0)).softmax(2), x, m),
    ]
    assert len({only(gm).key for gm in spellings}) == 1
    assert only(spellings[1]).param == {"dim": 2, "scale": 0.125}


def test_pool_defaults_are_filled_in() -> None:
    conv = nn.Conv2d(1, 2, 3)
    x = torch.randn(1, 1, 8, 8)
    a = only(capture(lambda x: F.max_pool2d(F.relu(conv(x)), 2), x))
    b = only(capture(lambda x: F.max_pool2d(conv(x).relu_(), (2, 2), stride=[2, 2], padding=0, dilation=1), x))
    assert a.key == b.key
    assert a.param["max_pool2d_stride"] == (2, 2)
    assert a.param["stride"] == (1, 1)


def test_attention_scale_default_is_the_explicit_one() -> None:
    q = torch.randn(1, 2, 8, 16)
    a = capture(lambda q: F.scaled_dot_product_attention(q, q, q), q)
    b = capture(lambda q: F.scaled_dot_product_attention(q, q, q, scale=0.25), q)
    assert only(a).key == only(b).key


def test_literals_are_parameters_so_signatures_are_free_of_shapes() -> None:
    def task(channels: int, kernel: int) -> Task:
        return only(capture(nn.Sequential(nn.Conv2d(3, channels, kernel), nn.ReLU()), torch.randn(1, 3, 9, 9)))

    assert task(4, 3).signature_key == task(8, 5).signature_key
    assert task(4, 3).key != task(8, 5).key


def shuffled(gm: fx.GraphModule, seed: int) -> fx.GraphModule:
    """The same graph with its nodes in another topological order and other names."""
    rng, graph, copies = random.Random(seed), fx.Graph(), dict[fx.Node, fx.Node]()
    waiting = [n for n in gm.graph.nodes if n.op != "output"]
    while waiting:
        ready = [n for n in waiting if all(i in copies for i in n.all_input_nodes)]
        node = rng.choice([n for n in ready if n.op == "placeholder"] or ready)
        waiting.remove(node)
        copies[node] = graph.node_copy(node, copies.__getitem__)
        copies[node].name = f"{'tangents_' if node.name.startswith('tangents') else 'v'}{len(copies)}"
    output = gm.graph.output_node()
    graph.output(fx.map_arg(output.args[0], copies.__getitem__))
    return fx.GraphModule(gm, graph)


def test_node_order_and_names_do_not_matter() -> None:
    gm = capture(zoo.GPTBlock(), torch.randint(0, 50, (2, 16)), training=True)
    expected = sorted(t.key for t in tasks(gm))
    for seed in range(5):
        assert sorted(t.key for t in tasks(shuffled(gm, seed))) == expected


KEYS_OF_DIGITS = """
import torch, zoo
from graphs import capture
from torch_llmkernels.graph.regions import find_regions
from torch_llmkernels.graph.task_of import task_of
gm = capture(zoo.DigitsCNN(), torch.randn(4, 1, 8, 8), training=True)
print(" ".join(task_of(r).task.key for r in find_regions(gm.graph)[0]))
"""


def test_a_fresh_process_with_another_hash_seed_has_the_same_keys() -> None:
    root = Path(__file__).parent
    environment = {**os.environ, "PYTHONHASHSEED": "12345", "PYTHONPATH": f"{root}{os.pathsep}{root.parent}"}
    done = subprocess.run(
        [sys.executable, "-c", KEYS_OF_DIGITS], env=environment, capture_output=True, text=True, check=True, cwd=root
    )
    here = [t.key for t in tasks(capture(zoo.DigitsCNN(), torch.randn(4, 1, 8, 8), training=True))]
    assert done.stdout.split() == here


def test_strides_are_part_of_the_key() -> None:
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())
    x = torch.randn(2, 3, 8, 8)
    plain, last = only(capture(net, x)), only(capture(net, x.to(memory_format=torch.channels_last)))
    assert plain.key != last.key
    assert plain.signature_key == last.signature_key
    assert last.tensor("x").stride == (192, 1, 24, 3)


def test_dynamic_sizes_become_symbols_with_hints() -> None:
    (found,) = region_tasks(capture(lambda x: x.softmax(1), torch.randn(4, 5, 8), dynamic=True))
    assert found.task.symbols == (("d0", 4), ("d1", 5), ("d2", 8))
    assert found.task.tensor("x").shape == ("d0", "d1", "d2")
    assert found.task.tensor("x").stride == ("d1*d2", "d2", 1)
    assert [s is not None and str(s.meta["val"].node.hint) for s in found.symbols] == ["4", "5", "8"]
    assert found.task.at({"d0": 2, "d1": 3, "d2": 7}).tensor("x").stride == (21, 7, 1)


def test_another_batch_size_has_the_same_dynamic_key() -> None:
    def key(batch: int) -> str:
        return only(capture(nn.LayerNorm(8), torch.randn(batch, 5, 8), dynamic=True)).key

    assert key(4) == key(9)


def test_a_flattened_batch_is_one_symbol() -> None:
    task = only(capture(nn.Linear(8, 16), torch.randn(4, 5, 8), dynamic=True))
    assert task.tensor("x").shape == ("d0", 8)
    assert task.symbols == (("d0", 20),)


def test_views_of_dynamic_sizes_stay_in_the_program() -> None:
    """Where the columns are split, the region is no matrix."""
    heads = torch.randn(16, 8)
    task = only(capture(lambda x: F.relu(F.linear(x, heads).unflatten(-1, (2, 8))), torch.randn(4, 5, 8), dynamic=True))
    view = next(n for n in task.program if n.op == "aten.view.default" and len(n.args[1]) == 4)
    assert [size for size in view.args[1] if isinstance(size, dict)] == [{"s": "d1"}, {"s": "d0"}]
    assert task.tensor("x").shape == ("d0*d1", "d2")


def test_only_the_precision_flags_that_a_program_reads_are_in_its_key() -> None:
    norm, linear = capture(nn.LayerNorm(8), torch.randn(4, 8)), capture(nn.Linear(8, 8), torch.randn(4, 8))

    def keys() -> tuple[str, str]:
        return only(norm).key, only(linear).key

    before = keys()
    saved = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        assert keys()[0] == before[0]
        assert keys()[1] != before[1]
    finally:
        torch.set_float32_matmul_precision(saved)
    torch.use_deterministic_algorithms(True)
    try:
        assert keys()[0] != before[0]
    finally:
        torch.use_deterministic_algorithms(False)
    assert keys() == before


def test_constant_inputs_are_named() -> None:
    gm = capture(nn.LayerNorm(8), torch.randn(4, 8))
    (region,) = find_regions(gm.graph)[0]
    weight = dict(region.inputs)["weight"]
    assert task_of(region, constant={weight}).task.constant == ("weight",)


def test_inputs_and_outputs_are_graph_nodes_in_task_order() -> None:
    (found,) = region_tasks(capture(lambda x, w: F.layer_norm(x, (8,), w), torch.randn(4, 8), torch.randn(8)))
    assert [t.name for t in found.task.inputs] == ["x", "weight"]
    assert [tuple(n.meta["val"].shape) for n in found.inputs] == [(4, 8), (8,)]
    assert [tuple(n.meta["val"].shape) for n in found.outputs] == [(4, 8)]
