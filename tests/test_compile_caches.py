"""torch's compile caches across processes: swaps survive them, and nothing stale or foreign is ever loaded."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

TESTS = Path(__file__).resolve().parent


class Model(nn.Module):
    """Equal layer norms and softmax over [rows, width]; not in a function, where `caching_precompile` could not name it."""

    def __init__(self, width: int, norms: int) -> None:
        super().__init__()
        self.norm, self.norms = nn.LayerNorm(width), norms

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for _ in range(self.norms):
            x = self.norm(x)
        return torch.softmax(x, -1)


def compile_and_train(scenario: str) -> dict[str, Any]:
    """Compile and train a small model in this process; what the caches and the kernels did.

    Args:
        scenario: `inductor`, or which kernels the library has: `all`, `none`, or `other` (another source for each), or
            `precompiled`: all, with Dynamo's own cache on. `@24` after it makes another model, of that width, `@24x2` one with
            two norms, and `:fuel=1` sets a knob.
    """
    import swapping
    from torch._dynamo.utils import counters

    import torch_llmkernels
    from torch_llmkernels import backend, plan
    from torch_llmkernels.evaluation import Decision
    from torch_llmkernels.graph import op

    scenario, _, knob = scenario.partition(":")
    scenario, _, at = scenario.partition("@")
    width, _, norms = at.partition("x")
    options = dict([knob.split("=")]) if knob else None

    def other(tasks, settings):
        return [Decision(swapping.record_of(task, "another source"), "swapped: it is a test") for task in tasks]

    kernels = swapping.Kernels()
    op.build_launcher = kernels.build
    op._slots.clear()  # they are those of the scenario before, and so is what it spent
    plan._fuel_used = 0
    decisions = {"all": swapping.swap_all, "none": swapping.swap_none, "other": other, "precompiled": swapping.swap_all}
    backend.resolve = decisions.get(scenario)
    torch._dynamo.config.caching_precompile = scenario == "precompiled"
    traces: list[int] = []
    discover = backend.discover
    backend.discover = lambda *args: traces.append(1) or discover(*args)
    torch._dynamo.reset()
    counters.clear()
    torch.manual_seed(0)
    model, x = Model(int(width or 16), int(norms or 1)), torch.randn(4, int(width or 16), requires_grad=True)
    y = torch.compile(model, backend="inductor" if scenario == "inductor" else backend.llmkernels, options=options)(x)
    y.square().sum().backward()
    expected = model(x.detach())
    assert torch.allclose(y, expected, atol=1e-6)
    if scenario == "precompiled":
        torch.compiler.save_cache_artifacts()
    aot, inductor = counters["aot_autograd"], counters["inductor"]
    return {
        "calls": kernels.calls.total(), "reported": len(torch_llmkernels.report().swapped), "traces": len(traces),
        "aot_hits": aot["autograd_cache_hit"],
        "aot_misses": aot["autograd_cache_miss"], "fx_hits": inductor["fxgraph_cache_hit"],
        "bypassed": aot["autograd_cache_bypass"] + inductor["fxgraph_cache_bypass"],
        "dynamo_hits": counters["dynamo_cache"]["dynamo_cache_hit"],
    }  # fmt: skip


def in_a_process(folder: Path, *scenarios: str) -> tuple[list[dict[str, Any]], str]:
    """Run scenarios one after another in a fresh process; their results, and what was logged."""
    env = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path]), "OMP_NUM_THREADS": "1",
        "LLMKERNELS_CACHE_DIR": str(folder / "store"), "TORCHINDUCTOR_CACHE_DIR": str(folder / "torch"),
        "TORCH_LOGS": "+torch_llmkernels", "TORCH_TRACE": str(folder / "trace"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, *scenarios], env=env, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("caches")


@pytest.fixture(scope="module")
def first(folder: Path) -> tuple[list[dict[str, Any]], str]:
    """A cold process in which every region has a kernel; the second model may have the first of them only."""
    return in_a_process(folder, "all", "all@48x2:max_regions=1")


def test_a_cold_process_swaps_and_stores(first: tuple[list[dict[str, Any]], str]) -> None:
    (result, _), _ = first
    assert result["calls"] == 4 and result["traces"] == 1 and result["aot_hits"] == 0 and result["bypassed"] == 0


def test_torch_logs_shows_every_region(first: tuple[list[dict[str, Any]], str]) -> None:
    """`TORCH_LOGS=+torch_llmkernels` works without importing the package first."""
    assert "region layer_norm_backward [" in first[1] and "swapped: it is a test" in first[1]


def test_the_structured_trace_holds_the_regions(folder: Path, first: tuple[list[dict[str, Any]], str]) -> None:
    """What tlparse shows for each graph."""
    (log,) = (folder / "trace").iterdir()
    text = log.read_text()
    assert '"name": "llmkernels_regions"' in text and '"signature": "layer_norm_backward"' in text


@pytest.fixture(scope="module")
def second(folder: Path, first: Any) -> list[dict[str, Any]]:
    """A warm process: the same again, then another library, plain Inductor, an empty library, and a model new to all of them.

    At the end the model with one swap again, then with other knobs.
    """
    knobs = [f"all@48x2:{knob}" for knob in ("max_regions=1", "max_regions=2", "swap=none", "fuel=1")]
    return in_a_process(folder, "all", "other", "inductor", "none", "none@24", "precompiled@32", *knobs)[0]


@pytest.fixture(scope="module")
def third(folder: Path, second: Any) -> list[dict[str, Any]]:
    """A process that finds what an empty library left, and has a full one; then a model that was precompiled."""
    return in_a_process(folder, "all@24", "precompiled@32")[0]


def test_a_warm_process_hits_with_the_swaps_alive(second: list[dict[str, Any]]) -> None:
    again = second[0]
    assert again["aot_hits"] == 1 and again["calls"] == again["reported"] == 4
    assert again["traces"] == 0 and again["bypassed"] == 0


def test_another_kernel_misses(second: list[dict[str, Any]]) -> None:
    other = second[1]
    assert other["aot_hits"] == 0 and other["aot_misses"] == 1 and other["calls"] == 4


def test_another_knob_misses_and_the_same_one_hits(first: Any, second: list[dict[str, Any]]) -> None:
    """Both norms are one task, so the kernels that were chosen do not tell `max_regions` 1 from 2."""
    (_, cold), _ = first
    same, two, none = second[6:9]
    assert cold["calls"] == same["calls"] == 1 and cold["aot_hits"] == 0
    assert same["aot_hits"] == 1 and same["aot_misses"] == same["traces"] == 0
    for other, calls in ((two, 2), (none, 0)):
        assert other["calls"] == calls and other["aot_hits"] == other["fx_hits"] == other["bypassed"] == 0
        assert other["aot_misses"] - other["traces"] == 1  # a trace that looks for regions misses too


def test_with_fuel_nothing_is_cached(second: list[dict[str, Any]]) -> None:
    """What it leaves to be swapped depends on the graphs before."""
    fuelled = second[9]
    assert fuelled["calls"] == 1 and fuelled["bypassed"] > 0 and fuelled["aot_hits"] == fuelled["fx_hits"] == 0


def test_inductor_never_loads_what_we_stored(second: list[dict[str, Any]]) -> None:
    plain = second[2]
    assert plain["aot_hits"] == 0 and plain["aot_misses"] == 1 and plain["fx_hits"] == 0


def test_graphs_without_swaps_share_the_entries_of_inductor(second: list[dict[str, Any]]) -> None:
    """And an emptied library does not bring the swapped graph back."""
    unswapped = second[3]
    assert unswapped["aot_hits"] == 1 and unswapped["calls"] == 0 and unswapped["traces"] == 0


def test_a_library_that_is_filled_later_is_used(second: list[dict[str, Any]], third: list[dict[str, Any]]) -> None:
    """The unswapped graph is in torch's caches, and must not be what comes out of them."""
    assert second[4]["calls"] == 0 and third[0]["calls"] == 4 and third[0]["aot_hits"] == 0


def test_a_precompiled_model_runs_swapped_without_the_backend(second: list[dict[str, Any]], third: list[dict[str, Any]]) -> None:
    """With `caching_precompile` a hit never calls the backend: the generated code brings its kernels along."""
    cold, warm = second[5], third[1]
    assert cold["calls"] == 4 and cold["dynamo_hits"] == 0
    assert warm["calls"] == 4 and warm["dynamo_hits"] == 1 and warm["traces"] == 0


def test_importing_the_package_is_light() -> None:
    """torch imports it while it reads TORCH_LOGS; neither torch nor the search may come along."""
    code = "import sys, torch_llmkernels; print([m for m in ('torch', 'openai', 'diskcache', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=TESTS.parent, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


if __name__ == "__main__":
    for name in sys.argv[1:]:
        print(json.dumps(compile_and_train(name)), flush=True)
