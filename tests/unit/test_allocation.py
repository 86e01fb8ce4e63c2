"""Which nodes and GPUs train and which serve, and what does not fit them."""

from __future__ import annotations

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.allocation import (
    Allocation,
    Roles,
    Servers,
    allocation_problems,
    assign_roles,
    servers_on_node,
)
from megatron_sdsearch.config import ParallelConfig, RunConfig, SGLangConfig, parse_config


def config_of(*, dtype: str = "bfloat16", tensor: int = 1, pipeline: int = 1, **sglang: Any) -> RunConfig:
    """Samples from SGLang when something of it is set."""
    return parse_config(
        {
            "run_dir": "runs/x",
            "model": {"hf_dir": "model", "dtype": dtype},
            "parallel": {"tensor_model_parallel_size": tensor, "pipeline_model_parallel_size": pipeline},
            "data": {"train": "train.jsonl"},
            "rollout": {"engine": "sglang" if sglang else "embedded", "sglang": sglang},
            "retrieval": {"corpus": "corpus.jsonl"},
        }
    )


def nodes(num: int, *, gpus: int = 8, serve: int = 0, ranks: int | None = None) -> Allocation:
    return Allocation(num_nodes=num, gpus_per_node=gpus, num_sglang_nodes=serve, ranks_per_node=ranks)


def servers(num: int, tp_size: int = 1, placement: Any = "beside", num_nodes: int = 0) -> Servers:
    return Servers(num=num, tp_size=tp_size, placement=placement, num_nodes=num_nodes)


def fields(config: RunConfig, allocation: Allocation) -> list[str]:
    return [problem.field for problem in allocation_problems(config, allocation)]


CPU: dict[str, Any] = {"dtype": "float32"}
BESIDE: dict[str, Any] = {"num_servers": 2}
COLOCATED: dict[str, Any] = {"colocated": True, "num_servers": 8}
URLS: dict[str, Any] = {"urls": ["http://a:1", "http://b:1"]}


@pytest.mark.parametrize(
    ("settings", "allocation", "train_nodes", "ranks", "expected"),
    [
        ({}, nodes(4), 4, 8, None),
        ({"tensor": 8, "pipeline": 2}, nodes(4), 4, 8, None),
        ({}, nodes(2, ranks=4), 2, 4, None),
        (CPU, nodes(2, gpus=0), 2, 1, None),
        (CPU, nodes(2, gpus=0, ranks=2), 2, 2, None),
        # The first rank starts its own.
        ({"tensor": 2, "num_servers": 2, "tp_size": 2}, nodes(1), 1, 4, servers(2, 2)),
        (BESIDE, nodes(1, ranks=4), 1, 4, servers(2)),
        ({**CPU, **BESIDE}, nodes(1, gpus=0), 1, 1, servers(2)),
        # Nodes that serve hold as many as fit.
        (BESIDE, nodes(4, serve=1), 3, 8, servers(8, num_nodes=1)),
        ({"tp_size": 3}, nodes(4, serve=3), 1, 8, servers(6, 3, num_nodes=3)),
        ({**CPU, **BESIDE}, nodes(3, gpus=0, serve=2), 1, 1, servers(4, num_nodes=2)),
        (COLOCATED, nodes(1), 1, 8, servers(8, 1, "colocated", 1)),
        ({"colocated": True, "tp_size": 2}, nodes(2), 2, 8, servers(8, 2, "colocated", 2)),
        (URLS, nodes(2), 2, 8, servers(2, 1, "attached")),
        ({**URLS, "colocated": True}, nodes(2), 2, 8, servers(2, 1, "colocated")),
    ],
)
def test_roles(
    settings: dict[str, Any], allocation: Allocation, train_nodes: int, ranks: int, expected: Servers | None
) -> None:
    config = config_of(**settings)
    assert allocation_problems(config, allocation) == []
    roles = assign_roles(config, allocation)
    assert roles == Roles(train_nodes=train_nodes, ranks_per_node=ranks, servers=expected)
    assert roles.world_size == train_nodes * ranks


