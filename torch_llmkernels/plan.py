"""What a captured graph holds: the tasks found in it once, remembered under a digest of the graph.

Knowing the tasks before the graph is traced saves the second trace, and lets the key of torch's compile caches depend on what
was decided for exactly these tasks. A plan holds no decision, so it cannot be stale: tasks are looked up anew each time.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import logging
import re
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import fx

import torch_llmkernels
from torch_llmkernels.errors import LLMKernelsError, SchemaError
from torch_llmkernels.evaluation import SCHEMA, Record
from torch_llmkernels.options import Request
from torch_llmkernels.registry import RegionReport
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import Task, canonical_json, digest

log = logging.getLogger("torch_llmkernels.plan")


@dataclasses.dataclass(frozen=True)
class Plan:
    """The regions of one captured graph, forward and backward.

    Attributes:
        tasks: In graph order; equal regions give equal tasks.
        skipped: Regions that were recognised but not taken, and why.
    """

    tasks: tuple[Task, ...]
    skipped: tuple[RegionReport, ...] = ()

    def to_bytes(self) -> bytes:
        """For the store."""
        skipped = [[r.signature, r.reason] for r in self.skipped]
        return canonical_json({"schema": SCHEMA, "tasks": [t.to_json() for t in self.tasks], "skipped": skipped}).encode()

    @classmethod
    def from_bytes(cls, blob: bytes) -> Plan:
        """The inverse of `to_bytes`.

        Raises:
            SchemaError: for another schema version or damaged bytes.
        """
        try:
            plain = json.loads(blob)
            if plain["schema"] != SCHEMA:
                raise SchemaError(f"plan schema {plain['schema']!r}, this release reads {SCHEMA}")
            skipped = tuple(RegionReport(signature, "", "", False, reason) for signature, reason in plain["skipped"])
            return cls(tuple(Task.from_json(t) for t in plain["tasks"]), skipped)
        except (ValueError, KeyError, TypeError) as error:
            raise SchemaError(f"plan is damaged: {error!r}") from error


_plans: dict[str, Plan] = {}
_PREFIX = "plan/"


def recall(key: str, settings: Settings) -> Plan | None:
    """The plan remembered under `key`, here or in the store; None if there is none that can be read, or `key` does not last."""
    if not is_lasting(key):
        return None
    if key in _plans:
        return _plans[key]
    try:
        blob = _store(settings).get(_PREFIX + key)
        if blob is not None:
            _plans[key] = Plan.from_bytes(blob)
    except LLMKernelsError as error:
        log.info("no remembered plan: %s", error)
    return _plans.get(key)


def remember(key: str, found: Plan, settings: Settings) -> None:
    """Keep a plan, here and in the store, if its key lasts."""
    if not is_lasting(key):
        return
    _plans[key] = found
    try:
        _store(settings).put(_PREFIX + key, found.to_bytes())
    except LLMKernelsError as error:
        log.info("plan kept in this process only: %s", error)


def stored(settings: Settings) -> Iterator[Plan]:
    """Every plan in the store that this release can read: what was captured here, graph by graph."""
    store = _store(settings)
    for key in store.keys(_PREFIX):
        with contextlib.suppress(SchemaError):
            yield Plan.from_bytes(store.get(key) or b"")


def forget() -> None:
    """Drop the plans of this process (not the store's)."""
    _plans.clear()


def _store(settings: Settings) -> Any:
    from torch_llmkernels.cache.store import open_store

    return open_store(settings)


def graph_digest(gm: fx.GraphModule, example_inputs: Sequence[Any], request: Request) -> str:
    """Digest of everything that decides which tasks a captured graph holds: code, tensors, modes and flags; see `lasting`."""
    modules = [(name, module) for name, module in gm.named_modules()]
    code = [[name, module.graph.python_code("self").src] for name, module in modules if isinstance(module, fx.GraphModule)]
    leaves = [[name, repr(module)] for name, module in modules if not isinstance(module, fx.GraphModule)]
    state = [[name, _describe(t)] for name, t in (*gm.named_parameters(), *gm.named_buffers())]
    hints = [_hints(value) for value in example_inputs] if request.settings.specialize else []
    inputs, options = [_describe(value) for value in example_inputs], named_options(request)
    freezing = repr(request.inductor_option("freezing"))
    return lasting([options, leaves, inputs], digest([
        source_digest(), torch.__version__, code, leaves, state, inputs, options, freezing,
        request.library.digest, request.settings.max_regions, hints, _flags(),
    ]))  # fmt: skip


_ADDRESS = " at 0x"
_PASSING = "passing/"


def named_options(request: Request) -> list[tuple[str, str]]:
    """Inductor's options of a request in words that mean the same in every process, as far as their values have such a name."""
    return sorted((name, _named(value)) for name, value in request.inductor.config.items())


def _named(value: Any) -> str:
    """A pass by its `uuid`, a function or class by its qualified name; a value without a name by its address."""
    if callable(getattr(value, "uuid", None)) and not isinstance(value, type):
        uuid = value.uuid()
        return f"{type(value).__module__}.{type(value).__qualname__} {uuid!r}" if uuid else f"{_ADDRESS}{id(value):x}"
    name = getattr(value, "__qualname__", None)
    if isinstance(name, str):  # one made in a function, or without a name, may be another in the next process
        return f"{_ADDRESS}{id(value):x}" if "<" in name else f"{value.__module__}.{name}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__} of {[_named(each) for each in value]}"
    if isinstance(value, dict):
        return f"dict of {[(_named(key), _named(each)) for key, each in value.items()]}"
    return repr(value)


def lasting(described: Any, key: str) -> str:
    """`key`, marked as one that means nothing in another process if an address is among what it was made of."""
    return f"{_PASSING}{key}" if _ADDRESS in str(described) else key


def without_addresses(described: str) -> str:
    """A description with every address left out."""
    return re.sub(f"{_ADDRESS}[0-9a-f]+", "", described)


def is_lasting(key: str) -> bool:
    """Whether something may be remembered under this key: an address may be of another object by the next time."""
    return not key.startswith(_PASSING)


def _describe(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"{type(value).__name__} {value}"
    device = f"{value.device} {torch.cuda.get_device_capability(value.device) if value.is_cuda else ''}"
    return f"{value.dtype} {tuple(value.shape)} {_strides(value)} {device} {value.requires_grad} {type(value).__name__}"


def _hints(value: Any) -> list[int | None]:
    """The sizes that are seen now: with `specialize`, tasks are looked up at them."""
    sizes = value.shape if isinstance(value, torch.Tensor) else [value]
    return [size.node.hint if isinstance(size, torch.SymInt) else None for size in sizes]


def _strides(value: torch.Tensor) -> str:
    return str(tuple(value.stride())) if value.layout is torch.strided else str(value.layout)


def _flags() -> list[str]:
    backends = torch.backends
    values = (
        torch.is_grad_enabled(), torch.is_inference_mode_enabled(), torch.are_deterministic_algorithms_enabled(),
        [(d, torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in ("cpu", "cuda")],
        [b.fp32_precision for b in (backends.cuda.matmul, backends.cudnn.conv, backends.mkldnn.matmul, backends.mkldnn.conv)],
        backends.cuda.matmul.allow_fp16_reduced_precision_reduction, backends.cuda.matmul.allow_bf16_reduced_precision_reduction,
        backends.cudnn.enabled, backends.mkldnn.enabled, backends.cuda.flash_sdp_enabled(), backends.cuda.math_sdp_enabled(),
        backends.cuda.mem_efficient_sdp_enabled(), backends.cuda.cudnn_sdp_enabled(),
    )  # fmt: skip
    return [str(value) for value in values]


@functools.cache
def source_digest() -> str:
    """Digest of the release and of the code that finds, keys and swaps regions: a change of either is another compiler."""
    return digest([torch_llmkernels.__version__, SCHEMA, *(digest(path.read_text()) for path in source_files())])


_SOURCES = (
    "graph/*.py", "backend.py", "passes.py", "task.py", "program.py", "kernels/source.py", "kernels/header.py",
    "kernels/launch.py", "kernels/expression.py",
)  # fmt: skip
"""What finds, keys and swaps regions. Of the kernels' code: which tasks a kernel serves, what it prepares, its workspaces."""


def source_files() -> list[Path]:
    """The files of `source_digest`."""
    return [path for pattern in _SOURCES for path in sorted(Path(__file__).parent.glob(pattern))]


def record_digest(record: Record) -> str:
    """Digest of what a swap puts into the graph: the kernel's source and its constants."""
    return digest([record.task.key, record.kernel_name, record.kernel_text, [list(pair) for pair in record.constants]])


_fuel_lock = threading.Lock()
_fuel_used = 0


def take_fuel(limit: int) -> bool:
    """Whether one more region may be swapped in this process; counts it if so. `limit` -1: no limit."""
    global _fuel_used
    with _fuel_lock:
        if 0 <= limit <= _fuel_used:
            return False
        _fuel_used += 1
        return True
