"""The run under test: its configuration and files, and the cluster it is meant for, perhaps not this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_sdsearch.allocation import Allocation, gpus_beside_ranks
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.training.preflight import RunFiles

_VARIABLES = (
    *("SDSEARCH_SGLANG_NODES", "SLURM_JOB_NUM_NODES", "SLURM_NNODES", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"),
    *("GROUP_WORLD_SIZE", "LOCAL_WORLD_SIZE"),
)


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """Options of the command line; None where one is not given.

    Attributes:
        device: type of device that trains.
        num_nodes: all nodes, including those that only serve.
        gpus_per_node: GPUs of each node.
        ranks_per_node: torchrun's --nproc-per-node.
        num_sglang_nodes: nodes on which slurm/train.sh starts servers.
    """

    device: Literal["gpu", "cpu"] | None = None
    num_nodes: int | None = None
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    num_sglang_nodes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster(Allocation):
    """The allocation that the run is assumed to get.

    Attributes:
        ranks_per_node: trainer ranks on each node that trains.
        num_idle_gpus: GPUs per node that Slurm allocates although the run is assumed to train on CPUs.
        description: the allocation and the source of each number.
    """

    ranks_per_node: int
    num_idle_gpus: int
    description: str

    @property
    def world_size(self) -> int:
        """Trainer ranks; at least those of one node."""
        return max(1, self.num_nodes - self.num_sglang_nodes) * self.ranks_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class RunUnderTest:
    """Input of every part of a check.

    Attributes:
        config: of the run.
        cluster: the cluster it is meant for.
        files: contents of its files.
        is_online: True when requests to servers are allowed.
    """

    config: RunConfig
    cluster: Cluster
    files: RunFiles
    is_online: bool


def find_cluster(config: RunConfig, options: ClusterOptions, environment: Mapping[str, str] = os.environ) -> Cluster:
    """Read the command line first, then torchrun's or Slurm's environment, then this machine; assume what is left."""
    given = {
        "--nodes": options.num_nodes,
        "--gpus-per-node": options.gpus_per_node,
        "--nproc-per-node": options.ranks_per_node,
        "--sglang-nodes": options.num_sglang_nodes,
    }
    # SLURM_GPUS_PER_NODE may name a type before the number: h100:8.
    numbers = {name: re.search(r"(\d+)$", environment.get(name, "")) for name in _VARIABLES}
    known = {name: number for name, number in given.items() if number is not None}
    known |= {name: int(match[1]) for name, match in numbers.items() if match}

    def first(*names: str) -> tuple[int, str] | None:
        return next(((known[name], name) for name in names if name in known), None)

    sglang_nodes, _ = first("--sglang-nodes", "SDSEARCH_SGLANG_NODES") or (0, "")
    if "GROUP_WORLD_SIZE" in known:
        known["GROUP_WORLD_SIZE"] += sglang_nodes  # torchrun only counts the nodes that train
    assumed = 1 + sglang_nodes, "assumed"
    nodes, nodes_source = first("--nodes", "SLURM_JOB_NUM_NODES", "SLURM_NNODES", "GROUP_WORLD_SIZE") or assumed
    training_nodes = max(1, nodes - sglang_nodes)
    has_gpu, device_source = _find_device(config, options)
    gpus, gpus_source = 0, ""
    if has_gpu:
        here = torch.cuda.device_count(), "this machine"
        gpus, gpus_source = first("--gpus-per-node", "SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE") or here
    server_gpus = gpus_beside_ranks(config, sglang_nodes)
    fewest = -(-config.parallel.model_parallel_size // training_nodes)
    assumed = fewest, "assumed: the fewest that parallel.* allows"
    if gpus:
        assumed = max(1, gpus - server_gpus), "all GPUs that servers leave over" if server_gpus else "all GPUs"
    ranks, ranks_source = first("--nproc-per-node", "LOCAL_WORLD_SIZE") or assumed
    if has_gpu and not gpus:
        gpus, gpus_source = ranks + server_gpus, "assumed: as many as are used"
    devices = f"{gpus} GPUs each ({gpus_source})" if has_gpu else "no GPU"
    is_cpu_assumed = not has_gpu and options.device is None and options.gpus_per_node is None
    slurm_gpus = known.get("SLURM_GPUS_ON_NODE") or known.get("SLURM_GPUS_PER_NODE") or 0
    return Cluster(
        num_nodes=nodes,
        num_sglang_nodes=sglang_nodes,
        gpus_per_node=gpus,
        ranks_per_node=ranks,
        num_idle_gpus=slurm_gpus if is_cpu_assumed else 0,
        description=f"{training_nodes} node{'s' * (training_nodes > 1)} ({nodes_source}), {devices}{device_source}, "
        f"{ranks} trainer processes per node ({ranks_source})"
        + (f", and {sglang_nodes} with SGLang" if sglang_nodes else ""),
    )


def _find_device(config: RunConfig, options: ClusterOptions) -> tuple[bool, str]:
    if options.device is not None:
        return options.device == "gpu", f" (--device {options.device})"
    if options.gpus_per_node is not None:
        return options.gpus_per_node > 0, "" if options.gpus_per_node else " (--gpus-per-node 0)"
    if torch.cuda.is_available():
        return True, ""
    # A login node has no GPU, whatever was allocated; but GPUs train in bfloat16 and CPUs in float32.
    return config.model.dtype == "bfloat16", f" (assumed from model.dtype={config.model.dtype})"
