"""The ranks of one job decide alike: whichever meets a graph first decides for it, the others take over what it decided.

Ranks of a job (torchrun, DDP, FSDP) compile the same graphs at about the same time. Left alone they would verify the same kernels
side by side, and a rank that finds a task's lock taken, or another library, would compile other code than its peers: gradients
that are summed would come from different kernels. So a graph is decided once per job, by the rank that claims it in the job's
key-value store (the one that `init_process_group` made); the others wait, at most as long as a verification may take, and adopt
the outcome. Nobody runs a collective: a rank that never compiles the graph is never waited for, and what was published stays
published, so a job keeps one snapshot of its kernels until it ends.

Waiting costs a synchronous job nothing, its next collective would wait for the slowest rank anyway. A search is another matter:
it takes longer than collectives may, so in a job `on_miss="search"` searches behind, and every rank keeps Inductor until the
next job.
"""

from __future__ import annotations

import base64
import functools
import json
import logging
import threading
import time
import zlib
from collections.abc import Callable, Sequence
from typing import Any

import torch

from torch_llmkernels.evaluation import Decision
from torch_llmkernels.settings import Settings
from torch_llmkernels.task import canonical_json

log = logging.getLogger("torch_llmkernels.ranks")

PREFIX = "torch_llmkernels/"
POLL_S = 0.05
"""A waiting rank asks this often. A blocking wait would hold the store's connection, which torch's own watchdogs use as well."""

_polling = threading.Event()  # never set: only its timed wait is used


def job_store() -> Any:
    """The key-value store of the job that this process is a rank of; None outside one, or before `init_process_group`.

    None too for a store that cannot compare and set, such as that of torch's fake process group: every rank decides for itself.
    """
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    if torch.distributed.get_world_size() < 2:
        return None
    from torch.distributed.distributed_c10d import _get_default_store

    store = _get_default_store()
    return store if _can_agree(store) else None


def _can_agree(store: Any) -> bool:
    """Whether a store has what `agree` needs.

    Raises:
        torch.distributed.DistError: if it has, and cannot be reached.
    """
    try:
        store.compare_set(f"{PREFIX}probe", "", "1")
        store.check([f"{PREFIX}probe"])
    except torch.distributed.DistError:
        raise
    except RuntimeError:  # how c10d says that a store lacks an operation
        _log_once("the key-value store of this job cannot compare and set, so each rank decides for itself")
        return False
    return True


@functools.cache
def _log_once(message: str) -> None:
    log.warning("%s", message)


def settings_in_job(settings: Settings) -> Settings:
    """The knobs of a rank: a search goes on behind, instead of holding the other ranks up in a collective."""
    return settings.updated({"on_miss": "background"}) if settings.on_miss == "search" else settings


def patience_s(settings: Settings) -> float:
    """Seconds that a rank waits for another's decision: the verification budget, and the evaluation that it may end with."""
    return settings.verify_budget_s + settings.worker_timeout_s


def agree(store: Any, key: str, count: int, decide: Callable[[], Sequence[Decision]], wait_s: float) -> list[Decision]:
    """The job's decisions for one graph: this rank's own, if it is the first that asks.

    Args:
        store: From `job_store`.
        key: What the decisions are for; equal on every rank that must agree.
        count: Number of decisions.
        decide: Makes them here.
        wait_s: How long another rank may take. After that, Inductor is the decision of the whole job for this graph.
    """
    name, me = PREFIX + key, f"rank {torch.distributed.get_rank()}"
    owner = store.compare_set(f"{name}/owner", "", me).decode()
    if owner == me and not store.check([name]):
        return _decide_for_all(store, name, count, decide)
    deadline = time.monotonic() + wait_s
    while not store.check([name]) and time.monotonic() < deadline:
        _polling.wait(POLL_S)
    if not store.check([name]):
        log.warning("%s has not decided about graph %s in %.0f s: every rank keeps Inductor for it", owner, key, wait_s)
    late = [Decision(None, f"kept Inductor: {owner} of the job did not decide in {wait_s:.0f} s")] * count
    return _published(store, name, late)


def _decide_for_all(store: Any, name: str, count: int, decide: Callable[[], Sequence[Decision]]) -> list[Decision]:
    """Decide and publish; an error here is Inductor for everyone else, who would otherwise wait for nothing."""
    try:
        decided = list(decide())
    except BaseException as error:
        failed = f"kept Inductor: the rank that decides for the job failed ({type(error).__name__}: {error})"
        _published(store, name, [Decision(None, failed)] * count)
        raise
    return _published(store, name, decided)


def _published(store: Any, name: str, decisions: Sequence[Decision]) -> list[Decision]:
    """Publish decisions if nothing is published yet; what is published then, which only the first of all ranks can set."""
    mine = _encode(decisions)
    found = store.compare_set(name, "", mine).decode()
    return list(decisions) if found == mine else _decode(found)


def _encode(decisions: Sequence[Decision]) -> str:
    plain = canonical_json([decision.to_json() for decision in decisions])
    return base64.b64encode(zlib.compress(plain.encode())).decode()


def _decode(text: str) -> list[Decision]:
    return [Decision.from_json(plain) for plain in json.loads(zlib.decompress(base64.b64decode(text)))]
