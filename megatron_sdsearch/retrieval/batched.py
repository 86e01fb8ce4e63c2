"""A remote search engine, asked by many coroutines in few requests and through failures that pass.

Owns batches, the number of open requests, retries and outages, for every remote engine. An engine is a
``SearchBackend``, which answers one batch and says what a failure means (``elasticsearch.py``, ``http.py``)::

    retriever = BatchedRetriever(await ElasticsearchBackend.open(config), config)
    passages = await retriever.search("author of the lusiads", top_k=3)   # (): nothing matched; a failure raises
    await retriever.close()

- A batch leaves when it is full, or ``batch_window_ms`` after its first query, as soon as one of ``max_requests`` slots
  is free. All its queries have one ``top_k``.
- Only a failure that may pass is retried, and only for the queries that it hit, after an exponential backoff.
- After five requests in a row without one answered query there is an outage: queries wait, and one of them at a time is
  sent to see whether the engine is back. Attempts during an outage do not count. ``down_timeout_s`` after the first
  failure all queries raise ``RetrievalDownError``, which ends the run (ADR 0006).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from dataclasses import KW_ONLY, dataclass, field
from typing import Protocol, TypeVar

from megatron_sdsearch.config import RemoteSearchConfig
from megatron_sdsearch.errors import RetrievalDownError, RetrievalError
from megatron_sdsearch.records import Passage

_log = logging.getLogger(__name__)

T = TypeVar("T")

FIRST_BACKOFF_S, LONGEST_BACKOFF_S = 0.2, 10.0
_REQUESTS_OF_AN_OUTAGE = 5
"""So many in a row without an answered query."""
_SHOWN_QUERY = 200  # characters


@dataclass(eq=False)
class SearchError(Exception):
    """A query, or a whole request, was not answered.

    Attributes:
        cause: for a person; holds no secret.
        is_retryable: the same request may be answered later.
        retry_after_s: the wait that the engine has asked for.
        setting: the setting at fault, without its section; empty when none is, or it is not known.
        fix: what to do about it.
    """

    cause: str
    _: KW_ONLY
    is_retryable: bool
    retry_after_s: float | None = None
    setting: str = ""
    fix: str = ""

    def __str__(self) -> str:
        """Cause and fix."""
        return f"{self.cause}; {self.fix}" if self.fix else self.cause


Outcome = Sequence[Passage] | SearchError


class SearchBackend(Protocol):
    """One engine: how a batch is sent, and what its answer means.

    Attributes:
        name: address and index, for messages.
        fingerprint: see ``Retriever``.
        num_passages: in the index; None when that is not known.
        version_warning: what is doubtful about the engine's version; empty when nothing is.
    """

    name: str
    fingerprint: str
    num_passages: int | None
    version_warning: str

    async def search_batch(self, queries: Sequence[str], top_k: int) -> Sequence[Outcome]:
        """Send one request; one outcome per query, in their order. Any other exception is a bug, and is passed on.

        Raises:
            SearchError: no query was answered.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


COUNTS = ("num_queries", "num_requests", "num_retries", "num_failures", "num_outages")
"""Queries asked by callers, requests sent, queries sent again, queries that raised, and outages that began."""


def backoff_s(attempt: int, retry_after_s: float | None = None) -> float:
    """Seconds to wait after the ``attempt``-th failure, counted from 1: doubled each time, half of it random."""
    wait = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 30))
    return max(wait * random.uniform(0.5, 1.0), min(retry_after_s or 0.0, LONGEST_BACKOFF_S))


async def retry(request: Callable[[], Awaitable[T]], *, max_attempts: float = math.inf, limit_s: float = math.inf) -> T:
    """Send a request again while its failure is one that passes.

    Raises:
        SearchError: the last one: it is final, or attempts or seconds are spent.
    """
    ends_at, attempt = asyncio.get_running_loop().time() + limit_s, 0
    while True:
        attempt += 1
        try:
            return await request()
        except SearchError as failure:
            is_over = attempt >= max_attempts or asyncio.get_running_loop().time() > ends_at
            if failure.setting or not failure.is_retryable or is_over:
                raise
            wait = backoff_s(attempt, failure.retry_after_s)
        await asyncio.sleep(wait)