@pytest.mark.parametrize(
    ("settings", "allocation", "field", "message"),
    [
        (BESIDE, nodes(2, serve=2), "SDSEARCH_SGLANG_NODES", "2 of 2 nodes leave none to train on"),
        (BESIDE, nodes(2, serve=3), "SDSEARCH_SGLANG_NODES", "set it to at most 1"),
        (BESIDE, nodes(2), "SDSEARCH_SGLANG_NODES", r"0, .*127\.0\.0\.1.*--sglang-nodes.*colocated"),
        ({}, nodes(2, serve=1), "SDSEARCH_SGLANG_NODES", "1, but the run starts no servers .*rollout.engine=sglang"),
        (URLS, nodes(2, serve=1), "SDSEARCH_SGLANG_NODES", "without rollout.sglang.urls"),
        (COLOCATED, nodes(2, serve=1), "SDSEARCH_SGLANG_NODES", "without .*colocated"),
        ({"tp_size": 16}, nodes(2, serve=1), "rollout.sglang.tp_size", "16 GPUs per server, but nodes have 8"),
        ({"tp_size": 16, "colocated": True}, nodes(2), "rollout.sglang.tp_size", "nodes have 8; lower it"),
        (
            {"num_servers": 8},
            nodes(1),
            "rollout.sglang.num_servers",
            "8 servers x 1 GPUs are more than the 7 of 8 that",
        ),
        ({"num_servers": 4, "tp_size": 2}, nodes(1), "rollout.sglang.num_servers", "colocated=true"),
        (
            {"num_servers": 3},
            nodes(1, ranks=6),
            "rollout.sglang.num_servers",
            "the 2 of 8 that the trainer leaves.*start fewer ranks",
        ),
        ({"num_servers": 1}, nodes(1, ranks=8), "rollout.sglang.num_servers", "the 0 of 8 that"),
        ({"colocated": True, "num_servers": 9}, nodes(1), "rollout.sglang.num_servers", "the 8 of 8 of the trainer"),
        (
            {"colocated": True, "num_servers": 5},
            nodes(1, ranks=4),
            "rollout.sglang.num_servers",
            "the 4 of 8 of the trainer",
        ),
        (
            {},
            nodes(2, ranks=9),
            "--nproc-per-node",
            "9 trainer processes per node, but 8 GPUs.*SDSEARCH_RANKS_PER_NODE",
        ),
        ({"tensor": 8, "pipeline": 3}, nodes(4), "parallel.tensor_model_parallel_size", "= 24 does not divide the 32"),
        ({}, nodes(2, gpus=0), "model.dtype", "without a GPU"),
    ],
)
def test_what_does_not_fit_is_one_problem(
    settings: dict[str, Any], allocation: Allocation, field: str, message: str
) -> None:
    (problem,) = allocation_problems(config_of(**settings), allocation)
    assert problem.field == field
    with pytest.raises(type(problem), match=message):
        raise problem


def test_all_problems_of_an_allocation_are_listed() -> None:
    config = config_of(dtype="float32", tensor=3, num_servers=9)
    assert fields(config, nodes(1, ranks=4)) == [
        "rollout.sglang.num_servers",
        "parallel.tensor_model_parallel_size",
        "model.dtype",
    ]


def test_a_node_of_servers_holds_as_many_as_its_gpus() -> None:
    assert servers_on_node(SGLangConfig(tp_size=3, num_servers=7), 8) == 2
    assert servers_on_node(SGLangConfig(num_servers=7), 0) == 7


def test_ranks_are_read_from_the_launcher() -> None:
    launched = {"WORLD_SIZE": "12", "LOCAL_WORLD_SIZE": "4"}
    assert Allocation.from_environment(8, launched) == nodes(3, ranks=4)
    assert Allocation.from_environment(0, {"WORLD_SIZE": "2"}) == nodes(1, gpus=0, ranks=2)
    assert Allocation.from_environment(8, {}) == nodes(1, ranks=1)


# What the hardware and the parallel sizes rule out


@given(tensor=st.integers(1, 4), pipeline=st.integers(1, 4), world_size=st.integers(1, 16))
def test_the_layout_has_to_divide_the_ranks(tensor: int, pipeline: int, world_size: int) -> None:
    config = config_of(dtype="float32", tensor=tensor, pipeline=pipeline)
    problems = allocation_problems(config, nodes(1, gpus=0, ranks=world_size))
    if world_size % (tensor * pipeline) == 0:
        assert problems == []
        return
    (problem,) = problems
    assert problem.field == "parallel.tensor_model_parallel_size"
    assert f"= {tensor * pipeline} does not divide the {world_size} ranks" in problem.problem
    assert f"--nproc-per-node a multiple of {tensor * pipeline}" in problem.fix


@pytest.mark.parametrize(("setting", "value"), [("colocated", True), ("tp_size", 2)])
def test_what_needs_gpus_is_refused_without(setting: str, value: Any) -> None:
    settings = {setting: value}
    assert fields(config_of(dtype="float32", **settings), nodes(1, gpus=0)) == [f"rollout.sglang.{setting}"]
    assert fields(config_of(**settings), nodes(1, gpus=8)) == []


def test_attached_servers_may_have_gpus_where_the_trainer_has_none() -> None:
    assert fields(config_of(dtype="float32", tp_size=2, urls=["http://a:1"]), nodes(1, gpus=0)) == []


def test_the_distributed_optimizer_is_for_gpus() -> None:
    parallel = ParallelConfig(distributed_optimizer=True)
    (problem,) = allocation_problems(
        config_of(dtype="float32").model_copy(update={"parallel": parallel}), nodes(1, gpus=0, ranks=2)
    )
    assert (problem.field, "checkpoints would be wrong" in problem.problem) == ("parallel.distributed_optimizer", True)
    assert fields(config_of().model_copy(update={"parallel": parallel}), nodes(1)) == []


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_of_torch_take_either_dtype_on_a_gpu(dtype: str) -> None:
    config = config_of(dtype=dtype)
    local, engine = (
        config.model_copy(update={"model": config.model.model_copy(update={"layer_spec": spec})})
        for spec in ("local", "transformer_engine")
    )
    assert fields(local, nodes(1)) == []
    assert fields(engine, nodes(1, gpus=0))[0] == "model.layer_spec"


@pytest.mark.parametrize(("dtype", "gpus", "fix"), [("bfloat16", 0, "float32"), ("float32", 8, "bfloat16")])
def test_the_dtype_has_to_suit_the_hardware(dtype: str, gpus: int, fix: str) -> None:
    (problem,) = allocation_problems(config_of(dtype=dtype), nodes(1, gpus=gpus))
    assert problem.field == "model.dtype"
    assert f"model.dtype={fix}" in problem.fix
    assert fields(config_of(dtype=dtype), nodes(1, gpus=8 - gpus)) == []
