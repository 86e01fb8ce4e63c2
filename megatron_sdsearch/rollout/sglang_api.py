"""One SGLang server's JSON routes: generation, health, control and weights.

Owns the shape of each request, deadlines, and what counts as refused and what as unavailable. Many servers, retries
and the meaning of an answer are ``sglang_client.py``'s and ``sglang_pool.py``'s; the order of calls that gives a server
new weights is the trainer's. Checked against SGLang 0.5.23.
"""

from __future__ import annotations

import asyncio
import io
import json
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import Any, Literal

import aiohttp

from megatron_sdsearch.config import is_server_url
from megatron_sdsearch.errors import EngineError, ServerRefusedError, ServerUnavailableError, cause_of

OLDEST_VERSION = "0.5.19"
TESTED_VERSION = "0.5.23"
"""Of SGLang; docs/sglang.md says what was run with which."""

Json = dict[str, Any]
PauseMode = Literal["abort", "retract", "in_place"]

_MAX_WORDS = 500  # characters of a server's own message that are quoted
# The deadline of the whole call is SGLangServer's; a host that is off is noticed earlier.
_HTTP_TIMEOUT = aiohttp.ClientTimeout(total=None, sock_connect=10.0)


def new_session() -> aiohttp.ClientSession:
    """A session for any number of servers and requests; made inside the event loop that uses it.

    Connections are not kept: the event loop rests while the trainer trains, the server closes what is idle meanwhile,
    and a request on such a connection would look like a dead server.
    """
    return aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0, force_close=True))


