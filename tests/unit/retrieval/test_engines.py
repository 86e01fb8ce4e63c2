"""Tests of the search metrics of a step."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from megatron_sdsearch.config import RemoteSearchConfig, ReplayConfig
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.batched import BatchedRetriever, SearchError
from megatron_sdsearch.retrieval.engines import take_counts
from megatron_sdsearch.retrieval.replay import open_with_replay
from tests.unit.fakes import DictRetriever

Open = Callable[[], Awaitable[Retriever]]
BUSY = SearchError("HTTP 429", is_retryable=True)


class BusyBackend:
    """Each query fails once, as on a busy cluster, and is answered when it is sent again."""

    name = fingerprint = "remote"
    num_passages: int | None = None
    version_warning = ""

    def __init__(self) -> None:
        self._failed: set[str] = set()

    async def search_batch(self, queries: Sequence[str], top_k: int) -> Sequence[Sequence[Passage] | SearchError]:
        new = set(queries) - self._failed
        self._failed |= new
        return [BUSY if query in new else () for query in queries]

    async def close(self) -> None:
        pass


async def open_remote() -> Retriever:
    return BatchedRetriever(BusyBackend(), RemoteSearchConfig(batch_window_ms=0.0))


def counts_after(
    config: ReplayConfig, open_engine: Callable[[], Awaitable[Retriever]], *queries: str
) -> list[dict[str, int]]:
    """Search, then return the results of two calls of take_counts."""

    async def run() -> list[dict[str, int]]:
        retriever = await open_with_replay(config, open_engine)
        for query in queries:
            await retriever.search(query, top_k=1)
        counts = [take_counts(retriever), take_counts(retriever)]
        await retriever.close()
        return counts

    return asyncio.run(run())


def test_retries_of_a_remote_engine_are_in_the_metrics_once() -> None:
    first, second = counts_after(ReplayConfig(), open_remote, "a", "b")
    assert first == {
        "retrieval/num_queries": 2,
        "retrieval/num_requests": 4,
        "retrieval/num_retries": 2,
        "retrieval/num_failures": 0,
        "retrieval/num_outages": 0,
    }
    assert second == dict.fromkeys(first, 0), "the same names at every step, and on every rank"


def test_behind_a_replay_store_the_engine_counts_its_own_queries(tmp_path: Path) -> None:
    config = ReplayConfig(mode="cache", store=tmp_path / "store")
    counts, _ = counts_after(config, open_remote, "a", "a", "b")
    assert (counts["replay/num_hits"], counts["replay/num_misses"]) == (1, 2)
    assert (counts["retrieval/num_queries"], counts["retrieval/num_retries"]) == (2, 2)


def test_an_engine_in_process_has_nothing_to_count() -> None:
    async def open_engine() -> Retriever:
        return DictRetriever()

    assert counts_after(ReplayConfig(), open_engine, "a") == [{}, {}]
