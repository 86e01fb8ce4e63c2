"""The distillation loss of SD-Search: the divergence between the student's and the teacher's next-token distributions.

The JSD, and the three divergences of the paper's ablation, over the full vocabulary or over chosen ids, without
gathering logits. Ids are chosen in ``topk.py``; positions, their weights and alpha are applied in ``objective.py``.
Source: L_SD of SD-Search, arXiv 2605.18299. Derivations: ``docs/math/jsd.md``.
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
from megatron_sdsearch.loss.topk import TopKDistribution, TopKLogits, check_rows, finite, tail_blocks
from megatron_sdsearch.parallel.vocab import VocabShard

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
    """Compute the divergence between teacher and student over the full vocabulary, for each of Q rows.

    With the teacher's distribution ``p = softmax(teacher_logits / temperature)``, the student's ``q`` likewise, and the
    mixture ``m = beta p + (1 - beta) q``::

        jsd         beta KL(p || m) + (1 - beta) KL(q || m)
        forward_kl  KL(p || q)
        reverse_kl  KL(q || p)
        mse         sum of (p - q)^2

    The gradient of the JSD by logit i is ``(1 - beta) / temperature * q_i (log(q_i / m_i) - KL(q || m))``: local to a
    column once KL(q || m) is known, so the backward pass does not communicate. The forward pass takes three
    all-reduces of [2, Q]. Source: L_SD of SD-Search, arXiv 2605.18299; derivation: ``docs/math/jsd.md``.

    Args:
        student_logits: [Q, V/tp], any floating point type. Its gradient has the same type and is zero on padding.
        teacher_logits: [Q, V/tp]; a constant, even if it requires a gradient.
        shard: the vocabulary columns of this rank.
        beta: the teacher's weight in the mixture; inside (0, 1). The paper takes 0.5. Only the JSD uses it.
        temperature: divides the logits of both; above 0.
        divergence: one of the four above.

    Returns:
        [Q] nats (``mse``: no unit), the same on every rank, in fp32, or in float64 if an input is. At beta 0.5 the JSD
        is symmetric and at most log 2.

    Raises:
        ValueError: the logits do not fit the shard or each other, or an option is out of range.

    Examples:
        Q = 2 rows over a vocabulary of 4: in the first the two agree, in the second they have no id in common:

        >>> shard = VocabShard.whole(4)
        >>> teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0], [30.0, 0.0, 0.0, 0.0]])
        >>> student = torch.tensor([[2.0, 1.0, 0.0, 0.0], [0.0, 30.0, 0.0, 0.0]], requires_grad=True)
        >>> [round(value, 4) for value in vocab_parallel_jsd(student, teacher, shard).tolist()]  # 0 and log 2
        [0.0, 0.6931]
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
    """Compute the divergence between teacher and student reduced to k chosen ids, for each of Q rows.

    The divergences are those of ``vocab_parallel_jsd``, summed over k entries, or k + 1 with the tail. The forward pass
    takes two all-reduces, of [Q] and [Q, k + 1]; the backward pass none. Source: L_SD of SD-Search, arXiv 2605.18299,
    with k = 50; the paper does not say how the tail is treated. Derivation: ``docs/math/jsd.md``.

    Args:
        student_logits: [Q, V/tp], any floating point type. Its gradient has the same type and is zero on padding.
        topk: the teacher at k ids of each row, from ``teacher_topk`` or ``chosen_topk`` with the same temperature.
        shard: the vocabulary columns of this rank.
        beta: as in ``vocab_parallel_jsd``.
        tail: how ids outside ``topk`` count. ``bucket``: as one more entry with their total probability, which gives a
            lower bound of the full divergence (JSD and both KLs). ``renormalize``: not at all, both distributions are
            divided by their mass on ``topk``. ``drop``: not at all, nothing is rescaled.
        temperature: divides the student's logits; above 0.
        divergence: as in ``vocab_parallel_jsd``.

    Returns:
        [Q] nats (``mse``: no unit), bit for bit the same on every rank, since each computes it from the same
        [Q, k + 1] numbers. In fp32, or in float64 if the student's logits are.

    Raises:
        ValueError: the logits do not fit the shard or ``topk``, or an option is out of range.

    Examples:
        The student has moved all mass outside the teacher's best id to one other id. The bucket does not see the
        difference, as it holds the same mass on both sides:

        >>> shard = VocabShard.whole(3)
        >>> teacher = torch.tensor([[0.5, 0.25, 0.25]]).log()
        >>> student = torch.tensor([[0.5, 0.5, 0.0]]).log()
        >>> topk = teacher_topk(teacher, shard, k=1)
        >>> round(vocab_parallel_topk_jsd(student, topk, shard).item(), 4)
        0.0
        >>> round(vocab_parallel_jsd(student, teacher, shard).item(), 4)
        0.1079
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
    the student. An entry is one vocabulary id, or all ids outside the top-k together. With ``h_e = q_e df/dq_e``, the
    gradient by the logit of an id is ``dJ/dz_i = h_i - q_i sum_e h_e``: once every rank has ``sum_e h_e``, each
    computes its own columns alone. The code carries ``h`` and not ``df/dq`` because for the forward KL ``h = -p``,
    while ``df/dq = -p/q`` overflows.

    Attributes:
        name: of the divergence.
        beta: the teacher's weight in the JSD's mixture; inside (0, 1).
    """

    name: DivergenceName
    beta: float

    def __post_init__(self) -> None:
        check_choice("divergence", self.name, DivergenceName)
        if not 0 < self.beta < 1:
            raise ValueError(f"beta must lie inside (0, 1), got {self.beta}")

    def terms(self, log_p: Tensor, log_q: Tensor) -> tuple[Tensor, Tensor]:
        """Compute ``f`` and ``h`` of each entry. At -inf, an entry without mass, both are limits, not NaN."""
        if self.name == "jsd":
            # log m is computed relative to the larger of p and q. Unlike logaddexp, this is exact at p = q, where the
            # loss and its gradient must vanish, and it keeps its relative precision nearby.
            gap = log_q - log_p
            # Not where(.., 1 - beta, beta): torch turns two Python numbers into fp32, whatever the other tensors are.
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
        """Compute ``J`` [Q] and its gradient by log q, ``h_e - q_e sum h`` [Q, entries]; all entries are local."""
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
        return values.clone()  # not a view of ``sums``, which the backward pass needs unchanged

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
            # An id of the tail gets the share q_i / q_tail of its entry's gradient; top-k ids are -inf here, share 0.
            block = within_tail.logprobs(tail_logits, rows).exp_().mul_(scaled[rows, -1:])
            block.scatter_add_(1, columns[rows], head_gradient[rows])
            grad[rows, : block.shape[1]] = block
        return grad, None, None, None, None, None


