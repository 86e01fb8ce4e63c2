"""Streams of tensors cut to buckets, and one bucket as a flat run of bytes."""

from __future__ import annotations

import base64
import pickle
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from types import SimpleNamespace

import torch
from torch import Tensor

Named = tuple[str, Tensor]


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Bucket:
    """Tensors that travel together.

    Attributes:
        tensors: of one dtype, with their Hugging Face names.
        is_last: nothing comes after it.
    """

    tensors: Sequence[Named]
    is_last: bool

    def flat(self) -> Tensor:
        """[bytes] uint8: one tensor after the other, without padding, in memory of its own."""
        return torch.cat([tensor.detach().contiguous().view(-1).view(torch.uint8) for _, tensor in self.tensors])


def buckets(weights: Iterable[Named], max_bytes: int) -> Iterator[Bucket]:
    """Cut a stream; a tensor larger than ``max_bytes`` gets a bucket of its own, and so does another dtype.

    The stream is exhausted when the last bucket is given out. Tensors may be reused by the stream: they are not kept
    beyond the bucket.
    """
    held: list[Named] = []
    num_bytes = 0
    for name, tensor in weights:
        if held and (num_bytes + tensor.nbytes > max_bytes or tensor.dtype != held[0][1].dtype):
            yield Bucket(tensors=held, is_last=False)
            held, num_bytes = [], 0
        held.append((name, tensor))
        num_bytes += tensor.nbytes
    yield Bucket(tensors=held, is_last=True)


def serialize(bucket: Bucket) -> str:
    """A bucket as SGLang's ``flattened_bucket`` reads it, for a server without shared memory.

    Base64 of a pickle of the flat bytes and, per tensor, the attributes that the server's ``FlattenedTensorMetadata``
    has (sglang/srt/weight_sync/tensor_bucket.py, 0.5.23); its unpickler admits SimpleNamespace. Offsets are in bytes.
    """
    metadata, start = [], 0
    for name, tensor in bucket.tensors:
        end = start + tensor.nbytes
        metadata.append(
            SimpleNamespace(
                name=name,
                shape=tuple(tensor.shape),
                dtype=tensor.dtype,
                start_idx=start,
                end_idx=end,
                numel=tensor.nbytes,
            )
        )
        start = end
    content = {"flattened_tensor": bucket.flat().cpu(), "metadata": metadata}
    return base64.b64encode(pickle.dumps(content)).decode()
