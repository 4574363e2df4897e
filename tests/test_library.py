"""The library: plain files, evidence bound to the text of its kernel, damage skipped with a reason."""

from __future__ import annotations

import dataclasses
import json
import os
from pathlib import Path

import pytest

from tests import tasks
from tests.records import FACTS, KERNEL, record_for
from torch_llmkernels.cache.library import Library, default_library, write_atomically
from torch_llmkernels.errors import KernelSourceError, SettingsError, StoreError
from torch_llmkernels.evaluation import Status
from torch_llmkernels.settings import Settings

TASK = tasks.layer_norm_task()


@pytest.fixture
def library(tmp_path: Path) -> Library:
    return Library(tmp_path / "cache")


def write(library: Library, path: str, text: str) -> Path:
    target = library.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)
    return target


def test_kernels_are_found_by_signature_and_target(library: Library) -> None:
    write(library, "layer_norm/b.cpp", KERNEL)
    write(library, "layer_norm/a.cpp", KERNEL)
    write(library, "layer_norm/notes.txt", "not a kernel")
    assert [kernel.name for kernel in library.kernels("layer_norm", "cpu")] == ["a", "b"]
    assert library.kernels("layer_norm", "cuda") == () == library.kernels("softmax", "cpu")
    assert library.signatures() == ["layer_norm"]


def test_missing_directory_is_an_empty_library(tmp_path: Path) -> None:
    library = Library(tmp_path / "nowhere")
    assert library.kernels("layer_norm", "cpu") == () and library.record(TASK.key, FACTS.kind) is None
    assert list(library.records()) == [] and library.signatures() == []


def test_kernel_that_does_not_parse_is_skipped_with_a_warning(library: Library, caplog) -> None:
    write(library, "layer_norm/bad.cpp", "/*--- implements = ---*/")
    write(library, "layer_norm/good.cpp", KERNEL)
    assert [kernel.name for kernel in library.kernels("layer_norm", "cpu")] == ["good"]
    library.kernels("layer_norm", "cpu")
    assert caplog.text.count("library kernel skipped") == 1 and "bad.cpp" in caplog.text  # of many look-ups, the first says it
    ((path, reason),) = library.broken()
    assert path.name == "bad.cpp" and "bad.cpp: " in reason
    with pytest.raises(KernelSourceError, match=r"bad\.cpp"):
        Library(library.root, strict=True).kernels("layer_norm", "cpu")


def test_edited_kernel_is_read_again(library: Library) -> None:
    path = write(library, "layer_norm/a.cpp", KERNEL)
    before = library.kernels("layer_norm", "cpu")[0].digest
    path.write_text(KERNEL.replace("UNROLL = [1, 4]", "UNROLL = [1, 4, 8]"))
    assert library.kernels("layer_norm", "cpu")[0].digest != before


def test_added_record_comes_back(library: Library) -> None:
    record = record_for(TASK)
    path = library.add(record)
    assert path == library.root / "records" / FACTS.kind / "layer_norm" / f"{TASK.key}.json"
    assert library.record(TASK.key, FACTS.kind) == record
    assert list(library.records()) == [record]
    assert library.record(TASK.key, "nvidia-h100") is None
    assert [kernel.text for kernel in library.kernels("layer_norm", "cpu")] == [KERNEL]


def test_record_refers_to_its_kernel_instead_of_repeating_it(library: Library) -> None:
    plain = json.loads(library.add(record_for(TASK)).read_text())
    assert "kernel_text" not in plain and len(plain["kernel_sha256"]) == 64


@pytest.mark.parametrize("status", [s for s in Status if not s.is_correct])
def test_only_accepted_kernels_are_added(library: Library, status: Status) -> None:
    with pytest.raises(StoreError, match="not accepted"):
        library.add(record_for(TASK, status=status))
    assert not library.root.exists()


def test_adding_does_not_replace_another_kernel_of_the_same_name(library: Library) -> None:
    library.add(record_for(TASK))
    edited = record_for(tasks.layer_norm_task(cols=128), text=KERNEL + "// edited\n")
    with pytest.raises(StoreError, match="another text"):
        library.add(edited)
    library.add(edited, replace=True)
    assert library.record(edited.task.key, FACTS.kind) == edited


def test_record_whose_kernel_was_edited_does_not_count(library: Library, caplog) -> None:
    library.add(record_for(TASK))
    write(library, "layer_norm/ln.cpp", KERNEL + "// edited\n")
    assert library.record(TASK.key, FACTS.kind) is None
    assert "edited after" in caplog.text
    with pytest.raises(StoreError, match="edited after"):
        Library(library.root, strict=True).record(TASK.key, FACTS.kind)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda plain: {**plain, "schema": 99}, "schema 99"),
        (lambda plain: {k: v for k, v in plain.items() if k != "kernel_sha256"}, "names no task"),
        (lambda plain: {**plain, "kernel_name": "../../etc/passwd"}, "cannot name a file"),
        (lambda plain: {**plain, "kernel_name": "gone"}, "No such file"),
        (lambda plain: {**plain, "task": {**plain["task"], "device": "tpu"}}, "tpu"),
        (lambda plain: [], "names no task"),
    ],
)
def test_damaged_record_is_skipped_with_a_reason(library: Library, damage, reason: str, caplog) -> None:
    path = library.add(record_for(TASK))
    path.write_text(json.dumps(damage(json.loads(path.read_text()))))
    assert library.record(TASK.key, FACTS.kind) is None
    assert reason in caplog.text


def test_record_under_another_tasks_name_is_skipped(library: Library, caplog) -> None:
    path = library.add(record_for(TASK))
    os.replace(path, path.with_name("0" * 20 + ".json"))
    assert library.record("0" * 20, FACTS.kind) is None
    assert TASK.key in caplog.text


def test_signature_cannot_leave_the_library(library: Library) -> None:
    with pytest.raises(StoreError, match="cannot name a file"):
        library.kernels("../other", "cpu")
    with pytest.raises(StoreError, match="cannot name a file"):
        library.add(dataclasses.replace(record_for(TASK), kernel_name="a/b"))


def test_digest_follows_content_and_not_times(library: Library) -> None:
    empty = library.digest
    path = write(library, "layer_norm/a.cpp", KERNEL)
    one = library.digest
    os.utime(path, ns=(1, 1))
    assert Library(library.root).digest == one != empty
    path.write_text(KERNEL + "\n")
    assert library.digest != one
    path.write_text(KERNEL)
    assert library.digest == one
    library.add(record_for(TASK))
    assert library.digest != one


def test_default_library_is_the_checkouts(tmp_path: Path) -> None:
    assert default_library(Settings()).root == Path(__file__).resolve().parents[1] / "cache"
    assert default_library(Settings(library_dir=str(tmp_path))).root == tmp_path
    with pytest.raises(SettingsError, match="not a directory"):
        default_library(Settings(library_dir=str(tmp_path / "nowhere")))


def test_one_file_serves_every_signature_that_it_lists(library: Library) -> None:
    text = KERNEL.replace('implements = "layer_norm"', 'implements = ["layer_norm", "layer_norm.relu"]')
    write(library, "layer_norm/both.cpp", text)
    assert text != KERNEL and library.signatures() == ["layer_norm", "layer_norm.relu"]
    assert [kernel.name for kernel in library.kernels("layer_norm.relu", "cpu")] == ["both"]
    assert library.kernels("softmax", "cpu") == ()


def test_a_write_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    (tmp_path / "taken").mkdir()
    with pytest.raises(OSError):
        write_atomically(tmp_path / "taken", "text")
    assert [p.name for p in tmp_path.iterdir()] == ["taken"]
