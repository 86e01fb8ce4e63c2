"""Builds training samples from trajectories and demonstrations, and the teacher's sequences from samples.

The only next-token shift of the project is here: the arrays of a sample are label-aligned, entry i describes the
prediction of token i + 1. Teacher sequences are checked to hold the same response tokens as the student's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
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

if TYPE_CHECKING:  # the renderer loads a tokenizer library, which trajectories do not need
    from megatron_sdsearch.tokenization.renderer import Renderer

Scalar = TypeVar("Scalar", bound=np.generic)


def build_samples(
    group: RolloutGroup,
    advantages: Sequence[float],
    blocks: Sequence[HindsightBlock],
    objective: ObjectiveConfig,
) -> list[TrainingSample]:
    """Turn a group's trainable trajectories into samples, in order.

    Args:
        group: one question's trajectories.
        advantages: one per trajectory.
        blocks: one per trajectory; a block without a teacher prompt distils nothing. If every search has a prompt of
            its own, only the spans of searches with a prompt are distilled.
        objective: ``distill_positions`` chooses between query tokens and all sampled tokens.

    Raises:
        AlignmentError: a trajectory has an empty prompt, so nothing predicts its first sampled token.
        ValueError: the numbers of ``advantages``, ``blocks`` and trajectories differ.
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
    """Encode each span once: sampled spans as the policy's own text, observations as untrusted text.

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
            f"{name}: the tokenizer encodes its sampled text to no tokens, so there is nothing to learn: remove it"
        )
    labels, no_mask = next_token_aligned(token_ids), np.zeros(len(token_ids), dtype=np.bool_)
    sample = unlearned_sample(demonstration.demonstration_id, token_ids, labels, no_mask)
    return replace(sample, loss_mask=next_token_aligned(is_sampled), prompt_length=len(prompt))


def teacher_sequences(sample: TrainingSample) -> list[TrainingSample]:
    """Build the teacher's sequences: one for each prompt with distilled tokens, in the order of those tokens.

    A sequence is the prompt followed by the same response ids. Response token j is at ``prompt_length + j`` in the
    student's sequence and at ``len(prompt.token_ids) + j`` here. Tokens after the last distilled one cannot change a
    distribution before it, so the sequence ends with the input that predicts that token; the token itself is only the
    last label.

    Args:
        sample: with a teacher prompt and at least one distilled token.

    Returns:
        Samples with a ``distill_mask`` that marks the student's distilled tokens, in the student's order.

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
    """Build a sequence that does not enter the policy loss: the teacher's, or padding."""
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
    """Shift [L] -> [L]: entry i becomes the input's entry i + 1, the last one 0."""
    shifted = np.zeros_like(values)
    shifted[:-1] = values[1:]
    return shifted


def _teacher_prompts(trajectory: Trajectory, block: HindsightBlock) -> tuple[TeacherPrompt, ...]:
    if not block.search_prompt_ids:
        ids, end = block.teacher_prompt_ids, len(trajectory.token_ids)
        return (TeacherPrompt(token_ids=ids, start=0, end=end),) if ids else ()
    # Shifted by one, because a token is predicted at the position before it.
    return tuple(
        TeacherPrompt(token_ids=ids, start=start - 1, end=end - 1)
        for ids, (start, end) in zip(block.search_prompt_ids, trajectory.search_ranges, strict=True)
        if ids
    )


def _teacher_sequence(sample: TrainingSample, prompt: TeacherPrompt, positions: IntArray) -> TrainingSample:
    """Build one teacher sequence and check each distilled label against the id that follows its teacher position."""
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
