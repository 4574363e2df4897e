"""Providers: an endpoint that misbehaves in every known way never raises, keys never leak, models share by weight."""

from __future__ import annotations

import json
import logging
from collections import Counter
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from torch_llmkernels.errors import SettingsError
from torch_llmkernels.search.llm import ExchangeProvider, ReplayProvider, prompt_id, provider_for
from torch_llmkernels.search.openai_provider import Model, OpenAIProvider, parse_models

KEY = "sk-very-secret-0123456789"
AT_ONCE = {"retry-after-ms": "1"}  # the client waits this long before it retries


def completion(content: str | None = "hello", finish: str = "stop", **message: object) -> dict[str, object]:
    return {
        "id": "1", "object": "chat.completion", "created": 1, "model": "m",
        "choices": [{"index": 0, "finish_reason": finish, "message": {"role": "assistant", "content": content, **message}}],
        "usage": {"prompt_tokens": 11, "completion_tokens": 7, "total_tokens": 18},
    }  # fmt: skip


def provider(server: HTTPServer, **options: object) -> OpenAIProvider:
    models = options.pop("models", [Model("m", base_url=server.url_for("/v1"))])
    return OpenAIProvider(models, environ={"OPENAI_API_KEY": KEY}, **{"timeout_s": 5.0, "max_retries": 1, **options})


def serve(server: HTTPServer, *bodies: object, status: int = 200, headers: dict[str, str] = AT_ONCE) -> list[dict[str, object]]:
    """Answer one request after the other with `bodies` (the last one again and again); the requests' JSON is collected."""
    requests: list[dict[str, object]] = []

    def handler(request: Request) -> Response:
        requests.append(request.get_json())
        body = bodies[min(len(requests), len(bodies)) - 1]
        if isinstance(body, Response):
            return body
        text = body if isinstance(body, str) else json.dumps(body)
        return Response(text, status, {"content-type": "text/html" if text.startswith("<") else "application/json", **headers})

    server.expect_request("/v1/chat/completions").respond_with_handler(handler)
    return requests


def ask(model: OpenAIProvider):
    return model.complete("code", "write it", system="you are", slot="r1.s0.i0.v0.a0")


class TestEndpoints:
    def test_a_completion_comes_with_its_tokens(self, httpserver: HTTPServer) -> None:
        requests = serve(httpserver, completion())
        reply = ask(provider(httpserver))
        assert (reply.text, reply.input_tokens, reply.output_tokens, reply.finish, reply.model, reply.error) == (
            "hello",
            11,
            7,
            "stop",
            "m",
            "",
        )
        assert [m["role"] for m in requests[0]["messages"]] == ["system", "user"]
        assert "reasoning_effort" not in requests[0] and "max_completion_tokens" not in requests[0]

    def test_tokens_are_estimated_where_the_endpoint_counts_none(self, httpserver: HTTPServer) -> None:
        serve(httpserver, {**completion("x" * 70), "usage": None})
        assert ask(provider(httpserver)).output_tokens == 20

    @pytest.mark.parametrize("status", [429, 500, 503])
    def test_a_passing_error_is_retried_by_the_client(self, httpserver: HTTPServer, status: int) -> None:
        requests = serve(httpserver, Response("{}", status, AT_ONCE), completion())
        assert ask(provider(httpserver)).text == "hello" and len(requests) == 2

    @pytest.mark.parametrize(
        ("status", "fatal"), [(429, False), (500, False), (422, False), (401, True), (403, True), (404, True)]
    )
    def test_a_lasting_error_is_a_reply_with_a_reason(self, httpserver: HTTPServer, status: int, fatal: bool) -> None:
        serve(httpserver, {"error": {"message": "sorry"}}, status=status)
        reply = ask(provider(httpserver))
        assert reply.finish == "error" and str(status) in reply.error and "sorry" in reply.error and reply.fatal is fatal

    @pytest.mark.parametrize(("body", "words"), [
        ("{", "JSONDecodeError"),
        ("", "JSONDecodeError"),
        ("<html>gateway</html>", "text instead of JSON"),
        ({"id": "1"}, "without choices"),
        ({**completion(), "choices": None}, "without choices"),
        ({**completion(), "choices": []}, "without choices"),
        ({**completion(), "choices": [{"index": 0, "finish_reason": "stop"}]}, "without choices"),
        ([1, 2], "without choices"),
    ])  # fmt: skip
    def test_a_200_that_is_no_completion_is_asked_again_once_then_given_up(
        self, httpserver: HTTPServer, body: object, words: str
    ) -> None:
        requests = serve(httpserver, body)
        reply = ask(provider(httpserver))
        assert words in reply.error and reply.finish == "error" and not reply.fatal
        assert len(requests) == 2

    def test_and_the_second_answer_may_be_good(self, httpserver: HTTPServer) -> None:
        serve(httpserver, "{", completion())
        assert ask(provider(httpserver)).text == "hello"

    def test_a_cut_off_answer_says_so(self, httpserver: HTTPServer) -> None:
        serve(httpserver, completion("```cpp\nint", "length"))
        assert ask(provider(httpserver)).finish == "length"

    @pytest.mark.parametrize("body", [completion(None, refusal="no"), completion("", "content_filter")])
    def test_a_refusal_says_so(self, httpserver: HTTPServer, body: dict[str, object]) -> None:
        serve(httpserver, body)
        reply = ask(provider(httpserver))
        assert reply.finish == "refusal" and not reply.error

    def test_a_body_cut_in_the_middle_is_a_reply_with_a_reason(self, httpserver: HTTPServer) -> None:
        half = Response(
            iter([json.dumps(completion())[:50].encode()]), 200, {"content-type": "application/json", "content-length": "4000"}
        )
        serve(httpserver, half)
        reply = ask(provider(httpserver, max_retries=0))
        assert reply.finish == "error" and reply.error

    def test_nobody_there_is_a_reply_with_a_reason(self) -> None:
        model = OpenAIProvider([Model("m", base_url="http://127.0.0.1:9/v1")], environ={}, max_retries=0)
        assert "APIConnectionError" in ask(model).error

    def test_a_time_out_is_a_reply_with_a_reason(self, httpserver: HTTPServer) -> None:
        import threading

        release = threading.Event()
        httpserver.expect_request("/v1/chat/completions").respond_with_handler(
            lambda request: Response("{}") if release.wait(5) else Response()
        )
        reply = ask(provider(httpserver, timeout_s=0.1, max_retries=0))
        release.set()
        assert "Timeout" in reply.error


