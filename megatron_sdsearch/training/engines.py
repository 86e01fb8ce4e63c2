"""The rollout engine of a run on one rank, and how it gets the policy's weights."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

import torch
from transformers import AutoModelForCausalLM

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import HEAD_START_S
from megatron_sdsearch.model.hf_config import load_hf_config
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.rollout.embedded import EmbeddedEngine
from megatron_sdsearch.sglang.engine import SGLangEngine
from megatron_sdsearch.sglang.publish import WeightPublisher, run_on_all_ranks
from megatron_sdsearch.sglang.serve import gpus_beside_trainer
from megatron_sdsearch.sglang.servers import ServerSupervisor
from megatron_sdsearch.tokenization.renderer import Renderer
from megatron_sdsearch.training.policy import Network


@dataclass(kw_only=True)
class PolicyEngine:
    """An engine that samples from the policy. Every rank has one; all methods are collectives.

    Attributes:
        engine: for this rank's rollouts; the collector closes it.
        publisher: of servers; None if the engine itself holds the weights.
        supervisor: of servers, on the first rank.
    """

    engine: EmbeddedEngine | SGLangEngine
    publisher: WeightPublisher | None = None
    supervisor: ServerSupervisor | None = None

    def publish(self, policy: Network, version: int) -> None:
        """Give the engine the weights of ``policy``, as ``version``: all rollouts from here on use them.

        Raises:
            EngineError: on every rank: publishing failed.
        """
        if isinstance(self.engine, EmbeddedEngine):
            self.engine.load_weights(policy.hf_weights(), version)
        elif self.publisher is not None:
            self.publisher.publish(policy, version)
            self.engine.policy_version = version

    def release_memory(self) -> None:
        """Let colocated servers release their memory; no rollouts until the next publish."""
        if self.publisher is not None:
            self.publisher.release_memory()

    def take_counts(self) -> dict[str, int]:
        """Return this rank's counts since the last call, by metric name; they add up over ranks.

        Restarts count from the start of the run, on the first rank.
        """
        if not isinstance(self.engine, SGLangEngine):
            return {}
        restarts = sum(self.supervisor.restart_counts().values()) if self.supervisor is not None else 0
        return self.engine.take_counts() | {"engine/num_restarts": restarts}

    def close(self) -> None:
        """End own servers."""
        if self.supervisor is not None:
            self.supervisor.close()


def start_engine(config: RunConfig, renderer: Renderer, parallel: ParallelState) -> PolicyEngine:
    """Start the engine of ``rollout.engine``, ready for the first publish.

    Raises:
        EngineError, ConfigError: on every rank: a server does not start, does not answer, or does not fit the run.
    """
    hf_config = load_hf_config(config.model.hf_dir)
    longest = config.longest_rollout.num_tokens
    if config.rollout.engine == "embedded":
        dtype = getattr(torch, config.model.dtype)  # not config.json's
        model = AutoModelForCausalLM.from_config(hf_config, dtype=dtype).to(parallel.device).eval()
        return PolicyEngine(engine=EmbeddedEngine(model, renderer.token_bytes, renderer.eos_ids, longest))
    sglang = config.rollout.sglang
    supervisor: ServerSupervisor | None = None

    def start_servers() -> tuple[str, ...]:
        nonlocal supervisor
        if not parallel.is_main:
            return ()
        supervisor = ServerSupervisor(config, gpus=gpus_beside_trainer(sglang))
        supervisor.start()
        return supervisor.urls

    async def raise_root_cause() -> None:
        # Rank 0 has the servers' logs, so the others wait for it to report first.
        if supervisor is not None:
            supervisor.check()
        else:
            await asyncio.sleep(HEAD_START_S)

    urls = run_on_all_ranks(parallel, start_servers)[0]
    engine = SGLangEngine(
        urls,
        renderer.token_bytes,
        renderer.eos_ids,
        hf_config.vocab_size,
        longest,
        sglang,
        deterministic=parallel.device.type == "cuda",
        raise_root_cause=raise_root_cause,
    )
    publisher = WeightPublisher(config, urls, parallel, supervisor)
    return PolicyEngine(engine=engine, publisher=publisher, supervisor=supervisor)
