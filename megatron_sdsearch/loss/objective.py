"""The objective: L = L_GRPO + alpha * L_SD (paper section 3.3), or the supervised loss of the warm start.

The microbatch's weights already hold the denominators (``batching/packing.py``), so each loss is a plain sum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_sdsearch.batching.packing import Microbatch
from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.loss.grpo import agreement, grpo_loss, importance_weights
from megatron_sdsearch.loss.jsd import vocab_parallel_jsd, vocab_parallel_topk_jsd
from megatron_sdsearch.loss.logprobs import vocab_parallel_entropy, vocab_parallel_logprobs
from megatron_sdsearch.loss.rows import RowLogits
from megatron_sdsearch.loss.topk import TopKDistribution, chosen_topk, teacher_topk
from megatron_sdsearch.records import GROUP_CLASSES

Metrics = dict[str, Tensor]
"""0-dim tensors on the device, without gradient: reading each one on the host would stall the GPU once per metric."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherTarget:
    """The teacher's distributions at the Q distilled tokens of a microbatch; constants.

    Attributes:
        distribution: [Q, V/tp] logits, or the k most probable ids with their log-probabilities.
        entropy: [Q] nats, of the distribution over the whole vocabulary.
    """

    distribution: Tensor | TopKDistribution
    entropy: Tensor


def read_teacher(logits: RowLogits, batch: Microbatch, config: ObjectiveConfig) -> TeacherTarget:
    """Read the target of one microbatch from the teacher's sequences; row r belongs to the r-th distilled token."""

    def read(part: Tensor, *_: int) -> tuple[Tensor, ...]:
        entropy = vocab_parallel_entropy(part, logits.shard, temperature=logits.temperature)
        if config.topk is None or config.topk_of != "teacher":  # the student's logits decide which ids are read
            return entropy, part
        top = teacher_topk(part, logits.shard, config.topk, temperature=logits.temperature)
        return entropy, top.ids, top.logprobs, top.log_tail_mass

    entropy, *parts = logits.map(batch.distill_mask.nonzero()[:, 0], read)
    return TeacherTarget(distribution=parts[0] if len(parts) == 1 else TopKDistribution(*parts), entropy=entropy)


def sd_search_loss(
    logits: RowLogits,
    batch: Microbatch,
    config: ObjectiveConfig,
    *,
    alpha: float = 0.0,
    old_logprobs: Tensor | None = None,
    ref_logprobs: Tensor | None = None,
    target: TeacherTarget | None = None,
) -> tuple[Tensor, Metrics]:
    """Compute the GRPO loss plus alpha times the divergence from the teacher, each a sum with global weights.

    Args:
        logits: of the policy on ``batch``.
        batch: a student's microbatch with N policy tokens, Q of them distilled.
        config: coefficients, divergence and top-k.
        alpha: weight of the distillation loss at this step.
        old_logprobs: [N] nats, of the trainer before the step's first update; None when this is that update.
        ref_logprobs: [N] nats, of the reference policy; None without one.
        target: the teacher at the Q tokens; None when nothing is distilled.

    Returns:
        A scalar with gradient, and metrics that add up over microbatches and data-parallel ranks, except that names
        ending in ``_max`` are combined by maximum. The divergence is reported under its own name.
    """
    rows = batch.loss_mask.nonzero()[:, 0]
    rollout_logprobs, weights = batch.rollout_logprobs[rows], batch.policy_weights[rows]
    current, entropy, divergence, student_entropy = _read_rows(logits, batch, rows, target, config)
    old = current.detach() if old_logprobs is None else old_logprobs
    importance, is_cut = importance_weights(old, rollout_logprobs, config.importance_correction, config.importance_cap)
    loss, values = grpo_loss(
        current,
        old,
        batch.advantages[rows],
        weights,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        ref_logprobs=ref_logprobs,
        kl_coef=config.kl_coef if ref_logprobs is not None else 0.0,
        entropy=entropy,
        entropy_coef=config.entropy_coef,
        importance_weights=importance,
    )
    if importance is not None:
        values["importance_cut_share"] = (weights * is_cut).sum()
    if target is not None:
        distill_rows = batch.distill_mask.nonzero()[:, 0]
        distill_weights, classes = batch.distill_weights[distill_rows], batch.group_classes[distill_rows]
        values["distill_loss"] = (distill_weights * divergence).sum()
        loss = loss + alpha * values["distill_loss"]
        measured = {config.divergence: divergence, "entropy_gap": student_entropy - target.entropy}
        # Weighted values and weights per group class: after summing over ranks, their ratio is the mean of the class.
        for index, name in enumerate(GROUP_CLASSES):
            class_weights = distill_weights * (classes == index)
            values[f"distill_weight_{name}"] = class_weights.sum()
            values |= {f"{what}_{name}": (class_weights * value.detach()).sum() for what, value in measured.items()}
    values["loss"] = loss
    metrics = {name: value.detach() for name, value in values.items()}
    return loss, metrics | agreement(old, rollout_logprobs, weights)


