"""Streams cut to buckets: nothing is lost, nothing is added, and the server unpickles what the trainer holds."""

from __future__ import annotations

import base64
import itertools
import pickle
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from megatron_sdsearch.sglang.transports import Bucket, buckets, serialize

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.int64]
SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


@st.composite
def streams(draw: st.DrawFn) -> list[tuple[str, Tensor]]:
    kinds = draw(st.lists(st.tuples(SHAPES, st.sampled_from(DTYPES)), min_size=1, max_size=12))
    random = torch.Generator().manual_seed(draw(st.integers(0, 99)))
    return [
        (f"t{i}", torch.randint(-99, 99, shape, generator=random).to(dtype)) for i, (shape, dtype) in enumerate(kinds)
    ]


@given(streams(), st.integers(1, 200))
def test_buckets_tile_the_stream(stream: list[tuple[str, Tensor]], max_bytes: int) -> None:
    cut = list(buckets(iter(stream), max_bytes))
    assert [pair for bucket in cut for pair in bucket.tensors] == stream
    assert [bucket.is_last for bucket in cut] == [False] * (len(cut) - 1) + [True]
    for bucket in cut:
        assert len({tensor.dtype for _, tensor in bucket.tensors}) == 1
        assert len(bucket.tensors) == 1 or sum(tensor.nbytes for _, tensor in bucket.tensors) <= max_bytes


@given(streams(), st.integers(1, 200))
def test_no_bucket_ends_sooner_than_it_must(stream: list[tuple[str, Tensor]], max_bytes: int) -> None:
    cut = list(buckets(iter(stream), max_bytes))
    for bucket, following in itertools.pairwise(cut):
        (_, next_one), *_ = following.tensors
        size = sum(tensor.nbytes for _, tensor in bucket.tensors)
        assert size + next_one.nbytes > max_bytes or next_one.dtype != bucket.tensors[0][1].dtype


def test_the_stream_is_drawn_from_one_bucket_at_a_time() -> None:
    drawn: list[int] = []

    def stream() -> Iterator[tuple[str, Tensor]]:
        for index in range(6):
            drawn.append(index)
            yield str(index), torch.zeros(2)

    cut = buckets(stream(), 16)
    next(cut)
    assert drawn == [0, 1, 2], "one tensor more, to know that the bucket is full"
    list(cut)
    assert drawn == list(range(6))


@given(streams(), st.integers(1, 200))
def test_what_the_server_unpickles_is_what_was_sent(stream: list[tuple[str, Tensor]], max_bytes: int) -> None:
    """Read as SGLang's FlattenedTensorBucket.reconstruct_tensors does."""
    received = []
    for bucket in buckets(iter(stream), max_bytes):
        content = pickle.loads(base64.b64decode(serialize(bucket)))
        flat, end = content["flattened_tensor"], 0
        for meta in content["metadata"]:
            assert meta.start_idx == end, "without a gap"
            end = meta.end_idx
            assert meta.numel == meta.end_idx - meta.start_idx
            assert type(meta.shape) is tuple
            received.append((meta.name, flat[meta.start_idx : meta.end_idx].view(meta.dtype).reshape(meta.shape)))
        assert end == flat.nbytes
    assert [name for name, _ in received] == [name for name, _ in stream]
    for (_, theirs), (_, ours) in zip(received, stream, strict=True):
        assert (theirs.dtype, theirs.shape) == (ours.dtype, ours.shape)
        assert torch.equal(theirs, ours)


def test_of_a_view_only_its_own_bytes_travel() -> None:
    """Pickle writes a view's whole storage: an embedding without its padding is such a view."""
    whole = torch.arange(1000, dtype=torch.float32)
    small = serialize(Bucket(tensors=[("t", whole[:3])], is_last=True))
    assert len(small) < 2000
    transposed = Bucket(tensors=[("t", torch.arange(6.0).reshape(2, 3).T)], is_last=True)
    assert transposed.flat().view(torch.float32).tolist() == [0, 3, 1, 4, 2, 5]


def test_a_flat_bucket_is_a_copy() -> None:
    """A server may still be reading when the trainer goes on."""
    tensor = torch.nn.Parameter(torch.zeros(4))
    flat = Bucket(tensors=[("t", tensor)], is_last=True).flat()
    with torch.no_grad():
        tensor.fill_(1.0)
    assert not flat.requires_grad
    assert flat.view(torch.float32).tolist() == [0.0] * 4


@pytest.mark.parametrize("max_bytes", [1, 7, 8, 15, 16])
def test_a_tensor_larger_than_a_bucket_has_one_to_itself(max_bytes: int) -> None:
    stream = [("small", torch.zeros(1)), ("large", torch.zeros(4)), ("other", torch.zeros(1))]
    names = [[name for name, _ in bucket.tensors] for bucket in buckets(iter(stream), max_bytes)]
    assert names == [["small"], ["large"], ["other"]]
