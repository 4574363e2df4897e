"""What the backend costs: compile time beside Inductor, with nothing to swap and with swaps; the host's time for a swapped call.

python benchmarks/overhead.py [--quick] [--out FILE]
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import common
import torch
from torch import nn
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache

from torch_llmkernels import registry, settings
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


@dataclasses.dataclass(frozen=True)
class Contender:
    """A way to compile.

    Attributes:
        name: Its row.
        backend: As in `torch.compile`.
        knobs: Ours.
    """

    name: str
    backend: str
    knobs: Mapping[str, Any]


def compile_seconds(contender: Contender, device: str, cold: bool) -> tuple[float, float]:
    """(wall, processor) seconds of the first call, children included; `cold`: with torch's caches empty."""
    torch._dynamo.reset()
    torch.manual_seed(0)
    model, x = Encoder().to(device), torch.randn(8, 64, device=device)
    with fresh_cache() if cold else contextlib.nullcontext(), torch.no_grad(), settings.override(**contender.knobs):
        before, begin = processor_seconds(), time.perf_counter()
        torch.compile(model, backend=contender.backend)(x)
        return time.perf_counter() - begin, processor_seconds() - before


def processor_seconds() -> float:
    """Of this process and its children, so far."""
    used = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return sum(u.ru_utime + u.ru_stime for u in used)


def compile_rows(device: str, repeats: int) -> list[dict[str, Any]]:
    """Inductor against the backend, in turns: with an empty library, and with every correct kernel swapped in, verified before.

    Once with torch's caches empty, once with them full. All compilation is in this process and its children, so that processor
    seconds, which other work on the machine disturbs least, can be counted.
    """
    rows = []
    with tempfile.TemporaryDirectory() as folder, inductor_config.patch(compile_threads=1):
        os.mkdir(f"{folder}/empty")
        contenders = [
            Contender("Inductor", "inductor", {}),
            Contender("nothing swapped", "llmkernels", {"library_dir": f"{folder}/empty", "cache_dir": f"{folder}/a"}),
            Contender("swapped", "llmkernels", {"swap": "correct", "cache_dir": f"{folder}/b"}),
        ]
        for cold in (True, False):
            with contextlib.nullcontext() if cold else fresh_cache():
                for contender in contenders:  # imports, and whatever a process does once; verification
                    mark = len(registry.report())
                    compile_seconds(contender, device, cold)
                found: dict[str, list[tuple[float, float]]] = {contender.name: [] for contender in contenders}
                for _ in range(repeats):
                    for contender in contenders:
                        found[contender.name].append(compile_seconds(contender, device, cold))
            swaps = len(registry.report()[mark].swapped)
            if not swaps:
                raise SystemExit(f"nothing was swapped, so there is nothing to measure:\n{registry.report()}")
            rows += compile_table(found, "cold" if cold else "from torch's caches", swaps)
    return rows


def compile_table(found: Mapping[str, Sequence[tuple[float, float]]], caches: str, swaps: int) -> list[dict[str, Any]]:
    """Seconds of each contender, and the median of its ratios to Inductor's, call by call."""
    rows = []
    base = [processor for _, processor in found["Inductor"]]
    for name, seconds in found.items():
        wall, processor = [w for w, _ in seconds], [p for _, p in seconds]
        what = f"compile {caches}: {name}" + (f" ({swaps} regions)" if name == "swapped" else "")
        ratio = statistics.median(p / b for p, b in zip(processor, base, strict=True))
        rows.append({"what": what, "unit": "processor s", "median": statistics.median(processor), "samples": processor,
                     "wall_s": wall, "ratio": ratio})  # fmt: skip
    return rows


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
    rows = [
        [row["what"], row["unit"], row["median"], min(row["samples"]), max(row["samples"]), row.get("ratio")]
        for row in results.rows
    ]
    columns = ["what", "unit", "median", "least", "most", "of Inductor's"]
    common.print_table(f"Overhead on {results.header['device']}", columns, rows)
    common.console.print(f"written to {results.path}")


if __name__ == "__main__":
    main()
