"""A retriever that remembers: known queries are answered from a store, others by the engine, or by nobody.

Owns when the engine is asked, and that identical queries in flight are asked once. The file is ``replay_store.py``'s.
With ``only`` a run repeats bit for bit without its engine: passages and scores are exactly what was recorded.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Final

from megatron_sdsearch.config import ReplayConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.base import Retriever
from megatron_sdsearch.retrieval.replay_store import ReplayStore

_Key = tuple[str, str, int]

HITS: Final = "replay/num_hits"
"""Searches answered from the store, or by a search for the same that was under way."""
MISSES: Final = "replay/num_misses"
"""Searches that the engine was asked, failed ones included; with ``only``, those that failed for want of an answer."""
EVICTIONS: Final = "replay/num_evictions"
"""Old entries that ``retrieval.replay.max_mb`` has cost."""


def with_replay(config: ReplayConfig, open_engine: Callable[[], Retriever]) -> Retriever:
    """The engine as it is, behind a store, or a store alone: as ``retrieval.replay`` says.

    Args:
        config: ``mode=off`` gives what ``open_engine`` returns.
        open_engine: opens the search engine; never called with ``mode=only``.

    Raises:
        ConfigError: the store cannot be used, or does not say which of its engines is meant.
        Exception: whatever ``open_engine`` raises.
    """
    with _stored(config) as stored:
        return stored.alone or stored.before(open_engine())


async def with_replay_async(config: ReplayConfig, open_engine: Callable[[], Awaitable[Retriever]]) -> Retriever:
    """``with_replay`` for an engine that has to be awaited."""
    with _stored(config) as stored:
        return stored.alone or stored.before(await open_engine())


def replay_counts(retriever: Retriever) -> dict[str, int]:
    """Counts since the last call, under names of metrics; empty for a retriever without a store."""
    return retriever.take_counts() if isinstance(retriever, ReplayRetriever) else {}


@dataclass(frozen=True, slots=True, kw_only=True)
class _Stored:
    """What there is before an engine is opened: a store, and with ``only`` the whole retriever."""

    store: ReplayStore | None = None
    alone: ReplayRetriever | None = None

    def before(self, engine: Retriever) -> Retriever:
        return ReplayRetriever(self.store, engine=engine) if self.store else engine


@contextmanager
def _stored(config: ReplayConfig) -> Iterator[_Stored]:
    """Opened first, so that a wrong path shows before an engine starts; closed if anything goes wrong from here on."""
    if config.mode == "off":
        yield _Stored()
        return
    assert config.store is not None  # RetrievalConfig has checked it
    is_alone = config.mode == "only"
    store = (
        ReplayStore.open_readonly(config.store)
        if is_alone
        else ReplayStore.open(config.store, max_bytes=config.max_mb << 20)
    )
    try:
        fingerprint = _choose(store, config.fingerprint) if is_alone else ""
        yield _Stored(store=store, alone=ReplayRetriever(store, fingerprint=fingerprint) if is_alone else None)
    except BaseException:
        store.close()
        raise


def _choose(store: ReplayStore, wanted: str | None) -> str:
    known = store.fingerprints()
    listing = "".join(f"\n  {name}" for name in known)
    if not known:
        raise ConfigError(
            "retrieval.replay.store", f"{store.path} is empty", "record it first: run with retrieval.replay.mode=cache"
        )
    field = "retrieval.replay.fingerprint"
    if wanted is None and len(known) > 1:
        raise ConfigError(field, f"missing, and {store.path} knows {len(known)} engines", f"set it to one of{listing}")
    if wanted is not None and wanted not in known:
        raise ConfigError(field, f"{wanted!r} is not in {store.path}", f"set it to one of{listing}")
    return wanted or known[0]


@dataclass(slots=True)
class _Flight:
    """A search under way, and how many wait for it."""

    task: asyncio.Task[Sequence[Passage]]
    num_waiting: int = 0


class ReplayRetriever:
    """A ``Retriever`` before another one, or in its place.

    Args:
        store: belongs to the retriever from now on: ``close`` closes it, and ``engine`` too.
        engine: asked for what the store does not hold; ``None``: nobody is asked.
        fingerprint: whose answers are served when there is no engine.
    """

    def __init__(self, store: ReplayStore, *, engine: Retriever | None = None, fingerprint: str = "") -> None:
        self._store = store
        self._engine = engine
        self._fingerprint = fingerprint
        self._flights: dict[_Key, _Flight] = {}
        self._counts = dict.fromkeys((HITS, MISSES, EVICTIONS), 0)

    @property
    def fingerprint(self) -> str:
        """The engine's, whether it is there or not."""
        return self._engine.fingerprint if self._engine else self._fingerprint

    @property
    def engine(self) -> Retriever | None:
        """Behind the store, with counts of its own; ``None`` with ``only``."""
        return self._engine

    def take_counts(self) -> dict[str, int]:
        """Hits, misses and evictions since the last call, under names of metrics."""
        counts = self._counts.copy()
        self._counts = dict.fromkeys(counts, 0)
        return counts

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """The first answer that was ever stored for this engine, query and ``top_k``.

        Raises:
            RetrievalError: the engine or the store failed, neither of which is stored; or nobody may be asked.
            ValueError: ``top_k`` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        key = (self.fingerprint, query, top_k)
        flight = self._flights.get(key)
        if flight is None:
            flight = self._flights[key] = _Flight(asyncio.ensure_future(self._answer(*key)))
            return await self._wait_for(key, flight)
        passages = await self._wait_for(key, flight)
        self._counts[HITS] += 1
        return passages

    async def close(self) -> None:
        """Close engine and store."""
        try:
            if self._engine:
                await self._engine.close()
        finally:
            self._store.close()

    async def _wait_for(self, key: _Key, flight: _Flight) -> Sequence[Passage]:
        flight.num_waiting += 1
        try:
            # One who gives up must not take the answer from the others.
            return await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0:
                # Nobody wants it any more: left alone it could time out between two steps, and fail the next asker.
                flight.task.cancel()
                self._flights.pop(key, None)

    async def _answer(self, fingerprint: str, query: str, top_k: int) -> Sequence[Passage]:
        # The store is called on the event loop, never in a thread: it takes 0.03 to 0.15 ms, and a thread's
        # timing would decide which rollouts an in-process engine batches together, and so the last bits of its logits.
        stored = self._store.get(fingerprint, query, top_k)
        if stored is not None:
            self._counts[HITS] += 1
            return stored
        self._counts[MISSES] += 1
        if self._engine is None:
            raise RetrievalError(
                self._missing(query, top_k), query=query, cause="the replay store does not know the query"
            )
        found = await self._engine.search(query, top_k=top_k)
        kept = self._store.put(fingerprint, query, top_k, found)
        self._counts[EVICTIONS] += kept.num_evicted
        return kept.passages

    def _missing(self, query: str, top_k: int) -> str:
        evicted = self._store.num_evicted()
        reason = (
            f" ({evicted} entries were evicted: raise retrieval.replay.max_mb for the recording)" if evicted else ""
        )
        return (
            f"{self._store.path} holds no answer to {query!r} with top_k={top_k}{reason}, and "
            "retrieval.replay.mode=only asks nobody; to record it, run once with "
            "retrieval.replay.mode=cache and the engine at hand"
        )
