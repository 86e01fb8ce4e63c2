"""Load a corpus into Elasticsearch with concurrent bulk requests; resumable after an interruption at any point.

- A passage's id is its document's id, and every passage is *created*: sending it again returns 409 and changes nothing.
  So no passage is indexed twice, whatever was interrupted, timed out or retried.
- The index name is derived from its content, and the progress is stored in its mapping: the same command on any machine
  finds both and continues.
- The alias only ever points to a complete, verified index.
"""

from __future__ import annotations

import asyncio
import heapq
import json
import time
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from elasticsearch.helpers import async_streaming_bulk

from megatron_sdsearch.errors import DataError, RetrievalError, SDSearchError
from megatron_sdsearch.files import write_file, writing
from megatron_sdsearch.retrieval.batched import SearchError
from megatron_sdsearch.retrieval.corpus import CorpusRow, OnReject, read_corpus, sha256_of_corpus
from megatron_sdsearch.retrieval.elasticsearch_client import ElasticsearchClient
from megatron_sdsearch.retrieval.elasticsearch_index import CorpusIndex, IndexSettings, Marker, to_action
from megatron_sdsearch.retrieval.encoder import TextEncoder

_SAMPLE_SIZE = 200
_BAD_DOCUMENT, _CONFLICT = 400, 409

MAX_ID_BYTES = 512
"""Elasticsearch's limit. A longer id fails the whole bulk request, so such rows are rejected beforehand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """Settings of one load.

    Attributes:
        num_workers: concurrent bulk requests. With 1, passages are indexed in corpus order, which breaks ties.
        chunk_passages: maximum of one request.
        chunk_bytes: maximum of one request; a longer passage is sent alone.
        retry_limit_s: the load ends when a request has failed for this long, with retries.
        marker_interval_s: between two updates of the marker; after a crash at most this much is sent again.
        are_rejects_allowed: continue, and publish, without passages that are malformed or refused.
        is_restart: delete an incomplete index and start over.
        is_merged: merge into one segment at the end.
        deletes_old: delete the indices that the alias pointed to before.
    """

    num_workers: int = 4
    chunk_passages: int = 1000
    chunk_bytes: int = 5 << 20
    retry_limit_s: float = 600.0
    marker_interval_s: float = 10.0
    are_rejects_allowed: bool = False
    is_restart: bool = False
    is_merged: bool = False
    deletes_old: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusScan:
    """Result of one pass over a corpus.

    Attributes:
        sha256: of the file's bytes.
        num_passages: valid rows.
        num_rejected: invalid rows.
        sample: id to contents of some passages, including the first and the last; deterministic.
    """

    sha256: str
    num_passages: int
    num_rejected: int
    sample: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """Result of a load.

    Attributes:
        index: name of the index itself, not the alias.
        num_passages: in the index.
        num_created: by this attempt.
        num_found: sent by this attempt, and already in the index.
        num_skipped: not sent: marked as done by an earlier attempt.
        num_rejected: malformed or refused, over all attempts.
        old_indices: those that the alias pointed to before.
        are_old_deleted: whether they were deleted.
    """

    index: str
    num_passages: int
    num_created: int
    num_found: int
    num_skipped: int
    num_rejected: int
    old_indices: tuple[str, ...]
    are_old_deleted: bool


class RejectFile:
    """JSONL file of the passages left out, with reasons; created by the first reject.

    Lines are ``{"place", "reason"}`` for a malformed row, ``{"row", "id", "reason"}`` for a passage that Elasticsearch
    refused; ``row`` counts valid passages from 0.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin_scan(self) -> None:
        """Remove malformed rows, which the scan is going to find again."""
        self._keep(lambda reject: "row" in reject)

    def begin_load(self, num_done: int) -> set[str]:
        """Keep the rejects among the first ``num_done`` passages, written by earlier attempts, and return their ids."""
        kept = self._keep(lambda reject: "row" not in reject or int(reject["row"]) < num_done)
        return {str(reject["id"]) for reject in kept if "row" in reject}

    def add(self, **fields: object) -> None:
        """Append a line and close the file: an interruption loses no line.

        Raises:
            StorageError: it cannot be written.
        """
        with writing(self.path), self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(fields, ensure_ascii=False) + "\n")

    def _keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        try:
            lines = self.path.read_text(encoding="utf-8").splitlines(keepends=True)
            rejects = [(line, json.loads(line)) for line in lines]
            kept = [(line, reject) for line, reject in rejects if is_kept(reject)]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            problem = f"is not a file of rejects ({error})"
            raise DataError(f"{self.path}: {problem}; delete it, or give another path") from error
        if not kept:
            self.path.unlink()
        elif len(kept) < len(rejects):
            write_file(self.path, "".join(line for line, _ in kept))
        return [reject for _, reject in kept]


