"""What one step learns from its batch: reference and old log-probabilities, the live teacher, the updates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from torch import Tensor

from megatron_sdsearch.batching.packing import pack
from megatron_sdsearch.config import ObjectiveConfig, RunConfig
from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.logging import PhaseTimer
from megatron_sdsearch.loss.objective import (
    DistillRows,
    Metrics,
    PolicyRows,
    RowLogits,
    TeacherTarget,
    sd_search_loss,
)
from megatron_sdsearch.parallel.groups import ParallelState
from megatron_sdsearch.parallel.schedule import DeviceMicrobatch
from megatron_sdsearch.records import TrainBatch, TrainingSample
from megatron_sdsearch.training.policy import Network, Policy, UpdateResult
from megatron_sdsearch.training.teacher import HindsightTeacher

T = TypeVar("T")


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


class Learner:
    """Turns packed batches into updates of the policy.

    Args:
        policy: learns.
        reference: the starting policy for the KL term, or None.
        teacher: reads the policy at the hindsight context, anew before each update.
        config: of the run.
    """

    def __init__(self, policy: Policy, reference: Network | None, teacher: HindsightTeacher, config: RunConfig) -> None:
        self._policy = policy
        self._reference = reference
        self._teacher = teacher
        self._objective = config.objective

    def learn(self, batch: TrainBatch, step: int, timer: PhaseTimer) -> list[UpdateResult]:
        """One update per minibatch, in order; an empty one advances the schedule alone.

        With one to learn from the policy's own pass is the old policy: the extra forward pass is left out.
        """
        alpha = self._objective.alpha_at(step)
        minibatches = batch.minibatches
        with timer.phase("reference"):
            ref = [self._reference.logprobs(m) for m in minibatches] if self._reference is not None else None
        with timer.phase("old"):
            is_only = sum(m.num_policy_tokens > 0 for m in minibatches) <= 1
            old = None if is_only else [self._policy.logprobs(m) for m in minibatches]
        results = []
        for index, minibatch in enumerate(minibatches):
            with timer.phase("teacher"):
                targets = self._teacher.distributions(minibatch)
            with timer.phase("update"):
                loss = step_loss(self._objective, alpha, _at(old, index), _at(ref, index), targets)
                results.append(self._policy.update(minibatch, loss))
        return results


def step_loss(
    objective: ObjectiveConfig,
    alpha: float,
    old: Sequence[Tensor] | None,
    ref: Sequence[Tensor] | None,
    targets: Sequence[TeacherTarget],
) -> Callable[[RowLogits, DeviceMicrobatch], tuple[Tensor, Metrics]]:
    """The loss of one minibatch: what was read before the update, looked up by microbatch.

    Args:
        objective: coefficients and forms.
        alpha: of this step.
        old: [N] per microbatch, or None for the pass itself.
        ref: [N] per microbatch, or None without a reference.
        targets: of the teacher per microbatch; empty when nothing is distilled.
    """

    def loss(logits: RowLogits, batch: DeviceMicrobatch) -> tuple[Tensor, Metrics]:
        policy = PolicyRows(
            rows=batch.policy_rows,
            labels=batch.policy_labels,
            rollout_logprobs=batch.rollout_logprobs,
            old_logprobs=_at(old, batch.index),
            ref_logprobs=_at(ref, batch.index),
            advantages=batch.advantages,
            weights=batch.policy_weights,
        )
        distill = None
        if targets:
            distill = DistillRows(
                rows=batch.query_rows,
                target=targets[batch.index],
                weights=batch.distill_weights,
                classes=batch.query_classes,
                alpha=alpha,
            )
        return sd_search_loss(logits, policy, distill, objective)

    return loss


def _at(values: Sequence[T] | None, index: int) -> T | None:
    return None if values is None else values[index]
