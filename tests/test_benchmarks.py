"""The benchmarks' arithmetic and files, and the README's tables; one tiny operator goes all the way through."""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import os
import subprocess
import sys
import xml.dom.minidom
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import benchmark_path  # noqa: F401
import common
import model_zoo
import models
import operators
import overhead
import plot
import pytest
import readme_tables
import torch
from problems import PROBLEMS, Problem
from rich.console import Console
from torch import nn

from torch_llmkernels.errors import NotApplicable
from torch_llmkernels.evaluation import Record
from torch_llmkernels.graph.op import bind, encode_spec
from torch_llmkernels.kernels.device import facts_for_arch
from torch_llmkernels.kernels.source import parse_kernel


def arguments(tmp_path: Path, **changes: Any) -> argparse.Namespace:
    usual = {"device": "cpu", "out": tmp_path / "r.json", "resume": False, "budget_s": math.inf, "tf32": False, "store": None}
    return argparse.Namespace(**{**usual, **changes})


def test_a_result_file_is_complete_after_every_row(tmp_path: Path) -> None:
    results = common.Results("operators", arguments(tmp_path), key=("problem",))
    results.add({"problem": "a", "ms": 1})
    results.add({"problem": "b", "ms": 2})
    results.add({"problem": "a", "ms": 3})
    written = json.loads((tmp_path / "r.json").read_text())
    assert [(r["problem"], r["ms"]) for r in written["rows"]] == [("b", 2), ("a", 3)]
    assert written["versions"]["torch"] and written["commit"] and written["device_kind"].startswith("cpu")


def test_a_benchmark_plots_its_rows_with_a_swap(tmp_path: Path) -> None:
    results = common.Results("models-small", arguments(tmp_path), key=models.ROW)
    results.add(model_row("plain", 1.0, 0))
    results.finish({"ours": {"worst": 1.0}})
    assert json.loads((tmp_path / "r.json").read_text())["summary"]["ours"] and not (tmp_path / "r.svg").exists()
    results.add(model_row("won", 2.0, 1))
    results.finish({})
    plotted = (tmp_path / "r.svg").read_text()
    assert "won b1 fp32 infer" in plotted and "2.00x" in plotted and "plain" not in plotted


def test_resume_measures_only_what_is_missing(tmp_path: Path) -> None:
    common.Results("operators", arguments(tmp_path), key=("problem",)).add({"problem": "a"})
    again = common.Results("operators", arguments(tmp_path, resume=True), key=("problem",))
    assert not again.wanted(problem="a") and again.wanted(problem="b")
    late = common.Results("operators", arguments(tmp_path, budget_s=-1.0), key=("problem",))
    assert not late.wanted(problem="b")


def test_errors_are_relative_and_not_a_number_must_match() -> None:
    reference = [torch.tensor([3.0, 4.0])]
    assert common.error([torch.tensor([3.0, 4.5])], reference) == pytest.approx(0.1)
    assert common.error([torch.tensor([float("nan"), 4.0])], reference) == math.inf
    assert common.error([torch.zeros(3)], reference) == math.inf
    both = [torch.tensor([float("nan"), 4.0])]
    assert common.error(both, both) == 0.0


def test_accuracy_is_measured_by_eagers_error() -> None:
    assert common.is_accurate(1.05e-5, 1e-5, torch.float32)
    assert not common.is_accurate(1.5e-5, 1e-5, torch.float32)
    assert common.is_accurate(1e-7, 1e-9, torch.float32)  # below a few roundings there is nothing to tell apart


def test_products_in_float32_are_measured_in_two_tiers() -> None:
    names = ("layer_norm_8192x4096_fp32", "matmul_fp32_2048", "matmul_fp16_4096")
    found = [(p.name, operators.tier(p)) for p in operators.tiers([PROBLEMS[n] for n in names])]
    assert found == [
        ("layer_norm_8192x4096_fp32", "strict"), ("matmul_fp32_2048", "strict"), ("matmul_fp32_2048", "tf32"),
        ("matmul_fp16_4096", "float16"),
    ]  # fmt: skip