def scan_corpus(
    corpus: Path, on_reject: OnReject | None = None, on_passage: Callable[[], None] = lambda: None
) -> CorpusScan:
    """Check and count all rows before anything is sent, and choose the sample for the final verification.

    Args:
        corpus: see ``read_corpus``.
        on_reject: called with position and reason of each invalid row; without it the first one raises.
        on_passage: called after each valid row.

    Raises:
        DataError: see ``read_corpus``.
    """
    sha256 = sha256_of_corpus(corpus)
    num_passages = num_rejected = 0
    ends: list[CorpusRow] = []  # the first and the last row

    def count_reject(position: str, problem: str) -> None:
        nonlocal num_rejected
        num_rejected += 1
        assert on_reject is not None  # otherwise read_corpus raises instead
        on_reject(position, problem)

    def count_rows() -> Iterator[CorpusRow]:
        nonlocal num_passages
        for row in read_corpus(corpus, count_reject if on_reject else None, max_id_bytes=MAX_ID_BYTES):
            num_passages += 1
            ends[1:] = [row]
            on_passage()
            yield row

    # Smallest checksums: a uniform sample that does not depend on the corpus size.
    rows = heapq.nsmallest(_SAMPLE_SIZE, count_rows(), key=lambda row: zlib.crc32(row.id.encode()))
    sample = {row.id: row.contents for row in (*ends, *rows)}
    return CorpusScan(sha256=sha256, num_passages=num_passages, num_rejected=num_rejected, sample=sample)


class ContiguousProgress:
    """Counts the passages done from the start, in a marker, while chunks end in any order."""

    def __init__(self, marker: Marker) -> None:
        self.marker = marker
        self._ahead: dict[int, tuple[int, int]] = {}

    def add(self, first: int, end: int, num_rejected: int) -> None:
        """Mark passages [first, end) as done."""
        self._ahead[first] = end, num_rejected
        while self.marker.num_done in self._ahead:
            num_done, rejected = self._ahead.pop(self.marker.num_done)
            update = {"num_done": num_done, "num_rejected": self.marker.num_rejected + rejected}
            self.marker = self.marker.model_copy(update=update)


