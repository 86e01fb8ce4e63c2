"""Weight transports to SGLang servers: a folder, buckets through HTTP, and a process group.

All send whole tensors under Hugging Face names, gathered one at a time: servers need not know the trainer's sharding.
"""

from __future__ import annotations

import base64
import hashlib
import pickle
import re
import shutil
import socket
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING
from urllib.parse import urlsplit
from uuid import uuid4

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import PrefixStore, TCPStore, distributed_c10d  # type: ignore[attr-defined]

from megatron_sdsearch.config import RunConfig
from megatron_sdsearch.model.hf_folder import write_hf_folder
from megatron_sdsearch.model.hf_weights import drain_collective
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.sglang.api import SGLangServer, call_servers

if TYPE_CHECKING:
    from megatron_sdsearch.training.policy import Network

NamedTensor = tuple[str, Tensor]
Step = Callable[[], None]
_VOCAB_MULTIPLE = 64  # rows that SGLang pads its vocabulary tables to, with zeros
_FUSED = ((re.compile(r"\.[qkv]_proj\."), ".qkv_proj."), (re.compile(r"\.(gate|up)_proj\."), ".gate_up_proj."))


class Transport(ABC):
    """Sends weights to servers.

    Args:
        config: of the run.
        parallel: ranks of the trainer.

    Attributes:
        bucket_bytes: of tensors sent at once; of one file of a folder.
        folder: with the weights sent last, for a server that starts later; None if there is none.
    """

    def __init__(self, config: RunConfig, parallel: ParallelState) -> None:
        self.bucket_bytes = config.rollout.sglang.weight_bucket_mb << 20
        self.folder: Path | None = None
        self._config = config
        self._parallel = parallel

    @abstractmethod
    def steps(self, policy: Network, servers: Sequence[SGLangServer], version: int, hashes: WeightHashes) -> list[Step]:
        """Return the steps, for every rank, that give the servers the policy's weights as ``version``.

        All ranks agree on the outcome of a step before they begin the next. A rank that fails in a step still takes
        part in the collectives that gather the weights.

        A step raises EngineError or OSError, on any rank. Servers then hold unknown weights (old, new or a mixture, of
        the old version or, after the last bucket, the new one) until a publish succeeds.
        """

    def reset(self) -> None:  # noqa: B027 (most transports hold nothing between publishes)
        """Discard what was set up with the servers, because a step failed."""


class DiskTransport(Transport):
    """Writes ``run_dir/weights/v000012`` shard by shard and has the servers load it.

    Servers on other nodes must see it under the same path. Restarted servers read the newest folder; the previous one
    stays until the next publish, because a server may still be reading it.
    """

    def steps(self, policy: Network, servers: Sequence[SGLangServer], version: int, hashes: WeightHashes) -> list[Step]:
        """Send everything in one step."""
        return [partial(self._send, policy, servers, version, hashes)]

    def _send(self, policy: Network, servers: Sequence[SGLangServer], version: int, hashes: WeightHashes) -> None:
        """Write the folder, let the servers load it, and delete all older folders but one."""
        weights, is_main = hashes.watch(policy.hf_weights()), self._parallel.is_main
        folder = self._config.run_dir.resolve() / "weights" / f"v{version:06d}"
        source = self._config.model.hf_dir
        write_hf_folder(weights, source, folder, is_writer=is_main, shard_bytes=self.bucket_bytes)
        if not is_main:
            return
        call_servers(servers, lambda server: server.load_folder(str(folder), str(version)))
        self.folder = folder
        older = sorted((f for f in folder.parent.iterdir() if f != folder), key=lambda f: f.stat().st_mtime)
        for old in older[:-1]:
            shutil.rmtree(old)


class TensorTransport(Transport):
    """Posts each bucket to all servers before it gathers the next; base64 adds a third to the bytes.

    Each tensor-parallel rank of a server gets the whole bucket and cuts out its shard.
    """

    def steps(self, policy: Network, servers: Sequence[SGLangServer], version: int, hashes: WeightHashes) -> list[Step]:
        """Send everything in one step."""
        return [partial(self._send, policy, servers, version, hashes)]

    def _send(self, policy: Network, servers: Sequence[SGLangServer], version: int, hashes: WeightHashes) -> None:
        """Post all buckets within an update session of the servers."""
        weights = hashes.watch(policy.hf_weights())
        if not self._parallel.is_main:
            drain_collective(weights)
            return

        def post(bucket: Bucket) -> None:
            body = {
                "serialized_named_tensors": [serialize(bucket)] * self._config.rollout.sglang.tp_size,
                "load_format": "flattened_bucket",
                **_last_fields(version, is_last=bucket.is_last),
            }
            call_servers(servers, lambda server: server.call("/update_weights_from_tensor", body))

        drain_collective(
            buckets(weights, self.bucket_bytes),
            post,
            before=lambda: call_servers(servers, SGLangServer.begin_weight_update),
        )
        call_servers(servers, SGLangServer.end_weight_update)


