"""What is minimised: L = L_GRPO + alpha * L_SD (paper section 3.3), or the supervised loss of the warm start.

Torch only. Logits exist for the wanted rows alone, ``chunk_rows`` of them at a time; denominators come in as weights
(``batching/packing.py``) and leave as sums (``parallel/schedule.py``).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.loss.correction import agreement, importance_weights
from megatron_sdsearch.loss.grpo import grpo_loss
from megatron_sdsearch.loss.jsd import vocab_parallel_jsd, vocab_parallel_topk_jsd
from megatron_sdsearch.loss.logprobs import vocab_parallel_entropy, vocab_parallel_logprobs
from megatron_sdsearch.loss.topk import TopKDistribution, chosen_topk
from megatron_sdsearch.parallel.vocab import VocabShard
from megatron_sdsearch.records import GROUP_CLASSES

Metrics = dict[str, Tensor]
"""0-dim, on the device and without gradient: reading each there would stall the GPU once per metric."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class RowLogits:
    """Logits of chosen rows of one packed microbatch, on demand.

    Attributes:
        hidden: [T, h] final hidden states.
        project: [n, h] -> [n, V/tp].
        shard: the columns' place in the vocabulary.
        chunk_rows: rows whose logits exist at one time.
        temperature: of sampling; log-probabilities are taken at it.
    """

    hidden: Tensor
    project: Callable[[Tensor], Tensor]
    shard: VocabShard
    chunk_rows: int
    temperature: float

    def map(self, rows: Tensor, read: Callable[[Tensor, int, int], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
        """Concatenate ``read(logits, start, end)`` over chunks of ``rows``; logits of a chunk are not kept.

        With more than one chunk the backward pass projects each again rather than holding all of them.
        """

        def run(hidden: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
            return read(self.project(hidden[rows[start:end]]), start, end)

        bounds = [(s, min(s + self.chunk_rows, len(rows))) for s in range(0, max(len(rows), 1), self.chunk_rows)]
        if len(bounds) == 1 or not torch.is_grad_enabled():
            parts = [run(self.hidden, *bound) for bound in bounds]
        else:
            parts = [checkpoint(run, self.hidden, *bound, use_reentrant=False) for bound in bounds]
        return tuple(torch.cat(columns) for columns in zip(*parts, strict=True))


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PolicyRows:
    """The tokens that GRPO speaks of; all [N].

    Attributes:
        rows: indices into T.
        labels: the sampled ids.
        rollout_logprobs: of the engine that sampled them, nats.
        old_logprobs: of the trainer before the step's first update, nats; None where that is this very pass.
        ref_logprobs: of the reference, nats; None without one.
        advantages: of their trajectories.
        weights: sum to 1 over the global minibatch.
    """

    rows: Tensor
    labels: Tensor
    rollout_logprobs: Tensor
    old_logprobs: Tensor | None
    ref_logprobs: Tensor | None
    advantages: Tensor
    weights: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TeacherTarget:
    """What the teacher says at Q rows; constants.

    Attributes:
        distribution: [Q, V/tp] logits, or the k most probable ids.
        entropy: [Q] nats, of the distribution over the whole vocabulary.
    """

    distribution: Tensor | TopKDistribution
    entropy: Tensor


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class DistillRows:
    """The tokens whose distribution follows the teacher's; a subset of the policy tokens.

    Attributes:
        rows: [Q] indices into T, ascending.
        target: of the teacher, row by row.
        weights: [Q]; sum to 1 over the global minibatch, or to the share of its trajectories that have a teacher.
        classes: [Q] index into ``records.GROUP_CLASSES``; for metrics alone.
        alpha: weight of the distillation loss at this step.
    """

    rows: Tensor
    target: TeacherTarget
    weights: Tensor
    classes: Tensor
    alpha: float


def policy_logprobs(logits: RowLogits, rows: Tensor, labels: Tensor) -> Tensor:
    """[N] log-probabilities (nats) of ``labels`` at ``rows``."""

    def read(part: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
        return (vocab_parallel_logprobs(part, labels[start:end], logits.shard, temperature=logits.temperature),)

    return logits.map(rows, read)[0]


def sd_search_loss(
    logits: RowLogits, policy: PolicyRows, distill: DistillRows | None, config: ObjectiveConfig
) -> tuple[Tensor, Metrics]:
    """GRPO plus alpha times the divergence from the teacher, each a sum with global weights.

    Returns:
        A scalar with gradient, and metrics that add up over microbatches and data-parallel ranks; of those whose name
        ends in ``_max`` the maximum is to be taken.
    """
    current, entropy, divergence, query_entropy = _read_rows(logits, policy, distill, config)
    old = current.detach() if policy.old_logprobs is None else policy.old_logprobs
    importance, is_cut = importance_weights(
        old, policy.rollout_logprobs, config.importance_correction, config.importance_cap
    )
    terms = grpo_loss(
        current,
        old,
        policy.advantages,
        policy.weights,
        clip_low=config.clip_low,
        clip_high=config.clip_high,
        ref_logprobs=policy.ref_logprobs,
        kl_coef=config.kl_coef if policy.ref_logprobs is not None else 0.0,
        entropy=entropy,
        entropy_coef=config.entropy_coef,
        importance_weights=importance,
    )
    loss = terms.loss
    values = {name: getattr(terms, name) for name in ("policy_loss", "kl", "entropy", "clip_fraction", "old_kl")}
    if importance is not None:
        values["importance_cut_share"] = (policy.weights * is_cut).sum()
    if distill is not None:
        values["distill_loss"] = (distill.weights * divergence).sum()
        loss = loss + distill.alpha * values["distill_loss"]
        gap = query_entropy - distill.target.entropy
        values |= _by_class({"jsd": divergence.detach(), "entropy_gap": gap}, distill)
    values["loss"] = loss
    metrics = {name: value.detach() for name, value in values.items()}
    return loss, metrics | agreement(old, policy.rollout_logprobs, policy.weights)


def supervised_loss(logits: RowLogits, rows: Tensor, labels: Tensor, weights: Tensor) -> tuple[Tensor, Metrics]:
    """Cross entropy (nats) of the demonstrated tokens, summed with global weights."""
    loss = -(weights * policy_logprobs(logits, rows, labels)).sum()
    return loss, {"loss": loss.detach()}


def _read_rows(
    logits: RowLogits, policy: PolicyRows, distill: DistillRows | None, config: ObjectiveConfig
) -> tuple[Tensor, ...]:
    """Log-probabilities [N], entropies [N], divergences [Q] and the student's entropies [Q] from one pass."""
    shard, temperature = logits.shard, logits.temperature
    # Query tokens are policy tokens: their logits are rows of the same chunk, never projected twice.
    places = torch.searchsorted(policy.rows, distill.rows) if distill is not None else policy.rows[:0]

    def read(part: Tensor, start: int, end: int) -> tuple[Tensor, ...]:
        logprobs = vocab_parallel_logprobs(part, policy.labels[start:end], shard, temperature=temperature)
        # Without a bonus the entropy is only watched: -log p of the sampled tokens estimates it, for nothing.
        entropy = (
            vocab_parallel_entropy(part, shard, temperature=temperature)
            if config.entropy_coef > 0
            else -logprobs.detach()
        )
        if distill is None:
            return logprobs, entropy, logprobs[:0], logprobs[:0]
        first, last = torch.searchsorted(places, torch.tensor([start, end], device=places.device)).tolist()
        student = part[places[first:last] - start]
        divergence = _divergence(student, distill.target.distribution, slice(first, last), logits, config)
        # Last, where a recomputation for the backward pass has already got all that it wants, and stops.
        query_entropy = vocab_parallel_entropy(student.detach(), shard, temperature=temperature)
        return logprobs, entropy, divergence, query_entropy

    return logits.map(policy.rows, read)


def _divergence(
    student: Tensor, teacher: Tensor | TopKDistribution, rows: slice, logits: RowLogits, config: ObjectiveConfig
) -> Tensor:
    shard, temperature, beta, divergence = logits.shard, logits.temperature, config.beta, config.divergence
    if isinstance(teacher, TopKDistribution):
        topk = TopKDistribution(ids=teacher.ids[rows], logprobs=teacher.logprobs[rows], log_tail=teacher.log_tail[rows])
    elif config.topk is None:
        return vocab_parallel_jsd(
            student, teacher[rows], shard, beta=beta, temperature=temperature, divergence=divergence
        )
    else:
        topk = chosen_topk(student, teacher[rows], shard, config.topk, of=config.topk_of, temperature=temperature)
    return vocab_parallel_topk_jsd(
        student, topk, shard, beta=beta, tail=config.tail, temperature=temperature, divergence=divergence
    )


def _by_class(values: Mapping[str, Tensor], distill: DistillRows) -> dict[str, Tensor]:
    """Per group class the weighted values and the weight: sums, whose ratio over all ranks is the class's mean."""
    weights = {kind: distill.weights * (distill.classes == index) for index, kind in enumerate(GROUP_CLASSES)}
    sums = {f"{name}_{kind}": (weights[kind] * value).sum() for name, value in values.items() for kind in weights}
    return sums | {f"distill_weight_{kind}": weight.sum() for kind, weight in weights.items()}
