"""The updates of one step: reference and old log-probabilities, then for each minibatch teacher and update."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

from torch import Tensor

from megatron_sdsearch.batching.packing import Minibatch, TrainBatch, pack
from megatron_sdsearch.config import ObjectiveConfig, RunConfig
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.logging import PhaseTimer
from megatron_sdsearch.loss.objective import TeacherTarget, read_teacher, sd_search_loss
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.records import TrainingSample
from megatron_sdsearch.training.policy import Network, Policy, RowLoss, UpdateResult


def pack_samples(samples: Sequence[TrainingSample], config: RunConfig, parallel: ParallelState) -> TrainBatch:
    """Pack this rank's part of a step's samples into ``config.updates_per_step`` minibatches.

    Raises:
        TrainingError: no sample has a token to learn from.
    """
    if not any(sample.loss_mask.any() for sample in samples):
        raise TrainingError(f"none of the step's {len(samples)} samples has a sampled token; look at the data")
    return pack(
        samples,
        num_ranks=parallel.dp_size,
        rank=parallel.dp_rank,
        num_minibatches=config.updates_per_step,
        max_tokens=config.train.max_tokens_per_microbatch,
        alignment=parallel.alignment,
        equal_lengths=parallel.pp_size > 1,
        objective=config.objective,
    )


def run_updates(
    policy: Policy,
    reference: Network | None,
    batch: TrainBatch,
    objective: ObjectiveConfig,
    alpha: float,
    timer: PhaseTimer,
) -> list[UpdateResult]:
    """Run one update per minibatch, in order; an empty minibatch only advances the schedule.

    A single non-empty minibatch needs no forward pass of the old policy, which is the policy itself.

    Args:
        policy: to update; with its current weights also the teacher.
        reference: the starting policy for the KL term, or None.
        batch: of the step.
        objective: coefficients and forms.
        alpha: weight of the distillation loss at this step.
        timer: of the phases ``reference``, ``old``, ``teacher`` and ``update``.
    """
    minibatches = batch.minibatches
    with timer.phase("reference"):
        ref = [reference.logprobs(m) if reference is not None else [] for m in minibatches]
    with timer.phase("old"):
        is_only = sum(m.num_policy_tokens > 0 for m in minibatches) <= 1
        old = [[] if is_only else policy.logprobs(m) for m in minibatches]
    results = []
    for minibatch, old_logprobs, ref_logprobs in zip(minibatches, old, ref, strict=True):
        with timer.phase("teacher"):
            targets = teacher_targets(policy, minibatch, objective)
        with timer.phase("update"):
            losses = minibatch_losses(minibatch, objective, alpha, old=old_logprobs, ref=ref_logprobs, targets=targets)
            results.append(policy.update(minibatch, losses))
    return results


def teacher_targets(policy: Policy, minibatch: Minibatch, objective: ObjectiveConfig) -> list[TeacherTarget]:
    """Compute the teacher's targets: the policy's current weights on the augmented context, no gradient (paper 3.2).

    Returns:
        One target per microbatch; empty except on the last stage, and without a teacher.
    """
    return policy.collect(minibatch.teacher, partial(read_teacher, config=objective))


def minibatch_losses(
    minibatch: Minibatch,
    objective: ObjectiveConfig,
    alpha: float,
    *,
    old: Sequence[Tensor] = (),
    ref: Sequence[Tensor] = (),
    targets: Sequence[TeacherTarget] = (),
) -> list[RowLoss]:
    """Return the loss of each microbatch, bound to what was computed before the update.

    Args:
        minibatch: to learn from.
        objective: coefficients and forms.
        alpha: of this step.
        old: [N] log-probabilities per microbatch; empty if the update's own pass is the old policy, and except on the
            last stage, the only one that computes a loss.
        ref: [N] log-probabilities per microbatch; empty without a reference.
        targets: of the teacher per microbatch; empty without distillation.
    """
    none = [None] * len(minibatch.student)
    return [
        partial(
            sd_search_loss, config=objective, alpha=alpha, old_logprobs=old_one, ref_logprobs=ref_one, target=target
        )
        for old_one, ref_one, target in zip(old or none, ref or none, targets or none, strict=True)
    ]
