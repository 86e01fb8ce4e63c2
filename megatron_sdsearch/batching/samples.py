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
    TeacherPrompt,
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
        blocks: one per trajectory; a block without teacher prompt distils nothing. Where every search has a prompt of
            its own, only the spans of such searches are distilled.
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


def teacher_sequences(sample: TrainingSample) -> list[tuple[IntArray, BoolArray]]:
    """The teacher's inputs: of each prompt that speaks of a query token, in the order of those tokens.

    A sequence is the prompt, then the very same response ids, up to the predecessor of the prompt's last query token.
    Response token j sits at ``prompt_length + j`` in the student and at ``len(prompt.token_ids) + j`` here. What
    follows the last query token cannot change a distribution before it, so it is cut: the last input id is the one
    that predicts the last query token, whose own id is therefore not in the sequence.

    Args:
        sample: with a teacher prompt and at least one query token.

    Returns:
        Pairs ``(token_ids, query_mask)``, both [L_teacher], label-aligned like the sample's own.

    Raises:
        AlignmentError: the sample has nothing to distil, or a query token is not the same on both sides, or is no
            prompt's or several prompts'; names the sample and the position.
    """
    positions = np.flatnonzero(sample.query_mask)
    if not sample.teacher_prompts or not len(positions):
        raise AlignmentError(f"sample {sample.sample_id} has no teacher prompt or no query token: nothing to distil")
    shares = [positions[(positions >= p.start) & (positions < p.end)] for p in sample.teacher_prompts]
    spoken_of = np.concatenate(shares)
    if spoken_of.tolist() != positions.tolist():
        odd = sorted(set(positions) ^ set(spoken_of)) or spoken_of.tolist()
        raise AlignmentError(f"sample {sample.sample_id}, position {odd[0]}: not the query token of one teacher prompt")
    pairs = zip(sample.teacher_prompts, shares, strict=True)
    return [_teacher_sequence(sample, prompt, share) for prompt, share in pairs if len(share)]


def _teacher_sequence(sample: TrainingSample, prompt: TeacherPrompt, positions: IntArray) -> tuple[IntArray, BoolArray]:
    response_ids = sample.token_ids[sample.prompt_length :]
    whole = np.concatenate([np.asarray(prompt.token_ids, dtype=np.int64), response_ids])
    teacher_positions = positions + len(prompt.token_ids) - sample.prompt_length
    _check_alignment(sample, positions, whole, teacher_positions, first=len(prompt.token_ids) - 1)
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
    prompts = _teacher_prompts(trajectory, block)
    distilled = trajectory.loss_mask if objective.distill_positions == "all" else trajectory.query_mask
    return TrainingSample(
        sample_id=str(trajectory.trajectory_id),
        token_ids=token_ids,
        labels=next_token_aligned(token_ids),
        loss_mask=next_token_aligned(trajectory.loss_mask),
        query_mask=next_token_aligned(distilled) & _covered(prompts, len(token_ids)),
        rollout_logprobs=next_token_aligned(trajectory.rollout_logprobs),
        advantage=advantage,
        prompt_length=len(trajectory.prompt_ids),
        teacher_prompts=prompts,
        group_class=kind,
    )


def _teacher_prompts(trajectory: Trajectory, block: HindsightBlock) -> tuple[TeacherPrompt, ...]:
    if not block.search_prompt_ids:
        ids, end = block.teacher_prompt_ids, len(trajectory.token_ids)
        return (TeacherPrompt(token_ids=ids, start=0, end=end),) if ids else ()
    ranges = trajectory.search_ranges
    # One earlier: the position that predicts a token is the one before it.
    return tuple(
        TeacherPrompt(token_ids=ids, start=start - 1, end=end - 1)
        for ids, (start, end) in zip(block.search_prompt_ids, ranges, strict=True)
        if ids
    )


def _covered(prompts: Sequence[TeacherPrompt], length: int) -> BoolArray:
    mask = np.zeros(length, dtype=np.bool_)
    for prompt in prompts:
        mask[prompt.start : prompt.end] = True
    return mask


def next_token_aligned(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """[L] -> [L]: entry i is the input's entry i + 1, the last one 0; the only next-token shift there is."""
    shifted = np.zeros_like(values)
    shifted[:-1] = values[1:]
    return shifted


def _check_alignment(
    sample: TrainingSample, positions: IntArray, teacher_ids: IntArray, teacher_positions: IntArray, *, first: int
) -> None:
    """Each query label of the student is the id that follows the teacher's position; id by id, never by counting."""
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