class DistributedTransport(Transport):
    """Broadcasts in a process group of trainer and servers: NCCL between GPUs, gloo without.

    Each pipeline stage sends its own layers: the first tensor-parallel rank of its first replica gathers the stage's
    tensors one at a time and broadcasts them in buckets, in its own group with all servers. A group is reused as long
    as the same servers answer and nothing fails.
    """

    # This rank is rank 0 of the group; all tensor-parallel ranks of all servers follow. After a failure the group is
    # not destroyed, because its members may hang; servers leave it when they end.
    _group: dist.ProcessGroup | None = None
    _group_name = ""
    _group_urls: Sequence[str] = ()

    def steps(self, policy: Network, servers: Sequence[SGLangServer], version: int, hashes: WeightHashes) -> list[Step]:
        """Send stage after stage, so that the version, in the last bucket, arrives after all others."""
        stages = range(self._parallel.pp_size)
        return [partial(self._send_stage, stage, policy, servers, version, hashes) for stage in stages]

    def reset(self) -> None:
        """Discard the group: after a failure its members are unknown."""
        self._group = None

    def _send_stage(
        self, stage: int, policy: Network, servers: Sequence[SGLangServer], version: int, hashes: WeightHashes
    ) -> None:
        parallel = self._parallel
        if parallel.dp_rank > 0 or parallel.pp_rank != stage:
            return
        weights = hashes.watch(policy.stage_weights())
        if parallel.tp_rank > 0:
            drain_collective(weights)
            return

        def prepare() -> None:
            if stage == 0:
                call_servers(servers, SGLangServer.begin_weight_update)
            if self._group is None or self._group_urls != [server.url for server in servers]:
                self._join(servers)

        drain_collective(
            buckets(weights, self.bucket_bytes),
            lambda bucket: self._broadcast(servers, bucket, version),
            before=prepare,
        )
        if parallel.is_last_stage:
            call_servers(servers, SGLangServer.end_weight_update)

    def _broadcast(self, servers: Sequence[SGLangServer], bucket: Bucket, version: int) -> None:
        flat = bucket.flat()
        body = {
            "names": [name for name, _ in bucket.tensors],
            "dtypes": [str(tensor.dtype).removeprefix("torch.") for _, tensor in bucket.tensors],
            "shapes": [list(tensor.shape) for _, tensor in bucket.tensors],
            "group_name": self._group_name,
            "load_format": "flattened_bucket",
            **_last_fields(version, is_last=bucket.is_last and self._parallel.is_last_stage),
        }

        def send() -> None:
            dist.broadcast(flat, src=0, group=self._group)
            if flat.is_cuda:
                torch.cuda.synchronize(flat.device)

        call_servers(servers, lambda server: server.call("/update_weights_from_distributed", body), meanwhile=send)

    def _join(self, servers: Sequence[SGLangServer]) -> None:
        tp_size = self._config.rollout.sglang.tp_size
        timeout = timedelta(seconds=self._config.rollout.sglang.request_timeout_s)
        name = f"sdsearch-{uuid4().hex[:12]}"  # unique on the servers, too
        urls, world_size = [server.url for server in servers], 1 + len(servers) * tp_size
        backend, host = "nccl" if self._parallel.device.type == "cuda" else "gloo", _own_address(urls)
        store = TCPStore(host, 0, world_size, is_master=True, timeout=timeout, wait_for_workers=False)
        body = {
            "master_address": host,
            "master_port": store.port,
            "world_size": world_size,
            "group_name": name,
            "backend": backend,
        }
        ranks = {url: {"rank_offset": 1 + index * tp_size} for index, url in enumerate(urls)}

        def join() -> None:
            # No public call makes a second group across programs. The server does the same with the same prefix
            # (sglang/srt/utils/common.py, init_custom_process_group, 0.5.23), so that the members find each other.
            group, _ = distributed_c10d._new_process_group_helper(
                world_size,
                0,
                [],
                distributed_c10d.Backend(backend),
                PrefixStore(name, store),
                group_name=distributed_c10d.GroupName(name),
                timeout=timeout,
            )
            distributed_c10d._world.pg_group_ranks[group] = {rank: rank for rank in range(world_size)}
            self._group, self._group_name, self._group_urls = group, name, urls

        route = "/init_weights_update_group"
        call_servers(servers, lambda server: server.call(route, body | ranks[server.url]), meanwhile=join)


