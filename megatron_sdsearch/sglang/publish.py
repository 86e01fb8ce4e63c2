"""A publish: pause, send, continue, verify; again when a server was lost on the way.

Servers are proven to hold what the trainer holds. On CPU exactly: SGLang's hashes of all its tensors, computed here
while the tensors are sent. On GPUs its hash is a kernel's, so there log-probabilities of a fixed sequence are compared
instead.
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
# Largest difference of one token's log-probability, nats: kernels sum in other orders.
TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 0.5}
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
        self.transport = TRANSPORTS[config.rollout.sglang.weight_sync](config, parallel)
        self._config = config.rollout.sglang
        self._servers = [SGLangServer(url, timeout_s=self._config.request_timeout_s) for url in urls]
        self._parallel = parallel
        self._supervisor = supervisor
        self._restart_counts = supervisor.restart_counts if supervisor is not None else dict[str, int]
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


def verify_hashes(servers: Sequence[SGLangServer], parallel: ParallelState, hashes: WeightHashes) -> None:
    """Compare SGLang's own hashes of all its tensors with those of what was sent: exact; a collective.

    Args:
        servers: to ask; those of the first rank count.
        parallel: ranks of the trainer.
        hashes: of what this rank has gathered.

    Raises:
        EngineError: on the first rank: a server holds something else.
    """
    expected: dict[str, str] = {}
    for of_rank in parallel.all_gather_object(hashes.by_name()):  # each pipeline stage may have sent its own
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
    """Compare what servers compute on a fixed sequence, within ``TOLERANCE``. Raises as ``verify_hashes``."""
    ids = probe_ids(policy.hf_config.vocab_size)
    expected = trainer_logprobs(policy, ids, parallel)
    limit = TOLERANCE[next(policy.gpt.parameters()).dtype]
    request = {
        "input_ids": ids,
        "sampling_params": {"temperature": 0.0, "max_new_tokens": 0},
        "return_logprob": True,
        "logprob_start_len": 0,  # everything afresh: the prefix cache is not asked
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
    """Return the fixed sequence."""
    return [int(i) for i in np.random.Generator(np.random.PCG64(0)).integers(0, vocab_size, NUM_PROBE_TOKENS)]


def trainer_logprobs(policy: Network, ids: Sequence[int], parallel: ParallelState) -> list[float]:
    """Return log-probabilities (nats, temperature 1) of all ids but the first under the policy, on every rank."""
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
        num_ranks=1,  # every replica reads it
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
