"""KernelBench problem files through `torch.compile(backend="llmkernels")`: verdicts, fast_p, geometric mean, misses.

A problem file defines `Model`, `get_inputs()` and `get_init_inputs()`. None are shipped: point this at a folder of yours, such as
a checkout of KernelBench's level1. Correctness is judged against float64 beside eager, speed against eager and Inductor.

    python benchmarks/kernelbench.py DIR [--out kernelbench.json] [--batch-scale 0.1] [--only 1,19,*softmax*] [--quick] [--resume]
"""

from __future__ import annotations

import argparse
import fnmatch
import functools
import gc
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import common
import torch
from torch import nn

from torch_llmkernels import registry

CONTENDERS: dict[str, dict[str, Any]] = {"eager": {}, "inductor": {"backend": "inductor"}, "ours": {"backend": "llmkernels"}}
FAST = (0.0, 0.5, 0.8, 1.0, 1.5, 2.0)
"""The p of fast_p: the part of all problems that are correct and more than p times as fast."""
OUT = "kernelbench.json"
"""The default result file, in the current directory."""
BATCH_NAMES = ("batch_size", "BATCH_SIZE", "N_BATCH", "batch")


def problems(folder: Path, only: Sequence[str] = ()) -> list[Path]:
    """The problem files below a folder, by name; `only` are numbers or patterns of file names.

    Raises:
        SystemExit: if there are none.
    """
    found = sorted(p for p in folder.rglob("*.py") if p.name != "__init__.py" and "def get_inputs" in p.read_text())
    if only:
        found = [p for p in found if any(p.name.startswith(f"{o}_") or fnmatch.fnmatch(p.stem, o) for o in only)]
    if not found:
        raise SystemExit(f"{folder} holds no problem file (a .py with Model, get_inputs and get_init_inputs)")
    return sorted(found, key=lambda p: (str(p.parent), _number(p), p.name))


def _number(path: Path) -> int:
    head = path.name.partition("_")[0]
    return int(head) if head.isdigit() else 0


def load(path: Path) -> ModuleType:
    """The problem file as a module of its own."""
    spec = importlib.util.spec_from_file_location(f"kernelbench_{path.stem}", path)
    assert spec is not None and spec.loader is not None  # for a .py file that exists
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def made(path: Path, device: str, scale: float) -> tuple[nn.Module, list[Any]]:
    """The problem's model and inputs on `device`, the batch shrunk by `scale`.

    A batch size by one of the usual names is changed before the inputs are made. Elsewhere the first dimension is cut: of every
    tensor that shares the first one's, or of the first one alone if the model takes nothing else.
    """
    problem = load(path)
    named = [name for name in BATCH_NAMES if isinstance(getattr(problem, name, None), int)]
    if scale < 1:
        for name in named:
            setattr(problem, name, max(1, int(getattr(problem, name) * scale)))
    torch.manual_seed(42)
    with torch.device(device):  # gigabytes of random numbers take a GPU no time, and the host many seconds
        model = problem.Model(*problem.get_init_inputs()).to(device).eval()
        inputs = [v.to(device) if isinstance(v, torch.Tensor) else v for v in problem.get_inputs()]
    return model, inputs if named or scale >= 1 else shrunk(model, inputs, scale)


def shrunk(model: nn.Module, inputs: list[Any], scale: float) -> list[Any]:
    """The inputs with a smaller first dimension, as far as the model still takes them."""
    for choice in _smaller(inputs, scale):
        try:
            with torch.no_grad():
                model(*choice)
        except (RuntimeError, ValueError, IndexError):
            continue
        return choice
    return inputs


def _smaller(inputs: list[Any], scale: float) -> Iterator[list[Any]]:
    tensors = [v for v in inputs if isinstance(v, torch.Tensor) and v.ndim]
    if not tensors:
        return
    rows = tensors[0].shape[0]
    keep = max(1, int(rows * scale))
    for chosen in ([t for t in tensors if t.shape[0] == rows], tensors[:1]):
        yield [v[:keep] if any(v is t for t in chosen) else v for v in inputs]


