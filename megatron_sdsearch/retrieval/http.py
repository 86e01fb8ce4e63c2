"""The client of any server that speaks Search-R1's ``/retrieve``: ours (``server.py``), Search-R1's own, or others.

Owns the request and what counts as an answer to it. When batches leave, what is tried again, and when the server counts
as down is ``batching.py``'s.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
import re
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urlsplit, urlunsplit

import aiohttp

from megatron_sdsearch.config import RetrieveServerConfig, shown_url
from megatron_sdsearch.errors import ConfigError, RetrievalError, cause_of
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.batching import BatchedSearches, BatchSettings, Fault, Outcome, SearchCounts
from megatron_sdsearch.retrieval.secrets import basic_token, shorten, strike_out

_FIELD = "retrieval.http.url"
_OVERLOADED = frozenset({429, 503})
_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})  # 500: Search-R1's server answers so when its engine stumbles
_HEALTH_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 10.0  # a host that is off is noticed before the request's own deadline


class RetrieveServerRetriever:
    """A ``Retriever`` over one server; made by ``open``, on the event loop on which it is used.

    Attributes:
        num_passages: behind the server, if it says so; else None.
    """

    def __init__(
        self,
        config: RetrieveServerConfig,
        session: aiohttp.ClientSession,
        *,
        fingerprint: str | None = None,
        num_passages: int | None = None,
    ) -> None:
        self._url = config.url
        self._secrets = _secrets(config)
        self._session = session
        self._fingerprint = fingerprint
        self.num_passages = num_passages
        self._searches = BatchedSearches(self._send, BatchSettings.of(config), engine=config.url)

    @classmethod
    async def open(cls, config: RetrieveServerConfig) -> Self:
        """Ask the server for its health: ours tells what it serves, any answer of another shows that it is there.

        Raises:
            ConfigError: the URL is none.
            RetrievalError: nobody answers, or our server's engine is not well.
        """
        check_url(config.url)
        # Connections are not kept: the event loop rests while the trainer trains, and the server closes what is idle.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Basic {secrets[-1]}"} if (secrets := _secrets(config)) else None,
        )
        try:
            health = await _health(config, session)
        except BaseException:
            await session.close()
            raise
        fingerprint, num_passages = health.get("fingerprint"), health.get("num_passages")
        return cls(
            config,
            session,
            fingerprint=fingerprint if isinstance(fingerprint, str) else None,
            num_passages=num_passages if type(num_passages) is int else None,
        )

    @property
    def fingerprint(self) -> str:
        """The URL, and what our server serves there; of another server nothing more is known."""
        return f"http/{self._url}" + (f"/{self._fingerprint}" if self._fingerprint else "")

    def take_counts(self) -> SearchCounts:
        """What happened since the last call."""
        return self._searches.take_counts()

    async def search(self, query: str, *, top_k: int) -> Sequence[Passage]:
        """Best passages first.

        A passage without an id (Search-R1's web searches) is named after its contents; one without a score has 0.
        A query of white space alone matches nothing, and is not asked.

        Raises:
            RetrievalError: with cause, query and number of attempts; after a malformed answer nobody asks again.
            RetrievalDownError: the server answers nobody.
            ValueError: ``top_k`` is less than 1.
        """
        if top_k < 1:
            raise ValueError(f"top_k is {top_k}; it must be at least 1")
        if not query.strip():
            return ()
        # Half a surrogate pair has no UTF-8: it would spoil the whole batch's body.
        return await self._searches.search(query.encode("utf-8", "replace").decode(), top_k=top_k)

    async def close(self) -> None:
        """End what is under way, and close connections."""
        try:
            await self._searches.close()
        finally:
            await self._session.close()

    async def _send(self, queries: Sequence[str], top_k: int) -> Sequence[Outcome] | Fault:
        """One POST; a ``Send`` of ``batching.py``, which also ends it when it takes too long."""
        request = {"queries": list(queries), "topk": top_k, "return_scores": True}
        try:
            async with self._session.post(self._url, json=request) as response:
                body = await response.read()
        except (aiohttp.ClientError, OSError) as error:
            if isinstance(error, TimeoutError):
                return Fault(cause=f"no connection in {_CONNECT_TIMEOUT_S:g} s", is_retryable=True)
            return Fault(cause=f"no connection: {cause_of(error)}", is_retryable=True)
        if response.status != 200:
            fix = "; give the whole route: http://host:8000/retrieve" if response.status == 404 else ""
            return Fault(
                cause=f"HTTP {response.status}: {_words(body, self._secrets)}{fix}",
                is_retryable=response.status in _RETRYABLE,
                is_overload=response.status in _OVERLOADED,
                retry_after_s=_seconds(response.headers.get("Retry-After", "")),
            )
        return read_answer(body, len(queries), top_k, self._secrets)


def read_answer(body: bytes, num_queries: int, top_k: int, secrets: Sequence[str] = ()) -> Sequence[Outcome] | Fault:
    """Passages of each query: ``{"result": [[item, ...], ...]}``, an item with or without score; or what is wrong."""
    try:
        answer = json.loads(body)
    except ValueError:
        return _malformed(f"not JSON: {_words(body, secrets)}")
    result = answer.get("result") if isinstance(answer, dict) else None
    if not isinstance(result, list):
        return _malformed(f'no list "result": {_words(body, secrets)}')
    if len(result) != num_queries:
        return _malformed(f'"result" has {len(result)} lists for {num_queries} queries')
    return [_read_items(items, top_k) for items in result]


def _read_items(items: Any, top_k: int) -> Outcome:
    """Of one query; what is wrong with it is not its neighbours' fault."""
    if not isinstance(items, list):
        return _malformed(f'an entry of "result" is no list: {items!r:.80}')
    try:
        return [read_item(item) for item in items[:top_k]]
    except ValueError as error:
        return _malformed(str(error))


def read_item(item: Any) -> Passage:
    """A passage from ``{"document": {"id", "contents"}, "score"}``, or from a bare document.

    Raises:
        ValueError: it is neither; says why.
    """
    has_score = isinstance(item, dict) and "document" in item
    document = item["document"] if has_score else item
    if not isinstance(document, dict):
        raise ValueError(f"an item is no document: {item!r:.80}")
    contents = document.get("contents")
    if not isinstance(contents, str):
        raise ValueError(f'a document has no text "contents", its fields are {sorted(map(str, document))}')
    passage_id = document.get("id", "sha256:" + hashlib.sha256(contents.encode()).hexdigest()[:16])
    if not isinstance(passage_id, str) and type(passage_id) is not int:
        raise ValueError(f'"id" is neither text nor a whole number: {passage_id!r:.80}')
    score = item.get("score", 0.0) if has_score else 0.0
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f'"score" is no number: {score!r:.80}')
    return Passage(passage_id=str(passage_id), contents=contents, score=float(score))


