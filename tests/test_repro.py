"""Reproducer scripts: they are found by the digits a log shows, stand alone, and run the kernel."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from types import SimpleNamespace

import pytest
from records import FACTS, decision_for, evaluation, record_for
from tasks import layer_norm_task

from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.library import Library
from torch_llmkernels.cache.store import Store
from torch_llmkernels.cli import main
from torch_llmkernels.errors import StoreError
from torch_llmkernels.evaluation import Record, Status
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.plan import Plan
from torch_llmkernels.repro import Subject, find, script
from torch_llmkernels.settings import Settings

KERNEL = (Path(__file__).parent / "kernels" / "layer_norm.cpp").read_text()
TASK = layer_norm_task(rows="d0", cols=16, stats=True, hints={"d0": 4})
OTHER = layer_norm_task(8, 32)


@pytest.fixture
def knobs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Settings:
    """A store with a decision for `TASK`, and a library with a record for `OTHER`."""
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("LLMKERNELS_LIBRARY_DIR", str(tmp_path / "library"))
    record = Record(TASK, "rows", KERNEL, (("GRAIN", 8),), FACTS.kind, evaluation(), "search:autumn")
    decision = dataclasses.replace(decision_for(TASK), record=record)
    Store(tmp_path / "store").put_decision(RecordKey.of(TASK, FACTS), decision)
    Library(tmp_path / "library").add(record_for(OTHER, KERNEL, Status.CORRECT))
    return Settings.from_environment()


def test_a_task_is_found_by_the_first_digits_of_its_key(knobs: Settings) -> None:
    found = find(TASK.key[:6], knobs)
    assert (found.task, found.kernel_name, found.constants) == (TASK, "rows", (("GRAIN", 8),))
    assert "search:autumn" in found.origin
    assert find(OTHER.key, knobs).origin == f"library, {FACTS.kind}"


def test_another_kernel_of_the_library_can_be_asked_for(knobs: Settings) -> None:
    assert find(TASK.key, knobs, kernel="ln").kernel_name == "ln"
    with pytest.raises(StoreError, match="kernel 'nonesuch'"):
        find(TASK.key, knobs, kernel="nonesuch")


def test_what_was_not_accepted_is_found_too(knobs: Settings) -> None:
    """A candidate of a bundle, and a library kernel that failed for a task of a graph that was compiled here."""
    imported, failed = layer_norm_task(2, 64), layer_norm_task(2, 128)
    Store(knobs.store_directory()).put_imported(dataclasses.replace(record_for(imported, KERNEL), origin="import:x"))
    Store(knobs.store_directory()).put("plan/g", Plan((failed,)).to_bytes())
    assert find(imported.key, knobs).origin == "import:x"
    assert (find(failed.key, knobs).kernel_name, find(failed.key, knobs).constants) == ("ln", None)


def test_too_few_digits_and_unknown_keys_are_errors_that_help(knobs: Settings) -> None:
    with pytest.raises(StoreError, match="starts 2 keys; give more digits"):
        find("", knobs)
    with pytest.raises(StoreError, match="llmkernels cache list"):
        find("zzz", knobs)


@pytest.mark.skipif(bool(target_for("cpu").unavailable()), reason="no C++ compiler")
def test_the_script_runs_the_kernel_beside_its_program(capsys) -> None:
    text = script(Subject(TASK, "rows", KERNEL, (("GRAIN", 8),), "a test"))
    namespace: dict = {"__name__": "repro"}
    exec(compile(text, "repro.py", "exec"), namespace)
    namespace["run"]()
    out = capsys.readouterr().out
    assert "did not run" not in out
    differences = {line.split()[0]: float(line.split()[-1]) for line in out.splitlines()}
    assert differences.keys() == {"y", "mean", "rstd"} and max(differences.values()) < 1e-5


def test_the_script_says_whether_the_kernel_passes(capsys) -> None:
    namespace: dict = {"__name__": "repro"}
    exec(compile(script(Subject(TASK, "rows", KERNEL, None, "a test")), "repro.py", "exec"), namespace)
    asked = []

    def evaluate(job: SimpleNamespace) -> object:
        asked.append(job)
        return evaluation(Status.WRONG)

    namespace["evaluate"] = evaluate
    assert namespace["check"]() is False
    assert (asked[0].task, asked[0].kernel_text, asked[0].constants) == (TASK, KERNEL, None)
    assert capsys.readouterr().out.startswith("FAIL: wrong: output y is wrong; the error may be 1.1 times eager's")
    namespace["evaluate"] = lambda job: evaluation()
    assert namespace["check"]() is True
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "error against float64: 1e-07 on normal data, eager's 1e-07"
    assert lines[-1].startswith("PASS: the error may be 1.1 times eager's")


@pytest.mark.parametrize("text", ["it's '''quoted'''", "ends in a backslash \\", "both \"\"\" and '''", "ends in a quote '"])
def test_any_kernel_text_survives_the_script(text: str) -> None:
    namespace: dict = {"__name__": "repro"}
    exec(compile(script(Subject(TASK, "rows", text, None, "a test")), "repro.py", "exec"), namespace)
    assert namespace["KERNEL"] == text


def test_command_writes_the_file_or_prints_it(knobs: Settings, tmp_path: Path, capsys) -> None:
    path = tmp_path / "out.py"
    assert main(["repro", TASK.key[:8], "--output", str(path)]) == 0
    assert str(path) in capsys.readouterr().out and TASK.key in path.read_text()
    assert main(["repro", TASK.key[:8], "--output", "-"]) == 0
    assert capsys.readouterr().out == path.read_text()
    assert main(["repro", "zzz"]) == 1
