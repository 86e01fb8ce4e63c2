"""Ranks and process groups of a run, as a frozen record that all other code reads instead of megatron's globals."""

from __future__ import annotations

import os
import random
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import numpy as np
import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed
from torch.distributed import HashStore  # type: ignore[attr-defined]  # exported, but not declared so

from megatron_sdsearch.config import ParallelConfig
from megatron_sdsearch.parallel.cpu import install_cpu_layer

T = TypeVar("T")


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelState:
    """This process's ranks and groups.

    Attributes:
        rank, world_size: over the whole run.
        tp_rank, tp_size: tensor parallel.
        pp_rank, pp_size: pipeline parallel; ``pp_rank`` is the stage.
        dp_rank, dp_size: data parallel.
        sequence_parallel: activations between tensor-parallel regions are sharded by sequence.
        tp_group, pp_group: torch process groups.
        device: the device of this rank.
    """

    rank: int
    world_size: int
    tp_rank: int
    tp_size: int
    pp_rank: int
    pp_size: int
    dp_rank: int
    dp_size: int
    sequence_parallel: bool
    tp_group: dist.ProcessGroup
    pp_group: dist.ProcessGroup
    device: torch.device

    @classmethod
    def initialize(cls, config: ParallelConfig, *, seed: int) -> ParallelState:
        """Start torch.distributed (from torchrun's environment, else as a single process) and megatron's groups.

        Args:
            config: tensor and pipeline sizes (the data-parallel size follows), and the timeout of collectives: gloo
                notices at once when a peer has died, NCCL never does.
            seed: for megatron's RNG tracker, without which no parallel layer can be built (random.py:248).
        """
        minutes = config.collective_timeout_minutes
        device = _start_distributed(timedelta(minutes=minutes))
        install_cpu_layer()
        parallel_state.initialize_model_parallel(
            config.tensor_model_parallel_size, config.pipeline_model_parallel_size, distributed_timeout_minutes=minutes
        )
        model_parallel_cuda_manual_seed(seed)
        random.seed(seed)  # our code draws from neither; a library that did would make runs unrepeatable
        np.random.seed(seed % 2**32)
        return cls(
            rank=dist.get_rank(),
            world_size=dist.get_world_size(),
            tp_rank=parallel_state.get_tensor_model_parallel_rank(),
            tp_size=config.tensor_model_parallel_size,
            pp_rank=parallel_state.get_pipeline_model_parallel_rank(),
            pp_size=config.pipeline_model_parallel_size,
            dp_rank=parallel_state.get_data_parallel_rank(),
            dp_size=parallel_state.get_data_parallel_world_size(),
            sequence_parallel=config.sequence_parallel,
            tp_group=parallel_state.get_tensor_model_parallel_group(),
            pp_group=parallel_state.get_pipeline_model_parallel_group(),
            device=device,
        )

    @property
    def is_first_stage(self) -> bool:
        """True if this rank holds the embedding."""
        return self.pp_rank == 0

    @property
    def is_last_stage(self) -> bool:
        """True if this rank holds the LM head and computes the loss."""
        return self.pp_rank == self.pp_size - 1

    @property
    def is_main(self) -> bool:
        """True if this rank writes logs and pages."""
        return self.rank == 0

    @property
    def alignment(self) -> int:
        """Divisor of every packed length, so that sequence parallelism can shard it evenly."""
        return self.tp_size if self.sequence_parallel else 1

    def all_gather_object(self, value: T) -> list[T]:
        """Gather one picklable value per rank, in rank order, on every rank."""
        gathered: list[Any] = [None] * self.world_size
        dist.all_gather_object(gathered, value)
        return gathered

    def shutdown(self) -> None:
        """Destroy the process groups."""
        parallel_state.destroy_model_parallel()
        dist.destroy_process_group()


def _start_distributed(timeout: timedelta) -> torch.device:
    has_gpu = torch.cuda.is_available()
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if has_gpu else torch.device("cpu")
    if has_gpu:
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)  # ranks share the cores; more threads than cores are at least 2 times slower
    if dist.is_initialized():
        return device
    backend = "cpu:gloo,cuda:nccl" if has_gpu else "gloo"
    if "RANK" in os.environ:
        dist.init_process_group(backend, timeout=timeout)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    return device
