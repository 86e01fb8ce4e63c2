"""Search in an Elasticsearch index: BM25, dense (kNN), or both fused by reciprocal ranks.

Owns what an open index is, and how a batch of queries becomes one ``_msearch``. When batches leave and what is tried
again is ``batching.py``'s, bodies and answers are ``elastic_query.py``'s, the checks before the first search are
``elastic_index.py``'s, and the client, with its secrets, is ``elastic_connection.py``'s.

The index has a text field ``contents`` (``"Title"\\ntext``) or two, ``title`` and ``text``, and for dense search a
``dense_vector`` field ``vector``; the document's ``_id`` is the passage's id.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Sequence
from typing import Any, Self

from elastic_transport import TransportError
from elasticsearch import ApiError, AsyncElasticsearch

from megatron_sdsearch.config import ElasticsearchConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.batching import BatchedSearches, BatchSettings, Fault, Outcome, SearchCounts
from megatron_sdsearch.retrieval.elastic_connection import SECTION, Credentials, connect, fault_of
from megatron_sdsearch.retrieval.elastic_index import Inspection, OpenedIndex
from megatron_sdsearch.retrieval.elastic_query import CONTENTS, TEXT, TITLE, DocumentError, QueryPlan, read_hit
from megatron_sdsearch.retrieval.encoder import TextEncoder

_log = logging.getLogger(__name__)

_SAMPLE_QUERY = "the name of a country"
_SAMPLE_SIZE = 100
"""Documents that are looked at before the first search."""


class ElasticRetriever:
    """A ``Retriever`` over one index of a cluster; made by ``open``, on the event loop on which it is used."""

    def __init__(
        self,
        client: AsyncElasticsearch,
        config: ElasticsearchConfig,
        credentials: Credentials,
        index: OpenedIndex,
        encoder: TextEncoder | None,
    ) -> None:
        self._client = client
        self._config = config
        self._credentials = credentials
        self._index = index
        self._encoder = encoder if config.mode != "bm25" else None
        self._encoding = asyncio.Lock()
        self._plan = self._plan_with(is_fused_by_server=config.mode == "hybrid")
        self._searches = BatchedSearches(self._send, BatchSettings.of(config), engine=self.name)

    @classmethod
    async def open(cls, config: ElasticsearchConfig, encoder: TextEncoder | None = None) -> Self:
        """Connect, check everything that can be checked, and ask one sample query.

        Args:
            config: the section.
            encoder: for ``dense`` and ``hybrid``.

        Raises:
            ConfigError: a setting does not fit the cluster or the index.
            RetrievalError: the cluster is down.
        """
        credentials = Credentials.of(config)
        if config.mode != "bm25" and encoder is None:
            raise ConfigError(f"{SECTION}.encoder", f"missing, and mode is {config.mode}", "set it")
        client = connect(config, credentials)
        try:
            inspection = Inspection(client, config, credentials)
            index = await inspection.run(encoder)
            retriever = cls(client, config, credentials, index, encoder)
            await retriever._check_documents()
            await retriever._try_out()
        except BaseException:
            await client.close()
            raise
        _log.info("%s: %d passages, %s", retriever.name, index.num_passages, config.mode)
        return retriever

    @property
    def name(self) -> str:
        """Addresses and index, for messages."""
        return f"{', '.join(self._config.urls)}/{self._index.name}"

    @property
    def fingerprint(self) -> str:
        """Cluster, index, its settings and generation, and how it is asked."""
        config = self._config
        parts = ["elasticsearch", self._index.fingerprint, config.mode, config.fields, "dfs" if config.dfs else "local"]
        if self._encoder is not None:
            parts.append(self._encoder.fingerprint)
        return "/".join(parts)

    @property
    def num_passages(self) -> int:
        """In the index, when it was opened."""
        return self._index.num_passages

    @property
    def version_warning(self) -> str:
        """See ``OpenedIndex``."""
        return self._index.version_warning

    def take_counts(self) -> SearchCounts:
        """What happened since the last call."""
        return self._searches.take_counts()

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Best passages first. A query of white space alone matches nothing, and is not asked.

        A query of more than 1000 terms is cut there (500 for two fields): clusters refuse more clauses.

        Raises:
            RetrievalError: with cause, query and number of attempts.
            RetrievalDownError: the cluster answers nobody.
            ValueError: ``top_k`` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        if not query.strip():
            return ()
        # Half a surrogate pair has no UTF-8: it would spoil the whole batch's body.
        return await self._searches.search(query.encode("utf-8", "replace").decode(), top_k=top_k)

    async def close(self) -> None:
        """End what is under way, and close connections."""
        try:
            await self._searches.close()
        finally:
            await self._client.close()

    async def _send(self, queries: Sequence[str], top_k: int) -> Sequence[Outcome] | Fault:
        """One ``_msearch``; a ``Send`` of ``batching.py``."""
        vectors = await self._encode(queries)
        lines: list[dict[str, Any]] = []
        for query, vector in zip(queries, vectors, strict=True):
            for body in self._plan.bodies(query, vector, top_k):
                # Refused beside knn and retrievers, even in its default form.
                is_global = self._config.dfs and "query" in body
                lines += [{"search_type": "dfs_query_then_fetch"} if is_global else {}, body]
        try:
            answer = await self._client.msearch(searches=lines, index=self._index.name)
        except (ApiError, TransportError) as error:
            return fault_of(error, self._credentials)
        responses = answer.body.get("responses") if isinstance(answer.body, dict) else None
        per_query = self._plan.num_searches
        if not isinstance(responses, list) or len(responses) != per_query * len(queries):
            return Fault(cause="the answer to _msearch lacks responses", is_retryable=True)
        return [
            self._plan.outcome(responses[start : start + per_query], top_k, self._credentials)
            for start in range(0, len(responses), per_query)
        ]

    async def _encode(self, queries: Sequence[str]) -> list[list[float] | None]:
        if self._encoder is None:
            return [None] * len(queries)
        async with self._encoding:  # an encoder is for one thread at a time
            vectors = await asyncio.to_thread(self._encoder.encode_queries, queries)
        return list(vectors.tolist())

    async def _try_out(self) -> None:
        """A sample query works, and shows whether the server can fuse ranks."""
        if self._config.mode == "hybrid":
            outcome = await self._sample()
            if isinstance(outcome, Fault) and not outcome.is_retryable:
                self._plan = self._plan_with(is_fused_by_server=False)
                _log.warning("%s: no rrf retriever here (%s): ranks are fused by the client", self.name, outcome.cause)
            else:
                _log.info("%s: ranks are fused by the server (rrf)", self.name)
        outcome = await self._sample()
        if isinstance(outcome, Fault):
            message = f"{self.name}: a sample query failed: {outcome.cause}"
            raise RetrievalError(message, query=_SAMPLE_QUERY, num_attempts=1, cause=outcome.cause)

    async def _sample(self) -> Outcome:
        """The answer to the sample query, tried again while its fault is one that passes."""
        for attempt in range(1, self._config.max_attempts + 1):
            outcomes = await self._send([_SAMPLE_QUERY], 1)
            outcome = outcomes if isinstance(outcomes, Fault) else outcomes[0]
            if not isinstance(outcome, Fault) or not outcome.is_retryable:
                break
            await asyncio.sleep(min(2.0, 0.1 * 2**attempt))
        return outcome

    async def _check_documents(self) -> None:
        """Passages can be shown: some documents hold text, and no lists, where it is read. Searches look at theirs."""
        inspection = Inspection(self._client, self._config, self._credentials)
        fields = [CONTENTS, TITLE, TEXT]
        search = self._client.search
        found = await inspection.call(lambda: search(index=self._index.name, size=_SAMPLE_SIZE, source_includes=fields))
        try:
            for hit in found["hits"]["hits"]:
                read_hit(hit)
        except DocumentError as error:
            raise ConfigError(f"{SECTION}.index", str(error), error.fix) from None

    def _plan_with(self, *, is_fused_by_server: bool) -> QueryPlan:
        config = self._config
        return QueryPlan(
            mode=config.mode,
            fields=config.fields,
            is_fused_by_server=is_fused_by_server,
            shard_timeout_s=0.8 * config.timeout_s,  # in time to hear of it
        )
