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

from torch_llmkernels.errors import NotApplicable
from torch_llmkernels.evaluate.buffers import assign, dtype_of, empty, span_bytes
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.task import Dim, Task, TensorSpec

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
TIMEOUT_S = 300
LARGE_BYTES = 8 << 20
"""Tasks that move more run with fewer samples: the tools slow a kernel down by up to a thousand times."""
FEW_SAMPLES = 2
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
    task = reduced(job.task.at())
    if task is None:
        return Report(f"skipped: the task moves more than {LARGE_BYTES} bytes and its first dimension cannot be cut")
    with tempfile.TemporaryDirectory(prefix="llmk-") as directory:
        path = Path(directory, "job.json")
        path.write_text(json.dumps(dataclasses.replace(job, task=task).to_json()))
        with ThreadPoolExecutor(len(TOOLS)) as pool:
            reports = list(pool.map(lambda tool: _run_tool(tool_path, tool, path), TOOLS))
    found = [r for r in reports if r is not None]
    if found:
        return next((r for r in found if r.failure), found[0])
    return Report(f"passed {', '.join(TOOLS)}")


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


def reduced(task: Task) -> Task | None:
    """The static task itself if it is small; else one with `FEW_SAMPLES` of the first input's first dimension; None if that
    dimension is fixed by the program."""
    if sum(span_bytes(t, dtype_of(t).itemsize) for t in (*task.inputs, *task.outputs)) <= LARGE_BYTES or not task.inputs[0].shape:
        return task
    # a weight may happen to be as long as the batch: matrices first, then vectors too
    for fewest_dims in (2, 1):
        inputs = tuple(_cut(t, task.inputs[0].shape[0], fewest_dims) for t in task.inputs)
        outputs = tuple(_cut(t, task.inputs[0].shape[0], fewest_dims) for t in task.outputs)
        smaller = dataclasses.replace(task, inputs=inputs, outputs=outputs)
        if _shapes_hold(smaller):
            return smaller
    return None


def _cut(spec: TensorSpec, batch: Dim, fewest_dims: int) -> TensorSpec:
    """The spec with fewer samples, if its first dimension is the batch and the outermost in memory."""
    outermost = spec.shape and spec.shape[0] == batch and spec.stride[0] == max(int(s) for s in spec.stride)
    if len(spec.shape) < fewest_dims or not outermost:
        return spec
    return dataclasses.replace(spec, shape=(FEW_SAMPLES, *spec.shape[1:]))


def _shapes_hold(task: Task) -> bool:
    """Whether the program gives outputs of the specs' shapes, and those are small."""
    import torch

    from torch_llmkernels.program import module_of

    inputs = [torch.empty([int(d) for d in t.shape], dtype=dtype_of(t), device="meta") for t in task.inputs]
    try:
        outputs = module_of(task)(*inputs)
    except (RuntimeError, NotImplementedError):
        return False
    small = sum(span_bytes(t, dtype_of(t).itemsize) for t in (*task.inputs, *task.outputs)) <= 8 * LARGE_BYTES
    return small and all(tuple(o.shape) == t.shape for o, t in zip(outputs, task.outputs, strict=True))


def _child(path: str) -> int:
    """Run the job's kernel once on tight allocations; the tool around this process does the looking."""
    import torch

    from torch_llmkernels.evaluate.inputs import InputGenerator
    from torch_llmkernels.kernels import launch
    from torch_llmkernels.kernels.source import parse_kernel
    from torch_llmkernels.kernels.targets import target_for

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
    launcher(*outputs, *scratch, *inputs)
    torch.cuda.synchronize()
    return 0


if __name__ == "__main__":
    sys.exit(_child(sys.argv[1]))
