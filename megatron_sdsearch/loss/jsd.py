"""The distillation loss of SD-Search: how far the student's next-token distribution is from the teacher's.

Owns the divergences over the full vocabulary and over the teacher's top-k, without ever gathering logits; their forms
are ``divergences.py``'s. Leaves the choice of positions, the mean over them and alpha to ``objective.py``. Source: L_SD
of SD-Search, arXiv 2605.18299. Derivations: ``docs/math/jsd.md``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sdsearch.loss.divergences import Divergence, DivergenceName, check_choice
from megatron_sdsearch.loss.logprobs import (
    LogNormalizer,
    check_temperature,
    compute_dtype,
    log_normalizers,
    row_blocks,
)
from megatron_sdsearch.parallel.vocab import VocabShard

Tail = Literal["bucket", "renormalize", "drop"]


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class TopKDistribution:
    """The teacher's k most probable ids per row, and how much probability lies outside them. Same on every rank.

    Attributes:
        ids: [Q, k] int64 global ids, most probable first; of equals, the lower id first.
        logprobs: [Q, k] nats, of the distribution over the whole vocabulary.
        log_tail: [Q] log of the probability outside ``ids``; -inf when there is no id outside.
    """

    ids: Tensor
    logprobs: Tensor
    log_tail: Tensor


def vocab_parallel_jsd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    shard: VocabShard,
    *,
    beta: float = 0.5,
    temperature: float = 1.0,
    divergence: DivergenceName = "jsd",
) -> Tensor:
    """Divergence between teacher and student over the full vocabulary, per row.

    Args:
        student_logits: [Q, V/tp]; receives a gradient, in its own type, zero on padding.
        teacher_logits: [Q, V/tp]; a constant, even if it requires a gradient.
        shard: which columns this rank holds.
        beta: the teacher's weight in the mixture ``m = beta p + (1 - beta) q`` of the JSD; inside (0, 1). The paper's
            JSD is 0.5. The other divergences have no use for it.
        temperature: divides the logits of both; above 0.
        divergence: ``jsd``: beta KL(p||m) + (1-beta) KL(q||m); ``forward_kl``: KL(p||q); ``reverse_kl``: KL(q||p);
            ``mse``: sum of (p - q)^2 (the paper's ablation).

    Returns:
        [Q] nats (``mse``: no unit), the same on every rank, in fp32, or float64 if an input is. The JSD with beta 0.5
        is symmetric and at most log 2. Three all-reduces forward, of [2, Q] each; none backward.

    Raises:
        ValueError: logits do not fit the shard or each other, or an option is out of range.
    """
    shard.check_logits(student_logits, "student_logits")
    shard.check_logits(teacher_logits, "teacher_logits")
    _check_rows("teacher_logits", teacher_logits, student_logits)
    check_temperature(temperature)
    values: Tensor = _FullDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher_logits.detach(), shard, Divergence(divergence, beta), temperature
    )
    return values


@torch.no_grad()
def teacher_topk(teacher_logits: Tensor, shard: VocabShard, k: int, *, temperature: float = 1.0) -> TopKDistribution:
    """The exact k most probable ids over the whole vocabulary; each rank shows the others its own k best, no more.

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
    shard.check_logits(teacher_logits, "teacher_logits")
    check_temperature(temperature)
    if k < 1:
        raise ValueError(f"k must be at least 1, got {k}")
    ids = _global_top_ids(teacher_logits, shard, min(k, shard.vocab_size))
    logprobs = _HeadAndTail.of(teacher_logits, ids, shard, temperature).logprobs()
    return TopKDistribution(ids=ids, logprobs=logprobs[:, :-1], log_tail=logprobs[:, -1])


def vocab_parallel_topk_jsd(
    student_logits: Tensor,
    topk: TopKDistribution,
    shard: VocabShard,
    *,
    beta: float = 0.5,
    tail: Tail = "bucket",
    temperature: float = 1.0,
    divergence: DivergenceName = "jsd",
) -> Tensor:
    """Divergence between teacher and student seen through the teacher's top-k, per row.

    Args:
        student_logits: [Q, V/tp]; receives a gradient, in its own type, zero on padding.
        topk: what ``teacher_topk`` made of the teacher, with the same temperature.
        shard: which columns this rank holds.
        beta: as in ``vocab_parallel_jsd``.
        tail: what becomes of the ids outside the top-k (the paper does not say). ``bucket``: one more entry that holds
            the rest of both masses, a lower bound of the full divergence (JSD and KL); ``renormalize``: both are
            divided by their mass on the top-k; ``drop``: the sum runs over the top-k alone, nothing is rescaled.
        temperature: divides the student's logits; above 0.
        divergence: as in ``vocab_parallel_jsd``.

    Returns:
        [Q] nats (``mse``: no unit), the same on every rank to the last bit: each computes it from the same [Q, k + 1]
        numbers. Two all-reduces forward, of [Q] and [Q, k + 1]; none backward.

    Raises:
        ValueError: logits do not fit the shard or ``topk``, or an option is out of range.
    """
    shard.check_logits(student_logits, "student_logits")
    _check_topk(topk, student_logits)
    check_temperature(temperature)
    check_choice("tail", tail, Tail)
    values: Tensor = _TopKDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits, topk, shard, Divergence(divergence, beta), tail, temperature
    )
    return values


