"""Which of many SGLang servers answers a trajectory, and which of them can be used at all.

Owns affinity, load, the bound on open requests, health and the polling that takes a server back. What is sent to a
server, and what its answers mean, is ``sglang_client.py``'s. Restarting servers and giving them weights is somebody
else's: a server is taken back when it is found alive with the current weights, whoever saw to that.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass

import aiohttp

from megatron_sdsearch.errors import EngineError, ServerRefusedError, ServerUnavailableError
from megatron_sdsearch.records import TrajectoryId
from megatron_sdsearch.rollout.sglang_api import SGLangServer, check_url, new_session

_log = logging.getLogger(__name__)

_PROBE_TIMEOUT_S = 5.0
_GENERATE_PROBE_TIMEOUT_S = 30.0  # SGLang itself gives up after 20 s


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerStats:
    """One server since the last snapshot.

    Attributes:
        url: of the server.
        is_usable: now.
        num_requests: generations sent, repeated ones included.
        num_prompt_tokens: of the answered ones.
        num_cached_tokens: of those, the ones found in the prefix cache.
    """

    url: str
    is_usable: bool
    num_requests: int
    num_prompt_tokens: int
    num_cached_tokens: int


class PooledServer:
    """A server as the pool sees it.

    Attributes:
        api: its routes.
        num_trajectories: assigned to it.
        last_error: why it was, or is, not usable.
        num_requests, num_prompt_tokens, num_cached_tokens: as in ``ServerStats``.
    """

    def __init__(self, api: SGLangServer, max_concurrency: int) -> None:
        self.api = api
        self.slots = asyncio.Semaphore(max_concurrency)
        self.num_trajectories = 0
        self.last_error = ""
        self.is_hung = False
        self.poll: asyncio.Task[None] | None = None
        self.num_requests = self.num_prompt_tokens = self.num_cached_tokens = 0

    @property
    def is_usable(self) -> bool:
        """Whether new requests may go there: it is not being polled."""
        return self.poll is None

    def take_stats(self) -> ServerStats:
        """What was counted since the last call."""
        stats = ServerStats(
            url=self.api.url,
            is_usable=self.is_usable,
            num_requests=self.num_requests,
            num_prompt_tokens=self.num_prompt_tokens,
            num_cached_tokens=self.num_cached_tokens,
        )
        self.num_requests = self.num_prompt_tokens = self.num_cached_tokens = 0
        return stats


class ServerPool:
    """The servers of one engine; used on one event loop, which may rest between calls.

    Args:
        urls: of the servers; all start as usable.
        max_concurrency: open requests per server; the others wait here.
        down_timeout_s: how long a call waits while no server is usable. Only time in which one waits counts.
        retry_interval_s: between polls of a server that is down.
        policy_version: that a server must hold to be taken back; ``policy_version`` is assigned after each publish.

    Raises:
        EngineError: no url, one twice, or one that is none.
    """

    def __init__(
        self,
        urls: Sequence[str],
        *,
        max_concurrency: int,
        down_timeout_s: float,
        retry_interval_s: float,
        policy_version: int,
    ) -> None:
        self._urls = tuple(url.rstrip("/") for url in urls)
        if not urls or len(set(self._urls)) != len(urls):
            raise EngineError(f"rollout.sglang.urls are {list(urls)}; name at least one server, and none twice")
        for url in urls:
            check_url(url)
        self._max_concurrency = max_concurrency
        self._down_timeout_s = down_timeout_s
        self._retry_interval_s = retry_interval_s
        self.policy_version = policy_version
        self.num_moved = 0
        self._session: aiohttp.ClientSession | None = None
        self._servers: list[PooledServer] = []
        self._assigned: dict[TrajectoryId, PooledServer] = {}
        self._num_starving = 0
        self._starving_since: float | None = None
        self._has_usable = asyncio.Event()
        self._random = random.Random()  # not the global one, whose state belongs to whoever seeded it

    @asynccontextmanager
    async def slot(self, trajectory_id: TrajectoryId) -> AsyncIterator[PooledServer]:
        """A usable server for one request: the one of the trajectory's earlier turns, as long as that is usable.

        Raises:
            EngineError: no server has been usable for ``down_timeout_s``.
        """
        self._open()
        while True:
            server = await self._server_of(trajectory_id)
            async with server.slots:
                if server.is_usable:  # it may have gone down while this call waited for its slot
                    yield server
                    return

    def release(self, trajectory_id: TrajectoryId) -> None:
        """Forget where the trajectory was."""
        server = self._assigned.pop(trajectory_id, None)
        if server is not None:
            server.num_trajectories -= 1

    def take_down(self, server: PooledServer, reason: str, *, is_hung: bool = False) -> None:
        """Send nothing to the server until a poll finds it alive with the current weights.

        Args:
            server: of this pool.
            reason: for the message when no server is left.
            is_hung: it must also prove that it samples.
        """
        server.last_error = reason
        server.is_hung = server.is_hung or is_hung
        if server.poll is None:
            _log.warning("%s is down: %s", server.api.url, reason)
            server.poll = asyncio.create_task(self._bring_back(server))
        if not any(other.is_usable for other in self._servers):
            self._has_usable.clear()

    def take_stats(self) -> tuple[ServerStats, ...]:
        """What was counted since the last call, per server in the order of the urls."""
        if not self._servers:
            zero = {"num_requests": 0, "num_prompt_tokens": 0, "num_cached_tokens": 0}
            return tuple(ServerStats(url=url, is_usable=True, **zero) for url in self._urls)
        return tuple(server.take_stats() for server in self._servers)

    async def close(self) -> None:
        """End the polls and the session."""
        polls = [server.poll for server in self._servers if server.poll is not None]
        for poll in polls:
            poll.cancel()
        await asyncio.gather(*polls, return_exceptions=True)
        if self._session is not None:
            await self._session.close()

    def _open(self) -> None:
        """A session belongs to the running event loop, so it is made by the first call."""
        if self._session is None:
            self._session = new_session()
            apis = [SGLangServer(url, self._session) for url in self._urls]
            self._servers = [PooledServer(api, self._max_concurrency) for api in apis]
            self._has_usable.set()

    async def _server_of(self, trajectory_id: TrajectoryId) -> PooledServer:
        while True:
            before = self._assigned.get(trajectory_id)
            if before is not None and before.is_usable:
                return before
            usable = [server for server in self._servers if server.is_usable]
            if usable:
                break
            await self._wait_for_usable()
        # Ties are broken at random: the ranks do not know of each other's load.
        server = min(usable, key=lambda server: (server.num_trajectories, self._random.random()))
        self.release(trajectory_id)
        self._assigned[trajectory_id] = server
        server.num_trajectories += 1
        self.num_moved += before is not None
        return server

    async def _wait_for_usable(self) -> None:
        """Wait together with all the others: the first one's arrival starts the clock."""
        if self._starving_since is None:
            self._starving_since = asyncio.get_running_loop().time()
        self._num_starving += 1
        try:
            async with asyncio.timeout_at(self._starving_since + self._down_timeout_s):
                await self._has_usable.wait()
        except TimeoutError:
            errors = "; ".join(f"{server.api.url}: {server.last_error}" for server in self._servers)
            raise EngineError(
                f"none of {len(self._servers)} SGLang servers was usable for {self._down_timeout_s:g} s "
                f"(rollout.sglang.down_timeout_s); {errors}"
            ) from None
        finally:
            self._num_starving -= 1
            if not self._num_starving:
                self._starving_since = None

    async def _bring_back(self, server: PooledServer) -> None:
        while True:
            await asyncio.sleep(self._retry_interval_s)
            try:
                version = await server.api.weight_version(timeout_s=_PROBE_TIMEOUT_S)
                if version == str(self.policy_version):
                    if server.is_hung:
                        await server.api.health_generate(timeout_s=_GENERATE_PROBE_TIMEOUT_S)
                    break
                server.last_error = f"it holds weight version {version!r}, the current one is '{self.policy_version}'"
            except (ServerRefusedError, ServerUnavailableError) as error:
                server.last_error = str(error)
        _log.warning("%s is back with weight version %d", server.api.url, self.policy_version)
        server.poll = None
        server.is_hung = False
        self._starving_since = None
        self._has_usable.set()
