"""Training samples from trajectories and demonstrations: the only next-token shift of the project.

Owns the shift, and the teacher's sequences with the proof that they hold the same response tokens. After this module
every array is label-aligned: entry i is about predicting token i + 1.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from numpy.typing import NDArray

from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.data.demonstrations import Demonstration
from megatron_sdsearch.data.scoring import group_class
from megatron_sdsearch.errors import AlignmentError, DataError
from megatron_sdsearch.records import (
    BoolArray,
    HindsightBlock,
    IntArray,
    RolloutGroup,
    TeacherPrompt,
    TrainingSample,
    Trajectory,
)

if TYPE_CHECKING:  # the renderer loads a tokenizer library; trajectories need none
    from megatron_sdsearch.tokenization.renderer import Renderer

Scalar = TypeVar("Scalar", bound=np.generic)


def build_samples(
    group: RolloutGroup,
    advantages: Sequence[float],
    blocks: Sequence[HindsightBlock],
    objective: ObjectiveConfig,
) -> list[TrainingSample]:
    """Turn a group's trainable trajectories into samples, in their order.

    Args:
        group: one question's trajectories.
        advantages: one per trajectory.
        blocks: one per trajectory; a block without teacher prompt distils nothing. Where every search has a prompt of
            its own, only the spans of such searches are distilled.
        objective: ``distill_positions`` decides between query tokens and all sampled tokens.

    Raises:
        AlignmentError: a trajectory has an empty prompt, so that nothing predicts its first sampled token.
        ValueError: ``advantages`` or ``blocks`` do not go with the trajectories.
    """
    class_of_group, samples = group_class(group), []
    for trajectory, advantage, block in zip(group.trajectories, advantages, blocks, strict=True):
        if not trajectory.is_trainable:
            continue
        name, token_ids = str(trajectory.trajectory_id), trajectory.token_ids
        if not trajectory.prompt_ids:
            raise AlignmentError(f"sample {name} has an empty prompt: nothing predicts its first token")
        prompts = _teacher_prompts(trajectory, block)
        is_covered = np.zeros(len(token_ids), dtype=np.bool_)
        for prompt in prompts:
            is_covered[prompt.start : prompt.end] = True
        is_distilled = trajectory.loss_mask if objective.distill_positions == "all" else trajectory.query_mask
        samples.append(
            TrainingSample(
                sample_id=name,
                token_ids=token_ids,
                labels=next_token_aligned(token_ids),
                loss_mask=next_token_aligned(trajectory.loss_mask),
                distill_mask=next_token_aligned(is_distilled) & is_covered,
                rollout_logprobs=next_token_aligned(trajectory.rollout_logprobs),
                advantage=advantage,
                prompt_length=len(trajectory.prompt_ids),
                teacher_prompts=prompts,
                group_class=class_of_group,
            )
        )
    return samples


def demonstration_sample(demonstration: Demonstration, renderer: Renderer, max_tokens: int) -> TrainingSample:
    """Encode each span once, in place: sampled spans as the policy's own text, observed ones as text from outside.

    Raises:
        DataError: the demonstration is longer than ``max_tokens``, or its sampled text has no tokens.
    """
    name = f"demonstration {demonstration.demonstration_id}"
    prompt = renderer.prompt_ids(demonstration.prompt)
    pieces = [np.asarray(prompt, dtype=np.int64)]
    sampled = [np.zeros(len(prompt), dtype=np.bool_)]
    for span in demonstration.spans:
        ids = renderer.encode_own(span.text) if span.kind == "sampled" else renderer.encode(span.text)
        pieces.append(np.asarray(ids, dtype=np.int64))
        sampled.append(np.full(len(ids), span.kind == "sampled"))
    token_ids, is_sampled = np.concatenate(pieces), np.concatenate(sampled)
    if len(token_ids) > max_tokens:
        raise DataError(
            f"{name} has {len(token_ids)} tokens, more than train.max_tokens_per_microbatch = {max_tokens}: "
            "shorten it or raise the budget"
        )
    if not is_sampled.any():
        raise DataError(
            f"{name}: the tokenizer makes no token of its sampled text, so there is nothing to learn: remove it"
        )
    return TrainingSample(
        sample_id=demonstration.demonstration_id,
        token_ids=token_ids,
        labels=next_token_aligned(token_ids),
        loss_mask=next_token_aligned(is_sampled),
        distill_mask=np.zeros(len(token_ids), dtype=np.bool_),
        rollout_logprobs=np.zeros(len(token_ids)),
        prompt_length=len(prompt),
    )


def teacher_sequences(sample: TrainingSample) -> list[TrainingSample]:
    """The teacher's inputs: one for each prompt that has a token to distil, in the order of those tokens.

    A sequence is the prompt, then the very same response ids, up to the predecessor of the prompt's last distilled
    token. Response token j sits at ``prompt_length + j`` in the student and at ``len(prompt.token_ids) + j`` here. What
    follows the last distilled token cannot change a distribution before it, so it is cut: the last input id is the one
    that predicts that token, whose own id is the last label only.

    Args:
        sample: with a teacher prompt and at least one token to distil.

    Returns:
        Samples whose ``distill_mask`` marks the student's tokens in the student's order, and nothing else.

    Raises:
        AlignmentError: the sample has nothing to distil, or a token differs between the two sides, or belongs to no
            prompt or to several; names the sample and the position.
    """
    positions = np.flatnonzero(sample.distill_mask)
    if not sample.teacher_prompts or not len(positions):
        raise AlignmentError(f"sample {sample.sample_id} has no teacher prompt or no query token: nothing to distil")
    shares = [positions[(positions >= p.start) & (positions < p.end)] for p in sample.teacher_prompts]
    covered = np.concatenate(shares)
    if covered.tolist() != positions.tolist():
        odd = sorted(set(positions) ^ set(covered)) or covered.tolist()
        raise AlignmentError(f"sample {sample.sample_id}, position {odd[0]}: not the query token of one teacher prompt")
    pairs = zip(sample.teacher_prompts, shares, strict=True)
    return [_teacher_sequence(sample, prompt, share) for prompt, share in pairs if len(share)]


def unlearned_sample(sample_id: str, token_ids: IntArray, labels: IntArray, distill_mask: BoolArray) -> TrainingSample:
    """A sequence that enters no policy loss: the teacher's, or padding."""
    return TrainingSample(
        sample_id=sample_id,
        token_ids=token_ids,
        labels=labels,
        loss_mask=np.zeros(len(token_ids), dtype=np.bool_),
        distill_mask=distill_mask,
        rollout_logprobs=np.zeros(len(token_ids)),
        prompt_length=len(token_ids),
    )


