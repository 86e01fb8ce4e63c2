"""The queue before a hand-written backend: what leaves together, what is tried again, and when it gives up."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Iterator, Sequence
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdsearch.config import RemoteSearchConfig
from megatron_sdsearch.errors import RetrievalDownError, RetrievalError
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval import batched
from megatron_sdsearch.retrieval.batched import BatchedRetriever, Outcome, SearchError, backoff_s, retry

BUSY = SearchError("HTTP 429", is_retryable=True)
LOST = SearchError("connection lost", is_retryable=True)
REFUSED = SearchError("HTTP 400 parse error", is_retryable=False)
Reply = Sequence[Outcome] | SearchError
Behaviour = Callable[[Sequence[str], int], Reply | Awaitable[Reply]]


@pytest.fixture(autouse=True, scope="module")
def quick_backoff() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(batched, "FIRST_BACKOFF_S", 0.002)
        patch.setattr(batched, "LONGEST_BACKOFF_S", 0.02)
        yield


def passages(query: str, top_k: int = 3) -> tuple[Passage, ...]:
    return tuple(Passage(passage_id=f"{query}/{rank}", contents=query) for rank in range(top_k))


def answer(queries: Sequence[str], top_k: int) -> Reply:
    return [passages(query, top_k) for query in queries]


class Backend:
    """A ``SearchBackend`` with a given behaviour.

    Attributes:
        requests: (queries, top_k) of each, in order.
        most_open: requests at one time.
        num_cancelled: requests that were.
        is_closed: ``close`` was called.
    """

    name = fingerprint = "fake"
    num_passages: int | None = None
    version_warning = ""

    def __init__(self, behave: Behaviour = answer, *, delay_s: float = 0.0) -> None:
        self.behave = behave
        self.delay_s = delay_s
        self.requests: list[tuple[list[str], int]] = []
        self.num_open = self.most_open = self.num_cancelled = 0
        self.is_closed = False

    async def search_batch(self, queries: Sequence[str], top_k: int) -> Sequence[Outcome]:
        self.requests.append((list(queries), top_k))
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        try:
            await asyncio.sleep(self.delay_s)
            reply = self.behave(queries, top_k)
            reply = await reply if isinstance(reply, Awaitable) else reply
        except asyncio.CancelledError:
            self.num_cancelled += 1
            raise
        finally:
            self.num_open -= 1
        if isinstance(reply, SearchError):
            raise reply
        return reply

    async def close(self) -> None:
        self.is_closed = True


def make(backend: Backend, **changes: Any) -> BatchedRetriever:
    quick: dict[str, Any] = {
        "timeout_s": 5.0,
        "max_attempts": 4,
        "down_timeout_s": 5.0,
        "max_requests": 4,
        "batch_queries": 8,
        "batch_window_ms": 20.0,
    }
    return BatchedRetriever(backend, RemoteSearchConfig(**(quick | changes)))


async def ask_all(searches: BatchedRetriever, queries: Sequence[str], top_k: int = 3) -> list[Any]:
    return await asyncio.gather(*(searches.search(q, top_k=top_k) for q in queries), return_exceptions=True)


async def never() -> Reply:
    await asyncio.get_running_loop().create_future()
    raise AssertionError


def test_a_wave_of_queries_is_one_request_and_each_gets_its_own_answer() -> None:
    backend = Backend()
    queries = [f"q{i}" for i in range(8)]
    assert asyncio.run(ask_all(make(backend), queries)) == [passages(q) for q in queries]
    assert backend.requests == [(queries, 3)]


def test_a_full_batch_does_not_wait_and_a_lone_query_waits_for_the_window_alone() -> None:
    async def run() -> None:
        backend = Backend()
        searches = make(backend, batch_window_ms=200.0)
        loop = asyncio.get_running_loop()
        start = loop.time()
        await ask_all(searches, [str(i) for i in range(8)])
        assert loop.time() - start < 0.1
        start = loop.time()
        assert await searches.search("alone", top_k=1) == passages("alone", 1)
        assert 0.19 < loop.time() - start < 1.0

    asyncio.run(run())


def test_queries_with_different_top_k_never_share_a_request() -> None:
    async def run() -> None:
        backend = Backend()
        searches = make(backend)
        found = await asyncio.gather(*(searches.search(str(i), top_k=1 + i % 2) for i in range(6)))
        assert found == [passages(str(i), 1 + i % 2) for i in range(6)]
        assert sorted(backend.requests) == [(["0", "2", "4"], 1), (["1", "3", "5"], 2)]

    asyncio.run(run())


def test_nothing_found_is_an_answer() -> None:
    assert asyncio.run(ask_all(make(Backend(lambda queries, top_k: [() for _ in queries])), ["a"])) == [()]


@settings(max_examples=25, deadline=None)
@given(
    faults=st.lists(st.sampled_from(["item", "request", "refused", "fine"]), max_size=12),
    num_queries=st.integers(1, 40),
    batch=st.integers(1, 8),
)
def test_every_query_ends_once_with_its_own_answer_or_an_error(faults: list[str], num_queries: int, batch: int) -> None:
    left = list(faults)

    def behave(queries: Sequence[str], top_k: int) -> Reply:
        kind = left.pop() if left else "fine"
        if kind == "request":
            return LOST
        fault = {"item": BUSY, "refused": REFUSED}.get(kind)
        return [passages(q) if fault is None or i % 2 else fault for i, q in enumerate(queries)]

    queries = [f"q{i}" for i in range(num_queries)]
    backend = Backend(behave)
    found = asyncio.run(ask_all(make(backend, batch_queries=batch, max_requests=2), queries))
    assert backend.most_open <= 2
    assert all(len(sent) <= batch for sent, _ in backend.requests)
    for query, outcome in zip(queries, found, strict=True):
        if isinstance(outcome, RetrievalError):
            assert outcome.query == query
            assert outcome.num_attempts >= 1
            assert outcome.cause in str(outcome)
        else:
            assert outcome == passages(query)


def test_a_half_failed_batch_repeats_its_failed_half_alone() -> None:
    failed: set[str] = set()

    def behave(queries: Sequence[str], top_k: int) -> Reply:
        first = {q for q in queries if int(q) % 2} - failed
        failed.update(first)
        return [BUSY if q in first else passages(q) for q in queries]

    backend = Backend(behave)
    searches = make(backend)
    assert asyncio.run(ask_all(searches, list("01234567"))) == [passages(q) for q in "01234567"]
    assert backend.requests[0][0] == list("01234567")
    assert sorted(q for sent, _ in backend.requests[1:] for q in sent) == list("1357")
    counts = searches.take_counts()
    assert (counts["num_queries"], counts["num_retries"], counts["num_failures"]) == (8, 4, 0)
    assert set(searches.take_counts().values()) == {0}


def test_one_refused_query_does_not_harm_its_batch_and_is_not_repeated() -> None:
    backend = Backend(lambda queries, top_k: [REFUSED if q == "bad" else passages(q) for q in queries])
    good, bad = asyncio.run(ask_all(make(backend), ["good", "bad"]))
    assert good == passages("good")
    assert isinstance(bad, RetrievalError)
    assert (bad.query, bad.num_attempts, bad.cause) == ("bad", 1, REFUSED.cause)
    assert str(bad) == "fake: search for 'bad' failed after 1 attempt: HTTP 400 parse error"
    assert len(backend.requests) == 1


def test_a_long_query_is_shortened_in_the_message_alone() -> None:
    (error,) = asyncio.run(ask_all(make(Backend(lambda queries, top_k: REFUSED)), ["x" * 10_000]))
    assert error.query == "x" * 10_000
    assert len(str(error)) < 400


def test_a_request_without_an_answer_counts_as_a_failed_attempt() -> None:
    backend = Backend(lambda queries, top_k: never() if len(backend.requests) == 1 else answer(queries, top_k))
    searches = make(backend, timeout_s=0.03)
    assert asyncio.run(ask_all(searches, ["a"])) == [passages("a")]
    assert backend.num_cancelled == 1


def test_the_wait_that_the_engine_asks_for_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(batched, "LONGEST_BACKOFF_S", 10.0)
    wish = SearchError("busy", is_retryable=True, retry_after_s=0.15)
    backend = Backend(lambda queries, top_k: wish if len(backend.requests) == 1 else answer(queries, top_k))

    async def run() -> float:
        loop = asyncio.get_running_loop()
        start = loop.time()
        await make(backend).search("a", top_k=1)
        return loop.time() - start

    assert asyncio.run(run()) >= 0.14


def test_an_outage_holds_queries_back_and_loses_none(caplog: pytest.LogCaptureFixture) -> None:
    async def run() -> None:
        is_down = True
        backend = Backend(lambda queries, top_k: LOST if is_down else answer(queries, top_k))
        searches = make(backend, max_attempts=6, batch_queries=4, max_requests=2)
        queries = [f"q{i}" for i in range(40)]
        waiting = asyncio.create_task(ask_all(searches, queries))
        while not searches.is_in_outage:
            await asyncio.sleep(0.001)
        num_before = len(backend.requests)
        await asyncio.sleep(0.2)
        probes = backend.requests[num_before + 2 :]  # after those that were under way
        assert 5 <= len(probes) <= 30
        assert all(len(sent) == 1 for sent, _ in probes)
        assert len({sent[0] for sent, _ in probes}) == len(probes), "each probe is another query"
        is_down = False
        assert await waiting == [passages(q) for q in queries]
        assert await searches.search("later", top_k=1) == passages("later", 1)
        assert searches.take_counts()["num_outages"] == 1

    with caplog.at_level(logging.WARNING):
        asyncio.run(run())
    assert "outage, searches wait: connection lost" in caplog.text
    assert "the outage is over" in caplog.text


def test_an_engine_that_stays_down_ends_everything_at_one_time_with_one_error() -> None:
    async def run() -> None:
        backend = Backend(lambda queries, top_k: LOST)
        searches = make(backend, down_timeout_s=0.2, max_requests=1, max_attempts=10)
        loop = asyncio.get_running_loop()
        start = loop.time()
        errors = await ask_all(searches, [f"q{i}" for i in range(30)])
        assert 0.19 < loop.time() - start < 0.6
        assert {type(error) for error in errors} == {RetrievalDownError}
        assert {str(error) for error in errors} == {
            "fake: nothing was answered for 0.2 s (retrieval.*.down_timeout_s); last: connection lost"
        }
        num_before = len(backend.requests)
        start = loop.time()
        (error,) = await ask_all(searches, ["again"])
        assert isinstance(error, RetrievalDownError)
        assert loop.time() - start < 0.05
        assert len(backend.requests) - num_before <= 1, "a later query does not wait for another down_timeout_s"

    asyncio.run(run())


def test_requests_that_were_under_way_do_not_put_off_the_first_probe(monkeypatch: pytest.MonkeyPatch) -> None:
    """Sixteen fail at once: an engine that is back at once is found at once."""
    monkeypatch.setattr(batched, "LONGEST_BACKOFF_S", 10.0)

    async def run() -> None:
        backend = Backend(lambda queries, top_k: LOST if len(backend.requests) <= 16 else answer(queries, top_k))
        backend.delay_s = 0.01
        searches = make(backend, max_requests=16, batch_queries=1)
        start = asyncio.get_running_loop().time()
        assert len(await ask_all(searches, [str(i) for i in range(16)])) == 16
        assert asyncio.get_running_loop().time() - start < 1.0

    asyncio.run(run())


def test_requests_that_hang_end_at_the_same_time() -> None:
    backend = Backend(lambda queries, top_k: never())
    searches = make(backend, timeout_s=0.05, down_timeout_s=0.2, max_attempts=8)
    (error,) = asyncio.run(ask_all(searches, ["a"]))
    assert isinstance(error, RetrievalDownError)
    assert "no answer within 0.05 s" in str(error)


def test_the_time_between_two_steps_is_not_the_engines() -> None:
    """A step's last query failed; the next step begins long after, and its first request fails: no outage yet."""

    async def run() -> None:
        backend = Backend(lambda queries, top_k: LOST)
        searches = make(backend, down_timeout_s=0.1, max_attempts=1)
        assert type((await ask_all(searches, ["last"]))[0]) is RetrievalError
        await asyncio.sleep(0.15)
        replies: list[Reply] = [LOST]
        backend.behave = lambda queries, top_k: replies.pop() if replies else answer(queries, top_k)
        assert [type(error) for error in await ask_all(searches, ["first", "second"])] == [RetrievalError] * 2
        assert await ask_all(searches, ["third"]) == [passages("third")]

    asyncio.run(run())