@dataclass(slots=True, kw_only=True)
class CorpusLoader:
    """Loads a corpus; for one call of ``run``.

    Attributes:
        corpus: see ``read_corpus``.
        scan: result of ``scan_corpus`` for this file.
        client: of the target cluster.
        index_settings: of the index.
        settings: of this attempt.
        rejects: receives the passages that Elasticsearch refuses; those of earlier attempts are kept.
        encoder: the one named in ``index_settings``.
        on_progress: called with the number of passages done, counted from the start of the corpus.
    """

    corpus: Path
    scan: CorpusScan
    client: ElasticsearchClient
    index_settings: IndexSettings
    settings: LoadSettings
    rejects: RejectFile
    encoder: TextEncoder | None = None
    on_progress: Callable[[int], None] = lambda num_done: None
    _index: CorpusIndex = field(init=False)
    _progress: ContiguousProgress = field(init=False)
    _noted_at: float = field(init=False)
    _encoding: asyncio.Lock = field(init=False, default_factory=asyncio.Lock)
    _rejected_ids: set[str] = field(init=False)
    _num_created: int = field(init=False, default=0)
    _num_found: int = field(init=False, default=0)

    async def run(self) -> LoadReport:
        """Load and verify the index, then point the alias to it; continues an interrupted attempt.

        Raises:
            ConfigError: the name of the alias or of the index is taken.
            DataError: the corpus has changed since the scan.
            RetrievalError: the cluster failed, refused passages although rejects are not allowed, or the verification
                failed.
        """
        scan, settings = self.scan, self.settings
        try:
            await self.client.send_once(self.client.api.info)  # no retries: a wrong address should fail at once
        except SearchError as failure:
            fix = "check that the cluster runs and --url is its address (http or https)"
            raise RetrievalError(f"{self.client.addresses}: first contact: {failure}; {fix}") from None
        index = self._index = CorpusIndex(self.client, self.index_settings, scan.sha256, settings.retry_limit_s)
        marker = await index.begin(scan.num_passages, is_restart=settings.is_restart)
        self._progress = ContiguousProgress(marker)
        self._rejected_ids = self.rejects.begin_load(marker.num_done)
        self.on_progress(marker.num_done)
        if marker.num_done < scan.num_passages:
            await self._load()
        if sha256_of_corpus(self.corpus) != scan.sha256:
            raise DataError(f"{self.corpus}: changed while it was being indexed; start again")
        num_refused = self._progress.marker.num_rejected
        num_rejected = num_refused + scan.num_rejected
        if num_rejected and not settings.are_rejects_allowed:
            num_rows = scan.num_passages + scan.num_rejected
            raise index.error(
                f"{num_rejected:,} of {num_rows:,} passages were rejected, see {self.rejects.path}; nothing was "
                "published: fix them, or allow rejects and start again"
            )
        await index.open_for_searches(is_merged=settings.is_merged)
        sample = {each: contents for each, contents in scan.sample.items() if each not in self._rejected_ids}
        await index.verify(scan.num_passages - num_refused, sample)
        await index.write_marker(self._progress.marker.model_copy(update={"is_complete": True}))
        return LoadReport(
            index=index.name,
            num_passages=scan.num_passages - num_refused,
            num_created=self._num_created,
            num_found=self._num_found,
            num_skipped=marker.num_done,
            num_rejected=num_rejected,
            old_indices=await index.publish(deletes_old=settings.deletes_old),
            are_old_deleted=settings.deletes_old,
        )

    async def _load(self) -> None:
        """Send all chunks, and store the progress however it ends; raise the first error."""
        chunks = self._chunks()
        self._noted_at = time.monotonic()
        try:
            async with asyncio.TaskGroup() as tasks:
                for _ in range(self.settings.num_workers):
                    tasks.create_task(self._work(chunks))
        except ExceptionGroup as group:
            first = next((error for error in group.exceptions if isinstance(error, SDSearchError)), group.exceptions[0])
            raise first from group
        finally:
            # The cluster itself may have failed; without this update the next attempt only sends a little more.
            with suppress(RetrievalError, TimeoutError):
                async with asyncio.timeout(10.0):
                    await self._index.write_marker(self._progress.marker)

    def _chunks(self) -> Iterator[tuple[int, list[CorpusRow]]]:
        """Yield chunks of rows and the number of their first row, lazily: memory does not grow with the corpus."""
        first = self._progress.marker.num_done
        # Invalid rows were reported by the scan.
        rows = islice(read_corpus(self.corpus, lambda *_: None, max_id_bytes=MAX_ID_BYTES), first, None)
        while chunk := list(islice(rows, self.settings.chunk_passages)):
            yield first, chunk
            first += len(chunk)

    async def _work(self, chunks: Iterator[tuple[int, list[CorpusRow]]]) -> None:
        """Send chunks until none is left; the workers share the iterator."""
        for first, rows in chunks:
            num_rejected = await self._send(first, rows)
            self._progress.add(first, first + len(rows), num_rejected)
            self.on_progress(self._progress.marker.num_done)
            if time.monotonic() - self._noted_at > self.settings.marker_interval_s:
                self._noted_at = time.monotonic()
                await self._index.write_marker(self._progress.marker)

    async def _send(self, first: int, rows: Sequence[CorpusRow]) -> int:
        """Send rows until each is indexed or rejected; return the number of rejects."""
        vectors: list[list[float] | None] = [None] * len(rows)
        if self.encoder is not None:
            async with self._encoding:  # encoders are not thread-safe
                encoded = await asyncio.to_thread(self.encoder.encode_passages, [row.contents for row in rows])
            # As precise as fp32 for unit vectors, with half the digits.
            vectors = np.round(encoded.astype(np.float64), 8).tolist()
        waiting = {n: to_action(row, vector) for n, (row, vector) in enumerate(zip(rows, vectors, strict=True), first)}
        num_rejected = 0

        async def send_waiting() -> None:
            nonlocal num_rejected
            numbers, failure = iter(list(waiting)), None
            results = async_streaming_bulk(
                self.client.api,
                list(waiting.values()),
                chunk_size=self.settings.chunk_passages,
                max_chunk_bytes=self.settings.chunk_bytes,
                raise_on_error=False,
                index=self._index.name,
            )
            async for _, item in results:
                number, result = next(numbers), item["create"]
                status = int(result["status"])
                if status < 300:
                    self._num_created += 1
                elif status == _CONFLICT:
                    self._num_found += 1
                elif status == _BAD_DOCUMENT:
                    reason = self.client.failure_from_status(status, result).cause
                    self.rejects.add(row=number, id=waiting[number]["_id"], reason=reason)
                    self._rejected_ids.add(waiting[number]["_id"])
                    num_rejected += 1
                else:
                    # Not specific to this document (no such index, forbidden): the others fail as well.
                    failure = self.client.failure_from_status(status, result)
                    continue
                del waiting[number]
            if waiting:
                raise failure or SearchError("fewer answers than passages", is_retryable=True)

        while waiting:
            num_before = len(waiting)
            try:
                await self._index.send(send_waiting, "bulk request")
            except RetrievalError:
                if len(waiting) == num_before:  # otherwise the cluster is slow but makes progress
                    raise
        return num_rejected
