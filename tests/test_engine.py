"""The branching search end to end, with a scripted model and pool: what it asks, when it stops, what survives a kill."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections import Counter
from concurrent.futures import Future
from pathlib import Path

import pytest
from scripted_search import (
    SMALL,
    ScriptedModel,
    ScriptedPool,
    code_reply,
    default_answer,
    evaluation,
    goal,
    ideas_reply,
    kernel,
    open_engine,
)  # fmt: skip

from torch_llmkernels.errors import SearchError
from torch_llmkernels.evaluation import Evaluation, Record, Status
from torch_llmkernels.search import journal, progress, render
from torch_llmkernels.search.budget import preset
from torch_llmkernels.search.candidates import static_check
from torch_llmkernels.search.engine import Engine, extend, finish, open_run, result
from torch_llmkernels.search.journal import Journal
from torch_llmkernels.search.llm import ExchangeProvider, ReplayProvider, Reply
from torch_llmkernels.search.run import Run
from torch_llmkernels.search.tree import CONFIRM

import tasks  # isort: skip

PENDING = Reply(finish="pending")


def searched(folder: Path, answer=default_answer, settings=SMALL, **changes):
    model, pool = ScriptedModel(answer), ScriptedPool(changes.pop("full", None))
    engine = open_engine(folder, settings, model, pool, **changes)
    engine.drive()
    return engine, model, pool


def state(engine: Engine) -> dict[str, object]:
    """What two searches must agree on, whatever was killed in between."""
    tree = engine.tree
    return {
        "prompts": {p.slot: (p.id, p.candidate, p.rejected) for p in tree.prompts.values()},
        "candidates": {c.slot: (c.id, c.parent, c.time_ms) for c in tree.candidates.values()},
        "ideas": {n.slot: n.idea for n in tree.ideas.values()},
        "end": (tree.rounds, tree.ended, tree.winner),
    }


class TestTheLoop:
    def test_ideas_become_variants_and_the_fastest_seeds_the_next_round(self, tmp_path: Path) -> None:
        engine, model, _ = searched(tmp_path)
        assert model.slots[0] == "r1.s0.ideas.a0"
        assert {"r1.s0.i0.v0.a0", "r1.s0.i0.v1.a0", "r1.s0.i1.v0.a0", "r1.s0.i1.v1.a0"} <= set(model.slots)
        (seed,) = engine.tree.rounds[1]
        assert engine.tree.candidates[seed].slot == "r1.s0.i0.v0.a0"
        assert kernel("2.500") in model.prompts["r2.s0.i0.v0.a0"]

    def test_the_winner_passed_the_full_check_and_is_a_record_in_the_folder(self, tmp_path: Path) -> None:
        engine, _, pool = searched(tmp_path)
        record = Record.from_json(json.loads((tmp_path / "winner.json").read_text()))
        assert record == result(engine.run).record
        assert (record.evaluation.time_ms, record.evaluation.tier) == (2.0, "full")
        assert record.kernel_text == kernel("2.000") and record.origin == f"search:{tmp_path.name}"
        assert pool.jobs["2.000", "full"] == 1

    def test_a_winner_that_fails_the_full_check_gives_way_to_the_next(self, tmp_path: Path) -> None:
        engine, _, pool = searched(tmp_path, full={"2.000": "wrong"})
        assert result(engine.run).record.evaluation.time_ms == 2.1
        assert pool.jobs["2.000", "full"] == 1

    def test_without_any_correct_kernel_the_end_is_honest(self, tmp_path: Path) -> None:
        def answer(role: str, slot: str) -> str:
            return (
                default_answer(role, slot) if role == "ideas" else code_reply("crashed").replace("y[i] =", f"/*{slot}*/ y[i] =")
            )

        engine, _, _ = searched(tmp_path, answer)
        assert result(engine.run).record is None and engine.tree.ended.startswith("rounds")
        assert not (tmp_path / "winner.json").exists()

    def test_what_failed_goes_back_with_its_source_and_the_reason_a_bounded_number_of_times(self, tmp_path: Path) -> None:
        _, model, _ = searched(tmp_path)
        assert "scripted: wrong" in model.prompts["r1.s0.i0.v1.a1"] and kernel("wrong") in model.prompts["r1.s0.i0.v1.a1"]
        assert "r1.s0.i0.v1.a2" not in model.slots

    def test_a_file_that_breaks_the_format_never_reaches_the_pool(self, tmp_path: Path) -> None:
        def answer(role: str, slot: str) -> str:
            text = default_answer(role, slot)
            return text.replace('"n"]', '"nn", "n"]') if slot == "r1.s0.i1.v0.a0" else text

        engine, model, pool = searched(tmp_path, answer)
        (broken,) = [c for c in engine.tree.candidates.values() if c.slot == "r1.s0.i1.v0.a0"]
        assert broken.evaluation.status is Status.INVALID and "parameters" in broken.evaluation.detail
        assert "parameters" in model.prompts["r1.s0.i1.v0.a1"]
        assert pool.jobs["2.600", "quick"] == 1  # the repaired one

    @pytest.mark.parametrize(("reply", "reason"), [
        (Reply("I would rather not."), "no code block"),
        (Reply("```cpp\n" + kernel("1.0")[:90], finish="length"), "cut off"),
        (Reply("", finish="refusal"), "refused"),
        (Reply(""), "no code block"),
        (Reply("```cpp\nint x;\n```"), "no kernel header"),
    ])  # fmt: skip
    def test_a_reply_without_a_kernel_is_asked_again_with_the_reason(self, tmp_path: Path, reply: Reply, reason: str) -> None:
        _, model, _ = searched(tmp_path, lambda role, slot: reply if slot == "r1.s0.i0.v0.a0" else default_answer(role, slot))
        assert reason in model.prompts["r1.s0.i0.v0.a1"]

    def test_ideas_that_cannot_be_read_are_asked_for_again(self, tmp_path: Path) -> None:
        engine, model, _ = searched(
            tmp_path, lambda role, slot: "Tile it." if slot == "r1.s0.ideas.a0" else default_answer(role, slot)
        )
        assert "no list of ideas" in model.prompts["r1.s0.ideas.a1"]
        assert len(engine.tree.ideas) == 4

    def test_an_idea_is_not_tried_twice(self, tmp_path: Path) -> None:
        answer = lambda role, slot: ideas_reply("Use  vector loads!") if role == "ideas" else default_answer(role, slot)  # noqa: E731
        engine, model, _ = searched(tmp_path, answer)
        assert len(engine.tree.ideas) == 1
        assert "repeats" in model.prompts["r2.s0.ideas.a1"]

    def test_the_same_source_is_evaluated_once(self, tmp_path: Path) -> None:
        answer = lambda role, slot: default_answer(role, slot) if role == "ideas" else code_reply("2.0")  # noqa: E731
        engine, _, pool = searched(tmp_path, answer)
        assert pool.jobs["2.0", "quick"] == 1
        assert sum(bool(c.duplicate_of) for c in engine.tree.candidates.values()) == 7

    def test_later_prompts_list_every_idea_tried_with_its_outcome(self, tmp_path: Path) -> None:
        _, model, _ = searched(tmp_path)
        assert "r1.s0.ideas.a0 vector loads | 1.15x the best baseline (2.6 ms then)" in model.prompts["r2.s0.ideas.a0"]

    def test_known_kernels_compete_and_seed_the_first_round(self, tmp_path: Path) -> None:
        settings = preset("default", rounds=1, ideas=1, variants=1)
        engine, model, pool = searched(tmp_path, settings=settings, bank=(("known", kernel("1.5")), ("slow", kernel("9.0"))))
        assert pool.jobs["1.5", "quick"] == pool.jobs["9.0", "quick"] == 1
        assert kernel("1.5") in model.prompts["r1.s0.ideas.a0"]
        assert "Where to start" not in model.prompts["r1.s1.ideas.a0"]
        assert result(engine.run).record.kernel_text == kernel("1.5")

    def test_several_requests_fly_at_once_and_the_end_is_the_same(self, tmp_path: Path) -> None:
        one, _, _ = searched(tmp_path / "one")
        many = open_engine(tmp_path / "many", SMALL, ScriptedModel(default_answer, concurrency=4), ScriptedPool())
        many.drive()
        assert state(many)["end"] == state(one)["end"] and set(state(many)["candidates"]) == set(state(one)["candidates"])


class TestSeeds:
    @staticmethod
    def chosen(folder: Path, times: dict[str, float], seeds: int) -> list[str]:
        answer = lambda role, slot: ideas_reply(*"abc") if role == "ideas" else code_reply(str(times[slot[6:11]]))  # noqa: E731
        engine, _, _ = searched(folder, answer, preset("default", rounds=1, ideas=3, variants=2, seeds=seeds))
        return [c.slot[6:11] for c in engine.tree.seeds()]

    def test_one_per_idea_line_even_if_its_second_variant_is_faster(self, tmp_path: Path) -> None:
        times = {"i0.v0": 1.00, "i0.v1": 1.01, "i1.v0": 1.05, "i1.v1": 1.50, "i2.v0": 1.06, "i2.v1": 2.0}
        assert self.chosen(tmp_path, times, 3) == ["i0.v0", "i1.v0", "i2.v0"]

    def test_unless_it_is_far_ahead_of_every_other_line(self, tmp_path: Path) -> None:
        times = {"i0.v0": 1.00, "i0.v1": 1.01, "i1.v0": 1.50, "i1.v1": 1.60, "i2.v0": 1.70, "i2.v1": 2.0}
        assert self.chosen(tmp_path, times, 3) == ["i0.v0", "i0.v1", "i1.v0"]


    def test_by_the_ratio_to_the_baselines_beside_each_not_by_milliseconds(self, tmp_path: Path) -> None:
        class Machine(ScriptedPool):
            """Five times slower while it evaluates a kernel of verdict 1.0: a user next door."""

            def submit(self, job):
                found = super().submit(job).result()
                slow = 5.0 if "verdict: 1.0" in job.kernel_text else 1.0
                times = tuple((name, ms * slow) for name, ms in found.baselines_ms)
                future = Future()
                future.set_result(dataclasses.replace(found, time_ms=found.time_ms * slow, baselines_ms=times))
                return future

        answer = lambda r, s: ideas_reply(*"ab") if r == "ideas" else code_reply("1.0" if ".i0." in s else "2.0")  # noqa: E731
        engine = open_engine(tmp_path, preset("default", rounds=1, ideas=2, variants=1), ScriptedModel(answer), Machine())
        engine.drive()
        assert [c.time_ms for c in engine.tree.ranking()] == [5.0, 2.0]
        assert engine.tree.winner == engine.tree.seeds()[0].id == engine.tree.ranking()[0].id


class TestNoise:
    """A quick evaluation of much spread is repeated once, and the steadier one counts."""

    @staticmethod
    def driven(folder: Path, first: tuple[str, float], second: tuple[str, float]) -> tuple[Engine, ScriptedModel, ScriptedPool]:
        class Noisy(ScriptedPool):
            """Finds a kernel of verdict 2.0 so fast, with so much spread, the first and the second time."""

            def submit(self, job):
                future = super().submit(job)
                if job.tier == "quick" and "verdict: 2.0\n" in job.kernel_text:
                    verdict, spread = first if self.jobs["2.0", "quick"] == 1 else second
                    found = evaluation(verdict)
                    future = Future()
                    future.set_result(dataclasses.replace(found, spread=spread) if found.time_ms else found)
                return future

        answer = lambda r, s: ideas_reply(*"ab") if r == "ideas" else code_reply("2.0" if ".i0." in s else "1.8")  # noqa: E731
        model, pool = ScriptedModel(answer), Noisy()
        engine = open_engine(folder, preset("default", rounds=1, ideas=2, variants=1, repairs=0), model, pool)
        engine.drive()
        return engine, model, pool

    def test_the_steadier_second_one_decides_the_place(self, tmp_path: Path) -> None:
        engine, _, pool = self.driven(tmp_path, ("1.0", 0.5), ("2.0", 0.02))
        assert [c.time_ms for c in engine.tree.ranking()] == [1.8, 2.0]
        assert pool.jobs["2.0", "quick"] == 2 and pool.jobs["1.8", "quick"] == 1
        tiers = [(e["tier"], e["evaluation"]["time_ms"]) for e in engine.run.journal.events if e["event"] == "evaluation"]
        assert ("quick", 1.0) in tiers and ("repeat", 2.0) in tiers
        assert state(Engine(open_run(tmp_path))) == state(engine)  # the journal tells the same

    def test_a_second_one_of_more_spread_changes_nothing_and_there_is_no_third(self, tmp_path: Path) -> None:
        engine, _, pool = self.driven(tmp_path, ("1.5", 0.4), ("1.2", 0.9))
        assert engine.tree.ranking()[0].time_ms == 1.5 and pool.jobs["2.0", "quick"] == 2

    def test_a_steady_one_is_not_repeated(self, tmp_path: Path) -> None:
        engine, _, pool = self.driven(tmp_path, ("1.5", 0.3), ("9.0", 0.0))
        assert engine.tree.ranking()[0].time_ms == 1.5 and pool.jobs["2.0", "quick"] == 1

    def test_what_is_wrong_the_second_time_is_wrong(self, tmp_path: Path) -> None:
        engine, _, _ = self.driven(tmp_path, ("1.5", 0.4), ("wrong", 0.0))
        assert [c.time_ms for c in engine.tree.ranking()] == [1.8]

    def test_a_time_that_does_not_count_breaks_no_floor(self, tmp_path: Path) -> None:
        engine, _, _ = self.driven(tmp_path, ("0.1", 0.9), ("2.0", 0.02))
        assert engine.tree.floor_ms(0.5) == 0.5

    def test_the_next_round_waits_for_the_second_one(self, tmp_path: Path) -> None:
        engine, _, _ = self.driven(tmp_path, ("1.0", 0.5), ("2.0", 0.02))
        later = ("repeat", "full", "stop", "end")
        before = [e for e in engine.run.journal.events if e.get("tier", e["event"]) not in later]
        (tmp_path / "journal.jsonl").write_text("".join(json.dumps(e) + "\n" for e in before))
        proposing = Engine(open_run(tmp_path), provider=ScriptedModel(default_answer))
        proposing.drive()
        assert not proposing.tree.stop and [tier for _, tier in proposing.waiting()] == ["repeat"]


class TestStopping:
    def test_near_the_floor(self, tmp_path: Path) -> None:
        engine, _, _ = searched(tmp_path, lambda r, s: default_answer(r, s) if r == "ideas" else code_reply("0.52"))
        assert engine.tree.ended.startswith("floor") and len(engine.tree.rounds) == 1

    def test_not_at_a_floor_that_a_second_evaluation_does_not_confirm(self, tmp_path: Path) -> None:
        class Drifts(ScriptedPool):
            def submit(self, job):
                future = super().submit(job)
                if self.jobs["0.52", "quick"] < 2:
                    return future
                late = Future()
                late.set_result(evaluation("0.60"))
                return late

        answer = lambda r, s: default_answer(r, s) if r == "ideas" else code_reply("0.52")  # noqa: E731
        engine = open_engine(tmp_path, preset("default", rounds=1, ideas=1, variants=1), ScriptedModel(answer), Drifts())
        engine.drive()
        assert engine.tree.ended.startswith("rounds")
        best = engine.tree.best()
        assert best.evaluations["quick"].time_ms == 0.52 and best.evaluations[CONFIRM].time_ms == 0.60

    def test_not_at_a_floor_that_a_kernel_has_broken(self, tmp_path: Path) -> None:
        engine, _, _ = searched(tmp_path, lambda r, s: default_answer(r, s) if r == "ideas" else code_reply("0.40"))
        assert engine.tree.ended.startswith(("rounds", "plateau"))
        assert engine.tree.floor_ms(0.5) == 0.0
        assert "a kernel was faster" in render.floor_section(engine.goal, engine.tree)

    def test_the_floor_is_that_of_the_best_ceilings_measured_in_the_search(self, tmp_path: Path) -> None:
        engine, _, _ = searched(tmp_path)
        assert engine.tree.floor_ms(0.9) == 0.5 and engine.tree.floor_ms(0.3) == 0.3  # evaluations say 0.5

    def test_the_device_s_ceilings_and_every_share_of_the_floor_follow_the_corrected_floor(self, tmp_path: Path) -> None:
        before = {"ms": 1.0, "bytes": 10**7, "flops": 1, "bound": "bytes"}  # evaluations say 0.5
        ceilings = {"copy": 1e10, "cache": 5e10, "fp32": 1e11}
        _, model, _ = searched(tmp_path, floor=before, ceilings=ceilings)
        first, second = model.prompts["r1.s0.ideas.a0"], model.prompts["r2.s0.ideas.a0"]
        assert "read plus written: 10 GB/s\n" in first and "**1 ms**" in first
        assert "read plus written: 20 GB/s (at least, as measured beside a later evaluation" in second
        assert "**0.5 ms**" in second and "rests on the measured memory bandwidth" in second
        assert "20% of the roofline floor's speed" in second and "all threads: 50 GB/s\n" in second  # 0.5 ms of 2.5 ms

    def test_ceilings_that_a_kernel_has_broken_are_not_called_ceilings(self, tmp_path: Path) -> None:
        answer = lambda r, s: default_answer(r, s) if r == "ideas" else code_reply("0.40")  # noqa: E731
        _, model, _ = searched(tmp_path, answer, ceilings={"copy": 1e10})
        assert "so ceilings in practice" in model.prompts["r1.s0.ideas.a0"]
        text = model.prompts["r2.s0.ideas.a0"]
        assert "in a slow moment" in text and "ceilings in practice" not in text and "of the roofline floor's speed" not in text

    def test_at_a_plateau(self, tmp_path: Path) -> None:
        def answer(role: str, slot: str) -> str:
            return ideas_reply(f"{slot} x") if role == "ideas" else code_reply(f"{2 - 0.001 * int(slot[1]):.3f}")

        engine, _, _ = searched(tmp_path, answer, preset("default", rounds=9, variants=1, patience=2))
        assert engine.tree.ended.startswith("plateau") and len(engine.tree.rounds) == 3

    def test_at_the_token_budget_counting_what_is_in_flight(self, tmp_path: Path) -> None:
        settings = preset("default", rounds=9, max_tokens=25_000, max_output_tokens=5_000)
        model = ScriptedModel(default_answer, concurrency=50)
        engine = open_engine(tmp_path, settings, model, ScriptedPool())
        engine.drive()
        assert "max_tokens" in engine.tree.ended
        assert engine.tree.spent.tokens <= 25_000
        assert result(engine.run).record is not None  # what was paid for is still evaluated and checked

    def test_at_the_candidate_budget(self, tmp_path: Path) -> None:
        engine, model, _ = searched(tmp_path, settings=preset("default", max_candidates=3))
        assert "max_candidates" in engine.tree.ended
        assert sum(".a0" in s and "ideas" not in s for s in model.slots) == 3

    def test_at_the_price(self, tmp_path: Path) -> None:
        settings = preset("default", rounds=9, max_cost=0.2, prices=(("scripted", 10.0, 100.0),), max_output_tokens=200)
        engine, _, _ = searched(tmp_path, settings=settings)
        assert "max_cost" in engine.tree.ended and 0 < engine.tree.spent.cost <= 0.2

    def test_at_the_time_budget_without_waiting_for_a_model_that_hangs(self, tmp_path: Path) -> None:
        import threading

        hang = threading.Event()
        model = ScriptedModel(lambda role, slot: default_answer(role, slot) if hang.wait() else "")
        engine = open_engine(tmp_path, preset("quick", max_seconds=0.2), model, ScriptedPool())
        engine.drive()
        hang.set()
        assert "max_seconds" in engine.tree.ended

    def test_warnings_at_half_and_four_fifths_come_once(self, tmp_path: Path) -> None:
        engine, _, _ = searched(tmp_path, settings=preset("default", max_candidates=4))
        warnings = [e["text"] for e in engine.run.journal.events if e["event"] == "warning"]
        assert Counter(warnings) == {"50% of max_candidates used": 1, "80% of max_candidates used": 1}

    def test_when_the_endpoint_is_down_and_again_at_the_same_place_when_it_is_back(self, tmp_path: Path) -> None:
        down = Reply(finish="error", error="connection refused")
        model = ScriptedModel(lambda role, slot: down if slot.startswith("r2") else default_answer(role, slot))
        engine = open_engine(tmp_path, SMALL, model, ScriptedPool())
        engine.drive()
        assert engine.tree.stop.startswith("provider") and "connection refused" in engine.tree.stop
        back, paid, _ = searched(tmp_path)
        assert paid.slots[0] == "r2.s0.ideas.a0"
        assert result(back.run).record.evaluation.time_ms == 2.0

    def test_an_ended_search_goes_on_with_other_numbers(self, tmp_path: Path) -> None:
        engine, _, _ = searched(tmp_path)
        extend(engine.run, {"rounds": 3})
        longer, model, _ = searched(tmp_path)
        assert model.slots[0] == "r3.s0.ideas.a0" and result(longer.run).record.evaluation.time_ms == 1.5

    def test_an_extended_search_first_repairs_what_failed_the_full_check(self, tmp_path: Path) -> None:
        searched(tmp_path, full={"2.000": "wrong"})
        extend(open_engine(tmp_path).run, {"rounds": 3})
        longer, model, _ = searched(tmp_path, lambda r, s: code_reply("1.900") if s.endswith("a1") else default_answer(r, s))
        assert model.slots[0] == "r2.s0.i0.v0.a1" and "wrong in the full check: scripted: wrong" in model.prompts[model.slots[0]]
        assert longer.tree.chains["r2.s0.i0.v0"][-1].candidate

    def test_asked_to_finish_it_drops_open_prompts_and_checks_the_best_in_full(self, tmp_path: Path) -> None:
        model = ScriptedModel(lambda role, slot: PENDING if slot.startswith("r2") else default_answer(role, slot))
        engine = open_engine(tmp_path, SMALL, model, ScriptedPool())
        engine.drive()
        assert not engine.tree.ended and engine.open_prompts()
        finish(engine.run)
        engine.drive()
        assert engine.tree.ended.startswith("finish") and result(engine.run).record is not None

    def test_a_wrong_key_stops_at_the_first_answer(self, tmp_path: Path) -> None:
        _, model, _ = searched(tmp_path, lambda r, s: Reply(finish="error", error="401 wrong key", fatal=True))
        assert model.slots == ["r1.s0.ideas.a0"]


class TestPresets:
    def test_sequential_edits_one_kernel_with_one_idea_at_a_time(self, tmp_path: Path) -> None:
        def answer(role: str, slot: str) -> str:
            return ideas_reply(f"{slot} x", f"{slot} y") if role == "ideas" else code_reply(f"{3 - 0.2 * int(slot[1]):.3f}")

        engine, model, _ = searched(tmp_path, answer, preset("sequential", rounds=4))
        assert [len(r) for r in engine.tree.rounds] == [1, 1, 1, 1]
        assert model.slots == [f"r{n}.s0.{step}.a0" for n in range(1, 5) for step in ("ideas", "i0.v0")]
        parents = [engine.tree.candidates[c.parent].slot if c.parent else "" for c in engine.tree.candidates.values()]
        assert parents == ["", "r1.s0.i0.v0.a0", "r2.s0.i0.v0.a0", "r3.s0.i0.v0.a0"]


SHORT = SMALL.replaced({"ideas": 1})  # two rounds, a repair and a known kernel, in as few events as can be


class Killed(BaseException):
    """Stands for `kill -9`."""


def kill_at(monkeypatch: pytest.MonkeyPatch, count: int, torn: bool) -> None:
    """Die at the `count`-th line that reaches the journal: before it, or half way through it."""
    write, written = Journal.append, [0]

    def append(self: Journal, events):
        done = []
        for event in events:
            written[0] += 1
            if written[0] == count:
                if torn:
                    with open(self.path, "ab") as file:
                        file.write(json.dumps(event).encode()[:40])
                raise Killed
            done += write(self, [event])
        return done

    monkeypatch.setattr(Journal, "append", append)


class TestResume:
    @pytest.fixture
    def whole(self, tmp_path_factory) -> tuple[dict[str, object], int, int]:
        engine, model, _ = searched(tmp_path_factory.mktemp("whole"), settings=SHORT, bank=(("known", kernel("2.9")),))
        return state(engine), len(engine.run.journal.events), len(model.slots)

    @pytest.mark.parametrize("torn", [False, True], ids=["before", "torn"])
    def test_a_kill_at_any_event_loses_no_reply_and_pays_none_twice(self, tmp_path: Path, whole, torn: bool) -> None:
        expected, events, questions = whole
        for count in range(1, events + 1):
            folder = tmp_path / str(count)
            model, pool, patch = ScriptedModel(default_answer), ScriptedPool(), pytest.MonkeyPatch()
            bank = (("known", kernel("2.9")),)
            with patch.context() as inside:
                kill_at(inside, count, torn)
                with pytest.raises(Killed):
                    open_engine(folder, SHORT, model, pool, bank=bank).drive()
            kept = {e["id"] for e in Journal(folder / "journal.jsonl").events if e["event"] == "reply"} if count > 1 else set()
            asked = Counter(model.calls)
            again = open_engine(folder, SHORT, model, pool, bank=bank)
            again.drive()
            assert state(again) == expected, f"killed at event {count}"
            assert all(model.calls[i] == asked[i] for i in kept), f"killed at event {count}: a reply was paid twice"
            assert len(model.slots) <= questions + 1  # the one request that was in flight

    def test_a_killed_process_is_a_killed_process(self, tmp_path: Path, whole) -> None:
        script = (
            "import os, sys\n"
            f"sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(__file__).parents[1])!r}]\n"
            "from pathlib import Path\n"
            "from scripted_search import *\n"
            "answer = lambda role, slot: os._exit(9) if slot == 'r2.s0.i0.v1.a0' else default_answer(role, slot)\n"
            "bank = (('known', kernel('2.9')),)\n"
            "short = SMALL.replaced({'ideas': 1})\n"
            f"open_engine(Path({str(tmp_path)!r}), short, ScriptedModel(answer), ScriptedPool(), bank=bank).drive()\n"
        )
        ended = subprocess.run([sys.executable, "-c", script], check=False, env={**os.environ, "OMP_NUM_THREADS": "1"})
        assert ended.returncode == 9
        engine, model, _ = searched(tmp_path, settings=SHORT, bank=(("known", kernel("2.9")),))
        assert state(engine) == whole[0]
        assert not any(slot.startswith("r1") for slot in model.slots)

    def test_a_finished_search_asks_and_evaluates_nothing(self, tmp_path: Path) -> None:
        searched(tmp_path)
        size = (tmp_path / "journal.jsonl").stat().st_size
        _, model, pool = searched(tmp_path)
        assert not model.slots and not pool.jobs and (tmp_path / "journal.jsonl").stat().st_size == size

    def test_a_folder_of_another_task_is_refused(self, tmp_path: Path) -> None:
        searched(tmp_path)
        with pytest.raises(SearchError, match="another task"):
            Run(tmp_path, goal(task=tasks.relu_add_task(77)))

    def test_a_folder_without_a_search_says_how_to_make_one(self, tmp_path: Path) -> None:
        with pytest.raises(SearchError, match="search start"):
            Run(tmp_path)


class TestInPieces:
    def test_proposing_and_evaluating_may_happen_on_two_machines(self, tmp_path: Path) -> None:
        here, there = tmp_path / "laptop" / "run", tmp_path / "gpu" / "run"
        whole, _, _ = searched(tmp_path / "whole" / "run")
        open_run(here, goal())
        for _ in range(40):
            propose = Engine(open_run(here), provider=ExchangeProvider(here / "exchange"))
            propose.drive()
            if propose.tree.ended:
                break
            for prompt in propose.open_prompts():  # whoever answers sees the folder only
                asked = here / "exchange" / "prompts" / f"{prompt.id}.md"
                assert asked.read_text().rstrip().endswith(prompt.text.rstrip())
                (here / "exchange" / "replies" / f"{prompt.id}.md").write_text(default_answer(prompt.role, prompt.slot))
            shutil.rmtree(there, ignore_errors=True)
            shutil.copytree(here, there)
            Engine(open_run(there), pool=ScriptedPool()).drive()
            shutil.rmtree(here)
            shutil.copytree(there, here)
        assert state(propose)["candidates"] == state(whole)["candidates"]
        assert propose.tree.winner == whole.tree.winner

    def test_two_copies_that_went_on_merge(self, tmp_path: Path) -> None:
        here, there = tmp_path / "a", tmp_path / "b"
        open_run(here, goal())
        answered = 0
        while answered < 5:
            engine = Engine(open_run(here), provider=ExchangeProvider(here / "exchange"))
            engine.drive()
            for prompt in engine.open_prompts():
                answered += 1
                (here / "exchange" / "replies" / f"{prompt.id}.md").write_text(default_answer(prompt.role, prompt.slot))
        shutil.copytree(here, there)
        Engine(open_run(here), provider=ExchangeProvider(here / "exchange")).drive()
        Engine(open_run(there), pool=ScriptedPool()).drive()
        run = open_run(here)
        run.journal.merge(journal.read(there / "journal.jsonl"))
        merged = Engine(open_run(here), provider=ExchangeProvider(here / "exchange"), pool=ScriptedPool())
        merged.drive()
        assert len(merged.tree.candidates) == 4

    @staticmethod
    def step(folder: Path, settings=None) -> Engine:
        """What one `search step` does; evaluates as well."""
        run = open_run(folder, goal(settings, provider="exchange") if settings else None)
        engine = Engine(run, provider=ExchangeProvider(folder / "exchange"), pool=ScriptedPool())
        engine.drive()
        return engine

    @staticmethod
    def reply(engine: Engine, long: str = "", only: str = "") -> None:
        """Answer what is open, with `long` after it."""
        folder = engine.run.directory / "exchange"
        for prompt in engine.open_prompts():
            if prompt.slot.startswith(only):
                (folder / "replies" / f"{prompt.id}.md").write_text(default_answer(prompt.role, prompt.slot) + long)

    def test_a_reply_to_an_issued_prompt_is_read_whatever_the_others_came_to(self, tmp_path: Path) -> None:
        settings = preset("default", rounds=3, ideas=2, variants=1, max_tokens=100_000)
        self.reply(self.step(tmp_path, settings))
        engine = self.step(tmp_path)
        assert [p.slot for p in engine.open_prompts()] == ["r1.s0.i0.v0.a0", "r1.s0.i1.v0.a0"]
        self.reply(engine, long="\n" + "words " * 100_000, only="r1.s0.i0")  # one reply of many times what was reserved for it
        engine = self.step(tmp_path)
        assert engine.tree.spent.tokens > settings.max_tokens and not engine.tree.stop  # the other reply may still come
        self.reply(engine)
        engine = self.step(tmp_path)
        assert "max_tokens" in engine.tree.ended and len(engine.tree.ranking()) == 2
        assert engine.open_prompts() == [] and progress.summary(engine.run)["waiting_for_replies"] == 0

    def test_replies_on_disk_are_taken_in_when_the_time_is_up(self, tmp_path: Path) -> None:
        engine = self.step(tmp_path, preset("default", rounds=2, max_seconds=1000.0))
        self.reply(engine)
        late = {"event": "warning", "text": "a later process", "at": 1.0, "clock": 2000.0}
        with open(tmp_path / "journal.jsonl", "a") as file:
            file.write(json.dumps(late) + "\n")
        engine = self.step(tmp_path)
        assert "max_seconds" in engine.tree.stop and all(p.reply for p in engine.tree.prompts.values() if p.role == "ideas")

    def test_a_prompt_that_the_budget_holds_back_is_not_listed_as_open(self, tmp_path: Path) -> None:
        self.reply(self.step(tmp_path, preset("default", ideas=3, variants=1, max_tokens=32_000)))
        engine = self.step(tmp_path)
        written = {path.stem for path in (tmp_path / "exchange" / "prompts").iterdir()}
        assert len(engine.wanted()) == 2 and [p.id in written for p in engine.wanted()] == [True, False]
        assert [p.id for p in engine.open_prompts()] == [engine.wanted()[0].id]
        state = progress.summary(engine.run)
        assert (state["waiting_for_replies"], state["not_issued"]) == (1, 1) and "max_tokens" in state["withheld"]

    def test_an_empty_reply_file_is_one_not_written_yet(self, tmp_path: Path) -> None:
        engine = Engine(open_run(tmp_path, goal()), provider=ExchangeProvider(tmp_path / "exchange"))
        engine.drive()
        (prompt,) = engine.open_prompts()
        (tmp_path / "exchange" / "replies" / f"{prompt.id}.md").write_text(" \n")
        again = Engine(open_run(tmp_path), provider=ExchangeProvider(tmp_path / "exchange"))
        again.drive()
        assert again.open_prompts() == [prompt]


class TestReplay:
    def test_a_journal_answers_the_same_prompts(self, tmp_path: Path) -> None:
        recorded, _, _ = searched(tmp_path / "recorded")
        replayed = open_engine(tmp_path / "again", SMALL, ReplayProvider(recorded.run.journal.events), ScriptedPool())
        replayed.drive()
        assert state(replayed)["candidates"] == state(recorded)["candidates"]
        assert replayed.tree.spent.tokens == 0

    def test_on_another_machine_the_place_answers_where_the_words_differ(self, tmp_path: Path) -> None:
        recorded, _, _ = searched(tmp_path / "recorded")
        other = ReplayProvider(recorded.run.journal.events)
        replayed = open_engine(
            tmp_path / "again", SMALL, other, ScriptedPool(), facts={"name": "another processor", "kind": "cpu-other"}
        )
        replayed.drive()
        assert replayed.tree.candidates[replayed.tree.winner].text == recorded.tree.candidates[recorded.tree.winner].text

    def test_it_says_when_it_cannot(self, tmp_path: Path) -> None:
        recorded, _, _ = searched(tmp_path / "recorded")
        short = [e for e in recorded.run.journal.events if not e.get("slot", "").startswith("r2")]
        ids = {e["id"] for e in short if e["event"] == "prompt"}
        provider = ReplayProvider([e for e in short if e["event"] != "reply" or e["id"] in ids])
        replayed = open_engine(tmp_path / "again", SMALL, provider, ScriptedPool())
        replayed.drive()
        assert "answered neither prompt" in replayed.tree.ended and replayed.tree.winner


def test_the_static_check_explains_itself() -> None:
    assert static_check(tasks.relu_add_task(), kernel("1.0"), "k") is None
    assert static_check(tasks.softmax_task(), kernel("1.0"), "k").status is Status.NOT_APPLICABLE
    broken = static_check(tasks.relu_add_task(), "no header", "k")
    assert isinstance(broken, Evaluation) and broken.status is Status.INVALID and "header" in broken.detail


def test_the_same_failure_in_two_places_is_two_questions(tmp_path: Path) -> None:
    """Two variants of an idea that fail alike lead to repairs that read alike; each still gets its own answer."""
    engine, model, _ = searched(tmp_path, lambda role, slot: default_answer(role, slot) if role == "ideas" else "no")
    assert {"r1.s0.i0.v0.a1", "r1.s0.i0.v1.a1"} <= set(model.slots)
    assert len(engine.tree.prompts) == len(model.slots)
