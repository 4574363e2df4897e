"""The command line: exit codes, one-line errors, and what each command tells."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests import tasks
from tests.records import KERNEL, decision_for, key_for, record_for
from torch_llmkernels.cache.key import RecordKey
from torch_llmkernels.cache.library import Library
from torch_llmkernels.cache.store import Store
from torch_llmkernels.capture import capture
from torch_llmkernels.cli import main
from torch_llmkernels.cli.doctor import Finding, examine
from torch_llmkernels.cli.explain import explain
from torch_llmkernels.cli.factory import made
from torch_llmkernels.evaluation import Decision, Status
from torch_llmkernels.kernels.source import parse_kernel
from torch_llmkernels.kernels.targets import target_for
from torch_llmkernels.settings import Settings

TASK = tasks.layer_norm_task()


@pytest.fixture
def store(tmp_path: Path, monkeypatch) -> Store:
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "store"))
    monkeypatch.setenv("LLMKERNELS_LIBRARY_DIR", str(tmp_path / "library"))
    Library(tmp_path / "library").add(record_for(tasks.layer_norm_task(cols=256)))
    return Store(tmp_path / "store")


def usage_error(*argv: str) -> int:
    with pytest.raises(SystemExit) as exit:
        main(argv)
    return exit.value.code


def test_wrong_usage_is_2(store: Store, capsys) -> None:
    assert usage_error() == usage_error("nonsense") == usage_error("cache", "show") == 2
    assert main(["explain", "no_factory_here"]) == 2
    assert "SCRIPT.py:FUNCTION" in capsys.readouterr().err


def test_misspelt_environment_is_one_line_and_2(monkeypatch, capsys) -> None:
    monkeypatch.setenv("LLMKERNELS_STRICKT", "1")
    assert main(["settings"]) == 2
    out, err = capsys.readouterr()
    assert out == "" and err.count("\n") == 1 and "did you mean 'strict'" in err


def test_debug_shows_the_traceback(store: Store) -> None:
    with pytest.raises(Exception, match="has no function"):
        main(["--debug", "explain", "json:nothing"])


def test_importing_the_command_line_is_light() -> None:
    code = "import sys, torch_llmkernels.cli as cli; cli.parser()\n"
    code += "assert not {'torch', 'openai', 'diskcache', 'rich', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_module_and_script_are_the_same(store: Store) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "torch_llmkernels.cli", "cache", "list"], capture_output=True, text=True, check=True
    )
    assert str(store.directory) in done.stdout


def test_list_and_show(store: Store, capsys) -> None:
    store.put_decision(key_for(TASK), decision_for(TASK))
    store.put_binary("k", b"code")
    assert main(["cache", "list", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [row["key"].split("/")[0] for row in listed] == ["decision", "binary"]
    assert "ln is correct, 2.00x the best baseline" in listed[0]["what"] and "x:float32[8,64]" in listed[0]["what"]
    assert main(["cache", "show", TASK.key]) == 0
    assert json.loads(capsys.readouterr().out)["decision"]["record"]["kernel_text"] == KERNEL


def test_the_library_is_listed_by_task_key(store: Store, capsys) -> None:
    """What `repro` and `search start` take; the store is empty here."""
    assert main(["cache", "list", "--library", "--json"]) == 0
    (row,) = json.loads(capsys.readouterr().out)
    assert (row["key"], row["region"], row["kernel"]) == (tasks.layer_norm_task(cols=256).key, "layer_norm", "ln")
    assert row["inputs"].startswith("8x256 f32") and row["of the best"] == "2.00x"
    assert main(["cache", "list", "--library"]) == 0
    assert row["key"] in capsys.readouterr().out


def test_show_wants_one_entry(store: Store, capsys) -> None:
    for task in (TASK, tasks.layer_norm_task(cols=128)):
        store.put_decision(key_for(task), decision_for(task))
    assert main(["cache", "show", "layer_norm"]) == 1
    assert "is in 2 keys" in capsys.readouterr().err
    assert main(["cache", "show", "softmax"]) == 1
    assert "llmkernels cache list" in capsys.readouterr().err


def test_list_survives_what_another_release_wrote(store: Store, capsys) -> None:
    store.put("decision/layer_norm/another/release", b'{"key": {"device_kind": "k", "tensors": "t"}, "decision": {"schema": 99}}')
    store.put("imported/layer_norm/damaged", b"{")
    assert main(["cache", "list", "--json"]) == 0
    decision, imported = json.loads(capsys.readouterr().out)
    assert "schema 99" in decision["what"] and imported["what"].startswith("unreadable")


def test_rm_removes_one_entry(store: Store, capsys) -> None:
    store.put_decision(key_for(TASK), decision_for(TASK))
    assert main(["cache", "rm", TASK.key]) == 0
    assert store.decision(key_for(TASK)) is None
    assert main(["cache", "rm", TASK.key]) == 1


def test_rm_of_a_task_removes_its_decisions_of_every_release_and_device(store: Store, capsys) -> None:
    other, keys = tasks.layer_norm_task(cols=128), [dataclasses.replace(key_for(TASK), torch=v) for v in ("2.12.0", "2.13.0")]
    for key in (*keys, key_for(other)):
        store.put_decision(key, decision_for(TASK))
    store.put_imported(decision_for(TASK).record)
    store.put_imported_decision(keys[0], decision_for(TASK))
    assert main(["cache", "rm", TASK.key]) == 0
    assert capsys.readouterr().out.count("removed decision/") == 2 and store.imported_decision(keys[0]) is None
    assert [store.decision(key) for key in keys] == [None, None]
    assert store.decision(key_for(other)) is not None and store.imported("layer_norm")


def test_a_read_only_store_is_shown_and_not_changed(store: Store, tmp_path: Path, capsys) -> None:
    store.put_decision(key_for(TASK), decision_for(TASK))
    store.directory.chmod(0o500)
    try:
        assert [main(["cache", *words]) for words in (["list"], ["show", TASK.key], ["verify"])] == [0, 0, 0]
        assert capsys.readouterr().out.count(TASK.key) >= 2
        assert main(["cache", "export", str(tmp_path / "mine.llmk")]) == 0
        assert main(["cache", "rm", TASK.key]) == 1 and "is read-only" in capsys.readouterr().err
        assert main(["cache", "import", str(tmp_path / "mine.llmk")]) == 1
    finally:
        store.directory.chmod(0o700)
    assert Store(store.directory).decision(key_for(TASK)) is not None


def test_verify_finds_damage_and_names_the_remedy(store: Store, capsys) -> None:
    store.put_decision(key_for(TASK), decision_for(TASK))
    assert main(["cache", "verify"]) == 0
    capsys.readouterr()
    name = f"decision/{dataclasses.replace(key_for(TASK), driver='moved').text}"
    store.put(name, store.get(f"decision/{key_for(TASK).text}"))
    assert main(["cache", "verify", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)
    assert "do not give its key" in problem and f"llmkernels cache rm {name}" in problem


def test_verify_finds_kernels_that_do_not_parse(store: Store, tmp_path: Path, capsys) -> None:
    (tmp_path / "library" / "layer_norm" / "bad.cpp").write_text("no header")
    assert main(["cache", "verify"]) == 1
    assert "bad.cpp" in capsys.readouterr().out


def test_export_and_import_carry_candidates(store: Store, tmp_path: Path, monkeypatch, capsys) -> None:
    store.put_decision(key_for(TASK), decision_for(TASK))
    bundle = str(tmp_path / "mine.llmk")
    assert main(["cache", "export", bundle]) == 0
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "other"))
    assert main(["cache", "import", bundle, "--later"]) == 0
    assert "added 1 candidate to" in capsys.readouterr().out
    other = Store(tmp_path / "other")
    assert [record.origin for record in other.imported("layer_norm")] == ["import:mine"] and list(other.decisions()) == []


def test_export_to_a_place_that_cannot_be_written_is_one_line_and_1(store: Store, tmp_path: Path, capsys) -> None:
    (tmp_path / "file").write_text("")
    assert main(["cache", "export", str(tmp_path / "file" / "x.llmk")]) == 1
    err = capsys.readouterr().err
    assert err.startswith(f"llmkernels: bundle {tmp_path}/file/x.llmk cannot be written") and err.count("\n") == 1


def test_import_of_something_else_is_one_line_and_1(store: Store, tmp_path: Path, capsys) -> None:
    (tmp_path / "x.llmk").write_text("hello")
    assert main(["cache", "import", str(tmp_path / "x.llmk")]) == 1
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and "not a bundle" in err and "x.llmk" in err


def test_unusable_store_is_one_line_and_1(tmp_path: Path, monkeypatch, capsys) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("LLMKERNELS_CACHE_DIR", str(tmp_path / "file"))
    assert main(["cache", "list"]) == 1
    assert "is not a directory" in capsys.readouterr().err


def found(settings: Settings) -> dict[str, Finding]:
    return {finding.topic.strip(): finding for finding in examine(settings)}


def test_doctor_reports_what_is_here(store: Store, tmp_path: Path) -> None:
    store.put_decision(key_for(TASK), decision_for(TASK))
    report = found(Settings.from_environment())
    assert {"python", "torch", "C++ compiler", "target cpu", "target cuda", "store", "library", "provider"} <= set(report)
    assert report["torch"].state == "ok"
    assert "1 decision" in report["store"].detail and str(store.directory) in report["store"].detail
    assert "cpu: ln" in report["layer_norm"].detail


def test_doctor_finds_nothing_wrong_with_the_shipped_library(tmp_path: Path) -> None:
    """Kernels that implement several signatures stand in one folder; a file is broken if it does not parse."""
    findings = examine(Settings(cache_dir=str(tmp_path / "store")))
    assert [finding for finding in findings if finding.state == "problem"] == []
    assert "conv2d" in {finding.topic.strip() for finding in findings}


def test_doctor_names_the_broken_file_and_its_error(store: Store, tmp_path: Path, monkeypatch, capsys) -> None:
    for folder, name in (("layer_norm", "bad.cpp"), ("softmax", "worse.cu")):
        path = tmp_path / "library" / folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("/*---\n---*/ no header" if name == "bad.cpp" else "no header")
    problems = [f for f in examine(Settings.from_environment()) if f.state == "problem"]
    assert [(f.topic.strip(), "bad.cpp" in f.detail or "worse.cu" in f.detail) for f in problems] == [
        ("layer_norm", True), ("softmax", True)
    ]  # fmt: skip
    assert all("header" in f.detail for f in problems)
    assert main(["doctor"]) == 1


def test_doctor_finds_problems(store: Store, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("")
    report = found(Settings(cache_dir=str(tmp_path / "file"), library_dir=str(tmp_path / "empty"), cxx="no-such-compiler"))
    assert report["store"].state == "problem" and report["library"].state == "problem"
    assert report["C++ compiler"].state == "note" and "no-such-compiler" in report["C++ compiler"].detail


def test_doctor_shows_no_secrets(store: Store, monkeypatch) -> None:
    monkeypatch.setenv("MY_KEY", "sk-secret")
    settings = Settings(provider="openai", model="m", base_url="https://user:hunter2@host:8000/v1?k=v", api_key_env="MY_KEY")
    shown = found(settings)["provider"].detail
    assert "https://host:8000/v1" in shown and "$MY_KEY: set" in shown
    assert not any(secret in shown for secret in ("sk-secret", "hunter2", "k=v"))


SCRIPT = """
import torch

