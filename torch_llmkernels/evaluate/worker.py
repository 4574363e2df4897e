"""Evaluations in a process of their own, which may hang, crash or be killed without harm to the caller.

One long-lived child per `Worker`, spoken to in lines of JSON over two pipes: importing torch takes seconds, an evaluation less.
Nothing that the child sends is unpickled. It has no standard input, its output goes to a log, and the variables of the
environment that look like credentials are not passed on. This contains mistakes; it is no sandbox against malice.

Run as a module it is that child: `python -m torch_llmkernels.evaluate.worker READ_FD WRITE_FD`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import logging
import os
import re
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

from torch_llmkernels import settings as knobs
from torch_llmkernels.errors import LLMKernelsError, SchemaError, WorkerDied, WorkerError, WorkerTimeout
from torch_llmkernels.evaluate.job import Job
from torch_llmkernels.evaluate.run import compile_ahead, evaluate, is_exhausted
from torch_llmkernels.evaluation import Evaluation, Status
from torch_llmkernels.settings import Settings

log = logging.getLogger("torch_llmkernels.evaluate")

START_TIMEOUT_S = 180.0
ORPHAN_GRACE_S = 30.0
"""Seconds after a job's limit at which a child whose parent is gone ends itself."""
IDLE_S = 60.0
"""Seconds without a job after which a child ends: it holds memory, of the device too. The next job starts another."""
LAST_WORDS_S = 10.0
"""Seconds that a child which takes no more jobs has to end its answers and itself."""
LARGEST_FILE = 4 << 30
LOG_TAIL = 600
_FROM_OUTSIDE = (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)
_SECRET = re.compile(
    r"KEY|TOKEN|SECRET|PASSW|CREDENTIAL|AUTH|COOKIE|SESSION|PRIVATE|^AWS_|^AZURE_|^GOOGLE_|^GH_|^HF_", re.IGNORECASE
)


_MALLOC = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2 << 30)}
"""glibc keeps freed memory instead of returning it page by page: a float64 reference allocates a tensor per operator. Baselines
that allocate their outputs do not pay for page faults either, which kernels, whose outputs are there, never do."""


def clean_environment(environ: Mapping[str, str], settings: Settings) -> dict[str, str]:
    """The child's environment: the caller's without credentials, and with a module path that finds this package."""
    kept = _MALLOC | {k: v for k, v in environ.items() if not _SECRET.search(k) and k != settings.api_key_env}
    package_root = str(Path(__file__).parents[2])
    kept["PYTHONPATH"] = os.pathsep.join([package_root, *filter(None, [environ.get("PYTHONPATH", "")])])
    return kept