def test_an_operator_goes_all_the_way_through(tmp_path: Path, monkeypatch, capsys) -> None:
    tiny = Problem("tiny_softmax_fp32", lambda: nn.Softmax(-1), ((4, 16),), training=True)
    monkeypatch.setitem(PROBLEMS, tiny.name, tiny)
    monkeypatch.setitem(operators.CONTENDERS, "ours", {"backend": "eager"})
    out = tmp_path / "operators.json"
    operators.main(["--device", "cpu", "--problems", tiny.name, "--contenders", "eager,ours", "--quick", "--out", str(out)])
    (row,) = json.loads(out.read_text())["rows"]
    assert row["accurate"] and row["speedup"] > 0 and row["best_baseline"] == "eager" and row["floor_ms"] > 0
    assert "tiny_softmax_fp32" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="known: matmul_fp32_2048"):
        operators.main(["--problems", "nonsense"])


def model_row(name: str, ratio: float, swaps: int) -> dict[str, Any]:
    entry = {"abs_latency": 1.0, "swapped": ["softmax: k"] * swaps, "accurate": True}
    return {
        "model": name, "batch": 1, "precision": "fp32", "phase": "infer", "swaps": swaps, "verify_s": {},
        "modes": {"inductor": {"abs_latency": ratio}, "ours": entry}, "gain": {"ours": {"ratio": ratio, "noise": 0.01}},
    }  # fmt: skip


def test_models_without_a_swap_are_left_out_of_the_mean_but_not_of_the_worst() -> None:
    found = models.summary([model_row("a", 2.0, 1), model_row("b", 0.5, 0), model_row("c", 8.0, 2)])
    assert found["ours"]["geomean"] == pytest.approx(4.0) and found["ours"]["models"] == 2
    assert found["ours"]["worst"] == 0.5 and "b b1" in found["ours"]["worst_model"]


@pytest.mark.parametrize("wrong", [["--models", "x"], ["--modes", "x"], ["--phases", "x"], ["--dtypes", "x"]])
def test_a_misspelt_name_ends_a_benchmark_before_it_writes(tmp_path: Path, wrong: list[str]) -> None:
    with pytest.raises(SystemExit, match=r"unknown \w+ x; known: "):
        models.main(["--device", "cpu", "--small", *wrong, "--out", str(tmp_path / "models.json")])
    assert not (tmp_path / "models.json").exists()


@pytest.mark.skipif(torch.cuda.is_available(), reason="needs a machine without a CUDA device")
def test_a_device_that_is_not_here_ends_a_benchmark(tmp_path: Path) -> None:
    with pytest.raises(SystemExit, match="--device cuda: "):
        operators.main(["--device", "cuda", "--out", str(tmp_path / "operators.json")])


@pytest.mark.parametrize(("eager", "accurate"), [(1e-7, True), (0.0, False), (1.0, False)])
def test_a_row_whose_eager_is_all_zeros_or_all_wrong_is_not_called_accurate(eager: float, accurate: bool) -> None:
    row = {"modes": {"eager": {"error": eager}, "ours": {"error": eager, "swapped": []}}}
    models.judged(row, {"eager": [2.0] * 5, "ours": [1.0] * 5}, torch.float32)
    assert row["modes"]["ours"]["accurate"] is accurate


