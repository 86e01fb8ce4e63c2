"""Replay: a retriever that answers known queries from a store, and others by the engine, or not at all.

With ``only`` a run repeats bit for bit without its engine: passages and scores are exactly as recorded. The store is
one SQLite file, shared by the processes of one machine and by later runs.

Its write-ahead log needs shared memory: all processes must run on ONE machine, and the file should be on a local disk.
On a network file system SQLite depends on that system's locks, even with one machine. A killed process loses at most
the answer that it was writing; a power failure may lose the last answers, never the file.
"""

from __future__ import annotations

import asyncio
import json
import os
import sqlite3
import time
import zlib
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from megatron_sdsearch.config import ReplayConfig
from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.base import Retriever

HITS: Final = "replay/num_hits"
"""Searches answered from the store, or by a concurrent search for the same query."""
MISSES: Final = "replay/num_misses"
"""Searches sent to the engine, including failed ones; with ``only``, those without a stored answer."""

_FIELD = "retrieval.replay.store"
_APPLICATION = 0x53445250  # "SDRP" in the file's header distinguishes a store from other databases
_LAYOUT = 1
_LOCK_TIMEOUT_S = 60.0
_MAX_JOURNAL_BYTES = 64 << 20

_SCHEMA = (
    "CREATE TABLE fingerprints (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    "CREATE TABLE answers (number INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint INTEGER NOT NULL, top_k INTEGER NOT "
    "NULL, query BLOB NOT NULL, passages BLOB NOT NULL, UNIQUE (query, top_k, fingerprint))",
    # Unused; earlier versions, which limited the size of a store, expect it.
    "CREATE TABLE totals (num_bytes INTEGER NOT NULL, num_evicted INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0, 0)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_LAYOUT}",
)


async def open_with_replay(config: ReplayConfig, open_engine: Callable[[], Awaitable[Retriever]]) -> Retriever:
    """Open the engine, the engine behind a store, or the store alone, by ``retrieval.replay.mode``.

    Args:
        config: the section.
        open_engine: opens the search engine; not called with ``mode=only``.

    Raises:
        ConfigError: the store cannot be used; or with ``mode=only``, it holds answers of several engines.
        Exception: any error of ``open_engine``.
    """
    if config.mode == "off":
        return await open_engine()
    assert config.store is not None  # RetrievalConfig has checked it
    # Opened first, so that a wrong path is reported before an engine starts.
    store = ReplayStore(config.store, is_readonly=config.mode == "only")
    try:
        if config.mode == "cache":
            return ReplayRetriever(store, engine=await open_engine())
        known = store.fingerprints()
        if not known:
            fix = "record it first: run with retrieval.replay.mode=cache"
            raise ConfigError(_FIELD, f"{config.store} is empty", fix)
        if len(known) > 1:
            problem = f"{config.store} holds the answers of {len(known)} engines ({', '.join(known)})"
            raise ConfigError(_FIELD, problem, "record the one to replay into its own store")
        return ReplayRetriever(store, fingerprint=known[0])
    except BaseException:
        store.close()
        raise


@dataclass(slots=True)
class _Flight:
    """A running search, and the number of its callers."""

    task: asyncio.Task[Sequence[Passage]]
    num_waiting: int = 0


class ReplayRetriever:
    """A ``Retriever`` that caches the answers of another one, or replaces it.

    Args:
        store: owned by the retriever, like ``engine``: ``close`` closes both.
        engine: answers queries that the store does not hold; without it they are errors.
        fingerprint: of the engine to replay, if there is no ``engine``.
    """

    def __init__(self, store: ReplayStore, *, engine: Retriever | None = None, fingerprint: str = "") -> None:
        self.engine = engine
        self.fingerprint = engine.fingerprint if engine else fingerprint
        self._store = store
        self._flights: dict[tuple[str, int], _Flight] = {}
        self._counts = {HITS: 0, MISSES: 0}

    def take_counts(self) -> dict[str, int]:
        """Return hits and misses since the last call, by metric, and reset them."""
        counts, self._counts = self._counts, dict.fromkeys(self._counts, 0)
        return counts

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Return the first answer that was stored for this engine, query and ``top_k``.

        Raises:
            RetrievalError: the engine or the store failed (failures are not stored), or the query is unknown and there
                is no engine.
            ValueError: ``top_k`` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        flight = self._flights.get((query, top_k))
        is_first = flight is None
        if flight is None:
            flight = _Flight(asyncio.ensure_future(self._answer(query, top_k)))
            self._flights[query, top_k] = flight
        flight.num_waiting += 1
        try:
            # Shielded: a cancelled caller must not cancel the search of the others.
            passages = await asyncio.shield(flight.task)
        finally:
            flight.num_waiting -= 1
            if flight.num_waiting == 0:
                # Without callers the search could time out between two steps, and fail the next one.
                flight.task.cancel()
                self._flights.pop((query, top_k), None)
        self._counts[HITS] += not is_first
        return passages

    async def close(self) -> None:
        """Close engine and store."""
        try:
            if self.engine:
                await self.engine.close()
        finally:
            self._store.close()

    async def _answer(self, query: str, top_k: int) -> Sequence[Passage]:
        # Called on the event loop, not in a thread: it takes 0.03 to 0.15 ms, and a thread's timing would change which
        # rollouts an in-process engine batches together, and with it the last bits of the logits.
        stored = self._store.get(self.fingerprint, query, top_k)
        if stored is not None:
            self._counts[HITS] += 1
            return stored
        self._counts[MISSES] += 1
        if self.engine is None:
            raise RetrievalError(
                f"{self._store.path} holds no answer to {query!r} with top_k={top_k}, and "
                "retrieval.replay.mode=only never opens the engine; to record it, run once with "
                "retrieval.replay.mode=cache and the engine",
                query=query,
                cause="the query is not in the replay store",
            )
        found = await self.engine.search(query, top_k=top_k)
        return self._store.put(self.fingerprint, query, top_k, found)


class ReplayStore:
    """Stored answers by (fingerprint, query, top_k). Not thread-safe.

    Args:
        path: of the file, which is created if it is missing, by any number of processes at once.
        is_readonly: the file must exist, and is not written.

    Raises:
        ConfigError: the file is missing, is not a store of this version, or its folder cannot be written.
        RetrievalError: (methods) the file cannot be read or written.
    """

    def __init__(self, path: Path, *, is_readonly: bool = False) -> None:
        self.path = path
        if is_readonly and not path.is_file():
            raise ConfigError(_FIELD, f"{path} does not exist", "record it first: run with retrieval.replay.mode=cache")
        # A reader writes to files beside the database, unless it declares that no process writes (immutable).
        is_frozen = not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
        mode = f"ro{'&immutable=1' if is_frozen else ''}" if is_readonly else "rwc"
        try:
            if not is_readonly:
                path.parent.mkdir(parents=True, exist_ok=True)
            # isolation_level=None: transactions are started explicitly.
            uri = f"{path.absolute().as_uri()}?mode={mode}"
            self._connection = sqlite3.connect(uri, uri=True, timeout=_LOCK_TIMEOUT_S, isolation_level=None)
            try:
                self._prepare(is_readonly=is_readonly)
            except BaseException:
                self._connection.close()
                raise
        except (sqlite3.Error, OSError) as error:
            fix = "give a store or a path for a new one"
            raise ConfigError(_FIELD, f"{path} cannot be opened ({error})", fix) from error

    def fingerprints(self) -> tuple[str, ...]:
        """Return the fingerprints of all stored engines, in order of their first answer."""
        with self._failing_as("read"):
            rows = self._connection.execute("SELECT name FROM fingerprints ORDER BY id").fetchall()
        return tuple(name for (name,) in rows)

    def get(self, fingerprint: str, query: str, top_k: int) -> tuple[Passage, ...] | None:
        """Return the stored answer, which may be empty; ``None`` if there is none."""
        with self._failing_as("read"):
            row = self._connection.execute(
                "SELECT passages FROM answers WHERE query = ? AND top_k = ? "
                "AND fingerprint = (SELECT id FROM fingerprints WHERE name = ?)",
                (_encode_query(query), top_k, fingerprint),
            ).fetchone()
        return None if row is None else _decode(row[0])

    def put(self, fingerprint: str, query: str, top_k: int, passages: Sequence[Passage]) -> tuple[Passage, ...]:
        """Store an answer unless there is one, and return the stored answer: the first of any process."""
        # Python writes the shortest digits that read back as the same float64.
        rows = [(passage.passage_id, passage.contents, float(passage.score)) for passage in passages]
        value = zlib.compress(json.dumps(rows, separators=(",", ":")).encode("ascii"), 6)
        with self._failing_as("write"), self._connection:
            self._connection.execute("BEGIN IMMEDIATE")
            self._connection.execute(
                "INSERT INTO fingerprints (name) VALUES (?) ON CONFLICT DO NOTHING", (fingerprint,)
            )
            self._connection.execute(
                "INSERT INTO answers (fingerprint, top_k, query, passages) SELECT id, ?, ?, ? FROM fingerprints "
                "WHERE name = ? ON CONFLICT DO NOTHING",
                (top_k, _encode_query(query), value, fingerprint),
            )
        # Read back, so that this run gets exactly the answer that later runs will get.
        return self.get(fingerprint, query, top_k) or ()

    def close(self) -> None:
        """Close the file."""
        self._connection.close()

    def _prepare(self, *, is_readonly: bool) -> None:
        connection = self._connection
        connection.execute("PRAGMA synchronous = NORMAL")
        connection.execute(f"PRAGMA journal_size_limit = {_MAX_JOURNAL_BYTES}")
        if not is_readonly:
            self._switch_to_write_ahead_log()
            with connection:  # one process creates the tables, the others wait here
                connection.execute("BEGIN IMMEDIATE")
                if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
                    for statement in _SCHEMA:
                        connection.execute(statement)
        (application,) = connection.execute("PRAGMA application_id").fetchone()
        (layout,) = connection.execute("PRAGMA user_version").fetchone()
        if application != _APPLICATION:
            raise ConfigError(_FIELD, f"{self.path} is not a replay store", "give the path of another file")
        if layout != _LAYOUT:
            problem = f"{self.path} has layout {layout}, and this version uses {_LAYOUT}"
            raise ConfigError(_FIELD, problem, "record into a new file")

    def _switch_to_write_ahead_log(self) -> None:
        # SQLite ignores its timeout here and does not wait for other processes.
        deadline = time.monotonic() + _LOCK_TIMEOUT_S
        while True:
            try:
                self._connection.execute("PRAGMA journal_mode = WAL")
            except sqlite3.OperationalError as error:
                if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return

    @contextmanager
    def _failing_as(self, action: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RetrievalError(f"{self.path}: cannot {action} the replay store: {error}") from error


def _encode_query(query: str) -> bytes:
    # Sampled text may hold lone surrogates, which strict UTF-8 rejects.
    return query.encode("utf-8", "surrogatepass")


def _decode(value: bytes) -> tuple[Passage, ...]:
    try:
        rows = json.loads(zlib.decompress(value))
        return tuple(Passage(passage_id=name, contents=contents, score=score) for name, contents, score in rows)
    except (zlib.error, ValueError, TypeError) as error:
        raise RetrievalError(f"an answer in the replay store is damaged ({error}); record into a new file") from error
