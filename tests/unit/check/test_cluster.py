"""The cluster that a run is meant for: what is said, what the environment says, what has to be assumed."""

from __future__ import annotations

import pytest
import torch

from megatron_sdsearch.check.run import run_checks
from megatron_sdsearch.check.run_under_test import ClusterOptions, find_cluster
from megatron_sdsearch.config import RunConfig, load_config
from tests.unit.check.tiny_run import TinyRun, only

SLURM = {"SLURM_JOB_NUM_NODES": "4", "SLURM_GPUS_PER_NODE": "h100:8"}


@pytest.fixture
def config(tiny: TinyRun) -> RunConfig:
    return load_config(
        tiny.config, ["parallel.tensor_model_parallel_size=2", "parallel.pipeline_model_parallel_size=2"]
    )


def test_the_command_line_comes_first(config: RunConfig) -> None:
    options = ClusterOptions(num_nodes=2, gpus_per_node=6, ranks_per_node=4)
    cluster = find_cluster(config, options, SLURM)
    assert (cluster.num_nodes, cluster.gpus_per_node, cluster.ranks_per_node, cluster.world_size) == (2, 6, 4, 8)
    assert cluster.has_gpu
    assert "assumed" not in cluster.description
    assert (
        cluster.description
        == "2 nodes (--nodes), 6 GPUs each (--gpus-per-node), 4 trainer processes per node (--nproc-per-node)"
    )


def test_then_slurm(config: RunConfig) -> None:
    gpu = ClusterOptions(device="gpu")
    cluster = find_cluster(config, gpu, SLURM)
    assert (cluster.num_nodes, cluster.gpus_per_node, cluster.ranks_per_node, cluster.has_gpu) == (4, 8, 8, True)
    assert find_cluster(config, gpu, {"SLURM_GPUS_ON_NODE": "2"}).gpus_per_node == 2


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU assumes")
def test_gpus_that_a_run_on_cpus_would_not_use_are_found(tiny: TinyRun, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_GPUS_ON_NODE", "8")
    report = run_checks(tiny.config)
    finding = only([f for f in report.findings if f.severity != "note"])
    assert (finding.severity, finding.field) == ("warning", "model.dtype")
    assert "8 GPUs per node" in finding.problem
    assert tiny.found(device="cpu") == []


def test_then_torchrun(config: RunConfig) -> None:
    cluster = find_cluster(config, ClusterOptions(device="cpu"), {"LOCAL_WORLD_SIZE": "4", "GROUP_WORLD_SIZE": "3"})
    assert (cluster.num_nodes, cluster.ranks_per_node, "assumed" in cluster.description) == (3, 4, False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what a machine without a GPU assumes")
@pytest.mark.parametrize(("dtype", "gpus"), [("float32", 0), ("bfloat16", 4)])
def test_else_the_smallest_cluster_for_the_layout_is_assumed(config: RunConfig, dtype: str, gpus: int) -> None:
    model = config.model.model_copy(update={"dtype": dtype})
    cluster = find_cluster(config.model_copy(update={"model": model}), ClusterOptions(), {})
    assert (cluster.num_nodes, cluster.ranks_per_node, cluster.gpus_per_node) == (1, 4, gpus)
    assert "assumed: the fewest that parallel.* allows" in cluster.description
    assert f"assumed from model.dtype={dtype}" in cluster.description


def test_own_servers_take_gpus_from_the_trainers(tiny: TinyRun) -> None:
    own = ("rollout.engine=sglang", "rollout.sglang.num_servers=2", "rollout.sglang.tp_size=2")
    options = ClusterOptions(gpus_per_node=8)
    for more, ranks in (("seed=1", 4), ("rollout.sglang.colocated=true", 8), ("rollout.sglang.urls=[http://h:1]", 8)):
        assert find_cluster(load_config(tiny.config, [*own, more]), options, {}).ranks_per_node == ranks


def test_nodes_for_sglang_are_no_nodes_of_trainers(tiny: TinyRun) -> None:
    own = load_config(tiny.config, ["rollout.engine=sglang", "rollout.sglang.num_servers=2"])
    cluster = find_cluster(own, ClusterOptions(device="gpu"), SLURM | {"SDSEARCH_SGLANG_NODES": "1"})
    assert (cluster.num_nodes, cluster.num_sglang_nodes, cluster.ranks_per_node, cluster.world_size) == (4, 1, 8, 24)
    assert cluster.description.endswith(", and 1 with SGLang")
    assert find_cluster(own, ClusterOptions(device="gpu", num_nodes=5, num_sglang_nodes=3), SLURM).world_size == 16
    sglang = (
        "rollout.engine=sglang",
        "model.dtype=bfloat16",
        "data.questions_per_step=8",
        "rollout.sglang.command=[sh]",
    )
    finding = only(tiny.found(*sglang, num_nodes=3, num_sglang_nodes=3, gpus_per_node=8))
    assert "3 of 3 nodes leave none to train on" in finding.problem


def test_no_gpus_is_said_by_their_number(config: RunConfig) -> None:
    assert not find_cluster(config, ClusterOptions(gpus_per_node=0), SLURM).has_gpu
