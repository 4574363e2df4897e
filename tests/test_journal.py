"""The journal survives torn writes, refuses other damage, and merges copies."""

from __future__ import annotations

import gzip
import json
import logging
from pathlib import Path

import pytest

from torch_llmkernels.errors import SchemaError
from torch_llmkernels.search import journal
from torch_llmkernels.search.journal import Journal

EVENTS = [{"event": "warning", "text": "one"}, {"event": "warning", "text": "zwei \u2028 drei\r\n"}]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    written = tmp_path / "journal.jsonl"
    Journal(written).append(EVENTS)
    return written


def texts(path: Path) -> list[str]:
    return [event["text"] for event in Journal(path).events]


def test_what_is_appended_is_there_for_the_next_process(path: Path) -> None:
    Journal(path).append([{"event": "warning", "text": "three"}])
    assert texts(path) == ["one", "zwei \u2028 drei\r\n", "three"]


def test_every_line_is_one_json_object_with_its_time(path: Path) -> None:
    lines = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert all(line["at"] > 0 and line["clock"] >= 0 for line in lines)


@pytest.mark.parametrize("kept", range(1, 60, 7))
def test_a_torn_last_line_is_dropped_with_a_warning_and_the_next_one_is_whole(path: Path, kept: int, caplog) -> None:
    first = path.read_bytes().splitlines(keepends=True)[0]
    path.write_bytes(first + path.read_bytes()[len(first) :][:kept])
    with caplog.at_level(logging.WARNING):
        torn = Journal(path)
    assert "half-written last line" in caplog.text
    torn.append([{"event": "warning", "text": "after"}])
    assert texts(path) == ["one", "after"]


def test_a_last_line_that_only_lacks_its_newline_is_kept(path: Path) -> None:
    path.write_bytes(path.read_bytes().removesuffix(b"\n"))
    Journal(path).append([{"event": "warning", "text": "after"}])
    assert texts(path) == ["one", "zwei \u2028 drei\r\n", "after"]


def test_damage_before_the_last_line_is_an_error_that_names_the_line(path: Path) -> None:
    path.write_bytes(b'{"event": "war\n' + path.read_bytes())
    with pytest.raises(SchemaError, match=r"journal\.jsonl:1: damaged"):
        Journal(path)


def test_reading_leaves_the_file_alone_and_takes_gzip(path: Path, tmp_path: Path) -> None:
    path.write_bytes(path.read_bytes() + b'{"event": "w')
    before = path.read_bytes()
    packed = tmp_path / "journal.jsonl.gz"
    packed.write_bytes(gzip.compress(before))
    assert [e["text"] for e in journal.read(path)] == [e["text"] for e in journal.read(packed)] == texts(path)
    assert path.read_bytes() != before  # `texts` opened it for appending, which is what cuts the torn line off


def test_two_copies_that_went_on_separately_merge_without_repeating(path: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.jsonl"
    copy.write_bytes(path.read_bytes())
    Journal(path).append([{"event": "warning", "text": "here"}])
    Journal(copy).append([{"event": "warning", "text": "there"}])
    assert Journal(path).merge(journal.read(copy)) == 1
    assert Journal(path).merge(journal.read(copy)) == 0
    assert texts(path) == ["one", "zwei \u2028 drei\r\n", "here", "there"]


def test_the_clock_counts_running_time_only_and_goes_on_across_processes(path: Path) -> None:
    first = Journal(path)
    first.append(
        [
            {
                "event": "warning",
                "text": "x",
            }
        ]
    )
    reopened = Journal(path)
    assert reopened.clock() >= reopened.events[-1]["clock"]