class _FullDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, shard: VocabShard, divergence: Divergence, temperature: float
    ) -> Tensor:
        normalizers = log_normalizers([student, teacher], shard, temperature)
        sums = torch.zeros_like(torch.stack([each.maximum for each in normalizers]))
        for rows, log_p, log_q in _full_blocks(student, teacher, normalizers, shard):
            value, slope = divergence.terms(log_p, log_q)
            sums[0, rows], sums[1, rows] = value.sum(-1), slope.sum(-1)
        values, slope_sum = shard.all_reduce(sums, "sum").unbind()
        maxima = (each.maximum for each in normalizers)
        log_sums = (each.log_sum for each in normalizers)
        ctx.save_for_backward(student, teacher, slope_sum, *maxima, *log_sums)
        ctx.shard, ctx.divergence, ctx.temperature = shard, divergence, temperature
        return values.clone()  # not a view of ``sums``, which the backward pass still needs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        student, teacher, slope_sum, *numbers = ctx.saved_tensors
        pairs = zip(numbers[:2], numbers[2:], strict=True)
        normalizers = [LogNormalizer(maximum, log_sum, ctx.temperature) for maximum, log_sum in pairs]
        grad, scale = torch.zeros_like(student), grad_output / ctx.temperature
        for rows, log_p, log_q in _full_blocks(student, teacher, normalizers, ctx.shard):
            _, slope = ctx.divergence.terms(log_p, log_q)
            slope -= log_q.exp_() * slope_sum[rows, None]
            grad[rows, : slope.shape[1]] = slope * scale[rows, None]
        return grad, None, None, None, None


class _TopKDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        student: Tensor,
        topk: TopKDistribution,
        shard: VocabShard,
        divergence: Divergence,
        tail: Tail,
        temperature: float,
    ) -> Tensor:
        parts = _HeadAndTail.of(student, topk.ids, shard, temperature)
        log_p = torch.cat([topk.logprobs, topk.log_tail[:, None]], dim=1).to(parts.head.dtype)
        values, entry_gradient = _entry_gradient(log_p, parts, divergence, tail)
        ctx.save_for_backward(student, topk.ids, parts.tail_maximum, parts.tail_log_sum, entry_gradient)
        ctx.shard, ctx.temperature = shard, temperature
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        student, ids, tail_maximum, tail_log_sum, entry_gradient = ctx.saved_tensors
        within_tail = LogNormalizer(_finite(tail_maximum), _finite(tail_log_sum), ctx.temperature)
        columns, is_local = ctx.shard.local_columns(ids)
        scaled = entry_gradient * (grad_output / ctx.temperature)[:, None]
        head_gradient = torch.where(is_local, scaled[:, :-1], 0.0)
        grad = torch.zeros_like(student)
        for rows, tail_logits in _tail_blocks(student, ids, ctx.shard, entry_gradient.dtype):
            # An id of the tail gets its share q_i / q_tail of what the entry gets; top-k ids are -inf here: share 0.
            block = within_tail.logprobs(tail_logits, rows).exp_().mul_(scaled[rows, -1:])
            block.scatter_add_(1, columns[rows], head_gradient[rows])
            grad[rows, : block.shape[1]] = block
        return grad, None, None, None, None, None


