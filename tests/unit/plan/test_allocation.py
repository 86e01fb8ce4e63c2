"""Who gets which nodes and GPUs: what a job of Slurm does, on every allocation."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.plan.allocation import Allocation, servers_in
from megatron_sdsearch.plan.layout import Servers
from slurm import prepare
from tests.unit.plan.models import run

ENGINES: dict[str, dict[str, Any]] = {
    "embedded": {"engine": "embedded"},
    "beside": {"engine": "sglang", "sglang": {"colocated": False, "num_servers": 2}},
    "beside, of two GPUs": {"engine": "sglang", "sglang": {"colocated": False, "num_servers": 1, "tp_size": 2}},
    "beside, of sixteen GPUs": {"engine": "sglang", "sglang": {"colocated": False, "num_servers": 1, "tp_size": 16}},
    "colocated": {"engine": "sglang", "sglang": {"colocated": True, "num_servers": 8}},
    "attached": {"engine": "sglang", "sglang": {"colocated": False, "urls": ["http://a:1"]}},
}


def _planned(config: RunConfig, allocation: Allocation) -> int | None:
    try:
        return allocation.num_trainers(servers_in(config, allocation))
    except ConfigError:
        return None


def _started(config: RunConfig, allocation: Allocation) -> int | None:
    given = prepare.Allocation(
        num_nodes=allocation.num_nodes,
        num_gpus=allocation.gpus_per_node,
        num_sglang_nodes=allocation.num_sglang_nodes,
        ranks_per_node=None,
    )
    try:
        roles = prepare.assign_roles(config, given)
    except ConfigError:
        return None
    return roles.train * roles.ranks


@pytest.mark.parametrize("engine", ENGINES)
def test_as_many_ranks_are_planned_as_a_job_starts_and_what_it_refuses_is_refused(engine: str) -> None:
    config = run(rollout=ENGINES[engine])
    for num_nodes, num_sglang_nodes in product((1, 2, 4), (0, 1, 2, 4)):
        allocation = Allocation(num_nodes=num_nodes, gpus_per_node=8, num_sglang_nodes=num_sglang_nodes)
        assert _planned(config, allocation) == _started(config, allocation), allocation


def test_nodes_that_serve_hold_as_many_servers_as_fit() -> None:
    allocation = Allocation(num_nodes=4, gpus_per_node=8, num_sglang_nodes=3)
    config = run(rollout={"engine": "sglang", "sglang": {"colocated": False, "num_servers": 1, "tp_size": 3}})
    assert servers_in(config, allocation) == Servers(num=6, tensor=3, place="beside", num_nodes=3)


def test_colocated_servers_stand_on_all_nodes() -> None:
    servers = servers_in(run(), Allocation(num_nodes=2, gpus_per_node=8))
    assert servers == Servers(num=16, tensor=1, place="colocated", num_nodes=2)
    assert Allocation(num_nodes=2, gpus_per_node=8).num_trainers(servers) == 16


def test_own_servers_beside_ranks_of_several_nodes_are_refused_with_the_mend() -> None:
    with pytest.raises(ConfigError, match=r"SDSEARCH_SGLANG_NODES: 0, .*--sglang-nodes"):
        servers_in(run(rollout=ENGINES["beside"]), Allocation(num_nodes=2, gpus_per_node=8))


def test_choices_of_several_nodes_are_whole_nodes() -> None:
    allocation = Allocation(num_nodes=3, gpus_per_node=6)
    choices = list(allocation.server_choices((1, 2, 4)))
    assert {(each.place, each.num_nodes, each.num, each.tensor) for each in choices} == {
        ("beside", 1, 6, 1),
        ("beside", 1, 3, 2),
        ("beside", 2, 12, 1),
        ("beside", 2, 6, 2),
        ("colocated", 3, 18, 1),
        ("colocated", 3, 9, 2),
    }
    assert {allocation.num_trainers(each) for each in choices} == {6, 12, 18}
