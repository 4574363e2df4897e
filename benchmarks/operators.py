"""Operators: eager, Inductor, Inductor with max-autotune, and llmkernels, against the roofline floor and float64.

Every contender is the same module, called through `torch.compile` as a user calls it, in one process and in turns; CUDA samples
are graph replays over inputs that rotate out of a flushed L2 cache. float32 problems with products are measured twice: strict,
and with TF32 allowed.

With `--rows`: norms of rows of 256 to 262,144 columns, against the floor of reading and writing each once.

    python benchmarks/operators.py [--rows] [--problems a,b] [--quick] [--contenders eager,inductor,ours] [--out FILE] [--resume]
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import time
from collections.abc import Callable, Sequence
from typing import Any

import common
import torch
from problems import CPU, PROBLEMS, ROWS, SEED, WIDER, Problem
from torch import nn

from torch_llmkernels import registry
from torch_llmkernels.capture import capture
from torch_llmkernels.evaluate.roofline import floor, measure_ceilings
from torch_llmkernels.kernels.targets import target_for

CONTENDERS: dict[str, dict[str, Any]] = {
    "eager": {},
    "inductor": {"backend": "inductor"},
    "max_autotune": {"backend": "inductor", "mode": "max-autotune-no-cudagraphs"},
    "ours": {"backend": "llmkernels"},
}
PRODUCTS = ("matmul", "conv", "linear", "attention")


def tiers(problems: Sequence[Problem]) -> list[Problem]:
    """The problems, those whose products may use TF32 once more with it allowed."""
    both: list[Problem] = []
    for problem in problems:
        both.append(problem)
        if problem.dtype is torch.float32 and any(word in problem.name for word in PRODUCTS):
            both.append(dataclasses.replace(problem, tf32=True))
    return both


def tier(problem: Problem) -> str:
    """`strict`, `tf32` or the half-precision dtype."""
    return "tf32" if problem.tf32 else "strict" if problem.dtype is torch.float32 else str(problem.dtype).removeprefix("torch.")


def step(
    function: Callable[..., Any], inputs: Sequence[torch.Tensor], training: bool, module: nn.Module
) -> Callable[[], list[torch.Tensor]]:
    """One call; with `training` also the gradients of inputs and parameters for a gradient of ones."""
    if not training:
        return lambda: common.leaves(function(*inputs))
    wanted = [*inputs, *module.parameters()]

    def both() -> list[torch.Tensor]:
        output = function(*inputs)
        return [output.detach(), *torch.autograd.grad(output, wanted, torch.ones_like(output))]

    return both


def measure(problem: Problem, names: Sequence[str], device: str, quick: bool) -> dict[str, Any]:
    """The row of one problem."""
    row: dict[str, Any] = {"problem": problem.name, "tier": tier(problem), "contenders": {}}
    torch._dynamo.reset()
    freezing = torch._inductor.config.patch(freezing=problem.frozen)
    with common.tf32(problem.tf32), torch.set_grad_enabled(problem.training), freezing:
        module, inputs = problem.make(device)
        wide, wide_inputs = common.double(module, inputs)
        reference = step(wide, wide_inputs, problem.training, wide)()
        del wide, wide_inputs
        sets = [inputs] + [problem.make(device, seed)[1] for seed in range(1, common.sets_needed(inputs, device))]
        steps: dict[str, list[Callable[[], Any]]] = {}
        for name in names:
            row["contenders"][name] = entry = {}
            try:
                function = ready(entry, module, name, inputs, problem.training)
                steps[name] = [step(function, each, problem.training, module) for each in sets]
                entry["error"] = common.error(steps[name][0](), reference)
            except Exception as problem_of_one:  # a contender that fails is a row of the table, not the end of it
                entry["failed"] = common.one_line(problem_of_one)
                steps.pop(name, None)
        del reference
        for name, timing in common.in_turns(steps, device, quick).items():
            row["contenders"][name] |= {"ms": timing.ms, "spread": timing.spread}
        row["floor_ms"] = floor_ms(module, inputs, problem.training, device)
    return row | judged(row, problem)


def ready(
    entry: dict[str, Any], module: nn.Module, name: str, inputs: Sequence[torch.Tensor], training: bool
) -> Callable[..., Any]:
    """The compiled module; its entry gets the seconds of the first call (verification included) and what was swapped or kept."""
    options = CONTENDERS[name]
    function = torch.compile(module, **options) if options else module
    mark, begin = len(registry.report()), time.perf_counter()
    step(function, inputs, training, module)()
    entry["compile_s"] = time.perf_counter() - begin
    entry["swapped"], entry["kept"] = common.swapped_since(mark), common.reasons_since(mark)
    return function


def floor_ms(module: nn.Module, inputs: Sequence[torch.Tensor], training: bool, device: str) -> float | None:
    """The roofline floors of the problem's regions, added up; None if it has none."""
    facts, ceilings = target_for(device).facts(), measure_ceilings(device)
    floors = [floor(region.task, facts, ceilings).ms for region in capture(module, inputs, training=training)]
    return sum(floors) or None