@dataclass(frozen=True, slots=True, eq=False)
class _HeadAndTail:
    """Logits seen through k chosen ids, the same on every rank.

    The tail has a maximum of its own. Seen from the row's maximum its sum underflows (in fp32, from 87 nats on), and
    one minus the head's mass has no digits left long before that.

    Attributes:
        head: [Q, k] logits of the chosen ids.
        tail_maximum: [Q] largest logit outside them; -inf if there is none.
        tail_log_sum: [Q] log of the tail's ``sum exp((z - tail_maximum) / temperature)``; -inf if there is none.
        temperature: divides the logits.
    """

    head: Tensor
    tail_maximum: Tensor
    tail_log_sum: Tensor
    temperature: float

    @classmethod
    def of(cls, logits: Tensor, ids: Tensor, shard: VocabShard, temperature: float) -> _HeadAndTail:
        dtype = compute_dtype(logits)
        maximum = torch.full(ids.shape[:1], -math.inf, dtype=dtype, device=logits.device)
        for rows, tail in _tail_blocks(logits, ids, shard, dtype):
            maximum[rows] = tail.amax(-1)
        shard.all_reduce(maximum, "max")
        total, shift = torch.zeros_like(maximum), _finite(maximum)
        for rows, tail in _tail_blocks(logits, ids, shard, dtype):
            total[rows] = ((tail - shift[rows, None]) / temperature).exp().sum(-1)
        columns, is_local = shard.local_columns(ids)
        # Exactly one rank owns an id: summing the others' zeros to its logit changes no bit of it.
        owned = torch.where(is_local, logits.gather(1, columns).to(dtype), 0.0)
        summed = shard.all_reduce(torch.cat([owned, total[:, None]], dim=1), "sum")
        return cls(summed[:, :-1], maximum, summed[:, -1].log(), temperature)

    def logprobs(self) -> Tensor:
        """[Q, k + 1]: log-probability of each chosen id over the whole vocabulary, then of all the rest together."""
        maximum = torch.maximum(self.head.amax(-1), self.tail_maximum)
        head = (self.head - maximum[:, None]) / self.temperature
        tail = (self.tail_maximum - maximum) / self.temperature + self.tail_log_sum
        return torch.cat([head, tail[:, None]], dim=1).log_softmax(-1)

    def head_logprobs(self) -> Tensor:
        """[Q, k]: log-probability of each chosen id among the chosen ones, precise even if the tail has all mass."""
        return ((self.head - self.head.amax(-1, keepdim=True)) / self.temperature).log_softmax(-1)


def _entry_gradient(log_p: Tensor, student: _HeadAndTail, divergence: Divergence, tail: Tail) -> tuple[Tensor, Tensor]:
    """``J`` [Q] and its gradient [Q, k + 1] by the logit of each entry, the tail being one entry in every form."""
    if tail == "bucket":
        return divergence.summed(log_p, student.logprobs())
    if tail == "renormalize":
        values, gradient = divergence.summed(log_p[:, :-1].log_softmax(-1), student.head_logprobs())
        return values, torch.nn.functional.pad(gradient, (0, 1))
    log_q = student.logprobs()
    value, slope = divergence.terms(log_p[:, :-1], log_q[:, :-1])
    # The tail has no term of its own, yet its logits move the normaliser of those that have one.
    slope = torch.nn.functional.pad(slope, (0, 1))
    return value.sum(-1), slope - log_q.exp() * slope.sum(-1, keepdim=True)


def _full_blocks(
    student: Tensor, teacher: Tensor, normalizers: list[LogNormalizer], shard: VocabShard
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows with the teacher's and the student's local log-probabilities, padding left out."""
    of_student, of_teacher = normalizers
    student, teacher = shard.valid_columns(student), shard.valid_columns(teacher)
    for rows in row_blocks(student):
        yield rows, of_teacher.logprobs(teacher[rows], rows), of_student.logprobs(student[rows], rows)


def _tail_blocks(logits: Tensor, ids: Tensor, shard: VocabShard, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
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
    """[Q, k] ids of the largest logits over all ranks, largest first, of equals the lower id first."""
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
        # A NaN counts as the largest: it is chosen, and so makes the row's log-probabilities NaN for all to see.
        block = columns[rows].nan_to_num(nan=math.inf, posinf=math.inf, neginf=-math.inf)
        threshold = block.topk(k, dim=1).values[:, -1:]
        above, tied = block > threshold, block == threshold
        num_wanted = k - above.sum(dim=1, keepdim=True)
        chosen = above | (tied & (tied.cumsum(dim=1, dtype=torch.int32) <= num_wanted))
        ascending = chosen.nonzero()[:, 1].reshape(-1, k)
        top = block.gather(1, ascending).sort(dim=1, descending=True, stable=True)
        values[rows], indices[rows] = top.values, ascending.gather(1, top.indices)
    return values, indices


def _finite(values: Tensor) -> Tensor:
    """-inf to 0: an empty tail has no column that the number could shift, but -inf minus -inf is NaN."""
    return torch.where(values == -math.inf, 0.0, values)


def _check_rows(name: str, tensor: Tensor, student_logits: Tensor) -> None:
    if tensor.shape[0] != student_logits.shape[0]:
        raise ValueError(f"{name} has {tensor.shape[0]} rows, student_logits {student_logits.shape[0]}")


def _check_topk(topk: TopKDistribution, student_logits: Tensor) -> None:
    _check_rows("topk.ids", topk.ids, student_logits)
    if topk.ids.dtype != torch.int64 or topk.ids.dim() != 2 or topk.ids.shape[1] == 0:
        raise ValueError(f"topk.ids must be int64 [Q, k] with k >= 1, got {topk.ids.dtype} {list(topk.ids.shape)}")
    if topk.logprobs.shape != topk.ids.shape or topk.log_tail.shape != topk.ids.shape[:1]:
        shapes = [list(tensor.shape) for tensor in (topk.ids, topk.logprobs, topk.log_tail)]
        raise ValueError(f"topk.ids, topk.logprobs and topk.log_tail do not fit together: {shapes}")
