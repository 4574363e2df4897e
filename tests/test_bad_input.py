"""What `torch.compile` does when something around it is broken: the model runs, one line says why, and `strict` raises instead.

The same causes have closer tests where they are found: `test_source`, `test_launch`, `test_library`, `test_store`, `test_cuda`.
"""

from __future__ import annotations

import logging
import os
import sqlite3
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from tests.records import evaluation
from tests.tasks import layer_norm_task
from torch_llmkernels import plan, registry, resolve
from torch_llmkernels.cache import store as stores
from torch_llmkernels.evaluation import Evaluation, Status
from torch_llmkernels.graph import op
from torch_llmkernels.kernels import nvrtc
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.settings import Settings

pytestmark = pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")

SOFTMAX = (Path(__file__).parent / "kernels" / "softmax.cpp").read_text()


class Setting:
    """A library with one kernel of softmax, a store, and the options that name them."""

    def __init__(self, folder: Path) -> None:
        self.kernels, self.store = folder / "library" / "softmax", folder / "store"
        self.kernels.mkdir(parents=True)
        (self.kernels / "good.cpp").write_text(SOFTMAX)
        self.options: dict[str, Any] = {
            "swap": "correct", "library_dir": str(folder / "library"), "cache_dir": str(self.store), "verify_budget_s": 600.0,
        }  # fmt: skip
        self.verified: list[str] = []

    def run(self, **more: Any) -> str:
        """Compile and run a softmax as in a fresh process, compare it with eager; why its region was swapped or not."""
        torch._dynamo.reset()
        plan.forget()
        registry.clear()
        op._slots.clear()
        stores._opened.clear()
        x = torch.randn(4, 16)
        with torch.no_grad():
            y = torch.compile(nn.Softmax(-1), backend="llmkernels", options={**self.options, **more})(x)
        torch.testing.assert_close(y, torch.softmax(x, -1))
        (graph,) = registry.report()
        return graph.note or graph.regions[0].reason


@pytest.fixture
def setting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Setting]:
    """Evaluations pass at once: what is tested is what happens around them. Building and running the kernel is real."""
    found = Setting(tmp_path)

    def passes(task: Any, kernel: Any, record: Any, settings: Settings, binaries: str, **_: Any) -> Evaluation:
        found.verified.append(kernel.name)
        return evaluation(Status.CORRECT)

    monkeypatch.setattr(resolve, "evaluate", passes)
    with torch._inductor.config.patch(fx_graph_cache=False), torch._functorch.config.patch(enable_autograd_cache=False):
        yield found
    op._slots.clear()
    stores._opened.clear()
    torch._dynamo.reset()


SWAPPED = "swapped: good is correct (swap='correct')"


