"""One SQLite file that remembers what engines answered: shared by the processes of one machine, and by later runs.

Owns the file: its layout, its limit in bytes, and which of two answers to the same question stays. Whom to ask when it
knows nothing is ``replay.py``'s.

The journal is a write-ahead log, which needs memory shared between the processes: all of them must run on ONE machine,
and the file should lie on a local disk. On a network file system, even with one machine, SQLite depends on its locks.
A process that is killed loses at most what it was about to write. A machine that loses power may lose the last
answers, never the file.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterator, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from megatron_sdsearch.errors import ConfigError, RetrievalError
from megatron_sdsearch.records import Passage

_FIELD = "retrieval.replay.store"
_APPLICATION = 0x53445250  # "SDRP" in the file's header: no other program's database is taken for a store
_LAYOUT = 1
_LOCK_TIMEOUT_S = 60.0
_MAX_JOURNAL_BYTES = 64 << 20
_ENTRY_OVERHEAD = 64
"""Bytes that SQLite needs for one entry beside query and answer, about."""

_SCHEMA = (
    "CREATE TABLE fingerprints (id INTEGER PRIMARY KEY, name TEXT NOT NULL UNIQUE)",
    # The number never starts again (AUTOINCREMENT): it is the order of age.
    "CREATE TABLE answers (number INTEGER PRIMARY KEY AUTOINCREMENT, fingerprint INTEGER NOT NULL, top_k INTEGER NOT "
    "NULL, query BLOB NOT NULL, passages BLOB NOT NULL, UNIQUE (query, top_k, fingerprint))",
    "CREATE TABLE totals (num_bytes INTEGER NOT NULL, num_evicted INTEGER NOT NULL)",
    "INSERT INTO totals VALUES (0, 0)",
    f"PRAGMA application_id = {_APPLICATION}",
    f"PRAGMA user_version = {_LAYOUT}",
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Kept:
    """What ``put`` left in the store.

    Attributes:
        passages: the answer that counts from now on: the first that any process stored.
        num_evicted: older entries that had to go.
    """

    passages: tuple[Passage, ...]
    num_evicted: int


class ReplayStore:
    """Answers by (fingerprint, query, top_k). One object belongs to one thread.

    Raises (all methods):
        RetrievalError: the file cannot be read or written.
    """

    def __init__(self, path: Path, connection: sqlite3.Connection, max_bytes: int | None) -> None:
        self._path = path
        self._connection = connection
        self._max_bytes = max_bytes
        self._ids: dict[str, int] = {}

    @classmethod
    def open(cls, path: Path, *, max_bytes: int) -> Self:
        """Open the store for reading and writing, and make it if it is not there; any number may do so at once.

        Raises:
            ConfigError: the file is something else, or of another version, or its folder cannot be written.
        """
        with _opening(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            connection = _connect(f"{path.absolute().as_uri()}?mode=rwc")
            with _closed_on_error(connection):
                _prepare(connection, path)
        return cls(path, connection, max_bytes)

    @classmethod
    def open_readonly(cls, path: Path) -> Self:
        """Open a store that exists; nothing is written.

        Raises:
            ConfigError: it does not exist, is something else, or of another version.
        """
        if not path.is_file():
            raise ConfigError(_FIELD, f"{path} does not exist", "record it first: run with retrieval.replay.mode=cache")
        # A reader of a write-ahead log writes to the file beside it, unless nobody can be writing.
        is_frozen = not os.access(path.parent, os.W_OK) and not path.with_name(path.name + "-wal").exists()
        with _opening(path):
            connection = _connect(f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if is_frozen else ''}")
            with _closed_on_error(connection):
                _check_layout(connection, path)
        return cls(path, connection, None)

    @property
    def path(self) -> Path:
        """Of the file."""
        return self._path

    def fingerprints(self) -> tuple[str, ...]:
        """Of every engine that answers were stored of, in the order of their first answer."""
        with self._failing_as("read"):
            rows = self._connection.execute("SELECT name FROM fingerprints ORDER BY id").fetchall()
        return tuple(name for (name,) in rows)

    def num_evicted(self) -> int:
        """Entries that the limit has cost so far, by all processes and runs."""
        with self._failing_as("read"):
            (number,) = self._connection.execute("SELECT num_evicted FROM totals").fetchone()
        return int(number)

    def num_entries(self) -> int:
        """Entries of all fingerprints."""
        with self._failing_as("read"):
            (number,) = self._connection.execute("SELECT count(*) FROM answers").fetchone()
        return int(number)

    def get(self, fingerprint: str, query: str, top_k: int) -> tuple[Passage, ...] | None:
        """The stored answer, which may be empty; ``None`` when there is none."""
        with self._failing_as("read"):
            number = self._id_of(fingerprint)
            return None if number is None else self._get(number, _encode_query(query), top_k)

    def put(self, fingerprint: str, query: str, top_k: int, passages: Sequence[Passage]) -> Kept:
        """Store an answer unless there is one, and let the oldest entries go until the limit is kept."""
        key, value = _encode_query(query), _encode(passages)
        with self._failing_as("write"), _transaction(self._connection):
            number = self._id_of(fingerprint) or self._add_fingerprint(fingerprint)
            added = self._connection.execute(
                "INSERT INTO answers (fingerprint, top_k, query, passages) VALUES (?, ?, ?, ?) ON CONFLICT DO NOTHING",
                (number, top_k, key, value),
            )
            if added.rowcount:
                # What is given out is what a later run will be given: through the encoding as well.
                return Kept(passages=_decode(value), num_evicted=self._make_room(_size(key, value)))
            return Kept(passages=self._get(number, key, top_k) or (), num_evicted=0)

    def close(self) -> None:
        """Give the file back."""
        self._connection.close()

    def _get(self, fingerprint: int, query: bytes, top_k: int) -> tuple[Passage, ...] | None:
        row = self._connection.execute(
            "SELECT passages FROM answers WHERE query = ? AND top_k = ? AND fingerprint = ?",
            (query, top_k, fingerprint),
        ).fetchone()
        return None if row is None else _decode(row[0])

    def _id_of(self, fingerprint: str) -> int | None:
        if fingerprint not in self._ids:
            row = self._connection.execute("SELECT id FROM fingerprints WHERE name = ?", (fingerprint,)).fetchone()
            if row is None:
                return None
            self._ids[fingerprint] = row[0]
        return self._ids[fingerprint]

    def _add_fingerprint(self, fingerprint: str) -> int:
        # Not remembered in _ids: the transaction may yet be rolled back.
        number = self._connection.execute("INSERT INTO fingerprints (name) VALUES (?)", (fingerprint,)).lastrowid
        assert number is not None
        return number

    def _make_room(self, num_added: int) -> int:
        """Count what was added; delete the oldest entries while the total exceeds the limit. The newest stays."""
        (total,) = self._connection.execute("SELECT num_bytes FROM totals").fetchone()
        total += num_added
        doomed: list[tuple[int]] = []
        if self._max_bytes is not None and total > self._max_bytes:
            ages = self._connection.execute(
                "SELECT number, length(query) + length(passages) FROM answers ORDER BY number"
            )
            with closing(ages):
                newest = self._connection.execute("SELECT max(number) FROM answers").fetchone()[0]
                for number, num_bytes in ages:
                    if total <= self._max_bytes or number == newest:
                        break
                    doomed.append((number,))
                    total -= num_bytes + _ENTRY_OVERHEAD
            self._connection.executemany("DELETE FROM answers WHERE number = ?", doomed)
        self._connection.execute("UPDATE totals SET num_bytes = ?, num_evicted = num_evicted + ?", (total, len(doomed)))
        return len(doomed)

    @contextmanager
    def _failing_as(self, deed: str) -> Iterator[None]:
        try:
            yield
        except sqlite3.Error as error:
            raise RetrievalError(f"{self._path}: cannot {deed} the replay store: {error}") from error


def _connect(uri: str) -> sqlite3.Connection:
    # Transactions are begun by hand.
    connection = sqlite3.connect(uri, uri=True, timeout=_LOCK_TIMEOUT_S, isolation_level=None)
    connection.execute("PRAGMA synchronous = NORMAL")
    connection.execute(f"PRAGMA journal_size_limit = {_MAX_JOURNAL_BYTES}")
    return connection


def _prepare(connection: sqlite3.Connection, path: Path) -> None:
    _switch_to_write_ahead_log(connection)
    with _transaction(connection):  # one process makes the tables, the others wait here
        if connection.execute("SELECT count(*) FROM sqlite_master").fetchone() == (0,):
            for statement in _SCHEMA:
                connection.execute(statement)
    _check_layout(connection, path)


def _switch_to_write_ahead_log(connection: sqlite3.Connection) -> None:
    # SQLite does not wait for other processes here, whatever the timeout.
    deadline = time.monotonic() + _LOCK_TIMEOUT_S
    while True:
        try:
            connection.execute("PRAGMA journal_mode = WAL")
        except sqlite3.OperationalError as error:
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            return


def _check_layout(connection: sqlite3.Connection, path: Path) -> None:
    (application,) = connection.execute("PRAGMA application_id").fetchone()
    (layout,) = connection.execute("PRAGMA user_version").fetchone()
    if application != _APPLICATION:
        raise ConfigError(_FIELD, f"{path} is no replay store", "give the path of another file")
    if layout != _LAYOUT:
        raise ConfigError(_FIELD, f"{path} has layout {layout}, and this version {_LAYOUT}", "record into a new file")


@contextmanager
def _opening(path: Path) -> Iterator[None]:
    try:
        yield
    except (sqlite3.Error, OSError) as error:
        raise ConfigError(
            _FIELD, f"{path} cannot be opened ({error})", "give a store or a path for a new one"
        ) from error


@contextmanager
def _closed_on_error(connection: sqlite3.Connection) -> Iterator[None]:
    try:
        yield
    except BaseException:
        connection.close()
        raise


@contextmanager
def _transaction(connection: sqlite3.Connection) -> Iterator[None]:
    connection.execute("BEGIN IMMEDIATE")
    try:
        yield
        connection.execute("COMMIT")
    except BaseException:
        with suppress(sqlite3.Error):  # some errors have ended the transaction already
            connection.execute("ROLLBACK")
        raise


def _encode_query(query: str) -> bytes:
    # Sampled text may hold half a surrogate pair, which UTF-8 proper refuses.
    return query.encode("utf-8", "surrogatepass")


def _encode(passages: Sequence[Passage]) -> bytes:
    # Python writes the shortest digits that give the same float64 back.
    rows = [(passage.passage_id, passage.contents, float(passage.score)) for passage in passages]
    return zlib.compress(json.dumps(rows, separators=(",", ":")).encode("ascii"), 6)


def _decode(value: bytes) -> tuple[Passage, ...]:
    try:
        rows = json.loads(zlib.decompress(value))
        return tuple(Passage(passage_id=name, contents=contents, score=score) for name, contents, score in rows)
    except (zlib.error, ValueError, TypeError) as error:
        raise RetrievalError(f"an answer in the replay store is damaged ({error}); record into a new file") from error


def _size(query: bytes, passages: bytes) -> int:
    return len(query) + len(passages) + _ENTRY_OVERHEAD
