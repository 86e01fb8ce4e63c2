"""How a run is spread over GPUs, and how much of its work one rank holds at one time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from megatron_sdsearch.config import RunConfig

ServerPlace = Literal["colocated", "beside", "attached"]
"""Servers on the trainer's GPUs, on others of the same allocation, or on GPUs that nobody counts here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Servers:
    """SGLang servers of a run.

    Attributes:
        num: of them.
        tensor: GPUs of each.
        place: where these GPUs are.
        num_nodes: on which ``slurm/train.sh`` starts them, as many as fit; None where it is not needed for that.
    """

    num: int
    tensor: int
    place: ServerPlace
    num_nodes: int | None = None

    @property
    def num_gpus(self) -> int:
        """All servers together."""
        return self.num * self.tensor

    @property
    def own_nodes(self) -> int:
        """Nodes that no trainer stands on."""
        return (self.num_nodes or 0) if self.place == "beside" else 0


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """What a person may choose without changing what is learned.

    Attributes:
        tp, pp, dp: tensor, pipeline and data parallel sizes; their product is the number of trainer ranks.
        sequence: sequence parallel.
        recompute: ``full`` keeps layer inputs alone.
        max_tokens: of one microbatch.
        chunk_rows: rows of logits at one time.
        distributed_optimizer: optimizer state is sharded over data-parallel ranks.
        servers: None with the embedded engine, and without rollouts.
    """

    tp: int
    pp: int
    dp: int
    sequence: bool
    recompute: bool
    max_tokens: int
    chunk_rows: int
    distributed_optimizer: bool
    servers: Servers | None

    @property
    def num_trainers(self) -> int:
        """Ranks of torchrun."""
        return self.tp * self.pp * self.dp

    @property
    def num_gpus(self) -> int:
        """Trainers, and servers that stand beside them."""
        beside = self.servers is not None and self.servers.place == "beside"
        return self.num_trainers + (self.servers.num_gpus if beside and self.servers is not None else 0)

    @classmethod
    def of(cls, config: RunConfig, num_trainers: int) -> Layout:
        """As configured; ``world_problems`` lists sizes that do not divide.

        What several nodes make of the configured servers is ``allocation.servers_in``'s.
        """
        parallel = config.parallel
        return cls(
            tp=parallel.tensor_model_parallel_size,
            pp=parallel.pipeline_model_parallel_size,
            dp=num_trainers // (parallel.tensor_model_parallel_size * parallel.pipeline_model_parallel_size),
            sequence=parallel.sequence_parallel,
            recompute=config.model.recompute == "full",
            max_tokens=config.train.max_tokens_per_microbatch,
            chunk_rows=config.model.logits_chunk_tokens,
            distributed_optimizer=parallel.distributed_optimizer,
            servers=servers_of(config),
        )

    def overrides(self) -> list[str]:
        """The settings as ``key=value`` of the command line."""
        settings: dict[str, object] = {
            "parallel.tensor_model_parallel_size": self.tp,
            "parallel.pipeline_model_parallel_size": self.pp,
            "parallel.sequence_parallel": str(self.sequence).lower(),
            "parallel.distributed_optimizer": str(self.distributed_optimizer).lower(),
            "model.recompute": "full" if self.recompute else "none",
            "train.max_tokens_per_microbatch": self.max_tokens,
        }
        if self.servers is not None and self.servers.place != "attached":
            if self.servers.num_nodes is None:  # else a node's GPUs say how many
                settings["rollout.sglang.num_servers"] = self.servers.num
            settings["rollout.sglang.tp_size"] = self.servers.tensor
            settings["rollout.sglang.colocated"] = str(self.servers.place == "colocated").lower()
        return [f"{key}={value}" for key, value in settings.items()]

    def environment(self) -> list[str]:
        """What ``slurm/train.sh`` reads besides, as ``NAME=value``; empty where it starts no servers."""
        if self.servers is None or self.servers.num_nodes is None:
            return []
        return [f"SDSEARCH_SGLANG_NODES={self.servers.own_nodes}"]


def servers_of(config: RunConfig) -> Servers | None:
    """The SGLang servers that a run samples from, or None."""
    if not config.samples_from_sglang:
        return None
    sglang = config.rollout.sglang
    place: ServerPlace = "colocated" if sglang.colocated else "attached" if sglang.urls else "beside"
    return Servers(num=len(sglang.urls) or sglang.num_servers, tensor=sglang.tp_size, place=place)


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchLoad:
    """The largest microbatch of a rank.

    Attributes:
        num_tokens: T of the student's row, padding included.
        policy_rows: N, tokens that the loss speaks of.
        query_rows: Q of them, distilled ones.
        teacher_tokens: T of the teacher's row; 0 when nothing is distilled.
        num_microbatches: of a rank's minibatch; all of their teacher targets live at one time.
    """

    num_tokens: int
    policy_rows: int
    query_rows: int
    teacher_tokens: int
    num_microbatches: int
