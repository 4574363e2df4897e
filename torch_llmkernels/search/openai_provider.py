"""Any OpenAI-compatible endpoint as a search's model; several at once, chosen by weight.

Everything an endpoint can do wrong becomes a `Reply` with a reason: rate limits and server errors that outlast the client's
retries, time-outs, connections cut in the middle, bodies that are not JSON or not a completion, refusals and cut-off answers.
"""

from __future__ import annotations

import dataclasses
import logging
import os
import re
import threading
import time
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2
import openai

from torch_llmkernels.errors import ProviderError, SettingsError
from torch_llmkernels.search.budget import tokens_in
from torch_llmkernels.search.llm import Reply, prompt_id

log = logging.getLogger("torch_llmkernels.search")

TRIES = 2  # requests for one prompt when the endpoint says 200 and sends something that is no completion
_FATAL = (401, 403, 404)  # asking again with the same key and model would fail the same way
_DROPPABLE = ("reasoning_effort", "max_completion_tokens", "stream_options")
_SPEC = re.compile(
    r"(?P<name>[^=@#\s]+(?:@(?!https?://)[^=@#\s]+)?)(?:=(?P<weight>[\d.]+))?(?:@(?P<url>https?://[^#\s]+))?(?:#(?P<key>\w+))?\Z"
)


@dataclasses.dataclass(frozen=True)
class Model:
    """One model behind one endpoint.

    Attributes:
        name: As the endpoint calls it.
        weight: Its share of the requests, relative to the others.
        base_url: The endpoint; empty: the client's default.
        api_key_env: The environment variable with the key. The key itself is read when a request is made, and kept nowhere.
    """

    name: str
    weight: float = 1.0
    base_url: str = ""
    api_key_env: str = "OPENAI_API_KEY"


def parse_models(text: str, base_url: str = "", api_key_env: str = "OPENAI_API_KEY") -> tuple[Model, ...]:
    """Models from a setting: `NAME[=WEIGHT][@BASE_URL][#KEY_VARIABLE]`, separated by commas.

    Raises:
        SettingsError: if there is none, if one does not parse, or if a URL carries a password.
    """
    models = []
    for part in filter(None, (piece.strip() for piece in text.split(","))):
        match = _SPEC.match(part)
        weight = float(match["weight"] or 1) if match and (match["weight"] or "1").count(".") <= 1 else 0.0
        if match is None or weight <= 0:
            raise SettingsError(
                f"model {_without_password(part)!r}: write NAME[=WEIGHT][@BASE_URL][#KEY_VARIABLE], the weight above 0"
            )
        models.append(Model(match["name"], weight, match["url"] or base_url, match["key"] or api_key_env))
    if not models:
        raise SettingsError("the openai provider needs a model: set LLMKERNELS_MODEL or pass --model")
    for model in models:
        if "@" in model.base_url.partition("://")[2].partition("/")[0]:
            raise SettingsError(f"model {model.name}: the URL carries a password; put the key in an environment variable instead")
    return tuple(models)


def _without_password(text: str) -> str:
    return re.sub(r"//[^/@]*@", "//...@", text)


