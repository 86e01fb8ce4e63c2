"""A publish: pause, send, continue, verify; again when a server was lost on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

import torch

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import ConfigError, EngineError, ServerUnavailableError, StorageError
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.sglang.api import SGLangServer, call_servers
from megatron_sdsearch.sglang.servers import ServerSupervisor
from megatron_sdsearch.sglang.transports import Step, choose_transport
from megatron_sdsearch.sglang.verify import WeightHashes, verify_hashes, verify_logprobs

if TYPE_CHECKING:
    from megatron_sdsearch.training.policy import Network

T = TypeVar("T")
_log = logging.getLogger(__name__)

_MAX_ATTEMPTS = 3
_POLL_S = 1.0
_PROBE_TIMEOUT_S = 5.0
_WEIGHTS = ("weights",)
# After the weights: the buckets that bring them and the cache need not fit at the same time.
_CACHE = ("kv_cache", "cuda_graph")


def run_on_all_ranks(parallel: ParallelState, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank, wait for all, and return the results in rank order.

    Raises:
        EngineError: on every rank, when ``work`` raised EngineError, StorageError or OSError on any: all messages, with
            each rank's name unless all ranks give the same one.
        ConfigError: on every rank, when ``work`` raised it on any: the first one.
    """
    result: T | None = None
    failure, refusal = "", None
    try:
        result = work()
    except (EngineError, StorageError, OSError) as error:
        failure = str(error) or repr(error)
    except ConfigError as error:
        refusal = (error.field, error.problem, error.fix)
    results, failures, refusals = zip(*parallel.all_gather_object((result, failure, refusal)), strict=True)
    if any(refusals):
        raise ConfigError(*next(filter(None, refusals)))
    if any(failures):
        named = [f"rank {rank}: {message}" for rank, message in enumerate(failures) if message]
        raise EngineError(failures[0] if len(set(failures)) == 1 else "; ".join(named))
    return list(results)


