"""The updates of one step: reference and old log-probabilities, then per minibatch the live teacher and the update."""

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
    """This rank's part of a step's samples, in as many minibatches as the schedule counts on.

    Raises:
        TrainingError: no sample has a token to learn: the step would leave the policy as it is.
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
    """One update per minibatch, in order; an empty one advances the schedule alone.

    With one to learn from the policy's own pass is the old policy: the extra forward pass is left out.

    Args:
        policy: learns; also the teacher, with its weights of that moment.
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
    """The hindsight teacher: the policy's own current weights on the augmented context, no gradient (paper 3.2).

    Returns:
        One target per microbatch; empty off the last stage or with no teacher.
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
    """The loss of each microbatch, with what was read for it before the update.

    Args:
        minibatch: to learn from.
        objective: coefficients and forms.
        alpha: of this step.
        old: [N] per microbatch; empty for the pass itself, as off the last stage, where no loss is called.
        ref: [N] per microbatch; empty without a reference.
        targets: of the teacher per microbatch; empty when nothing is distilled.
    """
    none = [None] * len(minibatch.student)
    return [
        partial(
            sd_search_loss, config=objective, alpha=alpha, old_logprobs=old_one, ref_logprobs=ref_one, target=target
        )
        for old_one, ref_one, target in zip(old or none, ref or none, targets or none, strict=True)
    ]
