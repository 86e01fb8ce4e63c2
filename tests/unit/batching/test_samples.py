"""The next-token shift, and the teacher's sequence."""

import dataclasses
from collections.abc import Callable

import numpy as np
import pytest

from megatron_sdsearch.batching.samples import build_samples, teacher_sequences
from megatron_sdsearch.config import ObjectiveConfig
from megatron_sdsearch.errors import AlignmentError
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    HindsightBlock,
    Question,
    RolloutGroup,
    SampledSpan,
    Score,
    TeacherPrompt,
    TrainingSample,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)

TEACHER_PROMPT = (90, 91, 92, 93, 94)


def span(ids: tuple[int, ...], query: tuple[int, ...] = ()) -> SampledSpan:
    return SampledSpan(
        token_ids=ids,
        logprobs=tuple(-i / 10 for i in ids),
        text="",
        action=Action.SEARCH if query else Action.ANSWER,
        argument="",
        query_positions=query,
        policy_version=0,
        finish_reason="stop",
    )


#                 prompt     sampled, query 21 22      observation   sampled, query 41   sampled
# index           0  1  2    3   4   5   6             7   8         9   10  11          12  13
def trajectory(sibling: int = 0, status: TrajectoryStatus = TrajectoryStatus.ANSWERED) -> Trajectory:
    return Trajectory(
        trajectory_id=TrajectoryId(step=5, question_id="q", sibling=sibling),
        spans=(
            ContextSpan(kind="prompt", token_ids=(10, 11, 12)),
            span((20, 21, 22, 23), query=(1, 2)),
            ContextSpan(kind="observation", token_ids=(30, 31)),
            span((40, 41, 42), query=(1,)),
            span((50, 51)),
        ),
        status=status,
    )


def block(teacher_prompt: tuple[int, ...] = TEACHER_PROMPT) -> HindsightBlock:
    return HindsightBlock(text="x", teacher_prompt_ids=teacher_prompt, sources=(0,), dropped=(), leaks=())


def group_of(*trajectories: Trajectory) -> RolloutGroup:
    return RolloutGroup(
        question=Question(question_id="q", text="q", gold_answers=("a",)),
        trajectories=trajectories,
        scores=(Score(f1=0.0, em=0.0, reward=0.0, is_correct=False),) * len(trajectories),
    )


def sample(**objective: object) -> TrainingSample:
    settings = ObjectiveConfig.model_validate(objective)
    return build_samples(group_of(trajectory()), [0.5], [block()], settings)[0]


def test_every_array_speaks_of_the_next_token() -> None:
    built = sample()
    assert built.token_ids.tolist() == [10, 11, 12, 20, 21, 22, 23, 30, 31, 40, 41, 42, 50, 51]
    assert built.labels.tolist() == [11, 12, 20, 21, 22, 23, 30, 31, 40, 41, 42, 50, 51, 0]
    assert built.labels[built.loss_mask].tolist() == [20, 21, 22, 23, 40, 41, 42, 50, 51]
    assert built.labels[built.distill_mask].tolist() == [21, 22, 41]
    assert built.rollout_logprobs[built.loss_mask].tolist() == [-2.0, -2.1, -2.2, -2.3, -4.0, -4.1, -4.2, -5.0, -5.1]
    assert not built.rollout_logprobs[~built.loss_mask].any()
    assert not built.loss_mask[-1]
    assert (built.prompt_length, built.advantage, built.sample_id) == (3, 0.5, "6/q/0")
    assert built.teacher_prompts == (TeacherPrompt(token_ids=TEACHER_PROMPT, start=0, end=14),)
    assert built.token_ids.dtype == np.int64
    assert built.labels.dtype == np.int64


def test_untrainable_trajectories_are_skipped_with_their_advantage_and_block() -> None:
    group = group_of(trajectory(0, TrajectoryStatus.RETRIEVAL_FAILED), trajectory(1))
    samples = build_samples(group, [9.0, 0.25], [block((7,)), block((8,))], ObjectiveConfig())
    assert [(s.sample_id, s.advantage, s.teacher_prompts[0].token_ids) for s in samples] == [("6/q/1", 0.25, (8,))]


def test_all_positions_distil_when_asked() -> None:
    built = sample(distill_positions="all")
    assert built.distill_mask.tolist() == built.loss_mask.tolist()