class OpenAIProvider:
    """See `llm.Provider`.

    Args:
        models: Chosen by weight for each prompt, always the same for the same prompt.
        concurrency: Requests at a time.
        max_output_tokens: Limit passed to the model; 0 leaves it out.
        reasoning_effort: Passed if set; dropped for the process, with a warning, if an endpoint refuses it.
        timeout_s: Seconds one request may take.
        max_retries: The client's own retries after connection errors, 408, 409, 429 and 5xx.
        stream: Whether to receive the answer piece by piece, which keeps proxies from closing a silent connection.
        environ: Where keys are read.

    Raises:
        SettingsError: if a model of the default endpoint has no key.
    """

    def __init__(
        self, models: Sequence[Model], *, concurrency: int = 4, max_output_tokens: int = 0, reasoning_effort: str = "",
        timeout_s: float = 900.0, max_retries: int = 3, stream: bool = False, environ: Mapping[str, str] | None = None,
    ) -> None:  # fmt: skip
        environ = os.environ if environ is None else environ
        self.models = list(models)
        self.concurrency = concurrency
        self.stream = stream
        self._secrets = {key for m in models if (key := environ.get(m.api_key_env, ""))}
        self._clients = {m: _client(m, environ, timeout_s, max_retries) for m in models}
        self._options: dict[str, Any] = {}
        if max_output_tokens:
            self._options["max_completion_tokens"] = max_output_tokens
        if reasoning_effort:
            self._options["reasoning_effort"] = reasoning_effort
        if stream:
            self._options["stream_options"] = {"include_usage": True}
        self._lock = threading.Lock()

    def complete(self, role: str, prompt: str, *, system: str, slot: str = "") -> Reply:
        """Ask one of the models; on a fatal error the others are asked from then on."""
        identity = prompt_id(role, system, prompt)
        messages = [{"role": "system", "content": system}, {"role": "user", "content": prompt}]
        while True:
            model = self._choose(identity)
            began = time.monotonic()
            reply = self._ask(model, messages)
            reply = dataclasses.replace(
                reply,
                model=model.name,
                seconds=round(time.monotonic() - began, 3),
                error=self._redacted(reply.error),
                text=self._redacted(reply.text),
            )
            if not reply.fatal or not self._drop_model(model, reply.error):
                return reply

    def _choose(self, identity: str) -> Model:
        with self._lock:
            models = list(self.models)
        point = int(identity, 16) / 16 ** len(identity) * sum(m.weight for m in models)
        for model in models:
            point -= model.weight
            if point < 0:
                return model
        return models[-1]

    def _drop_model(self, model: Model, error: str) -> bool:
        """Take a model that cannot answer out of the rotation; whether another one is left."""
        with self._lock:
            if model in self.models and len(self.models) > 1:
                log.warning("model %s is not asked again in this process: %s", model.name, error)
                self.models.remove(model)
                return True
            return model not in self.models

    def _ask(self, model: Model, messages: list[dict[str, str]]) -> Reply:
        error = ""
        for _ in range(TRIES + len(_DROPPABLE)):
            try:
                return self._request(model, messages)
            except openai.BadRequestError as refused:
                error = _words(refused)
                if not self._drop_option(refused):
                    return Reply(finish="error", error=error)
            except openai.APIStatusError as refused:
                return Reply(finish="error", error=_words(refused), fatal=refused.status_code in _FATAL)
            except (openai.OpenAIError, httpx2.HTTPError) as failed:
                return Reply(finish="error", error=_words(failed))
            except (ValueError, ProviderError) as unusable:  # a body that is not JSON surfaces as the decoder's own ValueError
                if error:
                    break
                error = _words(unusable)
        return Reply(finish="error", error=error)

    def _drop_option(self, refused: openai.BadRequestError) -> bool:
        """Stop sending an option that the endpoint's words name; whether there was one."""
        words = _words(refused)
        with self._lock:
            for name in [n for n in self._options if n in words]:
                value = self._options.pop(name)
                log.warning("the endpoint refuses %s; it is not sent again in this process (%s)", name, self._redacted(words))
                if name == "max_completion_tokens":
                    self._options["max_tokens"] = value
                return True
        return False

    def _request(self, model: Model, messages: list[dict[str, str]]) -> Reply:
        with self._lock:
            options = dict(self._options)
        completions = self._clients[model].chat.completions
        if self.stream:
            return _streamed(completions.create(model=model.name, messages=messages, stream=True, **options), messages)
        return _reply(completions.create(model=model.name, messages=messages, **options), messages)

    def _redacted(self, text: str) -> str:
        for secret in self._secrets:
            text = text.replace(secret, "[key]")
        return text


def _client(model: Model, environ: Mapping[str, str], timeout_s: float, max_retries: int) -> openai.OpenAI:
    key = environ.get(model.api_key_env, "")
    if not key and not model.base_url:
        raise SettingsError(
            f"model {model.name}: the environment variable {model.api_key_env} holds no key, and no base_url is set"
        )
    return openai.OpenAI(api_key=key or "none", base_url=model.base_url or None, timeout=timeout_s, max_retries=max_retries)


def _reply(completion: Any, messages: list[dict[str, str]]) -> Reply:
    """The reply of a parsed body, which the client builds without checking it.

    Raises:
        ProviderError: if it is no completion.
    """
    choices = getattr(completion, "choices", None)
    if isinstance(completion, str):
        raise ProviderError(f"the endpoint answered 200 with text instead of JSON (a proxy's page?): {completion[:200]!r}")
    if not isinstance(choices, list) or not choices or getattr(choices[0], "message", None) is None:
        raise ProviderError(f"the endpoint answered 200 without choices: {str(completion)[:300]}")
    message = choices[0].message
    text = getattr(message, "content", None) or ""
    refusal = getattr(message, "refusal", None)
    finish = "refusal" if refusal else _finish(getattr(choices[0], "finish_reason", None))
    if not isinstance(text, str):
        raise ProviderError(f"the endpoint's message content is {type(text).__name__}, not text")
    return _counted(text or (refusal or ""), finish, getattr(completion, "usage", None), messages)


def _streamed(chunks: Any, messages: list[dict[str, str]]) -> Reply:
    """The reply of a stream; one that breaks off is an answer cut off at that point, because what came is paid for.

    Raises:
        ProviderError: if nothing came.
    """
    text, finish, usage, broken = "", "length", None, "the stream ended before it began"
    try:
        for chunk in chunks:
            usage = getattr(chunk, "usage", None) or usage
            for choice in getattr(chunk, "choices", None) or []:
                text += getattr(choice.delta, "content", None) or ""
                finish = _finish(choice.finish_reason) if choice.finish_reason else finish
    except (openai.APIError, httpx2.HTTPError, ValueError) as failed:
        broken = _words(failed)
        log.warning("a model's stream broke off after %d characters: %s", len(text), broken)
    if not text and finish == "length":
        raise ProviderError(f"no answer in the stream: {broken}")
    return _counted(text, finish, usage, messages)


def _finish(reason: Any) -> str:
    return {"length": "length", "content_filter": "refusal"}.get(str(reason), "stop")


def _counted(text: str, finish: str, usage: Any, messages: list[dict[str, str]]) -> Reply:
    into, out = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", None)
    into = into if isinstance(into, int) and into > 0 else sum(tokens_in(m["content"]) for m in messages)
    out = out if isinstance(out, int) and out >= 0 else tokens_in(text)
    return Reply(text, into, out, finish)


def _words(error: Exception) -> str:
    """An error in one line, without a page of HTML."""
    return f"{type(error).__name__}: {' '.join(str(error).split())[:400]}"
