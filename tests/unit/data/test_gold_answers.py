"""The text of a list is the list, a text with brackets is an answer, and what may be either is refused."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic_core import PydanticCustomError

from megatron_sdsearch.data.gold_answers import answers_in_text, read_gold_answers

# numpy's strings lose zeros at their end.
TEXT = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=8)
ANSWERS = st.lists(TEXT, min_size=1, max_size=5)


@given(ANSWERS)
def test_lists_are_read_back_from_every_way_of_writing_them(answers: list[str]) -> None:
    as_objects = np.array(answers, dtype=object)
    texts = [json.dumps(answers), json.dumps(answers, indent=1), repr(answers), repr(tuple(answers)), str(as_objects)]
    texts += [repr(as_objects), f"np.{as_objects!r}", repr([np.str_(answer) for answer in answers]), f"[{answers!r}]"]
    for text in texts:
        assert answers_in_text(text) == answers, text


def test_numpys_own_strings_are_read_back() -> None:
    names = ["Arthur's Magazine", 'the "Canal"', "x" * 40, "y" * 40]
    assert answers_in_text(str(np.array(names))) == names
    assert answers_in_text(repr(np.array(names))) == names
    assert answers_in_text("['A' 'B']") == ["A", "B"], "not AB, as Python reads it"


@pytest.mark.parametrize(
    "answer",
    [
        "[REC]",
        "[sic]",
        "[title of show]",
        "Schindler's List [1993]",
        "[citation needed] by Paris",
        "(500) Days of Summer",
        "(500) Days (of Summer)",
        '("Heroes")',
        "(3, 4)",
        "{x}",
        "f(x)",
        "array(5)",
        "List (1, 2)",
        "%",
        "2,718",
        "A, B",
        "'Round Midnight",
        "()",
    ],
)
def test_brackets_alone_make_no_list(answer: str) -> None:
    assert answers_in_text(answer) == [answer]
    assert read_gold_answers([answer, "other"]) == [answer, "other"]


@pytest.mark.parametrize(
    "text",
    [
        "[]",
        "[1905]",
        "[1905, 1906]",
        "[1905 1906]",
        "['A', 3]",
        "['A', None]",
        "[null]",
        "[Paris, London]",
        "['A', 'B' 'C']",
        "['A', 'B'",
        "['Arthur's Magazine']",
        "['A' 'B' ... 'Z']",
        "array(['A', ..., 'Z'], dtype=object)",
        "[['A'], ['B']]",
        "[np.str_('A') np.str_('B')]",
        "{'target': ['A']}",
        '{"target": ["A"]}',
        r"['\d']",
    ],
)
def test_a_text_that_may_be_a_list_is_refused(text: str) -> None:
    with pytest.raises(PydanticCustomError):
        answers_in_text(text)
    with pytest.raises(PydanticCustomError):
        read_gold_answers([text])


@pytest.mark.parametrize("element", ["['A', 'B']", '["A"]', '{"A": 1}', ["A"], {"A": 1}])
def test_a_list_among_other_answers_is_refused(element: Any) -> None:
    with pytest.raises(PydanticCustomError, match="One of several gold answers is itself a list or an object"):
        read_gold_answers(["x", element])


def test_a_doubtful_text_among_other_answers_is_one_of_them() -> None:
    assert read_gold_answers(["1905", "[1905]"]) == ["1905", "[1905]"]


def test_a_list_that_was_encoded_twice_is_read_and_a_quoted_answer_keeps_its_quotes() -> None:
    for text in (json.dumps("['A', 'B']"), repr('["A", "B"]'), repr("['A' 'B']")):
        assert answers_in_text(text) == ["A", "B"]
    for text in ('"Heroes"', "'Salem's Lot'", '"[REC]"'):
        assert answers_in_text(text) == [text]


@pytest.mark.parametrize(
    "text", ["frozenset({'A'})", "Series(['A'])", "deque(['A', 'B'])", 'Array(["a"])', "b\"['A']\"", "[nan]"]
)
def test_lists_that_nothing_here_reads_are_refused(text: str) -> None:
    with pytest.raises(PydanticCustomError):
        answers_in_text(text)