def test_a_refusal_is_no_outage() -> None:
    searches = make(Backend(lambda queries, top_k: REFUSED), batch_queries=1)
    asyncio.run(ask_all(searches, list("abcdefgh")))
    assert not searches.is_in_outage


def test_a_cancelled_caller_takes_its_query_along() -> None:
    async def run() -> None:
        backend = Backend(delay_s=0.1)
        searches = make(backend)
        tasks = [asyncio.create_task(searches.search(q, top_k=1)) for q in ("stays", "goes", "never sent")]
        await asyncio.sleep(0)
        tasks[2].cancel()
        await asyncio.sleep(0.06)
        tasks[1].cancel()
        assert await tasks[0] == passages("stays", 1)
        assert backend.requests == [(["stays", "goes"], 1)]
        assert backend.num_cancelled == 0
        assert [task.cancelled() for task in tasks] == [False, True, True]

    asyncio.run(run())


def test_a_request_without_waiting_callers_is_cancelled() -> None:
    async def run() -> None:
        backend = Backend(lambda queries, top_k: never())
        searches = make(backend, max_requests=1)
        tasks = [asyncio.create_task(searches.search(q, top_k=1)) for q in "ab"]
        await asyncio.sleep(0.06)
        for task in tasks:
            task.cancel()
        await asyncio.sleep(0.02)
        assert (backend.num_cancelled, backend.num_open) == (1, 0)
        backend.behave = answer
        assert await searches.search("c", top_k=1) == passages("c", 1)

    asyncio.run(run())


