"""How a report looks when it is printed: one line per distinct region of each graph, and what was measured about the graph."""

from __future__ import annotations

import io
from collections import Counter
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch_llmkernels.registry import GraphReport, RegionReport, Report

WIDTH = 170
COLUMNS = ("graph", "region", "task", "inputs", "n", "runs", "kernel ms", "best baseline ms", "ratio", "source", "why")
NUMBERS = ("n", "kernel ms", "best baseline ms", "ratio")


def text(report: Report) -> str:
    """The table and its summary, as plain text."""
    if not report:
        return "no graph was compiled: not called yet, or it runs code that Dynamo had compiled before (see report())"
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for column in COLUMNS:
        table.add_column(column, overflow="fold", justify="right" if column in NUMBERS else "left")
    for row in (row for graph in report for row in rows(graph)):
        table.add_row(*row)
    buffer = io.StringIO()
    console = Console(file=buffer, width=WIDTH)
    console.print(table)
    for line in summary(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return "\n".join(line.rstrip() for line in buffer.getvalue().splitlines() if line.strip())


def rows(graph: GraphReport) -> list[list[str]]:
    """The lines of one graph; equal regions share one, and `n` counts them."""
    if not graph.regions:
        return [[graph.name, "-", *[""] * 8, graph.note or "no region was found"]]
    counts = Counter((region.signature, region.key, region.reason) for region in graph.regions)
    distinct = {(region.signature, region.key, region.reason): region for region in graph.regions}
    return [_row(graph.name, region, counts[name]) for name, region in distinct.items()]


def _row(graph: str, region: RegionReport, count: int) -> list[str]:
    def number(value: float | None, form: str) -> str:
        return "-" if value is None else format(value, form)

    return [
        graph, region.signature, region.key[:8], region.shapes, str(count), region.kernel if region.swapped else "Inductor",
        number(region.kernel_ms, ".4f"), number(region.baseline_ms, ".4f"), number(region.speedup, ".2f"), region.origin or "-",
        region.reason.removeprefix("kept Inductor: ").removeprefix("swapped: "),
    ]  # fmt: skip


def summary(report: Report) -> list[str]:
    """The lines below the table."""
    lines = [f"{len(report)} graphs, {len(report.regions)} regions, {len(report.swapped)} swapped; ratio: the region alone"]
    for graph in report:
        if found := graph.measured:
            times = f"Inductor {found.inductor_ms:.3f} ms, with {len(found.swapped)} kernels {found.swapped_ms:.3f} ms"
            lines.append(f"graph {graph.name}, measured whole: {times}: {found.speedup:.2f}x (noise {found.noise:.1%})")
    return lines
