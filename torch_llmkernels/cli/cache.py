"""`llmkernels cache`: look into the user's store, carry it elsewhere, clean it."""

from __future__ import annotations

import argparse
import json
import logging
import math
from collections import Counter
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from torch_llmkernels import settings as knobs
from torch_llmkernels.cli import output
from torch_llmkernels.errors import LLMKernelsError, SchemaError, StoreError
from torch_llmkernels.words import counted, shapes_of

if TYPE_CHECKING:
    from torch_llmkernels.cache.store import Store
    from torch_llmkernels.evaluation import Record
    from torch_llmkernels.settings import Settings

log = logging.getLogger("torch_llmkernels.cache")


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command and its actions."""
    group = subparsers.add_parser("cache", help="the persistent store: list, show, verify, export, import, rm")
    actions = group.add_subparsers(title="actions", metavar="ACTION", required=True)

    parser = actions.add_parser("list", help="what is stored, or with --library what is shipped: one line per task, with its key")
    parser.add_argument("--library", action="store_true", help="the records of the kernel library instead of the store")
    output.add_json(parser)
    parser.set_defaults(run=_list)

    parser = actions.add_parser("show", help="one entry in full")
    parser.add_argument("key", help="its key, or a part of it that no other key has")
    parser.set_defaults(run=_show)

    parser = actions.add_parser("verify", help="check that every entry can be read (1 if not)")
    parser.add_argument("--run", dest="evaluate", action="store_true", help="also check every kernel again on this device")
    output.add_json(parser)
    parser.set_defaults(run=_verify)

    parser = actions.add_parser("export", help="write decisions and kernels to a portable file")
    parser.add_argument("file", help="the bundle to write, usually *.llmk")
    parser.add_argument("--binaries", action="store_true", help="include compiled code (an import leaves it out)")
    parser.set_defaults(run=_export)

    parser = actions.add_parser("import", help="add a bundle's kernels as candidates and verify them on this device, once")
    parser.add_argument("file", help="a bundle")
    parser.add_argument("--later", action="store_true", help="verify nothing now: the first compilation that needs a kernel does")
    parser.set_defaults(run=_import)

    parser = actions.add_parser("rm", help="remove one entry, or all decisions about a task")
    parser.add_argument("key", help="the entry's key, or a part of it that no other key has; or the key of a task")
    parser.set_defaults(run=_rm)


def _open(strict: bool = False, writing: bool = False) -> Store:
    """The user's store.

    Raises:
        StoreError: if it cannot be used, or with `writing` not be written.
    """
    from torch_llmkernels.cache.store import Store

    store = Store(knobs.current().store_directory(), strict=strict)
    if writing and store.is_read_only:
        raise StoreError(f"store {store.directory} is read-only; nothing was changed. Name another with LLMKERNELS_CACHE_DIR")
    return store


def _find(store: Store, wanted: str) -> str:
    """The one key that is `wanted` or contains it.

    Raises:
        StoreError: if there is none, or more than one.
    """
    keys = store.keys()
    found = [wanted] if wanted in keys else [key for key in keys if wanted in key]
    if not found:
        raise StoreError(f"no entry of {store.directory} has {wanted!r} in its key; see: llmkernels cache list")
    if len(found) > 1:
        raise StoreError(f"{wanted!r} is in {len(found)} keys; give more of one: {', '.join(found[:5])}")
    return found[0]


def _list(args: argparse.Namespace) -> int:
    if args.library:
        return _list_library(args)
    store = _open()
    keys = store.keys()
    rows = [_row(store, key) for key in keys if not key.startswith("meta/")]
    if args.json:
        output.print_json([dict(zip(("key", "size", "what"), row, strict=True)) for row in rows])
    else:
        output.print_table(f"store {store.directory}", ("key", "bytes", "what"), rows)
    return 0


def _list_library(args: argparse.Namespace) -> int:
    """The library's records by task key, which is what `llmkernels repro` and `llmkernels search start` take."""
    from torch_llmkernels.cache.library import default_library

    library = default_library(knobs.current())
    columns = ("key", "device", "region", "kernel", "of the best", "inputs")
    rows = []
    for record in library.records():
        speedup, task = record.evaluation.speedup, record.task
        ratio = f"{speedup:.2f}x" if speedup else "-"
        rows.append((task.key, record.device_kind, task.signature, record.kernel_name, ratio, shapes_of(task)))
    if args.json:
        output.print_json([dict(zip(columns, row, strict=True)) for row in rows])
    else:
        output.print_table(f"library {library.root}: records", columns, rows)
    return 0


