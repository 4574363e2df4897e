"""What the benchmarks share: the header of a result file, timing in turns, errors against float64, tables.

Importing this registers the backend, so that a benchmark runs from a checkout that is on `PYTHONPATH` and not installed.

Results go to `benchmarks/results/<device kind>/<name>.json` and are written after every row, so that a run that is cut short
keeps what it has. Every file names the device, the versions, the flags and the commit.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import gc
import importlib.metadata
import json
import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from rich import box
from rich.console import Console
from rich.table import Table
from torch import nn

from torch_llmkernels import backend, registry, settings
from torch_llmkernels.cache.library import write_atomically
from torch_llmkernels.kernels.targets import target_for

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PACKAGES = ("torch", "triton", "torchvision", "timm", "transformers", "cuda-bindings", "nvidia-cudnn-cu13", "torch-llmkernels")
MOST_ERROR = 1.1
"""A result is accurate if its error is at most this multiple of eager's, or a few roundings of its dtype."""

console = Console(width=170)
backend.register()


def arguments(doc: str, name: str, out: str = "") -> argparse.ArgumentParser:
    """The options every benchmark has; `out` is where results go, if not to this checkout's."""
    out = out or f"benchmarks/results/<device kind>/{name}.json"
    parser = argparse.ArgumentParser(description=doc.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=("cuda", "cpu"))
    parser.add_argument("--out", type=Path, help=f"the result file (default: {out})")
    parser.add_argument("--quick", action="store_true", help="fewer and shorter samples")
    parser.add_argument("--budget-s", type=float, default=math.inf, help="start nothing further after this many seconds")
    parser.add_argument("--store", type=Path, help="where verified kernels are remembered (default: the user's store)")
    parser.add_argument("--tf32", action="store_true", help="allow TF32 in float32 products and convolutions")
    parser.add_argument("--resume", action="store_true", help="keep the rows of the result file and measure the others")
    return parser


def listed(text: str, known: Iterable[str], what: str) -> list[str]:
    """A comma-separated list of known names.

    Raises:
        SystemExit: for an unknown one.
    """
    names, known = text.split(","), list(known)
    if unknown := sorted(set(names) - set(known)):
        raise SystemExit(f"unknown {what} {', '.join(unknown)}; known: {', '.join(known)}")
    return names


def knobs(args: argparse.Namespace, **values: Any) -> contextlib.AbstractContextManager[Any]:
    """`settings.override` with these values and the store that the command line names."""
    return settings.override(**values, **({"cache_dir": str(args.store.resolve())} if args.store else {}))