def test_close_fails_what_waits_and_ends_every_request() -> None:
    async def run() -> None:
        backend = Backend(lambda queries, top_k: never())
        searches = make(backend, max_requests=1, batch_queries=1)
        waiting = asyncio.create_task(ask_all(searches, ["under way", "queued"]))
        await asyncio.sleep(0.02)
        await searches.close()
        assert (backend.num_open, backend.is_closed) == (0, True)
        assert [type(error) for error in await waiting] == [RetrievalError] * 2
        with pytest.raises(RetrievalError, match="closed"):
            await searches.search("later", top_k=1)
        assert len(asyncio.all_tasks()) == 1

    asyncio.run(run())


@pytest.mark.parametrize("reply", [ZeroDivisionError("a bug"), []], ids=["raises", "too few outcomes"])
def test_a_bug_of_the_backend_reaches_all_callers(reply: Any) -> None:
    def behave(queries: Sequence[str], top_k: int) -> Reply:
        if isinstance(reply, Exception):
            raise reply
        return list[Outcome](reply)

    errors = asyncio.run(ask_all(make(Backend(behave)), ["a", "b"]))
    assert {type(error) for error in errors} <= {ZeroDivisionError, ValueError}
    assert len(errors) == 2


@given(attempt=st.integers(1, 10_000), wish=st.none() | st.floats(0, 1e6))
def test_a_backoff_doubles_within_its_bounds(attempt: int, wish: float | None) -> None:
    longest = batched.LONGEST_BACKOFF_S
    least = min(longest, batched.FIRST_BACKOFF_S * 2 ** min(attempt - 1, 30)) / 2
    assert max(least, min(wish or 0.0, longest)) <= backoff_s(attempt, wish) <= longest


@pytest.mark.parametrize(
    ("failure", "limits", "num_requests"),
    [
        (LOST, {"max_attempts": 3}, 3),
        (REFUSED, {"max_attempts": 3}, 1),
        (SearchError("TLS", is_retryable=True, setting="ca_file", fix="name it"), {"max_attempts": 3}, 1),
        (LOST, {"limit_s": 0.0}, 1),
    ],
)
def test_a_request_is_tried_again_while_its_failure_may_pass(
    failure: SearchError, limits: dict[str, float], num_requests: int
) -> None:
    num_sent = 0

    async def send() -> None:
        nonlocal num_sent
        num_sent += 1
        raise failure

    with pytest.raises(SearchError) as caught:
        asyncio.run(retry(send, **limits))
    assert caught.value is failure
    assert num_sent == num_requests


def test_a_failure_that_passes_ends_in_an_answer() -> None:
    failures = [LOST, BUSY, LOST]

    async def send() -> str:
        if failures:
            raise failures.pop()
        return "answer"

    assert asyncio.run(retry(send)) == "answer"
