"""`llmkernels search`, `llmkernels report` and `llmkernels dataset`."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch_llmkernels import settings as knobs
from torch_llmkernels.errors import SearchError, SettingsError
from torch_llmkernels.search import budget, journal, progress, render
from torch_llmkernels.search.candidates import CompileCheck, StaticCheck, static_check
from torch_llmkernels.search.engine import Engine, extend, finish, open_run
from torch_llmkernels.search.ideas import Idea
from torch_llmkernels.search.journal import Event
from torch_llmkernels.search.llm import Provider, provider_for, write_atomic
from torch_llmkernels.search.run import Goal, Run
from torch_llmkernels.search.steps import record_of
from torch_llmkernels.search.tree import IdeaNode
from torch_llmkernels.task import Task
from torch_llmkernels.words import counted, shapes_of

if TYPE_CHECKING:
    from torch_llmkernels.evaluate.pool import Pool
    from torch_llmkernels.evaluation import Record
    from torch_llmkernels.kernels.device import DeviceFacts

Subparsers = "argparse._SubParsersAction[argparse.ArgumentParser]"


def register_search(subparsers: Subparsers) -> None:
    """Add `search` and its actions."""
    group = subparsers.add_parser("search", help="let a language model write a kernel: run, start, step, evaluate, status, ...")
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)

    parser = _action(actions, "run", _run, "search in this process until it ends; an unfinished folder is gone on with")
    _add_goal(parser)
    _add_pool(parser)
    _add_outcome(parser)

    parser = _action(
        actions, "start", _start, "make a run and write its first prompts, unless known kernels have to be evaluated first"
    )
    _add_goal(parser)

    parser = _action(actions, "step", _step, "take in replies, check what they hold, write the next prompts")
    _add_run(parser)
    parser.add_argument("--no-compile", action="store_true", help="do not compile candidates here, even if there is a compiler")

    parser = _action(actions, "evaluate", _evaluate, "check and time every waiting candidate on this machine")
    _add_run(parser)
    _add_pool(parser)
    _add_outcome(parser)

    parser = _action(actions, "status", _status, "where a run stands")
    _add_run(parser)
    parser.add_argument("--json", action="store_true", help="print JSON for a script")

    parser = _action(actions, "extend", _extend, "go on with a run that has ended, with other numbers")
    _add_run(parser)
    parser.add_argument("numbers", nargs="+", metavar="NAME=VALUE", help="such as rounds=8 max_tokens=2000000")

    parser = _action(actions, "finish", _finish, "ask no more; the best candidate has its full check at the next `evaluate`")
    _add_run(parser)

    parser = _action(actions, "merge", _merge, "take in what a copy of the run has done meanwhile")
    _add_run(parser)
    parser.add_argument("copy", type=Path, help="the copy's folder")

    parser = _action(
        actions, "device", _device, "print this machine's device facts and ceilings, for `start --device-file` elsewhere"
    )
    parser.add_argument("--target", choices=("cuda", "cpu"), default="cuda", help="which target (default: cuda)")


def register_report(subparsers: Subparsers) -> None:
    """Add `report`."""
    parser = subparsers.add_parser("report", help="write a search as one HTML page")
    _add_run(parser)
    parser.add_argument("-o", "--output", type=Path, help="the file (default: report.html in the run)")
    parser.set_defaults(run=_report)


def register_dataset(subparsers: Subparsers) -> None:
    """Add `dataset`."""
    parser = subparsers.add_parser("dataset", help="write (task, idea, code, outcome) of searches as JSON lines")
    parser.add_argument("folders", type=Path, nargs="+", metavar="RUN", help="folders of searches")
    parser.add_argument("-o", "--output", type=Path, help="the file (default: standard output)")
    parser.set_defaults(run=_dataset)


COMMANDS = (register_search, register_report, register_dataset)


def _action(actions: Subparsers, name: str, run: Any, text: str) -> argparse.ArgumentParser:
    parser = actions.add_parser(name, help=text, description=text)
    parser.set_defaults(run=run)
    return parser


def _add_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("folder", type=Path, metavar="RUN", help="the run's folder")


def _add_goal(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "task", help="a task's or record's JSON file, or the key (or a part of it) of a task in the library or the store"
    )
    parser.add_argument("--folder", type=Path, help="the run's folder (default: searches/<signature>-<key>)")
    parser.add_argument("--provider", help="openai, exchange, exchange:FOLDER or replay:JOURNAL (default: LLMKERNELS_PROVIDER)")
    parser.add_argument("--model", help="for openai: NAME[=WEIGHT][@BASE_URL][#KEY_VARIABLE],... (default: LLMKERNELS_MODEL)")
    parser.add_argument("--effort", default="", help="for openai: reasoning effort, passed as it is")
    parser.add_argument("--preset", choices=tuple(budget.PRESETS), help="how much to try (default: LLMKERNELS_PRESET)")
    parser.add_argument(
        "--set", action="append", default=[], metavar="NAME=VALUE", help="one number of the preset, such as rounds=4"
    )
    parser.add_argument(
        "--price", action="append", default=[], metavar="MODEL=IN,OUT", help="price of a million tokens in and out"
    )
    parser.add_argument("--device-file", type=Path, help="facts of another machine's device (llmkernels search device)")
    parser.add_argument("--notes", type=Path, help="a text file for the model: other shapes to serve, what is known")
    parser.add_argument("--no-bank", action="store_true", help="do not start from known kernels")


def _add_pool(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", default="0", help="indexes of the devices to evaluate on, separated by commas (default: 0)")
    parser.add_argument("--pool", choices=("local", "ray"), default="local", help="worker processes here, or a Ray cluster")
    parser.add_argument("--workers", type=int, default=1, help="with ray: how many workers")


def _add_outcome(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--store", action="store_true", help="remember the winner in this machine's store, for torch.compile to use"
    )
    parser.add_argument("--library", type=Path, help="add the winner to a library folder")
    parser.add_argument("--quiet", action="store_true", help="show no progress")


def _run(args: argparse.Namespace) -> int:
    folder, goal = _goal(args)
    with _locked(folder):
        run = open_run(folder, goal)
        print(f"{folder}: {_estimate(run.goal)}", file=sys.stderr)
        wait = run.goal.settings.max_seconds or float("inf")
        with _pool(args, run.goal) as pool, progress.shown(args.quiet) as shown:
            Engine(run, provider=_provider(run, wait_s=wait), pool=pool, progress=shown).drive()
        return _outcome(run, args)


def _start(args: argparse.Namespace) -> int:
    folder, goal = _goal(args)
    with _locked(folder):
        run = open_run(folder, goal)
        provider = _provider(run) if run.goal.provider.startswith("exchange") else None
        Engine(run, provider=provider).drive()
        print(f"{folder}: {_estimate(run.goal)}")
        print(_next(run))
    return 0


def _step(args: argparse.Namespace) -> int:
    with _locked(args.folder):
        run = open_run(args.folder)
        before = len(run.journal.events)
        Engine(run, provider=_provider(run), check=static_check if args.no_compile else _check(run.goal)).drive()
        for line in _refused(run, run.journal.events[before:]):
            print(line)
        print(progress.line(run))
        print(_next(run))
    return 0


def _refused(run: Run, events: Sequence[Event]) -> Iterator[str]:
    """One line for each reply among `events` that held nothing usable, and for each file that failed its check here."""
    for event in events:
        if event["event"] == "rejected":
            yield _short(f"rejected: reply {event['id']} ({run.tree.prompts[event['id']].slot}): {event['reason']}")
        elif event["event"] == "evaluation":
            candidate = run.tree.candidates[event["id"]]
            if (found := candidate.evaluation) and not found.status.is_correct:
                yield _short(f"rejected: reply {candidate.prompt} ({candidate.slot}): {found.status}: {found.detail}")


def _short(text: str) -> str:
    return textwrap.shorten(text, 400, placeholder=" ...")


def _evaluate(args: argparse.Namespace) -> int:
    with _locked(args.folder):
        run = open_run(args.folder)
        provider = _provider(run) if run.goal.provider.startswith("exchange") else None
        with _pool(args, run.goal) as pool, progress.shown(args.quiet) as shown:
            Engine(run, provider=provider, pool=pool, progress=shown).drive()
        return _outcome(run, args)


def _status(args: argparse.Namespace) -> int:
    run = Run(args.folder)
    if args.json:
        print(json.dumps(progress.summary(run), indent=1))
        return 0
    from rich.console import Console

    Console().print(progress.table(run))
    print(_next(run))
    return 0


def _extend(args: argparse.Namespace) -> int:
    with _locked(args.folder):
        run = Run(args.folder)
        extend(run, _pairs(args.numbers))
        print(_next(run))
    return 0


def _finish(args: argparse.Namespace) -> int:
    with _locked(args.folder):
        run = Run(args.folder)
        finish(run)
        Engine(run).drive()  # without a candidate for the full check, that was the end
        print(_next(run))
    return 0


def _merge(args: argparse.Namespace) -> int:
    with _locked(args.folder):
        here, there = Run(args.folder), Run(args.copy)
        if here.goal.task.key != there.goal.task.key:
            raise SearchError(f"{args.copy} holds a search for another task ({there.goal.task.signature}); nothing was merged")
        count = here.journal.merge(journal.read(args.copy / "journal.jsonl"))
        print(f"took in {count} events; {progress.line(Run(args.folder))}")
    return 0


def _device(args: argparse.Namespace) -> int:
    facts, ceilings = _measured(args.target)
    print(json.dumps({"facts": facts, "ceilings": ceilings}, indent=1))
    return 0


def _report(args: argparse.Namespace) -> int:
    from torch_llmkernels.search.report import render_html

    path = args.output or args.folder / "report.html"
    write_atomic(path, render_html(Run(args.folder)))
    print(path)
    return 0


def _dataset(args: argparse.Namespace) -> int:
    from torch_llmkernels.search.report import dataset

    rows = [json.dumps(row, ensure_ascii=False) + "\n" for folder in args.folders for row in dataset(Run(folder))]
    if args.output:
        write_atomic(args.output, "".join(rows))
        print(f"wrote {len(rows)} rows to {args.output}")
    else:
        sys.stdout.writelines(rows)
    return 0


def _goal(args: argparse.Namespace) -> tuple[Path, Goal | None]:
    """The folder, and what it is to hold; None if it already holds a search."""
    chosen = knobs.current()
    task = _task(args.task)
    folder = args.folder or Path("searches") / f"{task.signature}-{task.key[:8]}"
    if (folder / "run.json").exists():
        if Run(folder).goal.task.key != task.key:
            raise SearchError(f"{folder} holds a search for another task; pass another --folder")
        return folder, None
    name = args.preset or chosen.preset
    numbers: dict[str, Any] = {**_pairs(args.set), **({"prices": _prices(args.price)} if args.price else {})}
    facts, ceilings = _described(args.device_file, task.device)
    models = args.model or chosen.model
    if models and chosen.base_url:
        models = ",".join(
            m if "@http" in m else f"{m.partition('#')[0]}@{chosen.base_url}#{chosen.api_key_env}" for m in models.split(",")
        )
    goal = Goal(
        task, budget.preset(name, **numbers), facts, ceilings, _floor(task, facts, ceilings), () if args.no_bank else bank(task),
        () if args.no_bank else neighbours(task), name, args.provider or chosen.provider, models, args.effort,
        args.notes.read_text() if args.notes else "",
    )  # fmt: skip
    if not goal.provider:
        raise SettingsError("no provider: pass --provider (openai, exchange or replay:JOURNAL) or set LLMKERNELS_PROVIDER")
    provider_for(goal.provider, folder, models=goal.models)  # a wrong name or a missing key fails before anything is written
    return folder, goal


def _task(text: str) -> Task:
    """A task from a file, or from the library's records and the store's decisions.

    Raises:
        SearchError: if there is none, or more than one.
    """
    path = Path(text)
    if path.suffix == ".json" or path.is_file():
        return _task_in(path)
    found = {task.key: task for task in _known_tasks() if text in task.key or text == task.signature}
    if len(found) != 1:
        names = "; ".join(f"{t.key[:8]} {t.signature} {shapes_of(t)} on {t.device}" for t in found.values())
        problem = f"{len(found)} tasks match {text!r}; give one by its key: {names}" if found else f"no task matches {text!r}"
        listing = "llmkernels cache list --library shows the keys of the shipped ones"
        raise SearchError(f"{problem}; {listing}; a task's JSON file will do as well (docs/search.md says how to write one)")
    return next(iter(found.values()))


def _task_in(path: Path) -> Task:
    """The task in a task's or record's file.

    Raises:
        SearchError: if the file cannot be read, or holds neither.
    """
    try:
        plain = json.loads(path.read_text())
    except OSError as error:
        raise SearchError(f"cannot read a task from {path}: {error.strerror}") from None
    except ValueError:
        raise SearchError(f"{path} is not a JSON file; a task's file is written as docs/search.md says") from None
    if not isinstance(plain, dict) or "program" not in plain.get("task", plain):
        raise SearchError(f"{path} holds neither a task nor a record; a task's file is written as docs/search.md says")
    return Task.from_json(plain.get("task", plain))


def _known_tasks() -> Iterator[Task]:
    from torch_llmkernels.cache.library import default_library
    from torch_llmkernels.cache.store import open_store

    chosen = knobs.current()
    yield from (record.task for record in default_library(chosen).records())
    yield from (decision.record.task for _, decision in open_store(chosen).decisions() if decision.record)


def bank(task: Task) -> tuple[tuple[str, str], ...]:
    """The library's kernels that serve the task, to start from: name and source of each."""
    from torch_llmkernels.cache.library import default_library

    kernels = default_library(knobs.current()).kernels(task.signature, task.device)
    return tuple((kernel.name, kernel.text) for kernel in kernels if kernel.why_not(task) is None)


