"""From trajectories to training samples: the only next-token shift of the project.

Owns the shift, and the teacher's sequence with the proof that it speaks of the same response tokens. After this module
every array is label-aligned: entry i is about predicting token i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.data.scoring import group_class
from megatron_sdsearch.errors import AlignmentError
from megatron_sdsearch.records import (
    BoolArray,
    GroupClass,
    HindsightBlock,
    IntArray,
    RolloutGroup,
    TrainingSample,
    Trajectory,
)

Scalar = TypeVar("Scalar", bound=np.generic)


def build_samples(
    group: RolloutGroup,
    advantages: Sequence[float],
    blocks: Sequence[HindsightBlock],
    objective: ObjectiveConfig,
    *,
    rho: float = 0.0,
) -> list[TrainingSample]:
    """Turn a group's trainable trajectories into samples, in their order.

    Args:
        group: one question's trajectories.
        advantages: one per trajectory.
        blocks: one per trajectory; a block without teacher prompt distils nothing.
        objective: ``distill_positions`` decides between query tokens and all sampled tokens.
        rho: an answer is right when its F1 is above it; decides the group's class.

    Raises:
        AlignmentError: a trajectory has an empty prompt, so that nothing predicts its first sampled token.
        ValueError: ``advantages`` or ``blocks`` do not go with the trajectories.
    """
    rows = zip(group.trajectories, advantages, blocks, strict=True)
    kind = group_class(group, rho)
    return [
        _sample(trajectory, advantage, block, objective, kind)
        for trajectory, advantage, block in rows
        if trajectory.is_trainable
    ]


def teacher_sequence(sample: TrainingSample) -> tuple[IntArray, BoolArray]:
    """The teacher's input: its own prompt, then the very same response ids, up to the last query token's predecessor.

    Response token j sits at ``prompt_length + j`` in the student and at ``len(teacher_prompt_ids) + j`` here. What
    follows the last query token cannot change a distribution before it, so it is cut: the last input id is the one
    that predicts the last query token, whose own id is therefore not in the sequence.

    Args:
        sample: with a teacher prompt and at least one query token.

    Returns:
        ``(token_ids, query_mask)``, both [L_teacher], label-aligned like the sample's own.

    Raises:
        AlignmentError: the sample has nothing to distil, or a query token is not the same on both sides; names the
            sample and the position.
    """
    positions = np.flatnonzero(sample.query_mask)
    if not sample.teacher_prompt_ids or not len(positions):
        raise AlignmentError(f"sample {sample.sample_id} has no teacher prompt or no query token: nothing to distil")
    whole = np.concatenate(
        [np.asarray(sample.teacher_prompt_ids, dtype=np.int64), sample.token_ids[sample.prompt_length :]]
    )
    teacher_positions = positions + len(sample.teacher_prompt_ids) - sample.prompt_length
    _check_alignment(sample, positions, whole, teacher_positions)
    length = int(teacher_positions[-1]) + 1
    query_mask = np.zeros(length, dtype=np.bool_)
    query_mask[teacher_positions] = True
    return whole[:length], query_mask


def _sample(
    trajectory: Trajectory, advantage: float, block: HindsightBlock, objective: ObjectiveConfig, kind: GroupClass
) -> TrainingSample:
    if not trajectory.prompt_ids:
        raise AlignmentError(f"sample {trajectory.trajectory_id} has an empty prompt: nothing predicts its first token")
    token_ids = trajectory.token_ids
    loss_mask = next_token_aligned(trajectory.loss_mask)
    return TrainingSample(
        sample_id=str(trajectory.trajectory_id),
        token_ids=token_ids,
        labels=next_token_aligned(token_ids),
        loss_mask=loss_mask,
        query_mask=loss_mask.copy()
        if objective.distill_positions == "all"
        else next_token_aligned(trajectory.query_mask),
        rollout_logprobs=next_token_aligned(trajectory.rollout_logprobs),
        advantage=advantage,
        prompt_length=len(trajectory.prompt_ids),
        teacher_prompt_ids=block.teacher_prompt_ids,
        group_class=kind,
    )


def next_token_aligned(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """[L] -> [L]: entry i is the input's entry i + 1, the last one 0; the only next-token shift there is."""
    shifted = np.zeros_like(values)
    shifted[:-1] = values[1:]
    return shifted


def _check_alignment(
    sample: TrainingSample, positions: IntArray, teacher_ids: IntArray, teacher_positions: IntArray
) -> None:
    """Each query label of the student is the id that follows the teacher's position; id by id, never by counting."""
    first = len(sample.teacher_prompt_ids) - 1
    for position, teacher_position in zip(positions.tolist(), teacher_positions.tolist(), strict=True):
        label = int(sample.labels[position])
        if not first <= teacher_position < len(teacher_ids) - 1:
            raise AlignmentError(
                f"sample {sample.sample_id}, position {position}: the query token {label} is not in the response"
            )
        teacher_label = int(teacher_ids[teacher_position + 1])
        if teacher_label != label:
            raise AlignmentError(
                f"sample {sample.sample_id}, position {position}: the student's label is {label}, "
                f"the teacher's at {teacher_position} is {teacher_label}"
            )
