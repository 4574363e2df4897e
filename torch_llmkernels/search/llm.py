"""Language models behind one small interface, and the two that need no network: files in a folder, and a journal's answers.

`complete` never raises for anything a model or an endpoint does: what went wrong is in `Reply.error`.
"""

from __future__ import annotations

import dataclasses
import os
import tempfile
import time
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Protocol

from torch_llmkernels.errors import SettingsError
from torch_llmkernels.search.budget import tokens_in
from torch_llmkernels.task import digest

PENDING = "pending"


@dataclasses.dataclass(frozen=True)
class Reply:
    """What came back for one prompt.

    Attributes:
        text: The model's words.
        input_tokens, output_tokens: As the endpoint counted them, else estimated from the length.
        finish: `stop`, `length` (cut off at a token limit), `refusal`, `error`, or `pending` (no answer yet: ask again later).
        model: Who answered.
        seconds: From sending to the last word.
        error: Why there is no answer; empty if there is one.
        fatal: Whether asking again would fail the same way (a wrong key, an unknown model).
    """

    text: str = ""
    input_tokens: int = 0
    output_tokens: int = 0
    finish: str = "stop"
    model: str = ""
    seconds: float = 0.0
    error: str = ""
    fatal: bool = False

    @property
    def pending(self) -> bool:
        """Whether the answer may still come."""
        return self.finish == PENDING


class Provider(Protocol):
    """A language model. `complete` is called from several threads, at most `concurrency` at a time."""

    concurrency: int

    def complete(self, role: str, prompt: str, *, system: str, slot: str = "") -> Reply:
        """Answer one prompt.

        Args:
            role: `ideas`, `code` or `repair`.
            prompt: The part that is this request's own.
            system: The part that all requests of a role share.
            slot: Where in the search the answer belongs, such as `r2.s0.i1.v0.a0`.
        """
        ...


def prompt_id(role: str, system: str, prompt: str) -> str:
    """The identity of a prompt: 20 hex digits of what is asked."""
    return digest([role, system, prompt])


class ExchangeProvider:
    """A folder is the model: prompts appear in `prompts/<id>.md`, and whoever answers writes `replies/<id>.md`.

    Args:
        folder: Holds both; created with the first prompt.
        wait_s: Seconds to wait for an answer before `pending` is returned; 0 looks once.
        poll_s: Seconds between looks.
    """

    def __init__(self, folder: Path, wait_s: float = 0.0, poll_s: float = 0.5) -> None:
        self.folder = folder
        self.concurrency = 1 << 16  # every prompt is a file at once: people and agents pick
        self.wait_s = wait_s
        self.poll_s = poll_s

    def issued(self, identity: str) -> bool:
        """Whether the prompt was written, so that someone may be at its answer, or done with it."""
        return self._prompt(identity).exists()

    def answered(self, identity: str) -> bool:
        """Whether its reply is there."""
        return bool(_read_reply(self._reply(identity)).strip())

    def complete(self, role: str, prompt: str, *, system: str, slot: str = "") -> Reply:
        """The reply file's text, or `pending`. An empty file counts as not written yet."""
        identity = prompt_id(role, system, prompt)
        asked, answer = self._prompt(identity), self._reply(identity)
        if not self.issued(identity):
            for path in (asked, answer):
                path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(asked, f"<!-- {slot} {role}: the whole answer goes to replies/{identity}.md -->\n\n{system}\n\n{prompt}")
        began = time.monotonic()
        while True:
            text = _read_reply(answer)
            if text.strip():
                tokens = tokens_in(system) + tokens_in(prompt), tokens_in(text)
                return Reply(text, *tokens, model="exchange", seconds=round(time.monotonic() - began, 3))
            if time.monotonic() - began >= self.wait_s:
                return Reply(finish=PENDING)
            time.sleep(self.poll_s)

    def _prompt(self, identity: str) -> Path:
        return self.folder / "prompts" / f"{identity}.md"

    def _reply(self, identity: str) -> Path:
        return self.folder / "replies" / f"{identity}.md"


