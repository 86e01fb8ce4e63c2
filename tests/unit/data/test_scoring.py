"""Answers against gold answers, and the three rewards."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from megatron_sdsearch.data.scoring import (
    contains_answer,
    exact_match,
    f1_score,
    group_class,
    normalize_answer,
    score_trajectory,
)
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

ANSWERS = st.lists(st.sampled_from("the a river Mine, yes no. noanswer 17 canal's".split()), max_size=5).map(" ".join)


@pytest.mark.parametrize(
    ("text", "normal"),
    [
        ("The  Quick, brown\tFox!", "quick brown fox"),
        ("a an the", ""),
        ("Anthem of Athens", "anthem of athens"),
        ("O'Neil-Smith's", "oneilsmiths"),
        ("3.14", "314"),
        ("\u201cRiver\u201d \u00c9cole", "\u201criver\u201d \u00e9cole"),  # only ASCII punctuation goes, as in SQuAD
    ],
)
def test_normalization_is_squads(text: str, normal: str) -> None:
    assert normalize_answer(text) == normal


@given(st.text(alphabet=st.characters(codec="ascii")))
def test_normalization_is_idempotent_on_ascii(text: str) -> None:
    assert normalize_answer(normalize_answer(text)) == normalize_answer(text)


@pytest.mark.parametrize(
    ("answer", "gold", "f1", "em"),
    [
        ("The River", "river", 1.0, 1.0),
        ("old river", "river", 2 / 3, 0.0),
        ("river river canal", "river canal mine", 2 / 3, 0.0),
        ("mine", "river", 0.0, 0.0),
        ("", "river", 0.0, 0.0),
        ("the", "river", 0.0, 0.0),
        ("yes it is", "yes", 0.0, 0.0),
        ("yes", "yes it is", 0.0, 0.0),
        ("Yes.", "yes", 1.0, 1.0),
        ("A", "A", 1.0, 1.0),
        ("the", "A", 0.0, 0.0),
        ("", "A", 0.0, 0.0),
    ],
)
def test_f1_and_exact_match(answer: str, gold: str, f1: float, em: float) -> None:
    assert f1_score(answer, [gold]) == pytest.approx(f1)
    assert exact_match(answer, [gold]) == em


@given(ANSWERS, st.lists(ANSWERS, min_size=1, max_size=4))
def test_best_gold_answer_counts_and_em_implies_f1(answer: str, golds: list[str]) -> None:
    f1, em = f1_score(answer, golds), exact_match(answer, golds)
    assert f1 == max(f1_score(answer, [gold]) for gold in golds)
    assert em == max(exact_match(answer, [gold]) for gold in golds)
    assert 0.0 <= em <= f1 <= 1.0
    assert em < 1.0 or f1 == 1.0


@given(ANSWERS, ANSWERS)
def test_f1_is_symmetric_for_ordinary_answers(left: str, right: str) -> None:
    if normalize_answer(left) and normalize_answer(right):
        assert f1_score(left, [right]) == pytest.approx(f1_score(right, [left]))


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("who owns the Salt Works?", True),
        ("salt-works", False),  # SQuAD deletes the hyphen and so joins the words
        ("salt the works", True),
        ("basalt works", False),
        ("salt workshop", False),
        ("works salt", False),
        ("", False),
    ],
)
def test_gold_answers_are_found_as_whole_words(text: str, found: bool) -> None:
    assert contains_answer(text, ["copper", "the salt works"]) is found


def test_gold_answer_that_normalizes_to_nothing_is_never_found() -> None:
    assert not contains_answer("the a an", ["The", "!"])


@given(ANSWERS, ANSWERS, ANSWERS)
def test_surrounded_answer_is_found(before: str, answer: str, after: str) -> None:
    assert contains_answer(f"{before} {answer} {after}", [answer]) is bool(normalize_answer(answer))


QUESTION = Question(question_id="q", text="Which?", gold_answers=("salt works", "mine"))


def trajectory(*texts: str, answer: str | None, observation: str = "") -> Trajectory:
    """Sampled spans with an observation's ids between them; only the last one may answer."""
    spans: list[ContextSpan | SampledSpan] = [ContextSpan(kind="prompt", token_ids=(1,))]
    for index, text in enumerate(texts):
        is_answer = index == len(texts) - 1 and answer is not None
        span = SampledSpan(
            token_ids=(2,),
            logprobs=(0.0,),
            text=text,
            action=Action.ANSWER if is_answer else Action.SEARCH,
            argument=(answer or "") if is_answer else "query",
            query_positions=(),
            policy_version=0,
            finish_reason="stop",
        )
        spans += [span, ContextSpan(kind="observation", token_ids=tuple(observation.encode()))] * (not is_answer)
        spans += [span] * is_answer
    trajectory_id = TrajectoryId(step=0, question_id="q", sibling=0)
    return Trajectory(trajectory_id=trajectory_id, spans=tuple(spans), status=TrajectoryStatus.ANSWERED)


