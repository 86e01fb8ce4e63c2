"""Terms equal Lucene's: a golden file written once by Lucene itself, and properties that hold for any text."""

from __future__ import annotations

import json
import time
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.retrieval.analysis import ANALYZERS, MAX_TOKEN_LENGTH, analyze_english, analyze_standard

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "lucene_golden.json").read_text(encoding="utf-8"))


@pytest.mark.parametrize("case", GOLDEN["analyses"], ids=lambda case: ascii(case["text"])[:30])
@pytest.mark.parametrize("name", ["standard", "english"])
def test_terms_equal_lucenes(name: str, case: dict[str, Any]) -> None:
    assert ANALYZERS[name](case["text"]) == case[name]


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_ascii_fast_path_equals_the_unicode_rules(text: str) -> None:
    # A trailing ideograph takes the slow path and is a token of its own.
    assert [*analyze_standard(text), "\u65e5"] == analyze_standard(text + "\u65e5")


@given(st.text())
def test_terms_never_hold_white_space_nor_exceed_the_limit(text: str) -> None:
    for term in analyze_standard(text):
        assert term.split() == [term]
        assert len(term) <= MAX_TOKEN_LENGTH


@given(st.lists(st.sampled_from(["river", "Mining", "the", "1743", "engineer's"])))
def test_words_are_analysed_one_by_one(words: list[str]) -> None:
    assert analyze_english(" ".join(words)) == [term for word in words for term in analyze_english(word)]


def test_stop_words_belong_to_english_alone() -> None:
    assert analyze_standard("The river") == ["the", "river"]
    assert analyze_english("The river") == ["river"]


@pytest.mark.parametrize("unit", ["_", "a_", "'", "1.", "\u200d", "\uff3f", '\u05d0"', "\U0001f469\u200d"])
def test_time_grows_with_the_length_of_the_text_alone(unit: str) -> None:
    # Ruled lines and tables are in every corpus; a quadratic pattern would take minutes for this one.
    start = time.perf_counter()
    analyze_standard(unit * 100_000 + " \u65e5")
    assert time.perf_counter() - start < 10
