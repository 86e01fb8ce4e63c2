"""Real trainers give their weights to real servers in every way there is, and find out servers that hold others."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import EngineError
from megatron_sdsearch.logging import PhaseTimer
from megatron_sdsearch.model.hf_folder import write_hf_folder
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.sglang.api import SGLangServer, call_servers
from megatron_sdsearch.sglang.publish import WeightPublisher, run_on_all_ranks, verify_hashes, verify_logprobs
from megatron_sdsearch.sglang.transports import WeightHashes, buckets
from megatron_sdsearch.training.policy import Policy
from megatron_sdsearch.training.updates import pack_samples, run_updates
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import make_config, make_samples
from tests.integration.sglang.conftest import Servers, assert_equals_transformers, weight_version

pytestmark = pytest.mark.timeout(600)  # the first test waits for the servers
TP, PP = {"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """What two trainers do.

    Attributes:
        urls: of the servers.
        model: they start from.
        folder: for the run; what was published last is exported to ``folder/new``.
        version: of the first of two publishes.
        layout, weight_sync: of the run.
    """

    urls: tuple[str, ...]
    model: Path
    folder: Path
    version: int
    layout: dict[str, int]
    weight_sync: str

    @property
    def config(self) -> RunConfig:
        # The smallest bucket; verify_every=1 is the default, so that each publish compares all hashes.
        sglang = {"urls": list(self.urls), "weight_sync": self.weight_sync, "weight_bucket_mb": 1}
        return make_config(
            self.model,
            self.folder / "run",
            {"alpha": 0.0, "kl_coef": 0.0},
            parallel=dict(self.layout),
            rollout={"engine": "sglang", "sglang": sglang},
            optimizer={"lr": 1e-2},
        )


class Trainer:
    """One rank of the run."""

    def __init__(self, case: Case) -> None:
        config = case.config
        self.parallel = ParallelState.initialize(config.parallel, seed=1)
        self.policy = Policy(config, self.parallel)
        self.publisher = WeightPublisher(config, case.urls, self.parallel)
        self._config = config

    def learn(self) -> None:
        objective, batch = self._config.objective, pack_samples(make_samples(10), self._config, self.parallel)
        run_updates(self.policy, None, batch, objective, objective.alpha_at(0), PhaseTimer())


def publish_twice(_rank: int, _world_size: int, case: Case) -> int:
    """Publish, learn, publish after an attempt that broke off, export; the number of buckets of one publish."""
    trainer = Trainer(case)
    trainer.publisher.publish(trainer.policy, case.version)
    trainer.learn()
    servers = [SGLangServer(url) for url in case.urls]
    if trainer.parallel.is_main:
        call_servers(servers, be_interrupted)
    trainer.publisher.publish(trainer.policy, case.version + 1)
    verify_logprobs(trainer.policy, servers, trainer.parallel)
    weights, target = trainer.policy.hf_weights(), case.folder / "new"
    write_hf_folder(weights, case.model, target, is_writer=trainer.parallel.is_main)
    return len(list(buckets(trainer.policy.hf_weights(), case.config.rollout.sglang.weight_bucket_mb << 20)))


async def be_interrupted(server: SGLangServer) -> None:
    """What a publish leaves behind when another server dies half-way, or its trainer does."""
    await server.send("/pause_generation", {"mode": "abort"})
    await server.begin_weight_update()


def publish_and_be_deceived(_rank: int, _world_size: int, case: Case, other_model: Path) -> list[str]:
    """Publish, give one server another model under the same version; what hashes and log-probabilities say."""
    trainer = Trainer(case)
    parallel = trainer.parallel
    trainer.publisher.publish(trainer.policy, case.version)
    if parallel.is_main:
        asyncio.run(SGLangServer(case.urls[-1]).load_folder(str(other_model), str(case.version)))
    servers = [SGLangServer(url) for url in case.urls]
    hashes = WeightHashes(is_needed=True)
    for _ in hashes.watch(trainer.policy.hf_weights()):
        pass
    messages = []
    for verify in (
        lambda: verify_hashes(servers, parallel, hashes),
        lambda: verify_logprobs(trainer.policy, servers, parallel),
    ):
        with pytest.raises(EngineError) as info:
            run_on_all_ranks(parallel, verify)
        messages.append(str(info.value))
    return messages


def assert_published(servers: Servers, model: Path, folder: Path, layout: dict[str, int], weight_sync: str) -> None:
    first, second = servers.next_version(), servers.next_version()
    case = Case(urls=servers.urls, model=model, folder=folder, version=first, layout=layout, weight_sync=weight_sync)
    assert min(run_distributed(publish_twice, 2, case)) >= 3
    for url in servers.urls:
        assert weight_version(url) == str(second)
        assert_equals_transformers(url, folder / "new", 0.0)
    with pytest.raises(AssertionError):  # the update was one that can be seen
        assert_equals_transformers(servers.urls[0], model, 0.0)


CASES = [(TP, "disk"), (TP, "tensor"), (TP, "distributed"), (PP, "distributed")]
each_case = pytest.mark.parametrize(("layout", "weight_sync"), CASES, ids=lambda value: str(value))


@each_case
def test_servers_compute_what_the_trainer_has_learned(
    servers: Servers, models: tuple[Path, Path], tmp_path: Path, layout: dict[str, int], weight_sync: str
) -> None:
    assert_published(servers, models[0], tmp_path, layout, weight_sync)


@each_case
def test_an_output_layer_of_its_own_arrives_too(
    untied_servers: Servers, untied_models: tuple[Path, Path], tmp_path: Path, layout: dict[str, int], weight_sync: str
) -> None:
    assert_published(untied_servers, untied_models[0], tmp_path, layout, weight_sync)


def test_a_server_with_other_weights_under_the_right_version_is_found_out(
    servers: Servers, models: tuple[Path, Path], tmp_path: Path
) -> None:
    version = servers.next_version()
    case = Case(urls=servers.urls, model=models[0], folder=tmp_path, version=version, layout=TP, weight_sync="tensor")
    for messages in run_distributed(publish_and_be_deceived, 2, case, models[1]):
        for message, what in zip(messages, ("tensors differ", "log-probabilities differ"), strict=True):
            assert f"{servers.urls[1]} does not hold the published weights" in message
            assert what in message
    assert weight_version(servers.urls[1]) == str(version)
