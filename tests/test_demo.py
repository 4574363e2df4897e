"""`make demo` on less data: what it trains and prints, by its numbers."""

from __future__ import annotations

import functools
import shutil
import sys
from pathlib import Path
from typing import Any
from unittest import mock

import benchmark_path  # noqa: F401
import demo
import pytest
import torch
from rich.table import Table

import torch_llmkernels
from torch_llmkernels import plan, registry
from torch_llmkernels.kernels.targets import target_for

LIBRARY = Path(__file__).parent.parent / "cache"


@pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")
def test_the_demo_trains_alike_and_shows_every_region(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """With kernels swapped in that are right, fast or not, so that there is something to agree; two of the library suffice."""
    for name in ("conv2d.relu.max_pool2d/channel_lanes_fused.cpp", "softmax/rows_fused.cpp"):
        (tmp_path / "library" / name).parent.mkdir(parents=True)
        shutil.copy(LIBRARY / name, tmp_path / "library" / name)
    monkeypatch.setenv("LLMKERNELS_LIBRARY_DIR", str(tmp_path / "library"))
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("LLMKERNELS_SWAP", "correct")
    monkeypatch.setattr(sys, "argv", ["demo.py", "--epochs", "1", "--device", "cpu"])
    patches = demo.patches
    monkeypatch.setattr(demo, "patches", lambda device: patches(device)[:, :64])
    monkeypatch.setattr(demo, "PatchEncoder", functools.partial(demo.PatchEncoder, width=64, layers=1))
    monkeypatch.setattr(demo, "interleaved_ms", lambda calls: dict.fromkeys(calls, 1.0))
    shown: list[Any] = []
    monkeypatch.setattr(demo.console, "print", shown.append)
    torch._dynamo.reset()
    registry.clear()
    plan.forget()
    with mock.patch.object(demo, "training_table", wraps=demo.training_table) as compared:
        demo.main()

    (losses, accuracy), _ = compared.call_args
    assert len(losses["eager"]) == 1 and losses["llmkernels"] == pytest.approx(losses["eager"], rel=1e-4)
    assert accuracy["eager"] > 0.5 and accuracy["llmkernels"] == pytest.approx(accuracy["eager"], abs=2 / 256)
    regions, training, inference = [part for part in shown if isinstance(part, Table)]
    found = [region for graph in torch_llmkernels.report() for region in graph.regions if region.key]
    assert {region.signature for region in found if region.swapped} == {"conv2d.relu.max_pool2d", "softmax"}
    keys = list(dict.fromkeys(region.key[:8] for region in found))
    assert list(regions.columns[1].cells) == keys and len(keys) > 10
    assert list(training.columns[0].cells) == ["eager", "llmkernels", "|difference|"] and inference.row_count == 2