class TestOptions:
    def refusing(self, server: HTTPServer, name: str) -> list[dict[str, object]]:
        requests: list[dict[str, object]] = []

        def handler(request: Request) -> Response:
            requests.append(request.get_json())
            if name in requests[-1]:
                body = {"error": {"message": f"Unrecognized request argument supplied: {name}"}}
                return Response(json.dumps(body), 400, {"content-type": "application/json"})
            return Response(json.dumps(completion()), 200, {"content-type": "application/json"})

        server.expect_request("/v1/chat/completions").respond_with_handler(handler)
        return requests

    def test_reasoning_effort_is_sent_if_set_and_dropped_with_a_warning_if_refused(self, httpserver: HTTPServer, caplog) -> None:
        requests = self.refusing(httpserver, "reasoning_effort")
        model = provider(httpserver, reasoning_effort="high")
        with caplog.at_level(logging.WARNING):
            assert ask(model).text == "hello" and ask(model).text == "hello"
        assert [r.get("reasoning_effort") for r in requests] == ["high", None, None]
        assert "refuses reasoning_effort" in caplog.text

    def test_the_output_limit_falls_back_to_its_older_name(self, httpserver: HTTPServer) -> None:
        requests = self.refusing(httpserver, "max_completion_tokens")
        assert ask(provider(httpserver, max_output_tokens=99)).text == "hello"
        assert requests[-1]["max_tokens"] == 99

    def test_another_bad_request_is_a_reply_with_a_reason(self, httpserver: HTTPServer) -> None:
        serve(httpserver, {"error": {"message": "context too long"}}, status=400)
        assert "context too long" in ask(provider(httpserver, reasoning_effort="high")).error


class TestStreams:
    def test_pieces_are_put_together(self, httpserver: HTTPServer) -> None:
        serve(httpserver, Response(stream("hel", "lo", finish="stop"), 200, {"content-type": "text/event-stream"}))
        reply = ask(provider(httpserver, stream=True))
        assert (reply.text, reply.finish, reply.output_tokens) == ("hello", "stop", 7)

    @pytest.mark.parametrize("tail", ["", 'data: {"choi'], ids=["ends", "torn"])
    def test_one_that_breaks_off_is_an_answer_cut_off(self, httpserver: HTTPServer, tail: str) -> None:
        serve(httpserver, Response(stream("hel") + tail, 200, {"content-type": "text/event-stream"}))
        reply = ask(provider(httpserver, stream=True))
        assert (reply.text, reply.finish, reply.error) == ("hel", "length", "")

    def test_an_empty_one_is_a_reply_with_a_reason(self, httpserver: HTTPServer) -> None:
        serve(httpserver, Response("", 200, {"content-type": "text/event-stream"}))
        assert "stream" in ask(provider(httpserver, stream=True)).error