def header(device: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    """What a reader needs to repeat a measurement."""
    facts = target_for(device).facts()
    return {
        "device": facts.name,
        "device_kind": facts.kind,
        "driver": facts.driver,
        "cores": facts.sms,
        "host": platform.platform(),
        "python": platform.python_version(),
        "versions": {name: version(name) for name in PACKAGES if version(name)},
        "cuda": torch.version.cuda or "",
        "cudnn": str(torch.backends.cudnn.version() or ""),
        "threads": torch.get_num_threads(),
        "commit": commit(),
        "date": time.strftime("%Y-%m-%d"),
        "flags": dict(flags),
    }


def version(package: str) -> str:
    """The installed version of a package, or an empty string."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """The commit that is measured (`$GIT_COMMIT` where there is no repository), with `+` if files differ from it."""
    if os.environ.get("GIT_COMMIT"):
        return os.environ["GIT_COMMIT"]
    try:
        git = ["git", "-C", str(ROOT)]
        name = subprocess.run(
            [*git, "rev-parse", "--short=12", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            [*git, "status", "--porcelain", "-uno"], capture_output=True, text=True, check=True
        ).stdout.strip()
        return name + ("+" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


class Results:
    """A result file that is complete after every row.

    Args:
        name: Of the benchmark: `operators`.
        args: Of `arguments`; `out`, `resume` and the device are read, all are kept as flags.
        key: The fields that name a row.
    """

    def __init__(self, name: str, args: argparse.Namespace, key: Sequence[str]) -> None:
        if reason := target_for(args.device).unavailable():
            raise SystemExit(f"--device {args.device}: {reason}")
        flags = {k: str(v) for k, v in vars(args).items() if v not in (None, False) and k not in ("out", "store")}
        self.header = {"benchmark": name, **header(args.device, flags)}
        self.device: str = args.device
        self.path: Path = args.out or RESULTS / self.header["device_kind"] / f"{name}.json"
        self.key = tuple(key)
        self.rows: list[dict[str, Any]] = []
        self.summary: dict[str, Any] = {}
        self._deadline = time.monotonic() + args.budget_s
        if args.resume and self.path.exists():
            self.rows = [row for row in json.loads(self.path.read_text())["rows"] if "skipped" not in row]

    def add(self, row: dict[str, Any]) -> None:
        """Add or replace a row and write the file; a row names its commit, since a resumed file holds rows of several."""
        self.rows = [r for r in self.rows if self._name(r) != self._name(row)] + [{**row, "commit": self.header["commit"]}]
        self.write()

    def write(self) -> None:
        """Write the file."""
        write_atomically(self.path, json.dumps({**self.header, "summary": self.summary, "rows": self.rows}, indent=1) + "\n")

    def finish(self, summary: Mapping[str, Any]) -> None:
        """Write the file with its summary, a plot of the rows with a swap beside it, and say where they are."""
        from readme_tables import plot  # the README's plots are drawn from the same file

        self.summary = dict(summary)
        self.write()
        console.print(f"written to {self.path}")
        if text := plot(json.loads(self.path.read_text()), self.header["benchmark"].partition("-")[0]):
            write_atomically(self.path.with_suffix(".svg"), text)
            console.print(f"plotted in {self.path.with_suffix('.svg')}")

    @property
    def left_s(self) -> float:
        """Seconds left of `--budget-s`; not above 0 when it is spent."""
        return self._deadline - time.monotonic()

    def wanted(self, **names: Any) -> bool:
        """Whether a row is still to be measured, and there is time for it."""
        if self.left_s <= 0:
            return False
        return all(self._name(r) != tuple(names[k] for k in self.key) for r in self.rows)

    def measure(self, measured: Callable[[], dict[str, Any]], **names: Any) -> None:
        """Add the row that `measured` makes; whatever it raises becomes the row's `skipped`, and the next row goes on.

        Raises:
            SystemExit: if the device is lost with it: no later row could be measured in this process. Nothing written is lost.
        """
        console.print(" ".join(str(value) for value in names.values()) + " ...", markup=False)
        try:
            row = measured()
        except Exception as problem:  # a model may fail in any way, out of memory first of all
            row = {**names, "skipped": one_line(problem)}
        self.add(row)
        gc.collect()
        try:
            if self.device == "cuda":
                torch.cuda.synchronize()
                torch.cuda.empty_cache()
        except RuntimeError as problem:
            raise SystemExit(f"the device is lost after {names}: {one_line(problem)}; run again with --resume") from problem

    def _name(self, row: Mapping[str, Any]) -> tuple[Any, ...]:
        return tuple(row[k] for k in self.key)


def print_table(title: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """A table; the first column is aligned left, the others right. Headings wrap between words, never inside one."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    longest = [max(map(len, column.split()), default=0) for column in columns]
    for column, width in zip(columns, longest, strict=True):
        table.add_column(column, justify="left" if column == columns[0] else "right", overflow="fold", min_width=width)
    for row in rows:
        table.add_row(*(cell(value) for value in row))
    needed = sum(width + 3 for width in longest) + 12  # 3: what a column's padding takes; 12: room for names in the first
    (console if needed <= console.width else Console(width=needed)).print(table)


def cell(value: Any) -> str:
    """A value as a table shows it: four significant digits, a dash for nothing."""
    if value is None or value == "":
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    return str(value)


def geomean(values: Iterable[float]) -> float | None:
    """The geometric mean of positive numbers; None of none."""
    logs = [math.log(v) for v in values]
    return math.exp(statistics.fmean(logs)) if logs else None


@dataclasses.dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender.

    Attributes:
        ms: Median per call.
        spread: Interquartile range over the median.
        samples: All of them, in the order they were taken.
    """

    ms: float
    spread: float
    samples: tuple[float, ...]


def in_turns(calls: Mapping[str, Sequence[Callable[[], Any]]], device: str, quick: bool = False) -> dict[str, Timing]:
    """Time contenders in turns, each over several data sets, as the evaluation of kernels does.

    On CUDA a sample is one replay of a graph of all the contender's calls, with the L2 cache flushed before it.

    Args:
        calls: For each contender, one warm callable per data set.
        device: `cuda` or `cpu`.
        quick: Nine samples, where otherwise there is about a second of them.
    """
    from torch_llmkernels.evaluate import timing

    facts = target_for(device).facts()
    if device == "cuda":
        flush = torch.empty(timing.L2_MULTIPLE * facts.l2_bytes, dtype=torch.uint8, device="cuda")
        subjects = [timing.CudaSubject(name, list(each), flush) for name, each in calls.items()]
    else:
        subjects = [timing.Subject(name, list(each)) for name, each in calls.items()]
    for subject in subjects:
        subject.sample()
        subject.samples.clear()
    timing.take_turns(subjects, lambda: all(len(s.samples) >= 9 if quick else s.enough for s in subjects))
    return {s.name: Timing(s.median, s.spread, tuple(s.samples)) for s in subjects}


def sets_needed(inputs: Sequence[torch.Tensor], device: str) -> int:
    """How many data sets keep inputs out of the L2 cache between two of their uses."""
    size = sum(t.nbytes for t in inputs) or 1
    wanted = math.ceil(2 * target_for(device).facts().l2_bytes / size) + 1 if device == "cuda" else 2
    return max(2, min(wanted, 64, (4 << 30) // size))


@contextlib.contextmanager
def tf32(allowed: bool) -> Iterator[None]:
    """Allow or forbid TF32 in products and convolutions, by the flags that most programs set."""
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    matmul.allow_tf32 = cudnn.allow_tf32 = allowed
    try:
        yield
    finally:
        matmul.allow_tf32, cudnn.allow_tf32 = before


def leaves(output: Any) -> list[torch.Tensor]:
    """Every floating tensor of an output; every tensor of one that has no floating ones."""
    found = [t.detach() for t in torch.utils._pytree.tree_leaves(output) if isinstance(t, torch.Tensor)]
    return [t for t in found if t.is_floating_point()] or found


def error(output: Sequence[torch.Tensor], reference: Sequence[torch.Tensor]) -> float:
    """Relative Frobenius error of all outputs together; infinite for other shapes, or NaN where the reference has none."""
    if [t.shape for t in output] != [t.shape for t in reference]:
        return math.inf
    off = size = 0.0
    for got, want in zip(output, reference, strict=True):
        got, want = got.double(), want.double()
        if not torch.equal(got.isnan(), want.isnan()):
            return math.inf
        finite = want.isfinite() & got.isfinite()
        off += float((got - want)[finite].square().sum())
        size += float(want[finite].square().sum())
    return math.sqrt(off / size) if size else math.sqrt(off)


def is_accurate(found: float, eager: float, dtype: torch.dtype, factor: float = MOST_ERROR) -> bool:
    """Whether an error against float64 is no larger than eager's times `factor`, or below four roundings of the dtype."""
    rounding = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return found <= max(factor * eager, 4 * rounding)


def double(module: nn.Module, inputs: Sequence[Any]) -> tuple[nn.Module, list[Any]]:
    """A copy of the module and its inputs in float64."""
    wide = [v.detach().double() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in inputs]
    wide = [
        w.requires_grad_(v.requires_grad) if isinstance(v, torch.Tensor) and w.is_floating_point() else w
        for v, w in zip(inputs, wide, strict=True)
    ]
    return copy.deepcopy(module).double(), wide


def swapped_since(mark: int) -> list[str]:
    """`signature: kernel` of every region that was swapped in since `len(registry.report())` was `mark`."""
    regions = (region for graph in registry.report()[mark:] for region in graph.regions)
    return [f"{region.signature}: {region.kernel}" for region in regions if region.swapped]


def reasons_since(mark: int) -> list[str]:
    """`signature: reason` of every region that stayed with Inductor since then."""
    regions = (region for graph in registry.report()[mark:] for region in graph.regions)
    return list(dict.fromkeys(f"{region.signature}: {region.reason}" for region in regions if not region.swapped))


def one_line(problem: BaseException) -> str:
    """An error as one line of a table."""
    return f"{type(problem).__name__}: {' '.join(str(problem).split())}"[:200]