GOOD_REFINE = "<refine>It was the Salt Works\nof old.</refine><search>x</search>"


@pytest.mark.parametrize(
    ("texts", "answer", "kind", "reward"),
    [
        ((GOOD_REFINE, "end"), "mine", "autorefine", 1.0),
        ((GOOD_REFINE, "end"), "deep mine", "autorefine", 2 / 3),
        ((GOOD_REFINE, "end"), "canal", "autorefine", 0.1),
        (("start", "<refine>a mine</refine> end"), "canal", "autorefine", 0.1),
        (("<refine>canal</refine> salt works", "mine"), "canal", "autorefine", 0.0),
        (("<refine>salt works", "</refine>"), "canal", "autorefine", 0.0),
        ((GOOD_REFINE, "end"), None, "autorefine", 0.0),
        ((GOOD_REFINE, "end"), "", "autorefine", 0.1),
        ((GOOD_REFINE, "end"), "deep mine", "f1", 2 / 3),
        ((GOOD_REFINE, "end"), "deep mine", "em", 0.0),
        ((GOOD_REFINE, "end"), "the mine", "em", 1.0),
        ((GOOD_REFINE, "end"), "canal", "f1", 0.0),
    ],
)
def test_rewards(
    texts: tuple[str, ...], answer: str | None, kind: Literal["f1", "em", "autorefine"], reward: float
) -> None:
    assert score_trajectory(trajectory(*texts, answer=answer), QUESTION, kind, 0.0).reward == pytest.approx(reward)


def test_score_holds_f1_and_em_whatever_the_reward() -> None:
    score = score_trajectory(trajectory(GOOD_REFINE, "end", answer="canal"), QUESTION, "autorefine", 0.0)
    assert score == Score(f1=0.0, em=0.0, reward=0.1, is_correct=False)


def test_refinement_inside_an_observation_earns_nothing() -> None:
    shown = trajectory("start", "end", answer="canal", observation="<refine>salt works</refine>")
    assert score_trajectory(shown, QUESTION, "autorefine", 0.0).reward == 0.0


def group_of(correct: list[bool], *, failed: tuple[int, ...] = ()) -> RolloutGroup:
    member = trajectory("<answer>x</answer>", answer="x")
    lost = replace(member, status=TrajectoryStatus.RETRIEVAL_FAILED)
    return RolloutGroup(
        question=QUESTION,
        trajectories=tuple(lost if i in failed else member for i in range(len(correct))),
        scores=tuple(Score(f1=0.5, em=0.0, reward=0.1, is_correct=is_correct) for is_correct in correct),
    )


@pytest.mark.parametrize(
    ("answer", "rho", "is_correct"),
    [
        ("salt", 0.0, True),  # half of the gold answer: F1 2/3
        ("salt", 2 / 3, False),  # rho itself is not above rho
        ("salt", 0.66, True),
        ("canal", 0.0, False),
        (None, 0.0, False),
    ],
)
def test_an_answer_is_correct_when_its_f1_is_above_rho_whatever_the_reward(
    answer: str | None, rho: float, is_correct: bool
) -> None:
    score = score_trajectory(trajectory(GOOD_REFINE, "end", answer=answer), QUESTION, "autorefine", rho)
    assert score.is_correct == is_correct


@pytest.mark.parametrize(
    ("correct", "expected"), [([True] * 2, "all_correct"), ([False] * 2, "all_wrong"), ([True, False], "mixed")]
)
def test_the_class_goes_by_what_is_correct(correct: list[bool], expected: str) -> None:
    assert group_class(group_of(correct)) == expected


def test_the_class_ignores_untrainable_trajectories() -> None:
    assert group_class(group_of([True, False], failed=(1,))) == "all_correct"
    assert group_class(group_of([True], failed=(0,))) == "all_wrong"
