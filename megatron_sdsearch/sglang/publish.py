"""Publishes weights to servers: pause, send, resume, verify; tries again if a server was lost.

Verification on CPU is exact: SGLang's hashes of all its tensors are compared with hashes computed while sending. On
GPUs SGLang hashes with a kernel of its own, so log-probabilities of a fixed sequence are compared instead.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch

from megatron_sdsearch.batching.packing import pack
from megatron_sdsearch.config import ObjectiveConfig, RunConfig
from megatron_sdsearch.errors import ConfigError, EngineError, ServerUnavailableError, StorageError
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import TrainingSample
from megatron_sdsearch.sglang.api import SGLangServer, call_servers
from megatron_sdsearch.sglang.servers import ServerSupervisor
from megatron_sdsearch.sglang.transports import TRANSPORTS, Step, WeightHashes

if TYPE_CHECKING:
    from megatron_sdsearch.training.policy import Network

T = TypeVar("T")
_log = logging.getLogger(__name__)

NUM_PROBE_TOKENS = 64
# Largest difference of a token's log-probability in nats: kernels sum in different orders.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
_MAX_ATTEMPTS = 3
_POLL_S = 1.0
_PROBE_TIMEOUT_S = 5.0
_WEIGHTS = ("weights",)
# Taken back after the weights, so that buckets of weights and the cache need not fit at the same time.
_CACHE = ("kv_cache", "cuda_graph")


def run_on_all_ranks(parallel: ParallelState, work: Callable[[], T]) -> list[T]:
    """Run ``work`` on every rank, wait for all, and return the results in rank order.

    Raises:
        EngineError: on every rank if ``work`` raised EngineError, StorageError or OSError on any: all messages, each
            with its rank unless all are the same.
        ConfigError: on every rank if ``work`` raised it on any: the first one.
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
    """Gives the servers the policy's weights. Every rank has one; all methods are collectives.

    Servers that do not answer are skipped: engines do not use them until a later publish or their supervisor has
    given them the current version.

    Args:
        config: of the run.
        urls: of all servers.
        parallel: ranks of the trainer; the first one commands the servers.
        supervisor: of the servers, on the first rank.

    Attributes:
        transport: sends the weights.
    """

    def __init__(
        self,
        config: RunConfig,
        urls: Sequence[str],
        parallel: ParallelState,
        supervisor: ServerSupervisor | None = None,
    ) -> None:
        self.transport = TRANSPORTS[config.rollout.sglang.weight_sync](config, parallel)
        self._config = config.rollout.sglang
        self._servers = [SGLangServer(url, timeout_s=self._config.request_timeout_s) for url in urls]
        self._parallel = parallel
        self._supervisor = supervisor
        self._restart_counts = supervisor.restart_counts if supervisor is not None else dict[str, int]
        self._num_published = 0
        # By tags of memory: the servers that have released it, with their number of restarts then. SGLang's scheduler
        # dies on a request to resume memory that it has not released, and a restarted server has released none.
        self._released: dict[tuple[str, ...], dict[str, int]] = {}

    def publish(self, policy: Network, version: int) -> None:
        """Give every server that answers the weights of ``policy``, as ``version``.

        Raises:
            EngineError: on every rank: no server answers within ``down_timeout_s``, sending failed, or a server holds
                other weights than were sent.
        """
        if self._config.colocated:
            torch.cuda.empty_cache()  # servers cannot take back what torch has cached
        every = self._config.verify_every
        for attempt in range(1, _MAX_ATTEMPTS + 1):
            urls = run_on_all_ranks(self._parallel, self._wait_for_servers)[0]
            # A retry is always verified: a server that failed may hold anything.
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
        """Let colocated servers release their memory to the trainer until the next publish."""
        if self._config.colocated:
            run_on_all_ranks(self._parallel, self._release_memory)

    def _steps(self, policy: Network, version: int, urls: Sequence[str], *, is_verified: bool) -> list[Step]:
        """Return the steps of a publish, which all ranks run in order."""
        parallel = self._parallel
        servers = [server for server in self._servers if server.url in urls]
        commanded = servers if parallel.is_main else []
        # A server of several ranks hashes shards, and a GPU hashes with a kernel.
        has_comparable_hashes = parallel.device.type == "cpu" and self._config.tp_size == 1
        hashes = WeightHashes(is_needed=is_verified and has_comparable_hashes)

        def pause() -> None:
            # Only requests that a client has just given up can still be open.
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
        """Wait until a server answers; return the urls of all that do, on the first rank only."""
        if not self._parallel.is_main:
            return []
        deadline = time.monotonic() + self._config.down_timeout_s
        while True:
            servers = self._reachable()
            if self._supervisor is not None:
                self._supervisor.check()
            if servers:
                return [server.url for server in servers]
            if time.monotonic() > deadline:
                all_urls = ", ".join(server.url for server in self._servers)
                raise EngineError(f"no server has answered for {self._config.down_timeout_s:g} s: {all_urls}")
            time.sleep(_POLL_S)

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
        """Let every server that answers release its memory; one that is lost meanwhile holds none."""
        if not self._parallel.is_main:
            return

        async def release(server: SGLangServer) -> bool:
            try:  # a server must be idle for this, but requests that clients gave up may still be open
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
        released = {server.url: restarts.get(server.url, 0) for server, is_done in has_released if is_done}
        self._released = {_WEIGHTS: dict(released), _CACHE: dict(released)}

    def _resume_memory(self, servers: Sequence[SGLangServer], tags: tuple[str, ...]) -> None:
        released, restarts = self._released.get(tags, {}), self._restart_counts()

        async def resume(server: SGLangServer) -> None:
            await server.send("/resume_memory_occupation", {"tags": list(tags)})
            del released[server.url]

        call_servers([s for s in servers if released.get(s.url) == restarts.get(s.url, 0)], resume)


