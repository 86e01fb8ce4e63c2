"""A corpus into Elasticsearch: many bulk requests at once, which may be interrupted at any point and begun again.

Owns the passages on their way: chunks, workers, back-pressure, retries, rejects. The index itself is
``elastic_corpus.py``'s.

- A passage's id is its document's, and every passage is *created*: a second attempt finds it there already (409) and
  changes nothing. So nothing can come in twice, whatever was interrupted, timed out or sent again.
- The index's marker says how many passages from the start of the corpus are safely in: the next attempt begins there.
- One reader fills a queue of as many chunks as there are workers, and waits: memory does not grow with the corpus.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import AsyncGenerator, Callable, Iterator, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from elasticsearch import ApiError

from megatron_sdsearch.errors import DataError, RetrievalError, SDSearchError
from megatron_sdsearch.retrieval.batching import Fault
from megatron_sdsearch.retrieval.corpus import CorpusRow, read_corpus, sha256_of_corpus
from megatron_sdsearch.retrieval.elastic_corpus import Cluster, ElasticIndex, IndexSettings, Marker
from megatron_sdsearch.retrieval.encoder import TextEncoder

_SAMPLE_SIZE = 200
_BAD_DOCUMENT, _CONFLICT, _TOO_LARGE = 400, 409, 413

MAX_ID_BYTES = 512
"""Elasticsearch's limit. It refuses a whole bulk request for one longer id, so such a row is rejected beforehand."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadSettings:
    """How to load.

    Attributes:
        num_workers: bulk requests open at one time. With 1, passages arrive in the corpus's order, and so equal
            scores come in it.
        chunk_passages: of one request, at most.
        chunk_bytes: of one request, about; a longer passage goes alone.
        marker_interval_s: between two notes of how far it is; after a crash at most so much is sent again.
        are_rejects_allowed: go on, and publish, without passages that are malformed or refused.
        is_restart: delete an unfinished index and begin anew.
        is_merged: into one segment at the end.
        deletes_old: the indices that the alias pointed to before.
    """

    num_workers: int = 4
    chunk_passages: int = 1000
    chunk_bytes: int = 5 << 20
    marker_interval_s: float = 10.0
    are_rejects_allowed: bool = False
    is_restart: bool = False
    is_merged: bool = False
    deletes_old: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one pass over a corpus has found.

    Attributes:
        sha256: of the file's bytes.
        num_passages: good rows.
        num_rejected: bad rows.
        sample: id to contents of some passages, the first and the last among them, the same at every pass.
    """

    sha256: str
    num_passages: int
    num_rejected: int
    sample: dict[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class LoadReport:
    """What was done.

    Attributes:
        index: physical name; the alias points to it.
        num_passages: in the index.
        num_created: by this attempt.
        num_found: were there already when this attempt sent them.
        num_skipped: not sent: an earlier attempt had noted them.
        num_rejected: malformed or refused, over all attempts.
        old_indices: the alias pointed to them before.
        are_old_deleted: or kept.
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
    """JSONL of what was left out, with reasons; made by the first reject.

    Lines are ``{"place", "reason"}`` for a malformed row, ``{"row", "id", "reason"}`` for a passage that Elasticsearch
    refused; ``row`` counts good passages from 0.
    """

    def __init__(self, path: Path) -> None:
        self.path = path

    def begin_survey(self) -> None:
        """Forget malformed rows: they are about to be found again."""
        self._keep(lambda reject: "row" in reject)

    def begin_load(self, num_done: int) -> set[str]:
        """Keep what earlier attempts wrote about the first ``num_done`` passages; return the ids of those."""
        kept = self._keep(lambda reject: "row" not in reject or int(reject["row"]) < num_done)
        return {str(reject["id"]) for reject in kept if "row" in reject}

    def add(self, **fields: object) -> None:
        """Write a line, at once: an interruption loses none."""
        try:
            with self.path.open("a", encoding="utf-8") as file:
                file.write(json.dumps(fields, ensure_ascii=False) + "\n")
        except OSError as error:
            raise DataError(f"{self.path}: cannot be written ({error.strerror}); give another path") from error

    def _keep(self, is_kept: Callable[[dict[str, Any]], bool]) -> list[dict[str, Any]]:
        try:
            rejects = [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]
            kept = [reject for reject in rejects if is_kept(reject)]
        except FileNotFoundError:
            return []
        except (OSError, ValueError, TypeError) as error:
            raise DataError(f"{self.path}: is no file of rejects ({error}); delete it, or give another path") from error
        if len(kept) < len(rejects):
            self.path.unlink()
            for reject in kept:
                self.add(**reject)
        return kept