class Worker:
    """A child process that evaluates jobs, one at a time; started at first use, restarted after it died.

    Args:
        settings: `worker_timeout_s` limits a job; the rest holds inside the child too.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._lock = threading.Lock()
        self._child: _Child | None = None
        self._timer: threading.Timer | None = None

    def evaluate(self, job: Job) -> Evaluation:
        """The outcome of a job. A crash is CRASHED, a hang TIMEOUT, a kill FAILED; no exception comes from the kernel.

        A worker that somebody else terminated (a shutdown, a scheduler) says nothing about the kernel: the job is tried again.
        So is one that ran out of memory while this process held some of the device's for later.
        """
        with self._lock:
            start = time.monotonic()
            try:
                outcome = self._ask_twice(job)
                if outcome.status is Status.FAILED and is_exhausted(outcome.detail) and _gave_memory_back(job.device_index):
                    self._stop()
                    outcome = self._ask_twice(job)
            except WorkerTimeout as error:
                self._stop()
                outcome = Evaluation(Status.TIMEOUT, detail=str(error), tier=job.tier)
            except (WorkerDied, SchemaError) as error:
                self._stop()
                killed = isinstance(error, WorkerDied) and error.killed
                outcome = Evaluation(Status.FAILED if killed else Status.CRASHED, detail=str(error), tier=job.tier)
            if outcome.status in (Status.CRASHED, Status.FAILED):
                self._stop()  # a broken CUDA context does not heal, and memory that is short is better given back
            self._rest_later()
            return dataclasses.replace(outcome, seconds=time.monotonic() - start)

    def compile(self, job: Job) -> None:
        """Compile a job's kernel with all its constants into the folder `job.binaries`; the evaluation reports what fails."""
        with self._lock:
            try:
                self._started().ask(job, compile_only=True)
            except (WorkerError, SchemaError):
                self._stop()
            self._rest_later()

    def _rest_later(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
        self._timer = threading.Timer(IDLE_S, self._rest)
        self._timer.daemon = True
        self._timer.start()

    def _rest(self) -> None:
        with self._lock:  # after a job that has come meanwhile
            self._stop()

    def _ask_twice(self, job: Job) -> Evaluation:
        try:
            return self._started().ask(job)
        except WorkerDied as error:
            if not error.terminated:
                raise
        self._stop()
        return self._started().ask(job)

    def _started(self) -> _Child:
        if self._child is None:
            self._child = _Child(self._settings)
        return self._child

    def _stop(self) -> None:
        if self._child is not None:
            self._child.kill()
        self._child = None

    def close(self) -> None:
        """End the child; a later job starts another. A job in flight on another thread ends as FAILED."""
        child = self._child
        if child is not None:
            child.end()
        with self._lock:
            self._stop()

    def leave(self) -> None:
        """In a forked process: let go of the child, which is the parent's, without ending it; a later job starts another."""
        child, self._child, self._lock = self._child, None, threading.Lock()
        if child is not None:
            child.release()

    def __enter__(self) -> Worker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Child:
    """The parent's end of one child process."""

    def __init__(self, settings: Settings) -> None:
        self._limit = settings.worker_timeout_s
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 (closed by kill)
        self._buffer = b""
        self._stage, self._why = "starting", f"{START_TIMEOUT_S:g} s"
        self._entered: list[tuple[float, str]] = []
        theirs_in, self._to = os.pipe()
        self._from, theirs_out = os.pipe()
        command = [sys.executable, "-m", "torch_llmkernels.evaluate.worker", str(theirs_in), str(theirs_out)]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log, pass_fds=(theirs_in, theirs_out),
                env=clean_environment(os.environ, settings), start_new_session=True,
            )  # fmt: skip
        finally:
            os.close(theirs_in)
            os.close(theirs_out)
        self._poll = select.poll()  # unlike select, it has no limit on descriptors
        self._poll.register(self._from, select.POLLIN)
        try:
            self._send({"settings": dataclasses.asdict(settings)})
            self._receive(time.monotonic() + START_TIMEOUT_S, "ready")
        except WorkerError:
            self.kill()
            raise

    def ask(self, job: Job, compile_only: bool = False) -> Evaluation:
        """Send a job and wait for its outcome, with `compile_only` for one that says nothing.

        Raises:
            WorkerTimeout: if it takes longer than the limit.
            WorkerDied: if the child ends without an answer, or sends something that is no message.
            SchemaError: if the answer is not an evaluation.
        """
        import torch

        identity = secrets.token_hex(16)
        limit = self._limit if job.limit_s is None else min(self._limit, job.limit_s)
        self._why = f"{limit:g} s ({'worker_timeout_s' if limit == self._limit else 'what was left of the budget'})"
        request = {"id": identity, "job": job.to_json(), "threads": torch.get_num_threads(), "limit": limit}
        self._entered = [(time.monotonic(), "sending")]
        self._send({**request, "compile_only": compile_only})
        answer = self._receive(self._entered[0][0] + limit, identity)
        if not compile_only:
            log.debug("%s: %s of %s: %s", job.task.signature, job.kernel_name, job.task.key, self._seconds())
        return Evaluation.from_json(answer)

    def _seconds(self) -> str:
        """How long the stages of the last job took, those that occur for each combination of constants together."""
        ends = [*(entered for entered, _ in self._entered[1:]), time.monotonic()]
        total: dict[str, float] = {}
        for (entered, stage), end in zip(self._entered, ends, strict=True):
            name = re.split(r" [({0-9]", stage)[0]
            total[name] = total.get(name, 0.0) + end - entered
        return ", ".join(f"{name} {seconds:.1f} s" for name, seconds in total.items() if seconds >= 0.05)

    def _send(self, message: dict[str, Any]) -> None:
        data = json.dumps(message).encode() + b"\n"
        try:
            while data:
                data = data[os.write(self._to, data) :]
        except BrokenPipeError:
            raise self._last_words() from None

    def _last_words(self) -> WorkerDied:
        """Why a child that does not listen ended: what it had written until then explains more than how it exited."""
        deadline = time.monotonic() + LAST_WORDS_S
        try:
            while time.monotonic() < deadline:
                self._line(deadline)
        except WorkerDied as error:
            return error
        except WorkerTimeout:
            pass
        return self._died()

    def _receive(self, deadline: float, identity: str) -> Any:
        """The body of the message with this identity; stages on the way are noted."""
        while True:
            message = self._line(deadline)
            if message.get("id") == identity and "answer" in message:
                return message["answer"]
            if "stage" in message:
                self._stage = str(message["stage"])
                self._entered.append((time.monotonic(), self._stage))

    def _line(self, deadline: float) -> dict[str, Any]:
        while b"\n" not in self._buffer:
            if not self._poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise WorkerTimeout(f"killed after {self._why} while {self._stage}")
            data = os.read(self._from, 1 << 16)
            if not data:
                raise self._died()
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        try:
            message = json.loads(line)
        except ValueError:
            message = None
        if not isinstance(message, dict):
            raise WorkerDied(f"the worker sent something that is no message while {self._stage}")
        return message

    def _died(self) -> WorkerDied:
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(LAST_WORDS_S)
        code = self._process.returncode
        how = (
            "closed its pipe" if code is None else f"exited with code {code}" if code >= 0 else f"was killed by {_signal(-code)}"
        )
        text = f"the worker {how} while {self._stage}. {self._log_tail()}".strip()
        return WorkerDied(text, code is not None and -code in _FROM_OUTSIDE, code == -signal.SIGKILL)

    def _log_tail(self) -> str:
        size = self._log.seek(0, os.SEEK_END)
        self._log.seek(max(0, size - LOG_TAIL))
        text = self._log.read().decode(errors="replace").strip()
        return f"Its last output: {text}" if text else ""

    def end(self) -> None:
        """End the child and whatever it started; whoever waits for an answer sees it die."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    def kill(self) -> None:
        """End the child and let go of its pipes."""
        self.end()
        self._process.wait()
        self.release()

    def release(self) -> None:
        """Let go of the pipes and the log."""
        for descriptor in (self._to, self._from):
            with contextlib.suppress(OSError):
                os.close(descriptor)
        self._to = self._from = -1
        self._log.close()


def _gave_memory_back(index: int) -> bool:
    """Free what this process's allocator keeps of a device though no tensor is in it; whether there was any."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return False
    kept = torch.cuda.memory_reserved(index) - torch.cuda.memory_allocated(index)
    with contextlib.suppress(RuntimeError), torch.cuda.device(index):  # it refuses while a thread records a CUDA graph
        torch.cuda.empty_cache()
        return bool(kept > 0)
    return False


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _serve(read_fd: int, write_fd: int) -> None:
    """The child: settings first, then a job per line until the pipe closes."""
    _limit_resources()
    import faulthandler

    import torch

    threading.Thread(target=_end_with_parent, args=(read_fd,), daemon=True).start()
    requests = os.fdopen(read_fd, "rb")

    def send(message: dict[str, Any]) -> None:
        data = json.dumps(message, allow_nan=False).encode() + b"\n"
        while data:
            data = data[os.write(write_fd, data) :]

    with knobs.override(**json.loads(requests.readline())["settings"]):
        send({"id": "ready", "answer": None})
        for line in requests:
            request = json.loads(line)
            torch.set_num_threads(int(request["threads"]))
            # a hang outlives a parent that was killed, but not this
            faulthandler.dump_traceback_later(request["limit"] + ORPHAN_GRACE_S, exit=True)
            outcome = _outcome(request["job"], request["compile_only"], lambda stage: send({"stage": stage}))
            faulthandler.cancel_dump_traceback_later()
            if torch.cuda.is_initialized():
                torch.cuda.empty_cache()  # whoever asked may need the memory now
            send({"id": request["id"], "answer": outcome.to_json()})


