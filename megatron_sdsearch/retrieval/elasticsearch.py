"""Search in an Elasticsearch index: BM25, dense (kNN), or both, combined by reciprocal rank fusion.

Turns a batch of queries into one ``_msearch`` and reads the response. The index has a text field ``contents``
(``"Title"\\ntext``) or two, ``title`` and ``text``, and for dense search a ``dense_vector`` field ``vector``; the
document's ``_id`` is the passage's id.

Queries are passed as values (``match``), never as query syntax: operators that a model writes are plain text.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any, Self

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.analysis import first_tokens
from megatron_sdsearch.retrieval.batched import Outcome, SearchError, retry
from megatron_sdsearch.retrieval.elasticsearch_client import SECTION, ElasticsearchClient, read_credentials
from megatron_sdsearch.retrieval.elasticsearch_index import CONTENTS, TEXT, TITLE, VECTOR, OpenedIndex, open_index
from megatron_sdsearch.retrieval.encoder import TextEncoder

_log = logging.getLogger(__name__)

Json = dict[str, Any]

_SAMPLE_QUERY = "the name of a country"
_SAMPLE_SIZE = 100
"""Documents checked before the first search."""

RRF_CONSTANT = 60
RRF_WINDOW = 50
"""Ranks fused from each list (Cormack et al., SIGIR 2009; Elasticsearch's defaults are 60 and 10)."""

MAX_TERMS = 1000
"""Clauses of one query, one per term and field: clusters reject more than max_clause_count, which is at least 1024."""


class ElasticsearchBackend:
    """A ``SearchBackend`` for one index of a cluster; created by ``open`` on the event loop that uses it."""

    def __init__(
        self, client: ElasticsearchClient, config: ElasticsearchConfig, index: OpenedIndex, encoder: TextEncoder | None
    ) -> None:
        self.name = f"{client.addresses}/{index.name}"
        # "local": term frequencies are counted per shard. Replay stores contain this fingerprint.
        parts = ["elasticsearch", index.fingerprint, config.mode, config.fields, "local"]
        self.fingerprint = "/".join([*parts, encoder.fingerprint] if encoder is not None else parts)
        self.num_passages: int | None = index.num_passages
        self.version_warning = index.version_warning
        self._client = client
        self._config = config
        self._index = index.name
        self._encoder = encoder
        self._encoding = asyncio.Lock()

    @classmethod
    async def open(cls, config: ElasticsearchConfig, encoder: TextEncoder | None = None) -> Self:
        """Connect, check the cluster, the index and its documents, and send a sample query.

        Args:
            config: the section.
            encoder: required for ``dense`` and ``hybrid``; ignored for ``bm25``.

        Raises:
            ConfigError: a setting does not fit the cluster or the index.
            RetrievalError: the cluster is down.
        """
        if config.mode == "bm25":
            encoder = None
        elif encoder is None:
            raise ConfigError(f"{SECTION}.encoder", f"missing, and mode is {config.mode}", "set it")
        client = ElasticsearchClient(config, read_credentials(config))
        try:
            index = await open_index(client, config, encoder)
            backend = cls(client, config, index, encoder)
            await backend._check_index()
        except BaseException:
            await client.api.close()
            raise
        _log.info("%s: %d passages, %s", backend.name, index.num_passages, config.mode)
        return backend

    async def search_batch(self, queries: Sequence[str], top_k: int) -> Sequence[Outcome]:
        """Send one ``_msearch``. Queries are cut after 1000 terms (500 for two fields); see ``MAX_TERMS``.

        Raises:
            SearchError: the whole request failed.
        """
        vectors: list[list[float] | None] = [None] * len(queries)
        if self._encoder is not None:
            async with self._encoding:  # encoders are not thread-safe
                vectors = (await asyncio.to_thread(self._encoder.encode_queries, queries)).tolist()
        bodies = [self.bodies(query, vector, top_k) for query, vector in zip(queries, vectors, strict=True)]
        lines = [line for searches in bodies for body in searches for line in ({}, body)]
        answer = await self._client.send_once(lambda: self._client.api.msearch(searches=lines, index=self._index))
        responses = answer.body.get("responses") if isinstance(answer.body, dict) else None
        if not isinstance(responses, list) or 2 * len(responses) != len(lines):
            raise SearchError("the answer to _msearch lacks responses", is_retryable=True)
        remaining = iter(responses)
        return [self._read_outcome([next(remaining) for _ in searches], top_k) for searches in bodies]

    async def close(self) -> None:
        """Close connections."""
        await self._client.api.close()

    def bodies(self, query: str, vector: Sequence[float] | None, top_k: int) -> list[Json]:
        """Return the searches of one query: two for ``hybrid``."""
        if self._config.fields == "contents":
            match: Json = {"match": {CONTENTS: {"query": first_tokens(query, MAX_TERMS)}}}
        else:
            text = first_tokens(query, MAX_TERMS // 2)
            match = {"multi_match": {"query": text, "fields": [TITLE, TEXT], "type": "most_fields"}}
        # Shards time out before our request does, so that the response says so.
        common = {"_source": [CONTENTS, TITLE, TEXT], "timeout": f"{max(1, int(800 * self._config.timeout_s))}ms"}
        if vector is None:
            return [common | {"size": top_k, "query": match}]
        num_ranks = top_k if self._config.mode == "dense" else max(RRF_WINDOW, top_k)
        vector = list(vector)
        knn = {"field": VECTOR, "query_vector": vector, "k": num_ranks, "num_candidates": max(100, 10 * num_ranks)}
        if self._config.mode == "dense":
            return [common | {"size": top_k, "knn": knn}]
        # Fused by this process: the cluster's rrf retriever requires a paid licence.
        return [common | {"size": num_ranks, "query": match}, common | {"size": num_ranks, "knn": knn}]

    def _read_outcome(self, answers: Sequence[Any], top_k: int) -> Outcome:
        try:
            lists = [read_answer(answer, self._client) for answer in answers]
        except SearchError as failure:
            return failure
        return (lists[0] if len(lists) == 1 else fuse(lists))[:top_k]

    async def _check_index(self) -> None:
        """Send a sample query, and check that a sample of documents holds text in the fields that are read.

        Raises:
            ConfigError: a document holds no text.
            RetrievalError: the cluster does not answer.
        """
        search, fields = self._client.api.search, [CONTENTS, TITLE, TEXT]

        async def try_sample_query() -> None:
            (outcome,) = await self.search_batch([_SAMPLE_QUERY], 1)
            if isinstance(outcome, SearchError):
                raise outcome

        try:
            found = await self._client.send(
                lambda: search(index=self._index, size=_SAMPLE_SIZE, source_includes=fields)
            )
            for hit in found["hits"]["hits"]:
                read_hit(hit)
            await retry(try_sample_query, max_attempts=self._config.max_attempts)
        except SearchError as failure:
            raise self._client.error_from(failure) from None


def read_answer(answer: Any, client: ElasticsearchClient) -> list[Passage]:
    """Read the passages of one search of an ``_msearch``.

    A search that timed out or lost a shard returns status 200 with partial hits: an error here, because missing hits
    would look like an index without them.

    Raises:
        SearchError: the search failed or its answer is incomplete, or a document has no text.
    """
    if not isinstance(answer, Mapping):
        raise SearchError(f"answer is not an object: {str(answer)[:100]}", is_retryable=True)
    status = int(answer.get("status", 200))
    if "error" in answer or status >= 300:
        raise client.failure_from_status(status, answer)
    shards = answer.get("_shards", {})
    if shards.get("failed"):
        failures = shards.get("failures") or [{}]
        reason = client.reason_of(failures[0].get("reason", {}))
        raise SearchError(f"{shards['failed']} of {shards.get('total')} shards failed: {reason}", is_retryable=True)
    if answer.get("timed_out"):
        raise SearchError("the search timed out on a shard", is_retryable=True)
    try:
        return [read_hit(hit) for hit in answer["hits"]["hits"]]
    except (KeyError, TypeError, ValueError) as error:
        raise SearchError(f"answer has no {error}", is_retryable=False) from error


def read_hit(hit: Mapping[str, Any]) -> Passage:
    """Convert a document to a passage: its ``contents``, or ``title`` and ``text`` if it has none.

    Despite the mapping a document may hold a list, an object or nothing in these fields.

    Raises:
        SearchError: a field is not a string; names index, document and field.
    """
    source, cause = hit.get("_source"), ""
    document = f"document {hit['_id']!r} of {hit.get('_index', 'the index')}"
    if not isinstance(source, Mapping):
        cause, source = f"{document} has no _source, which holds its text", {}
    has_contents = source.get(CONTENTS) is not None or not (TITLE in source or TEXT in source)
    for field in [CONTENTS] if has_contents else [TITLE, TEXT]:
        if not cause and not isinstance(source.get(field), str):
            found = f"is {source[field]!r:.40}" if field in source else "is missing"
            cause = f"{document}: {field} {found}, not a string"
    if cause:
        fix = f"index it with a string in {CONTENTS}, or in both {TITLE} and {TEXT}"
        raise SearchError(cause, is_retryable=False, setting="index", fix=fix)
    contents = source[CONTENTS] if has_contents else f'"{source[TITLE]}"\n{source[TEXT]}'
    return Passage(passage_id=str(hit["_id"]), contents=contents, score=float(hit.get("_score") or 0.0))


def fuse(lists: Sequence[Sequence[Passage]]) -> list[Passage]:
    """Fuse rankings: a passage scores the sum of 1 / (60 + rank); ties keep the order of first appearance."""
    fused: dict[str, Passage] = {}
    for ranking in lists:
        for rank, passage in enumerate(ranking, start=1):
            known = fused.get(passage.passage_id, replace(passage, score=0.0))
            fused[passage.passage_id] = replace(known, score=known.score + 1 / (RRF_CONSTANT + rank))
    return sorted(fused.values(), key=lambda passage: -passage.score)