def judged(row: dict[str, Any], problem: Problem) -> dict[str, Any]:
    """The speedup over the best other contender, over eager, and whether the result is accurate."""
    times = {name: entry["ms"] for name, entry in row["contenders"].items() if "ms" in entry}
    others = {name: ms for name, ms in times.items() if name != "ours"}
    if "ours" not in times or not others:
        return {"best_baseline": None, "speedup": None, "speedup_eager": None, "accurate": None}
    best = min(others, key=lambda name: others[name])
    errors = {name: row["contenders"][name]["error"] for name in times}
    return {
        "best_baseline": best,
        "speedup": others[best] / times["ours"],
        "speedup_eager": others["eager"] / times["ours"] if "eager" in others else None,
        "accurate": common.is_accurate(errors["ours"], errors.get("eager", 0.0), problem.dtype),
    }


def show(results: common.Results) -> None:
    """The table, and the geometric mean over the problems with a swap."""

    def of(row: dict[str, Any], name: str, field: str) -> Any:
        return row["contenders"].get(name, {}).get(field)

    rows = []
    measured = [row for row in results.rows if "skipped" not in row]
    for row in measured:
        kernels = ", ".join(s.split(": ")[1] for s in of(row, "ours", "swapped") or []) or "no swap"
        times = [of(row, name, "ms") for name in CONTENDERS]
        errors = [of(row, name, "error") for name in ("eager", "ours")]
        verdict = {True: "yes", False: "NO", None: "-"}[row["accurate"]]
        rows.append([f"{row['problem']} ({row['tier']})", *times, row["floor_ms"], row["speedup"], *errors, verdict, kernels])
    columns = [
        "problem (tier)",
        *(f"{name} ms" for name in CONTENDERS),
        "floor ms",
        "speedup",
        "eager error",
        "our error",
        "accurate",
        "kernel",
    ]
    common.print_table(f"Operators on {results.header['device']}, commit {results.header['commit']}", columns, rows)
    won = [row["speedup"] for row in measured if row["speedup"] and of(row, "ours", "swapped")]
    summary = {"geomean_speedup": common.geomean(won), "swapped": len(won), "problems": len(results.rows)}
    for row in results.rows:
        notes = [row["skipped"]] if "skipped" in row else of(row, "ours", "kept") or []
        notes += [f"{name}: {entry['failed']}" for name, entry in row.get("contenders", {}).items() if "failed" in entry]
        if notes:
            common.console.print(f"{row['problem']} ({row['tier']}): {'; '.join(notes)}", markup=False)
    mean = common.cell(summary["geomean_speedup"])
    common.console.print(f"{len(won)} of {len(results.rows)} have a swap; their geometric mean over the best baseline: {mean}")
    results.finish(summary)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = common.arguments(__doc__, "operators")
    parser.add_argument("--problems", help=f"names, comma separated (default: those of the device); known: {', '.join(PROBLEMS)}")
    parser.add_argument("--rows", action="store_true", help="the norms of rows, into a file of their own")
    parser.add_argument("--contenders", default=",".join(CONTENDERS), help="which, comma separated")
    args = parser.parse_args(argv)
    names = common.listed(args.contenders, CONTENDERS, "contenders")
    results = common.Results("rows" if args.rows else "operators", args, key=("problem", "tier"))
    with common.knobs(args, verify_budget_s=600.0):
        for problem in chosen(args):
            name = {"problem": problem.name, "tier": tier(problem)}
            if results.wanted(**name):
                results.measure(functools.partial(measure, problem, names, args.device, args.quick), **name)
    show(results)


def chosen(args: argparse.Namespace) -> list[Problem]:
    """The problems that the command line names, in the tiers it asks for.

    Raises:
        SystemExit: for an unknown name.
    """
    if args.rows and not args.problems:
        return list(ROWS)
    if not args.problems:
        return list(CPU) if args.device == "cpu" else tiers((*SEED, *WIDER))
    named = [PROBLEMS[name] for name in common.listed(args.problems, PROBLEMS, "problems")]
    return [p for p in tiers(named) if p.tf32] if args.tf32 else named if args.device == "cpu" else tiers(named)


if __name__ == "__main__":
    main()
