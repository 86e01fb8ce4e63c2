"""The servers as the trainer's synchronous code sees them: one call, all servers at once."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Awaitable, Callable, Sequence
from typing import TypeVar

import aiohttp

from megatron_sdsearch.errors import ServerRefusedError, ServerUnavailableError
from megatron_sdsearch.rollout.sglang_api import SGLangServer, new_session

T = TypeVar("T")
_PROBE_TIMEOUT_S = 5.0


class ServerFleet:
    """An event loop of its own, with one ``SGLangServer`` per url. Not for use inside a running loop.

    Args:
        urls: of the servers.
        timeout_s: of each call.
    """

    def __init__(self, urls: Sequence[str], *, timeout_s: float) -> None:
        self._runner = asyncio.Runner()
        self._session = self._runner.run(_open_session())
        self._servers = {url: SGLangServer(url, self._session, timeout_s=timeout_s) for url in urls}

    @property
    def urls(self) -> tuple[str, ...]:
        """Of all servers."""
        return tuple(self._servers)

    def call(
        self,
        urls: Sequence[str],
        work: Callable[[SGLangServer], Awaitable[T]],
        meanwhile: Callable[[], None] | None = None,
    ) -> list[T]:
        """``work`` on each of ``urls`` at the same time, and ``meanwhile`` in a thread.

        Returns:
            The answers, in the order of ``urls``.

        Raises:
            EngineError: of one server that failed, once all have answered; refusals before absences. ``meanwhile`` is
                then not waited for: what it waits for may never come.
        """
        return self._runner.run(_gather([self._servers[url] for url in urls], work, meanwhile))

    def reachable(self) -> tuple[str, ...]:
        """Urls of those that answer now."""

        async def answers(server: SGLangServer) -> bool:
            try:
                await server.model_info(timeout_s=_PROBE_TIMEOUT_S)
            except (ServerUnavailableError, ServerRefusedError):
                return False
            return True

        return tuple(url for url, is_there in zip(self.urls, self.call(self.urls, answers), strict=True) if is_there)

    def close(self) -> None:
        """Close connections and loop."""
        self._runner.run(self._session.close())
        self._runner.close()


async def open_update(server: SGLangServer) -> None:
    """Begin a weight update, also where an earlier one was not ended: its sender may have failed, or died."""
    try:
        await server.begin_weight_update()
    except ServerRefusedError as error:
        if "already open" not in str(error):
            raise
        await server.end_weight_update()
        await server.begin_weight_update()


async def _open_session() -> aiohttp.ClientSession:
    return new_session()


async def _gather(
    servers: Sequence[SGLangServer],
    work: Callable[[SGLangServer], Awaitable[T]],
    meanwhile: Callable[[], None] | None,
) -> list[T]:
    thread = asyncio.create_task(_in_thread(meanwhile)) if meanwhile is not None else None
    answers = await asyncio.gather(*(work(server) for server in servers), return_exceptions=True)
    failures = [answer for answer in answers if isinstance(answer, BaseException)]
    if failures:
        if thread is not None:
            thread.cancel()
        raise min(failures, key=lambda error: not isinstance(error, ServerRefusedError))
    if thread is not None:
        await thread
    return [answer for answer in answers if not isinstance(answer, BaseException)]


async def _in_thread(work: Callable[[], None]) -> None:
    """Run blocking work beside the loop, in a daemon thread: one that hangs in a dead peer's collective is left."""
    loop = asyncio.get_running_loop()
    done: asyncio.Future[None] = loop.create_future()

    def settle(error: Exception | None) -> None:
        if done.cancelled():
            return
        if error is None:
            done.set_result(None)
        else:
            done.set_exception(error)

    def run() -> None:
        failure: Exception | None = None
        try:
            work()
        except Exception as error:  # noqa: BLE001  # handed to whoever waits
            failure = error
        if not loop.is_closed():
            loop.call_soon_threadsafe(settle, failure)

    threading.Thread(target=run, daemon=True).start()
    await done
