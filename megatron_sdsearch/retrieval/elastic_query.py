"""Search bodies and their answers, without any input or output.

A query's text is always a value (``match``), never syntax: quotes, slashes and operators that a model writes are words.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.analysis import first_tokens
from megatron_sdsearch.retrieval.batching import Fault, Outcome
from megatron_sdsearch.retrieval.elastic_connection import Credentials, fault_of_status, reason_of

Json = dict[str, Any]

CONTENTS, TITLE, TEXT, VECTOR = "contents", "title", "text", "vector"
"""Fields of the index."""

RRF_CONSTANT = 60
RRF_WINDOW = 50
"""Ranks of each list that take part (Cormack et al., SIGIR 2009; Elasticsearch's defaults are 60 and 10)."""

MAX_TERMS = 1000
"""Clauses of one query: each term is one per field, and a cluster refuses more than max_clause_count, at least 1024."""


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryPlan:
    """How one query is asked, decided once when the index is opened.

    Attributes:
        mode: ``bm25``, ``dense`` or ``hybrid``.
        fields: what BM25 matches.
        is_fused_by_server: in hybrid mode by one ``rrf`` retriever; else by us, from two searches.
        shard_timeout_s: after it a shard is to give up.
    """

    mode: Literal["bm25", "dense", "hybrid"]
    fields: Literal["contents", "title_and_text"]
    is_fused_by_server: bool
    shard_timeout_s: float

    @property
    def num_searches(self) -> int:
        """Of one query."""
        return 2 if self.mode == "hybrid" and not self.is_fused_by_server else 1

    def bodies(self, query: str, vector: Sequence[float] | None, top_k: int) -> list[Json]:
        """The searches of one query."""
        if self.mode == "bm25":
            return [self._body(top_k, query=self._match(query))]
        assert vector is not None  # the retriever encodes for every other mode
        if self.mode == "dense":
            return [self._body(top_k, knn=_knn(vector, top_k))]
        window = max(RRF_WINDOW, top_k)
        match, knn = self._match(query), _knn(vector, window)
        if not self.is_fused_by_server:
            return [self._body(window, query=match), self._body(window, knn=knn)]
        lists = [{"standard": {"query": match}}, {"knn": knn}]
        rrf = {"retrievers": lists, "rank_constant": RRF_CONSTANT, "rank_window_size": window}
        return [self._body(top_k, retriever={"rrf": rrf})]

    def outcome(self, answers: Sequence[Any], top_k: int, credentials: Credentials) -> Outcome:
        """Passages from the answers to ``bodies``, or the first thing that is wrong with them."""
        lists = []
        for answer in answers:
            found = read_answer(answer, credentials)
            if isinstance(found, Fault):
                return found
            lists.append(found)
        return lists[0][:top_k] if len(lists) == 1 else fuse(lists)[:top_k]

    def _body(self, size: int, **search: Any) -> Json:
        return {
            **search,
            "size": size,
            "_source": [CONTENTS, TITLE, TEXT],
            "timeout": f"{max(1, int(self.shard_timeout_s * 1000))}ms",
        }

    def _match(self, query: str) -> Json:
        if self.fields == "contents":
            return {"match": {CONTENTS: {"query": first_tokens(query, MAX_TERMS)}}}
        text = first_tokens(query, MAX_TERMS // 2)
        return {"multi_match": {"query": text, "fields": [TITLE, TEXT], "type": "most_fields"}}


def _knn(vector: Sequence[float], k: int) -> Json:
    return {"field": VECTOR, "query_vector": list(vector), "k": k, "num_candidates": max(100, 10 * k)}


def read_answer(answer: Any, credentials: Credentials) -> list[Passage] | Fault:
    """Passages of one search of an ``_msearch``.

    A search that timed out or lost a shard answers 200 with whatever it has found: that is a failure here, for fewer
    hits, or none, would look like an index without them.
    """
    if not isinstance(answer, Mapping):
        return Fault(cause=f"answer is no object: {str(answer)[:100]}", is_retryable=True)
    status = int(answer.get("status", 200))
    if "error" in answer or status >= 300:
        return fault_of_status(status, answer, credentials)
    shards = answer.get("_shards", {})
    if shards.get("failed"):
        failures = shards.get("failures") or [{}]
        reason = reason_of(failures[0].get("reason", {}), credentials)
        cause = f"{shards['failed']} of {shards.get('total')} shards failed: {reason}"
        return Fault(cause=cause, is_retryable=True, is_overload=True)
    if answer.get("timed_out"):
        return Fault(cause="the search timed out on a shard", is_retryable=True, is_overload=True)
    try:
        return [read_hit(hit) for hit in answer["hits"]["hits"]]
    except DocumentError as error:
        return Fault(cause=f"{error}; {error.fix}", is_retryable=False)
    except (KeyError, TypeError, ValueError) as error:
        return Fault(cause=f"answer has no {error}", is_retryable=False)


class DocumentError(Exception):
    """A document holds no text where the model is to read some.

    Attributes:
        fix: what to do about it.
    """

    fix = f"index it with one text in {CONTENTS}, or with one in each of {TITLE} and {TEXT}"


def read_hit(hit: Mapping[str, Any]) -> Passage:
    """The passage of one document: its ``contents``, or made of ``title`` and ``text`` where it has none.

    A mapping says what a field is searched as; a document may still hold a list there, an object, or nothing.

    Raises:
        DocumentError: naming index, document and field.
    """
    source = hit.get("_source")
    place = f"document {hit['_id']!r} of {hit.get('_index', 'the index')}"
    if not isinstance(source, Mapping):
        raise DocumentError(f"{place} has no _source, which holds its text")
    if source.get(CONTENTS) is not None:
        contents = _text(source, CONTENTS, place)
    elif TITLE in source or TEXT in source:
        contents = f'"{_text(source, TITLE, place)}"\n{_text(source, TEXT, place)}'
    else:
        contents = _text(source, CONTENTS, place)
    return Passage(passage_id=str(hit["_id"]), contents=contents, score=float(hit.get("_score") or 0.0))


def _text(source: Mapping[str, Any], field: str, place: str) -> str:
    value = source.get(field)
    if isinstance(value, str):
        return value
    if field not in source:
        found = "is missing"
    elif isinstance(value, list):
        found = f"is a list of {len(value)}"
    else:
        found = "is null" if value is None else "is an object" if isinstance(value, Mapping) else f"is {value!r:.40}"
    raise DocumentError(f"{place}: {field} {found}, not a text")


def fuse(lists: Sequence[Sequence[Passage]]) -> list[Passage]:
    """Reciprocal rank fusion: a passage scores the sum of 1 / (60 + rank); ties keep the order of first appearance."""
    scores: dict[str, float] = {}
    passages: dict[str, Passage] = {}
    for ranking in lists:
        for rank, passage in enumerate(ranking, start=1):
            scores[passage.passage_id] = scores.get(passage.passage_id, 0.0) + 1 / (RRF_CONSTANT + rank)
            passages.setdefault(passage.passage_id, passage)
    best = sorted(scores, key=lambda passage_id: -scores[passage_id])
    return [
        Passage(passage_id=passage_id, contents=passages[passage_id].contents, score=scores[passage_id])
        for passage_id in best
    ]
