"""`make demo-search`: a branching search, for real but for the model, whose answers come from a recorded journal.

Candidates are parsed, compiled, repaired, checked and timed on this machine, so which ones fail and which one wins is decided
here. The winner goes into a store, and `torch.compile(backend="llmkernels")` then picks it up. The library is left out, so
that nothing but the search can be the source of the kernel.

    python benchmarks/demo_search.py [--journal cache/journals/RUN]
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import tempfile
from pathlib import Path

import torch
from rich.console import Console

import torch_llmkernels
from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.store import open_store
from torch_llmkernels.evaluate.pool import LocalPool
from torch_llmkernels.evaluate.roofline import floor, measure_ceilings
from torch_llmkernels.evaluation import Decision
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.program import module_of
from torch_llmkernels.search import journal, progress
from torch_llmkernels.search.engine import run_search
from torch_llmkernels.search.llm import ReplayProvider
from torch_llmkernels.search.run import Goal, Run
from torch_llmkernels.settings import current, override

console = Console(width=150)
RECORDED = Path(__file__).parent.parent / "cache" / "journals" / "cpu-conv_relu_pool"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--journal", type=Path, default=RECORDED, help="folder with run.json and journal.jsonl.gz")
    args = parser.parse_args()
    goal = Goal.from_json(json.loads((args.journal / "run.json").read_text()))
    target = target_for(goal.task.device)
    if reason := target.unavailable():
        raise SystemExit(f"the search needs the {goal.task.device} target: {reason}")
    with tempfile.TemporaryDirectory() as folder, override(cache_dir=f"{folder}/store", library_dir=f"{folder}/empty"):
        Path(folder, "empty").mkdir()
        search_and_compile(goal, args.journal, Path(folder))


def search_and_compile(goal: Goal, recorded: Path, folder: Path) -> None:
    """Search `goal` in `folder` with the recorded answers, remember the winner, and compile the task's program with it."""
    facts, ceilings = target_for(goal.task.device).facts(), measure_ceilings(goal.task.device)
    provider = ReplayProvider(journal.read(recorded / "journal.jsonl.gz"))
    with LocalPool() as pool, progress.shown() as shown:
        found = run_search(
            goal.task, goal.settings, provider=provider, pool=pool, facts=facts.to_json(), directory=folder / "run",
            ceilings=ceilings.to_json(), floor=dataclasses.asdict(floor(goal.task, facts, ceilings)), progress=shown,
        )  # fmt: skip
    console.print(progress.table(Run(folder / "run")))
    console.print(f"the search ended: {found.reason}")
    if found.record is None:
        console.print("no kernel was accepted on this machine, so there is nothing to swap in")
        return
    kernel = parse_kernel(found.record.kernel_text, found.record.kernel_name)
    evaluation = found.record.evaluation
    open_store(current()).put_decision(
        RecordKey.of(goal.task, facts), Decision(found.record, "found by a search", ((kernel.label, evaluation),))
    )
    compile_with(goal)


def compile_with(goal: Goal) -> None:
    """`torch.compile` of the task's own program, and what the backend says about it."""
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(spec.shape, generator=generator).to(getattr(torch, spec.dtype)).as_strided(spec.shape, spec.stride)
        for spec in goal.task.inputs
    ]
    module = module_of(goal.task)
    with torch.no_grad():
        got, expected = torch.compile(module, backend="llmkernels")(*inputs), module(*inputs)
    for graph in torch_llmkernels.report():
        for region in graph.regions:
            console.print(region.line)
    difference = max((a - b).abs().max().item() for a, b in zip(got, expected, strict=True))
    console.print(f"largest difference from eager: {difference:.1e}")


if __name__ == "__main__":
    main()
