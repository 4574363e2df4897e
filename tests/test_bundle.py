"""Bundles: what goes in comes out as candidates, and nothing else gets in."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest

from tests import tasks
from tests.records import FACTS, decision_for, key_for, record_for
from torch_llmkernels.cache import bundle
from torch_llmkernels.cache.store import NullStore
from torch_llmkernels.errors import SchemaError, StoreError
from torch_llmkernels.evaluation import Decision, GraphDecision

TASK, OTHER = tasks.layer_norm_task(), tasks.layer_norm_task(cols=128)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "mine.llmk"
    decisions = [(key_for(OTHER), decision_for(OTHER)), (key_for(TASK), Decision(None, "kept Inductor"))]
    assert bundle.export(path, [record_for(TASK)], decisions, {"k": b"\x7fELF"}) == 4
    return path


def rewrite(path: Path, change) -> None:
    """Replace the entries of a bundle by what `change` makes of them, the manifest as it was unless changed."""
    with zipfile.ZipFile(path) as archive:
        entries = {name: archive.read(name) for name in archive.namelist()}
    change(entries)
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in entries.items():
            archive.writestr(name, content)


def edit_manifest(path: Path, change) -> None:
    def edit(entries: dict[str, bytes]) -> None:
        manifest = json.loads(entries[bundle.MANIFEST])
        change(manifest)
        entries[bundle.MANIFEST] = json.dumps(manifest).encode()

    rewrite(path, edit)


def test_imported_kernels_are_candidates_not_decisions(path: Path) -> None:
    store = NullStore()
    done = bundle.import_(path, store)
    assert len(done.records) == 2
    assert {record.task.key for record in store.imported("layer_norm")} == {TASK.key, OTHER.key}
    assert {record.origin for record in store.imported("layer_norm")} == {"import:mine"}
    assert store.decision(key_for(OTHER)) is None and store.keys("decision/") == []


def test_binaries_are_skipped_with_a_reason(path: Path) -> None:
    store = NullStore()
    (line,) = bundle.import_(path, store).skipped
    assert "binary" in line and store.keys("binary/") == []


def test_what_was_tried_elsewhere_comes_along_without_what_won(path: Path) -> None:
    store = NullStore()
    (name,) = bundle.import_(path, store).decisions  # the other decision tried nothing
    tried = store.imported_decision(key_for(OTHER))
    assert tried.tried == decision_for(OTHER).tried and tried.record is None and key_for(OTHER).task_key in name
    assert store.imported_decision(dataclasses.replace(key_for(OTHER), unit="another")) is None


def test_a_damaged_decision_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.llmk"
    bundle.export(path, decisions=[(dataclasses.replace(key_for(TASK), schema=1), decision_for(TASK))])

    def rename(entries: dict[str, bytes]) -> None:
        (name,) = (n for n in entries if n.startswith("decisions/"))
        entries[name] = entries[name].replace(b'"signature"', b'"signed"', 1)
        manifest = json.loads(entries[bundle.MANIFEST])
        manifest["entries"][name] = {"sha256": hashlib.sha256(entries[name]).hexdigest(), "size": len(entries[name])}
        entries[bundle.MANIFEST] = json.dumps(manifest).encode()

    rewrite(path, rename)
    refused(path, SchemaError, "entry decisions/")


def test_importing_twice_adds_once(path: Path) -> None:
    store = NullStore()
    assert bundle.import_(path, store) == bundle.import_(path, store)
    assert len(store.keys()) == 3  # two candidates, and what was tried beside one of them


def test_same_content_gives_the_same_file(tmp_path: Path) -> None:
    for name in "ab":
        bundle.export(tmp_path / name, [record_for(TASK), record_for(OTHER)])
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def refused(path: Path, error: type[Exception], reason: str) -> None:
    store = NullStore()
    with pytest.raises(error, match=reason):
        bundle.import_(path, store)
    assert store.keys() == [], "a bundle is taken whole or not at all"


def test_altered_entry_is_refused(path: Path) -> None:
    def alter(entries: dict[str, bytes]) -> None:
        name = next(n for n in entries if n.startswith("records/"))
        entries[name] = entries[name].replace(b"layer_norm", b"layer_form")

    rewrite(path, alter)
    refused(path, SchemaError, "sha256")


def test_added_and_missing_entries_are_refused(path: Path) -> None:
    rewrite(path, lambda entries: entries.update({"records/extra.json": b"{}"}))
    refused(path, SchemaError, "differ in records/extra.json")


@pytest.mark.parametrize("name", ["../../evil.json", "/etc/evil.json", "records/../evil.json", "records/a/b.json", "code/a.py"])
def test_entry_names_cannot_leave_the_bundle(path: Path, name: str) -> None:
    rewrite(path, lambda entries: entries.update({name: b"{}"}))
    edit_manifest(path, lambda manifest: manifest["entries"].update({name: {"sha256": "", "size": 2}}))
    refused(path, SchemaError, "not allowed")


def test_other_schema_is_refused(path: Path) -> None:
    edit_manifest(path, lambda manifest: manifest.update(schema=99))
    refused(path, SchemaError, "schema 99")


def test_truncated_file_and_other_files_are_refused(path: Path, tmp_path: Path) -> None:
    path.write_bytes(path.read_bytes()[:200])
    refused(path, SchemaError, "not a bundle")
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello.txt", "hello")
    refused(path, SchemaError, "not a bundle")
    refused(tmp_path / "absent.llmk", StoreError, "No such file")


def test_file_that_unpacks_to_too_much_is_refused(path: Path, monkeypatch) -> None:
    monkeypatch.setattr(bundle, "MAX_TOTAL_BYTES", 1000)
    refused(path, StoreError, "too large")


def test_whole_graph_decisions_count_on_the_kind_and_driver_they_were_measured_on(tmp_path: Path) -> None:
    measured = GraphDecision("g", (("a", "1"),), (("b", "2"),), 2.0, 1.0, 0.01, FACTS.kind, FACTS.unit, FACTS.driver)
    bundle.export(tmp_path / "mine.llmk", [record_for(TASK)], graphs=[measured])
    store = NullStore()
    done = bundle.import_(tmp_path / "mine.llmk", store)
    assert len(done.graphs) == 1 and len(done.records) == 1 and not done.skipped
    another_unit = SimpleNamespace(kind=FACTS.kind, unit="host-2", driver=FACTS.driver)
    assert store.graph_decision("g", another_unit) == measured
    assert store.graph_decision("other graph", another_unit) is None
    for changed in ({"driver": "g++ 13"}, {"kind": "cpu-x86_64-avx512"}):
        assert store.graph_decision("g", SimpleNamespace(**{**vars(another_unit), **changed})) is None
    own = GraphDecision("g", (), (("a", "1"),), 1.0, 1.0, 0.01, FACTS.kind, "host-2", FACTS.driver)
    store.put_graph_decision(own)
    assert store.graph_decision("g", another_unit) == own, "what was measured here goes first"


def test_a_damaged_graph_decision_refuses_the_bundle(tmp_path: Path) -> None:
    bundle.export(tmp_path / "x", graphs=[GraphDecision("g", (), (), 2.0, 1.0, 0.01)])
    with zipfile.ZipFile(tmp_path / "x") as archive:
        (name,) = (n for n in archive.namelist() if n.startswith("graphs/"))
    content = b'{"schema": 1}'
    rewrite(tmp_path / "x", lambda entries: entries.update({name: content}))
    entry = {"sha256": hashlib.sha256(content).hexdigest(), "size": len(content)}
    edit_manifest(tmp_path / "x", lambda manifest: manifest["entries"].update({name: entry}))
    refused(tmp_path / "x", SchemaError, "graph decision is damaged")