def neighbours(task: Task, limit: int = 2) -> tuple[tuple[str, str], ...]:
    """Library kernels of signatures that share a stage with the task's, those that share most first: name and source of each."""
    from torch_llmkernels.cache.library import default_library

    library, stages = default_library(knobs.current()), set(task.signature.split("."))
    shared = {s: len(stages & set(s.split("."))) for s in library.signatures() if s != task.signature}
    near = sorted((s for s, count in shared.items() if count), key=lambda s: (-shared[s], s))
    return tuple((kernel.name, kernel.text) for s in near for kernel in library.kernels(s, task.device))[:limit]


def _described(path: Path | None, target: str) -> tuple[dict[str, Any], dict[str, Any]]:
    if path is None:
        return _measured(target)
    try:
        plain = json.loads(path.read_text())
        return plain["facts"], plain["ceilings"]
    except (OSError, ValueError, KeyError) as error:
        raise SearchError(f"cannot read device facts from {path}: {error!r}; write it with `llmkernels search device`") from None


def _measured(target: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Facts and ceilings of this machine's device."""
    from torch_llmkernels.evaluate.roofline import measure_ceilings
    from torch_llmkernels.kernels.targets import target_for

    if reason := target_for(target).unavailable():
        raise SearchError(f"{reason}; pass --device-file with what `llmkernels search device` printed where the device is")
    return target_for(target).facts().to_json(), measure_ceilings(target).to_json()


def _facts(goal: Goal) -> DeviceFacts:
    from torch_llmkernels.kernels.device import DeviceFacts

    return DeviceFacts.from_json(goal.facts)


def _floor(task: Task, facts: Mapping[str, Any], ceilings: Mapping[str, Any]) -> dict[str, Any]:
    from torch_llmkernels.evaluate import roofline
    from torch_llmkernels.kernels.device import DeviceFacts

    return vars(roofline.floor(task, DeviceFacts.from_json(facts), roofline.Ceilings.from_json(ceilings)))


def _check(goal: Goal) -> StaticCheck:
    return CompileCheck(_facts(goal))


def _provider(run: Run, wait_s: float = 0.0) -> Provider:
    goal, chosen = run.goal, knobs.current()
    return provider_for(
        goal.provider, run.directory, models=goal.models, base_url=chosen.base_url, api_key_env=chosen.api_key_env, wait_s=wait_s,
        concurrency=goal.settings.concurrency, max_output_tokens=goal.settings.max_output_tokens, reasoning_effort=goal.effort,
    )  # fmt: skip


@contextlib.contextmanager
def _pool(args: argparse.Namespace, goal: Goal) -> Iterator[Pool]:
    from torch_llmkernels.evaluate.pool import LocalPool, RayPool
    from torch_llmkernels.kernels.targets import target_for

    if args.pool == "ray":
        with RayPool(args.workers, gpus=float(goal.task.device == "cuda")) as pool:
            yield pool
        return
    if reason := target_for(goal.task.device).unavailable():
        raise SearchError(f"candidates cannot be evaluated on this machine: {reason}; copy the run to where the device is")
    with LocalPool([int(index) for index in args.device.split(",")]) as pool:
        yield pool


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """One process at a time drives a run.

    Raises:
        SearchError: if another one does.
    """
    from filelock import FileLock, Timeout

    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / "run.lock", timeout=0)
    try:
        lock.acquire()
    except Timeout:
        raise SearchError(f"another process is working on {folder}; wait for it, or stop it") from None
    try:
        yield
    finally:
        lock.release()