LEAST_SCALE = 1 / 64
"""How far the batch of a problem is cut that does not fit the device's memory beside its float64 reference."""


def measure(path: Path, folder: Path, device: str, scale: float, quick: bool) -> dict[str, Any]:
    """The row of one problem; where not even eager has room beside the reference, that of a quarter of its batch, and so on."""
    row = measured(path, folder, device, scale, quick)
    while is_too_large(row) and scale / 4 >= LEAST_SCALE:
        scale /= 4
        gc.collect()
        if device == "cuda":
            torch.cuda.empty_cache()
        row = measured(path, folder, device, scale, quick)
    return row if scale == 1 else row | {"batch_scale": scale}


def is_too_large(row: dict[str, Any]) -> bool:
    """Whether eager itself ran out of memory."""
    eager = row["contenders"].get("eager", {"failed": row["verdict"]})  # without contenders the verdict is eager's failure
    return "OutOfMemoryError" in eager.get("failed", "")


@torch.no_grad()
def measured(path: Path, folder: Path, device: str, scale: float, quick: bool) -> dict[str, Any]:
    """The row of one problem at one batch size."""
    row: dict[str, Any] = {"problem": path.relative_to(folder).with_suffix("").as_posix(), "contenders": {}}
    torch._dynamo.reset()
    try:
        model, inputs = made(path, device, scale)
        expected = common.leaves(model(*fresh(inputs)))
    except Exception as problem:  # a user's file may fail in any way
        return row | {"verdict": f"the problem fails in eager: {common.one_line(problem)}"}
    reference, in_float64 = wide(model, inputs, expected)
    dtype = expected[0].dtype if expected else torch.float32
    calls: dict[str, list[Callable[[], Any]]] = {}
    for name, options in CONTENDERS.items():
        row["contenders"][name] = entry = {}
        try:
            function = torch.compile(model, **options) if options else model
            mark, begin = len(registry.report()), time.perf_counter()
            entry["error"] = common.error(common.leaves(function(*fresh(inputs))), reference)
            entry |= {
                "compile_s": time.perf_counter() - begin,
                "swapped": common.swapped_since(mark),
                "kept": common.reasons_since(mark),
            }
            calls[name] = [lambda f=function: f(*inputs)] * 2
        except Exception as problem:  # a contender that fails is an entry of the row
            entry["failed"] = common.one_line(problem)
    for name, timing in common.in_turns(calls, device, quick).items():
        row["contenders"][name] |= {"ms": timing.ms, "spread": timing.spread}
    return row | judged(row, dtype, in_float64)


def fresh(inputs: list[Any]) -> list[Any]:
    """Copies of the inputs: a problem may work in place, and everyone must start from the same data."""
    return [v.clone() if isinstance(v, torch.Tensor) else v for v in inputs]


def wide(model: nn.Module, inputs: list[Any], expected: list[torch.Tensor]) -> tuple[list[torch.Tensor], bool]:
    """The outputs in float64; where the model cannot run in it, eager's own, and False."""
    try:
        module, wide_inputs = common.double(model, fresh(inputs))
        return common.leaves(module(*wide_inputs)), True
    except (RuntimeError, NotImplementedError):
        return expected, False


def judged(row: dict[str, Any], dtype: torch.dtype, in_float64: bool) -> dict[str, Any]:
    """The verdict and the speedups over eager and Inductor."""
    ours, eager = row["contenders"]["ours"], row["contenders"]["eager"]
    if "failed" in ours:
        return {"verdict": f"failed: {ours['failed']}"}
    # without a float64 reference the error is the difference from eager, which rounding alone makes as large as eager's own
    allowed = eager["error"] if in_float64 or not dtype.is_floating_point else 16 * torch.finfo(dtype).eps
    accurate = common.is_accurate(ours["error"], allowed, dtype)
    verdict = "correct" if accurate else f"wrong: error {ours['error']:.3g}, eager's {eager['error']:.3g}"
    speedups = {
        f"vs_{name}": row["contenders"][name]["ms"] / ours["ms"]
        for name in ("eager", "inductor")
        if "ms" in row["contenders"][name]
    }
    return {"verdict": verdict, **speedups, "swaps": len(ours["swapped"])}


