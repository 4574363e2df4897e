"""Searches that `torch.compile` starts, against a loopback endpoint that answers like a model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pytest_httpserver import HTTPServer
from werkzeug import Request, Response

from tests.tasks import relu_add_task
from torch_llmkernels import resolve
from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.library import Library
from torch_llmkernels.cache.store import NullStore, Store
from torch_llmkernels.errors import SettingsError
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.search import on_miss
from torch_llmkernels.settings import Settings

TASK = relu_add_task(4096)
KERNEL = """/*---
implements = "add.relu"
target = "cpu"
dtypes = ["float32"]
dims = { n = "a.numel" }
where = ["a.stride[0] == 1", "b.stride[0] == 1", "y.stride[0] == 1"]
[[launch]]
kernel = "add_relu"
args = ["a", "b", "y", "n"]
---*/
extern "C" void add_relu(const T* a, const T* b, T* y, int64_t n) {
#pragma omp simd
    for (int64_t i = 0; i < n; ++i) { const T s = a[i] + b[i]; y[i] = s < 0 ? T(0) : s; }
}
"""
IDEAS = [{"family": "memory access", "mechanism": "one pass over both inputs", "expected": "no intermediate is written"}]

pytestmark = pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")


def answer(request: Request) -> Response:
    """Ideas or the kernel, as the prompt asks."""
    text = json.dumps(request.get_json())
    wanted = f"```cpp\n{KERNEL}```" if "# Write the kernel" in text else f"```json\n{json.dumps(IDEAS)}\n```"
    choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": wanted}}
    usage = {"prompt_tokens": 100, "completion_tokens": 100, "total_tokens": 200}
    body = {"id": "1", "object": "chat.completion", "created": 1, "model": "m", "choices": [choice], "usage": usage}
    return Response(json.dumps(body), content_type="application/json")


@pytest.fixture
def knobs(httpserver: HTTPServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, object]:
    """Settings of a search against the endpoint."""
    httpserver.expect_request("/v1/chat/completions").respond_with_handler(answer)
    monkeypatch.setenv("TEST_KEY", "sk-test")
    return {
        "cache_dir": str(tmp_path / "store"), "provider": "openai", "model": "m", "base_url": httpserver.url_for("/v1"),
        "api_key_env": "TEST_KEY", "preset": "quick", "swap": "correct", "search_budget_s": 120.0,
    }  # fmt: skip


def test_a_miss_searches_and_swaps_what_was_found(knobs, tmp_path: Path) -> None:
    settings = Settings().updated({**knobs, "on_miss": "search"})
    store = Store(tmp_path / "store")
    (tmp_path / "library").mkdir()
    decision = resolve.Resolver(settings, Library(tmp_path / "library"), store).decide(TASK)
    assert decision.record is not None and decision.record.origin.startswith("search:")
    key = RecordKey.of(TASK, target_for("cpu").facts())
    assert store.decision(key).record.kernel_text == decision.record.kernel_text
    store.close()


def test_a_search_that_its_tokens_stopped_goes_on_with_more_of_them(knobs, tmp_path: Path) -> None:
    """One reply is paid; the next, as it is estimated, would pass the first limit."""
    facts, key = target_for("cpu").facts(), RecordKey.of(TASK, target_for("cpu").facts())
    store = Store(tmp_path / "store")
    assert on_miss.standing(TASK, store) == on_miss.Standing()
    few = Settings().updated({**knobs, "on_miss": "search", "search_budget_tokens": 15_000})
    assert on_miss.search(TASK, facts, key, store, few) is None
    stopped = on_miss.standing(TASK, store)
    assert stopped.tokens == 200 and "(max_tokens" in stopped.stop
    assert on_miss.search(TASK, facts, key, store, few) is None and on_miss.standing(TASK, store) == stopped
    more = few.updated({"search_budget_tokens": 100_000})
    assert on_miss.search(TASK, facts, key, store, more) is not None
    assert on_miss.standing(TASK, store).tokens > 200
    store.close()


def test_a_search_behind_leaves_its_winner_in_the_store(knobs, tmp_path: Path) -> None:
    settings = Settings().updated({**knobs, "on_miss": "background"})
    store = Store(tmp_path / "store")
    facts = target_for("cpu").facts()
    key = RecordKey.of(TASK, facts)
    assert on_miss.search(TASK, facts, key, store, settings) is None
    on_miss._behind[TASK.key].wait(timeout=200)
    assert store.decision(key).record is not None
    store.close()


def test_one_search_per_task(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings().updated({"provider": "exchange", "on_miss": "search"})
    monkeypatch.setattr(on_miss, "_search_now", lambda *args: pytest.fail("a second search began"))
    store, facts = Store(tmp_path / "store"), target_for("cpu").facts()
    key = RecordKey.of(TASK, facts)
    with store.lock(f"search/{key.text}"):
        assert on_miss.search(TASK, facts, key, Store(tmp_path / "store"), settings) is None
    store.close()


def test_no_provider_is_an_error_that_names_the_choices(tmp_path: Path) -> None:
    facts = target_for("cpu").facts()
    with pytest.raises(SettingsError, match="unknown provider"):
        on_miss.search(TASK, facts, RecordKey.of(TASK, facts), Store(tmp_path / "store"), Settings(on_miss="search"))


def test_without_a_store_directory_there_is_no_search() -> None:
    facts = target_for("cpu").facts()
    settings = Settings().updated({"provider": "exchange", "on_miss": "search"})
    assert on_miss.search(TASK, facts, RecordKey.of(TASK, facts), NullStore(), settings) is None
