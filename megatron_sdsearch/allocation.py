"""Divide an allocation: nodes and GPUs that train, and those that run SGLang servers.

``train``, ``serve``, ``check``, ``plan`` and ``slurm/prepare.py`` all use these roles and raise the same errors.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from megatron_sdsearch.config import RunConfig, SGLangConfig
from megatron_sdsearch.config.rules import model_problems, problems_without_gpu
from megatron_sdsearch.errors import ConfigError

# Servers on the ranks' GPUs, on other GPUs of the allocation, or outside of it (``rollout.sglang.urls``).
Placement = Literal["colocated", "beside", "attached"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """Nodes and GPUs that a run gets.

    Attributes:
        num_nodes: all nodes, including those that only serve.
        gpus_per_node: 0 without GPUs.
        num_sglang_nodes: the last nodes, which only run servers; ``slurm/train.sh`` starts them.
        ranks_per_node: trainer ranks on each other node; None means one per GPU that servers leave, or one on CPU.
    """

    num_nodes: int = 1
    gpus_per_node: int
    num_sglang_nodes: int = 0
    ranks_per_node: int | None = None

    @property
    def has_gpu(self) -> bool:
        """True when the trainer computes on GPUs."""
        return self.gpus_per_node > 0

    @classmethod
    def from_environment(cls, gpus_per_node: int, environment: Mapping[str, str] = os.environ) -> Allocation:
        """Read the ranks and their nodes from torchrun's variables; without them there is one rank."""
        world_size = int(environment.get("WORLD_SIZE", "1"))
        per_node = int(environment.get("LOCAL_WORLD_SIZE", world_size))
        return cls(num_nodes=world_size // per_node, gpus_per_node=gpus_per_node, ranks_per_node=per_node)


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """SGLang servers of a run.

    Attributes:
        num: all servers.
        tp_size: GPUs of each.
        placement: where these GPUs are.
        num_nodes: nodes on which `serve` runs; 0 for attached servers and for those that rank 0 starts.
    """

    num: int
    tp_size: int
    placement: Placement
    num_nodes: int = 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Roles:
    """Roles of the nodes of an allocation.

    Attributes:
        train_nodes: nodes with trainer ranks, the first ones.
        ranks_per_node: ranks on each of them.
        servers: None when the run does not sample from SGLang.
    """

    train_nodes: int
    ranks_per_node: int
    servers: Servers | None

    @property
    def world_size(self) -> int:
        """All trainer ranks."""
        return self.train_nodes * self.ranks_per_node


def servers_on_node(sglang: SGLangConfig, num_gpus: int) -> int:
    """Number of servers that `serve` starts on a node: as many as its GPUs hold; without GPUs, ``num_servers``."""
    return num_gpus // sglang.tp_size if num_gpus else sglang.num_servers


def gpus_beside_ranks(config: RunConfig, num_sglang_nodes: int = 0) -> int:
    """GPUs of rank 0's node that its own servers take from the trainer."""
    sglang = config.rollout.sglang
    is_taken = config.samples_from_sglang and not (sglang.urls or sglang.colocated or num_sglang_nodes)
    return sglang.num_servers * sglang.tp_size if is_taken else 0


def assign_roles(config: RunConfig, allocation: Allocation) -> Roles:
    """Divide an allocation in which ``allocation_problems`` finds none."""
    sglang, num_nodes, num_gpus = config.rollout.sglang, allocation.num_nodes, allocation.gpus_per_node
    servers = None
    if config.samples_from_sglang:
        serving = 0 if sglang.urls else num_nodes if sglang.colocated else allocation.num_sglang_nodes
        num = len(sglang.urls) or sglang.num_servers
        if serving and num_nodes > 1:
            num = serving * servers_on_node(sglang, num_gpus)
        servers = Servers(
            num=num,
            tp_size=sglang.tp_size,
            placement="colocated" if sglang.colocated else "attached" if sglang.urls else "beside",
            num_nodes=serving,
        )
    ranks = allocation.ranks_per_node
    if ranks is None:
        ranks = num_gpus - gpus_beside_ranks(config, allocation.num_sglang_nodes) if num_gpus else 1
    return Roles(train_nodes=num_nodes - allocation.num_sglang_nodes, ranks_per_node=ranks, servers=servers)


def allocation_problems(config: RunConfig, allocation: Allocation) -> list[ConfigError]:
    """List what keeps a run from starting on an allocation: nodes, GPUs, parallel sizes, hardware."""
    if problems := _node_problems(config, allocation):
        return problems  # no roles can be assigned
    has_gpu, parallel, world_size = allocation.has_gpu, config.parallel, assign_roles(config, allocation).world_size
    if has_gpu:
        problems = _gpu_problems(config, allocation)
    if world_size % (size := parallel.model_parallel_size):
        product = f"tensor {parallel.tensor_model_parallel_size} x pipeline {parallel.pipeline_model_parallel_size}"
        problem = f"{product} = {size} does not divide the {world_size} ranks"
        fix = f"start torchrun with --nproc-per-node a multiple of {size}, or change parallel.*"
        problems.append(ConfigError("parallel.tensor_model_parallel_size", problem, fix))
    problems += model_problems(config.model, has_gpu)
    if parallel.distributed_optimizer and not has_gpu:
        problem = "true without a GPU, where its checkpoints would be wrong (megatron-core with torch's AdamW)"
        problems.append(ConfigError("parallel.distributed_optimizer", problem, "set it to false"))
    if config.samples_from_sglang and not has_gpu:
        problems += problems_without_gpu(config.rollout.sglang)
    return problems


def _node_problems(config: RunConfig, allocation: Allocation) -> list[ConfigError]:
    field, sglang = "SDSEARCH_SGLANG_NODES", config.rollout.sglang
    num_nodes, wanted = allocation.num_nodes, allocation.num_sglang_nodes
    if not 0 <= wanted < num_nodes:
        fix = f"set it to at most {num_nodes - 1}, or request more nodes (sbatch --nodes)"
        return [ConfigError(field, f"{wanted} of {num_nodes} nodes leave none to train on", fix)]
    starts_on_nodes = config.samples_from_sglang and not sglang.urls and not sglang.colocated
    if wanted and not starts_on_nodes:
        problem = f"{wanted}, but the run starts no servers on nodes of their own"
        fix = "set it to 0, or set rollout.engine=sglang without rollout.sglang.urls and rollout.sglang.colocated"
        return [ConfigError(field, problem, fix)]
    if starts_on_nodes and num_nodes > 1 and not wanted:
        problem = f"0, but servers that the first of {num_nodes} nodes starts listen only on its 127.0.0.1"
        fix = "let slurm/train.sh start them: set it (or --sglang-nodes) to a number of nodes, or set "
        return [ConfigError(field, problem, f"{fix}rollout.sglang.colocated=true; or set rollout.sglang.urls")]
    return []


def _gpu_problems(config: RunConfig, allocation: Allocation) -> list[ConfigError]:
    """List misfits of ranks, own servers and the GPUs of a node."""
    num_gpus, roles, problems = allocation.gpus_per_node, assign_roles(config, allocation), []
    ranks, servers = roles.ranks_per_node, roles.servers
    if servers is not None and not config.rollout.sglang.urls:
        is_colocated = servers.placement == "colocated"
        room = ranks if is_colocated else num_gpus - (allocation.ranks_per_node or 1)
        if servers.tp_size > num_gpus:
            problem = f"{servers.tp_size} GPUs per server, but nodes have {num_gpus}"
            problems.append(ConfigError("rollout.sglang.tp_size", problem, "lower it"))
        # On several nodes num_servers is not read: each serving node holds as many as fit.
        elif allocation.num_nodes == 1 and servers.num * servers.tp_size > room:
            problem = f"{servers.num} servers x {servers.tp_size} GPUs are more than the {max(0, room)} of {num_gpus} "
            problem += "of the trainer" if is_colocated else "that the trainer leaves"
            fix = "lower it or rollout.sglang.tp_size, start fewer ranks, set rollout.sglang.colocated=true, or attach"
            problems.append(ConfigError("rollout.sglang.num_servers", problem, f"{fix} to rollout.sglang.urls"))
            return problems  # the number of ranks follows from it
    if not 1 <= ranks <= num_gpus:
        fix = f"start {num_gpus} per node, or fewer (slurm/train.sh: SDSEARCH_RANKS_PER_NODE)"
        problem = f"{ranks} trainer processes per node, but {num_gpus} GPUs: each takes one"
        problems.append(ConfigError("--nproc-per-node", problem, fix))
    return problems
