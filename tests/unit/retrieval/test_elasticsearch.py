"""Tests of reading documents from indices not made by index_corpus."""

from __future__ import annotations

from typing import Any

import pytest

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.batched import SearchError
from megatron_sdsearch.retrieval.credentials import Credentials
from megatron_sdsearch.retrieval.elasticsearch import read_answer
from megatron_sdsearch.retrieval.elasticsearch_client import ElasticsearchClient


def client(basic: tuple[str, str] | None = None) -> ElasticsearchClient:
    return ElasticsearchClient(ElasticsearchConfig(), Credentials(basic=basic))


def answer_of(source: Any) -> list[Passage]:
    hit = {"_index": "wiki-1", "_id": "7", "_score": 2.5} | ({} if source is None else {"_source": source})
    return read_answer({"hits": {"hits": [hit]}}, client())


@pytest.mark.parametrize(
    ("source", "contents"),
    [
        ({"contents": '"Lisbon"\nA city.'}, '"Lisbon"\nA city.'),
        ({"contents": "a", "title": ["x"], "text": None}, "a"),
        ({"title": "Lisbon", "text": "A city."}, '"Lisbon"\nA city.'),
        ({"contents": None, "title": "", "text": "A city."}, '""\nA city.'),
    ],
)
def test_text_is_a_passage(source: Any, contents: str) -> None:
    assert answer_of(source) == [Passage(passage_id="7", contents=contents, score=2.5)]


@pytest.mark.parametrize(
    ("source", "problem"),
    [
        ({"contents": ["a", "b"]}, "contents is ['a', 'b'], not a string"),
        ({"contents": []}, "contents is [], not a string"),
        ({"contents": {"en": "a"}}, "contents is {'en': 'a'}, not a string"),
        ({"contents": 5}, "contents is 5, not a string"),
        ({"contents": False}, "contents is False, not a string"),
        ({"contents": None}, "contents is None, not a string"),
        ({}, "contents is missing, not a string"),
        ({"body": "a"}, "contents is missing, not a string"),
        ({"title": None, "text": "a"}, "title is None, not a string"),
        ({"text": "a"}, "title is missing, not a string"),
        ({"title": "a"}, "text is missing, not a string"),
        ({"title": "a", "text": ["b"]}, "text is ['b'], not a string"),
        ({"title": {"main": "a"}, "text": "b"}, "title is {'main': 'a'}, not a string"),
    ],
)
def test_anything_else_is_refused_by_index_document_and_field(source: Any, problem: str) -> None:
    with pytest.raises(SearchError) as caught:
        answer_of(source)
    assert str(caught.value).startswith(f"document '7' of wiki-1: {problem}; index it with a string in contents")
    assert not caught.value.is_retryable


def test_an_index_that_keeps_no_source_is_named() -> None:
    with pytest.raises(SearchError, match="document '7' of wiki-1 has no _source"):
        answer_of(None)


def test_a_secret_at_the_cut_of_a_long_answer_is_masked() -> None:
    """Cutting first would leave its beginning; so would white space that is folded before."""
    for length in range(150, 210):
        shown = client(("me", "hunter2  secret")).reason_of("x" * length + "hunter2  secret" + "y" * 500)
        assert "hunter" not in shown
        assert "secret" not in shown


def test_the_reason_at_the_end_of_a_long_answer_is_kept() -> None:
    answer = f"id [{'x' * 600}] is too long, must be no longer than 512 bytes"
    assert client().reason_of(answer).endswith("is too long, must be no longer than 512 bytes")