class WeightPublisher:
    """Brings the servers to the policy's weights. Every rank has one, and calls it together with the others.

    Servers that do not answer are left out: what restarts them brings them back with a later version, and engines use
    none that lacks the current one.

    Args:
        config: of the run.
        urls: of all servers.
        parallel: ranks of the trainer; the first one gives the orders.
        supervisor: of the servers, on the first rank.

    Attributes:
        transport: how weights travel.
    """

    def __init__(
        self,
        config: RunConfig,
        urls: Sequence[str],
        parallel: ParallelState,
        supervisor: ServerSupervisor | None = None,
    ) -> None:
        self.transport = choose_transport(config, parallel)
        self._config = config.rollout.sglang
        self._servers = [SGLangServer(url, timeout_s=self._config.request_timeout_s) for url in urls]
        self._parallel = parallel
        self._supervisor = supervisor
        self._num_published = 0
        # SGLang's scheduler dies of a request to take back memory that it has not released: for each kind of memory,
        # the servers that still owe it, with their number of restarts then. A restarted one has all of its memory.
        self._released: dict[tuple[str, ...], dict[str, int]] = {}

    def publish(self, policy: Network, version: int) -> None:
        """Give every server that answers exactly ``policy``, under the name ``version``.

        Raises:
            EngineError: on every rank: no server answers within ``down_timeout_s``, none could be given the weights,
                or one holds others than it was given.
        """
        if self._config.colocated:
            torch.cuda.empty_cache()  # what torch keeps for itself, servers cannot take back
        every = self._config.verify_every
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            urls = run_on_all_ranks(self._parallel, self._wait_for_servers)[0]
            # Also what did not succeed at once: a server that failed may hold anything.
            is_verified = every > 0 and (attempt > 1 or self._num_published % every == 0)
            try:
                for step in self._steps(policy, version, urls, is_verified=is_verified):
                    run_on_all_ranks(self._parallel, step)
                break
            except EngineError as error:
                self.transport.reset()
                if attempt == _MAX_ATTEMPTS:
                    raise EngineError(f"version {version} could not be published: {error}") from error
                _log.warning("publishing version %d failed (attempt %d): %s", version, attempt, error)
        self._num_published += 1
        if self._supervisor is not None:
            self._supervisor.set_weights(self.transport.folder, version)

    def release_memory(self) -> None:
        """Let colocated servers give their memory to the trainer until the next publish."""
        if self._config.colocated:
            run_on_all_ranks(self._parallel, self._release_memory)

    def _steps(self, policy: Network, version: int, urls: Sequence[str], *, is_verified: bool) -> list[Step]:
        """Return what all ranks do in turn; each step ends with all ranks knowing whether it succeeded."""
        parallel = self._parallel
        servers = [server for server in self._servers if server.url in urls]
        commanded = servers if parallel.is_main else []
        # A server of several ranks hashes shards, and on a GPU its hash is a kernel's.
        has_comparable_hashes = parallel.device.type == "cpu" and self._config.tp_size == 1
        hashes = WeightHashes(is_needed=is_verified and has_comparable_hashes)

        def pause() -> None:
            # Nothing is being sampled now, but for requests that a client gave up and the server does not know yet.
            call_servers(commanded, lambda server: server.send("/pause_generation", {"mode": "abort"}))
            self._resume_memory(commanded, _WEIGHTS)

        def resume() -> None:
            self._resume_memory(commanded, _CACHE)
            call_servers(commanded, lambda server: server.send("/continue_generation", {}))

        def verify() -> None:
            if hashes.is_needed:
                verify_hashes(commanded, parallel, hashes)
            else:
                verify_logprobs(policy, commanded, parallel)

        steps = [pause, *self.transport.steps(policy, servers, version, hashes), resume]
        return [*steps, verify] if is_verified else steps

    def _wait_for_servers(self) -> list[str]:
        """Return the urls of servers that answer, on the first rank; waits for the first one."""
        deadline = time.monotonic() + self._config.down_timeout_s
        while self._parallel.is_main:
            servers = self._reachable()
            if self._supervisor is not None:
                self._supervisor.check()
            if servers:
                return [server.url for server in servers]
            if time.monotonic() > deadline:
                all_urls = ", ".join(server.url for server in self._servers)
                raise EngineError(f"no server has answered for {self._config.down_timeout_s:g} s: {all_urls}")
            time.sleep(_POLL_S)
        return []

    def _reachable(self) -> list[SGLangServer]:
        async def answers(server: SGLangServer) -> bool:
            try:
                await server.call("/model_info", timeout_s=_PROBE_TIMEOUT_S)
            except EngineError:
                return False
            return True

        return [s for s, is_there in zip(self._servers, call_servers(self._servers, answers), strict=True) if is_there]

    # Memory of colocated servers

    def _release_memory(self) -> None:
        """Let every server that answers release all it can; one that is lost meanwhile has none any more."""
        if not self._parallel.is_main:
            return

        async def release(server: SGLangServer) -> bool:
            try:  # a server must be idle for it, and may not know yet of requests that clients gave up
                await server.send("/pause_generation", {"mode": "abort"})
                await server.send("/flush_cache", {})
                await server.send("/release_memory_occupation", {"tags": [*_WEIGHTS, *_CACHE]})
            except ServerUnavailableError as error:
                _log.warning("%s could not release its memory: %s", server.url, error)
                return False
            return True

        restarts = self._restart_counts()
        servers = self._reachable()
        has_released = zip(servers, call_servers(servers, release), strict=True)
        owed = {server.url: restarts.get(server.url, 0) for server, is_done in has_released if is_done}
        self._released = {_WEIGHTS: dict(owed), _CACHE: dict(owed)}

    def _resume_memory(self, servers: Sequence[SGLangServer], tags: tuple[str, ...]) -> None:
        owed, restarts = self._released.get(tags, {}), self._restart_counts()

        async def resume(server: SGLangServer) -> None:
            await server.send("/resume_memory_occupation", {"tags": list(tags)})
            del owed[server.url]

        call_servers([s for s in servers if owed.get(s.url) == restarts.get(s.url, 0)], resume)

    def _restart_counts(self) -> dict[str, int]:
        return self._supervisor.restart_counts() if self._supervisor is not None else {}
