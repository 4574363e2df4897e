"""Models end to end: eager, Inductor, reduce-overhead, max-autotune, and llmkernels in the same modes.

The columns are those of PyTorch's own dynamo benchmarks: speedup over eager, abs_latency (ms), compilation_latency (s), peak
memory, accuracy; and the paired ratio of Inductor to llmkernels in the same mode, which is what a user gains by switching.
Compilation is measured cold. The verification of kernels that this device has not seen is part of the compilation latency of our
first mode, as it is of a user's first compilation, and is named beside it; the store keeps its outcome for the models after it.

    python benchmarks/models.py [--models a,b] [--dtypes fp32,half] [--modes default,reduce-overhead,max-autotune] [--batches 1,8]
                                [--phases infer,train] [--budget-s N] [--small] [--precompile] [--store DIR] [--resume]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import common
import torch
from model_zoo import LARGE, ModelCase, enliven, small
from torch import nn

from torch_llmkernels import online, registry, settings
from torch_llmkernels.backend import resolve
from torch_llmkernels.capture import Call, capture_graphs
from torch_llmkernels.precompilation.run import precompile
from torch_llmkernels.precompilation.whole_graph import Paired, loss_of, samples_ms, step_of

MODES: dict[str, dict[str, Any]] = {
    "eager": {},
    "inductor": {"backend": "inductor"},
    "ours": {"backend": "llmkernels"},
    "inductor reduce-overhead": {"backend": "inductor", "mode": "reduce-overhead"},
    "ours reduce-overhead": {"backend": "llmkernels", "mode": "reduce-overhead"},
    "inductor max-autotune": {"backend": "inductor", "mode": "max-autotune"},
    "ours max-autotune": {"backend": "llmkernels", "mode": "max-autotune"},
}
ROW = ("model", "batch", "precision", "phase")
"""The fields that name a row."""
WHOLE_MODEL_ERROR = 2.0
"""A model is accurate if its error is at most this multiple of eager's: rounding that differs in early layers is amplified."""
MEANINGLESS_ERROR = 0.25
"""Where eager's own error is larger, or its outputs are all zero, comparing with it says nothing: such a row fails."""


@dataclasses.dataclass(frozen=True)
class Setting:
    """One row: a model at a batch size and a precision, for inference or a training step."""

    case: ModelCase
    batch: int
    precision: str
    training: bool

    @property
    def name(self) -> dict[str, Any]:
        """The fields that name the row."""
        return {
            "model": self.case.name,
            "batch": self.batch,
            "precision": self.precision,
            "phase": "train" if self.training else "infer",
        }

    @property
    def dtype(self) -> torch.dtype:
        """Of the weights and of floating inputs."""
        return torch.float32 if self.precision == "fp32" else self.case.half

    def make(self, device: str) -> tuple[nn.Module, tuple[torch.Tensor, ...]]:
        """The module and its inputs."""
        torch.manual_seed(0)
        dtype = self.dtype
        module = enliven(self.case.make(), self.case.inputs(4)).to(device, dtype).train(self.training)
        inputs = tuple(t.to(device, dtype if t.is_floating_point() else t.dtype) for t in self.case.inputs(self.batch))
        if self.case.images and self.precision != "fp32":
            module = module.to(memory_format=torch.channels_last)
            inputs = tuple(t.to(memory_format=torch.channels_last) if t.ndim == 4 else t for t in inputs)
        return module, inputs


def plan(cases: Sequence[ModelCase], precisions: Sequence[str], batches: Sequence[int] = ()) -> Iterator[Setting]:
    """Every row: inference at both batch sizes of the model, or at `batches`; then the training step at the last of them."""
    for case in cases:
        sizes = batches or case.batches
        for precision in precisions:
            for batch in sizes:
                yield Setting(case, batch, precision, training=False)
            if case.training:
                yield Setting(case, sizes[-1], precision, training=True)


def measure(setting: Setting, modes: Sequence[str], args: argparse.Namespace, results: common.Results) -> dict[str, Any]:
    """One row; a mode that the budget does not reach is an entry that says so."""
    row: dict[str, Any] = {**setting.name, "family": setting.case.family, "modes": {}}
    module, inputs = setting.make(args.device)
    torch._dynamo.reset()
    call = Call(inputs)
    with common.tf32(args.tf32):
        row["verify_s"] = verify_all(module, call, setting.training, modes, args, results)
    limit = torch._dynamo.config.patch(recompile_limit=64)
    with common.tf32(args.tf32), torch.set_grad_enabled(setting.training), limit:
        reference = wide_results(module, inputs, setting.training)
        steps: dict[str, Callable[[], Any]] = {}
        for mode in modes:
            row["modes"][mode] = entry = {}
            try:
                if results.left_s <= 0:
                    raise TimeoutError("the budget (--budget-s) was spent before it")
                steps[mode] = ready(entry, mode, module, call, setting.training, reference, args.device)
            except Exception as problem:  # a mode that fails is an entry of the row
                entry["failed"] = common.one_line(problem)
        add_verification(row)
        samples = samples_ms(steps, args.device, rounds=7 if args.quick else 25, max_s=10.0 if args.quick else 30.0)
        del reference
    return row | judged(row, samples, setting.dtype)