def _outcome(run: Run, args: argparse.Namespace) -> int:
    print(progress.line(run))
    winner = run.tree.candidates.get(run.tree.winner)
    if winner is None:
        print(_next(run))
        return 1 if run.tree.ended else 0
    record = record_of(run, winner)
    print(f"winner: {record.kernel_name}, {render.speed(record.evaluation)}; {run.tree.ended}")
    if args.store:
        _remember(record)
    if args.library:
        from torch_llmkernels.cache.library import Library

        print(Library(args.library).add(record))
    return 0


def _remember(record: Record) -> None:
    """Put the winner in the store as this device's decision."""
    from torch_llmkernels.cache.key import RecordKey
    from torch_llmkernels.cache.store import open_store
    from torch_llmkernels.kernels.targets import target_for

    store = open_store(knobs.current())
    decision = store.put_winner(RecordKey.of(record.task, target_for(record.task.device).facts()), record)
    best = decision.record
    if best is not None and best is not record:
        print(f"not stored: {best.kernel_name} is already there and runs at {best.evaluation.speedup:.2f}x the best baseline")
    else:
        print(f"stored in {store.directory}")


def _next(run: Run) -> str:
    """What has to happen for the search to go on."""
    state, tree = progress.summary(run), run.tree
    if tree.ended:
        failed = "" if tree.winner else "; no candidate passed the full check"
        return f"ended: {tree.ended}{failed}\nto go on: llmkernels search {_again(run)}"
    steps = []
    if state["waiting_for_replies"] and run.exchange:
        folder, waiting = run.exchange, state["prompts"]
        steps.append(f"waiting: {' '.join(waiting[:12])}{' ...' if len(waiting) > 12 else ''}")
        steps.append(f"answer {counted(len(waiting), 'prompt')}, {folder}/prompts/*.md in {folder}/replies/*.md, then: "
                     f"llmkernels search step {run.directory}")  # fmt: skip
    elif state["waiting_for_replies"]:
        steps.append(f"{state['waiting_for_replies']} prompts wait for the model: llmkernels search step {run.directory}")
    if state["withheld"]:
        steps.append(f"{state['not_issued']} prompts are not issued: budget: {state['withheld']}")
    if count := state["waiting_for_evaluation"]:
        first = "" if tree.rounds else " before the first prompt (search start --no-bank leaves known kernels out)"
        waiting = counted(count, "candidate" if tree.rounds else "known kernel")
        steps.append(f"{waiting} to be evaluated on the device{first}: llmkernels search evaluate {run.directory}")
    return "\n".join(steps) or f"next: llmkernels search step {run.directory}"


