"""What Nsight Compute counts while a kernel runs: how busy its units were, what the caches served, what its warps waited for.

The kernel runs in a child process under `ncu --csv`, on the task as it is. Counters are advice for the model that improves the
kernel, never a verdict: where ncu is missing, too slow or not permitted to count, a line says so and the evaluation goes on.
Run as a module it is that child: `python -m torch_llmkernels.evaluate.ncu JOB.json`.
"""

from __future__ import annotations

import csv
import glob
import io
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path

from torch_llmkernels.evaluate.job import Job

TIMEOUT_S = 60
MOST_KERNELS, MOST_STALLS = 6, 3
COUNTERS = {
    "gpu__time_duration.sum": "time",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "multiprocessors busy",
    "dram__throughput.avg.pct_of_peak_sustained_elapsed": "memory busy",
    "l1tex__t_sector_hit_rate.pct": "L1 hits",
    "lts__t_sector_hit_rate.pct": "L2 hits",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "achieved occupancy",
}
"""Metrics of ncu and their names in a line, in order."""
_STALL, _STALL_END = "smsp__average_warps_issue_stalled_", "_per_issue_active.ratio"


def find_ncu() -> str | None:
    """Path of ncu: on PATH, or in a CUDA toolkit or an Nsight Compute folder; None if there is none."""
    places = sorted(glob.glob("/usr/local/cuda*/bin/ncu") + glob.glob("/opt/nvidia/nsight-compute/*/ncu"), reverse=True)
    return shutil.which("ncu") or next((p for p in places if os.access(p, os.X_OK)), None)


def profile(job: Job) -> tuple[str, ...]:
    """One line per launch of a CUDA job's kernel with `job.constants`, or one line that says why there is none."""
    ncu = find_ncu()
    if ncu is None:
        return ("no counters: ncu (Nsight Compute) is not installed",)
    return (_refused[ncu],) if ncu in _refused else _profile(ncu, job)


_refused: dict[str, str] = {}  # by path of ncu: it will not be permitted a minute later either


def _profile(ncu: str, job: Job) -> tuple[str, ...]:
    with tempfile.TemporaryDirectory(prefix="llmk-") as directory:
        path = Path(directory, "job.json")
        path.write_text(json.dumps(job.to_json()))
        stalls = f"regex:{_STALL}[a-z_]+{_STALL_END}".replace(".ratio", r"\.ratio")
        command = [ncu, "--csv", "--profile-from-start", "off", "--metrics", ",".join([*COUNTERS, stalls]),
                   sys.executable, "-m", "torch_llmkernels.evaluate.ncu", str(path)]  # fmt: skip
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S)
        except subprocess.TimeoutExpired:
            return (f"no counters: ncu took longer than {TIMEOUT_S} s",)
    lines = summaries(done.stdout)
    if lines:
        return lines
    if "ERR_NVGPUCTRPERM" in done.stdout + done.stderr:
        _refused[ncu] = "no counters: this user may not read the GPU's performance counters (ERR_NVGPUCTRPERM)"
        return (_refused[ncu],)
    said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
    return (f"no counters: ncu exited with {done.returncode} and said: {said[:200]}",)


def summaries(text: str) -> tuple[str, ...]:
    """The lines for what `ncu --csv` printed: one per launch, the longest ones first; none if it holds no counters."""
    rows = text.splitlines()
    head = next((i for i, row in enumerate(rows) if row.startswith('"ID"')), None)
    if head is None:
        return ()
    launches: dict[str, dict[str, float]] = {}
    names: dict[str, str] = {}
    for row in csv.DictReader(io.StringIO("\n".join(rows[head:]))):
        value = _number(row.get("Metric Value"))
        if row.get("ID") and value is not None:
            names[row["ID"]] = (row.get("Kernel Name") or "").partition("(")[0]
            scale = _SECONDS.get(row.get("Metric Unit") or "", 1.0)
            launches.setdefault(row["ID"], {})[row.get("Metric Name") or ""] = value * scale
    longest = sorted(launches, key=lambda i: -launches[i].get("gpu__time_duration.sum", 0.0))[:MOST_KERNELS]
    return tuple(f"{names[i]}: {_line(launches[i])}" for i in longest)


_SECONDS = {"ns": 1e-9, "nsecond": 1e-9, "us": 1e-6, "usecond": 1e-6, "ms": 1e-3, "msecond": 1e-3}


def _number(text: str | None) -> float | None:
    try:
        return float((text or "").replace(",", ""))
    except ValueError:
        return None  # n/a


def _line(values: Mapping[str, float]) -> str:
    parts = [
        f"{name} {values[metric] * 1e6:.1f} us" if name == "time" else f"{name} {values[metric]:.0f}%"
        for metric, name in COUNTERS.items()
        if metric in values
    ]
    stalls = {m[len(_STALL) : -len(_STALL_END)]: v for m, v in values.items() if m.startswith(_STALL) and m.endswith(_STALL_END)}
    top = sorted(stalls.items(), key=lambda item: -item[1])[:MOST_STALLS]
    waits = ", ".join(f"{name} {ratio:.1f}" for name, ratio in top if ratio > 0)
    return ", ".join([*parts, *([f"warps waiting per issued instruction: {waits}"] if waits else [])])


def _child(path: str) -> int:
    """Run the job's kernel twice; ncu counts during the second call."""
    import torch

    from torch_llmkernels.evaluate.candidate import Candidate, Device
    from torch_llmkernels.evaluate.timing import make_sets
    from torch_llmkernels.kernels.source import parse_kernel

    job = Job.from_json(json.loads(Path(path).read_text()))
    kernel, constants = parse_kernel(job.kernel_text, job.kernel_name), dict(job.constants or {})
    device, task = Device(job.task, job.device_index), job.task.at()
    with device:
        binary = device.target.compile(kernel, job.task, constants, device.facts)
        launcher = device.load(binary, kernel, job.task, constants)
        made = Candidate(kernel, binary, constants, launcher, device.facts, job.task)
        data = make_sets(task, made.workspaces(task), device.facts)[0]
        arguments = (*data.tensors, *(hint for _, hint in job.task.symbols))
        launcher(*arguments)
        torch.cuda.synchronize()
        torch.cuda.profiler.start()
        launcher(*arguments)
        torch.cuda.synchronize()
        torch.cuda.profiler.stop()
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
