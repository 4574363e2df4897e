"""What the backend costs where it gains nothing: compile time with nothing to swap, and the host's time for a swapped region.

python benchmarks/overhead.py [--quick] [--out FILE]
"""

from __future__ import annotations

import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from torch import nn

from torch_llmkernels import settings
from torch_llmkernels.evaluation import ErrorStat, Evaluation, Record, Status
from torch_llmkernels.graph.op import bind, encode_spec, region_op
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.task import Node, Numerics, Task, TensorSpec

SIZE = 256
BODY = "if (i < n) y[i] = a[i] + b[i];"
HEADER = """/*---
implements = "add"
target = "{target}"
dtypes = ["float32"]
dims = {{ n = "y.numel" }}
align = 1
[[launch]]
kernel = "add"
args = ["a", "b", "y", "n"]
{launch}---*/
"""
SOURCES = {
    "cpu": HEADER.format(target="cpu", launch="")
    + 'extern "C" void add(const T* a, const T* b, T* y, int64_t n) { for (int64_t i = 0; i < n; ++i) y[i] = a[i] + b[i]; }\n',
    "cuda": HEADER.format(target="cuda", launch='grid = ["ceil_div(n, 256)"]\nblock = ["256"]\n')
    + 'extern "C" __global__ void add(const T* a, const T* b, T* y, int n) '
    + f"{{ int i = blockIdx.x * blockDim.x + threadIdx.x; {BODY} }}\n",
}


class Encoder(nn.Module):
    """Two transformer layers of ordinary operators: enough regions for a fair share of work."""

    def __init__(self, width: int = 64) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))
            for _ in range(2)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = x + layer(x)
        return torch.softmax(x, -1)


def compile_seconds(backend: str, device: str, repeats: int) -> list[float]:
    """Seconds of the first call, with torch's caches empty each time."""
    from torch._inductor.utils import fresh_cache

    seconds = []
    for _ in range(repeats):
        torch._dynamo.reset()
        torch.manual_seed(0)
        model, x = Encoder().to(device), torch.randn(8, 64, device=device)
        with fresh_cache(), torch.no_grad():
            begin = time.perf_counter()
            torch.compile(model, backend=backend)(x)
            seconds.append(time.perf_counter() - begin)
    return seconds


def compile_rows(device: str, repeats: int) -> list[dict[str, Any]]:
    """Inductor against the backend with an empty library, in turns: nothing is swapped, so the difference is ours alone."""
    seconds: dict[str, list[float]] = {"inductor": [], "llmkernels": []}
    compile_seconds("inductor", device, 1)  # imports and warms whatever a process does once
    with tempfile.TemporaryDirectory() as empty, settings.override(library_dir=empty, cache_dir=f"{empty}/store"):
        compile_seconds("llmkernels", device, 1)
        for _ in range(repeats):
            for backend, found in seconds.items():
                found += compile_seconds(backend, device, 1)
    return [
        {"what": f"compile, {name}", "unit": "s", "median": statistics.median(s), "samples": s} for name, s in seconds.items()
    ]


def add_record(device: str) -> Record:
    """A record of `y = a + b` whose evidence is made up: it is only called, never decided upon."""
    specs = [TensorSpec(name, "float32", (SIZE,), (1,)) for name in ("a", "b", "y")]
    program = (Node("n0", "aten.add.Tensor", ({"v": "a"}, {"v": "b"}, 1)),)
    task = Task("add", program, tuple(specs[:2]), tuple(specs[2:]), ("n0",), (), Numerics(), device)
    correct = Evaluation(Status.CORRECT, errors=(ErrorStat("y", "normal", 0, 0, 0, 0, 0, 0, True),))
    return Record(task, "add", SOURCES[device], (), target_for(device).facts().kind, correct, "benchmark")


def call_rows(device: str, calls: int) -> list[dict[str, Any]]:
    """Microseconds on the host for one call: eager, the slot as generated code calls it, the operator by the dispatcher."""
    spec = encode_spec(add_record(device))
    slot, op = bind(spec), region_op()
    a, b, y = (torch.randn(SIZE, device=device) for _ in range(3))
    subjects: dict[str, Callable[[], Any]] = {
        "an empty Python call": lambda: None,
        "eager a.add_(b)": lambda: a.add_(b),
        "torch.add(a, b, out=y)": lambda: torch.add(a, b, out=y),
        "swapped region in generated code": lambda: slot(y, a, b),
        "llmk::region through the dispatcher": lambda: op(spec, [a, b], []),
    }
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(11):
        for name, subject in subjects.items():
            samples[name].append(host_us(subject, device, calls))
    if slot.reason:
        raise SystemExit(f"the region ran its reference, so there is nothing to measure: {slot.reason}")
    return [{"what": name, "unit": "us", "median": statistics.median(s[1:]), "samples": s[1:]} for name, s in samples.items()]


def host_us(subject: Callable[[], Any], device: str, calls: int) -> float:
    """Microseconds per call until it returns; the device's queue is empty at the start and short enough not to fill."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        subject()
    return (time.perf_counter() - begin) / calls * 1e6


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = common.arguments(__doc__, "overhead")
    parser.add_argument("--skip-compile", action="store_true", help="measure calls only")
    args = parser.parse_args(argv)
    results = common.Results("overhead", args, key=("what",))
    for row in call_rows(args.device, 100 if args.quick else 500):
        results.add(row)
    for row in [] if args.skip_compile else compile_rows(args.device, 1 if args.quick else 5):
        results.add(row)
    rows = [[row["what"], row["unit"], row["median"], min(row["samples"]), max(row["samples"])] for row in results.rows]
    common.print_table(f"Overhead on {results.header['device']}", ["what", "unit", "median", "least", "most"], rows)
    common.console.print(f"written to {results.path}")


if __name__ == "__main__":
    main()
