"""Winners under compute-sanitizer: memory, races, uninitialised reads and barriers, at reduced sizes.

The kernel runs in a child process without torch's caching allocator, so that every tensor is an allocation of its own and the
first byte past it is out of bounds. Run as a module it is that child: `python -m torch_llmkernels.evaluate.sanitize JOB.json`.
"""

from __future__ import annotations

import dataclasses
import glob
import json
import os
import shutil
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from torch_llmkernels.errors import ExpressionError, NotApplicable
from torch_llmkernels.evaluate.buffers import assign, empty
from torch_llmkernels.evaluate.cut import STUCK_BYTES, cut
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.kernels import launch
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.task import Task

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TIMEOUT_S = 120
"""Most of a run is the start of torch and CUDA under the tool; the sizes are cut so that the kernel adds seconds."""
FAULT_EXIT, NOT_APPLICABLE_EXIT = 99, 98


@dataclasses.dataclass(frozen=True)
class Report:
    """What the tools said.

    Attributes:
        summary: One line: the tools that passed, or why none ran.
        failure: The head of the first complaint, or None.
    """

    summary: str
    failure: str | None = None


def find_sanitizer() -> str | None:
    """Path of compute-sanitizer: on PATH, or in a CUDA toolkit under /usr/local; None if there is none."""
    found = shutil.which("compute-sanitizer")
    places = sorted(glob.glob("/usr/local/cuda*/bin/compute-sanitizer"), reverse=True)
    return found or next((p for p in places if os.access(p, os.X_OK)), None)


def sanitize(job: Job) -> Report:
    """Run a CUDA job's kernel under every tool; `job.constants` are the ones to use."""
    tool_path = find_sanitizer()
    if tool_path is None:
        return Report("skipped: no compute-sanitizer on PATH or under /usr/local/cuda*")
    small = reduced(job, target_for("cuda").facts(job.device_index))
    if small is None:
        return Report(f"skipped: no cut of the sizes to {STUCK_BYTES} bytes is one that the kernel serves")
    with tempfile.TemporaryDirectory(prefix="llmk-") as directory:
        path = Path(directory, "job.json")
        path.write_text(json.dumps(small.to_json()))
        with ThreadPoolExecutor(len(TOOLS)) as pool:
            reports = list(pool.map(lambda tool: _run_tool(tool_path, tool, path), TOOLS))
    found = [r for r in reports if r is not None]
    if found:
        return next((r for r in found if r.failure), found[0])
    return Report(f"passed {', '.join(TOOLS)} at {_shapes(small.task)}")


def _run_tool(tool_path: str, tool: str, job: Path) -> Report | None:
    """None if the tool has no complaint."""
    options = ["--tool", tool, "--error-exitcode", str(FAULT_EXIT)]
    # the CUDA bindings probe for entry points that older drivers lack: errors of the API are not the kernel's
    options += ["--report-api-errors", "no"] if tool == "memcheck" else []
    # torch's own kernels are not on trial, but initcheck has to see what they write
    options += ["--kernel-regex-exclude", "kns=at::"] if tool != "initcheck" else []
    command = [tool_path, *options, sys.executable, "-m", "torch_llmkernels.evaluate.sanitize", str(job)]
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    try:
        done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=TIMEOUT_S, env=environment)
    except subprocess.TimeoutExpired:
        return Report(f"skipped: {tool} took longer than {TIMEOUT_S} s")
    if done.returncode == NOT_APPLICABLE_EXIT:
        return Report("skipped: the kernel does not serve the reduced task")
    complaints = [line for line in done.stdout.splitlines() if line.startswith("=========")]
    if done.returncode == FAULT_EXIT:
        return Report(f"failed {tool}", f"compute-sanitizer {tool}:\n" + "\n".join(complaints[:20]))
    if done.returncode:
        return Report(f"skipped: {tool} exited with {done.returncode}: {(done.stderr or done.stdout).strip()[-300:]}")
    return None


def reduced(job: Job, facts: DeviceFacts) -> Job | None:
    """The job at sizes for the tools (see `cut`), with its own constants if they serve those; None if it cannot be cut."""
    kernel, own = parse_kernel(job.kernel_text, job.kernel_name), dict(job.constants or {})

    def admits(task: Task) -> bool:
        if kernel.why_not(task):
            return False
        try:
            launch.check_where(kernel, launch.environment(kernel, task, own, facts))
        except (NotApplicable, ExpressionError):
            return False
        return True

    smaller = cut(job.task.at(), admits)
    if smaller is not None:
        return dataclasses.replace(job, task=smaller)
    smaller = cut(job.task.at(), lambda task: kernel.why_not(task) is None and bool(kernel.tunings(task, facts)))
    return smaller and dataclasses.replace(job, task=smaller, constants=kernel.tunings(smaller, facts)[0])


def _shapes(task: Task) -> str:
    return ", ".join(f"{t.name} {'x'.join(map(str, t.shape))}" for t in task.inputs)


def _child(path: str) -> int:
    """Run the job's kernel once on tight allocations; the tool around this process does the looking."""
    import torch

    from torch_llmkernels.evaluate.inputs import InputGenerator

    job = Job.from_json(json.loads(Path(path).read_text()))
    task, constants = job.task, dict(job.constants or {})
    kernel, target = parse_kernel(job.kernel_text, job.kernel_name), target_for(job.task.device)
    facts = target.facts(job.device_index)
    torch.cuda.set_device(job.device_index)
    try:
        launcher = target.load(target.compile(kernel, task, constants, facts), kernel, task, constants, facts, job.device_index)
        scratch = [torch.empty(w.shape, dtype=getattr(torch, w.dtype), device="cuda")
                   for w in launch.workspaces(kernel, task, constants, facts)]  # fmt: skip
    except NotApplicable:
        return NOT_APPLICABLE_EXIT
    inputs = [empty(t, "cuda") for t in task.inputs]
    for tensor, values in zip(inputs, InputGenerator(task).make("normal", job.seed), strict=True):
        assign(tensor, values)
    outputs = [empty(t, "cuda") for t in task.outputs]
    try:
        launcher(*outputs, *scratch, *inputs)
    except NotApplicable:
        return NOT_APPLICABLE_EXIT
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