def _row(store: Store, key: str) -> tuple[str, int, str]:
    value = store.get(key)
    try:
        return key, len(value or b""), "unreadable" if value is None else _what(key, value)
    except (LLMKernelsError, ValueError, KeyError, TypeError) as error:
        return key, len(value or b""), f"unreadable: {error}"


def _what(key: str, value: bytes) -> str:
    """One line about an entry; other parts of the package keep entries under prefixes of their own."""
    if key.startswith("decision/"):
        plain = json.loads(value)
        return f"{plain['key']['device_kind']}, {plain['key']['tensors']}: {_found(plain['decision'])}"
    if key.startswith("imported/"):
        plain = json.loads(value)
        return f"candidate {plain['kernel_name']} of {plain['origin']}, measured on {plain['device_kind']}"
    if key.startswith(("graph/", "imported-graph/")):
        plain = json.loads(value)
        count = f"{len(plain['swapped'])} kernels stay, {len(plain['vetoed'])} do not pay"
        return f"whole graph on {plain['device_kind']}: {count}"
    if key.startswith("imported-decision/"):
        return f"tried elsewhere: {_found(json.loads(value)['decision'])}"
    return "compiled code" if key.startswith("binary/") else key.partition("/")[0]


def _found(decision: dict[str, Any]) -> str:
    """What verification found; whether it is enough for a swap is decided at each lookup, by the knobs in force there."""
    from torch_llmkernels.evaluation import Decision

    found = Decision.from_json(decision)
    if found.record is None:
        return ", ".join(f"{name} {evaluation.status}" for name, evaluation in found.tried) or found.reason
    speedup = found.record.evaluation.speedup
    return f"{found.record.kernel_name} is correct" + (f", {speedup:.2f}x the best baseline" if speedup else ", not timed")


def _show(args: argparse.Namespace) -> int:
    store = _open(strict=True)
    key = _find(store, args.key)
    value = store.get(key) or b""
    if key.startswith("binary/"):
        raise StoreError(f"{key} is compiled code of {len(value)} bytes; llmkernels cache export --binaries writes it to a file")
    text = value.decode()
    print(json.dumps(json.loads(text), indent=1) if text.startswith("{") else text)
    return 0


def _verify(args: argparse.Namespace) -> int:
    from torch_llmkernels.cache.library import default_library

    store, library = _open(strict=True), default_library(knobs.current())
    problems = list(_unreadable(store))
    problems += [f"{library.root}: {line}" for line in _broken_kernels(library)]
    if args.evaluate:
        problems += list(_failing(store))
    if args.json:
        output.print_json(problems)
    else:
        for line in problems:
            print(line)
        print(f"{len(store.keys())} entries in {store.directory}, {counted(len(problems), 'problem')}")
    return int(bool(problems))


def _unreadable(store: Store) -> Iterator[str]:
    from torch_llmkernels.cache.key import RecordKey
    from torch_llmkernels.evaluation import Decision, Record

    keys = store.keys()
    for key in keys:
        try:
            value = store.get(key)
            if key.startswith("decision/") and value is not None:
                plain = json.loads(value)
                Decision.from_json(plain["decision"])
                if f"decision/{RecordKey.from_json(plain['key']).text}" != key:
                    raise SchemaError("its fields do not give its key")
            elif key.startswith("imported/") and value is not None:
                Record.from_json(json.loads(value))
        except (StoreError, ValueError, KeyError, TypeError) as error:
            yield f"{key}: {error}; remove it with: llmkernels cache rm {key}"


def _broken_kernels(library: Any) -> Iterator[str]:
    from torch_llmkernels.cache.library import Library

    yield from (reason for _, reason in library.broken())
    try:
        list(Library(library.root, strict=True).records())
    except LLMKernelsError as error:
        yield str(error)


