"""Weights through HTTP: buckets in the body of a request, no file system and no network fabric in common."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from megatron_sdsearch.model.hf_weights import drain_collective
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.training.policy import Network
from megatron_sdsearch.training.weight_sync.buckets import Bucket, buckets, serialize
from megatron_sdsearch.training.weight_sync.fleet import ServerFleet, open_update


class TensorTransport:
    """Sends each bucket to all servers before it gathers the next. Implements ``Transport``.

    Args:
        parallel: of the trainer; its first rank sends.
        bucket_bytes: of tensors in one request; a third more travels.
        server_tp_size: tensor-parallel ranks of each server; each gets the whole bucket and cuts its own shard.
    """

    def __init__(self, parallel: ParallelState, bucket_bytes: int, server_tp_size: int) -> None:
        self._parallel = parallel
        self._bucket_bytes = bucket_bytes
        self._server_tp_size = server_tp_size

    def folder(self, version: int) -> Path | None:
        """None: a restarted server waits for the next publish."""
        return None

    def send(self, policy: Network, fleet: ServerFleet, urls: Sequence[str], version: int) -> None:
        """See ``Transport``."""
        if not self._parallel.is_main:
            drain_collective(policy.hf_weights(), lambda _: None)
            return
        drain_collective(
            buckets(policy.hf_weights(), self._bucket_bytes),
            lambda bucket: self._post(fleet, urls, bucket, version),
            before=lambda: fleet.call(urls, open_update),
        )
        fleet.call(urls, lambda server: server.end_weight_update())

    def reset(self) -> None:
        """Nothing is held."""

    def _post(self, fleet: ServerFleet, urls: Sequence[str], bucket: Bucket, version: int) -> None:
        payload = [serialize(bucket)] * self._server_tp_size
        # The version with the last bucket alone: a server announces it as soon as it has it.
        named = str(version) if bucket.is_last else None
        fleet.call(
            urls,
            lambda server: server.update_weights_from_tensor(
                payload, weight_version=named, load_format="flattened_bucket", flush_cache=bucket.is_last
            ),
        )