def test_random_weights_leave_no_model_without_an_output() -> None:
    """A head that starts at zero, and a batch norm that never saw how small its inputs are."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Flatten(), nn.Linear(8, 2))
    nn.init.zeros_(module[3].weight), nn.init.zeros_(module[3].bias)
    images = 0.02 * torch.randn(64, 3, 1, 1)
    with torch.no_grad():
        assert not module.eval()(images).any()
        normed = model_zoo.enliven(module, (images,)).eval()[:2](images)
        assert module(images).any() and 0.5 < normed.std() < 1.5
    assert module[1].momentum == 0.1 and module[1].num_batches_tracked == 1


def test_any_mode_of_ours_can_be_measured_alone() -> None:
    row = {"modes": {"eager": {"error": 1e-7}, "ours max-autotune": {"error": 1e-7, "swapped": ["softmax: k"]}}}
    found = models.judged(row, {"eager": [2.0] * 5, "ours max-autotune": [1.0] * 5}, torch.float32)
    assert found["swaps"] == 1 and row["modes"]["ours max-autotune"]["speedup"] == 2.0


def test_the_table_of_models_has_the_modes_that_were_measured() -> None:
    rows = [model_row("won", 2.0, 1), model_row("plain", 1.0, 0)]
    head, _, *lines = readme_tables.models({"rows": rows, "summary": {}}).splitlines()
    assert "Inductor ms" in head and "ours ms" in head and "max-autotune" not in head and "reduce-overhead" not in head
    assert "2.000x ± 0.010" in lines[0] and "no swap" in lines[1]


def test_a_model_that_cannot_be_made_is_skipped_with_its_reason(tmp_path: Path, monkeypatch) -> None:
    def broken() -> nn.Module:
        raise ModuleNotFoundError("No module named 'torchvision'")

    case = model_zoo.ModelCase("x", "torchvision", broken, lambda batch: (), (1, 2))
    monkeypatch.setattr(models, "LARGE", (case,))
    options = ["--device", "cpu", "--dtypes", "fp32", "--batches", "3", "--out", str(tmp_path / "models.json")]
    models.main(options)
    (row,) = json.loads((tmp_path / "models.json").read_text())["rows"]
    assert row["skipped"] == "ModuleNotFoundError: No module named 'torchvision'" and row["batch"] == 3
    again = common.Results("models", arguments(tmp_path, out=tmp_path / "models.json", resume=True), models.ROW)
    assert again.wanted(**{name: row[name] for name in models.ROW}), "a row that failed is measured again"


def test_what_the_budget_does_not_reach_is_said(tmp_path: Path) -> None:
    case = model_zoo.ModelCase("x", "small", lambda: nn.Linear(4, 4), lambda batch: (torch.ones(batch, 4),), (1, 2))
    args = arguments(tmp_path, budget_s=0.0, quick=True, precompile=False, verify_s=1.0)
    results = common.Results("models", args, models.ROW)
    row = models.measure(models.Setting(case, 1, "fp32", training=False), ["eager", "ours"], args, results)
    assert "budget" in row["modes"]["ours"]["failed"] and row["swaps"] == 0


def test_verification_is_part_of_the_first_compilation_latency_of_ours() -> None:
    entries = {mode: {"compilation_latency": 1.0} for mode in ("inductor", "ours", "ours reduce-overhead")}
    models.add_verification({"verify_s": {"ours": 5.0}, "modes": entries})
    assert [entry["compilation_latency"] for entry in entries.values()] == [1.0, 6.0, 1.0]


NOT_INSTALLED = """
import importlib.metadata
importlib.metadata.entry_points = lambda **wanted: importlib.metadata.EntryPoints()
import common, torch
torch._dynamo.list_backends.__globals__["_COMPILER_FNS"]["llmkernels"]
"""


def test_benchmarks_register_the_backend_where_the_package_is_not_installed() -> None:
    path = os.pathsep.join([str(common.ROOT / "benchmarks"), str(common.ROOT), *sys.path])
    environment = {**os.environ, "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", NOT_INSTALLED], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_every_row_of_a_model_is_planned() -> None:
    (case,) = [case for case in model_zoo.small() if case.name == "digits"]
    rows = [tuple(s.name.values())[1:] for s in models.plan([case], ["fp32", "half"])]
    assert rows == [(1, "fp32", "infer"), (2, "fp32", "infer"), (2, "fp32", "train"),
                    (1, "half", "infer"), (2, "half", "infer"), (2, "half", "train")]  # fmt: skip
    module, (x,) = next(models.plan([case], ["half"])).make("cpu")
    assert x.dtype is case.half and module(x).dtype is case.half and not module.training


def test_a_training_row_compares_gradients_with_float64() -> None:
    model, x = nn.Linear(4, 2), torch.randn(3, 4)
    found = models.results(model, model, (x,), training=True)
    assert [t.shape for t in found] == [(3, 2), (2, 4), (2,)] and model.weight.grad is None
    assert common.error(found, models.wide_results(model, (x,), training=True)) < 1e-6


@pytest.mark.slow
def test_a_small_model_goes_all_the_way_through(tmp_path: Path) -> None:
    out = tmp_path / "models.json"
    models.main(["--device", "cpu", "--small", "--models", "digits", "--dtypes", "fp32", "--modes", "default", "--quick",
                 "--phases", "train", "--out", str(out)])  # fmt: skip
    (row,) = json.loads(out.read_text())["rows"]
    assert all(row["modes"][mode]["accurate"] for mode in ("eager", "inductor", "ours"))
    assert row["gain"]["ours"]["ratio"] > 0 and row["modes"]["ours"]["compilation_latency"] > 0


def test_headings_of_a_wide_table_wrap_between_words(capsys: pytest.CaptureFixture[str]) -> None:
    columns = ["model", *(f"milliseconds verifying {n}" for n in range(9))]
    with mock.patch.object(common, "console", Console(width=135)):
        common.print_table("title", columns, [["resnet50 b32 fp32 infer", *[1.0] * 9]])
    assert capsys.readouterr().out.count("milliseconds") == 9


def test_overhead_of_calls_runs_the_kernel(tmp_path: Path, capsys) -> None:
    overhead.main(["--device", "cpu", "--quick", "--skip-compile", "--out", str(tmp_path / "overhead.json")])
    rows = {row["what"]: row["median"] for row in json.loads((tmp_path / "overhead.json").read_text())["rows"]}
    assert rows["swapped region in generated code"] > 0 and rows["eager a.add_(b)"] > 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_overhead_has_its_rows_of_a_gpu(tmp_path: Path) -> None:
    overhead.main(["--device", "cuda", "--quick", "--skip-compile", "--out", str(tmp_path / "overhead.json")])
    rows = {row["what"]: row["median"] for row in json.loads((tmp_path / "overhead.json").read_text())["rows"]}
    graphs = [median for name, median in rows.items() if "CUDA graph" in name]
    assert len(graphs) == 4 and min(graphs) > 0
    if torch.cuda.get_device_capability() == (9, 0):
        assert sum("linear" in name for name in rows) == 4


def test_overhead_in_cuda_graphs_is_per_call(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    monkeypatch.setattr(overhead, "captured", lambda subject: SimpleNamespace(replay=lambda: (subject(), held.append(1))))
    monkeypatch.setattr(overhead, "device_us", lambda replay, replays: 40.0)
    rows = {row["what"]: row for row in overhead.graph_rows("cpu", 100)}
    assert [row["median"] for name, row in rows.items() if name.endswith(": device")] == [2.0, 2.0]
    assert sum(name.endswith(": host") for name in rows) == 2 and len(held) == 2 * 11 * 5


LINEAR = """/*---
implements = "linear"
target = "cpu"
dtypes = ["float32"]
dims = { m = "x.shape[0]", n = "weight.shape[1]", k = "x.shape[1]" }
align = 1
[[workspace]]
name = "sums"
dtype = "float64"
shape = ["m", "n"]
[[launch]]
kernel = "linear"
args = ["x", "weight", "bias", "sums", "y", "m", "n", "k"]
---*/
extern "C" void linear(const T* x, const T* weight, const T* bias, double* sums, T* y, int64_t m, int64_t n, int64_t k) {
    for (int64_t i = 0; i < m * n; ++i) {
        sums[i] = bias[i % n];
        for (int64_t j = 0; j < k; ++j) sums[i] += double(x[i / n * k + j]) * weight[i % n * k + j];
        y[i] = sums[i];
    }
}
"""


@pytest.fixture
def small_linear(monkeypatch: pytest.MonkeyPatch) -> Record:
    """A record of the benchmark's linear, much smaller, by a kernel for the CPU with a workspace."""
    for name, size in (("ROWS", 3), ("WIDTH", 8), ("LAYERS", 5)):
        monkeypatch.setattr(overhead, name, size)
    return overhead.made_up(overhead.linear_task("cpu"), "linear", LINEAR, {}, "cpu")