class SGLangServer:
    """The routes of the server at ``url``.

    In an event loop pass a session (``new_session``) that is shared by all servers, and close it yourself. Where there
    is none, let ``connect`` make one for the time of a block::

        async def publish(url: str) -> None:
            async with SGLangServer.connect(url, timeout_s=60.0) as server:
                await server.pause("retract")
                ...
        asyncio.run(publish("http://10.0.0.7:30000"))

    Every method raises:
        ServerRefusedError: the server answered with a 4xx status, or with ``"success": false``.
        ServerUnavailableError: no connection, a lost one, a 5xx status, not JSON, or no whole answer in time.
    Both name the url, the route and the server's words.

    Args:
        url: ``http://host:port``.
        session: to send with.
        timeout_s: deadline of each call, from its start to the last byte; ``None`` there means this.

    Raises:
        EngineError: ``url`` is none.
    """

    def __init__(self, url: str, session: aiohttp.ClientSession, *, timeout_s: float = 60.0) -> None:
        check_url(url)
        self.url = url.rstrip("/")
        self._session = session
        self._timeout_s = timeout_s
        self._has_update_sessions: bool | None = None

    @classmethod
    @asynccontextmanager
    async def connect(cls, url: str, *, timeout_s: float = 60.0) -> AsyncIterator[SGLangServer]:
        """A server with a session of its own, closed at the end of the block."""
        async with new_session() as session:
            yield cls(url, session, timeout_s=timeout_s)

    # Generation

    async def generate(self, request: Json, *, timeout_s: float | None = None) -> Json:
        """The answer to one ``/generate``, with ``text``, ``output_ids`` and ``meta_info``; see SGLang's own pages."""
        return await self._call("/generate", request, timeout_s)

    async def abort(self, rid: str, *, timeout_s: float | None = None) -> None:
        """End one request; it answers with what it has. An unknown ``rid`` is no error."""
        await self._send("POST", "/abort_request", {"rid": rid}, timeout_s)

    async def abort_all(self, *, timeout_s: float | None = None) -> None:
        """End every request."""
        await self._send("POST", "/abort_request", {"abort_all": True}, timeout_s)

    # Health

    async def model_info(self, *, timeout_s: float | None = None) -> Json:
        """What is served; answers while paused, too, and computes nothing."""
        return self._parse("/model_info", await self._send("GET", "/model_info", None, timeout_s))

    async def weight_version(self, *, timeout_s: float | None = None) -> str:
        """Of the weights held now; ``"default"`` until an update named one."""
        info = await self.model_info(timeout_s=timeout_s)
        if "weight_version" not in info:
            raise ServerUnavailableError(f"{self.url}/model_info names no weight_version: {str(info)[:_MAX_WORDS]}")
        return str(info["weight_version"])

    async def health_generate(self, *, timeout_s: float | None = None) -> None:
        """Sample one token: a server whose scheduler hangs still answers ``model_info``. Fails while paused."""
        await self._send("GET", "/health_generate", None, timeout_s)

    # Control

    async def pause(self, mode: PauseMode = "retract", *, timeout_s: float | None = None) -> None:
        """Stop sampling; requests wait until ``continue_``.

        Args:
            mode: what becomes of running requests. ``abort``: they end. ``retract``: their cache is computed anew
                afterwards. ``in_place``: they keep it, which is wrong across a change of weights.
            timeout_s: see the class.
        """
        await self._send("POST", "/pause_generation", {"mode": mode}, timeout_s)

    async def continue_(self, *, timeout_s: float | None = None) -> None:
        """Sample again."""
        await self._send("POST", "/continue_generation", {}, timeout_s)

    async def flush_cache(self, *, timeout_s: float | None = None) -> None:
        """Forget all cached prefixes; refused while requests are running."""
        await self._send("POST", "/flush_cache", {}, timeout_s)

    async def release_memory_occupation(
        self, tags: Sequence[str] | None = None, *, timeout_s: float | None = None
    ) -> None:
        """Give GPU memory back: ``weights``, ``kv_cache``, or everything. The server must be idle."""
        await self._send("POST", "/release_memory_occupation", _tags(tags), timeout_s)

    async def resume_memory_occupation(
        self, tags: Sequence[str] | None = None, *, timeout_s: float | None = None
    ) -> None:
        """Take GPU memory again."""
        await self._send("POST", "/resume_memory_occupation", _tags(tags), timeout_s)

    # Weights

    async def begin_weight_update(self, *, timeout_s: float | None = None) -> bool:
        """Open the session that tensor and distributed updates need since 0.5.21.

        Returns:
            Whether the server knows sessions; an older one (found out once, by its 404) needs none.
        """
        if self._has_update_sessions is None:
            try:
                await self._call("/begin_weight_update", {"selector": "all"}, timeout_s)
            except ServerRefusedError as error:
                if error.status != 404:
                    raise
                self._has_update_sessions = False
                return False
            self._has_update_sessions = True
        elif self._has_update_sessions:
            await self._call("/begin_weight_update", {"selector": "all"}, timeout_s)
        return self._has_update_sessions

    async def end_weight_update(self, *, timeout_s: float | None = None) -> None:
        """Close the session that ``begin_weight_update`` opened; nothing on a server without sessions."""
        if self._has_update_sessions is not False:
            await self._call("/end_weight_update", {}, timeout_s)

    async def update_weights_from_disk(
        self, model_path: str, weight_version: str, *, flush_cache: bool = True, timeout_s: float | None = None
    ) -> Json:
        """Read a Hugging Face folder that the server sees under the same path.

        Refused: the weights are unknown, though the version is the old one. The server loads first, then flushes its
        cache, and refuses when requests keep it from that: it then holds the new weights under the old version (0.5.23,
        scheduler_components/weight_updater.py, ``flush_cache_after_weight_update``). Give it weights again before its
        tokens are believed.
        """
        body = {"model_path": model_path, "weight_version": weight_version, "flush_cache": flush_cache}
        return await self._call("/update_weights_from_disk", body, timeout_s)

    async def update_weights_from_tensor(
        self,
        serialized_named_tensors: Sequence[str],
        *,
        weight_version: str | None = None,
        load_format: str | None = None,
        flush_cache: bool = False,
        timeout_s: float | None = None,
    ) -> Json:
        """Hand tensors over in the request.

        Args:
            serialized_named_tensors: one base64 string per tensor-parallel rank of the server.
            weight_version: given with the last bucket.
            load_format: ``None`` for a list of (name, tensor), or ``flattened_bucket``.
            flush_cache: given with the last bucket.
            timeout_s: see the class.
        """
        body = {
            "serialized_named_tensors": list(serialized_named_tensors),
            "flush_cache": flush_cache,
            **_given(weight_version=weight_version, load_format=load_format),
        }
        return await self._call("/update_weights_from_tensor", body, timeout_s)

    async def init_weights_update_group(
        self,
        *,
        master_address: str,
        master_port: int,
        rank_offset: int,
        world_size: int,
        group_name: str,
        backend: str,
        timeout_s: float | None = None,
    ) -> Json:
        """Join a process group with the trainer, which must join at the same time: this call waits for it."""
        body = {
            "master_address": master_address,
            "master_port": master_port,
            "rank_offset": rank_offset,
            "world_size": world_size,
            "group_name": group_name,
            "backend": backend,
        }
        return await self._call("/init_weights_update_group", body, timeout_s)

    async def update_weights_from_distributed(
        self,
        *,
        names: Sequence[str],
        dtypes: Sequence[str],
        shapes: Sequence[Sequence[int]],
        group_name: str,
        weight_version: str | None = None,
        load_format: str | None = None,
        flush_cache: bool = False,
        timeout_s: float | None = None,
    ) -> Json:
        """Receive tensors that the trainer broadcasts in the group while this call waits; dtypes as ``float32``."""
        body = {
            "names": list(names),
            "dtypes": list(dtypes),
            "shapes": [list(shape) for shape in shapes],
            "group_name": group_name,
            "flush_cache": flush_cache,
            **_given(weight_version=weight_version, load_format=load_format),
        }
        return await self._call("/update_weights_from_distributed", body, timeout_s)

    async def destroy_weights_update_group(self, group_name: str, *, timeout_s: float | None = None) -> Json:
        """Leave the process group."""
        return await self._call("/destroy_weights_update_group", {"group_name": group_name}, timeout_s)

    async def weights_checker(self, action: str = "checksum", *, timeout_s: float | None = None) -> Json:
        """``checksum``: hashes of every tensor, under ``ranks`` -> ``checksums``; other actions are SGLang's own."""
        return await self._call("/weights_checker", {"action": action}, timeout_s)

    # HTTP

    async def _call(self, route: str, body: Json, timeout_s: float | None) -> Json:
        answer = self._parse(route, await self._send("POST", route, body, timeout_s))
        if answer.get("success") is False:
            raise ServerRefusedError(f"{self.url}{route}: {str(answer.get('message', answer))[:_MAX_WORDS]}", 200)
        return answer

    def _parse(self, route: str, content: bytes) -> Json:
        try:
            answer = json.loads(content)
        except ValueError:
            answer = None
        if not isinstance(answer, dict):
            raise ServerUnavailableError(f"{self.url}{route}: not a JSON object: {_words(content)}")
        return answer

    async def _send(self, method: str, route: str, body: Json | None, timeout_s: float | None) -> bytes:
        limit = self._timeout_s if timeout_s is None else timeout_s
        try:
            async with asyncio.timeout(limit):
                status, content = await self._exchange(method, route, body)
        except aiohttp.ClientError as error:  # before TimeoutError, which some of them are too
            raise ServerUnavailableError(f"{self.url}{route}: {cause_of(error)}") from error
        except TimeoutError as error:
            message = f"{self.url}{route}: no answer within {limit:g} s"
            raise ServerUnavailableError(message, is_timeout=True) from error
        except OSError as error:
            raise ServerUnavailableError(f"{self.url}{route}: {cause_of(error)}") from error
        if status == 200:
            return content
        message = f"{self.url}{route}: HTTP {status}: {_words(content)}"
        if 400 <= status < 500:
            raise ServerRefusedError(message, status)
        raise ServerUnavailableError(message)

    async def _exchange(self, method: str, route: str, body: Json | None) -> tuple[int, bytes]:
        # aiohttp warns about large bodies in one piece, and weights are large.
        data = None if body is None else io.BytesIO(json.dumps(body).encode())
        headers = {} if body is None else {"Content-Type": "application/json"}
        url = self.url + route
        async with self._session.request(method, url, data=data, headers=headers, timeout=_HTTP_TIMEOUT) as response:
            return response.status, await response.read()


def check_url(url: str) -> None:
    """Refuse what is not ``http://host:port``.

    Raises:
        EngineError: it is not.
    """
    if not is_server_url(url):
        raise EngineError(f"{url!r} is not the url of a server; write it as http://host:port")


def _words(content: bytes) -> str:
    return content.decode(errors="replace").strip()[:_MAX_WORDS] or "(nothing)"


def _tags(tags: Sequence[str] | None) -> Json:
    return {} if tags is None else {"tags": list(tags)}


def _given(**fields: str | None) -> Json:
    return {name: value for name, value in fields.items() if value is not None}