def summary(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """fast_p over all problems, and the geometric means over the correct ones, against eager and Inductor."""
    correct = [row for row in rows if row.get("verdict") == "correct"]
    found: dict[str, Any] = {"problems": len(rows), "correct": len(correct), "swapped": sum(bool(r["swaps"]) for r in correct)}
    for versus in ("vs_eager", "vs_inductor"):
        speedups = [row[versus] for row in correct if versus in row]
        found[versus] = {
            "geomean": common.geomean(speedups),
            "geomean_swapped": common.geomean(row[versus] for row in correct if versus in row and row["swaps"]),
            "fast_p": {str(p): sum(s > p for s in speedups) / len(rows) for p in FAST},
        }
    return found


def show(results: common.Results) -> None:
    """The tables and the list of misses."""

    def of(row: dict[str, Any], name: str) -> Any:
        return row.get("contenders", {}).get(name, {}).get("ms")

    rows = [
        [
            row["problem"],
            *(of(row, name) for name in CONTENDERS),
            row.get("vs_eager"),
            row.get("vs_inductor"),
            row.get("swaps"),
            row.get("verdict") or f"not measured: {row['skipped']}",
        ]
        for row in results.rows
    ]
    columns = ["problem", *(f"{name} ms" for name in CONTENDERS), "vs eager", "vs Inductor", "swaps", "verdict"]
    common.print_table(f"KernelBench problems on {results.header['device']}", columns, rows)
    found = summary(results.rows)
    common.print_table(
        f"{found['correct']} of {found['problems']} correct, {found['swapped']} with a swap",
        ["against", "geomean", "geomean of the swapped", *(f"fast_{p:g}" for p in FAST)],
        [
            [v, found[v]["geomean"], found[v]["geomean_swapped"], *found[v]["fast_p"].values()]
            for v in ("vs_eager", "vs_inductor")
        ],
    )
    for row in results.rows:
        if row.get("swaps") == 0:
            reasons = row["contenders"]["ours"]["kept"] or ["no region was found"]
            common.console.print(f"miss {row['problem']}: {'; '.join(reasons[:3])}", markup=False)
    results.finish(found)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, print and write."""
    parser = common.arguments(__doc__, "kernelbench", OUT)
    parser.add_argument("folder", type=Path, help="where the problem files are")
    parser.add_argument("--batch-scale", type=float, default=1.0, help="shrink the batch by this factor (default: %(default)s)")
    parser.add_argument("--only", default="", help="numbers or patterns of file names, comma separated")
    args = parser.parse_args(argv)
    check_scale(args)
    args.out = args.out or Path(OUT)  # problems of the user's, so no result of this project's
    results = common.Results("kernelbench", args, key=("problem",))
    with common.knobs(args, verify_budget_s=600.0), common.tf32(args.tf32):
        for path in problems(args.folder, [o for o in args.only.split(",") if o]):
            name = path.relative_to(args.folder).with_suffix("").as_posix()
            if results.wanted(problem=name):
                results.measure(
                    functools.partial(measure, path, args.folder, args.device, args.batch_scale, args.quick), problem=name
                )
    show(results)


def check_scale(args: argparse.Namespace) -> None:
    """Refuse a scale that is not in (0, 1].

    Raises:
        SystemExit: otherwise.
    """
    if not 0 < args.batch_scale <= 1:
        raise SystemExit(f"--batch-scale {args.batch_scale}: give a factor above 0, at most 1")


if __name__ == "__main__":
    main()
