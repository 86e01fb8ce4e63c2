"""The nodes, GPUs and processes that a run is meant for, which need not be those of the machine that checks it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

import torch

from megatron_sdsearch.allocation import Allocation, gpus_beside_ranks
from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import ConfigError


@dataclass(frozen=True, slots=True, kw_only=True)
class GivenWorld:
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
class World:
    """What the run is taken to be meant for.

    Attributes:
        has_gpu: the trainer computes on GPUs.
        num_nodes: with trainers.
        gpus_per_node: 0 without GPUs.
        ranks_per_node: trainer processes on each.
        num_sglang_nodes: further nodes, on which slurm/train.sh starts servers.
        num_idle_gpus: per node, that Slurm gives a run which nobody called one for the CPU, and which is taken for one.
        is_assumed: nobody said how many processes there will be: it is the smallest number that the layout allows.
        words: all of that with where it comes from.
    """

    has_gpu: bool
    num_nodes: int
    gpus_per_node: int
    ranks_per_node: int
    num_sglang_nodes: int
    num_idle_gpus: int
    is_assumed: bool
    words: str

    @property
    def size(self) -> int:
        """Trainer processes."""
        return self.num_nodes * self.ranks_per_node

    @property
    def allocation(self) -> Allocation:
        """All nodes, those with servers alone included."""
        return Allocation(
            num_nodes=self.num_nodes + self.num_sglang_nodes,
            gpus_per_node=self.gpus_per_node,
            num_sglang_nodes=self.num_sglang_nodes,
            ranks_per_node=self.ranks_per_node,
        )

    @classmethod
    def of(cls, config: RunConfig, given: GivenWorld, environment: Mapping[str, str] = os.environ) -> World:
        """The command line first, then torchrun's or Slurm's environment, then this machine, then an assumption.

        Raises:
            ConfigError: all nodes serve.
        """
        has_gpu, device_from = _device(config, given)
        is_said = given.device is not None or given.gpus_per_node is not None
        sglang_nodes = _num_sglang_nodes(given, environment)
        nodes, nodes_from = _num_nodes(given, environment, sglang_nodes)
        servers = gpus_beside_ranks(config, sglang_nodes)
        smallest = _smallest_ranks(config, nodes)
        gpus, gpus_from = (0, "") if not has_gpu else _gpus_per_node(given, environment)
        ranks, ranks_from = _ranks_per_node(given, environment)
        if ranks is None and gpus:
            ranks, ranks_from = max(1, gpus - servers), "all GPUs that servers leave over" if servers else "all GPUs"
        is_assumed = ranks is None
        if ranks is None:
            ranks, ranks_from = smallest, "assumed: the fewest that parallel.* allows"
        if has_gpu and not gpus:
            gpus, gpus_from = ranks + servers, "assumed: as many as are used"
        on = f"{gpus} GPUs each ({gpus_from})" if has_gpu else "no GPU"
        told = f" ({device_from})" if device_from else ""
        return cls(
            has_gpu=has_gpu,
            num_nodes=nodes,
            gpus_per_node=gpus,
            ranks_per_node=ranks,
            num_sglang_nodes=sglang_nodes,
            num_idle_gpus=0 if has_gpu or is_said else _slurm_gpus(environment),
            is_assumed=is_assumed,
            words=f"{nodes} node{'s' * (nodes > 1)} ({nodes_from}), {on}{told}, "
            f"{ranks} trainer processes per node ({ranks_from})"
            + (f", and {sglang_nodes} with SGLang" if sglang_nodes else ""),
        )


def _device(config: RunConfig, given: GivenWorld) -> tuple[bool, str]:
    if given.device is not None:
        return given.device == "gpu", f"--device {given.device}"
    if given.gpus_per_node is not None:
        return given.gpus_per_node > 0, "" if given.gpus_per_node else "--gpus-per-node 0"
    if torch.cuda.is_available():
        return True, ""
    # A login node sees no GPU, whatever was allocated. Each kind of device trains in one dtype alone.
    return config.model.dtype == "bfloat16", f"assumed from model.dtype={config.model.dtype}"


def _num_nodes(given: GivenWorld, environment: Mapping[str, str], num_sglang_nodes: int) -> tuple[int, str]:
    """With trainers."""
    told = {"--nodes": given.num_nodes}
    for name in ("SLURM_JOB_NUM_NODES", "SLURM_NNODES"):
        told[name] = int(environment[name]) if environment.get(name, "").isdecimal() else None
    for name, num_nodes in told.items():
        if num_nodes is not None:
            if num_nodes <= num_sglang_nodes:
                problem = f"{num_sglang_nodes} of {num_nodes} nodes ({name}) leave none to train on"
                raise ConfigError("--sglang-nodes", problem, f"at most {num_nodes - 1}, or more nodes")
            return num_nodes - num_sglang_nodes, name
    if environment.get("GROUP_WORLD_SIZE", "").isdecimal():
        return int(environment["GROUP_WORLD_SIZE"]), "GROUP_WORLD_SIZE"
    return 1, "assumed"


def _num_sglang_nodes(given: GivenWorld, environment: Mapping[str, str]) -> int:
    if given.num_sglang_nodes is not None:
        return given.num_sglang_nodes
    told = environment.get("SDSEARCH_SGLANG_NODES", "")
    return int(told) if told.isdecimal() else 0


def _gpus_per_node(given: GivenWorld, environment: Mapping[str, str]) -> tuple[int, str]:
    if given.gpus_per_node is not None:
        return given.gpus_per_node, "--gpus-per-node"
    if gpus := _slurm_gpus(environment):
        return gpus, "Slurm"
    return torch.cuda.device_count(), "this machine"


def _slurm_gpus(environment: Mapping[str, str]) -> int:
    """SLURM_GPUS_ON_NODE is a number, SLURM_GPUS_PER_NODE may name their type: ``h100:8``."""
    for name in ("SLURM_GPUS_ON_NODE", "SLURM_GPUS_PER_NODE"):
        if match := re.search(r"(\d+)$", environment.get(name, "")):
            return int(match[1])
    return 0


def _ranks_per_node(given: GivenWorld, environment: Mapping[str, str]) -> tuple[int | None, str]:
    if given.ranks_per_node is not None:
        return given.ranks_per_node, "--nproc-per-node"
    if environment.get("LOCAL_WORLD_SIZE", "").isdecimal():
        return int(environment["LOCAL_WORLD_SIZE"]), "LOCAL_WORLD_SIZE"
    return None, ""


def _smallest_ranks(config: RunConfig, num_nodes: int) -> int:
    per_replica = config.parallel.tensor_model_parallel_size * config.parallel.pipeline_model_parallel_size
    return -(-per_replica // num_nodes)
