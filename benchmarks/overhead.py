"""What the backend costs: compile time beside Inductor, with nothing to swap and with swaps; the host's time for a swapped call.

On CUDA also what a swapped call costs in a replayed CUDA graph, and a shipped kernel with several launches, workspaces and
tensor maps: the float32 linear.

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
from torch_llmkernels.cache.library import default_library
from torch_llmkernels.capture import capture
from torch_llmkernels.errors import NotApplicable
from torch_llmkernels.evaluation import ErrorStat, Evaluation, Record, Status
from torch_llmkernels.graph.op import Slot, bind, decode_spec, encode_spec, region_op, scratch_bytes, workspace_layouts
from torch_llmkernels.kernels.device import DeviceFacts
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.task import Node, Numerics, Task, TensorSpec

SIZE = 256
GRAPH_CALLS = 20
"""Calls in one captured CUDA graph."""
ROWS, WIDTH, LAYERS = 128, 768, 36
"""The linear: `[ROWS, WIDTH] @ [WIDTH, WIDTH] + [WIDTH]`, alone and as `LAYERS` of them behind one another."""
SLEEP_CYCLES = 4_000_000
"""About 2 ms, for which the device waits while the host enqueues what is to be timed on the device."""
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


def made_up(task: Task, kernel_name: str, kernel_text: str, constants: Mapping[str, int], device_kind: str) -> Record:
    """A record whose evidence is made up: it is only called, never decided upon."""
    correct = Evaluation(Status.CORRECT, errors=(ErrorStat("y", "normal", 0, 0, 0, 0, 0, 0, True),))
    return Record(task, kernel_name, kernel_text, tuple(sorted(constants.items())), device_kind, correct, "benchmark")


def add_record(device: str) -> Record:
    """A record of `y = a + b`."""
    specs = [TensorSpec(name, "float32", (SIZE,), (1,)) for name in ("a", "b", "y")]
    program = (Node("n0", "aten.add.Tensor", ({"v": "a"}, {"v": "b"}, 1)),)
    task = Task("add", program, tuple(specs[:2]), tuple(specs[2:]), ("n0",), (), Numerics(), device)
    return made_up(task, "add", SOURCES[device], {}, target_for(device).facts().kind)


def sampled(subjects: Mapping[str, Callable[[], Any]], sample: Callable[[Callable[[], Any]], float]) -> list[dict[str, Any]]:
    """A row per subject of ten samples in microseconds, taken in turns; one more before them warms up."""
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for _ in range(11):
        for name, subject in subjects.items():
            samples[name].append(sample(subject))
    return [{"what": name, "unit": "us", "median": statistics.median(s[1:]), "samples": s[1:]} for name, s in samples.items()]


def check_ran(slot: Slot) -> None:
    """End the benchmark if what was called is the region's reference and not its kernel."""
    if slot.reason:
        raise SystemExit(f"the region ran its reference, so there is nothing to measure: {slot.reason}")


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
    rows = sampled(subjects, lambda subject: host_us(subject, device, calls))
    check_ran(slot)
    return rows


