"""The benchmarks of the search: tables and plots from recorded journals, and what an equal budget means."""

from __future__ import annotations

import gzip
import io
import xml.dom.minidom
from pathlib import Path

import benchmark_path  # noqa: F401
import pytest
import trajectories
from rich.console import Console
from scripted_search import ScriptedModel, ScriptedPool, default_answer, open_engine


@pytest.fixture(scope="module")
def journals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of recorded searches with one run, as it is committed."""
    folder = tmp_path_factory.mktemp("journals") / "cpu-add_relu"
    open_engine(folder, model=ScriptedModel(default_answer), pool=ScriptedPool()).drive()
    packed = folder / "journal.jsonl.gz"
    packed.write_bytes(gzip.compress((folder / "journal.jsonl").read_bytes()))
    (folder / "journal.jsonl").unlink()
    return folder.parent


def test_a_recorded_search_in_numbers(journals: Path) -> None:
    (folder,) = trajectories.recorded(journals)
    row = trajectories.summary(folder.name, *trajectories.read_run(folder))
    assert (row["rounds"], row["ideas"], row["accepted"]) == (2, 4, True)
    assert row["speedups"] == [pytest.approx(3.0 / 2.5), pytest.approx(3.0 / 2.0)]  # Inductor takes 3 ms
    assert row["of_floor"] == [pytest.approx(0.5 / 2.5), pytest.approx(0.5 / 2.0)]
    assert row["candidates"]["wrong"] == 1 and row["tokens"] > 0
    assert not (folder / "journal.jsonl").exists()


def test_the_table_and_the_plot_name_every_run(journals: Path) -> None:
    rows = [trajectories.summary(f.name, *trajectories.read_run(f)) for f in trajectories.recorded(journals)]
    printed = io.StringIO()
    Console(file=printed, width=190).print(trajectories.table(rows))
    assert "cpu-add_relu" in printed.getvalue() and "1.20x 1.50x" in printed.getvalue()
    picture = trajectories.draw(rows)
    assert "cpu-add_relu 1.50x" in picture and xml.dom.minidom.parseString(picture)


def test_without_any_recorded_search_there_is_still_a_plot(tmp_path: Path) -> None:
    assert trajectories.recorded(tmp_path / "nothing") == []
    assert "no recorded search" in trajectories.draw([])
