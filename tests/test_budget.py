"""Presets, limits that count requests in flight, prices and the estimate before a search."""

from __future__ import annotations

import dataclasses

import pytest

from torch_llmkernels.errors import SettingsError
from torch_llmkernels.search.budget import (
    OUTPUT_GUESS,
    PRESETS,
    Meter,
    SearchSettings,
    Spend,
    cost,
    estimate,
    preset,
    tokens_in,
)

PROMPT = "x" * 3500  # a thousand tokens


def test_presets_are_frozen_and_every_number_can_be_changed() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        PRESETS["quick"].rounds = 9
    assert preset("thorough", rounds="7", max_cost="1.5").rounds == 7
    assert preset("sequential").seeds == preset("sequential").ideas == preset("sequential").variants == 1


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"ronds": 3}, "did you mean 'rounds'"),
        ({"rounds": "many"}, "not an integer"),
        ({"rounds": 0}, "at least 1"),
        ({"max_tokens": -1}, "negative"),
        ({"prices": [("m", "x", 1)]}, "prices"),
    ],
)
def test_a_wrong_number_is_an_error_that_says_which(values: dict[str, object], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        preset("default", **values)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(SettingsError, match="thorough"):
        preset("thorogh")


def test_settings_survive_json() -> None:
    settings = preset("thorough", prices=[["m", 1, 2]], max_seconds=1.5)
    assert SearchSettings().replaced(settings.to_json()) == settings


class TestMeter:
    def test_requests_in_flight_count_until_they_land(self) -> None:
        meter = Meter(SearchSettings(max_tokens=10_000, max_output_tokens=3_000))
        assert not meter.refusal("code", PROMPT)
        meter.take_off("a", "code", PROMPT)
        assert not meter.refusal("code", PROMPT)
        meter.take_off("b", "code", PROMPT)
        assert "max_tokens" in meter.refusal("code", PROMPT)
        meter.land("b")
        assert not meter.refusal("code", PROMPT)

    def test_a_reply_is_expected_to_be_as_long_as_the_longest_seen_of_its_role(self) -> None:
        meter = Meter(SearchSettings())
        assert meter.estimate("ideas", PROMPT).output_tokens == OUTPUT_GUESS["ideas"]
        meter.seen["ideas"] = 700
        assert meter.estimate("ideas", PROMPT).output_tokens == 700

    def test_first_drafts_count_as_candidates_and_repairs_do_not(self) -> None:
        meter = Meter(SearchSettings(max_candidates=1), candidates=1)
        assert "max_candidates" in meter.refusal("code", PROMPT)
        assert not meter.refusal("repair", PROMPT) and not meter.refusal("ideas", PROMPT)

    def test_time_and_money_are_limits_too(self) -> None:
        assert "max_seconds" in Meter(SearchSettings(max_seconds=10.0), seconds=10.0).refusal("ideas", PROMPT)
        dear = SearchSettings(max_cost=0.01, prices=(("m", 10.0, 10.0),))
        assert "max_cost" in Meter(dear).refusal("ideas", PROMPT)

    def test_a_limit_of_zero_is_none(self) -> None:
        free = SearchSettings(max_tokens=0, max_candidates=0, max_seconds=0.0, max_cost=0.0)
        meter = Meter(free, spent=Spend(9, 10**9, 10**9), candidates=10**6, seconds=1e9)
        assert not meter.refusal("code", PROMPT) and meter.shares() == {}


def test_cost_follows_the_users_table() -> None:
    settings = SearchSettings(prices=(("m", 2.0, 8.0), ("*", 1.0, 1.0)))
    assert cost(settings, "m", 1_000_000, 500_000) == 6.0
    assert cost(settings, "unlisted", 1_000_000, 0) == 1.0
    assert cost(SearchSettings(), "m", 10, 10) == 0.0


class TestEstimate:
    def test_it_counts_seeds_ideas_and_variants(self) -> None:
        settings = SearchSettings(rounds=3, seeds=2, ideas=4, variants=2, repairs=0, max_candidates=0, max_tokens=0)
        size = estimate(settings, PROMPT, PROMPT)
        assert (size.candidates, size.requests) == (5 * 4 * 2, 5 + 40)
        assert size.input_tokens == 45 * tokens_in(PROMPT)

    def test_it_is_cut_at_the_limits(self) -> None:
        size = estimate(preset("sequential", max_tokens=100_000), PROMPT, PROMPT)
        assert size.input_tokens + size.output_tokens <= 100_000

    def test_it_reads_as_a_sentence_with_its_price(self) -> None:
        assert "price table" in str(estimate(preset("quick", prices=[("m", 1, 8)]), PROMPT, PROMPT))
        assert "price" not in str(estimate(preset("quick"), PROMPT, PROMPT))
