"""Which siblings' queries hold the gold answer."""

import pytest

from megatron_sdsearch.hindsight.block import leaking_siblings, skip_hindsight
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


def searching(sibling: int, *queries: str) -> Trajectory:
    spans: list[ContextSpan | SampledSpan] = [ContextSpan(kind="prompt", token_ids=(1,))]
    for query in queries:
        spans.append(
            SampledSpan(
                token_ids=(2, 3, 4),
                logprobs=(-1.0,) * 3,
                text=f"<search>{query}</search>",
                action=Action.SEARCH,
                argument=query,
                query_positions=(1,),
                policy_version=0,
                finish_reason="stop",
            )
        )
    return Trajectory(
        trajectory_id=TrajectoryId(step=0, question_id="q", sibling=sibling),
        spans=tuple(spans),
        status=TrajectoryStatus.NO_ANSWER,
    )


def leaks_of(trajectories: list[Trajectory], *gold_answers: str) -> tuple[int, ...]:
    score = Score(f1=0.0, em=0.0, reward=0.0, is_correct=False)
    question = Question(question_id="q", text="?", gold_answers=gold_answers)
    scores = (score,) * len(trajectories)
    return leaking_siblings(RolloutGroup(question=question, trajectories=tuple(trajectories), scores=scores))


@pytest.mark.parametrize(
    ("query", "leaks"),
    [
        ("is Rome the capital", True),
        ("ROME!", True),  # compared after normalisation
        ("romeo and juliet", False),  # whole words only
        ("capital of italy", False),
        ("the eternal city", True),  # any gold answer counts
    ],
)
def test_a_query_leaks_when_it_holds_a_gold_answer_as_whole_words(query: str, leaks: bool) -> None:
    assert leaks_of([searching(7, query)], "Rome", "Eternal City") == ((7,) if leaks else ())


def test_each_query_is_looked_at_alone_and_siblings_are_named_by_their_number() -> None:
    trajectories = [searching(4, "new", "york"), searching(2, "first", "new york"), searching(9)]
    assert leaks_of(trajectories, "New York") == (2,)


def test_text_outside_the_query_is_masked_from_the_teacher_and_cannot_leak() -> None:
    trajectory = searching(0, "capital")
    answer = SampledSpan(
        token_ids=(5,),
        logprobs=(-1.0,),
        text="<answer>Rome</answer>",
        action=Action.ANSWER,
        argument="Rome",
        query_positions=(),
        policy_version=0,
        finish_reason="stop",
    )
    with_answer = Trajectory(
        trajectory_id=trajectory.trajectory_id, spans=(*trajectory.spans, answer), status=TrajectoryStatus.ANSWERED
    )
    assert leaks_of([with_answer], "Rome") == ()


def test_a_step_without_distillation_shows_nothing_and_measures_leaks() -> None:
    score = Score(f1=0.0, em=0.0, reward=0.0, is_correct=False)
    group = RolloutGroup(
        question=Question(question_id="q", text="?", gold_answers=("Rome",)),
        trajectories=(searching(0, "rome"), searching(1, "italy")),
        scores=(score, score),
    )
    ((first, second),) = skip_hindsight([group])
    assert first == second
    assert (first.text, first.teacher_prompt_ids, first.sources, first.leaks) == ("", (), (), (0,))
