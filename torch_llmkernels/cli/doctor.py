"""`llmkernels doctor`: what is installed here, what would be used, and what is wrong."""

from __future__ import annotations

import argparse
import dataclasses
import os
import platform
import shutil
from collections import Counter
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from torch_llmkernels import settings as knobs
from torch_llmkernels.cli import output
from torch_llmkernels.errors import LLMKernelsError
from torch_llmkernels.settings import Settings

_TORCH_MIN, _TORCH_END = (2, 11), (2, 15)


@dataclasses.dataclass(frozen=True)
class Finding:
    """One line of the report.

    Attributes:
        topic: What was looked at.
        state: `ok`, `note` (works, with less) or `problem` (fix it).
        detail: What was found, and what to do about a problem.
    """

    topic: str
    state: str
    detail: str


def register(subparsers: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Add the command."""
    parser = subparsers.add_parser("doctor", help="versions, devices, compiler, store, library, and what would be used")
    output.add_json(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Print the findings; 1 if there is a problem."""
    findings = examine(knobs.current())
    if args.json:
        output.print_json([dataclasses.asdict(finding) for finding in findings])
    else:
        output.print_table("llmkernels doctor", ("topic", "state", "found"), [dataclasses.astuple(f) for f in findings])
    return int(any(finding.state == "problem" for finding in findings))


def examine(settings: Settings) -> list[Finding]:
    """Every finding, in the order of the report."""
    steps: tuple[Callable[[Settings], Iterator[Finding]], ...] = (_versions, _toolchains, _targets, _store, _library, _provider)
    findings: list[Finding] = []
    for step in steps:
        try:
            findings += step(settings)
        except LLMKernelsError as error:
            findings.append(Finding(step.__name__.strip("_"), "problem", str(error)))
    return findings


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _versions(settings: Settings) -> Iterator[Finding]:
    yield Finding("torch-llmkernels", "ok", _version("torch-llmkernels") or "not installed (used from a checkout)")
    yield Finding("python", "ok", f"{platform.python_version()} on {platform.platform()}")
    import torch

    numbers = tuple(int(part) for part in torch.__version__.split("+")[0].split(".")[:2])
    fits = _TORCH_MIN <= numbers < _TORCH_END
    wanted = "" if fits else "; this release is made for 2.11 to 2.14"
    yield Finding("torch", "ok" if fits else "problem", f"{torch.__version__}, CUDA {torch.version.cuda or 'none'}{wanted}")
    listed = "llmkernels" in torch._dynamo.list_backends()
    advice = "torch.compile finds it by name" if listed else "its entry point is not installed; run: pip install -e ."
    yield Finding("backend", "ok" if listed else "problem", advice)


def _toolchains(settings: Settings) -> Iterator[Finding]:
    wanted = settings.cxx or os.environ.get("CXX")
    candidates = [wanted] if wanted else ["g++", "clang++"]
    found = next((path for path in map(shutil.which, candidates) if path), None)
    missing = f"none of {', '.join(candidates)} found; CPU regions stay with Inductor. Install g++ or set LLMKERNELS_CXX"
    yield Finding("C++ compiler", "ok" if found else "note", found or missing)
    bindings, nvrtc = _version("cuda-bindings"), _version("nvidia-cuda-nvrtc") or _version("nvidia-cuda-nvrtc-cu12")
    if bindings:
        yield Finding("cuda-bindings", "ok", f"{bindings}, NVRTC {nvrtc or 'of the system'}")
    else:
        yield Finding(
            "cuda-bindings", "note", "not installed; CUDA regions stay with Inductor. pip install 'torch-llmkernels[cuda]'"
        )


def _targets(settings: Settings) -> Iterator[Finding]:
    from torch_llmkernels.kernels.targets import target_for

    used = []
    for name in ("cuda", "cpu"):
        target = target_for(name)
        if reason := target.unavailable():
            yield Finding(f"target {name}", "note", f"not used: {reason}")
            continue
        facts = target.facts()
        used.append(name)
        words = (facts.name, facts.kind, facts.arch, facts.driver and f"driver {facts.driver}")
        yield Finding(f"target {name}", "ok", ", ".join(filter(None, words)))
    if used:
        yield Finding("in use", "ok", "; ".join(f"{name} tensors: {name} kernels" for name in used))
    else:
        yield Finding("in use", "problem", "no target works here, so every region stays with Inductor; see the notes above")


def _store(settings: Settings) -> Iterator[Finding]:
    from torch_llmkernels.cache.store import Store

    store = Store(settings.store_directory())
    keys = store.keys()
    kinds = Counter(key.split("/")[0] for key in keys)
    entries = ", ".join(f"{count} {kind}" for kind, count in sorted(kinds.items())) or "empty"
    yield Finding("store", "ok", f"{store.directory}: {entries}; {_size(store.directory)}")
    if damaged := sorted(store.directory.glob("cache.db.damaged-*[0-9]")):
        names = ", ".join(path.name for path in damaged)
        yield Finding("store", "note", f"damaged databases were moved aside: {names}; delete them if nothing in them is missed")


def _size(directory: Path) -> str:
    return f"{sum(path.stat().st_size for path in directory.rglob('*') if path.is_file()) / 2**20:.1f} MiB"


def _library(settings: Settings) -> Iterator[Finding]:
    from torch_llmkernels.cache.library import SUFFIX, default_library

    library = default_library(settings)
    signatures = library.signatures()
    state = "ok" if signatures else "problem"
    advice = "" if signatures else "; there is no kernel in it: reinstall the package or set LLMKERNELS_LIBRARY_DIR"
    records = sum(1 for _ in library.records())
    yield Finding(
        "library", state, f"{library.root}: {len(signatures)} signatures, {records} records, digest {library.digest}{advice}"
    )
    for signature in signatures:
        kernels = {target: library.kernels(signature, target) for target in SUFFIX}
        names = "; ".join(f"{target}: {', '.join(k.name for k in found)}" for target, found in kernels.items() if found)
        if names:
            yield Finding(f"  {signature}", "ok", names)
    for path, reason in library.broken():
        yield Finding(f"  {path.parent.name}", "problem", f"does not parse, so it is skipped: {reason}; mend or delete the file")


def _provider(settings: Settings) -> Iterator[Finding]:
    if not settings.provider:
        yield Finding("provider", "ok", "none: nothing is searched. LLMKERNELS_PROVIDER names a language model")
        return
    parts = [settings.provider]
    if settings.model:
        parts.append(f"model {settings.model}")
    if settings.base_url:
        parts.append(f"at {_without_secrets(settings.base_url)}")
    if settings.provider == "openai":
        parts.append(f"key in ${settings.api_key_env}: {'set' if os.environ.get(settings.api_key_env) else 'not set'}")
    yield Finding("provider", "ok", ", ".join(parts))


def _without_secrets(url: str) -> str:
    parts = urlsplit(url)
    host = parts.hostname or ""
    port = f":{parts.port}" if parts.port else ""
    return f"{parts.scheme}://{host}{port}{parts.path}"