def _entry_gradient(log_p: Tensor, student: TopKLogits, divergence: Divergence, tail: Tail) -> tuple[Tensor, Tensor]:
    """Compute ``J`` [Q] and its gradient [Q, k + 1] by the logit of each entry; the tail is always one entry."""
    if tail == "bucket":
        return divergence.summed(log_p, student.logprobs())
    if tail == "renormalize":
        values, gradient = divergence.summed(log_p[:, :-1].log_softmax(-1), student.head_logprobs())
        return values, torch.nn.functional.pad(gradient, (0, 1))
    log_q = student.logprobs()
    value, gradient = divergence.terms(log_p[:, :-1], log_q[:, :-1])
    # The tail adds no term, but its logits change the normaliser of the others.
    gradient = torch.nn.functional.pad(gradient, (0, 1))
    return value.sum(-1), gradient - log_q.exp() * gradient.sum(-1, keepdim=True)


def _full_blocks(
    student: Tensor, teacher: Tensor, normalizers: list[LogNormalizer], shard: VocabShard
) -> Iterator[tuple[slice, Tensor, Tensor]]:
    """Yield blocks of rows with the teacher's and the student's local log-probabilities, without padding."""
    of_student, of_teacher = normalizers
    student, teacher = shard.valid_columns(student), shard.valid_columns(teacher)
    for rows in row_blocks(student):
        yield rows, of_teacher.logprobs(teacher[rows], rows), of_student.logprobs(student[rows], rows)