@dataclass(slots=True, eq=False)
class _Batch:
    """Queries that leave together."""

    queries: list[str] = field(default_factory=list)
    outcomes: list[asyncio.Future[Outcome | None]] = field(default_factory=list)
    is_full: asyncio.Event = field(default_factory=asyncio.Event)


class BatchedRetriever:
    """A ``Retriever`` over a backend; see the module. Lives on one event loop; nothing runs while no query waits.

    Args:
        backend: belongs to the retriever from now on: ``close`` closes it.
        config: the engine's section.
    """

    def __init__(self, backend: SearchBackend, config: RemoteSearchConfig) -> None:
        self.backend = backend
        self.fingerprint = backend.fingerprint
        self.num_passages = backend.num_passages
        self.version_warning = backend.version_warning
        self._config = config
        self._slots = asyncio.Semaphore(config.max_requests)
        self._open_batches: dict[int, _Batch] = {}  # by top_k
        self._requests: set[asyncio.Task[None]] = set()
        self._searches: set[asyncio.Task[Sequence[Passage]]] = set()
        self._counts = dict.fromkeys(COUNTS, 0)
        self._is_closed = False
        self.is_in_outage = False
        self._probe_turn = asyncio.Lock()  # first come, first served: each probe is another query
        self._num_lost_requests = 0  # in a row
        self._num_probes = 0  # of this outage
        self._failing_since: float | None = None
        self._last_cause = ""

    def take_counts(self) -> dict[str, int]:
        """What happened since the last call, by the names of ``COUNTS``."""
        counts, self._counts = self._counts, dict.fromkeys(COUNTS, 0)
        return counts

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Best passages first. A query of white space alone matches nothing, and is not sent.

        Raises:
            RetrievalError: the query was not answered: with cause, query and number of attempts.
            RetrievalDownError: nothing at all was answered for ``down_timeout_s``.
            ValueError: ``top_k`` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        if self._is_closed:
            raise RetrievalError(f"{self.backend.name}: closed", query=query)
        if not query.strip():
            return ()
        self._counts["num_queries"] += 1
        # Half a surrogate pair has no UTF-8: it would spoil the whole batch's body.
        search = asyncio.create_task(self._answer(query.encode("utf-8", "replace").decode(), top_k))
        self._searches.add(search)
        try:
            return await search
        except RetrievalError:
            self._counts["num_failures"] += 1
            raise
        except asyncio.CancelledError:
            if self._is_closed:
                raise RetrievalError(f"{self.backend.name}: closed meanwhile", query=query) from None
            raise
        finally:
            self._searches.discard(search)
            if not self._searches:
                self._become_idle()

    async def close(self) -> None:
        """Queries that still wait raise RetrievalError; returns when every request has ended."""
        self._is_closed = True
        tasks = [*self._searches, *self._requests]
        for task in tasks:
            task.cancel()
        try:
            await asyncio.gather(*tasks, return_exceptions=True)
        finally:
            await self.backend.close()

    async def _answer(self, query: str, top_k: int) -> Sequence[Passage]:
        num_attempts = num_counted = 0
        while True:
            outcome = await (self._probe(query, top_k) if self.is_in_outage else self._join_batch(query, top_k))
            if outcome is None:
                continue  # not sent: an outage has begun, or ended
            num_attempts += 1
            self._counts["num_retries"] += num_attempts > 1
            if not isinstance(outcome, SearchError):
                return outcome
            num_counted += not self.is_in_outage
            if not outcome.is_retryable or num_counted >= self._config.max_attempts:
                shown = repr(query if len(query) <= _SHOWN_QUERY else query[:_SHOWN_QUERY] + "...")
                times = f"{num_attempts} attempt{'s' * (num_attempts != 1)}"
                raise RetrievalError(
                    f"{self.backend.name}: search for {shown} failed after {times}: {outcome}",
                    query=query,
                    num_attempts=num_attempts,
                    cause=str(outcome),
                )
            if not self.is_in_outage:
                await asyncio.sleep(backoff_s(num_counted, outcome.retry_after_s))

    async def _join_batch(self, query: str, top_k: int) -> Outcome | None:
        """The outcome of a query that leaves with others; None when it was not sent, for an outage has begun."""
        batch = self._open_batches.get(top_k)
        if batch is None:
            batch = self._open_batches[top_k] = _Batch()
            request = asyncio.create_task(self._send(batch, top_k))
            self._requests.add(request)
            request.add_done_callback(self._requests.discard)
        outcome: asyncio.Future[Outcome | None] = asyncio.get_running_loop().create_future()
        batch.queries.append(query)
        batch.outcomes.append(outcome)
        if len(batch.queries) >= self._config.batch_queries:
            batch.is_full.set()
            del self._open_batches[top_k]
        return await outcome

    async def _send(self, batch: _Batch, top_k: int) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(self._config.batch_window_ms / 1000):
                await batch.is_full.wait()
        async with self._slots:
            if self._open_batches.get(top_k) is batch:  # has taken more queries while it waited for a slot
                del self._open_batches[top_k]
            # A caller that was cancelled took its query along.
            asked = [(q, o) for q, o in zip(batch.queries, batch.outcomes, strict=True) if not o.done()]
            outcomes: Sequence[Outcome | None] = [None] * len(asked)
            try:
                if asked and not self.is_in_outage:
                    outcomes = await self._request([query for query, _ in asked], top_k)
            except Exception as error:  # noqa: BLE001  # a bug of the backend: every caller shall see it
                for _, future in asked:
                    if not future.done():
                        future.set_exception(error)
                return
        for (_, future), outcome in zip(asked, outcomes, strict=True):
            if not future.done():
                future.set_result(outcome)

    async def _probe(self, query: str, top_k: int) -> Outcome | None:
        """The outcome of a query that is sent alone, when its turn comes; None when the outage has ended before."""
        async with self._probe_turn:
            if not self.is_in_outage:
                return None
            now = asyncio.get_running_loop().time()
            self._failing_since = now if self._failing_since is None else self._failing_since
            remaining_s = self._failing_since + self._config.down_timeout_s - now
            if remaining_s <= 0:
                raise RetrievalDownError(
                    f"{self.backend.name}: nothing was answered for {self._config.down_timeout_s:g} s "
                    f"(retrieval.*.down_timeout_s); last: {self._last_cause}",
                    cause=self._last_cause,
                )
            self._num_probes += 1
            await asyncio.sleep(min(remaining_s, backoff_s(self._num_probes)))
            (outcome,) = await self._request([query], top_k)
            return outcome

    async def _request(self, queries: Sequence[str], top_k: int) -> Sequence[Outcome]:
        """Send one request, and learn from its outcomes whether the engine is there."""
        self._counts["num_requests"] += 1
        outcomes: Sequence[Outcome]
        try:
            async with asyncio.timeout(self._config.timeout_s):
                outcomes = await self.backend.search_batch(queries, top_k)
        except TimeoutError:
            cause = f"no answer within {self._config.timeout_s:g} s"
            outcomes = [SearchError(cause, is_retryable=True)] * len(queries)
        except SearchError as failure:
            outcomes = [failure] * len(queries)
        if len(outcomes) != len(queries):
            raise ValueError(f"{self.backend.name}: {len(outcomes)} outcomes for {len(queries)} queries")
        lost = [each for each in outcomes if isinstance(each, SearchError) and each.is_retryable]
        if len(lost) < len(outcomes):  # a refusal is an answer, too: the engine is there
            if self.is_in_outage:
                _log.warning("%s: answers again", self.backend.name)
            self.is_in_outage, self._failing_since, self._num_lost_requests = False, None, 0
            return outcomes
        self._last_cause = str(lost[0])
        self._num_lost_requests += 1
        if self._failing_since is None:
            self._failing_since = asyncio.get_running_loop().time()
        if not self.is_in_outage and self._num_lost_requests >= _REQUESTS_OF_AN_OUTAGE:
            self.is_in_outage, self._num_probes = True, 0
            self._counts["num_outages"] += 1
            _log.warning("%s: does not answer, searches wait: %s", self.backend.name, self._last_cause)
        return outcomes

    def _become_idle(self) -> None:
        """No query waits: end the requests, and do not count the time until the next query as the engine's."""
        for request in self._requests:
            request.cancel()
        self._open_batches.clear()
        now = asyncio.get_running_loop().time()
        if self._failing_since is not None and now - self._failing_since < self._config.down_timeout_s:
            self._failing_since = None
