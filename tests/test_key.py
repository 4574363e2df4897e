"""Keys explain their differences, and frames notice damage."""

from __future__ import annotations

import dataclasses
from types import SimpleNamespace

import pytest

from tests import tasks
from torch_llmkernels.cache.key import RecordKey, seal, torch_version, unseal
from torch_llmkernels.errors import SchemaError
from torch_llmkernels.task import Numerics

FACTS = SimpleNamespace(kind="nvidia-h100", unit="GPU-1", driver="580.1")


def test_key_is_made_of_the_task_and_the_device() -> None:
    task = tasks.layer_norm_task()
    key = RecordKey.of(task, FACTS)
    assert (key.task_key, key.signature, key.device_kind, key.unit) == (task.key, "layer_norm", "nvidia-h100", "GPU-1")
    assert (key.driver, key.torch) == ("580.1", torch_version())
    assert key.tensors.startswith("x:float32[8,64]") and "matmul=ieee" in key.numerics


def test_text_starts_with_what_people_search_for_and_covers_every_field() -> None:
    key = RecordKey.of(tasks.layer_norm_task(), FACTS)
    assert key.text.startswith(f"layer_norm/{key.task_key}/")
    for field in dataclasses.fields(key):
        value = getattr(key, field.name)
        other = dataclasses.replace(key, **{field.name: value + 1 if isinstance(value, int) else value + "x"})
        assert other.text != key.text, field.name


def test_json_round_trip() -> None:
    key = RecordKey.of(tasks.layer_norm_task(), FACTS)
    assert RecordKey.from_json(key.to_json()) == key
    with pytest.raises(SchemaError, match="another release"):
        RecordKey.from_json({"task_key": "0", "colour": "blue"})


def test_differences_name_each_field_with_both_values() -> None:
    here = RecordKey.of(tasks.layer_norm_task(), FACTS)
    there = dataclasses.replace(here, driver="570.2", unit="GPU-2")
    assert here.differences(there) == ["unit: GPU-1 here, GPU-2 in the store", "driver: 580.1 here, 570.2 in the store"]
    assert here.differences(here) == []


def test_differences_of_tasks_are_told_in_shapes_and_flags_not_digests() -> None:
    task = tasks.layer_norm_task()
    here = RecordKey.of(task, FACTS)
    wider = here.differences(RecordKey.of(tasks.layer_norm_task(cols=128), FACTS))
    assert len(wider) == 1 and "[8,64]" in wider[0] and "[8,128]" in wider[0]
    tf32 = RecordKey.of(dataclasses.replace(task, numerics=Numerics(matmul="tf32")), FACTS)
    assert [line.split(":")[0] for line in here.differences(tf32)] == ["numerics"]


def test_other_epsilon_is_a_different_task_named_by_its_digest() -> None:
    here, there = (RecordKey.of(tasks.layer_norm_task(eps=eps), FACTS) for eps in (1e-5, 1e-6))
    assert [line.split(":")[0] for line in here.differences(there)] == ["task_key"]


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda blob: blob[:-1], "truncated"),
        (lambda blob: blob[:10], "no frame"),
        (lambda blob: b"", "no frame"),
        (lambda blob: blob[:-1] + b"!", "sha256"),
        (lambda blob: b"llmk1 {}\n", "does not parse"),
    ],
)
def test_damaged_frame_is_noticed(damage, reason: str) -> None:
    blob = seal("a", b"payload\nof two lines")
    assert unseal("a", blob) == b"payload\nof two lines"
    with pytest.raises(SchemaError, match=reason):
        unseal("a", damage(blob))


def test_value_of_another_key_is_refused() -> None:
    with pytest.raises(SchemaError, match="belongs to key 'a'"):
        unseal("b", seal("a", b"payload"))