def graph_rows(device: str, calls: int) -> list[dict[str, Any]]:
    """Microseconds per call of CUDA graphs that hold nothing but calls: the host's for a replay to return, the device's to run.

    A replay runs neither Python nor the dispatcher, so the swapped kernel should be worth as much as eager's in both.
    """
    slot = bind(encode_spec(add_record(device)))
    a, b, y = (torch.randn(SIZE, device=device) for _ in range(3))
    subjects: dict[str, Callable[[], Any]] = {
        "torch.add(a, b, out=y)": lambda: torch.add(a, b, out=y),
        "swapped region": lambda: slot(y, a, b),
    }
    graphs = {f"in a CUDA graph of {GRAPH_CALLS}, {name}": captured(subject) for name, subject in subjects.items()}
    check_ran(slot)
    replays = max(1, calls // GRAPH_CALLS)  # as many launches in the queue as one sample of the other rows leaves there
    rows = sampled(
        {f"{name}: host": graph.replay for name, graph in graphs.items()},
        lambda replay: host_us(replay, device, replays) / GRAPH_CALLS,
    )
    return rows + sampled(
        {f"{name}: device": graph.replay for name, graph in graphs.items()},
        lambda replay: device_us(replay, replays) / GRAPH_CALLS,
    )


def captured(subject: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """A CUDA graph of `GRAPH_CALLS` calls."""
    subject()  # whatever a first call builds or loads cannot be captured
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(GRAPH_CALLS):
            subject()
    return graph


def device_us(replay: Callable[[], Any], replays: int) -> float:
    """Microseconds on the device for one replay; it sleeps until all are enqueued, so that the host's time is no part of it."""
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    torch.cuda._sleep(SLEEP_CYCLES)
    begin.record()
    for _ in range(replays):
        replay()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) * 1e3 / replays


def linear_task(device: str) -> Task:
    """The task of `nn.Linear` on `ROWS` rows, as a compilation would look it up."""
    (region,) = capture(nn.Linear(WIDTH, WIDTH, device=device), [torch.randn(ROWS, WIDTH, device=device)])
    return region.task


def shipped_record(task: Task, facts: DeviceFacts) -> Record:
    """A record of the library's first kernel for `task`: the one that a compilation without evidence would verify first.

    Raises:
        NotApplicable: if it has none that takes the task on this device, with the reason of each.
    """
    reasons = []
    for kernel in default_library(settings.current()).kernels(task.signature, task.device):
        reason = kernel.why_not(task)
        tunings = [] if reason else kernel.tunings(task, facts)
        if tunings:
            return made_up(task, kernel.name, kernel.text, tunings[0], facts.kind)
        reasons.append(f"{kernel.name}: {reason or f'its conditions exclude {facts.arch}'}")
    raise NotApplicable("; ".join(reasons) or f"the library has no kernel of {task.signature} for {task.device}")


def generated(region: Callable[..., None], spec: str, device: str, layers: int) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """What Inductor's wrapper holds of `layers` swapped regions, the first input of each the output of the one before.

    Its allocator calls and views are Inductor's own; outputs and workspaces are taken again as soon as nobody reads them, as
    there. What the wrapper does once per graph (checks of its arguments, the choice of the device) is no part of it.

    Args:
        region: The slot, or what it runs.
        spec: What the slot is bound from; its task has one output, of the first input's shape, and no symbols.
        device: Where the tensors are.
        layers: How many regions.

    Returns:
        A function of the first input and every layer's other inputs, all contiguous, the layers' in order.
    """
    decoded = decode_spec(spec)
    task, workspaces = decoded.task, workspace_layouts(decoded, torch.device(device))
    (y,), (_, *others) = task.outputs, task.inputs
    lines = []
    for i, layout in enumerate(workspaces):
        stride = torch._prims_common.make_contiguous_strides_for(layout.shape)
        lines.append(f"scratch{i} = empty_strided({layout.shape}, {tuple(stride)}, torch.{layout.dtype})")
    scratch = [f"scratch{i}" for i in range(len(workspaces))]
    names, before = ["x"], "x"
    for layer in range(layers):
        made = f"empty_strided({y.shape}, {y.stride}, torch.{y.dtype})"
        lines.append(f"y{layer} = {made if layer < 2 else f'y{layer - 2}'}")
        given = []
        for spec_of in others:
            names.append(f"{spec_of.name}{layer}")
            view = f"reinterpret_tensor({names[-1]}, {spec_of.shape}, {spec_of.stride}, 0)"
            given.append(names[-1] if spec_of.is_contiguous else view)
        lines.append(f"region({', '.join([f'y{layer}', *scratch, before, *given])})")
        before = f"y{layer}"
    source = "\n    ".join(["def call(args):", f"{', '.join(names)}, = args", *lines, f"return {before}"])
    guards = torch._C._dynamo.guards  # where generated code has these from
    scope: dict[str, Any] = {
        "torch": torch, "region": region, "reinterpret_tensor": guards._reinterpret_tensor,
        "empty_strided": getattr(guards, f"_empty_strided_{device}"),
    }  # fmt: skip
    exec(source, scope)
    return scope["call"]


def linear_rows(record: Record, device: str, calls: int) -> list[dict[str, Any]]:
    """Microseconds on the host for one linear, eager and swapped: with one weight, and with those of `LAYERS` layers in turns.

    Unlike `y = a + b` it allocates an output and workspaces, launches several times, and passes tensor maps that the launcher
    keeps by address. Distinct weights make it write the addresses anew at every call.

    Raises:
        NotApplicable: if the kernel cannot be built here, or refuses these tensors.
    """
    spec = encode_spec(record)
    slot = bind(spec, scratch_bytes(workspace_layouts(decode_spec(spec), torch.device(device))))
    x = torch.randn(ROWS, WIDTH, device=device)
    layers = [(torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5, torch.randn(WIDTH, device=device)) for _ in range(LAYERS)]
    # what the slot runs, and not the slot: that would run its reference where the kernel refuses
    found = generated(slot.fn, spec, device, 1)([x, *layers[0]])
    if slot.reason:
        raise NotApplicable(slot.reason)
    weight, bias = (parameter.double() for parameter in layers[0])
    if (off := common.error([found], [nn.functional.linear(x.double(), weight, bias)])) > 1e-5:
        raise SystemExit(f"{record.kernel_name} is wrong, so there is nothing to measure: relative error {off:.1e}")

    def eager(held: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> torch.Tensor:
        y = x
        for weight, bias in held:
            y = nn.functional.linear(y, weight, bias)
        return y

    rows = []
    for count in (1, LAYERS):
        arguments = [x, *(tensor for layer in layers[:count] for tensor in layer)]
        swapped, where = generated(slot, spec, device, count), f", {count} weights in turns" if count > 1 else ""
        subjects = {
            f"eager linear{where}": lambda count=count: eager(layers[:count]),
            f"swapped linear in generated code{where}": lambda swapped=swapped, arguments=arguments: swapped(arguments),
        }
        # each call launches several times, and a full queue would make the host wait
        runs = max(1, calls // 5 // count)
        measured = sampled(subjects, lambda subject, runs=runs, count=count: host_us(subject, device, runs) / count)
        rows += [{**row, "kernel": record.kernel_name, "shape": [ROWS, WIDTH, WIDTH]} for row in measured]
    return rows


def host_us(subject: Callable[[], Any], device: str, calls: int) -> float:
    """Microseconds per call until it returns; the device's queue is empty at the start and short enough not to fill."""
    if device == "cuda":
        torch.cuda.synchronize()
    begin = time.perf_counter()
    for _ in range(calls):
        subject()
    return (time.perf_counter() - begin) / calls * 1e6


def cuda_rows(calls: int) -> list[dict[str, Any]]:
    """The rows that only a CUDA device has."""
    rows = graph_rows("cuda", calls)
    try:
        record = shipped_record(linear_task("cuda"), target_for("cuda").facts())
        return rows + linear_rows(record, "cuda", calls)
    except NotApplicable as reason:
        common.console.print(f"the float32 linear is skipped, no shipped kernel runs it on this device: {reason}", markup=False)
        return rows


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = common.arguments(__doc__, "overhead")
    parser.add_argument("--skip-compile", action="store_true", help="measure calls only")
    args = parser.parse_args(argv)
    results = common.Results("overhead", args, key=("what",))
    calls = 100 if args.quick else 500
    for row in [*call_rows(args.device, calls), *(cuda_rows(calls) if args.device == "cuda" else [])]:
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
