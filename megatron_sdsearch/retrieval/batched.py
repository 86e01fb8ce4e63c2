"""Retriever for remote engines: batches the queries of many coroutines, retries requests and waits out outages.

Owns batching, the limit on open requests, retries and outages, for every remote engine. An engine is a
``SearchBackend``, which sends one batch and classifies failures (``elasticsearch.py``, ``http.py``)::

    retriever = BatchedRetriever(await ElasticsearchBackend.open(config), config)
    passages = await retriever.search("author of the lusiads", top_k=3)   # (): nothing matched; failures raise
    await retriever.close()

- A batch is sent when it is full, or ``batch_window_ms`` after its first query, once one of ``max_requests`` slots is
  free. All its queries have the same ``top_k``.
- Only transient failures are retried, only for the queries affected, with exponential backoff.
- An outage begins after five consecutive requests without an answered query: queries wait, and one at a time is sent as
  a probe. Attempts during an outage do not count towards ``max_attempts``. ``down_timeout_s`` after the first failure
  all queries raise ``RetrievalDownError``, which ends the run (ADR 0006).
"""

from __future__ import annotations

import asyncio
import logging
import math
import random
import re
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
"""Consecutive requests without an answered query that begin an outage."""


@dataclass(eq=False)
class SearchError(Exception):
    """A query, or a whole request, failed.

    Attributes:
        cause: readable description, without secrets.
        is_retryable: the same request may succeed later.
        retry_after_s: the wait requested by the engine.
        setting: the setting at fault, without its section; empty if none is known.
        fix: what to do about it.
    """

    cause: str
    _: KW_ONLY
    is_retryable: bool
    retry_after_s: float | None = None
    setting: str = ""
    fix: str = ""

    def __str__(self) -> str:
        """Return cause and fix."""
        return f"{self.cause}; {self.fix}" if self.fix else self.cause


Outcome = Sequence[Passage] | SearchError


class SearchBackend(Protocol):
    """Sends batches to one engine and interprets the responses.

    Attributes:
        name: address and index, for messages.
        fingerprint: see ``Retriever``.
        num_passages: size of the index; None if unknown.
        version_warning: a warning about the engine's version; empty if there is none.
    """

    name: str
    fingerprint: str
    num_passages: int | None
    version_warning: str

    async def search_batch(self, queries: Sequence[str], top_k: int) -> Sequence[Outcome]:
        """Send one request and return one outcome per query, in order. Any other exception is a bug.

        Raises:
            SearchError: the whole request failed.
        """
        ...

    async def close(self) -> None:
        """Close connections."""
        ...


COUNTS = ("num_queries", "num_requests", "num_retries", "num_failures", "num_outages")
"""Calls of ``search``, requests sent, queries sent again, searches that raised, and outages that began."""


def parse_retry_after(header: str | None) -> float | None:
    """Read a ``Retry-After`` header in seconds; a date is ignored."""
    return float(header) if header and re.fullmatch(r"\d+(\.\d+)?", header) else None


def backoff_s(attempt: int, retry_after_s: float | None = None) -> float:
    """Return the seconds to wait after the ``attempt``-th failure (from 1): doubled each time, half of it random."""
    wait = min(LONGEST_BACKOFF_S, FIRST_BACKOFF_S * 2.0 ** min(attempt - 1, 30))
    return max(wait * random.uniform(0.5, 1.0), min(retry_after_s or 0.0, LONGEST_BACKOFF_S))


