"""Counters of Nsight Compute: what its CSV says in a line per launch, and why there may be none."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path

import pytest
from tasks import layer_norm_task

from torch_llmkernels.evaluate import ncu
from torch_llmkernels.evaluate.job import Job

STALL = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
HEAD = ('"ID","Process ID","Process Name","Host Name","Kernel Name","Context","Stream","Block Size","Grid Size","Device","CC",'
        '"Section Name","Metric Name","Metric Unit","Metric Value"')  # fmt: skip


def row(launch: int, kernel: str, metric: str, unit: str, value: str) -> str:
    return (f'"{launch}","4242","python3.11","127.0.0.1","{kernel}","1","7","(384, 1, 1)","(1024, 1, 1)","0","9.0",'
            f'"Command line profiler metrics","{metric}","{unit}","{value}"')  # fmt: skip


RECORDED = "\n".join([
    "==PROF== Connected to process 4242 (/usr/bin/python3.11)",
    '==PROF== Profiling "prepare" - 0: 0%....50%....100% - 3 passes',
    '==PROF== Profiling "product" - 1: 0%....50%....100% - 3 passes',
    "==PROF== Disconnected from process 4242",
    HEAD,
    row(0, "prepare(const float *, int)", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "81.72"),
    row(0, "prepare(const float *, int)", "gpu__time_duration.sum", "nsecond", "48,512"),
    row(1, "product", "dram__throughput.avg.pct_of_peak_sustained_elapsed", "%", "11.40"),
    row(1, "product", "gpu__time_duration.sum", "usecond", "612.35"),
    row(1, "product", "l1tex__t_sector_hit_rate.pct", "%", "0"),
    row(1, "product", "lts__t_sector_hit_rate.pct", "%", "78.9"),
    row(1, "product", "sm__throughput.avg.pct_of_peak_sustained_elapsed", "%", "70.61"),
    row(1, "product", "sm__warps_active.avg.pct_of_peak_sustained_active", "%", "18.75"),
    row(1, "product", STALL.format("barrier"), "inst", "1.25"),
    row(1, "product", STALL.format("long_scoreboard"), "inst", "4.5"),
    row(1, "product", STALL.format("sleeping"), "inst", "0"),
    row(1, "product", STALL.format("wait"), "inst", "2.04"),
    row(1, "product", STALL.format("math_pipe_throttle"), "inst", "0.31"),
    row(1, "product", "sm__missing.sum", "", "n/a"),
    "",
])  # fmt: skip


def test_a_line_per_launch_the_longest_first_with_its_top_stalls() -> None:
    product, prepare = ncu.summaries(RECORDED)
    assert product == (
        "product: time 612.4 us, multiprocessors busy 71%, memory busy 11%, L1 hits 0%, L2 hits 79%, achieved occupancy 19%, "
        "warps waiting per issued instruction: long_scoreboard 4.5, wait 2.0, barrier 1.2"
    )
    assert prepare == "prepare: time 48.5 us, memory busy 82%"


def test_output_without_counters_has_no_lines() -> None:
    assert ncu.summaries("==PROF== Connected\n==WARNING== No kernels were profiled.\n") == ()


@pytest.fixture
def job(monkeypatch: pytest.MonkeyPatch) -> Job:
    monkeypatch.setattr(ncu, "_refused", {})
    monkeypatch.setattr(ncu, "find_ncu", lambda: "/nowhere/ncu")
    return Job(layer_norm_task(device="cuda"), "", constants={})


def test_without_permission_it_says_so_and_is_not_asked_again(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def refused(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        asked.append(command)
        return subprocess.CompletedProcess(command, 1, "==ERROR== ERR_NVGPUCTRPERM - The user does not have permission", "")

    monkeypatch.setattr(subprocess, "run", refused)
    assert ncu.profile(job) == ncu.profile(job)
    assert "may not read" in ncu.profile(job)[0] and len(asked) == 1


def test_it_runs_the_job_under_ncu_and_reads_what_it_prints(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        assert command[0] == "/nowhere/ncu" and Job.from_json(json.loads(Path(command[-1]).read_text())) == job
        return subprocess.CompletedProcess(command, 0, RECORDED, "")

    monkeypatch.setattr(subprocess, "run", run)
    assert ncu.profile(job) == ncu.summaries(RECORDED)


@pytest.mark.parametrize("failure, words", [(subprocess.TimeoutExpired("ncu", 60), "longer than"), (None, "exited with 9")])
def test_trouble_is_one_line(job: Job, monkeypatch: pytest.MonkeyPatch, failure: Exception | None, words: str) -> None:
    def run(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        if failure:
            raise failure
        return subprocess.CompletedProcess(command, 9, "", "==ERROR== no driver\n")

    monkeypatch.setattr(subprocess, "run", run)
    (line,) = ncu.profile(job)
    assert line.startswith("no counters:") and words in line


def test_without_ncu_it_says_so(job: Job, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ncu, "find_ncu", lambda: None)
    assert "not installed" in ncu.profile(job)[0]
