"""Weights from sharded trainers to fake servers: whole and verified on every layout; a failure reaches all ranks."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import parallel_state
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from megatron_sdsearch.errors import ConfigError, EngineError
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.sglang.publish import WeightPublisher, probe_ids, run_on_all_ranks, trainer_logprobs
from megatron_sdsearch.training.policy import Network
from tests.distributed.launch import run_distributed
from tests.distributed.oracle import VOCAB_SIZE, make_config, make_model
from tests.loopback.fake_sglang import FakeSGLang, running_in_thread
from tests.loopback.fake_weights import FakeWeights

SYNCS = ["disk", "tensor", "distributed"]
Layout = dict[str, object]
ON_TWO: list[Layout] = [{"tensor_model_parallel_size": 2}, {"pipeline_model_parallel_size": 2}, {}]
ON_FOUR: list[Layout] = [{"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2}]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("weight_sync")
    make_model(folder / "tied", "qwen2", is_tied=True)
    make_model(folder / "untied", "qwen3", is_tied=False)
    return folder


class Run:
    """A network on one layout, which the end takes down again."""

    def __init__(self, hf_dir: Path, folder: Path, layout: Layout, **sglang: object) -> None:
        rollout: dict[str, object] = {
            "engine": "sglang",
            "sglang": {"request_timeout_s": 30.0, "down_timeout_s": 30.0, **sglang},
        }
        self.config = make_config(hf_dir, folder / "run", {}, parallel=layout, rollout=rollout)
        self.parallel = ParallelState.initialize(self.config.parallel, seed=1)
        self.network = Network(self.config, self.parallel)

    def publish(self, urls: list[str], version: int) -> str:
        """What it failed with, if it did."""
        publisher = WeightPublisher(self.config, urls, self.parallel)
        publisher.transport.bucket_bytes = 50_000  # the setting's unit is MiB, of which the model has one
        try:
            publisher.publish(self.network, version)
        except EngineError as error:
            return str(error)
        return ""

    def end(self) -> None:
        parallel_state.destroy_model_parallel()


# Exports and probes


def export(rank: int, world_size: int, folder: Path, layouts: list[Layout]) -> list[dict[str, Any]]:
    found = []
    for name in ("tied", "untied"):
        for layout in layouts:
            run = Run(folder / name, folder, layout)
            network, parallel = run.network, run.parallel
            whole = {key: tensor.clone() for key, tensor in network.hf_weights()}
            stage = [(key, tensor.clone()) for key, tensor in network.stage_weights()]
            logprobs = trainer_logprobs(network, probe_ids(VOCAB_SIZE), parallel)
            found.append(
                {"model": name, "stage": parallel.pp_rank, "whole": whole, "parts": stage, "logprobs": logprobs}
            )
            run.end()
    return found


def reference_logprobs(hf_dir: Path) -> Tensor:
    model, ids = AutoModelForCausalLM.from_pretrained(hf_dir), torch.tensor(probe_ids(VOCAB_SIZE))
    with torch.no_grad():
        logp: Tensor = model(ids[None]).logits[0].log_softmax(-1)
    return logp[:-1].gather(1, ids[1:, None])[:, 0]


@pytest.mark.parametrize(("world_size", "layouts"), [(2, ON_TWO), (4, ON_FOUR)], ids=["2 ranks", "4 ranks"])
def test_stages_tile_the_export_and_the_probe_is_transformers(
    folder: Path, world_size: int, layouts: list[Layout]
) -> None:
    by_rank = run_distributed(export, world_size, folder, layouts)
    for cases in zip(*by_rank, strict=True):
        source = load_file(folder / cases[0]["model"] / "model.safetensors")
        expected = reference_logprobs(folder / cases[0]["model"])
        parts: dict[int, list[tuple[str, Tensor]]] = {}
        for case in cases:
            assert {k for k, v in case["whole"].items() if not torch.equal(v, source[k])} == set()
            assert case["whole"].keys() == source.keys()
            torch.testing.assert_close(torch.tensor(case["logprobs"]), expected, rtol=0, atol=1e-4)
            same = parts.setdefault(case["stage"], case["parts"])
            assert [name for name, _ in same] == [name for name, _ in case["parts"]]
        tiled = [pair for stage in sorted(parts) for pair in parts[stage]]
        assert [name for name, _ in tiled] == list(cases[0]["whole"]), "in the order of the whole export"
        assert [name for name, tensor in tiled if not torch.equal(tensor, source[name])] == []


# Publishing


@pytest.fixture
def fakes() -> Iterator[list[FakeSGLang]]:
    with ExitStack() as stack:
        fakes = [FakeSGLang(model_weights=FakeWeights()) for _ in range(2)]
        yield [stack.enter_context(running_in_thread(fake)) for fake in fakes]


def publish(
    rank: int, world_size: int, hf_dir: Path, folder: Path, layouts: list[Layout], urls: list[str]
) -> list[str]:
    failures = []
    for version, (layout, sync) in enumerate(itertools.product(layouts, SYNCS), 1):
        run = Run(hf_dir, folder, layout, weight_sync=sync)
        failures.append(run.publish(urls, version))
        run.end()
    return failures


@pytest.mark.parametrize("name", ["tied", "untied"])
def test_servers_hold_the_model_after_a_publish_of_any_kind_on_any_layout(
    folder: Path, fakes: list[FakeSGLang], name: str
) -> None:
    """The publish compares hashes itself; a last look at the bytes shows that it compared the right ones."""
    outcomes = run_distributed(publish, 2, folder / name, folder, ON_TWO, [fake.url for fake in fakes])
    num_publishes = len(ON_TWO) * len(SYNCS)
    assert outcomes == [[""] * num_publishes] * 2
    source = load_file(folder / name / "model.safetensors")
    for fake in fakes:
        versions = [body["weight_version"] for _, body in fake.calls if body.get("weight_version")]
        assert versions == [str(version) for version in range(1, num_publishes + 1)]
        assert fake.model_weights is not None
        held = fake.model_weights.tensors
        assert held.keys() == source.keys()
        assert [name for name in source if not torch.equal(held[name], source[name])] == []


def publish_at_four(rank: int, world_size: int, folder: Path, urls: list[str]) -> str:
    run = Run(folder / "untied", folder, ON_FOUR[0], weight_sync="distributed")
    return run.publish(urls, 5)


def test_each_stage_sends_its_own_layers(folder: Path, fakes: list[FakeSGLang]) -> None:
    assert run_distributed(publish_at_four, 4, folder, [fake.url for fake in fakes]) == [""] * 4
    for fake in fakes:
        groups = [body["group_name"] for route, body in fake.calls if route == "/update_weights_from_distributed"]
        assert len(set(groups)) == 2
        assert groups == sorted(groups, key=groups.index), "one after the other"
        versions = [body.get("weight_version") for route, body in fake.calls if route.endswith("from_distributed")]
        assert versions == [None] * (len(versions) - 1) + ["5"]


# Failures


def lose_a_server(rank: int, world_size: int, folder: Path, urls: list[str], sync: str) -> tuple[str, str]:
    run = Run(folder / "tied", folder, {"pipeline_model_parallel_size": 2}, weight_sync=sync)
    return run.publish(urls, 1), run.publish([*urls, "http://127.0.0.1:9"], 2)


@pytest.mark.parametrize("sync", SYNCS)
def test_a_server_lost_on_the_way_costs_no_rank_its_step(folder: Path, fakes: list[FakeSGLang], sync: str) -> None:
    update = "/update_weights_from_" + sync
    fakes[1].dies_at.add(update)
    assert run_distributed(lose_a_server, 2, folder, [fake.url for fake in fakes], sync) == [("", "")] * 2
    assert fakes[0].version == "2"
    assert fakes[1].version == "0"


def fail(rank: int, world_size: int, folder: Path, urls: list[str]) -> dict[str, str]:
    run = Run(folder / "tied", folder, {"pipeline_model_parallel_size": 2}, weight_sync="tensor", down_timeout_s=0.2)
    found = {"refused": run.publish(urls, 1), "unreachable": run.publish(["http://127.0.0.1:9"], 1)}
    run.config = _with_sync(run.config.model_copy(update={"run_dir": folder / "blocked"}), "disk")
    found["disk"] = run.publish(urls, 1)
    found["agreement"] = _agree(rank, run.parallel)
    run.end()
    return found


def _with_sync(config: Any, sync: str) -> Any:
    sglang = config.rollout.sglang.model_copy(update={"weight_sync": sync})
    return config.model_copy(update={"rollout": config.rollout.model_copy(update={"sglang": sglang})})


def _agree(rank: int, parallel: ParallelState) -> str:
    """Failures of one rank, of all, of all alike; and a wrong setting stays one."""

    def work(failing: set[int], message: str) -> None:
        if rank in failing:
            raise OSError(message.format(rank))

    messages = []
    for failing, message in (({1}, "rank {} is out"), ({0, 1}, "rank {} is out"), ({0, 1}, "no server")):
        with pytest.raises(EngineError) as caught:
            run_on_all_ranks(parallel, partial(work, failing, message))
        messages.append(str(caught.value))
    assert run_on_all_ranks(parallel, lambda: rank) == [0, 1]

    def mistake() -> None:
        raise ConfigError("a", "is wrong", "fix it")

    with pytest.raises(ConfigError):
        run_on_all_ranks(parallel, mistake)
    return " | ".join(messages)


def test_a_failure_of_one_rank_is_raised_on_all_with_its_message(folder: Path, fakes: list[FakeSGLang]) -> None:
    fakes[1].replies["/update_weights_from_tensor"] = {"success": False, "message": "no room"}
    (folder / "blocked").write_text("a file where the run's folder should be")
    first, second = run_distributed(fail, 2, folder, [fake.url for fake in fakes])
    assert first == second
    refusal = f"{fakes[1].url}/update_weights_from_tensor: no room"
    assert first["refused"] == f"version 1 could not be published: rank 0: {refusal}"
    assert first["unreachable"] == "rank 0: no server has answered for 0.2 s: http://127.0.0.1:9"
    assert "rank 0: [Errno 20] Not a directory" in first["disk"]
    assert first["agreement"].split(" | ") == [
        "rank 1: rank 1 is out",
        "rank 0: rank 0 is out; rank 1: rank 1 is out",
        "no server",
    ]