def _read_reply(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except FileNotFoundError:
        return ""


class ReplayProvider:
    """A journal answers: by the prompt itself, else by its place in the search.

    Prompts quote times and device facts of the machine that recorded them, so on another machine they differ word for word while
    the search is the same; every recorded code reply is a whole file, which holds wherever its place is reached.

    Args:
        events: The recorded journal.
        by_slot: Whether the place in the search may answer where the words differ.
    """

    concurrency = 1

    def __init__(self, events: Iterable[Mapping[str, Any]], by_slot: bool = True) -> None:
        slots: dict[str, str] = {}
        self._by_id: dict[str, Reply] = {}
        self._by_slot: dict[str, Reply] = {}
        for event in events:
            if event["event"] == "prompt":
                slots[event["id"]] = event["slot"]
            elif event["event"] == "reply" and not event["error"]:
                reply = Reply(event["text"], finish=event["finish"], model=f"replay:{event['model']}")
                self._by_id[event["id"]] = reply
                if by_slot and event["id"] in slots:
                    self._by_slot[slots[event["id"]]] = reply

    def complete(self, role: str, prompt: str, *, system: str, slot: str = "") -> Reply:
        """The recorded reply; no tokens are counted, because none are paid."""
        identity = prompt_id(role, system, prompt)
        reply = self._by_id.get(identity) or self._by_slot.get(slot)
        if reply is None:
            return Reply(finish="error", error=f"the recorded journal answered neither prompt {identity} nor its place {slot}")
        return reply


def write_atomic(path: Path, text: str) -> None:
    """Write a file so that a reader sees all of it or nothing."""
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    with os.fdopen(handle, "w", encoding="utf-8") as file:
        file.write(text)
    os.chmod(temporary, 0o644)
    os.replace(temporary, path)


def provider_for(
    name: str, directory: Path, *, models: str = "", base_url: str = "", api_key_env: str = "OPENAI_API_KEY", wait_s: float = 0.0,
    concurrency: int = 4, max_output_tokens: int = 0, reasoning_effort: str = "",
) -> Provider:  # fmt: skip
    """The provider a setting names.

    Args:
        name: `openai`, `replay:JOURNAL`, `exchange` (files in the run's own folder) or `exchange:FOLDER`.
        directory: The run's folder.
        models: For `openai`: see `openai_provider.parse_models`.
        base_url: For `openai`: the endpoint of models that name none.
        api_key_env: For `openai`: the environment variable with the key of models that name none.
        wait_s: For `exchange`: seconds to wait for a reply.
        concurrency: Requests at a time.
        max_output_tokens: For `openai`: limit passed to the model; 0 leaves it out.
        reasoning_effort: For `openai`: passed if set.

    Raises:
        SettingsError: for another name, or a journal that is not there.
    """
    kind, _, argument = name.partition(":")
    if kind == "exchange":
        return ExchangeProvider(Path(argument).expanduser() if argument else directory / "exchange", wait_s)
    if kind == "replay":
        from torch_llmkernels.search import journal

        path = Path(argument).expanduser()
        path = path / "journal.jsonl" if path.is_dir() else path
        if not path.is_file():
            raise SettingsError(f"provider {name!r}: there is no journal at {path}")
        return ReplayProvider(journal.read(path))
    if kind == "openai":
        from torch_llmkernels.search.openai_provider import OpenAIProvider, parse_models

        listed = parse_models(models, base_url, api_key_env)
        return OpenAIProvider(
            listed, concurrency=concurrency, max_output_tokens=max_output_tokens, reasoning_effort=reasoning_effort
        )
    raise SettingsError(f"unknown provider {name!r}: use 'openai', 'replay:JOURNAL', 'exchange' or 'exchange:FOLDER'")
