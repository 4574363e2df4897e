"""`llmkernels explain`: which regions a model has, which are known here, and why the others are not. Runs no kernel of ours."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from torch_llmkernels import settings as knobs
from torch_llmkernels.cli import factory, output
from torch_llmkernels.settings import Settings
from torch_llmkernels.words import counted, shapes_of

if TYPE_CHECKING:
    from torch_llmkernels.capture import Call
    from torch_llmkernels.task import Task


@dataclasses.dataclass(frozen=True)
class Explained:
    """One region.

    Attributes:
        graph: Position of its graph in the model: more than 0 after a graph break.
        signature: What it computes.
        key: The task's key; empty for a region that did not become a task.
        inputs: Dtypes and shapes.
        state: `hit` (decided here before), `unverified` (kernels are there, the first compilation checks them), `miss` (there is
            none), or `skipped` (no task).
        detail: The decision, or what would be tried, or what is in the way.
        differences: For what is no hit: how the nearest stored key differs, one line per field.
    """

    graph: int
    signature: str
    key: str
    inputs: str
    state: str
    detail: str
    differences: tuple[str, ...] = ()


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("explain", help="a model's regions and keys, hits and misses with the differing key field")
    factory.add_arguments(parser)
    parser.add_argument("--training", action="store_true", help="with gradients: forward and backward regions")
    parser.add_argument("--dynamic", action="store_true", help="with dynamic shapes")
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print one row per region."""
    model, calls = factory.made_for(args)
    found = explain(model, calls[0], knobs.current(), training=args.training, dynamic=args.dynamic, more=calls[1:])
    if args.json:
        output.print_json([dataclasses.asdict(region) for region in found])
        return 0
    rows = [(r.graph, r.signature, r.key, r.state, "\n".join((r.inputs, r.detail, *r.differences)).strip()) for r in found]
    columns = ("graph", "signature", "key", "state", "inputs and why")
    output.print_table(f"{args.factory}: {counted(len(found), 'region')}", columns, rows)
    return 0


def explain(
    model: Callable[..., Any], call: Call, settings: Settings, training: bool = False, dynamic: bool = False,
    more: Sequence[Call] = (),
) -> list[Explained]:  # fmt: skip
    """Every region of `model` called like `call`, graph by graph, as the backend would find it.

    Args:
        model: A module or function; it runs once, in eager mode.
        call: Its arguments.
        settings: The knobs in force.
        training: With gradients: forward and backward regions.
        dynamic: As in `torch.compile`.
        more: Further calls, for other input shapes.
    """
    from torch_llmkernels.capture import capture_graphs

    lookup = Lookup(settings)
    found: list[Explained] = []
    with knobs.using(settings):
        graphs = capture_graphs(model, [call, *more], training=training, dynamic=dynamic)
    for position, graph in enumerate(graphs):
        if graph.note:
            found.append(Explained(position, "(whole graph)", "", "", "skipped", graph.note))
        found += [lookup.explain(position, task) for task in graph.tasks]
        found += [Explained(position, s.signature, "", "", "skipped", s.reason) for s in graph.skipped]
    return found


class Lookup:
    """Where the backend would look for a task, without verifying anything.

    Args:
        settings: The knobs in force.
    """

    def __init__(self, settings: Settings) -> None:
        from torch_llmkernels.resolve import Resolver

        self.resolver = Resolver(settings)

    def explain(self, graph: int, task: Task) -> Explained:
        """What is known about `task` on this machine's device."""
        from torch_llmkernels.cache.key import RecordKey
        from torch_llmkernels.evaluation import Decision
        from torch_llmkernels.kernels.targets import target_for
        from torch_llmkernels.resolve import choose

        found = Explained(graph, task.signature, task.key, shapes_of(task), "miss", "")
        target = target_for(task.device)
        if reason := target.unavailable():
            return dataclasses.replace(found, detail=f"no {task.device} kernel can run here: {reason}")
        facts = target.facts()
        key = RecordKey.of(task, facts)
        known = self.resolver.known(key)
        differences = () if known else tuple(self.resolver.store.explain(key))
        waiting = [kernel.name for kernel, _ in self.resolver.unverified(task, facts, known or Decision(None, ""))]
        if waiting:
            detail = f"to be verified at the first compilation: {', '.join(waiting)}"
            return dataclasses.replace(found, state="unverified", detail=detail, differences=differences)
        if known is not None:
            return dataclasses.replace(found, state="hit", detail=choose(known, task, self.resolver.settings).reason)
        return dataclasses.replace(found, detail=self._why_none(task), differences=differences)

    def _why_none(self, task: Task) -> str:
        """Why no kernel of the library can be tried."""
        excluded = (f"{name}: {reason}" for name, reason in self.resolver.excluded.items())
        return "; ".join(excluded) or f"no kernel implements {task.signature} on {task.device}"
