"""What leaves the process: exported models and AOTInductor packages hold no swaps, torch's cache artifacts keep them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import swapping
import torch
from torch import nn

from tests.tasks import layer_norm_task
from torch_llmkernels import backend, registry
from torch_llmkernels.graph.op import encode_spec, region_op

TESTS = Path(__file__).resolve().parent


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.softmax(self.norm(x), -1)


def test_an_exported_model_holds_no_swaps_and_can_be_compiled_with_them(tmp_path: Path) -> None:
    """Export looks through `torch.compile`: what it writes runs anywhere. The backend takes it up again where it is loaded."""
    model, x = Model().eval(), torch.randn(4, 16)
    with swapping.swapping(tmp_path) as kernels, torch.no_grad():
        program = torch.export.export(torch.compile(model, backend=backend.llmkernels), (x,))
        assert not any("llmk" in str(node.target) for node in program.graph.nodes) and not registry.report()
        loaded = torch.compile(program.module(), backend=backend.llmkernels)
        torch.testing.assert_close(loaded(x), model(x))
        assert kernels.calls == {"layer_norm": 1, "softmax": 1}


def test_an_aotinductor_package_is_inductors_own(tmp_path: Path) -> None:
    """No backend has a say in it, so it has no swaps, and needs neither us nor Python."""
    model, x = Model().eval(), torch.randn(4, 16)
    with swapping.swapping(tmp_path) as kernels, torch.no_grad():
        program = torch.export.export(model, (x,))
        package = torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "model.pt2"))
        torch.testing.assert_close(torch._inductor.aoti_load_package(package)(x), model(x))
        assert not kernels.calls and not registry.report()


def test_a_swapped_graph_in_an_aotinductor_package_is_refused(tmp_path: Path) -> None:
    task = layer_norm_task()
    spec = encode_spec(swapping.record_of(task))
    inputs = tuple(torch.randn(t.shape) for t in task.inputs)

    class Swapped(nn.Module):
        def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
            return region_op()(spec, list(tensors), [])[0]

    import torch_llmkernels.graph.lowering  # noqa: F401 (what the backend imports before it swaps)

    with torch.no_grad():
        program = torch.export.export(Swapped(), inputs)
        with pytest.raises(Exception, match=r"layer_norm \[.*package runs without Python.*export the model itself"):
            torch._inductor.aoti_compile_and_package(program, package_path=str(tmp_path / "swapped.pt2"))


def compile_with_artifacts(step: str, folder: Path) -> dict[str, Any]:
    """Compile with torch's caches, plain and with `caching_precompile`, and save their artifacts or start from them."""
    from torch._dynamo.utils import counters

    from torch_llmkernels.graph import op

    kernels, found = swapping.Kernels(), {}
    op.build_launcher, backend.resolve = kernels.build, swapping.swap_all
    model, x = Model().eval(), torch.randn(4, 16)
    for precompile in (False, True):
        torch._dynamo.reset()
        torch.compiler._cache.CacheArtifactManager.clear()
        counters.clear()
        registry.clear()
        kernels.calls.clear()
        file = folder / f"artifacts-{precompile}"
        with torch._dynamo.config.patch(caching_precompile=precompile), torch.no_grad():
            if step == "load":
                torch.compiler.load_cache_artifacts(file.read_bytes())
            torch.testing.assert_close(torch.compile(model, backend="llmkernels")(x), model(x))
            if step == "save":
                file.write_bytes(torch.compiler.save_cache_artifacts()[0])
        hits = counters["aot_autograd"]["autograd_cache_hit"] + counters["dynamo_cache"]["dynamo_cache_hit"]
        found[str(precompile)] = {"hits": hits, "calls": kernels.calls.total(), "graphs": len(registry.report())}
    return found


def in_a_process(step: str, folder: Path) -> dict[str, Any]:
    """Run one step in a fresh process with empty caches of torch's and ours."""
    environment = {
        **os.environ, "PYTHONPATH": os.pathsep.join([str(TESTS), str(TESTS.parent), *sys.path]), "OMP_NUM_THREADS": "1",
        "LLMKERNELS_CACHE_DIR": str(folder / step / "store"), "TORCHINDUCTOR_CACHE_DIR": str(folder / step / "torch"),
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, __file__, step, str(folder)], env=environment, capture_output=True, text=True, timeout=240, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_cache_artifacts_keep_the_swaps_in_another_process(tmp_path: Path) -> None:
    """`torch.compiler.save_cache_artifacts`, without and with `torch._dynamo.config.caching_precompile`."""
    assert in_a_process("save", tmp_path) == {name: {"hits": 0, "calls": 2, "graphs": 1} for name in ("False", "True")}
    loaded = in_a_process("load", tmp_path)
    assert loaded["False"] == {"hits": 1, "calls": 2, "graphs": 1}
    assert loaded["True"] == {"hits": 1, "calls": 2, "graphs": 0}, "nothing is captured or looked up, and yet it runs swapped"


if __name__ == "__main__":
    print(json.dumps(compile_with_artifacts(sys.argv[1], Path(sys.argv[2]))))
