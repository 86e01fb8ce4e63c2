"""Exact top-k ids over a sharded vocabulary, and distributions reduced to k ids and a tail.

Logits are never gathered. The divergences are in ``jsd.py``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_sdsearch.loss.logprobs import check_choice, check_temperature, compute_dtype, row_blocks
from megatron_sdsearch.parallel.vocab import VocabShard

TopKOf = Literal["teacher", "student", "union"]
_NO_ID = -1


@dataclass(frozen=True, slots=True, eq=False)
class TopKDistribution:
    """The teacher's log-probabilities at k ids per row, and the mass outside them; the same on every rank.

    Attributes:
        ids: [Q, k] int64 global ids, each at most once per row; -1 marks an unused entry. ``teacher_topk`` sorts by
            descending probability, and by ascending id among equals.
        logprobs: [Q, k] nats, under the distribution over the whole vocabulary; -inf at -1.
        log_tail_mass: [Q] log of the probability outside ``ids``; -inf if ``ids`` is the whole vocabulary.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail_mass: Tensor

    def __getitem__(self, rows: slice) -> TopKDistribution:
        """Select rows."""
        return TopKDistribution(self.ids[rows], self.logprobs[rows], self.log_tail_mass[rows])


@torch.no_grad()
def teacher_topk(teacher_logits: Tensor, shard: VocabShard, k: int, *, temperature: float = 1.0) -> TopKDistribution:
    """Find the k most probable ids of each row over the whole vocabulary, with their log-probabilities.

    The result is exact although each rank sends only its own k best: an id outside its rank's k best cannot be among
    the k best of all. Takes two gathers of [Q, k] and all-reduces of [Q] and [Q, k + 1].

    Args:
        teacher_logits: [Q, V/tp], any floating point type; no gradient flows.
        shard: the vocabulary columns of this rank.
        k: number of ids; at least 1, and limited to the size of the vocabulary. The paper takes 50.
        temperature: divides the logits; above 0. It does not change which ids are chosen.

    Returns:
        The ids in descending order of probability, the lower id first among equals, with log-probabilities in nats,
        fp32 (float64 for float64 logits). The same on every rank. A row with a NaN gets NaN log-probabilities, so that
        all ranks see a loss that is not finite.

    Raises:
        ValueError: the logits do not fit the shard, k is below 1, or the temperature is not positive.

    Examples:
        >>> logits = torch.tensor([[0.2, 0.5, 0.3]]).log()
        >>> topk = teacher_topk(logits, VocabShard.whole(3), k=2)
        >>> topk.ids.tolist()
        [[1, 2]]
        >>> [round(p, 4) for p in topk.logprobs.exp()[0].tolist()], round(topk.log_tail_mass.exp().item(), 4)
        ([0.5, 0.3], 0.2)
    """
    return chosen_topk(teacher_logits, teacher_logits, shard, k, of="teacher", temperature=temperature)


@torch.no_grad()
def chosen_topk(
    student_logits: Tensor,
    teacher_logits: Tensor,
    shard: VocabShard,
    k: int,
    *,
    of: TopKOf,
    temperature: float = 1.0,
) -> TopKDistribution:
    """Read the teacher at the k most probable ids of the teacher, of the student, or of both.

    The choice of ids may depend on the student, but has no gradient: it is a constant almost everywhere. Takes two
    gathers of [Q, k] per model that ids are taken from, and all-reduces of [Q] and [Q, k + 1] (union: [Q, 2k + 1]).

    Args:
        student_logits: [Q, V/tp]; no gradient flows.
        teacher_logits: [Q, V/tp]; no gradient flows.
        shard: the vocabulary columns of this rank.
        k: number of ids per model; as in ``teacher_topk``.
        of: the model that chooses. ``union`` gives [Q, 2k] ids: the teacher's k, then the student's, with -1 in place
            of those that are among the teacher's, so that all rows have the same layout.
        temperature: divides the logits; above 0.

    Returns:
        The teacher's distribution at these ids, for ``vocab_parallel_topk_jsd``.

    Raises:
        ValueError: the logits do not fit the shard or each other, or an option is out of range.
    """
    roles = {"teacher": teacher_logits, "student": student_logits}
    for role, logits in roles.items():
        shard.check_logits(logits, f"{role}_logits")
    check_rows("teacher_logits", teacher_logits, student_logits)
    check_choice("of", of, TopKOf)
    check_temperature(temperature)
    tops = [_global_top_ids(logits, shard, k) for role, logits in roles.items() if of in (role, "union")]
    ids = tops[0]
    if of == "union":  # the student's ids that are among the teacher's become -1
        is_known = torch.stack([(ids == column[:, None]).any(1) for column in tops[1].unbind(1)], dim=1)
        ids = torch.cat([ids, tops[1].masked_fill(is_known, _NO_ID)], dim=1)
    logprobs = TopKLogits.read(teacher_logits, ids, shard, temperature).logprobs()
    return TopKDistribution(ids, logprobs[:, :-1], logprobs[:, -1])