def next_token_aligned(values: NDArray[Scalar]) -> NDArray[Scalar]:
    """[L] -> [L]: entry i is the input's entry i + 1, the last one 0; the only next-token shift there is."""
    shifted = np.zeros_like(values)
    shifted[:-1] = values[1:]
    return shifted


def _teacher_prompts(trajectory: Trajectory, block: HindsightBlock) -> tuple[TeacherPrompt, ...]:
    if not block.search_prompt_ids:
        ids, end = block.teacher_prompt_ids, len(trajectory.token_ids)
        return (TeacherPrompt(token_ids=ids, start=0, end=end),) if ids else ()
    # One earlier: the position that predicts a token is the one before it.
    return tuple(
        TeacherPrompt(token_ids=ids, start=start - 1, end=end - 1)
        for ids, (start, end) in zip(block.search_prompt_ids, trajectory.search_ranges, strict=True)
        if ids
    )


def _teacher_sequence(sample: TrainingSample, prompt: TeacherPrompt, positions: IntArray) -> TrainingSample:
    """Checks id by id, never by counting: each distilled label must follow the teacher's position."""
    response_ids = sample.token_ids[sample.prompt_length :]
    ids = np.concatenate([np.asarray(prompt.token_ids, dtype=np.int64), response_ids])
    teacher_positions = positions + len(prompt.token_ids) - sample.prompt_length
    for position, teacher_position in zip(positions.tolist(), teacher_positions.tolist(), strict=True):
        at, label = f"sample {sample.sample_id}, position {position}", int(sample.labels[position])
        if not len(prompt.token_ids) - 1 <= teacher_position < len(ids) - 1:
            raise AlignmentError(f"{at}: the query token {label} is not in the response")
        if (teacher_label := int(ids[teacher_position + 1])) != label:
            raise AlignmentError(
                f"{at}: the student's label is {label}, the teacher's at {teacher_position} is {teacher_label}"
            )
    length = int(teacher_positions[-1]) + 1
    distill_mask = np.zeros(length, dtype=np.bool_)
    distill_mask[teacher_positions] = True
    return unlearned_sample(sample.sample_id, ids[:length], ids[1 : length + 1], distill_mask)
