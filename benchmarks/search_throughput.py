"""How many candidates a device takes in a minute: those of a recorded search, evaluated again in worker processes here.

The first evaluation of a worker starts its process and compiles the baselines, so it is left out. On a GPU the next candidates
compile beside the timing of the current one; `--alone` measures without that. Compilation is also timed by itself, over the same
candidates and constants: with `--alone`, the last column is what the rate would be if all of it ran beside the timing.

    python benchmarks/search_throughput.py cache/journals/RUN [--devices 0,1] [--count 8] [--alone] [--untimed]
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table
from trajectories import read_run

from torch_llmkernels.errors import LLMKernelsError
from torch_llmkernels.evaluate.candidate import COMPILE_THREADS, spread
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.pool import LocalPool
from torch_llmkernels.evaluate.run import MOST_TUNINGS
from torch_llmkernels.evaluation import Evaluation
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.task import Task


def different(texts: Sequence[str], count: int) -> list[str]:
    """`count` files that no cache takes for one another: the given ones in turn, numbered by a comment."""
    return [f"{text}// candidate {number}\n" for number, text in zip(range(count), itertools.cycle(texts), strict=False)]


def rate(evaluations: Sequence[Evaluation], wall_s: float, devices: int, compile_s: float) -> dict[str, float]:
    """Candidates a minute and device, as measured over `wall_s`, and without `compile_s` seconds of each."""
    each = wall_s * devices / len(evaluations)
    return {
        "per_minute": 60 / each,
        "seconds": statistics.median(e.seconds for e in evaluations),
        "compile_seconds": compile_s,
        "per_minute_overlapped": 60 / max(each - compile_s, 1e-9),
    }


def compile_seconds(task: Task, texts: Sequence[str]) -> float:
    """Mean seconds to compile one candidate with all the constants that an evaluation tries; 0 if none compiles."""
    target, taken = target_for(task.device), []
    for text in texts:
        try:
            kernel = parse_kernel(text)
            tunings = spread(kernel.tunings(task, target.facts()), MOST_TUNINGS)
            began = time.perf_counter()
            with ThreadPoolExecutor(COMPILE_THREADS) as pool:
                list(pool.map(lambda c, k=kernel: target.compile(k, task, c, target.facts()), tunings))
            taken.append(time.perf_counter() - began)
        except LLMKernelsError:
            continue
    return statistics.mean(taken) if taken else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a search, recorded or not")
    parser.add_argument("--devices", default="0", help="indexes of the devices, separated by commas")
    parser.add_argument("--count", type=int, default=8, help="candidates to evaluate")
    parser.add_argument("--alone", action="store_true", help="do not compile the next candidates beside the timing of one")
    parser.add_argument("--untimed", action="store_true", help="check only, as a machine would that shares its device")
    args = parser.parse_args()
    goal, tree = read_run(args.run)
    texts = [c.text for c in tree.candidates.values() if not c.duplicate_of]
    if reason := target_for(goal.task.device).unavailable():
        raise SystemExit(f"{args.run} is a search for {goal.task.device}: {reason}")
    if not texts:
        raise SystemExit(f"{args.run} has no candidates")
    devices = [int(index) for index in args.devices.split(",")]
    with LocalPool(devices, compile_ahead=False if args.alone else None) as pool:
        warm = [pool.submit(Job(goal.task, text, timed=not args.untimed)) for text in different(texts, len(devices))]
        for future in warm:
            future.result()
        began = time.monotonic()
        files = different(texts, args.count)
        found = [f.result() for f in [pool.submit(Job(goal.task, text, timed=not args.untimed)) for text in files]]
        wall = time.monotonic() - began
    numbers = rate(found, wall, len(devices), compile_seconds(goal.task, files))
    statuses = ", ".join(f"{n} {status}" for status, n in sorted(Counter(str(e.status) for e in found).items()))
    columns = ("device", "devices", "candidates", "median s", "compile s", "per minute and device", "with compilation beside it")
    grid = Table(*columns, box=box.SIMPLE)
    grid.add_row(
        target_for(goal.task.device).facts().kind, str(len(devices)), statuses, f"{numbers['seconds']:.1f}",
        f"{numbers['compile_seconds']:.1f}", f"{numbers['per_minute']:.1f}", f"{numbers['per_minute_overlapped']:.1f}",
    )  # fmt: skip
    Console(width=150).print(grid)


if __name__ == "__main__":
    main()
