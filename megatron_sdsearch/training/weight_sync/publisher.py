"""The order of a publish: pause, send, continue, verify; once more when a server was lost on the way."""

from __future__ import annotations

import logging
import time
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path
from typing import Protocol

import torch.distributed as dist

from megatron_sdsearch.config import RunConfig, SGLangConfig
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.rollout.sglang_api import SGLangServer
from megatron_sdsearch.rollout.sglang_servers import ServerSupervisor
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.weight_sync.agreement import together
from megatron_sdsearch.training.weight_sync.disk import DiskTransport
from megatron_sdsearch.training.weight_sync.distributed import DistributedTransport
from megatron_sdsearch.training.weight_sync.fleet import ServerFleet
from megatron_sdsearch.training.weight_sync.memory import CACHE, WEIGHTS, ColocatedMemory
from megatron_sdsearch.training.weight_sync.tensor import TensorTransport
from megatron_sdsearch.training.weight_sync.verify import verify

_log = logging.getLogger(__name__)
_MAX_ATTEMPTS = 3
_POLL_S = 1.0


class Transport(Protocol):
    """A way for weights to travel."""

    def send(self, policy: Network, fleet: ServerFleet, urls: Sequence[str], version: int) -> None:
        """Give ``urls`` the policy's weights, under the name ``version``. Called on all ranks.

        A rank that fails still takes part in the collectives that gather the weights.

        Raises:
            EngineError, OSError: on any rank. Servers may hold the old weights, the new ones or a mixture, and call it
                what they called it before: what they hold is unknown until a send succeeds.
        """
        ...

    def folder(self, version: int) -> Path | None:
        """Where a server that starts later finds these weights; None when it cannot."""
        ...

    def reset(self) -> None:
        """A send failed: what was set up with the servers may be of no use."""
        ...


def choose_transport(config: RunConfig, parallel: ParallelState) -> Transport:
    """The strategy that ``rollout.sglang.weight_sync`` names."""
    sglang = config.rollout.sglang
    bucket_bytes = sglang.weight_bucket_mb << 20
    if sglang.weight_sync == "disk":
        return DiskTransport(config.run_dir / "weights", config.model.hf_dir, parallel, bucket_bytes)
    if sglang.weight_sync == "tensor":
        return TensorTransport(parallel, bucket_bytes, sglang.tp_size)
    return DistributedTransport(parallel, bucket_bytes, sglang.tp_size, sglang.request_timeout_s)


class WeightPublisher:
    """Brings the servers to the policy's weights. Every rank has one, and calls it together with the others.

    Servers that do not answer are left out: whoever restarts them brings them back with a later version, and clients
    use none that lacks the current one.

    Args:
        urls: of all servers.
        transport: how weights travel.
        parallel: of the trainer; its first rank gives the orders.
        config: ``request_timeout_s``, ``down_timeout_s``, ``verify_every``, ``tensor`` and ``colocated`` are read.
        supervisor: of own servers, on the first rank.
    """

    def __init__(
        self,
        urls: Sequence[str],
        transport: Transport,
        parallel: ParallelState,
        config: SGLangConfig,
        supervisor: ServerSupervisor | None = None,
    ) -> None:
        self._fleet = ServerFleet(urls, timeout_s=config.request_timeout_s)
        self._transport = transport
        self._parallel = parallel
        self._config = config
        self._supervisor = supervisor
        self._num_published = 0
        self._memory = ColocatedMemory(self._fleet, supervisor.snapshot if supervisor is not None else dict)

    def publish(self, policy: Network, version: int) -> None:
        """After it every server that answers holds exactly ``policy``, under the name ``version``.

        Raises:
            EngineError: on every rank: no server answers within ``down_timeout_s``, none could be given the weights,
                or one holds others than it was given.
        """
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            urls = self._targets()
            try:
                self._send(policy, urls, version)
                self._verify(policy, urls, is_due=attempt > 1)
                break
            except EngineError as error:
                self._transport.reset()
                if attempt == _MAX_ATTEMPTS:
                    raise EngineError(f"version {version} could not be published: {error}") from error
                _log.warning("publishing version %d failed (attempt %d): %s", version, attempt, error)
        self._num_published += 1
        if self._supervisor is not None:
            self._supervisor.set_weights(self._transport.folder(version), version)

    def release_memory(self) -> None:
        """Colocated servers give their memory to the trainer until the next publish."""
        if self._config.colocated:
            together(self._parallel, self._memory.release if self._parallel.is_main else lambda: None)

    def close(self) -> None:
        """Close connections; the servers are somebody else's."""
        self._fleet.close()

    def _send(self, policy: Network, urls: Sequence[str], version: int) -> None:
        # Nothing is being sampled now, but for requests that a client gave up and the server does not know yet.
        together(self._parallel, lambda: self._on_main(urls, lambda server: server.pause("abort")))
        self._resume(urls, WEIGHTS)
        together(self._parallel, lambda: self._transport.send(policy, self._fleet, urls, version))
        self._resume(urls, CACHE)
        together(self._parallel, lambda: self._on_main(urls, lambda server: server.continue_()))

    def _verify(self, policy: Network, urls: Sequence[str], *, is_due: bool) -> None:
        """Every ``verify_every``-th publish, and each that did not succeed at once."""
        every = self._config.verify_every
        if every and (is_due or self._num_published % every == 0):
            tp_size = self._config.tp_size
            together(self._parallel, lambda: verify(policy, self._fleet, urls, self._parallel, server_tp_size=tp_size))

    def _resume(self, urls: Sequence[str], tags: Sequence[str]) -> None:
        if self._config.colocated:
            is_main = self._parallel.is_main
            together(self._parallel, lambda: self._memory.resume(urls, tags) if is_main else None)

    def _targets(self) -> tuple[str, ...]:
        """Servers that answer; waits for the first one."""
        found: list[tuple[str, ...]] = [()]

        def look() -> None:
            deadline = time.monotonic() + self._config.down_timeout_s
            while not (urls := self._fleet.reachable()):
                if self._supervisor is not None:
                    self._supervisor.check()
                if time.monotonic() > deadline:
                    raise EngineError(
                        f"no server has answered for {self._config.down_timeout_s:g} s: {', '.join(self._fleet.urls)}"
                    )
                time.sleep(_POLL_S)
            if self._supervisor is not None:
                self._supervisor.check()
            found[0] = urls

        together(self._parallel, look if self._parallel.is_main else lambda: None)
        dist.broadcast_object_list(found, src=0)
        return found[0]

    def _on_main(self, urls: Sequence[str], work: Callable[[SGLangServer], Awaitable[object]]) -> None:
        if self._parallel.is_main:
            self._fleet.call(urls, work)