def survey_corpus(
    corpus: Path,
    on_reject: Callable[[str, str], None] | None = None,
    on_passage: Callable[[], None] | None = None,
) -> Survey:
    """Check every row before anything is sent, count them, and draw the sample that is looked up at the end.

    Raises:
        DataError: see ``read_corpus``.
    """
    sha256 = sha256_of_corpus(corpus)
    num_passages = num_rejected = 0

    def count(place: str, problem: str) -> None:
        nonlocal num_rejected
        num_rejected += 1
        assert on_reject is not None  # else read_corpus raises instead
        on_reject(place, problem)

    generator = random.Random(sha256)
    reservoir: list[CorpusRow] = []
    row = None
    for row in read_corpus(corpus, count if on_reject else None, max_id_bytes=MAX_ID_BYTES):
        if num_passages < _SAMPLE_SIZE:
            reservoir.append(row)
        elif (place := generator.randrange(num_passages + 1)) < _SAMPLE_SIZE and place:  # place 0 keeps the first
            reservoir[place] = row
        num_passages += 1
        if on_passage is not None:
            on_passage()
    assert row is not None  # read_corpus raises for a corpus without passages
    sample = {each.id: each.contents for each in (*reservoir, row)}
    return Survey(sha256=sha256, num_passages=num_passages, num_rejected=num_rejected, sample=sample)


@dataclass(slots=True)
class Chunk:
    """Neighbours of the corpus, for one request.

    Attributes:
        first: counts good passages from 0.
        ids: of the passages.
        lines: their documents, each one line of JSON.
        num_bytes: of the lines.
    """

    first: int
    ids: list[str] = field(default_factory=list)
    lines: list[bytes] = field(default_factory=list)
    num_bytes: int = 0


class Watermark:
    """How many passages from the start are done, when chunks end in any order."""

    def __init__(self, num_done: int, num_rejected: int) -> None:
        self.num_done = num_done
        self.num_rejected = num_rejected
        self._ahead: dict[int, tuple[int, int]] = {}

    def add(self, first: int, end: int, num_rejected: int) -> None:
        """Passages [first, end) are done."""
        self._ahead[first] = end, num_rejected
        while self.num_done in self._ahead:
            self.num_done, rejected = self._ahead.pop(self.num_done)
            self.num_rejected += rejected


async def index_corpus(
    corpus: Path,
    survey: Survey,
    cluster: Cluster,
    index_settings: IndexSettings,
    load_settings: LoadSettings,
    *,
    rejects: RejectFile,
    encoder: TextEncoder | None = None,
    on_progress: Callable[[int], None] = lambda num_done: None,
) -> LoadReport:
    """Load a corpus, verify the index, and point the alias to it; goes on where an earlier attempt was interrupted.

    Args:
        corpus: of ``read_corpus``.
        survey: of this very file.
        cluster: to load into.
        index_settings: of the index.
        load_settings: of this attempt.
        rejects: is told of passages that Elasticsearch refuses; those of earlier attempts are kept.
        encoder: its fingerprint stands in ``index_settings``.
        on_progress: told how many passages are done, from the corpus's start.

    Raises:
        ConfigError: the alias's name, or the index's, is taken by something else.
        DataError: the corpus has changed since the survey.
        RetrievalError: the cluster failed, refused passages that are not allowed to be left out, or does not hold
            afterwards what it should.
    """
    index = ElasticIndex(cluster, index_settings, survey.sha256)
    await index.check_alias()
    marker = await index.begin(survey.num_passages, is_restart=load_settings.is_restart)
    load = _Load(corpus, index, marker, load_settings, rejects, encoder, on_progress)
    on_progress(marker.num_done)
    if marker.num_done < survey.num_passages:
        await load.run()
    done = load.marker
    if sha256_of_corpus(corpus) != survey.sha256:
        raise DataError(f"{corpus}: changed while it was being indexed; start again")
    num_rejected = done.num_rejected + survey.num_rejected
    if num_rejected and not load_settings.are_rejects_allowed:
        num_rows = survey.num_passages + survey.num_rejected
        raise cluster.failed(
            index.name,
            f"{num_rejected:,} of {num_rows:,} passages were rejected, see {rejects.path}; nothing was published: "
            "fix them, or allow rejects and start again",
        )
    await index.open_for_searches(is_merged=load_settings.is_merged)
    await index.verify(survey.num_passages - done.num_rejected, survey.sample, load.rejected_ids)
    await index.write_marker(done.model_copy(update={"is_complete": True}))
    old = await index.publish(deletes_old=load_settings.deletes_old)
    return LoadReport(
        index=index.name,
        num_passages=survey.num_passages - done.num_rejected,
        num_created=load.num_created,
        num_found=load.num_found,
        num_skipped=marker.num_done,
        num_rejected=num_rejected,
        old_indices=old,
        are_old_deleted=load_settings.deletes_old,
    )


