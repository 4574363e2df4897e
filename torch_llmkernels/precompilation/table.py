"""How a precompilation looks on a terminal: its progress and its table."""

from __future__ import annotations

import contextlib
import io
import sys
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch_llmkernels.words import counted, shapes_of

if TYPE_CHECKING:
    from torch_llmkernels.precompilation.run import PrecompileReport
    from torch_llmkernels.precompilation.worth import PlannedRegion

WIDTH = 160
COLUMNS = ("region", "task", "inputs", "n", "share", "ms", "floor ms", "headroom", "kernels", "decision")


@contextlib.contextmanager
def bar(total: int, show: bool) -> Iterator[Callable[[str], None]]:
    """A progress bar on standard error, if that is a terminal; yields the function that names the next step."""
    if not show or not sys.stderr.isatty():
        yield lambda name: None
        return
    from rich.console import Console
    from rich.progress import Progress

    with Progress(console=Console(stderr=True), transient=True) as shown:
        bar_id = shown.add_task("precompile", total=total, completed=-1)
        yield lambda name: shown.update(bar_id, description=name, advance=1)


def text(report: PrecompileReport) -> str:
    """The table and its summary, as plain text."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    title = "Plan: what precompiling would do" if report.dry_run else "Regions: what was decided"
    table = Table(title=title, title_justify="left", box=box.SIMPLE, pad_edge=False)
    for column in COLUMNS:
        table.add_column(
            column, overflow="fold", justify="right" if column in ("n", "share", "ms", "floor ms", "headroom") else "left"
        )
    for region in report.regions:
        table.add_row(*row(region, report))
    buffer = io.StringIO()
    console = Console(file=buffer, width=WIDTH)
    console.print(table)
    for line in summary(report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)
    return buffer.getvalue().rstrip()


def row(region: PlannedRegion, report: PrecompileReport) -> list[str]:
    """One region, in the order of `COLUMNS`."""
    return [
        region.task.signature,
        region.task.key[:8],
        shapes_of(region.task),
        str(region.count),
        f"{region.share:.1%}",
        f"{region.region_ms:.4f}",
        f"{region.floor_ms:.4f}",
        f"{region.headroom:.0%}",
        ", ".join(region.kernels) or "-",
        outcome(region, report),
    ]


def outcome(region: PlannedRegion, report: PrecompileReport) -> str:
    """What happens to a region, in one line."""
    if region.is_open:
        what = "search" if region.state == "search" else "verify"
        estimate = f"about {region.seconds:.0f} s{_tokens(region.tokens)}"
        return f"will {what}: {estimate}" if report.dry_run else f"kept Inductor, still to {what}: {region.note or estimate}"
    if region.task.key in report.winners and region.task.key not in report.swapped:
        return "kept Inductor: the kernel wins alone, the whole model gains nothing"
    if region.decision is None:
        return f"kept Inductor: no kernel implements {region.task.signature} for this task on {region.task.device}"
    return region.decision.reason


def _tokens(count: int) -> str:
    return f", at most {count:,} tokens" if count else ""


def summary(report: PrecompileReport) -> list[str]:
    """The lines below the table."""
    counts = f"{counted(report.captured, 'graph')}, {counted(len(report.regions), 'distinct region')}"
    lines = [f"{counts}; eager takes {report.model_ms:.3f} ms"]
    lines += [f"not taken: {signature}: {reason}" for signature, reason in dict.fromkeys(report.skipped)]
    still_open = [region for region in report.regions if region.is_open]
    if report.dry_run:
        seconds, tokens = sum(r.seconds for r in still_open), sum(r.tokens for r in still_open)
        capped = report.budget_tokens is not None and tokens > report.budget_tokens
        most = f", at most {report.budget_tokens:,} tokens (budget_tokens)" if capped else _tokens(tokens)
        return [*lines, f"to decide: {counted(len(still_open), 'region')}, about {seconds:.0f} s{most}"]
    lines += graph_lines(report)
    if report.tokens:
        limit = "" if report.budget_tokens is None else f" of {report.budget_tokens:,}"
        lines.append(f"searches used {report.tokens:,}{limit} tokens")
    if still_open:
        lines.append(f"the budget ended before {counted(len(still_open), 'region')}; run it again to go on where it stopped")
    if report.exported:
        kernels = counted(len(report.winners), "kernel")
        lines.append(f"{kernels} exported to {report.exported}; llmkernels cache import takes them in elsewhere")
    return [*lines, f"took {report.seconds:.0f} s"]


def graph_lines(report: PrecompileReport) -> list[str]:
    """What the whole-graph measurement said."""
    if not report.graphs:
        return ["no swaps: the model compiles exactly as with Inductor"] if not report.winners else []
    graph: Any = report.graphs[0]  # all graphs of a model are measured together
    if not report.swapped:
        lost = f"{graph.swapped_ms:.3f} ms with swaps, {graph.inductor_ms:.3f} ms with Inductor alone (noise {graph.noise:.1%})"
        return [f"no swaps: the whole model gains nothing by them: {lost}"]
    times = f"Inductor {graph.inductor_ms:.3f} ms, with {counted(len(report.swapped), 'swap')} {graph.swapped_ms:.3f} ms"
    return [f"whole model: {times}: {graph.speedup:.2f}x (noise {graph.noise:.1%})"]