def test_an_empty_prompt_is_refused_because_nothing_predicts_the_first_token() -> None:
    bare = dataclasses.replace(trajectory(), spans=(ContextSpan(kind="prompt", token_ids=()), span((1, 2))))
    with pytest.raises(AlignmentError, match="6/q/0"):
        build_samples(group_of(bare), [0.0], [block()], ObjectiveConfig())


def test_advantages_that_do_not_go_with_the_group_are_refused() -> None:
    with pytest.raises(ValueError, match="shorter"):
        build_samples(group_of(trajectory(0), trajectory(1)), [0.5], [block(), block()], ObjectiveConfig())


def test_the_teacher_reads_its_own_prompt_and_the_same_response_up_to_the_last_query_token() -> None:
    (teacher,) = teacher_sequences(sample())
    # 41 is the last query token: 40 predicts it, so 40 is the last input.
    assert teacher.token_ids.tolist() == [*TEACHER_PROMPT, 20, 21, 22, 23, 30, 31, 40]
    assert np.flatnonzero(teacher.distill_mask).tolist() == [5, 6, 11]
    assert teacher.distill_mask[-1]
    assert teacher.labels.tolist() == [*TEACHER_PROMPT[1:], 20, 21, 22, 23, 30, 31, 40, 41]
    assert not teacher.loss_mask.any()
    assert not teacher.rollout_logprobs.any()


def test_teacher_positions_are_the_student_s_moved_by_the_prompts_difference() -> None:
    built = sample()
    (teacher,) = teacher_sequences(built)
    moved = np.flatnonzero(built.distill_mask) + len(TEACHER_PROMPT) - built.prompt_length
    assert np.flatnonzero(teacher.distill_mask).tolist() == moved.tolist()


def test_with_all_positions_the_first_response_token_is_predicted_by_the_prompt_s_last() -> None:
    (teacher,) = teacher_sequences(sample(distill_positions="all"))
    assert teacher.token_ids.tolist() == [*TEACHER_PROMPT, 20, 21, 22, 23, 30, 31, 40, 41, 42, 50]
    assert np.flatnonzero(teacher.distill_mask)[0] == len(TEACHER_PROMPT) - 1


def with_label(built: TrainingSample, position: int, label: int) -> TrainingSample:
    labels = built.labels.copy()
    labels[position] = label
    return dataclasses.replace(built, labels=labels)


def with_query_at(built: TrainingSample, position: int) -> TrainingSample:
    distill_mask = built.distill_mask.copy()
    distill_mask[position] = True
    return dataclasses.replace(built, distill_mask=distill_mask)


@pytest.mark.parametrize(
    ("spoil", "position"),
    [
        (lambda s: with_label(s, 4, 99), 4),  # one label differs
        (lambda s: dataclasses.replace(s, labels=s.token_ids), 3),  # not shifted
        (lambda s: dataclasses.replace(s, labels=np.roll(s.labels, -1)), 3),  # shifted twice
        (lambda s: with_query_at(s, 1), 1),  # a query token inside the prompt
        (lambda s: with_query_at(s, 13), 13),  # the last entry has no label
        (lambda s: dataclasses.replace(s, prompt_length=6), 3),  # queries would fall before the response
    ],
)
def test_misalignment_is_an_error_that_names_sample_and_position(
    spoil: Callable[[TrainingSample], TrainingSample], position: int
) -> None:
    with pytest.raises(AlignmentError, match=rf"sample 6/q/0, position {position}:"):
        teacher_sequences(spoil(sample()))


def test_a_query_token_in_the_prompt_is_refused_even_where_both_prompts_end_alike() -> None:
    prompt = TeacherPrompt(token_ids=(99, 98, 10, 11, 12), start=0, end=14)
    alike = dataclasses.replace(with_query_at(sample(), 1), teacher_prompts=(prompt,))
    with pytest.raises(AlignmentError, match="position 1: the query token 12 is not in the response"):
        teacher_sequences(alike)


def test_a_sample_without_teacher_prompt_or_query_has_no_teacher_sequences() -> None:
    built = sample()
    with pytest.raises(AlignmentError, match="nothing to distil"):
        teacher_sequences(dataclasses.replace(built, teacher_prompts=()))
    with pytest.raises(AlignmentError, match="nothing to distil"):
        teacher_sequences(dataclasses.replace(built, distill_mask=np.zeros_like(built.distill_mask)))
