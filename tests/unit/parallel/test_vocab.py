"""The index arithmetic of the sharded vocabulary. Its collectives are tested in tests/distributed."""

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from megatron_sdsearch.parallel.vocab import VocabShard


@st.composite
def all_shards(draw: st.DrawFn) -> list[VocabShard]:
    """The shards of all ranks, with any padding, up to ranks that hold nothing else."""
    size = draw(st.integers(1, 8))
    shard_size = draw(st.integers(1, 20))
    vocab_size = draw(st.integers(1, size * shard_size))
    return [
        VocabShard(vocab_size=vocab_size, padded_vocab_size=size * shard_size, size=size, rank=rank)
        for rank in range(size)
    ]


@settings(deadline=None)
@given(all_shards())
def test_shards_tile_the_padded_vocabulary(shards: list[VocabShard]) -> None:
    columns = [
        column
        for shard in shards
        for column in range(shard.vocab_start_index, shard.vocab_start_index + shard.shard_size)
    ]
    assert columns == list(range(shards[0].padded_vocab_size))
    assert sum(shard.num_valid for shard in shards) == shards[0].vocab_size


@settings(deadline=None)
@given(all_shards())
def test_every_id_belongs_to_exactly_one_rank_and_comes_back_from_it(shards: list[VocabShard]) -> None:
    ids = torch.arange(-3, shards[0].padded_vocab_size + 3)
    owners = torch.zeros_like(ids)
    for shard in shards:
        columns, is_local = shard.local_columns(ids)
        owners += is_local
        assert torch.equal((columns + shard.vocab_start_index)[is_local], ids[is_local])
        assert bool(((columns >= 0) & (columns < shard.shard_size)).all()), "a placeholder must be a usable index"
    assert torch.equal(owners.bool(), (ids >= 0) & (ids < shards[0].vocab_size)), "padding belongs to nobody"
    assert int(owners.max()) == 1


def test_uneven_padding_can_leave_a_rank_without_vocabulary() -> None:
    shards = [VocabShard(vocab_size=5, padded_vocab_size=8, size=4, rank=rank) for rank in range(4)]
    assert [shard.num_valid for shard in shards] == [2, 2, 1, 0]
    assert shards[3].valid_columns(torch.ones(3, 2)).shape == (3, 0)


def test_whole_vocabulary_has_one_rank_and_may_be_padded() -> None:
    assert VocabShard.whole(7).shard_size == 7
    padded = VocabShard.whole(7, padded_vocab_size=8)
    assert (padded.shard_size, padded.num_valid, padded.group) == (8, 7, None)


def test_whole_vocabulary_communicates_with_nobody() -> None:
    shard, tensor = VocabShard.whole(7), torch.tensor([1.0, 2.0])
    assert shard.all_reduce(tensor, "sum") is tensor
    assert tensor.tolist() == [1.0, 2.0]
    (gathered,) = shard.all_gather(tensor)
    assert gathered.tolist() == [1.0, 2.0]


def test_reducing_what_requires_a_gradient_is_refused_even_on_one_rank() -> None:
    with pytest.raises(ValueError, match=r"autograd\.Function"):
        VocabShard.whole(2).all_reduce(torch.ones(2, requires_grad=True), "sum")


def test_several_ranks_without_a_group_cannot_communicate() -> None:
    shard = VocabShard(vocab_size=4, padded_vocab_size=4, size=2, rank=0)
    with pytest.raises(ValueError, match="without a process group"):
        shard.all_reduce(torch.ones(2), "sum")
    with pytest.raises(ValueError, match="without a process group"):
        shard.all_gather(torch.ones(2))


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"vocab_size": 0, "padded_vocab_size": 4}, "vocab_size must be at least 1"),
        ({"vocab_size": 9, "padded_vocab_size": 8}, "padded_vocab_size 8 is below vocab_size 9"),
        ({"vocab_size": 5, "padded_vocab_size": 6, "size": 4}, "does not divide by the group's 4 ranks"),
        ({"vocab_size": 4, "padded_vocab_size": 4, "size": 2, "rank": 2}, "rank 2 is not among 2 ranks"),
        ({"vocab_size": 4, "padded_vocab_size": 4, "size": 2, "rank": -1}, "not a member of the group"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VocabShard(**sizes)


@pytest.mark.parametrize(
    ("logits", "message"),
    [
        (torch.ones(2, 5), r"teacher must be \[rows, 4\] on this rank, got \[2, 5\]"),
        (torch.ones(4), r"teacher must be \[rows, 4\]"),
        (torch.ones(2, 4, dtype=torch.int64), "teacher must be floating point"),
    ],
)
def test_logits_that_do_not_fit_are_refused(logits: torch.Tensor, message: str) -> None:
    shard = VocabShard(vocab_size=7, padded_vocab_size=8, size=2, rank=1)
    shard.check_logits(torch.ones(2, 4))
    with pytest.raises(ValueError, match=message):
        shard.check_logits(logits, "teacher")
