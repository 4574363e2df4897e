"""Tasks: what their keys depend on, what they refuse, and sizes as expressions."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests import tasks
from torch_llmkernels.errors import SchemaError, TaskError
from torch_llmkernels.task import (
    Node,
    Numerics,
    Task,
    TensorSpec,
    canonical_json,
    decode_literal,
    digest,
    encode_literal,
    evaluate_dim,
)

TASK = tasks.layer_norm_task()
DYNAMIC = tasks.layer_norm_task(rows="d0", hints={"d0": 8})


def test_key_is_the_same_in_another_process() -> None:
    code = "from tests import tasks; print(tasks.layer_norm_task().key, tasks.layer_norm_task().signature_key)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [TASK.key, TASK.signature_key]


@pytest.mark.parametrize(
    "change",
    [
        {"numerics": Numerics(matmul="tf32")},
        {"device": "cuda"},
        {"constant": ("weight",)},
        {"params": (("eps", 1e-6), ("normalized_shape", (64,)))},
        {"inputs": (dataclasses.replace(TASK.inputs[0], stride=(128, 1)), *TASK.inputs[1:])},
    ],
)
def test_key_depends_on_everything_that_matters(change: dict[str, object]) -> None:
    assert dataclasses.replace(TASK, **change).key != TASK.key


def test_key_does_not_depend_on_the_hints_of_dynamic_sizes() -> None:
    assert tasks.layer_norm_task(rows="d0", hints={"d0": 9}).key == DYNAMIC.key != TASK.key


def test_signature_key_is_free_of_shapes_dtypes_and_values() -> None:
    other = tasks.layer_norm_task(rows=3, cols=128, dtype="float16", eps=1e-6)
    assert other.signature_key == TASK.signature_key
    assert tasks.layer_norm_task(bias=False).signature_key != TASK.signature_key


def test_round_trip_through_json_text() -> None:
    for task in (TASK, DYNAMIC, tasks.softmax_task(dtype="bfloat16")):
        again = Task.from_json(json.loads(json.dumps(task.to_json())))
        assert again == task and again.key == task.key


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda plain: {**plain, "schema": 99}, "schema 99"),
        (lambda plain: {k: v for k, v in plain.items() if k != "program"}, "program"),
        (lambda plain: {**plain, "numerics": {"colour": "blue"}}, "damaged"),
    ],
)
def test_damaged_json_is_a_schema_error(damage, reason: str) -> None:
    with pytest.raises(SchemaError, match=reason):
        Task.from_json(damage(TASK.to_json()))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"device": "tpu"}, "no target"),
        ({"results": ()}, "1 outputs but 0 results"),
        ({"outputs": TASK.inputs[:1]}, "occurs twice"),
    ],
)
def test_contradictions_are_refused(change: dict[str, object], reason: str) -> None:
    with pytest.raises(TaskError, match=reason):
        dataclasses.replace(TASK, **change)


@pytest.mark.parametrize("spec", [("a b", "float32", (1,), (1,)), ("a", "complex64", (1,), (1,)), ("a", "float32", (1,), ())])
def test_bad_tensors_are_refused(spec: tuple) -> None:
    with pytest.raises(TaskError):
        TensorSpec(*spec)


def test_tensors_are_found_by_name() -> None:
    assert TASK.tensor("weight") is TASK.inputs[1] and TASK.tensor("y") is TASK.outputs[0]
    with pytest.raises(KeyError):
        TASK.tensor("z")
    assert TASK.param == {"eps": 1e-5, "normalized_shape": (64,)}


def test_a_dynamic_task_becomes_static_at_its_hints_or_other_values() -> None:
    assert DYNAMIC.is_dynamic and not DYNAMIC.at().is_dynamic
    assert DYNAMIC.at().tensor("x").shape == (8, 64)
    assert DYNAMIC.at({"d0": 3}).tensor("y").shape == (3, 64)


def test_symbolic_literals_in_the_program_are_replaced_too() -> None:
    node = Node("n0", "aten.view.default", ({"v": "x"}, [{"s": "d0*2"}, 32]))
    task = dataclasses.replace(DYNAMIC, program=(node, *DYNAMIC.program))
    assert task.at({"d0": 3}).program[0].args == ({"v": "x"}, [6, 32])


@pytest.mark.parametrize(
    ("shape", "stride", "contiguous"),
    [((2, 3), (3, 1), True), ((2, 3), (1, 2), False), ((1, 3), (77, 1), True), ((), (), True), (("d0", 3), (3, 1), False)],
)
def test_contiguity(shape: tuple, stride: tuple, contiguous: bool) -> None:
    assert TensorSpec("x", "float32", shape, stride).is_contiguous is contiguous


@pytest.mark.parametrize(("dim", "value"), [(7, 7), ("d0", 5), ("64*d0", 320), ("(d0+1)//2-1", 2), ("d0%3", 2), ("-d0+6", 1)])
def test_sizes_are_integer_expressions(dim: int | str, value: int) -> None:
    assert evaluate_dim(dim, {"d0": 5}) == value


@pytest.mark.parametrize(
    "dim", ["d1", "d0.real", "f(d0)", "d0/2", "2**d0", "1.5", "True", "d0 if 1 else 2", "[1][0]", "d0 +", "__import__('os')"]
)
def test_anything_else_in_a_size_is_refused(dim: str) -> None:
    with pytest.raises(TaskError):
        evaluate_dim(dim, {"d0": 5})


LITERALS = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3).map(tuple),
    max_leaves=8,
)


@given(LITERALS)
def test_literals_survive_json_exactly(value: object) -> None:
    assert decode_literal(json.loads(canonical_json(encode_literal(value)))) == value


def test_literals_without_an_encoding_are_refused() -> None:
    with pytest.raises(TaskError, match="complex"):
        encode_literal(1j)


def test_canonical_json_does_not_depend_on_order() -> None:
    assert canonical_json({"b": 1, "a": 2}) == canonical_json({"a": 2, "b": 1}) == '{"a":2,"b":1}'
    assert digest({"b": 1, "a": 2}) == digest('{"a":2,"b":1}') and len(digest("")) == 20