def _again(run: Run) -> str:
    """The action that goes on with an ended search: the number that it ended at, changed; a step if its endpoint failed."""
    settings, ended = run.goal.settings, run.tree.ended
    limits = ("max_tokens", "max_candidates", "max_seconds", "max_cost")
    if ended.startswith("provider"):
        return f"step {run.directory}"
    if name := next((name for name in limits if f"({name}" in ended), ""):
        return f"extend {run.directory} {name}={2 * getattr(settings, name):.12g}"
    if ended.startswith("floor"):
        return f"extend {run.directory} floor_margin={settings.floor_margin / 2:g}"
    name = "patience" if ended.startswith("plateau") else "rounds"
    return f"extend {run.directory} {name}={getattr(settings, name) + 2}"


def _estimate(goal: Goal) -> budget.Estimate:
    """The size of the search, from prompts as they will be rendered."""
    from torch_llmkernels.search.tree import Tree

    tree = Tree(goal.settings)
    node = IdeaNode("", "r1.s0.i0", 1, "", "", Idea("memory access", "x" * 300, "x" * 100))
    asked = "".join(render.ideas_prompt(goal, tree, None, 1))
    return budget.estimate(goal.settings, asked, "".join(render.code_prompt(goal, tree, node, 0)))


def _pairs(texts: list[str]) -> dict[str, str]:
    pairs = {}
    for text in texts:
        name, separator, value = text.partition("=")
        if not separator:
            raise SettingsError(f"{text!r}: write NAME=VALUE")
        pairs[name] = value
    return pairs


def _prices(texts: list[str]) -> list[tuple[str, float, float]]:
    rows = []
    for model, value in _pairs(texts).items():
        try:
            into, out = (float(v) for v in value.split(","))
        except ValueError:
            raise SettingsError(f"--price {model}={value}: write MODEL=IN,OUT, prices of a million tokens") from None
        rows.append((model, into, out))
    return rows