async def retry(request: Callable[[], Awaitable[T]], *, max_attempts: float = math.inf, limit_s: float = math.inf) -> T:
    """Send a request until it succeeds, retrying transient failures.

    Raises:
        SearchError: the last failure is permanent, or the attempts or seconds are used up.
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
    """Queries sent in one request."""

    queries: list[str] = field(default_factory=list)
    outcomes: list[asyncio.Future[Outcome | None]] = field(default_factory=list)
    is_full: asyncio.Event = field(default_factory=asyncio.Event)


class BatchedRetriever:
    """A ``Retriever`` over a backend; see the module. Bound to one event loop; runs no task while no query waits.

    Args:
        backend: owned by the retriever: ``close`` closes it.
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
        self._probe_turn = asyncio.Lock()  # fair: each probe is a different query
        self._num_lost_requests = 0  # consecutive
        self._num_probes = 0  # of this outage
        self._failing_since: float | None = None
        self._last_cause = ""

    def take_counts(self) -> dict[str, int]:
        """Return the ``COUNTS`` since the last call, and reset them."""
        counts, self._counts = self._counts, dict.fromkeys(COUNTS, 0)
        return counts

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Return passages, best first. A blank query matches nothing and is not sent.

        Raises:
            RetrievalError: the query failed; has cause, query and number of attempts.
            RetrievalDownError: no query was answered for ``down_timeout_s``.
            ValueError: ``top_k`` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        if self._is_closed:
            raise RetrievalError(f"{self.backend.name}: closed", query=query)
        if not query.strip():
            return ()
        self._counts["num_queries"] += 1
        # A lone surrogate cannot be encoded in UTF-8 and would break the request of the whole batch.
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
                for request in self._requests:
                    request.cancel()
                self._open_batches.clear()
                # Idle time does not count towards down_timeout_s.
                now = asyncio.get_running_loop().time()
                if self._failing_since is not None and now - self._failing_since < self._config.down_timeout_s:
                    self._failing_since = None

    async def close(self) -> None:
        """End all requests; queries that still wait raise RetrievalError."""
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
                continue  # not sent: an outage began or ended
            num_attempts += 1
            self._counts["num_retries"] += num_attempts > 1
            if not isinstance(outcome, SearchError):
                return outcome
            num_counted += not self.is_in_outage
            if not outcome.is_retryable or num_counted >= self._config.max_attempts:
                shown = repr(query if len(query) <= 200 else query[:200] + "...")
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
        """Return the outcome of a query sent in a batch; None if an outage began before it was sent."""
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
            if self._open_batches.get(top_k) is batch:  # it could take queries while it waited for a slot
                del self._open_batches[top_k]
            # Queries of cancelled callers are not sent.
            pending = [(q, o) for q, o in zip(batch.queries, batch.outcomes, strict=True) if not o.done()]
            outcomes: Sequence[Outcome | None] = [None] * len(pending)
            try:
                if pending and not self.is_in_outage:
                    outcomes = await self._request([query for query, _ in pending], top_k)
            except Exception as error:  # noqa: BLE001  # a bug of the backend, raised in every caller
                for _, future in pending:
                    if not future.done():
                        future.set_exception(error)
                return
        for (_, future), outcome in zip(pending, outcomes, strict=True):
            if not future.done():
                future.set_result(outcome)

    async def _probe(self, query: str, top_k: int) -> Outcome | None:
        """Send a query alone when its turn comes; None if the outage ended first."""
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
        """Send one request and track outages by its outcomes."""
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
        lost = [outcome for outcome in outcomes if isinstance(outcome, SearchError) and outcome.is_retryable]
        if len(lost) < len(outcomes):  # a permanent failure also shows that the engine is up
            if self.is_in_outage:
                _log.warning("%s: the outage is over", self.backend.name)
            self.is_in_outage, self._failing_since, self._num_lost_requests = False, None, 0
            return outcomes
        self._last_cause = str(lost[0])
        self._num_lost_requests += 1
        if self._failing_since is None:
            self._failing_since = asyncio.get_running_loop().time()
        if not self.is_in_outage and self._num_lost_requests >= _REQUESTS_OF_AN_OUTAGE:
            self.is_in_outage, self._num_probes = True, 0
            self._counts["num_outages"] += 1
            _log.warning("%s: outage, searches wait: %s", self.backend.name, self._last_cause)
        return outcomes
