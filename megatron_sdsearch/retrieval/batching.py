"""Queries of many coroutines, asked of a remote engine in few requests, through whatever can go wrong on the way.

Owns the queue, the batching window, how many requests are open at one time, retries, deadlines and the circuit
breaker. It knows no engine: how one request is made, and what its answer means, is the ``Send`` that it is given
(``elastic.py``, ``http.py``)::

    async def send(queries: Sequence[str], top_k: int) -> Sequence[Sequence[Passage] | Fault] | Fault: ...

    searches = BatchedSearches(send, settings, engine="http://10.0.0.7:9200")
    passages = await searches.search("who wrote it", top_k=3)   # () means: nothing matched; a failure always raises
    await searches.close()

- A batch leaves when it is full or its oldest query has waited ``batch_window_s``; all its queries have one ``top_k``.
- Open requests are limited by AIMD: an overloaded engine halves the limit, answers raise it again, one by one.
- Only a retryable fault is tried again, and only for the queries that it hit, after exponential backoff with jitter.
  When requests fail as a whole, their queries go on in ever smaller batches: one query that an engine cannot bear ends
  alone, not with its neighbours.
- After ``open_after`` requests in a row without one answered query the breaker opens: queries wait, none fails, and one
  of them at a time probes the engine. An answer closes it; after ``down_timeout_s`` without any, all that wait raise
  ``RetrievalDownError``, which ends the run, and further queries fail at once but for those that probe.
- A caller that is cancelled takes its query along, and a request that nobody waits for any more is cancelled.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import asdict, dataclass
from typing import Protocol, Self, runtime_checkable

from megatron_sdsearch.config import ElasticsearchConfig, RetrieveServerConfig
from megatron_sdsearch.errors import RetrievalDownError, RetrievalError
from megatron_sdsearch.records import Passage

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault:
    """Why a query, or a whole request, was not answered.

    Attributes:
        cause: for a person; holds no secret.
        is_retryable: the same query may be answered later.
        is_overload: the engine wants fewer requests (429, 503, a timeout).
        retry_after_s: the engine's own wish.
    """

    cause: str
    is_retryable: bool
    is_overload: bool = False
    retry_after_s: float | None = None


Outcome = Sequence[Passage] | Fault
Send = Callable[[Sequence[str], int], Awaitable[Sequence[Outcome] | Fault]]
"""(queries, top_k) -> one outcome for each, or one fault for the whole request. What it raises is a bug, and raised."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchSettings:
    """How to batch and how to persist; seconds throughout.

    Attributes:
        timeout_s: of one request.
        deadline_s: of one query, waiting and retries included, but not the time that the breaker is open.
        max_attempts: of one query.
        down_timeout_s: so long without any answer, while asked, is the end.
        max_requests: open at one time.
        batch_queries: in one request.
        batch_window_s: a query waits so long for company.
        backoff_s: before the second attempt, doubled for each further one; the last half of it is random.
        max_backoff_s: the longest.
        open_after: requests in a row without one answered query open the breaker.
        probe_s: before the first probe, doubled for each further one up to ``max_probe_s``.
        max_probe_s: between two probes.
    """

    timeout_s: float
    deadline_s: float
    max_attempts: int
    down_timeout_s: float
    max_requests: int
    batch_queries: int
    batch_window_s: float
    backoff_s: float = 0.2
    max_backoff_s: float = 10.0
    open_after: int = 5
    probe_s: float = 0.5
    max_probe_s: float = 5.0

    @classmethod
    def of(cls, config: ElasticsearchConfig | RetrieveServerConfig) -> Self:
        """The settings of a section; a query may take as long as all its attempts."""
        return cls(
            timeout_s=config.timeout_s,
            deadline_s=config.timeout_s * config.max_attempts,
            max_attempts=config.max_attempts,
            down_timeout_s=config.down_timeout_s,
            max_requests=config.max_requests,
            batch_queries=config.batch_queries,
            batch_window_s=config.batch_window_ms / 1000,
        )


@dataclass(slots=True, kw_only=True)
class SearchCounts:
    """What happened since the last ``take_counts``.

    Attributes:
        num_queries: asked by callers.
        num_requests: sent.
        num_retries: queries sent again.
        num_overloads: requests that the engine was too busy for.
        num_failures: queries that raised.
        num_outages: times that the breaker opened.
    """

    num_queries: int = 0
    num_requests: int = 0
    num_retries: int = 0
    num_overloads: int = 0
    num_failures: int = 0
    num_outages: int = 0

    def to_dict(self) -> dict[str, int]:
        """By name."""
        return asdict(self)


