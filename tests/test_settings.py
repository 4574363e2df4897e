"""Knobs parse strictly, from four places in a stated order, and are documented."""

from __future__ import annotations

import dataclasses
import threading
from pathlib import Path

import pytest

from torch_llmkernels.cli import knobs
from torch_llmkernels.errors import SettingsError
from torch_llmkernels.settings import KNOBS, Settings, current, override


def test_environment_overrides_defaults() -> None:
    environ = {"LLMKERNELS_STRICT": "1", "LLMKERNELS_FUEL": "3", "LLMKERNELS_MIN_SPEEDUP": "1.5", "OTHER": "x"}
    settings = Settings.from_environment(environ)
    assert (settings.strict, settings.fuel, settings.min_speedup) == (True, 3, 1.5)
    assert Settings.from_environment({}) == Settings()


def test_variables_of_the_test_suite_are_not_knobs() -> None:
    assert Settings.from_environment({"LLMKERNELS_TEST_LLM": "1"}) == Settings()


@pytest.mark.parametrize("text", ["1", "true", "Yes", "on"])
def test_true_has_several_spellings(text: str) -> None:
    assert Settings.from_environment({"LLMKERNELS_STRICT": text}).strict is True


@pytest.mark.parametrize("text", ["0", "false", "No", "off"])
def test_false_has_several_spellings(text: str) -> None:
    assert Settings.from_environment({"LLMKERNELS_SPECIALIZE": text}).specialize is False


@pytest.mark.parametrize(
    ("name", "value", "reason"),
    [
        ("STRICT", "ture", "not a boolean"),
        ("FUEL", "three", "not an integer"),
        ("FUEL", "1.5", "not an integer"),
        ("MIN_SPEEDUP", "fast", "not a number"),
        ("VERIFY_BUDGET_S", "nan", "not a number"),
        ("MAX_REGIONS", "-1", "below 0"),
        ("FUEL", "-2", "below -1"),
        ("ON_MISS", "panic", "'fallback', 'search', 'background', 'error'"),
    ],
)
def test_a_bad_value_names_the_variable_and_what_would_do(name: str, value: str, reason: str) -> None:
    with pytest.raises(SettingsError, match=reason) as error:
        Settings.from_environment({f"LLMKERNELS_{name}": value})
    assert f"LLMKERNELS_{name}" in str(error.value) and repr(value) in str(error.value)


def test_an_unknown_name_suggests_the_nearest_and_lists_all() -> None:
    with pytest.raises(SettingsError, match="did you mean 'strict'") as error:
        Settings.from_environment({"LLMKERNELS_STRCIT": "1"})
    assert all(name in str(error.value) for name in KNOBS)


def test_a_number_is_no_boolean_and_a_boolean_no_number() -> None:
    with pytest.raises(SettingsError):
        Settings().updated({"fuel": True})
    with pytest.raises(SettingsError):
        Settings().updated({"strict": 2})


def test_override_is_scoped_nests_and_restores_after_an_error() -> None:
    before = current()
    with override(strict=True):
        with override(fuel=1) as inner:
            assert inner.strict and inner.fuel == 1 and current() == inner
        assert current().fuel == before.fuel
    with pytest.raises(ZeroDivisionError), override(fuel=2):
        raise ZeroDivisionError
    assert current() == before


def test_override_wins_over_the_environment(monkeypatch) -> None:
    monkeypatch.setenv("LLMKERNELS_FUEL", "5")
    assert current().fuel == 5
    with override(fuel=6):
        assert current().fuel == 6


def test_override_does_not_reach_other_threads() -> None:
    seen = []
    with override(fuel=7):
        thread = threading.Thread(target=lambda: seen.append(current().fuel))
        thread.start()
        thread.join()
    assert seen == [Settings().fuel]


def test_override_refuses_unknown_names() -> None:
    with pytest.raises(SettingsError), override(nonsense=1):
        pass


def test_store_directory_follows_xdg(monkeypatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert Settings().store_directory() == tmp_path / "torch_llmkernels"
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert Settings().store_directory() == Path.home() / ".cache" / "torch_llmkernels"
    assert Settings(cache_dir="~/kernels").store_directory() == Path.home() / "kernels"


def test_settings_are_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        Settings().strict = True


def test_every_knob_is_on_the_generated_page() -> None:
    page = Path(__file__).resolve().parents[1] / "docs" / "settings.md"
    assert page.read_text() == knobs.markdown(), "run: make docs"
    assert all(f"| `{name}` |" in knobs.markdown() for name in KNOBS)