def verify_all(
    module: nn.Module, call: Call, training: bool, modes: Sequence[str], args: argparse.Namespace, results: common.Results
) -> dict[str, float]:
    """Decide every region before anything is compiled (a capture resets Dynamo); the seconds, by the mode whose user would pay.

    What a region's kernel does alone is verified once. With `--precompile` the whole graph is measured in each of our modes.
    """
    found = {}
    ours = [mode for mode in modes if mode.startswith("ours")]
    for mode in ours if args.precompile else ours[:1]:
        begin, budget_s = time.perf_counter(), max(min(args.verify_s, results.left_s), 0.0)
        if args.precompile:
            how = MODES[mode].get("mode")
            precompile(module, call.args, training=training, mode=how, budget=budget_s, progress=False)
        else:
            graphs = capture_graphs(module, [call], training=training)
            tasks = [task for graph in graphs for task in graph.tasks]
            resolve(tasks, settings.current().updated({"verify_budget_s": budget_s}))
        found[mode] = time.perf_counter() - begin
    return found


def add_verification(row: dict[str, Any]) -> None:
    """Count the verification as part of the compilation latency of the mode whose first user's call would pay it."""
    for mode, seconds in row["verify_s"].items():
        entry = row["modes"][mode]
        if "compilation_latency" in entry:
            entry["compilation_latency"] += seconds


def ready(
    entry: dict[str, Any], mode: str, module: nn.Module, call: Call, training: bool, reference: list[torch.Tensor], device: str
) -> Callable[[], Any]:
    """Compile one mode cold, fill in its entry, and return its step."""
    from torch._inductor.utils import fresh_cache

    compiled = torch.compile(module, **MODES[mode]) if MODES[mode] else module
    mark, begin = len(registry.report()), time.perf_counter()
    with fresh_cache():
        found = results(compiled, module, call.args, training)
        entry["compilation_latency"] = time.perf_counter() - begin
    entry["error"] = common.error(found, reference)
    del found
    step = step_of(compiled, module, [call], training)
    for _ in range(online.MOST_CALLS):  # a graph may be decided by its first calls
        if not online.undecided():
            break
        step()
    entry["swapped"], entry["kept"] = common.swapped_since(mark), common.reasons_since(mark)
    entry["peak_memory"] = peak_memory(step, [*module.parameters(), *module.buffers(), *call.args], device)
    return step


def results(
    compiled: Callable[..., Any], module: nn.Module, inputs: Sequence[torch.Tensor], training: bool
) -> list[torch.Tensor]:
    """The outputs of one call, and with `training` every parameter's gradient; copies, since CUDA graphs reuse their outputs."""
    output = compiled(*inputs)
    found = [t.clone() for t in common.leaves(output)]
    if training:
        loss_of(output).backward()
        found += [p.grad.detach().clone() for p in module.parameters() if p.grad is not None]
        module.zero_grad(set_to_none=True)
    return found


def wide_results(module: nn.Module, inputs: Sequence[torch.Tensor], training: bool) -> list[torch.Tensor]:
    """The same in float64."""
    wide, wide_inputs = common.double(module, inputs)
    return results(wide, wide, wide_inputs, training)


def peak_memory(step: Callable[[], Any], held: Sequence[torch.Tensor], device: str) -> int | None:
    """Warm a step up; bytes at its peak: the model, its inputs, and whatever the step added. None on the CPU.

    What other contenders hold at the same time, such as the pools of their CUDA graphs, is not counted.
    """
    counting = device == "cuda"
    if counting:
        gc.collect()
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
    for _ in range(3):  # CUDA graphs: warm up, then record
        step()
    if not counting:
        return None
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before + sum(t.nbytes for t in held)


def judged(row: dict[str, Any], samples: dict[str, list[float]], dtype: torch.dtype) -> dict[str, Any]:
    """Latencies, speedups, accuracy, and what switching from Inductor gains in each mode."""
    for mode, times in samples.items():
        entry = row["modes"][mode]
        entry["abs_latency"] = statistics.median(times)
        if "eager" in samples:
            entry["speedup"] = statistics.median(samples["eager"]) / entry["abs_latency"]
            eager = row["modes"]["eager"]["error"]
            accurate = common.is_accurate(entry["error"], eager, dtype, WHOLE_MODEL_ERROR)
            entry["accurate"] = accurate and 0 < eager < MEANINGLESS_ERROR
    gains: dict[str, Any] = {}
    for mode in [m for m in samples if m.startswith("ours") and m.replace("ours", "inductor", 1) in samples]:
        paired = Paired.of(samples[mode.replace("ours", "inductor", 1)], samples[mode])
        gains[mode] = {"ratio": paired.ratio, "noise": paired.noise}
    swaps = max((len(entry.get("swapped", ())) for mode, entry in row["modes"].items() if mode.startswith("ours")), default=0)
    return {"gain": gains, "swaps": swaps}