class Net(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.norm = torch.nn.LayerNorm(64)

    def forward(self, x):
        return self.norm(x)

def make():
    return Net(), torch.ones(8, 64)

def alone():
    return Net()

def number():
    return 3
"""


@pytest.fixture
def script(tmp_path: Path) -> str:
    path = tmp_path / "my_model.py"
    path.write_text(SCRIPT)
    return str(path)


def test_explain_names_regions_keys_and_what_would_be_tried(store: Store, script: str, capsys) -> None:
    assert main(["explain", f"{script}:make", "--json"]) == 0
    (region,) = json.loads(capsys.readouterr().out)
    assert region["signature"] == "layer_norm" and len(region["key"]) == 20
    assert (region["state"], region["detail"]) == ("unverified", "to be verified at the first compilation: ln")
    assert region["differences"] == ["nothing is stored for layer_norm"]


def test_explain_names_the_key_field_that_differs_and_then_the_decision(store: Store, script: str) -> None:
    model, call = made(f"{script}:make")
    (region,) = capture(model, call.args)
    task = region.task
    key = RecordKey.of(task, target_for("cpu").facts())
    store.put_decision(dataclasses.replace(key, torch="2.0.0"), decision_for(task))
    (region,) = explain(model, call, Settings.from_environment())
    assert region.differences == (f"torch: {key.torch} here, 2.0.0 in the store",)
    store.put_decision(key, decision_for(task))
    (region,) = explain(model, call, Settings.from_environment())
    assert (region.state, region.differences) == ("hit", ()) and region.detail.startswith("swapped: ln runs at 2.00x")


def test_a_kernel_that_was_checked_but_not_timed_is_no_hit(store: Store, script: str) -> None:
    """A check under `swap="correct"` measures no time, so the next compilation has to."""
    model, call = made(f"{script}:make")
    task = capture(model, call.args)[0].task
    record = record_for(task, status=Status.CORRECT)
    tried = ((parse_kernel(KERNEL, "ln").label, record.evaluation),)
    store.put_decision(RecordKey.of(task, target_for("cpu").facts()), Decision(record, "", tried))
    (region,) = explain(model, call, Settings.from_environment())
    assert (region.state, region.differences) == ("unverified", ())
    (region,) = explain(model, call, Settings.from_environment().updated({"swap": "correct"}))
    assert region.state == "hit" and region.detail.startswith("swapped")


@pytest.mark.parametrize(
    ("factory", "reason"),
    [("{script}:absent", "no function"), ("{script}:number", "must return"), ("nowhere.py:make", "no file")],
)
def test_explain_says_what_is_wrong_with_a_factory(store: Store, script: str, factory: str, reason: str, capsys) -> None:
    assert main(["explain", factory.format(script=script)]) == 2
    err = capsys.readouterr().err
    assert err.count("\n") == 1 and reason in err


def test_error_of_the_users_script_is_one_line(store: Store, tmp_path: Path, capsys) -> None:
    (tmp_path / "broken.py").write_text("def make():\n    return undefined_name\n")
    assert main(["explain", f"{tmp_path}/broken.py:make"]) == 1
    assert capsys.readouterr().err == (
        f"llmkernels: {tmp_path}/broken.py:make raised NameError: name 'undefined_name' is not defined; "
        "run it by itself, or with llmkernels --debug, to see where\n"
    )


def test_a_long_error_of_torch_is_cut(store: Store, tmp_path: Path, capsys) -> None:
    (tmp_path / "loud.py").write_text("def make():\n    raise RuntimeError('word ' * 1000)\n")
    assert main(["explain", f"{tmp_path}/loud.py:make"]) == 1
    assert len(capsys.readouterr().err) < 400 + len(str(tmp_path))


@pytest.mark.parametrize("command", ["explain", "precompile"])
def test_a_model_without_the_inputs_that_it_needs_is_wrong_usage(store: Store, script: str, command: str, capsys) -> None:
    assert main([command, f"{script}:alone"]) == 2
    err = capsys.readouterr().err
    assert f"{script}:alone returned no inputs: return (model, inputs) or pass --input" in err and err.count("\n") == 1


def test_explain_takes_inputs_and_a_device_from_the_command_line(store: Store, script: str, capsys) -> None:
    assert main(["explain", f"{script}:alone", "--input", "4x64", "--input", "2x64", "--device", "cpu", "--json"]) == 0
    regions = json.loads(capsys.readouterr().out)
    assert [region["inputs"].split(",")[0] for region in regions] == ["4x64 f32", "d0x64 f32"]  # as in torch.compile
    assert main(["explain", f"{script}:alone", "--input", "four"]) == 2
    assert "--input 'four'" in capsys.readouterr().err