def test_generated_calls_chain_layers_with_workspaces(small_linear: Record) -> None:
    spec = encode_spec(small_linear)
    x, weights, biases = torch.randn(3, 8), torch.randn(5, 8, 8) / 3, torch.randn(5, 8)
    arguments, given = [x, *(t for pair in zip(weights, biases, strict=True) for t in pair)], x.clone()
    found = overhead.generated(bind(spec), spec, "cpu", 5)(arguments)
    for weight, bias in zip(weights, biases, strict=True):
        x = nn.functional.linear(x, weight, bias)
    torch.testing.assert_close(found, x)
    torch.testing.assert_close(arguments[0], given)  # an input is no buffer to write into


def test_overhead_of_a_linear_is_measured_alone_and_in_turns(small_linear: Record) -> None:
    rows = overhead.linear_rows(small_linear, "cpu", 50)
    assert [row["what"] for row in rows] == [
        "eager linear", "swapped linear in generated code",
        "eager linear, 5 weights in turns", "swapped linear in generated code, 5 weights in turns",
    ]  # fmt: skip
    assert all(row["median"] > 0 and row["kernel"] == "linear" for row in rows)


def test_a_linear_that_would_run_its_reference_is_not_measured(small_linear: Record) -> None:
    broken = dataclasses.replace(small_linear, kernel_text=LINEAR.replace("double(x", "undeclared(x"))
    with pytest.raises(NotApplicable, match="undeclared"):
        overhead.linear_rows(broken, "cpu", 50)
    wrong = dataclasses.replace(small_linear, kernel_text=LINEAR.replace("= bias[i % n]", "= 0"))
    with pytest.raises(SystemExit, match="linear is wrong"):
        overhead.linear_rows(wrong, "cpu", 50)


