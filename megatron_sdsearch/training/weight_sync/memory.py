"""GPU memory that colocated servers give to the trainer while it trains, and take back for the next publish."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence

from megatron_sdsearch.errors import ServerUnavailableError
from megatron_sdsearch.rollout.sglang_api import SGLangServer
from megatron_sdsearch.training.weight_sync.fleet import ServerFleet

_log = logging.getLogger(__name__)

WEIGHTS = ("weights",)
# After the weights: the buckets that bring them and the cache need not fit at the same time.
CACHE = ("kv_cache", "cuda_graph")


class ColocatedMemory:
    """Remembers which server has given what: SGLang's scheduler dies of a request to take back what it has not given.

    Args:
        fleet: reaches the servers.
        num_restarts: of each own server so far, by url: a restarted one has all of its memory.
    """

    def __init__(self, fleet: ServerFleet, num_restarts: Callable[[], Mapping[str, int]]) -> None:
        self._fleet = fleet
        self._num_restarts = num_restarts
        self._given: dict[str, set[str]] = {}
        self._lives: Mapping[str, int] = {}

    def release(self) -> None:
        """Every server that answers gives all it can; one that is lost meanwhile has none any more.

        Raises:
            ServerRefusedError: a server would not.
        """
        self._lives = dict(self._num_restarts())
        urls = self._fleet.reachable()
        is_done = self._fleet.call(urls, _release)
        self._given = {url: {*WEIGHTS, *CACHE} for url, done in zip(urls, is_done, strict=True) if done}

    def resume(self, urls: Sequence[str], tags: Sequence[str]) -> None:
        """Those of ``urls`` that have given ``tags`` take them back.

        Raises:
            EngineError: a server did not.
        """
        lives = self._num_restarts()
        for url in [url for url in self._given if lives.get(url) != self._lives.get(url)]:
            del self._given[url]

        async def take(server: SGLangServer) -> None:
            await server.resume_memory_occupation(tags)
            self._given[server.url].difference_update(tags)

        self._fleet.call([url for url in urls if self._given.get(url, set()).issuperset(tags)], take)


async def _release(server: SGLangServer) -> bool:
    """Whether it is done; a server must be idle for it, and may not know yet of requests that clients gave up."""
    try:
        await server.pause("abort")
        await server.flush_cache()
        await server.release_memory_occupation([*WEIGHTS, *CACHE])
    except ServerUnavailableError as error:
        _log.warning("%s could not release its memory: %s", server.url, error)
        return False
    return True
