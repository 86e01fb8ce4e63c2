"""The distillation loss of SD-Search: the divergence between the student's and the teacher's next-token distributions.

Owns the divergences over the full vocabulary and over chosen ids, without ever gathering logits: the JSD, and the three
that the paper's ablation puts in its place. The choice of ids is in ``topk.py``; the choice of positions, the mean over
them and alpha are in ``objective.py``. Source: L_SD of SD-Search, arXiv 2605.18299. Derivations: ``docs/math/jsd.md``.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from megatron_sdsearch.loss.logprobs import (
    LogNormalizer,
    check_choice,
    check_temperature,
    log_normalizers,
    row_blocks,
    times_log,
)
from megatron_sdsearch.loss.topk import TopKDistribution, TopKLogits, check_rows, finite, tail_blocks, teacher_topk
from megatron_sdsearch.parallel.vocab import VocabShard

__all__ = ["Tail", "TopKDistribution", "teacher_topk", "vocab_parallel_jsd", "vocab_parallel_topk_jsd"]

Tail = Literal["bucket", "renormalize", "drop"]
DivergenceName = Literal["jsd", "forward_kl", "reverse_kl", "mse"]


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
            JSD is 0.5. The other divergences ignore it.
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
    check_rows("teacher_logits", teacher_logits, student_logits)
    check_temperature(temperature)
    values: Tensor = _FullDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits, teacher_logits.detach(), shard, Divergence(divergence, beta), temperature
    )
    return values


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
    """Divergence between teacher and student seen through k chosen ids, per row.

    Args:
        student_logits: [Q, V/tp]; receives a gradient, in its own type, zero on padding.
        topk: what ``teacher_topk`` or ``chosen_topk`` made of the teacher, with the same temperature.
        shard: which columns this rank holds.
        beta: as in ``vocab_parallel_jsd``.
        tail: what becomes of the ids outside ``topk`` (the paper does not say). ``bucket``: one more entry that holds
            the remaining mass of both, a lower bound of the full divergence (JSD and KL); ``renormalize``: both are
            divided by their mass on ``topk``; ``drop``: the sum runs over ``topk`` alone, nothing is rescaled.
        temperature: divides the student's logits; above 0.
        divergence: as in ``vocab_parallel_jsd``.

    Returns:
        [Q] nats (``mse``: no unit), the same on every rank to the last bit: each computes it from the same [Q, k + 1]
        numbers. Two all-reduces forward, of [Q] and [Q, k + 1]; none backward.

    Raises:
        ValueError: logits do not fit the shard or ``topk``, or an option is out of range.
    """
    shard.check_logits(student_logits, "student_logits")
    check_rows("topk.ids", topk.ids, student_logits)
    if topk.ids.dtype != torch.int64 or topk.ids.dim() != 2 or topk.ids.shape[1] == 0:
        raise ValueError(f"topk.ids must be int64 [Q, k] with k >= 1, got {topk.ids.dtype} {list(topk.ids.shape)}")
    if topk.logprobs.shape != topk.ids.shape or topk.log_tail_mass.shape != topk.ids.shape[:1]:
        shapes = [list(tensor.shape) for tensor in (topk.ids, topk.logprobs, topk.log_tail_mass)]
        raise ValueError(f"topk.ids, topk.logprobs and topk.log_tail_mass do not fit together: {shapes}")
    check_temperature(temperature)
    check_choice("tail", tail, Tail)
    values: Tensor = _TopKDivergence.apply(  # type: ignore[no-untyped-call]
        student_logits, topk, shard, Divergence(divergence, beta), tail, temperature
    )
    return values


@dataclass(frozen=True, slots=True)
class Divergence:
    """One divergence as ``f(p, q)`` per entry, together with ``h = q df/dq``.

    Every divergence here is a sum ``J = sum_e f(p_e, q_e)`` over entries ``e``, where ``p`` is the teacher and ``q``
    the student. An entry is a vocabulary id, or everything outside the top-k taken together. With ``h_e = q_e df/dq_e``
    and an entry that is one id, ``dJ/dz_i = h_i - q_i sum_e h_e``: once ``sum_e h_e`` is known everywhere, each rank
    finishes its own columns alone. The code carries ``h`` and not ``df/dq``: for the forward KL ``h = -p``, whereas
    ``df/dq = -p/q`` overflows.

    Attributes:
        name: which.
        beta: the teacher's weight in the JSD's mixture; inside (0, 1).
    """

    name: DivergenceName
    beta: float

    def __post_init__(self) -> None:
        check_choice("divergence", self.name, DivergenceName)
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie inside (0, 1), got {self.beta}")

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """``f`` and ``h`` of each entry. At -inf, no mass, it is the limit, not a NaN."""
        if self.name == "jsd":
            # log m is taken relative to the larger of p and q. Unlike logaddexp, this is exact at p = q, where the loss
            # and its gradient have to vanish, and keeps its relative precision near it.
            gap = log_q - log_p
            # Not where(.., 1 - beta, beta): of two Python numbers torch makes fp32, whatever the type of the others.
            weight_of_smaller = torch.full_like(gap, self.beta).masked_fill_(gap <= 0, 1 - self.beta)
            log_m_over_larger = torch.log1p(weight_of_smaller * torch.expm1(-gap.abs()))
            log_p_over_m = -gap.clamp(min=0) - log_m_over_larger
            log_q_over_m = gap.clamp(max=0) - log_m_over_larger
            gradient = (1 - self.beta) * times_log(log_q.exp(), log_q_over_m)
            return self.beta * times_log(log_p.exp(), log_p_over_m) + gradient, gradient
        p, q = log_p.exp(), log_q.exp()
        if self.name == "forward_kl":
            return times_log(p, log_p - log_q), -p
        if self.name == "reverse_kl":
            value = times_log(q, log_q - log_p)
            return value, value + q
        return (p - q).square(), 2 * q * (q - p)

    def summed(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """``J`` [Q], and ``h_e - q_e sum h`` [Q, entries], its gradient by log q; all entries are local."""
        value, gradient = self.terms(log_p, log_q)
        return value.sum(-1), gradient - log_q.exp() * gradient.sum(-1, keepdim=True)


class _FullDivergence(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, student: Tensor, teacher: Tensor, shard: VocabShard, divergence: Divergence, temperature: float
    ) -> Tensor:
        normalizers = log_normalizers([student, teacher], shard, temperature)
        sums = torch.zeros_like(torch.stack([each.maximum for each in normalizers]))
        for rows, log_p, log_q in _full_blocks(student, teacher, normalizers, shard):
            value, gradient = divergence.terms(log_p, log_q)
            sums[0, rows], sums[1, rows] = value.sum(-1), gradient.sum(-1)
        values, gradient_sum = shard.all_reduce(sums, "sum").unbind()
        numbers = [number for each in normalizers for number in (each.maximum, each.log_sum)]
        ctx.save_for_backward(student, teacher, gradient_sum, *numbers)
        ctx.shard, ctx.divergence, ctx.temperature = shard, divergence, temperature
        return values.clone()  # not a view of ``sums``, which the backward pass still needs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None]:
        student, teacher, gradient_sum, *numbers = ctx.saved_tensors
        pairs = zip(numbers[::2], numbers[1::2], strict=True)
        normalizers = [LogNormalizer(maximum, log_sum, ctx.temperature) for maximum, log_sum in pairs]
        grad, scale = torch.zeros_like(student), grad_output / ctx.temperature
        for rows, log_p, log_q in _full_blocks(student, teacher, normalizers, ctx.shard):
            _, gradient = ctx.divergence.terms(log_p, log_q)
            gradient -= log_q.exp_() * gradient_sum[rows, None]
            grad[rows, : gradient.shape[1]] = gradient * scale[rows, None]
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
        parts = TopKLogits.read(student, topk.ids, shard, temperature)
        log_p = torch.cat([topk.logprobs, topk.log_tail_mass[:, None]], dim=1).to(parts.head.dtype)
        values, entry_gradient = _entry_gradient(log_p, parts, divergence, tail)
        ctx.save_for_backward(student, topk.ids, parts.tail_maximum, parts.tail_log_sum, entry_gradient)
        ctx.shard, ctx.temperature = shard, temperature
        return values

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor, None, None, None, None, None]:
        student, ids, tail_maximum, tail_log_sum, entry_gradient = ctx.saved_tensors
        within_tail = LogNormalizer(finite(tail_maximum), finite(tail_log_sum), ctx.temperature)
        columns, is_local = ctx.shard.local_columns(ids)
        scaled = entry_gradient * (grad_output / ctx.temperature)[:, None]
        head_gradient = torch.where(is_local, scaled[:, :-1], 0.0)
        grad = torch.zeros_like(student)
        for rows, tail_logits in tail_blocks(student, ids, ctx.shard, entry_gradient.dtype):
            # An id of the tail gets its share q_i / q_tail of what the entry gets; top-k ids are -inf here: share 0.
            block = within_tail.logprobs(tail_logits, rows).exp_().mul_(scaled[rows, -1:])
            block.scatter_add_(1, columns[rows], head_gradient[rows])
            grad[rows, : block.shape[1]] = block
        return grad, None, None, None, None, None


def _entry_gradient(log_p: Tensor, student: TopKLogits, divergence: Divergence, tail: Tail) -> tuple[Tensor, Tensor]:
    """``J`` [Q] and its gradient [Q, k + 1] by the logit of each entry, the tail being one entry in every form."""
    if tail == "bucket":
        return divergence.summed(log_p, student.logprobs())
    if tail == "renormalize":
        values, gradient = divergence.summed(log_p[:, :-1].log_softmax(-1), student.head_logprobs())
        return values, torch.nn.functional.pad(gradient, (0, 1))
    log_q = student.logprobs()
    value, gradient = divergence.terms(log_p[:, :-1], log_q[:, :-1])
    # The tail has no term of its own, yet its logits move the normaliser of those that have one.
    gradient = torch.nn.functional.pad(gradient, (0, 1))
    return value.sum(-1), gradient - log_q.exp() * gradient.sum(-1, keepdim=True)


def _full_blocks(
    student: Tensor, teacher: Tensor, normalizers: list[LogNormalizer], shard: VocabShard
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Blocks of rows with the teacher's and the student's local log-probabilities, padding left out."""
    of_student, of_teacher = normalizers
    student, teacher = shard.valid_columns(student), shard.valid_columns(teacher)
    for rows in row_blocks(student):
        yield rows, of_teacher.logprobs(teacher[rows], rows), of_student.logprobs(student[rows], rows)
