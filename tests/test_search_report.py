"""The report is one safe, self-contained page; the dataset and the command line tell the same story."""

from __future__ import annotations

import itertools
import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import pytest
import tasks
from scripted_search import SMALL, ScriptedModel, ScriptedPool, code_reply, default_answer, goal, ideas_reply, kernel, open_engine

from torch_llmkernels.cli import main
from torch_llmkernels.errors import SearchError
from torch_llmkernels.evaluation import Evaluation
from torch_llmkernels.search import commands, progress
from torch_llmkernels.search.engine import Engine, finish, open_run
from torch_llmkernels.search.llm import Reply
from torch_llmkernels.search.report import dataset, render_html
from torch_llmkernels.search.run import Run
from torch_llmkernels.task import Task

VOID = {"meta"}
BROWSER = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
HOSTILE = "<script>alert(1)</script> & \"quotes\" 'too'"


class Page(HTMLParser):
    """Collects tags, attributes and text, and fails on tags that do not nest."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.words = ""
        self._open: list[str] = []
        self.feed(page)
        self.close()
        assert self._open == []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in VOID:
            self._open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self._open and self._open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.words += data


@pytest.fixture
def run(tmp_path: Path) -> Run:
    engine = open_engine(
        tmp_path / "run", SMALL, ScriptedModel(default_answer), ScriptedPool(), bank=(("known", kernel("2.95")),)
    )
    engine.drive()
    return engine.run


class TestReport:
    def test_it_is_one_page_that_loads_nothing_and_runs_nothing(self, run: Run) -> None:
        page = Page(render_html(run))
        assert not {"script", "link", "img", "iframe", "object"} & set(page.tags)
        assert not [a for a in page.attributes if a[0] in ("src", "href") or a[0].startswith("on")]
        assert "@import" not in render_html(run) and "url(" not in render_html(run)

    def test_it_shows_the_plot_with_baselines_and_floor(self, run: Run) -> None:
        text = render_html(run)
        told = "best so far 1.50x the best baseline (2 ms"
        for words in ("eager 4", "inductor 3", "floor 0.5", "best 2", "round 1", "round 2", told):
            assert words in text
        timed = [c for c in run.tree.candidates.values() if c.evaluation and c.evaluation.time_ms]
        assert text.count('class="dot"') == len(timed)

    def test_it_shows_every_idea_every_candidate_and_why_each_died(self, run: Run) -> None:
        words = Page(render_html(run)).words
        assert all(n.idea.mechanism in words for n in run.tree.ideas.values())
        assert all(c.slot in words for c in run.tree.candidates.values())
        assert "wrong: scripted: wrong" in words and "winner" in words

    def test_it_shows_sources_and_what_changed_against_the_parent(self, run: Run) -> None:
        words = Page(render_html(run)).words
        assert kernel("2.000").strip() in words
        assert "-// verdict: 2.500" in words and "+// verdict: 2.000" in words

    def test_it_shows_the_spend_by_role(self, run: Run) -> None:
        words = " ".join(Page(render_html(run)).words.split())
        assert re.search(r"ideas\s*2\s*2,000\s*200", words) and re.search(r"repair\s*1\s*1,000\s*100", words)

    def test_it_follows_the_readers_colour_scheme(self, run: Run) -> None:
        assert "prefers-color-scheme: dark" in render_html(run) and "color-scheme: light dark" in render_html(run)

    @pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine")
    def test_a_browser_shows_it_in_light_and_in_dark(self, run: Run, tmp_path: Path) -> None:
        (tmp_path / "report.html").write_text(render_html(run))
        shots = []
        for scheme in ("0", "1"):
            shot = tmp_path / f"{scheme}.png"
            options = ["--headless", "--no-sandbox", "--disable-gpu", f"--blink-settings=preferredColorScheme={scheme}"]
            command = [str(BROWSER), *options, f"--user-data-dir={tmp_path / scheme}", f"--screenshot={shot}"]
            subprocess.run([*command, f"file://{tmp_path / 'report.html'}"], check=True, capture_output=True, timeout=120)
            shots.append(shot.read_bytes())
        assert all(len(shot) > 10_000 for shot in shots) and shots[0] != shots[1]

    def test_whatever_a_model_wrote_is_text(self, tmp_path: Path) -> None:
        def answer(role: str, slot: str) -> str:
            text = HOSTILE + slot
            return ideas_reply(text) if role == "ideas" else code_reply("2.0").replace("for (", f"// {text}\n    for (")

        engine = open_engine(
            tmp_path / HOSTILE.replace("/", ""), SMALL, ScriptedModel(answer), ScriptedPool(), facts={"name": HOSTILE}
        )
        engine.drive()
        page = Page(render_html(engine.run))
        assert "script" not in page.tags and page.words.count(HOSTILE) > 5

    @pytest.mark.parametrize("verdict", ["wrong", None])
    def test_a_search_without_a_kernel_has_a_report_too(self, tmp_path: Path, verdict: str | None) -> None:
        answer = lambda role, slot: default_answer(role, slot) if role == "ideas" else code_reply("wrong")  # noqa: E731
        engine = open_engine(tmp_path / "run", SMALL, ScriptedModel(answer) if verdict else None, ScriptedPool())
        engine.drive()
        words = Page(render_html(engine.run)).words
        assert "nothing to plot" in words and "no correct kernel" in words


class TestDataset:
    def test_one_row_per_implementation_with_its_outcome(self, run: Run) -> None:
        rows = list(dataset(run))
        assert len(rows) == 8  # eight drafts and a repair, less the duplicate
        by_slot = {row["slot"]: row for row in rows}
        assert by_slot["r2.s0.i0.v0.a0"]["speedup"] == 1.5
        assert by_slot["r2.s0.i0.v0.a0"]["parent"] == kernel("2.500")
        assert by_slot["r1.s0.i0.v1.a0"]["outcome"]["status"] == "wrong" and by_slot["r1.s0.i0.v1.a1"]["role"] == "repair"

    def test_its_tasks_and_outcomes_can_be_read_back(self, run: Run) -> None:
        row = json.loads(json.dumps(next(dataset(run))))
        assert Task.from_json(row["task"]) == run.goal.task
        assert Evaluation.from_json(row["outcome"]).time_ms == 2.5

    def test_a_reply_without_a_kernel_is_a_row_too(self, tmp_path: Path) -> None:
        engine = open_engine(
            tmp_path, SMALL, ScriptedModel(lambda r, s: default_answer(r, s) if r == "ideas" else "no"), ScriptedPool()
        )
        engine.drive()
        row = next(dataset(engine.run))
        assert row["code"] == "" and row["outcome"]["status"] == "unusable" and "code block" in row["outcome"]["detail"]


class TestCommands:
    def test_report_and_dataset_write_files(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["report", str(run.directory)]) == 0
        assert (run.directory / "report.html").read_text() == render_html(run)
        assert main(["dataset", str(run.directory), str(run.directory)]) == 0
        lines = capsys.readouterr().out.splitlines()[1:]
        assert len(lines) == 16 and all(json.loads(line)["code"] for line in lines)

    def test_status_says_where_a_run_stands(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        assert main(["search", "status", str(run.directory), "--json"]) == 0
        state = json.loads(capsys.readouterr().out)
        assert state["ended"] and state["best_ms"] == 2.0 and state["candidates"]["wrong"] == 1
        assert main(["search", "status", str(run.directory)]) == 0
        assert "1.50x the best baseline (2 ms then)" in capsys.readouterr().out

    def test_start_step_and_status_of_an_exchange(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        task, device, folder = tmp_path / "task.json", tmp_path / "device.json", tmp_path / "run"
        task.write_text(json.dumps(tasks.relu_add_task().to_json()))
        device.write_text(json.dumps({"facts": FACTS, "ceilings": CEILINGS}))
        start = ["search", "start", str(task), "--folder", str(folder), "--provider", "exchange"]
        assert main([*start, "--device-file", str(device), "--set", "rounds=1", "--set", "variants=1", "--no-bank"]) == 0
        (prompt,) = (folder / "exchange" / "prompts").iterdir()
        assert "at most" in (said := capsys.readouterr().out) and "answer 1 prompt," in said and f"waiting: {prompt.stem}" in said
        (folder / "exchange" / "replies" / prompt.name).write_text(ideas_reply("vectorise", "unroll"))
        assert main(["search", "step", str(folder), "--no-compile"]) == 0
        assert "answer 2 prompts" in capsys.readouterr().out
        first, second = (p for p in open_run(folder).tree.prompts.values() if p.role == "code")
        (folder / "exchange" / "replies" / f"{first.id}.md").write_text(code_reply("1.0"))
        (folder / "exchange" / "replies" / f"{second.id}.md").write_text("I would rather not.")
        assert main(["search", "step", str(folder), "--no-compile"]) == 0
        said = capsys.readouterr().out
        assert f"rejected: reply {second.id} ({second.slot}): " in said  # and it is asked again
        assert "1 candidate to be evaluated on the device: llmkernels search evaluate" in said and "answer 1 prompt," in said

    def test_known_kernels_are_measured_before_the_first_prompt(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        run = open_run(tmp_path, goal(provider="exchange", bank=(("known", kernel("3.000")),)))
        Engine(run).drive()
        assert main(["search", "status", str(tmp_path)]) == 0
        said = " ".join(capsys.readouterr().out.split())
        assert "1 known kernel to be evaluated on the device before the first prompt" in said and "prompts" not in said

    def test_a_signature_of_many_tasks_lists_each_with_key_shapes_and_device(self, monkeypatch: pytest.MonkeyPatch) -> None:
        known = [tasks.layer_norm_task(cols=16 * n) for n in range(1, 10)]
        monkeypatch.setattr(commands, "_known_tasks", lambda: iter(known))
        with pytest.raises(SearchError, match="9 tasks match 'layer_norm'") as error:
            commands._task("layer_norm")
        assert all(f"{t.key[:8]} layer_norm 8x{t.inputs[0].shape[1]} f32" in str(error.value) for t in known)
        assert str(error.value).count(" on cpu") == 9 and "cache list --library" in str(error.value)

    def test_finishing_an_empty_run_ends_it(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        open_run(tmp_path, goal(provider="exchange"))
        assert main(["search", "finish", str(tmp_path)]) == 0
        assert "ended: finish" in (said := capsys.readouterr().out) and "search step" not in said

    @pytest.mark.parametrize(("ended", "advice"), [
        ("rounds: all 2 are done", "extend RUN rounds=4"), ("plateau: 2 rounds gained less than 2%", "extend RUN patience=7"),
        ("budget: the next request could pass 1,000,000 tokens (max_tokens; 9 spent)", "extend RUN max_tokens=2000000"),
        ("floor: 1 ms is within 5% of the roofline floor", "extend RUN floor_margin=0.025"),
        ("provider: 401 wrong key", "step RUN"),
    ])  # fmt: skip
    def test_an_ended_run_says_why_and_how_to_go_on(self, run: Run, ended: str, advice: str) -> None:
        from torch_llmkernels.search.commands import _next

        run.tree.ended = ended
        assert _next(run) == f"ended: {ended}\nto go on: llmkernels search {advice.replace('RUN', str(run.directory))}"

    def test_a_step_of_an_ended_exchange_asks_nothing(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        answer = lambda r, s: Reply(finish="pending") if s.startswith("r2") else default_answer(r, s)  # noqa: E731
        engine = open_engine(tmp_path, SMALL, ScriptedModel(answer), ScriptedPool(), provider="exchange")
        engine.drive()
        finish(engine.run)
        engine.drive()
        assert main(["search", "step", str(tmp_path), "--no-compile"]) == 0
        said = capsys.readouterr().out
        assert "ended: finish" in said and "search extend" in said and "prompts" not in said
        assert not (tmp_path / "exchange").exists() and "without a reply when" in render_html(Run(tmp_path))

    @pytest.mark.parametrize(("arguments", "code", "words"), [
        (["status", "nowhere"], 1, "holds no search"),
        (["start", "no-such-task", "--provider", "exchange"], 1, "no task matches"),
        (["start", "TASK"], 2, "no provider"),
        (["start", "notes.txt"], 1, "notes.txt is not a JSON file"),
        (["start", "device.json"], 1, "neither a task nor a record"),
        (["start", "TASK", "--provider", "opnai"], 2, "unknown provider"),
        (["start", "TASK", "--provider", "exchange", "--set", "rouns=2"], 2, "did you mean 'rounds'"),
        (["start", "TASK", "--provider", "exchange", "--set", "rounds"], 2, "NAME=VALUE"),
        (["start", "TASK", "--provider", "exchange", "--price", "m=1"], 2, "IN,OUT"),
        (["start", "TASK", "--provider", "openai"], 2, "needs a model"),
    ])  # fmt: skip
    def test_wrong_use_is_one_line_that_says_what_to_do(
        self, tmp_path: Path, arguments: list[str], code: int, words: str, capsys: pytest.CaptureFixture[str], monkeypatch
    ) -> None:
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "store"))
        (tmp_path / "task.json").write_text(json.dumps(tasks.relu_add_task().to_json()))
        (tmp_path / "device.json").write_text(json.dumps({"facts": FACTS, "ceilings": CEILINGS}))
        (tmp_path / "notes.txt").write_text("other shapes")
        spelt = ["task.json" if a == "TASK" else a for a in arguments]
        assert main(["search", *spelt, *(["--device-file", "device.json"] if "start" in spelt else [])]) == code
        error = capsys.readouterr().err
        assert words in error and error.count("\n") == 1
        assert not (tmp_path / "searches").exists()

    def test_one_process_at_a_time_drives_a_run(self, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
        from filelock import FileLock

        with FileLock(run.directory / "run.lock"):
            assert main(["search", "step", str(run.directory)]) == 1
        assert "another process" in capsys.readouterr().err

    def test_extend_and_merge(self, run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        shutil.copytree(run.directory, tmp_path / "copy")
        assert main(["search", "extend", str(tmp_path / "copy"), "rounds=3"]) == 0
        assert main(["search", "merge", str(run.directory), str(tmp_path / "copy")]) == 0
        assert "took in 1 events" in capsys.readouterr().out
        assert Run(run.directory).goal.settings.rounds == 3 and not Run(run.directory).tree.ended


FACTS = {
    "target": "cpu", "kind": "cpu-test", "name": "a processor", "arch": "x86_64", "sms": 2, "smem_per_block": 0,
    "l2_bytes": 1 << 20, "threads": 2, "max_threads_per_sm": 1, "regs_per_sm": 0, "memory_bytes": 1 << 33, "driver": "",
    "unit": "a processor",
}  # fmt: skip
CEILINGS = {"copy": 1e10, "cache": 1e11, "fp32": 1e11, "tf32": 1e11, "fp16": 1e12}


class TestProgress:
    def test_a_line_and_a_table_tell_round_counts_best_and_spend(self, run: Run) -> None:
        said = progress.line(run)
        for words in ("round 2/2", "timed 8", "wrong 1", "best 1.50x (2 ms then, 25% of floor)", "12 k tokens"):
            assert words in said

    def test_without_a_terminal_only_changes_are_printed(self, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
        engine = open_engine(tmp_path, SMALL, ScriptedModel(default_answer), ScriptedPool())
        with progress.shown() as shown:
            engine.progress = shown
            engine.drive()
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) > 5 and all(a != b for a, b in itertools.pairwise(lines))


def test_a_run_never_holds_a_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch_llmkernels.search.openai_provider import Model, OpenAIProvider

    monkeypatch.setenv("SECRET_KEY", "sk-secret-value")
    provider = OpenAIProvider([Model("m", base_url="http://127.0.0.1:9/v1", api_key_env="SECRET_KEY")], max_retries=0)
    described = goal(models="m@http://127.0.0.1:9/v1#SECRET_KEY", provider="openai")
    from torch_llmkernels.search.engine import Engine

    Engine(open_run(tmp_path, described), provider=provider, pool=ScriptedPool()).drive()
    files = [path.read_text() for path in tmp_path.rglob("*") if path.is_file()]
    assert files and not any("sk-secret-value" in text for text in files)