@runtime_checkable
class CountsSearches(Protocol):
    """An engine whose searches go through ``BatchedSearches``."""

    def take_counts(self) -> SearchCounts:
        """What happened since the last call."""
        ...


class RequestLimit:
    """How many requests may be open: additive increase, multiplicative decrease.

    Attributes:
        value: at least 1; its whole part counts.
    """

    def __init__(self, maximum: int) -> None:
        self._maximum = maximum
        self.value = float(maximum)
        self._lowered_at = float("-inf")

    def raise_(self) -> None:
        """A request was answered: one more after as many answers as there may be requests."""
        self.value = min(float(self._maximum), self.value + 1 / self.value)

    def lower(self, sent_at: float, now: float) -> None:
        """A request met an overloaded engine: half as many.

        Those that were under way already when the limit was last lowered say nothing new.
        """
        if sent_at > self._lowered_at:
            self.value = max(1.0, self.value / 2)
            self._lowered_at = now


class Breaker:
    """Counts requests without one answered query, and says when the engine is to be left alone.

    Attributes:
        failing_since: of the row of failures; None when the last request was answered.
        probe_at: while open, when the next probe is due.
    """

    def __init__(self, settings: BatchSettings) -> None:
        self._settings = settings
        self._num_failures = 0
        self._num_probes = 0
        self.is_open = False
        self.failing_since: float | None = None
        self.probe_at = 0.0

    def is_down(self, now: float) -> bool:
        """Nothing was answered for ``down_timeout_s``."""
        return self.failing_since is not None and now - self.failing_since >= self._settings.down_timeout_s

    def succeed(self) -> None:
        """A query was answered."""
        self.is_open, self.failing_since = False, None
        self._num_failures = self._num_probes = 0

    def fail(self, now: float) -> bool:
        """A request ended without one answer; True when this opens the breaker."""
        if self.failing_since is None:
            self.failing_since = now
        self._num_failures += 1
        opens = not self.is_open and self._num_failures >= self._settings.open_after
        self.is_open |= opens
        if self.is_open:
            wait = min(self._settings.max_probe_s, self._settings.probe_s * 2**self._num_probes)
            self.probe_at = now + wait * random.uniform(0.5, 1.0)
            self._num_probes = min(self._num_probes + 1, 30)
        return opens

    def rest(self, now: float) -> None:
        """Nobody asks any more: the time until somebody does is not the engine's."""
        if not self.is_down(now):
            self.failing_since = None


@dataclass(slots=True, kw_only=True, eq=False)
class _Query:
    """One caller's, until its future is done."""

    text: str
    top_k: int
    future: asyncio.Future[Sequence[Passage]]
    queued_at: float
    deadline: asyncio.TimerHandle | None = None
    num_attempts: int = 0
    num_charged: int = 0  # attempts that count against the maximum: those during an outage do not
    num_lost_requests: int = 0
    last_cause: str = ""

    def failure(self, engine: str, cause: str) -> RetrievalError:
        shown = repr(self.text if len(self.text) <= 200 else self.text[:200] + "...")
        times = f"{self.num_attempts} attempt{'s' * (self.num_attempts != 1)}"
        return RetrievalError(
            f"{engine}: search for {shown} failed after {times}: {cause}",
            query=self.text,
            num_attempts=self.num_attempts,
            cause=cause,
        )


