"""What a step reports about its searches."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from pathlib import Path

from megatron_sdsearch.config import ElasticsearchConfig, ReplayConfig
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.batching import BatchedSearches, BatchSettings, Fault, SearchCounts
from megatron_sdsearch.retrieval.replay import with_replay
from megatron_sdsearch.training.retrievers import take_counts
from tests.unit.fakes import DictRetriever

BUSY = Fault(cause="HTTP 429", is_retryable=True)


class RemoteRetriever:
    """Each query fails once, as on a busy cluster, and is answered when it is sent again."""

    fingerprint = "remote"

    def __init__(self) -> None:
        settings = BatchSettings.of(ElasticsearchConfig(batch_window_ms=0.0))
        self._searches = BatchedSearches(self._send, settings, engine="remote")
        self._failed: set[str] = set()

    def take_counts(self) -> SearchCounts:
        return self._searches.take_counts()

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        return await self._searches.search(query, top_k=top_k)

    async def close(self) -> None:
        await self._searches.close()

    async def _send(self, queries: Sequence[str], top_k: int) -> Sequence[Sequence[Passage] | Fault]:
        new = set(queries) - self._failed
        self._failed |= new
        return [BUSY if query in new else () for query in queries]


def counts_after(retriever: Retriever, *queries: str) -> list[dict[str, int]]:
    """Of the searches, and of nothing."""

    async def run() -> list[dict[str, int]]:
        for query in queries:
            await retriever.search(query, top_k=1)
        counts = [take_counts(retriever), take_counts(retriever)]
        await retriever.close()
        return counts

    return asyncio.run(run())


def test_retries_of_a_remote_engine_are_in_the_metrics_once() -> None:
    first, second = counts_after(RemoteRetriever(), "a", "b")
    assert first == {
        "retrieval/num_queries": 2,
        "retrieval/num_requests": 4,
        "retrieval/num_retries": 2,
        "retrieval/num_overloads": 0,
        "retrieval/num_failures": 0,
        "retrieval/num_outages": 0,
    }
    assert second == dict.fromkeys(first, 0), "the same names at every step, and on every rank"


def test_behind_a_replay_store_the_engine_counts_what_it_was_asked(tmp_path: Path) -> None:
    retriever = with_replay(ReplayConfig(mode="cache", store=tmp_path / "store"), RemoteRetriever)
    counts, _ = counts_after(retriever, "a", "a", "b")
    assert (counts["replay/num_hits"], counts["replay/num_misses"]) == (1, 2)
    assert (counts["retrieval/num_queries"], counts["retrieval/num_retries"]) == (2, 2)


def test_an_engine_in_process_has_nothing_to_count() -> None:
    assert counts_after(DictRetriever(), "a") == [{}, {}]