TRANSPORTS: dict[str, Callable[[RunConfig, ParallelState], Transport]] = {
    "disk": DiskTransport,
    "tensor": TensorTransport,
    "distributed": DistributedTransport,
}
"""Values of ``rollout.sglang.weight_sync``."""


class WeightHashes:
    """Computes hashes of SGLang's tensors from a stream of Hugging Face tensors.

    A hash is the first 8 bytes of the SHA-256, in hexadecimal (sglang/srt/managers/mm_utils.py:899, 0.5.23). SGLang
    concatenates q, k, v and gate, up by rows, in the order of the stream.

    Attributes:
        is_needed: False turns hashing off.
    """

    def __init__(self, *, is_needed: bool) -> None:
        self.is_needed = is_needed
        self._hashes: dict[str, hashlib._Hash] = {}

    def watch(self, weights: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[str, Tensor]]:
        """Hash the tensors of a stream while passing them on."""
        for name, tensor in weights:
            if self.is_needed:
                fused = name
                for pattern, replacement in _FUSED:
                    fused = pattern.sub(replacement, fused)
                digest = self._hashes.setdefault(fused, hashlib.sha256())
                digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy().tobytes())
                if name in ("model.embed_tokens.weight", "lm_head.weight"):
                    digest.update(bytes(-len(tensor) % _VOCAB_MULTIPLE * tensor[0].nbytes))
            yield name, tensor

    def by_name(self) -> dict[str, str]:
        """Return the hash of each of SGLang's tensors."""
        return {name: digest.hexdigest()[:16] for name, digest in self._hashes.items()}


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bucket:
    """Tensors that are sent together.

    Attributes:
        tensors: of one dtype, with their Hugging Face names.
        is_last: whether it is the last one.
    """

    tensors: Sequence[NamedTensor]
    is_last: bool

    def flat(self) -> Tensor:
        """Return a copy of all tensors' bytes, [bytes] uint8, without padding."""
        return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in self.tensors])


def buckets(weights: Iterable[NamedTensor], max_bytes: int) -> Iterator[Bucket]:
    """Split a stream into buckets of one dtype; a tensor larger than ``max_bytes`` gets its own bucket.

    The stream is exhausted when the last bucket is yielded. A bucket's tensors are not kept, so the stream may reuse
    them.
    """
    held: list[NamedTensor] = []
    num_bytes = 0
    for name, tensor in weights:
        if held and (num_bytes + tensor.nbytes > max_bytes or tensor.dtype != held[0][1].dtype):
            yield Bucket(tensors=held, is_last=False)
            held, num_bytes = [], 0
        held.append((name, tensor))
        num_bytes += tensor.nbytes
    yield Bucket(tensors=held, is_last=True)


def serialize(bucket: Bucket) -> str:
    """Return a bucket as SGLang's ``flattened_bucket``, for a server without shared memory.

    Base64 of a pickle of the flat bytes and, per tensor, the attributes of the server's ``FlattenedTensorMetadata``
    (sglang/srt/weight_sync/tensor_bucket.py, 0.5.23); its unpickler admits SimpleNamespace. Offsets are in bytes.
    """
    metadata, start = [], 0
    for name, tensor in bucket.tensors:
        end = start + tensor.nbytes
        fields = {"shape": tuple(tensor.shape), "dtype": tensor.dtype, "numel": tensor.nbytes}
        metadata.append(SimpleNamespace(name=name, start_idx=start, end_idx=end, **fields))
        start = end
    content = {"flattened_tensor": bucket.flat().cpu(), "metadata": metadata}
    return base64.b64encode(pickle.dumps(content)).decode()


def _last_fields(version: int, *, is_last: bool) -> dict[str, object]:
    """Return the fields that end an update: a server reports the version as soon as it receives it."""
    return {"weight_version": str(version), "flush_cache": True} if is_last else {"flush_cache": False}


def _own_address(urls: Sequence[str]) -> str:
    """Return the address of this host for the servers' hosts: loopback only if all servers are local."""
    addresses = []
    for url in urls:
        parts = urlsplit(url)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
            probe.connect((parts.hostname, parts.port or 80))  # sends nothing, only selects the route
            addresses.append(str(probe.getsockname()[0]))
    return min(addresses, key=lambda address: address.startswith("127."))
