"""Averages over rollouts, worked out by hand."""

from __future__ import annotations

import json

import pytest

from megatron_sdsearch.evaluation import summarize
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
    score = Score(f1=f1, em=float(f1 == 1.0), reward=0.0)
    return RolloutGroup(question=question, trajectories=(trajectory,), scores=(score,))


ANSWERED, TRUNCATED = TrajectoryStatus.ANSWERED, TrajectoryStatus.TRUNCATED
GROUPS = [
    _group("b", 1.0, ("p1", "p2"), ("p0", "p2"), ANSWERED),
    _group("b", 0.5, ("p0",), ("p0", "p2"), ANSWERED),  # the first hop alone is no hit
    _group("b", 0.0, None, ("p7",), TRUNCATED),
    _group("a", 0.5, ("p1",), (), ANSWERED),
]


def test_every_trajectory_counts_once() -> None:
    overall = summarize(GROUPS).overall
    assert (overall.num_questions, overall.num_trajectories) == (4, 4)
    assert (overall.em, overall.f1) == (0.25, 0.5)
    assert overall.hit == pytest.approx(1 / 3)
    assert overall.searches_per_question == 0.75
    assert overall.status_shares == {ANSWERED: 0.75, TRUNCATED: 0.25}
    assert overall.mean_response_tokens == (6 + 6 + 2 + 6) / 4


def test_per_dataset_and_as_json() -> None:
    summary = summarize(GROUPS)
    assert list(summary.by_dataset) == ["a", "b"]
    tree = summary.to_dict()
    assert json.loads(json.dumps(tree)) == tree
    assert tree["by_dataset"]["a"] == {
        "num_questions": 1,
        "num_trajectories": 1,
        "em": 0.0,
        "f1": 0.5,
        "searches_per_question": 1.0,
        "status_shares": {"answered": 1.0},
        "mean_response_tokens": 6.0,
    }
    assert tree["by_dataset"]["b"]["hit"] == pytest.approx(1 / 3)


def test_nothing_gives_counts_of_zero_and_no_means() -> None:
    assert summarize([]).to_dict() == {
        "overall": {"num_questions": 0, "num_trajectories": 0, "status_shares": {}},
        "by_dataset": {},
    }