def stream(*pieces: str, finish: str = "") -> str:
    rows = [{"choices": [{"index": 0, "delta": {"content": piece}, "finish_reason": None}]} for piece in pieces]
    if finish:
        rows += [{"choices": [{"index": 0, "delta": {}, "finish_reason": finish}]}]
        rows += [{"choices": [], "usage": completion()["usage"]}]
    return "".join(f"data: {json.dumps({'id': '1', 'object': 'chat.completion.chunk', **row})}\n\n" for row in rows) + (
        "data: [DONE]\n\n" if finish else ""
    )


class TestKeys:
    def test_a_key_that_an_endpoint_echoes_is_taken_out(self, httpserver: HTTPServer) -> None:
        serve(httpserver, {"error": {"message": f"Incorrect API key provided: {KEY}"}}, status=401)
        reply = ask(provider(httpserver))
        assert KEY not in repr(reply) and "[key]" in reply.error

    def test_a_model_of_the_default_endpoint_without_a_key_says_which_variable(self) -> None:
        with pytest.raises(SettingsError, match="GEMINI_KEY"):
            OpenAIProvider([Model("m", api_key_env="GEMINI_KEY")], environ={})

    def test_a_url_with_a_password_is_refused_without_repeating_it(self) -> None:
        with pytest.raises(SettingsError) as refused:
            parse_models("m@https://me:hunter2@host/v1")
        assert "hunter2" not in str(refused.value)


class TestSeveralModels:
    def test_a_setting_names_them(self) -> None:
        models = parse_models("o3=2, google/gemini-2.5-pro@https://g.example/v1#GEMINI_KEY, local:8b", "http://h:1/v1")
        assert models == (
            Model("o3", 2.0, "http://h:1/v1"), Model("google/gemini-2.5-pro", 1.0, "https://g.example/v1", "GEMINI_KEY"),
            Model("local:8b", 1.0, "http://h:1/v1"),
        )  # fmt: skip

    @pytest.mark.parametrize("text", ["", " , ", "m=0", "m=x", "a b", "m=1.2.3"])
    def test_a_setting_that_names_none_is_an_error(self, text: str) -> None:
        with pytest.raises(SettingsError):
            parse_models(text)

    def test_requests_are_shared_by_weight_and_a_prompt_always_goes_to_the_same_one(self, httpserver: HTTPServer) -> None:
        url = httpserver.url_for("/v1")
        shared = provider(httpserver, models=[Model("a", 3.0, url), Model("b", 1.0, url)])
        chosen = [shared._choose(prompt_id("code", "", str(i))).name for i in range(400)]
        assert 260 < Counter(chosen)["a"] < 340
        assert chosen[:20] == [shared._choose(prompt_id("code", "", str(i))).name for i in range(20)]

    def test_one_that_cannot_answer_leaves_its_share_to_the_others(self, httpserver: HTTPServer) -> None:
        def handler(request: Request) -> Response:
            known = request.get_json()["model"] == "good"
            body = completion() if known else {"error": {"message": "no such model"}}
            return Response(json.dumps(body), 200 if known else 404, {"content-type": "application/json"})

        httpserver.expect_request("/v1/chat/completions").respond_with_handler(handler)
        url = httpserver.url_for("/v1")
        assert ask(provider(httpserver, models=[Model("gone", 1e9, url), Model("good", 1.0, url)])).text == "hello"


class TestByName:
    def test_a_folder_a_journal_and_an_endpoint(self, tmp_path: Path, monkeypatch) -> None:
        (tmp_path / "journal.jsonl").write_text("")
        monkeypatch.setenv("OPENAI_API_KEY", KEY)
        assert isinstance(provider_for("exchange", tmp_path), ExchangeProvider)
        assert isinstance(provider_for(f"replay:{tmp_path}", tmp_path), ReplayProvider)
        assert isinstance(provider_for("openai", tmp_path, models="m"), OpenAIProvider)

    @pytest.mark.parametrize(
        ("name", "words"), [("opnai", "unknown provider"), ("", "unknown provider"), ("replay:/nowhere", "no journal")]
    )
    def test_anything_else_is_an_error_that_lists_them(self, tmp_path: Path, name: str, words: str) -> None:
        with pytest.raises(SettingsError, match=words):
            provider_for(name, tmp_path)

    def test_the_search_can_be_imported_without_the_client(self) -> None:
        import subprocess
        import sys

        heavy = ("openai", "httpx2", "diskcache", "torch")
        code = f"import sys, torch_llmkernels.search.engine; print([m for m in {heavy} if m in sys.modules])"
        shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == "[]"
