"""The choice of top-k ids, and the teacher's and the student's distributions at them.

Owns the exact top-k over a vocabulary that is spread over ranks, without gathering logits, and the view of a row as k
ids and a tail. Leaves every divergence to ``jsd.py``.
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


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TopKDistribution:
    """The teacher at k chosen ids per row, and how much probability lies outside them. Same on every rank.

    Attributes:
        ids: [Q, k] int64 global ids, each at most once in a row; -1 stands for none. From ``teacher_topk``: most
            probable first; of equals, the lower id first.
        logprobs: [Q, k] nats, of the distribution over the whole vocabulary; -inf at -1.
        log_tail_mass: [Q] log of the probability outside ``ids``; -inf when there is no id outside.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail_mass: Tensor

    def __getitem__(self, rows: slice) -> TopKDistribution:
        """The distribution of some rows."""
        return TopKDistribution(
            ids=self.ids[rows], logprobs=self.logprobs[rows], log_tail_mass=self.log_tail_mass[rows]
        )


@torch.no_grad()
def teacher_topk(teacher_logits: Tensor, shard: VocabShard, k: int, *, temperature: float = 1.0) -> TopKDistribution:
    """The exact k most probable ids over the whole vocabulary; ranks exchange no more than their own k best.

    Args:
        teacher_logits: [Q, V/tp]; no gradient flows.
        shard: which columns this rank holds.
        k: how many ids; at least 1, and cut to the vocabulary's size. The paper takes 50.
        temperature: divides the logits; above 0. It does not change which ids are chosen.

    Returns:
        The distribution, the same on every rank; of equal logits, the lower id is taken. A row with a NaN gets NaN
        log-probabilities, for the loss to be found not finite on all ranks at once. Communication: gathers of [Q, k]
        twice, all-reduces of [Q] and of [Q, k + 1].

    Raises:
        ValueError: logits do not fit the shard, k is below 1, or the temperature is not positive.
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
    """The teacher at the most probable ids of the teacher, the student, or both; ``teacher_topk`` is the first alone.

    Which ids these are depends on the student, and is a constant all the same: a choice has no gradient.

    Args:
        student_logits: [Q, V/tp]; no gradient flows.
        teacher_logits: [Q, V/tp]; no gradient flows.
        shard: which columns this rank holds.
        k: how many ids of each; as in ``teacher_topk``.
        of: whose. ``union`` gives [Q, 2k]: the teacher's k, then the student's with -1 in place of those that are
            among the teacher's already, so that rows have one layout whatever they share.
        temperature: divides the logits; above 0.

    Returns:
        As ``teacher_topk``, for ``vocab_parallel_topk_jsd``. Communication: gathers of [Q, k] twice for each whose ids
        are taken, all-reduces of [Q] and of [Q, k + 1], or [Q, 2k + 1].

    Raises:
        ValueError: logits do not fit the shard or each other, or an option is out of range.
    """
    roles = {"teacher": teacher_logits, "student": student_logits}
    for role, logits in roles.items():
        shard.check_logits(logits, f"{role}_logits")
    check_rows("teacher_logits", teacher_logits, student_logits)
    check_choice("of", of, TopKOf)
    check_temperature(temperature)
    tops = [_global_top_ids(logits, shard, k) for role, logits in roles.items() if of in (role, "union")]
    ids = tops[0]
    if of == "union":  # an id of the student's that the teacher's hold, too, becomes -1
        is_known = torch.stack([(ids == column[:, None]).any(1) for column in tops[1].unbind(1)], dim=1)
        ids = torch.cat([ids, tops[1].masked_fill(is_known, _NO_ID)], dim=1)
    logprobs = TopKLogits.read(teacher_logits, ids, shard, temperature).logprobs()
    return TopKDistribution(ids=ids, logprobs=logprobs[:, :-1], log_tail_mass=logprobs[:, -1])


@dataclass(frozen=True, slots=True, eq=False)
class TopKLogits:
    """Logits seen through k chosen ids, the same on every rank.

    The tail has a maximum of its own. Seen from the row's maximum its sum underflows (in fp32, from 87 nats on), and
    one minus the head's mass has no digits left long before that.

    Attributes:
        head: [Q, k] logits of the chosen ids; -inf where there is no id.
        tail_maximum: [Q] largest logit outside them; -inf if there is none.
        tail_log_sum: [Q] log of the tail's ``sum exp((z - tail_maximum) / temperature)``; -inf if there is none.
        temperature: divides the logits.
    """

    head: Tensor
    tail_maximum: Tensor
    tail_log_sum: Tensor
    temperature: float

    @classmethod
    def read(cls, logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float) -> TopKLogits:
        """Read ``logits`` [Q, V/tp] at ``ids`` [Q, k]; all-reduces of [Q] and of [Q, k + 1]."""
        dtype = compute_dtype(logits)
        maximum = torch.full(ids.shape[:1], -math.inf, dtype=dtype, device=logits.device)
        for rows, tail in tail_blocks(logits, ids, shard, dtype):
            maximum[rows] = tail.amax(-1)
        shard.all_reduce(maximum, "max")
        total, shift = torch.zeros_like(maximum), finite(maximum)
        for rows, tail in tail_blocks(logits, ids, shard, dtype):
            total[rows] = ((tail - shift[rows, None]) / temperature).exp().sum(-1)
        columns, is_local = shard.local_columns(ids)
        # Exactly one rank owns an id: summing the others' zeros to its logit changes no bit of it.
        owned = torch.where(is_local, logits.gather(1, columns).to(dtype), 0.0)
        summed = shard.all_reduce(torch.cat([owned, total[:, None]], dim=1), "sum")
        head = summed[:, :-1].masked_fill(ids == _NO_ID, -math.inf)  # no id: an entry without mass, at no rank's column
        return cls(head, maximum, summed[:, -1].log(), temperature)

    def logprobs(self) -> Tensor:
        """[Q, k + 1]: log-probability of each chosen id over the whole vocabulary, then of the tail."""
        maximum = torch.maximum(self.head.amax(-1), self.tail_maximum)
        head = (self.head - maximum[:, None]) / self.temperature
        tail = (self.tail_maximum - maximum) / self.temperature + self.tail_log_sum
        return torch.cat([head, tail[:, None]], dim=1).log_softmax(-1)

    def head_logprobs(self) -> Tensor:
        """[Q, k]: log-probability of each chosen id among the chosen ones, precise even if the tail has all mass."""
        return ((self.head - self.head.amax(-1, keepdim=True)) / self.temperature).log_softmax(-1)


def tail_blocks(logits: Tensor, ids: Tensor, shard: VocabShard, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    """Blocks of rows of the local logits, padding left out, with -inf in place of the chosen ``ids``."""
    valid = shard.valid_columns(logits)
    columns, is_local = shard.local_columns(ids)
    for rows in row_blocks(valid):
        block = valid[rows]
        # Ids of other ranks add zero to a placeholder column: nothing is ever written there.
        num_chosen = torch.zeros_like(block, dtype=torch.uint8)
        num_chosen.scatter_add_(1, columns[rows], is_local[rows].to(torch.uint8))
        yield rows, block.to(dtype).masked_fill(num_chosen.bool(), -math.inf)


def _global_top_ids(logits: Tensor, shard: VocabShard, k: int) -> Tensor:
    """[Q, k] ids of the largest logits over all ranks, largest first, of equals the lower id first.

    k is cut to the size of the vocabulary.
    """
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    k = min(k, shard.vocab_size)
    num_candidates = min(k, shard.shard_size)
    values, columns = _local_top(shard.valid_columns(logits), min(num_candidates, shard.num_valid))
    # Only the last ranks can be short of candidates: behind a stable sort, their -inf never precedes a real id.
    missing = (0, num_candidates - columns.shape[1])
    values = torch.nn.functional.pad(values.to(compute_dtype(logits)), missing, value=-math.inf)
    ids = torch.nn.functional.pad(columns + shard.vocab_start_index, missing, value=shard.padded_vocab_size)
    all_values = torch.cat(shard.all_gather(values), dim=1)
    all_ids = torch.cat(shard.all_gather(ids), dim=1)
    order = all_values.sort(dim=1, descending=True, stable=True).indices[:, :k]
    return all_ids.gather(1, order)


def _local_top(columns: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Values and column numbers [Q, k] of the k largest, in order; ``torch.topk`` alone breaks ties as it likes."""
    values = columns.new_empty((columns.shape[0], k))
    indices = torch.empty(values.shape, dtype=torch.int64, device=columns.device)
    for rows in row_blocks(columns):
        # A NaN counts as the largest: it is chosen, and so makes the row's log-probabilities NaN on all ranks.
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
    """-inf to 0: an empty tail has no column that the number could shift, but -inf minus -inf is NaN."""
    return torch.where(values == -math.inf, 0.0, values)


def check_rows(name: str, tensor: Tensor, student_logits: Tensor) -> None:
    """Raise ValueError unless ``tensor`` has the student's rows."""
    if tensor.shape[0] != student_logits.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, student_logits {student_logits.shape[0]}")