def _failing(store: Store) -> Iterator[str]:
    """Records whose kernel is not accepted on this device, now."""
    from torch_llmkernels.kernels.source import parse_kernel
    from torch_llmkernels.resolve import evaluate

    settings = knobs.current()
    for record in stored_records(store):
        kernel = parse_kernel(record.kernel_text, record.kernel_name)
        evaluation = evaluate(record.task, kernel, record, settings)
        name = f"{record.task.signature} {record.task.key} {record.kernel_name}"
        if evaluation.status.is_correct:
            log.info("%s: %s", name, evaluation.status)
        else:
            yield f"{name}: {evaluation.status}: {evaluation.detail}"


def stored_records(store: Store) -> list[Record]:
    """Every record in the store: of decisions, then imported candidates."""
    return [decision.record for _, decision in store.decisions() if decision.record is not None] + store.all_imported()


def _export(args: argparse.Namespace) -> int:
    from torch_llmkernels.cache import bundle

    store = _open()
    names = [key.removeprefix("binary/") for key in store.keys("binary/")] if args.binaries else []
    binaries = {name: store.binary(name) or b"" for name in names}
    count = bundle.export(args.file, store.all_imported(), store.decisions(), binaries, store.graph_decisions())
    print(f"wrote {count} {'entry' if count == 1 else 'entries'} to {args.file}")
    return 0


def _import(args: argparse.Namespace) -> int:
    from torch_llmkernels.cache import bundle
    from torch_llmkernels.evaluation import Record

    store = _open(writing=True)
    done = bundle.import_(args.file, store)
    print(f"added {counted(len(done.records), 'candidate')} to {store.directory}")
    if done.graphs:
        print(f"added {counted(len(done.graphs), 'whole-graph decision')}; they count on devices of the same kind and driver")
    if done.decisions:
        print(f"added {counted(len(done.decisions), 'decision')}: what lost there is not verified on devices like that one")
    for line in done.skipped:
        print(f"left out {line}")
    records = [Record.from_json(json.loads(store.get(key) or b"")) for key in done.records]
    waiting = [(record, why_waiting(record)) for record in records]
    for why, count in Counter(why for _, why in waiting if why).items():
        print(f"{counted(count, 'candidate')} not verified here: {why}")
    here = [record for record, why in waiting if not why]
    if args.later:
        print(f"{counted(len(here), 'candidate')} for this device; each is verified before its first use")
        return 0
    verify_imported(here, knobs.current())
    return 0


def why_waiting(record: Record) -> str:
    """Why an imported kernel cannot be verified on this machine; empty if it can."""
    from torch_llmkernels.kernels.targets import target_for

    target = target_for(record.task.device)
    if reason := target.unavailable():
        return f"they are for {record.device_kind}, and no {record.task.device} kernel can run here: {reason}"
    kind = target.facts().kind
    return "" if record.device_kind == kind else f"they are for {record.device_kind}, this device is {kind}"


def verify_imported(records: Sequence[Record], settings: Settings) -> None:
    """Decide the tasks of imported kernels as their first compilation would, however long it takes, and build the winners.

    One line per task says what was decided. An interruption loses nothing: what is left is verified before its first use.
    """
    from torch_llmkernels.precompilation.run import build_all
    from torch_llmkernels.resolve import Resolver

    resolver = Resolver(settings.updated({"verify_budget_s": math.inf, "on_miss": "fallback"}))
    for task in {record.task.key: record.task for record in records}.values():
        decision = resolver.decide(task)
        print(f"{task.signature} {task.key[:8]}: {decision.reason}", flush=True)
        if decision.record is not None:
            build_all({task.key: decision.record}, settings)


def _rm(args: argparse.Namespace) -> int:
    store = _open(writing=True)
    # a task's own key stands for all its decisions: with other versions of torch, drivers and devices it has several
    kept = [*store.keys("decision/"), *store.keys("imported-decision/")]
    decisions = [key for key in kept if args.key in key.split("/")[2:3]]
    for key in decisions or [_find(store, args.key)]:
        store.delete(key)
        print(f"removed {key}")
    return 0
