"""Nodes and GPUs of an allocation, and who gets which: the trainer's ranks and SGLang servers of our own.

On one node the first rank starts the servers. On several only ``slurm/train.sh`` does, on whole nodes: what is refused
here is what ``slurm/prepare.py`` refuses.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.errors import ConfigError
from megatron_sdsearch.plan.layout import ServerPlace, Servers, servers_of

_FIELD = "SDSEARCH_SGLANG_NODES"


@dataclass(frozen=True, slots=True, kw_only=True)
class Allocation:
    """What a run is given.

    Attributes:
        num_nodes: in all.
        gpus_per_node: of each; without GPUs, processes of the trainer.
        num_sglang_nodes: of the nodes; on the last so many nothing but servers runs.
    """

    num_nodes: int = 1
    gpus_per_node: int
    num_sglang_nodes: int = 0

    @property
    def num_gpus(self) -> int:
        """Of all nodes."""
        return self.num_nodes * self.gpus_per_node

    def num_trainers(self, servers: Servers | None) -> int:
        """Ranks of torchrun: a GPU each, wherever ``servers`` leave one."""
        if servers is None or servers.place != "beside":
            return self.num_gpus
        if servers.num_nodes is None:
            return self.num_gpus - servers.num_gpus
        return (self.num_nodes - servers.num_nodes) * self.gpus_per_node

    def servers_on(self, num_nodes: int, tensor: int, place: ServerPlace) -> Servers:
        """As many servers as ``num_nodes`` hold: ``serve`` counts so on each of them."""
        return Servers(num=num_nodes * (self.gpus_per_node // tensor), tensor=tensor, place=place, num_nodes=num_nodes)

    def server_choices(self, tensors: Sequence[int]) -> Iterator[Servers]:
        """Servers of ``tensors`` GPUs each that could be started here and leave no GPU of their nodes idle."""
        whole = [tensor for tensor in tensors if self.gpus_per_node % tensor == 0]
        if self.num_nodes > 1:
            for tensor, num_nodes in product(whole, range(1, self.num_nodes)):
                yield self.servers_on(num_nodes, tensor, "beside")
            yield from (self.servers_on(self.num_nodes, tensor, "colocated") for tensor in whole)
            return
        for tensor, gpus in product(tensors, range(1, self.num_gpus)):
            if gpus % tensor == 0:
                yield Servers(num=gpus // tensor, tensor=tensor, place="beside")
        yield from (Servers(num=self.num_gpus // tensor, tensor=tensor, place="colocated") for tensor in whole)


def servers_in(config: RunConfig, allocation: Allocation) -> Servers | None:
    """The servers that a run samples from when it is started on ``allocation``.

    Raises:
        ConfigError: they do not fit it.
    """
    servers = servers_of(config)
    check_sglang_nodes(servers, allocation)
    if servers is None or servers.place == "attached":
        return servers
    if allocation.num_nodes == 1:
        _check_one_node(servers, allocation.num_gpus)
        return servers
    if servers.tensor > allocation.gpus_per_node:
        told = f"{servers.tensor} GPUs of a server, and nodes have {allocation.gpus_per_node}"
        raise ConfigError("rollout.sglang.tp_size", told, "lower it")
    nodes = allocation.num_nodes if servers.place == "colocated" else allocation.num_sglang_nodes
    return allocation.servers_on(nodes, servers.tensor, servers.place)


def check_sglang_nodes(servers: Servers | None, allocation: Allocation) -> None:
    """The nodes that are set aside for servers fit the allocation, and where the run samples.

    Raises:
        ConfigError: they do not.
    """
    wanted, num_nodes = allocation.num_sglang_nodes, allocation.num_nodes
    if not 0 <= wanted < num_nodes:
        told = f"{wanted} of {num_nodes} nodes leave none to train on"
        raise ConfigError(_FIELD, told, f"set it to at most {num_nodes - 1}, or plan more with --nodes")
    place = servers.place if servers is not None else None
    if wanted and place != "beside":
        reason = {
            None: ("the run samples without SGLang", "set rollout.engine=sglang, or set it to 0"),
            "attached": ("rollout.sglang.urls names servers of its own", "drop one of the two"),
            "colocated": ("rollout.sglang.colocated serves on all nodes", "set one of the two"),
        }
        told, fix = reason[place]
        raise ConfigError(_FIELD, f"{wanted}, and {told}", fix)
    if not wanted and place == "beside" and num_nodes > 1:
        raise ConfigError(
            _FIELD,
            f"0, and rollout.engine=sglang on {num_nodes} nodes needs servers that all of them reach",
            "set it, or --sglang-nodes, or set rollout.sglang.colocated=true or rollout.sglang.urls",
        )


def _check_one_node(servers: Servers, num_gpus: int) -> None:
    field, told = "rollout.sglang.num_servers", f"{servers.num} servers of {servers.tensor} GPUs"
    if servers.place == "colocated" and servers.num_gpus > num_gpus:
        raise ConfigError(field, f"{told} share {num_gpus}", "lower it, or rollout.sglang.tp_size")
    if servers.place == "beside" and servers.num_gpus >= num_gpus:
        raise ConfigError(
            field,
            f"{told} leave none of {num_gpus} to the trainer",
            "lower it, or set rollout.sglang.colocated=true, or take more GPUs",
        )
