"""The store: private, pickle-free, patient with damage, safe between processes."""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import pickle
import shutil
import sqlite3
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests import tasks
from tests.records import decision_for, evaluation, key_for, record_for
from torch_llmkernels.cache import disk
from torch_llmkernels.cache import store as store_module
from torch_llmkernels.cache.store import NullStore, Store, open_store
from torch_llmkernels.errors import StoreError
from torch_llmkernels.evaluation import Decision
from torch_llmkernels.settings import Settings


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def test_bytes_come_back_in_another_instance(store: Store) -> None:
    store.put("a", b"\x00small")
    store.put("b", b"large" * 50_000)
    again = Store(store.directory)
    assert again.get("a") == b"\x00small"
    assert again.get("b") == b"large" * 50_000
    assert again.get("c") is None
    assert again.keys() == ["a", "b"] and again.keys("b") == ["b"]
    assert again.delete("a") and not again.delete("a")
    assert store.get("a") is None


def test_only_bytes_and_text_keys_are_accepted(store: Store) -> None:
    with pytest.raises(TypeError):
        store._database.set("a", {"not": "bytes"})
    with pytest.raises(TypeError):
        store._database.set(("not", "text"), b"")


def test_nothing_is_ever_evicted(store: Store) -> None:
    assert store._database.eviction_policy == "none" and store._database.cull_limit == 0
    store._database.reset("size_limit", 1)
    for i in range(20):
        store.put(f"k{i}", b"x" * 1000)
    assert len(store.keys()) == 20


class Boom:
    def __reduce__(self) -> tuple[object, ...]:
        return os.mkdir, ("EXECUTED",)


def tamper(store: Store, sql: str, *values: object) -> None:
    with sqlite3.connect(store.directory / "cache.db") as connection:
        connection.execute(sql, values)


def test_pickled_row_is_a_miss_and_never_runs(store: Store, tmp_path: Path, monkeypatch, caplog) -> None:
    monkeypatch.chdir(tmp_path)
    store.put("a", b"value")
    tamper(store, "UPDATE Cache SET mode = 4, filename = NULL, value = ? WHERE key = 'a'", pickle.dumps(Boom()))
    assert store.get("a") is None
    assert not Path("EXECUTED").exists()
    assert "not raw bytes" in caplog.text


