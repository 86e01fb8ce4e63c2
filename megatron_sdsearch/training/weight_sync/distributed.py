"""Weights through a process group of trainer and servers: NCCL between GPUs, gloo without.

Each pipeline stage sends its own layers: the first tensor-parallel rank of its first replica gathers the stage's
tensors one at a time and broadcasts them in buckets, in a group of its own with all servers. Nothing crosses stages.
"""

from __future__ import annotations

import socket
from collections.abc import Awaitable, Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from megatron_sdsearch.errors import ServerUnavailableError, cause_of
from megatron_sdsearch.model.hf_weights import drain_collective
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.rollout.sglang_api import SGLangServer
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.weight_sync.agreement import together
from megatron_sdsearch.training.weight_sync.buckets import Bucket, buckets
from megatron_sdsearch.training.weight_sync.fleet import ServerFleet, open_update


class DistributedTransport:
    """Keeps its groups for as long as the same servers answer and nothing fails. Implements ``Transport``.

    Args:
        parallel: of the trainer.
        bucket_bytes: broadcast at once.
        server_tp_size: tensor-parallel ranks of each server; each is a member of every group.
        timeout_s: of joining, and of each broadcast.
    """

    def __init__(self, parallel: ParallelState, bucket_bytes: int, server_tp_size: int, timeout_s: float) -> None:
        self._parallel = parallel
        self._bucket_bytes = bucket_bytes
        self._server_tp_size = server_tp_size
        self._timeout_s = timeout_s
        self._group: _Group | None = None

    def folder(self, version: int) -> Path | None:
        """None: a restarted server waits for the next publish."""
        return None

    def send(self, policy: Network, fleet: ServerFleet, urls: Sequence[str], version: int) -> None:
        """See ``Transport``."""
        parallel = self._parallel

        def on_main(work: Callable[[SGLangServer], Awaitable[None]]) -> None:
            if parallel.is_main:
                fleet.call(urls, work)

        together(parallel, lambda: on_main(open_update))
        for stage in range(parallel.pp_size):
            if parallel.dp_rank == 0 and parallel.pp_rank == stage:
                together(parallel, lambda: self._send_stage(policy, fleet, urls, version))
            else:
                together(parallel, lambda: None)
        together(parallel, lambda: on_main(lambda server: server.end_weight_update()))

    def reset(self) -> None:
        """Forget the groups: after a failure nobody knows who is still in them."""
        self._group = None

    def _send_stage(self, policy: Network, fleet: ServerFleet, urls: Sequence[str], version: int) -> None:
        if self._parallel.tp_rank > 0:
            drain_collective(policy.stage_weights(), lambda _: None)
            return
        drain_collective(
            buckets(policy.stage_weights(), self._bucket_bytes),
            lambda bucket: self._broadcast(fleet, bucket, version),
            before=lambda: self._join(fleet, urls),
        )

    def _join(self, fleet: ServerFleet, urls: Sequence[str]) -> None:
        if self._group is None or self._group.urls != tuple(urls):
            self._group = _Group(fleet, urls, self._server_tp_size, self._parallel.device, self._timeout_s)

    def _broadcast(self, fleet: ServerFleet, bucket: Bucket, version: int) -> None:
        group = self._group
        assert group is not None  # _join came first
        is_end = bucket.is_last and self._parallel.is_last_stage
        flat = bucket.flat()
        fleet.call(
            group.urls,
            lambda server: server.update_weights_from_distributed(
                names=[name for name, _ in bucket.tensors],
                dtypes=[str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.tensors],
                shapes=[list(tensor.shape) for _, tensor in bucket.tensors],
                group_name=group.name,
                # The version with the last bucket alone: a server announces it as soon as it has it.
                weight_version=str(version) if is_end else None,
                load_format="flattened_bucket",
                flush_cache=is_end,
            ),
            meanwhile=lambda: group.broadcast(flat),
        )


class _Group:
    """This rank as the first member, and behind it every tensor-parallel rank of every server.

    Servers leave a group of theirs when they end; one that fails is not destroyed by name, for its members may hang.

    Args:
        fleet: reaches the servers.
        urls: of those that join.
        server_tp_size: members per server.
        device: where broadcast tensors lie.
        timeout_s: of joining and of each broadcast.

    Attributes:
        name: unique, also to the servers.
        urls: of its servers, in rank order.
    """

    def __init__(
        self, fleet: ServerFleet, urls: Sequence[str], server_tp_size: int, device: torch.device, timeout_s: float
    ) -> None:
        self.name = f"sdsearch-{uuid4().hex[:12]}"
        self.urls = tuple(urls)
        self._world_size = 1 + len(urls) * server_tp_size
        self._timeout = timedelta(seconds=timeout_s)
        self._backend = "nccl" if device.type == "cuda" else "gloo"
        self._group: Any = None
        host = _own_address(urls)
        store = TCPStore(host, 0, self._world_size, is_master=True, timeout=self._timeout, wait_for_workers=False)
        offsets = {url: 1 + index * server_tp_size for index, url in enumerate(urls)}
        fleet.call(
            urls,
            lambda server: server.init_weights_update_group(
                master_address=host,
                master_port=store.port,
                rank_offset=offsets[server.url],
                world_size=self._world_size,
                group_name=self.name,
                backend=self._backend,
            ),
            meanwhile=lambda: self._join(store),
        )

    def broadcast(self, flat: Tensor) -> None:
        """To all servers.

        Raises:
            ServerUnavailableError: one is gone.
        """
        try:
            dist.broadcast(flat, src=0, group=self._group)
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)
        except RuntimeError as error:  # what torch raises for a lost peer and for a timeout
            words = f"broadcast of weights to {', '.join(self.urls)}: {cause_of(error)}"
            raise ServerUnavailableError(words) from error

    def _join(self, store: TCPStore) -> None:
        # A group beside the default one: no public call makes it. The server does the same, with the same prefix
        # (sglang/srt/utils/common.py, init_custom_process_group, 0.5.23), or the members would not find each other.
        try:
            group, _ = distributed_c10d._new_process_group_helper(
                self._world_size,
                0,
                [],
                distributed_c10d.Backend(self._backend),
                PrefixStore(self.name, store),
                group_name=distributed_c10d.GroupName(self.name),
                timeout=self._timeout,
            )
        except RuntimeError as error:
            raise ServerUnavailableError(f"weight group with {', '.join(self.urls)}: {cause_of(error)}") from error
        distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(self._world_size)}
        self._group = group


def _own_address(urls: Sequence[str]) -> str:
    """This host's address as the servers' hosts reach it: the loopback's only where all of them are here."""
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing: it only picks the route
            addresses.append(str(probe.getsockname()[0]))
    return min(addresses, key=lambda address: address.startswith("127."))
