"""Evaluations cannot contradict themselves, and everything stored comes back equal."""

from __future__ import annotations

import dataclasses
import json

import pytest

from tests import tasks
from tests.records import decision_for, evaluation, record_for
from torch_llmkernels.errors import SchemaError
from torch_llmkernels.evaluation import Decision, ErrorStat, Evaluation, KernelResources, Record, Resources, Status

TASK = tasks.layer_norm_task()
GOOD = ErrorStat("y", "normal", 1e-7, 1e-7, 1e-7, 1e-7, 1e-6, 1e-6, True)
RESOURCES = Resources(registers=32, kernels=(KernelResources("add", 32, occupancy=0.5),), warnings=("unused variable",))
BAD = dataclasses.replace(GOOD, passed=False)


@pytest.mark.parametrize(
    ("status", "fields"),
    [
        (Status.TIMED, {"errors": (GOOD,)}),  # no time
        (Status.TIMED, {"errors": (GOOD,), "time_ms": 1.0, "spread": 0.0}),  # nothing to compare with
        (Status.TIMED, {"time_ms": 1.0, "spread": 0.0, "baselines_ms": (("eager", 1.0),)}),  # no evidence
        (Status.CORRECT, {}),
        (Status.CORRECT, {"errors": (GOOD, BAD)}),
        (Status.CORRECT, {"errors": (GOOD,), "time_ms": 1.0}),
        (Status.WRONG, {"errors": (BAD,)}),  # no detail
        (Status.CRASHED, {}),
        (Status.COMPILE_ERROR, {"detail": "line 3", "time_ms": 1.0}),
    ],
)
def test_a_status_implies_its_fields(status: Status, fields: dict[str, object]) -> None:
    with pytest.raises(ValueError):
        Evaluation(status, **fields)


def test_speedup_is_against_the_best_baseline() -> None:
    timed = evaluation(time_ms=2.0)
    assert dict(timed.baselines_ms) == {"eager": 4.0, "inductor": 6.0}
    assert (timed.baseline_ms, timed.speedup) == (4.0, 2.0)
    assert evaluation(Status.CORRECT).speedup is None and evaluation(Status.WRONG).baseline_ms is None


def test_ratios_taken_turn_by_turn_come_before_medians_and_may_be_missing_in_old_records() -> None:
    timed = dataclasses.replace(evaluation(time_ms=1.0), baselines_ms=(("eager", 3.0), ("inductor", 2.0)))
    paired = dataclasses.replace(timed, ratios=(("eager", 2.9), ("inductor", 2.5)))
    assert timed.speedup == 2.0 and paired.speedup == 2.5 and paired.relative_time == 0.4
    old = {k: v for k, v in timed.to_json().items() if k != "ratios"}
    assert Evaluation.from_json(old) == timed and Evaluation.from_json(paired.to_json()) == paired
    assert Evaluation(Status.WRONG, detail="x").relative_time == float("inf")


def test_only_two_statuses_are_correct() -> None:
    assert [s for s in Status if s.is_correct] == [Status.CORRECT, Status.TIMED]


@pytest.mark.parametrize("status", list(Status))
def test_evaluations_round_trip_through_json_text(status: Status) -> None:
    before = dataclasses.replace(
        evaluation(status), constants=(("UNROLL", 4),), resources=RESOURCES, counters=("add: time 3 us",),
        environment=(("torch", "2.13.0"),),
    )  # fmt: skip
    assert Evaluation.from_json(json.loads(json.dumps(before.to_json()))) == before


@pytest.mark.parametrize(
    "damage",
    [
        lambda plain: {**plain, "status": "fine"},
        lambda plain: {k: v for k, v in plain.items() if k != "errors"},
        lambda plain: {**plain, "time_ms": None},
        lambda plain: {**plain, "colour": "blue"},
    ],
)
def test_a_damaged_evaluation_is_a_schema_error(damage) -> None:
    with pytest.raises(SchemaError, match="damaged"):
        Evaluation.from_json(damage(evaluation().to_json()))


def test_records_and_decisions_round_trip() -> None:
    record, decision = record_for(TASK), decision_for(TASK)
    assert Record.from_json(json.loads(json.dumps(record.to_json()))) == record
    assert Decision.from_json(json.loads(json.dumps(decision.to_json()))) == decision
    kept = Decision(None, "kept Inductor: nothing implements it")
    assert Decision.from_json(kept.to_json()) == kept


@pytest.mark.parametrize("kind", [Record, Decision])
def test_another_schema_is_refused_with_both_versions(kind: type) -> None:
    plain = (record_for(TASK) if kind is Record else decision_for(TASK)).to_json()
    with pytest.raises(SchemaError, match=r"schema 99, this release reads 1"):
        kind.from_json({**plain, "schema": 99})


def test_a_record_without_a_field_is_refused_by_its_name() -> None:
    plain = record_for(TASK).to_json()
    del plain["kernel_text"]
    with pytest.raises(SchemaError, match="kernel_text"):
        Record.from_json(plain)