def _end_with_parent(read_fd: int) -> None:
    """Wait until nobody can write to the pipe any more, then end this process and whatever it started.

    A thread of its own, because a kernel that hangs in the main one would outlive its parent. Not PR_SET_PDEATHSIG: that follows
    the thread that started the child, which a parent may end long before itself.
    """
    poll = select.poll()
    poll.register(read_fd, 0)  # hang-ups are always reported
    poll.poll()
    os.killpg(os.getpid(), signal.SIGKILL)  # the child leads its own process group


def _outcome(job: dict[str, Any], compile_only: bool, progress: Any) -> Evaluation:
    try:
        if compile_only:
            progress("compiling ahead")
            compile_ahead(Job.from_json(job))
            return Evaluation(Status.NOT_APPLICABLE, detail="compiled only")
        return evaluate(Job.from_json(job), progress)
    except LLMKernelsError as error:
        return Evaluation(Status.NOT_APPLICABLE, detail=str(error))


def _limit_resources() -> None:
    """No core files, and no file larger than any that compiling makes."""
    import resource

    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    _, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    largest = LARGEST_FILE if hard == resource.RLIM_INFINITY else min(hard, LARGEST_FILE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (largest, hard))


if __name__ == "__main__":
    _serve(int(sys.argv[1]), int(sys.argv[2]))