def test_the_linear_of_the_overhead_is_a_shipped_kernel_with_workspaces_and_tensor_maps() -> None:
    task = dataclasses.replace(overhead.linear_task("cpu"), device="cuda")
    record = overhead.shipped_record(task, facts_for_arch("sm_90a"))
    kernel = parse_kernel(record.kernel_text, record.kernel_name)
    assert len(kernel.launch) > 1 and kernel.workspace and kernel.tensor_map and not kernel.prepared(task)
    with pytest.raises(NotApplicable, match="no kernel of linear for cpu"):
        overhead.shipped_record(overhead.linear_task("cpu"), facts_for_arch("sm_90a"))


def test_a_plot_is_an_svg_that_names_every_bar() -> None:
    text = plot.bars("speedup & such", [("fast <one>", 2.0), ("slow", 0.5)])
    bars = xml.dom.minidom.parseString(text).getElementsByTagName("rect")
    assert [bar.getAttribute("fill") for bar in bars] == [plot.FASTER, plot.SLOWER]
    assert "2.00x" in text and "fast &lt;one&gt;" in text


@pytest.fixture
def project(tmp_path: Path) -> tuple[Path, Path]:
    """A README with a place for a table, and results of one device."""
    readme, results = tmp_path / "README.md", tmp_path / "results"
    readme.write_text("# Title\n<!-- begin:operators -->\nold\n<!-- end:operators -->\nrest\n")
    contenders = {"eager": {"ms": 2.0, "error": 1e-7}, "ours": {"ms": 1.0, "error": 5e-8, "swapped": ["softmax: k"]}}
    row = {"problem": "softmax", "tier": "strict", "contenders": contenders, "floor_ms": 0.5, "speedup": 2.0, "accurate": True}
    result = {
        "device": "A GPU",
        "device_kind": "gpu",
        "versions": {"torch": "2.11"},
        "commit": "abc",
        "date": "2026-01-01",
        "rows": [row],
    }
    (results / "gpu").mkdir(parents=True)
    (results / "gpu" / "operators.json").write_text(json.dumps(result))
    return readme, results


def test_readme_tables_are_written_from_the_results_and_checked(project: tuple[Path, Path], capsys) -> None:
    readme, results = project
    options = ["--readme", str(readme), "--results", str(results)]
    assert readme_tables.main([*options, "--check"]) == 1
    assert readme_tables.main(options) == 0
    text = readme.read_text()
    assert "| softmax (strict) | 2 | - | - | 1 | 0.5 | 2.00x | 1e-07 | 5e-08 |" in text
    assert "A GPU, torch 2.11, commit abc" in text and text.startswith("# Title\n") and text.endswith("rest\n")
    assert (results / "gpu" / "operators.svg").exists()
    assert readme_tables.main([*options, "--check"]) == 0
    readme.write_text(text.replace("2.00x", "3.00x"))
    assert readme_tables.main([*options, "--check"]) == 1


def test_results_without_a_place_in_the_readme_are_an_error(project: tuple[Path, Path]) -> None:
    readme, results = project
    readme.write_text("# Title\n")
    with pytest.raises(SystemExit, match="begin:operators"):
        readme_tables.rendered(readme.read_text(), results)


def test_the_readme_agrees_with_the_committed_results() -> None:
    assert readme_tables.main(["--check"]) == 0