def test_nothing_broken(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    assert setting.run() == setting.run(strict=True) == SWAPPED
    (said,) = [r.getMessage() for r in caplog.records if r.levelno >= logging.WARNING and "llmk" in r.name]
    assert setting.verified == ["good"] and said.startswith("verifying up to 1 kernels")


@pytest.mark.parametrize(
    ("break_it", "why"),
    [
        (lambda text: "void softmax();", "must start with the header comment"),
        (lambda text: text.replace('target     = "cpu"', 'target = "tpu"'), "tpu"),
        (lambda text: text.replace('"dim == x.ndim - 1"', "\"__import__('os')\""), "__import__"),
        (lambda text: text.replace("x.numel // cols", "open('/etc/passwd')"), "open"),
        (lambda text: text.replace("#pragma omp", '#include "stdio.h"\n#pragma omp'), "include"),
    ],
    ids=["no header", "no such target", "a call", "a call of a builtin", "an include"],
)
def test_a_kernel_file_that_does_not_parse(
    setting: Setting, break_it: Callable[[str], str], why: str, caplog: pytest.LogCaptureFixture
) -> None:
    """It is skipped and named; the kernel beside it serves."""
    (setting.kernels / "bad.cpp").write_text(break_it(SOFTMAX))
    assert setting.run() == SWAPPED and setting.verified == ["good"]
    (line,) = {record.getMessage() for record in caplog.records if "bad.cpp" in record.getMessage()}
    assert why in line
    with pytest.raises(Exception, match=r"bad\.cpp"):
        setting.run(strict=True)


def test_a_kernel_that_does_not_compile(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    """Here it was accepted, and its binary is gone: the region runs its reference."""
    (setting.kernels / "good.cpp").write_text(SOFTMAX.replace("ACC top", "NoSuchType top"))
    reason = setting.run()
    assert reason.startswith("runs its reference: good: ") and "NoSuchType" in reason and reason in caplog.text
    with pytest.raises(Exception, match="NoSuchType"):
        setting.run(strict=True)


def test_a_record_of_another_schema_version(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    setting.run()
    with sqlite3.connect(setting.store / "cache.db") as database:
        ((key, value),) = database.execute("select key, value from Cache where key like 'decision/%'").fetchall()
        store = stores.Store(setting.store)
        store.put(key, store.get(key).replace(b'"schema":1', b'"schema":99'))
        assert value
    assert setting.run() == SWAPPED and setting.verified == ["good", "good"]
    assert "schema 99" in caplog.text


def test_a_truncated_store_entry(setting: Setting, caplog: pytest.LogCaptureFixture) -> None:
    setting.run()
    with sqlite3.connect(setting.store / "cache.db") as database:
        changed = database.execute("update Cache set value = substr(value, 1, 100) where filename is null").rowcount
    assert changed >= 3  # the plan, the decision and the binary
    assert setting.run() == SWAPPED and setting.verified == ["good", "good"]
    assert "counts as a miss" in caplog.text


def foreign(store: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    store.mkdir(mode=0o700)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)


@pytest.mark.parametrize(
    ("prepare", "why"),
    [
        (lambda store, _: store.mkdir(mode=0o500), "read-only"),
        (lambda store, _: (store.mkdir(), store.chmod(0o777)), "open to other users"),
        (foreign, "belongs to"),
        (lambda store, _: store.write_text("a file"), "not a directory"),
    ],
    ids=["read-only", "open to others", "of another user", "a file"],
)
def test_a_store_directory_that_cannot_be_used(
    setting: Setting, prepare: Callable, why: str, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """What is found is kept in memory for this process, with one warning."""
    prepare(setting.store, monkeypatch)
    assert setting.run() == SWAPPED
    (line,) = [r.getMessage() for r in caplog.records if r.levelno == logging.WARNING and "store" in r.getMessage()]
    assert why in line and str(setting.store) in line
    with pytest.raises(Exception, match=why):
        setting.run(strict=True)


def test_no_compiler(setting: Setting) -> None:
    assert "no-such-compiler" in setting.run(cxx="no-such-compiler")
    assert setting.verified == []


def test_no_cuda_bindings(setting: Setting, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("cuda.bindings", "cuda.bindings.nvrtc"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(nvrtc, "bindings", nvrtc.bindings.__wrapped__)  # not what an earlier test loaded
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    task = layer_norm_task(device="cuda")
    (decision,) = resolve.resolve([task], Settings().updated(setting.options))
    assert decision.record is None and "cuda-bindings" in decision.reason


CHILD = """
import torch, torch_llmkernels
from torch import nn
if __name__ == "__main__":
    print("ready", flush=True)
    input()
    x = torch.linspace(-2, 2, 64).view(4, 16)
    with torch.no_grad():
        y = torch.compile(nn.Softmax(-1), backend="llmkernels")(x)
    torch.testing.assert_close(y, torch.softmax(x, -1))
    print(torch_llmkernels.report()[0].regions[0].reason)
"""


def test_two_processes_compile_the_same_task(setting: Setting, tmp_path: Path) -> None:
    """Whoever comes first verifies; the other uses the outcome, or goes on with Inductor if it would have to wait."""
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    knobs = {f"LLMKERNELS_{name.upper()}": str(value) for name, value in setting.options.items()}
    environment = {**os.environ, **knobs, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    children = [
        subprocess.Popen([sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True)
        for _ in range(2)
    ]
    for child in children:
        assert child.stdout.readline() == "ready\n"
    outcomes = sorted(outcome.splitlines()[-1] for outcome in _together(children))
    assert [child.returncode for child in children] == [0, 0]
    assert outcomes[-1] == SWAPPED
    assert outcomes[0] in (SWAPPED, "kept Inductor: another process is verifying this task")


def _together(children: list[subprocess.Popen[str]]) -> list[str]:
    for child in children:
        child.stdin.write("\n")
        child.stdin.flush()
    return [child.communicate(timeout=240)[0] for child in children]
