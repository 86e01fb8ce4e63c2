"""Averages over rollouts, worked out by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from megatron_sdsearch.errors import TrainingError
from megatron_sdsearch.evaluation.metrics import require_sampled, summarize, summarize_datasets
from megatron_sdsearch.records import (
    Action,
    ContextSpan,
    Question,
    RolloutGroup,
    SampledSpan,
    Score,
    Trajectory,
    TrajectoryId,
    TrajectoryStatus,
)


def _sampled(num_tokens: int, action: Action) -> SampledSpan:
    return SampledSpan(
        token_ids=(1,) * num_tokens,
        logprobs=(-1.0,) * num_tokens,
        text="",
        action=action,
        argument="x",
        query_positions=(),
        policy_version=0,
        finish_reason="stop",
    )


def _group(
    dataset: str, f1: float, shown: tuple[str, ...] | None, gold: tuple[str, ...], status: TrajectoryStatus
) -> RolloutGroup:
    """One trajectory: a search of 4 tokens that shows ``shown``, if not None, then an answer of 2 tokens."""
    question = Question(
        question_id=f"{dataset}{f1}", text="q", gold_answers=("x",), dataset=dataset, gold_passage_ids=gold
    )
    turns: list[ContextSpan | SampledSpan] = [ContextSpan(kind="prompt", token_ids=(1, 2, 3))]
    if shown is not None:
        turns.append(_sampled(4, Action.SEARCH))
        turns.append(ContextSpan(kind="observation", token_ids=(9,) * 10, passage_ids=shown))
    turns.append(_sampled(2, Action.ANSWER))
    trajectory_id = TrajectoryId(step=0, question_id=question.question_id, sibling=0)
    trajectory = Trajectory(trajectory_id=trajectory_id, spans=tuple(turns), status=status)
    score = Score(f1=f1, em=float(f1 == 1.0), reward=0.0, is_correct=f1 > 0)
    return RolloutGroup(question=question, trajectories=(trajectory,), scores=(score,))


def _without_tokens(status: TrajectoryStatus) -> RolloutGroup:
    group = _group("b", 0.0, None, (), status)
    (trajectory,) = group.trajectories
    return replace(group, trajectories=(replace(trajectory, spans=trajectory.spans[:1]),))


ANSWERED, TRUNCATED = TrajectoryStatus.ANSWERED, TrajectoryStatus.TRUNCATED
GROUPS = [
    _group("b", 1.0, ("p1", "p2"), ("p0", "p2"), ANSWERED),
    _group("b", 0.5, ("p0",), ("p0", "p2"), ANSWERED),  # the first hop alone is no hit
    _group("b", 0.0, None, ("p7",), TRUNCATED),
    _group("a", 0.5, ("p1",), (), ANSWERED),
]


def test_every_trajectory_counts_once() -> None:
    overall = summarize(GROUPS)
    assert (overall.num_questions, overall.num_trajectories) == (4, 4)
    assert (overall.em, overall.f1) == (0.25, 0.5)
    assert overall.hit == pytest.approx(1 / 3)
    assert overall.searches_per_question == 0.75
    assert overall.status_shares == {ANSWERED: 0.75, TRUNCATED: 0.25}
    assert overall.mean_response_tokens == (6 + 6 + 2 + 6) / 4


def test_per_dataset_and_as_json() -> None:
    tree = summarize_datasets(GROUPS)
    assert list(tree["by_dataset"]) == ["a", "b"]
    assert json.loads(json.dumps(tree)) == tree
    assert tree["by_dataset"]["a"] == {
        "num_questions": 1,
        "num_trajectories": 1,
        "num_lost": 0,
        "num_prompt_too_long": 0,
        "num_eos_without_action": 0,
        "em": 0.0,
        "f1": 0.5,
        "searches_per_question": 1.0,
        "status_shares": {"answered": 1.0},
        "mean_response_tokens": 6.0,
    }
    assert tree["by_dataset"]["b"]["hit"] == pytest.approx(1 / 3)


def test_nothing_gives_counts_of_zero_and_no_means() -> None:
    counts = ("num_questions", "num_trajectories", "num_lost", "num_prompt_too_long", "num_eos_without_action")
    assert summarize_datasets([]) == {"overall": {**dict.fromkeys(counts, 0), "status_shares": {}}, "by_dataset": {}}


LOST = [TrajectoryStatus.RETRIEVAL_FAILED, TrajectoryStatus.ABORTED]
TOO_LONG = TrajectoryStatus.PROMPT_TOO_LONG


@pytest.mark.parametrize("status", LOST)
def test_lost_trajectories_are_counted_and_in_no_mean(status: TrajectoryStatus) -> None:
    right = [_group("b", 1.0, ("p2",), ("p2",), ANSWERED)] * 81
    overall = summarize([*right, *[_group("b", 0.0, None, ("p2",), status)] * 19])
    assert (overall.num_trajectories, overall.num_lost) == (100, 19)
    assert (overall.em, overall.f1, overall.hit) == (1.0, 1.0, 1.0)
    assert (overall.searches_per_question, overall.mean_response_tokens) == (1.0, 6.0)
    assert overall.status_shares == {ANSWERED: 0.81, status: 0.19}


@pytest.mark.parametrize("status", LOST)
def test_where_all_are_lost_there_is_a_count_and_no_mean(status: TrajectoryStatus) -> None:
    tree = summarize([_group("b", 1.0, ("p2",), ("p2",), status)] * 3).to_dict()
    assert (tree["num_trajectories"], tree["num_lost"]) == (3, 3)
    assert not {"em", "f1", "hit", "searches_per_question", "mean_response_tokens"} & set(tree)


def test_a_prompt_that_is_too_long_is_a_wrong_answer_and_counted() -> None:
    overall = summarize([_group("b", 1.0, ("p2",), (), ANSWERED), _without_tokens(TOO_LONG)])
    assert (overall.em, overall.num_lost, overall.num_prompt_too_long) == (0.5, 0, 1)


def test_eos_without_an_action_is_counted() -> None:
    group = _group("b", 0.0, ("p2",), (), TrajectoryStatus.NO_ANSWER)
    (trajectory,) = group.trajectories
    ended = replace(_sampled(3, Action.INVALID), finish_reason="eos")
    answered = replace(_sampled(3, Action.ANSWER), finish_reason="eos")
    for span, number in ((ended, 1), (answered, 0), (_sampled(3, Action.INVALID), 0)):
        spans = (*trajectory.spans[:-1], span)
        changed = replace(group, trajectories=(replace(trajectory, spans=spans),))
        assert summarize([changed]).num_eos_without_action == number


def test_nothing_sampled_is_an_error_with_the_counts_and_what_may_help() -> None:
    too_long, failed = _without_tokens(TOO_LONG), _group("b", 1.0, ("p2",), (), LOST[0])
    with pytest.raises(TrainingError) as caught:
        require_sampled([too_long, failed, too_long], "step 3")
    assert str(caught.value) == (
        "step 3: none of its 3 trajectories (2 prompt_too_long, 1 retrieval_failed) has a token to learn from or to "
        "score; raise rollout.max_prompt_tokens; `check` reports the lengths of prompts"
    )
    for status, words in ((LOST[0], "why searches fail"), (LOST[1], "log of the rollout engine")):
        with pytest.raises(TrainingError, match=words):
            require_sampled([_group("b", 1.0, ("p2",), (), status)], "evaluation")
    with pytest.raises(TrainingError, match="none of its 0 trajectories"):
        require_sampled([], "evaluation")
    require_sampled([too_long, failed, _group("b", 0.0, None, (), TRUNCATED)], "step 3")
