"""Requests to SGLang servers: deadlines, refusals and unavailability.

Checked against SGLang 0.5.23; docs/sglang.md lists what was run with which version.
"""

from __future__ import annotations

import asyncio
import io
import json
import os
import threading
from collections.abc import Awaitable, Callable, Sequence
from concurrent.futures import Future
from typing import Any, TypeVar

import aiohttp

from megatron_sdsearch.errors import ServerRefusedError, ServerUnavailableError, cause_of

OLDEST_VERSION = "0.5.19"
TESTED_VERSION = "0.5.23"

Json = dict[str, Any]
T = TypeVar("T")

_MAX_QUOTED = 500  # characters of a server's own message
# SGLangServer sets the deadline of a whole call; this one detects a host that is off earlier.
_HTTP_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0)


class SGLangServer:
    """A client of the server at ``url``.

    Opens a connection for each request and belongs to no event loop. Event loops do not run while the trainer trains;
    servers close idle connections meanwhile, and a request on a closed one would look like a dead server.

    Every method raises:
        ServerRefusedError: the server answered with a 4xx status, or with ``"success": false``.
        ServerUnavailableError: no connection, a lost one, a 5xx status, invalid JSON, or no complete answer in time.
    Both give the url, the route and the server's own message.

    Args:
        url: ``http://host:port``.
        timeout_s: default deadline of a call, from its start to the last byte.
    """

    def __init__(self, url: str, *, timeout_s: float = 60.0) -> None:
        self.url = url.rstrip("/")
        self._timeout_s = timeout_s

    async def send(self, route: str, body: Json | None = None, *, timeout_s: float | None = None) -> bytes:
        """Send a POST with a JSON body, or a GET without one; return the content of the answer."""
        limit = self._timeout_s if timeout_s is None else timeout_s
        where = self.url + route
        headers = {"Content-Type": "application/json"} if body is not None else {}
        # A stream: aiohttp warns about large bodies given as bytes, and weights are large.
        data = io.BytesIO(json.dumps(body).encode()) if body is not None else None
        method = "GET" if body is None else "POST"
        try:
            async with (
                asyncio.timeout(limit),
                aiohttp.request(method, where, data=data, headers=headers, timeout=_HTTP_TIMEOUT) as response,
            ):
                status, content = response.status, await response.read()
        except (aiohttp.ClientError, OSError) as error:
            # Some errors of aiohttp are timeouts too, but of connecting, before anything was sent.
            is_timeout = isinstance(error, TimeoutError) and not isinstance(error, aiohttp.ClientError)
            problem = f"no answer within {limit:g} s" if is_timeout else cause_of(error)
            if isinstance(error, aiohttp.ClientConnectorError) and error.errno and error.errno > 0:
                problem = os.strerror(error.errno)
            raise ServerUnavailableError(f"{where}: {problem}", is_timeout=is_timeout) from error
        if status == 200:
            return content
        message = f"{where}: HTTP {status}: {_quote(content)}"
        if 400 <= status < 500:
            raise ServerRefusedError(message, status)
        raise ServerUnavailableError(message)

    async def call(self, route: str, body: Json | None = None, *, timeout_s: float | None = None) -> Json:
        """Send a request and return its answer, a JSON object."""
        content = await self.send(route, body, timeout_s=timeout_s)
        try:
            answer = json.loads(content)
            if not isinstance(answer, dict):
                raise ValueError("not an object")
        except ValueError as error:
            raise ServerUnavailableError(f"{self.url}{route}: not a JSON object: {_quote(content)}") from error
        if answer.get("success") is False:
            raise ServerRefusedError(f"{self.url}{route}: {str(answer.get('message', answer))[:_MAX_QUOTED]}", 200)
        return answer

    async def load_folder(self, path: str, version: str) -> None:
        """Load a Hugging Face folder that the server sees under the same path, as weight version ``version``.

        After a refusal the server's weights are unknown although it reports the old version: it loads first, then
        flushes its cache, and refuses if open requests prevent that (0.5.23, scheduler_components/weight_updater.py,
        ``flush_cache_after_weight_update``). Send it weights again before using its tokens.
        """
        body = {"model_path": path, "weight_version": version, "flush_cache": True}
        await self.call("/update_weights_from_disk", body)

    async def begin_weight_update(self) -> None:
        """Open the session of tensor and distributed updates; servers before 0.5.21 have none and answer 404.

        Closes a session that an interrupted publish left open.
        """
        try:
            await self.call("/begin_weight_update", {"selector": "all"})
        except ServerRefusedError as error:
            if error.status == 404:
                return
            if "already open" not in str(error):
                raise
            await self.end_weight_update()
            await self.call("/begin_weight_update", {"selector": "all"})

    async def end_weight_update(self) -> None:
        """Close the session that ``begin_weight_update`` opened."""
        try:
            await self.call("/end_weight_update", {})
        except ServerRefusedError as error:
            if error.status != 404:
                raise


def call_servers(
    servers: Sequence[SGLangServer],
    work: Callable[[SGLangServer], Awaitable[T]],
    meanwhile: Callable[[], None] | None = None,
) -> list[T]:
    """Run ``work`` for all servers concurrently, and ``meanwhile`` in a thread; for code outside an event loop.

    Args:
        servers: to call.
        work: called for each server.
        meanwhile: the trainer's side of a collective with the servers.

    Returns:
        The results, in the order of ``servers``.

    Raises:
        EngineError: the failure of one server, after all have answered; refusals take precedence over unavailability.
            ``meanwhile`` is then left behind, since it may wait for ever. Also raised for a RuntimeError of
            ``meanwhile``, with which torch reports a lost peer or a timeout.
    """
    beside: Future[None] = Future()

    def run_beside(work: Callable[[], None]) -> None:
        try:
            work()
            beside.set_result(None)
        except RuntimeError as error:
            urls = ", ".join(server.url for server in servers)
            beside.set_exception(ServerUnavailableError(f"process group with {urls}: {cause_of(error)}"))
        except Exception as error:  # noqa: BLE001  # raised below
            beside.set_exception(error)

    async def gather() -> list[T | BaseException]:
        return await asyncio.gather(*(work(server) for server in servers), return_exceptions=True)

    if meanwhile is not None:
        # A daemon thread may hang in a collective with a dead peer without blocking exit.
        threading.Thread(target=run_beside, args=(meanwhile,), daemon=True).start()
    answers = asyncio.run(gather())
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    if failures:
        raise min(failures, key=lambda error: not isinstance(error, ServerRefusedError))
    if meanwhile is not None:
        beside.result()
    return [answer for answer in answers if not isinstance(answer, BaseException)]


def _quote(content: bytes) -> str:
    return content.decode(errors="replace").strip()[:_MAX_QUOTED] or "(nothing)"
