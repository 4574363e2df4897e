"""Kernels and the architectures they are written for: by the header's own word, else by the compiler's."""

from __future__ import annotations

import dataclasses

import pytest

from tests import tasks
from torch_llmkernels.errors import CompileError, NotApplicable
from torch_llmkernels.kernels import nvrtc
from torch_llmkernels.kernels.device import cpu_facts, facts_for_arch
from torch_llmkernels.kernels.source import Kernel, parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.task import Task

TEXT = """/*---
implements = "softmax"
target = "cuda"
dtypes = ["float32"]
where = [WHERE]
[[launch]]
kernel = "f"
grid = ["1"]
block = ["128"]
args = ["x", "y"]
---*/
extern "C" __global__ void f(const float* x, float* y) { BODY y[0] = x[0]; }
"""


def kernel(body: str = "", where: str = "") -> Kernel:
    return parse_kernel(TEXT.replace("BODY", body).replace("WHERE", where))


def task() -> Task:
    return tasks.softmax_task(8, 64, device="cuda")


def compiled(found: Kernel, arch: str) -> bytes:
    return target_for("cuda").compile(found, task(), {}, facts_for_arch(arch)).code


def test_an_architecture_is_a_number() -> None:
    assert [facts_for_arch(a).arch_number for a in ("sm_80", "sm_90a", "sm_100a", "sm_120")] == [80, 90, 100, 120]
    assert cpu_facts().arch_number == 0


@pytest.mark.parametrize(
    ("where", "served"),
    [("", ["sm_80", "sm_90a", "sm_100a"]), ('"device.arch >= 90"', ["sm_90a", "sm_100a"]), ('"device.arch == 90"', ["sm_90a"])],
)
def test_where_excludes_a_device(where: str, served: list[str]) -> None:
    """A kernel without a combination for the device is not applicable, and never compiled there."""
    found = kernel(where=where)
    assert found.why_not(task()) is None  # another device may well be served
    assert [a for a in ("sm_80", "sm_90a", "sm_100a") if found.tunings(task(), facts_for_arch(a))] == served


nvrtc_only = pytest.mark.skipif(bool(target_for("cuda").unavailable() and "CUDA device" not in target_for("cuda").unavailable()),
                                reason="no NVRTC")  # fmt: skip


@nvrtc_only
@pytest.mark.parametrize(
    ("body", "arch", "word"),
    [
        ('asm volatile("wgmma.fence.sync.aligned;");', "sm_80", "wgmma.fence"),
        ('asm volatile("wgmma.fence.sync.aligned;");', "sm_100a", "wgmma.fence"),
        ('asm volatile("setmaxnreg.dec.sync.aligned.u32 40;");', "sm_89", "setmaxnreg"),
        ('asm volatile("barrier.cluster.arrive.aligned;");', "sm_80", "barrier.cluster"),
        ("wgmma_fence();", "sm_100a", "wgmma_fence"),
        ("cluster_sync();", "sm_89", "cluster_sync"),
    ],
)
def test_what_the_architecture_lacks_is_named(body: str, arch: str, word: str) -> None:
    with pytest.raises(NotApplicable, match=rf"another architecture than {arch}: .*{word}"):
        compiled(kernel(body), arch)
    assert compiled(kernel(body), "sm_90a")


@nvrtc_only
def test_other_mistakes_stay_compile_errors() -> None:
    for body in ("no_such_helper();", 'asm volatile("no.such.instruction;");', "int x = ;"):
        with pytest.raises(CompileError):
            compiled(kernel(body), "sm_80")


def test_the_prelude_says_where_its_helpers_exist() -> None:
    helpers = nvrtc.guarded_helpers()
    assert "FEAT_SM90" in helpers["wgmma_fence"] and ">= 900" in helpers["cluster_sync"]
    assert "warp_sum" not in helpers


def test_records_keep_their_facts() -> None:
    """The number is derived: stored facts have no field of that name."""
    facts = facts_for_arch("sm_90a")
    assert "arch_number" not in facts.to_json() and dataclasses.replace(facts, arch="sm_80").arch_number == 80