async def _health(config: RetrieveServerConfig, session: aiohttp.ClientSession) -> dict[str, Any]:
    url = _health_url(config.url)
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S), session.get(url) as response:
            status, body = response.status, await response.read()
    except TimeoutError as error:  # before OSError, of which it is one
        fix = "see what the server is waiting for"
        raise RetrievalError(f"{url}: no answer in {_HEALTH_TIMEOUT_S:g} s; {fix}") from error
    except (aiohttp.ClientError, OSError) as error:
        fix = f"start the server (tools/serve_retriever.py), or correct {_FIELD}"
        raise RetrievalError(f"{config.url}: no server answers ({cause_of(error)}); {fix}") from error
    if status == 503:
        raise RetrievalError(f"{url}: the server's engine is not well: {_words(body, _secrets(config))}")
    try:
        health = json.loads(body) if status == 200 else {}
    except ValueError:
        return {}
    return health if isinstance(health, dict) else {}


def check_url(url: str) -> None:
    """Refuse what is not the whole address of a route.

    Raises:
        ConfigError: it is not.
    """
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number
        is_whole = False
    if not is_whole or parts.path in ("", "/"):
        raise ConfigError(_FIELD, f"{shown_url(url)!r} is not whole", "give all of it: http://host:8000/retrieve")


def _secrets(config: RetrieveServerConfig) -> tuple[str, ...]:
    """The password and the header made of it: a server, or a proxy before it, may echo what it refuses."""
    if config.username is None or config.password is None:
        return ()
    password = config.password.get_secret_value()
    return password, basic_token(config.username, password)


def _health_url(url: str) -> str:
    """Beside the route."""
    parts = urlsplit(url)
    folder = parts.path.rstrip("/").rpartition("/")[0]
    return urlunsplit((parts.scheme, parts.netloc, f"{folder}/health", "", ""))


def _malformed(problem: str) -> Fault:
    # The same request to the same server would be answered in the same way.
    return Fault(cause=f"malformed answer: {problem}", is_retryable=False)


def _words(body: bytes, secrets: Sequence[str]) -> str:
    return shorten(strike_out(body.decode("utf-8", "replace"), secrets)) or "(empty)"


def _seconds(header: str) -> float | None:
    return float(header) if re.fullmatch(r"\d+(\.\d+)?", header) else None
