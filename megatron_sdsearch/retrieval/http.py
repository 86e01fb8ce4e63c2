"""Client of Search-R1's ``/retrieve`` protocol, for our own server (``server.py``) and for others.

Owns the request and response formats and their validation. ``batched.py`` handles batches, retries and outages.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import math
from collections.abc import Sequence
from typing import Any, Self
from urllib.parse import urljoin, urlsplit

import aiohttp

from megatron_sdsearch.config import RetrieveServerConfig, shown_url
from megatron_sdsearch.errors import ConfigError, RetrievalError, cause_of
from megatron_sdsearch.records import Passage
from megatron_sdsearch.retrieval.batched import Outcome, SearchError, parse_retry_after
from megatron_sdsearch.retrieval.credentials import Credentials

_FIELD = "retrieval.http.url"
_RETRYABLE = frozenset({408, 429, 500, 502, 503, 504})  # 500: Search-R1's server sends it when its engine fails
_HEALTH_TIMEOUT_S = 10.0
_CONNECT_TIMEOUT_S = 10.0  # detects an unreachable host before the request's own deadline


class RetrieveServerBackend:
    """A ``SearchBackend`` for one server; created by ``open`` on the event loop that uses it."""

    version_warning = ""

    def __init__(
        self, url: str, session: aiohttp.ClientSession, credentials: Credentials, health: dict[str, Any]
    ) -> None:
        self.name = url
        # Only our own server reports a fingerprint.
        served = health.get("fingerprint")
        self.fingerprint = f"http/{url}/{served}" if served and isinstance(served, str) else f"http/{url}"
        self.num_passages: int | None = count if type(count := health.get("num_passages")) is int else None
        self._session = session
        self._credentials = credentials

    @classmethod
    async def open(cls, config: RetrieveServerConfig) -> Self:
        """Connect and read ``/health``; from a server other than ours, any response will do.

        Raises:
            ConfigError: the URL is invalid.
            RetrievalError: the server does not respond, or reports that its engine failed.
        """
        check_url(config.url)
        credentials = Credentials()
        if config.username is not None and config.password is not None:
            credentials = Credentials(basic=(config.username, config.password.get_secret_value()))
        # No keep-alive: the event loop is stopped during training, and the server closes idle connections meanwhile.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, force_close=True),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=_CONNECT_TIMEOUT_S),
            headers={"Authorization": f"Basic {credentials.basic_token}"} if credentials.basic else None,
        )
        try:
            return cls(config.url, session, credentials, await _read_health(config.url, session, credentials))
        except BaseException:
            await session.close()
            raise

    async def search_batch(self, queries: Sequence[str], top_k: int) -> Sequence[Outcome]:
        """Send one POST. A passage without an id (Search-R1's web searches) gets a hash of its contents as id.

        Raises:
            SearchError: the whole request failed.
        """
        request = {"queries": list(queries), "topk": top_k, "return_scores": True}
        try:
            async with self._session.post(self.name, json=request) as response:
                body = await response.read()
        except TimeoutError as error:  # before OSError, its base class
            raise SearchError(f"no connection in {_CONNECT_TIMEOUT_S:g} s", is_retryable=True) from error
        except (aiohttp.ClientError, OSError) as error:
            raise SearchError(f"no connection: {cause_of(error)}", is_retryable=True) from error
        if response.status != 200:
            raise SearchError(
                f"HTTP {response.status}: {_shown(body, self._credentials)}",
                is_retryable=response.status in _RETRYABLE,
                retry_after_s=parse_retry_after(response.headers.get("Retry-After")),
                fix="include the route: http://host:8000/retrieve" if response.status == 404 else "",
            )
        try:
            answer = json.loads(body)
        except ValueError:
            raise _malformed(f"not JSON: {_shown(body, self._credentials)}") from None
        result = answer.get("result") if isinstance(answer, dict) else None
        if not isinstance(result, list):
            raise _malformed(f'no list "result": {_shown(body, self._credentials)}')
        if len(result) != len(queries):
            raise _malformed(f'"result" has {len(result)} lists for {len(queries)} queries')
        return [_read_items(items, top_k) for items in result]

    async def close(self) -> None:
        """Close connections."""
        await self._session.close()


def check_url(url: str) -> None:
    """Check that a URL has a scheme, a host and a route.

    Raises:
        ConfigError: it does not.
    """
    try:
        parts = urlsplit(url)
        is_whole = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # the port is not a number
        is_whole = False
    if not is_whole or parts.path in ("", "/"):
        raise ConfigError(_FIELD, f"{shown_url(url)!r} is not a full URL", "give all of it: http://host:8000/retrieve")


def to_items(passages: Sequence[Passage], *, has_scores: bool) -> list[dict[str, Any]]:
    """Convert passages to response items: ``{"document": {"id", "contents"}, "score"}``, or bare documents."""
    documents = [{"id": passage.passage_id, "contents": passage.contents} for passage in passages]
    if not has_scores:
        return documents
    return [{"document": d, "score": p.score} for d, p in zip(documents, passages, strict=True)]


def _read_items(items: Any, top_k: int) -> Outcome:
    """Read the passages of one query; an error affects this query alone."""
    if not isinstance(items, list):
        return _malformed(f'an entry of "result" is not a list: {items!r:.80}')
    try:
        return [_read_item(item) for item in items[:top_k]]
    except ValueError as error:
        return _malformed(str(error))


def _read_item(item: Any) -> Passage:
    has_score = isinstance(item, dict) and "document" in item
    document = item["document"] if has_score else item
    if not isinstance(document, dict):
        raise ValueError(f"an item is not a document: {item!r:.80}")
    contents = document.get("contents")
    if not isinstance(contents, str):
        raise ValueError(f'a document has no string "contents"; its fields are {sorted(map(str, document))}')
    passage_id = document.get("id", "sha256:" + hashlib.sha256(contents.encode()).hexdigest()[:16])
    if not isinstance(passage_id, str) and type(passage_id) is not int:
        raise ValueError(f'"id" is neither a string nor an integer: {passage_id!r:.80}')
    score = item.get("score", 0.0) if has_score else 0.0
    if isinstance(score, bool) or not isinstance(score, int | float) or not math.isfinite(score):
        raise ValueError(f'"score" is not a finite number: {score!r:.80}')
    return Passage(passage_id=str(passage_id), contents=contents, score=float(score))


def _malformed(problem: str) -> SearchError:
    # Not retryable: the same request would get the same response.
    return SearchError(f"malformed answer: {problem}", is_retryable=False)


def _shown(body: bytes, credentials: Credentials) -> str:
    return credentials.clean(body.decode("utf-8", "replace")) or "(empty)"


async def _read_health(url: str, session: aiohttp.ClientSession, credentials: Credentials) -> dict[str, Any]:
    health_url = urljoin(url.rstrip("/"), "health")
    try:
        async with asyncio.timeout(_HEALTH_TIMEOUT_S), session.get(health_url) as response:
            body = await response.read()
    except TimeoutError as error:
        raise RetrievalError(f"{health_url}: no answer in {_HEALTH_TIMEOUT_S:g} s; check the server's log") from error
    except (aiohttp.ClientError, OSError) as error:
        fix = f"start the server (tools/serve_retriever.py), or correct {_FIELD}"
        raise RetrievalError(f"{url}: no server answers ({cause_of(error)}); {fix}") from error
    if response.status == 503:
        raise RetrievalError(f"{health_url}: the server's search engine failed: {_shown(body, credentials)}")
    try:
        health = json.loads(body) if response.status == 200 else {}
    except ValueError:
        return {}
    return health if isinstance(health, dict) else {}