def verify_hashes(servers: Sequence[SGLangServer], parallel: ParallelState, hashes: WeightHashes) -> None:
    """Compare SGLang's hashes of all its tensors with those of the tensors sent; exact. A collective.

    Args:
        servers: to compare; empty on all ranks but the first.
        parallel: ranks of the trainer.
        hashes: of the tensors that this rank has gathered.

    Raises:
        EngineError: on the first rank: a server holds other weights.
    """
    expected: dict[str, str] = {}
    for of_rank in parallel.all_gather_object(hashes.by_name()):  # pipeline stages may have sent their own
        expected |= of_rank
    answers = call_servers(servers, lambda server: server.call("/weights_checker", {"action": "checksum"}))
    for server, answer in zip(servers, answers, strict=True):
        held = answer["ranks"][0]["checksums"]
        wrong = sorted(name for name in expected.keys() | held.keys() if expected.get(name) != held.get(name))
        if wrong:
            raise EngineError(
                f"{server.url} does not hold the published weights: {len(wrong)} of {len(expected)} tensors differ, "
                f"the first is {wrong[0]}"
            )


def verify_logprobs(policy: Network, servers: Sequence[SGLangServer], parallel: ParallelState) -> None:
    """Compare log-probabilities of a fixed sequence, within ``TOLERANCE``. Raises as ``verify_hashes``."""
    ids = probe_ids(policy.hf_config.vocab_size)
    expected = trainer_logprobs(policy, ids, parallel)
    limit = TOLERANCE[next(policy.gpt.parameters()).dtype]
    request = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,  # bypasses the prefix cache
    }
    answers = call_servers(servers, lambda server: server.call("/generate", request))
    for server, answer in zip(servers, answers, strict=True):
        served = [entry[0] for entry in answer["meta_info"]["input_token_logprobs"][1:]]
        gap = float(np.abs(np.array(served) - np.array(expected)).max())
        if not gap <= limit:
            raise EngineError(
                f"{server.url} does not hold the published weights: log-probabilities differ by up to {gap:.4g} nats"
            )


def probe_ids(vocab_size: int) -> list[int]:
    """Return the ids of the fixed sequence."""
    return [int(i) for i in np.random.Generator(np.random.PCG64(0)).integers(0, vocab_size, NUM_PROBE_TOKENS)]


def trainer_logprobs(policy: Network, ids: Sequence[int], parallel: ParallelState) -> list[float]:
    """Return the policy's log-probabilities (nats, temperature 1) of all ids but the first, on every rank."""
    array = np.array(ids)
    is_label = np.arange(len(ids)) < len(ids) - 1
    sample = TrainingSample(
        sample_id="probe",
        token_ids=array,
        labels=np.append(array[1:], 0),
        loss_mask=is_label,
        distill_mask=np.zeros(len(ids), dtype=np.bool_),
        rollout_logprobs=np.zeros(len(ids)),
        advantage=1.0,
        prompt_length=1,
    )
    batch = pack(
        [sample],
        num_ranks=1,  # every replica computes it
        rank=0,
        num_minibatches=1,
        max_tokens=len(ids) + parallel.alignment,
        alignment=parallel.alignment,
        equal_lengths=parallel.pp_size > 1,
        objective=ObjectiveConfig(),
    )
    values = policy.collect(
        batch.minibatches[0].student,
        lambda logits, part: replace(logits, temperature=1.0).logprobs(part),
    )
    own = values[0].tolist() if values else None
    return next(found for found in parallel.all_gather_object(own) if found is not None)