def test_pickled_file_and_pickled_key_never_run(store: Store, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    store.put("a", b"value" * 50_000)
    tamper(store, "UPDATE Cache SET mode = 4 WHERE key = 'a'")
    next(store.directory.glob("*/*/*.val")).write_bytes(pickle.dumps(Boom()))
    tamper(store, "INSERT INTO Cache (key, raw, mode, value) VALUES (?, 0, 1, ?)", pickle.dumps(Boom()), b"")
    assert store.get("a") is None
    assert store.keys() == ["a"]
    assert not Path("EXECUTED").exists()


def test_row_cannot_point_outside_the_store(store: Store, tmp_path: Path) -> None:
    secret = tmp_path / "secret"
    secret.write_bytes(b"secret")
    store.put("a", b"value")
    tamper(store, "UPDATE Cache SET mode = 2, value = NULL, filename = ? WHERE key = 'a'", "../secret")
    assert store.get("a") is None
    store.delete("a")
    assert secret.exists()


def test_truncated_value_is_a_miss_with_a_reason(store: Store, caplog) -> None:
    store.put("a", b"value" * 50_000)
    path = next(store.directory.glob("*/*/*.val"))
    path.write_bytes(path.read_bytes()[:1000])
    assert store.get("a") is None
    assert "truncated" in caplog.text
    store.put("a", b"again")
    assert store.get("a") == b"again"


def test_strict_raises_where_the_default_misses(store: Store) -> None:
    store.put("a", b"value")
    tamper(store, "UPDATE Cache SET value = x'00' WHERE key = 'a'")
    with pytest.raises(StoreError, match="unreadable"):
        Store(store.directory, strict=True).get("a")


@pytest.mark.parametrize("damage", ["header", "middle"])
def test_damaged_database_is_moved_aside_and_replaced(store: Store, damage: str, caplog) -> None:
    for i in range(50):
        store.put(f"k{i}", b"v" * 2000)
    store.close()
    path = store.directory / "cache.db"
    content = bytearray(path.read_bytes())
    start = 0 if damage == "header" else 4096
    content[start : start + 60_000] = b"\xff" * min(60_000, len(content) - start)
    path.write_bytes(content)
    again = Store(store.directory)
    assert again.get("k1") is None
    again.put("k1", b"new")
    assert again.get("k1") == b"new"
    assert "damaged" in caplog.text
    assert list(store.directory.glob("cache.db.damaged-*")), "the old database is kept"


def test_a_busy_database_is_not_taken_for_a_damaged_one(store: Store, monkeypatch) -> None:
    store.put("a", b"value")
    monkeypatch.setattr(disk, "_BUSY_SECONDS", 0.0)
    with sqlite3.connect(store.directory / "cache.db", isolation_level=None) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.raises(StoreError, match="locked"):
            disk.replace_damaged(store.directory)
        connection.execute("ROLLBACK")
    assert Store(store.directory).get("a") == b"value"


def test_directory_is_made_private(tmp_path: Path) -> None:
    assert Store(tmp_path / "deep" / "er").directory.stat().st_mode & 0o777 == 0o700
    (tmp_path / "plain").mkdir(mode=0o755)
    assert Store(tmp_path / "plain").directory.stat().st_mode & 0o777 == 0o700


@pytest.mark.parametrize("mode", [0o770, 0o707, 0o755])
def test_directory_with_other_permissions_is_refused(store: Store, mode: int) -> None:
    store.directory.chmod(mode)
    with pytest.raises(StoreError, match="chmod 700"):
        Store(store.directory)
    store.directory.chmod(0o700)


def test_foreign_directory_is_refused(store: Store, monkeypatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(store.directory).st_uid + 1)
    with pytest.raises(StoreError, match="belongs to user"):
        Store(store.directory)


@pytest.fixture
def image(store: Store) -> Iterator[Path]:
    """A store as a container image has it: filled, then read-only."""
    store.put_decision(key_for(tasks.layer_norm_task()), decision_for(tasks.layer_norm_task()))
    store.put_binary("large", b"code" * 50_000)
    store.close()
    store.directory.chmod(0o500)
    yield store.directory
    store.directory.chmod(0o700)


def test_a_read_only_store_is_used_and_left_as_it_is(image: Path, caplog) -> None:
    before = (image / "cache.db").read_bytes()
    baked = open_store(Settings(cache_dir=str(image)))
    key = key_for(tasks.layer_norm_task())
    assert baked.decision(key) == decision_for(tasks.layer_norm_task())
    assert baked.binary("large") == b"code" * 50_000 and baked.directory == image
    with baked.lock("a") as mine:
        assert mine
    assert open_store(Settings(cache_dir=str(image))) is baked
    assert caplog.records == [], "nothing is lost, so nothing is complained about"
    other = dataclasses.replace(key, driver="570.2")
    for _ in range(2):
        baked.put_decision(other, decision_for(tasks.layer_norm_task()))
    assert baked.decision(other) is not None and caplog.text.count("verified again in every process") == 1
    assert (image / "cache.db").read_bytes() == before and not (image / "locks").exists()


def test_the_copy_of_a_read_only_store_is_made_once_and_gone_with_the_process(image: Path, tmp_path: Path) -> None:
    (tmp_path / "tmp").mkdir()
    script = """
        import pathlib, tempfile
        tempfile.tempdir = sys.argv[2]
        Store(sys.argv[1]), Store(sys.argv[1], strict=True)
        print(len(list(pathlib.Path(sys.argv[2]).iterdir())))
    """
    assert results([run(script, str(image), str(tmp_path / "tmp"))]) == ["1\n"]
    assert list((tmp_path / "tmp").iterdir()) == []


def test_a_store_that_becomes_writable_is_written(image: Path) -> None:
    settings = Settings(cache_dir=str(image))
    assert open_store(settings).is_read_only
    image.chmod(0o700)
    open_store(settings).put("a", b"value")
    assert Store(image).get("a") == b"value"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a root's store")
def test_a_store_of_root_that_only_root_may_write_is_used(image: Path, monkeypatch) -> None:
    image.chmod(0o755)
    monkeypatch.setattr(os, "access", lambda *_: False)
    monkeypatch.setattr(os, "geteuid", lambda: 12345)
    assert Store(image).is_read_only and len(Store(image).keys("decision/")) == 1


@pytest.mark.parametrize("mode", [0o570, 0o507])
def test_a_read_only_store_that_others_may_write_is_refused(image: Path, mode: int) -> None:
    image.chmod(mode)
    with pytest.raises(StoreError, match="open to other users"):
        Store(image)


def test_a_read_only_store_with_files_that_others_may_write_or_own_is_refused(image: Path, monkeypatch) -> None:
    (image / "cache.db").chmod(0o666)
    with pytest.raises(StoreError, match="nobody else may write"):
        Store(image)
    (image / "cache.db").rename(image.parent / "elsewhere.db")
    (image / "cache.db").symlink_to(image.parent / "elsewhere.db")
    with pytest.raises(StoreError, match="cannot be copied"):
        Store(image)


def test_an_empty_read_only_directory_says_what_helps(tmp_path: Path, monkeypatch) -> None:
    (tmp_path / "store").mkdir(mode=0o500)
    with pytest.raises(StoreError, match=r"read-only \(mode 0500\) and empty; run: chmod 700"):
        Store(tmp_path / "store")
    (tmp_path / "store").chmod(0o700)
    monkeypatch.setattr(os, "access", lambda *_: False)  # as a read-only mount has it
    with pytest.raises(StoreError, match=r"read-only \(mode 0700\) and empty; fill it") as refused:
        Store(tmp_path / "store")
    assert "chmod" not in str(refused.value)


def test_symbolic_link_and_file_are_refused(store: Store, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(store.directory)
    with pytest.raises(StoreError, match="symbolic link"):
        Store(tmp_path / "link")
    (tmp_path / "file").write_text("")
    with pytest.raises(StoreError, match="LLMKERNELS_CACHE_DIR"):
        Store(tmp_path / "file")
    with pytest.raises(StoreError, match="LLMKERNELS_CACHE_DIR"):
        Store(tmp_path / "file" / "below")


def test_unusable_directory_degrades_to_memory_with_one_warning(tmp_path: Path, caplog) -> None:
    (tmp_path / "file").write_text("")
    settings = Settings(cache_dir=str(tmp_path / "file"))
    degraded = open_store(settings)
    assert isinstance(degraded, NullStore) and degraded.directory is None
    degraded.put("a", b"value")
    assert open_store(settings).get("a") == b"value"
    assert len(caplog.records) == 1 and "is not a directory" in caplog.text
    with pytest.raises(StoreError):
        open_store(dataclasses.replace(settings, strict=True))


def test_a_process_opens_a_store_once_and_notices_that_it_is_gone(tmp_path: Path) -> None:
    settings = Settings(cache_dir=str(tmp_path / "store"))
    first = open_store(settings)
    assert open_store(settings) is first
    first.put("a", b"value")
    shutil.rmtree(tmp_path / "store")
    again = open_store(settings)
    assert again is not first and again.get("a") is None
    again.put("b", b"value")
    assert Store(tmp_path / "store").keys() == ["b"]


def test_store_opened_to_others_meanwhile_is_refused(tmp_path: Path) -> None:
    settings = Settings(cache_dir=str(tmp_path / "store"))
    open_store(settings).put("a", b"value")
    (tmp_path / "store").chmod(0o777)
    assert isinstance(open_store(settings), NullStore)
    (tmp_path / "store").chmod(0o700)
    assert open_store(settings).get("a") == b"value"


def test_database_suits_a_network_file_system(store: Store) -> None:
    store.put("a", b"value")
    assert not list(store.directory.glob("cache.db-*")), "no write-ahead log and no shared memory"


def test_store_that_stops_working_does_not_stop_the_caller(store: Store, monkeypatch, caplog) -> None:
    def full(*_args: object) -> None:
        raise sqlite3.OperationalError("database or disk is full")

    monkeypatch.setattr(store._database, "set", full)
    store.put_decision(key_for(tasks.layer_norm_task()), decision_for(tasks.layer_norm_task()))
    assert "disk is full" in caplog.text


@pytest.fixture(params=["disk", "memory"])
def any_store(request, tmp_path: Path) -> store_module.BaseStore:
    return Store(tmp_path / "store") if request.param == "disk" else NullStore()


def test_decisions_round_trip(any_store) -> None:
    task = tasks.layer_norm_task()
    key, decision = key_for(task), decision_for(task)
    assert any_store.decision(key) is None
    any_store.put_decision(key, decision)
    assert any_store.decision(key) == decision
    assert list(any_store.decisions()) == [(key, decision)]


def test_a_winner_of_a_search_replaces_what_is_slower_and_stays_beside_what_is_faster(any_store) -> None:
    task = tasks.layer_norm_task()
    slow, fast, slower = (
        dataclasses.replace(record_for(task), kernel_name=name, evaluation=dataclasses.replace(evaluation(), time_ms=ms))
        for name, ms in (("slow", 1.5), ("fast", 1.0), ("slower", 1.9))
    )
    for found, best in ((slow, slow), (fast, fast), (slower, fast)):
        assert any_store.put_winner(key_for(task), found).record == best
        assert any_store.decision(key_for(task)).record == best
    tried = [name.split("@")[0] for name, _ in any_store.decision(key_for(task)).tried]
    assert tried == ["slow", "fast", "slower"]


def test_a_miss_is_explained_by_the_nearest_key(any_store, caplog) -> None:
    caplog.set_level(logging.INFO, "torch_llmkernels.cache")
    task = tasks.layer_norm_task()
    key = key_for(task)
    any_store.put_decision(dataclasses.replace(key, driver="570.2"), decision_for(task))
    any_store.put_decision(key_for(tasks.layer_norm_task(cols=128)), decision_for(task))
    assert any_store.decision(key) is None
    assert any_store.explain(key) == [f"driver: {key.driver} here, 570.2 in the store"]
    assert "570.2 in the store" in caplog.text
    assert any_store.explain(key_for(tasks.softmax_task())) == ["nothing is stored for softmax"]


def test_record_of_another_schema_is_a_miss(any_store, caplog) -> None:
    key = key_for(tasks.layer_norm_task())
    any_store.put_decision(key, decision_for(tasks.layer_norm_task()))
    name = f"decision/{key.text}"
    plain = json.loads(any_store.get(name))
    plain["decision"]["schema"] = 99
    any_store.put(name, json.dumps(plain).encode())
    assert any_store.decision(key) is None
    assert "schema 99" in caplog.text


def test_generation_follows_what_would_be_swapped(any_store) -> None:
    task, other = tasks.layer_norm_task(), tasks.softmax_task()
    empty = any_store.generation()
    any_store.put_decision(key_for(task), decision_for(task))
    one = any_store.generation()
    any_store.put_decision(key_for(task), dataclasses.replace(decision_for(task), reason="worded otherwise"))
    assert any_store.generation() == one != empty
    any_store.put_decision(key_for(other), Decision(None, "kept Inductor"))
    two = any_store.generation()
    any_store.put_decision(key_for(task), decision_for(task, text="another kernel"))
    assert len({empty, one, two, any_store.generation()}) == 4
    any_store.put_decision(key_for(task), decision_for(task))
    assert any_store.generation() == two
    for name in any_store.keys("decision/"):
        any_store.delete(name)
    assert any_store.generation() == empty


def test_binaries_and_imported_records(any_store) -> None:
    any_store.put_binary("k", b"\x7fELF")
    assert any_store.binary("k") == b"\x7fELF" and any_store.binary("other") is None
    record = record_for(tasks.layer_norm_task())
    any_store.put_imported(record)
    any_store.put_imported(record)
    assert any_store.imported("layer_norm") == [record] and any_store.imported("softmax") == []


def test_lock_is_not_waited_for_by_default(any_store) -> None:
    with any_store.lock("a") as mine, any_store.lock("a") as again, any_store.lock("b") as other:
        assert (mine, again, other) == (True, False, True)
    with any_store.lock("a") as mine:
        assert mine


def test_lock_files_are_private(store: Store) -> None:
    with store.lock("a"):
        (path,) = (store.directory / "locks").iterdir()
        assert path.stat().st_mode & 0o777 == 0o600


def run(script: str, *args: str) -> subprocess.Popen[str]:
    code = "import sys\nfrom torch_llmkernels.cache.store import Store\n" + textwrap.dedent(script)
    return subprocess.Popen([sys.executable, "-c", code, *args], stdout=subprocess.PIPE, text=True)


def results(processes: list[subprocess.Popen[str]]) -> list[str]:
    outputs = [process.communicate(timeout=120)[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * len(processes)
    return outputs


def test_processes_write_at_once_without_loss(tmp_path: Path) -> None:
    script = """
        store = Store(sys.argv[1], strict=True)
        for i in range(25):
            store.put(f"{sys.argv[2]}-{i}", sys.argv[2].encode() * 10)
    """
    results([run(script, str(tmp_path / "store"), name) for name in "abcd"])
    assert len(Store(tmp_path / "store").keys()) == 100


def test_work_under_a_lock_happens_once(tmp_path: Path) -> None:
    script = """
        store = Store(sys.argv[1], strict=True)
        with store.lock("work", wait=True):
            if store.get("done") is None:
                print("worked")
                store.put("done", b"1")
    """
    outputs = results([run(script, str(tmp_path / "store")) for _ in range(4)])
    assert sorted(outputs) == ["", "", "", "worked\n"]


def test_lock_of_a_killed_process_is_free_again(tmp_path: Path) -> None:
    script = """
        import os
        lock = Store(sys.argv[1]).lock("work")
        print(lock.__enter__(), flush=True)
        os.kill(os.getpid(), 9)
    """
    process = run(script, str(tmp_path / "store"))
    assert process.communicate(timeout=120)[0] == "True\n"
    with Store(tmp_path / "store").lock("work") as mine:
        assert mine


def test_processes_that_find_damage_at_once_agree_on_one_new_database(tmp_path: Path) -> None:
    directory = Store(tmp_path / "store").directory
    (directory / "cache.db").write_bytes(b"\xff" * 10_000)
    script = """
        store = Store(sys.argv[1])
        store.put(sys.argv[2], b"1")
    """
    results([run(script, str(directory), name) for name in "abc"])
    assert sorted(Store(directory).keys()) == ["a", "b", "c"]
    assert len(list(directory.glob("cache.db.damaged-*[0-9]"))) == 1


def test_store_needs_no_torch() -> None:
    code = "import sys, torch_llmkernels.cache.store, torch_llmkernels.cache.library, torch_llmkernels.cache.bundle\n"
    code += "assert not {'torch', 'numpy', 'openai', 'rich'} & set(sys.modules), sorted(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