class BatchedSearches:
    """See the module's docstring. Lives on one event loop; nothing runs while nobody asks.

    Args:
        send: makes one request.
        settings: see ``BatchSettings``.
        engine: names it in errors, e.g. its address.
    """

    def __init__(self, send: Send, settings: BatchSettings, *, engine: str) -> None:
        self._send = send
        self._settings = settings
        self._engine = engine
        self._queue: deque[_Query] = deque()
        self._unanswered: set[_Query] = set()
        self._requests: dict[asyncio.Task[None], list[_Query]] = {}
        self._limit = RequestLimit(settings.max_requests)
        self._breaker = Breaker(settings)
        self._last_cause = ""
        self._wake_up: asyncio.TimerHandle | None = None
        self._end: asyncio.TimerHandle | None = None
        self._counts = SearchCounts()
        self._is_closed = False

    @property
    def request_limit(self) -> int:
        """Requests that may be open now."""
        return int(self._limit.value)

    @property
    def is_open(self) -> bool:
        """Whether the breaker is."""
        return self._breaker.is_open

    def take_counts(self) -> SearchCounts:
        """What happened since the last call."""
        counts, self._counts = self._counts, SearchCounts()
        return counts

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Passages of one query, best first; empty when nothing matched.

        Raises:
            RetrievalError: it was not answered: with cause, query and number of attempts.
            RetrievalDownError: nothing at all was answered for ``down_timeout_s``.
        """
        if self._is_closed:
            raise RetrievalError(f"{self._engine}: closed", query=query)
        loop = asyncio.get_running_loop()
        now = loop.time()
        self._counts.num_queries += 1
        if self._breaker.is_down(now) and now < self._breaker.probe_at:
            self._counts.num_failures += 1
            raise self._down()
        item = _Query(text=query, top_k=top_k, future=loop.create_future(), queued_at=now)
        item.deadline = loop.call_later(self._settings.deadline_s, self._expire, item)
        self._unanswered.add(item)
        self._queue.append(item)
        self._pump()
        try:
            return await item.future
        except RetrievalError:
            self._counts.num_failures += 1
            raise
        finally:
            self._forget(item)

    async def close(self) -> None:
        """Queries that still wait raise RetrievalError; returns when every request has ended."""
        self._is_closed = True
        for item in list(self._unanswered):
            self._fail(item, "closed meanwhile")
        self._set_end(None)
        if self._wake_up is not None:
            self._wake_up.cancel()
        requests = list(self._requests)
        for request in requests:
            request.cancel()
        await asyncio.gather(*requests, return_exceptions=True)

    def _forget(self, item: _Query) -> None:
        """The caller has its answer, or has left."""
        if item.deadline is not None:
            item.deadline.cancel()
        if not item.future.cancelled():
            item.future.exception()  # seen, even where the caller was cancelled at the very time
        self._unanswered.discard(item)
        for request, batch in self._requests.items():
            if item in batch and all(other.future.done() for other in batch):
                request.cancel()
        if not self._unanswered:
            self._queue.clear()
            self._breaker.rest(asyncio.get_running_loop().time())
            self._set_end(None)

    def _pump(self) -> None:
        """Send whatever may leave now, and wake up again when more may."""
        if self._wake_up is not None:
            self._wake_up.cancel()
            self._wake_up = None
        now = asyncio.get_running_loop().time()
        while not self._is_closed:
            while self._queue and self._queue[0].future.done():
                self._queue.popleft()
            due = self._due(now)
            if due is None:
                return
            if due > now:
                self._wake_up = asyncio.get_running_loop().call_at(due, self._pump)
                return
            batch = self._take_batch()
            self._requests[asyncio.create_task(self._request(batch))] = batch
            self._counts.num_requests += 1

    def _due(self, now: float) -> float | None:
        """When the next batch may leave; None when only the end of a request, or a new query, can bring that about."""
        if not self._queue or len(self._requests) >= (1 if self._breaker.is_open else self.request_limit):
            return None
        if self._breaker.is_open:
            return self._breaker.probe_at
        is_full = len(self._queue) >= self._settings.batch_queries
        return now if is_full else self._queue[0].queued_at + self._settings.batch_window_s

    def _take_batch(self) -> list[_Query]:
        """From the head of the queue: one query as a probe, otherwise as many as fit together."""
        batch: list[_Query] = []
        passed_over: list[_Query] = []
        room = 1 if self._breaker.is_open else self._settings.batch_queries
        while self._queue and len(batch) < room:
            item = self._queue.popleft()
            if item.future.done():
                continue
            room_beside = max(1, self._settings.batch_queries >> (2 * item.num_lost_requests))
            if batch and (item.top_k != batch[0].top_k or len(batch) >= room_beside):
                passed_over.append(item)
                continue
            batch.append(item)
            room = min(room, room_beside)
        self._queue.extendleft(reversed(passed_over))
        return batch

    async def _request(self, batch: list[_Query]) -> None:
        """One request from beginning to end; its queries are answered, failed or queued again."""
        loop = asyncio.get_running_loop()
        sent_at = loop.time()
        for item in batch:
            item.num_attempts += 1
            self._counts.num_retries += item.num_attempts > 1
        try:
            outcomes = await self._outcomes(batch)
        except Exception as error:  # noqa: BLE001  # a bug in send: whoever waits shall see it
            for item in batch:
                if not item.future.done():
                    item.future.set_exception(error)
        else:
            self._learn(outcomes, sent_at)
            for item, outcome in zip(batch, outcomes, strict=True):
                self._settle(item, outcome)
        finally:
            task = asyncio.current_task()
            assert task is not None  # this coroutine only runs as one
            del self._requests[task]
            if not self._is_closed:
                self._pump()

    async def _outcomes(self, batch: Sequence[_Query]) -> Sequence[Outcome]:
        try:
            async with asyncio.timeout(self._settings.timeout_s):
                outcomes = await self._send([item.text for item in batch], batch[0].top_k)
        except TimeoutError:
            cause = f"no answer within {self._settings.timeout_s:g} s"
            outcomes = Fault(cause=cause, is_retryable=True, is_overload=True)
        if not isinstance(outcomes, Fault):
            if len(outcomes) != len(batch):
                raise ValueError(f"{self._engine}: {len(outcomes)} outcomes for {len(batch)} queries")
            return outcomes
        for item in batch:
            item.num_lost_requests += 1
        return [outcomes] * len(batch)

    def _learn(self, outcomes: Sequence[Outcome], sent_at: float) -> None:
        """What a request says about the engine. A refusal is an answer, too: whoever refuses is not down."""
        now = asyncio.get_running_loop().time()
        faults = [outcome for outcome in outcomes if isinstance(outcome, Fault)]
        if any(fault.is_overload for fault in faults):
            self._counts.num_overloads += 1
            self._limit.lower(sent_at, now)
        elif len(faults) < len(outcomes):
            self._limit.raise_()
        if len(faults) < len(outcomes) or any(not fault.is_retryable for fault in faults):
            if self._breaker.is_open:
                _log.warning("%s: answers again", self._engine)
            self._breaker.succeed()
            self._set_end(None)
            return
        self._last_cause = faults[0].cause
        if self._breaker.fail(now):
            self._counts.num_outages += 1
            _log.warning("%s: does not answer, searches wait: %s", self._engine, self._last_cause)
        self._set_end(self._breaker.failing_since)

    def _set_end(self, failing_since: float | None) -> None:
        """When all that wait hear that the engine is down."""
        if self._end is not None:
            self._end.cancel()
            self._end = None
        if failing_since is not None:
            end = failing_since + self._settings.down_timeout_s
            self._end = asyncio.get_running_loop().call_at(end, self._give_up)

    def _give_up(self) -> None:
        for item in self._unanswered:
            if not item.future.done():
                item.future.set_exception(self._down())

    def _settle(self, item: _Query, outcome: Outcome) -> None:
        if item.future.done():
            return
        if not isinstance(outcome, Fault):
            item.future.set_result(outcome)
            return
        item.last_cause = outcome.cause
        item.num_charged += not self._breaker.is_open
        if not outcome.is_retryable or item.num_charged >= self._settings.max_attempts:
            self._fail(item, outcome.cause)
            return
        if self._breaker.is_open:  # behind the others: the next probe is another query
            self._enqueue(item)
            return
        wait = min(self._settings.max_backoff_s, self._settings.backoff_s * 2 ** (item.num_charged - 1))
        wait = max(wait * random.uniform(0.5, 1.0), min(outcome.retry_after_s or 0.0, self._settings.max_backoff_s))
        asyncio.get_running_loop().call_later(wait, self._enqueue, item)

    def _enqueue(self, item: _Query) -> None:
        if item.future.done():
            return
        item.queued_at = asyncio.get_running_loop().time()
        self._queue.append(item)
        self._pump()

    def _expire(self, item: _Query) -> None:
        """The deadline of one query; an outage has an end of its own."""
        if self._breaker.is_open:
            item.deadline = asyncio.get_running_loop().call_later(1.0, self._expire, item)
            return
        cause = f"no answer within {self._settings.deadline_s:g} s"
        self._fail(item, f"{cause}; last: {item.last_cause}" if item.last_cause else cause)

    def _fail(self, item: _Query, cause: str) -> None:
        if not item.future.done():
            item.future.set_exception(item.failure(self._engine, cause))

    def _down(self) -> RetrievalDownError:
        return RetrievalDownError(
            f"{self._engine}: nothing was answered for {self._settings.down_timeout_s:g} s "
            f"(retrieval.*.down_timeout_s); last: {self._last_cause}",
            cause=self._last_cause,
        )