def supervised_loss(logits: RowLogits, batch: Microbatch) -> tuple[Tensor, Metrics]:
    """Compute the cross entropy (nats) of the demonstrated tokens, summed with global weights."""
    rows = batch.loss_mask.nonzero()[:, 0]
    loss = -(batch.policy_weights[rows] * logits.logprobs(batch)).sum()
    return loss, {"loss": loss.detach()}


def _read_rows(
    logits: RowLogits, batch: Microbatch, rows: Tensor, target: TeacherTarget | None, config: ObjectiveConfig
) -> tuple[Tensor, ...]:
    """Compute log-probabilities [N], entropies [N], divergences [Q] and the student's entropies [Q] in one pass."""
    shard, temperature = logits.shard, logits.temperature
    labels = batch.labels[rows]
    # Distilled tokens are policy tokens, so their logits are rows of the same chunk and are not projected again.
    distilled = batch.distill_mask[rows].nonzero()[:, 0]

    def read(part: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
        logprobs = vocab_parallel_logprobs(part, labels[start:end], shard, temperature=temperature)
        # Without a bonus the entropy is only a metric; -log p of the sampled tokens estimates it at no cost.
        entropy = (
            vocab_parallel_entropy(part, shard, temperature=temperature)
            if config.entropy_coef > 0
            else -logprobs.detach()
        )
        if target is None:
            return logprobs, entropy, logprobs[:0], logprobs[:0]
        bounds = torch.tensor([start, end], device=distilled.device)
        first, last = torch.searchsorted(distilled, bounds).tolist()
        student = part[distilled[first:last] - start]
        divergence = _divergence(student, target.distribution[first:last], logits, config)
        # Last, because a recomputation for the backward pass stops as soon as it has what it needs.
        student_entropy = vocab_parallel_entropy(student.detach(), shard, temperature=temperature)
        return logprobs, entropy, divergence, student_entropy

    return logits.map(rows, read)


def _divergence(
    student: Tensor, teacher: Tensor | TopKDistribution, logits: RowLogits, config: ObjectiveConfig
) -> Tensor:
    """Compute the divergence [Q'] of the student's logits [Q', V/tp] from the teacher's logits or top-k."""
    shard, temperature, beta, divergence = logits.shard, logits.temperature, config.beta, config.divergence
    if isinstance(teacher, Tensor):
        if config.topk is None:
            return vocab_parallel_jsd(
                student, teacher, shard, beta=beta, temperature=temperature, divergence=divergence
            )
        teacher = chosen_topk(student, teacher, shard, config.topk, of=config.topk_of, temperature=temperature)
    return vocab_parallel_topk_jsd(
        student, teacher, shard, beta=beta, tail=config.tail, temperature=temperature, divergence=divergence
    )