def show(results: common.Results) -> None:
    """The table, the geometric mean over rows with swaps, and the worst of them."""
    rows, listed, modes = [], [], [m for m in MODES if any(m in r.get("modes", ()) for r in results.rows)]
    for row in results.rows:
        name = f"{row['model']} b{row['batch']} {row['precision']} {row['phase']}"
        if "skipped" in row:
            listed.append(f"skipped {name}: {row['skipped']}")
            continue
        entry = row["modes"]
        latencies = [entry.get(m, {}).get("abs_latency") for m in modes]
        ours = entry.get("ours", {})
        ratios = [f"{g['ratio']:.3f}±{g['noise']:.3f}" for g in row["gain"].values()] or ["-"]
        wrong = [m for m in entry if entry[m].get("accurate") is False]
        listed += [f"{name}, {m}: {entry[m]['failed']}" for m in entry if "failed" in entry[m]]
        memory = [entry.get(m, {}).get("peak_memory") for m in ("inductor", "ours")]
        seconds = [entry.get(m, {}).get("compilation_latency") for m in ("inductor", "ours")]
        rows.append([
            name, *latencies, ours.get("speedup"), " ".join(ratios), row["swaps"], *seconds, row["verify_s"].get("ours"),
            *(m / 2**20 if m else None for m in memory), "pass" if not wrong else f"FAIL {', '.join(wrong)}",
        ])  # fmt: skip
    columns = [
        "model",
        *(f"{m} ms" for m in modes),
        "speedup",
        "gain",
        "swaps",
        "compile s",
        "ours s",
        "of it verifying",
        "MiB",
        "ours MiB",
        "accuracy",
    ]
    common.print_table(f"Models on {results.header['device']}, commit {results.header['commit']}", columns, rows)
    found = summary(results.rows)
    for line in listed:
        common.console.print(line, markup=False)
    for mode, mean in found.items():
        gain, worst = common.cell(mean["geomean"]), f"{common.cell(mean['worst'])} ({mean['worst_model']})"
        swapped = f"geometric mean of the gain over Inductor {gain} over {mean['models']} rows with swaps"
        line = f"{mode}: {swapped}; worst {worst}; {mean['unswapped']} rows without a swap are left out"
        common.console.print(line, markup=False)
    results.finish(found)


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """For each of our modes: the geometric mean of the gain where something was swapped, and the worst row of all."""
    found = {}
    for mode in [m for m in MODES if m.startswith("ours")]:
        gains = [(r["gain"][mode]["ratio"], r) for r in rows if mode in r.get("gain", {})]
        if not gains:
            continue
        swapped = [gain for gain, row in gains if row["modes"][mode]["swapped"]]
        worst, row = min(gains, key=lambda pair: pair[0])
        found[mode] = {
            "geomean": common.geomean(swapped), "models": len(swapped), "unswapped": len(gains) - len(swapped), "worst": worst,
            "worst_model": f"{row['model']} b{row['batch']} {row['precision']} {row['phase']}",
        }  # fmt: skip
    return found


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = common.arguments(__doc__, "models")
    parser.add_argument("--models", help="names, comma separated (default: all)")
    parser.add_argument("--small", action="store_true", help="small versions, for the CPU target")
    parser.add_argument(
        "--dtypes", dest="precisions", default="fp32,half", help="fp32, half (fp16, or bf16 for some) or both (default: both)"
    )
    parser.add_argument("--batches", default="", help="batch sizes, comma separated, instead of each model's two")
    parser.add_argument("--phases", default="infer,train", help="infer, train or both (default: %(default)s)")
    parser.add_argument("--modes", default="default,reduce-overhead", help="which pairs, comma separated; also max-autotune")
    parser.add_argument(
        "--precompile", action="store_true", help="decide on the whole graph first, as `llmkernels precompile` does"
    )
    parser.add_argument("--verify-s", type=float, default=300.0, help="seconds for the verification of one row")
    args = parser.parse_args(argv)
    cases = small() if args.small else LARGE
    known = [case.name for case in cases]
    wanted = common.listed(args.models, known, "models") if args.models else known
    pairs = common.listed(args.modes, ("default", "reduce-overhead", "max-autotune"), "modes")
    modes = [m for m in MODES if m == "eager" or (m.partition(" ")[2] or "default") in pairs]
    phases = common.listed(args.phases, ("infer", "train"), "phases")
    precisions = common.listed(args.precisions, ("fp32", "half"), "dtypes")
    results = common.Results("models-small" if args.small else "models", args, key=ROW)
    batches = [int(batch) for batch in args.batches.split(",") if batch]
    with common.knobs(args):
        for setting in plan([case for case in cases if case.name in wanted], precisions, batches):
            if setting.name["phase"] in phases and results.wanted(**setting.name):
                results.measure(functools.partial(measure, setting, modes, args, results), **setting.name)
    show(results)


if __name__ == "__main__":
    main()