@dataclass(frozen=True, slots=True, eq=False)
class TopKLogits:
    """Logits reduced to k chosen ids (the head) and all others together (the tail); the same on every rank.

    The tail has a maximum of its own: relative to the row's maximum its sum underflows (in fp32, from 87 nats on), and
    one minus the head's mass loses all digits long before that.

    Attributes:
        head: [Q, k] logits of the chosen ids; -inf where the id is -1.
        tail_maximum: [Q] largest logit of the tail; -inf if it is empty.
        tail_log_sum: [Q] log of the tail's ``sum exp((z - tail_maximum) / temperature)``; -inf if it is empty.
        temperature: divides the logits.
    """

    head: Tensor
    tail_maximum: Tensor
    tail_log_sum: Tensor
    temperature: float

    @classmethod
    def read(cls, logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float) -> TopKLogits:
        """Reduce ``logits`` [Q, V/tp] to ``ids`` [Q, k]; takes all-reduces of [Q] and [Q, k + 1]."""
        dtype = compute_dtype(logits)
        maximum = torch.full(ids.shape[:1], -math.inf, dtype=dtype, device=logits.device)
        for rows, tail in tail_blocks(logits, ids, shard, dtype):
            maximum[rows] = tail.amax(-1)
        shard.all_reduce(maximum, "max")
        total, shift = torch.zeros_like(maximum), finite(maximum)
        for rows, tail in tail_blocks(logits, ids, shard, dtype):
            total[rows] = ((tail - shift[rows, None]) / temperature).exp().sum(-1)
        columns, is_local = shard.local_columns(ids)
        # Exactly one rank owns an id: adding the other ranks' zeros to its logit changes no bit.
        owned = torch.where(is_local, logits.gather(1, columns).to(dtype), 0.0)
        summed = shard.all_reduce(torch.cat([owned, total[:, None]], dim=1), "sum")
        head = summed[:, :-1].masked_fill(ids == _NO_ID, -math.inf)  # an unused entry has no mass
        return cls(head, maximum, summed[:, -1].log(), temperature)

    def logprobs(self) -> Tensor:
        """Compute [Q, k + 1] log-probabilities over the whole vocabulary: each chosen id, then the tail."""
        maximum = torch.maximum(self.head.amax(-1), self.tail_maximum)
        head = (self.head - maximum[:, None]) / self.temperature
        tail = (self.tail_maximum - maximum) / self.temperature + self.tail_log_sum
        return torch.cat([head, tail[:, None]], dim=1).log_softmax(-1)

    def head_logprobs(self) -> Tensor:
        """Compute [Q, k] log-probabilities among the chosen ids; precise even if the tail has all the mass."""
        return ((self.head - self.head.amax(-1, keepdim=True)) / self.temperature).log_softmax(-1)


def tail_blocks(logits: Tensor, ids: Tensor, shard: VocabShard, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Yield blocks of rows of the local logits, without padding and with -inf at the chosen ``ids``."""
    valid = shard.valid_columns(logits)
    columns, is_local = shard.local_columns(ids)
    for rows in row_blocks(valid):
        block = valid[rows]
        # Ids of other ranks add zero to a placeholder column, which leaves it unchanged.
        num_chosen = torch.zeros_like(block, dtype=torch.uint8)
        num_chosen.scatter_add_(1, columns[rows], is_local[rows].to(torch.uint8))
        yield rows, block.to(dtype).masked_fill(num_chosen.bool(), -math.inf)


def _global_top_ids(logits: Tensor, shard: VocabShard, k: int) -> Tensor:
    """Find the ids [Q, k] of the largest logits over all ranks: descending, the lower id first among equals."""
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    k = min(k, shard.vocab_size)
    num_candidates = min(k, shard.shard_size)
    values, columns = _local_top(shard.valid_columns(logits), min(num_candidates, shard.num_valid))
    # Only the last ranks can be short of candidates: after a stable sort their -inf never precedes a real id.
    missing = (0, num_candidates - columns.shape[1])
    values = torch.nn.functional.pad(values.to(compute_dtype(logits)), missing, value=-math.inf)
    ids = torch.nn.functional.pad(columns + shard.vocab_start_index, missing, value=shard.padded_vocab_size)
    all_values = torch.cat(shard.all_gather(values), dim=1)
    all_ids = torch.cat(shard.all_gather(ids), dim=1)
    order = all_values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return all_ids.gather(1, order)


def _local_top(columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find values and columns [Q, k] of the k largest, in order; ``torch.topk`` alone breaks ties arbitrarily."""
    values = columns.new_empty((columns.shape[0], k))
    indices = torch.empty(values.shape, dtype=torch.int64, device=columns.device)
    for rows in row_blocks(columns):
        # A NaN counts as the largest: once chosen, it makes the row's log-probabilities NaN on all ranks.
        block = columns[rows].nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        threshold = block.topk(k, dim=1).values[:, -1:]
        above, tied = block > threshold, block == threshold
        num_wanted = k - above.sum(dim=1, keepdim=True)
        chosen = above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= num_wanted))
        ascending = chosen.nonzero()[:, 1].reshape(-1, k)
        top = block.gather(1, ascending).sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = top.values, ascending.gather(1, top.indices)
    return values, indices


def finite(values: Tensor) -> Tensor:
    """Replace -inf, the maximum of an empty tail, by 0: -inf minus -inf would be NaN."""
    return torch.where(values == -math.inf, 0.0, values)


def check_rows(name: str, tensor: Tensor, student_logits: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has as many rows as ``student_logits``."""
    if tensor.shape[0] != student_logits.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, student_logits {student_logits.shape[0]}")
