"""What is checked: a run, and the nodes, GPUs and processes that it is meant for, perhaps not those of this machine."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.training.preflight import RunFiles


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterOptions:
    """What the command line says; None is not said.

    Attributes:
        device: that trains.
        num_nodes: of the allocation, those with servers alone too.
        gpus_per_node: of each.
        ranks_per_node: torchrun's --nproc-per-node.
        num_sglang_nodes: of them, on which slurm/train.sh starts servers.
    """

    device: Literal["gpu", "cpu"] | None = None
    num_nodes: int | None = None
    gpus_per_node: int | None = None
    ranks_per_node: int | None = None
    num_sglang_nodes: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Cluster:
    """What the run is taken to be meant for.

    Attributes:
        has_gpu: the trainer computes on GPUs.
        num_nodes: of the allocation, those with servers alone too.
        num_sglang_nodes: of them, on which slurm/train.sh starts servers.
        gpus_per_node: 0 without GPUs.
        ranks_per_node: trainer processes on each node that trains.
        num_idle_gpus: per node, allocated by Slurm although the run was inferred to be for the CPU.
        description: all of that with where it comes from.
    """

    has_gpu: bool
    num_nodes: int
    num_sglang_nodes: int
    gpus_per_node: int
    ranks_per_node: int
    num_idle_gpus: int
    description: str

    @property
    def world_size(self) -> int:
        """Trainer processes; at least those of one node."""
        return max(1, self.num_nodes - self.num_sglang_nodes) * self.ranks_per_node


@dataclass(frozen=True, slots=True, kw_only=True)
class RunUnderTest:
    """What every part of a check looks at.

    Attributes:
        config: of the run.
        cluster: that it is meant for.
        files: what its files hold.
        is_online: servers may be asked.
    """

    config: RunConfig
    cluster: Cluster
    files: RunFiles
    is_online: bool

    @property
    def is_rl(self) -> bool:
        """Rollouts are sampled and searched for."""
        return self.config.train.mode == "rl"


def find_cluster(config: RunConfig, options: ClusterOptions, environment: Mapping[str, str] = os.environ) -> Cluster:
    """Ask the command line first, then torchrun's or Slurm's environment, then this machine; assume what is left."""
    has_gpu, device_source = _find_device(config, options)
    slurm_gpus = _first({name: _number(environment, name) for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE")})
    sglang_nodes, _ = _first(
        {"--sglang-nodes": options.num_sglang_nodes, "_": _number(environment, "SDSEARCH_SGLANG_NODES")}
    ) or (0, "")
    torchrun_nodes = _number(environment, "GROUP_WORLD_SIZE")
    nodes, nodes_source = _first(
        {
            "--nodes": options.num_nodes,
            "SLURM_JOB_NUM_NODES": _number(environment, "SLURM_JOB_NUM_NODES"),
            "SLURM_NNODES": _number(environment, "SLURM_NNODES"),
            "GROUP_WORLD_SIZE": None if torchrun_nodes is None else torchrun_nodes + sglang_nodes,
        }
    ) or (1 + sglang_nodes, "assumed")
    training_nodes = max(1, nodes - sglang_nodes)
    gpus, gpus_source = 0, ""
    if has_gpu:
        numbers = {"--gpus-per-node": options.gpus_per_node, "Slurm": slurm_gpus and slurm_gpus[0]}
        gpus, gpus_source = _first(numbers) or (torch.cuda.device_count(), "this machine")
    server_gpus = 0 if sglang_nodes else config.num_own_server_gpus
    parallel = config.parallel
    per_replica = parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size
    ranks, ranks_source = _first(
        {
            "--nproc-per-node": options.ranks_per_node,
            "LOCAL_WORLD_SIZE": _number(environment, "LOCAL_WORLD_SIZE"),
            "all GPUs that servers leave over" if server_gpus else "all GPUs": max(1, gpus - server_gpus)
            if gpus
            else None,
        }
    ) or (-(-per_replica // training_nodes), "assumed: the fewest that parallel.* allows")
    if has_gpu and not gpus:
        gpus, gpus_source = ranks + server_gpus, "assumed: as many as are used"
    devices = f"{gpus} GPUs each ({gpus_source})" if has_gpu else "no GPU"
    is_said = options.device is not None or options.gpus_per_node is not None
    return Cluster(
        has_gpu=has_gpu,
        num_nodes=nodes,
        num_sglang_nodes=sglang_nodes,
        gpus_per_node=gpus,
        ranks_per_node=ranks,
        num_idle_gpus=slurm_gpus[0] if slurm_gpus and not has_gpu and not is_said else 0,
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
    # A login node sees no GPU, whatever was allocated. Each kind of device trains in one dtype alone.
    return config.model.dtype == "bfloat16", f" (assumed from model.dtype={config.model.dtype})"


def _number(environment: Mapping[str, str], name: str) -> int | None:
    """The number in a variable; SLURM_GPUS_PER_NODE may name a type before it: ``h100:8``."""
    match = re.search(r"(\d+)$", environment.get(name, ""))
    return int(match[1]) if match else None


def _first(numbers: Mapping[str, int | None]) -> tuple[int, str] | None:
    """The first number that is known, and its source."""
    return next(((number, source) for source, number in numbers.items() if number is not None), None)
