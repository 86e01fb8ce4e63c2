"""The rollout engine of a run on one rank, together with what brings the policy's weights to it."""

from __future__ import annotations

import time
from typing import Protocol

import torch
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.rollout.engine import Engine
from megatron_sdsearch.rollout.sglang_client import SGLangEngine
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.own_servers import gpus_beside_trainer, start_servers, supervise
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.weight_sync.agreement import together
from megatron_sdsearch.training.weight_sync.publisher import WeightPublisher, choose_transport

Counts = dict[str, int]
_HEAD_START_S = 5.0


class PolicyEngine(Protocol):
    """An engine that samples from the policy. Every rank has one; all methods are called on all ranks together.

    Attributes:
        engine: for this rank's rollouts; whoever collects with it closes it.
    """

    engine: Engine

    def publish(self, policy: Network, version: int) -> None:
        """After it the engine samples from exactly this policy, and calls it ``version``.

        Raises:
            EngineError: on every rank, when that cannot be.
        """
        ...

    def rest(self) -> None:
        """Nothing is sampled until the next publish."""
        ...

    def explain(self) -> None:
        """The engine has failed on this rank, which may know better than the engine why; called by that rank alone.

        Raises:
            EngineError: the cause.
        """
        ...

    def take_counts(self) -> Counts:
        """What happened on this rank since the last call, under names of metrics; adds up over ranks."""
        ...

    def close(self) -> None:
        """End what was started, but for ``engine``."""
        ...


def start_engine(config: RunConfig, renderer: Renderer, parallel: ParallelState) -> PolicyEngine:
    """The engine that ``rollout.engine`` names, ready for the first publish.

    Raises:
        EngineError: on every rank: servers do not start, or do not answer.
    """
    if config.rollout.engine == "embedded":
        return EmbeddedPolicyEngine(config, renderer, parallel)
    return SGLangPolicyEngine(config, renderer, parallel)


class EmbeddedPolicyEngine:
    """A transformers model in this very process. Implements ``PolicyEngine``."""

    def __init__(self, config: RunConfig, renderer: Renderer, parallel: ParallelState) -> None:
        dtype = getattr(torch, config.model.dtype)  # the policy's, whatever config.json says the folder was saved in
        model = AutoModelForCausalLM.from_config(load_hf_config(config.model.hf_dir), dtype=dtype)
        model.to(parallel.device).eval()
        self._embedded = EmbeddedEngine(
            model, renderer.token_bytes, renderer.eos_ids, config.longest_rollout.num_tokens
        )
        self.engine: Engine = self._embedded

    def publish(self, policy: Network, version: int) -> None:
        """Copy whole tensors, one at a time."""
        self._embedded.load_weights(policy.hf_weights(), version)

    def rest(self) -> None:
        """Nothing to give back."""

    def explain(self) -> None:
        """The engine has said it all."""

    def take_counts(self) -> Counts:
        """Nothing to count."""
        return {}

    def close(self) -> None:
        """Nothing was started."""


class SGLangPolicyEngine:
    """SGLang servers, started by the first rank or somebody else's. Implements ``PolicyEngine``."""

    def __init__(self, config: RunConfig, renderer: Renderer, parallel: ParallelState) -> None:
        sglang = config.rollout.sglang
        self._parallel = parallel
        self._is_colocated = sglang.colocated
        gpus = gpus_beside_trainer(sglang)
        self._supervisor = supervise(config, gpus=gpus) if parallel.is_main else None
        supervisor = self._supervisor
        together(parallel, lambda: start_servers(supervisor, config) if supervisor is not None else None)
        urls = next(u for u in parallel.all_gather_object(supervisor.urls if supervisor is not None else ()) if u)
        self._client = SGLangEngine(
            urls,
            renderer.token_bytes,
            renderer.eos_ids,
            load_hf_config(config.model.hf_dir).vocab_size,
            config.longest_rollout.num_tokens,
            sglang,
            deterministic=parallel.device.type == "cuda",
        )
        self.engine: Engine = self._client
        self._publisher = WeightPublisher(urls, choose_transport(config, parallel), parallel, sglang, supervisor)

    def publish(self, policy: Network, version: int) -> None:
        """See ``WeightPublisher``."""
        if self._is_colocated:
            torch.cuda.empty_cache()  # what torch keeps for itself, servers cannot take back
        self._publisher.publish(policy, version)
        self._client.set_policy_version(version)

    def rest(self) -> None:
        """Colocated servers give their memory up."""
        self._publisher.release_memory()

    def explain(self) -> None:
        """The first rank has the servers' logs; the others let it speak first, for it starves when they do."""
        if self._supervisor is not None:
            self._supervisor.check()
        else:
            time.sleep(_HEAD_START_S)

    def take_counts(self) -> Counts:
        """Retries and moves of this rank's client; restarts so far, by the first rank."""
        stats = self._client.take_stats()
        counts = {
            "engine/num_retries": stats.num_retries,
            "engine/num_moved": stats.num_moved,
            "engine/num_wrong_version": stats.num_wrong_version,
            "engine/num_prompt_tokens": sum(server.num_prompt_tokens for server in stats.servers),
            "engine/num_cached_tokens": sum(server.num_cached_tokens for server in stats.servers),
        }
        restarts = sum(self._supervisor.snapshot().values()) if self._supervisor is not None else 0
        return counts | {"engine/num_restarts": restarts}

    def close(self) -> None:
        """Close the publisher's connections, and end own servers."""
        self._publisher.close()
        if self._supervisor is not None:
            self._supervisor.close()