class _Load:
    """One attempt, from the marker's place to the end of the corpus."""

    def __init__(
        self,
        corpus: Path,
        index: ElasticIndex,
        marker: Marker,
        settings: LoadSettings,
        rejects: RejectFile,
        encoder: TextEncoder | None,
        on_progress: Callable[[int], None],
    ) -> None:
        self._corpus = corpus
        self._index = index
        self._first_marker = marker
        self._settings = settings
        self._rejects = rejects
        self._encoder = encoder
        self._on_progress = on_progress
        self._watermark = Watermark(marker.num_done, marker.num_rejected)
        self._queue: asyncio.Queue[Chunk | None] = asyncio.Queue(settings.num_workers)
        self.rejected_ids = rejects.begin_load(marker.num_done)
        self.num_created = self.num_found = 0

    @property
    def marker(self) -> Marker:
        """How far it is."""
        update = {"num_done": self._watermark.num_done, "num_rejected": self._watermark.num_rejected}
        return self._first_marker.model_copy(update=update)

    async def run(self) -> None:
        """Send everything, and note how far it came, however it ends.

        Raises:
            SDSearchError: of whichever part failed first.
        """
        try:
            async with asyncio.TaskGroup() as tasks:
                notes = tasks.create_task(self._note_now_and_then())
                workers = [tasks.create_task(self._work()) for _ in range(self._settings.num_workers)]
                async with aclosing(self._chunks()) as chunks:
                    async for chunk in chunks:
                        await self._queue.put(chunk)
                for _ in workers:
                    await self._queue.put(None)
                await asyncio.gather(*workers)
                notes.cancel()
        except ExceptionGroup as group:
            first = next((error for error in group.exceptions if isinstance(error, SDSearchError)), group.exceptions[0])
            raise first from group
        finally:
            # The cluster may be what failed; without this note the next attempt only sends a little more.
            with suppress(RetrievalError, TimeoutError):
                async with asyncio.timeout(10.0):
                    await self._index.write_marker(self.marker)

    async def _chunks(self) -> AsyncGenerator[Chunk]:
        # The survey has reported what is left out here.
        rows: Iterator[CorpusRow] = read_corpus(self._corpus, lambda place, problem: None, max_id_bytes=MAX_ID_BYTES)
        first = self._watermark.num_done
        rows = islice(rows, first, None)
        while batch := list(islice(rows, self._settings.chunk_passages)):
            for chunk in pack(first, batch, await self._encode(batch), self._settings.chunk_bytes):
                yield chunk
            first += len(batch)

    async def _encode(self, rows: Sequence[CorpusRow]) -> Sequence[Sequence[float] | None]:
        if self._encoder is None:
            return [None] * len(rows)
        vectors = await asyncio.to_thread(self._encoder.encode_passages, [row.contents for row in rows])
        # As fine as fp32 at length 1, and half the digits.
        return [row.tolist() for row in np.round(vectors.astype(np.float64), 8)]

    async def _work(self) -> None:
        while (chunk := await self._queue.get()) is not None:
            num_rejected = await self._send(chunk)
            self._watermark.add(chunk.first, chunk.first + len(chunk.ids), num_rejected)
            self._on_progress(self._watermark.num_done)

    async def _send(self, chunk: Chunk) -> int:
        """Until every passage of it is in or rejected; returns the number of the latter."""
        waiting = list(range(len(chunk.ids)))
        what = f"{self._index.name}: bulk request"
        patience = self._index.cluster.new_patience()
        num_rejected = 0
        room = len(waiting)  # of one request
        while waiting:
            part, rest = waiting[:room], waiting[room:]
            answer = await self._bulk(chunk, part)
            if answer is None and len(part) > 1:
                room = len(part) // 2
            elif answer is None:
                num_rejected += self._reject(chunk, part[0], f"HTTP {_TOO_LARGE}: larger than the cluster takes")
                waiting = rest
            elif isinstance(answer, Fault):
                await patience.wait(answer, what)
            else:
                again, num_refused, fault = self._settle(chunk, part, answer)
                num_rejected += num_refused
                waiting = again + rest
                if len(again) < len(part):  # something went in: it is slow, not stuck
                    patience = self._index.cluster.new_patience()
                if fault is not None:
                    await patience.wait(fault, what)
        return num_rejected

    async def _bulk(self, chunk: Chunk, places: Sequence[int]) -> Any | Fault | None:
        """The answer; None when the request was too large."""
        cluster, index = self._index.cluster, self._index.name
        lines: list[Any] = []
        for place in places:
            lines += [json.dumps({"create": {"_id": chunk.ids[place]}}).encode(), chunk.lines[place]]

        async def request() -> Any:
            try:
                return await cluster.client.bulk(index=index, operations=lines)
            except ApiError as error:
                if error.status_code == _TOO_LARGE:
                    return None
                raise

        answer = await cluster.try_once(request)
        if answer is None or isinstance(answer, Fault):
            return answer
        if len(answer["items"]) != len(places):
            raise cluster.failed(f"{index}: bulk request", f"{len(answer['items'])} answers to {len(places)} passages")
        return answer

    def _settle(self, chunk: Chunk, places: Sequence[int], answer: Any) -> tuple[list[int], int, Fault | None]:
        """Which are to be sent again, how many were refused, and why the former failed."""
        again: list[int] = []
        num_refused = 0
        last_fault = None
        for place, item in zip(places, answer["items"], strict=True):
            (result,) = item.values()
            status = int(result["status"])
            if status < 300:
                self.num_created += 1
            elif status == _CONFLICT:
                self.num_found += 1
            elif status == _BAD_DOCUMENT:
                reason = self._index.cluster.fault_of_item(status, result).cause
                num_refused += self._reject(chunk, place, reason)
            else:
                # Whatever is not about this document (no such index, forbidden) would refuse all others, too.
                again.append(place)
                last_fault = self._index.cluster.fault_of_item(status, result)
        return again, num_refused, last_fault

    def _reject(self, chunk: Chunk, place: int, reason: str) -> int:
        self._rejects.add(row=chunk.first + place, id=chunk.ids[place], reason=reason)
        self.rejected_ids.add(chunk.ids[place])
        return 1

    async def _note_now_and_then(self) -> None:
        noted = self._watermark.num_done
        while True:
            await asyncio.sleep(self._settings.marker_interval_s)
            if noted != self._watermark.num_done:
                noted = self._watermark.num_done
                await self._index.write_marker(self.marker)


def pack(
    first: int, rows: Sequence[CorpusRow], vectors: Sequence[Sequence[float] | None], max_bytes: int
) -> Iterator[Chunk]:
    """Neighbours, of which the first is the corpus's ``first``-th, in chunks; a row that is too long goes alone."""
    chunk = Chunk(first)
    for row, vector in zip(rows, vectors, strict=True):
        line = _source(row, vector)
        if chunk.ids and chunk.num_bytes + len(line) > max_bytes:
            yield chunk
            chunk = Chunk(chunk.first + len(chunk.ids))
        chunk.ids.append(row.id)
        chunk.lines.append(line)
        chunk.num_bytes += len(line)
    yield chunk


def _source(row: CorpusRow, vector: Sequence[float] | None) -> bytes:
    title, text = row.title_and_text()
    source: dict[str, Any] = {"contents": row.contents, "title": title, "text": text}
    if vector is not None:
        source["vector"] = vector
    return json.dumps(source, ensure_ascii=False).encode()
