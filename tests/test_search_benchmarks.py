"""The benchmarks of the search: tables and plots from recorded journals, and what an equal budget means."""

from __future__ import annotations

import gzip
import io
import xml.dom.minidom
from pathlib import Path

import benchmark_path  # noqa: F401
import branching
import pytest
import search_throughput
import trajectories
from rich.console import Console
from scripted_search import SMALL, ScriptedModel, ScriptedPool, default_answer, evaluation, open_engine

from torch_llmkernels.search.budget import preset

RECORDED = trajectories.ROOT / "cache" / "journals"


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


@pytest.mark.parametrize("folder", trajectories.recorded(RECORDED), ids=lambda folder: folder.name)
def test_every_recorded_search_replays_and_its_best_never_gets_worse(folder: Path) -> None:
    row = trajectories.summary(folder.name, *trajectories.read_run(folder))
    speedups = [v for v in row["speedups"] if v]
    assert speedups == sorted(speedups)
    assert all(v is None or v <= 1.06 for v in row["of_floor"])


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


def test_searches_are_compared_at_the_smaller_spend(tmp_path: Path) -> None:
    settings = {"default": SMALL, "sequential": preset("sequential", rounds=3, repairs=0)}
    for name, numbers in settings.items():
        model = ScriptedModel(default_answer)
        open_engine(tmp_path / name, settings=numbers, model=model, pool=ScriptedPool(), preset=name).drive()
    folders = trajectories.recorded(tmp_path)
    first, second = branching.compare([(*trajectories.read_run(f), trajectories.journal_of(f)) for f in folders])
    assert (first["preset"], second["preset"]) == ("default", "sequential") and first["tokens"] == second["tokens"]
    assert first["tokens"] == trajectories.read_run(tmp_path / "sequential")[1].spent.tokens
    assert second["best"][-1] == pytest.approx(3.0 / 1.5)  # three rounds, each half a millisecond faster
    assert first["best"][-1] == pytest.approx(3.0 / 2.5)  # of the same tokens the other had one round
    assert branching.compare([(*trajectories.read_run(folders[0]), trajectories.journal_of(folders[0]))]) == []


def test_a_kernel_counts_once_its_reply_is_paid_for() -> None:
    points = [(100, 0.8), (300, 1.5)]
    assert [branching.reached(points, tokens) for tokens in (50, 100, 299, 300)] == [None, 0.8, 0.8, 1.5]


def test_throughput_counts_devices_and_takes_compilation_out() -> None:
    numbers = search_throughput.rate([evaluation("1.0")] * 6, wall_s=30.0, devices=2, compile_s=5.0)
    assert numbers["per_minute"] == 6.0 and numbers["per_minute_overlapped"] == 12.0
    assert len(set(search_throughput.different(["a\n", "b\n"], 5))) == 5
